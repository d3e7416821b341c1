"""Registry of kernels that encode and decode blocks, with the devices and inputs that each supports.

    x -> amax, by XLA -> tables of the tensor, by XLA -> codes and headers, or values, in one pass by a kernel

A kernel gives the same bits as the codec (see `ifjax.codec.places`). Inputs that no kernel supports go through XLA.
"""

import dataclasses
import functools
import json
import math
import zlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, PartitionSpec

from ifjax.arrays.parts import Pieces, everywhere, has_known_parts, partitioned
from ifjax.codec import Encoding, Loss, Rounding, Search
from ifjax.codec.blocks import largest_divisor
from ifjax.codec.eden_places import EdenCodec
from ifjax.codec.encode import amax_of
from ifjax.codec.places import LANES, PlaceCodec, decoder_refusal, encoder_refusal
from ifjax.codec.rounding import NEAREST, seeds, strides
from ifjax.formats import Format
from ifjax.lookup import Registry
from ifjax.numerics.devices import device_kind, may_be_partitioned
from ifjax.numerics.hadamard import hadamard
from ifjax.numerics.kernels import kernels_for, why_none
from ifjax.numerics.proofs import known_fault
from ifjax.numerics.xla import by_platform, unless_exported


class Explanation(NamedTuple):
    """The execution path that a computation takes.

    Attributes:
        path: the name of a backend or kernel, or an XLA path. For a product, "xla" decodes the weights and then
            multiplies; "xla_few_rows" decodes block by block during the multiplication; "xla_float32" decodes and
            multiplies in float32. For `quantize`, "xla" is the codec compiled by XLA.
        reason: why this path was chosen, or why no faster one was.
    """

    path: str
    reason: str


@dataclasses.dataclass(frozen=True)
class Encoder:
    """Kernels that encode and decode, and the devices that they support.

    Attributes:
        name: name of the kernels.
        platform: JAX platform that they compile for: "cuda", "tpu" or "cpu".
        devices: a regular expression that is searched for in the device kind, in JAX's spelling or the usual one.
        load: returns the kernel module, which has `supports`, `tables`, `encode`, `decode` and `peaks` as in
            `pallas_kernels.tpu_blocks`, and may have `rotated_peaks`, where XLA would write what it rotates.
        measured: where times measured on hardware are stated, or None.
        gives_multiples: whether training products take values from the encoder, where none needs packed bytes.
    """

    name: str
    platform: str
    devices: str
    load: Callable[[], Any]
    measured: str | None = None
    gives_multiples: bool = False


class Rotated(NamedTuple):
    """A Hadamard transform of runs along the blocked axis before they are encoded; hashable. Kernels take it as it is.

    Attributes:
        size: the length of a run, as for `hadamard`.
        signs: `size` factors +-1; None if they are an argument of kernels.
    """

    size: int
    signs: tuple[int, ...] | None

    def of(self, x: jax.Array, axis: int) -> jax.Array:
        """Return x transformed along `axis` by XLA."""
        return hadamard(x, axis=axis, size=self.size, signs=np.array(self.signs, np.int8))


def _tpu_blocks():
    from pallas_kernels import tpu_blocks

    return tpu_blocks


def _gpu_blocks():
    from pallas_kernels import gpu_blocks

    return gpu_blocks


ENCODERS: Registry[Encoder] = Registry(
    "encoder", Encoder, "ifjax.arrays.ENCODERS",
    (
        Encoder("tpu_blocks", "tpu", r"\b(v[56] ?(lite|e)|(TPU ?|v)7x)\b", _tpu_blocks, gives_multiples=True),
        Encoder("gpu_blocks", "cuda", r"\bG?(H(100|200|800|20)|B[123]00)\b", _gpu_blocks, gives_multiples=True),
    ),
)  # fmt: skip


