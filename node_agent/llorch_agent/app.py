"""The agent: engines, front door, devices, assignments and publisher of one node, composed."""

from __future__ import annotations

import asyncio
import logging
import os
import random
import secrets
import time
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any, Final

from aiohttp import web
from prometheus_client import CollectorRegistry

from llorch_api import AgentState, AgentStatus, OwnerReference
from llorch_model.access import SourceAccess
from llorch_store import Store
from llorch_store.default import default_store
from llorch_web.settings import StartError

from .assignments import Assignments
from .core.handoff import UrlPolicy
from .core.heartbeat import Heartbeat, Pace
from .core.readings import SystemReading
from .core.snapshot import Facts, ModelFile, ReplicaFacts, compose
from .devices import CpuSource, Devices, DeviceSource, FirstOf
from .engines import Engines, EngineSettings
from .fit_params import FitParams
from .frontdoor import LAST_WORDS_SECONDS, FrontDoor
from .inspect_route import InspectRoute
from .log_route import LogRoute
from .measured import Measurements
from .metrics import AgentMetrics
from .model_cache import ModelCache
from .model_roots import ModelRoots
from .node_facts import KnownNode, NodeFactsSource, StaticFacts
from .pod_resources import PodResources, WithHolders
from .pool_entries import PROGRESS_STEP, PoolEntries
from .publisher import Publisher, timestamp
from .replicas import Replicas
from .settings import AgentSettings
from .system import read_system

if TYPE_CHECKING:
    from .lease_kubernetes import NodeLease

log = logging.getLogger(__name__)

READ_INTERVAL_S: Final = 10.0
"""Between two readings of devices, memory, disk and model files."""
CLEAR_INTERVAL_S: Final = 3600.0
"""Between two looks for what broken downloads left."""
FACTS_INTERVAL_S: Final = 60.0
"""Between two looks at the Kubernetes Node: at 5,000 nodes that is 83 reads a second for all of them."""
CALM_S: Final = 0.02
TELL_S: Final = 1.0
"""How long the end of the agent may wait for one write of its state."""


