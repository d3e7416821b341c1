"""MS-EDEN: unbiased quantization whose noise is in the block scales, not in the elements.

    rotate -> block scales, with room above them -> round to nearest -> correct the scales -> round them stochastically

Rounding elements to nearest shrinks a vector. EDEN's factor |y|^2 / <y, q> undoes the shrinkage along the vector, and
a random rotation makes the rest vanish in the mean; the factor is put into the block scales, and rounding those up or
down at random keeps their mean. Source: Quartet II (arXiv 2601.22813) for NVFP4; its IF4 form as in the published code
of IF4 (arXiv 2603.28765).
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike

from ifjax.codec import ROUNDINGS, Rounding
from ifjax.codec.blocks import as_float, bits_of, merge_blocks, split_blocks
from ifjax.codec.headers import power_near
from ifjax.codec.rounding import uniform_noise
from ifjax.formats import E4M3, Candidate, Format, get_format
from ifjax.numerics.byte_order import as_array
from ifjax.numerics.hadamard import SIZES, hadamard
from ifjax.numerics.xla import divide

# Where a block's maximum lands is raised by 17/16, for a scale that E4M3 rounded down, and lowered by the factor that
# Quartet II found to err least on normal data with E4M3 scales.
_PEAK_OVER = 17 / 16 * 0.93
# The tensor's largest block scale. Not E4M3's 448: the correction enlarges scales.
_LARGEST_SCALE = 255.99


def ms_eden(
    x: ArrayLike,
    fmt: str | Format = "nvfp4",
    *,
    key: jax.Array | None = None,
    axis: int = -1,
    size: int = 16,
    signs: Literal["fixed"] | ArrayLike | None = None,
    noise: ArrayLike | None = None,
    amax: ArrayLike | None = None,
) -> jax.Array:
    """`hadamard(x, axis=axis, size=size, signs=signs)` rounded to fmt by MS-EDEN: values, in x's shape and dtype.

    The result stays rotated: multiply it by another operand rotated alike. Over keys and random signs its mean is the
    rotated x up to 0.05% (measured); for one rotation, over keys alone, the error that rounding to nearest left
    across the vector remains.

    Args:
        x: floats [..., n, ...], n a multiple of `size`. The arithmetic is float32 from the rotation on.
        fmt: a format with E4M3 scales whose candidates share one scale: nvfp4, if4, nvint4 and the like.
        key: from which the scales' rounding is drawn.
        axis: the axis of rotation and blocks; the contracted one of a product.
        size: of the rotation, and of the vector that is corrected as one: 16 in the code of IF4, 128 in Quartet II.
        signs: as for `hadamard`. The published code of IF4 puts its sixteen after the Hadamard matrix instead of
            before it; there they change signs of the result and nothing else: None, and multiply.
        noise: instead of a key, uniform in [0, 1): one number for each block, [..., n / block, ...].
        amax: of the rotated x. Its largest finite magnitude, in float32, unless given and more than 0.

    Raises:
        TypeError: x is not a float array.
        ValueError: the format does not fit; neither or both of key and noise; an amax that is none; what `hadamard`
            raises.

    Example:
        >>> import jax
        >>> import ifjax
        >>> from ifjax.arrays.ms_eden import ms_eden
        >>> g = jax.random.normal(jax.random.key(0), (64, 256))
        >>> signs = ifjax.random_signs(jax.random.key(1), 128)
        >>> error = ms_eden(g, size=128, signs=signs, key=jax.random.key(2)) - ifjax.hadamard(g, size=128, signs=signs)
        >>> print(f"{(error**2).mean():.4f}")
        0.0097
    """
    fmt = check_format(fmt, size)
    x = as_array(x)
    if (key is None) == (noise is None):
        raise ValueError("ms_eden needs key=, for example key=jax.random.key(0), or noise=, and not both")
    is_narrow = jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize < 4
    z = hadamard(x.astype(jnp.float32) if is_narrow else x, axis=axis, size=size, signs=signs)
    axis = axis % x.ndim - x.ndim
    groups = split_blocks(z.astype(jnp.float32), fmt.block, axis)
    shape = tuple(n for i, n in enumerate(groups.shape) if i != groups.ndim + axis)
    if key is not None:
        noise = uniform_noise(key, shape, 1)[0] + np.float32(0.5)
    noise = as_array(noise, jnp.float32)
    if noise.shape != shape:
        raise ValueError(f"noise must have one number for each block, shape {shape}, got {noise.shape}")
    amax = None if amax is None else as_array(amax, jnp.float32)
    if amax is not None and not isinstance(amax, Tracer) and not bool(jnp.all((amax >= 0) & (amax < jnp.inf))):
        raise ValueError(f"amax must be finite and not negative, got {amax}")
    values = _rounded(groups, jnp.expand_dims(noise, axis), amax, fmt=fmt, axis=axis, size=size)
    return merge_blocks(values, axis).astype(x.dtype)


def check_format(fmt: str | Format, size: int) -> Format:
    """The record, if MS-EDEN applies to it with vectors of `size`.

    Raises:
        ValueError: it does not; the message says why.
    """
    fmt = get_format(fmt)
    if fmt.scale != E4M3 or not fmt.has_tensor_scale:
        raise ValueError(f"MS-EDEN corrects E4M3 scales, and {fmt.name} has {fmt.scale.name}: use nvfp4 or if4")
    if any(c.scale_multiplier != 1 or c.peak is not None or c.offset for c in fmt.candidates):
        raise ValueError(
            f"MS-EDEN gives a block one scale, and {fmt.name} chooses between two: use nvfp4, as the published "
            "recipes do for backward passes beside a fouroversix forward pass"
        )
    if size not in SIZES or size % fmt.block:
        raise ValueError(f"size must be one of {SIZES} and a multiple of {fmt.name}'s block {fmt.block}, got {size}")
    return fmt


@jax.jit(static_argnames=("fmt", "axis", "size"))
def _rounded(z, noise, amax, *, fmt, axis, size):
    """Groups z [..., m, B, ...] as what they round to; noise [..., m, 1, ...]."""
    peaks = jnp.max(jnp.abs(z), axis, keepdims=True, initial=0)
    own = jnp.max(jnp.where(jnp.isfinite(peaks), peaks, 0), initial=0)
    amax = own if amax is None else jnp.where(amax > 0, amax, own)  # 0 has seen no values
    power = power_near(amax)  # keeps `unit` from being subnormal
    amax = amax * power
    peak = np.float32(fmt.grid.max / _PEAK_OVER)
    unit = jnp.where(amax > 0, divide(divide(amax, np.float32(_LARGEST_SCALE)), peak), 1)
    byte = fmt.scale.encode(divide(divide(peaks * power, peak), unit))
    scale = jnp.where(byte == 0, 1, fmt.scale.decode(byte))
    y = divide(z * power, scale * unit)

    # Measured where y is, not in x's units. The first grid breaks ties away from zero, the second as its record says.
    first, *others = fmt.candidates
    q = dataclasses.replace(first.grid, ties="away").round(y)
    loss = _sum(_product(y - q, y - q), axis)
    for candidate in others:
        other = _on_grid(y, candidate, fmt)
        other_loss = _sum(_product(y - other, y - other), axis)
        q, loss = jnp.where(other_loss < loss, other, q), jnp.minimum(other_loss, loss)

    # One factor for each vector of the rotation, which holds size / B groups.
    def of_vectors(a):
        runs = split_blocks(jnp.squeeze(_sum(a, axis), axis), size // fmt.block, axis)
        return jnp.broadcast_to(_sum(runs, axis), runs.shape)

    above, below = of_vectors(_product(y, y)), of_vectors(_product(y, q))
    factor = jnp.where(below == 0, 1, divide(above, below))
    factor = jnp.expand_dims(merge_blocks(factor, axis), axis)
    values = q * _stochastic(scale * factor, noise, fmt.scale) * unit * (1 / power)
    return jnp.where(jnp.isfinite(peaks), values, jnp.nan)


def _on_grid(y, candidate: Candidate, fmt: Format):
    return candidate.grid.round(y * fmt.input_factor(candidate)) * np.float32(candidate.step)


def _stochastic(value, noise, scale):
    """value rounded to the scale above it or below it, above with a probability that keeps the mean."""
    nearest = scale.encode(value)
    lower = jnp.where(scale.decode(nearest) > value, nearest - 1, nearest)
    upper = jnp.minimum(lower + 1, scale.top)
    down, up = scale.decode(lower), scale.decode(upper)
    return jnp.where(noise < divide(value - down, up - down), up, down)


def _product(a, b):
    # Without the last bit no compiler can contract this product and the sum that follows to a fused multiply-add,
    # which some programs would do and others not.
    return as_float(bits_of(a * b) & ~1)


def _sum(a, axis):
    """The sum along an axis whose length is a power of two, in one fixed order; the axis stays."""
    while a.shape[axis] > 1:
        a, b = jnp.split(a, 2, axis)
        a = a + b
    return a


# As a record, for the operands of recipes.
MS_EDEN = ROUNDINGS.register(Rounding("ms_eden", operand=ms_eden, check=check_format))
