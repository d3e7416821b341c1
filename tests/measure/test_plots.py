"""Pictures: what they draw is what quantize does, and what cannot be drawn is refused."""

import dataclasses

import jax
import numpy as np
import pytest
from test_checkpoint import HALVES

import ifjax
from ifjax.measure import plots
from ifjax.models.report import Entry, Report

pytest.importorskip("matplotlib")

RNG = np.random.default_rng(0)
X = RNG.standard_normal((64, 256)).astype(np.float32)


def entry(path, sqnr, after=2308, fmt="if4"):
    reason = None if fmt else "a bias is added"
    return Entry(path, "Dense", (64, 64), "float32", fmt, None, 4.5, 16384, after, sqnr, reason=reason)


def drawn(axes):
    return {line.get_label(): line for line in axes.get_lines() if not line.get_label().startswith("_")}


def saved(figure, tmp_path):
    path = tmp_path / "figure.png"
    figure.savefig(path)
    assert path.stat().st_size > 5000
    return figure


# --- formats ---------------------------------------------------------------------------------------------------------


def test_a_grid_shows_the_values_of_each_candidate(tmp_path):
    (axes,) = saved(plots.plot_grid("nvfp4", "if4", "fouroversix", "mxfp4_static4"), tmp_path).axes
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names == [
        "nvfp4: E2M1", "if4: E2M1", "if4: INT4 (step 6/7)", "fouroversix: E2M1",
        "fouroversix: E2M1 (scale times 3/2)", "mxfp4_static4: E2M1 (maximum at 4)",
    ]  # fmt: skip
    marks = [line.get_xdata() for line in axes.get_lines() if line.get_marker() in ("o", "s")]
    e2m1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    np.testing.assert_allclose(marks[0][marks[0] >= 0], e2m1 / 6)
    np.testing.assert_allclose(marks[2][marks[2] >= 0], np.arange(8) / 7)
    # With the maximum at 4, the 6 lies beyond it.
    np.testing.assert_allclose(marks[4][marks[4] >= 0], e2m1[:-1] / 4)
    np.testing.assert_allclose(marks[5], marks[4])
    # Halfway between 4 and 6 an E2M1 block errs by a sixth of its maximum.
    assert "17 %" in [text.get_text() for text in axes.texts]


@pytest.mark.slow
def test_pareto_joins_the_formats_that_no_other_betters(tmp_path):
    errors = {fmt: ifjax.analysis.error(X, fmt) for fmt in ("nvfp4", "if4", "mxfp4", "nvint4", "if3")}
    assert errors["if4"].noise < min(errors[name].noise for name in errors if name != "if4")
    left, right = saved(plots.plot_pareto(errors, "normal numbers"), tmp_path).axes
    assert {text.get_text() for text in left.texts} == {"if4", "mxfp4", "if3"}
    front = left.get_lines()[0]
    np.testing.assert_allclose(front.get_xdata(), [3.5, 4.25, 4.5])
    np.testing.assert_allclose(front.get_ydata(), [errors[name].normalized_mse for name in ("if3", "mxfp4", "if4")])
    # By name, the best on top.
    assert [label.get_text() for label in right.get_yticklabels()] == ["nvfp4", "nvint4", "if4"]


def test_pareto_needs_errors():
    for errors in ({}, {"if4": ifjax.analysis.error(np.zeros((2, 16), np.float32), "if4")}):
        with pytest.raises(ValueError, match="an error above 0 for each format"):
            plots.plot_pareto(errors)


def test_a_grid_needs_formats():
    with pytest.raises(ValueError, match="needs formats"):
        plots.plot_grid()
    with pytest.raises(ValueError, match="did you mean"):
        plots.plot_grid("nvfp5")


