"""CPU seconds to trace, lower and compile the codec's programs for a CPU.

    python benchmarks/compile.py [--rounds 5] [--programs "quantize if4" ...]
    python benchmarks/compile.py --models [--rounds 1] [--programs "BERT, W4A4 if4" ...]

Each figure is the least of the rounds, since other work on the machine adds to it: seconds of processor time over all
threads and, in the column "clock", of the clock. JAX's caches are cleared before each round. "Each layer more" is a
program of five equal layers minus that of one, divided by four. `operations` counts those of StableHLO. Nothing is run.

--models measures transformers' unrolled models with random weights (`pip install "transformers<5"`), each beside its
float32 program: the forward pass of a BERT of 36 Dense layers in the shape of all-MiniLM-L6-v2, for 64 sentences of 32
tokens, its weights packed and its activations rounded; and the training step of a Llama of 2 layers (14 kernels).
"""

import argparse
import functools
import itertools
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


def models():
    """Return the programs of models by name: (function, arguments). Those in float32 come first."""
    import transformers

    jax.config.update("jax_numpy_rank_promotion", "allow")
    jax.config.update("jax_numpy_dtype_promotion", "standard")
    bert = transformers.FlaxBertModel(
        transformers.BertConfig(
            vocab_size=64, hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536
        ), add_pooling_layer=False,
    )  # fmt: skip
    llama = transformers.FlaxLlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
            max_position_embeddings=32, bos_token_id=0, eos_token_id=1, pad_token_id=1,
        )
    )  # fmt: skip

    def embed(params, ids):
        return bert(ids, params=params).last_hidden_state

    def logits(params, ids):
        return llama(ids, params=params).logits

    def step(run):
        def loss(params, ids, key):
            return jnp.square(run(params, ids, key)).mean()

        def descend(params, ids, key):
            return jax.tree.map(lambda p, g: p - 0.1 * g, params, jax.grad(loss)(params, ids, key))

        return descend

    def by_recipe(recipe):
        return lambda params, ids, key: ifjax.quantized(logits, ifjax.recipes.get_recipe(recipe), key=key)(params, ids)

    sentences, ids, key = jnp.zeros((64, 32), jnp.int32), jnp.zeros((2, 6), jnp.int32), jax.random.key(0)
    found = {
        "BERT, float32": (embed, (bert.params, sentences)),
        "Llama training, float32": (step(lambda params, ids, key: logits(params, ids)), (llama.params, ids, key)),
    }
    for fmt in ("nvfp4", "if4"):
        rules = ifjax.Rule("encoder/.*(dense|query|key|value)(/kernel)?", fmt, fmt)
        packed, _ = ifjax.quantize_params(bert.params, rules, model=embed, sample=sentences)
        found[f"BERT, W4A4 {fmt}"] = ifjax.quantized(embed, rules), (packed, sentences)
        found[f"Llama training, {fmt}"] = step(by_recipe(fmt)), (llama.params, ids, key)
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
    """Return the least seconds of tracing, lowering, compiling and of all on the clock, and StableHLO's operations."""
    best, clock = [float("inf")] * 4, time.process_time
    for _ in range(rounds):
        jax.clear_caches()
        begin = time.perf_counter()
        times = [clock()]
        traced = jax.jit(lambda *a: function(*a)).trace(*arguments)
        times.append(clock())
        lowered = traced.lower()
        times.append(clock())
        lowered.compile()
        times.append(clock())
        seconds = [b - a for a, b in itertools.pairwise(times)]
        best = list(map(min, best, (*seconds, time.perf_counter() - begin)))
    return best, len(re.findall(r" = \"?stablehlo\.", lowered.as_text()))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--models", action="store_true")
    parser.add_argument("--programs", nargs="+")
    args = parser.parse_args()
    found, rounds = (models(), args.rounds or 1) if args.models else (programs(), args.rounds or 5)
    jax.config.update("jax_enable_compilation_cache", False)
    jax.jit(lambda x: x + 1).lower(square()).compile()  # start-up is no program's
    print(f"jax {jax.__version__}, ifjax {ifjax.__version__}, {jax.default_backend()}\n")
    print("| program | trace | lower | compile | seconds | clock | operations |\n" + "|---" * 7 + "|")
    totals = {}
    for name in args.programs or found:
        (*parts, wall), operations = measure(*found[name], rounds)
        total = sum(parts)
        totals[name] = total, wall, operations
        cells = " | ".join(f"{s:.2f}" for s in (*parts, total, wall))
        print(f"| {name} | {cells} | {operations} |", flush=True)
    for name, (seconds, wall, operations) in totals.items():
        dense = totals.get(f"{name.split(',')[0]}, float32")
        if dense is not None and dense[0] != seconds:
            print(f"| {name}, over float32 | | | | {seconds / dense[0]:.2f} | {wall / dense[1]:.2f} | |")
        first = totals.get(name.replace(f"{LAYERS} ", "1 ", 1)) if name.startswith(f"{LAYERS} ") else None
        if first is not None:
            more = [(a - b) / (LAYERS - 1) for a, b in zip((seconds, wall, operations), first, strict=True)]
            print(f"| each layer more of {name} | | | | {more[0]:.3f} | {more[1]:.3f} | {more[2]:.0f} |")


if __name__ == "__main__":
    main()
