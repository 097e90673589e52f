"""What a node's conditions say of its devices."""

from __future__ import annotations

from llorch_api import GPUNode, ObjectMeta
from llorch_operator.core.liveness import Liveness
from llorch_operator.core.nodes import Pulse, conditions_of, said_unmanaged, unmanaged


def reported(**devices: dict[str, object]) -> GPUNode:
    return GPUNode.model_validate({"metadata": {"name": "n1"}, "spec": {}, "status": {"devices": devices}})


def condition(of: GPUNode, kind: str) -> tuple[str, str, str]:
    [found] = [each for each in conditions_of(of, Pulse(Liveness.FRESH, True, 0)) if each.type == kind]
    return found.status.value, found.reason, found.message


def test_an_unhealthy_device_is_named_with_its_reason():
    sick = reported(g0={"health": "Unhealthy", "message": "XID 79"}, g1={"health": "Healthy"})
    assert condition(sick, "DevicesHealthy") == ("False", "DeviceUnhealthy", "g0: XID 79")


def test_memory_that_no_pod_explains_is_a_condition_without_figures_that_move():
    strange = reported(g0={"foreignMiB": 512}, g1={"foreignMiB": 511}, g2={"foreignMiB": 9_000, "heldBy": "ml/t"})
    assert unmanaged(strange) == {"g0": 512}
    expected = ("False", "UnmanagedMemory", "no pod explains 512 MiB or more in use on g0")
    assert condition(strange, "MemoryExplained") == expected
    more = reported(g0={"foreignMiB": 9_999})
    assert condition(more, "MemoryExplained") == expected
    assert condition(reported(g0={"foreignMiB": 100}), "MemoryExplained")[0] == "True"


def test_the_machines_own_memory_is_always_shared():
    assert unmanaged(reported(cpu={"kind": "cpu", "foreignMiB": 9_000})) == {}


def test_unmanaged_memory_is_told_once_even_by_an_operator_that_starts_anew():
    strange = reported(g0={"foreignMiB": 900})
    assert not said_unmanaged(strange)
    found = conditions_of(strange, Pulse(Liveness.FRESH, True, 0))
    told = GPUNode(metadata=ObjectMeta(name="n1"), status=strange.status.model_copy(update={"conditions": found}))
    assert said_unmanaged(told)
