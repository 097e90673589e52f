"""The gateway over real front doors and real llama-servers, spoken to by the openai SDK."""

from __future__ import annotations

import asyncio
import io
import random
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import aiohttp
import openai
import pytest
import pytest_asyncio
from data_path import (
    SLOTS,
    Engine,
    Front,
    agent,
    chat,
    child_agent,
    engine,
    events,
    gateway,
    ready_replica,
    until,
)
from openai.types.chat import ChatCompletionMessageParam

from llorch_api import GPUPool, ReplicaState
from llorch_model.tiny import write_mid, write_tiny
from llorch_store import Key

pytestmark = [pytest.mark.functional, pytest.mark.asyncio(loop_scope="module")]

HELLO: list[ChatCompletionMessageParam] = [{"role": "user", "content": "hello"}]


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
    """An engine that takes its time."""
    async with engine(models / "mid.gguf", args=("--batch-size", "256", "--ubatch-size", "256", "--threads", "1")) as running:
        yield running


async def refused(answer: aiohttp.ClientResponse) -> tuple[int, str]:
    async with answer:
        return answer.status, (await answer.json())["error"]["code"]


async def settled(front: Front, agents: int) -> None:
    """Every agent has been heard of."""
    await until(lambda: front.alive() == agents)
    await asyncio.sleep(0.1)


async def test_the_openai_sdk_chats_streams_and_counts_under_the_name_it_asked_for(tiny: Engine) -> None:
    async with agent(ready_replica("a", tiny.url)) as running, gateway() as front:
        await front.pool("chat", {"a": running.url}, aliases=["gpt-4o-mini"])
        for model in ("chat", "gpt-4o-mini"):
            whole = await front.client.chat.completions.create(model=model, messages=HELLO, max_tokens=6)
            assert whole.model == model
            assert whole.choices[0].finish_reason == "length"
            assert whole.choices[0].message.content
            assert whole.usage is not None
            assert whole.usage.completion_tokens == 6

            stream = await front.client.chat.completions.create(
                model=model, messages=HELLO, max_tokens=6, stream=True, stream_options={"include_usage": True}
            )
            chunks = [chunk async for chunk in stream]
            assert {chunk.model for chunk in chunks} == {model}
            assert chunks[-1].usage is not None
            assert chunks[-1].usage.completion_tokens == 6
            assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)

            text = await front.client.completions.create(model=model, prompt="the", max_tokens=6)
            assert text.model == model
            assert text.choices[0].text
        assert front.metric("llorch_gateway_requests_total", pool="chat", status="200") == 6
        assert front.metric("llorch_gateway_first_token_seconds_count", pool="chat") == 2
        assert front.metric("llorch_gateway_in_flight_requests", pool="chat") == 0


async def test_models_are_listed_with_their_aliases(tiny: Engine) -> None:
    async with agent(ready_replica("a", tiny.url)) as running, gateway() as front:
        await front.pool("chat", {"a": running.url}, aliases=["gpt-4o-mini"])
        await front.pool("later", {})
        listed = {model.id: model async for model in front.client.models.list()}
        assert set(listed) == {"chat", "gpt-4o-mini", "later"}
        assert (await front.client.models.retrieve("gpt-4o-mini")).id == "gpt-4o-mini"
        async with front.http.get("/v1/models") as answer:
            states = {each["id"]: each["status"]["value"] for each in (await answer.json())["data"]}
        assert states == {"chat": "loaded", "gpt-4o-mini": "loaded", "later": "unloaded"}


async def test_what_the_client_got_wrong_is_its_own_error(tiny: Engine) -> None:
    async with agent(ready_replica("a", tiny.url)) as running, gateway(max_body_mib=1) as front:
        await front.pool("chat", {"a": running.url})
        with pytest.raises(openai.NotFoundError) as missing:
            await front.client.chat.completions.create(model="nonesuch", messages=HELLO)
        assert missing.value.code == "model_not_found"
        with pytest.raises(openai.NotFoundError):
            await front.client.models.retrieve("nonesuch")
        with pytest.raises(openai.BadRequestError) as long:
            await front.client.chat.completions.create(model="chat", messages=[{"role": "user", "content": "word " * 5000}])
        assert long.value.code == "context_length_exceeded"
        assert await refused(await front.http.post("/v1/chat/completions", data=b"{")) == (400, "invalid_request")
        assert await refused(await front.http.post("/v1/chat/completions", json={"model": 3})) == (400, "invalid_request")
        assert await refused(await front.http.post("/v1/chat/completions", json={})) == (400, "missing_required_parameter")
        large = io.BytesIO(b'{"model":"chat","x":"' + b"x" * (1 << 20) + b'"}')
        assert await refused(await front.http.post("/v1/chat/completions", data=large)) == (413, "request_too_large")
        assert await refused(await front.http.post("/v1/images", json={})) == (404, "not_found")


