"""Flax's protocol for boxed parameters (flax.core.meta.AxisMetadata), so that linen reads packed ones.

Flax is not imported: once it is loaded, QTensor is registered with it.
"""

import json
import sys
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ifjax.arrays.indexing import unblocked


class FlaxBox:
    """The methods that Flax calls on a boxed parameter, and the class's state dict. QTensor derives from it."""

    def unbox(self: Any, apply_constraint: bool = True) -> Any:
        """What a Flax module gets for this parameter: the values, without gradient. `nn.unbox` makes dense trees."""
        del apply_constraint  # the arrays inside have their shardings
        return lax.stop_gradient(self.dequantize())

    def replace_boxed(self: Any, val: Any) -> Any:
        """val, if it is packed or being traced over: nothing is quantized by an assignment."""
        if isinstance(val, FlaxBox):
            return val
        raise TypeError(
            f"a packed parameter {self!r} cannot be set to a {type(val).__name__}: quantize that first, or dequantize "
            "the tree (nn.unbox) to go on with floats"
        )

    def add_axis(self: Any, index: int, params: dict[Any, Any]) -> Any:
        """For arrays that have been stacked at `index`, as by nn.scan. `remove_axis` undoes it."""
        at = index % self.ndim
        axis = self.axis - (at > self.ndim - 1 + self.axis)
        names = self.names
        if names is not None:
            names = (*names[:at], *[None] * (at - len(names)), _partition_name(params), *names[at:])
        return self.replaced(axis=axis, names=names)

    def remove_axis(self: Any, index: int, params: dict[Any, Any]) -> Any:
        """For arrays that are about to be taken apart along `index`, as by nn.scan: `axis` as their parts need it."""
        del params
        at = unblocked(self, index)
        names = None if self.names is None else (*self.names[:at], *self.names[at + 1 :])
        return self.replaced(axis=self.axis + (at > self.ndim + self.axis), names=names)

    def get_partition_spec(self: Any) -> Any:
        """A QTensor of the PartitionSpecs that `names` ask for, for `nn.get_partition_spec`."""
        from ifjax.arrays.sharding import partition_specs

        return partition_specs(self, PartitionSpec() if self.names is None else PartitionSpec(*self.names))

    def get_sharding(self: Any, mesh: Mesh) -> Any:
        """A QTensor of the shardings that `names` ask for, for `nn.get_sharding`. No block may be torn."""
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
    """Once Flax is loaded, register QTensor as boxed metadata with a state dict. Does nothing the second time."""
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
