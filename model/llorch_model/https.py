"""GET of a source's file with bounded redirects, and what can go wrong with it in one line each."""

from __future__ import annotations

import re
import ssl
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import aiohttp
from yarl import URL

from .core.errors import ModelError, ModelNotAvailable, UnsupportedSource
from .guard import Guard, PrivateAddress, proxy_hosts

MAX_REDIRECTS = 5
READ_BUFFER_BYTES = 1 << 20
MAX_RETRY_AFTER_SECONDS = 60.0
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_BUSY = frozenset({408, 425, 429, 500, 502, 503, 504})
RANGE_NOT_SATISFIABLE = 416
MAX_ERROR_BYTES = 4096
_S3_CODE = re.compile(rb"<Code>(\w{1,64})</Code>")
OPEN = Guard(allow_private=True)


@dataclass(frozen=True, slots=True)
class Timeouts:
    """How long a server may take, in seconds."""

    connect: float = 10.0
    """For the connection, TLS included."""
    read: float = 30.0
    """Between two pieces of an answer."""


DEFAULT_TIMEOUTS = Timeouts()


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """What the answer's headers tell of the file."""

    size_bytes: int
    """0 where the server does not say."""
    etag: str
    last_modified: str

    @property
    def validator(self) -> str:
        """For If-Range: only a strong ETag or a date may stand there; empty where there is neither."""
        return self.etag if self.etag and not self.etag.startswith("W/") else self.last_modified


@dataclass(frozen=True, slots=True)
class Target:
    """A file on a server, and how to ask for it."""

    url: URL
    name: str
    """What messages call it."""
    authorize: Callable[[URL], Mapping[str, str]] | None = field(default=None, repr=False)
    """Headers that open it. They go to the origin of `url` and nowhere else."""
    plain: bool = False
    """True where `url` may be http: the node's administrator named that endpoint, no pool did."""
    guard: Guard = OPEN
    hint: str = ""
    """Added to a message about refused access."""

    def headers(self, url: URL) -> Mapping[str, str]:
        """For a request to `url`, which may be where a redirect led to."""
        return self.authorize(url) if self.authorize is not None and url.origin() == self.url.origin() else {}

    def check(self, url: URL) -> None:
        """Raises UnsupportedSource for an address that may not be asked."""
        try:
            self.guard.check(url)
        except PrivateAddress as error:
            raise UnsupportedSource(f"{shown(url)}: {error}") from None


def tls_context() -> ssl.SSLContext:
    """Trusts the system's authorities, or those of SSL_CERT_FILE and SSL_CERT_DIR where set."""
    return ssl.create_default_context()


def open_session(
    context: ssl.SSLContext | None = None, *, allow_private: bool = True, trusted: frozenset[str] = frozenset()
) -> aiohttp.ClientSession:
    """A session for `inspect_https` and `fetch`; close it. Honours HTTPS_PROXY and NO_PROXY.

    Without `allow_private` it connects to public addresses, to `trusted` hosts and to the environment's proxies only.
    """
    guard = Guard(allow_private=allow_private, trusted=trusted | proxy_hosts())
    resolver = None if allow_private else guard.resolver()
    connector = aiohttp.TCPConnector(ssl=context or tls_context(), limit_per_host=8, resolver=resolver)
    return aiohttp.ClientSession(connector=connector, trust_env=True)


def shown(url: str | URL) -> str:
    """The URL without its query, which may hold signatures; at most 200 characters."""
    text = str(URL(url).with_query(None).with_fragment(None))
    return text if len(text) <= 200 else text[:197] + "..."


@asynccontextmanager
async def get(
    session: aiohttp.ClientSession, target: Target, headers: Mapping[str, str], timeouts: Timeouts, at: URL | None = None
) -> AsyncIterator[aiohttp.ClientResponse]:
    """The answer to a GET, with status 200, 206 or 416; anything else, and trouble while reading, is raised as ModelError.

    `at` is where an earlier redirect led to.
    """
    limits = aiohttp.ClientTimeout(
        total=None, connect=timeouts.connect + timeouts.read, sock_connect=timeouts.connect, sock_read=timeouts.read
    )
    sent = {"Accept-Encoding": "identity", **headers}
    url = at or target.url
    try:
        for _ in range(MAX_REDIRECTS + 1):
            target.check(url)
            response = await session.get(
                url,
                headers={**sent, **target.headers(url)},
                timeout=limits,
                allow_redirects=False,
                read_bufsize=READ_BUFFER_BYTES,
            )
            try:
                if response.status in _REDIRECTS:
                    if region := response.headers.get("x-amz-bucket-region", ""):
                        raise ModelNotAvailable(f"{_where(target, url)}: the bucket is in {region[:32]}: set AWS_REGION")
                    url = _redirected(target, url, response.headers.get("Location", ""))
                    continue
                await _check(target, url, response)
                yield response
                return
            finally:
                response.close()
    except (aiohttp.ClientError, TimeoutError, OSError) as error:
        raise _typed(_where(target, url), url, error, timeouts) from error
    raise ModelNotAvailable(f"{target.name}: more than {MAX_REDIRECTS} redirects")


