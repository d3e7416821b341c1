"""The numbers of others, made again: papers, notebooks, and an independent numpy program.

Normalized MSE (squared error over squared signal) of n = 2^22 values, the number of the independent program. Every
tolerance is the sampling error of the figure at hand, estimated from the sample (see `ratio`), times 4, and half a unit
of the last digit of the number as it was written down. The seed is fixed, so that a test that passes keeps passing.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ifjax
from ifjax import measure as analysis

N = 2**22
SIGMAS = 4


class Figure(NamedTuple):
    """A figure of a sample, and its standard deviation between samples."""

    value: float
    deviation: float


@functools.cache
def sample(distribution: str, n: int = N) -> jax.Array:
    return jnp.asarray(analysis.sample(distribution, n, seed=1)).reshape(-1, 2048)


@functools.partial(jax.jit, static_argnames=("fmt", "loss", "rounding", "block_2d", "search"))
def sums(x, key=None, **settings):
    """By row: squared signal, squared error, blocks with the second decoding, blocks without the largest code."""
    q = ifjax.quantize(x, key=key, **settings)
    error = q.dequantize() - x
    largest = jnp.max(jnp.abs((q.unpacked_codes() & 7).astype(jnp.int32)).reshape(x.shape[0], -1, q.fmt.block), -1)
    second = q.choices() if q.fmt.has_selector else jnp.zeros(largest.shape, bool)
    return tuple(jnp.sum(a.astype(jnp.float32), -1) for a in (jnp.square(x), jnp.square(error), second, largest < 7))


def ratio(above, below) -> Figure:
    """The sum of `above` over that of `below`, each with one entry for each of many independent rows."""
    above, below = np.asarray(above, np.float64), np.asarray(below, np.float64)
    value = above.sum() / below.sum()
    return Figure(value, np.std(above - value * below) / below.mean() / np.sqrt(below.size))


@functools.cache
def measured(distribution: str, fmt: str, **settings) -> tuple[Figure, Figure, Figure]:
    """Normalized MSE, share of second decodings and share of blocks that end below the largest code."""
    key = jax.random.key(0) if "rounding" in settings else None
    x = sample(distribution)
    signal, noise, second, below = sums(x, key, fmt=record(fmt), **settings)
    blocks = np.full(x.shape[0], x.shape[1] / record(fmt).block)
    return ratio(noise, signal), ratio(second, blocks), ratio(below, blocks)


def record(name: str) -> ifjax.Format:
    """Block 32, which has no name, by replacing a field."""
    if not name.endswith("_bs32"):
        return ifjax.get_format(name)
    return dataclasses.replace(ifjax.get_format(name.removesuffix("_bs32")), name=name, block=32)


def assert_close(figure: Figure, stated: float, digit: float, samples: int = 1):
    """`stated` was rounded to `digit` and comes from a sample of its own (samples=2) or from none to speak of (1)."""
    tolerance = SIGMAS * np.sqrt(samples) * figure.deviation + digit / 2
    assert abs(figure.value - stated) <= tolerance, f"{figure} is not {stated} +- {tolerance:.3g}"


# --- papers ----------------------------------------------------------------------------------------------------------


@pytest.mark.by_default("if4", "nvfp4")
@pytest.mark.parametrize("fmt", ["nvfp4", "nvint4", "if4"])
def test_gaussian_table_of_the_if4_paper(fmt):
    (published, _) = analysis.PUBLISHED["normal", fmt]
    assert published.source == "arXiv 2603.28765, Table 1"
    assert_close(measured("normal", fmt)[0], published.normalized_mse, digit=1e-4)


def test_gaussian_fouroversix_lies_between_two_published_values():
    # 7.5 in arXiv 2603.28765, 7.6 in arXiv 2601.22813's notebook; both are rounded to a digit.
    figure, _, _ = measured("normal", "fouroversix")
    assert 7.5e-3 <= figure.value <= 7.6e-3


def test_gaussian_mxfp4_rounds_scales_up():
    # 13.2 in arXiv 2603.28765 is what rounding them down gives (13.23); its code rounds them up.
    figure, _, _ = measured("normal", "mxfp4")
    assert 13.25e-3 < figure.value < 13.4e-3


@pytest.mark.by_default("nvfp4-*")
@pytest.mark.parametrize("fmt, published", [("nvfp4", 12.4e-3), ("fouroversix", 12.4e-3)])
def test_square_blocks_of_the_quartet_ii_notebook(fmt, published):
    assert_close(measured("normal", fmt, block_2d=True)[0], published, digit=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("fmt, stated", [("if4", 12.18e-3), ("nvint4", 15.89e-3)])
def test_square_blocks_of_other_formats(fmt, stated):
    assert_close(measured("normal", fmt, block_2d=True)[0], stated, digit=1e-5, samples=2)


def test_stochastic_rounding_of_the_quartet_ii_notebook():
    assert_close(measured("normal", "nvfp4", rounding="stochastic_unbiased")[0], 23.5e-3, digit=1e-4)


@pytest.mark.slow
def test_stochastic_rounding_that_clips():
    assert_close(measured("normal", "nvfp4", rounding="stochastic")[0], 18.84e-3, digit=1e-5, samples=2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fmt", "excess"),
    [("nvfp4", 0), ("nvint4", 0), ("if4", 5.5e-3), ("if3", 4.7e-3), ("fouroversix", 7.4e-3), ("if6", 1e-4)],
)
def test_unbiased_rounding_is_biased_by_choices_alone(fmt, excess):
    """By how much the mean of 400 roundings exceeds x; the stated figures of formats with choices are our own."""
    x = jax.random.normal(jax.random.key(0), (4096, 16))

    def add(total, key):
        return total + ifjax.fake_quantize(x, fmt, rounding="stochastic_unbiased", key=key), None

    total, _ = jax.lax.scan(add, jnp.zeros_like(x), jax.random.split(jax.random.key(1), 400))
    # Its own standard error is below 3e-5: sqrt(mean square error / roundings / values).
    assert float(jnp.sum(total / 400 * x) / jnp.sum(x * x)) - 1 == pytest.approx(excess, abs=2e-4)


def test_worked_example_of_four_over_six():
    # arXiv 2512.02010: 10, 20, 30, 40 without a tensor scale, that is with one of 1: amax = 6 * 448 or 6 * 256.
    x = jnp.array([10.0, 20, 30, 40])
    six = ifjax.quantize(x, "nvfp4", amax=2688.0)
    np.testing.assert_array_equal(six.scales.view(jnp.float8_e4m3fn).astype(jnp.float32), [6.5])
    np.testing.assert_array_equal(six.dequantize(), [9.75, 19.5, 26, 39])
    assert np.mean((six.dequantize() - x) ** 2) == pytest.approx(4.33, abs=0.005)
    four = ifjax.quantize(x, "fouroversix", amax=1536.0)
    np.testing.assert_array_equal(four.scales.view(jnp.float8_e4m3fn).astype(jnp.float32), [10])
    np.testing.assert_array_equal(four.dequantize(), x)


@pytest.mark.slow
def test_searched_scales_take_27_percent_off_nvfp4():
    # arXiv 2605.12464; the independent program got 9.05 -> 6.63.
    plain, searched = (measured("normal", "nvfp4", **settings)[0] for settings in ({}, {"search": "fast"}))
    assert searched.value <= 6.65e-3
    assert 1 - searched.value / plain.value == pytest.approx(0.27, abs=0.005)  # stated in whole percent


@pytest.mark.slow
def test_searched_scales_of_if4():
    figure, _, _ = measured("normal", "if4", search="fast")
    assert figure.value <= 5.50e-3
    assert_close(figure, 5.49e-3, digit=2e-5, samples=2)  # of fewer values than ours: an honest digit less


@pytest.mark.slow
@pytest.mark.parametrize("fmt", ["if4", "nvfp4"])
def test_the_fast_search_finds_what_the_exhaustive_one_finds(fmt):
    x = sample("normal")[:256]
    fast, exhaustive = (np.sum(sums(x, fmt=record(fmt), search=search)[1]) for search in ("fast", "exhaustive"))
    assert exhaustive <= fast <= 1.001 * exhaustive


# --- the independent program -----------------------------------------------------------------------------------------

INDEPENDENT = [
    (distribution, fmt, number)
    for (distribution, fmt), numbers in analysis.PUBLISHED.items()
    for number in numbers
    if number.source.startswith("independent")
]
# Their programs are like those of block 16: the fewer are compiled in a hurry the better.
SLOW = ("_bs8", "_bs32", "_e3m2")


@pytest.mark.by_default("t3-fouroversix", "laplace-if4", "t5-nvint4")
@pytest.mark.parametrize(
    "distribution, fmt, number",
    [
        pytest.param(*case, id=f"{case[0]}-{case[1]}", marks=[pytest.mark.slow] if case[1].endswith(SLOW) else [])
        for case in INDEPENDENT
    ],
)
def test_numbers_of_an_independent_program(distribution, fmt, number):
    mse, second, _ = measured(distribution, fmt)
    # Four significant digits, or three: the numbers below 1e-3 were written down with at least three.
    digit = 1e-5 if number.normalized_mse > 1e-3 else 1e-6
    assert_close(mse, number.normalized_mse, digit, samples=2)
    if number.choice_share is not None:
        assert_close(second, number.choice_share, digit=1e-3, samples=2)


@pytest.mark.by_default("if4-mae-*")
@pytest.mark.parametrize(
    "fmt, loss, mse, share",
    [
        ("if4", "mse", 6.158e-3, 0.632),
        ("if4", "mae", 6.418e-3, 0.493),
        ("if4", "abs_max", 6.779e-3, 0.876),
        ("fouroversix", "mse", 7.557e-3, 0.452),
        ("fouroversix", "mae", 7.792e-3, 0.337),
        ("fouroversix", "abs_max", 7.992e-3, 0.610),
    ],
)
def test_selection_rules(fmt, loss, mse, share):
    # The share of integers; for 4/6, which stores no choice, that of blocks that end at 4.
    settings = {} if loss == "mse" else {"loss": loss}  # the default, which is compiled already
    figure, integers, fours = measured("normal", fmt, **settings)
    assert_close(figure, mse, digit=1e-6, samples=2)
    if (fmt, loss) == ("fouroversix", "abs_max"):
        # Where the scale for 4 is 1.5 times that for 6 the block's maximum decodes alike, and if its error is the
        # largest, both tie: 3.1 % of blocks. Ties keep 6; in another order of roundings they fall either way.
        assert share - 0.031 < fours.value < share
    else:
        assert_close(integers if fmt == "if4" else fours, share, digit=1e-3, samples=2)


def test_the_shipped_table_is_what_was_measured_here():
    rows = list(analysis.synthetic_table(("mxfp4",), distributions=("normal", "uniform")))
    assert [(row.distribution, row.fmt) for row in rows] == [("normal", "mxfp4"), ("uniform", "mxfp4")]
    for row in rows:
        figure, _, _ = measured(row.distribution, "mxfp4")
        # A quarter of the values: twice the deviation; and the difference has that of both.
        assert abs(row.error.normalized_mse - figure.value) <= SIGMAS * np.sqrt(5) * figure.deviation
