"""The MXFP4 expert stacks of gpt-oss, as transformers and vLLM read them: `NAME_blocks` and `NAME_scales`.

Source: convert_moe_packed_tensors of transformers 5.24; NAME is [experts, in, out] there once it is decoded, so that a
QTensor with axis -2 is its twin.
"""

from collections.abc import Mapping
from typing import Any

from ifjax.exchange.layouts import LAYOUTS, Blocks, Declared, Layout, Model, Part


def _declares(layout: Layout, config: Mapping[str, Any]) -> Declared | None:
    del layout
    return Declared() if config.get("quant_method") == "mxfp4" else None


def _config(model: Model) -> dict[str, Any]:
    return {"quant_method": "mxfp4", "modules_to_not_convert": model.ignored}


def _read(fmt, blocks, scales):
    del fmt
    return Blocks(blocks.reshape(*blocks.shape[:-2], -1), scales)


def _write(blocks: Blocks):
    return blocks.codes.reshape(*blocks.scales.shape, 16), blocks.scales


LAYOUTS.register(Layout(
    "gpt-oss MXFP4", "gpt-oss", "mxfp4",
    (
        Part("{}_blocks", ("U8",), lambda size: (*size.batch, size.rows, size.blocks, 16)),
        Part("{}_scales", ("U8",), lambda size: (*size.batch, size.rows, size.blocks)),
    ),
    "mxfp4", plain="{}", stacks=True, read=_read, write=_write, config=_config, declares=_declares,
))  # fmt: skip
