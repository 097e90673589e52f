"""The OpenAI API of the gateway."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import msgspec
from aiohttp import web

from llorch_web.body import read_body
from llorch_web.errors import ApiError

from .core.pools import PoolView
from .metrics import GatewayMetrics
from .proxy import Asked, Proxy
from .view import PoolsView

PATHS = ("chat/completions", "completions", "embeddings")


class _Peek(msgspec.Struct):
    """All that the gateway reads of a body; the rest is forwarded as it came."""

    model: str | None = None
    stream: bool | None = None


_PEEK = msgspec.json.Decoder(_Peek)
_ENCODER = msgspec.json.Encoder()


class OpenAIRoutes:
    """Handlers of /v1."""

    def __init__(self, view: PoolsView, proxy: Proxy, metrics: GatewayMetrics, *, max_body: int) -> None:
        """`max_body` in bytes."""
        self._view = view
        self._proxy = proxy
        self._metrics = metrics
        self._max_body = max_body

    def routes(self) -> list[web.AbstractRouteDef]:
        """All routes of the API."""
        return [
            web.get("/v1/models", self._models),
            web.get("/v1/models/{model:.+}", self._model),
            *(web.post(f"/v1/{path}", self._post(path)) for path in PATHS),
        ]

    def _pool(self, model: str) -> PoolView:
        pool = self._view.table.resolve(model)
        if pool is not None:
            return pool
        if not self._view.synced:
            raise ApiError(503, "the gateway does not know its models yet", code="starting", headers={"Retry-After": "1"})
        raise ApiError(404, f"the model {model!r} does not exist", code="model_not_found", param="model")

    async def _models(self, _: web.Request) -> web.Response:
        models = [_described(name, pool) for name, pool in self._view.table.models()]
        return _json({"object": "list", "data": models})

    async def _model(self, request: web.Request) -> web.Response:
        name = request.match_info["model"]
        return _json(_described(name, self._pool(name)))

    def _post(self, path: str) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
        async def handle(request: web.Request) -> web.StreamResponse:
            try:
                body = await read_body(request, self._max_body)
                model = _model_of(body)
                pool = self._pool(model)
            except ApiError as error:
                self._metrics.refused(error.status)
                raise
            with self._metrics.request(pool.name) as outcome:
                response = await self._proxy.forward(request, Asked(pool, model, path, body), outcome)
                outcome.status = response.status
                return response

        return handle


def _model_of(body: bytes) -> str:
    try:
        peek = _PEEK.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ApiError(400, f"the body is not what is expected: {error}", code="invalid_request") from None
    if not peek.model:
        raise ApiError(400, "you must name a model", code="missing_required_parameter", param="model")
    return peek.model


def _described(name: str, pool: PoolView) -> dict[str, object]:
    ready = bool(pool.endpoints) and not pool.kept
    return {
        "id": name,
        "object": "model",
        "created": pool.created,
        "owned_by": "llorch",
        "status": {"value": "loaded" if ready else "unloaded", "reason": pool.reason},
    }


def _json(value: object) -> web.Response:
    return web.Response(body=_ENCODER.encode(value), content_type="application/json")
