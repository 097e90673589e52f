"""Inspects a model on a web server: reads its header by range requests and leaves the weights where they are."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

import aiohttp
from yarl import URL

from .core.errors import BadModel, ModelNotAvailable, UnsupportedSource
from .core.gguf import GGUFError, Header, HeaderParser
from .core.identity import normal_sha256, remote_digest, sha256_digest
from .core.shape import split_files
from .core.source import HttpsSource, Source, parse_source
from .https import DEFAULT_TIMEOUTS, RANGE_NOT_SATISFIABLE, RemoteFile, Timeouts, get, range_start, remote_file, shown
from .inspected import MAX_RESOLVED_LENGTH, Inspected, check_complete, usable_shape

FIRST_CHUNK_BYTES = 1 << 20
MAX_CHUNK_BYTES = 8 << 20
INSPECT_SECONDS = 90.0
"""For the whole inspection; a header is 10 MiB at most."""
NOT_YET = "sources are not in this version yet: use https: or file:"


@dataclass(slots=True)
class _Reading:
    """A header on its way."""

    target: URL
    parser: HeaderParser = field(default_factory=HeaderParser)
    position: int = 0
    file: RemoteFile | None = None
    content_type: str = ""


async def inspect_https(
    session: aiohttp.ClientSession, url: str, *, sha256: str | None = None, timeouts: Timeouts = DEFAULT_TIMEOUTS
) -> Inspected:
    """Header, shape and identity of the GGUF at `url`. Raises ModelError.

    The digest is the `sha256` that was stated (nothing is downloaded to check it), else it is made of ETag and size, else of URL,
    size and Last-Modified.
    """
    found, _ = await inspect_remote(session, remote_source(url), sha256=sha256, timeouts=timeouts)
    return found


async def inspect_remote(
    session: aiohttp.ClientSession, source: HttpsSource, *, sha256: str | None = None, timeouts: Timeouts = DEFAULT_TIMEOUTS
) -> tuple[Inspected, RemoteFile]:
    """The same, with what the server says of the file, by which a download can tell that it is still the same one."""
    url = source.url
    stated = normal_sha256(sha256)
    reading = _Reading(URL(url))
    try:
        async with asyncio.timeout(INSPECT_SECONDS):
            while reading.parser.header is None and await _read_on(session, reading, timeouts):
                pass
        header = reading.parser.close()
    except TimeoutError:
        raise ModelNotAvailable(f"{shown(url)}: its header took more than {INSPECT_SECONDS:g} s", retryable=True) from None
    except GGUFError as error:
        hint = f" (the server sent {reading.content_type})" if reading.content_type.startswith("text/") else ""
        raise BadModel(f"{shown(url)}: {error}{hint}") from error
    return _inspected(source, stated, reading, header), reading.file or RemoteFile(0, "", "")


def remote_source(source: Source | str) -> HttpsSource:
    """The source if it is on a web server; raises UnsupportedSource for the others."""
    parsed = parse_source(source) if isinstance(source, str) else source
    if isinstance(parsed, HttpsSource):
        return parsed
    scheme = str(parsed).partition(":")[0]
    if scheme in ("hf", "s3"):
        raise UnsupportedSource(f"{scheme}: {NOT_YET}")
    raise UnsupportedSource(f"{scheme}: names nothing on a web server")


async def _read_on(session: aiohttp.ClientSession, reading: _Reading, timeouts: Timeouts) -> bool:
    """Reads the next piece into the parser. False when there is nothing more to read."""
    length = max(reading.parser.wanted, min(max(reading.position, FIRST_CHUNK_BYTES), MAX_CHUNK_BYTES))
    span = {"Range": f"bytes={reading.position}-{reading.position + length - 1}"}
    async with get(session, reading.target, span, timeouts) as response:
        reading.target = response.url
        if response.status == RANGE_NOT_SATISFIABLE:
            return False
        file = remote_file(response)
        if reading.file is not None and file != reading.file:
            raise ModelNotAvailable(f"{shown(reading.target)}: the file changed while its header was read", retryable=True)
        reading.file, reading.content_type = file, response.content_type
        start = range_start(response)
        if start == 0 and reading.position:
            # The server has stopped honouring ranges: from the beginning, then.
            reading.parser, reading.position = HeaderParser(), 0
        if start != reading.position:
            raise ModelNotAvailable(f"{shown(reading.target)}: the server answers another range than it was asked for")
        before = reading.position
        async for data in response.content.iter_any():
            reading.position += len(data)
            if reading.parser.feed(data) is not None:
                return False
        at_end = response.status == 200 or (file.size_bytes and reading.position >= file.size_bytes)
        return not at_end and reading.position > before


def _inspected(source: HttpsSource, stated: str, reading: _Reading, header: Header) -> Inspected:
    where = shown(source.url)
    file = reading.file or RemoteFile(0, "", "")
    size = file.size_bytes or header.required_size
    check_complete(where, header, size)
    if (parts := split_files(header)) > 1:
        raise BadModel(f"{where}: one of {parts} parts of a split model; join them with llama-gguf-split --merge")
    identity = remote_digest(url=source.url, size_bytes=size, etag=file.etag, last_modified=file.last_modified)
    final = source.url if reading.target == URL(source.url) else shown(reading.target)
    return Inspected(
        resolved=final if len(final) <= MAX_RESOLVED_LENGTH else source.url,
        digest=sha256_digest(stated) if stated else identity,
        size_bytes=size,
        header=header,
        shape=usable_shape(where, header),
    )
