"""Bits where they matter: which format each layer takes under a budget, from what each costs the loss.

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
    """Parameters that share an input and so one format.

    Attributes:
        paths: of the parameters.
        values: how many they have.
        fmt: the format they take; None for floats.
        bits: a value, scales included, a tensor's amax not.
        losses: what each of the plan's formats was measured to add to the loss.
    """

    paths: tuple[str, ...]
    values: int
    fmt: str | None
    bits: float
    losses: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class FormatPlan:
    """What `plan_formats` chose. As text it is a table.

    Attributes:
        rules: for `ifjax.quantize_params` and `ifjax.quantized`, the first match wins.
        items: in the order of the parameters.
        formats: those that could be chosen.
        bits: a value over all items.
        budget_bits: as it was asked for.
        base_loss: of the floats.
        predicted_loss: base_loss and the sum of what each item was measured to add.
        measured_loss: with the whole plan. That errors add up is an assumption: compare it with the prediction.
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
        """Write the rules as YAML or JSON, for `ifjax.load_rules` and `ifjax quantize --rules`."""
        save_rules(self.rules, path)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, without the rules."""
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
    """Choose a format for each layer so that the loss grows least within a budget of bits.

    Parameters whose products share an input (query, key and value; gate and up) are one item and take one format; the
    program tells which. The choice is never over the budget, and never predicted to be worse than one format for all
    that fits it.

    Args:
        params: a tree of float parameters, as for `ifjax.quantize_params`.
        fn: a function of (params, *batch) that returns the loss, a scalar: the mean over the batch.
        batches: for calibration: tuples of positional arguments, mappings of keyword ones, or the only one.
        formats: that may be chosen, in any order; None for floats.
        budget_bits: mean bits a value over all items, scales included. (A tensor's amax, 4 bytes, is not counted.)
        rules: which parameters are planned: those that these rules quantize; all but embeddings and heads unless given.
            Other options of the rule that matches (search, loss, act_fmt) are kept.
        sensitivity: "direct" takes the loss with one item quantized at a time: as many runs as items times formats.
            "fisher" needs one backward pass a batch: half the sum of squared gradients times squared errors of weights.
        exact: also solve the knapsack by dynamic programming; the greedy choice alone can be far off with few items.
        progress: whether to show a bar on stderr; where it is a terminal unless given.

    Raises:
        ValueError: nothing to plan; the budget is below the cheapest format; a loss that is not finite.

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
    """The parameters that are planned, in items that share an input.

    Attributes:
        items: paths of each.
        values: arrays by path.
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
            # Rules are for modules as well: "mlp/Dense_0" of "mlp/Dense_0/kernel".
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
        """The parameters, those named rounded to formats."""
        inner, put_back = split_collection(self.params)

        def one(keys, leaf):
            fmt = formats.get(join_path(keys))
            if fmt is None:
                return leaf
            return with_value(leaf, self._rounded(join_path(keys), fmt))

        return put_back(jax.tree_util.tree_map_with_path(one, inner, is_leaf=is_leaf))

    def error(self, path: str, fmt: str | Format, squares: jax.Array) -> float:
        """Half the squared error of the weights, each times its squared gradient."""
        difference = (self.values[path] - self._rounded(path, fmt)).astype(jnp.float32)
        return 0.5 * float((squares * difference**2).sum())

    def bits(self, path: str, fmt: str | Format | None) -> float:
        """Of codes and scales."""
        value = self.values[path]
        if fmt is None:
            return 8.0 * value.size * value.dtype.itemsize
        q = jax.eval_shape(lambda a: self._packed(path, a, fmt), jax.ShapeDtypeStruct(value.shape, value.dtype))
        return 8.0 * (q.codes.size + q.scales.size)

    def rules(self, formats: dict[str, str | Format | None]) -> tuple[Rule, ...]:
        """One for each format and rule that it comes from, and a last one that leaves everything else alone."""
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
    """The loss and its gradient over all batches."""

    def __init__(self, fn: Callable[..., Any], batches: list[Any]):
        self._batches = [as_arguments(batch) for batch in batches]
        self._loss = jax.jit(lambda params, args, kwargs: jnp.asarray(fn(params, *args, **kwargs), jnp.float32))

    def loss(self, params: Any) -> float:
        """The mean over batches."""
        return float(np.mean([self._loss(params, args, kwargs) for args, kwargs in self._batches]))

    def squares(self, params: Any, found: _Items) -> dict[str, jax.Array]:
        """Squared gradients of the planned parameters, the mean over batches."""
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
    """A pattern for a parameter, and for the module that it is the kernel of."""
    module, _, name = path.rpartition("/")
    if module and name in ("kernel", "embedding", "weight"):
        return rf"{re.escape(module)}(?:/{name})?"
    return re.escape(path)
