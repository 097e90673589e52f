"""TLS by setting: a listener shows a certificate, and clients verify it."""

from __future__ import annotations

import ssl
import sys
from pathlib import Path

import aiohttp
from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

from .settings import StartError, load


class TlsSettings(BaseSettings):
    """The part that every component's settings share. Without any of it, listeners speak plain HTTP."""

    model_config = SettingsConfigDict(frozen=True, extra="ignore", populate_by_name=True)

    tls_cert_file: Path | None = Field(None, validation_alias="LLORCH_TLS_CERT_FILE")
    """PEM file with the listener's certificate and its chain, read at the start. With it the port speaks nothing but TLS."""
    tls_key_file: Path | None = Field(None, validation_alias="LLORCH_TLS_KEY_FILE")
    """PEM file with the certificate's key; without it the key is looked for in the certificate's file."""
    tls_ca_file: Path | None = Field(None, validation_alias="LLORCH_TLS_CA_FILE")
    """PEM file with the authorities that other components' certificates come from; by default the system's. There is no way to
    go without verification: a peer that shows another certificate is not spoken to."""

    def server_tls(self) -> ssl.SSLContext | None:
        """What listeners show; None for plain HTTP. Raises StartError."""
        if self.tls_cert_file is None:
            if self.tls_key_file is not None:
                raise StartError(f"LLORCH_TLS_KEY_FILE={self.tls_key_file} — needs LLORCH_TLS_CERT_FILE beside it")
            return None
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        try:
            context.load_cert_chain(self.tls_cert_file, self.tls_key_file, password=_no_password)
        except (OSError, ValueError) as error:
            why = _why(error, "the certificate and its key cannot be used")
            raise StartError(f"LLORCH_TLS_CERT_FILE={self.tls_cert_file} — {why}") from error
        return context

    def client_tls(self) -> ssl.SSLContext:
        """What peers' certificates are verified with. Raises StartError."""
        try:
            return ssl.create_default_context(cafile=str(self.tls_ca_file) if self.tls_ca_file else None)
        except (OSError, ValueError) as error:
            why = _why(error, "holds no certificate")
            raise StartError(f"LLORCH_TLS_CA_FILE={self.tls_ca_file} — {why}") from error


def verified() -> aiohttp.TCPConnector:
    """For a session of a command of a person's: verifies what LLORCH_TLS_CA_FILE says. Raises SystemExit(2)."""
    try:
        return aiohttp.TCPConnector(ssl=load(TlsSettings).client_tls())
    except StartError as error:
        print(f"llorch: {error}", file=sys.stderr)
        raise SystemExit(2) from error


def _no_password() -> str:
    raise ValueError("the key is encrypted, and there is nobody to ask for its password")


def _why(error: Exception, otherwise: str) -> str:
    if isinstance(error, ssl.SSLError):
        return otherwise
    return str(getattr(error, "strerror", None) or error).lower()
