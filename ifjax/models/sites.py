"""Sites: the parameters of a model, and the products that read them."""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax

LOOKUP = "it looks rows up and multiplies nothing"
NO_MATRIX = "it is no matrix"
NOT_READ = "the model has not read it: the sample does not reach it, or it is of another model"
UNEXPLAINED = "no module tells where it is multiplied by"


class Site(NamedTuple):
    """A parameter and the product that reads it. Walks over linen and NNX models and over programs make them.

    A module whose product has no parameter (attention), or that has no product at all, is a site, too: rules may name
    it. Axes are negative, so that they hold for a layer of a stack as well.

    Attributes:
        parameter: '/'-joined path in the tree of parameters; of a module its own path.
        path: what rules match: the path of the module that multiplies. Where no known layer does, the parameter's own.
        module: class of the module; None where there is none.
        shape: of the parameter; () where lengths do not matter.
        axes: the contracted axes, in the parameter's order; () where nothing tells.
        stacked: axes along which layers were stacked, as by scan or vmap.
        operands: the names of the operands that a module without a kernel multiplies.
        packed: whether the parameter is a QTensor already.
        assumed: the axis that is taken to be contracted where nothing tells and the rule names none.
        reason: why it cannot be quantized; None if it can.
        activations: why what it is multiplied by cannot be quantized; None if it can.
        training: why no recipe applies; None if one does.
        note: what else a report should say.
        changed: the arithmetic that changes the parameter's values before the product; None if there is none.
    """

    parameter: str
    path: str
    module: str | None = None
    shape: tuple[int, ...] = ()
    axes: tuple[int, ...] = ()
    stacked: tuple[int, ...] = ()
    operands: tuple[str, ...] = ()
    packed: bool = False
    assumed: int | None = None
    reason: str | None = None
    activations: str | None = None
    training: str | None = None
    note: str | None = None
    changed: str | None = None

    @property
    def quantizable(self) -> bool:
        """Whether there are weights that can be quantized."""
        return self.reason is None and not self.operands

    @property
    def multiplies(self) -> tuple[str, ...]:
        """The names of the operands that can be quantized."""
        return self.operands if self.reason is None else ()

    @property
    def is_raw(self) -> bool:
        """Whether the axis is the rule's to name."""
        return self.quantizable and not self.axes and not self.packed

    @property
    def length(self) -> int | None:
        """The longest of the contracted axes, along which blocks lie; None where it does not matter."""
        if self.packed or not self.shape or not self.axes:
            return None
        return max(self.shape[axis] for axis in self.axes)

    def in_training(self) -> "Site":
        """The same for recipes. Lengths do not matter there: the last block of any is filled up."""
        reason = self.reason or self.training or (UNEXPLAINED if self.is_raw else None)
        return self._replace(shape=(), reason=reason)


def without_matmul(modules: Mapping[str, str], sites: Iterable[Site]) -> list[Site]:
    """Sites of the modules, by path and class, that `sites` has none of."""
    known = {site.path for site in sites}
    return [Site(path, path, name, reason=f"{name} has no matmul of its own")
            for path, name in modules.items() if path not in known]  # fmt: skip


def blocked_axis(axes: Sequence[int], shape: tuple[int, ...], block: int) -> int:
    """Which of a kernel's contracted axes blocks lie along: the last that is no shorter than one.

    For what it is multiplied by: the same, if the axes come in the kernel's order.
    """
    return axes[max(range(len(axes)), key=lambda i: (shape[axes[i]] >= block, i))]


def explained(traced: Site, known: Site | None) -> Site:
    """What a program tells of a parameter, with what the layer that reads it tells: `known`, of the layer's own shape.

    Axes that the layer does not know of are those of stacked layers; others that its product keeps apart are its own.
    """
    if known is None:
        return traced
    extra = len(traced.shape) - len(known.shape)
    stacked = next(
        (taken for taken in itertools.combinations(traced.stacked, max(extra, 0))
         if tuple(n for i, n in enumerate(traced.shape) if i - len(traced.shape) not in taken) == known.shape),
        traced.stacked,
    )  # fmt: skip
    notes = [note for note in (known.note, traced.note) if note is not None]
    rewritten = None
    if traced.changed is not None:
        # By code around the layer, which may take a packed leaf apart and change its bytes.
        rewritten = f"it is rewritten before the product of {known.module}: {traced.changed}"
    return traced._replace(
        path=known.path, module=known.module, stacked=stacked, note="; ".join(notes) or None,
        reason=known.reason or traced.reason or rewritten, training=known.training or traced.training,
    )  # fmt: skip


class Walk(NamedTuple):
    """What a walk over a model found.

    Attributes:
        sites: by the parameter's path, those that the model reads; and by their own, modules that multiply without
            parameters. A parameter of which nothing is known but that it is read has no axes and no reason.
        modules: class names of modules, by path.
    """

    sites: dict[str, Site]
    modules: dict[str, str]


def innermost(path: str, modules: Mapping[str, str]) -> str | None:
    """The class of the module around a parameter; lists and dictionaries of parameters may lie between."""
    while path and path not in modules:
        path = path.rpartition("/")[0]
    return modules.get(path)


def classes_of(tree: Any) -> dict[str, str]:
    """Class names of the modules in a tree of parameters that is made of some, as Equinox's and NNX's are, by path."""
    classes: dict[str, str] = {}
    for keys, _ in jax.tree_util.tree_leaves_with_path(tree):
        node: Any = tree
        for depth, key in enumerate(keys):
            if not isinstance(node, Mapping | Sequence) and type(node).__module__.partition(".")[0] != "jax":
                classes.setdefault(join_path(keys[:depth]), type(node).__name__)
            if isinstance(key, jax.tree_util.GetAttrKey):
                node = getattr(node, key.name, None)
            elif isinstance(key, jax.tree_util.SequenceKey | jax.tree_util.DictKey):
                node = node[key.idx if isinstance(key, jax.tree_util.SequenceKey) else key.key]
            else:
                break
    return classes


def join_path(keys: Iterable[Any]) -> str:
    """'/'-joined names: of a module's path, or of a key path in a tree."""
    return "/".join(key if isinstance(key, str) else jax.tree_util.keystr((key,), simple=True) for key in keys)
