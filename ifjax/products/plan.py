"""The choice of a kernel or XLA for a product on a device kind, made from shapes and dtypes alone."""

import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from ifjax.arrays import Explanation, QTensor
from ifjax.arrays.qtensor import check_arrays
from ifjax.numerics.byte_order import as_array, native
from ifjax.numerics.devices import device_kind, may_be_partitioned
from ifjax.numerics.kernels import why_none
from ifjax.products.backends import BACKENDS, Backend, Prepacked, backend_for, decoding_of

Impl = str  # "xla", or a name in BACKENDS
Operand = Any  # an array (or an argument of jnp.asarray), a QTensor or a Prepacked
DimensionNumbers = Any  # ((contracted axes of lhs, of rhs), (batch axes of lhs, of rhs)), as in lax.dot_general


# From about this many rows on, a product is bound by arithmetic (an H200 does 206 operations a byte of bfloat16).
# If x is decoded anyway, a kernel that decodes the weights then only adds a rearrangement of x and a float32 result.
_COMPUTE_BOUND = 256


class Dims(NamedTuple):
    """The dimension numbers of a product of x (left) with a packed q (right), as tuples of nonnegative axes."""

    x_contracted: tuple[int, ...]
    q_contracted: tuple[int, ...]
    x_batch: tuple[int, ...]
    q_batch: tuple[int, ...]

    @property
    def numbers(self):
        """The dimension numbers in the form that `lax.dot_general` takes."""
        return (self.x_contracted, self.q_contracted), (self.x_batch, self.q_batch)

    @property
    def swapped(self) -> "Dims":
        """The dimension numbers of the product with its operands exchanged."""
        return Dims(self.q_contracted, self.x_contracted, self.q_batch, self.x_batch)

    def x_free(self, ndim: int) -> tuple[int, ...]:
        """Return the free axes of x, which are neither contracted nor batch axes."""
        return tuple(i for i in range(ndim) if i not in self.x_contracted + self.x_batch)

    def q_free(self, ndim: int) -> tuple[int, ...]:
        """Return the free axes of q, which are neither contracted nor batch axes."""
        return tuple(i for i in range(ndim) if i not in self.q_contracted + self.q_batch)


def explain_matmul(
    a: Operand,
    b: Operand,
    dimension_numbers: DimensionNumbers | None = None,
    *,
    platform: Literal["cpu", "cuda", "tpu"] | None = None,
    target: str | None = None,
) -> Explanation:
    """Return how the product of a and b is computed on a platform, and why. Nothing is computed; shapes suffice.

    Args:
        a, b: as in `matmul`, or as in `dot_general` if `dimension_numbers` is given. `jax.ShapeDtypeStruct` and
            QTensors of it (from `jax.eval_shape`) suffice.
        platform: "cpu", "cuda" or "tpu"; by default that of `target`, else that of the first device.
        target: the device kind; see `dot_general`.

    Returns:
        An `Explanation`: `path` is the value of `impl=` or a path of XLA on CPUs, and `reason` says why.

    Raises:
        ValueError: the axes do not match, or the batch axes are ambiguous.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import ifjax
        >>> w = jax.eval_shape(lambda: ifjax.quantize(jnp.ones((4096, 4096)), axis=0))
        >>> ifjax.explain_matmul(jax.ShapeDtypeStruct((1, 4096), jnp.float32), w, platform="cpu").path
        'xla_few_rows'
        >>> ifjax.explain_matmul(jax.ShapeDtypeStruct((8, 4096), jnp.float32), w, target="A100")
        Explanation(path='xla', reason='there is no kernel for A100: weights are decoded to float32 by XLA')
    """
    a, b = native(a), native(b)
    if not (is_packed(a) or is_packed(b)):
        return Explanation("xla", "neither operand is packed")
    if dimension_numbers is None:
        batch = range(max(b.ndim - 2, 0))
        if batch and a.ndim != b.ndim:
            raise ValueError(f"say which axes of {a.shape} and {b.shape} belong together: pass dimension_numbers")
        dimension_numbers = ((a.ndim - 1,), (max(b.ndim - 2, 0),)), (tuple(batch), tuple(batch))
    dims = checked_dims(a, b, dimension_numbers)
    a, b, dims = as_one_axis(a, b, dims)
    x, q, dims = (a, b, dims) if is_packed(b) else (b, a, dims.swapped)
    return plan(x, q, dims, jnp.promote_types(a.dtype, b.dtype), device_kind(target, platform))


def plan(x: Any, q: Any, dims: Dims, dtype: Any, device: str) -> Explanation:
    """Return how x (an array, or packed too) is multiplied by a packed q on a device kind, and why."""
    backend = backend_for(device)
    if isinstance(q, Prepacked) and q.backend != getattr(backend, "name", None):
        return Explanation("xla", f"prepacked for {q.backend}, unpacked and dequantized for {device}")
    if backend is not None:
        reason = refusal(backend, x, q, dims, dtype)
        if reason is None and may_be_partitioned():
            reason = "XLA would gather sharded weights for a kernel; inside jax.shard_map, or with impl=, it is taken"
        if reason is None:
            return Explanation(backend.name, f"on {device}")
        return Explanation("xla", f"{backend.name} cannot take it: {reason}")
    on_cpu = _plan_on_cpu(x, q, dims, dtype) if device == "cpu" else None
    return on_cpu or Explanation("xla", f"{why_none(device)}: weights are decoded to {dtype.name} by XLA")


