"""What the front door makes of an engine's events: the stream a client asked for, or one whole answer."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import msgspec

from .engine_request import Kind

DONE = b"[DONE]"

_MODEL = re.compile(rb'"model":\s*("(?:[^"\\]|\\.)*")')
_NO_CHOICES = re.compile(rb'"choices":\s*\[\s*\]')
_PROGRESS = b'"prompt_progress"'
_ERROR = re.compile(rb'\s*\{\s*"error":')
_ENCODER = msgspec.json.Encoder()
_DECODER = msgspec.json.Decoder(dict[str, Any])


class BadEvent(ValueError):
    """The engine sent an event that is no chunk of an answer."""


def is_error(data: bytes) -> bool:
    """Whether an event reports an error instead of a chunk."""
    return _ERROR.match(data) is not None


class ModelName:
    """Puts the name that the client asked for where the engine says its own, without parsing the rest.

    Inside JSON strings a quote is escaped, so `"model":"` with bare quotes is a key, never generated text.
    """

    __slots__ = ("_new", "_old")

    def __init__(self, name: str) -> None:
        """An empty `name` leaves answers as they are."""
        self._old = b""
        self._new = b'"model":' + _ENCODER.encode(name) if name else b""

    def put(self, data: bytes) -> bytes:
        """`data` with the first model renamed."""
        if not self._new:
            return data
        if self._old and self._old in data:
            return data.replace(self._old, self._new, 1)
        match = _MODEL.search(data)
        if match is None:
            return data
        self._old = match[0]
        return data[: match.start()] + self._new + data[match.end() :]


class Chunks:
    """The chunks of a stream as the client should see them."""

    __slots__ = ("_keep_usage", "_model")

    def __init__(self, model: str, *, keep_usage: bool) -> None:
        self._model = ModelName(model)
        self._keep_usage = keep_usage

    def pass_on(self, data: bytes) -> bytes | None:
        """The data of an event for the client, or None where it is not for it: prompt progress, usage nobody asked for."""
        if _PROGRESS in data or (not self._keep_usage and _NO_CHOICES.search(data)):
            return None
        return self._model.put(data)


@dataclass(slots=True)
class _Choice:
    text: list[str] = field(default_factory=list)
    reasoning: list[str] = field(default_factory=list)
    role: str = "assistant"
    tools: dict[int, dict[str, Any]] = field(default_factory=dict)
    finish_reason: str | None = None
    logprobs: dict[str, Any] | None = None
    extra: dict[str, Any] = field(default_factory=dict)


class WholeAnswer:
    """Gathers the chunks of a stream into the answer that a client gets who did not ask for a stream."""

    def __init__(self, kind: Kind, model: str) -> None:
        self._chat = kind is Kind.CHAT
        self._model = model
        self._choices: dict[int, _Choice] = {}
        self._top: dict[str, Any] = {}

    @property
    def complete(self) -> bool:
        """True once every choice has ended."""
        return bool(self._choices) and all(choice.finish_reason is not None for choice in self._choices.values())

    def add(self, data: bytes) -> None:
        """One chunk. Raises BadEvent."""
        try:
            chunk = _DECODER.decode(data)
            if chunk.pop("prompt_progress", None) is not None:
                return
            for item in chunk.pop("choices", ()):
                choice = self._choices.setdefault(item.get("index", 0), _Choice())
                if self._chat:
                    _add_delta(choice, item["delta"])
                else:
                    choice.text.append(item.get("text") or "")
                choice.finish_reason = item.get("finish_reason") or choice.finish_reason
                if item.get("logprobs"):
                    choice.logprobs = _joined(choice.logprobs or {}, item["logprobs"])
        except (msgspec.DecodeError, UnicodeDecodeError, AttributeError, KeyError, TypeError) as error:
            raise BadEvent(f"{error}: {data[:200]!r}") from None
        self._top.update(chunk)

    def answer(self) -> bytes:
        """The answer as JSON."""
        top = {
            "id": self._top.pop("id", ""),
            "object": "chat.completion" if self._chat else "text_completion",
            "created": self._top.pop("created", 0),
            "model": self._model or self._top.get("model", ""),
            "choices": [self._shown(index, choice) for index, choice in sorted(self._choices.items())],
        }
        rest = {key: value for key, value in self._top.items() if key not in ("object", "model")}
        return _ENCODER.encode({**top, **rest})

    def _shown(self, index: int, choice: _Choice) -> dict[str, Any]:
        text = "".join(choice.text)
        shown: dict[str, Any] = {"index": index}
        if self._chat:
            tools = [tool for _, tool in sorted(choice.tools.items())]
            message: dict[str, Any] = {"role": choice.role, "content": text if text or not tools else None, **choice.extra}
            if choice.reasoning:
                message["reasoning_content"] = "".join(choice.reasoning)
            if tools:
                message["tool_calls"] = tools
            shown["message"] = message
        else:
            shown["text"] = text
        return {**shown, "logprobs": choice.logprobs, "finish_reason": choice.finish_reason}


def _add_delta(choice: _Choice, delta: dict[str, Any]) -> None:
    for key, value in delta.items():
        if value is None:
            continue
        if key == "content":
            choice.text.append(value)
        elif key == "reasoning_content":
            choice.reasoning.append(value)
        elif key == "role":
            choice.role = value
        elif key == "tool_calls":
            for call in value:
                _add_call(choice.tools.setdefault(call.get("index", 0), {}), call)
        else:
            before = choice.extra.get(key)
            choice.extra[key] = before + value if isinstance(before, str) and isinstance(value, str) else value


def _add_call(tool: dict[str, Any], call: dict[str, Any]) -> None:
    """Tool calls come in pieces: id, type and name once, the arguments bit by bit."""
    function = call.get("function") or {}
    known = tool.setdefault("function", {"name": "", "arguments": ""})
    for key in ("id", "type"):
        if call.get(key):
            tool[key] = call[key]
    known["name"] = function.get("name") or known["name"]
    known["arguments"] += function.get("arguments") or ""


def _joined(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """Log probabilities of two chunks: their lists one after the other."""
    joined = dict(before)
    for key, value in after.items():
        known = before.get(key)
        joined[key] = known + value if isinstance(known, list) and isinstance(value, list) else value
    return joined


class WholeEmbeddings:
    """Gathers the answers to the batches of one request for embeddings."""

    def __init__(self, model: str) -> None:
        self._model = model
        self._data: list[dict[str, Any]] = []
        self._usage: dict[str, int] = {}
        self._top: dict[str, Any] = {}

    def add(self, body: bytes) -> None:
        """The answer to the next batch. Raises BadEvent."""
        try:
            answer = _DECODER.decode(body)
            items = sorted(answer.pop("data"), key=lambda item: item["index"])
            for key, value in (answer.pop("usage", None) or {}).items():
                if isinstance(value, int):
                    self._usage[key] = self._usage.get(key, 0) + value
        except (msgspec.DecodeError, UnicodeDecodeError, AttributeError, KeyError, TypeError) as error:
            raise BadEvent(f"{error}: {body[:200]!r}") from None
        for item in items:
            self._data.append({**item, "index": len(self._data)})
        self._top = answer

    def answer(self) -> bytes:
        """The answer as JSON."""
        model = self._model or self._top.get("model", "")
        return _ENCODER.encode({"object": "list", **self._top, "model": model, "data": self._data, "usage": self._usage})
