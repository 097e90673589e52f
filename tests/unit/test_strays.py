"""Engines that nobody assigns any more: found, given a moment, and ended."""

from __future__ import annotations

from llorch_api import Assignment, GPUNode, GPUNodeSpec, GPUNodeStatus, ObjectMeta, ReplicaOrigin, ReplicaState, ReplicaStatus
from llorch_api.gpunode import AssignedModel
from llorch_operator.core.strays import GRACE_SECONDS, Stray, Strays

STRAY = Stray("gpu-1", "tiny-aaaaa", "tiny", "r1")


def node(
    *, assigned: bool = False, state: ReplicaState = ReplicaState.READY, origin: ReplicaOrigin = ReplicaOrigin.ASSIGNED
) -> GPUNode:
    wanted = Assignment(
        pool="tiny",
        namespace="default",
        revision="r1",
        model=AssignedModel(source="file:/m"),
        devices={},
        slots=1,
        context_tokens=1,
    )
    return GPUNode(
        metadata=ObjectMeta(name="gpu-1"),
        spec=GPUNodeSpec(replicas={"tiny-aaaaa": wanted} if assigned else {}),
        status=GPUNodeStatus(replicas={"tiny-aaaaa": ReplicaStatus(pool="tiny", revision="r1", state=state, origin=origin)}),
    )


def test_a_replica_that_no_assignment_names_is_ended_after_a_moment() -> None:
    strays = Strays()
    assert strays.observe([node()], now=100) == []
    assert strays.next_change(100) == 100 + GRACE_SECONDS
    assert strays.observe([node()], now=100 + GRACE_SECONDS) == [STRAY]
    assert strays.observe([node(assigned=True)], now=106) == []
    assert strays.next_change(106) is None


def test_a_replica_whose_assignment_just_ended_gets_its_moment_to_end() -> None:
    strays = Strays()
    assert strays.observe([node(assigned=True)], now=0) == []
    assert strays.observe([node()], now=50) == []
    assert strays.observe([node(state=ReplicaState.DRAINING)], now=50 + GRACE_SECONDS) == []


def test_an_engine_that_a_handoff_file_brought_is_nobodys_stray() -> None:
    strays = Strays()
    for origin in (ReplicaOrigin.LAUNCHED, ReplicaOrigin.ADOPTED):
        assert strays.observe([node(origin=origin)], now=0) == []
        assert strays.observe([node(origin=origin)], now=60) == []


def test_a_silent_nodes_strays_wait_until_it_is_back() -> None:
    strays = Strays()
    strays.observe([node()], now=0)
    assert strays.observe([], now=10) == []
    assert strays.observe([node()], now=20) == []
    assert strays.observe([node()], now=20 + GRACE_SECONDS) == [STRAY]
