"""Device placement and sharding of QTensors."""

import math

import jax
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from ifjax.arrays.qtensor import QTensor


def device_put(q: QTensor, sharding: Sharding) -> QTensor:
    """Place q with `sharding`, which is given for q's shape; codes, scales and amax are partitioned to match.

    Returns:
        q, with its arrays on the devices of `sharding`.

    Raises:
        TypeError: q is not a QTensor.
        ValueError: a NamedSharding has more entries than q has axes, or would split a block between devices.

    Example:
        >>> import jax
        >>> import ifjax
        >>> mesh = jax.make_mesh((1,), ("model",))
        >>> columns = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "model"))
        >>> q = ifjax.device_put(ifjax.quantize(jax.numpy.ones((32, 64)), axis=0), columns)
        >>> tuple(q.codes.sharding.spec)
        (None, 'model')
    """
    return jax.device_put(q, shardings(q, sharding))


def shardings(q: QTensor, sharding: Sharding) -> QTensor:
    """Return a QTensor whose leaves are the shardings of q's arrays, for example for `in_shardings` of `jax.jit`.

    Arguments and errors are those of `device_put`.
    """
    if not isinstance(q, QTensor):
        raise TypeError(f"needs a QTensor, got {type(q).__name__}: for arrays, jax.device_put does the same")
    if not isinstance(sharding, NamedSharding):
        return jax.tree.map(lambda _: sharding, q)
    spec = tuple(sharding.spec) + (None,) * (q.ndim - len(sharding.spec))
    if len(spec) > q.ndim:
        raise ValueError(f"{sharding.spec} has more entries than shape {q.shape} has axes")
    for axis in q.blocked_axes:
        names = spec[axis] if isinstance(spec[axis], tuple) else (spec[axis],)
        parts = math.prod(sharding.mesh.shape[name] for name in names if name is not None)
        blocks = -(-q.shape[axis] // q.fmt.block)
        if blocks % parts or (parts > 1 and q.shape[axis] % q.fmt.block):
            raise ValueError(
                f"axis {axis} of {q.shape} has {q.shape[axis] / q.fmt.block:g} blocks of {q.fmt.block}, which "
                f"{parts} devices cannot share without tearing one: shard another axis"
            )
    specs = partition_specs(q, PartitionSpec(*spec))
    is_spec = lambda s: isinstance(s, PartitionSpec)  # noqa: E731
    return jax.tree.map(lambda s: NamedSharding(sharding.mesh, s), specs, is_leaf=is_spec)


def partition_specs(q: QTensor, spec: PartitionSpec) -> QTensor:
    """Return a QTensor of the PartitionSpecs of q's arrays; amax axes of length 1 are not partitioned."""
    amax = q.amax
    if amax is not None:
        shared = zip(tuple(spec)[: amax.ndim], amax.shape, strict=False)
        amax = PartitionSpec(*(None if length == 1 else name for name, length in shared))
    return q.replaced(codes=spec, scales=spec, amax=amax)
