"""`quantized`: a transformation of any JAX function that quantizes its products according to rules.

    arguments -> program (traced once per kind of arguments) -> sites -> decisions -> weights -> rewritten program
"""

import dataclasses
import functools
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
from jax.core import Tracer

from ifjax.arrays import QTensor, quantize
from ifjax.formats import Format
from ifjax.models.activations import without_gradient
from ifjax.models.adapters import Adapted
from ifjax.models.arguments import is_array
from ifjax.models.decisions import Decision, decide
from ifjax.models.leaves import abstract, is_leaf, is_parameter, raw_value, with_value
from ifjax.models.rewrite import How, Rewriter, Weight
from ifjax.models.rule_checks import check_used
from ifjax.models.rules import Rule, as_rules, training_rules
from ifjax.models.sites import NOT_READ, Site, Walk, classes_of, innermost, join_path, without_matmul
from ifjax.models.trace import sites_of
from ifjax.numerics.byte_order import native
from ifjax.training import Recipe

# Part of the key of jax.jit's caches: a program that was traced with an interceptor is not reused without it, and vice
# versa.
inside = jax.make_user_context(None)


def quantized(
    fn: Callable[..., Any],
    rules: Iterable[Rule] | Rule | Recipe | str | Format | None = None,
    *,
    calibration: Any = None,
    key: jax.Array | None = None,
    params: int | str | None = None,
) -> Callable[..., Any]:
    """Return fn with its products quantized according to `rules`; fn may use linen, NNX, Equinox, Haiku or plain JAX.

    fn is traced as by jax.jit, and its program is run with other products. Equations that no rule concerns run
    unchanged.

    - Packed parameters stay packed through transposes, reshapes, slices, casts, loops and calls until a product reads
      them. Any other operation gets them decoded.
    - Packed arguments outside the parameters, such as a cache of keys and values (`ifjax.pack_cache`), are updated
      packed and returned packed.
    - Float parameters that a rule quantizes are quantized on the fly. The values are the same, but this is slow, and
      differentiating with respect to them is an error.
    - Activations are rounded before a product if the rule has an `act_fmt`, with a straight-through gradient.
    - With recipes, each product of a parameter uses its rule's recipe in the forward and the backward pass, inside
      scans too. A recipe on a packed parameter multiplies by the stored values and quantizes the other operands; this
      is for training parameters beside it, such as LoRA's adapters (`ifjax.lora`).

    The result works under jit, grad, vmap, scan, remat and shard_map, and fn may use them. Wrap the loss rather than
    its gradient, because rules apply to products of the forward pass. Updates that fn makes to variables of NNX modules
    among its arguments are kept.

    Args:
        fn: any function, or an Equinox or NNX module, which is called with its own parameters.
        rules: as for `ifjax.quantize_params`, but None means no rules: only packed parameters. A string is a format's
            name. For training, a recipe's record or rules with recipes.
        calibration: from `ifjax.calibrate`, for rules with act_amax="static".
        key: key for recipes with noise, a fresh one for each step; it may be traced. Unless given, the key "quantize"
            of the keyword argument `rngs` is used, as linen's apply takes it.
        params: position or name of the argument that holds the parameters. Unless given: the keyword argument `params`
            or `variables`, else the first argument.

    Raises:
        ValueError: rules with recipes and a calibration are given. When called: a rule that is not optional has no
            effect on the parameters; the call is inside another `quantized` function or `ifjax.calibrate`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import ifjax
        >>> def mlp(params, x):
        ...     return jax.nn.relu(x @ params["up"]) @ params["down"]
        >>> params = {"up": jnp.ones((32, 64)), "down": jnp.ones((64, 32))}
        >>> x, rules = jnp.ones((2, 32)), ifjax.Rule(".*", "if4", act_fmt="if4")
        >>> packed, report = ifjax.quantize_params(params, rules, model=mlp, sample=x)
        >>> jax.jit(ifjax.quantized(mlp, rules))(packed, x).shape
        (2, 32)
    """
    if isinstance(rules, Recipe):
        rules = training_rules(rules)
    rules = () if rules is None else as_rules(rules)
    trains = any(rule.recipe is not None for rule in rules)
    if trains and calibration is not None:
        raise ValueError("calibration is for inference, and these rules have recipes: pass the ones without")
    return Quantized(fn, rules, calibration, key, params)


