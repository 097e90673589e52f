"""The addresses of the agents' pods. A replica's URL is built from its pod's IP, never from what an agent claims."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from llorch_store import StoreError
from llorch_store.kube_connection import KubeConnection

from .fleet import Fleet

log = logging.getLogger("llorch.operator.addresses")

LOOK_SECONDS = 2.0
REFRESH_SECONDS = 60.0


def hosts_of(pods: list[dict[str, Any]]) -> dict[str, str]:
    """Pod IP by node name. A pod that is going is passed over: its successor on the same node counts."""
    hosts: dict[str, str] = {}
    for pod in pods:
        node, address = pod.get("spec", {}).get("nodeName"), pod.get("status", {}).get("podIP")
        if node and address and "deletionTimestamp" not in pod.get("metadata", {}):
            hosts[node] = address
    return hosts


class AgentPods:
    """Lists the agents' pods when an agent started anew, and every minute: a pod's IP does not change while it lives."""

    def __init__(self, fleet: Fleet, namespace: str, selector: str) -> None:
        self._fleet = fleet
        self._path = f"/api/v1/namespaces/{namespace}/pods"
        self._query = {"labelSelector": selector}
        self._known_boots: dict[str, str] = {}

    async def run(self) -> None:
        """Keeps the fleet's addresses true until cancelled."""
        loop = asyncio.get_running_loop()
        refreshed = float("-inf")
        async with KubeConnection() as api:
            while True:
                boots = {name: node.status.agent.boot_id for name, node in self._fleet.nodes.items()}
                stale = boots != self._known_boots or loop.time() - refreshed > REFRESH_SECONDS
                if stale and await self._refresh(api):
                    self._known_boots, refreshed = boots, loop.time()
                await asyncio.sleep(LOOK_SECONDS if boots == self._known_boots else 0.5)

    async def _refresh(self, api: KubeConnection) -> bool:
        try:
            found = await api.request("GET", self._path, query=self._query)
        except StoreError as error:
            log.warning("could not list the agents' pods: %s", error)
            return False
        self._fleet.observe_hosts(hosts_of(found["items"]))
        return True
