"""The codec of every format: what each pair of bytes means, and what becomes of any input.

Tensors are tried many at a time, as [14, 4, 96] with an amax each: one compiled program a format serves all tests
here, and those of our own golden file too.
"""

import dataclasses
import functools
import itertools
import sys

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from golden import make
from hypothesis import given
from hypothesis import strategies as st
from matrix import KINDS
from numpy.testing import assert_array_equal

import ifjax
from ifjax import Candidate, Format, Grid, codec
from ifjax.arrays import Blocking
from ifjax.codec import Encoding
from ifjax.codec.blocks import merge_blocks, split_blocks
from ifjax.codec.headers import header_words
from ifjax.formats.grids import E2M1, E2M3, INT4
from ifjax.formats.scales import E8M0
from ifjax.numerics.packing import pack

NAMED = {name: ifjax.get_format(name) for name in oracle.FORMATS}


def each(condition):
    """Parametrize by the formats that meet it; those of no kind of their own are slow."""
    return pytest.mark.parametrize(
        "fmt",
        [pytest.param(fmt, id=name, marks=() if name in KINDS else pytest.mark.slow)
         for name, fmt in NAMED.items() if condition(fmt)],
    )  # fmt: skip


each_format = each(lambda fmt: True)
few_examples = hypothesis.settings(max_examples=8)  # of 14 tensors each

SHAPE = (14, 4, 96)  # whole blocks of 8, 16 and 32


@dataclasses.dataclass(frozen=True)
class Got:
    """Codes, scale bytes, amax and values on the host."""

    codes: np.ndarray
    scales: np.ndarray
    amax: np.ndarray
    deq: np.ndarray


def got(q):
    amax = np.ones(len(q), np.float32) if q.amax is None else np.asarray(q.amax)
    return Got(np.asarray(q.unpacked_codes()), np.asarray(q.scales), amax, np.asarray(q.dequantize(np.float32)))


def quantized(x, fmt, **settings):
    """Each x[i] is a tensor of its own."""
    return got(ifjax.quantize(x, fmt, amax_axes=(0,) if fmt.has_tensor_scale else (), **settings))


def spread(per_block, fmt):
    """One entry a block -> one a value."""
    return np.repeat(per_block, fmt.block, axis=-1)


def normal(seed=0, shape=SHAPE):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def tensors(seed, kind):
    """f32[14, 4, 96], amax 1 at [:, 0, 0]. A power of two survives a round trip, so amax does not drift."""
    rng = np.random.default_rng(seed)
    if kind == "normal":
        x = rng.standard_normal(SHAPE)
    elif kind == "heavy":
        x = rng.standard_t(2, SHAPE)
    elif kind == "sparse":
        x = rng.standard_normal(SHAPE) * (rng.random(SHAPE) < 0.2)
    else:
        x = rng.integers(-12, 13, SHAPE)
    x = x / np.abs(x).max((1, 2), keepdims=True)
    x[:, 0, 0] = 1
    return x.astype(np.float32)


each_input = given(seed=st.integers(0, 2**32 - 1), kind=st.sampled_from(["normal", "heavy", "sparse", "integers"]))


# --- against the oracle


def assert_is_the_oracles(x, result, fmt, described, loss="mse"):
    for i, tensor in enumerate(x):
        want = oracle.quantize(tensor, described, loss=loss)
        clear = ~want.ambiguous
        elements = spread(clear, fmt)
        assert_array_equal(result.amax[i], want.amax)
        assert_array_equal(result.scales[i][clear], want.scales[clear])
        assert_array_equal(result.codes[i][elements], want.codes[elements])
        assert_array_equal(result.deq[i][elements], want.deq[elements])


def magnitudes(seed=0):
    """Normal tensors of 14 sizes, 2^-60 to 2^57."""
    return normal(seed) * np.exp2(np.arange(-60, 66, 9, dtype=np.float32))[:, None, None]


@pytest.mark.by_default("if4", "mxfp4", "nvint4")
@each_format
def test_tensors_of_any_size_are_encoded_as_the_oracle_says(fmt):
    x = magnitudes()
    assert_is_the_oracles(x, quantized(x, fmt), fmt, fmt.name)


@pytest.mark.by_default("if4-mae")
@pytest.mark.parametrize("loss", ["mae", "abs_max"])
@pytest.mark.parametrize(
    "name",
    [
        "if4", "fouroversix",
        *((name) for name, fmt in NAMED.items()
          if len(fmt.candidates) > 1 and name not in ("if4", "fouroversix")),
    ],
)  # fmt: skip
def test_every_loss_selects_as_the_oracle_says(name, loss):
    x = magnitudes()
    assert_is_the_oracles(x, quantized(x, NAMED[name], loss=loss), NAMED[name], name, loss)


@each_format
@few_examples
@each_input
def test_any_tensor_is_encoded_as_the_oracle_says(fmt, seed, kind):
    x = tensors(seed, kind)
    assert_is_the_oracles(x, quantized(x, fmt), fmt, fmt.name)


