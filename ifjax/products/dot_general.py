"""dot_general with packed operands.

    product -> one packed operand, one array -> plan (a kernel, or XLA) -> accumulate in float32 -> times amax / K

A product is linear in its array operand. Its gradient is the product of the cotangent with the same packed operand,
contracted along the other axes, so the backward pass saves the packed bytes and nothing else.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike

from ifjax.arrays import QTensor, quantize
from ifjax.arrays.encoders import described
from ifjax.arrays.qtensor import unscaled_values
from ifjax.codec.blocks import split_blocks
from ifjax.codec.decode import block_scale, narrowed, unscaled
from ifjax.numerics.byte_order import as_array
from ifjax.numerics.devices import device_kind
from ifjax.numerics.kernels import kernels
from ifjax.numerics.proofs import by_both, fault_of, inexact
from ifjax.numerics.xla import after, divide, in_axes, materialize
from ifjax.products.backends import (
    BACKENDS,
    backend_for,
    blocked_along,
    common_multiple,
    decoding_of,
    factor_of,
    kernel_product,
)
from ifjax.products.plan import (
    DimensionNumbers,
    Dims,
    Impl,
    Operand,
    as_one_axis,
    as_operand,
    checked_dims,
    checked_impl,
    is_packed,
    plan,
)
from pallas_kernels.varying import as_result_of


@dataclasses.dataclass(frozen=True)
class _Product:
    """The static arguments of the product of an array with a packed operand; hashable."""

    dims: Dims
    precision: Any
    x_dtype: np.dtype
    dtype: np.dtype  # the dtype in which operands are multiplied
    out_dtype: np.dtype
    out_sharding: Any = None
    impl: Impl | None = None  # None: planned for each platform
    device: str = "cpu"  # the device kind assumed when planning for accelerators


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
    """Multiply as `jax.lax.dot_general` does; either operand or both may be a QTensor or Prepacked.

    Packed operands are decoded, without their tensor scale, to the promoted dtype of both operands. Products are
    accumulated in float32, and the result is multiplied once by the tensor scale amax / K (K: the format's tensor
    constant). In float32 the result differs from dequantizing first by rounding alone. In bfloat16 each weight is
    rounded once. In float16 weights of 4-bit formats are exact. A tensor whose amax is below 3e-35 may decode to zeros.

    The fast path contracts the blocked axis. Contracting another axis, or an axis with several amax values, dequantizes
    first.

    Only arrays have gradients; a QTensor has none, as integers have none in `jax.grad`. Only reverse mode is supported.

    Args:
        lhs, rhs: arrays, QTensors or Prepacked, of any rank.
        dimension_numbers, precision, preferred_element_type, out_sharding: as in `jax.lax.dot_general`.
        impl: None selects a kernel if one supports the device and the operands, and XLA otherwise. "xla", "hopper",
            "tpu" (v5e, v6e) and "scaled_matmul" (`jax.nn.scaled_matmul` of two NVFP4 matrices, for Blackwell) force
            one. `explain_matmul` returns the choice and its reason.
        target: the device kind to compile for, such as "H200" or "TPU v6e"; by default that of the first device.

    Returns:
        An array with axes [batch, lhs free, rhs free] and dtype `preferred_element_type`, or the promoted dtype.

    Raises:
        ValueError: the axes do not match, or the forced `impl` cannot compute this product; the message says why.

    Example:
        >>> import jax.numpy as jnp
        >>> import ifjax
        >>> w = ifjax.quantize(jnp.ones((64, 32)), axis=0)  # [in, out]
        >>> ifjax.dot_general(jnp.ones((2, 64)), w, (((1,), (0,)), ((), ()))).shape
        (2, 32)
    """
    if not (is_packed(lhs) or is_packed(rhs)):
        lhs, rhs = as_array(lhs), as_array(rhs)
        dtype = jnp.promote_types(lhs.dtype, rhs.dtype)
        return lax.dot_general(
            lhs.astype(dtype), rhs.astype(dtype), dimension_numbers, precision, preferred_element_type,
            out_sharding=out_sharding,
        )  # fmt: skip
    lhs, rhs = (_with_one_amax(a) if is_packed(a) else a for a in map(as_operand, (lhs, rhs)))
    plain = functools.partial(lax.dot_general, dimension_numbers=dimension_numbers)
    sharding = explicit_sharding(plain, (lhs, rhs), out_sharding)
    if sharding is not None:
        product = functools.partial(
            dot_general, dimension_numbers=dimension_numbers, precision=precision,
            preferred_element_type=preferred_element_type, impl=impl, target=target,
        )  # fmt: skip
        placed: Any = jax.sharding.auto_axes(product, out_sharding=sharding)
        return placed(lhs, rhs)
    dims = checked_dims(lhs, rhs, dimension_numbers)
    lhs, rhs, dims = as_one_axis(lhs, rhs, dims)
    dtype = np.dtype(jnp.promote_types(lhs.dtype, rhs.dtype))
    out_dtype = dtype if preferred_element_type is None else np.dtype(preferred_element_type)
    how = _Product(dims, precision, dtype, dtype, out_dtype, out_sharding, impl, device_kind(target))
    if is_packed(lhs) and is_packed(rhs):
        return _two_packed(lhs if isinstance(lhs, QTensor) else lhs.unpack(), rhs, how)
    if is_packed(rhs):
        return _one_packed(lhs, rhs, how)
    # The packed operand becomes the right one. The result then has rhs's free axes before lhs's, and they are swapped.
    x, q, swapped = rhs, lhs, dims.swapped
    y = _one_packed(x, q, dataclasses.replace(how, dims=swapped, out_sharding=None))
    batch, count = len(dims.x_batch), len(swapped.x_free(x.ndim))
    y = jnp.moveaxis(y, range(batch, batch + count), range(y.ndim - count, y.ndim))
    return y if out_sharding is None else jax.reshard(y, out_sharding)


def explicit_sharding(plain: Callable[..., Any], operands: Sequence[Any], out_sharding: Any = None) -> Any:
    """Return the sharding of a product on a mesh with explicit axes, that of JAX's own product `plain`; None elsewhere.

    Within the product all mesh axes are automatic, so that blocks and packed bytes may be split anywhere. Gradients
    have the shardings of their operands.
    """
    if not jax.sharding.get_abstract_mesh().explicit_axes:
        return None
    if out_sharding is not None:
        return out_sharding

    def dense(a):
        sharding = jax.typeof(a.codes if is_packed(a) else a).sharding
        return jax.ShapeDtypeStruct(a.shape, jnp.float32, sharding=sharding)

    return jax.eval_shape(plain, *map(dense, operands)).sharding


def multiples(q: QTensor, dtype: Any) -> tuple[jax.Array, Any]:
    """Return q's values as `dtype`, without a factor that the caller applies to the product, and that factor.

    IF4's values are multiples of 1/7, which no float represents exactly; float16 represents seven times the values
    exactly. q has one amax or none.
    """
    values, units = _in_units(q, dtype)
    factor = jnp.float32(1) if q.amax is None else factor_of(q)
    return values, factor if units == 1 else divide(factor, units)


def _two_packed(lhs, rhs, how):
    """Return the product of two packed operands; a scalar tensor scale of lhs is applied to the result."""

    def by_xla(lhs, rhs):
        if lhs.amax is not None and lhs.amax.ndim:
            return _one_packed(lhs.dequantize(how.dtype), rhs, how)
        values, factor = multiples(lhs, how.dtype)
        impl = "xla" if path == "xla" else how.impl
        y = _one_packed(values, rhs, dataclasses.replace(how, out_dtype=accumulator(how.out_dtype), impl=impl))
        return (y * factor).astype(how.out_dtype)

    path = plan(lhs, rhs, how.dims, how.dtype, how.device).path if how.impl is None else how.impl
    backend = BACKENDS.get(path)
    if backend is None or not backend.pairs or (how.impl is None and _fault(backend, lhs, rhs, how)):
        return by_xla(lhs, rhs)

    def by_pairs(lhs, rhs):
        (left,), (right,) = how.dims.numbers[0]
        lhs, rhs = blocked_along(lhs, left - lhs.ndim), blocked_along(rhs, right - rhs.ndim)
        return backend.load().matmul(lhs, rhs, dtype=how.out_dtype)

    if how.impl is not None:
        checked_impl(how.impl, lhs, rhs, how.dims, how.dtype)
        return by_pairs(lhs, rhs)
    return lax.platform_dependent(lhs, rhs, **{backend.platform: by_pairs}, default=by_xla)


def _one_packed(x, q, how) -> Any:
    checked_impl(how.impl, x, q, how.dims, how.dtype)
    return _jitted(as_varying(x, q), q, dataclasses.replace(how, x_dtype=np.dtype(x.dtype)))


def as_varying(x: jax.Array, q: Any) -> jax.Array:
    """Return x, cast inside shard_map to vary over q's mesh axes too, so that its gradient is summed over them."""
    return as_result_of((x, *jax.tree.leaves(q)), x)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _product(x, q, how: _Product):
    """Return x times q, [batch, x's free axes, q's free axes], in how.out_dtype."""
    dims = how.dims
    if dims.q_contracted != (q.ndim + q.axis,) or dims.q_batch:
        return _by_xla(x, q, how)
    (contracted,) = dims.x_contracted
    return _rows_product(jnp.moveaxis(x, contracted, -1), q, how)


