"""POST /v2/models/inspect: what a model is, as the node that holds it sees it. The operator asks before it places anything."""

from __future__ import annotations

import asyncio
from typing import Final

from aiohttp import web
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from llorch_model.access import DEFAULT_ACCESS, SourceAccess
from llorch_model.core.errors import ModelError, ModelErrorCode
from llorch_model.core.source import local_path
from llorch_model.inspected import Inspected
from llorch_model.inspection import inspect_model
from llorch_web.body import read_body
from llorch_web.errors import ApiError

from .core.engine_args import refused_by_agent
from .fit_params import FitParams
from .model_roots import ModelRoots

AT_ONCE: Final = 4
"""Inspections that read at the same time; the rest wait their turn."""
MAX_BODY: Final = 8 * 1024

_STATUS = {
    ModelErrorCode.MODEL_NOT_AVAILABLE: 404,
    ModelErrorCode.UNSUPPORTED_SOURCE: 422,
    ModelErrorCode.BAD_MODEL: 422,
    ModelErrorCode.DIGEST_MISMATCH: 409,
}


class InspectRequest(BaseModel):
    """The body."""

    model_config = ConfigDict(extra="forbid")

    source: str = Field(min_length=1, max_length=2048)
    sha256: str | None = Field(None, max_length=80)
    slots: int | None = Field(None, ge=1, le=256)
    """With contextTokens, asks what a replica takes where the header does not decide it."""
    context_tokens: int | None = Field(None, ge=1, le=1 << 22, alias="contextTokens")
    engine_args: list[str] = Field([], max_length=80, alias="engineArgs")

    @field_validator("engine_args")
    @classmethod
    def _allowed(cls, value: list[str]) -> list[str]:
        if refused := refused_by_agent(value):
            raise ValueError(f"{', '.join(refused)} may not be set")
        return value


class InspectRoute:
    """The route and what it needs."""

    def __init__(self, roots: ModelRoots, access: SourceAccess = DEFAULT_ACCESS, fit: FitParams | None = None) -> None:
        self._roots = roots
        self._access = access
        self._fit = fit
        self._turn = asyncio.Semaphore(AT_ONCE)

    def routes(self) -> list[web.AbstractRouteDef]:
        """For `app.router.add_routes`."""
        return [web.post("/v2/models/inspect", self.handle)]

    async def handle(self, request: web.Request) -> web.Response:
        """200 {resolved, digest, sizeMiB, shape}, or an error envelope with one of the codes of ModelErrorCode.

        Asked with slots and contextTokens about a file whose header does not decide its memory need, the answer has `vramMiB`,
        or `vramMessage` that says why not.
        """
        try:
            asked = InspectRequest.model_validate_json(await read_body(request, MAX_BODY))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise ApiError(
                400, f"{where}: {first['msg']}".removeprefix(": "), code="invalid_request", param=where or None
            ) from None
        try:
            self._roots.check(asked.source)
            async with self._turn:
                found = await inspect_model(asked.source, sha256=asked.sha256, access=self._access)
        except ModelError as error:
            raise ApiError(_STATUS.get(error.code, 404), error.message, code=error.code.value) from None
        return web.json_response({**found.to_resolved().to_json(), **await self._need(asked, found)})

    async def _need(self, asked: InspectRequest, found: Inspected) -> dict[str, int | str]:
        if asked.slots is None or asked.context_tokens is None or not found.shape.caveat:
            return {}
        path = local_path(asked.source)
        if path is None:
            return {"vramMessage": f"{found.shape.caveat}; only of file: sources more can be said before they are fetched"}
        mib = None
        if self._fit is not None:
            mib = await self._fit.ask(path, slots=asked.slots, context_tokens=asked.context_tokens, engine_args=asked.engine_args)
        return (
            {"vramMiB": mib} if mib else {"vramMessage": f"{found.shape.caveat}; llama-fit-params is not there or does not know"}
        )
