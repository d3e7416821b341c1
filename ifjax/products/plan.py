"""Which way a product goes, and why."""

import dataclasses
import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from ifjax.arrays.qtensor import QTensor
from ifjax.formats.grids import E2M1
from ifjax.products.kernels import Prepacked, decoding_of, device_kind, kernel_for, module_of

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


def _may_be_partitioned():
    """Whether there are several accelerators and XLA, not shard_map, decides which computes what."""
    several = jax.device_count() > 1 and jax.devices()[0].platform != "cpu"
    return several and not jax.sharding.get_abstract_mesh().manual_axes


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
