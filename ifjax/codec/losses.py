"""Registry of losses by which the encoder chooses how to encode a block."""

import dataclasses
from collections.abc import Callable

import jax
from jax import lax

from ifjax.formats.floats import as_float, bits_of
from ifjax.lookup import Registry


@dataclasses.dataclass(frozen=True)
class BlockLoss:
    """A loss computed for each value and then reduced over the block.

    Attributes:
        name: name of the loss.
        term: maps the float32 error (decoded - x) of a value to its loss.
        over: binary reduction over the block: `lax.add` or `lax.max`.
    """

    name: str
    term: Callable[[jax.Array], jax.Array]
    over: Callable[[jax.Array, jax.Array], jax.Array]


# A name, a record, or a function that maps (x, decoded x), both [..., B], to losses [...]. Its arguments are in units
# of a power of two near the tensor's maximum.
Loss = str | BlockLoss | Callable[[jax.Array, jax.Array], jax.Array]


def squared(e: jax.Array) -> jax.Array:
    """Return e^2 with its last bit cleared."""
    return without_last_bit(e * e)


def without_last_bit(product: jax.Array) -> jax.Array:
    """Clear the last bit of a product, so that no compiler contracts it and a following sum to a fused multiply-add.

    Compilers contract in some programs and not in others, so a block's choice would depend on the surrounding program.
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
    """Return the record of a named loss; records and functions are returned unchanged.

    Raises:
        ValueError: the name is unknown.
        TypeError: the argument is not a name, a record or a function.
    """
    if isinstance(loss, BlockLoss) or not callable(loss):
        if not isinstance(loss, str | BlockLoss):
            raise TypeError(f"loss must be one of {', '.join(LOSSES)}, or a function, got {loss!r}")
        return LOSSES.find(loss)
    return loss
