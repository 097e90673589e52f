"""When the agent writes its GPUNode's status, and what. Sans-io: the caller brings the time, the snapshot and the answers.

The shape is node-problem-detector's condition manager (write when something changed, when a write failed, or when it is time)
with a merge patch against what the server last acknowledged.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from llorch_api.gpunode import AGENT_STATUS_FIELDS
from llorch_api.patch import merge_diff

Status = Mapping[str, Any]
"""The agent's fields of GPUNode.status as JSON."""

FOREIGN_STEP = 512
"""MiB by which another program's device memory must change to be told at once."""


class WriteKind(StrEnum):
    """Why a write happens; also the label of the metric that counts them."""

    BEAT = "beat"
    URGENT = "urgent"
    FULL = "full"
    RENEW = "renew"


@dataclass(frozen=True, slots=True)
class Write:
    """Send `patch` as a merge patch of the status of the object with this uid."""

    kind: WriteKind
    patch: dict[str, Any]
    uid: str


@dataclass(frozen=True, slots=True)
class Register:
    """Make sure that the object exists, and say what its status holds."""


@dataclass(frozen=True, slots=True)
class Wait:
    """Ask again at `until`, or when something has changed."""

    until: float


@dataclass(frozen=True, slots=True)
class Renew:
    """Renew the node's Lease: a beat that leaves the status alone."""


Decision = Write | Register | Renew | Wait


@dataclass(frozen=True, slots=True)
class Pace:
    """Seconds."""

    interval: float = 10.0
    """Between beats."""
    jitter: float = 0.1
    """Share of the interval by which a beat comes earlier or later, so that a fleet does not beat as one."""
    gap: float = 2.0
    """Between two writes for urgent changes, on average."""
    burst: int = 3
    """So many go at once after a quiet time: an engine that is adopted passes through Pending to Ready within milliseconds,
    and its first request must not wait for the gap after the first of them."""
    full_every: float = 300.0
    retry_most: float = 30.0
    """Longest wait after failed registrations; after failed writes it is the interval."""