@each_format
def test_tensors_on_the_edges_of_rounding_are_encoded_as_the_oracle_says(fmt):
    """Scales and scaled values within an ulp of where rounding turns, under 14 amax: a rewritten division shows."""
    rng = np.random.default_rng(15)
    x = np.stack([make.edges(oracle.FORMATS[fmt.name], rng) for _ in range(14)])
    assert_is_the_oracles(x, quantized(x, fmt), fmt, fmt.name)


ODD = {"if4": (5, 37), "if3": (3, 3), "mxfp6_e2m3": (2, 33), "nvfp3_bs8": (4, 1), "nvint6": (1, 50)}


@pytest.mark.by_default("if4")
@pytest.mark.parametrize("name", ODD)
def test_lengths_that_fill_no_block_are_as_if_followed_by_zeros(name):
    fmt, (rows, n) = NAMED[name], ODD[name]
    x = normal(1, (2, rows, n))
    padded = np.pad(x, [(0, 0), (0, 0), (0, -n % fmt.block)])
    q = ifjax.quantize(x, fmt, amax_axes=(0,) if fmt.has_tensor_scale else ())
    assert q.shape == x.shape and q.dequantize().shape == x.shape
    assert q.scales.shape == (2, rows, padded.shape[-1] // fmt.block)
    result = got(q)
    for i in range(2):
        want = oracle.quantize(padded[i], name)
        assert not want.ambiguous.any()
        assert_array_equal(result.scales[i], want.scales)
        assert_array_equal(result.codes[i], want.codes[:, :n])
        assert_array_equal(result.deq[i], want.deq[:, :n])


@each_format
def test_a_zero_tensor_is_zero_bytes(fmt):
    result = quantized(np.zeros(SHAPE, np.float32), fmt)
    assert not any(np.any(a) for a in (result.codes, result.scales, result.deq))


# --- decoding: every pair of bytes


def by_hand(fmt, codes, scales, amax, headroom=1.0):
    return ifjax.QTensor(
        codes=pack(jnp.asarray(codes), fmt.bits),
        scales=jnp.asarray(scales),
        amax=jnp.float32(amax) if fmt.has_tensor_scale else None,
        blocking=Blocking(fmt, -1, codes.shape[-1], np.dtype(np.float32), headroom),
    )


def every_pair(fmt):
    """u8[256, n] codes, among them every one, and their u8[256, m] scale bytes: byte r in row r."""
    count = max(2**fmt.bits, fmt.block)
    codes = np.tile(np.arange(count, dtype=np.uint8) % 2**fmt.bits, (256, 1))
    return codes, np.tile(np.arange(256, dtype=np.uint8)[:, None], (1, count // fmt.block))


def assert_equal_or_flushed(values, want):
    """Equal as numbers; where a subnormal number is meant, a platform may give zero."""
    subnormal = (np.abs(want) < 2.0**-126) & (want != 0)
    assert_array_equal(np.where(subnormal & (values == 0), want, values), want)


@each_format
def test_every_code_under_every_scale_byte_has_its_value(fmt):
    codes, scales = every_pair(fmt)
    table = oracle.decode_table(fmt.name)[np.arange(256)[:, None], codes]
    with np.errstate(over="ignore"):
        want = table.astype(np.float32) / fmt.tensor_constant()
    if not fmt.has_tensor_scale:
        want = np.clip(want, -oracle.FLT_MAX, oracle.FLT_MAX)  # saturates, as all types do
    values = by_hand(fmt, codes, scales, 1.0).dequantize()
    assert_equal_or_flushed(np.asarray(values), want)


@each_format
def test_decoding_rounds_in_the_published_order(fmt):
    """((v * s) * amax) * step / K, each operation once, for any amax and headroom."""
    codes, scales = every_pair(fmt)
    for headroom in (1.0, 16 / 17) if fmt.name in ("if4", "fouroversix") else (1.0,):
        for amax in np.float32([0.0, 0.3, 1.7, 3e-20, 3e20]):
            want = oracle.dequantize(codes, scales, amax, fmt.name, headroom)
            values = by_hand(fmt, codes, scales, amax, headroom).dequantize()
            assert_equal_or_flushed(np.asarray(values), want)


@each_format
def test_the_byte_of_nan_makes_nan_of_the_whole_block(fmt):
    codes, scales = every_pair(fmt)
    values = np.asarray(by_hand(fmt, codes, scales, 1.0).dequantize())
    is_nan = np.isnan(values)
    payload = np.arange(256) & 0x7F if fmt.scale.nan == 0x7F else np.arange(256)
    assert_array_equal(is_nan, np.broadcast_to((payload == fmt.scale.nan)[:, None], is_nan.shape))


# --- not a number


def poisoned_input():
    """Tensors with bad values, the same with zeros in their places, and where they are."""
    x = normal(2)
    bad = np.zeros(SHAPE, bool)
    values = np.full(SHAPE, np.nan, np.float32)
    bad[0, 0, 0] = bad[1, 3, 95] = bad[2, 1, 40] = True  # at the ends, in the middle
    values[1:3] = np.inf
    values[3], bad[3, 2, 17] = -np.inf, True
    bad[4, 1] = True  # a whole row
    bad[5, :, ::32] = True  # one in each block
    values[5, :, 1::2] = np.inf
    bad[6] = True  # nothing else
    bad[7, 0, 33], x[7, 0, 34] = True, 1e3  # beside the largest finite value
    values[8], bad[8, 0, 33], x[8, 0, 34] = np.inf, True, -1e3
    bad[9, 0, 1:16] = True
    values[9, 0, 1:8], values[9, 0, 8:16] = np.inf, -np.inf
    values[10], bad[10, 1, 50] = np.uint32(0xFFC12345).view(np.float32), True  # a negative NaN with a payload
    values[11], bad[11, 2, 2] = np.uint32(0x7F800001).view(np.float32), True  # a signalling one
    x[12] = 0
    bad[12, 3, 3] = True  # among zeros
    return np.where(bad, values, x), np.where(bad, np.float32(0), x), bad


@each_format
def test_nan_and_infinity_poison_their_own_block_and_no_other(fmt):
    poisoned, clean, bad = poisoned_input()
    hit = bad.reshape(*SHAPE[:2], -1, fmt.block).any(-1)
    result, want = quantized(poisoned, fmt), quantized(clean, fmt)
    assert_array_equal(result.amax, want.amax)
    assert_array_equal(result.scales, np.where(hit, fmt.scale.nan, want.scales))
    assert_array_equal(result.codes[~spread(hit, fmt)], want.codes[~spread(hit, fmt)])
    assert_array_equal(result.deq, np.where(spread(hit, fmt), np.float32(np.nan), want.deq))


@pytest.mark.by_default("if4-bfloat16", "mxfp4-float16")
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("name", ["if4", "mxfp4"])
def test_nan_and_infinity_of_narrow_floats_poison_alike(name, dtype):
    fmt, (poisoned, clean, bad) = NAMED[name], poisoned_input()
    hit = bad.reshape(*SHAPE[:2], -1, fmt.block).any(-1)
    result, want = (quantized(jnp.asarray(x).astype(dtype), fmt) for x in (poisoned, clean))
    assert_array_equal(result.scales, np.where(hit, fmt.scale.nan, want.scales))
    assert_array_equal(result.deq, np.where(spread(hit, fmt), np.float32(np.nan), want.deq))


@pytest.mark.by_default("if4_bs8")
@pytest.mark.parametrize("name", ["if4_bs8", "mxfp4_bs8"])
def test_nan_poisons_its_own_square_and_no_other(name):
    fmt, x = NAMED[name], normal(3, (20, 36))
    bad = np.zeros(x.shape, bool)
    bad[0, 0] = bad[9, 17] = bad[19, 35] = True  # the last one in a square that is not full
    x[9, 18] = 50.0
    poisoned = np.where(bad, np.float32(np.nan), x)
    hit = np.zeros((24, 40), bool)
    for r, c in np.argwhere(bad) // 8 * 8:
        hit[r : r + 8, c : c + 8] = True
    hit = hit[:20, :36]
    q, want = (ifjax.quantize(a, fmt, block_2d=True) for a in (poisoned, np.where(bad, np.float32(0), x)))
    assert_array_equal(q.scales, np.where(hit[:, ::8], fmt.scale.nan, want.scales))
    assert_array_equal(q.dequantize(), np.where(hit, np.float32(np.nan), want.dequantize()))


# --- the ends of the range


# 2688 / amax overflows below 8e-36; amax * 448 * 28 does from 3e34 on.
EXPONENTS = np.array([-123, -122, -120, -118, -112, -101, -100, -99, 0, 112, 113, 114, 120, 127])


def far_apart(fmt):
    """The same tensor at 14 sizes, from 1.3e-37 to 3.3e38; no number is subnormal."""
    rng = np.random.default_rng(4)
    x = rng.uniform(0.25, 1.9, SHAPE[1:]) * rng.choice([-1, 1], SHAPE[1:])
    x[0, 0] = 1.9375
    # MX formats round the largest numbers up to infinity: they have no tensor scale to prevent it.
    exponents = np.minimum(EXPONENTS, 125) if not fmt.has_tensor_scale else EXPONENTS
    return np.ldexp(x.astype(np.float32), exponents[:, None, None]), exponents


@each_format
def test_tensors_at_the_ends_of_float32_keep_their_relative_error(fmt):
    x, exponents = far_apart(fmt)
    result = quantized(x, fmt)
    at_one = np.flatnonzero(exponents == 0)[0]
    if fmt.has_tensor_scale:
        assert_array_equal(result.scales, np.broadcast_to(result.scales[at_one], result.scales.shape))
        assert_array_equal(result.codes, np.broadcast_to(result.codes[at_one], result.codes.shape))
    errors = np.ldexp(result.deq.astype(np.float64) - x, -exponents[:, None, None])
    worst = np.square(oracle.quantize(x[at_one], fmt.name).deq.astype(np.float64) - x[at_one]).mean()
    # Decoded values below 2^-126 may be flushed to zero: at 2^-123 that is an error of 2^-6 for some of the values.
    assert (np.square(errors).mean((1, 2)) <= worst + 2.0**-13).all()


@each(lambda fmt: not fmt.has_tensor_scale)
def test_an_mx_block_too_small_for_any_scale_takes_the_least(fmt):
    """Its largest value over the grid's is subnormal, and a platform that flushes it must not flush the block."""
    x = np.zeros(SHAPE, np.float32)
    x[:, :, :: fmt.block] = np.ldexp(np.float32(1.5), -126 + np.arange(14) // 2)[:, None, None]
    x[::2] *= -1
    result = quantized(x, fmt)
    for i, tensor in enumerate(x):
        want = oracle.quantize(tensor, fmt.name)
        assert_array_equal(result.scales[i], want.scales)
        assert_array_equal(result.codes[i] & 2 ** (fmt.bits - 1) - 1, want.codes & 2 ** (fmt.bits - 1) - 1)
        assert_equal_or_flushed(result.deq[i], want.deq)


@each(lambda fmt: fmt.has_tensor_scale)
def test_the_largest_value_of_a_tensor_comes_back(fmt):
    x, _ = far_apart(fmt)
    x[:, 1:] = x[:, 1:] / 2
    assert_array_equal(np.abs(quantized(x, fmt).deq[:, 0, 0] / x[:, 0, 0] - 1) < 2.0**-22, True)


def test_a_given_amax_saturates_larger_values():
    x = np.float32([[1.0, -8.0, 100.0, 0.5] * 4, [0.25] * 16])
    q = ifjax.quantize(x, "nvfp4", amax=np.float32(2.0))
    want = oracle.quantize(x, "nvfp4", amax=2.0)
    assert_array_equal(q.scales, want.scales)
    assert_array_equal(q.dequantize(), want.deq)
    assert np.abs(q.dequantize()).max() == 2.0


# --- losses of one's own


def squares(x, decoded):
    return jnp.sum((decoded - x) ** 2, -1)


def magnitudes_of_errors(x, decoded):
    return jnp.sum(jnp.abs(decoded - x), -1)


def largest_error(x, decoded):
    return jnp.max(jnp.abs(decoded - x), -1)


@pytest.mark.by_default("squares-mse-if4", "largest_error-abs_max-fouroversix")
@pytest.mark.parametrize("name", ["if4", "fouroversix"])
@pytest.mark.parametrize(
    ("loss", "builtin"), [(squares, "mse"), (magnitudes_of_errors, "mae"), (largest_error, "abs_max")]
)
def test_a_function_selects_as_the_loss_it_computes(name, loss, builtin):
    x, fmt = normal(5), NAMED[name]
    mine, theirs = quantized(x, fmt, loss=loss), quantized(x, fmt, loss=builtin)
    # where the order of a sum does not matter
    clear = ~np.stack([oracle.quantize(tensor, name, loss=builtin).ambiguous for tensor in x])
    assert clear.mean() > 0.99
    assert_array_equal(mine.scales[clear], theirs.scales[clear])
    assert_array_equal(mine.codes[spread(clear, fmt)], theirs.codes[spread(clear, fmt)])


@pytest.mark.slow
def test_a_function_sees_blocks_in_the_last_axis_and_squares_flattened():
    seen = []

    def loss(x, decoded):
        seen.append((x.shape, decoded.shape, x.dtype))
        return largest_error(x, decoded)

    x, fmt = normal(6, (2, 16, 24)), NAMED["if4_bs8"]
    for settings in ({}, {"axis": -2}, {"block_2d": True}):
        q = ifjax.quantize(x, fmt, loss=loss, **settings)
        assert_array_equal(q.scales, ifjax.quantize(x, fmt, loss="abs_max", **settings).scales)
    assert {a[-1] for a, _, _ in seen} == {8, 64}
    assert all(a == b and dtype == jnp.float32 for a, b, dtype in seen)


def test_a_tie_keeps_the_first_candidate():
    def indifferent(x, decoded):
        del decoded
        return jnp.zeros(x.shape[:-1])

    q = ifjax.quantize(normal(0, (4, 96)), "if4", loss=indifferent)
    assert not q.choices().any()


@pytest.mark.parametrize("settings", [{}, {"axis": 0}, {"block_2d": True}, {"search": "fast"}])
@pytest.mark.parametrize("reduced", [{}, {"axis": -1, "keepdims": True}, None])
def test_a_loss_is_one_number_for_each_block(reduced, settings):
    def loss(x, decoded):
        return (x - decoded) ** 2 if reduced is None else ((x - decoded) ** 2).mean(**reduced)

    with pytest.raises(ValueError, match="one number for each block"):
        ifjax.quantize(normal(0, (32, 32)), "if4", loss=loss, **settings)


# --- search


def block_errors(x, result, fmt, power=2):
    errors = np.abs(result.deq.astype(np.float64) - x) ** power
    return errors.reshape(*x.shape[:-1], -1, fmt.block).sum(-1)


@pytest.mark.by_default("if4")
@pytest.mark.parametrize(
    "name",
    ["if4", "nvfp4", "mxfp4", ("fouroversix"),
     ("if3"), ("if6_e2m3")],
)  # fmt: skip
def test_search_never_loses_and_writes_the_same_format(name):
    fmt, x = NAMED[name], magnitudes(7) if name != "mxfp4" else normal(7)
    x[:7] = normal(7)[:7] * np.float32([1, 1e-3, 1e3, 1e-5, 1e5, 7, 0])[:, None, None]
    x[1, 0, 0] = 4e3  # so that the other blocks' scales are subnormal or zero
    results = [quantized(x, fmt, search=search) for search in (None, "fast", "exhaustive")]
    losses = [block_errors(x, result, fmt) for result in results]
    # float32 sums decide, float64 sums judge
    for worse, better in itertools.pairwise(losses):
        assert (better <= worse * (1 + 1e-5)).all()
    assert losses[0].sum() > losses[1].sum()
    for result in results:
        payload = result.scales & 0x7F if fmt.has_selector else result.scales
        assert payload.max() <= fmt.scale.top
        tensors = zip(result.codes, result.scales, result.amax, strict=True)
        assert_array_equal(result.deq, [oracle.dequantize(*tensor, name) for tensor in tensors])
    # a block of zeros stays one
    assert not any(np.any(result.scales[6]) or np.any(result.codes[6]) for result in results)


@pytest.mark.by_default("nvfp4-*")
@pytest.mark.parametrize(("name", "target"), [("if4", 5.50e-3), ("nvfp4", 6.65e-3)])
def test_fast_search_reaches_its_target_on_normal_data(name, target):
    # 2^18 values: the error of the mean is 0.5 %, and the seed is fixed
    x = normal(8, (1024, 256))
    values = np.asarray(ifjax.quantize(x, name, search="fast").dequantize(), np.float64)
    assert np.square(values - x).sum() / np.square(x, dtype=np.float64).sum() <= target


@pytest.mark.slow
def test_search_minimizes_the_loss_that_is_asked_for():
    fmt, x = NAMED["nvfp4"], normal(9)
    by_mse, by_mae = (quantized(x, fmt, search="fast", loss=loss) for loss in ("mse", "mae"))
    assert (block_errors(x, by_mae, fmt, 1) <= block_errors(x, by_mse, fmt, 1) * (1 + 1e-5)).all()
    assert (block_errors(x, by_mse, fmt, 2) <= block_errors(x, by_mae, fmt, 2) * (1 + 1e-5)).all()
    assert (by_mse.scales != by_mae.scales).any()


# --- formats of one's own

NF4 = (0, 0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.562617, 1)


def described(fmt):
    """The oracle's record of a format without a flag."""
    zero = {"signed": "copied", "negative": "below", "unsigned": "never"}
    entries = []
    for c in fmt.candidates:
        twos_complement = c.grid.values[len(c.grid.values) // 2] != 0
        grid = oracle.Grid(c.grid.magnitudes, c.grid.ties, zero[c.grid.zero], twos_complement)
        factor = fmt.input_factor(c)
        entries.append(oracle.Candidate(grid, np.float32(c.step), factor, np.float32(c.scale_multiplier)))
    peak = fmt.grid.max if fmt.peak is None else fmt.peak
    return oracle.Format(tuple(entries), fmt.block, peak, fmt.tensor_peak and int(fmt.tensor_peak))


def assert_mine_is_the_oracles(fmt, loss="mse"):
    x = normal(10, (2, 6, 2 * fmt.block)) * np.float32([[[1.0]], [[1e-3]]])
    assert_is_the_oracles(x, quantized(x, fmt, loss=loss), fmt, described(fmt), loss)


@pytest.mark.by_default("10")
@pytest.mark.parametrize("block", [1, 3, 8, 10, 24, 32, 64, 128])
def test_any_block_size_works(block):
    assert_mine_is_the_oracles(Format("mine", (Candidate(E2M1),), block))


@pytest.mark.by_default("24-mse")
@pytest.mark.parametrize(
    ("block", "loss"),
    [(24, "mse"), (64, "mse"), (37, "abs_max")]
    + [(n, "abs_max") for n in (1, 3, 128)],
)
def test_any_block_size_chooses(block, loss):
    """Blocks over 32 are summed in parts; 37 has no parts but single values."""
    assert_mine_is_the_oracles(dataclasses.replace(NAMED["if4"], name="mine", block=block), loss)


@pytest.mark.by_default("nf4 down")
@pytest.mark.parametrize(
    "grid",
    [
        Grid.sign_magnitude("nf4", NF4),
        Grid.sign_magnitude("nf4 down", NF4, ties="down", zero="negative"),
        Grid.sign_magnitude("16 values a side", tuple(np.sqrt(np.arange(16)).tolist())),  # 5 bits
        Grid.sign_magnitude("two bits", (0, 1)),
        Grid.sign_magnitude("seven bits", tuple(range(64)), zero="unsigned"),
        Grid.twos_complement("5-bit integers", 5),
    ],
    ids=lambda grid: grid.name,
)
def test_a_grid_of_ones_own_works_wherever_a_named_one_does(grid):
    assert_mine_is_the_oracles(Format("mine", (Candidate(grid),), 16))


@pytest.mark.slow
def test_scales_and_choices_of_ones_own_work():
    nf4 = Grid.sign_magnitude("nf4", NF4)
    assert_mine_is_the_oracles(Format("mine", (Candidate(nf4),), 16, E8M0, tensor_peak=None))
    assert_mine_is_the_oracles(Format("mine", (Candidate(E2M1), Candidate(nf4, step=6.0)), 16))
    assert_mine_is_the_oracles(Format("mine", (Candidate(E2M3),), 16, peak=5.0))


@pytest.mark.slow
def test_a_record_may_stand_for_its_name():
    x = normal(11, (3, 64))
    mine = Format("mine", (Candidate(E2M1), Candidate(INT4, step=6 / 7)), 16)
    q, named = ifjax.quantize(x, mine), ifjax.quantize(x, "if4")
    assert_array_equal(q.codes, named.codes)
    assert_array_equal(q.scales, named.scales)
    assert_array_equal(ifjax.fake_quantize(x, mine), q.dequantize())


# --- properties


def always_reaches_its_top(fmt):
    """Whether a block's maximum takes the largest code, wherever its scale is a normal E4M3 number.

    The rounded scale is at most 18/17 of the exact one, so the maximum comes to 17/18 of the top at least.
    """
    tops = [c.grid.magnitudes[-2:] for c in fmt.candidates]
    return not fmt.has_tensor_scale or all((a + b) / 2 < b * 17 / 18 for a, b in tops)


def test_which_formats_reach_their_top():
    fine = {"nvfp6_e2m3", "nvint6", "if6_e2m3", "if6_e3m2"}
    assert {fmt.name for fmt in NAMED.values() if not always_reaches_its_top(fmt)} == fine


@each(always_reaches_its_top)
@few_examples
@each_input
def test_a_second_round_trip_changes_nothing(fmt, seed, kind):
    """Exactly so for a tensor whose amax comes back exactly, in blocks with a normal scale, but for some 6-bit formats.

    Those have values so close below the largest that a maximum may come back as the one before it, and then the
    block's scale may shrink.
    """
    once = quantized(tensors(seed, kind), fmt)
    twice = quantized(once.deq, fmt)
    # A scale of few bits may grow by more than 18/17, and a maximum of few steps shrink to a scale of zero.
    settled = spread(((once.scales & 0x7F) >= 8) | (once.scales == 0), fmt) if fmt.has_tensor_scale else np.True_
    assert_array_equal(twice.amax, once.amax)
    assert_array_equal(np.where(settled, twice.deq, 0), np.where(settled, once.deq, 0))


@each_format
@few_examples
@each_input
def test_a_power_of_two_scales_all_values_and_changes_no_code(fmt, seed, kind):
    """Whatever the size of the tensor: no loss underflows or overflows."""
    x, exponents = tensors(seed, kind), np.random.default_rng(seed).integers(-90, 121, (14, 1, 1))
    plain, scaled = quantized(x, fmt), quantized(np.ldexp(x, exponents), fmt)
    assert_array_equal(scaled.codes, plain.codes)
    assert_array_equal(scaled.deq, np.ldexp(plain.deq, exponents))
    if not fmt.has_tensor_scale:
        # an MX scale is itself a power of two
        assert_array_equal(scaled.scales, np.where(plain.scales == 0, 0, plain.scales + exponents))
    else:
        assert_array_equal(scaled.scales, plain.scales)


@each_format
@few_examples
@each_input
def test_negated_input_gives_negated_values(fmt, seed, kind):
    x = tensors(seed, kind)
    plain, negated = quantized(x, fmt), quantized(-x, fmt)
    assert_array_equal(negated.deq, -plain.deq)
    assert_array_equal(negated.scales, plain.scales)
    if all(c.grid.zero == "signed" for c in fmt.candidates):
        # the sign bit changes, but in blocks of scale zero, whose codes are 0
        assert_array_equal(negated.codes, np.where(spread(plain.scales, fmt), plain.codes ^ (1 << fmt.bits - 1), 0))


@each_format
@few_examples
@each_input
def test_blocks_do_not_see_each_other(fmt, seed, kind):
    """Given the tensor's amax: which every block keeps its bytes when all of them change places."""
    x, order = tensors(seed, kind), np.random.default_rng(seed).permutation(SHAPE[1] * SHAPE[2] // fmt.block)

    def moved(a):
        blocks = a.reshape(SHAPE[0], len(order), -1)
        return blocks[:, order].reshape(a.shape)

    plain, permuted = quantized(x, fmt), quantized(moved(x), fmt)
    assert_array_equal(permuted.codes, moved(plain.codes))
    assert_array_equal(permuted.scales, moved(plain.scales))
    assert_array_equal(permuted.deq, moved(plain.deq))


@each_format
@few_examples
@each_input
def test_zero_stays_zero_and_signs_stay(fmt, seed, kind):
    x = tensors(seed, kind)
    result = quantized(x, fmt)
    assert (result.deq[x == 0] == 0).all()
    assert (result.deq * np.sign(x) >= 0).all()


# --- the same bytes, however it is run


CHOOSING = [("if4", "mse"), ("fouroversix", "mae"), ("if3", "abs_max"), ("if6_e2m3", "mse")]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "loss"), CHOOSING)
def test_bytes_do_not_depend_on_how_the_program_is_built(name, loss):
    """Float32 sums of errors in one order everywhere, whatever they are fused with."""
    x = jnp.asarray(normal(12, (8, 64, 512)))
    run = functools.partial(ifjax.quantize, fmt=name, loss=loss)
    want = run(x, amax_axes=(0,))

    def same(q, scales=lambda s: s, codes=lambda c: c):
        assert_array_equal(q.amax, want.amax)
        assert_array_equal(scales(q.scales), want.scales)
        assert_array_equal(codes(q.unpacked_codes()), want.unpacked_codes())

    same(jax.vmap(run)(x))
    same(jax.jit(jax.vmap(run))(x))
    with jax.disable_jit():
        same(run(x, amax_axes=(0,)))
    down = jax.jit(lambda x: run(x.mT, amax_axes=(0,), axis=-2))(x)
    same(down, lambda s: s.mT, lambda c: c.mT)
    # beside a consumer that the encoder could be fused with
    q, total = jax.jit(lambda x: (lambda q: (q, q.dequantize().sum()))(run(x, amax_axes=(0,))))(x)
    same(q)
    assert np.isfinite(total)


def encode_in_one_pass(blocks, how, **settings):
    """What `codec.encode` gives by the arrangement that it leaves to GPUs, for formats without a choice too."""
    module = sys.modules["ifjax.codec.encode"]
    with pytest.MonkeyPatch.context() as patch:
        one_pass = lambda *a, in_parts, in_multiples, **b: module._encode_in_one_pass(*a, **b)  # noqa: E731
        patch.setattr(module, "_encode_in_stages", one_pass)
        patch.setattr(module, "_encode", by_places)
        return codec.encode(blocks, how, **settings)


def by_places(*args, in_parts=False, encode=sys.modules["ifjax.codec.encode"]._encode, **settings):
    """What `codec.encode` does on other platforms and with a search: losses by places of blocks, not by parts."""
    return encode(*args, **settings)


def by_places_only(*args, **settings):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules["ifjax.codec.encode"], "_encode", by_places)
        return codec.encode(*args, **settings)


def compiled(encode, how, axis=-1):
    """`encode` of whole tensors. LLVM may take its time elsewhere: fusion and rounding are not its affair."""
    amax_axes = (0,) if how.fmt.has_tensor_scale else ()

    def run(x, noise):
        blocks, noise = jax.tree.map(lambda a: split_blocks(a, how.fmt.block, axis), (x, noise))
        codes, scales, _ = encode(blocks, how, axis=axis, amax_axes=amax_axes, noise=noise)
        return merge_blocks(codes, axis), scales

    return jax.jit(run, compiler_options={"xla_backend_optimization_level": 0})


def around_zero(seed=16):
    """Zeros of both signs, subnormal numbers, and small ones whose product with an inverse scale is subnormal."""
    x = normal(seed)
    x[:, 1:, ::3] = np.copysign(0, x[:, 1:, ::3])
    x[:, 1, 1::3] *= np.float32(2.0**-126)
    x[:, 2, 1::3] *= np.exp2(np.arange(-128, -58, 5, dtype=np.float32))[:, None]
    x[:7, 3] = np.copysign(0, x[:7, 3])
    x[7:, 3] *= np.float32(2.0**-127)
    x[12:] *= np.float32(2.0**-100)
    return x


@pytest.mark.by_default("if4", "if3")
@each_format
def test_one_pass_gives_the_bytes_of_stages(fmt):
    """XLA:CPU compiles both here: equal bytes speak of equal arithmetic, in one order."""
    one_pass, rng = compiled(encode_in_one_pass, Encoding.of(fmt)), np.random.default_rng(15)
    edges = np.stack([make.edges(oracle.FORMATS[fmt.name], rng) for _ in range(14)])
    for x in (magnitudes(), edges, around_zero(), far_apart(fmt)[0], poisoned_input()[0], np.zeros(SHAPE, np.float32)):
        want, (codes, scales) = quantized(x, fmt), one_pass(x, None)
        assert_array_equal(scales, want.scales)
        assert_array_equal(codes, want.codes)


@pytest.mark.by_default("*-if4", "*-nvfp4")
@each_format
@pytest.mark.parametrize("way", ["parts", "places", "search", "noise"])
def test_values_are_those_of_the_codes(fmt, way):
    """Without packing: the numbers that a product takes are those that its packed operand would mean."""
    settings = {"search": {"search": "fast"}, "noise": {"rounding": "stochastic"}}.get(way, {})
    how, run = Encoding.of(fmt, **settings), by_places_only if way == "places" else codec.encode
    noise = np.random.default_rng(19).uniform(-0.5, 0.5, (len(fmt.candidates), *SHAPE)).astype(np.float32)
    noise = list(jnp.asarray(noise)) if way == "noise" else None
    blocks = functools.partial(split_blocks, block=fmt.block, axis=-1)
    for x in (magnitudes(), poisoned_input()[0], around_zero(), far_apart(fmt)[0]):
        settings = {"axis": -1, "noise": noise and [blocks(r) for r in noise]}
        values, none, amax = run(blocks(jnp.asarray(x)), how, in_multiples=True, **settings)
        codes, scales, own = run(blocks(jnp.asarray(x)), how, **settings)
        headers, at = header_words(scales, fmt.scale.nbytes, -1)[..., None], np.arange(fmt.block)
        assert none is None
        jax.tree.map(assert_array_equal, amax, own)
        assert_array_equal(values, codec.decode(codes, headers, fmt, place=at))


@pytest.mark.by_default("*-if4", "*-nvfp4")
@each_format
@pytest.mark.parametrize("settings", [{}, {"axis": -2}, {"loss": "mae", "block_2d": True}], ids=str)
def test_losses_by_places_and_by_parts_give_the_same_bytes(fmt, settings, monkeypatch):
    """Large arrays have several parts, small ones one; other platforms and searches go by places."""
    if fmt.scale.runs and settings.get("block_2d"):
        pytest.skip("its scales have parts, which squares cannot share")
    module, inputs = sys.modules["ifjax.codec.encode"], (magnitudes(), around_zero(), poisoned_input()[0])

    def leaves(x):
        return [np.atleast_1d(a).view(np.uint8) for a in jax.tree.leaves(quantize(x))]

    made = []
    for way in ({}, {"_SMALL": 0, "_suits_parts": lambda fmt, size: True}, {"_encode": by_places}):
        with monkeypatch.context() as patch:
            for name, value in way.items():
                patch.setattr(module, name, value)
            jax.clear_caches()
            quantize = jax.jit(lambda x: ifjax.quantize(x, fmt=fmt, **settings))
            made.append([leaves(x) for x in inputs])
    jax.clear_caches()
    for others in made[1:]:
        jax.tree.map(assert_array_equal, others, made[0])


@pytest.mark.by_default("fouroversix-mse-*")
@pytest.mark.parametrize(
    ("name", "loss", "axis", "dtype", "stochastic"),
    [
        ("if4_bs8", "mae", -2, jnp.bfloat16, False),
        ("if3_bs8", "abs_max", -1, jnp.float32, True),
        ("fouroversix", "mse", -2, jnp.float32, True),
        ("if4", "mse", -1, jnp.bfloat16, True),
        ("if6_e2m3", "mae", -2, jnp.float16, True),
        ("if6_e3m2", "abs_max", -2, jnp.bfloat16, False),
        ("fouroversix_bs8", "abs_max", -1, jnp.float32, False),
    ],
)
def test_one_pass_gives_the_bytes_of_stages_in_every_setting(name, loss, axis, dtype, stochastic):
    how = Encoding.of(name, loss=loss, rounding="stochastic_unbiased" if stochastic else "nearest")
    noise = np.random.default_rng(17).uniform(-0.5, 0.5, (2, *SHAPE)).astype(np.float32).swapaxes(-1, axis)
    noise = list(noise) if stochastic else None
    runs = [compiled(encode, how, axis) for encode in (encode_in_one_pass, codec.encode)]
    for x in (magnitudes(), poisoned_input()[0], around_zero()):
        (codes, scales), want = (run(jnp.asarray(x.swapaxes(-1, axis)).astype(dtype), noise) for run in runs)
        assert_array_equal(scales, want[1])
        assert_array_equal(codes, want[0])


@pytest.mark.by_default("if4-mse", "mxfp4-mse")
@pytest.mark.parametrize(
    ("name", "loss"),
    [("if4_bs8", "mse"), ("fouroversix_bs8", "mae")]
    + [("if4", loss) for loss in ("mse", "mae", "abs_max")]
    + [("fouroversix", loss) for loss in ("mse", "mae", "abs_max")]
    + [(name, "mse") for name in ("nvfp4", "if3", "if6_e3m2", "mxfp4")],
)
def test_square_blocks_of_the_transpose_are_the_transpose_byte_for_byte(name, loss):
    w = normal(13, (512, 512))  # square, so that both are one program
    q, turned = (ifjax.quantize(m, name, loss=loss, block_2d=True) for m in (w, w.T))
    for a, b in zip(jax.tree.leaves(q.T), jax.tree.leaves(turned), strict=True):
        assert_array_equal(np.atleast_1d(a).view(np.uint8), np.atleast_1d(b).view(np.uint8))


@pytest.mark.slow
def test_square_blocks_that_only_rounding_decides_choose_alike_from_both_sides():
    """Both candidates make the same errors in another order, so that any order of summation that differs shows."""
    near, far = Grid.sign_magnitude("1", (0, 1, 4, 8)), Grid.sign_magnitude("2", (0, 2, 4, 8))
    fmt = Format("mine", (Candidate(near), Candidate(far)), 8)
    rng = np.random.default_rng(14)
    t = rng.integers(-(2**18), 2**18, (1024, 31)) * 2.0**-20  # 1.5 + t is t away from halfway between 1 and 2
    squares = rng.permuted(np.concatenate([1.5 + t, 1.5 - t, np.zeros((1024, 1))], -1), axis=-1)
    squares = np.concatenate([np.full((1024, 1), 8), squares], -1).reshape(32, 32, 8, 8)
    w = squares.swapaxes(1, 2).reshape(256, 256).astype(np.float32)
    amax = fmt.tensor_constant()  # so that every scale is 1
    for loss in ("mse", "mae"):
        q, turned = (ifjax.quantize(m, fmt, loss=loss, block_2d=True, amax=amax) for m in (w, w.T))
        assert_array_equal(q.T.scales, turned.scales)
        assert_array_equal(q.T.codes, turned.codes)
        # with mae all sums are exact, and the first candidate keeps every tie
        assert (q.choices().mean() > 0.05) if loss == "mse" else not q.choices().any()
