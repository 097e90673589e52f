"""When a node's status is written, and what: the publisher's core, driven by a fake clock and a small merge-patching server."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llorch_agent.core.heartbeat import Decision, Heartbeat, Pace, Register, Wait, Write, WriteKind, full_patch, is_urgent

INTERVAL = 10.0


def status(
    *, state: str = "Running", replicas: dict[str, str] | None = None, slots: int = 4, foreign: int = 0, health: str = "Healthy"
) -> dict[str, Any]:
    return {
        "agent": {"state": state, "bootId": "b1"},
        "devices": {"GPU-0": {"health": health, "foreignMiB": foreign, "vramFreeMiB": 1024}},
        "replicas": {name: {"state": value, "slotsFree": slots} for name, value in (replicas or {}).items()},
    }


def merged(document: Any, patch: Any) -> Any:
    """RFC 7386, as the server does it."""
    if not isinstance(patch, dict):
        return patch
    result = dict(document) if isinstance(document, dict) else {}
    for key, value in patch.items():
        if value is None:
            result.pop(key, None)
        else:
            result[key] = merged(result.get(key), value)
    return result


@dataclass
class Server:
    """Holds one object's status."""

    uid: str = "u1"
    status: dict[str, Any] = field(default_factory=dict)

    def patch(self, patch: dict[str, Any]) -> dict[str, Any]:
        self.status = merged(self.status, patch)
        return copy.deepcopy(self.status)


def make(draw: Callable[[], float] = lambda: 0.5) -> Heartbeat:
    return Heartbeat(Pace(interval=INTERVAL), draw)


def settle(core: Heartbeat, server: Server, now: float, wanted: dict[str, Any]) -> float:
    """Registers and writes until there is nothing to do; returns when it wants to be asked again."""
    while True:
        match core.decide(now, wanted, "t"):
            case Register():
                core.done(server.uid, copy.deepcopy(server.status))
            case Write() as write:
                core.done(server.uid, server.patch(write.patch))
            case Wait(until=until):
                return until


def kinds(decisions: list[Decision]) -> list[WriteKind]:
    return [decision.kind for decision in decisions if isinstance(decision, Write)]


def test_a_new_agent_registers_and_then_tells_everything():
    core, wanted = make(), status(replicas={"a": "Ready"})
    assert core.decide(0, wanted, "t0") == Register()
    core.done("u1", {"phase": "Offline", "replicas": {"old": {"state": "Ready"}}})
    write = core.decide(0, wanted, "t0")
    assert isinstance(write, Write)
    assert write.kind is WriteKind.FULL
    assert write.uid == "u1"
    assert write.patch["replicas"] == {"old": None, "a": {"state": "Ready", "slotsFree": 4}}
    assert write.patch["heartbeat"] == {"sequence": 1, "time": "t0", "intervalSeconds": 10}
    assert "phase" not in write.patch, "the operator's fields are not the agent's"


def test_only_one_request_is_in_flight():
    core = make()
    core.decide(0, status(), "t")
    assert core.decide(100, status(state="Draining"), "t") == Wait(float("inf"))


def test_a_quiet_node_beats_once_per_interval_and_each_beat_is_small():
    core, server, wanted = make(), Server(), status(replicas={"a": "Ready"})
    settle(core, server, 0, wanted)
    writes: list[Write] = []
    now = 0.0
    while now < 100:
        decision = core.decide(now, wanted, f"t{now}")
        if isinstance(decision, Write):
            writes.append(decision)
            core.done(server.uid, server.patch(decision.patch))
        now += 0.5
    assert kinds(list(writes)) == [WriteKind.BEAT] * len(writes)
    assert len(writes) == 10
    assert all(set(write.patch) == {"heartbeat"} for write in writes)


@pytest.mark.parametrize("drawn", [0.0, 0.25, 0.999])
def test_beats_keep_within_the_jitter(drawn: float):
    core, server = make(lambda: drawn), Server()
    settle(core, server, 0, status())
    first = settle(core, server, 100, status())
    assert 100 + INTERVAL * 0.9 <= first <= 100 + INTERVAL * 1.1


