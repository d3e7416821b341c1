"""Arguments and results of user functions, split into arrays and values that are not traced, such as flags."""

from collections.abc import Mapping
from typing import Any

import jax

from ifjax.numerics.byte_order import native_leaves


def is_array(leaf: Any) -> bool:
    """Return whether a leaf has a shape and a dtype: an array, a ShapeDtypeStruct, or a box or variable of one."""
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype")


def split_arrays(arguments: Any) -> tuple[list[Any], tuple[Any, ...]]:
    """Split a pytree into its arrays and a hashable rest: the structure and leaves such as flags and strings."""
    leaves, tree = jax.tree.flatten(arguments)
    arrays = [leaf for leaf in leaves if is_array(leaf)]
    return arrays, (tree, tuple(None if is_array(leaf) else (leaf,) for leaf in leaves))


def joined(arrays: list[Any], static: tuple[Any, ...]) -> Any:
    """Join the two results of `split_arrays` to the original pytree."""
    tree, others = static
    remaining = iter(arrays)
    return jax.tree.unflatten(tree, [next(remaining) if other is None else other[0] for other in others])


def as_arguments(sample: Any) -> tuple[tuple, dict[str, Any]]:
    """Return (args, kwargs) of a sample: a tuple of positional arguments, a mapping of keywords, or the only one."""
    sample = native_leaves(sample)
    if isinstance(sample, Mapping):
        return (), dict(sample)
    return (sample if isinstance(sample, tuple) else (sample,)), {}
