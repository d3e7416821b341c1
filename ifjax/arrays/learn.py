"""`learn_format`, which learns the grids of a format from data."""

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from ifjax.arrays.quantize import quantize
from ifjax.codec import SEARCHES, Search
from ifjax.formats import Candidate, Format, Grid, TableScale
from ifjax.formats.scales import E3M3
from ifjax.numerics.byte_order import as_array


def learn_format(
    samples: ArrayLike | Sequence[ArrayLike],
    *,
    name: str = "learned",
    grids: int = 2,
    mirror: bool = True,
    bits: int = 4,
    block: int = 16,
    scale: TableScale = E3M3,
    zero: bool = True,
    prevent_zero: bool = False,
    search: str | Search | None = None,
    rounds: int = 120,
    report: Callable[[int, float], Any] | None = None,
) -> Format:
    """Learn grids of arbitrary values from data, and return a format that chooses among them for each block.

    Runs Lloyd-Max on blocks under their rounded scales. In each round a block takes the grid (and with `search` the
    scale) that has the least squared error, each value takes the nearest level, and each level moves to the mean of its
    values, weighted by the square of their scale. The mean squared error never rises from one round to the next. The
    computation is in NumPy, in double precision. About 10^5 values are enough for a grid; 16 levels, 4 grids and 10
    scales take a few minutes.

    Args:
        samples: finite float array of any rank, with blocks along its last axis, or a sequence of them. Each array has
            its own amax. Values beyond the last full block are left out.
        name: name of the format; its grids are named after it.
        grids: number of grids to learn; at most 2^(8 - scale.bits), mirror images included.
        mirror: whether a block may also take the mirror image of each grid.
        bits: bits of a code; a grid has 2^bits levels.
        block: number of values that share a scale.
        scale: type of the block scales. The block with the tensor's maximum gets its largest value.
        zero: whether one level of each grid, code 2^(bits - 1), is fixed at 0. `ifjax.Grid` needs a zero, so with False
            the level nearest to 0 moves there at the end, which costs a little error.
        prevent_zero: whether the smallest nonzero scale replaces 0, so that blocks far below amax do not vanish.
        search: the search that `quantize` will use with the format. It must try payloads by offsets, such as "fast".
        rounds: maximum number of rounds; learning stops earlier if the error no longer falls.
        report: called with (round, mean squared error).

    Returns:
        A Format. Use the record itself, or `ifjax.FORMATS.register(fmt)` to use it by name.

    Raises:
        TypeError: samples are not float arrays, or the scale is not a TableScale.
        ValueError: an argument does not fit, or no sample fills a block.

    Source: the structure of split87 and quad (Grid Games, arXiv 2605.12327), whose values are not published; Lloyd
    1982.

    Example:
        >>> import numpy as np, ifjax
        >>> x = np.random.default_rng(0).standard_normal((64, 64), np.float32)
        >>> fmt = ifjax.learn_format(x, grids=1, rounds=20)
        >>> fmt.bits_per_value, len(fmt.candidates)
        (4.5, 2)
        >>> ifjax.quantize(x, fmt).choices().shape
        (64, 4)
    """
    if not isinstance(scale, TableScale):
        raise TypeError(f"learn_format needs a TableScale, whose payloads are in order, got {type(scale).__name__}")
    for argument, value, least in (("grids", grids, 1), ("bits", bits, 2), ("rounds", rounds, 1)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"learn_format needs {argument} >= {least}, got {value!r}")
    offsets: tuple[int, ...] = (0,)
    if search is not None:
        search = SEARCHES.find(search)
        if search.offsets is None or search.is_decoupled:
            raise ValueError(f"learn_format can search payloads by offsets only, such as 'fast', got {search.name!r}")
        offsets += search.offsets
    levels = _start(grids, bits)
    fields = {"block": block, "scale": scale, "prevent_zero": prevent_zero}
    _format(name, levels, mirror, fields)  # raises if the arguments do not make a format
    # The peak is 1 whatever the levels are, so the scales computed for one grid hold for all rounds.
    plain = _format(name, levels[:1], False, fields)
    arrays = [as_array(x) for x in (samples if isinstance(samples, list | tuple) else [samples])]
    data = [_blocks(x, plain, offsets) for x in arrays]
    if not any(len(blocks) for blocks, _ in data):
        raise ValueError(
            f"learn_format needs samples with a last axis of at least one block of {block} values that are not all "
            f"zero, got shapes {[x.shape for x in arrays]}"
        )
    x, scales = (np.concatenate(part) for part in zip(*data, strict=True))

    before = np.inf
    for i in range(rounds):
        error, choice, scale_of = _assigned(x, scales, levels, mirror)
        if report is not None:
            report(i, error)
        if error >= before:
            break
        before = error
        levels = _moved(x, scale_of, choice, levels, mirror, zero)
    return _format(name, levels, mirror, fields)


