"""Tracing of a JAX program to find which parameters it multiplies by, and along which of their axes.

The function is traced on shapes. Every parameter is followed through the operations that only rearrange it to the
products that read it.
"""

import collections
import functools
import itertools
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from ifjax.models.arguments import as_arguments, is_array, joined, split_arrays
from ifjax.models.equations import (
    ELEMENTWISE,
    gathered,
    inner_jaxpr,
    is_literal,
    is_lookup,
    rearranged,
    scan_counts,
)
from ifjax.models.leaves import abstract, is_leaf, is_parameter, raw_value, split_collection, with_value
from ifjax.models.sites import LOOKUP, NO_MATRIX, NOT_READ, Site, Walk, classes_of, innermost, join_path
from ifjax.numerics.byte_order import native_leaves


def trace_products(fn: Callable[..., Any], params: Any, *sample: Any) -> tuple[Site, ...]:
    """Find the products that read the parameters of any JAX function. Nothing is computed.

    Parameters are followed through transposes, reshapes, casts, slices, broadcasts, look-ups and masks, and through
    jit, scan, while, cond, remat, custom derivatives and shard_map, to dot_general, ragged_dot and convolutions.

    Args:
        fn: a function of (params, *sample).
        params: a tree of arrays or of their shapes, packed or not: nested dictionaries, Equinox or NNX modules.
        sample: the other arguments; shapes suffice (`jax.ShapeDtypeStruct`). Other values than arrays are passed on
            unchanged.

    Returns:
        A `Site` per parameter, in the tree's order. Its `axes` are the axes that the first product contracts, negative
        and in the parameter's order; () without a product. For a convolution it is the axis of input features, for a
        look-up table the last axis. If there are several, such as [heads, head size] of an output projection, blocks
        lie along the last one that is not shorter than a block. `stacked` are the axes that loops run over or that
        products batch over. `reason` says why the parameter cannot be quantized, `note` what else reads it.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import ifjax
        >>> def fn(params, x):
        ...     return jnp.einsum("btd,ndh->btnh", x, params["query"]) * params["gain"]
        >>> shapes = {"query": jax.ShapeDtypeStruct((4, 32, 8), jnp.float32), "gain": jnp.ones(())}
        >>> for site in ifjax.trace_products(fn, shapes, jnp.ones((2, 3, 32))):
        ...     print(site.parameter, site.axes, site.reason)
        gain () it is no matrix
        query (-2,) None
    """
    return tuple(function_walk(fn, params, sample).sites.values())


def function_walk(fn: Callable[..., Any], params: Any, sample: Any) -> Walk:
    """Return the sites of fn's parameters; sample is a tuple of arguments, a mapping of keywords, or the only one."""
    inner, put_back = split_collection(params)
    args, kwargs = as_arguments(sample)
    sites = trace_tree(lambda tree, args, kwargs: fn(put_back(tree), *args, **kwargs), inner, (args, kwargs))
    classes = classes_of(inner)
    named = {
        path: site._replace(module=innermost(path.rpartition("/")[0], classes)) for path, site in sites.items()
    }
    return Walk(named, classes)


def function_program(fn: Callable[..., Any], params: Any, sample: Any) -> tuple[Any, list[str]]:
    """Return the ClosedJaxpr of a function and the paths of its parameters, which are its first inputs."""
    inner, put_back = split_collection(params)
    args, kwargs = as_arguments(sample)
    return program_of(lambda tree, args, kwargs: fn(put_back(tree), *args, **kwargs), inner, (args, kwargs))


def shared_inputs(fn: Callable[..., Any], params: Any, sample: Any) -> dict[str, int]:
    """Return a number for the other operand of each parameter's first product; equal numbers mean a shared input."""
    program, paths = function_program(fn, params, sample)
    walk = _followed(program, {path: i for i, path in enumerate(paths)})
    return {path: number for path, number in zip(paths, walk.inputs, strict=True) if number is not None}


def trace_tree(fn: Callable[..., Any], tree: Any, sample: tuple[Any, ...]) -> dict[str, Site]:
    """Return the sites of the tree's parameters by path, in the program of fn(tree, *sample)."""
    program, paths = program_of(fn, tree, sample)
    return sites_of(program, {path: i for i, path in enumerate(paths)})


