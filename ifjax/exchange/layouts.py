"""Layouts of other tools as records: the names of a tensor's arrays, two functions, and what a configuration says.

Codes and block scales travel as they are, bit for bit; what differs from tool to tool is a `Layout`. With K from
`Format.tensor_constant`, 2688 for NVFP4 and 1536 for Four Over Six, a value is

    code * scale * amax / K         here
    code * (scale / divisor)        compressed-tensors: weight_global_scale = K / amax
    code * (scale * multiplier)     ModelOpt, torchao, GGUF: weight_scale_2 = amax / K

A matrix is [out, in] with its blocks along `in`: the blocked axis of a QTensor is taken for the layer's inputs, and a
Flax kernel, [in, out] and blocked along -2, is turned around. Stacks of matrices have leading axes.

Readers differ in what two byte patterns mean, so that a file can be read without an error and wrongly: the sign of a
scale (a negative scale for some, the mark of integer elements for others) and the order of the two codes of a byte.
Here a scale with a sign is never written nor read as NVFP4, and the order is either declared by the layout or has to
be stated.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, NamedTuple

import ml_dtypes
import numpy as np

from ifjax.files.safetensors import CODES
from ifjax.formats import Format, get_format
from ifjax.lookup import Registry

E4M3_TYPE, E8M0_TYPE = np.dtype(ml_dtypes.float8_e4m3fn), np.dtype(ml_dtypes.float8_e8m0fnu)

# The last part of a parameter's name, for which a layout's own names are put.
WEIGHTS = ("weight", "kernel", "embedding")


class Spec(NamedTuple):
    """What a header says of an array: the file's name for its type, and its shape."""

    dtype: str
    shape: tuple[int, ...]

    @classmethod
    def of(cls, array: Any) -> "Spec":
        """Return that of an array; of a type that no file has, its own name."""
        name: str = array.dtype.name
        return cls(CODES.get(name, name), tuple(array.shape))


class Size(NamedTuple):
    """Sizes of a stack of matrices [*batch, rows, columns] with `blocks` blocks in a row of `columns` values."""

    batch: tuple[int, ...]
    rows: int
    columns: int
    blocks: int


@dataclasses.dataclass(frozen=True)
class Part:
    """One of the arrays that make up a tensor.

    Attributes:
        name: with {} in the place of the layer's name, such as "{}.weight_scale".
        dtypes: the file's names for the types it may have, such as "F8_E4M3"; the first one is written. () for any.
        shape: its shape from the matrix's `Size`, for layouts that are written.
        optional: whether it may be missing.
    """

    name: str
    dtypes: tuple[str, ...] = ()
    shape: Callable[[Size], tuple[int, ...]] | None = None
    optional: bool = False

    @property
    def tail(self) -> str:
        """The name below the layer's."""
        return self.name.replace("{}", "").lstrip(".")

    def of(self, layer: str) -> str:
        """Return the array's name for a layer; "" is a name, too."""
        return self.name.replace("{}", layer) if layer else self.tail

    def layer_of(self, name: str) -> str | None:
        """Return the layer whose array has this name, or None."""
        before, after = self.name.split("{}")
        if name == self.tail and after.startswith("."):
            return ""
        fits = name.startswith(before) and name.endswith(after) and len(name) > len(before) + len(after)
        return name[len(before) : len(name) - len(after)] if fits else None


@dataclasses.dataclass(frozen=True, eq=False)
class Blocks:
    """Packed matrices as layouts read and write them.

    Attributes:
        codes: uint8 [..., rows, bytes], the earlier code of a byte in its low bits.
        scales: the blocks' headers, uint8 [..., rows, blocks * W].
        amax, multiplier, divisor: float32 of shape () or of the leading axes. A reader gives one of them, or none for
            formats without a tensor scale; a writer gets all: amax / K and K / amax, both 1 where there is no amax.
        fmt: the format, for writers.
        size: the matrix's sizes, for writers.
    """

    codes: np.ndarray
    scales: np.ndarray
    amax: Any = None
    multiplier: Any = None
    divisor: Any = None
    fmt: Format | None = None
    size: Size | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Floats:
    """Matrices that a layout stores in other numbers, such as FP8 with scales, as what they decode to.

    Attributes:
        shape: [..., rows, columns].
        rows: from first and last row, of all matrices laid end to end, and a slice of the columns, if not all are
            wanted, to float32 [last - first, columns].
    """

    shape: tuple[int, ...]
    rows: Callable[..., np.ndarray]


class InputFactor(NamedTuple):
    """How the factor of a layer's inputs is stored, which readers quantize to plain NVFP4.

    Attributes:
        part: its array.
        reciprocal: whether it is K / amax, not amax / K.
        shape: () or (1,).
    """

    part: Part
    reciprocal: bool
    shape: tuple[int, ...]


class Model(NamedTuple):
    """What a configuration is written of.

    Attributes:
        groups: the layers in each layout, by their names, with the specifications of their arrays.
        ignored: names of layers that are not quantized.
        inputs: whether factors for the layers' inputs are stored.
    """

    groups: "Mapping[Layout, Mapping[str, tuple[Spec | None, ...]]]"
    ignored: list[str]
    inputs: bool


