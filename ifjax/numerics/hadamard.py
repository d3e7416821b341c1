"""Random Hadamard transform: a rotation of short runs of an axis that spreads outliers before quantization.

The matrix is M = diag(signs) H, with H the Sylvester-Hadamard matrix divided by sqrt(size). M M^T = I, so rotating both
operands of a product along the contraction axis leaves the product unchanged, and no inverse rotation is needed.
Source: NVFP4 pretraining (arXiv 2509.25149), which rotates both operands of the weight gradient with size 16;
IF4 (arXiv 2603.28765) does the same with the sixteen signs below.
"""

from typing import Any, Literal

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.interpreters import ad, batching, mlir
from jax.typing import ArrayLike

from ifjax.numerics.byte_order import as_array
from ifjax.numerics.orders import factors
from ifjax.numerics.xla import materialize

SIZES = (16, 32, 64, 128)  # those of training recipes

# The signs of the IF4 reference code, which are those of Transformer Engine.
FIXED_SIGNS = (1, 1, 1, -1, 1, -1, -1, -1, -1, -1, -1, 1, -1, 1, -1, -1)


def hadamard(
    x: ArrayLike, *, axis: int = -1, size: int = 16, signs: Literal["fixed"] | ArrayLike | None = "fixed"
) -> jax.Array:
    """Rotate each run of `size` values along `axis`: replace it by run @ (diag(signs) H).

    The transform is linear and orthonormal, and keeps shape and dtype. Sums are computed in float32 (float64 for
    float64) and rounded once to x's dtype; a bfloat16 result has the bits of the IF4 reference. The `size` terms are
    summed and then divided by sqrt(size), so the sum of a run's magnitudes must be finite.

    Args:
        x: floats [..., n, ...], n a multiple of `size`.
        axis: the axis of n; for operands of a product, the contraction axis.
        size: a power of two, or one times 12, 20, 28 and other orders (`ifjax.numerics.orders`), so that the whole axis
            can be a run: 384 = 12 x 32. The papers use 16; 128 mixes eight runs of 16.
        signs: "fixed" for the papers' sixteen signs, repeated for larger sizes (for which the papers state none); None
            for no signs; or an array [size] of +-1, such as from `random_signs` (not checked if traced).

    Returns:
        The rotated array, in x's shape and dtype.

    Raises:
        TypeError: x is not floating-point.
        ValueError: the axis or size is invalid, `size` does not divide n, or signs are not [size] or not +-1.

    Example:
        An outlier spreads over its run, and the product of rotated operands equals that of the operands.

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
    """Invert `hadamard`: replace each run of `size` values along `axis` by run @ (H diag(signs)).

    Inverts `hadamard` with the same settings up to rounding. Arguments, result and errors are those of `hadamard`.
    """
    return _rotate(x, axis, size, signs, inverse=True)


def random_signs(key: jax.Array, size: int = 16) -> jax.Array:
    """Return random signs for `hadamard`, int8 [size]: +1 or -1 with equal probability.

    Both operands of a product need the same signs.

    Example:
        >>> import jax
        >>> from ifjax.numerics.hadamard import hadamard, random_signs
        >>> signs = random_signs(jax.random.key(0), 32)
        >>> hadamard(jax.numpy.ones((2, 64)), size=32, signs=signs).shape
        (2, 64)

    Raises:
        ValueError: `size` is not a size of `hadamard`.
    """
    factors(size)
    return jax.random.rademacher(key, (size,), jnp.int8)


def _rotate(x, axis, size, signs, *, inverse):
    x = as_array(x)
    factors(size)  # raises for other sizes
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
    signs = signs_of(signs, size)
    wide = jnp.float64 if x.dtype == jnp.float64 else jnp.float32
    # The axis is split and never merged with another, so arrays keep their sharding.
    split = x.reshape(*x.shape[:axis], runs, size, *x.shape[axis + 1 :]).astype(wide)
    if isinstance(signs, Tracer) or size > max(SIZES):  # tables of long runs would be large
        by_place = jnp.asarray(signs, wide).reshape(*[1] * (axis + 1), size, *[1] * (x.ndim - axis - 1))
        before, after = (None, by_place) if inverse else (by_place, None)
        split = split if before is None else split * before
        sums = _sums.bind(split, axis=axis + 1, signs=(1,) * size, inverse=inverse)
        sums = sums if after is None else sums * after
    else:
        sums = _sums.bind(split, axis=axis + 1, signs=tuple(int(sign) for sign in signs), inverse=inverse)
    # The factor 1/sqrt(size) is applied last; it is exact for sizes 16 and 64.
    return (sums * np.asarray(size**-0.5, wide)).reshape(x.shape).astype(x.dtype)


# The unscaled product of x [..., size, ...] with diag(signs) H, or with H diag(signs) if `inverse`. It is a primitive
# so that its transpose is the inverse transform; JAX's automatic transpose would sum in another order.
_sums = jax.extend.core.Primitive("hadamard")
_sums.def_abstract_eval(lambda x, **_: x)


def _add_up(x, *, axis, signs, inverse):
    """Compute the sums in the order of the fast transform (neighbours first, then pairs, ...): same bits everywhere.

    Each result is a separate summation tree for each factor of the matrix. This needs more additions than the fast
    transform but less time on a CPU, because no data moves. Products with +-1 are exact, so contraction to FMA changes
    no bits.
    """
    matrices = factors(x.shape[axis])
    lengths = tuple(map(len, matrices))
    shape, rest = x.shape, x.ndim - axis - 1
    s = np.asarray(signs, np.int8).reshape(lengths)
    y = x.reshape(*shape[:axis], *lengths, *shape[axis + 1 :])
    for at in reversed(range(len(matrices))):
        # Coefficients are indexed [from, to], with `to` among the axes of all factors. Signs apply to the input, or
        # with `inverse` to the output.
        places = [1] * len(lengths)
        places[at] = lengths[at]
        matrix = matrices[at].T if inverse else matrices[at]
        coefficients = matrix.reshape(lengths[at], *places)
        if at == len(matrices) - 1 and not inverse:
            coefficients = coefficients * np.moveaxis(s, at, 0)[..., None]
        if at == 0 and inverse:
            coefficients = coefficients * s[None]
        if at < len(matrices) - 1:
            y = materialize(lambda y: y, y)
        coefficients = coefficients.reshape(*coefficients.shape, *[1] * rest).astype(x.dtype)
        parts = [lax.slice_in_dim(y, i, i + 1, axis=axis + at) * c.reshape((1,) * axis + c.shape)
                 for i, c in enumerate(coefficients)]  # fmt: skip
        while len(parts) > 1:
            parts = [*(a + b for a, b in zip(parts[::2], parts[1::2], strict=False)), *parts[len(parts) // 2 * 2 :]]
        y = parts[0]
    return y.reshape(shape)


def _batched(args, axes, *, axis, **params):
    (x,), (at,) = args, axes
    return _sums.bind(jnp.moveaxis(x, at, 0), axis=axis + 1, **params), 0


_sums.def_impl(jax.jit(_add_up, static_argnames=("axis", "signs", "inverse")))
mlir.register_lowering(_sums, mlir.lower_fun(_add_up, multiple_results=False))
batching.primitive_batchers[_sums] = _batched
ad.deflinear2(
    _sums, lambda cotangent, _, *, inverse, **params: [_sums.bind(cotangent, inverse=not inverse, **params)]
)


def signs_of(signs: Any, size: int) -> Any:
    """Return the signs that `hadamard` takes as an array [size] of numbers, or traced.

    Raises:
        ValueError: they are not [size] or not +-1.
    """
    if signs is None:
        return np.ones(size, np.int8)
    if isinstance(signs, str):
        if signs != "fixed":
            raise ValueError(f"signs must be 'fixed', None or an array of {size} values +-1, got {signs!r}")
        return np.resize(np.asarray(FIXED_SIGNS, np.int8), size)
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
