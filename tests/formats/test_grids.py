"""Grids and scales against brute force, and against the casts of ml_dtypes."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from numpy.testing import assert_array_equal

from ifjax.formats import E2M0, E2M1, E2M3, E3M2, INT3, INT4, INT6, Grid, TableScale, scales
from ifjax.formats.floats import BinaryFloat

NAMED = (E2M0, E2M1, E2M3, E3M2, INT3, INT4, INT6)
# Half of NF4 and its mirror; its midpoints are no float32 numbers.
NF4 = (0, 0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.562617, 1)
MAGNITUDES = {
    "e2m1": E2M1.magnitudes,
    "e2m0": E2M0.magnitudes,
    "e3m2": E3M2.magnitudes,
    "int3": INT3.magnitudes,
    "int4": INT4.magnitudes,
    "nf4": NF4,
    "sign": (0.0, 1.0),
    "thirds": tuple(i / 3 for i in range(8)),  # evenly spaced, but not by a power of two
    "scaled": tuple(v * 2.0**-40 for v in E2M3.magnitudes),
    "e2m1 with a gap": (*E2M1.magnitudes[:-1], 8.0),
    "wide": (0.0, 1e-6, 1.0, 1.5, 1e2, 1e4, 1e5, 1e6),
}
WRITINGS = [
    *itertools.product(["bit"], ["even", "down", "away"], ["signed", "negative", "unsigned"]),
    *itertools.product(["twos_complement"], ["even", "down", "away"], ["unsigned"]),
]
each_named = pytest.mark.parametrize("grid", NAMED, ids=lambda grid: grid.name)
each_magnitudes = pytest.mark.parametrize("magnitudes", MAGNITUDES.values(), ids=MAGNITUDES)


def grid_of(magnitudes, sign="bit", ties="even", zero="signed"):
    if sign == "bit":
        return Grid.sign_magnitude("mine", magnitudes, ties, zero)
    count = len(magnitudes)  # code -count is left over
    return Grid("mine", (*magnitudes, -2 * magnitudes[-1], *(-v for v in magnitudes[:0:-1])), ties, unused=(count,))


def dense(magnitudes, count=4096):
    """f32[count] of both signs: values, midpoints and their float32 neighbours, a ladder, zeros and extremes."""
    m = np.array(magnitudes)
    points = np.concatenate([m, (m[1:] + m[:-1]) / 2]).astype(np.float32)
    for _ in range(2):
        points = np.concatenate([points, np.nextafter(points, np.float32(0)), np.nextafter(points, np.float32(np.inf))])
    points = np.concatenate([np.unique(points), np.float32([1e-37, 1e-10, 1e10, 2**31, 2**32, 3e38])])
    # no subnormal numbers: platforms that flush them see others
    points = points[(points == 0) | (points >= 2.0**-126)]
    ladder = np.linspace(0, 1.3 * m[-1], count // 2 - len(points), dtype=np.float32)
    points = np.concatenate([points, ladder])
    return np.concatenate([points, -points])


def nearest(y, grid):
    """(codes, values) by distance to each magnitude in float64, where it is exact wherever two are close."""
    m = np.float64(np.float32(grid.values[: len(grid.values) // 2]))
    a = np.minimum(np.abs(y).astype(np.float64), m[-1])
    distance = np.abs(a[:, None] - m)
    near = distance == distance.min(-1, keepdims=True)
    if grid.ties == "even":
        near &= (near.sum(-1, keepdims=True) == 1) | (np.arange(len(m)) % 2 == 0)
    index = len(m) - 1 - near[:, ::-1].argmax(-1) if grid.ties == "away" else near.argmax(-1)
    negative = {"signed": np.signbit(y), "negative": y < 0, "unsigned": np.signbit(y) & (index > 0)}[grid.zero]
    written = np.where(negative, -index % (2 * len(m)), index) if grid.unused else (
        index + negative * len(m)
    )  # fmt: skip
    return written, np.where(np.signbit(y), -m[index], m[index])


# --- rounding


@each_named
def test_named_grids_round_to_the_nearest_value(grid):
    y = dense(grid.magnitudes)
    codes, values = nearest(y, grid)
    for run in (lambda f: f, jax.jit):
        assert_array_equal(run(grid.encode)(y), codes)
        assert_array_equal(run(grid.round)(y), values)
        assert_array_equal(run(grid.decode)(codes), values)


@pytest.mark.parametrize(("sign", "ties", "zero"), WRITINGS)
@each_magnitudes
def test_any_grid_rounds_to_the_nearest_value_by_its_rules(magnitudes, sign, ties, zero):
    grid = grid_of(magnitudes, sign, ties, zero)
    y = dense(magnitudes)
    codes, values = nearest(y, grid)
    assert_array_equal(grid.encode(y), codes)
    assert_array_equal(grid.round(y), values)
    assert_array_equal(grid.decode(codes), values)


@pytest.mark.parametrize(
    ("grid", "dtype"),
    [(E2M1, ml_dtypes.float4_e2m1fn), (E2M3, ml_dtypes.float6_e2m3fn), (E3M2, ml_dtypes.float6_e3m2fn)],
)
def test_float_grids_are_those_of_ml_dtypes(grid, dtype):
    every = np.arange(2**grid.bits, dtype=np.uint8)
    assert_array_equal(grid.decode(every), every.view(dtype).astype(np.float32))
    y = dense(grid.magnitudes)
    assert_array_equal(grid.encode(y), y.astype(dtype).view(np.uint8))


@pytest.mark.parametrize("scale", [1.0, 2.0**-60, 2.0**60])
def test_random_grids_round_to_the_nearest_value(scale):
    rng = np.random.default_rng(0)
    for ties in ("even", "down", "away"):
        inner = np.unique(rng.random(15).astype(np.float32)) * np.float32(scale)
        grid = grid_of((0.0, *inner.tolist()), ties=ties)
        y = dense(grid.magnitudes)
        codes, values = nearest(y, grid)
        assert_array_equal(grid.encode(y), codes)
        assert_array_equal(grid.round(y), values)


@each_magnitudes
@pytest.mark.parametrize("ties", ["even", "down"])
def test_every_code_decodes_and_is_encoded_again(magnitudes, ties):
    grid = grid_of(magnitudes, ties=ties)
    assert grid.max == np.float32(magnitudes[-1]) and 2**grid.bits == 2 * len(magnitudes)
    codes = np.arange(2**grid.bits)
    values = np.asarray(grid.decode(codes))
    assert_array_equal(values, np.float32([*magnitudes, *(-v for v in magnitudes)]))
    assert_array_equal(np.signbit(values), codes >= len(magnitudes))
    assert_array_equal(grid.encode(values), codes)


def test_twos_complement_counts_down_from_the_top():
    assert_array_equal(INT4.decode(np.arange(16)), [*range(8), *range(-8, 0)])


@each_named
def test_bits_above_the_code_are_ignored(grid):
    codes = np.arange(256)
    assert_array_equal(grid.decode(codes), grid.decode(codes % 2**grid.bits))
    assert_array_equal(grid.decode(codes.astype(np.uint8)), grid.decode(codes))


def test_only_minifloats_and_integers_round_by_arithmetic():
    bits = {name: grid_of(m).mantissa_bits for name, m in MAGNITUDES.items()}
    assert bits == {
        "e2m1": 1, "e2m0": 0, "e3m2": 2, "int3": 1, "int4": 2, "nf4": None, "sign": 0, "thirds": None, "scaled": 3,
        "e2m1 with a gap": None, "wide": None,
    }  # fmt: skip


# --- stochastic rounding


def each_noise(count):
    """f32[count]: evenly over (-1/2, 1/2), so that frequencies come out to 1/count, not to a few sigma."""
    return ((np.arange(count) + 0.5) / count - 0.5).astype(np.float32)


@pytest.mark.parametrize(
    "grid", [*NAMED, *(grid_of(MAGNITUDES[name], ties="away") for name in ("nf4", "thirds", "scaled"))],
    ids=lambda grid: grid.name,
)  # fmt: skip
def test_noise_rounds_to_the_two_adjacent_values_with_probability_by_distance(grid):
    rng = np.random.default_rng(0)
    m, noise = np.array(grid.magnitudes), each_noise(1024)
    lower = rng.integers(0, len(m) - 1, 200)
    part = rng.random(200)
    y = (m[lower] + part * np.diff(m)[lower]).astype(np.float32)
    part = (y - m[lower]) / np.diff(m)[lower]
    y = np.where(rng.random(200) < 0.5, -y, y)
    ys, rs = np.broadcast_to(y[:, None], (200, 1024)), np.broadcast_to(noise, (200, 1024))
    values = np.asarray(jax.jit(grid.round)(ys, rs))
    sign = np.where(np.signbit(y), -1, 1)
    down, up = sign * m[lower], sign * m[lower + 1]
    is_up = values == up[:, None]
    assert (is_up | (values == down[:, None])).all()
    # one step of the noise, and rounding of y's position to float32
    assert np.abs(is_up.mean(-1) - part).max() <= 1 / 1024 + 1e-6
    assert_array_equal(grid.decode(jax.jit(grid.encode)(ys, rs)), values)


@each_named
def test_noise_moves_no_value_of_the_grid_and_none_past_its_end(grid):
    m, noise = np.float32(grid.magnitudes), each_noise(256)
    y = np.concatenate([m, m[-1:] * np.float32(1.01), m[-1:] * 2, m[-1:] * 1000])
    y = np.broadcast_to(np.concatenate([y, -y])[:, None], (2 * len(m) + 6, 256))
    values = np.asarray(grid.round(y, np.broadcast_to(noise, y.shape)))
    assert_array_equal(values, np.clip(y, -m[-1], m[-1]))


def test_uniform_noise_has_no_bias():
    y = np.random.default_rng(1).uniform(-6, 6, 200_000).astype(np.float32)
    noise = jax.random.uniform(jax.random.key(0), y.shape) - 0.5
    for grid in (E2M1, INT4, E2M3, grid_of([6 * v for v in NF4])):
        error = np.asarray(grid.round(y, noise), np.float64) - y
        assert abs(error.mean()) < 4 * error.std() / np.sqrt(y.size), grid.name


# --- grids that are not symmetric

QUANTILES = (-1.0, -0.5, -0.2, -0.05, 0.0, 0.1, 0.4, 0.9)
SPECIAL = (0.0, 1.0, 2.0, 4.0, 3.0, -1.0, -2.0, -4.0)  # code 4, which is -0 in E2M0, stands for 3


def by_distance(y, grid):
    """(codes, values) by the distance to each value that is written, with the grid's own rule of ties."""
    codes = np.array([c for c in range(len(grid.values)) if c not in grid.unused])
    order = codes[np.argsort(np.array(grid.values)[codes], kind="stable")]
    v = np.float64(np.array(grid.values, np.float32))[order]
    clipped = np.clip(y.astype(np.float64), v[0], v[-1])
    if grid.ties == "lower":  # below or at the middle, rounded to float32
        middle = ((v[1:] + v[:-1]) / 2).astype(np.float32)
        up = np.isin(order[1:], grid.preferred) & ~np.isin(order[:-1], grid.preferred)
        index = ((y[:, None] > middle) | ((y[:, None] == middle) & up)).sum(-1)
        return order[index], v[index]
    distance = np.abs(clipped[:, None] - v)
    near = distance == distance.min(-1, keepdims=True)
    picked = []
    for row in near:
        tied = [int(i) for i in np.flatnonzero(row)]
        wins = [i for i in tied if order[i] in grid.preferred] or tied
        rule = {"even": lambda i: order[i] % 2, "down": lambda i: abs(v[i]), "away": lambda i: -abs(v[i])}[grid.ties]
        picked.append(min(wins, key=rule))
    return order[picked], v[picked]


