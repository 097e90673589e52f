"""From header to shape: dense, grouped, per layer, experts, sliding windows, tied output; and a caveat where it does not hold."""

from __future__ import annotations

import pytest

from fixtures.sparse_gguf import header_of
from llorch_api import ModelShape
from llorch_model.core.gguf import GGUFError, Header, HeaderParser
from llorch_model.core.gguf_format import ValueType
from llorch_model.core.gguf_write import Typed, encode_header, lay_out, text, type_id, u32
from llorch_model.core.shape import shape_of, split_files

WINDOW = "attention__sliding_window"
PATTERN = "attention__sliding_window_pattern"


def header(architecture: str, *, tensors: list[tuple[str, tuple[int, ...], str]] | None = None, **settings: object) -> Header:
    """A small header; keywords are keys under the architecture, with `__` for the dot."""
    kv = {"general.architecture": text(architecture)}
    defaults: dict[str, object] = {"block_count": 4, "embedding_length": 1024, "attention__head_count": 8}
    for name, value in (defaults | settings).items():
        key = f"{architecture}.{name.replace('__', '.')}" if not name.startswith("general") else name.replace("__", ".")
        if isinstance(value, list):
            kv[key] = Typed(ValueType.BOOL if isinstance(value[0], bool) else ValueType.INT32, value)
        elif isinstance(value, int):
            kv[key] = u32(value)
        else:
            kv[key] = text(str(value))
    shapes = (
        tensors if tensors is not None else [("token_embd.weight", (1024, 1024), "F32"), ("output.weight", (1024, 1024), "F16")]
    )
    laid, _ = lay_out((name, dimensions, type_id(kind)) for name, dimensions, kind in shapes)
    parser = HeaderParser()
    parser.feed(encode_header(kv, laid))
    return parser.close()


def preset(name: str) -> ModelShape:
    parser = HeaderParser()
    parser.feed(header_of(name)[0])
    return shape_of(parser.close())


def test_llama3_8b_is_read_whole() -> None:
    shape = preset("llama3-8b")

    assert (shape.architecture, shape.layers, shape.embedding_length) == ("llama", 32, 4096)
    assert (shape.vocab_size, shape.context_length) == (128256, 131072)
    assert shape.kv_key_elements == shape.kv_value_elements == 32 * 8 * 128
    assert shape.swa_window == shape.swa_key_elements == 0
    assert shape.caveat == ""


def test_gemma3_slides_in_five_layers_of_six() -> None:
    shape = preset("gemma3-12b")

    assert shape.swa_window == 1024
    assert shape.kv_key_elements == 8 * 8 * 256
    assert shape.swa_key_elements == 40 * 8 * 256
    assert shape.vocab_size == 262144, "from the length of the vocabulary, as gemma3 names no size"


def test_embeddings_stay_in_host_memory() -> None:
    shape = shape_of(header("llama"))

    assert (shape.host_mib, shape.weights_mib) == (4, 2)


def test_a_tied_output_is_a_second_copy_on_the_device() -> None:
    shape = shape_of(header("llama", tensors=[("token_embd.weight", (1024, 1024), "F32")]))

    assert (shape.host_mib, shape.weights_mib) == (4, 4)


def test_without_head_count_kv_every_head_has_its_own() -> None:
    assert shape_of(header("llama")).kv_key_elements == 4 * 8 * 128


def test_heads_may_differ_layer_by_layer() -> None:
    shape = shape_of(header("deci", attention__head_count=[8, 0, 8, 8], attention__head_count_kv=[2, 0, 4, 4]))

    assert shape.kv_key_elements == (2 + 0 + 4 + 4) * 128


def test_keys_and_values_may_have_their_own_width() -> None:
    shape = shape_of(header("llama", attention__head_count_kv=1, attention__key_length=192, attention__value_length=64))

    assert (shape.kv_key_elements, shape.kv_value_elements) == (4 * 192, 4 * 64)


