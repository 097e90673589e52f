"""Which store to open where nobody says."""

from __future__ import annotations

from collections.abc import Mapping

HOME_STORE = "sqlite:.runtime/llorch.db"


def default_store(environment: Mapping[str, str]) -> str:
    """kubernetes inside a cluster (KUBERNETES_SERVICE_HOST is set there), the home's SQLite file elsewhere."""
    return "kubernetes" if environment.get("KUBERNETES_SERVICE_HOST") else HOME_STORE
