"""Packed checkpoints: the bytes of the layout, trees there and back, what is refused, and what a crash leaves."""

import base64
import contextlib
import dataclasses
import itertools
import json
import os
import random
import re
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import oracle
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import ifjax
from ifjax import FORMATS, QTensor
from ifjax.arrays import Blocking, packed_shapes
from ifjax.files import FileError, checkpoint
from ifjax.files import orbax as orbax_files
from ifjax.files import safetensors as _files
from ifjax.formats import E8M0, SCALES, Scale

ROOT = Path(__file__).resolve().parents[2]


def packed(
    fmt="if4", shape=(6, 40), axis=-1, *, seed=0, amax_shape=(), block_2d=False, headroom=1.0, dtype="float32",
    names=None,
):  # fmt: skip
    """A QTensor of arbitrary bytes: files do not look at their meaning, and nothing needs to be compiled."""
    fmt, rng = ifjax.get_format(fmt), np.random.default_rng(seed)
    codes, scales = (rng.integers(0, 256, s, np.uint8) for s in packed_shapes(shape, fmt, axis))
    amax = np.asarray(rng.random(amax_shape, np.float32)) if fmt.has_tensor_scale else None
    return QTensor(codes, scales, amax, Blocking(fmt, axis, shape[axis], jnp.dtype(dtype), headroom, block_2d, names))


def assert_same(a, b):
    """The same tree of the same bytes."""
    a_leaves, a_tree = jax.tree.flatten(a)
    b_leaves, b_tree = jax.tree.flatten(b)
    assert a_tree == b_tree
    for x, y in zip(a_leaves, b_leaves, strict=True):
        assert (x.dtype, x.shape) == (y.dtype, y.shape)
        np.testing.assert_array_equal(_files.as_bytes(np.asarray(x)), _files.as_bytes(np.asarray(y)))


def some_tree():
    return {
        "block": {"kernel": packed(), "bias": np.arange(6, dtype=np.float32)},
        "head": packed("mxfp4", (4, 64), seed=1),
        "scale": np.arange(5, dtype=np.float32).astype(ml_dtypes.bfloat16),
    }


# --- the layout ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fmt", [pytest.param(name, id=f"of {name}") for name in FORMATS])
def test_every_format_comes_back_byte_for_byte(fmt, tmp_path):
    tree = {"a": packed(fmt), "b": packed(fmt, (3, 70, 5), -2, seed=1, dtype="bfloat16")}
    assert_same(ifjax.load_file(ifjax.save_file(tree, tmp_path / "m.safetensors")), tree)


@pytest.mark.parametrize(
    "q",
    [
        packed(shape=(3, 2, 32), amax_shape=(3,)),
        packed(shape=(3, 2, 32), amax_shape=(1, 2)),
        packed(shape=(50,), headroom=16 / 17, dtype="float16"),
        packed(shape=(32, 48), block_2d=True, axis=-2, dtype="float64"),
        packed(names=("data", ("a", "b"), None)),
        packed(shape=(0, 32)),
        packed("mxfp4", shape=(64, 2), axis=-2),
    ],
    ids=["layers", "middle", "headroom", "squares", "names", "empty", "mx"],
)
def test_every_field_comes_back(q, tmp_path):
    path = ifjax.save_file({"q": q}, tmp_path / "m.safetensors")
    assert_same(ifjax.load_file(path), {"q": q})
    abstract = ifjax.open_file(path).abstract("q")
    assert jax.tree.structure(abstract) == jax.tree.structure(q)
    assert [(a.shape, a.dtype) for a in jax.tree.leaves(abstract)] == [(a.shape, a.dtype) for a in jax.tree.leaves(q)]


def test_the_file_is_as_documented_and_other_readers_see_it(tmp_path):
    from safetensors import safe_open
    from safetensors.numpy import load_file

    q = packed(amax_shape=(), dtype="bfloat16", headroom=16 / 17)
    path = ifjax.save_file({"mlp": {"w": q}, "b": np.ones(3, np.float32)}, tmp_path / "m.safetensors")
    arrays = load_file(path)
    assert {name: (a.dtype.name, a.shape) for name, a in arrays.items()} == {
        "mlp/w.codes": ("uint8", (6, 24)), "mlp/w.scales": ("uint8", (6, 3)), "mlp/w.amax": ("float32", ()),
        "b": ("float32", (3,)),
    }  # fmt: skip
    np.testing.assert_array_equal(arrays["mlp/w.codes"], q.codes)
    np.testing.assert_array_equal(arrays["mlp/w.scales"], q.scales)
    with safe_open(path, framework="numpy") as file:
        metadata = file.metadata()
    own = json.loads(metadata["ifjax"])
    assert own["layout"] == 2
    assert own["tensors"] == {
        "mlp/w": {
            "fmt": "if4", "headroom": 16 / 17, "axis": -1, "shape": [6, 40], "dtype": "bfloat16", "block_2d": False
        }
    }  # fmt: skip
    assert own["formats"] == {"if4": json.loads(json.dumps(FORMATS["if4"].to_dict()))}
    assert set(own["crc32"]) == set(arrays)
    assert metadata["ifjax.checksum"].startswith("crc32:")


def test_a_reader_needs_the_file_alone(tmp_path):
    """Decodes by what BUILD.md says of the layout, in numpy, from the record in the file."""
    from safetensors import safe_open

    q = packed("if4", (4, 64))
    path = ifjax.save_file({"w": q}, tmp_path / "m.safetensors")
    with safe_open(path, framework="numpy") as file:
        own = json.loads(file.metadata()["ifjax"])
        codes, bytes_, amax = (file.get_tensor(f"w.{part}") for part in ("codes", "scales", "amax"))
    record = own["formats"][own["tensors"]["w"]["fmt"]]
    assert record["scale"] == "e4m3"
    codes = np.stack([codes & 15, codes >> 4], -1).reshape(4, 4, 16)  # two a byte, the first one low
    scale = (bytes_ & 0x7F).view(ml_dtypes.float8_e4m3fn).astype(np.float64)[..., None]
    candidates = record["candidates"]
    values = [(np.array(c["grid"]["values"])[codes] + c["offset"]) * c["step"] for c in candidates]
    values = np.where((bytes_ >= 0x80)[..., None], values[1], values[0])
    peak = record["peak"] or max(map(abs, candidates[0]["grid"]["values"]))
    decoded = (values * scale * amax / (peak * record["tensor_peak"])).reshape(4, 64)
    # Four float32 operations there, one rounding here.
    np.testing.assert_allclose(decoded, np.asarray(q.dequantize()), rtol=4 * 2.0**-24)
    assert np.isnan(decoded).any()  # 0x7F and 0xFF are among the bytes


