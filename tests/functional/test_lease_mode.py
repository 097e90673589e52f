"""Heartbeats by Lease, on a real API server: a node lives without status writes, dies when silent, and may change its mode."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import pytest
from programs import free_port

from cluster.apiserver import ApiServer
from llorch_api import GPUNode
from llorch_operator.app import Operator
from llorch_operator.core.liveness import Timing
from llorch_operator.leases import NodeLeases
from llorch_operator.settings import OperatorSettings
from llorch_store import Key, NotFound, Store
from llorch_store.factory import open_store

pytestmark = pytest.mark.functional

NODE = Key("", "gpu-1")
TTL = 3.0
"""Three intervals of a second."""


@pytest.fixture
async def store(kubeconfig: Path, no_resources: ApiServer) -> AsyncIterator[Store]:
    no_resources.kubectl("delete", "leases", "--all", "-n", "default")
    no_resources.kubectl("delete", "nodes", "--all")
    document = {"apiVersion": "v1", "kind": "Node", "metadata": {"name": NODE.name}}
    no_resources.kubectl("create", "-f", "-", input=json.dumps(document))
    async with open_store("kubernetes") as opened:
        yield opened


@asynccontextmanager
async def an_agent(root: Path, mode: str) -> AsyncIterator[asyncio.subprocess.Process]:
    """An agent's process; killed at the end, without a word to anybody."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("POOL_MANAGERD_", "LLORCH_"))}
    env = {
        **kept,
        "POOL_MANAGERD_NODE_ID": NODE.name,
        "POOL_MANAGERD_ADDR": f"127.0.0.1:{free_port()}",
        "POOL_MANAGERD_RUNTIME_DIR": str(root / "engines"),
        "POOL_MANAGERD_HEARTBEAT_INTERVAL_SECS": "1",
        "LLORCH_MODEL_DIR": str(root / "models"),
        "LLORCH_STORE": "kubernetes",
        "LLORCH_DEVICES": "cpu",
        "LLORCH_HEARTBEAT_MODE": mode,
    }
    process = await asyncio.create_subprocess_exec(sys.executable, "-m", "llorch_agent", env=env)
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


@asynccontextmanager
async def an_operator(store: Store) -> AsyncIterator[Operator]:
    operator = Operator(store, OperatorSettings())
    operator.fleet.tracker.timing = Timing(node_timeout=TTL, grace=2.0)
    leases = operator.reconciler.renewals = NodeLeases(operator.fleet, "default")
    tasks = [asyncio.create_task(operator.run()), asyncio.create_task(leases.run())]
    try:
        yield operator
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


async def until(store: Store, phase: str, within: float = 8.0, **heartbeat: Any) -> GPUNode:
    """The node once it is in that phase, with these fields in its heartbeat."""
    node: GPUNode | None = None
    try:
        async with asyncio.timeout(within):
            while True:
                with contextlib.suppress(NotFound):
                    node = await store.get(GPUNode, NODE)
                    beat = node.status.heartbeat
                    if node.status.phase == phase and all(getattr(beat, name) == value for name, value in heartbeat.items()):
                        return node
                await asyncio.sleep(0.05)
    except TimeoutError:
        pytest.fail(f"not {phase} after {within} s: {node.status.to_json() if node else 'no node'}")


@contextmanager
def phases_of(operator: Operator) -> Iterator[set[str]]:
    """The liveness that the node had at any moment within the context."""
    seen: set[str] = set()

    async def look() -> None:
        while True:
            seen.add(operator.fleet.tracker.state(NODE.name).name)
            await asyncio.sleep(0.02)

    task = asyncio.create_task(look())
    try:
        yield seen
    finally:
        task.cancel()


async def test_a_node_in_lease_mode_lives_without_status_writes_and_is_offline_once_it_freezes(
    tmp_path: Path, store: Store, no_resources: ApiServer
) -> None:
    async with an_operator(store) as operator, an_agent(tmp_path, "lease") as agent:
        await until(store, "Online", mode="lease")
        await asyncio.sleep(1.5)  # facts and devices are told
        before = await store.get(GPUNode, NODE)
        with phases_of(operator) as seen:
            await asyncio.sleep(TTL + 1.0)
        after = await store.get(GPUNode, NODE)
        assert "OFFLINE" not in seen
        assert after.metadata.resource_version == before.metadata.resource_version, "a beat wrote the status"
        lease = json.loads(no_resources.kubectl("get", "lease", NODE.name, "-n", "default", "-o", "json").stdout)
        (owner,) = lease["metadata"]["ownerReferences"]
        assert (owner["kind"], owner["name"]) == ("Node", NODE.name)
        assert (lease["spec"]["holderIdentity"], lease["spec"]["leaseDurationSeconds"]) == (NODE.name, 3)

        agent.send_signal(signal.SIGSTOP)
        await until(store, "Offline", within=TTL + 3)
        # An operator that starts now finds the old Lease, which is no sign of life.
        async with an_operator(store) as second:
            await asyncio.sleep(0.7)
            assert second.fleet.tracker.state(NODE.name).name in ("OFFLINE", "LOST")
        agent.send_signal(signal.SIGCONT)
        await until(store, "Online", within=4)


async def test_a_change_of_mode_under_way_costs_no_beat(tmp_path: Path, store: Store) -> None:
    async with an_operator(store) as operator:
        async with an_agent(tmp_path, "status"):
            await until(store, "Online", mode="status")
        with phases_of(operator) as seen:
            async with an_agent(tmp_path, "lease"):
                first = await until(store, "Online", mode="lease")
                await asyncio.sleep(1.5)
            async with an_agent(tmp_path, "status"):
                again = await until(store, "Online", mode="status")
                await asyncio.sleep(1.0)
        assert seen <= {"FRESH", "SUSPECT"}
        assert again.metadata.uid == first.metadata.uid


async def test_a_node_deleted_by_hand_comes_back_in_lease_mode_too(tmp_path: Path, store: Store, crds: ApiServer) -> None:
    async with an_agent(tmp_path, "lease"):
        async with asyncio.timeout(8):
            while not crds.kubectl("get", "lease", NODE.name, "-n", "default", check=False).stdout:  # noqa: ASYNC110
                await asyncio.sleep(0.1)
        first = await store.get(GPUNode, NODE)
        crds.kubectl("delete", "gpunode", NODE.name)
        crds.kubectl("delete", "lease", NODE.name, "-n", "default")
        async with asyncio.timeout(4):
            while True:
                with contextlib.suppress(NotFound):
                    found = await store.get(GPUNode, NODE)
                    if found.metadata.uid != first.metadata.uid and found.status.heartbeat.sequence:
                        break
                await asyncio.sleep(0.05)
            while not crds.kubectl("get", "lease", NODE.name, "-n", "default", check=False).stdout:  # noqa: ASYNC110
                await asyncio.sleep(0.1)
