"""Checks and times of the codec's kernels on the device at hand; shared by `gpu.py` and `tpu.py`."""

import functools
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import ifjax
from ifjax.arrays import ENCODERS, Encoder
from ifjax.numerics.proofs import difference, numbers_to_check

GOLDEN = Path(__file__).resolve().parents[1] / "tests" / "golden" / "formats.npz"
FORMATS = ("if4", "nvfp4", "fouroversix", "nvint4", "mxfp4")


def interpret_kernels(kernel: Any) -> None:
    """Let CPUs interpret a kernel module such as `pallas_kernels.gpu_blocks`, instead of their own way by XLA."""
    names = [name for name in ("tables", "encode", "decode", "peaks", "rotated_peaks") if hasattr(kernel, name)]
    interpreted = SimpleNamespace(
        Noise=kernel.Noise, PARTS=kernel.PARTS, supports=kernel.supports,
        **{name: functools.partial(getattr(kernel, name), interpret=True) for name in names},
    )  # fmt: skip
    ENCODERS.register(Encoder("interpreted", "cpu", r"^cpu$", lambda: interpreted))


def faults_of_golden(formats: tuple[str, ...] = FORMATS) -> Iterator[tuple[str, str | None]]:
    """Yield (name, fault or None) of each format: the kernel's bits against the repository's golden vectors.

    Vectors have four rows, which are repeated, since kernels take at least eight.
    """
    with np.load(GOLDEN) as golden:
        for fmt in formats:
            x = np.concatenate([golden["x"], golden[f"{fmt}__x"]])
            loss = "mse" if f"{fmt}__mse__codes" in golden else "static"
            codes, scales, values, ambiguous = (
                np.tile(golden[f"{fmt}__{loss}__{name}"], (1, 2, 1)) for name in ("codes", "scales", "deq", "ambiguous")
            )
            settings = {} if loss == "static" else {"loss": loss}
            amax_axes = (0,) if ifjax.get_format(fmt).has_tensor_scale else ()

            def run(x, fmt=fmt, settings=settings, amax_axes=amax_axes):
                q = ifjax.quantize(x, fmt, amax_axes=amax_axes, **settings)
                return q, q.dequantize()

            with ifjax.kernels("always"):
                q, decoded = jax.jit(run)(jnp.tile(jnp.asarray(x), (1, 2, 1)))
            block = np.repeat(ambiguous, ifjax.get_format(fmt).block, -1)
            differ = (
                ((np.asarray(q.unpacked_codes()) != codes) & ~block).sum(),
                ((np.asarray(q.scales) != scales) & ~ambiguous).sum(),
                (~((np.asarray(decoded) == values) | (np.isnan(decoded) & np.isnan(values))) & ~block).sum(),
            )
            yield f"golden {fmt}", f"{differ} codes, scales and values differ" if any(differ) else None


def faults_of_encoders(shape: tuple[int, int] = (256, 512)) -> Iterator[tuple[str, str | None]]:
    """Yield (name, fault or None) of each kind of encoder and decoder: its bits against those of the codec by XLA."""
    cases = [(fmt, axis, "nearest", False) for fmt in FORMATS for axis in (-1, -2)]
    cases += [(fmt, axis, "stochastic_unbiased", False) for fmt in ("if4", "nvfp4") for axis in (-1, -2)]
    cases += [(fmt, -1, "nearest", True) for fmt in ("if4", "nvfp4")]
    x, key = jnp.asarray(numbers_to_check(shape)), jax.random.key(0)
    for fmt, axis, rounding, squares in cases:
        settings = {
            "axis": axis, "rounding": rounding, "block_2d": squares, "key": None if rounding == "nearest" else key,
        }  # fmt: skip

        def run(x, fmt=fmt, settings=settings):
            q = ifjax.quantize(x, fmt, **settings)
            return q, q.dequantize(), ifjax.fake_quantize(x, fmt, **settings)

        for dtype in (jnp.float32, jnp.bfloat16):
            found = []
            for policy in ("always", "never"):
                with ifjax.kernels(policy):
                    found.append(jax.jit(run)(x.astype(dtype)))
            name = f"{fmt}, axis {axis}, {rounding}{', squares' * squares}, {jnp.dtype(dtype).name}"
            yield name, difference(*found)
