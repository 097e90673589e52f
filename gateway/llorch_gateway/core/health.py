"""Whether an agent is taken for alive, by what is seen of it anyway: its slot messages and failing connections."""

from __future__ import annotations

SILENCE_SECONDS = 1.0
"""Agents send slots every 0.5 s: one that was silent for longer than this is frozen, gone, or cut off."""


class AgentHealth:
    """One agent. Ejected by silence or a failed connection, back with its next message. Times are monotonic seconds.

    A request that takes long says nothing: busy is not dead.
    """

    __slots__ = ("_ejected_at", "_heard")

    def __init__(self, now: float) -> None:
        self._heard = now
        self._ejected_at: float | None = None

    @property
    def ejected(self) -> bool:
        """True while requests should go elsewhere."""
        return self._ejected_at is not None

    def ejected_for(self, now: float) -> float:
        """Seconds since the ejection; 0 for an agent that is well."""
        return 0.0 if self._ejected_at is None else now - self._ejected_at

    def heard(self, now: float) -> bool:
        """A message came. True when that brings the agent back."""
        self._heard = now
        back, self._ejected_at = self.ejected, None
        return back

    def failed(self, now: float) -> bool:
        """A connection could not be made. True when that ejects the agent."""
        return self._eject(now)

    def look(self, now: float) -> bool:
        """Called some times a second. True when the agent is ejected now for its silence."""
        return now - self._heard > SILENCE_SECONDS and self._eject(now)

    def excuse(self, seconds: float) -> None:
        """The gateway itself was not looking for so long: that silence is not the agent's."""
        self._heard += seconds

    def _eject(self, now: float) -> bool:
        if self._ejected_at is not None:
            return False
        self._ejected_at = now
        return True