def explain_quantize(
    x: Any,
    fmt: str | Format | Encoding = "if4",
    *,
    axis: int = -1,
    loss: Loss | None = None,
    rounding: str | Rounding = "nearest",
    block_2d: bool = False,
    amax_axes: Sequence[int] = (),
    search: str | Search | None = None,
    weights: Any = None,
    gradient: str = "straight_through",
    target: str | None = None,
) -> Explanation:
    """Return which path `quantize` and `fake_quantize` take for x, and why. Nothing is computed; a shape suffices.

    Args:
        x: an array or `jax.ShapeDtypeStruct`. The other arguments are those of `quantize` and `fake_quantize`.
        target: the device kind, such as "TPU v6e". By default that of the first device.

    Raises:
        ValueError: a setting is unknown, or settings do not fit together.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import ifjax
        >>> x = jax.ShapeDtypeStruct((4096, 4096), jnp.bfloat16)
        >>> ifjax.explain_quantize(x, target="TPU v6e")
        Explanation(path='tpu_blocks', reason='on TPU v6e')
        >>> ifjax.explain_quantize(x, search="fast", target="TPU v6e")
        Explanation(path='xla', reason='tpu_blocks cannot take it: it searches scales')
    """
    how = Encoding.of(fmt, loss=loss, rounding=rounding, search=search, block_2d=block_2d)
    device = device_kind(target)
    encoder = encoder_for(device)
    if encoder is None:
        return Explanation("xla", why_none(device))
    axis = axis % x.ndim - x.ndim
    last = max((a % x.ndim for a in amax_axes), default=-1)
    reason = refusal(encoder, x, how, axis, last + 1, is_weighed=weights is not None, is_clipped=gradient == "clipped")
    if reason is not None:
        return Explanation("xla", f"{encoder.name} cannot take it: {reason}")
    for does in ("quantize", "fake_quantize"):
        if fault := known_fault(work_of(encoder, does, how, x.dtype, axis), encoder):
            return Explanation("xla", f"{encoder.name} failed its check on {device}: {fault}")
    return Explanation(encoder.name, f"on {device}")


def encoder_for(device: str) -> Encoder | None:
    """Return the kernels for a device kind; None if there are none or the `kernels` setting turns them off."""
    return kernels_for(ENCODERS.values(), device)


def gives_multiples() -> bool:
    """Return whether training products take their operands' values from the encoder: a kernel, or XLA's on a CPU."""
    encoder = encoder_for(device_kind())
    return encodes_on_cpu() if encoder is None else encoder.gives_multiples


def encodes_on_cpu() -> bool:
    """Return whether XLA encodes, for a CPU."""
    device = device_kind()
    return device == "cpu" and encoder_for(device) is None


def work_of(
    encoder: Encoder, does: str, how: Encoding, dtype: Any, axis: int, rotation: "Rotated | None" = None
) -> str:  # fmt: skip
    """Return the text that names what a kernel is compiled for; results of kernel checks are stored under it."""
    way = [f"axis {max(axis, -2)}", how.rounding.name, getattr(how.loss, "name", "")] + ["squares"] * how.block_2d
    way += [] if rotation is None else [f"rotated by {rotation.size}"]
    return f"{encoder.name}: {does} {np.dtype(dtype).name} {described(how.fmt)}, {', '.join(way)}"


def described(fmt: Format) -> str:
    """Return the format's name with a checksum of its record."""
    return f"{fmt.name} ({zlib.crc32(json.dumps(fmt.to_dict(), sort_keys=True).encode()):08x})"


