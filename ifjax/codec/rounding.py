"""Roundings: how a scaled number becomes a value of the grid, as records."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ifjax.codec.blocks import as_float
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
    """`count` independent float32 arrays, uniform on 2^16 points of (-1/2, 1/2) around 0.

    An element's noise is a hash of the key and of the element's index in the array (in C order): whoever knows both
    makes the same bits, whatever devices share the array and in whatever order it is walked.
    """
    k0, k1 = seeds(key)
    index = jnp.zeros(shape, jnp.int32)
    for axis, stride in enumerate(strides(shape)):
        index = index + lax.broadcasted_iota(jnp.int32, shape, axis) * stride
    return noise_of(index, k0, k1, count)


def seeds(key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The two int32 numbers of a key that `noise_of` takes."""
    k0, k1 = lax.bitcast_convert_type(jax.random.bits(key, (2,), jnp.uint32), jnp.int32)
    return k0, k1


def strides(shape: tuple[int, ...]) -> list[np.int32]:
    """How far an element's index is from that of its neighbour along each axis, modulo 2^32."""
    return [_int32(math.prod(shape[axis + 1 :])) for axis in range(len(shape))]


def noise_of(index: jax.Array, k0: jax.Array, k1: jax.Array, count: int) -> list[jax.Array]:
    """The noise of elements with these int32 indices: element-wise integer arithmetic that a kernel can call."""
    x = _mixed(index ^ k0, 17, 0xED5AD4BB)
    noise = []
    for pair in range(-(-count // 2)):
        # The key's second word comes in the middle, so that no two keys' sequences are one another's, shifted.
        word = _mixed(x + (k1 if pair == 0 else k1 + _int32(pair * 0x9E3779B9)), 11, 0xAC4C1B51)
        word = _mixed(word, 15, 0x31848BAB)
        word = word ^ _shifted(word, 14)
        # 16 bits of the word below the leading one of a number in [1, 2), and half a step: the mean is exactly 0.
        for half in (word << 7, _shifted(word, 9)):
            noise.append(as_float(half & np.int32(0x7FFF80) | np.int32(0x3F800040)) - np.float32(1.5))
    return noise[:count]


# Rounds of a bijection of 32-bit words (Wellons, "triple32"), found by search for the least bias. Two rounds are not
# enough: indices 2^13 apart then have noise that is correlated by a few thousandths.
def _mixed(x, shift, factor):
    return (x ^ _shifted(x, shift)) * _int32(factor)


def _int32(word):
    return np.uint32(word % 2**32).view(np.int32)


def _shifted(x, bits):
    return lax.shift_right_logical(x, np.int32(bits))


NEAREST = Rounding("nearest")
ROUNDINGS: Registry[Rounding] = Registry(
    "rounding", Rounding, "ifjax.codec.ROUNDINGS",
    (NEAREST, Rounding("stochastic", uniform_noise), Rounding("stochastic_unbiased", uniform_noise, 16 / 17)),
)  # fmt: skip
