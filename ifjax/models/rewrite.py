"""Evaluation of a traced program with packed weights and quantized products.

An equation without a weight runs unchanged. An equation that rearranges a weight rearranges its packed bytes. A product
becomes a product of ifjax. A called program is evaluated in the same way. Any other equation gets the weight decoded.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ifjax.arrays import QTensor, dynamic_slice, dynamic_update_slice
from ifjax.arrays.quantize import Multiples
from ifjax.arrays.shaping import has_own_amax, reshape_groups, reshaped
from ifjax.arrays.sharding import partition_specs
from ifjax.codec import Encoding
from ifjax.models import packed
from ifjax.models.activations import multiplied, quantized_activation, rounded, static_amax
from ifjax.models.adapters import Adapted, Adapter
from ifjax.models.equations import (
    ALIKE,
    ELEMENTWISE,
    bind,
    inner_jaxpr,
    is_literal,
    is_lookup,
    rearranged,
    scan_counts,
)
from ifjax.models.transforms import Transform
from ifjax.products import dot_general, ragged_dot
from ifjax.products.dot_general import accumulator
from ifjax.training import Recipe, quantized_conv, quantized_dot_general, quantized_ragged_dot


class How(NamedTuple):
    """How to compute a parameter's products. Hashable; equal for layers with equal treatment.

    Attributes:
        activations: encoding of the activations; None if they are not quantized.
        act_amax: as in `Rule`.
        recipe: training recipe of the product; None without one.
        name: name of the activations' calibrated amax; "" without one.
        is_state: whether it is a state, such as a cache, that the program updates and returns packed.
    """

    activations: Encoding | None = None
    act_amax: str = "tensor"
    recipe: Recipe | None = None
    name: str = ""
    is_state: bool = False


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["value", "adapter", "transform"],
    meta_fields=["how", "axes", "dtype"],
)
@dataclasses.dataclass(frozen=True)
class Weight:
    """A value of the program that is a parameter, possibly rearranged.

    Attributes:
        value: array or QTensor.
        how: how to compute its products.
        axes: for a QTensor: its axis for each axis of the value in the program; None for a new axis of length 1.
        dtype: dtype of the value in the program.
        adapter: for a QTensor: update that is added to it; None for none.
        transform: for a QTensor: change of basis that it was quantized in; None for none.
    """

    value: Any
    how: How
    axes: tuple[int | None, ...] = ()
    dtype: Any = None
    adapter: Adapter | None = None
    transform: Transform | None = None

    @classmethod
    def of(cls, value: Any, how: How) -> "Weight":
        """Return the Weight of a parameter that enters the program."""
        if isinstance(value, Adapted):
            base = cls.of(value.base, how)
            return dataclasses.replace(base, adapter=value.adapter, transform=value.transform)
        return cls(value, how, tuple(range(value.ndim)) if isinstance(value, QTensor) else (), np.dtype(value.dtype))

    @property
    def is_packed(self) -> bool:
        """Whether the value is a QTensor."""
        return isinstance(self.value, QTensor)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the value in the program."""
        if not self.is_packed:
            return self.value.shape
        return tuple(1 if axis is None else self.value.shape[axis] for axis in self.axes)

    def array(self) -> Any:
        """Return the value as an array, decoded if it is packed."""
        if not self.is_packed:
            return self.value
        array = Adapted(self.value, self.adapter, self.transform).dequantize(self.dtype)
        return jnp.transpose(array, [a for a in self.axes if a is not None]).reshape(self.shape)

    @property
    def recipe(self) -> Recipe | None:
        """Training recipe of its products. For a packed weight it uses the stored values and gives them no gradient."""
        recipe = self.how.recipe
        return recipe.over_packed() if recipe is not None and self.is_packed else recipe

    def plain(self) -> "Weight":
        """Return the weight, decoded to an array if it has an adapter or a transform."""
        return Weight.of(self.array(), self.how) if self.has_more else self

    @property
    def has_more(self) -> bool:
        """Whether the QTensor has an adapter or a transform."""
        return self.adapter is not None or self.transform is not None

    def result(self) -> Any:
        """Return the program's result for this value: a QTensor for a packed state, an array for any other weight."""
        if not (self.is_packed and self.how.is_state):
            return self.array()
        q = self.value.transpose([a for a in self.axes if a is not None]).reshape(self.shape)
        return q if self.dtype == q.dtype else q.astype(self.dtype)

    def moved(self, value: Any, axes: Sequence[int | None]) -> "Weight":
        """Return the weight with another QTensor and axes."""
        return dataclasses.replace(self, value=value, axes=tuple(axes))


class _Encoded(NamedTuple):
    """An activation and the QTensor or Multiples that are multiplied in its place."""

    x: Any
    q: Any


