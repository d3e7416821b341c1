"""Quantized training: a product with a quantized backward pass, and recipes that say what it quantizes, as records.

A linear layer y = x w multiplies three times, and each product has two operands of its own:

    fprop  y  = x w     x and w, blocks along the contracted axes
    dgrad  dx = g w^T   g and w, blocks along w's free axes
    wgrad  dw = x^T g   x and g, blocks along x's free axes: the tokens

Blocks, and rotations, always lie along what the product contracts, so no operand of one product is that of another;
only square blocks look alike from both sides. No line of this module asks which recipe it is.
"""

import dataclasses
import difflib
import functools
import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike, DTypeLike

from ifjax import codec
from ifjax.arrays.ms_eden import check_format, ms_eden
from ifjax.arrays.qtensor import QTensor, quantize
from ifjax.formats import FORMATS, Format, get_format
from ifjax.numerics.hadamard import SIZES, hadamard, random_signs
from ifjax.products.dot_general import DimensionNumbers, _as_varying, dot_general_like

# --- the records -----------------------------------------------------------------------------------------------------


_ROUNDINGS = ("nearest", "stochastic", "stochastic_unbiased", "ms_eden")


def _need(record, field, fits, needed):
    if not fits:
        kind = type(record).__name__
        raise ValueError(f"{kind}: {field} must be {needed}, got {getattr(record, field)!r}")


@dataclasses.dataclass(frozen=True)
class Operand:
    """How one operand of one product is quantized. Hashable; `Operand()` leaves it in high precision.

    Named formats are kept by their name, others as records, whichever way they are given.

    Attributes:
        fmt: a format's name or record; None multiplies the array as it is.
        rounding: as for `ifjax.quantize`, or "ms_eden", which rounds scales at random instead of elements.
        block_2d: scale and choice are shared by squares. Over all axes that are contracted, as one, and all that are
            not.
        loss: as for `ifjax.quantize`; the format's own unless given.
        amax: a fixed one, for arrays whose magnitudes are known to be bounded, instead of the largest magnitude.
        reuse: in backward products, start from what fprop multiplied instead of from the array: the forward pass's
            rounded values, kept packed. With fmt=None they are multiplied as they are.

    Raises:
        ValueError: a field that cannot be, or has no effect; the message says what to write instead.
    """

    fmt: str | Format | None = None
    rounding: Literal["nearest", "stochastic", "stochastic_unbiased", "ms_eden"] = "nearest"
    _: dataclasses.KW_ONLY
    block_2d: bool = False
    loss: codec.Loss | None = None
    amax: float | None = None
    reuse: bool = False

    def __post_init__(self):
        _need(self, "rounding", self.rounding in _ROUNDINGS, f"one of {', '.join(map(repr, _ROUNDINGS))}")
        for field in ("block_2d", "reuse"):
            _need(self, field, isinstance(getattr(self, field), bool), "True or False")
        loss_fits = self.loss is None or callable(self.loss) or self.loss in codec.LOSSES
        _need(self, "loss", loss_fits, f"one of {sorted(codec.LOSSES)}, a function, or None for the format's own")
        is_number = isinstance(self.amax, int | float) and not isinstance(self.amax, bool)
        amax_fits = self.amax is None or (is_number and 0 < self.amax < math.inf)
        _need(self, "amax", amax_fits, "a finite number > 0, or None for the largest magnitude at hand")
        if self.fmt is None:
            for field, default in (("rounding", "nearest"), ("block_2d", False), ("loss", None), ("amax", None)):
                if getattr(self, field) != default:
                    raise ValueError(
                        f"Operand: {field}={getattr(self, field)!r} has no effect with fmt=None, which leaves the "
                        "operand in high precision: leave it out, or name a fmt"
                    )
            return
        fmt = get_format(self.fmt)
        object.__setattr__(self, "fmt", fmt.name if FORMATS.get(fmt.name) == fmt else fmt)
        if self.amax is not None and fmt.scale.largest is None:
            raise ValueError(f"Operand: {fmt.name} has no tensor scale, so amax does not apply: leave it out")
        if self.rounding == "ms_eden" and (self.block_2d or self.loss is not None):
            raise ValueError(
                "Operand: rounding='ms_eden' has 1-D blocks and a rule of its own for the choice: leave block_2d and "
                "loss out"
            )

    @property
    def is_random(self) -> bool:
        """Whether rounding draws noise."""
        return self.rounding != "nearest"