def refusal(
    encoder: Encoder, x: Any, how: Encoding, axis: int, amax_ndim: int, *, is_weighed: bool, is_clipped: bool,
    rotation: Rotated | None = None,
) -> str | None:  # fmt: skip
    """Return why the encoder cannot encode x with an amax of `amax_ndim` axes; None if it can.

    `is_weighed`: errors have weights. `is_clipped`: the mask of a clipped gradient is wanted.
    """
    if is_weighed:
        return "it weighs no errors"
    if is_clipped:
        return "it does not tell which gradients are clipped"
    amax_ndim = _lead(x, axis, how.block_2d, amax_ndim)
    reason = encoder_refusal(how) or _refusal_of_shape(x.shape, axis, amax_ndim)
    reason = reason or _refusal_of_sharding(encoder, x, axis, amax_ndim)
    codec = PlaceCodec(how, np.dtype(x.dtype))
    return reason or _refusal_of_kernel(encoder, x.shape, x.dtype, codec, axis, amax_ndim, rotation)


def refusal_to_decode(encoder: Encoder, q: Any, dtype: Any) -> str | None:
    """Return why the decoder cannot decode the QTensor q; None if it can."""
    amax_ndim = _lead(q, q.axis, False, 0 if q.amax is None else q.amax.ndim)
    reason = decoder_refusal(q.fmt) or _refusal_of_shape(q.shape, q.axis, amax_ndim)
    reason = reason or _refusal_of_sharding(encoder, q.codes, q.axis, amax_ndim)
    codec = PlaceCodec(_how_to_decode(q), np.dtype(dtype))
    return reason or _refusal_of_kernel(encoder, q.shape, np.dtype(dtype), codec, q.axis, amax_ndim)


def _refusal_of_shape(shape, axis, amax_ndim):
    _, rows, columns = _as_matrices(shape, axis, amax_ndim)
    if 0 in shape:
        return "the array is empty"
    if amax_ndim > max(len(shape) - max(-axis, 2), 0):
        return "amax belongs to rows or columns, and kernels take matrices with one"
    if (columns if axis < -1 else rows) < 8:
        return "it is a vector, or a few: lanes would lie idle"
    return None


def _refusal_of_sharding(encoder, x, axis, amax_ndim):
    if not may_be_partitioned():
        return None
    if not has_known_parts(x):
        is_typed = AxisType.Explicit in jax.typeof(x).sharding.mesh.axis_types
        if encoder.platform != "tpu" and not is_typed:
            return None
        return "XLA would gather sharded arrays for it; in jax.shard_map, or on axes of AxisType.Explicit, it is taken"
    try:
        jax.eval_shape(lambda x: x.reshape(_as_matrices(x.shape, axis, amax_ndim)), x)
    except Exception as error:  # JAX has no public name for it
        return f"its leading axes cannot be merged: {error}"
    return None


def _refusal_of_kernel(encoder, shape, dtype, codec, axis, amax_ndim, rotation=None):
    if dtype not in (np.float32, jnp.bfloat16, np.float16):
        return f"values must be float32, bfloat16 or float16, got {dtype}"
    matrices = jax.ShapeDtypeStruct(_as_matrices(shape, axis, amax_ndim), dtype)
    turn = {} if rotation is None else {"rotation": rotation}
    return encoder.load().supports(codec, matrices, -1 if axis == -1 else -2, **turn)


def _lead(x, axis, is_square, amax_ndim):
    """Return how many leading axes of x enumerate its matrices.

    2-D blocks must not span two matrices. Devices may hold parts of the rows of each matrix, such as a sequence, which
    are no range of all rows.
    """
    is_divided = may_be_partitioned() and axis == -1 and x.ndim > 2 and x.shape[-2] >= LANES
    return max(amax_ndim, x.ndim - 2) if is_square or is_divided else amax_ndim


def _as_matrices(shape, axis, amax_ndim) -> tuple[int, int, int]:
    """Return the shape [L, R, C] of x as the fewest matrices with one amax each, blocked along rows or columns."""
    if axis == -1:
        return math.prod(shape[:amax_ndim]), math.prod(shape[amax_ndim:-1]), shape[-1]
    at = len(shape) + axis
    return math.prod(shape[:at]), shape[at], math.prod(shape[at + 1 :])


