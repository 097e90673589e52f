"""`llorch chat`: one streamed conversation in a terminal."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import aiohttp

from llorch_web.tls import verified

TIMEOUT = aiohttp.ClientTimeout(total=None, connect=5, sock_read=120)


class ChatError(Exception):
    """One line: what went wrong and where."""


async def models(url: str) -> list[str]:
    """Names that the gateway serves."""
    try:
        async with (
            aiohttp.ClientSession(connector=verified(), timeout=TIMEOUT) as session,
            session.get(f"{url}/v1/models") as response,
        ):
            body = await response.json()
            return [item["id"] for item in body["data"]]
    except (aiohttp.ClientError, TimeoutError, KeyError, ValueError) as error:
        raise ChatError(
            f"{url} does not answer ({type(error).__name__}): is `llorch home` running? LLORCH_URL names another address"
        ) from error


async def stream(url: str, model: str, messages: list[dict[str, str]], max_tokens: int, write: Callable[[str], None]) -> str:
    """Sends the messages, writes the answer as it comes and returns it whole with a closing line of figures."""
    body = {
        "model": model,
        "messages": messages,
        "max_tokens": max_tokens,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    started, first, usage = time.monotonic(), 0.0, 0
    text: list[str] = []
    try:
        async with (
            aiohttp.ClientSession(connector=verified(), timeout=TIMEOUT) as session,
            session.post(f"{url}/v1/chat/completions", json=body) as response,
        ):
            if response.status != 200:
                raise ChatError(_message(response.status, await response.text()))
            async for raw in response.content:
                if not raw.startswith(b"data: ") or raw.strip() == b"data: [DONE]":
                    continue
                event: dict[str, Any] = json.loads(raw[6:])
                if "error" in event:
                    raise ChatError(event["error"].get("message", "the stream broke"))
                usage = (event.get("usage") or {}).get("completion_tokens", usage)
                for choice in event.get("choices", ()):
                    if piece := choice.get("delta", {}).get("content"):
                        first = first or time.monotonic()
                        text.append(piece)
                        write(piece)
    except (aiohttp.ClientError, TimeoutError) as error:
        raise ChatError(f"{url}: the connection broke ({type(error).__name__}: {error})") from error
    took = time.monotonic() - started
    rate = usage / took if took else 0.0
    return f"{usage} tokens in {took:.2f} s ({rate:.0f}/s), first after {max(0.0, first - started) * 1000:.0f} ms"


def _message(status: int, text: str) -> str:
    try:
        return f"{status}: {json.loads(text)['error']['message']}"
    except (ValueError, KeyError, TypeError):
        return f"{status}: {text[:200]}"
