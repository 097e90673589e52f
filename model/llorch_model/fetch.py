"""Brings a model's files to this machine: verified, complete, and under names that say which content it is."""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import Sequence
from contextlib import AsyncExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path

import aiohttp

from .access import DEFAULT_ACCESS, SourceAccess
from .cache import UNLIMITED, CachePolicy, expecting, make_room
from .core.errors import BadModel, DigestMismatch, ModelError, ModelNotAvailable
from .core.identity import PARTIAL_SUFFIX, normal_sha256, sha256_digest
from .core.shape import MIB
from .core.source import FileSource, Source, parse_source
from .download import FetchSettings, Partial, download, in_thread, open_partial
from .https import RemoteFile
from .inspected import Inspected, usable_shape
from .local import HASHES, FileHashes, inspect_file, read_headers
from .locate import Remote, locate
from .model_directory import ModelDirectory, StoredModel, no_disk, sync_directory
from .progress import Progress
from .remote import inspect_remote
from .sharing import SharedTasks


@dataclass(frozen=True, slots=True)
class FetchedModel:
    """A model that an engine can load."""

    path: Path
    """Of a split model, that of its first part."""
    digest: str
    size_bytes: int

    @property
    def size_mib(self) -> int:
        """Size of its files, rounded up."""
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
    access: SourceAccess = DEFAULT_ACCESS,
    cache: CachePolicy = UNLIMITED,
    settings: FetchSettings | None = None,
    hashes: FileHashes = HASHES,
    rng: random.Random | None = None,
) -> FetchedModel:
    """The files of `source`. Raises ModelError.

    `file:` is verified where it is. Everything else is downloaded into `directory`, unless it is there already; a download that
    was cut goes on where it stopped. Calls for the same model at the same time share one download.

    `sha256` is the expected hash of the content (of a split model, that of its parts in a row); without one, `digest` is what the
    model was resolved to (`etag:…`), and a file that has changed since is refused. With either, a model that is there needs no
    network. Cancelling leaves the part that was received for the next call.
    """
    parsed = parse_source(source) if isinstance(source, str) else source
    stated = normal_sha256(sha256) or (normal_sha256(digest) if digest.startswith("sha256:") else "")
    if isinstance(parsed, FileSource):
        found = await inspect_file(parsed.path, sha256=stated, progress=progress, hashes=hashes)
        return FetchedModel(Path(parsed.path), found.digest, found.size_bytes)
    wanted = _Wanted(parsed, ModelDirectory(directory), stated, sha256_digest(stated) if stated else digest, access, cache)

    async def start(tell: Progress) -> FetchedModel:
        if wanted.digest and (stored := wanted.directory.find(wanted.source, wanted.digest)):
            return _from_store(stored, hashes)
        async with access.session() if session is None else nullcontext(session) as used:
            return await _fetch_remote(wanted, used, settings or FetchSettings(), tell, hashes, rng or random.Random())

    return await _FETCHES.run((str(directory), str(parsed), wanted.digest), start, progress)


@dataclass(frozen=True, slots=True)
class _Wanted:
    source: Source
    directory: ModelDirectory
    sha256: str
    digest: str
    """Empty where any content of the source will do."""
    access: SourceAccess
    cache: CachePolicy


