"""Records that define a format: candidates, decodings and block structure. No code branches on a format's identity."""

import dataclasses
import functools
import math
import numbers
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from ifjax.formats.grids import Grid
from ifjax.formats.scales import E4M3, E8M0, Scale, scale_from_dict


class Decoding(NamedTuple):
    """How codes decode: to (grid value + offset) * step, in units of the first candidate's grid."""

    grid: Grid
    step: float
    offset: float


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One way to encode a block. For each block the encoder keeps the candidate with the least loss.

    Attributes:
        grid: the element grid.
        step: size of the grid's unit, in units of the first candidate's grid; 6/7 for IF4's integers.
        scale_multiplier: factor on the block scale; 1.5 maps the maximum of an E2M1 block to 4 instead of 6.
        peak: the value that the block's maximum maps to, in units of the first candidate's grid; by default that of the
            format. With a different peak the candidate has its own scale.
        offset: added to the grid's values: it is subtracted before rounding and added after decoding.

    Raises:
        TypeError: `grid` is not a Grid.
        ValueError: step, scale_multiplier or peak is not a positive number, or the offset is not finite.
    """

    grid: Grid
    step: float = 1.0
    scale_multiplier: float = 1.0
    peak: float | None = None
    offset: float = 0.0

    def __post_init__(self):
        if not isinstance(self.grid, Grid):
            raise TypeError(f"a candidate needs an ifjax.Grid, got {type(self.grid).__name__}")
        _make_floats(self, "step", "scale_multiplier", "peak", "offset")
        for number in (self.step, self.scale_multiplier, 1.0 if self.peak is None else self.peak):
            # YAML reads 1e-5 as a string, so the message suggests 1.0e-5.
            if not _is_number(number) or not 0 < number < math.inf:
                raise ValueError(f"step, scale_multiplier and peak must be numbers > 0, such as 1.0e-5, got {number!r}")
        if not _is_number(self.offset) or not math.isfinite(self.offset):
            raise ValueError(f"offset must be a finite number, got {self.offset!r}")

    @property
    def decoding(self) -> Decoding:
        """The part of the candidate that a decoder needs."""
        return Decoding(self.grid, self.step, self.offset)


@dataclasses.dataclass(frozen=True)
class Format:
    """A block-scaled number format. Hashable; usable as a static jit argument.

    Attributes:
        name: name used in reports and error messages.
        candidates: the ways to encode a block, in the order of their selectors.
        block: number of values that share a header.
        scale: the type of the block scale.
        peak: the value on the first grid that the block's maximum maps to; by default the grid's largest magnitude.
        tensor_peak: the block scale of the block that has the tensor's maximum, set through a float32 tensor scale; 448
            for NVFP4. None for formats without a tensor scale, whose block scales are absolute.
        ties: which candidate is kept if losses are equal, the "first" or the "last".
        prevent_zero: whether the smallest positive scale replaces 0, also for blocks of zeros.
        saturates: whether an infinity becomes the block's largest value. If False, it turns its block into NaN.
        doc: description and source of the format, shown by `help`; not part of the record's identity.

    Raises:
        TypeError: `name`, `candidates`, `scale`, `prevent_zero` or `saturates` has the wrong type.
        ValueError: a field is invalid, or fields do not fit together; the message says why.
    """

    name: str
    candidates: tuple[Candidate, ...]
    block: int
    scale: Scale = E4M3
    peak: float | None = None
    _: dataclasses.KW_ONLY
    tensor_peak: float | None = 448.0
    ties: Literal["first", "last"] = "first"
    prevent_zero: bool = False
    saturates: bool = False
    doc: str = dataclasses.field(default="", compare=False, repr=False)

    def __post_init__(self):
        if not isinstance(self.name, str):
            raise TypeError(f"a format's name must be text, got {self.name!r}")
        _make_floats(self, "peak", "tensor_peak")
        if self.doc:
            object.__setattr__(self, "__doc__", self.doc)
        candidates: Any = self.candidates
        if not candidates or not all(isinstance(c, Candidate) for c in candidates):
            raise TypeError(f"{self.name}: candidates must be a tuple of Candidate, got {candidates!r}")
        object.__setattr__(self, "candidates", tuple(candidates))
        if not isinstance(self.scale, Scale):
            raise TypeError(f"{self.name}: scale must be an ifjax.Scale, got {type(self.scale).__name__}")
        if isinstance(self.block, bool) or not isinstance(self.block, int) or self.block < 1:
            raise ValueError(f"{self.name}: block must be an integer >= 1, got {self.block!r}")
        if len({c.grid.bits for c in self.candidates}) > 1:
            widths = {c.grid.name: c.grid.bits for c in self.candidates}
            raise ValueError(f"{self.name}: all candidates need codes of the same width, got bits {widths}")
        spare = 8 * self.scale.nbytes - self.scale.bits
        if len(self.decodings) > 2**spare:
            has = f"the {spare} free bits of a header of {self.scale.name}" if spare else (
                f"a header of {self.scale.name}, which has no free bit for a selector"
            )  # fmt: skip
            raise ValueError(
                f"{self.name}: {len(self.decodings)} different decodings do not fit {has}: use at most {2**spare} "
                "different (grid, step, offset), or a scale with fewer bits"
            )
        if self.scale.nbytes > 3 and len(self.candidates) > 1:
            raise ValueError(f"{self.name}: a header of {self.scale.nbytes} bytes leaves room for one candidate only")
        if any(self.block % run for run in self.scale.runs):
            raise ValueError(f"{self.name}: runs of {self.scale.runs} do not divide a block of {self.block}")
        if self.peak is not None and not (_is_number(self.peak) and 0 < self.peak < math.inf):
            raise ValueError(f"{self.name}: peak must be a number > 0, got {self.peak!r}")
        first: Candidate = candidates[0]
        if first.step != 1 or first.scale_multiplier != 1 or first.peak is not None:
            raise ValueError(
                f"{self.name}: the first candidate sets the units: its step and scale_multiplier must be 1, and its "
                "peak is the format's"
            )
        self._check_tensor_peak()
        if self.ties not in ("first", "last"):
            raise ValueError(f"{self.name}: ties must be 'first' or 'last', got {self.ties!r}")
        for field in ("prevent_zero", "saturates"):
            if not isinstance(getattr(self, field), bool):
                raise TypeError(f"{self.name}: {field} must be True or False, got {getattr(self, field)!r}")
        if self.saturates and self.has_tensor_scale:
            raise ValueError(f"{self.name}: saturates needs tensor_peak=None: an infinity has no finite maximum")

    def _check_tensor_peak(self):
        if self.tensor_peak is None:
            return
        if not _is_number(self.tensor_peak) or not 0 < self.tensor_peak < math.inf:
            raise ValueError(f"{self.name}: tensor_peak must be a number > 0 or None, got {self.tensor_peak!r}")
        values = getattr(self.scale, "values", None)
        if self.scale == E8M0 or (values is not None and self.tensor_peak > values[self.scale.top]):
            raise ValueError(
                f"{self.name}: {self.scale.name} scales are absolute or end below tensor_peak={self.tensor_peak:g}: "
                "write tensor_peak=None for a format without a tensor scale, or a value of the scale"
            )
        if self._peak * self.tensor_peak > float(np.finfo(np.float32).max):
            raise ValueError(
                f"{self.name}: a tensor's maximum maps to peak * tensor_peak = {self._peak:g} * {self.tensor_peak:g}, "
                "which float32 cannot represent: write the grid in larger units, with smaller values"
            )

    @property
    def grid(self) -> Grid:
        """The first candidate's grid, whose units block scales refer to."""
        return self.candidates[0].grid

    @functools.cached_property
    def decodings(self) -> tuple[Decoding, ...]:
        """Distinct decodings of the candidates, in the order of their selectors."""
        return tuple(dict.fromkeys(c.decoding for c in self.candidates))

    @property
    def has_selector(self) -> bool:
        """Whether headers hold a selector, because the format has several decodings."""
        return len(self.decodings) > 1

    @property
    def has_tensor_scale(self) -> bool:
        """Whether the format has a tensor scale, derived from the tensor's absolute maximum."""
        return self.tensor_peak is not None

    @property
    def bits(self) -> int:
        """Number of bits of a code."""
        return self.grid.bits

    @property
    def bits_per_value(self) -> float:
        """Bits of a code plus its share of the block header."""
        return self.bits + 8 * self.scale.nbytes / self.block

    def selector_of(self, candidate: Candidate) -> int:
        """Return the selector of blocks that use this candidate."""
        return self.decodings.index(candidate.decoding)

    def split(self, header: jax.Array) -> tuple[Any, jax.Array]:
        """Return (selector, payload) of int32 headers. With one decoding the selector is the Python integer 0."""
        if not self.has_selector:
            return 0, header
        width, bits = 8 * self.scale.nbytes, self.scale.bits
        return header >> bits & (2 ** (width - bits) - 1), header & (2**bits - 1)

    def join(self, selector: Any, payload: jax.Array) -> jax.Array:
        """Return int32 headers of selectors and payloads: the inverse of `split`."""
        return payload | (selector << self.scale.bits) if self.has_selector else payload

    def input_factor(self, candidate: Candidate) -> np.float32:
        """Return the factor from units of the first grid to units of the candidate's grid: 1 / step up to rounding.

        If both grids end at the same value, the factor is the ratio of their largest magnitudes, as in the published
        code: 7/6 for IF4, and 62/15 for IF6, whose step differs from the reciprocal in the last bits.
        """
        if candidate.step == 1:
            return np.float32(1)
        ratio = candidate.grid.max / self.grid.max
        return np.float32(ratio if abs(ratio * candidate.step - 1) < 1e-6 else 1 / candidate.step)

    def block_peak(self, candidate: Candidate | None = None, headroom: float = 1.0) -> np.float32:
        """Return Q, the value to which a candidate maps the block's maximum.

        It is multiplied by `headroom` (16/17 for unbiased stochastic rounding), in double precision, and rounded once.
        """
        own = None if candidate is None else candidate.peak
        return np.float32((self._peak if own is None else own) * headroom)

    def tensor_constant(self, headroom: float = 1.0) -> np.float32:
        """Return K, to which the tensor's maximum maps: Q * `tensor_peak`, rounded once; 1 without a tensor scale."""
        return np.float32(1 if self.tensor_peak is None else self._peak * self.tensor_peak * headroom)

    @functools.cached_property
    def largest(self) -> float:
        """A bound of decoded magnitudes and of the products on the way, before the tensor scale."""
        ends = (max(abs(v + d.offset) for v in d.grid.values) * max(d.step, 1) for d in self.decodings)
        return self.scale.largest * max(ends)

    @property
    def _peak(self) -> float:
        return self.grid.max if self.peak is None else self.peak

    def to_dict(self) -> dict[str, Any]:
        """Return the record as JSON-serializable values. `Format.from_dict` inverts this without a registry of formats.

        Raises:
            ValueError: the scale is defined by code and not registered.
        """
        record = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.compare}
        candidates = [dataclasses.asdict(c) for c in self.candidates]
        return record | {"candidates": candidates, "scale": self.scale.to_dict()}

    @classmethod
    def from_dict(cls, record: Any) -> "Format":
        """Return the format that `to_dict` gave `record` for. Records of layout 1 are supported too.

        Raises:
            ValueError: the record is invalid.
        """
        try:
            if "grid" in record["candidates"][0] and "magnitudes" in record["candidates"][0]["grid"]:
                record = _from_layout_1(record)
            candidates = tuple(Candidate(**c | {"grid": _grid_of(c["grid"])}) for c in record["candidates"])
            return cls(**record | {"candidates": candidates, "scale": scale_from_dict(record["scale"])})
        except (AttributeError, IndexError, KeyError, TypeError) as error:
            raise ValueError(f"not a format record (see Format.to_dict): {error!r} in {record!r:.200}") from error


