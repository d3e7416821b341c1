"""What a format costs: errors of arrays, of safetensors files and of random samples, beside the published numbers.

Every figure follows from sums that can be added up (`Error`), so a model's total is the sum over its tensors. Files
are read tensor by tensor, and a tensor is quantized in pieces of one size: memory is bounded by the largest tensor,
and one compiled program for each format serves tensors of every shape.

    file -> header -> tensor -> amax -> pieces -> Error by format -> TensorReport -> Report
"""

import dataclasses
import json
import math
import os
import re
from collections.abc import Iterable, Iterator
from importlib import resources
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Float

from ifjax.arrays.quantize import Search, quantize
from ifjax.codec import Loss
from ifjax.formats import Format, get_format
from ifjax.numerics.packing import packed_length

DEFAULT_FORMATS = ("if4", "if3", "if6", "nvfp4", "fouroversix", "nvint4", "mxfp4")


# Values that the device sees at a time: a piece and what is made of it stay in a CPU's cache.
_PIECE = 2**18


@dataclasses.dataclass(frozen=True)
class Error:
    """What quantization did to one tensor or to many: `a + b` is the error of both together.

    Attributes:
        values: how many.
        signal: sum of x^2.
        noise: sum of (decoded - x)^2.
        nbytes: of codes, scales and amax.
        blocks: how many.
        second: how many of them took the format's second decoding (the integers of an IF format); None for formats
            that have one decoding.
    """

    values: int
    signal: float
    noise: float
    nbytes: int
    blocks: int
    second: int | None

    def __add__(self, other: "Error") -> "Error":
        if not isinstance(other, Error):
            return NotImplemented
        second = None if self.second is None or other.second is None else self.second + other.second
        sums = {f: getattr(self, f) + getattr(other, f) for f in ("values", "signal", "noise", "nbytes", "blocks")}
        return Error(**sums, second=second)

    @property
    def mse(self) -> float:
        """Mean squared error, in x's own units squared."""
        return self.noise / self.values if self.values else math.nan

    @property
    def normalized_mse(self) -> float:
        """Squared error over squared signal; 0 for zeros that stay zero."""
        if self.signal == 0:
            return 0.0 if self.noise == 0 else math.inf
        return self.noise / self.signal

    @property
    def relative_error(self) -> float:
        """Frobenius norm of the error over that of x."""
        return math.sqrt(self.normalized_mse)

    @property
    def sqnr_db(self) -> float:
        """Signal to quantization noise, 10 log10(signal / noise) in dB; infinite where nothing was lost."""
        return math.inf if self.normalized_mse == 0 else -10 * math.log10(self.normalized_mse)

    @property
    def bits_per_value(self) -> float:
        """Bits of all arrays, filled-up last blocks included, for each value."""
        return 8 * self.nbytes / self.values if self.values else math.nan

    @property
    def second_share(self) -> float | None:
        """Share of blocks with the second decoding; None for formats that have one decoding."""
        return self.second / self.blocks if self.second is not None and self.blocks else None

    def to_dict(self) -> dict[str, float | int | None]:
        """The figures, by name."""
        names = ("values", "nbytes", "bits_per_value", "mse", "relative_error", "sqnr_db", "second_share")
        return {name: getattr(self, name) for name in names}


def error(x: Float[ArrayLike, "..."], fmt: str | Format = "if4", *, axis: int = -1, **settings: Any) -> Error:
    """The error of `ifjax.quantize(x, fmt, axis=axis, **settings)`, against x in float32.

    NaN or infinite x gives NaN. Not for use inside jit. With `block_2d` a square counts once for each of its rows.

    Example:
        >>> import jax
        >>> from ifjax.measure.errors import error
        >>> x = jax.random.normal(jax.random.key(0), (64, 1024))
        >>> e = error(x, "if4")
        >>> print(f"{e.bits_per_value:.1f} bits a value, {e.sqnr_db:.0f} dB, {e.second_share:.0%} integers")
        4.5 bits a value, 22 dB, 63% integers
    """
    q = quantize(x, fmt, axis=axis, **settings)
    x = jnp.asarray(x)
    unit = _unit(float(jnp.max(jnp.abs(x), initial=0)))
    signal, noise = _energies(x.astype(jnp.float32), q.dequantize(jnp.float32), np.float32(1 / unit))
    second = int(jnp.sum(q.choices())) if q.fmt.has_flag else None
    return Error(q.size, _total(signal, unit), _total(noise, unit), q.nbytes, q.scales.size, second)


