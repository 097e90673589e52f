"""Handoff files: what one says, how the agent writes its own, and what changed in a directory of them.

A file with `url` describes an engine that runs already; one with `model` and no `url` asks for an engine. Anything else is
ignored, for a reason that a person can act on. Fields that are not named here are ignored, so every producer may add its own.
"""

from __future__ import annotations

import ipaddress
import json
import posixpath
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any
from urllib.parse import urlsplit

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, ValidationError

from llorch_api import Assignment, ReplicaOrigin
from llorch_model.core.measured import measurement_key
from llorch_model.core.vram import estimate, memory_settings, tensor_split

from .engine_args import CPU_DEVICE, refused_by_agent

MAX_BYTES = 64 * 1024
"""Larger files are not read: a handoff has a few hundred bytes."""

DEFAULT_POOL = "default"
DEFAULT_REPLICA = "r0"
DEFAULT_CONTEXT_TOKENS = 4096
DEFAULT_DRAIN_DEADLINE_S = 120

_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
_MASK = re.compile(r"[A-Za-z0-9,._-]{1,512}")


@dataclass(frozen=True, slots=True)
class Adopt:
    """An engine that somebody else started."""

    pool: str
    replica: str
    url: str
    """`http://HOST:PORT`, without a path."""
    slots: int | None = None
    """As the file says; None lets the engine say."""
    engine: str = ""
    engine_version: str = ""
    device_mask: str = ""
    pid: int = 0
    model_path: str = ""
    revision: str = ""

    @property
    def id(self) -> str:
        """The replica's id on this node."""
        return local_id(self.pool, self.replica)


@dataclass(frozen=True, slots=True)
class Launch:
    """An engine that the agent is to start and keep running."""

    pool: str
    replica: str
    model_path: str
    origin: ReplicaOrigin = ReplicaOrigin.LAUNCHED
    digest: str = ""
    aliases: tuple[str, ...] = ()
    """Other names that the gateway serves it under."""
    slots: int = 1
    context_tokens: int = DEFAULT_CONTEXT_TOKENS
    """Of each slot."""
    engine_args: tuple[str, ...] = ()
    devices: tuple[tuple[str, int], ...] = ()
    """(UUID, MiB promised on it), in the order that the engine is to see them; empty leaves the choice to the engine."""
    tensor_split: tuple[int, ...] = ()
    """How weights and KV cache go over the GPUs of `devices`; empty: as the memory promised on each."""
    device_mask: str = ""
    """CUDA_VISIBLE_DEVICES as a person wrote it; used where `devices` is empty."""
    namespace: str = ""
    revision: str = ""
    drain_deadline_s: int = DEFAULT_DRAIN_DEADLINE_S

    @property
    def id(self) -> str:
        """The replica's id on this node; an assigned one keeps the operator's, which is unique everywhere."""
        return self.replica if self.origin is ReplicaOrigin.ASSIGNED else local_id(self.pool, self.replica)

    @property
    def gpus(self) -> tuple[tuple[str, int], ...]:
        """`devices` without the machine's own memory."""
        return tuple(each for each in self.devices if not each[0].startswith(CPU_DEVICE))

    @property
    def memory_key(self) -> str:
        """Under which what it takes on its GPUs is remembered; empty where nobody could compare it with another engine."""
        if not self.digest or not self.gpus:
            return ""
        return measurement_key(
            self.digest,
            slots=self.slots,
            context_tokens=self.context_tokens,
            engine_args=self.engine_args,
            devices=len(self.gpus),
        )


@dataclass(frozen=True, slots=True)
class Ignore:
    """Not for the agent, or not acceptable."""

    reason: str


@dataclass(frozen=True, slots=True)
class Partial:
    """Not JSON yet: its producer may still be writing. Read it again."""

    reason: str


Entry = Adopt | Launch | Ignore | Partial


@dataclass(frozen=True, slots=True)
class UrlPolicy:
    """Which hosts an engine may be adopted on, beside loopback."""

    own_addresses: frozenset[str] = frozenset()
    """The node's own IP addresses and host names."""
    any_host: bool = False


LOOPBACK_ONLY = UrlPolicy()


class _Model(BaseModel):
    model_config = ConfigDict(extra="ignore", coerce_numbers_to_str=True)

    path: Annotated[str, Field(max_length=4096)] = ""
    id: Annotated[str, Field(max_length=256)] = ""
    digest: Annotated[str, Field(max_length=80)] = ""
    aliases: Annotated[list[Annotated[str, Field(max_length=64)]], Field(max_length=16)] = []


