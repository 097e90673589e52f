"""Where models come from: what is understood, what is refused, and what files are called that are kept."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llorch_model.core.errors import DigestMismatch, ModelErrorCode, UnsupportedSource
from llorch_model.core.identity import MAX_DIGEST_LENGTH, normal_sha256, remote_digest, stored_name
from llorch_model.core.source import (
    FileSource,
    HandoffSource,
    HfSource,
    HttpsSource,
    S3Source,
    Source,
    file_name,
    local_path,
    parse_source,
)


@pytest.mark.parametrize(
    ("text", "source"),
    [
        ("file:/models/llama.gguf", FileSource("/models/llama.gguf")),
        ("file:///models/llama.gguf", FileSource("/models/llama.gguf")),
        ("file:/models/my%20llama.gguf", FileSource("/models/my llama.gguf")),
        ("https://example.com/llama.gguf", HttpsSource("https://example.com/llama.gguf")),
        ("https://example.com:8443/a/b.gguf?x=1#part", HttpsSource("https://example.com:8443/a/b.gguf?x=1")),
        ("hf:org/repo", HfSource("org/repo")),
        ("hf:org/repo-GGUF/q4/file.gguf", HfSource("org/repo-GGUF", "q4/file.gguf")),
        ("hf:org/repo/file.gguf@main", HfSource("org/repo", "file.gguf", "main")),
        ("hf:org/repo@refs/pr/1", HfSource("org/repo", "", "refs/pr/1")),
        ("s3://bucket/path/to/key.gguf", S3Source("bucket", "path/to/key.gguf")),
        ("handoff:", HandoffSource()),
    ],
)
def test_sources_are_understood(text: str, source: Source) -> None:
    assert parse_source(text) == source
    assert parse_source(str(source)) == source


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must be file:/path, https://host/path, hf:org/repo[/file.gguf][@rev] or s3://bucket/key"),
        ("/models/llama.gguf", "must be file:/path"),
        ("http://example.com/llama.gguf", "must be file:/path, https://host/path"),
        ("ftp://example.com/llama.gguf", "must be file:/path"),
        ("handoff:pool", "must be file:/path"),
        ("hf:justone", "must be file:/path"),
        ("s3:/bucket/key", "must be file:/path"),
        ("file:models/llama.gguf", "needs an absolute path"),
        ("file://host/models/llama.gguf", "needs an absolute path"),
        ("file:/models/", "needs an absolute path"),
        ("file:/models/%00", "needs an absolute path"),
        ("file:/models/../etc/shadow", "must not contain .."),
        ("file:/models/%2e%2e/shadow", "must not contain .."),
        ("https:///llama.gguf", "needs a host"),
        ("https:example.com", "needs a host"),
        ("https://h:99999999/x", "not a valid URL"),
        ("https://user:pw@example.com/x", "must not hold a user name or password"),
        ("file:/a\nb", "must be file:/path"),
        ("https://example.com/" + "x" * 3000, "must be file:/path"),
    ],
)
def test_other_sources_are_refused_in_one_line_that_says_what_is_allowed(text: str, message: str) -> None:
    with pytest.raises(UnsupportedSource) as caught:
        parse_source(text)

    assert message in caught.value.message
    assert caught.value.message.isprintable()
    assert caught.value.code is ModelErrorCode.UNSUPPORTED_SOURCE
    assert "pw" not in caught.value.message


@given(st.text(max_size=60))
def test_any_text_is_a_source_or_refused(text: str) -> None:
    try:
        source = parse_source(text)
    except UnsupportedSource as error:
        message = error.message
    else:
        message = ""
        assert parse_source(str(source)) == source

    assert message.isprintable()


def test_only_file_sources_are_local() -> None:
    assert local_path("file:/models/a.gguf") == "/models/a.gguf"
    assert local_path("https://example.com/a.gguf") is None


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("https://example.com/a/b%20c.gguf?token=1", "b-c.gguf"),
        ("https://example.com/", "model"),
        ("https://example.com/...", "model"),
        ("hf:org/repo/q4/file.gguf", "file.gguf"),
        ("https://example.com/" + "x" * 300 + ".gguf", "x" * 91 + ".gguf"),
    ],
)
def test_file_names_are_tame(text: str, name: str) -> None:
    assert file_name(parse_source(text)) == name


def test_a_stored_file_is_named_for_its_content() -> None:
    source = parse_source("https://example.com/llama.gguf")

    assert stored_name(source, "sha256:" + "a" * 64) == f"llama.sha256-{'a' * 64}.gguf"
    assert stored_name(source, "etag:1+5") != stored_name(source, "etag:2+5")
    assert stored_name(source, "etag:1+5").startswith("llama.etag-")


@given(st.text(max_size=200), st.integers(0, 1 << 50), st.text(max_size=60))
def test_every_digest_fits_where_the_api_keeps_it(etag: str, size: int, modified: str) -> None:
    digest = remote_digest(url="https://example.com/x", size_bytes=size, etag=etag, last_modified=modified)

    assert len(digest) <= MAX_DIGEST_LENGTH
    assert digest.isprintable()
    assert digest.isascii()


def test_etag_and_size_make_the_digest() -> None:
    def digest(etag: str = '"abc"', size: int = 7, modified: str = "") -> str:
        return remote_digest(url="https://example.com/x", size_bytes=size, etag=etag, last_modified=modified)

    assert digest() == "etag:abc+7"
    assert digest(etag="", modified="Mon") != digest(etag="", modified="Tue")
    assert digest(etag='"' + "e" * 100 + '"') != digest(etag='"' + "f" * 100 + '"')


def test_sha256_is_taken_in_any_usual_spelling_and_nothing_else() -> None:
    assert normal_sha256("sha256:" + "AB" * 32) == "ab" * 32
    assert normal_sha256(None) == ""
    with pytest.raises(DigestMismatch, match="64 hex digits"):
        normal_sha256("abc")