class Quantized:
    """A function with products quantized according to rules. Equal instances are the same key in JAX's caches."""

    def __init__(
        self, fn: Any, rules: tuple[Rule, ...], calibration: Any, key: Any, params: Any, statistics: Any = None
    ):
        self.fn, self.rules, self.calibration, self.key, self.params = fn, rules, calibration, key, params
        self.statistics = statistics  # collects the inputs of products, which then stay as they are
        self._tracing = jax.jit(self._traced, static_argnums=0)
        self._programs: dict[Any, _Program] = {}
        if not jax.tree_util.all_leaves([fn]):  # a module
            self._target: Any = _call
        else:
            self._target = fn
            functools.update_wrapper(self, fn, updated=())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Quantized) and self._identity() == other._identity()

    def __hash__(self) -> int:
        return hash(self._identity())

    def _identity(self):
        key = id(self.key) if self.key is not None else None
        fn = self.fn if self._target is self.fn else id(self.fn)
        return fn, self.rules, id(self.calibration), key, self.params, id(self.statistics)

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        return self if instance is None else functools.partial(self, instance)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call fn with quantized products and return its result."""
        if inside.value is not None:
            raise ValueError("this is inside another ifjax.quantized function or ifjax.calibrate: quantize once")
        if self._target is _call:
            args = (self.fn, *args)
        call = _Call.of(args, kwargs, self._holder(args, kwargs))
        if not self.rules and self.statistics is None and not any(map(_is_wrapped, call.arrays)):
            return self._target(*args, **kwargs)
        program = self._program(call)
        if not program.is_changed and not any(isinstance(a, Tracer) for a in call.arrays):
            return self._target(*args, **kwargs)
        key = self.key
        if key is None and isinstance(kwargs.get("rngs"), Mapping):
            key = kwargs["rngs"].get("quantize")
        outs, changed = program.run(call.arrays, key)
        for leaf, value in zip(program.info.changed, changed, strict=True):
            call.leaves[leaf].set_raw_value(value)
        return outs

    def _holder(self, args, kwargs) -> int | str | None:
        """Return the position or name of the argument that holds the parameters; None without arguments."""
        if self.params is not None:
            found = self.params in kwargs if isinstance(self.params, str) else self.params < len(args)
            if not found:
                raise ValueError(f"params={self.params!r} names no argument of this call")
            return self.params
        named = next((name for name in ("params", "variables") if name in kwargs), None)
        return named if named is not None else 0 if args else next(iter(kwargs), None)

    def _traced(self, spec: "_Spec", arrays: list[Any]) -> Any:
        """Trace fn; return its array results, new values of changed variables, and an `_Info` as static data."""
        leaves = spec.filled(arrays)
        args, kwargs = jax.tree.unflatten(spec.structure, leaves)
        modules = _modules_of(self.rules, self.calibration, self.statistics)
        with inside(object()), modules:
            result = self._target(*args, **kwargs)
        out, structure = jax.tree.flatten(result)
        kept = [leaf if not is_array(leaf) and not isinstance(leaf, int | float | complex) else None for leaf in out]
        changed = [
            i for i, leaf in enumerate(leaves)
            if hasattr(leaf, "get_raw_value")
            and i in spec.places and leaf.get_raw_value() is not arrays[spec.places[i]]
        ]  # fmt: skip
        info = _Info(structure, kept, changed, modules)
        return [a for a, other in zip(out, kept, strict=True) if other is None], \
            [leaves[i].get_raw_value() for i in changed], _Static(info)

    def _program(self, call: "_Call") -> "_Program":
        shapes = [abstract(a) if _is_wrapped(a) else a for a in call.arrays]
        traced = self._tracing.trace(call.spec, shapes)
        closed = traced.jaxpr
        info = traced.out_info[2].value
        if len(closed.jaxpr.invars) != len(shapes):  # fn closes over tracers of an outer transformation
            closed, out = jax.make_jaxpr(functools.partial(self._traced, call.spec), return_shape=True)(shapes)
            info = out[2].value
        kinds = tuple(jax.tree.structure(a) if _is_wrapped(a) else None for a in call.arrays)
        identity = id(closed), kinds
        if identity not in self._programs:
            self._programs[identity] = _Program(self, closed, info, call)
        return self._programs[identity]


class _Program:
    """A traced program with the rules' decisions for its parameters."""

    def __init__(self, owner: Quantized, closed: Any, info: "_Info", call: "_Call"):
        self.closed, self.info = closed, info
        trains = any(rule.recipe is not None for rule in owner.rules)
        walk = _walk(closed, info, call)
        rules = owner.rules
        self.hows: list[How | None] = [None] * len(call.arrays)
        self.weights: dict[int, tuple[Site, Decision]] = {}
        sites = []
        for path, i in call.parameters.items():
            value, site = call.arrays[i], walk.sites[path]
            site = site._replace(packed=_is_packed(value))
            site = site.in_training() if trains else site
            sites.append(site)
            decision = decide(rules, site)
            if owner.statistics is None:
                self._decide(i, value, site, decision, trains)
            elif decision.weights is not None or (_is_packed(value) and decision.reason is None):
                self.hows[i] = owner.statistics.expect(site.path, decision)
        for i, value in enumerate(call.arrays):
            if _is_wrapped(value) and self.hows[i] is None:
                self.hows[i] = How(is_state=i not in call.parameters.values())
        if rules and call.parameters:
            _check(rules, sites, walk)
        # Linen's attention was intercepted during tracing: its quantized products are already in the program.
        self.attends = any(decide(rules, site).operands for site in walk.sites.values() if site.operands)
        amax = None if owner.calibration is None else owner.calibration.amax
        self.rewriter = Rewriter(amax, None if owner.statistics is None else owner.statistics.note)
        self._jitted = jax.jit(self._run, inline=True)

    @property
    def is_changed(self) -> bool:
        """Whether the rules change any product of the program."""
        return self.attends or any(how is not None for how in self.hows)

    def _decide(self, i: int, value: Any, site: Site, decision: Decision, trains: bool) -> None:
        rule, packed = decision.rule, _is_packed(value)
        if trains:
            if decision.recipe is not None:
                self.hows[i] = How(recipe=decision.recipe)
            return
        if rule is None or not (packed or decision.weights is not None) or (packed and decision.reason is not None):
            return
        if rule.gptq and not packed:
            raise ValueError(f"{site.path!r}: gptq needs packed parameters: make them with ifjax.quantize_params")
        if (rule.smooth is not None or rule.rotate is not None) and not packed:
            raise ValueError(
                f"{site.path!r}: smooth and rotate need packed parameters: make them with ifjax.quantize_params"
            )
        static = rule.act_amax == "static" and decision.activations is not None
        self.hows[i] = How(decision.activations, rule.act_amax, name=site.path if static else "")
        if not packed:
            self.weights[i] = site, decision

    def run(self, arrays: list[Any], key: Any) -> tuple[Any, list[Any]]:
        """Return fn's results in its own structure, and new values of changed variables."""
        direct = not self.is_changed or any(isinstance(a, Tracer) for a in self.closed.consts)
        run = self._run if direct else self._jitted
        outs = run(list(self.closed.consts), arrays, key)
        count = sum(other is None for other in self.info.kept)
        given = iter(outs[:count])
        result = [next(given) if other is None else other for other in self.info.kept]
        return jax.tree.unflatten(self.info.structure, result), outs[count:]

    def _run(self, consts: list[Any], arrays: list[Any], key: Any) -> list[Any]:
        values = []
        for i, (value, how) in enumerate(zip(arrays, self.hows, strict=True)):
            if isinstance(value, Adapted) and not _is_packed(value):
                value = value.dequantize()
            if i in self.weights:
                site, decision = self.weights[i]
                assert decision.weights is not None and decision.axis is not None
                assert not isinstance(value, Adapted)
                kernel = without_gradient(value, site.path)
                value = quantize(kernel, decision.weights, axis=decision.axis, amax_axes=decision.amax_axes)
            values.append(value if how is None else Weight.of(value, how))
        outs = self.rewriter.run(_Open(self.closed.jaxpr, consts), values, key)
        return [out.result() if isinstance(out, Weight) else out for out in outs]


