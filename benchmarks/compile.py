"""CPU seconds to trace, lower and compile the codec's programs for a CPU.

    python benchmarks/compile.py [--rounds 5] [--programs "quantize if4" ...]

Each figure is the least of the rounds, in seconds of processor time over all threads, with JAX's caches cleared before
each round, since other work on the machine adds to it. "Each layer more" is a program of five equal layers minus that
of one, divided by four. `operations` counts those of StableHLO. Nothing is run.
"""

import argparse
import functools
import re
import time

import jax
import jax.numpy as jnp

import ifjax
from ifjax.arrays import QTensor

SIDE, TOKENS, LAYERS = 4096, 8192, 5
NUMBERS = ((1,), (0,)), ((), ())


def programs():
    """Return the programs by name: (function, arguments)."""
    x, tokens = (jax.ShapeDtypeStruct((n, SIDE), jnp.bfloat16) for n in (SIDE, TOKENS))
    small, key = jax.ShapeDtypeStruct((8, 64), jnp.float32), jax.eval_shape(lambda: jax.random.key(0))
    found = {}
    for fmt in ("if4", "nvfp4"):
        quantize = functools.partial(ifjax.quantize, fmt=fmt)
        q = jax.eval_shape(quantize, x)
        found[f"quantize {fmt}"] = quantize, (x,)
        found[f"quantize {fmt}, float32 [8, 64]"] = quantize, (small,)
        found[f"fake_quantize {fmt}"] = functools.partial(ifjax.fake_quantize, fmt=fmt), (x,)
        found[f"dequantize {fmt}"] = QTensor.dequantize, (q,)
        found[f"training product {fmt}"] = functools.partial(product, recipe=fmt), (tokens, x, tokens, key)
        for count in (1, LAYERS):
            weight = jax.eval_shape(functools.partial(quantize, axis=0), square())
            found[f"{count} W4A4 layers {fmt}"] = w4a4, (small, [weight] * count)
            found[f"{count} training layers {fmt}"] = functools.partial(train, recipe=fmt), (
                [square()] * count, small, key,
            )  # fmt: skip
    return found


def square():
    return jax.ShapeDtypeStruct((64, 64), jnp.float32)


def product(x, w, g, key, recipe):
    multiply = functools.partial(ifjax.quantized_dot_general, dimension_numbers=NUMBERS, recipe=recipe, key=key)
    y, back = jax.vjp(multiply, x, w)
    return y, *back(g)


def w4a4(x, weights):
    for q in weights:
        x = jnp.tanh(ifjax.dot_general(ifjax.quantize(x, q.fmt), q, NUMBERS))
    return x


def train(weights, x, key, recipe):
    def loss(weights):
        y = x
        for i, w in enumerate(weights):
            y = jnp.tanh(ifjax.quantized_dot_general(y, w, NUMBERS, recipe, jax.random.fold_in(key, i)))
        return y.sum()

    return jax.grad(loss)(weights)


def measure(function, arguments, rounds):
    """Return the least seconds of tracing, lowering and compiling, and the number of StableHLO operations."""
    best, clock = [float("inf")] * 3, time.process_time
    for _ in range(rounds):
        jax.clear_caches()
        start = clock()
        traced = jax.jit(lambda *a: function(*a)).trace(*arguments)
        seconds = [clock() - start]
        start = clock()
        lowered = traced.lower()
        seconds.append(clock() - start)
        start = clock()
        lowered.compile()
        seconds.append(clock() - start)
        best = list(map(min, best, seconds))
    return best, len(re.findall(r" = \"?stablehlo\.", lowered.as_text()))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--programs", nargs="+")
    args = parser.parse_args()
    found = programs()
    jax.config.update("jax_enable_compilation_cache", False)
    jax.jit(lambda x: x + 1).lower(square()).compile()  # start-up is no program's
    print(f"jax {jax.__version__}, ifjax {ifjax.__version__}, {jax.default_backend()}\n")
    print("| program | trace | lower | compile | seconds | operations |\n" + "|---" * 6 + "|")
    totals = {}
    for name in args.programs or found:
        parts, operations = measure(*found[name], args.rounds)
        totals[name] = sum(parts), operations
        print(f"| {name} | {' | '.join(f'{s:.2f}' for s in parts)} | {sum(parts):.2f} | {operations} |", flush=True)
    for name, (seconds, operations) in totals.items():
        first = totals.get(name.replace(f"{LAYERS} ", "1 ", 1)) if name.startswith(f"{LAYERS} ") else None
        if first is not None:
            added = (seconds - first[0]) / (LAYERS - 1)
            print(f"| each layer more of {name} | | | | {added:.3f} | {(operations - first[1]) / (LAYERS - 1):.0f} |")


if __name__ == "__main__":
    main()
