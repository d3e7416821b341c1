"""How a matrix of block scales lies in memory: row-major, or in the "128x4" swizzle of NVIDIA Blackwell.

ifjax keeps scales row-major, [..., R, C], one column for each block of a row. Blackwell's matrix kernels
(cuBLAS, CUTLASS) read them in tiles of 128 rows and 4 columns, the 512 scales of a tile one after another:

    offset(r, c) = ((r // 128) * (C // 4) + c // 4) * 512 + (r % 32) * 16 + (r % 128 // 32) * 4 + c % 4

with R and C rounded up to whole tiles. Source: cuBLAS documentation on 1D block scaling; IF4's reference code
(arXiv 2603.28765) stores the scales of most of its formats this way.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

TILE = (128, 4)


def swizzle_scales(scales: ArrayLike) -> jax.Array:
    """Scales [..., R, C] in the order of the 128x4 layout, [..., R' * C'], R' and C' rounded up to 128 and 4.

    Any dtype. The padding is zero bytes.

    Raises:
        ValueError: fewer than two axes.

    Example:
        Four scales of row 0, then four of row 32, which is the next in its tile.

        >>> import jax.numpy as jnp
        >>> from ifjax.exchange.swizzle import swizzle_scales, unswizzle_scales
        >>> scales = jnp.arange(100, dtype=jnp.uint8)[:, None] + jnp.zeros((1, 6), jnp.uint8)
        >>> flat = swizzle_scales(scales)
        >>> print(flat.shape, flat[:8])
        (1024,) [ 0  0  0  0 32 32 32 32]
        >>> bool((unswizzle_scales(flat, 100, 6) == scales).all())
        True
    """
    scales = jnp.asarray(scales)
    if scales.ndim < 2:
        raise ValueError(f"scales must be [..., rows, columns], got {scales.shape}: add an axis for rows")
    *batch, rows, columns = scales.shape
    tall, wide = _tiles(rows, columns)
    margins = [(0, 0, 0)] * len(batch) + [(0, tall * 128 - rows, 0), (0, wide * 4 - columns, 0)]
    # Zero bytes rather than the number 0, which E8M0 does not have.
    padded = lax.pad(scales, np.zeros((), scales.dtype), margins)
    tiles = padded.reshape(*batch, tall, 4, 32, wide, 4)
    return _swap(tiles).reshape(*batch, tall * wide * 512)


def unswizzle_scales(flat: ArrayLike, rows: int, columns: int) -> jax.Array:
    """The scales [..., rows, columns] of which `swizzle_scales` made `flat`; the padding is dropped.

    Raises:
        ValueError: the last axis of `flat` is not as long as rows and columns in whole tiles.
    """
    flat = jnp.asarray(flat)
    if rows < 0 or columns < 0:
        raise ValueError(f"rows and columns must not be negative, got {rows} and {columns}")
    tall, wide = _tiles(rows, columns)
    if flat.ndim < 1 or flat.shape[-1] != tall * wide * 512:
        raise ValueError(
            f"{rows} x {columns} scales in whole tiles of 128 x 4 take {tall * wide * 512} values, got shape "
            f"{flat.shape}: rows and columns are those of the scales before swizzle_scales padded them"
        )
    batch = flat.shape[:-1]
    scales = _swap(flat.reshape(*batch, tall, wide, 32, 4, 4)).reshape(*batch, tall * 128, wide * 4)
    return scales[..., :rows, :columns]


def _tiles(rows, columns):
    return math.ceil(rows / TILE[0]), math.ceil(columns / TILE[1])


def _swap(tiles):
    """Exchange [tall, 4 quarters of 32 rows, 32, wide, 4] and [tall, wide, 32, 4, 4]; its own inverse."""
    return jnp.swapaxes(tiles, -4, -2)
