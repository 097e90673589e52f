"""The agents behind the pools: their slot streams, their health, and the requests that wait for them."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import msgspec

from llorch_api import ReplicaState
from llorch_web.auth import Tokens
from llorch_web.sse import EventSplitter, EventTooLong, data_of
from llorch_web.upstream import Abandoned, BadResponse, ConnectFailed, Exchange, Upstream, UpstreamError, split_url

from .core.health import AgentHealth
from .core.picker import Candidate, SlotReport, candidate
from .core.pools import EndpointView, PoolTable
from .metrics import GatewayMetrics

log = logging.getLogger("llorch.gateway.agents")

TICK_SECONDS = 0.1
STREAM_SILENCE_SECONDS = 5.0
"""A slot stream silent for so long is opened again."""
GIVE_UP_SECONDS = 15.0
"""A request at an agent that has been ejected for so long ends, even where nobody else could take it."""
FIRST_BACKOFF, LAST_BACKOFF = 0.05, 1.0
CONNECT_SECONDS = 1.0


class _Slots(msgspec.Struct):
    free: int
    total: int
    state: str


_DECODER = msgspec.json.Decoder(dict[str, _Slots])


class AgentLink:
    """One agent as this gateway knows it. Raises ValueError for a base URL that is none."""

    def __init__(self, base: str, owner: Agents) -> None:
        self.base = base
        self.address, self.prefix = split_url(base)
        self._owner = owner
        self.health = AgentHealth(owner.clock())
        self._reports: dict[str, SlotReport] | None = None
        self._own: Counter[str] = Counter()
        self._unreported: Counter[str] = Counter()
        self._waiting: dict[Exchange, Callable[[], bool] | None] = {}
        self._said = ""

    def candidate(self, endpoint: EndpointView, *, kept: bool) -> Candidate | None:
        """`endpoint` as a candidate for a request, None where this agent says that it is not ready."""
        report = None
        if self._reports is not None:
            report = self._reports.get(endpoint.replica) or SlotReport(0, 0, ready=False)
        return candidate(
            endpoint,
            report,
            own=self._own[endpoint.replica],
            unreported=self._unreported[endpoint.replica],
            ejected=self.health.ejected,
            kept=kept,
        )

    @contextmanager
    def sending(self, replica: str) -> Iterator[None]:
        """Counts a request of ours to `replica` while it lasts."""
        self._own[replica] += 1
        self._unreported[replica] += 1
        try:
            yield
        finally:
            self._own[replica] -= 1
            if self._own[replica] <= 0:
                del self._own[replica]

    @contextmanager
    def watching(self, exchange: Exchange, elsewhere: Callable[[], bool]) -> Iterator[None]:
        """Abandons `exchange` when this agent is ejected and the request can go elsewhere, or after GIVE_UP_SECONDS."""
        self._waiting[exchange] = elsewhere
        try:
            yield
        finally:
            del self._waiting[exchange]

    def begun(self, exchange: Exchange) -> None:
        """The answer has begun: it cannot go elsewhere any more."""
        self._waiting[exchange] = None

    def connect_failed(self, error: ConnectFailed) -> None:
        """A request could not be sent."""
        if self.health.failed(self._owner.clock()):
            self._ejected("connect", str(error))

    def look(self, now: float, excused: float) -> None:
        """Ejects the agent for its silence, and sees to the requests that wait for an ejected one."""
        if excused:
            self.health.excuse(excused)
        if self.health.look(now):
            self._ejected("silent", f"agent {self.base} went silent")
        elif self.health.ejected:
            self._review()

    async def follow(self) -> None:
        """Reads the agent's slot stream, again and again."""
        pause = FIRST_BACKOFF
        while True:
            try:
                if await self._read():
                    pause = FIRST_BACKOFF
            except ConnectFailed as error:
                self.connect_failed(error)
            except (UpstreamError, EventTooLong, msgspec.DecodeError) as error:
                self._say(f"slot stream: {error}")
            await asyncio.sleep(pause * (0.8 + 0.4 * self._owner.draw()))
            pause = min(LAST_BACKOFF, pause * 2)

    async def _read(self) -> bool:
        """One connection. Returns whether a message came before the agent ended the stream."""
        splitter, heard = EventSplitter(), False
        headers = [("Accept", "text/event-stream"), *self._owner.tokens.headers()]
        target = f"{self.prefix}/replicas/slots"
        async with await self._owner.upstream.send(
            self.address, "GET", target, headers, reuse=False, idle_timeout=STREAM_SILENCE_SECONDS
        ) as exchange:
            if (status := await exchange.head()) != 200:
                raise BadResponse(f"{self.address} answered {status} to {target}")
            async for chunk in exchange:
                for event in splitter.feed(chunk):
                    if (data := data_of(event)) is not None:
                        self._take(_DECODER.decode(data))
                        heard = True
        return heard

    def _take(self, slots: dict[str, _Slots]) -> None:
        self._reports = {
            replica: SlotReport(each.free, each.total, each.state == ReplicaState.READY) for replica, each in slots.items()
        }
        self._unreported.clear()
        self._said = ""
        if self.health.heard(self._owner.clock()):
            log.info("agent %s is back", self.base)

    def _ejected(self, reason: str, message: str) -> None:
        log.warning("ejected: %s", message)
        self._owner.metrics.ejection(reason)
        self._review()

    def _review(self) -> None:
        given_up = self.health.ejected_for(self._owner.clock()) >= GIVE_UP_SECONDS
        for exchange, elsewhere in list(self._waiting.items()):
            if given_up or (elsewhere is not None and elsewhere()):
                exchange.abandon(Abandoned(f"agent {self.base} does not answer"))

    def _say(self, message: str) -> None:
        if message != self._said:
            self._said = message
            log.warning("%s", message)


