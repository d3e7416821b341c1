"""NNX: a variable that holds packed values and reads as an array, and where a model's matmul kernels are."""

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
from ifjax.models.trace import trace_tree
from ifjax.training import Recipe, quantized_dot_general

M = TypeVar("M", bound=nnx.Module)


class PackedParam(nnx.Variable):
    """A parameter that is kept packed: the raw value is a QTensor, and modules read the array that it stands for.

    Any NNX model applies on it as on an `nnx.Param`: `param[...]`, `get_value`, arithmetic and `jnp` functions decode,
    inside the program where they are traced. Only `get_raw_value()` gives the QTensor. Split, merge, state, jit, scan,
    vmap and eval_shape carry the packed bytes.

    It is a Variable but not a Param, because nothing can train it: `nnx.grad` and `nnx.Optimizer(wrt=nnx.Param)` see
    the parameters that are left, LoRA's among them. For the same reason name it beside Param wherever a filter means
    all weights: `nnx.state(model, (nnx.Param, PackedParam))`, `nnx.StateAxes({(nnx.Param, PackedParam): 0, ...})`.
    A gradient with respect to it is JAX's TypeError about uint8 inputs. That is also what `nnx.grad` says with
    `graph=False` or `graph_updates=False`, which ask for the gradient of everything: split the model then, and
    differentiate one part. Optimizer states of packed values are meaningless, and no error: leave them out of `wrt`.

    Leaves that are no arrays, as in trees of shardings, come back as they are; an abstract QTensor reads as a
    ShapeDtypeStruct. `nnx.to_pure_dict` decodes and `nnx.tabulate` counts decoded bytes: for the packed ones use
    `nnx.as_pure`.

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
        # Not through the base: it would partition every array of the QTensor as if it had all of its axes.
        place = metadata.pop("out_sharding", None)
        super().__init__(_checked(value), hijax=False, ref=False, **metadata)
        if place is not None:
            self.set_metadata(out_sharding=place)

    @classmethod
    def like(cls, param: nnx.Variable, q: QTensor) -> "PackedParam":
        """What takes the place of `param`: q, with the axis names and all other metadata of `param`.

        Raises:
            TypeError: q is no QTensor.
            ValueError: q has another shape.
        """
        if _checked(q).shape != param.shape:
            raise ValueError(f"the parameter has shape {param.shape}, the QTensor {q.shape}: quantize this parameter")
        # A packed value is never updated in place, so it needs neither a reference nor a variable of JAX's own.
        return cast(PackedParam, cls.from_metadata(q, param.get_metadata() | {"hijax": False, "ref": False}))

    def get_value(self, *, index: Any = ...) -> Float[Array, "..."]:
        """The decoded array in the original dtype, or what `index` picks of it."""
        q = self._raw_value
        if not isinstance(q, QTensor):  # a tree of something else, in which flax has put it here
            return q
        if isinstance(q.codes, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(q.shape, q.dtype)  # pyright: ignore[reportReturnType]
        if not all(isinstance(a, jax.Array | np.ndarray) for a in (q.codes, q.scales)):
            return q  # pyright: ignore[reportReturnType]
        value = q.dequantize()
        return value if index is ... else value[index]

    def set_value(self, value: QTensor, *, index: Any = ...) -> None:
        """Put another QTensor of this shape in its place.

        Raises:
            TypeError: an array, or an index.
            ValueError: another shape.
        """
        if index is not ...:
            raise TypeError("a PackedParam is set as a whole: decode it, change the array, and quantize that")
        value = _spread(self._raw_value, value)  # as nnx.eval_shape sets shardings
        if _checked(value).shape != self.shape:
            raise ValueError(f"the PackedParam has shape {self.shape}, the QTensor {value.shape}")
        self.set_raw_value(value)

    def set_raw_value(self, value: Any, **checks: bool) -> None:
        """As for every Variable, except that arrays are refused."""
        super().set_raw_value(_not_an_array(value), **checks)

    def update_from_state(self, variable_state: nnx.Variable) -> None:
        """As for every Variable, except that those that hold arrays are refused."""
        _not_an_array(variable_state.get_raw_value())
        super().update_from_state(variable_state)

    def copy(self, value: Any = MISSING, **updates: Any) -> nnx.Variable:
        """A copy, with another value if one is given. Specs and shardings are made to fit each of the arrays."""
        return super().copy(_not_an_array(_spread(self._raw_value, value)), **updates)

    replace = to_state = copy

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the array that it stands for."""
        return self._raw_value.shape

    def __getattr__(self, name: str) -> Any:
        metadata = object.__getattribute__(self, "_var_metadata")
        if name in metadata:
            return metadata[name]
        raw = object.__getattribute__(self, "_raw_value")
        if name in ("dtype", "ndim", "size") or not isinstance(raw, QTensor):
            return getattr(raw, name)
        # What modules ask of a parameter is asked of the array: `kernel.T`, `kernel.astype(...)`. Other names are not
        # worth decoding for.
        if name.startswith("_") or not hasattr(jax.Array, name):
            raise AttributeError(f"{type(self).__name__} has no {name!r}; its QTensor is param.get_raw_value()")
        return getattr(self.get_value(), name)

    def __nnx_repr__(self):
        # The bytes behind it, not the decoded numbers.
        for part in super().__nnx_repr__():
            is_value = getattr(part, "key", None) == "value"
            yield type(part)("value", self._raw_value) if is_value else part