@dataclasses.dataclass(frozen=True)
class TensorReport:
    """One tensor and what each format does to it.

    Attributes:
        name, shape, dtype, nbytes: of the tensor as it is.
        errors: by the format's name; empty for a tensor that was not quantized.
        status: "quantized"; "kept": not a matmul's weight; "skipped": cannot be quantized.
        reason: why it was kept or skipped.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    errors: dict[str, Error]
    status: Literal["quantized", "kept", "skipped"] = "quantized"
    reason: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """As plain values."""
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
    search: Search | None = None,
) -> TensorReport:
    """The error of each format on x, quantized as one tensor with blocks along `axis`, one piece after the other.

    What `error` measures, for arrays of any size: the device sees one piece at a time, and a numpy array is copied as
    a whole only where `axis` is not the last or its length no multiple of the block. Integers, empty arrays and arrays
    with values that are not finite in float32 come back as skipped, with the reason.
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
    amax, bad = _scan(x)
    if bad:
        return skipped(f"{bad} of its values are not finite in float32")
    records = {fmt.name: fmt for fmt in map(get_format, formats)}
    errors = {name: _measure(x, fmt, axis, amax, loss, search) for name, fmt in records.items()}
    return dataclasses.replace(report, errors=errors)


def keep_reason(name: str, shape: tuple[int, ...]) -> str | None:
    """Why a tensor of this name and shape should keep its precision; None for the weight of a matrix product.

    Axes of length 1 do not count. Embeddings are matrices: they are stored, and often multiplied by, as such.
    """
    *parents, last = re.split(r"[./]", name.lower())
    owner = parents[-1] if parents and last in ("weight", "scale", "kernel") else last
    vector = sum(length > 1 for length in shape) < 2
    return next((f"a {word}" for word in ("bias", "norm") if word in owner), "not a matrix" if vector else None)


class FileError(ValueError):
    """A file that is broken or holds nothing to measure; the message says which and why."""


class Entry(NamedTuple):
    """A tensor in a file: `dtype` is the file's name for it, `start` its first byte."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int


_READABLE = {
    "F32": np.dtype(np.float32),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "F64": np.dtype(np.float64),
}


def read_header(path: str | os.PathLike) -> tuple[Entry, ...]:
    """What a safetensors file holds, sorted by name with numbers as numbers; reads no tensor.

    Raises:
        FileError: not a whole safetensors file.
        OSError: cannot be opened.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        try:
            with safe_open(path, framework="numpy"):  # checks lengths, offsets and that no byte is left over
                header = json.loads(file.read(length))
        except SafetensorError as error:
            raise FileError(f"{path} is not a whole safetensors file: {error}") from error
    header.pop("__metadata__", None)
    entries = []
    for name, tensor in header.items():
        start, end = tensor["data_offsets"]
        entries.append(Entry(name, tensor["dtype"], tuple(tensor["shape"]), 8 + length + start, end - start))
    return tuple(sorted(entries, key=lambda entry: _natural(entry.name)))


def read_tensor(path: str | os.PathLike, entry: Entry) -> np.ndarray:
    """One tensor of a safetensors file: F32, BF16, F16 or F64."""
    # Not by safetensors' numpy reader: which of its versions know bfloat16 differs.
    data = np.fromfile(path, np.uint8, entry.nbytes, offset=entry.start)
    if data.size != entry.nbytes:
        raise FileError(f"{path} ends within {entry.name}")
    return data.view(_READABLE[entry.dtype]).reshape(entry.shape)


def file_reports(
    path: str | os.PathLike,
    entries: Iterable[Entry],
    formats: Iterable[str | Format] = DEFAULT_FORMATS,
    *,
    axis: int = -1,
    everything: bool = False,
    loss: Loss | None = None,
    search: Search | None = None,
) -> Iterator[TensorReport]:
    """A report for each of the `entries` (see `read_header`), with one tensor in memory at a time.

    A weight that is stored [out, in], as PyTorch does, has its contraction along the last axis, where blocks lie by
    default; for [in, out] (flax kernels, GPT-2's Conv1D) pass axis=-2. Biases, norms and other vectors are kept unless
    `everything`.
    """
    formats = tuple(formats)
    for entry in entries:
        report = TensorReport(entry.name, entry.shape, entry.dtype, entry.nbytes, {})
        reason = keep_reason(entry.name, entry.shape)
        if entry.dtype not in _READABLE:
            reason = f"{entry.dtype} is not one of {', '.join(_READABLE)}"
            yield dataclasses.replace(report, status="skipped", reason=reason)
        elif not entry.shape or (reason and not everything):
            yield dataclasses.replace(report, status="kept", reason=reason)
        else:
            x = read_tensor(path, entry)
            measured = tensor_report(entry.name, x, formats, axis=axis, loss=loss, search=search)
            del x  # before the next one is read
            yield dataclasses.replace(measured, dtype=entry.dtype)


