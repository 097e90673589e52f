"""What only the Kubernetes store promises: a watch through every kind of outage, and clear answers from a failing server."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any, ClassVar

import kubernetes.aio.config.incluster_config as incluster
import pytest
from aiohttp import web

from cluster.apiserver import ApiServer
from cluster.faults import FaultyProxy, faulty_proxy
from llorch_api import GPUNode, ObjectMeta
from llorch_store import Conflict, Event, EventType, Forbidden, Key, NotFound, StoreError, Unavailable
from llorch_store.kubernetes import KubernetesStore

pytestmark = [pytest.mark.functional, pytest.mark.usefixtures("no_resources")]

ME = "me"
A = Key("", "a")


@pytest.fixture
async def proxy(crds: ApiServer) -> AsyncIterator[FaultyProxy]:
    async with faulty_proxy(crds) as running:
        yield running


@pytest.fixture
async def store(crds: ApiServer, proxy: FaultyProxy) -> AsyncIterator[KubernetesStore]:
    """The store behind the proxy."""
    async with KubernetesStore(crds.kubeconfig_of("proxy", crds.token, url=proxy.url)) as opened:
        yield opened


@pytest.fixture
async def direct(crds: ApiServer) -> AsyncIterator[KubernetesStore]:
    """The store without the proxy: what others do meanwhile."""
    async with KubernetesStore(crds.kubeconfig) as opened:
        yield opened


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llorch_store.core.backoff.FIRST", 0.05)
    monkeypatch.setattr("llorch_store.core.backoff.LONGEST", 0.5)
    monkeypatch.setattr("llorch_store.kube_watch.SHORT_SECONDS", 0.05)


def node(name: str, **labels: str) -> GPUNode:
    return GPUNode(metadata=ObjectMeta(name=name, labels=labels))


class Told:
    """Everything a watch tells, as it comes."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.versions: list[tuple[str, str]] = []
        self._more = asyncio.Event()

    def add(self, event: Event[GPUNode]) -> None:
        if event.object is None:
            self.lines.append(event.type)
        else:
            metadata = event.object.metadata
            self.lines.append(f"{event.type} {metadata.name}")
            if event.type is not EventType.DELETED:
                self.versions.append((metadata.name, metadata.resource_version))
        self._more.set()

    async def until(self, line: str, count: int = 1, seconds: float = 20) -> None:
        async with asyncio.timeout(seconds):
            while self.lines.count(line) < count:
                self._more.clear()
                await self._more.wait()


@asynccontextmanager
async def watched(store: KubernetesStore, **selection: Any) -> AsyncIterator[Told]:
    told = Told()

    async def follow() -> None:
        async with aclosing(store.watch(GPUNode, **selection)) as events:
            async for event in events:
                told.add(event)

    async with asyncio.TaskGroup() as group:
        task = group.create_task(follow())
        try:
            yield told
        finally:
            task.cancel()


