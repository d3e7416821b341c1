"""Products with packed operands: dot_general, einsum, matmul and ragged_dot that take QTensors.

    product -> one packed operand, one array -> path (a kernel, or XLA) -> accumulate in float32 -> times amax / K

A product is linear in its array, so its gradient needs the packed bytes and nothing else: it is the product with the
other axes contracted.
"""

import dataclasses
import functools
import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import opt_einsum
from jax import lax
from jax.typing import ArrayLike, DTypeLike
from opt_einsum.parser import parse_einsum_input

from ifjax import codec
from ifjax.arrays.qtensor import QTensor, to_ml_dtypes, unscaled_values
from ifjax.formats.grids import E2M1
from ifjax.numerics.xla import divide, in_axes, stage
from ifjax.products.kernels import (
    PLATFORMS,
    Prepacked,
    common_multiple,
    decoding_of,
    device_kind,
    factor_of,
    kernel_for,
    kernel_product,
    module_of,
)  # fmt: skip

Impl = Literal["xla", "mosaic_gpu", "mosaic_tpu"]
Operand = Any  # an array (or what jnp.asarray takes), a QTensor or a Prepacked
DimensionNumbers = Any  # ((contracted axes of lhs, of rhs), (batch axes of lhs, of rhs)), as lax.dot_general has them


class _Dims(NamedTuple):
    """The dimension numbers of a product of an array x (left) with a packed q (right), as tuples from the front."""

    x_contracted: tuple[int, ...]
    q_contracted: tuple[int, ...]
    x_batch: tuple[int, ...]
    q_batch: tuple[int, ...]

    @property
    def numbers(self):
        return (self.x_contracted, self.q_contracted), (self.x_batch, self.q_batch)

    @property
    def swapped(self):
        """The same product with its operands exchanged."""
        return _Dims(self.q_contracted, self.x_contracted, self.q_batch, self.x_batch)

    def x_free(self, ndim):
        return tuple(i for i in range(ndim) if i not in self.x_contracted + self.x_batch)

    def q_free(self, ndim):
        return tuple(i for i in range(ndim) if i not in self.q_contracted + self.q_batch)


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


# --- the functions ---------------------------------------------------------------------------------------------------


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


def matmul(
    a: Operand,
    b: Operand,
    *,
    precision: Any = None,
    preferred_element_type: DTypeLike | None = None,
    impl: Impl | None = None,
    target: str | None = None,
) -> jax.Array:
    """`jax.numpy.matmul`, of which either operand, or both, may be a QTensor. See `dot_general`.

    For [K, N] weights quantize along axis=-2, the contracted one; [N, K] weights multiply as `einsum("...k,nk->...n")`.

    Example:
        >>> import jax.numpy as jnp
        >>> import ifjax
        >>> w = ifjax.quantize(jnp.eye(32), axis=-2)
        >>> ifjax.matmul(jnp.ones((2, 32)), w).shape
        (2, 32)
    """
    rank_a, rank_b = jnp.ndim(a), jnp.ndim(b)
    if not rank_a or not rank_b:
        raise ValueError("matmul needs operands of at least one axis, got a scalar: multiply with *")
    left = "k" if rank_a == 1 else "...mk"
    right = "k" if rank_b == 1 else "...kn"
    out = "..." * (rank_a > 1 or rank_b > 1) + "m" * (rank_a > 1) + "n" * (rank_b > 1)
    return einsum(
        f"{left},{right}->{out}", a, b, precision=precision, preferred_element_type=preferred_element_type,
        impl=impl, target=target,
    )  # fmt: skip


def einsum(
    spec: str,
    *operands: Operand,
    precision: Any = None,
    preferred_element_type: DTypeLike | None = None,
    impl: Impl | None = None,
    target: str | None = None,
) -> jax.Array:
    """`jax.numpy.einsum`, any of whose operands may be QTensors. See `dot_general`.

    Sums along one operand alone, diagonals and outer dimensions of length 1 that would broadcast a QTensor dequantize
    it. More than two operands are contracted pair by pair in opt_einsum's order.

    Raises:
        ValueError: the specification does not fit the operands.
    """
    rest = {"precision": precision, "preferred_element_type": preferred_element_type}
    if not any(map(_is_packed, operands)):
        return jnp.einsum(spec, *operands, **rest)
    left: list[Any] = [a if _is_packed(a) else jnp.asarray(a) for a in operands]
    inputs, out, _ = parse_einsum_input((spec, *(a.shape for a in left)), shapes=True)
    rest |= {"impl": impl, "target": target}
    if len(left) == 2:
        return einsum_of_two(spec, left[0], left[1], functools.partial(dot_general, **rest))
    if len(left) == 1:
        return jnp.einsum(f"{inputs}->{out}", _dense(left[0]), preferred_element_type=preferred_element_type)
    path: Any = opt_einsum.contract_path(f"{inputs}->{out}", *(a.shape for a in left), shapes=True, einsum_call=True)
    for positions, _, step, *_ in path[1]:
        left.append(einsum(step, *(left.pop(i) for i in positions), **rest))
    return left[0]


