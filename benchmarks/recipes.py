"""The gradient error, memory and time of training recipes, compared with float products.

    python benchmarks/recipes.py [--rows 512] [--width 1024] [--keys 16] [--seed 0] [--json FILE]
                                 [--only rounding gradients residuals time] [--recipes NAME ...] [--size 4096]
                                 [--pairs 5]

rounding   normal numbers rounded by MS-EDEN, stochastically and to nearest: the squared error, and the misalignment
           1 - <x, q> / <x, x>, the part of the input that is lost along its direction. Quartet II's figures
           (arXiv 2601.22813) are shown for comparison.
gradients  y, dx and dw of one layer of `width` by each recipe, compared with float32: cosine and SQNR of one draw, and
           the bias. The bias is the squared error of the mean over `keys` draws, divided by the square of the float
           product, minus the expected contribution of the noise. It includes the rounding of weights and activations,
           since the comparison is with floats, and is negative if it is smaller than the noise. There are two layers:
           one with activations after a normalization, with a few channels 20 times as large, weights of
           1 / sqrt(width), and gradients whose rows differ in size by three binades; and an MLP's second layer, whose
           input is half zeros.
residuals  the memory that a Dense of `width` keeps for its backward pass, in bits per value of activations and of
           weights, both in bfloat16, with residuals="float" and, if the recipe allows it, "packed". It is read from
           the traced program.
time       the forward pass, and the forward and backward pass, of a Dense of size x size with 512 tokens in bfloat16,
           timed in turn with the recipe bf16: the median of the ratios within a round, of wall time and processor time.
"""

import argparse
import dataclasses
import functools
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from codec import alternate, machine

import ifjax
from ifjax.arrays import ms_eden
from ifjax.training import RECIPES, get_recipe, quantized_dot_general

SECTIONS = ("rounding", "gradients", "residuals", "time")
MATRICES = (((1,), (0,)), ((), ()))
# Squared errors, in units of 1e-3, and misalignments from Quartet II's notebook; None where it states none. Its
# misalignment of rounding to nearest uses MS-EDEN's own, smaller scales (see tests/arrays/test_ms_eden.py); with E4M3's
# full range it is .0045.
PUBLISHED = {
    "nearest nvfp4": (9.0, 0.0079), "nearest fouroversix": (7.6, None), "stochastic nvfp4": (23.5, None),
    "ms_eden nvfp4": (9.8, 0.00056), "ms_eden if4": (None, None), "nearest if4": (None, None),
    "stochastic if4": (None, None),
}  # fmt: skip
TARGETS = {"forward": ("if4", 2.3), "forward and backward": (None, 3.0)}


def rounding(args) -> list[dict]:
    """Return one row for each rounding."""
    x = jax.random.normal(jax.random.key(args.seed), (2048, 512))
    signs = ifjax.random_signs(jax.random.key(args.seed + 1), 128)
    rotated, key = ifjax.hadamard(x, size=128, signs=signs), jax.random.key(args.seed + 2)
    rows = []
    for name, (error, missing) in PUBLISHED.items():
        how, fmt = name.split()
        if how == "ms_eden":
            y = ms_eden(x, fmt, size=128, signs=signs, key=key)
        elif how == "nearest":
            y = ifjax.fake_quantize(rotated, fmt)
        else:
            y = ifjax.fake_quantize(rotated, fmt, rounding="stochastic_unbiased", key=key)
        z, y = (np.asarray(a, np.float64) for a in (rotated, y))
        row = {"rounding": name, "error x 1e-3": 1e3 * np.mean((y - z) ** 2) / np.mean(z**2), "published": error}
        rows.append(row | {"misalignment": 1 - np.vdot(z, y) / np.vdot(z, z), "published misalignment": missing})
    return rows


def layers(args):
    """Return (name, x, w, g) of layers that resemble those of a transformer."""
    rng, n = np.random.default_rng(args.seed), args.width
    normal = functools.partial(rng.standard_normal, dtype=np.float32)
    x, w = normal((args.rows, n)), normal((n, n)) / np.sqrt(n, dtype=np.float32)
    g = normal((args.rows, n)) * np.exp2(rng.uniform(-3, 0, (args.rows, 1))).astype(np.float32)
    spread = np.where(np.arange(n) % 128 == 5, 20, 1).astype(np.float32)
    yield "normalized", x, w, g
    yield "outlier channels", x * spread, w, g
    yield "second of an MLP", np.maximum(x, 0) ** 2, w, g


