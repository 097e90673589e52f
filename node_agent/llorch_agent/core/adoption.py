"""Whether an engine that answers is the one its handoff file speaks of, and how many slots it has."""

from __future__ import annotations

import posixpath
from dataclasses import dataclass
from enum import StrEnum

from .handoff import Adopt


class Health(StrEnum):
    """What an engine said to a probe."""

    UP = "up"
    LOADING = "loading"
    SILENT = "silent"
    """It took the connection and did not answer in time."""
    DOWN = "down"


@dataclass(frozen=True, slots=True)
class Answer:
    """One probe of an engine."""

    health: Health
    reason: str = ""
    """Why it is not up."""
    total_slots: int | None = None
    """What it says of itself; None where it does not say."""
    model_path: str = ""


@dataclass(frozen=True, slots=True)
class Usable:
    """It may be given requests."""

    slots: int


@dataclass(frozen=True, slots=True)
class Unusable:
    """It may not."""

    reason: str
    at_once: bool
    """False where one more probe should decide: a busy engine may be slow."""


def judge(adopt: Adopt, answer: Answer, pid_alive: bool, taken_by: str = "") -> Usable | Unusable:
    """Whether requests may go to the engine of `adopt`, which gave `answer`.

    `pid_alive` tells whether the file's pid is a process here. That alone decides nothing, since the engine may live in
    another container; together with another model it shows that the port went to somebody else. `taken_by` is the replica
    that the agent itself launched at that address. Of two counts of slots the smaller holds: the engine has no more, and its
    owner may keep some for himself.
    """
    if taken_by:
        return Unusable(f"{adopt.url} is now the engine of {taken_by}", at_once=True)
    match answer.health:
        case Health.LOADING:
            return Unusable(f"{adopt.url} loads its model", at_once=True)
        case Health.SILENT:
            return Unusable(f"{adopt.url} does not answer: {answer.reason}", at_once=False)
        case Health.DOWN:
            return Unusable(f"{adopt.url} does not answer: {answer.reason}", at_once=True)
    stale = adopt.pid and not pid_alive
    if stale and adopt.model_path and answer.model_path and not _same_file(adopt.model_path, answer.model_path):
        return Unusable(f"pid {adopt.pid} is gone, and {adopt.url} now serves {answer.model_path}", at_once=True)
    counts = [count for count in (adopt.slots, answer.total_slots) if count]
    return Usable(min(counts, default=1))


def _same_file(one: str, other: str) -> bool:
    return posixpath.basename(one) == posixpath.basename(other)
