"""Registry of searches, which list the scales that a block tries besides the one given by its maximum."""

import dataclasses
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ifjax.formats import Format
from ifjax.lookup import Registry
from ifjax.numerics.xla import where


@dataclasses.dataclass(frozen=True)
class Search:
    """Scales to try for a block, which keeps the one with the least loss. The format of the result is the same.

    A trial rounds the elements with one scale and decodes them with the same or another one. The first trial uses the
    candidate's own scale for both, so no block's loss rises. The own scale is the one given by the block's maximum.

    Attributes:
        name: name of the search.
        offsets: payloads to decode with, relative to that of the candidate's own scale; None tries all payloads.
        multipliers: factors on the candidate's own scale for rounding elements; each is tried with each offset. None
            rounds with the scale that decodes.
        refit: whether offsets are relative to the payload nearest to the least-squares scale of the rounded elements,
            sum(x v) / sum(v v), instead of the candidate's own. Without multipliers, elements are rounded with the
            candidate's own scale.
        descends: whether each trial rounds with the decoding scale of the trial before: coordinate descent between
            scales and codes. Needs `refit`.
        rounds: maximum number of rounds of the joint scale search, which precedes the trials. A round fits the tensor's
            amax and the block scales alternately, by least squares, to the rounded values; the round with the least
            loss of the tensor is kept, and its scales become the blocks' own scales. 0 skips this.

    Raises:
        ValueError: there is nothing to try, there are more than 255 multipliers, or fields do not fit together.
    """

    name: str
    offsets: tuple[int, ...] | None
    multipliers: tuple[float, ...] | None = None
    _: dataclasses.KW_ONLY
    refit: bool = False
    descends: bool = False
    rounds: int = 0

    def __post_init__(self):
        for field in ("offsets", "multipliers"):
            values = getattr(self, field)
            if values is not None:
                object.__setattr__(self, field, tuple(values))
        if self.refit and self.multipliers is None:
            object.__setattr__(self, "multipliers", (1.0,))
        if self.offsets == () or self.multipliers == () or len(self.multipliers or ()) > 255:
            raise ValueError(f"Search {self.name!r} needs offsets, and at most 255 multipliers, to try")
        if (self.refit and self.offsets is None) or (self.descends and not self.refit):
            raise ValueError(f"Search {self.name!r}: refit needs offsets, such as (0,), and descends needs refit")
        if isinstance(self.rounds, bool) or not isinstance(self.rounds, int) or self.rounds < 0:
            raise ValueError(f"Search {self.name!r}: rounds must be an integer >= 0, got {self.rounds!r}")

    @property
    def is_decoupled(self) -> bool:
        """Whether elements may be rounded with a different scale than the one that decodes them."""
        return self.multipliers is not None

    def trials(self, fmt: Format) -> tuple[np.ndarray, np.ndarray]:
        """Return int32 [t] payloads or offsets, and int32 [t] 1 + the index of the multiplier (0: none)."""
        tries = range(1, fmt.scale.top + 1) if self.offsets is None else self.offsets
        if fmt.scale.runs and self.offsets is not None:  # also try the own scale with other factors for its runs
            tries = (0, *(offset for offset in self.offsets if offset))
        which = (0,) if self.multipliers is None else range(1, len(self.multipliers) + 1)
        pairs = [(offset, j) for j in which for offset in tries]
        payloads, multipliers = zip(*pairs, strict=True)
        return np.array(payloads, np.int32), np.array(multipliers, np.int32)


def _both_ways(n: int) -> tuple[int, ...]:
    """Return -1, 1, -2, 2, ... -n, n."""
    return tuple(sign * i for i in range(1, n + 1) for sign in (-1, 1))


_HALF_TO_THREE_HALVES = tuple(j / 100 for j in range(50, 151))
SEARCHES: Registry[Search] = Registry(
    "search", Search, "ifjax.codec.SEARCHES",
    (
        # Measured on normal data in blocks of 16: for IF4 and NVFP4, -3..+6 finds the same scales as the exhaustive
        # search, and -2..+2 does not. Smaller scales clip the maximum; larger ones trade its error for the others'.
        Search("fast", (-3, -2, -1, 1, 2, 3, 4, 5, 6)),
        # ScaleSearch, arXiv 2605.12464.
        Search("wide", _both_ways(8)),
        Search("exhaustive", None),
        # SOAR's decoupled search, arXiv 2605.12245. It does better with the least-squares scale, which is our addition.
        Search("decoupled", (0, -1, 1), _HALF_TO_THREE_HALVES),
        Search("least_squares", (0,), _HALF_TO_THREE_HALVES, refit=True),
        Search("descent", (0,), (1.0,) * 12, refit=True, descends=True),
        # SOAR's joint scale: alone, with its decoupled search, and with the least-squares variant of that search.
        Search("joint", (0,), rounds=15),
        Search("soar", (0, -1, 1), _HALF_TO_THREE_HALVES, rounds=15),
        Search("soar_least_squares", (0,), _HALF_TO_THREE_HALVES, refit=True, rounds=15),
    ),
)  # fmt: skip