def _product_fwd(x, q, how):
    return _product(x, q, how), q


def _product_bwd(how, q, g):
    dims = how.dims
    batch, q_free = len(dims.x_batch), dims.q_free(q.ndim)
    x_free = dims.x_free(g.ndim - len(q_free) + len(dims.x_contracted))
    back = Dims(
        x_contracted=tuple(range(batch + len(x_free), g.ndim)),
        q_contracted=q_free,
        x_batch=tuple(range(batch)),
        q_batch=dims.q_batch,
    )
    how = dataclasses.replace(
        how, dims=back, x_dtype=how.dtype, out_dtype=how.x_dtype, out_sharding=None, impl="xla"
    )
    dx: Any = _jitted(g.astype(how.dtype), q, how)
    # dx has x's batch axes, then its free axes, then its contracted axes in q's order.
    order = [x_axis for _, x_axis in sorted(zip(dims.q_contracted, dims.x_contracted, strict=True))]
    return jnp.transpose(dx, np.argsort([*dims.x_batch, *x_free, *order]).tolist()), no_gradient(q)


_product.defvjp(_product_fwd, _product_bwd)
_jitted = jax.jit(_product, static_argnums=2)  # one program outside of a jit; traced once for equal layers within


def no_gradient(q: Any) -> Any:
    """Return the cotangents of a packed operand's arrays, or of their types: float0 for integers, zeros for floats."""

    def zero(a):
        return zeros_of(a) if jnp.issubdtype(a.dtype, jnp.floating) else np.zeros(a.shape, jax.dtypes.float0)

    return jax.tree.map(zero, q)


