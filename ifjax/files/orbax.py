"""Packed checkpoints in Orbax's folders."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from ifjax.arrays.qtensor import QTensor
from ifjax.files.checkpoint import _MALFORMED, _META, _described, _description, _is_whole, _qtensor, _record_of
from ifjax.measure.errors import FileError
from ifjax.models.leaves import _value
from ifjax.models.sites import join_path
from ifjax.products.kernels import Prepacked


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
        >>> from ifjax.files.checkpoint import load_orbax, save_orbax
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_orbax({"w": ifjax.quantize(jnp.ones((32, 64)), "mxfp4"), "b": jnp.zeros(3)}, f"{folder}/1")
        ...     load_orbax(f"{folder}/1")["w"]
        QTensor(mxfp4, 32x64 float32, axis=-1, 4.250 bits a value)
    """
    ocp = _orbax()
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(Path(folder).resolve(), params, custom_metadata={_META: describe(params)})


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
        description = (metadata.custom_metadata or {}).get(_META)
        if description is None:
            raise ValueError(f"{folder} has no description of QTensors: save it by ifjax.checkpoint.save_orbax")
        if like is None:
            stored = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), metadata.item_metadata.tree)
            return rebuild(checkpointer.restore(folder, jax.tree.map(wanted, stored)), description)
        # Orbax looks at arrays alone: the bytes of one format would pass for those of another.
        ours, theirs = (
            {name: p._replace(names=None) for name, p in _described(d, str(folder)).items()}
            for d in (describe(like), description)
        )
        faults = [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)]
        if faults:
            raise ValueError(
                f"{folder} is not like the given tree: {', '.join(map(repr, faults[:10]))} differ in format, shape, "
                "axis or dtype, or are packed in one of them only"
            )
        return checkpointer.restore(folder, jax.tree.map(wanted, like))


def describe(params: Any) -> dict[str, Any]:
    """What makes QTensors of the arrays of a tree, as plain JSON values, by '/'-joined names. `rebuild` reads it."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(params, is_leaf=_is_whole)
    values = {join_path(keys): _value(leaf) for keys, leaf in leaves}
    for name, value in values.items():
        if isinstance(value, Prepacked):
            raise TypeError(f"{name!r} is arranged for one kernel: save {name}.unpack(), in the plain layout")
    # Through JSON, so that it equals what was read from a file.
    packed = {name: _record_of(value) for name, value in values.items() if isinstance(value, QTensor)}
    return json.loads(json.dumps(_description(packed)))


def rebuild(tree: Any, description: Mapping[str, Any]) -> Any:
    """The tree with QTensors where it has dictionaries of their arrays, as Orbax restores them without a target.

    Raises:
        ValueError: the description is none, or is of another tree.
    """
    try:
        packed = _described(description, "the description")
    except _MALFORMED as error:
        raise error if isinstance(error, FileError) else ValueError(f"not a description: {error!r}") from None
    left = set(packed)

    def build(name, node):
        if name in packed:
            left.discard(name)
            return _qtensor(packed[name], node["codes"], node["scales"], node.get("amax"))
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
