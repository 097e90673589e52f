"""The engines of this node as every part of the agent sees them: engines write it, front door and publisher read it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass, field

from llorch_api import ReplicaOrigin, ReplicaState

from .core.slots import Lease, SlotTable


@dataclass(slots=True)
class Replica:
    """One engine. Only `Replicas` changes `state`, so that no change goes unseen."""

    id: str
    pool: str
    origin: ReplicaOrigin
    namespace: str = ""
    revision: str = ""
    model: str = ""
    """Digest or path of the model it runs."""
    base_url: str = ""
    """`http://127.0.0.1:PORT` of the engine; empty until it is launched."""
    slots: SlotTable = field(default_factory=lambda: SlotTable(0))
    state: ReplicaState = ReplicaState.PENDING
    since: float = 0.0
    """Wall clock of the last change of state, seconds since the epoch; for display."""
    message: str = ""
    progress_percent: int = 0
    restarts: int = 0
    devices: dict[str, int] = field(default_factory=dict)
    """MiB promised per device UUID."""
    vram_mib: int = 0
    """Memory measured on its devices, MiB; 0 while unknown."""
    pid: int = 0
    memory_key: str = ""
    """Under which the memory that it takes is remembered."""

    @property
    def serving(self) -> bool:
        """True while the front door may grant leases."""
        return self.state is ReplicaState.READY


class Replicas:
    """All replicas of the node, by id, with a version that any change raises."""

    def __init__(self) -> None:
        self._replicas: dict[str, Replica] = {}
        self._version = 0
        self._changed = asyncio.Event()

    def __iter__(self) -> Iterator[Replica]:
        return iter(sorted(self._replicas.values(), key=lambda replica: replica.id))

    def __len__(self) -> int:
        return len(self._replicas)

    @property
    def version(self) -> int:
        """Raised by every change."""
        return self._version

    def get(self, replica_id: str) -> Replica | None:
        """The replica of that id."""
        return self._replicas.get(replica_id)

    def put(self, replica: Replica) -> None:
        """Adds or replaces a replica."""
        self._replicas[replica.id] = replica
        self.touch()

    def remove(self, replica_id: str) -> None:
        """Forgets a replica; unknown ids are fine."""
        if self._replicas.pop(replica_id, None) is not None:
            self.touch()

    def move(self, replica: Replica, state: ReplicaState, now: float, message: str = "") -> None:
        """Changes the state of a replica at wall clock `now`."""
        if (replica.state, replica.message) == (state, message):
            return
        if replica.state is not state:
            replica.since = now
        replica.state, replica.message = state, message
        self.touch()

    def lease(self, replica: Replica) -> Lease | None:
        """A slot lease, or None when the replica is full, draining or not ready."""
        lease = replica.slots.acquire() if replica.serving else None
        if lease is not None:
            self.touch()
        return lease

    def release(self, replica: Replica, lease: Lease) -> None:
        """Gives a lease back, once the engine's slot is really free."""
        if replica.slots.release(lease):
            self.touch()

    def touch(self) -> None:
        """Raises the version and wakes who waits for a change."""
        self._version += 1
        self._changed.set()
        self._changed = asyncio.Event()

    async def wait_beyond(self, version: int) -> int:
        """Returns the current version as soon as it is not `version` any more."""
        while self._version == version:
            await self._changed.wait()
        return self._version
