"""Writes this node's GPUNode: the edge around `core.heartbeat`."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any, Final, Protocol

from llorch_api import AgentState, GPUNode, ObjectMeta, OwnerReference
from llorch_store import Key, NotFound, Store, StoreError, Unavailable

from .core.heartbeat import Heartbeat, Register, Renew, Wait, Write, WriteKind

log = logging.getLogger(__name__)

FIELD_MANAGER: Final = "llorch-agent"
REQUEST_TIMEOUT_S: Final = 5.0
"""At most, and never more than half an interval: a beat that hangs must not cost the next one."""
LOUD_AFTER: Final = 3
"""Failures in a row from which on they are errors: then the node is about to be Offline."""
CALM_S: Final = 0.02
"""Changes within so short a time go out together."""


def timestamp(seconds: float) -> str:
    """RFC 3339 in UTC, to the second: `seconds` since the epoch."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


class Renewal(Protocol):
    """A sign of life that is no write of the status."""

    async def renew(self, owner: OwnerReference | None) -> None:
        """Renews it, and makes it where it is gone. Raises StoreError."""
        ...


class Publisher:
    """Registers the node and keeps its status, one request at a time, for as long as `run` runs. No failure ends it."""

    def __init__(
        self,
        store: Store,
        node: str,
        heartbeat: Heartbeat,
        snapshot: Callable[[], Mapping[str, Any]],
        *,
        owner: Callable[[], OwnerReference | None] = lambda: None,
        lease: Renewal | None = None,
    ) -> None:
        """`lease` is what beats renew where `heartbeat.lease` says so."""
        self._store = store
        self._lease = lease
        self._key = Key("", node)
        self._heartbeat = heartbeat
        self._own_interval = heartbeat.pace.interval
        self._snapshot = snapshot
        self._owner = owner
        self._wake = asyncio.Event()
        self._answered = asyncio.Event()
        self._said = ""
        self._told_state = ""
        self._again = False
        self.outcomes: Counter[tuple[str, str]] = Counter()
        """Requests by kind (register, beat, urgent, full) and outcome (success, error)."""
        self.last_success = 0.0
        """Wall clock of the last write that succeeded."""

    @property
    def registered(self) -> bool:
        """The GPUNode exists, as far as is known."""
        return self._heartbeat.registered

    def poke(self) -> None:
        """Something may have changed that cannot wait for the beat."""
        self._wake.set()

    def register_again(self) -> None:
        """What is registered has changed, such as the owner."""
        self._again = True
        self._wake.set()

    def beat_every(self, seconds: float) -> None:
        """What the control plane asks for. A configured interval that is shorter stays: a node never beats less than it says."""
        interval = max(1.0, min(self._own_interval, seconds))
        if interval != self._heartbeat.pace.interval:
            self._heartbeat.pace = replace(self._heartbeat.pace, interval=interval)

    async def run(self) -> None:
        """Writes for ever."""
        while True:
            self._wake.clear()
            if self._again:
                self._again = False
                self._heartbeat.gone()
            match self._heartbeat.decide(time.monotonic(), self._snapshot(), timestamp(time.time())):
                case Register():
                    await self._request("register", self._register())
                case Write() as write:
                    await self._request(write.kind, self._write(write))
                case Renew():
                    await self._request(WriteKind.RENEW, self._renew())
                case Wait(until=until):
                    await self._pause(until - time.monotonic())

    async def tell(self, state: AgentState, within_s: float) -> bool:
        """True once the store has acknowledged that the agent is in `state`; the snapshot must say so already."""
        self.poke()
        try:
            async with asyncio.timeout(within_s):
                while self._told_state != state:
                    self._answered.clear()
                    await self._answered.wait()
        except TimeoutError:
            return False
        return True

    async def _pause(self, seconds: float) -> None:
        try:
            async with asyncio.timeout(max(0.0, seconds)):
                await self._wake.wait()
        except TimeoutError:
            return
        await asyncio.sleep(CALM_S)

    async def _request(self, kind: str, request: Any) -> None:
        try:
            async with asyncio.timeout(min(REQUEST_TIMEOUT_S, self._heartbeat.pace.interval / 2)):
                node: GPUNode | None = await request
        except NotFound as error:
            self._heartbeat.gone()
            self._failed(kind, error)
            if kind == "register":  # the resource itself is missing: no CRD
                self._heartbeat.failed(time.monotonic())
        except (StoreError, TimeoutError) as error:
            self._heartbeat.failed(time.monotonic(), error.retry_after if isinstance(error, Unavailable) else None)
            self._failed(kind, error)
        else:
            if node is None:
                self._heartbeat.renewed()
            else:
                status = node.status.to_json()
                self._heartbeat.done(node.metadata.uid, status)
                if kind != "register":
                    self._told_state = status.get("agent", {}).get("state", AgentState.RUNNING)
            self._succeeded(kind)

    async def _register(self) -> GPUNode:
        meta: dict[str, Any] = {"name": self._key.name}
        if (owner := self._owner()) is not None:
            meta["owner_references"] = [owner]
        return await self._store.apply(GPUNode(metadata=ObjectMeta(**meta)), field_manager=FIELD_MANAGER)

    async def _renew(self) -> None:
        if self._lease is not None:
            await self._lease.renew(self._owner())

    async def _write(self, write: Write) -> GPUNode:
        return await self._store.patch_status(GPUNode, self._key, write.patch, field_manager=FIELD_MANAGER, uid=write.uid)

    def _succeeded(self, kind: str) -> None:
        self.outcomes[kind, "success"] += 1
        self.last_success = time.time()
        if kind == "register":
            log.info("registered as GPUNode %s", self._key.name)
        elif self._said:
            log.info("GPUNode %s is written again", self._key.name)
        if kind != "register":
            self._said = ""
        self._answered.set()

    def _failed(self, kind: str, error: Exception) -> None:
        self.outcomes[kind, "error"] += 1
        self._answered.set()
        text = f"cannot {'register' if kind == 'register' else 'write'} GPUNode {self._key.name}: {error or 'no answer in time'}"
        loud = self._heartbeat.failures == LOUD_AFTER
        if text != self._said or loud:
            self._said = text
            log.log(logging.ERROR if loud else logging.WARNING, "%s%s", text, "; the node is about to be Offline" if loud else "")
