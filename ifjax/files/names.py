"""From a checkpoint's names to the paths of a tree of parameters: rules of regular expressions, stacks of layers."""

import dataclasses
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from ifjax.models.patterns import UnsupportedPattern, check_pattern, groups_of

_SHOWN = 20  # faults in a message


@dataclasses.dataclass(frozen=True)
class NameRule:
    """Where tensors of a checkpoint belong in a tree of parameters; see `ifjax.load_file`.

    Args:
        name: a regular expression of whole names in the checkpoint, without backreferences; names of more than 2000
            characters match none.
        path: of the parameter, '/'-joined; "\\1" stands for the name's first group. Several paths share the tensor, as
            tied embeddings and heads do. None: the tensors are left out.
        transpose: whether the last two axes change places: a PyTorch weight [out, in] is a Flax kernel [in, out].
        stack: the groups of `name` that count what is stacked along leading axes, in their order: (1,) for the layers
            of `nn.scan`, (1, 2) for layers of experts. They count from 0.
        reshape: whether the tensor, transposed and split if it is to be, is laid in the parameter's shape, such as [in,
            heads, size] for [in, heads * size].
        split: -1 or -2, an axis of the transposed tensor along which the paths share it: each gets as many entries as
            its parameter has, in the order of the paths. Query, key and value in one are split so, and gate and up.
        groups: in how many runs of equal length the split axis lies, each with a share of every path: the number of
            heads where query, key and value alternate head by head, that of columns where they alternate column by
            column.

    Raises:
        ValueError: no regular expression; groups that it has not; a split without several paths.

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
            raise ValueError(f"NameRule({self.name!r}): name {error}, as it is matched in linear time") from None
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
        try:  # a template with a group that is not there is found out now
            for path in self._templates:
                _expanded(path, self.name, ("",) * (groups + 1))
        except (re.error, IndexError) as error:
            raise ValueError(f"NameRule({self.name!r}): path {self.path!r} does not fit it: {error}") from None

    @property
    def _templates(self) -> tuple[str, ...]:
        return () if self.path is None else (self.path,) if isinstance(self.path, str) else tuple(self.path)

    def paths_of(self, name: str) -> tuple[str, ...] | None:
        """Return where a tensor of this name belongs; None if the rule is not for it."""
        groups = groups_of(self.name, name)
        return None if groups is None else tuple(_expanded(path, self.name, groups) for path in self._templates)

    def place_of(self, name: str) -> tuple[int, ...]:
        """Return the place in the stack of a tensor whose name the rule matches.

        Raises:
            ValueError: a group that is no number.
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
    """A template with groups put in, by `re` itself: the same text in groups of fixed lengths."""
    names = {i: f"?P<{name}>" for name, i in re.compile(pattern).groupindex.items()}
    plain = "".join(f"({names.get(i, '')}.{{{len(group)}}})" for i, group in enumerate(groups[1:], 1))
    match = re.fullmatch(plain, "".join(groups[1:]), re.DOTALL)
    assert match is not None
    return match.expand(template)


class Origin(NamedTuple):
    """What a parameter is made of.

    Attributes:
        rule: that says how.
        names: of the tensors in the checkpoint: an array of strings, of the shape of the stack.
        paths: the parameters that the first of them goes to, in the rule's order.
    """

    rule: NameRule
    names: np.ndarray
    paths: tuple[str, ...]


def origins(names: Iterable[str], rules: Iterable[NameRule], paths: Iterable[str]) -> dict[str, Origin]:
    """Return what each parameter is made of; the first rule that matches a name decides.

    Raises:
        TypeError: `rules` are none.
        ValueError: a tensor that no rule takes, a parameter that gets none or two, a stack with gaps; all of them.
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
    """Raise a ValueError that lists the faults, if there are some."""
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
