"""Leaves of trees of parameters: arrays, QTensors, Flax's boxes, NNX variables."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from ifjax.arrays import QTensor
from ifjax.models.adapters import Adapted
from ifjax.numerics.byte_order import native, native_leaves


def is_leaf(leaf):
    return hasattr(leaf, "unbox") or hasattr(leaf, "get_raw_value") or isinstance(leaf, Adapted)


def is_parameter(leaf):
    """Not so of NNX variables of other kinds: statistics, caches, random states."""
    if not hasattr(leaf, "get_raw_value"):
        return True
    from ifjax.models.flax.nnx import is_parameter

    return is_parameter(leaf)


def value_of(leaf):
    value = raw_value(leaf)
    return native(value if hasattr(value, "dtype") else np.asarray(value))


def raw_value(leaf: Any) -> Any:
    """What is in a box or variable: an array, a QTensor, a key."""
    if isinstance(leaf, QTensor | Adapted):
        return leaf
    return leaf.get_raw_value() if hasattr(leaf, "get_raw_value") else leaf.unbox() if hasattr(leaf, "unbox") else leaf


def split_collection(params: Any) -> tuple[Any, Callable[[Any], Any]]:
    """The tree of parameters (of linen's variables the collection "params"), and what puts another in its place."""
    params = native_leaves(params)
    if isinstance(params, Mapping) and isinstance(params.get("params"), Mapping):
        def put_back(tree):
            kind: Any = type(params)  # dict, FrozenDict
            return kind({**params, "params": tree})

        return params["params"], put_back
    return params, lambda tree: tree


def rebuilt(leaf, new):
    if hasattr(leaf, "get_raw_value"):
        from ifjax.models.flax.nnx import PackedParam

        return PackedParam.like(leaf, new) if isinstance(new, QTensor) else leaf.replace(new)
    return leaf.replace_boxed(new) if hasattr(leaf, "unbox") and not isinstance(new, QTensor) else new


def with_value(leaf: Any, array: Any) -> Any:
    """The leaf with an array in place of its value, packed or not: boxes and variables around it stay."""
    if hasattr(leaf, "get_raw_value"):
        return type(leaf).from_metadata(array, leaf.get_metadata())
    return leaf.replace_boxed(array) if hasattr(leaf, "unbox") and not isinstance(leaf, QTensor) else array


def abstract(value: Any) -> jax.ShapeDtypeStruct:
    """The shape and dtype of an array, or of what a QTensor stands for."""
    return jax.ShapeDtypeStruct(tuple(value.shape), value.dtype)


def nbytes_of(value):
    if isinstance(value, Adapted):
        return sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(value))
    return value.nbytes if isinstance(value, QTensor) else math.prod(value.shape) * value.dtype.itemsize
