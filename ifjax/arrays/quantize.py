"""`quantize`, which returns a QTensor, and `fake_quantize`, which rounds values and passes gradients."""

import functools
import math
from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from ifjax.arrays.blocking import DTYPES, Blocking
from ifjax.arrays.encoders import Rotated, by_kernel_or_xla, encode_by_kernel, encoder_for, refusal, work_of
from ifjax.arrays.qtensor import QTensor, decoded_by_xla
from ifjax.codec import BlockLoss, Encoding, Loss, Rounding, Search, decode, encode
from ifjax.codec.blocks import crop, merge_blocks, pad_axis, pick, split_blocks
from ifjax.codec.decode import narrowed
from ifjax.codec.headers import has_unsound, header_words
from ifjax.formats import Format
from ifjax.numerics.byte_order import as_array
from ifjax.numerics.devices import device_kind
from ifjax.numerics.hadamard import SIZES, hadamard, signs_of
from ifjax.numerics.packing import pack
from ifjax.numerics.proofs import by_both, difference, fault_of, numbers_to_check
from ifjax.numerics.xla import divide, opaque


def quantize(
    x: Float[ArrayLike, "..."],
    fmt: str | Format | Encoding = "if4",
    *,
    axis: int = -1,
    loss: Loss | None = None,
    rounding: str | Rounding = "nearest",
    key: Array | None = None,
    block_2d: bool = False,
    amax: Float[ArrayLike, "..."] | None = None,
    amax_axes: Sequence[int] = (),
    search: str | Search | None = None,
    weights: Float[ArrayLike, " k"] | None = None,
) -> QTensor:
    """Quantize x to a block-scaled format.

    Works inside jit, vmap, scan and remat, and on sharded arrays. No gradient flows through it; `fake_quantize` has
    one. A partial last block is padded with zeros, which `dequantize` drops. A NaN or infinity turns its own block into
    NaN and affects no other block, because amax is taken over finite values (formats with `saturates` saturate at an
    infinity instead). Multiplying x by a power of two changes neither codes nor selectors, unless block scales of a
    format without a tensor scale leave their normal range. Subnormal numbers count as zero where the platform flushes
    them (XLA:CPU, TPU). An empty array gives an empty QTensor.

    Args:
        x: float32, bfloat16 or float16 of any rank >= 1. float64 is rounded to float32 first.
        fmt: a format's name (`ifjax.FORMATS`) or record; or an `ifjax.codec.Encoding`, which also holds loss, rounding,
            search and block_2d.
        axis: the axis along which values are grouped into blocks and codes are packed.
        loss: the loss by which a block chooses among the format's candidates: "mse" (default), "mae", "abs_max", or a
            function that maps (x, decoded x), both [..., values of a block], to losses [...]. Its arguments are in
            units of a power of two near the tensor's maximum.
        rounding: "nearest" (default); "stochastic" rounds to one of the two adjacent values, with a probability given
            by the distances, and clips at the block's maximum; "stochastic_unbiased" leaves 1/17 of the range free, so
            that nothing is clipped. Formats with a single candidate are then unbiased. Choosing a candidate by its
            rounded values adds a bias: on normal data, means are 0.6% too large with if4, 0.5% with if3, 0.7% with
            fouroversix and 0.01% with if6 (measured).
        key: a jax.random key, for stochastic rounding. Every value draws its own noise. Inside `jax.vmap` and
            `jax.shard_map` a shared key gives every instance the same noise, as everywhere in jax.random: split it, or
            fold in the device, jax.random.fold_in(key, jax.lax.axis_index(axis)).
        block_2d: share scale and selector in square blocks over the last two axes, so that q.T is the quantized x.T.
        amax: the tensor's absolute maximum, if it is known or fixed; larger values saturate. With `amax_axes`, an array
            whose shape is the lengths of those axes.
        amax_axes: unblocked axes whose entries each keep their own amax: layers, experts, tokens. An axis that
            `jax.lax.scan` or `jax.vmap` runs over needs it: `amax_axes=(0,)` for a stack of layers.
        search: also try scales other than the one given by the block's maximum, and keep the one with the least loss:
            "fast" tries ten scales, "exhaustive" all; "soar" fits amax and the block scales to each other
            (`ifjax.codec.SEARCHES`). Encoding is slower; the format of the result is the same.
        weights: float >= 0 [k], k = x.shape[axis]: weight of each value's loss when a block chooses its candidate and
            its searched scale. For example, the mean squares of a product's inputs.

    Returns:
        A QTensor of x's shape and dtype.

    Raises:
        TypeError: x is not a float array, or an argument has the wrong type.
        ValueError: an argument is unknown or does not fit; the message says what to write instead.

    Source: IF formats arXiv 2603.28765, Four Over Six arXiv 2512.02010; bits as in their published code.

    Example:
        >>> import jax.numpy as jnp
        >>> import ifjax
        >>> q = ifjax.quantize(jnp.array([10.0, 20, 30, 40]), fmt="fouroversix")
        >>> q.dequantize()
        Array([10., 20., 30., 40.], dtype=float32)
        >>> ifjax.quantize(jnp.ones((64, 64), jnp.bfloat16), axis=0)
        QTensor(if4, 64x64 bfloat16, axis=-2, 4.508 bits a value)
    """
    how = Encoding.of(fmt, loss=loss, rounding=rounding, search=search, block_2d=block_2d)
    x, place = checked(x, how, axis, amax, amax_axes, key)
    weights = _checked_weights(weights, x.shape[axis], how)
    return _quantize(lax.stop_gradient(x), key, place.pop("amax"), weights, how=how, **place)


