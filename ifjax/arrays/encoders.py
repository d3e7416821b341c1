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

from ifjax.codec import Encoding, Loss, Rounding, Search
from ifjax.codec.encode import amax_of
from ifjax.codec.places import PlaceCodec, decoder_refusal, encoder_refusal
from ifjax.codec.rounding import NEAREST, seeds
from ifjax.formats import Format
from ifjax.lookup import Registry
from ifjax.numerics.devices import device_kind, may_be_partitioned
from ifjax.numerics.hadamard import hadamard
from ifjax.numerics.kernels import kernels_for, why_none
from ifjax.numerics.proofs import known_fault


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
        load: returns the kernel module, which has `supports`, `encode` and `decode` as in `pallas_kernels.tpu_blocks`,
            and may have `rotated_peaks`, where XLA would write what it rotates for its maximum.
        measured: where times measured on hardware are stated, or None.
        writes_multiples: whether a product's left operand is taken from the encoder as values, instead of as codes that
            are decoded again.
    """

    name: str
    platform: str
    devices: str
    load: Callable[[], Any]
    measured: str | None = None
    writes_multiples: bool = False


class Rotated(NamedTuple):
    """A Hadamard transform of runs along the blocked axis before they are encoded; hashable. Kernels take it as it is.

    Attributes:
        size: the length of a run, as for `hadamard`.
        signs: `size` factors +-1.
    """

    size: int
    signs: tuple[int, ...]

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
        Encoder("tpu_blocks", "tpu", r"\b(v[56] ?(lite|e)|(TPU ?|v)7x)\b", _tpu_blocks, writes_multiples=True),
        Encoder("gpu_blocks", "cuda", r"\bG?(H(100|200|800|20)|B[123]00)\b", _gpu_blocks),
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
    amax_ndim = _lead(x, how, amax_ndim)
    reason = encoder_refusal(how) or _refusal_of_shape(x.shape, axis, amax_ndim)
    return reason or _refusal_of_kernel(encoder, x.shape, x.dtype, how, axis, amax_ndim, rotation)


def refusal_to_decode(encoder: Encoder, q: Any, dtype: Any) -> str | None:
    """Return why the decoder cannot decode the QTensor q; None if it can."""
    amax_ndim = 0 if q.amax is None else q.amax.ndim
    reason = decoder_refusal(q.fmt) or _refusal_of_shape(q.shape, q.axis, amax_ndim)
    return reason or _refusal_of_kernel(encoder, q.shape, np.dtype(dtype), _how_to_decode(q), q.axis, amax_ndim)


def _refusal_of_shape(shape, axis, amax_ndim):
    _, rows, columns = _as_matrices(shape, axis, amax_ndim)
    if 0 in shape:
        return "the array is empty"
    if amax_ndim > max(len(shape) - max(-axis, 2), 0):
        return "amax belongs to rows or columns, and kernels take matrices with one"
    if (columns if axis < -1 else rows) < 8:
        return "it is a vector, or a few: lanes would lie idle"
    if may_be_partitioned():
        return "XLA would gather sharded arrays for a kernel; inside jax.shard_map it is taken"
    return None


def _refusal_of_kernel(encoder, shape, dtype, how, axis, amax_ndim, rotation=None):
    if dtype not in (np.float32, jnp.bfloat16):
        return f"values must be float32 or bfloat16, got {dtype}"
    matrices = jax.ShapeDtypeStruct(_as_matrices(shape, axis, amax_ndim), dtype)
    turn = {} if rotation is None else {"rotation": rotation}
    return encoder.load().supports(PlaceCodec(how, np.dtype(dtype)), matrices, -1 if axis == -1 else -2, **turn)


def _lead(x, how, amax_ndim):
    """Return how many leading axes of x enumerate its matrices: 2-D blocks must not span two matrices."""
    return max(amax_ndim, x.ndim - 2) if how.block_2d else amax_ndim


def _as_matrices(shape, axis, amax_ndim) -> tuple[int, int, int]:
    """Return the shape [L, R, C] of x as the fewest matrices with one amax each, blocked along rows or columns."""
    if axis == -1:
        return math.prod(shape[:amax_ndim]), math.prod(shape[amax_ndim:-1]), shape[-1]
    at = len(shape) + axis
    return math.prod(shape[:at]), shape[at], math.prod(shape[at + 1 :])


def encode_by_kernel(
    x: jax.Array, key: jax.Array | None, amax: jax.Array | None, *, encoder: Encoder, how: Encoding, axis: int,
    amax_axes: tuple[int, ...], wants_codes: bool, wants_values: bool, rotation: Rotated | None = None,
    is_unscaled: bool = False,
) -> tuple[list[jax.Array], jax.Array | None]:  # fmt: skip
    """Encode x with a kernel, rotated first if so asked; return ([packed codes, scale bytes, values], amax).

    The list holds only the wanted arrays. Codes and scales have the shapes of a QTensor, values that of x.
    `is_unscaled`: the values are without the tensor's factor.
    """
    fmt = how.fmt
    if fmt.has_tensor_scale and amax is None:
        amax = _rotated_amax(x, encoder, how, axis, rotation) if rotation else _amax(x, amax_axes, fmt)
    shape = _as_matrices(x.shape, axis, _lead(x, how, 0 if amax is None else amax.ndim))
    numbers = amax if fmt.has_tensor_scale else None
    noise = None
    if how.rounding.noise is not None and key is not None:
        count, size = shape[0], np.uint32(math.prod(shape[1:]) % 2**32).view(np.int32)
        base = jnp.arange(count, dtype=jnp.int32) * size
        noise = base, jnp.broadcast_to(jnp.stack(seeds(key)), (count, 2))
    run = functools.partial(
        _encode_matrices, encoder=encoder, how=how, axis=-1 if axis == -1 else -2, wants_codes=wants_codes,
        wants_values=wants_values, rotation=rotation, is_unscaled=is_unscaled,
    )  # fmt: skip
    arrays = _by_matrix(run, _of_matrices(numbers, x.shape, shape[0]), x.reshape(shape), noise)
    return [_unfolded(array, x.shape, axis) for array in arrays], amax


def decode_by_kernel(q: Any, *, encoder: Encoder, dtype: np.dtype) -> jax.Array:
    """Decode a QTensor with a kernel. If it has no amax, the tensor's factor is left out."""
    lead = 0 if q.amax is None else q.amax.ndim
    codes, headers = (a.reshape(_as_matrices(a.shape, q.axis, lead)) for a in (q.codes, q.scales))
    run = functools.partial(
        _decode_matrices, encoder=encoder, how=_how_to_decode(q), axis=-1 if q.axis == -1 else -2,
        length=q.shape[q.axis], dtype=dtype,
    )  # fmt: skip
    (values,) = _by_matrix(run, _of_matrices(q.amax, q.shape, len(codes)), codes, headers)
    return values.reshape(q.shape)


