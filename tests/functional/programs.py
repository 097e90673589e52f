"""Components as processes under test: started, ended, and their logs shown when a test fails."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

OURS = ("POOL_MANAGERD_", "ORCHESTRATORD_", "KUBE", "LLORCH_")


def free_port() -> int:
    """A port of loopback that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def clean_environment(**more: str) -> dict[str, str]:
    """This process's environment without any setting of ours but the engine, and `more`."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(OURS) or key == "LLORCH_ENGINE"}
    return {**kept, **more}


@contextmanager
def program(
    command: Sequence[str | Path], *, cwd: Path, log: str, environment: Mapping[str, str]
) -> Iterator[subprocess.Popen[bytes]]:
    """`command` until the block ends: asked to stop (woken first, if frozen), killed after 15 s. Its log is appended to `log`."""
    with (cwd / log).open("ab") as out:
        child = subprocess.Popen(command, cwd=cwd, env=environment, stdout=out, stderr=out)
        try:
            yield child
        finally:
            if child.poll() is None:
                child.send_signal(signal.SIGCONT)
                child.terminate()
            try:
                child.wait(15)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
            print(f"--- {log}\n{(cwd / log).read_text()[-6000:]}")


def until(check: Callable[[], Any], seconds: float = 30.0) -> Any:
    """The first true value of `check`, asked every 0.1 s."""
    end = time.monotonic() + seconds
    while not (value := check()):
        assert time.monotonic() < end, f"not within {seconds} s"
        time.sleep(0.1)
    return value