def _start(grids: int, bits: int) -> list[np.ndarray]:
    """Return initial levels in [-1, 1] for each grid: half of them negative, then zero, then positive.

    Each grid has its levels denser near zero than the grid before.
    """
    half = 2 ** (bits - 1)
    even = np.concatenate([np.arange(-half, 1) / half, np.arange(1, half) / (half - 1)])
    powers = np.geomspace(0.98, 1.38, grids) if grids > 1 else [1.15]
    return [np.sign(even) * np.abs(even) ** power for power in powers]


def _format(name, levels, mirror, fields) -> Format:
    learned = []
    for i, values in enumerate(levels):
        values = values.copy()
        values[np.argmin(np.abs(values))] = 0
        grid = Grid(name if len(levels) == 1 else f"{name} {i + 1}", tuple(values.tolist()), "lower")
        learned += [Candidate(grid), Candidate(grid.mirrored())] if mirror else [Candidate(grid)]
    scale: TableScale = fields["scale"]
    return Format(name, tuple(learned), peak=1.0, tensor_peak=scale.values[scale.top], **fields)


def _blocks(x, fmt: Format, offsets):
    """Return blocks [n, B] and the scales [n, t] that each may take, its own first. Blocks with scale 0 are dropped."""
    x = x[..., : x.shape[-1] // fmt.block * fmt.block] if x.ndim else x
    q = quantize(x, fmt)
    if not bool(jnp.all(jnp.isfinite(x))):
        raise ValueError("learn_format needs finite samples, got NaN or infinity")
    payloads = np.asarray(q.scales, np.int32).reshape(-1, 1) + np.array(offsets)
    payloads[:, 1:] = np.clip(payloads[:, 1:], 1, fmt.scale.top)
    scales = np.asarray(fmt.scale.decode(jnp.arange(fmt.scale.top + 1))).astype(np.float64)[payloads]
    amax: Any = q.amax
    scales *= float(amax.item()) / float(fmt.tensor_constant())
    kept = scales[:, 0] > 0
    return np.asarray(x, np.float64).reshape(-1, fmt.block)[kept], scales[kept]


def _rounded(y, levels):
    """Return the index of the level nearest to each value of y."""
    return np.searchsorted((levels[1:] + levels[:-1]) / 2, y)


def _assigned(x, scales, levels, mirror):
    """Return the least mean squared error, and the choice and scale of each block that give it."""
    best, choice, scale_of = np.full(len(x), np.inf), np.zeros(len(x), np.int32), scales[:, 0].copy()
    for column in scales.T:
        y = x / column[:, None]
        for i, values in enumerate(levels):
            for mirrored in (0, 1) if mirror else (0,):
                signed = -y if mirrored else y
                error = np.square(values[_rounded(signed, values)] - signed).sum(axis=1) * column**2
                wins = error < best
                best[wins], choice[wins], scale_of[wins] = error[wins], 2 * i + mirrored, column[wins]
    return best.mean() / x.shape[1], choice, scale_of


def _moved(x, scale_of, choice, levels, mirror, zero):
    """Return each level moved to the weighted mean of its values; a level without values stays."""
    moved = []
    for i, values in enumerate(levels):
        mine = choice // 2 == i
        y = x[mine] / np.where(choice[mine] % 2, -scale_of[mine], scale_of[mine])[:, None]
        weight = np.broadcast_to(np.square(scale_of[mine])[:, None], y.shape).ravel()
        code = _rounded(y, values).ravel()
        total, sums = (np.bincount(code, w, len(values)) for w in (weight, weight * y.ravel()))
        means = np.where(total > 0, sums / np.where(total > 0, total, 1), values)
        if zero:
            means[len(values) // 2] = 0
        moved.append(means)
    return moved
