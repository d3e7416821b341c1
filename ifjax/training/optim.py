"""Optimizer moments in block-scaled formats, at 6.5 bits each instead of 32.

    packed state -> decode -> the inner optimizer's step in float -> encode with fresh noise -> packed state

A moment is an average over many steps, and each step changes it by less than the format's resolution (by a thousandth,
for Adam's second moment). Rounding to nearest would lose such steps, so rounding is stochastic and unbiased. The noise
adds up over the steps that the average covers. Three measures keep it small and harmless:

* The tensor scale is a power of two. Otherwise each step shifts the grid slightly under values that lie on it, and all
  of them are rounded again.
* A second moment is stored as its square root, which spans half the orders of magnitude and is what Adam divides by.
* A root never decodes to zero unless the whole tensor is zero. Its least value is its block's smallest step. Otherwise
  m / (sqrt(0) + eps) is a million times too large.

Measured for Adam (b2 = 0.999, if6, gradients whose scales differ within a tensor by a factor e^1.5, one standard
deviation): the largest update is 1.3 in float32; 1e7 with unchanged second moments, 2e6 with their roots, 8.5 with
roots that are never zero, and 3.9 with all three measures. The power-of-two scale halves the error of sqrt(nu).
"""

import functools
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from ifjax.arrays import QTensor, quantize
from ifjax.codec.blocks import crop, merge_blocks, pick
from ifjax.codec.decode import decode
from ifjax.formats import Format, get_format

# Fields of optax's states that hold averages or sums of squares. A name without a type matches any state.
SECOND_MOMENTS = (
    "nu", "nu_max", "exp_avg_sq", "sum_of_squares", "grad_sum_sq",
    "FactoredState.v", "FactoredState.v_row", "FactoredState.v_col",
    "ScaleByAdanState.n", "ScaleByAdaDeltaState.e_g", "ScaleByAdaDeltaState.e_x",
)  # fmt: skip
# Fields with such a name that hold signed averages.
_FIRST_MOMENTS = ("ScaleBySM3State.nu",)
# Fields that have the parameters' shapes but hold parameters or step sizes. Rounding them would change the model.
NOT_MOMENTS = (
    "x0", "params0", "init_params", "init_particles",
    "ScheduleFreeState.z", "SAMState.cache", "ScaleByRpropState.step_sizes",
)  # fmt: skip


class PackedMoment(NamedTuple):
    """A quantized moment in an optimizer state."""

    values: QTensor


class PackedRoot(NamedTuple):
    """A quantized second moment in an optimizer state, stored as its square root."""

    values: QTensor


class QuantizedMomentsState(NamedTuple):
    """The state of `quantized_moments`; a pytree of arrays.

    Attributes:
        count: number of steps so far.
        key: raw data of the key from which, with `count`, each step's noise is derived. It never changes.
        inner_state: the inner transformation's state, with PackedMoment and PackedRoot in place of large moments.
    """

    count: jax.Array
    key: jax.Array
    inner_state: Any