@pytest.mark.by_default("*-even", "*-lower")
@pytest.mark.parametrize("ties", ["even", "down", "away", "lower"])
@pytest.mark.parametrize(
    "fields",
    [
        {"values": QUANTILES}, {"values": QUANTILES[::-1]}, {"values": SPECIAL}, {"values": SPECIAL, "preferred": (4,)},
        {"values": SPECIAL, "unused": (4,)}, {"values": SPECIAL, "preferred": (1, 6), "unused": (3,)},
        {"values": (0.0, 3.0)}, {"values": (*QUANTILES, *(v + 7 for v in QUANTILES))},
    ],
    ids=str,
)  # fmt: skip
def test_asymmetric_grids_round_by_distance_and_their_rules(fields, ties):
    grid = Grid("mine", ties=ties, **fields)
    y = dense(sorted({abs(v) for v in grid.values} | {0.0}), 1024)
    middles = np.array(sorted(grid.values))
    y = np.concatenate([y, ((middles[1:] + middles[:-1]) / 2).astype(np.float32)])
    codes, values = by_distance(y, grid)
    for run in (lambda f: f, jax.jit):
        assert_array_equal(run(grid.encode)(y), codes)
        assert_array_equal(run(grid.round)(y), np.float32(values))
    every = np.arange(len(grid.values))
    assert_array_equal(grid.decode(every), np.float32(grid.values))
    assert_array_equal(grid.decode(every + 16 * len(grid.values)), np.float32(grid.values))


