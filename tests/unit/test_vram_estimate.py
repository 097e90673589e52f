"""The memory estimate against what llama.cpp itself said for the same shapes and settings (llama-fit-params, RPC devices)."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fixtures.sparse_gguf import header_of
from llorch_api import ModelShape
from llorch_model.core.gguf import HeaderParser
from llorch_model.core.shape import shape_of
from llorch_model.core.vram import MemorySettings, estimate, host_need, memory_settings, split_need, tensor_split


def shape(name: str) -> ModelShape:
    parser = HeaderParser()
    parser.feed(header_of(name)[0])
    return shape_of(parser.close())


SHAPES = {name: shape(name) for name in ("llama3-8b", "gemma3-12b", "qwen2-0.5b", "llama3-70b", "qwen3moe-30b")}


@pytest.mark.parametrize(
    ("name", "weights", "kv", "compute"),
    [
        ("llama3-8b", 4403, 2048, 258),
        ("gemma3-12b", 6561, 2944, 519),
        ("qwen2-0.5b", 500, 192, 298),
        ("llama3-70b", 38706, 5120, 266),
    ],
)
def test_device_memory_is_what_llama_cpp_allocates(name: str, weights: int, kv: int, compute: int) -> None:
    """Four slots of 4,096 tokens, f16, measured on device. Rounding up may add one MiB; compute errs on the safe side."""
    need = estimate(SHAPES[name], slots=4, context_tokens=4096)

    assert need.weights_mib - weights in (0, 1)
    assert need.kv_mib - kv in (0, 1)
    assert compute <= need.compute_mib <= compute * 1.18
    measured = weights + kv + compute
    assert measured <= need.total_mib - need.margin_mib <= measured * 1.03


def test_experts_have_no_part_in_the_cache() -> None:
    assert estimate(SHAPES["qwen3moe-30b"], slots=4, context_tokens=4096).kv_mib == 1536


@pytest.mark.parametrize(
    ("kind", "kv"), [("f32", 4096), ("f16", 2048), ("bf16", 2048), ("q8_0", 1088), ("q5_1", 768), ("q4_0", 576), ("iq4_nl", 576)]
)
def test_the_cache_type_scales_the_cache(kind: str, kv: int) -> None:
    assert estimate(SHAPES["llama3-8b"], slots=4, context_tokens=4096, kv_cache_type=kind).kv_mib == kv


def test_an_unknown_cache_type_is_a_value_error() -> None:
    with pytest.raises(ValueError, match="must be one of f32, f16"):
        estimate(SHAPES["llama3-8b"], slots=1, context_tokens=256, kv_cache_type="int3")


def test_the_context_of_a_slot_is_padded_to_256() -> None:
    def kv(tokens: int) -> int:
        return estimate(SHAPES["llama3-8b"], slots=4, context_tokens=tokens).kv_mib

    assert kv(4000) == kv(4096) > kv(3840)


def test_swa_full_keeps_the_whole_context_everywhere() -> None:
    gemma = SHAPES["gemma3-12b"]

    assert estimate(gemma, slots=4, context_tokens=4096, swa_full=True).kv_mib == 6144


def test_a_short_context_is_not_enlarged_to_the_window() -> None:
    gemma = SHAPES["gemma3-12b"]

    assert (
        estimate(gemma, slots=1, context_tokens=512).kv_mib == estimate(gemma, slots=1, context_tokens=512, swa_full=True).kv_mib
    )


def test_without_flash_attention_scores_take_memory() -> None:
    llama = SHAPES["llama3-8b"]
    plain = estimate(llama, slots=4, context_tokens=4096, flash_attention=False).compute_mib

    assert plain - estimate(llama, slots=4, context_tokens=4096).compute_mib >= 512 * 4096 * 32 * 4 >> 20


def test_a_node_without_gpu_holds_the_embeddings_and_the_prompt_cache_too() -> None:
    llama = SHAPES["llama3-8b"]
    device = estimate(llama, slots=4, context_tokens=4096)
    host = host_need(llama, slots=4, context_tokens=4096, cache_ram_mib=1024)

    assert host.total_mib == device.total_mib + llama.host_mib + 1024


@given(
    st.sampled_from(sorted(SHAPES)),
    st.integers(1, 64),
    st.integers(256, 65536),
    st.sampled_from(["f16", "q8_0"]),
    st.integers(1, 4),
)
def test_more_slots_and_more_context_never_need_less(name: str, slots: int, context: int, kind: str, devices: int) -> None:
    need = estimate(SHAPES[name], slots=slots, context_tokens=context, kv_cache_type=kind, devices=devices)

    assert (
        need.total_mib
        <= estimate(SHAPES[name], slots=slots + 1, context_tokens=context, kv_cache_type=kind, devices=devices).total_mib
    )
    assert (
        need.total_mib
        <= estimate(SHAPES[name], slots=slots, context_tokens=context + 256, kv_cache_type=kind, devices=devices).total_mib
    )
    assert need.total_mib == need.weights_mib + need.kv_mib + devices * need.overhead_mib


def test_seventy_billion_go_over_two_cards_that_hold_them_together() -> None:
    need = estimate(SHAPES["llama3-70b"], slots=4, context_tokens=4096, devices=2)

    shares = split_need(need, [40_000, 40_000])

    assert shares is not None
    assert max(shares) <= 40_000
    assert sum(shares) >= need.total_mib
    assert split_need(need, [23_000, 23_000]) is None


def test_weights_go_in_proportion_to_free_memory() -> None:
    need = estimate(SHAPES["llama3-70b"], slots=1, context_tokens=4096, devices=2)

    large, small = split_need(need, [60_000, 20_000]) or (0, 0)
    model = tensor_split(need, (large, small))

    assert model[0] == pytest.approx(3 * model[1], abs=4)
    assert sum(model) >= need.weights_mib + need.kv_mib


@given(st.lists(st.integers(0, 60_000), min_size=2, max_size=8))
def test_a_split_fits_every_device_or_is_none(free: list[int]) -> None:
    need = estimate(SHAPES["llama3-8b"], slots=4, context_tokens=8192, devices=len(free))

    shares = split_need(need, free)

    if shares is not None:
        assert all(need.overhead_mib < share <= room for share, room in zip(shares, free, strict=True))
        assert sum(shares) >= need.total_mib


def test_a_split_over_another_number_of_devices_is_refused() -> None:
    with pytest.raises(ValueError, match="for 1 devices, not 2"):
        split_need(estimate(SHAPES["llama3-8b"], slots=1, context_tokens=256), [1, 2])


@pytest.mark.parametrize(
    ("arguments", "settings"),
    [
        ([], MemorySettings()),
        (["--temp", "0.7", "--jinja"], MemorySettings()),
        (["--ubatch-size", "1024"], MemorySettings(ubatch=1024)),
        (["--ubatch-size=256", "--swa-full"], MemorySettings(ubatch=256, swa_full=True)),
        (["-ub", "4096", "-b", "1024"], MemorySettings(ubatch=1024)),
        (["--batch-size", "128"], MemorySettings(ubatch=128)),
        (["--ubatch-size", "0"], MemorySettings(ubatch=2048)),
        (["--ubatch-size", "many"], MemorySettings()),
        (["--ubatch-size"], MemorySettings()),
        (["--flash-attn", "off"], MemorySettings(flash_attention=False)),
        (["--flash-attn", "auto", "--cache-ram", "2048"], MemorySettings(cache_ram_mib=2048)),
        (["--cache-ram", "-1"], MemorySettings()),
    ],
)
def test_engine_arguments_that_change_memory_are_seen(arguments: list[str], settings: MemorySettings) -> None:
    assert memory_settings(arguments) == settings


def test_a_need_explains_itself() -> None:
    assert str(estimate(SHAPES["llama3-8b"], slots=4, context_tokens=4096)).startswith("7,2")
