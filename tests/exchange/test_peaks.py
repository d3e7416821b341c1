"""What the largest block scale was when a tensor was written, 448, 256 or another, is never assumed when it is read."""

import dataclasses

import numpy as np
import pytest
from exchange_cases import E2M1_VALUES, F8, codes_in
from numpy.testing import assert_array_equal

import ifjax
from ifjax import exchange

RNG = np.random.default_rng(0)
E0M3 = np.array([0, 1, 2, 3, 4, 5, 6, 7, -0.0, -1, -2, -3, -4, -5, -6, -7])


def written(peak, signs):
    """Codes, scale bytes up to `peak` and the factor amax / (6 * peak), as tools write them that know no more."""
    amax = np.float32(3.7)
    top = np.float32(peak).astype(F8).view(np.uint8)
    scales = RNG.integers(1, int(top) + 1, (6, 4)).astype(np.uint8)
    scales[0, 0] = top
    scales |= np.uint8(128) * (RNG.random(scales.shape) < signs)
    codes = RNG.integers(0, 256, (6, 32), np.uint8)
    return codes, scales, amax, np.float32(amax / np.float32(6 * peak))


def arrays_of(tool, codes, scales, factor, peak, amax):
    if tool == "modelopt":
        return {"a.weight": codes, "a.weight_scale": scales.view(F8), "a.weight_scale_2": factor}
    divisor = np.float32([np.float32(6 * peak) / amax])
    return {"a.weight_packed": codes, "a.weight_scale": scales.view(F8), "a.weight_global_scale": divisor}


CASES = [("modelopt", "nvfp4"), ("compressed-tensors", "nvfp4"), ("compressed-tensors", "mixfp4")]


@pytest.mark.parametrize("peak", [448.0, 256.0, 416.0])
@pytest.mark.parametrize("tool, fmt", CASES)
def test_values_are_code_times_scale_times_factor_whatever_the_peak(tool, fmt, peak):
    codes, scales, amax, factor = written(peak, 0.5 if fmt == "mixfp4" else 0.0)
    (q,) = exchange.import_tensors(arrays_of(tool, codes, scales, factor, peak, amax), tool, fmt=fmt).values()
    magnitude = (scales & 127).view(F8).astype(np.float64)
    elements = np.where((scales >> 7 == 1).repeat(16, -1), E0M3[codes_in(codes)], E2M1_VALUES[codes_in(codes)])
    if fmt == "mixfp4":  # its integers' step is the record's: in both decodings the largest is worth the same or stated
        steps = np.array([d.step for d in ifjax.get_format("mixfp4").decodings])
        elements = elements * steps[scales >> 7].repeat(16, -1)
    exact = elements * magnitude.repeat(16, -1) * np.float64(factor)
    error = np.abs(np.asarray(q.dequantize(), np.float64) - exact)
    assert (error <= 2 * np.spacing(np.abs(exact).astype(np.float32)).astype(np.float64)).all()
    assert_array_equal(q.codes, codes)
    assert_array_equal(q.scales, scales)
    out = exchange.export_tensor(q, tool)
    stored = out["weight_scale_2"] if tool == "modelopt" else 1 / out["weight_global_scale"]
    np.testing.assert_allclose(stored, factor, rtol=3e-7)


@pytest.mark.parametrize("name", ["a.weight_e4m3_max", "a.weight_max_scale"])
def test_a_peak_that_is_stored_beside_a_weight_is_not_ignored(name):
    codes, scales, amax, factor = written(256.0, 0)
    arrays = arrays_of("modelopt", codes, scales, factor, 256.0, amax) | {name: np.float32(256)}
    with pytest.raises(ValueError, match="changes what its layer's weight means, and is not known beside it"):
        exchange.import_tensors(arrays, "modelopt")


@pytest.mark.by_default("256.0")
@pytest.mark.parametrize("peak", [448.0, 256.0, 416.0])
def test_our_own_files_state_it_in_the_record(peak, tmp_path):
    """A reader without a table of formats decodes by the record: another peak makes other values of the same bytes."""
    fmt = dataclasses.replace(ifjax.get_format("nvfp4"), name="nvfp4_of_a_stranger", tensor_peak=peak)
    x = RNG.standard_normal((4, 64), np.float32)
    q = ifjax.quantize(x, fmt)
    assert float(np.asarray(q.scales).view(F8).astype(np.float32).max()) <= peak
    path = ifjax.save_file({"w": q}, tmp_path / "m.safetensors")
    back = ifjax.load_file(path)["w"]
    assert back.fmt.tensor_peak == peak and back.fmt == fmt
    assert_array_equal(back.dequantize(), q.dequantize())
    (theirs,) = exchange.import_tensors(
        {f"a.{n}": a for n, a in exchange.export_tensor(q, "modelopt").items()}, "modelopt").values()  # fmt: skip
    np.testing.assert_allclose(theirs.dequantize(), q.dequantize(), rtol=3e-7)
