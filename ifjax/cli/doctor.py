"""ifjax doctor."""

import argparse
import importlib.metadata
import itertools
import json
import platform
import warnings

import jax
import jax.numpy as jnp

from ifjax.arrays import ENCODERS, fake_quantize, quantize
from ifjax.cli.terminal import add_command, add_json, plain_table, terminal_console
from ifjax.numerics import kernels
from ifjax.numerics.kernels import kernel_policy, made_for
from ifjax.numerics.proofs import cache_file, forget, verdicts
from ifjax.products import BACKENDS, matmul

# One for each kind of grid and of scale that kernels know.
_FORMATS = ("if4", "nvfp4", "mxfp4", "nvint4", "if3")
_PACKAGES = ("ifjax", "jax", "jaxlib", "libtpu", "jax-cuda13-plugin", "jax-cuda12-plugin", "numpy", "flax")


def add_doctor(commands) -> None:
    """Add the parser of `ifjax doctor`."""
    parser = add_command(
        commands, "doctor", _doctor, "versions, devices, and whether kernels are right here",
        "Print versions and devices, and have the kernels for the first device prove themselves: each does small\n"
        "cases, which XLA does too, and their results are compared. What is found is kept, so that kernels which fail\n"
        "are not taken. Without kernels for the device nothing is computed. The exit code is 1 if any kernel fails.",
        "ifjax doctor",
        "ifjax doctor --json > doctor.json",
    )  # fmt: skip
    add_json(parser)


def _doctor(options: argparse.Namespace) -> int:
    devices = jax.local_devices()
    kind, file = devices[0].device_kind, cache_file(devices[0].device_kind)
    records = [("quantize", encoder) for encoder in ENCODERS.values()]
    records += [("products", backend) for backend in BACKENDS.values()]
    are_here = [made_for([record], kind) is not None for _, record in records]
    if any(are_here):
        _prove(kind)
    report = {
        "versions": {"python": platform.python_version()} | dict(filter(None, map(_version, _PACKAGES))),
        "system": f"{platform.system()} {platform.machine()}",
        "devices": [f"{device.platform} {device.device_kind}" for device in devices],
        "setting": kernel_policy(),
        "kept in": None if file is None else str(file),
        "kernels": [
            {"name": record.name, "for": what, "here": is_here, "measured": record.measured}
            for (what, record), is_here in zip(records, are_here, strict=True)
        ],
        "checks": verdicts(kind) if any(are_here) else {},
    }
    print(json.dumps(report, indent=1)) if options.json else _print(report)
    return int(any(fault is not None for fault in report["checks"].values()))


def _version(name):
    try:
        return name, importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _prove(kind):
    """Trace what kernels are for, which has them proven."""
    forget(kind)
    x = jax.ShapeDtypeStruct((128, 512), jnp.bfloat16)
    with warnings.catch_warnings(), kernels("auto"):
        warnings.simplefilter("ignore", RuntimeWarning)  # faults are printed
        for fmt, axis in itertools.product(_FORMATS, (-1, -2)):
            q = jax.eval_shape(lambda x, fmt=fmt, axis=axis: quantize(x, fmt, axis=axis), x)
            jax.eval_shape(lambda x, q, fmt=fmt, axis=axis: (fake_quantize(x, fmt, axis=axis), q.dequantize()), x, q)
        for fmt, rows in itertools.product(_FORMATS, (1, 16, 128)):
            w = jax.eval_shape(lambda x, fmt=fmt: quantize(x, fmt, axis=0), jax.ShapeDtypeStruct((512, 256), x.dtype))
            jax.eval_shape(matmul, jax.ShapeDtypeStruct((rows, 512), jnp.bfloat16), w)


def _print(report):
    console = terminal_console()
    for name, version in report["versions"].items():
        console.print(f"{name} {version}")
    console.print(f"{report['system']}; {len(report['devices'])} x {report['devices'][0]}")
    console.print(f"kernels: {report['setting']!r}, checks kept in {report['kept in']}", soft_wrap=True)
    table = plain_table("kernel", "for", "this device", "measured")
    for kernel in report["kernels"]:
        row = kernel["name"], kernel["for"], "yes" if kernel["here"] else "no", kernel["measured"] or "not yet"
        table.add_row(*row)
    console.print(table)
    if not report["checks"]:
        console.print("No kernel is for this device: XLA computes everything.")
    for work, fault in report["checks"].items():
        console.print(f"{'passes' if fault is None else 'FAILS '}  {work}", soft_wrap=True)
        if fault is not None:
            console.print(f"        {fault}", soft_wrap=True)
