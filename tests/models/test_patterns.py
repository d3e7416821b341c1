"""Rules' expressions mean what `re` takes them for, and none of them can hang."""

import itertools
import re

import pytest

from ifjax import Rule
from ifjax.models.patterns import UnsupportedPattern, check_pattern, fullmatch
from ifjax.models.rules import BY_DEFAULT, RuleError

PATTERNS = [
    "", ".*", "a", "a|b", "(?:a|ab)(?:c|bcd)d*", "[^/]*/b", "(?:.*/)?b", "(a+)+b", "(a|a)*b", "(?i:A)b", "(?i)AB",
    "a{2,3}", "a{,2}b", "a??b", "^a$", r"\Aab\Z", r"\ba\b", r".*\Bb", r"\w+/\w+", r"[\w/]+", "[a-b]*", "(?!a).*",
    "(?=a)..", ".*(?<!b)", ".*(?<=ab)", "(?:(?!b).)*", "(?P<x>a)*", r"[^\W]+", "(?s:.)*", "(?x: a  b )", "(?:a*)*",
    "(?:a?){3}", "(?:|a)+b", "[]a]*",
    r"[\]^-]|b", r"a\.b|a/b", *(path for path, _ in BY_DEFAULT),
]  # fmt: skip


def test_every_expression_matches_as_by_re():
    paths = ["".join(p) for n in range(6) for p in itertools.product("ab/A", repeat=n) if n < 5 or p[0] == "a"]
    paths += ["a.b", "a\n", "\n", "]", "^", "-", "lm_head", "x/embed_1/y", "mlp/router/kernel", "é/b"]
    for pattern in PATTERNS:
        wrong = [path for path in paths if fullmatch(pattern, path) != (re.fullmatch(pattern, path) is not None)]
        assert not wrong, (pattern, wrong[:5])


@pytest.mark.parametrize(
    "pattern", ["(a+)+b", "(a|a)*b", "(a*)*b", "(?:a?){60}a{60}b", ".*.*.*.*.*.*.*.*b", "((a+)+)+b"]
)
def test_expressions_on_which_backtracking_would_hang_are_quick(pattern):
    assert not fullmatch(pattern, "a" * 100)
    assert fullmatch(pattern, "a" * 100 + "b")


@pytest.mark.parametrize("pattern", [r"(a)\1", "(a)?(?(1)b|c)", "(?>a*)b", "a*+b"])
def test_what_takes_more_than_positions_is_refused(pattern):
    with pytest.raises(UnsupportedPattern, match="no backreferences"):
        check_pattern(pattern)
    with pytest.raises(RuleError, match="matched in linear time"):
        Rule(pattern)


def test_endless_paths_are_an_error():
    with pytest.raises(ValueError, match="a path of 2001 characters"):
        fullmatch(".*", "a" * 2001)
