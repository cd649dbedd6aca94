"""Which of several checkouts has the faster attention kernels? All in one run on one card, in turns.

Cards of one kind differ by some per cent, and a card that has been busy for seconds runs slower than a rested one: only
times of one run, taken in turns, are compared. A checkout is a folder that holds ``modeling_longnet``. First the kernels
of all of them are compiled side by side, output and gradients compared with the eager backend's in float64, on fresh
inputs, with results allocated from memory that holds nan, and twice bit for bit; a checkout that is wrong, does not
compile or hangs is named and not timed. Then, call by call, each checkout waits in a process of its own for its turn,
every other round runs backwards, and ratios are of times of the same round. What is printed are medians over the rounds,
backward without forward.

A call is ``PRESET,HEAD_DIM,TOKENS,HEADS,KV_HEADS``. It is compared at ``CHECKED_AT`` tokens, with as many branches and the
kernels that its own length would take.

    git worktree add ../before main
    python benchmarks/compare_checkouts.py ../before . --calls paper,128,32768,16,16 retrofit,64,8192,14,2
"""

import argparse
import json
import os
import select
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from math import inf
from pathlib import Path
from typing import NamedTuple


CHECKED_AT = 2048
BUDGET_MS = 30.0  # of device time per turn of forward or backward
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


def read_call(text: str) -> Call:
    """Read a call; argparse reports what is wrong."""
    fields = text.split(",")
    if len(fields) != 5 or fields[0] not in PRESETS or not all(x.isdigit() and int(x) > 0 for x in fields[1:]):
        raise argparse.ArgumentTypeError(f"{text!r} is not PRESET,HEAD_DIM,TOKENS,HEADS,KV_HEADS, as {CALLS[0]}")
    call = Call(fields[0], *map(int, fields[1:]))
    if call.heads % call.kv_heads:
        raise argparse.ArgumentTypeError(f"{text!r}: {call.heads} heads do not share {call.kv_heads} KV heads evenly")
    return call


def checkout(text: str) -> Path:
    """Find a checkout."""
    if not (folder := Path(text).resolve()).joinpath("modeling_longnet", "dilated_attention_triton.py").is_file():
        raise argparse.ArgumentTypeError(f"{text!r} holds no modeling_longnet with fused kernels")
    return folder


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("checkouts", type=checkout, nargs="+", metavar="FOLDER", help="the first is what others are compared with")
    add("--calls", type=read_call, nargs="+", default=[read_call(x) for x in CALLS], metavar="CALL")
    add("--rounds", type=int, default=12, help="of timing all checkouts")
    add("--seconds", type=float, default=180.0, help="after which a checkout counts as hung")
    add("--work", choices=["check", "time"], help=argparse.SUPPRESS)  # what a process of one checkout does
    args = parser.parse_args()
    if args.rounds < 1:
        parser.error(f"--rounds {args.rounds} times nothing; give 1 or more")
    return args