def _grid_of(record: Mapping[str, Any]) -> Grid:
    tuples = {key: tuple(record[key]) for key in ("values", "preferred", "unused") if key in record}
    return Grid(**{**record, **tuples})


def _from_layout_1(record: Mapping[str, Any]) -> dict[str, Any]:
    """Convert a record of layout 1, which has magnitudes of grids and the tensor peak in the scale's name."""
    unknown = set(record) - {"name", "candidates", "block", "scale", "peak"}
    if unknown:
        raise TypeError(f"unknown keys {sorted(map(str, unknown))}")
    peaks = {"e4m3": 448.0, "e4m3_256": 256.0, "e8m0": None}

    def candidate(c):
        grid = c["grid"]
        if grid["sign"] == "bit":
            new = Grid.sign_magnitude(grid["name"], grid["magnitudes"], grid["ties"], grid["zero"])
        else:
            m = tuple(grid["magnitudes"])
            new = Grid(grid["name"], (*m, -len(m) * m[1], *(-v for v in m[:0:-1])), grid["ties"], unused=(len(m),))
        if unknown := set(c) - {"grid", "step", "stretch"}:
            raise TypeError(f"unknown keys {sorted(map(str, unknown))}")
        return {"grid": dataclasses.asdict(new), "step": c["step"], "scale_multiplier": c["stretch"]}

    return {
        "name": record["name"], "block": record["block"], "peak": record["peak"],
        "scale": record["scale"].removesuffix("_256"), "tensor_peak": peaks[record["scale"]],
        "candidates": [candidate(c) for c in record["candidates"]],
    }  # fmt: skip


def _make_floats(record: Any, *fields: str) -> None:
    """Make floats of a record's numbers, which may be NumPy's or fractions, so that it can be written to a file."""
    for field in fields:
        if _is_number(getattr(record, field)):
            object.__setattr__(record, field, float(getattr(record, field)))


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)
