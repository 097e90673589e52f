"""A real store that fails when a test says so: refused, lost before or after it took effect, or silent."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from typing import Any, TypeVar

from llorch_api import Resource
from llorch_store import Event, Key, Listing, Store, StoreError, Unavailable

R = TypeVar("R", bound=Resource)


class FaultyStore:
    """Passes everything on to `store`, and counts writes of status."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.fail: StoreError | None = None
        """Raised by every call but watch, before it takes effect."""
        self.lose_answers = False
        """Writes take effect, and the caller is told that they did not."""
        self.silent = False
        """Calls never return."""
        self.writes: list[tuple[float, str, dict[str, Any]]] = []
        self.in_flight = 0
        self.most_in_flight = 0

    async def _before(self) -> None:
        if self.silent:
            await asyncio.Event().wait()
        if self.fail is not None:
            raise self.fail

    async def get(self, kind: type[R], key: Key) -> R:
        await self._before()
        return await self.store.get(kind, key)

    async def list(self, kind: type[R], *, namespace: str | None = None) -> Listing[R]:
        await self._before()
        return await self.store.list(kind, namespace=namespace)

    def watch(self, kind: type[R], *, namespace: str | None = None, name: str | None = None) -> AsyncGenerator[Event[R], None]:
        return self.store.watch(kind, namespace=namespace, name=name)

    async def apply(self, obj: R, *, field_manager: str) -> R:
        await self._before()
        return await self.store.apply(obj, field_manager=field_manager)

    async def patch(
        self, kind: type[R], key: Key, patch: Any, *, field_manager: str, uid: str = "", resource_version: str = ""
    ) -> R:
        await self._before()
        return await self.store.patch(kind, key, patch, field_manager=field_manager, uid=uid, resource_version=resource_version)

    async def patch_status(
        self, kind: type[R], key: Key, patch: Any, *, field_manager: str, uid: str = "", resource_version: str = ""
    ) -> R:
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            await self._before()
            self.writes.append((time.monotonic(), kind.KIND, dict(patch)))
            done = await self.store.patch_status(
                kind, key, patch, field_manager=field_manager, uid=uid, resource_version=resource_version
            )
            if self.lose_answers:
                raise Unavailable("the connection broke")
            return done
        finally:
            self.in_flight -= 1

    async def delete(self, kind: type[R], key: Key, *, uid: str = "") -> None:
        await self.store.delete(kind, key, uid=uid)
