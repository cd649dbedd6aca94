"""Shared by all tests: a deterministic hypothesis profile, why a GPU test is skipped, and that nothing else is quietly."""

import pytest
import torch
from expected_skips import is_expected
from hypothesis import settings


settings.register_profile("deterministic", derandomize=True, deadline=None, database=None, max_examples=60)
settings.load_profile("deterministic")

# The tensors are small and several workers share the cores: more threads only wait for one another.
torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device; torch.cuda.is_available() is False"))


def _unexpected_skips(config) -> list[str]:
    reporter = config.pluginmanager.get_plugin("terminalreporter")  # of xdist's workers, only their controller has it
    skipped = [] if reporter is None else reporter.stats.get("skipped", [])
    reasons = ((report.nodeid, str(report.longrepr[2])) for report in skipped if isinstance(report.longrepr, tuple))
    return [f"{name}: {reason}" for name, reason in reasons if not is_expected(reason)]


def pytest_terminal_summary(terminalreporter, config):
    for line in _unexpected_skips(config):
        terminalreporter.write_line(f"SKIPPED WITHOUT AN EXPECTED REASON {line}", red=True)


def pytest_sessionfinish(session):
    if session.exitstatus == pytest.ExitCode.OK and _unexpected_skips(session.config):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
