"""GPTQ: quantize a weight so that its products, not its values, change little.

Of a weight w [K, N] and the rows x of what it is multiplied by, the error of the products is
sum over x of |x (w - q)|^2 = trace((w - q)^T H (w - q)) with the Hessian H = sum of x^T x [K, K].
With H = R R^T, R upper triangular, r its diagonal and L = (R / r)^T, lower triangular with a diagonal of ones,

    error = sum over k of r_k^2 |(L (w - q))_k|^2

so that row k of q is best taken as the rounded value of

    x_k = w_k + sum over j < k of L_kj (w - q)_j

which is w_k and what the rows before it left to be made up for. These are the published method's numbers, which come
there from a Cholesky factor of the inverse of H; no inverse is formed here. A block's scale and choice are taken when
its first row is reached, by trying each on all of the block's rows with this feedback between them: the sum of
r_k^2 (x_k - q_k)^2 is the error that the block adds.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.typing import ArrayLike
from jaxtyping import Float

from ifjax import codec
from ifjax.arrays.qtensor import QTensor
from ifjax.arrays.quantize import Search, _checked, quantize
from ifjax.formats import Format, get_format
from ifjax.numerics.packing import pack


def gptq(
    w: Float[ArrayLike, "..."],
    hessian: Float[ArrayLike, "K K"],
    fmt: str | Format = "if4",
    *,
    axis: int = -2,
    loss: codec.Loss | None = None,
    search: Search | None = None,
    damping: float = 0.01,
) -> QTensor:
    """Quantize a weight for the inputs that it is multiplied by: later values make up for earlier ones' errors.

    Of the same format and size as `quantize` gives, and slower to encode. With a Hessian that is a multiple of the
    identity (inputs without correlation and of one size) it is what `quantize` gives, bit for bit.

    Rows of w whose input never fires (zero diagonal) neither make up for others nor are made up for; so it is with a
    last block's filling zeros. A NaN or infinity in w makes NaN of its own block, and changes no other column. Under
    jit or vmap the values of the Hessian are not checked; one without a Cholesky factor then gives NaN scales.

    Args:
        w: float32, bfloat16 or float16 [..., K, ...]. The other axes, if any, are columns that do not interact.
        hessian: float32 [K, K], the sum of x^T x over rows x [K] of w's input. Its scale does not matter.
        fmt: a format's name (`ifjax.FORMATS`) or record.
        axis: the axis of K, along which w is multiplied and blocks lie.
        loss: what chooses a block's scale and candidate. None: the error of the products, with the feedback inside the
            block. "mse", ... as for `quantize`: of the block's values as they stand when its first row is reached.
        search: scales to try, as for `quantize`.
        damping: of the mean of the Hessian's diagonal, added to its diagonal. More of it trusts the inputs less.

    Returns:
        A QTensor of w's shape and dtype, blocked along `axis`.

    Raises:
        TypeError: w is not a float array.
        ValueError: shapes that do not fit, a Hessian that is not finite or not positive semidefinite, damping that is
            negative, or an argument that `quantize` refuses.

    Source: GPTQ arXiv 2210.17323, equations 2 and 3. There scales are fixed for a group's own maximum; here they are
    chosen for the error of the products.

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
    w, settings = _checked(w, fmt, axis, loss, "nearest", None, False, None, (), search)
    fmt, axis = get_format(fmt), settings["axis"]
    hessian = _checked_hessian(hessian, w.shape[axis])
    if not 0 <= damping < np.inf:
        raise ValueError(f"damping must be finite and not negative, got {damping}")
    if w.size == 0:
        return quantize(w, fmt, axis=axis)
    factor, order = _factor(hessian, jnp.float32(damping), fmt.block)
    if not isinstance(factor, Tracer) and not bool(jnp.isfinite(factor).all()):
        raise ValueError(
            f"hessian with damping={damping} has no Cholesky factor, so it is no sum of x^T x, or damping is too small "
            "for its rounding errors: write damping=0.01"
        )
    return _gptq(lax.stop_gradient(w), factor, order, fmt=fmt, axis=axis, loss=loss, search=search)


