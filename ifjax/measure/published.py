"""Quantization errors of random samples, with published numbers for comparison."""

import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from ifjax.codec import Loss, Search
from ifjax.formats import Format, get_format
from ifjax.measure.errors import DEFAULT_FORMATS, ErrorStats, tensor_report

# All have variance 1. With power-of-two scales (MX) the absolute scale matters: mxfp4 has an error of 9.8e-3 on uniform
# numbers in [-1, 1], and 11.4e-3 on uniform numbers of variance 1.
DISTRIBUTIONS = {
    "normal": lambda rng, n: rng.standard_normal(n),
    "uniform": lambda rng, n: rng.uniform(-math.sqrt(3), math.sqrt(3), n),
    "laplace": lambda rng, n: rng.laplace(0, math.sqrt(1 / 2), n),
    "t5": lambda rng, n: rng.standard_t(5, n) * math.sqrt(3 / 5),
    "t3": lambda rng, n: rng.standard_t(3, n) * math.sqrt(1 / 3),
}


class Published(NamedTuple):
    """A published number: the normalized MSE, the share of INT blocks (None if not stated), and the source."""

    normalized_mse: float
    choice_share: float | None
    source: str


class SyntheticError(NamedTuple):
    """The error of a format on a random sample, with the published numbers."""

    distribution: str
    fmt: str
    error: ErrorStats
    published: tuple[Published, ...]


def sample(distribution: str, n: int, seed: int = 0) -> np.ndarray:
    """Draw a sample, float32 [n], from one of `DISTRIBUTIONS`, which have mean 0 and variance 1.

    Raises:
        ValueError: the distribution is unknown.
    """
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
    """Yield the error of each format on each distribution, with published numbers if there are any.

    A sample of n values is one tensor, so its maximum grows with n. With heavy tails (t3) the error grows too, and
    depends on the seed. Published numbers are attached only for the default loss without search.
    """
    formats = tuple(map(get_format, formats))
    for distribution in distributions:
        report = tensor_report(distribution, sample(distribution, n, seed), formats, loss=loss, search=search)
        for name, measured in report.errors.items():
            plain = loss in (None, "mse") and search is None
            yield SyntheticError(distribution, name, measured, PUBLISHED.get((distribution, name), ()) if plain else ())


def _published():
    paper = "arXiv 2603.28765, Table 1"
    # The paper rounds to one decimal. Its MXFP4 figure follows the OCP rule, which rounds scales down (13.23); with
    # scales rounded up, as in its code and here, the error is 13.32. For Four Over Six we get 7.56 for large n.
    for fmt, mse in {"mxfp4": 13.2, "nvfp4": 9.0, "fouroversix": 7.5, "nvint4": 7.4, "if4": 6.2}.items():
        yield "normal", fmt, Published(mse * 1e-3, None, paper)
    # Computed for this project from the papers alone, by numpy code that shares nothing with the library.
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


# Published numbers by (distribution, format), those of the papers first.
PUBLISHED: dict[tuple[str, str], tuple[Published, ...]] = {}


for _distribution, _fmt, _number in _published():
    PUBLISHED[_distribution, _fmt] = (*PUBLISHED.get((_distribution, _fmt), ()), _number)