def test_noise_moves_a_value_between_its_two_neighbours():
    grid = Grid("mine", QUANTILES)
    rng = np.random.default_rng(0)
    y = rng.uniform(-1.1, 1.0, 20_000).astype(np.float32)
    noise = rng.uniform(-0.5, 0.5, y.size).astype(np.float32)
    got = np.asarray(grid.round(y, noise), np.float64)
    v = np.float64(np.float32(QUANTILES))
    lower = v[np.clip(np.searchsorted(v, y, "right") - 1, 0, 6)]
    upper = v[np.clip(np.searchsorted(v, y, "right"), 1, 7)]
    assert np.all((got == lower) | (got == upper) | ((y > v[-1]) & (got == v[-1])))
    inside = (y > v[0]) & (y < v[-1])
    error = got[inside] - y[inside]
    assert abs(error.mean()) < 4 * error.std() / np.sqrt(inside.sum())
    assert_array_equal(got, np.float32(grid.decode(grid.encode(y, noise))))


def test_ends_and_the_least_positive_value_are_codes():
    assert (E2M1.ends, E2M1.least_positive) == ((15, 7), 1)
    assert (INT4.ends, INT4.least_positive) == ((9, 7), 1)
    mirrored = Grid("mine", tuple(-v for v in QUANTILES))
    assert (mirrored.ends, mirrored.least_positive, mirrored.max) == ((7, 0), 3, 1.0)


