"""Random Hadamard transform: a rotation of short runs of an axis that spreads outliers before quantization.

The matrix is M = diag(signs) H, H the Sylvester-Hadamard matrix over sqrt(size). M M^T = I, so rotating both
operands of a product along the contraction axis leaves the product unchanged: nothing is un-rotated after it.
Source: NVFP4 pretraining (arXiv 2509.25149), which rotates both operands of the weight gradient with size 16;
IF4 (arXiv 2603.28765) does the same with the sixteen signs below.
"""

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.typing import ArrayLike

SIZES = (16, 32, 64, 128)

# Of the IF4 reference code, and the same as Transformer Engine's.
FIXED_SIGNS = (1, 1, 1, -1, 1, -1, -1, -1, -1, -1, -1, 1, -1, 1, -1, -1)


def hadamard(
    x: ArrayLike, *, axis: int = -1, size: int = 16, signs: Literal["fixed"] | ArrayLike | None = "fixed"
) -> jax.Array:
    """x with each run of `size` along `axis` replaced by run @ (diag(signs) H): signs first, then Hadamard.

    Linear and orthonormal; shape and dtype stay. Sums are taken in float32 (float64 for float64) and rounded
    once to x's dtype: a bfloat16 result has the bits of the IF4 reference. The `size` terms are summed, then
    divided by sqrt(size): the sum of a run's magnitudes has to be finite.

    Args:
        x: floats, [..., n, ...], n a multiple of `size`.
        axis: the axis of n; for both operands of a product, the one that is contracted.
        size: 16, 32, 64 or 128. The papers' is 16; H128 mixes eight runs of 16.
        signs: "fixed", the papers' sixteen signs, repeated for larger sizes (for which they state none); None
            for no signs; or an array [size] of +-1, such as `random_signs` draws (unchecked where traced).

    Raises:
        TypeError: x is not floating-point.
        ValueError: no such axis or size; a length that `size` does not divide; signs not [size] or not +-1.

    Example:
        An outlier spreads over its run, and a product of rotated operands is the product of the operands.

        >>> import jax.numpy as jnp
        >>> from ifjax.numerics.hadamard import hadamard, inverse_hadamard
        >>> x = jnp.zeros((1, 16)).at[0, 3].set(8.0)
        >>> print(hadamard(x)[0, :8])
        [-2.  2.  2. -2. -2.  2.  2. -2.]
        >>> w = jnp.arange(16.0)[:, None]
        >>> print(x @ w, hadamard(x) @ hadamard(w, axis=0))
        [[24.]] [[24.]]
        >>> print(inverse_hadamard(hadamard(x))[0, :4])
        [0. 0. 0. 8.]
    """
    return _rotate(x, axis, size, signs, inverse=False)


def inverse_hadamard(
    x: ArrayLike, *, axis: int = -1, size: int = 16, signs: Literal["fixed"] | ArrayLike | None = "fixed"
) -> jax.Array:
    """x with each run of `size` along `axis` replaced by run @ (H diag(signs)), the transpose of `hadamard`.

    Undoes `hadamard` of the same settings up to rounding. Arguments and errors are those of `hadamard`.
    """
    return _rotate(x, axis, size, signs, inverse=True)


def random_signs(key: jax.Array, size: int = 16) -> jax.Array:
    """int8 [size], +1 or -1 with even odds, for `hadamard`; both operands of a product need the same.

    Example:
        >>> import jax
        >>> from ifjax.numerics.hadamard import hadamard, random_signs
        >>> signs = random_signs(jax.random.key(0), 32)
        >>> hadamard(jax.numpy.ones((2, 64)), size=32, signs=signs).shape
        (2, 64)

    Raises:
        ValueError: `size` is not a size of `hadamard`.
    """
    _check_size(size)
    return jax.random.rademacher(key, (size,), jnp.int8)


def _rotate(x, axis, size, signs, *, inverse):
    x = jnp.asarray(x)
    _check_size(size)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"x must be floating-point, got {x.dtype}: write x.astype(jnp.float32)")
    if not -x.ndim <= axis < x.ndim:
        raise ValueError(f"axis must name one of the {x.ndim} axes of x, got axis={axis} for shape {x.shape}")
    axis %= x.ndim
    runs, rest = divmod(x.shape[axis], size)
    if rest:
        raise ValueError(
            f"axis {axis} must be a multiple of size={size} long, got {x.shape[axis]} in shape {x.shape}: "
            f"append {size - rest} zeros with jnp.pad (to both operands of a product), or choose another size"
        )
    wide = jnp.float64 if x.dtype == jnp.float64 else jnp.float32
    matrix = _signs(signs, size).astype(wide)[:, None] * _sylvester(size).astype(wide)
    # The axis is split, never merged with another, so an array sharded along any axis stays where it is.
    split = x.reshape(*x.shape[:axis], runs, size, *x.shape[axis + 1 :]).astype(wide)
    # HIGHEST: else a GPU rounds the operands to tf32, a TPU to bfloat16. XLA:CPU (jax 0.10) adds the terms
    # left to right, as the reference's CUDA kernel does. 1/sqrt(size) comes last: exact for sizes 16 and 64.
    sums = lax.dot_general(
        split,
        matrix,
        (((axis + 1,), (1 if inverse else 0,)), ((), ())),
        precision=lax.Precision.HIGHEST,
        preferred_element_type=wide,
    )
    return (jnp.moveaxis(sums, -1, axis + 1) * np.asarray(size**-0.5, wide)).reshape(x.shape).astype(x.dtype)


def _check_size(size):
    if size not in SIZES:
        raise ValueError(f"size must be one of {SIZES}, got {size}")


def _signs(signs, size):
    if signs is None:
        return np.ones(size, np.int8)
    if isinstance(signs, str):
        if signs != "fixed":
            raise ValueError(f"signs must be 'fixed', None or an array of {size} values +-1, got {signs!r}")
        return np.tile(np.asarray(FIXED_SIGNS, np.int8), size // 16)
    if np.shape(signs) != (size,):
        raise ValueError(
            f"signs must have shape ({size},), one for each position of a run, got {np.shape(signs)}: "
            f"draw them with random_signs(key, {size})"
        )
    if isinstance(signs, Tracer):
        return signs
    signs = np.asarray(signs)
    if not np.all(np.abs(signs) == 1):
        raise ValueError(f"signs must be +1 or -1, got {signs}")
    return signs


def _sylvester(size):
    """H_2n = [[H_n, H_n], [H_n, -H_n]]: entry (i, j) is -1 where i and j share an odd number of one bits."""
    i = np.arange(size)
    return 1 - 2 * (np.bitwise_count(i[:, None] & i) & 1).astype(np.int8)
