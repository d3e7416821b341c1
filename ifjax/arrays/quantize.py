"""quantize and fake_quantize."""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import Tracer
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from ifjax import codec
from ifjax.arrays.qtensor import DTYPES, QTensor, _crop
from ifjax.formats import Format, get_format
from ifjax.numerics.packing import pack
from ifjax.numerics.xla import opaque

Rounding = Literal["nearest", "stochastic", "stochastic_unbiased"]


Search = Literal["fast", "exhaustive"]


# Room for a scale that was rounded down by E4M3's 1/16, so that no value saturates and stochastic rounding has no bias.
_UNBIASED_HEADROOM = 16 / 17


def quantize(
    x: Float[ArrayLike, "..."],
    fmt: str | Format = "if4",
    *,
    axis: int = -1,
    loss: codec.Loss | None = None,
    rounding: Rounding = "nearest",
    key: Array | None = None,
    block_2d: bool = False,
    amax: Float[ArrayLike, "..."] | None = None,
    amax_axes: tuple[int, ...] = (),
    search: Search | None = None,
) -> QTensor:
    """Quantize to a block-scaled format.

    Works inside jit, vmap, scan, remat and on sharded arrays. No gradient flows through it (`fake_quantize` has one).
    A last block that is not full is filled up with zeros, which `dequantize` drops. A NaN or infinity makes NaN of its
    own block and changes no other: amax is taken over finite values. Subnormal numbers count as zero where the platform
    flushes them (XLA:CPU, TPU). An empty array gives an empty QTensor.

    Args:
        x: float32, bfloat16 or float16 of any rank >= 1. float64 is rounded to float32 first.
        fmt: a format's name (`ifjax.FORMATS`) or record.
        axis: the axis that blocks lie along, and that codes are packed along.
        loss: what chooses between a block's candidates: "mse" (default), "mae", "abs_max", or a function of (x,
            decoded x), both [..., values of a block], to losses [...].
        rounding: "nearest"; "stochastic": to one of the two adjacent values, with probability by distance, clipped at
            a block's maximum; "stochastic_unbiased": leaves 1/17 of the range free, so that nothing is clipped.
            Formats with a single candidate are then unbiased. Choosing by the rounded values adds a bias: of normal
            numbers, if4 gives means 0.6% too large, if3 0.5%, fouroversix 0.7%, if6 0.01% (measured).
        key: of jax.random, for stochastic rounding. Every value draws its own noise.
        block_2d: share scale and choice in squares of the last two axes, so that q.T is the quantized x.T.
        amax: the tensor's absolute maximum, if it is known or fixed; larger values saturate.
        amax_axes: leading axes (0, 1, ...) whose entries keep an amax of their own: layers, experts, tokens.
        search: try scales around the one that the block's maximum asks for, and keep the least loss: "fast" ten of
            them, "exhaustive" all. Slower to encode; the result is of the same format.

    Returns:
        A QTensor of x's shape and dtype.

    Raises:
        TypeError: x is not a float array.
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
    x, settings = _checked(x, fmt, axis, loss, rounding, key, block_2d, amax, amax_axes, search)
    return _quantize(lax.stop_gradient(x), key, settings.pop("amax"), **settings)


def fake_quantize(
    x: Float[ArrayLike, "..."],
    fmt: str | Format = "if4",
    *,
    axis: int = -1,
    loss: codec.Loss | None = None,
    rounding: Rounding = "nearest",
    key: Array | None = None,
    block_2d: bool = False,
    amax: Float[ArrayLike, "..."] | None = None,
    amax_axes: tuple[int, ...] = (),
    search: Search | None = None,
    gradient: Literal["straight_through", "clipped"] = "straight_through",
) -> Float[Array, "..."]:
    """x rounded to what `quantize` can represent, in x's shape and dtype, with a gradient.

    Equal to quantize(x, ...).dequantize(), without the packing. Arguments as for `quantize`.

    Args:
        gradient: "straight_through" passes the gradient unchanged; "clipped" passes none where |x| is larger than
            the largest value of x's block.

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
    x, settings = _checked(x, fmt, axis, loss, rounding, key, block_2d, amax, amax_axes, search)
    settings["clipped"] = gradient == "clipped"
    y, passes = _fake_quantize(lax.stop_gradient(x), key, settings.pop("amax"), **settings)
    return straight_through(x, y, passes)


