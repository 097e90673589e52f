"""Where on this machine models may lie: a pool's YAML must not make the agent read any file it likes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from llorch_model.core.errors import UnsupportedSource
from llorch_model.core.source import local_path


class ModelRoots:
    """Directories under which `file:` sources are allowed; none allows everything that can be read."""

    def __init__(self, roots: Sequence[Path] = ()) -> None:
        self._roots = tuple(os.path.realpath(root) for root in roots)
        self._shown = ", ".join(map(str, roots))

    def check(self, source: str) -> None:
        """Raises UnsupportedSource for a `file:` source outside, links followed. Other sources are not files of this machine."""
        path = local_path(source)
        if path is None or not self._roots:
            return
        real = os.path.realpath(path)
        if not any(os.path.commonpath([real, root]) == root for root in self._roots):
            raise UnsupportedSource(f"{path}: file: sources must be under {self._shown} on this node (LLORCH_MODEL_ROOTS)")
