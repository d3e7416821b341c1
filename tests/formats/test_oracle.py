"""The oracle against published vectors, against ml_dtypes, and against our own vectors that it made."""

from pathlib import Path

import ml_dtypes
import numpy as np
import oracle
import pytest

STATIC, ADAPTIVE = ("static_6",), ("abs_max", "mae", "mse")
PUBLISHED = {
    "if3": ADAPTIVE,
    "if3_bs8": ADAPTIVE,
    "if4": ADAPTIVE,
    "if4_bs8": ADAPTIVE,
    "if6_e2m3": ADAPTIVE,
    "if6_e3m2": ADAPTIVE,
    "mxfp3": ("static_6", "static_4"),
    "mxfp3_bs8": ("static_6", "static_4"),
    "mxfp4": ("static_6", "static_4"),
    "mxfp4_bs8": ("static_6", "static_4"),
    "mxfp6_e2m3": ("static_6", "static_4"),
    "mxfp6_e3m2": ("static_6", "static_4"),
    "nvfp3": STATIC,
    "nvfp3_bs8": STATIC,
    "nvfp4": ("static_6", "static_4", *ADAPTIVE),
    "nvfp4_bs8": ("static_6", "static_4", *ADAPTIVE),
    "nvfp6_e2m3": STATIC,
    "nvfp6_e3m2": STATIC,
    "nvint3": STATIC,
    "nvint3_bs8": STATIC,
    "nvint4": STATIC,
    "nvint4_bs8": STATIC,
    "nvint6": STATIC,
}
RULED = [(name, rule) for name, rules in PUBLISHED.items() for rule in rules]
REFERENCE_RUNS = [
    ("nvfp4", "static_6"),
    ("nvfp4", "mse"),
    ("if4", "mse"),
    ("nvint4", "static_6"),
    ("mxfp4", "static_6"),
]


def published_format(name, rule):
    """The record that a published data type and rule mean together."""
    if name.startswith("nvfp4") and rule in ADAPTIVE:
        return oracle.FORMATS[name.replace("nvfp4", "fouroversix")]
    fmt = oracle.FORMATS[name]
    return fmt._replace(peak=4.0) if rule == "static_4" else fmt


def fields(folder, file, prefix):
    """The arrays of a file whose names start with prefix, without it."""
    with np.load(folder / file) as arrays:
        return {key.removeprefix(prefix): arrays[key] for key in arrays.files if key.startswith(prefix)}


def quantize_kinds(xs, fmt, loss):
    """One Result whose fields are stacked over the tensors xs."""
    results = [oracle.quantize(x, fmt, loss=loss) for x in xs]
    return oracle.Result(*(np.stack(field) for field in zip(*results, strict=True)))


def bfloat16(bits):
    return bits.view(ml_dtypes.bfloat16).astype(np.float32)


def test_every_published_file_is_listed(golden_dir):
    assert {f"fmt_{name}.npz" for name in PUBLISHED} == {path.name for path in golden_dir.glob("fmt_*.npz")}
    for name, rules in PUBLISHED.items():
        keys = fields(golden_dir, f"fmt_{name}.npz", "")
        assert set(rules) == {key.split("__")[0] for key in keys if "__" in key}


@pytest.mark.parametrize(("name", "rule"), RULED)
def test_published_vectors_are_met_bit_for_bit(golden_dir, name, rule):
    want = fields(golden_dir, f"fmt_{name}.npz", f"{rule}__")
    xs = [*fields(golden_dir, "inputs.npz", "")["x"], want["x_ties"]]
    fmt = published_format(name, rule)
    got = quantize_kinds(xs, fmt, rule)
    none = np.zeros(want["scales"].shape, bool)
    # Where the published squares leave float32's range they choose nothing; see `oracle.Result`.
    clear = ~(want.get("ambiguous", none) | got.lost)
    clear_elements = np.repeat(clear, fmt.block, axis=-1)
    np.testing.assert_array_equal(got.amax.view(np.uint32), want["amax"].view(np.uint32))
    np.testing.assert_array_equal(got.scales[clear], want["scales"][clear])
    np.testing.assert_array_equal(got.codes[clear_elements], want["codes"][clear_elements])
    np.testing.assert_array_equal(got.deq[clear_elements], want["deq"][clear_elements])
    np.testing.assert_array_equal(got.select[clear], want.get("select", none)[clear])
    np.testing.assert_array_equal(got.ambiguous[~got.lost], want.get("ambiguous", none)[~got.lost])


