"""Carries out the operator's assignments: watches this node's spec, fetches models, writes and removes handoff files."""

from __future__ import annotations

import asyncio
import json
import logging
import random
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

from llorch_api import Assignment, GPUNode, ReplicaOrigin, ReplicaState
from llorch_model.access import DEFAULT_ACCESS, SourceAccess
from llorch_model.cache import UNLIMITED, CachePolicy
from llorch_model.core.errors import ModelError
from llorch_model.fetch import fetch
from llorch_store import EventType, Forbidden, Store

from .core.assignments import Action, Adopt, Drain, Forget, Held, Stage, Start, Stop, decide
from .core.handoff import MAX_BYTES, Launch, file_name, launch_document, parse
from .core.snapshot import ModelFile
from .handoff import write_atomically
from .model_roots import ModelRoots
from .pool_entries import PROGRESS_STEP
from .replicas import Replica, Replicas

log = logging.getLogger(__name__)

LOOK_S: Final = 1.0
"""Between two looks whether handoff files are still there."""
FETCHES: Final = 2
"""Models on their way at once: more only share the same wire."""
RETRY_S: Final = (5.0, 60.0)
"""Least and most seconds before a fetch that failed for a passing reason is tried again."""
THROUGH_FILE: Final = ".assigned-through"
"""Notes the uid of the GPUNode that each file was assigned through. In the handoff directory, under no handoff file's name."""
FORBIDDEN_RETRY_S: Final = 30.0


class EngineControl(Protocol):
    """What assignments ask of the engines."""

    async def drain(self, replica_id: str, deadline_s: float) -> bool:
        """No more leases; returns when none is out, or False at the deadline."""
        ...

    async def stop(self, replica_id: str) -> None:
        """Ends the engine, deletes its assigned file, returns when both are gone."""
        ...


@dataclass(slots=True)
class _Record:
    """One assigned replica. `shown` is its entry in the table until the engines have put theirs."""

    stage: Stage
    pool: str
    revision: str
    node_uid: str
    path: Path
    model: ModelFile | None = None
    task: asyncio.Task[None] | None = None
    ending: bool = False
    shown: Replica | None = None


