"""MLX's quantized safetensors in the modes nvfp4 and mxfp4: eight codes in a word, and no factor for the tensor.

Sources: mlx.core.quantize of mlx 0.32 and mlx-lm's utils, which quantizes the layers that have scales.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from ifjax.exchange.layouts import LAYOUTS, Blocks, Declared, Layout, Model, Part


def _declares(layout: Layout, config: Mapping[str, Any]) -> Declared | None:
    modes = {config.get("mode")} | {v.get("mode") for v in config.values() if isinstance(v, Mapping)}
    return Declared() if "quant_method" not in config and layout.algorithm in modes else None


def _config(model: Model) -> dict[str, Any]:
    (first, _), *others = model.groups.items()

    def settings(layout):
        return {"group_size": layout.record.block, "bits": 4, "mode": layout.algorithm}

    return settings(first) | {layer: settings(layout) for layout, layers in others for layer in layers}


def _read(fmt, words, scales):
    del fmt
    return Blocks(np.ascontiguousarray(words).view(np.uint8), scales)


def _write(blocks: Blocks):
    return np.ascontiguousarray(blocks.codes).view(np.uint32), blocks.scales


for _mode in ("nvfp4", "mxfp4"):
    LAYOUTS.register(Layout(
        f"mlx {_mode}", "mlx", _mode,
        (
            Part("{}.weight", ("U32",), lambda size: (*size.batch, size.rows, size.columns // 8)),
            Part("{}.scales", ("U8",), lambda size: (*size.batch, size.rows, size.blocks)),
        ),
        _mode, stacks=True, factor="none", read=_read, write=_write, config=_config, declares=_declares,
        config_keys=("quantization", "quantization_config"), metadata=(("format", "mlx"),),
    ))  # fmt: skip
