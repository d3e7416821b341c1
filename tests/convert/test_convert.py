"""From file to file: the bytes of `quantize` by pieces, and back; what rules make of names; memory."""

import dataclasses
import math
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import oracle
import pytest
from test_checkpoint import HALVES, LAYOUT_1, PLAIN_1, WRITTEN_1, assert_same, packed, register_halves

import ifjax
from ifjax import FORMATS, Rule, convert
from ifjax.convert import Plan, dequantize_file, plan, quantize_file, verify
from ifjax.files import FileError
from ifjax.files import pieces as _pieces
from ifjax.files import safetensors as _files

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    """So that small tensors are cut, and all tests share a program for each format."""
    monkeypatch.setattr(_pieces, "PIECE", 512)


def normal(*shape, seed=0, dtype=np.float32):
    return np.random.default_rng(seed).standard_normal(shape, np.float32).astype(dtype)


def write(folder, tensors, name="model.safetensors"):
    return ifjax.save_file(tensors, folder / name)


def pack(codes, bits):
    """uint8 [r, whole bytes] of codes [r, n], low bits first: the definition, bit by bit."""
    spread = np.unpackbits(codes[..., None], axis=-1, bitorder="little")[..., :bits]
    flat = spread.reshape(len(codes), -1)
    filled = -flat.shape[1] % math.lcm(8, bits)
    return np.packbits(np.pad(flat, ((0, 0), (0, filled))), axis=-1, bitorder="little")


def expected(x, fmt, axis, block_2d=False):
    """(codes, scales, amax) of a matrix, by the model of the formats that shares nothing with the library."""
    x = x.astype(np.float32)
    turned = x if axis == -1 else x.T
    r, c = turned.shape
    block = FORMATS[fmt].block
    filled = np.pad(turned, ((0, -r % block if block_2d else 0), (0, -c % block)))
    result = oracle.quantize(filled, fmt, block_2d=block_2d)
    assert not result.ambiguous.any()
    codes, scales = pack(result.codes[:r], FORMATS[fmt].bits), result.scales[:r]
    return (codes, scales, result.amax) if axis == -1 else (codes.T, scales.T, result.amax)


@pytest.mark.parametrize(
    "fmt, axis, shape, dtype",
    [
        ("if4", -1, (6, 256), np.float32),  # rows of whole blocks: cut anywhere
        ("if4", -1, (37, 41), np.float32),  # rows that are filled up, a few at a time
        ("if4", -1, (3, 1000), np.float16),  # rows longer than a piece
        ("if4", -2, (50, 41), ml_dtypes.bfloat16),  # turned
        ("if4", -2, (20, 300), np.float32),  # a block of rows is longer than a piece
        ("mxfp4", -1, (5, 70), np.float64),
        ("mxfp4", -2, (200, 5), np.float32),  # the last rows are fewer
        pytest.param("if3", -1, (13, 100), np.float32, marks=pytest.mark.slow),
        pytest.param("if3", -2, (100, 13), ml_dtypes.bfloat16, marks=pytest.mark.slow),
        pytest.param("if6_e2m3", -1, (13, 100), np.float32, marks=pytest.mark.slow),
        pytest.param("fouroversix", -1, (13, 100), np.float32, marks=pytest.mark.slow),
    ],
)
def test_pieces_have_the_bytes_of_the_whole(fmt, axis, shape, dtype, tmp_path):
    x = normal(*shape, dtype=dtype)
    source = write(tmp_path, {"w": x})
    report = quantize_file(source, tmp_path / "q.safetensors", Rule("w", fmt), axis=axis)
    file = ifjax.open_file(tmp_path / "q.safetensors")
    q, (codes, scales, amax) = file["w"], expected(x, fmt, axis)
    assert (q.shape, q.axis, q.dtype, q.fmt, q.headroom) == (shape, axis, x.dtype, FORMATS[fmt], 1.0)
    np.testing.assert_array_equal(q.codes, codes)
    np.testing.assert_array_equal(q.scales, scales)
    if q.amax is not None:
        np.testing.assert_array_equal(q.amax, amax)

    dequantize_file(file, tmp_path / "d.safetensors")
    decoded = ifjax.open_file(tmp_path / "d.safetensors")["w"]
    rows = np.moveaxis(x, axis, -1).astype(np.float32)
    result = oracle.quantize(np.pad(rows, ((0, 0), (0, -shape[axis] % q.fmt.block))), fmt)
    values = oracle.dequantize(result.codes, result.scales, result.amax, fmt)[:, : shape[axis]]
    values = np.moveaxis(values, -1, axis)
    np.testing.assert_array_equal(decoded, values.astype(dtype))

    (entry,) = report.entries
    exact, error = x.astype(np.float64), x.astype(np.float64) - values
    assert entry.sqnr_db == pytest.approx(10 * np.log10((exact**2).sum() / (error**2).sum()), abs=1e-4)
    assert entry.bytes_after == sum(file.entries[name].nbytes for name in file.parts("w").values())
    share = (scales >= 0x80).mean() if q.fmt.has_selector else None
    assert entry.choice_share == (None if share is None else pytest.approx(share))
    (found,) = verify(file, ifjax.open_file(source))
    assert found.fault is None and found.sqnr_db == pytest.approx(entry.sqnr_db, abs=1e-4)


