"""Recipes, as records: which operands of a linear layer's three products are quantized, and how.

A linear layer y = x w has three products in training, each with two operands:

    fprop  y  = x w     x and w, blocks along the contraction axes
    dgrad  dx = g w^T   g and w, blocks along w's free axes
    wgrad  dw = x^T g   x and g, blocks along x's free axes: the tokens

Blocks and rotations always lie along a product's contraction axis. So each product quantizes its own operands; only
square blocks can be shared between two products. No code in this module depends on a recipe's name.
"""

import dataclasses
import functools
from typing import Any, Literal

from ifjax.arrays import ms_eden  # noqa: F401  importing it registers the rounding "ms_eden"
from ifjax.codec import LOSSES, ROUNDINGS, BlockLoss, Encoding, Loss, Rounding
from ifjax.codec.headers import is_amax
from ifjax.formats import FORMATS, Format, get_format
from ifjax.lookup import Registry
from ifjax.numerics.hadamard import SIZES


def _need(record, field, fits, needed):
    if not fits:
        kind = type(record).__name__
        raise ValueError(f"{kind}: {field} must be {needed}, got {getattr(record, field)!r}")


@dataclasses.dataclass(frozen=True)
class Operand:
    """The quantization of one operand of one product; hashable. `Operand()` leaves it in high precision.

    Formats, roundings and losses in the registries are stored by name, others as records, however they are given.

    Attributes:
        fmt: a format's name or record; None multiplies the array unquantized.
        rounding: as for `ifjax.quantize`, or "ms_eden", which rounds scales stochastically instead of elements.
        block_2d: whether square blocks share scale and choice. The contracted axes, merged into one, form one side of
            the squares, and the other axes, merged into one, form the other.
        loss: as for `ifjax.quantize`; by default the squared error.
        amax: a fixed amax, for arrays with a known bound, instead of the array's largest magnitude.
        reuse: in dgrad and wgrad, start from the rounded values of fprop, kept packed, instead of the array. With
            fmt=None they are multiplied unchanged.

    Raises:
        ValueError: a field is invalid or has no effect; the message says what to write instead.
    """

    fmt: str | Format | None = None
    rounding: str | Rounding = "nearest"
    _: dataclasses.KW_ONLY
    block_2d: bool = False
    loss: Loss | None = None
    amax: float | None = None
    reuse: bool = False

    def __post_init__(self):
        try:
            rounding = ROUNDINGS.find(self.rounding)
        except (TypeError, ValueError) as error:
            raise ValueError(f"Operand: {error}") from None
        object.__setattr__(self, "rounding", ROUNDINGS.name_of(rounding))
        for field in ("block_2d", "reuse"):
            _need(self, field, isinstance(getattr(self, field), bool), "True or False")
        if isinstance(self.loss, BlockLoss):
            object.__setattr__(self, "loss", LOSSES.name_of(self.loss))
        loss_fits = self.loss is None or isinstance(self.loss, BlockLoss) or callable(self.loss) or self.loss in LOSSES
        _need(self, "loss", loss_fits, f"one of {sorted(LOSSES)}, a function, or None for the squared error")
        is_number = isinstance(self.amax, int | float) and not isinstance(self.amax, bool)
        amax_fits = self.amax is None or (is_number and is_amax(self.amax))
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
        object.__setattr__(self, "fmt", FORMATS.name_of(fmt))
        if self.amax is not None and not fmt.has_tensor_scale:
            raise ValueError(f"Operand: {fmt.name} has no tensor scale, so amax does not apply: leave it out")
        if rounding.rotates and (self.block_2d or self.loss is not None):
            raise ValueError(
                f"Operand: rounding={rounding.name!r} has 1-D blocks and a rule of its own for the choice: leave "
                "block_2d and loss out"
            )

    @functools.cached_property
    def how(self) -> Encoding | None:
        """The operand's encoding; None if it stays in high precision."""
        if self.fmt is None:
            return None
        return Encoding.of(self.fmt, rounding=self.rounding, loss=self.loss, block_2d=self.block_2d)

    @property
    def is_random(self) -> bool:
        """Whether the rounding draws noise."""
        return ROUNDINGS.find(self.rounding).draws

    @property
    def is_packed_early(self) -> bool:
        """Whether residuals="packed" quantizes this operand in the forward pass."""
        return self.how is not None and not self.reuse


