"""What the front door makes of requests, of an engine's events and of its errors."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llorch_agent.core.answers import BadEvent, Chunks, ModelName, WholeAnswer, WholeEmbeddings, is_error
from llorch_agent.core.engine_error import engine_error
from llorch_agent.core.engine_request import BadRequest, Kind, embeddings, generation


def dumps(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def chat_chunk(delta: dict[str, Any], index: int = 0, finish: str | None = None, **more: Any) -> bytes:
    choice = {"finish_reason": finish, "index": index, "delta": delta, **more}
    return dumps({"choices": [choice], "created": 7, "id": "chatcmpl-1", "model": "engine", "object": "chat.completion.chunk"})


USAGE = dumps({"choices": [], "created": 7, "id": "chatcmpl-1", "model": "engine", "usage": {"total_tokens": 3}})
PROGRESS = dumps({"choices": [{"index": 0, "delta": {"role": "assistant"}}], "model": "engine", "prompt_progress": {"total": 9}})


# requests


def test_the_engine_always_streams_with_progress_and_usage_and_nothing_else_changes() -> None:
    body = b'{"model":"m","stream":false,"temperature":0.70,"messages":[{"role":"user","content":"h\\u00e9"}],"x":1e3}'
    asked = generation(body, Kind.CHAT)
    sent = json.loads(asked.payload)
    assert sent == {
        **json.loads(body), "stream": True, "return_progress": True, "stream_options": {"include_usage": True}
    }  # fmt: skip
    assert b'"temperature":0.70' in asked.payload
    assert (asked.model, asked.stream, asked.include_usage, asked.width) == ("m", False, False, 1)


def test_what_the_client_asked_of_its_stream_is_remembered() -> None:
    asked = generation(b'{"stream":true,"stream_options":{"include_usage":true,"other":1}}', Kind.CHAT)
    assert (asked.stream, asked.include_usage) == (True, True)
    assert json.loads(asked.payload)["stream_options"] == {"include_usage": True, "other": 1}


@pytest.mark.parametrize(
    ("fields", "kind", "width"),
    [
        ({"n": 3}, Kind.CHAT, 3),
        ({"n_cmpl": 2}, Kind.CHAT, 2),
        ({"n": None}, Kind.CHAT, 1),
        ({"prompt": "a"}, Kind.COMPLETION, 1),
        ({"prompt": ["a", "b"]}, Kind.COMPLETION, 2),
        ({"prompt": [[1, 2], [3]]}, Kind.COMPLETION, 2),
        ({"prompt": [1, 2, 3]}, Kind.COMPLETION, 1),
        ({"prompt": [1, "and", 3]}, Kind.COMPLETION, 1),
        ({"prompt": ["a"], "n": 4}, Kind.COMPLETION, 4),
    ],
)
def test_a_request_takes_a_lease_for_every_sequence_it_starts(fields: dict[str, Any], kind: Kind, width: int) -> None:
    assert generation(dumps(fields), kind).width == width


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (b"", None),
        (b"[1]", None),
        (b"{", None),
        (b'{"stream":"yes"}', "stream"),
        (b'{"model":3}', "model"),
        (b'{"n":0}', "n"),
        (b'{"n":1.5}', "n"),
        (b'{"n":true}', "n"),
        (b'{"stream_options":[]}', "stream_options"),
        (b'{"n":2,"prompt":["a","b"]}', "n"),
    ],
)
def test_a_body_that_no_engine_understands_is_refused_with_the_field_at_fault(body: bytes, param: str | None) -> None:
    with pytest.raises(BadRequest) as raised:
        generation(body, Kind.COMPLETION)
    assert raised.value.param == param


def test_embeddings_are_asked_for_in_batches_that_keep_their_order() -> None:
    asked = embeddings(b'{"model":"m","input":["a","b","c"],"encoding_format":"float"}')
    assert asked.width == 3
    assert json.loads(asked.batch(0, 2)) == {"model": "m", "input": ["a", "b"], "encoding_format": "float"}
    assert json.loads(asked.batch(2, 2))["input"] == ["c"]


@pytest.mark.parametrize("value", ['"a"', "[1,2,3]", '["a"]', '[1,"b"]'])
def test_one_input_is_sent_as_it_came(value: str) -> None:
    body = b'{"input": %s}' % value.encode()
    asked = embeddings(body)
    assert asked.width == 1
    assert asked.batch(0, 1) == body


def test_embeddings_without_input_are_refused() -> None:
    with pytest.raises(BadRequest):
        embeddings(b"{}")


# streams


def test_progress_never_reaches_the_client_and_usage_only_on_request() -> None:
    token = chat_chunk({"content": "x"})
    quiet, asking = Chunks("", keep_usage=False), Chunks("", keep_usage=True)
    assert [quiet.pass_on(data) for data in (PROGRESS, token, USAGE)] == [None, token, None]
    assert [asking.pass_on(data) for data in (PROGRESS, token, USAGE)] == [None, token, USAGE]


def test_generated_text_that_looks_like_fields_is_not_touched() -> None:
    text = '"prompt_progress" "choices":[] "model":"engine" {"error":1}'
    data = chat_chunk({"content": text})
    passed = Chunks("mine", keep_usage=False).pass_on(data)
    assert passed is not None
    chunk = json.loads(passed)
    assert chunk["choices"][0]["delta"]["content"] == text
    assert chunk["model"] == "mine"
    assert not is_error(data)


@given(st.text(), st.text(min_size=1), st.text())
def test_the_model_is_the_one_asked_for_whatever_the_names_and_the_text(engine: str, name: str, text: str) -> None:
    rename = ModelName(name)
    for _ in range(2):
        chunk = json.loads(rename.put(dumps({"choices": [{"delta": {"content": text}}], "model": engine, "id": "1"})))
        assert chunk == {"choices": [{"delta": {"content": text}}], "model": name, "id": "1"}


def test_a_chunk_with_spaces_is_renamed_too() -> None:
    assert json.loads(ModelName("new").put(b'{"id": "1", "model": "old"}')) == {"id": "1", "model": "new"}


def test_an_error_event_is_told_from_a_chunk() -> None:
    assert is_error(b'{"error":{"code":500}}')
    assert is_error(b' { "error": {}}')
    assert not is_error(chat_chunk({"content": "x"}))


# whole answers


def test_chunks_become_the_answer_that_openai_gives() -> None:
    whole = WholeAnswer(Kind.CHAT, "mine")
    logprob = {"content": [{"token": "a", "logprob": -1.0}]}
    for data in (
        PROGRESS,
        chat_chunk({"role": "assistant", "content": None}),
        chat_chunk({"reasoning_content": "hm"}),
        chat_chunk({"content": "a"}, logprobs=logprob),
        chat_chunk({"content": "b"}, logprobs=logprob),
    ):
        whole.add(data)
        assert not whole.complete
    whole.add(chat_chunk({}, finish="length"))
    whole.add(USAGE)
    assert whole.complete
    assert json.loads(whole.answer()) == {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 7,
        "model": "mine",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "ab", "reasoning_content": "hm"},
                "logprobs": {"content": [*logprob["content"], *logprob["content"]]},
                "finish_reason": "length",
            }
        ],
        "usage": {"total_tokens": 3},
    }


def test_tool_calls_are_put_together_from_their_pieces() -> None:
    whole = WholeAnswer(Kind.CHAT, "")
    for calls in (
        [{"index": 0, "id": "c0", "type": "function", "function": {"name": "add", "arguments": ""}}],
        [{"index": 0, "function": {"arguments": '{"a":'}}],
        [{"index": 0, "function": {"arguments": "1}"}}, {"index": 1, "id": "c1", "function": {"name": "sub", "arguments": "{}"}}],
    ):
        whole.add(chat_chunk({"tool_calls": calls}))
    whole.add(chat_chunk({}, finish="tool_calls"))
    message = json.loads(whole.answer())["choices"][0]["message"]
    assert message["content"] is None
    assert message["tool_calls"] == [
        {"function": {"name": "add", "arguments": '{"a":1}'}, "id": "c0", "type": "function"},
        {"function": {"name": "sub", "arguments": "{}"}, "id": "c1"},
    ]


def test_several_choices_are_gathered_each_for_itself_and_told_in_order() -> None:
    whole = WholeAnswer(Kind.CHAT, "")
    for index, text in ((1, "x"), (0, "a"), (1, "y"), (0, "b")):
        whole.add(chat_chunk({"content": text}, index))
    whole.add(chat_chunk({}, 1, "stop"))
    assert not whole.complete
    whole.add(chat_chunk({}, 0, "stop"))
    assert [choice["message"]["content"] for choice in json.loads(whole.answer())["choices"]] == ["ab", "xy"]


def test_text_completions_are_joined() -> None:
    whole = WholeAnswer(Kind.COMPLETION, "m")
    for text, finish in (("one", None), (" two", None), ("", "stop")):
        choice = {"text": text, "index": 0, "logprobs": None, "finish_reason": finish}
        whole.add(dumps({"choices": [choice], "model": "e", "object": "text_completion", "id": "1", "created": 2}))
    answer = json.loads(whole.answer())
    assert answer["object"] == "text_completion"
    assert answer["choices"] == [{"index": 0, "text": "one two", "logprobs": None, "finish_reason": "stop"}]


@pytest.mark.parametrize("data", [b"", b"[]", b'{"choices":[{"index":0}]}', b'{"choices":[1]}', b"\xff"])
def test_an_event_that_is_no_chunk_is_a_failure_of_the_engine(data: bytes) -> None:
    with pytest.raises(BadEvent):
        WholeAnswer(Kind.CHAT, "").add(data)


def test_batches_of_embeddings_become_one_list() -> None:
    whole = WholeEmbeddings("mine")
    for values in ([1, 2], [3]):
        data = [{"object": "embedding", "index": index, "embedding": [value]} for index, value in enumerate(values)]
        usage = {"prompt_tokens": 2, "total_tokens": 2}
        whole.add(dumps({"model": "engine", "object": "list", "usage": usage, "data": data[::-1]}))
    answer = json.loads(whole.answer())
    assert [(item["index"], item["embedding"]) for item in answer["data"]] == [(0, [1]), (1, [2]), (2, [3])]
    assert answer["usage"] == {"prompt_tokens": 4, "total_tokens": 4}
    assert (answer["model"], answer["object"]) == ("mine", "list")


# errors


@pytest.mark.parametrize(
    ("status", "body", "expected"),
    [
        (
            400,
            b'{"error":{"code":400,"message":"too long","type":"exceed_context_size_error","n_prompt_tokens":9,"n_ctx":5}}',
            (400, "too long", "context_length_exceeded", "invalid_request_error"),
        ),
        (
            400,
            b'{"error":{"code":400,"message":"no","type":"invalid_request_error"}}',
            (400, "no", "invalid_request_error", None),
        ),
        (501, b'{"error":{"code":501,"message":"no","type":"not_supported_error"}}', (501, "no", "not_supported_error", None)),
        (
            503,
            b'{"error":{"message":"Loading model","type":"unavailable_error","code":503}}',
            (503, "Loading model", "not_ready", None),
        ),
        (
            401,
            b'{"error":{"message":"key","type":"x","code":401}}',
            (502, "the engine refused the agent: key", "engine_failed", None),
        ),
        (500, b"<html>", (500, "<html>", "engine_error", None)),
        (404, b"", (404, "the engine answered 404", "invalid_request", None)),
        (200, b'{"error":{"code":400,"message":"bad","type":"t"}}', (400, "bad", "t", None)),
        (200, b'{"error":"flat"}', (500, "flat", "engine_error", None)),
    ],
)
def test_errors_of_engines_are_told_in_openais_form(status: int, body: bytes, expected: tuple[Any, ...]) -> None:
    error = engine_error(status, body)
    assert (error.status, error.message, error.code, error.type) == expected
    if error.code == "context_length_exceeded":
        assert error.extra == {"n_prompt_tokens": 9, "n_ctx": 5}
