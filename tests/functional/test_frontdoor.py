"""The front door in front of a real llama-server: streams, whole answers, exact leases, and clients that leave."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import pytest_asyncio
from data_path import SLOTS, SOON_S, Agent, Engine, agent, chat, engine, events, ready_replica, until
from prometheus_client import CollectorRegistry

from llorch_api import ReplicaState
from llorch_model.tiny import write_mid, write_tiny

pytestmark = [pytest.mark.functional, pytest.mark.asyncio(loop_scope="module")]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with tiny.gguf and mid.gguf."""
    directory = tmp_path_factory.mktemp("models")
    write_tiny(directory / "tiny.gguf")
    write_mid(directory / "mid.gguf")
    return directory


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def tiny(models: Path) -> AsyncIterator[Engine]:
    """An engine that answers at once."""
    async with engine(models / "tiny.gguf") as running:
        yield running


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def mid(models: Path) -> AsyncIterator[Engine]:
    """An engine that takes its time: some hundred tokens a second, and a prompt in batches of 256."""
    async with engine(models / "mid.gguf", args=("--batch-size", "256", "--ubatch-size", "256", "--threads", "1")) as running:
        yield running


def client(to: Agent, replica: str = "r") -> aiohttp.ClientSession:
    return aiohttp.ClientSession(f"{to.url}/replicas/{replica}/v1/", connector=aiohttp.TCPConnector(limit=0))


async def refused(answer: aiohttp.ClientResponse) -> tuple[int, str]:
    return answer.status, (await answer.json())["error"]["code"]


async def test_a_stream_is_openais_and_says_the_model_that_was_asked_for(tiny: Engine) -> None:
    async with (
        agent(ready_replica("r", tiny.url)) as running,
        client(running) as http,
        http.post("chat/completions", json=chat("my/model", tokens=5, stream=True)) as answer,
    ):
        assert answer.status == 200
        assert answer.content_type == "text/event-stream"
        *chunks, done = await events(answer)
    assert done == "[DONE]"
    assert {chunk["model"] for chunk in chunks} == {"my/model"}
    assert all("prompt_progress" not in chunk and chunk["choices"] for chunk in chunks)
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"
    assert "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks)


async def test_the_usage_chunk_comes_when_it_is_asked_for(tiny: Engine) -> None:
    async with agent(ready_replica("r", tiny.url)) as running, client(running) as http:
        body = chat(tokens=5, stream=True, stream_options={"include_usage": True})
        async with http.post("chat/completions", json=body) as answer:
            *_, last, _ = await events(answer)
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 5


async def test_whole_answers_are_what_the_engine_itself_would_give(tiny: Engine) -> None:
    body = chat(tokens=12, temperature=0, logprobs=True, top_logprobs=2, seed=3)
    text = {"model": "chat", "prompt": "the", "max_tokens": 12, "temperature": 0, "logprobs": 1, "seed": 3}
    async with agent(ready_replica("r", tiny.url)) as running, client(running) as http, aiohttp.ClientSession() as direct:
        for path, sent in (("chat/completions", body), ("completions", text)):
            async with http.post(path, json=sent) as answer:
                ours: dict[str, Any] = await answer.json()
            async with direct.post(f"{tiny.url}/v1/{path}", json=sent) as answer:
                theirs: dict[str, Any] = await answer.json()
            assert ours["choices"] == theirs["choices"]
            assert ours["object"] == theirs["object"]
            assert ours["model"] == "chat"
            assert set(theirs) <= set(ours)
            for key in ("completion_tokens", "prompt_tokens", "total_tokens"):
                assert ours["usage"][key] == theirs["usage"][key]


async def test_several_choices_take_as_many_leases_and_come_in_order(tiny: Engine) -> None:
    async with agent(ready_replica("r", tiny.url)) as running, client(running) as http:
        async with http.post("chat/completions", json=chat(tokens=4, n=3)) as answer:
            choices = (await answer.json())["choices"]
        assert [choice["index"] for choice in choices] == [0, 1, 2]
        assert all(choice["message"]["content"] for choice in choices)
        async with http.post("chat/completions", json=chat(n=SLOTS + 1)) as answer:
            assert await refused(answer) == (400, "too_many_choices")
        running.replica("r").slots.acquire()
        async with http.post("chat/completions", json=chat(n=SLOTS)) as answer:
            assert await refused(answer) == (429, "no_slot")
        assert running.door.in_flight == 0


async def test_the_model_header_wins_over_the_body(tiny: Engine) -> None:
    async with (
        agent(ready_replica("r", tiny.url)) as running,
        client(running) as http,
        http.post("chat/completions", json=chat("alias"), headers={"X-Llorch-Model": "served"}) as answer,
    ):
        assert (await answer.json())["model"] == "served"


