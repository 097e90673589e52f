"""The resolve step: what a pool's model is, before anything is placed.

Headers on servers are read here by range requests. A file: source is only known to the nodes that hold it, so their agents are
asked; which of them have it decides where the pool may go.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import aiohttp

from llorch_api import ConditionReason, GPUPool, ModelShape, ResolvedModel
from llorch_model.access import DEFAULT_ACCESS, SourceAccess
from llorch_model.core.errors import ModelError, UnsupportedSource
from llorch_model.core.source import local_path
from llorch_model.inspection import inspect_model
from llorch_web.auth import Tokens

from .core.pools import Resolution
from .core.revision import engine_arguments

log = logging.getLogger("llorch.operator.resolve")

_REASONS: dict[str, ConditionReason] = {
    "MODEL_NOT_AVAILABLE": ConditionReason.MODEL_NOT_AVAILABLE,
    "UNSUPPORTED_SOURCE": ConditionReason.UNSUPPORTED_SOURCE,
    "DIGEST_MISMATCH": ConditionReason.DIGEST_MISMATCH,
    "BAD_MODEL": ConditionReason.BAD_MODEL,
}
RETRY_SECONDS = (2.0, 5.0, 15.0, 30.0, 60.0)
"""Waits after a failed attempt; the last one repeats."""
REFRESH_SECONDS = 60.0
"""How long an agent's answer about a file: source counts."""
ASK_TIMEOUT = aiohttp.ClientTimeout(total=15, connect=3)


