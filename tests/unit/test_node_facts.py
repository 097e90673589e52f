"""What is copied of a Node's labels."""

from __future__ import annotations

from llorch_agent.node_facts import facts_of


def test_zone_and_cordon_are_copied():
    facts = facts_of({"topology.kubernetes.io/zone": "eu-1a", "rack": "r1"}, unschedulable=True)
    assert (facts.zone, facts.unschedulable, facts.labels["rack"]) == ("eu-1a", True, "r1")


def test_of_too_many_labels_those_of_discovery_tools_go_first():
    noise = {f"feature.node.kubernetes.io/cpu-{number}": "true" for number in range(80)}
    facts = facts_of({**noise, "nvidia.com/gpu.product": "NVIDIA-L4", "rack": "r1"}, unschedulable=False)
    assert facts.labels == {"nvidia.com/gpu.product": "NVIDIA-L4", "rack": "r1"}


def test_never_more_than_the_api_takes():
    assert len(facts_of({f"team/{number:03d}": "x" for number in range(100)}, unschedulable=False).labels) == 64
