"""Post-training quantization of parameter trees: rules in, packed tree and report out.

    parameters -> kernels (found by tracing the model, or named by rules) -> rules -> quantize each -> report
"""

import math
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from ifjax.arrays import DTYPES, QTensor, gptq, quantize
from ifjax.codec.blocks import split_blocks
from ifjax.formats import Format
from ifjax.models.adapters import Adapted
from ifjax.models.bases import Bases, Basis, Wanted, changed_bases, model_program, statistic_of
from ifjax.models.decisions import Decision, decide
from ifjax.models.leaves import (
    is_leaf,
    is_parameter,
    nbytes_of,
    rebuilt,
    split_collection,
    value_of,
    with_value,
)
from ifjax.models.names import named_reason
from ifjax.models.partition import can_train
from ifjax.models.report import Entry, Report, decibels
from ifjax.models.rule_checks import check_used
from ifjax.models.rules import Rule, as_rules, training_rules
from ifjax.models.sites import LOOKUP, NO_MATRIX, NOT_READ, Site, Walk, innermost, join_path, without_matmul
from ifjax.models.trace import function_walk
from ifjax.training.recipes import Recipe

Rules = Iterable[Rule] | Rule | str | Format | None


def quantize_params(
    params: Any,
    rules: Rules = None,
    *,
    model: Any = None,
    sample: Any = None,
    method: Any = None,
    calibration: Any = None,
) -> tuple[Any, Report]:
    """Replace parameters by packed QTensors as the rules say, and report what happened to every parameter.

    A linen model takes the result unchanged: `model.apply(packed, x)`. Under `ifjax.quantized` its products read the
    packed bytes. Blocks lie along each kernel's contraction axis, which is found by tracing the model on shapes (an NNX
    model without `sample`: from the fields of its modules). Without a model, and for a parameter whose product is not
    found, it is the rule's `axis`. Each layer that nn.scan or nn.vmap stacked has an amax of its own. So has each
    matrix (last two axes) of a parameter that no known layer multiplies by, such as stacked experts.

    Parameters that are already packed, and arrays that are not floats, stay as they are. The function works inside
    jax.eval_shape and jax.jit, as in `jax.eval_shape(lambda p: ifjax.quantize_params(p, rules)[0], params)`; the
    report then has no SQNR and no choice share.

    Args:
        params: a tree of arrays: nested dictionaries, linen variables (the collection "params" is quantized), or an
            NNX state (Param are quantized; other variables stay and are not reported). Boxes such as nn.Partitioned
            pass their axis names to the QTensor.
        rules: a list of `ifjax.Rule`, a single rule, or a format's name, which stands for `default_rules` with that
            format. None: "if4".
        model: the linen module, NNX model or function of (params, *sample) that params belong to.
        sample: the model's arguments: a tuple of positional ones, a mapping of keyword ones, or the only one. Shapes
            suffice (`jax.ShapeDtypeStruct`). Required for linen modules and functions.
        method: the method to trace, for linen and NNX models; `__call__` unless given.
        calibration: from `ifjax.calibrate`, for rules with gptq, smooth or rotate="greedy".

    Returns:
        The tree, with the same structure except for the QTensors, and an `ifjax.Report`.

    Raises:
        ValueError: a rule has no effect on these parameters (the message lists the closest paths), or a calibration
            is missing.
        TypeError: an argument has another type.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import ifjax
        >>> params = {"mlp": {"kernel": jax.random.normal(jax.random.key(0), (64, 32)), "bias": jnp.zeros(32)}}
        >>> packed, report = ifjax.quantize_params(params, ifjax.Rule(".*/kernel", "if4", axis=-2))
        >>> packed["mlp"]["kernel"]
        QTensor(if4, 64x32 float32, axis=-2, 4.516 bits a value)
        >>> report.check().totals.quantized
        1
    """
    return _quantize(params, rules, model, sample, method, calibration, fake=False)


