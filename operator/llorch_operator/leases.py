"""The Leases that agents renew instead of writing their status: listed, watched, and read again before a node is demoted."""

from __future__ import annotations

import asyncio
import json
import logging
import random
from collections.abc import AsyncIterator, Collection
from typing import Any

from llorch_store import Forbidden, NotFound, StoreError, Unavailable
from llorch_store.core import backoff
from llorch_store.core.answers import Expired, error_of
from llorch_store.kube_connection import KubeConnection
from llorch_store.kube_watch import WATCH_SECONDS, list_all

from .fleet import Fleet

log = logging.getLogger("llorch.operator.leases")

SELECTOR = "llorch.dev/heartbeat=node"
FORBIDDEN_SECONDS = 60.0
FEW = 3
"""Leases that are read one by one; more are listed."""


class NodeLeases:
    """Feeds renewals to the fleet. Only the operator's own namespace is looked at."""

    def __init__(self, fleet: Fleet, namespace: str) -> None:
        self._fleet = fleet
        self._path = f"/apis/coordination.k8s.io/v1/namespaces/{namespace}/leases"
        self._query = {"labelSelector": SELECTOR}
        self._api: KubeConnection | None = None
        self._version = ""
        self._failures = 0

    async def run(self) -> None:
        """Lists and watches until cancelled; nothing that the API server says ends it."""
        async with KubeConnection() as api:
            self._api = api
            try:
                while True:
                    await self._follow(api)
            finally:
                self._api = None

    async def read(self, nodes: Collection[str]) -> None:
        """Takes in the Leases of `nodes` as they are now. Raises StoreError where that is not known."""
        if self._api is None:
            raise Unavailable("the Leases are not connected yet")
        if len(nodes) > FEW:
            documents, _ = await list_all(self._api, self._path, self._query)
            self._take(documents)
            return
        for name in nodes:
            try:
                self._take([await self._api.request("GET", f"{self._path}/{name}")])
            except NotFound:
                continue

    async def _follow(self, api: KubeConnection) -> None:
        try:
            if not self._version:
                documents, self._version = await list_all(api, self._path, self._query)
                self._take(documents)
                self._failures = 0
            query = {
                **self._query,
                "watch": "true",
                "allowWatchBookmarks": "true",
                "timeoutSeconds": str(WATCH_SECONDS),
                "resourceVersion": self._version,
            }
            async with api.lines(self._path, query=query) as lines:
                await self._events(lines)
            await asyncio.sleep(random.random())
        except Expired:
            self._version = ""
            await asyncio.sleep(random.random())
        except StoreError as error:
            self._failures += 1
            if self._failures in (2, 20):
                log.warning("cannot watch the nodes' Leases: %s", error)
            if self._failures > 4:
                self._version = ""
            wish = error.retry_after if isinstance(error, Unavailable) else None
            delay = backoff.delay(self._failures, random.random(), retry_after=wish)
            await asyncio.sleep(FORBIDDEN_SECONDS if isinstance(error, Forbidden) else delay)

    async def _events(self, lines: AsyncIterator[bytes]) -> None:
        async for line in lines:
            try:
                change = json.loads(line)
                kind, document = change["type"], change["object"]
                if kind == "ERROR":
                    raise error_of(int(document.get("code") or 500), json.dumps(document))
                self._version = document["metadata"]["resourceVersion"]
            except (ValueError, KeyError, TypeError) as error:
                raise Unavailable(f"the API server's event cannot be read: {error!r}") from error
            self._failures = 0
            if kind in ("ADDED", "MODIFIED"):
                # One that appears while we watch was made just now: that is a sign of life, a listed one may be an old one.
                self._take([document], fresh=True)

    def _take(self, documents: Collection[Any], *, fresh: bool = False) -> None:
        for document in documents:
            renewed = (document.get("spec") or {}).get("renewTime")
            if renewed:
                self._fleet.observe_lease(document["metadata"]["name"], str(renewed), fresh=fresh)
