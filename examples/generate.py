"""Generate text with packed weights and a packed cache of keys and values.

    python examples/generate.py [--fmt if4] [--cache if4] [--window 16] [--steps 300] [--tokens 256] [--prompt "def "]
    python examples/generate.py --params lm.safetensors
    python examples/generate.py --model llama [--layers 2 --dim 64 --heads 2], or --model CONFIG.JSON

Trains the byte model of benchmarks/train_lm.py for --steps steps (minutes on two cores; --params keeps what was
trained, and reads it the next time), packs it, and generates with floats and packed. Prints the text, tokens a second,
and the bytes of weights and cache.

With --model the model is transformers' (Flax, so transformers below 5), of a type such as gpt2 or llama or by a
configuration, with random weights and its own cache, which `ifjax.pack_cache` packs: what it generates means nothing,
and is printed as numbers, but tokens a second and bytes are those of the real one.

`decode` is an ordinary JAX function of float parameters and a cache. `ifjax.quantized` lets it run on packed ones: the
weights' products read packed bytes, and the cache quantizes a token once, when it is written.
"""

import argparse
import functools
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

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


class Client(NamedTuple):
    """A model that generates.

    Attributes:
        decode: a function of (params, caches, new tokens) that gives logits and caches.
        params: its float parameters.
        caches: a function of (length, format or None) that gives empty caches.
        rules: what is packed.
        text: a function of tokens [n] that gives what to print.
    """

    decode: Callable[..., Any]
    params: Any
    caches: Callable[[int, str | None], Any]
    rules: Any
    text: Callable[[Any], str]


def of_transformers(name: str, options: Any) -> Client:
    """Return a model of transformers with random weights: of a type, or by a file or folder with a configuration."""
    from transformers import AutoConfig, FlaxAutoModelForCausalLM

    if Path(name).exists():
        config = AutoConfig.from_pretrained(name)
    else:
        config = AutoConfig.for_model(
            name, hidden_size=options.dim, num_hidden_layers=options.layers, num_attention_heads=options.heads,
            vocab_size=512,
        )  # fmt: skip
        if hasattr(config, "intermediate_size"):
            config.intermediate_size = 4 * options.dim
        if getattr(config, "num_key_value_heads", None) is not None:
            config.num_key_value_heads = options.heads
    model = FlaxAutoModelForCausalLM.from_config(config, seed=0)

    def decode(params, caches, tokens):
        cache, mask, count = caches
        places = jnp.broadcast_to(count + jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
        out = model(tokens, params=params, past_key_values=cache, attention_mask=mask, position_ids=places)
        return out.logits, (out.past_key_values, mask, count + tokens.shape[1])

    def caches(length, fmt):
        cache = model.init_cache(1, length)
        cache = cache if fmt is None else ifjax.pack_cache(cache, fmt)
        return cache, jnp.ones((1, length), jnp.int32), jnp.int32(0)

    return Client(decode, model.params, caches, ifjax.default_rules(options.fmt), lambda tokens: f"{tokens.tolist()}")


def of_bytes(options: Any) -> Client:
    """Return the byte model, trained or read."""
    settings = train_lm.Settings(
        layers=options.layers, dim=options.dim, heads=options.heads, hidden=options.dim * 8 // 3 // 16 * 16,
        steps=options.steps, warmup=min(50, options.steps - 1), dtype="float32",
    )  # fmt: skip
    if options.params is not None and options.params.exists():
        params = ifjax.load_file(options.params)
    else:
        params = trained(settings)
        if options.params is not None:
            ifjax.save_file(params, options.params)
    rules = [ifjax.Rule("(embed|head|.*norm).*", None), ifjax.Rule(".*", options.fmt)]
    return Client(
        functools.partial(decode, settings), params,
        lambda length, fmt: empty_caches(settings, 1, length, fmt, options.window), rules,
        lambda tokens: options.prompt + bytes(np.asarray(tokens, np.uint8)).decode(errors="replace"),
    )  # fmt: skip


def generator(decode: Callable[..., Any], count: int, temperature: float) -> Any:
    """A compiled function of (params, caches, prompt [batch, tokens], key) that gives `count` tokens and the caches."""

    def pick(logits, key):
        if temperature == 0:
            return logits[:, -1].argmax(-1).astype(jnp.int32)
        return jax.random.categorical(key, logits[:, -1] / temperature).astype(jnp.int32)

    run = ifjax.quantized(decode)

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
    parser.add_argument("--model", help="of transformers: a type, or a file or folder with a configuration")
    parser.add_argument("--params", type=Path, help="a safetensors file with the parameters; made if it is not there")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--dim", type=int, default=192)
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=256, help="how many to generate")
    parser.add_argument("--prompt", default="def ", help="what the text begins with")
    parser.add_argument("--temperature", type=float, default=0.7, help="0 takes the likeliest byte")
    options = parser.parse_args(arguments)
    client = of_bytes(options) if options.model is None else of_transformers(options.model, options)
    prompt = jnp.asarray(np.frombuffer(options.prompt.encode(), np.uint8).astype(np.int32))[None]
    length = prompt.shape[1] + options.tokens
    packed, report = ifjax.quantize_params(
        client.params, client.rules, model=client.decode, sample=(client.caches(length, None), prompt)
    )
    report.check()
    generate, figures = generator(client.decode, options.tokens, options.temperature), {}
    for name, weights, fmt in (("float", client.params, None), ("packed", packed, options.cache)):
        caches = client.caches(length, fmt)
        run = generate.lower(weights, caches, prompt, jax.random.key(0)).compile()
        jax.block_until_ready(run(weights, caches, prompt, jax.random.key(0)))
        start = time.perf_counter()
        tokens, filled = jax.block_until_ready(run(weights, caches, prompt, jax.random.key(0)))
        seconds = time.perf_counter() - start
        rate = options.tokens / seconds
        figures[name] = {"weights": nbytes(weights), "cache": nbytes(filled), "tokens_a_second": rate}
        print(f"--- {name}: {rate:,.0f} tokens a second, weights {nbytes(weights):,} bytes, cache "
              f"{nbytes(filled):,} bytes\n{client.text(tokens[0])}\n")
    return figures


if __name__ == "__main__":
    main()
