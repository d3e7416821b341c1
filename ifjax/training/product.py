"""dot_general with a quantized forward and backward pass."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.typing import ArrayLike, DTypeLike

from ifjax.arrays import Blocking, QTensor, packed_shapes, quantize
from ifjax.arrays.encoders import gives_multiples
from ifjax.arrays.qtensor import unscaled_values
from ifjax.arrays.quantize import Multiples, operand_in_multiples, quantize_rotated
from ifjax.codec.blocks import pad_axis
from ifjax.codec.encode import amax_of
from ifjax.codec.rounding import seeds
from ifjax.numerics.byte_order import as_array
from ifjax.numerics.devices import device_kind
from ifjax.numerics.hadamard import hadamard, random_signs
from ifjax.numerics.xla import by_platform, opaque
from ifjax.products import dot_general
from ifjax.products.backends import BACKENDS, backend_for
from ifjax.products.dot_general import accumulator, as_varying, explicit_sharding, multiples
from ifjax.products.plan import DimensionNumbers, Dims, plan
from ifjax.training.recipes import Recipe, get_recipe

# The name of results for `jax.checkpoint`: policies that look for products do not look into these.
SAVED = "quantized_product"


def quantized_dot_general(
    x: ArrayLike,
    w: ArrayLike,
    dimension_numbers: DimensionNumbers,
    recipe: str | Recipe = "if4",
    key: jax.Array | None = None,
    *,
    amax: ArrayLike | None = None,
    precision: Any = None,
    preferred_element_type: DTypeLike | None = None,
    out_sharding: Any = None,
) -> jax.Array:
    """Multiply activations x by weights w as `jax.lax.dot_general` does, quantized forward and backward by a recipe.

    Several contracted axes count as one, in the order given, and so do several token axes. The last block along an axis
    is padded with zeros. Each operand has one amax, shared by its batch axes; under `jax.vmap` each member has its own,
    and inside `jax.shard_map` each device has its own. On CPUs values are multiplied and accumulated in float32.
    Elsewhere they are multiplied in the operands' dtype and accumulated in float32. Cotangents have the dtypes of x
    and w.

    The same key gives the same result under jit, scan, remat and vmap, up to the order of summation. The noise of an
    element does not depend on the sharding. Members of a vmap, and devices inside `jax.shard_map`, that share a key
    share its noise: split the key, or fold in `jax.lax.axis_index(axis)`.

    Under `jax.checkpoint`, `jax.checkpoint_policies.save_only_these_names("quantized_product")` keeps results, as
    `dots_saveable` keeps those of plain products.

    The product can be differentiated once, in reverse mode, since rounding has no second derivative. If the recipe
    quantizes nothing, or an operand is empty, the function calls `jax.lax.dot_general`.

    Args:
        x: activations, of any rank.
        w: weights, of any rank.
        dimension_numbers, precision, preferred_element_type, out_sharding: as in `jax.lax.dot_general`.
        recipe: a name in `ifjax.recipes.RECIPES` or a `Recipe`.
        key: a PRNG key, fresh for each layer and step. Recipes without noise ignore it.
        amax: float32 [3], the amax of x, of w and of y's cotangent, for formats with a tensor scale. It replaces the
            arrays' own amax, which then need not be computed first; 0 means the array's own. Larger values saturate.
            Rotated products, and operands whose recipe fixes an amax, ignore it. Its cotangent is not a gradient: it
            holds the three amax values of this call, to be passed to later calls. Give each product its own `amax`.

    Returns:
        The product, with the shape and dtype of `jax.lax.dot_general`.

    Raises:
        ValueError: the recipe needs a key and none is given; `amax` is not of shape [3]; a second derivative is taken.
        TypeError: the axes do not match, as in `jax.lax.dot_general`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from ifjax.training import quantized_dot_general
        >>> x, w = jnp.ones((8, 32)), jnp.eye(32)
        >>> def loss(w, key):
        ...     return quantized_dot_general(x, w, (((1,), (0,)), ((), ())), "if4", key).sum()
        >>> jax.jit(jax.grad(loss))(w, jax.random.key(0)).shape
        (32, 32)

        Compute the amax values at every tenth step and reuse them in between. XLA removes their computation from a step
        that does not return them:

        >>> def loss(w, amax, key):
        ...     y = quantized_dot_general(x, w, (((1,), (0,)), ((), ())), "ue5m3", key, amax=amax)
        ...     return (y * y).sum()
        >>> step, refresh = jax.jit(jax.grad(loss)), jax.jit(jax.grad(loss, (0, 1)))
        >>> amax = jnp.zeros(3)
        >>> for i in range(20):
        ...     key = jax.random.key(i)
        ...     gradient, amax = refresh(w, amax, key) if i % 10 == 0 else (step(w, amax, key), amax)
        >>> amax
        Array([1., 1., 2.], dtype=float32)
    """
    recipe = get_recipe(recipe)
    x, w = as_array(x), as_array(w)
    (x_contracted, w_contracted), (x_batch, w_batch) = (
        tuple(tuple(int(i) % a.ndim for i in axes) for axes, a in zip(pair, (x, w), strict=True))
        for pair in dimension_numbers
    )
    numbers = (x_contracted, w_contracted), (x_batch, w_batch)
    dtype = jnp.promote_types(x.dtype, w.dtype)
    amax = checked_amax(amax)
    plain = functools.partial(
        lax.dot_general, dimension_numbers=numbers, precision=precision, preferred_element_type=preferred_element_type
    )
    if not recipe.is_quantized or 0 in (*x.shape, *w.shape):
        return plain(x.astype(dtype), w.astype(dtype), out_sharding=out_sharding)
    sharding = explicit_sharding(functools.partial(lax.dot_general, dimension_numbers=numbers), (x, w), out_sharding)
    if sharding is not None:
        product = functools.partial(
            quantized_dot_general, dimension_numbers=numbers, recipe=recipe, precision=precision,
            preferred_element_type=preferred_element_type,
        )  # fmt: skip
        placed: Any = jax.sharding.auto_axes(
            lambda x, w, key, amax: product(x, w, key=key, amax=amax), out_sharding=sharding
        )
        return placed(x, w, key, amax)
    result: Any = jax.eval_shape(plain, *(jax.ShapeDtypeStruct(a.shape, dtype) for a in (x, w)))

    settings = Settings(recipe, precision, np.dtype(dtype), result.dtype, x.dtype, w.dtype)
    x, w = as_varying(x, w), as_varying(w, x)
    rows = _as_matrices(x, x_batch, _rest(x, x_batch, x_contracted), x_contracted)
    columns = _as_matrices(w, w_batch, w_contracted, _rest(w, w_batch, w_contracted))
    y: Any = _product(rows, columns, key, amax, settings)
    y = checkpoint_name(y.reshape(result.shape), SAVED)
    return y if out_sharding is None else jax.reshard(y, out_sharding)


def checked_amax(amax: ArrayLike | None) -> jax.Array | None:
    """Return a carried amax as float32 [3], or None; raise ValueError for any other shape."""
    if amax is None:
        return None
    amax = as_array(amax, jnp.float32)
    if amax.shape != (3,):
        raise ValueError(f"amax must be of shape (3,), the maxima of x, w and the gradient of y: got {amax.shape}")
    return amax


class Settings(NamedTuple):
    """The static arguments of a product; hashable."""

    recipe: Recipe
    precision: Any
    dtype: np.dtype  # the dtype in which operands are multiplied
    out_dtype: np.dtype
    x_dtype: np.dtype
    w_dtype: np.dtype


def _rest(a, *taken):
    return tuple(i for i in range(a.ndim) if all(i not in axes for axes in taken))


def _as_matrices(a, batch, rows, columns):
    """Reshape a to [rows, columns], or [batch, rows, columns] with batch axes; each group of axes becomes one."""
    groups = [batch, rows, columns] if batch else [rows, columns]
    a = jnp.transpose(a, [axis for group in groups for axis in group])
    lengths, shape = iter(a.shape), []
    for group in groups:
        shape.append(math.prod(next(lengths) for _ in group))
    return a.reshape(shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _product(x, w, key, amax, settings: Settings):
    """Return x [tokens, K] times w [K, N]; both may have a batch axis in front. `amax` is of x, w and g, or None."""
    return _forward(x, w, key, amax, settings)[0]


def _forward(x, w, key, amax, settings):
    """Return y and the quantized operands whose product it is."""
    recipe, (of_x, of_w, _), drawn = settings.recipe, three(amax), drawn_by(key, settings, "fprop")
    qx = operand_of(x, "fprop", "lhs", -1, drawn, settings, of_x, like=w, later=(recipe.wgrad, "lhs"))
    qw = operand_of(w, "fprop", "rhs", -2, drawn, settings, of_w, like=x, later=(recipe.dgrad, "rhs"))
    return _multiply(qx, qw, -1, -2, settings.dtype, settings.out_dtype, settings.precision), (qx, qw)


def three(amax):
    """Return the amax of x, of w and of y's cotangent, or three times None."""
    return (None, None, None) if amax is None else (amax[0], amax[1], amax[2])