def encode_by_kernel(
    x: jax.Array, key: jax.Array | None, amax: jax.Array | None, *, encoder: Encoder, how: Encoding, axis: int,
    amax_axes: tuple[int, ...], wants_codes: bool, wants_values: bool, rotation: Rotated | None = None,
    in_multiples: bool = False,
) -> tuple[list[jax.Array], jax.Array | None, jax.Array | None]:  # fmt: skip
    """Encode x with a kernel, rotated first if so asked; return ([packed codes, scale bytes, values], amax, amax / K).

    The list holds only the wanted arrays. Codes and scales have the shapes of a QTensor, values that of x. With
    `in_multiples` values are multiples of the tensor's factor amax / K.
    """
    kernel, codec, factor = encoder.load(), PlaceCodec(how, np.dtype(x.dtype), in_multiples), None
    lead = max(amax_axes, default=-1) + 1
    shape = _as_matrices(x.shape, axis, _lead(x, axis, how.block_2d, lead))
    if how.fmt.has_tensor_scale:
        if amax is None:
            maxima = None if rotation is None else _rotated_maxima(x, kernel, codec, axis, rotation)
            if maxima is None:
                magnitudes = _magnitudes(x if rotation is None else rotation.of(x, axis), how.fmt)
                if may_be_partitioned():  # parts of tensors would be gathered
                    amax = amax_of(magnitudes, amax_axes)
                else:
                    maxima = _maxima(magnitudes, amax_axes, kernel.PARTS)
        if amax is not None:
            maxima = _whole(amax).reshape(-1, 1)
        tables = functools.partial(kernel.tables, codec)
        peaks, numbers = _by_matrix(lambda _, maxima: everywhere(tables, maxima), None, maxima)
        lengths = [x.shape[a] if a in amax_axes else 1 for a in range(lead)]
        own, factor = (a.reshape(lengths) for a in peaks)
        amax = own if amax is None else amax
        numbers = tuple(_of_matrices(a, lengths, x.shape, shape[0]) for a in numbers)
    else:
        numbers = codec.encoder_tables(None, 1)
    noise = None
    if how.rounding.noise is not None and key is not None:
        noise = _first_indices(shape), _seeds(key, shape[0])
    run = functools.partial(
        _encode_matrices, kernel=kernel, codec=codec, axis=-1 if axis == -1 else -2, wants_codes=wants_codes,
        wants_values=wants_values, rotation=rotation,
    )  # fmt: skip
    arrays = _by_matrix(run, numbers, x.reshape(shape), noise)
    return [_unfolded(array, x.shape, axis) for array in arrays], amax, factor


def by_kernel_or_xla(encoder: Encoder, by_kernel: Callable[..., Any], by_xla: Callable[..., Any], *args: Any) -> Any:
    """Return by_kernel(*args) in programs for the encoder's platform, and by_xla(*args) in all others.

    Programs of several devices that `jax.export` writes have no kernels: what XLA calls in order to partition them
    cannot be written to a file.
    """
    run = by_kernel
    if may_be_partitioned():
        run = functools.partial(unless_exported, run=by_kernel, exported=by_xla)
    return by_platform(*args, default=by_xla, **{encoder.platform: run})


def refusal_of_runs(encoder: Encoder, x: Any, codec: EdenCodec, axis: int, size: int) -> str | None:
    """Return why the encoder cannot encode x by MS-EDEN with runs of `size`; None if it can."""
    lead = _lead(x, axis, False, 0)
    reason = codec.refusal or _refusal_of_shape(x.shape, axis, lead) or _refusal_of_sharding(encoder, x, axis, lead)
    return reason or _refusal_of_kernel(encoder, x.shape, x.dtype, codec, axis, lead, Rotated(size, None))


