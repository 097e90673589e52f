"""What the memory and the SQLite store share: the Store methods over three primitives, and the watch."""

from __future__ import annotations

import asyncio
import random
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from llorch_api import Resource

from .contract import Event, JsonObject, Key, Listing, NotFound, Unavailable, key_of
from .core import backoff, records
from .core.records import Outcome, Record, Stamp
from .core.validation import readable
from .core.watching import Told
from .reading import Reader
from .wakeup import Signal

R = TypeVar("R", bound=Resource)

KEPT_DELETIONS = 1000
"""Deletions that are remembered for watchers. A watcher that has missed older ones lists again."""
FROM_START = -1
"""The position of a watcher that has seen nothing."""

Change = Callable[[Record | None, Stamp], Outcome[R]]
"""From the object as it is (None: there is none) to what a write makes of it. Raises NotFound, Conflict, Invalid."""


@dataclass(frozen=True, slots=True)
class Selection:
    """Which objects: of one namespace, of one name, or all."""

    namespace: str | None = None
    name: str | None = None


@dataclass(frozen=True, slots=True)
class Changes:
    """What happened to a kind after some version. `complete` says that `documents` are all there are."""

    version: int
    complete: bool
    documents: Sequence[Mapping[str, Any]]
    deleted: Sequence[Key]


class LocalStore(ABC):
    """A Store on this machine. Writes wake this store's watchers through `_signal`."""

    def __init__(self) -> None:
        self._reader = Reader()
        self._signal = Signal()

    @abstractmethod
    async def _document(self, kind: type[Resource], key: Key) -> Mapping[str, Any] | None:
        """The stored object."""

    @abstractmethod
    async def _changes(self, kind: type[Resource], selection: Selection, since: int) -> Changes:
        """What happened after version `since`; everything where that is FROM_START or too long ago."""

    @abstractmethod
    async def _write(self, kind: type[R], key: Key, change: Change[R], *, durable: bool) -> R:
        """Stores what `change` makes of the object. `durable`: it survives a power cut too."""

    @abstractmethod
    async def _delete(self, kind: type[Resource], key: Key, uid: str) -> None:
        """Removes the object and remembers its deletion."""

    async def get(self, kind: type[R], key: Key) -> R:
        """The object. Raises NotFound."""
        document = await self._document(kind, scoped(kind, key))
        if document is None:
            raise NotFound(f"{kind.KIND} {key} not found")
        return readable(kind, document)

    async def list(self, kind: type[R], *, namespace: str | None = None) -> Listing[R]:
        """All objects of `kind`, of one namespace where given."""
        changes = await self._changes(kind, _selection(kind, namespace), FROM_START)
        items, _ = self._reader.read_all(kind, changes.documents)
        return Listing(items, str(changes.version))

    async def watch(
        self, kind: type[R], *, namespace: str | None = None, name: str | None = None
    ) -> AsyncGenerator[Event[R], None]:
        """All objects now, then their changes, for ever. A reader that falls behind is told the newest state only."""
        selection, told = _selection(kind, namespace, name), Told[R]()
        position, failures = FROM_START, 0
        with self._signal.subscription() as changed:
            while True:
                changed.clear()
                try:
                    changes = await self._changes(kind, selection, position)
                except Unavailable as error:
                    failures += 1
                    await asyncio.sleep(backoff.delay(failures, random.random(), retry_after=error.retry_after))
                    continue
                position, failures = changes.version, 0
                for event in self._events(kind, told, changes):
                    yield event
                await changed.wait()

    def _events(self, kind: type[R], told: Told[R], changes: Changes) -> Sequence[Event[R]]:
        objects, unreadable = self._reader.read_all(kind, changes.documents)
        if changes.complete:
            return told.listed(objects, unreadable)
        # Deletions first: a name that was deleted and is there now was created anew.
        gone = [event for key in changes.deleted for event in told.deleted(key)]
        return gone + [event for obj in objects for event in told.changed(obj)]

    async def apply(self, obj: R, *, field_manager: str) -> R:
        """Creates or updates metadata and spec to `obj`, by server-side apply. Raises Invalid."""

        def change(current: Record | None, stamp: Stamp) -> Outcome[R]:
            return records.applied(obj, current, field_manager=field_manager, stamp=stamp)

        return await self._write(type(obj), scoped(type(obj), key_of(obj)), change, durable=True)

    async def patch(
        self, kind: type[R], key: Key, patch: JsonObject, *, field_manager: str, uid: str = "", resource_version: str = ""
    ) -> R:
        """JSON merge patch of metadata and spec. Raises NotFound, Conflict, Invalid."""

        def change(current: Record | None, stamp: Stamp) -> Outcome[R]:
            found = records.require(kind, str(key), current, uid=uid, resource_version=resource_version)
            return records.patched(kind, found, patch, field_manager=field_manager, stamp=stamp)

        return await self._write(kind, scoped(kind, key), change, durable=True)

    async def patch_status(
        self, kind: type[R], key: Key, patch: JsonObject, *, field_manager: str, uid: str = "", resource_version: str = ""
    ) -> R:
        """JSON merge patch of the content of status. Raises NotFound, Conflict, Invalid."""
        del field_manager  # nobody applies status, so nobody asks who owns it

        def change(current: Record | None, stamp: Stamp) -> Outcome[R]:
            found = records.require(kind, str(key), current, uid=uid, resource_version=resource_version)
            return records.status_patched(kind, found, patch, stamp=stamp)

        # Status is told again within a beat; it need not wait for the disk.
        return await self._write(kind, scoped(kind, key), change, durable=False)

    async def delete(self, kind: type[R], key: Key, *, uid: str = "") -> None:
        """Deletes the object, at once. Raises NotFound, also when it has another uid."""
        await self._delete(kind, scoped(kind, key), uid)


def scoped(kind: type[Resource], key: Key) -> Key:
    """`key` as `kind` is stored: a cluster-scoped kind has no namespace."""
    return key if kind.NAMESPACED else Key("", key.name)


def _selection(kind: type[Resource], namespace: str | None, name: str | None = None) -> Selection:
    return Selection(namespace if kind.NAMESPACED else None, name)
