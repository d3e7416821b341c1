"""The units give the bits of the published vectors and of a numpy model, in every way of calling them."""

import dataclasses
import functools
import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_array_equal

from ifjax.formats import E4M3 as E4M3_SCALE
from ifjax.formats import FORMATS, Candidate, Format
from ifjax.measure import mac as mac_module
from ifjax.measure.mac import if4_mac, mac_error, nvfp4_mac

UNITS = {"if4": if4_mac, "nvfp4": nvfp4_mac}
NAMES = "a_codes", "a_scales", "w_codes", "w_scales"
each_unit = pytest.mark.parametrize("unit", UNITS)

# One iteration of the loop over beats is inlined, which is where a product next to a sum is contracted most easily.
LENGTHS = 1, 2, 3, 10, 40


def bits(x):
    return np.asarray(x, np.float32).view(np.uint32)


def jitted(unit, segment):
    return jax.jit(UNITS[unit])(*segment)


def eager(unit, segment):
    return UNITS[unit](*segment)


def vmapped(unit, segment):
    return jax.vmap(UNITS[unit])(*segment)


def vmapped_twice_inside_jit(unit, segment):
    f = jax.jit(jax.vmap(jax.vmap(UNITS[unit])))
    return f(*(part[None] for part in segment))[0]


def one_by_one(unit, segment):
    f = jax.jit(UNITS[unit])
    return [f(*parts) for parts in zip(*segment, strict=True)]


each_way = pytest.mark.parametrize("call", [eager, jitted, vmapped, vmapped_twice_inside_jit, one_by_one])


# --- the published vectors


@pytest.fixture(scope="module")
def golden(golden_dir):
    return np.load(golden_dir / "mac_golden.npz")


def golden_segments(golden, unit, kind):
    """The four arrays with the segments as leading axis, and the expected bits. The last beat only flushes."""
    first, a_scales, w_scales, a_codes, w_codes, expected = (
        golden[f"{unit}_{kind}__{name}"] for name in ("first", "a_sf", "w_sf", "a_codes", "w_codes", "expected_f32bits")
    )
    assert_array_equal(np.flatnonzero(first), np.arange(len(expected) + 1) * 10)
    segments = [part[:-1].reshape(-1, 10, *part.shape[1:]) for part in (a_codes, a_scales, w_codes, w_scales)]
    return segments, expected


@pytest.mark.by_default("if4-random-vmapped_twice*", "nvfp4-svh-jitted", "if4-svh-one_by_one", "nvfp4-random-eager")
@each_way
@pytest.mark.parametrize("kind", ["svh", "random"])
@each_unit
def test_the_published_vectors_are_met_bit_for_bit(golden, unit, kind, call):
    segments, expected = golden_segments(golden, unit, kind)
    assert_array_equal(bits(call(unit, segments)), expected)


@pytest.mark.parametrize(
    "unit, words", [("if4", (0xC802A96C, 0x493F9837, 0x4A323662)), ("nvfp4", (0x48E076B2, 0xC66D5C82, 0x499463B2))]
)
def test_the_words_of_the_published_test_bench(golden, unit, words):
    segments, _ = golden_segments(golden, unit, "svh")
    assert_array_equal(bits(UNITS[unit](*segments)), np.array(words, np.uint32))


# --- the model: plain numpy, one rounding an operation, nothing from ifjax

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
INT4 = np.array([0, 1, 2, 3, 4, 5, 6, 7, np.nan, -7, -6, -5, -4, -3, -2, -1])
E4M3 = np.array([m / 512 if e == 0 else (8 + m) * 2.0 ** (e - 10) for e in range(16) for m in range(8)])
E4M3[0x7F] = 448
CONSTANTS = np.array([0x3F800000, 0x3F5B6DB7, 0x3F3C14E6], np.uint32).view(np.float32)


def model_decode(unit, codes, scales):
    integers = (scales >= 0x80) & (unit == "if4")
    values = np.where(integers[..., None], INT4[codes], E2M1[codes])
    return values, E4M3[scales & 0x7F], integers.astype(int)


