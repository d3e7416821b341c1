"""Number formats as records: element grids, block scales, candidates, and every named format."""

from ifjax.formats.grids import E2M0, E2M1, E2M3, E3M2, INT3, INT4, INT6, Grid
from ifjax.formats.named import FORMATS, get_format
from ifjax.formats.records import Candidate, Decoding, Format
from ifjax.formats.scales import E4M3, E8M0, SCALES, Scale, TableScale

__all__ = [
    "E2M0", "E2M1", "E2M3", "E3M2", "E4M3", "E8M0", "FORMATS", "INT3", "INT4", "INT6", "SCALES", "Candidate",
    "Decoding", "Format", "Grid", "Scale", "TableScale", "get_format",
]  # fmt: skip