def test_each_matrix_of_a_stack_keeps_its_own_amax(tmp_path):
    x = normal(2, 3, 8, 32) * np.arange(1, 7).reshape(2, 3, 1, 1).astype(np.float32)
    source = write(tmp_path, {"experts.w": x})
    quantize_file(source, tmp_path / "q.safetensors", "mxfp4", measured=False)
    assert ifjax.open_file(tmp_path / "q.safetensors")["experts.w"].amax is None
    quantize_file(source, tmp_path / "q.safetensors", "if4", measured=False)
    file = ifjax.open_file(tmp_path / "q.safetensors")
    q = file["experts.w"]
    np.testing.assert_array_equal(q.amax, np.abs(x).max((-1, -2)))
    for i in np.ndindex(2, 3):
        codes, scales, _ = expected(x[i], "if4", -1)
        np.testing.assert_array_equal(q.codes[i], codes)
        np.testing.assert_array_equal(q.scales[i], scales)
    dequantize_file(file, tmp_path / "d.safetensors", dtype="float64")
    decoded = ifjax.open_file(tmp_path / "d.safetensors")["experts.w"]
    np.testing.assert_array_equal(decoded, np.asarray(jax.tree.map(np.asarray, q).dequantize()))
    assert decoded.dtype == np.float64


@pytest.mark.slow
@pytest.mark.parametrize("axis", [-2])
@pytest.mark.parametrize(
    "rule",
    [
        {"weight_fmt": "if4", "block_2d": True}, {"weight_fmt": "fouroversix", "search": "fast"},
        {"weight_fmt": "nvfp3", "block": 5, "loss": "mae"},
    ],
    ids=lambda rule: " ".join(rule),
)  # fmt: skip
def test_what_rules_ask_for_is_done_by_pieces_as_on_the_whole(rule, axis, tmp_path):
    tensors = {"a": normal(37, 64), "b": normal(50, 41, seed=1), "c": normal(2, 40, 48, seed=2)}
    rule = Rule(".*", **rule)
    quantize_file(write(tmp_path, tensors), tmp_path / "q.safetensors", rule, axis=axis)
    file = ifjax.open_file(tmp_path / "q.safetensors")
    for name, x in tensors.items():
        options = {"search": rule.search, "loss": rule.loss, "block_2d": rule.block_2d}
        q = ifjax.quantize(x, rule.weight_format, axis=axis, amax_axes=tuple(range(x.ndim - 2)), **options)
        assert jax.tree.structure(file[name]) == jax.tree.structure(q)
        for a, b in zip(jax.tree.leaves(file[name]), jax.tree.leaves(q), strict=True):
            np.testing.assert_array_equal(_files.as_bytes(a), _files.as_bytes(np.asarray(b)))
        dequantize_file(file, tmp_path / "d.safetensors")
        np.testing.assert_array_equal(ifjax.open_file(tmp_path / "d.safetensors")[name], q.dequantize())


