"""The chart renders what the design says, and refuses values that do not fit. Needs helm, no cluster."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from llorch_api import GPUPool
from llorch_api.gpunode import AGENT_STATUS_FIELDS, GPUNodeStatus
from llorch_api.gpupool import GPUPoolStatus

pytestmark = pytest.mark.functional

ROOT = Path(__file__).parents[2]
CHART = ROOT / "charts" / "llorch"


@pytest.fixture(scope="session")
def helm() -> str:
    """Path of helm: built by tests/cluster/tools.sh where there is none."""
    built = Path(os.environ.get("LLORCH_CACHE", Path.home() / ".cache" / "llorch")) / "cluster" / "bin" / "helm"
    if built.exists():
        return str(built)
    if found := shutil.which("helm"):
        return found
    subprocess.run([ROOT / "tests" / "cluster" / "tools.sh", "helm"], check=True, timeout=900)
    return str(built)


def render(helm: str, *arguments: str) -> list[dict[str, Any]]:
    done = subprocess.run(
        [helm, "template", "llorch", CHART, "--namespace", "serving", *arguments], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return [document for document in yaml.safe_load_all(done.stdout) if document]


def one(documents: list[dict[str, Any]], kind: str, name: str) -> dict[str, Any]:
    [found] = [d for d in documents if d["kind"] == kind and d["metadata"]["name"] == name]
    return found


def container(workload: dict[str, Any]) -> dict[str, Any]:
    [only] = workload["spec"]["template"]["spec"]["containers"]
    return only


def verbs(role: dict[str, Any]) -> dict[str, set[str]]:
    return {
        f"{group}/{resource}": set(r["verbs"]) for r in role["rules"] for group in r["apiGroups"] for resource in r["resources"]
    }


def test_the_chart_lints_clean(helm: str) -> None:
    done = subprocess.run([helm, "lint", "--strict", CHART], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "[WARNING]" not in done.stdout + done.stderr


def test_every_document_of_the_default_install_is_known(helm: str) -> None:
    found = sorted(f"{d['kind']}/{d['metadata']['name']}" for d in render(helm))
    assert found == [
        "ClusterRole/llorch-agent",
        "ClusterRole/llorch-operator",
        "ClusterRoleBinding/llorch-agent",
        "ClusterRoleBinding/llorch-operator",
        "DaemonSet/llorch-agent",
        "Deployment/llorch-gateway",
        "Deployment/llorch-operator",
        "PriorityClass/llorch-agent",
        "Role/llorch-gateway",
        "Role/llorch-operator",
        "RoleBinding/llorch-gateway",
        "RoleBinding/llorch-operator",
        "Secret/llorch-token",
        "Service/llorch-gateway",
        "ServiceAccount/llorch-agent",
        "ServiceAccount/llorch-gateway",
        "ServiceAccount/llorch-operator",
        "ValidatingAdmissionPolicy/llorch-agent-own-node",
        "ValidatingAdmissionPolicyBinding/llorch-agent-own-node",
    ]


def test_every_container_runs_unprivileged_on_a_read_only_root_with_probes(helm: str) -> None:
    workloads = [d for d in render(helm) if d["kind"] in ("Deployment", "DaemonSet")]
    assert len(workloads) == 3
    for workload in workloads:
        pod, main = workload["spec"]["template"]["spec"], container(workload)
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert main["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert all(main[probe]["httpGet"]["path"] == "/health" for probe in ("startupProbe", "readinessProbe", "livenessProbe"))
        assert {"name": "LLORCH_API_TOKEN_FILE", "value": "/etc/llorch/token"} in main["env"]


def test_there_is_one_operator_and_the_old_one_ends_before_the_next_starts(helm: str) -> None:
    operator = one(render(helm), "Deployment", "llorch-operator")
    assert operator["spec"]["replicas"] == 1
    assert operator["spec"]["strategy"] == {"type": "Recreate"}


def test_the_agent_says_where_it_is_from_the_downward_api(helm: str) -> None:
    environment = {
        e["name"]: e.get("value", e.get("valueFrom")) for e in container(one(render(helm), "DaemonSet", "llorch-agent"))["env"]
    }
    assert environment["NODE_NAME"] == {"fieldRef": {"fieldPath": "spec.nodeName"}}
    assert environment["POOL_MANAGERD_NODE_ID"] == "$(NODE_NAME)"
    assert environment["POOL_MANAGERD_ADDRESS"] == "http://$(POD_IP):9200"
    assert environment["POOL_MANAGERD_ADDR"] == "0.0.0.0:9200"


def test_each_component_may_do_what_it_does_and_nothing_else(helm: str) -> None:
    documents = render(helm)
    assert verbs(one(documents, "Role", "llorch-gateway")) == {"llorch.dev/gpupools": {"get", "list", "watch"}}
    agent = verbs(one(documents, "ClusterRole", "llorch-agent"))
    assert agent["llorch.dev/gpunodes/status"] == {"patch"}
    assert agent["/nodes"] == {"get"}
    operator = verbs(one(documents, "ClusterRole", "llorch-operator"))
    assert operator["llorch.dev/gpupools/status"] == {"patch"}
    # Nobody deletes nodes, reads secrets, or has a wildcard.
    for role in (d for d in documents if d["kind"] in ("Role", "ClusterRole")):
        granted = verbs(role)
        assert "/secrets" not in granted
        assert "delete" not in granted.get("llorch.dev/gpunodes", set())
        assert not any("*" in key or "*" in value for key, value in granted.items())


def test_the_gateway_reads_the_pools_of_the_namespace_that_it_serves(helm: str) -> None:
    documents = render(helm, "--set", "gateway.namespace=models")
    assert one(documents, "Role", "llorch-gateway")["metadata"]["namespace"] == "models"
    assert {"name": "LLORCH_NAMESPACE", "value": "models"} in container(one(documents, "Deployment", "llorch-gateway"))["env"]


def test_the_admission_policy_names_every_field_that_is_not_the_agents(helm: str) -> None:
    policy = one(render(helm), "ValidatingAdmissionPolicy", "llorch-agent-own-node")
    rules = " ".join(v["expression"] for v in policy["spec"]["validations"])
    pool = {field.alias or name for name, field in GPUPoolStatus.model_fields.items()} - {"replicas"}
    node = {field.alias or name for name, field in GPUNodeStatus.model_fields.items()} - set(AGENT_STATUS_FIELDS)
    missing = [name for name in sorted(pool | node) if f"object.?status.?{name} == oldObject.?status.?{name}" not in rules]
    assert not missing
    assert "system:serviceaccount:serving:llorch-agent" in policy["spec"]["matchConditions"][0]["expression"]


@pytest.mark.parametrize(
    ("access", "limits", "visible"),
    [("request", {"nvidia.com/gpu": 4}, None), ("dra", None, None), ("visible", None, "all"), ("none", None, None)],
)
def test_gpus_are_requested_or_made_visible_as_asked(helm: str, access: str, limits: object, visible: str | None) -> None:
    agent = container(one(render(helm, "--set", f"agent.gpuAccess={access},agent.gpusPerNode=4"), "DaemonSet", "llorch-agent"))
    assert agent["resources"].get("limits") == limits
    assert next((e["value"] for e in agent["env"] if e["name"] == "NVIDIA_VISIBLE_DEVICES"), None) == visible


def test_dra_claims_all_gpus_of_a_node_whatever_their_number(helm: str) -> None:
    documents = render(helm, "--set", "agent.gpuAccess=dra")
    template = one(documents, "ResourceClaimTemplate", "llorch-agent-gpus")
    assert template["apiVersion"] == "resource.k8s.io/v1"
    [request] = template["spec"]["spec"]["devices"]["requests"]
    assert request == {"name": "gpus", "exactly": {"deviceClassName": "gpu.nvidia.com", "allocationMode": "All"}}
    agent = one(documents, "DaemonSet", "llorch-agent")
    assert agent["spec"]["template"]["spec"]["resourceClaims"] == [
        {"name": "gpus", "resourceClaimTemplateName": "llorch-agent-gpus"}
    ]
    assert container(agent)["resources"]["claims"] == [{"name": "gpus"}]
    for access in ("request", "visible", "none"):
        others = render(helm, "--set", f"agent.gpuAccess={access}")
        assert not [d for d in others if d["kind"] == "ResourceClaimTemplate"]
        assert "claims" not in container(one(others, "DaemonSet", "llorch-agent"))["resources"]


@pytest.mark.parametrize("access", ["request", "dra", "visible"])
def test_the_kubelets_socket_reaches_the_agent_through_a_container_that_can_do_nothing_else(helm: str, access: str) -> None:
    agent = one(render(helm, "--set", f"agent.gpuAccess={access}"), "DaemonSet", "llorch-agent")
    pod = agent["spec"]["template"]["spec"]
    [relay] = [each for each in pod["initContainers"] if each["name"] == "pod-resources"]
    assert relay["restartPolicy"] == "Always"
    assert relay["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    assert relay["securityContext"]["readOnlyRootFilesystem"] is True
    assert sorted(each["name"] for each in relay["volumeMounts"]) == ["kubelet", "pods"]
    assert next(each for each in relay["volumeMounts"] if each["name"] == "kubelet")["readOnly"] is True
    own = container(agent)
    assert "kubelet" not in [each["name"] for each in own["volumeMounts"]]
    environment = {each["name"]: each.get("value") for each in own["env"]}
    assert environment["LLORCH_POD_RESOURCES"] == "/run/llorch/pods.sock"
    assert environment["LLORCH_POD"] == "serving/$(POD_NAME)"


@pytest.mark.parametrize("value", ["agent.gpuAccess=none", "agent.podResources.enabled=false"])
def test_without_need_for_it_the_kubelets_socket_is_not_mounted(helm: str, value: str) -> None:
    agent = one(render(helm, "--set", value), "DaemonSet", "llorch-agent")
    assert "kubelet" not in str(agent)
    assert "LLORCH_POD_RESOURCES" not in [each["name"] for each in container(agent)["env"]]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("agent.gpuAccess=all", "/agent/gpuAccess': value must be one of 'request', 'dra', 'visible', 'none'"),
        ("operator.nodeTimeoutMs=10", "/operator/nodeTimeoutMs': minimum: got 10, want 5,000"),
        ("agent.heartbeet=1", "/agent': additional properties 'heartbeet' not allowed"),
        ("gateway.service.type=Nodeport", "/gateway/service/type': value must be one of 'ClusterIP', 'NodePort', 'LoadBalancer'"),
        ("agent.modelsHostPath=models", "/agent/modelsHostPath': 'models' does not match pattern"),
        ("agent.podResources.hostPath=kubelet", "/agent/podResources/hostPath': 'kubelet' does not match pattern"),
        ("gateway.replicas=0", "/gateway/replicas': minimum: got 0, want 1"),
    ],
)
def test_a_value_that_does_not_fit_is_refused_by_name(helm: str, value: str, message: str) -> None:
    done = subprocess.run([helm, "template", "llorch", CHART, "--set", value], capture_output=True, text=True, timeout=60)
    assert done.returncode != 0
    assert message in done.stderr


def test_the_chart_installs_the_generated_crds() -> None:
    for plural in ("gpunodes", "gpupools"):
        assert (CHART / "crds" / f"{plural}.yaml").read_text() == (ROOT / "crds" / f"{plural}.yaml").read_text()


@pytest.mark.parametrize("path", sorted((ROOT / "deploy" / "examples").glob("pool-*.yaml")), ids=lambda path: path.name)
def test_the_example_pools_are_valid(path: Path) -> None:
    pools = [GPUPool.model_validate(document) for document in yaml.safe_load_all(path.read_text())]
    assert pools


def test_lease_mode_gives_agents_a_lease_of_their_own_and_no_other(helm: str) -> None:
    documents = render(helm, "--set", "agent.heartbeat.mode=lease")
    env = {each["name"]: each for each in container(one(documents, "DaemonSet", "llorch-agent"))["env"]}
    assert env["LLORCH_HEARTBEAT_MODE"]["value"] == "lease"
    assert env["LLORCH_NAMESPACE"]["valueFrom"]["fieldRef"]["fieldPath"] == "metadata.namespace"
    assert verbs(one(documents, "Role", "llorch-agent")) == {"coordination.k8s.io/leases": {"create", "patch"}}
    assert {"list", "watch"} <= verbs(one(documents, "Role", "llorch-operator"))["coordination.k8s.io/leases"]
    policy = one(documents, "ValidatingAdmissionPolicy", "llorch-agent-own-lease")["spec"]
    assert policy["matchConstraints"]["resourceRules"][0]["resources"] == ["leases"]
    assert one(documents, "ValidatingAdmissionPolicyBinding", "llorch-agent-own-lease")["spec"]["validationActions"] == ["Deny"]
    assert not [d for d in render(helm) if d["kind"] == "Role" and d["metadata"]["name"] == "llorch-agent"]


def test_the_node_api_is_off_unless_asked_for_and_then_has_a_service_and_may_make_nodes(helm: str) -> None:
    off = render(helm)
    assert not [document for document in off if document["kind"] == "Service" and "operator" in document["metadata"]["name"]]
    [role] = [d for d in off if d["kind"] == "ClusterRole" and d["metadata"]["name"] == "llorch-operator"]
    assert not any({"create", "delete"} & set(rule["verbs"]) for rule in role["rules"] if rule["resources"] == ["gpunodes"])

    on = render(helm, "--set", "operator.nodeApi.enabled=true", "--set", "operator.nodeApi.service.type=NodePort")
    service = one(on, "Service", "llorch-operator")
    assert (service["spec"]["type"], service["spec"]["ports"][0]["port"]) == ("NodePort", 8080)
    variables = {item["name"]: item.get("value") for item in container(one(on, "Deployment", "llorch-operator"))["env"]}
    assert variables["ORCHESTRATORD_CLOUD_PROFILE"] == "true"
    [role] = [d for d in on if d["kind"] == "ClusterRole" and d["metadata"]["name"] == "llorch-operator"]
    assert any({"create", "delete"} == set(rule["verbs"]) for rule in role["rules"] if rule["resources"] == ["gpunodes"])


def test_an_agents_drain_begins_with_the_pods_pre_stop_hook(helm: str) -> None:
    workload = one(render(helm), "DaemonSet", "llorch-agent")
    assert container(workload)["lifecycle"]["preStop"]["exec"]["command"] == ["sh", "-c", "kill -TERM 1"]
