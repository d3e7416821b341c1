"""Tensors of the fouroversix package."""

import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from ifjax.exchange.layouts import U8, Matrix, join_name, split_name, swapped_nibbles
from ifjax.exchange.swizzle import TILE, unswizzle_scales
from ifjax.exchange.write import check_scales
from ifjax.formats import FORMATS, Format, get_format
from ifjax.numerics.packing import pack, packed_length

_PARTS = ("values", "scale_factors", "amax", "metadata")


PART = re.compile(rf"quantized_(.+)_({'|'.join(_PARTS)})")


def from_fouroversix(arrays, *, fmt, swap, headroom):
    """The matrices that the fouroversix package stores in a layer's buffers, as Matrix, and all other arrays."""
    if fmt is None:
        raise ValueError(
            "the fouroversix package's tensors do not say their format: state fmt=, 'fouroversix' for nvfp4 with an "
            "adaptive scale rule (the package's default), 'nvfp4' for static_6, or 'if4' and so on"
        )
    fmt = get_format(fmt)
    groups: dict[str, dict[str, np.ndarray]] = {}
    rest = {}
    for name, array in arrays.items():
        module, tail = split_name(name)
        match = PART.fullmatch(tail)
        if match:
            groups.setdefault(join_name(module, match[1]), {})[match[2]] = array
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


def _read_fouroversix(parts: dict[str, np.ndarray], fmt: Format, swap: bool) -> Matrix:
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
    if values.dtype != np.uint8 or scale_factors.dtype not in (U8, fmt.scale.dtype):
        raise ValueError(
            f"{fmt.name} has uint8 values and {fmt.scale.dtype} scales, got {values.dtype} and {scale_factors.dtype}"
        )
    scales = scale_factors.view(np.uint8)
    if swizzled:
        scales = np.asarray(_unswizzle(scales.reshape(-1), tall, wide // fmt.block))
    scales = scales.reshape(tall, wide // fmt.block)
    packed = values.reshape(tall, wide // per_byte)
    packed = swapped_nibbles(packed) if swap and per_byte == 2 else packed
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
    check_scales(scales, fmt)
    if fmt.has_selector and (scales == 0x80).any():
        raise ValueError(f"a zero scale is marked as integers, which {fmt.name} never has: the format is another")
    if not fmt.has_tensor_scale:
        return Matrix(packed, scales, None, fmt, columns)
    amax = np.asarray(amax)
    if amax.size != 1 or amax.dtype != np.float32 or not 0 <= amax.reshape(()) < np.inf:
        raise ValueError(f"amax must be one finite float32 >= 0, got {amax.dtype} {amax!r}")
    return Matrix(packed, scales, amax.reshape(()), fmt, columns)


# One program for each shape, not one for each operation.
_unswizzle = jax.jit(unswizzle_scales, static_argnums=(1, 2))


_pack = jax.jit(pack, static_argnums=1)


# The fouroversix package's scale rules, for what its weights' type is: adaptive ones unless listed.
_FOUROVERSIX_RULES = {
    ("nvfp4", "static_6"): "nvfp4",
    ("nvfp4", "static_4"): "nvfp4_static4",
    ("mxfp4", "static_4"): "mxfp4_static4",
    ("nvfp4_bs8", "static_6"): "nvfp4_bs8",
}


_FOUROVERSIX_TYPES = {"nvfp4": "fouroversix", "nvfp4_bs8": "fouroversix_bs8"}


def fouroversix_format(config: Mapping[str, Any]) -> str | None:
    """Of the weights, where the configuration has one for all of them."""
    dtype = config.get("weight_dtype") or config.get("dtype") or "nvfp4"
    rule = config.get("weight_scale_rule") or config.get("scale_rule") or "mse"
    rounding = config.get("weight_round_style") or config.get("round_style") or "nearest"
    if config.get("module_config_overrides") or rounding == "stochastic_unbiased":
        return None
    name = _FOUROVERSIX_RULES.get((dtype, rule), _FOUROVERSIX_TYPES.get(dtype, dtype))
    return None if name not in FORMATS or (rule == "static_4" and "static4" not in name) else name