class Agent:
    """One node's agent. `start`, then `wait` or `stop`; or `run`, which does all three."""

    def __init__(
        self,
        settings: AgentSettings,
        store: Store,
        *,
        devices: DeviceSource | None = None,
        facts: NodeFactsSource | None = None,
    ) -> None:
        self.settings = settings
        in_cluster = (settings.store or default_store(os.environ)) == "kubernetes"
        draw = random.Random()
        roots = ModelRoots(settings.roots(in_cluster=in_cluster))
        handoffs = settings.runtime_dir.absolute()
        self.replicas = Replicas()
        self._engines = Engines(
            self.replicas,
            handoffs,
            EngineSettings(
                engine=settings.engine or "",
                interval_s=settings.watch_interval_ms / 1000,
                urls=UrlPolicy(own_addresses=settings.own_hosts),
            ),
        )
        self.registry = CollectorRegistry()
        self._front_door = FrontDoor(self.replicas, node_id=settings.node_id, registry=self.registry)
        access = SourceAccess(settings.allow_private_sources, settings.hf_token_file)
        self._inspect = InspectRoute(roots, access, FitParams(settings.engine or ""))
        self._models = ModelCache(settings.models, handoffs, settings.model_cache_mib)
        self._logs = LogRoute(self._engines.logs, self.replicas)
        self._facts_source = facts or _facts_source(settings, in_cluster)
        self._lease = _lease(settings, in_cluster)
        self._publisher = Publisher(
            store,
            settings.node_id,
            Heartbeat(
                Pace(interval=float(settings.heartbeat_interval_secs)), draw.random, lease=settings.heartbeat_mode == "lease"
            ),
            self.snapshot,
            owner=self._owner,
            lease=self._lease,
        )
        self._entries = PoolEntries(store, settings.node_id, self.replicas, draw)
        self._memory = Measurements(settings.models)
        self._devices = Devices(
            devices or _device_source(settings, in_cluster), self.replicas, changed=self._publisher.poke, memory=self._memory
        )
        self._assignments = Assignments(
            store,
            settings.node_id,
            self.replicas,
            self._engines,
            handoffs=handoffs,
            models=settings.models,
            roots=roots,
            draw=draw,
            gone=self._publisher.register_again,
            access=access,
            cache=self._models.policy,
        )
        self._models.assigned = lambda: self._assignments.assigned
        self._known = KnownNode()
        self._system = SystemReading()
        self._stored: Sequence[ModelFile] = ()
        self._state = AgentState.RUNNING
        self._address = settings.advertised
        self._boot_id = secrets.token_hex(8)
        self._started_at = timestamp(time.time())
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._owner_task: asyncio.Task[None] | None = None
        self._stopping = False
        self.registry.register(AgentMetrics(settings.node_id, self._devices, self.replicas, self._publisher))

    # ---- for the application that it is part of

    def routes(self) -> list[web.AbstractRouteDef]:
        """Front door, logs and inspection; /health and /metrics are the application's own."""
        return [*self._front_door.routes(), *self._logs.routes(), *self._inspect.routes()]

    def advertise(self, url: str) -> None:
        """Says where the agent is reached, once that is known. A configured POOL_MANAGERD_ADDRESS stays."""
        if self.settings.address is None:
            self._address = url.rstrip("/")

    def beat_every(self, seconds: float) -> None:
        """What the control plane asks for; a shorter interval of the settings stays."""
        self._publisher.beat_every(seconds)

    def health(self) -> str:
        """Why the agent is not healthy; empty when it is. A store that is away is no reason: engines serve without it."""
        if self._owner_task is None:
            return "not started"
        return "ended" if self._owner_task.done() and not self._stopping else ""

    # ---- life

    async def start(self) -> None:
        """Begins to work and returns at once."""
        self._owner_task = asyncio.create_task(self._work(), name="agent")

    async def wait(self) -> None:
        """Returns when the agent was stopped, and raises what ended it otherwise."""
        if self._owner_task is not None:
            await asyncio.wait([self._owner_task])
            if not self._owner_task.cancelled():
                self._owner_task.result()

    async def run(self, stop: asyncio.Event) -> None:
        """Works until `stop` is set. When a part dies, engines are ended and its error is raised."""
        await self.start()
        asked = asyncio.create_task(stop.wait())
        try:
            assert self._owner_task is not None
            await asyncio.wait({asked, self._owner_task}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            asked.cancel()
            await self.stop()

    async def stop(self, drain_s: float | None = None) -> None:
        """Ends it in order: no new leases, requests in flight get `drain_s` (default: the setting), engines end, and the
        store is told. Cancelling it skips the waiting, not the end of the engines. Raises what had ended the agent before."""
        if self._owner_task is None:
            return
        self._stopping = True
        self._state = AgentState.DRAINING
        try:
            if not self._owner_task.done():
                await self._end_parts("assignments", "entries", "watch")
                deadline = self.settings.drain_secs if drain_s is None else drain_s
                # The front door ends what outlasts the deadline; engines wait a little longer, for its last words.
                drains = [self._engines.drain(replica.id, deadline + LAST_WORDS_SECONDS) for replica in self.replicas]
                told = self._publisher.tell(AgentState.DRAINING, TELL_S)
                await asyncio.gather(told, self._front_door.shutdown(deadline), *drains)
        finally:
            await self._end()

    async def _end(self) -> None:
        assert self._owner_task is not None
        self._logs.end()
        if self._owner_task.done():
            await self._front_door.shutdown(0.0)
        else:
            await self._engines.close()
            self._state = AgentState.STOPPED
            if "publisher" in self._tasks:
                await self._say_goodbye()
            self._owner_task.cancel()
            await asyncio.wait([self._owner_task])
        await self._devices.close()
        await self._facts_source.close()
        if self._lease is not None:
            await self._lease.close()
        if not self._owner_task.cancelled():
            self._owner_task.result()

    async def _say_goodbye(self) -> None:
        try:
            async with asyncio.timeout(TELL_S):
                await self._entries.finish()
        except TimeoutError:
            log.warning("the pools were not told in time that this node's replicas are gone")
        if not await self._publisher.tell(AgentState.STOPPED, 2 * TELL_S):
            log.warning("the store was not told in time that this agent has stopped; the node will be found silent")

    async def _end_parts(self, *names: str) -> None:
        tasks = [self._tasks[name] for name in names if name in self._tasks]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    async def _work(self) -> None:
        async with asyncio.TaskGroup() as group:

            def part(name: str, work: Coroutine[Any, Any, None]) -> None:
                self._tasks[name] = group.create_task(self._endless(name, work), name=name)

            part("engines", self._engines.run())
            await asyncio.gather(self._devices.read(), self._read_facts(), self._read_system(), self._clear_models())
            part("devices", self._devices.run(READ_INTERVAL_S))
            part("system", self._every(READ_INTERVAL_S, self._read_system))
            part("models", self._every(CLEAR_INTERVAL_S, self._clear_models))
            part("facts", self._every(FACTS_INTERVAL_S, self._read_facts))
            part("watch", self._watch_replicas())
            part("assignments", self._assignments.run())
            part("entries", self._entries.run())
            part("publisher", self._publisher.run())

    async def _endless(self, name: str, work: Coroutine[Any, Any, None]) -> None:
        try:
            await work
        except Exception:
            log.critical("the agent's %s failed, and the agent ends with it", name, exc_info=True)
            raise
        if not self._stopping:
            raise RuntimeError(f"the agent's {name} ended by itself")

    async def _every(self, seconds: float, work: Any) -> None:
        while True:
            await asyncio.sleep(seconds * random.uniform(0.9, 1.1))
            await work()

    async def _watch_replicas(self) -> None:
        """A transition is told at once, and devices, disk and model files are read again; slots that come and go are neither."""
        before: object = None
        version_ = self.replicas.version
        while True:
            now = [
                (replica.id, replica.state, replica.pid, replica.progress_percent // PROGRESS_STEP) for replica in self.replicas
            ]
            if now != before:
                before = now
                self._publisher.poke()
                self._entries.poke()
                await self._devices.read()
                await self._read_system()
            version_ = await self.replicas.wait_beyond(version_)
            await asyncio.sleep(CALM_S)

    # ---- what is known

    async def _read_facts(self) -> None:
        known = await self._facts_source.read()
        if known is None:
            return
        found_owner = known.uid != self._known.uid and self._publisher.registered
        self._known = known
        if found_owner:
            self._publisher.register_again()

    async def _read_system(self) -> None:
        def read() -> tuple[SystemReading, list[ModelFile]]:
            system = read_system(self.settings.models)
            return replace(system, disk_free=self._models.room_mib(system.disk_free)), self._models.files()

        self._system, self._stored = await asyncio.to_thread(read)

    async def _clear_models(self) -> None:
        await asyncio.to_thread(self._models.clear)

    def _owner(self) -> OwnerReference | None:
        if not self._known.uid:
            return None
        return OwnerReference(api_version="v1", kind="Node", name=self.settings.node_id, uid=self._known.uid)

    def snapshot(self) -> Mapping[str, Any]:
        """The agent's part of its GPUNode's status, as things are now; without heartbeat."""
        return compose(
            Facts(
                agent=AgentStatus(
                    version=_version(),
                    boot_id=self._boot_id,
                    address=self._address,
                    machine_id=self.settings.machine,
                    state=self._state,
                    started_at=self._started_at,
                ),
                node=self._known.facts,
                devices=self._devices.readings,
                foreign=self._devices.shares.foreign,
                system=self._system,
                replicas=[
                    ReplicaFacts(
                        id=replica.id,
                        pool=replica.pool,
                        origin=replica.origin,
                        state=replica.state,
                        slots_total=replica.slots.total,
                        slots_free=replica.slots.free,
                        revision=replica.revision,
                        progress_percent=replica.progress_percent,
                        message=replica.message,
                        restarts=replica.restarts,
                        promised=replica.devices,
                        measured=self._devices.measured.get(replica.id, {}),
                    )
                    for replica in self.replicas
                ],
                models=[*self._assignments.local_models, *self._stored],
                measured=self._memory.known,
            )
        )


def _device_source(settings: AgentSettings, in_cluster: bool) -> DeviceSource:
    if settings.devices == "cpu":
        return CpuSource()
    from .nvml import NvmlSource

    found = NvmlSource() if settings.devices == "nvml" else FirstOf(NvmlSource(), CpuSource())
    return WithHolders(found, PodResources(settings.pod_resources, expected=in_cluster), settings.pod)


def _lease(settings: AgentSettings, in_cluster: bool) -> NodeLease | None:
    if settings.heartbeat_mode == "status":
        return None
    if not in_cluster:
        raise StartError("LLORCH_HEARTBEAT_MODE=lease — must be status where LLORCH_STORE is not kubernetes")
    from .lease_kubernetes import NodeLease

    return NodeLease(settings.node_id, settings.namespace, float(settings.heartbeat_interval_secs))


def _facts_source(settings: AgentSettings, in_cluster: bool) -> NodeFactsSource:
    if not in_cluster:
        return StaticFacts(settings.node_labels)
    from .node_facts_kubernetes import KubernetesFacts

    return KubernetesFacts(settings.node_id, settings.node_labels)


def _version() -> str:
    try:
        return version("llorch")
    except PackageNotFoundError:
        return "unknown"
