"""Rules in YAML and JSON files."""

import dataclasses
import difflib
import json
import math
import os
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ifjax import codec
from ifjax.formats import Format
from ifjax.models.rules import Rule, RuleError
from ifjax.training.recipes import RECIPES, Recipe


def load_rules(path: str | os.PathLike) -> tuple[Rule, ...]:
    """Rules from a YAML (.yaml, .yml) or JSON file: a list of mappings from `Rule`'s fields to values.

    A format is a name or a record as `Format.to_dict` gives it, `operands` a mapping, `module` a name or a list.

    Raises:
        ValueError: the file does not hold rules; the message names file, line and key, and what to write instead.
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
    read = _read_json if _suffix(path) == ".json" else _read_yaml
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}:{line}: is not UTF-8 text: save it as UTF-8") from None
    try:
        return tuple(_rule_of(entry) for entry in read(text))
    except _FileFault as fault:
        raise ValueError(f"{path}:{fault.line}: {fault.message}") from None
    except RecursionError:
        raise ValueError(f"{path}:1: is nested too deeply for a list of rules") from None


def save_rules(rules: Iterable[Rule], path: str | os.PathLike) -> None:
    """Write rules for `load_rules`, as YAML or JSON by the suffix. The file is written whole, or stays as it was.

    Raises:
        ValueError: a suffix of neither, or a rule with a loss or a format's scale that is code.
        TypeError: something that is no Rule.
        OSError: the file cannot be written.
    """
    path = Path(path)
    suffix = _suffix(path)
    # Through JSON both ways: YAML, too, is handed plain lists, numbers and strings.
    text = json.dumps([_record_of(rule) for rule in rules], indent=2) + "\n"
    if suffix != ".json":
        text = _yaml().safe_dump(json.loads(text), sort_keys=False, width=math.inf)
    _write_whole(path, text)


class _Entry(NamedTuple):
    line: int
    fields: dict[str, tuple[int, Any]]  # key: its line and its value


class _FileFault(Exception):
    def __init__(self, line: int, message: str):
        super().__init__(line, message)
        self.line, self.message = line, message


_FIELDS = tuple(field.name for field in dataclasses.fields(Rule))


_FORMAT_KEYS = {"name", "candidates", "block", "scale", "peak"}


_CANDIDATE_KEYS = {"grid", "step", "stretch"}


_NO_LIST = 'needs a list of rules, as in `- path: .*`, in JSON [{"path": ".*"}]'


def _rule_of(entry: _Entry) -> Rule:
    values = {}
    for key, (line, value) in entry.fields.items():
        if key not in _FIELDS:
            near = difflib.get_close_matches(key, _FIELDS, n=1, cutoff=0.4)
            hint = f"did you mean {near[0]}? The" if near else "the"
            raise _FileFault(line, f"unknown key {key!r}; {hint} keys are {', '.join(_FIELDS)}")
        try:
            if key in ("weight_fmt", "act_fmt"):
                value = _format_of(value)
            elif key == "operands" and isinstance(value, dict):
                value = {name: _format_of(fmt) for name, fmt in value.items()}
        except (ValueError, AttributeError) as error:
            raise _FileFault(line, f"{key}: {error}") from None
        values[key] = value
    if "path" not in values:
        raise _FileFault(entry.line, "the rule needs the key 'path', a regular expression: '.*' matches all")
    try:
        return Rule(**values)
    except RuleError as error:
        line, _ = entry.fields.get(error.field, (entry.line, None))
        raise _FileFault(line, str(error)) from None


def _format_of(value: Any) -> Any:
    """A format's record from its content; anything else is left for Rule to judge."""
    if not isinstance(value, dict):
        return value
    fmt = Format.from_dict(value)
    keys = (set(value), _FORMAT_KEYS), *((set(c), _CANDIDATE_KEYS) for c in value["candidates"])
    for given, known in keys:
        if given - known:
            raise ValueError(f"unknown keys {sorted(map(str, given - known))} in a format record: {sorted(known)}")
    if not isinstance(fmt.name, str):
        raise ValueError(f"a format's name must be a string, got {fmt.name!r}")
    return fmt


def _record_of(rule: Rule) -> dict[str, Any]:
    """The fields that are not as by default, and the two that say what the rule is about."""
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
        if callable(value):
            raise ValueError(
                f"Rule({rule.path!r}): {field.name} is a function, and files hold no code: take one of "
                f"{sorted(codec.LOSSES)}, or keep the rule in Python"
            )
        if field.name == "operands":
            value = {name: _format_record(fmt) for name, fmt in value}
        record[field.name] = _format_record(value)
    return record


