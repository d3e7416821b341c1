"""4-bit weights as other tools store them: NVFP4 and MXFP4 out, and those and the fouroversix package's tensors in.

Codes and block scales travel as they are, bit for bit. What differs from tool to tool is a record (`Layout`): the names
of the arrays, how the scales are typed, and which way round the tensor's factor is stored. With K from
`Format.constants`, 2688 for NVFP4 and 1536 for Four Over Six, a value is

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
import errno
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.typing import ArrayLike, DTypeLike

from ifjax.arrays.qtensor import DTYPES, QTensor
from ifjax.exchange.swizzle import TILE, unswizzle_scales
from ifjax.files import safetensors as _files
from ifjax.formats import FORMATS, Format, get_format
from ifjax.formats.grids import E2M1
from ifjax.numerics.packing import pack, packed_length

Tool = Literal["compressed-tensors", "modelopt"]
Source = Literal["compressed-tensors", "modelopt", "fouroversix"]
Nibbles = Literal["low_first", "high_first"]

_E4M3, _E8M0, _U8 = np.dtype(ml_dtypes.float8_e4m3fn), np.dtype(ml_dtypes.float8_e8m0fnu), np.dtype(np.uint8)


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
        return _is_plain_e2m1(fmt) and (fmt.block, fmt.scale.dtype) == (mine.block, mine.scale.dtype)

    def names(self) -> tuple[str, ...]:
        """Of the arrays that make up a tensor."""
        return (self.packed, self.scales) if self.factor is None else (self.packed, self.scales, self.factor)


# Sources: compressed-tensors' NVFP4PackedCompressor and MXFP4PackedCompressor; ModelOpt's NVFP4QTensor, MXFP4QTensor
# and convert_hf_quant_config_format. Tested against these readers.
LAYOUTS = (
    Layout(
        "compressed-tensors", "nvfp4-pack-quantized", "nvfp4", "weight_packed", "weight_scale", _E4M3,
        "weight_global_scale", True, (1,), "input_global_scale", "tensor_group",
    ),
    Layout(
        "compressed-tensors", "mxfp4-pack-quantized", "mxfp4", "weight_packed", "weight_scale", _U8, strategy="group"
    ),
    Layout(
        "modelopt", "NVFP4", "nvfp4", "weight", "weight_scale", _E4M3, "weight_scale_2", False, (), "input_scale"
    ),
    Layout("modelopt", "MXFP4", "mxfp4", "weight", "weight_scale", _U8),
)  # fmt: skip
TOOLS = tuple(dict.fromkeys(layout.tool for layout in LAYOUTS))

# The last part of a name, for which the layout's own names are put.
_WEIGHTS = ("weight", "kernel", "embedding")


# --- out -------------------------------------------------------------------------------------------------------------


def export_tensor(q: QTensor, tool: Tool) -> dict[str, np.ndarray]:
    """The arrays of one matrix in a tool's layout, by their names below the layer's.

    `q` is [in, out] or [out, in] with its blocks along `in`; the arrays are [out, ...]. Codes and scale bytes are q's.
    The tool's own decoding agrees with `q.dequantize` to 2 units in the last place of float32, for one amax in two
    thousand to 3: it divides in another order.

    Raises:
        ValueError: no reader of the layout would decode it: IF formats (their scales' signs would flip those of the
            values), other elements or blocks; not a matrix; `in` is no multiple of the block; more than one amax; a
            block that holds NaN.

    Example:
        >>> import jax.numpy as jnp
        >>> import ifjax
        >>> from ifjax import exchange
        >>> q = ifjax.quantize(jnp.ones((64, 8)), "nvfp4", axis=0)  # a Flax kernel, [in, out]
        >>> for name, array in exchange.export_tensor(q, "compressed-tensors").items():
        ...     print(name, array.dtype, array.shape)
        weight_packed uint8 (8, 32)
        weight_scale float8_e4m3fn (8, 4)
        weight_global_scale float32 (1,)
    """
    if not isinstance(q, QTensor):
        raise TypeError(f"needs a QTensor, got {type(q).__name__}: make one with ifjax.quantize")
    layout = _layout_for(q.fmt, tool)
    if q.ndim != 2:
        raise ValueError(
            f"{tool} stores matrices, got shape {q.shape}: export stacked layers one by one (q[i]), and reshape other "
            "kernels before they are quantized"
        )
    if not q.size or q.shape[q.axis] % layout.block:
        raise ValueError(
            f"the blocked axis {q.axis} of {q.shape} must be a multiple of {layout.block}, because readers know no "
            "filled-up blocks: append zeros to the weight, and to the layer's inputs, before quantizing"
        )
    codes, scales = (np.moveaxis(np.asarray(a), q.axis, -1) for a in (q.codes, q.scale_bytes()))
    _check_scales(scales, q.fmt)
    _check_zero_blocks(scales, codes, q.fmt)
    arrays = {layout.packed: codes, layout.scales: scales.view(layout.scales_dtype)}
    if layout.factor is not None:
        arrays[layout.factor] = _factor(q, scales, layout)
    return {name: np.asarray(array, order="C") for name, array in arrays.items()}


def export_tensors(
    params: Mapping[str, QTensor | ArrayLike],
    tool: Tool,
    *,
    input_amax: Mapping[str, float] | None = None,
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """All arrays of a model in a tool's layout, and the `quantization_config` that its config.json needs.

    Args:
        params: by flat names joined with dots, as the reader's model calls them. QTensors, whose names end with
            .weight, .kernel or .embedding, are stored in the layout; other arrays go along unchanged. All QTensors are
            of one kind, NVFP4 (`fouroversix` is that) or MXFP4.
        tool: "compressed-tensors" (vLLM, transformers) or "modelopt" (TensorRT-LLM, vLLM, SGLang).
        input_amax: by a layer's name without .weight, the largest magnitude of its inputs, for readers that quantize
            them as well. For all QTensors or none: without it the configuration says that only weights are quantized.

    Servers multiply some layers as one (query, key and value; gate and up) and take one factor for them: quantize
    these with a common `amax=`.

    Raises:
        ValueError: as for `export_tensor`, with the name; a name that does not end as said, or that is there twice;
            several kinds; nothing is quantized; `input_amax` names other layers or is not positive.
        TypeError: params is nested.
    """
    arrays: dict[str, np.ndarray] = {}
    layouts: dict[str, Layout] = {}
    for name, value in params.items():
        new = {name: value}
        if isinstance(value, QTensor):
            module, tail = _split(name)
            if tail not in _WEIGHTS:
                raise ValueError(
                    f"{name!r} is a QTensor, so its name must end with .weight, .kernel or .embedding, which the "
                    "layout's names replace"
                )
            try:
                layouts[module] = _layout_for(value.fmt, tool)
                new = {_join(module, part): array for part, array in export_tensor(value, tool).items()}
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
        elif isinstance(value, Mapping):
            raise TypeError(
                f"{name!r} is a mapping: flatten the tree first, as by flax.traverse_util.flatten_dict(params, sep='.')"
            )
        if twice := new.keys() & arrays.keys():
            raise ValueError(f"{sorted(twice)} would be there twice: {name!r} and another array give that name")
        new = {name: np.asarray(array) for name, array in new.items()}
        if any(array.dtype == object for array in new.values()):
            raise TypeError(f"{name!r} is a {type(value).__name__}: needs arrays and QTensors")
        arrays |= new
    kinds = set(layouts.values())
    if len(kinds) != 1:
        found = sorted(layout.algorithm for layout in kinds) or "nothing"
        raise ValueError(f"a configuration describes one kind of quantization, found {found}: quantize to one of them")
    (layout,) = kinds
    if input_amax is not None:
        arrays |= _input_factors(input_amax, layouts, layout)
    # Readers look for quantized layers by class, so those that are not have to be named.
    plain = {_split(name)[0] for name, array in params.items() if not isinstance(array, QTensor)
             and _split(name)[1] in _WEIGHTS and np.ndim(array) == 2}  # fmt: skip
    return arrays, _config(layout, sorted(plain - layouts.keys()), input_amax is not None)


def _layout_for(fmt: Format, tool: str) -> Layout:
    """The tool's layout for this format, or an error that says why there is none."""
    if tool not in TOOLS:
        raise ValueError(f"tool must be one of {', '.join(map(repr, TOOLS))}, got {tool!r}")
    found = next((layout for layout in LAYOUTS if layout.tool == tool and layout.accepts(fmt)), None)
    if found is not None:
        return found
    if fmt.has_flag:
        reason = (
            "marks the blocks of its second decoding in the scale's sign, so an NVFP4 reader would flip the signs of "
            "these blocks' values"
        )
    elif not _is_plain_e2m1(fmt):
        reason = f"has elements {fmt.grid.name}, where {tool} reads E2M1"
    else:
        kinds = [f"{lay.block} with {get_format(lay.fmt).scale.name}" for lay in LAYOUTS if lay.tool == tool]
        reason = f"has blocks of {fmt.block} with {fmt.scale.name} scales, where {tool} reads {' or '.join(kinds)}"
    raise ValueError(f"{fmt.name} {reason}: quantize to fouroversix, nvfp4 or mxfp4 for it")


