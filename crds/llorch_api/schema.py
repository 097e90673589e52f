"""Turns the pydantic models into a structural OpenAPI v3 schema as the API server accepts it.

Pydantic's JSON schema has `$ref`, `anyOf` with null, `const`, `title` and `default: null`; a structural schema has none of them.
"""

from __future__ import annotations

import re
from typing import Any

from pydantic import BaseModel

Schema = dict[str, Any]

_DROPPED = {"title", "discriminator", "additionalProperties", "propertyNames"}
_STRING_LIMIT = 1024


class SchemaError(ValueError):
    """A model cannot be said as a structural schema. Names the field."""


def structural(model: type[BaseModel], *, defaults: bool) -> Schema:
    """The structural schema of `model`, every `$ref` inlined, every field with a description and a bound.

    With `defaults`, the API server fills in what users left out and shows it. Status and machine-written specs go without:
    there a default would only make every object larger.
    """
    root = model.model_json_schema(by_alias=True, mode="validation")
    definitions = root.pop("$defs", {})
    schema = _convert(root, definitions, model.__name__)
    return schema if defaults else _without_defaults(schema)


def _without_defaults(node: Any) -> Any:
    if isinstance(node, dict):
        names = node.get("properties")
        kept = {key: _without_defaults(value) for key, value in node.items() if key not in ("default", "properties")}
        return (
            kept if names is None else {**kept, "properties": {name: _without_defaults(child) for name, child in names.items()}}
        )
    return [_without_defaults(item) for item in node] if isinstance(node, list) else node


def _convert(node: Schema, definitions: dict[str, Schema], path: str) -> Schema:
    node = _without_null(_dereference(node, definitions), definitions)
    out = {key: value for key, value in node.items() if key not in _DROPPED and not (key == "default" and value is None)}
    if "const" in out:
        out["enum"] = [out.pop("const")]
    for key in ("exclusiveMinimum", "exclusiveMaximum"):
        if key in out:
            raise SchemaError(f"{path}: use ge/le: OpenAPI v3.0 knows no numeric {key}")
    if "type" not in out:
        raise SchemaError(f"{path}: no single type in {sorted(node)}")
    if "description" in out:
        out["description"] = re.sub(r"\s+", " ", out["description"]).strip()
    match out["type"]:
        case "object":
            _convert_object(node, out, definitions, path)
        case "array":
            out["items"] = _convert(node["items"], definitions, f"{path}[]")
            if "maxItems" not in out:
                raise SchemaError(f"{path}: a list needs max_length: CEL is refused over unbounded lists")
            out.setdefault("x-kubernetes-list-type", "atomic")
        case "string" if "enum" not in out and "format" not in out:
            out.setdefault("maxLength", _STRING_LIMIT)
        case "integer" if "format" not in out:
            out["format"] = "int64"
    if isinstance(out.get("default"), (dict, list)):
        out.pop("default")  # a non-empty default of a nested object would turn what users left out into what they set
    return out


def _convert_object(node: Schema, out: Schema, definitions: dict[str, Schema], path: str) -> None:
    if "properties" in node:
        out["properties"] = {}
        for name, child in node["properties"].items():
            converted = _convert(child, definitions, f"{path}.{name}")
            if "description" not in converted:
                raise SchemaError(f"{path}.{name}: every field is documented")
            out["properties"][name] = converted
        return
    values = node.get("additionalProperties")
    if not isinstance(values, dict):
        raise SchemaError(f"{path}: a map needs a type for its values")
    out["additionalProperties"] = _convert(values, definitions, f"{path}.*")
    if "maxProperties" not in out:
        raise SchemaError(f"{path}: a map needs max_length: CEL is refused over unbounded maps")


def _dereference(node: Schema, definitions: dict[str, Schema]) -> Schema:
    if "$ref" in node:
        target = _dereference(definitions[node["$ref"].rsplit("/", 1)[-1]], definitions)
        return {**target, **{key: value for key, value in node.items() if key != "$ref"}}
    if len(node.get("allOf", ())) == 1:
        return {**_dereference(node["allOf"][0], definitions), **{key: value for key, value in node.items() if key != "allOf"}}
    return node


def _without_null(node: Schema, definitions: dict[str, Schema]) -> Schema:
    """`X | None` is X that may be left out."""
    if "anyOf" not in node:
        return node
    branches = [branch for branch in node["anyOf"] if branch.get("type") != "null"]
    if len(branches) != 1:
        return node
    return {**_dereference(branches[0], definitions), **{key: value for key, value in node.items() if key != "anyOf"}}