class Agents:
    """All agents of the pools that are served. `run` keeps a slot stream to each."""

    def __init__(
        self,
        upstream: Upstream,
        tokens: Tokens,
        metrics: GatewayMetrics,
        *,
        clock: Callable[[], float],
        draw: Callable[[], float],
    ) -> None:
        self.upstream = upstream
        self.tokens = tokens
        self.metrics = metrics
        self.clock = clock
        self.draw = draw
        self._links: dict[str, AgentLink | None] = {}
        self._wanted: set[str] = set()
        self._changed = asyncio.Event()

    def link(self, base: str) -> AgentLink | None:
        """The agent at `base`; None for a base URL that cannot be used."""
        if base not in self._links:
            try:
                self._links[base] = AgentLink(base, self)
            except ValueError as error:
                log.warning("an endpoint is left out: %s", error)
                self._links[base] = None
        return self._links[base]

    def want(self, table: PoolTable) -> None:
        """Follows exactly the agents of `table` from now on."""
        self._wanted = table.agents()
        self._changed.set()

    async def run(self) -> None:
        """Works until it is cancelled."""
        tasks: dict[str, asyncio.Task[None]] = {}
        async with asyncio.TaskGroup() as group:
            group.create_task(self._tick(), name="agents' health")
            while True:
                self._changed.clear()
                for base in [base for base in tasks if base not in self._wanted]:
                    tasks.pop(base).cancel()
                for base in [base for base in self._links if base not in self._wanted]:
                    del self._links[base]
                for base in sorted(self._wanted - tasks.keys()):
                    if (link := self.link(base)) is not None:
                        tasks[base] = group.create_task(link.follow(), name=f"slots of {base}")
                await self._changed.wait()

    async def _tick(self) -> None:
        before = self.clock()
        while True:
            await asyncio.sleep(TICK_SECONDS)
            now = self.clock()
            late = now - before - TICK_SECONDS
            before = now
            links = [link for link in self._links.values() if link is not None]
            for link in links:
                link.look(now, late if late > TICK_SECONDS else 0.0)
            ejected = sum(link.health.ejected for link in links)
            self.metrics.agents.labels("ejected").set(ejected)
            self.metrics.agents.labels("alive").set(len(links) - ejected)
