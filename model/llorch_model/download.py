"""Downloads one file into a `.partial`, and goes on where it was cut, in this process or the next."""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import os
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import ParamSpec, TypeVar

import aiohttp

from .core.errors import DigestMismatch, ModelError, ModelNotAvailable
from .https import RANGE_NOT_SATISFIABLE, RemoteFile, Target, Timeouts, get, range_start, remote_file
from .model_directory import no_disk
from .progress import Progress

P = ParamSpec("P")
T = TypeVar("T")

FLUSH_BYTES = 4 << 20
HASH_READ_BYTES = 1 << 20
ENOUGH_PROGRESS_BYTES = 1 << 20
"""An attempt that brought this much was no failure: a link that breaks every gigabyte still brings the whole file."""
LOCK_POLL_SECONDS = 0.5


@dataclass(frozen=True, slots=True)
class FetchSettings:
    """How stubborn a download is."""

    attempts: int = 6
    """In a row without progress, then it is given up."""
    backoff_seconds: float = 0.5
    """First wait at most; doubles with every failure, drawn at random from 0 to that (full jitter)."""
    max_backoff_seconds: float = 30.0
    headroom_mib: int = 512
    """Disk that must stay free."""
    timeouts: Timeouts = field(default_factory=Timeouts)

    def delay(self, failures: int, rng: random.Random) -> float:
        """Seconds to wait after that many failures in a row."""
        return rng.uniform(0, min(self.max_backoff_seconds, self.backoff_seconds * 2 ** (failures - 1)))


class Partial:
    """The file while it is incomplete, and its running sha256 where one is expected. Its methods block.

    Whoever has it open holds a lock on it, so that two processes with one directory do not write the same file.
    """

    def __init__(self, path: Path, descriptor: int, *, hashed: bool) -> None:
        self.path = path
        self.size = os.fstat(descriptor).st_size
        self.found_bytes = self.size
        """What an earlier process left; set to 0 once it is thrown away."""
        self._descriptor = descriptor
        self._hash = hashlib.sha256() if hashed else None
        self._hashed_bytes = 0

    @property
    def descriptor(self) -> int:
        """For fsync and locks."""
        return self._descriptor

    def append(self, data: bytes) -> None:
        """Writes at the end. Raises NoDisk."""
        try:
            view = memoryview(data)
            while view:
                view = view[os.pwrite(self._descriptor, view, self.size + len(data) - len(view)) :]
        except OSError as error:
            raise no_disk(self.path.parent, error) from error
        if self._hash is not None and self._hashed_bytes == self.size:
            self._hash.update(data)
            self._hashed_bytes += len(data)
        self.size += len(data)

    def clear(self) -> None:
        """Throws away what is there."""
        os.ftruncate(self._descriptor, 0)
        self.size = self.found_bytes = self._hashed_bytes = 0
        if self._hash is not None:
            self._hash = hashlib.sha256()

    def catch_up(self, limit: int) -> bool:
        """Hashes up to `limit` bytes of what an earlier process left. False when there is nothing more to hash."""
        if self._hash is None or self._hashed_bytes >= self.size:
            return False
        end = min(self.size, self._hashed_bytes + limit)
        try:
            while self._hashed_bytes < end:
                data = os.pread(self._descriptor, HASH_READ_BYTES, self._hashed_bytes)
                if not data:
                    self.size = self._hashed_bytes
                    break
                self._hash.update(data)
                self._hashed_bytes += len(data)
        except OSError as error:
            raise no_disk(self.path.parent, error) from error
        return True

    def sha256(self) -> str:
        """Of all of it, after `catch_up`; empty where none is kept."""
        return self._hash.hexdigest() if self._hash is not None else ""


@asynccontextmanager
async def open_partial(path: Path, *, hashed: bool) -> AsyncIterator[Partial]:
    """Opens or creates the partial file and waits until no other process writes it. Raises NoDisk."""
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        except OSError as error:
            raise no_disk(path.parent, error) from error
        try:
            while not _lock(descriptor):  # noqa: ASYNC110
                await asyncio.sleep(LOCK_POLL_SECONDS)  # no event tells when another process lets go
            if _is_still(path, descriptor):
                yield Partial(path, descriptor, hashed=hashed)
                return
            # The other process finished, or gave the file up, while we waited.
        finally:
            os.close(descriptor)


