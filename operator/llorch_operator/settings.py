"""Settings of the operator, from the environment."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field
from pydantic_settings import SettingsConfigDict

from llorch_web.tls import TlsSettings


class OperatorSettings(TlsSettings):
    """Every field is one environment variable; a bad value ends the program with exit code 2."""

    model_config = SettingsConfigDict(frozen=True, extra="ignore", populate_by_name=True)

    addr: str = Field("0.0.0.0:8080", validation_alias="ORCHESTRATORD_ADDR", pattern=r"^.*:\d{1,5}$")
    """host:port of /health, /metrics and the node API."""
    cloud_profile: bool = Field(False, validation_alias="ORCHESTRATORD_CLOUD_PROFILE")
    """True opens the node API, /v2/nodes, to agents outside the cluster. Set a token, or only agents on loopback are answered."""
    heartbeat_interval_secs: int = Field(10, ge=1, le=60, validation_alias="ORCHESTRATORD_HEARTBEAT_INTERVAL_SECS")
    """What the node API tells agents to beat in, in seconds. An agent beats more often where its own setting is shorter."""
    node_timeout_ms: int = Field(30_000, ge=5_000, le=300_000, validation_alias="ORCHESTRATORD_NODE_TIMEOUT_MS")
    """How long a node may be silent before it is Offline, in ms. Shorter finds dead nodes sooner, and must stay above the
    watch's stall time-out plus one heartbeat, or a quiet watch makes every node be read again."""
    stale_check_interval_secs: int = Field(10, ge=1, le=60, validation_alias="ORCHESTRATORD_STALE_CHECK_INTERVAL_SECS")
    """Upper bound of the seconds between two looks for silent nodes. llorch looks every second."""
    replace_grace_secs: int = Field(60, ge=0, le=3_600, validation_alias="LLORCH_REPLACE_GRACE_SECS")
    """Seconds from Offline to Lost, when a node's replicas are placed elsewhere. Shorter moves models on short outages."""
    load_deadline_secs: int = Field(900, ge=10, le=86_400, validation_alias="LLORCH_LOAD_DEADLINE_SECS")
    """Seconds from its assignment until a replica must be Ready; past them another node is tried."""
    allow_private_sources: bool = Field(True, validation_alias="LLORCH_ALLOW_PRIVATE_SOURCES")
    """False refuses https: and s3: sources on private, loopback and link-local addresses, also after redirects; see the agent's
    setting of that name, and keep the two alike."""
    hf_token_file: Path | None = Field(None, validation_alias="LLORCH_HF_TOKEN_FILE")
    """File with the token for private and gated hf: repositories, read anew for each; without it HF_TOKEN counts."""
    namespace: str = Field("default", min_length=1, max_length=63, validation_alias="LLORCH_NAMESPACE")
    """Namespace of the operator and its agents; pools that handoff files name are made in it."""
    agent_selector: str = Field(
        "app.kubernetes.io/component=agent", validation_alias="LLORCH_AGENT_SELECTOR", pattern=r"^[^=,]+=[^=,]+$"
    )
    """Label of the agents' pods, key=value. The host of a replica's URL is its pod's IP, never what an agent claims."""
    store: str | None = Field(None, validation_alias="LLORCH_STORE", pattern=r"^(kubernetes|sqlite:.+)$")
    """kubernetes, or sqlite:PATH. Without it: kubernetes inside a cluster, else sqlite:.runtime/llorch.db."""
    api_token: str | None = Field(None, validation_alias="LLORCH_API_TOKEN")
    """Bearer token shown to agents; LLORCH_API_TOKEN_FILE is preferred in a cluster, being read again when it changes."""
    api_token_file: str | None = Field(None, validation_alias="LLORCH_API_TOKEN_FILE")
    """File with the bearer token."""
