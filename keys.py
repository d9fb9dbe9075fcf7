"""Which keys a configuration has: `--help-all` prints them in words, `--schema` as a JSON Schema for editors.

    python SCRIPT.py --help-all                every key with its value, type and meaning
    python SCRIPT.py --help-all=momentum       those that have the word in key or meaning
    python SCRIPT.py --schema > schema.json

Names, types and ranges are those of the configuration's dataclasses, meanings the texts under their fields, which are
read from the source, values those of the default files. An editor with yaml-language-server checks and completes a YAML
file that begins with `# yaml-language-server: $schema=schema.json`. Such a file need not be whole: it goes on top
of the defaults. What the schema cannot say, rules between keys, the script itself says.
"""

import argparse
import ast
import dataclasses
import functools
import inspect
import itertools
import json
import math
import shutil
import sys
import textwrap
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from config import MAX_NAME_BYTES, MISSING, Allowed, allowed_of, kind_words, may_be_null, members, merge, read_source
from utils import UserError

DIALECT = "https://json-schema.org/draft/2020-12/schema"
ANY_NAME = "<name>"
"""In dotted keys, what stands for the names that a user chooses."""
GROUPED = {int: "^[-+]?[0-9]+(_[0-9]+)+$", float: r"^[-+]?[0-9]+(_[0-9]+)+(\.[0-9]*)?$"}
"""Numbers such as 500_000, which YAML 1.2 and so editors take for texts."""
ONE_LINE = r"^.*\S.*$"
MAX_WIDTH = 120


@dataclass(frozen=True)
class Key:
    """One key of a section, which may be a section itself."""

    name: str
    kind: Any
    """Its declared type."""
    allowed: Allowed
    meaning: str
    """In one line; empty if there is none."""
    value: Any
    """Its default, plain; `MISSING` where there is none."""

    @property
    def section(self) -> Any:
        """The dataclass of its keys, if it is a section, else None."""
        return next((each for each in members(self.kind) if dataclasses.is_dataclass(each)), None)

    @property
    def named_section(self) -> Any:
        """The dataclass of what a user gives names to, if it holds such, else None."""
        for each in members(self.kind):
            if typing.get_origin(each) is dict and dataclasses.is_dataclass(members(typing.get_args(each)[1])[0]):
                return members(typing.get_args(each)[1])[0]
        return None


def answer(args: argparse.Namespace, schema: type, sources: Sequence[str | Path]) -> None:
    """End the script, with what `--help-all` and `--schema` ask for on stdout, if one of them is given.

    Args:
        args: `help_all` and `schema`, as `utils.add_sources` adds them.
        schema: dataclass of the configuration.
        sources: default files, and then what the user gives, as for `config.load_config`.

    Raises: SystemExit with 0 after an answer; UserError if there is no key to show, or a source does not fit.
    """
    if args.help_all is None and not args.schema:
        return
    values: Any = {}
    for source in sources:
        values = merge(values, read_source(schema, str(source)))
    if args.schema:
        _end_with(json.dumps(json_schema(schema, values), indent=2, ensure_ascii=False))
    width = min(MAX_WIDTH, shutil.get_terminal_size((MAX_WIDTH, 0)).columns)
    shown = list(described(schema, values, args.help_all or "", width))
    if not shown:
        raise UserError(f"--help-all={args.help_all}: no key or meaning has this word; --help-all alone prints all")
    _end_with("\n".join(shown))


def _end_with(text: str) -> NoReturn:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()  # here, where a reader that left is noticed by `ending_in_words`
    raise SystemExit(0)


# ---------------------------------------------------------------------------------------------------------- the keys


def keys_of(section: Any, values: Mapping[str, Any] | None = None) -> list[Key]:
    """The keys of a section, in their order.

    Args:
        section: dataclass.
        values: defaults that come before those of the class: nested dicts.
    """
    kinds, meanings = typing.get_type_hints(section), meanings_of(section)
    keys = []
    for each in dataclasses.fields(section):
        value = (values or {}).get(each.name, _default(each))
        key = Key(each.name, kinds[each.name], allowed_of(section, each.name) or Allowed(), "", value)
        inner = key.section
        meaning = meanings.get(each.name) or (_one_line(inner.__doc__) if inner else "")
        keys.append(dataclasses.replace(key, meaning=meaning))
    return keys


