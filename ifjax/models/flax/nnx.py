"""NNX support: a variable that holds packed values and reads as an array, the kernels of a model, training recipes."""

from collections.abc import Iterable, Iterator
from typing import Any, TypeVar, cast

import jax
import numpy as np
from flax import nnx
from flax.typing import MISSING
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from ifjax.arrays import QTensor, shardings
from ifjax.arrays.sharding import partition_specs
from ifjax.models.arguments import as_arguments
from ifjax.models.decisions import decide
from ifjax.models.rule_checks import check_used
from ifjax.models.rules import Rule, training_rules
from ifjax.models.sites import Site, Walk, explained, innermost, join_path, without_matmul
from ifjax.models.trace import program_of, trace_tree
from ifjax.training import Recipe, quantized_dot_general

M = TypeVar("M", bound=nnx.Module)


class PackedParam(nnx.Variable):
    """A parameter that stays packed: its raw value is a QTensor, and modules read the dequantized array.

    An NNX model uses it like an `nnx.Param`: `param[...]`, `get_value`, arithmetic and `jnp` functions decode it,
    inside the traced program. Only `get_raw_value()` returns the QTensor. Split, merge, state, jit, scan, vmap and
    eval_shape carry the packed bytes.

    It is a Variable but not a Param, because it cannot be trained: `nnx.grad` and `nnx.Optimizer(wrt=nnx.Param)` see
    only the other parameters, such as LoRA's. Name it beside Param in every filter that means all weights:
    `nnx.state(model, (nnx.Param, PackedParam))`, `nnx.StateAxes({(nnx.Param, PackedParam): 0, ...})`. A gradient with
    respect to it raises JAX's TypeError about uint8 inputs. `nnx.grad` with `graph=False` or `graph_updates=False`
    raises it, too, because these differentiate everything: split the model and differentiate one part. Optimizer states
    of packed values are meaningless but raise no error: exclude them from `wrt`.

    Values that are not arrays, as in trees of shardings, are returned unchanged. An abstract QTensor reads as a
    ShapeDtypeStruct. `nnx.to_pure_dict` decodes, and `nnx.tabulate` counts decoded bytes; use `nnx.as_pure` for the
    packed ones.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> import ifjax
        >>> layer = nnx.Linear(64, 32, rngs=nnx.Rngs(0))
        >>> layer.kernel = PackedParam.like(layer.kernel, ifjax.quantize(layer.kernel[...], "if4", axis=-2))
        >>> layer(jnp.ones((2, 64))).shape
        (2, 32)
        >>> layer.kernel.get_raw_value()
        QTensor(if4, 64x32 float32, axis=-2, 4.516 bits a value)
    """

    def __init__(self, value: QTensor, **metadata: Any):
        # The base class must not see out_sharding: it would apply it to every array of the QTensor, whose axes differ.
        place = metadata.pop("out_sharding", None)
        super().__init__(_checked(value), hijax=False, ref=False, **metadata)
        if place is not None:
            self.set_metadata(out_sharding=place)

    @classmethod
    def like(cls, param: nnx.Variable, q: QTensor) -> "PackedParam":
        """Return a PackedParam of q with the axis names and all other metadata of `param`.

        Raises:
            TypeError: q is not a QTensor.
            ValueError: the shapes differ.
        """
        if _checked(q).shape != param.shape:
            raise ValueError(f"the parameter has shape {param.shape}, the QTensor {q.shape}: quantize this parameter")
        # A packed value is never updated in place, so it needs neither a reference nor a variable of JAX's own.
        return cast(PackedParam, cls.from_metadata(q, param.get_metadata() | {"hijax": False, "ref": False}))

    def get_value(self, *, index: Any = ...) -> Float[Array, "..."]:
        """Return the decoded array in the original dtype, indexed by `index` if one is given."""
        q = self._raw_value
        if not isinstance(q, QTensor):  # a traced array of `quantized`, or a tree that Flax put here, as of shardings
            return q if index is ... else q[index]
        if isinstance(q.codes, jax.ShapeDtypeStruct):
            shape: Any = jax.ShapeDtypeStruct(q.shape, q.dtype)
            return shape if index is ... else jax.eval_shape(lambda a: a[index], shape)
        if not all(isinstance(a, jax.Array | np.ndarray) for a in (q.codes, q.scales)):
            return q  # pyright: ignore[reportReturnType]
        value = q.dequantize()
        return value if index is ... else value[index]

    def set_value(self, value: QTensor, *, index: Any = ...) -> None:
        """Replace the value by another QTensor of the same shape.

        Raises:
            TypeError: `value` is not a QTensor, or an index is given.
            ValueError: the shapes differ.
        """
        if index is not ...:
            raise TypeError("a PackedParam is set as a whole: decode it, change the array, and quantize that")
        value = _spread(self._raw_value, value)  # nnx.eval_shape sets shardings this way
        if _checked(value).shape != self.shape:
            raise ValueError(f"the PackedParam has shape {self.shape}, the QTensor {value.shape}")
        self.set_raw_value(value)

    def set_raw_value(self, value: Any, **checks: bool) -> None:
        """Set the raw value like `nnx.Variable`, but raise TypeError for an array."""
        super().set_raw_value(_not_an_array(value), **checks)

    def update_from_state(self, variable_state: nnx.Variable) -> None:
        """Update from a state like `nnx.Variable`, but raise TypeError for a variable that holds an array."""
        _not_an_array(variable_state.get_raw_value())
        super().update_from_state(variable_state)

    def copy(self, value: Any = MISSING, **updates: Any) -> nnx.Variable:
        """Return a copy, with another value if one is given. A spec or sharding is adapted to each packed array."""
        return super().copy(_not_an_array(_spread(self._raw_value, value)), **updates)

    replace = to_state = copy

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the dequantized array."""
        return self._raw_value.shape

    def __getattr__(self, name: str) -> Any:
        metadata = object.__getattribute__(self, "_var_metadata")
        if name in metadata:
            return metadata[name]
        raw = object.__getattribute__(self, "_raw_value")
        if name in ("dtype", "ndim", "size") or not isinstance(raw, QTensor):
            return getattr(raw, name)
        # Attributes of arrays, such as `kernel.T` or `kernel.astype`, come from the decoded array. Other names raise
        # without decoding.
        if name.startswith("_") or not hasattr(jax.Array, name):
            raise AttributeError(f"{type(self).__name__} has no {name!r}; its QTensor is param.get_raw_value()")
        return getattr(self.get_value(), name)

    def __nnx_repr__(self):
        # Show the QTensor instead of the decoded array.
        for part in super().__nnx_repr__():
            is_value = getattr(part, "key", None) == "value"
            yield type(part)("value", self._raw_value) if is_value else part


def walk(model: nnx.Module, sample: Any = None, method: Any = None) -> Walk:
    """Find the parameters that an NNX model multiplies by, and their contracted axes; a shared one is found once.

    With a sample, the model is traced on shapes (see `ifjax.trace_products`). Without one, the axes follow from the
    fields of Flax's own modules; a subclass counts as its base class. A kernel with additional leading axes, as from
    nnx.vmap, is stacked along these. A kernel of any other shape is treated as a parameter of unknown use. Variables
    that are neither Param nor PackedParam (statistics, caches, random states) are ignored. Abstract models, as from
    `nnx.eval_shape`, work, too.

    Raises:
        TypeError: `model` is not an NNX module.

    Example:
        >>> from flax import nnx
        >>> found = walk(nnx.LinearGeneral((2, 8), 4, axis=(-2, -1), rngs=nnx.Rngs(0)))
        >>> found.sites["kernel"].axes, found.sites["bias"].reason
        ((-3, -2), 'a bias is added')
    """
    if not isinstance(model, nnx.Module):
        raise TypeError(
            f"walk needs an nnx.Module, got {type(model).__name__}: of a split model, write "
            "walk(nnx.merge(graphdef, state))"
        )
    modules = {join_path(map(str, path)): type(m).__name__ for path, m in nnx.iter_modules(model) if _is_module(m)}
    states = [(path, v) for path, v in nnx.to_flat_state(nnx.state(model)) if is_parameter(v)]
    sites = [_site_of(model, modules, path, variable) for path, variable in states]
    known = Walk({site.parameter: site for site in sites}, modules)
    return known if sample is None else _traced(model, known, sample, method)


def _traced(model: nnx.Module, known: Walk, sample: Any, method: Any) -> Walk:
    """Return the sites of the traced model, completed from `known`, the sites that its modules give."""
    return _explained(known, trace_tree(*_function_of(model, method), as_arguments(sample)))


def program(model: nnx.Module, sample: Any, method: Any = None) -> tuple[Any, list[str]]:
    """Return the ClosedJaxpr of an NNX model and the paths of its parameters, which are its first inputs."""
    return program_of(*_function_of(model, method), as_arguments(sample))


def _function_of(model: nnx.Module, method: Any) -> tuple[Any, Any]:
    """Return a function of a model's state, the arguments and those by keyword; and the state."""
    graph, state = nnx.split(model)
    call: Any = type(model).__call__ if method is None else method
    call = getattr(type(model), call) if isinstance(call, str) else call
    return lambda state, args, kwargs: call(nnx.merge(graph, state), *args, **kwargs), state


