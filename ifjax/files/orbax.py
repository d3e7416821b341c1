"""Packed checkpoints in Orbax's folders."""

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ifjax.arrays import QTensor
from ifjax.files.checkpoint import MALFORMED, META, Packed, check_types, described, description, is_whole
from ifjax.files.safetensors import FileError
from ifjax.models.leaves import value_of
from ifjax.models.sites import join_path
from ifjax.products import Prepacked


def save_orbax(params: Any, folder: str | os.PathLike) -> None:
    """Write a tree as an Orbax checkpoint, which several hosts may share; wait until it is there.

    Orbax saves QTensors by itself, but restores them only into a tree that says what they are. This adds `describe`, as
    the checkpoint's custom metadata; for a CheckpointManager pass these yourself. Needs orbax-checkpoint.

    Raises:
        ValueError: the folder exists.
        TypeError: what is arranged for one kernel; save what its `unpack()` gives.

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
        checkpointer.save(Path(folder).resolve(), params, custom_metadata={META: describe(params)})


def load_orbax(folder: str | os.PathLike, like: Any = None) -> Any:
    """Read what `save_orbax` has written.

    Args:
        folder: of the checkpoint.
        like: a tree of arrays, QTensors or `jax.ShapeDtypeStruct` of the same structure; what has a sharding in it is
            put there, the rest on the first device. Without it nested dictionaries and lists come back.

    Raises:
        ValueError: the checkpoint is not like `like`, or has no description of its QTensors.
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
            return rebuild(checkpointer.restore(folder, jax.tree.map(wanted, stored)), stated)

        # Orbax looks at arrays alone: the bytes of one format would pass for those of another.
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
        if stated["layout"] == 1:  # scales were stored as floats of eight bits, whose bits they are
            like = _with_scales(like, lambda q: jax.ShapeDtypeStruct(
                q.scales.shape, q.fmt.scale.dtype, sharding=getattr(q.scales, "sharding", None)
            ))  # fmt: skip
        return _with_scales(checkpointer.restore(folder, jax.tree.map(wanted, like)), lambda q: _bytes(q.scales))


def _with_scales(tree, scales_of):
    def replaced(leaf):
        return leaf.replaced(scales=scales_of(leaf)) if isinstance(leaf, QTensor) else leaf

    return jax.tree.map(replaced, tree, is_leaf=lambda leaf: isinstance(leaf, QTensor))


def _bytes(scales):
    return scales if scales.dtype == jnp.uint8 else lax.bitcast_convert_type(scales, jnp.uint8)


def describe(params: Any) -> dict[str, Any]:
    """What makes QTensors of the arrays of a tree, as plain JSON values, by '/'-joined names. `rebuild` reads it."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_whole)
    values = {join_path(keys): value_of(leaf) for keys, leaf in leaves}
    for name, value in values.items():
        if isinstance(value, Prepacked):
            raise TypeError(f"{name!r} is arranged for one kernel: save {name}.unpack(), in the plain layout")
        if isinstance(value, QTensor):
            check_types(name, value)
    # Through JSON, so that it equals what was read from a file.
    packed = {name: Packed(q.blocking, q.shape) for name, q in values.items() if isinstance(q, QTensor)}
    return json.loads(json.dumps(description(packed)))


def rebuild(tree: Any, stated: Mapping[str, Any]) -> Any:
    """The tree with QTensors where it has dictionaries of their arrays, as Orbax restores them without a target.

    Raises:
        ValueError: the description is none, or is of another tree.
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