def zeros_of(a: Any) -> jax.Array:
    """Return zeros of the type of a, an array or a `jax.typeof`, in its place on a mesh of explicit or manual axes."""
    kind: Any = jax.typeof(a) if isinstance(a, jax.Array) else a
    place = kind.sharding if jax.sharding.get_abstract_mesh().explicit_axes else None
    zeros, axes = jnp.zeros(kind.shape, kind.dtype, out_sharding=place), tuple(kind.manual_axis_type.varying)
    return lax.pcast(zeros, axes, to="varying") if axes else zeros


def _rows_product(rows, q, how):
    """Return rows [..., K] times q, contracted along q's blocked axis: [..., q's free axes].

    vmap over the rows alone adds rows, so that the plan depends on their total number.
    """

    @jax.custom_batching.custom_vmap
    def product(rows, q):
        return _rows_by_plan(rows, q, how)

    @product.def_vmap
    def batched(axis_size, in_batched, rows, q):
        rows_batched, q_batched = in_batched
        if not any(jax.tree.leaves(q_batched)):
            return product(rows, q), True

        def one(i):
            take = functools.partial(jax.tree.map, lambda a, is_batched: a[i] if is_batched else a)
            return take(rows, rows_batched), take(q, q_batched)

        # The plan is made for one matrix, because a kernel multiplies by one matrix per call.
        one_rows, one_q = jax.eval_shape(one, 0)
        if _kernel_of(one_rows, one_q, how) is not None:
            return lax.map(lambda i: product(*one(i)), jnp.arange(axis_size)), True
        by_xla = functools.partial(_rows_by_xla, how=how)
        return jax.vmap(by_xla, in_axes(in_batched))(rows, q), True

    return product(rows, q)