class Assignments:
    """Keeps handoff files in line with GPUNode.spec. `run` does it; a store that is away changes nothing that runs."""

    def __init__(
        self,
        store: Store,
        node: str,
        replicas: Replicas,
        engines: EngineControl,
        *,
        handoffs: Path,
        models: Path,
        roots: ModelRoots,
        draw: random.Random,
        gone: Callable[[], None] = lambda: None,
        access: SourceAccess = DEFAULT_ACCESS,
        cache: CachePolicy = UNLIMITED,
    ) -> None:
        """`gone` is called when the GPUNode was deleted."""
        self._gone = gone
        self._access = access
        self._cache = cache
        self._store = store
        self._node = node
        self._replicas = replicas
        self._engines = engines
        self._handoffs = handoffs
        self._models = models
        self._roots = roots
        self._draw = draw
        self._records: dict[str, _Record] = {}
        self._seen: tuple[str, Mapping[str, Assignment]] | None = None
        self._through: dict[str, str] = {}
        self._wake = asyncio.Event()
        self._noting = asyncio.Lock()
        self._fetching = asyncio.Semaphore(FETCHES)

    @property
    def assigned(self) -> Sequence[Assignment]:
        """What the node's spec asks for, as far as it is known. Safe in any thread."""
        seen = self._seen
        return tuple(seen[1].values()) if seen is not None else ()

    @property
    def local_models(self) -> Sequence[ModelFile]:
        """Models of `file:` sources that assigned replicas run; fetched ones are found in their directory."""
        return [record.model for record in self._records.values() if record.model is not None]

    async def run(self) -> None:
        """For ever. Fetches end with it; engines do not."""
        self._recall()
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._watch(), name="watch assignments")
                while True:
                    self._reconcile(group)
                    try:
                        async with asyncio.timeout(LOOK_S):
                            await self._wake.wait()
                    except TimeoutError:
                        continue
                    self._wake.clear()
        finally:
            for replica_id, record in self._records.items():
                if record.shown is not None and self._replicas.get(replica_id) is record.shown:
                    self._replicas.remove(replica_id)

    # ---- what is wanted

    async def _watch(self) -> None:
        while True:
            try:
                async with aclosing(self._store.watch(GPUNode, name=self._node)) as events:
                    async for event in events:
                        if event.type is EventType.DELETED:
                            self._seen = None
                            self._gone()
                        elif event.object is not None:
                            self._seen = (event.object.metadata.uid, event.object.spec.replicas)
                            self._wake.set()
            except Forbidden as error:
                log.error("cannot watch GPUNode %s: %s", self._node, error)
            await asyncio.sleep(FORBIDDEN_RETRY_S)

    # ---- what is held

    def _recall(self) -> None:
        """The handoff files of an earlier life of this agent."""
        self._handoffs.mkdir(parents=True, exist_ok=True)
        try:
            through = json.loads((self._handoffs / THROUGH_FILE).read_bytes())
            self._through = {str(replica): str(uid) for replica, uid in through.items()}
        except FileNotFoundError:
            self._through = {}
        except (OSError, ValueError, AttributeError) as error:
            log.warning("%s cannot be read: %s", self._handoffs / THROUGH_FILE, error)
        for path in sorted(self._handoffs.glob("*.json")):
            try:
                if path.is_symlink() or path.stat().st_size > MAX_BYTES:
                    continue
                entry = parse(path.read_bytes())
            except OSError:
                continue
            if isinstance(entry, Launch) and entry.origin is ReplicaOrigin.ASSIGNED:
                uid = self._through.get(entry.replica, "")
                self._records[entry.replica] = _Record(Stage.LAUNCHED, entry.pool, entry.revision, uid, path)
        self._through = {replica: uid for replica, uid in self._through.items() if replica in self._records}

    def _held(self) -> dict[str, Held]:
        held = {}
        for replica_id, record in self._records.items():
            gone = record.stage is Stage.LAUNCHED and not record.path.exists()
            held[replica_id] = Held(Stage.FILE_GONE if gone else record.stage, record.revision, record.node_uid)
        return held

    async def _note(self, replica_id: str, uid: str) -> None:
        """Writes down through which object a replica came; an empty uid forgets it."""
        async with self._noting:
            if self._through.get(replica_id, "") == uid:
                return
            self._through.pop(replica_id, None)
            if uid:
                self._through[replica_id] = uid
            await _write(self._handoffs / THROUGH_FILE, json.dumps(self._through, sort_keys=True).encode())

    # ---- in line

    def _reconcile(self, group: asyncio.TaskGroup) -> None:
        if self._seen is None:
            return
        uid, wanted = self._seen
        busy = {replica_id for replica_id, record in self._records.items() if record.ending}
        wanted = {replica_id: assignment for replica_id, assignment in wanted.items() if replica_id not in busy}
        held = {replica_id: have for replica_id, have in self._held().items() if replica_id not in busy}
        for replica_id, have in held.items():
            if have.stage is Stage.LAUNCHED and replica_id in wanted and self._records[replica_id].model is None:
                self._records[replica_id].model = _local_model(wanted[replica_id])
        for action in decide(uid, wanted, held):
            record = self._records.get(action.replica)
            if record is None or not record.ending:
                self._act(group, action, record, uid)

    def _act(self, group: asyncio.TaskGroup, action: Action, record: _Record | None, uid: str) -> None:
        replica_id = action.replica
        match action:
            case Start(assignment=assignment):
                path = self._handoffs / file_name(assignment.pool, replica_id)
                fresh = _Record(Stage.FETCHING, assignment.pool, assignment.revision, uid, path)
                self._records[replica_id] = fresh
                fresh.task = group.create_task(self._start(replica_id, fresh, assignment), name=f"start {replica_id}")
            case Adopt() if record is not None:
                record.node_uid = uid
                group.create_task(self._adopt(replica_id, uid), name=f"adopt {replica_id}")
            case Drain(deadline_seconds=deadline) if record is not None:
                record.stage = Stage.DRAINING
                record.task = group.create_task(self._drain(replica_id, record, deadline), name=f"drain {replica_id}")
            case Stop(assignment=assignment):
                path = self._handoffs / file_name(assignment.pool, replica_id)
                unknown = _Record(Stage.OVER, assignment.pool, assignment.revision, uid, path)
                record = self._records.setdefault(replica_id, unknown)
                record.ending = True
                group.create_task(self._end(replica_id, record, keep=True), name=f"stop {replica_id}")
            case Forget() if record is not None:
                record.ending = True
                group.create_task(self._end(replica_id, record, keep=False), name=f"end {replica_id}")

    async def _start(self, replica_id: str, record: _Record, assignment: Assignment) -> None:
        shown = self._show(replica_id, record, assignment, ReplicaState.FETCHING)
        failures = 0
        while True:
            try:
                self._roots.check(assignment.model.source)
                async with self._fetching:
                    found = await fetch(
                        assignment.model.source,
                        directory=self._models,
                        sha256=assignment.model.sha256 or None,
                        digest=assignment.model.digest,
                        progress=lambda done, total: self._progress(shown, done, total),
                        access=self._access,
                        cache=self._cache,
                    )
                record.model = _local_model(assignment, found.digest, found.size_mib)
                await self._note(replica_id, record.node_uid)
                await _write(record.path, launch_document(replica_id, assignment, str(found.path)))
            except ModelError as error:
                if not error.retryable:
                    await self._failed(replica_id, record, assignment, error.message)
                    return
                failures += 1
                wait = max(error.retry_after or 0.0, min(RETRY_S[1], RETRY_S[0] * 2.0 ** (failures - 1)))
                self._show(replica_id, record, assignment, ReplicaState.FETCHING, f"trying again: {error.message}")
                log.warning("%s: %s; trying again in %.0f s", replica_id, error.message, wait)
                await asyncio.sleep(wait * self._draw.uniform(0.9, 1.1))
            except OSError as error:
                text = f"{self._handoffs}: cannot be written: {error.strerror or error}"
                await self._failed(replica_id, record, assignment, text)
                return
            else:
                record.stage = Stage.LAUNCHED
                log.info("%s: model %s is here, handoff file written", replica_id, found.path)
                return

    async def _failed(self, replica_id: str, record: _Record, assignment: Assignment, message: str) -> None:
        log.error("%s: %s", replica_id, message)
        record.stage = Stage.OVER
        while self._show(replica_id, record, assignment, ReplicaState.FAILED, message) is None:
            # Its engine of before is still ending.
            await self._replicas.wait_beyond(self._replicas.version)

    async def _adopt(self, replica_id: str, uid: str) -> None:
        log.info("%s: taken over by the node's new object", replica_id)
        try:
            await self._note(replica_id, uid)
        except OSError as error:
            log.error("%s: cannot be written: %s", self._handoffs / THROUGH_FILE, error.strerror)

    async def _forget_note(self, replica_id: str) -> None:
        try:
            await self._note(replica_id, "")
        except OSError as error:
            log.warning("%s: cannot be written: %s", self._handoffs / THROUGH_FILE, error.strerror)

    async def _drain(self, replica_id: str, record: _Record, deadline_s: float) -> None:
        log.info("%s: draining, for %d s at most", replica_id, deadline_s)
        if not await self._engines.drain(replica_id, deadline_s):
            log.warning("%s: the drain deadline has passed with requests in flight", replica_id)
        record.ending = True
        record.task = None
        await self._end(replica_id, record, keep=True)

    async def _end(self, replica_id: str, record: _Record, *, keep: bool) -> None:
        """Ends whatever there is of it. With `keep` it is reported as Stopped until the operator removes its key."""
        if record.task is not None and record.task is not asyncio.current_task():
            record.task.cancel()
            await asyncio.wait([record.task])
        record.path.unlink(missing_ok=True)
        await self._engines.stop(replica_id)
        await self._forget_note(replica_id)
        if record.shown is not None and self._replicas.get(replica_id) is record.shown:
            self._replicas.remove(replica_id)
        record.model = record.task = record.shown = None
        if keep:
            record.stage = Stage.OVER
            assignment = self._seen[1].get(replica_id) if self._seen else None
            if assignment is not None:
                self._show(replica_id, record, assignment, ReplicaState.STOPPED)
        else:
            del self._records[replica_id]
        record.ending = False
        log.info("%s: ended", replica_id)
        self._wake.set()

    def _progress(self, shown: Replica | None, done: int, total: int) -> None:
        if shown is None or total <= 0:
            return
        percent = min(100, done * 100 // total)
        told = shown.progress_percent // PROGRESS_STEP
        shown.progress_percent = percent
        if percent // PROGRESS_STEP != told:
            self._replicas.touch()

    def _show(
        self, replica_id: str, record: _Record, assignment: Assignment, state: ReplicaState, message: str = ""
    ) -> Replica | None:
        """Its entry in the table of replicas, unless the engines have one already: then theirs is the truth."""
        present = self._replicas.get(replica_id)
        if present is not None and present is not record.shown:
            return None
        if record.shown is None:
            record.shown = Replica(
                id=replica_id,
                pool=assignment.pool,
                origin=ReplicaOrigin.ASSIGNED,
                namespace=assignment.namespace,
                revision=assignment.revision,
                model=assignment.model.digest,
                since=time.time(),
                devices={uuid: share.vram_mib for uuid, share in assignment.devices.items()},
            )
            self._replicas.put(record.shown)
        self._replicas.move(record.shown, state, time.time(), message)
        return record.shown


def _local_model(assignment: Assignment, digest: str = "", size_mib: int = 0) -> ModelFile | None:
    """The model of a `file:` source, for the node's list; fetched ones are in the model directory, which is listed itself."""
    model = assignment.model
    digest = digest or model.digest
    return ModelFile(digest, model.source, size_mib or model.size_mib) if digest and model.source.startswith("file:") else None


async def _write(path: Path, data: bytes) -> None:
    """Off the loop, and over when this returns or raises: a thread that goes on after a cancellation would write a file anew
    that was just removed."""
    writing = asyncio.ensure_future(asyncio.to_thread(write_atomically, path, data))
    try:
        await asyncio.shield(writing)
    except asyncio.CancelledError:
        await asyncio.wait([writing])
        raise