@pytest.mark.slow
@pytest.mark.parametrize("axis", [-1, -2])
def test_headers_of_two_bytes_and_runs_are_done_by_pieces_as_on_the_whole(axis, tmp_path, monkeypatch):
    register_halves(monkeypatch)
    tensors = {"a": normal(40, 64), "b": normal(50, 41, seed=1), "c": normal(2, 40, 48, seed=2)}
    source = write(tmp_path, tensors)
    report = quantize_file(source, tmp_path / "q.safetensors", Rule(".*", HALVES), axis=axis)
    file = ifjax.open_file(tmp_path / "q.safetensors")
    dequantize_file(file, tmp_path / "d.safetensors")
    decoded = ifjax.open_file(tmp_path / "d.safetensors")
    for entry in report.entries:
        x = tensors[entry.path]
        q = ifjax.quantize(x, HALVES, axis=axis)
        assert_same(file[entry.path], q)
        np.testing.assert_array_equal(decoded[entry.path], q.dequantize())
        share = float(np.mean(np.asarray(q.choices()) > 0))
        assert 0 < share < 1 and entry.choice_share == pytest.approx(share)
        assert entry.bits_per_value == q.bits_per_value
        exact, error = x.astype(np.float64), np.asarray(q.dequantize(), np.float64) - x
        assert entry.sqnr_db == pytest.approx(10 * np.log10((exact**2).sum() / (error**2).sum()), abs=1e-4)
    assert [v for v in verify(file, ifjax.open_file(source)) if v.fault is not None] == []


@pytest.mark.parametrize("bits, nbytes", [(7, 1), (12, 2), (6, 2), (9, 3), (22, 3)])
def test_choices_are_counted_wherever_the_selector_lies(bits, nbytes):
    scale = dataclasses.replace(HALVES.scale, bits=bits, nbytes=nbytes, runs=(), nan=2**bits - 1, top=2**bits - 2)
    fmt = dataclasses.replace(HALVES, scale=scale)
    rng = np.random.default_rng(0)
    selectors, payloads = rng.integers(0, 2, (3, 5)), rng.integers(0, 2**bits, (3, 5))
    headers = selectors << bits | payloads
    scales = np.stack([headers >> 8 * i & 0xFF for i in range(nbytes)], -1).astype(np.uint8).reshape(3, 5 * nbytes)
    for axis, array in ((-1, scales), (-2, scales.T)):
        np.testing.assert_array_equal(_pieces.chosen(array, fmt, axis), np.bincount(selectors.reshape(-1)))


def test_files_of_layout_1_are_dequantized_and_verified_by_pieces(tmp_path):
    file = ifjax.open_file(LAYOUT_1 / "one.safetensors")
    assert [v for v in verify(file) if v.fault is not None] == []
    dequantize_file(file, tmp_path / "d.safetensors")
    decoded = ifjax.open_file(tmp_path / "d.safetensors")
    assert set(decoded) == {*WRITTEN_1, *PLAIN_1}
    for name, (q, values) in WRITTEN_1.items():
        np.testing.assert_array_equal(decoded[name], values.astype(q.dtype), err_msg=name)
    for name, values in PLAIN_1.items():
        np.testing.assert_array_equal(decoded[name], values)
    assert convert.contents(file).totals.quantized == len(WRITTEN_1)


def test_a_report_that_an_earlier_version_wrote_is_read(tmp_path):
    report = quantize_file(write(tmp_path, {"w": normal(4, 64)}), tmp_path / "q.safetensors", Rule("w", "if4"))
    assert report.entries[0].choice_share is not None
    old = report.to_json().replace('"choice_share"', '"int_share"')
    assert '"int_share"' in old and ifjax.Report.from_json(old) == report == ifjax.Report.from_json(report.to_json())


