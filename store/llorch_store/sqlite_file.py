"""Opens the home profile's database file, makes it where there is none, and says in one line why it cannot."""

from __future__ import annotations

import asyncio
import errno
import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import aiosqlite

from .contract import StoreError, Unavailable

APPLICATION_ID = 0x6C6C6F72
"""`llor`: tells our file from another program's."""
SCHEMA_VERSION = 1
BUSY_SECONDS = 5.0
"""How long a statement waits for another process's write."""

_SCHEMA = (
    """CREATE TABLE objects (
        kind TEXT, namespace TEXT, name TEXT, version INTEGER NOT NULL, document TEXT NOT NULL, owners TEXT NOT NULL,
        PRIMARY KEY (kind, namespace, name)) WITHOUT ROWID""",
    "CREATE INDEX objects_by_version ON objects (kind, version)",
    # The deletions and the objects' own versions are together the log that watchers follow.
    "CREATE TABLE deletions (version INTEGER PRIMARY KEY, kind TEXT NOT NULL, namespace TEXT NOT NULL, name TEXT NOT NULL)",
    "CREATE TABLE counter (version INTEGER NOT NULL, trimmed INTEGER NOT NULL)",
    "INSERT INTO counter VALUES (0, 0)",
    f"PRAGMA application_id = {APPLICATION_ID}",
    f"PRAGMA user_version = {SCHEMA_VERSION}",
)


async def opened(path: Path) -> aiosqlite.Connection:
    """A connection to the file at `path`, made with its directory where it does not exist. Raises StoreError."""
    try:
        _require_writable(path)
    except OSError as error:
        raise StoreError(f"{path}: cannot be opened for writing: {error.strerror}") from None
    with translated(path):
        connection = await aiosqlite.connect(path, isolation_level=None, timeout=BUSY_SECONDS)
        try:
            await _prepare(connection, path)
        except BaseException:
            await connection.close()
            raise
        return connection


def _require_writable(path: Path) -> None:
    """Makes the file. Raises OSError with the reason, where SQLite would only say that it is unable to open it.

    A file that exists is not opened: closing it would drop the locks of every connection that this process has to it
    (POSIX locks are per process), and another process would take the write-ahead log for abandoned and delete it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644))
    except FileExistsError:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR)) from None
        if not os.access(path, os.R_OK | os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES)) from None


async def _prepare(connection: aiosqlite.Connection, path: Path) -> None:
    if await _is_empty(connection, path):
        await _to_write_ahead_log(connection)
        await connection.execute("BEGIN IMMEDIATE")
        if await _is_empty(connection, path):  # another process may have been first
            for statement in _SCHEMA:
                await connection.execute(statement)
        await connection.commit()
    else:
        await _to_write_ahead_log(connection)


async def _is_empty(connection: aiosqlite.Connection, path: Path) -> bool:
    """True for a file without tables. Raises StoreError for a file that is not ours."""
    if not await _scalar(connection, "SELECT count(*) FROM sqlite_master"):
        return True
    if await _scalar(connection, "PRAGMA application_id") != APPLICATION_ID:
        raise StoreError(f"{path}: is the database of another program")
    if (version := await _scalar(connection, "PRAGMA user_version")) != SCHEMA_VERSION:
        raise StoreError(f"{path}: has format {version}, this version of llorch reads {SCHEMA_VERSION}")
    return False


async def _to_write_ahead_log(connection: aiosqlite.Connection) -> None:
    # Changing the mode needs the file alone, and does not wait for others by itself.
    async with asyncio.timeout(BUSY_SECONDS):
        while True:
            try:
                await connection.execute("PRAGMA journal_mode = WAL")
            except sqlite3.OperationalError as error:
                if not _busy(error):
                    raise
                await asyncio.sleep(0.02)
            else:
                return


async def _scalar(connection: aiosqlite.Connection, statement: str) -> int:
    rows = list(await connection.execute_fetchall(statement))
    return int(rows[0][0])


def _busy(error: sqlite3.Error) -> bool:
    return error.sqlite_errorname.startswith(("SQLITE_BUSY", "SQLITE_LOCKED"))


@contextmanager
def translated(path: Path) -> Iterator[None]:
    """Turns SQLite's errors into the contract's, with the file's name."""
    try:
        yield
    except sqlite3.Error as error:
        # Errors of the Python module itself carry no code.
        code = getattr(error, "sqlite_errorname", "")
        if code.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")):
            raise Unavailable(f"{path}: another process has been writing for {BUSY_SECONDS:.0f} s") from error
        if code.startswith("SQLITE_NOTADB"):
            raise StoreError(f"{path}: is not an SQLite database") from None
        if code.startswith("SQLITE_CORRUPT"):
            raise StoreError(f"{path}: is damaged: {error}") from error
        if code.startswith(("SQLITE_READONLY", "SQLITE_CANTOPEN", "SQLITE_PERM")):
            raise StoreError(f"{path}: cannot be written: {error}") from error
        raise Unavailable(f"{path}: {error}") from error
    except TimeoutError:
        raise Unavailable(f"{path}: another process has been holding it for {BUSY_SECONDS:.0f} s") from None
