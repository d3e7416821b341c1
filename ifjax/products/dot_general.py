"""Products with packed operands: dot_general, einsum, matmul and ragged_dot that take QTensors.

    product -> one packed operand, one array -> path (a kernel, or XLA) -> accumulate in float32 -> times amax / K

A product is linear in its array, so its gradient needs the packed bytes and nothing else: it is the product with the
other axes contracted.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike

from ifjax import codec
from ifjax.arrays.qtensor import QTensor, to_ml_dtypes, unscaled_values
from ifjax.numerics.xla import divide, in_axes, stage
from ifjax.products.kernels import (
    PLATFORMS,
    Prepacked,
    common_multiple,
    decoding_of,
    device_kind,
    factor_of,
    kernel_product,
)
from ifjax.products.plan import (
    DimensionNumbers,
    Impl,
    Operand,
    _as_one_axis,
    _checked_dims,
    _Dims,
    _explain,
    _is_packed,
    _refusal,
)


class _Settings(NamedTuple):
    """What a product is compiled for; hashable."""

    dims: _Dims
    precision: Any
    x_dtype: np.dtype
    dtype: np.dtype  # that operands are multiplied in
    out_dtype: np.dtype
    out_sharding: Any
    kernel: str | None  # None: XLA everywhere
    forced: bool  # the kernel on every platform


def dot_general(
    lhs: Operand,
    rhs: Operand,
    dimension_numbers: DimensionNumbers,
    precision: Any = None,
    preferred_element_type: DTypeLike | None = None,
    *,
    out_sharding: Any = None,
    impl: Impl | None = None,
    target: str | None = None,
) -> jax.Array:
    """`jax.lax.dot_general`, of which either operand, or both, may be a QTensor or a prepacked one.

    Weights are decoded to the type of the product (that of both operands' dtypes, by jax's promotion) without the
    tensor's factor, multiplied and added up in float32, and multiplied by amax / K once: in float32 that differs from
    dequantizing first by rounding alone; in bfloat16 a weight is rounded once, in float16 those of 4-bit formats are
    exact. A tensor whose amax is under 3e-35 may read as zero.

    Contracting the axis that blocks lie along is the fast path. Contracting another one, or an axis with amax values
    of its own, dequantizes.

    The gradient reaches arrays only: a QTensor gets none (as `jax.grad` of integers has none). Reverse mode only.

    Args:
        lhs, rhs: arrays or QTensors of any rank.
        dimension_numbers, precision, preferred_element_type, out_sharding: as in `jax.lax.dot_general`.
        impl: None takes a kernel where there is one for the device and the operands, else XLA; "xla", "mosaic_gpu"
            (Hopper) and "mosaic_tpu" (v5e, v6e) force one. `explain_matmul` tells which and why. Two NVFP4 matrices
            multiply by `jax.nn.scaled_matmul` on Blackwell.
        target: the device kind to compile for, such as "H200" or "TPU v6e"; the first device's unless given.

    Raises:
        ValueError: the axes do not match, or the forced `impl` cannot take this product; the message says why.
    """
    return dot_general_like(
        None, lhs, rhs, dimension_numbers, precision, preferred_element_type, out_sharding, impl, target
    )


def dot_general_like(
    like: jax.Array | None, lhs: Any, rhs: Any, dimension_numbers: Any, precision: Any = None,
    preferred_element_type: Any = None, out_sharding: Any = None, impl: Any = None, target: str | None = None,
) -> jax.Array:  # fmt: skip
    """`dot_general`, where a QTensor lhs is sharded as `like` is, the array that was quantized.

    Else the sharding of codes reaches what is decoded from them late in XLA's propagation. That of the result comes
    first, and for the gradient of FSDP's weights activations are gathered instead of sums reduced.
    """
    if not (_is_packed(lhs) or _is_packed(rhs)):
        lhs, rhs = jnp.asarray(lhs), jnp.asarray(rhs)
        dtype = jnp.promote_types(lhs.dtype, rhs.dtype)
        return lax.dot_general(
            lhs.astype(dtype), rhs.astype(dtype), dimension_numbers, precision, preferred_element_type,
            out_sharding=out_sharding,
        )  # fmt: skip
    lhs, rhs = (_with_one_amax(a) if _is_packed(a) else jnp.asarray(a) for a in (lhs, rhs))
    dims = _checked_dims(lhs, rhs, dimension_numbers)
    lhs, rhs, dims = _as_one_axis(lhs, rhs, dims)
    dtype = jnp.promote_types(lhs.dtype, rhs.dtype)
    settings = _Settings(dims, precision, dtype, dtype, dtype, out_sharding, None, False)
    if preferred_element_type is not None:
        settings = settings._replace(out_dtype=np.dtype(preferred_element_type))
    if not _is_packed(rhs):
        # The packed operand goes to the right; the free axes come out in the other order.
        x, q = rhs, lhs
        settings = settings._replace(dims=dims.swapped, out_sharding=None)
        y = _planned_product(x, q, settings, impl, target)
        batch, count = len(dims.x_batch), len(settings.dims.x_free(x.ndim))
        y = jnp.moveaxis(y, range(batch, batch + count), range(y.ndim - count, y.ndim))
        return y if out_sharding is None else jax.reshard(y, out_sharding)
    if not _is_packed(lhs):
        return _planned_product(lhs, rhs, settings, impl, target)
    lhs = lhs if isinstance(lhs, QTensor) else lhs.unpack()
    if impl is None and _explain(lhs, rhs, dims, dtype, device_kind(target)).path == "scaled_matmul":
        by_xla = functools.partial(
            dot_general_like, like, dimension_numbers=dims.numbers, precision=precision, impl="xla",
            preferred_element_type=settings.out_dtype,
        )  # fmt: skip
        by_scales = functools.partial(_scaled_product, dtype=settings.out_dtype)
        return lax.platform_dependent(lhs, rhs, cuda=by_scales, default=by_xla)
    # The left one's factor, if it is one number, joins the right one's in the end.
    if lhs.amax is not None and lhs.amax.ndim:
        return _planned_product(lhs.dequantize(dtype), rhs, settings, impl, target)
    out_dtype, settings = settings.out_dtype, settings._replace(out_dtype=_accumulator(settings.out_dtype))
    values, units = _multiples(lhs, dtype)
    if like is not None and like.shape == values.shape and jax.device_count() > 1:
        values = jnp.where(like != like, jnp.nan, values)  # changes nothing: where one is NaN, the other is
    y = _planned_product(values, rhs, settings, impl, target)
    return (y * divide(1 if lhs.amax is None else factor_of(lhs), units)).astype(out_dtype)


def _scaled_product(a, b, dtype):
    (x, x_scales, x_factor), (w, w_scales, w_factor) = map(to_ml_dtypes, (a, b))
    arrays = (a, x), (b, w), (a, x_scales), (b, w_scales)
    batches = [jnp.moveaxis(array, q.axis, -1)[None] for q, array in arrays]
    y: Any = jax.nn.scaled_matmul(*batches, preferred_element_type=np.float32)[0]
    return (y * x_factor * w_factor).astype(dtype)


def _planned_product(x, q, settings, impl, target) -> Any:
    if impl not in (None, "xla", "mosaic_gpu", "mosaic_tpu"):
        raise ValueError(f"impl must be None, 'xla', 'mosaic_gpu' or 'mosaic_tpu', got {impl!r}")
    kernel = None if impl == "xla" else impl
    if impl is None:
        path = _explain(x, q, settings.dims, settings.dtype, device_kind(target)).path
        kernel = None if path == "xla" else path
    elif impl != "xla":
        reason = _refusal(impl, x, q, settings.dims, settings.dtype)
        if reason is None and isinstance(q, Prepacked) and q.kernel != impl:
            reason = f"the weights are prepacked for {q.kernel}"
        if reason:
            raise ValueError(f"impl={impl!r} cannot take this product: {reason}")
    return _product(_as_varying(x, q), q, settings._replace(x_dtype=x.dtype, kernel=kernel, forced=impl == kernel))


def _as_varying(x, q):
    """x, inside shard_map of the type that says that it varies where q does, so that its gradient is summed there."""
    axes = [jax.typeof(a).manual_axis_type.varying for a in (x, *jax.tree.leaves(q))]
    missing = frozenset().union(*axes) - axes[0]
    return lax.pcast(x, tuple(missing), to="varying") if missing else x


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _product(x, q, settings: _Settings):
    """[batch, x's free axes, q's free axes] in settings.out_dtype."""
    dims = settings.dims
    if dims.q_contracted != (q.ndim + q.axis,) or dims.q_batch:
        return _xla_product(x, q, settings)
    (contracted,) = dims.x_contracted
    return _rows_product(jnp.moveaxis(x, contracted, -1), q, settings)


def _product_fwd(x, q, settings):
    return _product(x, q, settings), q


def _product_bwd(settings, q, g):
    dims = settings.dims
    batch, q_free = len(dims.x_batch), dims.q_free(q.ndim)
    x_free = dims.x_free(g.ndim - len(q_free) + len(dims.x_contracted))
    back = _Dims(
        x_contracted=tuple(range(batch + len(x_free), g.ndim)),
        q_contracted=q_free,
        x_batch=tuple(range(batch)),
        q_batch=dims.q_batch,
    )
    dtype = settings.dtype
    settings = settings._replace(
        dims=back, x_dtype=dtype, out_dtype=settings.x_dtype, out_sharding=None, kernel=None
    )
    dx: Any = _product(g.astype(dtype), q, settings)
    # dx has x's batch axes, its free ones, and what was contracted in q's order.
    order = [x_axis for _, x_axis in sorted(zip(dims.q_contracted, dims.x_contracted, strict=True))]
    return jnp.transpose(dx, np.argsort([*dims.x_batch, *x_free, *order]).tolist()), no_gradient(q)


_product.defvjp(_product_fwd, _product_bwd)


def no_gradient(q):
    """Cotangents of a QTensor's arrays: none for the integers, zero for the others."""

    def zero(a):
        if jnp.issubdtype(a.dtype, jnp.floating):
            return jnp.zeros_like(a)
        return np.zeros(a.shape, jax.dtypes.float0)

    return jax.tree.map(zero, q)


