"""compressed-tensors, read by vLLM and transformers.

Sources: NVFP4PackedCompressor, MXFP4PackedCompressor, NaiveQuantizationCompressor, MXFP8 of compressed-tensors 0.20;
MixFP4 as in its pull request 687 and llm-compressor's 2657: bit 7 of a scale marks integers.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from ifjax.exchange.floats import fp8_layout, strategy_of
from ifjax.exchange.layouts import E4M3_TYPE, LAYOUTS, Blocks, Declared, InputFactor, Layout, Model, Part, group_sizes
from ifjax.formats import FORMATS

_TOOL = "compressed-tensors"


def _codes(size):
    return (*size.batch, size.rows, size.columns // 2)


def _scales(size):
    return (*size.batch, size.rows, size.blocks)


def _declares(layout: Layout, config: Mapping[str, Any]) -> Declared | None:
    if config.get("quant_method") != _TOOL:
        return None
    groups = list((config.get("config_groups") or {}).values())
    stated = {str(config.get("format"))} | {str(group["format"]) for group in groups if group.get("format")}
    if layout.algorithm not in stated:
        return None
    if (config.get("transform_config") or {}).get("config_groups"):
        raise ValueError(
            "its weights are stored rotated (transform_config), which is not undone here: export it without transforms"
        )
    own = [group for group in groups if group.get("format", layout.algorithm) == layout.algorithm]
    sizes = group_sizes(own) if not layout.floats and config.get("format") == layout.algorithm else set()
    if sizes - {layout.fmt and layout.record.block}:
        raise ValueError(
            f"{layout.algorithm} has blocks of {layout.record.block}, and the configuration says {sizes}: state tool=, "
            "if the configuration is wrong"
        )
    return Declared()


def _config(model: Model) -> dict[str, Any]:
    schemes = [scheme for layout, layers in model.groups.items() for scheme in _schemes(layout, layers, model)]
    mixed = len(schemes) > 1
    groups = {}
    for i, (layout, layers, scheme) in enumerate(schemes):
        targets = {"targets": sorted(layers), "format": layout.algorithm} if mixed else {"targets": ["Linear"]}
        groups[f"group_{i}"] = targets | scheme
    return {
        "quant_method": _TOOL, "format": "mixed-precision" if mixed else schemes[0][0].algorithm,
        "quantization_status": "compressed", "config_groups": groups, "ignore": model.ignored,
    }  # fmt: skip


def _schemes(layout: Layout, layers, model: Model):
    """(layout, layers, how they are quantized): FP8 layers of one kind of scales are a group of their own."""
    if layout.floats:
        kinds: dict[str, list[str]] = {}
        for layer, (weight, scale, *_) in layers.items():
            kinds.setdefault(repr(strategy_of(weight, scale)), []).append(layer)
        for names in kinds.values():
            weight, scale, *_ = layers[names[0]]
            yield layout, names, {"weights": {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": False}
                                  | strategy_of(weight, scale)}  # fmt: skip
        return
    numbers = {
        "num_bits": 4, "type": "float", "group_size": layout.record.block, "symmetric": True,
        "strategy": "group" if layout.record.tensor_peak is None else "tensor_group",
        "scale_dtype": "torch.uint8" if layout.record.tensor_peak is None else "torch.float8_e4m3fn",
    }  # fmt: skip
    scheme = {"weights": numbers | {"dynamic": False}}
    yield layout, list(layers), scheme | ({"input_activations": numbers | {"dynamic": "local"}} if model.inputs else {})


def _read(fmt, codes, scales, factor=None):
    del fmt
    return Blocks(codes, scales.view(np.uint8), divisor=factor)


def _write_nvfp4(blocks: Blocks):
    return blocks.codes, blocks.scales.view(E4M3_TYPE), np.reshape(blocks.divisor, (1,))


def _write_mxfp4(blocks: Blocks):
    return blocks.codes, blocks.scales


_PACKED = Part("{}.weight_packed", ("U8",), _codes)
_FACTOR = Part("{}.weight_global_scale", ("F32", "BF16", "F16", "F64"), lambda size: (1,))
_INPUT = InputFactor(Part("{}.input_global_scale", ("F32",)), True, (1,))
_SHARED = {"config": _config, "declares": _declares, "read": _read}

for _algorithm, _fmt in (("nvfp4-pack-quantized", "nvfp4"), ("mixfp4-pack-quantized", "mixfp4")):
    if _fmt not in FORMATS:
        continue
    LAYOUTS.register(Layout(
        f"{_TOOL} {_algorithm}", _TOOL, _algorithm,
        (_PACKED, Part("{}.weight_scale", ("F8_E4M3",), _scales), _FACTOR), _fmt,
        write=_write_nvfp4, input_factor=_INPUT if _fmt == "nvfp4" else None, **_SHARED,
        doubt=None if _fmt == "nvfp4" else "the names are those of NVFP4, and its scales have no signs",
    ))  # fmt: skip
LAYOUTS.register(Layout(
    f"{_TOOL} mxfp4-pack-quantized", _TOOL, "mxfp4-pack-quantized",
    (_PACKED, Part("{}.weight_scale", ("U8", "F8_E8M0"), _scales)), "mxfp4", write=_write_mxfp4, **_SHARED,
))  # fmt: skip
for _algorithm in ("naive-quantized", "float-quantized"):
    LAYOUTS.register(fp8_layout(_TOOL, _algorithm, "{}.weight_scale", declares=_declares, config=_config))
LAYOUTS.register(fp8_layout(_TOOL, "mxfp8-quantized", "{}.weight_scale", ("U8", "F8_E8M0"), declares=_declares,
                            config=_config))  # fmt: skip
