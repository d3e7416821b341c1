"""Calibration: statistics of activations, collected while a model runs on example batches."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from ifjax.formats import Format
from ifjax.models.arguments import as_arguments
from ifjax.models.decisions import Decision
from ifjax.models.functions import Quantized
from ifjax.models.rewrite import How
from ifjax.models.rules import Rule, as_rules
from ifjax.models.shown import bar_on_stderr
from ifjax.models.transforms import Inputs
from ifjax.numerics.byte_order import native_leaves

ROWS = 128  # input rows to keep of each batch


@dataclasses.dataclass(frozen=True, eq=False)
class Calibration:
    """Statistics of activations from `calibrate`.

    Attributes:
        amax: activation amaxes by the path of the module that they enter; attention's operands have the keys
            "path:query" and so on. Layers that nn.scan repeats share one.
        hessians: sums of x x^T over all input rows x [K] of a module, float32 [K, K], for rules with gptq. K is the
            product of all contracted lengths. Experts that one linen layer multiplies, such as nn.Einsum, share one.
        inputs: channel maxima and sample rows of a module's inputs, for rules with smooth or rotate="greedy".
    """

    amax: Mapping[str, float]
    hessians: Mapping[str, np.ndarray]
    inputs: Mapping[str, Inputs] = dataclasses.field(default_factory=dict)


def calibrate(
    apply: Callable[..., Any],
    params: Any,
    batches: Iterable[Any],
    rules: Iterable[Rule] | Rule | str | Format | None = None,
    *,
    statistic: Literal["max", "mean", "percentile"] = "max",
    percentile: float = 99.9,
    progress: bool | None = None,
) -> Calibration:
    """Run a model on batches and collect the activation statistics that the rules need.

    Rules with act_amax="static" need amaxes, gptq=True needs Hessians, smooth and rotate="greedy" need inputs. Each
    batch is one call of the jitted model. Its parameters may be floats or packed; activations are not quantized.
    Statistics leave the program through callbacks, so the model may scan, remat and vmap. A layer is not seen if no
    result of `apply` depends on it. Inputs are collected where the traced program multiplies by a parameter, whichever
    module does so, and those of linen's attention where it is called.

    Args:
        apply: a function such as `model.apply`, jitted or not.
        params: the first argument of `apply`.
        batches: the other arguments: each batch a tuple of positional ones, a mapping of keyword ones, or the only one.
            Values other than arrays, such as flags, are static. Batches of equal shapes compile once.
        rules: as for `ifjax.quantize_params`.
        statistic: how batches combine to an amax. "max": the largest magnitude of all batches; "mean": the mean of the
            largest magnitudes per batch; "percentile": the mean of the percentiles per batch.
        percentile: percentile of the magnitudes, in (0, 100], for statistic="percentile".
        progress: whether to show a progress bar on stderr; None shows one if stderr is a terminal.

    Returns:
        A `Calibration`.

    Raises:
        ValueError: no rule needs calibration; a rule has no effect on the model; there is no batch; a statistic is not
            finite.

    Example:
        >>> import flax.linen as nn, jax, jax.numpy as jnp
        >>> import ifjax
        >>> model, x = nn.Sequential([nn.Dense(8)]), jnp.ones((2, 32))
        >>> params = model.init(jax.random.key(0), x)
        >>> rules = ifjax.Rule(".*", "nvfp4", act_fmt="nvfp4", act_amax="static")
        >>> ifjax.calibrate(model.apply, params, [x, 2 * x], rules, progress=False).amax
        {'layers_0': 2.0}
        >>> def head(params, x):
        ...     return x @ params["w"]
        >>> ifjax.calibrate(head, {"w": jnp.ones((32, 8))}, [x], rules, progress=False).amax
        {'w': 1.0}
    """
    rules = as_rules(rules)
    if statistic not in ("max", "mean", "percentile"):
        raise ValueError(f"statistic must be 'max', 'mean' or 'percentile', got {statistic!r}")
    if not 0 < percentile <= 100:
        raise ValueError(f"percentile must lie in (0, 100], got {percentile}")
    if not any(needs_statistics(rule) for rule in rules):
        raise ValueError("no rule needs calibration: give one act_fmt with act_amax='static', gptq=True, or smooth=")
    statistics = Statistics(percentile if statistic == "percentile" else None)
    program = Quantized(apply, rules, None, None, 0, statistics)
    count, params = 0, native_leaves(params)
    with bar_on_stderr(progress) as bar:
        for batch in bar.track(batches, description="calibrating"):
            args, kwargs = as_arguments(batch)
            jax.block_until_ready(program(params, *args, **kwargs))
            statistics.end_batch()
            count += 1
    if not count:
        raise ValueError("calibration needs at least one batch")
    combine = max if statistic == "max" else lambda values: sum(values) / len(values)
    amax = {path: float(combine(values)) for path, values in statistics.amax.items()}
    wrong = [path for path, value in amax.items() if not np.isfinite(value)]
    wrong += [path for path, hessian in statistics.hessians.items() if not np.all(np.isfinite(hessian))]
    if wrong:
        raise ValueError(f"activations of {wrong[:3]} are not finite: look at the batches, and at the model's outputs")
    return Calibration(amax, statistics.hessians, statistics.inputs)


def needs_statistics(rule: Rule | None) -> bool:
    """Return whether a rule needs statistics of the inputs of its products."""
    return rule is not None and (_wants_amax(rule) or rule.gptq or rule.needs_inputs)


def _wants_amax(rule: Rule) -> bool:
    formats = [rule.activation_format, *rule.operand_formats.values()]
    return rule.act_amax == "static" and any(fmt is not None and fmt.has_tensor_scale for fmt in formats)


class Statistics:
    """Collects statistics of the inputs of products; products are not changed.

    Attributes:
        amax, hessians, inputs: as in `Calibration`, but `amax` has a value for each batch.
        decisions: decision by path, for products of a traced program.
    """

    def __init__(self, percentile: float | None):
        self.percentile = percentile
        self.amax: dict[str, list[float]] = {}
        self.hessians: dict[str, np.ndarray] = {}
        self.inputs: dict[str, Inputs] = {}
        self.decisions: dict[str, Decision] = {}
        self._batch: dict[str, float] = {}

    def expect(self, path: str, decision: Decision) -> How | None:
        """Return how to compute a parameter's products to collect what its rule needs; None if it needs nothing."""
        if not needs_statistics(decision.rule):
            return None
        self.decisions[path] = decision
        return How(name=path)

    def note(self, how: How, x: Any, axes: Sequence[int]) -> Any:
        """Collect statistics of x, the operand of a product in a traced program, and return x."""
        decision = self.decisions.get(how.name)
        if decision is None or decision.rule is None:
            return x
        return self.collect(x, axes, decision.rule, how.name, "input", decision.activations is not None)

    def collect(self, x: Any, axes: Sequence[int], rule: Rule, path: str, operand: str, rounds: bool) -> Any:
        """Collect the statistics of an operand that its rule needs, and return the operand.

        Args:
            x: the operand.
            axes: its contracted axes, in the order of the weight's.
            rule: the rule of the product.
            path: path of the product.
            operand: name of the operand, "input" for that of a parameter's product.
            rounds: whether the rule rounds this operand.
        """
        if _wants_amax(rule) and rounds:
            magnitude = jnp.abs(jnp.asarray(x, jnp.float32))
            peak = magnitude.max(initial=0)
            if self.percentile is not None:
                peak = jnp.percentile(magnitude, self.percentile)
            x = _noted(x, functools.partial(self._note_amax, value_name(path, operand)), peak)
        if not (rule.gptq or rule.needs_inputs) or operand != "input":
            return x
        last = jnp.moveaxis(jnp.asarray(x, jnp.float32), axes, range(-len(axes), 0))
        rows = last.reshape(-1, int(np.prod(last.shape[last.ndim - len(axes) :])))
        if rule.needs_inputs:
            some = rows[:: max(1, len(rows) // ROWS)][:ROWS]
            seen = jnp.concatenate([jnp.abs(rows).max(0, initial=0)[None], some])
            x = _noted(x, functools.partial(self._note_inputs, path), seen)
        if rule.gptq:
            hessian = jnp.matmul(rows.T, rows, precision="highest")
            x = _noted(x, functools.partial(self._note_hessian, path), hessian)
        return x

    def _note_amax(self, name, peak):
        self._batch[name] = max(self._batch.get(name, 0.0), float(peak))

    def _note_hessian(self, path, hessian):
        self.hessians[path] = self.hessians.get(path, 0) + np.asarray(hessian)

    def _note_inputs(self, path, seen):
        largest, rows = np.asarray(seen[0]), np.asarray(seen[1:])
        if path in self.inputs:
            largest = np.maximum(largest, self.inputs[path].largest)
            rows = np.concatenate([self.inputs[path].rows, rows])[-4 * ROWS :]
        self.inputs[path] = Inputs(largest, rows)

    def end_batch(self):
        for name, peak in self._batch.items():
            self.amax.setdefault(name, []).append(peak)
        self._batch = {}


def _noted(x, note, value):
    """Return x, made to depend on the callback `note`: nn.scan refuses callbacks that are unused (flax 0.12.12)."""

    def call(value):
        note(value)
        return np.zeros((), np.float32)

    done = jax.pure_callback(call, jax.ShapeDtypeStruct((), jnp.float32), value, vmap_method="sequential")
    return jnp.where(done == 0, x, jnp.full_like(x, jnp.nan))


def value_name(path: str, operand: str) -> str:
    """Return the key of an amax in `Calibration.amax`."""
    return path if operand == "input" else f"{path}:{operand}"
