"""The tensor-wide numbers of MS-EDEN, for its encoder by XLA and for the one that kernels call."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from ifjax.codec.headers import power_near
from ifjax.formats import Format
from ifjax.numerics.xla import divide

# A block's maximum maps to the grid's maximum divided by this. 17/16 is headroom for scales that E4M3 rounded down;
# Quartet II found that 0.93 gives the least error on normal data with E4M3 scales.
_PEAK_OVER = 17 / 16 * 0.93
# The largest block scale of the tensor. It is below E4M3's 448 because the correction enlarges scales.
EDEN_LARGEST_SCALE = np.float32(255.99)


def eden_peak(fmt: Format) -> np.float32:
    """Return the number to which a block's largest magnitude maps."""
    return np.float32(fmt.grid.max / _PEAK_OVER)


def eden_units(amax: jax.Array, fmt: Format) -> tuple[jax.Array, jax.Array]:
    """Return (power, unit): a value is grid value * block scale * unit / power.

    The power of two scales amax to [1, 2), so that `unit` is not subnormal.
    """
    power = power_near(amax)
    scaled = divide(divide(amax * power, EDEN_LARGEST_SCALE), eden_peak(fmt))
    return power, jnp.where(amax * power > 0, scaled, 1)


def eden_constant(fmt: Format) -> float:
    """Return K of packed values: the power of two from which on their amax is normal if that of the values is."""
    return 2.0 ** math.ceil(math.log2(EDEN_LARGEST_SCALE * fmt.grid.max / _PEAK_OVER))
