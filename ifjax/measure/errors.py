"""Quantization errors of arrays and of safetensors files.

All figures derive from additive sums (`ErrorStats`), so a model's total is the sum over its tensors. Files are read one
tensor at a time, and a tensor is quantized in pieces of equal size. Memory is bounded by the largest tensor, and one
compiled program per format handles tensors of all shapes.

    file -> header -> tensor -> amax -> pieces -> ErrorStats by format -> TensorReport -> Report
"""

import dataclasses
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import ml_dtypes
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Float

from ifjax.arrays import packed_shapes, quantize
from ifjax.codec import Encoding, Loss, Search
from ifjax.files.pieces import amax_of, as_float32, chosen, encode, energies, unit_of
from ifjax.files.safetensors import FileError, StoredTensor
from ifjax.formats import Format
from ifjax.models.decisions import decide
from ifjax.models.names import site_of_tensor
from ifjax.models.rules import default_rules

DEFAULT_FORMATS = ("if4", "if3", "if6", "nvfp4", "fouroversix", "nvint4", "mxfp4")


@dataclasses.dataclass(frozen=True)
class ErrorStats:
    """Quantization error of one or more tensors: `a + b` is the error of both together.

    Attributes:
        values: number of values.
        signal: sum of x^2.
        noise: sum of (decoded - x)^2.
        nbytes: bytes of codes, scales and amax.
        blocks: number of blocks.
        others: number of blocks with another decoding than the first (the integers in an IF format); None for formats
            with one decoding.
    """

    values: int
    signal: float
    noise: float
    nbytes: int
    blocks: int
    others: int | None

    def __add__(self, other: "ErrorStats") -> "ErrorStats":
        if not isinstance(other, ErrorStats):
            return NotImplemented
        others = None if self.others is None or other.others is None else self.others + other.others
        sums = {f: getattr(self, f) + getattr(other, f) for f in ("values", "signal", "noise", "nbytes", "blocks")}
        return ErrorStats(**sums, others=others)

    @property
    def mse(self) -> float:
        """Mean squared error, in squared units of x."""
        return self.noise / self.values if self.values else math.nan

    @property
    def normalized_mse(self) -> float:
        """Squared error divided by squared signal; 0 if all values are zero and stay zero."""
        if self.signal == 0:
            return 0.0 if self.noise == 0 else math.inf
        return self.noise / self.signal

    @property
    def relative_error(self) -> float:
        """Frobenius norm of the error divided by that of x."""
        return math.sqrt(self.normalized_mse)

    @property
    def sqnr_db(self) -> float:
        """Signal-to-quantization-noise ratio in dB, 10 log10(signal / noise); infinite if there is no error."""
        return math.inf if self.normalized_mse == 0 else -10 * math.log10(self.normalized_mse)

    @property
    def bits_per_value(self) -> float:
        """Bits per value of codes, scales and amax together, padding included. NaN for an empty array."""
        return 8 * self.nbytes / self.values if self.values else math.nan

    @property
    def choice_share(self) -> float | None:
        """Share of blocks with another decoding than the first; None for formats with one decoding."""
        return self.others / self.blocks if self.others is not None and self.blocks else None

    def to_dict(self) -> dict[str, float | int | None]:
        """Return the figures by name."""
        names = ("values", "nbytes", "bits_per_value", "mse", "relative_error", "sqnr_db", "choice_share")
        return {name: getattr(self, name) for name in names}


def error(x: Float[ArrayLike, "..."], fmt: str | Format = "if4", *, axis: int = -1, **settings: Any) -> ErrorStats:
    """Measure the error of `ifjax.quantize(x, fmt, axis=axis, **settings)` against x in float32.

    NaN or infinite x gives NaN. Not for use inside jit. With `block_2d`, a 2-D block counts once for each of its rows.

    Example:
        >>> import jax
        >>> from ifjax.measure import error
        >>> x = jax.random.normal(jax.random.key(0), (64, 1024))
        >>> e = error(x, "if4")
        >>> print(f"{e.bits_per_value:.1f} bits a value, {e.sqnr_db:.0f} dB, {e.choice_share:.0%} integers")
        4.5 bits a value, 22 dB, 63% integers
    """
    q = quantize(x, fmt, axis=axis, **settings)
    values = as_float32(np.asarray(x))
    unit = unit_of(float(np.abs(values).max(initial=0)))
    signal, noise = energies(values, np.asarray(q.dequantize(np.float32)), unit)
    return ErrorStats(q.size, signal, noise, q.nbytes, *_counts(np.asarray(q.scales), q.fmt, q.axis))


