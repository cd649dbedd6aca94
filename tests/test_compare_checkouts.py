"""Checkouts are compared in turns, against the first, and those that are wrong are named and not timed."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch


ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
import compare_checkouts  # noqa: E402


# What the processes of a checkout say: its milliseconds, turn after turn, or what is wrong.
MS = {"before": [2.0, 4.0, 3.0], "after": [1.0, 2.5, 2.0]}
FAULTS = {"wrong": "print('\"dq is off by 1.0e+00\"')", "broken": "raise ValueError('no such kernel')",
          "stuck": "import time; time.sleep(60)"}  # fmt: skip
TURNS = """
import json, sys, time
print(100e9, flush=True)
for ms in {ms}:
    if not sys.stdin.readline():
        break
    with open({log!r}, "a") as log:
        print({name!r}, file=log)
    print(json.dumps({{"forward": ms, "backward": 2 * ms}}), flush=True)
"""


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Compare checkouts of some names, with processes that say what is said above."""
    log = tmp_path / "turns"
    log.touch()

    def start(folder, work, call):
        if work == "check":
            code = FAULTS.get(folder.name, "print('\"\"')")
        else:
            code = TURNS.format(ms=MS[folder.name], name=folder.name, log=str(log))
        pipe = subprocess.PIPE
        return subprocess.Popen([sys.executable, "-c", code], stdin=pipe, stdout=pipe, stderr=pipe, text=True)

    def compare(*names, options=()):
        for name in names:
            package = tmp_path / name / "modeling_longnet"
            package.mkdir(parents=True)
            package.joinpath("dilated_attention_triton.py").touch()
        folders = [str(tmp_path / name) for name in names]
        monkeypatch.setattr(sys, "argv", ["compare_checkouts.py", *folders, *options])
        compare_checkouts.main()
        return log.read_text().split(), capsys.readouterr().out

    monkeypatch.setattr(compare_checkouts, "start", start)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a card")
    monkeypatch.setitem(sys.modules, "triton", SimpleNamespace(__version__="3"))
    return compare


def test_checkouts_take_turns_and_are_compared_with_the_first(run):
    turns, out = run("before", "after", options=["--calls", "paper,64,4096,4,2", "--rounds", "3"])
    assert turns == ["before", "after", "after", "before", "before", "after"]
    lines = out.splitlines()
    assert lines[1] == "paper,64,4096,4,2" and len(lines) == 6
    # The ratios are those of each round: 2.0, 1.6 and 1.5.
    assert lines[2].split() == [
        "forward",
        "3.000",
        "ms",
        "33",
        "TFLOP/s",
        "1.000x",
        "before",
        "(2.000",
        "to",
        "4.000)",
    ]
    assert lines[3].split() == ["forward", "2.000", "ms", "50", "TFLOP/s", "1.600x", "after", "(1.000", "to", "2.500)"]
    assert lines[5].split() == [
        "backward",
        "4.000",
        "ms",
        "62",
        "TFLOP/s",
        "1.600x",
        "after",
        "(2.000",
        "to",
        "5.000)",
    ]


def test_checkouts_that_are_wrong_or_hang_are_named_and_not_timed(run):
    turns, out = run("before", *FAULTS, options=["--calls", "paper,64,4096,4,2", "--seconds", "3", "--rounds", "2"])
    assert set(turns) == {"before"}
    found = [line.partition(": ")[2] for line in out.splitlines() if line.startswith("NOT TIMED")]
    assert found == ["dq is off by 1.0e+00", "ValueError: no such kernel", "hangs"]


def test_a_checkout_that_stops_answering_ends_the_run(run):
    """There are three turns to take, and four are asked for."""
    with pytest.raises(SystemExit, match="^paper,64,4096,4,2: a checkout that was right ended with 0$"):
        run("before", "after", options=["--calls", "paper,64,4096,4,2", "--rounds", "4"])


def test_without_a_checkout_that_is_right_the_run_fails(run):
    with pytest.raises(SystemExit, match="^no checkout is right; nothing is timed$"):
        run("wrong", options=["--calls", "paper,64,4096,4,2"])


@pytest.mark.parametrize("inside", [True, False])
def test_what_is_measured_is_the_package_of_the_checkout(inside, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(
        sys.modules,
        "modeling_longnet",
        SimpleNamespace(__file__=str(tmp_path / ("this" if inside else "other") / "modeling_longnet/__init__.py")),
    )
    monkeypatch.setattr(compare_checkouts, "check", lambda call: "nothing")
    args = SimpleNamespace(checkouts=[tmp_path / "this"], work="check", calls=[None])
    if inside:
        compare_checkouts.work(args)
        assert capsys.readouterr().out == '"nothing"\n'
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