def _rows_product(rows, q, settings):
    """rows [..., K] times q, of which only the blocked axis is contracted: [..., q's free axes].

    vmap over the rows alone makes more rows, so that the way is chosen by how many there are in the end.
    """

    def by_xla(rows, q):
        dims = _Dims((rows.ndim - 1,), (q.ndim + q.axis,), (), ())
        return _xla_product(rows, q, settings._replace(dims=dims))

    @jax.custom_batching.custom_vmap
    def product(rows, q):
        if settings.kernel is None:
            return by_xla(rows, q)
        by_kernel = functools.partial(
            kernel_product, kernel=settings.kernel, dtype=settings.dtype, out_dtype=settings.out_dtype
        )
        if settings.forced:
            return by_kernel(rows, q)
        return lax.platform_dependent(rows, q, **{PLATFORMS[settings.kernel]: by_kernel}, default=by_xla)

    @product.def_vmap
    def batched(axis_size, in_batched, rows, q):
        rows_batched, q_batched = in_batched
        if not any(jax.tree.leaves(q_batched)):
            return product(rows, q), True

        def one(i):
            take = functools.partial(jax.tree.map, lambda a, is_batched: a[i] if is_batched else a)
            return product(take(rows, rows_batched), take(q, q_batched))

        if settings.kernel is not None:
            return lax.map(one, jnp.arange(axis_size)), True
        return jax.vmap(by_xla, in_axes(in_batched))(rows, q), True

    return product(rows, q)