def fake_quantize(
    x: Float[ArrayLike, "..."],
    fmt: str | Format | Encoding = "if4",
    *,
    axis: int = -1,
    loss: Loss | None = None,
    rounding: str | Rounding = "nearest",
    key: Array | None = None,
    block_2d: bool = False,
    amax: Float[ArrayLike, "..."] | None = None,
    amax_axes: Sequence[int] = (),
    search: str | Search | None = None,
    weights: Float[ArrayLike, " k"] | None = None,
    gradient: Literal["straight_through", "clipped"] = "straight_through",
) -> Float[Array, "..."]:
    """Round x to values that the format can represent, in x's shape and dtype, with a gradient.

    Equal to quantize(x, ...).dequantize(), without the packing. The other arguments are those of `quantize`.

    Args:
        gradient: "straight_through" passes the gradient unchanged; "clipped" passes a zero gradient where x lies
            outside the range that its block can represent.

    Returns:
        The rounded values, in x's shape and dtype.

    Raises:
        TypeError: x is not a float array, or an argument has the wrong type.
        ValueError: `gradient` is unknown, or `quantize` would reject an argument.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import ifjax
        >>> x = jnp.array([0.3, 1.0, 5.2, 6.0])
        >>> ifjax.fake_quantize(x, "nvfp4")
        Array([0.5, 1. , 6. , 6. ], dtype=float32)
        >>> jax.grad(lambda x: (ifjax.fake_quantize(x, "nvfp4") * x).sum())(x)
        Array([ 0.8,  2. , 11.2, 12. ], dtype=float32)
    """
    if gradient not in ("straight_through", "clipped"):
        raise ValueError(f"gradient must be 'straight_through' or 'clipped', got {gradient!r}")
    how = Encoding.of(fmt, loss=loss, rounding=rounding, search=search, block_2d=block_2d)
    x, place = checked(x, how, axis, amax, amax_axes, key)
    weights = _checked_weights(weights, x.shape[axis], how)
    data = lax.stop_gradient(x), key, place.pop("amax"), weights
    y, passes = _fake_quantize(*data, how=how, clipped=gradient == "clipped", **place)
    return straight_through(x, y, passes)