def explain(model: nnx.Module, sites: dict[str, Site]) -> Walk:
    """Return traced sites of a model's parameters, completed from the model's modules."""
    return _explained(walk(model), sites)


def _explained(known: Walk, sites: dict[str, Site]) -> Walk:
    found = {}
    for path, site in sites.items():
        told = known.sites.get(path)
        if told is not None and told.axes:
            told = told._replace(shape=told.shape[len(told.stacked) :], reason=None, training=None)
        else:
            if told is not None and told.reason is not None:
                site = site._replace(axes=(), reason=told.reason)
            told = None
        found[path] = explained(site._replace(module=innermost(path, known.modules)), told)
    return Walk(found, known.modules)


def with_recipes(
    model: M, rules: Iterable[Rule] | Rule | Recipe | str | None, *, rngs: nnx.Rngs | nnx.RngStream | None = None
) -> M:
    """Return a copy of an NNX model whose products use the rules' recipes, forward and backward, for training.

    Each Linear and LinearGeneral that a rule with a recipe matches gets a `dot_general` (`RecipeProduct`), including
    those inside attention and recurrent cells. Modules that cannot take a `dot_general` (Einsum, Embed, Conv) stay
    unchanged; a rule that matches nothing else is an error. Parameters and their paths are those of `model`, so any
    optimizer and checkpoint works. `nnx.update(model, nnx.state(trained, nnx.Param))` copies the trained parameters
    back, for `ifjax.quantize_params`. Packed parameters (`PackedParam`) are multiplied by as they are stored and get no
    gradient, for what trains beside them; the recipe rounds the other operands.

    Noise comes from a stream in each module, as in nnx.Dropout: its key and count are part of the state, and each call
    draws a new key. Layers that nnx.vmap stacked along the first axes have stacked keys.

    Args:
        rules: as for `ifjax.interceptors.training`; None removes the recipes of an earlier call.
        rngs: for recipes with noise; the stream "quantize" if there is one, else the default stream.

    Raises:
        TypeError: `model` is not an NNX module.
        ValueError: a rule has no effect; a recipe needs noise and rngs is None.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> import ifjax
        >>> model = nnx.Sequential(nnx.Linear(32, 64, rngs=nnx.Rngs(0)), nnx.relu, nnx.Linear(64, 4, rngs=nnx.Rngs(1)))
        >>> trained = ifjax.with_recipes(model, "nvfp4", rngs=nnx.Rngs(quantize=2))
        >>> grads = nnx.jit(nnx.grad(lambda model, x: model(x).sum()))(trained, jnp.ones((8, 32)))
        >>> grads.layers[0].kernel.shape
        (32, 64)
    """
    rules = () if rules is None else training_rules(rules)
    found, copy = walk(model), nnx.clone(model)
    sites = [site.in_training() for site in found.sites.values() if site.axes]
    if rules:
        check_used(rules, sites + without_matmul(found.modules, sites))
    modules: dict[str, Any] = {join_path(map(str, path)): module for path, module in nnx.iter_modules(copy)}
    for module in modules.values():
        if isinstance(getattr(module, "dot_general", None), RecipeProduct):
            module.dot_general = nnx.static(lax.dot_general)
    for site in sites:
        decision, module = decide(rules, site), modules[site.path]
        if decision.rule is None or decision.rule.recipe is None:
            continue
        if decision.recipe is not None:
            packed = isinstance(_parameter(module, site).get_raw_value(), QTensor)
            recipe = decision.recipe.over_packed() if packed else decision.recipe
            module.dot_general = nnx.data(_product(recipe, site, module, rngs))
    return copy


