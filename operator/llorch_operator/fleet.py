"""What the operator knows: the newest seen state of every node and pool, kept by watch events and by its own writes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from urllib.parse import urlsplit

from llorch_api import AgentState, GPUNode, GPUPool

from .core.liveness import Liveness, LivenessTracker, Transition
from .core.node_wire import came_by_http
from .core.nodes import Pulse, recorded, token_of
from .core.pools import Seen
from .core.views import PoolKey
from .spec_bell import SpecBell

RETRY_SECONDS = 1.0
"""Until what could not be written is planned again."""


def _newer(known: GPUNode | GPUPool | None, seen: GPUNode | GPUPool) -> bool:
    """False for an event that is older than what a write of ours returned already."""
    if known is None or known.metadata.uid != seen.metadata.uid:
        return True
    old, new = known.metadata.resource_version, seen.metadata.resource_version
    return not (old.isdigit() and new.isdigit()) or int(new) > int(old)


def _identity(node: GPUNode) -> tuple[str, int]:
    return node.metadata.uid, node.metadata.generation


def _routine(old: GPUNode, new: GPUNode) -> bool:
    """True when only a heartbeat and live readings differ, for which nothing has to be planned again."""

    def essence(node: GPUNode) -> tuple[object, ...]:
        status = node.status
        devices = {uuid: (d.health, d.held_by, d.vram_total_mib, d.foreign_mib // 512) for uuid, d in status.devices.items()}
        replicas = {rid: (r.state, r.slots_total, r.revision, r.message, r.reserved_mib) for rid, r in status.replicas.items()}
        return (
            node.metadata.generation,
            node.metadata.uid,
            status.agent,
            status.node,
            devices,
            replicas,
            frozenset(status.models),
            status.measured,
        )

    return essence(old) == essence(new)


class Fleet:
    """Nodes, pools and agents' addresses. `changed` is set whenever a plan could come out differently."""

    def __init__(self, tracker: LivenessTracker, clock: Callable[[], float], *, claimed_hosts: bool) -> None:
        self.tracker = tracker
        self.nodes: dict[str, GPUNode] = {}
        self.pools: dict[PoolKey, GPUPool] = {}
        self.changed = asyncio.Event()
        self.spec_bell = SpecBell()
        """Rings for a node whose spec is another one."""
        self.transitions: list[Transition] = []
        """Changes of liveness since the last plan."""
        self.writes = 0
        """Objects that the operator changed, for the metric that shows a quiet one."""
        self.again_at: float | None = None
        """When to plan once more because a write failed, by the same clock."""
        self._renewed: dict[str, str] = {}
        """When each node's Lease was renewed, by its agent's clock: only ever compared for being another one."""
        self._clock = clock
        self._hosts: dict[str, str] = {}
        self._claimed_hosts = claimed_hosts

    def observe_node(self, node: GPUNode) -> None:
        """A node as it is now."""
        name = node.metadata.name
        known = self.nodes.get(name)
        if not _newer(known, node):
            return
        self.nodes[name] = node
        if known is None or _identity(known) != _identity(node):
            self.spec_bell.ring(name)
        self._beat(node)
        if known is None or not _routine(known, node):
            self.changed.set()

    def observe_lease(self, name: str, renewed: str, *, fresh: bool) -> None:
        """A node's Lease as it is now. One that is first seen is no sign of life unless it is `fresh`: just made."""
        known = self._renewed.get(name)
        if known == renewed:
            return
        self._renewed[name] = renewed
        node = self.nodes.get(name)
        if node is None:
            return
        if known is None and not fresh:
            self.tracker.rebase(name, token_of(node, renewed))
        else:
            self._beat(node)

    def _beat(self, node: GPUNode) -> None:
        """What the node's object and its Lease say together."""
        name = node.metadata.name
        before = self.tracker.placeable(name)
        moved = self.tracker.observe(
            name,
            uid=node.metadata.uid,
            token=token_of(node, self._renewed.get(name, "")),
            interval=node.status.heartbeat.interval_seconds,
            now=self._clock(),
            stopped=node.status.agent.state is AgentState.STOPPED,
            recorded=recorded(node),
        )
        if moved:
            self.transitions.append(moved)
        if moved or before is not self.tracker.placeable(name):
            self.changed.set()

    def forget_node(self, name: str) -> None:
        """The node's object is gone."""
        if self.nodes.pop(name, None) is not None:
            self.tracker.forget(name)
            self._renewed.pop(name, None)
            self.spec_bell.ring(name)
            self.changed.set()

    def observe_pool(self, pool: GPUPool) -> None:
        """A pool as it is now."""
        key = PoolKey(pool.metadata.namespace, pool.metadata.name)
        known = self.pools.get(key)
        if _newer(known, pool):
            self.pools[key] = pool
            if known is None or known.metadata.generation != pool.metadata.generation or known.metadata.uid != pool.metadata.uid:
                self.changed.set()

    def forget_pool(self, key: PoolKey) -> None:
        """The pool's object is gone."""
        if self.pools.pop(key, None) is not None:
            self.changed.set()

    def observe_hosts(self, hosts: Mapping[str, str]) -> None:
        """The addresses of the agents' pods by node, whole."""
        if self._hosts != hosts:
            self._hosts = dict(hosts)
            self.changed.set()

    def wrote(self, written: GPUNode | GPUPool) -> None:
        """An object as a write of the operator's returned it: newer than what the watch has told so far."""
        self.writes += 1
        if isinstance(written, GPUNode):
            self.observe_node(written)
        else:
            self.observe_pool(written)

    def look_again(self) -> None:
        """A write failed: what it was for comes up again in a moment, and not in a hot loop against a store that is away."""
        self.again_at = self._clock() + RETRY_SECONDS

    def pulse(self, name: str) -> Pulse:
        """The node's liveness now."""
        return Pulse(self.tracker.state(name), self.tracker.placeable(name), self.tracker.silent_for(name, self._clock()))

    def base_url(self, node: GPUNode) -> str:
        """Where the node's agent answers: the pod's IP with the agent's port. What it claims counts outside a cluster, and
        for nodes that came through the node API: they have no pod here."""
        claimed = urlsplit(node.status.agent.address)
        if claimed.hostname is None or claimed.scheme not in ("http", "https"):
            return ""
        if self._claimed_hosts or came_by_http(node):
            return f"{claimed.scheme}://{claimed.netloc}"
        host = self._hosts.get(node.metadata.name)
        if host is None:
            return ""
        return f"{claimed.scheme}://{f'[{host}]' if ':' in host else host}:{claimed.port or 9200}"

    def seen(self) -> dict[str, Seen]:
        """Every node with its pulse and its agent's base URL."""
        return {name: Seen(node, self.pulse(name), self.base_url(node)) for name, node in self.nodes.items()}

    def live(self, name: str) -> bool:
        """True while the node may be asked for something."""
        return self.tracker.state(name) < Liveness.OFFLINE
