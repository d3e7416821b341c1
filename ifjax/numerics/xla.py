"""Exactly rounded division, a fusion barrier for XLA:CPU, and a wrapper that hides a function from transformations.

XLA rewrites floating-point programs. `x / c` with a scalar c becomes `x * (1 / c)`, which differs in the last bit for
almost half of all x; `1 / (c / a)` becomes `a * (1 / c)`; XLA:GPU's float32 division is off by up to one unit in the
last place (openxla/xla#37181). A quantizer must agree bit for bit with other implementations, and with itself between
jit, vmap and eager mode. So every division in the library goes through `divide`.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.custom_batching import custom_vmap
from jax.experimental.xla_metadata import set_xla_metadata
from jax.extend.core import jaxpr_as_fun
from jax.interpreters import ad, batching, mlir
from jax.typing import ArrayLike


def divide(a: ArrayLike, b: ArrayLike, *, varies: bool = False) -> jax.Array:
    """Return float32 a / b, correctly rounded on every platform, jitted or not, batched or not.

    Subnormal quotients are exempt, because XLA:CPU and TPUs flush them to zero. `varies` states that b is an array of
    a's shape from `depending_on`, so that no further protection from XLA's rewrites is needed.
    """
    return _divide(a, b, varies=varies, by_array=not _is_number(b) and _is_number(a))


@jax.jit(static_argnames=("varies", "by_array"))  # the hundreds of divisions in a codec are traced once for each shape
def _divide(a, b, *, varies, by_array):
    a, b = jnp.broadcast_arrays(jnp.float32(a), jnp.float32(b))
    if varies:
        return by_platform(a, b, cpu=lax.div, default=lambda a, b: correct_quotient(a, b, a / b))
    return by_platform(a, b, cpu=functools.partial(_quotient, by_array=by_array), default=_corrected_quotient)


def _quotient(a: jax.Array, b: jax.Array, by_array: bool) -> jax.Array:
    # The divisor becomes NaN where a is (where b is, if a is one number), which changes no quotient. The barrier hides
    # from XLA:CPU that the array may be a broadcast, and so the divisor. XLA:CPU drops it before fusion.
    if by_array:
        b = lax.optimization_barrier(b)
        return a / where(b == b, b, jnp.float32(jnp.nan))
    a = lax.optimization_barrier(a)
    return a / where(a == a, b, jnp.float32(jnp.nan))


def _corrected_quotient(a: jax.Array, b: jax.Array) -> jax.Array:
    # There is no barrier, because it would split XLA:GPU's kernels. So a must not be a broadcast of computed values.
    return correct_quotient(a, b, a / depending_on(a, b))


def depending_on(a: jax.Array, b: ArrayLike) -> jax.Array:
    """Return b in the shape of a, and NaN where a or b is NaN.

    XLA rewrites divisions by a scalar, by a broadcast and by another division. The result is none of these, because it
    depends on every element of a. It costs nothing after fusion.
    """
    known = a == a if _is_number(b) else (a == a) & (b == b)
    return where(known, b, jnp.float32(jnp.nan))


def _is_number(a: ArrayLike) -> bool:
    return isinstance(a, int | float | np.number)


def correct_quotient(a: jax.Array, b: jax.Array, q: jax.Array) -> jax.Array:
    """Return the float32 nearest to a / b, given q, which is that or next to it. Only normal numbers are corrected.

    With 24-bit mantissas A, B, Q the remainder is R = A * 2^s - Q * B (s = 23 or 24 aligns the exponents).
    |R| < 2^26, so integer arithmetic modulo 2^32 gives it exactly. No fused multiply-add is needed, and none that the
    compiler forms changes the result. A quotient of two 24-bit numbers never lies halfway between two floats.
    """
    def split(v):
        bits = lax.bitcast_convert_type(v, jnp.int32)
        return (bits >> 23) & 0xFF, (bits & 0x7FFFFF) | 0x800000

    (ea, ma), (eb, mb), (eq, mq) = split(a), split(b), split(q)
    shift = ea - (eq + eb - 127) + 23
    normal = (ea > 0) & (eb > 0) & (eq > 1) & (eq < 254)  # and so are a and b, if q is
    remainder = (ma << (shift & 31)) - mq * mb
    # Below a power of two floats are twice as dense, so a step down is half as long.
    down = where(mq == 0x800000, mb, 2 * mb)
    step = where(2 * remainder > mb, 1, where(4 * remainder < -down, -1, 0))
    bits = lax.bitcast_convert_type(q, jnp.int32) + where(normal, step, 0)
    return lax.bitcast_convert_type(bits, jnp.float32)


def where(mask: Any, a: Any, b: Any) -> jax.Array:
    """Return `jnp.where(mask, a, b)`. JAX traces `jnp.where` as a function of its own for each shape, but not this."""
    arrays = [x for x in (a, b) if not isinstance(x, int | float | np.generic)]
    are_alike = all(x.shape == mask.shape and x.dtype == arrays[0].dtype for x in arrays)
    if not arrays or not are_alike or mask.dtype != bool:
        return jnp.where(mask, a, b)
    return lax.select(mask, *(x if any(x is y for y in arrays) else lax.full_like(arrays[0], x) for x in (a, b)))


def in_axes(in_batched):
    """Return `in_axes` for jax.vmap from the `in_batched` argument of a custom_vmap rule."""
    return jax.tree.map(lambda is_batched: 0 if is_batched else None, tuple(in_batched))


def opaque(f, *args):
    """Return f(*args), as one opaque operation for transformations of the surrounding program; vmap still reaches f.

    Partial evaluation, in Flax's scan and in JAX's reverse mode inside any scan, walks through the whole program in
    Python. Without this two layers took half a minute, when the codec's stages were conditionals.
    """
    call = custom_vmap(f)

    @call.def_vmap
    def batched(axis_size, in_batched, *args):
        result = opaque(jax.vmap(f, in_axes(in_batched), axis_size=axis_size), *args)
        return result, jax.tree.map(lambda _: True, result)

    return call(*args)


def after(x: jax.Array, a: jax.Array) -> jax.Array:
    """Return the integers a, which XLA:CPU does not read before it has x.

    XLA:CPU starts whatever can start: it decodes the packed weights of all layers before the first product, and keeps
    them. It drops `lax.optimization_barrier`; it does not see that (b & 1) >> 1 is zero. Other platforms schedule for
    memory. With several devices a is returned as it is: an element of x would have to be sent to all of them.
    """
    if jax.device_count() > 1 or not x.size:
        return a
    first = lax.bitcast_convert_type(jnp.real(lax.stop_gradient(x)[(0,) * x.ndim]).astype(jnp.float32), jnp.int32)
    # Other platforms get a as it is: an operation of no effect would be a kernel of its own on a GPU.
    ways: Any = {"cpu": lambda a, b: a ^ ((b & 1) >> 1).astype(a.dtype), "default": lambda a, _: a}
    return by_platform(a, _of_a_member(first), **ways)


@custom_vmap
def _of_a_member(bits):
    return bits


@_of_a_member.def_vmap
def _of_the_first(axis_size, in_batched, bits):
    return _of_a_member(bits[0]), False  # members share what they do not differ in


def _choice(name):
    """Return a primitive that stands for one of two functions, `first` and `second`, until it is lowered.

    `when` is the condition under which it is the first.
    """
    choice = jax.extend.core.Primitive(name)
    choice.multiple_results = True
    choice.def_abstract_eval(lambda *_, results, **__: list(results))

    def batched(args, axes, *, first, second, results, when):
        del results
        size = next(a.shape[at] for a, at in zip(args, axes, strict=True) if at is not None)
        first, second = (jax.vmap(f, tuple(axes), axis_size=size) for f in _ways(first, second))
        outs = jax.tree.leaves(_chosen(choice, args, first, second, when))
        return outs, [0] * len(outs)

    batching.primitive_batchers[choice] = batched
    return choice


def _chosen(choice, args, first, second, when):
    """Bind a choice: `second` is traced only if it is chosen. Return None if `first` holds traced values."""
    flat, tree = jax.tree.flatten(args)
    ways = [jax.jit(lambda *flat, f=f: f(*jax.tree.unflatten(tree, flat))) for f in (first, second)]
    jaxpr, shapes = jax.make_jaxpr(ways[0], return_shape=True)(*flat)
    if any(isinstance(a, Tracer) for a in jaxpr.consts):
        return None
    # JAX looks into the jaxpr for operations that need to know devices.
    results = choice.bind(*flat, first=jaxpr, second=ways[1], results=tuple(jaxpr.out_avals), when=when)
    return jax.tree.unflatten(jax.tree.structure(shapes), results)


def _ways(first, second):
    """Return the two functions, of flat arguments and results."""
    return tuple(lambda *args, f=f: jax.tree.leaves(f(*args)) for f in (jaxpr_as_fun(first), second))


ONE_DEVICE = "one device"
by_platform_p, undivided_p, unless_exported_p = map(_choice, ("by_platform", "undivided", "unless_exported"))


@by_platform_p.def_impl
def _run_by_platform(*args, first, second, results, when):
    # Arrays may be on a CPU beside an accelerator: `second` is right there, too.
    if jax.config.jax_disable_jit:  # pyright: ignore[reportAttributeAccessIssue]
        default = jax.default_backend()
        return _ways(first, second)[{"gpu": "cuda"}.get(default, default) != when](*args)
    params = {"first": first, "second": second, "results": results, "when": when}
    return jax.jit(functools.partial(by_platform_p.bind, **params))(*args)


@undivided_p.def_impl
def _run_second(*args, first, second, **_):
    return _ways(first, second)[1](*args)


@unless_exported_p.def_impl
def _run_first(*args, first, **_):
    return jaxpr_as_fun(first)(*args)


def by_platform(*args: Any, default: Callable[..., Any], **way: Callable[..., Any]) -> Any:
    """Return f(*args) in programs for one platform, given as cuda=f, for example, and default(*args) in all others.

    `jax.lax.platform_dependent` traces both functions wherever it is traced. Half of the time that the codec took to
    trace on a CPU went into programs for other platforms, so `default` is traced only once a program for another
    platform is lowered. Functions that hold traced values cannot wait for that, and are traced here. Both functions
    must return the same types, and hold traced values only if both do.
    """
    ((platform, run),) = way.items()
    result = _chosen(by_platform_p, args, run, default, platform)
    return lax.platform_dependent(*args, default=default, **way) if result is None else result


def undivided(*args: Any, run: Callable[..., Any], default: Callable[..., Any]) -> Any:
    """Return run(*args) in programs for one device, default(*args) in all others and where run holds traced values."""
    result = _chosen(undivided_p, args, run, default, ONE_DEVICE)
    return default(*args) if result is None else result


def unless_exported(*args: Any, run: Callable[..., Any], exported: Callable[..., Any]) -> Any:
    """Return run(*args), but exported(*args) in programs that `jax.export` writes. Neither may hold traced values."""
    return _chosen(unless_exported_p, args, run, exported, "not exported")


def _differentiated(primals, tangents, *, first, second, results, when):
    del results
    moving = [i for i, t in enumerate(tangents) if not isinstance(t, ad.Zero)]

    def f(*moved):
        args = list(primals)
        for i, a in zip(moving, moved, strict=True):
            args[i] = a
        run, default = _ways(first, second)
        return default(*args) if when is ONE_DEVICE else lax.platform_dependent(*args, default=default, **{when: run})

    outs, rates = jax.jvp(f, [primals[i] for i in moving], [tangents[i] for i in moving])
    return outs, [
        ad.Zero(jax.typeof(a).to_tangent_aval()) if rate.dtype == jax.dtypes.float0 else rate
        for a, rate in zip(outs, rates, strict=True)
    ]


ad.primitive_jvps[by_platform_p] = ad.primitive_jvps[undivided_p] = _differentiated


@functools.partial(mlir.register_lowering, by_platform_p)
def _lower_by_platform(ctx, *args, first, second, results, when):
    del results
    platforms = set(ctx.platforms or ctx.module_context.platforms)
    run, default = _ways(first, second)
    if when not in platforms:
        run = default
    elif len(platforms) > 1:
        run = functools.partial(lax.platform_dependent, default=default, **{when: run})
    return mlir.lower_fun(run, multiple_results=True)(ctx, *args)


@functools.partial(mlir.register_lowering, undivided_p)
def _lower_undivided(ctx, *args, first, second, results, when):
    del results, when
    chosen = _ways(first, second)[not is_undivided(ctx)]
    return mlir.lower_fun(chosen, multiple_results=True)(ctx, *args)


def is_undivided(ctx: Any) -> bool:
    """Whether a program that is lowered is for one device."""
    return getattr(ctx.module_context.axis_context, "num_devices", 0) == 1


@functools.partial(mlir.register_lowering, unless_exported_p)
def _lower_unless_exported(ctx, *args, first, second, results, when):
    del results, when
    chosen = _ways(first, second)[ctx.module_context.lowering_parameters.for_export]
    return mlir.lower_fun(chosen, multiple_results=True)(ctx, *args)


def materialize(f, *args):
    """Return f(*args), computed once on XLA:CPU instead of being fused into its consumers.

    XLA:CPU fuses the reduction of a block into its consumers and recomputes it for every byte that they write.
    `lax.optimization_barrier` does not prevent this; a call that is not inlined does. On other platforms this is just
    f(*args).
    """
    f = jax.jit(f)  # traced once for all uses below
    return by_platform(*args, cpu=functools.partial(_called, f), default=f)


def _called(f, *args):
    return set_xla_metadata(f(*args), inlineable="false")
