"""The one writer of all layouts: tensors and checkpoints out."""

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jax.typing import ArrayLike

from ifjax.arrays import QTensor
from ifjax.atomic import new_folder, write_text
from ifjax.exchange import blocks
from ifjax.exchange.containers import CONTAINERS
from ifjax.exchange.fused import warn_of_fused
from ifjax.exchange.layouts import LAYOUTS, WEIGHTS, Blocks, Layout, Model, Part, Spec, elements_of, layouts_of
from ifjax.exchange.recognize import Specs, recognize
from ifjax.files.checkpoint import Item
from ifjax.files.safetensors import Slot
from ifjax.formats import FORMATS, Format


def export_tensor(q: QTensor, tool: str) -> dict[str, np.ndarray]:
    """Return the arrays of one tensor in a tool's layout, by their names below the layer's.

    `q` is [.., in, out] or [.., out, in] with its blocks along `in`; the arrays are [.., out, ..], as the layout has
    them. Codes and scale bytes are q's. The tool's own decoding agrees with `q.dequantize` to 2 units in the last place
    of float32, for one amax in two thousand to 3: it divides in another order.

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
    layout = layout_for(q.fmt, tool, q.ndim)
    return {part.tail: array for part, array in written(q, layout).items()}


def written(q: QTensor, layout: Layout) -> dict[Part, np.ndarray]:
    """Return the arrays of a tensor in a layout, of the types and shapes that its parts state."""
    assert layout.write is not None
    matrices = blocks.blocks_of(q, layout)
    blocks.check_factor(q.amax, q.fmt, q.headroom, layout)
    if layout.factor == "stack" and q.amax is not None:
        matrices = _with_one_factor(matrices, q)
    arrays = layout.write(matrices)
    found = {}
    for part, array in zip(layout.parts, arrays, strict=True):
        if array is not None:
            array = np.asarray(array, order="C")
            assert matrices.size is not None
            assert part.shape is None or array.shape == part.shape(matrices.size), (part.name, array.shape)
            found[part] = array
    return found


def _with_one_factor(matrices: Blocks, q: QTensor) -> Blocks:
    """With that of the matrices that are not zeros."""
    at = np.argmax(np.asarray(q.amax))
    factors = {name: np.asarray(getattr(matrices, name)) for name in ("amax", "multiplier", "divisor")}
    own = {name: a.reshape(-1)[at if a.size > 1 else 0] for name, a in factors.items()}
    return dataclasses.replace(matrices, **own)


def layout_for(fmt: Format, tool: str, ndim: int = 2) -> Layout:
    """Return the tool's layout for tensors of this format.

    Raises:
        ValueError: there is none; the message says why.
    """
    layouts = [layout for layout in layouts_of(tool) if layout.write is not None]
    found = [layout for layout in layouts if layout.accepts(fmt)]
    if found:
        return next((layout for layout in found if layout.stacks or ndim == 2), found[0])
    fit = [name for name in FORMATS if any(layout.accepts(FORMATS[name]) for layout in layouts)]
    instead = f": quantize to {' or '.join(fit)} for it" if fit else ""
    raise ValueError(f"{fmt.name} {_refusal(fmt, tool, layouts)}{instead}")


def _refusal(fmt: Format, tool: str, layouts: list[Layout]) -> str:
    if not layouts:
        others = dict.fromkeys(layout.tool for layout in LAYOUTS.values() if layout.write is not None)
        return f"cannot go out, because {tool}'s layouts are only read here: export it to {' or '.join(others)}"
    if fmt.has_selector:
        return (
            "marks the blocks of its second decoding in the scale's sign, so an NVFP4 reader would flip the signs of "
            "these blocks' values"
        )
    theirs = [layout.record for layout in layouts]
    if all(elements_of(fmt) != elements_of(record) for record in theirs):
        names = " or ".join(dict.fromkeys(map(_elements, theirs)))
        return f"has elements {_elements(fmt)}, where {tool} reads {names}"
    kinds = dict.fromkeys(f"{layout.record.block} with {layout.record.scale.name}" for layout in layouts)
    return f"has blocks of {fmt.block} with {fmt.scale.name} scales, where {tool} reads {' or '.join(kinds)}"


def _elements(fmt: Format) -> str:
    grid, _, offset = fmt.decodings[0]
    return f"{grid.name} + {offset:g}" if offset else grid.name


def export_tensors(
    params: Mapping[str, QTensor | ArrayLike], tool: str, *, input_amax: Mapping[str, float] | None = None
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Return all arrays of a model in a tool's layouts, and the configuration that its config.json needs.

    Args:
        params: by flat names joined with dots, as the reader's model calls them. QTensors, whose names end with
            .weight, .kernel or .embedding, are stored in the tool's layouts; other arrays go along unchanged. Where
            there are several kinds, FP8 weights with scales among the other arrays included, the configuration says
            which layer has which.
        tool: one of `ifjax.exchange.TOOLS`, such as "compressed-tensors" (vLLM, transformers) or "modelopt"
            (TensorRT-LLM, vLLM, SGLang).
        input_amax: by a layer's name without .weight, the largest magnitude of its inputs, for readers that quantize
            them as well. For all QTensors or none: without it the configuration says that only weights are quantized.

    Servers multiply some layers as one (query, key and value; gate and up) and take one factor for them: `common_amax`
    makes it one. A warning tells of layers that have several.

    Raises:
        ValueError: as for `export_tensor`, with the name; a name that does not end as said, or that is there twice;
            nothing is quantized; `input_amax` names other layers or is not positive.
        TypeError: params is nested; something has changed the types of a QTensor's arrays.
    """
    out = export_all(params, tool, input_amax)
    return out.arrays, out.config


