"""Regular expressions matched in polynomial time, because rules and names may come from untrusted sources.

An expression is compiled to a program of a few kinds of steps. The matcher tries alternatives in the order of `re`, but
never tries a step twice at the same position, because it would fail again. So `(a+)+b` takes no longer than any other
pattern, and groups are those of `re`. Backreferences are refused, because they need the text of a group.

    steps: ("one", fits) · ("at", fits) · ("look", is_wanted, width, program) · ("save", i) · ("try", first, then)
"""

import functools
import re
from collections.abc import Callable
from re import _constants as ops  # pyright: ignore[reportAttributeAccessIssue]
from re import _parser  # pyright: ignore[reportAttributeAccessIssue]
from typing import Any

LONGEST = 2000  # most characters of a path, and most steps of a program

Program = list[tuple[Any, ...]]


class UnsupportedPattern(ValueError):
    """An expression with a feature that is not supported here."""


def check_pattern(pattern: str) -> None:
    """Raise if an expression is invalid or not supported.

    Raises:
        re.error: it is not a regular expression.
        UnsupportedPattern: it has backreferences, conditional, atomic or possessive parts, or its repetitions expand to
            more than 2000 steps.
    """
    _compiled(pattern)


@functools.lru_cache(maxsize=65536)
def fullmatch(pattern: str, path: str) -> bool:
    """Return whether the whole path matches, as `re.fullmatch` does.

    Raises:
        ValueError: the path has more than 2000 characters.
    """
    if len(path) > LONGEST:
        raise ValueError(f"a path of {len(path)} characters is matched by no rule: {path[:50]!r}...")
    return _run(_compiled(pattern), path, 0, len(path), {}) is not None


@functools.lru_cache(maxsize=65536)
def groups_of(pattern: str, name: str) -> tuple[str, ...] | None:
    """Return the whole match and its groups, "" for a group that took no part; None if the name does not match.

    A name of more than 2000 characters never matches. As in `re`, a repeated group gives its last repetition. Unlike
    in `re`, an empty repetition at the end does not count.
    """
    spans = _run(_compiled(pattern), name, 0, len(name), {}) if len(name) <= LONGEST else None
    if spans is None:
        return None
    ends = ((spans.get(2 * i, 0), spans.get(2 * i + 1, 0)) for i in range(1, re.compile(pattern).groups + 1))
    return name, *(name[start:end] for start, end in ends)


def _run(program: Program, text: str, start: int, end: int | None, looked: dict[Any, bool]) -> dict[int, int] | None:
    """Return the positions that a match from `start` to `end` (None: to anywhere) saved; None without a match."""
    stack: list[tuple[int, int, dict[int, int]]] = [(0, start, {})]
    tried = set()
    while stack:
        step, at, saved = stack.pop()
        while (step, at) not in tried:
            tried.add((step, at))
            if step == len(program):
                if end is None or at == end:
                    return saved
                break
            kind, *what = program[step]
            step += 1
            if kind == "try":
                stack.append((what[1], at, saved))
                step = what[0]
            elif kind == "save":
                saved = saved | {what[0]: at}
            elif kind == "one":
                if at == len(text) or not what[0](text[at]):
                    break
                at += 1
            elif kind == "at":
                if not what[0](text, at):
                    break
            elif _looks(what[1], what[2], text, at, looked) != what[0]:
                break
    return None


def _looks(width: int | None, program: Program, text: str, at: int, looked: dict[Any, bool]) -> bool:
    """Return whether a look-ahead matches at a position, or a look-behind of `width` characters (None: look-ahead)."""
    key = id(program), at
    if key not in looked:
        start, end = (at, None) if width is None else (at - width, at)
        looked[key] = start >= 0 and _run(program, text, start, end, looked) is not None
    return looked[key]


