"""The fouroversix package's buffers, which it pads to whole tiles and may swizzle. They are read only.

Source: the package, of arXiv 2512.02010 and arXiv 2603.28765.
"""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from ifjax.exchange.blocks import check_scales
from ifjax.exchange.layouts import LAYOUTS, Blocks, Declared, Layout, Part, Size
from ifjax.exchange.swizzle import TILE, unswizzle_scales
from ifjax.formats import FORMATS, Format
from ifjax.numerics.packing import pack, packed_length


def _read(fmt: Format, values, scale_factors, amax, metadata) -> Blocks:
    rows, columns, tall, wide, swizzled = _sizes(metadata, fmt)
    _check_bytes(values, scale_factors, tall, wide, fmt)
    scales = scale_factors.view(np.uint8)
    if swizzled:
        scales = np.asarray(_unswizzle(scales.reshape(-1), tall, wide // fmt.block))
    scales = scales.reshape(tall, wide // fmt.block)
    packed = values.reshape(tall, -1)
    # Four bits lie two a byte; other widths take a byte each.
    codes = np.stack([packed & 15, packed >> 4], -1).reshape(tall, wide) if fmt.bits == 4 else packed
    blocks = -(-columns // fmt.block)
    _check_padding(codes, scales, rows, columns, blocks, fmt)
    scales = np.ascontiguousarray(scales[:rows, :blocks])
    if fmt.bits == 4:
        packed = np.ascontiguousarray(packed[:rows, : packed_length(blocks * fmt.block, fmt.bits)])
    else:
        packed = np.asarray(_pack(codes[:rows, : blocks * fmt.block], fmt.bits))
    check_scales(scales, fmt)
    if fmt.has_selector and (scales == 0x80).any():
        raise ValueError(f"a zero scale is marked as integers, which {fmt.name} never has: the format is another")
    size = Size((), rows, columns, blocks)
    if not fmt.has_tensor_scale:
        return Blocks(packed, scales, size=size)
    if amax.size != 1 or amax.dtype != np.float32 or not 0 <= amax.reshape(()) < np.inf:
        raise ValueError(f"amax must be one finite float32 >= 0, got {amax.dtype} {amax!r}")
    return Blocks(packed, scales, amax=amax.reshape(()), size=size)


def _sizes(metadata: np.ndarray, fmt: Format) -> tuple[int, int, int, int, bool]:
    """Rows, columns, the same padded, and whether scales are swizzled."""
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
    return rows, columns, tall, wide, bool(swizzled)


def _check_bytes(values: np.ndarray, scale_factors: np.ndarray, tall: int, wide: int, fmt: Format) -> None:
    per_byte = 2 if fmt.bits == 4 else 1
    for name, array, size in (
        ("values", values, tall * wide // per_byte),
        ("scale_factors", scale_factors, tall * wide // fmt.block),
    ):
        if array.itemsize != 1 or array.size != size:
            raise ValueError(f"{name} of {tall} x {wide} {fmt.name} are {size} bytes, got {array.dtype} {array.shape}")
    if values.dtype != np.uint8 or scale_factors.dtype not in (np.dtype(np.uint8), fmt.scale.dtype):
        raise ValueError(
            f"{fmt.name} has uint8 values and {fmt.scale.dtype} scales, got {values.dtype} and {scale_factors.dtype}"
        )


def _check_padding(codes, scales, rows: int, columns: int, blocks: int, fmt: Format) -> None:
    """An odd size tells the order of nibbles, the swizzle and the shape."""
    zeros = 0, 2 ** (fmt.bits - 1)
    padded = [np.isin(part, zeros, invert=True) for part in (codes[rows:], codes[:, columns:])]
    if any(part.any() for part in (*padded, scales[rows:], scales[:, blocks:])):
        raise ValueError(
            f"what was padded to {codes.shape[0]} x {codes.shape[1]} from {rows} x {columns} is not zero: the order of "
            "nibbles, the swizzle or the format is another than stated"
        )


# One program for each shape, not one for each operation.
_unswizzle = jax.jit(unswizzle_scales, static_argnums=(1, 2))
_pack = jax.jit(pack, static_argnums=1)

# The package's scale rules, for what its weights' type is: adaptive ones unless listed.
_RULES = {
    ("nvfp4", "static_6"): "nvfp4",
    ("nvfp4", "static_4"): "nvfp4_static4",
    ("mxfp4", "static_4"): "mxfp4_static4",
    ("nvfp4_bs8", "static_6"): "nvfp4_bs8",
}
_ADAPTIVE = {"nvfp4": "fouroversix", "nvfp4_bs8": "fouroversix_bs8"}


def _declares(layout: Layout, config: Mapping[str, Any]) -> Declared | None:
    """The weights' format, where the configuration has one for all of them."""
    del layout
    if config.get("quant_method") != "fouroversix":
        return None
    dtype = config.get("weight_dtype") or config.get("dtype") or "nvfp4"
    rule = config.get("weight_scale_rule") or config.get("scale_rule") or "mse"
    rounding = config.get("weight_round_style") or config.get("round_style") or "nearest"
    if config.get("module_config_overrides") or rounding == "stochastic_unbiased":
        return Declared()
    name = _RULES.get((dtype, rule), _ADAPTIVE.get(dtype, dtype))
    return Declared(None if name not in FORMATS or (rule == "static_4" and "static4" not in name) else name)


for _weight in ("weight", "gate_up_proj", "down_proj"):
    LAYOUTS.register(Layout(
        f"fouroversix {_weight}", "fouroversix", "fouroversix",
        tuple(Part(f"{{}}.quantized_{_weight}_{part}") for part in ("values", "scale_factors", "amax", "metadata")),
        plain=f"{{}}.{_weight}", read=_read, declares=_declares, fits=lambda layout, specs: True,
    ))  # fmt: skip