def program_of(fn: Callable[..., Any], tree: Any, sample: tuple[Any, ...]) -> tuple[Any, list[str]]:
    """Return the ClosedJaxpr of fn(tree, *sample) and the paths of the parameters, which are its first inputs."""
    tree, sample = native_leaves((tree, sample))
    leaves, structure = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)
    raw = [raw_value(leaf) for _, leaf in leaves]
    places = [i for i, (_, leaf) in enumerate(leaves) if is_array(raw[i]) and is_parameter(leaf)]
    arrays, others = split_arrays(sample)

    def flat(values, rest, arrays):
        new, filled, rest = dict(zip(places, values, strict=True)), [], iter(rest)
        for i, (_, leaf) in enumerate(leaves):
            filled.append(with_value(leaf, new[i] if i in new else next(rest)) if is_array(raw[i]) else leaf)
        return only_arrays(fn(jax.tree.unflatten(structure, filled), *joined(arrays, others)))

    values = [abstract(raw[i]) for i in places]
    rest = [value for i, value in enumerate(raw) if is_array(value) and i not in places]
    paths = [join_path(leaves[i][0]) for i in places]
    return jax.make_jaxpr(flat)(values, rest, arrays), paths


def only_arrays(result: Any) -> list[Any]:
    """Return the leaves of a function's result that are arrays or numbers."""
    return [leaf for leaf in jax.tree.leaves(result) if is_array(leaf) or isinstance(leaf, int | float | complex)]


def sites_of(program: Any, parameters: Mapping[str, int]) -> dict[str, Site]:
    """Return the sites of a program's parameters, given as input indices by path. All other inputs are data."""
    jaxpr, walk = program.jaxpr, _followed(program, parameters)
    return {
        path: _site(path, tuple(jaxpr.invars[i].aval.shape), reads)
        for (path, i), reads in zip(parameters.items(), walk.reads, strict=True)
    }


def _followed(program: Any, parameters: Mapping[str, int]) -> "_Walk":
    jaxpr, count = program.jaxpr, len(parameters)
    held: list[Any] = [None] * len(jaxpr.invars)
    masks = [1] * len(jaxpr.invars)
    for k, i in enumerate(parameters.values()):
        held[i] = (*(held[i] or ()), _Held(k, tuple((a,) for a in range(len(jaxpr.invars[i].aval.shape)))))
        masks[i] = masks[i] & ~1 | 2 << k
    walk = _Walk(count)
    walk.follow(jaxpr, held, masks)
    return walk


class _Held(NamedTuple):
    """A parameter, or a part of it, that a value of the program holds.

    Attributes:
        parameter: index of the parameter.
        axes: for each axis of the value, the parameter's axes that it is made of; () for a new axis.
        scanned: axes of the parameter that loops have removed.
        changed: the first operation that changed the values; None if they are the parameter's own.
        spread: whether the parameter was repeated along a new axis.
    """

    parameter: int
    axes: tuple[tuple[int, ...], ...]
    scanned: tuple[int, ...] = ()
    changed: str | None = None
    spread: bool = False


class _Read(NamedTuple):
    """One read of a parameter by the program.

    Attributes:
        by: name of the primitive.
        kind: "product", "weak" (a product with values that depend on parameters alone), "lookup", "itself" (combined
            with a value that depends on the same parameter), or "other".
        axes: the contracted axes, or those of the look-up indices.
        stacked: axes that loops have removed, and batch axes of the product.
        changed: the first operation that changed the values before the read; None if none did.
    """

    by: str
    kind: str
    axes: tuple[int, ...] = ()
    stacked: tuple[int, ...] = ()
    changed: str | None = None


# Operations that give equal results for equal operands and parameters; their results share a number.
_RESHAPES = {"convert_element_type", "copy", "reshape", "squeeze", "expand_dims", "transpose", "broadcast_in_dim"}


