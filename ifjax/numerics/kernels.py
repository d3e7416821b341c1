"""The kernel policy: a user setting, part of jax.jit's cache key, that says whether kernels are used."""

import os
import re
from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Literal, Protocol, TypeVar

import jax

POLICIES = ("auto", "always", "never")


class ForDevices(Protocol):
    """A record of kernels for certain devices."""

    @property
    def devices(self) -> str:
        """A regular expression that is searched for in the device kind."""
        ...


R = TypeVar("R", bound=ForDevices)


def _checked(policy: str, name: str) -> str:
    if policy not in POLICIES:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, POLICIES))}, got {policy!r}")
    return policy


_policy = jax.make_user_context(_checked(os.environ.get("IFJAX_KERNELS", "auto"), "the environment's IFJAX_KERNELS"))


def kernels(policy: Literal["auto", "always", "never"]) -> AbstractContextManager[None]:
    """Return a context manager that sets whether kernels are used in code that this thread traces.

    jax.jit recompiles a program if the policy differs. Outside of the context manager the environment variable
    IFJAX_KERNELS holds, which is read when ifjax is imported. A product's `impl=` argument overrides both.

    Args:
        policy: "auto" (the default) uses a kernel if there is one for the device and it has passed its check. The check
            runs before the kernel's first use on a device: a small case is computed by the kernel and by XLA, and the
            results are compared. The outcome is stored for these versions in the folder IFJAX_CACHE (by default
            ~/.cache/ifjax; not stored if IFJAX_CACHE is empty), and `ifjax doctor` shows it. "always" uses kernels
            without a check; "never" leaves everything to XLA.

    Returns:
        A context manager for a `with` statement.

    Raises:
        ValueError: the policy is unknown.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import ifjax
        >>> with ifjax.kernels("never"):
        ...     ifjax.explain_quantize(jax.ShapeDtypeStruct((4096, 4096), jnp.bfloat16), target="TPU v6e")
        Explanation(path='xla', reason="kernels are set to 'never', by ifjax.kernels or IFJAX_KERNELS")
    """
    return _policy(_checked(policy, "policy"))


def kernel_policy() -> str:
    """Return the policy in effect."""
    return _policy.value


def kernels_for(records: Iterable[R], device: str) -> R | None:
    """Return the record for a device kind; None if there is none or the policy is "never"."""
    return None if kernel_policy() == "never" else made_for(records, device)


def made_for(records: Iterable[R], device: str) -> R | None:
    """Return the record for a device kind, regardless of the policy; None if there is none."""
    return next((record for record in records if re.search(record.devices, device)), None)


def why_none(device: str) -> str:
    """Return the reason why `kernels_for` returned None."""
    if kernel_policy() == "never":
        return "kernels are set to 'never', by ifjax.kernels or IFJAX_KERNELS"
    return f"there is no kernel for {device}"