# --- records


def broken(**fields):
    return dataclasses.replace(E2M1, **fields)


@pytest.mark.parametrize("magnitudes", [(), (0.0,), (0.0, 1.0, 2.0), (0.0, 1.0, 2.0, 3.0, 4.0)])
def test_magnitudes_must_fill_their_codes(magnitudes):
    with pytest.raises(ValueError, match=r"a grid needs 2, 4, 8, ... magnitudes"):
        grid_of(magnitudes)
    with pytest.raises(ValueError, match=r"a grid needs 2, 4, 8, ... or 256 values"):
        Grid("mine", (*magnitudes, 7.0) if len(magnitudes) in (2, 4) else magnitudes)


@pytest.mark.parametrize(
    "magnitudes", [(1.0, 2.0), (0.0, 1.0, 1.0, 2.0), (0.0, 2.0, 1.0, 3.0), (-1.0, 0.0)]
)
def test_magnitudes_must_ascend_from_zero(magnitudes):
    with pytest.raises(ValueError, match="ascend strictly from 0"):
        grid_of(magnitudes)


@pytest.mark.parametrize("value", [1e39, float("inf"), float("nan"), "1", None])
@pytest.mark.filterwarnings("ignore:overflow encountered in cast")
def test_values_must_be_finite_numbers(value):
    with pytest.raises(ValueError, match="values must be finite float32 numbers"):
        broken(values=(0.0, value))


