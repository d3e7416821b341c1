"""Whether kernels are taken, as the user says: a setting that is part of the key of jax.jit's caches."""

import os
import re
from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Literal, Protocol, TypeVar

import jax

POLICIES = ("auto", "always", "never")


class ForDevices(Protocol):
    """A record of kernels."""

    @property
    def devices(self) -> str:
        """A regular expression, found in the device kinds that they are for."""
        ...


R = TypeVar("R", bound=ForDevices)


def _checked(policy: str, name: str) -> str:
    if policy not in POLICIES:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, POLICIES))}, got {policy!r}")
    return policy


_policy = jax.make_user_context(_checked(os.environ.get("IFJAX_KERNELS", "auto"), "the environment's IFJAX_KERNELS"))


def kernels(policy: Literal["auto", "always", "never"]) -> AbstractContextManager[None]:
    """Say whether kernels are taken, for what this thread traces within `with`. Results keep their meaning.

    A compiled program belongs to the setting that it was traced in: jax.jit compiles anew for another one. The
    environment's IFJAX_KERNELS, read when ifjax is imported, says what holds elsewhere. A product's `impl=` goes before
    either.

    Args:
        policy: "auto", as it is unless set, takes a kernel where there is one for the device and it has proven itself:
            before its first use there it does a small case, which XLA does too, and their results are compared. What
            was found is kept in the folder IFJAX_CACHE (~/.cache/ifjax; none if it is empty) for these versions;
            `ifjax doctor` shows it. "always" takes kernels unproven; "never" leaves all to XLA.

    Raises:
        ValueError: another word.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import ifjax
        >>> with ifjax.kernels("never"):
        ...     ifjax.explain_quantize(jax.ShapeDtypeStruct((4096, 4096), jnp.bfloat16), target="TPU v6e")
        Explanation(path='xla', reason="kernels are set to 'never', by ifjax.kernels or IFJAX_KERNELS")
    """
    return _policy(_checked(policy, "policy"))


def kernel_policy() -> str:
    """The setting that holds here."""
    return _policy.value


def kernels_for(records: Iterable[R], device: str) -> R | None:
    """The record for a device kind, unless kernels are left to XLA."""
    return None if kernel_policy() == "never" else made_for(records, device)


def made_for(records: Iterable[R], device: str) -> R | None:
    """The record for a device kind, whatever the setting."""
    return next((record for record in records if re.search(record.devices, device)), None)


def why_none(device: str) -> str:
    """Why `kernels_for` has none."""
    if kernel_policy() == "never":
        return "kernels are set to 'never', by ifjax.kernels or IFJAX_KERNELS"
    return f"there is no kernel for {device}"
