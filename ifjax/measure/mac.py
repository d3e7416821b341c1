"""The multiply-accumulate units of the IF4 paper's hardware, bit for bit, and how far off they are.

A beat is 16 pairs of codes, one for each of 16 lanes, with one scale byte for each operand. A segment is a number of
beats whose products add up to one float32:

    scale   = (a_scale * w_scale) * step      6/7 if one operand is integers, 36/49 if both are; one rounding
    product = (a * w) * scale                 a * w is exact; one rounding
    lane    = product[0], then += product[1], += product[2], ...       16 sums, each beat rounded
    result  = ((lane 0 + lane 1) + (lane 2 + lane 3)) + ...            a tree of adjacent pairs

The tensors' own factors (amax / K) are left to the caller, as the units do. Source: the RTL of arXiv 2603.28765 and
the generator of its test vectors. The two differ in the sign of zero, and we follow the RTL: the first beat is loaded,
not added to +0, so that a segment of nothing but -0 gives -0.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jaxtyping import Array, Float32, Float64, UInt8

from ifjax.codec.blocks import pick
from ifjax.formats import E4M3, Format, get_format

LANES = 16


def if4_mac(
    a_codes: UInt8[Array, "*b beats 16"],
    a_scales: UInt8[Array, "*b beats"],
    w_codes: UInt8[Array, "*b beats 16"],
    w_scales: UInt8[Array, "*b beats"],
) -> Float32[Array, "*b"]:
    """The dot product of a segment as the IF4 unit computes it. Leading axes are further segments; vmap works too.

    Codes are one a byte, as `QTensor.unpacked_codes` gives them; bit 7 of a scale byte says that its 16 codes are
    integers. The scale payload 0x7F, elsewhere NaN, is clamped to 448: the unit knows no NaN. The FP code 0x8 is -0.
    No beats give +0.

    Raises:
        ValueError: shapes other than these; a code above 15; the integer code 0x8 (-8), which the unit does not have.
            Where the arrays are traced, by jit or vmap, such codes cannot be seen: they make the result NaN.
        TypeError: an array that is not uint8.

    Example:
        Two beats of 1.5 * 1.5, and two of 3 * 1.5 in which bit 7 makes the 3 an integer, worth 3 * 6/7.

        >>> import jax.numpy as jnp
        >>> from ifjax.measure.mac import if4_mac
        >>> codes, ones = jnp.full((2, 16), 3, jnp.uint8), jnp.full(2, 0x38, jnp.uint8)
        >>> print(if4_mac(codes, ones, codes, ones))
        72.0
        >>> print(if4_mac(codes, ones | 0x80, codes, ones))
        123.42857
    """
    return _checked_mac(a_codes, a_scales, w_codes, w_scales, get_format("if4"))


def nvfp4_mac(
    a_codes: UInt8[Array, "*b beats 16"],
    a_scales: UInt8[Array, "*b beats"],
    w_codes: UInt8[Array, "*b beats 16"],
    w_scales: UInt8[Array, "*b beats"],
) -> Float32[Array, "*b"]:
    """`if4_mac` for NVFP4: all codes are E2M1, and bit 7 of the scale bytes is ignored.

    Raises:
        ValueError: as `if4_mac`, but that the code 0x8 is always -0.
        TypeError: an array that is not uint8.
    """
    return _checked_mac(a_codes, a_scales, w_codes, w_scales, get_format("nvfp4"))


class MacError(NamedTuple):
    """A unit's result and the exact dot product, as numpy arrays.

    Attributes:
        mac: float32, what the unit gives.
        exact: the dot product of the numbers that codes and scales stand for.
        error: mac - exact.
        relative: |error| over the sum of the absolute terms, 0 where that is 0. Not over |exact|, which cancellation
            makes as small as it likes. At most (1 + 2^-24)^(beats + 6) - 1: three roundings a product, the constant's
            included, beats - 1 in a lane and four in the tree.
    """

    mac: Float32[np.ndarray, "*b"]
    exact: Float64[np.ndarray, "*b"]
    error: Float64[np.ndarray, "*b"]
    relative: Float64[np.ndarray, "*b"]


def mac_error(
    a_codes: UInt8[Array, "*b beats 16"],
    a_scales: UInt8[Array, "*b beats"],
    w_codes: UInt8[Array, "*b beats 16"],
    w_scales: UInt8[Array, "*b beats"],
    *,
    fmt: str | Format = "if4",
) -> MacError:
    """Compare what a unit gives with the exact dot product, on the host: not for use under jit.

    Args:
        fmt: what the unit decodes, any format of 4-bit codes in blocks of 16 with E4M3 scales. "if4" and "nvfp4" are
            the published units.

    "Exact" is float64: a beat's dot product takes at most 48 bits and so is exact; the factor 6/7 or 36/49 and the sum
    over beats are rounded, each to 2^-53, where the unit rounds to 2^-24.

    Raises:
        ValueError: as `if4_mac`; a format that such a unit cannot decode.
        TypeError: an array that is not uint8.

    Example:
        >>> import jax.numpy as jnp
        >>> from ifjax.measure.mac import mac_error
        >>> codes, ones = jnp.full((2, 16), 3, jnp.uint8), jnp.full(2, 0x38, jnp.uint8)
        >>> result = mac_error(codes, ones | 0x80, codes, ones)
        >>> print(f"{result.exact:.10f} {result.error:.1e} {result.relative:.1e}")
        123.4285714286 2.2e-06 1.8e-08
    """
    fmt = get_format(fmt)
    if fmt.bits != 4 or fmt.block != LANES or fmt.scale != E4M3:
        raise ValueError(
            f"the unit decodes 4-bit codes in blocks of {LANES} with e4m3 scales; {fmt.name} has {fmt.bits}-bit codes "
            f"in blocks of {fmt.block} with {fmt.scale.name} scales: use a format such as if4, nvfp4 or nvint4"
        )
    if any(decoding.offset for decoding in fmt.decodings):
        raise ValueError(f"the unit multiplies values of the grids as they are, and {fmt.name} adds an offset to them")
    mac = np.asarray(_checked_mac(a_codes, a_scales, w_codes, w_scales, fmt))
    a, w = (
        [np.asarray(part) for part in _decode(jnp.asarray(codes), jnp.asarray(scales), fmt)]
        for codes, scales in [(a_codes, a_scales), (w_codes, w_scales)]
    )
    terms = np.multiply(a[0], w[0], dtype=np.float64)
    scale = np.multiply(a[1], w[1], dtype=np.float64) * _steps(fmt)[a[2], w[2]]
    exact = np.sum(np.sum(terms, -1) * scale, -1)
    size = np.sum(np.sum(np.abs(terms), -1) * scale, -1)
    error = mac - exact
    return MacError(mac, exact, error, np.abs(error) / np.where(size > 0, size, 1))


@functools.partial(jax.jit, static_argnames="fmt")
def _mac(a_codes, a_scales, w_codes, w_scales, fmt):
    a, a_scale, a_flag = _decode(a_codes, a_scales, fmt)
    w, w_scale, w_flag = _decode(w_codes, w_scales, fmt)
    # 36/49 is one constant: the product of the steps, rounded once.
    scale = a_scale * w_scale * jnp.asarray(_steps(fmt), jnp.float32)[a_flag, w_flag]
    products = jnp.moveaxis(_signed_product(a * w, scale[..., None]), -2, 0)
    if not len(products):
        return jnp.zeros(products.shape[1:-1], jnp.float32)
    lanes, _ = lax.scan(lambda lanes, product: (lanes + product, None), products[0], products[1:])
    while lanes.shape[-1] > 1:
        lanes = lanes[..., 0::2] + lanes[..., 1::2]
    return lanes[..., 0]


def _signed_product(x, scale):
    """x * scale for scale >= 0, rounded once whatever is added to it.

    The sign is put on as a bit, as in the unit. That changes no result, and compilers do not form a fused multiply-add
    of a product and a sum with an integer operation between them. Measured on XLA:CPU without it: 57 % of random
    segments of 40 beats differ if the loop over beats forms the products. Forming them before the loop helps, until a
    loop of one beat is inlined: 10 % of segments of two beats. `lax.optimization_barrier` changes none of this.
    """
    sign = lax.bitcast_convert_type(x, jnp.int32) & np.int32(-(2**31))
    magnitude = lax.bitcast_convert_type(jnp.abs(x) * scale, jnp.int32)
    return lax.bitcast_convert_type(magnitude ^ sign, jnp.float32)


@functools.partial(jax.jit, static_argnames="fmt")
def _decode(codes, scales, fmt):
    """float32 values [*b, beats, 16], NaN for codes that do not exist; float32 scales and int32 flags [*b, beats]."""
    # The unit without a choice ignores bit 7.
    flag, _ = fmt.split(scales.astype(jnp.int32))
    flag = jnp.broadcast_to(jnp.asarray(flag, jnp.int32), scales.shape)
    values = jnp.stack([_values(codes, decoding.grid) for decoding in fmt.decodings])
    payload = jnp.minimum(scales & 0x7F, fmt.scale.top)
    return pick(flag[..., None], list(values)), fmt.scale.decode(payload), flag


def _values(codes, grid):
    codes = codes.astype(jnp.int32)
    unknown = codes >> grid.bits > 0
    for code in grid.unused:
        unknown |= codes == code
    return jnp.where(unknown, np.float32(np.nan), grid.decode(codes))


def _steps(fmt):
    """float64 [flag of a, flag of w]: what the product of two units is worth."""
    steps = [decoding.step for decoding in fmt.decodings]
    return np.multiply.outer(steps, steps)


def _checked_mac(a_codes, a_scales, w_codes, w_scales, fmt):
    arrays = {"a_codes": a_codes, "a_scales": a_scales, "w_codes": w_codes, "w_scales": w_scales}
    arrays = {name: jnp.asarray(array) for name, array in arrays.items()}
    for name, array in arrays.items():
        if array.dtype != jnp.uint8:
            how = f".astype(jnp.uint8) for {name}" if "codes" in name else ".view(jnp.uint8) for float8 scales"
            raise TypeError(f"{name} must be uint8, got {array.dtype}: write {how}")
    shapes = [array.shape for array in arrays.values()]
    *batch, beats, lanes = shapes[0] if len(shapes[0]) > 1 else (0, 0)
    if lanes != LANES or shapes != [(*batch, beats, lanes), (*batch, beats)] * 2:
        got = ", ".join(f"{name} {array.shape}" for name, array in arrays.items())
        raise ValueError(
            f"a unit takes codes [..., beats, {LANES}] and scales [..., beats], alike for a and w, got {got}: write "
            f"codes.reshape(-1, {LANES}) for a row of codes, and jax.vmap to pair one operand with many"
        )
    result = _mac(*arrays.values(), fmt)
    # All values are finite: a NaN comes from a code that does not exist.
    if not isinstance(result, Tracer) and bool(jnp.isnan(result).any()):
        raise ValueError(_first_unknown_code(arrays, fmt))
    return result


def _first_unknown_code(arrays, fmt):
    for codes, scales in [("a_codes", "a_scales"), ("w_codes", "w_scales")]:
        values, _, flag = _decode(arrays[codes], arrays[scales], fmt)
        for at in np.argwhere(np.isnan(values)).tolist():
            code, grid = int(arrays[codes][*at]), fmt.decodings[int(flag[*at[:-1]])].grid
            why = "unpack bytes that hold two codes" if code >> grid.bits else f"its values end at -{grid.max:g}"
            return f"{codes}{at} is {code:#x}, which is no code of {grid.name}: {why}"
