"""AWS Signature Version 4 for a GET without a body, as S3 and what speaks like it demand.

Source: "Authenticating Requests: Using the Authorization Header (AWS Signature Version 4)", Amazon S3 API reference.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from urllib.parse import quote

EMPTY_SHA256 = hashlib.sha256(b"").hexdigest()
ALGORITHM = "AWS4-HMAC-SHA256"


@dataclass(frozen=True, slots=True)
class Credentials:
    """Of an access key. `session_token` is empty for lasting keys."""

    access_key: str
    secret_key: str = field(repr=False)
    session_token: str = field(default="", repr=False)


def canonical_path(path: str) -> str:
    """The path as it must be signed, and therefore sent: everything escaped but letters, digits, `-._~` and `/`."""
    return quote(path, safe="/-._~")


def signed_headers(
    host: str, path: str, region: str, credentials: Credentials, now: datetime, headers: Mapping[str, str] | None = None
) -> dict[str, str]:
    """The headers that make a GET of `path` on `host` (with its port where it is not the scheme's own) a signed one.

    `path` is canonical, `now` in UTC; `headers` are further ones that the signature is to cover.
    """
    stamp = now.strftime("%Y%m%dT%H%M%SZ")
    added = {"x-amz-content-sha256": EMPTY_SHA256, "x-amz-date": stamp}
    if credentials.session_token:
        added["x-amz-security-token"] = credentials.session_token
    covered = {"host": host, **{name.lower(): value.strip() for name, value in (headers or {}).items()}, **added}
    names = ";".join(sorted(covered))
    lines = "".join(f"{name}:{covered[name]}\n" for name in sorted(covered))
    request = f"GET\n{path}\n\n{lines}\n{names}\n{EMPTY_SHA256}"
    scope = f"{stamp[:8]}/{region}/s3/aws4_request"
    to_sign = f"{ALGORITHM}\n{stamp}\n{scope}\n{hashlib.sha256(request.encode()).hexdigest()}"
    key = f"AWS4{credentials.secret_key}".encode()
    for part in scope.split("/"):
        key = hmac.new(key, part.encode(), hashlib.sha256).digest()
    signature = hmac.new(key, to_sign.encode(), hashlib.sha256).hexdigest()
    told = f"Credential={credentials.access_key}/{scope}, SignedHeaders={names}, Signature={signature}"
    return {**added, "Authorization": f"{ALGORITHM} {told}"}
