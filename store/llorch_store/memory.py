"""Objects in this process's memory: for tests, and the plainest form of what a store does."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any, NamedTuple, Self, TypeVar

from llorch_api import Resource

from .contract import Key
from .core import records
from .core.records import Record
from .local import FROM_START, KEPT_DELETIONS, Change, Changes, LocalStore, Selection
from .stamps import stamp

R = TypeVar("R", bound=Resource)


class _Deletion(NamedTuple):
    version: int
    kind: str
    key: Key


class MemoryStore(LocalStore):
    """A Store whose objects end with it. For one event loop."""

    def __init__(self, *, kept_deletions: int = KEPT_DELETIONS) -> None:
        super().__init__()
        self._version = 0
        self._records: dict[tuple[str, Key], Record] = {}
        self._deletions: deque[_Deletion] = deque()
        self._kept_deletions = kept_deletions
        self._trimmed = 0

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        return None

    async def _document(self, kind: type[Resource], key: Key) -> Mapping[str, Any] | None:
        record = self._records.get((kind.KIND, key))
        return record.document if record else None

    async def _changes(self, kind: type[Resource], selection: Selection, since: int) -> Changes:
        complete = since == FROM_START or since < self._trimmed
        documents = [
            record.document
            for (stored, key), record in sorted(self._records.items())
            if stored == kind.KIND and _selected(selection, key) and (complete or int(record.version) > since)
        ]
        gone = [d.key for d in self._deletions if d.kind == kind.KIND and d.version > since and _selected(selection, d.key)]
        return Changes(self._version, complete, documents, [] if complete else gone)

    async def _write(self, kind: type[R], key: Key, change: Change[R], *, durable: bool) -> R:
        del durable
        outcome = change(self._records.get((kind.KIND, key)), stamp(self._version + 1))
        self._records[kind.KIND, key] = outcome.record
        if outcome.changed:
            self._version += 1
            self._signal.notify()
        return outcome.object

    async def _delete(self, kind: type[Resource], key: Key, uid: str) -> None:
        records.require(kind, str(key), self._records.get((kind.KIND, key)), uid=uid)
        del self._records[kind.KIND, key]
        self._version += 1
        self._deletions.append(_Deletion(self._version, kind.KIND, key))
        while len(self._deletions) > self._kept_deletions:
            self._trimmed = self._deletions.popleft().version
        self._signal.notify()


def _selected(selection: Selection, key: Key) -> bool:
    return selection.namespace in (None, key.namespace) and selection.name in (None, key.name)
