"""Rules that map a checkpoint's names to the paths of a parameter tree, by regular expressions, with stacked layers."""

import dataclasses
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from ifjax.models.patterns import UnsupportedPattern, check_pattern, groups_of

_SHOWN = 20  # the largest number of faults in a message


@dataclasses.dataclass(frozen=True)
class NameRule:
    """A rule that maps tensors of a checkpoint to parameters of a tree; see `ifjax.load_file`.

    Args:
        name: a regular expression that matches whole names in the checkpoint, without backreferences. Names of more
            than 2000 characters do not match.
        path: the '/'-joined path of the parameter; "\\1" is replaced by the name's first group. With several paths,
            parameters share the tensor, as tied embeddings and heads do. None leaves the tensors out.
        transpose: whether the last two axes are swapped: a PyTorch weight [out, in] is a Flax kernel [in, out].
        stack: the groups of `name` that hold the indices, from 0, along leading axes, in order: (1,) for the layers of
            `nn.scan`, (1, 2) for layers of experts.
        reshape: whether the tensor, after transposition and splitting, is reshaped to the parameter's shape, for
            example [in, heads * size] to [in, heads, size].
        split: an axis of the transposed tensor, -1 or -2, that is divided among the paths, in their order: each gets as
            many entries as its parameter has. So are fused query, key and value, or gate and up.
        groups: the number of equal sections of the split axis, if every path has a share of each: the number of heads
            if query, key and value alternate by heads, or the number of columns of gate if gate and up alternate.

    Raises:
        ValueError: `name` is not a supported regular expression, or lacks a group that `stack` or `path` uses; `split`
            with one path, or `groups` without `split`.

    Example:
        >>> import ifjax
        >>> rule = ifjax.NameRule(r"layers\\.(\\d+)\\.up_proj\\.weight", r"layers/\\1/up/kernel", transpose=True)
        >>> rule.paths_of("layers.3.up_proj.weight")
        ('layers/3/up/kernel',)
    """

    name: str
    path: str | tuple[str, ...] | None
    _: dataclasses.KW_ONLY
    transpose: bool = False
    stack: tuple[int, ...] = ()
    reshape: bool = False
    split: int | None = None
    groups: int = 1

    def __post_init__(self):
        try:
            check_pattern(self.name)
            groups = re.compile(self.name).groups
        except (re.error, TypeError) as error:
            raise ValueError(f"NameRule({self.name!r}): name is not a regular expression: {error}") from None
        except UnsupportedPattern as error:
            raise ValueError(f"NameRule({self.name!r}): name {error}, as it is matched in polynomial time") from None
        object.__setattr__(self, "stack", tuple(self.stack))
        if any(not isinstance(group, int) or not 1 <= group <= groups for group in self.stack):
            raise ValueError(f"NameRule({self.name!r}): stack must be of the groups 1 to {groups}, got {self.stack}")
        if self.split not in (None, -1, -2):
            raise ValueError(f"NameRule({self.name!r}): split must be -1 or -2, an axis of a matrix, got {self.split}")
        if self.split is not None and len(self._templates) < 2:
            raise ValueError(f"NameRule({self.name!r}): split shares a tensor among several paths, got {self.path!r}")
        if self.groups < 1 or (self.groups > 1 and self.split is None):
            raise ValueError(f"NameRule({self.name!r}): groups counts runs of the split axis, got {self.groups} with "
                             f"split={self.split}")  # fmt: skip
        try:  # raises now if a template uses a group that `name` lacks
            for path in self._templates:
                _expanded(path, self.name, ("",) * (groups + 1))
        except (re.error, IndexError) as error:
            raise ValueError(f"NameRule({self.name!r}): path {self.path!r} does not fit it: {error}") from None

    @property
    def _templates(self) -> tuple[str, ...]:
        return () if self.path is None else (self.path,) if isinstance(self.path, str) else tuple(self.path)

    def paths_of(self, name: str) -> tuple[str, ...] | None:
        """Return the paths of the parameters that get the tensor of this name; None if the rule does not match it."""
        groups = groups_of(self.name, name)
        return None if groups is None else tuple(_expanded(path, self.name, groups) for path in self._templates)

    def place_of(self, name: str) -> tuple[int, ...]:
        """Return the index in the stack of a tensor whose name the rule matches.

        Raises:
            ValueError: a group of `stack` is not a number.
        """
        groups = groups_of(self.name, name)
        assert groups is not None
        counts = [groups[group] for group in self.stack]
        if not all(re.fullmatch(r"\d{1,9}", count, re.ASCII) for count in counts):
            raise ValueError(f"{name!r}: stack counts by groups {self.stack} of {self.name!r}, and these are {counts}")
        return tuple(map(int, counts))