def walk(model: nnx.Module, sample: Any = None, method: Any = None) -> Walk:
    """See which parameters an NNX model multiplies by, along which axes; a shared one is found once.

    With a sample the model is evaluated without numbers, and its program tells (see `ifjax.trace_products`). Without
    one both follow from the fields of Flax's own modules; subclasses count as what they derive from. A kernel with more
    axes in front, as nnx.vmap makes them, is stacked along these; one of any other shape is no kernel of the module's,
    but a parameter that nothing is known of. Such ones may be stacked too: all axes but the last two count as layers.
    Variables that are neither Param nor PackedParam (statistics, caches, random states) are no parameters. Abstract
    models, as from `nnx.eval_shape`, will do.

    Raises:
        TypeError: `model` is no NNX module.

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
    """What the model's program tells, with what its modules tell."""
    graph, state = nnx.split(model)
    call: Any = type(model).__call__ if method is None else method
    call = getattr(type(model), call) if isinstance(call, str) else call
    sites = trace_tree(
        lambda state, args, kwargs: call(nnx.merge(graph, state), *args, **kwargs), state, as_arguments(sample)
    )
    return _explained(known, sites)


def explain(model: nnx.Module, sites: dict[str, Site]) -> Walk:
    """What a program tells of a model's parameters, with what its modules tell."""
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
    """A copy of an NNX model that multiplies by recipes, forward and backward; for training.

    Linear and LinearGeneral that a rule with a recipe matches get a `dot_general` (`RecipeProduct`), wherever they
    are: attention and recurrent cells are made of them. Modules without a place for one (Einsum, Embed, Conv) stay as
    they are, and a rule that asks for nothing else is an error. Parameters and their paths are those of `model`: any
    optimizer and checkpoint fits, and `nnx.update(model, nnx.state(trained, nnx.Param))` takes them back, for
    `ifjax.quantize_params`.

    Noise comes from a stream of the module's own, as nnx.Dropout's does: its key and count are part of the state, and
    each call draws anew. Layers that nnx.vmap stacked along the first axes have stacked keys.

    Args:
        rules: as for `ifjax.interceptors.training`; None takes the recipes of an earlier call away.
        rngs: for recipes with noise; the stream "quantize" if there is one, else the default one.

    Raises:
        TypeError: `model` is no NNX module.
        ValueError: a rule is of no use; a recipe draws noise and there are no rngs; parameters are packed.

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
        if isinstance(_parameter(module, site).get_raw_value(), QTensor):
            raise ValueError(f"{site.path!r} is packed, and training needs floats: exclude it by Rule(path, None), or "
                             "train beside it by ifjax.quantized(fn, rules)")
        if decision.recipe is not None:
            module.dot_general = nnx.data(_product(decision.recipe, site, module, rngs))
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
    """`ifjax.quantized_dot_general` by one recipe, as the `dot_general` of an NNX module.

    Attributes:
        recipe: a record.
        stream: of keys, a new one for each call; None for recipes without noise.
    """

    def __init__(self, recipe: Recipe, stream: nnx.RngStream | None = None):
        self.recipe, self.stream = recipe, nnx.data(stream)

    def __call__(self, lhs, rhs, dimension_numbers, precision=None, preferred_element_type=None, out_sharding=None):
        return quantized_dot_general(
            lhs, rhs, dimension_numbers, self.recipe, None if self.stream is None else self.stream(),
            precision=precision, preferred_element_type=preferred_element_type, out_sharding=out_sharding,
        )  # fmt: skip


def is_parameter(variable: nnx.Variable) -> bool:
    """Whether it is a weight: no statistic, cache or random state."""
    return isinstance(variable, nnx.Param | PackedParam)


def _site_of(
    model: nnx.Module, modules: dict[str, str], path: tuple[Any, ...], variable: nnx.Variable
) -> Site:
    """What the modules tell of a parameter."""
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
    """Lists and dictionaries of modules are none."""
    return isinstance(node, nnx.Module) and not isinstance(node, nnx.List | nnx.Dict)


def _modules_above(model: nnx.Module, path: tuple[Any, ...]) -> Iterator[tuple[int, nnx.Module]]:
    """The modules on the way to a variable and how deep they lie."""
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
    """Why the module's parameter of this name is no kernel; None if it is, or if the module does not tell."""
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
    """Why no recipe applies to the module; None if one does."""
    if not isinstance(module, nnx.Linear | nnx.LinearGeneral):
        return f"nnx.{type(module).__name__} has no place for another product, only Linear and LinearGeneral have"
    product = module.dot_general
    free = isinstance(product, RecipeProduct) or product in (None, lax.dot_general)
    if free and getattr(module, "dot_general_cls", None) is None:
        return None
    return "the module has a dot_general of its own"


def _contraction(module: Any, name: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The contraction axes of the module's parameter of this name and its shape in one layer; () if there are none."""
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
    if equation is None:  # it comes with each call
        return ()
    inputs, kernel, result = equation.replace(" ", "").replace("->", ",").split(",")
    before, _, after = kernel.partition("...")
    # Axes of an ellipsis are never contracted: jnp.einsum keeps them in the result.
    letters = [*before, *[None] * (ndim - len(before) - len(after)), *after]
    summed = [letter for letter in letters if letter is not None and letter in inputs and letter not in result]
    if len(set(summed)) < len(summed):  # of its diagonal
        return ()
    return tuple(letters.index(letter) - ndim for letter in summed)


def _spread(q: Any, value: Any) -> Any:
    """What flax puts in a variable's place and is meant for its one array, made to fit the arrays of q."""
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