def _is_plain_e2m1(fmt: Format) -> bool:
    # How a grid rounds is the encoder's business.
    (grid, _), *second = fmt.decodings
    return not second and (grid.magnitudes, grid.sign) == (E2M1.magnitudes, E2M1.sign)


def _check_scales(scales: np.ndarray, fmt: Format) -> None:
    """That the bytes are scales of this format, of finite blocks."""
    if fmt.scale.dtype == _E4M3:
        signs = int((scales >= 0x80).sum())
        if signs and not fmt.has_flag:
            raise ValueError(
                f"{signs} of {scales.size} block scales have their sign set, which {fmt.name}'s never have: in IF4 and "
                "MixFP4 it marks blocks of integers, which decode in two different ways, and elsewhere it negates. "
                "It cannot be decided which is meant, and as NVFP4 these blocks would change their signs"
            )
        nan = scales & 0x7F == fmt.scale.nan
    else:
        nan = scales == fmt.scale.nan
    if nan.any():
        raise ValueError(f"{int(nan.sum())} of {scales.size} block scales are NaN: the weight was not finite")


def _check_zero_blocks(scales: np.ndarray, codes: np.ndarray, fmt: Format) -> None:
    """That blocks with scale byte 0, on which tools disagree, hold zeros; codes are packed, [..., m * block / 2]."""
    if fmt.scale.dtype == _E8M0 and ((codes.reshape(*scales.shape, -1) & 0x77).any(-1) & (scales == 0)).any():
        raise ValueError(
            "a block with scale byte 0 has codes that are not zero: that byte is 2^-127 for some readers and 0 for "
            "others, ifjax among them. Scale the weight up"
        )


