"""Kernels that encode and decode blocks: which device has one, as records, and what it takes.

    x -> amax, by XLA -> tables of the tensor, by XLA -> codes and headers, or values, in one pass by a kernel

A kernel has the bits of the codec (see `ifjax.codec.places`). What none takes goes through XLA.
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
from ifjax.codec.rounding import NEAREST, seeds, strides
from ifjax.formats import Format
from ifjax.lookup import Registry
from ifjax.numerics.devices import device_kind, may_be_partitioned
from ifjax.numerics.kernels import kernels_for, why_none
from ifjax.numerics.proofs import known_fault


class Explanation(NamedTuple):
    """The way that a computation goes.

    Attributes:
        path: of a product, "xla": weights are decoded, then multiplied; "xla_few_rows": decoded block by block while
            they are multiplied; "xla_float32": decoded and multiplied in float32; of `quantize`, "xla": the codec
            compiled by XLA; of both, the name of a backend.
        reason: why this one, or why no faster one.
    """

    path: str
    reason: str


@dataclasses.dataclass(frozen=True)
class Encoder:
    """Kernels that encode and decode, and the devices that they are for.

    Attributes:
        name: of the kernels.
        platform: JAX's name of the platform that they compile for: "cuda", "tpu", "cpu".
        devices: a regular expression, found in the device kinds that they are for, as JAX spells them and as people do.
        load: gives the module, with `supports`, `encode` and `decode` as in `pallas_kernels.tpu_blocks`.
        measured: where times on hardware are stated, if anywhere.
    """

    name: str
    platform: str
    devices: str
    load: Callable[[], Any]
    measured: str | None = None


def _tpu_blocks():
    from pallas_kernels import tpu_blocks

    return tpu_blocks


def _gpu_blocks():
    from pallas_kernels import gpu_blocks

    return gpu_blocks


ENCODERS: Registry[Encoder] = Registry(
    "encoder", Encoder, "ifjax.arrays.ENCODERS",
    (
        Encoder("tpu_blocks", "tpu", r"\bv[56] ?(lite|e)\b", _tpu_blocks),
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
    """Tell which way `quantize` and `fake_quantize` go for x, and why. Nothing is computed; a shape suffices.

    Args:
        x: an array or `jax.ShapeDtypeStruct`; the other arguments are those of `quantize` and `fake_quantize`.
        target: the device kind, such as "TPU v6e"; the first device's unless given.

    Raises:
        ValueError: settings that are unknown or do not go together.

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
    """The kernels for a device kind, unless the setting leaves all to XLA."""
    return kernels_for(ENCODERS.values(), device)


def work_of(encoder: Encoder, does: str, how: Encoding, dtype: Any, axis: int) -> str:
    """What a kernel is compiled for, in words, as its proofs are kept."""
    way = [f"axis {max(axis, -2)}", how.rounding.name, getattr(how.loss, "name", "")] + ["squares"] * how.block_2d
    return f"{encoder.name}: {does} {np.dtype(dtype).name} {described(how.fmt)}, {', '.join(way)}"


def described(fmt: Format) -> str:
    """A format's name, and a number of what its record says."""
    return f"{fmt.name} ({zlib.crc32(json.dumps(fmt.to_dict(), sort_keys=True).encode()):08x})"


def refusal(
    encoder: Encoder, x: Any, how: Encoding, axis: int, amax_ndim: int, *, is_weighed: bool, is_clipped: bool
) -> str | None:
    """Why the encoder cannot take x, whose amax has so many axes; None if it can.

    `is_weighed`: errors have weights. `is_clipped`: it is asked where a gradient passes.
    """
    if is_weighed:
        return "it weighs no errors"
    if is_clipped:
        return "it does not tell which gradients are clipped"
    amax_ndim = _lead(x, how, amax_ndim)
    reason = encoder_refusal(how) or _refusal_of_shape(x.shape, axis, amax_ndim)
    return reason or _refusal_of_kernel(encoder, x.shape, x.dtype, how, axis, amax_ndim)


def refusal_to_decode(encoder: Encoder, q: Any, dtype: Any) -> str | None:
    """Why the decoder cannot take a QTensor; None if it can."""
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


def _refusal_of_kernel(encoder, shape, dtype, how, axis, amax_ndim):
    if dtype not in (np.float32, jnp.bfloat16):
        return f"values must be float32 or bfloat16, got {dtype}"
    matrices = jax.ShapeDtypeStruct(_as_matrices(shape, axis, amax_ndim), dtype)
    return encoder.load().supports(PlaceCodec(how, np.dtype(dtype)), matrices, -1 if axis == -1 else -2)