def model(unit, a_codes, a_scales, w_codes, w_scales):
    """float32 [segments], of codes [segments, beats, 16]."""
    a, a_scale, a_flag = model_decode(unit, a_codes, a_scales)
    w, w_scale, w_flag = model_decode(unit, w_codes, w_scales)
    element = np.float16(a * w)
    scale = np.float32(a_scale * w_scale)
    scale = np.where(scale == 0, np.float32(0), scale * CONSTANTS[a_flag + w_flag])
    product = element.astype(np.float32) * scale[..., None]
    lanes = product[:, 0]
    for beat in range(1, product.shape[1]):
        lanes = lanes + product[:, beat]
    while lanes.shape[-1] > 1:
        lanes = lanes[:, 0::2] + lanes[:, 1::2]
    assert product.dtype == lanes.dtype == np.float32
    return lanes[:, 0]


def draw_scales(rng, shape, kind):
    """Payloads of one kind, each flag half of the time."""
    low, high = {"any": (0, 0x80), "subnormal": (0, 8), "normal": (8, 0x7F), "top": (0x7D, 0x80), "zero": (0, 1)}[kind]
    return (rng.integers(low, high, shape) | rng.integers(0, 2, shape) << 7).astype(np.uint8)


def draw(rng, unit, count, beats, kinds=("any", "any"), zeros=0.0):
    """Segments in which every code that the unit knows occurs; `zeros` is the share of codes 0 besides."""
    parts = []
    for kind in kinds:
        scales = draw_scales(rng, (count, beats), kind)
        codes = rng.integers(0, 16, (count, beats, 16)) * (rng.random((count, beats, 16)) >= zeros)
        if unit == "if4":
            codes = np.where((scales >= 0x80)[..., None] & (codes == 8), 0, codes)
        parts += [codes.astype(np.uint8), scales]
    return parts


def test_the_model_meets_the_published_vectors(golden):
    for unit in UNITS:
        for kind in ("svh", "random"):
            segments, expected = golden_segments(golden, unit, kind)
            assert_array_equal(bits(model(unit, *segments)), expected)


@pytest.mark.by_default("if4-10", "if4-1", "nvfp4-40")
@pytest.mark.parametrize("beats", LENGTHS)
@each_unit
def test_random_segments_of_any_length_are_the_models(unit, beats):
    segments = draw(np.random.default_rng(beats), unit, 500, beats, ("normal", "normal"))
    expected = bits(model(unit, *segments))
    for call in (eager, vmapped_twice_inside_jit):
        assert_array_equal(bits(call(unit, segments)), expected)
    one = [part[:100] for part in segments]
    assert_array_equal(bits(one_by_one(unit, one)), expected[:100])


@pytest.mark.parametrize("zeros", [0.0, 0.5, 0.97])
@pytest.mark.parametrize(
    "kinds", [("any", "any"), ("subnormal", "subnormal"), ("subnormal", "top"), ("top", "top"), ("zero", "any")]
)
@each_unit
def test_subnormal_clamped_and_zero_scales_are_the_models(unit, kinds, zeros):
    segments = draw(np.random.default_rng(1), unit, 300, 7, kinds, zeros)
    assert_array_equal(bits(UNITS[unit](*segments)), bits(model(unit, *segments)))


@each_unit
def test_every_pair_of_scale_bytes_is_the_models(unit):
    a_scales, w_scales = (s.reshape(-1, 1).astype(np.uint8) for s in np.mgrid[:256, :256])
    codes = np.full((256 * 256, 1, 16), 0, np.uint8)
    codes[..., 0] = 7
    segments = codes, a_scales, codes, w_scales
    assert_array_equal(bits(UNITS[unit](*segments)), bits(model(unit, *segments)))


@pytest.mark.parametrize("flags", [0x0000, 0x0080, 0x8000, 0x8080])
@each_unit
def test_every_pair_of_codes_is_the_models(unit, flags):
    a_flag, w_flag = flags >> 8, flags & 0xFF
    unused = [8 if flag and unit == "if4" else None for flag in (a_flag, w_flag)]
    pairs = [(a, w) for a in range(16) for w in range(16) if a != unused[0] and w != unused[1]]
    # The same in all lanes of one beat, so that the tree's sums are exact and the sign of zero comes through.
    a_codes, w_codes = (np.repeat([[[pair[i]]] for pair in pairs], 16, -1).astype(np.uint8) for i in range(2))
    for scale in (0x01, 0x35, 0x7E):
        a_scales, w_scales = (np.full((len(pairs), 1), scale | flag, np.uint8) for flag in (a_flag, w_flag))
        segments = a_codes, a_scales, w_codes, w_scales
        assert_array_equal(bits(UNITS[unit](*segments)), bits(model(unit, *segments)))


