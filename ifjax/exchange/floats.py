"""FP8 weights with scales, as layouts that are read as floats."""

import itertools
import math
from typing import Any

import numpy as np

from ifjax.exchange.layouts import E8M0_TYPE, Floats, Layout, Part, Spec

SCALE_TYPES = ("F32", "BF16", "F16", "F8_E8M0")


def fp8_layout(tool: str, algorithm: str, scale: str, dtypes: tuple[str, ...] = SCALE_TYPES, **fields: Any) -> Layout:
    """Return the layout of an FP8 weight that is multiplied by `scale`: one number, one a row, or one a square block.

    Source: DeepSeek-V3's weight_scale_inv, a factor for each 128 x 128 values; compressed-tensors and ModelOpt's FP8.
    """
    parts = Part("{}.weight", ("F8_E4M3", "F8_E5M2")), Part(scale, dtypes)
    how = {"read": read_fp8, "fits": _fits, "floats": True, "stacks": True}
    return Layout(f"{tool} {algorithm}", tool, algorithm, parts, **how, **fields)


def read_fp8(fmt, weight: np.ndarray, scale: np.ndarray) -> Floats:
    """Return weight * scale in float32, rounded once, as rows of all matrices laid end to end."""
    del fmt
    blocks = scale_blocks(weight.shape, scale.shape)
    if blocks is None:
        raise ValueError(
            f"scales of {scale.shape} are no factors of a weight of {weight.shape}: needs one number, one for each "
            "row, or one for each block of a power of two values"
        )
    shape = weight.shape if weight.ndim > 1 else (1, *weight.shape)
    scale = scale.reshape((1,) * weight.ndim) if scale.size == 1 else scale
    scale = _as_float32(scale.reshape(scale.shape + (1,) * (weight.ndim - scale.ndim)))
    scale = scale.reshape((1,) * (len(shape) - scale.ndim) + scale.shape)
    flat, columns, per = weight.reshape(-1, shape[-1]), shape[-1], shape[-2]
    blocks = (1,) * (len(shape) - len(blocks)) + blocks

    def rows(first: int, last: int, within: slice = slice(None)) -> np.ndarray:
        at = np.arange(first, last)
        index = [at % per // blocks[-2]]
        rest = at // per
        for n, block in zip(shape[-3::-1], blocks[-3::-1], strict=True):
            index.insert(0, rest % n // block)
            rest = rest // n
        index = [np.minimum(i, n - 1) for i, n in zip(index, scale.shape, strict=False)]
        factors = scale[tuple(index)]  # [rows, column blocks]
        if factors.shape[-1] > 1:
            factors = factors.repeat(blocks[-1], -1)[:, :columns][:, within]
        with np.errstate(over="ignore", invalid="ignore"):
            return flat[first:last, within].astype(np.float32) * factors

    return Floats(shape, rows)


def scale_blocks(weight: tuple[int, ...], scale: tuple[int, ...]) -> tuple[int, ...] | None:
    """Return how many values of each axis share a scale; None where shapes do not tell.

    Scales with fewer axes are of the leading ones. Blocks are powers of two: of these at most one fits a shape.
    """
    if not math.prod(weight) or not math.prod(scale):
        return None
    if math.prod(scale) == 1:
        return weight
    if len(scale) > len(weight):
        return None
    blocks = []
    for n, s in itertools.zip_longest(weight, scale, fillvalue=1):
        found = next((b for b in (2**i for i in range(32)) if -(-n // b) == s), None) if s > 1 else n
        if found is None:
            return None
        blocks.append(found)
    return tuple(blocks)


def strategy_of(weight: Spec | None, scale: Spec | None) -> dict[str, Any]:
    """Return compressed-tensors' words for how an FP8 weight is scaled."""
    assert weight is not None and scale is not None
    if math.prod(scale.shape) == 1:
        return {"strategy": "tensor"}
    blocks = scale_blocks(weight.shape, scale.shape)
    assert blocks is not None
    if blocks[-1] >= weight.shape[-1] and blocks[-2] == 1:
        return {"strategy": "channel"}
    if blocks[-2] == 1:
        return {"strategy": "group", "group_size": blocks[-1]}
    return {"strategy": "block", "block_structure": list(blocks[-2:])}


def _fits(layout: Layout, specs: tuple[Spec | None, ...]) -> bool:
    del layout
    weight, scale = specs[:2]
    return weight is not None and scale is not None and scale_blocks(weight.shape, scale.shape) is not None


def _as_float32(scale: np.ndarray) -> np.ndarray:
    return (scale.view(E8M0_TYPE) if scale.dtype == np.uint8 else scale).astype(np.float32)