def largest(a):
    """Return the largest finite magnitude in float32."""
    return amax_of(jnp.where(jnp.isfinite(a), jnp.abs(a), 0), ()).astype(jnp.float32)


def _product_fwd(x, w, key, amax, settings):
    recipe = settings.recipe
    if recipe.needs_key:
        _check_key(key, recipe)  # checked in the forward pass already, close to the call that lacks the key
    y, (qx, qw) = _forward(x, w, key, amax, settings)
    of_x, of_w, _ = three(amax)

    def kept(a, forward, operand, product_name, side, axis, amax):
        if operand.reuse:  # of both the bytes are kept, since the backward pass rounds what they mean anew
            has_both = isinstance(forward, Multiples) and forward.packed is not None and forward.values is not None
            return forward.packed if has_both else forward
        is_packed = recipe.residuals == "packed" and operand.is_packed_early
        drawn = drawn_by(key, settings, product_name) if is_packed else None
        return operand_of(a, product_name, side, axis, drawn, settings, amax) if is_packed else a

    for_dgrad = kept(w, qw, recipe.dgrad.rhs, "dgrad", "rhs", -1, of_w)
    for_wgrad = kept(x, qx, recipe.wgrad.lhs, "wgrad", "lhs", -2, of_x)
    # Empty slices of x and w. Through them `once` sees a second derivative with respect to x or w.
    nothing = [lax.slice_in_dim(a, 0, 0, axis=a.ndim - 1) for a in (x, w)]
    maxima = None if amax is None else (largest(x), largest(w))
    return y, (for_dgrad, for_wgrad, nothing, key, amax, maxima)