async def test_a_pool_without_a_replica_says_what_it_waits_for(tiny: Engine) -> None:
    async with gateway() as front:
        await front.pool("chat", {}, reason="NotReady", replicas={"chat-1": {"node": "gpu-1", "state": "Loading"}})
        async with front.http.post("/v1/chat/completions", json=chat()) as answer:
            assert answer.status == 503
            assert int(answer.headers["Retry-After"]) >= 1
            error = (await answer.json())["error"]
        assert error["code"] == "model_not_ready"
        assert "NotReady; chat-1 on gpu-1 is Loading" in error["message"]


async def test_a_full_agent_answers_429_at_once_and_the_gateway_tries_the_next(tiny: Engine, mid: Engine) -> None:
    async with (
        agent(ready_replica("a", mid.url, slots=1)) as full,
        agent(ready_replica("b", tiny.url)) as roomy,
        gateway() as front,
    ):
        await front.pool("chat", {"a": full.url, "b": roomy.url})
        await settled(front, 2)
        lease = full.replicas.lease(full.replica("a"))
        assert lease is not None
        roomy.replicas.move(roomy.replica("b"), ReplicaState.LOADING, 0.0)
        await asyncio.sleep(0.1)
        assert await refused(await front.http.post("/v1/chat/completions", json=chat())) == (429, "no_slot")
        roomy.replicas.move(roomy.replica("b"), ReplicaState.READY, 0.0)
        await asyncio.sleep(0.1)
        for _ in range(5):
            async with front.http.post("/v1/chat/completions", json=chat()) as answer:
                assert answer.status == 200


async def test_a_refusal_that_the_gateway_could_not_foresee_costs_one_try(tiny: Engine) -> None:
    async with agent(ready_replica("a", tiny.url)) as first, agent(ready_replica("b", tiny.url)) as second, gateway() as front:
        await front.pool("chat", {"a": first.url, "b": second.url})
        await settled(front, 2)
        # Both replicas fill up behind the gateway's back, one after the other: it has no message of that yet.
        for running, name in ((first, "a"), (second, "b")):
            leases = [running.replica(name).slots.acquire() for _ in range(SLOTS)]
            async with front.http.post("/v1/chat/completions", json=chat()) as answer:
                assert answer.status == (200 if running is first else 429)
            assert len(leases) == SLOTS
        assert front.metric("llorch_gateway_retries_total", pool="chat", reason="no_slot") >= 2


async def test_many_clients_on_few_slots_are_all_answered_and_the_counts_are_exact(tiny: Engine) -> None:
    async with agent(ready_replica("a", tiny.url)) as running, gateway() as front:
        await front.pool("chat", {"a": running.url})
        await settled(front, 1)
        replica, peak = running.replica("a"), 0

        async def watch() -> None:
            nonlocal peak
            while True:
                peak = max(peak, await tiny.gauge("requests_processing") + await tiny.gauge("requests_deferred"))
                await asyncio.sleep(0.01)

        async def ask(number: int) -> int:
            async with front.http.post("/v1/chat/completions", json=chat(tokens=16, stream=number % 2 == 0)) as answer:
                if answer.status == 200 and number % 2 == 0:
                    assert (await events(answer))[-1] == "[DONE]"
                else:
                    await answer.read()
                return answer.status

        watching = asyncio.create_task(watch())
        statuses = await asyncio.gather(*map(ask, range(256)))
        watching.cancel()
        assert set(statuses) == {200, 429}
        assert peak <= SLOTS
        assert replica.slots.free == SLOTS
        assert running.door.in_flight == 0
        counted = {
            status: front.metric("llorch_gateway_requests_total", pool="chat", status=str(status)) for status in (200, 429)
        }
        assert counted == {status: statuses.count(status) for status in (200, 429)}


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_leaves_frees_its_slot_at_once(mid: Engine, stream: bool) -> None:
    async with agent(ready_replica("a", mid.url)) as running, gateway() as front:
        await front.pool("chat", {"a": running.url})
        replica = running.replica("a")
        async with aiohttp.ClientSession() as http:
            body = chat(tokens=3000, stream=stream)
            request = asyncio.create_task(http.post(f"{front.server.url}/v1/chat/completions", json=body))
            await until(lambda: replica.slots.in_use == 1)
            await asyncio.sleep(0.3)
            if stream:
                (await request).close()
            else:
                request.cancel()
            assert await until(lambda: replica.slots.free == SLOTS) < 0.5
        await until(lambda: front.metric("llorch_gateway_requests_total", pool="chat", status="499") == 1)
        await mid.until_idle(1.0)


