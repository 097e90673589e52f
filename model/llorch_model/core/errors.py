"""What can be wrong with a model, by the code that users and other components see."""

from __future__ import annotations

from enum import StrEnum
from typing import ClassVar


class ModelErrorCode(StrEnum):
    """Codes of the API."""

    MODEL_NOT_AVAILABLE = "MODEL_NOT_AVAILABLE"
    BAD_MODEL = "BAD_MODEL"
    DIGEST_MISMATCH = "DIGEST_MISMATCH"
    UNSUPPORTED_SOURCE = "UNSUPPORTED_SOURCE"
    NO_DISK = "NO_DISK"


class ModelError(Exception):
    """A model cannot be had. The message is one line: what, where, what is allowed."""

    code: ClassVar[ModelErrorCode] = ModelErrorCode.MODEL_NOT_AVAILABLE

    def __init__(self, message: str, *, retryable: bool = False, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.retryable = retryable
        """True when the same request may well succeed later: a time-out, a cut connection, a busy server."""
        self.retry_after = retry_after
        """Seconds that the server asked to wait; None where it said nothing."""


class ModelNotAvailable(ModelError):
    """The file is not there, may not be read, or its server does not answer."""


class BadModel(ModelError):
    """The file is there and no engine would load it: not a GGUF, truncated, not a whole model."""

    code = ModelErrorCode.BAD_MODEL


class DigestMismatch(ModelError):
    """The content is not the one that was asked for."""

    code = ModelErrorCode.DIGEST_MISMATCH


class UnsupportedSource(ModelError):
    """llorch cannot read such a source."""

    code = ModelErrorCode.UNSUPPORTED_SOURCE


class NoDisk(ModelError):
    """No room for the file where models are kept."""

    code = ModelErrorCode.NO_DISK