async def test_errors_of_the_engine_come_in_openais_form(tiny: Engine) -> None:
    async with agent(ready_replica("r", tiny.url), max_body=1 << 16) as running, client(running) as http:
        for stream in (False, True):
            async with http.post("chat/completions", json=chat(words=5000, stream=stream)) as answer:
                assert await refused(answer) == (400, "context_length_exceeded")
        async with http.post("chat/completions", data=b"{nonsense") as answer:
            assert await refused(answer) == (400, "invalid_request")
        async with http.post("chat/completions", json={"model": "chat"}) as answer:
            assert answer.status == 400
        async with http.post("embeddings", json={"model": "chat", "input": "x"}) as answer:
            assert answer.status == 501
        async with http.post("chat/completions", data=b"x" * ((1 << 16) + 1)) as answer:
            assert await refused(answer) == (413, "request_too_large")
        assert running.door.in_flight == 0


async def test_who_cannot_be_served_is_told_why(tiny: Engine) -> None:
    async with agent(ready_replica("r", tiny.url)) as running, client(running) as http:
        async with client(running, "nobody") as other, other.post("chat/completions", json=chat()) as answer:
            assert await refused(answer) == (404, "no_replica")
        replica = running.replica("r")
        for state, code in ((ReplicaState.LOADING, "not_ready"), (ReplicaState.DRAINING, "draining")):
            running.replicas.move(replica, state, 0.0)
            async with http.post("chat/completions", json=chat()) as answer:
                assert await refused(answer) == (503, code)
        running.replicas.move(replica, ReplicaState.READY, 0.0)
        leases = [replica.slots.acquire() for _ in range(SLOTS)]
        started = time.monotonic()
        async with http.post("chat/completions", json=chat()) as answer:
            assert await refused(answer) == (429, "no_slot")
            assert answer.headers["Retry-After"] == "1"
        assert time.monotonic() - started < 0.5
        assert all(lease is not None for lease in leases)


async def test_embeddings_of_many_inputs_come_in_order_and_never_crowd_the_engine(models: Path) -> None:
    inputs = [letter * 6 for letter in "abcdefghijk"]  # no common beginnings: mean pooling leaves out what the engine has cached
    async with (
        engine(models / "tiny.gguf", args=("--embeddings", "--pooling", "mean")) as running_engine,
        agent(ready_replica("r", running_engine.url)) as running,
        client(running) as http,
    ):
        alone = []
        for text in inputs:
            async with http.post("embeddings", json={"model": "chat", "input": text}) as answer:
                alone.append((await answer.json())["data"][0]["embedding"])
        async with http.post("embeddings", json={"model": "chat", "input": inputs}) as answer:
            together = await answer.json()
        assert [item["index"] for item in together["data"]] == list(range(11))
        for one, many in zip(alone, together["data"], strict=True):
            assert many["embedding"] == pytest.approx(one, abs=1e-3)
        assert together["usage"]["prompt_tokens"] > 0
        assert together["model"] == "chat"
        assert running.replica("r").slots.free == SLOTS


async def test_never_more_requests_reach_the_engine_than_it_has_slots(tiny: Engine) -> None:
    peak = 0

    async with agent(ready_replica("r", tiny.url)) as running, client(running) as http:
        replica = running.replica("r")

        async def watch() -> None:
            nonlocal peak
            while True:
                peak = max(peak, await tiny.gauge("requests_processing") + await tiny.gauge("requests_deferred"))
                await asyncio.sleep(0.01)

        async def ask(number: int) -> int:
            async with http.post("chat/completions", json=chat(tokens=16, stream=number % 2 == 0)) as answer:
                await answer.read()
                return answer.status

        watching = asyncio.create_task(watch())
        statuses = await asyncio.gather(*map(ask, range(256)))
        watching.cancel()
        assert set(statuses) == {200, 429}
        assert statuses.count(200) >= SLOTS
        assert peak <= SLOTS
        assert replica.slots.free == SLOTS
        assert running.door.in_flight == 0


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_leaves_mid_answer_frees_its_slot_at_once(mid: Engine, stream: bool) -> None:
    async with agent(ready_replica("r", mid.url)) as running, client(running) as http:
        replica = running.replica("r")
        request = asyncio.create_task(http.post("chat/completions", json=chat(tokens=3000, stream=stream)))
        await until(lambda: replica.slots.in_use == 1)
        await asyncio.sleep(0.3)
        if stream:
            (await request).close()
        else:
            request.cancel()
        took = await until(lambda: replica.slots.free == SLOTS)
        assert took < 0.5
        await mid.until_idle(1.0)


async def test_a_client_that_leaves_in_prefill_holds_its_lease_until_the_engine_lets_go(mid: Engine) -> None:
    async with agent(ready_replica("r", mid.url)) as running, client(running) as http:
        replica = running.replica("r")
        # Others keep the engine's result queue busy: beside them it does not look for clients that left.
        others = [asyncio.create_task(http.post("chat/completions", json=chat(tokens=3000, stream=True))) for _ in range(2)]
        await asyncio.gather(*others)
        for words in (900, 901, 902):
            leaving = asyncio.create_task(http.post("chat/completions", json=chat(tokens=2000, words=words, stream=True)))
            await until(lambda: replica.slots.in_use == 3)
            await asyncio.sleep(0.1)
            leaving.cancel()
            took = await until(lambda: replica.slots.in_use == 2)
            assert took < 5, "one batch, not the whole prompt and its answer"
            # The engine is full now, unless it has really let go of the one that left.
            next_ones = [asyncio.create_task(http.post("chat/completions", json=chat(tokens=2))) for _ in range(2)]
            while not all(task.done() for task in next_ones):
                assert await mid.gauge("requests_deferred") == 0, "the lease ended before the engine's slot was free"
            assert [task.result().status for task in next_ones] == [200, 200]
        for task in others:
            task.result().close()
        await until(lambda: replica.slots.free == SLOTS)
        assert running.door.in_flight == 0