def fake_quantize_params(
    params: Any,
    rules: Rules = None,
    *,
    model: Any = None,
    sample: Any = None,
    method: Any = None,
    calibration: Any = None,
) -> tuple[Any, Report]:
    """Quantize parameters and dequantize them again: floats of the same dtype, in the same boxes.

    Use it to measure the effect of a format on a model of any framework. Args, Returns and Raises are those of
    `quantize_params`; bytes and bits in the report are those of the floats.

    Example:
        >>> import jax.numpy as jnp
        >>> import ifjax
        >>> params = {"kernel": jnp.full((16, 1), 0.1)}
        >>> rounded, report = ifjax.fake_quantize_params(params, ifjax.Rule("kernel", "nvfp4", axis=-2))
        >>> rounded["kernel"].shape, rounded["kernel"].dtype.name, report.entries[0].fmt
        ((16, 1), 'float32', 'nvfp4')
    """
    return _quantize(params, rules, model, sample, method, calibration, fake=True)


def fold_params(
    params: Any,
    rules: Rules,
    *,
    model: Any,
    sample: Any = None,
    method: Any = None,
    calibration: Any = None,
) -> tuple[Any, dict[str, str]]:
    """Fold the smoothing and rotation that rules ask for into float parameters; the function stays what it was.

    `quantize_params` does the same before it rounds. Fold first to compare the functions in floats, or to calibrate on
    the inputs as they are after folding. What holds is the program of `model` on `sample`: a method that reads the
    changed parameters in another way would give other results.

    Args:
        params, rules, model, sample, method, calibration: as in `quantize_params`.

    Returns:
        The tree with floats of the same shapes and dtypes, and remarks by path: into which parameters a change was
        folded, or why it has to be made at each call and is not in the result.

    Raises:
        ValueError, TypeError: as `quantize_params`.

    Example:
        >>> import jax.numpy as jnp
        >>> import ifjax
        >>> def fn(params, x):
        ...     return x @ params["first"] @ params["second"]
        >>> params, x = {"first": jnp.eye(16), "second": jnp.eye(16)}, jnp.ones((2, 16))
        >>> folded, notes = ifjax.fold_params(params, ifjax.Rule(".*", rotate=16), model=fn, sample=x)
        >>> notes["second"], bool(jnp.allclose(fn(folded, x), fn(params, x), atol=1e-6))
        ('rotation folded into first', True)
    """
    rules = as_rules(rules)
    inner, put_back = split_collection(params)
    walk = walk_model(model, params, sample, method)
    leaves, structure = jax.tree_util.tree_flatten_with_path(inner, is_leaf=is_leaf)
    found = _parameters(leaves, rules, walk)
    check_used(rules, [p.site for p in found] + _other_sites(found, walk))
    bases = _bases(found, calibration, lambda: model_program(model, params, sample, method))
    new = {p.site.parameter: with_value(p.leaf, bases.values[p.site.parameter]) for p in found
           if p.site.parameter in bases.values}  # fmt: skip
    tree = jax.tree_util.tree_unflatten(structure, [new.get(join_path(keys), leaf) for keys, leaf in leaves])
    notes = {path: bases.all_notes(path) for path in (p.site.parameter for p in found)}
    return put_back(tree), {path: "; ".join(texts) for path, texts in notes.items() if texts}


