"""Log files of the engines: written by the engines themselves, kept small by the agent, read by people.

An engine holds its log open for appending and never opens it again, so the file is shortened under it. Copying and emptying it
would lose what is written in between; instead the oldest bytes are copied and then taken out in one step of the file system
(`fallocate`), which an append cannot fall into.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import os
import threading
from pathlib import Path
from typing import Final, NamedTuple

log = logging.getLogger(__name__)

MAX_LOG_BYTES: Final = 8 * 1024 * 1024
"""A log grows to about this size, and once more as `.log.1`."""
MAX_LINES: Final = 10_000
"""Lines that are read at once."""
KEPT_LOGS: Final = 32
"""Logs of replicas that are gone, the newest: ids are never used again, so nothing else removes them."""

_TAIL_BYTES: Final = 16 * 1024
_LONGEST_LINE: Final = 4096
"""Bytes by which it is guessed how far back a number of lines lies."""
_BLOCK: Final = 4096

_KEEP_SIZE, _PUNCH_HOLE, _COLLAPSE_RANGE = 1, 2, 8
"""Of linux/falloc.h."""


class Position(NamedTuple):
    """Where a reader of a log stands."""

    life: int
    """Which start of the engine."""
    offset: int
    """Bytes written in that life, those included that are in `.log.1` by now."""


class EngineLog:
    """The log of one replica. Rotation may run on another thread than reading."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._life = 0
        self._dropped = 0
        """Bytes of this life that the file does not hold any more."""
        self._rotated = False
        """The older file is of this life too."""
        self._lock = threading.Lock()

    @property
    def older(self) -> Path:
        """What was rotated last."""
        return self.path.with_name(self.path.name + ".1")

    def begin(self) -> None:
        """A new engine is about to write: what the one before wrote becomes the older file."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self._lock:
            if self.path.exists():
                os.replace(self.path, self.older)
            self._life, self._dropped, self._rotated = self._life + 1, 0, False

    def tail(self, lines: int = 60, most: int = _TAIL_BYTES) -> list[str]:
        """The last lines of this life, oldest first, of at most `most` bytes."""
        try:
            with self._lock, open(self.path, "rb") as file:
                size = file.seek(0, os.SEEK_END)
                file.seek(max(0, size - most, _first_byte(file.fileno(), size)))
                found = file.read()
                if self._rotated and len(found) < most:
                    found = _end_of(self.older, most - len(found)) + found
                return found.decode(errors="replace").splitlines()[-lines:]
        except FileNotFoundError:
            return []

    def last(self, lines: int) -> tuple[bytes, Position]:
        """The last `lines` lines, what was rotated included, and where `since` goes on. Raises FileNotFoundError."""
        most = min(2 * MAX_LOG_BYTES, lines * _LONGEST_LINE)
        with self._lock:
            with open(self.path, "rb") as file:
                size = file.seek(0, os.SEEK_END)
                file.seek(max(_first_byte(file.fileno(), size), size - most))
                newest = file.read(size - file.tell())
            if newest.count(b"\n") <= lines and len(newest) < most:
                newest = _end_of(self.older, most - len(newest)) + newest
            position = Position(self._life, self._dropped + size)
        ends = newest.endswith(b"\n")
        wanted = newest.split(b"\n")[-(lines + ends) :] if lines else []
        return b"\n".join(wanted), position

    def since(self, position: Position, most: int = 64 * 1024) -> tuple[bytes, Position]:
        """What was written after `position`, at most `most` bytes of it, and the next position."""
        with self._lock:
            life, offset = position
            if life != self._life:
                life, offset = self._life, 0
            try:
                with open(self.path, "rb") as file:
                    first = _first_byte(file.fileno(), file.seek(0, os.SEEK_END))
                    file.seek(max(first, offset - self._dropped))
                    start = self._dropped + file.tell()
                    found = file.read(most)
            except FileNotFoundError:
                return b"", Position(life, offset)
            return found, Position(life, start + len(found))

    def rotate(self) -> None:
        """Moves the oldest bytes to `.log.1` once the file is larger than MAX_LOG_BYTES. Takes milliseconds: not for the loop."""
        try:
            with open(self.path, "r+b") as file:
                size = file.seek(0, os.SEEK_END)
                first = _first_byte(file.fileno(), size)
                if size - first <= MAX_LOG_BYTES:
                    return
                cut = (size - 1) // _BLOCK * _BLOCK
                self._copy(file.fileno(), max(first, cut - MAX_LOG_BYTES), cut)
                with self._lock:
                    self._rotated = True
                    self._dropped += _take_out(file.fileno(), cut, self.older)
        except FileNotFoundError:
            return
        except OSError as error:
            log.warning("%s: cannot be rotated: %s", self.path, error.strerror)

    def _copy(self, source: int, start: int, end: int) -> None:
        temporary = self.older.with_name(self.older.name + ".new")
        with open(temporary, "wb") as target:
            while start < end and (sent := os.sendfile(target.fileno(), source, start, end - start)):
                start += sent
        os.replace(temporary, self.older)


class EngineLogs:
    """The logs of all replicas of a node, in one directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._logs: dict[str, EngineLog] = {}

    def begin(self, replica_id: str) -> EngineLog:
        """The log that a new engine of that replica writes. Logs of replicas long gone are removed."""
        found = self._logs.setdefault(replica_id, EngineLog(self._path(replica_id)))
        found.begin()
        self._prune()
        return found

    def get(self, replica_id: str) -> EngineLog | None:
        """The log of a replica that runs or is gone; None where it never had one here."""
        if replica_id in self._logs:
            return self._logs[replica_id]
        path = self._path(replica_id)
        return EngineLog(path) if path.parent == self.directory and path.is_file() else None

    def ended(self, replica_id: str) -> None:
        """The replica is gone. Its log stays for a while."""
        self._logs.pop(replica_id, None)

    def _path(self, replica_id: str) -> Path:
        return self.directory / f"{replica_id}.log"

    def _prune(self) -> None:
        try:
            logs = [entry for entry in os.scandir(self.directory) if entry.name.endswith(".log")]
            gone = [(entry.stat().st_mtime, entry.name) for entry in logs if entry.name[: -len(".log")] not in self._logs]
            for _, name in sorted(gone, reverse=True)[KEPT_LOGS:]:
                for path in (self.directory / name, self.directory / f"{name}.1"):
                    path.unlink(missing_ok=True)
        except OSError as error:
            log.warning("%s: old logs cannot be removed: %s", self.directory, error.strerror)


