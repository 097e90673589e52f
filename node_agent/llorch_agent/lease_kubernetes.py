"""The node's Lease in the API server, for heartbeats that leave the status alone. Imported only with the Kubernetes store."""

from __future__ import annotations

from contextlib import AsyncExitStack
from datetime import UTC, datetime
from typing import Any, Final

from llorch_api import OwnerReference
from llorch_store import Conflict, NotFound
from llorch_store.kube_connection import KubeConnection

LABEL: Final = "llorch.dev/heartbeat"
"""By this label the operator finds the Leases that are heartbeats."""
FIELD_MANAGER: Final = "llorch-agent"


class NodeLease:
    """One Lease, of the node's name. It is deleted with its Kubernetes Node, where that is known."""

    def __init__(self, node: str, namespace: str, interval_s: float) -> None:
        self._node = node
        self._collection = f"/apis/coordination.k8s.io/v1/namespaces/{namespace}/leases"
        self._duration = max(1, round(3 * interval_s))
        self._connection: KubeConnection | None = None
        self._open = AsyncExitStack()

    async def renew(self, owner: OwnerReference | None) -> None:
        """Renews it, and makes it where it is gone. Raises StoreError."""
        if self._connection is None:
            self._connection = await self._open.enter_async_context(KubeConnection())
        moment = datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
        query = {"fieldManager": FIELD_MANAGER}
        try:
            await self._connection.request(
                "PATCH",
                f"{self._collection}/{self._node}",
                query=query,
                body={"spec": {"renewTime": moment}},
                content_type="application/merge-patch+json",
            )
        except NotFound:
            try:
                await self._connection.request("POST", self._collection, query=query, body=self._document(owner, moment))
            except Conflict:  # it is there after all; the next beat renews it
                return

    async def close(self) -> None:
        """Closes the connections."""
        self._connection = None
        await self._open.aclose()

    def _document(self, owner: OwnerReference | None, moment: str) -> dict[str, Any]:
        meta: dict[str, Any] = {"name": self._node, "labels": {LABEL: "node"}}
        if owner is not None:
            meta["ownerReferences"] = [
                {"apiVersion": owner.api_version, "kind": owner.kind, "name": owner.name, "uid": owner.uid}
            ]
        spec = {"holderIdentity": self._node, "leaseDurationSeconds": self._duration, "renewTime": moment}
        return {"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": meta, "spec": spec}
