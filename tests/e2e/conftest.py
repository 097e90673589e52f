"""One kind cluster for the session; a story's later steps are not tried once one failed; a failure shows the cluster."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator

import pytest
from fleet import Fleet, running_fleet
from machine import CACHE, CannotRun, image, ready_machine

FLEET = pytest.StashKey[Fleet]()
BROKEN = pytest.StashKey[str]()


@pytest.fixture(scope="session")
def fleet(request: pytest.FixtureRequest) -> Iterator[Fleet]:
    """The cluster. Where it cannot be made: a failure in CI, a skip that says why on a user's machine."""
    try:
        machine = ready_machine()
    except CannotRun as reason:
        if os.environ.get("CI"):
            pytest.fail(f"e2e cannot run here: {reason}")
        pytest.skip(f"e2e cannot run here: {reason}")
    operator, agent = image("operator", machine.base_image), image("agent", machine.base_image)
    with running_fleet(machine, operator, agent) as made:
        request.config.stash[FLEET] = made
        yield made


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Shows the cluster with a failure, whole in a file and its end in the report."""
    report = yield
    if report.failed and item.parent is not None and "fleet" in getattr(item, "fixturenames", ()):
        item.parent.stash.setdefault(BROKEN, item.name)
        made = item.config.stash.get(FLEET, None)
        if made is not None:
            seen = made.report()
            path = CACHE / "e2e" / f"failure-{item.name}.txt"
            path.write_text(seen)
            report.sections.append(("cluster", f"whole report: {path}\n" + seen[-20_000:]))
    return report


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Steps of a story build on one another."""
    broken = item.parent.stash.get(BROKEN, None) if item.parent is not None else None
    if broken is not None and "fleet" in getattr(item, "fixturenames", ()):
        pytest.skip(f"the story ended at {broken}")
