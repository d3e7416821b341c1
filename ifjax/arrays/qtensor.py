"""QTensor: packed codes, scales and amax as one array-like pytree."""

import dataclasses
import functools
import json
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export, lax
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Float, Int, UInt8

from ifjax.arrays import indexing, shaping
from ifjax.arrays.blocking import DTYPES, Blocking, packed_shapes, with_length
from ifjax.arrays.encoders import decode_by_kernel, encoder_for, refusal_to_decode, work_of
from ifjax.arrays.flax_box import FlaxBox, introduce_to_flax
from ifjax.codec import Encoding
from ifjax.codec.blocks import crop, merge_blocks, pad_axis, split_blocks
from ifjax.codec.decode import decode, narrowed
from ifjax.codec.headers import header_bytes, header_words
from ifjax.formats import Format
from ifjax.numerics.devices import device_kind
from ifjax.numerics.packing import group_of, pack, packed_length, unpack
from ifjax.numerics.proofs import by_both, difference, fault_of


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class QTensor(FlaxBox):
    """A quantized array. Made by `ifjax.quantize`; a pytree whose leaves are the three arrays.

    Its shape is that of the array it stands for, [..., n, ...] with n at `axis`; m is the number of blocks along it and
    W the bytes of a block's header (1 but for formats with several factors a block). Shapes derive from the arrays and
    `axis` is negative, so that vmap, scan and indexing may add and remove leading axes.

    It does not turn into an array by itself: write `q.dequantize()`. `x @ q` and `q @ x` are `ifjax.matmul`.

    Attributes:
        codes: packed bytes [..., packed n, ...]: codes follow one another along `axis`, low bits first.
        scales: the blocks' headers, uint8 [..., m * W, ...]: the scale's payload, and above it the selector of formats
            that choose between several decodings.
        amax: float32, of shape () or of leading axes, with length 1 for those among them that share one; None for
            formats without a tensor scale.
        blocking: what is static: format, axis, length, dtype, headroom, 2-D blocks, names of axes. Each is an attribute
            of the QTensor, too.
    """

    codes: UInt8[Array, "..."]
    scales: UInt8[Array, "..."]
    amax: Float[Array, "..."] | None
    blocking: Blocking

    def __post_init__(self):
        introduce_to_flax(QTensor)

    @property
    def fmt(self) -> Format:
        """The format's record."""
        return self.blocking.fmt

    @property
    def axis(self) -> int:
        """The blocked axis, negative."""
        return self.blocking.axis

    @property
    def dtype(self) -> np.dtype:
        """Of the original array; `dequantize` returns it by default."""
        return self.blocking.dtype

    @property
    def headroom(self) -> float:
        """Factor on the range that was used: 1, or 16/17 for unbiased stochastic rounding."""
        return self.blocking.headroom

    @property
    def block_2d(self) -> bool:
        """Whether header and choice are shared by squares of the last two axes."""
        return self.blocking.block_2d

    @property
    def names(self) -> tuple[Any, ...] | None:
        """Logical axis names from Flax metadata, used for sharding; None if there are none."""
        return self.blocking.names

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array that this stands for."""
        # Inside shard_map, where the blocked axis is divided, the scales know that this is a part.
        return with_length(self.codes.shape, self.axis, min(self.blocking.length, self.blocks * self.fmt.block))

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return self.codes.ndim

    @property
    def size(self) -> int:
        """Number of values."""
        return math.prod(self.shape)

    @property
    def blocks(self) -> int:
        """Number of blocks along the blocked axis."""
        return self.scales.shape[self.axis] // self.fmt.scale.nbytes

    @property
    def blocked_axes(self) -> tuple[int, ...]:
        """The axes that blocks extend along, negative."""
        return (-1, -2) if self.block_2d else (self.axis,)

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and amax together."""
        return self.codes.size + self.scales.size + (0 if self.amax is None else 4 * self.amax.size)

    @property
    def bits_per_value(self) -> float:
        """Bits of all three arrays, filled-up last blocks included, for each value. NaN for an empty array."""
        return 8 * self.nbytes / self.size if self.size else math.nan

    def dequantize(self, dtype: DTypeLike | None = None) -> Float[Array, "..."]:
        """Return the values, computed in float32 and rounded once to `dtype` (the original one unless given).

        Raises:
            TypeError: something has made other types of the three arrays.
        """
        check_arrays(self)
        return _dequantize(self, np.dtype(self.dtype if dtype is None else dtype))

    def astype(self, dtype: DTypeLike) -> "QTensor":
        """Return the same bytes, standing for an array of another dtype: what `dequantize` and products go by."""
        dtype = np.dtype(dtype)
        if dtype.name not in DTYPES:
            raise TypeError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype}")
        return self.replaced(dtype=dtype)

    def unpacked_codes(self) -> UInt8[Array, "..."]:
        """Return one code a value, in the array's own shape."""
        check_arrays(self)
        codes = merge_blocks(unpack(self.codes, self.fmt.bits, self.axis), self.axis)
        return crop(codes, self.shape[self.axis], self.axis).astype(jnp.uint8)

    def headers(self) -> Int[Array, "..."]:
        """Return the blocks' headers as integers, int32 [..., m, ...]."""
        check_arrays(self)
        return header_words(self.scales, self.fmt.scale.nbytes, self.axis)

    def choices(self) -> UInt8[Array, "..."]:
        """Return which of the format's decodings each block took, uint8 [..., m, ...]: for IF4, 1 for the integers.

        Raises:
            ValueError: the format does not store a choice.
        """
        if not self.fmt.has_selector:
            raise ValueError(
                f"{self.fmt.name} stores no choice: all its blocks decode alike. Only formats with several decodings, "
                "such as if4, mark it in the scale"
            )
        return self.fmt.split(self.headers())[0].astype(jnp.uint8)

    def take(self, indices: Int[ArrayLike, "..."], axis: int = 0) -> "QTensor":
        """Return entries along an unblocked axis, as by `jnp.take`: an embedding look-up on packed rows.

        Indices out of range give NaN values, as `jnp.take` gives for floats.

        Raises:
            ValueError: `axis` is blocked.
        """
        return indexing.take(self, indices, axis)

    def __getitem__(self, index: Any) -> "QTensor":
        """Integers, slices and at most one integer array or traced integer (see `take`), along unblocked axes."""
        return indexing.index(self, index)

    @property
    def at(self) -> Any:
        """`q.at[index].set(x)`: q with other values at an index along unblocked axes, as by `jax.Array.at`.

        x is quantized as q is, and entries with amax values of their own (`amax_axes`) get new ones. An amax that
        entries share which stay is kept only where `set(x, keep_amax=True)` says so.

        Raises:
            ValueError: the index is along a blocked axis, or the amax cannot be that of old and new values.
        """
        from ifjax.arrays.updates import At

        return At(self)

    def transpose(self, *axes: Any) -> "QTensor":
        """The axes in another order, reversed unless given; blocks lie along the same one, wherever it is then.

        Raises:
            ValueError: the axes are not q's; the last two of 2-D blocks would move (see `mT`).
        """
        given = axes[0] if len(axes) == 1 and not hasattr(axes[0], "__index__") else axes or None
        return shaping.transposed(self, given)

    def swapaxes(self, axis1: int, axis2: int) -> "QTensor":
        """Two axes exchanged. See `transpose`."""
        axes = list(range(self.ndim))
        axes[axis1], axes[axis2] = axes[axis2], axes[axis1]
        return shaping.transposed(self, axes)

    def moveaxis(self, source: int, destination: int) -> "QTensor":
        """One axis in another place. See `transpose`."""
        return shaping.moved_axis(self, source, destination)

    def reshape(self, *shape: Any) -> "QTensor":
        """Another shape, in which the blocked axis is one of its own; one length may be -1.

        Raises:
            ValueError: the blocked axis would be torn or joined to another, or the shape has other values.
        """
        return shaping.reshape(self, shape[0] if len(shape) == 1 and not hasattr(shape[0], "__index__") else shape)

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
        fmt, axis, other = self.fmt, self.axis, -3 - self.axis
        rows, columns = self.shape[other], self.shape[axis]
        codes = merge_blocks(unpack(self.codes, fmt.bits, axis), axis)
        codes = crop(codes, columns, axis).swapaxes(-1, -2)
        codes = pad_axis(codes, -(-rows // fmt.block) * fmt.block, axis)
        # One row of headers for each row of squares, then repeated for each row of the transposed matrix.
        headers = lax.slice_in_dim(self.headers(), 0, None, stride=fmt.block, axis=self.ndim + other)
        headers = crop(jnp.repeat(headers.swapaxes(-1, -2), fmt.block, axis=other), columns, other)
        names = self.names and (*self.names[:-2], *self.names[-2:][::-1])
        codes, scales = pack(codes, fmt.bits, axis), header_bytes(headers, fmt.scale.nbytes, axis)
        return self.replaced(codes=codes, scales=scales, length=rows, names=names)

    def replaced(self, **fields: Any) -> "QTensor":
        """Return a QTensor with other arrays or other fields of `blocking`."""
        arrays = {name: fields.pop(name, getattr(self, name)) for name in ARRAYS}
        return QTensor(**arrays, blocking=dataclasses.replace(self.blocking, **fields) if fields else self.blocking)

    # So that numpy leaves operators to this class.
    __array_ufunc__ = None

    def __array__(self, *args, **kwargs):
        raise TypeError(
            "a QTensor does not turn into an array silently: write q.dequantize(), or ifjax.quantized(fn) for a "
            "function that uses it as one. (In NNX, nnx.merge installs packed states, nnx.update does not)"
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


def _no(name: str) -> str:
    return (
        f"a QTensor has no {name}: it is packed. Write q.dequantize() for its values, `x @ q` or ifjax.einsum for "
        "products, or ifjax.quantized(fn) for a function that does arithmetic with it"
    )


def _refuse(name):
    def refused(self, *others):
        del others
        raise TypeError(_no(name))

    return refused


_UNARY, _COMPARED = ("neg", "pos", "abs", "invert", "float", "int"), ("lt", "le", "gt", "ge")
for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "divmod", *_UNARY, *_COMPARED):
    setattr(QTensor, f"__{_name}__", _refuse(f"__{_name}__"))
    if _name not in (*_UNARY, *_COMPARED):
        setattr(QTensor, f"__r{_name}__", _refuse(f"__r{_name}__"))


def _equals(self, other):
    """Whether they are one object. Arrays and numbers are compared element by element, which needs values."""
    if isinstance(other, jax.Array | np.ndarray | np.generic | int | float):
        raise TypeError(_no("__eq__"))
    return NotImplemented


def _missing(self, name):
    if hasattr(QTensor, name):  # a property that asked one of the arrays, and it is none
        raise AttributeError(f"a QTensor of {type(self.codes).__name__} has no {name}", name=name, obj=self)
    if not name.startswith("_") and hasattr(jax.Array, name):
        raise AttributeError(_no(name), name=name, obj=self)
    raise AttributeError(f"'QTensor' object has no attribute {name!r}", name=name, obj=self)


setattr(QTensor, "__eq__", _equals)  # noqa: B010  in the class body they would be fields' methods, and take __hash__
setattr(QTensor, "__getattr__", _missing)  # noqa: B010


ARRAYS = ("codes", "scales", "amax")


def _flatten_with_keys(q):
    return [(jax.tree_util.GetAttrKey(name), getattr(q, name)) for name in ARRAYS], q.blocking


def _unflatten(blocking, arrays):
    codes, scales, amax = arrays
    return QTensor(codes, scales, amax, blocking)


jax.tree_util.register_pytree_with_keys(
    QTensor, _flatten_with_keys, _unflatten, lambda q: ([getattr(q, n) for n in ARRAYS], q.blocking)
)
export.register_pytree_node_serialization(
    QTensor,
    serialized_name="ifjax.QTensor",
    serialize_auxdata=lambda blocking: json.dumps(blocking.to_dict()).encode(),
    deserialize_auxdata=lambda data: Blocking.from_dict(json.loads(data)),
)


def dequantize(q: QTensor, dtype: DTypeLike | None = None) -> Float[Array, "..."]:
    """Return the values of q, in its original dtype unless given. See `QTensor.dequantize`.

    Raises:
        TypeError: q is no QTensor, or something has changed the types of its arrays.

    Example:
        >>> import jax.numpy as jnp
        >>> import ifjax
        >>> ifjax.dequantize(ifjax.quantize(jnp.array([10.0, 20, 30, 40]), "fouroversix"))
        Array([10., 20., 30., 40.], dtype=float32)
    """
    if not isinstance(q, QTensor):
        raise TypeError(f"dequantize needs a QTensor, got {type(q).__name__}: make one with ifjax.quantize")
    return q.dequantize(dtype)


def check_arrays(q: QTensor) -> None:
    """Raise if something that went through a whole tree of parameters, a cast say, has made other arrays of q's.

    Raises:
        TypeError: codes or scales are not uint8, or amax is not float32.
        ValueError: their shapes do not go together, as after a transpose of each.
    """
    for name, wanted in (("codes", np.uint8), ("scales", np.uint8), ("amax", np.float32)):
        array = getattr(q, name)
        if array is not None and array.dtype != wanted:
            raise TypeError(
                f"something has made {array.dtype} of a QTensor's {name}, which are {np.dtype(wanted)}: cast the tree "
                "with is_leaf=lambda a: isinstance(a, ifjax.QTensor), or write q.astype(dtype)"
            )
    blocks = q.scales.shape[q.axis] // q.fmt.scale.nbytes if q.scales.ndim >= -q.axis else 0
    length = packed_length(blocks * q.fmt.block, q.fmt.bits)
    if q.codes.ndim < -q.axis or with_length(q.scales.shape, q.axis, length) != q.codes.shape:
        raise ValueError(
            f"something has made codes {q.codes.shape} and scales {q.scales.shape} of a QTensor with blocks of "
            f"{q.fmt.block} along axis {q.axis}, which do not go together: change trees with is_leaf=lambda a: "
            "isinstance(a, ifjax.QTensor), and QTensors by their own methods, such as q.swapaxes"
        )


@jax.jit(static_argnames="dtype")
def _dequantize(q, dtype):
    return _decoded(q, dtype)


def unscaled_values(q: QTensor, dtype: Any = np.float32) -> Float[Array, "..."]:
    """Values of q without the tensor's factor, rounded from float32: multiplied by amax / K they are q's."""
    check_arrays(q)
    return _decoded(q.replaced(amax=None), np.dtype(dtype))


def _decoded(q, dtype):
    """On a device that has a kernel for it, by that; without an amax, without the tensor's factor."""

    def by_xla(q):
        return narrowed(_values(q, q.amax), dtype)

    encoder = encoder_for(device_kind())
    if encoder is None or refusal_to_decode(encoder, q, dtype) or _fault(encoder, q, dtype):
        return by_xla(q)
    by_kernel = functools.partial(decode_by_kernel, encoder=encoder, dtype=dtype)
    return lax.platform_dependent(q, **{encoder.platform: by_kernel, "default": by_xla})


def _fault(encoder, q, dtype):
    """What is wrong with a kernel on a device that is here; None if nothing is. All bytes stand for something."""
    axis, shape, has_amax = max(q.axis, -2), (256, 512), q.amax is not None

    def prove():
        def run():
            rng = np.random.default_rng(0)
            codes, scales = (jnp.asarray(rng.integers(0, 256, s, np.uint8)) for s in packed_shapes(shape, q.fmt, axis))
            blocking = Blocking(q.fmt, axis, shape[axis], dtype, q.headroom)
            return _dequantize(QTensor(codes, scales, jnp.float32(1.7) if has_amax else None, blocking), dtype)

        return difference(*by_both(run))

    does = "dequantize" if has_amax or not q.fmt.has_tensor_scale else "dequantize without amax"
    return fault_of(work_of(encoder, does, Encoding(q.fmt), dtype, axis), encoder, prove)


def _values(q, amax):
    fmt, axis, block, at = q.fmt, q.axis, q.fmt.block, q.ndim + q.axis
    headers = jnp.expand_dims(q.headers(), axis)
    if block % group_of(fmt.bits)[0] == 0:
        # [..., m, groups of a block, codes of a group, ...]: decoded in the groups they were packed in.
        packed = split_blocks(q.codes, packed_length(block, fmt.bits), axis)
        codes, headers = unpack(packed, fmt.bits, axis), jnp.expand_dims(headers, axis)
        shape = codes.shape[at + 1 : at + 3]
    else:
        codes = merge_blocks(unpack(q.codes, fmt.bits, axis), axis)
        codes = split_blocks(crop(codes, q.blocks * block, axis), block, axis)
        shape = (block,)
    place = jnp.arange(block, dtype=jnp.int32).reshape(*[1] * (at + 1), *shape, *[1] * (-axis - 1))
    if amax is not None and amax.ndim > at:
        amax = jnp.expand_dims(amax, range(at + 1, at + 1 + codes.ndim - q.ndim))
    values = decode(codes, headers, fmt, place=place, amax=amax, headroom=q.headroom)
    length = q.blocks * block
    return crop(values.reshape(with_length(q.codes.shape, axis, length)), q.shape[axis], axis)
