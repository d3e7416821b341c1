"""Other tools' checkpoints in: into memory by name, or straight into a model."""

import os
from collections.abc import Iterable, Mapping
from typing import Any

from ifjax.exchange.containers import open_checkpoint
from ifjax.exchange.opened import Opened
from ifjax.exchange.read import choose, read_all, survey
from ifjax.files.load import load_tree
from ifjax.files.names import NameRule


def load(
    path: str | os.PathLike,
    tool: str | Mapping[str, Any] | None = None,
    *,
    like: Any = None,
    names: Iterable[NameRule] | None = None,
    **settings: Any,
) -> Any:
    """Return what `import_tensors` makes of a file, an index of several, or a folder; or a tree of it, on its devices.

    With `like` it goes straight into a model, as by `ifjax.load_file(like=, names=)`: renamed, turned, split and
    stacked by rules, each device's part read for itself. Tensors are [.., out, in] to the rules, whatever the layout,
    and have the dtype of the tree. What is stored packed stays so, byte for byte; FP8 (`decode=True`) and floats are
    quantized while they are read where the tree has a QTensor. Of fouroversix' buffers whole matrices are read.

    Args:
        path: a safetensors file, its index, a GGUF file, or a folder with one checkpoint. Pickles are not read.
        tool: as for `import_tensors`. None: what the file's metadata or the folder's config.json or
            hf_quant_config.json declare; else by the names, if they decide it.
        like: a tree of the structure that is wanted, as for `ifjax.load_file`. None: all tensors by name, in memory.
        names: rules for the checkpoint's names, under which `import_tensors` has the tensors; unless given, paths are
            the names.
        **settings: of `import_tensors`: fmt, nibbles, axis, dtype, headroom, decode.

    Raises:
        ValueError: as `import_tensors` and `ifjax.load_file`. A `FileError`: a broken file, an index that does not
            agree with its files, or a type that numpy lacks.
        OSError: it cannot be read.

    Example:
        >>> import tempfile
        >>> import jax, jax.numpy as jnp
        >>> import ifjax
        >>> from ifjax import exchange
        >>> theirs = {f"layers.{i}.up.weight": ifjax.quantize(jnp.ones((32, 64)), "nvfp4") for i in range(2)}
        >>> abstract = jax.ShapeDtypeStruct((2, 64, 32), jnp.bfloat16)
        >>> rule = ifjax.NameRule(r"layers\\.(\\d+)\\.up\\.weight", "up/kernel", transpose=True, stack=(1,))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     exchange.save(theirs, f"{folder}/theirs", "compressed-tensors")
        ...     exchange.load(f"{folder}/theirs", like={"up": {"kernel": abstract}}, names=[rule])
        {'up': {'kernel': QTensor(nvfp4, 2x64x32 bfloat16, axis=-2, 4.516 bits a value)}}
    """
    source = open_checkpoint(path)
    if like is None:
        if names is not None:
            raise ValueError("names= says where tensors belong in a tree: pass it as like=")
        layouts, how = choose(source.specs, source.declared if tool is None else tool, **settings)
        return dict(read_all(survey(source.specs, layouts), source.copied, how))
    if settings.get("axis", -1) != -1:
        raise ValueError("axis=-2 turns all tensors: with like=, NameRule(..., transpose=True) turns those it names")
    opened = Opened(source, tool, **settings)
    return load_tree(opened, like, (NameRule("(.*)", r"\1"),) if names is None else names)
