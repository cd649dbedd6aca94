"""The runner of all benchmarks: GPUs are never shared, time is kept, and what has passed is not done again."""

import json
import subprocess
import sys
import time
from functools import cache
from pathlib import Path

import pytest


BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

from run_all import STEPS, Runner, Step  # noqa: E402


REPORT = """
import os, sys, time
began = time.time()
time.sleep(float(sys.argv[2]))
with open(sys.argv[1], "a") as file:
    print(os.environ["CUDA_VISIBLE_DEVICES"], began, time.time(), sys.argv[3], file=file)
"""


def step(name: str, takes: float = 0.3, **options) -> Step:
    command = (sys.executable, "-c", REPORT, f"{{output}}/{name}.txt", str(takes), "{gpus} {seconds}")
    return Step(name, command, **{"seconds": 20} | options)


def report(folder: Path, name: str) -> tuple[str, float, float, str]:
    gpus, began, ended, rest = (folder / f"{name}.txt").read_text().split(" ", 3)
    return gpus, float(began), float(ended), rest.strip()


def test_one_gpu_serves_one_step_at_a_time_and_all_gpus_serve_one_together(tmp_path):
    steps = [step("both", all_gpus=True), step("first"), step("second"), step("third"), step("again", all_gpus=True)]
    assert Runner(steps, 2, tmp_path, 60).run()
    reports = {s.name: report(tmp_path, s.name) for s in steps}
    assert {name: r[0] for name, r in reports.items() if name in ("both", "again")} == {"both": "0,1", "again": "0,1"}
    assert reports["both"][3] == "2 30" and reports["first"][3] == "1 30"
    assert {reports["first"][0], reports["second"][0]} == {"0", "1"}
    busy = [(gpu, began, ended) for gpus, began, ended, _ in reports.values() for gpu in gpus.split(",")]
    for i, (gpu, began, ended) in enumerate(busy):
        for other, begins, ends in busy[i + 1 :]:
            assert gpu != other or ended <= begins or ends <= began
    _, began, ended, _ = reports["first"]
    assert reports["second"][1] < ended and began < reports["second"][2]  # side by side


def test_time_is_kept(tmp_path):
    steps = [
        step("slow", 60, seconds=1),
        step("too_long", seconds=1000),
        step("rest", until_end=True),
        step("several", all_gpus=True),
        step("lacking", needs="no_such_package"),
    ]
    began = time.monotonic()
    assert not Runner(steps, 1, tmp_path, 100).run()
    assert time.monotonic() - began < 20
    record = json.loads((tmp_path / "run_all.json").read_text())
    assert "all it was given" in record["slow"] and not (tmp_path / "slow.txt").exists()
    assert record["too_long"].startswith("not begun: it may take 1000 s")
    assert record["rest"] == "passed" and 30 < int(report(tmp_path, "rest")[3].split()[1]) < 40
    assert record["several"] == "not begun: it needs several GPUs"
    assert record["lacking"] == "not begun: no_such_package is not installed"


def test_what_has_passed_is_not_done_again_and_what_failed_is(tmp_path):
    failing = Step("failing", (sys.executable, "-c", "print('why'); raise SystemExit(3)"), 20)
    assert not Runner([step("fine", 0), failing], 1, tmp_path, 60).run()
    assert json.loads((tmp_path / "run_all.json").read_text())["failing"].startswith("failed with exit code 3")
    assert (tmp_path / "failing.log").read_text().endswith("why\n")
    before = report(tmp_path, "fine")
    assert Runner([step("fine", 0), step("failing", 0)], 1, tmp_path, 60).run()
    assert report(tmp_path, "fine") == before


@pytest.mark.parametrize("entry", STEPS, ids=lambda entry: entry.name)
def test_every_step_names_a_script_and_options_that_it_has(entry, tmp_path):
    values = {"output": tmp_path, "gpus": 2, "seconds": 30}
    command = [part.format(**values) for part in entry.command]
    scripts = [Path(part) for part in command if part.endswith(".py")]
    assert all(script.exists() for script in scripts)
    if not scripts:  # pytest, which every test shows
        return
    options = {part for part in command[command.index(str(scripts[0])) :] if part.startswith("--")}
    usage = _usage(scripts[0])
    assert not [option for option in options if f"{option} " not in usage]


@cache
def _usage(script: Path) -> str:
    command = [sys.executable, str(script), "--help"]
    environment = {"PYTHONPATH": f"{BENCHMARKS.parent}:{BENCHMARKS}", "PATH": "/usr/bin:/bin", "COLUMNS": "200"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
