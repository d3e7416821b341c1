"""Interceptors of Flax linen methods: modules run unchanged, and their products are quantized as rules say."""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import flax.linen as nn

from ifjax.arrays import QTensor, quantize
from ifjax.codec import Encoding
from ifjax.formats import Format
from ifjax.models.activations import quantized_activation, static_amax, without_gradient
from ifjax.models.decisions import Decision, decide
from ifjax.models.flax.calibration import Calibration, value_name
from ifjax.models.flax.linen import Census, Layer, Operands, Watcher, layer_of, site_of
from ifjax.models.rules import OPERANDS, Rule, as_rules, training_rules
from ifjax.models.sites import Site
from ifjax.training import Recipe, quantized_dot_general


def inference(
    rules: Iterable[Rule] | Rule | str | Format | None = None, *, calibration: Calibration | None = None
) -> Callable[..., Any]:
    """An interceptor, for `with nn.intercept_methods(...)`, that multiplies as the rules say.

    Packed parameters (of `ifjax.quantize_params`) go to `ifjax.dot_general` as they are, whatever the rules; look-ups
    in packed embeddings decode the rows that are asked for; convolutions decode their kernel. Activations are
    quantized on the way in where the rule that matches has an `act_fmt`, with a straight-through gradient. Parameters
    that are still floats are quantized on the fly where a rule says so, which gives the same values, slowly, and has
    no gradient for them. Bias, dtypes and precision are Flax's. A module's own `dot_general` is kept: it gets
    dequantized operands. `module.init` is left alone.

    amax="tensor" is that of the array at hand: a part of it under vmap and shard_map.

    Enter the context inside the function that is jitted, or use `ifjax.quantized`, which does: programs that jax.jit
    has compiled before know nothing of the context, and those that it compiles inside keep it for ever.

    Args:
        rules: as for `ifjax.quantize_params`, but None stands for no rules: packed parameters only.
        calibration: from `ifjax.calibrate`, for rules with act_amax="static".

    Raises:
        ValueError: from the intercepted model: a rule asks for what its module cannot do.
    """
    return _Inference(() if rules is None else as_rules(rules), calibration)


def training(rules: Iterable[Rule] | Rule | Recipe | str, *, rng: str = "quantize") -> Callable[..., Any]:
    """An interceptor, for `with nn.intercept_methods(...)`, whose products are quantized forward and backward.

    Layers whose rule has a `recipe` multiply by `ifjax.quantized_dot_general`: Dense, DenseGeneral, Einsum and
    Embed.attend. Convolutions, cells that multiply by themselves and modules with a `dot_general` of their own cannot:
    a rule that asks for nothing else is an error, and others leave them as they are. Parameters stay floats, whatever
    optimizer and checkpoint there are, and what was trained goes into `ifjax.quantize_params`.

    Recipes with noise need an rng of the name `rng`: `model.apply(params, x, rngs={"quantize": key})` with a fresh key
    each step, and "quantize" among the split_rngs of nn.scan and nn.vmap. Flax folds it by module path, so that each
    layer has noise of its own, and the same in what nn.remat computes again.

    Args:
        rules: rules, of which some have a recipe; or a recipe, by name or record, which stands for `default_rules` with
            it: all kernels but those of embeddings and of the output head. The papers leave the last blocks in high
            precision, too: (Rule("layers_1[0-1]/.*", None), Rule(".*", recipe="if4")).
        rng: the name of Flax's random stream.

    Raises:
        ValueError: no rule has a recipe; from the model: noise is needed and there is no such rng.
    """
    return _Training(training_rules(rules), rng)


class Noting(Census):
    """The modules that are called in its context, whose attention multiplies as the rules say: they have no parameter
    from whose product it could be told. All other products are for the program that is traced.
    """

    def __init__(self, rules: tuple[Rule, ...], calibration: Any):
        super().__init__()
        self._rules, self._attention = rules, _Inference(rules, calibration)

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