async def test_a_frozen_agent_is_left_for_another_and_taken_again_when_it_thaws(tiny: Engine) -> None:
    async with (
        child_agent("a", tiny.url) as freezing,
        agent(ready_replica("b", tiny.url)) as healthy,
        gateway() as front,
    ):
        await front.pool("chat", {"a": freezing.url, "b": healthy.url})
        await settled(front, 2)
        freezing.freeze()
        started = time.monotonic()
        answers = await asyncio.gather(*(front.client.chat.completions.create(**chat()) for _ in range(4)))
        assert len(answers) == 4
        assert time.monotonic() - started < 2.5, "a second of silence, and not the time-out of a request"
        assert front.alive() == 1
        started = time.monotonic()
        await front.client.chat.completions.create(**chat())
        assert time.monotonic() - started < 0.5, "nobody asks an ejected agent first"
        freezing.thaw()
        await until(lambda: front.alive() == 2)
        assert front.metric("llorch_gateway_ejections_total", reason="silent") == 1


async def test_a_busy_agent_is_not_taken_for_a_dead_one(mid: Engine, tiny: Engine) -> None:
    async with agent(ready_replica("a", mid.url)) as busy, gateway() as front:
        await front.pool("chat", {"a": busy.url})
        await settled(front, 1)
        started, words = time.monotonic(), 100
        while time.monotonic() - started < 1.5:  # one prompt after the other, each without a byte until it is read
            words += 1
            await front.client.chat.completions.create(**chat(tokens=1, words=words))
        assert front.metric("llorch_gateway_ejections_total", reason="silent") == 0


async def test_an_agent_that_is_gone_costs_a_try_and_nothing_else(tiny: Engine) -> None:
    async with child_agent("a", tiny.url) as dying, agent(ready_replica("b", tiny.url)) as healthy, gateway() as front:
        await front.pool("chat", {"a": dying.url, "b": healthy.url})
        await settled(front, 2)
        await dying.kill()
        for _ in range(8):
            await front.client.chat.completions.create(**chat())
        await until(lambda: front.alive() == 1)


async def test_an_agent_that_dies_mid_stream_is_an_error_event_and_never_a_silent_end(mid: Engine) -> None:
    async with child_agent("a", mid.url) as dying, gateway() as front:
        await front.pool("chat", {"a": dying.url})
        async with front.http.post("/v1/chat/completions", json=chat(tokens=3000, stream=True)) as answer:
            await answer.content.readline()
            await dying.kill()
            *_, last = await events(answer)
        assert last["error"]["code"] == "engine_failed"
        assert await refused(await front.http.post("/v1/chat/completions", json=chat())) == (503, "no_replica_available")
        await mid.until_idle(2.0)


async def test_an_engine_that_dies_mid_stream_is_an_error_event_that_the_sdk_raises(models: Path) -> None:
    async with engine(models / "mid.gguf") as dying, agent(ready_replica("a", dying.url)) as running, gateway() as front:
        await front.pool("chat", {"a": running.url})
        stream = await front.client.chat.completions.create(model="chat", messages=HELLO, max_tokens=3000, stream=True)
        await anext(stream)
        await dying.kill()
        with pytest.raises(openai.APIError, match="failed"):
            async for _ in stream:
                pass
        assert running.door.in_flight == 0


