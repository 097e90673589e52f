"""Every variable of the original's configuration reference, under its name and with its default."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import pytest
from pydantic_settings import BaseSettings

from llorch_agent.settings import AgentSettings
from llorch_operator.settings import OperatorSettings

REFERENCE: list[tuple[type[BaseSettings], str, str, Any, str, Any]] = [
    # settings, variable, field, default, value as in the reference, what it means
    (OperatorSettings, "ORCHESTRATORD_CLOUD_PROFILE", "cloud_profile", False, "true", True),
    (OperatorSettings, "ORCHESTRATORD_NODE_TIMEOUT_MS", "node_timeout_ms", 30_000, "45000", 45_000),
    (OperatorSettings, "ORCHESTRATORD_STALE_CHECK_INTERVAL_SECS", "stale_check_interval_secs", 10, "5", 5),
    (OperatorSettings, "ORCHESTRATORD_ADDR", "addr", "0.0.0.0:8080", "127.0.0.1:8080", "127.0.0.1:8080"),
    (AgentSettings, "POOL_MANAGERD_CLOUD_PROFILE", "cloud_profile", False, "true", True),
    (AgentSettings, "POOL_MANAGERD_NODE_ID", "node_id", None, "gpu-node-1", "gpu-node-1"),
    (AgentSettings, "POOL_MANAGERD_MACHINE_ID", "machine", None, "machine-alpha", "machine-alpha"),
    (AgentSettings, "POOL_MANAGERD_ADDRESS", "advertised", None, "http://192.168.1.100:9200", "http://192.168.1.100:9200"),
    (AgentSettings, "POOL_MANAGERD_ADDR", "addr", "127.0.0.1:9200", "0.0.0.0:9200", "0.0.0.0:9200"),
    (AgentSettings, "ORCHESTRATORD_URL", "orchestrator_url", None, "http://192.168.1.1:8080", "http://192.168.1.1:8080"),
    (AgentSettings, "ORCHESTRATORD_REGISTER_ON_STARTUP", "register_on_startup", True, "false", False),
    (AgentSettings, "POOL_MANAGERD_POOLS", "pools", ("pool-0",), "pool-0, pool-1", ("pool-0", "pool-1")),
    (AgentSettings, "POOL_MANAGERD_HEARTBEAT_INTERVAL_SECS", "heartbeat_interval_secs", 10, "20", 20),
    (AgentSettings, "POOL_MANAGERD_RUNTIME_DIR", "runtime_dir", Path(".runtime/engines"), "/var/e", Path("/var/e")),
    (AgentSettings, "POOL_MANAGERD_WATCH_INTERVAL_MS", "watch_interval_ms", 1_000, "500", 500),
    (OperatorSettings, "LLORCH_API_TOKEN", "api_token", None, "secret123", "secret123"),
    (AgentSettings, "LLORCH_API_TOKEN", "api_token", None, "secret123", "secret123"),
]


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(("ORCHESTRATORD_", "POOL_MANAGERD_", "LLORCH_")):
            monkeypatch.delenv(name)


def plain(value: Any) -> Any:
    return value.get_secret_value() if hasattr(value, "get_secret_value") else value


@pytest.mark.parametrize(("cls", "variable", "field", "default", "value", "meaning"), REFERENCE)
def test_the_variable_is_read_and_has_its_default(
    cls: type[BaseSettings],
    variable: str,
    field: str,
    default: Any,
    value: str,
    meaning: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if default is not None:
        assert plain(getattr(cls(), field)) == default
    monkeypatch.setenv(variable, value)
    assert plain(getattr(cls(), field)) == meaning


def test_the_node_is_the_host_and_the_machine_is_the_node_where_nobody_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "Desk_7")
    settings = AgentSettings()
    assert (settings.node_id, settings.machine, settings.advertised) == ("desk-7", "desk-7", "http://127.0.0.1:9200")


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, False),
        ({"POOL_MANAGERD_CLOUD_PROFILE": "true"}, False),
        ({"ORCHESTRATORD_URL": "http://c:8080"}, False),
        ({"POOL_MANAGERD_CLOUD_PROFILE": "true", "ORCHESTRATORD_URL": "http://c:8080"}, True),
        ({"POOL_MANAGERD_CLOUD_PROFILE": "1", "ORCHESTRATORD_URL": "http://c:8080", "LLORCH_STORE": "kubernetes"}, False),
    ],
)
def test_the_node_api_is_used_with_the_profile_and_an_address_and_without_a_store(
    variables: dict[str, str], expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert AgentSettings().over_http is expected
