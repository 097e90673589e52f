"""Settings of the gateway, from the environment."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, SecretStr
from pydantic_settings import SettingsConfigDict

from llorch_web.tls import TlsSettings

_NAME = "[a-z0-9]([-a-z0-9]*[a-z0-9])?"


class GatewaySettings(TlsSettings):
    """Every field is one environment variable; a bad value ends the program with exit code 2."""

    model_config = SettingsConfigDict(frozen=True, extra="ignore", populate_by_name=True, env_ignore_empty=True)

    addr: str = Field("0.0.0.0:8080", validation_alias="LLORCH_GATEWAY_ADDR", pattern=r"^.*:\d{1,5}$")
    """host:port of the OpenAI API, /health and /metrics. Port 0 takes a free one."""
    namespace: str = Field("default", validation_alias="LLORCH_NAMESPACE", pattern=rf"^(\*|{_NAME}(,{_NAME})*)$")
    """the namespace whose pools are served, several separated by commas, or * for all. With more than one, a model's name is
    namespace/pool."""
    store: str | None = Field(None, validation_alias="LLORCH_STORE", pattern=r"^(kubernetes|sqlite:.+|memory:)$")
    """kubernetes, or sqlite:PATH. Without it: kubernetes inside a cluster, else sqlite:.runtime/llorch.db."""
    api_token: SecretStr | None = Field(None, validation_alias="LLORCH_API_TOKEN")
    """Bearer token that is shown to agents; LLORCH_API_TOKEN_FILE is preferred in a cluster."""
    api_token_file: Path | None = Field(None, validation_alias="LLORCH_API_TOKEN_FILE")
    """File with the bearer token, read again when it changes. It wins over LLORCH_API_TOKEN."""
    max_body_mib: int = Field(32, ge=1, le=1024, validation_alias="LLORCH_MAX_BODY_MIB")
    """Largest request, in MiB; a larger one is answered 413. Prompts with images need more than text."""
    answer_timeout_secs: int = Field(600, ge=5, le=86_400, validation_alias="LLORCH_ANSWER_TIMEOUT_SECS")
    """How long an agent that is alive may send nothing for a request, in seconds. Reading a very long prompt on a slow device
    takes minutes in which nothing can be said."""
    drain_secs: int = Field(30, ge=0, le=3_600, validation_alias="LLORCH_GATEWAY_DRAIN_SECS")
    """How long running answers may still take once the gateway is asked to stop, in seconds. Keep it below the pod's
    terminationGracePeriodSeconds, or they are cut off without a word."""

    @property
    def namespaces(self) -> tuple[str | None, ...]:
        """The namespaces to watch; (None,) for all."""
        return (None,) if self.namespace == "*" else tuple(dict.fromkeys(self.namespace.split(",")))

    @property
    def qualified(self) -> bool:
        """Whether models are named namespace/pool."""
        return self.namespace == "*" or len(self.namespaces) > 1
