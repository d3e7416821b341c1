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
from ifjax.arrays.encoders import by_kernel_or_xla, decode_by_kernel, encoder_for, refusal_to_decode, work_of
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
    """A quantized array, as `ifjax.quantize` returns it. A pytree whose leaves are the three arrays.

    Its shape is that of the original array, [..., n, ...] with n at `axis`. m is the number of blocks along that axis,
    and W the number of bytes of a block header (1, except for formats with several factors in a block). Shapes are
    derived from the arrays and `axis` is negative, so that vmap, scan and indexing may add and remove leading axes.

    A QTensor does not convert to an array implicitly: write `q.dequantize()`. `x @ q` and `q @ x` are `ifjax.matmul`.

    Attributes:
        codes: packed codes, uint8 [..., packed n, ...], in order along `axis`, low bits first.
        scales: block headers, uint8 [..., m * W, ...]: the scale payload in the low bits, and above it the selector in
            formats that choose between several decodings.
        amax: float32 of shape (), or over leading axes with length 1 where entries share one amax; None for formats
            without a tensor scale.
        blocking: static metadata: format, axis, length, dtype, headroom, 2-D blocks, axis names. All but the length are
            also attributes of the QTensor.
    """

    codes: UInt8[Array, "..."]
    scales: UInt8[Array, "..."]
    amax: Float[Array, "..."] | None
    blocking: Blocking

    def __post_init__(self):
        introduce_to_flax(QTensor)

    @property
    def fmt(self) -> Format:
        """Record of the format."""
        return self.blocking.fmt

    @property
    def axis(self) -> int:
        """The blocked axis, as a negative number."""
        return self.blocking.axis

    @property
    def dtype(self) -> np.dtype:
        """dtype of the original array, and the default dtype of `dequantize`."""
        return self.blocking.dtype

    @property
    def headroom(self) -> float:
        """Fraction of the range that was used: 1, or 16/17 for unbiased stochastic rounding."""
        return self.blocking.headroom

    @property
    def block_2d(self) -> bool:
        """Whether square blocks over the last two axes share a header."""
        return self.blocking.block_2d

    @property
    def names(self) -> tuple[Any, ...] | None:
        """Logical axis names from Flax metadata, used for sharding; None if there are none."""
        return self.blocking.names

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the original array."""
        # Inside shard_map a device holds only part of the blocked axis; the shape of `scales` shows how much.
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
        """Axes that blocks extend along, as negative numbers."""
        return (-1, -2) if self.block_2d else (self.axis,)

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and amax together."""
        return self.codes.size + self.scales.size + (0 if self.amax is None else 4 * self.amax.size)

    @property
    def bits_per_value(self) -> float:
        """Bits per value of all three arrays together, padding included. NaN for an empty array."""
        return 8 * self.nbytes / self.size if self.size else math.nan

    def dequantize(self, dtype: DTypeLike | None = None) -> Float[Array, "..."]:
        """Return the values, computed in float32 and rounded once to `dtype` (by default the original one).

        Raises:
            TypeError: the dtypes of the three arrays were changed, for example by a cast of the whole tree.
        """
        check_arrays(self)
        return _dequantize(self, np.dtype(self.dtype if dtype is None else dtype))

    def astype(self, dtype: DTypeLike) -> "QTensor":
        """Return a QTensor with the same bytes and another `dtype`, which `dequantize` and products use.

        Raises:
            TypeError: `dtype` is not a supported float type.
        """
        dtype = np.dtype(dtype)
        if dtype.name not in DTYPES:
            raise TypeError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype}")
        return self.replaced(dtype=dtype)

    def unpacked_codes(self) -> UInt8[Array, "..."]:
        """Return the codes, one per value, in the shape of the original array."""
        check_arrays(self)
        codes = merge_blocks(unpack(self.codes, self.fmt.bits, self.axis), self.axis)
        return crop(codes, self.shape[self.axis], self.axis).astype(jnp.uint8)

    def headers(self) -> Int[Array, "..."]:
        """Return the block headers as integers, int32 [..., m, ...]."""
        check_arrays(self)
        return header_words(self.scales, self.fmt.scale.nbytes, self.axis)

    def choices(self) -> UInt8[Array, "..."]:
        """Return the index of the decoding that each block uses, uint8 [..., m, ...]. For IF4, 1 is the integer grid.

        Raises:
            ValueError: the format has a single decoding, so it stores no selector.
        """
        if not self.fmt.has_selector:
            raise ValueError(
                f"{self.fmt.name} stores no choice: all its blocks decode alike. Only formats with several decodings, "
                "such as if4, mark it in the scale"
            )
        return self.fmt.split(self.headers())[0].astype(jnp.uint8)

    def take(self, indices: Int[ArrayLike, "..."], axis: int = 0) -> "QTensor":
        """Return entries along an unblocked axis, like `jnp.take`; for example an embedding lookup on packed rows.

        Out-of-range indices give NaN values, as `jnp.take` does for floats.

        Raises:
            ValueError: `axis` is blocked.
        """
        return indexing.take(self, indices, axis)

    def __getitem__(self, index: Any) -> "QTensor":
        """Return q[index]: integers, slices, and at most one integer array or traced integer, on unblocked axes."""
        return indexing.index(self, index)

    @property
    def at(self) -> Any:
        """Indexed update `q.at[index].set(x)` along unblocked axes, like `jax.Array.at`. Returns a new QTensor.

        x is quantized with q's settings. Entries that have their own amax (`amax_axes`) get a new one. If an amax is
        shared with entries that are not overwritten, `set(x, keep_amax=True)` is needed, which keeps it.

        Raises:
            ValueError: the index is along a blocked axis, or the amax is shared with entries that are not overwritten.
        """
        from ifjax.arrays.updates import At

        return At(self)

    def transpose(self, *axes: Any) -> "QTensor":
        """Return q with its axes permuted, by default reversed. Blocks follow their axis to its new position.

        Raises:
            ValueError: the axes are not a permutation, or q has 2-D blocks and the last two axes would move (see `mT`).
        """
        given = axes[0] if len(axes) == 1 and not hasattr(axes[0], "__index__") else axes or None
        return shaping.transposed(self, given)

    def swapaxes(self, axis1: int, axis2: int) -> "QTensor":
        """Return q with two axes exchanged. See `transpose`."""
        axes = list(range(self.ndim))
        axes[axis1], axes[axis2] = axes[axis2], axes[axis1]
        return shaping.transposed(self, axes)

    def moveaxis(self, source: int, destination: int) -> "QTensor":
        """Return q with one axis moved to another position. See `transpose`."""
        return shaping.moved_axis(self, source, destination)

    def reshape(self, *shape: Any) -> "QTensor":
        """Return q in another shape, in which the blocked axis must stay one axis; one length may be -1.

        Raises:
            ValueError: the blocked axis would be split or merged, or the shape has a different number of values.
        """
        return shaping.reshape(self, shape[0] if len(shape) == 1 and not hasattr(shape[0], "__index__") else shape)

    def __len__(self) -> int:
        return self.shape[0]

    def __iter__(self):
        return (self[i] for i in range(len(self)))

    @property
    def T(self) -> "QTensor":
        """The transposed matrix, equal byte for byte to the quantized transpose of the original array.

        Raises:
            ValueError: q is not a matrix, or its blocks are not 2-D.
        """
        if self.ndim != 2:
            raise ValueError(f"T transposes matrices, got shape {self.shape}: write q.mT to swap the last two axes")
        return self.mT

    @property
    def mT(self) -> "QTensor":
        """q with its last two axes swapped, still packed along `axis`. Raises ValueError unless blocks are 2-D."""
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
        # Take one row of headers per row of 2-D blocks, then repeat it for each row of the transposed matrix.
        headers = lax.slice_in_dim(self.headers(), 0, None, stride=fmt.block, axis=self.ndim + other)
        headers = crop(jnp.repeat(headers.swapaxes(-1, -2), fmt.block, axis=other), columns, other)
        names = self.names and (*self.names[:-2], *self.names[-2:][::-1])
        codes, scales = pack(codes, fmt.bits, axis), header_bytes(headers, fmt.scale.nbytes, axis)
        return self.replaced(codes=codes, scales=scales, length=rows, names=names)

    def replaced(self, **fields: Any) -> "QTensor":
        """Return a QTensor with some of its arrays or fields of `blocking` replaced."""
        arrays = {name: fields.pop(name, getattr(self, name)) for name in ARRAYS}
        return QTensor(**arrays, blocking=dataclasses.replace(self.blocking, **fields) if fields else self.blocking)

    # NumPy then defers binary operators to this class.
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
        except (AttributeError, IndexError, TypeError):  # the leaves are not arrays, as in a tree of shardings or specs
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
    """Return the values of q in `dtype`, by default the dtype of the original array. See `QTensor.dequantize`.

    Raises:
        TypeError: q is not a QTensor, or the dtypes of its arrays were changed.

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
    """Raise if dtypes or shapes of q's arrays were changed, for example by a cast of a whole parameter tree.

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
    """Return the values of q without the tensor's factor amax / K, computed in float32 and rounded to `dtype`."""
    check_arrays(q)
    return _decoded(q.replaced(amax=None), np.dtype(dtype))


