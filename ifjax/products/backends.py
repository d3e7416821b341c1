"""Kernel backends for products with packed weights, as records, and the weight layouts that they read.

`pallas_kernels` is imported only when a kernel is used.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike

from ifjax.arrays import Blocking, QTensor
from ifjax.arrays.ml_dtypes import is_plain_e2m1, to_ml_dtypes
from ifjax.codec.blocks import crop, pad_axis
from ifjax.formats import E4M3, E8M0, Format, TableScale
from ifjax.lookup import Registry
from ifjax.numerics.devices import device_kind
from ifjax.numerics.kernels import kernels_for, made_for
from ifjax.numerics.packing import pack
from ifjax.numerics.xla import divide


class Kernel(Protocol):
    """Interface of a backend module that multiplies float rows by one packed matrix W [N, K].

    Weights are sign-magnitude nibbles, uint8 [N, K], and scale bytes, uint8 [N, K / block]. A `decoding` defines their
    values (see `pallas_kernels.decoding.Decoding`).
    """

    def supports(self, decoding: Any, dtype: Any, *, m: int) -> str | None:
        """Return the reason why `matmul` cannot take m rows of this dtype; None if it can."""

    def pack(self, nibbles: jax.Array, scales: jax.Array, decoding: Any) -> tuple[jax.Array, jax.Array]:
        """Return the words and scales that `matmul` reads."""
        ...

    def unpack(
        self, words: jax.Array, scales: jax.Array, n: int, k: int, decoding: Any
    ) -> tuple[jax.Array, jax.Array]:
        """Invert `pack`: return nibbles and scale bytes."""
        ...

    def matmul(
        self, x: jax.Array, words: jax.Array, scales: jax.Array, factor: jax.Array, *, n: int, k: int, decoding: Any,
        out_dtype: Any,
    ) -> jax.Array:  # fmt: skip
        """Return x [M, k] @ W.T * factor."""
        ...


class PairKernel(Protocol):
    """Interface of a backend module that multiplies two QTensors."""

    def supports(self, a: QTensor, b: QTensor, dims: Any) -> str | None:
        """Return the reason why `matmul` cannot compute this product; None if it can."""

    def matmul(self, a: QTensor, b: QTensor, dtype: Any) -> jax.Array:
        """Return the product of two matrices, contracted along their blocked axes (see `blocked_along`)."""
        ...


@dataclasses.dataclass(frozen=True)
class Backend:
    """A kernel for products with packed operands, and the devices that it supports.

    Attributes:
        name: the value of `impl=` that selects it.
        platform: JAX's name of the platform that it compiles for: "cuda", "tpu" or "cpu".
        devices: a regular expression that matches the supported device kinds, in JAX's spelling and in common ones.
        load: returns the module: a `Kernel`, or a `PairKernel` if `pairs` is true.
        pairs: whether it multiplies two QTensors, not an array and a QTensor.
        measured: where its times on hardware are published; None if nowhere.
    """

    name: str
    platform: str
    devices: str
    load: Callable[[], Any]
    pairs: bool = False
    measured: str | None = None


def _hopper():
    from pallas_kernels import gpu_matmul

    return gpu_matmul


def _tpu():
    from pallas_kernels import tpu_matmul

    return tpu_matmul


class _ScaledMatmul:
    """A `PairKernel` that multiplies two NVFP4 matrices by `jax.nn.scaled_matmul`."""

    @staticmethod
    def supports(a, b, dims):
        if not (isinstance(a, QTensor) and isinstance(b, QTensor)):
            return "it multiplies two QTensors"
        for q, contracted, batch in ((a, dims.x_contracted, dims.x_batch), (b, dims.q_contracted, dims.q_batch)):
            if not is_plain_e2m1(q.fmt) or q.fmt.scale != E4M3 or q.fmt.block != 16 or q.amax is None:
                return f"it reads plain NVFP4, and {q.fmt.name} has other elements, scales or marks in their signs"
            is_blocked = contracted == (2 + q.axis,) or (q.block_2d and len(contracted) == 1)
            if q.ndim != 2 or q.amax.ndim or batch or not is_blocked:
                return "it multiplies matrices with one amax along their blocks"
        return None

    @staticmethod
    def matmul(a, b, dtype):
        (x, x_scales, x_factor), (w, w_scales, w_factor) = map(to_ml_dtypes, (a, b))
        arrays = (a, x), (b, w), (a, x_scales), (b, w_scales)
        batches = [jnp.moveaxis(array, q.axis, -1)[None] for q, array in arrays]
        y: Any = jax.nn.scaled_matmul(*batches, preferred_element_type=np.float32)[0]
        return (y * x_factor * w_factor).astype(dtype)


def blocked_along(q: QTensor, axis: int) -> QTensor:
    """Return q with its blocks along a negative axis; for square blocks that may be the other axis of the squares.

    A square's values share a header, so all values stay the same.
    """
    if axis == q.axis:
        return q
    block = q.fmt.block
    codes = pad_axis(q.unpacked_codes(), -(-q.shape[axis] // block) * block, axis)
    scales = jnp.repeat(lax.slice_in_dim(q.scales, 0, None, block, q.ndim + axis), block, q.axis)
    scales = crop(scales, q.shape[q.axis], q.axis)
    return q.replaced(codes=pack(codes, q.fmt.bits, axis), scales=scales, axis=axis, length=q.shape[axis])


BACKENDS: Registry[Backend] = Registry(
    "impl", Backend, "ifjax.products.BACKENDS",
    (
        Backend("hopper", "cuda", r"\bG?H(100|200|800|20)\b", _hopper),
        Backend("tpu", "tpu", r"\bv[56] ?(lite|e)\b", _tpu),
        Backend("scaled_matmul", "cuda", r"\bG?B[123]00\b", _ScaledMatmul, pairs=True),
    ),
)  # fmt: skip


def backend_for(device: str) -> Backend | None:
    """Return the backend for a device kind; None if there is none or `kernels` disables kernels."""
    return kernels_for(BACKENDS.values(), device)


# --- layouts ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Prepacked:
    """A QTensor in the layout that a kernel reads, returned by `prepack`; an operand of products and a pytree.

    Attributes:
        words, scales: the kernel's arrays, preceded by any leading axes (layers of `lax.scan`).
        amax: as in QTensor.
        backend: the name of the backend.
        blocking: as in QTensor.
        matrix: shape of the array without leading axes.
        rank: number of axes of `words` for one matrix.
    """

    words: jax.Array
    scales: jax.Array
    amax: jax.Array | None
    backend: str
    blocking: Blocking
    matrix: tuple[int, ...]
    rank: int

    @property
    def fmt(self) -> Format:
        """The format's record."""
        return self.blocking.fmt

    @property
    def axis(self) -> int:
        """The blocked axis, as a negative index."""
        return self.blocking.axis

    @property
    def dtype(self) -> np.dtype:
        """The dtype of the original array."""
        return self.blocking.dtype

    @property
    def headroom(self) -> float:
        """The tensor scale's headroom, as in QTensor."""
        return self.blocking.headroom

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the original array."""
        return self.words.shape[: self.words.ndim - self.rank] + self.matrix

    @property
    def ndim(self) -> int:
        """The number of axes of the original array."""
        return len(self.shape)

    @property
    def nbytes(self) -> int:
        """The total bytes of all arrays."""
        return sum(a.nbytes for a in jax.tree.leaves(self))

    def unpack(self) -> QTensor:
        """Return the QTensor from which `prepack` made this one."""
        unpack = functools.partial(_unpack, like=self)
        for _ in range(self.words.ndim - self.rank):
            unpack = jax.vmap(unpack)
        codes, scales = unpack(self.words, self.scales)
        return QTensor(codes, scales, self.amax, self.blocking)

    def dequantize(self, dtype: DTypeLike | None = None) -> jax.Array:
        """Return the values, equal to those of `QTensor.dequantize`."""
        return self.unpack().dequantize(dtype)

    def __repr__(self) -> str:
        return f"Prepacked({self.fmt.name}, {'x'.join(map(str, self.matrix))}, for {self.backend})"


jax.tree_util.register_dataclass(
    Prepacked, data_fields=["words", "scales", "amax"], meta_fields=["backend", "blocking", "matrix", "rank"]
)


def prepack(q: QTensor, target: str | None = None) -> Prepacked:
    """Rearrange the bytes of q into the layout of a device kind's kernel, once, when weights are loaded.

    Products take the result directly. Given q itself, they rearrange its bytes at each call. Leading axes with an amax
    of their own (layers) are kept. `Prepacked.unpack` is the exact inverse for every QTensor that `quantize` returns.

    Args:
        q: a QTensor in a 4-bit format, blocked along the contraction axis of later products.
        target: the device kind, such as "H200" or "TPU v6e"; by default that of the first device.

    Raises:
        TypeError: q is not a QTensor.
        ValueError: the device kind has no kernel with a layout, or its kernel does not support the format.

    Example:
        >>> import jax.numpy as jnp
        >>> import ifjax
        >>> ifjax.prepack(ifjax.quantize(jnp.ones((256, 512))), "H200")
        Prepacked(if4, 256x512, for hopper)
    """
    if not isinstance(q, QTensor):
        raise TypeError(f"prepack needs a QTensor, got {type(q).__name__}: make one with ifjax.quantize")
    target = device_kind(target)
    backend = made_for(BACKENDS.values(), target)
    if backend is None or backend.pairs:
        raise ValueError(f"no kernel for {target!r} has a layout of its own: products take the QTensor itself there")
    lead = 0 if q.amax is None else q.amax.ndim
    if decoding_of(q.fmt) is None or q.ndim - lead < 2:
        raise ValueError(f"{backend.name} multiplies by matrices of 4-bit codes, got {q!r}: products take it as it is")
    if reason := backend.load().supports(decoding_of(q.fmt), jnp.bfloat16, m=1):
        raise ValueError(f"{backend.name} cannot hold {q!r}: {reason}: products take it as it is")
    return _prepack(q, backend.name)


# The scales of a `Decoding`, and the kernels' names for them.
_KERNEL_SCALES = {E4M3: "e4m3", E8M0: "e8m0"}


@functools.lru_cache
def decoding_of(fmt: Format) -> Any:
    """Return the kernels' description of fmt, a `Decoding` or `TableDecoding`; None if kernels cannot decode it."""
    from pallas_kernels import decoding

    # Multipliers are the smallest integers in the ratio of the steps: 7 and 6 for steps of 1 and 6/7.
    steps = _fractions(fmt)
    common = math.lcm(*(step.denominator for step in steps))
    exact = all(np.float32(float(a)) == np.float32(d.step) for a, d in zip(steps, fmt.decodings, strict=True))
    magnitudes = [d.grid.magnitudes for d in fmt.decodings]
    plain = not any(d.offset for d in fmt.decodings) and all(magnitudes)
    if fmt.bits != 4:
        return None
    if not exact or not plain or fmt.scale not in _KERNEL_SCALES or len(fmt.decodings) > 2:
        return _table_of(fmt)
    try:
        multipliers = tuple(int(step * common) for step in steps)
        return decoding.Decoding(tuple(magnitudes), multipliers, _KERNEL_SCALES[fmt.scale], fmt.block)  # pyright: ignore
    except ValueError:
        return _table_of(fmt)


