"""Leaves of trees of parameters: arrays, QTensors, Flax's boxes, NNX variables."""

import math

import numpy as np

from ifjax.arrays import QTensor


def is_leaf(leaf):
    return hasattr(leaf, "unbox") or hasattr(leaf, "get_raw_value")


def is_parameter(leaf):
    """Not so of NNX variables of other kinds: statistics, caches, random states."""
    if not hasattr(leaf, "get_raw_value"):
        return True
    from ifjax.models.flax.nnx import is_parameter

    return is_parameter(leaf)


def value_of(leaf):
    if isinstance(leaf, QTensor):
        return leaf
    value = leaf.get_raw_value() if hasattr(leaf, "get_raw_value") else leaf.unbox() if hasattr(leaf, "unbox") else leaf
    return value if hasattr(value, "dtype") else np.asarray(value)


def rebuilt(leaf, new):
    if hasattr(leaf, "get_raw_value"):
        from ifjax.models.flax.nnx import PackedParam

        return PackedParam.like(leaf, new) if isinstance(new, QTensor) else leaf.replace(new)
    return leaf.replace_boxed(new) if hasattr(leaf, "unbox") and not isinstance(new, QTensor) else new


def nbytes_of(value):
    return value.nbytes if isinstance(value, QTensor) else math.prod(value.shape) * value.dtype.itemsize
