"""Types of kernels' results inside `jax.shard_map`: over which axes of the mesh their numbers differ.

Outside of it, and where it does not check types, numbers differ over no axis.
"""

from collections.abc import Sequence
from typing import Any

import jax
from jax import lax


def results_of(args: Sequence[jax.Array], shapes: Sequence[Any]) -> list[jax.ShapeDtypeStruct]:
    """Return shapes and dtypes of arrays that differ over the axes over which one of `args` does."""
    kind = jax.typeof(args[0]).manual_axis_type.update(varying=_axes(args))
    return [jax.ShapeDtypeStruct(s.shape, s.dtype, manual_axis_type=kind) for s in shapes]


def as_result_of(args: Sequence[jax.Array], a: jax.Array) -> jax.Array:
    """Return a, cast to differ over the axes over which one of `args` does."""
    missing = _axes(args) - _axes([a])
    return lax.pcast(a, tuple(missing), to="varying") if missing else a


def _axes(args):
    return frozenset().union(*(jax.typeof(a).manual_axis_type.varying for a in args))
