"""Inspects a model on a server: reads its headers by range requests and leaves the weights where they are."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

import aiohttp
from yarl import URL

from .core.errors import BadModel, ModelNotAvailable
from .core.gguf import GGUFError, Header, HeaderParser
from .core.identity import normal_sha256, remote_digest, sha256_digest
from .core.source import HttpsSource, parse_source
from .core.split import joined, split_digest
from .https import (
    DEFAULT_TIMEOUTS,
    RANGE_NOT_SATISFIABLE,
    RemoteFile,
    Target,
    Timeouts,
    get,
    range_start,
    remote_file,
    shown,
)
from .inspected import MAX_RESOLVED_LENGTH, Inspected, check_complete, usable_shape
from .locate import Remote, RemotePart, locate

FIRST_CHUNK_BYTES = 1 << 20
MAX_CHUNK_BYTES = 8 << 20
INSPECT_SECONDS = 90.0
"""For the whole inspection of a file; a header is 10 MiB at most."""
PARTS_AT_ONCE = 4


@dataclass(slots=True)
class _Reading:
    """A header on its way."""

    target: Target
    at: URL
    """Where the last redirect led to."""
    parser: HeaderParser = field(default_factory=HeaderParser)
    position: int = 0
    file: RemoteFile | None = None
    content_type: str = ""
    header: Header | None = None

    @property
    def size_bytes(self) -> int:
        """As the server says, else as the header does."""
        told = self.file.size_bytes if self.file is not None else 0
        return told or (self.header.required_size if self.header is not None else 0)


async def inspect_https(
    session: aiohttp.ClientSession, url: str, *, sha256: str | None = None, timeouts: Timeouts = DEFAULT_TIMEOUTS
) -> Inspected:
    """Header, shape and identity of the GGUF at `url`. Raises ModelError."""
    found, _ = await inspect_remote(session, await locate(parse_source(url)), sha256=sha256, timeouts=timeouts)
    return found


async def inspect_remote(
    session: aiohttp.ClientSession, remote: Remote, *, sha256: str | None = None, timeouts: Timeouts = DEFAULT_TIMEOUTS
) -> tuple[Inspected, tuple[RemoteFile, ...]]:
    """Header, shape and identity, and what the servers say of each file, by which a download can tell that it is still the same.

    The digest is the `sha256` that was stated (nothing is downloaded to check it), else the one that the Hub's LFS tells, else it
    is made of ETag and size, else of URL, size and Last-Modified. That of a split model is made of those of its parts.
    """
    stated = normal_sha256(sha256)
    turn = asyncio.Semaphore(PARTS_AT_ONCE)

    async def read(part: RemotePart) -> _Reading:
        async with turn:
            return await _read(session, part.target, timeouts)

    readings = [await read(remote.parts[0])]
    _check_first(remote, readings[0])
    try:
        async with asyncio.TaskGroup() as group:
            others = [group.create_task(read(part)) for part in remote.parts[1:]]
    except ExceptionGroup as failed:
        raise failed.exceptions[0] from failed
    readings += [task.result() for task in others]
    return _inspected(remote, stated, readings), tuple(reading.file or RemoteFile(0, "", "") for reading in readings)


async def _read(session: aiohttp.ClientSession, target: Target, timeouts: Timeouts) -> _Reading:
    reading = _Reading(target, target.url)
    try:
        async with asyncio.timeout(INSPECT_SECONDS):
            while reading.parser.header is None and await _read_on(session, reading, timeouts):
                pass
        reading.header = reading.parser.close()
    except TimeoutError:
        raise ModelNotAvailable(f"{target.name}: its header took more than {INSPECT_SECONDS:g} s", retryable=True) from None
    except GGUFError as error:
        hint = f" (the server sent {reading.content_type})" if reading.content_type.startswith("text/") else ""
        raise BadModel(f"{target.name}: {error}{hint}") from error
    check_complete(target.name, reading.header, reading.size_bytes)
    return reading


async def _read_on(session: aiohttp.ClientSession, reading: _Reading, timeouts: Timeouts) -> bool:
    """Reads the next piece into the parser. False when there is nothing more to read."""
    length = max(reading.parser.wanted, min(max(reading.position, FIRST_CHUNK_BYTES), MAX_CHUNK_BYTES))
    span = {"Range": f"bytes={reading.position}-{reading.position + length - 1}"}
    async with get(session, reading.target, span, timeouts, reading.at) as response:
        reading.at = response.url
        if response.status == RANGE_NOT_SATISFIABLE:
            return False
        file = remote_file(response)
        if reading.file is not None and file != reading.file:
            raise ModelNotAvailable(f"{reading.target.name}: the file changed while its header was read", retryable=True)
        reading.file, reading.content_type = file, response.content_type
        start = range_start(response)
        if start == 0 and reading.position:
            # The server has stopped honouring ranges: from the beginning, then.
            reading.parser, reading.position = HeaderParser(), 0
        if start != reading.position:
            raise ModelNotAvailable(f"{reading.target.name}: the server answers another range than it was asked for")
        before = reading.position
        async for data in response.content.iter_any():
            reading.position += len(data)
            if reading.parser.feed(data) is not None:
                return False
        at_end = response.status == 200 or (file.size_bytes and reading.position >= file.size_bytes)
        return not at_end and reading.position > before


def _check_first(remote: Remote, reading: _Reading) -> None:
    """Before the other parts are asked for."""
    if len(remote.parts) == 1 and reading.header is not None:
        _joined(remote, [reading])


def _joined(remote: Remote, readings: list[_Reading]) -> Header:
    try:
        return joined([reading.header for reading in readings if reading.header is not None])
    except GGUFError as error:
        raise BadModel(f"{remote.name}: {error}") from error


def _inspected(remote: Remote, stated: str, readings: list[_Reading]) -> Inspected:
    header = _joined(remote, readings)
    size = sum(reading.size_bytes for reading in readings)
    digests = [_digest(part, reading) for part, reading in zip(remote.parts, readings, strict=True)]
    return Inspected(
        resolved=_resolved(remote, readings[0]),
        digest=sha256_digest(stated) if stated else split_digest(digests, size),
        size_bytes=size,
        header=header,
        shape=usable_shape(remote.name, header),
    )


def _digest(part: RemotePart, reading: _Reading) -> str:
    if part.sha256:
        return sha256_digest(part.sha256)
    file = reading.file or RemoteFile(0, "", "")
    url = str(part.target.url)
    return remote_digest(url=url, size_bytes=reading.size_bytes, etag=part.etag or file.etag, last_modified=file.last_modified)


def _resolved(remote: Remote, first: _Reading) -> str:
    """A source that brings the same content again: with the commit, or after redirects where those are not signed."""
    match remote.source:
        case HttpsSource(url):
            final = url if first.at == first.target.url else shown(first.at)
            return final if len(final) <= MAX_RESOLVED_LENGTH else url
        case other:
            return str(other)