class Exported(NamedTuple):
    """A model in a tool's layouts.

    Attributes:
        arrays: by name.
        types: the file's names for their types.
        config: of the quantization.
        layout: one of those that were used, for what belongs to the tool.
    """

    arrays: dict[str, np.ndarray]
    types: dict[str, str]
    config: dict[str, Any]
    layout: Layout


def export_all(params: Mapping[str, Any], tool: str, input_amax: Mapping[str, float] | None = None) -> Exported:
    """Return a model in a tool's layouts; arguments and errors as for `export_tensors`."""
    arrays: dict[str, np.ndarray] = {}
    types: dict[str, str] = {}
    quantized: dict[str, tuple[Layout, str, tuple[Spec | None, ...]]] = {}
    for name, value in params.items():
        new: dict[str, Any] = {name: value}
        if isinstance(value, QTensor):
            layout, layer, parts = exported(name, value, tool)
            new = {part.of(layer): array for part, array in parts.items()}
            types |= {part.of(layer): layout.type_of(part, array) for part, array in parts.items()}
            specs = (None if part not in parts else Spec.of(parts[part]) for part in layout.parts)
            quantized[name] = layout, layer, tuple(specs)
        elif isinstance(value, Mapping):
            raise TypeError(
                f"{name!r} is a mapping: flatten the tree first, as by flax.traverse_util.flatten_dict(params, sep='.')"
            )
        if twice := new.keys() & arrays.keys():
            raise ValueError(f"{sorted(twice)} would be there twice: {name!r} and another array give it: rename one")
        new = {name: np.asarray(array) for name, array in new.items()}
        if any(array.dtype == object for array in new.values()):
            raise TypeError(f"{name!r} is a {type(value).__name__}: needs arrays and QTensors")
        arrays |= new
    if not quantized:
        raise ValueError(f"a configuration for {tool} describes quantized layers, found nothing: quantize some")
    plain = {name: Spec.of(array) for name, array in arrays.items() if name in params}
    if input_amax is not None:
        arrays |= _input_factors(input_amax, {layer: layout for layout, layer, _ in quantized.values()})
    warn_of_fused({name: q.amax for name, q in params.items() if isinstance(q, QTensor)})
    types = {name: Spec.of(array).dtype for name, array in arrays.items()} | types
    config = configuration(quantized.values(), plain, tool, input_amax is not None)
    return Exported(arrays, types, config, next(iter(quantized.values()))[0])


def exported(name: str, q: QTensor, tool: str) -> tuple[Layout, str, dict[Part, np.ndarray]]:
    """Return the layout, the layer and the arrays of one tensor; errors have its name."""
    try:
        layout = layout_for(q.fmt, tool, q.ndim)
        return layout, layer_in(layout, name), written(q, layout)
    except ValueError as error:
        raise error if str(error).startswith(repr(name)) else ValueError(f"{name}: {error}") from error


def layer_in(layout: Layout, name: str) -> str:
    """Return the layer of a parameter.

    Raises:
        ValueError: its name does not end as those of weights do.
    """
    layer = layout.layer_of(name)
    if layer is not None:
        return layer
    words = f".{', .'.join(WEIGHTS[:-1])} or .{WEIGHTS[-1]}"
    if layout.plain == "{}.weight":
        raise ValueError(f"{name!r} is a QTensor, so its name must end with {words}, which the layout's names "
                         "replace: rename it, as by `ifjax export --rename`")  # fmt: skip
    raise ValueError(
        f"{name!r} must not end with {words} in {layout.name}, which puts words behind the name of a parameter such as "
        "'experts.gate_up_proj': rename it, or export its matrices one by one"
    )


