"""Files of several kinds as arrays by name: safetensors with their indices, GGUF."""

import importlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from ifjax.atomic import replacing
from ifjax.exchange.layouts import LAYOUTS, Spec
from ifjax.exchange.recognize import companions
from ifjax.files import safetensors
from ifjax.files.checkpoint import Checkpoint, Item, open_file, write_items
from ifjax.files.safetensors import FileError, Foreign, Identity, check_written


class Source(NamedTuple):
    """An open checkpoint of any tool.

    Attributes:
        path: of the file, or of the index.
        folder: where configurations lie; None if the file says itself what it is.
        specs: of all arrays, by name.
        array: an array by name, mapped to the file and read where it is looked at.
        mapped: the same, mapped by itself: memory that was read is given back with it.
        read: from a name, a first byte and a number of bytes to uint8 [count], in memory of its own.
        declared: the configuration of its quantization, as the file or the folder states it.
    """

    path: Path
    folder: Path | None
    specs: dict[str, Spec]
    array: Callable[[str], np.ndarray]
    mapped: Callable[[str], np.ndarray]
    read: Callable[[str, int, int], np.ndarray]
    declared: str | Mapping[str, Any] | None

    def copied(self, name: str) -> np.ndarray:
        """Return an array in memory of its own."""
        mapped = self.array(name)
        return self.read(name, 0, mapped.nbytes).view(mapped.dtype).reshape(mapped.shape)

    def part(self, name: str, batch: tuple[int, ...], i: int) -> np.ndarray:
        """Return the i-th entry of the leading axes `batch`, in memory of its own; all, if it has not these axes."""
        mapped = self.array(name)
        if not batch or mapped.shape[: len(batch)] != batch:
            return self.copied(name)
        size = mapped.nbytes // math.prod(batch)
        return self.read(name, i * size, size).view(mapped.dtype).reshape(mapped.shape[len(batch) :])

    def chunks(self, name: str, size: int = 2**22) -> Iterator[np.ndarray]:
        """Yield all bytes of an array, some at a time."""
        nbytes = self.array(name).nbytes
        for start in range(0, nbytes, size):
            yield self.read(name, start, min(size, nbytes - start))


def open_checkpoint(path: str | os.PathLike) -> Source:
    """Open a safetensors file, an index, a GGUF file, or a folder with one checkpoint; reads headers only.

    Raises:
        FileError: (a ValueError) a broken file, an index that does not agree with its files, a broken configuration.
        OSError: it cannot be read.
    """
    path = Path(path)
    if path.is_dir():
        ours, theirs = list(path.glob("*.safetensors")), sorted(path.glob("*.gguf"))
        if len(theirs) == 1 and not ours:
            path = theirs[0]
    if path.suffix == ".gguf":
        return _open_gguf(path)
    opened = open_file(path)
    folder = opened.path.parent

    def read(name: str, start: int, count: int) -> np.ndarray:
        with opened.reader(name) as reader:
            return reader.bytes(start, count)

    says = declared_in(folder, opened.metadata)
    return Source(opened.path, folder, specs_of(opened), opened.array, opened.mapped, read, says)


def declared_in(folder: Path, metadata: Mapping[str, str]) -> Mapping[str, Any] | None:
    """Return the quantization's configuration as a checkpoint declares it: in the file, or beside it."""
    texts = {"the metadata": metadata.get("quantization_config")}
    for name in ("config.json", "hf_quant_config.json"):
        if (folder / name).is_file():
            texts[name] = (folder / name).read_text(encoding="utf-8")
    for name, text in texts.items():
        if text is None:
            continue
        config = read_json(text, f"{name} in {folder}")
        if name == "config.json":
            # Models of several kinds of input have one for each; MLX has a word of its own.
            inner = config.get("text_config")
            known = (d.get(key) for d in (config, inner) if isinstance(d, dict)
                     for key in ("quantization_config", "quantization"))  # fmt: skip
            config = next((found for found in known if isinstance(found, dict)), None)
        if isinstance(config, dict):
            return config
    return None


def specs_of(opened: Checkpoint) -> dict[str, Spec]:
    """Return the types and shapes of a checkpoint's arrays, as they are stored."""
    return {name: Spec(entry.dtype, entry.shape) for name, entry in opened.entries.items()}


def parts_of_quantized(opened: Checkpoint) -> dict[str, str]:
    """Return why arrays of a checkpoint are no weights by themselves, by their names; see `ifjax.exchange.companions`.

    Raises:
        FileError: its configuration says that it is quantized, and none of its arrays is known to be part of that.
    """
    parts = companions(specs_of(opened))
    says = declared_in(opened.path.parent, opened.metadata)
    if parts or not says or opened.layout is not None:
        return parts
    method = says.get("quant_method") or says.get("quant_algo") or says.get("mode")
    raise FileError(
        f"{opened.path}: the configuration beside it says that it is quantized{f' by {method!r:.80}' if method else ''}"
        ", and none of its arrays is known to be codes or scales: what looks like weights may be parts of "
        "these. If they are weights, remove quantization_config from config.json"
    )


