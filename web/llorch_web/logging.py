"""Logs on stderr: JSON lines for machines, or text where a person watches."""

from __future__ import annotations

import json
import logging
import sys
import time
from typing import Any, Literal, TextIO

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

from .correlation import correlation_id
from .settings import load

_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
_COLOURS = {logging.WARNING: "\x1b[33m", logging.ERROR: "\x1b[31m", logging.CRITICAL: "\x1b[31m"}


class LogSettings(BaseSettings):
    """How a component logs."""

    model_config = SettingsConfigDict(frozen=True, extra="ignore", populate_by_name=True)

    format: Literal["json", "text"] | None = Field(None, validation_alias="LLORCH_LOG_FORMAT")
    """json, or text. Without it: text where stderr is a terminal, and at home; else json."""
    level: Literal["debug", "info", "warning", "error"] | None = Field(None, validation_alias="LLORCH_LOG_LEVEL")
    """Least severity that is written: info, at home warning. debug is for developers: it writes a line per request and more."""


def configure(component: str, *, for_people: bool = False, **fields: str) -> None:
    """Sends all logs to stderr. `fields`, for example node_id, are part of every line.

    `for_people` is for a program that somebody watches, and that tells what it does by itself: text, warnings only.
    """
    settings = load(LogSettings)
    text = (for_people or sys.stderr.isatty()) if settings.format is None else settings.format == "text"
    level = settings.level or ("warning" if for_people else "info")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(TextFormatter(sys.stderr) if text else JsonFormatter(component, fields))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    logging.getLogger("asyncio").setLevel(logging.WARNING)


def _extras(record: logging.LogRecord) -> dict[str, Any]:
    """What a call's `extra` holds. Objects of libraries that ride along there are not for a log line."""
    return {
        key: value
        for key, value in vars(record).items()
        if key not in _STANDARD and not key.startswith("_") and isinstance(value, (str, int, float, bool))
    }


class JsonFormatter(logging.Formatter):
    """One JSON object per line: time, level, component, logger, message, and what the call's `extra` holds."""

    def __init__(self, component: str, fields: dict[str, str]) -> None:
        super().__init__()
        self._fixed = {"component": component, **fields}

    def format(self, record: logging.LogRecord) -> str:
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, Any] = {
            "time": f"{moment}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            **self._fixed,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if value := correlation_id.get():
            line["correlation_id"] = value
        line.update(_extras(record))
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str, ensure_ascii=False)


class TextFormatter(logging.Formatter):
    """`12:34:56 warning llorch.engine: message key=value`, coloured on a terminal."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__()
        self._colour = stream.isatty()

    def format(self, record: logging.LogRecord) -> str:
        moment = time.strftime("%H:%M:%S", time.localtime(record.created))
        extras = "".join(f" {key}={value}" for key, value in _extras(record).items())
        line = f"{moment} {record.levelname.lower()} {record.name}: {record.getMessage()}{extras}"
        if record.exc_info:
            line += f"\n{self.formatException(record.exc_info)}"
        colour = _COLOURS.get(record.levelno, "") if self._colour else ""
        return f"{colour}{line}\x1b[0m" if colour else line