def quantized_moments(
    inner: optax.GradientTransformation,
    fmt: str | Format = "if6",
    *,
    second_fmt: str | Format | None = None,
    seed: int | jax.Array = 0,
    min_size: int = 4096,
    second: Collection[str] = SECOND_MOMENTS,
    keep: Collection[str] = NOT_MOMENTS,
) -> optax.GradientTransformationExtraArgs:
    """Return `inner` with the moments in its state stored as packed QTensors.

    Moments are the float arrays that the state holds for each parameter, as found by `optax.tree_map_params`. Each step
    decodes them, runs `inner` in their own dtype and encodes them again. The noise is derived from the state's key and
    count, so the same state and gradients give the same step, also after restoring a checkpoint. Blocks lie along the
    last axis; if padding would add more than an eighth to it, they lie along the axis with the least padding. The
    transformation works under jit, with donated or sharded states (see `QTensor`), and inside `optax.chain`, `masked`,
    `partition`, `inject_hyperparams` and `MultiSteps`.

    It saves no memory within a step: under jit all moments may be decoded at once. It leaves gradients and parameters
    unchanged. A parameter that is itself a packed QTensor has no gradient: exclude it by `optax.masked` with
    `ifjax.trainable_mask`. A step that `inner` skips still rounds the moments, so apply `MultiSteps` and
    `apply_if_finite` outside of this transformation. A NaN or infinity turns all moments of its block into NaN.

    Args:
        inner: any transformation that `optax.tree_map_params` supports.
        fmt: the format of moments. Of formats that choose between two decodings, if6 has a bias of 0.01%, if4 of 0.6%.
        second_fmt: the format of second moments; by default `fmt`. Noise enlarges small second moments, so that their
            parameters learn more slowly: in the module's example sqrt(nu) is 1.1 times too large with if6 (geometric
            mean over values), and 5 times with if4.
        seed: the seed of the noise, an integer or a typed key of `jax.random.key`.
        min_size: moments with fewer values (biases, norms, scalars) stay unquantized.
        second: state fields that are never negative and by which the update is divided. They are stored as square roots
            and decode to positive values, unless the whole tensor is zero. "nu" names this field of any NamedTuple,
            "ScaleByAdanState.n" a field of one.
        keep: state fields that stay unquantized, named likewise.

    Returns:
        A transformation whose state is a QuantizedMomentsState.

    Raises:
        TypeError: `inner` is not a gradient transformation; `seed` is neither an integer nor a typed key; `second` or
            `keep` is a string.
        ValueError: the format is unknown; `min_size` is not positive; on `init`, there is nothing to quantize.

    Source: 8-bit optimizers (arXiv 2110.02861) and 4-bit optimizers (arXiv 2309.01507) round to nearest on nonlinear
    grids, the latter without a zero for second moments. This transformation uses the grids of block-scaled formats,
    stochastic rounding, and square roots instead of nonlinear grids.

    Example:
        >>> import jax, jax.numpy as jnp, optax
        >>> from ifjax.training.optim import quantized_moments
        >>> params = {"kernel": jnp.ones((64, 256)), "bias": jnp.ones(256)}
        >>> optimizer = quantized_moments(optax.adamw(1e-3), "if6")
        >>> state = optimizer.init(params)
        >>> print(state.inner_state[0].nu["kernel"].values)
        QTensor(if6_e2m3, 64x256 float32, axis=-1, 6.502 bits a value)
        >>> float(state.inner_state[0].nu["bias"].sum())  # small ones stay float32
        0.0
    """
    if not (hasattr(inner, "init") and hasattr(inner, "update")):
        raise TypeError(f"inner must be an optax.GradientTransformation, got {type(inner).__name__}")
    first_fmt = get_format(fmt)
    root_fmt = first_fmt if second_fmt is None else get_format(second_fmt)
    if isinstance(min_size, bool) or not isinstance(min_size, int) or min_size < 1:
        raise ValueError(f"min_size must be a positive integer, got {min_size!r}")
    for name, fields in (("second", second), ("keep", keep)):
        if isinstance(fields, str):
            raise TypeError(f"{name} must be a collection of field names, got a string: write ({fields!r},)")
    impl = _checked_seed(seed)
    inner = optax.with_extra_args_support(inner)

    def init(params):
        state, packed, sizes = inner.init(params), [], []

        def pack_leaf(x, is_second):
            if isinstance(x, QTensor) or not jnp.issubdtype(jnp.result_type(x), jnp.floating):
                return x
            sizes.append(x.size)
            if x.size < min_size or x.ndim == 0:
                return x
            kind, record = (PackedRoot, root_fmt) if is_second else (PackedMoment, first_fmt)
            packed.append(kind)
            key = jax.random.key(0, impl=impl)  # moments start as zeros or constants, so this noise does not matter
            return kind(_encode(x, key, fmt=record, axis=_block_axis(x.shape, record.block), root=is_second))

        def pack_field(tree, field):
            if _matches(field, keep):
                return tree
            is_second = _matches(field, second) and not _matches(field, _FIRST_MOMENTS)
            return jax.tree.map(lambda x: pack_leaf(x, is_second), tree, is_leaf=lambda x: isinstance(x, QTensor))

        state = _map_moments(inner, pack_field, state)
        # If params has no leaves, all parameters are masked, or optax only queries the state's structure.
        if jax.tree.leaves(params) and not packed:
            raise ValueError(_why_nothing(sizes, min_size))
        key = jax.random.key(seed) if impl is None else seed
        # The key is copied, so that donating the state does not delete the caller's key.
        return QuantizedMomentsState(jnp.zeros((), jnp.int32), jnp.array(jax.random.key_data(key), copy=True), state)

    def update(updates, state, params=None, **extra_args):
        updates, after = inner.update(updates, dequantize_moments(state), params, **extra_args)
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key, impl=impl), state.count)
        index = iter(range(10**9))

        def pack_again(before, x):
            if not _is_packed(before):
                return x
            q, noise = before.values, jax.random.fold_in(key, next(index))
            return type(before)(_encode(x, noise, fmt=q.fmt, axis=q.axis, root=isinstance(before, PackedRoot)))

        packed = jax.tree.map(pack_again, state.inner_state, after, is_leaf=_is_packed)
        return updates, QuantizedMomentsState(jnp.asarray(optax.safe_increment(state.count)), state.key, packed)

    return optax.GradientTransformationExtraArgs(init, update)


def dequantize_moments(state: QuantizedMomentsState) -> Any:
    """Return the inner transformation's own state, with all moments as float arrays, from which `inner` can continue.

    Raises:
        TypeError: `state` is not a QuantizedMomentsState.
    """
    if not isinstance(state, QuantizedMomentsState):
        raise TypeError(f"needs the state of quantized_moments, got {type(state).__name__}")
    return jax.tree.map(lambda x: _decode(x) if _is_packed(x) else x, state.inner_state, is_leaf=_is_packed)


