"""What the fields of a resource are, read off its pydantic model: their JSON names, and at which depth writers share them.

The granularity is that of the CustomResourceDefinition: `x-kubernetes-map-type: atomic` makes a map one value,
`x-kubernetes-list-type: set` makes each item of a list a value of its own, and a list is one value otherwise.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from enum import Enum, auto
from functools import cache
from types import NoneType
from typing import Annotated, Any, get_args, get_origin

from pydantic import BaseModel

from llorch_api import ObjectMeta, Resource


class Shape(Enum):
    """The kind of container a field is. SET: strings without duplicates; KEYED: objects told apart by one of their fields."""

    SCALAR = auto()
    OBJECT = auto()
    MAP = auto()
    LIST = auto()
    SET = auto()
    KEYED = auto()


@dataclass(frozen=True, slots=True)
class Field:
    """One field. `fields` is set for OBJECT, `item` for MAP, LIST, SET and KEYED, `key` for KEYED."""

    shape: Shape = Shape.SCALAR
    atomic: bool = False
    fields: Mapping[str, Field] = field(default_factory=dict)
    item: Field | None = None
    key: str = ""


@cache
def fields_of(kind: type[Resource]) -> Field:
    """The fields of `kind` by their JSON names."""
    root = _model(kind)
    metadata = _model(ObjectMeta)
    owners = replace(metadata.fields["ownerReferences"], shape=Shape.KEYED, key="uid")
    return replace(
        root, fields={**root.fields, "metadata": replace(metadata, fields={**metadata.fields, "ownerReferences": owners})}
    )


def _model(model: type[BaseModel], *, atomic: bool = False) -> Field:
    fields = {}
    for name, info in model.model_fields.items():
        extra = info.json_schema_extra if isinstance(info.json_schema_extra, dict) else {}
        fields[info.alias or name] = _type(info.annotation, extra)
    return Field(Shape.OBJECT, atomic, fields)


def _type(annotation: Any, extra: Mapping[str, Any]) -> Field:
    while get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    atomic = extra.get("x-kubernetes-map-type") == "atomic"
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is dict:
        return Field(Shape.MAP, atomic, item=_type(arguments[1], {}))
    if origin is list:
        item = _type(arguments[0], {})
        match extra.get("x-kubernetes-list-type"):
            case "set":
                return Field(Shape.SET, item=item)
            case "map":
                return Field(Shape.KEYED, item=item, key=extra["x-kubernetes-list-map-keys"][0])
            case _:
                return Field(Shape.LIST, atomic=True, item=item)
    if isinstance(annotation, type):
        return _model(annotation, atomic=atomic) if issubclass(annotation, BaseModel) else Field()
    branches = [branch for branch in arguments if branch is not NoneType]
    return _type(branches[0], extra) if NoneType in arguments and len(branches) == 1 else Field()


def pruned(known: Field, value: Any) -> Any:
    """`value` without what `known` has no field for, as the API server prunes it. Wrong types are left to validation."""
    if isinstance(value, Mapping):
        if known.shape is Shape.OBJECT:
            return {name: pruned(known.fields[name], child) for name, child in value.items() if name in known.fields}
        if known.shape is Shape.MAP and known.item is not None:
            return {name: pruned(known.item, child) for name, child in value.items()}
    elif isinstance(value, list | tuple) and known.item is not None:
        return [pruned(known.item, child) for child in value]
    return value


def unknown(known: Field, value: Any, path: str = "") -> Iterator[str]:
    """What `pruned` would drop, as `spec.contextTokenz (did you mean contextTokens?)`."""
    if isinstance(value, Mapping):
        for name, child in value.items():
            here = f"{path}.{name}" if path else str(name)
            if known.shape is Shape.OBJECT:
                if name in known.fields:
                    yield from unknown(known.fields[name], child, here)
                else:
                    near = get_close_matches(str(name), known.fields, n=1)
                    yield f"{here} (did you mean {near[0]}?)" if near else here
            elif known.shape is Shape.MAP and known.item is not None:
                yield from unknown(known.item, child, here)
    elif isinstance(value, list | tuple) and known.item is not None:
        for index, child in enumerate(value):
            yield from unknown(known.item, child, f"{path}[{index}]")
