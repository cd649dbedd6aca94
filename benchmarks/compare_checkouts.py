"""Which of several checkouts has the faster attention kernels? All in one run on one card, in turns.

Cards of one kind differ by some per cent, and a card that has been busy for seconds runs slower than a rested one: only
times of one run, taken in turns, are compared. A checkout is a folder that holds ``modeling_longnet``. First the kernels
of all of them are compiled side by side, output and gradients compared with the eager backend's in float64, on fresh
inputs, with results allocated from memory that holds nan, and twice bit for bit; a checkout that is wrong, does not
compile or hangs is named and not timed. Then each round times every checkout in a process of its own, and every other
round runs backwards. What is printed is the median over the rounds, backward without forward.

A call is ``PRESET,HEAD_DIM,TOKENS,HEADS,KV_HEADS``. It is compared at ``CHECKED_AT`` tokens, with as many branches and the
kernels that its own length would take.

    git worktree add ../before main
    python benchmarks/compare_checkouts.py ../before . --calls paper,128,32768,16,16 retrofit,64,8192,14,2
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from math import inf
from pathlib import Path
from typing import NamedTuple


CHECKED_AT = 2048
BUDGET_MS = 50.0  # of device time per median
WORST = 1e-2  # relative error
PRESETS = ("paper", "torchscale", "retrofit")
CALLS = ("paper,128,32768,16,16", "retrofit,128,32768,16,16", "paper,64,32768,16,16", "retrofit,64,32768,16,16")


class Call(NamedTuple):
    """Attention on one input."""

    preset: str
    head_dim: int
    length: int
    heads: int
    kv_heads: int

    def __str__(self) -> str:
        return ",".join(map(str, self))


def call(text: str) -> Call:
    """Read a call; argparse reports what is wrong."""
    fields = text.split(",")
    if len(fields) != 5 or fields[0] not in PRESETS or not all(x.isdigit() and int(x) > 0 for x in fields[1:]):
        raise argparse.ArgumentTypeError(f"{text!r} is not PRESET,HEAD_DIM,TOKENS,HEADS,KV_HEADS, as {CALLS[0]}")
    found = Call(fields[0], *map(int, fields[1:]))
    if found.heads % found.kv_heads:
        raise argparse.ArgumentTypeError(
            f"{text!r}: {found.heads} heads do not share {found.kv_heads} KV heads evenly"
        )
    return found


def checkout(text: str) -> Path:
    """Find a checkout."""
    if not (folder := Path(text).resolve()).joinpath("modeling_longnet", "dilated_attention_triton.py").is_file():
        raise argparse.ArgumentTypeError(f"{text!r} holds no modeling_longnet with fused kernels")
    return folder


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "checkouts", type=checkout, nargs="+", metavar="FOLDER", help="the first is what others are compared with"
    )
    parser.add_argument("--calls", type=call, nargs="+", default=[call(x) for x in CALLS], metavar="CALL")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=180.0, help="after which a checkout hangs")
    parser.add_argument(
        "--work", choices=["check", "time"], help=argparse.SUPPRESS
    )  # what a process of a checkout does
    return parser.parse_args()


def prepare(call: Call, length: int, first_segment: int):
    """Return a pattern and a forward and a backward on random tensors, laid out as a model holds them."""
    import torch

    from modeling_longnet import DilationPattern
    from modeling_longnet.dilated_attention_triton import triton_attention

    pattern = DilationPattern.geometric(first_segment, max(first_segment, length), preset=call.preset)
    query, key, value, do = (
        torch.randn(1, length, n, call.head_dim, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
        for n in (call.heads, call.kv_heads, call.kv_heads, call.heads)
    )
    leaves = [x.requires_grad_() for x in (query, key, value)]

    def forward():
        return triton_attention(
            *leaves, pattern, is_causal=True, attention_mask=None, cu_seqlens=None, scale=call.head_dim**-0.5
        )[0]

    return pattern, leaves, do, forward


def check(call: Call) -> str:
    """Compile what the call needs and compare it; return what is wrong, or nothing."""
    import torch

    from modeling_longnet import DilationPattern, dilated_attention
    from modeling_longnet import dilated_attention_hopper as hopper

    tiles = call.heads * -(-call.length // hopper.TILE) / torch.cuda.get_device_properties().multi_processor_count
    fewest_tiles = hopper._fewest_tiles
    hopper._fewest_tiles = lambda *kernel: 0 if fewest_tiles(*kernel) <= tiles else inf
    branches = len(DilationPattern.geometric(2048, max(2048, call.length), preset=call.preset).branches)
    pattern, leaves, do, forward = prepare(call, CHECKED_AT, CHECKED_AT >> (branches - 1))
    runs = []
    for _ in range(2):
        junk = [torch.full_like(x, torch.nan) for x in (*leaves, do)]
        del junk
        out = forward()
        runs.append([out, *torch.autograd.grad(out, leaves, do)])
    exact_leaves = [x.detach().double().requires_grad_() for x in leaves]
    out = dilated_attention(*exact_leaves, pattern, backend="eager")
    exact = [out, *torch.autograd.grad(out, exact_leaves, do.double())]
    faults = []
    for name, ours, again, true in zip(("out", "dq", "dk", "dv"), *runs, exact):
        error = ((ours.double() - true).norm() / true.norm()).item()
        if not error < WORST:
            faults.append(f"{name} is off by {error:.1e}")
        if not torch.equal(ours, again):
            faults.append(f"{name} differs between two runs")
    return ", ".join(faults)


def measure(call: Call) -> dict[str, float]:
    """Return milliseconds and useful TFLOP/s of forward and backward."""
    import torch
    from benchmark_attention import median_ms

    pattern, leaves, do, forward = prepare(call, call.length, 2048)
    flops = pattern.attention_flops(call.length, call.heads, call.head_dim, num_kv_heads=call.kv_heads)
    with torch.no_grad():
        forward_ms = median_ms(forward, BUDGET_MS)
    out = forward()
    backward_ms = median_ms(lambda: torch.autograd.grad(out, leaves, do, retain_graph=True), BUDGET_MS)
    return {
        "forward": forward_ms, "backward": backward_ms, "forward TFLOP/s": flops / forward_ms / 1e9,
        "backward TFLOP/s": 2.5 * flops / backward_ms / 1e9,
    }  # fmt: skip


def start(folder: Path, work: str, calls: list[Call]) -> subprocess.Popen:
    """Start a process that imports a checkout's package."""
    path = os.pathsep.join([str(folder), str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, __file__, str(folder), "--work", work, "--calls", *map(str, calls)]
    environment = os.environ | {"PYTHONPATH": path}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def answer(process: subprocess.Popen, deadline: float) -> list | str:
    """Return what a process has found, or why it has not."""
    try:
        out, errors = process.communicate(timeout=max(1.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return "hangs"
    if process.returncode:
        return (errors.strip().splitlines() or [f"ended with {process.returncode}"])[-1]
    return json.loads(out.splitlines()[-1])


def faults_of(checkouts: list[Path], calls: list[Call], seconds: float) -> dict[Path, str]:
    """Compile and check all calls of all checkouts side by side; Triton's cache on disk then holds the kernels."""
    deadline = time.monotonic() + seconds
    started = [(folder, call, start(folder, "check", [call])) for folder in checkouts for call in calls]
    faults: dict[Path, str] = {}
    for folder, call, process in started:
        if (found := answer(process, deadline)) != [""]:
            faults.setdefault(folder, f"{call}: {found if isinstance(found, str) else found[0]}")
    return faults


def main() -> None:
    args = arguments()
    import torch

    if not torch.cuda.is_available():
        raise SystemExit("no CUDA device; this measures kernels that only an NVIDIA GPU runs")
    if args.work:
        print(json.dumps([{"check": check, "time": measure}[args.work](x) for x in args.calls]))
        return
    import triton

    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}, bf16, causal")
    faults = faults_of(args.checkouts, args.calls, args.seconds)
    for folder, fault in faults.items():
        print(f"NOT TIMED {folder}: {fault}")
    right = [folder for folder in args.checkouts if folder not in faults]
    times: dict[Path, list[list[dict[str, float]]]] = {folder: [] for folder in right}
    for n in range(args.rounds):
        for folder in right[:: -1 if n % 2 else 1]:
            found = answer(start(folder, "time", args.calls), time.monotonic() + args.seconds)
            if isinstance(found, str):
                raise SystemExit(f"{folder} {found}")
            times[folder].append(found)
    for i, call in enumerate(args.calls):
        print(call)
        for part in ("forward", "backward"):
            medians = {x: statistics.median(found[i][part] for found in times[x]) for x in right}
            for folder, ms in medians.items():
                rate = times[folder][0][i][f"{part} TFLOP/s"] * times[folder][0][i][part] / ms
                spread = [f"{found[i][part]:.3f}" for found in times[folder]]
                print(
                    f"  {part:8} {ms:9.3f} ms  {rate:4.0f} TFLOP/s  {medians[right[0]] / ms:5.3f}x  {folder.name}  "
                    f"(rounds: {' '.join(spread)})"
                )


if __name__ == "__main__":
    main()
