"""Engines that an agent runs and keeps although nobody assigns them: they came through an earlier GPUNode of its name.

An agent never ends those by itself, because a node that was deleted and registered again starts with an empty spec. Somebody
has to, or they hold their memory for ever. Times are seconds of the caller's monotonic clock.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from llorch_api import GPUNode, ReplicaOrigin, ReplicaState

GRACE_SECONDS = 5.0
"""An agent that is told the end of an assignment still reports the replica for a moment: that is no stray."""
ENDING = frozenset({ReplicaState.DRAINING, ReplicaState.STOPPED})


@dataclass(frozen=True, slots=True, order=True)
class Stray:
    """One of them."""

    node: str
    replica: str
    pool: str
    revision: str


def strays_of(node: GPUNode) -> list[Stray]:
    """Replicas of assigned origin that the node reports and its spec does not name, unless they are ending."""
    return [
        Stray(node.metadata.name, replica_id, report.pool, report.revision)
        for replica_id, report in sorted(node.status.replicas.items())
        if report.origin is ReplicaOrigin.ASSIGNED and replica_id not in node.spec.replicas and report.state not in ENDING
    ]


class Strays:
    """Remembers how long each has been one."""

    def __init__(self) -> None:
        self._since: dict[Stray, float] = {}

    def observe(self, nodes: Iterable[GPUNode], now: float) -> list[Stray]:
        """Takes in the nodes that can be told something; returns the strays to be ended, in order."""
        found = {stray for node in nodes for stray in strays_of(node)}
        self._since = {stray: self._since.get(stray, now) for stray in found}
        return sorted(stray for stray, since in self._since.items() if now - since >= GRACE_SECONDS)

    def next_change(self, now: float) -> float | None:
        """When one becomes due; None when none is waiting."""
        return min((since + GRACE_SECONDS for since in self._since.values() if since + GRACE_SECONDS > now), default=None)
