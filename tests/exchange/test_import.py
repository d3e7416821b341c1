"""What comes in: every byte, declarations, and files that contradict themselves."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from exchange_cases import F8, TOOLS, assert_same, assert_same_arrays, changed, tensor
from numpy.testing import assert_array_equal

import ifjax
from ifjax import exchange


@pytest.mark.parametrize("axis", [-1, -2])
@pytest.mark.parametrize("fmt", ["nvfp4", "mxfp4"])
@pytest.mark.parametrize("tool", TOOLS)
def test_all_codes_and_scales_come_back_bit_for_bit(tool, fmt, axis):
    """Each byte of codes with each scale byte that has a meaning."""
    block = ifjax.FORMATS[fmt].block // 2
    codes = np.arange(256, dtype=np.uint8).reshape(-1, block)
    scales = np.arange(1, 0x7F) if fmt == "nvfp4" else np.arange(1, 255)
    q = tensor(fmt, (len(scales), 512), scales=scales[:, None])
    q = q.replaced(codes=jnp.asarray(np.tile(codes.reshape(-1), (len(scales), 1))))
    if axis == -2:
        q = q.replaced(codes=q.codes.T, scales=q.scales.T, axis=-2)
    arrays, config = exchange.export_tensors({"up.weight": q, "up.bias": np.ones(3)}, tool)
    back = exchange.import_tensors(arrays, config, axis=axis)
    assert list(back) == ["up.weight", "up.bias"]
    assert_same(back["up.weight"], q.replaced(amax=back["up.weight"].amax))
    assert_array_equal(back["up.bias"], np.ones(3))
    if fmt == "nvfp4":
        assert abs(int(np.asarray(back["up.weight"].amax).view(np.int32)) - int(np.float32(3).view(np.int32))) <= 1


@pytest.mark.parametrize("fmt", ["nvfp4", "fouroversix"])
@pytest.mark.parametrize("tool", TOOLS)
def test_what_was_imported_goes_out_with_the_same_bytes(tool, fmt):
    """The stored factor is kept to the last bit, though amax is not: K / amax is not one to one in float32."""
    rng, changed = np.random.default_rng(5), 0
    for amax in (rng.uniform(1, 2, 200) * 2.0 ** rng.integers(-20, 20, 200)).astype(np.float32):
        arrays = exchange.export_tensor(tensor(fmt, (1, 16), amax=amax), tool)
        (back,) = exchange.import_tensors(arrays, tool, fmt=fmt).values()
        assert_same_arrays(exchange.export_tensor(back, tool), arrays)
        changed += int(back.amax != amax)
    assert changed < 60


def test_factors_that_no_amax_gives_get_the_nearest():
    stored, K = np.float32(1.2345678) * np.ones(1, np.float32), np.float32(2688)
    candidates = []
    for _ in range(400):
        stored = np.nextafter(stored, np.float32(2))
        near = np.float32(np.float64(K) / np.float64(stored[0]))
        options = [near, np.nextafter(near, np.float32(0)), np.nextafter(near, np.float32(np.inf))]
        if not any(K / option == stored[0] for option in options):
            candidates.append((stored.copy(), near))
    assert candidates
    arrays = exchange.export_tensor(tensor("nvfp4", (1, 16)), "compressed-tensors")
    for factor, near in candidates[:5]:
        (back,) = exchange.import_tensors(arrays | {"weight_global_scale": factor}, "compressed-tensors").values()
        assert back.amax == near


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, ml_dtypes.bfloat16])
def test_a_factor_is_one_number_of_any_float_type(shape, dtype):
    arrays = exchange.export_tensor(tensor("nvfp4", (1, 16)), "modelopt")
    (back,) = exchange.import_tensors(arrays | {"weight_scale_2": np.full(shape, 0.5, dtype)}, "modelopt").values()
    assert back.amax == 1344 and back.amax.shape == () and back.amax.dtype == jnp.float32


def test_imports_can_stand_for_other_dtypes_and_formats():
    arrays = exchange.export_tensor(tensor("fouroversix", amax=1.5), "modelopt")
    (back,) = exchange.import_tensors(arrays, "modelopt", fmt="fouroversix", dtype=jnp.bfloat16).values()
    assert (back.fmt.name, back.dtype, back.amax) == ("fouroversix", jnp.bfloat16, 1.5)
    (back,) = exchange.import_tensors(arrays, "modelopt", headroom=16 / 17).values()
    np.testing.assert_allclose(back.dequantize(), tensor("fouroversix", amax=1.5).dequantize(), rtol=2.0**-22)


def test_mxfp4_scales_are_bytes_or_typed():
    q = tensor("mxfp4")
    arrays = exchange.export_tensor(q, "compressed-tensors")
    typed = arrays | {"weight_scale": arrays["weight_scale"].view(ml_dtypes.float8_e8m0fnu)}
    for given in (arrays, typed):
        (back,) = exchange.import_tensors(given, "compressed-tensors").values()
        assert_same(back, q)


def test_the_other_order_of_nibbles_has_to_be_stated():
    q = tensor("nvfp4")
    arrays = exchange.export_tensor(q, "modelopt")
    with pytest.raises(ValueError, match="both orders of nibbles"):
        exchange.import_tensors(arrays)
    declared = {"quant_method": "modelopt_fp4", "quant_algo": "nvfp4"}
    for settings in ({"tool": "modelopt"}, {"nibbles": "low_first"}, {"tool": declared}):
        (back,) = exchange.import_tensors(arrays, **settings).values()
        assert_array_equal(back.codes, q.codes)
    (back,) = exchange.import_tensors(arrays, nibbles="high_first").values()
    codes = np.asarray(q.unpacked_codes())
    assert_array_equal(back.unpacked_codes(), codes.reshape(-1, 2)[:, ::-1].reshape(codes.shape))


def test_names_that_one_tool_uses_decide():
    q = tensor("nvfp4")
    (back,) = exchange.import_tensors(exchange.export_tensor(q, "compressed-tensors")).values()
    assert_array_equal(back.codes, q.codes)
    for names in ({}, {"weight": np.zeros((4, 8), np.uint8)}, {"a.w_q": np.zeros((4, 8), np.uint8)}):
        with pytest.raises(ValueError, match="cannot be decided"):
            exchange.import_tensors(names)


NV = exchange.export_tensor(tensor("nvfp4"), "compressed-tensors")
MX = exchange.export_tensor(tensor("mxfp4"), "compressed-tensors")


@pytest.mark.parametrize(
    "arrays, message",
    [
        (changed(NV, weight_scale=None), "weight_scale is missing"),
        (changed(NV, weight_global_scale=None), "weight_global_scale is missing"),
        (changed(NV, weight_scale=(-np.ones((6, 4))).astype(F8)), "24 of 24 block scales have their sign set"),
        (changed(NV, weight_scale=np.full((6, 4), 0x80, np.uint8).view(F8)), "cannot be decided"),
        (changed(NV, weight_scale=np.full((6, 4), 0x7F, np.uint8).view(F8)), "NaN"),
        (changed(NV, weight_scale=NV["weight_scale"].view(np.uint8)), "do not make blocks of 32"),
        (changed(NV, weight_scale=NV["weight_scale"].astype(np.float32)), "weight_scale is F32, and nvfp4-pack-quant"),
        (changed(NV, weight_scale=NV["weight_scale"].reshape(-1)), "swizzled"),
        (changed(NV, weight_scale=NV["weight_scale"][:, :2]), "do not make blocks of 16"),
        (changed(NV, weight_scale=NV["weight_scale"][:5]), "do not make blocks of 16"),
        (changed(NV, weight_packed=NV["weight_packed"].view(np.int8)), "weight_packed of type U8, got I8"),
        (changed(NV, weight_packed=NV["weight_packed"].view(np.int32)), "weight_packed of type U8, got I32"),
        (changed(NV, weight_packed=NV["weight_packed"][None], weight_scale=NV["weight_scale"][None]), "taken apart"),
        (changed(NV, weight_global_scale=np.zeros(1, np.float32)), "finite and > 0"),
        (changed(NV, weight_global_scale=np.full(1, np.inf, np.float32)), "finite and > 0"),
        (changed(NV, weight_global_scale=np.full(1, 1e-37, np.float32)), "no normal float32"),
        (changed(NV, weight_global_scale=np.ones(6, np.float32)), "must be one float"),
        (changed(NV, weight_global_scale=np.ones(1, np.int32)), "weight_global_scale is I32"),
        (changed(NV, weight_zero_point=np.zeros(1)), "weight_zero_point changes"),
        (changed(NV, weight_g_idx=np.zeros(64, np.int32)), "weight_g_idx changes"),
        (changed(NV, pre_quant_scale=np.ones(64)), "pre_quant_scale changes"),
        (changed(NV, weight=np.ones((6, 64))), "both packed and unpacked"),
        (changed(MX, weight_scale=np.zeros((6, 2), np.uint8)), "2\\^-127"),
        (changed(MX, weight_scale=np.full((6, 2), 255, np.uint8)), "NaN"),
        ({"weight": np.ones((6, 64), np.int8), "weight_scale": np.ones((6, 1))}, "weight_scale changes"),
    ],
)
def test_files_that_contradict_themselves_are_refused(arrays, message):
    with pytest.raises(ValueError, match=message):
        exchange.import_tensors({f"up.{name}": array for name, array in arrays.items()}, "compressed-tensors")


@pytest.mark.parametrize(
    "settings, error, message",
    [
        ({"tool": "ggml"}, ValueError, "tool must be"),
        ({"axis": 0}, ValueError, "axis must be"),
        ({"nibbles": "little"}, ValueError, "nibbles must be"),
        ({"dtype": jnp.int8}, TypeError, "dtype must be"),
        ({"fmt": "if4"}, ValueError, "cannot be read as if4"),
        ({"fmt": "nvfp4_bs8"}, ValueError, "cannot be read as nvfp4_bs8"),
        ({"tool": {"quant_method": "gptq"}}, ValueError, "not known here"),
        ({"tool": {"quant_method": "compressed-tensors", "format": "marlin-24"}}, ValueError, "marlin-24"),
        ({"tool": {"quant_method": "compressed-tensors", "format": "pack-quantized"}}, ValueError, "pack-quantized"),
        ({"tool": {"quant_algo": "NVFP4_AWQ"}}, ValueError, "NVFP4_AWQ"),
        ({"tool": {"quantization": [1]}}, ValueError, "not a quantization_config"),
        ({"tool": {"quant_algo": "NVFP4", "config_groups": [1]}}, ValueError, "not a quantization_config"),
        ({"tool": {"quant_algo": ["NVFP4"]}}, ValueError, "not known here"),
        ({"tool": {"quantization": {"quant_algo": "NVFP4", "group_size": 32}}}, ValueError, "blocks of 16"),
        (
            {"tool": {"quant_algo": "NVFP4", "config_groups": {"g": {"weights": {"group_size": 8}}}}},
            ValueError,
            "blocks of 16",
        ),
        (
            {
                "tool": {
                    "quant_method": "compressed-tensors",
                    "format": "nvfp4-pack-quantized",
                    "transform_config": {"config_groups": {"R1": {}}},
                }
            },
            ValueError,
            "rotated",
        ),
    ],
)
def test_unknown_declarations_are_refused(settings, error, message):
    with pytest.raises(error, match=message):
        exchange.import_tensors(NV, **settings)


def test_mixfp4_by_its_worked_bytes():
    """A block of integers: bit 7 of its scale is set. Bytes by arXiv 2605.31035's rule, reckoned by hand."""
    x = [6, 5, -5, 0.2, -0.2, 1, -1, 2, -2, 3, -3, 4, -4, 0.5, 0, -0.0]
    q = ifjax.quantize(np.array([x], np.float32), "mixfp4")
    arrays, config = exchange.export_tensors({"up.weight": q}, "compressed-tensors")
    assert arrays["up.weight_scale"].view(np.uint8).tobytes().hex() == "fc"
    # One hex digit a code, in order; in bytes the earlier code is the lower one.
    digits = arrays["up.weight_packed"].tobytes().hex()
    assert "".join(b + a for a, b in zip(digits[::2], digits[1::2], strict=True)) == "76e00192a4c5d100"
    assert config["format"] == "mixfp4-pack-quantized"
    (back,) = exchange.import_tensors(arrays, config).values()
    assert_array_equal(back.codes, q.codes)
    assert_array_equal(back.dequantize(), q.dequantize())
    with pytest.raises(ValueError, match="sign set"):  # as NVFP4 it would mean something else
        exchange.import_tensors(arrays, config | {"format": "nvfp4-pack-quantized"})
