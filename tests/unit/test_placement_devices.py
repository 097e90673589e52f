"""Devices that a replica must not or cannot use, and models whose need nobody knows."""

from __future__ import annotations

from dataclasses import replace

import pytest

from llorch_api import ModelShape, PlacementSpec
from llorch_model.core.measured import measurement_key
from llorch_operator.core.fit import Fit, fit
from llorch_operator.core.liveness import Liveness
from llorch_operator.core.refusal import Cause, Refusal
from llorch_operator.core.views import DeviceView, NodeView, PoolKey, PoolView

MLA = "deepseek2 uses latent attention (MLA): the KV figure is not exact"
PLAIN = ModelShape(architecture="llama", layers=32, embedding_length=4096, vocab_size=128_256, weights_mib=4_403)
POOL = PoolView(
    key=PoolKey("default", "chat"),
    order="1",
    revision="r1",
    replicas=1,
    slots=4,
    context_tokens=4096,
    kv_cache_type="q8_0",
    engine_args=("-ub", "256"),
    placement=PlacementSpec(),
    shape=PLAIN,
    digest="sha256:1",
    model_size=4700,
    must_fetch=False,
)
UNSIZED = replace(POOL, shape=PLAIN.model_copy(update={"caveat": MLA}))


def gpu(uuid: str, free: int = 20_000, held_by: str = "", healthy: bool = True) -> DeviceView:
    return DeviceView(uuid, "gpu", "NVIDIA L4", 24_576, free, 0, healthy, (8, 9), held_by)


def node(*devices: DeviceView) -> NodeView:
    return NodeView("n1", Liveness.FRESH, True, devices=devices, disk_free=100_000)


def seen(pool: PoolView, mib: int, devices: int = 1) -> PoolView:
    args = ["--cache-type-k", "q8_0", "--cache-type-v", "q8_0", "-ub", "256"]
    key = measurement_key("sha256:1", slots=4, context_tokens=4096, engine_args=args, devices=devices)
    return replace(pool, measured={key: mib})


def test_a_gpu_that_another_pod_holds_is_never_used_and_the_refusal_names_the_pod():
    result = fit(POOL, node(gpu("g0", held_by="ml/trainer-0")))
    assert isinstance(result, Refusal)
    assert result.cause is Cause.HELD
    assert str(result) == "n1: 1 of 1 devices match, held by another pod: ml/trainer-0"
    other = fit(POOL, node(gpu("g0", held_by="ml/trainer-0"), gpu("g1", free=9_000)))
    assert isinstance(other, Fit)
    assert list(other.devices) == ["g1"]


def test_no_replica_is_split_over_a_gpu_that_another_pod_holds():
    wide = replace(POOL, placement=PlacementSpec(allow_split=True))
    assert isinstance(fit(wide, node(gpu("g0", 4_500), gpu("g1", 4_500, held_by="ml/t"))), Refusal)
    assert isinstance(fit(wide, node(gpu("g0", 4_500), gpu("g1", 4_500))), Fit)


def test_no_replica_is_split_over_mig_instances_because_cuda_shows_a_process_only_one():
    wide = replace(POOL, placement=PlacementSpec(allow_split=True))
    assert isinstance(fit(wide, node(gpu("MIG-a", 4_500), gpu("MIG-b", 4_500))), Refusal)
    alone = fit(wide, node(gpu("MIG-a", 9_000), gpu("MIG-b", 4_500)))
    assert isinstance(alone, Fit)
    assert list(alone.devices) == ["MIG-a"]


def test_a_model_whose_header_does_not_decide_is_refused_with_what_to_do():
    result = fit(UNSIZED, node(gpu("g0")))
    assert isinstance(result, Refusal)
    assert result.cause is Cause.UNSIZED
    assert str(result).startswith(f"n1: {MLA}; nothing has measured it yet: state engine.vramMiB")


@pytest.mark.parametrize(
    ("pool", "mib"),
    [
        (replace(UNSIZED, stated_mib=9_000), 9_000),
        (replace(UNSIZED, fitted_mib=9_000), 9_512),
        (seen(UNSIZED, 9_000), 9_256),
        (replace(seen(UNSIZED, 9_000), stated_mib=8_000), 9_000),
        (seen(POOL, 12_000), 12_256),
        (replace(POOL, stated_mib=3_000), 3_000),
    ],
)
def test_a_figure_from_elsewhere_places_it(pool: PoolView, mib: int):
    assert fit(pool, node(gpu("g0"))) == Fit("n1", {"g0": mib})


def test_what_was_measured_on_one_device_says_nothing_of_two():
    wide = replace(seen(UNSIZED, 30_000, devices=2), placement=PlacementSpec(allow_split=True))
    assert isinstance(fit(wide, node(gpu("g0"), gpu("g1"))), Refusal)
