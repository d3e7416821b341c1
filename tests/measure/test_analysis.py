"""Errors are what numpy says they are, pieces change nothing, and files are read as they were written."""

import json
import math
import struct
import tracemalloc

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import ifjax
from ifjax import measure as analysis
from ifjax.arrays import packed_shapes
from ifjax.files import FileError, pieces
from ifjax.files.safetensors import read_header
from ifjax.measure import ErrorStats, error, plots, tensor_report
from ifjax.models.names import keep_reason

# Squares are summed in float32 over 256 values and in float64 from there on.
SUMS = {"rtol": 1e-5}


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def write(path, tensors, metadata=None):
    """A safetensors file by hand, as `safetensors` cannot write every dtype from numpy: {name: (dtype, array)}."""
    header, data = ({"__metadata__": metadata} if metadata else {}), b""
    for name, (dtype, array) in tensors.items():
        raw = np.ascontiguousarray(array).tobytes()
        header[name] = {"dtype": dtype, "shape": array.shape, "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    head = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(head)) + head + data)
    return path


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.by_default("if4")
@pytest.mark.parametrize("fmt", ["if4", "fouroversix", "mxfp4"])
def test_error_is_what_numpy_computes_from_the_decoded_values(fmt):
    x = normal(3, 100)
    q = ifjax.quantize(x, fmt)
    e = error(x, fmt)
    noise = np.asarray(q.dequantize(), np.float64) - x
    np.testing.assert_allclose(e.mse, np.mean(noise**2), **SUMS)
    relative = np.linalg.norm(noise) / np.linalg.norm(x.astype(np.float64))
    np.testing.assert_allclose(e.relative_error, relative, **SUMS)
    np.testing.assert_allclose(e.normalized_mse, relative**2, **SUMS)
    np.testing.assert_allclose(e.sqnr_db, -20 * np.log10(relative), **SUMS)
    assert (e.nbytes, e.bits_per_value) == (q.nbytes, q.bits_per_value)
    assert e.choice_share == (np.mean(np.asarray(q.choices())) if fmt == "if4" else None)


def test_error_passes_settings_on():
    x = normal(32, 32)
    square = error(x, "nvfp4", block_2d=True)
    noise = np.asarray(ifjax.quantize(x, "nvfp4", block_2d=True).dequantize(), np.float64) - x
    np.testing.assert_allclose(square.noise, np.sum(noise**2), **SUMS)
    assert square.noise > error(x, "nvfp4").noise


@pytest.mark.parametrize("fmt", ["nvfp4", "if4"])  # one candidate, and two that are chosen by squares
@pytest.mark.parametrize("power", [-110, 110])
def test_squares_of_tiny_and_huge_values_neither_vanish_nor_overflow(power, fmt):
    x = normal(64, 16)
    moved, e = error(x * np.float32(2.0**power), fmt), error(x, fmt)
    np.testing.assert_allclose(moved.relative_error, e.relative_error, **SUMS)
    np.testing.assert_allclose(moved.mse, e.mse * 4.0**power, **SUMS)
    assert moved.others == e.others


def test_zeros_lose_nothing_and_nan_shows():
    zero = error(np.zeros((2, 16), np.float32), "nvfp4")
    assert (zero.relative_error, zero.sqnr_db, zero.mse) == (0, math.inf, 0)
    assert math.isnan(error(np.full((2, 16), np.nan, np.float32), "nvfp4").relative_error)


def test_errors_add_up():
    a = ErrorStats(values=10, signal=4.0, noise=1.0, nbytes=6, blocks=2, others=1)
    b = ErrorStats(values=30, signal=12.0, noise=3.0, nbytes=20, blocks=6, others=5)
    assert a + b == ErrorStats(values=40, signal=16.0, noise=4.0, nbytes=26, blocks=8, others=6)
    assert ((a + b).mse, (a + b).relative_error, (a + b).choice_share) == (0.1, 0.5, 0.75)
    assert (a + b).bits_per_value == 8 * 26 / 40
    with pytest.raises(TypeError):
        a + 1


# --- tensors ---------------------------------------------------------------------------------------------------------


def assert_same(a: ErrorStats, b: ErrorStats):
    assert (a.values, a.nbytes, a.blocks, a.others) == (b.values, b.nbytes, b.blocks, b.others)
    np.testing.assert_allclose([a.signal, a.noise], [b.signal, b.noise], **SUMS)


@pytest.mark.slow
def test_pieces_change_nothing():
    # More than a piece, rows that no block divides, and a maximum that only one of the pieces holds.
    x = normal(5, 70_003)
    x[3, 5] = 50
    report = tensor_report("w", x, ["if4", "mxfp4"])
    assert (report.name, report.shape, report.dtype, report.nbytes) == ("w", x.shape, "float32", x.nbytes)
    for fmt in ("if4", "mxfp4"):
        assert_same(report.errors[fmt], error(x, fmt))


@pytest.mark.slow
def test_blocks_lie_along_the_axis():
    x = normal(48, 40, 20)
    along = tensor_report("w", x, ["if4"], axis=1).errors["if4"]
    assert along == tensor_report("w", np.moveaxis(x, 1, -1), ["if4"]).errors["if4"]
    assert along == tensor_report("w", x, ["if4"], axis=-2).errors["if4"]
    assert_same(along, error(x, "if4", axis=1))


def test_bytes_are_those_of_a_qtensor(monkeypatch):
    def nothing(x, amax, how, axis, measured):  # bytes do not depend on values: nothing need be compiled
        codes, scales = (np.zeros(shape, np.uint8) for shape in packed_shapes(x.shape, how.fmt, axis))
        return x, codes, scales, x

    monkeypatch.setattr(pieces, "_start", nothing)
    x = np.ones((3, 37), np.float32)
    formats = ["nvint3", "nvint3_bs8", "nvint6", "nvint4_bs8", "nvfp4", "mxfp4", "mxfp6_e2m3"]
    for fmt, e in tensor_report("w", x, formats).errors.items():
        shape = jax.eval_shape(lambda x, fmt=fmt: ifjax.quantize(x, fmt), x)
        assert (e.nbytes, e.blocks) == (shape.nbytes, shape.scales.size), fmt


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float64, jnp.bfloat16])
def test_every_float_is_measured_as_its_float32(dtype):
    x = normal(8, 64).astype(dtype)
    report = tensor_report("w", x, ["mxfp4"])
    assert report.errors == tensor_report("w", x.astype(np.float32), ["mxfp4"]).errors
    assert report.nbytes == 512 * np.dtype(dtype).itemsize