def _rows_by_plan(rows, q, how):
    backend = _kernel_of(rows, q, how)
    by_xla = functools.partial(_rows_by_xla, how=how)
    if backend is None:
        return by_xla(rows, q)
    by_kernel = functools.partial(kernel_product, backend=backend.name, dtype=how.dtype, out_dtype=how.out_dtype)
    if how.impl is not None:
        return by_kernel(rows, q)
    return lax.platform_dependent(rows, q, **{backend.platform: by_kernel}, default=by_xla)


def _kernel_of(rows, q, how):
    """Return the backend that multiplies rows [..., K] by q; None for XLA."""
    if how.impl is not None:
        return BACKENDS.get(how.impl)
    backend = backend_for(how.device)
    if backend is None or backend.pairs:
        return None
    path = plan(rows, q, _rows_dims(rows, q), how.dtype, how.device).path
    return backend if path == backend.name and _fault(backend, rows, q, how) is None else None


def _fault(backend, x, q, how):
    """Return what is wrong with a kernel on a local device, found by a test product; None if nothing is.

    x is rows [..., K], or packed too.
    """
    x_packed = isinstance(x, QTensor)
    m = 128 if x_packed else math.prod(x.shape[:-1])
    m = 1 << m.bit_length() - 1  # kernels choose tiles by the row count; powers of two represent all counts

    def prove():
        rng = np.random.default_rng(0)
        rows, w = (jnp.asarray(rng.standard_normal(shape), np.float32) for shape in ((m, 512), (256, 512)))
        with kernels("never"):
            packed, values = quantize(w.astype(q.dtype), q.fmt), quantize(w, q.fmt).dequantize()
            lhs = quantize(rows.astype(x.dtype), x.fmt) if x_packed else rows.astype(x.dtype)
        lhs, packed = jax.tree.map(np.asarray, (lhs, packed))
        of_kernel, of_xla = by_both(lambda: dot_general(lhs, packed, (((1,), (1,)), ((), ()))))
        return inexact(of_kernel, of_xla, np.abs(rows) @ np.abs(values).T)

    of = described(x.fmt) if x_packed else f"{m} rows of {np.dtype(x.dtype).name}"
    return fault_of(f"{backend.name}: product of {of} with {described(q.fmt)} as {how.dtype.name}", backend, prove)


def _rows_dims(rows, q):
    return Dims((rows.ndim - 1,), (q.ndim + q.axis,), (), ())


def _rows_by_xla(rows, q, how):
    return _by_xla(rows, q, dataclasses.replace(how, dims=_rows_dims(rows, q)))


