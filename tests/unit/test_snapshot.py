"""The agent's part of a GPUNode's status."""

from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st

from llorch_agent.core.readings import CPU_UUID, DeviceReading, SystemReading
from llorch_agent.core.snapshot import Facts, ModelFile, ReplicaFacts, compose, reserved
from llorch_api import AgentStatus, DeviceHealth, GPUNodeStatus, NodeFacts, ReplicaOrigin, ReplicaState
from llorch_api.gpunode import AGENT_STATUS_FIELDS

AGENT = AgentStatus(version="0.1.0", boot_id="b1", address="http://10.0.0.1:9200", machine_id="m1")


def gpu(index: int, *, total: int = 24_576, free: int = 20_000, health: DeviceHealth = DeviceHealth.HEALTHY) -> DeviceReading:
    return DeviceReading(
        uuid=f"GPU-5c89852c-0000-4000-8000-00000000000{index}",
        index=index,
        name="NVIDIA L4",
        total=total,
        free=free,
        used=total - free,
        compute_capability="8.9",
        pci_bus_id=f"00000000:1{index}:00.0",
        health=health,
    )


def replica(name: str, state: ReplicaState = ReplicaState.READY, **more: object) -> ReplicaFacts:
    fields: dict[str, object] = {"pool": "chat", "origin": ReplicaOrigin.ASSIGNED, "slots_total": 4, "slots_free": 3}
    return ReplicaFacts(id=name, state=state, **{**fields, **more})  # type: ignore[arg-type]


def test_the_summary_is_what_kubectl_get_shows():
    facts = Facts(
        AGENT,
        devices=[gpu(0, free=20_000), gpu(1, total=24_576, free=24_000), gpu(2, health=DeviceHealth.UNHEALTHY)],
        replicas=[replica("a"), replica("b", pool="embed", slots_free=4), replica("c", ReplicaState.LOADING, pool="big")],
    )
    assert compose(facts)["summary"] == {"gpus": "3", "vram": "42.9/48.0Gi", "slots": "7/8", "pools": "big,chat,embed"}


def test_a_machine_without_a_gpu_says_cpu():
    memory = DeviceReading(uuid=CPU_UUID, kind="cpu", total=16_000, free=8_000, health=DeviceHealth.HEALTHY)
    status = compose(Facts(AGENT, devices=[memory]))
    assert status["summary"]["gpus"] == "cpu"
    assert status["devices"]["cpu"]["kind"] == "cpu"


def test_free_memory_is_told_in_steps_and_totals_exactly():
    status = compose(Facts(AGENT, devices=[gpu(0, total=24_563, free=20_031)], foreign={gpu(0).uuid: 1_000}))
    device = status["devices"][gpu(0).uuid]
    assert (device["vramTotalMiB"], device["vramFreeMiB"], device["foreignMiB"]) == (24_563, 19_968, 960)


def test_a_loading_engine_reserves_what_the_driver_does_not_show_yet():
    loading = replica("a", ReplicaState.LOADING, promised={"g0": 6_000, "g1": 1_000}, measured={"g0": 2_048})
    assert reserved(loading) == 6_000 - 2_048 + 1_000
    status = compose(Facts(AGENT, replicas=[loading]))
    assert (status["replicas"]["a"]["vramMiB"], status["replicas"]["a"]["reservedMiB"]) == (2_048, 4_952)


def test_an_engine_that_uses_more_than_promised_reserves_nothing_and_never_less():
    assert reserved(replica("a", promised={"g0": 1_000}, measured={"g0": 4_096})) == 0
    assert reserved(replica("a", promised={"g0": 1_000, "g1": 500}, measured={"g0": 4_096})) == 500


def test_a_replica_without_an_engine_to_come_reserves_nothing():
    for state in (ReplicaState.FAILED, ReplicaState.STOPPED):
        assert reserved(replica("a", state, promised={"g0": 1_000})) == 0
    assert reserved(replica("a", ReplicaState.FETCHING, promised={"g0": 1_000})) == 1_000


@given(promised=st.integers(0, 80_000), measured=st.integers(0, 80_000))
def test_measured_and_reserved_never_sum_to_less_than_promised(promised: int, measured: int):
    facts = replica("a", promised={"g0": promised}, measured={"g0": measured})
    told = compose(Facts(AGENT, replicas=[facts]))["replicas"]["a"]
    assert told["vramMiB"] + told["reservedMiB"] >= promised


def test_long_texts_are_cut_to_what_the_api_takes():
    many = [replica(f"r{n}", pool=f"pool-{n:03d}-{'x' * 40}", message="m" * 1000) for n in range(64)]
    status = compose(Facts(AGENT, replicas=many))
    assert len(status["summary"]["pools"]) == 256
    assert len(status["replicas"]["r0"]["message"]) == 256
    GPUNodeStatus.model_validate(status)


def test_only_the_newest_models_and_the_assigned_replicas_first():
    files = [ModelFile(f"sha256:{n}", f"file:/m/{n}.gguf", n) for n in range(40)]
    brought = [replica(f"a{n}", origin=ReplicaOrigin.ADOPTED) for n in range(70)]
    status = compose(Facts(AGENT, models=files, replicas=[*brought, replica("z")]))
    assert len(status["models"]) == 32
    assert "sha256:0" in status["models"]
    assert len(status["replicas"]) == 64
    assert "z" in status["replicas"]


def test_every_field_of_the_agent_but_the_heartbeat_is_there():
    assert set(compose(Facts(AGENT))) == set(AGENT_STATUS_FIELDS) - {"heartbeat"}


def test_the_object_stays_small():
    labels = {"kubernetes.io/hostname": "gpu-1", "kubernetes.io/os": "linux", "nvidia.com/gpu.product": "NVIDIA-L4"}
    system = SystemReading(16, 64_000, 32_000, 500_000)

    def size(gpus: int, replicas: int) -> int:
        facts = Facts(
            AGENT,
            node=NodeFacts(labels=labels, zone="eu-1a"),
            devices=[gpu(n) for n in range(gpus)],
            system=system,
            replicas=[
                replica(f"chat-{n:05d}", revision="0123456789abcdef", promised={"g": 5_000}, measured={"g": 5_000})
                for n in range(replicas)
            ],
            models=[ModelFile("sha256:" + "0" * 64, "hf:org/model/file-Q4_K_M.gguf", 4_000) for _ in range(replicas)],
        )
        return len(json.dumps(compose(facts), separators=(",", ":")))

    assert size(1, 2) < 2_000
    assert size(8, 8) < 5_000
