"""`make soak`: mixed traffic against a real agent with real engines that are killed all the time, for SECONDS (600 by default).

At the end nothing may be left over: no slot, no zombie, no orphan, no file descriptor, no memory; and every request that
failed must have been on an engine that was killed meanwhile. Exit code 1 where that is not so.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS), str(TESTS / "functional")]

import aiohttp  # noqa: E402
from agent_process import Process, running  # noqa: E402
from data_path import chat  # noqa: E402
from engine_node import processes_named  # noqa: E402

from llorch_agent.handoff import write_atomically  # noqa: E402
from llorch_agent.processes import all_processes  # noqa: E402
from llorch_api import GPUNode, ReplicaState  # noqa: E402
from llorch_model.tiny import write_mid  # noqa: E402

REPLICAS = ("a", "b", "c")
SLOTS = 3
CLIENTS = 12
KILL_EVERY_S = 20.0
WARM_UP_S = 5.0
NOTICED_S = 1.0
"""How long after its engine's death a request may still fail for it."""
AWAY_S = 90.0
"""How long after a kill a replica may refuse: the restart waits up to a minute by then."""
RSS_GROWTH_MIB = 25
FD_GROWTH = 3


@dataclass
class Tally:
    """What happened."""

    outcomes: Counter[str] = field(default_factory=Counter)
    kills: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in REPLICAS})
    unexplained: list[str] = field(default_factory=list)

    def killed_between(self, replica: str, start: float, end: float) -> bool:
        return any(start <= at <= end for at in self.kills[replica])

    def failed(self, replica: str, kind: str, began: float, why: str, *, refused: bool) -> None:
        """A request that was not answered. `refused`: before it was taken on."""
        now = time.monotonic()
        since = now - AWAY_S if refused else began - NOTICED_S
        explained = self.killed_between(replica, since, now)
        self.outcomes[f"{kind}: {'refused' if refused else 'failed'} {'by' if explained else 'WITHOUT'} a kill"] += 1
        if not explained:
            self.unexplained.append(f"{kind} on {replica} after {now - began:.2f} s: {why}")


class Soak:
    """One run."""

    def __init__(self, agent: Process, models: dict[str, Path], draw: random.Random) -> None:
        self.agent, self.models, self.draw = agent, models, draw
        self.tally = Tally()
        self.ending = False

    async def client(self) -> None:
        async with aiohttp.ClientSession(self.agent.url, timeout=aiohttp.ClientTimeout(total=120)) as http:
            while not self.ending:
                replica = self.draw.choice(REPLICAS)
                kind = self.draw.choice(("stream", "stream", "whole", "cancelled", "left in prefill", "long prompt"))
                began = time.monotonic()
                try:
                    await self.ask(http, replica, kind, began)
                except (aiohttp.ClientError, TimeoutError) as error:
                    self.tally.failed(replica, kind, began, repr(error), refused=False)
                await asyncio.sleep(self.draw.uniform(0.0, 0.3))

    async def ask(self, http: aiohttp.ClientSession, replica: str, kind: str, began: float) -> None:
        words = self.draw.randint(300, 700) if kind in ("long prompt", "left in prefill") else self.draw.randint(1, 20)
        body = chat(tokens=self.draw.randint(5, 60), words=words, stream=kind != "whole", ignore_eos=True)
        request = http.post(f"/replicas/soak_{replica}/v1/chat/completions", json=body)
        if kind == "left in prefill":
            try:
                async with asyncio.timeout(self.draw.uniform(0.01, 0.15)):
                    await request
            except TimeoutError:
                pass
            self.tally.outcomes[f"{kind}: as meant"] += 1
            return
        async with request as answer:
            if answer.status != 200:
                error = (await answer.json())["error"]
                if error["code"] == "no_slot":
                    self.tally.outcomes[f"{kind}: no slot"] += 1
                else:
                    refused = error["code"] in ("not_ready", "draining", "no_replica")
                    self.tally.failed(replica, kind, began, f"{answer.status} {error}", refused=refused)
                return
            if kind == "cancelled":
                for _ in range(self.draw.randint(1, 10)):
                    await answer.content.readline()
                self.tally.outcomes[f"{kind}: as meant"] += 1
                return
            text = await answer.text()
        complete = json.loads(text)["choices"][0]["finish_reason"] if kind == "whole" else text.endswith("data: [DONE]\n\n")
        if complete:
            self.tally.outcomes[f"{kind}: answered"] += 1
        else:
            self.tally.failed(replica, kind, began, text[-300:], refused=False)

    async def killer(self) -> None:
        while True:
            await asyncio.sleep(KILL_EVERY_S)
            replica = self.draw.choice(REPLICAS)
            pids = processes_named(str(self.models[replica]))
            self.tally.kills[replica].append(time.monotonic())
            for pid in pids:
                os.kill(pid, signal.SIGKILL)
            if not pids:  # given up after so many deaths: what a person does then
                os.utime(self.models[replica])

    async def until_ready(self, within: float) -> bool:
        """True once every replica is Ready again; one that was given up is asked for anew."""
        deadline = time.monotonic() + within
        while time.monotonic() < deadline:
            node = await self.agent.until(lambda _: True)
            states = {name.removeprefix("soak_"): report.state for name, report in node.status.replicas.items()}
            if len(states) == len(REPLICAS) and set(states.values()) == {ReplicaState.READY}:
                return True
            for name, state in states.items():
                if state is ReplicaState.FAILED:
                    os.utime(self.models[name])
            await asyncio.sleep(1)
        return False


