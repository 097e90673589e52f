"""Errors of an engine in OpenAI's form."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import msgspec

_DECODER = msgspec.json.Decoder(dict[str, Any])
_LONGEST = 1000


@dataclass(frozen=True, slots=True)
class EngineError:
    """What the client is told."""

    status: int
    message: str
    code: str
    type: str | None = None
    """None for what the status says by itself."""
    extra: dict[str, Any] = field(default_factory=dict)


def engine_error(status: int, body: bytes) -> EngineError:
    """The error of an answer with `status`, or of an event within a stream (then `status` is 200).

    llama-server says `{"error": {"code": <status>, "message", "type"}}`, other servers nearly so.
    """
    try:
        error = _DECODER.decode(body)["error"]
        if isinstance(error, str):
            error = {"message": error}
        message, kind, code = str(error.get("message") or ""), error.get("type"), error.get("code")
    except (msgspec.DecodeError, UnicodeDecodeError, KeyError, AttributeError):
        error, message, kind, code = {}, body[:_LONGEST].decode(errors="replace").strip(), None, None
    if status < 400:
        status = code if isinstance(code, int) and 400 <= code < 600 else 500
    message = message[:_LONGEST] or f"the engine answered {status}"
    if kind == "exceed_context_size_error":
        sizes = {key: error[key] for key in ("n_prompt_tokens", "n_ctx") if isinstance(error.get(key), int)}
        return EngineError(400, message, "context_length_exceeded", "invalid_request_error", sizes)
    if status in (401, 403):
        return EngineError(502, f"the engine refused the agent: {message}", "engine_failed")
    if status == 429:
        return EngineError(429, message, "no_slot")
    if status == 503:
        return EngineError(503, message, "not_ready")
    if status < 500:
        return EngineError(status, message, code if isinstance(code, str) else str(kind or "invalid_request"))
    return EngineError(status, message, str(kind or "engine_error"))
