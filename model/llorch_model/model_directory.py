"""The directory where fetched models are kept: names, and a note beside each file of what it is."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from .core.errors import NoDisk
from .core.identity import MODEL_SUFFIX, stored_name
from .core.shape import MIB
from .core.source import Source

NOTE_SUFFIX = ".json"
MAX_NOTE_BYTES = 16 << 10


@dataclass(frozen=True, slots=True)
class StoredModel:
    """A complete, verified model file."""

    path: Path
    source: str
    digest: str
    sha256: str
    """Empty where nobody stated one."""
    size_bytes: int

    @property
    def size_mib(self) -> int:
        """Size of the file, rounded up."""
        return -(-self.size_bytes // MIB)


@dataclass(frozen=True, slots=True)
class _Note:
    """What is written beside a file. It counts only while the file is the one it was written for."""

    source: str
    digest: str
    sha256: str
    size_bytes: int
    mtime_ns: int


class ModelDirectory:
    """Names and finds the models of one directory. Several processes may use it at once."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def path_of(self, source: Source, digest: str) -> Path:
        """Where that content of that source is kept."""
        return self.directory / stored_name(source, digest)

    def find(self, source: Source, digest: str) -> StoredModel | None:
        """The file if it is there, complete and as it was when it was stored."""
        stored = _read_note(self.path_of(source, digest))
        return stored if stored is not None and stored.digest == digest else None

    def note(self, path: Path, file: Path, source: Source, digest: str, sha256: str) -> None:
        """Writes the note of `path` for the content of `file`, which is about to be renamed to it. Raises OSError."""
        found = file.stat()
        note = _Note(str(source), digest, sha256, found.st_size, found.st_mtime_ns)
        descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name[-64:]}.", dir=self.directory)
        try:
            with os.fdopen(descriptor, "w") as out:
                json.dump(asdict(note), out)
            os.replace(temporary, _note_path(path))
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise

    def __iter__(self) -> Iterator[StoredModel]:
        """All stored models, newest first."""
        try:
            files = [path for path in self.directory.iterdir() if path.name.endswith(MODEL_SUFFIX)]
        except OSError:
            return
        found = [(path.stat().st_mtime_ns, stored) for path in files if (stored := _read_note(path)) is not None]
        yield from (stored for _, stored in sorted(found, key=lambda pair: (-pair[0], pair[1].path)))

    def remove(self, stored: StoredModel) -> None:
        """Deletes the file and its note. Files that are gone already are fine."""
        stored.path.unlink(missing_ok=True)
        _note_path(stored.path).unlink(missing_ok=True)

    def make_room(self, needed_bytes: int, headroom_bytes: int) -> None:
        """Creates the directory. Raises NoDisk when it cannot be written, or has too little free space."""
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            found = os.statvfs(self.directory)
        except OSError as error:
            raise no_disk(self.directory, error) from error
        free = found.f_bavail * found.f_frsize
        if free < needed_bytes + headroom_bytes:
            raise NoDisk(
                f"{self.directory}: needs {-(-needed_bytes // MIB):,} MiB and {headroom_bytes // MIB:,} MiB to spare, "
                f"{free // MIB:,} MiB are free"
            )


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


def _note_path(path: Path) -> Path:
    return path.with_name(path.name + NOTE_SUFFIX)


def _read_note(path: Path) -> StoredModel | None:
    try:
        with _note_path(path).open("rb") as file:
            note = _Note(**json.loads(file.read(MAX_NOTE_BYTES)))
        found = path.stat()
    except (OSError, ValueError, TypeError):
        return None
    if (found.st_size, found.st_mtime_ns) != (note.size_bytes, note.mtime_ns):
        return None
    return StoredModel(path, note.source, note.digest, note.sha256, note.size_bytes)
