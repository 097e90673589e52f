"""Reads a request's body up to a limit."""

from __future__ import annotations

from aiohttp import web

from .errors import ApiError

MIB = 1 << 20


async def read_body(request: web.Request, limit: int) -> bytes:
    """The whole body. Raises ApiError 413 when it is longer than `limit` bytes, declared or, after decompression, real."""
    if (request.content_length or 0) > limit:
        raise _too_large(limit)
    parts: list[bytes] = []
    size = 0
    while True:
        part = await request.content.readany()
        if not part:
            return parts[0] if len(parts) == 1 else b"".join(parts)
        size += len(part)
        if size > limit:
            raise _too_large(limit)
        parts.append(part)


def _too_large(limit: int) -> ApiError:
    shown = f"{limit // MIB} MiB" if limit >= MIB else f"{limit} bytes"
    return ApiError(413, f"the request is larger than {shown}", code="request_too_large")