def ragged_dot(
    lhs: ArrayLike,
    rhs: Operand,
    group_sizes: jax.Array,
    precision: Any = None,
    preferred_element_type: DTypeLike | None = None,
    *,
    group_offset: jax.Array | None = None,
) -> jax.Array:
    """`jax.lax.ragged_dot` with packed experts: each group of rows of lhs [m, k] times its own matrix of rhs [g, k, n].

    rhs may be a QTensor, quantized along any axis, with one amax or (amax_axes=(0,)) one for each group; its matrices
    are dequantized. The gradient reaches lhs only.
    """
    lhs = jnp.asarray(lhs)
    if not _is_packed(rhs):
        return lax.ragged_dot(
            lhs, rhs, group_sizes, precision, preferred_element_type, group_offset=group_offset
        )
    rhs = rhs if isinstance(rhs, QTensor) else rhs.unpack()
    dtype = jnp.promote_types(lhs.dtype, rhs.dtype)
    out_dtype = dtype if preferred_element_type is None else np.dtype(preferred_element_type)
    settings = (precision, lhs.dtype, dtype, out_dtype)
    return _ragged(_as_varying(lhs, rhs), rhs, jnp.asarray(group_sizes), group_offset, settings)


# --- which way a product goes ----------------------------------------------------------------------------------------


class Explanation(NamedTuple):
    """What `explain_matmul` answers.

    Attributes:
        path: "xla", "mosaic_gpu", "mosaic_tpu" or "scaled_matmul".
        reason: why this one, or why no faster one.
    """

    path: str
    reason: str


def explain_matmul(
    a: Operand,
    b: Operand,
    dimension_numbers: DimensionNumbers | None = None,
    *,
    platform: Literal["cpu", "cuda", "tpu"] | None = None,
    target: str | None = None,
) -> Explanation:
    """Which way the product of a and b goes on a platform, and why. Nothing is computed; shapes suffice.

    Args:
        a, b: as in `matmul`, or in `dot_general` if dimension_numbers are given. `jax.ShapeDtypeStruct` will do, and
            QTensors of them (from `jax.eval_shape`).
        platform: "cpu", "cuda" or "tpu"; that of `target`, or of the first device.
        target: the device kind; see `dot_general`.
    """
    if not (_is_packed(a) or _is_packed(b)):
        return Explanation("xla", "neither operand is packed")
    if dimension_numbers is None:
        batch = range(max(b.ndim - 2, 0))
        if batch and a.ndim != b.ndim:
            raise ValueError(f"say which axes of {a.shape} and {b.shape} belong together: pass dimension_numbers")
        dimension_numbers = ((a.ndim - 1,), (max(b.ndim - 2, 0),)), (tuple(batch), tuple(batch))
    dims = _checked_dims(a, b, dimension_numbers)
    a, b, dims = _as_one_axis(a, b, dims)
    x, q, dims = (a, b, dims) if _is_packed(b) else (b, a, dims.swapped)
    target = device_kind(target, platform)
    return _explain(x, q, dims, jnp.promote_types(a.dtype, b.dtype), target)


def _explain(x, q, dims, dtype, target) -> Explanation:
    kernel = kernel_for(target)
    if isinstance(q, Prepacked) and q.kernel != kernel:
        return Explanation("xla", f"prepacked for {q.kernel}, unpacked and dequantized for {target}")
    if kernel is None:
        return Explanation("xla", f"there is no kernel for {target}: weights are dequantized to {dtype.name} by XLA")
    reason = _refusal(kernel, x, q, dims, dtype)
    if reason is None and _may_be_partitioned():
        reason = "XLA would gather sharded weights for a kernel; inside jax.shard_map, or with impl=, it is taken"
    return Explanation("xla", f"{kernel} cannot take it: {reason}") if reason else Explanation(kernel, f"on {target}")


