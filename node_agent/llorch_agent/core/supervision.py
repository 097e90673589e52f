"""When an engine that ended is started again, and when not any more. Times are seconds; randomness comes in as a number."""

from __future__ import annotations

from dataclasses import dataclass

from .endings import Ending, EndKind


@dataclass(frozen=True, slots=True)
class Limits:
    """The figures of backoff and breaker, seconds."""

    initial_s: float = 1.0
    factor: float = 2.0
    max_s: float = 60.0
    min_s: float = 0.5
    jitter: float = 0.1
    """Part of the delay by which it varies, each way: engines that fell together do not rise together."""
    stable_s: float = 300.0
    """An engine that was ready for so long has a clean record again."""
    graceful_s: float = 60.0
    """Exit code 0 after being ready for so long is no failure: somebody ended it on purpose."""
    breaker: int = 5
    """Failures in a row after which the replica is Failed."""


LIMITS = Limits()


@dataclass(frozen=True, slots=True)
class Record:
    """What is remembered of a replica's earlier lives."""

    failures: int = 0
    """In a row."""
    restarts: int = 0
    """Times it was started again, ever."""


@dataclass(frozen=True, slots=True)
class Restart:
    """Start it again after a while."""

    delay_s: float
    message: str


@dataclass(frozen=True, slots=True)
class GiveUp:
    """Leave it ended: the same would happen again."""

    message: str


_HOPELESS = frozenset({EndKind.BAD_MODEL, EndKind.BAD_ARGUMENT})
"""The same bytes and the same arguments end the same way."""

_DEVICE_TROUBLE = frozenset({EndKind.CUDA, EndKind.OUT_OF_MEMORY})
"""A driver or another process needs time to let go of its memory."""


def after_end(
    record: Record,
    ending: Ending,
    ready_at: float | None,
    now: float,
    spread: float,
    limits: Limits = LIMITS,
) -> tuple[Record, Restart | GiveUp]:
    """The new record and what to do, when an engine ended at `now` that was ready since `ready_at` (None: never).

    `spread` in -1..1 is where in the jitter the delay falls.
    """
    ready_for = 0.0 if ready_at is None else now - ready_at
    failures = 0 if ready_for >= limits.stable_s else record.failures
    graceful = ending.kind is EndKind.CLEAN and ready_for >= limits.graceful_s
    if not graceful:
        failures += 1
    if ending.kind in _HOPELESS:
        return Record(failures, record.restarts), GiveUp(ending.message)
    if failures >= limits.breaker:
        return Record(failures, record.restarts), GiveUp(f"failed {failures} times in a row: {ending.message}")
    delay = limits.initial_s * limits.factor ** max(0, failures - 1)
    if ending.kind in _DEVICE_TROUBLE:
        delay *= 2
    delay = max(limits.min_s, min(limits.max_s, delay) * (1 + limits.jitter * spread))
    return Record(failures, record.restarts + 1), Restart(delay, ending.message)
