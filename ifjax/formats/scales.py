"""Block scales: records that define how a block header encodes the scale of its elements.

Most scales are numbers from a table (`TableScale`). Other kinds, such as a scale with a factor for each part of a
block, are subclasses of `Scale` with their own functions.
"""

import abc
import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax import lax

from ifjax.formats.floats import BinaryFloat, decode_float, float_mantissa_bits
from ifjax.lookup import Registry
from ifjax.numerics.xla import divide, where


class Scale(abc.ABC):
    """Base class of block scales. Subclasses are frozen dataclasses: hashable, and equal by content.

    A header is an integer of `nbytes` bytes, stored lowest byte first. Its lowest `bits` bits are the payload, which
    the methods take and return as int32; the bits above hold the format's selector.

    Attributes:
        name: name used in reports and error messages, and in files for scales that are not tables.
        bits: number of bits of the payload.
        nbytes: number of bytes of a header, 1 to 4.
        runs: lengths of the parts of a block that have their own factors, longest first; () for one factor per block.
        nan: the payload that means NaN.
        top: the payload of the largest scale that is written.
        dtype: the ml_dtypes type that has the same bit patterns as the headers; None if there is none.
    """

    name: str
    bits: int = 8
    nbytes: int = 1
    runs: tuple[int, ...] = ()
    nan: int = 0xFF
    top: int = 0xFE
    dtype: np.dtype | None = None

    @property
    def largest(self) -> float:
        """A bound of the factors that payloads decode to."""
        return math.inf

    @abc.abstractmethod
    def encode(self, scale: jax.Array, *parts: Sequence[jax.Array]) -> jax.Array:
        """Return int32 payloads for wanted scales, float32 >= 0 (infinity allowed). Saturates; never returns NaN.

        `parts` has a list for each length in `runs`: the scales wanted by each run of this length on its own, in order.
        """

    @abc.abstractmethod
    def decode(self, payload: jax.Array, place: Any = 0) -> jax.Array:
        """Return the float32 factor of the values at a place (position) in the block, by element-wise arithmetic.

        `place` is an integer, or int32 that broadcasts against `payload`.
        """

    def decode_written(self, payload: jax.Array, place: Any = 0) -> jax.Array:
        """Do what `decode` does, for payloads that `encode` returns and for `nan` only."""
        return self.decode(payload, place)

    def inverse(self, payload: jax.Array, place: Any = 0) -> jax.Array:
        """Return the factor that converts numbers to units of the grid; 0 where the scale is 0 or NaN.

        It is a rounded reciprocal, because the published encoders multiply by one and never divide by the scale.
        """
        scale = self.decode_written(payload, place)
        return where(scale > 0, divide(1.0, scale), 0)

    def refined(self, payload: jax.Array, losses: Callable[[jax.Array], list[jax.Array]]) -> jax.Array:
        """Return the payload with the same main scale and the factors of its runs that give the least loss.

        `losses` maps a payload to the losses of the shortest runs, in order. Scales with one factor are unchanged.
        """
        del losses
        return payload

    def to_dict(self) -> dict[str, Any] | str:
        """Return the record as JSON-serializable values; `scale_from_dict` inverts this.

        Raises:
            ValueError: the scale is defined by code and not registered in `ifjax.formats.SCALES`.
        """
        if SCALES.get(self.name) != self:
            raise ValueError(
                f"the scale {self.name!r} is code, which cannot be written down: register it by "
                "ifjax.formats.SCALES.register(scale), and do so too before reading what was written"
            )
        return self.name


