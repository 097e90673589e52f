"""What only the SQLite store promises: durability, several processes at one file, a short log, clear refusals."""

from __future__ import annotations

import asyncio
import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import AsyncGenerator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest

from llorch_api import GPUNode, GPUPool, ObjectMeta
from llorch_store import Event, EventType, Key, StoreError, Unavailable
from llorch_store.core.validation import parse
from llorch_store.factory import open_store
from llorch_store.sqlite import SQLiteStore

pytestmark = pytest.mark.functional

WRITER = """
import asyncio, sys
from llorch_api import GPUNode, ObjectMeta
from llorch_store import Key
from llorch_store.sqlite import SQLiteStore

async def main(path, prefix, count):
    async with SQLiteStore(path) as store:
        for n in range(count):
            name = f"{prefix}-{n}"
            await store.apply(GPUNode(metadata=ObjectMeta(name=name)), field_manager="writer")
            await store.patch_status(GPUNode, Key("", name), {"observedGeneration": n}, field_manager="writer")
            print(name, flush=True)

asyncio.run(main(sys.argv[1], sys.argv[2], int(sys.argv[3])))
"""


def start_writer(path: Path, prefix: str, count: int) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", WRITER, str(path), prefix, str(count)], stdout=subprocess.PIPE, text=True)


def node(name: str) -> GPUNode:
    return GPUNode(metadata=ObjectMeta(name=name))


def watch(store: SQLiteStore, kind: Any) -> aclosing[AsyncGenerator[Event[Any], None]]:
    return aclosing(store.watch(kind))


async def test_a_writer_killed_at_any_moment_loses_no_acknowledged_write(tmp_path: Path) -> None:
    path = tmp_path / "llorch.db"
    writer = start_writer(path, "n", 100_000)
    assert writer.stdout is not None
    acknowledged = [writer.stdout.readline().strip()]
    await asyncio.sleep(0.3)
    os.kill(writer.pid, signal.SIGKILL)
    acknowledged += writer.stdout.read().split()
    writer.wait()
    writer.stdout.close()

    async with SQLiteStore(path) as store:
        found = {item.metadata.name: item.status.observed_generation for item in (await store.list(GPUNode)).items}

    assert len(acknowledged) > 10
    assert [name for name in acknowledged if found.get(name) != int(name.removeprefix("n-"))] == []


async def test_two_processes_see_each_others_writes_within_300_ms(tmp_path: Path) -> None:
    path = tmp_path / "llorch.db"
    async with SQLiteStore(path) as store, watch(store, GPUNode) as events:
        assert (await anext(events)).type is EventType.SYNCED
        writer = start_writer(path, "n", 1)
        assert writer.stdout is not None
        await asyncio.to_thread(writer.stdout.readline)
        async with asyncio.timeout(0.3):
            event = await anext(events)
        assert event.object is not None
        assert event.object.metadata.name == "n-0"
        assert await asyncio.to_thread(writer.wait) == 0
        writer.stdout.close()


async def test_several_processes_may_make_and_write_one_file_at_once(tmp_path: Path) -> None:
    path = tmp_path / "new" / "llorch.db"
    writers = [start_writer(path, prefix, 25) for prefix in ("a", "b", "c")]
    assert [await asyncio.to_thread(writer.wait) for writer in writers] == [0, 0, 0]
    for writer in writers:
        assert writer.stdout is not None
        writer.stdout.close()

    async with SQLiteStore(path) as store:
        items = (await store.list(GPUNode)).items

    assert len(items) == 75
    assert len({item.metadata.resource_version for item in items}) == 75


async def test_objects_outlive_the_process_with_their_owners(tmp_path: Path) -> None:
    path, key = tmp_path / "llorch.db", Key("default", "chat")
    document: dict[str, Any] = {
        "metadata": {"name": "chat", "namespace": "default"},
        "spec": {"model": {"source": "hf:a/b"}, "slots": 8},
    }
    async with SQLiteStore(path) as store:
        first = await store.apply(parse(GPUPool, document), field_manager="me")

    async with SQLiteStore(path) as store:
        assert await store.get(GPUPool, key) == first
        del document["spec"]["slots"]
        after = await store.apply(parse(GPUPool, document), field_manager="me")

    assert after.spec.slots == 4
    assert after.metadata.uid == first.metadata.uid


