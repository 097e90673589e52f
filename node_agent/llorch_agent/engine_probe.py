"""What an engine says over HTTP: its health, its slots, and whether it really generates."""

from __future__ import annotations

import asyncio
import json
import os
from typing import Any, Final

import aiohttp

from .core.adoption import Answer, Health

PROBE_S = 3.0
"""Seconds for one answer."""

_MAX_BODY: Final = 1 << 20


class EngineProbe:
    """One HTTP client for all engines of the node. `close` it."""

    def __init__(self) -> None:
        self._session: aiohttp.ClientSession | None = None

    async def ask(self, base_url: str) -> Answer:
        """Health and, from an engine that is up, its properties. Never raises for what an engine does."""
        try:
            async with asyncio.timeout(PROBE_S):
                status, _ = await self._get(f"{base_url}/health")
                if status == 503:
                    return Answer(Health.LOADING)
                if status >= 500:
                    return Answer(Health.DOWN, f"/health says {status}")
                # 404: an engine without /health; that it answers is what there is to know.
                status, body = await self._get(f"{base_url}/props")
        except TimeoutError:
            return Answer(Health.SILENT, f"nothing within {PROBE_S:g} s")
        except (aiohttp.ClientError, OSError) as error:
            return Answer(Health.DOWN, _reason(error))
        return _with_properties(body) if status == 200 else Answer(Health.UP)

    async def warm_up(self, base_url: str, embeddings: bool, timeout_s: float) -> str:
        """Makes the engine do its work once. Returns what went wrong, or nothing."""
        path, body = ("/v1/embeddings", {"input": "a"}) if embeddings else ("/v1/completions", {"prompt": "a", "max_tokens": 1})
        try:
            async with asyncio.timeout(timeout_s), self._client().post(base_url + path, json=body) as response:
                text = (await response.content.read(_MAX_BODY)).decode(errors="replace")
        except TimeoutError:
            return f"no token within {timeout_s:.0f} s"
        except (aiohttp.ClientError, OSError) as error:
            return _reason(error)
        return "" if response.status == 200 else f"{path} says {response.status}: {text[:160]}"

    async def close(self) -> None:
        """Closes the client."""
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def _get(self, url: str) -> tuple[int, bytes]:
        async with self._client().get(url, allow_redirects=False) as response:
            return response.status, await response.content.read(_MAX_BODY)

    def _client(self) -> aiohttp.ClientSession:
        if self._session is None:
            # Connections are not kept: an engine that is gone must not leave one that looks alive.
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(force_close=True, limit=0),
                timeout=aiohttp.ClientTimeout(total=None),
                trust_env=False,
            )
        return self._session


def _with_properties(body: bytes) -> Answer:
    try:
        properties: Any = json.loads(body)
    except ValueError:
        return Answer(Health.UP)
    if not isinstance(properties, dict):
        return Answer(Health.UP)
    slots, path = properties.get("total_slots"), properties.get("model_path")
    return Answer(
        Health.UP,
        total_slots=slots if isinstance(slots, int) and 0 < slots <= 4096 else None,
        model_path=path if isinstance(path, str) else "",
    )


def _reason(error: Exception) -> str:
    if isinstance(error, aiohttp.ClientConnectorError):
        return os.strerror(error.os_error.errno).lower() if error.os_error.errno else "cannot connect"
    return str(error) or type(error).__name__
