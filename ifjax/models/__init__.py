"""Models: rules, what they find in a model, quantized parameters and reports. Flax's part is `ifjax.models.flax`."""

from ifjax.models.caches import pack_cache
from ifjax.models.functions import quantized
from ifjax.models.ptq import fake_quantize_params, quantize_params, trainable_mask, training_report
from ifjax.models.report import Report
from ifjax.models.rule_files import load_rules, save_rules
from ifjax.models.rules import Rule, default_rules
from ifjax.models.sites import Site
from ifjax.models.trace import trace_products

__all__ = [
    "Report", "Rule", "Site", "default_rules", "fake_quantize_params", "load_rules", "pack_cache", "quantize_params",
    "quantized", "save_rules", "trace_products", "trainable_mask", "training_report",
]  # fmt: skip