@pytest.mark.slow
def test_any_packed_tensor_is_dequantized_by_pieces(tmp_path):
    """Those that no file was converted to: a single axis, an amax for each row or layer, other axes, headroom."""
    tree = {
        "vector": packed(shape=(50,)), "rows": packed(shape=(20, 3, 40), amax_shape=(20,)),
        "shared": packed(shape=(2, 3, 40), amax_shape=(1, 3)),
        "front": packed(shape=(40, 3, 2), axis=-3, headroom=16 / 17),
        "behind": packed(shape=(2, 32, 3), axis=-2, amax_shape=(1, 1, 3)), "empty": packed(shape=(0, 32)),
        "layers": packed(shape=(2, 40, 3), axis=-2, amax_shape=(2,), dtype="bfloat16"),
    }  # fmt: skip
    source = write(tmp_path, tree)
    dequantize_file(source, tmp_path / "d.safetensors")
    file = ifjax.open_file(tmp_path / "d.safetensors")
    for name, q in tree.items():
        np.testing.assert_array_equal(file[name], np.asarray(q.dequantize()), err_msg=name)


def test_amax_is_that_of_finite_values_in_float32():
    for dtype in (np.float32, np.float16, np.float64, ml_dtypes.bfloat16):
        x = normal(3000, dtype=dtype)
        x[2900] = -5
        for value in (np.nan, -np.nan, np.inf, -np.inf):
            x[17] = value
            assert _pieces.amax_of(lambda start, count, x=x: x[start : start + count], x.size) == 5
    zeros = np.zeros(4, np.float32)
    assert _pieces.amax_of(lambda start, count: zeros[:count], 4) == 0
    beyond = np.array([1.0, 1e300])
    assert _pieces.amax_of(lambda start, count: beyond[:count], 2) == 1


def test_values_that_are_not_finite_stay_in_their_block_and_are_told(tmp_path):
    x = normal(4, 64)
    x[1, 20] = np.inf
    source = write(tmp_path, {"w": x})
    report = quantize_file(source, tmp_path / "q.safetensors", Rule("w", "mxfp4"))
    assert math.isnan(report.entries[0].sqnr_db)
    with pytest.raises(ValueError, match="not finite"):
        report.check()
    dequantize_file(tmp_path / "q.safetensors", tmp_path / "d.safetensors")
    bad = np.isnan(ifjax.open_file(tmp_path / "d.safetensors")["w"])
    assert bad.sum() == 32 and bad[1, :32].all()
    (found,) = verify(ifjax.open_file(tmp_path / "q.safetensors"), ifjax.open_file(source))
    assert "SQNR of nan dB" in found.fault


# --- names and rules -------------------------------------------------------------------------------------------------


def model(folder):
    tensors = {
        "embed_tokens.weight": normal(64, 32), "layers.0.q_proj.weight": normal(32, 64, seed=1),
        "layers.0.q_proj.bias": normal(32), "layers.10.q_proj.weight": normal(32, 64, seed=2),
        "layers.2.q_proj.weight": normal(32, 64, seed=3), "norm.weight": normal(64), "lm_head.weight": normal(64, 32),
        "ids": np.arange(128).reshape(2, 64), "short.weight": normal(64, 8),
        "half.weight": normal(32, 64, dtype=np.float16),
    }  # fmt: skip
    return write(folder, tensors)


def test_a_formats_name_leaves_embeddings_heads_and_what_is_no_matrix(tmp_path):
    work = plan(model(tmp_path), "mxfp4")
    assert isinstance(work, Plan)
    by_name = {task.stored.name: task for task in work.tasks}
    assert list(by_name)[4:7] == ["layers.0.q_proj.weight", "layers.2.q_proj.weight", "layers.10.q_proj.weight"]
    assert {name for name, task in by_name.items() if task.decision.weights is not None} == {
        "layers.0.q_proj.weight", "layers.2.q_proj.weight", "layers.10.q_proj.weight", "half.weight",
    }  # fmt: skip
    reasons = {name: task.decision.reason for name, task in by_name.items() if task.decision.weights is None}
    assert reasons["layers.0.q_proj.bias"] == "a bias" and reasons["norm.weight"] == "a norm"
    assert reasons["embed_tokens.weight"] == "embeddings stay, by default"
    assert reasons["lm_head.weight"] == "output heads stay, by default"
    assert "I64 is not quantized" in reasons["ids"] and "below the block of 32" in reasons["short.weight"]


