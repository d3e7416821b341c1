"""GPTQ: quantization of a weight that minimizes the error of its products, not of its values.

For a weight w [K, N] and input rows x [K], the error of the products is
sum over x of |x (w - q)|^2 = trace((w - q)^T H (w - q)) with the Hessian H = sum of x^T x [K, K].
With H = R R^T, R upper triangular, r its diagonal and L = (R / r)^T, lower triangular with a diagonal of ones,

    error = sum over k of r_k^2 |(L (w - q))_k|^2

so that the best row k of q is the rounded value of

    x_k = w_k + sum over j < k of L_kj (w - q)_j

which is w_k plus a correction for the errors of the rows before it. These numbers equal those of the published method,
which computes them from a Cholesky factor of the inverse of H; no inverse is formed here. A block's scale and selector
are chosen when its first row is reached. Each option is tried on all rows of the block, with this feedback between
them, and the error that the block adds is the sum of r_k^2 (x_k - q_k)^2.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.typing import ArrayLike
from jaxtyping import Float

from ifjax.arrays.blocking import Blocking
from ifjax.arrays.qtensor import QTensor
from ifjax.arrays.quantize import checked, quantize
from ifjax.codec import Encoding, Loss, Search
from ifjax.codec.blocks import pad_axis, split_blocks
from ifjax.codec.encode import amax_of, block_peaks, joint
from ifjax.codec.feedback import FeedbackBlock, encode_block, with_feedback
from ifjax.codec.headers import header_bytes, normalized, power_near
from ifjax.formats import Format
from ifjax.numerics.byte_order import as_array
from ifjax.numerics.packing import pack


def gptq(
    w: Float[ArrayLike, "..."],
    hessian: Float[ArrayLike, "K K"],
    fmt: str | Format | Encoding = "if4",
    *,
    axis: int = -2,
    loss: Loss | None = None,
    search: str | Search | None = None,
    amax_axes: Sequence[int] = (),
    damping: float = 0.01,
) -> QTensor:
    """Quantize a weight to minimize the error of its products: later rows compensate the errors of earlier ones.

    The result has the same format and size as that of `quantize`; encoding is slower. If the Hessian is a multiple of
    the identity (uncorrelated inputs of equal size), the result equals that of `quantize` bit for bit.

    Rows of w whose input is always zero (zero diagonal), and the padding of the last block, take no part in the
    compensation. A NaN or infinity in w turns its own block into NaN and affects no other column. Under jit or vmap
    the values of the Hessian are not checked; if it has no Cholesky factor, the scales are NaN.

    Args:
        w: float32, bfloat16 or float16 [..., K, ...]. Columns along the other axes do not interact.
        hessian: float32 [K, K], the sum of x^T x over rows x [K] of w's input. Its scale does not matter.
        fmt: a format's name (`ifjax.FORMATS`) or record.
        axis: the axis of length K: the contraction axis of the product, and the blocked axis.
        loss: the loss by which a block's scale and candidate are chosen. None is the error of the products, with the
            feedback inside the block. "mse" and the others of `quantize` are taken on the block's values with the
            corrections of earlier blocks.
        search: scales to try, as for `quantize`.
        amax_axes: axes whose entries each keep their own amax, as for `quantize`: (-1,) for one per output of [K, N].
        damping: fraction of the mean of the Hessian's diagonal that is added to the diagonal. A larger value trusts the
            inputs less.

    Returns:
        A QTensor of w's shape and dtype, blocked along `axis`.

    Raises:
        TypeError: w is not a float array.
        ValueError: shapes do not fit, the Hessian is not finite, symmetric or positive semidefinite, damping is
            negative, or `quantize` rejects an argument.

    Source: GPTQ arXiv 2210.17323, equations 2 and 3. There a scale is fixed by its group's maximum; here it is chosen
    by the error of the products.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import ifjax
        >>> x = jax.random.normal(jax.random.key(0), (256, 4)) @ jax.random.normal(jax.random.key(1), (4, 32))
        >>> w = jax.random.normal(jax.random.key(2), (32, 8))
        >>> q = ifjax.gptq(w, x.T @ x)
        >>> q
        QTensor(if4, 32x8 float32, axis=-2, 4.625 bits a value)
        >>> plain = ifjax.quantize(w, axis=-2)
        >>> bool(jnp.linalg.norm(x @ (w - q.dequantize())) < 0.5 * jnp.linalg.norm(x @ (w - plain.dequantize())))
        True
    """
    how = Encoding.of(fmt, loss=loss, search=search)
    if how.block_2d:
        raise ValueError("gptq feeds errors along one axis, and block_2d shares scales across: use one of them")
    w, place = checked(w, how, axis, amax_axes=amax_axes)
    axis, amax_axes = place["axis"], place["amax_axes"]
    hessian = _checked_hessian(hessian, w.shape[axis])
    if not 0 <= damping < np.inf:
        raise ValueError(f"damping must be finite and not negative, got {damping}")
    if w.size == 0:
        return quantize(w, how, axis=axis, amax_axes=amax_axes)
    factor, order = _factor(hessian, jnp.float32(damping), how.fmt.block)
    if not isinstance(factor, Tracer) and not bool(jnp.isfinite(factor).all()):
        raise ValueError(
            f"hessian with damping={damping} has no Cholesky factor, so it is no sum of x^T x, or damping is too small "
            "for its rounding errors: write damping=0.01"
        )
    own_loss = loss is None and not isinstance(fmt, Encoding)
    return _gptq(lax.stop_gradient(w), factor, order, how=how, axis=axis, amax_axes=amax_axes, own_loss=own_loss)


def _checked_hessian(hessian, k):
    hessian = as_array(hessian)
    if hessian.shape != (k, k):
        raise ValueError(f"hessian must be [K, K] with K = {k}, the length of w along axis, got shape {hessian.shape}")
    if not jnp.issubdtype(hessian.dtype, jnp.floating):
        raise ValueError(f"hessian must be float, got {hessian.dtype}: write hessian.astype(jnp.float32)")
    hessian = lax.stop_gradient(hessian.astype(jnp.float32))
    if not isinstance(hessian, Tracer):
        if not bool(jnp.isfinite(hessian).all()):
            raise ValueError("hessian must be finite: an input was not, or the sum of squares overflows float32")
        if bool((jnp.diagonal(hessian) < 0).any()):
            raise ValueError("hessian must have no negative diagonal: it is the sum of x^T x over the rows of x")
        sizes = jnp.sqrt(jnp.diagonal(hessian))
        if bool((jnp.abs(hessian - hessian.T) > 0.01 * jnp.outer(sizes, sizes)).any()):
            raise ValueError("hessian must be symmetric: it is the sum of x^T x over the rows of x, not a part of it")
    return hessian


@jax.jit(static_argnames="block")
def _factor(hessian, damping, block):
    """Return R [m B, m B] of the damped, padded Hessian with its blocks reordered, and the order, int32 [m]."""
    k, length = len(hessian), -(-len(hessian) // block) * block
    hessian = pad_axis(pad_axis(hessian, length, -1), length, -2)
    largest = jnp.max(jnp.diagonal(hessian))
    hessian = jnp.where(largest > 0, hessian / largest, 0)
    diagonal = jnp.diagonal(hessian)
    # Blocks with large inputs come first, so that all others can compensate their errors. Ties keep their order.
    order = jnp.argsort(-diagonal.reshape(-1, block).sum(-1), stable=True)
    rows = (order[:, None] * block + jnp.arange(block)[None]).reshape(-1)
    # Without damping, inputs that are always zero have a zero diagonal. The bound keeps the matrix positive definite;
    # such rows interact with no others and have almost no weight.
    diagonal = jnp.maximum(diagonal + damping * jnp.sum(diagonal) / k, np.float32(2.0**-40))
    hessian = jnp.where(jnp.eye(len(hessian), dtype=bool), diagonal[:, None], hessian)[rows][:, rows]
    return lax.linalg.cholesky(hessian[::-1, ::-1], symmetrize_input=True)[::-1, ::-1], order


@jax.jit(static_argnames=("how", "axis", "amax_axes", "own_loss"))
def _gptq(w, factor, order, *, how, axis, amax_axes, own_loss):
    fmt = how.fmt
    block, k = fmt.block, w.shape[axis]
    columns = jnp.moveaxis(w, axis, 0).astype(jnp.float32)  # [K, ...]
    # One amax for all, or [1, ...] over the axes of columns.
    amax = amax_of(jnp.where(jnp.isfinite(w), jnp.abs(w), 0).astype(jnp.float32), amax_axes)
    shape, wide = amax.shape, (1,) * (w.ndim - amax.ndim)
    amax = jnp.moveaxis(amax.reshape(*shape, *wide), axis, 0)
    blocks = split_blocks(columns.reshape(k, -1), block, -2)[order]  # [m, B, N]
    r = jnp.diagonal(factor)
    weights = (r * r).reshape(blocks.shape[:2])
    own = None
    if how.search is not None and how.search.rounds:
        unmerged = blocks.reshape(*blocks.shape[:2], *columns.shape[1:])
        peaks = block_peaks(unmerged, -columns.ndim, how)
        amax, own = joint(unmerged, *peaks, amax, weights / jnp.max(weights), how, -columns.ndim)
        own = [payloads.reshape(len(blocks), -1) for payloads in own]
    each = (jnp.broadcast_to(amax, (1, *columns.shape[1:])) if amax_axes else amax).reshape(-1)  # [N] or [1]
    unit, tensor = power_near(each), None
    if fmt.has_tensor_scale:
        # From here on, all numbers are in units of the power of two, so that it is 1.
        tensor = normalized(each * unit, fmt.tensor_constant(), 1)
        blocks, unit = blocks * unit[None, None], jnp.float32(1)

    lower = (factor / r[None]).T.reshape(*blocks.shape[:2], len(factor))  # [m, B, m B]

    def next_block(errors, block_and_own):
        """Encode one block, given the errors w - q [m B, N] of the blocks before it and its index."""
        at, own = block_and_own
        feedback = jnp.dot(lower[at], errors, precision=lax.Precision.HIGHEST)
        within = lax.dynamic_slice_in_dim(lower[at], at * block, block, axis=1)
        # Weights are relative to the largest, so that equal weights are 1 and give the losses of `quantize`.
        weight = weights[at] / jnp.max(weights[at])
        step = FeedbackBlock(with_feedback(blocks[at], feedback), blocks[at], within, weight, unit)
        codes, header, error = encode_block(step, tensor, how, own_loss, own)
        return lax.dynamic_update_slice_in_dim(errors, error, at * block, axis=0), (codes, header)

    errors = jnp.zeros((len(factor), blocks.shape[-1]), jnp.float32)
    _, (codes, headers) = lax.scan(next_block, errors, (jnp.arange(len(blocks)), own))
    codes, headers = codes[jnp.argsort(order)], headers[jnp.argsort(order)]
    codes = jnp.moveaxis(codes.reshape(-1, *columns.shape[1:]), 0, axis)
    headers = jnp.moveaxis(headers.reshape(-1, *columns.shape[1:]), 0, axis)
    scales = header_bytes(headers, fmt.scale.nbytes, axis)
    amax = jnp.moveaxis(amax, 0, axis).reshape(shape) if fmt.has_tensor_scale else None
    return QTensor(pack(codes, fmt.bits, axis), scales, amax, Blocking(fmt, axis, k, w.dtype))
