"""Rules' expressions mean what `re` takes them for, and none of them can hang."""

import itertools
import re

import pytest

from ifjax import NameRule, Rule
from ifjax.models.patterns import UnsupportedPattern, check_pattern, fullmatch, groups_of
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
    with pytest.raises(RuleError, match="matched in polynomial time"):
        Rule(pattern)


def test_counts_of_nothing_take_no_time():
    check_pattern("(?:){1000000000}a")
    check_pattern("(?:(?:(?:){2000}){2000}){2000}")
    with pytest.raises(UnsupportedPattern, match="count no higher"):
        check_pattern("(?:){0,1000000000}")


GROUPED = [
    r"layers\.(\d+)\.(\w+)\.weight", r"(a|ab)(c|bcd)(d*)", r"(a+)(a*)", r"(a+?)(a*)", r"(a)|(b)", r"(?:(a)|b)*",
    r"(?P<x>[ab]+)/(?P<y>.*)", r"((a)b?)+", r"(?:(\d+)\.)?(\w+)(?:\.(\w+))?", r"(.*)(\d+)(.*)", r"(.*?)(\d+)(.*)",
    r"(a{1,2})(a{0,2}?)(.*)", r"(?=(a.))(.*)",
]  # fmt: skip


def test_groups_are_those_of_re():
    names = ["".join(p) for n in range(5) for p in itertools.product("ab/1", repeat=n)]
    names += ["layers.12.up.weight", "abcd", "abcdd", "1.x.y", "x.y", "aab12/b34"]
    for pattern in GROUPED:
        for name in names:
            match, found = re.fullmatch(pattern, name), groups_of(pattern, name)
            assert (match is None) == (found is None), (pattern, name)
            if match is not None and "(?=" not in pattern:
                assert found == (name, *(group or "" for group in match.groups())), (pattern, name)


@pytest.mark.parametrize("pattern", [
    "(a+)+b", "(a+)+b|(a*)c", "(?:(a+)+b|(a|a)*)c", r"(\w*)*\.(\w*)*d", "(?=(?=(?=(a+)+b)a+)a+)(a*)c",
    "((a?){20}){20}b",
])  # fmt: skip
def test_rules_of_names_cannot_hang(pattern):
    """Whether they match or fail: an alternative that fails may come first."""
    for name in ("a" * 2000, "a" * 1999 + "c", "a" * 1999 + "b", "a" * 900 + "." + "a" * 900 + "d", "a" * 5000):
        rule = NameRule(pattern, r"x/\1")
        assert rule.paths_of(name) in (None, *((f"x/{name[:i]}",) for i in range(len(name) + 1)))
    short = NameRule("(a+)+b|(a*)c", r"x/\2")
    assert short.paths_of("a" * 1000 + "c") == ("x/" + "a" * 1000,)


def test_counts_are_bounded():
    for pattern in ("a{2001}", "(?:a{50}){50}", "(?:(?:a{0,90}){0,90}){0,90}", "a{1000000000}"):
        with pytest.raises(UnsupportedPattern, match="count no higher"):
            check_pattern(pattern)
        with pytest.raises(ValueError, match="count no higher"):
            NameRule(pattern, "x")


def test_endless_paths_are_an_error():
    with pytest.raises(ValueError, match="a path of 2001 characters"):
        fullmatch(".*", "a" * 2001)


def test_an_expression_too_long_to_be_read_is_refused_at_once():
    with pytest.raises(UnsupportedPattern, match="may have 20000 characters, and has 120000"):
        check_pattern("a|" * 60000)
    assert fullmatch("[" + "a" * 5000 + "]", "a")
