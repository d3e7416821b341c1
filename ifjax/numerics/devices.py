"""Properties of the device that a program is compiled for."""

import jax


def device_kind(target: str | None = None, platform: str | None = None) -> str:
    """Return the device kind to compile for: `target`, that of the current abstract mesh, or the first device's.

    If `platform` is given without a target, the abstract mesh is ignored, and the platform's name is returned if the
    first device has another platform.
    """
    if target is not None:
        return target
    abstract = jax.sharding.get_abstract_mesh().abstract_device
    if platform is None and abstract is not None:
        return abstract.device_kind
    device = jax.devices()[0]
    named = {"gpu": "cuda"}.get(device.platform, device.platform)
    return device.device_kind if platform in (None, named) else platform


def may_be_partitioned() -> bool:
    """Return whether XLA may partition the program: there are several accelerators, outside `jax.shard_map`."""
    mesh = jax.sharding.get_abstract_mesh()
    several = jax.device_count() > 1 and jax.devices()[0].platform != "cpu"
    if mesh.abstract_device is not None:
        several = mesh.size > 1
    return several and not mesh.manual_axes