def test_values_are_rounded_to_float32():
    assert broken(values=(0.0, 0.1), zero="unsigned") == broken(values=(0, np.float32(0.1)), zero="unsigned")
    assert grid_of((0.0, 0.1)).max == float(np.float32(0.1))
    with pytest.raises(ValueError, match="ascend strictly"):
        grid_of((0.0, 0.1, 0.1 + 1e-12, 0.2))
    with pytest.raises(ValueError, match="two codes may not stand for one value"):
        Grid("mine", (0.0, 0.1, 0.1 + 1e-12, 0.2))


@pytest.mark.parametrize("values", [(1.0, 2.0), (0.5, -0.5, 1.0, -1.0)])
def test_a_grid_needs_zero(values):
    with pytest.raises(ValueError, match="a grid needs 0, or zeros and padding become noise"):
        Grid("mine", values)


def test_only_zero_may_have_two_codes():
    assert Grid("mine", (0.0, 1.0, -0.0, -1.0)).bits == 2
    with pytest.raises(ValueError, match="two codes may not stand for one value"):
        Grid("mine", (0.0, 1.0, 1.0, -1.0))
    with pytest.raises(ValueError, match="two codes may not stand for one value"):
        Grid("mine", (0.0, 0.0, -0.0, -1.0))
    assert Grid("mine", (0.0, 1.0, 1.0, -1.0), unused=(2,)).max == 1  # it is never written


@pytest.mark.parametrize("field", ["preferred", "unused"])
@pytest.mark.parametrize("codes", [(16,), (-1,), (1.5,), ("1",)])
def test_codes_are_codes(field, codes):
    with pytest.raises(ValueError, match=f"{field} must be codes from 0 to 15"):
        broken(**{field: codes})


@pytest.mark.parametrize(("field", "value"), [("ties", "up"), ("zero", "copied"), ("ties", None)])
def test_rules_have_names(field, value):
    with pytest.raises(ValueError, match=f"{field} must be one of"):
        broken(**{field: value})


@pytest.mark.parametrize("zero", ["signed", "negative"])
@pytest.mark.parametrize("grid", [INT4, dataclasses.replace(E2M1, preferred=(8,), zero="unsigned")])
def test_only_sign_magnitude_has_two_zeros(grid, zero):
    with pytest.raises(ValueError, match="zero='unsigned'"):
        dataclasses.replace(grid, zero=zero)


def test_grids_are_equal_by_content_and_hashable():
    again = Grid.sign_magnitude("E2M1", E2M1.magnitudes)
    assert again == Grid("E2M1", (*E2M1.magnitudes, *(-v for v in E2M1.magnitudes)), zero="signed")
    assert again == E2M1 and hash(again) == hash(E2M1) and again != E2M3


# --- scales