def _is_wrapped(value: Any) -> bool:
    """Return whether a value is a QTensor or an Adapted weight, which fn itself may not take."""
    return isinstance(value, QTensor | Adapted)


def _is_packed(value: Any) -> bool:
    return isinstance(value.base if isinstance(value, Adapted) else value, QTensor)


class _Open(NamedTuple):
    """A jaxpr and its constants; a ClosedJaxpr whose constants may be tracers."""

    jaxpr: Any
    consts: list[Any]


class _Spec(NamedTuple):
    """The static part of a call, hashable: the arguments' structure and the leaves that are not arrays.

    Attributes:
        structure: tree structure of (args, kwargs).
        leaves: for each leaf: None for an array, a `_Box` for a boxed array, or a 1-tuple of any other leaf.
        arrays: for each leaf: the index of its array; None if it has none.
    """

    structure: Any
    leaves: tuple[Any, ...]
    arrays: tuple[int | None, ...]

    @property
    def places(self) -> dict[int, int]:
        """Array index by leaf index, for leaves that have an array."""
        return {i: k for i, k in enumerate(self.arrays) if k is not None}

    def filled(self, arrays: list[Any]) -> list[Any]:
        """Return the leaves with these arrays. A variable that occurs several times stays one object."""
        made: dict[int, Any] = {}
        out = []
        for leaf, k in zip(self.leaves, self.arrays, strict=True):
            if k is None:
                out.append(leaf[0])
                continue
            if k not in made:
                made[k] = arrays[k] if leaf is None else leaf.around(arrays[k])
            out.append(made[k])
        return out


