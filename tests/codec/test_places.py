"""Blocks place by place: for every format that kernels take, the bits of the encoder and of the decoder."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden import make
from matrix import KINDS
from numpy.testing import assert_array_equal

import ifjax
from ifjax import Candidate, Format, Grid, codec
from ifjax.codec import Encoding
from ifjax.codec.place_grids import FloatsAway
from ifjax.codec.places import PlaceCodec, decoder_refusal, encoder_refusal
from ifjax.codec.rounding import uniform_noise
from ifjax.formats.grids import E2M1
from ifjax.formats.scales import E8M0, TableScale

SORTED = (-1.0, -0.7, -0.5, -0.35, -0.25, -0.15, -0.08, 0.0, 0.08, 0.16, 0.25, 0.34, 0.44, 0.56, 0.72, 1.0)
UNORDERED = Grid("unordered", (0.0, 1, 2, 3, 4, 5, 6, 7, -1, -2, -3, -4, -5, -6, -8, -9))
FREE = {"scale": E8M0, "tensor_peak": None}


def minifloat(exponent_bits, mantissa_bits, **settings):
    """All codes are numbers; the least step is 2^(2 - 2^(exponent_bits - 1) - mantissa_bits)."""
    one = 2**mantissa_bits
    exponents = range(2**exponent_bits)
    units = [(e > 0) * one + i if e < 2 else (one + i) << e - 1 for e in exponents for i in range(one)]
    step = 2.0 ** (2 - 2 ** (exponent_bits - 1) - mantissa_bits)
    return Grid.sign_magnitude(f"E{exponent_bits}M{mantissa_bits}", [u * step for u in units], **settings)


INT5 = Grid.sign_magnitude("INT5", range(16))
MINE = (
    Format("two sorted grids", (Candidate(Grid("a", SORTED)), Candidate(UNORDERED, step=0.11, peak=0.9)), 16),
    Format(
        "offset, last of ties, no zero scale",
        (Candidate(E2M1), Candidate(UNORDERED, step=0.7, offset=0.25)), 16, ties="last", prevent_zero=True,
    ),
    Format("ue5m3", (Candidate(E2M1),), 16, TableScale.minifloat("ue5m3", 5, 3, 15), tensor_peak=None),
    # Codes of 5 to 8 bits; signs that are not the inputs'.
    Format("int8", (Candidate(Grid.twos_complement("INT8", 8)),), 32, **FREE),
    Format("int8, eighths", (Candidate(Grid.sign_magnitude("I8", [i / 8 for i in range(128)], zero="unsigned")),), 16),
    Format("fp8", (Candidate(minifloat(4, 3)), Candidate(minifloat(5, 2), peak=98304.0)), 16, tensor_peak=None),
    Format("int5, moved or not", tuple(Candidate(INT5, offset=offset) for offset in (0, 0.25)), 32),
    Format("fp7, 0 that is negative", (Candidate(minifloat(3, 3, zero="negative")),), 16),
    Format("int6, 0 that is negative", (Candidate(Grid.sign_magnitude("I6", range(32), zero="negative")),), 16, **FREE),
)  # fmt: skip
FORMATS = {fmt.name: fmt for fmt in (*ifjax.FORMATS.values(), *MINE) if encoder_refusal(Encoding.of(fmt)) is None}


def data() -> np.ndarray:
    """float32 [14, 4, 96]: the inputs of the golden file, and tensors with numbers that are none."""
    kinds = list(make.inputs(np.random.default_rng(5)).values())
    poisoned = kinds[0].copy()
    poisoned.flat[::37], poisoned.flat[::41], poisoned.flat[::43] = np.nan, np.inf, -np.inf
    ties = np.random.default_rng(6).integers(-24, 25, kinds[0].shape).astype(np.float32) / 4
    return np.stack([*kinds, poisoned, ties])


def by_places(x, key, *, how, dtype):
    """Operation by operation, which formats share: as one program each takes half a minute to compile.

    (codes, scales, values, what codes and scales decode to) of x [T, r, n], each x[i] a tensor of its own."""
    places, fmt = PlaceCodec(how, np.dtype(dtype)), how.fmt
    x = x.astype(dtype).astype(jnp.float32)
    xs = [x.reshape(len(x), -1, fmt.block)[..., i] for i in range(fmt.block)]
    amax = jnp.max(jnp.where(jnp.isfinite(x), jnp.abs(x), 0), (1, 2)) if fmt.has_tensor_scale else None
    scalars, table = places.encoder_tables(amax, len(x))
    noise = None
    if places.noises:
        arrays = [r.reshape(len(x), -1, fmt.block) for r in uniform_noise(key, x.shape, places.noises)]
        noise = [[r[..., i] for i in range(fmt.block)] for r in arrays]

    def lookup(table):
        return lambda row, index: jnp.take_along_axis(table[:, row], index, 1)

    scalars = [scalars[:, i : i + 1] for i in range(4)]
    block = places.encode(xs, noise, scalars, lookup(table), wants_codes=True, wants_values=True)
    decoded = block.values
    if decoder_refusal(fmt) is None:
        decoded = places.decode(block.words, block.header, lookup(places.decoder_table(amax, len(x))))
    words = jnp.stack(block.words, -1)
    return words, block.header, *(jnp.stack(values, -1).reshape(x.shape) for values in (block.values, decoded))


def assert_same_numbers(a, b):
    a, b = (np.asarray(v, np.float32) for v in (a, b))
    assert_array_equal(a, b)
    assert_array_equal(np.signbit(a)[a == a], np.signbit(b)[a == a])


CASES = {
    f"{name}, {rounding}": (fmt, rounding, dtype)
    for name, fmt in FORMATS.items()
    for rounding, dtype in (("nearest", "float32"), ("stochastic_unbiased", "bfloat16"))
    if name in KINDS or (rounding == "nearest" and fmt in MINE)
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_places_have_the_bits_of_the_codec(case):
    """Codes, scale bytes, values and their signs of zero, and what is decoded."""
    fmt, rounding, dtype = CASES[case]
    how, key = Encoding.of(fmt, rounding=rounding), jax.random.key(1) if rounding != "nearest" else None
    x = jnp.asarray(data()).astype(dtype)
    q = ifjax.quantize(x, how, key=key, amax_axes=(0,) if fmt.has_tensor_scale else ())
    words, headers, values, decoded = by_places(x, key, how=how, dtype=dtype)
    codes = np.asarray(words).astype("<i4").view(np.uint8)[..., : fmt.block * fmt.bits // 8]
    assert_array_equal(codes.reshape(q.codes.shape), q.codes)
    assert_array_equal(np.asarray(headers, np.uint8).reshape(q.scales.shape), q.scales)
    for got in (values, decoded):
        assert_same_numbers(got, q.dequantize())


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_values_saturate_at_the_end_of_the_type(dtype):
    """The codes of the largest numbers mean a power of two beyond it."""
    x, how = jnp.full((1, 1, 32), jnp.finfo(dtype).max, dtype), Encoding.of("mxfp4")
    _, _, values, decoded = by_places(x, None, how=how, dtype=dtype)
    for got in (values, decoded):
        assert_array_equal(got, x.astype(jnp.float32))


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_ties_of_a_float_go_away_from_zero(bits):
    grid = minifloat(bits, 1, ties="away")
    values = np.array(grid.magnitudes, np.float32)
    middles = (values[1:] + values[:-1]) / 2
    points = np.concatenate([values, middles, values[-1:] * 3])
    y = np.concatenate([points, *(np.nextafter(points, np.float32(end)) for end in (0, np.inf))])
    codes = np.searchsorted(middles, y, side="right")
    places = FloatsAway.of_grid(grid)
    place = places.rounded(jnp.asarray(y), None)
    assert_array_equal(places.number(place), values[codes])
    for shift in (0, 4, 24):
        assert_array_equal(np.asarray(places.code(place, shift)).view(np.uint32), codes << shift)
    assert_array_equal(np.asarray(places.low_bits(place)) & 7, codes & 7)
    inside = y <= values[-1]
    assert_array_equal(places.unbounded.rounded(jnp.asarray(y[inside]), None)[1], values[codes[inside]])


def test_other_grids_have_no_ties_away_from_zero():
    assert FloatsAway.of_grid(E2M1) is None
    assert FloatsAway.of_grid(minifloat(2, 2, ties="away")) is None
    assert FloatsAway.of_grid(Grid.sign_magnitude("sevenths", [i / 7 for i in range(8)], ties="away")) is None


def test_float16_is_rounded_as_numpy_does():
    halves = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float32)
    ties = np.concatenate([halves, (halves[1:] + halves[:-1]) / 2, np.float32([65520, 1e38, np.inf, np.nan])])
    x = np.concatenate([ties, *(np.nextafter(ties, np.float32(end)) for end in (0, np.inf))])
    x = np.concatenate([x, -x])
    with np.errstate(over="ignore"):
        expected = x.astype(np.float16).astype(np.float32)
    assert_same_numbers(PlaceCodec(Encoding.of("nvfp4"), np.dtype("float16")).rounded(jnp.asarray(x)), expected)


def test_what_kernels_cannot_encode_is_refused_with_the_reason():
    refused = {
        "searches": Encoding.of("if4", search="fast"),
        "whole blocks": Encoding.of("if4", loss=lambda x, y: ((x - y) ** 2).sum(-1)),
        "noise": Encoding.of("if4", rounding=codec.Rounding("own", lambda key, shape, count: [])),
        "several bytes": Encoding.of("hifloat4"),
        "overflows": Encoding.of("nvfp4_ue5m3"),
        "blocks are of 64": Encoding.of(Format("long", (Candidate(E2M1),), 64)),
    }
    for reason, how in refused.items():
        assert reason in (encoder_refusal(how) or "")
    assert decoder_refusal(ifjax.FORMATS["if4"]) is None
    assert decoder_refusal(ifjax.FORMATS["if6"]) is None
    assert "too many" in (decoder_refusal(Format("any", (Candidate(Grid("any", (*range(31), -40))),), 16)) or "")
