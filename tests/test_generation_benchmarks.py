"""The benchmarks of generation run small, and a billion-token run that was stopped goes on with the same losses."""

import csv
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