def training_report(
    params: Any, rules: Iterable[Rule] | Rule | Recipe | str, *, model: Any, sample: Any = None, method: Any = None
) -> Report:
    """Report which kernels `ifjax.interceptors.training` and `ifjax.with_recipes` will train, by which recipe.

    Nothing is computed. The `fmt` of an entry is the recipe's name, and its bytes are those of the trained floats.

    Args:
        params: the model's parameters or their shapes, as in `quantize_params`.
        rules: as in `ifjax.interceptors.training`.
        model, sample, method: as in `quantize_params`.

    Raises:
        ValueError: a rule has no effect on these parameters; no rule has a recipe.
        TypeError: model is None.

    Example:
        >>> import flax.linen as nn, jax, jax.numpy as jnp
        >>> import ifjax
        >>> model, x = nn.Sequential([nn.Dense(64), nn.Dense(10)]), jnp.ones((4, 32))
        >>> params = jax.eval_shape(model.init, jax.random.key(0), x)
        >>> rules = [ifjax.Rule("layers_1", None), ifjax.Rule(".*", recipe="nvfp4")]
        >>> report = ifjax.training_report(params, rules, model=model, sample=x)
        >>> [(entry.path, entry.fmt or entry.reason) for entry in report.entries if "kernel" in entry.path]
        [('layers_0/kernel', 'nvfp4'), ('layers_1/kernel', "the rule 'layers_1' excludes it")]
    """
    rules = training_rules(rules)
    if model is None:
        raise TypeError("training_report needs model=: it says where the parameters are multiplied by")
    inner, put_back = split_collection(params)
    walk = walk_model(model, put_back(inner), sample, method)
    leaves, _ = jax.tree_util.tree_flatten_with_path(inner, is_leaf=is_leaf)
    found = [p.decided(rules, p.site.in_training()) for p in _parameters(leaves, rules, walk)]
    if found:
        check_used(rules, [p.site for p in found] + _other_sites(found, walk))
    return Report(tuple(_entry_in_training(p) for p in found))


def trainable_mask(params: Any) -> Any:
    """Return a tree of booleans for `optax.masked`: False for packed parameters and for arrays that are not floats.

    Without a mask, optax silently creates states and updates for the arrays inside a QTensor. Differentiate only the
    other parameters: for packed ones jax.grad returns float0, which optax cannot add.

    Example:
        >>> import jax.numpy as jnp
        >>> import ifjax
        >>> ifjax.trainable_mask({"kernel": ifjax.quantize(jnp.ones((16, 16))), "lora": jnp.ones(16)})
        {'kernel': False, 'lora': True}
    """
    return jax.tree.map(can_train, params, is_leaf=is_leaf)


class _Parameter(NamedTuple):
    """A leaf of the tree with its value, site and decision."""

    leaf: Any
    value: Any
    site: Site
    decision: Decision

    def decided(self, rules: Iterable[Rule], site: Site) -> "_Parameter":
        """Return this parameter with another site and the rules' decision for it."""
        return self._replace(site=site, decision=decide(rules, site))


def _quantize(params, rules, model, sample, method, calibration, *, fake):
    rules = as_rules(rules)
    inner, put_back = split_collection(params)
    walk = walk_model(model, params, sample, method)
    leaves, structure = jax.tree_util.tree_flatten_with_path(inner, is_leaf=is_leaf)
    found = _parameters(leaves, rules, walk)
    if found:
        check_used(rules, [p.site for p in found] + _other_sites(found, walk))
    bases = _bases(found, calibration, None if fake else lambda: model_program(model, params, sample, method))
    done = [_one(p, calibration, fake, bases) for p in found]
    new = iter([leaf for leaf, _ in done])
    tree = jax.tree_util.tree_unflatten(structure, [next(new) if is_parameter(leaf) else leaf for _, leaf in leaves])
    entries = [_entry(fields) for _, fields in done]
    return put_back(tree), Report((*entries, *_products(rules, walk)))


def _parameters(leaves, rules, walk) -> list[_Parameter]:
    found = []
    for keys, leaf in leaves:
        if is_parameter(leaf):
            value = value_of(leaf)
            site = _site(join_path(keys), value, walk)
            found.append(_Parameter(leaf, value, site, decide(rules, site)))
    return found


def _site(path: str, value: Any, walk: Walk | None) -> Site:
    """Return the site that the walk found for a parameter, or one derived from its name, shape and dtype."""
    shape, packed = tuple(value.shape), isinstance(value, QTensor | Adapted)
    known = walk.sites.get(path) if walk is not None else None
    if known is not None and known.axes:
        return known._replace(shape=shape, packed=packed, **({"axes": (value.axis,)} if packed else {}))
    module = innermost(path, walk.modules) if walk is not None else None
    stacked = known.stacked if known is not None else ()
    unknown = "no module tells where they enter"
    site = Site(path, path, module, shape, stacked=stacked, packed=packed, activations=unknown)
    if packed:  # needs no reason: it stays as it is
        return site
    if value.dtype.name not in DTYPES:
        return site._replace(reason=f"{value.dtype} is not quantized: {', '.join(DTYPES)} are")
    if known is not None and known.reason is not None:
        return site._replace(reason=known.reason)
    if len(shape) - len(stacked) < 2:
        return site._replace(reason=NO_MATRIX)
    if walk is None and (named := named_reason(path)) is not None:
        return site._replace(reason=named)
    return site if walk is None or known is not None else site._replace(reason=NOT_READ)