async def test_a_watcher_that_missed_too_many_deletions_lists_again(tmp_path: Path) -> None:
    async with SQLiteStore(tmp_path / "llorch.db", kept_deletions=3) as store:
        for n in range(10):
            await store.apply(node(f"n-{n}"), field_manager="me")
        async with watch(store, GPUNode) as events:
            while (await anext(events)).type is not EventType.SYNCED:
                pass
            for n in range(8):
                await store.delete(GPUNode, Key("", f"n-{n}"))
            said = []
            while (event := await anext(events)).type is not EventType.SYNCED:
                assert event.object is not None
                said.append((event.type, event.object.metadata.name))

    assert sorted(said) == [(EventType.DELETED, f"n-{n}") for n in range(8)]


async def test_a_write_waits_for_another_processs_lock_and_reads_do_not(tmp_path: Path) -> None:
    path = tmp_path / "llorch.db"
    async with SQLiteStore(path) as store:
        await store.apply(node("a"), field_manager="me")
        other = sqlite3.connect(path, isolation_level=None)
        try:
            other.execute("BEGIN IMMEDIATE")
            write = asyncio.create_task(store.apply(node("b"), field_manager="me"))
            async with asyncio.timeout(1):
                assert (await store.get(GPUNode, Key("", "a"))).metadata.name == "a"
            assert not write.done()
            other.execute("COMMIT")
        finally:
            other.close()
        assert (await write).metadata.name == "b"


async def test_a_lock_that_is_never_given_back_ends_in_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llorch_store.sqlite_file.BUSY_SECONDS", 0.2)
    path = tmp_path / "llorch.db"
    async with SQLiteStore(path) as store:
        other = sqlite3.connect(path, isolation_level=None)
        try:
            other.execute("BEGIN IMMEDIATE")
            with pytest.raises(Unavailable, match=r"llorch\.db: another process has been writing for"):
                await store.apply(node("b"), field_manager="me")
        finally:
            other.close()
        await store.apply(node("b"), field_manager="me")


async def test_a_cancelled_write_leaves_the_store_usable(tmp_path: Path) -> None:
    async with SQLiteStore(tmp_path / "llorch.db") as store:
        for n in range(20):
            write = asyncio.create_task(store.apply(node(f"n-{n}"), field_manager="me"))
            await asyncio.sleep(n * 0.0001)
            write.cancel()
            await asyncio.wait([write])
        async with asyncio.timeout(2):
            await store.apply(node("last"), field_manager="me")
        assert "last" in {item.metadata.name for item in (await store.list(GPUNode)).items}


async def _refusal(path: Path) -> str:
    with pytest.raises(StoreError) as refused:
        async with open_store(f"sqlite:{path}"):
            pass
    return str(refused.value)


async def test_a_path_that_cannot_be_written_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "dir").mkdir()
    assert await _refusal(tmp_path / "dir") == f"{tmp_path}/dir: cannot be opened for writing: Is a directory"
    assert await _refusal(tmp_path / "file" / "db") == f"{tmp_path}/file/db: cannot be opened for writing: File exists"


async def test_a_file_that_is_no_database_of_ours_is_refused_and_left_alone(tmp_path: Path) -> None:
    text, foreign, newer = tmp_path / "text", tmp_path / "foreign", tmp_path / "newer"
    text.write_text("hello " * 500)
    with sqlite3.connect(foreign) as database:
        database.execute("CREATE TABLE theirs (x)")
    database.close()
    async with SQLiteStore(newer):
        pass
    with sqlite3.connect(newer) as database:
        database.execute("PRAGMA user_version = 99")
    database.close()
    before = (text.read_bytes(), foreign.read_bytes())

    assert await _refusal(text) == f"{text}: is not an SQLite database"
    assert await _refusal(foreign) == f"{foreign}: is the database of another program"
    assert await _refusal(newer) == f"{newer}: has format 99, this version of llorch reads 1"
    assert (text.read_bytes(), foreign.read_bytes()) == before


async def test_an_unknown_store_is_refused_in_one_line() -> None:
    for spec in ("redis:", "sqlite:", "", "kubernetes:x"):
        with pytest.raises(StoreError, match="must be kubernetes, sqlite:PATH or memory:"):
            open_store(spec)
