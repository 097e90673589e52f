"""GET /replicas/{id}/log: the last lines that an engine wrote, and with `follow` what it writes from then on."""

from __future__ import annotations

import asyncio
from typing import Final

from aiohttp import web

from llorch_api import ReplicaOrigin
from llorch_web.errors import ApiError

from .engine_log import MAX_LINES, EngineLog, EngineLogs, Position
from .replicas import Replicas

LINES: Final = 100
LOOK_SECONDS: Final = 0.2
"""Between two looks at a log that is followed."""
FOLLOWERS: Final = 16
"""Streams at a time; each is a file that is looked at five times a second."""
HEADERS: Final = {"Content-Type": "text/plain; charset=utf-8", "Cache-Control": "no-cache", "X-Content-Type-Options": "nosniff"}


class LogRoute:
    """The route, and the end of its streams."""

    def __init__(self, logs: EngineLogs, replicas: Replicas) -> None:
        self._logs = logs
        self._replicas = replicas
        self._ended = asyncio.Event()
        self._following = 0

    def routes(self) -> list[web.AbstractRouteDef]:
        """For `app.router.add_routes`."""
        return [web.get("/replicas/{id}/log", self.handle)]

    def end(self) -> None:
        """Ends every stream."""
        self._ended.set()

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """200 text/plain; 404 where the replica is not of this node, or its engine not the agent's."""
        lines = _lines(request.query.get("lines", str(LINES)))
        replica_id = request.match_info["id"]
        found = self._logs.get(replica_id)
        replica = self._replicas.get(replica_id)
        if replica is not None and replica.origin is ReplicaOrigin.ADOPTED:
            text = f"replica {replica_id} was adopted while it ran: its log is where whoever started it keeps it"
            raise ApiError(404, text, code="no_log")
        if found is None:
            if replica is not None:
                raise ApiError(404, f"replica {replica_id} has not been started here yet", code="no_log")
            raise ApiError(404, f"no replica {replica_id!r} on this node", code="no_replica")
        try:
            written, position = await asyncio.to_thread(found.last, lines)
        except FileNotFoundError:
            raise ApiError(404, f"replica {replica_id} has no log any more", code="no_log") from None
        if request.query.get("follow", "") not in ("1", "true"):
            return web.Response(body=written, headers=HEADERS)
        if self._following >= FOLLOWERS:
            raise ApiError(429, f"{FOLLOWERS} logs of this node are followed already", code="too_many_followers")
        self._following += 1
        try:
            response = web.StreamResponse(headers=HEADERS)
            await response.prepare(request)
            await response.write(written)
            await self._follow(response, found, position)
        finally:
            self._following -= 1
        await response.write_eof()
        return response

    async def _follow(self, response: web.StreamResponse, followed: EngineLog, position: Position) -> None:
        while not self._ended.is_set():
            new, position = followed.since(position)
            if new:
                await response.write(new)
                continue
            try:
                async with asyncio.timeout(LOOK_SECONDS):
                    await self._ended.wait()
            except TimeoutError:
                continue


def _lines(text: str) -> int:
    if not text.isdigit() or not 0 <= int(text[:9]) <= MAX_LINES:
        raise ApiError(400, f"'lines' must be a whole number from 0 to {MAX_LINES}", code="invalid_request", param="lines")
    return int(text)
