"""What must be there before kopf starts: with scanning disabled it would stay blind for ever where the CRDs are missing."""

from __future__ import annotations

from llorch_api import GROUP, GPUNode, GPUPool
from llorch_store import NotFound, Store
from llorch_web.settings import StartError


async def require_crds(store: Store) -> None:
    """Ends the process with exit code 2 and the command that helps, when a CRD is not installed."""
    for kind in (GPUNode, GPUPool):
        try:
            await store.list(kind)
        except NotFound as error:
            name = f"{kind.PLURAL}.{GROUP}"
            raise StartError(f"the CRD {name} is not installed — kubectl apply -f crds/{kind.PLURAL}.yaml") from error
