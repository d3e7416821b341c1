"""The codec: one encoder and one decoder for all formats, and records for losses, roundings and searches."""

from ifjax.codec.decode import decode
from ifjax.codec.encode import Encoding, encode, reference
from ifjax.codec.losses import LOSSES, BlockLoss, Loss
from ifjax.codec.rounding import ROUNDINGS, Rounding
from ifjax.codec.search import SEARCHES, Search

__all__ = [
    "LOSSES", "ROUNDINGS", "SEARCHES", "BlockLoss", "Encoding", "Loss", "Rounding", "Search", "decode", "encode",
    "reference",
]  # fmt: skip
