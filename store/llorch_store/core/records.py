"""What a local store keeps of one object, and how each write changes it. Pure: version, uid and time come in as a `Stamp`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, NamedTuple, TypeVar

from llorch_api import Resource
from llorch_store.contract import Conflict, Invalid, JsonObject, NotFound

from . import ownership
from .fields import fields_of
from .merge import merge_patch
from .ownership import Owners
from .validation import checked, known_part, name_of

R = TypeVar("R", bound=Resource)

_WRITABLE = ("labels", "annotations", "ownerReferences")
"""The metadata that writers set; the store sets the rest."""
_PRECONDITIONS = ("uid", "resourceVersion")


class Stamp(NamedTuple):
    """What a write needs from the world: the next version of the store, a fresh uid, and the time (RFC 3339)."""

    version: int
    uid: str
    now: str


@dataclass(frozen=True, slots=True)
class Record:
    """An object as JSON, and who set which of its fields."""

    document: Mapping[str, Any]
    owners: Owners = field(default_factory=dict)

    @property
    def uid(self) -> str:
        """`metadata.uid`."""
        return str(self.document["metadata"]["uid"])

    @property
    def version(self) -> str:
        """`metadata.resourceVersion`."""
        return str(self.document["metadata"]["resourceVersion"])


@dataclass(frozen=True, slots=True)
class Outcome(Generic[R]):
    """A write that was accepted. Where nothing changed, `record` has the old version and no watcher is told."""

    record: Record
    object: R
    changed: bool


def applied(obj: R, current: Record | None, *, field_manager: str, stamp: Stamp) -> Outcome[R]:
    """`current` (None: no such object) after an apply of `obj`. Raises Invalid."""
    kind = type(obj)
    sent = obj.to_json()
    identity = {name: sent["metadata"][name] for name in ("name", "namespace") if sent["metadata"].get(name)}
    if not kind.NAMESPACED:
        identity.pop("namespace", None)
    live = _writable(current.document) if current else {}
    merged, owners = ownership.applied(fields_of(kind), live, _writable(sent), field_manager, current.owners if current else {})
    return _written(kind, current, merged or {}, owners, identity, stamp)


def patched(kind: type[R], current: Record, patch: JsonObject, *, field_manager: str, stamp: Stamp) -> Outcome[R]:
    """`current` after a merge patch of its metadata and spec. Status in the patch is ignored. Raises Invalid."""
    metadata = patch.get("metadata") or {}
    for name, value in metadata.items():
        if name not in (*_WRITABLE, *_PRECONDITIONS) and value != current.document["metadata"].get(name):
            raise Invalid(f"{name_of(kind, current.document)}: metadata.{name} cannot be patched")
    part = {"metadata": {name: value for name, value in metadata.items() if name in _WRITABLE}}
    if "spec" in patch:
        part["spec"] = patch["spec"]
    live = _writable(current.document)
    merged = known_part(kind, merge_patch(live, part))
    owners = ownership.patched(fields_of(kind), live, merged, field_manager, current.owners)
    return _written(kind, current, merged, owners, {}, stamp)


def status_patched(kind: type[R], current: Record, patch: JsonObject, *, stamp: Stamp) -> Outcome[R]:
    """`current` after a merge patch of the content of its status. The generation stays. Raises Invalid."""
    status = merge_patch(current.document.get("status", {}), patch)
    return _finished(kind, current, {**current.document, "status": status}, current.owners, stamp)


def require(kind: type[Resource], name: str, current: Record | None, *, uid: str, resource_version: str = "") -> Record:
    """`current`, if it is the very object and version meant; empty means any. Raises NotFound, Conflict."""
    if current is None:
        raise NotFound(f"{kind.KIND} {name} not found")
    if uid and uid != current.uid:
        raise NotFound(f"{kind.KIND} {name} with uid {uid} not found: it was deleted and created anew")
    if resource_version and resource_version != current.version:
        raise Conflict(f"{kind.KIND} {name} is at version {current.version}, not {resource_version}")
    return current


def _writable(document: Mapping[str, Any]) -> dict[str, Any]:
    """The part that apply and patch write."""
    metadata = {name: document["metadata"][name] for name in _WRITABLE if document["metadata"].get(name)}
    part: dict[str, Any] = {"metadata": metadata} if metadata else {}
    if "spec" in document:
        part["spec"] = document["spec"]
    return part


def _written(
    kind: type[R], current: Record | None, part: Mapping[str, Any], owners: Owners, identity: Mapping[str, Any], stamp: Stamp
) -> Outcome[R]:
    if current is None:
        kept: dict[str, Any] = {**identity, "uid": stamp.uid, "generation": 1, "creationTimestamp": stamp.now}
    else:
        kept = {name: value for name, value in current.document["metadata"].items() if name not in _WRITABLE}
    document: dict[str, Any] = {
        "apiVersion": kind.model_fields["api_version"].default,
        "kind": kind.KIND,
        "metadata": {**kept, **part.get("metadata", {})},
    }
    if "spec" in part:
        document["spec"] = part["spec"]
    if current is not None and "status" in current.document:
        document["status"] = current.document["status"]
    return _finished(kind, current, document, owners, stamp)


def _finished(kind: type[R], current: Record | None, document: Mapping[str, Any], owners: Owners, stamp: Stamp) -> Outcome[R]:
    document = known_part(kind, document)
    if current is not None and document == current.document:
        return Outcome(Record(current.document, owners), checked(kind, document), changed=False)
    metadata = {**document["metadata"], "resourceVersion": str(stamp.version)}
    if current is not None and document.get("spec") != current.document.get("spec"):
        metadata["generation"] += 1
    document = {**document, "metadata": metadata}
    return Outcome(Record(document, owners), checked(kind, document), changed=True)