@dataclasses.dataclass(frozen=True)
class Product:
    """The two operands of a product, and a rotation of both, which leaves the exact product unchanged.

    Attributes:
        lhs, rhs: x and w of fprop, g and w of dgrad, x and g of wgrad.
        hadamard: the run length of `ifjax.hadamard` along the contraction axis of both operands; None does not rotate.
            Axes that it does not divide are padded with zeros.
        signs: "fixed" and None as for `ifjax.hadamard`; "fresh" draws new signs from each key.

    Raises:
        ValueError: a field is invalid or has no effect; the message says what to write instead.
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
            rounding = ROUNDINGS.find(operand.rounding)
            if not rounding.rotates:
                continue
            if self.hadamard is None:
                raise ValueError(
                    f"Product: rounding={rounding.name!r} is unbiased for rotated operands only: write hadamard=16 or "
                    "hadamard=128, with signs='fresh'"
                )
            if rounding.check is not None:
                rounding.check(operand.fmt, self.hadamard)

    @property
    def operands(self) -> tuple[Operand, Operand]:
        """The pair (lhs, rhs)."""
        return self.lhs, self.rhs

    @property
    def is_quantized(self) -> bool:
        """Whether an operand is quantized."""
        return any(operand.fmt is not None for operand in self.operands)

    @property
    def is_random(self) -> bool:
        """Whether the product draws noise or signs, and needs a key."""
        return self._draws_signs or any(operand.is_random for operand in self.operands)

    @property
    def draws_keys(self) -> bool:
        """Whether it draws anything that takes a key, and not the key's `seeds`."""
        return self._draws_signs or any(
            operand.is_random and not ROUNDINGS.find(operand.rounding).takes_seeds for operand in self.operands
        )

    @property
    def _draws_signs(self):
        return self.hadamard is not None and self.signs == "fresh"


