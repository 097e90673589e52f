"""From handoff files to running engines: the loop that keeps a node's replicas as its directory says."""

from __future__ import annotations

import asyncio
import logging
import os
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from llorch_api import ReplicaOrigin

from .core.handoff import LOOPBACK_ONLY, Adopt, Ignore, Launch, Partial, Removed, UrlPolicy, diff, parse
from .core.supervision import LIMITS, Limits
from .engine_binary import EngineCommand, EngineNotFoundError, find_engine
from .engine_log import EngineLogs
from .engine_probe import EngineProbe
from .engine_start import Starter
from .handoff import HandoffDirectory, Seen, digests
from .keeper import Keeper, Workshop
from .leftovers import RunFiles
from .replicas import Replicas

log = logging.getLogger(__name__)

PATIENCE_S: Final = 5.0
"""A file that is no JSON for so long is not being written any more."""

MAX_SAID: Final = 1000
"""Warnings that are remembered, so as not to be repeated."""


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """How engines are found and launched."""

    engine: str = ""
    """LLORCH_ENGINE: path of llama-server; empty looks on PATH, then for the xllamacpp wheel."""
    interval_s: float = 1.0
    """Rescan of the directory, seconds. inotify, where it is to be had, is faster."""
    state: Path | None = None
    """Where logs/ and run/ go; default: beside a directory named `engines`, else in the handoff directory."""
    urls: UrlPolicy = LOOPBACK_ONLY
    cache_ram_mib: int = 0
    """Host memory in which each engine keeps prompts of earlier requests, MiB."""
    limits: Limits = LIMITS


DEFAULT_SETTINGS = EngineSettings()


@dataclass(slots=True)
class _File:
    """What is known of one handoff file."""

    digest: str
    entry: Launch | Adopt | None
    """The last content that made sense."""
    doubtful_since: float | None = None
    """Since when it is no JSON; None once that was said, or where it is."""


