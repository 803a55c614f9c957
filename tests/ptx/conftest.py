"""Every test here runs on the stand-in and leaves without a race; at the end, how much was run."""

from collections import Counter

import pytest

from ptx import build, cases, device

WHY_NOT = build.why_not()
totals: Counter[str] = Counter()  # of all processes


@pytest.fixture(autouse=True)
def _no_problems():
    if WHY_NOT:
        pytest.skip(f"the kernels' PTX can't run here: {WHY_NOT}")
    device.load()
    device.reset()
    yield
    assert device.races() == 0, device.problems()


def pytest_sessionfinish(session):
    mine = {"results": cases.compared, "launches": device.launches() if cases.compared else 0}
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["ptx"] = mine
    else:
        totals.update(mine)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    totals.update(getattr(node, "workeroutput", {}).get("ptx", {}))


def pytest_terminal_summary(terminalreporter):
    if totals["results"]:
        terminalreporter.write_line(f"PTX: {totals['results']} results held against the CPU operators, {totals['launches']} launches")
