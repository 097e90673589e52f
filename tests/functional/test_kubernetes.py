"""Operator, agents and gateway as processes on a real API server: from a pool's YAML to a streamed answer, and a failover."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

import pytest
from openai import OpenAI
from programs import clean_environment, free_port, program, until

from cluster.apiserver import ApiServer
from llorch_model.tiny import write_tiny

pytestmark = pytest.mark.functional

LLORCH = Path(sys.executable).parent / "llorch"
TOKEN = "t" * 40


class Story:
    """The processes, and kubectl to look at what they do."""

    def __init__(self, api: ApiServer, cwd: Path, stack: ExitStack) -> None:
        self.api, self.cwd, self.stack = api, cwd, stack
        self.gateway_port = free_port()
        self.shared = {
            "LLORCH_STORE": "kubernetes",
            "KUBECONFIG": str(api.kubeconfig),
            "LLORCH_API_TOKEN": TOKEN,
            "LLORCH_LOG_FORMAT": "text",
            "POOL_MANAGERD_HEARTBEAT_INTERVAL_SECS": "1",
            "ORCHESTRATORD_NODE_TIMEOUT_MS": "5000",
            "LLORCH_REPLACE_GRACE_SECS": "2",
        }
        self.client = OpenAI(base_url=f"http://127.0.0.1:{self.gateway_port}/v1", api_key="none", max_retries=0, timeout=20)

    def _component(self, word: str, log: str, **more: str) -> AbstractContextManager[subprocess.Popen[bytes]]:
        return program([LLORCH, word], cwd=self.cwd, log=log, environment=clean_environment(**{**self.shared, **more}))

    def operator(self) -> subprocess.Popen[bytes]:
        return self.stack.enter_context(
            self._component("operator", "operator.log", ORCHESTRATORD_ADDR=f"127.0.0.1:{free_port()}")
        )

    def gateway(self) -> subprocess.Popen[bytes]:
        address = f"127.0.0.1:{self.gateway_port}"
        return self.stack.enter_context(self._component("gateway", "gateway.log", LLORCH_GATEWAY_ADDR=address))

    def agent(self, name: str) -> subprocess.Popen[bytes]:
        """An agent and the pod that it would run in."""
        address = f"127.0.0.1:{free_port()}"
        labels = {"app.kubernetes.io/component": "agent"}
        pod = {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": f"agent-{name}", "namespace": "default", "labels": labels},
            "spec": {"nodeName": name, "containers": [{"name": "agent", "image": "none"}]},
        }
        self.api.kubectl("apply", "-f", "-", input=json.dumps(pod))
        status = json.dumps({"status": {"podIP": "127.0.0.1", "podIPs": [{"ip": "127.0.0.1"}]}})
        self.api.kubectl("patch", "pod", f"agent-{name}", "--subresource=status", "--type=merge", "-p", status)
        environment = {
            "POOL_MANAGERD_NODE_ID": name,
            "POOL_MANAGERD_ADDR": address,
            "POOL_MANAGERD_ADDRESS": f"http://10.9.9.9:{address.rsplit(':', 1)[1]}",
            "POOL_MANAGERD_RUNTIME_DIR": str(self.cwd / name / "engines"),
            "LLORCH_MODEL_DIR": str(self.cwd / name / "models"),
            "LLORCH_DEVICES": "cpu",
            "LLORCH_MODEL_ROOTS": str(self.cwd),
        }
        return self.stack.enter_context(self._component("agent", f"agent-{name}.log", **environment))

    def apply(self, **spec: Any) -> None:
        body = {"apiVersion": "llorch.dev/v1alpha1", "kind": "GPUPool", "metadata": {"name": "chat"}, "spec": spec}
        self.api.kubectl("apply", "-f", "-", input=json.dumps(body))

    def get(self, *words: str, path: str) -> str:
        return self.api.kubectl("get", *words, "-o", f"jsonpath={path}", check=False).stdout

    def ask(self) -> str:
        pieces = self.client.chat.completions.create(
            model="chat", messages=[{"role": "user", "content": "hi"}], max_tokens=12, stream=True
        )
        return "".join(event.choices[0].delta.content or "" for event in pieces if event.choices)


@pytest.fixture
def story(no_resources: ApiServer, tmp_path: Path) -> Iterator[Story]:
    write_tiny(tmp_path / "m.gguf")
    with ExitStack() as stack:
        told = Story(no_resources, tmp_path, stack)
        stack.enter_context(told.client)
        yield told
    for kind in ("gpupools", "gpunodes", "pods"):
        no_resources.kubectl("delete", kind, "--all", "--grace-period=0", "--force", check=False)


@pytest.mark.timeout(240)
def test_from_yaml_to_a_streamed_answer_and_through_a_dead_node(story: Story) -> None:
    story.operator()
    story.gateway()
    agents = {name: story.agent(name) for name in ("n1", "n2")}
    until(lambda: story.get("gpunodes", path="{.items[*].status.phase}") == "Online Online")

    story.apply(model={"source": f"file:{story.cwd}/m.gguf"}, replicas=2, contextTokens=512, placement={"allowCPU": True})
    story.api.kubectl("wait", "--for=condition=Available", "gpupool/chat", "--timeout=60s")
    until(lambda: story.get("gpupool", "chat", path="{.status.ready}") == "2")
    assert len(story.ask()) > 5
    table = story.api.kubectl("get", "gpupools").stdout.splitlines()[1].split()
    assert table[2:7] == ["2", "2", "8", "2", "AllReady"]
    urls = story.get("gpupool", "chat", path="{.status.endpoints.*.url}")
    assert "10.9.9.9" not in urls

    # A frozen agent: out of the gateway's routing at once, Offline after the time-out, replaced after the grace.
    victim = story.get("gpupool", "chat", path="{.status.endpoints.*.node}").split()[0]
    agents[victim].send_signal(signal.SIGSTOP)
    frozen = time.monotonic()
    slowest = 0.0
    for _ in range(6):
        asked = time.monotonic()
        assert len(story.ask()) > 5
        slowest = max(slowest, time.monotonic() - asked)
    assert slowest < 5
    until(lambda: story.get("gpunode", victim, path="{.status.phase}") in ("Offline", "Lost"))
    assert time.monotonic() - frozen < 12
    other = ({"n1", "n2"} - {victim}).pop()
    until(lambda: story.get("gpupool", "chat", path="{.status.endpoints.*.node}").split() == [other, other], 60)

    # Thawed, it takes its place again, without a second copy of what was moved.
    agents[victim].send_signal(signal.SIGCONT)
    until(lambda: story.get("gpunode", victim, path="{.status.phase}") == "Online")
    until(lambda: story.get("gpunode", victim, path="{.status.replicas}") in ("", "{}"))
    assert len(story.ask()) > 5

    story.api.kubectl("delete", "gpupool", "chat")
    until(lambda: story.get("gpunodes", path="{.items[*].spec.replicas}").replace("{}", "").strip() == "")
    until(lambda: story.get("gpunodes", path="{.items[*].status.replicas}").replace("{}", "").strip() == "")


@pytest.mark.timeout(120)
def test_what_serves_keeps_serving_without_an_operator(story: Story) -> None:
    operator = story.operator()
    story.gateway()
    story.agent("n1")
    story.apply(model={"source": f"file:{story.cwd}/m.gguf"}, contextTokens=512, placement={"allowCPU": True})
    story.api.kubectl("wait", "--for=condition=Available", "gpupool/chat", "--timeout=60s")
    until(lambda: "chat" in [model.id for model in story.client.models.list()])
    operator.send_signal(signal.SIGKILL)
    operator.wait()
    for _ in range(3):
        assert len(story.ask()) > 5
    story.operator()
    time.sleep(3)
    assert story.get("gpupool", "chat", path="{.status.ready}") == "1"
    assert len(story.ask()) > 5


def test_an_operator_without_crds_says_what_to_install(api_server: ApiServer, tmp_path: Path) -> None:
    missing = api_server.kubectl("get", "crd", "gpunodes.llorch.dev", check=False).returncode != 0
    if not missing:
        api_server.kubectl("delete", "crd", "gpunodes.llorch.dev", "gpupools.llorch.dev")
    environment = {**os.environ, "LLORCH_STORE": "kubernetes", "KUBECONFIG": str(api_server.kubeconfig)}
    try:
        done = subprocess.run(
            [LLORCH, "operator"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=30, check=False
        )
        assert done.returncode == 2
        assert "llorch: the CRD gpunodes.llorch.dev is not installed — kubectl apply -f crds/gpunodes.yaml" in done.stderr
    finally:
        if not missing:
            crds = Path(__file__).parents[2] / "crds"
            api_server.kubectl("apply", "--server-side", *(f"--filename={path}" for path in sorted(crds.glob("*.yaml"))))
            names = ("crd/gpunodes.llorch.dev", "crd/gpupools.llorch.dev")
            api_server.kubectl("wait", "--for=condition=Established", "--timeout=30s", *names)