class Engines:
    """The engines of this node. `run` keeps them; the rest may be called while it runs.

    The directory says what should run, and every look at it is compared with what does: nothing is remembered as done. An id
    belongs to the first file that claims it, by name.
    """

    def __init__(self, replicas: Replicas, directory: Path, settings: EngineSettings = DEFAULT_SETTINGS) -> None:
        self._replicas = replicas
        self._settings = settings
        self._directory = HandoffDirectory(directory, settings.interval_s)
        state = settings.state or (directory.parent if directory.name == "engines" else directory)
        self._runs = RunFiles(state / "run")
        self.logs = EngineLogs(state / "logs")
        """What the engines wrote."""
        self._probe = EngineProbe()
        self._workshop = Workshop(
            replicas=replicas,
            starter=Starter(self._runs, self.logs, self._probe, settings.cache_ram_mib),
            probe=self._probe,
            engine=self._engine,
            limits=settings.limits,
            random=random.Random(),
        )
        self._command: EngineCommand | None = None
        self._files: dict[str, _File] = {}
        self._keepers: dict[str, Keeper] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._stopped: dict[str, Launch | Adopt] = {}
        """Stopped by `stop`, while the file that asks for them is still the same."""
        self._owner = False
        self._closing = False
        self._said: set[tuple[str, str]] = set()
        self._idle = asyncio.Event()
        self._idle.set()

    async def run(self) -> None:
        """Keeps engines as the directory says, until `close` or cancellation; either ends all that were launched."""
        if self._closing:
            return
        self._idle.clear()
        try:
            async with asyncio.TaskGroup() as group:
                while not self._closing:
                    await self._own()
                    self._look()
                    self._reconcile(group)
                    await self._directory.wait()
                for keeper in self._keepers.values():
                    keeper.abandon()
        finally:
            self._directory.close()
            await self._probe.close()
            self._runs.close()
            self._owner = False
            self._idle.set()

    async def drain(self, replica_id: str, deadline_s: float) -> bool:
        """Takes a replica out of service and waits for its requests. False when some were still there after `deadline_s`.

        The engine stays up until `stop`, or until its file goes. An unknown id is drained already.
        """
        keeper = self._keepers.get(replica_id)
        return True if keeper is None else await keeper.drain(deadline_s)

    def resume(self, replica_id: str) -> None:
        """Takes a drain back."""
        if (keeper := self._keepers.get(replica_id)) is not None:
            keeper.resume()

    async def stop(self, replica_id: str) -> None:
        """Ends a replica now, with the requests it still has, and returns when its engine is gone and its entry too.

        The handoff file of an assigned replica is deleted; another one stays, and counts again once its content changes.
        """
        for name, file in list(self._files.items()):
            if file.entry is None or file.entry.id != replica_id:
                continue
            if isinstance(file.entry, Launch) and file.entry.origin is ReplicaOrigin.ASSIGNED:
                (self._directory.path / name).unlink(missing_ok=True)
                del self._files[name]
            else:
                self._stopped[replica_id] = file.entry
        keeper, task = self._keepers.get(replica_id), self._tasks.get(replica_id)
        if keeper is not None and task is not None:
            keeper.abandon()
            await asyncio.wait([task])

    async def close(self) -> None:
        """Ends every launched engine, all at once, within 5 s; adopted ones are forgotten. `run` returns then."""
        self._closing = True
        for keeper in self._keepers.values():
            keeper.abandon()
        self._directory.wake()
        await self._idle.wait()

    # ---- the loop

    def _look(self) -> None:
        """Reads the directory into `_files`."""
        try:
            seen = self._directory.scan()
        except OSError as error:
            self._say(str(self._directory.path), "", f"cannot be read: {os.strerror(error.errno or 0)}")
            return
        known = {name: file.digest for name, file in self._files.items()}
        for change in diff(known, digests(seen)):
            if isinstance(change, Removed):
                del self._files[change.path]
            else:
                self._understand(change.path, seen[change.path])
        now = asyncio.get_running_loop().time()
        for name, file in self._files.items():
            if file.doubtful_since is not None and now - file.doubtful_since > PATIENCE_S:
                file.doubtful_since = None
                self._say(name, file.digest, "not JSON")

    def _understand(self, name: str, seen: Seen) -> None:
        before = self._files.get(name)
        entry = Ignore(seen.refused) if seen.refused else parse(seen.data, self._settings.urls)
        if isinstance(entry, Partial | Ignore):
            # What was understood before stays: one program may write over another's file, or a person mistype.
            file = _File(seen.digest, None if before is None else before.entry)
            if isinstance(entry, Partial):
                file.doubtful_since = asyncio.get_running_loop().time()
            else:
                self._say(name, seen.digest, entry.reason)
        else:
            file = _File(seen.digest, entry)
        self._files[name] = file

    def _reconcile(self, group: asyncio.TaskGroup) -> None:
        wanted: dict[str, Launch | Adopt] = {}
        for name, file in sorted(self._files.items()):
            entry = file.entry
            if entry is None:
                continue
            if entry.id in wanted:
                self._say(name, file.digest, f"{entry.id} is in another file already")
                continue
            if self._stopped.get(entry.id) == entry:
                continue
            wanted[entry.id] = entry
        for replica_id in list(self._stopped):
            if not any(file.entry == self._stopped[replica_id] for file in self._files.values()):
                del self._stopped[replica_id]
        if not self._owner and any(isinstance(entry, Launch) for entry in wanted.values()):
            self._say(str(self._runs.directory), "", "another agent launches the engines of this directory; this one only adopts")
            wanted = {replica_id: entry for replica_id, entry in wanted.items() if isinstance(entry, Adopt)}
        for replica_id, keeper in self._keepers.items():
            keeper.want(wanted.get(replica_id))
        for replica_id, entry in wanted.items():
            if replica_id not in self._keepers:
                keeper = self._keepers[replica_id] = Keeper(replica_id, self._workshop)
                keeper.want(entry)
                self._tasks[replica_id] = group.create_task(self._keep(keeper), name=f"engine {replica_id}")

    async def _keep(self, keeper: Keeper) -> None:
        try:
            await keeper.run()
        finally:
            del self._keepers[keeper.id], self._tasks[keeper.id]
            self.logs.ended(keeper.id)
            self._directory.wake()  # its file may be back

    async def _own(self) -> None:
        """Launching is for one agent per directory. Who takes over ends first what the one before left behind."""
        if self._owner:
            return
        try:
            if self._runs.own():
                await self._runs.reap()
                self._owner = True
        except OSError as error:
            self._say(
                str(self._runs.directory), "", f"cannot be written, so no engine is launched: {os.strerror(error.errno or 0)}"
            )

    async def _engine(self) -> EngineCommand:
        if self._command is None:
            try:
                self._command = await find_engine(self._settings.engine)
            except EngineNotFoundError as error:
                self._say("engine", "", str(error))
                raise
            log.info("engine: %s", " ".join(self._command.argv))
        return self._command

    def _say(self, name: str, digest: str, reason: str) -> None:
        """Warns once of a file's content."""
        if (name, digest + reason) not in self._said:
            if len(self._said) >= MAX_SAID:
                self._said.clear()
            self._said.add((name, digest + reason))
            log.warning("%s: %s", name, reason)