def _by_xla(x, q, how):
    q = q if isinstance(q, QTensor) else q.unpack()
    dims, dtype = how.dims, how.dtype
    lead = 0 if q.amax is None else q.amax.ndim
    in_epilogue = q.amax is not None and not any(axis < lead for axis in dims.q_contracted)

    def by_dot(x, q, dtype=dtype):
        q = q.replaced(codes=after(x, q.codes))
        w, units = _in_units(q, dtype) if in_epilogue or q.amax is None else (q.dequantize(dtype), 1)
        y = lax.dot_general(
            x.astype(dtype), w, dims.numbers, how.precision, accumulator(dtype), out_sharding=how.out_sharding
        )
        return y if units == 1 else divide(y, units)

    ways = {"xla_few_rows": _few_rows, "xla_float32": functools.partial(by_dot, dtype=np.dtype(np.float32))}
    on_cpu = ways.get(plan(x, q, dims, dtype, "cpu").path)
    y = by_dot(x, q) if on_cpu is None else lax.platform_dependent(x, q, cpu=on_cpu, default=by_dot)
    if in_epilogue:
        y = y * _spread(factor_of(q), y.ndim, dims, x.ndim, q.ndim)
    return y.astype(how.out_dtype)


def _few_rows(rows, q):
    """Return rows [..., K] times q in float32, without q's tensor scale or any write of decoded weights to memory.

    A block's products (16 for the usual formats) are summed in registers, then multiplied by the block scale.
    """
    axis, fmt = q.axis, q.fmt
    blocks = split_blocks(rows.astype(jnp.float32).reshape(-1, rows.shape[-1]), fmt.block, -1)
    first = (len(blocks), *[1] * (q.ndim + axis), blocks.shape[1], *[1] * (-axis - 1))

    def sums(blocks, codes, headers):
        """Return for each block the sum of its values times x: [rows, ..., blocks, ...]."""
        pairs, (selector, _) = split_blocks(codes, fmt.block // 2, axis), fmt.split(headers)
        total = np.float32(0)
        for j in range(fmt.block):
            pair = lax.index_in_dim(pairs, j // 2, pairs.ndim + axis, keepdims=False).astype(jnp.int32)
            values = unscaled(pair >> 4 if j % 2 else pair & 15, selector, fmt)
            total = total + values[None] * blocks[:, :, j].reshape(first)
        return total * block_scale(headers, fmt)[None]

    # Without the fusion barrier, XLA:CPU computes the sum by a library call and writes every product to memory for it.
    y = materialize(sums, blocks, q.codes, q.headers())
    return y.sum(axis).reshape(*rows.shape[:-1], *y.shape[1 : y.ndim + axis], *y.shape[y.ndim + axis + 1 :])


def _in_units(q, dtype):
    """Return q's values without tensor scale, times an integer, and the integer, which makes float16 values exact.

    The values were rounded twice to float32 before; these roundings do not change the float16 result.
    """
    units = common_multiple(q.fmt) if dtype == np.float16 and decoding_of(q.fmt) else 1
    if units == 1:
        return unscaled_values(q, dtype), 1
    return narrowed(unscaled_values(q) * np.float32(units), dtype), units


def _spread(factor, ndim, dims, x_ndim, q_ndim):
    """Move the axes of a tensor scale [leading axes of q] to their places in the product [batch, x free, q free]."""
    q_free = dims.q_free(q_ndim)
    first = len(dims.x_batch) + len(dims.x_free(x_ndim))
    place = [dims.q_batch.index(a) if a in dims.q_batch else first + q_free.index(a) for a in range(factor.ndim)]
    factor = jnp.transpose(factor, np.argsort(place).tolist())
    shape = [1] * ndim
    for at, length in zip(sorted(place), factor.shape, strict=True):
        shape[at] = length
    return factor.reshape(shape)


def accumulator(dtype: np.dtype) -> np.dtype:
    """Return the accumulator dtype for products of `dtype`: itself for float64 and complex numbers, else float32."""
    return np.dtype(dtype if dtype == np.float64 or jnp.issubdtype(dtype, jnp.complexfloating) else np.float32)


def _with_one_amax(q):
    """Reshape an amax of one value to a scalar; slices of stacks of nn.scan or nn.vmap may have one with axes."""
    if q.amax is None or q.amax.ndim == 0 or q.amax.size != 1:
        return q
    return dataclasses.replace(q, amax=q.amax.reshape(()))
