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

from kubernetes.aio import client
from kubernetes.aio.client import ApiException

from llorch_api import GPUNode, GPUPool

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
        self._waiting: asyncio.Queue[client.CoreV1Event] = asyncio.Queue(BACKLOG)
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
        async with client.ApiClient() as api:
            core = client.CoreV1Api(api)
            while True:
                event = await self._waiting.get()
                try:
                    await core.create_namespaced_event(event.metadata.namespace or "default", event, _request_timeout=10)
                except (ApiException, OSError, TimeoutError) as error:
                    log.warning("could not post an event: %s", getattr(error, "reason", None) or error)

    def _event(self, about: GPUNode | GPUPool, warning: bool, reason: str, message: str) -> client.CoreV1Event:
        now, meta = datetime.now(UTC), about.metadata
        return client.CoreV1Event(
            metadata=client.V1ObjectMeta(
                name=f"{meta.name[:200]}.{now.timestamp():.0f}{secrets.token_hex(4)}", namespace=meta.namespace or "default"
            ),
            involved_object=client.V1ObjectReference(
                api_version=about.api_version, kind=about.kind, name=meta.name, namespace=meta.namespace or None, uid=meta.uid
            ),
            type="Warning" if warning else "Normal",
            reason=reason,
            message=message if len(message) <= MAX_MESSAGE else f"{message[: MAX_MESSAGE - 1]}…",
            action=reason,
            first_timestamp=now,
            last_timestamp=now,
            event_time=now,
            count=1,
            source=client.V1EventSource(component=REPORTER),
            reporting_component=REPORTER,
            reporting_instance=self._instance,
        )