class Rewriter:
    """Evaluates programs on weights. Each quantized program has one, which caches the jitted programs and products.

    Attributes:
        amax: calibrated amaxes by name of the activations.
        note: for calibration: a function of (How, activation, contracted axes) that returns the operand to multiply.
    """

    def __init__(self, amax: Mapping[str, float] | None = None, note: Callable[..., Any] | None = None):
        self.amax, self.note = amax, note
        self._inner: dict[Any, Any] = {}
        self._products: dict[Any, Any] = {}
        self._encoded: dict[Any, tuple[Any, QTensor]] = {}  # activations of the program that is being evaluated

    def run(self, program: Any, values: Sequence[Any], key: jax.Array | None = None) -> list[Any]:
        """Evaluate a program (a ClosedJaxpr); values and results are arrays or Weights."""
        outer, self._encoded = self._encoded, {}
        try:
            return self._run(program, values, key)
        finally:
            self._encoded = outer

    def _run(self, program, values, key):
        jaxpr, env = program.jaxpr, {}
        env.update(zip(jaxpr.constvars, program.consts, strict=True))
        env.update(zip(jaxpr.invars, values, strict=True))
        last = _last_uses(jaxpr)

        def read(atom):
            return atom.val if is_literal(atom) else env[atom]

        for i, eqn in enumerate(jaxpr.eqns):
            ins = [read(atom) for atom in eqn.invars]
            if any(isinstance(value, Weight) for value in ins):
                outs = self._equation(eqn, ins, None if key is None else functools.partial(jax.random.fold_in, key, i))
            else:
                outs = bind(eqn, ins)
            env.update(zip(eqn.outvars, outs, strict=True))
            for v in last[i]:
                env.pop(v, None)
        return [read(atom) for atom in jaxpr.outvars]

    def _equation(self, eqn, ins, fold) -> list[Any]:
        handler = _HANDLERS.get(eqn.primitive.name)
        if handler is not None:
            return handler(self, eqn, ins, fold() if fold is not None and _draws(ins) else None)
        program = inner_jaxpr(eqn)
        if program is not None:
            return self.run(program, ins, fold() if fold is not None and _draws(ins) else None)
        moved = _moved(eqn, ins)
        return self._as_it_is(eqn, ins) if moved is None else moved

    def _as_it_is(self, eqn, ins) -> list[Any]:
        """Evaluate an equation on decoded weights. Rearranged and elementwise changed weights remain Weights."""
        outs = bind(eqn, [_array(value) for value in ins])
        name = eqn.primitive.name
        keeps = name in ELEMENTWISE or name in ("concatenate", "stack", "gather")
        if name == "gather" and is_lookup(eqn):
            return outs
        if not keeps and rearranged(eqn, eqn.invars[0].aval.shape) is None:
            return outs
        how = _common([value.how for value in ins if isinstance(value, Weight)])
        return [Weight.of(out, how) for out in outs]

    # --- products ---

    def _product(self, eqn, ins, key):
        """Evaluate a product as a jitted function. Equal products, as of a model's layers, are traced once."""
        same = eqn.primitive, tuple(sorted(eqn.params.items())), eqn.outvars[0].aval.dtype, eqn.ctx
        if same not in self._products:
            handler = _PRODUCTS[eqn.primitive.name]

            def quantized_product(ins, key):
                return handler(self, eqn, ins, key)

            self._products[same] = jax.jit(quantized_product)
        return self._products[same](self._with_encoded(eqn, ins), key)

    def _with_encoded(self, eqn, ins):
        """Return the operands, with the activation of a product that multiplies it packed as an `_Encoded`.

        Products of one activation, as those of queries, keys and values, share its codes.
        """
        if eqn.primitive.name != "dot_general" or self.note is not None:
            return ins
        side = 1 if isinstance(ins[1], Weight) else 0
        w, x = ins[side], ins[1 - side]
        how = w.how
        is_plain = w.is_packed and not w.has_more and None not in w.axes and how.recipe is None
        if isinstance(x, Weight) or not is_plain or how.activations is None:
            return ins
        amax = static_amax(self.amax, how.name) if how.act_amax == "static" else None
        axes, layers = _contraction(eqn, w, side, jnp.ndim(x))
        same = id(x), axes, how.activations, how.act_amax, amax, layers
        if same not in self._encoded:
            q = quantized_activation(x, axes, how.activations, how.act_amax, amax, layers, in_multiples=True)
            self._encoded[same] = x, q  # with x, so that no other array gets its id
        encoded = _Encoded(*self._encoded[same])
        return [encoded, w] if side else [w, encoded]

    def _activation(self, how: How, x: Any, axes: tuple[int, ...], layers: Sequence[int] = ()) -> Any:
        """Return the operand to multiply in place of x: x, a QTensor of it, or the result of `note`.

        `axes` are the contracted axes of x in the weight's order; `layers` are as in `quantized_activation`.
        """
        if self.note is not None:
            return self.note(how, x, axes)
        if how.activations is None:
            return x
        amax = static_amax(self.amax, how.name) if how.act_amax == "static" else None
        return quantized_activation(x, axes, how.activations, how.act_amax, amax, layers)

    def _dot_general(self, eqn, ins, key):
        params, side = eqn.params, 1 if isinstance(ins[1], Weight) else 0
        w, x = ins[side], _array(ins[1 - side])
        x, encoded = x if isinstance(x, _Encoded) else (x, None)
        out = eqn.outvars[0].aval
        dims = params["dimension_numbers"]
        (x_contracted, w_contracted), (x_batch, w_batch) = (pair if side else pair[::-1] for pair in dims)
        rest = {"precision": params["precision"], "out_sharding": params.get("out_sharding")}
        if w.adapter is not None:
            base = dataclasses.replace(w, adapter=None)
            (y,) = self._dot_general(eqn, [x, base] if side else [base, x], key)
            return [y + _adapted(w, x, dims, side, y.shape).astype(y.dtype)]
        if w.transform is not None:
            at = next((b for a, b in zip(w_contracted, x_contracted, strict=True)
                       if w.axes[a] == w.value.ndim + w.value.axis), None)  # fmt: skip
            if at is None:
                return self._dot_general(eqn, [x, w.plain()] if side else [w.plain(), x], key)
            x, w = w.transform.inputs(x, at), dataclasses.replace(w, transform=None)
            return self._dot_general(eqn, [x, w] if side else [w, x], key)
        recipe = w.recipe
        if recipe is not None and (recipe.is_quantized or not w.is_packed):
            sharding = rest["out_sharding"]

            def trained(x, w, key):
                numbers = (x_contracted, w_contracted), (x_batch, w_batch)
                placed = sharding if side else None
                return quantized_dot_general(
                    x, w.array(), numbers, recipe, key, precision=rest["precision"], out_sharding=placed,
                    preferred_element_type=out.dtype,
                )  # fmt: skip

            # Checkpointed, so that the backward pass decodes packed weights again instead of keeping them decoded.
            y = (jax.checkpoint(trained) if w.is_packed else trained)(x, w, key)
            return [y if side else _swapped(y, len(x_batch), x.ndim - len(x_contracted) - len(x_batch), sharding)]
        axes, layers = _contraction(eqn, w, side, x.ndim)

        def product(x, weight):
            if isinstance(x, Multiples):
                y = of_values(x.values, weight, accumulator(out.dtype))
                return (y if x.factor is None else y * x.factor).astype(out.dtype)
            return of_values(x, weight, out.dtype)

        def of_values(x, weight, dtype):
            pair, options = (x, weight) if side else (weight, x), {**rest, "preferred_element_type": dtype}
            if not isinstance(weight, QTensor):
                return lax.dot_general(*pair, dims, **options)
            return _packed_product(pair, side, w.axes, dims, options)

        q = self._activation(w.how, x, axes, layers) if encoded is None else encoded
        if not w.is_packed or None in w.axes:
            weight = w.array() if not w.is_packed else w.value.astype(w.dtype)
            return [product(rounded(x, q), weight)]
        return [multiplied(x, q, w.value.astype(w.dtype), product)]

    def _conv(self, eqn, ins, key):
        x, w = ins
        if not isinstance(w, Weight):
            return self._as_it_is(eqn, ins)
        x, how, recipe = _array(x), w.how, w.recipe
        if recipe is not None:
            params = {k: v for k, v in eqn.params.items() if k != "out_sharding"}
            params["preferred_element_type"] = eqn.outvars[0].aval.dtype
            return [quantized_conv(x, w.array(), recipe, key, **params)]
        features = eqn.params["dimension_numbers"].lhs_spec[1]
        x = rounded(x, self._activation(how, x, (features - x.ndim,)))
        return bind(eqn, [x, w.array()])

    def _ragged_dot(self, eqn, ins, key):
        x, w, *sizes = ins
        dims = eqn.params["ragged_dot_dimension_numbers"]
        contracted, batch = (tuple(map(tuple, pair)) for pair in dims.dot_dimension_numbers)
        ragged, groups = tuple(dims.lhs_ragged_dimensions), tuple(dims.rhs_group_dimensions)
        plain = (contracted, batch, ragged, groups) == (((1,), (1,)), ((), ()), (0,), (0,))
        if not isinstance(w, Weight) or not plain or len(sizes) > 1:
            return self._as_it_is(eqn, ins)
        x, how, recipe = _array(x), w.how, w.recipe
        rest = {"precision": eqn.params["precision"], "preferred_element_type": eqn.outvars[0].aval.dtype}
        if recipe is not None:
            return [quantized_ragged_dot(x, w.array(), sizes[0], recipe, key, **rest)]
        x = rounded(x, self._activation(how, x, (-1,)))
        in_place = w.is_packed and w.axes == (0, 1, 2) and not w.has_more
        weight = w.value.astype(w.dtype) if in_place else w.array()
        return [ragged_dot(x, weight, sizes[0], **rest)]

    # --- states ---

    def _dynamic_update_slice(self, eqn, ins, key):
        w, x, *starts = ins
        if not isinstance(w, Weight) or not w.is_packed or None in w.axes or w.has_more:
            return self._as_it_is(eqn, ins)
        own = np.argsort(np.asarray(w.axes)).tolist()
        return self._written(
            eqn, ins, lambda q: dynamic_update_slice(q, jnp.transpose(_array(x), own), [starts[i] for i in own])
        )

    def _scatter(self, eqn, ins, key):
        w, indices, x = ins
        dims, shape = eqn.params["dimension_numbers"], eqn.invars[0].aval.shape
        axes = dims.scatter_dims_to_operand_dims
        plain = isinstance(w, Weight) and w.is_packed and w.axes == tuple(range(len(shape))) and not w.has_more
        plain = plain and axes == dims.inserted_window_dims and not dims.operand_batching_dims
        if not plain or list(axes) != list(range(axes[0], axes[0] + len(axes))):
            return self._as_it_is(eqn, ins)
        windows = [i for i in range(len(shape)) if i not in axes]
        if [x.shape[i] for i in dims.update_window_dims] != [shape[i] for i in windows]:
            return self._as_it_is(eqn, ins)
        # In q.at[...], adjacent index arrays put their axes in the place of the first indexed axis.
        lead = [i for i in range(x.ndim) if i not in dims.update_window_dims]
        order = [*dims.update_window_dims[: axes[0]], *lead, *dims.update_window_dims[axes[0] :]]
        index: list[Any] = [slice(None)] * len(shape)
        for j, axis in enumerate(axes):
            entry = indices[..., j]
            clips = "CLIP" in str(eqn.params["mode"])
            # A negative index is out of range in scatter, but counts from the end in q.at.
            index[axis] = jnp.clip(entry, 0, shape[axis] - 1) if clips else jnp.where(entry < 0, shape[axis], entry)
        return self._written(eqn, ins, lambda q: q.at[tuple(index)].set(jnp.transpose(_array(x), order)))

    def _written(self, eqn, ins, write: Callable[[QTensor], QTensor]) -> list[Any]:
        """Write into a packed value, which is a state from then on. A parameter that cannot be updated is decoded."""
        w = ins[0]
        try:
            q = write(w.value)
        except ValueError:
            if w.how.is_state:
                raise
            return self._as_it_is(eqn, ins)
        return [dataclasses.replace(w, value=q, how=w.how._replace(is_state=True))]

    # --- programs inside ---

    def _jit(self, eqn, ins, key):
        program = eqn.params["jaxpr"]
        name = (id(program), key is None)
        if name not in self._inner:

            def call(values, key):
                return self.run(program, values, key)

            call.__name__ = call.__qualname__ = str(eqn.params.get("name", "inner"))
            self._inner[name] = program, jax.jit(call, inline=bool(eqn.params.get("inline", False)))
        return self._inner[name][1](ins, key)

    def _remat(self, eqn, ins, key):
        program, params = inner_jaxpr(eqn), eqn.params
        body = jax.checkpoint(
            lambda values, key: [_settled(out) for out in self.run(program, values, key)],
            policy=params["policy"], prevent_cse=params["prevent_cse"],
        )  # fmt: skip
        return body(ins, key)

    def _custom(self, eqn, ins, key):
        """Evaluate a function with custom derivatives. Packed weights are multiplied packed in the forward pass.

        The backward pass uses the function's own derivatives on decoded weights. Weights with an adapter or a transform
        enter as arrays, so that the derivatives reach the adapter.
        """
        ins = [value.plain() if isinstance(value, Weight) else value for value in ins]
        if not any(isinstance(value, Weight) and value.is_packed for value in ins):
            return self._as_it_is(eqn, ins)
        program = inner_jaxpr(eqn)
        fixed = [isinstance(value, Weight) for value in ins]
        weights = [value for value in ins if isinstance(value, Weight)]

        def filled(weights, plain):
            weights, plain = iter(weights), iter(plain)
            return [next(weights) if is_weight else next(plain) for is_weight in fixed]

        def original(weights, plain):
            return bind(eqn, filled([w.array() for w in weights], plain))

        @jax.custom_vjp
        def call(weights, plain):
            return [_array(out) for out in self.run(program, filled(weights, plain), key)]

        def forward(weights, plain):
            _, pull = jax.vjp(functools.partial(original, weights), plain)
            return call(weights, plain), (weights, pull)

        def backward(kept, g):
            weights, pull = kept
            nothing = jax.tree.map(
                lambda a: jnp.zeros_like(a) if jnp.issubdtype(a.dtype, jnp.inexact)
                else np.zeros(a.shape, jax.dtypes.float0), weights,
            )  # fmt: skip
            return nothing, *pull(g)

        call.defvjp(forward, backward)
        return call(weights, [value for value, is_weight in zip(ins, fixed, strict=True) if not is_weight])

    def _scan(self, eqn, ins, key):
        params, body = eqn.params, eqn.params["jaxpr"]
        first, carried = scan_counts(params)
        lead = first + carried
        consts, carry = list(ins[:first]), list(ins[first:lead])
        fixed = _unchanged(body.jaxpr, carry, first)
        stacked = [_stacked(value) for value in ins[lead:]]

        def step(state, xs):
            count, moving = state
            own = None if key is None else jax.random.fold_in(key, count)
            own_layers = [put(x) for (_, put), x in zip(stacked, xs, strict=True)]
            values = [*consts, *_merged(fixed, carry, moving), *own_layers]
            outs = [_settled(out) for out in self.run(body, values, own)]
            moving = [out for out, same in zip(outs[: len(carry)], fixed, strict=True) if not same]
            return (None if key is None else count + 1, moving), outs[len(carry) :]

        start = [_settled(value) for value, same in zip(carry, fixed, strict=True) if not same]
        options = {k: params[k] for k in ("length", "reverse", "unroll", "_split_transpose") if k in params}
        (_, end), ys = lax.scan(
            step, (None if key is None else jnp.int32(0), start), [xs for xs, _ in stacked], **options
        )
        return [*_merged(fixed, carry, end), *map(_restacked, ys)]

    def _while(self, eqn, ins, key):
        params = eqn.params
        a, b = params["cond_nconsts"], params["cond_nconsts"] + params["body_nconsts"]
        body, carry = params["body_jaxpr"], list(ins[b:])
        fixed = _unchanged(body.jaxpr, carry, b - a)

        def test(state):
            (result,) = self.run(params["cond_jaxpr"], [*ins[:a], *_merged(fixed, carry, state[1])])
            return _array(result)

        def step(state):
            count, moving = state
            own = None if key is None else jax.random.fold_in(key, count)
            outs = self.run(body, [*ins[a:b], *_merged(fixed, carry, moving)], own)
            moving = [_settled(out) for out, same in zip(outs, fixed, strict=True) if not same]
            return None if key is None else count + 1, moving

        start = [_settled(value) for value, same in zip(carry, fixed, strict=True) if not same]
        _, end = lax.while_loop(test, step, (None if key is None else jnp.int32(0), start))
        return _merged(fixed, carry, end)

    def _cond(self, eqn, ins, key):
        def branch(program):
            return lambda values: [_settled(out) for out in self.run(program, values, key)]

        index, values = _array(ins[0]), list(ins[1:])
        return lax.switch(index, [branch(program) for program in eqn.params["branches"]], values)

    def _shard_map(self, eqn, ins, key):
        params, program = eqn.params, inner_jaxpr(eqn)
        ins = [_in_place(value) for value in ins]
        specs = [_specs(value, spec) for value, spec in zip(ins, params["in_specs"], strict=True)]
        call = jax.shard_map(
            lambda values, key: [_array(out) for out in self.run(program, values, key)],
            mesh=params["mesh"], in_specs=(specs, jax.sharding.PartitionSpec()), out_specs=list(params["out_specs"]),
            axis_names=params["newly_manual_axes"], check_vma=params["check_vma"],
        )  # fmt: skip
        return call(ins, key)