@dataclasses.dataclass(frozen=True)
class Report:
    """All tensors of a model, in order.

    Attributes:
        source: where they come from, for titles.
        tensors: one report each.
    """

    source: str
    tensors: tuple[TensorReport, ...]

    @property
    def quantized(self) -> tuple[TensorReport, ...]:
        """Those that were quantized."""
        return tuple(t for t in self.tensors if t.status == "quantized")

    @property
    def total(self) -> dict[str, Error]:
        """By format, the error of all quantized tensors together."""
        tensors = self.quantized
        names = tensors[0].errors if tensors else ()
        return {name: sum((t.errors[name] for t in tensors[1:]), tensors[0].errors[name]) for name in names}

    def to_dict(self) -> dict[str, Any]:
        """As plain values."""
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


# A few rows of each weight matrix of a pretrained BERT, shipped so that real weights are at hand everywhere; see
# data/README.md.
SAMPLE_SOURCE = "all-MiniLM-L6-v2, a few rows of each weight matrix, bfloat16"


def sample_path() -> Path:
    """The safetensors file of pretrained weights that comes with the package."""
    return Path(str(resources.files("ifjax") / "data" / "minilm_sample.safetensors"))


def _scan(x: np.ndarray) -> tuple[np.float32, int]:
    """(largest finite magnitude, number of values that are not finite), both in float32."""
    amax, bad = np.float32(0), 0
    for piece in _pieces(x.reshape(-1), _PIECE):
        magnitude = np.abs(piece)
        finite = np.isfinite(magnitude)
        bad += piece.size - int(finite.sum())
        amax = np.maximum(amax, np.max(magnitude, where=finite, initial=0))
    return amax, bad


def _measure(x: np.ndarray, fmt: Format, axis: int, amax: np.float32, loss, search) -> Error:
    # Blocks along one axis do not know one another but for the tensor's amax, so they can be laid end to end and cut.
    rows = np.moveaxis(x, axis, -1)
    in_row = -(-rows.shape[-1] // fmt.block)
    blocks = rows.size // rows.shape[-1] * in_row
    # The bytes that a QTensor of x's shape would have; tracing one to ask it takes longer than measuring most tensors.
    nbytes = blocks // in_row * packed_length(in_row * fmt.block, fmt.bits) + blocks
    nbytes += 0 if fmt.scale.largest is None else 4
    missing = -rows.shape[-1] % fmt.block
    if missing:
        rows = np.concatenate([rows, np.zeros((*rows.shape[:-1], missing), rows.dtype)], axis=-1)
    unit = _unit(float(amax))
    signal = noise = 0.0
    second = 0
    for piece in _pieces(rows.reshape(-1), max(_PIECE // fmt.block, 1) * fmt.block):
        sums = _piece_sums(piece, amax, np.float32(1 / unit), fmt=fmt, loss=loss, search=search)
        signal += _total(sums[0], unit)
        noise += _total(sums[1], unit)
        second += int(sums[2])
    return Error(x.size, signal, noise, nbytes, blocks, second if fmt.has_flag else None)


def _pieces(flat: np.ndarray, size: int) -> Iterator[np.ndarray]:
    """float32 [size] each, the last one filled up with zeros, which add nothing to any sum."""
    for start in range(0, flat.size, size):
        with np.errstate(over="ignore"):  # float64 beyond float32 becomes infinite, and is reported as such
            piece = flat[start : start + size].astype(np.float32)
        yield np.pad(piece, (0, size - piece.size))


@jax.jit(static_argnames=("fmt", "loss", "search"))
def _piece_sums(x, amax, inverse_unit, *, fmt, loss, search):
    q = quantize(x, fmt, loss=loss, search=search, amax=None if fmt.scale.largest is None else amax)
    second = jnp.sum(q.choices().astype(jnp.int32)) if fmt.has_flag else jnp.int32(0)
    return *_energies(x, q.dequantize(jnp.float32), inverse_unit), second


@jax.jit
def _energies(x, decoded, inverse_unit):
    """float32 sums of (x * inverse_unit)^2 and of the error's, over runs short enough to add up exactly enough."""

    def energies(v):
        v = (v * inverse_unit).reshape(-1)
        return jnp.sum(jnp.square(jnp.pad(v, (0, -v.size % 256)).reshape(-1, 256)), -1)

    return energies(x), energies(decoded - x)


def _unit(amax: float) -> float:
    """A power of two near amax, in whose units squares neither overflow nor vanish."""
    if not 0 < amax < math.inf:
        return 1.0
    return 2.0 ** min(max(math.frexp(amax)[1], -100), 100)


def _total(partial, unit: float) -> float:
    return float(np.sum(np.asarray(partial), dtype=np.float64)) * unit**2


def _natural(name: str) -> list[tuple[bool, int, str]]:
    """A key that sorts layer 2 before layer 10."""
    parts = [part for part in re.split(r"(\d+)", name) if part]
    return [(not part.isdecimal(), int(part) if part.isdecimal() else 0, part) for part in parts]