def encode_runs_by_kernel(
    x: jax.Array, key: jax.Array, amax: jax.Array | None, signs: jax.Array, *, encoder: Encoder, codec: EdenCodec,
    axis: int, wants_codes: bool, wants_values: bool,
) -> tuple[list[jax.Array], jax.Array, jax.Array]:  # fmt: skip
    """Encode x by MS-EDEN with a kernel; return what `encode_by_kernel` does with `in_multiples`.

    `signs` are float32 [size]. An amax of None or 0 is x's own. The returned amax is that of the QTensor.
    """
    shape, kernel, at = _as_matrices(x.shape, axis, _lead(x, axis, False, 0)), encoder.load(), -1 if axis == -1 else -2
    settings = {"codec": codec, "axis": at, "rotation": Rotated(len(signs), None)}
    matrices, signs = x.reshape(shape), jnp.broadcast_to(signs, (shape[0], len(signs)))
    maxima = _maxima_by(kernel.peaks, (matrices, signs), **settings)
    maxima = maxima if amax is None else jnp.where(amax > 0, amax, maxima)
    tables = functools.partial(kernel.tables, codec)
    (stored, factor), numbers = _by_matrix(lambda _, maxima: everywhere(tables, maxima), None, maxima)
    noise = _first_indices(_blocks_of(shape, codec, at)), _seeds(key, shape[0])
    wants = {"wants_codes": wants_codes, "wants_values": wants_values}
    run = functools.partial(_encode_matrices, kernel=kernel, **wants, **settings)
    arrays = _by_matrix(run, numbers, matrices, noise, signs)
    return [_unfolded(array, x.shape, axis) for array in arrays], stored[0], factor[0]


def decode_by_kernel(q: Any, *, encoder: Encoder, dtype: np.dtype) -> jax.Array:
    """Decode a QTensor with a kernel. If it has no amax, the tensor's factor is left out."""
    lead = _lead(q, q.axis, False, 0 if q.amax is None else q.amax.ndim)
    codes, headers = (a.reshape(_as_matrices(a.shape, q.axis, lead)) for a in (q.codes, q.scales))
    run = functools.partial(
        _decode_matrices, encoder=encoder, how=_how_to_decode(q), axis=-1 if q.axis == -1 else -2,
        length=q.shape[q.axis], dtype=dtype,
    )  # fmt: skip
    amax = None if q.amax is None else _of_matrices(q.amax.reshape(-1), q.amax.shape, q.shape, len(codes))
    (values,) = _by_matrix(run, amax, codes, headers)
    return values.reshape(q.shape)


def _how_to_decode(q):
    return Encoding(q.fmt, dataclasses.replace(NEAREST, headroom=q.headroom))


def _first_indices(shape):
    """Return the index of the first element of each matrix [L, R, C], modulo 2^32: int32 [L]."""
    return jnp.arange(shape[0], dtype=jnp.int32) * strides(tuple(shape))[0]


def _seeds(key, count):
    """Return the `seeds` of a key, for each of `count` matrices: int32 [count, 2]."""
    return jnp.broadcast_to(seeds(key), (count, 2))


def _rotated_maxima(x, kernel, codec, axis, rotation):
    """Return the maxima [1, n] of x rotated, by the kernels' own pass; None if they have none for it."""
    if not hasattr(kernel, "rotated_peaks"):
        return None
    run = functools.partial(kernel.rotated_peaks, keeps_infinity=codec.fmt.saturates)
    matrices = x.reshape(_as_matrices(x.shape, axis, _lead(x, axis, False, 0)))
    return _maxima_by(run, (matrices,), codec, -1 if axis == -1 else -2, rotation)


def _maxima_by(run, arrays, codec, axis, rotation):
    """Return the maxima [1, n] of all matrices of arrays[0], rotated, by a kernel's pass over (x, *signs)."""
    of_matrices = functools.partial(_peaks_of_matrices, run=run, codec=codec, axis=axis, rotation=rotation)
    (found,) = _by_matrix(of_matrices, None, *arrays)
    return jnp.max(found, keepdims=True) if may_be_partitioned() else found.reshape(1, -1)


