"""A bad environment variable is one line that says what is allowed, and exit code 2."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest
from pydantic import AliasChoices, Field, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from llorch_web.settings import load


class Example(BaseSettings):
    """Settings of a made-up component."""

    model_config = SettingsConfigDict(frozen=True, extra="ignore", populate_by_name=True)

    interval: int = Field(10, ge=1, le=60, validation_alias="POOL_MANAGERD_HEARTBEAT_INTERVAL_SECS")
    """Seconds between beats."""
    size: int = Field(32, ge=1, validation_alias=AliasChoices("LLORCH_SIZE_MIB", "LLORCH_OLD_SIZE_MIB"))
    """MiB."""
    addr: str = Field("127.0.0.1:9200", validation_alias="LLORCH_ADDR", pattern=r"^.*:\d{1,5}$")
    """host:port to listen on. Loopback unless you say otherwise."""
    mode: Literal["request", "dra", "visible"] = Field("request", validation_alias="LLORCH_MODE")
    """How."""
    enabled: bool = Field(False, validation_alias="LLORCH_ENABLED")
    """Whether."""
    names: list[str] = Field([], validation_alias="LLORCH_NAMES")
    """JSON list."""
    api_token: str | None = Field(None, max_length=4, validation_alias="LLORCH_API_TOKEN")
    """Secret."""
    path: Path | None = Field(None, validation_alias="LLORCH_PATH")
    """A path."""

    @model_validator(mode="after")
    def _together(self) -> Example:
        if self.interval == 59 and self.enabled:
            raise ValueError("POOL_MANAGERD_HEARTBEAT_INTERVAL_SECS=59 and LLORCH_ENABLED=true exclude each other")
        return self


@pytest.mark.parametrize(
    ("variables", "line"),
    [
        (
            {"POOL_MANAGERD_HEARTBEAT_INTERVAL_SECS": "0"},
            "llorch: POOL_MANAGERD_HEARTBEAT_INTERVAL_SECS=0 — must be 1 to 60 (seconds)",
        ),
        (
            {"POOL_MANAGERD_HEARTBEAT_INTERVAL_SECS": "soon"},
            "llorch: POOL_MANAGERD_HEARTBEAT_INTERVAL_SECS=soon — must be 1 to 60 (seconds)",
        ),
        ({"LLORCH_SIZE_MIB": "-1"}, "llorch: LLORCH_SIZE_MIB=-1 — must be 1 or more (MiB)"),
        ({"LLORCH_OLD_SIZE_MIB": "x"}, "llorch: LLORCH_OLD_SIZE_MIB=x — must be 1 or more (MiB)"),
        ({"LLORCH_ADDR": "nowhere"}, "llorch: LLORCH_ADDR=nowhere — must be host:port to listen on"),
        ({"LLORCH_MODE": "all"}, "llorch: LLORCH_MODE=all — must be request, dra or visible"),
        ({"LLORCH_ENABLED": "perhaps"}, "llorch: LLORCH_ENABLED=perhaps — must be true or false"),
        ({"LLORCH_NAMES": "a,b"}, "llorch: LLORCH_NAMES=a,b — must be JSON"),
        (
            {"POOL_MANAGERD_HEARTBEAT_INTERVAL_SECS": "59", "LLORCH_ENABLED": "true"},
            "llorch: POOL_MANAGERD_HEARTBEAT_INTERVAL_SECS=59 and LLORCH_ENABLED=true exclude each other",
        ),
    ],
)
def test_a_bad_value_is_one_line_with_its_name_its_value_and_what_is_allowed(
    variables: dict[str, str], line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as ended:
        load(Example)
    assert ended.value.code == 2
    assert capsys.readouterr().err.splitlines() == [line]


def test_every_bad_variable_gets_its_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("LLORCH_MODE", "all")
    monkeypatch.setenv("LLORCH_ENABLED", "perhaps")
    with pytest.raises(SystemExit):
        load(Example)
    assert len(capsys.readouterr().err.splitlines()) == 2


def test_a_token_is_never_shown(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("LLORCH_API_TOKEN", "s3cr3t-value")
    with pytest.raises(SystemExit):
        load(Example)
    err = capsys.readouterr().err
    assert err.startswith("llorch: LLORCH_API_TOKEN=… — ")
    assert "s3cr3t" not in err


def test_good_values_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POOL_MANAGERD_HEARTBEAT_INTERVAL_SECS", "7")
    assert load(Example).interval == 7
