"""Tells each pool of this node's replicas: GPUPool.status.replicas, for people who look at the pool."""

from __future__ import annotations

import asyncio
import logging
import random
from collections import defaultdict
from typing import Any, Final

from llorch_api import GPUPool, PoolReplica, ReplicaOrigin, ReplicaState
from llorch_store import Key, NotFound, Store, StoreError, Unavailable

from .publisher import FIELD_MANAGER, REQUEST_TIMEOUT_S, timestamp
from .replicas import Replicas

log = logging.getLogger(__name__)

JITTER_S: Final = 0.1
"""Times the pool's replicas: writes are spread over that long. 200 agents that patch one object at once drown in conflicts."""
PROGRESS_STEP: Final = 10
"""Percent of a download after which the pool is told."""
MOST: Final = 64
"""A larger pool gets no entries at all."""
RETRIES: Final = 3

Entries = dict[str, dict[str, Any]]


class PoolEntries:
    """Writes on transitions, one task per pool. Failures are logged; the next transition tells everything again."""

    def __init__(self, store: Store, node: str, replicas: Replicas, draw: random.Random) -> None:
        self._store = store
        self._node = node
        self._replicas = replicas
        self._draw = draw
        self._told: dict[Key, Entries] = {}
        self._wake = asyncio.Event()

    def poke(self) -> None:
        """A replica may have changed its state, come or gone."""
        self._wake.set()

    async def run(self) -> None:
        """Writes for ever."""
        busy: dict[Key, asyncio.Task[None]] = {}
        async with asyncio.TaskGroup() as group:
            while True:
                await self._wake.wait()
                self._wake.clear()
                for key in self._changed():
                    if key not in busy or busy[key].done():
                        busy[key] = group.create_task(self._tell(key, hurry=False), name=f"entries of {key}")
                busy = {key: task for key, task in busy.items() if not task.done()}

    async def finish(self) -> None:
        """Tells the last changes without waiting for a turn."""
        async with asyncio.TaskGroup() as group:
            for key in self._changed():
                group.create_task(self._tell(key, hurry=True))

    def _changed(self) -> list[Key]:
        entries = self._entries()
        return [key for key in sorted(entries.keys() | self._told.keys()) if entries.get(key, {}) != self._told.get(key, {})]

    def _entries(self) -> dict[Key, Entries]:
        found: dict[Key, Entries] = defaultdict(dict)
        for replica in self._replicas:
            if replica.origin is ReplicaOrigin.ASSIGNED and replica.namespace:
                entry: dict[str, Any] = {
                    "node": self._node,
                    "state": replica.state.value,
                    "since": timestamp(replica.since),
                    # None, since what a merge patch does not name stays: the last percentage would outlive the download.
                    "progressPercent": None,
                }
                if replica.state is ReplicaState.FETCHING and (percent := _in_steps(replica.progress_percent)):
                    entry["progressPercent"] = percent
                found[Key(replica.namespace, replica.pool)][replica.id] = entry
        return found

    async def _tell(self, key: Key, *, hurry: bool) -> None:
        for attempt in range(1 if hurry else RETRIES):
            try:
                told = await self._tell_once(key, hurry=hurry)
            except NotFound:
                self._note(key, self._entries().get(key, {}))
                break
            except (StoreError, TimeoutError) as error:
                log.warning("cannot tell pool %s of its replicas here: %s", key, error or "no answer in time")
                pause = error.retry_after if isinstance(error, Unavailable) and error.retry_after else 0.0
                await asyncio.sleep(0 if hurry else max(pause, 2.0**attempt * self._draw.uniform(0.5, 1.5)))
            else:
                self._note(key, told)
                break
        else:
            # Given up until the next transition: the next write starts from what the pool says, so nothing is lost by it.
            self._note(key, self._entries().get(key, {}))
        self._wake.set()  # for what changed meanwhile

    def _note(self, key: Key, told: Entries) -> None:
        if told:
            self._told[key] = told
        else:
            self._told.pop(key, None)

    async def _tell_once(self, key: Key, *, hurry: bool) -> Entries:
        async with asyncio.timeout(REQUEST_TIMEOUT_S):
            pool = await self._store.get(GPUPool, key)
        size = max(len(pool.status.replicas), pool.status.desired)
        if size > MOST:
            return self._entries().get(key, {})
        if not hurry:
            await asyncio.sleep(self._draw.uniform(0.0, JITTER_S * size))
        wanted = self._entries().get(key, {})
        known = {name: entry for name, entry in pool.status.replicas.items() if entry.node == self._node}
        patch: dict[str, Any] = {name: None for name in known if name not in wanted}
        patch |= {name: entry for name, entry in wanted.items() if name not in known or not _same(known[name], entry)}
        if patch:
            async with asyncio.timeout(REQUEST_TIMEOUT_S):
                await self._store.patch_status(
                    GPUPool, key, {"replicas": patch}, field_manager=FIELD_MANAGER, uid=pool.metadata.uid
                )
        return wanted


def _same(known: PoolReplica, entry: dict[str, Any]) -> bool:
    return known.to_json() == {name: value for name, value in entry.items() if value is not None}


def _in_steps(percent: int) -> int:
    return percent - percent % PROGRESS_STEP