async def _eventually(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not holds():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def _change_all(direct: KubernetesStore) -> None:
    """a stays, b changes, c vanishes, d comes, e is created anew."""
    await direct.apply(node("b", new="1"), field_manager=ME)
    await direct.delete(GPUNode, Key("", "c"))
    await direct.apply(node("d"), field_manager=ME)
    await direct.delete(GPUNode, Key("", "e"))
    await direct.apply(node("e"), field_manager=ME)


CHANGED = ["ADDED d", "ADDED e", "DELETED c", "DELETED e", "MODIFIED b"]


async def test_a_watch_that_was_cut_goes_on_where_it_was(
    store: KubernetesStore, direct: KubernetesStore, proxy: FaultyProxy
) -> None:
    for name in "abce":
        await direct.apply(node(name), field_manager=ME)
    async with watched(store) as told:
        await told.until(EventType.SYNCED)
        proxy.cut(refuse=True)
        await _change_all(direct)
        await asyncio.sleep(0.2)
        proxy.mend()
        await told.until("ADDED e", 2)

    assert sorted(told.lines[5:]) == CHANGED
    assert len(set(told.versions)) == len(told.versions)


@pytest.mark.parametrize("how", ["refused at once", "told in the stream"])
async def test_a_watch_whose_version_expired_lists_again_and_tells_the_difference(
    store: KubernetesStore, direct: KubernetesStore, proxy: FaultyProxy, how: str
) -> None:
    expired = {"kind": "Status", "code": 410, "reason": "Expired", "message": "too old resource version"}

    def gone(request: web.Request) -> web.Response | None:
        if "watch" not in request.query:
            proxy.answer = lambda _: None
            return None
        if how == "refused at once":
            return web.json_response(expired, status=410)
        return web.Response(text=json.dumps({"type": "ERROR", "object": expired}) + "\n")

    for name in "abce":
        await direct.apply(node(name), field_manager=ME)
    async with watched(store) as told:
        await told.until(EventType.SYNCED)
        proxy.cut(refuse=True)
        await _change_all(direct)
        proxy.answer = gone
        proxy.mend()
        await told.until(EventType.SYNCED, 2)
        await direct.apply(node("z"), field_manager=ME)
        await told.until("ADDED z")

    assert sorted(told.lines[5:-2]) == CHANGED
    assert told.lines[-2:] == [EventType.SYNCED, "ADDED z"]
    assert len(set(told.versions)) == len(told.versions)


async def test_a_watch_outlives_a_server_that_is_killed_and_started_again(crds: ApiServer, direct: KubernetesStore) -> None:
    await direct.apply(node("a"), field_manager=ME)
    async with watched(direct) as told, watched(direct, name="b") as only_b:
        await told.until(EventType.SYNCED)
        crds.stop()
        with pytest.raises(Unavailable, match="the API server is not reachable"):
            await direct.get(GPUNode, A)
        crds.launch()
        await asyncio.to_thread(crds.wait_until_ready)
        crds.kubectl("wait", "--for=condition=Established", "--timeout=30s", "crd", "gpunodes.llorch.dev")
        await direct.apply(node("b"), field_manager=ME)
        await told.until("ADDED b")
        await only_b.until("ADDED b")
        await direct.delete(GPUNode, A)
        await told.until("DELETED a")

    assert [line for line in told.lines if line != EventType.SYNCED] == ["ADDED a", "ADDED b", "DELETED a"]


async def test_a_silent_server_is_left_for_a_new_connection(
    store: KubernetesStore, direct: KubernetesStore, proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llorch_store.kube_connection.SILENCE_SECONDS", 0.5)
    async with watched(store) as told:
        await told.until(EventType.SYNCED)
        proxy.stall()
        await direct.apply(node("a"), field_manager=ME)
        await asyncio.sleep(0.6)
        assert told.lines == [EventType.SYNCED]
        proxy.mend()
        await told.until("ADDED a")

    assert told.lines == [EventType.SYNCED, "ADDED a"]


async def test_a_watch_ends_on_the_server_when_its_reader_closes_it(store: KubernetesStore, proxy: FaultyProxy) -> None:
    async with watched(store) as told:
        await told.until(EventType.SYNCED)
        await _eventually(lambda: proxy.streams == 1)
    await _eventually(lambda: proxy.streams == 0)


async def test_a_long_list_comes_in_chunks(store: KubernetesStore, proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llorch_store.kube_watch.CHUNK", 2)
    for name in "abcde":
        await store.apply(node(name), field_manager=ME)
    proxy.requests.clear()

    listing = await store.list(GPUNode)

    assert [item.metadata.name for item in listing.items] == list("abcde")
    assert len(proxy.requests) == 3


@pytest.mark.parametrize("status", [429, 503])
async def test_a_server_that_asks_to_wait_is_quoted(store: KubernetesStore, proxy: FaultyProxy, status: int) -> None:
    body = {"kind": "Status", "message": "too many requests, please try again later"}
    proxy.answer = lambda _: web.json_response(body, status=status, headers={"Retry-After": "7"})

    with pytest.raises(Unavailable, match=f"the API server answered {status}: too many requests") as refused:
        await store.patch_status(GPUNode, A, {"observedGeneration": 1}, field_manager=ME)

    assert refused.value.retry_after == 7
    assert len(proxy.requests) == 1


async def test_a_watch_waits_as_long_as_the_server_asks(store: KubernetesStore, proxy: FaultyProxy) -> None:
    proxy.answer = lambda _: web.Response(status=429, headers={"Retry-After": "1"})
    async with watched(store) as told:
        await asyncio.sleep(0.9)
        assert len(proxy.requests) == 1
        proxy.answer = lambda _: None
        await told.until(EventType.SYNCED)


async def test_after_two_requests_without_an_answer_all_connections_are_new_and_watches_go_on(
    store: KubernetesStore, direct: KubernetesStore, proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llorch_store.kube_connection.REQUEST_SECONDS", 0.3)
    await direct.apply(node("a"), field_manager=ME)
    async with watched(store, name="a") as told:
        await told.until(EventType.SYNCED)
        watches = len([line for line in proxy.requests if "watch=" in line])
        # Several connections stay open behind these; none of them is used again.
        await asyncio.gather(*(store.get(GPUNode, A) for _ in range(5)))
        old = set(proxy.connections)
        proxy.stall()
        for _ in range(2):
            with pytest.raises(Unavailable, match="the API server is not reachable: no answer in time"):
                await store.get(GPUNode, A)
        old |= proxy.connections
        proxy.mend()
        await store.get(GPUNode, A)
        assert len(proxy.connections - old) == 1
        await direct.patch_status(GPUNode, A, {"observedGeneration": 1}, field_manager=ME)
        await told.until("MODIFIED a")
        assert len([line for line in proxy.requests if "watch=" in line]) == max(watches, 1)


async def test_a_steady_writer_to_one_uid_needs_one_request_per_write(
    store: KubernetesStore, direct: KubernetesStore, proxy: FaultyProxy
) -> None:
    uid = (await direct.apply(node("a"), field_manager=ME)).metadata.uid
    await store.patch_status(GPUNode, A, {"heartbeat": {"sequence": 0}}, field_manager=ME, uid=uid)
    proxy.requests.clear()

    for n in range(1, 4):
        await store.patch_status(GPUNode, A, {"heartbeat": {"sequence": n}}, field_manager=ME, uid=uid)
    assert len(proxy.requests) == 3

    # Another writer came between: its version is looked up once.
    await direct.patch_status(GPUNode, A, {"phase": "Online"}, field_manager="operator")
    after = await store.patch_status(GPUNode, A, {"heartbeat": {"sequence": 9}}, field_manager=ME, uid=uid)
    assert (after.status.phase, after.status.heartbeat.sequence) == ("Online", 9)
    assert len(proxy.requests) == 3 + 3


async def test_a_write_to_a_uid_does_not_reach_the_object_that_took_its_name(
    store: KubernetesStore, direct: KubernetesStore
) -> None:
    uid = (await store.apply(node("a"), field_manager=ME)).metadata.uid
    await store.patch_status(GPUNode, A, {"observedGeneration": 1}, field_manager=ME, uid=uid)
    await direct.delete(GPUNode, A)
    new = await direct.apply(node("a"), field_manager=ME)

    with pytest.raises(NotFound, match="deleted and created anew"):
        await store.patch_status(GPUNode, A, {"observedGeneration": 2}, field_manager=ME, uid=uid)

    assert await direct.get(GPUNode, A) == new


async def test_a_conflict_that_the_server_gave_up_on_is_tried_again(store: KubernetesStore, proxy: FaultyProxy) -> None:
    await store.apply(node("a"), field_manager=ME)
    conflict = {"kind": "Status", "message": "the object has been modified"}
    answers = iter([web.json_response(conflict, status=409) for _ in range(3)])
    proxy.answer = lambda _: next(answers, None)

    after = await store.patch_status(GPUNode, A, {"observedGeneration": 1}, field_manager=ME)

    assert after.status.observed_generation == 1
    proxy.answer = lambda _: web.json_response(conflict, status=409)
    with pytest.raises(Conflict):
        await store.patch(GPUNode, A, {}, field_manager=ME, resource_version=after.metadata.resource_version)


async def test_who_may_not_is_told_at_once_also_by_a_watch(crds: ApiServer) -> None:
    if crds.kubectl("get", "serviceaccount", "nobody", check=False).returncode:
        crds.kubectl("create", "serviceaccount", "nobody")
    token = crds.kubectl("create", "token", "nobody").stdout.strip()
    async with KubernetesStore(crds.kubeconfig_of("nobody", token)) as store:
        with pytest.raises(Forbidden, match='cannot get resource "gpunodes"'):
            await store.get(GPUNode, A)
        async with asyncio.timeout(5):
            with pytest.raises(Forbidden, match='cannot list resource "gpunodes"'):
                await anext(store.watch(GPUNode))


async def test_a_watch_that_worked_bears_a_server_that_does_not_know_its_roles_yet(
    store: KubernetesStore, proxy: FaultyProxy
) -> None:
    async with watched(store) as told:
        await told.until(EventType.SYNCED)
        proxy.answer = lambda _: web.json_response({"kind": "Status", "message": "RBAC: not yet"}, status=403)
        proxy.cut()
        await asyncio.sleep(0.5)
        proxy.answer = lambda _: None
        await store.apply(node("a"), field_manager=ME)
        await told.until("ADDED a")


async def test_a_rotated_service_account_token_is_read_again(
    crds: ApiServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = tmp_path / "token"
    token.write_text("expired")
    monkeypatch.delenv("KUBECONFIG", raising=False)
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "127.0.0.1")
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", crds.url.rpartition(":")[2])
    monkeypatch.setattr(incluster, "SERVICE_TOKEN_FILENAME", str(token))
    monkeypatch.setattr(incluster, "SERVICE_CERT_FILENAME", str(crds.ca))
    async with KubernetesStore() as store:
        with pytest.raises(Forbidden, match="does not accept these credentials"):
            await store.list(GPUNode)
        monkeypatch.setattr("llorch_store.kube_connection.CREDENTIALS_SECONDS", 0.0)
        token.write_text(crds.token)
        assert (await store.list(GPUNode)).items == []


@pytest.mark.parametrize("kubeconfig", [None, "", "hello", "[1]", "a: {", "current-context: x\ncontexts: 3", "clusters:\n- x"])
async def test_without_a_way_to_a_server_the_store_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kubeconfig: str | None
) -> None:
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "config"))
    if kubeconfig is not None:
        (tmp_path / "config").write_text(kubeconfig)
    with pytest.raises(StoreError, match="no way to a Kubernetes API server: ") as refused:
        async with KubernetesStore():
            pass
    assert "\n" not in str(refused.value)


class Ghost(GPUNode):
    PLURAL: ClassVar[str] = "gpughosts"


async def test_a_server_without_our_resources_is_named_by_list_and_waited_for_by_watch(store: KubernetesStore) -> None:
    with pytest.raises(NotFound, match="are the CustomResourceDefinitions installed"):
        await store.list(Ghost)
    async with aclosing(store.watch(Ghost)) as events:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.5):
                await anext(events)


async def test_a_name_that_no_object_can_have_reaches_no_other_path(store: KubernetesStore, proxy: FaultyProxy) -> None:
    for name in ("../gpupools", "a/status", "", "A"):
        with pytest.raises(NotFound):
            await store.delete(GPUNode, Key("", name))
    assert proxy.requests == []
