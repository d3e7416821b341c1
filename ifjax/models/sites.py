"""Sites: the parameters of a model and the products that read them."""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from ifjax.models.leaves import is_leaf

LOOKUP = "it looks rows up and multiplies nothing"
NO_MATRIX = "it is no matrix"
NOT_READ = "the model has not read it: the sample does not reach it, or it is of another model"
UNEXPLAINED = "no module tells where it is multiplied by"


class Site(NamedTuple):
    """A parameter and the product that reads it, as found in linen models, NNX models and traced programs.

    A module whose product has no parameter (attention), or that has no product, is a site, too, because rules may name
    it. Axes are negative, so that they also hold for one layer of a stack.

    Attributes:
        parameter: '/'-joined path in the parameter tree; for a module its own path.
        path: the path that rules match: that of the module that multiplies, or the parameter's own if no known layer
            does.
        module: class name of the module; None without a module.
        shape: shape of the parameter; () if lengths do not matter.
        axes: contracted axes, in the parameter's order; () if unknown.
        stacked: axes along which layers are stacked, as by scan or vmap.
        operands: names of the operands of a module without a kernel.
        packed: whether the parameter is already a QTensor.
        assumed: contraction axis to assume if `axes` is () and the rule names none.
        reason: why the parameter cannot be quantized; None if it can.
        activations: why the activations cannot be quantized; None if they can.
        training: why no recipe applies; None if one does.
        note: a remark for the report.
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
        """Whether the site has weights that can be quantized."""
        return self.reason is None and not self.operands

    @property
    def multiplies(self) -> tuple[str, ...]:
        """Names of the operands that can be quantized."""
        return self.operands if self.reason is None else ()

    @property
    def is_raw(self) -> bool:
        """Whether the contraction axis is unknown, so that the rule must name it."""
        return self.quantizable and not self.axes and not self.packed

    @property
    def length(self) -> int | None:
        """Length of the longest contracted axis; None for packed parameters or if shape or axes are unknown."""
        if self.packed or not self.shape or not self.axes:
            return None
        return max(self.shape[axis] for axis in self.axes)

    def in_training(self) -> "Site":
        """Return the site for training. It has no shape: recipes pad the last block, so lengths do not matter."""
        reason = self.reason or self.training or (UNEXPLAINED if self.is_raw else None)
        return self._replace(shape=(), reason=reason)


def without_matmul(modules: Mapping[str, str], sites: Iterable[Site]) -> list[Site]:
    """Return sites for those `modules` (class names by path) that occur in no path of `sites`."""
    known = {site.path for site in sites}
    return [Site(path, path, name, reason=f"{name} has no matmul of its own")
            for path, name in modules.items() if path not in known]  # fmt: skip


def blocked_axis(axes: Sequence[int], shape: tuple[int, ...], block: int) -> int:
    """Return the contracted axis that blocks lie along: the last one not shorter than a block, else the last one.

    The other operand's axis follows from the same call, if its `axes` come in the kernel's order.
    """
    return axes[max(range(len(axes)), key=lambda i: (shape[axes[i]] >= block, i))]


def explained(traced: Site, known: Site | None) -> Site:
    """Return a traced site completed from `known`, the site that the parameter's layer gives for its own shape.

    Of the traced stacked axes, only those that the layer's shape lacks count as stacked layers; other batch axes of the
    product belong to the layer.
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
        # Code around the layer changes the values. On a packed leaf it might change the bytes.
        rewritten = f"it is rewritten before the product of {known.module}: {traced.changed}"
    return traced._replace(
        path=known.path, module=known.module, stacked=stacked, note="; ".join(notes) or None,
        reason=known.reason or traced.reason or rewritten, training=known.training or traced.training,
    )  # fmt: skip


class Walk(NamedTuple):
    """The sites and modules of a model.

    Attributes:
        sites: sites by the parameter's path, and sites of modules that multiply without parameters by the module's
            path. A parameter that is read in an unknown way has no axes and no reason.
        modules: class names of modules by path.
    """

    sites: dict[str, Site]
    modules: dict[str, str]


def innermost(path: str, modules: Mapping[str, str]) -> str | None:
    """Return the class name of the innermost module around a path; None if there is none."""
    while path and path not in modules:
        path = path.rpartition("/")[0]
    return modules.get(path)


def classes_of(tree: Any) -> dict[str, str]:
    """Return class names by path of the modules that a parameter tree consists of, such as Equinox's and NNX's."""
    classes: dict[str, str] = {}
    for keys, _ in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf):
        node: Any = tree
        for depth, key in enumerate(keys):
            if not isinstance(node, Mapping | Sequence) and type(node).__module__.partition(".")[0] != "jax":
                classes.setdefault(join_path(keys[:depth]), type(node).__name__)
            if hasattr(node, "get_raw_value"):  # an NNX variable: what is inside is its value
                break
            if isinstance(key, jax.tree_util.GetAttrKey):
                node = getattr(node, key.name, None)
            elif isinstance(key, jax.tree_util.SequenceKey | jax.tree_util.DictKey):
                node = node[key.idx if isinstance(key, jax.tree_util.SequenceKey) else key.key]
            else:
                break
    return classes


def join_path(keys: Iterable[Any]) -> str:
    """Return the '/'-joined names of a module's path or of a key path in a tree."""
    return "/".join(key if isinstance(key, str) else jax.tree_util.keystr((key,), simple=True) for key in keys)
