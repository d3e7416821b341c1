"""Generate text with packed weights and a packed cache of keys and values.

    python examples/generate.py [--fmt if4] [--cache if4] [--window 16] [--steps 300] [--tokens 256] [--prompt "def "]
    python examples/generate.py --params lm.safetensors

Trains the byte model of benchmarks/train_lm.py for --steps steps (minutes on two cores; --params keeps what was
trained, and reads it the next time), packs it, and generates with floats and packed. Prints the text, tokens a second,
and the bytes of weights and cache.

`decode` is an ordinary JAX function of float parameters and a cache. `ifjax.quantized` lets it run on packed ones: the
weights' products read packed bytes, and the cache quantizes a token once, when it is written.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import ifjax

sys.path.append(str(Path(__file__).resolve().parent.parent / "benchmarks"))
import train_lm

EPSILON = 1e-6


def normed(x: jax.Array, layer: dict[str, jax.Array]) -> jax.Array:
    """RMSNorm."""
    x = x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + EPSILON)
    return x * layer["scale"].reshape((1,) * (x.ndim - 1) + (-1,))


def rotary(x: jax.Array, positions: jax.Array) -> jax.Array:
    """x [batch, tokens, heads, features], turned by angles that grow with the position."""
    half = x.shape[-1] // 2
    frequencies = 10000.0 ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = positions.astype(jnp.float32)[:, None] * frequencies[None]
    cos, sin = (f(angles)[None, :, None] for f in (jnp.cos, jnp.sin))
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)


def block(settings: Any, layer: Any, cache: ifjax.PackedCache, x: jax.Array) -> tuple[jax.Array, ifjax.PackedCache]:
    """One block on new tokens x [batch, tokens, dim]."""
    batch, tokens, dim = x.shape
    y = normed(x, layer["attention_norm"]) @ layer["qkv"]["kernel"]
    q, k, v = (y.reshape(batch, tokens, 3, settings.heads, -1)[:, :, i] for i in range(3))
    positions = cache.count + jnp.arange(tokens, dtype=jnp.int32)
    q, k = (rotary(normed(a, layer[f"{name}_norm"]), positions) for name, a in (("query", q), ("key", k)))
    cache = cache.append(k, v)
    x = x + cache.attend(q).reshape(batch, tokens, dim) @ layer["out"]["kernel"]
    y = normed(x, layer["mlp_norm"]) @ layer["up"]["kernel"]
    if settings.mlp == "swiglu":
        gate, y = jnp.split(y, 2, axis=-1)
        y = jax.nn.silu(gate) * y
    else:
        y = jax.nn.gelu(y)
    return x + y @ layer["down"]["kernel"], cache


def decode(settings: Any, params: Any, caches: Any, tokens: jax.Array) -> tuple[jax.Array, Any]:
    """Logits [batch, tokens, bytes] of new tokens, and the caches with them: stacked ones, and that of the last."""
    x = params["embed"]["embedding"][tokens]
    stacked, last = caches

    def step(x, xs):
        return block(settings, xs[0], xs[1], x)

    x, stacked = jax.lax.scan(step, x, (params["layers"], stacked))
    x, last = block(settings, params["last"], last, x)
    return normed(x, params["norm"]) @ params["head"]["kernel"], (stacked, last)


def empty_caches(settings: Any, batch: int, length: int, fmt: str | None, window: int) -> Any:
    """Of the layers that are scanned, stacked, and of the last."""
    shape = batch, length, settings.heads, settings.dim // settings.heads
    one = ifjax.PackedCache.zeros(shape, fmt, window=window if fmt is not None else 0)
    stacked = jax.tree.map(lambda a: jnp.broadcast_to(a, (settings.layers - 1, *a.shape)), one)
    return stacked, one


def generator(settings: Any, count: int, temperature: float) -> Any:
    """A compiled function of (params, caches, prompt [batch, tokens], key) that gives `count` tokens and the caches."""

    def pick(logits, key):
        if temperature == 0:
            return logits[:, -1].argmax(-1).astype(jnp.int32)
        return jax.random.categorical(key, logits[:, -1] / temperature).astype(jnp.int32)

    run = ifjax.quantized(lambda params, caches, tokens: decode(settings, params, caches, tokens))

    def generate(params, caches, prompt, key):
        logits, caches = run(params, caches, prompt)

        def step(carry, key):
            caches, token = carry
            logits, caches = run(params, caches, token[:, None])
            new = pick(logits, key)
            return (caches, new), new

        keys = jax.random.split(key, count)
        first = pick(logits, keys[0])
        (caches, _), tokens = jax.lax.scan(step, (caches, first), keys[1:])
        return jnp.concatenate([first[None], tokens]).T, caches

    return jax.jit(generate)


def nbytes(tree: Any) -> int:
    """Of all arrays, packed ones included."""
    return sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(tree))


def trained(settings: Any, seed: int = 0) -> Any:
    """The model's parameters after settings.steps steps."""
    data = train_lm.load(length=settings.length)
    training = jnp.asarray(data.training)
    program = train_lm.Program("bf16", settings, jax.ShapeDtypeStruct(training.shape, training.dtype))
    state = program.initial(seed)
    for step in range(settings.steps):
        state = program.step(state, training)
        if sys.stderr.isatty() and step % 10 == 0:
            loss = float(state["losses"][step])
            print(f"\rstep {step} of {settings.steps}, loss {loss:.3f}", end="", file=sys.stderr)
    print(f"\rtrained {settings.steps} steps, loss {float(state['losses'][-1]):.3f} nats a byte", file=sys.stderr)
    return state["params"]


