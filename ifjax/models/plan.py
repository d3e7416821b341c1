"""Mixed-precision planning: a format for each layer within a budget of bits, chosen by its effect on the loss.

    loss function, batches -> items (parameters that share an input) -> losses by format -> choice -> rules
"""

import dataclasses
import math
import os
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from rich import box
from rich.table import Table

from ifjax.arrays import quantize
from ifjax.codec import Encoding
from ifjax.formats import FORMATS, Format, get_format
from ifjax.models.arguments import as_arguments
from ifjax.models.budget import choose
from ifjax.models.decisions import Decision, decide
from ifjax.models.leaves import is_leaf, is_parameter, raw_value, split_collection, with_value
from ifjax.models.rule_files import save_rules
from ifjax.models.rules import Rule, default_rules
from ifjax.models.shown import as_text, bar_on_stderr
from ifjax.models.sites import join_path
from ifjax.models.trace import function_walk, shared_inputs


@dataclasses.dataclass(frozen=True)
class PlannedItem:
    """Parameters that share an input and therefore one format.

    Attributes:
        paths: paths of the parameters.
        values: number of values in all of them.
        fmt: name of the chosen format; None for floats.
        bits: bits per value, with scales but without tensor amaxes.
        losses: estimated increase of the loss for each of the plan's formats.
    """

    paths: tuple[str, ...]
    values: int
    fmt: str | None
    bits: float
    losses: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class FormatPlan:
    """The result of `plan_formats`. `str(plan)` is a table.

    Attributes:
        rules: rules for `ifjax.quantize_params` and `ifjax.quantized`; the first match decides.
        items: planned items, in the order of the parameters.
        formats: names of the candidate formats; None for floats.
        bits: mean bits per value over all items.
        budget_bits: requested budget, in bits per value.
        base_loss: loss of the float model.
        predicted_loss: base_loss plus the estimated increase of each item.
        measured_loss: loss of the whole plan. The prediction assumes that increases add up: compare the two.
    """

    rules: tuple[Rule, ...]
    items: tuple[PlannedItem, ...]
    formats: tuple[str | None, ...]
    bits: float
    budget_bits: float
    base_loss: float
    predicted_loss: float
    measured_loss: float

    def save(self, path: str | os.PathLike) -> None:
        """Write the rules to a YAML or JSON file, for `ifjax.load_rules` and `ifjax quantize --rules`."""
        save_rules(self.rules, path)

    def to_dict(self) -> dict[str, Any]:
        """Return all fields except the rules as plain values for JSON."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in ("rules", "items")}
        return fields | {"items": [dataclasses.asdict(item) for item in self.items]}

    def __str__(self) -> str:
        table = Table(box=box.SIMPLE_HEAD)
        table.add_column("parameters")
        for name in ("values", "format", "bits", *(f"+loss {fmt or 'float'}" for fmt in self.formats)):
            table.add_column(name, justify="right")
        for item in self.items:
            cells = [f"{item.values:,}", item.fmt or "float", f"{item.bits:.2f}"]
            cells += [f"{loss:.2g}" for loss in item.losses]
            table.add_row(" ".join(item.paths), *cells)
        lines = [line for line in as_text(table, 140).splitlines() if line]
        return "\n".join([*lines, f"{self.bits:.3f} bits a value of {self.budget_bits:g}; loss {self.base_loss:.4f} in "
                          f"floats, {self.predicted_loss:.4f} predicted, {self.measured_loss:.4f} measured"])


def plan_formats(
    params: Any,
    fn: Callable[..., Any],
    batches: Iterable[Any],
    formats: Sequence[str | Format | None] = ("if3", "if4", "if6", None),
    *,
    budget_bits: float,
    rules: Iterable[Rule] | None = None,
    sensitivity: Literal["direct", "fisher"] = "direct",
    exact: bool = True,
    progress: bool | None = None,
) -> FormatPlan:
    """Choose a format for each layer that minimizes the increase of the loss within a budget of bits.

    Parameters whose products share an input (query, key and value; gate and up) form one item and take one format.
    Shared inputs are found by tracing fn. The choice never exceeds the budget. Its predicted loss is never above that
    of any single format that fits the budget.

    Args:
        params: a tree of float parameters, as for `ifjax.quantize_params`.
        fn: a function of (params, *batch) that returns a scalar loss, the mean over the batch.
        batches: calibration batches: each a tuple of positional arguments, a mapping of keyword ones, or the only one.
        formats: at least two candidate formats, in any order; None for floats.
        budget_bits: mean bits per value over all items, with scales. A tensor's amax (4 bytes) is not counted.
        rules: the parameters that these rules quantize are planned; `default_rules` unless given. The plan keeps the
            other options of the matching rule (search, loss, act_fmt).
        sensitivity: "direct" measures the loss with one item quantized at a time, in one run of all batches per item
            and format. "fisher" needs one backward pass per batch: half the sum of squared gradients times squared
            errors of the weights.
        exact: also solve the knapsack by dynamic programming. The greedy choice alone can be far off with few items.
        progress: whether to show a progress bar on stderr; None shows one if stderr is a terminal.

    Raises:
        ValueError: no batch, fewer than two formats, or no parameter to plan; the budget is below the cheapest
            formats; a loss is not finite.

    Source: greedy over hulls and knapsack as in ModelOpt's AutoQuantize, and QuantClaw arXiv 2604.22577.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import ifjax
        >>> def loss(params, x):
        ...     return ((jnp.tanh(x @ params["up"]) @ params["down"] - x) ** 2).mean()
        >>> params = {"up": jax.random.normal(jax.random.key(0), (64, 64)), "down": jnp.eye(64)}
        >>> batches = [jax.random.normal(jax.random.key(1), (8, 64))]
        >>> plan = ifjax.plan_formats(params, loss, batches, ("nvfp4", None), budget_bits=20)
        >>> [(item.paths, item.fmt) for item in plan.items]
        [(('down',), 'nvfp4'), (('up',), None)]
    """
    batches = list(batches)
    if not batches:
        raise ValueError("there is no batch to calibrate on")
    if sensitivity not in ("direct", "fisher"):
        raise ValueError(f"sensitivity must be 'direct' or 'fisher', got {sensitivity!r}")
    names = tuple(dict.fromkeys(None if f is None else FORMATS.name_of(get_format(f)) for f in formats))
    if len(names) < 2:
        raise ValueError("formats must be two at least, to choose from")
    found = _Items(params, fn, batches[0], default_rules() if rules is None else tuple(rules))
    runs = _Runs(fn, batches)
    with bar_on_stderr(progress) as bar:
        count = len(found.items) * len(names)
        task = bar.add_task("sensitivities", total=count)
        base = runs.loss(params)
        if not math.isfinite(base):
            raise ValueError(f"the loss of the floats is {base}: there is nothing to compare with")
        squares = runs.squares(params, found) if sensitivity == "fisher" else None
        losses = np.zeros((len(found.items), len(names)))
        for i, item in enumerate(found.items):
            for k, fmt in enumerate(names):
                if fmt is not None and squares is not None:
                    losses[i, k] = sum(found.error(path, fmt, squares[path]) for path in item)
                elif fmt is not None:
                    losses[i, k] = max(runs.loss(found.with_formats(dict.fromkeys(item, fmt))) - base, 0.0)
                bar.advance(task)
        if not np.all(np.isfinite(losses)):
            raise ValueError("quantizing some item makes a loss that is not finite: leave it out by a rule of its own")
        costs = np.array([[sum(found.bits(path, fmt) for path in item) for fmt in names] for item in found.items])
        values = [sum(found.values[path].size for path in item) for item in found.items]
        chosen = choose(costs, losses, budget_bits * sum(values), exact=exact)
        picked = {path: names[c] for item, c in zip(found.items, chosen.choices, strict=True) for path in item}
        measured = runs.loss(found.with_formats(picked))
    items = tuple(
        PlannedItem(item, n, _name(names[c]), float(costs[i, c] / n), tuple(float(loss) for loss in losses[i]))
        for i, (item, n, c) in enumerate(zip(found.items, values, chosen.choices, strict=True))
    )
    return FormatPlan(
        found.rules(picked), items, tuple(_name(fmt) for fmt in names), chosen.cost / sum(values), budget_bits, base,
        base + chosen.loss, measured,
    )  # fmt: skip


class _Items:
    """The planned parameters, grouped into items that share an input.

    Attributes:
        items: the parameters' paths, item by item.
        values: arrays by path.
        decisions: the rules' decisions by path.
    """

    def __init__(self, params: Any, fn: Callable[..., Any], batch: Any, rules: tuple[Rule, ...]):
        self.params = params
        walk, numbers = function_walk(fn, params, batch), shared_inputs(fn, params, batch)
        inner, _ = split_collection(params)
        leaves = jax.tree_util.tree_flatten_with_path(inner, is_leaf=is_leaf)[0]
        self.values, self.decisions = {}, {}
        groups: dict[Any, list[str]] = {}
        for keys, leaf in leaves:
            path = join_path(keys)
            site = walk.sites.get(path)
            if site is None or not is_parameter(leaf) or not jnp.issubdtype(raw_value(leaf).dtype, jnp.floating):
                continue
            # Rules may name the module, too: "mlp/Dense_0" for "mlp/Dense_0/kernel".
            decision = decide(rules, site)
            module = path.rpartition("/")[0]
            outer = decide(rules, site._replace(path=module)) if module else decision
            if decision.weights is None or not site.axes or (outer.rule is not None and outer.rule.excludes):
                continue
            self.values[path], self.decisions[path] = raw_value(leaf), decision
            groups.setdefault(numbers.get(path, path), []).append(path)
        if not groups:
            raise ValueError("the rules quantize no parameter that the loss multiplies by: there is nothing to plan")
        self.items = [tuple(paths) for paths in groups.values()]

    def with_formats(self, formats: dict[str, str | Format | None]) -> Any:
        """Return the parameters, with those named in `formats` (path to format) rounded to their formats."""
        inner, put_back = split_collection(self.params)

        def one(keys, leaf):
            fmt = formats.get(join_path(keys))
            if fmt is None:
                return leaf
            return with_value(leaf, self._rounded(join_path(keys), fmt))

        return put_back(jax.tree_util.tree_map_with_path(one, inner, is_leaf=is_leaf))

    def error(self, path: str, fmt: str | Format, squares: jax.Array) -> float:
        """Return half the sum of squared rounding errors, each times its squared gradient."""
        difference = (self.values[path] - self._rounded(path, fmt)).astype(jnp.float32)
        return 0.5 * float((squares * difference**2).sum())

    def bits(self, path: str, fmt: str | Format | None) -> float:
        """Return the number of bits that a parameter takes in a format: codes and scales, or floats for None."""
        value = self.values[path]
        if fmt is None:
            return 8.0 * value.size * value.dtype.itemsize
        q = jax.eval_shape(lambda a: self._packed(path, a, fmt), jax.ShapeDtypeStruct(value.shape, value.dtype))
        return 8.0 * (q.codes.size + q.scales.size)

    def rules(self, formats: dict[str, str | Format | None]) -> tuple[Rule, ...]:
        """Return one rule for each pair of format and original rule, and a last rule that excludes everything else."""
        by_rule: dict[tuple[Any, Rule], list[str]] = {}
        for path, fmt in formats.items():
            rule = self.decisions[path].rule
            assert rule is not None
            by_rule.setdefault((fmt, rule), []).append(path)
        made = []
        for (fmt, rule), paths in by_rule.items():
            pattern = "|".join(map(_pattern, paths))
            if fmt is None:
                made.append(Rule(pattern, None))
            else:
                made.append(dataclasses.replace(rule, path=pattern, weight_fmt=fmt, module=None, optional=False))
        return *made, Rule(".*", None, optional=True)

    def _packed(self, path: str, value: Any, fmt: str | Format):
        decision: Decision = self.decisions[path]
        assert decision.rule is not None and decision.axis is not None
        how: Encoding = dataclasses.replace(decision.rule, weight_fmt=fmt).weights  # pyright: ignore[reportAssignmentType]
        own = decision.amax_axes if how.fmt.has_tensor_scale else ()
        return quantize(value, how, axis=decision.axis, amax_axes=own)

    def _rounded(self, path: str, fmt: str | Format) -> jax.Array:
        return self._packed(path, self.values[path], fmt).dequantize()


class _Runs:
    """Evaluates the loss and its gradient over all batches."""

    def __init__(self, fn: Callable[..., Any], batches: list[Any]):
        self._batches = [as_arguments(batch) for batch in batches]
        self._loss = jax.jit(lambda params, args, kwargs: jnp.asarray(fn(params, *args, **kwargs), jnp.float32))

    def loss(self, params: Any) -> float:
        """Return the mean loss over the batches."""
        return float(np.mean([self._loss(params, args, kwargs) for args, kwargs in self._batches]))

    def squares(self, params: Any, found: _Items) -> dict[str, jax.Array]:
        """Return the squared gradients of the planned parameters, averaged over the batches."""
        inner, put_back = split_collection(params)

        @jax.jit
        def gradients(values, args, kwargs):
            def loss(values):
                def one(keys, leaf):
                    path = join_path(keys)
                    return with_value(leaf, values[path]) if path in values else leaf

                tree = jax.tree_util.tree_map_with_path(one, inner, is_leaf=is_leaf)
                return self._loss(put_back(tree), args, kwargs)

            return jax.tree.map(lambda g: g.astype(jnp.float32) ** 2, jax.grad(loss)(values))

        total: Any = None
        for args, kwargs in self._batches:
            new = gradients(found.values, args, kwargs)
            total = new if total is None else jax.tree.map(jnp.add, total, new)
        return jax.tree.map(lambda a: a / len(self._batches), total)


def _name(fmt: str | Format | None) -> str | None:
    return fmt.name if isinstance(fmt, Format) else fmt


def _pattern(path: str) -> str:
    """Return a pattern that matches a parameter and, for a kernel, also its module."""
    module, _, name = path.rpartition("/")
    if module and name in ("kernel", "embedding", "weight"):
        return rf"{re.escape(module)}(?:/{name})?"
    return re.escape(path)
