"""Why a replica cannot run on a node, with the arithmetic."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum


class Cause(StrEnum):
    """What kept a replica off a node, for counting."""

    NOT_PLACEABLE = "not placeable"
    SELECTOR = "excluded by the placement"
    NO_GPU = "no GPU"
    DEVICE = "no matching device"
    HELD = "held by another pod"
    UNSIZED = "memory need not known"
    MODEL = "model not there"
    FAILED = "failed here lately"
    DISK = "disk"
    MEMORY = "memory"


@dataclass(frozen=True, slots=True)
class Refusal:
    """One node's no. Sizes in MiB; all 0 where memory or disk was not the cause."""

    node: str
    cause: Cause
    detail: str = ""
    needed: int = 0
    free: int = 0
    total: int = 0
    foreign: int = 0

    @property
    def shortfall(self) -> int:
        """MiB missing; a node that lacks little is near."""
        return max(0, self.needed - self.free)

    def __str__(self) -> str:
        if self.cause is Cause.MEMORY:
            foreign = f" (foreign {self.foreign:,})" if self.foreign else ""
            return f"{self.node}: needs {self.needed:,} MiB, {self.free:,} free of {self.total:,}{foreign}{self.detail}"
        if self.cause is Cause.DISK:
            return f"{self.node}: the model takes {self.needed:,} MiB of disk, {self.free:,} free"
        return f"{self.node}: {self.detail or self.cause.value}"


def explain(refusals: Sequence[Refusal], limit: int = 10) -> str:
    """The nearest `limit` nodes in words, and how many others there are by cause."""
    near = sorted(refusals, key=lambda refusal: (refusal.cause is not Cause.MEMORY, refusal.shortfall, refusal.node))
    text = "; ".join(str(refusal) for refusal in near[:limit])
    rest = Counter(refusal.cause.value for refusal in near[limit:])
    more = ", ".join(f"{count} {cause}" for cause, count in sorted(rest.items()))
    return f"{text}; and {more}" if more else text
