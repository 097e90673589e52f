"""Which pod holds which device, out of the kubelet's own bytes."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fixtures.kubelet import answer, pod
from llorch_agent.core.pod_devices import PodDevices, held, parse
from llorch_agent.core.readings import DeviceReading

GPUS = [
    DeviceReading(uuid="GPU-0", minor=0),
    DeviceReading(uuid="MIG-a", parent="GPU-1", minor=1),
    DeviceReading(uuid="MIG-b", parent="GPU-1", minor=1),
    DeviceReading(uuid="cpu", kind="cpu"),
]


@pytest.mark.parametrize(
    ("message", "uuids", "minors"),
    [
        (pod("t", {"nvidia.com/gpu": ["GPU-0", "GPU-1"]}), {"GPU-0", "GPU-1"}, set()),
        (pod("t", {"nvidia.com/mig-1g.10gb": ["MIG-a"]}), {"MIG-a"}, set()),
        (pod("t", {"nvidia.com/gpu": ["GPU-0::3"]}), {"GPU-0"}, set()),
        (pod("t", {"nvidia.com/gpu.shared": ["GPU-0::0"]}), {"GPU-0"}, set()),
        (pod("t", claims=[("gpu.nvidia.com", "gpu-2")]), set(), {2}),
        (pod("t", claims=[("gpu.nvidia.com", "gpu-1-mig-1g.10gb-19-0")]), set(), {1}),
    ],
)
def test_each_way_to_hold_a_gpu_is_seen(message: bytes, uuids: set[str], minors: set[int]):
    assert parse(answer([message])) == [PodDevices("ml/t", frozenset(uuids), frozenset(minors))]


@pytest.mark.parametrize(
    "message",
    [
        pod("web"),
        pod("net", {"intel.com/sriov": ["0000:00:02.0"]}),
        pod("net", {"nvidia.com/hostdev": ["0000:00:02.0"]}),
        pod("t", claims=[("compute-domain.nvidia.com", "gpu-0")]),
    ],
)
def test_pods_without_gpus_hold_none(message: bytes):
    assert parse(answer([message])) == []


def test_our_own_pod_holds_nothing_against_us():
    pods = parse(answer([pod("agent-x", {"nvidia.com/gpu": ["GPU-0"]}, namespace="llorch")]))
    assert [each.held_by for each in held(GPUS, pods, "llorch/agent-x")] == ["", "", "", ""]
    assert [each.held_by for each in held(GPUS, pods, "llorch/agent-y")] == ["llorch/agent-x", "", "", ""]


def test_a_claim_on_one_instance_holds_all_of_its_gpu_and_a_gpu_holds_its_instances():
    claimed = parse(answer([pod("t", claims=[("gpu.nvidia.com", "gpu-1-mig-1g.10gb-19-0")])]))
    assert [each.held_by for each in held(GPUS, claimed, "")] == ["", "ml/t", "ml/t", ""]
    whole = parse(answer([pod("t", {"nvidia.com/gpu": ["GPU-1"]})]))
    assert [each.held_by for each in held(GPUS, whole, "")] == ["", "ml/t", "ml/t", ""]
    one = parse(answer([pod("t", {"nvidia.com/mig-1g.10gb": ["MIG-b"]})]))
    assert [each.held_by for each in held(GPUS, one, "")] == ["", "", "ml/t", ""]


def test_a_gpu_of_unknown_number_is_no_claims():
    claimed = parse(answer([pod("t", claims=[("gpu.nvidia.com", "gpu-0")])]))
    assert held([DeviceReading(uuid="GPU-9")], claimed, "")[0].held_by == ""


def test_an_answer_that_is_cut_off_is_an_error_or_less_and_never_a_crash():
    whole = answer([pod("t", {"nvidia.com/gpu": ["GPU-0"]}, claims=[("gpu.nvidia.com", "gpu-1")])])
    for size in range(1, len(whole)):
        with pytest.raises(ValueError, match="cut off"):
            parse(whole[:size])


@given(st.binary(max_size=200))
def test_any_bytes_are_an_answer_or_a_value_error(data: bytes):
    with contextlib.suppress(ValueError):
        parse(data)