class Multiples(NamedTuple):
    """What a product needs of a quantized operand, with what an encoder knows of it already.

    Attributes:
        values: the values without the tensor's factor; None if only `packed` has them.
        factor: the tensor's factor, float32; None if it has none.
        packed: the QTensor, if it is needed later; else None.
    """

    values: Any
    factor: jax.Array | None
    packed: Any = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the values."""
        return (self.packed if self.values is None else self.values).shape

    @property
    def ndim(self) -> int:
        """The number of axes."""
        return len(self.shape)


def operand_in_multiples(
    x: jax.Array, how: Encoding, *, axis: int, wants_codes: bool, wants_values: bool, key: jax.Array | None,
    amax: Any = None, size: int | None = None, signs: Any = None,
) -> Multiples | None:  # fmt: skip
    """Return Multiples of quantize(x, ...), transformed first by hadamard(size=, signs=) if size is given.

    None where the device has a kernel that does not give them. They are packed, or values, or both, as wanted.
    """
    encoder, rotation = encoder_for(device_kind()), _rotation(size, signs)
    if encoder is None:
        x, rotation = x if size is None else hadamard(x, axis=axis, size=size, signs=signs), None
    elif (size is not None and rotation is None) or refusal(
        encoder, x, how, axis, 0, is_weighed=False, is_clipped=False, rotation=rotation
    ):
        return None
    x, place = checked(x, how, axis, amax, key=key)
    wants = {"wants_codes": wants_codes, "wants_values": wants_values}
    return _multiples(x, key, place.pop("amax"), how=how, rotation=rotation, **wants, **place)


def _rotation(size, signs):
    """Return the transform that a kernel may do; None for another one, or for none."""
    if size not in SIZES:
        return None
    signs = signs_of(signs, size)
    return None if isinstance(signs, Tracer) else Rotated(size, tuple(int(sign) for sign in signs))


def quantize_rotated(
    x: jax.Array, how: Encoding, *, axis: int, size: int, signs: Any, key: jax.Array | None, amax: Any = None
) -> QTensor:  # fmt: skip
    """Return quantize(hadamard(x, axis=axis, size=size, signs=signs), how, ...); a kernel may do both in one pass."""
    encoder, rotation = encoder_for(device_kind()), _rotation(size, signs)
    if encoder is not None and rotation is not None:
        reason = refusal(encoder, x, how, axis, 0, is_weighed=False, is_clipped=False, rotation=rotation)
        if reason is None:
            x, place = checked(x, how, axis, amax, key=key)
            data = x, key, place.pop("amax"), None
            return _quantize(*data, how=how, rotation=rotation, **place)
    return quantize(hadamard(x, axis=axis, size=size, signs=signs), how, axis=axis, key=key, amax=amax)


def checked(x, how: Encoding, axis: int, amax=None, amax_axes: Sequence[int] = (), key=None):
    """Return x as an array, and {"axis", "amax_axes", "amax"} in normalized form.

    All arguments of `quantize` that an Encoding does not hold are checked here, except `weights`.
    """
    if isinstance(x, QTensor):
        raise TypeError("x is quantized already: dequantize it first")
    x = as_array(x)
    if x.dtype.name not in DTYPES:
        raise TypeError(f"x must be a float array ({', '.join(DTYPES)}), got {x.dtype}: write x.astype(jnp.float32)")
    if x.ndim < 1:
        raise ValueError("x must have at least one axis, got a scalar: write x[None]")
    if not isinstance(axis, int | np.integer) or isinstance(axis, bool):
        raise TypeError(f"axis must be one integer, along which blocks lie, got {axis!r}")
    if not -x.ndim <= axis < x.ndim:
        raise ValueError(f"axis must lie in [{-x.ndim}, {x.ndim}) for shape {x.shape}, got {axis}")
    axis = axis % x.ndim - x.ndim
    if how.rounding.rotates:
        raise ValueError(f"rounding={how.rounding.name!r} is for rotated operands of products (ifjax.recipes) only")
    if how.rounding.draws and key is None:
        raise ValueError(f"rounding={how.rounding.name!r} needs key=, for example key=jax.random.key(0)")
    if not how.rounding.draws and key is not None:
        raise ValueError("key= is used by stochastic rounding only: pass rounding='stochastic_unbiased', or no key")
    if how.block_2d and (x.ndim < 2 or axis < -2):
        raise ValueError(f"block_2d needs the block axis among the last two, got axis={axis} of shape {x.shape}")
    blocked = {x.ndim - 2, x.ndim - 1} if how.block_2d else {x.ndim + axis}
    if not isinstance(amax_axes, Iterable) or not all(isinstance(a, int | np.integer) for a in amax_axes):
        raise TypeError(f"amax_axes must be a tuple of integers, such as (0,) for a stack of layers, got {amax_axes!r}")
    if not all(-x.ndim <= a < x.ndim for a in amax_axes):
        raise ValueError(f"amax_axes must be axes of shape {x.shape}, got {tuple(amax_axes)}")
    axes = tuple(sorted(a % x.ndim for a in amax_axes))
    if len(set(axes)) < len(axes) or blocked & set(axes):
        raise ValueError(
            f"amax_axes must be different axes of shape {x.shape} that no blocks lie along (axis {axis}"
            f"{', 2-D' if how.block_2d else ''}), got {tuple(amax_axes)}"
        )
    if axes and not how.fmt.has_tensor_scale:
        raise ValueError(f"{how.fmt.name} has no tensor scale, so amax_axes does not apply: leave it out")
    _check_parts(x, how.fmt, blocked)
    if amax is not None:
        if how.search is not None and how.search.rounds:
            raise ValueError(
                f"search={how.search.name!r} fits amax to the values at hand: leave amax= out, or use another search, "
                "such as 'least_squares' or 'fast'"
            )
        given, amax = amax, _checked_amax(amax, x.shape, axes, how.fmt)
        if not isinstance(given, Tracer) and _loses(given, amax, x):
            raise ValueError(
                f"amax={given} is 0 where x is not, and would turn it into zeros: whatever it was taken from had no "
                "values. Leave amax= out, or give an amax of values like these"
            )
    return x, {"axis": axis, "amax_axes": axes, "amax": amax}


def _loses(given, amax, x) -> bool:
    """Return whether an amax of 0 would turn nonzero values into zeros; for a traced x, whether every amax is 0."""
    if isinstance(x, Tracer) or isinstance(amax, Tracer):
        return x.size > 0 and not np.any(given)
    if bool(jnp.all(amax)):
        return False
    zero = amax.reshape(amax.shape + (1,) * (x.ndim - amax.ndim)) == 0
    return bool(jnp.any(zero & jnp.isfinite(x) & (x != 0)))


def _check_parts(x, fmt: Format, blocked: set[int]) -> None:
    """Raise ValueError if an explicit mesh axis (one that is part of x's type) would split a block across devices."""
    sharding = jax.typeof(x).sharding
    for axis in blocked & set(range(len(sharding.spec))):
        names = sharding.spec[axis]
        names = () if names is None else names if isinstance(names, tuple) else (names,)
        parts = math.prod(sharding.mesh.shape[name] for name in names)
        if parts > 1 and x.shape[axis] % (parts * fmt.block):
            raise ValueError(
                f"axis {axis - x.ndim} of {x.shape} is sharded over {names} in {parts} parts, which tear blocks of "
                f"{fmt.block} in {fmt.name}: write jax.reshard(x, ...) first, with this axis whole or over "
                "fewer devices"
            )


def _checked_amax(amax, shape, axes, fmt):
    """Return amax as float32, in the shape in which a QTensor stores it."""
    if not fmt.has_tensor_scale:
        raise ValueError(f"{fmt.name} has no tensor scale, so amax does not apply: leave it out")
    amax = as_array(amax)
    if jnp.issubdtype(amax.dtype, jnp.integer):
        amax = amax.astype(jnp.float32)
    full = tuple(shape[a] if a in axes else 1 for a in range(max(axes, default=-1) + 1))
    kept = tuple(shape[a] for a in axes)
    if not jnp.issubdtype(amax.dtype, jnp.floating) or amax.shape not in (kept, full):
        raise ValueError(
            f"amax must be float of shape {kept} (the axes that amax_axes keeps), got {amax.dtype} {amax.shape}"
        )
    amax = lax.stop_gradient(amax.astype(jnp.float32)).reshape(full)
    if has_unsound(amax):
        raise ValueError(f"amax must be finite and not negative, got {amax}")
    return amax


def _checked_weights(weights, k, how):
    """Return weights as float32 [k], or None; raise ValueError if they do not fit."""
    if weights is None:
        return None
    if how.block_2d or not isinstance(how.loss, BlockLoss):
        raise ValueError("weights go with 1-D blocks and a named loss: leave out block_2d or your loss function")
    weights = as_array(weights)
    if not jnp.issubdtype(weights.dtype, jnp.floating) or weights.shape != (k,):
        raise ValueError(
            f"weights must be float of shape ({k},), one for each place along the axis of blocks, got {weights.dtype} "
            f"{weights.shape}"
        )
    if has_unsound(weights):
        raise ValueError("weights must be finite and not negative")
    return lax.stop_gradient(weights.astype(jnp.float32))


@jax.custom_jvp
def straight_through(x, y, passes):
    """Return y, with the gradient of x; where `passes` is false the gradient is 0."""
    del x, passes
    return y


@straight_through.defjvp
def _straight_through_jvp(primals, tangents):
    (_, y, passes), tangent = primals, tangents[0]
    return y, tangent if passes is None else jnp.where(passes, tangent, jnp.zeros_like(tangent))


# --- below the surface -----------------------------------------------------------------------------------------------


def _encoded(x, key, amax, weights, *, how, axis, amax_axes, in_multiples=False):
    """Return codes uint8 [..., m, B, ...], scales uint8 [..., m * W, ...] and amax, with padding rows of 2-D blocks.

    `in_multiples`: see `ifjax.codec.encode`.
    """
    fmt = how.fmt

    def blocks_of(a):
        if how.block_2d:
            square = -3 - axis
            a = pad_axis(a, -(-a.shape[square] // fmt.block) * fmt.block, square)
        return split_blocks(a, fmt.block, axis)

    noise = None
    if how.rounding.noise is not None:
        noise = [blocks_of(r) for r in how.rounding.noise(key, x.shape, len(fmt.candidates))]
    if weights is not None:
        weights = split_blocks(weights, fmt.block, -1)
    place = {"axis": axis, "amax": amax, "amax_axes": amax_axes}
    return encode(blocks_of(x), how, noise=noise, weights=weights, in_multiples=in_multiples, **place)


_STATIC = ("how", "axis", "amax_axes")


def _encoder_of(x, how, axis, amax_axes, does, *, rotation=None, is_weighed=False, is_clipped=False):
    """Return the kernels of this device that do it ("quantize", "fake_quantize", "multiply") for x, or None."""
    encoder, amax_ndim = encoder_for(device_kind()), max(amax_axes, default=-1) + 1
    is_refused = (
        encoder is None
        or refusal(encoder, x, how, axis, amax_ndim, is_weighed=is_weighed, is_clipped=is_clipped, rotation=rotation)
        or _fault(encoder, how, x.dtype, max(axis, -2), does, rotation)
    )
    return None if is_refused else encoder


def _by_plan(by_xla, data, *, does, is_clipped=False, rotation=None, **place):
    """Return by_xla(*data), computed by a kernel on devices that have one for this input.

    The result is (codes, scales, amax), or (values, mask of where gradients pass).
    """
    settings = {"rotation": rotation, "is_weighed": data[3] is not None, "is_clipped": is_clipped}
    encoder = _encoder_of(data[0], **place, does=does, **settings)
    if encoder is None:
        return opaque(by_xla, *data)
    wants_codes = does == "quantize"

    def by_kernel(x, key, amax, weights):
        del weights
        arrays, amax, _ = encode_by_kernel(
            x, key, amax, encoder=encoder, wants_codes=wants_codes, wants_values=not wants_codes, rotation=rotation,
            **place,
        )  # fmt: skip
        return (*arrays, amax if wants_codes else None)

    return opaque(functools.partial(by_kernel_or_xla, encoder, by_kernel, by_xla), *data)


def _fault(encoder, how, dtype, axis, does, rotation):
    """Check the kernel on this machine's device; return what is wrong with it, or None."""

    def prove():
        def run():
            x, key = jnp.asarray(numbers_to_check((128, 512))).astype(dtype), jax.random.key(0)
            data, place = (x, key if how.rounding.draws else None), {"how": how, "axis": axis, "amax_axes": ()}
            if does == "quantize":
                return _quantize(*data, None, None, rotation=rotation, **place)
            if does == "multiply":
                wants = {"wants_codes": True, "wants_values": True}
                return _multiples(*data, None, rotation=rotation, **wants, **place)
            return _fake_quantize(*data, None, None, clipped=False, **place)

        return difference(*by_both(run))

    return fault_of(work_of(encoder, does, how, dtype, axis, rotation), encoder, prove)


@jax.jit(static_argnames=(*_STATIC, "rotation"))
def _quantize(x, key, amax, weights, *, how, axis, amax_axes, rotation=None):
    place = {"how": how, "axis": axis, "amax_axes": amax_axes}

    def packed(x, *rest):
        return _packed(x if rotation is None else rotation.of(x, axis), *rest, **place)

    codes, scales, amax = _by_plan(packed, (x, key, amax, weights), does="quantize", rotation=rotation, **place)
    blocking = Blocking(how.fmt, axis, x.shape[axis], x.dtype, how.headroom, how.block_2d)
    return QTensor(codes, scales, amax, blocking)


@jax.jit(static_argnames=(*_STATIC, "rotation", "wants_codes", "wants_values"))
def _multiples(x, key, amax, *, how, axis, amax_axes, rotation, wants_codes, wants_values):
    place = {"how": how, "axis": axis, "amax_axes": amax_axes}
    blocking = Blocking(how.fmt, axis, x.shape[axis], x.dtype, how.headroom, how.block_2d)

    data, encoder = (x, key, amax), _encoder_of(x, **place, does="multiply", rotation=rotation)

    def by_xla(x, key, amax):
        shape, dtype, q = x.shape, np.float32 if encoder is None else x.dtype, None
        data = x if rotation is None else rotation.of(x, axis), key, amax, None
        if wants_codes:
            q = QTensor(*_packed(*data, **place), blocking)
            values, amax = decoded_by_xla(q.replaced(amax=None), dtype) if wants_values else None, q.amax
        else:
            values, _, amax = _encoded(*data, **place, in_multiples=True)
            values = narrowed(_cropped(merge_blocks(values, axis), shape), dtype)
        factor = None if amax is None else divide(amax, how.fmt.tensor_constant(how.headroom))
        return Multiples(values, factor, q)

    def by_kernel(x, key, amax):
        assert encoder is not None
        arrays, amax, factor = encode_by_kernel(
            x, key, amax, encoder=encoder, wants_codes=wants_codes, wants_values=wants_values, rotation=rotation,
            in_multiples=True, **place,
        )  # fmt: skip
        packed: Any = (*arrays[:2], amax, blocking)
        return Multiples(
            arrays[-1] if wants_values else None, factor, QTensor(*packed) if wants_codes else None
        )  # fmt: skip

    run = by_xla if encoder is None else functools.partial(by_kernel_or_xla, encoder, by_kernel, by_xla)
    return opaque(run, *data)


def _packed(x, key, amax, weights, *, how, axis, amax_axes):
    """Return packed codes, scale bytes and amax, as a QTensor stores them."""
    codes, scales, amax = _encoded(x, key, amax, weights, how=how, axis=axis, amax_axes=amax_axes)
    codes = merge_blocks(codes, axis)
    if how.block_2d:
        other = -3 - axis
        codes, scales = (crop(a, x.shape[other], other) for a in (codes, scales))
    return pack(codes, how.fmt.bits, axis), scales, amax


def _cropped(a, shape):
    for axis in range(-a.ndim, 0):
        a = crop(a, shape[axis], axis)
    return a


@jax.jit(static_argnames=(*_STATIC, "clipped"))
def _fake_quantize(x, key, amax, weights, *, how, axis, amax_axes, clipped):
    place = {"how": how, "axis": axis, "amax_axes": amax_axes}
    rounded = functools.partial(_rounded, clipped=clipped, **place)
    return _by_plan(rounded, (x, key, amax, weights), does="fake_quantize", is_clipped=clipped, **place)


def _rounded(x, key, amax, weights, *, how, axis, amax_axes, clipped):
    """Return x rounded, and a mask of where the gradient passes (None if it is not clipped)."""
    fmt = how.fmt
    codes, scales, amax = _encoded(x, key, amax, weights, how=how, axis=axis, amax_axes=amax_axes)
    headers = jnp.expand_dims(header_words(scales, fmt.scale.nbytes, axis), axis)
    at, wide = x.ndim + axis, amax
    place = np.arange(fmt.block, dtype=np.int32).reshape(*[1] * (at + 1), -1, *[1] * (-axis - 1))
    if amax is not None and amax.ndim > at:
        wide = jnp.expand_dims(amax, at + 1)

    def values_of(codes):
        values = decode(codes, headers, fmt, place=place, amax=wide, headroom=how.headroom)
        return _cropped(merge_blocks(jnp.broadcast_to(values, shape), axis), x.shape)

    shape = codes.shape
    rounded = narrowed(values_of(codes), x.dtype)
    if not clipped:
        return rounded, None
    selector, _ = fmt.split(headers)

    def end(i):
        codes = [jnp.int32(decoding.grid.ends[i]) for decoding in fmt.decodings]
        return values_of(jnp.broadcast_to(pick(selector, codes), headers.shape))

    low, high = end(0), end(1)
    # A block whose scale is zero does not clip: its gradient passes everywhere.
    passes = ((x.astype(jnp.float32) >= low) & (x.astype(jnp.float32) <= high)) | (low == high)
    return rounded, passes