def _other_sites(found: list[_Parameter], walk: Walk | None) -> list[Site]:
    """Return the sites without a parameter that rules may match: attention and modules without a matmul."""
    if walk is None:
        return []
    products = [site for site in walk.sites.values() if site.operands]
    return products + without_matmul(walk.modules, [*(p.site for p in found), *products])


def _products(rules, walk) -> Iterable[Entry]:
    """Yield one entry for each attention module whose rule has operands."""
    for site in walk.sites.values() if walk is not None else ():
        decision = decide(rules, site)
        if not site.operands or decision.rule is None or not decision.rule.operands:
            continue
        formats = ", ".join(f"{name} in {how.fmt.name}" for name, how in decision.operands.items())
        reason = f"it has no weights; it multiplies {formats}" if site.reason is None else site.reason
        yield Entry(
            site.path, site.module, (0,), "", None, None, math.nan, 0, 0, rule=decision.rule.path, reason=reason,
            expected=decision.expected,
        )  # fmt: skip


def walk_model(model: Any, params: Any, sample: Any, method: Any) -> Walk | None:
    """Return the sites of a model's parameters; None without a model.

    Raises:
        TypeError: the model's type is not supported, or `sample`, `method` or `params` do not fit it.
    """
    if model is None:
        if sample is not None:
            raise TypeError("sample= is for the model that it is an input of: pass model=, too")
        return None
    nnx, linen = (sys.modules.get(f"flax.{name}") for name in ("nnx", "linen"))
    if nnx is not None and isinstance(model, nnx.Module):
        from ifjax.models.flax.nnx import walk

        return walk(model, sample, method)
    if linen is not None and isinstance(model, linen.Module):
        if sample is None:
            raise TypeError("a linen model tells its kernels when it is evaluated: pass sample=, an input of it")
        from ifjax.models.flax.linen import walk

        if not isinstance(params, Mapping):
            raise TypeError(f"parameters of a linen model are a dictionary, got {type(params).__name__}")
        variables = params if isinstance(params.get("params"), Mapping) else {"params": params}
        return walk(model, variables, sample, method)
    if not callable(model):
        raise TypeError(
            "model must be a function of (params, *sample), or a flax.linen or flax.nnx Module, got "
            f"{type(model).__name__}"
        )
    if sample is None or method is not None:
        raise TypeError("a function tells its products when it is evaluated: pass sample=, its arguments after params, "
                        "and no method=")
    return function_walk(model, params, sample)


def _entry_in_training(p: _Parameter) -> Entry:
    site, rule, recipe = p.site, p.decision.rule, p.decision.recipe
    asked = None if rule is None else rule.recipe
    reason = site.reason
    if rule is None or rule.excludes:
        reason = p.decision.reason
    elif asked is None:
        reason = reason or f"the rule {rule.path!r} has no recipe"
    return Entry(
        site.parameter, site.module, tuple(p.value.shape), str(p.value.dtype), None if recipe is None else recipe.name,
        None, 8 * nbytes_of(p.value) / max(p.value.size, 1), nbytes_of(p.value), nbytes_of(p.value),
        rule=None if rule is None else rule.path, reason=None if recipe is not None else reason,
        expected=not site.axes or site.quantizable or asked is None or reason == LOOKUP,
    )  # fmt: skip


