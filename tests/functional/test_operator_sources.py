"""What the operator makes of an hf: source: read once, pinned to its commit, and not moved by a restart."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from fixtures.source_servers import COMMIT, HubServer, serving
from llorch_api import ConditionReason, GPUPool, GPUPoolSpec, ModelSpec, ObjectMeta
from llorch_model.access import SourceAccess
from llorch_model.tiny import write_tiny
from llorch_operator.core.pools import Resolution
from llorch_operator.core.revision import assigned_source
from llorch_operator.resolve import Resolver
from llorch_web.auth import Tokens

pytestmark = pytest.mark.functional


@pytest.fixture
async def hub(tmp_path: Path) -> AsyncIterator[HubServer]:
    server = HubServer({"tiny.gguf": write_tiny(tmp_path / "tiny.gguf").read_bytes()})
    async with serving(server.handle) as server.port:
        yield server


def pool(source: str, generation: int = 1) -> GPUPool:
    spec = GPUPoolSpec(model=ModelSpec(source=source))
    return GPUPool(metadata=ObjectMeta(name="chat", namespace="default", generation=generation), spec=spec)


async def resolved(subject: GPUPool, access: SourceAccess) -> Resolution:
    """What a resolver that has just started finds."""
    changed = asyncio.Event()
    async with asyncio.timeout(10), asyncio.TaskGroup() as group:
        resolver = Resolver(None, group, changed, Tokens(None, None), access)  # type: ignore[arg-type]  # asks no agent
        while (found := resolver.resolve(subject, {}, 0.0)[0]).reason is ConditionReason.RESOLVING and found.model is None:
            await changed.wait()
            changed.clear()
    return found


async def test_a_branch_is_assigned_at_its_commit_and_an_operator_that_starts_anew_stays_there(hub: HubServer) -> None:
    access = SourceAccess(environment={"HF_ENDPOINT": hub.endpoint})
    subject = pool("hf:org/repo")
    first = (await resolved(subject, access)).model
    assert first is not None
    assert assigned_source(subject.spec, first) == f"hf:org/repo/tiny.gguf@{COMMIT}"

    hub.revisions["main"] = "e" * 40
    subject = subject.model_copy(update={"status": subject.status.model_copy(update={"model": first, "observed_generation": 1})})
    assert (await resolved(subject, access)).model == first
    edited = subject.model_copy(update={"metadata": subject.metadata.model_copy(update={"generation": 2})})
    again = (await resolved(edited, access)).model
    assert again is not None
    assert again.resolved.endswith("e" * 40)


async def test_a_private_source_is_refused_before_anything_is_placed() -> None:
    found = await resolved(pool("https://127.0.0.1:9/m.gguf"), SourceAccess(allow_private=False, environment={}))

    assert found.model is None
    assert found.reason is ConditionReason.UNSUPPORTED_SOURCE
    assert "127.0.0.1 is not a public address" in found.message


def test_other_sources_are_assigned_as_they_were_written() -> None:
    from llorch_api import ResolvedModel

    spec = pool("https://example.com/latest.gguf").spec
    assert assigned_source(spec, ResolvedModel(resolved="https://cdn.example.com/x.gguf")) == spec.model.source
