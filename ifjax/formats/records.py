"""Every format, as a record. To add one, write a record; nothing else branches on which format it is."""

import dataclasses
import functools
import math
import numbers

import numpy as np

from ifjax.formats.grids import Grid
from ifjax.formats.scales import E4M3, SCALES, Scale


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One way to encode a block, of which the encoder keeps the one with the least loss.

    Attributes:
        grid: the element grid.
        step: what one unit of the grid is worth, in units of the first candidate's grid: 6/7 for IF4's integers.
        stretch: factor on the block scale; 1.5 puts the maximum of an E2M1 block at 4 instead of 6.
    """

    grid: Grid
    step: float = 1.0
    stretch: float = 1.0

    def __post_init__(self):
        for number in (self.step, self.stretch):
            # YAML reads 1e-5 as a string.
            if isinstance(number, bool) or not isinstance(number, numbers.Real) or not 0 < number < math.inf:
                raise ValueError(f"step and stretch must be numbers > 0, such as 1.0e-5, got {number!r}")


@dataclasses.dataclass(frozen=True)
class Format:
    """A block-scaled number format: candidates, block size, scale. Hashable; usable as a static jit argument.

    Attributes:
        name: what reports call it.
        candidates: the ways to encode a block, in order of preference on a tie.
        block: values that share one scale.
        scale: the scale's byte.
        peak: where the block's maximum lands on the first grid: its largest magnitude unless stated.
    """

    name: str
    candidates: tuple[Candidate, ...]
    block: int
    scale: Scale = E4M3
    peak: float | None = None

    def __post_init__(self):
        if not self.candidates or not all(isinstance(c, Candidate) for c in self.candidates):
            raise TypeError(f"{self.name}: candidates must be a tuple of Candidate, got {self.candidates!r}")
        object.__setattr__(self, "candidates", tuple(self.candidates))
        if isinstance(self.block, bool) or not isinstance(self.block, int) or self.block < 1:
            raise ValueError(f"{self.name}: block must be an integer >= 1, got {self.block!r}")
        if len({c.grid.bits for c in self.candidates}) > 1:
            widths = {c.grid.name: c.grid.bits for c in self.candidates}
            raise ValueError(f"{self.name}: all candidates need codes of the same width, got bits {widths}")
        if len(self.decodings) > 2:
            raise ValueError(
                f"{self.name}: {len(self.decodings)} different decodings do not fit the scale's one free bit; "
                "use at most two different (grid, step)"
            )
        if self.has_flag and not self.scale.flag:
            raise ValueError(f"{self.name}: two decodings need a scale with a free bit, which {self.scale.name} lacks")
        if self.peak is not None and not 0 < self.peak <= self.candidates[0].grid.max:
            raise ValueError(f"{self.name}: peak must lie in (0, {self.candidates[0].grid.max}], got {self.peak}")
        if self.candidates[0].step != 1 or self.candidates[0].stretch != 1:
            raise ValueError(f"{self.name}: the first candidate sets the units: its step and stretch must be 1")

    @property
    def grid(self) -> Grid:
        """The first candidate's grid, in whose units scales are reckoned."""
        return self.candidates[0].grid

    @functools.cached_property
    def decodings(self) -> tuple[tuple[Grid, float], ...]:
        """The distinct (grid, step) that a decoder has to know: one, or two told apart by bit 7 of the scale."""
        return tuple(dict.fromkeys((c.grid, c.step) for c in self.candidates))

    @property
    def has_flag(self) -> bool:
        """Whether bit 7 of a scale byte marks the second decoding."""
        return len(self.decodings) == 2

    @property
    def bits(self) -> int:
        """Bits of one code."""
        return self.grid.bits

    @property
    def bits_per_value(self) -> float:
        """Bits of one code plus its share of the block's scale byte."""
        return self.bits + 8 / self.block

    def input_factor(self, candidate: Candidate) -> np.float32:
        """What takes y from units of the first grid to units of the candidate's: 1 / step, but for rounding.

        Where both grids end at the same value the factor is the ratio of their largest codes, as in the published
        code: 7/6 for IF4, and 62/15 for IF6, whose step is not its reciprocal to the last bit.
        """
        ratio = candidate.grid.max / self.grid.max
        return np.float32(ratio if abs(ratio * candidate.step - 1) < 1e-6 else 1 / candidate.step)

    def constants(self, headroom: float = 1.0) -> tuple[np.float32, np.float32]:
        """(Q, K): the block maximum is mapped to Q, and the tensor's maximum to K = Q times the largest scale.

        Evaluated in double precision and rounded once; `headroom` (16/17 for unbiased stochastic rounding) shrinks
        both. Without a tensor-wide scale K is 1.
        """
        peak = self.grid.max if self.peak is None else self.peak
        largest = self.scale.largest
        return np.float32(peak * headroom), np.float32(1 if largest is None else peak * largest * headroom)

    def to_dict(self) -> dict:
        """The record as plain JSON values, by content: `Format.from_dict` needs no table of names."""
        if SCALES.get(self.scale.name) != self.scale:
            raise ValueError(
                f"{self.name}: only the scales {sorted(SCALES)} can be written down, not {self.scale.name!r}, whose "
                "functions are code"
            )
        candidates = [
            {"grid": dataclasses.asdict(c.grid), "step": c.step, "stretch": c.stretch} for c in self.candidates
        ]
        record = {"name": self.name, "candidates": candidates, "block": self.block, "scale": self.scale.name}
        return record | {"peak": self.peak}

    @classmethod
    def from_dict(cls, record: dict) -> "Format":
        """The inverse of `to_dict`. Raises ValueError for a record that is not one."""
        try:
            candidates = tuple(
                Candidate(
                    Grid(**c["grid"] | {"magnitudes": tuple(c["grid"]["magnitudes"])}), c["step"], c["stretch"]
                )
                for c in record["candidates"]
            )
            rest = {key: record[key] for key in ("name", "block", "peak")}
            return cls(candidates=candidates, scale=SCALES[record["scale"]], **rest)
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a format record (see Format.to_dict): {error!r} in {record!r}") from error
