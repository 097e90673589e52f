"""From a source to the requests that bring its files."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime

from yarl import URL

from .access import DEFAULT_ACCESS, SourceAccess
from .core.errors import BadModel, UnsupportedSource
from .core.gguf import GGUFError
from .core.sigv4 import canonical_path, signed_headers
from .core.source import HfSource, HttpsSource, S3Source, Source
from .core.split import part_paths
from .https import Target, shown


@dataclass(frozen=True, slots=True)
class RemotePart:
    """One file of a model on a server."""

    target: Target
    sha256: str = ""
    """Empty where its server does not tell."""
    etag: str = ""
    """Stands for what the server that sends the bytes says: a mirror's differs."""


@dataclass(frozen=True, slots=True)
class Remote:
    """A model on servers: one file, or all parts of a split one in their order."""

    source: Source
    """Pinned: an `hf:` source with its file and commit."""
    parts: tuple[RemotePart, ...]

    @property
    def name(self) -> str:
        """For messages."""
        return self.parts[0].target.name


async def locate(source: Source, access: SourceAccess = DEFAULT_ACCESS) -> Remote:
    """Where the files of `source` are. Only `hf:` asks its server for that. Raises ModelError."""
    match source:
        case HttpsSource(url):
            return Remote(source, tuple(RemotePart(Target(each, shown(each), guard=access.guard())) for each in _urls(url)))
        case S3Source():
            return _s3(source, access)
        case HfSource():
            from .hub import locate_hf

            return await locate_hf(source, access)
    raise UnsupportedSource(f"{str(source).partition(':')[0]}: names nothing on a web server")


def _urls(text: str) -> list[URL]:
    """The URL, or those of all parts, their queries kept."""
    url = URL(text)
    paths = parts_of(shown(url), url.raw_path)
    return [url] if len(paths) == 1 else [url.with_path(path, encoded=True).with_query(url.query) for path in paths]


def parts_of(where: str, path: str) -> tuple[str, ...]:
    """Like part_paths; raises BadModel."""
    try:
        return part_paths(path)
    except GGUFError as error:
        raise BadModel(f"{where}: {error}") from error


def _s3(source: S3Source, access: SourceAccess) -> Remote:
    endpoint, region, credentials = access.s3_endpoint, access.s3_region, access.s3_credentials
    guard = access.guard()

    def authorize(url: URL) -> dict[str, str]:
        if credentials is None:
            return {}
        host = url.host_port_subcomponent or ""
        return signed_headers(host, url.raw_path, region, credentials, datetime.now(UTC))

    def target(key: str) -> Target:
        if endpoint is not None:
            url, path = endpoint, f"{endpoint.path.rstrip('/')}/{source.bucket}/{key}"
        elif "." in source.bucket:
            # The certificate of *.s3.REGION.amazonaws.com covers one label.
            url, path = URL(f"https://s3.{region}.amazonaws.com"), f"/{source.bucket}/{key}"
        else:
            url, path = URL(f"https://{source.bucket}.s3.{region}.amazonaws.com"), f"/{key}"
        return Target(
            URL(f"{url.origin()}{canonical_path(path)}", encoded=True),
            str(S3Source(source.bucket, key)),
            authorize,
            plain=endpoint is not None and endpoint.scheme == "http",
            guard=guard,
            hint="" if credentials else "no AWS_ACCESS_KEY_ID is set, so it was asked for without a key",
        )

    return Remote(source, tuple(RemotePart(target(key)) for key in parts_of(str(source), source.key)))
