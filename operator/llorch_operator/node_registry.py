"""Agents that came by HTTP, written as the same GPUNodes that agents in the cluster write themselves."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable
from weakref import WeakValueDictionary

from llorch_api import GPUNode, ObjectMeta
from llorch_api.patch import merge_diff
from llorch_store import Key, NotFound, Store

from .core.node_wire import POOLS_ANNOTATION, TRANSPORT_LABEL, Beat, Registration, agent_part, beaten, came_by_http, registered
from .fleet import Fleet

FIELD_MANAGER = "llorch-node-api"


class Taken(Exception):
    """The id belongs to an agent that writes its GPUNode itself."""


class NodeRegistry:
    """Registers, beats and removes. Calls may raise StoreError; NotFound is a node that has to register (again)."""

    def __init__(self, store: Store, fleet: Fleet, *, interval: int, wall_clock: Callable[[], str]) -> None:
        """`interval`: seconds that agents are told to beat in, and that stand for those who do not say theirs."""
        self._store = store
        self._fleet = fleet
        self._interval = interval
        self._wall_clock = wall_clock
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    async def register(self, registration: Registration) -> GPUNode:
        """Makes the node, or updates what is known of it. Raises Taken."""
        key = Key("", registration.node_id)
        async with self._lock(key.name):
            try:
                known: GPUNode | None = await self._store.get(GPUNode, key)
            except NotFound:
                known = None
            if known is not None and not came_by_http(known):
                raise Taken
            meta = ObjectMeta(
                name=key.name,
                labels={TRANSPORT_LABEL: "http"},
                annotations={POOLS_ANNOTATION: ",".join(dict.fromkeys(registration.pools))},
            )
            node = await self._store.apply(GPUNode(metadata=meta), field_manager=FIELD_MANAGER)
            return await self._write(node, registered(node.status, registration))

    async def beat(self, name: str, beat: Beat) -> GPUNode:
        """Takes in a heartbeat. Raises NotFound, Taken, and ValueError for a status that cannot be read."""
        async with self._lock(name):
            node = await self.known(name)
            boot_id = secrets.token_hex(8)
            status = beaten(node.status, beat, now=self._wall_clock(), interval=self._interval, new_boot_id=boot_id)
            return await self._write(node, status)

    async def remove(self, name: str) -> None:
        """Takes the node out. Raises NotFound, Taken."""
        async with self._lock(name):
            node = await self.known(name)
            await self._store.delete(GPUNode, Key("", name), uid=node.metadata.uid)
            self._fleet.forget_node(name)

    async def known(self, name: str) -> GPUNode:
        """The node as last seen. Raises NotFound, and Taken where it did not come by HTTP."""
        node = self._fleet.nodes.get(name) or await self._store.get(GPUNode, Key("", name))
        if not came_by_http(node):
            raise Taken
        return node

    async def _write(self, node: GPUNode, status: dict[str, object]) -> GPUNode:
        patch = merge_diff(agent_part(node.status), status)
        if patch:
            try:
                node = await self._store.patch_status(
                    GPUNode, Key("", node.metadata.name), patch, field_manager=FIELD_MANAGER, uid=node.metadata.uid
                )
            except NotFound:
                self._fleet.forget_node(node.metadata.name)
                raise
        self._fleet.observe_node(node)
        return node

    def _lock(self, name: str) -> asyncio.Lock:
        """Two requests about one node are never worked on at once: each is a difference from what the other left."""
        lock = self._locks.get(name)
        if lock is None:
            lock = self._locks[name] = asyncio.Lock()
        return lock