class _Document(BaseModel):
    model_config = ConfigDict(extra="ignore", coerce_numbers_to_str=True)

    pool_id: str | None = None
    replica_id: str | None = None
    origin: ReplicaOrigin = ReplicaOrigin.LAUNCHED
    engine: Annotated[str, Field(max_length=64)] = ""
    engine_version: Annotated[str, Field(max_length=128)] = ""
    url: Annotated[str | None, Field(max_length=256)] = None
    pid: Annotated[int, Field(ge=0)] = 0
    device_mask: Annotated[str | None, Field(max_length=512)] = None
    slots: Annotated[int | None, Field(ge=1, le=4096, validation_alias=AliasChoices("slots", "slots_total"))] = None
    model: _Model | str | None = None
    context_tokens: Annotated[int, Field(ge=1, le=1 << 22)] = DEFAULT_CONTEXT_TOKENS
    engine_args: Annotated[list[Annotated[str, Field(max_length=256)]], Field(max_length=80)] = []
    devices: Annotated[dict[Annotated[str, Field(max_length=96)], Annotated[int, Field(ge=0)]], Field(max_length=16)] = {}
    tensor_split: Annotated[list[Annotated[int, Field(ge=1)]], Field(max_length=16)] = []
    namespace: Annotated[str, Field(max_length=63)] = ""
    revision: Annotated[str, Field(max_length=64)] = ""
    drain_deadline_seconds: Annotated[int, Field(ge=0, le=86_400)] = DEFAULT_DRAIN_DEADLINE_S


def local_id(pool: str, replica: str) -> str:
    """The replica's id on its node. Producers number replicas per pool (`r0`), so the pool goes before, unless it is there."""
    return replica if replica.startswith(f"{pool}-") else f"{pool}_{replica}"


def file_name(pool: str, replica: str) -> str:
    """`<pool>_<replica>.json`, the name of a handoff file."""
    return f"{pool}_{replica}.json"


