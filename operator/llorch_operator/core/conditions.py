"""Conditions as `kubectl wait` and `kubectl describe` read them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from llorch_api import Condition, ConditionStatus


def condition(type_: str, status: bool | None, reason: str, message: str, generation: int) -> Condition:
    """A condition without its time yet; None means Unknown."""
    value = ConditionStatus.UNKNOWN if status is None else ConditionStatus.TRUE if status else ConditionStatus.FALSE
    return Condition(
        type=type_, status=value, reason=reason, message=message[:4096], last_transition_time="", observed_generation=generation
    )


def merge(old: Iterable[Condition], new: Sequence[Condition], now: str) -> list[Condition]:
    """`new` with times: a condition keeps its lastTransitionTime as long as its status stays."""
    known = {item.type: item for item in old}
    merged = []
    for item in new:
        before = known.get(item.type)
        since = before.last_transition_time if before is not None and before.status is item.status else now
        merged.append(item.model_copy(update={"last_transition_time": since}))
    return merged
