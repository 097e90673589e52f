"""The node API as its peers see it: the wire formats, who is let in, and the GPUNodes that come of it."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from engine_node import foreign_engine

from fixtures.simulated_agent import SimulatedAgent
from llorch_agent.app import Agent
from llorch_agent.node_api_store import NodeApiStore
from llorch_agent.settings import AgentSettings
from llorch_api import GPUNode, GPUPool, NodePhase, ReplicaOrigin, ReplicaState
from llorch_model.tiny import write_tiny
from llorch_operator.app import Operator
from llorch_operator.settings import OperatorSettings
from llorch_store import Key, NotFound, Store
from llorch_store.memory import MemoryStore
from llorch_web.application import application
from llorch_web.auth import Tokens
from llorch_web.server import Server

pytestmark = pytest.mark.functional

TOKEN, NEXT_TOKEN = "t" * 40, "n" * 40
NODE = Key("", "gpu-1")
GIB = 1 << 30


class Control:
    """An operator with its node API, and a client that speaks to it."""

    def __init__(self, store: Store, operator: Operator, url: str, client: aiohttp.ClientSession) -> None:
        self.store, self.operator, self.url, self.client = store, operator, url, client

    async def ask(self, method: str, path: str, body: Any = None, **options: Any) -> tuple[int, Any]:
        async with self.client.request(method, f"{self.url}{path}", json=body, **options) as answer:
            return answer.status, await answer.json() if answer.status != 204 else None

    async def register(self, **more: Any) -> tuple[int, Any]:
        return await self.ask("POST", "/v2/nodes/register", {**REGISTRATION, **more})

    async def beat(self, *pools: dict[str, Any], node: str = NODE.name, **more: Any) -> tuple[int, Any]:
        body = {"timestamp": "2025-09-30T12:00:00Z", "pools": list(pools), **more}
        return await self.ask("POST", f"/v2/nodes/{node}/heartbeat", body)

    async def nodes(self) -> dict[str, Any]:
        status, body = await self.ask("GET", "/v2/nodes")
        assert status == 200
        assert body["count"] == len(body["nodes"])
        return {node["node_id"]: node for node in body["nodes"]}

    async def metrics(self) -> str:
        async with self.client.get(f"{self.url}/metrics") as answer:
            return await answer.text()

    async def until(self, condition: Callable[[GPUNode], Any], key: Key = NODE, within_s: float = 10.0) -> GPUNode:
        node: GPUNode | None = None
        try:
            async with asyncio.timeout(within_s):
                while True:
                    try:
                        node = await self.store.get(GPUNode, key)
                        if condition(node):
                            return node
                    except NotFound:
                        node = None
                    await asyncio.sleep(0.02)
        except TimeoutError:
            pytest.fail(f"after {within_s} s: {node.to_json() if node else 'no node'}")


REGISTRATION: dict[str, Any] = {
    "node_id": NODE.name,
    "machine_id": "machine-alpha",
    "address": "http://192.168.1.100:9200",
    "pools": ["pool-0"],
    "capabilities": {
        "gpus": [{"device_id": 0, "name": "RTX 3090", "vram_total_bytes": 24 * GIB, "compute_capability": "8.6"}],
        "cpu_cores": 16,
        "ram_total_bytes": 64 * GIB,
    },
    "version": "0.1.0",
}
POOL: dict[str, Any] = {
    "pool_id": "pool-0", "ready": True, "draining": False, "slots_free": 3, "slots_total": 4, "vram_free_bytes": 20 * GIB,
    "engine": "llamacpp",
}  # fmt: skip


@asynccontextmanager
async def serving(store: Store, address: str = "127.0.0.1:0", **settings: Any) -> AsyncIterator[Control]:
    operator = Operator(store, OperatorSettings.model_validate({"cloud_profile": True, **settings}))
    server = Server(application(operator.routes(), registries=[operator.registry]), address, variable="TEST")
    await server.start()
    task = asyncio.create_task(operator.run())
    try:
        async with aiohttp.ClientSession() as client:
            yield Control(store, operator, server.url, client)
    finally:
        task.cancel()
        await asyncio.wait({task})
        operator.end_requests()
        await server.stop(2.0)


@pytest.fixture
async def store() -> AsyncIterator[Store]:
    async with MemoryStore() as opened:
        yield opened


@pytest.fixture
async def control(store: Store) -> AsyncIterator[Control]:
    async with serving(store) as started:
        yield started


# ---- the wire


async def test_a_registration_is_confirmed_and_the_node_is_registering_until_it_beats(control: Control) -> None:
    status, body = await control.register()

    assert status == 200
    assert (body["success"], body["message"], body["node_id"]) == (True, "Registered successfully", NODE.name)
    node = (await control.nodes())[NODE.name]
    assert (node["status"], node["machine_id"], node["address"]) == ("Registering", "machine-alpha", "http://192.168.1.100:9200")
    assert (node["pools"], node["version"], node["capabilities"]) == (["pool-0"], "0.1.0", REGISTRATION["capabilities"])
    assert node["registered_at_ms"] == node["last_heartbeat_ms"] > 1_700_000_000_000

    assert await control.beat() == (200, {"success": True, "next_heartbeat_ms": 10_000})
    node = (await control.nodes())[NODE.name]
    assert (node["status"], node["online"]) == ("Online", True)
    assert node["last_heartbeat_ms"] >= node["registered_at_ms"]


async def test_a_heartbeat_becomes_replicas_and_the_pool_is_routed_to_the_registered_address(control: Control) -> None:
    await control.register()

    await control.beat({**POOL, "models_available": ["llama-3-8b"]})

    node = await control.store.get(GPUNode, NODE)
    report = node.status.replicas["pool-0"]
    assert (report.origin, report.pool, report.state) == (ReplicaOrigin.ADOPTED, "pool-0", ReplicaState.READY)
    assert (report.slots_free, report.slots_total) == (3, 4)
    assert node.status.devices["gpu-0"].vram_free_mib == 20 * 1024
    assert [model.source for model in node.status.models.values()] == ["llama-3-8b"]

    async def endpoints() -> list[str]:
        try:
            pool = await control.store.get(GPUPool, Key("default", "pool-0"))
        except NotFound:
            return []
        return [endpoint.url for endpoint in pool.status.endpoints.values()]

    async with asyncio.timeout(5):
        while not (urls := await endpoints()):  # noqa: ASYNC110 - a store has no event
            await asyncio.sleep(0.02)
    assert urls == ["http://192.168.1.100:9200/replicas/pool-0"]

    await control.beat({**POOL, "ready": False, "slots_free": 0})
    node = await control.store.get(GPUNode, NODE)
    assert node.status.replicas["pool-0"].state is ReplicaState.PENDING
    await control.beat()
    assert not (await control.store.get(GPUNode, NODE)).status.replicas


async def test_a_node_that_reads_no_spec_is_given_no_replicas(control: Control, tmp_path: Path) -> None:
    await control.register()
    await control.beat(POOL)
    source = f"file:{write_tiny(tmp_path / 'm.gguf')}"
    body = {"metadata": {"name": "chat", "namespace": "default"}, "spec": {"model": {"source": source}, "replicas": 1}}

    await control.store.apply(GPUPool.model_validate(body), field_manager="test")

    await control.until(lambda node: any(c.type == "Schedulable" and c.status == "False" for c in node.status.conditions))
    assert not (await control.store.get(GPUNode, NODE)).spec.replicas


async def test_registering_again_updates_and_takes_nothing_out_of_service(control: Control) -> None:
    await control.register()
    await control.beat(POOL)

    status, _ = await control.register(address="http://192.168.1.101:9200", pools=["pool-0", "pool-1"])

    assert status == 200
    node = (await control.nodes())[NODE.name]
    assert (node["status"], node["address"], node["pools"]) == ("Online", "http://192.168.1.101:9200", ["pool-0", "pool-1"])
    states = {pool["pool_id"]: (pool["ready"], pool["slots_free"]) for pool in node["pool_status"]}
    assert states == {"pool-0": (True, 3), "pool-1": (False, 0)}


async def test_a_deregistered_node_is_gone_and_has_to_register_again(control: Control) -> None:
    await control.register()
    await control.beat(POOL)

    assert await control.ask("DELETE", f"/v2/nodes/{NODE.name}") == (204, None)

    assert await control.nodes() == {}
    status, body = await control.beat(POOL)
    assert (status, body["success"]) == (404, False)
    assert (await control.ask("DELETE", f"/v2/nodes/{NODE.name}"))[0] == 404
    assert (await control.register())[0] == 200
    with pytest.raises(NotFound):
        await control.store.get(GPUNode, Key("", "nobody"))


async def test_a_silent_node_is_listed_as_offline_and_online_again_with_its_next_beat(store: Store) -> None:
    async with serving(store) as control:
        await control.register()
        await control.beat(POOL)
        control.operator.fleet.tracker.timing = type(control.operator.fleet.tracker.timing)(node_timeout=0.5, grace=60)
        await store.patch_status(GPUNode, NODE, {"heartbeat": {"intervalSeconds": 1}}, field_manager="test")

        await control.until(lambda node: node.status.phase is NodePhase.OFFLINE)

        node = (await control.nodes())[NODE.name]
        assert (node["status"], node["online"]) == ("Offline", False)
        assert (await control.beat(POOL))[0] == 200
        assert (await control.nodes())[NODE.name]["status"] == "Online"


async def test_an_id_that_belongs_to_an_agent_in_the_cluster_is_refused(control: Control) -> None:
    async with SimulatedAgent(control.store, NODE.name):
        before = await control.until(lambda node: node.status.heartbeat.sequence)

        assert (await control.register())[0] == 409
        assert (await control.beat(POOL))[0] == 409
        assert (await control.ask("DELETE", f"/v2/nodes/{NODE.name}"))[0] == 409
        assert (await control.ask("GET", f"/v2/nodes/{NODE.name}/spec"))[0] == 409

        after = await control.store.get(GPUNode, NODE)
        assert (after.metadata.uid, after.status.agent.address) == (before.metadata.uid, before.status.agent.address)
        assert NODE.name in await control.nodes(), "all nodes are listed, however they came"


async def test_the_address_that_a_node_in_the_cluster_claims_is_not_believed(store: Store) -> None:
    operator = Operator(store, OperatorSettings.model_validate({"cloud_profile": True}), claimed_hosts=False)
    claims = {"agent": {"address": "http://10.9.9.9:9200", "bootId": "b"}}
    labels = {"llorch.dev/transport": "http"}
    owner = {"api_version": "v1", "kind": "Node", "name": "a", "uid": "u"}
    in_cluster = GPUNode.model_validate({"metadata": {"name": "a"}, "status": claims})
    owned = GPUNode.model_validate({"metadata": {"name": "a", "labels": labels, "owner_references": [owner]}, "status": claims})
    by_http = GPUNode.model_validate({"metadata": {"name": "a", "labels": labels}, "status": claims})

    urls = [operator.fleet.base_url(node) for node in (in_cluster, owned, by_http)]

    assert urls == ["", "", "http://10.9.9.9:9200"]


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"node_id": "Not_A_Name"}, "node_id: must be lower-case letters, digits, '-' and '.'"),
        ({"address": "ftp://x:1"}, "address: must be http://host:port"),
        ({"address": "http://user:secret@x:1"}, "address: must be http://host:port"),
        ({"address": "http://x:1/path"}, "address: must be http://host:port"),
        ({"address": "http://x:99999"}, "address: must be http://host:port"),
        ({"pools": "pool-0"}, "pools: "),
        ({"pools": ["a,b"]}, "pools.0: "),
        ({"capabilities": {}}, "capabilities.gpus: "),
    ],
)
async def test_a_registration_that_cannot_be_is_refused_with_the_field(control: Control, more: dict[str, Any], says: str) -> None:
    status, body = await control.register(**more)
    assert (status, body["success"]) == (400, False)
    assert body["message"].startswith(says)
    assert not (await control.store.list(GPUNode)).items


async def test_an_address_without_a_scheme_is_http(control: Control) -> None:
    assert (await control.register(address="192.168.1.7:9200"))[0] == 200
    assert (await control.nodes())[NODE.name]["address"] == "http://192.168.1.7:9200"


async def test_a_body_about_another_node_than_the_path_is_refused(control: Control) -> None:
    await control.register()
    status, body = await control.beat(POOL, node_id="gpu-2")
    assert (status, body["message"]) == (400, "node_id is 'gpu-2' in the body and 'gpu-1' in the path")


async def test_availability_says_which_node_has_which_model(control: Control) -> None:
    for name in ("gpu-1", "gpu-2"):
        await control.register(node_id=name)
        await control.beat({**POOL, "models_available": ["llama"]}, node=name)
    await control.beat({**POOL, "models_available": ["llama", "phi"]}, node="gpu-2")

    status, body = await control.ask("GET", "/v2/catalog/availability")

    assert status == 200
    assert body["nodes"]["gpu-2"]["models"] == ["llama", "phi", "pool-0"]
    assert body["nodes"]["gpu-2"]["pools"] == [{"pool_id": "pool-0", "ready": True, "models": ["pool-0"]}]
    assert (body["replicated_models"], body["single_node_models"], body["total_models"]) == (["llama", "pool-0"], ["phi"], 3)
    served = next(model for model in body["models"] if model["model_id"] == "pool-0")
    assert served == {"model_id": "pool-0", "nodes": ["gpu-1", "gpu-2"], "total_nodes": 2, "total_capacity": 8}


async def test_with_the_profile_off_every_path_says_how_to_turn_it_on(store: Store) -> None:
    async with serving(store, cloud_profile=False) as control:
        for method, path in (("POST", "/v2/nodes/register"), ("GET", "/v2/nodes"), ("GET", "/v2/catalog/availability")):
            status, body = await control.ask(method, path)
            assert status == 503
            assert "ORCHESTRATORD_CLOUD_PROFILE=true" in body["message"]


# ---- who is let in


async def test_without_the_token_nobody_is_heard_and_no_name_becomes_a_label(store: Store, tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text(TOKEN)
    async with serving(store, api_token_file=str(file)) as control:
        status, body = await control.register()
        assert (status, body["success"], body["code"], body["error"]) == (401, False, 40101, "MISSING_TOKEN")
        control.client.headers["Authorization"] = "Bearer " + "x" * 40
        status, body = await control.beat(POOL, node="made-up")
        assert (status, body["code"], body["error"]) == (401, 40102, "BAD_TOKEN")
        for method, path in (("GET", "/v2/nodes"), ("GET", "/v2/nodes/x/spec"), ("DELETE", "/v2/nodes/x")):
            assert (await control.ask(method, path))[0] == 401
        control.client.headers["Authorization"] = f"Bearer {TOKEN}"
        assert (await control.beat(POOL, node="unheard-of"))[0] == 404
        await control.register()
        await control.beat(POOL)

        page = await control.metrics()

    assert "made-up" not in page
    assert "unheard-of" not in page
    assert 'orchd_node_registrations_total{outcome="unauthorized"} 1.0' in page
    assert 'orchd_node_registrations_total{outcome="success"} 1.0' in page
    assert 'orchd_node_heartbeats_total{node_id="",outcome="unauthorized"} 1.0' in page
    assert 'orchd_node_heartbeats_total{node_id="",outcome="error"} 1.0' in page
    assert 'orchd_node_heartbeats_total{node_id="gpu-1",outcome="success"} 1.0' in page
    assert 'orchd_node_deregistrations_total{outcome="unauthorized"} 1.0' in page


async def test_a_token_is_changed_without_a_restart_and_the_previous_one_is_good_for_a_while(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llorch_web.auth.LOOK_INTERVAL", 0.0)
    file = tmp_path / "token"
    file.write_text(TOKEN)
    async with serving(store, api_token_file=str(file)) as control:
        control.client.headers["Authorization"] = f"Bearer {TOKEN}"
        assert (await control.register())[0] == 200
        file.write_text(f"{NEXT_TOKEN},{TOKEN}")
        assert (await control.beat(POOL))[0] == 200
        control.client.headers["Authorization"] = f"Bearer {NEXT_TOKEN}"
        assert (await control.beat(POOL))[0] == 200
        file.write_text(NEXT_TOKEN)
        control.client.headers["Authorization"] = f"Bearer {TOKEN}"
        assert (await control.beat(POOL))[0] == 401


# ---- agents that came by HTTP


def agent_settings(root: Path, **more: Any) -> AgentSettings:
    fields = {
        "node_id": NODE.name, "address": "http://127.0.0.1:9", "runtime_dir": root / "engines", "model_dir": root / "models",
        "watch_interval_ms": 500, "heartbeat_interval_secs": 1, "devices": "cpu", "drain_secs": 1, "store": "memory:",
    }  # fmt: skip
    return AgentSettings(**{**fields, **more})


@asynccontextmanager
async def agent_at(url: str, root: Path, tokens: Tokens | None = None, **more: Any) -> AsyncIterator[Agent]:
    api = NodeApiStore(url, tokens or Tokens(), NODE.name, pools=("pool-0",), draw=random.Random(), **more)
    async with api:
        agent = Agent(agent_settings(root), api)
        api.speaks_for(agent.snapshot, agent.beat_every)
        await agent.start()
        try:
            yield agent
        finally:
            await agent.stop()


async def test_an_agent_outside_the_cluster_is_given_replicas_and_deregisters_when_it_ends(
    control: Control, tmp_path: Path
) -> None:
    source = f"file:{write_tiny(tmp_path / 'm.gguf')}"
    spec = {
        "model": {"source": source}, "replicas": 1, "slots": 2, "contextTokens": 256, "placement": {"allowCPU": True},
    }  # fmt: skip
    body = {"metadata": {"name": "chat", "namespace": "default"}, "spec": spec}
    async with agent_at(control.url, tmp_path) as agent:
        server = Server(application(agent.routes()), "127.0.0.1:0", variable="TEST")
        await server.start()
        try:
            await control.until(lambda node: node.status.heartbeat.sequence)
            await control.register(address=server.url, pools=["pool-0"])
            node = (await control.nodes())[NODE.name]
            assert {pool["pool_id"]: pool["ready"] for pool in node["pool_status"]} == {"pool-0": False}

            await control.store.apply(GPUPool.model_validate(body), field_manager="test")

            ready = await control.until(
                lambda node: any(report.state is ReplicaState.READY for report in node.status.replicas.values()), within_s=30
            )
            assert list(ready.spec.replicas) == list(ready.status.replicas)
            assert ready.status.heartbeat.interval_seconds == 1
        finally:
            await server.stop(0)
    with pytest.raises(NotFound):
        await control.store.get(GPUNode, NODE)


async def test_an_agent_starts_before_its_control_plane_and_outlives_it(store: Store, tmp_path: Path) -> None:
    async with MemoryStore() as first:
        async with serving(first) as control:
            url = control.url
        async with agent_at(url, tmp_path) as agent:
            await asyncio.sleep(0.3)
            assert not agent.health()
            for next_store in (first, store):  # the second has never heard of the node: 404, and it registers again
                async with serving(next_store, address=url.removeprefix("http://")) as control:
                    await control.until(lambda node: node.status.heartbeat.sequence, within_s=20)
                assert not agent.health()


async def test_requests_are_answered_while_the_control_plane_is_away_and_when_it_comes_back_knowing_nothing(
    store: Store, tmp_path: Path
) -> None:
    url, answers = "", []
    async with foreign_engine(write_tiny(tmp_path / "m.gguf"), slots=2) as (_, engine):
        (tmp_path / "engines").mkdir()
        document = {"pool_id": "pool-0", "replica_id": "r0", "engine": "llamacpp", "engine_version": "v1", "url": engine}
        (tmp_path / "engines/a.json").write_text(json.dumps(document))
        async with MemoryStore() as first, AsyncExitStack() as stack:
            async with serving(first) as control:
                url = control.url
                agent = await stack.enter_async_context(agent_at(url, tmp_path))
                front = Server(application(agent.routes()), "127.0.0.1:0", variable="TEST")
                await front.start()
                stack.push_async_callback(front.stop, 0)
                await control.until(
                    lambda node: any(report.state is ReplicaState.READY for report in node.status.replicas.values())
                )
                client = await stack.enter_async_context(aiohttp.ClientSession())

                async def keep_asking() -> None:
                    target = f"{front.url}/replicas/pool-0_r0/v1/completions"
                    while True:
                        async with client.post(target, json={"model": "m", "prompt": "a", "max_tokens": 8}) as answer:
                            answers.append(answer.status)
                            await answer.read()

                asking = asyncio.create_task(keep_asking())
            await asyncio.sleep(1.5)
            async with serving(store, address=url.removeprefix("http://")) as control:
                node = await control.until(lambda node: node.status.replicas, within_s=20)
                assert node.status.replicas["pool-0_r0"].state is ReplicaState.READY
            asking.cancel()
            await asyncio.wait({asking})
            assert asking.cancelled(), asking.exception()
    assert len(answers) > 20
    assert set(answers) == {200}


async def test_an_agent_s_token_is_changed_under_it(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llorch_web.auth.LOOK_INTERVAL", 0.0)
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    theirs.write_text(TOKEN)
    ours.write_text(TOKEN)
    async with serving(store, api_token_file=str(theirs)) as control, agent_at(control.url, tmp_path, Tokens(file=ours)):
        first = await control.until(lambda node: node.status.heartbeat.sequence)
        theirs.write_text(f"{NEXT_TOKEN},{TOKEN}")
        ours.write_text(NEXT_TOKEN)
        theirs.write_text(NEXT_TOKEN)
        beats = first.status.heartbeat.sequence + 2
        later = await control.until(lambda node: node.status.heartbeat.sequence >= beats)
        assert later.metadata.uid == first.metadata.uid


async def test_a_node_that_is_not_to_register_waits_until_it_is_registered(control: Control, tmp_path: Path) -> None:
    async with agent_at(control.url, tmp_path, register=False):
        await asyncio.sleep(0.5)
        assert await control.nodes() == {}
        await control.register()
        await control.until(lambda node: node.status.heartbeat.sequence, within_s=20)


async def test_the_spec_is_told_within_moments_of_its_change(control: Control) -> None:
    _, body = await control.register()
    known = {"uid": body["uid"], "generation": str(body["generation"]), "wait": "5"}
    waiting = asyncio.create_task(control.ask("GET", f"/v2/nodes/{NODE.name}/spec", params=known))
    await asyncio.sleep(0.2)
    assert not waiting.done()

    began = asyncio.get_running_loop().time()
    await control.store.patch(GPUNode, NODE, {"spec": {"unschedulable": True}}, field_manager="test")
    status, told = await waiting

    assert asyncio.get_running_loop().time() - began < 1.0
    assert (status, told["spec"], told["uid"]) == (200, {"unschedulable": True}, body["uid"])
    status, _ = await control.ask("GET", f"/v2/nodes/{NODE.name}/spec", params={**known, "wait": "0", "generation": "2"})
    assert status in (200, 204)
    assert (await control.ask("GET", "/v2/nodes/nobody/spec"))[0] == 404
