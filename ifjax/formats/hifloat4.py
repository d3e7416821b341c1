"""The block scale of HiFloat4: a scale for 64 values, and bits that double it for each run of 8 and of 4 values.

Source: arXiv 2602.11287, section 3, and the authors' code.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np
from jax import lax

from ifjax.formats.scales import Scale

# 1 / (1 + m / 4) in bfloat16. The authors' code multiplies by this and never divides by the scale.
_RECIPROCALS = tuple(map(np.float32, (1.0, 0.80078125, 0.66796875, 0.5703125)))


@dataclasses.dataclass(frozen=True)
class HiFloat4Scale(Scale):
    """A header of 32 bits, lowest first: E6M2 scale, 8 bits for runs of 8 values, 16 bits for runs of 4.

    E6M2 is (1 + m / 4) * 2^(e - 48) with six exponent bits, without zero and subnormals; 0xFF means NaN. The order of
    the bits is ours, because none is published.
    """

    name: str = "hifloat4"
    bits, nbytes, runs, nan, top = 32, 4, (8, 4), 0xFF, 0xFE

    def encode(self, scale, *parts):
        eights, fours = parts
        # With both doublings the grid reaches 7 = 1.75 * 2 * 2. The factor is 1/7 in bfloat16, and the product is
        # rounded to bfloat16 too.
        wanted = lax.reduce_precision(scale * np.float32(0.142578125), exponent_bits=8, mantissa_bits=7)
        bits = lax.bitcast_convert_type(lax.clamp(np.float32(2.0**-48), wanted, np.float32(49152)), jnp.int32)
        header = ((bits + ((1 << 20) - 1) + (bits >> 21 & 1)) >> 21) - (127 - 48 << 2)  # half to even
        inverse = _reciprocal(header)
        doubled = [(part * inverse >= 4).astype(jnp.int32) for part in eights]
        for i, bit in enumerate(doubled):
            header |= bit << 8 + i
        for i, part in enumerate(fours):
            header |= (part * inverse * _power(-doubled[i // 2]) >= 2).astype(jnp.int32) << 16 + i
        return header

    def decode(self, payload, place=0):
        code = payload & 0xFF
        scale = lax.bitcast_convert_type((code << 21) + (127 - 48 << 23), jnp.float32)
        return jnp.where(code == self.nan, np.float32(np.nan), scale) * _power(_doublings(payload, place))

    def inverse(self, payload, place=0):
        code = payload & 0xFF
        return jnp.where(code == self.nan, 0, _reciprocal(code) * _power(-_doublings(payload, place)))


    def refined(self, payload, losses):
        """Return the payload with the doubling bits that give the least loss.

        Each run of 8 values is doubled or not, and then each run of 4 in it.
        """
        code = payload & 0xFF
        none, once, twice = (losses(code | bits) for bits in (0, np.int32(0xFF << 8), np.int32(-256)))
        for i in range(8):
            pairs = []  # without and with the doubling of all 8: the bits of both runs of 4, and the loss
            for low, high in ((none, once), (once, twice)):
                doubled = [high[r] < low[r] for r in (2 * i, 2 * i + 1)]
                loss = [jnp.where(d, high[r], low[r]) for d, r in zip(doubled, (2 * i, 2 * i + 1), strict=True)]
                bits = doubled[0].astype(jnp.int32) << 16 + 2 * i | doubled[1].astype(jnp.int32) << 17 + 2 * i
                pairs.append((bits, loss[0] + loss[1]))
            (plain, kept), (doubled, other) = pairs
            code |= jnp.where(other < kept, doubled | 1 << 8 + i, plain)
        return code


def _reciprocal(code):
    """Return the bfloat16 reciprocal of an E6M2 scale, as float32."""
    mantissa = code & 3
    picked = jnp.full(code.shape, _RECIPROCALS[0])
    for i, value in enumerate(_RECIPROCALS[1:], 1):
        picked = jnp.where(mantissa == i, value, picked)
    return picked * _power(48 - (code >> 2))


def _doublings(payload, place):
    return (payload >> 8 + place // 8 & 1) + (payload >> 16 + place // 4 & 1)


def _power(exponent):
    """Return 2^exponent as float32."""
    return lax.bitcast_convert_type(127 + exponent << 23, jnp.float32)
