"""The benchmarks of generation run small, and a billion-token run that was stopped goes on with the same losses."""

import csv
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from modeling_longnet.cache_layer import LongNetCacheLayer


ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import benchmark_generation  # noqa: E402


def run(script: str, *options: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / script), *options], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def losses(folder: Path) -> list[tuple[int, int, str]]:
    (path,) = folder.glob("*.csv")
    rows = csv.DictReader(line for line in path.read_text().splitlines() if not line.startswith("#"))
    return [(int(row["first_token"]), int(row["last_token"]), row["nats_per_byte"]) for row in rows]


def test_a_stopped_stream_of_source_code_goes_on_with_the_same_losses(tmp_path):
    options = ("--small", "--tokens", "6100", "--train-steps", "4", "--train-length", "128", "--train-tokens", "256")
    options += ("--chunk", "1024", "--last-segment", "1024")
    whole = run(
        "one_billion_tokens.py", *options, "--state", str(tmp_path / "a"), "--results", str(tmp_path / "whole")
    )
    assert "tokens: 6,100" in whole and "resumed: False" in whole
    parts = (*options, "--state", str(tmp_path / "b"), "--results", str(tmp_path / "parts"))
    assert "stopped at token 3,072" in run("one_billion_tokens.py", *parts, "--stop-after", "3000")
    assert not (tmp_path / "parts").exists()
    with pytest.raises(AssertionError, match="belongs to a run with other settings"):
        run("one_billion_tokens.py", *parts, "--seed", "1")
    resumed = run("one_billion_tokens.py", *parts)
    assert "goes on at token 3,072" in resumed and "resumed: True" in resumed
    expected = losses(tmp_path / "whole")
    assert [row[:2] for row in expected][-1] == (5120, 6099)
    assert len({row[2] for row in expected}) == len(expected) == 6
    assert losses(tmp_path / "parts") == expected
    assert list((tmp_path / "b").iterdir()) == []  # what is done needs no state
    # Stopped after its last chunk, a short one, there is nothing left to score.
    ended = (*options, "--state", str(tmp_path / "c"), "--results", str(tmp_path / "ended"))
    assert "stopped at token 6,100" in run("one_billion_tokens.py", *ended, "--stop-after", "6100")
    printed = run("one_billion_tokens.py", *ended)
    assert "goes on at token 6,100" in printed
    assert losses(tmp_path / "ended") == expected
    tokens = [(last + 1 - first - (first == 0), float(nats)) for first, last, nats in expected]
    mean = sum(number * nats for number, nats in tokens) / 6099
    assert float(re.search(r"nats_per_byte: ([\d.]+)", printed)[1]) == pytest.approx(mean, abs=1e-4)


def test_the_generation_benchmark_runs_small(tmp_path):
    printed = run("benchmark_generation.py", "--small", "--results", str(tmp_path))
    checked = re.findall(
        r"^checked against float32: .*? are off by (\S+), those of a full forward by", printed, re.MULTILINE
    )
    assert len(checked) == 2 and all(float(error) < 1e-6 for error in checked)
    (path,) = tmp_path.glob("*.csv")
    rows = list(csv.DictReader(line for line in path.read_text().splitlines() if not line.startswith("#")))
    assert {row["measure"] for row in rows} == {"prefill tokens/s", "decode ms/token", "KV bytes"}
    kv_bytes = {(row["model"], row["context"]): float(row["value"]) for row in rows if row["measure"] == "KV bytes"}
    read = {
        (row["how"], row["context"])
        for row in rows
        if row["measure"] == "prefill tokens/s" and row["model"] == "longnet"
    }
    # A prompt of 256 tokens is one chunk of 512, too.
    assert read == {("chunks of 256", "256"), ("chunks of 256", "1024"), ("chunks of 512", "1024")}
    assert kv_bytes["longnet", "1024"] == kv_bytes["longnet", "4096"] < kv_bytes["llama", "1024"] / 4


@pytest.mark.parametrize(
    ("script", "options", "message"),
    [
        ("benchmark_generation", ["--contexts", "4096", "0"], "--contexts must be at least 1, got 0"),
        ("benchmark_generation", ["--prefill-chunk", "0"], "--prefill-chunk must be at least 1, got 0"),
        ("benchmark_generation", ["--steps", "0"], "--steps must be at least 1, got 0"),
        ("benchmark_generation", ["--layers", "0"], "--layers must be at least 1, got 0"),
        ("benchmark_generation", ["--vocabulary", "3"], "--vocabulary must be at least 4, got 3"),
        ("benchmark_generation", ["--heads", "3"], "--hidden 2048 must be an even multiple of --heads 3"),
        ("benchmark_generation", ["--kv-heads", "5"], "a multiple of --kv-heads 5"),
        ("benchmark_generation", ["--last-segment", "5000"], "last_segment 5000 is not first_segment 2048 times"),
        ("benchmark_generation", ["--plot", "absent.csv"], "--plot absent.csv: there is no such file"),
        ("one_billion_tokens", ["--chunk", "0"], "--chunk must be at least 2, got 0"),
        ("one_billion_tokens", ["--small", "--tokens", "1"], "--tokens must be at least 2, got 1"),
        ("one_billion_tokens", ["--train-steps", "0"], "--train-steps must be at least 1, got 0"),
        ("one_billion_tokens", ["--first-segment", "3"], "is not first_segment 3 times a power of ratio 2"),
        (
            "profile_decoding",
            ["--dense-layers", "3", "16"],
            "--dense-layers 16: the 16 layers are numbered from 0 to 15",
        ),
    ],
)
def test_bad_options_are_refused_by_the_parser(script, options, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *options])
    with pytest.raises(SystemExit, match="2"):
        importlib.import_module(script).arguments()
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
@pytest.mark.parametrize("script", ["tune_hopper", "profile_decoding", "benchmark_attention", "compare_checkouts"])
def test_without_a_gpu_its_benchmarks_say_so_and_do_nothing(script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *([str(ROOT)] if script == "compare_checkouts" else [])])
    with pytest.raises(SystemExit, match="^no CUDA device; "):
        importlib.import_module(script).main()
    assert list(tmp_path.iterdir()) == []


