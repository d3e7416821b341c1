"""Static metadata of a quantized array: its format and its block layout."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from ifjax.formats import Format
from ifjax.numerics.packing import packed_length

DTYPES = ("float32", "bfloat16", "float16", "float64")


@dataclasses.dataclass(frozen=True)
class Blocking:
    """Static metadata that is needed to decode the bytes of a quantized array. Hashable.

    Attributes:
        fmt: the format.
        axis: the blocked axis, as a negative number.
        length: number of values along that axis.
        dtype: dtype of the original array.
        headroom: the fraction of the range that was used: 1, or 16/17 for unbiased stochastic rounding.
        block_2d: whether square blocks over the last two axes share a header. Each row still stores its own copy.
        names: logical axis names from Flax metadata, used for sharding; None if there are none.
    """

    fmt: Format
    axis: int
    length: int
    dtype: np.dtype
    headroom: float = 1.0
    block_2d: bool = False
    names: tuple[Any, ...] | None = None

    def __post_init__(self):
        object.__setattr__(self, "dtype", np.dtype(self.dtype))

    def to_dict(self) -> dict[str, Any]:
        """Return the record as JSON-serializable values; `from_dict` inverts this."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return fields | {"fmt": self.fmt.to_dict(), "dtype": self.dtype.name}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "Blocking":
        """Return the record that `to_dict` gave `fields` for."""
        names = fields.get("names")
        names = None if names is None else tuple(tuple(n) if isinstance(n, list) else n for n in names)
        dtype = jnp.dtype(fields["dtype"])
        return cls(**{**fields, "fmt": Format.from_dict(fields["fmt"]), "dtype": dtype, "names": names})


def packed_shapes(shape: tuple[int, ...], fmt: Format, axis: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the shapes of the codes and the scales of a quantized array of this shape; `axis` is negative."""
    blocks = -(-shape[axis] // fmt.block)
    lengths = packed_length(blocks * fmt.block, fmt.bits), blocks * fmt.scale.nbytes
    codes, scales = (with_length(shape, axis, length) for length in lengths)
    return codes, scales


def with_length(shape: tuple[int, ...], axis: int, length: int) -> tuple[int, ...]:
    """Return the shape with the length of the negative `axis` replaced."""
    at = len(shape) + axis
    return (*shape[:at], length, *shape[at + 1 :])