def test_the_report_of_a_plan_has_the_sizes_that_the_file_has(tmp_path):
    work = plan(model(tmp_path), "mxfp4", dtype="bfloat16")
    path, report = work.write(tmp_path / "q.safetensors")
    planned = [dataclasses.replace(e, sqnr_db=None, choice_share=None, flushed_share=None) for e in report.entries]
    assert planned == list(work.report.entries)
    file = ifjax.open_file(path)
    assert report.totals.bytes_after == sum(entry.nbytes for entry in file.entries.values())
    assert file["layers.0.q_proj.weight"].dtype == file["half.weight"].dtype == file["norm.weight"].dtype == "bfloat16"
    assert file["ids"].dtype == np.int64
    source = ifjax.open_file(tmp_path / "model.safetensors")
    np.testing.assert_array_equal(file["norm.weight"], source["norm.weight"].astype(ml_dtypes.bfloat16))
    assert [v for v in verify(file, source) if v.fault is not None] == []


def test_rules_match_paths_and_the_first_decides(tmp_path):
    rules = [
        Rule("layers/1?0/.*", None), Rule("embed_tokens", "mxfp4", axis=-2), Rule("layers/.*", "mxfp4"),
        Rule("norm", None),
    ]  # fmt: skip
    work = plan(model(tmp_path), rules)
    assert {t.stored.name: t.decision.axis for t in work.tasks if t.decision.weights is not None} == {
        "embed_tokens.weight": -2, "layers.2.q_proj.weight": -1,
    }  # fmt: skip
    with pytest.raises(ValueError, match=r"'layer/\.\*'.* matches nothing: the closest paths are 'layers"):
        plan(model(tmp_path), [Rule("layer/.*"), Rule(".*", optional=True)])
    with pytest.raises(ValueError, match="gptq needs calibration"):
        plan(model(tmp_path), Rule(".*", gptq=True))
    with pytest.raises(ValueError, match="axis -1 or -2"):
        plan(model(tmp_path), Rule(".*", axis=-3))
    with pytest.raises(ValueError, match="dtype must be one of"):
        plan(model(tmp_path), "mxfp4", dtype="int8")


def test_what_is_packed_or_empty_cannot_be_quantized_and_what_is_not_not_dequantized(tmp_path):
    source = write(tmp_path, {"w": normal(4, 32)})
    quantize_file(source, tmp_path / "q.safetensors", Rule("w", "mxfp4"))
    with pytest.raises(FileError, match=r"packed already \('w'\): dequantize it first"):
        plan(tmp_path / "q.safetensors", "mxfp4")
    with pytest.raises(FileError, match="holds no tensors"):
        plan(write(tmp_path, {}, "empty.safetensors"))
    with pytest.raises(FileError, match="nothing to dequantize"):
        dequantize_file(source, tmp_path / "d.safetensors")


def test_what_stays_is_the_same_to_the_byte_whatever_its_dtype(tmp_path):
    data = np.arange(64, dtype=np.uint8)
    slots = [_files.Slot("U8", "U8", (2, 32)), _files.Slot("I64", "I64", (2, 4)), _files.Slot("w", "F32", (2, 8))]
    slots.append(_files.Foreign("C64", "C64", (2, 4), 64))
    with _files.safetensors_writer(tmp_path / "model.safetensors", slots, lambda sums: {"format": "pt"}) as write_:
        for slot in slots:
            write_(slot.name, data)
    quantize_file(tmp_path / "model.safetensors", tmp_path / "q.safetensors", Rule("w", "mxfp4", block=8))
    file = ifjax.open_file(tmp_path / "q.safetensors")
    assert file.metadata == {"format": "pt"}
    assert {name: file.entries[name].dtype for name in file if name != "w"} == {"U8": "U8", "I64": "I64", "C64": "C64"}
    for name in ("U8", "I64", "C64"):  # of which the last is none that the library has
        with file.reader(name) as reader:
            np.testing.assert_array_equal(reader.bytes(0, 64), data)
    with pytest.raises(FileError, match="of dtype C64, which numpy lacks"):
        file["C64"]
    assert [v for v in verify(file, ifjax.open_file(tmp_path / "model.safetensors")) if v.fault is not None] == []


