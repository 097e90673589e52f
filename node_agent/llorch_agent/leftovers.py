"""Engines that outlived their agent: each engine has a `.run` file while it runs, and the next agent ends what the files name.

An engine dies with its agent (see exec_child), but the child of a wrapper script does not. It is found by a random token in
its environment, which children inherit, and by its process group. Only one agent at a time may own a directory: its lock is
the kernel's, so it is free as soon as its holder is dead.
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import logging
import os
import secrets
import signal
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Final

from .processes import boot_id, descendants, pid_namespace, stat_of

log = logging.getLogger(__name__)

REAP_S: Final = 10.0
"""Seconds within which leftovers are gone."""


@dataclass(frozen=True, slots=True)
class Run:
    """One engine's `.run` file."""

    replica: str
    token: str
    log: str
    """Path of its log file."""
    boot: str
    namespace: str
    pid: int = 0
    """Also its process group and session. 0 until it is started."""
    started: int = 0
    """Clock ticks after boot."""


class RunFiles:
    """The `.run` files of one agent, in `directory`."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._lock: int | None = None

    def own(self) -> bool:
        """Takes the directory for this process. False while another living agent has it."""
        if self._lock is not None:
            return True
        self.directory.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(descriptor)
            return False
        self._lock = descriptor
        return True

    def close(self) -> None:
        """Gives the directory back."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def prepare(self, replica: str, log_path: Path) -> Run:
        """The file of an engine that is about to start: should the agent die in between, the token finds it."""
        run = Run(replica, secrets.token_hex(16), str(log_path.absolute()), boot_id(), pid_namespace())
        self._write(run)
        return run

    def started(self, run: Run, pid: int) -> Run:
        """Adds the process that was started."""
        found = stat_of(pid)
        run = replace(run, pid=pid, started=0 if found is None else found.started)
        self._write(run)
        return run

    def ended(self, run: Run) -> None:
        """The engine and all of its processes are gone."""
        self._path(run.replica).unlink(missing_ok=True)

    async def reap(self) -> list[str]:
        """Ends what earlier agents left, within REAP_S. Returns the replicas that had something left."""
        found: list[str] = []
        for path in sorted(self.directory.glob("*.run")):
            run = _read(path)
            if run is not None and run.boot == boot_id():
                if left := await asyncio.to_thread(living, run):
                    found.append(run.replica)
                    log.warning("%s: ending %d processes that outlived their agent", run.replica, len(left))
                if not await end(run, REAP_S):
                    log.error("%s: processes %s cannot be ended", run.replica, living(run))
                    continue
            path.unlink(missing_ok=True)
        return found

    def _path(self, replica: str) -> Path:
        return self.directory / f"{replica}.run"

    def _write(self, run: Run) -> None:
        path = self._path(run.replica)
        temporary = path.with_suffix(".new")
        temporary.write_text(json.dumps(asdict(run)))
        os.replace(temporary, path)


def living(run: Run) -> list[int]:
    """Processes of that engine which still run."""
    leader = stat_of(run.pid) if run.pid else None
    same = run.namespace == pid_namespace() and (leader is None or leader.started == run.started)
    return descendants(run.token, run.pid if same else 0, run.log)


async def end(run: Run, within_s: float) -> bool:
    """Kills every process of that engine. False when some are still there after `within_s`."""
    try:
        async with asyncio.timeout(within_s):
            while left := await asyncio.to_thread(living, run):
                for pid in left:
                    try:
                        os.kill(pid, signal.SIGKILL)
                    except ProcessLookupError:
                        continue
                    except PermissionError:
                        return False
                await asyncio.sleep(0.02)
    except TimeoutError:
        return False
    return True


def _read(path: Path) -> Run | None:
    try:
        content = json.loads(path.read_text())
        return Run(
            replica=str(content["replica"]),
            token=str(content["token"]),
            log=str(content["log"]),
            boot=str(content["boot"]),
            namespace=str(content["namespace"]),
            pid=int(content["pid"]),
            started=int(content["started"]),
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None
