"""How long to wait before the next attempt."""

from __future__ import annotations

FIRST = 0.5
LONGEST = 10.0
"""Seconds. Long enough for a server that restarts under hundreds of clients, short enough that nobody notices it afterwards."""


def delay(failures: int, chance: float, *, retry_after: float | None = None) -> float:
    """Seconds after `failures` (1, 2, …) in a row: 0.5 s, doubled up to 10 s, less up to half of it by `chance` (0 to 1).

    What the server asked for is the least: then the jitter comes on top, so that its clients do not come back as one.
    """
    step = min(LONGEST, FIRST * 2.0 ** min(failures - 1, 10))
    jittered = step * (1.0 - 0.5 * chance)
    return jittered if retry_after is None else retry_after + 0.5 * jittered
