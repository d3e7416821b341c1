"""Element-wise arithmetic as one operation of a program for one CPU."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.core import ShapedArray
from jax.extend.core import Literal, Primitive, jaxpr_as_fun
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import stablehlo
from jax.interpreters import ad, batching, mlir

from ifjax.numerics.distinct import distinct
from ifjax.numerics.xla import is_undivided


def unchanged(f: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """Return f: what `mapped` is to programs for other platforms."""
    return f


def mapped(f: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """Return an element-wise f, for CPUs only, as one operation. Its arguments are trees of arrays that broadcast.

    In a program for one CPU it is a map of a scalar function. The time of XLA's passes grows with the number of
    operations, and among arrays a constant is two of them: it is broadcast. XLA fuses a map like the operations that it
    stands for, with the same bits. These stay in programs for several devices, among which XLA does not divide a map,
    and where f looks numbers up in a table or its arguments are floats of several types.
    """
    bodies = {}

    def of(*args):
        flat, tree = jax.tree.flatten(args)
        types = [jax.typeof(a) for a in flat]
        shape = jnp.broadcast_shapes(*(t.shape for t in types))
        dtypes = tuple(t.dtype for t in types)
        if not shape or has_mesh(*flat) or len({d for d in dtypes if jnp.issubdtype(d, jnp.floating)}) > 1:
            return f(*args)
        if (tree, dtypes) not in bodies:
            bodies[tree, dtypes] = _body(f, tree, dtypes)
        body, kept = bodies[tree, dtypes]
        if body is None:
            return f(*args)

        def run(*read):
            every = [jnp.zeros((), d) for d in dtypes]
            for i, a in zip(kept, read, strict=True):
                every[i] = a
            return f(*jax.tree.unflatten(tree, every))

        return mapped_p.bind(*(jnp.broadcast_to(flat[i], shape) for i in kept), body=body, run=run)

    return of


def has_mesh(*arrays: jax.Array) -> bool:
    """Whether arrays are known to be divided among devices, or the program that takes them is."""
    return not (jax.sharding.get_abstract_mesh().empty and all(jax.typeof(a).sharding.mesh.empty for a in arrays))


def _body(f, tree, dtypes):
    """Return f among scalars, of those that it reads, and their indices; (None, ()) if an operation has an array."""
    scalars = [ShapedArray((), dtype) for dtype in dtypes]
    body = jax.make_jaxpr(distinct(lambda *flat: f(*jax.tree.unflatten(tree, flat))))(*scalars)
    read = {v for eqn in body.eqns for v in eqn.invars if not isinstance(v, Literal)}.union(body.jaxpr.outvars)
    if any(v.aval.shape for v in read):
        return None, ()
    kept = [i for i, v in enumerate(body.jaxpr.invars) if v in read]
    return body.replace(jaxpr=body.jaxpr.replace(invars=[body.jaxpr.invars[i] for i in kept])), kept


mapped_p = Primitive("mapped")


@mapped_p.def_abstract_eval
def _type(*args, body, run):
    del run
    return ShapedArray(args[0].shape, body.out_avals[0].dtype)


@mapped_p.def_impl
def _run(*args, body, run):
    del body
    return run(*args)


def _batched(args, axes, *, body, run):
    size = next(a.shape[at] for a, at in zip(args, axes, strict=True) if at is not None)
    return mapped_p.bind(*map(functools.partial(batching.bdim_at_front, size=size), args, axes), body=body, run=run), 0


batching.primitive_batchers[mapped_p] = _batched


def _differentiated(primals, tangents, *, body, run):
    del body
    return jax.jvp(run, list(primals), [ad.instantiate_zeros(t) for t in tangents])


ad.primitive_jvps[mapped_p] = _differentiated


@functools.partial(mlir.register_lowering, mapped_p)
def _lower(ctx, *args, body, run):
    (result,) = ctx.avals_out
    if not is_undivided(ctx) or not all(isinstance(n, int) for n in result.shape):
        return mlir.lower_fun(run, multiple_results=False)(ctx, *args)
    full = ir.RankedTensorType.get(result.shape, mlir.dtype_to_ir_type(result.dtype))
    op = stablehlo.MapOp(full, args, ir.DenseI64ArrayAttr.get(range(result.ndim)))
    types = (ir.RankedTensorType.get((), ir.RankedTensorType(a.type).element_type) for a in args)
    with ir.InsertionPoint(op.computation.blocks.append(*types)):
        scalar = ctx.replace(avals_in=body.in_avals, avals_out=body.out_avals)
        results = mlir.lower_fun(jaxpr_as_fun(body), multiple_results=True)(scalar, *op.computation.blocks[0].arguments)
        stablehlo.return_(list(results))
    return [op.result]
