"""Bearer tokens: what is accepted, what is shown to others, and the middleware that asks for one."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import logging
import time
from collections.abc import Callable
from pathlib import Path

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from .errors import ApiError

log = logging.getLogger("llorch.auth")

OPEN_PATHS = frozenset({"/health", "/metrics"})
SHORT_TOKEN = 32
"""Characters below which a token is accepted with a warning."""
MAX_HEADER = 8192
LOOK_INTERVAL = 1.0
"""Seconds between two looks at the token file."""


class Tokens:
    """The configured tokens: `current,previous`, from a value or from a file that is read again when it changes.

    Without value and file, `configured` is False. A file that cannot be read counts as configured: until it can be read,
    what was last known is accepted, at first nothing.
    """

    def __init__(self, value: str | None = None, file: str | Path | None = None) -> None:
        """`file` wins over `value`."""
        self._file = Path(file) if file else None
        self._stamp: tuple[int, int, int] | None = None
        self._looked = float("-inf")
        self._warned = ""
        self._accepted: tuple[bytes, ...] = ()
        if self._file is None:
            self._take(value or "")
        self.configured = self._file is not None or bool(self._accepted)

    def current(self) -> str:
        """The token to show to others; empty where there is none."""
        self._look()
        return self._accepted[0].decode() if self._accepted else ""

    def headers(self) -> list[tuple[str, str]]:
        """The Authorization header for a request to another component; none without a token."""
        token = self.current()
        return [("Authorization", f"Bearer {token}")] if token else []

    def accepts(self, token: str) -> bool:
        """Whether `token` is one of ours, in a time that does not depend on where it differs."""
        self._look()
        given = token.encode(errors="surrogateescape")
        matches = [hmac.compare_digest(given, known) for known in self._accepted]
        return any(matches)

    def _look(self) -> None:
        if self._file is None or time.monotonic() - self._looked < LOOK_INTERVAL:
            return
        self._looked = time.monotonic()
        try:
            status = self._file.stat()
            stamp = (status.st_ino, status.st_mtime_ns, status.st_size)
            if stamp == self._stamp:
                return
            text = self._file.read_text()
        except (OSError, ValueError) as error:
            self._warn(f"the token file {self._file} cannot be read: {getattr(error, 'strerror', None) or 'not text'}")
            return
        before = self._accepted
        self._take(text)
        self._stamp, self._warned = stamp, ""
        if before and before != self._accepted:
            log.warning("the token changed: %s", ", ".join(map(_fingerprint, self._accepted)) or "none is accepted now")

    def _take(self, text: str) -> None:
        tokens = [token.strip() for token in text.split(",") if token.strip()]
        for token in tokens:
            if not token.isascii() or not token.isprintable() or " " in token:
                self._warn("a token holds characters that no header can carry; it is ignored")
            elif len(token) < SHORT_TOKEN:
                self._warn(f"a token is shorter than {SHORT_TOKEN} characters; `openssl rand -hex 32` makes a good one")
        self._accepted = tuple(token.encode() for token in tokens if token.isascii() and token.isprintable() and " " not in token)
        if not self._accepted and self._file is not None:
            self._warn(f"the token file {self._file} holds no token: every request is refused")

    def _warn(self, message: str) -> None:
        if message != self._warned:
            self._warned = message
            log.warning("%s", message)


def _fingerprint(token: bytes) -> str:
    """Six hex digits that tell tokens apart in a log and give nothing away."""
    return f"token:{hashlib.sha256(token).hexdigest()[:6]}"


def is_loopback(host: str | None) -> bool:
    """Whether `host`, an IP address, is this machine's own loopback."""
    try:
        address = ipaddress.ip_address((host or "").split("%")[0])
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback


def auth_middleware(tokens: Tokens, protects: Callable[[str], bool] = lambda path: path not in OPEN_PATHS) -> Middleware:
    """Asks every request whose path `protects` says True of for a bearer token.

    Where none is configured, peers on loopback are let through and all others answered 403.
    """

    @web.middleware
    async def check(request: web.Request, handler: Handler) -> web.StreamResponse:
        if protects(request.path) and (refused := refusal(request, tokens)) is not None:
            log.warning("refused %s %s from %s: %s", request.method, request.path, request.remote, refused.code)
            return refused.response()
        return await handler(request)

    return check


def refusal(request: web.Request, tokens: Tokens) -> ApiError | None:
    """Why the request is not let in: 401 missing_token or bad_token, 403 non_loopback_without_token. None when it is."""
    if not tokens.configured:
        if is_loopback(request.remote):
            return None
        message = "without LLORCH_API_TOKEN only peers on loopback are answered"
        return ApiError(403, message, code="non_loopback_without_token")
    challenge = {"WWW-Authenticate": "Bearer"}
    header = request.headers.get("Authorization", "")
    if not header.startswith("Bearer ") or not header[7:].strip():
        return ApiError(401, "a bearer token is needed", code="missing_token", headers=challenge)
    if len(header) > MAX_HEADER or not tokens.accepts(header[7:].strip()):
        return ApiError(401, "the bearer token is not accepted", code="bad_token", headers=challenge)
    return None
