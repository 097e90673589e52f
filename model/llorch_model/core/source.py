"""Where a model comes from: the string in a pool's spec, parsed."""

from __future__ import annotations

import re
from dataclasses import dataclass
from urllib.parse import quote, unquote, urlsplit

from .errors import UnsupportedSource

ALLOWED = "must be file:/path, https://host/path, hf:org/repo[/file.gguf][@rev] or s3://bucket/key"
MAX_SOURCE_LENGTH = 2048
_HF = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(?:/(?P<file>[^@\s]+))?(?:@(?P<revision>[\w./-]+))?")
_S3 = re.compile(r"(?P<bucket>[a-z0-9][a-z0-9.-]{1,61}[a-z0-9])/(?P<key>\S+)")


@dataclass(frozen=True, slots=True)
class FileSource:
    """A file on the nodes. `path` is absolute, without `..`."""

    path: str

    def __str__(self) -> str:
        return "file:" + quote(self.path, safe="/:@+,=~()[]{}!$&'* ")


@dataclass(frozen=True, slots=True)
class HttpsSource:
    """A file on a web server."""

    url: str

    def __str__(self) -> str:
        return self.url


@dataclass(frozen=True, slots=True)
class HfSource:
    """A file of a Hugging Face repository; `file` is empty where the repository's only GGUF is meant."""

    repo: str
    file: str = ""
    revision: str = ""

    def __str__(self) -> str:
        return f"hf:{self.repo}{'/' + self.file if self.file else ''}{'@' + self.revision if self.revision else ''}"


@dataclass(frozen=True, slots=True)
class S3Source:
    """An object of an S3 bucket."""

    bucket: str
    key: str

    def __str__(self) -> str:
        return f"s3://{self.bucket}/{self.key}"


@dataclass(frozen=True, slots=True)
class HandoffSource:
    """Nothing to fetch: handoff files bring the engines."""

    def __str__(self) -> str:
        return "handoff:"


Source = FileSource | HttpsSource | HfSource | S3Source | HandoffSource


def parse_source(text: str) -> Source:
    """The source that `text` names. Raises UnsupportedSource with one line that says what is allowed."""
    if len(text) > MAX_SOURCE_LENGTH or not text.isprintable() or text != text.strip():
        raise _refused(text)
    scheme, separator, rest = text.partition(":")
    if not separator:
        raise _refused(text)
    if scheme == "file":
        return _file(text, rest)
    if scheme == "https":
        return _https(text)
    if scheme == "hf" and (match := _HF.fullmatch(rest)):
        return HfSource(match["repo"], match["file"] or "", match["revision"] or "")
    if scheme == "s3" and rest.startswith("//") and (match := _S3.fullmatch(rest[2:])):
        return S3Source(match["bucket"], match["key"])
    if text == "handoff:":
        return HandoffSource()
    raise _refused(text)


def local_path(source: Source | str) -> str | None:
    """The path of a `file:` source on its node; None for every other source."""
    parsed = parse_source(source) if isinstance(source, str) else source
    return parsed.path if isinstance(parsed, FileSource) else None


def file_name(source: Source) -> str:
    """The last part of the source's path, fit for a file name: letters, digits, `.`, `_` and `-`, at most 96 characters."""
    match source:
        case FileSource(path) | S3Source(_, path):
            raw = path
        case HttpsSource(url):
            raw = unquote(urlsplit(url).path)
        case HfSource(repo, file, _):
            raw = file or repo
        case HandoffSource():
            raw = ""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", raw.rsplit("/", 1)[-1]).strip("-.")
    return name[-96:].lstrip("-.") or "model"


def _file(text: str, rest: str) -> FileSource:
    path = unquote(rest.removeprefix("//") if rest.startswith("///") else rest)
    if not path.startswith("/") or path.startswith("//") or not path.isprintable() or path.endswith("/"):
        raise UnsupportedSource(f"{_shown(text)}: file: needs an absolute path, like file:/models/llama.gguf")
    if ".." in path.split("/"):
        raise UnsupportedSource(f"{_shown(text)}: the path must not contain ..")
    return FileSource(path)


def _https(text: str) -> HttpsSource:
    try:
        parts = urlsplit(text)
        host, _ = parts.hostname, parts.port
    except ValueError:
        raise UnsupportedSource(f"{_shown(text)}: not a valid URL") from None
    if not text.startswith("https://") or not host or " " in text:
        raise UnsupportedSource(f"{_shown(text)}: needs a host, like https://example.com/llama.gguf")
    if parts.username is not None or parts.password is not None:
        raise UnsupportedSource(f"https://{host}: a source must not hold a user name or password, it is shown in status")
    return HttpsSource(text.partition("#")[0])


def _refused(text: str) -> UnsupportedSource:
    return UnsupportedSource(f"{_shown(text)}: {ALLOWED}")


def _shown(text: str) -> str:
    return repr(text if len(text) <= 80 else text[:77] + "...")