def _product_bwd(settings, residuals, g):
    for_dgrad, for_wgrad, nothing, key, amax, maxima = residuals
    of_x, of_w, of_g = three(amax)
    g, _ = once(g, nothing)
    drawn = drawn_by(key, settings, "dgrad", "wgrad")
    left = operand_of(g, "dgrad", "lhs", -1, drawn, settings, of_g, like=for_dgrad)
    right = operand_of(for_dgrad, "dgrad", "rhs", -1, drawn, settings, of_w, like=g)
    dx = _multiply(left, right, -1, -1, settings.dtype, settings.x_dtype, settings.precision)
    left = operand_of(for_wgrad, "wgrad", "lhs", -2, drawn, settings, of_x, like=g)
    right = operand_of(g, "wgrad", "rhs", -2, drawn, settings, of_g, like=for_wgrad)
    like = None
    if isinstance(left, QTensor | Multiples) and not isinstance(for_wgrad, QTensor | Multiples):
        like = pad_axis(for_wgrad, left.shape[-2], -2)
    dw = _multiply(left, right, -2, -2, settings.dtype, settings.w_dtype, settings.precision, like)
    return dx, dw, None, None if maxima is None else jnp.stack([*maxima, largest(g)])


_product.defvjp(_product_fwd, _product_bwd)


@jax.custom_jvp
def once(g, nothing):
    return g, nothing


@once.defjvp
def _once_jvp(primals, tangents):
    raise ValueError(
        "quantized_dot_general is differentiable once: rounding has no second derivative. Take second derivatives "
        "with recipe='bf16', or stop them with jax.lax.stop_gradient"
    )


