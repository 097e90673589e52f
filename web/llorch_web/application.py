"""The aiohttp application that every component starts from."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from aiohttp import web
from aiohttp.typedefs import Middleware
from prometheus_client import CollectorRegistry

from .auth import OPEN_PATHS, Tokens, auth_middleware
from .correlation import correlation_middleware, echo_correlation
from .errors import error_middleware
from .metrics import metrics_handler


def application(
    routes: Iterable[web.AbstractRouteDef],
    *,
    registries: Iterable[CollectorRegistry] = (),
    tokens: Tokens | None = None,
    protects: Callable[[str], bool] = lambda path: path not in OPEN_PATHS,
    health: Callable[[], str] = lambda: "",
) -> web.Application:
    """`routes` with correlation ids, error envelopes, /health and /metrics, and bearer tokens where `tokens` are given.

    `health` returns why the component is not healthy, for a 503; empty when it is.
    """

    async def answer_health(_: web.Request) -> web.Response:
        problem = health()
        if problem:
            return web.json_response({"status": "unavailable", "reason": problem}, status=503)
        return web.json_response({"status": "ok"})

    middlewares: list[Middleware] = [correlation_middleware, error_middleware]
    if tokens is not None:
        middlewares.append(auth_middleware(tokens, protects))
    app = web.Application(middlewares=middlewares)
    app.on_response_prepare.append(echo_correlation)
    app.add_routes(routes)
    app.router.add_get("/health", answer_health)
    app.router.add_get("/metrics", metrics_handler(*registries))
    return app