@pytest.mark.slow
@pytest.mark.parametrize("fmt", ["nvfp4", "if4", "fouroversix", "mxfp4", "if3"])
@pytest.mark.parametrize("scale", [1.0, 2.0**-110])
def test_a_block_shows_the_numbers_that_quantize_gives(fmt, scale):
    fmt = ifjax.get_format(fmt)
    for row in X[:4] * np.float32(scale):
        block = row[: fmt.block]
        trials = plots._trials_of(block, fmt, None, "mse")
        kept = min(trials, key=lambda trial: trial.loss)
        np.testing.assert_array_equal(kept.decoded, ifjax.quantize(block, fmt).dequantize())
        for trial in trials:
            nearest = np.min(np.abs(trial.offered[:, None] - trial.decoded), axis=0)
            np.testing.assert_allclose(nearest / scale, 0, atol=1e-6)


def test_a_block_of_a_tensor_takes_the_tensors_maximum():
    q = ifjax.quantize(X[0], "if4")
    amax = float(np.abs(X[0]).max())
    trials = plots._trials_of(X[0, 16:32], ifjax.get_format("if4"), amax, "mse")
    kept = min(trials, key=lambda trial: trial.loss)
    np.testing.assert_array_equal(kept.decoded, q.dequantize()[16:32])


def test_the_kept_candidate_is_the_one_of_the_loss(tmp_path):
    x = np.float32([10, 20, 30, 40])
    figure = saved(plots.plot_block(x, "fouroversix", loss="mae"), tmp_path)
    six, four = (axes.get_title(loc="left") for axes in figure.axes)
    assert four.endswith("absolute error 0   kept") and "kept" not in six
    numbers = drawn(figure.axes[1])
    np.testing.assert_array_equal(numbers["number"].get_ydata(), x)
    np.testing.assert_array_equal(numbers["decoded"].get_ydata(), x)
    (axes,) = plots.plot_block(x, "nvfp4").axes
    assert "kept" not in axes.get_title(loc="left")  # there is nothing to choose
    plots.plot_block(np.zeros(16), "if4")


def test_among_equals_the_one_that_the_format_takes_is_kept():
    twice = tuple(ifjax.Candidate(ifjax.FORMATS["nvfp4"].grid) for _ in range(2))
    for ties, kept in (("first", [True, False]), ("last", [False, True])):
        fmt = ifjax.Format("twice", twice, 16, ties=ties)
        titles = [axes.get_title(loc="left") for axes in plots.plot_block(X[0, :16], fmt).axes]
        assert [title.endswith("kept") for title in titles] == kept


@pytest.mark.parametrize(
    ("x", "loss", "match"),
    [
        (np.ones(17), "mse", "1 to 16 numbers"),
        (np.ones((1, 16)), "mse", "one block"),
        (np.ones(0), "mse", "one block"),
        (np.array([np.inf, 1.0]), "mse", "finite"),
        (np.ones(4), "l2", "loss must be one of"),
    ],
)
def test_what_is_no_block_is_refused(x, loss, match):
    with pytest.raises(ValueError, match=match):
        plots.plot_block(x, "if4", loss=loss)


@pytest.mark.by_default("if6")
@pytest.mark.parametrize("fmt", ["if4", "if3", "if6", "mxfp4"])
def test_bytes_show_the_bits_that_are_stored(fmt, tmp_path):
    q = ifjax.quantize(X[0], fmt)
    (axes,) = saved(plots.plot_bytes(q, 1), tmp_path).axes
    cells = [text.get_text() for text in axes.texts if text.get_fontsize() == 10]
    bits = "".join(cell for cell in cells if cell in ("0", "1"))
    stored = bytes(int(bits[i : i + 8], 2) for i in range(0, len(bits), 8))
    size = q.fmt.block * q.fmt.bits // 8
    assert stored[0] == int(q.scales[1])
    assert stored[1:] == bytes(np.asarray(q.codes)[size : 2 * size].tolist())
    captions = [text.get_text() for text in axes.texts if text.get_fontsize() == 8]
    assert captions[0].startswith(f"header 0x{stored[0]:02X}")
    if q.fmt.bits == 4:  # the low half, on the right, is the first
        first, second = np.asarray(q.dequantize())[q.fmt.block : q.fmt.block + 2]
        assert captions[1] == f"{second:.3g}, {first:.3g}"


