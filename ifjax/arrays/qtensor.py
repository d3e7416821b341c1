"""QTensor: packed codes, scales and amax as one array-like pytree; and the functions that make and read it."""

import dataclasses
import json
import math
import operator
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export, lax
from jax.core import Tracer
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Float, Int, UInt8

from ifjax import codec
from ifjax.formats import Format
from ifjax.formats.grids import E2M1
from ifjax.numerics.packing import group_of, pack, packed_length, unpack
from ifjax.numerics.xla import divide

DTYPES = ("float32", "bfloat16", "float16", "float64")


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class QTensor:
    """A quantized array. Made by `ifjax.quantize`; a pytree whose leaves are the three arrays.

    Its shape is that of the array it stands for, [..., n, ...] with n at `axis`; m is the number of blocks along it.
    Shapes derive from the arrays and `axis` is negative, so that vmap, scan and indexing may add and remove leading
    axes. It does not turn into an array by itself: write `q.dequantize()`.

    Attributes:
        codes: packed bytes [..., packed n, ...]: codes follow one another along `axis`, low bits first.
        scales: one a block, [..., m, ...], as float8_e4m3fn (float8_e8m0fnu for MX formats). In formats that choose
            between two decodings the sign bit marks the second.
        amax: float32, of shape () or of the leading axes that keep their own, with length 1 for those among them that
            share one; None for formats without it (MX).
        fmt: the format's record.
        headroom: factor on the range that is used: 1, or 16/17 for unbiased stochastic rounding.
        axis: the blocked axis, negative.
        length: n.
        dtype: of the original array; `dequantize` returns it by default.
        block_2d: whether scale and choice are shared by squares of the last two axes. Each row still has its byte.
        names: of the axes, for sharding, where Flax's metadata gave them; None elsewhere.
    """

    codes: UInt8[Array, "..."]
    scales: Float[Array, "..."]
    amax: Float[Array, "..."] | None
    fmt: Format
    headroom: float
    axis: int
    length: int
    dtype: np.dtype
    block_2d: bool
    names: tuple[Any, ...] | None = None

    def __post_init__(self):
        _introduce_to_flax()

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array that this stands for."""
        # Inside shard_map, where the blocked axis is divided, the scales know that this is a part.
        return _replace(self.codes.shape, self.axis, min(self.length, self.scales.shape[self.axis] * self.fmt.block))

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return self.codes.ndim

    @property
    def size(self) -> int:
        """Number of values."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and amax together."""
        return self.codes.size + self.scales.size + (0 if self.amax is None else 4 * self.amax.size)

    @property
    def bits_per_value(self) -> float:
        """Bits of all three arrays, filled-up last blocks included, for each value. NaN for an empty array."""
        return 8 * self.nbytes / self.size if self.size else math.nan

    def dequantize(self, dtype: DTypeLike | None = None) -> Float[Array, "..."]:
        """The values, computed in float32 and rounded once to `dtype` (the original one unless given)."""
        return _dequantize(self, np.dtype(self.dtype if dtype is None else dtype))

    def astype(self, dtype: DTypeLike) -> "QTensor":
        """The same bytes, standing for an array of another dtype: what `dequantize` and products go by."""
        dtype = np.dtype(dtype)
        if dtype.name not in DTYPES:
            raise TypeError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype}")
        return dataclasses.replace(self, dtype=dtype)

    def unpacked_codes(self) -> UInt8[Array, "..."]:
        """One code a value, in the array's own shape."""
        codes = codec.merge_blocks(unpack(self.codes, self.fmt.bits, self.axis), self.axis)
        return _crop(codes, self.shape[self.axis], self.axis).astype(jnp.uint8)

    def scale_bytes(self) -> UInt8[Array, "..."]:
        """The scales' bit patterns, [..., m, ...], flag included."""
        return lax.bitcast_convert_type(self.scales, jnp.uint8)

    def choices(self) -> Array:
        """bool [..., m, ...]: which blocks took the format's second decoding (for IF4, the integers).

        Raises:
            ValueError: the format does not store a choice.
        """
        if not self.fmt.has_flag:
            raise ValueError(
                f"{self.fmt.name} stores no choice: all its blocks decode alike. Only formats with two decodings, "
                "such as if4, mark it in the scale"
            )
        return self.scale_bytes() >= 0x80

    def take(self, indices: Int[ArrayLike, "..."], axis: int = 0) -> "QTensor":
        """Entries along an unblocked axis, as by `jnp.take`: an embedding look-up on packed rows.

        Indices out of range give NaN values, as `jnp.take` gives for floats.

        Raises:
            ValueError: `axis` is blocked.
        """
        axis = self._unblocked(axis)

        def pick(a, fill):
            return jnp.take(a, indices, axis=axis, mode="fill", fill_value=fill)

        amax = self.amax
        if amax is not None and axis < amax.ndim:
            shared = (*amax.shape[:axis], *[1] * jnp.ndim(indices), *amax.shape[axis + 1 :])
            amax = pick(amax, 0) if amax.shape[axis] > 1 or self.shape[axis] == 1 else amax.reshape(shared)
        return self._picked(axis, pick(self.codes, 0), pick(self.scale_bytes(), self.fmt.scale.nan), amax)

    def __getitem__(self, index: Any) -> "QTensor":
        """Integers, slices and at most one integer array or traced integer (see `take`), along unblocked axes."""
        index = index if isinstance(index, tuple) else (index,)
        dots = [i for i, entry in enumerate(index) if entry is Ellipsis]
        if len(dots) > 1:
            raise IndexError("an index can have one ellipsis at most")
        for at in dots:
            index = (*index[:at], *[slice(None)] * (self.ndim - len(index) + 1), *index[at + 1 :])
        if len(index) > self.ndim:
            raise IndexError(f"{len(index)} indices for a QTensor of {self.ndim} axes")
        if sum(_is_index_array(entry) for entry in index) > 1:
            raise IndexError("at most one index array: take one axis after the other")
        result = self
        for axis, entry in reversed(list(enumerate(index))):
            result = result._index(axis, entry)
        return result

    def __len__(self) -> int:
        return self.shape[0]

    def __iter__(self):
        return (self[i] for i in range(len(self)))

    @property
    def T(self) -> "QTensor":
        """The transposed matrix, equal byte for byte to what quantizing the transposed array gives.

        Raises:
            ValueError: not a matrix, or its blocks are not square.
        """
        if self.ndim != 2:
            raise ValueError(f"T transposes matrices, got shape {self.shape}: write q.mT to swap the last two axes")
        return self.mT

    @property
    def mT(self) -> "QTensor":
        """The last two axes swapped, still packed along `axis`. Needs 2-D blocks, as `T` does."""
        if not self.block_2d:
            raise ValueError(
                "only 2-D blocks look alike from both sides: quantize with block_2d=True, or quantize the transposed "
                "array"
            )
        block, other = self.fmt.block, -3 - self.axis
        rows, columns = self.shape[other], self.shape[self.axis]
        codes = codec.merge_blocks(unpack(self.codes, self.fmt.bits, self.axis), self.axis)
        codes = _crop(codes, columns, self.axis).swapaxes(-1, -2)
        codes = codec.pad_axis(codes, -(-rows // block) * block, self.axis)
        # One row of scales for each row of squares, then repeated for each row of the transposed matrix.
        scales = lax.slice_in_dim(self.scale_bytes(), 0, None, stride=block, axis=self.ndim + other)
        scales = jnp.repeat(scales.swapaxes(-1, -2), block, axis=other)
        scales = _crop(scales, columns, other)
        moved = self._with(pack(codes, self.fmt.bits, self.axis), scales, self.amax)
        names = self.names and (*self.names[:-2], *self.names[-2:][::-1])
        return dataclasses.replace(moved, length=rows, names=names)

    # --- Flax's protocol for boxed parameters (flax.core.meta.AxisMetadata), so that linen reads packed ones ---------

    def unbox(self, apply_constraint: bool = True) -> Float[Array, "..."]:
        """What a Flax module gets for this parameter: the values, without gradient. `nn.unbox` makes dense trees."""
        del apply_constraint  # the arrays inside have their shardings
        for array, dtype in ((self.codes, "uint8"), (self.scales, self.fmt.scale.dtype)):
            if array.dtype != dtype:
                raise TypeError(f"something has made {array.dtype} of packed {dtype}: unbox parameters, then compute")
        return lax.stop_gradient(self.dequantize())

    def replace_boxed(self, val: Any) -> "QTensor":
        """val, if it is packed or being traced over: nothing is quantized by an assignment."""
        if isinstance(val, QTensor):
            return val
        raise TypeError(
            f"a packed parameter {self!r} cannot be set to a {type(val).__name__}: quantize that first, or dequantize "
            "the tree (nn.unbox) to go on with floats"
        )

    def add_axis(self, index: int, params: dict[Any, Any]) -> "QTensor":
        """For arrays that have been stacked at `index`, as by nn.scan. `remove_axis` undoes it."""
        at = index % self.ndim
        axis = self.axis - (at > self.ndim - 1 + self.axis)
        names = self.names
        if names is not None:
            names = (*names[:at], *[None] * (at - len(names)), _partition_name(params), *names[at:])
        return dataclasses.replace(self, axis=axis, names=names)

    def remove_axis(self, index: int, params: dict[Any, Any]) -> "QTensor":
        """For arrays that are about to be taken apart along `index`, as by nn.scan: `axis` as their parts need it."""
        del params
        at = self._unblocked(index)
        names = None if self.names is None else (*self.names[:at], *self.names[at + 1 :])
        return dataclasses.replace(self, axis=self.axis + (at > self.ndim + self.axis), names=names)

    def get_partition_spec(self) -> "QTensor":
        """A QTensor of the PartitionSpecs that `names` ask for, for `nn.get_partition_spec`."""
        spec = PartitionSpec() if self.names is None else PartitionSpec(*self.names)
        return dataclasses.replace(self, codes=spec, scales=spec, amax=_amax_spec(self, spec))

    def get_sharding(self, mesh: Mesh) -> "QTensor":
        """A QTensor of the shardings that `names` ask for, for `nn.get_sharding`. No block may be torn."""
        return shardings(self, NamedSharding(mesh, PartitionSpec(*self.names or ())))

    # ------------------------------------------------------------------------------------------------------------------

    def __array__(self, *args, **kwargs):
        raise TypeError(
            "a QTensor does not turn into an array silently: write q.dequantize(). (In NNX, nnx.merge installs packed "
            "states, nnx.update does not)"
        )

    def __repr__(self) -> str:
        try:
            shape = "x".join(map(str, self.shape))
            extra = ", 2-D blocks" if self.block_2d else ""
            return (
                f"QTensor({self.fmt.name}, {shape} {self.dtype}, axis={self.axis}{extra}, "
                f"{self.bits_per_value:.3f} bits a value)"
            )
        except (AttributeError, IndexError, TypeError):  # leaves that are no arrays, as in a tree of shardings or specs
            return f"QTensor({self.fmt.name}, codes={self.codes}, scales={self.scales}, amax={self.amax})"

    def _with(self, codes, scale_bytes, amax):
        scales = lax.bitcast_convert_type(scale_bytes, self.fmt.scale.dtype)
        return dataclasses.replace(self, codes=codes, scales=scales, amax=amax)

    def _picked(self, axis, codes, scale_bytes, amax):
        """What was picked along `axis`, which leaves any number of axes behind: `self.axis` counts those after it."""
        moved = self.ndim - codes.ndim if axis > self.ndim + self.axis else 0
        names, new = self.names, codes.ndim - self.ndim + 1
        if names is not None and new != 1:
            names = (*names[:axis], *[None] * new, *names[axis + 1 :])
        return dataclasses.replace(self._with(codes, scale_bytes, amax), axis=self.axis + moved, names=names)

    def _unblocked(self, axis: int) -> int:
        """The axis counted from the front, or an error if blocks lie along it."""
        if not -self.ndim <= axis < self.ndim:
            raise ValueError(f"axis {axis} is out of range for shape {self.shape}")
        axis %= self.ndim
        if axis - self.ndim in self._blocked_axes():
            raise ValueError(
                f"axis {axis} of shape {self.shape} is blocked ({self.fmt.name}, axis={self.axis}"
                f"{', 2-D' if self.block_2d else ''}): only other axes can be indexed; dequantize first"
            )
        return axis

    def _blocked_axes(self) -> tuple[int, ...]:
        return (-1, -2) if self.block_2d else (self.axis,)

    def _index(self, axis: int, entry: Any) -> "QTensor":
        if isinstance(entry, slice):
            if entry == slice(None):
                return self
            axis = self._unblocked(axis)
        elif _is_integer(entry):
            axis = self._unblocked(axis)
            if not -self.shape[axis] <= operator.index(entry) < self.shape[axis]:
                raise IndexError(f"index {entry} is out of range for axis {axis} of shape {self.shape}")
        elif _is_index_array(entry):
            return self.take(entry, axis)
        else:
            raise TypeError(f"QTensor indices are integers, slices and integer arrays, got {entry!r}")
        at = (slice(None),) * axis + (entry,)
        amax = self.amax
        if amax is not None and axis < amax.ndim:
            if amax.shape[axis] > 1 or self.shape[axis] == 1:
                amax = amax[at]
            elif not isinstance(entry, slice):
                amax = amax.squeeze(axis)
        return self._picked(axis, self.codes[at], self.scale_bytes()[at], amax)


_ARRAYS = ("codes", "scales", "amax")


_STATIC = ("fmt", "headroom", "axis", "length", "dtype", "block_2d", "names")


def _flatten_with_keys(q):
    children = [(jax.tree_util.GetAttrKey(name), getattr(q, name)) for name in _ARRAYS]
    return children, tuple(getattr(q, name) for name in _STATIC)


def _unflatten(static, arrays):
    return QTensor(*arrays, *static)


jax.tree_util.register_pytree_with_keys(
    QTensor, _flatten_with_keys, _unflatten, lambda q: ([getattr(q, n) for n in _ARRAYS], _flatten_with_keys(q)[1])
)


def _serialize_static(static) -> bytes:
    fields = dict(zip(_STATIC, static, strict=True))
    return json.dumps(fields | {"fmt": fields["fmt"].to_dict(), "dtype": str(fields["dtype"])}).encode()


def _deserialize_static(data: bytes):
    fields = json.loads(data)
    fields |= {"fmt": Format.from_dict(fields["fmt"]), "dtype": jnp.dtype(fields["dtype"])}
    fields["names"] = fields["names"] and tuple(tuple(n) if isinstance(n, list) else n for n in fields["names"])
    return tuple(fields[name] for name in _STATIC)


export.register_pytree_node_serialization(
    QTensor,
    serialized_name="ifjax.QTensor",
    serialize_auxdata=_serialize_static,
    deserialize_auxdata=_deserialize_static,
)


def _partition_name(params):
    if "partition_name" not in params:
        raise ValueError(
            "a packed parameter with names of axes was stacked by a transformation that names none: write "
            "metadata_params={nn.PARTITION_NAME: ...} there"
        )
    return params["partition_name"]


_introduced = []


def _introduce_to_flax():
    """Once Flax is loaded, QTensor counts as its boxed metadata and has a state dict. Flax is not imported for it."""
    meta: Any = sys.modules.get("flax.core.meta")
    serialization: Any = sys.modules.get("flax.serialization")
    if _introduced or not (hasattr(meta, "AxisMetadata") and hasattr(serialization, "register_serialization_state")):
        return
    _introduced.append(True)
    meta.AxisMetadata.register(QTensor)
    serialization.register_serialization_state(QTensor, _to_state_dict, _from_state_dict)


def _to_state_dict(q):
    amax = {} if q.amax is None else {"amax": q.amax}
    static = tuple(getattr(q, name) for name in _STATIC)
    return {"codes": q.codes, "scales": q.scale_bytes(), **amax, "static": _serialize_static(static).decode()}


def _from_state_dict(like, state):
    static = tuple(getattr(like, name) for name in _STATIC)
    needed = _serialize_static(static).decode()
    if state["static"] != needed:
        raise ValueError(f"the state holds another kind of QTensor: {state['static']}, and this needs {needed}")
    amax = None if like.amax is None else jnp.asarray(state["amax"])
    return like._with(jnp.asarray(state["codes"]), jnp.asarray(state["scales"]), amax)


def dequantize(q: QTensor, dtype: DTypeLike | None = None) -> Float[Array, "..."]:
    """The values of q, in its original dtype unless given. See `QTensor.dequantize`."""
    if not isinstance(q, QTensor):
        raise TypeError(f"dequantize needs a QTensor, got {type(q).__name__}: make one with ifjax.quantize")
    return q.dequantize(dtype)


def device_put(q: QTensor, sharding: Sharding) -> QTensor:
    """q placed as an array of its shape would be: codes, scales and amax are each partitioned to match.

    Raises:
        ValueError: a NamedSharding whose mesh axes do not divide the blocks, so that some block would be torn.
    """
    return jax.device_put(q, shardings(q, sharding))


def shardings(q: QTensor, sharding: Sharding) -> QTensor:
    """A QTensor whose leaves are the shardings of q's arrays, for `in_shardings` and the like. See `device_put`."""
    if not isinstance(q, QTensor):
        raise TypeError(f"needs a QTensor, got {type(q).__name__}: for arrays, jax.device_put does the same")
    if not isinstance(sharding, NamedSharding):
        return jax.tree.map(lambda _: sharding, q)
    spec = tuple(sharding.spec) + (None,) * (q.ndim - len(sharding.spec))
    if len(spec) > q.ndim:
        raise ValueError(f"{sharding.spec} has more entries than shape {q.shape} has axes")
    for axis in q._blocked_axes():
        names = spec[axis] if isinstance(spec[axis], tuple) else (spec[axis],)
        parts = math.prod(sharding.mesh.shape[name] for name in names if name is not None)
        blocks = -(-q.shape[axis] // q.fmt.block)
        if blocks % parts or (parts > 1 and q.shape[axis] % q.fmt.block):
            raise ValueError(
                f"axis {axis} of {q.shape} has {q.shape[axis] / q.fmt.block:g} blocks of {q.fmt.block}, which "
                f"{parts} devices cannot share without tearing one: shard another axis"
            )
    amax, whole = _amax_spec(q, spec), NamedSharding(sharding.mesh, PartitionSpec(*spec))
    amax = None if amax is None else NamedSharding(sharding.mesh, amax)
    return dataclasses.replace(q, codes=whole, scales=whole, amax=amax)


def _amax_spec(q, spec):
    if q.amax is None:
        return None
    shared = zip(spec[: q.amax.ndim], q.amax.shape, strict=False)
    return PartitionSpec(*(None if length == 1 else name for name, length in shared))


def packed_shapes(shape: tuple[int, ...], fmt: Format, axis: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of the codes and scales of a QTensor of this shape, `axis` negative."""
    at = len(shape) + axis
    blocks = -(-shape[at] // fmt.block)
    codes, scales = (
        (*shape[:at], length, *shape[at + 1 :]) for length in (packed_length(blocks * fmt.block, fmt.bits), blocks)
    )
    return codes, scales


def to_ml_dtypes(q: QTensor) -> tuple[Array, Array, Array | None]:
    """(elements, scales, factor) of a format whose bytes are plain NVFP4 or MXFP4, for `jax.nn.scaled_matmul`.

    Elements are float4_e2m1fn of q's shape, scales float8 [..., m, ...]; a value is element * scale * factor, where
    factor is amax / K in float32 (None for MX). The last block keeps its filling zeros if it is not full.

    Raises:
        ValueError: the format has other elements, or marks choices in the scales' signs.
    """
    if q.fmt.decodings != ((E2M1, 1.0),):
        raise ValueError(
            f"{q.fmt.name} is not E2M1 with plain scales, so no NVFP4 reader decodes it: quantize to nvfp4, "
            "fouroversix or mxfp4"
        )
    elements = lax.bitcast_convert_type(q.codes, jnp.float4_e2m1fn)
    elements = codec.merge_blocks(jnp.moveaxis(elements, -1, q.axis), q.axis)
    _, largest = q.fmt.constants(q.headroom)
    return elements, q.scales, None if q.amax is None else divide(q.amax, largest)


@jax.jit(static_argnames="dtype")
def _dequantize(q, dtype):
    return _values(q, q.amax).astype(dtype)


def unscaled_values(q: QTensor) -> Float[Array, "..."]:
    """float32 values of q without the tensor's factor: multiplied by amax / K they are q's."""
    return _values(q, None)


def _values(q, amax):
    scales, block = jnp.expand_dims(q.scale_bytes(), q.axis), q.fmt.block
    if block % group_of(q.fmt.bits)[0] == 0:
        # [..., m, groups of a block, codes of a group, ...]: decoded in the groups they were packed in.
        packed = codec.split_blocks(q.codes, packed_length(block, q.fmt.bits), q.axis)
        codes, scales = unpack(packed, q.fmt.bits, q.axis), jnp.expand_dims(scales, q.axis)
    else:
        codes = codec.merge_blocks(unpack(q.codes, q.fmt.bits, q.axis), q.axis)
        codes = codec.split_blocks(_crop(codes, q.scales.shape[q.axis] * block, q.axis), block, q.axis)
    at = q.ndim + q.axis
    if amax is not None and amax.ndim > at:
        amax = jnp.expand_dims(amax, range(at + 1, at + 1 + codes.ndim - q.ndim))
    values = codec.decode(codes, scales, q.fmt, amax=amax, headroom=q.headroom)
    length = q.scales.shape[q.axis] * block
    return _crop(values.reshape(_replace(q.codes.shape, q.axis, length)), q.shape[q.axis], q.axis)


def _is_integer(entry):
    return hasattr(entry, "__index__") and not isinstance(entry, bool | Tracer) and np.ndim(entry) == 0


def _is_index_array(entry):
    return hasattr(entry, "dtype") and jnp.issubdtype(entry.dtype, jnp.integer) and not _is_integer(entry)


def _crop(a, length, axis):
    return a if a.shape[axis] == length else lax.slice_in_dim(a, 0, length, axis=a.ndim + axis)


def _replace(shape, axis, length):
    at = len(shape) + axis
    return (*shape[:at], length, *shape[at + 1 :])
