"""The joint scale search: amax and the block scales are fitted alternately, by least squares, to the rounded values.

A decoded value d is v * scale * amax / K. For fixed codes, the best factor for amax is sum(x d) / sum(d d) over the
tensor, and the best factor for a block's scale is the same ratio over the block. New scales give new codes, and scales
are rounded to their table, so a round may raise the loss; the best of all rounds is kept.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ifjax.codec.search import better
from ifjax.formats import Format
from ifjax.numerics.xla import divide

# Maps (amax, payloads of each candidate) to the losses, sums of x d and sums of d d of each candidate, [..., m, ...].
Fit = Callable[[jax.Array, Sequence[jax.Array]], list[list[jax.Array]]]

_SETTLED = 1e-3  # iteration stops when the relative change of the loss is smaller


class _State(NamedTuple):
    """State of the iteration. `loss`, `is_done` and `best_loss` have the shape of amax; the best fields go together."""

    amax: jax.Array
    payloads: list[jax.Array]
    loss: jax.Array
    is_done: jax.Array
    best_loss: jax.Array
    best_amax: jax.Array
    best_payloads: list[jax.Array]


def joint_scale(
    fit: Fit, amax: jax.Array, payloads: list[jax.Array], fmt: Format, rounds: int
) -> tuple[jax.Array, list[jax.Array]]:
    """Return amax and each candidate's payloads from the round with the least loss, the starting values included.

    Each entry of amax is fitted, and stops, independently. Sums are taken in one fixed order.

    Source: SOAR arXiv 2605.12245, the joint optimization of scales.
    """

    def next_half(step, state: _State) -> _State:
        """Alternate between measuring a round and updating amax, and updating payloads; `fit` is compiled once."""
        is_measured = step % 2 == 0
        first, *others = zip(state.payloads, fit(state.amax, state.payloads), strict=True)
        refitted = [_refitted(p, above, below, fmt) for p, (_, above, below) in (first, *others)]
        # Sums over the tensor use the candidate that each block would choose.
        best = better((first[0], *first[1]), [(p, loss, p, *sums) for p, (loss, *sums) in others], fmt)
        loss, above, below = (_total(a, amax.shape) for a in best[1:])
        is_best = is_measured & ~state.is_done & (loss < state.best_loss)
        is_settled = (loss == 0) | ~(jnp.abs(state.loss - loss) >= np.float32(_SETTLED) * state.loss)
        return _State(
            jnp.where(is_measured, state.amax * _ratio(above, below), state.amax),
            [jnp.where(is_measured, old, new) for old, new in zip(state.payloads, refitted, strict=True)],
            jnp.where(is_measured, loss, state.loss),
            state.is_done | (is_measured & is_settled),
            jnp.where(is_best, loss, state.best_loss),
            jnp.where(is_best, state.amax, state.best_amax),
            [jnp.where(_wide(is_best, new), new, old)
             for new, old in zip(state.payloads, state.best_payloads, strict=True)],
        )  # fmt: skip

    unknown = jnp.full_like(amax, jnp.inf)
    start = _State(amax, payloads, unknown, jnp.zeros(amax.shape, bool), unknown, amax, payloads)
    _, end = lax.while_loop(
        lambda at: (at[0] <= 2 * rounds) & ~jnp.all(at[1].is_done), lambda at: (at[0] + 1, next_half(*at)), (0, start)
    )
    return end.best_amax, end.best_payloads


def _wide(a, like):
    """Append axes of length 1 to `a`, so that its leading axes broadcast against `like`."""
    return a.reshape(a.shape + (1,) * (like.ndim - a.ndim))


def _ratio(above, below):
    """Return above / below, or 1 where either is not positive."""
    is_fit = (above > 0) & (below > 0)
    return jnp.where(is_fit, divide(jnp.where(is_fit, above, 1), jnp.where(is_fit, below, 1)), 1)


def _refitted(payload, above, below, fmt):
    """Return the payload nearest to the least-squares scale; a block that decodes to zeros keeps its payload."""
    scale = fmt.scale.decode(payload) * _ratio(above, below)
    return jnp.where(below > 0, jnp.clip(fmt.scale.encode(scale), 1, fmt.scale.top), payload)


def _total(a, shape):
    """Sum a [..., m, ...] to the shape of amax, over the axes where that has one entry, in one fixed order."""
    kept = tuple(i for i, n in enumerate(shape) if n > 1)
    a = a.transpose(*kept, *(i for i in range(a.ndim) if i not in kept))
    a = a.reshape(*a.shape[: len(kept)], -1)
    a = jnp.pad(a, [(0, 0)] * len(kept) + [(0, (1 << (a.shape[-1] - 1).bit_length()) - a.shape[-1])])
    while (half := a.shape[-1] // 2) > 0:
        a = a[..., :half] + a[..., half:]
    return a.reshape(shape)