def test_a_header_of_two_bytes_is_shown_lowest_byte_first(tmp_path):
    q = ifjax.quantize(X[0], HALVES)
    (axes,) = saved(plots.plot_bytes(q, 2), tmp_path).axes
    cells = [text.get_text() for text in axes.texts if text.get_fontsize() == 10]
    bits = "".join(cell for cell in cells if cell in ("0", "1"))
    stored = bytes(int(bits[i : i + 8], 2) for i in range(0, len(bits), 8))
    assert stored == bytes(np.r_[np.asarray(q.scales)[4:6], np.asarray(q.codes)[16:24]].tolist())
    (header,) = (text.get_text() for text in axes.texts if text.get_text().startswith("header"))
    assert header.startswith(f"header 0x{stored[1]:02X}{stored[0]:02X}: decoded as ")
    assert "a block of 16 values in 80 bits, 5 a value" in axes.get_title()


def test_bytes_of_what_is_no_row_are_refused():
    q = ifjax.quantize(X, "if4")
    with pytest.raises(ValueError, match=r"as in q\[0\]"):
        plots.plot_bytes(q)
    with pytest.raises(IndexError, match="block 16 of a QTensor of 16 blocks"):
        plots.plot_bytes(q[0], 16)
    odd = dataclasses.replace(ifjax.get_format("if3"), name="if3_bs4", block=4)
    with pytest.raises(ValueError, match="whole bytes"):
        plots.plot_bytes(ifjax.quantize(X[0], odd))


# --- arrays ----------------------------------------------------------------------------------------------------------


def test_parts_of_the_error_add_up_to_it(tmp_path):
    upper, lower = saved(plots.plot_error_by_magnitude(X, ["nvfp4", "mxfp4", "if4"], bins=10), tmp_path).axes
    assert list(drawn(upper)) == ["nvfp4", "mxfp4", "if4"]
    for (label, line), name in zip(drawn(lower).items(), ["nvfp4", "mxfp4", "if4"], strict=True):
        decoded = np.asarray(ifjax.quantize(X, name).dequantize(), np.float64)
        expected = 1e3 * np.sum((decoded - X) ** 2) / np.sum(X.astype(np.float64) ** 2)
        np.testing.assert_allclose(np.sum(line.get_ydata()), expected, rtol=1e-6)
        assert label == f"{name}: {expected:.3g}"
    # Between two thirds of the maximum and the maximum, floats err most.
    error = {name: line.get_ydata() for name, line in drawn(upper).items()}
    assert np.argmax(error["nvfp4"]) in (7, 8) and error["nvfp4"][8] > 2 * error["if4"][8]


def test_zeros_have_no_error_to_plot():
    upper, lower = plots.plot_error_by_magnitude(np.zeros_like(X), ["if4"]).axes
    assert np.all(np.isnan(drawn(upper)["if4"].get_ydata()))
    assert list(drawn(lower)) == ["if4: 0"]


@pytest.mark.parametrize(("x", "formats"), [(X, []), (np.ones((0, 32)), ["if4"]), (np.float32(1), ["if4"])])
def test_error_by_magnitude_needs_formats_and_numbers(x, formats):
    with pytest.raises(ValueError, match="needs formats and numbers"):
        plots.plot_error_by_magnitude(x, formats)


def test_blocks_must_divide_rows():
    with pytest.raises(ValueError, match=r"blocks of 32 \(mxfp4\) do not divide a last axis of 48"):
        plots.plot_error_by_magnitude(np.ones((2, 48)), ["nvfp4", "mxfp4"])
    with pytest.raises(ValueError, match="do not divide"):
        plots.plot_choices_by_peak(np.ones((2, 24)))


