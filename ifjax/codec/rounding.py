"""Roundings: how a scaled number becomes a value of the grid, as records."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ifjax.lookup import Registry


@dataclasses.dataclass(frozen=True)
class Rounding:
    """How elements are rounded.

    Attributes:
        name: of the rounding.
        noise: (key, shape, count) to `count` float32 arrays in [-1/2, 1/2), one for each candidate, that are added to
            an element's position between two neighbours before it is rounded; None rounds to the nearest.
        headroom: factor on the range that is used. 16/17 leaves room for a scale that was rounded down by E4M3's 1/16,
            so that no value saturates.
        operand: for roundings that give values and no bytes, for operands of products alone: (x, fmt, key=, axis=,
            size=, signs=, amax=) to x rotated and rounded, in x's shape and dtype; None for those that pack.
        check: of such roundings: (fmt, size of the rotation), raises ValueError where it does not apply.
    """

    name: str
    noise: Callable[[jax.Array, tuple[int, ...], int], list[jax.Array]] | None = None
    headroom: float = 1.0
    operand: Callable[..., Any] | None = None
    check: Callable[[Any, int], Any] | None = None

    @property
    def draws(self) -> bool:
        """Whether it needs a key."""
        return self.noise is not None or self.operand is not None

    @property
    def packs(self) -> bool:
        """Whether it gives codes and headers, as `ifjax.quantize` needs."""
        return self.operand is None


def uniform_noise(key: jax.Array, shape: tuple[int, ...], count: int) -> list[jax.Array]:
    """`count` independent float32 arrays, uniform on 2^16 points of (-1/2, 1/2) around 0: two from each random word."""
    words = [jax.random.bits(k, shape, jnp.uint32) for k in jax.random.split(key, -(-count // 2))]
    halves = [half for word in words for half in (word & 0xFFFF, word >> 16)]
    return [(half.astype(jnp.float32) + 0.5) * 2.0**-16 - 0.5 for half in halves[:count]]


NEAREST = Rounding("nearest")
ROUNDINGS: Registry[Rounding] = Registry(
    "rounding", Rounding, "ifjax.codec.ROUNDINGS",
    (NEAREST, Rounding("stochastic", uniform_noise), Rounding("stochastic_unbiased", uniform_noise, 16 / 17)),
)  # fmt: skip
