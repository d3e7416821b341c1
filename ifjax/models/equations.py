"""Equations of a JAX program: which only rearrange a value, which call other programs, and how to run one again."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from ifjax.arrays.shaping import reshape_groups

# One operand in, the same values out, in the same places.
ALIKE = {
    "convert_element_type", "copy", "copy_p", "stop_gradient", "sharding_constraint", "reshard", "mesh_cast",
    "reduce_precision", "pcast", "pvary", "device_put", "name", "optimization_barrier", "real",
}  # fmt: skip
# Values of the same places come out changed: a mask, a sign, what LoRA adds. A product of them is one of the operand.
ELEMENTWISE = {"mul", "div", "add", "sub", "neg", "select_n", "max", "min", "add_any", "clamp"}


class Axes(NamedTuple):
    """Where the axes of an operand go: for each axis of the result those of the operand that it is made of.

    Attributes:
        sources: for each axis of the result; () where it is new.
        whole: whether all values are there, in the order that the axes tell.
    """

    sources: tuple[tuple[int, ...], ...]
    whole: bool = True


def rearranged(eqn: Any, shape: tuple[int, ...]) -> Axes | None:
    """Where the axes of the first operand, of this shape, go; None if the equation does more than rearrange it."""
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
    """The program that an equation calls with its own operands, as a Jaxpr with its constants; None if there is none.

    Loops, branches and kernels, which read references, are no such calls.
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
    """Whether an operand is a number that stands in the program."""
    return hasattr(atom, "val")


def bind(eqn: Any, values: Sequence[Any]) -> list[Any]:
    """Run an equation as it is on other values."""
    found = eqn.primitive.get_bind_params(eqn.params)
    subfuns, params = found if isinstance(found, tuple) else ((), found)  # which of the two depends on jax's version
    with eqn.ctx.manager, jax.named_scope(str(eqn.source_info.name_stack)):
        out = eqn.primitive.bind(*subfuns, *values, **params)
    return list(out) if eqn.primitive.multiple_results else [out]


def is_lookup(eqn: Any) -> bool:
    """Whether a gather looks vectors up: what comes out is no matrix to multiply by."""
    sizes, dims = eqn.params["slice_sizes"], eqn.params["dimension_numbers"]
    return sum(n > 1 for i, n in enumerate(sizes) if i not in dims.collapsed_slice_dims) < 2


def gathered(eqn: Any, shape: tuple[int, ...]) -> Axes:
    """Where the axes of what is gathered from go."""
    params = eqn.params
    dims, sizes = params["dimension_numbers"], params["slice_sizes"]
    gone = {*dims.collapsed_slice_dims, *dims.operand_batching_dims}
    kept = [i for i in range(len(shape)) if i not in gone]
    ndim = len(eqn.outvars[0].aval.shape)
    places = dict(zip(dims.offset_dims, kept, strict=True))
    whole = {i for i in kept if sizes[i] == shape[i]}
    return Axes(tuple((places[j],) if places.get(j) in whole else () for j in range(ndim)), whole=False)
