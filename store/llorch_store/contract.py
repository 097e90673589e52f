"""The contract of a store: what agent, operator, gateway and the command line ask of the place where resources live.

Three implementations hold it: `kubernetes.KubernetesStore`, `sqlite.SQLiteStore` (home) and `memory.MemoryStore` (tests).
One contract test-suite runs on all three.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

from llorch_api import Resource

R = TypeVar("R", bound=Resource)
JsonObject = Mapping[str, Any]


class Key(NamedTuple):
    """Names one object. `namespace` is empty for cluster-scoped kinds."""

    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}" if self.namespace else self.name


def key_of(obj: Resource) -> Key:
    """The key of `obj`."""
    return Key(obj.metadata.namespace if type(obj).NAMESPACED else "", obj.metadata.name)


class StoreError(Exception):
    """Anything a store can answer but the object. The message is one line for people."""


class NotFound(StoreError):
    """No such object, or not the one with the expected uid."""


class Conflict(StoreError):
    """The object changed since the given resourceVersion, or exists already."""


class Invalid(StoreError):
    """The object or the patch breaks the schema; nothing was written."""


class Forbidden(StoreError):
    """These credentials may not do that."""


class Unavailable(StoreError):
    """The store did not answer, or asked to come back later. Whether a write happened is unknown."""

    def __init__(self, message: str, *, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after
        """Seconds the store asked to wait; None where it said nothing."""


class EventType(StrEnum):
    """SYNCED ends a (re-)list: every object that exists has been told of, and what is missing has been told as DELETED."""

    ADDED = "ADDED"
    MODIFIED = "MODIFIED"
    DELETED = "DELETED"
    SYNCED = "SYNCED"


@dataclass(frozen=True, slots=True)
class Event(Generic[R]):
    """One change. `object` is None for SYNCED alone; for DELETED it is the last known state."""

    type: EventType
    object: R | None = None


@dataclass(frozen=True, slots=True)
class Listing(Generic[R]):
    """What a list returned, and the resourceVersion from which a watch goes on."""

    items: Sequence[R]
    resource_version: str


class Store(Protocol):
    """Reads, watches and writes GPUNodes and GPUPools.

    Every call may raise `StoreError`. Objects come back as validated models; an object that the models cannot read (a newer
    writer) is skipped with one warning by `list` and `watch` and raises `Invalid` from `get`.
    """

    async def get(self, kind: type[R], key: Key) -> R:
        """The object. Raises NotFound."""
        ...

    async def list(self, kind: type[R], *, namespace: str | None = None) -> Listing[R]:
        """All objects of `kind`, of one namespace where given."""
        ...

    def watch(self, kind: type[R], *, namespace: str | None = None, name: str | None = None) -> AsyncGenerator[Event[R], None]:
        """All objects now (ADDED … SYNCED), then their changes, for ever.

        The stream survives lost connections, expired resourceVersions and a silent server by itself: it re-lists, tells what
        changed meanwhile (ADDED, MODIFIED, DELETED for what vanished) and says SYNCED again. It never raises for an
        unavailable store: it retries with backoff. It ends when the caller closes it (`aclose`) and raises only `Forbidden`
        and programming errors. An object is never told twice at the same resourceVersion.
        """
        ...

    async def apply(self, obj: R, *, field_manager: str) -> R:
        """Creates or updates metadata (labels, annotations, owner references) and spec to `obj`; status stays as it is.

        Server-side apply semantics: what this manager applied earlier and leaves out now is removed; fields of other managers
        that it does not name stay; on a clash this manager wins. Only the fields set on `obj` are sent. Raises Invalid.
        """
        ...

    async def patch(
        self, kind: type[R], key: Key, patch: JsonObject, *, field_manager: str, uid: str = "", resource_version: str = ""
    ) -> R:
        """JSON merge patch (RFC 7386) of metadata and spec; null drops a key. Raises NotFound, Conflict, Invalid.

        With `uid` or `resource_version` the write happens only on that very object (else NotFound) and version (else Conflict).
        A changed spec raises `metadata.generation`.
        """
        ...

    async def patch_status(
        self, kind: type[R], key: Key, patch: JsonObject, *, field_manager: str, uid: str = "", resource_version: str = ""
    ) -> R:
        """The same for status: `patch` is the content of `status`, everything else of the object is untouched."""
        ...

    async def delete(self, kind: type[R], key: Key, *, uid: str = "") -> None:
        """Deletes the object. Raises NotFound, also when it has another uid."""
        ...


class StoreFactory(Protocol):
    """Opens a store and closes it."""

    def __call__(self) -> AbstractAsyncContextManager[Store]: ...
