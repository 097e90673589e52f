"""Cutting a byte stream into server-sent events."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llorch_web import sse
from llorch_web.sse import EventSplitter, EventTooLong, data_of

STREAM = b'data: {"a":1}\n\n: ping\n\nevent: x\ndata: one\ndata: two\n\ndata: [DONE]\n\n'
EVENTS = [b'data: {"a":1}', b": ping", b"event: x\ndata: one\ndata: two", b"data: [DONE]"]


def cut(stream: bytes, at: list[int]) -> list[bytes]:
    edges = [0, *sorted(at), len(stream)]
    return [stream[a:b] for a, b in pairwise(edges)]


@given(st.lists(st.integers(0, len(STREAM))), st.booleans())
def test_the_events_are_the_same_wherever_the_network_cuts_the_stream(at: list[int], carriage_returns: bool) -> None:
    stream = STREAM.replace(b"\n", b"\r\n") if carriage_returns else STREAM
    splitter = EventSplitter()
    pieces = cut(stream, [position * len(stream) // len(STREAM) for position in at])
    assert [event for piece in pieces for event in splitter.feed(piece)] == EVENTS


def test_an_event_that_is_not_ended_is_kept_back() -> None:
    splitter = EventSplitter()
    assert splitter.feed(b"data: 1\n\ndata: 2\n") == [b"data: 1"]
    assert splitter.rest == b"data: 2\n"


def test_a_stream_without_line_ends_does_not_fill_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "MAX_EVENT", 10)
    with pytest.raises(EventTooLong):
        EventSplitter().feed(b"data: 0123456789")


@pytest.mark.parametrize(
    ("event", "data"),
    [
        (b"data: x", b"x"),
        (b"data:x", b"x"),
        (b"data:  x", b" x"),
        (b"event: e\ndata: a\ndata: b", b"a\nb"),
        (b": comment", None),
        (b"retry: 5", None),
    ],
)
def test_data_is_what_follows_the_first_space_of_data_lines(event: bytes, data: bytes | None) -> None:
    assert data_of(event) == data