class _Walk:
    """Follows parameters through a program.

    The mask of a value says what it depends on: bit 0 stands for data, bit k + 1 for parameter k.
    """

    def __init__(self, count: int):
        self.reads: list[list[_Read]] = [[] for _ in range(count)]
        self.inputs: list[int | None] = [None] * count  # the number of each parameter's first other operand
        self._numbers: dict[Any, Any] = {}  # numbers of the variables of the program that is being followed
        self._new = itertools.count()
        self._alike: dict[Any, int] = {}  # numbers by operation, its operand's number and its parameters

    def follow(
        self, jaxpr: Any, held: Sequence[Any], masks: Sequence[int], numbers: Sequence[int] = ()
    ) -> tuple[list[Any], list[int]]:
        """Return held parameters and masks of the program's results, given those (and the numbers) of its inputs."""
        outside, self._numbers = self._numbers, dict(zip(jaxpr.invars, numbers, strict=False))
        found = self._follow(jaxpr, held, masks)
        self._numbers = outside
        return found

    def _number(self, atom: Any) -> int:
        if is_literal(atom):
            return next(self._new)
        if atom not in self._numbers:
            self._numbers[atom] = next(self._new)
        return self._numbers[atom]

    def _follow(self, jaxpr, held, masks):
        holds = {v: h for v, h in zip(jaxpr.invars, held, strict=True) if h}
        depends = dict(zip(jaxpr.invars, masks, strict=True))
        for eqn in jaxpr.eqns:
            if eqn.primitive.name in _RESHAPES:
                made = (eqn.primitive.name, self._number(eqn.invars[0]), str(eqn.params))
                self._numbers[eqn.outvars[0]] = self._alike.setdefault(made, next(self._new))
            own = [0 if is_literal(v) else depends.get(v, 0) for v in eqn.invars]
            mask = _union(own)
            out, out_masks = None, None
            if holds:
                ins = [None if is_literal(v) else holds.get(v) for v in eqn.invars]
                if any(ins):
                    out, out_masks = self._equation(eqn, ins, own)
            for i, v in enumerate(eqn.outvars):
                depends[v] = mask if out_masks is None else out_masks[i]
                if out is not None and out[i]:
                    holds[v] = out[i]
        get = [None if is_literal(v) else holds.get(v) for v in jaxpr.outvars]
        return get, [0 if is_literal(v) else depends.get(v, 0) for v in jaxpr.outvars]

    def _equation(self, eqn, ins, masks) -> tuple[list[Any] | None, list[int] | None]:
        name = eqn.primitive.name
        handler = _HANDLERS.get(name)
        if handler is not None:
            return handler(self, eqn, ins, masks)
        program = inner_jaxpr(eqn)
        if program is not None:
            return self.follow(program.jaxpr, ins, masks, [self._number(v) for v in eqn.invars])
        if name in ELEMENTWISE:
            return self._elementwise(eqn, ins, masks), None
        if name in ("concatenate", "stack"):
            return [self._joined(eqn, ins)], None
        if name == "optimization_barrier":
            return list(ins), list(masks)
        moved = rearranged(eqn, eqn.invars[0].aval.shape) if ins[0] else None
        if moved is None:
            self._note(eqn, ins)
            return None, None
        wide = name == "broadcast_in_dim" and any(
            not source and n > 1 for source, n in zip(moved.sources, eqn.outvars[0].aval.shape, strict=True)
        )
        out = tuple(h._replace(axes=_through(h.axes, moved.sources), spread=h.spread or wide) for h in ins[0])
        return [out] * len(eqn.outvars), None

    def _note(self, eqn, ins, kind="other"):
        for held in ins:
            for h in held or ():
                self._read(h, eqn.primitive.name, kind)

    def _read(self, h: _Held, by: str, kind: str, axes: Iterable[int] = (), stacked: Iterable[int] = ()):
        stacked = {*stacked, *h.scanned} - {*axes}
        read = _Read(by, kind, tuple(sorted({*axes})), tuple(sorted(stacked)), h.changed)
        if read not in self.reads[h.parameter]:
            self.reads[h.parameter].append(read)

    def _elementwise(self, eqn, ins, masks):
        """Follow a parameter through elementwise arithmetic, such as a mask, with values that no data influence.

        The result still counts as the parameter. Arithmetic with data, a change of shape and division by the parameter
        are reads of kind "other".
        """
        name, shape = eqn.primitive.name, eqn.outvars[0].aval.shape
        out = []
        for i, held in enumerate(ins):
            others = _union(mask for k, mask in enumerate(masks) if k != i)
            for h in held or ():
                if others & (2 << h.parameter):
                    self._read(h, name, "itself")
                    out.append(h._replace(changed=h.changed or name))  # followed on, to find the axes of its product
                elif others & 1 or eqn.invars[i].aval.shape != shape or (name == "div" and i):
                    self._read(h, name, "other")
                else:
                    out.append(h._replace(changed=h.changed or name))
        return [tuple(out) or None]

    def _joined(self, eqn, ins):
        at, new = eqn.params.get("dimension", eqn.params.get("axis")), eqn.primitive.name == "stack"
        out = []
        for held in ins:
            for h in held or ():
                axes = (*h.axes[:at], (), *h.axes[at:]) if new else h.axes
                out.append(h._replace(axes=axes, changed=h.changed or eqn.primitive.name))
        return tuple(out) or None

    def _product(self, eqn, held, dims, other, other_mask):
        """Note a product of a value; `dims` are its contracted and batch axes, `other` the other operand."""
        contracted, batch = dims
        for h in held or ():
            axes = [a for i in contracted for a in h.axes[i]]
            free = [a for i, source in enumerate(h.axes) if i not in (*contracted, *batch) for a in source]
            apart = {a for i in batch for a in h.axes[i]} - {*free, *axes}
            weak = other_mask & ~1 and not other_mask & 1
            kind = "other" if h.spread or not axes else "weak" if weak else "product"
            self._read(h, eqn.primitive.name, kind, axes, apart)
            if kind == "product" and self.inputs[h.parameter] is None:
                self.inputs[h.parameter] = self._number(other)

    def _dot_general(self, eqn, ins, masks):
        contracted, batch = eqn.params["dimension_numbers"]
        for side in (0, 1):
            dims = contracted[side], batch[side]
            self._product(eqn, ins[side], dims, eqn.invars[1 - side], masks[1 - side])
        return None, None

    def _ragged_dot(self, eqn, ins, masks):
        dims = eqn.params["ragged_dot_dimension_numbers"]
        (_, contracted), (_, batch) = dims.dot_dimension_numbers
        self._product(eqn, ins[1], (contracted, (*batch, *dims.rhs_group_dimensions)), eqn.invars[0], masks[0])
        self._note(eqn, [ins[0], *ins[2:]])
        return None, None

    def _conv(self, eqn, ins, masks):
        _, features, *_ = eqn.params["dimension_numbers"].rhs_spec
        self._product(eqn, ins[1], ((features,), ()), eqn.invars[0], masks[0])
        self._note(eqn, [ins[0], *ins[2:]])
        return None, None

    def _gather(self, eqn, ins, masks):
        self._note(eqn, [None, *ins[1:]])
        if not ins[0]:
            return None, None
        moved, dims = gathered(eqn, eqn.invars[0].aval.shape), eqn.params["dimension_numbers"]
        if is_lookup(eqn):
            for h in ins[0]:
                self._read(h, "gather", "lookup", [a for i in dims.start_index_map for a in h.axes[i]])
            return None, None
        return [tuple(h._replace(axes=_through(h.axes, moved.sources)) for h in ins[0])], None

    def _scan(self, eqn, ins, masks):
        params = eqn.params
        consts, carry = scan_counts(params)
        lead = consts + carry
        inner = [*ins[:lead], *(_scanned(held) for held in ins[lead:])]
        body = params["jaxpr"].jaxpr
        masks, out_masks, numbers = list(masks), [], [self._number(v) for v in eqn.invars]
        for _ in range(2):  # the second pass uses the masks that the body gave the carry
            _, out_masks = self.follow(body, inner, masks, numbers)
            before = masks[consts:lead]
            masks[consts:lead] = [a | b for a, b in zip(before, out_masks[:carry], strict=True)]
            if masks[consts:lead] == before:
                break
        unchanged = [v is w for v, w in zip(body.outvars[:carry], body.invars[consts:lead], strict=True)]
        kept = [held if same else None for held, same in zip(ins[consts:lead], unchanged, strict=True)]
        return [*kept, *[None] * (len(eqn.outvars) - carry)], [*masks[consts:lead], *out_masks[carry:]]

    def _while(self, eqn, ins, masks):
        params = eqn.params
        a, b = params["cond_nconsts"], params["body_nconsts"]
        body, masks, state = params["body_jaxpr"].jaxpr, list(masks), slice(a + b, len(ins))
        self.follow(params["cond_jaxpr"].jaxpr, [*ins[:a], *ins[state]], [*masks[:a], *masks[state]])
        for _ in range(2):
            _, out = self.follow(body, [*ins[a : a + b], *ins[state]], [*masks[a : a + b], *masks[state]])
            before = masks[state]
            masks[state] = [x | y for x, y in zip(before, out, strict=True)]
            if masks[state] == before:
                break
        unchanged = [v is w for v, w in zip(body.outvars, body.invars[b:], strict=True)]
        return [h if same else None for h, same in zip(ins[state], unchanged, strict=True)], masks[state]

    def _cond(self, eqn, ins, masks):
        outs = [self.follow(branch.jaxpr, ins[1:], masks[1:]) for branch in eqn.params["branches"]]
        index = masks[0]
        columns = zip(*(held for held, _ in outs), strict=True)
        held = [tuple(dict.fromkeys(h for one in column for h in one or ())) or None for column in columns]
        return held, [_union((index, *each)) for each in zip(*(m for _, m in outs), strict=True)]