def _default(each: "dataclasses.Field[Any]") -> Any:
    value = each.default
    if each.default_factory is not dataclasses.MISSING:
        value = each.default_factory()
    if value is dataclasses.MISSING:
        return MISSING
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    return value


@functools.cache
def meanings_of(section: type) -> dict[str, str]:
    """The texts under the fields of a dataclass, by field, each in one line; those of its bases where it has none."""
    meanings: dict[str, str] = {}
    for base in reversed(section.__mro__):
        if dataclasses.is_dataclass(base):
            meanings |= _texts_under_fields(base)
    return meanings


def _texts_under_fields(section: type) -> dict[str, str]:
    path = inspect.getsourcefile(section)
    assert path is not None, f"{section} has no source"
    body = next(
        node.body
        for node in ast.walk(_parsed(Path(path)))
        if isinstance(node, ast.ClassDef) and node.name == section.__name__
    )
    return {
        node.target.id: _one_line(below.value.value)
        for node, below in itertools.pairwise(body)
        if isinstance(node, ast.AnnAssign)
        and isinstance(node.target, ast.Name)
        and isinstance(below, ast.Expr)
        and isinstance(below.value, ast.Constant)
        and isinstance(below.value.value, str)
    }


@functools.cache
def _parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def _one_line(text: str | None) -> str:
    return " ".join((text or "").split())


# ----------------------------------------------------------------------------------------------------------- in words


def described(schema: Any, values: Mapping[str, Any], word: str = "", width: int = MAX_WIDTH) -> Iterator[str]:
    """Lines about all keys: `key = value  (type)` and below it the meaning.

    Args:
        schema: dataclass of the configuration.
        values: defaults, as nested dicts.
        word: only keys that have it in their dotted name or meaning, whatever the case.
        width: of a line, in characters.
    """
    for dotted, key in _walk(schema, values, ""):
        if word.lower() not in f"{dotted} {key.meaning}".lower():
            continue
        is_title = key.section is not None
        head = dotted if is_title else f"{dotted}{_shown(key.value, dotted)}  ({type_words(key)})"
        if is_title and not word:
            yield ""
        yield from textwrap.wrap(head, width, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False)
        yield from textwrap.wrap(key.meaning, width, initial_indent="    ", subsequent_indent="    ")


def _walk(section: Any, values: Mapping[str, Any] | None, prefix: str) -> Iterator[tuple[str, Key]]:
    for key in keys_of(section, values):
        dotted = f"{prefix}{key.name}"
        yield dotted, key
        if key.section is not None:
            yield from _walk(key.section, key.value if isinstance(key.value, dict) else None, f"{dotted}.")
        elif key.named_section is not None:
            yield from _walk(key.named_section, None, f"{dotted}.{ANY_NAME}.")


def _shown(value: Any, dotted: str) -> str:
    """` = value`, as one would type it."""
    if value == MISSING:
        return "" if ANY_NAME in dotted else ", which must be given"
    if isinstance(value, str):
        return f" = {value}"
    return f" = {json.dumps(value, ensure_ascii=False)}"


def type_words(key: Key) -> str:
    """What a key holds, such as `a whole number at least 1, or null`."""
    allowed, said = key.allowed, []
    choices = f"one of {', '.join(allowed.choices)}"
    kinds = [each for each in members(key.kind) if each is not int or float not in members(key.kind)]
    for kind in kinds:
        words = "anything" if kind is Any else kind_words(kind).partition(", ")[0]
        if kind is str and allowed.choices:
            words = choices
        elif typing.get_origin(kind) in (list, tuple):
            length = f"a list of {allowed.size} " if allowed.size is not None else None
            words = words.replace("a list of ", length) if length and typing.get_origin(kind) is list else words
            is_text = typing.get_args(kind)[0] is str
            words += f", each {choices}" if is_text and allowed.choices else ""
            words += f", each {allowed.range_words}" if not is_text and allowed.range_words else ""
            words += ", not empty" if allowed.not_empty else ""
            words += ", ascending" if allowed.ascending else ""
            words += ", none twice" if allowed.distinct else ""
        elif kind in (int, float) and allowed.range_words:
            words += f" {allowed.range_words}"
        said.append(words)
    return ", or ".join([*said, "null"] if may_be_null(key.kind) and key.kind is not Any else said)


