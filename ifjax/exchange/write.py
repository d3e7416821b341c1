"""Tensors and checkpoints out, in other tools' layouts."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jax.typing import ArrayLike

from ifjax.arrays import QTensor
from ifjax.arrays.ml_dtypes import is_plain_e2m1
from ifjax.arrays.qtensor import check_arrays
from ifjax.atomic import new_folder, write_text
from ifjax.exchange.layouts import (
    E4M3_TYPE,
    E8M0_TYPE,
    LAYOUTS,
    TOOLS,
    WEIGHTS,
    Layout,
    Tool,
    join_name,
    split_name,
)
from ifjax.files import safetensors
from ifjax.formats import Format, get_format


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
    check_arrays(q)
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
    codes, scales = (np.moveaxis(np.asarray(a), q.axis, -1) for a in (q.codes, q.scales))
    check_scales(scales, q.fmt)
    check_zero_blocks(scales, codes, q.fmt)
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
        TypeError: params is nested; something has changed the types of a QTensor's arrays.
    """
    arrays: dict[str, np.ndarray] = {}
    layouts: dict[str, Layout] = {}
    for name, value in params.items():
        new = {name: value}
        if isinstance(value, QTensor):
            module, tail = split_name(name)
            if tail not in WEIGHTS:
                raise ValueError(
                    f"{name!r} is a QTensor, so its name must end with .weight, .kernel or .embedding, which the "
                    "layout's names replace"
                )
            try:
                layouts[module] = _layout_for(value.fmt, tool)
                new = {join_name(module, part): array for part, array in export_tensor(value, tool).items()}
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
    plain = {split_name(name)[0] for name, array in params.items() if not isinstance(array, QTensor)
             and split_name(name)[1] in WEIGHTS and np.ndim(array) == 2}  # fmt: skip
    return arrays, _config(layout, sorted(plain - layouts.keys()), input_amax is not None)


def _layout_for(fmt: Format, tool: str) -> Layout:
    """The tool's layout for this format, or an error that says why there is none."""
    if tool not in TOOLS:
        raise ValueError(f"tool must be one of {', '.join(map(repr, TOOLS))}, got {tool!r}")
    found = next((layout for layout in LAYOUTS if layout.tool == tool and layout.accepts(fmt)), None)
    if found is not None:
        return found
    if fmt.has_selector:
        reason = (
            "marks the blocks of its second decoding in the scale's sign, so an NVFP4 reader would flip the signs of "
            "these blocks' values"
        )
    elif not is_plain_e2m1(fmt):
        offset = fmt.decodings[0].offset
        elements = f"{fmt.grid.name} + {offset:g}" if offset else fmt.grid.name
        reason = f"has elements {elements}, where {tool} reads E2M1"
    else:
        kinds = [f"{lay.block} with {get_format(lay.fmt).scale.name}" for lay in LAYOUTS if lay.tool == tool]
        reason = f"has blocks of {fmt.block} with {fmt.scale.name} scales, where {tool} reads {' or '.join(kinds)}"
    raise ValueError(f"{fmt.name} {reason}: quantize to fouroversix, nvfp4 or mxfp4 for it")


def check_scales(scales: np.ndarray, fmt: Format) -> None:
    """That the bytes are scales of this format, of finite blocks."""
    if fmt.scale.dtype == E4M3_TYPE:
        signs = int((scales >= 0x80).sum())
        if signs and not fmt.has_selector:
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


def check_zero_blocks(scales: np.ndarray, codes: np.ndarray, fmt: Format) -> None:
    """That blocks with scale byte 0, on which tools disagree, hold zeros; codes are packed, [..., m * block / 2]."""
    if fmt.scale.dtype == E8M0_TYPE and ((codes.reshape(*scales.shape, -1) & 0x77).any(-1) & (scales == 0)).any():
        raise ValueError(
            "a block with scale byte 0 has codes that are not zero: that byte is 2^-127 for some readers and 0 for "
            "others, ifjax among them. Scale the weight up"
        )


def _factor(q: QTensor, scales: np.ndarray, layout: Layout) -> np.ndarray:
    largest = q.fmt.tensor_constant(q.headroom)
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
    largest = get_format("nvfp4").tensor_constant()
    arrays = {}
    for module, amax in input_amax.items():
        amax = np.float32(amax)
        factor = _divided(largest, amax) if layout.reciprocal else _divided(amax, largest)
        if not np.finfo(np.float32).tiny <= factor < np.inf:
            raise ValueError(f"input_amax of {module} must be finite and > 0, got {amax}")
        arrays[join_name(module, layout.input_factor)] = np.full(layout.factor_shape, factor, np.float32)
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
        old = safetensors.replaced_by_file(path)
        _write(path, arrays, metadata | {"quantization_config": json.dumps(quantization)})
        safetensors.remove(old)
        return
    text = json.dumps({**(config or {}), "quantization_config": quantization}, indent=2)
    with new_folder(path) as folder:
        _write(folder / "model.safetensors", arrays, metadata)
        write_text(folder / "config.json", text + "\n")


def _write(path: Path, arrays: Mapping[str, np.ndarray], metadata: dict[str, str]) -> None:
    slots = []
    for name, array in arrays.items():
        if array.dtype.name not in safetensors.CODES:
            raise ValueError(f"{name} is {array.dtype}, which a safetensors file cannot hold")
        slots.append(safetensors.Slot(name, safetensors.CODES[array.dtype.name], array.shape))
    with safetensors.safetensors_writer(path, slots, lambda sums: metadata) as write:
        for name, array in arrays.items():
            write(name, array)
