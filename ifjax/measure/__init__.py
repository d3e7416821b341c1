"""Quantization errors of arrays, files, models and random samples; plots (`plots`); hardware units (`mac`)."""

from ifjax.measure.errors import (
    DEFAULT_FORMATS,
    SAMPLE_SOURCE,
    ErrorStats,
    Report,
    TensorReport,
    error,
    file_reports,
    read_tensor,
    sample_path,
    tensor_report,
)
from ifjax.measure.evaluation import Estimate, Evaluation, evaluate
from ifjax.measure.published import DISTRIBUTIONS, PUBLISHED, Published, SyntheticError, sample, synthetic_table

__all__ = [
    "DEFAULT_FORMATS", "DISTRIBUTIONS", "PUBLISHED", "SAMPLE_SOURCE", "ErrorStats", "Estimate", "Evaluation",
    "Published", "Report",
    "SyntheticError", "TensorReport", "error", "evaluate", "file_reports", "read_tensor", "sample", "sample_path",
    "synthetic_table", "tensor_report",
]  # fmt: skip
