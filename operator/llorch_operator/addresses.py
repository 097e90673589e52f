"""The addresses of the agents' pods. A replica's URL is built from its pod's IP, never from what an agent claims."""

from __future__ import annotations

import asyncio
import logging

from kubernetes.aio import client
from kubernetes.aio.client import ApiException

from .fleet import Fleet

log = logging.getLogger("llorch.operator.addresses")

LOOK_SECONDS = 2.0
REFRESH_SECONDS = 60.0


def _is_going(pod: client.V1Pod) -> bool:
    return pod.metadata is not None and pod.metadata.deletion_timestamp is not None


class AgentPods:
    """Lists the agents' pods when an agent started anew, and every minute: a pod's IP does not change while it lives."""

    def __init__(self, fleet: Fleet, namespace: str, selector: str) -> None:
        self._fleet = fleet
        self._namespace = namespace
        self._selector = selector
        self._known_boots: dict[str, str] = {}

    async def run(self) -> None:
        """Keeps the fleet's addresses true until cancelled."""
        loop = asyncio.get_running_loop()
        refreshed = float("-inf")
        async with client.ApiClient() as api:
            pods = client.CoreV1Api(api)
            while True:
                boots = {name: node.status.agent.boot_id for name, node in self._fleet.nodes.items()}
                stale = boots != self._known_boots or loop.time() - refreshed > REFRESH_SECONDS
                if stale and await self._refresh(pods):
                    self._known_boots, refreshed = boots, loop.time()
                await asyncio.sleep(LOOK_SECONDS if boots == self._known_boots else 0.5)

    async def _refresh(self, pods: client.CoreV1Api) -> bool:
        try:
            found = await pods.list_namespaced_pod(self._namespace, label_selector=self._selector, _request_timeout=10)
        except (ApiException, OSError, TimeoutError) as error:
            log.warning("could not list the agents' pods: %s", error)
            return False
        self._fleet.observe_hosts(
            {
                pod.spec.node_name: pod.status.pod_ip
                for pod in found.items
                if pod.spec and pod.spec.node_name and pod.status and pod.status.pod_ip and not _is_going(pod)
            }
        )
        return True