def _factor(q: QTensor, scales: np.ndarray, layout: Layout) -> np.ndarray:
    _, largest = q.fmt.constants(q.headroom)
    # Without an amax a value is code * scale.
    amax = np.asarray(largest if q.amax is None else q.amax, np.float32)
    if amax.size != 1:
        raise ValueError(
            f"the layout has one factor for a tensor, and this one has amax of shape {amax.shape}: quantize without "
            "amax_axes"
        )
    amax = amax.reshape(())[()]
    if amax == 0 and not scales.any():
        amax = largest  # any factor does for zeros, but 0 and its reciprocal are none
    factor = _divided(largest, amax) if layout.reciprocal else _divided(amax, largest)
    if not np.finfo(np.float32).tiny <= factor < np.inf:
        raise ValueError(
            f"amax {amax} makes {layout.factor} {factor}, which is no normal float32 number > 0: scale the weight"
        )
    return np.full(layout.factor_shape, factor, np.float32)


def _divided(a, b) -> np.float32:
    with np.errstate(all="ignore"):  # what comes of it is checked
        return np.float32(a) / np.float32(b)


def _input_factors(input_amax, layouts, layout):
    if layout.input_factor is None:
        raise ValueError(f"{layout.algorithm} scales its inputs by blocks alone: leave input_amax out")
    if input_amax.keys() != layouts.keys():
        odd = sorted(input_amax.keys() ^ layouts.keys())
        raise ValueError(f"input_amax must name the quantized layers, all of them and no other: {odd[:5]}")
    # The reader quantizes inputs to plain NVFP4, whatever the weights' own constants.
    _, largest = get_format("nvfp4").constants()
    arrays = {}
    for module, amax in input_amax.items():
        amax = np.float32(amax)
        factor = _divided(largest, amax) if layout.reciprocal else _divided(amax, largest)
        if not np.finfo(np.float32).tiny <= factor < np.inf:
            raise ValueError(f"input_amax of {module} must be finite and > 0, got {amax}")
        arrays[_join(module, layout.input_factor)] = np.full(layout.factor_shape, factor, np.float32)
    return arrays


def _config(layout: Layout, ignore: list[str], with_inputs: bool) -> dict[str, Any]:
    """The `quantization_config` of a config.json."""
    numbers = {"num_bits": 4, "type": "float", "group_size": layout.block}
    if layout.tool == "modelopt":
        weights, inputs = numbers | {"dynamic": False}, numbers | {"dynamic": False}
        # Its name for NVFP4 without quantized inputs. MXFP4 says nothing of them.
        algorithm = "W4A16_NVFP4" if layout.input_factor and not with_inputs else layout.algorithm
        shared = {"quant_algo": algorithm}
    else:
        numbers |= {"symmetric": True, "strategy": layout.strategy, "scale_dtype": f"torch.{layout.scales_dtype}"}
        weights, inputs = numbers | {"dynamic": False}, numbers | {"dynamic": "local"}
        shared = {"format": layout.algorithm, "quantization_status": "compressed"}
    group = {"targets": ["Linear"], "weights": weights}
    if with_inputs:
        group["input_activations"] = inputs
    return {"quant_method": layout.tool, **shared, "config_groups": {"group_0": group}, "ignore": ignore}


# --- in --------------------------------------------------------------------------------------------------------------


def import_tensors(
    tensors: Mapping[str, ArrayLike],
    tool: Source | Mapping[str, Any] | None = None,
    *,
    fmt: str | Format | None = None,
    nibbles: Nibbles | None = None,
    axis: Literal[-1, -2] = -1,
    dtype: DTypeLike = "float32",
    headroom: float = 1.0,
) -> dict[str, QTensor | np.ndarray]:
    """QTensors, under NAME.weight, of all quantized matrices among `tensors`; the other arrays as they are.

    Codes and scale bytes come through bit for bit, and so does the fouroversix package's amax. The amax of other tools'
    tensors is the float32 whose factor is the stored one: exporting what was imported gives the stored bytes again.
    For one factor in ten there is no such number; then it is the nearest.

    Args:
        tensors: numpy or jax arrays by name, scales as ml_dtypes' float8 types or, for MX, as uint8.
        tool: "compressed-tensors", "modelopt" or "fouroversix", or the model's `quantization_config`. None: by the
            names, if they decide it.
        fmt: the format to read them as: nvfp4 and mxfp4 unless stated. The fouroversix package's tensors do not say
            theirs, so without its configuration it is needed: "fouroversix" for nvfp4 with an adaptive rule (its
            default), "nvfp4" for static_6, "nvfp4_static4", "if4", and so on.
        nibbles: where the earlier code of a byte lies, if not as the tool declares it ("low_first", for all three).
        axis: -1 for [out, in] as stored; -2 for the transposed matrix [in, out] with blocks along -2, a Flax kernel.
        dtype: what the QTensors stand for.
        headroom: 16/17 for tensors that the fouroversix package rounded "stochastic_unbiased".

    Raises:
        ValueError: the layout is unknown, or cannot be decided by what is there; shapes, types or padding contradict
            it; scales with signs in a format without; arrays that belong to a weight and that nothing reads.

    Example:
        >>> import jax.numpy as jnp
        >>> import ifjax
        >>> from ifjax import exchange
        >>> q = ifjax.quantize(jnp.ones((8, 64)), "fouroversix")
        >>> arrays, config = exchange.export_tensors({"up.weight": q}, "modelopt")
        >>> exchange.import_tensors(arrays, config, axis=-2)
        {'up.weight': QTensor(nvfp4, 64x8 float32, axis=-2, 4.562 bits a value)}
    """
    arrays = {name: np.asarray(array) for name, array in tensors.items()}
    if isinstance(tool, Mapping):
        tool, declared = _declared(tool)
        fmt = declared if fmt is None else fmt
    if tool is None:
        tool = _tool_by_names(arrays, nibbles)
    if tool not in (*TOOLS, "fouroversix"):
        raise ValueError(f"tool must be one of {', '.join(map(repr, (*TOOLS, 'fouroversix')))}, got {tool!r}")
    if nibbles not in (None, "low_first", "high_first"):
        raise ValueError(f"nibbles must be 'low_first', 'high_first' or None, got {nibbles!r}")
    if axis not in (-1, -2):
        raise ValueError(f"axis must be -1 ([out, in], as stored) or -2 (the transposed matrix), got {axis}")
    dtype = np.dtype(dtype)
    if dtype.name not in DTYPES:
        raise TypeError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype}")
    settings = {"fmt": fmt, "swap": nibbles == "high_first", "headroom": headroom}
    found = _from_fouroversix(arrays, **settings) if tool == "fouroversix" else _from_layouts(arrays, tool, **settings)
    return {
        name: _as_qtensor(value, axis, dtype, headroom) if isinstance(value, _Matrix) else value
        for name, value in found.items()
    }