@pytest.mark.parametrize(
    "x, axis, reason",
    [
        (np.arange(32), -1, "int64 is not one of bfloat16, float16, float32, float64"),
        (np.zeros((3, 0), np.float32), -1, "it is empty"),
        (np.float32([1, np.inf, np.nan, 2]), -1, "2 of its values are not finite in float32"),
        (np.float64([1, 1e300]), -1, "1 of its values are not finite in float32"),
        (np.zeros(16, np.float32), -2, "it has no axis -2"),
    ],
)
def test_what_cannot_be_measured_is_skipped_with_the_reason(x, axis, reason):
    report = tensor_report("w", x, ["mxfp4"], axis=axis)
    assert (report.status, report.reason, report.errors) == ("skipped", reason, {})


@pytest.mark.parametrize(
    "name, shape, reason",
    [
        ("encoder.layer.0.attention.self.query.weight", (384, 384), None),
        ("embeddings.word_embeddings.weight", (30522, 384), None),
        ("blocks/mlp/kernel", (3, 8, 8), None),
        ("layernorm_mlp.fc1_weight", (8, 8), None),
        ("encoder.layer.0.output.dense.bias", (384,), "a bias"),
        ("attention.relative_attention_bias.weight", (32, 8), "a bias"),
        ("model.layers.0.input_layernorm.weight", (384,), "a norm"),
        ("q_norm.weight", (16, 64), "a norm"),
        ("cls_token", (1, 1, 384), "not a matrix"),
        ("scale", (), "not a matrix"),
    ],
)
def test_what_keeps_its_precision(name, shape, reason):
    assert keep_reason(name, shape) == reason


# --- files -----------------------------------------------------------------------------------------------------------


def test_tensors_are_read_as_they_were_written(tmp_path):
    arrays = {
        "F32": normal(4, 8), "F64": normal(3).astype(np.float64), "F16": normal(2, 3).astype(np.float16),
        "BF16": normal(5, 7).astype(ml_dtypes.bfloat16),
    }  # fmt: skip
    path = write(tmp_path / "a.safetensors", {k.lower(): (k, v) for k, v in arrays.items()}, {"format": "pt"})
    entries = read_header(path)
    assert {(e.name, e.dtype, e.shape) for e in entries} == {(k.lower(), k, v.shape) for k, v in arrays.items()}
    for entry in entries:
        np.testing.assert_array_equal(analysis.read_tensor(path, entry), arrays[entry.dtype])


def test_layer_2_comes_before_layer_10(tmp_path):
    names = ["h.10.w", "h.2.w", "h.2.b", "a", "2", "h..w"]
    path = write(tmp_path / "a.safetensors", {name: ("F32", normal(2)) for name in names})
    assert [e.name for e in read_header(path)] == ["2", "a", "h.2.b", "h.2.w", "h.10.w", "h..w"]