def test_casting_beyond_a_dtypes_range_is_told(tmp_path):
    source = write(tmp_path, {"w": normal(4, 32), "b": np.array([1e6, 1, np.inf], np.float32)})
    report = quantize_file(source, tmp_path / "q.safetensors", Rule("w", "mxfp4"), dtype="float16")
    entry = next(e for e in report.entries if e.path == "b")
    assert (entry.note, entry.expected) == ("1 values are beyond float16's range", False)


def test_shards_in_shards_out(tmp_path):
    tensors = {f"l{i}": normal(8, 64, seed=i) for i in range(5)}
    source = ifjax.save_file(tensors, tmp_path / "in.safetensors", max_shard_bytes=5000)
    whole = write(tmp_path, tensors, "whole.safetensors")
    quantize_file(source, tmp_path / "out.safetensors", Rule(".*", "mxfp4"), max_shard_bytes=700)
    quantize_file(whole, tmp_path / "single.safetensors", Rule(".*", "mxfp4"))
    a, b = ifjax.open_file(tmp_path / "out.safetensors"), ifjax.open_file(tmp_path / "single.safetensors")
    assert len(a.files) == 3 and list(a) == list(b)
    for name in a:
        np.testing.assert_array_equal(a[name].codes, b[name].codes)
    dequantize_file(a, tmp_path / "back.safetensors", max_shard_bytes=5000)
    assert len(ifjax.open_file(tmp_path / "back.safetensors").files) == 3


# --- verify ----------------------------------------------------------------------------------------------------------


def faults(packed, original, **options):
    found = verify(ifjax.open_file(packed), ifjax.open_file(original), **options)
    return {v.name: v.fault for v in found if v.fault is not None}


def test_verify_finds_what_differs(tmp_path):
    tensors = {"w": normal(4, 64), "v": normal(4, 64, seed=1), "b": normal(3), "i": np.arange(4)}
    source = write(tmp_path, tensors)
    packed = tmp_path / "q.safetensors"
    quantize_file(source, packed, [Rule("w", "mxfp4"), Rule("v", "mxfp4")])
    assert faults(packed, source) == {}
    assert faults(packed, source, min_sqnr_db=15) == {}
    low = faults(packed, source, min_sqnr_db=40)
    assert set(low) == {"w", "v"} and "below 40" in low["w"]
    others = {"b": normal(3) + 1, "w": normal(4, 32), "i": np.arange(4, dtype=np.int32), "x": normal(2)}
    found = faults(packed, write(tmp_path, tensors | others, "o.safetensors"))
    assert found["w"] == "is (4, 64), and in the original (4, 32)"
    assert found["b"] == "is not packed, and differs from the original"
    assert found["i"] == "is I64, and in the original I32"
    assert found["x"] == "is in the original only"
    del tensors["v"]
    assert faults(packed, write(tmp_path, tensors, "p.safetensors")) == {"v": "is not in the original"}
    assert "is packed in the original" in faults(packed, packed)["w"]


def test_verify_names_every_damaged_tensor(tmp_path):
    source = write(tmp_path, {"w": normal(4, 64), "v": normal(4, 64), "b": normal(3)})
    packed = tmp_path / "q.safetensors"
    quantize_file(source, packed, [Rule("w", "mxfp4"), Rule("v", "mxfp4")])
    data = bytearray(packed.read_bytes())
    entries = ifjax.open_file(packed).entries
    for name in ("w.scales", "b"):
        data[entries[name].start] ^= 0x10
        packed.write_bytes(data)
        with pytest.raises(FileError, match="is damaged"):  # nothing is made of damaged bytes
            dequantize_file(packed, tmp_path / "d.safetensors")
        assert not (tmp_path / "d.safetensors").exists()
    found = {v.name: v.fault for v in verify(ifjax.open_file(packed))}
    assert found["v"] is None
    assert "'w.scales' is damaged" in found["w"] and "'b' is damaged" in found["b"]


