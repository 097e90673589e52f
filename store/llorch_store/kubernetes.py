"""Objects in a Kubernetes API server."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, Self, TypeVar

from llorch_api import GROUP, VERSION, Resource

from .contract import Conflict, Event, Invalid, JsonObject, Key, Listing, NotFound, StoreError, key_of
from .core import backoff
from .core.answers import Expired
from .core.metadata import metadata_faults, name_fault
from .core.validation import name_of, readable, summary
from .kube_connection import REQUEST_SECONDS, KubeConnection
from .kube_versions import Versions
from .kube_watch import Reflector, Source, list_all
from .reading import Reader

R = TypeVar("R", bound=Resource)

_MERGE_PATCH = "application/merge-patch+json"
_APPLY_PATCH = "application/apply-patch+yaml"
"""Server-side apply. JSON is YAML."""


class KubernetesStore:
    """A Store in the cluster that `kubeconfig` (default: the environment) leads to; `async with KubernetesStore() as store`."""

    def __init__(self, kubeconfig: str | Path | None = None) -> None:
        self._connection = KubeConnection(kubeconfig)
        self._reader = Reader()
        self._versions = Versions()
        self._open = AsyncExitStack()

    async def __aenter__(self) -> Self:
        await self._open.enter_async_context(self._connection)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._open.aclose()

    async def get(self, kind: type[R], key: Key) -> R:
        """The object. Raises NotFound."""
        return readable(kind, await self._connection.request("GET", _object_path(kind, key)))

    async def list(self, kind: type[R], *, namespace: str | None = None) -> Listing[R]:
        """All objects of `kind`, of one namespace where given."""
        path = _path(kind, namespace)
        try:
            documents, version = await list_all(self._connection, path, {})
        except Expired:
            documents, version = await list_all(self._connection, path, {})
        items, _ = self._reader.read_all(kind, documents)
        return Listing(items, version)

    async def watch(
        self, kind: type[R], *, namespace: str | None = None, name: str | None = None
    ) -> AsyncGenerator[Event[R], None]:
        """All objects now, then their changes, for ever."""
        query = {"fieldSelector": f"metadata.name={name}"} if name else {}
        source = Source(self._connection, self._reader, self._versions, _path(kind, namespace), query)
        events = Reflector(kind, source).events()
        try:
            async for event in events:
                yield event
        finally:
            await events.aclose()

    async def apply(self, obj: R, *, field_manager: str) -> R:
        """Creates or updates metadata and spec to `obj`, by server-side apply with force. Raises Invalid."""
        kind, sent = type(obj), obj.to_json()
        if faults := [*metadata_faults(obj.metadata, namespaced=kind.NAMESPACED)]:
            raise Invalid(f"{name_of(kind, sent)}: {summary(faults)}")
        names = ("name", "namespace") if kind.NAMESPACED else ("name",)
        metadata = {
            name: sent["metadata"][name]
            for name in (*names, "labels", "annotations", "ownerReferences")
            if name in sent["metadata"]
        }
        body = {"apiVersion": f"{GROUP}/{VERSION}", "kind": kind.KIND, "metadata": metadata}
        if "spec" in sent:
            body["spec"] = sent["spec"]
        query = {"fieldManager": field_manager, "force": "true", "fieldValidation": "Strict"}
        path = _object_path(kind, key_of(obj))
        document = await self._connection.request("PATCH", path, query=query, body=body, content_type=_APPLY_PATCH)
        return readable(kind, document)

    async def patch(
        self, kind: type[R], key: Key, patch: JsonObject, *, field_manager: str, uid: str = "", resource_version: str = ""
    ) -> R:
        """JSON merge patch of metadata and spec. Raises NotFound, Conflict, Invalid."""
        body = {name: value for name, value in patch.items() if name != "status"}
        preconditions = {name: value for name, value in (("uid", uid), ("resourceVersion", resource_version)) if value}
        if preconditions:
            body["metadata"] = {**(patch.get("metadata") or {}), **preconditions}
        attempts = _Attempts()
        while True:
            try:
                return await self._merge(kind, key, "", body, field_manager)
            except (Conflict, Invalid) as error:
                # The server calls another uid either of them.
                await self._require_uid(kind, key, uid, error)
                if resource_version or isinstance(error, Invalid) or not await attempts.another():
                    raise

    async def patch_status(
        self, kind: type[R], key: Key, patch: JsonObject, *, field_manager: str, uid: str = "", resource_version: str = ""
    ) -> R:
        """JSON merge patch of the content of status. Raises NotFound, Conflict, Invalid."""
        attempts = _Attempts()
        while True:
            # A status write ignores the uid in its metadata, but not the version, and no other object ever has this version.
            version = resource_version or (await self._version_of(kind, key, uid) if uid else "")
            body = {"status": patch, **({"metadata": {"resourceVersion": version}} if version else {})}
            try:
                return await self._merge(kind, key, "/status", body, field_manager)
            except Conflict as error:
                self._versions.forget(kind, key)
                if resource_version:
                    await self._require_uid(kind, key, uid, error)
                    raise
                if not await attempts.another():
                    raise

    async def delete(self, kind: type[R], key: Key, *, uid: str = "") -> None:
        """Deletes the object. Raises NotFound, also when it has another uid."""
        body = {"kind": "DeleteOptions", "apiVersion": "v1", **({"preconditions": {"uid": uid}} if uid else {})}
        try:
            await self._connection.request("DELETE", _object_path(kind, key), body=body)
        except Conflict as error:
            await self._require_uid(kind, key, uid, error)
            raise
        self._versions.forget(kind, key)

    async def _merge(self, kind: type[R], key: Key, subresource: str, body: JsonObject, field_manager: str) -> R:
        path, query = _object_path(kind, key) + subresource, {"fieldManager": field_manager}
        document = await self._connection.request("PATCH", path, query=query, body=body, content_type=_MERGE_PATCH)
        self._versions.saw(kind, document)
        return readable(kind, document)

    async def _version_of(self, kind: type[Resource], key: Key, uid: str) -> str:
        """The version of the very object `uid`, as far as is known here. Raises NotFound."""
        known = self._versions.known(kind, key, uid)
        if not known:
            document = await self._connection.request("GET", _object_path(kind, key))
            self._versions.saw(kind, document)
            known = self._versions.known(kind, key, uid)
        if not known:
            raise _another(kind, key, uid)
        return known

    async def _require_uid(self, kind: type[Resource], key: Key, uid: str, error: StoreError) -> None:
        """Raises NotFound where the object has another uid than was meant: the server calls that a conflict, or invalid."""
        if not uid:
            return
        document: Any = await self._connection.request("GET", _object_path(kind, key))
        if document["metadata"]["uid"] != uid:
            raise _another(kind, key, uid) from error


def _another(kind: type[Resource], key: Key, uid: str) -> NotFound:
    return NotFound(f"{kind.KIND} {key} with uid {uid} not found: it was deleted and created anew")


class _Attempts:
    """Further attempts at a write without a version to meet: its conflict says that it lost its races on the server."""

    def __init__(self) -> None:
        self._deadline = asyncio.get_running_loop().time() + REQUEST_SECONDS
        self._failures = 0

    async def another(self) -> bool:
        """True after a wait, False where time is up."""
        if asyncio.get_running_loop().time() > self._deadline:
            return False
        self._failures += 1
        await asyncio.sleep(random.random() * backoff.delay(min(self._failures, 2), 0.0))
        return True


def _path(kind: type[Resource], namespace: str | None) -> str:
    base = f"/apis/{GROUP}/{VERSION}"
    return f"{base}/namespaces/{namespace}/{kind.PLURAL}" if namespace and kind.NAMESPACED else f"{base}/{kind.PLURAL}"


def _object_path(kind: type[Resource], key: Key) -> str:
    # A name that no object can have must not become another path.
    if name_fault(key.name) or (kind.NAMESPACED and name_fault(key.namespace)):
        raise NotFound(f"{kind.KIND} {key} not found")
    return f"{_path(kind, key.namespace)}/{key.name}"
