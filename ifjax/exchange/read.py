"""Tensors and checkpoints in, from other tools' layouts."""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from ifjax.arrays import DTYPES, Blocking, QTensor
from ifjax.exchange.fouroversix import PART, fouroversix_format, from_fouroversix
from ifjax.exchange.layouts import (
    E4M3_TYPE,
    E8M0_TYPE,
    LAYOUTS,
    TOOLS,
    U8,
    Layout,
    Matrix,
    Nibbles,
    Source,
    join_name,
    split_name,
    swapped_nibbles,
)
from ifjax.exchange.write import check_scales, check_zero_blocks
from ifjax.files import safetensors
from ifjax.formats import E4M3, E8M0, Format, get_format


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
    found = from_fouroversix(arrays, **settings) if tool == "fouroversix" else _from_layouts(arrays, tool, **settings)
    return {
        name: _as_qtensor(value, axis, dtype, headroom) if isinstance(value, Matrix) else value
        for name, value in found.items()
    }


def _as_qtensor(matrix: Matrix, axis: int, dtype: np.dtype, headroom: float) -> QTensor:
    codes, scales = (jnp.asarray(np.moveaxis(a, -1, axis)) for a in (matrix.codes, matrix.scales))
    amax = None if matrix.amax is None else jnp.asarray(matrix.amax)
    return QTensor(codes, scales, amax, Blocking(matrix.fmt, axis, matrix.length, dtype, headroom))


def _from_layouts(arrays, tool, *, fmt, swap, headroom):
    """The matrices in a tool's layouts, as Matrix, and all other arrays."""
    layouts = [layout for layout in LAYOUTS if layout.tool == tool]
    packed, companions = layouts[0].packed, set(_names_of(layouts)[1:])
    modules = [
        split_name(name)[0] for name, array in arrays.items()
        if split_name(name)[1] == packed and (packed != "weight" or array.dtype == np.uint8)
    ]  # fmt: skip
    found, used = {}, set()
    for module in modules:
        names = {part: join_name(module, part) for part in _names_of(layouts)}
        parts = {part: arrays[name] for part, name in names.items() if name in arrays}
        try:
            found[join_name(module, "weight")] = _read_matrix(parts, layouts, fmt, swap, headroom)
        except ValueError as error:
            raise ValueError(f"{join_name(module, packed)}: {error}") from error
        used |= {join_name(module, part) for part in parts}
    for name in arrays.keys() - used:
        module, tail = split_name(name)
        # Zero points, orders of columns, scales of inputs that were folded in, scales of weights in other formats.
        beside = tail.startswith("weight_") and join_name(module, "weight") in found
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
    types: dict[Any, tuple] = {E4M3: (E4M3_TYPE,), E8M0: (U8, E8M0_TYPE)}  # of the format: of the file
    layout = next((lay for lay in layouts if scales.dtype in types[get_format(lay.fmt).scale]), None)
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
    check_scales(scales, record)
    check_zero_blocks(scales, packed, record)
    amax = None
    if layout.factor is not None:
        if layout.factor not in parts:
            raise ValueError(
                f"{layout.factor} is missing beside it: without the tensor's factor its values are unknown (1.0, if "
                "whatever wrote it has none)"
            )
        amax = _amax_of(parts[layout.factor], scales, layout, record.tensor_constant(headroom))
    return Matrix(swapped_nibbles(packed) if swap else packed, scales, amax, record, packed.shape[1] * 2)


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


def _tool_by_names(arrays: Mapping[str, np.ndarray], nibbles: Nibbles | None) -> Source:
    tails = {split_name(name)[1] for name in arrays}
    if any(match and match[2] == "values" for match in map(PART.fullmatch, tails)):
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
            return "fouroversix", fouroversix_format(config)
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
    _, files, _ = safetensors.resolve(path)
    arrays: dict[str, np.ndarray] = {}
    declared = None
    for file in files:
        contents = safetensors.read_contents(file)
        declared = declared or contents.metadata.get("quantization_config")
        for name, entry in contents.entries.items():
            dtype = safetensors.numpy_dtype(entry.dtype)
            if dtype is None:
                raise safetensors.FileError(f"{file}: {name} is of type {entry.dtype}, which numpy lacks")
            if name in arrays:
                raise safetensors.FileError(f"{file}: {name} is in another file as well")
            with safetensors.Reader(file, entry) as reader:
                arrays[name] = reader.bytes(0, entry.nbytes).view(dtype).reshape(entry.shape)
    if tool is None:
        tool = _declared_config(files[0].parent, declared)
    return import_tensors(arrays, tool, **settings)


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
            raise safetensors.FileError(f"{name} in {folder} is not JSON: {error}") from None
        if name == "config.json":
            config = config.get("quantization_config") if isinstance(config, dict) else None
        if isinstance(config, dict):
            return config
    return None
