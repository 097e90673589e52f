"""How an agent ends: by SIGTERM with streams open, and by kill -9 with engines of every kind."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from agent_node import NODE, assignment
from agent_process import Process, running
from data_path import chat, events
from engine_node import ENGINE, alive, foreign_engine, gone, processes_named, script

from fixtures.fake_nvml import FakeGpus
from llorch_agent.engine_binary import engine_argv
from llorch_agent.handoff import write_atomically
from llorch_api import AgentState, GPUNode, ReplicaState
from llorch_model.tiny import write_mid, write_tiny

pytestmark = pytest.mark.functional

REPLICA = "chat-abcde"


@pytest.fixture(scope="module")
def mid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_mid(tmp_path_factory.mktemp("models") / "mid.gguf")


@asynccontextmanager
async def streaming(agent: Process, model: Path, tokens: int) -> AsyncIterator[tuple[aiohttp.ClientSession, list[Any]]]:
    """Three open streams of `tokens` tokens each, all of which have begun."""
    await agent.until(lambda node: node.status.heartbeat.sequence)
    wanted = assignment(model, slots=4, context_tokens=8192, engine_args=["--threads", "1"])
    patch = {"spec": {"replicas": {REPLICA: wanted.to_json()}}}
    await agent.store.patch(GPUNode, NODE, patch, field_manager="llorch-operator")
    await agent.until(lambda node: REPLICA in node.status.replicas and node.status.replicas[REPLICA].state is ReplicaState.READY)
    async with aiohttp.ClientSession(f"{agent.url}/replicas/{REPLICA}/v1/") as http, AsyncExitStack() as stack:
        body = chat(tokens=tokens, stream=True, ignore_eos=True)
        answers = [await stack.enter_async_context(http.post("chat/completions", json=body)) for _ in range(3)]
        assert [answer.status for answer in answers] == [200] * 3
        yield http, answers


async def test_sigterm_lets_three_open_streams_finish_says_draining_at_once_and_grants_no_more(tmp_path: Path, mid: Path) -> None:
    async with running(tmp_path, LLORCH_DRAIN_SECS="30") as agent, streaming(agent, mid, 250) as (http, answers):
        reading = asyncio.gather(*map(events, answers))
        began = time.monotonic()
        agent.process.send_signal(signal.SIGTERM)  # the pod's preStop hook
        node = await agent.until(lambda node: node.status.agent.state is AgentState.DRAINING, 1.0)
        assert node.status.agent.state is AgentState.DRAINING
        agent.process.send_signal(signal.SIGTERM)  # the kubelet
        async with http.post("chat/completions", json=chat(tokens=1)) as refused:
            assert (refused.status, (await refused.json())["error"]["code"]) == (503, "draining")
        assert not reading.done(), "the streams were over before anything was shown"
        for stream in await reading:
            assert stream[-1] == "[DONE]"
            assert stream[-2]["choices"][0]["finish_reason"] == "length"
        streamed = time.monotonic()
        async with asyncio.timeout(5):
            assert await agent.process.wait() == 0
        assert time.monotonic() - streamed < 5
        assert time.monotonic() - began < 30
        assert (await agent.store.get(GPUNode, NODE)).status.agent.state is AgentState.STOPPED
        assert not processes_named(str(mid))


async def test_a_drain_that_is_too_short_ends_streams_with_an_error_event_and_exit_code_0(tmp_path: Path, mid: Path) -> None:
    async with running(tmp_path, LLORCH_DRAIN_SECS="1") as agent, streaming(agent, mid, 6000) as (_, answers):
        reading = asyncio.gather(*map(events, answers))
        began = time.monotonic()
        agent.process.send_signal(signal.SIGTERM)
        for stream in await reading:
            error = stream[-1]["error"]
            assert (error["code"], error["type"]) == ("draining", "unavailable_error")
            assert "the agent of this node stops" in error["message"]
            assert "after 1 s" in error["message"]
        async with asyncio.timeout(6):
            assert await agent.process.wait() == 0
        assert time.monotonic() - began < 1 + 5
        assert not processes_named(str(mid))


def families(*models: Path) -> dict[str, list[int]]:
    return {model.stem: processes_named(str(model)) for model in models}


async def test_after_kill_9_launched_engines_are_gone_the_adopted_one_is_kept_and_memory_is_accounted(tmp_path: Path) -> None:
    # Given an agent with two launched engines, one of them behind a wrapper that forks, and an adopted one
    plain, wrapped, adopted = (write_tiny(tmp_path / f"{name}.gguf") for name in ("plain", "wrapped", "adopted"))
    argv, _ = engine_argv(ENGINE)
    native = " ".join(argv)
    wrapper = script(
        tmp_path / "wrapper", f'case "$*" in *wrapped.gguf*) ( {native} "$@" & wait ) & wait;; *) exec {native} "$@";; esac'
    )
    gpus = FakeGpus(tmp_path, "gpus 1\n0.total 25757220864\n")
    gpu = "GPU-00000000-0000-0000-0000-000000000000"
    root = tmp_path / "node"
    (root / "engines").mkdir(parents=True)

    def show(pids: list[int]) -> None:
        """The driver shows 1 GiB for each of these processes, and nothing else."""
        gpus.set("gpus 1\n0.total 25757220864\n0.used 0\n")
        for pid in pids:
            gpus.add(f"0.proc {pid} {1 << 30}")

    def ready(node: GPUNode) -> bool:
        return [report.state for report in node.status.replicas.values()].count(ReplicaState.READY) == 3

    def accounted(node: GPUNode) -> bool:
        held = [report.vram_mib for report in node.status.replicas.values() if report.state is ReplicaState.READY]
        return node.status.devices[gpu].foreign_mib == 0 and held == [1024, 1024, 1024]

    def hand_off(name: str, content: dict[str, Any]) -> None:
        document = {"pool_id": name, "replica_id": "r0", "slots": 1, **content}
        write_atomically(root / "engines" / f"{name}.json", json.dumps(document).encode())

    async with foreign_engine(adopted) as (stranger, url):
        for model in (plain, wrapped):
            hand_off(model.stem, {"model": {"path": str(model)}, "context_tokens": 256})
        hand_off("adopted", {"url": url, "pid": stranger, "slots": 2})
        environment = {"LLORCH_ENGINE": str(wrapper), "LLORCH_DEVICES": "nvml", **gpus.environment}
        try:
            async with running(root, **environment) as first:
                await first.until(ready)
                before = families(plain, wrapped)
                assert len(before["plain"]) == 1
                assert len(before["wrapped"]) >= 2, "no wrapper forked, so this test shows nothing"
                # When the agent is killed, and started again as a kubelet does
                first.process.send_signal(signal.SIGKILL)
                await first.process.wait()
                killed = time.monotonic()
            async with running(root, **environment) as second:
                # Then no process of a launched engine is left after 10 s
                for pid in before["plain"] + before["wrapped"]:
                    assert await gone(pid, 10 - (time.monotonic() - killed))
                await second.until(lambda node: ready(node) and node.status.agent.state is AgentState.RUNNING)
                after = families(plain, wrapped, adopted)
                assert alive(stranger)
                assert after["adopted"] == [stranger]
                assert len(after["plain"]) == 1, "a second copy"
                assert len(after["wrapped"]) == len(before["wrapped"]), "a second copy"
                # And what the engines hold is theirs: nothing foreign, nothing twice
                show([*after["plain"], max(after["wrapped"]), stranger])
                hand_off("late", {"model": {"path": str(tmp_path / "missing.gguf")}})  # devices are read again at each transition
                await second.until(accounted)
        finally:
            for pid in processes_named(str(plain)) + processes_named(str(wrapped)):
                os.kill(pid, signal.SIGKILL)
