"""Frozen dataclasses as schemas: help texts, typed checks, overrides, one-line errors.

Values reach a config by three roads (an experiment file, `--config.a.b=value`, a run's
`config.json`) and all three pass the same check: `check` compares a value with the field's
annotation and says in one line what was wrong. Nothing here knows what the fields mean.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import json
import types
import typing
from dataclasses import field
from typing import Any, Literal, TypeVar

C = TypeVar("C")


class JaxlmError(Exception):
    """A failure that people are told about in one line; the process exits with `exit_code`."""

    exit_code = 1


class UserError(JaxlmError):
    """A mistake in what was asked for: exit code 2."""

    exit_code = 2


def doc(default: Any, text: str) -> Any:
    """A dataclass field with its help text, shown by `--help`."""
    return field(default=default, metadata={"help": text})


def part(cls: type[C]) -> C:
    """A nested config."""
    return field(default_factory=cls)


def hint(name: str, choices: typing.Iterable[str]) -> str:
    choices = list(choices)
    near = difflib.get_close_matches(name, choices, n=1, cutoff=0.5)
    return f"did you mean {near[0]!r}?" if near else f"choose from {', '.join(choices)}"


def _type_name(want: Any) -> str:
    if typing.get_origin(want) is Literal:
        return "one of " + ", ".join(repr(a) for a in typing.get_args(want))
    return getattr(want, "__name__", str(want)) if not typing.get_origin(want) else str(want)


def check(value: Any, want: Any, where: str) -> Any:
    """`value` as the annotation `want` wants it (an int for a float becomes one, a list a tuple).

    Raises UserError naming the field, the value, what was expected and the nearest valid choice.
    """
    origin, args = typing.get_origin(want), typing.get_args(want)
    bad = UserError(f"{where}: expected {_type_name(want)}, got {value!r}")
    if want is Any:
        return value
    if origin is Literal:
        if value in args:
            return value
        raise UserError(f"{bad}; {hint(str(value), [str(a) for a in args])}")
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        return check(value, next(a for a in args if a is not type(None)), where)
    if origin is tuple:
        if isinstance(value, (str, bytes)) or not isinstance(value, (list, tuple)):
            raise bad
        if len(args) == 2 and args[1] is Ellipsis:
            return tuple(check(v, args[0], f"{where}[{i}]") for i, v in enumerate(value))
        if len(args) != len(value):
            raise bad
        return tuple(
            check(v, a, f"{where}[{i}]") for i, (v, a) in enumerate(zip(value, args, strict=True))
        )
    if dataclasses.is_dataclass(want):
        if isinstance(value, dict):
            return from_dict(typing.cast(type, want), value, where)
        if not isinstance(value, typing.cast(type, want)):
            raise bad
        return checked(value, where)
    if want is float and type(value) is int:
        return float(value)
    if want is int and type(value) is float and value.is_integer():
        return int(value)
    if type(value) is not want:
        raise bad
    return value


def _fields(cls: Any) -> dict[str, Any]:
    hints = typing.get_type_hints(cls if isinstance(cls, type) else type(cls))
    return {f.name: hints[f.name] for f in dataclasses.fields(cls)}


def checked(config: C, where: str) -> C:
    changed = {}
    for name, want in _fields(config).items():
        value = getattr(config, name)
        new = check(value, want, f"{where}.{name}" if where else name)
        if new is not value:
            changed[name] = new
    return dataclasses.replace(config, **changed) if changed else config  # type: ignore[type-var]


def from_dict(cls: type[C], values: dict[str, Any], where: str = "config") -> C:
    """A config from plain JSON values; unknown and missing fields and wrong types are refused by
    name."""
    fields = _fields(cls)
    if not isinstance(values, dict):
        raise UserError(f"{where}: expected the fields of {cls.__name__}, got {values!r}")
    for name in values:
        if name not in fields:
            raise UserError(f"{where}.{name}: no such field; {hint(name, fields)}")
    for f in dataclasses.fields(cls):  # type: ignore[arg-type]
        no_default = f.default is f.default_factory is dataclasses.MISSING
        if no_default and f.name not in values:
            raise UserError(f"{where}.{f.name}: missing")
    return cls(**{k: check(v, fields[k], f"{where}.{k}") for k, v in values.items()})


def override(config: C, dotted: str, value: Any, where: str = "config") -> C:
    """`config` with the field `a.b.c` set. Strings are read as Python literals where needed."""
    head, _, rest = dotted.partition(".")
    fields = _fields(config)
    if head not in fields:
        raise UserError(f"{where}.{head}: no such field; {hint(head, fields)}")
    where = f"{where}.{head}"
    if rest:
        inner = getattr(config, head)
        if not dataclasses.is_dataclass(inner):
            raise UserError(f"{where}: has no fields, so {where}.{rest} means nothing")
        new = override(inner, rest, value, where)
    else:
        want = fields[head]
        if isinstance(value, str) and want is not str:
            value = _parse(value, want)
        new = check(value, want, where)
    return dataclasses.replace(config, **{head: new})  # type: ignore[type-var]


def parse_literal(text: str, want: Any, where: str) -> Any:
    """`text` from a command line as the annotation `want` wants it. Raises UserError."""
    return check(_parse(text, want), want, where)


def _parse(text: str, want: Any) -> Any:
    if text.lower() in ("true", "false", "none"):
        return {"true": True, "false": False, "none": None}[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        pass
    if typing.get_origin(want) is tuple and typing.get_args(want)[0] is str:
        return tuple(part.strip() for part in text.split(","))
    return text


def to_dict(config: Any) -> dict[str, Any]:
    """Plain JSON values."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def describe(cls: Any, prefix: str = "config", default: Any = None) -> list[tuple[str, str, str]]:
    """Rows (flag, default, help) of all fields below a config class, for `--help`."""
    rows: list[tuple[str, str, str]] = []
    default = cls() if default is None else default
    for f in dataclasses.fields(cls):
        value = getattr(default, f.name)
        if dataclasses.is_dataclass(value):
            rows += describe(type(value), f"{prefix}.{f.name}", value)
        else:
            rows.append((f"--{prefix}.{f.name}", repr(value), f.metadata.get("help", "")))
    return rows
