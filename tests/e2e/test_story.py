"""From `helm install` to the last engine gone, as a user lives it, with the defaults of the chart."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import openai
import pytest
from fleet import NAMESPACE, Fleet, ForeignCluster, eventually, require_own_context
from hardware import WORKERS
from machine import ROOT
from traffic import SteadyTraffic

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(240)]

POOL = ROOT / "deploy" / "examples" / "pool-tiny.yaml"
HUGE = """
apiVersion: llorch.dev/v1alpha1
kind: GPUPool
metadata: {name: huge}
spec:
  model: {source: "file:/models/tiny.gguf"}
  replicas: 1
  slots: 256
  contextTokens: 1048576
"""


@pytest.fixture
def client(fleet: Fleet) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{fleet.gateway_url}/v1", api_key="unused", max_retries=0, timeout=30) as made:
        yield made


def stream(client: openai.OpenAI, model: str = "tiny") -> list[str]:
    """The pieces of one streamed chat."""
    chunks = client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": "Tell me a story"}], max_tokens=16, stream=True
    )
    return [chunk.choices[0].delta.content for chunk in chunks if chunk.choices and chunk.choices[0].delta.content]


def install(fleet: Fleet) -> str:
    chart = str(ROOT / "charts" / "llorch")
    return fleet.helm("install", "llorch", chart, "-f", str(fleet.values), "--wait", "--timeout", "3m", timeout=200)


def test_a_kube_context_that_is_not_the_tests_own_is_refused(tmp_path: Path) -> None:
    kubeconfig = tmp_path / "config"
    kubeconfig.write_text(
        "current-context: production\n"
        "contexts: [{name: production, context: {cluster: production, user: me}}]\n"
        "clusters: [{name: production, cluster: {server: 'https://203.0.113.7:6443'}}]\n"
    )
    with pytest.raises(ForeignCluster, match="nothing was touched"):
        require_own_context(kubeconfig)


@pytest.mark.timeout(2700)  # on a new machine this makes the node image and the two images of llorch first
def test_helm_install_brings_every_component_up(fleet: Fleet) -> None:
    shown = fleet.helm(
        "install", "llorch", str(ROOT / "charts" / "llorch"), "-f", str(fleet.values), "--wait", "--timeout", "3m", timeout=200
    )
    assert "kubectl get gpunodes" in shown
    assert "kubectl apply" in shown


def test_agents_register_and_kubectl_shows_their_gpus_with_true_numbers(fleet: Fleet) -> None:
    eventually("both nodes Online", lambda: [fleet.phase(node) for node in fleet.workers] == ["Online", "Online"], seconds=30)
    rows = {row["NAME"]: row for row in fleet.table("gpunodes")}
    assert sorted(rows) == fleet.workers
    for node, gpus in zip(fleet.workers, WORKERS, strict=True):
        row = rows[node]
        assert list(row) == ["NAME", "PHASE", "GPUS", "VRAM FREE/TOTAL", "SLOTS FREE/TOTAL", "POOLS", "HEARTBEAT", "AGE"]
        assert (row["PHASE"], row["GPUS"]) == ("Online", "2")
        free, total = row["VRAM FREE/TOTAL"].removesuffix("Gi").split("/")
        assert float(free) == pytest.approx(sum(gpu.free for gpu in gpus) / 1024, abs=0.15)
        assert float(total) == pytest.approx(sum(gpu.total for gpu in gpus) / 1024, abs=0.05)
        devices = fleet.status("gpunode", node)["devices"]
        assert sorted(devices) == sorted(gpu.uuid for gpu in gpus)
        for gpu in gpus:
            shown = devices[gpu.uuid]
            assert (shown["name"], shown["vramTotalMiB"], shown["foreignMiB"]) == (gpu.name, gpu.total, gpu.foreign)
            assert gpu.free - 64 <= shown["vramFreeMiB"] <= gpu.free  # rounded down, so that a flutter writes nothing


def test_a_pool_of_two_replicas_becomes_available_one_on_each_node(fleet: Fleet) -> None:
    fleet.kubectl("apply", "-n", NAMESPACE, "-f", str(POOL))
    fleet.kubectl("wait", "-n", NAMESPACE, "gpupool/tiny", "--for=condition=Available", "--timeout=90s", timeout=100)
    eventually("both replicas in routing", lambda: sorted(fleet.endpoints("tiny").values()) == fleet.workers, seconds=60)
    assert [fleet.engines(node) for node in fleet.workers] == [1, 1]


def test_a_streamed_chat_comes_through_the_gateways_service(client: openai.OpenAI) -> None:
    assert "tiny" in [model.id for model in client.models.list()]
    assert len(stream(client)) > 4


def test_an_unknown_model_is_an_openai_404(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as refused:
        stream(client, "nobody")
    assert refused.value.code == "model_not_found"


def test_kubectl_get_gpupools_tells_the_truth(fleet: Fleet) -> None:
    [row] = fleet.table("gpupools")
    assert list(row) == ["NAME", "MODEL", "DESIRED", "READY", "SLOTS", "NODES", "STATUS", "AGE"]
    assert {title: row[title] for title in list(row)[:7]} == {
        "NAME": "tiny",
        "MODEL": "file:/models/tiny.gguf",
        "DESIRED": "2",
        "READY": "2",
        "SLOTS": "8",
        "NODES": "2",
        "STATUS": "AllReady",
    }
    eventually("the nodes show the pool", lambda: {r["POOLS"] for r in fleet.table("gpunodes")} == {"tiny"}, seconds=15)
    assert {r["SLOTS FREE/TOTAL"] for r in fleet.table("gpunodes")} == {"4/4"}


def test_a_pool_that_fits_nowhere_says_for_each_node_what_was_needed_and_what_was_free(fleet: Fleet) -> None:
    fleet.kubectl("apply", "-n", NAMESPACE, "-f", "-", stdin=HUGE)
    eventually(
        "huge is refused", lambda: fleet.get("gpupool", "huge").get("status", {}).get("reason") == "DoesNotFit", seconds=30
    )
    described = fleet.kubectl("describe", "-n", NAMESPACE, "gpupool", "huge")
    for node in fleet.workers:
        assert f"{node}: needs " in described
    assert " MiB, " in described
    assert " free of " in described
    assert "foreign 16,384" in described or "24,5" in described
    fleet.kubectl("delete", "-n", NAMESPACE, "gpupool", "huge", "--timeout=20s")


def test_an_agent_can_speak_for_its_own_node_alone(fleet: Fleet) -> None:
    first, second = fleet.workers
    agents = ("pods", "-n", NAMESPACE, "-l", "app.kubernetes.io/component=agent", f"--field-selector=spec.nodeName={first}")
    pod = fleet.kubectl("get", *agents, "-o", "jsonpath={.items[0].metadata.name}")
    bound = ("--bound-object-kind=Pod", f"--bound-object-name={pod}")
    token = fleet.kubectl("create", "token", "llorch-agent", "-n", NAMESPACE, *bound).strip()
    theirs = next(replica for replica, node in fleet.endpoints("tiny").items() if node == second)

    own, other, pool = f"gpunodes/{first}", f"gpunodes/{second}", f"namespaces/{NAMESPACE}/gpupools/tiny"
    assert fleet.patch_status_as(token, own, {"models": {}}) == "ok"
    assert "may write only the GPUNode of that name" in fleet.patch_status_as(token, other, {"models": {}})
    assert "may not change phase" in fleet.patch_status_as(token, own, {"phase": "Lost"})
    assert "may change nothing of a GPUPool" in fleet.patch_status_as(token, pool, {"ready": 7})
    forged = {"replicas": {theirs: {"node": first, "state": "Failed"}}}
    assert "may write only the replicas of its own node" in fleet.patch_status_as(token, pool, forged)
    may = ("--as=system:serviceaccount:default:llorch-agent", "-n", NAMESPACE)
    assert fleet.kubectl("auth", "can-i", "get", "secrets", *may, check=False).strip().endswith("no")


@pytest.mark.timeout(360)
def test_a_frozen_node_costs_no_request_and_its_replica_is_replaced_once(fleet: Fleet, client: openai.OpenAI) -> None:
    # given two replicas under steady traffic, and the node of one of them about to freeze
    before = fleet.endpoints("tiny")
    frozen = fleet.workers[0]
    [survivor] = [node for node in fleet.workers if node != frozen]
    [stale] = [replica for replica, node in before.items() if node == frozen]
    with SteadyTraffic(fleet.gateway_url, "tiny") as traffic:
        time.sleep(3)
        froze_at = time.monotonic()
        fleet.pause(frozen)
        try:
            last_beat = datetime.fromisoformat(fleet.get("gpunode", frozen)["status"]["heartbeat"]["time"])
            # when it is silent for the time-out, then it is Offline and out of every gateway's routing
            eventually("the frozen node is Offline", lambda: fleet.phase(frozen) == "Offline", seconds=45, pause=0.2)
            silent = (datetime.now(UTC) - last_beat).total_seconds()
            assert silent <= 35.5, f"Offline {silent:.1f} s after its last heartbeat"
            eventually("its replica is out of routing", lambda: stale not in fleet.endpoints("tiny"), seconds=3)
            assert fleet.table("gpunodes")
            # and after the grace its replica is placed again, on the node that is left
            eventually(
                "two replicas on the survivor",
                lambda: list(fleet.endpoints("tiny").values()) == [survivor, survivor],
                seconds=60 + 5 + 30,
            )
            assert fleet.engines(survivor) == 2
            assert len(stream(client)) > 4
        finally:
            fleet.unpause(frozen)
        # then the thawed node takes its place again, and the copy it still ran is gone
        eventually("the thawed node is Online", lambda: fleet.phase(frozen) == "Online", seconds=60)
        eventually("the second copy has gone", lambda: fleet.all_engines() == 2, seconds=60)
        time.sleep(5)
        assert fleet.all_engines() == 2
        assert len(fleet.endpoints("tiny")) == 2
        assert fleet.get("gpupool", "tiny")["status"]["ready"] == 2
    # and no request failed; those that met the freeze took a moment longer
    failed = [outcome for outcome in traffic.outcomes if outcome.error]
    assert not failed, [f"{o.started - froze_at:+.1f} s: {o.error}" for o in failed]
    slowest = max(traffic.outcomes, key=lambda outcome: outcome.seconds)
    print(f"Offline after {silent:.1f} s; {len(traffic.outcomes)} requests, the slowest {slowest.seconds:.2f} s")
    assert slowest.seconds <= 5, f"{slowest.seconds:.1f} s, started {slowest.started - froze_at:+.1f} s from the freeze"


def test_kubectl_scale_adds_and_removes_replicas(fleet: Fleet, client: openai.OpenAI) -> None:
    fleet.kubectl("scale", "-n", NAMESPACE, "gpupool", "tiny", "--replicas=3")
    eventually("three in routing", lambda: len(fleet.endpoints("tiny")) == 3, seconds=60)
    assert fleet.all_engines() == 3
    fleet.kubectl("scale", "-n", NAMESPACE, "gpupool", "tiny", "--replicas=1")
    eventually("one in routing", lambda: len(fleet.endpoints("tiny")) == 1, seconds=30)
    eventually("one engine", lambda: fleet.all_engines() == 1, seconds=60)
    assert len(stream(client)) > 4


def test_a_deleted_pool_leaves_no_engine(fleet: Fleet, client: openai.OpenAI) -> None:
    fleet.kubectl("delete", "-n", NAMESPACE, "gpupool", "tiny", "--timeout=20s")
    eventually("no engine is left", lambda: fleet.all_engines() == 0, seconds=60)
    eventually("no node shows the pool", lambda: {row["POOLS"] for row in fleet.table("gpunodes")} == {""}, seconds=30)
    eventually("nothing is assigned", lambda: not any(fleet.assigned(node) for node in fleet.workers), seconds=15)
    with pytest.raises(openai.NotFoundError):
        stream(client)


def test_nobody_was_refused_anything_or_failed_inside(fleet: Fleet) -> None:
    for component in ("operator", "gateway", "agent"):
        said = fleet.logs(component)
        assert said
        assert "forbidden" not in said.lower()
        assert "Traceback" not in said
    pods = fleet.kubectl("get", "pods", "-n", NAMESPACE, "-l", "app.kubernetes.io/instance=llorch", "-o", "json")
    restarts = [s["restartCount"] for pod in json.loads(pods)["items"] for s in pod["status"]["containerStatuses"]]
    assert restarts == [0] * 5


def test_helm_uninstall_leaves_the_crds_and_their_objects_and_these_can_be_deleted(fleet: Fleet) -> None:
    fleet.kubectl("apply", "-n", NAMESPACE, "-f", str(POOL))
    eventually("an engine runs", lambda: fleet.all_engines() > 0, seconds=60)
    fleet.helm("uninstall", "llorch", "--wait", "--timeout", "3m", timeout=200)
    eventually("no engine is left", lambda: fleet.all_engines() == 0, seconds=60)
    eventually("nothing of the release is left", lambda: not fleet.owned(), seconds=180)
    assert sorted(row["NAME"] for row in fleet.table("gpunodes")) == fleet.workers
    assert [row["NAME"] for row in fleet.table("gpupools")] == ["tiny"]
    fleet.kubectl("delete", "-n", NAMESPACE, "gpupools", "--all", "--timeout=20s")
    fleet.kubectl("delete", "gpunodes", "--all", "--timeout=20s")
    fleet.kubectl("delete", "crd", "gpunodes.llorch.dev", "gpupools.llorch.dev", "--timeout=30s")


def test_a_new_install_ends_what_an_earlier_one_left_on_the_nodes(fleet: Fleet) -> None:
    # given handoff files of a pool that nobody knows any more
    assert any(fleet.handoff_files(node) for node in fleet.workers)
    # when agents come that start engines from them again
    install(fleet)
    eventually("both nodes are Online", lambda: [fleet.phase(node) for node in fleet.workers] == ["Online", "Online"], seconds=30)
    # then they are ended, and the nodes are free
    eventually("no engine is left", lambda: fleet.all_engines() == 0, seconds=45)
    eventually("nothing is assigned", lambda: not any(fleet.assigned(node) for node in fleet.workers), seconds=15)
    assert {row["SLOTS FREE/TOTAL"] for row in fleet.table("gpunodes")} == {"0/0"}
