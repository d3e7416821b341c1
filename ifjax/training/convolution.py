"""Convolution with a quantized forward and backward pass, as a product of windows with the kernel."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike, DTypeLike

from ifjax.training.product import quantized_dot_general
from ifjax.training.recipes import Recipe


def quantized_conv(
    x: jax.Array,
    w: jax.Array,
    recipe: str | Recipe = "if4",
    key: jax.Array | None = None,
    *,
    amax: ArrayLike | None = None,
    window_strides: Sequence[int],
    padding: Any,
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: Any = None,
    feature_group_count: int = 1,
    batch_group_count: int = 1,
    precision: Any = None,
    preferred_element_type: DTypeLike | None = None,
) -> jax.Array:
    """Convolve activations x with kernel w as `jax.lax.conv_general_dilated` does, quantized by a recipe.

    x's windows are laid out as rows of [input features, window] and multiplied by the kernel as a matrix, by
    `quantized_dot_general`. Blocks, rotations and noise are those of that product. The rows take x's memory times the
    window size, divided by the strides.

    Args:
        x, w: activations and kernel in the layout of `dimension_numbers`.
        recipe, key, amax: as for `quantized_dot_general`.
        window_strides, padding, lhs_dilation, rhs_dilation, dimension_numbers, feature_group_count, precision,
            preferred_element_type: as in `jax.lax.conv_general_dilated`.

    Returns:
        The convolution, in the layout of `dimension_numbers`.

    Raises:
        ValueError: `batch_group_count` is not 1; or as in `quantized_dot_general`.

    Example:
        >>> import jax.numpy as jnp
        >>> from ifjax.training import quantized_conv
        >>> x, w = jnp.ones((2, 4, 8, 8)), jnp.ones((16, 4, 3, 3))
        >>> quantized_conv(x, w, "w4a4_qat", window_strides=(1, 1), padding="SAME").shape
        (2, 16, 8, 8)
    """
    if batch_group_count != 1:
        raise ValueError("a convolution with batch_group_count has no recipe: leave it out by a rule, Rule(path, None)")
    numbers = lax.conv_dimension_numbers(x.shape, w.shape, dimension_numbers)
    x = jnp.transpose(x, numbers.lhs_spec)  # [batch, features, *space]
    w = jnp.transpose(w, numbers.rhs_spec)  # [out, features of a group, *window]
    groups, (out, features, *window) = feature_group_count, w.shape
    windows = lax.conv_general_dilated_patches(
        x, tuple(window), tuple(window_strides), padding, lhs_dilation, rhs_dilation, precision=precision
    )  # [batch, features * window, *space], features outermost
    batch, _, *space = windows.shape
    rows = jnp.moveaxis(windows, 1, -1).reshape(math.prod([batch, *space]), groups, features * math.prod(window))
    columns = jnp.moveaxis(w.reshape(groups, out // groups, features * math.prod(window)), 1, 2)
    if groups == 1:
        y = quantized_dot_general(
            rows[:, 0], columns[0], (((1,), (0,)), ((), ())), recipe, key, amax=amax,
            precision=precision, preferred_element_type=preferred_element_type,
        )
    else:
        y = quantized_dot_general(
            jnp.moveaxis(rows, 1, 0), columns, (((2,), (1,)), ((0,), (0,))), recipe, key, amax=amax,
            precision=precision, preferred_element_type=preferred_element_type,
        )
        y = jnp.moveaxis(y, 0, 1)
    y = jnp.moveaxis(y.reshape(batch, *space, out), -1, 1)
    return jnp.transpose(y, [numbers.out_spec.index(i) for i in range(y.ndim)])
