"""Reads a component's settings from the environment; a bad value ends the program with one line that says what is allowed."""

from __future__ import annotations

import ast
import inspect
import os
import sys
import textwrap
from enum import Enum
from itertools import pairwise
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

from pydantic import AliasChoices, ValidationError
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, SettingsError

S = TypeVar("S", bound=BaseSettings)

UNITS = {"SECS": "seconds", "SECONDS": "seconds", "MS": "ms", "MIB": "MiB", "PERCENT": "percent", "BYTES": "bytes"}
"""Unit of a variable by the last word of its name."""
SECRET_WORDS = ("TOKEN", "SECRET", "PASSWORD")
MAX_SHOWN = 80


class StartError(Exception):
    """Why a program cannot start. The message is one line for people; the exit code is 2."""


def load(cls: type[S]) -> S:
    """`cls()` from the environment. Prints one line per bad variable to stderr and raises SystemExit(2)."""
    try:
        return cls()
    except ValidationError as error:
        lines = [_line(cls, dict(item)) for item in error.errors()]
    except SettingsError as error:
        lines = [_unparsable(cls, str(error))]
    for line in dict.fromkeys(lines):
        print(f"llorch: {line}", file=sys.stderr)
    raise SystemExit(2)


def _line(cls: type[BaseSettings], item: dict[str, Any]) -> str:
    field = _field(cls, str(item["loc"][0])) if item["loc"] else None
    message = str(item["msg"]).removeprefix("Value error, ")
    if field is None:
        return message  # a rule over several variables names them itself
    name, info = field
    variable = _variable(name, info)
    if item["type"] == "missing":
        return f"{variable} is not set — {_allowed(cls, name, info, variable) or 'it is needed'}"
    allowed = message if item["type"] == "value_error" else _allowed(cls, name, info, variable) or message
    return f"{variable}={_shown(variable, item.get('input'))} — {allowed}"


def _unparsable(cls: type[BaseSettings], message: str) -> str:
    for name, info in cls.model_fields.items():
        if f'"{name}"' in message:
            variable = _variable(name, info)
            return f"{variable}={_shown(variable, os.environ.get(variable))} — must be JSON"
    return message


def _field(cls: type[BaseSettings], location: str) -> tuple[str, FieldInfo] | None:
    for name, info in cls.model_fields.items():
        if location in (name, *_names(name, info)):
            return name, info
    return None


def _names(name: str, info: FieldInfo) -> list[str]:
    alias = info.validation_alias
    if isinstance(alias, AliasChoices):
        return [choice for choice in alias.choices if isinstance(choice, str)]
    return [alias] if isinstance(alias, str) else [name.upper()]


def _variable(name: str, info: FieldInfo) -> str:
    """The variable that was set, or the first of the field's names."""
    names = _names(name, info)
    return next((each for each in names if each in os.environ), names[0])


def _shown(variable: str, value: Any) -> str:
    if any(word in variable for word in SECRET_WORDS) and not variable.endswith("_FILE"):
        return "…"
    text = str(value).replace("\n", "\\n").replace("\r", "\\r")
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}…"


def _allowed(cls: type[BaseSettings], name: str, info: FieldInfo, variable: str) -> str:
    """What the field takes, from its type and its bounds."""
    kinds = _kinds(info.annotation)
    if choices := [choice for kind in kinds for choice in _choices(kind)]:
        return f"must be {' or '.join(choices) if len(choices) < 3 else ', '.join(choices[:-1]) + ' or ' + choices[-1]}"
    unit = UNITS.get(variable.rsplit("_", 1)[-1], "")
    suffix = f" ({unit})" if unit else ""
    bounds = {key: getattr(item, key) for item in info.metadata for key in ("ge", "gt", "le", "lt") if hasattr(item, key)}
    low = bounds.get("ge", bounds.get("gt"))
    high = bounds.get("le", bounds.get("lt"))
    above, below = ("above " if "gt" in bounds else ""), ("below " if "lt" in bounds else "")
    if low is not None and high is not None:
        return f"must be {above}{low} to {below}{high}{suffix}"
    if low is not None:
        return f"must be {above}{low}{'' if above else ' or more'}{suffix}"
    if high is not None:
        return f"must be {below}{high}{'' if below else ' or less'}{suffix}"
    if any(getattr(item, "pattern", None) for item in info.metadata) and (says := _documentation(cls, name, info)):
        return f"must be {says}"
    if bool in kinds:
        return "must be true or false"
    if int in kinds:
        return f"must be a whole number{suffix}"
    if float in kinds:
        return f"must be a number{suffix}"
    return "must be a path" if Path in kinds else ""


def _kinds(annotation: Any) -> list[Any]:
    """The alternatives of `A | B | None` but None."""
    if get_origin(annotation) in (Union, UnionType):
        return [kind for each in get_args(annotation) for kind in _kinds(each) if kind is not type(None)]
    return [annotation]


def _choices(kind: Any) -> list[str]:
    if get_origin(kind) is Literal:
        return [str(value) for value in get_args(kind)]
    if isinstance(kind, type) and issubclass(kind, Enum):
        return [str(member.value) for member in kind]
    return []


def _documentation(cls: type[BaseSettings], name: str, info: FieldInfo) -> str:
    """The first sentence of the field's docstring: the string below it in the class."""
    text = info.description or _docstrings(cls).get(name, "")
    return " ".join(text.split()).split(". ")[0].rstrip(".")


def _docstrings(cls: type[BaseSettings]) -> dict[str, str]:
    try:
        body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
    except (OSError, TypeError, SyntaxError):
        return {}
    found: dict[str, str] = {}
    statements = body.body if isinstance(body, ast.ClassDef) else []
    for statement, after in pairwise(statements):
        if (
            isinstance(statement, ast.AnnAssign)
            and isinstance(statement.target, ast.Name)
            and isinstance(after, ast.Expr)
            and isinstance(after.value, ast.Constant)
            and isinstance(after.value.value, str)
        ):
            found[statement.target.id] = after.value.value
    return found