# --- single rules


def beats_of(codes, scale):
    """One operand whose beats hold one code each, under one scale byte."""
    return np.repeat(np.array(codes, np.uint8)[:, None], 16, 1), np.full(len(codes), scale, np.uint8)


ONE = 0x38


@each_unit
def test_no_beats_give_plus_zero(unit):
    nothing = beats_of([], ONE)
    assert bits(UNITS[unit](*nothing, *nothing)) == 0
    assert bits(jax.jit(UNITS[unit])(*nothing, *nothing)) == 0
    assert_array_equal(bits(jax.vmap(UNITS[unit])(*(part[None] for part in nothing * 2))), [0])


@each_unit
def test_the_first_beat_is_loaded_so_minus_zeros_stay(unit):
    minus, plus = beats_of([8, 8], ONE), beats_of([2, 2], ONE)
    assert bits(UNITS[unit](*minus, *plus)) == 0x80000000
    assert bits(UNITS[unit](*minus, *minus)) == 0


@each_unit
def test_the_scale_payload_0x7f_is_448_and_no_nan(unit):
    top, clamped, one = beats_of([2], 0x7E), beats_of([2], 0x7F), beats_of([2], ONE)
    assert UNITS[unit](*top, *one) == UNITS[unit](*clamped, *one) == 16 * 448


def test_the_flag_makes_if4_codes_integers_and_means_nothing_to_nvfp4():
    plain, flagged = beats_of([7], ONE), beats_of([7], ONE | 0x80)
    assert nvfp4_mac(*flagged, *plain) == nvfp4_mac(*plain, *plain) == if4_mac(*plain, *plain) == 16 * 36
    assert if4_mac(*flagged, *plain) == 16 * np.float32(42 * CONSTANTS[1])
    assert if4_mac(*flagged, *flagged) == 16 * np.float32(49 * CONSTANTS[2])


def test_leading_axes_are_segments():
    segments = draw(np.random.default_rng(2), "if4", 6, 3)
    deep = [part.reshape(2, 3, *part.shape[1:]) for part in segments]
    assert_array_equal(bits(if4_mac(*deep)).ravel(), bits(if4_mac(*segments)))


def test_one_operand_can_be_shared_by_vmap():
    a_codes, a_scales, w_codes, w_scales = draw(np.random.default_rng(3), "if4", 4, 5)
    all_pairs = jax.vmap(jax.vmap(if4_mac, (None, None, 0, 0)), (0, 0, None, None))(
        a_codes, a_scales, w_codes, w_scales
    )
    for i in range(4):
        rows = [np.broadcast_to(part[i], part.shape) for part in (a_codes, a_scales)]
        assert_array_equal(bits(all_pairs[i]), bits(model("if4", *rows, w_codes, w_scales)))


def test_the_result_is_one_float32():
    result = if4_mac(*beats_of([1], ONE), *beats_of([1], ONE))
    assert result.dtype == jnp.float32 and result.shape == ()


# --- codes that do not exist


def test_the_code_0x8_is_minus_zero_among_floats():
    minus, one = beats_of([8, 2], ONE), beats_of([2, 2], ONE)
    for unit in UNITS.values():
        assert unit(*minus, *one) == 16
    assert nvfp4_mac(*beats_of([8, 2], ONE | 0x80), *one) == 16


