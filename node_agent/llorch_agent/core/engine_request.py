"""What the front door changes in a request before the engine gets it: the body is read once and only named fields are touched."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import msgspec


class Kind(StrEnum):
    """What is asked for; the value is the path below /v1."""

    CHAT = "chat/completions"
    COMPLETION = "completions"
    EMBEDDINGS = "embeddings"


class BadRequest(ValueError):
    """A body that no engine is asked with. `param` is the field at fault."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """A request as the engine gets it, and what its answer must look like."""

    payload: bytes
    """JSON for the engine."""
    model: str
    """The name the client asked for; empty where it named none."""
    stream: bool
    """Whether the client wants events."""
    include_usage: bool
    """Whether the client wants the usage chunk of a stream."""
    width: int
    """Slots of the engine that it keeps busy at once."""


Fields = dict[str, msgspec.Raw]

_FIELDS = msgspec.json.Decoder(Fields)
_ANY = msgspec.json.Decoder()
_ENCODER = msgspec.json.Encoder()
_TRUE = msgspec.Raw(b"true")
_MAX_WIDTH = 256
_ARRAY = re.compile(rb"\s*\[\s*(.)", re.DOTALL)
"""The beginning of an array, and of its first element."""


def generation(body: bytes, kind: Kind) -> EngineRequest:
    """A chat or text completion. The engine always streams, with progress while it reads the prompt. Raises BadRequest.

    A client that leaves an engine which does not stream is noticed by nobody, and one that leaves during the prompt only
    between two messages.
    """
    fields = _read(body)
    stream = _boolean(fields, "stream")
    options = _object(fields, "stream_options")
    fields["stream"] = fields["return_progress"] = _TRUE
    fields["stream_options"] = msgspec.Raw(_ENCODER.encode({**options, "include_usage": True}))
    choices = max(_count(fields, "n"), _count(fields, "n_cmpl"))
    prompts = _prompts(fields) if kind is Kind.COMPLETION else 1
    if choices > 1 and prompts > 1:
        raise BadRequest("several prompts with n above 1 are not supported; send one request per prompt", "n")
    return EngineRequest(
        payload=_ENCODER.encode(fields),
        model=_text(fields, "model"),
        stream=stream,
        include_usage=options.get("include_usage") is True,
        width=max(choices, prompts),
    )


@dataclass(frozen=True, slots=True)
class EmbeddingsRequest:
    """A request for embeddings, which an engine computes one input per slot."""

    fields: Fields
    inputs: tuple[msgspec.Raw, ...]
    """Several inputs; empty where the request has one, which is sent as it is."""
    body: bytes
    model: str

    @property
    def width(self) -> int:
        """Slots that it could keep busy."""
        return max(1, len(self.inputs))

    def batch(self, start: int, size: int) -> bytes:
        """The request for `size` of its inputs from `start` on."""
        if not self.inputs:
            return self.body
        inputs = b",".join(bytes(each) for each in self.inputs[start : start + size])
        return _ENCODER.encode({**self.fields, "input": msgspec.Raw(b"[" + inputs + b"]")})


def embeddings(body: bytes) -> EmbeddingsRequest:
    """A request for embeddings. Raises BadRequest."""
    fields = _read(body)
    if "input" not in fields:
        raise BadRequest("'input' is missing", "input")
    inputs: tuple[msgspec.Raw, ...] = ()
    value = fields["input"]
    if bytes(value).lstrip()[:1] == b"[":
        parts = msgspec.json.decode(value, type=tuple[msgspec.Raw, ...])
        several = len(parts) > 1 and all(bytes(part).lstrip()[:1] in (b'"', b"[", b"{") for part in parts)
        inputs = parts if several else ()  # numbers, or numbers among strings, are the tokens of one input
    return EmbeddingsRequest(fields, inputs, body, _text(fields, "model"))


def _read(body: bytes) -> Fields:
    try:
        return _FIELDS.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise BadRequest(f"the body is not a JSON object: {error}") from None


def _value(fields: Fields, name: str) -> Any:
    raw = fields.get(name)
    try:
        return None if raw is None else _ANY.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise BadRequest(f"{name!r} is not JSON: {error}", name) from None


def _boolean(fields: Fields, name: str) -> bool:
    value = _value(fields, name)
    if value is not None and not isinstance(value, bool):
        raise BadRequest(f"{name!r} must be true or false", name)
    return value is True


def _text(fields: Fields, name: str) -> str:
    value = _value(fields, name)
    if value is not None and not isinstance(value, str):
        raise BadRequest(f"{name!r} must be a string", name)
    return value or ""


def _object(fields: Fields, name: str) -> dict[str, Any]:
    value = _value(fields, name)
    if value is not None and not isinstance(value, dict):
        raise BadRequest(f"{name!r} must be an object", name)
    return value or {}


def _count(fields: Fields, name: str) -> int:
    value = _value(fields, name)
    if value is None:
        return 1
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= _MAX_WIDTH:
        raise BadRequest(f"{name!r} must be a whole number from 1 to {_MAX_WIDTH}", name)
    return value


def _prompts(fields: Fields) -> int:
    """How many prompts a completion has: an array of strings or of arrays is several, one with numbers in it is one."""
    raw = fields.get("prompt")
    if raw is None or not (match := _ARRAY.match(memoryview(raw))):
        return 1
    if match[1] in b"-0123456789":
        return 1  # tokens, perhaps a million of them: looking at each would hold up everybody else's streams
    value = _value(fields, "prompt")
    if any(isinstance(each, int) for each in value):
        return 1
    if len(value) > _MAX_WIDTH:
        raise BadRequest(f"'prompt' holds {len(value)} prompts; {_MAX_WIDTH} is the most", "prompt")
    return max(1, len(value))