def _checked_hessian(hessian, k):
    hessian = jnp.asarray(hessian)
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
    return hessian


@jax.jit(static_argnames="block")
def _factor(hessian, damping, block):
    """R [m B, m B] of the damped Hessian, filled up and its blocks put in order, and that order, int32 [m]."""
    k, length = len(hessian), -(-len(hessian) // block) * block
    hessian = codec.pad_axis(codec.pad_axis(hessian, length, -1), length, -2)
    largest = jnp.max(jnp.diagonal(hessian))
    hessian = jnp.where(largest > 0, hessian / largest, 0)
    diagonal = jnp.diagonal(hessian)
    # Large inputs first, whose errors all others can make up for. On a tie, as where all are equal, in their own order.
    order = jnp.argsort(-diagonal.reshape(-1, block).sum(-1), stable=True)
    rows = (order[:, None] * block + jnp.arange(block)[None]).reshape(-1)
    # The bound is for inputs that never fire, without damping: they are alone, and count for next to nothing.
    diagonal = jnp.maximum(diagonal + damping * jnp.sum(diagonal) / k, np.float32(2.0**-40))
    hessian = jnp.where(jnp.eye(len(hessian), dtype=bool), diagonal[:, None], hessian)[rows][:, rows]
    return lax.linalg.cholesky(hessian[::-1, ::-1], symmetrize_input=True)[::-1, ::-1], order


class _Step(NamedTuple):
    """What the feedback inside a block needs; columns N stand for all axes of w but the blocked one."""

    x: jax.Array  # float32 [B, N]: the block with what earlier blocks left, in units of the tensor's power
    w: jax.Array  # float32 [B, N]: the block itself, in the same units
    within: jax.Array  # float32 [B, B]: L inside the block
    weight: jax.Array  # float32 [B]: r^2 inside the block


@jax.jit(static_argnames=("fmt", "axis", "loss", "search"))
def _gptq(w, factor, order, *, fmt, axis, loss, search):
    block, k = fmt.block, w.shape[axis]
    columns = jnp.moveaxis(w, axis, 0).astype(jnp.float32)
    blocks = codec.split_blocks(columns.reshape(k, -1), block, -2)[order]  # [m, B, N]
    amax, tensor = None, None
    if fmt.scale.largest is not None:
        amax = jnp.max(jnp.where(jnp.isfinite(blocks), jnp.abs(blocks), 0))
        power, scaled_amax = codec.tensor_scale(amax, 1)
        # From here on all is in units of the power, which then is 1.
        blocks, tensor = blocks * power.reshape(()), codec.TensorScale(jnp.ones_like(power), scaled_amax)

    r = jnp.diagonal(factor)
    lower = (factor / r[None]).T.reshape(*blocks.shape[:2], len(factor))  # [m, B, m B]
    weights = (r * r).reshape(blocks.shape[:2])

    def encode_block(errors, at):
        """Errors w - q [m B, N] of the blocks before this one, and the number of this one."""
        feedback = jnp.dot(lower[at], errors, precision=lax.Precision.HIGHEST)
        within = lax.dynamic_slice_in_dim(lower[at], at * block, block, axis=1)
        # In units of the largest: equal weights are 1, and the losses those of `quantize`.
        weight = weights[at] / jnp.max(weights[at])
        step = _Step(_add(blocks[at], feedback), blocks[at], within, weight)
        word = _choose(step, tensor, fmt, loss, search)
        codes, error = _encode(step, word, tensor, fmt)
        errors = lax.dynamic_update_slice_in_dim(errors, error, at * block, axis=0)
        return errors, (codes, (word & 0xFF).astype(jnp.uint8))

    errors = jnp.zeros((len(factor), blocks.shape[-1]), jnp.float32)
    _, (codes, scales) = lax.scan(encode_block, errors, jnp.arange(len(blocks)))
    codes, scales = codes[jnp.argsort(order)], scales[jnp.argsort(order)]
    codes = jnp.moveaxis(codes.reshape(-1, *columns.shape[1:]), 0, axis)
    scales = jnp.moveaxis(scales.reshape(-1, *columns.shape[1:]), 0, axis)
    return QTensor(
        codes=pack(codes, fmt.bits, axis),
        scales=lax.bitcast_convert_type(scales, fmt.scale.dtype),
        amax=amax,
        fmt=fmt,
        headroom=1.0,
        axis=axis,
        length=k,
        dtype=w.dtype,
        block_2d=False,
    )


def _choose(step, tensor, fmt, loss, search):
    """int32 [N]: the scale byte of the best candidate, flag included, and the candidate's index << 8."""
    peaks = codec._peaks(step.x, -2, None)
    bytes_ = codec._bytes_for_peak(codec._as_float(codec._magnitude(peaks)), tensor, fmt, 1.0)
    if loss is not None:
        return codec._choose(step.x, peaks, tensor, None, fmt, -2, loss, 1.0, None, search)

    def loss_of(i, byte):
        terms = _round(step, byte, tensor, fmt, i)[1]
        return codec._tree(jnp.add, codec._unstack(terms, 0))

    trials = [(byte, loss_of(i, byte)) for i, byte in enumerate(bytes_)]
    best = codec._better(trials[0], trials[1:], fmt, first=1)
    if search is not None:
        relative, window = codec._trials(search, fmt)

        def try_next(best, code):
            codes = [byte + code if relative else jnp.full_like(byte, code) for byte in bytes_]
            codes = [jnp.clip(code, 1, fmt.scale.top) for code in codes]
            return codec._better(best, [(byte, loss_of(i, byte)) for i, byte in enumerate(codes)], fmt), None

        best, _ = lax.scan(try_next, best, window)
    return jnp.where(peaks < 0, fmt.scale.nan, best[0])


def _round(step, byte, tensor, fmt, i):
    """Errors w - q and weighted losses [B, N] of candidate i with scale bytes [N], one row after the other."""
    scale = fmt.scale.decode(byte)
    inverse = codec._inverse(scale, tensor, fmt, 1.0)

    def next_row(errors, at):
        x = _add(step.x[at], jnp.dot(step.within[at], errors, precision=lax.Precision.HIGHEST))
        x, decoded = codec._decoded(x, None, inverse, scale, tensor, fmt.candidates[i], fmt, 1.0)
        errors = errors.at[at].set(_finite(step.w[at] - decoded))
        return errors, codec._squared(decoded - x) * step.weight[at]

    return lax.scan(next_row, jnp.zeros_like(step.x), jnp.arange(fmt.block))


def _encode(step, word, tensor, fmt):
    """uint8 codes [B, N] for the chosen scale bytes and candidates, and errors w - q [B, N] of what they decode to."""
    byte, flag = word & 0xFF, (word & 0x80) >> 7
    inverse = codec._inverse(codec._scale_value(byte, fmt), tensor, fmt, 1.0)
    amax = None if tensor is None else tensor.amax.reshape(())

    def next_row(errors, at):
        x = _add(step.x[at], jnp.dot(step.within[at], errors, precision=lax.Precision.HIGHEST))
        codes = codec._pick(flag, codec._codes(x, None, inverse, 1, codec._one_for_each_decoding(fmt), fmt))
        decoded = codec.decode(codes, byte, fmt, amax=amax)
        return errors.at[at].set(_finite(step.w[at] - decoded)), codes.astype(jnp.uint8)

    errors, codes = lax.scan(next_row, jnp.zeros_like(step.x), jnp.arange(fmt.block))
    return codes, errors


def _add(w, feedback):
    """w + feedback, and w itself where there is none: adding 0 would flush subnormals and drop the sign of -0."""
    return jnp.where(feedback == 0, w, w + feedback)


def _finite(error):
    return jnp.where(jnp.isfinite(error), error, 0)
