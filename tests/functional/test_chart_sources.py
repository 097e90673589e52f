"""The chart's rules for model sources reach operator and agents alike."""

from __future__ import annotations

import pytest
from test_chart import container, helm, one, render

pytestmark = pytest.mark.functional
__all__ = ["helm"]


def variables(workload: dict[str, object]) -> dict[str, object]:
    return {each["name"]: each.get("value") for each in container(workload)["env"]}


def test_private_addresses_are_refused_by_default_and_credentials_come_from_a_secret(helm: str) -> None:
    plain = render(helm)
    told = render(helm, "--set", "sources.allowPrivate=true,sources.existingSecret=hub,agent.modelCacheMiB=500000")

    for kind, name in (("Deployment", "llorch-operator"), ("DaemonSet", "llorch-agent")):
        assert variables(one(plain, kind, name))["LLORCH_ALLOW_PRIVATE_SOURCES"] == "false"
        assert "envFrom" not in container(one(plain, kind, name))
        assert variables(one(told, kind, name))["LLORCH_ALLOW_PRIVATE_SOURCES"] == "true"
        assert container(one(told, kind, name))["envFrom"] == [{"secretRef": {"name": "hub"}}]
    assert variables(one(plain, "DaemonSet", "llorch-agent"))["LLORCH_MODEL_CACHE_MIB"] == "0"
    assert variables(one(told, "DaemonSet", "llorch-agent"))["LLORCH_MODEL_CACHE_MIB"] == "500000"
