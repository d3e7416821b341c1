"""Matrix products with packed operands, and the kernels that compute them."""

from ifjax.products.backends import BACKENDS, Backend, Prepacked, prepack
from ifjax.products.cache import PackedCache
from ifjax.products.dot_general import dot_general
from ifjax.products.einsum import einsum, matmul
from ifjax.products.plan import explain_matmul
from ifjax.products.ragged import ragged_dot

__all__ = [
    "BACKENDS", "Backend", "PackedCache", "Prepacked", "dot_general", "einsum", "explain_matmul", "matmul", "prepack",
    "ragged_dot",
]  # fmt: skip