@pytest.mark.parametrize(("name", "rule"), RULED)
def test_published_codes_decode_to_published_values(golden_dir, name, rule):
    want = fields(golden_dir, f"fmt_{name}.npz", f"{rule}__")
    fmt = published_format(name, rule)
    for codes, scales, amax, deq in zip(*(want[k] for k in ("codes", "scales", "amax", "deq")), strict=True):
        np.testing.assert_array_equal(oracle.dequantize(codes, scales, amax, fmt), deq)


@pytest.mark.parametrize("case", ["rht", "2d", "t", "t_rht", "t_2d"])
@pytest.mark.parametrize(("name", "rule"), REFERENCE_RUNS)
def test_rotated_transposed_and_square_blocks_are_met_bit_for_bit(golden_dir, name, rule, case):
    file, steps = "rht_2d_transpose.npz", case.split("_")
    x = bfloat16(fields(golden_dir, file, "x_")["bf16bits"])
    x = x.T if "t" in steps else x
    x = oracle.rotate(x) if "rht" in steps else x
    got = oracle.quantize(x, published_format(name, rule), loss=rule, block_2d="2d" in steps)
    want = fields(golden_dir, file, f"{name}_{rule}_{case}__")
    np.testing.assert_array_equal(got.amax, want["amax"])
    np.testing.assert_array_equal(got.scales, want["scales"])
    np.testing.assert_array_equal(got.codes, want["codes"])


def test_rotation_is_the_published_one(golden_dir):
    want = fields(golden_dir, "rht_2d_transpose.npz", "")
    x = bfloat16(want["x_bf16bits"])
    np.testing.assert_array_equal(oracle.rotation(), want["rht_matrix"])
    np.testing.assert_array_equal(oracle.rotate(x), bfloat16(want["x_rht_bf16bits"]))
    np.testing.assert_array_equal(oracle.rotate(x.T), bfloat16(want["xT_rht_bf16bits"]))


@pytest.mark.parametrize(("style", "headroom"), [("stochastic", 1.0), ("stochastic_unbiased", 16 / 17)])
@pytest.mark.parametrize(("name", "rule"), REFERENCE_RUNS[:4])
def test_stochastic_rounding_meets_published_values(golden_dir, name, rule, style, headroom):
    want = fields(golden_dir, "stochastic.npz", f"{name}_{rule}_{style}__")
    x, fmt = fields(golden_dir, "stochastic.npz", "")["x"], published_format(name, rule)
    noise = [want[f"u{i}_x65536"] / np.float32(65536) for i in range(len(fmt.candidates))]
    got = oracle.quantize(x, fmt, loss=rule, headroom=headroom, noise=noise)
    np.testing.assert_array_equal(got.amax, want["amax"])
    np.testing.assert_array_equal(got.scales, want["scales"])
    # the sign of a zero is arbitrary in the published codes, so values are compared
    values = oracle.dequantize(want["codes"], want["scales"], want["amax"], fmt, headroom)
    np.testing.assert_array_equal(got.deq, values)


@pytest.mark.parametrize(
    ("name", "loss"), [(name, loss) for name, fmt in oracle.FORMATS.items() for loss in fmt.losses]
)
def test_our_own_golden_file_is_what_the_oracle_says(name, loss):
    folder, file = Path(__file__).resolve().parents[1] / "golden", "formats.npz"
    want = fields(folder, file, f"{name}__{loss}__")
    xs = [*fields(folder, file, "")["x"], *fields(folder, file, f"{name}__")["x"]]
    got = quantize_kinds(xs, name, loss)
    assert want.keys() == {"codes", "scales", "amax", "deq", "ambiguous"}
    for field, array in want.items():
        np.testing.assert_array_equal(getattr(got, field), array)


