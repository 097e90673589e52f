"""Inspects a model file of this machine. Reads happen in threads, hashes of large files in steps that can be cancelled."""

from __future__ import annotations

import asyncio
import hashlib
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from .core.errors import BadModel, DigestMismatch, ModelNotAvailable
from .core.gguf import GGUFError, Header, HeaderParser
from .core.identity import normal_sha256, sha256_digest
from .core.source import FileSource
from .core.split import joined, part_paths, split_digest
from .inspected import Inspected, check_complete, usable_shape
from .progress import Progress

READ_BYTES = 1 << 20
HASH_STEP_BYTES = 16 << 20
SAMPLES = 64
SAMPLE_BYTES = 64 << 10
MAX_REMEMBERED_HASHES = 256


class FileIdentity(NamedTuple):
    """A file as it was when it was hashed. Whoever rewrites it changes one of these."""

    path: str
    size_bytes: int
    mtime_ns: int
    inode: int


class FileHashes:
    """The sha256 of files, computed once per content and process; that of several is the one of their contents in a row."""

    def __init__(self) -> None:
        self._known: dict[tuple[FileIdentity, ...], str] = {}
        self._running: dict[tuple[FileIdentity, ...], asyncio.Lock] = {}

    def remember(self, path: Path, sha256: str) -> None:
        """Takes over a hash that was computed while the file was written."""
        self._keep((identify(path),), sha256)

    async def sha256(self, *paths: Path, progress: Progress | None = None) -> str:
        """64 hex digits. Raises ModelNotAvailable when a file cannot be read or changes meanwhile."""
        identity = tuple(map(identify, paths))
        lock = self._running.setdefault(identity, asyncio.Lock())
        try:
            async with lock:
                if identity not in self._known:
                    value = await _hash(paths, sum(each.size_bytes for each in identity), progress)
                    if tuple(map(identify, paths)) != identity:
                        raise ModelNotAvailable(f"{paths[0]}: the file changed while it was read", retryable=True)
                    self._keep(identity, value)
                return self._known[identity]
        finally:
            if not lock.locked():
                self._running.pop(identity, None)

    def _keep(self, identity: tuple[FileIdentity, ...], sha256: str) -> None:
        self._known[identity] = sha256
        while len(self._known) > MAX_REMEMBERED_HASHES:
            del self._known[next(iter(self._known))]


HASHES = FileHashes()
"""Of this process."""


async def inspect_file(
    path: str | Path, *, sha256: str | None = None, progress: Progress | None = None, hashes: FileHashes = HASHES
) -> Inspected:
    """Header, shape and identity of the GGUF at `path`. Raises ModelError.

    For a split model `path` names the first part, and all parts count. With `sha256` the whole is read and compared (`progress`
    is told how far), and that is its digest; of a split model it is that of the parts in a row. Without, the digest is a hash
    over the size, the start and samples spread over the file: the same for copies on several nodes, and cheap.
    """
    stated = normal_sha256(sha256)
    file = Path(path)
    try:
        paths = [Path(each) for each in part_paths(str(file))]
    except GGUFError as error:
        raise BadModel(f"{file}: {error}") from error
    header, size = await asyncio.to_thread(read_headers, paths)
    shape = usable_shape(str(file), header)
    if stated:
        actual = await hashes.sha256(*paths, progress=progress)
        if actual != stated:
            raise DigestMismatch(f"{file}: sha256 is {actual}, expected {stated}")
        digest = sha256_digest(actual)
    else:
        digest = split_digest([await asyncio.to_thread(sample_digest, each) for each in paths], size)
    return Inspected(str(FileSource(str(file))), digest, size, header, shape)


def read_headers(paths: Sequence[Path], where: str = "") -> tuple[Header, int]:
    """One header for all parts of a model, and their size in all. `where` is its name in messages. Raises ModelError. Blocks."""
    found = [read_header(path) for path in paths]
    try:
        return joined([header for header, _ in found]), sum(size for _, size in found)
    except GGUFError as error:
        raise BadModel(f"{where or paths[0]}: {error}") from error


def read_header(path: Path) -> tuple[Header, int]:
    """The header and the size of a complete GGUF file. Raises ModelError. Blocks."""
    size = identify(path).size_bytes
    parser = HeaderParser()
    try:
        with path.open("rb", buffering=0) as file:
            while parser.header is None and (data := file.read(max(READ_BYTES, parser.wanted))):
                parser.feed(data)
        header = parser.close()
    except GGUFError as error:
        raise BadModel(f"{path}: {error}") from error
    except OSError as error:
        raise _unreadable(path, error) from error
    check_complete(str(path), header, size)
    return header, size


def identify(path: Path) -> FileIdentity:
    """Size, times and inode of a regular file. Raises ModelError when it is missing or something else."""
    try:
        found = path.stat()
    except FileNotFoundError as error:
        raise ModelNotAvailable(f"{path}: no such file") from error
    except OSError as error:
        raise _unreadable(path, error) from error
    if stat.S_ISDIR(found.st_mode):
        raise BadModel(f"{path}: a directory, not a GGUF file")
    if not stat.S_ISREG(found.st_mode):
        raise BadModel(f"{path}: not a regular file")
    return FileIdentity(str(path), found.st_size, found.st_mtime_ns, found.st_ino)


def sample_digest(path: Path) -> str:
    """`sample:` and a hash over size and samples of the content. Blocks for some milliseconds."""
    size = identify(path).size_bytes
    digest = hashlib.sha256(str(size).encode())
    try:
        with path.open("rb", buffering=0) as file:
            if size <= SAMPLES * SAMPLE_BYTES:
                digest.update(file.read(size))
            else:
                for sample in range(SAMPLES):
                    file.seek((size - SAMPLE_BYTES) * sample // (SAMPLES - 1))
                    digest.update(file.read(SAMPLE_BYTES))
    except OSError as error:
        raise _unreadable(path, error) from error
    return f"sample:{digest.hexdigest()}"


async def _hash(paths: Sequence[Path], size_bytes: int, progress: Progress | None) -> str:
    digest, told = hashlib.sha256(), 0

    def step(path: Path, position: int) -> int:
        with path.open("rb", buffering=0) as file:
            file.seek(position)
            rest = HASH_STEP_BYTES
            while rest > 0 and (data := file.read(min(rest, READ_BYTES))):
                digest.update(data)
                rest -= len(data)
        return HASH_STEP_BYTES - rest

    for path in paths:
        position = 0
        try:
            while read := await asyncio.to_thread(step, path, position):
                position += read
                told += read
                if progress is not None:
                    progress(min(told, size_bytes), size_bytes)
        except OSError as error:
            raise _unreadable(path, error) from error
    return digest.hexdigest()


def _unreadable(path: Path, error: OSError) -> ModelNotAvailable:
    return ModelNotAvailable(f"{path}: cannot be read: {error.strerror or error}")