def _xla_product(x, q, settings):
    q = q if isinstance(q, QTensor) else q.unpack()
    dims, dtype = settings.dims, settings.dtype
    lead = 0 if q.amax is None else q.amax.ndim
    in_epilogue = q.amax is not None and not any(axis < lead for axis in dims.q_contracted)

    def by_dot(x, q, dtype=dtype):
        w, units = _multiples(q, dtype) if in_epilogue or q.amax is None else (q.dequantize(dtype), 1)
        y = lax.dot_general(
            x.astype(dtype), w, dims.numbers, settings.precision, _accumulator(dtype),
            out_sharding=settings.out_sharding,
        )  # fmt: skip
        return y if units == 1 else divide(y, units)

    rows = math.prod(n for i, n in enumerate(x.shape) if i not in dims.x_contracted)
    if rows <= 4 and _is_for_few_rows(x, q, dims, dtype):
        y = lax.platform_dependent(x, q, cpu=_few_rows_on_cpu, default=by_dot)
    elif rows >= 64 and dtype.itemsize == 2:
        # XLA:CPU adds up 16-bit products in float32 slowly; from 64 rows on a float32 product is faster (measured).
        y = lax.platform_dependent(x, q, cpu=functools.partial(by_dot, dtype=np.dtype(np.float32)), default=by_dot)
    else:
        y = by_dot(x, q)
    if in_epilogue:
        y = y * _spread(factor_of(q), y.ndim, dims, x.ndim, q.ndim)
    return y.astype(settings.out_dtype)


