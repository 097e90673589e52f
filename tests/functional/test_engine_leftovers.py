"""No engine outlives its agent, however the agent ends."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from engine_node import ENGINE, SOON_S, alive, gone, launch, processes_named, running, script

from llorch_agent.core.engine_args import RUN_TOKEN
from llorch_agent.engine_binary import engine_argv
from llorch_agent.handoff import write_atomically
from llorch_agent.leftovers import RunFiles
from llorch_agent.processes import boot_id, pid_namespace, stat_of
from llorch_api import ReplicaState
from llorch_model.tiny import write_tiny

pytestmark = pytest.mark.functional

AGENT = """
import asyncio, sys
from pathlib import Path
from llorch_agent.engines import Engines, EngineSettings
from llorch_agent.replicas import Replicas

async def main():
    replicas = Replicas()
    asyncio.create_task(Engines(replicas, Path(sys.argv[1]), EngineSettings(engine=sys.argv[2])).run())
    while not any(replica.serving for replica in replicas):
        await replicas.wait_beyond(replicas.version)
    print("ready", flush=True)
    await asyncio.sleep(60)

asyncio.run(main())
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("models") / "tiny.gguf")


async def killed_agent(root: Path, model: Path, engine: str) -> list[int]:
    """Starts an agent as a process of its own, kills it once its engine is up, and names the engine's processes of before."""
    directory = root / "engines"
    directory.mkdir(parents=True)
    write_atomically(directory / "a.json", json.dumps(launch(model)).encode())
    agent = await asyncio.create_subprocess_exec(
        sys.executable, "-c", AGENT, str(directory), engine, stdout=asyncio.subprocess.PIPE, start_new_session=True
    )
    try:
        assert agent.stdout is not None
        async with asyncio.timeout(SOON_S):
            assert await agent.stdout.readline() == b"ready\n"
        engines = processes_named(str(model))
        assert engines
        return engines
    finally:
        agent.kill()
        await agent.wait()


async def test_an_engine_dies_with_its_agent(tmp_path: Path, model: Path) -> None:
    engines = await killed_agent(tmp_path, model, ENGINE)

    for pid in engines:
        assert await gone(pid, 1)


async def test_what_a_wrapper_script_forked_is_ended_by_the_next_agent(tmp_path: Path, model: Path) -> None:
    argv, _ = engine_argv(ENGINE)
    wrapper = script(tmp_path / "wrapper", f'( {" ".join(argv)} "$@" & wait ) & wait')
    survivors = [pid for pid in await killed_agent(tmp_path / "runtime", model, str(wrapper)) if alive(pid)]
    try:
        assert survivors, "the wrapper's child lives on, or this test shows nothing"
        (tmp_path / "runtime" / "engines" / "a.json").unlink()

        started = time.monotonic()
        async with running(tmp_path / "runtime"):
            for pid in survivors:
                assert await gone(pid, 10)
        assert time.monotonic() - started < 10
        assert list((tmp_path / "runtime" / "run").glob("*.run")) == []
    finally:
        for pid in processes_named(str(model)):
            os.kill(pid, signal.SIGKILL)


async def test_closing_ends_what_a_wrapper_script_forked(tmp_path: Path, model: Path) -> None:
    argv, _ = engine_argv(ENGINE)
    # It leaves its process group, so only its environment tells whose it is.
    wrapper = script(tmp_path / "wrapper", f'setsid {" ".join(argv)} "$@" & wait')
    async with running(tmp_path / "runtime", engine=str(wrapper)) as node:
        node.write("a.json", launch(model))
        await node.until_state("chat_r0", ReplicaState.READY)
        pids = processes_named(str(model))
        assert len(pids) >= 2

    assert not any(alive(pid) for pid in pids)


async def test_two_agents_of_one_directory_launch_one_engine(tmp_path: Path, model: Path) -> None:
    async with running(tmp_path / "runtime") as first:
        first.write("a.json", launch(model))
        await first.until_state("chat_r0", ReplicaState.READY)
        async with running(tmp_path / "runtime") as second:
            await asyncio.sleep(0.7)

            assert len(second.replicas) == 0
            assert len(processes_named(str(model))) == 1
            await first.engines.close()
            await second.until_state("chat_r0", ReplicaState.READY)


@contextmanager
def bystander(log: Path, token: str) -> Iterator[int]:
    """Pid of a process in a group of its own that carries `token` and writes to `log`."""
    with open(log, "ab") as output:
        process = subprocess.Popen(
            ["sleep", "60"], env={"PATH": os.environ["PATH"], RUN_TOKEN: token}, stdout=output, process_group=0
        )
    try:
        yield process.pid
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def runs(tmp_path: Path) -> Iterator[RunFiles]:
    files = RunFiles(tmp_path / "run")
    assert files.own()
    yield files
    files.close()


async def test_only_what_carries_the_token_is_ended(tmp_path: Path, runs: RunFiles) -> None:
    run = runs.prepare("chat_r0", tmp_path / "a.log")

    with bystander(tmp_path / "a.log", run.token) as mine, bystander(tmp_path / "b.log", "another") as others:
        assert await runs.reap() == ["chat_r0"]

        assert not alive(mine)
        assert alive(others)


def run_file(tmp_path: Path, pid: int) -> dict[str, object]:
    found = stat_of(pid)
    assert found is not None
    return {
        "replica": "r",
        "token": "lost",
        "log": str(tmp_path / "a.log"),
        "boot": boot_id(),
        "namespace": pid_namespace(),
        "pid": pid,
        "started": found.started,
    }


async def test_a_group_that_writes_the_engine_s_log_is_ended_without_the_token(tmp_path: Path, runs: RunFiles) -> None:
    with bystander(tmp_path / "a.log", "cleaned away") as pid:
        (runs.directory / "r.run").write_text(json.dumps(run_file(tmp_path, pid)))

        assert await runs.reap() == ["r"]

        assert not alive(pid)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param({"boot": "another"}, id="another boot"),
        pytest.param({"namespace": "pid:[1]"}, id="another container"),
        pytest.param({"started": 1}, id="the pid is another process's now"),
        pytest.param({"log": "/elsewhere.log"}, id="the group is another engine's now"),
        pytest.param({"pid": 0}, id="never started"),
    ],
)
async def test_a_run_file_that_speaks_of_somebody_else_ends_nobody(
    tmp_path: Path, runs: RunFiles, change: dict[str, object]
) -> None:
    with bystander(tmp_path / "a.log", "another") as pid:
        (runs.directory / "r.run").write_text(json.dumps(run_file(tmp_path, pid) | change))

        assert await runs.reap() == []

        assert alive(pid)
        assert not (runs.directory / "r.run").exists()


async def test_a_damaged_run_file_is_dropped(runs: RunFiles) -> None:
    (runs.directory / "r.run").write_text("{")

    assert await runs.reap() == []
    assert not (runs.directory / "r.run").exists()
