"""Registry of roundings, which map scaled numbers to grid values, and the hash that generates their noise."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ifjax.formats.floats import as_float
from ifjax.lookup import Registry


@dataclasses.dataclass(frozen=True)
class Rounding:
    """How elements are rounded.

    Attributes:
        name: name of the rounding.
        noise: maps (key, shape, count) to `count` float32 arrays in [-1/2, 1/2), one for each candidate. The noise is
            added to an element's position between two neighbours before it is rounded. None rounds to nearest.
        headroom: fraction of the range that is used. With 16/17 no value saturates even if the E4M3 scale was rounded
            down by 1/16.
        operand: only for roundings of rotated operands of products: maps (x, fmt, key=, axis=, size=, signs=, amax=,
            in_multiples=) to the QTensor of x, rotated and rounded, or to its `Multiples`. None for all others.
        packed: only with `operand`: maps fmt to the format and the headroom of that QTensor.
        check: only with `operand`: takes (fmt, size of the rotation) and raises ValueError if it is not supported.
        takes_seeds: whether the key may be given as its `seeds`.

    Raises:
        ValueError: one of `operand` and `packed` is given without the other.
    """

    name: str
    noise: Callable[[jax.Array, tuple[int, ...], int], list[jax.Array]] | None = None
    headroom: float = 1.0
    operand: Callable[..., Any] | None = None
    packed: Callable[[Any], tuple[Any, float]] | None = None
    check: Callable[[Any, int], Any] | None = None
    takes_seeds: bool = False

    def __post_init__(self):
        if (self.operand is None) != (self.packed is None):
            raise ValueError(f"{self.name}: operand and packed go together: give both, or none")

    @property
    def draws(self) -> bool:
        """Whether the rounding needs a random key."""
        return self.noise is not None or self.operand is not None

    @property
    def rotates(self) -> bool:
        """Whether the rounding is for rotated operands of products only, and not for `ifjax.quantize`."""
        return self.operand is not None


def uniform_noise(key: jax.Array, shape: tuple[int, ...], count: int) -> list[jax.Array]:
    """Return `count` independent float32 arrays, uniform on 2^16 points or more of (-1/2, 1/2), symmetric about 0.

    The key may be given as its `seeds`. An element's noise is a hash of the key and of the element's index in the array
    (in C order). It does not depend on how the array is sharded or in what order it is processed.
    """
    words = seeds(key)
    k0, k1 = (lax.index_in_dim(words, i, keepdims=False) for i in range(2))
    index = jnp.zeros(shape, jnp.int32)
    for axis, stride in enumerate(strides(shape)):
        index = index + lax.broadcasted_iota(jnp.int32, shape, axis) * stride
    return noise_of(index, k0, k1, count)


def seeds(key: jax.Array, part: Any = 0) -> jax.Array:
    """Return the two numbers of a key that `noise_of` takes, int32 [2].

    They are a hash of the key's words, a bijection of 64 bits: each half takes in the other's hash in turn. Drawing
    bits from the key would be a loop of its own in a program for CPUs. An array of int32 numbers >= 0 as `part` gives
    other seeds for each of them, int32 [..., 2]. Seeds as the key are returned unchanged.
    """
    if key.dtype == jnp.int32:
        return key
    words = lax.bitcast_convert_type(jax.random.key_data(key), jnp.int32)
    k0, k1 = part, cast(Any, 0)
    for i in range(0, len(words), 2):
        a, b = (lax.index_in_dim(words, i + half, keepdims=False) for half in range(2))
        k0 = k0 ^ a
        k1 = k1 ^ b ^ _hashed(k0)
        k0 = k0 ^ _hashed(k1)
    return jnp.stack([k0, k1], -1)


def _hashed(x):
    return _folded(_middle_rounds(_mixed(x + _int32(0x9E3779B9), 17, 0xED5AD4BB)), 14)


def strides(shape: tuple[int, ...]) -> list[np.int32]:
    """Return the distance between the indices of neighbouring elements along each axis, modulo 2^32."""
    return [_int32(math.prod(shape[axis + 1 :])) for axis in range(len(shape))]


def noise_of(index: jax.Array, k0: jax.Array, k1: jax.Array, count: int, low: Any = 0) -> list[jax.Array]:
    """Return the noise of elements with these int32 indices, by element-wise arithmetic that a kernel can call.

    `low` < 32, an int or an int32 array, is added to indices that end in zeros for its bits. Adjacent elements then
    share the first operations.
    """
    x = index ^ k0
    x = _folded(x, 17) & np.int32(-32) | index & np.int32(31)
    # The key's second word enters in the middle, so that the sequence of one key is never that of another, shifted.
    x = x * _int32(0xED5AD4BB) + k1
    noise = []
    for first in range(0, count, 2):
        start = first // 2 * 0x9E3779B9
        is_known = isinstance(low, int)
        start = _int32(low * 0xED5AD4BB + start) if is_known else low * _int32(0xED5AD4BB) + _int32(start)
        word = _middle_rounds(x + start)
        if first + 1 == count:
            numbers = [_shifted(word, 9) | np.int32(0x3F800001)]
        else:
            word = _folded(word, 14)
            # Place 16 bits of the word in the mantissa of a number in [1, 2) and add half a step, so that the mean is
            # exactly 0 after subtracting 1.5.
            halves = word << 7, _shifted(word, 9)
            numbers = [half & np.int32(0x7FFF80) | np.int32(0x3F800040) for half in halves]
        noise += [as_float(number) - np.float32(1.5) for number in numbers]
    return noise


# One round of a bijection of 32-bit words (Wellons, "triple32"), whose constants were found by a search for the least
# bias. Two rounds are not enough: noise at indices 2^13 apart is then correlated by a few thousandths.
def _mixed(x, shift, factor):
    return _folded(x, shift) * _int32(factor)


def _middle_rounds(x):
    return _mixed(_mixed(x, 11, 0xAC4C1B51), 15, 0x31848BAB)


def _folded(x, shift):
    return x ^ _shifted(x, shift)


def _int32(word):
    return np.uint32(word % 2**32).view(np.int32)


def _shifted(x, bits):
    return lax.shift_right_logical(x, np.int32(bits))


NEAREST = Rounding("nearest")
ROUNDINGS: Registry[Rounding] = Registry(
    "rounding", Rounding, "ifjax.codec.ROUNDINGS",
    (
        NEAREST, Rounding("stochastic", uniform_noise, takes_seeds=True),
        Rounding("stochastic_unbiased", uniform_noise, 16 / 17, takes_seeds=True),
    ),
)  # fmt: skip