@pytest.mark.parametrize("operand", ["a", "w"])
@pytest.mark.parametrize(
    "code, scale, message", [(8, ONE | 0x80, "0x8, .* INT4: its values end at -7"), (0x27, ONE, "0x27.* unpack bytes")]
)
def test_a_code_that_does_not_exist_raises_or_gives_nan(operand, code, scale, message):
    codes, scales = beats_of([1, 1, 1], scale)
    codes[2, 5] = code
    one = beats_of([1, 1, 1], ONE)
    segment = (codes, scales, *one) if operand == "a" else (*one, codes, scales)
    with pytest.raises(ValueError, match=rf"{operand}_codes\[2, 5\] is {message}"):
        if4_mac(*segment)
    with pytest.raises(ValueError, match=rf"{operand}_codes\[2, 5\]"):
        mac_error(*segment)
    assert np.isnan(jax.jit(if4_mac)(*segment))
    # Its neighbours in a batch are not harmed.
    good = beats_of([1, 1, 1], scale if code == 0x27 else ONE) * 2
    result = jax.vmap(if4_mac)(*(np.stack(pair) for pair in zip(segment, good, strict=True)))
    assert_array_equal(np.isnan(result), [True, False])


def test_a_zero_scale_does_not_hide_a_code_that_does_not_exist():
    zero = beats_of([0], 0x00)
    with pytest.raises(ValueError, match="a_codes"):
        if4_mac(*beats_of([8], 0x80), *zero)
    assert np.isnan(jax.jit(if4_mac)(*beats_of([8], 0x80), *zero))


# --- wrong arguments


@pytest.mark.parametrize(
    "name, shape",
    [
        ("a_codes", (3, 8)),
        ("a_codes", (48,)),
        ("a_codes", ()),
        ("a_scales", (3, 1)),
        ("w_codes", (4, 16)),
        ("w_codes", (1, 3, 16)),
        ("w_scales", (2,)),
    ],
)
def test_other_shapes_are_refused(name, shape):
    arguments = dict(zip(NAMES, beats_of([1, 1, 1], ONE) * 2, strict=True))
    arguments[name] = np.ones(shape, np.uint8)
    for f in (*UNITS.values(), mac_error, jax.jit(if4_mac)):
        with pytest.raises(ValueError, match=rf"codes \[\.\.\., beats, 16\].*{name} \({', '.join(map(str, shape))}"):
            f(**arguments)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", ["int32", "float32", "int8", "float8_e4m3fn"])
def test_other_dtypes_are_refused(name, dtype):
    arguments = dict(zip(NAMES, map(jnp.asarray, beats_of([1], ONE) * 2), strict=True))
    arguments[name] = arguments[name].astype(dtype)
    how = "astype" if "codes" in name else "view"
    for f in (*UNITS.values(), mac_error, jax.jit(if4_mac)):
        with pytest.raises(TypeError, match=rf"{name} must be uint8, got {dtype}: write \.{how}\(jnp.uint8\)"):
            f(**arguments)


# --- against the exact dot product


def exact_dot(unit, a_codes, a_scales, w_codes, w_scales):
    """(sum, sum of absolute values) of one segment, as fractions."""
    a, a_scale, a_flag = model_decode(unit, a_codes, a_scales)
    w, w_scale, w_flag = model_decode(unit, w_codes, w_scales)
    beats = [
        [Fraction(v) * Fraction(u) * Fraction(a_scale[i]) * Fraction(w_scale[i]) * Fraction(6, 7) ** int(n)
         for v, u in zip(a[i], w[i], strict=True)]
        for i, n in enumerate(a_flag + w_flag)
    ]  # fmt: skip
    terms = [term for beat in beats for term in beat]
    return sum(terms), sum(map(abs, terms))


@pytest.mark.parametrize("beats", [0, 10])
@each_unit
def test_the_error_is_that_from_the_sum_of_fractions(unit, beats):
    segments = draw(np.random.default_rng(5), unit, 8, beats)
    result = mac_error(*segments, fmt=unit)
    assert_array_equal(bits(result.mac), bits(UNITS[unit](*segments)))
    assert_array_equal(result.error, result.mac - result.exact)
    for i in range(8):
        exact, size = exact_dot(unit, *(part[i] for part in segments))
        # Two roundings of the constant and one for each beat's product and sum; numpy's order only shortens that.
        assert abs(Fraction(float(result.exact[i])) - exact) <= Fraction(2 * beats + 2, 2**53) * size
        # Of a segment without any value, nothing is off.
        assert math.isclose(result.relative[i] * float(size), abs(result.error[i]), rel_tol=1e-12)


