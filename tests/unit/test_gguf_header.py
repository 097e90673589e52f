"""The GGUF header parser: every header that llama.cpp loads, in pieces of any size, and GGUFError for everything else."""

from __future__ import annotations

import struct
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fixtures.sparse_gguf import header_of
from llorch_model.core.gguf import GGUFError, Header, HeaderParser, LongArray
from llorch_model.core.gguf_format import Tensor, ValueType
from llorch_model.core.gguf_write import Typed, boolean, encode_header, f32, lay_out, text, type_id, u32

KV = {
    "general.architecture": text("llama"),
    "llama.block_count": u32(2),
    "llama.rope.freq_base": f32(0.5),
    "tokenizer.ggml.add_bos_token": boolean(True),
    "llama.attention.head_count_kv": Typed(ValueType.INT32, [8, 4]),
    "general.tags": Typed(ValueType.STRING, ["chat", "ünï"]),
    "tokenizer.ggml.tokens": Typed(ValueType.STRING, [f"t{n}" for n in range(2000)]),
    "tokenizer.ggml.scores": Typed(ValueType.FLOAT32, [0.0] * 1500),
}
TENSORS, DATA_BYTES = lay_out([("token_embd.weight", (64, 10), type_id("Q8_0")), ("output_norm.weight", (5,), type_id("F32"))])
HEADER = encode_header(KV, TENSORS)


def parse(data: bytes) -> Header:
    parser = HeaderParser()
    parser.feed(data)
    return parser.close()


def parsed_or_message(data: bytes) -> str:
    """The message of the GGUFError, or `parsed`."""
    try:
        header = parse(data)
    except GGUFError as error:
        return str(error)
    return "parsed" if header.required_size >= header.data_offset else "\n"


def test_a_header_comes_back_as_it_was_written() -> None:
    header = parse(HEADER)

    assert header.kv["general.architecture"] == "llama"
    assert header.kv["llama.rope.freq_base"] == 0.5
    assert header.kv["tokenizer.ggml.add_bos_token"] is True
    assert header.kv["llama.attention.head_count_kv"] == (8, 4)
    assert header.kv["general.tags"] == ("chat", "ünï")
    assert list(header.tensors) == TENSORS
    assert header.version == 3


def test_of_long_arrays_only_type_and_length_are_kept() -> None:
    header = parse(HEADER)

    assert header.kv["tokenizer.ggml.tokens"] == LongArray(ValueType.STRING, 2000)
    assert header.kv["tokenizer.ggml.scores"] == LongArray(ValueType.FLOAT32, 1500)


def test_the_required_size_ends_with_the_last_tensor_and_not_with_its_padding() -> None:
    header = parse(HEADER)

    assert header.data_offset == len(HEADER)
    assert header.required_size == len(HEADER) + 64 * 10 // 32 * 34 + 24 + 5 * 4


def test_version_2_is_read_too() -> None:
    assert parse(encode_header(KV, TENSORS, version=2)).version == 2


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 4096), min_size=1, max_size=30))
def test_pieces_of_any_size_give_the_same_header(sizes: list[int]) -> None:
    parser, position, turn = HeaderParser(), 0, 0

    while parser.header is None:
        assert parser.wanted > 0
        size = sizes[turn % len(sizes)]
        parser.feed(HEADER[position : position + size])
        position, turn = position + size, turn + 1

    assert parser.header == parse(HEADER)
    assert parser.wanted == 0


def test_a_reader_that_gives_exactly_what_is_wanted_gets_there_without_a_byte_too_much() -> None:
    parser, position = HeaderParser(), 0

    while parser.header is None:
        piece = HEADER[position : position + parser.wanted]
        position += len(piece)
        parser.feed(piece)

    assert position <= len(HEADER)


@settings(max_examples=150, deadline=None)
@given(st.integers(0, len(HEADER) - 32))
def test_a_truncated_header_is_a_gguf_error(length: int) -> None:
    with pytest.raises(GGUFError) as caught:
        parse(HEADER[:length])

    assert "\n" not in str(caught.value)


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 600), st.binary(min_size=1, max_size=12))
def test_a_damaged_header_is_read_or_refused_and_nothing_else(position: int, damage: bytes) -> None:
    outcome = parsed_or_message(HEADER[:position] + damage + HEADER[position + len(damage) :])

    assert outcome.isprintable()


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=400))
def test_random_bytes_behind_the_magic_are_refused_or_read(noise: bytes) -> None:
    assert parsed_or_message(b"GGUF" + struct.pack("<I", 3) + noise).isprintable()