@dataclass(slots=True)
class Heartbeat:
    """One GPUNode's writer. `draw` returns a number in [0, 1)."""

    pace: Pace
    draw: Callable[[], float]
    lease: bool = False
    """Beats renew a Lease; the status is written on urgent changes and every `pace.full_every` seconds."""
    sequence: int = 0
    """Counts the writes of this process: any change of it is a sign of life."""
    _uid: str = ""
    _known: Status = field(default_factory=dict)
    """What the server holds, as it last said; after a failed write also what it may hold."""
    _in_flight: dict[str, Any] | None = None
    _credit: float = field(default=float("inf"))
    """Urgent writes that may go now; refilled with time."""
    _credit_at: float = float("-inf")
    _next_beat: float = float("-inf")
    _next_full: float = float("-inf")
    _not_before: float = float("-inf")
    _failures: int = 0
    _full: bool = True
    _spread: bool = True

    @property
    def registered(self) -> bool:
        """The object exists, as far as is known."""
        return bool(self._uid)

    @property
    def failures(self) -> int:
        """Failed requests in a row."""
        return self._failures

    def decide(self, now: float, status: Status, time: str) -> Decision:
        """What to do at monotonic `now`, given the newest `status` (without heartbeat) and the wall clock `time` for display."""
        if self._in_flight is not None:
            return Wait(float("inf"))
        if now < self._not_before:
            return Wait(self._not_before)
        if not self._uid:
            self._in_flight = {}
            return Register()
        due = now >= self._next_beat
        if self._full or (due and now >= self._next_full):
            return self._write(WriteKind.FULL, now, status, time)
        if _agent_state(self._known) != _agent_state(status):
            return self._write(WriteKind.URGENT, now, status, time)  # twice in a process's life, and its end cannot wait
        if is_urgent(self._known, status):
            due_at = self._refill(now)
            if now >= due_at:
                self._credit -= 1.0
                return self._write(WriteKind.URGENT, now, status, time)
            return Wait(min(due_at, self._next_beat))
        if due and self.lease:
            self._in_flight = {}
            self._schedule(now)
            return Renew()
        if due:
            return self._write(WriteKind.BEAT, now, status, time)
        return Wait(self._next_beat)

    def _write(self, kind: WriteKind, now: float, status: Status, time: str) -> Write:
        self.sequence += 1
        beat: dict[str, Any] = {"sequence": self.sequence, "time": time, "intervalSeconds": round(self.pace.interval)}
        if self.lease:
            beat["mode"] = "lease"
        wanted = {**status, "heartbeat": beat}
        patch = full_patch(self._known, wanted) if kind is WriteKind.FULL else merge_diff(self._known, wanted)
        self._in_flight = patch
        self._schedule(now)
        if kind is WriteKind.FULL:
            self._next_full = now + self.pace.full_every
        return Write(kind, patch, self._uid)

    def _schedule(self, now: float) -> None:
        if self._spread:  # agents that started together must not go on beating together
            self._spread, offset = False, 0.1 + 0.9 * self.draw()
        else:
            offset = 1.0 + self.pace.jitter * (2.0 * self.draw() - 1.0)
        self._next_beat = now + self.pace.interval * offset

    def _refill(self, now: float) -> float:
        """When the next urgent write may go."""
        passed, self._credit_at = now - self._credit_at, now
        self._credit = min(float(self.pace.burst), self._credit + passed / self.pace.gap)
        missing = 1.0 - self._credit
        return now if missing <= 1e-9 else now + missing * self.pace.gap

    def done(self, uid: str, status: Status) -> None:
        """The request succeeded; `status` is what the server now holds."""
        if uid != self._uid:  # found or made: tell everything
            self._uid, self._full, self._spread = uid, True, True
        else:
            self._full = False
        self._known = {name: status[name] for name in AGENT_STATUS_FIELDS if name in status}
        self._in_flight, self._failures, self._not_before = None, 0, float("-inf")

    def renewed(self) -> None:
        """The Lease was renewed."""
        self._in_flight, self._failures, self._not_before = None, 0, float("-inf")

    def failed(self, now: float, retry_after: float | None = None) -> None:
        """The request failed, or nobody knows: the next write tells everything. `retry_after` is the server's wish, seconds."""
        renewal = self._in_flight == {} and bool(self._uid)
        if self._in_flight is not None:
            self._known = _overlay(self._known, self._in_flight)
        self._failures += 1
        most = self.pace.interval if self._uid else self.pace.retry_most
        least = min(1.0, most)
        wait = least + self.draw() * (min(most, 2.0**self._failures) - least)
        if retry_after is not None:
            wait = max(wait, min(retry_after, 60.0) * (1.0 + 0.1 * self.draw()))
        self._in_flight, self._full, self._not_before = None, self._full or not renewal, now + wait
        if renewal:
            self._next_beat = self._not_before

    def gone(self) -> None:
        """The object is not there any more, or is another one: register again at once, with everything."""
        self._uid, self._known, self._in_flight, self._full, self._not_before = "", {}, None, True, float("-inf")


def full_patch(known: Status, wanted: Status) -> dict[str, Any]:
    """The merge patch that says all of `wanted`, with a null for each key of `known` that is not in it."""
    patch: dict[str, Any] = {key: None for key in known if key not in wanted}
    for key, value in wanted.items():
        before = known.get(key)
        patch[key] = full_patch(before if isinstance(before, Mapping) else {}, value) if isinstance(value, Mapping) else value
    return patch


def is_urgent(known: Status, status: Status) -> bool:
    """Someone decides by it within seconds: a replica's state, a device's coming, going, health or holder, a stranger on it."""
    if _replica_states(known) != _replica_states(status) or _device_health(known) != _device_health(status):
        return True
    before, after = _foreign(known), _foreign(status)
    return any(abs(mib - before.get(uuid, 0)) >= FOREIGN_STEP for uuid, mib in after.items())


def _agent_state(status: Status) -> str:
    return str(status.get("agent", {}).get("state", ""))


def _replica_states(status: Status) -> dict[str, str]:
    return {replica: report.get("state", "") for replica, report in status.get("replicas", {}).items()}


def _device_health(status: Status) -> dict[str, tuple[str, str]]:
    return {uuid: (device.get("health", ""), device.get("heldBy", "")) for uuid, device in status.get("devices", {}).items()}


def _foreign(status: Status) -> dict[str, int]:
    return {uuid: device.get("foreignMiB", 0) for uuid, device in status.get("devices", {}).items()}


def _overlay(known: Status, patch: Status) -> dict[str, Any]:
    """`known` with what a patch of unknown outcome may have added; what it may have removed stays."""
    merged = dict(known)
    for key, value in patch.items():
        before = merged.get(key)
        if isinstance(value, Mapping):
            merged[key] = _overlay(before if isinstance(before, Mapping) else {}, value)
        elif value is not None:
            merged[key] = value
    return merged