# --- below the surface -----------------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames=("fmt", "axis", "root"))
def _encode(x, key, *, fmt, axis, root):
    y = x
    if root:  # a state of someone's own may hold signed numbers under this name: they keep their signs
        wide = x.astype(jnp.float32)
        y = jnp.copysign(jnp.sqrt(jnp.abs(wide)), wide)
    amax = None
    if fmt.has_tensor_scale:
        magnitude = jnp.abs(y).astype(jnp.float32)
        amax = _power_of_two_above(jnp.max(jnp.where(magnitude < jnp.inf, magnitude, 0)))
    q = quantize(y, fmt, axis=axis, rounding="stochastic_unbiased", key=key, amax=amax)
    return q.astype(x.dtype)


@jax.jit
def _decode(packed):
    q = packed.values
    if not isinstance(packed, PackedRoot):
        return q.dequantize()
    root = q.dequantize(jnp.float32)
    root = jnp.where(root < 0, root, jnp.maximum(root, _least_positive(q)))
    return (root * jnp.abs(root)).astype(q.dtype)


def _power_of_two_above(amax):
    """Return the least power of two not below amax; 0 for 0."""
    bits = lax.bitcast_convert_type(amax, jnp.int32)
    bits = (bits + 0x7FFFFF) & 0x7F800000
    # 2^127 is float32's largest power of two. Values above it saturate: `quantize` does not use its headroom for them.
    return jnp.minimum(lax.bitcast_convert_type(bits, jnp.float32), np.float32(2.0**127))


def _least_positive(q):
    """Return the least positive value of each element's block, float32 of q's shape; zeros if amax is zero.

    A block scale of zero counts as the least positive scale.
    """
    selector, payload = q.fmt.split(q.headers())
    headers = q.fmt.join(selector, jnp.maximum(payload, 1))
    codes = pick(selector, [jnp.int32(d.grid.least_positive) for d in q.fmt.decodings])
    # Computed for each place in the block, because with several factors per block the step differs by place.
    place = jnp.arange(q.fmt.block, dtype=jnp.int32).reshape(-1, *[1] * (-q.axis - 1))
    headers, codes = (jnp.expand_dims(jnp.broadcast_to(a, headers.shape), q.axis) for a in (headers, codes))
    amax, at = q.amax, q.ndim + q.axis
    if amax is not None and amax.ndim > at:
        amax = jnp.expand_dims(amax, at + 1)
    least = decode(codes, headers, q.fmt, place=place, amax=amax, headroom=q.headroom)
    shape = list(least.shape)
    shape[q.axis] = q.fmt.block
    return crop(merge_blocks(jnp.broadcast_to(least, shape), q.axis), q.shape[q.axis], q.axis)


def _block_axis(shape, block):
    """Return the last axis, or the axis with the least padding if padding would add more than an eighth to the last."""

    def waste(axis):
        return -(-shape[axis] // block) * block / shape[axis]

    return -1 if waste(-1) <= 9 / 8 else min(range(-1, -len(shape) - 1, -1), key=waste)


class _Field(NamedTuple):
    """A marker around a subtree of the state that has the parameters' structure; `_map_moments` treats it as a leaf."""

    tree: Any


def _map_moments(inner, f: Callable[[Any, str], Any], state):
    """Return the state with each subtree of the parameters' structure replaced by f(subtree, "TypeName.field")."""

    def visit(node, field):
        if isinstance(node, _Field):
            return f(node.tree, field)
        if _is_namedtuple(node):
            name = type(node).__name__
            return type(node)(*(visit(getattr(node, child), f"{name}.{child}") for child in node._fields))
        return jax.tree.map(
            lambda x: visit(x, field) if _is_namedtuple(x) else x, node, is_leaf=lambda x: _is_namedtuple(x)
        )

    # `is_leaf` is always true, so that the function gets each such subtree as a whole.
    marked = optax.tree_map_params(inner, _Field, state, is_leaf=lambda _: True)
    return visit(marked, "")


def _is_namedtuple(x):
    return isinstance(x, tuple) and hasattr(x, "_fields")


def _is_packed(x):
    return isinstance(x, PackedMoment | PackedRoot)


def _matches(field, names):
    return field in names or field.rpartition(".")[2] in names


def _checked_seed(seed):
    """Return the name of the key's PRNG implementation; None for an integer seed, which uses the default one."""
    if isinstance(seed, int) and not isinstance(seed, bool):
        return None
    if isinstance(seed, jax.Array) and jnp.issubdtype(seed.dtype, jax.dtypes.prng_key) and seed.ndim == 0:
        return jax.random.key_impl(seed)
    raise TypeError(f"seed must be an integer or a key such as jax.random.key(0), got {type(seed).__name__}")


def _why_nothing(sizes, min_size):
    if sizes:
        return (
            f"nothing to quantize: the largest moment has {max(sizes)} values, min_size={min_size} leaves it as it is. "
            "Lower min_size, or use the inner transformation alone"
        )
    return (
        "nothing to quantize: the inner transformation keeps no float arrays for the parameters, other than those that "
        "`keep` names. Use it alone"
    )