async def _fetch_remote(
    wanted: _Wanted,
    session: aiohttp.ClientSession,
    settings: FetchSettings,
    progress: Progress,
    hashes: FileHashes,
    rng: random.Random,
) -> FetchedModel:
    remote, found, files = await _inspect(wanted, session, settings, rng)
    if (stored := wanted.directory.find(wanted.source, found.digest)) is not None:
        return _from_store(stored, hashes)
    targets = wanted.directory.paths_of(wanted.source, found.digest, len(remote.parts))
    paths = [target.with_name(target.name + PARTIAL_SUFFIX) for target in targets]
    sizes = [file.size_bytes or found.size_bytes for file in files]
    sums = [part.sha256 or (wanted.sha256 if len(paths) == 1 else "") for part in remote.parts]
    try:
        wanted.directory.directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise no_disk(wanted.directory.directory, error) from error
    async with AsyncExitStack() as stack:
        partials = [
            await stack.enter_async_context(open_partial(path, hashed=bool(sha256)))
            for path, sha256 in zip(paths, sums, strict=True)
        ]
        if (stored := wanted.directory.find(wanted.source, found.digest)) is not None:
            _drop(paths)
            return _from_store(stored, hashes)
        growing = dict(zip(paths, sizes, strict=True))
        total = sum(file.size_bytes for file in files)
        stack.enter_context(expecting(growing))
        await make_room(wanted.directory, growing, settings.headroom_mib * MIB, wanted.cache)
        try:
            for index, partial in enumerate(partials):
                await download(
                    session,
                    remote.parts[index].target,
                    files[index],
                    partial,
                    sha256=sums[index],
                    settings=settings,
                    progress=_within(progress, sum(each.size for each in partials[:index]), total),
                    rng=rng,
                )
            await _check_model(wanted, remote, paths, hashes)
        except (BadModel, DigestMismatch):
            _drop(paths)
            raise
        await in_thread(_put, wanted, partials, targets, found.digest)
        if wanted.sha256 and len(targets) == 1:
            hashes.remember(targets[0], wanted.sha256)
        return FetchedModel(targets[0], found.digest, sum(partial.size for partial in partials))


def _within(progress: Progress, before: int, total: int) -> Progress:
    """The progress of one file as that of the whole."""
    return lambda done, of_file: progress(before + done, total or of_file)


def _drop(paths: Sequence[Path]) -> None:
    for path in paths:
        path.unlink(missing_ok=True)


async def _inspect(
    wanted: _Wanted, session: aiohttp.ClientSession, settings: FetchSettings, rng: random.Random
) -> tuple[Remote, Inspected, tuple[RemoteFile, ...]]:
    """Where it is, what it is, and what the servers say of each file, after as many attempts as a download gets."""
    failures = 0
    while True:
        try:
            remote = await locate(wanted.source, wanted.access)
            found, files = await inspect_remote(session, remote, sha256=wanted.sha256, timeouts=settings.timeouts)
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
            f"{remote.name}: the file has changed since it was resolved: {found.digest}, expected {wanted.digest}"
        )
    told = remote.parts[0].sha256
    if wanted.sha256 and told and len(remote.parts) == 1 and told != wanted.sha256:
        raise DigestMismatch(f"{remote.name}: sha256 is {told}, expected {wanted.sha256}")
    return remote, found, files


async def _check_model(wanted: _Wanted, remote: Remote, paths: Sequence[Path], hashes: FileHashes) -> None:
    """Raises BadModel when what arrived is no complete model, DigestMismatch when its parts are others than the stated ones."""
    try:
        header, _ = await asyncio.to_thread(read_headers, paths, remote.name)
    except BadModel as error:
        said = error.message
        for part, path in zip(remote.parts, paths, strict=True):
            said = said.replace(str(path), part.target.name, 1) if said.startswith(str(path)) else said
        raise BadModel(said) from error
    usable_shape(remote.name, header)
    if wanted.sha256 and len(paths) > 1 and (actual := await hashes.sha256(*paths)) != wanted.sha256:
        raise DigestMismatch(f"{remote.name}: sha256 of its {len(paths)} parts in a row is {actual}, expected {wanted.sha256}")


def _put(wanted: _Wanted, partials: Sequence[Partial], targets: Sequence[Path], digest: str) -> None:
    """Gives the complete files their names. The note comes first: a model without one is not taken for one."""
    try:
        wanted.directory.note(targets, [partial.path for partial in partials], wanted.source, digest, wanted.sha256)
        for partial, target in zip(partials, targets, strict=True):
            os.replace(partial.path, target)
        sync_directory(targets[0].parent)
    except OSError as error:
        raise no_disk(targets[0].parent, error) from error


def _from_store(stored: StoredModel, hashes: FileHashes) -> FetchedModel:
    if stored.sha256 and len(stored.files) == 1:
        hashes.remember(stored.path, stored.sha256)
    return FetchedModel(stored.path, stored.digest, stored.size_bytes)
