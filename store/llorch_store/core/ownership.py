"""Server-side apply: who set which field, and what an apply therefore removes, keeps and overwrites.

As on the API server, a manager's applies and its patches are two owners: what a patch set is not removed by the same manager's
next apply that does not name it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from enum import StrEnum
from typing import Any, NamedTuple

from .fields import Field, Shape

Path = tuple[str, ...]
"""A value's place: field names, map keys, and the item itself (SET) or its key (KEYED). An empty container is a value too."""


class Operation(StrEnum):
    """How a manager came to own a field."""

    APPLY = "Apply"
    PATCH = "Patch"


class Owner(NamedTuple):
    """A field manager and its way of writing."""

    manager: str
    operation: Operation


Owners = Mapping[Owner, frozenset[Path]]
"""Which values each owner set last. Several owners may share a value that they agree on."""


def values_of(known: Field, value: Any) -> dict[Path, Any]:
    """Every value that has an owner of its own, by path, in document order."""
    found: dict[Path, Any] = {}
    _collect(known, value, (), found)
    return found


def _collect(known: Field, value: Any, path: Path, found: dict[Path, Any]) -> None:
    children: Iterable[tuple[str, Field | None, Any]] = ()
    if not known.atomic:
        if isinstance(value, Mapping) and known.shape is Shape.OBJECT:
            children = [(name, known.fields.get(name), child) for name, child in value.items()]
        elif isinstance(value, Mapping) and known.shape is Shape.MAP:
            children = [(name, known.item, child) for name, child in value.items()]
        elif isinstance(value, list | tuple) and known.shape is Shape.SET:
            children = [(str(child), None, child) for child in value]
        elif isinstance(value, list | tuple) and known.shape is Shape.KEYED:
            children = [(_key(known, child), None, child) for child in value]
    if not children:
        found[path] = value
    for name, child_field, child in children:
        if child_field is None:
            found[(*path, name)] = child
        else:
            _collect(child_field, child, (*path, name), found)


def _key(known: Field, item: Any) -> str:
    return str(item.get(known.key, "")) if isinstance(item, Mapping) else ""


def assembled(known: Field, values: Mapping[Path, Any]) -> Any:
    """The document with `values`; None where there is none."""
    inner: dict[str, dict[Path, Any]] = {}
    for path, value in values.items():
        if path:
            inner.setdefault(path[0], {})[path[1:]] = value
    if not inner:
        return values.get(())
    if known.shape in (Shape.SET, Shape.KEYED):
        return [child[()] for child in inner.values()]
    return {name: assembled(_child(known, name), child) for name, child in inner.items()}


def _child(known: Field, name: str) -> Field:
    return known.fields.get(name, _SCALAR) if known.shape is Shape.OBJECT else known.item or _SCALAR


_SCALAR = Field()


def applied(known: Field, live: Any, wanted: Any, manager: str, owners: Owners) -> tuple[Any, Owners]:
    """`live` after `manager` applied `wanted`, by force, and who owns what then.

    What the manager applied before and leaves out now goes, unless another owner set it too; what it names is its own, shared
    with owners that set the same value.
    """
    me = Owner(manager, Operation.APPLY)
    before, new = values_of(known, live), values_of(known, wanted)
    new.pop((), None)
    shared = frozenset[Path]().union(*(paths for owner, paths in owners.items() if owner != me))
    dropped = owners.get(me, frozenset[Path]()) - new.keys() - shared
    after = {**{path: value for path, value in before.items() if path not in dropped}, **new}
    lost = {path for path, value in new.items() if path not in before or before[path] != value}
    return assembled(known, after), _handed_over(owners, me, frozenset(new), lost, after)


def patched(known: Field, before: Any, after: Any, manager: str, owners: Owners) -> Owners:
    """Who owns what once `manager` has turned `before` into `after`: a patch owns what it changed."""
    me = Owner(manager, Operation.PATCH)
    old, new = values_of(known, before), values_of(known, after)
    changed = {path for path, value in new.items() if path not in old or old[path] != value}
    return _handed_over(owners, me, owners.get(me, frozenset[Path]()) | changed, changed, new)


def _handed_over(owners: Owners, me: Owner, mine: frozenset[Path], lost: set[Path], exists: Mapping[Path, Any]) -> Owners:
    after = {owner: frozenset(path for path in paths if path in exists and path not in lost) for owner, paths in owners.items()}
    after[me] = frozenset(path for path in mine if path in exists)
    return {owner: paths for owner, paths in after.items() if paths}
