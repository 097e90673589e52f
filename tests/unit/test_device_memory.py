"""Whose memory is it, and how much has the machine: attribution, cgroups, XIDs."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llorch_agent.core.readings import DeviceReading
from llorch_agent.core.vram import Attribution, Tenant
from llorch_agent.core.xid import is_failure
from llorch_agent.system import Roots, read_cores, read_memory

GIB = 1024**3


def device(used: int, uuid: str = "g0") -> DeviceReading:
    return DeviceReading(uuid=uuid, total=24_000, free=24_000 - used, used=used)


def test_with_matching_pids_the_split_is_exact():
    split = Attribution().split([device(9_000)], [Tenant("a", {"g0": 6_000}, {"g0": 5_500})])
    assert split.used["a"]["g0"] == 5_500
    assert split.foreign["g0"] == 3_500


def test_without_pids_what_was_there_before_the_engine_is_foreign():
    attribution = Attribution()
    assert attribution.split([device(4_000)], []).foreign["g0"] == 4_000
    loading = attribution.split([device(4_000)], [Tenant("a", {"g0": 6_000})])
    assert (loading.used["a"]["g0"], loading.foreign["g0"]) == (0, 4_000)
    loaded = attribution.split([device(9_500)], [Tenant("a", {"g0": 6_000})])
    assert (loaded.used["a"]["g0"], loaded.foreign["g0"]) == (5_500, 4_000)


def test_without_pids_what_exceeds_every_promise_is_foreign():
    attribution = Attribution()
    attribution.split([device(0)], [])
    split = attribution.split([device(10_000)], [Tenant("a", {"g0": 4_000}), Tenant("b", {"g0": 2_000})])
    assert split.foreign["g0"] == 4_000
    assert split.used == {"a": {"g0": 4_000}, "b": {"g0": 2_000}}


def test_a_stranger_that_leaves_is_not_held_against_the_engine_for_ever():
    attribution = Attribution()
    attribution.split([device(4_000)], [])
    attribution.split([device(9_000)], [Tenant("a", {"g0": 6_000})])
    attribution.split([device(0)], [Tenant("a", {"g0": 6_000})])
    split = attribution.split([device(5_000)], [Tenant("a", {"g0": 6_000})])
    assert (split.used["a"]["g0"], split.foreign["g0"]) == (5_000, 0)


@given(
    used=st.lists(st.integers(0, 24_000), min_size=1, max_size=6),
    promises=st.lists(st.integers(0, 12_000), max_size=3),
)
def test_no_memory_is_counted_twice_or_lost(used: list[int], promises: list[int]):
    attribution = Attribution()
    tenants = [Tenant(f"r{n}", {"g0": promise}) for n, promise in enumerate(promises)]
    for each in used:
        split = attribution.split([device(each)], tenants)
        ours = sum(shares.get("g0", 0) for shares in split.used.values())
        assert each - len(promises) <= ours + split.foreign["g0"] <= each


@pytest.mark.parametrize("xid", [13, 31, 43, 45, 68, 109])
def test_an_applications_error_does_not_condemn_the_gpu(xid: int):
    assert not is_failure(xid)


@pytest.mark.parametrize("xid", [48, 63, 74, 79, 94, 95, 119, 999])
def test_the_gpus_own_errors_do(xid: int):
    assert is_failure(xid)


@pytest.fixture
def machine(tmp_path: Path) -> Roots:
    roots = Roots(tmp_path / "proc", tmp_path / "cgroup")
    (roots.proc / "self").mkdir(parents=True)
    roots.cgroup.mkdir()
    (roots.proc / "meminfo").write_text("MemTotal: 16777216 kB\nMemFree: 1000 kB\nMemAvailable: 8388608 kB\n")
    return roots


def write(directory: Path, **files: str) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (directory / name.replace("__", ".")).write_text(text)


def test_without_a_limit_it_is_the_hosts_memory(machine: Roots):
    memory = read_memory(machine)
    assert (memory.total, memory.free) == (16 * GIB, 8 * GIB)


def test_a_v2_limit_above_this_cgroup_counts_and_page_cache_is_free(machine: Roots):
    (machine.proc / "self" / "cgroup").write_text("0::/pod/agent\n")
    write(machine.cgroup / "pod" / "agent", memory__max="max\n", memory__current=str(3 * GIB))
    stat = f"anon {GIB}\ninactive_file {GIB}\nactive_file {GIB // 2}\n"
    write(machine.cgroup / "pod", memory__max=str(4 * GIB), memory__current=str(3 * GIB), memory__stat=stat)
    memory = read_memory(machine)
    assert (memory.total, memory.free) == (4 * GIB, 4 * GIB - 3 * GIB // 2)


def test_a_v1_limit_counts_also_where_the_container_sees_only_its_own_mount(machine: Roots):
    (machine.proc / "self" / "cgroup").write_text("4:memory:/kubepods/pod1/abc\n1:cpu,cpuacct:/kubepods\n0::/\n")
    stat = f"total_inactive_file {GIB}\ntotal_active_file 0\n"
    write(
        machine.cgroup / "memory",
        memory__limit_in_bytes=str(2 * GIB),
        memory__usage_in_bytes=str(2 * GIB),
        memory__stat=stat,
    )
    memory = read_memory(machine)
    assert (memory.total, memory.free) == (2 * GIB, GIB)


def test_v1_says_unlimited_with_a_very_large_number(machine: Roots):
    (machine.proc / "self" / "cgroup").write_text("4:memory:/\n")
    write(machine.cgroup / "memory", memory__limit_in_bytes="9223372036854771712", memory__usage_in_bytes="5")
    assert read_memory(machine).total == 16 * GIB


def test_a_cpu_quota_cuts_the_cores(machine: Roots):
    (machine.proc / "self" / "cgroup").write_text("0::/\n")
    write(machine.cgroup, cpu__max="50000 100000\n")
    assert read_cores(machine) == 1