@dataclasses.dataclass(frozen=True)
class _Matrix:
    """What was read: packed codes [out, ...], scale bytes [out, m], amax, for a matrix [out, length]."""

    codes: np.ndarray
    scales: np.ndarray
    amax: np.ndarray | np.float32 | None
    fmt: Format
    length: int


def _as_qtensor(matrix: _Matrix, axis: int, dtype: np.dtype, headroom: float) -> QTensor:
    codes, scales = (np.moveaxis(a, -1, axis) for a in (matrix.codes, matrix.scales))
    return QTensor(
        codes=jnp.asarray(codes),
        scales=jnp.asarray(np.ascontiguousarray(scales).view(matrix.fmt.scale.dtype)),
        amax=None if matrix.amax is None else jnp.asarray(matrix.amax),
        fmt=matrix.fmt,
        headroom=headroom,
        axis=axis,
        length=matrix.length,
        dtype=dtype,
        block_2d=False,
    )


def _from_layouts(arrays, tool, *, fmt, swap, headroom):
    """The matrices in a tool's layouts, as _Matrix, and all other arrays."""
    layouts = [layout for layout in LAYOUTS if layout.tool == tool]
    packed, companions = layouts[0].packed, set(_names_of(layouts)[1:])
    modules = [
        _split(name)[0] for name, array in arrays.items()
        if _split(name)[1] == packed and (packed != "weight" or array.dtype == np.uint8)
    ]  # fmt: skip
    found, used = {}, set()
    for module in modules:
        parts = {part: arrays[_join(module, part)] for part in _names_of(layouts) if _join(module, part) in arrays}
        try:
            found[_join(module, "weight")] = _read_matrix(parts, layouts, fmt, swap, headroom)
        except ValueError as error:
            raise ValueError(f"{_join(module, packed)}: {error}") from error
        used |= {_join(module, part) for part in parts}
    for name in arrays.keys() - used:
        module, tail = _split(name)
        # Zero points, orders of columns, scales of inputs that were folded in, scales of weights in other formats.
        beside = tail.startswith("weight_") and _join(module, "weight") in found
        if beside or tail in companions or tail == "pre_quant_scale":
            raise ValueError(
                f"{name} changes what its layer's weight means, and is not known beside {packed}: {tool} has stored "
                "another format than NVFP4 or MXFP4 there"
            )
    rest = {name: array for name, array in arrays.items() if name not in used}
    if twice := rest.keys() & found.keys():
        raise ValueError(f"{sorted(twice)} are there both packed and unpacked")
    return found | rest


def _names_of(layouts: Iterable[Layout]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for layout in layouts for name in layout.names()))


def _read_matrix(parts, layouts, fmt, swap, headroom):
    packed = parts[layouts[0].packed]
    scales = parts.get(layouts[0].scales)
    if scales is None:
        raise ValueError(f"{layouts[0].scales} is missing beside it")
    if packed.dtype != np.uint8 or packed.ndim != 2 or scales.ndim != 2 or not packed.size:
        raise ValueError(
            f"needs uint8 [out, in / 2] and scales [out, in / block], got {packed.dtype} {packed.shape} and "
            f"{scales.dtype} {scales.shape}: swizzled scales and stacks of matrices have to be taken apart first"
        )
    types = {_E4M3: (_E4M3,), _E8M0: (_U8, _E8M0)}  # of the format: of the file
    layout = next((lay for lay in layouts if scales.dtype in types[get_format(lay.fmt).scale.dtype]), None)
    if layout is None:
        raise ValueError(f"its scales are {scales.dtype}, where NVFP4 has float8_e4m3fn and MXFP4 uint8")
    if packed.shape[0] != scales.shape[0] or packed.shape[1] * 2 != scales.shape[1] * layout.block:
        raise ValueError(
            f"{packed.shape[0]} x {packed.shape[1]} bytes and {scales.shape[0]} x {scales.shape[1]} {scales.dtype} "
            f"scales do not make blocks of {layout.block}, as in {layout.algorithm}"
        )
    record = get_format(layout.fmt if fmt is None else fmt)
    if not layout.accepts(record):
        raise ValueError(f"it is {layout.algorithm}, which cannot be read as {record.name}: leave out fmt")
    scales = scales.view(np.uint8)
    _check_scales(scales, record)
    _check_zero_blocks(scales, packed, record)
    amax = None
    if layout.factor is not None:
        if layout.factor not in parts:
            raise ValueError(
                f"{layout.factor} is missing beside it: without the tensor's factor its values are unknown (1.0, if "
                "whatever wrote it has none)"
            )
        amax = _amax_of(parts[layout.factor], scales, layout, record.constants(headroom)[1])
    return _Matrix(_swapped(packed) if swap else packed, scales, amax, record, packed.shape[1] * 2)


