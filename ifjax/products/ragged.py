"""ragged_dot with packed experts."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from ifjax.arrays import QTensor
from ifjax.numerics.byte_order import as_array
from ifjax.numerics.xla import after
from ifjax.products.dot_general import accumulator, as_varying, no_gradient
from ifjax.products.plan import Operand, as_operand, is_packed


def ragged_dot(
    lhs: Operand,
    rhs: Operand,
    group_sizes: jax.Array,
    precision: Any = None,
    preferred_element_type: DTypeLike | None = None,
    *,
    group_offset: jax.Array | None = None,
) -> jax.Array:
    """Multiply each group of rows of lhs [m, k] by its own matrix of rhs [g, k, n], as `jax.lax.ragged_dot` does.

    Either operand may be packed, along any axis; rhs has one amax, or one per group (amax_axes=(0,)). Packed operands
    are dequantized. Only an lhs that is an array has a gradient when rhs is packed. Meshes with explicit axes, which
    `jax.lax.ragged_dot` does not support, are supported: the result's rows are sharded as those of lhs, and its columns
    as those of rhs.

    Args:
        group_sizes: integers [g], the number of rows of each group.
        precision, preferred_element_type, group_offset: as in `jax.lax.ragged_dot`.

    Returns:
        An array [m, n].

    Raises:
        TypeError: the shapes do not fit, as in `jax.lax.ragged_dot`.

    Example:
        >>> import jax.numpy as jnp
        >>> import ifjax
        >>> experts = ifjax.quantize(jnp.ones((2, 32, 8)), axis=1, amax_axes=(0,))
        >>> ifjax.ragged_dot(jnp.ones((5, 32)), experts, jnp.array([2, 3])).shape
        (5, 8)
    """
    lhs, rhs = as_operand(lhs), as_operand(rhs)
    group_sizes = as_array(group_sizes)
    group_offset = None if group_offset is None else as_array(group_offset)
    sharding = ragged_sharding(lhs, rhs)
    if sharding is not None:
        product = functools.partial(ragged_dot, precision=precision, preferred_element_type=preferred_element_type)
        placed: Any = jax.sharding.auto_axes(
            lambda lhs, rhs, sizes, offset: product(lhs, rhs, sizes, group_offset=offset), out_sharding=sharding
        )
        return placed(lhs, rhs, group_sizes, group_offset)
    lhs = lhs.dequantize() if is_packed(lhs) else lhs
    if not is_packed(rhs):
        return lax.ragged_dot(
            lhs, rhs, group_sizes, precision, preferred_element_type, group_offset=group_offset
        )
    rhs = rhs if isinstance(rhs, QTensor) else rhs.unpack()
    dtype = jnp.promote_types(lhs.dtype, rhs.dtype)
    out_dtype = dtype if preferred_element_type is None else np.dtype(preferred_element_type)
    settings = (precision, lhs.dtype, dtype, out_dtype)
    return _jitted(as_varying(lhs, rhs), rhs, group_sizes, group_offset, settings)


def ragged_sharding(lhs: Any, rhs: Any) -> Any:
    """Return the sharding of ragged_dot's result [m, n] on a mesh with explicit axes; None elsewhere.

    A mesh axis over which both rows and columns are sharded shards the result's rows only.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.explicit_axes:
        return None
    specs = [jax.typeof(a.codes if is_packed(a) else a).sharding.spec for a in (lhs, rhs)]
    (rows, *_), (*_, columns) = specs
    taken, wanted = (set(n if isinstance(n, tuple) else (n,)) - {None} for n in (rows, columns))
    return NamedSharding(mesh, PartitionSpec(rows, None if taken & wanted else columns))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _ragged(x, q, group_sizes, group_offset, settings):
    return _ragged_values(x, q, group_sizes, group_offset, settings)


def _ragged_values(x, q, group_sizes, group_offset, settings):
    precision, _, dtype, out_dtype = settings
    q = q.replaced(codes=after(x, q.codes))
    y = lax.ragged_dot(
        x.astype(dtype), q.dequantize(dtype), group_sizes, precision, accumulator(dtype), group_offset=group_offset
    )
    return y.astype(out_dtype)


def _ragged_fwd(x, q, group_sizes, group_offset, settings):
    return _ragged_values(x, q, group_sizes, group_offset, settings), (q, group_sizes, group_offset)


def _ragged_bwd(settings, kept, g):
    q, group_sizes, group_offset = kept
    q = q.replaced(codes=after(g, q.codes))
    x = as_varying(jnp.zeros((g.shape[0], q.shape[-2]), settings[1]), g)  # the product is linear in x: any x does
    _, pull = jax.vjp(lambda x: _ragged_values(x, q, group_sizes, group_offset, settings), x)
    return *pull(g), no_gradient(q), *no_gradient((group_sizes, group_offset))


_ragged.defvjp(_ragged_fwd, _ragged_bwd)
_jitted = jax.jit(_ragged, static_argnums=4)
