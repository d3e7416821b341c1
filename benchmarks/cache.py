"""The error of attention with a packed key-value cache, by context length.

    python benchmarks/cache.py [--formats nvfp4 if4 if6]

The figure is the root mean square error relative to float32 of attention of 16 normal queries over normal keys and
values, with 8 heads of 64. The queries are multiplied by the sharpness; 3 is typical of sharp heads. The window is the
number of tokens kept in floats.
"""

import argparse

import jax
import jax.numpy as jnp

import ifjax


def error(fmt: str, length: int, window: int, sharpness: float) -> float:
    keys = jax.random.split(jax.random.key(length), 3)
    q, k, v = (jax.random.normal(key, (1, length, 8, 64)) for key in keys)
    exact, packed = (
        ifjax.PackedCache.zeros((1, length, 8, 64), name, window=w).append(k, v).attend(sharpness * q[:, -16:])
        for name, w in ((None, 0), (fmt, min(window, length)))
    )
    return float(jnp.linalg.norm(packed - exact) / jnp.linalg.norm(exact))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", nargs="+", default=["nvfp4", "if4", "if6"])
    parser.add_argument("--lengths", nargs="+", type=int, default=[64, 256, 1024, 4096])
    options = parser.parse_args()
    print("| format | sharpness | window | " + " | ".join(map(str, options.lengths)) + " |")
    print("|---" * (3 + len(options.lengths)) + "|")
    for fmt in options.formats:
        for sharpness, window in ((1.0, 0), (3.0, 0), (3.0, 64)):
            errors = [error(fmt, n, window, sharpness) for n in options.lengths]
            print(f"| {fmt} | {sharpness:g} | {window} | " + " | ".join(f"{e:.3f}" for e in errors) + " |", flush=True)


if __name__ == "__main__":
    main()
