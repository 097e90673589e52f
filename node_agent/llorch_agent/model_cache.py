"""The models of this node: which of them are in use, what the cache may hold, and what the status says of it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from pathlib import Path

from llorch_api import Assignment, Desired
from llorch_model.cache import CachePolicy, clear_stale, held_first, room_bytes
from llorch_model.model_directory import ModelDirectory

from .core.handoff import MAX_BYTES, Launch, parse
from .core.snapshot import ModelFile

log = logging.getLogger(__name__)
_MIB = 1 << 20


class ModelCache:
    """The model directory and its rules. A model is in use while an assignment or a handoff file of this node names it."""

    def __init__(
        self, models: Path, handoffs: Path, limit_mib: int, assigned: Callable[[], Iterable[Assignment]] = tuple
    ) -> None:
        self._directory = ModelDirectory(models)
        self._handoffs = handoffs
        self.assigned = assigned
        self.policy = CachePolicy(limit_mib, self.held)

    def held(self) -> frozenset[str]:
        """Digests, sources and paths of the models in use. Reads the handoff files."""
        names: set[str] = set()
        for assignment in self.assigned():
            if assignment.desired is not Desired.STOP:
                model = assignment.model
                names.add(model.digest or (f"sha256:{model.sha256}" if model.sha256 else model.source))
        for path in self._handoffs.glob("*.json"):
            try:
                if path.is_symlink() or path.stat().st_size > MAX_BYTES:
                    continue
                entry = parse(path.read_bytes())
            except OSError:
                continue
            if isinstance(entry, Launch):
                names |= {entry.model_path, entry.digest}
        return frozenset(names - {""})

    def files(self) -> list[ModelFile]:
        """For the status: those in use first, then those used last."""
        return [ModelFile(each.digest, each.source, each.size_mib) for each in held_first(self._directory, self.held())]

    def room_mib(self, disk_free_mib: int) -> int:
        """What one more model may take, MiB: free disk, and what eviction would free, within the limit."""
        return room_bytes(self._directory, disk_free_mib * _MIB, self.policy) // _MIB

    def clear(self) -> None:
        """Deletes what broken downloads left long ago. Blocks."""
        for path in clear_stale(self._directory.directory):
            log.info("deleted %s, left by a download", path)
