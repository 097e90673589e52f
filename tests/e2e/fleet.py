"""A kind cluster of three nodes with llorch's images and two workers with fake GPUs; and how to look at it."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import re
import ssl
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from hardware import WORKERS, write_fake_driver
from machine import CACHE, ROOT, CannotRun, Machine
from pytest_kind import KindCluster

from llorch_model.tiny import write_tiny

NAME = "llorch-e2e"
NAMESPACE = "default"
NODE_PORT = 30080
ENGINE = "llama-server|engine_shim"
"""What an engine's command line holds, whichever way it came."""


class ForeignCluster(Exception):
    """A kubeconfig that names another cluster than the tests' own."""


def require_own_context(kubeconfig: Path) -> None:
    """Refuses a kubeconfig unless its current context is the kind cluster of these tests, on this machine's loopback."""
    config = yaml.safe_load(kubeconfig.read_text()) or {}
    current = config.get("current-context")
    servers = {entry["name"]: entry["cluster"].get("server", "") for entry in config.get("clusters") or []}
    clusters = {entry["name"]: entry["context"]["cluster"] for entry in config.get("contexts") or []}
    server = servers.get(clusters.get(current, ""), "")
    if current != f"kind-{NAME}" or not server.startswith("https://127.0.0.1:"):
        raise ForeignCluster(
            f"{kubeconfig}: context {current!r} at {server!r} is not kind-{NAME} on 127.0.0.1; nothing was touched"
        )


def eventually(what: str, look: Callable[[], bool], *, seconds: float, pause: float = 0.5) -> float:
    """Waits until `look` is true; returns the seconds it took. Raises TimeoutError with `what`."""
    start = time.monotonic()
    while not look():
        if time.monotonic() - start > seconds:
            raise TimeoutError(f"not within {seconds:g} s: {what}")
        time.sleep(pause)
    return time.monotonic() - start


