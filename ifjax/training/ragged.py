"""ragged_dot with a quantized forward and backward pass, for experts trained with a recipe."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.typing import ArrayLike, DTypeLike

from ifjax.arrays import QTensor
from ifjax.numerics.byte_order import as_array
from ifjax.products.dot_general import accumulator, as_varying
from ifjax.products.ragged import ragged_sharding
from ifjax.training.product import SAVED, Settings, checked_amax, drawn_by, largest, once, operand_of, three
from ifjax.training.recipes import Recipe, get_recipe

_WGRAD = lax.RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[])


def quantized_ragged_dot(
    x: jax.Array,
    w: jax.Array,
    group_sizes: jax.Array,
    recipe: str | Recipe = "if4",
    key: jax.Array | None = None,
    *,
    amax: ArrayLike | None = None,
    precision: Any = None,
    preferred_element_type: DTypeLike | None = None,
) -> jax.Array:
    """Multiply tokens x [m, k] by experts w [g, k, n] as `jax.lax.ragged_dot` does, quantized by a recipe.

    Each group is multiplied as by `quantized_dot_general`, with one amax for all groups. The weight gradient contracts
    tokens. Each group is padded with zeros to whole blocks and rotation runs, so that none of them spans tokens of two
    experts. The padding takes at most the least common multiple of block and run length in rows per expert.

    Args:
        group_sizes: integers [g], the number of rows of each group; rows beyond their sum give zeros.
        recipe, key, amax, precision, preferred_element_type: as for `quantized_dot_general`.

    Returns:
        An array [m, n].

    Raises:
        ValueError: as in `quantized_dot_general`.
        TypeError: the shapes do not fit, as in `jax.lax.ragged_dot`.

    Example:
        >>> import jax.numpy as jnp
        >>> from ifjax.training import quantized_ragged_dot
        >>> quantized_ragged_dot(jnp.ones((5, 32)), jnp.ones((2, 32, 8)), jnp.array([2, 3]), "w4a4_qat").shape
        (5, 8)
    """
    recipe = get_recipe(recipe)
    x, w, group_sizes, amax = as_array(x), as_array(w), as_array(group_sizes), checked_amax(amax)
    sharding = ragged_sharding(x, w)
    if sharding is not None:
        product = functools.partial(
            quantized_ragged_dot, recipe=recipe, precision=precision, preferred_element_type=preferred_element_type
        )
        placed: Any = jax.sharding.auto_axes(
            lambda x, w, sizes, key, amax: product(x, w, sizes, key=key, amax=amax), out_sharding=sharding
        )
        return placed(x, w, group_sizes, key, amax)
    dtype = jnp.promote_types(x.dtype, w.dtype)
    plain = functools.partial(lax.ragged_dot, precision=precision, preferred_element_type=preferred_element_type)
    if not recipe.is_quantized or 0 in (*x.shape, *w.shape):
        return plain(x.astype(dtype), w.astype(dtype), group_sizes)
    like = [jax.ShapeDtypeStruct(a.shape, dtype) for a in (x, w)]
    out: Any = jax.eval_shape(plain, *like, jax.ShapeDtypeStruct(group_sizes.shape, group_sizes.dtype))
    settings = Settings(recipe, precision, np.dtype(dtype), out.dtype, x.dtype, w.dtype)

    (m, _), g, align = x.shape, w.shape[0], _alignment(recipe)
    filled = -(-group_sizes // align) * align
    ends = jnp.cumsum(group_sizes)
    group = jnp.searchsorted(ends, jnp.arange(m), side="right")
    rows = -(-m // align) * align + g * align
    start = jnp.where(group < g, (jnp.cumsum(filled) - filled)[group] - (ends - group_sizes)[group], rows)
    place = jnp.where(group < g, start + jnp.arange(m), rows)  # out of range: `set` drops these rows
    x, w = as_varying(x, w), as_varying(w, x)
    spread = jnp.zeros((rows, x.shape[1]), x.dtype).at[place].set(x, mode="drop")
    y: Any = _product(spread, w, filled.astype(group_sizes.dtype), key, amax, settings)
    return checkpoint_name(y.at[place].get(mode="fill", fill_value=0), SAVED)


def _alignment(recipe: Recipe) -> int:
    """Return the number of rows to whose multiples groups are padded: whole blocks and runs of the weight gradient."""
    sizes = [recipe.wgrad.hadamard or 1]
    sizes += [operand.how.fmt.block for operand in recipe.wgrad.operands if operand.how is not None]
    return math.lcm(*sizes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _product(x, w, group_sizes, key, amax, settings: Settings):
    return _forward(x, w, group_sizes, key, amax, settings)[0]


def _forward(x, w, group_sizes, key, amax, settings):
    (of_x, of_w, _), drawn = three(amax), drawn_by(key, settings, "fprop")
    qx = operand_of(x, "fprop", "lhs", -1, drawn, settings, of_x)
    qw = operand_of(w, "fprop", "rhs", -2, drawn, settings, of_w)
    a, b = _dense(qx, settings.dtype), _dense(qw, settings.dtype)
    y = lax.ragged_dot(a, b, group_sizes, settings.precision, accumulator(settings.dtype))
    return y.astype(settings.out_dtype), (qx, qw)


def _product_fwd(x, w, group_sizes, key, amax, settings):
    y, (qx, qw) = _forward(x, w, group_sizes, key, amax, settings)
    recipe = settings.recipe
    nothing = [lax.slice_in_dim(a, 0, 0, axis=a.ndim - 1) for a in (x, w)]
    for_dgrad = qw if recipe.dgrad.rhs.reuse else w
    for_wgrad = qx if recipe.wgrad.lhs.reuse else x
    maxima = None if amax is None else (largest(x), largest(w))
    return y, (for_dgrad, for_wgrad, nothing, group_sizes, key, amax, maxima)


def _product_bwd(settings, residuals, g):
    for_dgrad, for_wgrad, nothing, group_sizes, key, amax, maxima = residuals
    of_x, of_w, of_g = three(amax)
    g, _ = once(g, nothing)
    drawn = drawn_by(key, settings, "dgrad", "wgrad")
    dtype, precision, total = settings.dtype, settings.precision, accumulator(settings.dtype)
    left = _dense(operand_of(g, "dgrad", "lhs", -1, drawn, settings, of_g), dtype)
    right = _dense(operand_of(for_dgrad, "dgrad", "rhs", -1, drawn, settings, of_w), dtype)
    dx = lax.ragged_dot(left, jnp.swapaxes(right, 1, 2), group_sizes, precision, total)
    left = _dense(operand_of(for_wgrad, "wgrad", "lhs", -2, drawn, settings, of_x), dtype)
    right = _dense(operand_of(g, "wgrad", "rhs", -2, drawn, settings, of_g), dtype)
    dw = lax.ragged_dot_general(left, right, group_sizes, _WGRAD, precision, total)
    no_sizes = np.zeros(group_sizes.shape, jax.dtypes.float0)
    maxima = None if maxima is None else jnp.stack([*maxima, largest(g)])
    return dx.astype(settings.x_dtype), dw.astype(settings.w_dtype), no_sizes, None, maxima


_product.defvjp(_product_fwd, _product_bwd)


def _dense(a: Any, dtype: Any) -> jax.Array:
    return a.dequantize(dtype) if isinstance(a, QTensor) else a.astype(dtype)
