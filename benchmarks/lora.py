"""Memory and loss of LoRA fine-tuning on a packed base, compared with a float base.

    python examples/generate.py --params lm.safetensors        # trains the base
    python benchmarks/lora.py --params lm.safetensors [--steps 100] [--rank 8] [--out benchmarks/results/lora-cpu.md]

The base is the byte model of train_lm.py, trained on Python's source. It is fine-tuned on seven eighths of the first
lines of docstrings in data/ and measured on the rest. The memory is that of arrays and of XLA's temporaries of a step.
"""

import argparse
import functools
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import train_lm

import ifjax

LENGTH, BATCH = 128, 8


def texts() -> tuple[np.ndarray, np.ndarray]:
    """Return the bytes [rows, LENGTH + 1] for fine-tuning and those for measuring."""
    lines = (Path(__file__).parent / "data" / "docstrings.txt").read_bytes().splitlines()
    parts = b"\n".join(line for i, line in enumerate(lines) if i % 8), b"\n".join(lines[::8])
    rows = [np.frombuffer(part, np.uint8).astype(np.int32) for part in parts]
    return tuple(a[: len(a) // (LENGTH + 1) * (LENGTH + 1)].reshape(-1, LENGTH + 1) for a in rows)  # type: ignore


def nbytes(tree) -> int:
    return sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(tree))


def tuned(loss, tree, rows, held, steps: int, rate: float) -> dict:
    """Train the tree and return its figures."""
    optimizer = optax.adam(rate)
    state = optimizer.init(tree)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(tree, state, base, tokens):
        value, grads = jax.value_and_grad(loss)(tree, base, tokens)
        updates, state = optimizer.update(grads, state, tree)
        return optax.apply_updates(tree, updates), state, value

    base, measure = held["base"], jax.jit(loss)
    validation = lambda: float(np.mean([measure(tree, base, b) for b in held["batches"]]))  # noqa: E731
    figures = {"before": validation(), "trains": nbytes(tree), "states": nbytes(state), "base": nbytes(base)}
    run = step.lower(tree, state, base, rows[:BATCH]).compile()
    figures["temporaries"] = run.memory_analysis().temp_size_in_bytes
    key, seconds = jax.random.key(0), []
    for i in range(steps):
        tokens = rows[jax.random.randint(jax.random.fold_in(key, i), (BATCH,), 0, len(rows))]
        start = time.perf_counter()
        tree, state, _ = jax.block_until_ready(run(tree, state, base, tokens))
        seconds.append(time.perf_counter() - start)
    return figures | {"after": validation(), "seconds a step": float(np.median(seconds))}


def main():
    from codec import machine

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--params", type=Path, required=True)
    parser.add_argument("--fmt", default="if4")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    params = ifjax.load_file(options.params)
    layers = params["layers"]["qkv"]["kernel"].shape[0] + 1
    dim, hidden = params["last"]["down"]["kernel"].shape[::-1]
    heads = dim // params["last"]["query_norm"]["scale"].shape[0]
    model = train_lm.Transformer(
        train_lm.Settings(layers=layers, dim=dim, heads=heads, hidden=hidden, dtype="float32")
    )
    train, held = (jnp.asarray(a) for a in texts())
    batches = [held[i : i + BATCH] for i in range(0, len(held) // BATCH * BATCH, BATCH)]
    rules = [ifjax.Rule("embed|head", None), ifjax.Rule(".*", options.fmt, module="Dense")]
    packed, _ = ifjax.quantize_params(params, rules, model=model, sample=train[:1, :-1])
    adapters = ifjax.lora.init(jax.random.key(1), packed, rank=options.rank, model=model, sample=train[:1, :-1])

    def nll(fn, params, tokens):
        logits = fn({"params": params}, tokens[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    def adapted(recipe=None):
        run = ifjax.quantized(model.apply, recipe)
        return lambda adapters, base, tokens: nll(run, ifjax.lora.attach(base, adapters), tokens)

    record = ifjax.recipes.get_recipe
    rows = {
        "all, float32": (lambda p, base, tokens: nll(model.apply, p, tokens), params, {}, options.rate / 4),
        "LoRA, float32 base": (adapted(), adapters, params, options.rate),
        f"LoRA, {options.fmt} base": (adapted(), adapters, packed, options.rate),
        f"LoRA, {options.fmt} base, recipe w4a4_qat": (adapted(record("w4a4_qat")), adapters, packed, options.rate),
    }  # fmt: skip
    lines = ["| trained | before | after | base | trains | states | temporaries | seconds a step |",
             "|---|---|---|---|---|---|---|---|"]
    for name, (loss, tree, base, rate) in rows.items():
        tree = jax.tree.map(jnp.copy, tree)
        found = tuned(loss, tree, train, {"base": base, "batches": batches}, options.steps, rate)
        lines.append(f"| {name} | {found['before']:.3f} | {found['after']:.3f} | " + " | ".join(
            f"{found[k] / 1e6:.2f} MB" for k in ("base", "trains", "states", "temporaries")
        ) + f" | {found['seconds a step']:.3f} |")
        print(lines[-1], flush=True)
    if options.out:
        about = ", ".join(f"{key} {value}" for key, value in machine().items())
        what = (f"{options.steps} steps of Adam, batches of {BATCH} x {LENGTH} bytes, rank {options.rank}; nats a byte "
                "on text held back.")
        options.out.write_text("\n".join([f"# lora.py, {about}", "", what, "", *lines, ""]))


if __name__ == "__main__":
    main()
