"""Writes gallery.md and its pictures: every named format, from its record. `python docs/_gallery.py`; some minutes."""

from pathlib import Path

import ifjax
from ifjax import analysis, plots
from ifjax.cli.formats import matrix_bytes

FOLDER = Path(__file__).resolve().parent
DISTRIBUTIONS = ("normal", "laplace")
# Who reads a format's bytes besides ifjax, by the layouts of ifjax.exchange.
NVFP4_READERS = "vLLM, transformers, TensorRT-LLM, SGLang, MLX, llama.cpp"
READERS = {
    "nvfp4": NVFP4_READERS, "fouroversix": f"{NVFP4_READERS} (as NVFP4)", "mxfp4": "vLLM, transformers, MLX, llama.cpp"
}  # fmt: skip

HEAD = """\
# All formats

Written by `python docs/_gallery.py` from the records in `ifjax.FORMATS`. Bits are those of a value, scales included.
"normal" and "laplace" are squared error over squared signal, x 1e-3, of 2^20 random numbers of that distribution:
**lower is better**. MB are those of a matrix of 4096 x 4096, which takes 33.55 MB in bfloat16. Any format takes other
block sizes: `if4_bs32`. [Concepts](concepts.md) explains blocks, scales and grids.

![Error against bits, on weights of a BERT](pictures/pareto.png)

`ifjax compare --formats all --out docs/pictures` makes this picture, on a few rows of each matrix of all-MiniLM-L6-v2.
"""


def distinct():
    """The named formats, each once, the fewest bits first."""
    records = dict.fromkeys(ifjax.FORMATS.values())
    return sorted(records, key=lambda fmt: fmt.bits_per_value)


def facts(fmt: ifjax.Format) -> list[str]:
    """The columns that need no measurement."""
    names = list(dict.fromkeys(decoding.grid.name for decoding in fmt.decodings))
    grids = " or ".join(names[:2]) + (f" and {more} more" if (more := len(names) - 2) > 0 else "")
    link, bits = f"[`{fmt.name}`](#{fmt.name})", f"{fmt.bits_per_value:g}"
    return [link, bits, f"{matrix_bytes(fmt) / 1e6:.2f}", str(fmt.block), fmt.scale.name, grids]


def error_of(fmt: ifjax.Format, distribution: str) -> str:
    (row,) = analysis.synthetic_table([fmt], distributions=[distribution])
    return f"{1e3 * row.error.normalized_mse:.2f}"


def main() -> None:
    headings = ("format", "bits", *DISTRIBUTIONS, "MB", "block", "scale", "grids")
    rows = [headings, ["---"] * len(headings)]
    for fmt in distinct():
        link, bits, *others = facts(fmt)
        rows.append([link, bits, *(error_of(fmt, name) for name in DISTRIBUTIONS), *others])
    parts = [HEAD, "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"]
    (FOLDER / "pictures" / "grids").mkdir(parents=True, exist_ok=True)
    for fmt in distinct():
        figure = plots.plot_grid(fmt)
        figure.savefig(FOLDER / "pictures" / "grids" / f"{fmt.name}.png", dpi=80)
        readers = READERS.get(fmt.name, "ifjax only")
        picture = f"![Values of {fmt.name} in a block](pictures/grids/{fmt.name}.png)"
        parts.append(f"## {fmt.name}\n\n{fmt.doc}\n\nRead by: {readers}.\n\n{picture}\n")
    (FOLDER / "gallery.md").write_text("\n".join(parts), "utf-8")


if __name__ == "__main__":
    main()