class Clock:
    """Events of a device whose clock only moves by what is called."""

    now = 0.0

    def __init__(self, enable_timing: bool):
        assert enable_timing

    def record(self) -> None:
        self.at = Clock.now

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: "Clock") -> float:
        return end.at - self.at


@pytest.fixture
def clock(monkeypatch):
    monkeypatch.setattr(Clock, "now", 0.0)
    monkeypatch.setattr(torch.cuda, "Event", Clock)


def test_a_host_that_is_busy_for_a_while_is_so_for_all_that_is_compared(clock):
    benchmark = importlib.import_module("benchmark_attention")

    def taking(ms: float):
        def call():
            busy = 1050 < Clock.now < 1300  # after the first calls, for one turn
            Clock.now += ms * (10 if busy else 1)

        return call

    costs = [1.0, 1.1, 2.0, 500.0]
    assert benchmark.medians_ms(map(taking, costs), 100.0) == pytest.approx(costs)
    assert Clock.now > 1300 + 3 * 10 * sum(costs[:3])


@pytest.mark.parametrize("longer", [0, 1])
def test_short_calls_are_timed_on_the_device_alone_too(longer, clock, monkeypatch):
    benchmark = importlib.import_module("benchmark_attention")
    x = torch.zeros(1, 1, benchmark.CAPTURED_LENGTH + longer, 1)

    class Attention:
        """Takes 2 ms for a host and per_call for a device; a graph of ten calls takes ten times as long."""

        def __init__(self, per_call: float):
            self.per_call = per_call

        def __call__(self, *inputs):
            Clock.now += 2.0
            return sum(inputs)

    def on_device(call):
        (attention,) = call.args
        if attention.per_call is None:
            return None

        def replay():
            Clock.now += 10 * attention.per_call

        return replay

    monkeypatch.setattr(benchmark, "on_device", on_device)
    monkeypatch.setattr(benchmark, "extra_mib", lambda *_: 0.0)
    attentions = {"a": (Attention(1.0), 1e9), "b": (Attention(None), 2e9), "c": (Attention(0.5), 1e9)}
    rows = benchmark.measure(attentions, [x] * 4, 100.0)
    assert [row["pass"] for row in rows["a"]] == ["forward", "forward+backward"]
    for name, alone in (("a", 1.0), ("b", None), ("c", 0.5)):
        assert [row["ms"] for row in rows[name]] == pytest.approx([2.0, 2.0])
        found = [row["device_ms"] for row in rows[name]]
        assert found == ([None] * 2 if longer or alone is None else pytest.approx([alone] * 2))
    assert [row["tflops"] for row in rows["b"]] == pytest.approx([1.0, 3.5])


def test_earlier_numbers_stay_until_all_new_ones_are_there(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["benchmark_generation.py", "--small", "--results", str(tmp_path)])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    bench = benchmark_generation.Bench(benchmark_generation.arguments())
    bench.path.write_text("earlier")
    bench = benchmark_generation.Bench(bench.args)
    bench.record("longnet", "KV bytes", "", 256, 1, 1.0)
    assert bench.path.read_text() == "earlier"
    bench.finish()
    assert bench.path.read_text().splitlines()[-1] == "longnet,KV bytes,,256,1,1,0"
    assert list(tmp_path.iterdir()) == [bench.path]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_benchmark_refuses_a_cache_that_forgets(dtype, tmp_path, monkeypatch, capsys):
    """What it allows in bfloat16 is measured; a slot that is never written exceeds it."""
    monkeypatch.setattr(sys, "argv", ["benchmark_generation.py", "--small", "--results", str(tmp_path)])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    bench = benchmark_generation.Bench(benchmark_generation.arguments())
    bench.dtype = dtype
    bench.longnet.to(dtype)
    with torch.no_grad():
        benchmark_generation.check(bench)
        assert capsys.readouterr().out.count("checked against float32") == 2
        monkeypatch.setattr(LongNetCacheLayer, "_write_one", lambda *arguments: None)
        with pytest.raises(SystemExit, match="generation through the cache is wrong"):
            benchmark_generation.check(bench)
