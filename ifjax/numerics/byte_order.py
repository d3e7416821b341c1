"""Conversion of arrays to the machine's byte order, the only one that JAX takes."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike


def native(x: Any) -> Any:
    """Return a numpy array in the machine's byte order, and anything else unchanged."""
    foreign = isinstance(x, np.ndarray) and not x.dtype.isnative
    return x.astype(x.dtype.newbyteorder("=")) if foreign else x


def native_leaves(tree: Any) -> Any:
    """Return the tree with its arrays in the machine's byte order; the same object if all of them are."""
    if all(native(leaf) is leaf for leaf in jax.tree.leaves(tree)):
        return tree
    return jax.tree.map(native, tree)


def as_array(x: Any, dtype: DTypeLike | None = None) -> jax.Array:
    """Return `jnp.asarray(x, dtype)`, for numpy arrays of either byte order. Callers' arrays enter through this."""
    return jnp.asarray(native(x), dtype)
