"""Which replicas are late, and where a revision failed lately. Times are seconds of the caller's monotonic clock."""

from __future__ import annotations

from collections.abc import Iterable

from .views import PoolKey, ReplicaView

UNFIT_SECONDS = 600.0
"""How long a node where a revision failed is avoided for it."""


class Deadlines:
    """Remembers when each replica was first seen, and the nodes that a revision failed on."""

    def __init__(self, load_deadline: float) -> None:
        self._load_deadline = load_deadline
        self._first_seen: dict[str, float] = {}
        self._served: set[str] = set()
        self._failed: set[str] = set()
        self._unfit: dict[tuple[PoolKey, str, str], float] = {}

    def observe(self, replicas: Iterable[ReplicaView], now: float) -> None:
        """Takes in all replicas there are; what is not among them is forgotten."""
        present = set()
        for replica in replicas:
            present.add(replica.id)
            self._first_seen.setdefault(replica.id, now)
            if replica.ready:
                self._served.add(replica.id)
            if (replica.broken or self.is_late(replica.id, now)) and replica.id not in self._failed:
                self._failed.add(replica.id)
                self._unfit[replica.pool, replica.node, replica.revision] = now + UNFIT_SECONDS
        for gone in self._first_seen.keys() - present:
            del self._first_seen[gone]
        self._served &= present
        self._failed &= present
        self._unfit = {key: until for key, until in self._unfit.items() if until > now}

    def is_late(self, replica_id: str, now: float) -> bool:
        """Never been Ready, and its deadline has passed."""
        first = self._first_seen.get(replica_id)
        return first is not None and replica_id not in self._served and now - first > self._load_deadline

    def late(self, now: float) -> frozenset[str]:
        """All replicas past their deadline."""
        return frozenset(replica_id for replica_id in self._first_seen if self.is_late(replica_id, now))

    def unfit(self, pool: PoolKey, revision: str) -> frozenset[str]:
        """Nodes where this revision of the pool failed within the last minutes."""
        return frozenset(node for key, node, failed in self._unfit if (key, failed) == (pool, revision))

    def next_change(self, now: float) -> float | None:
        """When something becomes late or fit again; None when nothing will."""
        pending = [
            at + self._load_deadline
            for rid, at in self._first_seen.items()
            if rid not in self._served and rid not in self._failed
        ]
        times = [time for time in [*pending, *self._unfit.values()] if time > now]
        return min(times, default=None)