async def slots(http: aiohttp.ClientSession) -> dict[str, Any]:
    async with http.get("/replicas/slots") as answer:
        while not (line := await answer.content.readline()).startswith(b"data: "):
            pass
        found: dict[str, Any] = json.loads(line[6:])
        return found


def usage(pid: int) -> tuple[int, float]:
    """Open descriptors, and resident MiB."""
    resident = int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / (1 << 20)
    return len(os.listdir(f"/proc/{pid}/fd")), resident


def zombies(parent: int) -> list[int]:
    """Dead children that `parent` has not taken note of."""
    found = []
    for process in all_processes():
        try:
            words = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if words[0] == "Z" and int(words[1]) == parent:
            found.append(process.pid)
    return found


async def settled(soak: Soak, http: aiohttp.ClientSession) -> dict[str, Any]:
    """The slots once none is in use, or after 15 s."""
    deadline = time.monotonic() + 15
    while True:
        found = await slots(http)
        if time.monotonic() > deadline or all(each["free"] == each["total"] for each in found.values()):
            return found
        await asyncio.sleep(0.2)


async def soak_for(seconds: float, root: Path) -> int:
    """Runs it, prints the summary, and returns the exit code."""
    models = {name: write_mid(root / f"engine-{name}.gguf") for name in REPLICAS}
    (root / "engines").mkdir()
    for name, model in models.items():
        asked = {
            "pool_id": "soak",
            "replica_id": name,
            "model": {"path": str(model)},
            "slots": SLOTS,
            "context_tokens": 4096,
            "engine_args": ["--threads", "1"],
        }
        write_atomically(root / "engines" / f"{name}.json", json.dumps(asked).encode())
    problems: list[str] = []
    async with running(root) as agent:
        pid = agent.process.pid
        soak = Soak(agent, models, random.Random(4))
        if not await soak.until_ready(60):
            return _say(["the engines did not become ready"])
        async with aiohttp.ClientSession(agent.url) as http:
            await traffic(soak, WARM_UP_S, kill=False)
            await settled(soak, http)
            baseline = usage(pid)
            await traffic(soak, seconds, kill=True)
            ready = await soak.until_ready(120)
            at_end = await settled(soak, http)
            await asyncio.sleep(1)
            after = usage(pid)
            if not ready:
                problems.append("not every engine came back")
            for name, each in at_end.items():
                if (each["free"], each["total"]) != (SLOTS, SLOTS):
                    problems.append(f"slots of {name}: {each}")
            node: GPUNode = await agent.until(
                lambda node: all(report.slots_free == SLOTS for report in node.status.replicas.values()), 15
            )
            problems += [f"zombie {child}" for child in zombies(pid)]
            for name, model in models.items():
                if len(found := processes_named(str(model))) != 1:
                    problems.append(f"{len(found)} processes of engine {name}: {found}")
            if after[0] - baseline[0] > FD_GROWTH:
                problems.append(f"{after[0]} descriptors, {baseline[0]} before")
            if after[1] - baseline[1] > RSS_GROWTH_MIB:
                problems.append(f"{after[1]:.0f} MiB resident, {baseline[1]:.0f} before")
        code, took = await agent.end()
        if code:
            problems.append(f"the agent ended with {code}")
    left = processes_named(str(root))
    if left:
        problems.append(f"left behind: {left}")
    problems += soak.tally.unexplained
    print(f"\nsoak of the agent, {seconds:.0f} s, {CLIENTS} clients, {len(REPLICAS)} engines of {SLOTS} slots")
    for outcome, count in sorted(soak.tally.outcomes.items()):
        print(f"  {outcome:<44}{count:>8}")
    kills = sum(map(len, soak.tally.kills.values()))
    restarts = sum(report.restarts for report in node.status.replicas.values())
    print(f"  engines killed {kills}, restarts {restarts}")
    print(f"  descriptors {baseline[0]} -> {after[0]}, resident {baseline[1]:.0f} -> {after[1]:.0f} MiB, end took {took:.1f} s")
    return _say(problems)


async def traffic(soak: Soak, seconds: float, *, kill: bool) -> None:
    soak.ending = False
    killing = asyncio.create_task(soak.killer()) if kill else None
    clients = [asyncio.create_task(soak.client()) for _ in range(CLIENTS)]
    await asyncio.wait([*clients, *([killing] if killing else [])], timeout=seconds, return_when=asyncio.FIRST_EXCEPTION)
    soak.ending = True
    if killing is not None:
        killing.cancel()
        await asyncio.wait([killing])
    await asyncio.gather(*clients)


def _say(problems: list[str]) -> int:
    for problem in problems[:40]:
        print(f"  PROBLEM {problem}")
    print("  FAILED" if problems else "  nothing left over, nothing unexplained")
    return 1 if problems else 0


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(prefix="llorch-soak-") as made:
        sys.exit(asyncio.run(soak_for(float(sys.argv[1] if len(sys.argv) > 1 else 600), Path(made))))
