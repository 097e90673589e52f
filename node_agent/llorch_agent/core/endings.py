"""Why an engine ended, out of its exit status and the end of its log, in one line that a person can act on."""

from __future__ import annotations

import re
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

MAX_MESSAGE = 256
"""Characters; what a replica's status holds."""


class EndKind(StrEnum):
    """The kinds that are treated differently, or that people look for by name."""

    CLEAN = "clean"
    MISSING_MODEL = "missing_model"
    BAD_MODEL = "bad_model"
    BAD_ARGUMENT = "bad_argument"
    OUT_OF_MEMORY = "out_of_memory"
    CUDA = "cuda"
    PORT_TAKEN = "port_taken"
    KILLED = "killed"
    LOAD_TIMEOUT = "load_timeout"
    UNHEALTHY = "unhealthy"
    EXITED = "exited"


@dataclass(frozen=True, slots=True)
class Ending:
    """How one life of an engine ended."""

    kind: EndKind
    message: str


_PATTERNS: tuple[tuple[EndKind, re.Pattern[str]], ...] = (
    (EndKind.PORT_TAKEN, re.compile(r"couldn't bind|address already in use", re.I)),
    (
        EndKind.OUT_OF_MEMORY,
        re.compile(
            r"out of memory|cudamalloc failed|failed to allocate|unable to allocate|cannot allocate memory|std::bad_alloc"
            r"|not enough (memory|space)|erroroutofdevicememory",
            re.I,
        ),
    ),
    (EndKind.CUDA, re.compile(r"cuda error|cuda_error|cublas_status|no cuda-capable device|cuda driver version", re.I)),
    (EndKind.MISSING_MODEL, re.compile(r"(failed|unable|cannot|could not) (to )?open.*no such file or directory", re.I)),
    (
        EndKind.BAD_ARGUMENT,
        re.compile(r"invalid argument: -|error while handling argument|error: (unknown|invalid) argument", re.I),
    ),
    (
        EndKind.BAD_MODEL,
        re.compile(
            r"invalid magic|not within the file bounds|corrupted or incomplete|unknown (model )?architecture"
            r"|key not found in model|wrong shape|missing tensor|gguf_init_from|error loading model|failed to load model",
            re.I,
        ),
    ),
)

_PREFIX = re.compile(r"^\d[\d.]* [A-Z] +(?:(?:srv|cmn|cmd|slot|que|res|llama)\s+\S+?: +)?")
"""Time, level, and for the server's own lines component and function: `0.00.007.410 E srv    load_model: `."""

_NO_ERROR = re.compile(r"^\d[\d.]* [IWD] ")
"""Lines of lower levels: a cache entry that found no memory has ended nothing."""

_ERROR = re.compile(r"^\d[\d.]* E ")


def classify(status: int, log: Sequence[str], model_path: str) -> Ending:
    """The ending of an engine with exit status `status` (negative: killed by that signal) that wrote `log`.

    The first line that matches counts: what follows in the log are consequences.
    """
    if status == 0:
        return Ending(EndKind.CLEAN, "ended by itself with exit code 0")
    errors = [line for line in log if not _NO_ERROR.match(line)]
    for kind, pattern in _PATTERNS:
        line = next((line for line in errors if pattern.search(line)), None)
        if line is not None:
            return Ending(kind, _shorten(_explain(kind, _bare(line), model_path)))
    if status < 0 or status > 128:  # a wrapper script reports its child's signal as 128 + N
        return Ending(EndKind.KILLED, _signal_message(-status if status < 0 else status - 128))
    cause = next((line for line in errors if _ERROR.match(line)), None) or next(
        (line for line in reversed(errors) if line.strip()), ""
    )
    return Ending(EndKind.EXITED, _shorten(f"exited with code {status}" + (f": {_bare(cause)}" if cause else "")))


def _explain(kind: EndKind, line: str, model_path: str) -> str:
    match kind:
        case EndKind.MISSING_MODEL:
            return f"model file {model_path} is missing"
        case EndKind.BAD_MODEL:
            return f"{model_path} cannot be loaded: {line}"
        case EndKind.OUT_OF_MEMORY:
            return f"out of memory: {line}"
        case EndKind.CUDA:
            return line if line.lower().startswith("cuda") else f"CUDA error: {line}"
        case EndKind.PORT_TAKEN:
            return f"port taken: {line}"
        case _:
            return f"llama-server refused its arguments: {line}"


def _signal_message(number: int) -> str:
    try:
        name = signal.Signals(number).name
    except ValueError:
        return f"killed by signal {number}"
    hint = {
        "SIGKILL": ": by hand, or by the kernel's out-of-memory killer",
        "SIGILL": ": llama-server was built for another CPU",
    }.get(name, "")
    return f"killed by signal {number} ({name}){hint}"


def _bare(line: str) -> str:
    return _PREFIX.sub("", line.strip())


def _shorten(text: str) -> str:
    return text if len(text) <= MAX_MESSAGE else text[: MAX_MESSAGE - 1] + "…"
