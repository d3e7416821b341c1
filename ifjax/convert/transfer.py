"""A planned conversion between layouts: what will be written, and a report of every tensor."""

import dataclasses
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from ifjax.convert.folders import Configure, is_file, output
from ifjax.convert.tensors import Tick, no_tick
from ifjax.exchange.containers import CONTAINERS
from ifjax.files.checkpoint import SHARD_BYTES, Item, write_items
from ifjax.files.safetensors import FileError
from ifjax.models.report import Report

Fill = Callable[[Tick], Sequence[Item]]


@dataclasses.dataclass(frozen=True)
class Transfer:
    """A conversion that was planned; nothing is written yet.

    Attributes:
        report: an entry for every tensor: its new format, or why it stays or is refused.
        nbytes: that will be read.
        items: makes what is written, and tells a `Tick` of bytes that were read.
        container: the kind of file, of `ifjax.exchange.containers.CONTAINERS`, or "ifjax" for packed checkpoints.
        metadata: of the files.
        beside: the source's folder, whose other files go along into a folder.
        configure: makes the new config.json.
    """

    report: Report
    nbytes: int
    items: Fill
    container: str
    metadata: Mapping[str, str]
    beside: Path | None
    configure: Configure

    @property
    def suffix(self) -> str:
        """Of the files that are written."""
        return CONTAINERS[self.container].suffix if self.container in CONTAINERS else ".safetensors"

    def write(
        self, target: str | os.PathLike, *, max_shard_bytes: int | None = None, tick: Tick | None = None
    ) -> Path:
        """Write a file, or a folder with all that the source's folder has besides weights; whole or not at all.

        Args:
            target: a file that ends as the tool's files do; else a folder, new or empty.
            max_shard_bytes: of more than these several files are made, with an index; 5 GB in a folder unless given.
            tick: is told of progress.

        Raises:
            ValueError: a tensor that no reader of the layout would decode as it is; the target's name.
            FileExistsError: the folder holds something.
            OSError: it cannot be read or written. What was there is as it was.
        """
        target = Path(target)
        if is_file(target) and not target.name.endswith((self.suffix, f"{self.suffix}.index.json")):
            raise FileError(f"{target}: OUT must end in {self.suffix}, or be a folder")
        if max_shard_bytes is None and not is_file(target):
            max_shard_bytes = SHARD_BYTES
        items = self.items(tick or no_tick)
        # A file by itself says what it is; a folder's config.json does.
        stated = self.configure({}).get("quantization_config") if is_file(target) else None
        metadata = dict(self.metadata) | ({"quantization_config": json.dumps(stated)} if stated else {})
        with output(target, self.suffix, self.beside, self.configure) as path:
            if self.container == "gguf":
                CONTAINERS["gguf"].write(path, items, metadata)
            else:
                own = self.container == "ifjax"
                write_items(path, items, metadata=metadata, max_shard_bytes=max_shard_bytes, own=own)
        return target
