"""The rules' decision for a site, shared by files, parameters, interceptors, calibration and training."""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from ifjax.codec import Encoding
from ifjax.models.rules import BY_DEFAULT, Rule, first_match
from ifjax.models.sites import NOT_READ, Site, blocked_axis
from ifjax.training import Recipe, get_recipe


class Decision(NamedTuple):
    """The decision of the rules for a site.

    Attributes:
        rule: the first rule that matches; None if none does.
        reason: why the weights are not quantized; None if they are.
        expected: False if a rule cannot be followed, or if no rule decided about a matrix.
        weights: encoding of the weights; None if they are not quantized.
        axis: blocked axis of the weights; None if they are not quantized.
        amax_axes: axes along which the weights have separate amaxes.
        activations: encoding of the activations; None if they are not quantized.
        operands: encodings of the quantized operands of a module without a kernel, by name.
        recipe: training recipe of the product; None without one.
        notes: remarks for the report.
    """

    rule: Rule | None = None
    reason: str | None = None
    expected: bool = True
    weights: Encoding | None = None
    axis: int | None = None
    amax_axes: tuple[int, ...] = ()
    activations: Encoding | None = None
    operands: Mapping[str, Encoding] = {}
    recipe: Recipe | None = None
    notes: tuple[str, ...] = ()


def decide(rules: Iterable[Rule], site: Site) -> Decision:
    """Return the decision of the first rule that matches. For training, pass `site.in_training()`."""
    rule = first_match(rules, site.path, site.module)
    if rule is None:
        return Decision(None, site.reason or "no rule matches it", not site.quantizable)
    if site.operands:
        operands = rule.operand_encodings if site.reason is None else {}
        return Decision(rule, reason_against(rule, site), bool(operands) or not rule.operands, operands=operands)
    reason = reason_against(rule, site)
    if reason is not None:
        return Decision(rule, reason, _is_expected(rule, site))
    activations, notes = rule.activations, () if site.note is None else (site.note,)
    if activations is not None and site.activations is not None:
        activations, notes = None, (f"activations are not quantized: {site.activations}", *notes)
    axis = contraction_axis(rule, site)
    return Decision(
        rule, None, activations is not None or rule.activations is None, rule.weights, axis,
        _own_amax(rule, site, axis), activations, notes=notes,
        recipe=None if rule.recipe is None else get_recipe(rule.recipe),
    )  # fmt: skip


def reason_against(rule: Rule, site: Site) -> str | None:
    """Return why a rule does not quantize the weights of a site that it matches; None if it does."""
    if rule.weight_fmt is None:
        return BY_DEFAULT.get((rule.path, rule.module)) or f"the rule {rule.path!r} excludes it"
    return unfit(rule, site) or too_short(rule, site)


def unfit(rule: Rule, site: Site) -> str | None:
    """Return why this rule cannot quantize the site's weights, apart from their length; None if it can."""
    if not site.quantizable:
        return site.reason or f"{site.module or 'it'} cannot be quantized"
    if not site.is_raw:
        return None
    axis, shape = contraction_axis(rule, site), site.shape
    if axis is None:
        which = "-2 for [in, out], axis=-1 for [out, in]"
        if len(shape) > 2:
            which = "-2 for [.., in, out], axis=-3 for [in, heads, head size]"
        return (
            f"no module tells the contraction axis of its shape {shape}: pass model= and sample=, by which it is "
            f"found, or give the rule axis={which}"
        )
    if not -len(shape) <= axis < len(shape):
        return f"its shape {shape} has no axis {axis}: give the rule axis={-len(shape)} or above"
    return None


def too_short(rule: Rule, site: Site) -> str | None:
    """Return a sentence if the contraction is shorter than a block; None if it is not."""
    axis = contraction_axis(rule, site) if site.is_raw else None
    length = site.length if axis is None else site.shape[axis]
    for fmt in (rule.weight_format, rule.activation_format):
        if fmt is not None and length is not None and length < fmt.block:
            return f"its contraction length {length} is below the block of {fmt.block} of {fmt.name}"
    return None


def contraction_axis(rule: Rule, site: Site) -> int | None:
    """Return the blocked axis: one of the site's contracted axes, else the rule's, else the assumed one, else None."""
    fmt = rule.weight_format
    if site.axes and site.shape and fmt is not None:
        return blocked_axis(site.axes, site.shape, fmt.block)
    return site.axes[-1] if site.axes else site.assumed if rule.axis is None else rule.axis


def _own_amax(rule: Rule, site: Site, axis: int | None) -> tuple[int, ...]:
    """Return the axes with separate amaxes: those of stacked layers, and the leading ones of a parameter without layer.

    The latter have one amax per matrix (last two axes), such as one per expert. With weight_amax="row", all axes that
    are not contracted have.
    """
    fmt = rule.weight_format
    if fmt is None or not fmt.has_tensor_scale:
        return ()
    if rule.weight_amax == "row":
        return tuple(sorted({*range(-len(site.shape), 0)} - {axis, *site.axes}))
    matrices = range(-len(site.shape), -2) if site.path == site.parameter else ()
    return tuple(sorted({*site.stacked, *matrices} - {axis, *site.axes}))


def _is_expected(rule: Rule, site: Site) -> bool:
    """Return whether a report may accept that a rule does not quantize the weights of a site that it matches."""
    if rule.excludes:
        return True
    if not site.quantizable:
        # Vectors and biases always stay floats. A kernel that cannot be quantized must be reported.
        return not site.axes and site.reason != NOT_READ
    # An optional rule may match weights that are too short for a block. A matrix of unknown axis is still reported.
    return rule.optional and (bool(site.axes) or rule.axis is not None)
