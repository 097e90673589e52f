"""The leases of requests in flight: taken all at once, given back once, counted until the node is idle."""

from __future__ import annotations

import asyncio

from llorch_api import ReplicaState
from llorch_web.errors import ApiError

from .core.slots import Lease
from .replicas import Replica, Replicas


class Hold:
    """The leases of one request. Giving them back twice does nothing."""

    __slots__ = ("_leases", "_owner", "_replica")

    def __init__(self, owner: Leases, replica: Replica, leases: list[Lease]) -> None:
        self._owner = owner
        self._replica = replica
        self._leases = leases

    def __len__(self) -> int:
        return len(self._leases)

    def release(self) -> None:
        """Gives the leases back."""
        if self._leases:
            leases, self._leases = self._leases, []
            self._owner.give_back(self._replica, leases)


class Leases:
    """Grants and counts. Refusals are ApiErrors, ready to be answered."""

    def __init__(self, replicas: Replicas) -> None:
        self._replicas = replicas
        self._out = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._closed = False

    @property
    def out(self) -> int:
        """Requests that hold leases."""
        return self._out

    @property
    def closed(self) -> bool:
        """True while the node shuts down."""
        return self._closed

    def check(self, replica: Replica) -> None:
        """Raises what `take` would raise for one slot now."""
        if self._closed or replica.state is ReplicaState.DRAINING:
            raise ApiError(503, f"replica {replica.id} is draining", code="draining", headers={"Retry-After": "1"})
        if not replica.serving:
            detail = f": {replica.message}" if replica.message else ""
            message = f"replica {replica.id} is {replica.state}{detail}"
            raise ApiError(503, message, code="not_ready", headers={"Retry-After": "1"})
        if replica.slots.free == 0:
            raise self._full(replica)

    def take(self, replica: Replica, width: int) -> Hold:
        """`width` leases or none. Raises ApiError 400 when the engine never has so many, 429 when it has not now, 503."""
        if width > replica.slots.total > 0:
            message = f"the request needs {width} slots at once, and an engine of this model has {replica.slots.total}"
            raise ApiError(400, message, code="too_many_choices", param="n")
        self.check(replica)
        if replica.slots.free < width:
            raise self._full(replica)
        return self._take(replica, width)

    def take_some(self, replica: Replica, width: int) -> Hold:
        """At least one lease and at most `width`. Raises as `take`."""
        self.check(replica)
        return self._take(replica, min(width, replica.slots.free))

    def close(self) -> None:
        """Grants nothing from now on."""
        self._closed = True
        self._replicas.touch()

    async def wait_until_idle(self) -> None:
        """Returns once no lease is out."""
        await self._idle.wait()

    def give_back(self, replica: Replica, leases: list[Lease]) -> None:
        """For Hold."""
        for lease in leases:
            self._replicas.release(replica, lease)
        self._out -= 1
        if self._out == 0:
            self._idle.set()

    def _take(self, replica: Replica, width: int) -> Hold:
        leases = [lease for _ in range(width) if (lease := self._replicas.lease(replica)) is not None]
        if not leases:
            raise self._full(replica)
        self._out += 1
        self._idle.clear()
        return Hold(self, replica, leases)

    @staticmethod
    def _full(replica: Replica) -> ApiError:
        message = f"all {replica.slots.total} slots of replica {replica.id} are taken"
        return ApiError(429, message, code="no_slot", headers={"Retry-After": "1"})