def _product(recipe: Recipe, site: Site, module: nnx.Module, rngs: nnx.Rngs | nnx.RngStream | None):
    if not recipe.needs_key:
        return RecipeProduct(recipe)
    if rngs is None:
        raise ValueError(f"recipe {recipe.name!r} draws noise: pass rngs=nnx.Rngs(quantize=0)")
    stream = rngs.quantize if isinstance(rngs, nnx.Rngs) else rngs
    lead = _parameter(module, site).shape[: len(site.stacked)]
    return RecipeProduct(recipe, stream.split(lead) if lead else stream.fork())


def _parameter(module: nnx.Module, site: Site) -> nnx.Variable:
    return getattr(module, site.parameter.rpartition("/")[2])


class RecipeProduct(nnx.Module):
    """`ifjax.quantized_dot_general` with a fixed recipe, for the field `dot_general` of an NNX module.

    Attributes:
        recipe: the recipe's record.
        stream: random stream that gives a new key for each call; None for recipes without noise.
    """

    def __init__(self, recipe: Recipe, stream: nnx.RngStream | None = None):
        self.recipe, self.stream = recipe, nnx.data(stream)

    def __call__(self, lhs, rhs, dimension_numbers, precision=None, preferred_element_type=None, out_sharding=None):
        return quantized_dot_general(
            lhs, rhs, dimension_numbers, self.recipe, None if self.stream is None else self.stream(),
            precision=precision, preferred_element_type=preferred_element_type, out_sharding=out_sharding,
        )  # fmt: skip


