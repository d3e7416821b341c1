"""Exactly rounded division, a fusion barrier for XLA:CPU, and a wrapper that hides a function from transformations.

XLA is free to rewrite floating-point programs, and does. `x / c` with a scalar c becomes `x * (1 / c)`, which
differs in the last bit for almost half of all x; `1 / (c / a)` becomes `a * (1 / c)`; XLA:GPU's own float32
division is up to one unit off (openxla/xla#37181). A quantizer that has to agree with others bit for bit, and with
itself between jit, vmap and eager mode, can afford none of that. Every division of the library goes through
`divide`.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap
from jax.typing import ArrayLike


@jax.jit(static_argnames="varies")  # not for speed: the hundreds of divisions of a codec are traced once for each shape
def divide(a: ArrayLike, b: ArrayLike, *, varies: bool = False) -> jax.Array:
    """float32 a / b, correctly rounded on every platform, jitted or not, batched or not.

    Subnormal quotients are exempt (XLA:CPU flushes subnormals to zero; so do TPUs). With `varies`, b is an array of a's
    shape that came from `depending_on`, so that nothing need be done to keep XLA from rewriting the division.
    """
    a, b = jnp.broadcast_arrays(jnp.float32(a), jnp.float32(b))
    if varies:
        return lax.platform_dependent(a, b, cpu=lax.div, default=lambda a, b: correct_quotient(a, b, a / b))
    return lax.platform_dependent(a, b, cpu=_quotient, default=_corrected_quotient)


def _quotient(a: jax.Array, b: jax.Array) -> jax.Array:
    # The barrier, which XLA:CPU drops before it fuses, keeps a from being seen as a broadcast, and with it the divisor.
    a = lax.optimization_barrier(a)
    return a / depending_on(a, b)


def _corrected_quotient(a: jax.Array, b: jax.Array) -> jax.Array:
    # No barrier: it would cut XLA:GPU's kernels. So here a must not be a broadcast of computed values.
    return correct_quotient(a, b, a / depending_on(a, b))


def depending_on(a: jax.Array, b: ArrayLike) -> jax.Array:
    """b in the shape of a, wherever both are numbers.

    What XLA rewrites is a division by a scalar, by a broadcast or by another division. This divisor is none of them,
    because it depends on every element of a. It fuses away.
    """
    return jnp.where((a == a) & (b == b), b, jnp.float32(jnp.nan))


def correct_quotient(a: jax.Array, b: jax.Array, q: jax.Array) -> jax.Array:
    """The float32 nearest to a / b, given q within one unit of it. Normal numbers only; others pass unchanged.

    With 24-bit mantissas A, B, Q the remainder is R = A * 2^s - Q * B (s = 23 or 24 aligns the exponents).
    |R| < 2^26, so it comes out exactly in arithmetic modulo 2^32: no fused multiply-add is needed, and none that the
    compiler forms can do harm. A quotient of two 24-bit numbers never lies halfway between two floats.
    """
    def split(v):
        bits = lax.bitcast_convert_type(v, jnp.int32)
        return (bits >> 23) & 0xFF, (bits & 0x7FFFFF) | 0x800000

    (ea, ma), (eb, mb), (eq, mq) = split(a), split(b), split(q)
    shift = ea - (eq + eb - 127) + 23
    normal = (ea > 0) & (ea < 255) & (eb > 0) & (eb < 255) & (eq > 1) & (eq < 254) & (shift >= 22) & (shift <= 25)
    remainder = (ma << jnp.clip(shift, 0, 31)) - mq * mb
    # Below a power of two the floats lie twice as close, so the way down is half as long.
    down = jnp.where(mq == 0x800000, mb, 2 * mb)
    step = jnp.where(2 * remainder > mb, 1, jnp.where(4 * remainder < -down, -1, 0))
    bits = lax.bitcast_convert_type(q, jnp.int32) + jnp.where(normal, step, 0)
    return lax.bitcast_convert_type(bits, jnp.float32)


def in_axes(in_batched):
    """For jax.vmap, of what a rule of custom_vmap is told about its arguments."""
    return jax.tree.map(lambda is_batched: 0 if is_batched else None, tuple(in_batched))


def opaque(f, *args):
    """f(*args) as one operation for whatever transforms the program around it; vmap still reaches f.

    Partial evaluation, which Flax's scan does beforehand and JAX's reverse mode inside of any, goes through all of a
    program in Python, and twice through each branch of a conditional. The codec nests conditionals, and two layers
    took half a minute.
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
    first = lax.stop_gradient(x)[(0,) * x.ndim].astype(jnp.float32)
    return a ^ _zero_of(lax.bitcast_convert_type(first, jnp.int32)).astype(a.dtype)


@custom_vmap
def _zero_of(bits):
    return lax.platform_dependent(bits, cpu=lambda b: (b & 1) >> 1, default=lambda b: b & 0)


@_zero_of.def_vmap
def _zero_of_first(axis_size, in_batched, bits):
    return _zero_of(bits[0]), False  # members share what they do not differ in


def materialize(f, *args):
    """f(*args); on CPU, computed once and kept, instead of being fused into whatever reads it.

    XLA:CPU fuses the reduction of a block into its consumers and recomputes it for every byte they write;
    `lax.optimization_barrier` does not stop it, a conditional does. Other platforms see f(*args) alone.
    """
    f = jax.jit(f)  # traced once for all of its uses below
    return lax.platform_dependent(*args, cpu=functools.partial(_materialize_on_cpu, f), default=f)


def _materialize_on_cpu(f, *args):
    results = jax.eval_shape(f, *args)
    if not all(result.size for result in jax.tree.leaves(results)):
        return jax.tree.map(lambda result: jnp.zeros(result.shape, result.dtype), results)

    # vmap would turn the conditional into a select, and those fuse: the batched stage is a stage of the batched f.
    @custom_vmap
    def kept(*args):
        # From the smallest argument, and by a reduction: picking an element would gather a sharded array.
        witness = jnp.max(min(jax.tree.leaves(args), key=jnp.size).astype(jnp.float32))
        always = (witness == witness) | (witness != witness)  # XLA does not fold this, as NaN differs from itself
        # Zeros made from the result: of its sharding, and inside shard_map varying where it does.
        return lax.cond(always, f, lambda *args: jax.tree.map(jnp.zeros_like, f(*args)), *args)

    @kept.def_vmap
    def batched(axis_size, in_batched, *args):
        result = _materialize_on_cpu(jax.jit(jax.vmap(f, in_axes(in_batched), axis_size=axis_size)), *args)
        return result, jax.tree.map(lambda _: True, result)

    return kept(*args)
