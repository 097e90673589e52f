"""The directory where fetched models are kept: names, and a note beside each model of what it is."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from .core.errors import NoDisk
from .core.identity import MODEL_SUFFIX, stored_name, stored_names
from .core.shape import MIB
from .core.source import Source
from .core.split import part_name

NOTE_SUFFIX = ".json"
MAX_NOTE_BYTES = 64 << 10


@dataclass(frozen=True, slots=True)
class StoredModel:
    """A complete, verified model."""

    path: Path
    """What an engine loads: the file, or the first part of a split model."""
    source: str
    digest: str
    sha256: str
    """Empty where nobody stated one."""
    size_bytes: int
    """Of all its files."""
    files: tuple[Path, ...]
    used_ns: int
    """When it was last asked for, nanoseconds since the epoch."""

    @property
    def size_mib(self) -> int:
        """Size of its files, rounded up."""
        return -(-self.size_bytes // MIB)


@dataclass(frozen=True, slots=True)
class _Note:
    """What is written beside a model. It counts only while the files are the ones it was written for."""

    source: str
    digest: str
    sha256: str
    files: list[tuple[str, int, int]]
    """(name, bytes, mtime in ns) of each."""


class ModelDirectory:
    """Names and finds the models of one directory. Several processes may use it at once."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def path_of(self, source: Source, digest: str) -> Path:
        """Where that content of that source is kept, if it is one file."""
        return self.directory / stored_name(source, digest)

    def paths_of(self, source: Source, digest: str, parts: int) -> tuple[Path, ...]:
        """Where that content of that source is kept."""
        return tuple(self.directory / name for name in stored_names(source, digest, parts))

    def find(self, source: Source, digest: str) -> StoredModel | None:
        """The model if it is there, complete and as it was when it was stored. Being found counts as being used."""
        path = self.path_of(source, digest)
        stem = path.name.removesuffix(MODEL_SUFFIX)
        try:
            names = [name for name in os.listdir(self.directory) if name.startswith(stem) and name.endswith(MODEL_SUFFIX)]
        except OSError:
            return None
        for name in names:
            part = part_name(name)
            if name == path.name or (part is not None and part.stem == stem and part.number == 1):
                stored = _read_note(self.directory / name)
                if stored is not None and stored.digest == digest:
                    self.use(stored)
                    return stored
        return None

    def use(self, stored: StoredModel) -> None:
        """Notes that it is used now: what was used last is evicted last."""
        now = time.time_ns()
        try:
            os.utime(note_path(stored.path), ns=(now, now))
        except OSError:
            pass  # a directory that cannot be written has nothing evicted either

    def note(self, paths: Sequence[Path], files: Sequence[Path], source: Source, digest: str, sha256: str) -> None:
        """Writes the note of `paths` for the contents of `files`, which are about to be renamed to them. Raises OSError."""
        found = [(path.name, file.stat()) for path, file in zip(paths, files, strict=True)]
        note = _Note(str(source), digest, sha256, [(name, each.st_size, each.st_mtime_ns) for name, each in found])
        descriptor, temporary = tempfile.mkstemp(prefix=f".{paths[0].name[-64:]}.", dir=self.directory)
        try:
            with os.fdopen(descriptor, "w") as out:
                json.dump(asdict(note), out)
            os.replace(temporary, note_path(paths[0]))
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise

    def __iter__(self) -> Iterator[StoredModel]:
        """All stored models, those that were used last first."""
        try:
            names = os.listdir(self.directory)
        except OSError:
            return
        noted = (name.removesuffix(NOTE_SUFFIX) for name in names if name.endswith(MODEL_SUFFIX + NOTE_SUFFIX))
        found = [stored for name in noted if (stored := _read_note(self.directory / name)) is not None]
        yield from sorted(found, key=lambda each: (-each.used_ns, each.path))

    def remove(self, stored: StoredModel) -> None:
        """Deletes the files and the note. Files that are gone already are fine."""
        note_path(stored.path).unlink(missing_ok=True)
        for file in stored.files:
            file.unlink(missing_ok=True)


def no_disk(directory: Path, error: OSError) -> NoDisk:
    """An error of writing, in one line."""
    return NoDisk(f"{directory}: cannot be written: {error.strerror or error}")


def sync_directory(directory: Path) -> None:
    """Makes a rename in it survive a power cut. Blocks."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def note_path(path: Path) -> Path:
    """Where the note of a model is, whose first file is `path`."""
    return path.with_name(path.name + NOTE_SUFFIX)


def _read_note(path: Path) -> StoredModel | None:
    try:
        with note_path(path).open("rb") as file:
            note = _Note(**json.loads(file.read(MAX_NOTE_BYTES)))
            used = os.fstat(file.fileno()).st_mtime_ns
        files = tuple(path.parent / name for name, _, _ in note.files)
        for each, (name, size, mtime) in zip(files, note.files, strict=True):
            found = each.stat()
            if "/" in name or (found.st_size, found.st_mtime_ns) != (size, mtime):
                return None
    except (OSError, ValueError, TypeError):
        return None
    if not files or files[0] != path:
        return None
    size_bytes = sum(size for _, size, _ in note.files)
    return StoredModel(path, note.source, note.digest, note.sha256, size_bytes, files, used)