@dataclasses.dataclass(frozen=True)
class Recipe:
    """The quantization of a layer's operands and residuals by `quantized_dot_general`; usable as a static jit argument.

    Attributes:
        name: the name in reports.
        fprop, dgrad, wgrad: the products that compute y, the gradient of x and the gradient of w.
        residuals: how x and w are saved for backward products that quantize them. "float" saves the arrays, and the
            backward pass quantizes them. "packed" quantizes them in the forward pass, to the same bytes, so that
            activations take 4.5 bits per value if nothing else keeps the array. MS-EDEN's operands are never saved
            packed. Reused operands always are.
        source: the paper or code that the recipe follows.

    Raises:
        ValueError: the products do not fit together; the message says what to write instead.

    Example:
        IF4 in the forward pass only, with gradients of the rounded operands:

        >>> from ifjax.training import Operand, Product, Recipe
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
            if operand.reuse and (forward.how is None or self.fprop.hadamard):
                raise ValueError(
                    f"{self.name}: {place} cannot reuse what fprop multiplies, which is not quantized, or is rotated: "
                    "write reuse=False"
                )
        if self.residuals == "packed" and not any(operand.is_packed_early for _, operand, _ in self._saved):
            raise ValueError(
                f"{self.name}: residuals='packed' packs nothing, as the backward pass quantizes neither w nor x from "
                "the arrays themselves: write residuals='float'"
            )

    @property
    def is_quantized(self) -> bool:
        """Whether any product is quantized."""
        return any(product.is_quantized for product in (self.fprop, self.dgrad, self.wgrad))

    @property
    def needs_key(self) -> bool:
        """Whether a product draws noise or signs; the forward pass alone needs a key only if fprop does."""
        return any(product.is_random for product in (self.fprop, self.dgrad, self.wgrad))

    def over_packed(self) -> "Recipe":
        """Return the recipe for a weight that is packed already: it is multiplied unchanged and has no gradient."""

        def as_it_is(product):
            return Product() if product.lhs.fmt is None else dataclasses.replace(product, rhs=Operand())

        return dataclasses.replace(
            self, fprop=as_it_is(self.fprop), dgrad=as_it_is(self.dgrad), wgrad=Product(), residuals="float"
        )

    @property
    def _saved(self):
        yield "dgrad.rhs", self.dgrad.rhs, self.fprop.rhs
        yield "wgrad.lhs", self.wgrad.lhs, self.fprop.lhs


def get_recipe(recipe: str | Recipe) -> Recipe:
    """Return the recipe of that name, or the given Recipe itself.

    Raises:
        ValueError: the name is unknown; the message lists the nearest names.
        TypeError: the argument is neither a name nor a Recipe.
    """
    return RECIPES.find(recipe)


def _named():
    high, reused = Operand(), Operand(reuse=True)

    # w has square blocks, so that dgrad reuses the packed w of fprop. wgrad is rotated by H16 with the fixed signs.
    # Gradients are rounded stochastically, all other operands to nearest.
    def square(name, fmt, source, wgrad_fmt=None, rounding: Any = "stochastic_unbiased"):
        gradient, wgrad_fmt = Operand(fmt, rounding), wgrad_fmt or fmt
        return Recipe(
            name,
            fprop=Product(Operand(fmt), Operand(fmt, block_2d=True)),
            dgrad=Product(gradient, reused),
            wgrad=Product(Operand(wgrad_fmt), Operand(wgrad_fmt, rounding), hadamard=16),
            source=source,
        )

    # Blocks are 1-D. All four operands of the backward pass are rounded by MS-EDEN, w and x from their rounded values.
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
    # No signs: the published code applies its signs after the Hadamard matrix, where they cancel in the product.
    yield eden("if4_mseden", "if4", "if4", f"{published} if4_mseden")
    yield eden("fouroversix_mseden", "fouroversix", "nvfp4", f"{published} nvfp4_fouroversix_mseden")
    yield eden("nvfp4_mseden", "nvfp4", "nvfp4", "as fouroversix_mseden, with one candidate forward; not published")

    # As in the paper, there is no headroom for scales that are rounded down: a block's largest value may clip.
    nvidia = "NVFP4 pretraining (arXiv 2509.25149)"
    yield square("nvidia_nvfp4", "nvfp4", nvidia, rounding="stochastic")
    quartet = "Quartet II (arXiv 2601.22813), with Four Over Six forward"
    yield eden("quartet2", "fouroversix", "nvfp4", quartet, hadamard=128, signs="fresh")

    # The paper uses one scale of float32 precision. This recipe uses nvint4's scales, with signs and headroom of ours.
    uniform, gradient = Operand("nvint4"), Operand("nvint4", "stochastic_unbiased")
    yield Recipe(
        "uniform_rht",
        fprop=Product(uniform, uniform, hadamard=16),
        dgrad=Product(gradient, uniform, hadamard=16),
        wgrad=Product(uniform, gradient, hadamard=16),
        source="UFP4 (arXiv 2606.20381): uniform grid, rotation of all three products, stochastic output gradient",
    )

    def rotated(name, fmt, size, source):
        """Return a recipe that rounds all six operands to nearest and rotates each product."""
        nearest = Product(Operand(fmt), Operand(fmt), hadamard=size)
        return Recipe(name, nearest, nearest, nearest, source=source)

    yield rotated("hifloat4", "hifloat4", 64, "HiFloat4 pretraining (arXiv 2604.08826): H64, nearest rounding")
    # The published recipe computes each amax only now and then and reuses it: see `quantized_dot_general(amax=)`.
    scales, noisy = Operand("nvfp4_ue5m3"), Operand("nvfp4_ue5m3", "stochastic")
    yield Recipe(
        "ue5m3", Product(scales, scales), Product(noisy, scales), Product(scales, noisy),
        source="arXiv 2609.02846: UE5M3 scales, stochastic gradients only, no rotation",
    )  # fmt: skip
    for learned in ("quad", "split87"):
        yield eden(learned, learned, "nvfp4", f"as fouroversix_mseden, with {learned} forward; not published")

    straight = "straight-through: the gradient of the product of rounded operands, in high precision"
    forward = Product(high, Operand("if4"))
    yield Recipe("weight_only_qat", forward, dgrad=Product(high, reused), source=straight)
    forward = Product(Operand("if4"), Operand("if4"))
    dgrad, wgrad = Product(high, reused), Product(reused, high)
    yield Recipe("w4a4_qat", forward, dgrad, wgrad, source=straight)


RECIPES: Registry[Recipe] = Registry("recipe", Recipe, "ifjax.recipes.RECIPES", _named())
