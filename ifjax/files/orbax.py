"""Orbax checkpoints of trees with QTensors."""

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ifjax.arrays import QTensor
from ifjax.files.checkpoint import (
    MALFORMED,
    META,
    Packed,
    amax_fault,
    check_types,
    described,
    description,
    is_whole,
)
from ifjax.files.safetensors import FileError
from ifjax.models.leaves import value_of
from ifjax.models.sites import join_path
from ifjax.products import Prepacked


def save_orbax(params: Any, folder: str | os.PathLike) -> None:
    """Write a tree as an Orbax checkpoint, from one host or several, and wait until it is complete.

    Orbax can save QTensors without help, but restores them only into a tree that describes them. This function stores
    the result of `describe` as the checkpoint's custom metadata. With a CheckpointManager, pass it yourself. The
    function needs orbax-checkpoint.

    Raises:
        ValueError: the folder exists, or an amax is not possible (see `load_orbax`).
        TypeError: a leaf is Prepacked; save the result of its `unpack()`.

    Example:
        >>> import tempfile
        >>> import jax.numpy as jnp
        >>> import ifjax
        >>> from ifjax.files import load_orbax, save_orbax
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_orbax({"w": ifjax.quantize(jnp.ones((32, 64)), "mxfp4"), "b": jnp.zeros(3)}, f"{folder}/1")
        ...     load_orbax(f"{folder}/1")["w"]
        QTensor(mxfp4, 32x64 float32, axis=-1, 4.250 bits a value)
    """
    ocp = _orbax()
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(Path(folder).resolve(), _sound(params), custom_metadata={META: describe(params)})


def load_orbax(folder: str | os.PathLike, like: Any = None) -> Any:
    """Read a checkpoint written by `save_orbax`.

    Args:
        folder: the checkpoint's folder.
        like: a tree of arrays, QTensors or `jax.ShapeDtypeStruct` with the checkpoint's structure. Leaves with a
            sharding are placed by it, others on the first device. Without `like` all are placed on the first device.

    Returns:
        A tree of `like`'s structure; without `like` nested dictionaries and lists.

    Raises:
        ValueError: the checkpoint does not agree with `like`, or has no description of its QTensors; or an amax is NaN,
            infinite, negative, or 0 where values are not. What is spread over several hosts is not checked.
    """
    ocp = _orbax()
    folder = Path(folder).resolve()
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])

    def wanted(a):
        return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=getattr(a, "sharding", None) or device)

    with ocp.StandardCheckpointer() as checkpointer:
        metadata: Any = checkpointer.metadata(folder)
        stated = (metadata.custom_metadata or {}).get(META)
        if stated is None:
            raise ValueError(f"{folder} has no description of QTensors: save it by ifjax.checkpoint.save_orbax")
        if like is None:
            stored = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), metadata.item_metadata.tree)
            return _sound(rebuild(checkpointer.restore(folder, jax.tree.map(wanted, stored)), stated))

        # Orbax compares arrays only, so the bytes of one format would be accepted for another.
        def without_names(stated):
            packed = described(stated, str(folder))
            return {name: (dataclasses.replace(p.blocking, names=None), p.shape) for name, p in packed.items()}

        ours, theirs = without_names(describe(like)), without_names(stated)
        faults = [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)]
        if faults:
            raise ValueError(
                f"{folder} is not like the given tree: {', '.join(map(repr, faults[:10]))} differ in format, shape, "
                "axis or dtype, or are packed in one of them only"
            )
        if stated["layout"] == 1:  # layout 1 stored scales as 8-bit floats with the same bits
            like = _with_scales(like, lambda q: jax.ShapeDtypeStruct(
                q.scales.shape, q.fmt.scale.dtype, sharding=getattr(q.scales, "sharding", None)
            ))  # fmt: skip
        restored = checkpointer.restore(folder, jax.tree.map(wanted, like))
        return _sound(_with_scales(restored, lambda q: _bytes(q.scales)))


def _sound(tree):
    """Return the tree. Raises ValueError if a QTensor has an amax that no quantizer gives."""
    for keys, leaf in jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_whole)[0]:
        q = value_of(leaf)
        if not isinstance(q, QTensor) or q.amax is None:
            continue
        if all(isinstance(a, np.ndarray) or getattr(a, "is_fully_addressable", False) for a in jax.tree.leaves(q)):
            fault = amax_fault(np.asarray(q.amax), lambda q=q: q)
            if fault is not None:
                raise ValueError(f"{join_path(keys)!r} {fault}")
    return tree


def _with_scales(tree, scales_of):
    def replaced(leaf):
        return leaf.replaced(scales=scales_of(leaf)) if isinstance(leaf, QTensor) else leaf

    return jax.tree.map(replaced, tree, is_leaf=lambda leaf: isinstance(leaf, QTensor))


def _bytes(scales):
    return scales if scales.dtype == jnp.uint8 else lax.bitcast_convert_type(scales, jnp.uint8)


def describe(params: Any) -> dict[str, Any]:
    """Return the description of a tree's QTensors as JSON values, by '/'-joined names, for `rebuild`.

    Raises:
        TypeError: a leaf is Prepacked, or the dtypes of a QTensor's arrays were changed.
    """
    leaves, _ = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_whole)
    values = {join_path(keys): value_of(leaf) for keys, leaf in leaves}
    for name, value in values.items():
        if isinstance(value, Prepacked):
            raise TypeError(f"{name!r} is arranged for one kernel: save {name}.unpack(), in the plain layout")
        if isinstance(value, QTensor):
            check_types(name, value)
    # The round trip through JSON makes it equal to a description that was read from a file.
    packed = {name: Packed(q.blocking, q.shape) for name, q in values.items() if isinstance(q, QTensor)}
    return json.loads(json.dumps(description(packed)))


def rebuild(tree: Any, stated: Mapping[str, Any]) -> Any:
    """Return the tree with QTensors in place of dictionaries of their arrays, which Orbax restores without a target.

    Raises:
        ValueError: `stated` is not a description, or the tree lacks tensors that it describes.
    """
    try:
        packed = described(stated, "the description")
    except MALFORMED as error:
        raise error if isinstance(error, FileError) else ValueError(f"not a description: {error!r}") from None
    left = set(packed)

    def build(name, node):
        if name in packed:
            left.discard(name)
            return QTensor(node["codes"], _bytes(node["scales"]), node.get("amax"), packed[name].blocking)
        if isinstance(node, Mapping):
            return {key: build(f"{name}/{key}" if name else str(key), child) for key, child in node.items()}
        if isinstance(node, list | tuple):
            return [build(f"{name}/{i}" if name else str(i), child) for i, child in enumerate(node)]
        return node

    built = build("", tree)
    if left:
        raise ValueError(f"the tree lacks {', '.join(map(repr, sorted(left)[:10]))} of the description")
    return built


def _orbax() -> Any:
    try:
        import orbax.checkpoint
    except ImportError:
        raise ImportError("this needs orbax-checkpoint: pip install 'ifjax[flax]' brings it") from None
    return orbax.checkpoint
