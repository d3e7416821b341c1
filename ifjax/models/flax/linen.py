"""Flax linen layers: the parameters that they multiply by, and how to run them with packed or quantized operands.

A layer is recognized by the method that multiplies, such as `nn.Dense.__call__`. A subclass that calls this method is
recognized, too; a subclass that replaces it is not.
"""

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import DenyList, meta
from flax.errors import ScopeCollectionNotFound
from flax.linen.linear import _Conv
from flax.linen.recurrent import DenseParams
from opt_einsum.parser import parse_einsum_input

from ifjax.arrays import QTensor
from ifjax.models.activations import multiplied, rounded
from ifjax.models.arguments import as_arguments
from ifjax.models.rules import OPERANDS
from ifjax.models.sites import LOOKUP, Site, Walk, explained, innermost, join_path
from ifjax.models.trace import program_of, trace_tree
from ifjax.products import dot_general, einsum
from ifjax.products.einsum import einsum_of_two


class Layer(NamedTuple):
    """How a linen method multiplies.

    Attributes:
        kernel: name of the kernel parameter; None for attention, which multiplies activations with each other.
        axes: function of (module, args, kwargs, rank of the kernel); returns the kernel's contracted axes, negative.
        run: function of (module, next_fun, args, kwargs, operands) that calls the method with other `Operands`.
        activations: why the activations cannot be quantized; None if they can.
        training: why no recipe applies; None if one does.
    """

    kernel: str | None
    axes: Callable[..., tuple[int, ...]]
    run: Callable[..., Any]
    activations: str | None = None
    training: str | None = None


class Operands(NamedTuple):
    """Replacements for a layer's operands and product.

    Attributes:
        weights: packed kernel to use instead of the module's own; None keeps the module's kernel.
        activation: function of (x, contracted axes of x, name of the operand) that returns the operand to use instead
            of x, an array or a QTensor.
        product: replacement for `ifjax.dot_general` in the product of activations and kernel.
    """

    weights: QTensor | None = None
    activation: Callable[[jax.Array, tuple[int, ...], str], Any] = lambda x, axes, operand: x
    product: Callable[..., jax.Array] = dot_general


def layer_of(context: nn.module.InterceptorContext) -> Layer | None:
    """Return the Layer of an intercepted call; None if the method is not that of a known layer."""
    return _LAYERS.get(inspect.unwrap(context.orig_method.func))


# --- the layers ------------------------------------------------------------------------------------------------------


def _run_dense(module, next_fun, args, kwargs, operands):
    own = module.dot_general_cls() if module.dot_general_cls is not None else module.dot_general
    promote = module.promote_dtype

    def promoted(inputs, kernel, *rest, dtype, **options):
        del kernel
        stand_in = jnp.zeros((), operands.weights.dtype)
        inputs, stand_in, *rest = promote(inputs, stand_in, *rest, dtype=dtype, **options)
        weights = operands.weights.astype(stand_in.dtype)
        return inputs, weights if own is None else weights.dequantize(), *rest

    def product(lhs, rhs, dimension_numbers, *rest, **options):
        axes = dimension_numbers[0][0]
        if own is not None:
            return own(_rounded(operands, lhs, axes), rhs, dimension_numbers, *rest, **options)
        return _multiplied(
            operands, lhs, rhs, axes, lambda x, w: operands.product(x, w, dimension_numbers, *rest, **options)
        )

    weights = {} if operands.weights is None else {"promote_dtype": promoted}
    with _fields(module, dot_general_cls=lambda: product, **weights):
        return next_fun(*args, **kwargs)


def _run_einsum(module, next_fun, args, kwargs, operands):
    inputs, spec = _einsum_arguments(module, *args, **kwargs)
    axes = _einsum_axes(module, args, kwargs, None, of_inputs=True)
    kernel, bias = (meta.unbox(module.get_variable("params", name)) for name in ("kernel", "bias"))
    inputs, kernel, bias = module.promote_dtype(inputs, kernel, bias, dtype=module.dtype)
    weights = kernel if operands.weights is None else operands.weights.astype(kernel.dtype)
    product = functools.partial(
        operands.product, precision=module.precision, preferred_element_type=module.preferred_element_type
    )
    y = _multiplied(operands, inputs, weights, axes, lambda x, w: einsum_of_two(spec, x, w, product))
    if bias is None:
        return y
    _, shape = module._get_bias_shape(spec, inputs, kernel)
    return y + bias.reshape(shape)


def _einsum_arguments(module, inputs, einsum_str=None):
    spec = nn.merge_param("einsum_str", module.einsum_str, einsum_str)
    return inputs, spec.replace(" ", "")


def _einsum_axes(module, args, kwargs, ndim, of_inputs=False):
    """Return the contracted axes of the kernel, or of the inputs if `of_inputs`, both in the kernel's order."""
    del ndim
    inputs, spec = _einsum_arguments(module, *args, **kwargs)
    left, out, _ = parse_einsum_input((spec, inputs.shape, tuple(module.shape)), shapes=True)
    x_labels, labels = left.split(",")
    axes_of = x_labels if of_inputs else labels
    return tuple(axes_of.index(c) - len(axes_of) for c in labels if c in x_labels and c not in out)


