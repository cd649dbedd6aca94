"""Which cut of the Hopper kernels is the fastest, and from how many tiles on do they beat the portable ones?

Each candidate is compiled and checked in a process of its own: output, lse and gradients against the eager backend in
float64, on fresh random inputs, with outputs allocated from memory that holds nan; twice, bit for bit. One that is
wrong, does not compile or hangs is named and not timed. Then every launch of a candidate is timed on the device at one
length. TFLOP/s here count the products that a kernel does (2, 3, 4 and 5 per pair of query and key), not the useful
ones. The backward in one kernel is timed with all that it needs beside the kernel but the statistics.

    PYTHONPATH=. python benchmarks/tune_hopper.py
"""

import argparse
import functools
import itertools
import multiprocessing
import time
from collections.abc import Callable
from math import inf

import torch
from benchmark_attention import medians_ms
from torch import Tensor

from modeling_longnet import DilationPattern, dilated_attention
from modeling_longnet import dilated_attention_hopper as hopper
from modeling_longnet import dilated_attention_triton as fused
from modeling_longnet.attention_operator import Call
from modeling_longnet.dilated_attention_hopper import HopperTiles
from modeling_longnet.launch_plans import Plan


HEADS = 16
BUDGET_MS = 20.0  # of device time per median
PRESETS = ("paper", "retrofit")
KERNELS = {
    "fwd": "hopper_fwd_kernel",
    "dq": "hopper_bwd_dq_kernel",
    "dkdv": "hopper_bwd_dkdv_kernel",
    "bwd": "hopper_bwd_kernel",
}
PRODUCTS = {"fwd": 2, "dq": 3, "dkdv": 4, "bwd": 5}
RESULTS = {"fwd": ("out", "lse"), "dq": ("dq",), "dkdv": ("dk", "dv"), "bwd": ("dq", "dk", "dv")}
CANDIDATES = {
    ("fwd", 128): [
        HopperTiles(128, 64, 4, (224, 56)),
        HopperTiles(128, 64, 4, (240, 24), turns=True),
        HopperTiles(128, 128, 2, (240, 24)),
        HopperTiles(128, 128, 2, (240, 24), turns=True),
        HopperTiles(192, 64, 4, (160, 32), consumers=3),
        HopperTiles(192, 64, 4, (160, 32), turns=True, consumers=3),
    ],
    ("fwd", 64): [
        HopperTiles(128, 128, 4, (224, 56)),
        HopperTiles(128, 128, 4, (240, 24), turns=True),
        HopperTiles(128, 64, 4, (232, 24), consumers=1, programs=2),
        HopperTiles(192, 64, 4, (152, 48), consumers=3),
        HopperTiles(192, 64, 4, (160, 32), turns=True, consumers=3),
        HopperTiles(192, 128, 3, (160, 32), turns=True, consumers=3),
    ],
    ("dq", 128): [HopperTiles(128, 64, 3, (224, 56)), HopperTiles(128, 64, 3, (232, 40), turns=True)],
    ("dq", 64): [
        HopperTiles(128, 64, 4, (224, 56)),
        HopperTiles(128, 64, 4, (232, 40), turns=True),
        HopperTiles(128, 128, 3, (240, 24)),
        HopperTiles(128, 128, 3, (240, 24), turns=True),
        HopperTiles(192, 64, 4, (160, 32), turns=True, consumers=3),
    ],
    ("dkdv", 128): [HopperTiles(128, 64, 3, (240, 24)), HopperTiles(128, 64, 3, (240, 24), turns=True)],
    ("dkdv", 64): [
        HopperTiles(128, 64, 4, (224, 56)),
        HopperTiles(128, 64, 4, (232, 40), turns=True),
        HopperTiles(128, 64, 4, (232, 40), turns=True, holds_own=True),
    ],
    ("bwd", 128): [HopperTiles(128, 64, 2, (240, 24)), HopperTiles(128, 64, 2, (240, 24), turns=True)],
    ("bwd", 64): [
        HopperTiles(128, 64, 4, (240, 24)),
        HopperTiles(128, 64, 4, (240, 24), turns=True),
        HopperTiles(128, 64, 4, (240, 24), turns=True, holds_own=True),
    ],
}
CHOSEN = hopper._tiles


