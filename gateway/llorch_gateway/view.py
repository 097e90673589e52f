"""Keeps the table of pools in step with the store."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from contextlib import aclosing

from llorch_api import GPUPool
from llorch_store import Event, EventType, Forbidden, Key, Store, key_of
from llorch_web.settings import StartError

from .core.pools import EMPTY, PoolTable, build

log = logging.getLogger("llorch.gateway.view")

COALESCE_SECONDS = 0.02


class PoolsView:
    """The pools of some namespaces. While the store is away the last table holds."""

    def __init__(
        self, store: Store, namespaces: Sequence[str | None], *, qualified: bool, changed: Callable[[PoolTable], None]
    ) -> None:
        """`namespaces` may be (None,) for all; `changed` is called with every new table."""
        self._store = store
        self._namespaces = namespaces
        self._qualified = qualified
        self._tell = changed
        self._pools: dict[Key, GPUPool] = {}
        self._unsynced = set(namespaces)
        self._dirty = asyncio.Event()
        self.table = EMPTY

    @property
    def synced(self) -> bool:
        """True once all pools are known."""
        return not self._unsynced

    async def run(self) -> None:
        """Works until it is cancelled. Raises StartError where the store refuses to show pools."""
        async with asyncio.TaskGroup() as group:
            for namespace in self._namespaces:
                group.create_task(self._watch(namespace), name=f"watch pools in {namespace or 'all namespaces'}")
            while True:
                await self._dirty.wait()
                self._dirty.clear()
                self._rebuild()
                await asyncio.sleep(COALESCE_SECONDS)

    async def _watch(self, namespace: str | None) -> None:
        try:
            async with aclosing(self._store.watch(GPUPool, namespace=namespace)) as events:
                async for event in events:
                    self._take(event, namespace)
        except Forbidden as error:
            raise StartError(f"the gateway may not read the pools of {namespace or 'all namespaces'}: {error}") from error

    def _take(self, event: Event[GPUPool], namespace: str | None) -> None:
        if event.object is None:
            self._unsynced.discard(namespace)
        elif event.type is EventType.DELETED:
            self._pools.pop(key_of(event.object), None)
        else:
            self._pools[key_of(event.object)] = event.object
        if namespace not in self._unsynced:
            self._dirty.set()

    def _rebuild(self) -> None:
        before, self.table = self.table, build(self._pools.values(), self.table, qualified=self._qualified)
        for conflict in set(self.table.conflicts) - set(before.conflicts):
            log.warning("alias %r of pool %s is taken by the older pool %s", conflict.alias, conflict.loser, conflict.owner)
        self._tell(self.table)
