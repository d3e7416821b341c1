"""NVIDIA ModelOpt, read by TensorRT-LLM, vLLM and SGLang.

Sources: NVFP4QTensor, MXFP4QTensor, the unified export and convert_hf_quant_config_format of ModelOpt 0.47. Stacks of
experts lie turned around there, [experts, in, out], under the parameter's own name.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from ifjax.exchange.floats import fp8_layout
from ifjax.exchange.layouts import E4M3_TYPE, LAYOUTS, Blocks, Declared, InputFactor, Layout, Model, Part, group_sizes

_TOOL = "modelopt"
# NVFP4 of weights alone has a name of its own.
_ALIASES = {"W4A16_NVFP4": "NVFP4", "FP8_PER_CHANNEL_PER_TOKEN": "FP8", "FP8_PB_WO": "FP8"}
_DOUBT = (
    "weight and weight_scale_2 are ModelOpt's names, but files with them exist in both orders of nibbles, and nothing "
    "in the bytes tells which: state tool='modelopt' (the earlier code is in the low nibble), or nibbles='low_first' "
    "or 'high_first'"
)


def _declares(layout: Layout, config: Mapping[str, Any]) -> Declared | None:
    inner = config.get("quantization", config)
    # Servers call it modelopt_fp4.
    if not str(config.get("quant_method", _TOOL if "quant_algo" in inner else None)).startswith(_TOOL):
        return None
    layers = (inner.get("quantized_layers") or {}).values()
    stated = {str(inner.get("quant_algo")).upper()} | {str(layer.get("quant_algo")).upper() for layer in layers}
    if layout.algorithm not in {_ALIASES.get(name, name) for name in stated}:
        return None
    groups = (config.get("config_groups") or {}).values()
    sizes = group_sizes(groups) | {inner.get("group_size")} - {None}
    if not layout.floats and "MIXED_PRECISION" not in stated and sizes - {layout.record.block}:
        raise ValueError(
            f"{layout.algorithm} has blocks of {layout.record.block}, and the configuration says {sizes}: state tool=, "
            "if the configuration is wrong"
        )
    return Declared()


def _config(model: Model) -> dict[str, Any]:
    groups, algorithms = {}, {}
    for i, (layout, layers) in enumerate(model.groups.items()):
        fp8 = layout.floats
        numbers = {"num_bits": 8 if fp8 else 4, "type": "float", "dynamic": False}
        numbers |= {} if fp8 else {"group_size": layout.record.block}
        with_inputs = model.inputs and layout.input_factor is not None
        # Its name for NVFP4 without quantized inputs. MXFP4 says nothing of them.
        algorithm = "W4A16_NVFP4" if layout.input_factor is not None and not with_inputs else layout.algorithm
        groups[f"group_{i}"] = {"targets": sorted(layers), "weights": numbers} | (
            {"input_activations": dict(numbers)} if with_inputs else {}
        )
        size = {} if fp8 else {"group_size": layout.record.block}
        algorithms |= {layer: {"quant_algo": algorithm} | size for layer in layers}
    names = {stated["quant_algo"] for stated in algorithms.values()}
    shared: dict[str, Any] = {"quant_method": _TOOL, "quant_algo": names.pop()}
    if len(groups) > 1:
        shared |= {"quant_algo": "MIXED_PRECISION", "quantized_layers": algorithms}
    else:
        groups["group_0"]["targets"] = ["Linear"]
    return shared | {"config_groups": groups, "ignore": model.ignored}


def _read(fmt, codes, scales, factor=None):
    del fmt
    return Blocks(codes, scales.view(np.uint8), multiplier=factor)


def _read_stack(fmt, codes, scales, factor=None):
    return _read(fmt, codes.swapaxes(-1, -2), scales.swapaxes(-1, -2), factor)


def _write_nvfp4(blocks: Blocks):
    return blocks.codes, blocks.scales.view(E4M3_TYPE), blocks.multiplier


def _write_stack(blocks: Blocks):
    return blocks.codes.swapaxes(-1, -2), blocks.scales.view(E4M3_TYPE).swapaxes(-1, -2), blocks.multiplier


def _write_mxfp4(blocks: Blocks):
    return blocks.codes, blocks.scales


_CODES = Part("{}.weight", ("U8",), lambda size: (*size.batch, size.rows, size.columns // 2))
_FACTORS = ("F32", "BF16", "F16", "F64")
_SHARED = {"config": _config, "declares": _declares}


def _scales(size):
    return (*size.batch, size.rows, size.blocks)


LAYOUTS.register(Layout(
    "modelopt NVFP4", _TOOL, "NVFP4",
    (_CODES, Part("{}.weight_scale", ("F8_E4M3",), _scales), Part("{}.weight_scale_2", _FACTORS, lambda size: ())),
    "nvfp4", read=_read, write=_write_nvfp4, input_factor=InputFactor(Part("{}.input_scale", ("F32",)), False, ()),
    doubt=_DOUBT, **_SHARED,
))  # fmt: skip
LAYOUTS.register(Layout(
    "modelopt NVFP4 stack", _TOOL, "NVFP4",
    (
        Part("{}", ("U8",), lambda size: (*size.batch, size.columns // 2, size.rows)),
        Part("{}_weight_scale", ("F8_E4M3",), lambda size: (*size.batch, size.blocks, size.rows)),
        Part("{}_weight_scale_2", _FACTORS, lambda size: ()),
    ),
    "nvfp4", plain="{}", stacks=True, factor="stack", read=_read_stack, write=_write_stack,
    input_factor=InputFactor(Part("{}_input_scale", ("F32",)), False, ()), doubt=_DOUBT, **_SHARED,
))  # fmt: skip
LAYOUTS.register(Layout(
    "modelopt MXFP4", _TOOL, "MXFP4", (_CODES, Part("{}.weight_scale", ("U8", "F8_E8M0"), _scales)), "mxfp4",
    read=_read, write=_write_mxfp4, doubt=_DOUBT, **_SHARED,
))  # fmt: skip
LAYOUTS.register(fp8_layout(_TOOL, "FP8", "{}.weight_scale", doubt=_DOUBT, **_SHARED))