def _format_record(value: Any) -> Any:
    return value.to_dict() if isinstance(value, Format) else value


def _read_json(text: str) -> Iterator[_Entry]:
    def line_at(at):
        return text.count("\n", 0, at) + 1

    decoder = json.JSONDecoder(object_pairs_hook=_without_duplicates)

    def decode(at):
        try:
            value, end = decoder.raw_decode(text, at)
        except _Duplicate as error:  # of a mapping inside this value, which starts here
            raise _FileFault(line_at(at), str(error)) from None
        return value, skip(end)

    def skip(at):  # what separates values; that it is well-formed is known by then
        return re.compile(r"[\s,:]*").match(text, at).end()  # pyright: ignore[reportOptionalMemberAccess]

    try:
        if not isinstance(json.loads(text), list):
            raise _FileFault(1, _NO_LIST)
    except json.JSONDecodeError as error:
        raise _FileFault(error.lineno, f"is not JSON: {error.msg} (column {error.colno})") from None
    except ValueError as error:  # a number of thousands of digits
        raise _FileFault(1, f"is not a list of rules: {error}") from None
    at = skip(text.index("[") + 1)
    while text[at] != "]":
        line, fields = line_at(at), {}
        if text[at] != "{":
            raise _FileFault(line, f'a rule must be a mapping such as {{"path": ".*"}}, got {decode(at)[0]!r}')
        at = skip(at + 1)
        while text[at] != "}":
            key_at = at
            key, at = decode(at)
            if key in fields:
                raise _FileFault(line_at(key_at), f"the key {key!r} occurs twice in one rule: remove one")
            value, at = decode(at)
            fields[key] = line_at(key_at), value
        at = skip(at + 1)
        yield _Entry(line, fields)


class _Duplicate(Exception):
    pass


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = {}
    for key, value in pairs:
        if key in values:
            raise _Duplicate(f"the key {key!r} occurs twice in one mapping: remove one")
        values[key] = value
    return values


def _read_yaml(text: str) -> Iterator[_Entry]:
    yaml = _yaml()

    class Loader(yaml.SafeLoader):  # safe: plain values, no Python objects
        def construct_mapping(self, node, deep=False):
            self.check_keys(node)
            return super().construct_mapping(node, deep)

        def check_keys(self, node):
            keys = []
            for key_node, _ in node.value:
                key, line = key_node.value, key_node.start_mark.line + 1
                if isinstance(key, str) and key in keys:
                    raise _FileFault(line, f"the key {key!r} occurs twice in one mapping: remove one")
                keys.append(key)

    try:
        loader = Loader(text)
        top = loader.get_single_node()
        if not isinstance(top, yaml.SequenceNode):
            raise _FileFault(1 if top is None else top.start_mark.line + 1, _NO_LIST)
        for node in top.value:
            line = node.start_mark.line + 1
            if not isinstance(node, yaml.MappingNode):
                raise _FileFault(line, f"a rule must be a mapping such as `path: .*`, got {node.value!r}")
            loader.check_keys(node)
            fields = {}
            for key_node, value_node in node.value:
                line_of_key = key_node.start_mark.line + 1
                try:
                    value = loader.construct_object(value_node, deep=True)
                except ValueError as error:  # what looks like a date, and is none
                    raise _FileFault(line_of_key, f"{key_node.value} is not YAML: {error}; quote strings") from None
                fields[str(key_node.value)] = line_of_key, value
            yield _Entry(line, fields)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        at = getattr(error, "position", 0)
        line = mark.line + 1 if mark else text.count("\n", 0, at) + 1
        what = getattr(error, "problem", None) or getattr(error, "reason", None) or error
        quote = isinstance(error, yaml.parser.ParserError | yaml.scanner.ScannerError | yaml.composer.ComposerError)
        hint = ". Quote regular expressions: '[ab].*'" if quote else ""
        raise _FileFault(line, f"is not YAML: {what}{hint}") from None


def _yaml() -> Any:
    try:
        import yaml
    except ImportError:
        raise ImportError(
            "rules in YAML need PyYAML, which is not installed: pip install pyyaml (ifjax[flax] brings it, too), or "
            "keep them as .json"
        ) from None
    return yaml


def _suffix(path: Path) -> str:
    suffix = path.suffix.lower()
    if suffix not in (".yaml", ".yml", ".json"):
        raise ValueError(f"{path}: rules are kept in .yaml, .yml or .json files, got the suffix {path.suffix!r}")
    return suffix


def _write_whole(path: Path, text: str) -> None:
    path = Path(os.path.realpath(path))  # a link stays one
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path.parent} is not a folder: create it first")
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "x", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            shutil.copymode(path, temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
