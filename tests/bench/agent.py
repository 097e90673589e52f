"""`make bench-agent`: what the agent costs, in one table. Takes a minute; needs llama-server and kube-apiserver.

Latencies are of one run: a request straight to llama-server and one through the front door take turns. API-server CPU is its
user and system time while beats follow one another, less what it takes when idle.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS), str(TESTS / "functional")]

import aiohttp  # noqa: E402
from agent_node import NODE, assignment  # noqa: E402
from agent_process import Process, running  # noqa: E402
from data_path import chat  # noqa: E402
from engine_node import processes_named  # noqa: E402

from cluster.apiserver import ApiServer, start_api_server  # noqa: E402
from llorch_agent.core.heartbeat import full_patch  # noqa: E402
from llorch_agent.lease_kubernetes import NodeLease  # noqa: E402
from llorch_api import AssignedDevice, GPUNode, ReplicaState  # noqa: E402
from llorch_api.gpunode import AGENT_STATUS_FIELDS  # noqa: E402
from llorch_model.tiny import write_tiny  # noqa: E402
from llorch_store import Store  # noqa: E402
from llorch_store.factory import open_store  # noqa: E402

REQUESTS = 300
BEATS = 300
IDLE_S = 15.0
TICKS = os.sysconf("SC_CLK_TCK")
REPLICA = "chat-abcde"

Row = tuple[str, str, str]


def cpu(pid: int) -> float:
    """Seconds of CPU that a process has used."""
    words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(words[11]) + int(words[12])) / TICKS


def resident(pid: int) -> float:
    """MiB."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / (1 << 20)


def percentile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


async def one(http: aiohttp.ClientSession, url: str, body: dict[str, Any]) -> tuple[float, float]:
    """Milliseconds until the first event and until the end."""
    began = time.perf_counter()
    first = 0.0
    async with http.post(url, json=body) as answer:
        assert answer.status == 200, await answer.text()
        async for line in answer.content:
            if not first and line.startswith(b"data: ") and b"prompt_progress" not in line:
                first = time.perf_counter()
    return (first - began) * 1000, (time.perf_counter() - began) * 1000


async def latency(agent: Process, model: Path) -> list[Row]:
    (engine,) = processes_named(str(model))
    words = Path(f"/proc/{engine}/cmdline").read_bytes().decode().split("\0")
    direct = f"http://127.0.0.1:{words[words.index('--port') + 1]}/v1/chat/completions"
    through = f"{agent.url}/replicas/{REPLICA}/v1/chat/completions"
    body = chat(tokens=8, stream=True, ignore_eos=True)
    measured: dict[str, list[tuple[float, float]]] = {direct: [], through: []}
    # llama-server closes a connection after a stream, so that each request has one new connection to it on either way; to the
    # agent they stay open, as a gateway's do.
    fresh = aiohttp.TCPConnector(force_close=True)
    async with aiohttp.ClientSession(connector=fresh) as to_engine, aiohttp.ClientSession() as to_agent:
        for number in range(REQUESTS + 20):
            for url in (direct, through) if number % 2 else (through, direct):
                sample = await one(to_engine if url == direct else to_agent, url, body)
                if number >= 20:
                    measured[url].append(sample)
    rows = []
    for index, what in enumerate(("first token", "8 tokens")):
        ours, theirs = ([sample[index] for sample in measured[url]] for url in (through, direct))
        for share in (0.5, 0.99):
            door, engine_alone = percentile(ours, share), percentile(theirs, share)
            text = f"{door:.2f} ms, engine alone {engine_alone:.2f} ms, ratio {door / engine_alone:.2f}"
            rows.append((f"front door, {what}, P{share * 100:.0f}", f"{door - engine_alone:+.2f} ms", text))
    return rows


async def idle(agent: Process, server: int) -> tuple[list[Row], float]:
    """The agent's idle cost, and the API server's CPU seconds per second of idling."""
    pid = agent.process.pid
    await asyncio.sleep(2)
    began, before, before_server = time.monotonic(), cpu(pid), cpu(server)
    await asyncio.sleep(IDLE_S)
    took = time.monotonic() - began
    share = (cpu(pid) - before) / took
    rows = [
        ("agent, resident", f"{resident(pid):.0f} MiB", "one replica ready; bar 100 MiB"),
        ("agent, idle CPU", f"{share * 100:.2f} %", f"of one core, over {took:.0f} s; bar 2 %"),
    ]
    return rows, (cpu(server) - before_server) / took


