"""Regular expressions matched in polynomial time, whatever they say: rules may come from files of strangers.

A node of the expression takes a set of positions to the set of positions that it may end at. Nothing is tried twice, so
that `(a+)+b` is as quick as any other; what needs the text of a group (backreferences) is refused.
"""

import functools
import re
from collections.abc import Callable, Sequence
from re import _constants as ops  # pyright: ignore[reportAttributeAccessIssue]
from re import _parser  # pyright: ignore[reportAttributeAccessIssue]
from typing import Any

LONGEST = 2000  # characters of a path

Match = Callable[[str, frozenset[int]], frozenset[int]]


class UnsupportedPattern(ValueError):
    """The expression asks for what is not matched here."""


def check_pattern(pattern: str) -> None:
    """Raise if the expression cannot be matched.

    Raises:
        re.error: it is no regular expression.
        UnsupportedPattern: it has backreferences, conditional, atomic or possessive parts.
    """
    _compiled(pattern)


@functools.lru_cache(maxsize=65536)
def fullmatch(pattern: str, path: str) -> bool:
    """Whether the whole path matches, as by `re.fullmatch`. A path of more than 2000 characters is an error."""
    if len(path) > LONGEST:
        raise ValueError(f"a path of {len(path)} characters is matched by no rule: {path[:50]!r}...")
    return len(path) in _compiled(pattern)(path, frozenset({0}))


@functools.lru_cache(maxsize=1024)
def _compiled(pattern: str) -> Match:
    re.compile(pattern)  # its own errors and warnings
    tree = _parser.parse(pattern)
    return _sequence(tree, tree.state.flags)


def _sequence(nodes: Any, flags: int) -> Match:
    parts = [_node(op, value, flags) for op, value in nodes]

    def match(text, at):
        for part in parts:
            if not at:
                break
            at = part(text, at)
        return at

    return match


def _node(op: Any, value: Any, flags: int) -> Match:
    if op in (ops.LITERAL, ops.NOT_LITERAL, ops.ANY, ops.IN):
        return _one(op, value, flags)
    if op is ops.BRANCH:
        return _any_of([_sequence(nodes, flags) for nodes in value[1]])
    if op is ops.SUBPATTERN:
        _, add, remove, nodes = value
        return _sequence(nodes, (flags | add) & ~remove)
    if op in (ops.MAX_REPEAT, ops.MIN_REPEAT):
        low, high, nodes = value
        return _repeat(_sequence(nodes, flags), int(low), None if high is ops.MAXREPEAT else int(high))
    if op is ops.AT:
        return _at(value, flags)
    if op in (ops.ASSERT, ops.ASSERT_NOT):
        return _look(op is ops.ASSERT, value[0], _sequence(value[1], flags))
    raise UnsupportedPattern("may have no backreferences, conditional, atomic or possessive parts")


def _one(op: Any, value: Any, flags: int) -> Match:
    """One character, by `re` itself."""
    text = {ops.LITERAL: lambda: re.escape(chr(value)), ops.NOT_LITERAL: lambda: f"[^{re.escape(chr(value))}]",
            ops.ANY: lambda: ".", ops.IN: lambda: f"[{''.join(map(_item, value))}]"}[op]()  # fmt: skip
    fits = functools.lru_cache(maxsize=512)(re.compile(text, flags & ~(re.VERBOSE | re.DEBUG)).fullmatch)
    return lambda text, at: frozenset(i + 1 for i in at if i < len(text) and fits(text[i]))


def _item(item: tuple[Any, Any]) -> str:
    op, value = item
    if op is ops.NEGATE:
        return "^"
    if op is ops.LITERAL:
        return re.escape(chr(value))
    if op is ops.RANGE:
        return "-".join(re.escape(chr(end)) for end in value)
    return _CATEGORIES[value]


_CATEGORIES = {
    ops.CATEGORY_DIGIT: r"\d", ops.CATEGORY_NOT_DIGIT: r"\D", ops.CATEGORY_SPACE: r"\s",
    ops.CATEGORY_NOT_SPACE: r"\S", ops.CATEGORY_WORD: r"\w", ops.CATEGORY_NOT_WORD: r"\W",
}  # fmt: skip


def _any_of(parts: Sequence[Match]) -> Match:
    return lambda text, at: frozenset().union(*(part(text, at) for part in parts))


def _repeat(part: Match, low: int, high: int | None) -> Match:
    def match(text, at):
        for _ in range(low):
            if not at or (after := part(text, at)) == at:  # more of nothing
                break
            at = after
        found = new = at
        count = low
        while new and (high is None or count < high):
            new = part(text, new) - found
            found, count = found | new, count + 1
        return found

    return match


def _at(where: Any, flags: int) -> Match:
    name = {ops.AT_BEGINNING: "^", ops.AT_BEGINNING_STRING: r"\A", ops.AT_END: "$", ops.AT_END_STRING: r"\Z",
            ops.AT_BOUNDARY: r"\b", ops.AT_NON_BOUNDARY: r"\B"}[where]  # fmt: skip
    fits = re.compile(name, flags & ~(re.VERBOSE | re.DEBUG)).match
    return lambda text, at: frozenset(i for i in at if fits(text, i))


def _look(wanted: bool, direction: int, part: Match) -> Match:
    """Ahead or behind, without moving."""

    def ahead(text, i):
        return bool(part(text, frozenset({i})))

    def behind(text, i):
        return any(i in part(text, frozenset({k})) for k in range(i + 1))

    found = ahead if direction >= 0 else behind
    return lambda text, at: frozenset(i for i in at if found(text, i) == wanted)