def _is_for_few_rows(x, q, dims, dtype):
    # Measured on two cores: one row takes a quarter of the time of decoding the matrix first, four rows two thirds.
    is_matrix = dims.q_contracted == (q.ndim + q.axis,) and dims.x_contracted == (x.ndim - 1,) and not dims.q_batch
    return is_matrix and q.size >= 2**16 and q.fmt.bits == 4 and q.fmt.block % 2 == 0 and dtype != np.float64


def _few_rows_on_cpu(rows, q):
    """rows [..., K] times q without q's factor, float32; the decoded weights are never written to memory.

    A block's 16 products are added up in registers, then multiplied by its scale.
    """
    axis, fmt = q.axis, q.fmt
    blocks = codec.split_blocks(rows.astype(jnp.float32).reshape(-1, rows.shape[-1]), fmt.block, -1)
    first = (len(blocks), *[1] * (q.ndim + axis), blocks.shape[1], *[1] * (-axis - 1))

    def sums(blocks, codes, scale_bytes):
        """[rows, ..., m, ...]: for each block the sum of its values times x."""
        pairs, flag = codec.split_blocks(codes, fmt.block // 2, axis), scale_bytes >> 7
        total = np.float32(0)
        for j in range(fmt.block):
            pair = lax.index_in_dim(pairs, j // 2, pairs.ndim + axis, keepdims=False).astype(jnp.int32)
            values = codec.unscaled(pair >> 4 if j % 2 else pair & 15, flag, fmt)
            total = total + values[None] * blocks[:, :, j].reshape(first)
        return total * codec.block_scale(scale_bytes, fmt)[None]

    # A stage, because XLA:CPU would hand the addition to a library for which it writes every product to memory.
    y = stage(sums, blocks, q.codes, q.scale_bytes())
    return y.sum(axis).reshape(*rows.shape[:-1], *y.shape[1 : y.ndim + axis], *y.shape[y.ndim + axis + 1 :])


def _multiples(q, dtype):
    """(q's values without its factor, times an integer; the integer): in float16 the one that makes them exact.

    IF4's values are multiples of 1/7, which no float holds, but float16 holds seven times them: the two roundings to
    float32 that they took before do not show.
    """
    units = common_multiple(q.fmt) if dtype == np.float16 and decoding_of(q.fmt) else 1
    return (unscaled_values(q) * np.float32(units)).astype(dtype), units


def _spread(factor, ndim, dims, x_ndim, q_ndim):
    """The factor [leading axes of q], with those axes where the product [batch, x free, q free] has them."""
    q_free = dims.q_free(q_ndim)
    first = len(dims.x_batch) + len(dims.x_free(x_ndim))
    place = [dims.q_batch.index(a) if a in dims.q_batch else first + q_free.index(a) for a in range(factor.ndim)]
    factor = jnp.transpose(factor, np.argsort(place).tolist())
    shape = [1] * ndim
    for at, length in zip(sorted(place), factor.shape, strict=True):
        shape[at] = length
    return factor.reshape(shape)


def _accumulator(dtype):
    return np.dtype(np.float64 if dtype == np.float64 else np.float32)


def _with_one_amax(q):
    """A part of what nn.scan or nn.vmap had stacked may have an amax of one value and several axes."""
    if q.amax is None or q.amax.ndim == 0 or q.amax.size != 1:
        return q
    return dataclasses.replace(q, amax=q.amax.reshape(()))