def _where(target: Target, url: URL) -> str:
    return target.name if url == target.url else shown(url)


def remote_file(response: aiohttp.ClientResponse) -> RemoteFile:
    """What the answer says of the whole file, be it a part of it or all."""
    size = 0
    if response.status == 206:
        total = response.headers.get("Content-Range", "").rpartition("/")[2]
        size = int(total) if total.isascii() and total.isdigit() else 0
    elif response.status == 200:
        size = response.content_length or 0
    return RemoteFile(size, response.headers.get("ETag", ""), response.headers.get("Last-Modified", ""))


def range_start(response: aiohttp.ClientResponse) -> int:
    """The position in the file of the answer's first byte: 0 unless it is a part. -1 where a part does not say."""
    if response.status != 206:
        return 0
    unit, _, span = response.headers.get("Content-Range", "").partition(" ")
    first = span.partition("-")[0]
    return int(first) if unit == "bytes" and first.isascii() and first.isdigit() else -1


def _redirected(target: Target, current: URL, location: str) -> URL:
    where = _where(target, current)
    if not location:
        raise ModelNotAvailable(f"{where}: a redirect that leads nowhere")
    try:
        # Signed URLs must arrive exactly as they were sent.
        found = current.join(URL(location, encoded=location.isascii()))
        shown(found)
    except ValueError:
        raise ModelNotAvailable(f"{where}: a redirect to something that is no URL") from None
    at_home = target.plain and found.scheme == "http" and found.host is not None and found.origin() == target.url.origin()
    if (found.scheme != "https" and not at_home) or not found.host:
        raise UnsupportedSource(f"{where}: redirects to {found.scheme}://{found.host or ''}, only https is followed")
    return found


async def _check(target: Target, url: URL, response: aiohttp.ClientResponse) -> None:
    status, where = response.status, _where(target, url)
    if status in (200, 206, RANGE_NOT_SATISFIABLE):
        if response.headers.get("Content-Encoding", "identity") != "identity":
            raise ModelNotAvailable(f"{where}: the server compresses the file, which hides its size")
        return
    answered = f"{status} {response.reason or ''}".strip()
    if match := _S3_CODE.search(await response.content.read(MAX_ERROR_BYTES)):
        answered = f"{status} {match[1].decode()}"
    if status in (401, 403):
        hint = f"; {target.hint}" if target.hint else ""
        raise ModelNotAvailable(f"{where}: the server refuses access ({answered}){hint}")
    if status in (404, 410):
        raise ModelNotAvailable(f"{where}: not found ({answered})")
    raise ModelNotAvailable(
        f"{where}: the server answers {answered}", retryable=status in _BUSY, retry_after=_retry_after(response)
    )


def _retry_after(response: aiohttp.ClientResponse) -> float | None:
    value = response.headers.get("Retry-After", "").strip()
    return min(float(value), MAX_RETRY_AFTER_SECONDS) if value.isascii() and value.isdigit() and len(value) < 6 else None


def _typed(where: str, url: URL, error: Exception, timeouts: Timeouts) -> ModelError:
    match error:
        case aiohttp.ClientConnectorCertificateError():
            reason = getattr(error.certificate_error, "verify_message", "") or error.certificate_error
            return ModelNotAvailable(f"{where}: its certificate is not trusted: {reason} (SSL_CERT_FILE names other authorities)")
        case aiohttp.ClientConnectorError() if isinstance(error.os_error, PrivateAddress):
            return UnsupportedSource(f"{where}: {error.os_error}")
        case aiohttp.ClientConnectorDNSError():
            return ModelNotAvailable(f"{where}: no such host: {url.host}", retryable=True)
        case aiohttp.ConnectionTimeoutError():
            return ModelNotAvailable(f"{where}: no connection within {timeouts.connect:g} s", retryable=True)
        case TimeoutError():
            return ModelNotAvailable(f"{where}: no answer for {timeouts.read:g} s", retryable=True)
        case aiohttp.ClientPayloadError():
            return ModelNotAvailable(f"{where}: the connection was cut in the middle of the file", retryable=True)
        case aiohttp.InvalidURL():
            return UnsupportedSource(f"{where}: not a valid URL")
        case aiohttp.ClientConnectorError():
            return ModelNotAvailable(f"{where}: cannot connect: {_line(error.os_error)}", retryable=True)
        case _:
            return ModelNotAvailable(f"{where}: {_line(error)}", retryable=True)


def _line(error: BaseException) -> str:
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(str(text).split())[:160]
