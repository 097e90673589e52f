"""Which nodes are alive: a token that changed, at the operator's monotonic clock.

Node clocks are never compared with ours, and a token is only ever tested for being another one. A demotion takes two steps:
`suspects` proposes, the caller re-reads those nodes and feeds what it read to `observe`, and `demote` carries out what still
holds. That makes a silent watch, a stalled API server or a late loop harmless: a node whose token moved is fresh again, and one
that could not be re-read is left as it was.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from enum import IntEnum


class Liveness(IntEnum):
    """Ordered: a demotion goes up."""

    FRESH = 0
    SUSPECT = 1
    OFFLINE = 2
    LOST = 3


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds, and the guard's share."""

    node_timeout: float = 30.0
    """Silence after which a node is Offline; never less than three of its intervals."""
    suspect_intervals: float = 2.5
    grace: float = 60.0
    """From Offline to Lost: how long its replicas wait before they are placed elsewhere."""
    storm_share: float = 0.55
    """When at least this share of more than two nodes would be Lost at once, nobody is."""

    def ttl(self, interval: float) -> float:
        """Silence until Offline for a node that beats every `interval` seconds."""
        return max(self.node_timeout, 3 * interval)

    def suspect_after(self, interval: float) -> float:
        """Silence until Suspect: 2.5 intervals, and always before Offline."""
        return min(self.suspect_intervals * interval, self.ttl(interval))


@dataclass(frozen=True, slots=True)
class Transition:
    """A node changed its liveness."""

    node: str
    before: Liveness
    after: Liveness
    silent_for: float
    """Seconds since its token last changed."""


@dataclass(slots=True)
class _Track:
    uid: str
    token: str
    changed_at: float
    interval: float
    state: Liveness
    stopped: bool
    beats: int
    """Token changes since it was last Lost; placement asks for two."""


class LivenessTracker:
    """Liveness of every node. All times are seconds of one monotonic clock that the caller reads."""

    def __init__(self, timing: Timing) -> None:
        self.timing = timing
        self._tracks: dict[str, _Track] = {}
        self.storm_held = False
        """True while the guard holds demotions to Lost."""

    def observe(
        self,
        node: str,
        *,
        uid: str,
        token: str,
        interval: float,
        now: float,
        stopped: bool = False,
        recorded: Liveness = Liveness.FRESH,
    ) -> Transition | None:
        """Takes in what the node's object says. `recorded` is the state its status names, used only at first sight.

        A node first seen gets a full TTL, unless its status says Offline or Lost: that stays so until a new token.
        """
        track = self._tracks.get(node)
        if track is None or track.uid != uid:
            before = Liveness.FRESH if track is None else track.state
            start = recorded if recorded >= Liveness.OFFLINE and track is None else Liveness.FRESH
            self._tracks[node] = _Track(uid, token, now, interval, start, stopped, 0 if start is Liveness.LOST else 2)
            if stopped:
                return self._move(node, max(start, Liveness.OFFLINE), now)
            return Transition(node, before, start, 0.0) if before is not start else None
        track.interval, track.stopped = interval, stopped
        if track.token == token:
            return self._move(node, Liveness.OFFLINE, now) if stopped and track.state < Liveness.OFFLINE else None
        track.token, track.changed_at = token, now
        track.beats = 1 if track.state is Liveness.LOST else min(track.beats + 1, 2)
        return self._move(node, Liveness.OFFLINE if stopped else Liveness.FRESH, now)

    def rebase(self, node: str, token: str) -> None:
        """The token reads differently without any sign of life, because more of it is known now."""
        if (track := self._tracks.get(node)) is not None:
            track.token = token

    def forget(self, node: str) -> None:
        """The object is gone."""
        self._tracks.pop(node, None)

    def state(self, node: str) -> Liveness:
        """The node's liveness; unknown nodes are Lost."""
        track = self._tracks.get(node)
        return Liveness.LOST if track is None else track.state

    def placeable(self, node: str) -> bool:
        """Fresh, and beaten twice since it was Lost."""
        track = self._tracks.get(node)
        return track is not None and track.state is Liveness.FRESH and track.beats >= 2

    def silent_for(self, node: str, now: float) -> float:
        """Seconds since the token last changed; 0 for unknown nodes."""
        track = self._tracks.get(node)
        return 0.0 if track is None else max(0.0, now - track.changed_at)

    def suspects(self, now: float) -> list[str]:
        """Nodes that a demotion is due for, sorted: re-read them, `observe` what was read, then `demote`."""
        return sorted(name for name, track in self._tracks.items() if self._due(track, now) > track.state)

    def demote(self, nodes: Collection[str], now: float) -> list[Transition]:
        """Demotes those of `nodes` that are still due, but to Lost none while a storm would take most of the fleet."""
        due = {name: self._due(self._tracks[name], now) for name in sorted(nodes) if name in self._tracks}
        lost = {name for name, track in self._tracks.items() if track.state is Liveness.LOST or due.get(name) is Liveness.LOST}
        newly = {name for name in lost if self._tracks[name].state is not Liveness.LOST}
        total = len(self._tracks)
        self.storm_held = total > 2 and bool(newly) and len(lost) >= self.timing.storm_share * total
        transitions = []
        for name, state in due.items():
            target = Liveness.OFFLINE if state is Liveness.LOST and self.storm_held else state
            if target > self._tracks[name].state and (moved := self._move(name, target, now)):
                transitions.append(moved)
        return transitions

    def _due(self, track: _Track, now: float) -> Liveness:
        silence, ttl = now - track.changed_at, self.timing.ttl(track.interval)
        if silence >= ttl + self.timing.grace:
            return Liveness.LOST
        if silence >= ttl or track.stopped:
            return Liveness.OFFLINE
        if silence >= self.timing.suspect_after(track.interval):
            return Liveness.SUSPECT
        return Liveness.FRESH

    def _move(self, node: str, state: Liveness, now: float) -> Transition | None:
        track = self._tracks[node]
        if track.state is state:
            return None
        before, track.state = track.state, state
        return Transition(node, before, state, max(0.0, now - track.changed_at))