def _swapped(packed: np.ndarray) -> np.ndarray:
    return packed >> 4 | packed << 4


def _amax_of(stored: np.ndarray, scales: np.ndarray, layout: Layout, largest: np.float32) -> np.float32:
    """The amax of which `_factor` makes what is stored, or the nearest."""
    factor = np.asarray(stored)
    if factor.size != 1 or not jnp.issubdtype(factor.dtype, jnp.floating):
        raise ValueError(f"{layout.factor} must be one float, got {factor.dtype} {factor.shape}")
    with np.errstate(over="ignore"):
        factor = factor.reshape(()).astype(np.float32)[()]
    if not 0 < factor < np.inf:
        if not scales.any():
            return np.float32(0)  # zeros, whatever they are multiplied by
        raise ValueError(f"{layout.factor} must be finite and > 0, got {factor}")
    # Going back and forth once more changes nothing: of all amax with this factor, if there are any, this is one
    # (checked for each mantissa and the K of each named format).
    with np.errstate(all="ignore"):
        amax = np.float32(largest / factor if layout.reciprocal else factor * largest)
    if not np.finfo(np.float32).tiny <= amax < np.inf:
        raise ValueError(f"{layout.factor} {factor} makes amax {amax}, which is no normal float32 number")
    return amax


_PARTS = ("values", "scale_factors", "amax", "metadata")
_PART = re.compile(rf"quantized_(.+)_({'|'.join(_PARTS)})")


def _from_fouroversix(arrays, *, fmt, swap, headroom):
    """The matrices that the fouroversix package stores in a layer's buffers, as _Matrix, and all other arrays."""
    if fmt is None:
        raise ValueError(
            "the fouroversix package's tensors do not say their format: state fmt=, 'fouroversix' for nvfp4 with an "
            "adaptive scale rule (the package's default), 'nvfp4' for static_6, or 'if4' and so on"
        )
    fmt = get_format(fmt)
    groups: dict[str, dict[str, np.ndarray]] = {}
    rest = {}
    for name, array in arrays.items():
        module, tail = _split(name)
        match = _PART.fullmatch(tail)
        if match:
            groups.setdefault(_join(module, match[1]), {})[match[2]] = array
        else:
            rest[name] = array
    found = {}
    for name, parts in groups.items():
        try:
            if missing := [part for part in _PARTS if part not in parts]:
                raise ValueError(f"of its buffers {', '.join(missing)} are missing")
            found[name] = _read_fouroversix(parts, fmt, swap)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    if twice := rest.keys() & found.keys():
        raise ValueError(f"{sorted(twice)} are there both packed and unpacked")
    return found | rest


