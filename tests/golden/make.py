"""Writes formats.npz beside this file: seeded inputs, and what tests/oracle.py makes of them in every format.

Run by hand: python tests/golden/make.py
"""

import sys
from pathlib import Path

import ml_dtypes
import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import oracle  # noqa: E402

SHAPE = (4, 96)  # whole blocks of 8, 16 and 32


def inputs(rng):
    """f32[4, 96] by kind. No number is subnormal, so that platforms that flush them see the same inputs."""
    gauss = rng.standard_normal(SHAPE)
    ordinary = rng.standard_normal(SHAPE)
    outlier = rng.standard_normal(SHAPE)
    outlier[:, ::8] *= 50
    single = np.zeros(SHAPE)
    single[2, 37] = -3.7
    signed = rng.choice([0.0, -0.0, 1e-9, -1e-9, 1.0, -1.0], SHAPE, p=[0.3, 0.3, 0.15, 0.15, 0.05, 0.05])
    decades = _eights(rng.uniform(-30, 30, (SHAPE[0], SHAPE[1] // 8)))
    # amax 1 and block maxima from half the least E4M3 scale to eight times it
    faint = _eights(2.0 ** rng.uniform(-20, -15, (SHAPE[0], SHAPE[1] // 8)))
    subnormal = faint * rng.uniform(-1, 1, SHAPE)
    subnormal[0, 0] = 1
    kinds = {
        "gauss": gauss,
        "heavy_tail": rng.standard_t(2, SHAPE),
        "uniform": rng.uniform(-1, 1, SHAPE),
        "outlier": outlier,
        "zeros": np.zeros(SHAPE),
        "one_nonzero": single,
        "signed_zeros": signed,
        "subnormal_scale": subnormal,
        "tiny_1e-30": ordinary / np.abs(ordinary).max() * 1e-30,
        "huge_1e33": ordinary / np.abs(ordinary).max() * 1e33,
        "wide": rng.standard_normal(SHAPE) * 10.0**decades,
        "bf16": rng.standard_normal(SHAPE).astype(ml_dtypes.bfloat16),
    }
    return {kind: np.asarray(x).astype(np.float32) for kind, x in kinds.items()}


def ties(fmt, rng):
    """f32[4, 96] whose scaled values lie on the midpoints of the candidates' grids, or one ulp beside them.

    Block scales are powers of two and amax = K, so that the scaling is exact.
    """
    x = _nudged(rng.choice(_midpoints(fmt), SHAPE), rng)
    x[:, :: fmt.block] = fmt.peak
    x = np.ldexp(x, rng.integers(-6, 7, _blocks(fmt)).repeat(fmt.block, axis=1)) * rng.choice([-1, 1], SHAPE)
    x[0, 0] = fmt.peak * (fmt.scale_max or 1)
    return x.astype(np.float32)


def edges(fmt, rng):
    """f32[4, 96] whose block scales and scaled values both lie within an ulp or so of where rounding turns.

    amax and scales are no powers of two, so that the order of the operations shows, and any reciprocal.
    """
    amax = rng.uniform(1, 2)
    if fmt.scale_max is None:
        one, turns = 1.0, 2.0 ** np.arange(-20, 20)
        scales = turns * rng.choice([1, 2], turns.size)
    else:
        one, e4m3 = amax / (fmt.peak * fmt.scale_max), np.array(oracle.E4M3.magnitudes)
        e4m3 = e4m3[: np.searchsorted(e4m3, fmt.scale_max)]
        turns, scales = (
            (e4m3[1:] + e4m3[:-1]) / 2,
            e4m3[1:] - rng.choice([0, 1], e4m3.size - 1) * np.diff(e4m3),
        )
    pick = rng.integers(turns.size // 2, turns.size, _blocks(fmt))
    points = _midpoints(fmt)
    elements = rng.choice(points[points < 0.9 * fmt.peak], SHAPE) * scales[pick].repeat(fmt.block, axis=1)
    elements[:, :: fmt.block] = turns[pick] * fmt.peak
    x = _nudged(elements * one, rng) * rng.choice([-1, 1], SHAPE)
    if fmt.scale_max is not None:
        x[0, 0] = amax
    return x.astype(np.float32)


def _midpoints(fmt):
    """f64: where the rounding of a candidate turns, in units of the first, below the block's maximum."""
    points = []
    for grid, _, inverse, stretch in fmt.candidates:
        magnitudes = np.array(grid.magnitudes)
        points.append((magnitudes[1:] + magnitudes[:-1]) / 2 / float(inverse) * float(stretch))
    points = np.concatenate(points)
    return points[points < fmt.peak]


def _nudged(x, rng):
    """x in f32: half as it is, a quarter one ulp lower, a quarter one ulp higher."""
    x = x.astype(np.float32)
    return np.nextafter(x, rng.choice([0, 1, 1, 2], x.shape).astype(np.float32) * x)


def _blocks(fmt):
    return SHAPE[0], SHAPE[1] // fmt.block


def _eights(per_eight):
    return np.repeat(per_eight, 8, axis=1)


def main():
    rng = np.random.default_rng(20250)
    shared = inputs(rng)
    out = {"kinds": np.array([*shared, "ties", "edges"]), "x": np.stack(list(shared.values()))}
    for name, fmt in oracle.FORMATS.items():
        out[f"{name}__x"] = np.stack([ties(fmt, rng), edges(fmt, rng)])
        xs = [*shared.values(), *out[f"{name}__x"]]
        for loss in fmt.losses:
            results = [oracle.quantize(x, fmt, loss=loss) for x in xs]
            for field in ("codes", "scales", "amax", "deq", "ambiguous"):
                out[f"{name}__{loss}__{field}"] = np.stack([getattr(r, field) for r in results])
    path = HERE / "formats.npz"
    np.savez_compressed(path, **out)
    print(f"{path.name}: {len(out)} arrays, {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