async def beats(store: Store, server: int, idle_share: float) -> list[Row]:
    node = await store.get(GPUNode, NODE)
    status = {name: value for name, value in node.status.to_json().items() if name in AGENT_STATUS_FIELDS}
    size = len(json.dumps(node.to_json(), separators=(",", ":")))

    def beat(number: int) -> dict[str, Any]:
        """What a beat says: its own fields, and the readings that always move."""
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        moved = {
            uuid: {**device, "vramFreeMiB": device["vramFreeMiB"] - number % 7} for uuid, device in status["devices"].items()
        }
        system = {**status["system"], "memoryFreeMiB": status["system"]["memoryFreeMiB"] - number % 11}
        beat = {"sequence": 1000 + number, "time": now, "intervalSeconds": 10}
        return {"heartbeat": beat, "devices": moved, "system": system}

    async def measured(send: Any) -> tuple[float, float]:
        began, before = time.monotonic(), cpu(server)
        for number in range(BEATS):
            await send(number)
        took = time.monotonic() - began
        return (cpu(server) - before - idle_share * took) / BEATS * 1000, took / BEATS * 1000

    async def write(number: int) -> None:
        await store.patch_status(GPUNode, NODE, beat(number), field_manager="llorch-agent", uid=node.metadata.uid)

    lease = NodeLease(NODE.name, "default", 10.0)

    async def renew(_: int) -> None:
        await lease.renew(None)

    await renew(0)
    await asyncio.sleep(1)
    status_cpu, status_ms = await measured(write)
    lease_cpu, lease_ms = await measured(renew)
    await lease.close()
    body = len(json.dumps({"status": beat(1)}, separators=(",", ":")))
    whole = len(json.dumps({"status": full_patch({}, status)}, separators=(",", ":")))
    renewal = len(
        json.dumps({"spec": {"renewTime": datetime.now(UTC).isoformat(timespec="microseconds")}}, separators=(",", ":"))
    )
    return [
        ("beat, status mode, request", f"{body} bytes", f"full snapshot {whole}, whole object {size}; bar 4 KB with one GPU"),
        ("beat, status mode, API-server CPU", f"{status_cpu:.2f} ms", f"{status_ms:.1f} ms each, {BEATS} one after the other"),
        ("beat, lease mode, request", f"{renewal} bytes", ""),
        (
            "beat, lease mode, API-server CPU",
            f"{lease_cpu:.2f} ms",
            f"{lease_ms:.1f} ms each; status/lease {status_cpu / lease_cpu:.1f}",
        ),
    ]


async def measure(server: ApiServer, root: Path) -> list[Row]:
    assert server._process is not None
    pid = server._process.pid
    os.environ["KUBECONFIG"] = str(server.kubeconfig)
    model = write_tiny(root / "model.gguf")
    more = {"LLORCH_STORE": "kubernetes", "POOL_MANAGERD_HEARTBEAT_INTERVAL_SECS": "10", "LLORCH_MODEL_ROOTS": str(root)}
    async with running(root, **more) as agent:
        await agent.until(lambda node: node.status.heartbeat.sequence)
        wanted = assignment(model, slots=4, devices={"cpu": AssignedDevice(vram_mib=128)})
        patch = {"spec": {"replicas": {REPLICA: wanted.to_json()}}}
        await agent.store.patch(GPUNode, NODE, patch, field_manager="llorch-operator")
        await agent.until(
            lambda node: REPLICA in node.status.replicas and node.status.replicas[REPLICA].state is ReplicaState.READY
        )
        rows = await latency(agent, model)
        idling, idle_share = await idle(agent, pid)
        async with open_store("kubernetes") as store:
            return [*rows, *idling, *await beats(store, pid, idle_share)]


def main() -> None:
    began = time.monotonic()
    with start_api_server() as server, tempfile.TemporaryDirectory(prefix="llorch-bench-") as made:
        server.kubectl(
            "apply", "--server-side", *(f"--filename={path}" for path in sorted((TESTS.parent / "crds").glob("*.yaml")))
        )
        server.kubectl(
            "wait", "--for=condition=Established", "--timeout=30s", "crd/gpunodes.llorch.dev", "crd/gpupools.llorch.dev"
        )
        rows = asyncio.run(measure(server, Path(made)))
    width = max(len(name) for name, _, _ in rows)
    print(f"\nthe agent, {REQUESTS} requests each way, {time.monotonic() - began:.0f} s in all")
    for name, value, note in rows:
        print(f"  {name:<{width}}  {value:>12}  {note}")


if __name__ == "__main__":
    main()
