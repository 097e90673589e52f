"""Inspects a model wherever its source says it is."""

from __future__ import annotations

from contextlib import nullcontext

import aiohttp

from .access import DEFAULT_ACCESS, SourceAccess
from .core.source import FileSource, Source, parse_source
from .inspected import Inspected
from .local import inspect_file
from .locate import locate
from .remote import inspect_remote


async def inspect_model(
    source: Source | str,
    *,
    sha256: str | None = None,
    session: aiohttp.ClientSession | None = None,
    access: SourceAccess = DEFAULT_ACCESS,
) -> Inspected:
    """Header, shape and identity. `file:` is read here, the whole of it where a sha256 is stated. Raises ModelError."""
    parsed = parse_source(source) if isinstance(source, str) else source
    if isinstance(parsed, FileSource):
        return await inspect_file(parsed.path, sha256=sha256)
    remote = await locate(parsed, access)
    async with access.session() if session is None else nullcontext(session) as used:
        found, _ = await inspect_remote(used, remote, sha256=sha256)
        return found
