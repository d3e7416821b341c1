"""Models that others wrote: what is found, run, trained and generated in 4 bits, and what compiling costs.

    pip install -e '.[test,clients]' qwix
    python benchmarks/clients.py [--models gpt2,llama]
    python benchmarks/clients.py --tracing

The models are those of `tests/models/test_clients.py`: two small layers with random weights. Times are CPU seconds of
tracing, lowering and compiling, with empty caches, once. qwix compiles the same model with weights in int4, in blocks
of 16, where it takes it: linen and NNX modules. With --tracing: CPU time of tracing as a multiple of that of
`jax.make_jaxpr`, medians of nine, after `jax.clear_caches()` each time.
"""

import argparse
import inspect
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

import ifjax

TESTS = Path(__file__).resolve().parents[1] / "tests"


def of_arrays(
    fn: Callable[..., Any], params: Any, dtype: Any = jnp.generic
) -> tuple[Callable[..., Any], list[Any]]:
    """Return fn as a function of (arrays, *others), for the leaves of params that are arrays of a dtype, and these."""
    leaves, tree = jax.tree.flatten(params)
    places = [i for i, a in enumerate(leaves) if hasattr(a, "dtype") and jnp.issubdtype(a.dtype, dtype)]

    def run(arrays, *others):
        whole = list(leaves)
        for i, array in zip(places, arrays, strict=True):
            whole[i] = array
        return fn(jax.tree.unflatten(tree, whole), *others)

    return run, [leaves[i] for i in places]


def compiled(fn: Callable[..., Any], params: Any, *args: Any) -> tuple[float, Any]:
    """Return the CPU seconds that tracing, lowering and compiling fn take, and its result."""
    run, arrays = of_arrays(fn, params)
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
            run, arrays = of_arrays(wrap(fn), params)
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


def gradient_of(fn: Callable[..., Any], params: Any, x: Any) -> tuple[Callable[[Any], Any], list[Any]]:
    """Return the gradient function of the mean square of fn's result for the float leaves, and those leaves."""
    run, values = of_arrays(fn, params, jnp.floating)
    return jax.grad(lambda values: jnp.square(run(values, x)).mean()), values


def alike(a: list[Any], b: list[Any]) -> float:
    """Return the cosine of two gradients."""
    one, other = (np.concatenate([np.ravel(np.asarray(v, np.float64)) for v in tree]) for tree in (a, b))
    return float(one @ other / np.linalg.norm(one) / np.linalg.norm(other))


def qwix_seconds(fn: Callable[..., Any], params: Any, x: Any, model: Any) -> float | None:
    """Return the compile seconds of the model by qwix; None where qwix does not take it."""
    try:
        import qwix
    except ImportError:
        return None
    provider = qwix.PtqProvider([qwix.QuantizationRule(module_path=".*", weight_qtype=jnp.int4, tile_size=16)])
    held = inspect.getclosurevars(fn).nonlocals
    if "graph" in held:
        from flax import nnx

        rest = held["places"], None, held["mask"]
        graph, state = nnx.split(qwix.quantize_model(nnx.merge(held["graph"], params), provider, x, *rest))
        return compiled(lambda state, x: nnx.merge(graph, state)(x, *rest)[0], state, x)[0]
    if model is None:
        return None
    plain, model._module = model.module, qwix.quantize_model(model.module, provider)
    try:
        packed = jax.jit(lambda: model.init_weights(jax.random.key(0), x.shape))()
        return compiled(fn, packed, x)[0]
    finally:
        model._module = plain


def row_of(make: Callable[[], Any], by_hand: int) -> str:
    """Return a model's row of the table."""
    fn, params, x, model = make()
    packed, report = ifjax.quantize_params(params, "if4", model=fn, sample=(x,))
    faked, _ = ifjax.fake_quantize_params(params, "if4", model=fn, sample=(x,))
    w4a16, w4a4 = ifjax.quantized(fn), ifjax.quantized(fn, ifjax.default_rules("if4", "if4"))
    trained = ifjax.quantized(fn, ifjax.recipes.get_recipe("if4"), key=jax.random.key(0))
    (plain, values), (train, _) = gradient_of(fn, params, x), gradient_of(trained, params, x)
    runs = [(fn, faked, x), (w4a16, packed, x), (w4a4, packed, x), (plain, values), (train, values)]
    seconds, (exact, got, both, wanted, gradient) = zip(*(compiled(*run) for run in runs), strict=True)
    same = bool(np.allclose(got, exact, rtol=1e-3, atol=1e-3))
    noise = float(jnp.linalg.norm(both - got) / jnp.linalg.norm(got))
    cosine = alike(gradient, wanted)
    generates = "-"
    if hasattr(model, "generate"):
        def generate(p, x):
            return model.generate(x, params=p, max_length=10, do_sample=False).sequences

        try:
            generates = "y" if np.array_equal(ifjax.quantized(generate)(packed, x), generate(faked, x)) else "n"
        except Exception as error:  # of the model's own
            generates = type(error).__name__
    try:
        peer = qwix_seconds(fn, params, x, model)
    except Exception as error:
        print(f"{make.__name__}: qwix: {type(error).__name__}: {str(error)[:200]}", file=sys.stderr)
        peer = None
    found = f"{len(report.check().quantized)} of {by_hand}"
    times = " | ".join(f"{s:.2f}" for s in seconds)
    cells = [make.__name__, found, "y" if same else "n", f"y ({noise:.2f})", f"y ({cosine:.3f})", generates, times]
    return f"| {' | '.join(cells)} | {'-' if peer is None else f'{peer:.2f}'} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", default="", help="names with commas between; all unless given")
    parser.add_argument("--tracing", action="store_true", help="the table of tracing times")
    options = parser.parse_args()
    names = [name for name in options.models.split(",") if name]
    warnings.simplefilter("ignore")
    sys.path += [str(TESTS), str(TESTS / "models")]
    import test_clients

    print(f"{platform.processor() or platform.machine()}, jax {jax.__version__}, {jax.devices()[0].device_kind}\n")
    columns = (
        "model | found | W4A16 | W4A4 (noise) | trained (cosine) | generated | float | W4A16 | W4A4 | train float "
        "| train if4 | qwix W4A16"
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
        except Exception as error:
            print(f"| {make.__name__} | {type(error).__name__}: {str(error)[:80]} |", flush=True)


if __name__ == "__main__":
    main()
