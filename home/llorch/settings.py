"""Settings of the home profile and of the command line."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, SecretStr
from pydantic_settings import BaseSettings, SettingsConfigDict


class HomeSettings(BaseSettings):
    """What `llorch home` needs beside the settings of agent, operator and gateway."""

    model_config = SettingsConfigDict(frozen=True, extra="ignore", populate_by_name=True)

    addr: str = Field("127.0.0.1:8080", validation_alias="ORCHESTRATORD_ADDR", pattern=r"^.*:\d{1,5}$")
    """host:port of the one server: OpenAI API, agent and health. Loopback unless you say otherwise; port 0 takes a free one."""
    runtime_dir: Path = Field(Path(".runtime/engines"), validation_alias="POOL_MANAGERD_RUNTIME_DIR")
    """The handoff directory. Its parent holds the store, logs and the lock that keeps a second home away."""
    model_dir: Path = Field(Path("~/.cache/llorch/models"), validation_alias="LLORCH_MODEL_DIR")
    """Where downloaded models and the demo model are kept."""
    store: str | None = Field(None, validation_alias="LLORCH_STORE", pattern=r"^(kubernetes|sqlite:.+)$")
    """sqlite:PATH, default sqlite:.runtime/llorch.db."""

    @property
    def state_dir(self) -> Path:
        """The directory that holds everything of this home."""
        return self.runtime_dir.parent


class ClientSettings(BaseSettings):
    """What the commands that talk to a running llorch need."""

    model_config = SettingsConfigDict(frozen=True, extra="ignore", populate_by_name=True)

    store: str | None = Field(None, validation_alias="LLORCH_STORE", pattern=r"^(kubernetes|sqlite:.+)$")
    """Where `llorch get` and `llorch apply` read and write."""
    url: str = Field("http://127.0.0.1:8080", validation_alias="LLORCH_URL", pattern=r"^https?://")
    """Base URL of the gateway for `llorch chat`."""
    namespace: str = Field("default", validation_alias="LLORCH_NAMESPACE")
    """Namespace of pools that name none."""
    api_token: SecretStr | None = Field(None, validation_alias="LLORCH_API_TOKEN")
    """Bearer token that agents ask for."""
    api_token_file: Path | None = Field(None, validation_alias="LLORCH_API_TOKEN_FILE")
    """File with the bearer token, where LLORCH_API_TOKEN is not set."""

    @property
    def token(self) -> str | None:
        """The bearer token; None where none is set or its file cannot be read."""
        if self.api_token is not None:
            return self.api_token.get_secret_value() or None
        try:
            return self.api_token_file.read_text().strip() if self.api_token_file else None
        except OSError:
            return None