def is_parameter(variable: nnx.Variable) -> bool:
    """Return whether a variable is a weight, not a statistic, cache or random state."""
    return isinstance(variable, nnx.Param | PackedParam)


def _site_of(
    model: nnx.Module, modules: dict[str, str], path: tuple[Any, ...], variable: nnx.Variable
) -> Site:
    """Return the site of a parameter, as far as the fields of its modules tell it."""
    above = list(_modules_above(model, path))
    depth, module = above[-1]
    parameter, owner, name = ("/".join(map(str, part)) for part in (path, path[:depth], path[depth:]))
    q, shape = variable.get_raw_value(), tuple(np.shape(variable.get_raw_value()))
    unknown = Site(parameter, parameter, innermost(parameter, modules), shape, packed=isinstance(q, QTensor))
    axes, own_shape = _contraction(module, name)
    reason = _reason(module, name, axes)
    rank = len(own_shape)
    if reason is not None or not axes or shape[len(shape) - rank :] != own_shape:
        return unknown._replace(reason=reason)
    rewriter = next((m for _, m in above if isinstance(m, nnx.SpectralNorm | nnx.WeightNorm)), None)
    if unknown.packed:
        axes, rewriter = (q.axis,), None
    return unknown._replace(
        path=owner, module=type(module).__name__, axes=axes, stacked=tuple(range(-len(shape), -rank)),
        activations=_FLOAT_ACTIVATIONS, training=_training_refusal(module),
        reason=None if rewriter is None else f"{type(rewriter).__name__} rewrites it at every call",
    )  # fmt: skip


def _is_module(node: Any) -> bool:
    """Return whether a node is a module other than nnx.List and nnx.Dict."""
    return isinstance(node, nnx.Module) and not isinstance(node, nnx.List | nnx.Dict)


def _modules_above(model: nnx.Module, path: tuple[Any, ...]) -> Iterator[tuple[int, nnx.Module]]:
    """Yield (depth, module) for each module on the path to a variable, the model first."""
    yield 0, model
    node = model
    for depth, key in enumerate(path[:-1], start=1):
        node = _child(node, key)
        if _is_module(node):
            yield depth, node


def _child(node: Any, key: Any) -> Any:
    return getattr(node, key) if isinstance(key, str) and hasattr(node, key) else node[key]


