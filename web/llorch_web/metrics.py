"""The /metrics page of one or several registries."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest


def metrics_handler(*registries: CollectorRegistry) -> Callable[[web.Request], Awaitable[web.Response]]:
    """A handler that writes the series of all `registries`, whose names must differ."""

    async def metrics(_: web.Request) -> web.Response:
        page = b"".join(map(generate_latest, registries))
        return web.Response(body=page, headers={"Content-Type": CONTENT_TYPE_LATEST})

    return metrics
