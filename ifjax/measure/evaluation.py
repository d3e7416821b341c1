"""Effect of quantization on a model's outputs: loss, perplexity, divergence and agreement, with standard errors."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Sized
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float
from rich import box
from rich.table import Table

from ifjax.models.arguments import as_arguments
from ifjax.models.shown import as_text, bar_on_stderr
from ifjax.numerics.byte_order import as_array


class Estimate(NamedTuple):
    """A mean over tokens and its standard error.

    Rows (sequences) are treated as independent, and the tokens of a row as one unit, so the standard error comes from
    the variation between rows.
    """

    mean: float
    error: float

    def __str__(self) -> str:
        return f"{self.mean:.4g} ± {self.error:.1g}"


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Result of `evaluate`. `str` gives a table.

    Attributes:
        rows, tokens: number of rows and tokens that were counted.
        loss, packed_loss: loss of each function, in nats per token or in the units of a custom loss. None without
            targets.
        difference: packed_loss - loss. Its standard error is computed from pairs and is far smaller than those of the
            two losses.
        divergence: KL(float, packed) in nats per token. None if outputs are not logits.
        agreement: share of tokens for which both functions have the same largest logit. None if outputs are not logits.
        is_nats: whether losses are in nats, so that perplexities are defined.
    """

    rows: int
    tokens: int
    loss: Estimate | None
    packed_loss: Estimate | None
    difference: Estimate | None
    divergence: Estimate | None
    agreement: Estimate | None
    is_nats: bool = True

    @property
    def perplexity(self) -> Estimate | None:
        """exp(loss); None if the loss is not in nats or there are no targets."""
        return _exponential(self.loss) if self.is_nats else None

    @property
    def packed_perplexity(self) -> Estimate | None:
        """exp(packed_loss); None if the loss is not in nats or there are no targets."""
        return _exponential(self.packed_loss) if self.is_nats else None

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-serializable values: "rows", "tokens", and each measure as {"mean", "error"} or None."""
        names = ("loss", "packed_loss", "difference", "perplexity", "packed_perplexity", "divergence", "agreement")
        measures = {name: getattr(self, name) for name in names}
        return {"rows": self.rows, "tokens": self.tokens} | {
            name: None if value is None else value._asdict() for name, value in measures.items()
        }

    def __str__(self) -> str:
        table = Table(box=box.SIMPLE_HEAD, title=f"{self.rows:,} rows, {self.tokens:,} tokens", title_justify="left")
        for name in ("", "float", "packed"):
            table.add_column(name, justify="right" if name else "left")
        pairs = [("loss", self.loss, self.packed_loss), ("perplexity", self.perplexity, self.packed_perplexity)]
        for name, one, other in pairs:
            if one is not None:
                table.add_row(name, str(one), str(other))
        rest = {"loss difference": self.difference, "KL divergence": self.divergence, "agreement": self.agreement}
        for name, value in rest.items():
            if value is not None:
                table.add_row(name, "", str(value))
        return as_text(table, 100).strip("\n")


def evaluate(
    fn_float: Callable[..., Any],
    fn_packed: Callable[..., Any],
    batches: Iterable[tuple[Any, ArrayLike | None]],
    *,
    loss: Callable[[Any, Any], Float[Array, "..."]] | None = None,
    logits: bool = True,
    progress: bool | None = None,
) -> Evaluation:
    """Compare a function with its quantized version over batches.

    Args:
        fn_float, fn_packed: the two functions. They take only a batch's arguments; bind parameters with
            functools.partial. They return logits [rows, ..., classes], or the outputs that `loss` takes.
        batches: pairs of (arguments, targets). Arguments are a tuple of positional arguments, a mapping of keyword
            arguments, or a single argument. Targets are integers of the logits' shape without the last axis; negative
            targets are ignored. Targets None means that only divergence and agreement are measured.
        loss: maps (outputs, targets) to losses [rows, ...]; by default cross entropy in nats.
        logits: whether outputs are logits, for which divergence and agreement are measured.
        progress: whether to show a progress bar on stderr; by default only if stderr is a terminal.

    Returns:
        An Evaluation.

    Raises:
        ValueError: there are no batches, shapes of outputs or targets do not fit, only some batches have targets, all
            targets are negative, or there is nothing to measure.

    Example:
        >>> import functools, jax, jax.numpy as jnp
        >>> import ifjax
        >>> def model(params, x):
        ...     return x @ params
        >>> w, x = jax.random.normal(jax.random.key(0), (2, 64, 64))
        >>> q = ifjax.quantize(w, "if4", axis=0)
        >>> batches = [(x, (x @ w).argmax(-1))]
        >>> found = ifjax.evaluate(functools.partial(model, w), functools.partial(ifjax.quantized(model), q), batches)
        >>> found.tokens, found.agreement.mean > 0.7
        (64, True)
    """
    total = len(batches) if isinstance(batches, Sized) else None
    sums: list[np.ndarray] = []  # [rows, measures]
    with_targets = None
    with bar_on_stderr(progress) as bar:
        task = bar.add_task("evaluate", total=total)
        for arguments, targets in batches:
            if with_targets is not None and with_targets != (targets is not None):
                raise ValueError("some batches have targets and others none: give all or none")
            with_targets = targets is not None
            if not (logits or with_targets):
                raise ValueError("nothing to measure: batches without targets need logits=True")
            args, kwargs = as_arguments(arguments)
            outputs = fn_float(*args, **kwargs), fn_packed(*args, **kwargs)
            targets = None if targets is None else as_array(targets)
            if loss is None or logits:
                _check(outputs, targets if loss is None else None)
            rows = _rows(*outputs, targets, logits=logits, loss=loss)
            sums.append(np.asarray(rows, np.float64))
            bar.advance(task)
    if not any(map(len, sums)):
        raise ValueError("there is no batch with a row to evaluate on")
    count, counted, one, other, divergence, agreement = np.concatenate(sums).T
    seen = counted if with_targets and loss is None else count

    def mean(values, tokens):
        if tokens.sum() == 0:
            raise ValueError("all targets are negative, which leaves nothing to count")
        ratio = values.sum() / tokens.sum()
        n = len(values)
        spread = ((values - ratio * tokens) ** 2).sum() * (n / (n - 1) if n > 1 else math.nan)
        return Estimate(float(ratio), float(spread**0.5 / tokens.sum()))

    losses = [mean(a, counted) for a in (one, other, other - one)] if with_targets else [None] * 3
    about = [mean(a, seen) for a in (divergence, agreement)] if logits else [None] * 2
    tokens = int((counted if with_targets else count).sum())
    return Evaluation(len(count), tokens, *losses, *about, is_nats=loss is None)


@jax.jit(static_argnames=("logits", "loss"))
def _rows(one, other, targets, *, logits, loss):
    """Return [rows, 6]: number of positions, number counted, sums of both losses, of divergences, of agreements."""

    def by_row(a):
        return a.astype(jnp.float32).reshape(a.shape[0], math.prod(a.shape[1:])).sum(-1)

    first = jax.tree.leaves(one)[0]
    nothing = jnp.zeros(first.shape[0], jnp.float32)
    losses, divergence, agreement = [nothing, nothing], nothing, nothing
    counted = by_row(jnp.ones(first.shape[:-1])) if loss is None or logits else nothing
    count = counted
    counts = None
    if targets is not None and loss is None:
        counts = jnp.asarray(targets >= 0)
        counted = by_row(counts)
    if targets is not None and loss is not None:
        losses = [loss(outputs, targets) for outputs in (one, other)]
        counted = by_row(jnp.ones(losses[0].shape))
        losses = [by_row(a) for a in losses]
    if loss is None or logits:
        p, q = (jax.nn.log_softmax(a.astype(jnp.float32)) for a in (one, other))

        def kept(a):
            return by_row(a if counts is None else jnp.where(counts, a, 0))

        if counts is not None and targets is not None:
            places = jnp.maximum(targets, 0)[..., None]
            losses = [kept(-jnp.take_along_axis(a, places, -1)[..., 0]) for a in (p, q)]
        if logits:
            divergence = kept((jnp.exp(p) * (p - q)).sum(-1))
            agreement = kept((one.argmax(-1) == other.argmax(-1)).astype(jnp.float32))
    return jnp.stack([count, counted, *losses, divergence, agreement], -1)


def _check(outputs, targets):
    shapes = [getattr(a, "shape", None) for a in outputs]
    if shapes[0] is None or shapes[0] != shapes[1] or len(shapes[0]) < 2:
        raise ValueError(f"both functions must return logits [rows, ..., classes] of one shape, got {shapes[0]} and "
                         f"{shapes[1]}; for other outputs pass loss= and logits=False")
    if targets is not None and (targets.shape != shapes[0][:-1] or not jnp.issubdtype(targets.dtype, jnp.integer)):
        raise ValueError(f"targets must be integers of shape {shapes[0][:-1]}, got {targets.dtype} {targets.shape}")


def _exponential(estimate: Estimate | None) -> Estimate | None:
    if estimate is None:
        return None
    value = math.exp(min(estimate.mean, 700.0))
    return Estimate(value, value * estimate.error)
