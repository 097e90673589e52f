"""From a Launch to an engine that has generated its first token."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from .core.adoption import Health
from .core.endings import MAX_MESSAGE, Ending, EndKind, classify
from .core.engine_args import command_line, environment
from .core.handoff import Launch
from .engine import EngineProcess, free_port, spawn
from .engine_binary import EngineCommand
from .engine_log import EngineLogs
from .engine_probe import EngineProbe
from .leftovers import RunFiles

PORT_ATTEMPTS: Final = 5
FIRST_POLL_S: Final = 0.01
SLOWEST_POLL_S: Final = 0.25
LAST_WORDS_S: Final = 0.5
"""Seconds in which an engine that broke a connection may turn out to have ended."""


class EngineFailedError(Exception):
    """The engine did not become ready."""

    def __init__(self, ending: Ending) -> None:
        super().__init__(ending.message)
        self.ending = ending


@dataclass(frozen=True, slots=True)
class Started:
    """An engine that is ready."""

    process: EngineProcess
    base_url: str


@dataclass(frozen=True, slots=True)
class Starter:
    """What starting an engine takes."""

    runs: RunFiles
    logs: EngineLogs
    probe: EngineProbe
    cache_ram_mib: int = 0
    """Host memory in which an engine keeps prompts of earlier requests, MiB."""

    async def start(self, command: EngineCommand, launch: Launch, deadline_s: float, on_pid: Callable[[int], None]) -> Started:
        """Launches, waits for the model to be loaded, and generates one token. Raises EngineFailedError.

        A port that somebody took in the meantime is not a failure: another one is tried.
        """
        ending = Ending(EndKind.PORT_TAKEN, "no free port")
        for _ in range(PORT_ATTEMPTS):
            port = free_port()
            base_url = f"http://127.0.0.1:{port}"
            try:
                process = self._spawn(command, launch, port)
            except OSError as error:
                raise EngineFailedError(Ending(EndKind.EXITED, f"cannot be started: {error}"[:MAX_MESSAGE])) from error
            on_pid(process.pid)
            try:
                failure = await self._until_ready(process, base_url, launch, deadline_s)
            except BaseException:
                await process.stop()
                raise
            if failure is None:
                return Started(process, base_url)
            ending = failure
            await process.stop()
            if ending.kind is not EndKind.PORT_TAKEN:
                break
        raise EngineFailedError(ending)

    def _spawn(self, command: EngineCommand, launch: Launch, port: int) -> EngineProcess:
        engine_log = self.logs.begin(launch.id)
        run = self.runs.prepare(launch.id, engine_log.path)
        arguments = [*command.argv, *command_line(launch, port, command.flags, self.cache_ram_mib)]
        return spawn(arguments, environment(os.environ, launch, run.token), launch.id, run, self.runs, engine_log)

    async def _until_ready(self, process: EngineProcess, base_url: str, launch: Launch, deadline_s: float) -> Ending | None:
        """None once it is ready, or why it is not."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + deadline_s
        poll = FIRST_POLL_S
        while True:
            if await process.ended_within(poll):
                return ending_of(process, launch)
            if loop.time() > deadline:
                return Ending(EndKind.LOAD_TIMEOUT, f"the model was not loaded after {deadline_s:.0f} s")
            answer = await self.probe.ask(base_url)
            if answer.health is Health.UP:
                break
            poll = min(poll * 1.5, SLOWEST_POLL_S)
        if answer.model_path and answer.model_path != launch.model_path:
            return Ending(EndKind.PORT_TAKEN, f"port taken: {base_url} serves {answer.model_path}"[:MAX_MESSAGE])
        wrong = await self.probe.warm_up(base_url, "--embeddings" in launch.engine_args, max(1.0, deadline - loop.time()))
        if await process.ended_within(LAST_WORDS_S if wrong else 0):
            return ending_of(process, launch)
        return Ending(EndKind.UNHEALTHY, f"warm-up failed: {wrong}"[:MAX_MESSAGE]) if wrong else None


def ending_of(process: EngineProcess, launch: Launch) -> Ending:
    """Why an engine has ended."""
    return classify(process.status or 0, process.log.tail(), launch.model_path)


def load_deadline_s(model_path: str) -> float:
    """Seconds that loading a model may take: five minutes, and what a slow disk needs for it (50 MiB/s)."""
    try:
        return 300 + os.path.getsize(model_path) / (50 * 1024 * 1024)
    except OSError:
        return 300
