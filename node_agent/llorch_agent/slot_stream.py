"""Tells gateways how many slots are free: at once on a change, and often enough that silence means a frozen agent."""

from __future__ import annotations

import asyncio

import msgspec
from aiohttp import web

from llorch_api import ReplicaState

from .frontdoor_leases import Leases
from .replicas import Replicas

BEAT_SECONDS = 0.5
COALESCE_SECONDS = 0.02
"""Changes within this time after a message share the next one."""
HEADERS = {"Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-cache", "X-Accel-Buffering": "no"}

_ENCODER = msgspec.json.Encoder()


class SlotStream:
    """`GET /replicas/slots`: `data: {"<replica>": {"free": n, "total": n, "state": "Ready"}, …}` for all replicas."""

    def __init__(self, replicas: Replicas, leases: Leases) -> None:
        self._replicas = replicas
        self._leases = leases
        self._ended = False

    def end(self) -> None:
        """Ends every stream."""
        self._ended = True
        self._replicas.touch()

    def message(self) -> bytes:
        """The slots of all replicas now, as one event."""
        closed = self._leases.closed
        slots = {
            replica.id: {
                "free": replica.slots.free if replica.serving and not closed else 0,
                "total": replica.slots.total,
                "state": ReplicaState.DRAINING if closed and replica.serving else replica.state,
            }
            for replica in self._replicas
        }
        return b"data: " + _ENCODER.encode(slots) + b"\n\n"

    async def serve(self, request: web.Request) -> web.StreamResponse:
        """Writes messages until the client leaves or the agent stops. A slow reader gets fewer of them, always the newest."""
        response = web.StreamResponse(headers=HEADERS)
        await response.prepare(request)
        while not self._ended:
            version = self._replicas.version
            await response.write(self.message())
            await asyncio.sleep(COALESCE_SECONDS)
            try:
                async with asyncio.timeout(BEAT_SECONDS - COALESCE_SECONDS):
                    await self._replicas.wait_beyond(version)
            except TimeoutError:
                pass
        await response.write_eof()
        return response
