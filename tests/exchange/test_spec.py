"""The specification for others: its reader, run as it stands there, agrees with the library bit for bit."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from exchange_cases import tensor
from numpy.testing import assert_array_equal

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
