"""Objects in one SQLite file: the home profile's store. Several processes may use it at once.

Durability: the journal is a write-ahead log. A committed write is in the kernel before it is acknowledged, so that killing the
process loses nothing. Writes of metadata and spec, which nobody would repeat, are synced to the disk too and survive a power
cut; status is not (`synchronous` FULL and NORMAL): it is told again within a beat. Neither can damage the file.
The log needs shared memory: the file must be on a local disk, not on NFS.
"""

from __future__ import annotations

import asyncio
import json
import logging
import sqlite3
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, Self, TypeVar

import aiosqlite

from llorch_api import Resource

from .contract import Key, StoreError
from .core import records
from .core.ownership import Operation, Owner, Owners
from .core.records import Record
from .local import KEPT_DELETIONS, Change, Changes, LocalStore, Selection
from .sqlite_file import opened, translated
from .stamps import stamp

R = TypeVar("R", bound=Resource)
logger = logging.getLogger(__name__)

POLL_SECONDS = 0.1
"""How often other processes' writes are looked for while anybody watches. One look costs about 0.1 ms."""

_SELECTED = "kind = :kind AND (:namespace IS NULL OR namespace = :namespace) AND (:name IS NULL OR name = :name)"
# One statement is one snapshot: a version, and exactly what led to it. A row without a name says that nothing did.
_CHANGES = f"""
SELECT counter.version, :since < counter.trimmed OR :since < 0, found.namespace, found.name, found.document
FROM counter LEFT JOIN (
    SELECT namespace, name, document FROM objects
    WHERE {_SELECTED} AND version > CASE WHEN :since < (SELECT trimmed FROM counter) THEN -1 ELSE :since END
    UNION ALL
    SELECT namespace, name, NULL FROM deletions WHERE {_SELECTED} AND version > :since
) AS found
ORDER BY found.namespace, found.name"""
_ONE = "SELECT document, owners FROM objects WHERE kind = ? AND namespace = ? AND name = ?"


