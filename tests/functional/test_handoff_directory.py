"""The handoff directory on a real file system, with real inotify."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import shutil
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from watchdog.observers.inotify import InotifyObserver

from llorch_agent.core.handoff import MAX_BYTES
from llorch_agent.handoff import HandoffDirectory, write_atomically

pytestmark = pytest.mark.functional

LONG_S = 30.0
"""A rescan interval that no test waits for."""


@pytest.fixture
async def directory(tmp_path: Path) -> AsyncIterator[HandoffDirectory]:
    watched = HandoffDirectory(tmp_path / "deep" / "engines", LONG_S)
    yield watched
    watched.close()


async def test_a_missing_directory_is_made(directory: HandoffDirectory) -> None:
    assert directory.scan() == {}
    assert directory.path.is_dir()
    assert directory.notified


@pytest.mark.parametrize("how", ["rename", "write", "delete"])
async def test_a_change_is_known_at_once(directory: HandoffDirectory, how: str) -> None:
    directory.scan()
    file = directory.path / "a.json"
    if how == "delete":
        file.write_bytes(b"{}")
        await directory.wait()
        directory.scan()

    started = time.monotonic()
    if how == "rename":
        write_atomically(file, b"{}")
    elif how == "write":
        file.write_bytes(b"{}")
    else:
        file.unlink()
    await directory.wait()

    assert time.monotonic() - started < 0.3
    assert set(directory.scan()) == (set() if how == "delete" else {"a.json"})


async def test_reading_the_directory_does_not_wake_its_reader(directory: HandoffDirectory) -> None:
    directory.scan()
    write_atomically(directory.path / "a.json", b"{}")
    await directory.wait()

    directory.scan()

    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.3):
            await directory.wait()


async def test_other_files_are_neither_read_nor_noticed(directory: HandoffDirectory) -> None:
    directory.scan()
    (directory.path / ".a.json.1.tmp").write_bytes(b"{}")
    (directory.path / ".hidden.json").write_bytes(b"{}")
    (directory.path / "notes.txt").write_bytes(b"{}")

    assert directory.scan() == {}


async def test_a_rewrite_of_the_same_size_in_the_same_moment_is_seen(directory: HandoffDirectory) -> None:
    file = directory.path / "a.json"
    directory.scan()
    digests = set()
    for number in range(5):
        file.write_bytes(b'{"slots": %d}' % number)
        os.utime(file, (1, 1))
        digests.add(directory.scan()["a.json"].digest)

    assert len(digests) == 5


async def test_what_is_no_small_regular_file_is_refused_and_never_followed(directory: HandoffDirectory, tmp_path: Path) -> None:
    directory.scan()
    secret = tmp_path / "secret.json"
    secret.write_bytes(b"{}")
    (directory.path / "link.json").symlink_to(secret)
    os.mkfifo(directory.path / "pipe.json")
    (directory.path / "folder.json").mkdir()
    (directory.path / "huge.json").write_bytes(b" " * (MAX_BYTES + 1))

    seen = directory.scan()

    assert {name: bool(each.refused) for name, each in seen.items()} == dict.fromkeys(
        ("link.json", "pipe.json", "folder.json", "huge.json"), True
    )
    assert all(each.data == b"" for each in seen.values())


async def test_a_deleted_directory_is_made_again_and_watched_again(directory: HandoffDirectory) -> None:
    directory.scan()
    shutil.rmtree(directory.path)
    await directory.wait()

    assert directory.scan() == {}
    write_atomically(directory.path / "a.json", b"{}")
    async with asyncio.timeout(1):
        await directory.wait()

    assert set(directory.scan()) == {"a.json"}


async def test_without_inotify_the_rescan_finds_it_and_that_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def used_up(self: InotifyObserver) -> None:
        raise OSError(errno.ENOSPC, "inotify watch limit reached")

    monkeypatch.setattr(InotifyObserver, "start", used_up)
    directory = HandoffDirectory(tmp_path / "engines", 0.1)
    with caplog.at_level(logging.WARNING):
        directory.scan()
        directory.scan()
    write_atomically(directory.path / "a.json", b"{}")

    await directory.wait()

    assert set(directory.scan()) == {"a.json"}
    assert not directory.notified
    assert [record.getMessage().count("inotify is not available") for record in caplog.records] == [1]


def test_a_reader_sees_the_old_content_or_the_new_one(tmp_path: Path) -> None:
    file, contents = tmp_path / "a.json", [b"a" * 20_000, b"b" * 30_000]
    write_atomically(file, contents[0])
    over = threading.Event()
    found: set[bytes] = set()

    def read() -> None:
        while not over.is_set():
            found.add(file.read_bytes())

    reader = threading.Thread(target=read)
    reader.start()
    for number in range(60):
        write_atomically(file, contents[number % 2])
    over.set()
    reader.join()

    assert found <= set(contents)
    assert list(tmp_path.iterdir()) == [file], "no temporary file is left"


def test_a_failed_write_leaves_the_old_content(tmp_path: Path) -> None:
    (tmp_path / "a.json").mkdir()

    with pytest.raises(OSError):
        write_atomically(tmp_path / "a.json", b"{}")

    assert [entry.name for entry in tmp_path.iterdir()] == ["a.json"]