# -------------------------------------------------------------------------------------------------------- for editors


def json_schema(schema: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of YAML files for a configuration. No key is required: files are merged.

    Args:
        schema: dataclass of the configuration.
        values: defaults, as nested dicts.
    """
    return {"$schema": DIALECT, "title": schema.__name__, **_of_section(schema, values)}


def _of_section(section: Any, values: Any) -> dict[str, Any]:
    properties = {}
    for key in keys_of(section, values if isinstance(values, dict) else None):
        about: dict[str, Any] = {"description": key.meaning} if key.meaning else {}
        if key.value != MISSING and key.section is None:
            about["default"] = key.value
        properties[key.name] = _of_kind(key.kind, key.allowed, key.value) | about
    described = {"description": _one_line(section.__doc__)} if section.__doc__ else {}
    return described | {"type": "object", "properties": properties, "additionalProperties": False}


def _of_kind(kind: Any, allowed: Allowed, value: Any) -> dict[str, Any]:
    """What a value of this type may be; `value` is the default, whose keys are offered where any are allowed."""
    if kind is Any:
        return {}
    kinds = [each for each in members(kind) if each is not int or float not in members(kind)]
    possible = [_of_member(each, allowed, value) for each in kinds]
    possible += [{"type": "null"}] if may_be_null(kind) else []
    return possible[0] if len(possible) == 1 else {"anyOf": possible}


def _of_member(kind: Any, allowed: Allowed, value: Any) -> dict[str, Any]:
    if dataclasses.is_dataclass(kind):
        return _of_section(kind, value)
    if kind is bool:
        return {"type": "boolean"}
    if kind in (int, float):
        bounds = {
            "minimum": allowed.at_least,
            "exclusiveMinimum": allowed.above,
            "maximum": allowed.at_most,
            "exclusiveMaximum": allowed.below,
        }
        number = {"type": "integer" if kind is int else "number"}
        number |= {name: bound for name, bound in bounds.items() if math.isfinite(bound)}
        return {"anyOf": [number, {"type": "string", "pattern": GROUPED[kind]}]}
    if kind is str:
        return {"enum": list(allowed.choices)} if allowed.choices else {"type": "string", "pattern": ONE_LINE}
    element = typing.get_args(kind)[-1]
    if typing.get_origin(kind) is dict:
        names = [*allowed.texts, *(value if isinstance(value, dict) else ())]
        given = value if isinstance(value, dict) else {}
        mapping: dict[str, Any] = {"type": "object", "properties": {}}
        for name in names:
            inner = given.get(name, MISSING)
            about = {} if isinstance(inner, dict) or inner == MISSING else {"default": inner}
            mapping["properties"][name] = about | _of_kind(
                str | None if name in allowed.texts else element, Allowed(), inner
            )
        if allowed.names:
            mapping["propertyNames"] = {"pattern": r"^\w[\w.-]*$", "maxLength": MAX_NAME_BYTES}
        return mapping | {"additionalProperties": _of_kind(element, Allowed(), None)}
    is_pair = typing.get_origin(kind) is tuple
    size = len(typing.get_args(kind)) if is_pair else allowed.size
    few = {"minItems": size, "maxItems": size} if size is not None else {"minItems": 1} if allowed.not_empty else {}
    once = {"uniqueItems": True} if allowed.distinct else {}
    return {"type": "array", "items": _of_kind(element, allowed, None), **few, **once}
