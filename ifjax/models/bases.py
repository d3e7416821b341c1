"""The changes of basis that rules ask for, in whole models: computed, folded into producers, or left to each call."""

import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp

from ifjax.arrays import QTensor
from ifjax.models.adapters import Adapted
from ifjax.models.decisions import Decision
from ifjax.models.folding import CannotFold, Fold, Folder, divided, turned
from ifjax.models.sites import Site
from ifjax.models.trace import function_program
from ifjax.models.transforms import Transform, columns_of, transform_of


class Basis(NamedTuple):
    """The change of basis of a weight.

    Attributes:
        whole: the change, which the Hessian of the inputs takes, too.
        online: the part that inputs take at each call; None if there is none.
        note: what took the other part, or why nothing did.
    """

    whole: Transform
    online: Transform | None
    note: str


class Bases(NamedTuple):
    """Changes of basis of a model's parameters.

    Attributes:
        bases: by path, of weights whose inputs are changed.
        values: new floats by path, with all that is folded: of these weights (without the online part), of the
            producers of their inputs, and of weights that share an input and are not quantized.
        notes: remarks by path, about what parameters take of others.
    """

    bases: dict[str, Basis]
    values: dict[str, Any]
    notes: dict[str, str]

    def note(self, path: str, text: str) -> None:
        """Add a remark about a parameter."""
        self.notes[path] = "; ".join([*filter(None, [self.notes.get(path)]), text])

    def all_notes(self, path: str) -> list[str]:
        """Return all remarks about a parameter."""
        own = [self.bases[path].note] if path in self.bases else []
        return [*own, *filter(None, [self.notes.get(path)])]


class Wanted(NamedTuple):
    """A parameter that may take part: its site, value and the rules' decision."""

    site: Site
    value: Any
    decision: Decision

    @property
    def is_changed(self) -> bool:
        """Whether a rule asks for smoothing or rotation of the inputs."""
        rule, q = self.decision.rule, self.decision
        return rule is not None and q.weights is not None and (rule.smooth is not None or rule.rotate is not None)

    @property
    def axis(self) -> int:
        """Axis whose channels are changed."""
        assert self.decision.axis is not None
        return self.decision.axis % len(self.value.shape) - len(self.value.shape)


def changed_bases(
    parameters: Mapping[str, Wanted], program: Callable[[], Any] | None, inputs: Mapping[str, Any]
) -> Bases:
    """Return the changes of basis that the rules ask for.

    Args:
        parameters: all parameters by path.
        program: a function that returns the ClosedJaxpr of the model and the paths of its first inputs, or None; None
            to fold nothing.
        inputs: calibrated inputs, as in `Calibration`.

    Raises:
        ValueError: as `transform_of`.
    """
    wanted = {path: p for path, p in parameters.items() if p.is_changed and not is_packed(p.value)}
    found = Bases({}, {}, {})
    folder = _folder(parameters, program) if program is not None and wanted else None
    for path, p in wanted.items():
        if path not in found.bases:
            _one(path, p, parameters, wanted, folder, inputs, found)
    return found


def statistic_of(statistics: Mapping[str, Any], site: Site) -> Any:
    """Return a site's calibrated statistic: under its own path, or that of the linen module inside a function."""
    return statistics.get(site.path, statistics.get(site.parameter.rpartition("/")[0]))


def is_packed(value: Any) -> bool:
    """Return whether a value is packed already."""
    return isinstance(value, QTensor | Adapted)


def _folder(parameters: Mapping[str, Wanted], program: Callable[[], Any]) -> Folder | None:
    traced = program()
    if traced is None:
        return None

    def takes(first: str, second: str, axis: int) -> None:
        if second not in parameters:
            raise CannotFold(f"{second!r} reads the input, too")
        one, other = parameters[first], parameters[second]
        if is_packed(other.value) or not jnp.issubdtype(other.value.dtype, jnp.floating):
            raise CannotFold(f"{second!r}, which reads the input too, is packed")
        if other.decision.weights is not None and (_method(one) != _method(other) or other.axis != axis):
            raise CannotFold(f"{second!r}, which reads the input too, has another rule")

    jaxpr, paths = traced
    return Folder(jaxpr, paths, takes)