def _table_of(fmt: Format) -> Any:
    """Return the format as tables of 16 values; None if its scale is not a binary float with subnormals."""
    from pallas_kernels.decoding import TableDecoding

    scale = fmt.scale
    if not isinstance(scale, TableScale) or not scale.mantissa_bits:
        return None
    mantissa = scale.mantissa_bits
    nibbles = np.arange(16)
    rows = []
    for decoding in fmt.decodings:
        codes = np.where(nibbles > 8, 24 - nibbles, nibbles) if decoding.grid.is_twos_complement else nibbles
        values = np.asarray(decoding.grid.values, np.float32)[codes] + np.float32(decoding.offset)
        rows.append(tuple((values * np.float32(decoding.step)).tolist()))
    if scale.dtype is not None and scale.bits == 7 and len(rows) == 1:  # bit 7 of the scale byte is a sign
        rows.append(tuple(-value for value in rows[0]))
    bias = 1 - mantissa - round(math.log2(scale.values[1]))  # payload 1 is 2^(1 - bias - mantissa)
    return TableDecoding(tuple(rows), scale.bits - mantissa, mantissa, bias, scale.nan, fmt.block)


def common_multiple(fmt: Format) -> int:
    """Return the divisor that turns the multipliers of `decoding_of` into steps; 1 for tables, which hold the steps."""
    if not hasattr(decoding_of(fmt), "multipliers"):
        return 1
    return math.lcm(*(step.denominator for step in _fractions(fmt)))


