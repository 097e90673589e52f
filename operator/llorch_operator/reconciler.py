"""The level-triggered loop: from what the fleet looks like to what is written. It holds no state that a restart would miss."""

from __future__ import annotations

import asyncio
import logging
import secrets
import ssl
import time
from collections.abc import Callable, Collection, Mapping
from datetime import UTC, datetime
from typing import Protocol

import aiohttp

from llorch_api import Condition, GPUNode, GPUPool
from llorch_api.gpupool import HANDOFF_SOURCE
from llorch_model.access import DEFAULT_ACCESS, SourceAccess
from llorch_model.core.measured import merged
from llorch_store import Key, NotFound, Store, StoreError
from llorch_web.auth import Tokens

from .assignments import AssignmentWriter
from .core.deadlines import Deadlines
from .core.liveness import Liveness, Transition
from .core.nodes import conditions_of, phase_of, said_unmanaged, unmanaged, view_of
from .core.placement import plan
from .core.pools import Resolution, Seen, pool_names_without_pool
from .core.revision import assigned_source, revision_of
from .core.strays import Strays
from .core.views import PoolKey, PoolView
from .events import Events
from .fleet import Fleet
from .handoff_pools import HandoffPools
from .pool_status import PoolStatusWriter
from .resolve import Agent, Resolver, Want, want_of
from .status_patch import node_patch

log = logging.getLogger("llorch.operator.reconciler")

FIELD_MANAGER = "llorch-operator"
TICK_SECONDS = 1.0
SETTLE_SECONDS = 0.05
"""Changes that arrive together are planned together."""
RELIST_SECONDS = 300.0
"""A watch may miss a deletion; a list does not."""


