"""The facts of a node from its Kubernetes Node object. Imported only in the cluster: it needs the kubernetes package."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import aiohttp
from kubernetes.aio import client, config

from .node_facts import KnownNode, facts_of

log = logging.getLogger(__name__)

TIMEOUT_S = 5.0


class KubernetesFacts:
    """Reads one Node with the pod's service account."""

    def __init__(self, node: str) -> None:
        self._node = node
        self._api: Any = None
        self._said = ""

    async def read(self) -> KnownNode | None:
        """Labels, cordon and uid of the Node; None while the API server does not say."""
        try:
            async with asyncio.timeout(TIMEOUT_S):
                node = await self._core().read_node(self._node)
        except (client.ApiException, config.ConfigException, aiohttp.ClientError, TimeoutError) as error:
            self._say(f"cannot read Node {self._node}: {getattr(error, 'reason', None) or error or type(error).__name__}")
            return None
        self._say("")
        facts = facts_of(node.metadata.labels or {}, unschedulable=bool(node.spec.unschedulable))
        return KnownNode(facts, node.metadata.uid)

    async def close(self) -> None:
        """Closes the connections."""
        if self._api is not None:
            await self._api.close()
            self._api = None

    def _core(self) -> Any:
        if self._api is None:
            config.load_incluster_config()  # type: ignore[no-untyped-call]
            self._api = client.ApiClient()
        return client.CoreV1Api(self._api)

    def _say(self, text: str) -> None:
        if text and text != self._said:
            log.warning("%s", text)
        self._said = text
