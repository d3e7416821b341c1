"""Splitting of parameter trees into trainable and frozen parts."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ifjax.arrays import QTensor
from ifjax.models.adapters import Adapted
from ifjax.models.leaves import is_leaf, is_parameter, value_of
from ifjax.models.sites import join_path


def partition(params: Any, where: Callable[[str, Any], bool] | None = None) -> tuple[Any, Any]:
    """Split parameters into (trainable, frozen): two trees of the same structure, None where the other has a leaf.

    jax.grad and optax cannot take packed bytes. None is not a pytree leaf, so jax.grad, optimizers and their states see
    only the leaves of `trainable`. `combine` joins the two trees.

    Args:
        params: a tree of arrays and QTensors: nested dictionaries, linen variables or an NNX state.
        where: called with the path and the array of each float parameter; returns whether it trains. Unless given, all
            float parameters train. Packed parameters and arrays that are not floats never train.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import ifjax
        >>> params = {"kernel": ifjax.quantize(jnp.eye(16), axis=-2), "bias": jnp.zeros(16)}
        >>> trainable, frozen = ifjax.partition(params)
        >>> trainable
        {'bias': Array([0., 0., ...], dtype=float32), 'kernel': None}
        >>> def loss(trainable):
        ...     params = ifjax.combine(trainable, frozen)
        ...     return (jnp.ones(16) @ params["kernel"] + params["bias"]).sum()
        >>> float(jax.grad(loss)(trainable)["bias"].sum())
        16.0
    """
    leaves, structure = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_leaf)

    def trains(keys, leaf):
        return can_train(leaf) and (where is None or bool(where(join_path(keys), value_of(leaf))))

    chosen = [trains(keys, leaf) for keys, leaf in leaves]
    parts = [[leaf if c == wanted else None for (_, leaf), c in zip(leaves, chosen, strict=True)]
             for wanted in (True, False)]  # fmt: skip
    return jax.tree.unflatten(structure, parts[0]), jax.tree.unflatten(structure, parts[1])


def can_train(leaf: Any) -> bool:
    """Return whether a leaf is a float parameter that is not packed."""
    value = value_of(leaf)
    fixed = isinstance(value, QTensor | Adapted) or not is_parameter(leaf)
    return not fixed and jnp.issubdtype(jnp.result_type(value), jnp.floating)


def combine(trainable: Any, frozen: Any) -> Any:
    """Join the two trees of `partition`.

    Raises:
        ValueError: a leaf is in both trees, or their structures differ.
    """

    def one(a, b):
        if a is not None and b is not None:
            raise ValueError("a leaf is in both trees: pass what ifjax.partition gave, trained or not")
        return b if a is None else a

    return jax.tree.map(one, trainable, frozen, is_leaf=lambda leaf: leaf is None or is_leaf(leaf))
