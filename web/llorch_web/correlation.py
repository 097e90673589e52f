"""The correlation id of a request: taken from X-Correlation-Id or made up, echoed in the answer and in every log line."""

from __future__ import annotations

import re
import uuid
from contextvars import ContextVar

from aiohttp import web
from aiohttp.typedefs import Handler

HEADER = "X-Correlation-Id"
_ALLOWED = re.compile(r"[a-zA-Z0-9-]{1,64}")

correlation_id: ContextVar[str] = ContextVar("correlation_id", default="")
"""Of the request that the current task works for; empty outside one."""


@web.middleware
async def correlation_middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Gives every request an id. One that was sent is kept when it is 1 to 64 letters, digits or hyphens."""
    sent = request.headers.get(HEADER, "")
    correlation_id.set(sent if _ALLOWED.fullmatch(sent) else str(uuid.uuid4()))
    return await handler(request)


async def echo_correlation(_: web.Request, response: web.StreamResponse) -> None:
    """For `on_response_prepare`: streams send their headers long before the handler returns."""
    if value := correlation_id.get():
        response.headers[HEADER] = value
