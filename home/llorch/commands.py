"""apply, get and delete: the same YAML as kubectl, on whatever store LLORCH_STORE names."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import yaml

from llorch_api import GPUNode, GPUPool
from llorch_store import Invalid, Key, NotFound, Store
from llorch_store.core.validation import parse

from .manifests import KINDS, ManifestError, resource_name
from .table import layout, rows

FIELD_MANAGER = "llorch-cli"


def parse_manifest(where: str, document: dict[str, Any], namespace: str) -> GPUNode | GPUPool:
    """The object of a manifest. Raises ManifestError with one line that names each field that is wrong."""
    kind = KINDS[document["kind"]]
    if kind.NAMESPACED:
        document = {**document, "metadata": {"namespace": namespace, **document["metadata"]}}
    try:
        return parse(kind, document)
    except Invalid as error:
        raise ManifestError(f"{where}: {error}") from None


async def apply(store: Store, objects: Sequence[GPUNode | GPUPool]) -> list[str]:
    """Applies objects in order and says what happened to each. Raises StoreError at the first that is refused."""
    said = []
    for item in objects:
        before = await _existing(store, item)
        after = await store.apply(item, field_manager=FIELD_MANAGER)
        verb = "created"
        if before is not None:
            verb = "unchanged" if after.metadata.resource_version == before.metadata.resource_version else "configured"
        said.append(f"{resource_name(type(item))}/{item.metadata.name} {verb}")
    return said


async def _existing(store: Store, item: GPUNode | GPUPool) -> GPUNode | GPUPool | None:
    key = Key(item.metadata.namespace if item.NAMESPACED else "", item.metadata.name)
    try:
        return await store.get(type(item), key)
    except NotFound:
        return None


async def get(store: Store, kind: type[GPUNode] | type[GPUPool], names: Sequence[str], namespace: str | None, output: str) -> str:
    """A table, or YAML, JSON or names."""
    found: list[GPUNode | GPUPool] = []
    if names:
        space = (namespace or "default") if kind.NAMESPACED else ""
        found = [await store.get(kind, Key(space, name)) for name in names]
    else:
        listing = await store.list(kind, namespace=namespace if kind.NAMESPACED else None)
        found = sorted(listing.items, key=lambda item: (item.metadata.namespace, item.metadata.name))
    if output in ("yaml", "json"):
        documents = [{"apiVersion": item.api_version, "kind": item.kind, **item.to_json()} for item in found]
        whole: Any = documents[0] if names and len(documents) == 1 else {"apiVersion": "v1", "kind": "List", "items": documents}
        return (
            json.dumps(whole, indent=2)
            if output == "json"
            else yaml.safe_dump(whole, sort_keys=False, allow_unicode=True).rstrip()
        )
    if output == "name":
        return "\n".join(f"{resource_name(kind)}/{item.metadata.name}" for item in found)
    return layout(rows(found, wide=output == "wide")) if found else f"No {kind.PLURAL} found."


async def delete(store: Store, kind: type[GPUNode] | type[GPUPool], names: Sequence[str], namespace: str) -> list[str]:
    """Deletes objects and says so. Raises NotFound."""
    said = []
    for name in names:
        await store.delete(kind, Key(namespace if kind.NAMESPACED else "", name))
        said.append(f'{resource_name(kind)} "{name}" deleted')
    return said
