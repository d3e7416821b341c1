"""Searches: which scales a block tries besides the one that its maximum asks for, as records."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ifjax.formats import Format
from ifjax.lookup import Registry


@dataclasses.dataclass(frozen=True)
class Search:
    """Scales to try; the block keeps the one with the least loss. The format of the result is the same.

    Attributes:
        name: of the search.
        offsets: payloads to try, relative to that of the candidate's own scale; None tries all payloads.
        multipliers: what the candidate's own scale is multiplied by for rounding elements, each with each of the
            offsets; a block then rounds with one scale and decodes with another. None rounds with the scale that
            decodes.

    Raises:
        ValueError: nothing to try, or more than 255 multipliers.
    """

    name: str
    offsets: tuple[int, ...] | None
    multipliers: tuple[float, ...] | None = None

    def __post_init__(self):
        for field in ("offsets", "multipliers"):
            values = getattr(self, field)
            if values is not None:
                object.__setattr__(self, field, tuple(values))
        if self.offsets == () or self.multipliers == () or len(self.multipliers or ()) > 255:
            raise ValueError(f"Search {self.name!r} needs offsets, and at most 255 multipliers, to try")

    def trials(self, fmt: Format) -> tuple[np.ndarray, np.ndarray]:
        """int32 [t] payloads or offsets, and int32 [t] 1 + the index of the multiplier (0: none)."""
        tries = range(1, fmt.scale.top + 1) if self.offsets is None else self.offsets
        which = (0,) if self.multipliers is None else range(1, len(self.multipliers) + 1)
        pairs = [(offset, j) for j in which for offset in tries]
        payloads, multipliers = zip(*pairs, strict=True)
        return np.array(payloads, np.int32), np.array(multipliers, np.int32)


# Measured on normal data, blocks of 16: -3..+6 finds all that the exhaustive search does for IF4 and NVFP4, -2..+2
# does not. Smaller scales clip the maximum, larger ones trade its error for the others'.
SEARCHES: Registry[Search] = Registry(
    "search", Search, "ifjax.codec.SEARCHES",
    (Search("fast", (-3, -2, -1, 1, 2, 3, 4, 5, 6)), Search("exhaustive", None)),
)  # fmt: skip

# The word of a trial: what the encoder has to know of it to make its codes.
#   bits 0..8W-1       the header
#   the next 4         the candidate
#   the next 8 (W = 1) the candidate's own payload, if elements were rounded with a multiple of its scale
#   the next 8 (W = 1) 1 + the index of the multiplier, or 0
_CANDIDATE_BITS = 4


def word_parts(word: jax.Array, fmt: Format) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """(header, candidate, own payload, 1 + index of the multiplier or 0) of a trial's word."""
    width = 8 * fmt.scale.nbytes
    if width == 32:
        return word, jnp.zeros_like(word), word, jnp.zeros_like(word)
    header, rest = word & (2**width - 1), lax.shift_right_logical(word, np.int32(width))
    return header, rest & (2**_CANDIDATE_BITS - 1), rest >> 4 & 0xFF, rest >> 12


def best_trial(
    own: list[jax.Array], loss_of: Callable[[int, jax.Array, Any, Any], jax.Array], fmt: Format, search: Search | None
) -> jax.Array:
    """int32 word of the trial with the least loss.

    Args:
        own: for each candidate, the int32 payloads [..., m, ...] that blocks ask for.
        loss_of: (candidate, payload that decodes, own payload, 1 + index of the multiplier or 0) to losses. The last
            two are None where elements are rounded with the scale that decodes.
    """
    if search is not None and search.multipliers is not None and fmt.scale.nbytes > 1:
        raise ValueError(f"{search.name!r} rounds with multiples of scales, which needs headers of one byte")

    def tries(payloads, multiplier=None):
        for i, payload in enumerate(payloads):
            loss = loss_of(i, payload, None if multiplier is None else own[i], multiplier)
            yield i, payload, loss, _word(fmt, i, payload, own[i], multiplier)

    first, *others = tries(own)
    best = first[3], first[2]
    pending = [trial[1:] for trial in others]
    if search is not None:
        payloads, multipliers = search.trials(fmt)
        pending = [first[1:], *pending]

        def try_next(state, trial):
            # Compares what the last step computed: XLA would compute a loss again for each of its two readers here.
            best, pending = state
            best = better(best, pending, fmt)
            payload, multiplier = trial
            payloads = [jnp.full_like(p, payload) if search.offsets is None else p + payload for p in own]
            payloads = [jnp.clip(p, 1, fmt.scale.top) for p in payloads]
            multiplier = None if search.multipliers is None else multiplier
            return (best, [t[1:] for t in tries(payloads, multiplier)]), None

        (best, pending), _ = lax.scan(try_next, (best, pending), (payloads, multipliers))
    return better(best, pending, fmt)[0]


def better(best: tuple, trials: list[tuple], fmt: Format) -> tuple:
    """The best of (word, loss, ...) and of trials (payload, loss, word, ...).

    A tie keeps the earlier candidate, or takes the later one in formats that say so; so does a NaN keep. A zero scale
    never takes another.
    """
    for payload, loss, word, *rest in trials:
        wins = (loss <= best[1] if fmt.ties == "last" else loss < best[1]) & (payload > 0)
        best = tuple(jnp.where(wins, new, old) for new, old in zip((word, loss, *rest), best, strict=True))
    return best


def _word(fmt, candidate, payload, own, multiplier):
    header = fmt.join(fmt.selector_of(fmt.candidates[candidate]), payload)
    width = 8 * fmt.scale.nbytes
    if width == 32:
        return header
    header = header | candidate << width
    if multiplier is None:
        return header
    return header | own << (width + 4) | multiplier << (width + 12)