def check(call: Call) -> str:
    """Compile what the call needs and compare it; return what is wrong, or nothing."""
    import torch
    from benchmark_attention import fused, geometric_pattern, random_tensors

    from modeling_longnet import DilationPattern, dilated_attention
    from modeling_longnet import dilated_attention_hopper as hopper

    tiles = call.heads * -(-call.length // hopper.TILE) / torch.cuda.get_device_properties().multi_processor_count
    fewest_tiles = hopper._fewest_tiles
    hopper._fewest_tiles = lambda *kernel: 0 if fewest_tiles(*kernel) <= tiles else inf
    branches = len(geometric_pattern(call.length, call.preset).branches)
    pattern = DilationPattern.geometric(CHECKED_AT >> (branches - 1), CHECKED_AT, preset=call.preset)
    *inputs, do = random_tensors(1, CHECKED_AT, call.heads, call.kv_heads, call.head_dim)

    def results(attention, dtype):
        leaves = [x.detach().to(dtype).requires_grad_() for x in inputs]
        out = attention(*leaves)
        return [out, *torch.autograd.grad(out, leaves, do.to(dtype))]

    runs = []
    for _ in range(2):
        junk = [torch.full_like(x, torch.nan) for x in (*inputs, do)]
        del junk
        runs.append(results(fused(pattern), torch.bfloat16))
    exact = results(lambda q, k, v: dilated_attention(q, k, v, pattern, backend="eager"), torch.float64)
    faults = []
    for name, ours, again, true in zip(("out", "dq", "dk", "dv"), *runs, exact):
        error = ((ours.double() - true).norm() / true.norm()).item()
        if not error < WORST:
            faults.append(f"{name} is off by {error:.1e}")
        if not torch.equal(ours, again):
            faults.append(f"{name} differs between two runs")
    return ", ".join(faults)


def measure(call: Call) -> Iterator[float | dict[str, float]]:
    """Yield the forward's useful FLOPs and then, each time anew, milliseconds of forward and backward."""
    import torch
    from benchmark_attention import fused, geometric_pattern, medians_ms, random_tensors

    pattern = geometric_pattern(call.length, call.preset)
    *inputs, do = random_tensors(1, call.length, call.heads, call.kv_heads, call.head_dim)
    leaves = [x.requires_grad_() for x in inputs]
    attention = fused(pattern)
    out = attention(*leaves)
    torch.autograd.grad(out, leaves, do, retain_graph=True)
    yield pattern.attention_flops(call.length, call.heads, call.head_dim, num_kv_heads=call.kv_heads)
    while True:
        (backward,) = medians_ms([lambda: torch.autograd.grad(out, leaves, do, retain_graph=True)], BUDGET_MS)
        with torch.no_grad():
            (forward,) = medians_ms([lambda: attention(*leaves)], BUDGET_MS)
        yield {"forward": forward, "backward": backward}


def work(args: argparse.Namespace) -> None:
    """Do what a process of one checkout does, with that checkout's package: a line for an answer."""
    import modeling_longnet

    if not Path(modeling_longnet.__file__).resolve().is_relative_to(args.checkouts[0]):
        raise SystemExit(f"python imports {modeling_longnet.__file__} instead of the package in {args.checkouts[0]}")
    if args.work == "check":
        print(json.dumps(check(args.calls[0])))
        return
    for found in measure(args.calls[0]):
        print(json.dumps(found), flush=True)
        if not sys.stdin.readline():  # nobody asks any more
            return


def start(folder: Path, work: str, call: Call) -> subprocess.Popen:
    """Start a process that imports a checkout's package."""
    path = os.pathsep.join([str(folder), str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, __file__, str(folder), "--work", work, "--calls", str(call)]
    environment = os.environ | {"PYTHONPATH": path}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, stderr=pipe, text=True)


class Silence(Exception):
    """A process has no answer; the message says why."""


def answer(process: subprocess.Popen, deadline: float):
    """Return what a process says next.

    Raises:
        Silence: it has ended without a word, or hangs.
    """
    if select.select([process.stdout], [], [], max(1.0, deadline - time.monotonic()))[0]:
        if line := process.stdout.readline():
            return json.loads(line)
        raise Silence((process.stderr.read().strip().splitlines() or [f"ended with {process.wait()}"])[-1])
    raise Silence("hangs")


def end(process: subprocess.Popen) -> None:
    """Stop a process and close its pipes."""
    process.kill()
    with suppress(BrokenPipeError):
        process.communicate()


def faults_of(checkouts: list[Path], calls: list[Call], seconds: float) -> dict[tuple[Path, Call], str]:
    """Compile and check all calls of all checkouts side by side; Triton's cache on disk then holds the kernels."""
    deadline = time.monotonic() + seconds
    started = [(folder, call, start(folder, "check", call)) for folder in checkouts for call in calls]
    faults: dict[tuple[Path, Call], str] = {}
    for folder, call, process in started:
        try:
            fault = answer(process, deadline)
        except Silence as why:
            fault = str(why)
        finally:
            end(process)
        if fault:
            faults[folder, call] = fault
    return faults


def compare(checkouts: list[Path], call: Call, rounds: int, seconds: float) -> None:
    """Time a call of several checkouts in turns and print what was found."""
    processes = [start(folder, "time", call) for folder in checkouts]
    found: list[list[dict[str, float]]] = [[] for _ in checkouts]
    try:
        flops = [answer(process, time.monotonic() + seconds) for process in processes][0]
        for n in range(rounds):
            for i in range(len(processes))[:: -1 if n % 2 else 1]:
                with suppress(BrokenPipeError):  # the answer says what is wrong
                    print(file=processes[i].stdin, flush=True)
                found[i].append(answer(processes[i], time.monotonic() + seconds))
    except Silence as why:
        raise SystemExit(f"{call}: a checkout that was right {why}") from None
    finally:
        for process in processes:
            end(process)
    print(call)
    for part, share in (("forward", 1), ("backward", 2.5)):
        times = [[x[part] for x in of_one] for of_one in found]
        for folder, ms in zip(checkouts, times):
            ratio = statistics.median(a / b for a, b in zip(times[0], ms))
            median = statistics.median(ms)
            print(
                f"  {part:8} {median:9.3f} ms  {share * flops / median / 1e9:4.0f} TFLOP/s  {ratio:5.3f}x  {folder.name}"
                f"  ({min(ms):.3f} to {max(ms):.3f})"
            )


def main() -> None:
    args = arguments()
    import torch

    if not torch.cuda.is_available():
        raise SystemExit("no CUDA device; this measures kernels that only an NVIDIA GPU runs")
    if args.work:
        work(args)
        return
    import triton

    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}, bf16, causal")
    faults = faults_of(args.checkouts, args.calls, args.seconds)
    for (folder, call), fault in faults.items():
        print(f"NOT TIMED {folder}, {call}: {fault}")
    right = {call: [folder for folder in args.checkouts if (folder, call) not in faults] for call in args.calls}
    if not any(right.values()):
        raise SystemExit("no checkout is right; nothing is timed")
    for call, folders in right.items():
        if folders:
            compare(folders, call, args.rounds, args.seconds)


if __name__ == "__main__":
    main()
