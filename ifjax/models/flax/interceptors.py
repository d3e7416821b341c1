"""Method interceptors for Flax linen: modules run unchanged, and their products are quantized according to rules."""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from ifjax.arrays import QTensor, quantize
from ifjax.codec import Encoding
from ifjax.formats import Format
from ifjax.models.activations import quantized_activation, static_amax, without_gradient
from ifjax.models.calibration import Calibration, Statistics, needs_statistics, value_name
from ifjax.models.decisions import Decision, decide
from ifjax.models.flax.linen import Census, Layer, Operands, layer_of, site_of
from ifjax.models.rules import OPERANDS, Rule, as_rules, training_rules
from ifjax.models.sites import Site
from ifjax.training import Recipe, quantized_dot_general


def inference(
    rules: Iterable[Rule] | Rule | str | Format | None = None, *, calibration: Calibration | None = None
) -> Callable[..., Any]:
    """Return a method interceptor (for `nn.intercept_methods`) that quantizes matrix products according to `rules`.

    Packed parameters (of `ifjax.quantize_params`) are multiplied packed by `ifjax.dot_general`, whatever the rules say.
    Look-ups in packed embeddings decode only the selected rows. Convolutions decode their kernel. Activations are
    quantized before the product if the matching rule has an `act_fmt`, with a straight-through gradient. Float
    parameters that a rule quantizes are quantized on the fly; the values are the same, but this is slow, and
    differentiating with respect to them is an error. Bias, dtypes and precision are handled by Flax. A module's own
    `dot_general` is kept and gets dequantized operands. `module.init` is not changed.

    With act_amax="tensor" the amax is that of the current array, which is a part of the whole under vmap and shard_map.

    Rules without effect are not reported, because an interceptor does not know which models its context will still
    call. `ifjax.quantize_params` and `ifjax.quantized` report them.

    Enter the context inside the jitted function, or use `ifjax.quantized`, which does so: jax.jit reuses programs that
    it compiled outside the context, and keeps those that it compiled inside.

    Args:
        rules: as for `ifjax.quantize_params`, but None means no rules: only packed parameters.
        calibration: from `ifjax.calibrate`, for rules with act_amax="static".

    Raises:
        ValueError: when the intercepted model runs: a rule asks for something that its module cannot do.

    Example:
        >>> import flax.linen as nn, jax, jax.numpy as jnp
        >>> import ifjax
        >>> model, x, rules = nn.Dense(8), jnp.ones((2, 32)), ifjax.Rule(".*", "if4", act_fmt="if4")
        >>> params = model.init(jax.random.key(0), x)
        >>> packed, report = ifjax.quantize_params(params, rules, model=model, sample=x)
        >>> @jax.jit
        ... def apply(params, x):
        ...     with nn.intercept_methods(ifjax.interceptors.inference(rules)):
        ...         return model.apply(params, x)
        >>> apply(packed, x).shape
        (2, 8)
    """
    return _Inference(() if rules is None else as_rules(rules), calibration)


def training(
    rules: Iterable[Rule] | Rule | Recipe | str, *, rng: str = "quantize", amax: str | None = None
) -> Callable[..., Any]:
    """Return a method interceptor (for `nn.intercept_methods`) that trains products with the rules' recipes.

    Dense, DenseGeneral, Einsum and Embed.attend layers whose rule has a `recipe` use `ifjax.quantized_dot_general`,
    forward and backward. Convolutions, cells with products of their own and modules with their own `dot_general` cannot
    use it and run unchanged. Float parameters stay floats, so any optimizer and checkpoint works, and
    `ifjax.quantize_params` takes the trained parameters. Packed ones are multiplied by as they are stored and get no
    gradient, for what trains beside them; the recipe rounds the other operands. `ifjax.training_report` shows the
    effect of the rules and raises if one of them has none.

    Recipes with noise need a random stream named `rng`: call `model.apply(params, x, rngs={"quantize": key})` with a
    fresh key each step, and put "quantize" into the split_rngs of nn.scan and nn.vmap. Flax folds the module path into
    the key, so each layer has its own noise, and nn.remat repeats the same noise when it recomputes.

    Args:
        rules: rules, at least one with a recipe; or a recipe's name or record, which stands for `default_rules` with
            that recipe. The papers also keep the last blocks in high precision:
            (Rule("layers_1[0-1]/.*", None), Rule(".*", recipe="if4")).
        rng: name of Flax's random stream.
        amax: name of a variable collection that carries the amax of each layer's operands from step to step, as
            `quantized_dot_general` takes it: float32 [3] per kernel. `model.init` under the interceptor adds it, with
            zeros: the operands' own amax. The gradient with respect to it holds the new values. nn.scan and nn.vmap
            need it in their variable_axes. None carries nothing.

    Raises:
        ValueError: no rule has a recipe. When the intercepted model runs: a pass draws noise and there is no such
            stream; a layer has no variable in the collection `amax`, or is called twice.

    Example:
        >>> import flax.linen as nn, jax, jax.numpy as jnp
        >>> import ifjax
        >>> model, x = nn.Dense(16), jnp.ones((4, 32))
        >>> params = model.init(jax.random.key(0), x)
        >>> def loss(params, key):
        ...     with nn.intercept_methods(ifjax.interceptors.training("nvfp4")):
        ...         return model.apply(params, x, rngs={"quantize": key}).sum()
        >>> jax.jit(jax.grad(loss))(params, jax.random.key(1))["params"]["kernel"].shape
        (32, 16)
    """
    return _Training(training_rules(rules), rng, amax)


