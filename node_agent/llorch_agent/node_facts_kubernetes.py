"""The facts of a node from its Kubernetes Node object. Imported only with the Kubernetes store, whose package it needs."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from contextlib import AsyncExitStack
from typing import Final

from llorch_store import NotFound, StoreError
from llorch_store.kube_connection import KubeConnection

from .node_facts import KnownNode, facts_of

log = logging.getLogger(__name__)

TIMEOUT_S: Final = 5.0


class KubernetesFacts:
    """Reads one Node. A machine that is none of the cluster's has the labels of its settings."""

    def __init__(self, node: str, labels: Mapping[str, str]) -> None:
        self._node = node
        self._otherwise = KnownNode(facts_of(labels, unschedulable=False))
        self._connection: KubeConnection | None = None
        self._open = AsyncExitStack()
        self._said = ""

    async def read(self) -> KnownNode | None:
        """Labels, cordon and uid of the Node; None while the API server does not say."""
        try:
            async with asyncio.timeout(TIMEOUT_S):
                if self._connection is None:
                    self._connection = await self._open.enter_async_context(KubeConnection())
                node = await self._connection.request("GET", f"/api/v1/nodes/{self._node}")
        except NotFound:
            self._say(f"the cluster has no Node {self._node}; LLORCH_NODE_LABELS counts", logging.INFO)
            return self._otherwise
        except (StoreError, TimeoutError) as error:
            self._say(f"cannot read Node {self._node}: {error or 'no answer in time'}", logging.WARNING)
            return None
        self._said = ""
        meta, spec = node["metadata"], node.get("spec", {})
        facts = facts_of(meta.get("labels") or {}, unschedulable=bool(spec.get("unschedulable")))
        return KnownNode(facts, meta["uid"])

    async def close(self) -> None:
        """Closes the connections."""
        self._connection = None
        await self._open.aclose()

    def _say(self, text: str, level: int) -> None:
        if text != self._said:
            self._said = text
            log.log(level, "%s", text)
