"""What goes out, by tables written here: exact bytes, names, configurations, refusals."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from exchange_cases import E2M1_VALUES, F8, LARGEST, TOOLS, assert_same_arrays, codes_in, tensor
from numpy.testing import assert_array_equal

import ifjax
from ifjax import exchange
from ifjax.formats import E2M1, E4M3, E8M0, Candidate, Format, Grid


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
