"""Loading of checkpoints into trees of parameters, by stored names or by rules that rename them."""

import dataclasses
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ifjax.arrays import QTensor, shardings
from ifjax.files.checkpoint import Checkpoint, is_whole, open_file
from ifjax.files.names import NameRule, refuse
from ifjax.files.placed import Tensors, placed_tree
from ifjax.files.safetensors import FileError
from ifjax.models.leaves import rebuilt, value_of
from ifjax.models.sites import join_path


def load_file(
    path: str | os.PathLike, like: Any = None, *, names: Iterable[NameRule] | None = None, check: bool = True
) -> Any:
    """Read a checkpoint written by `save_file` or `ifjax quantize`, or any other safetensors file.

    Files are memory-mapped. Tensors are read one after the other, directly to their devices. To read single tensors,
    use `open_file`.

    With `names` the checkpoint may have another model's names: its tensors are renamed, transposed and stacked to fit
    the tree. If the tree has a QTensor (for an abstract one, use `jax.eval_shape` of `ifjax.quantize_params`) and the
    checkpoint has floats, they are quantized while they are read, to the bytes of `ifjax.quantize`. Only one matrix, or
    a device's part of it, is in memory in floats at a time. Each process reads only the parts of its own devices.

    Args:
        path: the path of a file, an index file, the single file that an index file replaces, or a folder that contains
            one checkpoint.
        like: a tree of arrays, QTensors or `jax.ShapeDtypeStruct`, such as `jax.eval_shape` returns, with the structure
            of the result. Names, shapes, dtypes and formats must agree, except that a packed tensor may replace an
            array of its shape and dtype. Leaves with a sharding are placed by it: each device reads its own part.
        names: rules for the checkpoint's names; the first rule that matches a name applies. Each tensor needs a rule,
            and each parameter a tensor. Floats are cast to the tree's dtype.
        check: whether to compare checksums, not only sizes. Arrays with a checksum are then read completely.

    Returns:
        A tree of `like`'s structure, or without `like` nested dictionaries, with names split at '/'. Leaves are
        QTensors and JAX arrays, or numpy arrays if JAX lacks the dtype (64 bits, unless `jax_enable_x64` is set).

    Raises:
        FileError: (a ValueError) a file is broken or has a newer layout.
        ValueError: the checkpoint does not agree with `like`; the message lists the differences.
        OSError: a file cannot be read.

    Example:
        >>> import tempfile
        >>> import jax, jax.numpy as jnp
        >>> import ifjax
        >>> params = {"w": jnp.ones((4, 32)), "b": jnp.zeros(32)}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     packed, _ = ifjax.quantize_params(params, ifjax.Rule("w", "if4", axis=-1))
        ...     path = ifjax.save_file(packed, f"{folder}/model.safetensors")
        ...     ifjax.load_file(path, like=jax.eval_shape(lambda: params))["w"]
        QTensor(if4, 4x32 float32, axis=-1, 4.750 bits a value)

        Load a checkpoint with PyTorch's names, and stack its two layers for `nn.scan`:

        >>> theirs = {f"layers.{i}.up.weight": jnp.ones((64, 32)) for i in range(2)}
        >>> abstract = jax.eval_shape(lambda: ifjax.quantize(jnp.ones((2, 32, 64)), "nvfp4", axis=1, amax_axes=(0,)))
        >>> rule = ifjax.NameRule(r"layers\\.(\\d+)\\.up\\.weight", "up/kernel", transpose=True, stack=(1,))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = ifjax.save_file(theirs, f"{folder}/model.safetensors")
        ...     ifjax.load_file(path, like={"up": {"kernel": abstract}}, names=[rule])
        {'up': {'kernel': QTensor(nvfp4, 2x32x64 float32, axis=-2, 4.516 bits a value)}}
    """
    if names is not None and like is None:
        raise ValueError("names= says where tensors belong in a tree: pass it as like=")
    file = open_file(path, check=check)
    if like is None:
        return _nested({name: _placed(file[name], None) for name in file})
    if names is not None:
        return load_tree(file, like, names)
    wanted, structure = _leaves(like)
    refuse(list(_differences(file, wanted)), f"{path} is not like the given tree")
    return jax.tree_util.tree_unflatten(structure, [_like(leaf, file[name]) for name, leaf in wanted.items()])


