"""Where a converted checkpoint goes: a file, or a folder that gets all that the source's folder has besides weights."""

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ifjax.atomic import new_folder, write_text
from ifjax.exchange.containers import read_json
from ifjax.files import FileError

# Weights of any tool, their indices, and what describes weights that are not in this form any longer.
_WEIGHTS = (
    "*.safetensors", "*.safetensors.index.json", "*.gguf", "*.bin", "*.bin.index.json", "*.pt", "*.pth", "*.h5",
    "*.msgpack", "*.ckpt", "*.onnx", "*.npz", "hf_quant_config.json", ".*",
)  # fmt: skip
FILES = (".safetensors", ".gguf", ".safetensors.index.json")

Configure = Callable[[dict[str, Any]], dict[str, Any]]


# Names that nobody gives to a folder of weights.
_OTHERS = {".bin", ".pt", ".pth", ".npz", ".npy", ".h5", ".json", ".yaml", ".onnx", ".ckpt", ".msgpack", ".pkl", ".txt"}


def is_file(target: Path) -> bool:
    """Whether a target is the name of a file of weights; else it is a folder's.

    Raises:
        FileError: it is neither.
    """
    if target.name.endswith(FILES):
        return True
    if target.suffix in _OTHERS and not target.is_dir():
        raise FileError(
            f"{target}: OUT must end in .safetensors (for several files, .safetensors.index.json), or be a folder"
        )
    return False


@contextlib.contextmanager
def output(target: Path, suffix: str, beside: Path | None, configure: Configure) -> Iterator[Path]:
    """Yield the path to write weights to. A folder appears, complete, once the block has ended without an error.

    Args:
        target: a file, or a folder that is new or empty.
        suffix: of the file of weights in a folder, as ".safetensors".
        beside: the source's folder, whose other files go along; None for no such files.
        configure: makes the new config.json of the source's.

    Raises:
        FileExistsError: the folder holds something.
        OSError: a file cannot be copied.
    """
    if is_file(target):
        yield target
        return
    with new_folder(target) as folder:
        config: dict[str, Any] = {}
        for file in sorted(beside.iterdir()) if beside is not None else ():
            if not file.is_file() or any(file.match(pattern) for pattern in _WEIGHTS):
                continue
            if file.name == "config.json":
                config = read_json(file.read_text(encoding="utf-8"), str(file))
            else:
                shutil.copyfile(file, folder / file.name)
        config = configure(config)
        if config:
            write_text(folder / "config.json", json.dumps(config, indent=2, ensure_ascii=False) + "\n")
        yield folder / f"model{suffix}"


def without_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config.json without what it says of the weights' quantization."""
    kept = {key: value for key, value in config.items() if key not in ("quantization_config", "quantization")}
    inner = kept.get("text_config")
    return kept | ({"text_config": without_quantization(inner)} if isinstance(inner, dict) else {})
