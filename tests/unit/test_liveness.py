"""Who is alive: tables of what an operator sees, and properties that no order of events may break."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llorch_operator.core.liveness import Liveness, LivenessTracker, Timing

TIMING = Timing(node_timeout=30, grace=60)
FRESH, SUSPECT, OFFLINE, LOST = Liveness


def tracker_with(*names: str, at: float = 0.0, recorded: Liveness = FRESH) -> LivenessTracker:
    tracker = LivenessTracker(TIMING)
    for name in names:
        tracker.observe(name, uid="u", token="1", interval=10, now=at, recorded=recorded)
    return tracker


def pass_time(tracker: LivenessTracker, until: float) -> None:
    """Every second, all that is due is confirmed by a read that found nothing new."""
    for now in range(int(until) + 1):
        tracker.demote(tracker.suspects(now), now)


@pytest.mark.parametrize(
    ("silent", "expected"), [(0, FRESH), (24, FRESH), (25, SUSPECT), (29, SUSPECT), (30, OFFLINE), (89, OFFLINE), (90, LOST)]
)
def test_silence_leads_from_fresh_to_suspect_to_offline_to_lost(silent: int, expected: Liveness) -> None:
    tracker = tracker_with("a", "b")
    pass_time(tracker, silent)
    assert tracker.state("a") is expected


def test_a_slow_beat_stretches_the_time_out_to_three_intervals() -> None:
    tracker = LivenessTracker(TIMING)
    tracker.observe("slow", uid="u", token="1", interval=20, now=0)
    pass_time(tracker, 59)
    assert tracker.state("slow") is SUSPECT
    pass_time(tracker, 60)
    assert tracker.state("slow") is OFFLINE


def test_a_node_whose_token_moved_meanwhile_is_not_demoted() -> None:
    tracker = tracker_with("a")
    assert tracker.suspects(31) == ["a"]
    tracker.observe("a", uid="u", token="2", interval=10, now=31)
    assert tracker.demote(["a"], 31) == []
    assert tracker.state("a") is FRESH


def test_a_node_that_could_not_be_read_again_stays_as_it_was() -> None:
    tracker = tracker_with("a")
    assert tracker.suspects(500) == ["a"]
    assert tracker.demote([], 500) == []
    assert tracker.state("a") is FRESH


def test_a_token_counts_when_it_is_another_one_not_when_it_is_greater() -> None:
    tracker = LivenessTracker(TIMING)
    tracker.observe("a", uid="u", token="boot:9", interval=10, now=0)
    tracker.observe("a", uid="u", token="boot:1", interval=10, now=20)
    assert tracker.silent_for("a", 21) == 1


def test_a_node_back_from_lost_gets_replicas_after_its_second_beat() -> None:
    tracker = tracker_with("a", "b")
    tracker.observe("b", uid="u", token="2", interval=10, now=80)
    tracker.demote(["a"], 90)
    assert tracker.state("a") is LOST
    tracker.observe("a", uid="u", token="2", interval=10, now=100)
    assert tracker.state("a") is FRESH
    assert not tracker.placeable("a")
    tracker.observe("a", uid="u", token="3", interval=10, now=110)
    assert tracker.placeable("a")


@pytest.mark.parametrize("recorded", [OFFLINE, LOST])
def test_after_a_restart_offline_and_lost_stay_so_until_a_new_token(recorded: Liveness) -> None:
    tracker = tracker_with("a", recorded=recorded)
    pass_time(tracker, 20)
    assert tracker.state("a") is recorded
    tracker.observe("a", uid="u", token="2", interval=10, now=21)
    assert tracker.state("a") is FRESH


def test_after_a_restart_everybody_else_gets_a_full_time_out() -> None:
    tracker = tracker_with("a", at=1000)
    assert tracker.suspects(1024) == []
    assert tracker.suspects(1025) == ["a"]


def test_an_agent_that_stopped_is_offline_at_once_and_lost_after_the_grace_only() -> None:
    tracker = tracker_with("a", "b", "c")
    moved = tracker.observe("a", uid="u", token="2", interval=10, now=5, stopped=True)
    assert moved is not None
    assert moved.after is OFFLINE
    for name in ("b", "c"):
        tracker.observe(name, uid="u", token="9", interval=10, now=90)
    tracker.demote(tracker.suspects(94), 94)
    assert tracker.state("a") is OFFLINE
    tracker.demote(tracker.suspects(95), 95)
    assert tracker.state("a") is LOST


def test_when_most_of_the_fleet_goes_silent_at_once_nobody_is_lost() -> None:
    tracker = tracker_with("a", "b", "c", "d")
    tracker.observe("d", uid="u", token="2", interval=10, now=80)
    pass_time(tracker, 95)
    assert [tracker.state(name) for name in "abcd"] == [OFFLINE, OFFLINE, OFFLINE, FRESH]
    assert tracker.storm_held


def test_one_dead_node_of_three_is_no_storm() -> None:
    tracker = tracker_with("a", "b", "c")
    for name in ("b", "c"):
        tracker.observe(name, uid="u", token="2", interval=10, now=80)
    pass_time(tracker, 95)
    assert tracker.state("a") is LOST
    assert not tracker.storm_held


def test_a_new_object_under_the_old_name_starts_fresh() -> None:
    tracker = tracker_with("a", "b")
    pass_time(tracker, 95)
    moved = tracker.observe("a", uid="other", token="1", interval=10, now=95)
    assert moved is not None
    assert (moved.before, moved.after) == (LOST, FRESH)


beats = st.lists(st.tuples(st.sampled_from("abcd"), st.integers(0, 200)), max_size=30)


@given(beats)
def test_demoting_twice_at_the_same_time_changes_nothing_more(events: list[tuple[str, int]]) -> None:
    tracker = tracker_with("a", "b", "c", "d")
    for token, (name, now) in enumerate(sorted(events, key=lambda event: event[1])):
        tracker.observe(name, uid="u", token=f"t{token}", interval=10, now=now)
    tracker.demote(tracker.suspects(200), 200)
    assert tracker.demote(tracker.suspects(200), 200) == []


@given(beats, st.randoms())
def test_the_order_in_which_nodes_are_heard_at_one_moment_does_not_matter(events: list[tuple[str, int]], random: object) -> None:
    def outcome(order: list[tuple[str, int]]) -> list[Liveness]:
        tracker = tracker_with("a", "b", "c", "d")
        for name, now in order:
            tracker.observe(name, uid="u", token=f"t{now}", interval=10, now=now)
        tracker.demote(tracker.suspects(205), 205)
        return [tracker.state(name) for name in "abcd"]

    shuffled = events[:]
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    shuffled.sort(key=lambda event: event[1])
    assert outcome(sorted(events, key=lambda event: event[1])) == outcome(shuffled)
