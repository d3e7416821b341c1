"""The interceptor that collects statistics of activations where linen layers are called."""

from typing import Any

import flax.linen as nn

from ifjax.arrays import QTensor
from ifjax.models.calibration import Statistics, needs_statistics
from ifjax.models.decisions import decide
from ifjax.models.flax.linen import Operands, Watcher, layer_of, site_of
from ifjax.models.rules import Rule


class Collector(Watcher):
    """The interceptor that collects statistics; products are not changed."""

    def __init__(self, rules: tuple[Rule, ...], statistics: Statistics):
        super().__init__()
        self.rules, self.statistics = rules, statistics

    def watching(self) -> Any:
        """Return the context in which linen calls this interceptor."""
        return nn.intercept_methods(self)

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
        if rule is None or not needs_statistics(rule):
            return next_fun(*args, **kwargs)
        encodings = {"input": decision.activations} if layer.kernel is not None else decision.operands

        def activation(x, axes, operand):
            return self.statistics.collect(x, axes, rule, path, operand, encodings.get(operand) is not None)

        packed = kernel if isinstance(kernel, QTensor) else None
        return layer.run(module, next_fun, args, kwargs, Operands(packed, activation))