# A file of layout 1, and one of layout 2, with an IF4 tensor w and an array b.
OLD = """
8AMAAAAAAAB7Il9fbWV0YWRhdGFfXyI6eyJpZmpheCI6IntcImxheW91dFwiOjEsXCJmb3JtYXRzXCI6e1wiaWY0XCI6e1wibmFtZVwiOlwiaWY0XCIs
XCJjYW5kaWRhdGVzXCI6W3tcImdyaWRcIjp7XCJuYW1lXCI6XCJFMk0xXCIsXCJtYWduaXR1ZGVzXCI6WzAuMCwwLjUsMS4wLDEuNSwyLjAsMy4wLDQu
MCw2LjBdLFwic2lnblwiOlwiYml0XCIsXCJ0aWVzXCI6XCJldmVuXCIsXCJ6ZXJvXCI6XCJzaWduZWRcIn0sXCJzdGVwXCI6MS4wLFwic3RyZXRjaFwi
OjEuMH0se1wiZ3JpZFwiOntcIm5hbWVcIjpcIklOVDRcIixcIm1hZ25pdHVkZXNcIjpbMC4wLDEuMCwyLjAsMy4wLDQuMCw1LjAsNi4wLDcuMF0sXCJz
aWduXCI6XCJ0d29zX2NvbXBsZW1lbnRcIixcInRpZXNcIjpcImV2ZW5cIixcInplcm9cIjpcInVuc2lnbmVkXCJ9LFwic3RlcFwiOjAuODU3MTQyODU3
MTQyODU3MSxcInN0cmV0Y2hcIjoxLjB9XSxcImJsb2NrXCI6MTYsXCJzY2FsZVwiOlwiZTRtM1wiLFwicGVha1wiOm51bGx9fSxcInRlbnNvcnNcIjp7
XCJ3XCI6e1wiZm10XCI6XCJpZjRcIixcImhlYWRyb29tXCI6MS4wLFwiYXhpc1wiOi0xLFwic2hhcGVcIjpbMiwxNl0sXCJkdHlwZVwiOlwiZmxvYXQz
MlwiLFwiYmxvY2tfMmRcIjpmYWxzZX19LFwiY3JjMzJcIjp7XCJ3LmFtYXhcIjpcImMyMWNiYTJlXCIsXCJiXCI6XCJjZWUyM2M0ZlwiLFwidy5jb2Rl
c1wiOlwiYTY3MmRjNDZcIixcIncuc2NhbGVzXCI6XCI5M2ZjOTViYVwifX0iLCJpZmpheC5jaGVja3N1bSI6ImNyYzMyOjc5MzUxNWFiIn0sIncuYW1h
eCI6eyJkdHlwZSI6IkYzMiIsInNoYXBlIjpbXSwiZGF0YV9vZmZzZXRzIjpbMCw0XX0sImIiOnsiZHR5cGUiOiJGMTYiLCJzaGFwZSI6WzJdLCJkYXRh
X29mZnNldHMiOls0LDhdfSwidy5jb2RlcyI6eyJkdHlwZSI6IlU4Iiwic2hhcGUiOlsyLDhdLCJkYXRhX29mZnNldHMiOls4LDI0XX0sIncuc2NhbGVz
Ijp7ImR0eXBlIjoiVTgiLCJzaGFwZSI6WzIsMV0sImRhdGFfb2Zmc2V0cyI6WzI0LDI2XX19ICAgICAAACBAADwAvAAQIDBAUGBwgJCgsMDQ4PA4uA==
"""
NEW = """
6AQAAAAAAAB7Il9fbWV0YWRhdGFfXyI6eyJpZmpheCI6IntcImxheW91dFwiOjIsXCJmb3JtYXRzXCI6e1wiaWY0XCI6e1wibmFtZVwiOlwiaWY0XCIsXCJj
YW5kaWRhdGVzXCI6W3tcImdyaWRcIjp7XCJuYW1lXCI6XCJFMk0xXCIsXCJ2YWx1ZXNcIjpbMC4wLDAuNSwxLjAsMS41LDIuMCwzLjAsNC4wLDYuMCwtMC4w
LC0wLjUsLTEuMCwtMS41LC0yLjAsLTMuMCwtNC4wLC02LjBdLFwidGllc1wiOlwiZXZlblwiLFwiemVyb1wiOlwic2lnbmVkXCIsXCJwcmVmZXJyZWRcIjpb
XSxcInVudXNlZFwiOltdfSxcInN0ZXBcIjoxLjAsXCJzY2FsZV9tdWx0aXBsaWVyXCI6MS4wLFwicGVha1wiOm51bGwsXCJvZmZzZXRcIjowLjB9LHtcImdy
aWRcIjp7XCJuYW1lXCI6XCJJTlQ0XCIsXCJ2YWx1ZXNcIjpbMC4wLDEuMCwyLjAsMy4wLDQuMCw1LjAsNi4wLDcuMCwtOC4wLC03LjAsLTYuMCwtNS4wLC00
LjAsLTMuMCwtMi4wLC0xLjBdLFwidGllc1wiOlwiZXZlblwiLFwiemVyb1wiOlwidW5zaWduZWRcIixcInByZWZlcnJlZFwiOltdLFwidW51c2VkXCI6Wzhd
fSxcInN0ZXBcIjowLjg1NzE0Mjg1NzE0Mjg1NzEsXCJzY2FsZV9tdWx0aXBsaWVyXCI6MS4wLFwicGVha1wiOm51bGwsXCJvZmZzZXRcIjowLjB9XSxcImJs
b2NrXCI6MTYsXCJzY2FsZVwiOlwiZTRtM1wiLFwicGVha1wiOm51bGwsXCJ0ZW5zb3JfcGVha1wiOjQ0OC4wLFwidGllc1wiOlwiZmlyc3RcIixcInByZXZl
bnRfemVyb1wiOmZhbHNlLFwic2F0dXJhdGVzXCI6ZmFsc2V9fSxcInRlbnNvcnNcIjp7XCJ3XCI6e1wiZm10XCI6XCJpZjRcIixcImF4aXNcIjotMSxcImR0
eXBlXCI6XCJmbG9hdDMyXCIsXCJoZWFkcm9vbVwiOjEuMCxcImJsb2NrXzJkXCI6ZmFsc2UsXCJzaGFwZVwiOlsyLDE2XX19LFwiY3JjMzJcIjp7XCJ3LmFt
YXhcIjpcImMyMWNiYTJlXCIsXCJiXCI6XCJjZWUyM2M0ZlwiLFwidy5jb2Rlc1wiOlwiYTY3MmRjNDZcIixcIncuc2NhbGVzXCI6XCI5M2ZjOTViYVwifX0i
LCJpZmpheC5jaGVja3N1bSI6ImNyYzMyOjUxNWQ1N2I3In0sIncuYW1heCI6eyJkdHlwZSI6IkYzMiIsInNoYXBlIjpbXSwiZGF0YV9vZmZzZXRzIjpbMCw0
XX0sImIiOnsiZHR5cGUiOiJGMTYiLCJzaGFwZSI6WzJdLCJkYXRhX29mZnNldHMiOls0LDhdfSwidy5jb2RlcyI6eyJkdHlwZSI6IlU4Iiwic2hhcGUiOlsy
LDhdLCJkYXRhX29mZnNldHMiOls4LDI0XX0sIncuc2NhbGVzIjp7ImR0eXBlIjoiVTgiLCJzaGFwZSI6WzIsMV0sImRhdGFfb2Zmc2V0cyI6WzI0LDI2XX19
ICAgIAAAIEAAPAC8ABAgMEBQYHCAkKCwwNDg8Di4
"""


def old_tree():
    codes, scales = np.arange(16, dtype=np.uint8).reshape(2, 8) * 16, np.array([[56], [184]], np.uint8)
    q = packed("if4", (2, 16)).replaced(codes=codes, scales=scales, amax=np.float32(2.5))
    return {"w": q, "b": np.array([1, -1], np.float16)}


def test_files_of_both_layouts_are_read_and_layout_2_is_written(tmp_path):
    """If this test fails, the layout has changed: give it a number."""
    old, new = (base64.b64decode("".join(text.split())) for text in (OLD, NEW))
    for data in (old, new):
        path = tmp_path / "old.safetensors"
        path.write_bytes(data)
        assert_same(ifjax.load_file(path), jax.tree.map(np.asarray, old_tree()))
    assert ifjax.save_file(old_tree(), tmp_path / "new.safetensors").read_bytes() == new


def test_a_format_that_no_table_knows_is_read_by_content(tmp_path, monkeypatch):
    grid = ifjax.Grid.sign_magnitude("quantiles", (0.0, 0.08, 0.16, 0.25, 0.34, 0.44, 0.56, 1.0))
    mine = ifjax.Format("mine", (ifjax.Candidate(FORMATS["if4"].grid), ifjax.Candidate(grid, step=6.0)), block=24)
    other = dataclasses.replace(mine, block=8)  # of the same name
    own_grid = ifjax.Grid("g", (-1.0, 0.0, 0.5, 2.0), "lower", preferred=(1,), unused=(0,))
    third = ifjax.Format(
        "third", (ifjax.Candidate(own_grid), ifjax.Candidate(own_grid, 0.75, 1.25, 3.0, -0.125)), 16,
        ifjax.TableScale("t", (0.0, 0.5, 0.7, 3.0), "up", nan=15, last=2), 1.5, tensor_peak=0.5, ties="last",
        prevent_zero=True,
    )  # fmt: skip
    tree = {"a": packed(mine), "b": packed(other), "c": packed("nvfp3"), "d": packed(third)}
    path = ifjax.save_file(tree, tmp_path / "m.safetensors")
    monkeypatch.setattr(FORMATS, "_records", {})
    loaded = ifjax.load_file(path)
    assert_same(loaded, tree)
    assert (loaded["a"].fmt, loaded["b"].fmt, loaded["d"].fmt) == (mine, other, third)


