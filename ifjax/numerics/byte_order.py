"""Arrays as they come, in the machine's byte order, the only one that JAX takes."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike


def native(x: Any) -> Any:
    """x in the machine's byte order; what is no numpy array as it is."""
    foreign = isinstance(x, np.ndarray) and not x.dtype.isnative
    return x.astype(x.dtype.newbyteorder("=")) if foreign else x


def native_leaves(tree: Any) -> Any:
    """The tree with its arrays in the machine's byte order; the tree itself if they are."""
    if all(native(leaf) is leaf for leaf in jax.tree.leaves(tree)):
        return tree
    return jax.tree.map(native, tree)


def as_array(x: Any, dtype: DTypeLike | None = None) -> jax.Array:
    """`jnp.asarray`, of numpy's arrays of either byte order. Every array that a caller gives comes in by it."""
    return jnp.asarray(native(x), dtype)