def test_every_tensor_of_a_file_is_reported(tmp_path):
    tensors = {
        "w": ("BF16", normal(8, 32).astype(ml_dtypes.bfloat16)), "b": ("F32", normal(32)), "s": ("F32", normal()),
        "i": ("I64", np.arange(4)), "q": ("F8_E4M3", np.zeros((4, 4), np.uint8)),
    }  # fmt: skip
    path = write(tmp_path / "a.safetensors", tensors)
    entries = read_header(path)

    def status(**options):
        return {r.name: r.status for r in analysis.file_reports(path, entries, ["mxfp4"], **options)}

    plain = {"b": "kept", "i": "skipped", "q": "skipped", "s": "kept", "w": "quantized"}
    assert status() == plain
    assert status(everything=True) == plain | {"b": "quantized"}
    report = analysis.Report("a", tuple(analysis.file_reports(path, entries, ["mxfp4"])))
    assert report.total == {"mxfp4": tensor_report("w", tensors["w"][1], ["mxfp4"]).errors["mxfp4"]}
    assert [t["dtype"] for t in report.to_dict()["tensors"]] == ["F32", "I64", "F8_E4M3", "F32", "BF16"]
    assert report.to_dict()["total"]["nbytes"] == 512
    assert report.to_dict()["total"]["nbytes_not_quantized"] == 128 + 4 + 32 + 16


def test_the_total_joins_all_tensors():
    a, b = normal(8, 32), 3 * normal(16, 64, seed=1)
    report = analysis.Report("ab", tuple(tensor_report(n, x, ["mxfp4"]) for n, x in (("a", a), ("b", b))))
    noise = [np.sum((np.asarray(ifjax.quantize(x, "mxfp4").dequantize(), np.float64) - x) ** 2) for x in (a, b)]
    signal = np.sum(a.astype(np.float64) ** 2) + np.sum(b.astype(np.float64) ** 2)
    np.testing.assert_allclose(report.total["mxfp4"].normalized_mse, sum(noise) / signal, **SUMS)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0\0\0",
        b"this is no safetensors file",
        struct.pack("<Q", 2**60) + b"{}",
        struct.pack("<Q", 4) + b"{{{{",
        struct.pack("<Q", 60) + b'{"a":{"dtype":"F32","shape":[8],"data_offsets":[0,32]}}     ' + b"\0" * 31,
        struct.pack("<Q", 60) + b'{"a":{"dtype":"F32","shape":[9],"data_offsets":[0,32]}}     ' + b"\0" * 32,
    ],
    ids=["empty", "short", "text", "huge header", "no json", "truncated", "wrong shape"],
)
def test_a_broken_file_is_named(tmp_path, content):
    path = tmp_path / "broken.safetensors"
    path.write_bytes(content)
    with pytest.raises(FileError, match=r"broken\.safetensors is not a whole safetensors file"):
        read_header(path)