@dataclasses.dataclass(frozen=True)
class Halves(Scale):
    """A power of two for the block, and 2^0 .. 2^-3 of it for each half: two bytes."""

    name: str = "halves"
    bits: int = 12
    nbytes: int = 2
    runs: tuple[int, ...] = (8,)
    nan: int = 0xFFF
    top: int = 0xFD

    def encode(self, scale, *parts):
        whole, *halves = (E8M0.encode(s) for s in (scale, *parts[0]))
        shifts = [jnp.clip(whole - half, 0, 3) for half in halves]
        return whole | shifts[0] << 8 | shifts[1] << 10

    def decode(self, payload, place=0):
        shift = jnp.where(place < 8, payload >> 8, payload >> 10) & 3
        scale = E8M0.decode(payload & 0xFF) * jnp.exp2(-shift.astype(jnp.float32))
        return jnp.where(payload == self.nan, jnp.nan, scale)


# Its scale is code and takes two bytes.
HALVES = ifjax.Format("in halves", FORMATS["if4"].candidates, 16, Halves(), tensor_peak=None)


def register_halves(monkeypatch):
    """Until the test has ended, or monkeypatch.undo."""
    monkeypatch.setattr(SCALES, "_records", dict(SCALES))
    SCALES.register(HALVES.scale)


def test_a_scale_that_is_code_is_written_by_its_registered_name(tmp_path, monkeypatch):
    register_halves(monkeypatch)
    tree = {"a": packed(HALVES), "b": packed(HALVES, (70, 5), -2, seed=1)}
    path = ifjax.save_file(tree, tmp_path / "m.safetensors")
    assert_same(ifjax.load_file(path), tree)
    assert ifjax.open_file(path).entries["a.scales"].shape == (6, 6)
    monkeypatch.undo()  # now it is unknown
    with pytest.raises(FileError, match=r"m\.safetensors.*unknown scale 'halves'"):
        ifjax.load_file(path)
    with pytest.raises(ValueError, match=r"the scale 'halves' is code, .* register it"):
        ifjax.save_file(tree, path)
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]


def test_a_newer_layout_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "LAYOUT", 3)
    path = ifjax.save_file(some_tree(), tmp_path / "m.safetensors")
    monkeypatch.undo()
    with pytest.raises(FileError, match="is of layout 3, and this ifjax reads 1 to 2: install what wrote it"):
        ifjax.load_file(path)


# --- layout 1 --------------------------------------------------------------------------------------------------------

LAYOUT_1 = ROOT / "tests" / "golden" / "layout1"
# What differs from a format's name and from the defaults, as its README and BUILD.md have it.
QUANTILES = ifjax.Grid.sign_magnitude("quantiles", (0.0, 0.08, 0.16, 0.25, 0.34, 0.44, 0.56, 1.0))
MINE_1 = ifjax.Format(
    "mine", (ifjax.Candidate(FORMATS["if4"].grid), ifjax.Candidate(QUANTILES, step=6.0)), block=12
)  # fmt: skip
STATED_1 = {
    "if6": {"fmt": FORMATS["if6_e2m3"]}, "columns": {"fmt": FORMATS["if4"], "axis": -2},
    "square": {"fmt": FORMATS["if4"], "block_2d": True}, "unbiased": {"fmt": FORMATS["if3"], "headroom": 16 / 17},
    "stacked": {"fmt": FORMATS["fouroversix"]}, "bfloat16": {"fmt": FORMATS["nvfp4"], "dtype": "bfloat16"},
    "searched": {"fmt": FORMATS["if4"]}, "mine": {"fmt": MINE_1},
    "named": {"fmt": FORMATS["mxfp4"], "names": ("data", None)},
}  # fmt: skip


class Written(NamedTuple):
    """What layout 1 wrote of a tensor, and its values in float32."""

    q: QTensor
    values: np.ndarray


def written_1():
    """Packed tensors, and the arrays that are not packed, by name."""
    with np.load(LAYOUT_1 / "expected.npz") as file:
        arrays = dict(file)
    tensors = {}
    for name in [key.removesuffix("__codes") for key in arrays if key.endswith("__codes")]:
        stated = {"axis": -1, "dtype": "float32", **STATED_1.get(name, {"fmt": FORMATS.get(name)})}
        values = arrays.pop(f"{name}__deq")
        blocking = Blocking(length=values.shape[stated["axis"]], **stated | {"dtype": jnp.dtype(stated["dtype"])})
        codes, scales, amax = (arrays.pop(f"{name}__{part}", None) for part in ("codes", "scales", "amax"))
        tensors[name] = Written(QTensor(codes, scales, amax, blocking), values)
    return tensors, arrays


WRITTEN_1, PLAIN_1 = written_1()
SHARED_1 = ("fouroversix", "if4", "mxfp4", "stacked")  # with the array "floats": also in shards and in Orbax's folder


def assert_as_written(q, name):
    """Static fields, bytes and values, all of them exactly."""
    expected, values = WRITTEN_1[name]
    assert_same(q, expected)
    np.testing.assert_array_equal(np.asarray(q.dequantize(jnp.float32)), values)
    np.testing.assert_array_equal(np.asarray(q.dequantize()), values.astype(q.dtype))


def abstract(tree):
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), tree)


def dense(tree):
    """The same in floats, without values."""
    return jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), tree, is_leaf=lambda leaf: isinstance(leaf, QTensor)
    )


LIKES = {"nothing": lambda tree: None, "packed": lambda tree: tree, "abstract": abstract, "dense": dense}


def tree_1(*names):
    return {name: WRITTEN_1[name].q for name in names} | {"floats": PLAIN_1["floats"]}


def test_the_files_of_layout_1_are_of_layout_1_and_hold_every_format_named_then():
    for path in (LAYOUT_1 / "one.safetensors", *LAYOUT_1.glob("shards/*.safetensors")):
        data = path.read_bytes()
        own = json.loads(json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]["ifjax"])
        assert own["layout"] == 1
    assert {*oracle.FORMATS, *STATED_1} == set(WRITTEN_1) and set(PLAIN_1) == {"floats", "integers"}


def test_a_file_of_layout_1_is_mapped():
    file = ifjax.open_file(LAYOUT_1 / "one.safetensors")
    assert set(file) == {*WRITTEN_1, *PLAIN_1} and set(file.packed) == set(WRITTEN_1)
    for name, written in WRITTEN_1.items():
        assert_same(file[name], written.q)
        assert jax.tree.structure(file.abstract(name)) == jax.tree.structure(written.q)
        assert jax.tree.leaves(file.abstract(name)) == jax.tree.leaves(abstract(written.q))


@pytest.mark.parametrize("like", LIKES.values(), ids=LIKES)
def test_a_file_of_layout_1_is_read(like, tmp_path):
    tree = tree_1(*WRITTEN_1) | PLAIN_1
    loaded = ifjax.load_file(LAYOUT_1 / "one.safetensors", like=like(tree))
    assert set(loaded) == set(tree)
    for name in WRITTEN_1:
        assert_as_written(loaded[name], name)
    assert_same(loaded, tree)
    # What is written of it is of layout 2, and holds the same.
    again = ifjax.save_file(loaded, tmp_path / "m.safetensors")
    assert_same(ifjax.load_file(again, like=like(tree)), tree)


def test_layout_1_is_like_what_is_quantized_today():
    """The records of then are those of now, so that a tree of now can be given as `like`."""

    def quantized(x, **names):
        tree = {name: ifjax.quantize(x, names.get(name, name)) for name in ("if4", "fouroversix", "mxfp4")}
        stacked = ifjax.quantize(jnp.stack([x, x]), "fouroversix", amax_axes=(0,))
        return tree | {"floats": x, "stacked": stacked}

    like = jax.eval_shape(quantized, PLAIN_1["floats"])
    assert_same(ifjax.load_file(LAYOUT_1 / "shards", like=like), tree_1(*SHARED_1))
    other = jax.eval_shape(lambda x: quantized(x, if4="nvfp4"), PLAIN_1["floats"])
    with pytest.raises(ValueError, match="'if4' has fmt if4, and the tree has nvfp4"):
        ifjax.load_file(LAYOUT_1 / "shards", like=other)


