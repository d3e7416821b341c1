"""Kernels for packed weights: which device has which, and the layouts that they read.

The only importer of `pallas_kernels`, and only when a kernel is asked for.
"""

import dataclasses
import functools
import math
import re
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike

from ifjax import codec
from ifjax.arrays.qtensor import QTensor
from ifjax.formats import Format
from ifjax.numerics.packing import pack
from ifjax.numerics.xla import divide

# Device kinds, as jax spells them and as people do, and the kernels that were built for them.
_KERNELS = {
    "mosaic_gpu": r"\bG?H(100|200|800|20)\b", "mosaic_tpu": r"\bv[56] ?(lite|e)\b", "scaled_matmul": r"\bG?B[123]00\b",
}  # fmt: skip
PLATFORMS = {"mosaic_gpu": "cuda", "mosaic_tpu": "tpu"}  # those that have a layout of their own


def device_kind(target, platform=None):
    """The device kind to compile for. A platform without a target stands for devices of no particular kind."""
    if target is not None:
        return target
    device = jax.devices()[0]
    named = {"gpu": "cuda"}.get(device.platform, device.platform)
    return device.device_kind if platform in (None, named) else platform


def kernel_for(target) -> str | None:
    """The kernel for a device kind."""
    return next((name for name, kinds in _KERNELS.items() if re.search(kinds, target)), None)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Prepacked:
    """A QTensor in the layout that a kernel reads. Made by `prepack`, for products; a pytree like QTensor.

    Attributes:
        words, scales: the kernel's arrays, after any leading axes (layers of `lax.scan`).
        amax: as in QTensor.
        kernel: "mosaic_gpu" or "mosaic_tpu".
        fmt, headroom, axis, dtype, block_2d: as in QTensor.
        matrix: shape of the array, leading axes aside.
        rank: number of axes of `words` for one matrix.
    """

    words: jax.Array
    scales: jax.Array
    amax: jax.Array | None
    kernel: str
    fmt: Format
    headroom: float
    axis: int
    matrix: tuple[int, ...]
    dtype: np.dtype
    block_2d: bool
    rank: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array that this stands for."""
        return self.words.shape[: self.words.ndim - self.rank] + self.matrix

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays together."""
        return sum(a.nbytes for a in jax.tree.leaves(self))

    def unpack(self) -> QTensor:
        """The QTensor that this was made of."""
        unpack = functools.partial(_unpack, like=self)
        for _ in range(self.words.ndim - self.rank):
            unpack = jax.vmap(unpack)
        codes, scale_bytes = unpack(self.words, self.scales)
        return QTensor(
            codes, lax.bitcast_convert_type(scale_bytes, self.fmt.scale.dtype), self.amax, self.fmt, self.headroom,
            self.axis, self.matrix[self.axis], self.dtype, self.block_2d,
        )  # fmt: skip

    def dequantize(self, dtype: DTypeLike | None = None) -> jax.Array:
        """The values, as `QTensor.dequantize` gives them."""
        return self.unpack().dequantize(dtype)

    def __repr__(self) -> str:
        return f"Prepacked({self.fmt.name}, {'x'.join(map(str, self.matrix))}, for {self.kernel})"


jax.tree_util.register_dataclass(
    Prepacked,
    data_fields=["words", "scales", "amax"],
    meta_fields=["kernel", "fmt", "headroom", "axis", "matrix", "dtype", "block_2d", "rank"],
)


def prepack(q: QTensor, target: str | None = None) -> Prepacked:
    """q in the layout of the kernel for a device kind, still packed: to be done once, when weights are loaded.

    `Prepacked.unpack` is the exact inverse for everything that `quantize` writes. Products take the result directly;
    without it they arrange the weights anew at each call. Leading axes with an amax of their own (layers) stay.

    Args:
        q: blocked along the axis that products will contract, in a 4-bit format.
        target: the device kind, such as "H200" or "TPU v6e"; the first device's unless given.

    Raises:
        ValueError: there is no kernel for the device kind, or it cannot hold the format.
    """
    if not isinstance(q, QTensor):
        raise TypeError(f"prepack needs a QTensor, got {type(q).__name__}: make one with ifjax.quantize")
    target = device_kind(target)
    kernel = kernel_for(target)
    if kernel not in PLATFORMS:
        raise ValueError(f"no kernel for {target!r} has a layout of its own: products take the QTensor itself there")
    lead = 0 if q.amax is None else q.amax.ndim
    if decoding_of(q.fmt) is None or q.ndim - lead < 2:
        raise ValueError(f"{kernel} multiplies by matrices of 4-bit codes, got {q!r}: products take it as it is")
    return _prepack(q, kernel)


