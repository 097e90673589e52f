"""Finds the engine: llama-server as configured, on PATH, or out of the xllamacpp wheel."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import shutil
import sys
from dataclasses import dataclass

from .core.engine_args import flags_in

HELP_TIMEOUT_S = 10.0


class EngineNotFoundError(Exception):
    """No engine, with one line that says how to get one."""


@dataclass(frozen=True, slots=True)
class EngineCommand:
    """How an engine is started."""

    argv: tuple[str, ...]
    """The program, and what goes before llama-server's own arguments."""
    flags: frozenset[str]
    """The flags it knows; empty when it would not say."""
    shim: bool = False
    """True for the xllamacpp wheel."""


def engine_argv(configured: str = "") -> tuple[tuple[str, ...], bool]:
    """The program to run and whether it is the xllamacpp shim. `configured` is LLORCH_ENGINE: a path or a name on PATH."""
    if configured:
        found = shutil.which(os.path.expanduser(configured))
        if found is None:
            raise EngineNotFoundError(f"LLORCH_ENGINE={configured} — must be an executable llama-server")
        return (os.path.abspath(found),), False
    if (found := shutil.which("llama-server")) is not None:
        return (os.path.abspath(found),), False
    if importlib.util.find_spec("xllamacpp") is not None:
        return (sys.executable, "-m", "llorch_agent.engine_shim"), True
    raise EngineNotFoundError(
        "no engine: put llama-server on PATH, set LLORCH_ENGINE to one (node_agent/build-engine.sh builds it), "
        "or `pip install xllamacpp`"
    )


async def find_engine(configured: str = "") -> EngineCommand:
    """The engine and the flags it knows. Raises EngineNotFoundError."""
    argv, shim = engine_argv(configured)
    if shim:
        from .engine_shim import FLAGS

        return EngineCommand(argv, FLAGS, shim=True)
    return EngineCommand(argv, flags_in(await _help(argv)))


async def _help(argv: tuple[str, ...]) -> str:
    try:
        process = await asyncio.create_subprocess_exec(
            *argv, "--help", stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
        )
    except OSError as error:
        raise EngineNotFoundError(f"{argv[0]} cannot be run: {error.strerror}") from error
    try:
        async with asyncio.timeout(HELP_TIMEOUT_S):
            output, _ = await process.communicate()
    except TimeoutError:
        return ""
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    return output.decode(errors="replace")