def load_tree(file: Tensors, like: Any, names: Iterable[NameRule]) -> Any:
    """Return a tree as `like` of an open checkpoint of other names; arguments and errors as for `load_file`."""
    wanted, structure = _leaves(like)
    found = placed_tree(file, wanted, names)
    return jax.tree_util.tree_unflatten(structure, [_in_place_of(leaf, found[name]) for name, leaf in wanted.items()])


def _leaves(like: Any) -> tuple[dict[str, Any], Any]:
    leaves, structure = jax.tree_util.tree_flatten_with_path(like, is_leaf=is_whole)
    return {join_path(keys): leaf for keys, leaf in leaves}, structure


def _nested(tensors: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, tensor in tensors.items():
        *parents, last = name.split("/")
        inner = tree
        for parent in parents:
            inner = inner.setdefault(parent, {})
            if not isinstance(inner, dict):
                raise FileError(f"{name!r} lies within another tensor of that name: read it with ifjax.open_file")
        if last in inner:
            raise FileError(f"{name!r} is a tensor and holds others: read it with ifjax.open_file")
        inner[last] = tensor
    return tree


def _differences(file: Checkpoint, wanted: Mapping[str, Any]) -> Iterator[str]:
    yield from (f"{name!r} is not in the file" for name in wanted if name not in file)
    yield from (f"{name!r} of the file is not in the tree" for name in file if name not in wanted)
    for name, leaf in wanted.items():
        if name in file and (fault := _difference(file.abstract(name), value_of(leaf))) is not None:
            yield f"{name!r} {fault}"


def _difference(found: Any, value: Any) -> str | None:
    if isinstance(value, QTensor):
        if not isinstance(found, QTensor):
            return f"is not packed: {found.dtype} {found.shape}; quantize it after loading"
        for field in ("fmt", "shape", "axis", "dtype", "headroom", "block_2d"):
            ours, theirs = getattr(found, field), getattr(value, field)
            if ours != theirs:
                ours, theirs = (getattr(x, "name", x) for x in (ours, theirs))
                return f"has {field} {ours}, and the tree has {theirs}"
        if found.amax is not None and (value.amax is None or found.amax.shape != value.amax.shape):
            return f"has amax of {found.amax.shape}, and the tree {value.amax}"
        return None
    if tuple(found.shape) != tuple(value.shape) or found.dtype != value.dtype:
        return f"is {found.dtype} {tuple(found.shape)}, and in the tree {value.dtype} {tuple(value.shape)}"
    return None


def _like(leaf: Any, tensor: Any) -> Any:
    value = value_of(leaf)
    place = getattr(value, "sharding", None)
    if isinstance(value, QTensor):
        place = jax.tree.map(lambda a: getattr(a, "sharding", None), value)
    elif isinstance(tensor, QTensor) and place is not None:
        place = shardings(tensor, place)
    return _in_place_of(leaf, _placed(tensor, place))


def _in_place_of(leaf: Any, tensor: Any) -> Any:
    """Return a tensor in the box or variable of the leaf that it replaces, with the leaf's axis names."""
    if isinstance(tensor, QTensor):
        value = value_of(leaf)
        names = value.names if isinstance(value, QTensor) else getattr(leaf, "names", None)
        tensor = tensor if names is None else tensor.replaced(names=names)
    return rebuilt(leaf, tensor)


def _placed(tensor: Any, place: Any) -> Any:
    """Copy a tensor to a device or to a sharding's devices; `place` of a QTensor holds a sharding for each array."""
    if isinstance(tensor, QTensor):
        arrays = {f: None if place is None else getattr(place, f) for f in ("codes", "scales", "amax")}
        placed = {f: None if getattr(tensor, f) is None else _placed(getattr(tensor, f), s) for f, s in arrays.items()}
        return dataclasses.replace(tensor, **placed)
    if jax.dtypes.canonicalize_dtype(tensor.dtype) != tensor.dtype:
        return np.array(tensor)
    if place is None:
        return jnp.array(tensor)  # a copy: the file may change
    return jax.make_array_from_callback(tensor.shape, place, lambda index: np.array(tensor[index]))