class _Box:
    """A Flax box or variable without its value. Instances of equal type and metadata are equal."""

    def __init__(self, leaf: Any):
        self.leaf = with_value(leaf, None) if hasattr(leaf, "get_raw_value") else leaf.replace_boxed(None)
        self.key = type(leaf), repr(self.leaf)

    def around(self, array: Any) -> Any:
        """Return the box or variable with an array as its value."""
        return with_value(self.leaf, array)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Box) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)


class _Call(NamedTuple):
    """The arguments of a call.

    Attributes:
        leaves: all leaves of the arguments.
        arrays: the arrays and QTensors among them, unboxed.
        spec: the static part of the call.
        parameters: array index by path, for the argument that holds the parameters.
        tree: that argument.
    """

    leaves: list[Any]
    arrays: list[Any]
    spec: _Spec
    parameters: dict[str, int]
    tree: Any

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: dict[str, Any], holder: int | str | None) -> "_Call":
        """Split a call; `holder` is the position or name of the argument that holds the parameters."""
        flat, structure = jax.tree_util.tree_flatten_with_path((args, kwargs), is_leaf=is_leaf)
        arrays, static, numbers, parameters, seen = [], [], [], {}, {}
        own = "0" if isinstance(holder, int) else "1"
        for keys, leaf in flat:
            value = raw_value(leaf)
            if _is_whole_module(leaf):
                raise TypeError(
                    f"{type(leaf).__name__} at {join_path(keys)!r} is an NNX module that is no tree of arrays "
                    "(pytree=False): pass its state, graph, state = nnx.split(module), and merge them inside fn"
                )
            if not is_array(value):
                static.append((leaf,))
                numbers.append(None)
                continue
            boxed = value is not leaf
            if id(leaf) not in seen or not boxed:
                seen[id(leaf)] = len(arrays)
                arrays.append(native(value))
            static.append(_Box(leaf) if boxed else None)
            numbers.append(seen[id(leaf)])
            path = join_path(keys)
            first, _, rest = path.partition("/")
            name, _, rest = rest.partition("/")
            if first == own and name == str(holder) and is_parameter(leaf):
                parameters.setdefault(rest, seen[id(leaf)])
        tree = None if holder is None else args[holder] if isinstance(holder, int) else kwargs[holder]
        if isinstance(tree, Mapping) and isinstance(tree.get("params"), Mapping):
            parameters = {path[7:]: i for path, i in parameters.items() if path.startswith("params/")}
            tree = tree["params"]
        spec = _Spec(structure, tuple(static), tuple(numbers))
        return cls([leaf for _, leaf in flat], arrays, spec, parameters, tree)


