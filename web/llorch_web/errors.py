"""Errors as OpenAI's clients read them: `{"error": {"message", "type", "param", "code"}}`, and the middleware that makes them."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import msgspec
from aiohttp import web
from aiohttp.typedefs import Handler

log = logging.getLogger("llorch.web")

_ENCODER = msgspec.json.Encoder()
_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "invalid_request_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
    503: "unavailable_error",
    504: "timeout_error",
}
_CODES = {404: "not_found", 405: "method_not_allowed", 413: "request_too_large"}


class ApiError(Exception):
    """An answer other than success. Handlers raise it; `error_middleware` turns it into a response."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None,
        type: str | None = None,  # noqa: A002 - the field's name in the envelope
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        """`code` is one word for programs; `extra` are further fields of the error object."""
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.type = type or _TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
        self.param = param
        self.headers = dict(headers or {})
        self.extra = dict(extra or {})

    def body(self) -> bytes:
        """The envelope as JSON."""
        error = {"message": self.message, "type": self.type, "param": self.param, "code": self.code, **self.extra}
        return _ENCODER.encode({"error": error})

    def response(self) -> web.Response:
        """The envelope as a response."""
        return web.Response(status=self.status, body=self.body(), content_type="application/json", headers=self.headers)


@web.middleware
async def error_middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Every failure becomes an envelope. What no handler expected is a 500, logged with its traceback."""
    try:
        return await handler(request)
    except ApiError as error:
        return error.response()
    except web.HTTPException as error:
        if error.status < 400:
            raise
        headers = {"Allow": error.headers["Allow"]} if "Allow" in error.headers else {}
        message = f"{request.method} {request.path}: {error.reason}"
        return ApiError(error.status, message, code=_CODES.get(error.status), headers=headers).response()
    except ConnectionError:
        if request.transport is not None and not request.transport.is_closing():
            raise
        return web.Response(status=499)  # the client left: nobody reads this, and aiohttp would log what is raised
    except Exception:
        log.exception("%s %s failed", request.method, request.path)
        return ApiError(
            500, "internal error; the log has it under this answer's X-Correlation-Id", code="internal_error"
        ).response()