async def download(
    session: aiohttp.ClientSession,
    target: Target,
    expected: RemoteFile,
    partial: Partial,
    *,
    sha256: str,
    settings: FetchSettings,
    progress: Progress,
    rng: random.Random,
) -> None:
    """Completes `partial`, syncs it and verifies its sha256 where one is expected.

    Raises ModelError; what was received stays for the next call, unless it turned out wrong (DigestMismatch).
    """
    while await in_thread(partial.catch_up, FLUSH_BYTES * 4):
        pass
    failures = 0
    while not (expected.size_bytes and partial.size == expected.size_bytes):
        before = partial.size
        try:
            if await _attempt(session, target, expected, partial, settings.timeouts, progress, bool(sha256)):
                break
            raise ModelNotAvailable(f"{target.name}: the file ended early", retryable=True)
        except ModelError as error:
            if not error.retryable:
                raise
            failures = 1 if partial.size - before >= ENOUGH_PROGRESS_BYTES else failures + 1
            if failures >= settings.attempts:
                raise ModelNotAvailable(f"{error.message} (given up after {failures} attempts)", retryable=True) from error
            await asyncio.sleep(max(error.retry_after or 0.0, settings.delay(failures, rng)))
    if sha256 and partial.sha256() != sha256:
        resumed, actual = bool(partial.found_bytes), partial.sha256()
        await in_thread(partial.clear)
        if resumed:
            # The part that an earlier process left may be of an older file: once more, from the beginning.
            await download(session, target, expected, partial, sha256=sha256, settings=settings, progress=progress, rng=rng)
            return
        raise DigestMismatch(f"{target.name}: sha256 is {actual}, expected {sha256}")
    try:
        await in_thread(os.fsync, partial.descriptor)
    except OSError as error:
        raise no_disk(partial.path.parent, error) from error


async def _attempt(
    session: aiohttp.ClientSession,
    target: Target,
    expected: RemoteFile,
    partial: Partial,
    timeouts: Timeouts,
    progress: Progress,
    verified: bool,
) -> bool:
    """One request for what is missing. True when the file is complete."""
    if partial.size > expected.size_bytes > 0 or (partial.size and not expected.validator and not verified):
        # Too long, or nothing would tell whether the rest belongs to it.
        await in_thread(partial.clear)
    headers = {}
    if partial.size:
        headers["Range"] = f"bytes={partial.size}-"
        if expected.validator:
            headers["If-Range"] = expected.validator
    async with get(session, target, headers, timeouts) as response:
        if response.status == RANGE_NOT_SATISFIABLE:
            await in_thread(partial.clear)
            return False
        _check_same(target, expected, remote_file(response), verified)
        start = range_start(response)
        if start != partial.size:
            if start != 0:
                raise ModelNotAvailable(f"{target.name}: the server answers another range than it was asked for")
            await in_thread(partial.clear)
        await _receive(response, target, expected.size_bytes, partial, progress)
    return partial.size == expected.size_bytes if expected.size_bytes else True


async def _receive(
    response: aiohttp.ClientResponse, target: Target, size_bytes: int, partial: Partial, progress: Progress
) -> None:
    buffer = bytearray()

    async def flush() -> None:
        data = bytes(buffer)
        buffer.clear()
        await in_thread(partial.append, data)
        progress(partial.size, size_bytes or partial.size)

    progress(partial.size, size_bytes)
    try:
        async for data in response.content.iter_any():
            buffer += data
            if size_bytes and partial.size + len(buffer) > size_bytes:
                buffer.clear()
                raise ModelNotAvailable(f"{target.name}: the server sends more than the {size_bytes:,} bytes it announced")
            if len(buffer) >= FLUSH_BYTES:
                await flush()
    finally:
        if buffer:
            await flush()


def _check_same(target: Target, expected: RemoteFile, found: RemoteFile, verified: bool) -> None:
    """Raises when the file is not the one that was inspected. With a sha256 to come, mirrors may differ in their ETags."""
    if expected.size_bytes and found.size_bytes and expected.size_bytes != found.size_bytes:
        sizes = f"it had {expected.size_bytes:,} bytes, it has {found.size_bytes:,}"
        raise DigestMismatch(f"{target.name}: the file changed while it was fetched: {sizes}")
    if not verified and expected.etag and found.etag and expected.etag != found.etag:
        etags = f"its ETag was {expected.etag}, it is {found.etag}"
        raise DigestMismatch(f"{target.name}: the file changed while it was fetched: {etags}"[:400])


def _lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_still(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


async def in_thread(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Like asyncio.to_thread, but a cancelled caller leaves only when the function has ended: it works on an open file."""
    task = asyncio.ensure_future(asyncio.to_thread(function, *args, **kwargs))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task])
        raise