@pytest.mark.parametrize("like", LIKES.values(), ids=LIKES)
def test_shards_of_layout_1_are_read(like):
    tree = tree_1(*SHARED_1)
    assert len(ifjax.open_file(LAYOUT_1 / "shards").files) == 4
    for path in (LAYOUT_1 / "shards", LAYOUT_1 / "shards" / "model.safetensors.index.json"):
        loaded = ifjax.load_file(path, like=like(tree))
        assert_same(loaded, tree)
        for name in SHARED_1:
            assert_as_written(loaded[name], name)


@pytest.mark.parametrize("like", ["nothing", "packed", "abstract"])
def test_an_orbax_folder_of_layout_1_is_read(like, orbax):
    tree = jax.tree.map(jnp.asarray, tree_1(*SHARED_1))
    loaded = orbax_files.load_orbax(LAYOUT_1 / "orbax", like=LIKES[like](tree))
    assert_same(loaded, tree)
    for name in SHARED_1:
        assert_as_written(loaded[name], name)


def test_an_orbax_folder_of_layout_1_is_read_under_a_sharding_and_for_its_formats_alone(orbax):
    tree = jax.tree.map(jnp.asarray, tree_1(*SHARED_1))
    mesh = jax.make_mesh((4,), ("a",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = NamedSharding(mesh, PartitionSpec("a"))
    place = ifjax.shardings(tree["if4"], rows)
    like = abstract(tree)
    like["if4"] = jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), tree["if4"], place)
    loaded = orbax_files.load_orbax(LAYOUT_1 / "orbax", like=like)
    assert_same(loaded, tree)
    assert loaded["if4"].scales.sharding.is_equivalent_to(rows, 2)
    with pytest.raises(ValueError, match="'if4' differ in format"):
        other = tree["if4"].replaced(fmt=FORMATS["nvfp4"])
        orbax_files.load_orbax(LAYOUT_1 / "orbax", like=tree | {"if4": other})


def test_flax_bytes_of_layout_1_are_read():
    from flax import serialization

    target = {"w": WRITTEN_1["if4"].q, "v": WRITTEN_1["mxfp4"].q}
    zeros = jax.tree.map(np.zeros_like, target)
    loaded = serialization.from_bytes(zeros, (LAYOUT_1 / "flax.msgpack").read_bytes())
    assert_same(loaded, target)
    assert_as_written(loaded["w"], "if4")
    assert_as_written(loaded["v"], "mxfp4")
    with pytest.raises(ValueError, match="another kind of QTensor"):
        serialization.from_bytes(zeros | {"w": zeros["v"]}, (LAYOUT_1 / "flax.msgpack").read_bytes())


# --- trees -----------------------------------------------------------------------------------------------------------


def test_arrays_of_all_dtypes_come_back(tmp_path):
    tree = {name: np.ones((2, 3), _files.numpy_dtype(code)) for name, code in _files.CODES.items()}
    tree["scalar"] = np.float32(3)
    loaded = ifjax.load_file(ifjax.save_file(tree, tmp_path / "m.safetensors"))
    assert_same(loaded, jax.tree.map(np.asarray, tree))
    # What JAX would cut to 32 bits stays with numpy.
    assert {name for name, a in loaded.items() if isinstance(a, np.ndarray)} == {"float64", "int64", "uint64"}


def test_lists_are_numbered_and_like_gives_them_back(tmp_path):
    tree = {"layers": [packed(), (np.ones(2, np.float32), packed(seed=1))]}
    path = ifjax.save_file(tree, tmp_path / "m.safetensors")
    assert list(ifjax.open_file(path)) == ["layers/0", "layers/1/0", "layers/1/1"]
    first, (ones, second) = tree["layers"]
    assert_same(ifjax.load_file(path), {"layers": {"0": first, "1": {"0": ones, "1": second}}})
    assert_same(ifjax.load_file(path, like=tree), tree)


@pytest.mark.parametrize(
    "tree, error, message",
    [
        (np.ones(3), ValueError, "whose leaves have names"),
        ({"a/b": np.ones(1), "a": {"b": np.ones(1)}}, ValueError, "two leaves of the tree are named 'a/b'"),
        ({"a": np.ones(1), "a/b/c": np.ones(1)}, ValueError, "'a' is a leaf of the tree, and 'a/b/c' lies within"),
        ({"a": packed(), "a.codes": np.ones(1)}, ValueError, "names must be unique.*a.codes"),
        ({"__metadata__": np.ones(1)}, ValueError, "rename it"),
        ({"\ud800": np.ones(1)}, ValueError, "UTF-8"),
        ({"a": np.array([object()])}, TypeError, "'a' is object, and files hold only"),
        ({"a": "text"}, TypeError, "files hold only"), ({"a": jax.random.key(0)}, TypeError, r"jax\.random\.key_data"),
        ({"a": jax.ShapeDtypeStruct((2,), np.float32)}, TypeError, "must be an array to be saved"),
        ({"a": packed().replaced(codes=jax.ShapeDtypeStruct((6, 24), np.uint8))}, TypeError, "codes' must"),
        ({"a": packed().replaced(scales=packed().scales[:, :2])}, ValueError, "'a': "),
        ({"a": packed().replaced(amax=np.float16(1))}, TypeError, "'a': something has made float16 of .* amax"),
        ({"a": packed().replaced(scales=packed().scales.view(np.int8))}, TypeError, "int8 of a QTensor's scales"),
    ],
    ids=lambda value: "" if isinstance(value, type) else None,
)  # fmt: skip
def test_what_cannot_be_saved_is_refused_and_nothing_is_written(tree, error, message, tmp_path):
    path = tmp_path / "m.safetensors"
    path.write_bytes(b"old")
    with pytest.raises(error, match=message):
        ifjax.save_file(tree, path)
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("m.safetensors", b"old")]


def test_saving_inside_jit_and_of_kernels_own_layouts_is_refused(tmp_path):
    with pytest.raises(TypeError, match="must be an array"):
        jax.jit(lambda x: ifjax.save_file({"x": x}, tmp_path / "m.safetensors"))(jnp.ones(3))
    q = packed()
    words = ifjax.Prepacked(q.codes, q.scales, q.amax, "hopper", q.blocking, (6, 40), 2)
    with pytest.raises(TypeError, match=r"save w\.unpack\(\)"):
        ifjax.save_file({"w": words}, tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match=r"must end in \.safetensors"):
        ifjax.save_file({"w": q}, tmp_path / "m.npz")


def test_like_takes_shapes_alone_and_dense_trees(tmp_path):
    tree = some_tree()
    path = ifjax.save_file(tree, tmp_path / "m.safetensors")
    abstract = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), tree)
    assert_same(ifjax.load_file(path, like=abstract), tree)
    dense = {
        "block": {"kernel": jnp.zeros((6, 40)), "bias": jnp.zeros(6)},
        "head": jnp.zeros((4, 64)), "scale": jnp.zeros(5, jnp.bfloat16),
    }  # fmt: skip
    assert_same(ifjax.load_file(path, like=dense), tree)


def test_like_that_differs_is_refused_with_all_differences(tmp_path):
    path = ifjax.save_file(some_tree() | {"x": np.ones(3, np.float32)}, tmp_path / "m.safetensors")
    like = some_tree() | {"y": jnp.ones(1)}
    like["head"] = packed("nvfp4", (4, 64))
    like["block"]["kernel"] = packed(axis=-2)
    like["scale"] = packed()
    with pytest.raises(ValueError) as error:
        ifjax.load_file(path, like=like)
    for part in (
        "'y' is not in the file", "'x' of the file is not in the tree",
        "'head' has fmt mxfp4, and the tree has nvfp4", "'block/kernel' has axis -1, and the tree has -2",
        "'scale' is not packed: bfloat16 (5,)",
    ):  # fmt: skip
        assert part in str(error.value)
    with pytest.raises(ValueError, match=r"is float32 \(3,\), and in the tree float32 \(4,\)"):
        ifjax.load_file(path, like=some_tree() | {"x": jnp.ones(4)})


