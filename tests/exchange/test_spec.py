"""The specification for others: its reader, run as it stands there, agrees with the library bit for bit."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from exchange_cases import tensor
from numpy.testing import assert_array_equal

import ifjax

TEXT = (Path(__file__).resolve().parents[2] / "docs" / "spec" / "if4.md").read_text()


@pytest.fixture(scope="module")
def decode():
    (code,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    names = {}
    exec(code, names)
    return names["decode"]


def test_vectors(decode):
    (vectors,) = re.findall(r"```json\n(.*?)```", TEXT, re.DOTALL)
    (amax,) = re.findall(r"`amax` (\d[\d.]*)", TEXT)
    flags = []
    for vector in json.loads(vectors):
        scale, codes = (np.frombuffer(bytes.fromhex(vector[key]), np.uint8)[None] for key in ("scale", "codes"))
        assert decode(codes, scale, float(amax)).astype(">f4").tobytes().hex() == vector["bits"]
        flags.append(int(scale[0, 0] >> 7))
    assert flags == [1, 0, 1, 0]


@pytest.mark.parametrize("amax", [1.0, 3.0, 0.0173])
def test_every_byte_of_codes_under_every_scale(decode, amax):
    scales = np.array([b for b in range(256) if b & 127 != 127], np.uint8)
    codes = np.tile(np.arange(256, dtype=np.uint8), (len(scales), 1))
    q = tensor("if4", (len(scales), 512), amax=amax, scales=scales[:, None])
    q = q.replaced(codes=codes, scales=np.tile(scales[:, None], (1, 32)))
    found = decode(np.asarray(q.codes), np.asarray(q.scales), amax)
    expected = np.asarray(q.dequantize())
    assert_array_equal(found, expected)


def by_the_words(codes, scales, amax, columns):
    """A second reader, from the prose alone: the arrays by their table, then the arithmetic, one value at a time."""
    rows, blocks = len(scales), -(-columns // 16)
    assert codes.shape == (rows, 8 * blocks) and scales.shape == (rows, blocks)
    magnitudes = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    step = np.float32(np.float32(6) / np.float32(7))
    values = np.zeros((rows, 16 * blocks), np.float32)
    for row, column in np.ndindex(values.shape):
        byte = int(scales[row, column // 16])
        nibble = int(codes[row, column // 2]) >> 4 * (column % 2) & 15  # the earlier one is in bits 0 to 3
        exponent, mantissa = byte >> 3 & 15, byte & 7
        scale = np.float32(mantissa * 2.0**-9 if exponent == 0 else (8 + mantissa) * 2.0 ** (exponent - 10))
        if byte >> 7:
            assert nibble != 8, "-8 is never written"
            value = np.float32(nibble - 16 if nibble > 7 else nibble) * scale * np.float32(amax) * step
        else:
            value = np.float32((-1) ** (nibble >> 3) * magnitudes[nibble & 7]) * scale * np.float32(amax)
        values[row, column] = value / np.float32(2688)
    assert not values[:, columns:].any()  # filled up with zeros
    return values[:, :columns]


def test_a_reader_from_the_words_alone_reads_a_file_of_ours(tmp_path):
    """What `save_file` writes of a matrix whose last block is not full, opened by the plain reader of safetensors."""
    from safetensors.numpy import load_file

    x = np.random.default_rng(0).standard_normal((5, 40), np.float32)
    x[1, :16] = 0
    path = ifjax.save_file({"w": ifjax.quantize(x, "if4")}, tmp_path / "m.safetensors")
    stored = load_file(path)
    assert {name: (a.dtype.name, a.shape) for name, a in stored.items()} == {
        "w.codes": ("uint8", (5, 24)), "w.scales": ("uint8", (5, 3)), "w.amax": ("float32", ())
    }  # fmt: skip
    found = by_the_words(stored["w.codes"], stored["w.scales"], stored["w.amax"], 40)
    flags = stored["w.scales"] >> 7
    assert flags.any() and not flags.all() and stored["w.amax"] == np.abs(x).max()
    assert_array_equal(found, ifjax.load_file(path)["w"].dequantize())
    assert np.abs(found - x).max() < 0.5
