"""Errors of random samples, beside the published numbers."""

import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from ifjax.codec import Loss, Search
from ifjax.formats import Format, get_format
from ifjax.measure.errors import DEFAULT_FORMATS, ErrorStats, tensor_report

# All of variance 1. With power-of-two scales (MX) the absolute scale matters: uniform on [-1, 1] gives mxfp4 9.8e-3,
# with variance 1 11.4e-3.
DISTRIBUTIONS = {
    "normal": lambda rng, n: rng.standard_normal(n),
    "uniform": lambda rng, n: rng.uniform(-math.sqrt(3), math.sqrt(3), n),
    "laplace": lambda rng, n: rng.laplace(0, math.sqrt(1 / 2), n),
    "t5": lambda rng, n: rng.standard_t(5, n) * math.sqrt(3 / 5),
    "t3": lambda rng, n: rng.standard_t(3, n) * math.sqrt(1 / 3),
}


class Published(NamedTuple):
    """A number from elsewhere: the normalized MSE, the share of INT blocks where stated, and where it stands."""

    normalized_mse: float
    choice_share: float | None
    source: str


class SyntheticError(NamedTuple):
    """The error of a format on a random sample, beside the numbers of others."""

    distribution: str
    fmt: str
    error: ErrorStats
    published: tuple[Published, ...]


def sample(distribution: str, n: int, seed: int = 0) -> np.ndarray:
    """float32 [n], independently drawn from one of `DISTRIBUTIONS`, with mean 0 and variance 1."""
    if distribution not in DISTRIBUTIONS:
        raise ValueError(f"distribution must be one of {', '.join(DISTRIBUTIONS)}, got {distribution!r}")
    return DISTRIBUTIONS[distribution](np.random.default_rng(seed), n).astype(np.float32)


def synthetic_table(
    formats: Iterable[str | Format] = DEFAULT_FORMATS,
    *,
    distributions: Iterable[str] = tuple(DISTRIBUTIONS),
    n: int = 2**20,
    seed: int = 0,
    loss: Loss | None = None,
    search: str | Search | None = None,
) -> Iterator[SyntheticError]:
    """The error of each format on each distribution, with the published numbers where there are any.

    A sample of n values is one tensor, so its maximum grows with n: with heavy tails (t3) so does the error, and
    another seed gives other numbers. Published numbers are attached for the default loss without search.
    """
    formats = tuple(map(get_format, formats))
    for distribution in distributions:
        report = tensor_report(distribution, sample(distribution, n, seed), formats, loss=loss, search=search)
        for name, measured in report.errors.items():
            plain = loss in (None, "mse") and search is None
            yield SyntheticError(distribution, name, measured, PUBLISHED.get((distribution, name), ()) if plain else ())


def _published():
    paper = "arXiv 2603.28765, Table 1"
    # Rounded to one decimal there. Its MXFP4 is that of the OCP rule, which rounds scales down (13.23); up, as in its
    # code and here, it is 13.32. Its 4/6 comes out as 7.56 for large n.
    for fmt, mse in {"mxfp4": 13.2, "nvfp4": 9.0, "fouroversix": 7.5, "nvint4": 7.4, "if4": 6.2}.items():
        yield "normal", fmt, Published(mse * 1e-3, None, paper)
    # Computed for this project from the papers alone, by numpy code that shares nothing with it.
    independent = "independent numpy implementation, n = 4.2e6"
    formats = ("nvfp4", "fouroversix", "nvint4", "if4")
    for distribution, block, *mses, share in (
        ("normal", 8, 7.31, 5.47, 5.44, 4.21, 0.621),
        ("normal", 16, 9.04, 7.56, 7.44, 6.15, 0.633),
        ("normal", 32, 10.33, 9.37, 9.52, 8.06, 0.594),
        ("uniform", 16, 10.33, 7.61, 4.38, 4.31, 0.934),
        ("laplace", 8, 6.40, 5.09, 6.95, 4.46, None),
        ("laplace", 16, 8.60, 7.60, 10.53, 7.01, 0.423),
        ("laplace", 32, 10.71, 10.18, 14.86, 9.77, None),
        ("t5", 16, 8.52, 7.51, 10.40, 6.80, 0.473),
        ("t3", 16, 8.10, 7.45, 12.86, 7.11, 0.382),
    ):
        for fmt, mse in zip(formats, mses, strict=True):
            name = fmt if block == 16 else f"{fmt}_bs{block}"
            yield distribution, name, Published(mse * 1e-3, share if fmt == "if4" else None, independent)
    for distribution, mse in {"normal": 13.32, "uniform": 11.42, "laplace": 17.54, "t5": 17.52, "t3": 22.70}.items():
        yield distribution, "mxfp4", Published(mse * 1e-3, None, independent)
    for distribution, fmt, mse, share in (
        ("normal", "nvfp3", 37.08, None),
        ("normal", "nvint3", 39.75, None),
        ("normal", "if3", 31.50, 0.470),
        ("normal", "nvfp3_bs8", 28.24, None),
        ("normal", "nvint3_bs8", 28.37, None),
        ("normal", "if3_bs8", 21.24, None),
        ("normal", "nvfp6_e2m3", 0.6665, None),
        ("normal", "nvint6", 0.4841, None),
        ("normal", "if6_e2m3", 0.4463, 0.771),
        ("normal", "nvfp6_e3m2", 2.174, None),
        ("normal", "if6_e3m2", 0.4826, 0.992),
        ("laplace", "nvfp3", 41.06, None),
        ("laplace", "nvint3", 53.08, None),
        ("laplace", "if3", 37.90, None),
        ("laplace", "nvfp6_e2m3", 0.693, None),
        ("laplace", "nvint6", 0.694, None),
        ("laplace", "if6_e2m3", 0.560, None),
        ("t5", "nvfp3", 41.04, None),
        ("t5", "nvint3", 53.85, None),
        ("t5", "if3", 37.82, None),
        ("t5", "nvfp6_e2m3", 0.691, None),
        ("t5", "nvint6", 0.680, None),
        ("t5", "if6_e2m3", 0.546, None),
    ):
        yield distribution, fmt, Published(mse * 1e-3, share, independent)


# By (distribution, format): the numbers of others, the papers' own first.
PUBLISHED: dict[tuple[str, str], tuple[Published, ...]] = {}


for _distribution, _fmt, _number in _published():
    PUBLISHED[_distribution, _fmt] = (*PUBLISHED.get((_distribution, _fmt), ()), _number)
