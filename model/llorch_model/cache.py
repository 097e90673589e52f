"""Room for models: what the cache may take, which models go when it is full, and what broken downloads leave behind."""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from .core.errors import NoDisk
from .core.identity import MODEL_SUFFIX, PARTIAL_SUFFIX
from .core.shape import MIB
from .model_directory import NOTE_SUFFIX, ModelDirectory, StoredModel, no_disk, note_path

log = logging.getLogger(__name__)

SETTING = "LLORCH_MODEL_CACHE_MIB"
STALE_SECONDS = 7 * 86_400.0
"""A partial file that nobody went on with for that long belongs to a model that nobody wants any more."""
EVICTED_SUFFIX = ".evicted"
_OUTSTANDING: dict[Path, int] = {}
"""Bytes that each running download of this process will have taken in the end, by its partial file."""


def _nothing() -> frozenset[str]:
    return frozenset()


@dataclass(frozen=True, slots=True)
class CachePolicy:
    """How much may be kept, and what must be."""

    limit_mib: int = 0
    """0: no limit but the disk's head-room."""
    held: Callable[[], frozenset[str]] = _nothing
    """Names what replicas of this node run or are about to run: digests, sources or paths."""


UNLIMITED = CachePolicy()


def is_held(stored: StoredModel, held: frozenset[str]) -> bool:
    """True for a model that must stay."""
    return not held.isdisjoint((stored.digest, stored.source, str(stored.path)))


def held_first(directory: ModelDirectory, held: frozenset[str]) -> list[StoredModel]:
    """All models: those in use, then those that were used last."""
    return sorted(directory, key=lambda each: not is_held(each, held))


@contextmanager
def expecting(partials: Mapping[Path, int]) -> Iterator[None]:
    """While a download runs: other downloads must not count on the room that it has yet to take. Entered before `make_room`."""
    _OUTSTANDING.update(partials)
    try:
        yield
    finally:
        for path in partials:
            _OUTSTANDING.pop(path, None)


async def make_room(
    directory: ModelDirectory, partials: Mapping[Path, int], headroom_bytes: int, policy: CachePolicy = UNLIMITED
) -> None:
    """Sees to it that `partials` can grow to the sizes given, within the policy and with head-room to spare.

    Models that were not used for longest go first, those in use never. Raises NoDisk when that is not enough; then nothing goes.
    """
    where = directory.directory
    try:
        free = free_bytes(where)
    except OSError as error:
        raise no_disk(where, error) from error
    needed_bytes = _missing(partials)
    promised = _missing({path: total for path, total in _OUTSTANDING.items() if path.parent == where and path not in partials})
    lacking = needed_bytes + promised + headroom_bytes - free
    over = 0
    if policy.limit_mib:
        over = taken_bytes(where) + promised + needed_bytes - policy.limit_mib * MIB
    victims = _victims(directory, max(lacking, over), policy)
    freed = sum(each.size_bytes for each in victims)
    if over > freed:
        raise NoDisk(
            f"{where}: needs {_mib(needed_bytes):,} MiB, and {SETTING}={policy.limit_mib} leaves "
            f"{max(0, _mib(needed_bytes + freed - over)):,} beside the models in use"
        )
    if lacking > freed:
        raise NoDisk(
            f"{where}: needs {_mib(needed_bytes):,} MiB and {headroom_bytes // MIB:,} MiB to spare, "
            f"{(free - promised + freed) // MIB:,} MiB are free"
        )
    await _evict(directory, victims)


def _missing(partials: Mapping[Path, int]) -> int:
    return sum(max(0, total - _size(path)) for path, total in partials.items())


def _victims(directory: ModelDirectory, wanted_bytes: int, policy: CachePolicy) -> list[StoredModel]:
    """The models to evict so that `wanted_bytes` come free, or all that may go."""
    victims: list[StoredModel] = []
    if wanted_bytes <= 0:
        return victims
    stored, held = list(directory), policy.held()
    for each in stored:
        if is_held(each, held):
            # Its last use is now, not when its replica was started.
            directory.use(each)
    for each in reversed(stored):
        if wanted_bytes <= 0:
            break
        if not is_held(each, held):
            victims.append(each)
            wanted_bytes -= each.size_bytes
    return victims


async def _evict(directory: ModelDirectory, victims: list[StoredModel]) -> None:
    """Renamed at once, so that nobody finds them any more; deleted in a thread, since large files take their time."""
    renamed: list[Path] = []
    for each in victims:
        log.info("evicted %s, %d MiB, last used %.1f h ago", each.path, each.size_mib, (time.time() - each.used_ns / 1e9) / 3600)
        try:
            note_path(each.path).unlink(missing_ok=True)
            for file in each.files:
                gone = file.with_name(f".{secrets.token_hex(8)}{EVICTED_SUFFIX}")
                os.rename(file, gone)
                renamed.append(gone)
        except FileNotFoundError:
            continue
        except OSError as error:
            raise no_disk(directory.directory, error) from error
    if renamed:
        await asyncio.to_thread(_delete, renamed)


def room_bytes(directory: ModelDirectory, free: int, policy: CachePolicy) -> int:
    """What a new model may take, with `free` bytes on the disk: eviction counts, and so does the limit."""
    held = policy.held()
    evictable = sum(each.size_bytes for each in directory if not is_held(each, held))
    room = free + evictable
    if policy.limit_mib:
        room = min(room, max(0, policy.limit_mib * MIB - taken_bytes(directory.directory) + evictable))
    return room


def taken_bytes(directory: Path) -> int:
    """What models, parts and partial files take."""
    try:
        names = [name for name in os.listdir(directory) if name.endswith((MODEL_SUFFIX, PARTIAL_SUFFIX))]
    except OSError:
        return 0
    return sum(_size(directory / name) for name in names)


def free_bytes(directory: Path) -> int:
    """Free space of its file system. Raises OSError."""
    return shutil.disk_usage(directory).free


def clear_stale(directory: Path, now: float | None = None, stale_seconds: float = STALE_SECONDS) -> list[Path]:
    """Deletes what broken downloads left: partial files that nobody writes and that are old, evicted files, notes and
    temporary files of models that are gone. Returns them. Blocks."""
    now = time.time() if now is None else now
    cleared: list[Path] = []
    try:
        names = os.listdir(directory)
    except OSError:
        return cleared
    for name in names:
        path = directory / name
        old = now - _mtime(path, now) > stale_seconds
        match _kind(path):
            case "evicted":
                gone = True
            case "partial":
                gone = old and _unlocked(path)
            case "orphan":
                gone = old
            case _:
                continue
        if gone:
            path.unlink(missing_ok=True)
            cleared.append(path)
    return cleared


def _kind(path: Path) -> str:
    if path.name.startswith(".") and path.name.endswith(EVICTED_SUFFIX):
        return "evicted"
    if path.name.endswith(PARTIAL_SUFFIX):
        return "partial"
    temporary = path.name.startswith(".") and MODEL_SUFFIX in path.name
    note = path.name.endswith(MODEL_SUFFIX + NOTE_SUFFIX) and not path.with_name(path.name.removesuffix(NOTE_SUFFIX)).exists()
    return "orphan" if temporary or note else ""


def _unlocked(path: Path) -> bool:
    """True when no process writes it."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return True


def _delete(paths: list[Path]) -> None:
    for path in paths:
        path.unlink(missing_ok=True)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _mtime(path: Path, default: float) -> float:
    try:
        return path.lstat().st_mtime
    except OSError:
        return default


def _mib(size_bytes: int) -> int:
    return -(-size_bytes // MIB)
