"""The agent on a real API server: it belongs to its Node, copies its facts, stays small, and finds its way back."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from agent_node import NODE, Node, assignment, running

from cluster.apiserver import ApiServer
from llorch_api import GPUNode, ReplicaState
from llorch_model.tiny import write_tiny
from llorch_store import Store
from llorch_store.factory import open_store

pytestmark = pytest.mark.functional

LABELS = {"kubernetes.io/hostname": "gpu-1", "topology.kubernetes.io/zone": "eu-1a", "nvidia.com/gpu.product": "NVIDIA-L4"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("models") / "tiny.gguf")


@pytest.fixture
async def store(kubeconfig: Path, no_resources: ApiServer) -> AsyncIterator[Store]:
    no_resources.kubectl("delete", "nodes", "--all")
    async with open_store("kubernetes") as opened:
        yield opened


@pytest.fixture
def kubernetes_node(store: Store, no_resources: ApiServer) -> str:
    """The Node of this machine; its uid."""
    document = {"apiVersion": "v1", "kind": "Node", "metadata": {"name": NODE.name, "labels": LABELS}}
    no_resources.kubectl("create", "-f", "-", input=json.dumps(document))
    return str(json.loads(no_resources.kubectl("get", "node", NODE.name, "-o", "json").stdout)["metadata"]["uid"])


@pytest.fixture
async def node(tmp_path: Path, store: Store, model: Path) -> AsyncIterator[Node]:
    async with running(tmp_path / "home", store, store="kubernetes", model_roots=(model.parent,)) as started:
        yield started


async def test_the_object_belongs_to_its_node_and_says_what_the_node_says(kubernetes_node: str, node: Node):
    found = await node.until(lambda each: each.status.heartbeat.sequence)
    (owner,) = found.metadata.owner_references
    assert (owner.api_version, owner.kind, owner.name, owner.uid) == ("v1", "Node", "gpu-1", kubernetes_node)
    assert found.status.node.labels == LABELS
    assert found.status.node.zone == "eu-1a"
    assert not found.status.node.unschedulable


async def test_a_machine_that_is_no_node_of_the_cluster_is_registered_without_an_owner(node: Node):
    found = await node.until(lambda each: each.status.heartbeat.sequence)
    assert found.metadata.owner_references == []


async def test_an_assignment_is_served_and_the_object_stays_small(kubernetes_node: str, node: Node, model: Path, crds: ApiServer):
    await node.assign({"chat-abcde": assignment(model)})
    await node.until_state("chat-abcde", ReplicaState.READY)
    raw = json.loads(crds.kubectl("get", "gpunode", NODE.name, "-o", "json", "--show-managed-fields").stdout)
    managers = {entry["manager"] for entry in raw["metadata"]["managedFields"]}
    assert managers == {"llorch-agent", "llorch-operator"}
    assert len(json.dumps(raw, separators=(",", ":"))) <= 4096
    table = crds.kubectl("get", "gpunodes").stdout.splitlines()
    assert table[0].split()[:3] == ["NAME", "PHASE", "GPUS"]
    assert "cpu" in table[1]
    assert "2/2" in table[1]
    await node.assign({"chat-abcde": None})
    await node.until_gone("chat-abcde")


async def test_a_node_deleted_by_hand_comes_back_with_everything(kubernetes_node: str, node: Node, crds: ApiServer):
    first = await node.until(lambda each: each.status.heartbeat.sequence)
    crds.kubectl("delete", "gpunode", NODE.name)
    again = await node.until(lambda each: each.metadata.uid != first.metadata.uid and each.status.heartbeat.sequence)
    assert again.status.summary.gpus == "cpu"
    assert again.metadata.owner_references


async def test_what_no_crd_describes_yet_is_waited_for(tmp_path: Path, api_server: ApiServer, kubeconfig: Path, store: Store):
    crd = Path(__file__).parents[2] / "crds" / "gpunodes.yaml"
    api_server.kubectl("delete", "-f", str(crd), "--wait=true")
    try:
        async with running(tmp_path / "home", store, store="kubernetes") as node:
            await asyncio.sleep(0.5)
            assert not node.agent.health()
            api_server.kubectl("apply", "--server-side", "-f", str(crd))
            await node.until(lambda each: each.status.heartbeat.sequence)
    finally:
        api_server.kubectl("apply", "--server-side", "-f", str(crd))
        api_server.kubectl("wait", "--for=condition=Established", "--timeout=30s", "crd/gpunodes.llorch.dev")
    assert (await store.get(GPUNode, NODE)).status.agent.state == "Stopped"
