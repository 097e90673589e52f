"""A user's requests, one after the other, and how each went."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from types import TracebackType

import openai


@dataclass(frozen=True, slots=True)
class Outcome:
    """One request: when it started (seconds of the monotonic clock), how long it took, and its error or ''."""

    started: float
    seconds: float
    error: str


class SteadyTraffic:
    """Chats without end on their own thread, `pause` seconds apart, no retry; what happened is in `outcomes`."""

    def __init__(self, url: str, model: str, *, pause: float = 0.1, timeout: float = 20.0) -> None:
        self.outcomes: list[Outcome] = []
        self._client = openai.OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0, timeout=timeout)
        self._model, self._pause = model, pause
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._send, name="steady-traffic")

    def _send(self) -> None:
        while not self._ended.wait(self._pause):
            start, error = time.monotonic(), ""
            try:
                answer = self._client.chat.completions.create(
                    model=self._model, messages=[{"role": "user", "content": "Hello"}], max_tokens=4
                )
                error = "" if answer.choices[0].message.content else "empty answer"
            except openai.OpenAIError as failure:
                error = f"{type(failure).__name__}: {failure}"
            self.outcomes.append(Outcome(start, time.monotonic() - start, error))

    def __enter__(self) -> SteadyTraffic:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._ended.set()
        self._thread.join()
        self._client.close()
