"""A packed weight with something beside it: an adapter that is added to it, a change of basis that it is packed in."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from ifjax.arrays import QTensor
from ifjax.models.transforms import Transform


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Adapter:
    """The update `scale * sum over r of a * b` of a weight w. A pytree of two arrays, for any optimizer.

    Both have w's axes, of length 1 where they do not extend along one, and the rank as their last axis: of w [in, out]
    a is [in, 1, rank] and b [1, out, rank]. So they are sharded, and taken apart by scans, as w is.

    Attributes:
        a: along the axes that w's product contracts, and along those of stacked layers.
        b: along all others, and along those of stacked layers.
        scale: of the update.
    """

    a: Float[Array, "..."]
    b: Float[Array, "..."]
    scale: float = dataclasses.field(default=1.0, metadata={"static": True})

    @property
    def rank(self) -> int:
        """The rank of the update."""
        return self.a.shape[-1]

    def update(self, shape: Sequence[int], dtype: Any) -> Float[Array, "..."]:
        """What is added to the weight of this shape."""
        labels = range(len(shape))
        out = [i for i in labels if self.a.shape[i] > 1 or self.b.shape[i] > 1]
        return self._einsum([], out, dtype).reshape(shape)

    def product(
        self, x: jax.Array, x_labels: Sequence[int], out_labels: Sequence[int], shape: Sequence[int]
    ) -> Float[Array, "..."]:
        """x times the update, by way of the rank. Labels below w.ndim are w's axes."""
        return self._einsum([x, list(x_labels)], list(out_labels), x.dtype).reshape(shape)

    def _einsum(self, others, out, dtype):
        rank, operands = 1_000, []
        for side in (self.a, self.b):
            long = [i for i in range(side.ndim - 1) if side.shape[i] > 1]
            operands += [side.reshape([side.shape[i] for i in long] + [self.rank]).astype(dtype), [*long, rank]]
        y: Any = _by_labels([*others, *operands], out)
        return y * np.asarray(self.scale, y.dtype)


@dataclasses.dataclass(frozen=True, eq=False)
class Adapted:
    """A weight with what is beside it, as a leaf of a tree of parameters, for `ifjax.quantized`.

    Attributes:
        base: the QTensor or array; no gradient reaches a packed one.
        adapter: what is added to it; None for none.
        transform: the basis that a packed base is in; None for its own.
    """

    base: Any
    adapter: Adapter | None = None
    transform: Transform | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight."""
        return tuple(self.base.shape)

    @property
    def ndim(self) -> int:
        """Number of its axes."""
        return len(self.base.shape)

    @property
    def size(self) -> int:
        """Number of its values."""
        return self.base.size

    @property
    def axis(self) -> int:
        """The blocked axis of a packed base, negative."""
        return self.base.axis

    @property
    def dtype(self) -> np.dtype:
        """Of the weight."""
        return np.dtype(self.base.dtype)

    def dequantize(self, dtype: Any = None) -> Float[Array, "..."]:
        """The weight: base and update."""
        dtype = self.dtype if dtype is None else dtype
        packed = isinstance(self.base, QTensor)
        base = lax.stop_gradient(self.base.dequantize(dtype)) if packed else self.base.astype(dtype)
        if self.transform is not None:
            base = lax.stop_gradient(self.transform.undone(base, self.base.axis))
        return base if self.adapter is None else base + self.adapter.update(self.shape, base.dtype)

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("this weight has an adapter, or is smoothed or rotated: run the function through "
                        "ifjax.quantized(fn)")


jax.tree_util.register_pytree_with_keys(
    Adapted,
    lambda w: ([(jax.tree_util.GetAttrKey(n), getattr(w, n)) for n in ("base", "adapter", "transform")], None),
    lambda _, children: Adapted(*children),
)


def _by_labels(operands: list[Any], out: list[int]) -> jax.Array:
    """einsum by labels that are any integers."""
    names = {label: i for i, label in enumerate(dict.fromkeys(i for labels in operands[1::2] for i in labels))}
    args = [
        operand if k % 2 == 0 else [names[label] for label in operand] for k, operand in enumerate(operands)
    ]
    return jnp.einsum(*args, [names[label] for label in out])