@dataclass(slots=True)
class Fleet:
    """The cluster of a test session."""

    machine: Machine
    cluster: KindCluster
    values: Path

    @property
    def workers(self) -> list[str]:
        """Names of the two GPU nodes, which are also their containers' names."""
        return [f"{NAME}-worker", f"{NAME}-worker2"]

    @property
    def gateway_url(self) -> str:
        """The gateway's Service (a NodePort) on this machine's loopback."""
        shown = subprocess.check_output(["docker", "port", f"{NAME}-control-plane", f"{NODE_PORT}/tcp"], text=True, timeout=10)
        return f"http://{shown.splitlines()[0].strip()}"

    def kubectl(self, *arguments: str, check: bool = True, stdin: str | None = None, timeout: float = 60) -> str:
        """Output of kubectl; what it says on stderr is in the AssertionError when it fails, in the output without `check`."""
        return self._run("kubectl", "--context", f"kind-{NAME}", *arguments, check=check, stdin=stdin, timeout=timeout)

    def patch_status_as(self, token: str, path: str, status: dict[str, Any]) -> str:
        """What the API server answers to a status patch by the bearer of `token`: 'ok', or why not. `path` follows the group.

        kubectl would read the subresource first, which an agent need not be allowed to.
        """
        require_own_context(self.cluster.kubeconfig_path)
        server = yaml.safe_load(self.cluster.kubeconfig_path.read_text())["clusters"][0]["cluster"]
        trust = ssl.create_default_context(cadata=base64.b64decode(server["certificate-authority-data"]).decode())
        request = urllib.request.Request(
            f"{server['server']}/apis/llorch.dev/v1alpha1/{path}/status",
            method="PATCH",
            data=json.dumps({"status": status}).encode(),
            headers={"Authorization": f"Bearer {token}", "Content-Type": "application/merge-patch+json"},
        )
        try:
            with urllib.request.urlopen(request, context=trust, timeout=10):
                return "ok"
        except urllib.error.HTTPError as refusal:
            with refusal:
                return str(json.load(refusal)["message"])

    def helm(self, *arguments: str, timeout: float = 180) -> str:
        """Output of helm."""
        return self._run("helm", *arguments, "--kube-context", f"kind-{NAME}", timeout=timeout)

    def _run(self, program: str, *arguments: str, check: bool = True, stdin: str | None = None, timeout: float = 60) -> str:
        kubeconfig = self.cluster.kubeconfig_path
        require_own_context(kubeconfig)
        done = subprocess.run(
            [self.machine.program(program), *arguments],
            input=stdin,
            capture_output=True,
            text=True,
            timeout=timeout,
            env={
                "PATH": self.machine.path,
                "HOME": os.environ.get("HOME", "/"),
                "KUBECONFIG": str(kubeconfig),
                "KUBECACHEDIR": str(kubeconfig.with_name("kubectl-cache")),
            },
        )
        if check and done.returncode:
            raise AssertionError(f"{program} {' '.join(arguments)}: exit {done.returncode}\n{done.stdout}{done.stderr}")
        return done.stdout if check else done.stdout + done.stderr

    def get(self, kind: str, name: str) -> dict[str, Any]:
        """One object as JSON; {} when there is none."""
        shown = self.kubectl("get", kind, name, "-n", NAMESPACE, "-o", "json", "--ignore-not-found")
        return dict(json.loads(shown)) if shown.strip() else {}

    def status(self, kind: str, name: str) -> dict[str, Any]:
        """Status of one object; {} when there is none."""
        return dict(self.get(kind, name).get("status", {}))

    def table(self, kind: str) -> list[dict[str, str]]:
        """`kubectl get <kind>` as a user sees it: one dict per row, by column title."""
        lines = self.kubectl("get", kind, "-n", NAMESPACE).rstrip().splitlines()
        if not lines:
            return []
        titles = list(re.finditer(r"\S+(?: \S+)*", lines[0]))
        ends = [title.start() for title in titles[1:]] + [None]
        return [{t.group(): row[t.start() : end].strip() for t, end in zip(titles, ends, strict=True)} for row in lines[1:]]

    def logs(self, component: str) -> str:
        """What the pods of a component have said."""
        return self.kubectl("logs", "-n", NAMESPACE, "-l", f"app.kubernetes.io/component={component}", "--tail=-1")

    def phase(self, node: str) -> str:
        """Phase of a GPUNode."""
        return str(self.status("gpunode", node).get("phase", ""))

    def endpoints(self, pool: str) -> dict[str, str]:
        """Replicas in routing and the nodes they are on."""
        return {replica: endpoint["node"] for replica, endpoint in self.status("gpupool", pool).get("endpoints", {}).items()}

    def assigned(self, node: str) -> list[str]:
        """Replicas that the operator wants on a node."""
        return list(self.get("gpunode", node).get("spec", {}).get("replicas", {}))

    def engines(self, node: str) -> int:
        """Engine processes on a node, whoever started them."""
        found = subprocess.run(["docker", "exec", node, "pgrep", "-fc", ENGINE], capture_output=True, text=True, timeout=20)
        return int(found.stdout.strip() or 0)

    def handoff_files(self, node: str) -> list[str]:
        """Handoff files in a node's own directory, which outlives the agent's pod."""
        listed = subprocess.run(
            ["docker", "exec", node, "ls", "/var/lib/llorch/state/engines"], capture_output=True, text=True, timeout=20
        )
        return [name for name in listed.stdout.split() if name.endswith(".json")]

    def all_engines(self) -> int:
        """Engine processes on all workers."""
        return sum(self.engines(node) for node in self.workers)

    def owned(self) -> list[str]:
        """Everything in the cluster that llorch's chart or its components made, but the CRDs and their objects."""
        kinds = (
            "deployments,daemonsets,services,pods,secrets,configmaps,serviceaccounts,roles,rolebindings,clusterroles,clusterrolebindings,"
            "priorityclasses,validatingadmissionpolicies,validatingadmissionpolicybindings,leases"
        )
        names = self.kubectl("get", kinds, "-A", "-o", "name").split()
        return [name for name in names if name.split("/")[1].startswith("llorch") and not name.split("/")[1].startswith(NAME)]

    def pause(self, node: str) -> None:
        """Freezes a node as a power failure does to its peers: it neither answers nor closes a connection."""
        subprocess.run(["docker", "pause", node], check=True, capture_output=True, timeout=30)

    def unpause(self, node: str) -> None:
        """Thaws it; harmless when it was not frozen."""
        subprocess.run(["docker", "unpause", node], capture_output=True, timeout=30)

    def report(self) -> str:
        """What one reads first after a failure."""
        label = "app.kubernetes.io/component"
        views = [
            ("get", "nodes,pods", "-A", "-o", "wide"),
            ("get", "gpunodes,gpupools", "-A", "-o", "wide"),
            ("describe", "pods", "-n", NAMESPACE),
            ("get", "gpunodes,gpupools", "-A", "-o", "yaml"),
            ("get", "events", "-A", "--sort-by=.lastTimestamp"),
            *(("logs", "-n", NAMESPACE, "-l", f"{label}={name}", "--tail=300") for name in ("gateway", "agent", "operator")),
        ]
        return "\n".join(f"$ kubectl {' '.join(view)}\n{self.kubectl(*view, check=False)}" for view in views)


def cluster_config(machine: Machine, directory: Path) -> Path:
    """kind's configuration: the workers see their fake driver and the models, the control plane publishes the gateway."""
    config = yaml.safe_load(machine.kind_config.read_text())
    models = directory / "models"
    models.mkdir(parents=True, exist_ok=True)
    write_tiny(models / "tiny.gguf")
    control_plane, *workers = config["nodes"]
    control_plane["extraPortMappings"] = [{"containerPort": NODE_PORT, "hostPort": -1, "listenAddress": "127.0.0.1"}]
    for index, (worker, gpus) in enumerate(zip(workers, WORKERS, strict=True)):
        driver = directory / f"driver-{index}"
        write_fake_driver(driver, gpus)
        worker["extraMounts"] = [
            {"hostPath": str(driver), "containerPath": "/opt/fake-nvml", "readOnly": True},
            {"hostPath": str(models), "containerPath": "/models", "readOnly": True},
        ]
    path = directory / "kind.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    return path


