"""Equal operations of a program for CPUs, done once, and only those whose results are needed."""

import collections.abc
import functools
import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.extend.core import ClosedJaxpr, Literal

from ifjax.numerics.xla import by_platform_p


def distinct(f):
    """Return f, for CPUs only, as a function that does equal operations once, broadcasts of constants among them.

    XLA finds equal and needless operations too, but only after it has inlined every call and has gone through its first
    passes, whose time grows with the number of operations. JAX writes a constant and its broadcast wherever one is
    used: half of the codec's operations.
    """

    def of(*args):
        flat, tree = jax.tree.flatten(args)
        jaxpr, shapes = jax.make_jaxpr(lambda *flat: f(*jax.tree.unflatten(tree, flat)), return_shape=True)(*flat)
        outs = _distinct(jaxpr, flat, {}, [True] * len(jaxpr.out_avals))
        return jax.tree.unflatten(jax.tree.structure(shapes), outs)

    return of


def _distinct(closed: ClosedJaxpr, args, known: dict, wanted: Sequence[bool]) -> list:
    """Evaluate a jaxpr; a result that is not wanted may be None.

    `known` maps an operation and its operands to the results and the operands (kept alive).
    """
    jaxpr = closed.jaxpr
    values = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*closed.consts, *args), strict=True))
    called = {v for eqn in jaxpr.eqns if eqn.primitive.name == "xla_metadata_value" for v in eqn.invars}  # `_called`
    eqns, needed = _needed(jaxpr, wanted)
    for eqn in eqns:
        name, params = eqn.primitive.name, eqn.params
        operands = [v.val if isinstance(v, Literal) else values[v] for v in eqn.invars]
        wanted_here = [v in needed for v in eqn.outvars]
        if eqn.primitive is by_platform_p and params["when"] == "cpu":
            outs = _distinct(params["first"], operands, known, wanted_here)
        elif name == "jit" and not called.isdisjoint(eqn.outvars):
            outs = jax.jit(functools.partial(_distinct_call, params["jaxpr"]))(*operands)
        elif name == "jit":
            outs = _distinct(params["jaxpr"], operands, known, wanted_here)
        else:
            outs = _once(eqn, operands, known)
        values.update(zip(eqn.outvars, outs, strict=True))
    return [v.val if isinstance(v, Literal) else values.get(v) for v in jaxpr.outvars]


def _needed(jaxpr, wanted):
    """Return the equations on which wanted results depend, and all variables that these read."""
    read, eqns = _variables(itertools.compress(jaxpr.outvars, wanted)), []
    for eqn in reversed(jaxpr.eqns):
        if eqn.effects or not read.isdisjoint(eqn.outvars):
            eqns.append(eqn)
            read |= _variables(eqn.invars)
    return eqns[::-1], read


def _variables(atoms):
    return {v for v in atoms if not isinstance(v, Literal)}


def _distinct_call(closed, *args):
    return _distinct(closed, args, {}, [True] * len(closed.out_avals))


# Operations whose operands are broadcast to the shape of the result.
_ELEMENTWISE = (
    lax.add_p, lax.sub_p, lax.mul_p, lax.div_p, lax.max_p, lax.min_p, lax.and_p, lax.or_p, lax.xor_p, lax.eq_p,
    lax.ne_p, lax.lt_p, lax.le_p, lax.gt_p, lax.ge_p, lax.shift_left_p, lax.shift_right_logical_p,
    lax.shift_right_arithmetic_p, lax.clamp_p,
)  # fmt: skip


def _once(eqn, operands, known):
    shape = eqn.outvars[0].aval.shape
    if eqn.primitive in _ELEMENTWISE and shape:
        full = functools.partial(jnp.broadcast_to, shape=shape)
        operands = [a if jnp.shape(a) == shape else _looked_up(known, ("full", shape), full, a) for a in operands]

    def run(*operands):
        found = eqn.primitive.get_bind_params(eqn.params)
        functions, params = found if isinstance(found, tuple) else ((), found)
        with eqn.ctx.manager:
            outs = eqn.primitive.bind(*functions, *operands, **params)
        return outs if eqn.primitive.multiple_results else [outs]

    params = tuple(sorted(eqn.params.items()))
    is_known = not eqn.effects and all(isinstance(value, collections.abc.Hashable) for _, value in params)
    return _looked_up(known, (eqn.primitive, params), run, *operands) if is_known else run(*operands)


def _looked_up(known, key, run, *operands):
    def of(a):
        return id(a) if isinstance(a, Tracer | jax.Array) else (jax.typeof(a), np.asarray(a).tobytes())

    key = *key, *map(of, operands)
    if key not in known:
        known[key] = run(*operands), operands
    return known[key][0]