_PRODUCTS = {
    "dot_general": Rewriter._dot_general, "conv_general_dilated": Rewriter._conv,
    "ragged_dot_general": Rewriter._ragged_dot,
}  # fmt: skip
_HANDLERS = dict.fromkeys(_PRODUCTS, Rewriter._product) | {
    "jit": Rewriter._jit, "pjit": Rewriter._jit,
    "remat2": Rewriter._remat, "checkpoint": Rewriter._remat, "remat": Rewriter._remat,
    "custom_jvp_call": Rewriter._custom, "custom_vjp_call": Rewriter._custom, "scan": Rewriter._scan,
    "while": Rewriter._while, "cond": Rewriter._cond, "shard_map": Rewriter._shard_map,
    "dynamic_update_slice": Rewriter._dynamic_update_slice, "scatter": Rewriter._scatter,
}  # fmt: skip


def _contraction(eqn, w: Weight, side: int, ndim: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return an activation's contracted axes, and the batch axes along which the weight has amaxes of its own.

    The first are negative and in the weight's order, so that the blocks of both operands lie along the same one.
    """
    (x_contracted, w_contracted), (x_batch, w_batch) = (
        pair if side else pair[::-1] for pair in eqn.params["dimension_numbers"]
    )
    own = [(w.axes[a] if w.is_packed else a, b) for a, b in zip(w_contracted, x_contracted, strict=True)]
    axes = tuple(b - ndim for _, b in sorted((a, b) for a, b in own if a is not None))
    pairs = [(w.axes[a], b) for a, b in zip(w_batch, x_batch, strict=True)] if w.is_packed else []
    return axes, tuple(b for a, b in pairs if a is not None and has_own_amax(w.value, a))


def _array(value: Any) -> Any:
    return value.array() if isinstance(value, Weight) else value


def _settled(value: Any) -> Any:
    """Return a result of an inner program: a packed state unchanged, any other weight as an array."""
    keeps = isinstance(value, Weight) and value.is_packed and value.how.is_state
    return value if keeps else _array(value)


def _restacked(value: Any) -> Any:
    """Return an output that a scan has stacked; a Weight gets the new axis in front."""
    if not isinstance(value, Weight):
        return value
    return value.moved(value.value, [0, *(None if a is None else a + 1 for a in value.axes)])


def _draws(ins: Sequence[Any]) -> bool:
    """Return whether a recipe among these weights needs a key."""
    recipes = [value.how.recipe for value in ins if isinstance(value, Weight)]
    return any(recipe is not None and recipe.needs_key for recipe in recipes)


def _common(hows: list[How]) -> How:
    """Return the How of several weights that are joined before their product.

    Raises:
        ValueError: they differ in more than their names.
    """
    if len({how._replace(name="") for how in hows}) > 1:
        raise ValueError(
            "parameters that are joined before their product need rules that treat them alike, got "
            + " and ".join(sorted({str(how._replace(name="")) for how in hows})[:2])
        )
    return hows[0]


def _last_uses(jaxpr: Any) -> list[list[Any]]:
    """Return, for each equation, the variables that are not read after it."""
    seen, last = {v for v in jaxpr.outvars if not is_literal(v)}, []
    for eqn in reversed(jaxpr.eqns):
        gone = []
        for v in (*eqn.invars, *eqn.outvars):
            if not is_literal(v) and v not in seen:
                seen.add(v)
                gone.append(v)
        last.append(gone)
    return last[::-1]


def _swapped(y: Any, batch: int, free: int, sharding: Any) -> Any:
    """Return a product [batch, x's free axes, w's free axes] with w's free axes before those of x."""
    y = jnp.moveaxis(y, range(batch, batch + free), range(y.ndim - free, y.ndim))
    return y if sharding is None else jax.reshard(y, sharding)


def _adapted(w: Weight, x: Any, dims: Any, side: int, shape: Sequence[int]) -> Any:
    """Return the product of x and the update of w's adapter.

    Axes of x that meet an axis of w's QTensor are labelled by that axis; other axes of x get labels from w.value.ndim
    on.
    """
    (x_contracted, w_contracted), (x_batch, w_batch) = (pair if side else pair[::-1] for pair in dims)
    new = w.value.ndim
    labels = [new + i for i in range(x.ndim)]
    for i, axis in zip((*x_contracted, *x_batch), (*w_contracted, *w_batch), strict=True):
        own = w.axes[axis]
        labels[i] = labels[i] if own is None else own
    batch = [labels[i] for i in x_batch]
    x_free = [labels[i] for i in range(x.ndim) if i not in (*x_contracted, *x_batch)]
    w_free = [w.axes[i] for i in range(len(w.axes)) if i not in (*w_contracted, *w_batch)]
    w_free = [own for own in w_free if own is not None and w.value.shape[own] > 1]
    assert w.adapter is not None
    return w.adapter.product(x, labels, [*batch, *x_free, *w_free] if side else [*batch, *w_free, *x_free], shape)


def _packed_product(pair, side, axes, dims, rest):
    """Compute dot_general of a pair whose operand on `side` is a QTensor, rearranged by `axes` as in `Weight`.

    `dims` counts the axes of the rearranged value. Its new axes of length 1 are left out of the product and inserted
    into the result.
    """
    x, q = pair[1 - side], pair[side]
    (x_contracted, w_contracted), (x_batch, w_batch) = (p if side else p[::-1] for p in dims)
    gone = [xa for xa, wa in zip((*x_contracted, *x_batch), (*w_contracted, *w_batch), strict=True) if axes[wa] is None]
    left = [i for i in range(x.ndim) if i not in gone]
    contracted = [(left.index(a), axes[b]) for a, b in zip(x_contracted, w_contracted, strict=True) if a not in gone]
    batch = [(left.index(a), axes[b]) for a, b in zip(x_batch, w_batch, strict=True) if a not in gone]
    own = [tuple(tuple(p[k] for p in pairs) for k in (0, 1)) for pairs in (contracted, batch)]
    if gone:
        x = lax.squeeze(x if not isinstance(x, QTensor) else x.dequantize(), gone)
    # Labels of the result's axes, in the order that the product gives (`made`) and in the order required (`wanted`).
    x_free = [("x", i) for i in range(len(left)) if i not in [*own[0][0], *own[1][0]]]
    q_free = [("q", a) for a in range(q.ndim) if a not in [*own[0][1], *own[1][1]]]
    w_free = [("q", axes[i]) if axes[i] is not None else ("new", i)
              for i in range(len(axes)) if i not in (*w_contracted, *w_batch)]  # fmt: skip
    first = [("b", a) if a not in gone else ("new", -1) for a in x_batch]
    made = [label for label in first if label[0] == "b"] + (x_free + q_free if side else q_free + x_free)
    wanted = first + (x_free + w_free if side else w_free + x_free)
    ready = [made.index(label) for label in wanted if label[0] != "new"]
    in_order = ready == list(range(len(made))) and len(ready) == len(wanted)
    options = rest if in_order else rest | {"out_sharding": None}
    operands, numbers = ((x, q), own) if side else ((q, x), [p[::-1] for p in own])
    y = dot_general(*operands, numbers, **options)
    if in_order:
        return y
    y = jnp.expand_dims(jnp.transpose(y, ready), [i for i, label in enumerate(wanted) if label[0] == "new"])
    return y if rest["out_sharding"] is None else jax.reshard(y, rest["out_sharding"])


def _unchanged(body: Any, carry: Sequence[Any], first: int) -> list[bool]:
    """Return, for each carried value of a loop, whether it is a Weight that the body returns unchanged."""
    inside = body.invars[first : first + len(carry)]
    return [
        isinstance(value, Weight) and out is own
        for value, out, own in zip(carry, body.outvars[: len(carry)], inside, strict=True)
    ]


def _merged(fixed: Sequence[bool], values: Sequence[Any], moving: Sequence[Any]) -> list[Any]:
    """Return `values` with those that are not fixed replaced by `moving`, in order."""
    others = iter(moving)
    return [value if same else next(others) for value, same in zip(values, fixed, strict=True)]


def _stacked(value: Any) -> tuple[Any, Callable[[Any], Any]]:
    """Return the arrays that a scan runs over for a value, and a function that makes a layer's value of one slice."""
    if not isinstance(value, Weight):
        return value, lambda x: x
    axis = value.axes[0] if value.is_packed else None
    if axis is None or packed.is_blocked(value.value, axis):
        how = value.how
        return value.array(), lambda x: Weight.of(x, how)
    arrays, shared, like = packed.layers(value.value, axis)
    axes = [a if a is None or a < axis else a - 1 for a in value.axes[1:]]
    adapter = value.adapter
    if adapter is None:
        return arrays, lambda arrays: value.moved(packed.layer(like, arrays, shared), axes)
    sides = {"a": adapter.a, "b": adapter.b}
    stacked = {name: jnp.moveaxis(side, axis, 0) for name, side in sides.items() if side.shape[axis] > 1}
    fixed = {name: side.squeeze(axis) for name, side in sides.items() if side.shape[axis] == 1}

    def put(xs):
        layer = value.moved(packed.layer(like, xs[0], shared), axes)
        return dataclasses.replace(layer, adapter=Adapter(**fixed, **xs[1], scale=adapter.scale))

    if len(fixed) == 2:  # a stack of one layer
        stacked, fixed = {name: side[None] for name, side in fixed.items()}, {}
    return (arrays, stacked), put


def _in_place(value: Any) -> Any:
    """Return a packed weight unchanged if it is not rearranged and has no more; decode any other packed weight."""
    if not isinstance(value, Weight) or not value.is_packed:
        return value
    if value.axes == tuple(range(value.value.ndim)) and not value.has_more:
        return value
    return Weight.of(value.array(), value.how)


def _specs(value: Any, spec: Any) -> Any:
    if not isinstance(value, Weight):
        return spec
    if not value.is_packed:
        return dataclasses.replace(value, value=spec)
    return dataclasses.replace(value, value=partition_specs(value.value, spec))


def _moved(eqn: Any, ins: Sequence[Any]) -> list[Any] | None:
    """Return the results of an equation on a packed weight without decoding it; None if this is not possible."""
    w, name, params = ins[0], eqn.primitive.name, eqn.params
    if not isinstance(w, Weight) or not w.is_packed or any(isinstance(value, Weight) for value in ins[1:]):
        return None
    q, out = w.value, eqn.outvars[0].aval
    if name == "convert_element_type":
        floats = out.dtype.name in ("float32", "bfloat16", "float16")
        return [dataclasses.replace(w, dtype=np.dtype(out.dtype))] if floats else None
    if name in ALIKE and name not in ("reduce_precision", "optimization_barrier", "real"):
        return [w]
    if name == "transpose":
        return [w.moved(q, [w.axes[i] for i in params["permutation"]])]
    if name in ("reshape", "squeeze", "expand_dims"):
        return _reshaped(w, out.shape)
    if name == "broadcast_in_dim":
        sources = rearranged(eqn, w.shape)
        assert sources is not None
        fits = all(source or n == 1 for source, n in zip(sources.sources, out.shape, strict=True))
        kept = [source[0] for source in sources.sources if source]
        lost = [a for i, a in enumerate(w.axes) if i not in kept and a is not None]
        return [w.moved(q, [w.axes[s[0]] if s else None for s in sources.sources])] if fits and not lost else None
    if w.has_more:  # slices and gathers change the QTensor, and would have to change the adapter or transform, too
        return None
    if name in ("slice", "dynamic_slice", "split"):
        return _cut(w, name, params, ins[1:])
    return _gathered(eqn, w, ins[1]) if name == "gather" else None


def _reshaped(w: Weight, shape: tuple[int, ...]) -> list[Any] | None:
    groups = reshape_groups(w.shape, shape)
    if groups is None:
        return None
    axes: list[int | None] = [None] * len(shape)
    for before, after in groups:
        if len(before) == len(after) == 1:
            axes[after[0]] = w.axes[before[0]]
    lost = [a for before, after in groups if len(before) != 1 or len(after) != 1 for i in before
            if (a := w.axes[i]) is not None]  # fmt: skip
    if not lost:
        return [w.moved(w.value, axes)]
    if w.axes != tuple(range(w.value.ndim)) or w.has_more:
        return None
    q = reshaped(w.value, shape)
    return None if q is None else [w.moved(q, range(q.ndim))]


def _cut(w: Weight, name: str, params: Any, starts: Sequence[Any]) -> list[Any] | None:
    """Return the slices of a packed weight; None if they cut a blocked or new axis or have strides."""
    ndim, shape = len(w.axes), w.shape
    if name == "split":
        cuts, start = [], 0
        for size in params["sizes"]:
            cuts.append([(start if i == params["axis"] else 0, int(size) if i == params["axis"] else shape[i])
                         for i in range(ndim)])  # fmt: skip
            start += int(size)
    elif name == "slice":
        if any(stride != 1 for stride in params["strides"] or ()):
            return None
        limits = zip(params["start_indices"], params["limit_indices"], strict=True)
        cuts = [[(start, limit - start) for start, limit in limits]]
    else:
        cuts = [list(zip(starts, params["slice_sizes"], strict=True))]
    out = []
    for cut in cuts:
        firsts: list[Any] = [0] * w.value.ndim
        sizes = list(w.value.shape)
        for axis, (start, size), whole in zip(w.axes, cut, shape, strict=True):
            if size == whole:
                continue
            if axis is None or packed.is_blocked(w.value, axis):
                return None
            firsts[axis], sizes[axis] = start, size
        out.append(w.moved(dynamic_slice(w.value, firsts, sizes), w.axes))
    return out


def _gathered(eqn: Any, w: Weight, indices: Any) -> list[Any] | None:
    """Return the entries that a gather selects along one unblocked axis; None for other gathers.

    Vectors of a look-up are decoded, matrices stay packed.
    """
    params, shape = eqn.params, w.shape
    dims, sizes = params["dimension_numbers"], params["slice_sizes"]
    one = len(dims.start_index_map) == 1 and not dims.operand_batching_dims
    if not one or dims.collapsed_slice_dims != dims.start_index_map:
        return None
    (at,) = dims.start_index_map
    axis, others = w.axes[at], [i for i in range(len(shape)) if i != at]
    if axis is None or packed.is_blocked(w.value, axis) or any(sizes[i] != shape[i] for i in others):
        return None
    q = packed.looked_up(w.value, indices[..., 0], axis, "clip" in str(params["mode"]).lower())
    count, ndim = indices.ndim - 1, len(eqn.outvars[0].aval.shape)
    places = dict(zip(dims.offset_dims, others, strict=True))
    batch, axes = iter(range(axis, axis + count)), []
    for j in range(ndim):
        own = w.axes[places[j]] if j in places else next(batch)
        axes.append(own if j not in places or own is None or own < axis else own + count - 1)
    out = w.moved(q, axes)
    return [out.array() if is_lookup(eqn) else out]