def _lead(x, how, amax_ndim):
    """How many of x's first axes number its matrices: squares must not reach from one into the next."""
    return max(amax_ndim, x.ndim - 2) if how.block_2d else amax_ndim


def _as_matrices(shape, axis, amax_ndim) -> tuple[int, int, int]:
    """[L, R, C]: as few matrices as share an amax, blocked along their columns or rows."""
    if axis == -1:
        return math.prod(shape[:amax_ndim]), math.prod(shape[amax_ndim:-1]), shape[-1]
    at = len(shape) + axis
    return math.prod(shape[:at]), shape[at], math.prod(shape[at + 1 :])


def encode_by_kernel(
    x: jax.Array, key: jax.Array | None, amax: jax.Array | None, *, encoder: Encoder, how: Encoding, axis: int,
    amax_axes: tuple[int, ...], wants_codes: bool, wants_values: bool,
) -> tuple[list[jax.Array], jax.Array | None]:  # fmt: skip
    """([packed codes, scale bytes, values], those that are wanted, in the shapes of a QTensor and of x; amax)."""
    fmt = how.fmt
    if fmt.has_tensor_scale and amax is None:
        amax = _amax(x, amax_axes, fmt)
    shape = _as_matrices(x.shape, axis, _lead(x, how, 0 if amax is None else amax.ndim))
    numbers = amax if fmt.has_tensor_scale else None
    noise = None
    if how.rounding.noise is not None and key is not None:
        count, size = shape[0], np.uint32(math.prod(shape[1:]) % 2**32).view(np.int32)
        base = jnp.arange(count, dtype=jnp.int32) * size
        noise = base, jnp.broadcast_to(jnp.stack(seeds(key)), (count, 2))
    run = functools.partial(
        _encode_matrices, encoder=encoder, how=how, axis=-1 if axis == -1 else -2, wants_codes=wants_codes,
        wants_values=wants_values,
    )  # fmt: skip
    arrays = _by_matrix(run, _of_matrices(numbers, x.shape, shape[0]), x.reshape(shape), noise)
    return [_unfolded(array, x.shape, axis) for array in arrays], amax


def decode_by_kernel(q: Any, *, encoder: Encoder, dtype: np.dtype) -> jax.Array:
    """The values of a QTensor; without an amax those without the tensor's factor."""
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
    """As the codec takes it, from x as it lies: the largest finite magnitude."""
    x = x.astype(jnp.float32)
    kept = ~jnp.isnan(x) if fmt.saturates else jnp.isfinite(x)
    return amax_of(jnp.where(kept, jnp.abs(x), 0), amax_axes)


def _of_matrices(amax, shape, count):
    """[count], or [1] if all have one; None if they have none."""
    if amax is None or amax.size == 1:
        return None if amax is None else amax.reshape(1)
    amax = jnp.broadcast_to(amax, shape[: amax.ndim]).reshape(-1, 1)
    return jnp.broadcast_to(amax, (len(amax), count // len(amax))).reshape(-1)


def _unfolded(array, shape, axis):
    """[L, R, C] -> [...], of which the blocked axis alone has another length than `shape`."""
    at = len(shape) + axis
    return array.reshape(*shape[:at], array.shape[-1 if axis == -1 else -2], *shape[at + 1 :])


def _by_matrix(run, amax, *arrays):
    """run(amax, *arrays), tuples of arrays [L, ...]; of vmap it makes more matrices.

    `arrays` are trees of arrays [L, ...], the first one an array; amax is [L], or [1], or None.
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


def _encode_matrices(amax, x, noise, *, encoder, how, axis, wants_codes, wants_values):
    codec, kernel = PlaceCodec(how, np.dtype(x.dtype)), encoder.load()
    scalars, tables = codec.encoder_tables(amax, 1 if amax is None else len(amax))
    if noise is not None:
        noise = kernel.Noise(noise[0], jnp.asarray(strides(x.shape)[1:], jnp.int32), noise[1])
    settings = {"codec": codec, "axis": axis, "wants_codes": wants_codes, "wants_values": wants_values}
    return tuple(kernel.encode(x, scalars, tables, noise, **settings))


def _decode_matrices(amax, codes, headers, *, encoder, how, axis, length, dtype):
    codec = PlaceCodec(how, dtype)
    tables = codec.decoder_table(amax, 1 if amax is None else len(amax))
    return (encoder.load().decode(codes, headers, tables, codec=codec, axis=axis, length=length, dtype=dtype),)
