"""The CRDs on a real API server: what is good is taken, what is bad is refused with a line that helps."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

pytestmark = pytest.mark.functional

GOOD: dict[str, Any] = {"model": {"source": "file:/models/m.gguf"}}


def manifest(name: str, spec: dict[str, Any]) -> str:
    return yaml.safe_dump({"apiVersion": "llorch.dev/v1alpha1", "kind": "GPUPool", "metadata": {"name": name}, "spec": spec})


def apply(api: Any, text: str) -> Any:
    return api.kubectl("apply", "-f", "-", input=text, check=False)


@pytest.mark.parametrize(
    "spec",
    [
        GOOD,
        {"model": {"source": "https://host/m.gguf", "sha256": "a" * 64, "aliases": ["gpt", "best"]}, "replicas": 0},
        {"model": {"source": "hf:org/repo/file.gguf@main"}, "slots": 16, "contextTokens": 131072},
        {
            "model": {"source": "s3://bucket/key.gguf"},
            "engine": {"kvCacheType": "q8_0", "args": ["--temp", "0.7", "--seed", "-1"]},
        },
        {
            **GOOD,
            "placement": {"nodeSelector": {"a": "b"}, "gpuSelector": {"name": "L4", "minVramMiB": "20000"}, "strategy": "pack"},
        },
        {**GOOD, "placement": {"pin": "n1", "avoid": ["n2"], "allowSplit": True, "allowCPU": True}},
    ],
)
def test_good_pools_are_accepted(crds: Any, spec: dict[str, Any]) -> None:
    done = apply(crds, manifest("good", spec))
    assert done.returncode == 0, done.stderr
    crds.kubectl("delete", "gpupool", "good")


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ({}, "spec.model: Required value"),
        ({"model": {}}, "spec.model.source: Required value"),
        ({"model": {"source": "ftp://x/y"}}, "'ftp://x/y' must be file:/path, https://…, hf:org/repo"),
        ({"model": {"source": "http://x/y"}}, "must be file:/path, https://…"),
        ({"model": {"source": "file:/m", "sha256": "xyz"}}, "spec.model.sha256"),
        ({**GOOD, "replicas": -1}, "spec.replicas in body should be greater than or equal to 0"),
        ({**GOOD, "replicas": 1001}, "spec.replicas in body should be less than or equal to 1000"),
        ({**GOOD, "slots": 0}, "spec.slots in body should be greater than or equal to 1"),
        ({**GOOD, "contextTokens": 10}, "spec.contextTokens in body should be greater than or equal to 256"),
        ({**GOOD, "engine": {"kvCacheType": "int3"}}, 'Unsupported value: "int3"'),
        ({**GOOD, "engine": {"args": ["--port", "1"]}}, "only llama-server arguments that open no port, path or log may be set"),
        ({**GOOD, "placement": {"strategy": "random"}}, 'supported values: "pack", "spread"'),
        ({**GOOD, "placement": {"pin": "a", "avoid": ["a"]}}, "pin names a node that avoid excludes"),
        ({**GOOD, "placement": {"gpuSelector": {"vram": "1"}}}, "keys are name, minVramMiB and minComputeCapability"),
        ({**GOOD, "placement": {"gpuSelector": {"minVramMiB": "20Gi"}}}, "minVramMiB must be a whole number of MiB"),
        ({**GOOD, "replcas": 2}, 'unknown field "spec.replcas"'),
    ],
)
def test_bad_pools_are_refused_with_a_readable_message(crds: Any, spec: dict[str, Any], said: str) -> None:
    done = apply(crds, manifest("bad", spec))
    assert done.returncode != 0
    assert said in done.stderr
    assert crds.kubectl("get", "gpupool", "bad", check=False).returncode != 0


def test_explain_reads_well(crds: Any) -> None:
    text = crds.kubectl("explain", "gpunode.status").stdout
    for words in ("The liveness token.", "Devices by UUID.", "Engines by replica id.", "derived by the"):
        assert words in text
    assert "Concurrent sequences per replica." in crds.kubectl("explain", "gpupool.spec.slots").stdout


def test_a_pool_scales_by_kubectl_scale(crds: Any) -> None:
    apply(crds, manifest("elastic", GOOD))
    crds.kubectl("scale", "gpupool", "elastic", "--replicas=5")
    assert crds.kubectl("get", "gpupool", "elastic", "-o", "jsonpath={.spec.replicas}").stdout == "5"
    crds.kubectl("delete", "gpupool", "elastic")


def test_short_names_and_the_category_find_ours(crds: Any) -> None:
    apply(crds, manifest("named", GOOD))
    for words in (("lgp",), ("gpupools.llorch.dev",), ("llorch",)):
        assert "named" in crds.kubectl("get", *words).stdout
    crds.kubectl("delete", "lgp", "named")


def test_the_columns_are_those_that_users_were_promised(crds: Any) -> None:
    apply(crds, manifest("columns", GOOD))
    header = crds.kubectl("get", "gpupools").stdout.splitlines()[0].split()
    assert header == ["NAME", "MODEL", "DESIRED", "READY", "SLOTS", "NODES", "STATUS", "AGE"]
    crds.kubectl("delete", "gpupool", "columns")