@dataclasses.dataclass(frozen=True)
class TableScale(Scale):
    """A scale whose payload is an index into a table of numbers.

    Attributes:
        name: name used in reports and error messages.
        values: payload i decodes to values[i]: 2 to 256 ascending float32 numbers >= 0.
        rounding: "even" rounds to the nearest value, ties to the even payload; "up" rounds to the next value up, so
            that no element saturates.
        nan: the payload that means NaN; it must not have a value.
        last: the largest payload that is written; by default that of the largest value.
        dtype: as for `Scale`.

    Raises:
        ValueError: a field is invalid; the message says what is needed.
    """

    name: str
    values: tuple[float, ...]
    rounding: Literal["even", "up"] = "even"
    nan: int = 0xFF
    last: int | None = None
    dtype: np.dtype | None = None

    def __post_init__(self):
        values = tuple(float(np.float32(v)) for v in self.values)
        object.__setattr__(self, "values", values)
        if not 2 <= len(values) <= 256 or values[0] < 0 or not all(a < b for a, b in itertools.pairwise(values)):
            raise ValueError(f"{self.name}: values must be 2 to 256 ascending numbers >= 0, got {len(values)} of them")
        if not np.all(np.isfinite(values)):
            raise ValueError(f"{self.name}: values must be finite float32 numbers")
        if not len(values) <= self.nan < 256:
            raise ValueError(f"{self.name}: nan must be a payload from {len(values)} to 255, got {self.nan}")
        if self.rounding not in ("even", "up"):
            raise ValueError(f"{self.name}: rounding must be 'even' or 'up', got {self.rounding!r}")
        if self.last is not None and not 0 < self.last < len(values):
            raise ValueError(f"{self.name}: last must be a payload from 1 to {len(values) - 1}, got {self.last}")
        object.__setattr__(self, "dtype", None if self.dtype is None else np.dtype(self.dtype))

    @classmethod
    def minifloat(
        cls, name: str, exponent_bits: int, mantissa_bits: int, bias: int, *, count: int | None = None, **fields: Any
    ) -> "TableScale":
        """Return a scale of unsigned floats with subnormals; the smallest is 2^(1 - bias - mantissa_bits).

        Args:
            count: number of payloads that have a value; by default all but the last. The first payload without a value
                means NaN.
        """
        size = 2 ** (exponent_bits + mantissa_bits)
        number = size - 1 if count is None else count

        def value(i):
            exponent, fraction = divmod(i, 2**mantissa_bits)
            fraction /= 2**mantissa_bits
            return fraction * 2.0 ** (1 - bias) if exponent == 0 else (1 + fraction) * 2.0 ** (exponent - bias)

        return cls(name, tuple(value(i) for i in range(number)), **{"nan": number, **fields})

    @property
    def bits(self) -> int:
        return self.nan.bit_length()

    @property
    def top(self) -> int:
        return len(self.values) - 1 if self.last is None else self.last

    @property
    def largest(self) -> float:
        return self.values[-1]

    @property
    def is_arithmetic(self) -> bool:
        """Whether `encode` and `decode` use arithmetic on the bits of a binary float instead of a table lookup."""
        return self._is_exponent if self.rounding == "up" else self._floats is not None

    @property
    def mantissa_bits(self) -> int:
        """Number of mantissa bits of an arithmetic scale."""
        return self._mantissa_bits or 0

    @functools.cached_property
    def _mantissa_bits(self) -> int | None:
        return float_mantissa_bits(self.values)

    @functools.cached_property
    def _floats(self) -> BinaryFloat | None:
        m = self._mantissa_bits  # with none, powers of two, ties would go to the larger one
        return BinaryFloat.of(self.values, self.values[self.top], m) if m else None

    @property
    def _is_exponent(self) -> bool:
        """Whether payloads are exponents of float32."""
        return self._mantissa_bits == 0 and self.values[1] == 2.0**-126

    def encode(self, scale, *parts):
        del parts
        if self.rounding == "up":
            if self._is_exponent:  # a nonzero mantissa rounds up to the next exponent
                bits = lax.bitcast_convert_type(scale, jnp.int32)
                return jnp.minimum((bits >> 23) + ((bits & 0x7FFFFF) != 0).astype(jnp.int32), self.top)
            table = jnp.asarray(self.values[: self.top], jnp.float32)
            return jnp.searchsorted(table, scale, side="left").astype(jnp.int32)
        if floats := self._floats:
            return floats.code(floats.rounded(scale, None))
        return self._nearest(scale)

    def decode(self, payload, place=0):
        del place
        payload = payload.astype(jnp.int32)
        if self.dtype is not None and self.bits == 7:  # bit 7 is the sign bit of the dtype
            value = self._value(payload & 0x7F)
            return where(payload & 0x80, -value, value)
        return self._value(payload)

    def decode_written(self, payload, place=0):
        del place
        return self._value(payload.astype(jnp.int32))

    def _value(self, payload):
        m = self._mantissa_bits
        if m is None:
            filled = (*self.values, *[np.nan] * (256 - len(self.values)))
            return jnp.asarray(filled, jnp.float32)[payload & 0xFF]
        if self._is_exponent:
            value = lax.bitcast_convert_type(payload << 23, jnp.float32)
        else:
            value = decode_float(payload, m, self.values[1])
        return where(payload >= len(self.values), np.float32(np.nan), value)

    def to_dict(self) -> dict[str, Any] | str:
        if SCALES.get(self.name) == self:
            return self.name
        if self.dtype is not None:
            raise ValueError(f"the scale {self.name!r} has a dtype, which is code: leave it out, or register the scale")
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "dtype"}

    def _nearest(self, scale):
        table = self.values[: self.top + 1]
        first = []  # for each value but the first, the smallest float32 that rounds to it
        for i, (a, b) in enumerate(itertools.pairwise(table)):
            middle = np.float32((a + b) / 2)
            is_tie, above = float(middle) == (a + b) / 2, float(middle) > (a + b) / 2
            goes_up = i % 2 == 1 if is_tie else above  # a tie goes to the even payload
            first.append(middle if goes_up else np.nextafter(middle, np.float32(np.inf)))
        return jnp.searchsorted(jnp.asarray(first, jnp.float32), scale, side="right").astype(jnp.int32)