def wall_clock() -> str:
    """Now, as conditions say it."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


class Renewals(Protocol):
    """Where nodes in lease mode show their signs of life."""

    async def read(self, nodes: Collection[str]) -> None:
        """Takes in the newest of `nodes`. Raises StoreError where that is not known."""
        ...


class Reconciler:
    """Plans and writes until it is cancelled. Its death is the operator's: whoever runs it must notice."""

    def __init__(
        self,
        store: Store,
        fleet: Fleet,
        events: Events,
        *,
        namespace: str,
        load_deadline: float,
        tokens: Tokens,
        tls: ssl.SSLContext | None = None,
        clock: Callable[[], float] = time.monotonic,
        new_suffix: Callable[[], str] | None = None,
        access: SourceAccess = DEFAULT_ACCESS,
    ) -> None:
        self._store = store
        self._access = access
        self._fleet = fleet
        self._events = events
        self._namespace = namespace
        self._tokens = tokens
        self._tls = tls
        self._clock = clock
        self._deadlines = Deadlines(load_deadline)
        self._strays = Strays()
        self._assignments = AssignmentWriter(store, fleet, events, new_suffix or _random_suffix)
        self._pool_status = PoolStatusWriter(store, fleet, events, clock, wall_clock, namespace)
        self._handoff_pools = HandoffPools(store, fleet, namespace)
        self._next_relist = 0.0
        self._wake_at: float | None = None
        self.renewals: Renewals | None = None
        """Asked before a node in lease mode is demoted."""
        self._blind = False
        self.last_tick = clock()
        """When the loop last came round, for the liveness probe."""

    async def run(self) -> None:
        """Lists everything, then reconciles for ever."""
        await self._relist()
        connector = aiohttp.TCPConnector(ssl=self._tls or True)
        async with aiohttp.ClientSession(connector=connector) as session, asyncio.TaskGroup() as group:
            resolver = Resolver(session, group, self._fleet.changed, self._tokens, self._access)
            while True:
                self.last_tick = self._clock()
                await self._look_for_silence()
                if self._fleet.changed.is_set() or self._due():
                    self._fleet.changed.clear()
                    await self._reconcile(resolver)
                if self._clock() >= self._next_relist:
                    await self._relist()
                await self._wait()

    async def _wait(self) -> None:
        until = TICK_SECONDS if self._wake_at is None else min(TICK_SECONDS, max(0.0, self._wake_at - self._clock()))
        try:
            await asyncio.wait_for(self._fleet.changed.wait(), until)
            await asyncio.sleep(SETTLE_SECONDS)
        except TimeoutError:
            pass

    def _due(self) -> bool:
        return self._wake_at is not None and self._clock() >= self._wake_at

    async def _relist(self) -> None:
        """Takes in a whole list, and forgets what a watch did not tell us is gone."""
        try:
            nodes = await self._store.list(GPUNode)
            pools = await self._store.list(GPUPool)
        except StoreError as error:
            log.warning("could not list: %s", error)
            self._next_relist = self._clock() + 5.0
            return
        self._next_relist = self._clock() + RELIST_SECONDS
        for node in nodes.items:
            self._fleet.observe_node(node)
        for pool in pools.items:
            self._fleet.observe_pool(pool)
        for name in self._fleet.nodes.keys() - {node.metadata.name for node in nodes.items}:
            self._fleet.forget_node(name)
        for key in self._fleet.pools.keys() - {PoolKey(pool.metadata.namespace, pool.metadata.name) for pool in pools.items}:
            self._fleet.forget_pool(key)

    async def _look_for_silence(self) -> None:
        """Demotes silent nodes, but only those that a read of the API confirms to be silent."""
        suspects = self._fleet.tracker.suspects(self._clock())
        if not suspects:
            return
        confirmed = await self._reread(suspects)
        held = self._fleet.tracker.storm_held
        moved = self._fleet.tracker.demote(confirmed, self._clock())
        self._fleet.transitions += moved
        if self._fleet.tracker.storm_held and not held:
            log.error("most of the fleet went silent at once: no replica is moved until it is clear who is dead")
        if moved:
            self._fleet.changed.set()

    async def _reread(self, suspects: list[str]) -> list[str]:
        confirmed = []
        try:
            if len(suspects) > 3:
                found = {node.metadata.name: node for node in (await self._store.list(GPUNode)).items}
            else:
                found = {name: await self._store.get(GPUNode, Key("", name)) for name in suspects if name in self._fleet.nodes}
            leased = [name for name in suspects if name in found and found[name].status.heartbeat.mode == "lease"]
            if leased and self.renewals is not None:
                await self.renewals.read(leased)
        except NotFound:
            self._next_relist = 0.0
            return []
        except StoreError as error:
            if not self._blind:
                log.warning("cannot confirm that %d nodes are silent, so nothing is concluded: %s", len(suspects), error)
            self._blind = True
            return []
        self._blind = False
        for name in suspects:
            if name in found:
                self._fleet.observe_node(found[name])
                confirmed.append(name)
            else:
                self._fleet.forget_node(name)
        return confirmed

    async def _reconcile(self, resolver: Resolver) -> None:
        now = self._clock()
        self._fleet.again_at = None
        self._tell_transitions()
        late = self._deadlines.late(now)
        seen = self._fleet.seen()
        views = {name: view_of(item.node, item.pulse, late=late) for name, item in seen.items()}
        self._deadlines.observe((replica for view in views.values() for replica in view.replicas), now)
        await self._handoff_pools.reconcile(pool_names_without_pool(seen, self._fleet.pools, self._namespace))

        resolutions, pools = self._resolve(resolver, seen, now)
        decided = plan(pools.values(), views.values(), known=frozenset(self._fleet.pools))
        await self._assignments.write(decided, pools)
        told = (item.node for item in seen.values() if item.pulse.liveness is Liveness.FRESH)
        await self._assignments.stop(self._strays.observe(told, now), self._namespace)
        await self._write_nodes()
        deferred = await self._pool_status.write(resolutions, decided)
        self._wake_at = self._next_wake(self._clock(), deferred)

    def _resolve(
        self, resolver: Resolver, seen: dict[str, Seen], now: float
    ) -> tuple[dict[PoolKey, Resolution], dict[PoolKey, PoolView]]:
        agents = {
            name: Agent(item.base_url, item.node.status.agent.boot_id)
            for name, item in sorted(seen.items())
            if item.base_url and item.pulse.liveness is Liveness.FRESH
        }
        resolutions: dict[PoolKey, Resolution] = {}
        pools: dict[PoolKey, PoolView] = {}
        measured = merged([item.node.status.measured for item in seen.values()])
        wants: set[Want] = set()
        for key, pool in self._fleet.pools.items():
            if pool.spec.model.source == HANDOFF_SOURCE:
                resolutions[key] = Resolution(None)
                continue
            wants.add(want_of(pool))
            resolutions[key], holders = resolver.resolve(pool, agents, now)
            if (model := resolutions[key].model) is not None:
                pools[key] = self._pool_view(key, pool, revision_of(pool.spec, model), resolutions[key], holders, measured)
        resolver.keep(wants)
        return resolutions, pools

    def _pool_view(
        self,
        key: PoolKey,
        pool: GPUPool,
        revision: str,
        resolution: Resolution,
        holders: frozenset[str] | None,
        measured: Mapping[str, int],
    ) -> PoolView:
        assert resolution.model is not None
        spec = pool.spec
        return PoolView(
            key=key,
            order=pool.metadata.creation_timestamp,
            revision=revision,
            replicas=spec.replicas,
            slots=spec.slots,
            context_tokens=spec.context_tokens,
            kv_cache_type=spec.engine.kv_cache_type,
            engine_args=tuple(spec.engine.args),
            placement=spec.placement,
            shape=resolution.model.shape,
            digest=resolution.model.digest,
            model_size=resolution.model.size_mib,
            must_fetch=holders is None,
            present_on=holders,
            source=assigned_source(spec, resolution.model),
            missing_because=f"MODEL_NOT_AVAILABLE: {spec.model.source} is not on this node",
            stated_mib=spec.engine.vram_mib or 0,
            fitted_mib=resolution.model.vram_mib,
            measured=measured,
            unfit=self._deadlines.unfit(key, revision),
        )

    async def _write_nodes(self) -> None:
        for name, item in self._fleet.seen().items():
            found: list[Condition] = conditions_of(item.node, item.pulse)
            patch = node_patch(item.node, phase_of(item.node, item.pulse), found, wall_clock())
            if not patch:
                continue
            try:
                written = await self._store.patch_status(
                    GPUNode, Key("", name), patch, field_manager=FIELD_MANAGER, uid=item.node.metadata.uid
                )
            except NotFound:
                self._next_relist = 0.0
            except StoreError as error:
                log.warning("could not write the status of node %s: %s", name, error)
                self._fleet.look_again()
            else:
                self._fleet.wrote(written)
                self._tell_strangers(item.node)

    def _tell_transitions(self) -> None:
        moved, self._fleet.transitions = self._fleet.transitions, []
        for transition in moved:
            node = self._fleet.nodes.get(transition.node)
            if node is not None:
                self._tell(node, transition)

    def _tell(self, node: GPUNode, transition: Transition) -> None:
        after = transition.after
        if after >= Liveness.OFFLINE:
            change = f"{transition.before.name.capitalize()} → {after.name.capitalize()}"
            text = f"{transition.node}: {change}, last beat {transition.silent_for:.1f} s ago"
            self._events.emit(node, warning=True, reason=f"Node{after.name.capitalize()}", message=text)
        elif after is Liveness.FRESH and transition.before >= Liveness.OFFLINE:
            self._events.emit(node, warning=False, reason="NodeOnline", message=f"{transition.node} beats again")

    def _tell_strangers(self, before: GPUNode) -> None:
        """`before` is the node whose conditions were just written anew: what it said, and what its devices show."""
        known, strangers = said_unmanaged(before), unmanaged(before)
        if strangers and not known:
            mib = ", ".join(f"{mib:,} MiB on {uuid}" for uuid, mib in strangers.items())
            text = f"{before.metadata.name}: {mib} in use that no pod explains"
            self._events.emit(before, warning=True, reason="UnmanagedMemory", message=text)
        elif known and not strangers:
            text = f"{before.metadata.name}: all device memory in use is explained again"
            self._events.emit(before, warning=False, reason="MemoryExplained", message=text)

    def _next_wake(self, now: float, deferred: float | None) -> float | None:
        known = (self._deadlines.next_change(now), self._strays.next_change(now), self._fleet.again_at)
        times = (*known, deferred, self._refresh_due(now))
        return min((time for time in times if time is not None), default=None)

    def _refresh_due(self, now: float) -> float | None:
        """Unresolved and unplaced pools are looked at again every few seconds; the resolver has its own backoff."""
        waiting = any(pool.status.unplaced or pool.status.model is None for pool in self._fleet.pools.values())
        return now + 2.0 if waiting else now + 30.0


def _random_suffix() -> str:
    return "".join(secrets.choice("bcdfghjklmnpqrstvwxz2456789") for _ in range(5))
