"""What an API server's answer means."""

from __future__ import annotations

import json
from typing import Any

import pytest

from llorch_store import Conflict, Forbidden, Invalid, NotFound, StoreError, Unavailable
from llorch_store.core.answers import Expired, Unauthenticated, error_of


def status(message: str, **details: Any) -> bytes:
    return json.dumps({"kind": "Status", "message": message, "details": details}).encode()


@pytest.mark.parametrize(
    ("code", "body", "kind", "line"),
    [
        (400, status("strict decoding error"), Invalid, "strict decoding error"),
        (422, status('GPUPool "chat" is invalid: spec.replicas'), Invalid, 'GPUPool "chat" is invalid: spec.replicas'),
        (413, status("too large"), Invalid, "too large"),
        (
            500,
            status("failed to create typed patch object (x): .spec.y: field not declared in schema"),
            Invalid,
            "failed to create",
        ),
        (401, status("Unauthorized"), Unauthenticated, "the API server does not accept these credentials: Unauthorized"),
        (403, status("User cannot get"), Forbidden, "User cannot get"),
        (404, status('gpupools "chat" not found'), NotFound, 'gpupools "chat" not found'),
        (404, b"404 page not found\n", NotFound, "404 page not found"),
        (409, status("object has been modified"), Conflict, "object has been modified"),
        (410, status("too old resource version"), Expired, "too old resource version"),
        (429, status("too many"), Unavailable, "the API server answered 429: too many"),
        (500, b"<html>\n<p>oops\x1b[2J</p>", Unavailable, "the API server answered 500: <html> <p>oops [2J</p>"),
        (503, b"", Unavailable, "the API server answered 503: status 503"),
        (418, b"[1]", StoreError, "the API server answered 418: [1]"),
    ],
)
def test_an_answer_becomes_an_error_of_the_contract_in_one_line(code: int, body: bytes, kind: type, line: str) -> None:
    error = error_of(code, body)
    assert type(error) is kind
    assert str(error).startswith(line)
    assert "\n" not in str(error)


@pytest.mark.parametrize(
    ("header", "body", "seconds"),
    [
        ("7", b"", 7.0),
        (None, status("wait", retryAfterSeconds=3), 3.0),
        ("2", status("wait", retryAfterSeconds=3), 2.0),
        (None, b"", None),
        ("Wed, 21 Oct 2026 07:28:00 GMT", b"", None),
        ("-5", b"", 0.0),
    ],
)
def test_the_time_that_the_server_asks_for_is_passed_on(header: str | None, body: bytes, seconds: float | None) -> None:
    error = error_of(429, body, retry_after=header)
    assert isinstance(error, Unavailable)
    assert error.retry_after == seconds


def test_a_long_message_is_cut() -> None:
    assert len(str(error_of(422, status("x" * 10_000)))) <= 500
