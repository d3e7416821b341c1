"""Checks of kernels against XLA on a device, made once before a kernel's first use, with results stored in a file.

    work -> result known? -> small case on the device, by the kernel and by XLA -> fault or none -> stored

If a check finds a fault, XLA does the work, and one warning is given. Devices that are absent are not checked.
"""

import importlib.metadata
import json
import os
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ifjax.atomic import write_text
from ifjax.numerics.kernels import ForDevices, kernel_policy, kernels, made_for
from ifjax.version import __version__

_verdicts: dict[str, dict[str, str | None]] = {}  # device kind -> work -> fault, or None if the check passed
_lock = threading.Lock()
_warned = threading.Event()


def fault_of(work: str, record: ForDevices, prove: Callable[[], str | None]) -> str | None:
    """Return the fault of a kernel at this work on this machine's device; None if it has none or needs no check.

    Args:
        work: text that names the kernel and all that it is compiled for; results are stored under it.
        record: the kernel's record, with the devices that it supports.
        prove: computes a small case and returns how the kernel's result differs from XLA's, or None. An exception
            counts as a fault.
    """
    device = _device_of(record)
    if device is None:
        return None
    with _lock:
        known = _known(device)
        if work not in known:
            known[work] = _proved(prove)
            _keep(device)
        fault = known[work]
        if fault is not None and not _warned.is_set():
            _warned.set()
            warnings.warn(
                f"{work}: a kernel is not taken on {device}, XLA does its work: {fault}. Please report what "
                "`ifjax doctor` prints. Other kernels that fail are listed there, and not told again here.",
                RuntimeWarning, stacklevel=3,
            )  # fmt: skip
        return fault


def known_fault(work: str, record: ForDevices) -> str | None:
    """Return the fault that `fault_of` has already found; None if it found none or has not run. Computes nothing."""
    device = _device_of(record)
    if device is None:
        return None
    with _lock:
        return _known(device).get(work)


def _device_of(record):
    """Return the kind of the device on which to check a kernel; None if it supports other devices or needs no check."""
    if kernel_policy() != "auto" or jax.sharding.get_abstract_mesh().abstract_device is not None:
        return None
    kind = jax.local_devices()[0].device_kind
    return kind if made_for([record], kind) else None


def verdicts(device: str) -> dict[str, str | None]:
    """Return, for each work that was checked on a device kind, its fault or None."""
    with _lock:
        return dict(_known(device))


def forget(device: str) -> None:
    """Forget the results for a device kind, so that its kernels are checked again."""
    with _lock:
        _verdicts[device] = {}
        _keep(device)


def difference(of_kernel: Any, of_xla: Any) -> str | None:
    """Return a sentence on how two trees of arrays differ; None if all bits are equal (all NaNs count as equal)."""
    for i, (a, b) in enumerate(zip(jax.tree.leaves(of_kernel), jax.tree.leaves(of_xla), strict=True)):
        a, b = np.asarray(a), np.asarray(b)
        if a.dtype.kind not in "iu":
            a, b = (np.asarray(v, np.float32) for v in (a, b))
            differ = ~((a == b) & (np.signbit(a) == np.signbit(b)) | (np.isnan(a) & np.isnan(b)))
        else:
            differ = a != b
        if differ.any():
            at = tuple(int(n) for n in np.argwhere(differ)[0])
            return (
                f"{differ.sum()} of {differ.size} numbers of result {i} differ, the first at {at}: {a[at]} instead of "
                f"{b[at]}"
            )
    return None


def inexact(of_kernel: Any, of_xla: Any, size: Any) -> str | None:
    """Return a sentence on how two products differ beyond bfloat16 rounding, or None; `size` is |a| @ |b|."""
    of_kernel, of_xla, size = (np.asarray(v, np.float32) for v in (of_kernel, of_xla, size))
    excess = np.abs(of_kernel - of_xla) > size * 2.0**-7
    excess |= ~np.isfinite(of_kernel)
    if not excess.any():
        return None
    at = tuple(int(n) for n in np.argwhere(excess)[0])
    return f"{excess.sum()} of {excess.size} sums differ, the first at {at}: {of_kernel[at]} instead of {of_xla[at]}"


def by_both(run: Callable[[], Any]) -> tuple[Any, Any]:
    """Return run() by the kernel on the first device, and run() by XLA, on a CPU if there is one, for fast compiles."""
    device = jax.local_devices()[0]
    auto = (jax.sharding.AxisType.Auto,)
    alone = jax.sharding.Mesh(np.array([device]), ("one",), axis_types=auto)  # programs for it are not partitioned
    with kernels("always"), jax.set_mesh(alone):
        of_kernel = jax.block_until_ready(run())
    try:
        cpu = jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        cpu = None
    with kernels("never"), jax.default_device(cpu):
        return of_kernel, jax.block_until_ready(run())


def numbers_to_check(shape: tuple[int, ...]) -> np.ndarray:
    """Return float32 test numbers of many magnitudes, with zeros of both signs, ties, infinities and NaN."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal(shape) * np.exp2(rng.integers(-12, 4, shape))
    x.flat[::7] = rng.integers(-24, 25, x.flat[::7].shape) / 4
    x.flat[::11], x.flat[5::13] = 0.0, -0.0
    x.flat[::1001], x.flat[7::2003], x.flat[9::3001] = np.nan, np.inf, -np.inf
    return x.astype(np.float32)


def _proved(prove):
    # A new thread has none of the caller's contexts: traces, meshes, default devices, jax settings.
    with ThreadPoolExecutor(1) as thread:
        try:
            return thread.submit(prove).result()
        except Exception as error:  # compilers raise many types; any exception means that the kernel fails
            return f"{type(error).__name__}: {str(error).strip()[:400] or 'no message'}"


# --- results stored between processes --------------------------------------------------------------------------------


def cache_file(device: str) -> Path | None:
    """Return the file with results for these versions; None if the environment variable IFJAX_CACHE is empty."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    folder = os.environ.get("IFJAX_CACHE", os.path.join(base, "ifjax"))
    versions = f"{device}, jax {jax.__version__}, jaxlib {importlib.metadata.version('jaxlib')}, ifjax {__version__}"
    return Path(folder) / f"kernels, {versions}.json".replace("/", "-") if folder else None


def _known(device):
    if device not in _verdicts:
        _verdicts[device], file = {}, cache_file(device)
        try:
            found = json.loads(file.read_text()) if file is not None else {}
        except (OSError, ValueError):  # missing or unreadable: all kernels are checked again
            found = {}
        if isinstance(found, dict) and all(fault is None or isinstance(fault, str) for fault in found.values()):
            _verdicts[device] |= found
    return _verdicts[device]


def _keep(device):
    file = cache_file(device)
    if file is None:
        return
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, json.dumps(_verdicts[device], indent=1) + "\n")
    except OSError:  # the folder is not writable: results hold for this process only
        pass