def counts(tensors: int, keys: int) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, keys)


def one_tensor(name: str, dimensions: tuple[int, ...], kind: int, offset: int = 0) -> bytes:
    raw = name.encode()
    rank = len(dimensions)
    return counts(1, 0) + struct.pack(f"<Q{len(raw)}sI{rank}QIQ", len(raw), raw, rank, *dimensions, kind, offset)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "the file is empty"),
        (b"GG", "the header is cut off after 2 bytes"),
        (b"<!doctype html>", "not a GGUF file"),
        (b"<!", "not a GGUF file"),
        (b"GGUF" + struct.pack("<I", 1), "GGUF version 1 is not supported, only 2 and 3 are"),
        (b"GGUF" + struct.pack("<I", 4), "GGUF version 4 is not supported, only 2 and 3 are"),
        (b"GGUF" + struct.pack(">I", 3), "big-endian GGUF is not supported"),
        (counts(1 << 40, 3), "1,099,511,627,776 tensors and 3 keys are implausible"),
        (counts(0, 1) + struct.pack("<Q", 1 << 20), "a key of 1,048,576 bytes is implausible"),
        (counts(0, 1) + struct.pack("<Q1sI", 1, b"k", 99), "k has an unknown value type 99"),
        (counts(0, 1) + struct.pack("<Q1sIIQ", 1, b"k", 9, 9, 1), "k is an array of arrays"),
        (counts(0, 1) + struct.pack("<Q1sIIQ", 1, b"k", 9, 4, 1 << 40), "k with 1,099,511,627,776 items is implausible"),
        (counts(0, 1) + struct.pack("<Q1sIQ", 1, b"k", 8, 1 << 40), "k of 1,099,511,627,776 bytes is implausible"),
        (counts(0, 2) + struct.pack("<Q1sIB", 1, b"k", 7, 1) * 2, "key k comes twice"),
        (one_tensor("w", (32,), 4), "tensor w has an unknown type 4"),
        (one_tensor("w", (33,), 8), "tensor w has rows of 33 elements, no multiple of Q8_0's 32"),
        (one_tensor("w", (1, 1, 1, 1, 1), 0), "tensor w has 5 dimensions, at most 4 are possible"),
        (one_tensor("w", (1 << 40, 1 << 40), 0), "tensor w has an implausible shape"),
        (one_tensor("w\n", (32,), 4), "tensor 'w\\n' has an unknown type 4"),
        (encode_header({"general.alignment": u32(24)}, []), "general.alignment 24 is not a power of two"),
        (encode_header({}, [Tensor("w", (32,), 0, 0)] * 2), "tensor w comes twice"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(data: bytes, message: str) -> None:
    with pytest.raises(GGUFError) as caught:
        parse(data)

    assert str(caught.value) == message


def test_a_header_without_end_is_given_up_at_the_bound() -> None:
    parser = HeaderParser(max_header_bytes=1 << 20)
    parser.feed(counts(0, 60_000))
    entry = struct.pack("<Q8sIQ16384s", 8, b"@@@@@@@@", 8, 16_384, b"x" * 16_384)

    endless = (entry.replace(b"@@@@@@@@", b"%08d" % number) for number in range(100))

    with pytest.raises(GGUFError, match="the header is larger than 1 MiB"):
        list(map(parser.feed, endless))


MEASURE = """
import resource, sys, time
from llorch_model.core.gguf import HeaderParser
with open(sys.argv[1], "rb", buffering=0) as file:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.process_time()
    parser = HeaderParser()
    while parser.header is None:
        parser.feed(file.read(max(1 << 20, parser.wanted)))
    spent = time.process_time() - start
    print(spent, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


def test_a_vocabulary_of_128k_tokens_costs_neither_time_nor_memory(tmp_path) -> None:
    data, _ = header_of("llama3-8b", tokens=True)
    assert len(data) > 6_000_000
    (tmp_path / "header").write_bytes(data)

    out = subprocess.run([sys.executable, "-c", MEASURE, tmp_path / "header"], capture_output=True, text=True, check=True).stdout
    seconds, mebibytes = map(float, out.split())

    assert seconds < 0.5, "about 50 ms when the machine has nothing else to do"
    assert mebibytes < 25
