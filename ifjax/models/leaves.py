"""Leaves of parameter trees: arrays, QTensors, Flax boxes and NNX variables."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from ifjax.arrays import QTensor
from ifjax.models.adapters import Adapted
from ifjax.numerics.byte_order import native, native_leaves


def is_leaf(leaf):
    """Return whether a tree node counts as a leaf: a Flax box, an NNX variable, a QTensor or an Adapted weight."""
    return hasattr(leaf, "unbox") or hasattr(leaf, "get_raw_value") or isinstance(leaf, Adapted)


def is_parameter(leaf):
    """Return whether a leaf is a parameter: any leaf except NNX variables such as statistics, caches, random states."""
    if not hasattr(leaf, "get_raw_value"):
        return True
    from ifjax.models.flax.nnx import is_parameter

    return is_parameter(leaf)


def value_of(leaf):
    """Return the value in a leaf as an array in native byte order, a QTensor or an Adapted weight."""
    value = raw_value(leaf)
    return native(value if hasattr(value, "dtype") else np.asarray(value))


def raw_value(leaf: Any) -> Any:
    """Return the value in a box or variable (an array, a QTensor or a key); return other leaves unchanged."""
    if isinstance(leaf, QTensor | Adapted):
        return leaf
    return leaf.get_raw_value() if hasattr(leaf, "get_raw_value") else leaf.unbox() if hasattr(leaf, "unbox") else leaf


def split_collection(params: Any) -> tuple[Any, Callable[[Any], Any]]:
    """Return the parameter tree ("params" of linen variables), and a function that puts another tree in its place."""
    params = native_leaves(params)
    if isinstance(params, Mapping) and isinstance(params.get("params"), Mapping):
        def put_back(tree):
            kind: Any = type(params)  # dict, FrozenDict
            return kind({**params, "params": tree})

        return params["params"], put_back
    return params, lambda tree: tree


def rebuilt(leaf, new):
    """Return a leaf like this one with a new value.

    An array takes the place of the value in its box or variable. A QTensor goes into a PackedParam for an NNX variable,
    and replaces a linen box.
    """
    if hasattr(leaf, "get_raw_value"):
        from ifjax.models.flax.nnx import PackedParam

        return PackedParam.like(leaf, new) if isinstance(new, QTensor) else leaf.replace(new)
    return leaf.replace_boxed(new) if hasattr(leaf, "unbox") and not isinstance(new, QTensor) else new


def with_value(leaf: Any, array: Any) -> Any:
    """Return the leaf with another value, an array or a packed one; a box or variable around it is kept."""
    if hasattr(leaf, "get_raw_value"):
        return type(leaf).from_metadata(array, leaf.get_metadata())
    return leaf.replace_boxed(array) if hasattr(leaf, "unbox") and not isinstance(leaf, QTensor) else array


def abstract(value: Any) -> jax.ShapeDtypeStruct:
    """Return the shape and dtype of an array, or of the dequantized array of a QTensor."""
    return jax.ShapeDtypeStruct(tuple(value.shape), value.dtype)


def nbytes_of(value):
    """Return the number of bytes of an array, a QTensor or an Adapted weight."""
    if isinstance(value, Adapted):
        return sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(value))
    return value.nbytes if isinstance(value, QTensor) else math.prod(value.shape) * value.dtype.itemsize
