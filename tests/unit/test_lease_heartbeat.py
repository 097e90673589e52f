"""Heartbeats by Lease: when the agent renews, when it writes all the same, and what the operator takes for a sign of life."""

from __future__ import annotations

from typing import Any

from llorch_agent.core.heartbeat import Heartbeat, Pace, Register, Renew, Wait, Write, WriteKind
from llorch_api import GPUNode
from llorch_operator.core.liveness import Liveness, LivenessTracker, Timing
from llorch_operator.core.nodes import token_of
from llorch_operator.fleet import Fleet

STATUS: dict[str, Any] = {"agent": {"state": "Running"}, "replicas": {}, "devices": {}}


def registered(at: float = 0.0) -> tuple[Heartbeat, dict[str, Any]]:
    """A heartbeat in lease mode that has written everything once, and what the server holds."""
    beat = Heartbeat(Pace(), lambda: 0.5, lease=True)
    assert isinstance(beat.decide(at, STATUS, "t"), Register)
    beat.done("u", {})
    write = beat.decide(at, STATUS, "t")
    assert isinstance(write, Write)
    assert write.kind is WriteKind.FULL
    beat.done("u", write.patch)
    return beat, write.patch


def test_the_first_write_tells_the_mode_and_the_beats_after_it_leave_the_status_alone() -> None:
    beat, held = registered()
    assert held["heartbeat"]["mode"] == "lease"
    now, renewals = 0.0, 0
    while now < 299:
        match beat.decide(now, STATUS, "t"):
            case Renew():
                renewals += 1
                beat.renewed()
            case Wait(until=until):
                now = until
            case other:
                raise AssertionError(other)
    assert 28 <= renewals <= 32
    assert beat.sequence == 1
    written = None
    while written is None:
        decision = beat.decide(now, STATUS, "t")
        if isinstance(decision, Write):
            written = decision
        elif isinstance(decision, Renew):
            beat.renewed()
        elif isinstance(decision, Wait):
            now = decision.until
    assert written.kind is WriteKind.FULL
    assert 300 <= now < 312


def test_an_urgent_change_is_written_at_once_and_slots_wait() -> None:
    beat, _ = registered()
    busy = {**STATUS, "summary": {"slots": "1/4"}}
    assert isinstance(beat.decide(1.0, busy, "t"), Wait)
    changed = {**STATUS, "replicas": {"r": {"state": "Ready"}}}
    write = beat.decide(1.0, changed, "t")
    assert isinstance(write, Write)
    assert write.kind is WriteKind.URGENT


def test_a_renewal_that_failed_is_tried_again_and_makes_no_full_write() -> None:
    beat, _ = registered()
    assert isinstance(beat.decide(100.0, STATUS, "t"), Renew)
    beat.failed(100.0)
    again = beat.decide(100.0, STATUS, "t")
    assert isinstance(again, Wait)
    assert again.until <= 110.0
    assert isinstance(beat.decide(again.until, STATUS, "t"), Renew)
    assert beat.failures == 1
    beat.renewed()
    assert beat.failures == 0


def node(sequence: int, mode: str = "lease", version: int = 1, boot: str = "b") -> GPUNode:
    return GPUNode.model_validate(
        {
            "metadata": {"name": "n", "uid": "u", "resourceVersion": str(version)},
            "status": {"agent": {"bootId": boot}, "heartbeat": {"sequence": sequence, "mode": mode, "intervalSeconds": 10}},
        }
    )


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def a_fleet() -> tuple[Fleet, Clock]:
    clock = Clock()
    return Fleet(LivenessTracker(Timing()), clock, claimed_hosts=True), clock


def test_a_lease_that_is_found_is_no_sign_of_life_and_one_that_is_renewed_is() -> None:
    fleet, clock = a_fleet()
    fleet.observe_node(node(5))
    clock.now = 20.0
    fleet.observe_lease("n", "10:00:00", fresh=False)
    assert fleet.tracker.silent_for("n", clock.now) == 20.0
    fleet.observe_lease("n", "10:00:10", fresh=False)
    assert fleet.tracker.silent_for("n", clock.now) == 0.0
    clock.now = 60.0
    fleet.observe_lease("n", "10:00:10", fresh=True)
    assert fleet.tracker.silent_for("n", clock.now) == 40.0
    fleet.tracker.demote(fleet.tracker.suspects(clock.now), clock.now)
    assert fleet.tracker.state("n") is Liveness.OFFLINE
    fleet.observe_lease("n", "09:00:00", fresh=True)  # whatever its clock says: another one
    assert fleet.tracker.state("n") is Liveness.FRESH


def test_a_lease_made_while_it_is_watched_is_a_sign_of_life() -> None:
    fleet, clock = a_fleet()
    fleet.observe_node(node(5))
    clock.now = 20.0
    fleet.observe_lease("n", "10:00:00", fresh=True)
    assert fleet.tracker.silent_for("n", clock.now) == 0.0


def test_the_operators_own_writes_are_no_sign_of_life_and_an_agents_are_in_either_mode() -> None:
    fleet, clock = a_fleet()
    fleet.observe_lease("n", "10:00:00", fresh=False)
    fleet.observe_node(node(5, version=1))
    clock.now = 10.0
    fleet.observe_node(node(5, version=2))
    assert fleet.tracker.silent_for("n", clock.now) == 10.0
    fleet.observe_node(node(6, version=3))
    assert fleet.tracker.silent_for("n", clock.now) == 0.0
    clock.now = 20.0
    fleet.observe_node(node(1, mode="status", boot="c", version=4))
    assert fleet.tracker.silent_for("n", clock.now) == 0.0
    clock.now = 30.0
    fleet.observe_lease("n", "10:00:30", fresh=True)
    assert fleet.tracker.silent_for("n", clock.now) == 10.0, "a node that writes its status has no Lease that counts"


def test_a_token_says_nothing_of_an_agent_that_has_not_written() -> None:
    assert token_of(node(0, boot=""), "10:00:00") == ""