class Noting(Census):
    """A context that records the linen modules called inside it and quantizes attention's products by the rules.

    Attention's products have no parameter, so they cannot be found in the traced program. All other products are left
    to the rewriting of that program. With statistics it collects those of attention's operands instead.
    """

    def __init__(self, rules: tuple[Rule, ...], calibration: Calibration | None, statistics: Statistics | None):
        super().__init__()
        self._attention = _Inference(rules, calibration) if statistics is None else _Collecting(rules, statistics)

    def __enter__(self) -> "Noting":
        self._context = nn.intercept_methods(self)
        self._context.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._context.__exit__(*error)

    def __call__(self, next_fun, args, kwargs, context):
        layer = layer_of(context)
        if layer is not None and layer.kernel is None:
            next_fun = functools.partial(self._attention, next_fun, context=context)
            return super().__call__(lambda *args, **kwargs: next_fun(args, kwargs), args, kwargs, context)
        return super().__call__(next_fun, args, kwargs, context)


class _Collecting:
    """The interceptor that collects statistics of attention's operands; products are not changed."""

    def __init__(self, rules: tuple[Rule, ...], statistics: Statistics):
        self.rules, self.statistics = rules, statistics

    def __call__(self, next_fun, args, kwargs, context):
        layer, module = layer_of(context), context.module
        assert layer is not None
        site = site_of(module, layer)
        decision = decide(self.rules, site)
        rule = decision.rule
        if rule is None or not decision.operands or not needs_statistics(rule):
            return next_fun(*args, **kwargs)

        def activation(x, axes, operand):
            return self.statistics.collect(x, axes, rule, site.path, operand, operand in decision.operands)

        return layer.run(module, next_fun, args, kwargs, Operands(activation=activation))


class _Inference:
    """The interceptor of `inference`.

    Flax calls it for each method of each module, possibly several times, so its effect depends only on its arguments.
    """

    def __init__(self, rules: tuple[Rule, ...], calibration: Calibration | None):
        self.rules, self.calibration = rules, calibration

    def __call__(self, next_fun, args, kwargs, context):
        layer, module = layer_of(context), context.module
        if module.is_initializing():
            return next_fun(*args, **kwargs)
        if layer is None:
            return next_fun(*args, **kwargs)
        site, kernel = self._site(layer, module, args, kwargs)
        decision = decide(self.rules, site)
        weights = self._weights(site, kernel, decision)
        encodings = self._encodings(site, decision)
        if weights is None and not encodings:
            return next_fun(*args, **kwargs)

        def activation(x, axes, operand):
            how, rule = encodings.get(operand), decision.rule
            if how is None or rule is None:
                return x
            if operand in OPERANDS[:2] and x.shape[axes[0]] < how.fmt.block:
                raise ValueError(
                    f"{site.path!r}: the head size of {operand} is {x.shape[axes[0]]}, below the block of "
                    f"{how.fmt.block} of {how.fmt.name}: take shorter blocks"
                )
            known = None if self.calibration is None else self.calibration.amax
            amax = static_amax(known, value_name(site.path, operand)) if rule.act_amax == "static" else None
            return quantized_activation(x, axes, how, rule.act_amax, amax)

        return layer.run(module, next_fun, args, kwargs, Operands(weights, activation))

    def _site(self, layer: Layer, module, args, kwargs) -> tuple[Site, Any]:
        """Return the layer's site and the unboxed kernel (None if there is none)."""
        site, kernel = site_of(module, layer), None
        if layer.kernel is not None:
            kernel = module.get_variable("params", layer.kernel)
            if kernel is None:
                return site._replace(reason="it has no kernel"), None
            packed = isinstance(kernel, QTensor)
            kernel = kernel.unbox() if not packed and hasattr(kernel, "unbox") else kernel
            axes = layer.axes(module, args, kwargs, kernel.ndim)
            site = site._replace(shape=tuple(kernel.shape), axes=axes, packed=packed)
        return site, kernel

    def _weights(self, site: Site, kernel: Any, decision: Decision) -> QTensor | None:
        """Return the packed kernel; None if the module's kernel is to be used unchanged."""
        if isinstance(kernel, QTensor):
            return kernel
        if kernel is None or decision.weights is None or decision.rule is None or decision.axis is None:
            return None
        if decision.rule.gptq:
            raise ValueError(f"{site.path!r}: gptq needs packed parameters: make them with ifjax.quantize_params")
        if decision.rule.smooth is not None or decision.rule.rotate is not None:
            raise ValueError(f"{site.path!r}: smooth and rotate are for ifjax.quantized, on packed parameters")
        kernel = without_gradient(kernel, site.path)
        return quantize(kernel, decision.weights, axis=decision.axis, amax_axes=decision.amax_axes)

    def _encodings(self, site: Site, decision: Decision) -> dict[str, Encoding]:
        """Return the encodings of the layer's activations by operand name, "input" for a layer with a kernel."""
        if not site.operands:
            asked = decision.weights is not None and decision.rule is not None and decision.rule.activations is not None
            if asked and site.activations is not None:
                raise ValueError(
                    f"{site.path!r}: an interceptor cannot quantize its activations: {site.activations}. "
                    "ifjax.quantized(model.apply, rules) can; or put a rule without act_fmt in front"
                )
            return {} if decision.activations is None else {"input": decision.activations}
        rule = decision.rule
        if site.reason is not None and rule is not None and rule.operands and not rule.optional:
            raise ValueError(f"{site.path!r}: attention's products cannot be quantized: {site.reason}")
        return dict(decision.operands)


