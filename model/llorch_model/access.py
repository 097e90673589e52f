"""How this process may reach sources: what its settings say, and the variables that the Hub's and S3's own tools read too."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
from yarl import URL

from .core.errors import UnsupportedSource
from .core.sigv4 import Credentials
from .guard import Guard
from .https import open_session

DEFAULT_HUB = "https://huggingface.co"
MAX_TOKEN_BYTES = 4096


def _environment() -> Mapping[str, str]:
    return os.environ


@dataclass(frozen=True, slots=True)
class SourceAccess:
    """Rules and credentials. Variables and files are read when they are needed, so a rotated token counts at once."""

    allow_private: bool = True
    """False: `https:` and `s3:` sources reach public addresses only. Endpoints that variables name are trusted."""
    hf_token_file: Path | None = None
    environment: Mapping[str, str] = field(default_factory=_environment, repr=False)

    @property
    def hub_endpoint(self) -> URL:
        """HF_ENDPOINT, or the public Hub."""
        return self._endpoint("HF_ENDPOINT") or URL(DEFAULT_HUB)

    @property
    def s3_endpoint(self) -> URL | None:
        """AWS_ENDPOINT_URL_S3, else AWS_ENDPOINT_URL; None for Amazon's own."""
        return self._endpoint("AWS_ENDPOINT_URL_S3") or self._endpoint("AWS_ENDPOINT_URL")

    @property
    def s3_region(self) -> str:
        """AWS_REGION, else AWS_DEFAULT_REGION, else us-east-1."""
        return self.environment.get("AWS_REGION") or self.environment.get("AWS_DEFAULT_REGION") or "us-east-1"

    @property
    def s3_credentials(self) -> Credentials | None:
        """AWS_ACCESS_KEY_ID and the like; None for anonymous access. Raises UnsupportedSource for half a key."""
        key, secret = self.environment.get("AWS_ACCESS_KEY_ID", ""), self.environment.get("AWS_SECRET_ACCESS_KEY", "")
        if bool(key) != bool(secret):
            raise UnsupportedSource("AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY belong together: only one of them is set")
        return Credentials(key, secret, self.environment.get("AWS_SESSION_TOKEN", "")) if key else None

    def hub_token(self) -> str:
        """Of the file, else of HF_TOKEN; empty for none. Raises UnsupportedSource when the file cannot be read."""
        if self.hf_token_file is None:
            return self.environment.get("HF_TOKEN", "").strip()
        try:
            with self.hf_token_file.open() as file:
                return file.read(MAX_TOKEN_BYTES).strip()
        except (OSError, ValueError) as error:
            raise UnsupportedSource(f"LLORCH_HF_TOKEN_FILE={self.hf_token_file} cannot be read: {error}") from error

    def guard(self) -> Guard:
        """For targets."""
        return Guard(allow_private=self.allow_private, trusted=self._trusted())

    def session(self) -> aiohttp.ClientSession:
        """A session that keeps to the rules; close it."""
        return open_session(allow_private=self.allow_private, trusted=self._trusted())

    def _trusted(self) -> frozenset[str]:
        found = (self._endpoint(name) for name in ("HF_ENDPOINT", "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"))
        return frozenset(url.host for url in found if url is not None and url.host)

    def _endpoint(self, variable: str) -> URL | None:
        text = self.environment.get(variable, "").strip().rstrip("/")
        if not text:
            return None
        try:
            url = URL(text)
        except ValueError:
            url = URL()
        if url.scheme not in ("http", "https") or not url.host or url.query or url.user or url.password:
            raise UnsupportedSource(f"{variable}={text[:120]} — must be http://host[:port] or https://host[:port]")
        return url


DEFAULT_ACCESS = SourceAccess()
