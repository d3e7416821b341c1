"""What other tools read of us and we of them: exact bytes, by tables written here and by their own readers."""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from numpy.testing import assert_array_equal

import ifjax
from ifjax import exchange
from ifjax.arrays import Blocking
from ifjax.formats import E2M1, E4M3, E8M0, Candidate, Format, Grid

E2M1_VALUES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
LARGEST = {"nvfp4": 6 * 448, "fouroversix": 6 * 256, "nvfp4_static4": 4 * 448}
F8 = np.dtype(ml_dtypes.float8_e4m3fn)
TOOLS = ("compressed-tensors", "modelopt")  # the first two; the others have tests of their own


def tensor(fmt, shape=(6, 64), axis=-1, amax=3.0, seed=0, headroom=1.0, scales=None, dtype="float32", **changes):
    """A QTensor of random codes and scale bytes; nothing is compiled."""
    fmt = ifjax.get_format(fmt)
    rng = np.random.default_rng(seed)
    packed, blocks = list(shape), list(shape)
    packed[axis], blocks[axis] = -(-shape[axis] // fmt.block) * fmt.block * fmt.bits // 8, -(-shape[axis] // fmt.block)
    low, high = (60, 180) if fmt.scale.dtype == ml_dtypes.float8_e8m0fnu else (1, 0x7F)
    scales = rng.integers(low, high, blocks) if scales is None else np.broadcast_to(scales, blocks)
    q = ifjax.QTensor(
        codes=jnp.asarray(rng.integers(0, 256, packed, np.uint8)),
        scales=jnp.asarray(np.ascontiguousarray(scales).astype(np.uint8)),
        amax=jnp.float32(amax) if fmt.has_tensor_scale else None,
        blocking=Blocking(fmt, axis, shape[axis], np.dtype(dtype), headroom),
    )  # fmt: skip
    return q.replaced(**changes)


def bytes_of(array):
    array = np.asarray(array)
    return array.reshape(-1).view(np.uint8).reshape(*array.shape, -1).squeeze(-1) if array.ndim else array.tobytes()


def codes_in(packed):
    """The earlier code is in the low nibble."""
    packed = np.asarray(packed)
    return np.stack([packed & 15, packed >> 4], -1).reshape(*packed.shape[:-1], -1)


def assert_same_arrays(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert (a[name].dtype, a[name].shape) == (b[name].dtype, b[name].shape), name
        assert a[name].tobytes() == b[name].tobytes(), name


def assert_same(a, b):
    """QTensors with equal types and equal bytes."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for one, other in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


# --- out -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("axis", [-1, -2])
@pytest.mark.parametrize("fmt", ["nvfp4", "fouroversix"])
def test_nvfp4_goes_out_byte_for_byte(fmt, axis):
    q = tensor(fmt, (64, 6) if axis == -2 else (6, 64), axis, amax=3.7)
    turned = (lambda a: np.asarray(a).T) if axis == -2 else np.asarray
    ct, mo = exchange.export_tensor(q, "compressed-tensors"), exchange.export_tensor(q, "modelopt")
    assert list(ct) == ["weight_packed", "weight_scale", "weight_global_scale"]
    assert list(mo) == ["weight", "weight_scale", "weight_scale_2"]
    assert_array_equal(codes_in(ct["weight_packed"]), turned(q.unpacked_codes()))
    for arrays in (ct, mo):
        packed, scales, _ = arrays.values()
        assert packed.dtype == np.uint8 and packed.shape == (6, 32) and packed.flags.c_contiguous
        assert scales.dtype == F8 and scales.shape == (6, 4) and scales.flags.c_contiguous
        assert packed.tobytes() == np.ascontiguousarray(turned(q.codes)).tobytes()
        assert scales.tobytes() == np.ascontiguousarray(turned(q.scales)).tobytes()
    largest, amax = np.float32(LARGEST[fmt]), np.float32(3.7)
    assert_array_equal(ct["weight_global_scale"], np.array([largest / amax], np.float32))
    assert mo["weight_scale_2"].shape == () and mo["weight_scale_2"] == amax / largest


@pytest.mark.parametrize("axis", [-1, -2])
def test_mxfp4_goes_out_byte_for_byte(axis):
    q = tensor("mxfp4", (64, 6) if axis == -2 else (6, 64), axis)
    turned = (lambda a: np.asarray(a).T) if axis == -2 else np.asarray
    for tool, name in (("compressed-tensors", "weight_packed"), ("modelopt", "weight")):
        arrays = exchange.export_tensor(q, tool)
        assert list(arrays) == [name, "weight_scale"]
        assert arrays["weight_scale"].dtype == np.uint8
        assert_array_equal(codes_in(arrays[name]), turned(q.unpacked_codes()))
        assert_array_equal(arrays["weight_scale"], turned(q.scales))


def test_a_flax_kernel_is_stored_as_the_torch_weight():
    """The same bytes whichever way round the matrix was quantized, with real codes, scales and amax."""
    w = np.random.default_rng(0).normal(size=(8, 48)).astype(np.float32)
    torch_way, flax_way = (ifjax.quantize(jnp.asarray(x), "nvfp4", axis=a) for x, a in ((w, -1), (w.T, -2)))
    for tool in TOOLS:
        assert_same_arrays(exchange.export_tensor(torch_way, tool), exchange.export_tensor(flax_way, tool))


def values_read(arrays):
    """In float64, as the readers define it."""
    packed, scales, factor = arrays.values()
    codes = codes_in(packed)
    factor = 1 / np.float64(factor) if "weight_global_scale" in arrays else np.float64(factor)
    return E2M1_VALUES[codes] * scales.astype(np.float64).repeat(16, -1) * factor


@pytest.mark.parametrize("headroom", [1.0, 16 / 17])
@pytest.mark.parametrize("fmt", ["nvfp4", "fouroversix", "nvfp4_static4"])
def test_each_formats_own_constant_is_in_the_factor(fmt, headroom):
    """448, 256, a peak of 4, the unbiased range: whatever K is, readers that know none of it get the values."""
    q = tensor(fmt, headroom=headroom, amax=0.37)
    for tool in TOOLS:
        expected = np.asarray(q.dequantize(), np.float64)
        np.testing.assert_allclose(values_read(exchange.export_tensor(q, tool)), expected, rtol=2.0**-22)


def test_a_tensor_without_amax_has_the_factor_one():
    q = tensor("fouroversix").replaced(amax=None)
    for tool in TOOLS:
        *_, factor = exchange.export_tensor(q, tool).values()
        assert factor == 1
        assert_array_equal(values_read(exchange.export_tensor(q, tool)), q.dequantize())


def test_zeros_get_a_factor_that_is_a_number():
    q = tensor("nvfp4", scales=0, amax=0.0).replaced(codes=jnp.zeros((6, 32), jnp.uint8))
    for tool in TOOLS:
        arrays = exchange.export_tensor(q, tool)
        *_, factor = arrays.values()
        assert factor == 1 and not values_read(arrays).any()
        (back,) = exchange.import_tensors(arrays, tool).values()
        assert not np.asarray(back.codes).any() and not np.asarray(back.scales).any()
        # A factor that is no number does no harm to zeros either.
        arrays = arrays | {list(arrays)[-1]: np.float32(np.inf)}
        (back,) = exchange.import_tensors(arrays, tool).values()
        assert back.amax == 0


FLAGGED = Format("nvfp4", ifjax.FORMATS["if4"].candidates, 16)
FOREIGN_GRID = Format("halves", (Candidate(Grid.sign_magnitude("halves", tuple(i / 2 for i in range(8)))),), 16)
SHIFTED = Format("shifted", (Candidate(E2M1, offset=0.25),), 16)
TAPER = dataclasses.replace(E2M1, name="mine", ties="away")


@pytest.mark.parametrize(
    "fmt, reason",
    [
        ("if4", "flip the signs"),
        ("if4_bs8", "flip the signs"),
        (FLAGGED, "flip the signs"),
        ("if3", "flip the signs"),
        ("nvint4", "INT4"),
        ("nvfp3", "E2M0"),
        ("nvfp6_e2m3", "E2M3"),
        (FOREIGN_GRID, "halves"),
        (SHIFTED, r"elements E2M1 \+ 0\.25"),
        ("nvfp4_bs8", "blocks of 8"),
        ("mxfp4_bs8", "blocks of 8"),
        (dataclasses.replace(ifjax.FORMATS["nvfp4"], name="nv32", block=32), "blocks of 32 with e4m3"),
    ],
)
@pytest.mark.parametrize("tool", TOOLS)
def test_what_no_reader_decodes_is_refused_with_the_reason(fmt, reason, tool):
    described = jax.eval_shape(lambda x: ifjax.quantize(x, fmt), jax.ShapeDtypeStruct((4, 64), jnp.float32))
    with pytest.raises(ValueError, match=reason):
        exchange.export_tensor(described, tool)


@pytest.mark.parametrize(
    "fmt",
    [
        Format("if4", tuple(Candidate(E2M1, scale_multiplier=s) for s in (1.0, 1.25, 1.5)), 16, tensor_peak=256.0),
        Format("any", (Candidate(TAPER),), 16, dataclasses.replace(E4M3, name="mine", last=100), tensor_peak=3.25),
        Format("mx", (Candidate(TAPER),), 32, E8M0, peak=3.0, tensor_peak=None),
    ],
    ids=lambda fmt: fmt.name,
)
def test_the_record_decides_and_not_the_name(fmt):
    q = tensor(fmt)
    arrays = exchange.export_tensor(q, "compressed-tensors")
    assert arrays["weight_packed"].tobytes() == np.asarray(q.codes).tobytes()
    if "weight_global_scale" in arrays:
        assert arrays["weight_global_scale"] == fmt.tensor_constant() / np.float32(3)


@pytest.mark.parametrize(
    "q, message",
    [
        (tensor("nvfp4", (64,)), "matrices"),
        (tensor("mxfp4", (2, 6, 64)), "one by one"),
        (tensor("nvfp4", (6, 40)), "multiple of 16"),
        (tensor("mxfp4", (6, 48)), "multiple of 32"),
        (tensor("nvfp4", (0, 64)), "multiple of 16"),
        (tensor("nvfp4", (2, 32), amax=np.ones((2,), np.float32)), "one factor"),
        (tensor("nvfp4", scales=0x7F), "NaN"),
        (tensor("nvfp4", scales=0x81), "sign"),
        (tensor("nvfp4", scales=0x80), "sign"),
        (tensor("mxfp4", scales=0xFF), "NaN"),
        (tensor("mxfp4", scales=0), "2\\^-127"),
        (tensor("nvfp4", amax=0.0), "normal float32"),
        (tensor("nvfp4", amax=1e-36), "normal float32"),
        (tensor("nvfp4", amax=np.nan), "normal float32"),
        (tensor("nvfp4", amax=-1.0), "normal float32"),
    ],
)
@pytest.mark.parametrize("tool", TOOLS)
def test_what_would_be_read_otherwise_is_refused(q, message, tool):
    with pytest.raises(ValueError, match=message):
        exchange.export_tensor(q, tool)


def test_arguments_of_other_types_are_refused():
    with pytest.raises(TypeError, match="made bfloat16 of a QTensor's amax"):
        exchange.export_tensor(tensor("nvfp4").replaced(amax=jnp.bfloat16(3)), "modelopt")
    with pytest.raises(TypeError, match=r"ifjax\.quantize"):
        exchange.export_tensor(np.zeros((4, 16)), "modelopt")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"'compressed-tensors', .*'modelopt'"):
        exchange.export_tensor(tensor("nvfp4"), "ggml")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="is a object: needs arrays"):
        exchange.export_tensors({"a": object()}, "modelopt")  # type: ignore[dict-item]
    with pytest.raises(TypeError, match="flatten"):
        exchange.export_tensors({"layer": {"kernel": tensor("nvfp4")}}, "modelopt")  # type: ignore[dict-item]


def test_zero_blocks_of_zeros_go_out_in_mxfp4():
    q = tensor("mxfp4", scales=0).replaced(codes=jnp.full((6, 32), 0x80, jnp.uint8))
    assert not exchange.export_tensor(q, "modelopt")["weight_scale"].any()


# --- names and configurations ----------------------------------------------------------------------------------------


def test_a_model_goes_out_under_its_layers_names():
    norm = jnp.ones(8, jnp.bfloat16)
    params = {
        "a.up.weight": tensor("nvfp4"),
        "a.down.kernel": tensor("fouroversix", (64, 6), -2),
        "weight": tensor("nvfp4"),
        "a.norm.weight": norm,
        "lm_head.weight": np.ones((2, 16), np.float16),
        "a.up.bias": np.zeros(6, np.float32),
    }
    arrays, config = exchange.export_tensors(params, "compressed-tensors")
    parts = ("weight_packed", "weight_scale", "weight_global_scale")
    assert list(arrays) == [
        *(f"a.up.{part}" for part in parts), *(f"a.down.{part}" for part in parts), *parts,
        "a.norm.weight", "lm_head.weight", "a.up.bias",
    ]  # fmt: skip
    assert arrays["a.norm.weight"].dtype == ml_dtypes.bfloat16
    assert arrays["a.down.weight_packed"].shape == (6, 32)
    # Layers of the quantized class that are not quantized are named; what is no matrix is of no such class.
    assert config["ignore"] == ["lm_head"]


NVFP4_ARGS = {
    "num_bits": 4, "type": "float", "group_size": 16, "symmetric": True, "strategy": "tensor_group",
    "scale_dtype": "torch.float8_e4m3fn",
}  # fmt: skip
MXFP4_ARGS = NVFP4_ARGS | {"group_size": 32, "strategy": "group", "scale_dtype": "torch.uint8"}
PLAIN_ARGS = {"num_bits": 4, "type": "float", "dynamic": False}


@pytest.mark.parametrize(
    "tool, fmt, inputs, expected",
    [
        ("compressed-tensors", "nvfp4", False, {
            "quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized",
            "quantization_status": "compressed", "ignore": [],
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": NVFP4_ARGS | {"dynamic": False}}},
        }),
        ("compressed-tensors", "fouroversix", True, {
            "quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized",
            "quantization_status": "compressed", "ignore": [],
            "config_groups": {"group_0": {
                "targets": ["Linear"], "weights": NVFP4_ARGS | {"dynamic": False},
                "input_activations": NVFP4_ARGS | {"dynamic": "local"},
            }},
        }),
        ("compressed-tensors", "mxfp4", False, {
            "quant_method": "compressed-tensors", "format": "mxfp4-pack-quantized",
            "quantization_status": "compressed", "ignore": [],
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": MXFP4_ARGS | {"dynamic": False}}},
        }),
        ("modelopt", "nvfp4", False, {
            "quant_method": "modelopt", "quant_algo": "W4A16_NVFP4", "ignore": [],
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": PLAIN_ARGS | {"group_size": 16}}},
        }),
        ("modelopt", "nvfp4", True, {
            "quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": [],
            "config_groups": {"group_0": {
                "targets": ["Linear"], "weights": PLAIN_ARGS | {"group_size": 16},
                "input_activations": PLAIN_ARGS | {"group_size": 16},
            }},
        }),
        ("modelopt", "mxfp4", False, {
            "quant_method": "modelopt", "quant_algo": "MXFP4", "ignore": [],
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": PLAIN_ARGS | {"group_size": 32}}},
        }),
    ],
)  # fmt: skip
def test_the_configuration_says_what_was_done(tool, fmt, inputs, expected):
    input_amax = {"up": 2.5} if inputs else None
    arrays, config = exchange.export_tensors({"up.weight": tensor(fmt)}, tool, input_amax=input_amax)
    assert config == expected
    assert json.loads(json.dumps(config)) == config
    if inputs:
        # For inputs the reader's own constant counts, 6 * 448, not that of the weights' format.
        name, shape = ("input_global_scale", (1,)) if tool == "compressed-tensors" else ("input_scale", ())
        factor = np.float32(2688) / np.float32(2.5) if shape else np.float32(2.5) / np.float32(2688)
        assert arrays[f"up.{name}"].shape == shape and arrays[f"up.{name}"] == factor


@pytest.mark.parametrize(
    "params, settings, message",
    [
        ({"a.scale": tensor("nvfp4")}, {}, "must end with"),
        ({"Dense_0/kernel": tensor("nvfp4")}, {}, "must end with"),
        ({"a.weight": np.ones(3)}, {}, "found nothing"),
        ({"a.weight": tensor("nvfp4"), "a.kernel": tensor("nvfp4")}, {}, "twice"),
        ({"a.weight": tensor("nvfp4"), "a.weight_scale": np.ones(3)}, {}, "twice"),
        ({"a.b.weight": tensor("if4")}, {}, r"a\.b\.weight: if4 .*flip"),
        ({"a.weight": tensor("nvfp4")}, {"input_amax": {}}, r"no other: \['a'\]"),
        ({"a.weight": tensor("nvfp4")}, {"input_amax": {"a": 1.0, "b": 1.0}}, r"no other: \['b'\]"),
        ({"a.weight": tensor("nvfp4")}, {"input_amax": {"a": 0.0}}, "finite and > 0"),
        ({"a.weight": tensor("mxfp4")}, {"input_amax": {"a": 1.0}}, "leave input_amax out"),
    ],
)
def test_models_that_cannot_be_described_are_refused(params, settings, message):
    with pytest.raises(ValueError, match=message):
        exchange.export_tensors(params, "modelopt", **settings)


# --- in --------------------------------------------------------------------------------------------------------------


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


def changed(arrays, **changes):
    return {name: array for name, array in (arrays | changes).items() if array is not None}


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
        ({"tool": {"quant_method": "compressed-tensors", "format": "mixfp4-pack-quantized"}}, ValueError, "mixfp4"),
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


# --- the fouroversix package -----------------------------------------------------------------------------------------


def fouroversix_state(codes, scales, amax, *, block, swizzled, padded=None, bits=4, prefix="up.quantized_weight_"):
    """The package's four buffers of codes [rows, columns] and scale bytes, padded and swizzled by the formula."""
    rows, columns = codes.shape
    tall, wide = padded or (-(-rows // 128) * 128, -(-columns // (4 * block)) * 4 * block)
    full, grid = np.zeros((tall, wide), np.uint8), np.zeros((tall, wide // block), np.uint8)
    full[:rows, :columns] = codes
    grid[: scales.shape[0], : scales.shape[1]] = scales
    if swizzled:
        r, c = np.mgrid[:tall, : wide // block]
        flat = np.zeros(grid.size, np.uint8)
        flat[((r // 128) * (wide // block // 4) + c // 4) * 512 + r % 32 * 16 + r % 128 // 32 * 4 + c % 4] = grid
        grid = flat
    return {
        prefix + "values": full[:, ::2] | full[:, 1::2] << 4 if bits == 4 else full,
        prefix + "scale_factors": grid,
        prefix + "amax": np.array([amax], np.float32),
        prefix + "metadata": np.array([rows, columns, tall, wide, 1, int(swizzled)], np.int32),
    }


def unpacked(q):
    if q.fmt.bits != 4:
        return np.asarray(q.unpacked_codes()), np.asarray(q.scales)
    codes = np.moveaxis(codes_in(np.moveaxis(np.asarray(q.codes), q.axis, -1))[..., : q.shape[q.axis]], -1, q.axis)
    return codes, np.asarray(q.scales)


@pytest.mark.parametrize(
    "fmt, shape, swizzled",
    [
        ("fouroversix", (100, 200), True),
        ("nvfp4", (130, 64), True),
        ("if4", (5, 33), False),
        ("mxfp4", (3, 200), True),
        ("if3", (4, 48), False),
        ("nvfp6_e2m3", (4, 48), True),
    ],
)
@pytest.mark.parametrize("axis", [-1, -2])
def test_the_packages_buffers_come_in_bit_for_bit(fmt, shape, swizzled, axis):
    record = ifjax.get_format(fmt)
    rng = np.random.default_rng(1)
    codes = rng.integers(0, 2**record.bits, shape, np.uint8)
    low, high = (1, 0x7F) if record.has_tensor_scale else (1, 255)
    scales = rng.integers(low, high, (shape[0], -(-shape[1] // record.block)), np.uint8)
    if record.has_selector:
        scales |= rng.integers(0, 2, scales.shape, np.uint8) << 7
    state = fouroversix_state(codes, scales, 2.75, block=record.block, swizzled=swizzled, bits=record.bits)
    out = exchange.import_tensors(state | {"up.bias": np.ones(2)}, fmt=fmt, axis=axis)
    assert list(out) == ["up.weight", "up.bias"]
    q = out["up.weight"]
    assert (q.fmt, q.axis, q.shape) == (record, axis, shape if axis == -1 else shape[::-1])
    turned = (lambda a: a.T) if axis == -2 else (lambda a: a)
    for got, expected in zip(unpacked(q), (codes, scales), strict=True):
        assert_array_equal(turned(got), expected)
    assert q.amax == np.float32(2.75) if record.has_tensor_scale else q.amax is None


@pytest.mark.parametrize("name, fmt", [("nvfp4_mse", "fouroversix"), ("if4_mse", "if4"), ("mxfp4_static_6", "mxfp4")])
def test_the_packages_own_tensors_are_what_we_quantize_to(golden_dir, name, fmt):
    golden = np.load(golden_dir / "layout.npz")
    x = golden["pad_x_bf16bits"].view(ml_dtypes.bfloat16)
    padded, swizzled = golden[f"pad_{name}__padded_shape"], int(golden[f"pad_{name}__scales_are_swizzled"])
    state = {
        "quantized_weight_values": golden[f"pad_{name}__packed"],
        "quantized_weight_scale_factors": golden[f"pad_{name}__scales_flat"],
        "quantized_weight_amax": golden[f"pad_{name}__amax"],
        "quantized_weight_metadata": np.array([*x.shape, *padded, 1, swizzled], np.int32),
    }
    (q,) = exchange.import_tensors(state, fmt=fmt, dtype=jnp.bfloat16).values()
    assert_same(q, ifjax.quantize(jnp.asarray(x), fmt))


GOOD = fouroversix_state(np.full((5, 33), 9, np.uint8), np.full((5, 3), 0x38, np.uint8), 1.0, block=16, swizzled=True)


def state(**changes):
    names = {f"up.quantized_weight_{name}": array for name, array in changes.items()}
    return changed(GOOD, **names)


def part(name):
    return GOOD[f"up.quantized_weight_{name}"]


def swapped(packed):
    return packed >> 4 | packed << 4


@pytest.mark.parametrize(
    "given, settings, message",
    [
        (state(), {"fmt": None}, "do not say their format"),
        (state(amax=None), {}, "amax is missing"),
        (state(metadata=None), {}, "metadata is missing"),
        (state(metadata=part("metadata")[:5]), {}, "six integers"),
        (state(metadata=part("metadata").astype(np.float32)), {}, "six integers"),
        (state(metadata=np.array([5, 33, 128, 60, 1, 1])), {}, "multiples of 128 x 64"),
        (state(metadata=np.array([5, 65, 128, 64, 1, 1])), {}, "multiples of 128 x 64"),
        (state(metadata=np.array([5, 33, 128, 64, 1, 2])), {}, "multiples of 128 x 64"),
        (state(metadata=np.array([5, 33, 128, 128, 1, 1])), {}, "8192 bytes"),
        (state(values=part("values").astype(np.int32)), {}, "4096 bytes"),
        (state(values=part("values").view(np.int8)), {}, "uint8 values"),
        (state(scale_factors=part("scale_factors").view(ml_dtypes.float8_e5m2)), {}, "float8_e4m3fn scales"),
        (state(amax=np.array([np.nan], np.float32)), {}, "one finite float32"),
        (state(amax=np.array([-1], np.float32)), {}, "one finite float32"),
        (state(amax=np.ones(2, np.float32)), {}, "one finite float32"),
        # An odd length tells the order of nibbles, and padding whether scales are swizzled, and the shape.
        (state(values=swapped(part("values"))), {}, "nibbles"),
        (state(), {"nibbles": "high_first"}, "nibbles"),
        (state(metadata=np.array([5, 33, 128, 64, 1, 0])), {}, "swizzle"),
        (state(metadata=np.array([4, 33, 128, 64, 1, 1])), {}, "not zero"),
        (state(), {"fmt": "mxfp4"}, "multiples of 128 x 128"),
        (state(scale_factors=part("scale_factors") * 4), {}, "sign set"),
        (state(scale_factors=np.where(part("scale_factors") > 0, 0x7F, 0).astype(np.uint8)), {}, "NaN"),
        (state(scale_factors=np.where(part("scale_factors") > 0, 0x80, 0).astype(np.uint8)), {"fmt": "if4"}, "zero"),
        (changed(GOOD, **{"up.weight": np.ones(3)}), {}, "both packed and unpacked"),
    ],
)
def test_buffers_that_contradict_what_is_stated_are_refused(given, settings, message):
    with pytest.raises(ValueError, match=message):
        exchange.import_tensors(given, "fouroversix", **({"fmt": "fouroversix"} | settings))


@pytest.mark.parametrize(
    "declared, fmt",
    [
        ({}, "fouroversix"),
        ({"scale_rule": "abs_max"}, "fouroversix"),
        ({"scale_rule": "static_6"}, "nvfp4"),
        ({"scale_rule": "static_4"}, "nvfp4_static4"),
        ({"dtype": "mxfp4", "weight_dtype": "nvfp4", "weight_scale_rule": "static_6", "scale_rule": "mse"}, "nvfp4"),
        ({"dtype": "if4"}, "if4"),
    ],
)
def test_the_packages_configuration_says_the_format(declared, fmt):
    config = {"quant_method": "fouroversix"} | declared
    assert exchange.import_tensors(GOOD, config)["up.weight"].fmt.name == fmt
    assert exchange.import_tensors(GOOD, config, fmt="nvint4")["up.weight"].fmt.name == "nvint4"


@pytest.mark.parametrize(
    "declared",
    [
        {"module_config_overrides": {"up": {"dtype": "if4"}}},
        {"round_style": "stochastic_unbiased"},
        {"dtype": "nvfp2"},
        {"dtype": "nvint4", "scale_rule": "static_4"},
    ],
)
def test_a_configuration_of_several_formats_leaves_it_to_be_stated(declared):
    with pytest.raises(ValueError, match="do not say their format"):
        exchange.import_tensors(GOOD, {"quant_method": "fouroversix"} | declared)


def test_buffers_in_the_other_order_of_nibbles():
    values = swapped(part("values"))
    (q,) = exchange.import_tensors(state(values=values), fmt="nvfp4", nibbles="high_first").values()
    assert_array_equal(unpacked(q)[0], np.full((5, 33), 9))


# --- ml_dtypes -------------------------------------------------------------------------------------------------------


# With a factor that is a power of two, so that it and amax are one to one.
AMAX = {"nvfp4": 2.625, "fouroversix": 1.5, "mxfp4": None}


@pytest.mark.parametrize(
    "fmt, shape, axis",
    [("nvfp4", (4, 64), -1), ("fouroversix", (32, 6), -2), ("mxfp4", (2, 3, 64), -1), ("nvfp4", (2, 40, 3), 1)],
)
def test_ml_dtypes_there_and_back(fmt, shape, axis):
    q = tensor(fmt, shape, axis - len(shape) if axis > 0 else axis, amax=AMAX[fmt])
    arrays = exchange.to_ml_dtypes(q)
    back = exchange.from_ml_dtypes(*arrays, fmt=fmt, axis=axis, length=shape[axis])
    assert_same(back, q)


def test_ml_dtypes_from_numpy_and_under_jit():
    q = tensor("nvfp4", amax=np.array([2.625, 0.65625], np.float32), shape=(2, 5, 32))
    elements, scales, factor = exchange.to_ml_dtypes(q)
    assert_same(exchange.from_ml_dtypes(np.asarray(elements), np.asarray(scales), np.asarray(factor)), q)
    assert_same(jax.jit(exchange.from_ml_dtypes)(elements, scales, factor), q)


def test_ml_dtypes_keep_the_factor_to_the_last_bit():
    rng = np.random.default_rng(3)
    q = tensor("nvfp4", (300, 16), amax=rng.uniform(1, 2, 300).astype(np.float32))
    elements, scales, factor = exchange.to_ml_dtypes(q)
    assert_array_equal(exchange.to_ml_dtypes(exchange.from_ml_dtypes(elements, scales, factor))[2], factor)


def test_ml_dtypes_by_hand():
    """What jax.nn.scaled_matmul computes, sum of element * scale * factor, from a QTensor and into one."""
    elements = np.arange(16, dtype=np.uint8).reshape(1, 16).astype(np.uint8).view(ml_dtypes.float4_e2m1fn)
    q = exchange.from_ml_dtypes(elements, np.full((1, 1), 1.5, F8), np.float32(2))
    assert_array_equal(q.dequantize(), E2M1_VALUES[None] * 3)
    assert q.fmt.name == "nvfp4" and q.amax == 5376
    q = exchange.from_ml_dtypes(elements, np.full((1, 1), 1.5, F8))
    assert_array_equal(q.dequantize(), E2M1_VALUES[None] * 1.5)


FP4 = np.zeros((2, 32), ml_dtypes.float4_e2m1fn)


@pytest.mark.parametrize(
    "arguments, settings, error, message",
    [
        ((np.zeros((2, 32), np.uint8), np.ones((2, 2), F8)), {}, TypeError, "float4_e2m1fn"),
        ((FP4, np.ones((2, 2), np.float32)), {}, TypeError, "float8_e4m3fn"),
        ((FP4, np.ones((2, 1), F8)), {}, ValueError, r"need scales \(2, 2\)"),
        ((FP4, np.ones((2, 2), F8)), {"axis": 0}, ValueError, "need scales"),
        ((FP4, np.ones((2, 2), F8)), {"axis": 2}, ValueError, "out of range"),
        ((FP4, np.ones((2, 2), F8)), {"length": 16}, ValueError, "length"),
        ((FP4, -np.ones((2, 2), F8)), {}, ValueError, "signs"),
        ((FP4, np.ones((2, 2), F8)), {"fmt": "if4"}, ValueError, "not made of"),
        ((FP4, np.ones((2, 2), F8)), {"fmt": "mxfp4"}, ValueError, "not made of"),
        ((FP4, np.ones((2, 1), ml_dtypes.float8_e8m0fnu), np.float32(1)), {}, ValueError, "leave factor out"),
    ],
)
def test_other_ml_dtypes_are_refused(arguments, settings, error, message):
    with pytest.raises(error, match=message):
        exchange.from_ml_dtypes(*arguments, **settings)


# --- files -----------------------------------------------------------------------------------------------------------


def a_model():
    return {
        "up.kernel": tensor("nvfp4", (64, 6), -2),
        "up.bias": np.arange(6, dtype=ml_dtypes.bfloat16),
        "steps": np.array(7, np.int64),
        "empty": np.zeros((0, 3), np.float32),
    }


@pytest.mark.parametrize("target", ["model", "model.safetensors"])
@pytest.mark.parametrize("tool", TOOLS)
def test_files_and_folders_come_back(tmp_path, tool, target):
    model, path = a_model(), tmp_path / target
    exchange.save(model, path, tool)
    assert os.listdir(tmp_path) == [target]
    back = exchange.load(path, axis=-2)
    assert_array_equal(back["up.weight"].codes, model["up.kernel"].codes)
    assert_same_arrays(
        {name: array for name, array in back.items() if name != "up.weight"},
        {name: array for name, array in model.items() if name != "up.kernel"},
    )
    arrays, config = exchange.export_tensors(model, tool)
    from safetensors import safe_open

    file = path if path.is_file() else path / "model.safetensors"
    with safe_open(file, framework="numpy") as opened:
        assert set(opened.keys()) == arrays.keys()
        assert opened.metadata()["format"] == "pt"
        if path.is_file():
            assert json.loads(opened.metadata()["quantization_config"]) == config
    if path.is_dir():
        assert json.loads((path / "config.json").read_text()) == {"quantization_config": config}
        assert sorted(os.listdir(path)) == ["config.json", "model.safetensors"]


def test_the_models_own_configuration_is_kept(tmp_path):
    exchange.save(a_model(), tmp_path / "m", "modelopt", config={"model_type": "llama", "quantization_config": 0})
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert config["model_type"] == "llama" and config["quantization_config"]["quant_method"] == "modelopt"


def test_nothing_is_overwritten_and_nothing_is_left_behind(tmp_path, monkeypatch):
    folder = tmp_path / "full"
    folder.mkdir()
    (folder / "keep").write_text("me")
    with pytest.raises(FileExistsError, match="new folder"):
        exchange.save(a_model(), folder, "modelopt")
    with pytest.raises(ValueError, match="name a folder"):
        exchange.save(a_model(), tmp_path / "m.safetensors", "modelopt", config={})
    with pytest.raises(ValueError, match="cannot hold"):
        exchange.save(a_model() | {"odd": np.zeros(3, ml_dtypes.float4_e2m1fn)}, tmp_path / "m", "modelopt")
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("no")))
    for target in ("m", "m.safetensors"):
        with pytest.raises(OSError, match="no"):
            exchange.save(a_model(), tmp_path / target, "modelopt")
    assert os.listdir(tmp_path) == ["full"] and os.listdir(folder) == ["keep"]


def test_an_empty_folder_is_filled(tmp_path):
    (tmp_path / "m").mkdir()
    exchange.save(a_model(), tmp_path / "m", "modelopt")
    assert "up.weight" in exchange.load(tmp_path / "m")


def test_shards_are_read_as_one(tmp_path):
    from safetensors.numpy import save_file

    arrays, _ = exchange.export_tensors({"up.weight": tensor("mxfp4")}, "modelopt")
    files = {name: f"model-0000{i + 1}-of-00002.safetensors" for i, name in enumerate(arrays)}
    for name, file in files.items():
        save_file({name: arrays[name]}, tmp_path / file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    (tmp_path / "hf_quant_config.json").write_text(
        json.dumps({"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "MXFP4", "group_size": 32}})
    )
    assert_same(exchange.load(tmp_path)["up.weight"], tensor("mxfp4"))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not JSON"):
        exchange.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "awq"}}))
    with pytest.raises(ValueError, match="'awq'"):
        exchange.load(tmp_path)
    assert_same(exchange.load(tmp_path, "modelopt")["up.weight"], tensor("mxfp4"))


def test_a_bare_file_has_to_decide_by_its_names(tmp_path):
    from safetensors.numpy import save_file

    save_file({"a.weight": np.zeros((4, 4), np.float32)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="cannot be decided"):
        exchange.load(tmp_path / "x.safetensors")
    assert list(exchange.load(tmp_path / "x.safetensors", "modelopt")) == ["a.weight"]


# --- the tools' own readers ------------------------------------------------------------------------------------------

READERS = Path(__file__).with_name("exchange_readers.py")


def needs(*packages):
    """Marks a test that runs these packages, apart from torch and compressed-tensors, which all of them run."""
    missing = [name for name in ("torch", "compressed_tensors", *packages) if importlib.util.find_spec(name) is None]
    reason = f"needs {', '.join(missing)}: pip install 'ifjax[exchange]'"
    return [pytest.mark.exchange, pytest.mark.skipif(bool(missing), reason=reason)]


def run(name, folder):
    """The arrays that a tool's own code makes of a folder, by name. In its own process, without jax."""
    result = folder.with_name(f"{folder.name}-{name}.npz")
    environment = os.environ | {"TORCHDYNAMO_DISABLE": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, READERS, name, folder, result]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-3000:]
    return np.load(result)


def ulps_apart(a, b):
    """How many float32 numbers lie between, zeros of both signs being one."""
    places = [np.asarray(x, np.float32).view(np.int32).astype(np.int64) for x in (a, b)]
    ours, theirs = (np.where(p < 0, -(p & 0x7FFFFFFF), p) for p in places)
    return np.abs(ours - theirs)


def every_byte(fmt, axis, amax, headroom=1.0):
    """Each byte of codes under each scale that has a meaning, in values that are normal numbers."""
    scales = np.arange(2, 253) if fmt == "mxfp4" else np.arange(0x7F)
    q = tensor(fmt, (len(scales), 512), amax=amax, scales=scales[:, None], headroom=headroom)
    q = q.replaced(codes=jnp.asarray(np.tile(np.arange(256, dtype=np.uint8), (len(scales), 1))))
    return q if axis == -1 else q.replaced(codes=q.codes.T, scales=q.scales.T, axis=-2)


def models(kind):
    """QTensors of every kind that has this layout, and one that was really quantized."""
    if kind == "mxfp4":
        return {f"l{-axis}.weight": every_byte(kind, axis, None) for axis in (-1, -2)}
    rng, params = np.random.default_rng(0), {}
    for i, amax in enumerate(rng.lognormal(0, 6, 12).astype(np.float32)):
        fmt = ("nvfp4", "fouroversix", "nvfp4_static4")[i % 3]
        params[f"{fmt}{i}.kernel"] = every_byte(fmt, -1 - i % 2, amax, (1, 16 / 17)[i % 4 == 3])
    params["normal.kernel"] = ifjax.quantize(jnp.asarray(rng.normal(size=(64, 24)).astype(np.float32)), "nvfp4", axis=0)
    return params


def stored_way_round(q, array):
    return np.asarray(array) if q.axis == -1 else np.asarray(array).T


@pytest.mark.parametrize("kind", ["nvfp4", "mxfp4"])
@pytest.mark.parametrize(
    "reader, tool",
    [
        pytest.param("compressed_tensors", "compressed-tensors", marks=needs()),
        pytest.param("torchao", "modelopt", marks=needs("torchao")),
        pytest.param("modelopt", "modelopt", marks=needs("modelopt", "requests")),
    ],
)
def test_the_tools_read_our_codes_and_scales_and_decode_our_values(tmp_path, reader, tool, kind):
    """Elements and scale bytes exactly, values within 2 float32 units in the last place; MXFP4 exactly."""
    params = models(kind)
    exchange.save(params, tmp_path / "model", tool)
    read = run(reader, tmp_path / "model")
    for name, q in params.items():
        module = name.rpartition(".")[0]
        codes, scales = (stored_way_round(q, a) for a in (q.unpacked_codes(), q.scales))
        if f"{module}.elements" in read:
            elements = read[f"{module}.elements"]
            assert_array_equal(elements, E2M1_VALUES[codes])
            assert_array_equal(np.signbit(elements), codes >= 8)
            assert_array_equal(read[f"{module}.scale_bytes"], scales)
        ours = stored_way_round(q, q.dequantize(jnp.float32))
        assert ulps_apart(read[f"{module}.float32"], ours).max() <= (0 if kind == "mxfp4" else 2), name
        if f"{module}.bfloat16" in read:  # the same, rounded: 2^-9, and what 2 units add to it
            np.testing.assert_allclose(read[f"{module}.bfloat16"], ours, rtol=2.0**-8)


@pytest.mark.parametrize("converter", [pytest.param("converter", marks=needs())])
def test_modelopts_names_convert_to_our_compressed_tensors(tmp_path, converter):
    """By compressed-tensors' own converter, whose 1 / weight_scale_2 is rounded once more than K / amax."""
    params = models("nvfp4")
    exchange.save(params, tmp_path / "model", "modelopt")
    converted = run(converter, tmp_path / "model")
    arrays, _ = exchange.export_tensors(params, "compressed-tensors")
    assert set(converted.files) == arrays.keys()
    for name, array in arrays.items():
        if name.endswith("weight_global_scale"):
            assert ulps_apart(converted[name], array).max() <= 2
        else:
            assert_array_equal(converted[name], array.view(np.uint8))


LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 96,
    "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 32,
    "max_position_embeddings": 64, "tie_word_embeddings": False,
}  # fmt: skip
LINEARS = {
    "self_attn.q_proj": (64, 64), "self_attn.k_proj": (64, 64), "self_attn.v_proj": (64, 64),
    "self_attn.o_proj": (64, 64), "mlp.gate_proj": (96, 64), "mlp.up_proj": (96, 64), "mlp.down_proj": (64, 96),
}  # fmt: skip


@pytest.mark.parametrize("fmt", [pytest.param(name, marks=needs("transformers")) for name in ("fouroversix", "mxfp4")])
def test_transformers_loads_a_whole_model_of_ours(tmp_path, fmt):
    """By config.json alone: which layers are quantized, how, and what is left as it is."""
    rng = np.random.default_rng(0)
    dense = {"model.embed_tokens.weight": (32, 64), "lm_head.weight": (32, 64)}
    params = {name: rng.normal(size=shape).astype(ml_dtypes.bfloat16) for name, shape in dense.items()}
    for name in ("model.norm", "model.layers.0.input_layernorm", "model.layers.0.post_attention_layernorm"):
        params[f"{name}.weight"] = np.ones(64, ml_dtypes.bfloat16)
    for i, (name, shape) in enumerate(LINEARS.items()):
        amax = 0.1 + (i > 2) + (i > 5)  # one for each of the groups that servers multiply as one
        params[f"model.layers.0.{name}.weight"] = tensor(fmt, shape, amax=amax, seed=i)
    exchange.save(params, tmp_path / "model", "compressed-tensors", config=LLAMA)
    read = run("transformers", tmp_path / "model")
    assert params.keys() <= set(read.files) and np.isfinite(read["logits"]).all()
    for name, value in params.items():
        if isinstance(value, ifjax.QTensor):
            # Rounded to bfloat16 from what differs in the last bits of float32: nowhere by more than one of its steps.
            np.testing.assert_allclose(read[name], value.dequantize(), rtol=0 if fmt == "mxfp4" else 2.0**-8)
        else:
            assert_array_equal(read[name], value.astype(np.float32))


@pytest.mark.parametrize(
    "writer",
    [
        pytest.param("write_nvfp4", marks=needs()),
        pytest.param("write_mxfp4", marks=needs()),
        pytest.param("write_modelopt", marks=needs("modelopt", "requests")),
    ],
)
def test_what_the_tools_write_comes_in(tmp_path, writer):
    """Their bytes, the values that they decode, and the same bytes out again but for the last bit of some factors."""
    folder = tmp_path / "theirs"
    read = run(writer, folder)
    model = exchange.load(folder)
    assert len(model) >= 3 and all(isinstance(q, ifjax.QTensor) for q in model.values())
    for name, q in model.items():
        theirs = read[f"{name.removesuffix('.weight')}.float32"]
        assert ulps_apart(q.dequantize(), theirs).max() <= (0 if writer == "write_mxfp4" else 2), name
    tool = "modelopt" if writer == "write_modelopt" else "compressed-tensors"
    again, config = exchange.export_tensors(model, tool)
    from safetensors import deserialize

    stored = dict(deserialize((folder / "model.safetensors").read_bytes()))
    assert stored.keys() == again.keys()
    for name, array in again.items():
        data = np.frombuffer(bytes(stored[name]["data"]), array.dtype).reshape(stored[name]["shape"])
        assert data.shape == array.shape
        if name.endswith("weight_global_scale"):  # torch multiplies by 1 / amax: not all of that is some K / amax
            assert ulps_apart(data, array).max() <= 1
        else:
            assert data.tobytes() == array.tobytes(), name
    assert_within(config, json.loads((folder / "config.json").read_text())["quantization_config"])


def assert_within(ours, theirs):
    """Every field of ours is in theirs, with the same value."""
    for name, value in ours.items():
        if isinstance(value, dict):
            assert_within(value, theirs[name])
        else:
            assert theirs[name] == value, name
