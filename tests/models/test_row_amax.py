"""Weights with one amax per output, for rows that differ by more than a format's scales; the report of what is lost.

quad's scales span 1792 in a tensor: rows that are 2^-12 of the largest decode to zeros without an amax of their own.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from samples import initialized, normal

import ifjax
from ifjax import Rule
from ifjax.arrays.shaping import has_own_amax
from ifjax.convert import quantize_file
from ifjax.models.report import Report

ROW = Rule(".*", "quad", weight_amax="row")
TENSOR = Rule(".*", "quad")
X = normal(8, 32)


class Model(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.DenseGeneral((2, 16), name="heads")(x)
        return nn.DenseGeneral(6, axis=(-2, -1), name="out")(x)


@functools.cache
def model():
    """Return a model of which half of the outputs of each layer are 2^-12 of the others."""
    made = Model()
    params = jax.tree.map(np.array, initialized(made, X))
    params["params"]["heads"]["kernel"][:, 1] *= 2.0**-12
    params["params"]["out"]["kernel"][..., ::2] *= 2.0**-12
    return made, params


def quantized_by(rule, quantize=ifjax.quantize_params, **kwargs):
    made, params = model()
    return quantize(params, rule, model=made, sample=X, **kwargs)


def test_rows_beyond_the_range_are_reported_as_flushed_and_survive_by_an_amax_each():
    packed, report = quantized_by(TENSOR)
    shares = {entry.path: entry.flushed_share for entry in report.quantized}
    assert shares == {"heads/kernel": 0.5, "out/kernel": 0.5}
    assert "flushed %" in str(report) and Report.from_json(report.to_json()) == report
    assert not np.any(packed["params"]["heads"]["kernel"].dequantize()[:, 1])

    packed, report = quantized_by(ROW)
    assert {entry.flushed_share for entry in report.quantized} == {0.0} and "flushed" not in str(report)
    report.check(min_sqnr_db=20)
    for name, kernel in packed["params"].items():
        before = model()[1]["params"][name]["kernel"]
        axes = (0,) if name == "heads" else (0, 1)
        error = np.square(kernel["kernel"].dequantize() - before).sum(axes) / np.square(before).sum(axes)
        assert error.max() < 0.02  # of each output, however small
        own = [has_own_amax(kernel["kernel"], axis) for axis in range(3)]
        assert own == ([False, True, True] if name == "heads" else [False, False, True])
        assert kernel["kernel"].amax.shape == tuple(n if o else 1 for n, o in zip(before.shape, own, strict=True))


@pytest.mark.by_default("quad")
@pytest.mark.parametrize("fmt", ["quad", "octet", "sfp4", "razer", "if4", "nvfp4"])
def test_flushed_blocks_are_those_that_decode_to_zeros(fmt):
    w = np.array(normal(48, 20)) * np.exp2(-np.arange(20, dtype=np.float32))
    w[16:32, 3] = 0  # a block of zeros is not flushed
    packed, report = ifjax.quantize_params({"w": w}, Rule("w", fmt, axis=-2))
    decoded = np.asarray(packed["w"].dequantize())
    there, kept = ((a.reshape(3, 16, 20) != 0).any(1) for a in (w, decoded))
    assert report.entries[0].flushed_share == pytest.approx((there & ~kept).sum() / there.sum())
    assert there.sum() == 59
    _, report = ifjax.quantize_params({"w": w}, Rule("w", fmt, axis=-2, weight_amax="row"))
    assert report.entries[0].flushed_share == 0


def test_products_read_an_amax_per_output():
    made, params = model()
    packed, _ = quantized_by(ROW)
    rounded, report = quantized_by(ROW, ifjax.fake_quantize_params)
    assert {entry.flushed_share for entry in report.quantized} == {0.0}
    want = made.apply(rounded, X)
    of = functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=1e-7)
    of(made.apply(packed, X), want)
    of(jax.jit(ifjax.quantized(made.apply, ROW))(packed, X), want)
    of(jax.jit(ifjax.quantized(made.apply, ROW))(params, X), want)  # quantized on the fly
    with nn.intercept_methods(ifjax.interceptors.inference([ROW])):
        of(made.apply(params, X), want)
    both = ifjax.quantized(made.apply, Rule(".*", "quad", "quad", weight_amax="row", act_amax="token"))
    assert np.linalg.norm(both(packed, X) - want) < 0.1 * np.linalg.norm(want)


def test_files_keep_an_amax_per_output(tmp_path):
    packed, _ = quantized_by(ROW)
    file = ifjax.save_file(packed["params"], tmp_path / "model.safetensors")
    loaded = ifjax.load_file(file)
    kernel = loaded["heads.kernel"] if "heads.kernel" in loaded else loaded["heads"]["kernel"]
    jax.tree.map(np.testing.assert_array_equal, kernel, packed["params"]["heads"]["kernel"])
    for suffix in ("yaml", "json"):
        ifjax.save_rules([ROW], tmp_path / f"rules.{suffix}")
        assert ifjax.load_rules(tmp_path / f"rules.{suffix}") == (ROW,)


def test_files_are_quantized_with_an_amax_a_matrix_and_say_what_is_flushed(tmp_path):
    w = np.array(normal(20, 48)) * np.exp2(-np.arange(20, dtype=np.float32))[:, None]
    file = ifjax.save_file({"w.weight": jnp.asarray(w), "t.weight": jnp.asarray(w.T)}, tmp_path / "floats.safetensors")
    rules = [Rule("w", "quad"), Rule("t", "quad", axis=-2)]
    for rule, axis in zip(rules, (-1, -2), strict=True):
        name = f"{rule.path}.weight"
        report = quantize_file(file, tmp_path / f"{rule.path}.safetensors", [rule, Rule(".*", None, optional=True)])
        want = ifjax.quantize_params({"w": w if axis == -1 else w.T}, Rule("w", "quad", axis=axis))[1].entries[0]
        (entry,) = [entry for entry in report.entries if entry.path == name]
        assert entry.flushed_share == pytest.approx(want.flushed_share) and entry.flushed_share > 0.3
    with pytest.raises(ValueError, match="files are quantized in pieces with one amax a matrix: leave weight_amax out"):
        quantize_file(file, tmp_path / "no.safetensors", ROW)


@pytest.mark.by_default("None")
@pytest.mark.parametrize("search", [None, "fast", "joint"])
def test_gptq_keeps_an_amax_per_output(search):
    """Uncorrelated inputs of equal size: the bytes are those of plain rounding, merged contracted axes too."""
    rule = Rule(".*", "quad", weight_amax="row", gptq=True, search=search)
    plain = Rule(".*", "quad", weight_amax="row", search=search)
    w = model()[1]["params"]["out"]["kernel"]
    q = ifjax.gptq(w.reshape(32, 6), np.eye(32, dtype=np.float32), "quad", axis=0, amax_axes=(1,), search=search)
    want = ifjax.quantize(w.reshape(32, 6), "quad", axis=0, amax_axes=(1,), search=search)
    jax.tree.map(np.testing.assert_array_equal, q, want)
    made, params = model()
    calibration = ifjax.calibrate(made.apply, params, [X], [rule], progress=False)
    packed, report = quantized_by(rule, calibration=calibration)
    assert {entry.flushed_share for entry in report.check().quantized} == {0.0}
    other, _ = quantized_by(plain)
    for name in ("heads", "out"):
        a, b = (tree["params"][name]["kernel"] for tree in (packed, other))
        assert a.amax.shape == b.amax.shape and a.shape == b.shape
        if search != "joint":
            np.testing.assert_array_equal(a.amax, b.amax)


def test_stacked_layers_keep_an_amax_per_layer_and_output():
    w = normal(3, 16, 4)
    packed, _ = ifjax.quantize_params({"w": w}, Rule("w", "quad", axis=-2, weight_amax="row"))
    assert packed["w"].amax.shape == (3, 1, 4)
    want = ifjax.quantize(w, "quad", axis=-2, amax_axes=(0, 2))
    jax.tree.map(np.testing.assert_array_equal, packed["w"], want)