_NO_MATMUL = (
    nnx.BatchNorm, nnx.LayerNorm, nnx.RMSNorm, nnx.GroupNorm, nnx.InstanceNorm, nnx.WeightNorm, nnx.SpectralNorm,
    nnx.PReLU,
)  # fmt: skip
_WITH_KERNEL = (nnx.Linear, nnx.LinearGeneral, nnx.Einsum, nnx.Conv, nnx.ConvTranspose)
_FLOAT_ACTIVATIONS = "NNX modules multiply by themselves: only linen modules can be intercepted"


def _reason(module: nnx.Module, name: str, axes: tuple[int, ...]) -> str | None:
    """Return why the module's parameter of this name is not a kernel; None if it is one or the module does not tell."""
    if isinstance(module, _NO_MATMUL):
        return f"{type(module).__name__} has no matmul"
    if isinstance(module, nnx.LoRA) and name in ("lora_a", "lora_b"):
        return "LoRA's factors are there to be trained"
    if isinstance(module, _WITH_KERNEL) and name == "bias":
        return "a bias is added"
    if isinstance(module, nnx.Einsum) and name == "kernel" and module.einsum_str is not None and not axes:
        return f"{module.einsum_str!r} contracts none of its axes, or takes a diagonal"
    return None


def _training_refusal(module: nnx.Module) -> str | None:
    """Return why no recipe applies to the module; None if one does."""
    if not isinstance(module, nnx.Linear | nnx.LinearGeneral):
        return f"nnx.{type(module).__name__} has no place for another product, only Linear and LinearGeneral have"
    product = module.dot_general
    free = isinstance(product, RecipeProduct) or product in (None, lax.dot_general)
    if free and getattr(module, "dot_general_cls", None) is None:
        return None
    return "the module has a dot_general of its own"


def _contraction(module: Any, name: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the contraction axes and the unstacked shape of the module's parameter; ((), ()) if it is not a kernel."""
    if isinstance(module, nnx.Embed) and name == "embedding":
        return (-1,), (module.num_embeddings, module.features)
    if not isinstance(module, _WITH_KERNEL) or name != "kernel":
        return (), ()
    if isinstance(module, nnx.Linear):
        return (-2,), (module.in_features, module.out_features)
    if isinstance(module, nnx.LinearGeneral):  # [*batch, *in, *out]
        before, after = len(module.in_features), len(module.out_features)
        shape = (*module.batch_axis.values(), *module.in_features, *module.out_features)
        return tuple(range(-after - before, -after)), shape
    shape = tuple(module.kernel_shape)
    if isinstance(module, nnx.Einsum):
        return _of_einsum(module.einsum_str, len(shape)), shape
    if isinstance(module, nnx.ConvTranspose) and module.transpose_kernel:  # [*window, out, in]
        return (-1,), shape
    return (-2,), shape  # [*window, in, out]


def _of_einsum(equation: str | None, ndim: int) -> tuple[int, ...]:
    if equation is None:  # each call passes its own equation
        return ()
    inputs, kernel, result = equation.replace(" ", "").replace("->", ",").split(",")
    before, _, after = kernel.partition("...")
    # Axes of an ellipsis are never contracted, because jnp.einsum keeps them in the result.
    letters = [*before, *[None] * (ndim - len(before) - len(after)), *after]
    summed = [letter for letter in letters if letter is not None and letter in inputs and letter not in result]
    if len(set(summed)) < len(summed):  # a repeated label takes a diagonal of the kernel
        return ()
    return tuple(letters.index(letter) - ndim for letter in summed)


def _spread(q: Any, value: Any) -> Any:
    """Return a spec or sharding that Flax meant for one array, adapted to each array of q; other values unchanged."""
    if isinstance(q, QTensor):
        if isinstance(value, PartitionSpec):
            return partition_specs(q, value)
        if isinstance(value, jax.ShapeDtypeStruct) and value.sharding is not None:
            return jax.tree.map(_abstract, q, shardings(q, value.sharding))
    return value


def _abstract(a: Any, sharding: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding)


def _checked(q: Any) -> QTensor:
    if not isinstance(q, QTensor):
        raise TypeError(
            f"a PackedParam holds a QTensor, got {type(q).__name__}: make one with ifjax.quantize, along the "
            "contraction axis of the parameter (axis=-2 for [in, out])"
        )
    return q


def _not_an_array(value: Any) -> Any:
    return _checked(value) if isinstance(value, jax.Array | np.ndarray) else value