def _read_fouroversix(parts: dict[str, np.ndarray], fmt: Format, swap: bool) -> _Matrix:
    values, scale_factors, amax, metadata = (parts[part] for part in _PARTS)
    numbers = metadata.reshape(-1).tolist()
    if metadata.dtype.kind not in "iu" or len(numbers) != 6:
        raise ValueError(
            "metadata must be six integers (rows, columns, padded rows, padded columns, 1, whether scales are "
            f"swizzled), got {metadata.dtype} {metadata.shape}"
        )
    rows, columns, tall, wide, _, swizzled = numbers
    tile = TILE[0], TILE[1] * fmt.block
    if swizzled not in (0, 1) or not (0 < rows <= tall and 0 < columns <= wide) or tall % tile[0] or wide % tile[1]:
        raise ValueError(
            f"metadata {numbers} does not describe a matrix padded to multiples of {tile[0]} x {tile[1]}, as "
            f"{fmt.name} is"
        )
    per_byte = 2 if fmt.bits == 4 else 1  # its other widths take a byte each
    for name, array, size in (
        ("values", values, tall * wide // per_byte),
        ("scale_factors", scale_factors, tall * wide // fmt.block),
    ):
        if array.itemsize != 1 or array.size != size:
            raise ValueError(f"{name} of {tall} x {wide} {fmt.name} are {size} bytes, got {array.dtype} {array.shape}")
    if values.dtype != np.uint8 or scale_factors.dtype not in (_U8, fmt.scale.dtype):
        raise ValueError(
            f"{fmt.name} has uint8 values and {fmt.scale.dtype} scales, got {values.dtype} and {scale_factors.dtype}"
        )
    scales = scale_factors.view(np.uint8)
    if swizzled:
        scales = np.asarray(_unswizzle(scales.reshape(-1), tall, wide // fmt.block))
    scales = scales.reshape(tall, wide // fmt.block)
    packed = values.reshape(tall, wide // per_byte)
    packed = _swapped(packed) if swap and per_byte == 2 else packed
    codes = np.stack([packed & 15, packed >> 4], -1).reshape(tall, wide) if per_byte == 2 else packed
    blocks = -(-columns // fmt.block)
    padding = codes[rows:], codes[:, columns:], scales[rows:], scales[:, blocks:]
    if any(np.isin(array, (0, 2 ** (fmt.bits - 1)), invert=True).any() for array in padding[:2]) or any(
        array.any() for array in padding[2:]
    ):
        raise ValueError(
            f"what was padded to {tall} x {wide} from {rows} x {columns} is not zero: the order of nibbles, the "
            "swizzle or the format is another than stated"
        )
    scales = np.ascontiguousarray(scales[:rows, :blocks])
    if per_byte == 2:
        packed = np.ascontiguousarray(packed[:rows, : packed_length(blocks * fmt.block, fmt.bits)])
    else:
        packed = np.asarray(_pack(codes[:rows, : blocks * fmt.block], fmt.bits))
    _check_scales(scales, fmt)
    if fmt.has_flag and (scales == 0x80).any():
        raise ValueError(f"a zero scale is marked as integers, which {fmt.name} never has: the format is another")
    if fmt.scale.largest is None:
        return _Matrix(packed, scales, None, fmt, columns)
    amax = np.asarray(amax)
    if amax.size != 1 or amax.dtype != np.float32 or not 0 <= amax.reshape(()) < np.inf:
        raise ValueError(f"amax must be one finite float32 >= 0, got {amax.dtype} {amax!r}")
    return _Matrix(packed, scales, amax.reshape(()), fmt, columns)


# One program for each shape, not one for each operation.
_unswizzle = jax.jit(unswizzle_scales, static_argnums=(1, 2))
_pack = jax.jit(pack, static_argnums=1)


# --- which tool ------------------------------------------------------------------------------------------------------


def _tool_by_names(arrays: Mapping[str, np.ndarray], nibbles: Nibbles | None) -> Source:
    tails = {_split(name)[1] for name in arrays}
    if any(match and match[2] == "values" for match in map(_PART.fullmatch, tails)):
        return "fouroversix"
    if "weight_packed" in tails:
        return "compressed-tensors"
    if "weight_scale_2" in tails:
        if nibbles is None:
            raise ValueError(
                "weight and weight_scale_2 are ModelOpt's names, but files with them exist in both orders of nibbles, "
                "and nothing in the bytes tells which: state tool='modelopt' (the earlier code is in the low nibble), "
                "or nibbles='low_first' or 'high_first'"
            )
        return "modelopt"
    raise ValueError(
        "the names are of no layout that is known here, so what the bytes mean cannot be decided: state tool=, one of "
        f"{', '.join(map(repr, (*TOOLS, 'fouroversix')))}"
    )


def _declared(config: Mapping[str, Any]) -> tuple[Source, str | None]:
    """The tool whose `quantization_config` this is (for ModelOpt also hf_quant_config.json), and the format if it says.

    Raises:
        ValueError: it declares something else than a known layout.
    """
    try:
        inner = config.get("quantization", config)
        method = str(config.get("quant_method", "modelopt" if "quant_algo" in inner else None))
        if method == "fouroversix":
            return "fouroversix", _fouroversix_format(config)
        # Servers call it modelopt_fp4.
        tool = "modelopt" if method.startswith("modelopt") else method
        known = {layout.algorithm: layout.block for layout in LAYOUTS if layout.tool == tool}
        algorithm = str(inner.get("quant_algo" if tool == "modelopt" else "format"))
        if tool == "modelopt":
            known["W4A16_NVFP4"] = known["NVFP4"]
            algorithm = algorithm.upper()
        groups = (config.get("config_groups") or {}).values()
        sizes = {(group.get("weights") or {}).get("group_size") for group in groups} | {inner.get("group_size")}
        rotated = bool((config.get("transform_config") or {}).get("config_groups"))
    except (AttributeError, TypeError) as error:
        raise ValueError(f"not a quantization_config, nor an hf_quant_config.json: {config!r:.200}") from error
    if algorithm not in known:
        raise ValueError(
            f"quantization by {method!r} in {algorithm!r} is not known here, only "
            f"{', '.join(f'{lay.tool} {lay.algorithm}' for lay in LAYOUTS)}: others give the same names and bytes "
            "another meaning"
        )
    if sizes - {None, known[algorithm]}:
        raise ValueError(f"{algorithm} has blocks of {known[algorithm]}, and the configuration says {sizes - {None}}")
    if rotated:
        raise ValueError("its weights are stored rotated (transform_config), which is not undone here")
    return ("modelopt" if tool == "modelopt" else "compressed-tensors"), None


# The fouroversix package's scale rules, for what its weights' type is: adaptive ones unless listed.
_FOUROVERSIX_RULES = {
    ("nvfp4", "static_6"): "nvfp4",
    ("nvfp4", "static_4"): "nvfp4_static4",
    ("mxfp4", "static_4"): "mxfp4_static4",
    ("nvfp4_bs8", "static_6"): "nvfp4_bs8",
}
_FOUROVERSIX_TYPES = {"nvfp4": "fouroversix", "nvfp4_bs8": "fouroversix_bs8"}


def _fouroversix_format(config: Mapping[str, Any]) -> str | None:
    """Of the weights, where the configuration has one for all of them."""
    dtype = config.get("weight_dtype") or config.get("dtype") or "nvfp4"
    rule = config.get("weight_scale_rule") or config.get("scale_rule") or "mse"
    rounding = config.get("weight_round_style") or config.get("round_style") or "nearest"
    if config.get("module_config_overrides") or rounding == "stochastic_unbiased":
        return None
    name = _FOUROVERSIX_RULES.get((dtype, rule), _FOUROVERSIX_TYPES.get(dtype, dtype))
    return None if name not in FORMATS or (rule == "static_4" and "static4" not in name) else name


# --- files -----------------------------------------------------------------------------------------------------------


def save(
    params: Mapping[str, QTensor | ArrayLike],
    path: str | os.PathLike,
    tool: Tool,
    *,
    config: Mapping[str, Any] | None = None,
    input_amax: Mapping[str, float] | None = None,
) -> None:
    """A checkpoint that a tool reads, of what `export_tensors` makes of `params`. It appears whole or not at all.

    Args:
        params: as for `export_tensors`.
        path: a file, if it ends with .safetensors: `quantization_config` is in its metadata, as JSON. Else a folder,
            new or empty, for model.safetensors and config.json.
        tool: "compressed-tensors" or "modelopt".
        config: what config.json holds besides: the model's own one, as readers need it.
        input_amax: as for `export_tensors`.

    Raises:
        ValueError: as `export_tensors`; the file cannot hold an array's dtype.
        FileExistsError: the folder holds something.
        OSError: it cannot be written.

    Example:
        >>> import tempfile
        >>> import jax.numpy as jnp
        >>> import ifjax
        >>> from ifjax import exchange
        >>> params = {"up.kernel": ifjax.quantize(jnp.ones((64, 8)), "nvfp4", axis=0), "up.bias": jnp.zeros(8)}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     exchange.save(params, f"{folder}/model", "modelopt")
        ...     sorted(exchange.load(f"{folder}/model", axis=-2).items())
        [('up.bias', array([0., 0., 0., 0., 0., 0., 0., 0.], dtype=float32)),
         ('up.weight', QTensor(nvfp4, 64x8 float32, axis=-2, 4.562 bits a value))]
    """
    arrays, quantization = export_tensors(params, tool, input_amax=input_amax)
    path = Path(path)
    # transformers wants to know the framework; it knows four, and the layouts are those of PyTorch's Linear.
    metadata = {"format": "pt"}
    if path.suffix == ".safetensors":
        if config is not None:
            raise ValueError(f"{path} is a file, and config is for a folder's config.json: name a folder")
        old = _files.replaced_by_file(path)
        _write(path, arrays, metadata | {"quantization_config": json.dumps(quantization)})
        _files.remove(old)
        return
    if path.is_dir() and any(path.iterdir()):
        raise FileExistsError(errno.EEXIST, "holds something already: name a new folder", str(path))
    text = json.dumps({**(config or {}), "quantization_config": quantization}, indent=2)
    path = Path(os.path.realpath(path))
    temporary = path.with_name(f".{path.name[:80]}.{secrets.token_hex(4)}.tmp")
    temporary.mkdir()
    try:
        _write(temporary / "model.safetensors", arrays, metadata)
        _files.write_text(temporary / "config.json", text + "\n")
        os.replace(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    _files.sync_folder(path.parent)


def load(
    path: str | os.PathLike,
    tool: Source | Mapping[str, Any] | None = None,
    **settings: Any,
) -> dict[str, QTensor | np.ndarray]:
    """What `import_tensors` makes of a file, an index of several, or a folder; all of it in memory.

    Args:
        path: a safetensors file, its index, or a folder with one checkpoint. Pickles are not read.
        tool: as for `import_tensors`. None: what the file's metadata or the folder's config.json or
            hf_quant_config.json declare; else by the names, if they decide it.
        **settings: of `import_tensors`: fmt, nibbles, axis, dtype, headroom.

    Raises:
        ValueError: as `import_tensors`. A `FileError`: a broken file, or a type that numpy lacks.
        OSError: it cannot be read.
    """
    _, files, _ = _files.resolve(path)
    arrays: dict[str, np.ndarray] = {}
    declared = None
    for file in files:
        contents = _files.read_contents(file)
        declared = declared or contents.metadata.get("quantization_config")
        for name, entry in contents.entries.items():
            dtype = _files.numpy_dtype(entry.dtype)
            if dtype is None:
                raise _files.FileError(f"{file}: {name} is of type {entry.dtype}, which numpy lacks")
            if name in arrays:
                raise _files.FileError(f"{file}: {name} is in another file as well")
            with _files.Reader(file, entry) as reader:
                arrays[name] = reader.bytes(0, entry.nbytes).view(dtype).reshape(entry.shape)
    if tool is None:
        tool = _declared_config(files[0].parent, declared)
    return import_tensors(arrays, tool, **settings)


def _write(path: Path, arrays: Mapping[str, np.ndarray], metadata: dict[str, str]) -> None:
    slots = []
    for name, array in arrays.items():
        if array.dtype.name not in _files.CODES:
            raise ValueError(f"{name} is {array.dtype}, which a safetensors file cannot hold")
        slots.append(_files.Slot(name, _files.CODES[array.dtype.name], array.shape))
    with _files.safetensors_writer(path, slots, lambda sums: metadata) as write:
        for name, array in arrays.items():
            write(name, array)


def _declared_config(folder: Path, in_metadata: str | None) -> Mapping[str, Any] | None:
    """The quantization's configuration as a checkpoint declares it: in the file, or beside it."""
    texts = {"its metadata": in_metadata}
    for name in ("config.json", "hf_quant_config.json"):
        if (folder / name).is_file():
            texts[name] = (folder / name).read_text(encoding="utf-8")
    for name, text in texts.items():
        if text is None:
            continue
        try:
            config = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise _files.FileError(f"{name} in {folder} is not JSON: {error}") from None
        if name == "config.json":
            config = config.get("quantization_config") if isinstance(config, dict) else None
        if isinstance(config, dict):
            return config
    return None


# --- arrays of ml_dtypes ---------------------------------------------------------------------------------------------


def from_ml_dtypes(
    elements: ArrayLike,
    scales: ArrayLike,
    factor: ArrayLike | None = None,
    *,
    fmt: str | Format | None = None,
    axis: int = -1,
    length: int | None = None,
    dtype: DTypeLike = "float32",
    headroom: float = 1.0,
) -> QTensor:
    """The QTensor of the arrays that `jax.nn.scaled_matmul` takes: the inverse of `ifjax.to_ml_dtypes`.

    Works inside jit, where signs of scales cannot be checked.

    Args:
        elements: float4_e2m1fn [..., m * block, ...].
        scales: float8_e4m3fn or float8_e8m0fnu [..., m, ...].
        factor: what all is multiplied by, float32 of shape () or of leading axes; None for MX, and for 1.
        fmt: the format's record or name: nvfp4 or mxfp4 unless stated.
        axis: of the blocks.
        length: how many of the elements along it count; all, unless stated.
        dtype: what the QTensor stands for.
        headroom: of the QTensor; 16/17 for what was rounded without bias.

    Raises:
        TypeError: other dtypes.
        ValueError: shapes that do not make the format's blocks; scales with signs.

    Example:
        >>> import jax.numpy as jnp
        >>> import ifjax
        >>> from ifjax.exchange import from_ml_dtypes
        >>> q = ifjax.quantize(jnp.arange(32.0), "fouroversix")
        >>> again = from_ml_dtypes(*ifjax.to_ml_dtypes(q), fmt="fouroversix")
        >>> bool((again.codes == q.codes).all()), bool(again.amax == q.amax)
        (True, True)
    """
    elements, scales = jnp.asarray(elements), jnp.asarray(scales)
    if elements.dtype != jnp.float4_e2m1fn or scales.dtype not in (_E4M3, _E8M0):
        raise TypeError(
            "needs float4_e2m1fn elements and float8_e4m3fn or float8_e8m0fnu scales, got "
            f"{elements.dtype} and {scales.dtype}"
        )
    fmt = get_format(fmt if fmt is not None else "nvfp4" if scales.dtype == _E4M3 else "mxfp4")
    if not _is_plain_e2m1(fmt) or fmt.scale.dtype != scales.dtype:
        raise ValueError(f"{fmt.name} is not made of float4_e2m1fn and {scales.dtype}: name a format that is, or none")
    if not -elements.ndim <= axis < elements.ndim:
        raise ValueError(f"axis {axis} is out of range for shape {elements.shape}")
    axis = axis % elements.ndim - elements.ndim
    stored = elements.shape[axis]
    expected = list(elements.shape)
    expected[axis] = stored // fmt.block
    if stored % 2 or stored % fmt.block or scales.shape != tuple(expected):
        raise ValueError(
            f"{elements.shape} elements in blocks of {fmt.block} along {axis} need scales {tuple(expected)}, got "
            f"{scales.shape}: fmt=dataclasses.replace(ifjax.FORMATS[{fmt.name!r}], block=...) names another block"
        )
    length = stored if length is None else length
    if not stored - fmt.block < length <= stored:
        raise ValueError(f"length must end in the last of the blocks of {fmt.block}, got {length} of {stored}")
    byte = lax.bitcast_convert_type(scales, jnp.uint8)
    if fmt.scale.dtype == _E4M3 and not isinstance(byte, Tracer) and bool((byte >= 0x80).any()):
        raise ValueError(f"scales with signs, which {fmt.name} does not have: IF4 marks integers so, others negate")
    _, largest = fmt.constants(headroom)
    if fmt.scale.largest is None:
        if factor is not None:
            raise ValueError(f"{fmt.name} has no tensor scale: leave factor out")
        amax = None
    else:
        amax = jnp.asarray(1.0 if factor is None else factor, jnp.float32) * largest
    return QTensor(_packed(elements, axis), scales, amax, fmt, headroom, axis, length, np.dtype(dtype), False)


@jax.jit(static_argnums=1)
def _packed(elements, axis):
    pairs = jnp.moveaxis(elements, axis, -1)
    pairs = pairs.reshape(*pairs.shape[:-1], pairs.shape[-1] // 2, 2)
    return jnp.moveaxis(lax.bitcast_convert_type(pairs, jnp.uint8), -1, axis)


# --- names -----------------------------------------------------------------------------------------------------------


def _split(name: str) -> tuple[str, str]:
    """(layer, last part)"""
    module, _, tail = name.rpartition(".")
    return module, tail


def _join(module: str, tail: str) -> str:
    return f"{module}.{tail}" if module else tail