# --- memory ----------------------------------------------------------------------------------------------------------


def test_memory_does_not_grow_with_the_tensor(tmp_path, monkeypatch):
    """Of numpy's arrays, which tracemalloc sees; `test_peak_memory` sees all."""
    monkeypatch.setattr(_pieces, "PIECE", 2**16)
    path = tmp_path / "model.safetensors"
    slots, some = [_files.Slot("w", "F32", (2048, 2048)), _files.Slot("b", "F32", (2**23,))], normal(2**20)
    with _files.safetensors_writer(path, slots, lambda sums: {}) as write_:
        for name in ["w"] * 4 + ["b"] * 8:
            write_(name, some)
    small = write(tmp_path, {"w": normal(2, 64)}, "small.safetensors")
    quantize_file(small, tmp_path / "q.safetensors", Rule("w", "mxfp4"))  # compiles
    tracemalloc.start()
    quantize_file(path, tmp_path / "q.safetensors", Rule("w", "mxfp4"))
    list(verify(ifjax.open_file(tmp_path / "q.safetensors"), ifjax.open_file(path)))
    dequantize_file(tmp_path / "q.safetensors", tmp_path / "d.safetensors")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 12e6 < path.stat().st_size / 4


PEAK = """
import resource, sys
from pathlib import Path
from ifjax import cli
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
folder = sys.argv[1]
assert cli.main(["quantize", f"{folder}/small.safetensors", f"{folder}/q.safetensors"]) == 0
before = peak()
for command in (
    ["quantize", "model.safetensors", "q.safetensors", "--force"], ["verify", "q.safetensors"],
    ["verify", "q.safetensors", "--against", "model.safetensors"], ["dequantize", "q.safetensors", "d.safetensors"],
):
    assert cli.main([command[0], *(f"{folder}/{a}" if a.endswith("s") else a for a in command[1:])]) == 0, command
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads peak memory as Linux tells it")
def test_peak_memory(tmp_path):
    """A single tensor of 400 MB takes a few dozen MB."""
    slots = [_files.Slot("w", "F32", (10_000, 10_000))]
    for name, rows in (("small", 100), ("model", 10_000)):
        slots = [_files.Slot("w", "F32", (rows, 10_000))]
        with _files.safetensors_writer(tmp_path / f"{name}.safetensors", slots, lambda sums: {}) as write_:
            for i in range(rows // 100):
                write_("w", normal(10**6, seed=i))
    command = [sys.executable, "-c", PEAK, os.fspath(tmp_path)]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(ran.stdout.split()[-1]) < 100e6, ran.stdout


@pytest.mark.bert
@pytest.mark.slow
def test_a_pretrained_bert(bert_file, tmp_path, monkeypatch):
    monkeypatch.undo()
    report = quantize_file(bert_file, tmp_path / "q.safetensors", Rule(".*", "if4", optional=True))
    assert report.totals.quantized == 40
    assert report.totals.quantized_bits_per_value == pytest.approx(4.5, rel=0.01)
    packed = sum(entry.bytes_after for entry in report.entries)
    assert (tmp_path / "q.safetensors").stat().st_size < 1.01 * packed
    file, original = ifjax.open_file(tmp_path / "q.safetensors"), ifjax.open_file(bert_file)
    assert [v for v in verify(file, original) if v.fault is not None] == []
    name = "encoder.layer.0.output.dense.weight"
    q = ifjax.quantize(original[name], "if4")
    np.testing.assert_array_equal(file[name].codes, q.codes)
    np.testing.assert_array_equal(file[name].scales, q.scales)
    assert convert.contents(file).totals.quantized == 40