def _refusal(kernel, x, q, dims, dtype) -> str | None:
    """Why a kernel cannot take this product; None if it can."""
    if kernel == "scaled_matmul":
        return _no_scaled_product(x, q, dims)
    if 0 in (*x.shape, *q.shape):
        return "an operand is empty"
    if q.ndim < 2 or dims.q_batch or (q.amax is not None and q.amax.ndim):
        return "it multiplies by one matrix, and these weights have batch axes or several amax values"
    if dims.q_contracted != (q.ndim + q.axis,):
        return f"it contracts the axis that blocks lie along ({q.axis}) and no other"
    decoding = decoding_of(q.fmt)
    if decoding is None:
        return f"{q.fmt.name} has codes of {q.fmt.bits} bits, or a table or step that kernels cannot hold"
    rows = math.prod(x.shape[i] for i in range(len(x.shape)) if i not in dims.x_contracted)
    return module_of(kernel).supports(decoding, dtype, m=rows)


def _no_scaled_product(a, b, dims) -> str | None:
    """Why `jax.nn.scaled_matmul` cannot take this product of a with b; None if it can."""
    if not (isinstance(a, QTensor) and isinstance(b, QTensor)):
        return "it multiplies two QTensors"
    for q, contracted, batch in ((a, dims.x_contracted, dims.x_batch), (b, dims.q_contracted, dims.q_batch)):
        if q.fmt.decodings != ((E2M1, 1.0),) or q.fmt.block != 16 or q.amax is None:
            return f"it reads plain NVFP4, and {q.fmt.name} has other elements, scales or marks in their signs"
        if q.ndim != 2 or q.amax.ndim or batch or contracted != (2 + q.axis,):
            return "it multiplies matrices with one amax along their blocks"
    return None


def _scaled_product(a, b, dtype):
    (x, x_scales, x_factor), (w, w_scales, w_factor) = map(to_ml_dtypes, (a, b))
    arrays = (a, x), (b, w), (a, x_scales), (b, w_scales)
    batches = [jnp.moveaxis(array, q.axis, -1)[None] for q, array in arrays]
    y: Any = jax.nn.scaled_matmul(*batches, preferred_element_type=np.float32)[0]
    return (y * x_factor * w_factor).astype(dtype)


def _may_be_partitioned():
    """Whether there are several accelerators and XLA, not shard_map, decides which computes what."""
    several = jax.device_count() > 1 and jax.devices()[0].platform != "cpu"
    return several and not jax.sharding.get_abstract_mesh().manual_axes


# --- the product -----------------------------------------------------------------------------------------------------


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


def _as_one_axis(lhs, rhs, dims):
    """The same product with neighbouring contracted axes merged, such as [heads, head size], where blocks allow it.

    A kernel, and the fast path of XLA, contract the blocked axis and no other.
    """
    (a, b), count = dims.numbers[0], len(dims.x_contracted)
    in_a_row = all(axes == tuple(range(axes[0], axes[0] + count)) for axes in (a, b) if axes)
    packed = [(q, axes) for q, axes in ((lhs, a), (rhs, b)) if _is_packed(q)]
    fits = all(
        isinstance(q, QTensor) and axes[-1:] == (q.ndim + q.axis,) and q.shape[q.axis] % q.fmt.block == 0
        and not q.block_2d and (q.amax is None or q.amax.ndim == 0)
        for q, axes in packed
    )  # fmt: skip
    batch_first = all(i < a[0] for i in dims.x_batch) and all(i < b[0] for i in dims.q_batch) if count else False
    if count < 2 or not (in_a_row and fits and batch_first):
        return lhs, rhs, dims

    def merged(array, first):
        def merge(a):
            shape = (*a.shape[:first], math.prod(a.shape[first : first + count]), *a.shape[first + count :])
            return jax.ShapeDtypeStruct(shape, a.dtype) if isinstance(a, jax.ShapeDtypeStruct) else a.reshape(shape)

        if not isinstance(array, QTensor):
            return merge(array)
        codes, scales = merge(array.codes), merge(array.scales)
        length = math.prod(array.shape[first : first + count])
        return dataclasses.replace(array, codes=codes, scales=scales, length=length, names=None)

    return merged(lhs, a[0]), merged(rhs, b[0]), _Dims((a[0],), (b[0],), dims.x_batch, dims.q_batch)