def configuration(quantized: Any, plain: Specs, tool: str, inputs: bool) -> dict[str, Any]:
    """Return the configuration of a model.

    Args:
        quantized: (layout, layer, specifications of its arrays) of all that is stored in the tool's layouts.
        plain: of all other arrays, by name: FP8 weights with scales among them are described too.
        tool: whose layouts these are.
        inputs: whether factors of inputs are stored.
    """
    groups: dict[Layout, dict[str, tuple[Spec | None, ...]]] = {}
    for layout, layer, specs in quantized:
        groups.setdefault(layout, {})[layer] = specs
    fp8 = [layout for layout in layouts_of(tool) if layout.floats]
    for found in recognize(plain, fp8):
        specs = tuple(None if name is None else plain[name] for name in found.arrays)
        groups.setdefault(found.layout, {})[found.layer] = specs
    packed = {layer for layers in groups.values() for layer in layers}
    # Readers look for quantized layers by class, so those that are not have to be named.
    split = ((name.rpartition("."), spec) for name, spec in plain.items())
    others = {layer for (layer, _, tail), spec in split if tail in WEIGHTS and len(spec.shape) > 1}
    first = next(iter(groups))
    return first.config(Model(groups, sorted(others - packed), inputs)) if first.config is not None else {}


def _input_factors(input_amax: Mapping[str, float], layouts: Mapping[str, Layout]) -> dict[str, np.ndarray]:
    for layout in layouts.values():
        if layout.input_factor is None:
            raise ValueError(f"{layout.algorithm} scales its inputs by blocks alone: leave input_amax out")
    if input_amax.keys() != layouts.keys():
        odd = sorted(input_amax.keys() ^ layouts.keys())
        raise ValueError(f"input_amax must name the quantized layers, all of them and no other: {odd[:5]}")
    arrays = {}
    for layer, amax in input_amax.items():
        factor = layouts[layer].input_factor
        assert factor is not None
        try:
            arrays[factor.part.of(layer)] = blocks.input_factor(factor, amax)
        except ValueError as error:
            raise ValueError(f"input_amax of {layer} {error}") from error
    return arrays


def save(
    params: Mapping[str, QTensor | ArrayLike],
    path: str | os.PathLike,
    tool: str,
    *,
    config: Mapping[str, Any] | None = None,
    input_amax: Mapping[str, float] | None = None,
) -> None:
    """Write a checkpoint that a tool reads, of what `export_tensors` makes of `params`, whole or not at all.

    Args:
        params: as for `export_tensors`.
        path: a file, if it ends with .safetensors (`quantization_config` is in its metadata, as JSON) or .gguf. Else a
            folder, new or empty, for model.safetensors and config.json.
        tool: as for `export_tensors`.
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
    out, path = export_all(params, tool, input_amax), Path(path)
    container, metadata = CONTAINERS[out.layout.container], dict(out.layout.metadata)
    if path.suffix in {container.suffix, *(c.suffix for c in CONTAINERS.values())}:
        if config is not None:
            raise ValueError(f"{path} is a file, and config is for a folder's config.json: name a folder")
        if path.suffix != container.suffix:
            raise ValueError(f"{tool} has files that end in {container.suffix}, got {path}")
        stated = {"quantization_config": json.dumps(out.config)} if out.config else {}
        container.write(path, items_of(out), metadata | stated)
        return
    with new_folder(path) as folder:
        container.write(folder / f"model{container.suffix}", items_of(out), metadata)
        if out.config or config:
            text = json.dumps(config_of(config or {}, out.layout, out.config), indent=2)
            write_text(folder / "config.json", text + "\n")


def items_of(out: Exported) -> list[Item]:
    """Return what a container writes: arrays with their types."""
    def item(name, array):
        return Item(name, (Slot(name, out.types[name], array.shape),), None, lambda write: write(name, array))

    return [item(name, array) for name, array in out.arrays.items()]


def config_of(config: Mapping[str, Any], layout: Layout, quantization: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a config.json holds: the model's own one, and that of the quantization."""
    kept = {key: value for key, value in config.items() if key not in ("quantization_config", "quantization")}
    return kept | {key: quantization for key in layout.config_keys if quantization}
