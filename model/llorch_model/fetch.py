"""Brings a model's file to this machine: verified, complete, and under a name that says which content it is."""

from __future__ import annotations

import asyncio
import os
import random
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import aiohttp

from .core.errors import BadModel, DigestMismatch, ModelError, ModelNotAvailable
from .core.identity import PARTIAL_SUFFIX, normal_sha256, sha256_digest
from .core.shape import MIB
from .core.source import FileSource, HttpsSource, Source, parse_source
from .download import FetchSettings, Partial, download, in_thread, open_partial
from .https import RemoteFile, open_session, shown
from .inspected import usable_shape
from .local import HASHES, FileHashes, inspect_file, read_header
from .model_directory import ModelDirectory, StoredModel, no_disk, sync_directory
from .progress import Progress
from .remote import inspect_remote, remote_source
from .sharing import SharedTasks


@dataclass(frozen=True, slots=True)
class FetchedModel:
    """A model that an engine can load."""

    path: Path
    digest: str
    size_bytes: int

    @property
    def size_mib(self) -> int:
        """Size of the file, rounded up."""
        return -(-self.size_bytes // MIB)


_FETCHES: SharedTasks[FetchedModel] = SharedTasks()


async def fetch(
    source: Source | str,
    *,
    directory: Path,
    sha256: str | None = None,
    digest: str = "",
    progress: Progress | None = None,
    session: aiohttp.ClientSession | None = None,
    settings: FetchSettings | None = None,
    hashes: FileHashes = HASHES,
    rng: random.Random | None = None,
) -> FetchedModel:
    """The file of `source`. Raises ModelError.

    `file:` is verified where it is. `https:` is downloaded into `directory`, unless it is there already; a download that was cut
    goes on where it stopped. Calls for the same file at the same time share one download.

    `sha256` is the expected hash of the content; without one, `digest` is what the model was resolved to (`etag:…`), and a file
    that has changed since is refused. With either, a file that is there needs no network. Cancelling leaves the part that was
    received for the next call.
    """
    parsed = parse_source(source) if isinstance(source, str) else source
    stated = normal_sha256(sha256) or (normal_sha256(digest) if digest.startswith("sha256:") else "")
    if isinstance(parsed, FileSource):
        found = await inspect_file(parsed.path, sha256=stated, progress=progress, hashes=hashes)
        return FetchedModel(Path(parsed.path), found.digest, found.size_bytes)
    wanted = _Wanted(remote_source(parsed), ModelDirectory(directory), stated, sha256_digest(stated) if stated else digest)

    async def start(tell: Progress) -> FetchedModel:
        async with open_session() if session is None else nullcontext(session) as used:
            return await _fetch_https(wanted, used, settings or FetchSettings(), tell, hashes, rng or random.Random())

    return await _FETCHES.run((str(directory), str(parsed), wanted.digest), start, progress)


@dataclass(frozen=True, slots=True)
class _Wanted:
    source: HttpsSource
    directory: ModelDirectory
    sha256: str
    digest: str
    """Empty where any content of the source will do."""


async def _fetch_https(
    wanted: _Wanted,
    session: aiohttp.ClientSession,
    settings: FetchSettings,
    progress: Progress,
    hashes: FileHashes,
    rng: random.Random,
) -> FetchedModel:
    if wanted.digest and (stored := wanted.directory.find(wanted.source, wanted.digest)):
        return _from_store(stored, hashes)
    file, digest, required = await _inspect(wanted, session, settings, rng)
    if (stored := wanted.directory.find(wanted.source, digest)) is not None:
        return _from_store(stored, hashes)
    target = wanted.directory.path_of(wanted.source, digest)
    partial_path = target.with_name(target.name + PARTIAL_SUFFIX)
    wanted.directory.make_room(0, 0)
    async with open_partial(partial_path, hashed=bool(wanted.sha256)) as partial:
        if (stored := wanted.directory.find(wanted.source, digest)) is not None:
            partial_path.unlink(missing_ok=True)
            return _from_store(stored, hashes)
        wanted.directory.make_room(max(0, required - partial.size), settings.headroom_mib * MIB)
        try:
            await download(
                session,
                wanted.source.url,
                file,
                partial,
                sha256=wanted.sha256,
                settings=settings,
                progress=progress,
                rng=rng,
            )
            await _check_model(wanted, partial_path)
        except (BadModel, DigestMismatch):
            partial_path.unlink(missing_ok=True)
            raise
        await in_thread(_put, wanted, partial, target, digest)
        if wanted.sha256:
            hashes.remember(target, wanted.sha256)
        return FetchedModel(target, digest, partial.size)


async def _inspect(
    wanted: _Wanted, session: aiohttp.ClientSession, settings: FetchSettings, rng: random.Random
) -> tuple[RemoteFile, str, int]:
    """(what the server says of the file, its digest, bytes it must have), after as many attempts as a download gets."""
    failures = 0
    while True:
        try:
            found, file = await inspect_remote(session, wanted.source, sha256=wanted.sha256, timeouts=settings.timeouts)
            break
        except ModelError as error:
            failures += 1
            if not error.retryable:
                raise
            if failures >= settings.attempts:
                raise ModelNotAvailable(f"{error.message} (given up after {failures} attempts)", retryable=True) from error
            await asyncio.sleep(max(error.retry_after or 0.0, settings.delay(failures, rng)))
    if wanted.digest and found.digest != wanted.digest:
        raise DigestMismatch(
            f"{shown(wanted.source.url)}: the file has changed since it was resolved: {found.digest}, expected {wanted.digest}"
        )
    return file, found.digest, found.size_bytes


async def _check_model(wanted: _Wanted, path: Path) -> None:
    """Raises BadModel when what arrived is no complete model."""
    where = shown(wanted.source.url)
    try:
        header, _ = await asyncio.to_thread(read_header, path)
    except BadModel as error:
        raise BadModel(f"{where}: {error.message.removeprefix(f'{path}: ')}") from error
    usable_shape(where, header)


def _put(wanted: _Wanted, partial: Partial, target: Path, digest: str) -> None:
    """Gives the complete file its name. The note comes first: a file without one is not taken for a model."""
    try:
        wanted.directory.note(target, partial.path, wanted.source, digest, wanted.sha256)
        os.replace(partial.path, target)
        sync_directory(target.parent)
    except OSError as error:
        raise no_disk(target.parent, error) from error


def _from_store(stored: StoredModel, hashes: FileHashes) -> FetchedModel:
    if stored.sha256:
        hashes.remember(stored.path, stored.sha256)
    return FetchedModel(stored.path, stored.digest, stored.size_bytes)
