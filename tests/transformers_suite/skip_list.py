"""A pytest plugin: every skip of the suite stands in ``tests/transformers_suite.md`` with its reason, and no other."""

import re
from collections import defaultdict
from pathlib import Path

import pytest
import transformers


FILE = Path(__file__).parents[1] / "transformers_suite.md"
MARK = "<!-- below: written by `make conformance-skips` -->\n"


def pytest_addoption(parser):
    parser.addoption("--write-skips", action="store_true", help=f"write {FILE.name} instead of checking it")


def pytest_configure(config):
    if not hasattr(config, "workerinput"):  # with xdist, the process that hears of all tests
        config.pluginmanager.register(SkipList(config))


class SkipList:
    def __init__(self, config):
        self.config = config
        self.skipped: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
        self.classes: set[str] = set()

    def pytest_runtest_logreport(self, report):
        _, cls, test = report.nodeid.split("::")
        self.classes.add(cls)
        if report.skipped and not hasattr(report, "context"):  # subtests have a context
            self.skipped[_reason(report)][test].add(cls)

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session):
        if self.config.option.keyword or "::" in "".join(self.config.args):
            return
        text = FILE.read_text()
        head, _, written = text.partition(MARK)
        found = self.render()
        if self.config.option.write_skips:
            FILE.write_text(head + MARK + found)
        elif not written.startswith(f"\nVersion {transformers.__version__}"):
            print(f"\n{FILE.name} lists the skips of another version of transformers; not compared")
        elif written != found:
            difference = sorted(set(written.splitlines()) ^ set(found.splitlines()))
            print(f"\nskips differ from {FILE.name}; review, then `make conformance-skips`:", *difference, sep="\n  ")
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def render(self) -> str:
        lines = [f"\nVersion {transformers.__version__}; tests named without a class are skipped in all of them.\n"]
        for reason, tests in sorted(self.skipped.items()):
            lines.append(f"\n**{reason}**\n\n")
            for test, classes in sorted(tests.items()):
                where = "" if classes == self.classes else f" ({', '.join(sorted(classes))})"
                lines.append(f"- `{test}`{where}\n")
        return "".join(lines)


def _reason(report) -> str:
    reason = report.longrepr[2].removeprefix("Skipped: ")
    return re.sub(r"(\w+Test)::", "", re.sub(r"\s+", " ", reason)).strip()
