"""Processes as /proc shows them: who is whose, and who is still the same."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .core.engine_args import RUN_TOKEN

_PROC = Path("/proc")


@dataclass(frozen=True, slots=True)
class ProcessStat:
    """A line of /proc/<pid>/stat, as far as it is needed."""

    pid: int
    state: str
    group: int
    session: int
    started: int
    """Clock ticks from boot to its start: pid and this together are never used twice within one boot."""

    @property
    def alive(self) -> bool:
        """False for a zombie: it holds no memory and no port any more."""
        return self.state not in ("Z", "X")


def boot_id() -> str:
    """Changes with every boot of the machine."""
    return (_PROC / "sys/kernel/random/boot_id").read_text().strip()


def pid_namespace() -> str:
    """Changes from container to container: the same pid is another process there."""
    return os.readlink(_PROC / "self/ns/pid")


def stat_of(pid: int) -> ProcessStat | None:
    """The process of that id, or None."""
    try:
        text = (_PROC / str(pid) / "stat").read_text(errors="replace")
    except OSError:
        return None
    # The second field is the program's name in parentheses, and may hold anything.
    fields = text[text.rindex(")") + 2 :].split()
    return ProcessStat(pid, fields[0], int(fields[2]), int(fields[3]), int(fields[19]))


def all_processes() -> Iterator[ProcessStat]:
    """Every process that this one can see."""
    for name in os.listdir(_PROC):
        if name.isdigit() and (found := stat_of(int(name))) is not None:
            yield found


def carries(pid: int, token: str) -> bool:
    """True when the process was started with that run token in its environment."""
    try:
        environment = (_PROC / str(pid) / "environ").read_bytes()
    except OSError:
        return False
    return f"{RUN_TOKEN}={token}".encode() in environment.split(b"\0")


def writes_to(pid: int, log: str) -> bool:
    """True when its output goes to that file, or to what the file was before it was rotated."""
    for descriptor in (1, 2):
        try:
            if os.readlink(_PROC / str(pid) / "fd" / str(descriptor)).startswith(log):
                return True
        except OSError:
            continue
    return False


def descendants(token: str, group: int, log: str) -> list[int]:
    """Living processes of one engine: those that carry its token, and where a wrapper cleaned the environment, those of its
    group that write its log. The group alone would not do: its number may be somebody else's by now."""
    return [
        process.pid
        for process in all_processes()
        if process.alive
        and process.pid != os.getpid()
        and (carries(process.pid, token) or (group != 0 and process.group == group and writes_to(process.pid, log)))
    ]
