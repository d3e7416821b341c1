"""4-bit weights as other tools store them: NVFP4 and MXFP4 out, and those and the fouroversix package's tensors in.

Codes and block scales travel as they are, bit for bit. What differs from tool to tool is a record (`Layout`): the names
of the arrays, how the scales are typed, and which way round the tensor's factor is stored. With K from
`Format.tensor_constant`, 2688 for NVFP4 and 1536 for Four Over Six, a value is

    code * scale * amax / K                        here
    code * (scale / weight_global_scale)           compressed-tensors: weight_global_scale = K / amax
    code * (scale * weight_scale_2)                ModelOpt and torchao: weight_scale_2 = amax / K

A matrix is stored [out, in] with its blocks along `in`, so the blocked axis of a QTensor is taken for the layer's
inputs, and a Flax kernel, [in, out] and blocked along -2, is turned around.

Readers differ in what two byte patterns mean, so that a file can be read without an error and wrongly: the sign of a
scale (a negative scale for some, the mark of integer elements for others) and the order of the two codes of a byte.
Here a scale with a sign is never written nor read as NVFP4, and the order is either declared by the layout or has to
be stated.
"""

import dataclasses
from typing import Literal

import ml_dtypes
import numpy as np

from ifjax.arrays.ml_dtypes import is_plain_e2m1
from ifjax.formats import Format, get_format

Tool = Literal["compressed-tensors", "modelopt"]


Source = Literal["compressed-tensors", "modelopt", "fouroversix"]


Nibbles = Literal["low_first", "high_first"]


E4M3_TYPE, E8M0_TYPE, U8 = np.dtype(ml_dtypes.float8_e4m3fn), np.dtype(ml_dtypes.float8_e8m0fnu), np.dtype(np.uint8)


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a tool stores a matrix of one kind of format. Arrays are [out, ...] and have these names below the layer's.

    Attributes:
        tool: whose layout it is.
        algorithm: the tool's own name for it, in configurations.
        fmt: the name of the format that it is read as. What is written needs its decoding, block and kind of scale.
        packed: uint8 [out, in / 2], the earlier code in the low nibble.
        scales: [out, in / block].
        scales_dtype: of that array; its bytes are the format's.
        factor: float32, one number for the tensor; None where there is none (MX).
        reciprocal: whether the factor is K / amax, not amax / K.
        factor_shape: () or (1,).
        input_factor: the same for the layer's inputs, where their maximum is known.
        strategy: the tool's word for this kind of scaling; None where it has none.
    """

    tool: Tool
    algorithm: str
    fmt: str
    packed: str
    scales: str
    scales_dtype: np.dtype
    factor: str | None = None
    reciprocal: bool = False
    factor_shape: tuple[int, ...] = ()
    input_factor: str | None = None
    strategy: str | None = None

    @property
    def block(self) -> int:
        """Values that share a scale."""
        return get_format(self.fmt).block

    def accepts(self, fmt: Format) -> bool:
        """Whether this layout's readers decode what `fmt` encodes: by what the record says, not by its name."""
        mine = get_format(self.fmt)
        return is_plain_e2m1(fmt) and (fmt.block, fmt.scale.dtype) == (mine.block, mine.scale.dtype)

    def names(self) -> tuple[str, ...]:
        """Of the arrays that make up a tensor."""
        return (self.packed, self.scales) if self.factor is None else (self.packed, self.scales, self.factor)


# Sources: compressed-tensors' NVFP4PackedCompressor and MXFP4PackedCompressor; ModelOpt's NVFP4QTensor, MXFP4QTensor
# and convert_hf_quant_config_format. Tested against these readers.
LAYOUTS = (
    Layout(
        "compressed-tensors", "nvfp4-pack-quantized", "nvfp4", "weight_packed", "weight_scale", E4M3_TYPE,
        "weight_global_scale", True, (1,), "input_global_scale", "tensor_group",
    ),
    Layout(
        "compressed-tensors", "mxfp4-pack-quantized", "mxfp4", "weight_packed", "weight_scale", U8, strategy="group"
    ),
    Layout(
        "modelopt", "NVFP4", "nvfp4", "weight", "weight_scale", E4M3_TYPE, "weight_scale_2", False, (), "input_scale"
    ),
    Layout("modelopt", "MXFP4", "mxfp4", "weight", "weight_scale", U8),
)  # fmt: skip


TOOLS = tuple(dict.fromkeys(layout.tool for layout in LAYOUTS))


# The last part of a name, for which the layout's own names are put.
WEIGHTS = ("weight", "kernel", "embedding")


@dataclasses.dataclass(frozen=True)
class Matrix:
    """What was read: packed codes [out, ...], scale bytes [out, m], amax, for a matrix [out, length]."""

    codes: np.ndarray
    scales: np.ndarray
    amax: np.ndarray | np.float32 | None
    fmt: Format
    length: int


def swapped_nibbles(packed: np.ndarray) -> np.ndarray:
    return packed >> 4 | packed << 4


def split_name(name: str) -> tuple[str, str]:
    """(layer, last part)"""
    module, _, tail = name.rpartition(".")
    return module, tail


def join_name(module: str, tail: str) -> str:
    return f"{module}.{tail}" if module else tail
