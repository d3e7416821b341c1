"""A weight with an adapter that is added to it, or with the change of basis that it is packed in."""

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

    Both arrays have w's axes, with length 1 where they do not extend along an axis, and the rank as last axis. For w
    [in, out], a is [in, 1, rank] and b is [1, out, rank]. Therefore they can be sharded and scanned like w.

    Attributes:
        a: extends along the axes that w's product contracts, and along those of stacked layers.
        b: extends along all other axes, and along those of stacked layers.
        scale: factor of the update.
    """

    a: Float[Array, "..."]
    b: Float[Array, "..."]
    scale: float = dataclasses.field(default=1.0, metadata={"static": True})

    @property
    def rank(self) -> int:
        """Rank of the update."""
        return self.a.shape[-1]

    def update(self, shape: Sequence[int], dtype: Any) -> Float[Array, "..."]:
        """Return the update as an array with the weight's shape."""
        labels = range(len(shape))
        out = [i for i in labels if self.a.shape[i] > 1 or self.b.shape[i] > 1]
        return self._einsum([], out, dtype).reshape(shape)

    def product(
        self, x: jax.Array, x_labels: Sequence[int], out_labels: Sequence[int], shape: Sequence[int]
    ) -> Float[Array, "..."]:
        """Return the product of x and the update, computed through the rank axis.

        `x_labels` and `out_labels` name the axes of x and of the result, as in einsum. Labels below w.ndim are w's
        axes. `shape` is the shape of the result.
        """
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
    """A weight with an adapter or a transform, as a leaf of a parameter tree, for `ifjax.quantized`.

    Attributes:
        base: QTensor or array; a QTensor gets no gradient.
        adapter: update that is added to the base; None for none.
        transform: change of basis that a packed base was quantized in; None for none.
    """

    base: Any
    adapter: Adapter | None = None
    transform: Transform | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight."""
        return tuple(self.base.shape)

    @property
    def ndim(self) -> int:
        """Number of axes of the weight."""
        return len(self.base.shape)

    @property
    def size(self) -> int:
        """Number of values of the weight."""
        return self.base.size

    @property
    def axis(self) -> int:
        """Blocked axis of a packed base, negative."""
        return self.base.axis

    @property
    def dtype(self) -> np.dtype:
        """Dtype of the weight."""
        return np.dtype(self.base.dtype)

    def dequantize(self, dtype: Any = None) -> Float[Array, "..."]:
        """Return the weight as an array: the base in its original basis plus the update."""
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
    """Compute an einsum whose axis labels may be any integers."""
    names = {label: i for i, label in enumerate(dict.fromkeys(i for labels in operands[1::2] for i in labels))}
    args = [
        operand if k % 2 == 0 else [names[label] for label in operand] for k, operand in enumerate(operands)
    ]
    return jnp.einsum(*args, [names[label] for label in out])