def _fractions(fmt: Format) -> list[Fraction]:
    """Return the decodings' steps as exact fractions, with denominators up to 16."""
    return [Fraction(d.step).limit_denominator(16) for d in fmt.decodings]


@jax.jit(static_argnums=1)
def _prepack(q, backend):
    lead = 0 if q.amax is None else q.amax.ndim
    kernel = BACKENDS[backend].load()

    def of_matrix(codes, scales):
        codes, scales = (_rows(a, q.axis) for a in (codes, scales))
        return kernel.pack(_flip(codes, scales, q.fmt), scales, decoding_of(q.fmt))

    for _ in range(lead):
        of_matrix = jax.vmap(of_matrix)
    # Kernels read whole blocks, so the zeros that pad the last block are kept.
    words, scales = of_matrix(q.replaced(length=_filled(q)).unpacked_codes(), q.scales)
    return Prepacked(words, scales, q.amax, backend, q.blocking, q.shape[lead:], words.ndim - lead)


def _filled(q):
    """Return the length of the blocked axis, rounded up to whole blocks."""
    return -(-q.shape[q.axis] // q.fmt.block) * q.fmt.block


def _unblocked_lengths(q: Prepacked) -> tuple[int, ...]:
    """Return the lengths of the matrix's unblocked axes, whose product is N."""
    return tuple(n for i, n in enumerate(q.matrix) if i != len(q.matrix) + q.axis)


def _rows(a, axis):
    """Reshape [..., K, ...], with K at `axis`, to [N, K]."""
    a = jnp.moveaxis(a, axis, -1)
    return a.reshape(-1, a.shape[-1])


def _flip(codes, scales, fmt: Format):
    """Convert codes between two's complement and sign-magnitude by negating the negative codes of integer grids.

    The function is its own inverse.
    """
    selector, _ = fmt.split(scales.astype(jnp.int32))
    if isinstance(selector, int):
        applies = fmt.grid.is_twos_complement
    else:
        selector = jnp.repeat(selector, fmt.block, axis=-1)[..., : codes.shape[-1]]
        applies = functools.reduce(
            jnp.logical_or, [selector == i for i, d in enumerate(fmt.decodings) if d.grid.is_twos_complement], False
        )
    half = 2 ** (fmt.bits - 1)
    return jnp.where(applies & (codes > half), 3 * half - codes, codes).astype(jnp.uint8)


def _unpack(words, scales, like: Prepacked):
    """Return the packed codes and scales of one matrix in QTensor's layout."""
    rest, kernel = _unblocked_lengths(like), BACKENDS[like.backend].load()
    codes, scales = kernel.unpack(words, scales, math.prod(rest), _filled(like), decoding_of(like.fmt))
    codes = pack(_flip(codes, scales, like.fmt), like.fmt.bits)
    return tuple(jnp.moveaxis(a.reshape(*rest, -1), -1, like.axis) for a in (codes, scales))


def kernel_product(rows: jax.Array, q: QTensor | Prepacked, backend: str, dtype: Any, out_dtype: Any) -> jax.Array:
    """Return rows [..., K], cast to `dtype`, times q along its blocked axis: [..., q's other axes]."""
    q = _prepack(q, backend) if isinstance(q, QTensor) else q
    k = _filled(q)
    rest = _unblocked_lengths(q)
    rows_of_k = pad_axis(rows, k, -1).reshape(-1, k).astype(dtype)
    factor = divide(np.float32(1) if q.amax is None else factor_of(q), np.float32(common_multiple(q.fmt)))
    # All kernels can write bfloat16 and float32. Other dtypes are cast from float32.
    written = np.dtype(jnp.bfloat16 if out_dtype == jnp.bfloat16 else np.float32)
    y = BACKENDS[backend].load().matmul(
        rows_of_k, q.words, q.scales, factor, n=math.prod(rest), k=k, decoding=decoding_of(q.fmt), out_dtype=written
    )
    return y.reshape(*rows.shape[:-1], *rest).astype(out_dtype)


def factor_of(q: Any) -> jax.Array:
    """Return the tensor scale, amax / K, of a QTensor or Prepacked, where K is the format's tensor constant."""
    constant = q.fmt.tensor_constant(q.headroom)
    if np.frexp(constant)[0] == 0.5:  # exact, and compiled into what uses it
        return q.amax * np.float32(1 / constant)
    return divide(q.amax, constant)