def parse(data: bytes, policy: UrlPolicy = LOOPBACK_ONLY) -> Entry:
    """What the bytes of one handoff file say. Never raises."""
    if len(data) > MAX_BYTES:
        return Ignore(f"larger than {MAX_BYTES // 1024} KiB")
    try:
        content = json.loads(data.decode("utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        return Partial(f"not JSON: {error}")
    if not isinstance(content, dict):
        return Ignore("not a JSON object")
    try:
        document = _Document.model_validate(content)
    except ValidationError as error:
        return Ignore(_first(error))
    return _adopt(document, policy) if document.url else _launch(document)


def _adopt(document: _Document, policy: UrlPolicy) -> Entry:
    pool, replica = document.pool_id or DEFAULT_POOL, document.replica_id or DEFAULT_REPLICA
    if reason := _bad_ids(pool, replica):
        return Ignore(reason)
    url = _base_url(document.url or "", policy)
    if isinstance(url, Ignore):
        return url
    model = _Model(path=document.model) if isinstance(document.model, str) else document.model or _Model()
    return Adopt(
        pool=pool,
        replica=replica,
        url=url,
        slots=document.slots,
        engine=document.engine,
        engine_version=document.engine_version,
        device_mask=document.device_mask or "",
        pid=document.pid,
        model_path=model.path,
        revision=document.revision,
    )


def _launch(document: _Document) -> Entry:
    model = _Model(path=document.model) if isinstance(document.model, str) else document.model
    if not document.pool_id:
        return Ignore("neither url nor pool_id: it describes no engine")
    if model is None or not model.path:
        return Ignore("neither url nor model.path: there is nothing to adopt or to launch")
    if not document.replica_id:
        return Ignore("replica_id is missing")
    if reason := _bad_ids(document.pool_id, document.replica_id):
        return Ignore(reason)
    path = model.path.removeprefix("file://").removeprefix("file:")
    if reason := _bad_path(path):
        return Ignore(reason)
    if refused := refused_by_agent(document.engine_args):
        return Ignore(f"engine_args: {', '.join(refused)} may not be set")
    if any("\0" in argument for argument in document.engine_args):
        return Ignore("engine_args: NUL in an argument")
    mask = document.device_mask or ""
    if any(not _MASK.fullmatch(text) for text in [*document.devices, *([mask] if mask else [])]):
        return Ignore("devices are UUIDs or indexes")
    return Launch(
        pool=document.pool_id,
        replica=document.replica_id,
        model_path=path,
        origin=ReplicaOrigin.ASSIGNED if document.origin is ReplicaOrigin.ASSIGNED else ReplicaOrigin.LAUNCHED,
        digest=model.digest,
        aliases=tuple(model.aliases),
        slots=document.slots or 1,
        context_tokens=document.context_tokens,
        engine_args=tuple(document.engine_args),
        devices=tuple(document.devices.items()),
        tensor_split=tuple(document.tensor_split),
        device_mask=mask,
        namespace=document.namespace,
        revision=document.revision,
        drain_deadline_s=document.drain_deadline_seconds,
    )


def launch_document(replica_id: str, assignment: Assignment, model_path: str) -> bytes:
    """The handoff file of an assignment whose model lies at `model_path`. The same arguments give the same bytes."""
    document: dict[str, Any] = {
        "pool_id": assignment.pool,
        "replica_id": replica_id,
        "origin": ReplicaOrigin.ASSIGNED.value,
        "engine": "llamacpp",
        "namespace": assignment.namespace,
        "revision": assignment.revision,
        "model": {
            "path": model_path,
            "digest": assignment.model.digest,
            "aliases": list(assignment.model.aliases),
        },
        "devices": {uuid: device.vram_mib for uuid, device in assignment.devices.items()},
        "slots": assignment.slots,
        "context_tokens": assignment.context_tokens,
        "engine_args": list(assignment.engine_args),
        "drain_deadline_seconds": assignment.drain_deadline_seconds,
    }
    if split := _tensor_split(assignment):
        document["tensor_split"] = list(split)
    return json.dumps(document, indent=2, ensure_ascii=False).encode() + b"\n"


def _tensor_split(assignment: Assignment) -> tuple[int, ...]:
    """What each GPU's share holds of weights and KV cache, beside its own buffers; empty where that does not add up."""
    shares = [device.vram_mib for uuid, device in assignment.devices.items() if not uuid.startswith(CPU_DEVICE)]
    if len(shares) < 2:
        return ()
    settings = memory_settings(assignment.engine_args)
    try:
        need = estimate(
            assignment.model.shape,
            slots=assignment.slots,
            context_tokens=assignment.context_tokens,
            kv_cache_type=settings.kv_cache_type,
            ubatch=settings.ubatch,
            swa_full=settings.swa_full,
            flash_attention=settings.flash_attention,
            devices=len(shares),
        )
    except ValueError:
        return ()
    split = tensor_split(need, shares)
    return split if all(split) else ()


def same_engine(one: Entry, other: Entry) -> bool:
    """True when a running engine of `one` is as good for `other`: they differ at most in what the engine does not see."""
    if isinstance(one, Launch) and isinstance(other, Launch):
        return replace(one, aliases=other.aliases, drain_deadline_s=other.drain_deadline_s) == other
    return one == other


@dataclass(frozen=True, slots=True)
class Added:
    """A file that was not there before."""

    path: str


@dataclass(frozen=True, slots=True)
class Changed:
    """A file with other content."""

    path: str


@dataclass(frozen=True, slots=True)
class Removed:
    """A file that is gone."""

    path: str


Change = Added | Changed | Removed


def diff(known: Mapping[str, str], seen: Mapping[str, str]) -> list[Change]:
    """What makes `known` ({path: hash of its content}) into `seen`. Removals come first, so that an id may change its file."""
    changes: list[Change] = [Removed(path) for path in sorted(known) if path not in seen]
    for path in sorted(seen):
        if path not in known:
            changes.append(Added(path))
        elif known[path] != seen[path]:
            changes.append(Changed(path))
    return changes


def _bad_ids(pool: str, replica: str) -> str | None:
    for name, value in (("pool_id", pool), ("replica_id", replica)):
        if not _ID.fullmatch(value):
            return f"{name} {value[:70]!r}: 1 to 63 letters, digits, '.', '_' and '-' are allowed"
    return None


def _bad_path(path: str) -> str | None:
    if not posixpath.isabs(path) or "\0" in path or "\n" in path:
        return f"model.path {path[:200]!r} is not an absolute path"
    if ".." in path.split("/"):
        return f"model.path {path[:200]!r} has '..' in it"
    return None


def _base_url(text: str, policy: UrlPolicy) -> str | Ignore:
    try:
        parts = urlsplit(text)
        port, host = parts.port or 80, parts.hostname or ""
    except ValueError as error:
        return Ignore(f"url {text!r}: {error}")
    if parts.scheme != "http" or not host:
        return Ignore(f"url {text!r}: http://HOST:PORT is allowed")
    if parts.username is not None or parts.path not in ("", "/") or parts.query or parts.fragment:
        return Ignore(f"url {text!r}: http://HOST:PORT is allowed, and nothing more")
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        if host != "localhost" and not policy.any_host and host not in policy.own_addresses:
            return Ignore(f"url {text!r}: not loopback and not an address of this node")
        return f"http://{host}:{port}"
    if address.is_unspecified:  # the address a producer told its engine to bind
        address = ipaddress.ip_address("127.0.0.1" if address.version == 4 else "::1")
    if not address.is_loopback and not policy.any_host and str(address) not in policy.own_addresses:
        return Ignore(f"url {text!r}: not loopback and not an address of this node")
    return f"http://{address}:{port}" if address.version == 4 else f"http://[{address}]:{port}"


def _first(error: ValidationError) -> str:
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"] if not str(part).startswith("_Model"))
    return f"{where}: {first['msg']}"
