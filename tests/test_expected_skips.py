"""A run fails where a test is skipped for a reason that nobody expects."""

import subprocess
import sys
from pathlib import Path

import pytest


HERE = Path(__file__).parent


@pytest.mark.parametrize("workers", ["0", "2"])
@pytest.mark.parametrize(("reason", "status"), [("triton is not installed", 0), ("triton is old", 1)])
def test_an_unexpected_skip_fails_the_run(tmp_path, reason, status, workers):
    for name in ("conftest.py", "expected_skips.py"):
        (tmp_path / name).write_text((HERE / name).read_text())
    (tmp_path / "test_it.py").write_text(
        f"import pytest\n\ndef test_a(): pass\n\ndef test_b(): pytest.skip({reason!r})\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-n", workers, "-p", "no:cacheprovider", "test_it.py"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == status, run.stdout + run.stderr
    assert ("SKIPPED WITHOUT AN EXPECTED REASON test_it.py::test_b: Skipped: triton is old" in run.stdout) == status
