"""einsum and matmul with packed operands."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import opt_einsum
from jax.typing import DTypeLike
from opt_einsum.parser import parse_einsum_input

from ifjax.arrays import QTensor
from ifjax.products.dot_general import dot_general
from ifjax.products.plan import Impl, Operand, is_packed


def matmul(
    a: Operand,
    b: Operand,
    *,
    precision: Any = None,
    preferred_element_type: DTypeLike | None = None,
    impl: Impl | None = None,
    target: str | None = None,
) -> jax.Array:
    """Multiply as `jax.numpy.matmul` does; either operand or both may be packed. See `dot_general`.

    `x @ q` and `q @ x` call this function. Quantize [K, N] weights along axis=-2, the contraction axis. Multiply by
    [N, K] weights with `einsum("...k,nk->...n", x, w)`.

    Raises:
        ValueError: an operand is a scalar.

    Example:
        >>> import jax.numpy as jnp
        >>> import ifjax
        >>> w = ifjax.quantize(jnp.eye(32), axis=-2)
        >>> ifjax.matmul(jnp.ones((2, 32)), w).shape
        (2, 32)
    """
    rank_a, rank_b = (x.ndim if is_packed(x) else jnp.ndim(x) for x in (a, b))
    if not rank_a or not rank_b:
        raise ValueError("matmul needs operands of at least one axis, got a scalar: multiply with *")
    left = "k" if rank_a == 1 else "...mk"
    right = "k" if rank_b == 1 else "...kn"
    out = "..." * (rank_a > 1 or rank_b > 1) + "m" * (rank_a > 1) + "n" * (rank_b > 1)
    return einsum(
        f"{left},{right}->{out}", a, b, precision=precision, preferred_element_type=preferred_element_type,
        impl=impl, target=target,
    )  # fmt: skip


def einsum(
    spec: str,
    *operands: Operand,
    precision: Any = None,
    preferred_element_type: DTypeLike | None = None,
    impl: Impl | None = None,
    target: str | None = None,
) -> jax.Array:
    """Contract as `jax.numpy.einsum` does; any operand may be packed. See `dot_general`.

    A QTensor is dequantized if the specification sums over an axis of it alone, takes its diagonal, or broadcasts its
    axis of length 1. More than two operands are contracted pair by pair in opt_einsum's order.

    Raises:
        ValueError: the specification does not fit the operands.

    Example:
        >>> import jax.numpy as jnp
        >>> import ifjax
        >>> w = ifjax.quantize(jnp.ones((8, 32)))  # [out, in]
        >>> ifjax.einsum("...k,nk->...n", jnp.ones((2, 3, 32)), w).shape
        (2, 3, 8)
    """
    rest = {"precision": precision, "preferred_element_type": preferred_element_type}
    if not any(map(is_packed, operands)):
        return jnp.einsum(spec, *operands, **rest)
    left: list[Any] = [a if is_packed(a) else jnp.asarray(a) for a in operands]
    inputs, out, _ = parse_einsum_input((spec, *(a.shape for a in left)), shapes=True)
    rest |= {"impl": impl, "target": target}
    if len(left) == 2:
        return einsum_of_two(spec, left[0], left[1], functools.partial(dot_general, **rest))
    if len(left) == 1:
        return jnp.einsum(f"{inputs}->{out}", _dense(left[0]), preferred_element_type=preferred_element_type)
    path: Any = opt_einsum.contract_path(f"{inputs}->{out}", *(a.shape for a in left), shapes=True, einsum_call=True)
    for positions, _, step, *_ in path[1]:
        left.append(einsum(step, *(left.pop(i) for i in positions), **rest))
    return left[0]


def einsum_of_two(spec: str, a: Any, b: Any, product: Any) -> jax.Array:
    """Return the einsum of two operands, multiplied by product(a, b, dimension numbers) with a on the left."""
    inputs, out, _ = parse_einsum_input((spec, a.shape, b.shape), shapes=True)
    left, right = inputs.split(",")
    (left, a), (right, b) = _without_ones(left, a, right, b), _without_ones(right, b, left, a)
    (left, a), (right, b) = _summed(left, a, right + out), _summed(right, b, left + out)
    batch = [c for c in left if c in right and c in out]
    contracted = [c for c in left if c in right and c not in out]
    dims = [[[labels.index(c) for c in chosen] for labels in (left, right)] for chosen in (contracted, batch)]
    y = product(a, b, dims)
    have = batch + [c for c in left + right if c not in batch + contracted]
    return jnp.transpose(y, [have.index(c) for c in out])


def _without_ones(labels, a, other_labels, other):
    """Return labels and a without axes of length 1 that broadcast against longer axes of the other operand."""
    ones = [
        i for i, c in enumerate(labels)
        if a.shape[i] == 1 and c in other_labels and other.shape[other_labels.index(c)] != 1
    ]  # fmt: skip
    if not ones:
        return labels, a
    return "".join(c for i, c in enumerate(labels) if i not in ones), jnp.squeeze(_dense(a), tuple(ones))


def _summed(labels, a, others):
    """Return labels and a, summed over axes that `others` do not name, with repeated labels reduced to the diagonal."""
    kept = "".join(dict.fromkeys(c for c in labels if c in others))
    return (labels, a) if kept == labels else (kept, jnp.einsum(f"{labels}->{kept}", _dense(a)))


def _dense(a):
    return a.dequantize() if is_packed(a) else a


# QTensor is defined in a lower room, which must not import this one, so its `@` operators are set here.
QTensor.__matmul__ = lambda self, other: matmul(self, other)  # pyright: ignore[reportAttributeAccessIssue]
QTensor.__rmatmul__ = lambda self, other: matmul(other, self)  # pyright: ignore[reportAttributeAccessIssue]
