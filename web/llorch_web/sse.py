"""Server-sent events: cuts a byte stream into events. Holds no socket and no clock."""

from __future__ import annotations

MAX_EVENT = 8 << 20
"""Bytes that one event may have."""


class EventTooLong(ValueError):
    """The stream holds an event longer than MAX_EVENT."""


class EventSplitter:
    r"""Bytes in, whole events out, each without its closing blank line. Lines end with \n or \r\n."""

    __slots__ = ("_rest",)

    def __init__(self) -> None:
        self._rest = b""

    @property
    def rest(self) -> bytes:
        """What came after the last whole event."""
        return self._rest

    def feed(self, data: bytes) -> list[bytes]:
        """The events that `data` completes. Raises EventTooLong."""
        if self._rest:
            data = self._rest + data
        if b"\r" in data:
            # A \r at the very end may be half a line end: it waits for the next bytes.
            held = b"\r" if data.endswith(b"\r") else b""
            data = (data[:-1] if held else data).replace(b"\r\n", b"\n")
            *events, rest = data.split(b"\n\n")
            self._rest = rest + held
        else:
            *events, self._rest = data.split(b"\n\n")
        if len(self._rest) > MAX_EVENT:
            raise EventTooLong(f"an event is longer than {MAX_EVENT} bytes")
        return [event for event in events if event]


def data_of(event: bytes) -> bytes | None:
    """The data of an event, its lines joined; None for a comment or an event without data."""
    if event.startswith(b"data:") and b"\n" not in event:
        return event[6:] if event[5:6] == b" " else event[5:]
    lines = [line[6:] if line[5:6] == b" " else line[5:] for line in event.split(b"\n") if line.startswith(b"data:")]
    return b"\n".join(lines) if lines else None
