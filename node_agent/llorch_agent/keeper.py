"""One replica, kept as its handoff file wants it: launched, adopted, replaced, drained, ended."""

from __future__ import annotations

import asyncio
import logging
import os
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Final

from llorch_api import ReplicaOrigin, ReplicaState

from .core.adoption import Answer, Health, Unusable, judge
from .core.endings import MAX_MESSAGE, Ending, EndKind
from .core.handoff import Adopt, Launch, same_engine
from .core.slots import SlotTable
from .core.supervision import GiveUp, Limits, Record, after_end
from .engine_binary import EngineCommand, EngineNotFoundError
from .engine_probe import EngineProbe
from .engine_start import EngineFailedError, Started, Starter, ending_of, load_deadline_s
from .processes import stat_of
from .replicas import Replica, Replicas

log = logging.getLogger(__name__)

PROBE_INTERVAL_S = 2.0
"""Between probes of an adopted engine. Each restarts the timer by which llama-server notices clients that left (1 s)."""

FIRST_PROBE_INTERVAL_S: Final = 0.1
"""Between the first probes of an engine that does not answer yet; each is half as long again, up to PROBE_INTERVAL_S."""

HEALTH_INTERVAL_S = 5.0
HEALTH_FAILURES: Final = 3
"""Failed health checks in a row after which a launched engine that hangs is ended."""

RETRY_S: Final = 1.0
"""Between looks for a model file or an engine that is missing."""


@dataclass(frozen=True, slots=True)
class Workshop:
    """What all keepers of one agent share."""

    replicas: Replicas
    starter: Starter
    probe: EngineProbe
    engine: Callable[[], Awaitable[EngineCommand]]
    """The engine to launch. Raises EngineNotFoundError."""
    limits: Limits
    random: random.Random

    def launched_at(self, url: str) -> str:
        """The replica whose engine this agent launched at `url`, or nothing."""
        launched = (replica for replica in self.replicas if replica.origin is not ReplicaOrigin.ADOPTED)
        return next((replica.id for replica in launched if replica.base_url == url), "")