def main(arguments: list[str] | None = None) -> dict[str, dict[str, float]]:
    """Run the command line; returns the figures that it prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fmt", default="if4", help="of the weights (if4)")
    parser.add_argument("--cache", default="if4", help="format of the cache (if4)")
    parser.add_argument("--window", type=int, default=16, help="tokens that the cache keeps in floats, too (16)")
    parser.add_argument("--params", type=Path, help="a safetensors file with the parameters; made if it is not there")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--dim", type=int, default=192)
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=256, help="how many to generate")
    parser.add_argument("--prompt", default="def ", help="what the text begins with")
    parser.add_argument("--temperature", type=float, default=0.7, help="0 takes the likeliest byte")
    options = parser.parse_args(arguments)
    warmup = min(50, options.steps - 1)
    settings = train_lm.Settings(
        layers=options.layers, dim=options.dim, heads=options.heads, hidden=options.dim * 8 // 3 // 16 * 16,
        steps=options.steps, warmup=warmup, dtype="float32",
    )  # fmt: skip
    if options.params is not None and options.params.exists():
        params = ifjax.load_file(options.params)
    else:
        params = trained(settings)
        if options.params is not None:
            ifjax.save_file(params, options.params)
    prompt = jnp.asarray(np.frombuffer(options.prompt.encode(), np.uint8).astype(np.int32))[None]
    length = prompt.shape[1] + options.tokens
    floats = empty_caches(settings, 1, length, None, 0)
    rules = [ifjax.Rule("(embed|head|.*norm).*", None), ifjax.Rule(".*", options.fmt)]
    packed, report = ifjax.quantize_params(
        params, rules, model=lambda *a: decode(settings, *a), sample=(floats, prompt)
    )
    report.check()
    generate, figures = generator(settings, options.tokens, options.temperature), {}
    for name, weights, fmt in (("float", params, None), ("packed", packed, options.cache)):
        caches = empty_caches(settings, 1, length, fmt, options.window)
        run = generate.lower(weights, caches, prompt, jax.random.key(0)).compile()
        jax.block_until_ready(run(weights, caches, prompt, jax.random.key(0)))
        start = time.perf_counter()
        tokens, filled = jax.block_until_ready(run(weights, caches, prompt, jax.random.key(0)))
        seconds = time.perf_counter() - start
        rate = options.tokens / seconds
        figures[name] = {"weights": nbytes(weights), "cache": nbytes(filled), "tokens_a_second": rate}
        text = options.prompt + bytes(np.asarray(tokens[0], np.uint8)).decode(errors="replace")
        print(f"--- {name}: {rate:,.0f} tokens a second, weights {nbytes(weights):,} bytes, cache "
              f"{nbytes(filled):,} bytes\n{text}\n")
    return figures


if __name__ == "__main__":
    main()