def _peaks_of_matrices(_, x, *signs, run, codec, axis, rotation):
    """Return one or more maxima of each rotated matrix: [L, n]."""
    run = functools.partial(run, codec=codec, axis=axis, rotation=rotation)
    if not may_be_partitioned():
        return (run(x, *signs),)
    pieces = _pieces(x.shape, codec, axis, rotation)

    def of_part(x, *signs):  # a device says for each of its blocks what the largest of all is, and XLA asks all devices
        found = run(x, *signs).max(1)
        return (jnp.broadcast_to(found[:, None, None], _blocks_of(x.shape, codec, axis)),)

    ins = [pieces.matrix(codec.block), *map(pieces.shared, signs)]
    (found,) = partitioned(of_part, [x, *signs], ins, [pieces.matrix(1)], pieces.sizes)
    return (found.max((1, 2))[:, None],)


def _magnitudes(x, fmt):
    """Return the finite magnitudes of x, in float32; 0 for what an amax ignores."""
    x = x.astype(jnp.float32)
    return jnp.where(~jnp.isnan(x) if fmt.saturates else jnp.isfinite(x), jnp.abs(x), 0)


def _maxima(magnitudes, amax_axes, parts):
    """Return the largest magnitudes of up to `parts` parts of each tensor: [L, n]. Tensors are those of `amax_axes`."""
    shape, lead = magnitudes.shape, len(amax_axes)
    count, rows = math.prod(shape[:lead]), math.prod(shape[lead:-1])
    if parts == 1 or amax_axes != tuple(range(lead)):
        return amax_of(magnitudes, amax_axes).reshape(-1, 1)
    return jnp.max(magnitudes.reshape(count, largest_divisor(rows, parts), -1), axis=-1)