def _run_conv(module, next_fun, args, kwargs, operands):
    promote = module.promote_dtype

    def promoted(inputs, kernel, *rest, **options):
        if operands.weights is not None:
            kernel = operands.weights.dequantize(kernel.dtype)
            kernel = kernel if module.mask is None else kernel * module.mask
        inputs, *rest = promote(inputs, kernel, *rest, **options)
        return _rounded(operands, inputs, (-1,)), *rest

    with _fields(module, promote_dtype=promoted):
        return next_fun(*args, **kwargs)


def _run_lookup(module, next_fun, args, kwargs, operands):
    table = operands.weights
    if table is None:
        return next_fun(*args, **kwargs)
    inputs = args[0] if args else kwargs["inputs"]
    if not jnp.issubdtype(inputs.dtype, jnp.integer) or module.num_embeddings == 1:
        return next_fun(*args, **kwargs)  # Flax raises for other dtypes, and handles one-row tables in its own way
    (stand_in,) = module.promote_dtype(jnp.zeros((), table.dtype), dtype=module.dtype, inexact=False)
    return table.take(inputs, axis=0).dequantize(stand_in.dtype)


def _run_attend(module, next_fun, args, kwargs, operands):
    table, query = operands.weights, args[0] if args else kwargs["query"]
    if table is None:
        query, table = module.promote_dtype(query, module.embedding, dtype=module.dtype)
    else:
        query, stand_in = module.promote_dtype(query, jnp.zeros((), table.dtype), dtype=module.dtype)
        table = table.astype(stand_in.dtype)
    numbers = ((query.ndim - 1,), (1,)), ((), ())
    return _multiplied(operands, query, table, (-1,), lambda x, w: operands.product(x, w, numbers))


def _run_parameters(module, next_fun, args, kwargs, operands):
    del module
    kernel, bias = next_fun(*args, **kwargs)
    return kernel if operands.weights is None else operands.weights.dequantize(kernel.dtype), bias


def _run_attention(module, next_fun, args, kwargs, operands):
    def product(names):
        def of_two(spec, *arrays, **options):
            left, out, _ = parse_einsum_input((spec, *(a.shape for a in arrays)), shapes=True)
            ready = []
            for labels, array, name in zip(left.split(","), arrays, names, strict=True):
                axes = tuple(i - len(labels) for i, c in enumerate(labels) if c not in out)
                ready.append(_rounded(operands, array, axes, name))
            return einsum(spec, *ready, **options)

        return lambda: of_two

    pairs = {"qk_attn_weights_einsum_cls": OPERANDS[:2], "attn_weights_value_einsum_cls": OPERANDS[2:]}
    with _fields(module, **{field: product(names) for field, names in pairs.items()}):
        return next_fun(*args, **kwargs)


def _attention_refusal(module: Any) -> str | None:
    """Return why this attention module cannot use other products; None if it can."""
    names = ("qk_attn_weights_einsum", "attn_weights_value_einsum")
    taken = [f"{name}_cls" for name in names if getattr(module, f"{name}_cls") is not None]
    if taken:
        return f"the module sets {' and '.join(taken)} itself"
    if module.precision is not None:
        return f"the module sets precision={module.precision}, which Flax takes for its own products only"
    if not set(names) <= set(inspect.signature(module.attention_fn).parameters):
        return f"its attention_fn has no arguments {' and '.join(names)}"
    return None


def site_of(module: nn.Module, layer: Layer) -> Site:
    """Return the site of a layer, without axes and shape, which the caller adds."""
    path, name = join_path(module.path), type(module).__name__
    if layer.kernel is None:
        refusal = _attention_refusal(module)
        return Site(path, path, name, operands=OPERANDS, reason=refusal, training=layer.training)
    note = "weights are dequantized for the module's own dot_general" if has_own_product(module) else None
    return Site(
        join_path((*module.path, layer.kernel)), path, name, activations=layer.activations, note=note,
        training=_training_refusal(module, layer),
    )  # fmt: skip


def has_own_product(module: Any) -> bool:
    """Return whether the module has a dot_general of its own."""
    return any(getattr(module, name, None) is not None for name in ("dot_general_cls", "dot_general"))


def _training_refusal(module: Any, layer: Layer) -> str | None:
    """Return why no recipe applies to this layer; None if one does."""
    return "the module has a dot_general of its own" if has_own_product(module) else layer.training


def _rounded(operands, x, axes, operand="input"):
    """Return the rounded activation as an array, with a straight-through gradient."""
    return rounded(x, operands.activation(x, axes, operand))


def _multiplied(operands, x, w, axes, product):
    return multiplied(x, operands.activation(x, axes, "input"), w, product)


@contextlib.contextmanager
def _fields(module, **values):
    """Set fields of a bound module inside the context. `object.__setattr__` is needed because modules are frozen."""
    before = {name: getattr(module, name) for name in values}
    try:
        for name, value in values.items():
            object.__setattr__(module, name, value)
        yield
    finally:
        for name, value in before.items():
            object.__setattr__(module, name, value)