# The word of a trial holds what the encoder needs to compute the trial's codes:
#   bits 0..8W-1       the header
#   the next 4         the candidate
#   the next 8 (W = 1) the payload of the scale whose multiple rounded the elements
#   the next 8 (W = 1) 1 + the index of the multiplier; 0 if the elements were rounded with the scale that decodes
_CANDIDATE_BITS = 4


def word_parts(word: jax.Array, fmt: Format) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Return (header, candidate, payload to round with, 1 + index of the multiplier or 0) of a trial's word."""
    width = 8 * fmt.scale.nbytes
    if width == 32:
        return word, jnp.zeros_like(word), word, jnp.zeros_like(word)
    header, rest = word & (2**width - 1), lax.shift_right_logical(word, np.int32(width))
    return header, rest & (2**_CANDIDATE_BITS - 1), rest >> 4 & 0xFF, rest >> 12


class Trials(Protocol):
    """Interface of an encoder for a search: losses of blocks, and least-squares scales."""

    def loss(self, i: int, payload: jax.Array, rounding: Any, multiplier: Any) -> jax.Array:
        """Return losses of blocks that candidate i rounds with a multiple of `rounding` and decodes with `payload`.

        `multiplier` is 1 + the multiplier's index. If `rounding` is None, `payload` also rounds.
        """
        ...

    def refitted(self, i: int, rounding: jax.Array, multiplier: Any) -> jax.Array:
        """Return the payload nearest to the least-squares scale of the values that candidate i rounded."""
        ...

    def refined(self, payload: jax.Array) -> jax.Array:
        """Return the payload with the best factors for its runs; unchanged for scales without runs."""
        ...


def best_trial(own: list[jax.Array], trials: Trials, fmt: Format, search: Search | None) -> jax.Array:
    """Return the int32 word of the trial with the least loss. `own` holds each candidate's own payloads."""
    if search is not None and search.is_decoupled and (fmt.scale.nbytes > 1 or fmt.scale.runs):
        raise ValueError(f"{search.name!r} rounds with multiples of scales, which needs headers of one byte")

    def tries(payloads, rounding=None, multiplier=None):
        for i, payload in enumerate(payloads):
            source = None if rounding is None else rounding[i]
            yield i, payload, trials.loss(i, payload, source, multiplier), _word(fmt, i, payload, source, multiplier)

    first, *others = tries(own)
    best = first[3], first[2]
    pending = [trial[1:] for trial in others]
    if search is not None:
        offsets, multipliers = search.trials(fmt)
        pending = [first[1:], *pending]

        def try_next(state, trial):
            # Compare the trials of the previous step: comparing this step's trials would give each loss two readers,
            # and XLA would compute it twice.
            best, pending, rounding = state
            best = better(best, pending, fmt)
            offset, multiplier = trial
            if search.offsets is None:
                payloads = [jnp.full_like(p, offset) for p in own]
            elif search.refit:
                payloads = [trials.refitted(i, p, multiplier) + offset for i, p in enumerate(rounding)]
            else:
                payloads = [p + offset for p in own]
            payloads = [trials.refined(_clipped(p, fmt)) for p in payloads]
            found = tries(payloads, *((rounding, multiplier) if search.is_decoupled else ()))
            return (best, [t[1:] for t in found], payloads if search.descends else rounding), None

        (best, pending, _), _ = lax.scan(try_next, (best, pending, own), (offsets, multipliers))
    return better(best, pending, fmt)[0]


def _clipped(payload, fmt):
    """Clip payloads to valid scales. Bits for runs above the scale are dropped, because they are chosen anew."""
    return jnp.clip(payload & (2**8 - 1) if fmt.scale.runs else payload, 1, fmt.scale.top)


def better(best: tuple, trials: list[tuple], fmt: Format) -> tuple:
    """Return the best of `best`, (word, loss, ...), and of trials (payload, loss, word, ...).

    A tie keeps the earlier candidate, or takes the later one in formats with ties="last". If either loss is NaN, the
    earlier one is kept. A trial with a zero scale never wins.
    """
    for payload, loss, word, *rest in trials:
        wins = (loss <= best[1] if fmt.ties == "last" else loss < best[1]) & (payload != 0)
        best = tuple(where(wins, new, old) for new, old in zip((word, loss, *rest), best, strict=True))
    return best


def _word(fmt, candidate, payload, rounding, multiplier):
    header = fmt.join(fmt.selector_of(fmt.candidates[candidate]), payload)
    width = 8 * fmt.scale.nbytes
    if width == 32:
        return header
    header = header | candidate << width if candidate else header
    if multiplier is None:
        return header
    return header | rounding << (width + 4) | multiplier << (width + 12)