def test_a_file_cut_while_it_is_read_is_named(tmp_path):
    path = write(tmp_path / "a.safetensors", {"w": ("F32", normal(8, 32))})
    (entry,) = read_header(path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(FileError, match="ends within w"):
        analysis.read_tensor(path, entry)


def test_memory_is_bounded_by_the_largest_tensor(tmp_path):
    x = normal(2**10, 2**12)  # 16 MB, and six of them
    path = write(tmp_path / "a.safetensors", {f"w{i}": ("F32", x) for i in range(6)})
    list(analysis.file_reports(path, read_header(path)[:1], ["mxfp4"]))
    tracemalloc.start()
    try:
        assert sum(1 for _ in analysis.file_reports(path, read_header(path), ["mxfp4"])) == 6
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # One tensor, and the pieces of 1 MB in flight: their float32, magnitudes, masks and device copies.
    assert peak < x.nbytes + 8 * 2**20


# --- the sample of real weights --------------------------------------------------------------------------------------


def test_the_package_carries_a_sample_of_real_weights():
    path = analysis.sample_path()
    assert path.stat().st_size < 300_000
    entries = read_header(path)
    assert len(entries) == 39
    assert {(entry.dtype, math.prod(entry.shape)) for entry in entries} == {("BF16", 3072)}
    assert all(keep_reason(entry.name, entry.shape) is None for entry in entries)


@pytest.mark.bert
def test_the_sample_is_what_its_readme_says(bert_file):
    sample = {entry.name: entry for entry in read_header(analysis.sample_path())}
    names = set()
    for entry in read_header(bert_file):
        if entry.dtype != "F32" or keep_reason(entry.name, entry.shape) or math.prod(entry.shape) < 3072:
            continue
        x = analysis.read_tensor(bert_file, entry)
        k = 3072 // x.shape[1]
        rows = x[:: len(x) // k][:k].astype(ml_dtypes.bfloat16)
        np.testing.assert_array_equal(analysis.read_tensor(analysis.sample_path(), sample[entry.name]), rows)
        names.add(entry.name)
    assert names == set(sample)


@pytest.mark.bert
def test_the_sample_stands_for_the_whole_model(bert_file):
    def total(path):
        reports = analysis.file_reports(path, read_header(path), ["if4", "mxfp4"])
        return analysis.Report("", tuple(reports)).total

    sample, whole = total(analysis.sample_path()), total(bert_file)
    # Measured 0.04 and 0.14 dB apart.
    assert abs(sample["if4"].sqnr_db - whole["if4"].sqnr_db) < 0.1
    assert abs(sample["mxfp4"].sqnr_db - whole["mxfp4"].sqnr_db) < 0.2
    assert round(whole["if4"].sqnr_db, 2) == 22.01
    assert round(100 * whole["if4"].choice_share, 1) == 59.1


# --- random samples --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("distribution", analysis.DISTRIBUTIONS)
def test_samples_have_mean_0_and_variance_1(distribution):
    x = analysis.sample(distribution, 2**18)
    assert x.dtype == np.float32
    # Five standard deviations of the mean; t3 has no fourth moment, so its variance is only roughly that of the sample.
    assert abs(x.mean()) < 5 / 2**9
    assert x.var() == pytest.approx(1, abs=0.1 if distribution == "t3" else 0.03)
    np.testing.assert_array_equal(x, analysis.sample(distribution, 2**18))
    assert not np.array_equal(x, analysis.sample(distribution, 2**18, seed=1))


def test_an_unknown_distribution_is_refused():
    with pytest.raises(ValueError, match="normal, uniform, laplace, t5, t3"):
        analysis.sample("cauchy", 16)


def test_published_numbers_stand_beside_what_they_are_about():
    rows = {(r.distribution, r.fmt): r for r in analysis.synthetic_table(["if4", "mxfp4"], n=2**12)}
    assert list(rows) == [(d, f) for d in analysis.DISTRIBUTIONS for f in ("if4", "mxfp4")]
    assert [p.normalized_mse for p in rows["normal", "if4"].published] == pytest.approx([6.2e-3, 6.15e-3])
    assert all(p.source for row in rows.values() for p in row.published)
    (row,) = analysis.synthetic_table(["mxfp4"], distributions=["normal"], n=2**12, search="fast")
    assert row.published == ()  # they are about the plain scale


def test_published_numbers_are_about_formats_and_distributions_that_exist():
    for distribution, fmt in analysis.PUBLISHED:
        assert distribution in analysis.DISTRIBUTIONS
        assert fmt.removesuffix("_bs32") in ifjax.FORMATS


# --- plots -----------------------------------------------------------------------------------------------------------


def made_report(names, formats):
    """A report out of thin air: {format: has a choice}."""
    reports = []
    for i, name in enumerate(names):
        errors = {
            fmt: ErrorStats(1024, 100.0, 1.0 + 0.1 * i + j, 576, 64, 10 + i if chooses else None)
            for j, (fmt, chooses) in enumerate(formats.items())
        }
        reports.append(analysis.TensorReport(name, (32, 32), "F32", 4096, errors))
    return analysis.Report("model", tuple(reports))


def test_plots_show_every_format_and_layer():
    names = ["wte.weight", *(f"h.{layer}.mlp.{e}.weight" for layer in (0, 1, 10) for e in (0, 1))]
    report = made_report(names, {"if4": True, "nvfp4": False})
    (axes,) = plots.plot_errors(report).axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["nvfp4  (4.5 bits)", "if4  (4.5 bits)"]
    assert "%" in axes.get_xlabel()

    lines, grid = plots.plot_choices(report).axes
    assert [label.get_text() for label in grid.get_xticklabels()] == ["0", "1", "10", "other"]
    assert [label.get_text() for label in grid.get_yticklabels()] == ["wte", "mlp.*"]
    assert [text.get_text() for text in lines.get_legend().get_texts()] == ["if4"]
    # Layer 0 holds tensors 1 and 2, with 11 and 12 of 64 blocks.
    np.testing.assert_allclose(lines.get_lines()[0].get_ydata(), [100 * n / 128 for n in (23, 27, 31)])


def test_there_is_no_choice_to_plot_without_a_format_that_has_one():
    with pytest.raises(ValueError, match="no choice to plot"):
        plots.plot_choices(made_report(["w"], {"nvfp4": False}))


def test_plots_survive_thousands_of_tensors_and_exact_ones(tmp_path):
    report = made_report([f"w{i}" for i in range(3000)], {"if4": True})
    plots.plot_choices(report).savefig(tmp_path / "choices.png")
    exact = analysis.Report("zero", (tensor_report("w", np.zeros((4, 32), np.float32), ["mxfp4"]),))
    plots.plot_errors(exact).savefig(tmp_path / "errors.png")
