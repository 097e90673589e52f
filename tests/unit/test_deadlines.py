"""Replicas that take too long, and nodes that a revision failed on."""

from __future__ import annotations

from dataclasses import replace

from llorch_api import Desired, ReplicaState
from llorch_operator.core.deadlines import UNFIT_SECONDS, Deadlines
from llorch_operator.core.views import PoolKey, ReplicaView

CHAT = PoolKey("default", "chat")
LOADING = ReplicaView("chat-1", CHAT, "n1", "r1", Desired.RUN, {}, 4, ReplicaState.LOADING)
READY = replace(LOADING, state=ReplicaState.READY)
FAILED = replace(LOADING, state=ReplicaState.FAILED)


def test_a_replica_that_is_not_ready_in_time_is_late() -> None:
    deadlines = Deadlines(load_deadline=100)
    deadlines.observe([LOADING], 0)
    assert deadlines.late(100) == frozenset()
    assert deadlines.late(101) == {"chat-1"}
    assert deadlines.next_change(0) == 100


def test_a_replica_that_has_served_is_never_late_again() -> None:
    deadlines = Deadlines(load_deadline=100)
    deadlines.observe([READY], 0)
    deadlines.observe([LOADING], 50)
    assert deadlines.late(1000) == frozenset()
    assert deadlines.next_change(50) is None


def test_a_node_where_a_revision_failed_is_avoided_for_that_revision_for_ten_minutes() -> None:
    deadlines = Deadlines(load_deadline=100)
    deadlines.observe([FAILED], 0)
    assert deadlines.unfit(CHAT, "r1") == {"n1"}
    assert deadlines.unfit(CHAT, "r2") == frozenset()
    assert deadlines.next_change(0) == UNFIT_SECONDS
    deadlines.observe([FAILED], UNFIT_SECONDS + 1)
    assert deadlines.unfit(CHAT, "r1") == frozenset()


def test_a_late_replica_marks_its_node_too() -> None:
    deadlines = Deadlines(load_deadline=100)
    deadlines.observe([LOADING], 0)
    deadlines.observe([LOADING], 101)
    assert deadlines.unfit(CHAT, "r1") == {"n1"}


def test_the_mark_outlives_the_replica_and_what_is_gone_is_forgotten() -> None:
    deadlines = Deadlines(load_deadline=100)
    deadlines.observe([FAILED], 0)
    deadlines.observe([], 1)
    assert deadlines.unfit(CHAT, "r1") == {"n1"}
    deadlines.observe([LOADING], 2)
    assert deadlines.late(102) == frozenset()
    assert deadlines.late(103) == {"chat-1"}
