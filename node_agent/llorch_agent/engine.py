"""One engine process: started, watched, read from and ended."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from typing import Final

from . import exec_child
from .engine_log import EngineLog
from .leftovers import Run, RunFiles, end, living

log = logging.getLogger(__name__)

TERM_S: Final = 2.0
"""Seconds from SIGTERM to SIGKILL: a busy llama-server does not end on the first SIGTERM."""


class EngineProcess:
    """A started engine and all that it started itself: one process group, one session."""

    def __init__(self, process: subprocess.Popen[bytes], run: Run, runs: RunFiles, engine_log: EngineLog) -> None:
        self._process = process
        self._run = run
        self._runs = runs
        self.log = engine_log
        self.pid = process.pid
        self._ended = asyncio.Event()
        self._status = 0
        self._pidfd = os.pidfd_open(process.pid)
        # A descriptor that becomes readable when the process ends: no thread per engine, no SIGCHLD handler.
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._pidfd, self._noticed)

    @property
    def status(self) -> int | None:
        """The exit status, negative for a signal; None while it runs."""
        return self._status if self._ended.is_set() else None

    async def ended(self) -> None:
        """Returns as soon as the process has ended; what is left of its group may take a moment longer."""
        await self._ended.wait()

    async def ended_within(self, seconds: float) -> bool:
        """True as soon as it has ended, False after `seconds`."""
        try:
            async with asyncio.timeout(seconds):
                await self._ended.wait()
        except TimeoutError:
            return self._ended.is_set()
        return True

    async def stop(self) -> int:
        """Ends it: SIGTERM, and SIGKILL after TERM_S or at a cancellation. Its children are gone too when this returns."""
        try:
            if not self._ended.is_set():
                self._signal(signal.SIGTERM)
                if not await self.ended_within(TERM_S):
                    log.info("%s: did not end %.0f s after SIGTERM, killing it", self._run.replica, TERM_S)
        finally:
            self._signal(signal.SIGKILL)
        await self._ended.wait()
        if not await end(self._run, TERM_S):
            log.error("%s: processes %s cannot be ended", self._run.replica, living(self._run))
        self._runs.ended(self._run)
        return self._status

    def _signal(self, number: signal.Signals) -> None:
        # The group's number stays taken until the leader is reaped, and in _noticed the group is killed before that.
        if not self._ended.is_set():
            try:
                os.killpg(self.pid, number)
            except ProcessLookupError:
                return

    def _noticed(self) -> None:
        self._loop.remove_reader(self._pidfd)
        os.close(self._pidfd)
        try:
            os.killpg(self.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self._status = self._process.wait()
        self._ended.set()


def free_port() -> int:
    """A port of 127.0.0.1 that is free now. Should somebody take it before the engine does, the engine is given another."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def spawn(
    command: Sequence[str], environment: Mapping[str, str], replica: str, run: Run, runs: RunFiles, engine_log: EngineLog
) -> EngineProcess:
    """Starts `command`. Must be called on the main thread: the engine dies with the thread that forked it.

    Raises OSError, and has started nothing then. The log is a file and no pipe: an engine never blocks on its reader, and its
    last words are there even after its agent's.
    """
    if threading.current_thread() is not threading.main_thread():
        raise RuntimeError("engines are started on the main thread: they would end with another one")
    wrapper = [sys.executable, "-I", "-S", exec_child.__file__, str(os.getpid())]
    with open(engine_log.path, "ab") as output:
        process = subprocess.Popen(
            [*wrapper, *command],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=dict(environment),
            start_new_session=True,
        )
    try:
        started = EngineProcess(process, runs.started(run, process.pid), runs, engine_log)
    except OSError:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        raise
    log.info("%s: started as pid %d", replica, process.pid)
    return started