async def test_an_engine_that_dies_before_the_first_byte_is_replaced_by_the_next_replica(models: Path, tiny: Engine) -> None:
    async with AsyncExitStack() as stack:
        dying = await stack.enter_async_context(engine(models / "mid.gguf"))
        first = await stack.enter_async_context(agent(ready_replica("a", dying.url)))
        second = await stack.enter_async_context(agent(ready_replica("b", tiny.url)))
        front = await stack.enter_async_context(gateway())
        await front.pool("chat", {"a": first.url, "b": second.url})
        await settled(front, 2)
        held = [second.replicas.lease(second.replica("b")) for _ in range(SLOTS - 1)]
        await asyncio.sleep(0.1)
        requests = [
            asyncio.create_task(front.http.post("/v1/chat/completions", json=chat(words=900, tokens=100, stream=stream)))
            for stream in (True, False)
        ]
        await until(lambda: first.door.in_flight == 2)
        for lease in held:
            assert lease is not None
            second.replicas.release(second.replica("b"), lease)
        await dying.kill()
        for request in requests:
            answer = await request
            assert answer.status == 200
            answer.close()
        assert front.metric("llorch_gateway_retries_total", pool="chat", reason="engine_failed") == 2


async def test_the_last_known_replicas_serve_on_when_the_store_forgets_them_all(tiny: Engine) -> None:
    async with agent(ready_replica("a", tiny.url)) as running, gateway() as front:
        await front.pool("chat", {"a": running.url})
        await settled(front, 1)
        await front.store.patch_status(GPUPool, Key("default", "chat"), {"endpoints": {"a": None}}, field_manager="test")
        await asyncio.sleep(0.2)
        await front.client.chat.completions.create(**chat())
        running.replicas.move(running.replica("a"), ReplicaState.DRAINING, 0.0)
        await asyncio.sleep(0.1)
        assert await refused(await front.http.post("/v1/chat/completions", json=chat())) == (503, "model_not_ready")


async def test_an_engine_out_of_a_handoff_file_is_served_under_its_agents_name_for_it(tiny: Engine) -> None:
    async with agent(ready_replica("r0", tiny.url)) as running, gateway() as front:
        await front.pool("chat", {"r0": running.url})
        url = f"{running.url}/replicas/r0"
        patch = {"endpoints": {"r0": None, "node.r0": {"node": "node", "url": url, "state": "Ready", "slotsTotal": SLOTS}}}
        await front.store.patch_status(GPUPool, Key("default", "chat"), patch, field_manager="test")
        await settled(front, 1)
        await front.client.chat.completions.create(**chat())


async def test_an_agent_that_does_not_know_the_gateways_token_is_the_operators_problem_not_the_clients(tiny: Engine) -> None:
    async with agent(ready_replica("a", tiny.url), token="right" * 8) as running:
        for token, status in (("right" * 8, 200), ("wrong" * 8, 503)):
            async with gateway(api_token=token) as front:
                await front.pool("chat", {"a": running.url})
                async with front.http.post("/v1/chat/completions", json=chat()) as answer:
                    assert answer.status == status


async def test_whatever_clients_do_every_slot_comes_back(mid: Engine, tiny: Engine) -> None:
    rng = random.Random(5)
    async with (
        agent(ready_replica("a", mid.url)) as first,
        agent(ready_replica("b", tiny.url)) as second,
        gateway() as front,
    ):
        await front.pool("chat", {"a": first.url, "b": second.url})
        await settled(front, 2)

        async def restless() -> None:
            body = chat(tokens=rng.choice((1, 20, 2000)), words=rng.choice((1, 60)), stream=rng.random() < 0.6)
            await asyncio.sleep(rng.random())
            try:
                async with (
                    asyncio.timeout(rng.choice((0.01, 0.1, 0.5))),
                    front.http.post("/v1/chat/completions", json=body) as answer,
                ):
                    await answer.read()
            except TimeoutError:
                pass

        await asyncio.gather(*(restless() for _ in range(120)))
        for running, name in ((first, "a"), (second, "b")):
            await until(lambda running=running: running.door.in_flight == 0)  # type: ignore[misc]
            assert running.replica(name).slots.free == SLOTS
        await until(lambda: front.metric("llorch_gateway_in_flight_requests", pool="chat") == 0)
        for behind in (mid, tiny):
            await behind.until_idle(1.0)
        counted = sum(
            sample.value
            for family in front.gateway.registry.collect()
            for sample in family.samples
            if sample.name == "llorch_gateway_requests_total"
        )
        assert 0 < counted <= 120, "who left before the request was sent is not counted"
        # What is left open: a slot stream per agent, and idle connections.
        assert front.gateway._upstream.open_connections <= 2 + 2 * SLOTS * 4
