"""What the agent does about the operator's assignments: spec against what it holds. Level-triggered; calling it again is free."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from llorch_api import Assignment, Desired


class Stage(StrEnum):
    """How far an assigned replica is on this node."""

    FETCHING = "fetching"
    """Its model is on the way; there is no handoff file yet."""
    LAUNCHED = "launched"
    """Its handoff file is there: the engine is the engines' affair."""
    DRAINING = "draining"
    """Told to take no more requests and then to end."""
    FILE_GONE = "file gone"
    """Launched, and somebody removed the handoff file."""
    OVER = "over"
    """Stopped, drained or failed for good. The id is used up; the record stays until the operator has seen it."""


@dataclass(frozen=True, slots=True)
class Held:
    """One assigned replica that this node knows of."""

    stage: Stage
    revision: str
    node_uid: str
    """The GPUNode that it was assigned through."""


@dataclass(frozen=True, slots=True)
class Start:
    """Fetch the model if need be and write the handoff file."""

    replica: str
    assignment: Assignment


@dataclass(frozen=True, slots=True)
class Drain:
    """No new requests; the engine ends with the last one or at the deadline."""

    replica: str
    deadline_seconds: int


@dataclass(frozen=True, slots=True)
class Stop:
    """End it now and remove its handoff file; report it as Stopped until its key is gone."""

    replica: str
    assignment: Assignment


@dataclass(frozen=True, slots=True)
class Forget:
    """End it if it still is there, remove its file and its record."""

    replica: str


@dataclass(frozen=True, slots=True)
class Adopt:
    """It runs as wanted, but was assigned through an earlier GPUNode of this name: note the new one."""

    replica: str


Action = Start | Drain | Stop | Forget | Adopt


def decide(uid: str, wanted: Mapping[str, Assignment], held: Mapping[str, Held]) -> list[Action]:
    """What brings `held` in line with `wanted`, the assignments of the GPUNode `uid`.

    A key that is gone ends its engine, unless the engine came through another object: a node that was deleted and registered
    again starts with an empty spec, and that must not stop what serves. Such engines are kept and reported, and the operator
    takes them over (by writing their keys) or stops them.
    """
    actions: list[Action] = []
    for replica in sorted(wanted.keys() | held.keys()):
        assignment, have = wanted.get(replica), held.get(replica)
        if assignment is not None:
            actions.extend(_for_wanted(replica, assignment, have, uid))
        elif have is not None and (have.node_uid == uid or have.stage in (Stage.FETCHING, Stage.OVER)):
            actions.append(Forget(replica))
    return actions


def _for_wanted(replica: str, assignment: Assignment, have: Held | None, uid: str) -> list[Action]:
    if assignment.desired is Desired.STOP:
        return [] if have is not None and have.stage is Stage.OVER else [Stop(replica, assignment)]
    if assignment.desired is Desired.DRAIN:
        match have.stage if have is not None else None:
            case Stage.LAUNCHED:
                return [Drain(replica, assignment.drain_deadline_seconds)]
            case Stage.DRAINING | Stage.OVER:
                return []
            case _:  # nothing serves: there is nothing to wait for
                return [Stop(replica, assignment)]
    if have is None or have.stage is Stage.FILE_GONE:
        return [Start(replica, assignment)]
    if have.stage is Stage.OVER:
        return []
    if have.revision != assignment.revision:
        # An id has one revision for its life. Should one change all the same, what the spec says now is what must run.
        return [Forget(replica), Start(replica, assignment)]
    return [Adopt(replica)] if have.node_uid != uid else []
