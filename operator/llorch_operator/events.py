"""Events on transitions, and never on a heartbeat: `kubectl describe` shows them; at home they are log lines."""

from __future__ import annotations

import logging
from typing import Protocol

from llorch_api import GPUNode, GPUPool

log = logging.getLogger("llorch.operator.events")


class Events(Protocol):
    """Where events go. Must not block."""

    def emit(self, about: GPUNode | GPUPool, *, warning: bool, reason: str, message: str) -> None:
        """Tells of one transition."""
        ...


class LoggedEvents:
    """Events as log lines, for where there is no Kubernetes."""

    def emit(self, about: GPUNode | GPUPool, *, warning: bool, reason: str, message: str) -> None:
        """Logs the event."""
        level = logging.WARNING if warning else logging.INFO
        log.log(level, "%s: %s", reason, message, extra={"kind": about.kind, "object": about.metadata.name})
