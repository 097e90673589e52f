"""Kubernetes Events, posted in the background: an API server that is away never holds up the reconciler.

kopf posts events only from inside its handlers, and transitions are found outside of them.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import socket
from datetime import UTC, datetime
from typing import Any

from llorch_api import GPUNode, GPUPool
from llorch_store import StoreError
from llorch_store.kube_connection import KubeConnection

from .events import LoggedEvents

log = logging.getLogger("llorch.operator.events")

BACKLOG = 1000
"""Events that may wait; the newest are dropped beyond, with a warning."""
MAX_MESSAGE = 1024
"""What the API server takes, in characters."""
REPORTER = "llorch-operator"


class KubernetesEvents:
    """Events as `kubectl describe` shows them, and as log lines."""

    def __init__(self) -> None:
        self._log = LoggedEvents()
        self._waiting: asyncio.Queue[dict[str, Any]] = asyncio.Queue(BACKLOG)
        self._instance = os.environ.get("HOSTNAME") or socket.gethostname()

    def emit(self, about: GPUNode | GPUPool, *, warning: bool, reason: str, message: str) -> None:
        """Logs the event and queues it."""
        self._log.emit(about, warning=warning, reason=reason, message=message)
        try:
            self._waiting.put_nowait(self._event(about, warning, reason, message))
        except asyncio.QueueFull:
            log.warning("%d events wait already; one about %s is not posted", BACKLOG, about.metadata.name)

    async def run(self) -> None:
        """Posts what is queued until cancelled."""
        async with KubeConnection() as api:
            while True:
                event = await self._waiting.get()
                try:
                    await api.request("POST", f"/api/v1/namespaces/{event['metadata']['namespace']}/events", body=event)
                except StoreError as error:
                    log.warning("could not post an event: %s", error)

    def _event(self, about: GPUNode | GPUPool, warning: bool, reason: str, message: str) -> dict[str, Any]:
        now, meta = datetime.now(UTC), about.metadata
        moment = now.isoformat(timespec="seconds").replace("+00:00", "Z")
        subject = {"apiVersion": about.api_version, "kind": about.kind, "name": meta.name, "uid": meta.uid}
        return {
            "apiVersion": "v1",
            "kind": "Event",
            "metadata": {
                "name": f"{meta.name[:200]}.{now.timestamp():.0f}{secrets.token_hex(4)}",
                "namespace": meta.namespace or "default",
            },
            "involvedObject": {**subject, "namespace": meta.namespace} if meta.namespace else subject,
            "type": "Warning" if warning else "Normal",
            "reason": reason,
            "message": message if len(message) <= MAX_MESSAGE else f"{message[: MAX_MESSAGE - 1]}…",
            "action": reason,
            "firstTimestamp": moment,
            "lastTimestamp": moment,
            "eventTime": now.isoformat(timespec="microseconds").replace("+00:00", "Z"),
            "count": 1,
            "source": {"component": REPORTER},
            "reportingComponent": REPORTER,
            "reportingInstance": self._instance,
        }
