"""The file in which an agent keeps what its engines were seen to take: `.measured.json` in the model directory."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from llorch_model.core.measured import noted

from .handoff import write_atomically

log = logging.getLogger(__name__)

FILE: Final = ".measured.json"
STEP_MIB: Final = 64
"""Figures are rounded up to it: memory that breathes by a few MiB is no news."""
_MAX_BYTES: Final = 64 << 10


class Measurements:
    """MiB by measurement key, the newest last. A file that cannot be read or written costs what it would have remembered."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / FILE
        self._lock = asyncio.Lock()
        self.known: Mapping[str, int] = self._read()

    async def note(self, seen: Mapping[str, int]) -> bool:
        """Takes in what engines use now, MiB by key. True when that is more than was known."""
        async with self._lock:
            known = self.known
            for key, mib in seen.items():
                rounded = -(-mib // STEP_MIB) * STEP_MIB
                if rounded > known.get(key, 0):
                    known = noted(known, key, rounded)
            if known is self.known:
                return False
            self.known = known
            await asyncio.to_thread(self._write, known)
        return True

    def _read(self) -> dict[str, int]:
        try:
            if self._path.stat().st_size > _MAX_BYTES:
                raise ValueError("too large")
            content = json.loads(self._path.read_bytes())
            return {str(key): int(mib) for key, mib in content["mib"].items() if int(mib) > 0}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            log.warning("%s cannot be read, and is begun anew: %s", self._path, error)
            return {}

    def _write(self, known: Mapping[str, int]) -> None:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self._path, json.dumps({"mib": known}, indent=1).encode() + b"\n")
        except OSError as error:
            log.warning("%s cannot be written: %s", self._path, error.strerror or error)
