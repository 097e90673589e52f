"""What a pool's status says, for every state that its replicas can be in."""

from __future__ import annotations

from typing import Any

import pytest

from llorch_api import ConditionReason, GPUNode, GPUPool, ModelShape, ResolvedModel
from llorch_operator.core.liveness import Liveness
from llorch_operator.core.nodes import Pulse, conditions_of, phase_of
from llorch_operator.core.placement import PoolOutcome
from llorch_operator.core.pools import Resolution, Seen, pool_names_without_pool, status_of
from llorch_operator.core.refusal import Cause, Refusal
from llorch_operator.core.revision import revision_of
from llorch_operator.core.views import PoolKey

FOUND = Resolution(ResolvedModel(resolved="file:/m.gguf", digest="d", size_mib=1, shape=ModelShape()))
NOW = "2026-01-01T00:00:00Z"


def a_pool(replicas: int = 1, **status: Any) -> GPUPool:
    return GPUPool.model_validate(
        {
            "metadata": {"name": "chat", "namespace": "default", "generation": 3},
            "spec": {"model": {"source": "file:/m.gguf"}, "replicas": replicas},
            "status": status,
        }
    )


def a_node(state: str | None = "Ready", *, desired: str = "Run", agent: str = "Running", message: str = "") -> GPUNode:
    wanted = {"desired": desired, "pool": "chat", "namespace": "default", "revision": "r", "model": {"source": "file:/m.gguf"}}
    report = {"pool": "chat", "state": state, "slotsTotal": 4, "slotsFree": 4, "revision": "r", "message": message}
    return GPUNode.model_validate(
        {
            "metadata": {"name": "n1"},
            "spec": {"replicas": {"chat-1": {**wanted, "devices": {}, "slots": 4, "contextTokens": 512}}},
            "status": {
                "agent": {"bootId": "b", "state": agent, "address": "http://10.0.0.1:9200"},
                "heartbeat": {"sequence": 1},
                "replicas": {"chat-1": report} if state else {},
            },
        }
    )


def seen(node: GPUNode, liveness: Liveness = Liveness.FRESH) -> Seen:
    return Seen(node, Pulse(liveness, True, 0.0), "http://10.0.0.1:9200")


def status(pool: GPUPool, *nodes: Seen, resolution: Resolution = FOUND, outcome: PoolOutcome | None = None) -> Any:
    return status_of(pool, nodes, resolution, outcome, now=NOW, handoff_namespace="default")


def test_a_ready_replica_is_an_endpoint_and_its_slots_count() -> None:
    found = status(a_pool(), seen(a_node()))
    assert found.endpoints["chat-1"].url == "http://10.0.0.1:9200/replicas/chat-1"
    assert (found.desired, found.current, found.ready, found.slots_total, found.nodes, found.reason) == (
        1,
        1,
        1,
        4,
        1,
        "AllReady",
    )
    assert {item.type: item.status.value for item in found.conditions} == {
        "Available": "True",
        "Placed": "True",
        "Progressing": "False",
    }
    assert all(item.observed_generation == 3 for item in found.conditions)


@pytest.mark.parametrize(
    "one",
    [
        seen(a_node("Loading")),
        seen(a_node(None)),
        seen(a_node(), Liveness.OFFLINE),
        seen(a_node(desired="Drain")),
        seen(a_node(agent="Draining")),
        seen(a_node(agent="Stopped")),
        Seen(a_node(), Pulse(Liveness.FRESH, True, 0.0), ""),
    ],
)
def test_what_does_not_serve_is_not_in_routing(one: Seen) -> None:
    assert status(a_pool(), one).endpoints == {}


def test_a_suspect_node_keeps_its_traffic() -> None:
    assert status(a_pool(), seen(a_node(), Liveness.SUSPECT)).ready == 1


def test_a_failed_replica_says_why() -> None:
    found = status(a_pool(), seen(a_node("Failed", message="out of memory on GPU-1")))
    available = next(item for item in found.conditions if item.type == "Available")
    assert found.reason == "ReplicaFailed"
    assert "chat-1 on n1: Failed: out of memory on GPU-1" in available.message


