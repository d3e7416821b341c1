"""FP8 checkpoints as DeepSeek and transformers store them: a weight in FP8, and factors for rows or square blocks."""

from collections.abc import Mapping
from typing import Any

from ifjax.exchange.floats import fp8_layout
from ifjax.exchange.layouts import LAYOUTS, Declared, Layout


def _declares(layout: Layout, config: Mapping[str, Any]) -> Declared | None:
    del layout
    return Declared() if config.get("quant_method") in ("fp8", "fbgemm_fp8") else None


for _scale in ("weight_scale_inv", "weight_scale", "scale", "qscale_weight"):
    LAYOUTS.register(fp8_layout("fp8", _scale, f"{{}}.{_scale}", declares=_declares))
