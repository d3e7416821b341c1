"""All formats of 4.5 bits on a pretrained sentence encoder, by nearest rounding, search, GPTQ, and both.

    python benchmarks/frontier_bert.py [--formats quad "razer;razer_act" "octet@row;octet@token" ...]

Model, sentences and figures are those of ptq_bert.py. A format may be followed by another one for activations. @row is
one amax per output of a weight, @token one per token: WEIGHTS@row;ACTIVATIONS@token. Rows are printed as they are
computed, in Markdown. The first table shows the share of each weight's blocks that are flushed (they have nonzero
values but decode to zeros), with one amax for the tensor and with one per row. Weights without such blocks are left
out.
"""

import argparse
import time

import jax
import numpy as np
import ptq_bert as bert

import ifjax

FORMATS = (
    "quad", "octet;octet@token", "octet", "split87", "razer;razer_act", "nf4_mirror", "if4", "mixfp4", "hifloat4",
    "nf4", "sfp4", "fouroversix", "nvint4", "nvfp4", "nvfp4_ue5m3", "fp4_ue5m3_pz", "fp4_e4m3_46",
    "octet@row;octet@token", "quad@row;quad@token", "hifloat4_half_even", "fp4_ue5m3", "fp4_e4m3", "fp4_e4m3_pz",
)  # fmt: skip
METHODS = {
    "nearest": {}, "search": {"search": "fast"}, "gptq": {"gptq": True},
    "gptq, search": {"gptq": True, "search": "fast"},
}  # fmt: skip


def flushed(x: np.ndarray, fmt: str, axis: int, amax_axes: tuple[int, ...] = ()) -> float:
    """Return the share of blocks with nonzero values that decode to zeros only."""

    def any_in_blocks(a):
        a = np.moveaxis(np.asarray(a), axis, -1)
        block = ifjax.get_format(fmt).block
        a = np.pad(a, [(0, 0)] * (a.ndim - 1) + [(0, -a.shape[-1] % block)])
        return (a != 0).reshape(*a.shape[:-1], -1, block).any(-1)

    kept = any_in_blocks(ifjax.fake_quantize(x, fmt, axis=axis, amax_axes=amax_axes))
    there = any_in_blocks(x)
    return float((there & ~kept).sum() / max(there.sum(), 1))


def flushed_rows(variables, formats) -> list[str]:
    """Return table rows of flushed blocks of every matrix, embedding tables too, along each of the last two axes."""
    rows = []
    for path, x in jax.tree_util.tree_leaves_with_path(variables):
        if x.ndim < 2:
            continue
        name = "/".join(str(getattr(key, "key", key)) for key in path[1:])
        for fmt in formats:
            for axis in (-1, -2):
                shares = [flushed(x, fmt, axis)]
                if ifjax.get_format(fmt).has_tensor_scale:
                    shares.append(flushed(x, fmt, axis, (0 if axis == -1 else 1,)))
                if any(shares):
                    by_row = f"{100 * shares[1]:.3f}" if shares[1:] else "no amax"
                    rows.append(f"| {name} | {fmt} | {axis} | {100 * shares[0]:.3f} | {by_row} |")
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", nargs="+", default=FORMATS)
    parser.add_argument(
        "--flushed", nargs="*", default=("quad", "octet", "sfp4", "razer", "fp4_e4m3", "fp4_ue5m3", "nvfp4", "if4"),
        help="formats to count flushed blocks for",
    )  # fmt: skip
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    args = parser.parse_args()
    module, variables = bert.load()
    embed, batches = bert.embedder(module), bert.sentences("docstrings")
    print("| weight | format | blocks along | flushed, % | flushed with an amax a row, % |\n| ---|---|---|---|--- |")
    print("\n".join(flushed_rows(variables, args.flushed)), flush=True)

    dense = jax.jit(embed)
    reference = bert.embeddings(dense, variables, batches)
    calibration = ifjax.calibrate(
        embed, variables, bert.sentences("docstrings_calibration"), bert.rules("if4", gptq=True), progress=False
    )
    print("\n| format | method | W4A16 | W4A4 | seconds to quantize |\n| ---|---|---|---|--- |", flush=True)
    for spec in args.formats:
        of_weights, _, act = spec.partition(";")
        fmt, _, row = of_weights.partition("@")
        act, _, amax = (act or fmt).partition("@")
        own = {"weight_amax": row} if row else {}
        both = jax.jit(ifjax.quantized(embed, bert.rules(fmt, act, **({"act_amax": amax} if amax else {}))))
        for name in args.methods:
            start, method = time.perf_counter(), METHODS[name]
            packed = ifjax.quantize_params(
                variables, bert.rules(fmt, **own, **method), model=module, sample=bert.inputs(*batches[0]),
                calibration=calibration,
            )[0]  # fmt: skip
            seconds = time.perf_counter() - start
            weights = bert.distance(reference, bert.embeddings(dense, bert.dequantized(packed), batches))
            all_ = bert.distance(reference, bert.embeddings(both, packed, batches))
            print(f"| {spec} | {name} | {weights:.4f} | {all_:.4f} | {seconds:.0f} |", flush=True)


if __name__ == "__main__":
    main()