@pytest.mark.slow
def test_integers_are_taken_where_the_maximum_does_not_stand_out(tmp_path):
    x = RNG.standard_normal((512, 256)).astype(np.float32)
    upper, lower = saved(plots.plot_choices_by_peak({"normal": x}), tmp_path).axes
    (line,) = (line for line in upper.get_lines() if line.get_label().startswith("normal"))
    share = line.get_ydata()[~np.isnan(line.get_ydata())]
    assert share[0] > 85 and share[-1] < 20
    half = float(line.get_label().removeprefix("normal: half at "))
    assert 2.2 < half < 2.35  # arXiv 2605.31035 has 2.22 in theory; 2.25 to 2.27 measured on normal numbers
    np.testing.assert_allclose(np.sum(lower.get_lines()[0].get_ydata()), 100)
    assert "INT4" in upper.get_ylabel()


def test_a_share_that_does_not_fall_has_no_half():
    (line, *_) = plots.plot_choices_by_peak(np.ones_like(X)).axes[0].get_lines()
    assert line.get_label() == "if4"


def test_one_decoding_has_no_choice():
    with pytest.raises(ValueError, match="one decoding"):
        plots.plot_choices_by_peak(X, "fouroversix")


# --- reports, curves -------------------------------------------------------------------------------------------------


def test_reports_are_compared_by_layer(tmp_path):
    def report(plus, after):
        layers = [entry(f"layer/{i}/{n}/kernel", 20 + plus + i + j) for i in (0, 1, 10) for j, n in enumerate("qk")]
        return Report((entry("embedding/kernel", 25 + plus, after), *layers, entry("layer/0/bias", None, 256, None)))

    upper, lower = saved(plots.plot_report({"nvfp4": report(0, 2308), "if4": report(2, 2308)}), tmp_path).axes
    assert [label.get_text() for label in upper.get_xticklabels()] == ["0", "1", "10", "other"]
    np.testing.assert_allclose(drawn(upper)["nvfp4"].get_ydata(), [20.5, 21.5, 30.5])
    np.testing.assert_allclose(drawn(upper)["if4"].get_ydata(), [22.5, 23.5, 32.5])
    assert [label.get_text() for label in lower.get_yticklabels()] == ["before", "nvfp4", "if4"]
    assert upper.get_ylabel() == "SQNR, dB" and "MB" in lower.get_xlabel()


def test_one_report_needs_no_name():
    upper, lower = plots.plot_report(Report((entry("kernel", 20.0),))).axes
    assert upper.get_legend() is None
    assert [label.get_text() for label in lower.get_yticklabels()] == ["before", "after"]


@pytest.mark.parametrize("reports", [{}, Report(()), {"a": Report((entry("bias", None, 256, None),))}])
def test_nothing_to_report_is_refused(reports):
    with pytest.raises(ValueError, match="no SQNR to plot"):
        plots.plot_report(reports)


def test_curves_keep_their_numbers_and_take_jax_arrays(tmp_path):
    curves = {f"c{i}": (np.arange(50), jax.numpy.arange(50.0) * i) for i in range(10)}
    (axes,) = saved(plots.plot_curves(curves, xlabel="step", ylabel="loss, nats"), tmp_path).axes
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("step", "loss, nats")
    np.testing.assert_array_equal(drawn(axes)["c3"].get_ydata(), 3.0 * np.arange(50))
    looks = {(line.get_marker(), line.get_linestyle(), line.get_color()) for line in axes.get_lines()}
    assert len(looks) == 10
    with pytest.raises(ValueError, match="needs curves"):
        plots.plot_curves({}, xlabel="", ylabel="")


def test_grids_of_runs_are_those_of_the_run_with_the_maximum():
    figure = plots.plot_grid("hifloat4")
    marks = [line for line in figure.axes[0].lines if line.get_marker() == "o"]
    np.testing.assert_allclose(np.sort(marks[0].get_xdata()), np.arange(-7, 8) / 7, rtol=1e-6)