def test_each_device_reads_its_part(tmp_path):
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    rows = NamedSharding(mesh, PartitionSpec("a"))
    tree = {"w": packed("if4", (8, 64)), "x": np.arange(16, dtype=np.float32)}
    path = ifjax.save_file(tree, tmp_path / "m.safetensors")
    place = ifjax.shardings(tree["w"], rows)
    like = {
        "w": jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), tree["w"], place),
        "x": jax.ShapeDtypeStruct((16,), np.float32, sharding=rows),
    }
    dense = like | {"w": jax.ShapeDtypeStruct((8, 64), np.float32, sharding=rows)}
    for wanted in (like, dense):
        loaded = ifjax.load_file(path, like=wanted)
        assert_same(loaded, tree)
        assert loaded["w"].codes.sharding.is_equivalent_to(rows, 2)
        assert loaded["x"].sharding == rows
    # And back: what is spread over devices is gathered.
    assert ifjax.save_file(loaded, tmp_path / "n.safetensors").read_bytes() == path.read_bytes()


def test_linen_boxes_and_nnx_states_go_there_and_back(tmp_path):
    import flax.linen as nn
    from flax import nnx

    q = packed(names=("in", "out"))
    boxed = {"w": q, "v": nn.Partitioned(jnp.ones(3), names=("out",))}
    path = ifjax.save_file(boxed, tmp_path / "m.safetensors")
    loaded = ifjax.load_file(path, like=boxed)
    assert loaded["v"].names == ("out",) and loaded["w"].names == ("in", "out")
    assert_same(loaded, boxed)
    dense = {"w": nn.Partitioned(jnp.zeros((6, 40)), names=("x", "y")), "v": jnp.ones(3)}
    assert ifjax.load_file(path, like=dense)["w"].names == ("x", "y")

    layer = nnx.Linear(40, 6, rngs=nnx.Rngs(0))
    state = nnx.state(layer)
    q = packed(shape=(40, 6), axis=-2)
    state["kernel"] = ifjax.PackedParam.like(layer.kernel, q)
    path = ifjax.save_file(state, tmp_path / "n.safetensors")
    for like in (nnx.state(layer), state):  # a dense model, and one that was packed before
        loaded = ifjax.load_file(path, like=like)
        assert isinstance(loaded["kernel"], ifjax.PackedParam)
        assert_same(loaded["kernel"].get_raw_value(), q)
        np.testing.assert_array_equal(loaded["bias"].get_value(), layer.bias.get_value())


# --- lazily ----------------------------------------------------------------------------------------------------------


def test_tensors_are_mapped_and_read_when_asked_for(tmp_path):
    big = np.zeros((1 << 22,), np.uint8)
    path = ifjax.save_file({"big": big, "w": packed()}, tmp_path / "m.safetensors")
    tracemalloc.start()
    file = ifjax.open_file(path, check=False)
    a = file["big"]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < big.nbytes / 4
    assert isinstance(a.base, np.ndarray) and not a.flags.writeable and not a.flags.owndata
    assert list(file) == ["big", "w"] and len(file) == 2 and "w" in file and "w.codes" not in file
    assert file["w"].codes.base is not None
    with pytest.raises(KeyError):
        file["w.codes"]


def test_one_damaged_tensor_does_not_keep_others_from_being_read(tmp_path):
    path = ifjax.save_file(some_tree(), tmp_path / "m.safetensors")
    entry = ifjax.open_file(path).entries["block/kernel.codes"]
    data = bytearray(path.read_bytes())
    data[entry.start + 3] ^= 1
    path.write_bytes(data)
    file = ifjax.open_file(path)
    assert_same(file["head"], some_tree()["head"])
    with pytest.raises(FileError, match=r"'block/kernel\.codes' is damaged"):
        file["block/kernel"]
    codes = ifjax.open_file(path, check=False)["block/kernel"].codes
    assert codes[0, 3] == some_tree()["block"]["kernel"].codes[0, 3] ^ 1
    with pytest.raises(FileError, match="is damaged"):
        ifjax.load_file(path)
    ifjax.load_file(path, check=False)


def test_files_of_others_are_read(tmp_path):
    from safetensors.numpy import save_file

    save_file({"a.weight": np.ones((2, 3), np.float32)}, tmp_path / "m.safetensors", metadata={"format": "pt"})
    file = ifjax.open_file(tmp_path / "m.safetensors")
    assert (list(file), file.metadata, file.sums) == (["a.weight"], {"format": "pt"}, {})
    np.testing.assert_array_equal(ifjax.load_file(tmp_path)["a.weight"], np.ones((2, 3)))


# --- several files ---------------------------------------------------------------------------------------------------


def test_shards_and_their_index(tmp_path):
    tree = {f"l{i}": packed(seed=i) for i in range(5)} | {"big": np.zeros(1000, np.float32)}
    path = ifjax.save_file(tree, tmp_path / "m.safetensors", max_shard_bytes=400)
    assert path == tmp_path / "m.safetensors.index.json"
    index = json.loads(path.read_text())
    files = sorted(set(index["weight_map"].values()))
    assert files == [f"m-{i + 1:05}-of-00004.safetensors" for i in range(4)]
    assert sorted(p.name for p in tmp_path.iterdir()) == [*files, "m.safetensors.index.json"]
    assert index["metadata"]["total_size"] == 4000 + 5 * (6 * 27 + 4)
    for i in range(5):  # a tensor's arrays stay together
        assert len({index["weight_map"][f"l{i}.{part}"] for part in ("codes", "scales", "amax")}) == 1
    for name in (path, tmp_path / "m.safetensors", tmp_path):
        assert_same(ifjax.load_file(name), tree)
    second = {name for name in tree if index["weight_map"].get(f"{name}.codes") == files[1]}
    assert set(ifjax.load_file(tmp_path / files[1])) == second


