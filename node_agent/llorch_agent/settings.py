"""Settings of the agent, from the environment."""

from __future__ import annotations

import os
import re
import socket
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import Field, SecretStr, field_validator
from pydantic_settings import NoDecode, SettingsConfigDict

from llorch_web.tls import TlsSettings

_LABEL = re.compile(r"([A-Za-z0-9][-A-Za-z0-9_./]{0,252})=([A-Za-z0-9][-A-Za-z0-9_.]{0,62}|)")

_POOL = re.compile(r"[A-Za-z0-9][-A-Za-z0-9_.]{0,63}")


def host_name() -> str:
    """The host's name in the form that Kubernetes takes."""
    name = re.sub(r"[^a-z0-9.-]+", "-", socket.gethostname().lower()).strip("-.")
    return name[:253] or "node"


class AgentSettings(TlsSettings):
    """Every field is one environment variable; a bad value ends the program with exit code 2."""

    model_config = SettingsConfigDict(frozen=True, extra="ignore", populate_by_name=True, env_ignore_empty=True)

    node_id: str = Field(
        default_factory=host_name,
        min_length=1,
        max_length=253,
        pattern=r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$",
        validation_alias="POOL_MANAGERD_NODE_ID",
    )
    """lower-case letters, digits, '-' and '.': the name of this node's GPUNode, by default the host's name. In the cluster it
    must be the Node's name. Two agents of one name take turns at the same object: each write undoes the other's."""
    machine_id: str | None = Field(None, min_length=1, max_length=256, validation_alias="POOL_MANAGERD_MACHINE_ID")
    """The physical machine, where several nodes share one; by default the node id."""
    addr: str = Field("127.0.0.1:9200", validation_alias="POOL_MANAGERD_ADDR")
    """host:port to listen on. Any host but loopback opens the agent to the network: set a token."""
    address: str | None = Field(None, max_length=256, pattern=r"^https?://[^/\s]+/?$", validation_alias="POOL_MANAGERD_ADDRESS")
    """http://host:port at which the others reach this agent; by default what it listens on."""
    runtime_dir: Path = Field(Path(".runtime/engines"), validation_alias="POOL_MANAGERD_RUNTIME_DIR")
    """The handoff directory. It is the agent's memory: what is in it is started again after a restart."""
    watch_interval_ms: int = Field(1_000, ge=100, le=10_000, validation_alias="POOL_MANAGERD_WATCH_INTERVAL_MS")
    """Between two looks at the handoff directory, in ms. inotify finds changes at once where it works; this is for where not."""
    heartbeat_interval_secs: int = Field(10, ge=1, le=60, validation_alias="POOL_MANAGERD_HEARTBEAT_INTERVAL_SECS")
    """Between two heartbeats, in seconds. A silent node is Offline after 3 of them, or after the
    operator's time-out if that is longer."""
    heartbeat_mode: Literal["status", "lease"] = Field("status", validation_alias="LLORCH_HEARTBEAT_MODE")
    """status: each beat writes the GPUNode's status. lease: each beat renews a Lease, for under half of the API server's
    work, and the status is written on urgent changes and every 5 minutes, so that free memory and slots in it are as old.
    Kubernetes only."""
    namespace: str = Field("default", min_length=1, max_length=63, validation_alias="LLORCH_NAMESPACE")
    """Namespace of the Lease: the operator's."""
    cloud_profile: bool = Field(False, validation_alias="POOL_MANAGERD_CLOUD_PROFILE")
    """True, with ORCHESTRATORD_URL and without LLORCH_STORE: the node is published through the operator's node API. Otherwise it
    is published in the store, in the cluster and at home alike."""
    orchestrator_url: str | None = Field(
        None, max_length=256, pattern=r"^https?://[^/\s]+/?$", validation_alias="ORCHESTRATORD_URL"
    )
    """http://host:port of the operator whose node API the agent registers with. It may be away: the agent asks for ever."""
    register_on_startup: bool = Field(True, validation_alias="ORCHESTRATORD_REGISTER_ON_STARTUP")
    """False: the agent does not register its node, and beats once somebody else has registered it."""
    pools: Annotated[tuple[str, ...], NoDecode] = Field(("pool-0",), max_length=64, validation_alias="POOL_MANAGERD_POOLS")
    """Names of the pools that handoff files will come for, separated by commas. The node API shows them as not ready until
    then. Without effect where the node is published in a store."""
    model_dir: Path = Field(Path("~/.cache/llorch/models"), validation_alias="LLORCH_MODEL_DIR")
    """Where fetched models are kept."""
    model_cache_mib: int = Field(0, ge=0, le=1 << 30, validation_alias="LLORCH_MODEL_CACHE_MIB")
    """What fetched models may take in all, MiB. When they would take more, those that were not used for longest are deleted, and
    never one that a replica of this node runs. 0: no limit but the disk, of which 512 MiB stay free."""
    hf_token_file: Path | None = Field(None, validation_alias="LLORCH_HF_TOKEN_FILE")
    """File with the token for private and gated hf: repositories, read anew for each; without it HF_TOKEN counts."""
    allow_private_sources: bool = Field(True, validation_alias="LLORCH_ALLOW_PRIVATE_SOURCES")
    """False refuses https: and s3: sources on private, loopback and link-local addresses, also after redirects: in a cluster a
    pool's YAML would else make this node read what only it can reach. HF_ENDPOINT and AWS_ENDPOINT_URL are trusted."""
    model_roots: Annotated[tuple[Path, ...] | None, NoDecode] = Field(None, validation_alias="LLORCH_MODEL_ROOTS")
    """Directories, separated by `:`, under which file: sources may lie. By default /models where the store is kubernetes, and
    anywhere that the agent can read at home."""
    engine: str | None = Field(None, min_length=1, validation_alias="LLORCH_ENGINE")
    """Path of llama-server; by default the one on PATH, else the one in the xllamacpp package."""
    devices: Literal["auto", "nvml", "cpu"] = Field("auto", validation_alias="LLORCH_DEVICES")
    """auto: GPUs, or the machine's own memory where there is no GPU driver. nvml: GPUs only. cpu: the machine's memory only."""
    pod_resources: Path = Field(Path("/var/lib/kubelet/pod-resources/kubelet.sock"), validation_alias="LLORCH_POD_RESOURCES")
    """The kubelet's PodResources socket, or its relay's: GPUs that other pods hold are told to the operator and never used.
    Where it is missing, such GPUs are only seen by the memory in use on them; in the cluster a warning says so."""
    pod: str = Field("", max_length=320, pattern=r"^([^/\s]+/[^/\s]+)?$", validation_alias="LLORCH_POD")
    """NAMESPACE/NAME of the pod that the agent runs in: what this pod holds is the agent's own. Without it the agent's own GPUs
    count as held by another."""
    node_labels: Annotated[dict[str, str], NoDecode] = Field(default_factory=dict, validation_alias="LLORCH_NODE_LABELS")
    """key=value,… for nodeSelector, outside Kubernetes. In the cluster the Node's own labels count."""
    store: str | None = Field(None, pattern=r"^(kubernetes|sqlite:.+|memory:)$", validation_alias="LLORCH_STORE")
    """kubernetes, or sqlite:PATH. Without it: kubernetes inside a cluster, else sqlite:.runtime/llorch.db."""
    drain_secs: int = Field(120, ge=0, le=3_600, validation_alias="LLORCH_DRAIN_SECS")
    """How long requests in flight may take once the agent is asked to end, in seconds. Keep it below the pod's
    terminationGracePeriodSeconds, or they are cut off without a word."""
    api_token: SecretStr | None = Field(None, validation_alias="LLORCH_API_TOKEN")
    """Bearer token that callers must show. Without one only loopback is answered."""
    api_token_file: Path | None = Field(None, validation_alias="LLORCH_API_TOKEN_FILE")
    """File with the bearer token, read again when it changes."""

    @field_validator("addr")
    @classmethod
    def _host_and_port(cls, value: str) -> str:
        host, _, port = value.rpartition(":")
        if not host or not port.isdigit() or int(port) > 65_535:
            raise ValueError("must be host:port")
        return value

    @field_validator("model_roots", mode="before")
    @classmethod
    def _split_roots(cls, value: object) -> object:
        if not isinstance(value, str):
            return value
        roots = [Path(part) for part in value.split(os.pathsep) if part]
        if not roots or not all(root.is_absolute() for root in roots):
            raise ValueError("must be absolute directories, separated by ':'")
        return tuple(roots)

    @field_validator("pools", mode="before")
    @classmethod
    def _split_pools(cls, value: object) -> object:
        if not isinstance(value, str):
            return value
        names = [part.strip() for part in value.split(",") if part.strip()]
        if not all(_POOL.fullmatch(name) for name in names):
            raise ValueError("must be names of letters, digits, '-', '_' and '.', separated by commas")
        return tuple(dict.fromkeys(names))

    @field_validator("node_labels", mode="before")
    @classmethod
    def _split_labels(cls, value: object) -> object:
        if not isinstance(value, str):
            return value
        pairs = [_LABEL.fullmatch(part.strip()) for part in value.split(",") if part.strip()]
        if not all(pairs) or len(pairs) > 64:
            raise ValueError("must be key=value,… with at most 64 labels as Kubernetes takes them")
        return {pair[1]: pair[2] for pair in pairs if pair}

    @property
    def over_http(self) -> bool:
        """The node is published through the node API and not in a store."""
        return self.cloud_profile and self.orchestrator_url is not None and self.store is None

    @property
    def machine(self) -> str:
        """The machine's id."""
        return self.machine_id or self.node_id

    @property
    def advertised(self) -> str:
        """Base URL at which the others reach this agent."""
        if self.address:
            return self.address.rstrip("/")
        host, _, port = self.addr.rpartition(":")
        host = {"0.0.0.0": socket.gethostname(), "[::]": socket.gethostname(), "": "127.0.0.1"}.get(host, host)
        return f"{'https' if self.tls_cert_file else 'http'}://{host}:{port}"

    @property
    def own_hosts(self) -> frozenset[str]:
        """Hosts that are this node for certain: a handoff file may name an engine on them."""
        hosts = {urlsplit(self.advertised).hostname, urlsplit(f"//{self.addr}").hostname}
        return frozenset(host for host in hosts if host and host not in ("0.0.0.0", "::"))

    @property
    def port(self) -> int:
        """Port it listens on."""
        return urlsplit(f"//{self.addr}").port or 0

    @property
    def models(self) -> Path:
        """Where fetched models are kept, absolute."""
        return self.model_dir.expanduser().absolute()

    def roots(self, *, in_cluster: bool) -> tuple[Path, ...]:
        """Directories under which file: sources may lie; empty where all are allowed."""
        if self.model_roots is not None:
            return self.model_roots
        return (Path("/models"),) if in_cluster else ()