@pytest.mark.parametrize(
    ("grid", "dtype"),
    [
        (oracle.E2M1, ml_dtypes.float4_e2m1fn),
        (oracle.E2M3, ml_dtypes.float6_e2m3fn),
        (oracle.E3M2, ml_dtypes.float6_e3m2fn),
    ],
)
def test_float_grids_round_as_ml_dtypes_casts(grid, dtype):
    assert grid.sign_bit * 2 == grid.values.size
    y = np.linspace(-32, 32, 64 * 256 + 1, dtype=np.float32)
    y = np.concatenate([y, -y[y == 0], np.nextafter(y, np.float32(99)), np.nextafter(y, np.float32(-99))])
    codes = oracle._round(y, grid, None)
    np.testing.assert_array_equal(codes, y.astype(dtype).view(np.uint8))
    np.testing.assert_array_equal(grid.values[codes], y.astype(dtype).astype(np.float64))


def test_e4m3_rounds_to_nearest_even_and_saturates():
    h = np.linspace(0, 2**-5, 4097, dtype=np.float32)
    h = np.concatenate([h, np.linspace(0, 600, 9601, dtype=np.float32), np.float32([448, 464, 1e30, np.inf])])
    want = np.minimum(h, np.float32(448)).astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
    np.testing.assert_array_equal(oracle._nearest(h, oracle.E4M3), want)


@pytest.mark.parametrize("name", oracle.FORMATS)
def test_decode_table_and_dequantize_agree_on_every_pair_of_bytes(name):
    fmt, table = oracle.FORMATS[name], oracle.decode_table(name)
    codes = np.tile(np.arange(table.shape[1], dtype=np.uint8), (256, fmt.block))  # whole blocks
    scales = np.repeat(np.arange(256, dtype=np.uint8)[:, None], table.shape[1], axis=1)
    with np.errstate(over="ignore"):  # 2^127 times a grid's maximum
        want = table.astype(np.float32)
    if fmt.scale_max is not None:
        want = want / np.float32(fmt.peak * fmt.scale_max)
    else:
        want = np.clip(want, -oracle.FLT_MAX, oracle.FLT_MAX)  # saturates
    got = oracle.dequantize(codes, scales, 1, fmt)
    np.testing.assert_array_equal(got, np.tile(want, fmt.block))


@pytest.mark.parametrize("name", oracle.FORMATS)
def test_scale_bytes_decode_as_ml_dtypes_reads_them(name):
    fmt, byte = oracle.FORMATS[name], np.arange(256, dtype=np.uint8)
    if fmt.scale_max is None:
        scale = byte.view(ml_dtypes.float8_e8m0fnu).astype(np.float64)
        scale[0] = 0  # the quantizer's zero; as an E8M0 number the byte is 2^-127
    else:
        payload = byte & 0x7F if fmt.flagged else byte
        scale = payload.view(ml_dtypes.float8_e4m3fn).astype(np.float64)
    low, high = fmt.candidates[0], fmt.candidates[-1]
    table = oracle.decode_table(name)
    np.testing.assert_array_equal(table[:0x80], scale[:0x80, None] * low.grid.values)
    np.testing.assert_array_equal(table[0x80:], scale[0x80:, None] * high.grid.values * np.float64(high.step))


@pytest.mark.parametrize("name", oracle.FORMATS)
def test_a_zero_tensor_has_zero_scales_and_codes(name):
    got = oracle.quantize(np.zeros((32, 64)), name)
    assert not any(np.any(field) for field in (got.codes, got.scales, got.deq, got.select, got.ambiguous))


def test_a_squares_transpose_has_the_transposed_codes():
    x = np.random.default_rng(0).standard_normal((64, 32)).astype(np.float32)
    got, turned = (oracle.quantize(m, "if4", loss="abs_max", block_2d=True) for m in (x, x.T))
    np.testing.assert_array_equal(got.deq.T, turned.deq)


def test_non_finite_input_is_refused():
    with pytest.raises(ValueError, match="finite"):
        oracle.quantize(np.full((1, 16), np.nan), "nvfp4")