def _one(p: _Parameter, calibration, fake, bases: Bases):
    """Return the new leaf and the fields of its entry. Numbers among the fields may still be device arrays."""
    site, decision, before = p.site, p.decision, nbytes_of(p.value)
    rule, path = decision.rule, p.site.parameter
    if path in bases.values:
        p = p._replace(value=bases.values[path], leaf=with_value(p.leaf, bases.values[path]))
    about = {
        "path": site.parameter, "module": site.module, "shape": tuple(p.value.shape), "dtype": str(p.value.dtype),
        "bytes_before": before, "rule": None if rule is None else rule.path,
    }  # fmt: skip
    if isinstance(p.value, QTensor | Adapted):
        q = p.value.base if isinstance(p.value, Adapted) else p.value
        wanted = None if rule is None else rule.weight_format
        other, act = wanted is not None and wanted != q.fmt, decision.activations
        return p.leaf, about | _measured(q, None) | {
            "fmt": q.fmt.name, "act_fmt": None if act is None else act.fmt.name,
            "bits_per_value": q.bits_per_value, "bytes_after": q.nbytes, "expected": not other,
            "note": "was packed before" + (f", and the rule asks for {wanted.name}" if other and wanted else ""),
        }  # fmt: skip
    reason, expected = decision.reason, decision.expected
    if reason is None and rule is not None and rule.gptq:
        reason, expected = _no_gptq(p, calibration), False
    if reason is not None:
        bits = 8 * before / p.value.size if p.value.size else float("nan")
        return p.leaf, about | {
            "fmt": None, "act_fmt": None, "bits_per_value": bits, "bytes_after": before, "reason": reason,
            "expected": expected, "note": "; ".join(bases.all_notes(path)) or None,
        }  # fmt: skip
    basis, act = bases.bases.get(path), decision.activations
    new = _packed(p, calibration, basis)
    notes = [*decision.notes, *bases.all_notes(path)]
    q = new.base if isinstance(new, Adapted) else new
    entry = about | _measured(new, p.value) | {
        "fmt": q.fmt.name, "act_fmt": None if act is None else act.fmt.name, "bits_per_value": q.bits_per_value,
        "bytes_after": nbytes_of(new), "note": "; ".join(notes) or None, "expected": decision.expected,
    }  # fmt: skip
    if fake:
        entry |= {"bytes_after": before, "bits_per_value": 8.0 * p.value.dtype.itemsize}
        return rebuilt(p.leaf, new.dequantize()), entry
    return with_value(p.leaf, new) if isinstance(new, Adapted) else rebuilt(p.leaf, new), entry


def _no_gptq(p: _Parameter, calibration) -> str | None:
    """Return why gptq cannot round this parameter; None if it can."""
    site, how = p.site, p.decision.weights
    if not site.axes or how is None:
        return "gptq needs a module that says what it is multiplied by"
    if site.stacked:
        return "gptq needs the inputs of each layer, and calibration sees stacked layers as one: leave gptq out"
    axes, shape = site.axes, p.value.shape
    neighbours = axes == tuple(range(axes[0], axes[0] + len(axes)))
    if len(axes) > 1 and not (neighbours and shape[axes[-1]] % how.fmt.block == 0):
        return f"gptq takes several contracted axes of {shape} only if they are neighbours and blocks fit the last"
    hessian = None if calibration is None else statistic_of(calibration.hessians, site)
    if hessian is not None and len(hessian) != math.prod(shape[a] for a in axes):
        return f"gptq needs one product of all inputs, and this takes its {len(hessian)} in groups: leave gptq out"
    return None


def _bases(found: list[_Parameter], calibration, program: Callable[[], Any] | None) -> Bases:
    """Return the changes of basis of all parameters; without a program, all of them are made at each call."""
    def is_refused(p):  # by gptq, so that it stays as it is
        rule = p.decision.rule
        return p.decision.reason is None and rule is not None and rule.gptq and _no_gptq(p, calibration) is not None

    parameters = {p.site.parameter: Wanted(p.site, p.value, p.decision) for p in found if not is_refused(p)}
    return changed_bases(parameters, program, {} if calibration is None else calibration.inputs)


