"""Quantization of whole models: rules, tracing of products, packed parameters and reports.

`ifjax.models.flax` holds the parts that need Flax.
"""

from ifjax.models.caches import pack_cache
from ifjax.models.functions import quantized
from ifjax.models.partition import combine, partition
from ifjax.models.plan import FormatPlan, plan_formats
from ifjax.models.ptq import fake_quantize_params, fold_params, quantize_params, trainable_mask, training_report
from ifjax.models.report import Report
from ifjax.models.rule_files import load_rules, save_rules
from ifjax.models.rules import Rule, default_rules
from ifjax.models.sites import Site
from ifjax.models.trace import trace_products

__all__ = [
    "FormatPlan", "Report", "Rule", "Site", "combine", "default_rules", "fake_quantize_params", "fold_params",
    "load_rules", "pack_cache", "partition", "plan_formats", "quantize_params", "quantized", "save_rules",
    "trace_products", "trainable_mask", "training_report",
]  # fmt: skip