class _Inference(Watcher):
    """Called for each method of each module, maybe several times: what it does depends on its arguments alone."""

    def __init__(self, rules: tuple[Rule, ...], calibration: Calibration | None):
        super().__init__()
        self.rules, self.calibration = rules, calibration

    def __call__(self, next_fun, args, kwargs, context):
        layer, module = layer_of(context), context.module
        if module.is_initializing():
            return next_fun(*args, **kwargs)
        path, _ = self.note(module)
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
                    f"{path!r}: the head size of {operand} is {x.shape[axes[0]]}, below the block of {how.fmt.block} "
                    f"of {how.fmt.name}: take shorter blocks"
                )
            known = None if self.calibration is None else self.calibration.amax
            amax = static_amax(known, value_name(path, operand)) if rule.act_amax == "static" else None
            return quantized_activation(x, axes, how, rule.act_amax, amax)

        return layer.run(module, next_fun, args, kwargs, Operands(weights, activation))

    def _site(self, layer: Layer, module, args, kwargs) -> tuple[Site, Any]:
        """The layer's site, which is noted, and its kernel."""
        site, kernel = site_of(module, layer), None
        if layer.kernel is not None:
            kernel = module.get_variable("params", layer.kernel)
            if kernel is None:
                return site._replace(reason="it has no kernel"), None
            packed = isinstance(kernel, QTensor)
            kernel = kernel.unbox() if not packed and hasattr(kernel, "unbox") else kernel
            axes = layer.axes(module, args, kwargs, kernel.ndim)
            site = site._replace(shape=tuple(kernel.shape), axes=axes, packed=packed)
        self.layers[site.parameter] = site
        return site, kernel

    def _weights(self, site: Site, kernel: Any, decision: Decision) -> QTensor | None:
        """The kernel, packed; None to leave alone what is there."""
        if isinstance(kernel, QTensor):
            return kernel
        if kernel is None or decision.weights is None or decision.rule is None or decision.axis is None:
            return None
        if decision.rule.gptq:
            raise ValueError(f"{site.path!r}: gptq needs packed parameters: make them with ifjax.quantize_params")
        if decision.rule.smooth is not None or decision.rule.rotate is not None:
            raise ValueError(f"{site.path!r}: smooth and rotate are for ifjax.quantized, on packed parameters")
        return quantize(without_gradient(kernel, site.path), decision.weights, axis=decision.axis)

    def _encodings(self, site: Site, decision: Decision) -> dict[str, Encoding]:
        """Of the activations that the layer multiplies."""
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


class _Training(Watcher):
    """Called for each method of each module, maybe several times: what it does depends on its arguments alone."""

    def __init__(self, rules: tuple[Rule, ...], rng: str):
        super().__init__()
        self.rules, self.rng = rules, rng

    def __call__(self, next_fun, args, kwargs, context):
        layer, module = layer_of(context), context.module
        if module.is_initializing():
            return next_fun(*args, **kwargs)
        self.note(module)
        if layer is None:
            return next_fun(*args, **kwargs)
        site = site_of(module, layer)
        site = site._replace(axes=(-1,) if layer.kernel else ()).in_training()
        if site.parameter not in self.layers or site.reason is None:  # Embed looks up, too
            self.layers[site.parameter] = site
        recipe, key = decide(self.rules, site).recipe, None
        if recipe is None or layer.kernel is None:
            return next_fun(*args, **kwargs)
        if isinstance(module.get_variable("params", layer.kernel), QTensor):
            raise ValueError(f"{site.path!r} is packed, and training needs floats: use ifjax.interceptors.inference, "
                             "or ifjax.quantized to train beside it")
        if recipe.needs_key and module.has_rng(self.rng):  # without one the backward pass says what is missing
            key = module.make_rng(self.rng)

        def product(lhs, rhs, dimension_numbers, precision=None, preferred_element_type=None, **options):
            return quantized_dot_general(
                lhs, rhs, dimension_numbers, recipe, key, precision=precision,
                preferred_element_type=preferred_element_type, **options,
            )  # fmt: skip

        return layer.run(module, next_fun, args, kwargs, Operands(product=product))
