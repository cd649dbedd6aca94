"""Checkouts are compared in turns, against the first, and those that are wrong are named and not timed."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch


ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
import compare_checkouts  # noqa: E402


# What the process of a checkout prints: its milliseconds, or what is wrong.
MS = {"before": 2.0, "after": 1.6}
FAULTS = {"wrong": "print('[\"dq is off by 1.0e+00\"]')", "broken": "raise ValueError('no such kernel')",
          "stuck": "import time; time.sleep(60)"}  # fmt: skip


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Compare checkouts of some names, with processes that print what is said above."""
    started = []

    def start(folder, work, calls):
        started.append((folder.name, work))
        if work == "check":
            code = FAULTS.get(folder.name, "print('[\"\"]')")
        else:
            ms = MS[folder.name] + 0.01 * len(started)
            found = {"forward": ms, "backward": 2 * ms, "flops": 100e9}
            code = f"print({json.dumps([found] * len(calls))!r})"
        return subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def compare(*names, options=()):
        for name in names:
            package = tmp_path / name / "modeling_longnet"
            package.mkdir(parents=True)
            package.joinpath("dilated_attention_triton.py").touch()
        folders = [str(tmp_path / name) for name in names]
        monkeypatch.setattr(sys, "argv", ["compare_checkouts.py", *folders, *options])
        compare_checkouts.main()
        return started, capsys.readouterr().out

    monkeypatch.setattr(compare_checkouts, "start", start)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a card")
    monkeypatch.setitem(sys.modules, "triton", SimpleNamespace(__version__="3"))
    return compare


def test_checkouts_take_turns_and_are_compared_with_the_first(run):
    started, out = run("before", "after", options=["--calls", "paper,64,4096,4,2", "--rounds", "2"])
    assert [name for name, work in started if work == "time"] == ["before", "after", "after", "before"]
    lines = out.splitlines()
    assert lines[1] == "paper,64,4096,4,2" and len(lines) == 6
    # The third to the sixth process: 2.03, 1.64, 1.65 and 2.06 ms.
    assert lines[2].split()[:7] == ["forward", "2.045", "ms", "49", "TFLOP/s", "1.000x", "before"]
    assert lines[3].split()[:7] == ["forward", "1.645", "ms", "61", "TFLOP/s", "1.243x", "after"]
    assert lines[5].split()[:7] == ["backward", "3.290", "ms", "76", "TFLOP/s", "1.243x", "after"]


def test_checkouts_that_are_wrong_or_hang_are_named_and_not_timed(run):
    started, out = run("before", *FAULTS, options=["--calls", "paper,64,4096,4,2", "--seconds", "3"])
    assert {name for name, work in started if work == "time"} == {"before"}
    found = [line.partition(": ")[2] for line in out.splitlines() if line.startswith("NOT TIMED")]
    assert found == [
        f"paper,64,4096,4,2: {fault}" for fault in ("dq is off by 1.0e+00", "ValueError: no such kernel", "hangs")
    ]


def test_without_a_checkout_that_is_right_the_run_fails(run):
    with pytest.raises(SystemExit, match="^no checkout is right; nothing is timed$"):
        run("wrong", options=["--calls", "paper,64,4096,4,2"])


@pytest.mark.parametrize("inside", [True, False])
def test_what_is_measured_is_the_package_of_the_checkout(inside, tmp_path, monkeypatch):
    monkeypatch.setitem(
        sys.modules,
        "modeling_longnet",
        SimpleNamespace(__file__=str(tmp_path / ("this" if inside else "other") / "modeling_longnet/__init__.py")),
    )
    args = SimpleNamespace(checkouts=[tmp_path / "this"], work="time", calls=[])
    if inside:
        assert compare_checkouts.work(args) == []
        return
    with pytest.raises(SystemExit, match="^python imports .*other.* instead of the package in .*this$"):
        compare_checkouts.work(args)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["."], "holds no modeling_longnet with fused kernels"),
        (
            [str(ROOT), "--calls", "paper,128"],
            "is not PRESET,HEAD_DIM,TOKENS,HEADS,KV_HEADS, as paper,128,32768,16,16",
        ),
        ([str(ROOT), "--calls", "other,128,4096,2,2"], "is not PRESET,HEAD_DIM,TOKENS,HEADS,KV_HEADS"),
        ([str(ROOT), "--rounds", "0"], "--rounds 0 times nothing; give 1 or more"),
        ([str(ROOT), "--calls", "paper,128,4096,3,2"], "3 heads do not share 2 KV heads evenly"),
    ],
)
def test_wrong_options_are_refused_by_the_parser(options, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["compare_checkouts.py", *options])
    with pytest.raises(SystemExit, match="2"):
        compare_checkouts.main()
    assert message in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.gpu
def test_the_same_checkout_twice_is_about_as_fast():
    script = str(ROOT / "benchmarks/compare_checkouts.py")
    command = [sys.executable, script, str(ROOT), str(ROOT), "--calls", "paper,64,8192,16,16"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    ratios = [float(line.split()[5].removesuffix("x")) for line in run.stdout.splitlines()[2:]]
    assert len(ratios) == 4 and ratios[0] == ratios[2] == 1 and all(2 / 3 < ratio < 3 / 2 for ratio in ratios)