def refusal(backend: Backend, x: Any, q: Any, dims: Dims, dtype: Any) -> str | None:
    """Return the reason why a backend cannot compute this product; None if it can."""
    if backend.pairs:
        return backend.load().supports(x, q, dims)
    if 0 in (*x.shape, *q.shape):
        return "an operand is empty"
    if q.ndim < 2 or dims.q_batch or (q.amax is not None and q.amax.ndim):
        return "it multiplies by one matrix, and these weights have batch axes or several amax values"
    if dims.q_contracted != (q.ndim + q.axis,):
        return f"it contracts the axis that blocks lie along ({q.axis}) and no other"
    if is_packed(x) and _rows(x, dims) >= _COMPUTE_BOUND:
        return f"x is packed too: with {_COMPUTE_BOUND} rows or more both are decoded"
    decoding = decoding_of(q.fmt)
    if decoding is None:
        return f"{q.fmt.name} has codes of {q.fmt.bits} bits, or a table, scale or step that kernels cannot hold"
    return backend.load().supports(decoding, dtype, m=_rows(x, dims))


def checked_impl(impl: Impl | None, x: Any, q: Any, dims: Dims, dtype: Any) -> None:
    """Raise an error if `impl` is unknown or cannot compute this product.

    Raises:
        ValueError: `impl` is not a backend's name, or the backend cannot compute this product.
    """
    if impl is None or impl == "xla":
        return
    if impl not in BACKENDS:
        raise ValueError(f"impl must be None, 'xla' or one of {', '.join(map(repr, BACKENDS))}, got {impl!r}")
    reason = refusal(BACKENDS[impl], x, q, dims, dtype)
    if reason is None and isinstance(q, Prepacked) and q.backend != impl:
        reason = f"the weights are prepacked for {q.backend}"
    if reason:
        raise ValueError(f"impl={impl!r} cannot take this product: {reason}")


def _plan_on_cpu(x, q, dims, dtype):
    rows, fmt = _rows(x, dims), q.fmt
    is_matrix = dims.q_contracted == (q.ndim + q.axis,) and dims.x_contracted == (x.ndim - 1,) and not dims.q_batch
    pairs = fmt.bits == 4 and fmt.block % 2 == 0 and not fmt.scale.runs
    # Measured on two cores: this takes a quarter of the time of decoding the matrix first for one row, and two thirds
    # for four rows.
    if rows <= 4 and is_matrix and math.prod(q.shape) >= 2**16 and pairs and dtype.itemsize <= 4:
        return Explanation("xla_few_rows", f"{rows} rows: weights are decoded while they are multiplied")
    # XLA:CPU accumulates 16-bit products in float32 slowly. From 64 rows on, a float32 product is faster (measured).
    if rows >= 64 and dtype.itemsize == 2:
        return Explanation("xla_float32", f"{rows} rows of {dtype.name}: on a CPU products in float32 are faster")
    return None


def _rows(x, dims):
    return math.prod(n for i, n in enumerate(x.shape) if i not in dims.x_contracted)


# --- operands and axes -----------------------------------------------------------------------------------------------


def is_packed(a: Any) -> bool:
    """Return whether an operand is a QTensor or a Prepacked."""
    return isinstance(a, QTensor | Prepacked)


def as_operand(a: Any) -> Any:
    """What a product is of: a packed operand whose arrays go together, or an array.

    Raises:
        TypeError, ValueError: something has made other arrays of a QTensor's.
    """
    if isinstance(a, QTensor):
        check_arrays(a)
    return a if is_packed(a) else as_array(a)


def checked_dims(lhs: Any, rhs: Any, dimension_numbers: DimensionNumbers) -> Dims:
    """Return the dimension numbers with nonnegative axes.

    Raises:
        ValueError: they do not pair axes of equal length.
    """
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
    return Dims(left, right, left_batch, right_batch)


def as_one_axis(lhs: Any, rhs: Any, dims: Dims) -> tuple[Any, Any, Dims]:
    """Merge adjacent contracted axes, such as [heads, head size], into one where the blocks allow it.

    Kernels and the fast path of XLA contract the blocked axis only. Returns the operands and their dimension numbers.
    """
    (a, b), count = dims.numbers[0], len(dims.x_contracted)
    in_a_row = all(axes == tuple(range(axes[0], axes[0] + count)) for axes in (a, b) if axes)
    packed = [(q, axes) for q, axes in ((lhs, a), (rhs, b)) if is_packed(q)]
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
        length = math.prod(array.shape[first : first + count])
        return array.replaced(codes=merge(array.codes), scales=merge(array.scales), length=length, names=None)

    return merged(lhs, a[0]), merged(rhs, b[0]), Dims((a[0],), (b[0],), dims.x_batch, dims.q_batch)