class SQLiteStore(LocalStore):
    """A Store in the file at `path`, to be used as `async with SQLiteStore(path) as store`."""

    def __init__(self, path: str | Path, *, kept_deletions: int = KEPT_DELETIONS) -> None:
        super().__init__()
        self._path = Path(path)
        self._kept_deletions = kept_deletions
        self._writing = asyncio.Lock()
        self._open = AsyncExitStack()
        self._connections: tuple[aiosqlite.Connection, aiosqlite.Connection] | None = None
        self._poller: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as stack:
            connections = []
            for _ in range(2):
                connections.append(await opened(self._path))
                stack.push_async_callback(connections[-1].close)
            # Two, so that no read waits behind a write that waits for another process.
            self._connections = (connections[0], connections[1])
            self._poller = asyncio.create_task(self._poll(), name=f"watch {self._path}")
            # Watchers wake, look, and raise what ended it.
            self._poller.add_done_callback(lambda _: self._signal.notify())
            stack.push_async_callback(self._end_poller, self._poller)
            self._open = stack.pop_all()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._open.aclose()
        self._connections = None

    async def _end_poller(self, poller: asyncio.Task[None]) -> None:
        poller.cancel()
        await asyncio.wait([poller])

    @property
    def _reader_connection(self) -> aiosqlite.Connection:
        return self._both()[0]

    @property
    def _writer_connection(self) -> aiosqlite.Connection:
        return self._both()[1]

    def _both(self) -> tuple[aiosqlite.Connection, aiosqlite.Connection]:
        if self._connections is None:
            raise StoreError(f"{self._path}: is not open")
        return self._connections

    async def _poll(self) -> None:
        """Wakes this process's watchers after other processes' writes."""
        seen, broken = -1, False
        while True:
            await self._signal.wanted.wait()
            try:
                rows = list(await self._reader_connection.execute_fetchall("PRAGMA data_version"))
            except sqlite3.Error as error:
                if not broken:
                    logger.warning("%s: cannot look for other processes' writes: %s", self._path, error)
                broken = True
            else:
                broken = False
                if rows[0][0] != seen:
                    seen = rows[0][0]
                    self._signal.notify()
            await asyncio.sleep(POLL_SECONDS)

    async def _document(self, kind: type[Resource], key: Key) -> Mapping[str, Any] | None:
        with translated(self._path):
            rows = list(await self._reader_connection.execute_fetchall(_ONE, (kind.KIND, *key)))
        return _mapping(rows[0][0]) if rows else None

    async def _changes(self, kind: type[Resource], selection: Selection, since: int) -> Changes:
        if self._poller is not None and self._poller.done() and not self._poller.cancelled():
            self._poller.result()
        wanted = {"kind": kind.KIND, "namespace": selection.namespace, "name": selection.name, "since": since}
        with translated(self._path):
            rows = list(await self._reader_connection.execute_fetchall(_CHANGES, wanted))
        version, complete = rows[0][0], bool(rows[0][1])
        documents = [_mapping(row[4]) for row in rows if row[4] is not None]
        deleted = [Key(row[2], row[3]) for row in rows if row[4] is None and row[3] is not None]
        return Changes(version, complete, documents, [] if complete else deleted)

    @asynccontextmanager
    async def _transaction(self, *, durable: bool) -> AsyncIterator[aiosqlite.Connection]:
        async with self._writing:
            with translated(self._path):
                writer = self._writer_connection
                try:
                    await writer.execute(f"PRAGMA synchronous = {'FULL' if durable else 'NORMAL'}")
                    await writer.execute("BEGIN IMMEDIATE")
                    yield writer
                    await writer.commit()
                except BaseException:
                    # Also when this task is cancelled: it queues behind whatever is running there, even the commit.
                    await writer.rollback()
                    raise

    async def _write(self, kind: type[R], key: Key, change: Change[R], *, durable: bool) -> R:
        async with self._transaction(durable=durable) as writer:
            current = await self._record(writer, kind, key)
            outcome = change(current, stamp(await self._version(writer) + 1))
            await self._put(writer, kind, key, current, outcome.record)
        if outcome.changed:
            self._signal.notify()
        return outcome.object

    async def _put(self, writer: aiosqlite.Connection, kind: type[Resource], key: Key, old: Record | None, new: Record) -> None:
        if new == old:
            return
        if old is None or new.version != old.version:
            await writer.execute("UPDATE counter SET version = ?", (int(new.version),))
        await writer.execute(
            "INSERT OR REPLACE INTO objects VALUES (?, ?, ?, ?, ?, ?)",
            (kind.KIND, *key, int(new.version), json.dumps(new.document, ensure_ascii=False), _from_owners(new.owners)),
        )

    async def _delete(self, kind: type[Resource], key: Key, uid: str) -> None:
        async with self._transaction(durable=True) as writer:
            records.require(kind, str(key), await self._record(writer, kind, key), uid=uid)
            version = await self._version(writer) + 1
            await writer.execute("DELETE FROM objects WHERE kind = ? AND namespace = ? AND name = ?", (kind.KIND, *key))
            await writer.execute("INSERT INTO deletions VALUES (?, ?, ?, ?)", (version, kind.KIND, *key))
            await writer.execute("UPDATE counter SET version = ?", (version,))
            await self._trim(writer)
        self._signal.notify()

    async def _trim(self, writer: aiosqlite.Connection) -> None:
        oldest = "SELECT version FROM deletions ORDER BY version DESC LIMIT 1 OFFSET ?"
        rows = list(await writer.execute_fetchall(oldest, (self._kept_deletions,)))
        if rows:
            await writer.execute("DELETE FROM deletions WHERE version <= ?", (rows[0][0],))
            await writer.execute("UPDATE counter SET trimmed = ?", (rows[0][0],))

    @staticmethod
    async def _record(connection: aiosqlite.Connection, kind: type[Resource], key: Key) -> Record | None:
        rows = list(await connection.execute_fetchall(_ONE, (kind.KIND, *key)))
        return Record(_mapping(rows[0][0]), _to_owners(rows[0][1])) if rows else None

    @staticmethod
    async def _version(connection: aiosqlite.Connection) -> int:
        rows = list(await connection.execute_fetchall("SELECT version FROM counter"))
        return int(rows[0][0])


def _mapping(text: str) -> Mapping[str, Any]:
    document: Mapping[str, Any] = json.loads(text)
    return document


def _from_owners(owners: Owners) -> str:
    return json.dumps([[owner.manager, owner.operation, sorted(paths)] for owner, paths in owners.items()], ensure_ascii=False)


def _to_owners(text: str) -> Owners:
    return {
        Owner(manager, Operation(operation)): frozenset(tuple(path) for path in paths)
        for manager, operation, paths in json.loads(text)
    }
