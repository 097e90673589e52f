"""What must be there before kopf starts: with scanning disabled it would stay blind for ever where the CRDs are missing."""

from __future__ import annotations

import sys

from llorch_api import GROUP, GPUNode, GPUPool
from llorch_store import NotFound, Store


async def require_crds(store: Store) -> None:
    """Ends the process with exit code 2 and the command that helps, when a CRD is not installed."""
    for kind in (GPUNode, GPUPool):
        try:
            await store.list(kind)
        except NotFound as error:
            name = f"{kind.PLURAL}.{GROUP}"
            print(f"llorch: the CRD {name} is not installed — kubectl apply -f crds/{kind.PLURAL}.yaml", file=sys.stderr)
            raise SystemExit(2) from error
