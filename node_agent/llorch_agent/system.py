"""The machine around the devices: cores, memory and disk, as far as the agent's cgroup lets it have them. Linux only."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .core.readings import SystemReading

_MIB = 1 << 20
_UNLIMITED = 1 << 60
"""cgroup v1 writes "no limit" as the largest page-aligned 63-bit number."""


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes."""

    total: int
    free: int
    """What may still be used: page cache counts as free, the kernel gives it up."""


@dataclass(frozen=True, slots=True)
class Roots:
    """Where the kernel's files are; another place in tests."""

    proc: Path = Path("/proc")
    cgroup: Path = Path("/sys/fs/cgroup")


KERNEL = Roots()


def read_memory(roots: Roots = KERNEL) -> Memory:
    """Host memory, cut down to the tightest cgroup limit (v2 or v1) on the way to this process."""
    fields = _key_values(roots.proc / "meminfo")
    memory = Memory(fields.get("MemTotal:", 0) * 1024, fields.get("MemAvailable:", fields.get("MemFree:", 0)) * 1024)
    for limit, used in _cgroup_limits(roots):
        memory = Memory(min(memory.total, limit), max(0, min(memory.free, limit - used)))
    return memory


def read_cores(roots: Roots = KERNEL) -> int:
    """Cores the agent may use: its CPU affinity, cut down to the cgroup's quota, rounded up; at least 1."""
    cores = float(len(os.sched_getaffinity(0)))
    for quota, period in _cpu_quotas(roots):
        cores = min(cores, quota / period)
    return max(1, -int(-cores // 1))


def read_disk_free(path: Path) -> int:
    """MiB free for this user where `path` is or is going to be; 0 where that cannot be said."""
    for place in (path, *path.parents):
        try:
            stats = os.statvfs(place)
        except OSError:
            continue
        return stats.f_bavail * stats.f_frsize // _MIB
    return 0


def read_system(model_dir: Path, roots: Roots = KERNEL) -> SystemReading:
    """All of it, in MiB."""
    memory = read_memory(roots)
    return SystemReading(
        cpu_cores=read_cores(roots),
        memory_total=memory.total // _MIB,
        memory_free=memory.free // _MIB,
        disk_free=read_disk_free(model_dir),
    )


def process_memory(pid: int, roots: Roots = KERNEL) -> int:
    """MiB that process `pid` and its descendants hold and the kernel cannot give up: anonymous and shared memory.

    Mapped model files are left out: they are page cache, which counts as free, and so stay part of what is reserved.
    """
    total, queue, seen = 0, [pid], set[int]()
    while queue:
        each = queue.pop()
        if each in seen:
            continue
        seen.add(each)
        fields = _key_values(roots.proc / str(each) / "status")
        total += fields.get("RssAnon:", 0) + fields.get("RssShmem:", 0)
        queue.extend(_children(roots.proc / str(each) / "task"))
    return total // 1024


def _children(tasks: Path) -> Iterator[int]:
    try:
        threads = list(tasks.iterdir())
    except OSError:
        return
    for thread in threads:
        yield from (int(child) for child in _text(thread / "children").split())


def _cgroup_limits(roots: Roots) -> Iterator[tuple[int, int]]:
    """(limit, used without page cache) in bytes of every cgroup with a limit, from this process's upwards."""
    for directory in _directories(roots, ""):
        limit = _number(directory / "memory.max")
        if limit is not None:
            stat = _key_values(directory / "memory.stat")
            cache = stat.get("inactive_file", 0) + stat.get("active_file", 0)
            yield limit, max(0, (_number(directory / "memory.current") or 0) - cache)
    for directory in _directories(roots, "memory"):
        limit = _number(directory / "memory.limit_in_bytes")
        if limit is not None and limit < _UNLIMITED:
            stat = _key_values(directory / "memory.stat")
            cache = stat.get("total_inactive_file", 0) + stat.get("total_active_file", 0)
            yield limit, max(0, (_number(directory / "memory.usage_in_bytes") or 0) - cache)


def _cpu_quotas(roots: Roots) -> Iterator[tuple[int, int]]:
    for directory in _directories(roots, ""):
        words = _text(directory / "cpu.max").split()
        if len(words) == 2 and words[0].isdigit() and words[1].isdigit():
            yield int(words[0]), max(1, int(words[1]))
    for directory in _directories(roots, "cpu"):
        quota, period = _number(directory / "cpu.cfs_quota_us"), _number(directory / "cpu.cfs_period_us")
        if quota is not None and quota > 0 and period:
            yield quota, period


def _directories(roots: Roots, controller: str) -> Iterator[Path]:
    """The cgroup of this process and those above it. `controller` is empty for v2.

    In a container /proc/self/cgroup may name a path on the host that is not mounted here; then the mount's root is ours.
    """
    mount = roots.cgroup / controller if controller else roots.cgroup
    for line in _text(roots.proc / "self" / "cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controller in controllers.split(","):
            place = mount / path.lstrip("/")
            while place != mount:
                yield place
                place = place.parent
            yield mount
            return


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError):
        return ""


def _number(path: Path) -> int | None:
    text = _text(path).strip()
    return int(text) if text.lstrip("-").isdigit() else None


def _key_values(path: Path) -> dict[str, int]:
    """`name value [unit]` per line; other lines are left out."""
    found: dict[str, int] = {}
    for line in _text(path).splitlines():
        words = line.split()
        if len(words) >= 2 and words[1].isdigit():
            found[words[0]] = int(words[1])
    return found
