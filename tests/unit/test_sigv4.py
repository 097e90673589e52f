"""Signatures are Amazon's own: the example of the S3 API reference, to the last digit."""

from __future__ import annotations

from datetime import UTC, datetime

from llorch_model.core.sigv4 import Credentials, canonical_path, signed_headers

EXAMPLE = Credentials("AKIAIOSFODNN7EXAMPLE", "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY")
NOON = datetime(2013, 5, 24, tzinfo=UTC)


def test_the_documented_get_object_has_the_documented_signature() -> None:
    headers = signed_headers("examplebucket.s3.amazonaws.com", "/test.txt", "us-east-1", EXAMPLE, NOON, {"Range": "bytes=0-9"})

    assert headers["x-amz-date"] == "20130524T000000Z"
    assert headers["Authorization"] == (
        "AWS4-HMAC-SHA256 Credential=AKIAIOSFODNN7EXAMPLE/20130524/us-east-1/s3/aws4_request, "
        "SignedHeaders=host;range;x-amz-content-sha256;x-amz-date, "
        "Signature=f0e8bdb87c964420e857bd35b5d6ed310bd44f0170aba48dd91039c6036bdb41"
    )


def test_a_session_token_is_sent_and_signed() -> None:
    headers = signed_headers("h", "/k", "eu-west-1", Credentials("a", "b", "token"), NOON)

    assert headers["x-amz-security-token"] == "token"
    assert "x-amz-security-token" in headers["Authorization"]


def test_secrets_are_not_shown() -> None:
    assert "wJalr" not in repr(EXAMPLE)


def test_keys_are_escaped_as_s3_escapes_them() -> None:
    assert canonical_path("/a b/ü+(1)~x.gguf") == "/a%20b/%C3%BC%2B%281%29~x.gguf"