def positive():
    """f32 >= 0, every midpoint of E4M3 with its neighbours among them."""
    values = np.arange(0x7F, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    beyond = np.float32([2.0**-126, 1e-30, 464, 465, 480, 1e9])
    points = np.concatenate([values, (values[1:] + values[:-1]) / 2, beyond])
    points = np.concatenate([points, np.nextafter(points, np.float32(0)), np.nextafter(points, np.float32(np.inf))])
    ladder = np.geomspace(1e-5, 1e3, 20_000, dtype=np.float32)
    points = np.concatenate([points, ladder, np.float32([0, 3e38, np.inf])])
    return points[(points == 0) | (points >= 2.0**-126)]


def test_e4m3_rounds_as_the_cast_and_saturates_where_that_gives_nan():
    h = positive()
    want = np.minimum(h, np.float32(448)).astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
    for run in (lambda f: f, jax.jit):
        assert_array_equal(run(scales.E4M3.encode)(h), want)


def test_e4m3_decodes_every_byte():
    every = np.arange(256, dtype=np.uint8)
    want = every.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    for run in (lambda f: f, jax.jit):
        got = np.asarray(run(scales.E4M3.decode)(every))
        assert_array_equal(got, want)
        assert_array_equal(np.signbit(got)[: 0x7F], np.signbit(want)[: 0x7F])


def test_e8m0_rounds_up_to_a_power_of_two():
    h = np.concatenate([positive(), np.ldexp(np.float32(1), np.arange(-126, 127)).astype(np.float32)])
    h = np.concatenate([h, np.nextafter(h, np.float32(np.inf))])
    h = h[(h == 0) | (h >= 2.0**-126)]
    mantissa, exponent = np.frexp(h)
    # h = mantissa * 2^exponent with mantissa in [1/2, 1): a power of two has 1/2
    want = np.where(np.isinf(h), 255, exponent - (mantissa == 0.5) + 127)
    want = np.where(h == 0, 0, np.minimum(want, scales.E8M0.top))
    for run in (lambda f: f, jax.jit):
        assert_array_equal(run(scales.E8M0.encode)(h), want)


def test_e8m0_gives_subnormal_scales_the_least_byte():
    assert_array_equal(scales.E8M0.encode(np.float32([1e-45, 1e-40])), [1, 1])


def test_e8m0_decodes_every_byte_and_zero_means_zero():
    every = np.arange(256, dtype=np.uint8)
    want = every.view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
    want[0] = 0
    for run in (lambda f: f, jax.jit):
        assert_array_equal(run(scales.E8M0.decode)(every), want)


# HiFloat4's is made from the largest values of runs as well, and stands in the frontier's vectors.
@pytest.mark.by_default("e4m3", "ue5m3")
@pytest.mark.parametrize("scale", [s for s in scales.SCALES.values() if not s.runs], ids=lambda scale: scale.name)
def test_a_scale_keeps_its_own_bytes(scale):
    finite = np.arange(scale.top + 1)
    assert_array_equal(scale.encode(scale.decode(finite)), finite)
    assert np.isnan(scale.decode(jnp.array(scale.nan)))
    assert np.isfinite(scale.decode(jnp.array(scale.top)))
    # the bytes are bit patterns of the dtype
    assert scale.dtype is None or np.isnan(np.uint8(scale.nan).view(scale.dtype).astype(np.float32))


@pytest.mark.parametrize("minifloat", [(3, 2, 2), (4, 3, 7), (5, 1, 40), (7, 1, 20)], ids=str)
def test_a_binary_float_rounds_numbers_of_any_size(minifloat):
    m, values = minifloat[1], np.float32(TableScale.minifloat("mine", *minifloat).values)
    values = values[values < 2.0 ** (103 + m)]
    assert BinaryFloat.of(values.tolist(), 3e38, m) is None  # the numbers that are added would be infinite
    floats = BinaryFloat.of(values.tolist(), values[-1], m)
    y = np.abs(dense(values, 64 * len(values)))
    y = np.append(y, np.float32(np.inf))
    distance = np.abs(np.minimum(y, values[-1]).astype(np.float64)[:, None] - values)
    near = distance == distance.min(-1, keepdims=True)
    near &= (near.sum(-1, keepdims=True) == 1) | (np.arange(len(values)) % 2 == 0)
    codes = near.argmax(-1)
    for run in (lambda f: f, jax.jit):
        assert_array_equal(run(lambda y: floats.code(floats.rounded(y, None)))(y), codes)
        assert_array_equal(run(floats.nearest)(y), values[codes])
        assert_array_equal(run(floats.nearest)(-y), -values[codes])
        assert np.isnan(run(floats.nearest)(np.float32(np.nan)))


UE5M3 = TableScale.minifloat("ue5m3", 5, 3, 15)
POWERS = TableScale("powers", (0.0, *(2.0**i for i in range(-4, 7))))


def test_a_minifloat_without_a_sign_has_the_values_of_its_fields():
    assert (UE5M3.bits, UE5M3.nan, UE5M3.top) == (8, 255, 254)
    assert UE5M3.values[:3] == (0, 2.0**-17, 2.0**-16) and UE5M3.values[-1] == 114688
    worked = {2.0**-17: 0x01, 1.5 * 2**-17: 0x02, 2.0**-18: 0x00, 2.0**-14: 0x08, 0.1: 0x5D, 1: 0x78, 448: 0xBE,
              114688: 0xFE, 2e5: 0xFE}  # fmt: skip
    assert_array_equal(UE5M3.encode(np.float32([*worked])), [*worked.values()])
    e3m3 = TableScale.minifloat("e3m3", 3, 3, 3)
    assert (e3m3.bits, e3m3.nan, e3m3.top, e3m3.values[-1]) == (6, 63, 62, 28)
    worked = {0.1: 0x03, 0.25: 0x08, 1: 0x18, 28: 0x3E, 40: 0x3E, 2.0**-6: 0x00}
    assert_array_equal(e3m3.encode(np.float32([*worked])), [*worked.values()])


@pytest.mark.by_default("e4m3-1", "ue5m3-3")
@pytest.mark.parametrize("factor", [1, 3])  # times 3 it is no float of any kind: looked up
@pytest.mark.parametrize("scale", [scales.E4M3, UE5M3, POWERS], ids=lambda s: s.name)
def test_a_table_rounds_to_the_nearest_value_half_to_the_even_payload(scale, factor):
    values = np.float64(scale.values) * factor
    table = TableScale("mine", tuple(values))
    middles = ((values[1:] + values[:-1]) / 2).astype(np.float32)
    h = np.concatenate([values.astype(np.float32), middles, np.nextafter(middles, np.float32(0)),
                        np.nextafter(middles, np.float32(np.inf)), np.float32([3e38, np.inf])])  # fmt: skip
    h = h[(h == 0) | (h >= 2.0**-126)]
    distance = np.abs(np.minimum(h.astype(np.float64), values[-1])[:, None] - values)
    near = distance == distance.min(-1, keepdims=True)
    near &= (near.sum(-1, keepdims=True) == 1) | (np.arange(len(values)) % 2 == 0)
    for run in (lambda f: f, jax.jit):
        assert_array_equal(run(table.encode)(h), near.argmax(-1))
        assert_array_equal(run(table.decode)(np.arange(len(values))), np.float32(values))
        assert np.all(np.isnan(run(table.decode)(np.arange(len(values), 256))))


def test_a_table_may_round_up():
    table = TableScale("mine", (0.0, 1.0, 1.5, 4.0), "up")
    assert_array_equal(table.encode(np.float32([0, 0.2, 1, 1.1, 1.5, 3, 4, 9, np.inf])), [0, 1, 1, 2, 2, 3, 3, 3, 3])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"values": (1.0,)}, "2 to 256 ascending"), ({"values": (0.0, 2.0, 1.0)}, "2 to 256 ascending"),
        ({"values": (-1.0, 1.0)}, "2 to 256 ascending"), ({"values": (0.0, float("inf"))}, "finite"),
        ({"rounding": "down"}, "rounding must be"), ({"nan": 1}, "nan must be a payload from 3"),
        ({"last": 3}, "last must be a payload from 1 to 2"),
    ],
)  # fmt: skip
def test_a_table_proves_itself(fields, message):
    with pytest.raises(ValueError, match=message):
        TableScale(**{"name": "mine", "values": (0.0, 1.0, 2.0)} | fields)