def _decoded(q, dtype):
    """Decode q, by a kernel on devices that have one for it. If q.amax is None, the tensor's factor is left out."""
    by_xla = functools.partial(decoded_by_xla, dtype=dtype)
    encoder = encoder_for(device_kind())
    if encoder is None or refusal_to_decode(encoder, q, dtype) or _fault(encoder, q, dtype):
        return by_xla(q)
    by_kernel = functools.partial(decode_by_kernel, encoder=encoder, dtype=dtype)
    return by_kernel_or_xla(encoder, by_kernel, by_xla, q)


def decoded_by_xla(q: QTensor, dtype: Any) -> jax.Array:
    """Return q's values, rounded to `dtype`, by XLA. If q.amax is None, the tensor's factor is left out."""
    return narrowed(_values(q, q.amax), dtype)


def _fault(encoder, q, dtype):
    """Check the kernel on this machine's device; return what is wrong with it, or None.

    The check decodes random bytes, because every byte is valid.
    """
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
        # Decode in the groups in which codes are packed: [..., m, groups of a block, codes of a group, ...].
        packed = split_blocks(q.codes, packed_length(block, fmt.bits), axis)
        codes, headers = unpack(packed, fmt.bits, axis), jnp.expand_dims(headers, axis)
        shape = codes.shape[at + 1 : at + 3]
    else:
        codes = merge_blocks(unpack(q.codes, fmt.bits, axis), axis)
        codes = split_blocks(crop(codes, q.blocks * block, axis), block, axis)
        shape = (block,)
    place = np.arange(block, dtype=np.int32).reshape(*[1] * (at + 1), *shape, *[1] * (-axis - 1))
    if amax is not None and amax.ndim > at:
        amax = jnp.expand_dims(amax, range(at + 1, at + 1 + codes.ndim - q.ndim))
    values = decode(codes, headers, fmt, place=place, amax=amax, headroom=q.headroom)
    length = q.blocks * block
    return crop(values.reshape(with_length(q.codes.shape, axis, length)), q.shape[axis], axis)