def test_agents_that_started_together_do_not_go_on_beating_together():
    nexts = []
    for drawn in (0.0, 0.3, 0.9):
        core, server = make(lambda drawn=drawn: drawn), Server()
        nexts.append(settle(core, server, 0, status()))
    assert nexts == sorted(set(nexts))
    assert nexts[-1] - nexts[0] > INTERVAL / 2


@pytest.mark.parametrize(
    ("change", "urgent"),
    [
        (status(replicas={"a": "Loading"}), True),
        (status(replicas={"a": "Ready", "b": "Pending"}), True),
        (status(), True),
        (status(replicas={"a": "Ready"}, health="Unhealthy"), True),
        (status(replicas={"a": "Ready"}, foreign=512), True),
        (status(replicas={"a": "Ready"}, foreign=448), False),
        (status(replicas={"a": "Ready"}, slots=0), False),
    ],
    ids=["state", "new replica", "replica gone", "health", "foreign 512 MiB", "foreign 448 MiB", "slots"],
)
def test_what_somebody_decides_by_within_seconds_is_urgent_and_the_rest_rides_the_beat(change: dict[str, Any], urgent: bool):
    core, server, before = make(), Server(), status(replicas={"a": "Ready"})
    settle(core, server, 0, before)
    decision = core.decide(3, change, "t")
    if urgent:
        assert isinstance(decision, Write)
        assert decision.kind is WriteKind.URGENT
    else:
        assert decision == Wait(core.decide(3, before, "t").until)  # type: ignore[union-attr]


def test_urgent_changes_go_at_once_three_times_and_then_one_in_two_seconds():
    core, server = make(), Server()
    settle(core, server, 0, status())
    for moment, state in ((5.0, "Pending"), (5.1, "Loading"), (5.2, "Ready")):
        settle(core, server, moment, status(replicas={"a": state}))
        assert server.status["replicas"]["a"]["state"] == state
    wait = core.decide(5.3, status(replicas={"a": "Draining"}), "t")
    assert wait == Wait(pytest.approx(7.0))
    assert core.decide(6.9, status(replicas={"a": "Stopped"}), "t") == Wait(pytest.approx(7.0))
    settle(core, server, 7.0, status(replicas={"a": "Failed"}))
    assert server.status["replicas"]["a"]["state"] == "Failed", "the newest state wins, nothing in between is sent"
    assert core.decide(7.1, status(), "t") == Wait(pytest.approx(9.0))


def test_the_end_of_an_agent_does_not_wait_for_the_throttle():
    core, server = make(), Server()
    settle(core, server, 0, status())
    settle(core, server, 0.1, status(state="Draining"))
    settle(core, server, 0.2, status(state="Stopped"))
    assert server.status["agent"]["state"] == "Stopped"