def scale_from_dict(record: Any) -> Scale:
    """Return the scale that `Scale.to_dict` gave `record` for.

    Raises:
        ValueError: the name is not registered, or the record is invalid.
    """
    if isinstance(record, str):
        return SCALES.find(record)
    try:
        return TableScale(**record | {"values": tuple(record["values"])})
    except (KeyError, TypeError) as error:
        raise ValueError(f"not the record of a scale (see Scale.to_dict): {error!r} in {record!r:.200}") from error


E4M3 = TableScale.minifloat("e4m3", 4, 3, 7, dtype=np.dtype(ml_dtypes.float8_e4m3fn))
# The exponent is rounded up, so that no element saturates; the OCP rule rounds it down. Payload 0 means a block of
# zeros, not 2^-127. 2^126 is the largest scale whose reciprocal is a normal number; no named format reaches it.
E8M0 = TableScale(
    "e8m0", (0.0, *(2.0 ** (i - 127) for i in range(1, 255))), "up", last=253,
    dtype=np.dtype(ml_dtypes.float8_e8m0fnu),
)  # fmt: skip
# Unsigned, as in PTX ISA 9.4 and AMD: the sign bit becomes an exponent bit. No bit is left for a selector.
UE5M3 = TableScale.minifloat("ue5m3", 5, 3, 15)
# Six bits, which leaves two for a selector; values from 2^-5 to 28.
E3M3 = TableScale.minifloat("e3m3", 3, 3, 3)
# Five bits, which leaves three for a selector; values from 2^-3 to 7.
UE2M3 = TableScale.minifloat("ue2m3", 2, 3, 1)
SCALES: Registry[Scale] = Registry("scale", Scale, "ifjax.formats.SCALES", (E4M3, E8M0, UE5M3, E3M3, UE2M3))
