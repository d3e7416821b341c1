"""Equations of a jaxpr: which of them rearrange a value, which call other programs, and how to evaluate one."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from ifjax.arrays.shaping import reshape_groups

# Primitives whose result has the operand's values in the same places.
ALIKE = {
    "convert_element_type", "copy", "copy_p", "stop_gradient", "sharding_constraint", "reshard", "mesh_cast",
    "reduce_precision", "pcast", "pvary", "device_put", "name", "optimization_barrier", "real",
}  # fmt: skip
# Primitives that change values but keep their places, such as a mask, a sign or an addition by LoRA. A product of the
# result counts as a product of the operand.
ELEMENTWISE = {"mul", "div", "add", "sub", "neg", "select_n", "max", "min", "add_any", "clamp"}


class Axes(NamedTuple):
    """A mapping of a result's axes to those of the operand.

    Attributes:
        sources: for each axis of the result, the operand's axes that it is made of; () for a new axis.
        whole: whether the result has all of the operand's values, in the order that the axes imply.
    """

    sources: tuple[tuple[int, ...], ...]
    whole: bool = True


def scan_counts(params: Any) -> tuple[int, int]:
    """Return how many constants and how many carried values come first among a scan's operands."""
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    consts, carry, _ = params["ft_in"].unpack()  # from jax 0.12 on
    return len(consts), len(carry)


def rearranged(eqn: Any, shape: tuple[int, ...]) -> Axes | None:
    """Return the Axes of the first operand, which has this shape; None if the equation does more than rearrange it."""
    name, params, ndim = eqn.primitive.name, eqn.params, len(shape)
    own = tuple((i,) for i in range(ndim))
    if name in ALIKE:
        return Axes(own)
    if name == "transpose":
        return Axes(tuple((i,) for i in params["permutation"]))
    if name in ("reshape", "squeeze", "expand_dims"):
        return _reshaped(shape, tuple(eqn.outvars[0].aval.shape))
    if name == "broadcast_in_dim":
        places = dict(zip(params["broadcast_dimensions"], range(ndim), strict=True))
        kept = {j: i for j, i in places.items() if shape[i] == params["shape"][j]}
        return Axes(tuple((kept[j],) if j in kept else () for j in range(len(params["shape"]))))
    if name in ("slice", "dynamic_slice", "split", "rev", "pad"):
        return Axes(own, whole=False)
    return None


def _reshaped(old: tuple[int, ...], new: tuple[int, ...]) -> Axes | None:
    groups = reshape_groups(old, new)
    if groups is None:
        return None
    sources: list[tuple[int, ...]] = [()] * len(new)
    for before, after in groups:
        for j in after:
            sources[j] = before
    return Axes(tuple(sources))


def inner_jaxpr(eqn: Any) -> Any:
    """Return the program that an equation calls with its own operands, as a ClosedJaxpr; None if there is none.

    Loops, branches and Pallas kernels are excluded: their inner programs take other operands.
    """
    name, params = eqn.primitive.name, eqn.params
    if name in ("scan", "while", "cond", "pallas_call"):
        return None
    found = next((params[key] for key in ("jaxpr", "call_jaxpr", "fun_jaxpr") if key in params), None)
    program = found if hasattr(found, "jaxpr") else None if found is None else _Closed(found)
    if program is None or len(program.jaxpr.invars) != len(eqn.invars):
        return None
    return program


class _Closed:
    """A Jaxpr without constants, with the fields of a ClosedJaxpr."""

    def __init__(self, jaxpr: Any):
        self.jaxpr, self.consts = jaxpr, ()


def is_literal(atom: Any) -> bool:
    """Return whether an operand is a literal, a number in the program itself."""
    return hasattr(atom, "val")


def bind(eqn: Any, values: Sequence[Any]) -> list[Any]:
    """Evaluate an equation on other values; return a list of results."""
    found = eqn.primitive.get_bind_params(eqn.params)
    subfuns, params = found if isinstance(found, tuple) else ((), found)  # JAX versions differ in what they return
    with eqn.ctx.manager, jax.named_scope(str(eqn.source_info.name_stack)):
        out = eqn.primitive.bind(*subfuns, *values, **params)
    return list(out) if eqn.primitive.multiple_results else [out]


def is_lookup(eqn: Any) -> bool:
    """Return whether a gather looks up vectors, so that its result is not a matrix of weights."""
    sizes, dims = eqn.params["slice_sizes"], eqn.params["dimension_numbers"]
    return sum(n > 1 for i, n in enumerate(sizes) if i not in dims.collapsed_slice_dims) < 2


def gathered(eqn: Any, shape: tuple[int, ...]) -> Axes:
    """Return the Axes of a gather's operand, which has this shape."""
    params = eqn.params
    dims, sizes = params["dimension_numbers"], params["slice_sizes"]
    gone = {*dims.collapsed_slice_dims, *dims.operand_batching_dims}
    kept = [i for i in range(len(shape)) if i not in gone]
    ndim = len(eqn.outvars[0].aval.shape)
    places = dict(zip(dims.offset_dims, kept, strict=True))
    whole = {i for i in kept if sizes[i] == shape[i]}
    return Axes(tuple((places[j],) if places.get(j) in whole else () for j in range(ndim)), whole=False)
