"""docs/node-api.md as it is written: three terminals, and the two daemons side by side."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
from engine_node import foreign_engine
from programs import clean_environment, free_port, program

from llorch_model.tiny import write_tiny

pytestmark = pytest.mark.functional

PAGE = (Path(__file__).parents[2] / "docs/node-api.md").read_text()
BLOCKS = re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)
OPERATOR, AGENT, LOOK, SIDE_BY_SIDE = BLOCKS
SAMPLE = (
    '{"pool_id":"pool-0","replica_id":"r0","engine":"llamacpp","url":"http://localhost:8081","engine_version":"v1","slots":4}\n'
)
QUICK = {"ORCHESTRATORD_NODE_TIMEOUT_MS": "5000", "POOL_MANAGERD_HEARTBEAT_INTERVAL_SECS": "1"}
NODES = "http://localhost:8080/v2/nodes"


@pytest.fixture
def ports() -> None:
    """The page's own ports."""
    for port in (8080, 8081, 9200):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("0.0.0.0", port))
            except OSError:
                if os.environ.get("CI"):
                    pytest.fail(f"port {port} is taken")
                pytest.skip(f"port {port} is taken, and the page's commands need it")


def environment(**more: str) -> dict[str, str]:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return clean_environment(PATH=path, LLORCH_MODEL_DIR="models", **more)


def terminal(commands: str, cwd: Path, log: str, **more: str) -> AbstractContextManager[subprocess.Popen[bytes]]:
    """The program that `commands` start, until the block ends."""
    # bash becomes the one command that it is given: the child is the program itself.
    return program(["bash", "-c", commands], cwd=cwd, log=log, environment=environment(**more))


def nodes() -> dict[str, dict[str, Any]]:
    try:
        with urllib.request.urlopen(NODES, timeout=5) as answer:
            return {node["node_id"]: node for node in json.loads(answer.read())["nodes"]}
    except OSError:
        return {}


def status_of(url: str) -> int:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        error.close()
        return error.code


def pool_0() -> dict[str, Any]:
    found = nodes().get("test-node", {}).get("pool_status", [])
    return next((pool for pool in found if pool["pool_id"] == "pool-0"), {})


async def until(check: Callable[[], Any], within_s: float) -> float:
    """Seconds that it took."""
    began = time.monotonic()
    while not await asyncio.to_thread(check):
        assert time.monotonic() - began < within_s, f"not within {within_s} s"
        await asyncio.sleep(0.02)
    return time.monotonic() - began


@pytest.mark.usefixtures("ports")
async def test_the_manual_test_works_as_it_is_written(tmp_path: Path) -> None:
    model = write_tiny(tmp_path / "tiny.gguf")
    with terminal(OPERATOR, tmp_path, "operator.log"), terminal(AGENT, tmp_path, "agent.log") as agent:
        await until(lambda: nodes().get("test-node", {}).get("status") == "Online", 20)
        assert nodes()["test-node"]["address"] == "http://localhost:9200"
        assert not pool_0()["ready"]

        async with foreign_engine(model, 8081, slots=4):
            look = await asyncio.create_subprocess_exec("bash", "-ec", LOOK, cwd=tmp_path, stdout=asyncio.subprocess.PIPE)
            shown, _ = await look.communicate()
            assert [node["node_id"] for node in json.loads(shown)["nodes"]] == ["test-node"]
            assert (tmp_path / ".runtime/engines/pool-0_r0.json").read_text() == SAMPLE

            took = await until(lambda: pool_0().get("ready"), 10)
            print(f"ready in the next heartbeat {took:.2f} s after the file")

            assert took < 2.0
            assert (pool_0()["slots_free"], pool_0()["slots_total"]) == (4, 4)

            began = time.monotonic()
            agent.send_signal(signal.SIGTERM)
            assert await asyncio.to_thread(agent.wait, 10) == 0
            assert time.monotonic() - began < 5
            assert nodes() == {}, "it deregistered"


@pytest.mark.usefixtures("ports")
async def test_a_killed_agent_is_offline_after_the_time_out_and_back_when_it_is_back(tmp_path: Path) -> None:
    with terminal(OPERATOR, tmp_path, "operator.log", **QUICK):
        with terminal(AGENT, tmp_path, "agent.log", **QUICK) as agent:
            await until(lambda: nodes().get("test-node", {}).get("status") == "Online", 20)
            agent.kill()

            took = await until(lambda: nodes()["test-node"]["status"] == "Offline", 10)

            assert 3.5 < took < 7.5
        with terminal(AGENT, tmp_path, "agent.log", **QUICK):
            await until(lambda: nodes()["test-node"]["status"] == "Online", 20)
            assert nodes().keys() == {"test-node"}
        await until(lambda: nodes() == {}, 5)


async def test_with_the_cloud_profile_off_the_two_daemons_work_side_by_side(tmp_path: Path) -> None:
    model = write_tiny(tmp_path / "tiny.gguf")
    ports = {"8080": free_port(), "9200": free_port(), "8000": free_port()}
    lines = [re.sub(r":(\d+) ", lambda port: f":{ports[port[1]]} ", line) for line in SIDE_BY_SIDE.splitlines()]
    operator, agent, gateway = (terminal(line, tmp_path, f"{index}.log", **QUICK) for index, line in enumerate(lines))
    url = f"http://127.0.0.1:{ports['8000']}/v1/completions"

    def answered() -> bool:
        body = json.dumps({"model": "pool-0", "prompt": "a", "max_tokens": 4}).encode()
        request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=5) as answer:
                return bool(json.loads(answer.read())["usage"]["completion_tokens"] == 4)
        except OSError:
            return False

    with operator, agent, gateway:
        async with foreign_engine(model, slots=4) as (_, engine):
            (tmp_path / ".runtime/engines").mkdir(parents=True, exist_ok=True)
            (tmp_path / ".runtime/engines/pool-0_r0.json").write_text(SAMPLE.replace("http://localhost:8081", engine))

            await until(answered, 20)

        assert await asyncio.to_thread(status_of, f"http://127.0.0.1:{ports['8080']}/v2/nodes") == 503


async def test_the_cloud_profile_without_an_address_is_one_line(tmp_path: Path) -> None:
    variables = environment(POOL_MANAGERD_CLOUD_PROFILE="true", POOL_MANAGERD_ADDR=f"127.0.0.1:{free_port()}")
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "llorch_agent", cwd=tmp_path, env=variables, stderr=asyncio.subprocess.PIPE
    )
    _, error = await process.communicate()
    assert process.returncode == 2
    assert error.decode().startswith("llorch: ORCHESTRATORD_URL is not set — POOL_MANAGERD_CLOUD_PROFILE=true needs it")
    assert error.decode().count("\n") == 1