def _first_byte(descriptor: int, size: int) -> int:
    """Where the file begins to hold anything: a hole at its beginning is what rotation left on some file systems."""
    if size == 0:
        return 0
    try:
        return os.lseek(descriptor, 0, os.SEEK_DATA)
    except OSError as error:
        return size if error.errno == errno.ENXIO else 0


def _end_of(path: Path, most: int) -> bytes:
    try:
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - most))
            return file.read()
    except FileNotFoundError:
        return b""


def _take_out(descriptor: int, count: int, copied: Path) -> int:
    """Removes the first `count` bytes, a multiple of the block. Returns by how much what follows has moved towards the beginning.

    ext4 and xfs close the gap; btrfs, tmpfs and zfs leave a hole, which takes no room either. Where neither can be (old NFS) the
    rest is copied too and the file emptied: what an engine writes in the microseconds between is lost, and the disk is not full.
    """
    for mode, moved in ((_COLLAPSE_RANGE, count), (_PUNCH_HOLE | _KEEP_SIZE, 0)):
        if _fallocate(descriptor, mode, 0, count) == 0:
            return moved
    with open(copied, "ab") as target:
        while rest := os.pread(descriptor, 1 << 20, count):
            target.write(rest)
            count += len(rest)
    os.ftruncate(descriptor, 0)
    return count


_fallocate = ctypes.CDLL(None).fallocate
_fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
