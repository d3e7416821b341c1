"""What a walk over a model found."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax

LOOKUP = "it looks rows up and multiplies nothing"


class Kernel(NamedTuple):
    """A parameter that a model multiplies by, as a walk over the model found it.

    Attributes:
        parameter: '/'-joined path in the tree of parameters; of a module without a kernel its own path.
        path: of the module.
        module: the class's name.
        axes: those that are contracted, negative.
        stacked: those along which layers were stacked, by nn.scan or nn.vmap, negative.
        unfit_for: why its activations cannot be quantized; None if they can.
        reason: why nothing of it can be quantized; None if it can.
        operands: which of OPERANDS the module multiplies.
        note: what else a report should say.
        training: why no recipe applies; None if one does.
    """

    parameter: str
    path: str
    module: str | None = None
    axes: tuple[int, ...] = ()
    stacked: tuple[int, ...] = ()
    unfit_for: str | None = None
    reason: str | None = None
    operands: tuple[str, ...] = ()
    note: str | None = None
    training: str | None = None


def blocked_axis(axes: Sequence[int], shape: tuple[int, ...], block: int) -> int:
    """Which of a kernel's contracted axes blocks lie along: the last that is no shorter than one.

    For what it is multiplied by: the same, if the axes come in the kernel's order.
    """
    return axes[max(range(len(axes)), key=lambda i: (shape[axes[i]] >= block, i))]


class Walk(NamedTuple):
    """What a walk over a model showed.

    Attributes:
        kernels: by the parameter's path.
        modules: class names of modules, by path.
        reached: for the path of each parameter that was read, the axes along which layers are stacked, negative.
        reasons: why a parameter is no kernel, by path, where the model tells.
    """

    kernels: dict[str, Kernel]
    modules: dict[str, str]
    reached: dict[str, tuple[int, ...]]
    reasons: dict[str, str]


def innermost(path: str, modules: Mapping[str, str]) -> str | None:
    """The class of the module around a parameter; lists and dictionaries of parameters may lie between."""
    while path and path not in modules:
        path = path.rpartition("/")[0]
    return modules.get(path)


def join_path(keys: Iterable[Any]) -> str:
    """'/'-joined names: of a module's path, or of a key path in a tree."""
    return "/".join(key if isinstance(key, str) else jax.tree_util.keystr((key,), simple=True) for key in keys)


class Seen(NamedTuple):
    """What a walk over a model found: one record for each module with parameters or products of its own.

    Attributes:
        path: '/'-joined. Of a parameter that no module explains, its own name included.
        module: the class's name; None where there is no module.
        quantizable: whether its kernel can be quantized at all.
        reason: why not, as in "LayerNorm has no matmul".
        length: of the contraction, as far as known.
        raw_shape: of a parameter that no module explains, whose contraction axis is the rule's.
        operands: which of OPERANDS it multiplies.
    """

    path: str
    module: str | None = None
    quantizable: bool = True
    reason: str | None = None
    length: int | None = None
    raw_shape: tuple[int, ...] | None = None
    operands: tuple[str, ...] = ()


def without_matmul(modules: Mapping[str, str], seen: Iterable[Seen]) -> list[Seen]:
    """Records of the modules, by path and class, that `seen` has none of: rules may name them, too."""
    known = {s.path for s in seen}
    return [Seen(path, name, False, f"{name} has no matmul of its own")
            for path, name in modules.items() if path not in known]  # fmt: skip


def seen_in_training(kernel: Kernel) -> Seen:
    """Lengths do not matter there: the last block of any is filled up."""
    reason = kernel.reason or kernel.training
    return Seen(kernel.path, kernel.module, reason is None, reason)
