"""LoRA: trainable low-rank adapters beside packed weights (arXiv 2106.09685, QLoRA 2305.14314).

    adapters = init(key, packed, model=, sample=)        trainable parameters, for any optimizer
    fn       = ifjax.quantized(fn, rules)                multiplies by the packed base and by the adapters
    y        = fn(attach(packed, adapters), x)           differentiate with respect to `adapters`
    packed   = merge(packed, adapters)                   base plus adapters, quantized like the base

Adapters are a dictionary keyed by the parameters' paths, so they are saved, sharded and optimized like any pytree.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from ifjax.arrays import QTensor, quantize
from ifjax.arrays.shaping import has_own_amax
from ifjax.codec import Loss, Search
from ifjax.models.adapters import Adapted, Adapter
from ifjax.models.leaves import is_leaf, is_parameter, rebuilt, split_collection, value_of, with_value
from ifjax.models.patterns import fullmatch
from ifjax.models.ptq import walk_model
from ifjax.models.sites import Site, join_path

__all__ = ["Adapted", "Adapter", "attach", "init", "merge"]


def init(
    key: jax.Array,
    params: Any,
    targets: str | None = None,
    *,
    rank: int = 8,
    alpha: float | None = None,
    model: Any = None,
    sample: Any = None,
    method: Any = None,
    dtype: DTypeLike = jnp.float32,
) -> dict[str, Adapter]:
    """Return initial adapters whose update is zero: `a` is normal with variance 1 / inputs, `b` is zero.

    Args:
        key: a key of jax.random.
        params: a tree of parameters, packed or not, as for `ifjax.quantize_params`.
        targets: regular expression that matches the whole path of each parameter to adapt, such as
            ".*/(query|value)/kernel"; unless given, all packed parameters are adapted.
        rank: rank of the updates.
        alpha: updates are multiplied by alpha / rank; unless given, by 1.
        model, sample, method: as for `ifjax.quantize_params`. They determine the contracted axes and those of stacked
            layers. Without a model, only packed matrices can be adapted, contracted along their blocked axis.
        dtype: dtype of the adapters.

    Returns:
        Adapters by path of the parameter.

    Raises:
        ValueError: rank is below 1; no parameter matches; the contracted axes of a parameter are unknown.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import ifjax
        >>> params = {"kernel": ifjax.quantize(jnp.eye(64), "if4", axis=-2), "bias": jnp.zeros(64)}
        >>> adapters = ifjax.lora.init(jax.random.key(0), params, rank=4)
        >>> adapters["kernel"].a.shape, adapters["kernel"].b.shape
        ((64, 1, 4), (1, 64, 4))
        >>> fn = ifjax.quantized(lambda params, x: x @ params["kernel"] + params["bias"][None])
        >>> fn(ifjax.lora.attach(params, adapters), jnp.ones((2, 64))).shape
        (2, 64)
    """
    if rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
    inner, put_back = split_collection(params)
    walk = walk_model(model, put_back(inner), sample, method)
    made, paths = {}, []
    for keys, leaf in jax.tree_util.tree_flatten_with_path(inner, is_leaf=is_leaf)[0]:
        if not is_parameter(leaf):
            continue
        path, value = join_path(keys), value_of(leaf)
        paths.append(path)
        if not (isinstance(value, QTensor | Adapted) if targets is None else fullmatch(targets, path)):
            continue
        site = walk.sites.get(path) if walk is not None else None
        contracted, stacked = _axes(path, value, site)
        shape = value.shape
        a_shape = [n if i in (*contracted, *stacked) else 1 for i, n in enumerate(shape)]
        b_shape = [1 if i in contracted else n for i, n in enumerate(shape)]
        inputs = math.prod(shape[i] for i in contracted)
        own = jax.random.fold_in(key, len(made))
        a = jax.random.normal(own, (*a_shape, rank), dtype) * np.asarray(inputs**-0.5, dtype)
        scale = 1.0 if alpha is None else alpha / rank
        made[path] = Adapter(a, jnp.zeros((*b_shape, rank), dtype), scale)
    if not made:
        what = "no parameter is packed: pass targets=" if targets is None else f"targets={targets!r} matches no path"
        raise ValueError(f"{what}; paths are {', '.join(paths[:8])}{', ...' if len(paths) > 8 else ''}")
    return made


def attach(params: Any, adapters: Mapping[str, Adapter]) -> Any:
    """Return parameters with adapters attached, for functions transformed by `ifjax.quantized`.

    Differentiate with respect to `adapters`, as in jax.grad(lambda adapters: loss(fn(attach(params, adapters), x))).

    Raises:
        ValueError: an adapter belongs to no parameter, or to one of another shape.
    """
    return _changed(params, adapters, lambda leaf, value, adapter: with_value(leaf, _beside(value, adapter)))


def merge(
    params: Any,
    adapters: Mapping[str, Adapter],
    *,
    loss: Loss | None = None,
    search: str | Search | None = None,
) -> Any:
    """Return parameters with the adapters' updates added. Packed ones are quantized again to their format and axis.

    Args:
        params: the base parameters.
        adapters: their adapters, by path.
        loss, search: as for `ifjax.quantize`.

    Raises:
        ValueError: as for `attach`.
    """

    def one(leaf, value, adapter):
        new = _beside(value, adapter).dequantize()
        transform = value.transform if isinstance(value, Adapted) else None
        value = value.base if isinstance(value, Adapted) else value
        if not isinstance(value, QTensor):
            return with_value(leaf, new)
        new = new if transform is None else transform.weights(new, value.axis)
        own = [axis for axis in range(value.ndim) if has_own_amax(value, axis)]
        options: Any = {"loss": loss, "search": search, "block_2d": value.block_2d, "amax_axes": own}
        q = quantize(new, value.fmt, axis=value.axis, **options)
        q = q.replaced(names=value.names)
        return rebuilt(leaf, q) if transform is None else with_value(leaf, Adapted(q, transform=transform))

    return _changed(params, adapters, one)


def _beside(value: Any, adapter: Adapter) -> Adapted:
    """Return a weight with an adapter; an existing transform is kept."""
    return dataclasses.replace(value, adapter=adapter) if isinstance(value, Adapted) else Adapted(value, adapter)


def _changed(params, adapters, change):
    """Return the tree with `change(leaf, value, adapter)` in place of each leaf that has an adapter."""
    inner, put_back = split_collection(params)
    left = dict(adapters)

    def one(keys, leaf):
        path = join_path(keys)
        if path not in left or not is_parameter(leaf):
            return leaf
        adapter, value = left.pop(path), value_of(leaf)
        shape = tuple(max(pair) for pair in zip(adapter.a.shape[:-1], adapter.b.shape[:-1], strict=False))
        if shape != tuple(value.shape):
            raise ValueError(f"the adapter of {path!r} is of a weight of another shape than {value.shape}")
        return change(leaf, value, adapter)

    tree = jax.tree_util.tree_map_with_path(one, inner, is_leaf=is_leaf)
    if left:
        raise ValueError(f"adapters of parameters that are not there: {', '.join(sorted(left)[:5])}")
    return put_back(tree)


def _axes(path: str, value: Any, site: Site | None) -> tuple[list[int], list[int]]:
    """Return the contracted axes and those of stacked layers, counted from the front."""
    ndim = value.ndim
    if site is not None and site.axes:
        return [a + ndim for a in site.axes], [a + ndim for a in site.stacked]
    if isinstance(value, QTensor | Adapted) and ndim == 2 and site is None:
        return [value.axis + ndim], []
    raise ValueError(
        f"nothing tells which axes of {path!r} {tuple(value.shape)} are contracted"
        + (": pass model= and sample=" if site is None else f": {site.reason or 'no product reads it'}")
    )
