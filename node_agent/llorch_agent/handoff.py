"""The handoff directory: reads it, notices what changes in it, and writes to it."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import logging
import os
import secrets
import stat
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from watchdog.events import (
    DirDeletedEvent,
    DirMovedEvent,
    FileClosedEvent,
    FileCreatedEvent,
    FileDeletedEvent,
    FileModifiedEvent,
    FileMovedEvent,
    FileSystemEvent,
    FileSystemEventHandler,
)
from watchdog.observers import Observer
from watchdog.observers.api import BaseObserver

from .core.handoff import MAX_BYTES

log = logging.getLogger(__name__)

SETTLE_S: Final = 0.02
"""Pause after the first event, in which the events of one change arrive together."""

_UNSURE_S: Final = 2.0
"""A file changed so recently is read again even if its times and size look the same: clocks of file systems are coarse."""

_RETRY_S: Final = 60.0
"""Pause before inotify is tried again."""

_EVENTS: Final[list[type[FileSystemEvent]]] = [
    # Not FileOpenedEvent and FileClosedNoWriteEvent: our own reading would wake us.
    DirDeletedEvent,
    DirMovedEvent,
    FileClosedEvent,
    FileCreatedEvent,
    FileDeletedEvent,
    FileModifiedEvent,
    FileMovedEvent,
]


@dataclass(frozen=True, slots=True)
class Seen:
    """One `*.json` of the directory as read."""

    digest: str
    """Hash of the content, or of the reason why it was not read."""
    data: bytes
    refused: str = ""
    """Why it was not read."""


@dataclass(frozen=True, slots=True)
class _Read:
    signature: tuple[int, ...]
    seen: Seen


class HandoffDirectory:
    """Snapshots of the directory, and a wake-up when it may have changed.

    inotify makes changes known at once; a rescan each `interval_s` finds what inotify missed, and is all there is where
    inotify is not to be had (its limits are used up, or a file system without it).
    """

    def __init__(self, path: Path, interval_s: float = 1.0) -> None:
        self.path = path
        self._interval_s = interval_s
        self._reads: dict[str, _Read] = {}
        self._observer: BaseObserver | None = None
        self._watched: tuple[int, int] | None = None
        self._changed = asyncio.Event()
        self._warned = False
        self._next_try = 0.0

    @property
    def notified(self) -> bool:
        """True while inotify watches the directory; False means that changes are found by the rescan alone."""
        return self._observer is not None

    def scan(self) -> dict[str, Seen]:
        """Every `*.json` in the directory, by name. Makes the directory when it is missing."""
        self.path.mkdir(parents=True, exist_ok=True)
        self._watch()
        reads: dict[str, _Read] = {}
        with os.scandir(self.path) as entries:
            names = [entry.name for entry in entries if entry.name.endswith(".json") and not entry.name.startswith(".")]
        for name in names:
            read = self._read(name)
            if read is not None:
                reads[name] = read
        self._reads = reads
        return {name: read.seen for name, read in reads.items()}

    async def wait(self) -> None:
        """Returns when something changed, or after the interval."""
        try:
            async with asyncio.timeout(self._interval_s):
                await self._changed.wait()
        except TimeoutError:
            return
        await asyncio.sleep(SETTLE_S)
        self._changed.clear()

    def wake(self) -> None:
        """Ends the current `wait`, or the next one."""
        self._changed.set()

    def close(self) -> None:
        """Ends the watching."""
        if self._observer is not None:
            self._observer.stop()
            self._observer.join(timeout=1)
            self._observer = None
            self._watched = None

    def _read(self, name: str) -> _Read | None:
        path = self.path / name
        try:
            found = os.lstat(path)
            signature = (found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
            known = self._reads.get(name)
            if known is not None and known.signature == signature and abs(time.time() - found.st_ctime) > _UNSURE_S:
                return known
            if not stat.S_ISREG(found.st_mode):
                return _refuse(signature, "not a regular file; links are not followed")
            if found.st_size > MAX_BYTES:
                return _refuse(signature, f"larger than {MAX_BYTES // 1024} KiB")
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            with os.fdopen(descriptor, "rb") as file:
                data = file.read(MAX_BYTES + 1)
        except FileNotFoundError:
            return None
        except OSError as error:
            return _refuse((), f"cannot be read: {os.strerror(error.errno or 0)}")
        return _Read(signature, Seen(hashlib.sha256(data).hexdigest(), data))

    def _watch(self) -> None:
        found = os.stat(self.path)
        identity = (found.st_dev, found.st_ino)
        if self._observer is not None and self._observer.is_alive() and self._watched == identity:
            return
        if time.monotonic() < self._next_try:
            return
        self.close()
        observer = Observer()
        try:
            observer.schedule(
                _Waker(asyncio.get_running_loop(), str(self.path), self.wake, self._lost),
                str(self.path),
                recursive=False,
                event_filter=_EVENTS,
            )
            observer.start()
        except (OSError, RuntimeError) as error:
            self._next_try = time.monotonic() + _RETRY_S
            if not self._warned:
                self._warned = True
                log.warning(
                    "%s: inotify is not available (%s); changes are noticed every %.1f s",
                    self.path,
                    _short_reason(error),
                    self._interval_s,
                )
            return
        self._observer, self._watched = observer, identity

    def _lost(self) -> None:
        # Not to be seen from its inode, whose number the next directory may get.
        self._watched = None
        self.wake()


class _Waker(FileSystemEventHandler):
    """Runs on the observer's thread and only calls into the loop: `lost` when the directory itself went, else `wake`."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, directory: str, wake: Callable[[], None], lost: Callable[[], None]
    ) -> None:
        self._loop = loop
        self._directory = directory
        self._wake = wake
        self._lost = lost

    def on_any_event(self, event: FileSystemEvent) -> None:
        names = [os.fsdecode(path) for path in (event.src_path, event.dest_path) if path]
        if isinstance(event, DirDeletedEvent | DirMovedEvent) and names[0] == self._directory:
            call = self._lost
        elif any(name.endswith(".json") for name in names):
            call = self._wake
        else:
            return
        try:
            self._loop.call_soon_threadsafe(call)
        except RuntimeError:  # the loop has closed between the event and now
            return


def write_atomically(path: Path, data: bytes, mode: int = 0o644) -> None:
    """Writes `path` so that a reader sees the old content or the new one, also after a power cut."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def digests(seen: Mapping[str, Seen]) -> dict[str, str]:
    """{name: hash of the content}, as `core.handoff.diff` compares them."""
    return {name: each.digest for name, each in seen.items()}


def _refuse(signature: tuple[int, ...], reason: str) -> _Read:
    return _Read(signature, Seen(hashlib.sha256(reason.encode()).hexdigest(), b"", reason))


def _short_reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EMFILE):
        return "its limit is used up, see fs.inotify.max_user_watches and max_user_instances"
    return str(error)