@pytest.mark.parametrize(
    ("architecture", "settings", "full", "sliding", "window"),
    [
        ("gemma2", {"block_count": 4}, 2, 2, 4096),
        ("gemma2", {"block_count": 4, "attention__sliding_window": 512}, 2, 2, 512),
        ("gemma3", {"block_count": 6, "attention__sliding_window": 512}, 1, 5, 512),
        ("gemma3", {"block_count": 6}, 6, 0, 0),
        ("gpt-oss", {"block_count": 4, "attention__sliding_window": 128}, 2, 2, 128),
        ("cohere2", {"block_count": 8, "attention__sliding_window": 4096}, 2, 6, 4096),
        ("llama4", {"block_count": 8}, 2, 6, 8192),
        ("llama4", {"block_count": 8, "attention__sliding_window": 0}, 8, 0, 0),
        ("exaone4", {"block_count": 30, "attention__sliding_window": 4096}, 30, 0, 0),
        ("exaone4", {"block_count": 64}, 16, 48, 4096),
        ("smallthinker", {"block_count": 5, "attention__sliding_window": 1}, 2, 3, 4096),
        ("mimo2", {WINDOW: 128, PATTERN: [True, True, True, False]}, 1, 3, 128),
        ("gemma3", {WINDOW: 64, PATTERN: 2}, 2, 2, 64),
        ("phi3", {"block_count": 4, "attention__sliding_window": 2048}, 4, 0, 0),
        ("llama", {"block_count": 4, "attention__sliding_window": 2048}, 4, 0, 0),
    ],
)  # fmt: skip
def test_windows_slide_where_llama_cpp_lets_them(
    architecture: str, settings: dict[str, object], full: int, sliding: int, window: int
) -> None:
    shape = shape_of(header(architecture, **settings))

    assert (shape.kv_key_elements, shape.swa_key_elements, shape.swa_window) == (full * 1024, sliding * 1024, window)
    assert shape.caveat == ""


def test_layers_that_predict_ahead_have_no_part_in_the_cache() -> None:
    shape = shape_of(header("glm4moe", block_count=5, nextn_predict_layers=1))

    assert (shape.layers, shape.kv_key_elements) == (4, 4 * 1024)


@pytest.mark.parametrize(
    ("made", "caveat"),
    [
        (header("deepseek2", attention__kv_lora_rank=512), "latent attention"),
        (header("mamba", ssm__state_size=16, attention__head_count=0), "recurrent state"),
        (header("qwen3next", ssm__inner_size=16), "recurrent state"),
        (header("lfm2", shortconv__l_cache=3), "recurrent state"),
        (header("gemma3n", attention__sliding_window=512), "shares its KV cache"),
        (header("gemma4", attention__shared_kv_layers=2), "shares its KV cache"),
        (header("glm-dsa", attention__indexer__top_k=8), "sparse attention"),
        (header("bert"), "no KV cache"),
        (header("somethingnew"), "somethingnew is not known here"),
        (header("llama", general__unused=1) , ""),
    ],
)  # fmt: skip
def test_where_the_header_does_not_decide_the_shape_says_so(made: Header, caveat: str) -> None:
    said = shape_of(made).caveat

    assert caveat in said
    assert bool(caveat) == bool(said)


@pytest.mark.parametrize(
    ("kind", "message"),
    [("adapter", "a LoRA adapter"), ("mmproj", "a multimodal projector"), ("imatrix", "an importance matrix")],
)
def test_a_gguf_that_is_no_model_is_refused(kind: str, message: str) -> None:
    with pytest.raises(GGUFError, match=message):
        shape_of(header("llama", general__type=kind))


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (header("llama", block_count=0), "0 layers are implausible"),
        (header("llama", block_count=4, attention__head_count_kv=[1, 2]), "does not name 4 layers"),
        (header("llama", tensors=[]), "only a vocabulary"),
        (header("llama", block_count="four"), "block_count is not a non-negative integer"),
        (header("clip"), "a multimodal projector"),
    ],
)
def test_a_header_that_contradicts_itself_is_a_gguf_error(made: Header, message: str) -> None:
    with pytest.raises(GGUFError, match=message):
        shape_of(made)


def test_a_part_of_a_split_model_says_that_it_is_one() -> None:
    tensors, _ = lay_out([("token_embd.weight", (32, 32), type_id("F32"))])
    kv = {"general.architecture": text("llama"), "llama.block_count": u32(1), "split.count": Typed(ValueType.UINT16, 3)}
    parser = HeaderParser()
    parser.feed(encode_header(kv, tensors))

    assert split_files(parser.close()) == 3
    assert "split over 3 files" in shape_of(parser.close()).caveat
