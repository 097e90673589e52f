"""Log lines that machines and people can read."""

from __future__ import annotations

import io
import json
import logging
import sys

import pytest

from llorch_web.correlation import correlation_id
from llorch_web.logging import JsonFormatter, TextFormatter


def record(message: str, **extra: object) -> logging.LogRecord:
    made = logging.makeLogRecord({"name": "llorch.test", "levelno": logging.WARNING, "levelname": "WARNING", "msg": message})
    vars(made).update(extra)
    return made


def test_a_json_line_says_when_who_and_for_which_request() -> None:
    reset = correlation_id.set("abc-1")
    try:
        line = json.loads(JsonFormatter("agent", {"node_id": "gpu-1"}).format(record("it broke", pool="chat", replica="chat-1")))
    finally:
        correlation_id.reset(reset)
    assert line.pop("time").endswith("Z")
    assert line == {
        "level": "warning",
        "component": "agent",
        "node_id": "gpu-1",
        "logger": "llorch.test",
        "message": "it broke",
        "correlation_id": "abc-1",
        "pool": "chat",
        "replica": "chat-1",
    }


def test_whatever_is_logged_it_stays_one_line_of_json() -> None:
    try:
        raise ValueError("two\nlines")
    except ValueError:
        made = record('a "quoted"\nmessage', odd=object())
        made.exc_info = sys.exc_info()
    text = JsonFormatter("agent", {}).format(made)
    assert "\n" not in text
    assert "ValueError: two" in json.loads(text)["exception"]


def test_text_is_for_people_and_has_no_colours_outside_a_terminal() -> None:
    text = TextFormatter(io.StringIO()).format(record("it broke", pool="chat"))
    assert text.endswith("warning llorch.test: it broke pool=chat")
    assert "\x1b" not in text


@pytest.mark.parametrize("level", [logging.INFO, logging.ERROR])
def test_a_line_without_extras_is_just_the_message(level: int) -> None:
    made = record("fine")
    made.levelno, made.levelname = level, logging.getLevelName(level)
    assert TextFormatter(io.StringIO()).format(made).endswith(" llorch.test: fine")