def test_saving_again_takes_new_names_and_then_removes_the_old_files(tmp_path, monkeypatch):
    path = tmp_path / "m.safetensors"
    ifjax.save_file({"a": packed(), "b": packed()}, path, max_shard_bytes=1)
    old = {p.name for p in tmp_path.iterdir()}

    def fail(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:  # before the index is there, the old one and its files are as they were
        patch.setattr(_files, "write_index", fail)
        with pytest.raises(OSError):
            ifjax.save_file({"c": packed(seed=2), "d": packed()}, path, max_shard_bytes=1)
    assert {p.name for p in tmp_path.iterdir()} == old
    assert list(ifjax.open_file(path)) == ["a", "b"]

    ifjax.save_file({"c": packed(seed=2), "d": packed()}, path, max_shard_bytes=1)
    assert list(ifjax.open_file(path)) == ["c", "d"]
    assert len({p.name for p in tmp_path.iterdir()}) == 3
    # One file again, and then several again: a reader always finds the last one.
    ifjax.save_file({"e": packed()}, path)
    assert list(ifjax.open_file(path)) == ["e"]
    ifjax.save_file({"f": packed(), "g": packed()}, path, max_shard_bytes=1)
    assert list(ifjax.open_file(path)) == ["f", "g"]


def test_a_path_of_an_index_asks_for_one(tmp_path):
    path = ifjax.save_file(some_tree(), tmp_path / "m.safetensors.index.json")
    assert path.name == "m.safetensors.index.json"
    assert_same(ifjax.load_file(path), some_tree())


def test_a_folder_with_several_checkpoints_does_not_tell_which(tmp_path):
    with pytest.raises(FileError, match="holds no safetensors file"):
        ifjax.load_file(tmp_path)
    for name in "ab":
        ifjax.save_file(some_tree(), tmp_path / f"{name}.safetensors")
    with pytest.raises(FileError, match=r"holds 2 checkpoints \(a.safetensors, b.safetensors\): name one of them"):
        ifjax.load_file(tmp_path)
    (tmp_path / "b.safetensors").unlink()
    ifjax.save_file(some_tree(), tmp_path / "c.safetensors", max_shard_bytes=1)
    with pytest.raises(FileError, match="holds 2 checkpoints"):  # an index and a file that it does not list
        ifjax.load_file(tmp_path)


def two_tensors(seed):
    return {"a": packed(seed=seed), "b": packed(seed=seed + 1)}


ONE, SHARDS = {}, {"max_shard_bytes": 1}


@pytest.mark.parametrize("name", ["model", "other"])
@pytest.mark.parametrize("saves", list(itertools.product(["one", "shards", "index"], repeat=3)), ids="-".join)
def test_what_was_saved_last_is_what_loads(saves, name, tmp_path):
    path = tmp_path / f"{name}.safetensors"
    for seed, how in enumerate(saves):
        if how == "index" and path.exists():  # only the file itself was asked to be replaced
            with pytest.raises(FileExistsError, match="a checkpoint of its own"):
                ifjax.save_file(two_tensors(seed), f"{path}.index.json")
            path.unlink()
        target = f"{path}.index.json" if how == "index" else path
        saved = ifjax.save_file(two_tensors(seed), target, max_shard_bytes=1 if how == "shards" else None)
        for source in (tmp_path, path, saved):
            assert_same(ifjax.load_file(source), two_tensors(seed))
        files = {"one": 1, "shards": 3, "index": 2}[how]
        assert len(list(tmp_path.iterdir())) == files  # nothing of the older ones is left


def test_a_folder_of_two_standard_checkpoints_is_refused(tmp_path):
    ifjax.save_file(two_tensors(0), tmp_path / "model.safetensors", max_shard_bytes=1)
    ifjax.save_file(two_tensors(4), tmp_path / "x.safetensors")
    (tmp_path / "x.safetensors").rename(tmp_path / "model.safetensors")  # as a crash before the removal leaves it
    with pytest.raises(FileError, match=r"2 checkpoints \(model.safetensors.index.json, model.safetensors\)"):
        ifjax.load_file(tmp_path)
    assert_same(ifjax.load_file(tmp_path / "model.safetensors"), two_tensors(4))


def test_what_ifjax_wrote_beside_the_standard_name_is_another_answer(tmp_path):
    """What other tools keep there is not: Mistral's folders have a consolidated.safetensors."""
    from safetensors.numpy import save_file

    save_file({"a": np.zeros(3, np.float32)}, tmp_path / "consolidated.safetensors")
    save_file({"b": np.zeros(3, np.float32)}, tmp_path / "model.safetensors")
    assert list(ifjax.open_file(tmp_path)) == ["b"]
    for options in (ONE, SHARDS):
        saved = ifjax.save_file(two_tensors(0), tmp_path / "small.safetensors", **options)
        with pytest.raises(FileError, match=r"2 checkpoints .*small"):
            ifjax.load_file(tmp_path)
        assert_same(ifjax.load_file(saved), two_tensors(0))


def test_parts_without_their_index_are_no_checkpoint(tmp_path):
    saved = ifjax.save_file(two_tensors(0), tmp_path / "m.safetensors", max_shard_bytes=1)
    saved.unlink()
    shards = sorted(tmp_path.iterdir())
    for shard in shards[:1]:
        with pytest.raises(FileError, match=r"parts of a checkpoint, such as m-0000\d-of-00002\.safetensors"):
            ifjax.load_file(tmp_path)
        shard.unlink()
    with pytest.raises(FileError, match="and no index of them"):
        ifjax.load_file(tmp_path)
    shards[1].rename(tmp_path / "m-00001-of-00001.safetensors")
    assert list(ifjax.open_file(tmp_path)) == ["b"]


def foreign(folder, *names):
    """Files of another writer, with an index that lists them."""
    from safetensors.numpy import save_file

    weight_map = {}
    for i, name in enumerate(names):
        save_file({f"t{i}": np.full(3, i, np.float32)}, folder / name, {"format": "pt"})
        weight_map[f"t{i}"] = name
    (folder / "m.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("target", ["m.safetensors", "m.safetensors.index.json"])
@pytest.mark.parametrize("names", [
    ("m-00001-of-00002.safetensors", "m-00002-of-00002.safetensors"), ("m.safetensors",), ("thesis.safetensors",),
    ("m-00001-of-00001.safetensors", "thesis.safetensors"),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("options", [ONE, SHARDS], ids=str)
def test_files_of_other_writers_are_not_removed(names, target, options, tmp_path):
    before = foreign(tmp_path, *names)
    with pytest.raises(FileExistsError, match=r"which ifjax has not written|a checkpoint of its own"):
        ifjax.save_file(two_tensors(0), tmp_path / target, **options)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_an_index_of_ours_that_lists_other_files_removes_none_of_them(tmp_path):
    index = ifjax.save_file(two_tensors(0), tmp_path / "m.safetensors", max_shard_bytes=1)
    ifjax.save_file({"c": packed()}, tmp_path / "mine.safetensors")  # ours, but no shard
    listed = json.loads(index.read_text())
    listed["weight_map"]["c.codes"] = "mine.safetensors"
    index.write_text(json.dumps(listed))
    for target in (index, tmp_path / "m.safetensors"):
        with pytest.raises(FileExistsError, match=r"mine\.safetensors"):
            ifjax.save_file(two_tensors(2), target)
    assert len(list(tmp_path.iterdir())) == 4


def test_a_file_beside_a_broken_index_is_refused(tmp_path):
    (tmp_path / "m.safetensors.index.json").write_text("{")
    with pytest.raises(FileExistsError, match="index is broken"):
        ifjax.save_file(two_tensors(0), tmp_path / "m.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["m.safetensors.index.json"]


@pytest.mark.parametrize(
    "name",
    ["../secret.safetensors", "/etc/secret.safetensors", "a/../../secret.safetensors", "..\\secret.safetensors",
     "C:x.safetensors", "", ".", "..", "secret", "secret.safetensors\0", "x\n.safetensors", 3, None, ["a"]],
)  # fmt: skip
def test_an_index_names_files_of_its_own_folder(name, tmp_path):
    ifjax.save_file(some_tree(), tmp_path / "secret.safetensors")
    folder = tmp_path / "model"
    folder.mkdir()
    index = folder / "m.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"head.codes": name}}))
    with pytest.raises(FileError, match="an index names files of its own folder"):
        ifjax.load_file(index)
    # Nor is anything outside removed when the index is replaced.
    ifjax.save_file({"a": packed()}, index)
    assert (tmp_path / "secret.safetensors").exists()


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "is not JSON"), ("[" * 100_000, "is not JSON"), ('{"weight_map": ' + "9" * 10_000 + "}", "is not JSON"),
        ("\xff", "is not JSON"), ("[]", "no index"), ("{}", "no index"), ('{"weight_map": {}}', "no index"),
        ('{"weight_map": [1]}', "no index"),
    ],
    ids=str,
)  # fmt: skip
def test_a_broken_index_is_an_error(text, message, tmp_path):
    index = tmp_path / "m.safetensors.index.json"
    index.write_bytes(text.encode("latin-1"))
    with pytest.raises(FileError, match=message):
        ifjax.load_file(index)


def test_an_index_and_its_files_must_agree(tmp_path):
    path = ifjax.save_file({"a": packed(), "b": packed()}, tmp_path / "m.safetensors", max_shard_bytes=1)
    index = json.loads(path.read_text())

    def broken(change):
        new = json.loads(json.dumps(index))
        change(new["weight_map"])
        path.write_text(json.dumps(new))
        return path

    with pytest.raises(FileError, match=r"the file lacks 'c.codes'"):
        ifjax.open_file(broken(lambda m: m.update({"c.codes": m["a.codes"]})))
    with pytest.raises(FileError, match=r"the file also holds 'a.codes'"):
        ifjax.open_file(broken(lambda m: m.pop("a.codes")))
    with pytest.raises(FileNotFoundError):
        ifjax.open_file(broken(lambda m: m.update({"a.codes": "none.safetensors"})))


# --- whole or not at all ---------------------------------------------------------------------------------------------

KILLED = """
import os, random, signal, sys, time
import numpy as np
import ifjax
from pathlib import Path


def tree(version):
    return {f"l{i}": np.full(16_000, version, np.int32) for i in range(4)}

def version():
    loaded = dict(ifjax.open_file(path))  # as they are in the file: no device is started, so fork is harmless
    versions = {int(v) for a in loaded.values() for v in np.unique(a)}
    assert len(versions) == 1 and len(loaded) == 4, versions
    return versions.pop()

for kind, options in ("single", {}), ("sharded", {"max_shard_bytes": 70_000}):
    path = Path(sys.argv[1]) / f"{kind}.safetensors"
    started = time.perf_counter()
    for i in range(5):
        ifjax.save_file(tree(0), path, **options)
    longest = 1.5 * (time.perf_counter() - started) / 5
    rng, seen, cut = random.Random(0), set(), 0
    for attempt in range(50):
        before, now = version(), attempt + 1
        child = os.fork()
        if child == 0:
            ifjax.save_file(tree(now), path, **options)
            os._exit(0)
        time.sleep(rng.uniform(0, longest))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        cut += os.WIFSIGNALED(status)
        after = version()
        assert after in (before, now), (before, after, now)
        seen.add(after == now)
        # However busy the machine is, about half of the writers are killed at work.
        longest *= 0.8 if after == now else 1.25
    print(kind, len(seen), cut)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_kill_at_any_moment_leaves_the_old_or_the_new(tmp_path):
    command = [sys.executable, "-c", KILLED, str(tmp_path)]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    for line in ran.stdout.splitlines():
        _, seen, cut = line.split()
        # Some of the 50 writers were killed before the new checkpoint was there, some after, and many at work.
        assert int(seen) == 2 and int(cut) >= 10, ran.stdout


@contextlib.contextmanager
def file_limit(size):
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("reserve", [True, False])
def test_a_full_disk_leaves_the_old_file_and_nothing_else(reserve, tmp_path, monkeypatch):
    path = ifjax.save_file(some_tree(), tmp_path / "m.safetensors")
    old = path.read_bytes()
    if not reserve:  # as on file systems that cannot: the error comes while writing
        monkeypatch.setattr(_files, "_reserve", lambda file, size: None)
    for options in ({}, {"max_shard_bytes": 150_000}):
        with file_limit(300_000), pytest.raises(OSError, match="too large"):
            ifjax.save_file({"a": np.ones(30_000, np.float32), "b": np.ones(100_000, np.float32)}, path, **options)
        assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]
        assert path.read_bytes() == old


def test_an_error_in_the_middle_leaves_the_old_file_and_nothing_else(tmp_path):
    path = ifjax.save_file(some_tree(), tmp_path / "m.safetensors")
    old = path.read_bytes()

    def fill(write):
        write("a", np.ones(2, np.float32))
        raise KeyboardInterrupt

    item = checkpoint.Item("a", (_files.Slot("a", "F32", (4,)),), None, fill)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.write_items(path, [item])
    for values in (3, 5):  # too few, too many
        item = item._replace(fill=lambda write, values=values: write("a", np.ones(values, np.float32)))
        with pytest.raises(RuntimeError, match=r"not written whole|more bytes"):
            checkpoint.write_items(path, [item])
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]
    assert path.read_bytes() == old


def test_files_are_synced_before_they_are_renamed_and_the_folder_after(tmp_path, monkeypatch):
    calls = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, name=name, real=real: (calls.append(name), real(*a))[1])
    ifjax.save_file(some_tree(), tmp_path / "m.safetensors")
    assert calls == ["fsync", "replace", "fsync"]


def test_links_stay_links_and_devices_are_not_replaced(tmp_path):
    path = ifjax.save_file(some_tree(), tmp_path / "real.safetensors")
    path.chmod(0o600)
    link = tmp_path / "link.safetensors"
    link.symlink_to(path)
    ifjax.save_file({"a": packed()}, link)
    assert link.is_symlink() and list(ifjax.open_file(path)) == ["a"]
    assert path.stat().st_mode & 0o777 == 0o600
    link.unlink()
    # But an index is put beside its files, and what a linked one named is left alone.
    (tmp_path / "other").mkdir()
    index = ifjax.save_file({"b": packed()}, tmp_path / "other" / "link.safetensors.index.json")
    (tmp_path / "link.safetensors.index.json").symlink_to(index)
    ifjax.save_file({"c": packed()}, tmp_path / "link.safetensors.index.json")
    assert list(ifjax.open_file(index)) == ["b"]
    assert list(ifjax.open_file(tmp_path / "link.safetensors.index.json")) == ["c"]
    fifo = tmp_path / "fifo.safetensors"
    os.mkfifo(fifo)
    with pytest.raises(OSError, match="no plain file"):
        ifjax.save_file(some_tree(), fifo)
    with pytest.raises(FileError, match="no plain file"):  # and does not wait for a writer
        ifjax.load_file(fifo)
    with pytest.raises(FileNotFoundError, match="create it first"):
        ifjax.save_file(some_tree(), tmp_path / "none" / "m.safetensors")


# --- damage ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    tree = {"head": packed("mxfp4", (4, 64)), "scale": np.arange(5, dtype=np.float16)}  # a short header: it is fuzzed
    return ifjax.save_file(tree, tmp_path_factory.mktemp("good") / "m.safetensors").read_bytes()


def read_all(path):
    """Every byte, as load_file does, without devices."""
    file = ifjax.open_file(path)
    return {name: file[name] for name in file}


def assert_found(data, path, why=""):
    path.write_bytes(data)
    with pytest.raises(FileError) as error:
        read_all(path)
    assert "m.safetensors" in str(error.value), why


def test_every_damaged_byte_of_the_header_is_found(good, tmp_path):
    rng, path = random.Random(0), tmp_path / "m.safetensors"
    for at in range(8 + int.from_bytes(good[:8], "little")):
        data = bytearray(good)
        data[at] ^= rng.choice([1 << rng.randrange(8), rng.randrange(1, 256)])
        assert_found(data, path, (at, data[at]))


def test_every_one_of_1000_random_flips_is_found(good, tmp_path):
    rng, path = random.Random(1), tmp_path / "m.safetensors"
    for _ in range(1000):
        data = bytearray(good)
        at = rng.randrange(len(good))
        data[at] ^= 1 << rng.randrange(8)
        assert_found(data, path, at)


def test_every_truncation_is_found(good, tmp_path):
    path = tmp_path / "m.safetensors"
    for size in sorted({*range(0, 40), *range(40, len(good), 13), len(good) - 1}):
        assert_found(good[:size], path, size)
    assert_found(good + b"\0", path)


def a_file(header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


@pytest.mark.parametrize(
    "data",
    [
        a_file(b"{}", length=2**63), a_file(b"{}", length=2**64 - 1), a_file(b"{}", length=10**8 + 1),
        a_file(b"{}", length=10**9), a_file(b"", length=0), a_file(b"[]"), a_file(b"{\xff}"),
        a_file(b'{"a":' * 100_000), a_file(b"[" * 1_000_000), a_file(b'{"a": ' + b"9" * 10_000 + b"}"),
        a_file({"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}),
        a_file({"a": {"dtype": "F32", "shape": [2**62, 8], "data_offsets": [0, 0]}}),
        a_file({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, b"1234"),
        a_file({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}, b"1234"),
        a_file({"a": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}}, b"1234"),
        a_file({name: {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]} for name in "ab"}, b"1234"),
        a_file({"a": {"dtype": "U8", "shape": [2**63, 0, 2**63], "data_offsets": [0, 0]}}),
        a_file({"__metadata__": {"ifjax": 3}}),
    ],
    ids=lambda data: "",
)  # fmt: skip
def test_absurd_headers_are_refused_without_taking_memory(data, tmp_path):
    path = tmp_path / "m.safetensors"
    path.write_bytes(data)
    tracemalloc.start()
    try:
        with pytest.raises(FileError, match=r"m\.safetensors"):
            read_all(path)
        assert tracemalloc.get_traced_memory()[1] < 30 * len(data) + 2**20
    finally:
        tracemalloc.stop()


def lying(change):
    """A file whose checksums are right and whose metadata are not: made by someone, not by chance."""
    from safetensors.numpy import load, save

    def make(good):
        arrays = load(good)
        own = json.loads(json.loads(good[8 : 8 + int.from_bytes(good[:8], "little")])["__metadata__"]["ifjax"])
        change(own, arrays)
        fields = {"ifjax": json.dumps(own)}
        shapes = {k: (_files.CODES[v.dtype.name], v.shape) for k, v in arrays.items()}
        return save(arrays, fields | {"ifjax.checksum": checkpoint._seal(shapes, fields)})

    return make


def tensor(**fields):
    return lying(lambda own, arrays: own["tensors"]["head"].update(fields))


def table(**fields):
    return {"name": "mine", "values": [0, 1, 2, 3]} | fields


def grid(**fields):
    return {"grid": {"name": "mine", "values": [0, 1, 2, -1]} | fields}


def record(**fields):
    return lying(lambda own, arrays: own["formats"]["mxfp4"].update(fields))


@pytest.mark.parametrize(
    "make",
    [
        tensor(shape=[4, 2**40]), tensor(shape=[2**70, 64]), tensor(shape=[-4, 64]), tensor(shape=["4", 64]),
        tensor(shape=[]), tensor(axis=0), tensor(axis=-3), tensor(axis=True), tensor(axis="last"), tensor(headroom=0),
        tensor(headroom="x"), tensor(headroom=float("nan")), tensor(dtype="object"), tensor(dtype=["float32"]),
        tensor(block_2d=1), tensor(fmt="none"), tensor(fmt=[]), tensor(names=3), tensor(names=[{}]), record(block=0),
        record(block=2**60), record(block="x"), record(scale="mine"), record(candidates=[]), record(candidates=3),
        record(peak=-1), record(name=None), record(tensor_peak=-1), record(ties="x"), record(prevent_zero=[]),
        record(saturates={}), record(scale={}), record(scale=table(values=[])), record(scale=table(values=[1, 0])),
        record(scale=table(nan=0)), record(scale=table(name=[])), record(extra=1),
        record(candidates=[{"grid": "E2M1"}]), record(candidates=[grid(values=[1, 2])]),
        record(candidates=[grid(unused=[9])]), record(candidates=[grid(values=["0", "1"])]),
        lying(lambda own, arrays: own.pop("layout")), lying(lambda own, arrays: own.update(tensors=[])),
        lying(lambda own, arrays: own.update(formats=None)), lying(lambda own, arrays: own["crc32"].pop("scale")),
        lying(lambda own, arrays: own["crc32"].update(scale="zz")), lying(lambda own, arrays: own.update(layout="2")),
        lying(lambda own, arrays: (arrays.pop("head.scales"), own["crc32"].pop("head.scales"))),
        lying(lambda own, arrays: arrays.update({"head.codes": arrays["head.codes"].astype(np.int8)})),
        lying(lambda own, arrays: (arrays.update(head=np.ones(1)), own["crc32"].update(head="0"))),
    ],
    ids=lambda make: "",
)  # fmt: skip
def test_metadata_that_lie_are_refused(make, good, tmp_path):
    path = tmp_path / "m.safetensors"
    path.write_bytes(lying(lambda own, arrays: None)(good))
    assert_same(read_all(path), read_all_good(good, tmp_path))  # written by another program, and still right
    path.write_bytes(make(good))
    with pytest.raises(FileError, match=r"m\.safetensors"):
        read_all(path)


def read_all_good(good, folder):
    (folder / "good.safetensors").write_bytes(good)
    return read_all(folder / "good.safetensors")


def test_nothing_is_pickled():
    for name in (ROOT / "ifjax").rglob("*.py"):
        source = name.read_text(encoding="utf-8")
        for word in ("import pickle", r"pickle\.load", "allow_pickle=True", r"np\.load\(", r"\b(eval|exec)\("):
            assert not re.search(word, source), (name, word)


# --- Orbax -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def orbax():
    return pytest.importorskip("orbax.checkpoint")


def orbax_tree():
    w = packed("if4", (8, 64), amax_shape=(8,), names=("a", None))
    return {"l": [{"w": w}, jnp.arange(16.0)], "m": packed("mxfp4", (8, 64), seed=1)}


def test_orbax_restores_without_a_target_and_with_one(orbax, tmp_path):
    tree = jax.tree.map(jnp.asarray, orbax_tree())
    orbax_files.save_orbax(tree, tmp_path / "1")
    assert_same(orbax_files.load_orbax(tmp_path / "1"), tree)
    abstract = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), tree)
    for like in (tree, abstract):
        assert_same(orbax_files.load_orbax(tmp_path / "1", like=like), tree)
    with pytest.raises(ValueError, match="exist"):
        orbax_files.save_orbax(tree, tmp_path / "1")


def test_orbax_restores_under_another_sharding(orbax, tmp_path):
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    one, other = (NamedSharding(mesh, PartitionSpec(*spec)) for spec in (("a", "b"), ("b",)))
    tree = jax.tree.map(jnp.asarray, orbax_tree())
    tree["m"] = ifjax.device_put(tree["m"], NamedSharding(mesh, PartitionSpec("a")))
    tree["l"][0]["w"] = ifjax.device_put(tree["l"][0]["w"], one)
    orbax_files.save_orbax(tree, tmp_path / "1")
    like = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), tree)
    place = ifjax.shardings(tree["l"][0]["w"], other)
    w = like["l"][0]["w"]
    like["l"][0]["w"] = jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), w, place)
    loaded = orbax_files.load_orbax(tmp_path / "1", like=like)
    assert_same(loaded, tree)
    assert loaded["l"][0]["w"].codes.sharding.is_equivalent_to(other, 2)
    assert loaded["l"][0]["w"].amax.sharding.is_equivalent_to(NamedSharding(mesh, PartitionSpec("b")), 1)
    assert len(loaded["m"].codes.sharding.device_set) == 1


def test_orbax_bytes_of_one_format_do_not_pass_for_another(orbax, tmp_path):
    tree = {"w": packed("nvfp4", (8, 64))}
    orbax_files.save_orbax(tree, tmp_path / "1")
    with pytest.raises(ValueError, match="'w' differ in format"):
        orbax_files.load_orbax(tmp_path / "1", like={"w": packed("if4", (8, 64))})
    with pytest.raises(ValueError, match="'w' differ in format"):
        orbax_files.load_orbax(tmp_path / "1", like={"w": jnp.ones((8, 64))})
    with orbax.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "2", tree)
    with pytest.raises(ValueError, match=r"save it by ifjax\.checkpoint\.save_orbax"):
        orbax_files.load_orbax(tmp_path / "2")


def test_a_description_makes_qtensors_of_what_orbax_restores_alone(orbax, tmp_path):
    tree = jax.tree.map(jnp.asarray, orbax_tree())
    description = json.loads(json.dumps(orbax_files.describe(tree)))
    with orbax.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "1", tree)
    with orbax.StandardCheckpointer() as checkpointer:
        assert_same(orbax_files.rebuild(checkpointer.restore(tmp_path / "1"), description), tree)
        assert_same(checkpointer.restore(tmp_path / "1", tree), tree)  # Orbax's own way, with a target
    with pytest.raises(ValueError, match="lacks 'l/0/w', 'm' of the description"):
        orbax_files.rebuild({}, description)
    with pytest.raises(ValueError, match="not a description"):
        orbax_files.rebuild({}, {"layout": 1})


def test_a_file_that_is_replaced_while_open_is_told(tmp_path):
    """Its header says where the old arrays were: what lies there now is something else."""
    old, new = {"a": np.arange(6.0, dtype=np.float32)}, {"b": np.ones(3, np.float32), "a": np.zeros(6, np.float32)}
    path = ifjax.save_file(old, tmp_path / "m.safetensors")
    opened, mapped = ifjax.open_file(path, check=False), ifjax.open_file(path)
    np.testing.assert_array_equal(mapped["a"], old["a"])
    ifjax.save_file(new, path)
    with pytest.raises(FileError, match="changed since it was opened: open it again"):
        opened["a"]
    with pytest.raises(FileError, match="changed since it was opened: open it again"):
        opened.reader("a")
    np.testing.assert_array_equal(mapped["a"], old["a"])  # was mapped in time: the old file lives as long as the map
    np.testing.assert_array_equal(ifjax.open_file(path)["a"], new["a"])


def test_a_file_that_is_replaced_while_its_header_is_read_is_read_again(tmp_path, monkeypatch):
    from ifjax.files import safetensors as files

    path = ifjax.save_file({"a": np.zeros(2, np.float32)}, tmp_path / "m.safetensors")
    read, count = files.read_header, []

    def slowly(path):
        header = read(path)
        if not count:
            count.append(ifjax.save_file({"longer": np.ones((9, 9), np.float32)}, path))
        return header

    monkeypatch.setattr(files, "read_header", slowly)
    assert list(ifjax.open_file(path)) == ["longer"]
    np.testing.assert_array_equal(ifjax.open_file(path)["longer"], np.ones((9, 9)))