class _Training:
    """The interceptor of `training`.

    Flax calls it for each method of each module, possibly several times, so its effect depends only on its arguments.
    """

    def __init__(self, rules: tuple[Rule, ...], rng: str, amax: str | None):
        self.rules, self.rng, self.amax = rules, rng, amax

    def __call__(self, next_fun, args, kwargs, context):
        layer, module = layer_of(context), context.module
        if module.is_initializing():
            self._initialize(layer, module)
            return next_fun(*args, **kwargs)
        if layer is None or layer.kernel is None:
            return next_fun(*args, **kwargs)
        site = site_of(module, layer)._replace(axes=(-1,)).in_training()
        recipe, key = decide(self.rules, site).recipe, None
        if recipe is None:
            return next_fun(*args, **kwargs)
        if isinstance(module.get_variable("params", layer.kernel), QTensor):
            recipe = recipe.over_packed()
        if recipe.needs_key and module.has_rng(self.rng):  # without a key, the first pass that needs one raises
            key = module.make_rng(self.rng)

        amax = self._carried(layer, module) if recipe.is_quantized else None

        def product(lhs, rhs, dimension_numbers, precision=None, preferred_element_type=None, **options):
            return quantized_dot_general(
                lhs, rhs, dimension_numbers, recipe, key, amax=amax, precision=precision,
                preferred_element_type=preferred_element_type, **options,
            )  # fmt: skip

        return layer.run(module, next_fun, args, kwargs, Operands(product=product))

    def _initialize(self, layer, module) -> None:
        """Add the layer's variable to the collection of carried amaxes."""
        if self.amax is None or layer is None or layer.kernel is None:
            return
        site = site_of(module, layer)._replace(axes=(-1,)).in_training()
        recipe = decide(self.rules, site).recipe
        if recipe is not None and recipe.is_quantized and not module.has_variable(self.amax, layer.kernel):
            module.scope.variable(self.amax, layer.kernel, jnp.zeros, 3, jnp.float32)

    def _carried(self, layer, module) -> Any:
        """Return the layer's carried amaxes, float32 [3]; None if none are carried."""
        if self.amax is None:
            return None
        path, root = "/".join(module.path), module.scope.root
        if not module.has_variable(self.amax, layer.kernel):
            raise ValueError(
                f"{path!r} has no variable in the collection {self.amax!r}: call model.init under the interceptor, "
                "pass the collection to model.apply, and name it in the variable_axes of nn.scan and nn.vmap"
            )
        name = f"{path}/{layer.kernel}"
        if root.name_reserved(name, self.amax):  # Flax forgets reservations when the outermost call returns
            raise ValueError(
                f"{path!r} is called twice, and the amaxes of two products cannot be told apart: leave it out by a "
                "rule without recipe, or train without amax="
            )
        root.reserve(name, self.amax)
        return module.get_variable(self.amax, layer.kernel)