def read_json(text: str, what: str) -> dict[str, Any]:
    """Return a JSON object; {} for JSON of another kind.

    Raises:
        FileError: it is not JSON.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FileError(f"{what} is not JSON: {error}") from None
    return value if isinstance(value, dict) else {}


# --- GGUF ------------------------------------------------------------------------------------------------------------


def _gguf() -> Any:
    try:
        return importlib.import_module("gguf")
    except ImportError:
        raise ImportError("GGUF files need the package gguf: pip install 'ifjax[gguf]'") from None


def _open_gguf(path: Path) -> Source:
    gguf = _gguf()
    if not path.is_file():
        raise FileNotFoundError(2, os.strerror(2), str(path))
    try:
        identity = Identity.of(path.stat())
        reader = gguf.GGUFReader(path)  # maps the file: where another takes its place, this one lives on
        tensors: dict[str, Any] = {tensor.name: tensor for tensor in reader.tensors}
        for tensor in tensors.values():
            if tensor.data.nbytes != tensor.n_bytes:
                raise ValueError(f"{tensor.name} is cut off")
    except (ValueError, IndexError, KeyError, TypeError, OverflowError) as error:
        raise FileError(f"{path} is not a whole GGUF file: {error}") from error

    def array(name: str) -> np.ndarray:
        check_written(path, identity)
        data = tensors[name].data
        if data.dtype == np.uint8 and tensors[name].tensor_type.name not in known:
            raise FileError(f"{path}: {name} is of type {tensors[name].tensor_type.name}, which is not read here: "
                            "decode it with llama.cpp first")  # fmt: skip
        return data.view(ml_dtypes.bfloat16) if tensors[name].tensor_type.name == "BF16" else data

    known = {"BF16", *(kind for lay in LAYOUTS.values() if lay.container == "gguf" for kind in lay.parts[0].dtypes)}
    specs = {name: Spec(t.tensor_type.name, tuple(array(name).shape)) for name, t in tensors.items()}

    def mapped(name: str) -> np.ndarray:
        kept = array(name)
        if not kept.size:
            return kept
        with path.open("rb") as file:
            if Identity.of(os.fstat(file.fileno())) != identity:
                return kept  # another file took its place, and the old one lives on in its map
            return np.asarray(np.memmap(file, kept.dtype, "r", int(tensors[name].data_offset), kept.shape))

    def read(name: str, start: int, count: int) -> np.ndarray:
        return np.array(mapped(name).reshape(-1).view(np.uint8)[start : start + count])

    return Source(path, None, specs, array, mapped, read, "gguf")


def _write_gguf(path: Path, items: Sequence[Item], metadata: Mapping[str, str]) -> None:
    """Write a GGUF file under the names that the items have; one tensor after the other is in memory."""
    gguf = _gguf()
    writer = gguf.GGUFWriter(None, "ifjax")
    for key, value in metadata.items():
        writer.add_string(f"ifjax.{key}", value)
    kinds = gguf.GGMLQuantizationType
    slots = [slot for item in items for slot in item.slots]
    for slot in slots:
        if slot.dtype not in kinds.__members__ or len(slot.shape) > 4 or not math.prod(slot.shape):
            raise ValueError(f"{slot.name} is {slot.dtype} {tuple(slot.shape)}, and GGUF holds floats and "
                             "integers of one to four axes, none of them empty: leave it out, or cast it")  # fmt: skip
        kind = kinds[slot.dtype]
        values = slot.dtype in safetensors.NAMES and slot.dtype != "BF16"
        *lead, last = slot.shape or (1,)
        shape = (*lead, 2 * last) if slot.dtype == "BF16" else slot.shape
        dtype = safetensors.numpy_dtype(slot.dtype) if values else np.dtype(np.uint8)
        assert dtype is not None
        writer.add_tensor_info(slot.name, shape, dtype, math.prod(shape) * dtype.itemsize, None if values else kind)
    with replacing(path) as file:
        writer.write_header_to_file(Path(file.name))
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for item in items:
            chunks: dict[str, list[np.ndarray]] = {slot.name: [] for slot in item.slots}
            item.fill(lambda name, data, chunks=chunks: chunks[name].append(safetensors.as_bytes(np.asarray(data))))
            for parts in chunks.values():
                writer.write_tensor_data(np.concatenate(parts))
        writer.close()


def _write_safetensors(path: Path, items: Sequence[Item], metadata: Mapping[str, str]) -> None:
    for slot in (slot for item in items for slot in item.slots):
        if slot.dtype not in safetensors.NAMES and not isinstance(slot, Foreign):
            raise ValueError(f"{slot.name} is {slot.dtype}, which a safetensors file cannot hold")
    write_items(path, items, metadata=metadata, own=False)


class Container(NamedTuple):
    """A kind of file.

    Attributes:
        suffix: of its name.
        write: makes a file from items and metadata, whole or not at all.
    """

    suffix: str
    write: Callable[..., Any]


CONTAINERS = {
    "safetensors": Container(".safetensors", _write_safetensors),
    "gguf": Container(".gguf", _write_gguf),
}
