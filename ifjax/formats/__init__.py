"""Number formats as records: element grids, block scales, candidates, and the registry of named formats."""

from ifjax.formats.grids import E2M0, E2M1, E2M3, E3M2, INT3, INT4, INT6, Grid
from ifjax.formats.named import FORMATS, get_format, with_block
from ifjax.formats.records import Candidate, Decoding, Format
from ifjax.formats.scales import E3M3, E4M3, E8M0, SCALES, UE2M3, UE5M3, Scale, TableScale

__all__ = [
    "E2M0", "E2M1", "E2M3", "E3M2", "E3M3", "E4M3", "E8M0", "FORMATS", "INT3", "INT4", "INT6", "SCALES", "UE2M3",
    "UE5M3", "Candidate", "Decoding", "Format", "Grid", "Scale", "TableScale", "get_format", "with_block",
]  # fmt: skip
