"""A replica on several GPUs puts on each what the operator reckoned with, whatever is free when it starts."""

from __future__ import annotations

import json

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from llorch_agent.core.engine_args import command_line
from llorch_agent.core.handoff import Launch, launch_document, parse
from llorch_api import AssignedDevice, AssignedModel, Assignment, ModelShape
from llorch_model.core.vram import estimate, memory_settings, split_need

SHAPE = ModelShape(
    architecture="llama",
    layers=80,
    embedding_length=8192,
    vocab_size=128_256,
    weights_mib=38_706,
    host_mib=563,
    kv_key_elements=80 * 1024,
    kv_value_elements=80 * 1024,
)
ARGS = ["--cache-type-k", "q8_0", "--cache-type-v", "q8_0", "--ubatch-size", "256"]


def assigned(shares: dict[str, int], shape: ModelShape = SHAPE) -> Launch:
    assignment = Assignment(
        pool="chat",
        namespace="default",
        revision="r1",
        model=AssignedModel(source="file:/m.gguf", digest="sha256:1", shape=shape),
        devices={uuid: AssignedDevice(vram_mib=mib) for uuid, mib in shares.items()},
        slots=4,
        context_tokens=4096,
        engine_args=ARGS,
    )
    launch = parse(launch_document("chat-abcde", assignment, "/m.gguf"))
    assert isinstance(launch, Launch)
    return launch


def option(launch: Launch) -> str | None:
    line = command_line(launch, 1, frozenset())
    return line[line.index("--tensor-split") + 1] if "--tensor-split" in line else None


@given(free=st.lists(st.integers(4_000, 80_000), min_size=2, max_size=8))
def test_each_gpu_gets_its_share_of_weights_and_cache_and_its_own_buffers_fit_beside(free: list[int]):
    need = estimate(SHAPE, slots=4, context_tokens=4096, kv_cache_type="q8_0", ubatch=256, devices=len(free))
    shares = split_need(need, free)
    assume(shares is not None)
    assert shares is not None
    launch = assigned({f"GPU-{number}": share for number, share in enumerate(shares)})
    model = need.weights_mib + need.kv_mib
    for share, part in zip(shares, launch.tensor_split, strict=True):
        assert part + need.step_mib + need.overhead_mib == share
        # One layer more than its part of the whole is the most that a GPU is given.
        assert model * part / sum(launch.tensor_split) + need.step_mib + need.overhead_mib <= share + 1
    assert option(launch) == ",".join(map(str, launch.tensor_split))


@pytest.mark.parametrize("shares", [{"GPU-0": 40_000}, {"cpu": 40_000}])
def test_one_device_needs_no_split(shares: dict[str, int]):
    launch = assigned(shares)
    assert launch.tensor_split == ()
    assert option(launch) is None


def test_shares_that_hold_not_even_the_buffers_split_as_they_are():
    launch = assigned({"GPU-0": 9_000, "GPU-1": 100})
    assert launch.tensor_split == ()
    assert option(launch) == "9000,100"


def test_a_split_for_another_number_of_gpus_is_not_used():
    document = {"pool_id": "a", "replica_id": "r0", "model": "/m.gguf", "devices": {"GPU-0": 3, "GPU-1": 1}, "tensor_split": [5]}
    launch = parse(json.dumps(document).encode())
    assert isinstance(launch, Launch)
    assert option(launch) == "3,1"


def test_the_kv_type_of_an_assignment_is_read_from_its_arguments():
    assert memory_settings(ARGS).kv_cache_type == "q8_0"
    assert memory_settings(["--cache-type-k=q4_0"]).kv_cache_type == "q4_0"
    assert memory_settings([]).kv_cache_type == "f16"


def test_only_engines_on_gpus_with_a_known_model_are_remembered():
    assert len(assigned({"GPU-0": 40_000}).memory_key) == 12
    assert assigned({"cpu": 40_000}).memory_key == ""
    one, two = assigned({"GPU-0": 40_000}), assigned({"GPU-1": 20_000, "GPU-2": 20_000})
    assert one.memory_key != two.memory_key