def _packed(p: _Parameter, calibration, basis: Basis | None) -> QTensor | Adapted:
    """Return the packed weight, in the basis of the inputs at each call."""
    decision, value, names = p.decision, jnp.asarray(p.value), getattr(p.leaf, "names", None)
    assert decision.weights is not None and decision.axis is not None
    online = None if basis is None else basis.online
    if online is not None:
        value = online.weights(value, decision.axis)
    q = _rounded(p, value, calibration, None if basis is None else basis.whole).replaced(names=names)
    return q if online is None else Adapted(q, transform=online)


def _rounded(p: _Parameter, value, calibration, transform) -> QTensor:
    decision = p.decision
    assert decision.rule is not None and decision.weights is not None and decision.axis is not None
    if decision.rule.gptq:
        return _by_gptq(p, value, decision.weights, decision.rule, calibration, transform)
    if decision.axis in p.site.stacked:
        raise ValueError(
            f"{p.site.parameter!r}: layers are stacked along axis {decision.axis} of {value.shape}: give another axis="
        )
    return quantize(value, decision.weights, axis=decision.axis, amax_axes=decision.amax_axes)


def _by_gptq(p: _Parameter, value, how, rule, calibration, transform) -> QTensor:
    hessian = None if calibration is None else statistic_of(calibration.hessians, p.site)
    if hessian is None:
        raise ValueError(
            f"{p.site.path!r}: gptq needs calibration=ifjax.calibrate(...) with these rules"
            + ("" if calibration is None else ", and this one has not seen the module")
        )
    if transform is not None:
        hessian = np.asarray(transform.hessian(hessian))
    first, last = p.site.axes[0], p.site.axes[-1]
    before, after = value.shape[:first], value.shape[value.ndim + last + 1 :]
    rows = value.reshape(*before, -1, *after)  # the contracted axes are merged into one
    merged = last - first
    own = [a if a > last else a + merged for a in p.decision.amax_axes]
    q = gptq(
        rows, hessian, how.fmt, axis=last, loss=rule.loss, search=how.search, amax_axes=own, damping=rule.damping
    )
    codes, scales = (a.reshape(*value.shape[:last], -1, *after) for a in (q.codes, q.scales))
    amax = q.amax
    if amax is not None and amax.ndim > len(before):
        amax = amax.reshape(*amax.shape[: len(before)], *[1] * merged, *amax.shape[len(before) :])
    return q.replaced(codes=codes, scales=scales, amax=amax, length=value.shape[last])


@jax.jit
def _measured(q: QTensor | Adapted, x) -> dict[str, Any]:
    """Return the share of blocks of other choices than the first, sums of squares, and the share of flushed blocks.

    The sums are those of x and of the error. A flushed block has nonzero values and decodes to zeros only; transformed
    weights are counted as they are stored.
    """
    base = q.base if isinstance(q, Adapted) else q
    share = (base.choices() > 0).mean() if base.fmt.has_selector else None
    if x is None:
        return {"choice_share": share, "sqnr_db": None, "flushed_share": None}
    x, decoded = x.astype(jnp.float32), q.dequantize(jnp.float32)
    powers = (x**2).sum(), ((x - decoded) ** 2).sum()
    if isinstance(q, Adapted) and q.transform is not None:
        x, decoded = q.transform.weights(x, base.axis), base.dequantize(jnp.float32)
    there, kept = (jnp.any(split_blocks(a, base.fmt.block, base.axis) != 0, axis=base.axis) for a in (x, decoded))
    flushed = (there & ~kept).sum() / jnp.maximum(there.sum(), 1)
    return {"choice_share": share, "sqnr_db": powers, "flushed_share": flushed}


def _entry(fields: dict[str, Any]) -> Entry:
    """Return an Entry with plain numbers; traced ones become None.

    It is called after all parameters are dispatched, so that waiting for one does not delay the next.
    """
    for name in ("choice_share", "sqnr_db", "flushed_share"):
        value = fields.get(name)
        if any(isinstance(a, Tracer) for a in jax.tree.leaves(value)):
            fields[name] = None
        elif value is not None:
            fields[name] = decibels(*map(float, value)) if name == "sqnr_db" else float(value)
    return Entry(**fields)