def renamed(names: Iterable[str], rules: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Return new names by old ones, from pairs of a regular expression of whole names and a template as of `NameRule`.

    The first one that matches decides; other names stay.

    Raises:
        ValueError: no regular expression; a rule that matches nothing; two names that become one.
    """
    made = [NameRule(*rule) for rule in rules]
    new, used = {}, set()
    for name in names:
        found = next((rule for rule in made if rule.paths_of(name) is not None), None)
        (new[name],) = (name,) if found is None else found.paths_of(name) or (name,)
        used.add(found)
    faults = [f"{rule.name!r} matches no name" for rule in made if rule not in used]
    olds: dict[str, list[str]] = {}
    for old, name in new.items():
        olds.setdefault(name, []).append(old)
    faults += [f"{' and '.join(map(repr, same))} would become {name!r}" for name, same in olds.items() if len(same) > 1]
    refuse(faults, "rename= does not fit the names")
    return new


def _expanded(template: str, pattern: str, groups: Sequence[str]) -> str:
    """Return a template with the groups inserted.

    To use the syntax of `re.Match.expand`, the groups' text is matched again by groups of fixed lengths.
    """
    names = {i: f"?P<{name}>" for name, i in re.compile(pattern).groupindex.items()}
    plain = "".join(f"({names.get(i, '')}.{{{len(group)}}})" for i, group in enumerate(groups[1:], 1))
    match = re.fullmatch(plain, "".join(groups[1:]), re.DOTALL)
    assert match is not None
    return match.expand(template)


class Origin(NamedTuple):
    """The stored tensors from which a parameter is assembled.

    Attributes:
        rule: the rule that matches them.
        names: their names in the checkpoint, an array of strings with the shape of the stack.
        paths: the paths of the parameters that get the first of them, in the rule's order.
    """

    rule: NameRule
    names: np.ndarray
    paths: tuple[str, ...]


def origins(names: Iterable[str], rules: Iterable[NameRule], paths: Iterable[str]) -> dict[str, Origin]:
    """Return the origin of each parameter, by path; the first rule that matches a name applies.

    Raises:
        TypeError: `rules` are not NameRules.
        ValueError: a tensor matches no rule, a parameter gets no tensor or conflicting ones, or a stack has gaps; the
            message lists the faults.
    """
    rules = (rules,) if isinstance(rules, NameRule) else tuple(rules)
    for rule in rules:
        if not isinstance(rule, NameRule):
            raise TypeError(f"names must be ifjax.NameRule records, got {type(rule).__name__}")
    paths = dict.fromkeys(paths)
    taken: dict[str, dict[tuple[int, ...], tuple[NameRule, str]]] = {}
    faults = []
    for name in names:
        rule = next((rule for rule in rules if rule.paths_of(name) is not None), None)
        if rule is None:
            faults.append(f"{name!r} of the checkpoint is matched by no rule: NameRule(name, None) leaves it out")
            continue
        for path in rule.paths_of(name) or ():
            if path not in paths:
                faults.append(f"{name!r} goes to {path!r}, which is not in the tree")
                continue
            place, parts = rule.place_of(name), taken.setdefault(path, {})
            if parts and next(iter(parts.values()))[0] != rule:
                faults.append(f"{path!r} gets tensors by two rules, {name!r} and {next(iter(parts.values()))[1]!r}")
            elif place in parts:
                faults.append(f"{path!r} gets {name!r} and {parts[place][1]!r}: stack= tells which is which")
            else:
                parts[place] = rule, name
    faults += [f"{path!r} of the tree gets no tensor" for path in paths if path not in taken]
    faults += [fault for path, parts in taken.items() if (fault := _gap(path, parts)) is not None]
    refuse(faults, "the names do not fit the tree")
    found = {}
    for path, parts in taken.items():
        rule, first = next(iter(parts.values()))
        found[path] = Origin(rule, _stack({p: n for p, (_, n) in parts.items()}), rule.paths_of(first) or ())
    return found


def refuse(faults: Sequence[str], what: str) -> None:
    """Raise a ValueError that lists the faults, if there are any."""
    if faults:
        more = f"\n  and {len(faults) - _SHOWN} more" if len(faults) > _SHOWN else ""
        raise ValueError(f"{what}:\n  " + "\n  ".join(faults[:_SHOWN]) + more)


def _gap(path: str, parts: Mapping[tuple[int, ...], object]) -> str | None:
    lengths = tuple(max(place[i] for place in parts) + 1 for i in range(len(next(iter(parts)))))
    if len(parts) == int(np.prod(lengths)):
        return None
    missing = next(place for place in itertools.product(*map(range, lengths)) if place not in parts)
    return f"{path!r} is stacked of {' x '.join(map(str, lengths))} tensors, and number {missing} is missing"


def _stack(names: Mapping[tuple[int, ...], str]) -> np.ndarray:
    stacked = np.empty(tuple(n + 1 for n in max(names)), object)
    for place, name in names.items():
        stacked[place] = name
    return stacked