# --- ragged products -------------------------------------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _ragged(x, q, group_sizes, group_offset, settings):
    return _ragged_values(x, q, group_sizes, group_offset, settings)


def _ragged_values(x, q, group_sizes, group_offset, settings):
    precision, _, dtype, out_dtype = settings
    y = lax.ragged_dot(
        x.astype(dtype), q.dequantize(dtype), group_sizes, precision, _accumulator(dtype), group_offset=group_offset
    )
    return y.astype(out_dtype)


def _ragged_fwd(x, q, group_sizes, group_offset, settings):
    return _ragged_values(x, q, group_sizes, group_offset, settings), (q, group_sizes, group_offset)


def _ragged_bwd(settings, kept, g):
    q, group_sizes, group_offset = kept
    x = jnp.zeros((g.shape[0], q.shape[-2]), settings[1])  # linear in x: any will do
    _, pull = jax.vjp(lambda x: _ragged_values(x, q, group_sizes, group_offset, settings), x)
    return *pull(g), no_gradient(q), *no_gradient((group_sizes, group_offset))


_ragged.defvjp(_ragged_fwd, _ragged_bwd)


# --- einsum ----------------------------------------------------------------------------------------------------------


def einsum_of_two(spec: str, a: Any, b: Any, product: Any) -> jax.Array:
    """einsum of two operands, of which product(a, b, dimension numbers) makes one: a on the left."""
    inputs, out, _ = parse_einsum_input((spec, a.shape, b.shape), shapes=True)
    left, right = inputs.split(",")
    (left, a), (right, b) = _without_ones(left, a, right, b), _without_ones(right, b, left, a)
    (left, a), (right, b) = _summed(left, a, right + out), _summed(right, b, left + out)
    batch = [c for c in left if c in right and c in out]
    contracted = [c for c in left if c in right and c not in out]
    dims = [[[labels.index(c) for c in chosen] for labels in (left, right)] for chosen in (contracted, batch)]
    y = product(a, b, dims)
    have = batch + [c for c in left + right if c not in batch + contracted]
    return jnp.transpose(y, [have.index(c) for c in out])


def _without_ones(labels, a, other_labels, other):
    """a without the axes of length 1 that broadcast against longer ones of the other operand."""
    ones = [
        i for i, c in enumerate(labels)
        if a.shape[i] == 1 and c in other_labels and other.shape[other_labels.index(c)] != 1
    ]  # fmt: skip
    if not ones:
        return labels, a
    return "".join(c for i, c in enumerate(labels) if i not in ones), jnp.squeeze(_dense(a), tuple(ones))


def _summed(labels, a, others):
    """a without the axes that nothing else names, which are summed, and without repeated ones: its diagonal."""
    kept = "".join(dict.fromkeys(c for c in labels if c in others))
    return (labels, a) if kept == labels else (kept, jnp.einsum(f"{labels}->{kept}", _dense(a)))


def _dense(a):
    return a.dequantize() if _is_packed(a) else a


# --- checks ----------------------------------------------------------------------------------------------------------


def _is_packed(a) -> bool:
    return isinstance(a, QTensor | Prepacked)


def _checked_dims(lhs, rhs, dimension_numbers) -> _Dims:
    (a, b), (c, d) = dimension_numbers
    ndims = len(lhs.shape), len(rhs.shape)
    left, right, left_batch, right_batch = (
        tuple(int(i) % n if -n <= i < n else i for i in axes)
        for axes, n in zip((a, b, c, d), ndims * 2, strict=True)
    )
    pairs = list(zip(left + left_batch, right + right_batch, strict=False))
    fits = len(left) == len(right) and len(left_batch) == len(right_batch)
    for own, n in ((left + left_batch, ndims[0]), (right + right_batch, ndims[1])):
        fits = fits and len(set(own)) == len(own) and all(0 <= i < n for i in own)
    if not fits or any(lhs.shape[i] != rhs.shape[j] for i, j in pairs):
        raise ValueError(
            f"dimension_numbers {dimension_numbers} do not pair equal axes of {lhs.shape} and {rhs.shape}: write "
            "((axes of lhs to contract, of rhs), (batch axes of lhs, of rhs))"
        )
    return _Dims(left, right, left_batch, right_batch)
