"""pytest -p benchmarks.gpu.failures: prints each failure when it happens, for a run that is cut off never comes to its report."""

import pytest


class Failures:
    def __init__(self, config: pytest.Config) -> None:
        self.terminal = config.pluginmanager.get_plugin("terminalreporter")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed and self.terminal is not None:
            self.terminal.write_line(f"\nFAILED {report.nodeid}\n{report.longreprtext[-3000:]}")


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):  # the process that started the others hears of all failures
        config.pluginmanager.register(Failures(config))