class _Refused(Exception):
    """A place that was asked said no."""

    def __init__(self, reason: ConditionReason, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class Sizing(NamedTuple):
    """What a replica's memory depends on beside its model."""

    slots: int
    context_tokens: int
    engine_args: tuple[str, ...]


class Want(NamedTuple):
    """What is resolved: two pools of the same source share it, where agents are asked those of the same settings."""

    source: str
    sha256: str
    sizing: Sizing | None = None


def want_of(pool: GPUPool) -> Want:
    """What resolving the pool's model means."""
    spec = pool.spec
    source, sha256 = spec.model.source, spec.model.sha256 or ""
    if not source.startswith("file:"):
        return Want(source, sha256)
    args = tuple(engine_arguments(spec.engine.kv_cache_type, spec.engine.args))
    return Want(source, sha256, Sizing(spec.slots, spec.context_tokens, args))


@dataclass(slots=True)
class _Answer:
    """One place's last word on a source: an agent's, or the network's (place ``)."""

    model: ResolvedModel | None = None
    reason: ConditionReason = ConditionReason.MODEL_NOT_AVAILABLE
    message: str = ""
    attempts: int = 0
    due: float = 0.0
    boot: str = ""


@dataclass(slots=True)
class _Entry:
    answers: dict[str, _Answer] = field(default_factory=dict)
    asking: set[str] = field(default_factory=set)


@dataclass(frozen=True, slots=True)
class Agent:
    """An agent that can be asked."""

    base_url: str
    boot_id: str


class Resolver:
    """Answers at once with what is known; tasks of `group` find out the rest and set `changed` when they learn something."""

    def __init__(
        self,
        session: aiohttp.ClientSession,
        group: asyncio.TaskGroup,
        changed: asyncio.Event,
        tokens: Tokens,
        access: SourceAccess = DEFAULT_ACCESS,
    ) -> None:
        self._session = session
        self._access = access
        self._group = group
        self._changed = changed
        self._tokens = tokens
        self._entries: dict[Want, _Entry] = {}

    def keep(self, wants: set[Want]) -> None:
        """Forgets what no pool asks for any more."""
        self._entries = {want: entry for want, entry in self._entries.items() if want in wants}

    def resolve(self, pool: GPUPool, agents: Mapping[str, Agent], now: float) -> tuple[Resolution, frozenset[str] | None]:
        """What is known of the pool's model, and the nodes that hold it (None: any node can fetch it)."""
        want = want_of(pool)
        entry = self._entries.setdefault(want, _Entry())
        try:
            local = local_path(want.source) is not None
        except UnsupportedSource as error:
            return Resolution(None, ConditionReason.UNSUPPORTED_SOURCE, error.message), None
        if not local:
            if want.source.startswith("hf:") and (known := self._remembered(pool)) is not None:
                # A branch became a commit when the spec was written: an operator that starts anew moves nobody to another one.
                return known, None
            self._ask(want, entry, "", Agent("", ""), now)
            return self._network_answer(pool, entry), None
        for name, agent in agents.items():
            self._ask(want, entry, name, agent, now)
        return self._agents_answer(pool, entry, agents)

    def _ask(self, want: Want, entry: _Entry, place: str, agent: Agent, now: float) -> None:
        answer = entry.answers.get(place)
        fresh = answer is not None and answer.boot == agent.boot_id and now < answer.due
        if not fresh and place not in entry.asking:
            entry.asking.add(place)
            self._group.create_task(self._find_out(want, entry, place, agent, now))

    async def _find_out(self, want: Want, entry: _Entry, place: str, agent: Agent, now: float) -> None:
        before = entry.answers.get(place) or _Answer()
        answer = _Answer(model=before.model, attempts=before.attempts + 1, boot=agent.boot_id)
        try:
            answer.model = await (self._ask_agent(want, agent) if place else self._read_header(want))
            answer.attempts, answer.due = 0, now + REFRESH_SECONDS if place else float("inf")
        except _Refused as error:
            answer.model, answer.reason, answer.message = None, error.reason, str(error)
        except (aiohttp.ClientError, TimeoutError, ValueError, KeyError) as error:
            # The place did not answer: what it said before still counts, and nothing is concluded from silence.
            answer.message = f"{place or want.source}: {type(error).__name__}: {error}".rstrip(": ")
        finally:
            entry.asking.discard(place)
        if answer.attempts:
            answer.due = now + RETRY_SECONDS[min(answer.attempts, len(RETRY_SECONDS)) - 1]
        entry.answers[place] = answer
        if (answer.model, answer.message) != (before.model, before.message):
            log.info("resolved", extra={"source": want.source, "place": place or "network", "outcome": answer.message or "found"})
            self._changed.set()

    async def _read_header(self, want: Want) -> ResolvedModel:
        try:
            found = await inspect_model(want.source, sha256=want.sha256 or None, access=self._access)
        except ModelError as error:
            raise _Refused(_REASONS.get(error.code, ConditionReason.MODEL_NOT_AVAILABLE), error.message) from error
        return found.to_resolved()

    async def _ask_agent(self, want: Want, agent: Agent) -> ResolvedModel:
        model = await self._inspect(agent, {"source": want.source})
        if not model.shape.caveat or want.sizing is None:
            return model
        # Only now: an agent of an earlier version refuses a question with settings.
        slots, context_tokens, args = want.sizing
        question = {"source": want.source, "slots": slots, "contextTokens": context_tokens, "engineArgs": list(args)}
        try:
            return await self._inspect(agent, question)
        except ValueError as error:
            log.info("%s cannot say what %s takes: %s", agent.base_url, want.source, error)
            return model

    async def _inspect(self, agent: Agent, question: Mapping[str, Any]) -> ResolvedModel:
        url = f"{agent.base_url}/v2/models/inspect"
        ask = self._session.post(url, json=question, headers=self._tokens.headers(), timeout=ASK_TIMEOUT)
        async with ask as response:
            body: dict[str, Any] = await response.json()
            if response.status == 200:
                shape = ModelShape.model_validate(body["shape"])
                found = ResolvedModel(resolved=body["resolved"], digest=body["digest"], size_mib=body["sizeMiB"], shape=shape)
                return found.model_copy(update={"vram_mib": int(body["vramMiB"])}) if body.get("vramMiB") else found
            error = body.get("error", {})
            if error.get("code") in _REASONS:
                raise _Refused(_REASONS[error["code"]], error.get("message", ""))
            raise ValueError(f"{response.status} {error.get('message', '')}")

    def _network_answer(self, pool: GPUPool, entry: _Entry) -> Resolution:
        answer = entry.answers.get("")
        if answer is not None and answer.model is not None:
            return Resolution(answer.model)
        if answer is None:
            return self._remembered(pool) or Resolution(None, ConditionReason.RESOLVING, "reading the model's header")
        return self._remembered(pool) or Resolution(None, answer.reason, answer.message)

    def _agents_answer(
        self, pool: GPUPool, entry: _Entry, agents: Mapping[str, Agent]
    ) -> tuple[Resolution, frozenset[str] | None]:
        answers = {name: answer for name, answer in entry.answers.items() if name in agents}
        holders = {name: answer.model for name, answer in answers.items() if answer.model is not None}
        if holders:
            # All of them should hold the same file; where they differ the first by name is what the pool runs.
            model = holders[min(holders)]
            same = frozenset(name for name, other in holders.items() if other.digest == model.digest)
            fitted = max(other.vram_mib for other in holders.values() if other.digest == model.digest)
            return Resolution(model.model_copy(update={"vram_mib": fitted}) if fitted else model), same
        waiting = agents.keys() - answers.keys()
        if remembered := self._remembered(pool):
            return remembered, frozenset()
        if waiting or not agents:
            text = (
                f"asking {len(waiting)} agents for {pool.spec.model.source}"
                if agents
                else "no agent is there to ask for the file"
            )
            return Resolution(None, ConditionReason.RESOLVING, text), frozenset()
        worst = next((a for a in answers.values() if a.reason is not ConditionReason.MODEL_NOT_AVAILABLE), None)
        if worst is not None:
            return Resolution(None, worst.reason, worst.message), frozenset()
        said = "; ".join(f"{name}: {answers[name].message}" for name in sorted(answers)[:10])
        more = f"; and {len(answers) - 10} other nodes" if len(answers) > 10 else ""
        return Resolution(None, ConditionReason.MODEL_NOT_AVAILABLE, f"MODEL_NOT_AVAILABLE: {said}{more}"), frozenset()

    @staticmethod
    def _remembered(pool: GPUPool) -> Resolution | None:
        """What the pool's status says of this very spec: an operator that starts anew does not forget what runs."""
        known = pool.status.model
        if known is None or not known.digest or pool.status.observed_generation != pool.metadata.generation:
            return None
        return Resolution(known)
