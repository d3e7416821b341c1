"""The fouroversix package's padded and swizzled buffers."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from exchange_cases import assert_same, changed, codes_in
from numpy.testing import assert_array_equal

import ifjax
from ifjax import exchange


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


@pytest.mark.by_default("if4_mse-if4")
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
