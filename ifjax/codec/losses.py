"""Losses: by which the encoder chooses between the ways to encode a block, as records."""

import dataclasses
from collections.abc import Callable

import jax
from jax import lax

from ifjax.codec.blocks import as_float, bits_of
from ifjax.lookup import Registry


@dataclasses.dataclass(frozen=True)
class BlockLoss:
    """A loss that is taken value by value and then over the block.

    Attributes:
        name: of the loss.
        term: float32 error (decoded - x) of a value to its loss.
        over: two losses to one: `lax.add` or `lax.max`.
    """

    name: str
    term: Callable[[jax.Array], jax.Array]
    over: Callable[[jax.Array, jax.Array], jax.Array]


# A name, a record, or a function of (x, decoded x), both [..., B], to losses [...]. Numbers are in units of a power of
# two near the tensor's maximum.
Loss = str | BlockLoss | Callable[[jax.Array, jax.Array], jax.Array]


def squared(e: jax.Array) -> jax.Array:
    """e^2 without its last bit."""
    return without_last_bit(e * e)


def without_last_bit(product: jax.Array) -> jax.Array:
    """A product that compilers cannot contract with the sum that takes it, to a fused multiply-add.

    They do so in some programs and not in others, and the choice of a block would depend on what surrounds it.
    """
    bits = bits_of(product)
    return as_float(lax.bitwise_and(bits, lax.full_like(bits, ~1)))


LOSSES: Registry[BlockLoss] = Registry(
    "loss", BlockLoss, "ifjax.codec.LOSSES",
    (
        BlockLoss("mse", squared, lax.add),
        BlockLoss("mae", lax.abs, lax.add),
        BlockLoss("abs_max", lax.abs, lax.max),
    ),
)  # fmt: skip


def get_loss(loss: Loss) -> BlockLoss | Callable[[jax.Array, jax.Array], jax.Array]:
    """Return the record of a named loss; records and functions are returned as they are.

    Raises:
        ValueError: an unknown name.
        TypeError: none of these.
    """
    if isinstance(loss, BlockLoss) or not callable(loss):
        if not isinstance(loss, str | BlockLoss):
            raise TypeError(f"loss must be one of {', '.join(LOSSES)}, or a function, got {loss!r}")
        return LOSSES.find(loss)
    return loss
