"""The memory that packed optimizer moments save, and the time that they add to a step.

    python benchmarks/moments.py [--millions 10] [--rounds 10] [--formats if6 nvfp4 if4] [--json FILE]

The optimizer is AdamW, jitted, with a donated state, on matrices of 1024 x 1024 with a bias each. The memory is that of
all arrays of the state. Steps of all variants are timed in turn, round by round; a figure is the median over rounds. A
step includes the update of the parameters, but no gradient.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
from codec import machine

from ifjax.training.optim import quantized_moments


def stepper(optimizer, params, grads):
    """Return the bytes of the state, and a function that runs one step and returns its seconds."""

    def step(params, state, grads):
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    compiled = jax.jit(step, donate_argnums=(0, 1))
    held = [jax.tree.map(jnp.copy, params), optimizer.init(params)]
    size = sum(x.nbytes for x in jax.tree.leaves(held[1]))

    def timed():
        start = time.perf_counter()
        held[:] = jax.block_until_ready(compiled(*held, grads))
        return time.perf_counter() - start

    return size, timed


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--millions", type=int, default=10, help="of parameters, about: a matrix each")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--formats", nargs="+", default=["if6", "nvfp4", "if4"])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    described, count = machine(), args.millions
    keys = jax.random.split(jax.random.key(0), 2 * count)
    params = {f"layer_{i}": {"kernel": jnp.ones((1024, 1024)), "bias": jnp.ones(1024)} for i in range(count)}
    grads = jax.tree.unflatten(
        jax.tree.structure(params),
        [jax.random.normal(k, x.shape) for k, x in zip(keys, jax.tree.leaves(params), strict=True)],
    )
    inner = optax.adamw(1e-3)
    optimizers = {"float32": inner} | {fmt: quantized_moments(inner, fmt) for fmt in args.formats}
    sizes, steps = {}, {}
    for name, optimizer in optimizers.items():
        sizes[name], steps[name] = stepper(optimizer, params, grads)
        for _ in range(2):  # compile and warm up
            steps[name]()
    times = {name: [] for name in optimizers}
    for _ in range(args.rounds):
        for name, step in steps.items():
            times[name].append(step())

    total = sum(x.size for x in jax.tree.leaves(params))
    print(f"AdamW on {total / 1e6:.1f} million parameters, {args.rounds} rounds. {described}\n")
    print("| moments | state, MB | bits a parameter | of float32 | s a step | of float32 |")
    print("|---|---|---|---|---|---|")
    rows = []
    for name in optimizers:
        ratio = statistics.median(a / b for a, b in zip(times[name], times["float32"], strict=True))
        row = {"moments": name, "bytes": sizes[name], "seconds": statistics.median(times[name]), "ratio": ratio}
        rows.append(row)
        bits, share = 8 * sizes[name] / total, sizes[name] / sizes["float32"]
        print(f"| {name} | {sizes[name] / 1e6:.1f} | {bits:.2f} | {share:.3f} | {row['seconds']:.3f} | {ratio:.2f} |")
    if args.json:
        args.json.write_text(json.dumps({"machine": described, "parameters": total, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
