"""Data-dependent block rotations: the greedy rotation of DuQuant++ (arXiv 2604.17789).

Each step spreads the column with the largest magnitude over its block by a fixed orthogonal matrix.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike


class Greedy(NamedTuple):
    """Result of `greedy_rotation`.

    Attributes:
        rotation: orthogonal matrix, float64 [n, n]; rows are multiplied by it from the right.
        columns: for each step that was kept, the column of the largest magnitude.
        peaks: the range (maximum minus minimum) of the rows before each step that was tried, and after the last.
    """

    rotation: np.ndarray
    columns: tuple[int, ...]
    peaks: np.ndarray


def base_rotation(n: int) -> np.ndarray:
    """Return an orthogonal matrix, float64 [n, n], that spreads the first column: its first row is all 1 / sqrt(n)."""
    if n < 2:
        raise ValueError(f"a rotation needs at least two columns, got {n}")
    rotation = np.eye(n)
    for i in range(n - 1):
        cos, sin = np.sqrt(1 / (i + 2)), np.sqrt((i + 1) / (i + 2))
        pair = rotation[[i, i + 1]]
        rotation[i], rotation[i + 1] = cos * pair[0] - sin * pair[1], sin * pair[0] + cos * pair[1]
    order = [n - 1, *range(1, n - 1), 0] if n > 2 else [1, 0]
    return rotation[order][:, order]


def greedy_rotation(rows: ArrayLike, n: int, steps: int = 128) -> Greedy:
    """Find a rotation of blocks of n values that lowers the largest magnitudes of the rows.

    Each step spreads the column of the largest magnitude evenly. The steps up to the smallest range of values are kept.

    Args:
        rows: activations [..., k], k a multiple of n; already smoothed, if smoothing is used.
        n: length of a block: 16 for NVFP4 and its relatives, 32 for MX formats.
        steps: maximum number of steps.

    Raises:
        ValueError: n does not divide k, or there are no rows.

    Example:
        >>> import numpy as np
        >>> from ifjax.numerics.rotations import greedy_rotation
        >>> rows = np.zeros((4, 16))
        >>> rows[:, 3] = 8
        >>> found = greedy_rotation(rows, 16)
        >>> round(float(np.abs(rows @ found.rotation).max()), 6)
        2.0
    """
    values = np.asarray(rows, np.float64)
    if values.shape[-1] % n or not values.size:
        raise ValueError(f"rows of {values.shape[-1]} values are no blocks of {n}")
    values = values.reshape(-1, n)
    base, columns, peaks = base_rotation(n), [], []
    for _ in range(steps):
        high, low = values.argmax(), values.argmin()
        peaks.append(values.flat[high] - values.flat[low])
        column = int((high if abs(values.flat[high]) >= abs(values.flat[low]) else low) % n)
        columns.append(column)
        values = values @ _exchanged(base, column)
    peaks.append(values.max() - values.min())
    kept = int(np.argmin(peaks))
    rotation = np.eye(n)
    for column in columns[:kept]:
        rotation = rotation @ _exchanged(base, column)
    return Greedy(rotation, tuple(columns[:kept]), np.asarray(peaks))


def _exchanged(base: np.ndarray, column: int) -> np.ndarray:
    """Return the base rotation with rows, and columns, 0 and `column` exchanged."""
    order = np.arange(len(base))
    order[[0, column]] = order[[column, 0]]
    return base[order][:, order]