def _counts(scales: np.ndarray, fmt: Format, axis: int) -> tuple[int, int | None]:
    """Return (number of blocks, number of those with another decoding than the first)."""
    counts = chosen(scales, fmt, axis)
    return int(counts.sum()), int(counts[1:].sum()) if fmt.has_selector else None


@dataclasses.dataclass(frozen=True)
class TensorReport:
    """Quantization errors of one tensor by format.

    Attributes:
        name, shape, dtype, nbytes: those of the original tensor.
        errors: errors by format name; empty for a tensor that was not quantized.
        status: "quantized"; "kept" if a rule or the caller excludes it; "skipped" if it cannot be quantized.
        reason: why it was kept or skipped.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    errors: dict[str, ErrorStats]
    status: Literal["quantized", "kept", "skipped"] = "quantized"
    reason: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON-serializable values."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        errors = {name: error.to_dict() for name, error in self.errors.items()}
        return fields | {"shape": list(self.shape), "errors": errors}


def tensor_report(
    name: str,
    x: ArrayLike,
    formats: Iterable[str | Format] = DEFAULT_FORMATS,
    *,
    axis: int = -1,
    loss: Loss | None = None,
    search: str | Search | None = None,
) -> TensorReport:
    """Measure the error of each format on x, quantized as one tensor with blocks along `axis`, piece by piece.

    This is the measurement of `error` for arrays of any size: the device holds one piece at a time. A numpy array is
    copied as a whole only if `axis` is not the last one or its length is not a multiple of the block. Integers, empty
    arrays, a missing axis, and values that are not finite in float32 give a report with status "skipped" and a reason.

    Returns:
        A TensorReport, with errors by format name.
    """
    x = np.asarray(x)
    report = TensorReport(name, x.shape, x.dtype.name, x.nbytes, {})

    def skipped(reason):
        return dataclasses.replace(report, status="skipped", reason=reason)

    if x.dtype not in _READABLE.values():
        return skipped(f"{x.dtype} is not one of {', '.join(sorted(d.name for d in _READABLE.values()))}")
    if not x.size:
        return skipped("it is empty")
    if not -x.ndim <= axis < x.ndim:
        return skipped(f"it has no axis {axis}")
    rows = np.moveaxis(x, axis, -1)
    rows = rows.reshape(-1, rows.shape[-1])
    flat = np.ascontiguousarray(rows).reshape(-1)
    bad = sum(int((~np.isfinite(as_float32(flat[i : i + 2**20]))).sum()) for i in range(0, flat.size, 2**20))
    if bad:
        return skipped(f"{bad} of its values are not finite in float32")
    ways = {how.fmt.name: how for how in (Encoding.of(fmt, loss=loss, search=search) for fmt in formats)}
    return dataclasses.replace(report, errors={name: _measure(flat, rows.shape, how) for name, how in ways.items()})


def _measure(flat: np.ndarray, shape: tuple[int, int], how: Encoding) -> ErrorStats:
    """Return the error of a matrix with blocks along its rows; `flat` holds its values in C order."""

    # The piece is copied, because for a view JAX would keep all of `flat` alive until its next computation.
    def read(start, count):
        return flat[start : start + count].copy()

    signal = noise = 0.0
    blocks, others = 0, None
    for piece in encode(read, shape, amax_of(read, flat.size), how, -1, measured=True):
        signal, noise = signal + piece.signal, noise + piece.noise
        here, other = _counts(piece.scales, how.fmt, -1)
        blocks, others = blocks + here, None if other is None else (others or 0) + other
    nbytes = sum(math.prod(s) for s in packed_shapes(shape, how.fmt, -1)) + 4 * how.fmt.has_tensor_scale
    return ErrorStats(flat.size, signal, noise, nbytes, blocks, others)


_READABLE = {
    "F32": np.dtype(np.float32),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "F64": np.dtype(np.float64),
}


def read_tensor(path: str | os.PathLike, entry: StoredTensor) -> np.ndarray:
    """Read one tensor of a safetensors file: F32, BF16, F16 or F64.

    Raises:
        FileError: the file ends within the tensor.
    """
    # safetensors' numpy reader is not used, because not all of its versions support bfloat16.
    data = np.fromfile(path, np.uint8, entry.nbytes, offset=entry.start)
    if data.size != entry.nbytes:
        raise FileError(f"{path} ends within {entry.name}")
    return data.view(_READABLE[entry.dtype]).reshape(entry.shape)


def file_reports(
    path: str | os.PathLike,
    entries: Iterable[StoredTensor],
    formats: Iterable[str | Format] = DEFAULT_FORMATS,
    *,
    axis: int = -1,
    everything: bool = False,
    loss: Loss | None = None,
    search: str | Search | None = None,
    kept: Mapping[str, str] | None = None,
) -> Iterator[TensorReport]:
    """Yield a report for each of the `entries` (see `read_header`), with one tensor in memory at a time.

    Blocks lie along the last axis by default, which is the contraction axis of weights stored [out, in], as in PyTorch.
    For weights stored [in, out] (Flax kernels, GPT-2's Conv1D) pass axis=-2. Tensors that the default rules of any of
    the formats exclude (see `ifjax.default_rules`), such as biases, norms, embeddings and the head, are kept
    unquantized unless `everything` is true. Tensors named in `kept`, which maps names to reasons, are always kept, and
    so are scalars. Tensors of other dtypes than F32, BF16, F16 and F64 are skipped.
    """
    formats, kept = tuple(formats), kept or {}
    rules = [default_rules(fmt) for fmt in formats]
    for entry in entries:
        report = TensorReport(entry.name, entry.shape, entry.dtype, entry.nbytes, {})
        site = site_of_tensor(entry.name, entry.shape, axis)
        reason = next((why for of_one in rules if (why := decide(of_one, site).reason) is not None), None)
        if entry.name in kept:
            yield dataclasses.replace(report, status="kept", reason=kept[entry.name])
        elif entry.dtype not in _READABLE:
            reason = f"{entry.dtype} is not one of {', '.join(_READABLE)}"
            yield dataclasses.replace(report, status="skipped", reason=reason)
        elif not entry.shape or (reason and not everything):
            yield dataclasses.replace(report, status="kept", reason=reason)
        else:
            x = read_tensor(path, entry)
            measured = tensor_report(entry.name, x, formats, axis=axis, loss=loss, search=search)
            del x  # free it before the next tensor is read
            yield dataclasses.replace(measured, dtype=entry.dtype)


@dataclasses.dataclass(frozen=True)
class Report:
    """Quantization errors of all tensors of a model, in order.

    Attributes:
        source: origin of the tensors, used in titles.
        tensors: a report for each tensor.
    """

    source: str
    tensors: tuple[TensorReport, ...]

    @property
    def quantized(self) -> tuple[TensorReport, ...]:
        """Reports of the tensors that were quantized."""
        return tuple(t for t in self.tensors if t.status == "quantized")

    @property
    def total(self) -> dict[str, ErrorStats]:
        """Error of all quantized tensors together, by format name."""
        tensors = self.quantized
        names = tensors[0].errors if tensors else ()
        return {name: sum((t.errors[name] for t in tensors[1:]), tensors[0].errors[name]) for name in names}

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON-serializable values."""
        left = [t for t in self.tensors if t.status != "quantized"]
        return {
            "source": self.source,
            "tensors": [t.to_dict() for t in self.tensors],
            "total": {
                "nbytes": sum(t.nbytes for t in self.quantized),
                "nbytes_not_quantized": sum(t.nbytes for t in left),
                "errors": {name: error.to_dict() for name, error in self.total.items()},
            },
        }


# A few rows of each weight matrix of a pretrained BERT, shipped so that real weights are available without a download;
# see data/README.md.
SAMPLE_SOURCE = "all-MiniLM-L6-v2, a few rows of each weight matrix, bfloat16"


def sample_path() -> Path:
    """Return the path of the safetensors file of pretrained weights that is shipped with the package."""
    return Path(str(resources.files("ifjax") / "data" / "minilm_sample.safetensors"))
