"""What an API server's answer means: its HTTP status and `Status` body as one of the contract's errors."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from llorch_store.contract import Conflict, Forbidden, Invalid, NotFound, StoreError, Unavailable

_WIDTH = 500
"""Characters of a server's message that are passed on."""


class Expired(StoreError):
    """The version to watch from, or the list to go on with, is too old: list again."""


class Unauthenticated(Forbidden):
    """The server does not know these credentials; fresh ones may do."""


def error_of(status: int, body: bytes | str, *, retry_after: str | None = None) -> StoreError:
    """The error that an answer with `status` (400 and up) stands for. `retry_after` is its Retry-After header."""
    document = _status(body)
    message = _one_line(str(document.get("message") or body_text(body) or f"status {status}"))
    match status:
        case 400 | 413 | 422:
            return Invalid(message)
        case 401:
            return Unauthenticated(f"the API server does not accept these credentials: {message}")
        case 403:
            return Forbidden(message)
        case 404:
            return NotFound(message)
        case 409:
            return Conflict(message)
        case 410:
            return Expired(message)
        case 500 if message.startswith("failed to create typed patch object"):
            return Invalid(message)  # a field that the installed CustomResourceDefinition does not have
        case 408 | 429:
            return Unavailable(f"the API server answered {status}: {message}", retry_after=_seconds(retry_after, document))
        case _ if status >= 500:
            return Unavailable(f"the API server answered {status}: {message}", retry_after=_seconds(retry_after, document))
        case _:
            return StoreError(f"the API server answered {status}: {message}")


def body_text(body: bytes | str) -> str:
    """A body as text."""
    return body if isinstance(body, str) else body.decode(errors="replace")


def _status(body: bytes | str) -> Mapping[str, Any]:
    try:
        document = json.loads(body)
    except ValueError:
        return {}
    return document if isinstance(document, Mapping) and document.get("kind") == "Status" else {}


def _one_line(text: str) -> str:
    line = re.sub(r"[\x00-\x20\x7f]+", " ", text).strip()
    return line if len(line) <= _WIDTH else f"{line[: _WIDTH - 1]}…"


def _seconds(header: str | None, document: Mapping[str, Any]) -> float | None:
    details = document.get("details")
    told = header if header is not None else details.get("retryAfterSeconds") if isinstance(details, Mapping) else None
    try:
        # The API server sends seconds; a date, which proxies may send, is as good as nothing.
        return max(0.0, float(told)) if told else None
    except ValueError:
        return None
