"""Block scales: how a scale becomes a byte, as records.

A `Scale` states its byte <-> value functions, its largest value where a tensor-wide scale maps the tensor's maximum
onto it, and whether bit 7 is free to mark the choice of grid.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax import lax

from ifjax.formats.grids import nearest_multiple


@dataclasses.dataclass(frozen=True)
class Scale:
    """One byte that scales a block.

    Attributes:
        name: under which `SCALES` lists it, for files.
        dtype: the ml_dtypes type whose bit patterns the bytes are.
        encode: float32 >= 0 (infinity allowed) -> int32 byte; saturates, never NaN.
        decode: integer byte in 0..255 -> float32, by element-wise arithmetic (Pallas kernels call it). A
            flag in bit 7 must be cleared before.
        nan: the byte that means NaN.
        top: the byte of the largest finite scale.
        largest: the block scale that the tensor's maximum is mapped to by the tensor-wide factor; None for formats
            without one (MX).
        flag: bit 7 is free to mark that a block took the second decoding.
    """

    name: str
    dtype: np.dtype
    encode: Callable[[jax.Array], jax.Array]
    decode: Callable[[jax.Array], jax.Array]
    nan: int
    top: int
    largest: float | None
    flag: bool


def _encode_e4m3(scale):
    # The arithmetic of a minifloat element: half to even, subnormals in steps of 2^-9.
    _, binade, n = nearest_multiple(scale, 3, 2.0**-9, 448.0)
    return jnp.minimum(jnp.minimum(n, np.float32(16)).astype(jnp.int32) + (binade << 3), 0x7E)


def _decode_e4m3(byte):
    byte = byte.astype(jnp.int32)
    low = byte & 0x7F
    normal = lax.bitcast_convert_type((low << 20) + ((127 - 7) << 23), jnp.float32)
    value = jnp.where(low < 8, low.astype(jnp.float32) * np.float32(2.0**-9), normal)
    value = jnp.where(low == 0x7F, np.float32(np.nan), value)
    return jnp.where(byte & 0x80, -value, value)


def _encode_e8m0(scale):
    # The exponent, rounded up, so that no element saturates (not the OCP rule, which rounds down). 2^126 is the
    # largest scale whose reciprocal is a normal number; no named format reaches it.
    bits = lax.bitcast_convert_type(scale, jnp.int32)
    return jnp.minimum((bits >> 23) + ((bits & 0x7FFFFF) != 0).astype(jnp.int32), 253)


def _decode_e8m0(byte):
    # Byte 0 means that the block is zero, not 2^-127.
    byte = byte.astype(jnp.int32)
    value = lax.bitcast_convert_type(byte << 23, jnp.float32)
    return jnp.where(byte == 0xFF, np.float32(np.nan), value)


E4M3 = Scale(
    "e4m3", np.dtype(ml_dtypes.float8_e4m3fn), _encode_e4m3, _decode_e4m3, nan=0x7F, top=0x7E, largest=448.0, flag=True
)
# 256 leaves room for a block's scale to grow by half: 1.5 * 256 = 384 is an E4M3 number (arXiv 2512.02010).
E4M3_256 = dataclasses.replace(E4M3, name="e4m3_256", largest=256.0)
E8M0 = Scale(
    "e8m0", np.dtype(ml_dtypes.float8_e8m0fnu), _encode_e8m0, _decode_e8m0, nan=0xFF, top=253, largest=None, flag=False
)
SCALES = {scale.name: scale for scale in (E4M3, E4M3_256, E8M0)}