class Declared(NamedTuple):
    """What a configuration says of a layout: `fmt` is the format's name, where the layout leaves it open."""

    fmt: str | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Layout:
    """How a tool stores matrices of one kind. `LAYOUTS.register(layout)` adds one.

    Attributes:
        name: unique, such as "modelopt NVFP4".
        tool: whose it is. A checkpoint's layouts are those of one tool.
        algorithm: the tool's own name for it, in configurations.
        parts: the arrays; the first one has the codes.
        fmt: the format that it is read as. What is written needs its decodings, block and kind of scale. None: the file
            does not say, and `read` is told; or it holds `floats`.
        read: from the format and the parts' arrays (None for one that is missing) to `Blocks` or `Floats`. None for
            layouts that are recognized and left alone.
        write: from `Blocks` to the parts' arrays, None for one that is left out. None for layouts that are not written.
        plain: the tensor's own name.
        floats: whether `read` gives `Floats`.
        stacks: whether matrices may have leading axes.
        factor: whether each "matrix" of a stack has a factor of its own, the "stack" has one, or "none" has any.
        input_factor: how the same factor for a layer's inputs is stored.
        config: makes the configuration of a `Model`.
        config_keys: where config.json holds it.
        metadata: what the tool expects in a file's metadata.
        container: the kind of file, of `ifjax.exchange.containers.CONTAINERS`.
        declares: whether a configuration says that a checkpoint has this layout. It raises ValueError for settings that
            contradict it.
        fits: whether parts of these specifications can be a tensor; by default, that codes and scales make blocks.
        doubt: why the names do not decide that a tensor has this layout.
    """

    name: str
    tool: str
    algorithm: str
    parts: tuple[Part, ...]
    fmt: str | Format | None = None
    _: dataclasses.KW_ONLY
    read: Callable[..., Blocks | Floats] | None = None
    write: Callable[[Blocks], tuple[Any, ...]] | None = None
    plain: str = "{}.weight"
    floats: bool = False
    stacks: bool = False
    factor: Literal["matrix", "stack", "none"] = "matrix"
    input_factor: InputFactor | None = None
    config: Callable[[Model], dict[str, Any]] | None = None
    config_keys: tuple[str, ...] = ("quantization_config",)
    metadata: tuple[tuple[str, str], ...] = (("format", "pt"),)
    container: str = "safetensors"
    declares: "Callable[[Layout, Mapping[str, Any]], Declared | None] | None" = None
    fits: "Callable[[Layout, tuple[Spec | None, ...]], bool] | None" = None
    doubt: str | None = None

    @property
    def record(self) -> Format:
        """The format that it is read as."""
        assert self.fmt is not None
        return get_format(self.fmt)

    def accepts(self, fmt: Format) -> bool:
        """Whether this layout's readers decode what `fmt` encodes: by what the record says, not by its name."""
        return self.write is not None and self.fmt is not None and decodes_as(fmt, self.record)

    def plain_name(self, layer: str) -> str:
        """Return the tensor's own name."""
        return Part(self.plain).of(layer)

    def layer_of(self, name: str) -> str | None:
        """Return the layer of a parameter of this name; ".kernel" and ".embedding" are other words for ".weight"."""
        layer, _, tail = name.rpartition(".")
        if tail in WEIGHTS:
            return layer if self.plain == "{}.weight" else None
        return Part(self.plain).layer_of(name)

    def type_of(self, part: Part, array: np.ndarray) -> str:
        """Return the file's name for the type of a part's array, which may have another one in memory."""
        own = Spec.of(array).dtype
        return own if own in part.dtypes or not part.dtypes else part.dtypes[0]

    def fits_specs(self, specs: tuple[Spec | None, ...]) -> bool:
        """Whether parts of these specifications can be a tensor of this layout."""
        return make_blocks(self, specs) if self.fits is None else self.fits(self, specs)


def decodes_as(fmt: Format, other: Format) -> bool:
    """Whether bytes of one format mean the same in another. How an encoder rounds does not matter."""

    def meaning(f: Format):
        scale = getattr(f.scale, "values", f.scale), f.scale.bits, f.scale.nbytes
        return elements_of(f), f.block, scale

    return meaning(fmt) == meaning(other)


def elements_of(fmt: Format) -> list[tuple[tuple[float, ...], float, float]]:
    """What codes mean: (values, step, offset) of each decoding. Grids' names and how they round do not matter."""
    return [(d.grid.values, d.step, d.offset) for d in fmt.decodings]


def make_blocks(layout: Layout, specs: tuple[Spec | None, ...]) -> bool:
    """Whether the first two parts, codes and scales, have as many bits as whole blocks take."""
    if layout.fmt is None or len(specs) < 2 or specs[1] is None:
        return True
    fmt, codes, scales = layout.record, specs[0], specs[1]
    assert codes is not None
    width = {"U32": 4, "I32": 4}.get(codes.dtype, 1)
    return np.prod(codes.shape) * width * 8 * fmt.scale.nbytes == np.prod(scales.shape) * fmt.block * fmt.bits


LAYOUTS: Registry[Layout] = Registry("layout", Layout, "ifjax.exchange.LAYOUTS")


def known_tools() -> tuple[str, ...]:
    """Return the names of all tools whose layouts are read or written here."""
    return tuple(dict.fromkeys(lay.tool for lay in LAYOUTS.values() if lay.read is not None or lay.write is not None))


def layouts_of(tool: str) -> tuple[Layout, ...]:
    """Return a tool's layouts.

    Raises:
        ValueError: an unknown tool.
    """
    found = tuple(lay for lay in LAYOUTS.values() if lay.tool == tool and (lay.read or lay.write))
    if not found:
        raise ValueError(f"tool must be one of {', '.join(map(repr, known_tools()))}, got {tool!r}")
    return found


def swapped_nibbles(packed: np.ndarray) -> np.ndarray:
    """Exchange the two codes of each byte."""
    return packed >> 4 | packed << 4


def group_sizes(groups: Iterable[Any]) -> set[Any]:
    """Return the group sizes that groups of a configuration state for weights."""
    return {(group.get("weights") or {}).get("group_size") for group in groups} - {None}