def test_a_pool_that_fits_nowhere_shows_the_arithmetic() -> None:
    refusal = Refusal("gpu-3", Cause.MEMORY, needed=6709, free=5120, total=24_576, foreign=16_384)
    found = status(a_pool(2), outcome=PoolOutcome(2, (refusal,)))
    placed = next(item for item in found.conditions if item.type == "Placed")
    assert placed.reason == found.reason == "DoesNotFit"
    assert placed.message == "2 of 2 replicas fit nowhere: gpu-3: needs 6,709 MiB, 5,120 free of 24,576 (foreign 16,384)"


def test_a_missing_model_is_the_one_reason_that_matters() -> None:
    found = status(a_pool(), resolution=Resolution(None, ConditionReason.MODEL_NOT_AVAILABLE, "n1: /m.gguf: no such file"))
    assert found.reason == "ModelNotAvailable"


def test_a_condition_keeps_its_time_while_its_status_stays() -> None:
    old = [
        {"type": "Available", "status": "True", "reason": "AllReady", "message": "", "lastTransitionTime": "2020-01-01T00:00:00Z"}
    ]
    found = status(a_pool(2, conditions=old), seen(a_node()))
    available = next(item for item in found.conditions if item.type == "Available")
    assert (available.reason, available.last_transition_time) == ("PartlyReady", "2020-01-01T00:00:00Z")


def test_a_handoff_engine_is_served_under_its_pools_name_and_named_by_its_node() -> None:
    node = GPUNode.model_validate(
        {
            "metadata": {"name": "n1"},
            "status": {
                "agent": {"bootId": "b"},
                "replicas": {"r0": {"pool": "chat", "origin": "adopted", "state": "Ready", "slotsTotal": 4}},
            },
        }
    )
    found = status(a_pool(0), seen(node))
    assert list(found.endpoints) == ["n1.r0"]
    assert pool_names_without_pool({"n1": seen(node)}, [], "default") == {"chat"}
    assert pool_names_without_pool({"n1": seen(node)}, [PoolKey("default", "chat")], "default") == set()


@pytest.mark.parametrize(
    ("liveness", "drain", "boot", "expected"),
    [
        (Liveness.LOST, {"deadlineSeconds": 1}, "b", "Lost"),
        (Liveness.OFFLINE, {"deadlineSeconds": 1}, "b", "Offline"),
        (Liveness.SUSPECT, {"deadlineSeconds": 1}, "b", "Draining"),
        (Liveness.SUSPECT, None, "b", "Suspect"),
        (Liveness.FRESH, None, "", "Registering"),
        (Liveness.FRESH, None, "b", "Online"),
    ],
)
def test_the_phase_follows_the_precedence(liveness: Liveness, drain: Any, boot: str, expected: str) -> None:
    node = GPUNode.model_validate({"metadata": {"name": "n"}, "spec": {"drain": drain}, "status": {"agent": {"bootId": boot}}})
    assert phase_of(node, Pulse(liveness, True, 0)).value == expected


def test_an_offline_node_is_unknown_and_a_stopped_agent_is_known_to_be_down() -> None:
    silent = conditions_of(a_node(), Pulse(Liveness.OFFLINE, False, 31))[0]
    stopped = conditions_of(a_node(agent="Stopped"), Pulse(Liveness.OFFLINE, False, 1))[0]
    assert (silent.status.value, silent.reason) == ("Unknown", "HeartbeatMissed")
    assert (stopped.status.value, stopped.reason) == ("False", "AgentStopped")


def test_the_revision_changes_with_what_runs_and_with_nothing_else() -> None:
    def revision(**changes: Any) -> str:
        spec = {"model": {"source": "file:/m.gguf"}, **changes}
        pool = GPUPool.model_validate({"metadata": {"name": "chat"}, "spec": spec})
        assert FOUND.model is not None
        return revision_of(pool.spec, FOUND.model)

    base = revision()
    assert base == revision(replicas=5) == revision(placement={"pin": "a"}) == revision(drainDeadlineSeconds=1)
    changed = [
        revision(slots=8),
        revision(contextTokens=512),
        revision(engine={"kvCacheType": "q8_0"}),
        revision(engine={"args": ["--temp", "1"]}),
    ]
    assert len({base, *changed}) == 5