@pytest.mark.by_default("if4-3", "nvfp4-10")
@pytest.mark.parametrize("beats", LENGTHS)
@each_unit
def test_the_relative_error_stays_below_its_bound(unit, beats):
    segments = draw(np.random.default_rng(6), unit, 500, beats, ("normal", "normal"))
    relative = mac_error(*segments, fmt=unit).relative
    assert relative.max() <= (1 + 2.0**-24) ** (beats + 6) - 1
    # Without sevenths, a beat is exact.
    assert (relative.max() > 0) == (unit == "if4" or beats > 1)


def test_sums_of_nvfp4_under_one_scale_are_exact():
    codes = np.random.default_rng(7).integers(0, 16, (50, 10, 16)).astype(np.uint8)
    scales = np.full((50, 10), ONE, np.uint8)
    assert_array_equal(mac_error(codes, scales, codes[::-1], scales, fmt="nvfp4").error, 0)


def test_an_error_of_one_segment_is_a_number():
    result = mac_error(*beats_of([7, 7], ONE | 0x80), *beats_of([7, 7], ONE))
    assert all(np.shape(field) == () for field in result)
    assert result.mac.dtype == np.float32 and result.exact.dtype == result.error.dtype == np.float64
    assert result.exact == 32 * 36


def test_a_unit_can_be_told_any_decoding_of_its_width():
    integers = beats_of([7, 0xF], ONE)
    assert mac_error(*integers, *integers, fmt="nvint4").exact == 16 * (49 + 1)
    assert mac_error(*integers, *integers, fmt=FORMATS["fouroversix"]).exact == 2 * 16 * 36
    own = Format("own", FORMATS["if4"].candidates[:1], 16)
    assert mac_error(*integers, *integers, fmt=own).mac == 2 * 16 * 36


@pytest.mark.parametrize("fmt", ["if3", "if6", "mxfp4", "if4_bs8"])
def test_formats_that_the_unit_cannot_decode_are_refused(fmt):
    with pytest.raises(ValueError, match=f"4-bit codes in blocks of 16 with e4m3 scales; {FORMATS[fmt].name} has"):
        mac_error(*beats_of([1], ONE), *beats_of([1], ONE), fmt=fmt)


def test_offsets_and_other_tops_of_the_scale_are_refused():
    shifted = Format("shifted", (Candidate(FORMATS["nvfp4"].grid, offset=0.25),), 16)
    with pytest.raises(ValueError, match="shifted adds an offset"):
        mac_error(*beats_of([1], ONE), *beats_of([1], ONE), fmt=shifted)
    scale = dataclasses.replace(E4M3_SCALE, name="low", last=100)
    low = Format("low", (Candidate(FORMATS["nvfp4"].grid),), 16, scale, tensor_peak=1.0)
    with pytest.raises(ValueError, match="with low scales"):
        mac_error(*beats_of([1], ONE), *beats_of([1], ONE), fmt=low)


# --- what the tests are worth


def fused(monkeypatch):
    monkeypatch.setattr(mac_module, "_signed_product", lambda x, scale: x * scale)


def two_constants(monkeypatch):
    step = np.float64(np.float32(6 / 7))
    monkeypatch.setattr(mac_module, "_steps", lambda fmt: np.multiply.outer([1, step], [1, step]) * (1 + 2.0**-24))


def nothing(monkeypatch):
    pass


@pytest.mark.parametrize("mutation, wrong", [(nothing, False), (fused, True), (two_constants, True)])
@pytest.mark.skipif(jax.default_backend() != "cpu", reason="which products are fused is known of XLA:CPU")
def test_these_segments_tell_a_wrong_unit(monkeypatch, mutation, wrong):
    mutation(monkeypatch)
    segments = draw(np.random.default_rng(2), "if4", 500, 2, ("normal", "normal"))
    f = jax.jit(functools.partial(mac_module._mac.__wrapped__, fmt=FORMATS["if4"]))
    assert (bits(f(*segments)) != bits(model("if4", *segments))).any() == wrong