def _how_to_decode(q):
    return Encoding(q.fmt, dataclasses.replace(NEAREST, headroom=q.headroom))


def _amax(x, amax_axes, fmt):
    """Return the largest finite magnitude of x, as the codec computes it, without splitting x into blocks."""
    x = x.astype(jnp.float32)
    kept = ~jnp.isnan(x) if fmt.saturates else jnp.isfinite(x)
    return amax_of(jnp.where(kept, jnp.abs(x), 0), amax_axes)


def _rotated_amax(x, encoder, how, axis, rotation):
    """Return the largest finite magnitude of x after rotation, by the kernels' own pass if they have one."""
    kernel = encoder.load()
    if not hasattr(kernel, "rotated_peaks"):
        return _amax(rotation.of(x, axis), (), how.fmt)

    def run(_, x):
        return (
            kernel.rotated_peaks(
                x, codec=PlaceCodec(how, np.dtype(x.dtype)), axis=-1 if axis == -1 else -2, rotation=rotation,
                keeps_infinity=how.fmt.saturates,
            ),
        )  # fmt: skip

    (peaks,) = _by_matrix(run, None, x.reshape(_as_matrices(x.shape, axis, 0)))
    return peaks.max()


def _of_matrices(amax, shape, count):
    """Return amax for each of `count` matrices: [count], or [1] if all share one; None if there is none."""
    if amax is None or amax.size == 1:
        return None if amax is None else amax.reshape(1)
    amax = jnp.broadcast_to(amax, shape[: amax.ndim]).reshape(-1, 1)
    return jnp.broadcast_to(amax, (len(amax), count // len(amax))).reshape(-1)


def _unfolded(array, shape, axis):
    """Reshape [L, R, C] to `shape`, except that the blocked axis keeps the array's length."""
    at = len(shape) + axis
    return array.reshape(*shape[:at], array.shape[-1 if axis == -1 else -2], *shape[at + 1 :])


def _by_matrix(run, amax, *arrays):
    """Call run(amax, *arrays), which returns a tuple of arrays [L, ...]. Under vmap the batch is folded into L.

    `arrays` are trees of arrays [L, ...], the first one a single array; amax is [L], [1] or None.
    """
    call = jax.custom_batching.custom_vmap(run)

    @call.def_vmap
    def batched(axis_size, in_batched, amax, *arrays):
        amax_batched, *are_batched = in_batched
        count = arrays[0].shape[1 if are_batched[0] else 0]

        def folded(a, is_batched):
            a = a if is_batched else jnp.broadcast_to(a, (axis_size, *a.shape))
            return a.reshape(-1, *a.shape[2:])

        if amax is not None and (amax_batched or len(amax) > 1):
            amax = amax if amax_batched else jnp.broadcast_to(amax, (axis_size, *amax.shape))
            amax = jnp.broadcast_to(amax, (axis_size, count)).reshape(-1)
        results = _by_matrix(run, amax, *jax.tree.map(folded, arrays, tuple(are_batched)))
        return tuple(r.reshape(axis_size, count, *r.shape[1:]) for r in results), (True,) * len(results)

    return call(amax, *arrays)


def _encode_matrices(amax, x, noise, *, encoder, how, axis, wants_codes, wants_values, rotation, is_unscaled):
    codec, kernel = PlaceCodec(how, np.dtype(x.dtype), is_unscaled), encoder.load()
    scalars, tables = codec.encoder_tables(amax, 1 if amax is None else len(amax))
    if noise is not None:
        noise = kernel.Noise(*noise)
    settings = {"codec": codec, "axis": axis, "wants_codes": wants_codes, "wants_values": wants_values}
    if rotation is not None:
        settings["rotation"] = rotation
    return tuple(kernel.encode(x, scalars, tables, noise, **settings))


def _decode_matrices(amax, codes, headers, *, encoder, how, axis, length, dtype):
    codec = PlaceCodec(how, dtype)
    tables = codec.decoder_table(amax, 1 if amax is None else len(amax))
    return (encoder.load().decode(codes, headers, tables, codec=codec, axis=axis, length=length, dtype=dtype),)
