"""Flax's protocol for boxed parameters (flax.core.meta.AxisMetadata), through which linen reads packed parameters.

Flax is not imported here. QTensor is registered with it once some other code has loaded it.
"""

import json
import sys
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ifjax.arrays.indexing import unblocked


class FlaxBox:
    """Base class of QTensor with the methods that Flax calls on a boxed parameter."""

    def unbox(self: Any, apply_constraint: bool = True) -> Any:
        """Return the dense values without gradient, as a Flax module reads them; `nn.unbox` makes a tree dense."""
        del apply_constraint  # the packed arrays already have their shardings
        return lax.stop_gradient(self.dequantize())

    def replace_boxed(self: Any, val: Any) -> Any:
        """Return `val` if it is packed; raise TypeError otherwise, because an assignment does not quantize."""
        if isinstance(val, FlaxBox):
            return val
        raise TypeError(
            f"a packed parameter {self!r} cannot be set to a {type(val).__name__}: quantize that first, or dequantize "
            "the tree (nn.unbox) to go on with floats"
        )

    def add_axis(self: Any, index: int, params: dict[Any, Any]) -> Any:
        """Return self with metadata for an axis that was added at `index`, as by nn.scan. `remove_axis` inverts it."""
        at = index % self.ndim
        axis = self.axis - (at > self.ndim - 1 + self.axis)
        names = self.names
        if names is not None:
            names = (*names[:at], *[None] * (at - len(names)), _partition_name(params), *names[at:])
        return self.replaced(axis=axis, names=names)

    def remove_axis(self: Any, index: int, params: dict[Any, Any]) -> Any:
        """Return self with metadata for entries along axis `index`, into which nn.scan is about to split the arrays."""
        del params
        at = unblocked(self, index)
        names = None if self.names is None else (*self.names[:at], *self.names[at + 1 :])
        return self.replaced(axis=self.axis + (at > self.ndim + self.axis), names=names)

    def get_partition_spec(self: Any) -> Any:
        """Return a QTensor of the PartitionSpecs that `names` give, for `nn.get_partition_spec`."""
        from ifjax.arrays.sharding import partition_specs

        return partition_specs(self, PartitionSpec() if self.names is None else PartitionSpec(*self.names))

    def get_sharding(self: Any, mesh: Mesh) -> Any:
        """Return a QTensor of the shardings that `names` give, for `nn.get_sharding`. No block may be split."""
        from ifjax.arrays.sharding import shardings

        return shardings(self, NamedSharding(mesh, PartitionSpec(*self.names or ())))


def _partition_name(params):
    if "partition_name" not in params:
        raise ValueError(
            "a packed parameter with names of axes was stacked by a transformation that names none: write "
            "metadata_params={nn.PARTITION_NAME: ...} there"
        )
    return params["partition_name"]


_introduced = []


def introduce_to_flax(cls: type) -> None:
    """Register QTensor with Flax as boxed metadata with a state dict. Do nothing if Flax is not loaded, or if done."""
    meta: Any = sys.modules.get("flax.core.meta")
    serialization: Any = sys.modules.get("flax.serialization")
    if _introduced or not (hasattr(meta, "AxisMetadata") and hasattr(serialization, "register_serialization_state")):
        return
    _introduced.append(True)
    meta.AxisMetadata.register(cls)
    serialization.register_serialization_state(cls, _to_state_dict, _from_state_dict)


def _to_state_dict(q):
    amax = {} if q.amax is None else {"amax": q.amax}
    return {"codes": q.codes, "scales": q.scales, **amax, "static": json.dumps(q.blocking.to_dict())}


def _from_state_dict(like, state):
    found = type(like.blocking).from_dict(json.loads(state["static"]))
    if found != like.blocking:
        raise ValueError(f"the state holds another kind of QTensor: {found}, and this needs {like.blocking}")
    amax = None if like.amax is None else jnp.asarray(state["amax"])
    return like.replaced(codes=jnp.asarray(state["codes"]), scales=jnp.asarray(state["scales"]), amax=amax)
