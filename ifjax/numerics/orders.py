"""Orders of Hadamard matrices, and the factors that a matrix is made of.

A matrix of order b 2^k is the Kronecker product of one of order b and Sylvester's of order 2^k. b is 1, or an order by
one of Paley's two constructions: q + 1 for a prime q of the form 4 i + 3, or 2 (q + 1) for a prime of the form 4 i + 1.
That gives 12, 20, 28, 36, 44, 60 and others up to 128: 384 = 12 x 32, and 1536 = 12 x 128.
"""

import functools

import numpy as np

LARGEST = 128  # of the orders b: each result adds b terms for it, where a power of two takes 16 for each factor 16


def sylvester(size: int) -> np.ndarray:
    """Return the int8 Sylvester-Hadamard matrix, H_2n = [[H_n, H_n], [H_n, -H_n]].

    Entry (i, j) is -1 where i and j share an odd number of one bits.
    """
    i = np.arange(size)
    return 1 - 2 * (np.bitwise_count(i[:, None] & i) & 1).astype(np.int8)


def is_order(n: int) -> bool:
    """Return whether `factors` knows a Hadamard matrix of order n, from 2 on."""
    return n >= 2 and _base(n) is not None


def longest_run(length: int) -> int | None:
    """Return the largest order that divides a length; None for odd lengths.

    It is the length itself, or else the largest power of two in it times a part of its odd factor.
    """
    return next((n for n in range(length, 1, -1) if length % n == 0 and is_order(n)), None)


@functools.cache
def factors(n: int) -> tuple[np.ndarray, ...]:
    """Return matrices, int8, whose Kronecker product is a Hadamard matrix of order n; the last one comes last in it.

    Powers of two are split into Sylvester's matrices of order 16, and one of what is left before them.

    Raises:
        ValueError: no matrix of this order is known here.
    """
    base = _base(n) if n > 1 else None
    if base is None:
        raise ValueError(f"no Hadamard matrix of order {n} is known here: powers of two, and 12, 20 .. times one, are")
    power, parts = n // base, []
    while power > 1:
        parts.append(sylvester(min(power, 16)))
        power //= len(parts[-1])
    return tuple(reversed([*parts, *([] if base == 1 else [_paley(base)])]))


def _base(n: int) -> int | None:
    """Return the order b of n = b 2^k: 1 or the least one by Paley; None if there is none."""
    odd = n
    while odd % 2 == 0:
        odd //= 2
    if odd == 1:
        return 1
    orders = (odd << k for k in range(2, (n // odd).bit_length()) if odd << k <= LARGEST)
    return next((b for b in orders if _prime(b - 1, 3) or _prime(b // 2 - 1, 1)), None)


def _paley(n: int) -> np.ndarray:
    first = _prime(n - 1, 3)
    q = n - 1 if first else n // 2 - 1
    squares = {i * i % q for i in range(1, q)}
    residues = np.array([0, *(1 if i in squares else -1 for i in range(1, q))])
    q_matrix = residues[(np.arange(q)[:, None] - np.arange(q)) % q]
    border = np.ones((1, q), int)
    if first:
        skew = np.block([[np.zeros((1, 1), int), border], [-border.T, q_matrix]])
        return (skew + np.eye(n, dtype=int)).astype(np.int8)
    whole = np.block([[np.zeros((1, 1), int), border], [border.T, q_matrix]])
    ones, own = np.array([[1, 1], [1, -1]]), np.array([[1, -1], [-1, -1]])
    return (np.kron(whole, ones) + np.kron(np.eye(q + 1, dtype=int), own)).astype(np.int8)


def _prime(q: int, remainder: int) -> bool:
    return q > 2 and q % 4 == remainder and all(q % i for i in range(3, int(q**0.5) + 1, 2))