def chart_values(directory: Path, operator_image: str, agent_image: str) -> Path:
    """The chart's values here: these images; operator and gateway away from the nodes that the tests freeze."""
    control_plane = {
        "nodeSelector": {"node-role.kubernetes.io/control-plane": ""},
        "tolerations": [{"key": "node-role.kubernetes.io/control-plane", "operator": "Exists", "effect": "NoSchedule"}],
    }

    def image(name: str) -> dict[str, str]:
        repository, tag = name.split(":")
        return {"repository": repository, "tag": tag, "pullPolicy": "Never"}

    values = {
        "operator": {"image": image(operator_image), **control_plane},
        "gateway": {"image": image(operator_image), "service": {"type": "NodePort", "nodePort": NODE_PORT}, **control_plane},
        "agent": {
            "image": image(agent_image),
            "gpuAccess": "none",
            "extraEnv": [
                {"name": "LD_LIBRARY_PATH", "value": "/opt/fake-nvml"},
                {"name": "FAKE_NVML_CONFIG", "value": "/opt/fake-nvml/gpus.conf"},
            ],
            "extraVolumes": [{"name": "fake-nvml", "hostPath": {"path": "/opt/fake-nvml", "type": "Directory"}}],
            "extraVolumeMounts": [{"name": "fake-nvml", "mountPath": "/opt/fake-nvml", "readOnly": True}],
        },
    }
    path = directory / "values.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path


def _load(machine: Machine, image: str, nodes: list[str]) -> None:
    """Brings an image to the nodes that lack it, and takes away its predecessors."""
    name = f"docker.io/{image}"
    missing = []
    for node in nodes:
        containerd = ["docker", "exec", node, "ctr", "-n", "k8s.io", "images"]
        present = subprocess.check_output([*containerd, "ls", "-q"], text=True, timeout=30).split()
        older = [other for other in present if other.split(":")[0] == name.split(":")[0] and other != name]
        if older:
            subprocess.run([*containerd, "rm", *older], check=True, capture_output=True, timeout=60)
        if name not in present:
            missing.append(node)
    if missing:
        command = [str(machine.program("kind")), "load", "docker-image", image, "--name", NAME, "--nodes", ",".join(missing)]
        subprocess.run(command, check=True, capture_output=True, timeout=300)


@contextlib.contextmanager
def running_fleet(machine: Machine, operator_image: str, agent_image: str) -> Iterator[Fleet]:
    """The session's cluster, made in about a minute. LLORCH_KEEP_CLUSTER=1 leaves it, and uses the one that was left."""
    keep = bool(os.environ.get("LLORCH_KEEP_CLUSTER"))
    directory = CACHE / "e2e"
    directory.mkdir(parents=True, exist_ok=True)
    kubeconfig = directory / "kubeconfig"
    with contextlib.chdir(directory):  # pytest-kind makes a directory where it stands
        cluster = KindCluster(
            NAME, kubeconfig, image=machine.node_image, kind_path=machine.program("kind"), kubectl_path=machine.program("kubectl")
        )
    existing = subprocess.check_output(
        [machine.program("kind"), "get", "clusters"], text=True, stderr=subprocess.DEVNULL, timeout=30
    )
    if NAME in existing.split() and not (keep and kubeconfig.exists()):
        cluster.delete()
    if NAME not in existing.split():
        kubeconfig.unlink(missing_ok=True)
    fleet = Fleet(machine, cluster, chart_values(directory, operator_image, agent_image))
    try:
        cluster.create(cluster_config(machine, directory))
        require_own_context(kubeconfig)
        for node in fleet.workers:
            fleet.unpause(node)
        fleet.kubectl("wait", "--for=condition=Ready", "nodes", "--all", "--timeout=120s", timeout=130)
        if keep:
            clean(fleet)
        _load(machine, operator_image, [f"{NAME}-control-plane"])
        _load(machine, agent_image, fleet.workers)
        yield fleet
    finally:
        if not keep:
            cluster.delete()
            if machine.started_dockerd:
                subprocess.run([ROOT / "tests" / "cluster" / "down.sh"], check=False, timeout=60)


def clean(fleet: Fleet) -> None:
    """Removes what an earlier session left in a kept cluster, and on its nodes."""
    if "llorch" in fleet.helm("list", "-q").split():
        fleet.helm("uninstall", "llorch", "--wait")
    fleet.kubectl("delete", "crd", "gpunodes.llorch.dev", "gpupools.llorch.dev", "--ignore-not-found", "--timeout=50s")
    eventually("the agents have ended", lambda: not fleet.owned(), seconds=180)
    for node in fleet.workers:
        subprocess.run(["docker", "exec", node, "rm", "-rf", "/var/lib/llorch"], check=True, timeout=30)


__all__ = ["NAME", "NAMESPACE", "CannotRun", "Fleet", "ForeignCluster", "eventually", "require_own_context", "running_fleet"]