def operand_of(
    a: Any, product_name, side, axis, drawn, settings, amax=None, *, like: Any = None, later: Any = None
) -> Any:
    """Return a, quantized along the contraction axis for one side of the named product: a QTensor or an array.

    `drawn` is that of `drawn_by`. `amax` replaces a's own; None or 0 means a's own. With the other operand as `like`,
    the result is Multiples where the device's encoder gives them and decoded values are multiplied. `later` is the
    product of the backward pass that may reuse the result, and its side.
    """
    product = getattr(settings.recipe, product_name)
    operand, size = getattr(product, side), product.hadamard
    if isinstance(a, QTensor | Multiples):
        if not _rounds_anew(product, side):
            return a  # already quantized for this product, or reused unchanged
        a = (a if isinstance(a, QTensor) else a.packed).dequantize()
    a, key, rotated = lax.stop_gradient(a), None, {}
    at, own = _PRODUCTS.index(product_name), 0 if side == "lhs" else 1
    if operand.is_random:
        key = (drawn.seeds if operand.how.rounding.takes_seeds else drawn.keys)[at, own]
    if size:
        a = pad_axis(a, -(-a.shape[axis] // size) * size, axis)
        signs = random_signs(drawn.keys[at, 2], size) if product.signs == "fresh" else product.signs
        if operand.how is not None and operand.how.rounding.rotates:
            return operand.how.rounding.operand(
                a, operand.how.fmt, key=key, axis=axis, size=size, signs=signs, amax=operand.amax,
                in_multiples=_takes_multiples(a, like, product_name, side, settings),
            )  # fmt: skip
        if operand.how is None:
            return hadamard(a, axis=axis, size=size, signs=signs)
        rotated = {"size": size, "signs": signs}
    if operand.how is None:
        return a
    if size or operand.amax is not None or not operand.how.fmt.has_tensor_scale:
        amax = operand.amax
    elif amax is not None:
        amax = lax.cond(amax > 0, lambda a, amax: amax, lambda a, amax: largest(a), a, amax)
    how, place = operand.how, {"axis": axis, "key": key, "amax": amax, **rotated}
    if _takes_multiples(a, like, product_name, side, settings):
        is_kept, rounds_anew = (False, False) if later is None else (getattr(*later).reuse, _rounds_anew(*later))
        wants = {"wants_codes": is_kept, "wants_values": rounds_anew or not is_kept}
        found = operand_in_multiples(a, how, **wants, **place)
        if found is not None:
            return found
    return quantize_rotated(a, how, **place) if size else quantize(a, how, **place)


_CONTRACTED = {"fprop": (-1, -2), "dgrad": (-1, -1), "wgrad": (-2, -2)}
_PRODUCTS = tuple(_CONTRACTED)


def _rounds_anew(product, side):
    """Return whether a product rounds what it reuses of the forward pass once more."""
    operand = getattr(product, side)
    return operand.reuse and bool(operand.fmt or product.hadamard)


def _takes_multiples(a, other, product_name, side, settings):
    """Return whether a product takes a's values from an encoder: both operands are decoded before they are multiplied.

    `other` is the other operand; None if it is not known.
    """
    if other is None or not gives_multiples():
        return False
    product, dtype, axes = getattr(settings.recipe, product_name), settings.dtype, _CONTRACTED[product_name]
    if a.dtype != dtype or dtype not in (np.float32, jnp.bfloat16):  # float16 represents other multiples exactly
        return False
    packed, device = [], device_kind()
    for array, own, axis in zip((a, other) if side == "lhs" else (other, a), ("lhs", "rhs"), axes, strict=True):
        operand = getattr(product, own)
        if isinstance(array, Multiples):
            array = array.values if array.packed is None else array.packed
        if not isinstance(array, QTensor) or _rounds_anew(product, own):
            if operand.how is None:
                return False
            if backend_for(device) is not None:
                array = jax.eval_shape(functools.partial(_zeros, array.shape, operand.how, axis, dtype))
        packed.append(array)
    if backend_for(device) is None:
        return True
    batch = tuple(range(a.ndim - 2))
    dims = Dims((a.ndim + axes[0],), (a.ndim + axes[1],), batch, batch)
    lhs, rhs = packed
    return plan(lhs, rhs, dims, dtype, device).path not in BACKENDS


def _zeros(shape, how, axis, dtype):
    fmt, headroom = how.rounding.packed(how.fmt) if how.rounding.rotates else (how.fmt, how.headroom)
    codes, scales = (jnp.zeros(s, jnp.uint8) for s in packed_shapes(shape, fmt, axis))
    blocking = Blocking(fmt, axis, shape[axis], dtype, headroom, how.block_2d)
    return QTensor(codes, scales, jnp.float32(0) if fmt.has_tensor_scale else None, blocking)


class Drawn(NamedTuple):
    """What the three products draw from a key.

    Attributes:
        seeds: int32 [3, 2, 2]: the `seeds` of the operands' noise.
        keys: [3, 3]: keys for the signs of rotations, and for operands' noise from a key; None if not needed.
    """

    seeds: jax.Array
    keys: Any


def drawn_by(key: jax.Array | None, settings: "Settings", *products: str) -> Any:
    """Return what the three products draw from a key, all at once; None if those named draw nothing."""
    named = [getattr(settings.recipe, product) for product in products]
    if not any(product.is_random for product in named):
        return None
    _check_key(key, settings.recipe)
    return _drawn(key, any(product.draws_keys for product in named))


@jax.jit(static_argnums=1)
def _drawn(key, needs_keys):
    parts = lax.broadcasted_iota(jnp.int32, (3, 2), 0) * np.int32(2) + lax.broadcasted_iota(jnp.int32, (3, 2), 1)
    return Drawn(seeds(key, parts), jax.random.split(key, (3, 3)) if needs_keys else None)


def _check_key(key, recipe):
    if key is None:
        raise ValueError(
            f"recipe {recipe.name!r} draws noise: pass key=, a fresh one for each layer and step, such as "
            "jax.random.fold_in(jax.random.key(0), step). For Flax modules: rngs={'quantize': key}, and 'quantize' "
            "among the split_rngs of nn.scan and nn.vmap"
        )


@jax.jit(static_argnums=(2, 3, 4, 5, 6))  # outside of a jit, this compiles once for all recipes
def _multiply(a, b, a_axis, b_axis, dtype, out_dtype, precision, like=None):
    """Return the product of a and b, contracted along a_axis and b_axis: [batch, a's free axis, b's free axis].

    `like` is the array from which the QTensor `a` was quantized, or None. Without it XLA propagates the output sharding
    before that of the codes, and all-gathers activations for the weight gradient instead of reducing partial sums.
    """
    batch = (tuple(range(a.ndim - 2)),) * 2
    numbers: Any = ((a.ndim + a_axis,), (b.ndim + b_axis,)), batch

    def product(dtype, a, b, like):
        is_shared = like is not None and jax.device_count() > 1
        if not is_shared and not isinstance(a, Multiples) and not isinstance(b, Multiples):
            return dot_general(a.astype(dtype), b.astype(dtype), numbers, precision, out_dtype)
        values, factor = _in_multiples(a, dtype)
        if is_shared:
            values = jnp.where(like != like, jnp.nan, values)  # a no-op: both are NaN at the same places
        if not isinstance(b, Multiples):
            y = dot_general(values, b.astype(dtype), numbers, precision, accumulator(out_dtype))
        else:
            others, of_b = _in_multiples(b, dtype)
            y = lax.dot_general(values, others, numbers, precision, accumulator(dtype)) * of_b
        return (y * factor).astype(out_dtype)

    if not any(isinstance(each, QTensor | Multiples) for each in (a, b)):
        return product(dtype, a, b, like)
    by_dtype = functools.partial(product, dtype)
    if dtype.itemsize != 2:
        return opaque(by_dtype, a, b, like)  # for policies of `jax.checkpoint`: see SAVED
    # XLA:CPU does not multiply 16-bit matrices faster than float32 ones, and float32 avoids a second rounding.
    return by_platform(a, b, like, cpu=functools.partial(product, np.dtype(np.float32)), default=by_dtype)


def _in_multiples(a, dtype):
    """Return the values of an operand without the tensor's factor, as `dtype`, and the factor: 1 if it has none."""
    if isinstance(a, QTensor):
        return multiples(a.astype(dtype), dtype)
    if not isinstance(a, Multiples):
        return a.astype(dtype), np.float32(1)
    values = unscaled_values(a.packed, dtype) if a.values is None else a.values.astype(dtype)
    return values, np.float32(1) if a.factor is None else a.factor
