"""Bit-exact models of the multiply-accumulate units of the IF4 paper's hardware, and their error.

A beat is 16 pairs of codes, one for each of 16 lanes, with one scale byte for each operand. A segment is a sequence of
beats whose products are summed to one float32:

    scale   = (a_scale * w_scale) * step      6/7 if one operand is integers, 36/49 if both are; one rounding
    product = (a * w) * scale                 a * w is exact; one rounding
    lane    = product[0], then += product[1], += product[2], ...       16 sums, each beat rounded
    result  = ((lane 0 + lane 1) + (lane 2 + lane 3)) + ...            a tree of adjacent pairs

The tensor scales (amax / K) are left to the caller, as in the units. Source: the RTL of arXiv 2603.28765 and the
generator of its test vectors. The two differ in the sign of zero, and we follow the RTL: the first beat is loaded, not
added to +0, so a segment with only -0 gives -0.
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
    """Compute the dot product of a segment as the IF4 unit does, float32. Leading axes enumerate segments; vmap works.

    Codes are one per byte, as from `QTensor.unpacked_codes`. Bit 7 of a scale byte marks its 16 codes as integers. The
    scale payload 0x7F, which is NaN elsewhere, is clamped to 448, because the unit has no NaN. The FP code 0x8 is -0.
    A segment without beats gives +0.

    Raises:
        ValueError: shapes do not fit, a code is above 15, or an integer code is 0x8 (-8), which the unit does not have.
            If the arrays are traced, by jit or vmap, such codes cause no error but make the result NaN.
        TypeError: an array is not uint8.

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
    """Compute the dot product as the NVFP4 unit does: `if4_mac` with all codes E2M1 and bit 7 of scale bytes ignored.

    Raises:
        ValueError: as for `if4_mac`, except that the code 0x8 is always valid and means -0.
        TypeError: an array is not uint8.
    """
    return _checked_mac(a_codes, a_scales, w_codes, w_scales, get_format("nvfp4"))


class MacError(NamedTuple):
    """A unit's result and the exact dot product, as numpy arrays.

    Attributes:
        mac: result of the unit, float32.
        exact: dot product of the decoded values, float64.
        error: mac - exact.
        relative: |error| divided by the sum of the absolute terms; 0 if that sum is 0. (Cancellation can make |exact|
            arbitrarily small, so it is not the divisor.) At most (1 + 2^-24)^(beats + 6) - 1, from three roundings in a
            product, that of the constant included, beats - 1 in a lane, and four in the tree.
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
    """Compare a unit's result with the exact dot product, on the host. Not for use under jit.

    Args:
        fmt: the format that the unit decodes: any format with 4-bit codes in blocks of 16, E4M3 scales and no offsets.
            "if4" and "nvfp4" are the published units.

    "Exact" means float64. A beat's dot product needs at most 48 bits, so it is exact; the factor 6/7 or 36/49 and the
    sum over beats are rounded, each to 2^-53, where the unit rounds to 2^-24.

    Raises:
        ValueError: as for `if4_mac`, or the unit cannot decode the format.
        TypeError: an array is not uint8.

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
    """Return x * scale for scale >= 0, rounded once, even if the result is then added to something.

    The sign is set as a bit, as in the unit. This changes no result, and its integer operation keeps compilers from
    contracting the product and the sum to a fused multiply-add. Measured on XLA:CPU without it: 57 % of random segments
    of 40 beats differ if the products are formed in the loop over beats. Forming them before the loop helps, except
    that a loop of one beat is inlined: 10 % of segments of two beats differ. `lax.optimization_barrier` does not help.
    """
    sign = lax.bitcast_convert_type(x, jnp.int32) & np.int32(-(2**31))
    magnitude = lax.bitcast_convert_type(jnp.abs(x) * scale, jnp.int32)
    return lax.bitcast_convert_type(magnitude ^ sign, jnp.float32)


@functools.partial(jax.jit, static_argnames="fmt")
def _decode(codes, scales, fmt):
    """Decode codes and scales.

    Returns float32 values [*b, beats, 16], NaN for invalid codes, and float32 scales and int32 flags [*b, beats].
    """
    # A unit for a format with one decoding ignores bit 7.
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
    """Return the product of both operands' steps, float64 [flag of a, flag of w]."""
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
    # Values of valid codes are finite, so a NaN comes from an invalid code.
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
