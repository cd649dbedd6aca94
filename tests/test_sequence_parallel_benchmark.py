"""The sequence-parallel benchmark: its own arithmetic is right, and its whole path runs small."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

from modeling_longnet import DilationPattern


ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

from exchange_profile import timeline  # noqa: E402


pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch was built without distributed")


def run(folder: Path, *command: str, seconds: float = 300) -> subprocess.CompletedProcess:
    environment = {
        **os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'benchmarks'}", "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    return subprocess.run(
        [sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True, timeout=seconds
    )


def benchmark(folder: Path, *options: str, ranks: int = 2) -> subprocess.CompletedProcess:
    script = str(ROOT / "benchmarks" / "benchmark_sequence_parallel.py")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
    launcher += ["--nproc-per-node", str(ranks)]
    return run(folder, *launcher, script, "--small", "--output", "out", *options)


def test_a_timeline_tells_the_exchange_from_what_ran_beside_it():
    found = timeline(
        [
            ("ncclDevKernel_SendRecv(ncclDevKernelArgsStorage<4096ul>)", 12.0, 16.0),
            ("hopper_fwd_kernel", 10.0, 13.0),
            ("index_select", 12.5, 14.0),
            ("halo_fwd_kernel", 15.0, 18.0),
            ("hopper_fwd_kernel", 20.0, 21.0),
        ]
    )
    assert found.exchange == [(2.0, 6.0)]
    assert found.local == [(0.0, 4.0), (10.0, 11.0)]  # what overlaps counts once
    assert found.halo == [(5.0, 8.0)]
    assert found.milliseconds("local") == 5.0
    assert found.overlapped() == (2.0 + 1.0) / 4.0
    assert timeline([("hopper_fwd_kernel", 0.0, 1.0)]).overlapped() == 1.0


def test_the_path_runs_small_on_two_ranks(tmp_path):
    options = ["--stages", "check", "attention", "step", "longest", "--presets", "retrofit", "--lengths", "320"]
    finished = benchmark(tmp_path, *options)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.count("checked retrofit, 2 ranks") == 4  # slices aligned and not; sliced, and sharded too
    (path,) = (tmp_path / "out").glob("sequence_parallel_2xCPU_*.csv")
    heading, command, *lines = path.read_text().splitlines()
    assert "2 x CPU" in heading and "not checked" not in heading and " ".join(options) in command
    rows = list(csv.DictReader(lines))
    found = [(row["stage"], row["scaling"], int(row["ranks"]), int(row["tokens"])) for row in rows]
    scaling = [("weak", 1, 512), ("weak", 2, 1024), ("strong", 1, 512), ("strong", 2, 512)]
    assert found == [(stage, *row) for stage in ("attention", "step") for row in scaling] + [("longest", "", 2, 640)]
    for row in rows:
        exchanged = 0 < int(row["received_bytes"]) <= int(row["bound_bytes"])
        assert exchanged == (row["ranks"] == "2")
        assert float(row["tokens_per_s"]) > 0
        if row["stage"] == "longest":
            continue
        single = next(other for other in rows if other["stage"] == row["stage"])
        rates = [float(x["tflops_per_rank"]) for x in (row, single)]
        assert float(row["efficiency"]) == pytest.approx(rates[0] / rates[1], rel=2e-3)
    pattern = DilationPattern.geometric(64, 1024, preset="retrofit")
    halves = pattern.attention_flops(512, 4, 16), pattern.attention_flops(1024, 4, 16)
    assert float(rows[1]["balance"]) == pytest.approx(halves[1] / 2 / (halves[1] - halves[0]), rel=1e-3)
    assert path.with_suffix(".png").stat().st_size > 10_000


def test_a_launch_that_outlasts_its_limit_says_where_it_stood(tmp_path):
    finished = benchmark(tmp_path, "--limit", "0.05", ranks=1)
    assert finished.returncode != 0
    assert "Timeout (0:00:00.050000)!" in finished.stderr and "benchmark_sequence_parallel.py" in finished.stderr


def plan(folder: Path, *options: str) -> tuple[str, list[dict[str, str]]]:
    script = str(ROOT / "benchmarks" / "plan_sequence_parallel.py")
    finished = run(folder, script, "--output", "plan.csv", *options)
    assert finished.returncode == 0, finished.stderr
    lines = (folder / "plan.csv").read_text().splitlines()
    return finished.stdout, list(csv.DictReader(line for line in lines if not line.startswith("#")))


def test_a_plan_goes_on_from_two_gpus(tmp_path):
    columns = "stage,attention,longest_segment,shape,ranks,tokens,tokens_per_rank,ms,peak_gib,offloaded_layers"
    measured = [
        "step,retrofit,1048576,1b,2,262144,131072,5000,20,0",
        "longest,retrofit,4194304,1b,2,2097152,1048576,40000,100,2",
        "step,retrofit,1048576,1b,1,4194304,4194304,1,1,0",
        "longest,paper,1048576,1b,2,4194304,2097152,1,1,0",
    ]
    (tmp_path / "two.csv").write_text("\n".join(["# 2 x card", "# command", columns, *measured]))
    printed, rows = plan(tmp_path, "--scaling", "two.csv", "--attention", "retrofit", "--gpus", "2", "8")
    assert "measured: 1048576 tokens per GPU on 2 in 40 s, peak 100 GiB" in printed and "assumed: " in printed
    two, eight = rows
    assert (float(two["step_s"]), float(two["gpu_gib"]), float(two["host_gib"])) == (40, 100, 8)
    assert int(eight["tokens"]) == 8 * 2**20 and eight["fits"] == "yes"
    weights = 16 * (2048 * 64 * 80 + 3 * 2048 * 8192) + 128256 * 2048
    one_branch = 4 * 8 * 2048 * 2 * 64 * 2  # the one whose window two million tokens do not fill
    shrinks = 6 * weights * (1 / 2 - 1 / 8) - one_branch
    assert float(eight["gpu_gib"]) == pytest.approx(100 - shrinks / 2**30, abs=1e-9)
    pattern = DilationPattern.geometric(2048, 2**22, preset="retrofit")
    counts = [pattern.attention_flops(n * 2**20, 32, 64, num_kv_heads=8) for n in (1, 2, 7, 8)]
    work = [6 * 2**20 * weights + 48 * (b - a) for a, b in (counts[:2], counts[2:])]
    assert float(eight["step_s"]) == pytest.approx(40 * work[1] / work[0])
    assert work[1] > 1.01 * work[0]
    _, (cramped,) = plan(tmp_path, "--scaling", "two.csv", "--attention", "retrofit", "--gpus", "4", "--gpu-gib", "78")
    assert cramped["fits"] == "no"


def test_a_plan_without_measured_steps_counts_the_last_rank(tmp_path):
    columns = "attention,pass,layout,length,head_dim,tflops"
    rates = ["retrofit,forward+backward,plain,4096,64,200", "retrofit,forward+backward,plain,8192,128,400"]
    (tmp_path / "attention.csv").write_text("\n".join(["# card", columns, *rates]))
    options = ["--csv", "attention.csv", "--attention", "retrofit", "--tokens", str(2**20), "--gpus", "4"]
    for shape, heads, head_dim, layers, rate in (("1b", 32, 64, 16, 200e12), ("8b", 32, 128, 32, 400e12)):
        printed, (row,) = plan(tmp_path, *options, "--shape", shape)
        assert f"at {rate / 1e12:.0f} TFLOP/s" in printed
        pattern = DilationPattern.geometric(2048, 2**20, preset="retrofit")
        lengths = (2**20, 2**20 - 2**18)
        whole, before = (pattern.attention_flops(n, heads, head_dim, num_kv_heads=8) for n in lengths)
        assert float(row["attention_s"]) == pytest.approx(4.5 * layers * (whole - before) / rate)
        assert float(row["received_mib_per_layer"]) == 8 * 10 * 2048 * 2 * head_dim * 2 / 2**20
