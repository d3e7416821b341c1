"""Which device a program is compiled for."""

import jax


def device_kind(target: str | None = None, platform: str | None = None) -> str:
    """The device kind to compile for: the target, that of the abstract mesh in use, or the first device's.

    A platform without a target stands for devices of no particular kind.
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
    """Whether there are several accelerators and XLA, not shard_map, decides which computes what."""
    several = jax.device_count() > 1 and jax.devices()[0].platform != "cpu"
    return several and not jax.sharding.get_abstract_mesh().manual_axes