def _method(p: Wanted) -> tuple[Any, ...]:
    rule = p.decision.rule
    searched = rule is not None and rule.smooth == "awq"  # with these formats
    return () if rule is None else (rule.smooth, rule.rotate, (rule.weights, rule.activations) if searched else None)


def _one(path, p, parameters, wanted, folder, inputs, found: Bases) -> None:
    """Add the change of a weight, and that of the others which share its fold."""
    rule = p.decision.rule
    assert rule is not None
    fold, reason = _fold(folder, path, p, None, parameters, found) if rule.smooth is not None else (None, "")
    members = [path] if fold is None else [m for m in fold.members if m in wanted]
    others = [columns_of(wanted[m].value, wanted[m].axis) for m in members if m != path]
    try:
        whole = transform_of(rule, p.value, p.axis, p.site.axes, statistic_of(inputs, p.site), others)
    except ValueError as error:
        raise ValueError(f"{p.site.path!r}: {error}") from None
    assert whole is not None
    parts, notes, online = whole.parts(), [], []
    for part, what, own in zip(parts, ("smoothing", "rotation"), (fold, None), strict=True):
        if part is None:
            continue
        if part is parts[1] and (rule.smooth is None or fold is not None):
            own, reason = _fold(folder, path, p, rule.rotation_run(p.value.shape[p.axis]), parameters, found)
            if own is not None and fold is not None and set(own.members) != set(fold.members):
                own, reason = None, "other weights share only a part of the change"
        if own is None:
            online.append(part)
            notes.append(f"{what} at each call: {reason}")
            continue
        members = [m for m in own.members if m in wanted]
        for name in own.members:
            q = parameters[name]
            value = found.values.get(name, q.value)
            axis = q.axis if name in wanted else q.site.axes[-1]
            found.values[name] = part.weights(jnp.asarray(value), axis)
            if name not in wanted:
                found.note(name, f"takes the {what} of {path}")
        for name, producer in own.producers.items():
            value = jnp.asarray(found.values.get(name, parameters[name].value))
            change = divided(value, producer, part.scale) if part.scale is not None else turned(value, producer, part)
            found.values[name] = change
            found.note(name, f"has the {what} of {', '.join(members)}")
        notes.append(f"{what} folded into {', '.join(own.producers)}")
    left = None if not online else online[0] if len(online) == 1 else whole
    for name in members:
        found.bases[name] = Basis(whole, left, "; ".join(notes))


def _fold(folder, path: str, p: Wanted, run: int | None, parameters, found: Bases) -> tuple[Fold | None, str]:
    """Return what can take a change, or None and the reason."""
    if folder is None:
        return None, "no model= with sample= tells what makes its input"
    if path not in folder.numbers:
        return None, "the program does not read it as it is"
    try:
        fold = folder.find(path, p.axis, run)
    except CannotFold as error:
        return None, str(error)
    if any(name in found.bases for name in fold.members):
        return None, "another weight of this input has another change"
    for name in fold.producers:
        value = parameters[name].value if name in parameters else None
        if value is None or is_packed(value) or not jnp.issubdtype(value.dtype, jnp.floating):
            return None, f"{name!r}, which makes its input, is packed or no float"
        if name in fold.members:
            return None, f"{name!r} makes its own input"
    return fold, ""


def model_program(model: Any, params: Any, sample: Any, method: Any) -> Any:
    """Return the ClosedJaxpr of a model and the paths of its parameters; None without a model or sample.

    The model and the sample have been checked by `walk_model`.
    """
    if model is None or sample is None:
        return None
    nnx, linen = (sys.modules.get(f"flax.{name}") for name in ("nnx", "linen"))
    if nnx is not None and isinstance(model, nnx.Module):
        from ifjax.models.flax.nnx import program

        return program(model, sample, method)
    if linen is not None and isinstance(model, linen.Module):
        from ifjax.models.flax.linen import program

        variables = params if isinstance(params.get("params"), Mapping) else {"params": params}
        return program(model, variables, sample, method)
    return function_program(model, params, sample)