class _Info:
    """Results of tracing: structure of the result, its non-array leaves, indices of changed variables, modules."""

    def __init__(self, structure: Any, kept: list[Any], changed: list[int], modules: Any):
        self.structure, self.kept, self.changed, self.modules = structure, kept, changed, modules


@jax.tree_util.register_static
class _Static:
    """A value that a traced function returns as static data."""

    def __init__(self, value: Any):
        self.value = value


class _NoModules:
    """Stands in for `Noting` when flax.linen is not imported."""

    def __enter__(self):
        return self

    def __exit__(self, *error: Any):
        return None

    def explain(self, sites: Iterable[Site]) -> Walk:
        """Return a Walk of the sites, without modules."""
        return Walk({site.parameter: site for site in sites}, {})


def _modules_of(rules: tuple[Rule, ...], calibration: Any, statistics: Any) -> Any:
    """Return a context that records the linen modules called inside it."""
    if "flax.linen" not in sys.modules:
        return _NoModules()
    from ifjax.models.flax.interceptors import Noting

    return Noting(rules, calibration, statistics)


def _walk(closed: Any, info: _Info, call: _Call) -> Walk:
    """Return the sites of the parameters, completed from the linen, NNX or Equinox modules that own them."""
    walk = info.modules.explain(sites_of(closed, call.parameters).values())
    if walk.modules:
        return walk
    nnx = sys.modules.get("flax.nnx")
    if nnx is not None and isinstance(call.tree, nnx.Module):
        from ifjax.models.flax.nnx import explain

        return explain(call.tree, walk.sites)
    classes = classes_of(call.tree)
    named = {p: site._replace(module=innermost(p.rpartition("/")[0], classes)) for p, site in walk.sites.items()}
    return Walk(named, classes)


def _check(rules: tuple[Rule, ...], sites: list[Site], walk: Walk) -> None:
    """Raise if a rule has no effect. Unread parameters count as quantizable: another function may read them."""
    unread = [site for site in sites if site.reason == NOT_READ]
    known = [site for site in sites if site.reason != NOT_READ] + [s for s in walk.sites.values() if s.operands]
    around = {path[:i] for path in (site.parameter for site in unread) for i, c in enumerate(path) if c == "/"}
    known += [Site(site.parameter, site.path, site.module, packed=True) for site in unread]
    known += without_matmul(walk.modules, known)
    known += [Site(path, path, packed=True) for path in sorted(around - walk.modules.keys())]
    lenient = [
        dataclasses.replace(rule, optional=True) if unread and rule.module is not None else rule for rule in rules
    ]
    check_used(lenient, known)


def _is_whole_module(leaf: Any) -> bool:
    nnx = sys.modules.get("flax.nnx")
    return nnx is not None and isinstance(leaf, nnx.Module)


def _call(module: Any, *args: Any, **kwargs: Any) -> Any:
    return module(*args, **kwargs)