@functools.lru_cache
def decoding_of(fmt: Format) -> Any:
    """The format as kernels know formats, a `Decoding`; None where they cannot."""
    from pallas_kernels.decoding import Decoding

    # Multipliers are the smallest integers in proportion to the steps: 7 and 6 for 1 and 6/7.
    steps, common = _fractions(fmt), common_multiple(fmt)
    exact = all(np.float32(float(a)) == np.float32(b) for a, (_, b) in zip(steps, fmt.decodings, strict=True))
    kinds: dict[str, Any] = {"e4m3": "e4m3", "e4m3_256": "e4m3", "e8m0": "e8m0"}
    if fmt.bits != 4 or not exact or fmt.scale.name not in kinds:
        return None
    try:
        return Decoding(
            tuple(grid.magnitudes for grid, _ in fmt.decodings), tuple(int(step * common) for step in steps),
            kinds[fmt.scale.name], fmt.block,
        )  # fmt: skip
    except ValueError:
        return None


def common_multiple(fmt: Format) -> int:
    """What the multipliers of `decoding_of` have to be divided by."""
    return math.lcm(*(step.denominator for step in _fractions(fmt)))


def _fractions(fmt: Format) -> list[Fraction]:
    """The steps as the simple fractions that they stand for."""
    return [Fraction(step).limit_denominator(16) for _, step in fmt.decodings]


@jax.jit(static_argnums=1)
def _prepack(q, kernel):
    lead = 0 if q.amax is None else q.amax.ndim

    def of_matrix(codes, scale_bytes):
        codes, scale_bytes = (_rows(a, q.axis) for a in (codes, scale_bytes))
        return module_of(kernel).pack(_flip(codes, scale_bytes, q.fmt), scale_bytes, decoding_of(q.fmt))

    for _ in range(lead):
        of_matrix = jax.vmap(of_matrix)
    # Whole blocks: the last one's filling zeros too.
    words, scales = of_matrix(dataclasses.replace(q, length=_filled(q)).unpacked_codes(), q.scale_bytes())
    return Prepacked(
        words, scales, q.amax, kernel, q.fmt, q.headroom, q.axis, q.shape[lead:], q.dtype, q.block_2d,
        words.ndim - lead,
    )  # fmt: skip


def _filled(q):
    """The length of the blocked axis with the last block's filling zeros."""
    return -(-q.shape[q.axis] // q.fmt.block) * q.fmt.block


def _unblocked_lengths(q: Prepacked) -> tuple[int, ...]:
    """The lengths of the matrix's other axes, whose product is N."""
    return tuple(n for i, n in enumerate(q.matrix) if i != len(q.matrix) + q.axis)


def _rows(a, axis):
    """[..., K, ...] -> [N, K]"""
    a = jnp.moveaxis(a, axis, -1)
    return a.reshape(-1, a.shape[-1])


def _flip(codes, scale_bytes, fmt: Format):
    """Between two's complement and sign-magnitude, its own inverse: negative codes of integer grids are negated."""
    twos = [grid.sign == "twos_complement" for grid, _ in fmt.decodings]
    flag = jnp.repeat(scale_bytes >> 7, fmt.block, axis=-1)[..., : codes.shape[-1]]
    applies = jnp.where(flag == 1, twos[-1], twos[0]) if fmt.has_flag else twos[0]
    half = 2 ** (fmt.bits - 1)
    return jnp.where(applies & (codes > half), 3 * half - codes, codes).astype(jnp.uint8)


def _unpack(words, scales, like: Prepacked):
    """One matrix's canonical packed codes and scale bytes."""
    rest = _unblocked_lengths(like)
    codes, scale_bytes = module_of(like.kernel).unpack(
        words, scales, math.prod(rest), _filled(like), decoding_of(like.fmt)
    )
    codes = pack(_flip(codes, scale_bytes, like.fmt), like.fmt.bits)
    return tuple(jnp.moveaxis(a.reshape(*rest, -1), -1, like.axis) for a in (codes, scale_bytes))


def kernel_product(rows, q, kernel, dtype, out_dtype):
    """rows [..., K], multiplied as `dtype`, times q along its blocked axis: [..., q's other axes]."""
    q = _prepack(q, kernel) if isinstance(q, QTensor) else q
    k = _filled(q)
    rest = _unblocked_lengths(q)
    rows_of_k = codec.pad_axis(rows, k, -1).reshape(-1, k).astype(dtype)
    factor = divide(np.float32(1) if q.amax is None else factor_of(q), np.float32(common_multiple(q.fmt)))
    # All kernels write these two types.
    written = np.dtype(jnp.bfloat16 if out_dtype == jnp.bfloat16 else np.float32)
    y = module_of(kernel).matmul(
        rows_of_k, q.words, q.scales, factor, n=math.prod(rest), k=k, decoding=decoding_of(q.fmt), out_dtype=written
    )
    return y.reshape(*rows.shape[:-1], *rest).astype(out_dtype)


def module_of(kernel) -> Any:
    """The module of a kernel that has a layout: supports, pack, unpack, matmul."""
    if kernel == "mosaic_gpu":
        from pallas_kernels import gpu_matmul

        return gpu_matmul
    from pallas_kernels import tpu_matmul

    return tpu_matmul


def factor_of(q):
    """amax / K of a QTensor or a prepacked one: what its unscaled values are to be multiplied by."""
    return divide(q.amax, q.fmt.constants(q.headroom)[1])
