"""What agent and operator say to one another over HTTP, and what each makes of it."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from llorch_agent.core import node_wire as agent
from llorch_api import AgentState, GPUNode, GPUNodeStatus, NodePhase, ReplicaState
from llorch_api.gpunode import AGENT_STATUS_FIELDS
from llorch_operator.core import node_wire as operator
from llorch_operator.core.liveness import Liveness
from llorch_operator.core.node_list import availability, pool_snapshots, wire_status
from llorch_operator.core.nodes import Pulse, phase_of, token_of
from llorch_operator.core.pools import Seen

GIB = 1 << 30
STATUS: dict[str, Any] = {
    "agent": {
        "version": "1", "bootId": "b1", "address": "http://10.0.0.1:9200", "machineId": "m", "state": "Running", "startedAt": "",
    },
    "heartbeat": {"sequence": 7, "time": "2026-01-01T00:00:00Z", "intervalSeconds": 5},
    "devices": {
        "GPU-b": {"index": 1, "name": "L4", "vramTotalMiB": 24576, "vramFreeMiB": 1024, "computeCapability": "8.9"},
        "GPU-a": {"index": 0, "name": "L4", "vramTotalMiB": 24576, "vramFreeMiB": 2048},
    },
    "system": {"cpuCores": 8, "memoryTotalMiB": 1024},
    "replicas": {
        "chat-1": {"pool": "chat", "state": "Ready", "slotsTotal": 4, "slotsFree": 3},
        "chat-2": {"pool": "chat", "state": "Loading", "slotsTotal": 4, "slotsFree": 4},
        "old-1": {"pool": "old", "state": "Draining", "slotsTotal": 2, "slotsFree": 1},
    },
}  # fmt: skip


def node(status: dict[str, Any], **metadata: Any) -> GPUNode:
    return GPUNode.model_validate({"metadata": {"name": "gpu-1", **metadata}, "status": status})


def beat(*pools: dict[str, Any], status: dict[str, Any] | None = None) -> operator.Beat:
    return operator.Beat.model_validate({"pools": list(pools), "status": status})


def after(known: dict[str, Any], told: operator.Beat) -> dict[str, Any]:
    return operator.beaten(GPUNodeStatus.model_validate(known), told, now="T", interval=10, new_boot_id="new")


def test_a_registration_lists_gpus_in_the_driver_s_order_with_bytes() -> None:
    body = agent.registration("gpu-1", STATUS, ("pool-0",))

    assert [(gpu["device_id"], gpu["compute_capability"]) for gpu in body["capabilities"]["gpus"]] == [(0, ""), (1, "8.9")]
    assert body["capabilities"]["gpus"][0]["vram_total_bytes"] == 24 * GIB
    assert (body["capabilities"]["cpu_cores"], body["capabilities"]["ram_total_bytes"]) == (8, GIB)
    assert (body["address"], body["machine_id"], body["pools"]) == ("http://10.0.0.1:9200", "m", ["pool-0"])
    assert operator.Registration.model_validate(body)


def test_a_heartbeat_sums_the_replicas_of_a_pool_and_names_the_pools_that_are_still_to_come() -> None:
    body = agent.heartbeat("gpu-1", STATUS, ("pool-0",))

    pools = {pool["pool_id"]: pool for pool in body["pools"]}
    assert list(pools) == ["chat", "old", "pool-0"]
    assert (pools["chat"]["ready"], pools["chat"]["slots_free"], pools["chat"]["slots_total"]) == (True, 3, 4)
    assert (pools["old"]["ready"], pools["old"]["draining"]) == (False, True)
    assert (pools["pool-0"]["ready"], pools["pool-0"]["engine"], pools["chat"]["engine"]) == (False, None, "llamacpp")
    assert pools["chat"]["vram_free_bytes"] == 3 * GIB
    assert operator.Beat.model_validate(body).status == STATUS


def test_an_agent_that_ends_says_that_every_pool_drains() -> None:
    status = {**STATUS, "agent": {**STATUS["agent"], "state": "Draining"}}
    assert all(pool["draining"] for pool in agent.heartbeat("gpu-1", status, ("pool-0",))["pools"])


def test_a_whole_status_counts_as_it_is_but_for_the_address_that_was_registered() -> None:
    known = {"agent": {"address": "http://registered:9200"}, "phase": "Online"}
    sent = {**STATUS, "phase": "Lost", "conditions": [], "somethingNew": 1}

    status = after(known, beat(status=sent))

    assert status["agent"] == {**STATUS["agent"], "address": "http://registered:9200"}
    assert status["heartbeat"] == STATUS["heartbeat"]
    assert status["replicas"].keys() == STATUS["replicas"].keys()
    assert set(status) <= set(AGENT_STATUS_FIELDS), "the operator's fields are not the agent's to write"


@pytest.mark.parametrize("gone", ["agent", "heartbeat"])
def test_a_status_without_a_sign_of_life_is_refused(gone: str) -> None:
    with pytest.raises(ValueError, match="status needs"):
        after({}, beat(status={name: value for name, value in STATUS.items() if name != gone}))


def test_a_status_that_breaks_the_schema_is_refused() -> None:
    with pytest.raises(ValidationError):
        after({}, beat(status={**STATUS, "replicas": {"x": {"slotsTotal": -1}}}))


def test_the_first_heartbeat_and_not_the_registration_makes_a_node_online() -> None:
    registration = operator.Registration.model_validate(
        {"node_id": "gpu-1", "address": "10.0.0.1:9200", "pools": [], "capabilities": {"gpus": []}}
    )
    pulse = Pulse(Liveness.FRESH, True, 0.0)

    registered = operator.registered(GPUNodeStatus(), registration)
    beaten = after(registered, beat())

    assert phase_of(node(registered), pulse) is NodePhase.REGISTERING
    assert phase_of(node(beaten), pulse) is NodePhase.ONLINE
    again = operator.registered(GPUNodeStatus.model_validate(beaten), registration)
    assert token_of(node(again)) == token_of(node(beaten)), "a registration is no heartbeat, and takes nobody offline"
    assert token_of(node(after(beaten, beat()))) != token_of(node(beaten))


def test_registering_again_keeps_the_devices_that_the_agent_reports_itself() -> None:
    gpu = {"device_id": 0, "name": "L4", "vram_total_bytes": GIB, "compute_capability": "8.9"}
    body = {"node_id": "gpu-1", "address": "a:1", "pools": [], "capabilities": {"gpus": [gpu]}}
    registration = operator.Registration.model_validate(body)

    assert set(operator.registered(GPUNodeStatus.model_validate(STATUS), registration)["devices"]) == {"GPU-a", "GPU-b"}
    assert set(operator.registered(GPUNodeStatus(), registration)["devices"]) == {"gpu-0"}


def test_a_pool_without_total_slots_has_at_least_its_free_ones() -> None:
    status = after({}, beat({"pool_id": "p", "ready": True, "slots_free": 4}))
    assert (status["replicas"]["p"]["slotsTotal"], status["replicas"]["p"]["slotsFree"]) == (4, 4)


def test_a_node_all_of_whose_pools_drain_is_draining() -> None:
    status = after({}, beat({"pool_id": "p", "ready": False, "draining": True}))
    assert status["agent"]["state"] == AgentState.DRAINING
    assert status["replicas"]["p"]["state"] == ReplicaState.DRAINING


@pytest.mark.parametrize(
    ("liveness", "says"),
    [(Liveness.FRESH, "Online"), (Liveness.SUSPECT, "Online"), (Liveness.OFFLINE, "Offline"), (Liveness.LOST, "Offline")],
)
def test_the_wire_has_no_word_for_suspect_and_lost(liveness: Liveness, says: str) -> None:
    assert wire_status(node(STATUS), Pulse(liveness, True, 0.0)) == says


def test_two_pools_of_one_name_on_two_nodes_are_two() -> None:
    pulse = Pulse(Liveness.FRESH, True, 0.0)
    first = Seen(node(after({}, beat({"pool_id": "pool-0", "ready": True, "slots_free": 1}))), pulse, "http://a:1")
    second = Seen(
        node(after({}, beat({"pool_id": "pool-0", "ready": False})), annotations={"llorch.dev/pools": "pool-0,pool-1"}),
        pulse,
        "http://b:1",
    )

    assert [pool["ready"] for pool in pool_snapshots(first.node)] == [True]
    assert [(pool["pool_id"], pool["ready"]) for pool in pool_snapshots(second.node)] == [("pool-0", False), ("pool-1", False)]
    assert availability([first], {})["models"] == [
        {"model_id": "pool-0", "nodes": ["gpu-1"], "total_nodes": 1, "total_capacity": 1}
    ]


@pytest.mark.parametrize(("text", "expected"), [("1970-01-01T00:00:01Z", 1000), ("", 0), ("yesterday", 0)])
def test_times_are_milliseconds_and_none_is_zero(text: str, expected: int) -> None:
    assert operator.milliseconds(text) == expected