def _quantize_arrays(x, key, amax, *, fmt, axis, lead, loss, rounding, block_2d, search):
    """codes uint8 [..., m, B, ...], scale bytes uint8 [..., m, ...] and amax, rows of filled-up squares included."""
    headroom = _headroom(rounding)
    square = -3 - axis if block_2d else None

    def blocks_of(a):
        if square is not None:
            a = codec.pad_axis(a, -(-a.shape[square] // fmt.block) * fmt.block, square)
        return codec.split_blocks(a, fmt.block, axis)

    noise = None
    if rounding != "nearest":
        noise = [blocks_of(r) for r in _noise(key, x.shape, len(fmt.candidates))]
    return codec.encode(
        blocks_of(x), fmt, axis=axis, lead=lead, amax=amax, loss=loss, headroom=headroom, square=square,
        noise=noise, search=search,
    )  # fmt: skip


def _noise(key, shape, count):
    """`count` independent float32 arrays, uniform on 2^16 points of (-1/2, 1/2) around 0: two from each random word."""
    words = [jax.random.bits(k, shape, jnp.uint32) for k in jax.random.split(key, -(-count // 2))]
    halves = [half for word in words for half in (word & 0xFFFF, word >> 16)]
    return [(half.astype(jnp.float32) + 0.5) * 2.0**-16 - 0.5 for half in halves[:count]]


_static = ("fmt", "axis", "lead", "loss", "rounding", "block_2d", "search")


@jax.jit(static_argnames=_static)
def _quantize(x, key, amax, **settings):
    fmt, axis, block_2d = settings["fmt"], settings["axis"], settings["block_2d"]
    codes, scales, amax = opaque(functools.partial(_quantize_arrays, **settings), x, key, amax)
    codes = codec.merge_blocks(codes, axis)
    if block_2d:
        other = -3 - axis
        codes, scales = (_crop(a, x.shape[other], other) for a in (codes, scales))
    return QTensor(
        codes=pack(codes, fmt.bits, axis),
        scales=lax.bitcast_convert_type(scales, fmt.scale.dtype),
        amax=amax,
        fmt=fmt,
        headroom=_headroom(settings["rounding"]),
        axis=axis,
        length=x.shape[axis],
        dtype=x.dtype,
        block_2d=block_2d,
    )


@jax.jit(static_argnames=(*_static, "clipped"))
def _fake_quantize(x, key, amax, *, clipped, **settings):
    fmt, axis, headroom = settings["fmt"], settings["axis"], _headroom(settings["rounding"])
    codes, scales, amax = opaque(functools.partial(_quantize_arrays, **settings), x, key, amax)
    scales = jnp.expand_dims(scales, axis)

    def values_of(codes):
        values = codec.decode(codes, scales, fmt, amax=amax, headroom=headroom)
        values = codec.merge_blocks(jnp.broadcast_to(values, shape), axis)
        for at in range(-x.ndim, 0):
            values = _crop(values, x.shape[at], at)
        return values

    shape, passes = codes.shape, None
    if clipped:
        # The code of the largest magnitude is the same on all grids of a format. A block of scale zero is not clipped.
        limit = values_of(jnp.full_like(scales, len(fmt.grid.magnitudes) - 1))
        passes = (jnp.abs(x).astype(jnp.float32) <= limit) | (limit == 0)
    return values_of(codes).astype(x.dtype), passes


@jax.custom_jvp
def straight_through(x, y, passes):
    """y, with the gradient of x where it passes."""
    del x, passes
    return y


@straight_through.defjvp
def straight_through_jvp(primals, tangents):
    (_, y, passes), tangent = primals, tangents[0]
    return y, tangent if passes is None else jnp.where(passes, tangent, jnp.zeros_like(tangent))


def _headroom(rounding):
    return _UNBIASED_HEADROOM if rounding == "stochastic_unbiased" else 1.0


def _checked(x, fmt, axis, loss, rounding, key, block_2d, amax, amax_axes, search):
    """x as an array, and the settings of `_quantize`; every public check of an argument is made here."""
    if isinstance(x, QTensor):
        raise TypeError("x is quantized already: dequantize it first")
    x = jnp.asarray(x)
    if x.dtype.name not in DTYPES:
        raise TypeError(f"x must be a float array ({', '.join(DTYPES)}), got {x.dtype}: write x.astype(jnp.float32)")
    if x.ndim < 1:
        raise ValueError("x must have at least one axis, got a scalar: write x[None]")
    fmt = get_format(fmt)
    if not -x.ndim <= axis < x.ndim:
        raise ValueError(f"axis must lie in [{-x.ndim}, {x.ndim}) for shape {x.shape}, got {axis}")
    axis = axis % x.ndim - x.ndim
    loss = "mse" if loss is None else loss
    if not callable(loss) and loss not in codec.LOSSES:
        raise ValueError(f"loss must be one of {sorted(codec.LOSSES)} or a function, got {loss!r}")
    if rounding not in ("nearest", "stochastic", "stochastic_unbiased"):
        raise ValueError(f"rounding must be 'nearest', 'stochastic' or 'stochastic_unbiased', got {rounding!r}")
    if rounding != "nearest" and key is None:
        raise ValueError(f"rounding={rounding!r} needs key=, for example key=jax.random.key(0)")
    if rounding == "nearest" and key is not None:
        raise ValueError("key= is used by stochastic rounding only: pass rounding='stochastic_unbiased', or no key")
    if search not in (None, "fast", "exhaustive"):
        raise ValueError(f"search must be None, 'fast' or 'exhaustive', got {search!r}")
    if search is not None and rounding != "nearest":
        raise ValueError("search keeps the scale with the least error, which biases stochastic rounding: use only one")
    if block_2d and (x.ndim < 2 or axis < -2):
        raise ValueError(f"block_2d needs the block axis among the last two, got axis={axis} of shape {x.shape}")
    blocked = x.ndim - 2 if block_2d else x.ndim + axis
    axes = tuple(a % x.ndim if -x.ndim <= a < x.ndim else a for a in amax_axes)
    if axes != tuple(range(len(axes))) or len(axes) > blocked:
        raise ValueError(
            f"amax_axes must be leading axes (0, 1, ...) before the blocked axis {blocked} of shape {x.shape}, "
            f"got {tuple(amax_axes)}: move the axes that keep their own amax to the front"
        )
    if axes and fmt.scale.largest is None:
        raise ValueError(f"{fmt.name} has no tensor scale, so amax_axes does not apply: leave it out")
    if amax is not None:
        amax = _checked_amax(amax, x.shape[: len(axes)], fmt)
    settings = {"fmt": fmt, "axis": axis, "lead": len(axes), "loss": loss, "rounding": rounding}
    return x, settings | {"block_2d": block_2d, "search": search, "amax": amax}


def _checked_amax(amax, shape, fmt):
    if fmt.scale.largest is None:
        raise ValueError(f"{fmt.name} has no tensor scale, so amax does not apply: leave it out")
    amax = jnp.asarray(amax)
    if not jnp.issubdtype(amax.dtype, jnp.floating) or amax.shape != shape:
        raise ValueError(
            f"amax must be float of shape {shape} (the axes that amax_axes keeps), got {amax.dtype} {amax.shape}"
        )
    amax = lax.stop_gradient(amax.astype(jnp.float32))
    if not isinstance(amax, Tracer) and not bool(jnp.all((amax >= 0) & (amax < jnp.inf))):
        raise ValueError(f"amax must be finite and not negative, got {amax}")
    return amax
