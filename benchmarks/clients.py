"""Models that others wrote: what is found, run, trained and generated in 4 bits, and what compiling costs.

    pip install -e '.[test,clients]' qwix
    python benchmarks/clients.py [--models gpt2,llama]
    python benchmarks/clients.py --tracing

The models are those of `tests/models/test_clients.py`: two small layers with random weights. Times are CPU seconds of
tracing, lowering and compiling, with empty caches, once. qwix compiles the same model where it takes it, linen and NNX
modules: with weights in int4 in blocks of 16, and with weights and activations in int4 with a scale for each channel.
With --tracing: CPU time of tracing as a multiple of that of `jax.make_jaxpr`, medians of nine, after
`jax.clear_caches()` each time.
"""

import argparse
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import ifjax

TESTS = Path(__file__).resolve().parents[1] / "tests"
sys.path += [str(TESTS), str(TESTS / "models")]
import test_clients  # noqa: E402


def compiled(fn: Callable[..., Any], params: Any, *args: Any) -> tuple[float, Any]:
    """Return the CPU seconds that tracing, lowering and compiling fn take, and its result."""
    run, arrays = test_clients.of_arrays(fn, params)
    jax.clear_caches()
    start = time.process_time()
    program = jax.jit(lambda *args: run(*args)).lower(arrays, *args).compile()
    return time.process_time() - start, program(arrays, *args)


def median_milliseconds(call: Callable[[], Any], repeats: int = 9) -> float:
    """Return the median CPU time of a call, with JAX's caches cleared before each."""
    call()
    seconds = []
    for _ in range(repeats):
        jax.clear_caches()
        start = time.process_time()
        call()
        seconds.append(time.process_time() - start)
    return statistics.median(seconds) * 1e3


def tracing_row(make: Callable[[], Any], by_hand: int) -> str:
    """Return a model's row of the table of tracing times."""
    fn, params, x, _ = make()
    packed, _ = ifjax.quantize_params(params, "if4", model=fn, sample=(x,))

    def trace(wrap, params):
        def call():
            run, arrays = test_clients.of_arrays(wrap(fn), params)
            jax.make_jaxpr(lambda *args: run(*args))(arrays, x)

        return median_milliseconds(call)

    plain = trace(lambda fn: fn, params)
    others = [
        median_milliseconds(lambda: ifjax.trace_products(fn, params, x)),
        trace(ifjax.quantized, params),
        trace(ifjax.quantized, packed),
        trace(lambda fn: ifjax.quantized(fn, ifjax.default_rules("if4", "if4")), packed),
    ]
    return f"| {make.__name__} | {by_hand} | {plain:.0f} | {' | '.join(f'{ms / plain:.2f}' for ms in others)} |"


def alike(a: list[Any], b: list[Any]) -> float:
    """Return the cosine of two gradients."""
    one, other = (np.concatenate([np.ravel(np.asarray(v, np.float64)) for v in tree]) for tree in (a, b))
    return float(one @ other / np.linalg.norm(one) / np.linalg.norm(other))


# qwix rounds a convolution's weights only together with its inputs, and needs lengths of attention that tiles divide.
QWIX_W4A16 = {"weight_qtype": jnp.int4, "tile_size": 16, "op_names": ("dot_general", "einsum")}
QWIX_W4A4 = {"weight_qtype": jnp.int4, "act_qtype": jnp.int4}


def qwix_seconds(make: Callable[..., Any], rule: dict[str, Any]) -> str:
    """Return the compile seconds of a model that qwix quantizes by a rule; "-" where it cannot."""
    try:
        import qwix

        provider = qwix.PtqProvider([qwix.QuantizationRule(module_path=".*", **rule)])
        wrapped = []

        def wrap(module, *inputs):
            wrapped.append(module)
            return qwix.quantize_model(module, provider, *(inputs if isinstance(module, nnx.Module) else ()))

        fn, params, x, _ = make(wrap)
        return f"{compiled(fn, params, x)[0]:.2f}" if wrapped else "-"
    except Exception as error:
        print(f"{make.__name__}: qwix: {type(error).__name__}: {str(error)[:200]}", file=sys.stderr)
        return "-"


def row_of(make: Callable[[], Any], by_hand: int) -> str:
    """Return a model's row of the table."""
    fn, params, x, model = make()
    packed, report = ifjax.quantize_params(params, "if4", model=fn, sample=(x,))
    faked, _ = ifjax.fake_quantize_params(params, "if4", model=fn, sample=(x,))
    w4a16, w4a4 = ifjax.quantized(fn), ifjax.quantized(fn, ifjax.default_rules("if4", "if4"))
    trained = ifjax.quantized(fn, ifjax.recipes.get_recipe("if4"), key=jax.random.key(0))
    (plain, values), (train, _) = (test_clients.gradient_of(f, params, x) for f in (fn, trained))
    runs = [(fn, faked, x), (w4a16, packed, x), (w4a4, packed, x), (plain, values), (train, values)]
    seconds, (exact, got, both, wanted, gradient) = zip(*(compiled(*run) for run in runs), strict=True)
    same = bool(np.allclose(got, exact, rtol=1e-3, atol=1e-3))
    noise = float(jnp.linalg.norm(both - got) / jnp.linalg.norm(got))
    cosine = alike(gradient, wanted)
    generates = "-"
    if model is not None and model.can_generate():
        def generate(p, x):
            return model.generate(x, params=p, max_length=10, do_sample=False).sequences

        try:
            generates = "y" if np.array_equal(ifjax.quantized(generate)(packed, x), generate(faked, x)) else "n"
        except Exception as error:  # of the model's own
            generates = type(error).__name__
    peers = qwix_seconds(make, QWIX_W4A16), qwix_seconds(make, QWIX_W4A4)
    found = f"{len(report.check().quantized)} of {by_hand}"
    times = " | ".join(f"{s:.2f}" for s in seconds)
    cells = [make.__name__, found, "y" if same else "n", f"y ({noise:.2g})", f"y ({cosine:.3f})", generates, times]
    return f"| {' | '.join([*cells, *peers])} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", default="", help="names with commas between; all unless given")
    parser.add_argument("--tracing", action="store_true", help="the table of tracing times")
    options = parser.parse_args()
    names = [name for name in options.models.split(",") if name]
    warnings.simplefilter("ignore")
    print(f"{platform.processor() or platform.machine()}, jax {jax.__version__}, {jax.devices()[0].device_kind}\n")
    columns = (
        "model | found | W4A16 | W4A4 (noise) | trained (cosine) | generated | float | W4A16 | W4A4 | train float "
        "| train if4 | qwix W4A16 | qwix W4A4"
    )
    if options.tracing:
        columns = "model | kernels | make_jaxpr, ms | trace_products | quantized, no rules | packed | packed, W4A4"
    print(f"| {columns} |\n|{'---|' * (columns.count('|') + 1)}")
    row = tracing_row if options.tracing else row_of
    for make, by_hand in test_clients.CLIENTS.items():
        if names and make.__name__ not in names:
            continue
        try:
            with test_clients.their_settings():
                print(row(make, by_hand), flush=True)
        except (Exception, pytest.skip.Exception) as error:  # of the model, or what it needs is not installed
            print(f"| {make.__name__} | {type(error).__name__}: {str(error)[:80]} |", flush=True)


if __name__ == "__main__":
    main()