_HANDLERS = {
    "dot_general": _Walk._dot_general, "ragged_dot_general": _Walk._ragged_dot,
    "conv_general_dilated": _Walk._conv, "gather": _Walk._gather, "scan": _Walk._scan, "while": _Walk._while,
    "cond": _Walk._cond,
}  # fmt: skip


def _union(masks: Iterable[int]) -> int:
    return functools.reduce(operator.or_, masks, 0)


def _through(axes, sources):
    return tuple(tuple(a for i in source for a in axes[i]) for source in sources)


def _scanned(held):
    return tuple(h._replace(axes=h.axes[1:], scanned=(*h.scanned, *h.axes[0])) for h in held) if held else None


def _site(path: str, shape: tuple[int, ...], reads: list[_Read]) -> Site:
    ndim = len(shape)
    site = Site(path, path, None, shape)
    by_kind = collections.defaultdict(list)
    for read in reads:
        by_kind[read.kind].append(read)
    stacked = tuple(sorted({a - ndim for read in reads for a in read.stacked}))
    products = by_kind["product"] or by_kind["weak"]
    if products:
        stacked = tuple(a - ndim for a in products[0].stacked)
    site = site._replace(stacked=stacked)
    if not reads:
        return site._replace(reason=NOT_READ)
    if ndim - len(stacked) < 2:
        return site._replace(reason=NO_MATRIX)
    others = list(dict.fromkeys(read.by for read in by_kind["other"]))
    if by_kind["itself"]:
        by = by_kind["itself"][0].by
        reason = f"it is rewritten before the product: {by} with a value that is made of it"
        return site._replace(axes=tuple(a - ndim for a in products[0].axes) if products else (), reason=reason)
    if products:
        axes = tuple(a - ndim for a in products[0].axes)
        notes = []
        if products[0].changed is not None:
            notes.append(f"it is decoded for {products[0].changed} before the product")
        more = sorted({read.axes for read in products[1:]} - {products[0].axes})
        if more:
            notes.append(f"another product contracts its axes {tuple(a - ndim for a in more[0])}")
        if others:
            notes.append(f"it is decoded for {', '.join(others)}, too")
        changed = products[0].changed if products[0].changed in ELEMENTWISE else None
        return site._replace(axes=axes, note="; ".join(notes) or None, changed=changed)
    if by_kind["lookup"]:
        return site._replace(axes=(_features(by_kind["lookup"][0], ndim),), training=LOOKUP)
    return site._replace(reason=f"no product reads it, only {', '.join(others)}")


def _features(read: _Read, ndim: int) -> int:
    """Return the last axis of a table that is neither indexed by the look-up nor stacked; negative."""
    return max(a for a in range(ndim) if a not in (*read.axes, *read.stacked)) - ndim
