"""The real API server that functional tests share, and what they need of it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.apiserver import ApiServer, CannotStart, start_api_server

CRDS = Path(__file__).parents[2] / "crds"


@pytest.fixture(scope="session")
def api_server() -> Iterator[ApiServer]:
    """etcd and kube-apiserver, without any CRD. Where they cannot run: a failure in CI, a skip that says why elsewhere."""
    try:
        with start_api_server() as server:
            yield server
    except CannotStart as reason:
        if os.environ.get("CI"):
            pytest.fail(f"no API server here: {reason}")
        pytest.skip(f"no API server here: {reason}")


@pytest.fixture(scope="session")
def crds(api_server: ApiServer) -> ApiServer:
    """The API server with our CRDs, ready to serve them."""
    api_server.kubectl("apply", "--server-side", *(f"--filename={path}" for path in sorted(CRDS.glob("*.yaml"))))
    api_server.kubectl(
        "wait", "--for=condition=Established", "--timeout=30s", "crd/gpunodes.llorch.dev", "crd/gpupools.llorch.dev"
    )
    return api_server


@pytest.fixture
def kubeconfig(crds: ApiServer, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`KUBECONFIG` names the API server's administrator."""
    monkeypatch.setenv("KUBECONFIG", str(crds.kubeconfig))
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    return crds.kubeconfig


@pytest.fixture
def no_resources(crds: ApiServer) -> ApiServer:
    """No GPUNodes and no GPUPools, and a second namespace, `other`."""
    crds.kubectl("delete", "gpupools", "--all", "--all-namespaces")
    crds.kubectl("delete", "gpunodes", "--all")
    if crds.kubectl("get", "namespace", "other", check=False).returncode:
        crds.kubectl("create", "namespace", "other")
    return crds
