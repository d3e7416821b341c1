"""Models that others wrote: what is found, run, trained and generated in 4 bits, and what compiling costs.

    pip install -e '.[test,clients]' qwix
    python benchmarks/clients.py [--models gpt2,llama]

The models are those of `tests/models/test_clients.py`: two small layers with random weights. Times are CPU seconds of
tracing, lowering and compiling, the least of two. qwix compiles the same model with weights in int4, in blocks of 16,
where it takes it: linen and NNX modules.
"""

import argparse
import inspect
import platform
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
REPEATS = 2


def compile_seconds(fn: Callable[..., Any], *args: Any) -> float:
    """Return the least CPU seconds that tracing, lowering and compiling fn take."""
    seconds = []
    for _ in range(REPEATS):
        jax.clear_caches()
        start = time.process_time()
        jax.jit(lambda *args: fn(*args)).lower(*args).compile()
        seconds.append(time.process_time() - start)
    return min(seconds)


def gradient_of(fn: Callable[..., Any], params: Any, x: Any) -> tuple[Callable[[Any], Any], list[Any]]:
    """Return the gradient function of the mean square of fn's result for the float leaves, and those leaves."""
    leaves, tree = jax.tree.flatten(params)
    places = [i for i, a in enumerate(leaves) if hasattr(a, "dtype") and jnp.issubdtype(a.dtype, jnp.floating)]

    def loss(values):
        whole = list(leaves)
        for i, value in zip(places, values, strict=True):
            whole[i] = value
        return jnp.square(fn(jax.tree.unflatten(tree, whole), x)).mean()

    return jax.grad(loss), [leaves[i] for i in places]


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
        return compile_seconds(lambda state, x: nnx.merge(graph, state)(x, *rest)[0], state, x)
    if model is None:
        return None
    plain, model._module = model.module, qwix.quantize_model(model.module, provider)
    try:
        shapes = jax.eval_shape(lambda: model.init_weights(jax.random.key(0), x.shape))
        return compile_seconds(fn, shapes, x)
    finally:
        model._module = plain


def row_of(make: Callable[[], Any], by_hand: int) -> str:
    """Return a model's row of the table."""
    fn, params, x, model = make()
    packed, report = ifjax.quantize_params(params, "if4", model=fn, sample=(x,))
    faked, _ = ifjax.fake_quantize_params(params, "if4", model=fn, sample=(x,))
    w4a16, w4a4 = ifjax.quantized(fn), ifjax.quantized(fn, ifjax.default_rules("if4", "if4"))
    exact, got, both = fn(faked, x), w4a16(packed, x), w4a4(packed, x)
    same = bool(np.allclose(got, exact, rtol=1e-3, atol=1e-3))
    noise = float(jnp.linalg.norm(both - got) / jnp.linalg.norm(got))
    trained = ifjax.quantized(fn, ifjax.recipes.get_recipe("if4"), key=jax.random.key(0))
    train, values = gradient_of(trained, params, x)
    plain, _ = gradient_of(fn, params, x)
    cosine = alike(train(values), plain(values))
    generates = "-"
    if hasattr(model, "generate"):
        def generate(p, x):
            return model.generate(x, params=p, max_length=10, do_sample=False).sequences

        try:
            generates = "y" if np.array_equal(ifjax.quantized(generate)(packed, x), generate(faked, x)) else "n"
        except Exception as error:  # of the model's own
            generates = type(error).__name__
    seconds = [compile_seconds(f, p, x) for f, p in ((fn, params), (w4a16, packed), (w4a4, packed))]
    seconds += [compile_seconds(plain, values), compile_seconds(train, values)]
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
    names = [name for name in parser.parse_args().models.split(",") if name]
    warnings.simplefilter("ignore")
    sys.path += [str(TESTS), str(TESTS / "models")]
    import test_clients

    print(f"{platform.processor() or platform.machine()}, jax {jax.__version__}, {jax.devices()[0].device_kind}\n")
    print("| model | found | W4A16 | W4A4 (noise) | trained (cosine) | generated | float | W4A16 | W4A4 | train float "
          "| train if4 | qwix W4A16 |")  # fmt: skip
    print("|---|---|---|---|---|---|---|---|---|---|---|---|")
    for make, by_hand in test_clients.CLIENTS.items():
        if names and make.__name__ not in names:
            continue
        try:
            print(row_of(make, by_hand), flush=True)
        except Exception as error:
            print(f"| {make.__name__} | {type(error).__name__}: {str(error)[:80]} |", flush=True)


if __name__ == "__main__":
    main()
