"""Calibration: statistics of activations, collected while a model runs on example batches."""

import dataclasses
import functools
import importlib.util
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ifjax.arrays import QTensor
from ifjax.formats import Format
from ifjax.models.arguments import as_arguments, joined, split_arrays
from ifjax.models.decisions import decide
from ifjax.models.flax.linen import Operands, Watcher, layer_of, site_of
from ifjax.models.functions import inside
from ifjax.models.rules import Rule, as_rules
from ifjax.models.transforms import Inputs

ROWS = 128  # input rows to keep of each batch


@dataclasses.dataclass(frozen=True, eq=False)
class Calibration:
    """Statistics of activations from `calibrate`.

    Attributes:
        amax: activation amaxes by the path of the module that they enter; attention's operands have the keys
            "path:query" and so on. Layers that nn.scan repeats share one.
        hessians: sums of x x^T over all input rows x [K] of a module, float32 [K, K], for rules with gptq. K is the
            product of all contracted lengths.
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
    progress: bool = True,
) -> Calibration:
    """Run a linen model on batches and collect the activation statistics that the rules need.

    Rules with act_amax="static" need amaxes, gptq=True needs Hessians, smooth and rotate="greedy" need inputs. Each
    batch is one call of the jitted model. Its parameters may be floats or packed; activations are not quantized.
    Statistics leave the program through callbacks, so the model may scan, remat and vmap. A layer is not seen if no
    result of `apply` depends on it.

    Args:
        apply: a function such as `model.apply`, jitted or not. It must call only one model, because the paths of two
            would mix.
        params: the first argument of `apply`.
        batches: the other arguments: each batch a tuple of positional ones, a mapping of keyword ones, or the only one.
            Values other than arrays, such as flags, are static. Batches of equal shapes compile once.
        rules: as for `ifjax.quantize_params`.
        statistic: how batches combine to an amax. "max": the largest magnitude of all batches; "mean": the mean of the
            largest magnitudes per batch; "percentile": the mean of the percentiles per batch.
        percentile: percentile of the magnitudes, in (0, 100], for statistic="percentile".
        progress: show a progress bar.

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
    """
    rules = as_rules(rules)
    if statistic not in ("max", "mean", "percentile"):
        raise ValueError(f"statistic must be 'max', 'mean' or 'percentile', got {statistic!r}")
    if not 0 < percentile <= 100:
        raise ValueError(f"percentile must lie in (0, 100], got {percentile}")
    if not any(_wants_amax(rule) or rule.gptq or rule.needs_inputs for rule in rules):
        raise ValueError("no rule needs calibration: give one act_fmt with act_amax='static', gptq=True, or smooth=")
    collector = _Collector(rules, percentile if statistic == "percentile" else None)

    key = object()  # keeps jitted functions from reusing the programs with this call's callbacks elsewhere

    def run(params, arrays, static):
        args, kwargs = joined(arrays, static)
        with inside(key), nn.intercept_methods(collector):
            return apply(params, *args, **kwargs)

    run, count = jax.jit(run, static_argnums=2), 0
    for batch in _tracked(batches) if progress else batches:
        jax.block_until_ready(run(params, *split_arrays(as_arguments(batch))))
        collector.end_batch()
        count += 1
    if not count:
        raise ValueError("calibration needs at least one batch")
    collector.check(rules)
    combine = max if statistic == "max" else lambda values: sum(values) / len(values)
    amax = {path: float(combine(values)) for path, values in collector.amax.items()}
    wrong = [path for path, value in amax.items() if not np.isfinite(value)]
    wrong += [path for path, hessian in collector.hessians.items() if not np.all(np.isfinite(hessian))]
    if wrong:
        raise ValueError(f"activations of {wrong[:3]} are not finite: look at the batches, and at the model's outputs")
    return Calibration(amax, collector.hessians, collector.inputs)


def _wants_amax(rule):
    formats = [rule.activation_format, *rule.operand_formats.values()]
    return rule.act_amax == "static" and any(fmt is not None and fmt.has_tensor_scale for fmt in formats)


def _tracked(batches):
    from rich import get_console
    from rich.progress import track

    # In notebooks rich draws with ipywidgets, and warns if they are not installed.
    hidden = get_console().is_jupyter and importlib.util.find_spec("ipywidgets") is None
    return track(batches, description="calibrating", transient=True, disable=hidden)


class _Collector(Watcher):
    """The interceptor that collects statistics; products are not changed."""

    def __init__(self, rules, percentile):
        super().__init__()
        self.rules, self.percentile = rules, percentile
        self.amax: dict[str, list[float]] = {}
        self.hessians: dict[str, np.ndarray] = {}
        self.inputs: dict[str, Inputs] = {}
        self._batch: dict[str, float] = {}

    def __call__(self, next_fun, args, kwargs, context):
        layer, module = layer_of(context), context.module
        path, _ = self.note(module)
        if layer is None:
            return next_fun(*args, **kwargs)
        site = site_of(module, layer)
        kernel = None if layer.kernel is None else module.get_variable("params", layer.kernel)
        if kernel is not None:
            axes = layer.axes(module, args, kwargs, kernel.ndim)
            site = site._replace(axes=axes, shape=tuple(kernel.shape), packed=isinstance(kernel, QTensor))
        self.layers[site.parameter] = site
        decision = decide(self.rules, site)
        rule = decision.rule
        if rule is None or not (_wants_amax(rule) or rule.gptq or rule.needs_inputs):
            return next_fun(*args, **kwargs)
        encodings = {"input": decision.activations} if layer.kernel is not None else decision.operands

        def activation(x, axes, operand):
            if _wants_amax(rule) and encodings.get(operand) is not None:
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

        packed = kernel if isinstance(kernel, QTensor) else None
        return layer.run(module, next_fun, args, kwargs, Operands(packed, activation))

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