class Keeper:
    """Owns one replica id. `want` says what it should be, `run` makes it so until nothing is wanted."""

    def __init__(self, replica_id: str, workshop: Workshop) -> None:
        self.id = replica_id
        self._workshop = workshop
        self._replicas = workshop.replicas
        self._want: Launch | Adopt | None = None
        self._patient = True
        """False when nobody waits for requests in flight any more."""
        self._draining = False
        self._drain_deadline_s = 0
        self._changed = asyncio.Event()
        self._replica: Replica | None = None

    @property
    def wanted(self) -> Launch | Adopt | None:
        """The latest word on what the replica should be."""
        return self._want

    def want(self, entry: Launch | Adopt | None) -> None:
        """Says what the replica should be; None ends it once its requests are done."""
        if entry is not None:
            self._patient = True
        if isinstance(entry, Launch):
            self._drain_deadline_s = entry.drain_deadline_s
        if entry != self._want:
            self._want = entry
            self._changed.set()

    def abandon(self) -> None:
        """Ends it now, with the requests in flight."""
        self._patient = False
        self._want = None
        self._changed.set()

    async def run(self) -> None:
        """Returns once nothing is wanted and nothing is left."""
        try:
            while (want := self._want) is not None:
                if isinstance(want, Launch):
                    await self._keep_launched(want)
                else:
                    await self._keep_adopted(want)
        finally:
            if self._replica is not None:
                self._replica.slots.close()
                self._move(self._replica, ReplicaState.STOPPED)
                self._replicas.remove(self.id)

    async def drain(self, deadline_s: float) -> bool:
        """Grants no more leases and waits for those that are out. False when some still were after `deadline_s`."""
        self._draining = True
        replica = self._replica
        if replica is None:
            return True
        replica.slots.close()
        if replica.state is not ReplicaState.FAILED:
            self._move(replica, ReplicaState.DRAINING)
        return await self._emptied(replica, deadline_s)

    def resume(self) -> None:
        """Takes a drain back."""
        self._draining = False
        self._changed.set()
        replica = self._replica
        if replica is not None and self._want is not None:
            replica.slots.reopen()
            if replica.state is ReplicaState.DRAINING:
                self._move(replica, ReplicaState.READY if replica.base_url else ReplicaState.PENDING)

    # ---- launched

    async def _keep_launched(self, launch: Launch) -> None:
        replica = self._put(
            Replica(
                id=self.id,
                pool=launch.pool,
                origin=launch.origin,
                namespace=launch.namespace,
                revision=launch.revision,
                model=launch.digest or launch.model_path,
                slots=SlotTable(launch.slots),
                devices=dict(launch.devices),
                memory_key=launch.memory_key,
            )
        )
        record = Record()
        while self._wanted(launch):
            if self._draining:
                await self._pause(RETRY_S)
                continue
            replica.slots.reopen()
            if not os.path.exists(launch.model_path):
                self._pending(replica, f"model file {launch.model_path} is missing; the engine starts when it is there")
                await self._pause(RETRY_S)
                continue
            try:
                command = await self._workshop.engine()
            except EngineNotFoundError as error:
                self._pending(replica, str(error))
                await self._pause(RETRY_S)
                continue
            life = await self._one_life(replica, launch, command)
            if life is None:
                return
            ending, ready_at = life
            spread = self._workshop.random.uniform(-1, 1)
            now = asyncio.get_running_loop().time()
            record, decision = after_end(record, ending, ready_at, now, spread, self._workshop.limits)
            replica.restarts = record.restarts
            if isinstance(decision, GiveUp):
                log.error("%s: %s", self.id, decision.message)
                self._move(replica, ReplicaState.FAILED, decision.message[:MAX_MESSAGE])
                await self._until_model_changes(launch)
                record = Record(restarts=record.restarts)
            else:
                log.warning("%s: %s; starting again in %.1f s", self.id, decision.message, decision.delay_s)
                self._pending(replica, f"starts again in {decision.delay_s:.0f} s: {decision.message}")
                await self._pause(decision.delay_s)

    async def _one_life(self, replica: Replica, launch: Launch, command: EngineCommand) -> tuple[Ending, float | None] | None:
        """From the start of an engine to its end: why it ended and since when it was ready. None: ended because unwanted."""
        try:
            started = await self._load(replica, launch, command)
        except EngineFailedError as error:
            return error.ending, None
        if started is None:
            return None
        ready_at = asyncio.get_running_loop().time()
        ended = asyncio.ensure_future(started.process.ended())
        failures = 0
        try:
            replica.base_url = started.base_url
            self._ready(replica)
            while True:
                woken = await self._either(ended, seconds=HEALTH_INTERVAL_S)
                if ended.done():
                    return ending_of(started.process, launch), ready_at
                if not self._wanted(launch):
                    if await self._let_go(replica, launch, ended):
                        return None
                elif not woken:
                    await asyncio.to_thread(started.process.log.rotate)
                    answer = await self._workshop.probe.ask(started.base_url)
                    failures = 0 if answer.health is Health.UP else failures + 1
                    if failures >= HEALTH_FAILURES:
                        reason = f"failed {failures} health checks: {answer.reason or answer.health}"
                        return Ending(EndKind.UNHEALTHY, reason), ready_at
        finally:
            ended.cancel()
            replica.base_url, replica.pid = "", 0
            if replica.state is ReplicaState.READY:
                self._move(replica, ReplicaState.PENDING, "the engine has ended")
            await started.process.stop()

    async def _load(self, replica: Replica, launch: Launch, command: EngineCommand) -> Started | None:
        """Starts an engine; None when it is not wanted any more before it is ready."""
        self._move(replica, ReplicaState.LOADING)

        def on_pid(pid: int) -> None:
            replica.pid = pid

        starting = asyncio.ensure_future(
            self._workshop.starter.start(command, launch, load_deadline_s(launch.model_path), on_pid)
        )
        try:
            while not starting.done() and self._wanted(launch):
                await self._either(starting)
        finally:
            if not starting.done():
                starting.cancel()
                await asyncio.wait([starting])
        return None if starting.cancelled() else starting.result()

    async def _let_go(self, replica: Replica, launch: Launch, ended: asyncio.Future[None]) -> bool:
        """Drains an engine that is not wanted any more. False when it is wanted again, or ended meanwhile."""
        replica.slots.close()
        self._move(replica, ReplicaState.DRAINING)
        emptied = asyncio.ensure_future(self._emptied(replica, self._drain_deadline_s))
        try:
            while not emptied.done() and not ended.done() and self._patient and not self._wanted(launch):
                await self._either(emptied, ended)
        finally:
            emptied.cancel()
        if ended.done():
            return False
        if self._wanted(launch):
            if not self._draining:
                replica.slots.reopen()
            self._ready(replica)
            return False
        if replica.slots.in_use:
            log.warning("%s: ending the engine with %d requests in flight", self.id, replica.slots.in_use)
        return True

    async def _until_model_changes(self, launch: Launch) -> None:
        """What failed for good is tried again when its file is written anew; an assigned replica is placed elsewhere instead."""
        before = _signature(launch.model_path)
        while self._wanted(launch):
            await self._pause(RETRY_S)
            if launch.origin is not ReplicaOrigin.ASSIGNED and _signature(launch.model_path) != before:
                return

    # ---- adopted

    async def _keep_adopted(self, adopt: Adopt) -> None:
        replica = self._put(self._adopted(adopt, adopt.slots or 0))
        self._pending(replica, f"waiting for {adopt.url}")
        interval, doubts = FIRST_PROBE_INTERVAL_S, 0
        while self._wanted(adopt):
            answer = await self._asked(adopt.url)
            if answer is None:
                continue
            verdict = judge(adopt, answer, _alive(adopt.pid), self._workshop.launched_at(adopt.url))
            if isinstance(verdict, Unusable):
                doubts += 1
                if replica.serving and (verdict.at_once or doubts > 1):
                    log.warning("%s: %s", self.id, verdict.reason)
                    interval = FIRST_PROBE_INTERVAL_S
                if not replica.serving or verdict.at_once or doubts > 1:
                    replica.base_url = ""
                    self._pending(replica, verdict.reason)
                await self._pause(interval)
                interval = min(interval * 1.5, PROBE_INTERVAL_S)
                continue
            if verdict.slots != replica.slots.total:
                # Another table: a lease of the old one must not come back into the new one.
                replica = self._put(self._adopted(adopt, verdict.slots))
            doubts, interval = 0, FIRST_PROBE_INTERVAL_S
            replica.base_url = adopt.url
            self._ready(replica)
            await self._pause(PROBE_INTERVAL_S)

    async def _asked(self, url: str) -> Answer | None:
        """The engine's answer, or None when something else is wanted before it comes."""
        asking = asyncio.ensure_future(self._workshop.probe.ask(url))
        try:
            await self._either(asking)
            return asking.result() if asking.done() else None
        finally:
            asking.cancel()

    def _adopted(self, adopt: Adopt, slots: int) -> Replica:
        return Replica(
            id=self.id,
            pool=adopt.pool,
            origin=ReplicaOrigin.ADOPTED,
            revision=adopt.revision,
            model=adopt.model_path,
            slots=SlotTable(slots),
            pid=adopt.pid,
        )

    # ---- both

    def _wanted(self, entry: Launch | Adopt) -> bool:
        return self._want is not None and same_engine(self._want, entry)

    def _put(self, replica: Replica) -> Replica:
        replica.since = time.time()
        if self._replica is not None:
            self._replica.slots.close()
        if self._draining:
            replica.slots.close()
        self._replica = replica
        self._replicas.put(replica)
        return replica

    def _move(self, replica: Replica, state: ReplicaState, message: str = "") -> None:
        self._replicas.move(replica, state, time.time(), message)

    def _ready(self, replica: Replica) -> None:
        self._move(replica, ReplicaState.DRAINING if self._draining else ReplicaState.READY)

    def _pending(self, replica: Replica, message: str) -> None:
        self._move(replica, ReplicaState.DRAINING if self._draining else ReplicaState.PENDING, message[:MAX_MESSAGE])

    async def _emptied(self, replica: Replica, deadline_s: float) -> bool:
        try:
            async with asyncio.timeout(deadline_s):
                while replica.slots.in_use:
                    await self._replicas.wait_beyond(self._replicas.version)
        except TimeoutError:
            return replica.slots.in_use == 0
        return True

    async def _pause(self, seconds: float) -> None:
        """Sleeps, unless something else is wanted meanwhile."""
        try:
            async with asyncio.timeout(seconds):
                await self._changed.wait()
        except TimeoutError:
            return
        self._changed.clear()

    async def _either(self, *futures: asyncio.Future[Any], seconds: float | None = None) -> bool:
        """Waits for one of `futures`, for another wish, or `seconds`. True when there was a wish."""
        wish = asyncio.ensure_future(self._changed.wait())
        try:
            await asyncio.wait([*futures, wish], timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        finally:
            wish.cancel()
        woken = self._changed.is_set()
        self._changed.clear()
        return woken


def _alive(pid: int) -> bool:
    found = stat_of(pid) if pid else None
    return found is not None and found.alive


def _signature(path: str) -> tuple[int, ...]:
    try:
        found = os.stat(path)
    except OSError:
        return ()
    return (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)