def take(tiles: dict[str, HopperTiles], min_tiles: float = 0) -> None:
    """Let the next calls be cut in this way, kernels that are not named as the package cuts them.

    The backward takes one kernel where that one is named.
    """
    hopper._tiles = lambda kernel, head_dim, dilate: tiles.get(kernel) or CHOSEN(kernel, head_dim, dilate)
    hopper._fewest_tiles = lambda kernel, head_dim, dilate: (
        inf if kernel == "bwd" and "bwd" not in tiles else min_tiles
    )
    fused._forward_plan.cache_clear()
    fused._backward_plan.cache_clear()


def random_tensors(length: int, head_dim: int, heads: int = HEADS) -> dict[str, Tensor]:
    """Draw tensors as a model holds them, heads inside tokens, seen as ``[1, H, L, D]``; results hold nan."""
    names = ("query", "key", "value", "do", "out", "dq", "dk", "dv")
    tensors = {
        name: torch.randn(1, length, heads, head_dim, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
        for name in names
    }
    for name in names[4:]:
        tensors[name].fill_(torch.nan)
    tensors["lse"] = torch.full((1, heads, length), torch.nan, device="cuda")
    tensors["stats"] = torch.zeros(1, heads, length, device="cuda", dtype=torch.int64)
    return tensors


def launches(kernel: str, pattern: DilationPattern, tensors: dict[str, Tensor]) -> list[Callable[[], None]]:
    """Return what runs each launch of one kernel; those of the backward are preceded by that of the statistics.

    Launches that wait for each other are one.
    """
    layouts = [fused.layout_of(tensors[name]) for name in ("do", "query", "key", "value", "out")]
    kind = fused.Kind(None, False, Call(pattern, True, tensors["query"].shape[-1] ** -0.5))
    forward = kernel == "fwd"
    plan, scratch, *added_to = (
        fused._forward_plan(*layouts[1:4], kind) if forward else fused._backward_plan(*layouts, None, kind)
    )
    zeroed = [tensors[name] for names in added_to for name in names if name in RESULTS[kernel]]
    names = [KERNELS[kernel], "stats_kernel"]
    found = [Plan(plan.device, (x,)) for x in plan.launches if x.kernel.__name__ in names]
    if len(found) == (not forward):
        raise SystemExit(f"no launch of {KERNELS[kernel]}: this card or this triton takes the portable kernels")
    runs = [functools.partial(one.run, **tensors) for one in found]
    if scratch is None:
        return runs
    whole = Plan(
        plan.device, tuple(x for x in plan.launches if x.kernel.__name__ in (KERNELS[kernel], "scale_kernel"))
    )
    statistics = [] if forward else runs[:1]

    def run() -> None:
        for x in zeroed:
            x.zero_()
        whole.run(**tensors, **fused._allocate(scratch, plan.device))

    return [*statistics, run]


def check(kernel: str, pattern: DilationPattern, tensors: dict[str, Tensor]) -> str:
    """Compare a kernel's results with the eager backend's in float64; return what is wrong, or nothing."""
    leaves = [tensors[name].double().requires_grad_() for name in ("query", "key", "value")]
    out, lse = dilated_attention(*leaves, pattern, backend="eager", return_lse=True)
    exact = {"out": out, "lse": lse}
    if kernel != "fwd":
        exact = dict(zip(("dq", "dk", "dv"), torch.autograd.grad(out, leaves, tensors["do"].double())))
        tensors["out"].copy_(out.detach())
        tensors["lse"].copy_(lse.detach())
    faults, names = [], RESULTS[kernel]
    runs = []
    for _ in range(2):
        for name in names:
            tensors[name].fill_(torch.nan)
        for launch in launches(kernel, pattern, tensors):
            launch()
        runs.append({name: tensors[name].clone() for name in names})
    for name in names:
        error = ((runs[0][name].double() - exact[name]).norm() / exact[name].norm()).item()
        if not error < (1e-3 if name == "lse" else 1e-2):
            faults.append(f"{name} is off by {error:.1e}")
        if not torch.equal(runs[0][name], runs[1][name]):
            faults.append(f"{name} differs between two runs")
    return ", ".join(faults)


def prove(kernel: str, head_dim: int, preset: str, tiles: HopperTiles, length: int, answers) -> None:
    """Compile and check a candidate, both what is timed and long loops; Triton's cache on disk then holds it."""
    try:
        take({kernel: tiles})
        # As many heads and branches as are timed: the very kernels that are timed, but most blocks are at edges.
        branches = len(timed_pattern(length, preset).branches)
        pattern = DilationPattern.geometric(1024 >> (branches - 1), 1024, preset=preset)
        faults = check(kernel, pattern, random_tensors(1024, head_dim))
        pattern = DilationPattern.geometric(1024, 4096, preset=preset)
        faults = faults or check(kernel, pattern, random_tensors(4096, head_dim, heads=2))
    except Exception as error:
        faults = f"{type(error).__name__}: {error}".replace("\n", " ")[:200]
    answers.put(((kernel, head_dim, preset, tiles), faults))


def timed_pattern(length: int, preset: str) -> DilationPattern:
    return DilationPattern.geometric(2048, length, preset=preset)


def prove_all(jobs: list[tuple], length: int, processes: int, seconds: float) -> dict[tuple, str]:
    """Prove candidates side by side; a process that takes longer than ``seconds`` is ended and its candidate hung."""
    context = multiprocessing.get_context("spawn")
    answers, results = context.Queue(), {}
    waiting, running = list(jobs), {}
    while waiting or running:
        while waiting and len(running) < processes:
            job = waiting.pop(0)
            process = context.Process(target=prove, args=(*job, length, answers), daemon=True)
            process.start()
            running[job] = (process, time.monotonic())
        while not answers.empty():
            job, faults = answers.get()
            results[job] = faults
        for job, (process, started) in list(running.items()):
            if job in results or not process.is_alive():
                process.join(5)
                while not answers.empty():
                    done, faults = answers.get()
                    results[done] = faults
                results.setdefault(job, f"its process died with {process.exitcode}")
            elif time.monotonic() - started < seconds:
                continue
            else:
                results[job] = f"hung for {seconds:.0f} s"
            if process.is_alive():
                process.kill()
            del running[job]
        time.sleep(0.05)
    return results


def time_kernel(kernel: str, pattern: DilationPattern, tensors: dict[str, Tensor]) -> list[float]:
    """Return the milliseconds of each launch of one kernel, and of the statistics before those of the backward."""
    # A launch that adds to lse or dq changes what it finds, not how long it takes.
    tensors["out"].normal_()
    tensors["lse"].fill_(8.0)
    return [medians_ms([launch], BUDGET_MS)[0] for launch in launches(kernel, pattern, tensors)]


def crossover(best: dict, head_dims: list[int], lengths: list[int]) -> None:
    """Print forward + backward of whole calls, portable beside Hopper kernels, and dense cuDNN; the host's time last."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    for head_dim, length in itertools.product(head_dims, lengths):
        tensors = random_tensors(length, head_dim)
        do, leaves = tensors["do"], [tensors[name].requires_grad_() for name in ("query", "key", "value")]

        def dense(leaves=leaves, do=do):
            with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
                torch.autograd.grad(scaled_dot_product_attention(*leaves, is_causal=True), leaves, do)

        line = [f"dense cuDNN {medians_ms([dense], BUDGET_MS)[0]:.3f}"]
        for preset in PRESETS:
            pattern = timed_pattern(length, preset)
            tiles = {
                kernel: best[kernel, head_dim, preset] for kernel in KERNELS if (kernel, head_dim, preset) in best
            }

            def step(leaves=leaves, do=do, pattern=pattern):
                out = fused.triton_attention(
                    *leaves, pattern, is_causal=True, attention_mask=None, cu_seqlens=None,
                    scale=leaves[0].shape[-1] ** -0.5,
                )[0]  # fmt: skip
                torch.autograd.grad(out, leaves, do)

            for name, min_tiles in (("portable", inf), ("hopper", 0)):
                take(tiles, min_tiles)
                step()
                line.append(f"{preset} {name} {medians_ms([step], BUDGET_MS)[0]:.3f}")
                torch.cuda.synchronize()
                started = time.perf_counter()
                for _ in range(10):
                    step()
                line.append(f"(host {(time.perf_counter() - started) * 100:.3f})")
                torch.cuda.synchronize()
        print(f"D={head_dim} N={length} forward+backward ms: " + "  ".join(line), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--length", type=int, default=2**15)
    parser.add_argument("--crossover", type=int, nargs="+", default=[4096, 8192], help="lengths of whole calls")
    parser.add_argument("--head-dims", type=int, nargs="+", default=[128, 64])
    parser.add_argument("--kernels", nargs="*", default=list(KERNELS), choices=list(KERNELS))
    parser.add_argument("--processes", type=int, default=16, help="that compile and check side by side")
    parser.add_argument("--seconds", type=float, default=90.0, help="after which a candidate counts as hung")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("no CUDA device; this measures kernels that only an NVIDIA GPU runs")
    jobs = [
        (kernel, head_dim, preset, tiles)
        for (kernel, head_dim), candidates in CANDIDATES.items()
        if kernel in arguments.kernels and head_dim in arguments.head_dims
        for preset in (PRESETS if kernel != "bwd" else ("paper",))  # of dense ones it serves the nearest branches
        for tiles in candidates
    ]
    started = time.monotonic()
    faults = prove_all(jobs, arguments.length, arguments.processes, arguments.seconds)
    print(f"{len(jobs)} candidates compiled and checked in {time.monotonic() - started:.0f} s", flush=True)
    best: dict[tuple, HopperTiles] = {}
    fastest: dict[tuple, float] = {}
    tensors = {head_dim: random_tensors(arguments.length, head_dim) for head_dim in arguments.head_dims}
    for job in jobs:
        kernel, head_dim, preset, tiles = job
        name = f"{kernel:4} D={head_dim:<3} {preset:8} {tuple(tiles)}"
        if faults[job]:
            print(f"{name}: NOT TIMED, {faults[job]}", flush=True)
            continue
        pattern = timed_pattern(arguments.length, preset)
        take({kernel: tiles})
        ms = time_kernel(kernel, pattern, tensors[head_dim])[kernel != "fwd" :]
        pairs = pattern.attention_flops(arguments.length, HEADS, head_dim) / (4 * head_dim)
        rate = 2 * PRODUCTS[kernel] * head_dim * pairs / sum(ms) / 1e9
        print(f"{name}: {sum(ms):.3f} ms {rate:.0f} TFLOP/s  {[round(1e3 * x) for x in ms]} us", flush=True)
        if sum(ms) < fastest.get(job[:3], inf):
            fastest[job[:3]], best[job[:3]] = sum(ms), tiles
    for (kernel, head_dim, preset), tiles in best.items():
        print(f"best {kernel:4} D={head_dim:<3} {preset:8} {tuple(tiles)} {fastest[kernel, head_dim, preset]:.3f} ms")
    crossover(best, arguments.head_dims, arguments.crossover)


if __name__ == "__main__":
    main()