def _last_but_one(module, args, kwargs, ndim):
    return (-2,)


def _last(module, args, kwargs, ndim):
    return (-1,)


def _general_axes(module, args, kwargs, ndim):
    batch = len(module.batch_dims)
    count = 1 if isinstance(module.axis, int) else len(module.axis)
    return tuple(range(batch - ndim, batch + count - ndim))


def _transpose_axes(module, args, kwargs, ndim):
    return (-1,) if module.transpose_kernel else (-2,)


_OUT_OF_REACH = "the cell around it multiplies by itself, out of reach"

_LAYERS: Mapping[Callable, Layer] = {
    inspect.unwrap(method): layer
    for method, layer in {
        nn.Dense.__call__: Layer("kernel", _last_but_one, _run_dense),
        nn.DenseGeneral.__call__: Layer("kernel", _general_axes, _run_dense),
        nn.Einsum.__call__: Layer("kernel", _einsum_axes, _run_einsum),
        _Conv.__call__: Layer("kernel", _last_but_one, _run_conv, training="it is a convolution"),
        nn.ConvTranspose.__call__: Layer("kernel", _transpose_axes, _run_conv, training="it is a convolution"),
        nn.Embed.__call__: Layer("embedding", _last, _run_lookup, training=LOOKUP),
        nn.Embed.attend: Layer("embedding", _last, _run_attend),
        DenseParams.__call__: Layer("kernel", _last_but_one, _run_parameters, *[_OUT_OF_REACH] * 2),
        nn.MultiHeadDotProductAttention.__call__: Layer(
            None, lambda *_: (), _run_attention, training="it multiplies activations with each other"
        ),
    }.items()
}


# --- what a model multiplies by --------------------------------------------------------------------------------------


class Census:
    """An interceptor that changes nothing and records the modules and the layers' sites of a model."""

    def __init__(self):
        self.modules: dict[str, str] = {}
        # By the kernel's path, with the shape that the layer sees; by the module's path without a kernel.
        self.layers: dict[str, Site] = {}

    def __call__(self, next_fun: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        """Record the module and the layer of an intercepted call, and run it unchanged."""
        module, layer = context.module, layer_of(context)
        self.modules.setdefault(join_path(module.path), type(module).__name__)
        if layer is not None:
            site = site_of(module, layer)
            if layer.kernel is not None:
                kernel = meta.unbox(module.get_variable("params", layer.kernel))
                site = site._replace(shape=() if kernel is None else tuple(kernel.shape))
            self.layers.setdefault(site.parameter, site)
        return next_fun(*args, **kwargs)

    def explain(self, sites: Iterable[Site]) -> Walk:
        """Return the traced sites, completed from the recorded layers and modules."""
        found = {}
        for site in sites:
            site = explained(site, self.layers.get(site.parameter))
            if site.module is None:
                site = site._replace(module=innermost(site.parameter, self.modules))
            owner, _, name = site.parameter.rpartition("/")
            if name == "bias" and any(layer.path == owner and layer.shape for layer in self.layers.values()):
                site = site._replace(reason="a bias is added")
            found[site.parameter] = site
        return Walk(found | {path: site for path, site in self.layers.items() if site.operands}, self.modules)


def program(model: nn.Module, variables: Any, sample: Any, method: Any = None) -> tuple[Any, list[str]]:
    """Return the ClosedJaxpr of a linen model and the paths of its parameters, which are its first inputs."""
    return _traced(model, variables, method, lambda apply: program_of(apply, variables["params"], as_arguments(sample)))


def _traced(model: nn.Module, variables: Any, method: Any, trace: Callable[[Any], Any]) -> Any:
    """Return trace(a function of the parameters, the arguments and those by keyword)."""

    def applied(mutable):
        return lambda params, args, kwargs: model.apply(
            {**variables, "params": params}, *args, **kwargs, rngs={"params": jax.random.key(0)}, mutable=mutable,
            method=method,
        )  # fmt: skip

    try:
        return trace(applied(DenyList("params")))
    except ScopeCollectionNotFound:  # nn.map_variables(init=True) initializes wherever something is mutable
        return trace(applied(False))


def walk(model: nn.Module, variables: Any, sample: Any, method: Any = None) -> Walk:
    """Trace a linen model on shapes; return the sites of its parameters and its modules.

    An exception that the model raises gets a note about the sample.
    """
    def walked(apply):
        census = Census()

        def noted(*arguments):
            with nn.intercept_methods(census):
                return apply(*arguments)

        sites = trace_tree(noted, variables["params"], as_arguments(sample))
        return census.explain(sites.values())

    try:
        return _traced(model, variables, method, walked)
    except Exception as error:
        error.add_note(
            "This came up while ifjax evaluated the model without numbers, to find its kernels. Does "
            "model.apply(params, *sample) work? A mapping as sample is keyword arguments, a tuple positional ones: a "
            "single dictionary or list is written ({...},)."
        )
        raise