async def test_an_engine_that_dies_mid_stream_is_an_error_event_and_never_a_silent_end(models: Path) -> None:
    async with engine(models / "mid.gguf") as dying, agent(ready_replica("r", dying.url)) as running, client(running) as http:
        async with http.post("chat/completions", json=chat(tokens=3000, stream=True)) as answer:
            await answer.content.readline()
            await dying.kill()
            *_, last = await events(answer)
        assert last["error"]["code"] == "engine_failed"
        assert running.replica("r").slots.free == SLOTS


async def test_an_engine_that_dies_before_the_first_byte_is_a_502(models: Path) -> None:
    async with engine(models / "mid.gguf") as dying, agent(ready_replica("r", dying.url)) as running, client(running) as http:
        bodies = chat(tokens=3000, words=900, stream=True), chat(tokens=3000)
        requests = [asyncio.create_task(http.post("chat/completions", json=body)) for body in bodies]
        await until(lambda: running.door.in_flight == 2)
        await asyncio.sleep(0.05)
        await dying.kill()
        for request in requests:
            assert await refused(await request) == (502, "engine_failed")
        assert running.replica("r").slots.free == SLOTS


async def test_slots_are_told_on_every_change_and_twice_a_second(tiny: Engine) -> None:
    async with (
        agent(ready_replica("r", tiny.url)) as running,
        aiohttp.ClientSession() as http,
        http.get(f"{running.url}/replicas/slots") as answer,
    ):
        assert answer.content_type == "text/event-stream"

        async def message() -> tuple[dict[str, Any], float]:
            async with asyncio.timeout(2):
                while not (line := await answer.content.readline()).startswith(b"data: "):
                    pass
            return json.loads(line[6:]), time.monotonic()

        first, _ = await message()
        assert first == {"r": {"free": SLOTS, "total": SLOTS, "state": "Ready"}}
        await asyncio.sleep(0.1)
        changed_at = time.monotonic()
        running.replicas.lease(running.replica("r"))
        changed, came_at = await message()
        assert changed["r"]["free"] == SLOTS - 1
        assert came_at - changed_at < 0.2
        _, beat_at = await message()
        assert 0.3 < beat_at - came_at < 0.8
        running.replicas.move(running.replica("r"), ReplicaState.DRAINING, 0.0)
        draining, _ = await message()
        assert draining["r"] == {"free": 0, "total": SLOTS, "state": "Draining"}


async def test_shutting_down_refuses_new_requests_waits_for_running_ones_and_ends_the_slot_stream(mid: Engine) -> None:
    async with agent(ready_replica("r", mid.url)) as running, client(running) as http:
        slots = await http.get(f"{running.url}/replicas/slots")
        request = await http.post("chat/completions", json=chat(tokens=100, stream=True))
        stopping = asyncio.create_task(running.door.shutdown(SOON_S))
        await asyncio.sleep(0.05)
        async with http.post("chat/completions", json=chat()) as answer:
            assert await refused(answer) == (503, "draining")
        assert (await events(request))[-1] == "[DONE]"
        await asyncio.wait_for(stopping, 2)
        await asyncio.wait_for(slots.read(), 2)


async def test_what_outlasts_the_drain_is_told_so(mid: Engine) -> None:
    async with agent(ready_replica("r", mid.url)) as running, client(running) as http:
        request = await http.post("chat/completions", json=chat(tokens=3000, stream=True))
        await request.content.readline()
        await asyncio.wait_for(running.door.shutdown(0.1), 2)
        assert (await events(request))[-1]["error"]["code"] == "draining"
    await mid.until_idle(2)


async def test_requests_are_counted_by_pool_and_status(tiny: Engine) -> None:
    registry = CollectorRegistry()
    async with agent(ready_replica("r", tiny.url), registry=registry) as running, client(running) as http:
        for body in (chat(stream=True), chat(), {"n": 0}):
            async with http.post("chat/completions", json=body) as answer:
                await answer.read()

    def value(name: str, **labels: str) -> float | None:
        return registry.get_sample_value(name, {"node_id": "node", **labels})

    assert value("llorch_agent_requests_total", pool="chat", status="200") == 2
    assert value("llorch_agent_requests_total", pool="chat", status="400") == 1
    assert value("llorch_agent_first_token_seconds_count", pool="chat") == 1
    assert value("llorch_agent_leaving_requests") == 0