def test_everything_is_told_again_every_five_minutes_with_a_beat():
    core, server, wanted = make(), Server(), status()
    settle(core, server, 0, wanted)
    full = []
    now = 0.0
    while now < 700:
        decision = core.decide(now, wanted, "t")
        if isinstance(decision, Write):
            core.done(server.uid, server.patch(decision.patch))
            if decision.kind is WriteKind.FULL:
                full.append(now)
                assert set(decision.patch) == {"agent", "devices", "replicas", "heartbeat"}
        now += 1
    assert [time // 10 for time in full] == [30, 60]


def test_after_a_failed_write_everything_is_told_and_what_it_may_have_left_behind_is_removed():
    core, server = make(), Server()
    settle(core, server, 0, status(replicas={"a": "Ready"}))
    lost = core.decide(5, status(replicas={"a": "Ready", "b": "Pending"}), "t")
    assert isinstance(lost, Write)
    server.patch(lost.patch)  # it happened, but the answer did not arrive
    core.failed(5)
    wait = core.decide(5, status(replicas={"a": "Ready"}), "t")
    assert isinstance(wait, Wait)
    assert 5 < wait.until <= 5 + INTERVAL
    write = core.decide(wait.until, status(replicas={"a": "Ready"}), "t")
    assert isinstance(write, Write)
    assert write.kind is WriteKind.FULL
    assert write.patch["replicas"]["b"] is None
    server.patch(write.patch)
    assert set(server.status["replicas"]) == {"a"}


def test_a_server_that_asks_for_time_gets_it():
    core, server = make(lambda: 0.0), Server()
    settle(core, server, 0, status())
    core.decide(10, status(replicas={"a": "Ready"}), "t")
    core.failed(10, retry_after=7)
    assert core.decide(10, status(replicas={"a": "Ready"}), "t") == Wait(17.0)


def test_failed_writes_never_wait_longer_than_an_interval():
    core, server = make(lambda: 0.999), Server()
    settle(core, server, 0, status())
    now = 20.0
    for _ in range(8):
        assert isinstance(core.decide(now, status(), "t"), Write)
        core.failed(now)
        wait = core.decide(now, status(), "t")
        assert isinstance(wait, Wait)
        assert now + 1 <= wait.until <= now + INTERVAL
        now = wait.until


def test_registration_is_tried_for_ever_with_jitter_between_one_and_thirty_seconds():
    for drawn in (0.0, 0.5, 0.999):
        core, now, waits = make(lambda drawn=drawn: drawn), 0.0, []
        for _ in range(12):
            assert core.decide(now, status(), "t") == Register()
            core.failed(now)
            wait = core.decide(now, status(), "t")
            assert isinstance(wait, Wait)
            waits.append(wait.until - now)
            now = wait.until
        assert all(1 <= wait <= 30 for wait in waits)
        assert waits[0] <= 2, "the first retry is soon"
    assert waits[-1] > 29


def test_a_node_that_was_deleted_is_registered_again_at_once_with_everything():
    core, server, wanted = make(), Server(), status(replicas={"a": "Ready"})
    settle(core, server, 0, wanted)
    assert isinstance(core.decide(12, wanted, "t"), Write)
    core.gone()
    server = Server(uid="u2")
    settle(core, server, 12, wanted)
    assert server.status["replicas"] == wanted["replicas"]
    assert server.status["heartbeat"]["sequence"] > 1


def test_every_write_is_another_token_even_one_that_failed():
    core, server = make(), Server()
    settle(core, server, 0, status())
    first = core.sequence
    core.decide(10, status(), "t")
    core.failed(10)
    settle(core, server, 20, status())
    assert server.status["heartbeat"]["sequence"] == first + 2


leaf = st.integers(0, 3)
tree = st.recursive(leaf, lambda inner: st.dictionaries(st.sampled_from("abcd"), inner, max_size=3), max_leaves=12)
trees = st.dictionaries(st.sampled_from("abcd"), tree, max_size=4)


@given(known=trees, wanted=trees)
def test_a_full_patch_makes_anything_known_into_what_is_wanted(known: dict[str, Any], wanted: dict[str, Any]):
    assert merged(known, full_patch(known, wanted)) == wanted


@settings(max_examples=150)
@given(
    steps=st.lists(
        st.tuples(
            st.floats(0.1, 15),
            st.dictionaries(st.sampled_from("abc"), st.sampled_from(["Pending", "Ready"]), max_size=3),
            st.sampled_from(["ok", "ok", "lost after", "lost before", "deleted"]),
        ),
        max_size=40,
    )
)
def test_whatever_fails_the_server_ends_up_with_the_newest_state(steps: list[tuple[float, dict[str, str], str]]):
    core, server, now = make(), Server(), 0.0
    urgent: list[float] = []
    for passed, replicas, fate in steps:
        now += passed
        decision = core.decide(now, status(replicas=replicas), "t")
        match decision:
            case Register():
                core.done(server.uid, copy.deepcopy(server.status))
            case Write():
                if decision.kind is WriteKind.URGENT:
                    urgent.append(now)
                    for first, begin in enumerate(urgent):
                        assert len(urgent) - first <= 3 + (now - begin) / 2.0 + 1e-6
                match fate:
                    case "ok":
                        core.done(server.uid, server.patch(decision.patch))
                    case "lost after":
                        server.patch(decision.patch)
                        core.failed(now)
                    case "lost before":
                        core.failed(now)
                    case "deleted":
                        server = Server(uid=server.uid + "x")
                        core.gone()
            case Wait(until=until):
                assert until > now
    final = status(replicas={"z": "Ready"})
    for _ in range(4):
        now += 30
        settle(core, server, now, final)
    assert {key: server.status[key] for key in final} == final


def test_nothing_is_urgent_about_nothing():
    assert not is_urgent(status(), status())
