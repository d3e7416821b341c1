"""Layers that servers multiply as one, and so take one factor for."""

import re
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from ifjax.arrays import QTensor, quantize

# Last parts of layers' names. One row is multiplied as one, if the layers stand in the same module.
FUSED = (
    ("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("wq", "wk", "wv"), ("gate_proj", "up_proj"),
    ("w1", "w3"), ("q_a_proj", "kv_a_proj_with_mqa"), ("in_proj_qkv", "in_proj_z"), ("in_proj_b", "in_proj_a"),
)  # fmt: skip
_ROW = {name: i for i, row in enumerate(FUSED) for name in row}


def fused_groups(names: Iterable[str]) -> list[tuple[str, ...]]:
    """Return the groups of parameters that servers multiply as one, by their dotted or '/'-joined names.

    Example:
        >>> from ifjax.exchange import fused_groups
        >>> fused_groups(["mlp.up_proj.weight", "mlp.gate_proj.weight", "mlp.down_proj.weight"])
        [('mlp.up_proj.weight', 'mlp.gate_proj.weight')]
    """
    groups: dict[tuple[str, int, str], list[str]] = {}
    for name in names:
        *module, layer, last = re.split(r"[./]", name) if re.search(r"[./]", name) else ("", name)
        if layer not in _ROW and last in _ROW:  # a stack of experts has no ".weight"
            module, layer, last = [*module, layer], last, ""
        if layer in _ROW:
            groups.setdefault((".".join(module), _ROW[layer], last), []).append(name)
    return [tuple(group) for group in groups.values() if len(group) > 1]


def common_amax(params: Mapping[str, Any], names: Iterable[Iterable[str]] | None = None) -> dict[str, Any]:
    """Return the parameters with one amax for the layers that servers multiply as one.

    The amax is the largest of the group; a tensor that has another is quantized again from its values, which costs it
    up to half a step of its block scales. Without that loss: quantize with the common `amax=` in the first place.

    Args:
        params: QTensors and arrays by flat names; arrays stay as they are.
        names: groups of names; `fused_groups` of the names unless given.

    Raises:
        ValueError: a name that is no QTensor's; tensors of several formats in a group.

    Example:
        >>> import jax.numpy as jnp
        >>> import ifjax
        >>> from ifjax import exchange
        >>> w = jnp.ones((2, 16))
        >>> params = {"q_proj.weight": ifjax.quantize(w, "nvfp4"), "k_proj.weight": ifjax.quantize(2 * w, "nvfp4")}
        >>> [float(q.amax) for q in exchange.common_amax(params).values()]
        [2.0, 2.0]
    """
    packed = {name: q for name, q in params.items() if isinstance(q, QTensor) and q.amax is not None}
    groups = fused_groups(packed) if names is None else [tuple(group) for group in names]
    result = dict(params)
    for group in groups:
        if missing := [name for name in group if name not in packed]:
            raise ValueError(f"{missing} are no QTensors with an amax among the parameters: leave them out, or "
                             "quantize them")  # fmt: skip
        _check_one_format(group, {(packed[name].fmt, packed[name].headroom) for name in group})
        amax = max(float(np.max(np.asarray(packed[name].amax))) for name in group)
        for name in group:
            if (np.asarray(packed[name].amax) != amax).any():
                result[name] = with_amax(packed[name], amax)
    return result


def with_amax(q: QTensor, amax: float) -> QTensor:
    """Return q quantized again from its values, with another amax."""
    new = quantize(q.dequantize(jnp.float32), q.fmt, axis=q.axis, block_2d=q.block_2d, amax=jnp.float32(amax))
    return new.replaced(dtype=q.dtype, names=q.names)


def warn_of_fused(amaxes: Mapping[str, Any]) -> None:
    """Warn where layers that servers multiply as one have several amax; None is of formats without one."""
    several = [group for group in fused_groups(amaxes) if not _agree([amaxes[name] for name in group])]
    if several:
        more = f", and {len(several) - 1} more groups" if len(several) > 1 else ""
        warnings.warn(
            f"{', '.join(several[0])}{more} have different amax, and servers that multiply them as one take one factor "
            "for all: quantize them with a common amax=, or set one by ifjax.exchange.common_amax",
            stacklevel=4,
        )


def fused_amax(amaxes: Mapping[str, Any], formats: Mapping[str, Any]) -> dict[str, float]:
    """Return the largest amax of their group for layers that servers multiply as one and that have several.

    Raises:
        ValueError: tensors of several formats in a group.
    """
    largest = {}
    for group in fused_groups(amaxes):
        if not _agree([amaxes[name] for name in group]):
            _check_one_format(group, {formats[name] for name in group})
            amax = max(float(np.max(np.asarray(amaxes[name]))) for name in group)
            largest |= dict.fromkeys(group, amax)
    return largest


def _check_one_format(group: tuple[str, ...], formats: set[Any]) -> None:
    if len(formats) > 1:
        raise ValueError(f"{group} are of several formats, which no one amax serves: quantize them to one")


def _agree(amaxes: list[Any]) -> bool:
    if any(amax is None for amax in amaxes):
        return True
    return len({np.asarray(amax, np.float32).tobytes() for amax in amaxes}) == 1
