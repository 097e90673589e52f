"""The node API of an operator inside kopf, on a real API server: an agent that knows no Kubernetes serves a pool there."""

from __future__ import annotations

import json
import signal
import ssl
import subprocess
import sys
import urllib.error
import urllib.request
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import yaml
from programs import clean_environment, free_port, program, until
from test_chart import CHART, helm  # noqa: F401 - a fixture

from cluster.apiserver import ApiServer
from llorch_model.tiny import write_tiny

pytestmark = pytest.mark.functional

TOKEN = "t" * 40
AGENT = "system:serviceaccount:serving:llorch-agent"


def module(name: str, cwd: Path, **more: str) -> AbstractContextManager[subprocess.Popen[bytes]]:
    """`python -m NAME` until the block ends."""
    environment = clean_environment(LLORCH_API_TOKEN=TOKEN, **more)
    return program([sys.executable, "-m", name], cwd=cwd, log=f"{name}.log", environment=environment)


def test_an_agent_that_knows_no_kubernetes_serves_a_pool_of_the_cluster(no_resources: ApiServer, tmp_path: Path) -> None:
    api = no_resources
    model = write_tiny(tmp_path / "tiny.gguf")
    control, agent = f"127.0.0.1:{free_port()}", f"127.0.0.1:{free_port()}"

    def read(*words: str) -> dict[str, Any]:
        found = api.kubectl("get", *words, "-o", "json", check=False)
        return dict(json.loads(found.stdout)) if found.returncode == 0 else {}

    spec = {
        "model": {"source": f"file:{model}"},
        "replicas": 1,
        "slots": 2,
        "contextTokens": 256,
        "placement": {"allowCPU": True},
    }
    pool = {
        "apiVersion": "llorch.dev/v1alpha1",
        "kind": "GPUPool",
        "metadata": {"name": "chat", "namespace": "default"},
        "spec": spec,
    }
    operator = module(
        "llorch_operator", tmp_path, LLORCH_STORE="kubernetes", KUBECONFIG=str(api.kubeconfig), ORCHESTRATORD_ADDR=control,
        ORCHESTRATORD_CLOUD_PROFILE="true",
    )  # fmt: skip
    outside = module(
        "llorch_agent", tmp_path, POOL_MANAGERD_CLOUD_PROFILE="true", ORCHESTRATORD_URL=f"http://{control}",
        POOL_MANAGERD_NODE_ID="outside", POOL_MANAGERD_ADDR=agent, LLORCH_DEVICES="cpu", LLORCH_MODEL_DIR="models",
    )  # fmt: skip
    with outside as process, operator:
        until(lambda: read("gpunode", "outside").get("status", {}).get("phase") == "Online", 60)
        api.kubectl("apply", "-f", "-", input=json.dumps(pool))

        endpoints = until(lambda: read("gpupool", "chat").get("status", {}).get("endpoints"), 60)

        [(replica, endpoint)] = endpoints.items()
        assert endpoint["url"] == f"http://{agent}/replicas/{replica}"
        body = json.dumps({"model": "chat", "prompt": "a", "max_tokens": 3}).encode()
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {TOKEN}"}
        request = urllib.request.Request(f"{endpoint['url']}/v1/completions", body, headers)
        with urllib.request.urlopen(request, timeout=10) as answer:
            assert json.loads(answer.read())["usage"]["completion_tokens"] == 3

        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0
        until(lambda: not read("gpunode", "outside"), 5)


def test_an_agent_in_the_cluster_cannot_say_that_it_came_through_the_node_api(
    no_resources: ApiServer,
    helm: str,  # noqa: F811
) -> None:
    api = no_resources
    done = subprocess.run(
        [helm, "template", "llorch", CHART, "--namespace", "serving"], capture_output=True, text=True, check=True
    )
    wanted = ("ClusterRole", "ClusterRoleBinding", "ValidatingAdmissionPolicy", "ValidatingAdmissionPolicyBinding")
    documents = [each for each in yaml.safe_load_all(done.stdout) if each and each["kind"] in wanted]
    api.kubectl("apply", "-f", "-", input=yaml.safe_dump_all(documents))
    context = ssl.create_default_context(cafile=str(api.ca))
    marked = {"labels": {"llorch.dev/transport": "http"}}

    def as_agent(method: str, path: str, body: dict[str, Any]) -> tuple[int, str]:
        kind = "application/json" if method == "POST" else "application/merge-patch+json"
        headers = {
            "Authorization": f"Bearer {api.token}", "Content-Type": kind, "Impersonate-User": AGENT,
            "Impersonate-Extra-authentication.kubernetes.io%2Fnode-name": "gpu-1",
        }  # fmt: skip
        url = f"{api.url}/apis/llorch.dev/v1alpha1/gpunodes{path}"
        request = urllib.request.Request(url, json.dumps(body).encode(), headers, method=method)
        try:
            with urllib.request.urlopen(request, context=context, timeout=10) as answer:
                return int(answer.status), ""
        except urllib.error.HTTPError as error:
            with error:
                return error.code, json.loads(error.read())["message"]

    def node(**metadata: Any) -> dict[str, Any]:
        return {"apiVersion": "llorch.dev/v1alpha1", "kind": "GPUNode", "metadata": {"name": "gpu-1", **metadata}}

    try:
        foreign = {**node(), "metadata": {"generateName": "foreign-"}}
        until(lambda: "may write only" in as_agent("POST", "", foreign)[1], 15)  # a policy takes a moment to count
        status = as_agent("POST", "", node(**marked))
        assert "may not change the label llorch.dev/transport" in status[1]
        assert as_agent("POST", "", node(labels={"rack": "r1"})) == (201, "")
        assert as_agent("PATCH", "/gpu-1", {"metadata": {"labels": {"rack": "r2"}}}) == (200, "")
        status = as_agent("PATCH", "/gpu-1", {"metadata": marked})
        assert "may not change the label llorch.dev/transport" in status[1]
        assert as_agent("PATCH", "/gpu-1/status", {"status": {"heartbeat": {"sequence": 1}}}) == (200, "")
    finally:
        api.kubectl("delete", "gpunodes", "--all")
        api.kubectl("delete", "-f", "-", input=yaml.safe_dump_all(documents))