def gradients(args) -> list[dict]:
    """Return one row for each layer, recipe and product."""
    rows = []
    for name in args.recipes:

        @jax.jit
        def products(x, w, g, key, name=name):
            y, pull = jax.vjp(lambda x, w: quantized_dot_general(x, w, MATRICES, name, key), x, w)
            return y, *pull(g)

        for layer, x, w, g in layers(args):
            wants = [np.asarray(a, np.float64) for a in (x @ w, g @ w.T, x.T @ g)]
            total, squares = [0.0] * 3, [0.0] * 3
            for key in jax.random.split(jax.random.key(args.seed), args.keys):
                gots = [np.asarray(a, np.float64) for a in products(x, w, g, key)]
                total = [t + got for t, got in zip(total, gots, strict=True)]
                squares = [s + np.sum(got**2) for s, got in zip(squares, gots, strict=True)]
            for product, want, got, s, q in zip(("y", "dx", "dw"), wants, gots, total, squares, strict=True):
                mean, power = s / args.keys, np.sum(want**2)
                noise = (q / args.keys - np.sum(mean**2)) / max(args.keys - 1, 1)  # of the mean, over all values
                error = np.sum((got - want) ** 2)
                row = {"layer": layer, "recipe": name, "product": product}
                row |= {"cosine": np.vdot(got, want) / np.sqrt(np.sum(got**2) * power)}
                row |= {"SQNR dB": 10 * np.log10(power / error) if error else np.inf}
                row |= {"bias x 1e-3": 1e3 * (np.sum((mean - want) ** 2) - noise) / power}
                rows.append(row | {"misalignment": 1 - np.vdot(mean, want) / power})
                print(rows[-1], file=sys.stderr)
    return rows


def residuals(args) -> list[dict]:
    """Return one row for each recipe and kind of residuals."""
    n, rows = args.width, []

    def kept(recipe, tokens, features):
        def backward(x, w, key):
            return jax.vjp(lambda x, w: quantized_dot_general(x, w, MATRICES, recipe, key), x, w)[1]

        arrays = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((tokens, n), (n, features))]
        leaves = jax.tree.leaves(jax.eval_shape(backward, *arrays, jax.random.key(0)))
        return sum(8 * a.size * a.dtype.itemsize for a in leaves)

    for name in args.recipes:
        recipe = get_recipe(name)
        for residuals in ("float", "packed"):
            try:
                recipe = dataclasses.replace(recipe, residuals=residuals)
            except ValueError:  # the recipe has no residuals to pack
                continue
            least = kept(recipe, 512, 512)
            of_x, of_w = (kept(recipe, *lengths) - least for lengths in ((1024, 512), (512, 1024)))
            rows.append({"recipe": name, "residuals": residuals})
            rows[-1] |= {"bits an activation": of_x / 512 / n, "bits a weight": of_w / 512 / n}
    return rows


def time(args) -> list[dict]:
    """Return one row for each recipe, with its time divided by that of bf16."""
    keys = jax.random.split(jax.random.key(args.seed), 4)
    shapes = (512, args.size), (args.size, args.size), (512, args.size)
    x, w, g = (jax.random.normal(k, s).astype(jnp.bfloat16) for k, s in zip(keys, shapes, strict=False))

    def runs(name):
        product = functools.partial(quantized_dot_general, dimension_numbers=MATRICES, recipe=name)

        def whole(x, w, g, key):
            y, pull = jax.vjp(lambda x, w: product(x, w, key=key), x, w)
            return y, *pull(g)

        forward, both = jax.jit(lambda x, w: product(x, w)), jax.jit(whole)
        return {"forward": lambda: forward(x, w), "forward and backward": lambda: both(x, w, g, keys[3])}

    plain, rows = runs("bf16"), []
    for name in args.recipes:
        row = {"recipe": name}
        for what, run in runs(name).items():
            times = alternate({"bf16": plain[what], "recipe": run}, args.pairs)
            wall, processor = np.median(times["recipe"] / times["bf16"], axis=0).tolist()
            row |= {f"{what}, ms": 1e3 * float(np.median(times["recipe"][:, 0])), f"{what} / bf16": wall}
            row |= {f"{what} / bf16, processor": processor}
            of, bound = TARGETS[what]
            row |= {f"{what}, target": f"{bound}" if of in (None, name) else ""}
        rows.append(row)
        print(row, file=sys.stderr)
    return rows


def table(rows: list[dict]) -> str:
    """Return the rows as a Markdown table."""
    def cell(value):
        return f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)

    lines = [list(rows[0]), ["---"] * len(rows[0]), *([cell(v) for v in row.values()] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for option, default in (("rows", 512), ("width", 1024), ("keys", 16), ("seed", 0), ("size", 4096), ("pairs", 5)):
        parser.add_argument(f"--{option}", type=int, default=default)
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=SECTIONS)
    parser.add_argument("--recipes", nargs="+", choices=list(RECIPES), default=list(RECIPES))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    described, results = machine(), {}
    print(f"{described}\n")
    for section in args.only:
        measure = {"rounding": rounding, "gradients": gradients, "residuals": residuals, "time": time}[section]
        results[section] = measure(args)
        print(f"## {section}\n\n{table(results[section])}", flush=True)
    if args.json:
        args.json.write_text(json.dumps({"machine": described, **results}, indent=1))


if __name__ == "__main__":
    main()
