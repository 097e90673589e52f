"""Asks llama-fit-params what a model takes, where its header does not decide that."""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from .core.fit_params import arguments, total_mib
from .engine_binary import EngineNotFoundError, engine_argv

log = logging.getLogger(__name__)

TOOL: Final = "llama-fit-params"
TIMEOUT_S: Final = 10.0
"""It takes half a second for a model of 40 GiB: only the header is read."""


def find_tool(engine: str = "") -> Path | None:
    """Beside the llama-server that is used, else on PATH. `engine` is LLORCH_ENGINE."""
    try:
        argv, _ = engine_argv(engine)
    except EngineNotFoundError:
        argv = ()
    beside = Path(argv[0]).resolve().with_name(TOOL) if argv else None
    if beside is not None and os.access(beside, os.X_OK):
        return beside
    found = shutil.which(TOOL)
    return Path(found) if found else None


class FitParams:
    """The tool, looked for at every question: it may be installed under a running agent."""

    def __init__(self, engine: str = "") -> None:
        self._engine = engine
        self._one = asyncio.Lock()

    async def ask(self, model_path: str, *, slots: int, context_tokens: int, engine_args: Sequence[str]) -> int | None:
        """MiB over all devices with all layers on them; None without the tool, or where it does not know the model either."""
        tool = find_tool(self._engine)
        if tool is None:
            return None
        words = arguments(model_path, slots=slots, context_tokens=context_tokens, engine_args=engine_args)
        async with self._one:
            output = await _output(tool, words)
        mib = total_mib(output)
        log.info("%s: %s says %s MiB", model_path, TOOL, mib)
        return mib


async def _output(tool: Path, words: Sequence[str]) -> str:
    try:
        process = await asyncio.create_subprocess_exec(
            str(tool),
            *words,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
        )
    except OSError as error:
        log.warning("%s cannot be run: %s", tool, error.strerror)
        return ""
    try:
        async with asyncio.timeout(TIMEOUT_S):
            output, _ = await process.communicate()
    except TimeoutError:
        log.warning("%s did not end within %.0f s", tool, TIMEOUT_S)
        return ""
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode != 0:
        log.warning("%s ended with %d", tool, process.returncode)
        return ""
    return output.decode(errors="replace")
