"""What engines were seen to take counts from then on, and never makes a need smaller than what was seen."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llorch_model.core.measured import KEPT, MEASURED_MARGIN_MIB, corrected, measurement_key, merged, noted
from llorch_model.core.vram import MemoryNeed

SIZES = st.integers(0, 200_000)


def need(devices: int = 1) -> MemoryNeed:
    return MemoryNeed(weights_mib=4_000, kv_mib=2_000, compute_mib=250, margin_mib=512, devices=devices, step_mib=180)


@pytest.mark.parametrize(
    ("trusted", "measured", "fitted", "stated", "total"),
    [
        (True, 0, 0, 0, 6_762),
        (True, 6_400, 0, 0, 6_762),
        (True, 7_000, 0, 0, 7_256),
        (True, 0, 9_000, 0, 6_762),
        (True, 0, 0, 5_000, 5_000),
        (True, 7_000, 0, 5_000, 7_000),
        (False, 0, 0, 0, None),
        (False, 5_000, 0, 0, 5_256),
        (False, 0, 5_000, 0, 5_512),
        (False, 6_000, 5_000, 0, 6_256),
        (False, 0, 5_000, 4_500, 4_500),
    ],
)
def test_the_best_that_is_known_decides(trusted: bool, measured: int, fitted: int, stated: int, total: int | None):
    found = corrected(need(), trusted=trusted, measured_mib=measured, fitted_mib=fitted, stated_mib=stated)
    assert (found.total_mib if found else None) == total


@given(trusted=st.booleans(), measured=SIZES, fitted=SIZES, stated=SIZES, devices=st.integers(1, 8))
def test_no_need_is_ever_below_what_was_measured(trusted: bool, measured: int, fitted: int, stated: int, devices: int):
    found = corrected(need(devices), trusted=trusted, measured_mib=measured, fitted_mib=fitted, stated_mib=stated)
    if found is None:
        assert not any((trusted, measured, fitted, stated))
        return
    assert found.total_mib >= measured
    assert found.devices == devices
    if trusted and not stated:
        assert found.total_mib >= need(devices).total_mib, "a measurement corrects upwards only"
        assert measured == 0 or found.total_mib >= measured + devices * MEASURED_MARGIN_MIB


@given(st.lists(st.tuples(st.sampled_from("abcdef"), SIZES), max_size=30))
def test_the_most_that_was_seen_is_kept(seen: list[tuple[str, int]]):
    known: dict[str, int] = {}
    for key, mib in seen:
        known = noted(known, key, mib)
    assert known == {key: max(mib for other, mib in seen if other == key) for key, _ in seen}


def test_old_measurements_make_room_for_new_ones():
    known: dict[str, int] = {}
    for number in range(KEPT + 3):
        known = noted(known, str(number), number)
    assert len(known) == KEPT
    assert list(known)[-1] == str(KEPT + 2)
    assert "0" not in known


def test_every_setting_that_changes_what_is_taken_has_its_own_key():
    base = {"slots": 4, "context_tokens": 4096, "engine_args": ["-ub", "512"], "devices": 1}
    others = [{"slots": 2}, {"context_tokens": 8192}, {"engine_args": []}, {"devices": 2}]
    keys = [measurement_key("sha256:1", **base)] + [measurement_key("sha256:1", **(base | each)) for each in others]
    keys.append(measurement_key("sha256:2", **base))
    assert len(set(keys)) == len(keys)
    assert measurement_key("sha256:1", **(base | {"engine_args": ("-ub", "512")})) == keys[0]


def test_of_several_nodes_the_one_that_saw_most_counts():
    assert merged([{"a": 1, "b": 5}, {"a": 3}, {}]) == {"a": 3, "b": 5}
