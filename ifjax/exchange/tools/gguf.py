"""NVFP4 and MXFP4 blocks of GGUF: scales and codes of a row lie side by side, in one array.

A group of 16 bytes (MXFP4) or 8 (NVFP4) has the first half of its codes in the low nibbles, the second in the high
ones. NVFP4 has four scales before its 64 codes, and a tensor's factor in `NAME.scale`, one for each matrix of a stack.
Sources: gguf 0.19's quants.py; llama.cpp's convert_hf_to_gguf.py.
"""

import functools
import importlib
from typing import Any

import numpy as np

from ifjax.exchange.layouts import LAYOUTS, Blocks, Floats, Layout, Part


def _split(array: np.ndarray, scales: int, half: int) -> tuple[np.ndarray, np.ndarray]:
    """(codes, two a byte, [..., bytes], scales [..., m]) of rows of blocks with so many scales and halves of codes."""
    blocks = array.reshape(*array.shape[:-1], -1, scales * (1 + half))
    nibbles = blocks[..., scales:].reshape(*blocks.shape[:-1], scales, half)
    codes = np.concatenate([nibbles & 15, nibbles >> 4], -1)
    codes = codes[..., ::2] | codes[..., 1::2] << 4
    return codes.reshape(*array.shape[:-1], -1), blocks[..., :scales].reshape(*array.shape[:-1], -1)


def _joined(codes: np.ndarray, scales: np.ndarray, count: int, half: int) -> np.ndarray:
    """The inverse of `_split`."""
    lead = codes.shape[:-1]
    codes = np.stack([codes & 15, codes >> 4], -1).reshape(*lead, -1, count, 2, half)
    nibbles = (codes[..., 0, :] | codes[..., 1, :] << 4).reshape(*lead, -1, count * half)
    return np.concatenate([scales.reshape(*lead, -1, count), nibbles], -1).reshape(*lead, -1)


def _read_nvfp4(fmt, array, factor=None):
    codes, scales = _split(array, 4, 8)
    scales = np.where(scales == fmt.scale.nan, np.uint8(0), scales)  # this byte is 0 there, not NaN
    return Blocks(codes, scales, multiplier=factor)


def _write_nvfp4(blocks: Blocks):
    size, factor = blocks.size, np.asarray(blocks.multiplier)
    assert size is not None
    if size.columns % 64:
        raise ValueError(f"GGUF's NVFP4 blocks have 64 values, and rows have {size.columns}: append zeros")
    scale = np.ascontiguousarray(np.broadcast_to(factor, size.batch)).reshape(-1) if size.batch else factor.reshape(1)
    return _joined(blocks.codes, blocks.scales, 4, 8), scale


def _read_mxfp4(fmt, array):
    del fmt
    return Blocks(*_split(array, 1, 16))


def _write_mxfp4(blocks: Blocks):
    return (_joined(blocks.codes, blocks.scales, 1, 16),)


def _read_floats(kind: str, fmt, array) -> Floats:
    del fmt
    gguf: Any = importlib.import_module("gguf")
    dequantize, of_kind = gguf.quants.dequantize, gguf.GGMLQuantizationType[kind]
    flat = array.reshape(-1, array.shape[-1])
    block, nbytes = gguf.GGML_QUANT_SIZES[of_kind]
    columns = flat.shape[-1] // nbytes * block

    def rows(first: int, last: int, within: slice = slice(None)) -> np.ndarray:
        start, stop, _ = within.indices(columns)
        whole = start // block, -(-stop // block)
        data = np.ascontiguousarray(flat[first:last, whole[0] * nbytes : whole[1] * nbytes])
        return dequantize(data, of_kind)[:, start - whole[0] * block : stop - whole[0] * block]

    return Floats((*array.shape[:-1], columns), rows)


LAYOUTS.register(Layout(
    "gguf NVFP4", "gguf", "NVFP4",
    (
        Part("{}.weight", ("NVFP4",), lambda size: (*size.batch, size.rows, size.columns // 64 * 36)),
        Part("{}.scale", ("F32",), lambda size: (int(np.prod(size.batch)),), optional=True),
    ),
    "nvfp4", stacks=True, read=_read_nvfp4, write=_write_nvfp4, fits=lambda layout, specs: True,
    metadata=(), container="gguf",
))  # fmt: skip
LAYOUTS.register(Layout(
    "gguf MXFP4", "gguf", "MXFP4",
    (Part("{}.weight", ("MXFP4",), lambda size: (*size.batch, size.rows, size.columns // 32 * 17)),), "mxfp4",
    stacks=True, read=_read_mxfp4, write=_write_mxfp4, metadata=(), container="gguf",
))  # fmt: skip
# Types that this library has no format for: they are read as floats, where that is asked for.
for _kind in (
    "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ1_M", "IQ1_S", "IQ2_XXS",
    "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS", "TQ1_0", "TQ2_0",
):  # fmt: skip
    LAYOUTS.register(Layout(
        f"gguf {_kind}", "gguf", _kind, (Part("{}", (_kind,)),), plain="{}", floats=True, stacks=True,
        read=functools.partial(_read_floats, _kind), container="gguf",
    ))  # fmt: skip
