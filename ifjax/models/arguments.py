"""Arguments and results of users' functions: arrays apart from flags, strings and other things that are not traced."""

from collections.abc import Mapping
from typing import Any

import jax

from ifjax.numerics.byte_order import native_leaves


def is_array(leaf: Any) -> bool:
    """Whether it has a shape and a dtype: an array, its shape, a box or variable of one."""
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype")


def split_arrays(arguments: Any) -> tuple[list[Any], tuple[Any, ...]]:
    """The arrays among the leaves, and the rest, hashable: flags and strings are not for tracing."""
    leaves, tree = jax.tree.flatten(arguments)
    arrays = [leaf for leaf in leaves if is_array(leaf)]
    return arrays, (tree, tuple(None if is_array(leaf) else (leaf,) for leaf in leaves))


def joined(arrays: list[Any], static: tuple[Any, ...]) -> Any:
    """What `split_arrays` took apart."""
    tree, others = static
    remaining = iter(arrays)
    return jax.tree.unflatten(tree, [next(remaining) if other is None else other[0] for other in others])


def as_arguments(sample: Any) -> tuple[tuple, dict[str, Any]]:
    """A tuple is positional arguments, a mapping keyword arguments, anything else the only argument."""
    sample = native_leaves(sample)
    if isinstance(sample, Mapping):
        return (), dict(sample)
    return (sample if isinstance(sample, tuple) else (sample,)), {}
