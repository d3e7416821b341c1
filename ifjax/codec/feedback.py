"""Block encoder with error feedback: each row is corrected for the errors of the rows before it (see `ifjax.gptq`)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from ifjax.codec.blocks import pick, tree, unstack
from ifjax.codec.decode import decode
from ifjax.codec.encode import (
    BlockTrials,
    Encoding,
    Extras,
    block_peaks,
    choose,
    codes_of,
    decoded_place,
    inverse_for,
    one_for_each_decoding,
    wanted_payloads,
)
from ifjax.codec.headers import TensorScale
from ifjax.codec.losses import squared
from ifjax.codec.search import best_trial, word_parts
from ifjax.numerics.xla import divide


class FeedbackBlock(NamedTuple):
    """A block along axis 0. The columns N combine all other axes.

    Attributes:
        x: float32 [B, N]: the block corrected for the errors of earlier blocks, in units of the tensor's power.
        w: float32 [B, N]: the block itself, in the same units.
        within: float32 [B, B], strictly lower triangular: the feedback of a row's error to later rows.
        weight: float32 [B]: weight of each row's squared error.
        unit: float32 []: the power of two that errors are multiplied by in losses.
    """

    x: jax.Array
    w: jax.Array
    within: jax.Array
    weight: jax.Array
    unit: jax.Array


def encode_block(
    step: FeedbackBlock, tensor: TensorScale | None, how: Encoding, own_loss: bool, own: list[jax.Array] | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Encode one block; return uint8 codes [B, N], int32 headers [N], and the errors w - q [B, N] after decoding.

    With `own_loss` the header is chosen by the weighted errors of all rows, with the feedback between them; otherwise
    by `how.loss` of step.x. `own` holds the payloads of each candidate from which a search starts; None means those
    that follow from the block's maximum.
    """
    fmt = how.fmt
    peaks, runs = block_peaks(step.x, -2, how)
    own = wanted_payloads(peaks, runs, tensor, how) if own is None else own
    if own_loss:
        trials = _FeedbackTrials(step, tensor, how)
        word = jnp.where(peaks < 0, fmt.scale.nan, best_trial(own, trials, fmt, how.search))
    else:
        word = choose(BlockTrials([[step.x]], peaks, tensor, Extras(), how, -2), peaks, own)
    header, _, rounding, multiplier = word_parts(word, fmt)
    codes, errors = _codes(step, header, rounding, multiplier, tensor, how)
    return codes, header, errors


def with_feedback(w: jax.Array, feedback: jax.Array) -> jax.Array:
    """Return w + feedback, or w where feedback is 0: adding 0 would flush subnormals and drop the sign of -0."""
    return jnp.where(feedback == 0, w, w + feedback)


class _FeedbackTrials(NamedTuple):
    """An implementation of `ifjax.codec.search.Trials` with the weighted squared errors of all rows under feedback."""

    step: FeedbackBlock
    tensor: TensorScale | None
    how: Encoding

    def loss(self, i, payload, rounding, multiplier):
        def term(x, decoded):
            return squared((decoded - x) * self.step.unit)

        return self._over_rows(term, i, payload, rounding, multiplier)

    def refitted(self, i, rounding, multiplier):
        fmt, unit = self.how.fmt, self.step.unit
        own = fmt.scale.decode(rounding)

        # The feedback uses values decoded with the rounding payload. Dividing by its scale gives values for a scale
        # of 1, from which the least-squares scale follows.
        def over(term):
            def of_row(x, decoded):
                return term(x * unit, divide(decoded, own) * unit)

            return self._over_rows(of_row, i, rounding, rounding, multiplier)

        above, below = over(lambda x, v: x * v), over(lambda x, v: v * v)
        scale = jnp.where(below > 0, divide(above, jnp.where(below > 0, below, 1)), 0)
        return jnp.where(scale > 0, fmt.scale.encode(scale), rounding)

    def refined(self, payload):
        return payload

    def _over_rows(self, term, i, payload, rounding, multiplier):
        """Return the weighted sum of term(x, decoded) over rows."""
        step, tensor, how = self
        fmt = how.fmt

        def next_row(errors, at):
            x = _row(step, errors, at)
            inverse = inverse_for(payload, rounding, multiplier, at, tensor, how)
            scale = fmt.scale.decode(payload, at)
            x, decoded = decoded_place(
                x, None, inverse, scale, tensor, fmt.tensor_constant(), fmt.candidates[i], fmt
            )  # fmt: skip
            errors = errors.at[at].set(_finite(step.w[at] - decoded))
            return errors, term(x, decoded) * step.weight[at]

        terms = lax.scan(next_row, jnp.zeros_like(step.x), jnp.arange(fmt.block))[1]
        return tree(lax.add, unstack(terms, 0))


def _codes(step, header, rounding, multiplier, tensor, how):
    """Return uint8 codes [B, N] for the chosen headers, and the errors w - q [B, N] after decoding."""
    fmt = how.fmt
    selector, payload = fmt.split(header)
    amax = None if tensor is None else tensor.amax
    candidates = one_for_each_decoding(fmt)

    def next_row(errors, at):
        x = _row(step, errors, at)
        inverse = inverse_for(payload, rounding, multiplier, at, tensor, how)
        codes = pick(selector, codes_of(x, None, inverse, 1, candidates, fmt))
        decoded = decode(codes, header, fmt, place=at, amax=amax)
        return errors.at[at].set(_finite(step.w[at] - decoded)), codes.astype(jnp.uint8)

    errors, codes = lax.scan(next_row, jnp.zeros_like(step.x), jnp.arange(fmt.block))
    return codes, errors


def _row(step, errors, at):
    return with_feedback(step.x[at], jnp.dot(step.within[at], errors, precision=lax.Precision.HIGHEST))


def _finite(error):
    return jnp.where(jnp.isfinite(error), error, 0)