@dataclasses.dataclass(frozen=True)
class Product:
    """The two operands of a product, and the rotation of both, which leaves the product itself unchanged.

    Attributes:
        lhs, rhs: x and w of fprop, g and w of dgrad, x and g of wgrad.
        hadamard: run length of `ifjax.hadamard` along the contracted axis of both; None does not rotate. Lengths that
            it does not divide are filled up with zeros.
        signs: "fixed" and None as for `ifjax.hadamard`; "fresh" draws new ones from each key.

    Raises:
        ValueError: a field that cannot be, or has no effect; the message says what to write instead.
    """

    lhs: Operand = Operand()
    rhs: Operand = Operand()
    _: dataclasses.KW_ONLY
    hadamard: int | None = None
    signs: Literal["fixed", "fresh"] | None = "fixed"

    def __post_init__(self):
        for field in ("lhs", "rhs"):
            _need(self, field, isinstance(getattr(self, field), Operand), "an Operand, as in Operand('if4')")
        _need(self, "hadamard", self.hadamard is None or self.hadamard in SIZES, f"None or one of {SIZES}")
        _need(self, "signs", self.signs in ("fixed", "fresh", None), "'fixed', 'fresh' or None")
        if self.hadamard is None and self.signs != "fixed":
            raise ValueError(f"Product: signs={self.signs!r} has no effect without hadamard: leave it out, or name one")
        if self.hadamard is not None and not self.is_quantized:
            raise ValueError(
                "Product: hadamard has no effect on operands in high precision: leave it out, or name a fmt"
            )
        for operand in self.operands:
            if operand.rounding == "ms_eden":
                if self.hadamard is None:
                    raise ValueError(
                        "Product: rounding='ms_eden' is unbiased for rotated operands only: write hadamard=16 or "
                        "hadamard=128, with signs='fresh'"
                    )
                check_format(operand.fmt or "", self.hadamard)

    @property
    def operands(self) -> tuple[Operand, Operand]:
        """lhs and rhs."""
        return self.lhs, self.rhs

    @property
    def is_quantized(self) -> bool:
        """Whether an operand is."""
        return any(operand.fmt is not None for operand in self.operands)

    @property
    def is_random(self) -> bool:
        """Whether it needs a key."""
        drawn = self.hadamard is not None and self.signs == "fresh"
        return drawn or any(operand.is_random for operand in self.operands)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What `quantized_dot_general` quantizes, how, and what it saves. Hashable; usable as a static jit argument.

    Attributes:
        name: what reports call it.
        fprop, dgrad, wgrad: the products of y, of the gradient for x and of that for w.
        residuals: what the backward pass finds of operands that it quantizes itself. "float": the arrays, quantized
            then. "packed": already quantized by the forward pass, to the same bytes, so that activations take 4.5
            bits a value where the array itself is not needed elsewhere. MS-EDEN's operands are never packed; reused
            ones always are.
        source: where it comes from.

    Raises:
        ValueError: products that do not fit together; the message says what to write instead.

    Example:
        IF4 in the forward pass and nowhere else, with gradients of the rounded operands:

        >>> from ifjax.training.recipes import Operand, Product, Recipe
        >>> reused, if4 = Operand(reuse=True), Operand("if4")
        >>> Recipe("mine", Product(if4, if4), dgrad=Product(rhs=reused), wgrad=Product(lhs=reused)).needs_key
        False
    """

    name: str
    fprop: Product = Product()
    dgrad: Product = Product()
    wgrad: Product = Product()
    _: dataclasses.KW_ONLY
    residuals: Literal["float", "packed"] = "float"
    source: str = ""

    def __post_init__(self):
        for field in ("name", "source"):
            _need(self, field, isinstance(getattr(self, field), str), "a string")
        for field in ("fprop", "dgrad", "wgrad"):
            _need(self, field, isinstance(getattr(self, field), Product), "a Product, as in Product(Operand('if4'))")
        _need(self, "residuals", self.residuals in ("float", "packed"), "'float' or 'packed'")
        cannot_reuse = {"fprop.lhs": self.fprop.lhs, "fprop.rhs": self.fprop.rhs}
        cannot_reuse |= {"dgrad.lhs": self.dgrad.lhs, "wgrad.rhs": self.wgrad.rhs}
        for place, operand in cannot_reuse.items():
            if operand.reuse:
                raise ValueError(
                    f"{self.name}: {place} has nothing to reuse: only dgrad.rhs (the w of fprop) and wgrad.lhs (its x) "
                    "can; write reuse=False"
                )
        for place, operand, forward in self._saved:
            if operand.reuse and (forward.fmt is None or forward.rounding == "ms_eden" or self.fprop.hadamard):
                raise ValueError(
                    f"{self.name}: {place} cannot reuse what fprop multiplies, which is not quantized, or is rotated, "
                    "or is not packed (MS-EDEN): write reuse=False"
                )
        if self.residuals == "packed" and not any(_is_packed_early(operand) for _, operand, _ in self._saved):
            raise ValueError(
                f"{self.name}: residuals='packed' packs nothing, as the backward pass quantizes neither w nor x to "
                "packed bytes from the arrays themselves: write residuals='float'"
            )

    @property
    def is_quantized(self) -> bool:
        """Whether any product is."""
        return any(product.is_quantized for product in (self.fprop, self.dgrad, self.wgrad))

    @property
    def needs_key(self) -> bool:
        """Whether some product draws noise or signs. Forward alone a key is needed only if fprop does."""
        return any(product.is_random for product in (self.fprop, self.dgrad, self.wgrad))

    @property
    def _saved(self):
        yield "dgrad.rhs", self.dgrad.rhs, self.fprop.rhs
        yield "wgrad.lhs", self.wgrad.lhs, self.fprop.lhs


def get_recipe(recipe: str | Recipe) -> Recipe:
    """The record itself, or the named one.

    Raises:
        ValueError: unknown name; the message lists the nearest ones.
        TypeError: neither a name nor a Recipe.
    """
    if isinstance(recipe, Recipe):
        return recipe
    if not isinstance(recipe, str):
        raise TypeError(f"recipe must be a recipe's name or an ifjax.recipes.Recipe, got {type(recipe).__name__}")
    if recipe not in RECIPES:
        near = difflib.get_close_matches(recipe, RECIPES, n=3, cutoff=0.4) or sorted(RECIPES)
        raise ValueError(f"unknown recipe {recipe!r}; did you mean {', '.join(near)}? See ifjax.recipes.RECIPES")
    return RECIPES[recipe]


def _is_packed_early(operand: Operand) -> bool:
    """Whether residuals="packed" quantizes it in the forward pass."""
    return operand.fmt is not None and operand.rounding != "ms_eden" and not operand.reuse


# --- the named ones --------------------------------------------------------------------------------------------------


def _named():
    high, reused = Operand(), Operand(reuse=True)

    # Square blocks for w, so that dgrad reuses what fprop multiplied; wgrad rotated by H16 with the fixed signs;
    # gradients rounded stochastically, all else to nearest.
    def square(name, fmt, source, wgrad_fmt=None, rounding: Any = "stochastic_unbiased"):
        gradient, wgrad_fmt = Operand(fmt, rounding), wgrad_fmt or fmt
        return Recipe(
            name,
            fprop=Product(Operand(fmt), Operand(fmt, block_2d=True)),
            dgrad=Product(gradient, reused),
            wgrad=Product(Operand(wgrad_fmt), Operand(wgrad_fmt, rounding), hadamard=16),
            source=source,
        )

    # Blocks along the axis; all four operands of the backward pass by MS-EDEN, w and x from their rounded values.
    def eden(name, fmt, backward, source, hadamard=16, signs=None):
        fresh = Operand(backward, "ms_eden")
        again = Operand(backward, "ms_eden", reuse=True)
        return Recipe(
            name,
            fprop=Product(Operand(fmt), Operand(fmt)),
            dgrad=Product(fresh, again, hadamard=hadamard, signs=signs),
            wgrad=Product(again, fresh, hadamard=hadamard, signs=signs),
            source=source,
        )

    yield Recipe("bf16", source="nothing quantized: operands as they come, in bfloat16 if they are")

    published = "IF4 (arXiv 2603.28765), training configuration"
    yield square("nvfp4", "nvfp4", f"{published} nvfp4")
    yield square("fouroversix", "fouroversix", f"{published} nvfp4_fouroversix; arXiv 2512.02010")
    yield square("nvint4", "nvint4", f"{published} nvint4")
    yield square("if4", "if4", f"{published} if4")
    yield square("nvfp4_wgrad_nvint4", "nvfp4", f"{published} nvfp4_wgradnvint4", wgrad_fmt="nvint4")
    # No signs: the published code multiplies its signs in after the Hadamard matrix, where they cancel in the product.
    yield eden("if4_mseden", "if4", "if4", f"{published} if4_mseden")
    yield eden("fouroversix_mseden", "fouroversix", "nvfp4", f"{published} nvfp4_fouroversix_mseden")
    yield eden("nvfp4_mseden", "nvfp4", "nvfp4", "as fouroversix_mseden, with one candidate forward; not published")

    # Without headroom for scales that were rounded down, as the paper writes it: the largest of a block may clip.
    nvidia = "NVFP4 pretraining (arXiv 2509.25149)"
    yield square("nvidia_nvfp4", "nvfp4", nvidia, rounding="stochastic")
    quartet = "Quartet II (arXiv 2601.22813), with Four Over Six forward"
    yield eden("quartet2", "fouroversix", "nvfp4", quartet, hadamard=128, signs="fresh")

    # The paper has one scale of float32's precision; these are nvint4's, and the signs and the headroom are ours.
    uniform, gradient = Operand("nvint4"), Operand("nvint4", "stochastic_unbiased")
    yield Recipe(
        "uniform_rht",
        fprop=Product(uniform, uniform, hadamard=16),
        dgrad=Product(gradient, uniform, hadamard=16),
        wgrad=Product(uniform, gradient, hadamard=16),
        source="UFP4 (arXiv 2606.20381): uniform grid, rotation of all three products, stochastic output gradient",
    )

    straight = "straight-through: the gradient of the product of rounded operands, in high precision"
    forward = Product(high, Operand("if4"))
    yield Recipe("weight_only_qat", forward, dgrad=Product(high, reused), source=straight)
    forward = Product(Operand("if4"), Operand("if4"))
    dgrad, wgrad = Product(high, reused), Product(reused, high)
    yield Recipe("w4a4_qat", forward, dgrad, wgrad, source=straight)


RECIPES: Mapping[str, Recipe] = MappingProxyType({recipe.name: recipe for recipe in _named()})


# --- the product -----------------------------------------------------------------------------------------------------


def quantized_dot_general(
    x: ArrayLike,
    w: ArrayLike,
    dimension_numbers: DimensionNumbers,
    recipe: str | Recipe = "if4",
    key: jax.Array | None = None,
    *,
    precision: Any = None,
    preferred_element_type: DTypeLike | None = None,
    out_sharding: Any = None,
) -> jax.Array:
    """`jax.lax.dot_general` of activations x and weights w, forward and backward quantized as the recipe says.

    Several axes that a product contracts count as one, in the order given, and so do several tokens axes; the last
    block of an odd length is filled up with zeros. An operand has one amax, batch axes included; under `jax.vmap` each
    member has its own, and inside `jax.shard_map` each device. Values are multiplied and added up in float32 on CPUs,
    elsewhere in the operands' type with float32 sums. Cotangents have the dtypes of x and w.

    The same key gives the same result under jit, scan, remat and vmap, up to the order of sums; noise belongs to the
    element, however many devices share the array. Members of a vmap that share a key share its noise.

    Differentiable once, in reverse mode: rounding has no second derivative. A recipe that quantizes nothing, and a
    product with an empty operand, are `jax.lax.dot_general` itself.

    Args:
        x: activations, of any rank.
        w: weights, of any rank.
        dimension_numbers, precision, preferred_element_type, out_sharding: as in `jax.lax.dot_general`.
        recipe: a name in `ifjax.recipes.RECIPES` or a record.
        key: a fresh one for each layer and step. Recipes without noise ignore it.

    Raises:
        ValueError: the recipe needs a key and has none; the second derivative was asked for.
        TypeError: as `jax.lax.dot_general`, where axes do not match.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from ifjax.training.recipes import quantized_dot_general
        >>> x, w = jnp.ones((8, 32)), jnp.eye(32)
        >>> def loss(w, key):
        ...     return quantized_dot_general(x, w, (((1,), (0,)), ((), ())), "if4", key).sum()
        >>> jax.jit(jax.grad(loss))(w, jax.random.key(0)).shape
        (32, 32)
    """
    recipe = get_recipe(recipe)
    x, w = jnp.asarray(x), jnp.asarray(w)
    (x_contracted, w_contracted), (x_batch, w_batch) = (
        tuple(tuple(int(i) % a.ndim for i in axes) for axes, a in zip(pair, (x, w), strict=True))
        for pair in dimension_numbers
    )
    numbers = (x_contracted, w_contracted), (x_batch, w_batch)
    dtype = jnp.promote_types(x.dtype, w.dtype)
    plain = functools.partial(
        lax.dot_general, dimension_numbers=numbers, precision=precision, preferred_element_type=preferred_element_type
    )
    if not recipe.is_quantized or 0 in (*x.shape, *w.shape):
        return plain(x.astype(dtype), w.astype(dtype), out_sharding=out_sharding)
    result: Any = jax.eval_shape(plain, *(jax.ShapeDtypeStruct(a.shape, dtype) for a in (x, w)))

    settings = _Settings(recipe, precision, np.dtype(dtype), result.dtype, x.dtype, w.dtype)
    x, w = _as_varying(x, w), _as_varying(w, x)
    rows = _as_matrices(x, x_batch, _rest(x, x_batch, x_contracted), x_contracted)
    columns = _as_matrices(w, w_batch, w_contracted, _rest(w, w_batch, w_contracted))
    y: Any = _product(rows, columns, key, settings)
    y = y.reshape(result.shape)
    return y if out_sharding is None else jax.reshard(y, out_sharding)


class _Settings(NamedTuple):
    """What a product is compiled for; hashable."""

    recipe: Recipe
    precision: Any
    dtype: np.dtype  # that operands are multiplied in
    out_dtype: np.dtype
    x_dtype: np.dtype
    w_dtype: np.dtype


def _rest(a, *taken):
    return tuple(i for i in range(a.ndim) if all(i not in axes for axes in taken))


def _as_matrices(a, batch, rows, columns):
    """a as [rows, columns], or [batch, rows, columns] if there are batch axes; several axes become one."""
    groups = [batch, rows, columns] if batch else [rows, columns]
    a = jnp.transpose(a, [axis for group in groups for axis in group])
    lengths, shape = iter(a.shape), []
    for group in groups:
        shape.append(math.prod(next(lengths) for _ in group))
    return a.reshape(shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _product(x, w, key, settings: _Settings):
    """x [tokens, K] times w [K, N], each with one leading batch axis or none."""
    return _forward(x, w, key, settings)[0]


def _forward(x, w, key, settings):
    """y, and the operands that it is the product of."""
    qx = _operand(x, "fprop", "lhs", -1, key, settings)
    qw = _operand(w, "fprop", "rhs", -2, key, settings)
    return _multiply(qx, qw, -1, -2, settings.dtype, settings.out_dtype, settings.precision), (qx, qw)


def _product_fwd(x, w, key, settings):
    recipe = settings.recipe
    if recipe.needs_key:
        _check_key(key, recipe)  # here, not only where the backward pass draws: nearer to what forgot it
    y, (qx, qw) = _forward(x, w, key, settings)

    def kept(a, forward, operand, product_name, side, axis):
        if operand.reuse:
            return forward
        is_packed = recipe.residuals == "packed" and _is_packed_early(operand)
        return _operand(a, product_name, side, axis, key, settings) if is_packed else a

    for_dgrad = kept(w, qw, recipe.dgrad.rhs, "dgrad", "rhs", -1)
    for_wgrad = kept(x, qx, recipe.wgrad.lhs, "wgrad", "lhs", -2)
    # Nothing of x and of w, from which `_once` sees whether what is being differentiated depends on them.
    nothing = [lax.slice_in_dim(a, 0, 0, axis=a.ndim - 1) for a in (x, w)]
    return y, (for_dgrad, for_wgrad, nothing, key)


def _product_bwd(settings, residuals, g):
    for_dgrad, for_wgrad, nothing, key = residuals
    g, _ = _once(g, nothing)
    left = _operand(g, "dgrad", "lhs", -1, key, settings)
    right = _operand(for_dgrad, "dgrad", "rhs", -1, key, settings)
    dx = _multiply(left, right, -1, -1, settings.dtype, settings.x_dtype, settings.precision)
    left = _operand(for_wgrad, "wgrad", "lhs", -2, key, settings)
    right = _operand(g, "wgrad", "rhs", -2, key, settings)
    like = None
    if isinstance(left, QTensor) and not isinstance(for_wgrad, QTensor):
        like = codec.pad_axis(for_wgrad, left.shape[-2], -2)
    dw = _multiply(left, right, -2, -2, settings.dtype, settings.w_dtype, settings.precision, like)
    return dx, dw, None


_product.defvjp(_product_fwd, _product_bwd)


@jax.custom_jvp
def _once(g, nothing):
    return g, nothing


@_once.defjvp
def _once_jvp(primals, tangents):
    raise ValueError(
        "quantized_dot_general is differentiable once: rounding has no second derivative. Take second derivatives "
        "with recipe='bf16', or stop them with jax.lax.stop_gradient"
    )


def _operand(a, product_name, side, axis, key, settings) -> Any:
    """What the named product multiplies for a, of which it contracts `axis`: a QTensor, or an array."""
    product = getattr(settings.recipe, product_name)
    operand, size = getattr(product, side), product.hadamard
    if isinstance(a, QTensor):
        if not operand.reuse or not (operand.fmt or size):
            return a  # quantized for this product already, or reused as it is
        a = a.dequantize()
    a = lax.stop_gradient(a)
    if product.is_random:
        _check_key(key, settings.recipe)
        key = jax.random.fold_in(key, ("fprop", "dgrad", "wgrad").index(product_name))
        for_lhs, for_rhs, for_signs = jax.random.split(key, 3)
        key = for_lhs if side == "lhs" else for_rhs
    if size:
        a = codec.pad_axis(a, -(-a.shape[axis] // size) * size, axis)
        signs = random_signs(for_signs, size) if product.signs == "fresh" else product.signs
        if operand.rounding == "ms_eden":
            return ms_eden(a, operand.fmt, key=key, axis=axis, size=size, signs=signs, amax=operand.amax)
        a = hadamard(a, axis=axis, size=size, signs=signs)
    if operand.fmt is None:
        return a
    return quantize(
        a, operand.fmt, axis=axis, loss=operand.loss, rounding=operand.rounding, key=key if operand.is_random else None,
        block_2d=operand.block_2d, amax=operand.amax,
    )  # fmt: skip


def _check_key(key, recipe):
    if key is None:
        raise ValueError(
            f"recipe {recipe.name!r} draws noise: pass key=, a fresh one for each layer and step, such as "
            "jax.random.fold_in(jax.random.key(0), step). For Flax modules: rngs={'quantize': key}, and 'quantize' "
            "among the split_rngs of nn.scan and nn.vmap"
        )


@jax.jit(static_argnums=(2, 3, 4, 5, 6))  # outside of a jit, compiled once for all recipes
def _multiply(a, b, a_axis, b_axis, dtype, out_dtype, precision, like=None):
    """The product along these axes: [batch, what is left of a, what is left of b]. `like`: as a is sharded."""
    batch = (tuple(range(a.ndim - 2)),) * 2
    numbers = ((a.ndim + a_axis,), (b.ndim + b_axis,)), batch

    def product(a, b, like, dtype=dtype):
        return dot_general_like(like, a.astype(dtype), b.astype(dtype), numbers, precision, out_dtype)

    if dtype.itemsize != 2 or not (isinstance(a, QTensor) or isinstance(b, QTensor)):
        return product(a, b, like)
    # XLA:CPU multiplies 16-bit matrices no faster, and in float32 operands are not rounded another time.
    return lax.platform_dependent(
        a, b, like, cpu=functools.partial(product, dtype=np.dtype(np.float32)), default=product
    )
