"""From JSON to a valid resource, and from what is wrong with it to one readable line.

`parse` is for what people write: it refuses unknown fields. `readable` is for what a store holds: it ignores them, so that an
old reader survives a newer writer.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from llorch_api import GROUP, VERSION, Resource
from llorch_store.contract import Invalid

from .fields import fields_of, pruned, unknown
from .metadata import metadata_faults

R = TypeVar("R", bound=Resource)

_MOST = 3
"""Faults that one message tells in full."""
_WIDTH = 80
"""Characters of a wrong value that a message repeats."""
_NAMES = {
    r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$": "must be lowercase letters, digits and '-'",
    r"^[0-9a-f]{64}$": "must be 64 hex digits",
}
_TYPES = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "int_parsing": "a whole number",
    "string_type": "text",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "list_type": "a list",
    "dict_type": "a map",
    "model_type": "a map",
    "model_attributes_type": "a map",
}


def explain(error: ValidationError) -> str:
    """What is wrong, in one line: `spec.slots: 0 — must be at least 1; spec.model.source: is required`."""
    return summary(_fault(details) for details in error.errors(include_url=False))


def summary(faults: Iterable[str]) -> str:
    """The first three of `faults`, and how many more there are."""
    told = list(faults)
    rest = f"; and {len(told) - _MOST} more" if len(told) > _MOST else ""
    return "; ".join(told[:_MOST]) + rest


def parse(kind: type[R], document: Mapping[str, Any]) -> R:
    """`document`, as a person wrote it, as a `kind`. Raises Invalid for another kind, unknown fields and wrong values.

    Nulls count as left out, as in `creationTimestamp: null`. What it says about status is not looked at.
    """
    document = _without_nulls({name: value for name, value in document.items() if name != "status"})
    _require_kind(kind, document)
    unknowns = [path for path in unknown(fields_of(kind), document) if not path.startswith("metadata.")]
    if unknowns:
        raise Invalid(f"{name_of(kind, document)}: unknown field {summary(unknowns)}")
    return checked(kind, document)


def checked(kind: type[R], document: Mapping[str, Any]) -> R:
    """`document` as a `kind`, types taken strictly as the API server does. Raises Invalid."""
    try:
        obj = kind.model_validate_json(json.dumps(document), strict=True)
    except ValidationError as error:
        raise Invalid(f"{name_of(kind, document)}: {explain(error)}") from None
    if faults := list(metadata_faults(obj.metadata, namespaced=kind.NAMESPACED)):
        raise Invalid(f"{name_of(kind, document)}: {summary(faults)}")
    return obj


def readable(kind: type[R], document: Mapping[str, Any]) -> R:
    """`document`, as a store holds it, as a `kind`. Raises Invalid where this version cannot read it."""
    try:
        return kind.model_validate(document)
    except ValidationError as error:
        raise Invalid(f"{name_of(kind, document)}: {explain(error)}") from None


def known_part(kind: type[Resource], document: Mapping[str, Any]) -> dict[str, Any]:
    """`document` without the fields that `kind` does not have."""
    known: dict[str, Any] = pruned(fields_of(kind), document)
    return known


def name_of(kind: type[Resource], document: Mapping[str, Any]) -> str:
    """`GPUPool chat`, for messages."""
    metadata = document.get("metadata")
    name = metadata.get("name") if isinstance(metadata, Mapping) else None
    return f"{kind.KIND} {name}" if isinstance(name, str) and name else kind.KIND


def _require_kind(kind: type[Resource], document: Mapping[str, Any]) -> None:
    for field, wanted in (("apiVersion", f"{GROUP}/{VERSION}"), ("kind", kind.KIND)):
        if (found := document.get(field, wanted)) != wanted:
            raise Invalid(f"{name_of(kind, document)}: {field}: {_shown(found)} — must be {wanted}")


def _without_nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _without_nulls(child) for name, child in value.items() if child is not None}
    return [_without_nulls(child) for child in value] if isinstance(value, list | tuple) else value


def _fault(details: ErrorDetails) -> str:
    path, allowed = _path(details["loc"]), _allowed(details)
    if details["type"] == "missing":
        return f"{path}: {allowed}"
    # A model's own check is about the model as a whole: its value would repeat every field of it.
    about_whole = details["type"] == "value_error" and isinstance(details["input"], Mapping)
    return f"{path}: {allowed}" if about_whole else f"{path}: {_shown(details['input'])} — {allowed}"


def _path(location: tuple[int | str, ...]) -> str:
    path = ""
    for step in location:
        if isinstance(step, int):
            path += f"[{step}]"
        elif step != "[key]":
            path += f".{step}" if path else step
    return path or "document"


def _allowed(details: ErrorDetails) -> str:
    context = details.get("ctx", {})
    kind = details["type"]
    if kind in _TYPES:
        return f"must be {_TYPES[kind]}"
    match kind:
        case "missing":
            return "is required"
        case "greater_than_equal":
            return f"must be at least {context['ge']}"
        case "less_than_equal":
            return f"must be at most {context['le']}"
        case "enum" | "literal_error":
            return f"must be {context['expected']}"
        case "string_pattern_mismatch":
            return _NAMES.get(context["pattern"], f"must match {context['pattern']}")
        case "string_too_short":
            return "must not be empty" if context["min_length"] == 1 else f"must have at least {context['min_length']} characters"
        case "string_too_long":
            return f"must have at most {context['max_length']} characters"
        case "too_long":
            return f"must have at most {context['max_length']} entries"
        case "too_short":
            return f"must have at least {context['min_length']} entries"
        case "value_error":
            return str(context.get("error", details["msg"]))
        case _:
            return details["msg"]


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    # One line, and nothing that moves a terminal's cursor.
    text = re.sub(r"[\x00-\x1f\x7f]", "?", text)
    return text if len(text) <= _WIDTH else f"{text[: _WIDTH - 1]}…"