@functools.lru_cache(maxsize=1024)
def _compiled(pattern: str) -> Program:
    if len(pattern) > 10 * LONGEST:  # parsing it would take seconds
        raise UnsupportedPattern(f"may have {10 * LONGEST} characters, and has {len(pattern)}")
    re.compile(pattern)  # raises re's own errors and warnings
    tree = _parser.parse(pattern)
    program: Program = []
    _add(program, tree, tree.state.flags)
    return program


def _step(program: Program, *step: Any) -> int:
    """Add a step and return its index."""
    if len(program) == LONGEST:
        raise UnsupportedPattern(f"may count no higher than to {LONGEST} in all")
    program.append(step)
    return len(program) - 1


def _add(program: Program, nodes: Any, flags: int) -> None:
    for op, value in nodes:
        _add_node(program, op, value, flags)


def _add_node(program: Program, op: Any, value: Any, flags: int) -> None:
    if op in (ops.LITERAL, ops.NOT_LITERAL, ops.ANY, ops.IN):
        _step(program, "one", _one(op, value, flags))
    elif op is ops.BRANCH:
        ends = []
        for nodes in value[1][:-1]:
            fork = _step(program)
            _add(program, nodes, flags)
            ends.append(_step(program))
            program[fork] = ("try", fork + 1, len(program))
        _add(program, value[1][-1], flags)
        for end in ends:
            program[end] = ("try", len(program), len(program))
    elif op is ops.SUBPATTERN:
        group, add, remove, nodes = value
        if group is not None:
            _step(program, "save", 2 * group)
        _add(program, nodes, (flags | add) & ~remove)
        if group is not None:
            _step(program, "save", 2 * group + 1)
    elif op in (ops.MAX_REPEAT, ops.MIN_REPEAT):
        low, high, nodes = value
        _add_repeat(program, op is ops.MAX_REPEAT, low, high, nodes, flags)
    elif op is ops.AT:
        _step(program, "at", _at(value, flags))
    elif op in (ops.ASSERT, ops.ASSERT_NOT):
        inner: Program = []
        _add(inner, value[1], flags)
        _step(program, "look", op is ops.ASSERT, value[1].getwidth()[0] if value[0] < 0 else None, inner)
    else:
        raise UnsupportedPattern("may have no backreferences, conditional, atomic or possessive parts")


def _add_repeat(program: Program, greedy: bool, low: int, high: Any, nodes: Any, flags: int) -> None:
    def fork(at: int, more: int, done: int) -> None:
        program[at] = ("try", more, done) if greedy else ("try", done, more)

    for _ in range(low):
        before = len(program)
        _add(program, nodes, flags)
        if len(program) == before:  # the repeated part has no steps, so further repetitions add none
            break
    if high is ops.MAXREPEAT:
        start = _step(program)
        _add(program, nodes, flags)
        _step(program, "try", start, start)
        fork(start, start + 1, len(program))
        return
    forks = []
    for _ in range(high - low):
        forks.append(_step(program))
        _add(program, nodes, flags)
    for at in forks:
        fork(at, at + 1, len(program))


def _one(op: Any, value: Any, flags: int) -> Callable[[str], Any]:
    """Return a function that matches a single character with `re`."""
    text = {ops.LITERAL: lambda: re.escape(chr(value)), ops.NOT_LITERAL: lambda: f"[^{re.escape(chr(value))}]",
            ops.ANY: lambda: ".", ops.IN: lambda: f"[{''.join(map(_item, value))}]"}[op]()  # fmt: skip
    return functools.lru_cache(maxsize=512)(re.compile(text, flags & ~(re.VERBOSE | re.DEBUG)).fullmatch)


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


def _at(where: Any, flags: int) -> Callable[[str, int], Any]:
    name = {ops.AT_BEGINNING: "^", ops.AT_BEGINNING_STRING: r"\A", ops.AT_END: "$", ops.AT_END_STRING: r"\Z",
            ops.AT_BOUNDARY: r"\b", ops.AT_NON_BOUNDARY: r"\B"}[where]  # fmt: skip
    return re.compile(name, flags & ~(re.VERBOSE | re.DEBUG)).match
