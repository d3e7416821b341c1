"""A check that every rule has an effect on a model."""

import contextlib
import difflib
import re
from collections.abc import Iterable, Iterator, Sequence

from ifjax.models.decisions import reason_against, too_short, unfit
from ifjax.models.patterns import fullmatch
from ifjax.models.rules import Rule, as_tuple
from ifjax.models.sites import Site


def check_used(rules: Sequence[Rule], sites: Sequence[Site]) -> None:
    """Raise if a rule has no effect on these sites. The message lists all faults, with the closest paths.

    A rule that is not optional must be the first match of a site that can be quantized, and its sites must not be
    shorter than a block. An excluding rule must not match only a parent module whose children are still quantized. All
    rules together must quantize something, unless there are no sites.

    Raises:
        ValueError: one of these conditions does not hold; the message says what to write instead.
    """
    seen = tuple(dict.fromkeys(sites))
    matches = [[rule.matches(s.path, s.module) for s in seen] for rule in rules]
    owners = [next((i for i in range(len(rules)) if matches[i][k]), None) for k in range(len(seen))]
    decided = {s: rules[i] for s, i in zip(seen, owners, strict=True) if i is not None}

    faults = []
    for i, rule in enumerate(rules):
        if rule.optional:
            continue
        matched = [s for s, match in zip(seen, matches[i], strict=True) if match]
        own = [s for s, owner in zip(seen, owners, strict=True) if owner == i]
        if not matched:
            found = [f"matches nothing: {_near_misses(rule, seen)}"]
        elif not own:
            earlier = sorted({k for k, match in zip(owners, matches[i], strict=True) if match and k is not None})
            paths = " and ".join(f"rule {k + 1} ({rules[k].path!r})" for k in earlier)
            found = [f"matches only what {paths} matched before it: move it to the front, or remove it"]
        elif rule.excludes:
            found = list(_faults_of_exclusion(rule, own, decided))
        else:
            found = list(_faults_of_use(rule, own, seen))
        faults += [f"rule {i + 1} ({rule.path!r}{_of_class(rule)}) {fault}" for fault in found]
    if not faults and seen and not any(_is_used(rule, s) for s, rule in decided.items()):
        faults.append(_nothing_used(decided, seen))
    if faults:
        raise ValueError("\n".join(faults))


def _faults_of_exclusion(rule: Rule, own: list[Site], decided: dict[Site, Rule]) -> Iterator[str]:
    inner = [
        t.path for t, other in decided.items()
        if _is_used(other, t) and not rule.matches(t.path, t.module) and any(_is_inside(t, s) for s in own)
    ]  # fmt: skip
    if inner and not any(s.quantizable or s.multiplies for s in own):
        path = re.escape(own[0].path)
        yield (
            f"excludes {_listed(s.path for s in own)}, but not what is inside: {_listed(inner)} would be quantized. "
            f"Write {(path + '/.*' if path else '.*')!r}"
        )


def _faults_of_use(rule: Rule, own: list[Site], seen: Sequence[Site]) -> Iterator[str]:
    fits = [s for s in own if rule.weight_fmt is not None and unfit(rule, s) is None]
    multiplied = {name for s in own for name in s.multiplies}
    missing = [name for name in rule.operand_formats if name not in multiplied]
    if missing:
        have = [s.path for s in seen if set(s.multiplies) & set(missing)]
        why = "".join(f" ({s.path!r}: {s.reason})" for s in own if s.reason is not None and not s.quantizable)
        yield f"names operands {missing} that nothing it matches multiplies{why}: {_closest(rule, have)}"
    elif not fits and not rule.operands:
        why = "; ".join(f"{s.path!r}: {unfit(rule, s)}" for s in own[:3])
        others = [s.path for s in seen if unfit(rule, s) is None]
        yield f"matches only what cannot be quantized ({why}): {_closest(rule, others)}"
    short = [s for s in fits if too_short(rule, s)]
    if short:
        why = "; ".join(f"{s.path!r}: {too_short(rule, s)}" for s in short[:3])
        others = [s.path for s in fits if s not in short]
        yield (
            f"matches what is shorter than a block ({why}){f': {_closest(rule, others)}' if others else ''}. Take "
            f"shorter blocks, or put Rule({re.escape(short[0].path)!r}, weight_fmt=None) in front"
        )


def _nothing_used(decided: dict[Site, Rule], seen: Sequence[Site]) -> str:
    reasons = [
        f"{s.path!r}: " + (str(reason_against(decided[s], s)) if s in decided else "no rule matches it")
        for s in seen[:5]
    ]
    message = f"no rule quantizes anything ({'; '.join(reasons)}{'; ...' if len(seen) > 5 else ''})"
    if all(s in decided for s in seen):
        return message
    return f"{message}. Write Rule('.*') as the last one to take whatever no rule before it matches"


def _is_used(rule: Rule, s: Site) -> bool:
    return reason_against(rule, s) is None or any(name in s.multiplies for name in rule.operand_formats)


def _is_inside(inner: Site, outer: Site) -> bool:
    return inner.path != outer.path and inner.path.startswith(f"{outer.path}/" if outer.path else "")


def _near_misses(rule: Rule, seen: Sequence[Site]) -> str:
    """Return a hint for a rule that matches nothing: the right class, a wider pattern or the closest paths."""
    paths = [s.path for s in seen if rule.module is None or s.module in as_tuple(rule.module)]
    classes = {s.module for s in seen if s.module is not None and fullmatch(rule.path, s.path)}
    if classes:
        return f"the modules at such paths are of class {_listed(sorted(classes))}. Write one of these as module="
    part = f"(?:{rule.path})" if "|" in rule.path else rule.path
    for wider in (f".*{part}", f"{part}.*", f".*{part}.*"):
        with contextlib.suppress(re.error, ValueError):  # a flag such as (?i) is invalid after ".*"
            parts = [path for path in paths if fullmatch(wider, path)]
            if parts:
                return f"a rule matches whole paths, and this is a part of {_listed(parts)}. Write {wider!r}"
    return _closest(rule, paths or [s.path for s in seen])


def _closest(rule: Rule, paths: Iterable[str]) -> str:
    plain = re.sub(r"\\[dDwWsSbB]|\.[*+]|[^\w/.-]", "", rule.path).strip("/")
    parts = plain.count("/") + 1

    def likeness(path):  # compares the whole path, and its end with as many parts as the pattern
        ends = path, "/".join(path.split("/")[-parts:])
        return max(difflib.SequenceMatcher(None, plain, end).ratio() for end in ends)

    near = sorted(dict.fromkeys(paths), key=likeness, reverse=True)[:3]
    return f"the closest paths are {_listed(near)}" if near else "there is no other path"


def _listed(paths: Iterable[str]) -> str:
    paths = list(paths)
    return ", ".join(map(repr, paths[:3])) + (f" and {len(paths) - 3} more" if len(paths) > 3 else "")


def _of_class(rule: Rule) -> str:
    return "" if rule.module is None else f", module={rule.module!r}"