def _of_matrices(a, lengths, shape, count):
    """Return the entries of a [L, ...] for each of `count` matrices: [count, ...], or [1, ...] if all share one.

    The L tensors have the shape `lengths`, that of their amax, which broadcasts to leading axes of `shape`.
    """
    if len(a) == 1:
        return a
    rest = a.shape[1:]
    a = jnp.broadcast_to(a.reshape(*lengths, *rest), (*shape[: len(lengths)], *rest)).reshape(-1, 1, *rest)
    return jnp.broadcast_to(a, (len(a), count // len(a), *rest)).reshape(count, *rest)


def _whole(amax):
    """Return all numbers of amax on each device, if its sharding is part of its type."""
    return amax if amax is None or not has_known_parts(amax) else jax.reshard(amax, PartitionSpec())


def _unfolded(array, shape, axis):
    """Reshape [L, R, C] to `shape`, except that the blocked axis keeps the array's length."""
    at = len(shape) + axis
    return array.reshape(*shape[:at], array.shape[-1 if axis == -1 else -2], *shape[at + 1 :])


def _by_matrix(run, shared, *arrays):
    """Call run(shared, *arrays), which returns a tree of arrays [L, ...]. Under vmap the batch is folded into L.

    `arrays` are trees of arrays [L, ...], the first one a single array; `shared` is one of arrays [L, ...] or [1, ...].
    """
    call = jax.custom_batching.custom_vmap(run)

    @call.def_vmap
    def batched(axis_size, in_batched, shared, *arrays):
        shared_batched, *are_batched = in_batched
        count = arrays[0].shape[1 if are_batched[0] else 0]

        def folded(a, is_batched):
            a = a if is_batched else jnp.broadcast_to(a, (axis_size, *a.shape))
            if has_known_parts(a):  # parts of each member are no range of all
                first, _, *rest = jax.typeof(a).sharding.spec
                a = jax.reshard(a, PartitionSpec(first, None, *rest))
            return a.reshape(-1, *a.shape[2:])

        def folded_for_each(a, is_batched):
            if not is_batched and len(a) == 1:
                return a
            a = a if is_batched else jnp.broadcast_to(a, (axis_size, *a.shape))
            return jnp.broadcast_to(a, (axis_size, count, *a.shape[2:])).reshape(-1, *a.shape[2:])

        shared = jax.tree.map(folded_for_each, shared, shared_batched)
        results = _by_matrix(run, shared, *jax.tree.map(folded, arrays, tuple(are_batched)))
        results = jax.tree.map(lambda r: r.reshape(axis_size, count, *r.shape[1:]), results)
        return results, jax.tree.map(lambda _: True, results)

    return call(shared, *arrays)


def _pieces(shape, codec, axis, rotation):
    # Tiles of a TPU hold eight runs that are rotated.
    length = codec.block if rotation is None else math.lcm(codec.block, 8 * rotation.size)
    return Pieces(shape, axis, codec.block, length, codec.is_square)


def _blocks_of(shape, codec, axis):
    """Return the lengths of an array with one entry for each block of an array [L, R, C]."""
    return tuple(n // codec.block if a == 3 + axis else n for a, n in enumerate(shape))


def _encode_matrices(numbers, x, noise, *signs, kernel, codec, axis, wants_codes, wants_values, rotation):
    # What noise belongs to: values, or blocks.
    drawn = _blocks_of(x.shape, codec, axis) if codec.corrects_runs else x.shape
    if noise is not None:
        noise = kernel.Noise(noise[0], jnp.asarray(strides(drawn)[1:], jnp.int32), noise[1])
    settings = {"codec": codec, "axis": axis, "wants_codes": wants_codes, "wants_values": wants_values}
    if rotation is not None:
        settings["rotation"] = rotation
    run = functools.partial(kernel.encode, **settings)
    if not may_be_partitioned():
        return tuple(run(x, *numbers, noise, *signs))
    pieces = _pieces(x.shape, codec, axis, rotation)
    args, ins = [x, *numbers, *signs], [pieces.matrix(codec.block), *map(pieces.shared, (*numbers, *signs))]
    if noise is not None:  # indices of rows and columns tell a device where its part lies
        args += [*noise, *(jnp.arange(n, dtype=jnp.int32) for n in drawn[1:])]
        ins += ["l", "whole2x", "l whole2x", *pieces.axes(1 if codec.corrects_runs else codec.block)]

    def encode(x, scalars, tables, *args):
        if noise is None:
            return run(x, scalars, tables, None, *args)
        *signs, base, strides, seeds, rows, columns = args
        base = base + rows[0] * strides[0] + columns[0] * strides[1]
        return run(x, scalars, tables, kernel.Noise(base, strides, seeds), *signs)

    widths = [codec.block * codec.bits // 8, 1] * wants_codes + [codec.block] * wants_values
    return tuple(partitioned(encode, args, ins, [pieces.matrix(width) for width in widths], pieces.sizes))


def _decode_matrices(amax, codes, headers, *, encoder, how, axis, length, dtype):
    codec = PlaceCodec(how, dtype)
    run = functools.partial(encoder.load().decode, codec=codec, axis=axis, dtype=dtype)
    if not may_be_partitioned():
        return (run(codes, headers, amax, length=length),)
    shape = [*codes.shape]
    shape[axis] = length
    pieces = Pieces(tuple(shape), axis, codec.block, codec.block)
    args = [codes, headers] if amax is None else [codes, headers, _whole(amax)]
    ins = [*(pieces.matrix(width) for width in (codec.block * codec.bits // 8, 1)), *map(pieces.shared, args[2:])]

    def decode(codes, headers, amax=None):
        held = codes.shape[axis] * 8 // codec.bits  # more than `length` only if the last block is not full
        return [run(codes, headers, amax, length=min(length, held))]

    return tuple(partitioned(decode, args, ins, [pieces.matrix(codec.block)], pieces.sizes))
