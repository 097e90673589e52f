"""Exact slot leases of one engine: the agent that owns the engine counts them, and nobody else."""

from __future__ import annotations

from typing import NewType

Lease = NewType("Lease", int)
"""The right to use one slot for one request. Never reused within a table."""


class SlotTable:
    """Leases of one engine. Never more in use than `total`; a closed table grants nothing and lets what is out come back."""

    __slots__ = ("_closed", "_next", "_out", "_total")

    def __init__(self, total: int) -> None:
        if total < 0:
            raise ValueError(f"slots must be 0 or more, not {total}")
        self._total = total
        self._out: set[Lease] = set()
        self._next = 0
        self._closed = False

    @property
    def total(self) -> int:
        """Concurrent sequences of the engine."""
        return self._total

    @property
    def in_use(self) -> int:
        """Leases that are out."""
        return len(self._out)

    @property
    def free(self) -> int:
        """Leases that `acquire` would grant now."""
        return 0 if self._closed else max(0, self._total - len(self._out))

    @property
    def closed(self) -> bool:
        """True while draining."""
        return self._closed

    def acquire(self) -> Lease | None:
        """One lease, or None when all are out or the table is closed."""
        if self.free == 0:
            return None
        self._next += 1
        lease = Lease(self._next)
        self._out.add(lease)
        return lease

    def release(self, lease: Lease) -> bool:
        """Gives a lease back. False when it was back already: giving back twice frees nothing twice."""
        if lease in self._out:
            self._out.remove(lease)
            return True
        return False

    def close(self) -> None:
        """Grants nothing from now on."""
        self._closed = True

    def reopen(self) -> None:
        """Grants again."""
        self._closed = False
