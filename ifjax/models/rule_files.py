"""Reading and writing of rules as YAML and JSON files."""

import dataclasses
import json
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ifjax.atomic import write_text
from ifjax.codec import LOSSES, BlockLoss, Search
from ifjax.formats import Format
from ifjax.lookup import did_you_mean
from ifjax.models.rules import Rule, RuleError
from ifjax.training import RECIPES, Recipe

_FIELDS = tuple(field.name for field in dataclasses.fields(Rule))


def load_rules(path: str | os.PathLike) -> tuple[Rule, ...]:
    """Read rules from a YAML (.yaml, .yml) or JSON file: a list of mappings from `Rule`'s fields to values.

    A format is a name or a record as `Format.to_dict` returns it. `operands` is a mapping, `module` a name or a list.

    Raises:
        ValueError: the file does not hold valid rules; the message names file, rule and key, and what to write instead.
        ImportError: the file is YAML and PyYAML is not installed.
        OSError: the file cannot be read.

    Example:
        >>> import pathlib, tempfile
        >>> import ifjax
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = pathlib.Path(folder) / "rules.yaml"
        ...     _ = file.write_text('''
        ... - path: .*/lm_head
        ...   weight_fmt: null  # excluded
        ... - path: .*
        ...   weight_fmt: if4
        ...   search: fast
        ... ''')
        ...     head, rest = ifjax.load_rules(file)
        >>> head.excludes, rest.search
        (True, 'fast')
    """
    path = Path(path)
    parse = _parse_json if suffix_of(path) == ".json" else _parse_yaml
    try:
        entries = parse(path.read_bytes().decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise ValueError(f"{path}: is not UTF-8 text: save it as UTF-8") from None
    except RecursionError:
        raise ValueError(f"{path}: is nested too deeply for a list of rules") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if not isinstance(entries, list):
        raise ValueError(f'{path}: needs a list of rules, as in `- path: .*`, in JSON [{{"path": ".*"}}]')
    return tuple(_rule_of(entry, f"{path}: rule {i}") for i, entry in enumerate(entries, 1))


def save_rules(rules: Iterable[Rule], path: str | os.PathLike) -> None:
    """Write rules for `load_rules`, as YAML or JSON according to the suffix. The write is atomic.

    Raises:
        ValueError: the suffix is not .yaml, .yml or .json; or a rule has a loss, a format scale, a search or a recipe
            that is code or has no registered name.
        TypeError: an element is not a Rule.
        ImportError: the suffix is of YAML and PyYAML is not installed.
        OSError: the file cannot be written.
    """
    path = Path(path)
    suffix = suffix_of(path)
    # YAML is written from parsed JSON, so that it holds plain lists, numbers and strings.
    text = json.dumps([_record_of(rule) for rule in rules], indent=2) + "\n"
    if suffix != ".json":
        text = _yaml().safe_dump(json.loads(text), sort_keys=False, width=math.inf)
    write_text(path, text)


def _rule_of(fields: Any, where: str) -> Rule:
    if not isinstance(fields, dict):
        raise ValueError(f"{where}: must be a mapping such as `path: .*`, got {fields!r:.80}")
    values = {}
    for key, value in fields.items():
        if key not in _FIELDS:
            raise ValueError(f"{where}: unknown key {key!r:.80}; {did_you_mean(str(key), _FIELDS)}")
        try:
            if key in ("weight_fmt", "act_fmt"):
                value = _format_of(value)
            elif key == "operands" and isinstance(value, dict):
                value = {name: _format_of(fmt) for name, fmt in value.items()}
        except ValueError as error:
            raise ValueError(f"{where}, key {key!r}: {error}") from None
        values[key] = value
    if "path" not in values:
        raise ValueError(f"{where}: needs the key 'path', a regular expression: '.*' matches all")
    try:
        return Rule(**values)
    except RuleError as error:
        raise ValueError(f"{where}{f', key {error.field!r}' if error.field else ''}: {error}") from None


def _format_of(value: Any) -> Any:
    """Return the Format of a dictionary; return other values unchanged, because Rule checks them."""
    return Format.from_dict(value) if isinstance(value, dict) else value


def _record_of(rule: Rule) -> dict[str, Any]:
    """Return the rule's fields that differ from their defaults, and always path and weight_fmt."""
    if not isinstance(rule, Rule):
        raise TypeError(f"save_rules needs a list of ifjax.Rule, got {type(rule).__name__} in it")
    record = {}
    for field in dataclasses.fields(rule):
        value = getattr(rule, field.name)
        if value == field.default and field.name not in ("path", "weight_fmt"):
            continue
        if isinstance(value, Recipe):
            raise ValueError(
                f"Rule({rule.path!r}): {value.name!r} is a recipe of your own, and files hold names: take one of "
                f"{sorted(RECIPES)}, or keep the rule in Python"
            )
        if isinstance(value, Search):
            raise ValueError(
                f"Rule({rule.path!r}): {value.name!r} is a search of your own, and files hold names: register it in "
                "ifjax.codec.SEARCHES"
            )
        if callable(value) or isinstance(value, BlockLoss):
            raise ValueError(
                f"Rule({rule.path!r}): {field.name} is a function, and files hold no code: take one of "
                f"{sorted(LOSSES)}, or keep the rule in Python"
            )
        if field.name == "operands":
            value = {name: _format_record(fmt) for name, fmt in value}
        record[field.name] = _format_record(value)
    return record


def _format_record(value: Any) -> Any:
    return value.to_dict() if isinstance(value, Format) else value


def suffix_of(path: Path) -> str:
    """Return the suffix of a file of rules, in lower case. Raises ValueError if there is no such kind of file."""
    suffix = path.suffix.lower()
    if suffix not in (".yaml", ".yml", ".json"):
        raise ValueError(f"{path}: rules are kept in .yaml, .yml or .json files, got the suffix {path.suffix!r}")
    return suffix


def _parse_json(text: str) -> Any:
    def without_duplicates(pairs):
        values = {}
        for key, value in pairs:
            if key in values:
                raise ValueError(f"the key {key!r} occurs twice in {dict(pairs)!r:.80}: remove one")
            values[key] = value
        return values

    try:
        return json.loads(text, object_pairs_hook=without_duplicates)
    except json.JSONDecodeError as error:
        raise ValueError(f"line {error.lineno}: is not JSON: {error.msg} (column {error.colno})") from None


def _parse_yaml(text: str) -> Any:
    yaml = _yaml()

    class Loader(yaml.SafeLoader):  # builds plain values only, no Python objects
        def compose_node(self, parent, index):
            if self.check_event(yaml.AliasEvent):
                mark = self.peek_event().start_mark
                raise ValueError(
                    f"line {mark.line + 1}: aliases (*name) are not for lists of rules: write the value out, and quote "
                    "regular expressions: '[ab].*'"
                )
            return super().compose_node(parent, index)

        def construct_mapping(self, node, deep=False):
            keys = set()
            for key, _ in node.value:
                if isinstance(key.value, str) and key.value in keys:
                    raise ValueError(f"line {key.start_mark.line + 1}: the key {key.value!r} occurs twice: remove one")
                keys.add(str(key.value))
            return super().construct_mapping(node, deep)

        def construct_object(self, node, deep=False):
            try:
                return super().construct_object(node, deep)
            except ValueError as error:  # a string that looks like a date but is not a valid one
                if not isinstance(node, yaml.ScalarNode):
                    raise
                line = node.start_mark.line + 1
                raise ValueError(f"line {line}: is not YAML: {error} in {node.value!r:.80}: quote strings") from None

    try:
        return yaml.load(text, Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = mark.line + 1 if mark else text.count("\n", 0, getattr(error, "position", 0)) + 1
        what = getattr(error, "problem", None) or getattr(error, "reason", None) or error
        raise ValueError(f"line {line}: is not YAML: {what}. Quote regular expressions: '[ab].*'") from None


def _yaml() -> Any:
    try:
        import yaml
    except ImportError:
        raise ImportError(
            "rules in YAML need PyYAML, which is not installed: pip install pyyaml (ifjax[flax] brings it, too), or "
            "keep them as .json"
        ) from None
    return yaml
