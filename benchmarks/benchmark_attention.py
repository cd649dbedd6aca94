"""How fast is the fused dilated attention, and from which length on does it beat the best dense kernels?

Checks every timed pattern against the eager backend in float64 first and stops if one is wrong. Then times forward,
and forward + backward, beside cuDNN's and FlashAttention's dense causal attention on the same tensors, and writes a
dated CSV and a crossover plot, losses included. Milliseconds are medians over device events, and what has one length
takes turns, so that a host or a card that is slow for a while is so for all. Short calls take the host longer than the
device: up to ``CAPTURED_LENGTH`` tokens ``device_ms`` is the time of one call on the device alone, from a CUDA graph
of several; elsewhere it is empty. Useful FLOPs are those of ``DilationPattern.attention_flops`` (dense: half the
square). Dense rows beyond ``--dense-limit`` tokens are extrapolated by the square of the length and say so;
FlashAttention's beyond ``--flash-limit`` are left out. Where the official operator can be imported
(``torchscale.component.dilated_attention``, not on PyPI), its rearrangements are timed around PyTorch's own
FlashAttention.

Kernels are compiled in several processes before anything is timed, and rows come in the order of their weight: a run
that is cut off has lost the least.

    PYTHONPATH=. python benchmarks/benchmark_attention.py
    PYTHONPATH=. python benchmarks/benchmark_attention.py --plot benchmarks/results/attention_<date>.csv
"""

import argparse
import csv
import multiprocessing
import os
import statistics
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, datetime
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from modeling_longnet import DilationPattern, dilated_attention
from modeling_longnet.dilated_attention_triton import triton_attention


try:
    from torchscale.component.dilated_attention import DilatedAttention
except ImportError:
    DilatedAttention = None


FIRST_SEGMENT = 2048
COMPILED_AT = (
    2**15
)  # tokens: a kernel serves every length, so those of the longest inputs are compiled on shorter ones
CAPTURED_LENGTH = 2**12  # tokens: longer calls keep the device busy while the host prepares the next
CALLS_PER_GRAPH = 10
TURNS = 5
DENSE = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
PRESETS = ("paper", "retrofit")
COLUMNS = (
    "attention", "pass", "length", "batch", "heads", "kv_heads", "head_dim", "layout", "ms", "device_ms", "tflops",
    "extra_mib", "extrapolated",
)  # fmt: skip


def geometric_pattern(length: int, preset: str) -> DilationPattern:
    """Return branches doubling from FIRST_SEGMENT up to the length; short inputs keep the first branch."""
    return DilationPattern.geometric(FIRST_SEGMENT, max(FIRST_SEGMENT, length), preset=preset)


def fused(pattern: DilationPattern, **layout) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    layout = {"attention_mask": None, "cu_seqlens": None, **layout}
    return lambda q, k, v: triton_attention(q, k, v, pattern, is_causal=True, scale=q.shape[-1] ** -0.5, **layout)[0]


def dense(kernel: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def attend(query, key, value):
        with sdpa_kernel(DENSE[kernel]):
            grouped = query.shape[1] != key.shape[1]
            return scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=grouped)

    return attend


def chosen(pattern: DilationPattern) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The public operator, which chooses the backend."""
    return lambda q, k, v: dilated_attention(q, k, v, pattern)


def official(pattern: DilationPattern, heads: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The official operator between its projections; its attention is FlashAttention, PyTorch's here."""
    operator = DilatedAttention.__new__(DilatedAttention)
    torch.nn.Module.__init__(operator)
    operator.num_heads = heads
    operator.args = SimpleNamespace(
        segment_length=list(pattern.segment_lengths), dilated_ratio=list(pattern.dilation_rates), seq_parallel=False
    )

    def attend(*tensors):
        batch, _, length, head_dim = tensors[0].shape
        outs, lses = [], []
        for segment_length, rate in pattern.branches:
            # [B, L, H, D] -> [B * segments * H, kept, D] -> [B * segments, H, kept, D]
            sparse = [operator.gathering(x.transpose(1, 2), rate, segment_length) for x in tensors]
            sparse = [x.reshape(-1, heads, x.shape[1], head_dim) for x in sparse]
            out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(*sparse, 0.0, True)
            outs.append(out.transpose(1, 2).flatten(2))
            lses.append(lse.detach())
        return operator.scattering(outs, lses, length, batch).unflatten(-1, (heads, head_dim)).transpose(1, 2)

    return attend


def random_tensors(batch: int, length: int, heads: int, kv_heads: int, head_dim: int) -> list[Tensor]:
    """Draw q, k, v and do as a model holds them: heads inside tokens, seen as ``[B, H, L, D]``."""
    return [
        torch.randn(batch, length, n, head_dim, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
        for n in (heads, kv_heads, kv_heads, heads)
    ]


def check(head_dim: int) -> None:
    """Stop unless every timed pattern is right, output and gradients."""
    for preset in PRESETS:
        pattern = DilationPattern.geometric(256, 1024, preset=preset)
        *inputs, do = random_tensors(1, 2048, 4, 2, head_dim)

        def results(attention, dtype, inputs=inputs, do=do):
            leaves = [x.detach().to(dtype).requires_grad_() for x in inputs]
            out = attention(*leaves)
            return [out, *torch.autograd.grad(out, leaves, do.to(dtype))]

        ours = results(fused(pattern), torch.bfloat16)
        exact = results(lambda q, k, v, p=pattern: dilated_attention(q, k, v, p, backend="eager"), torch.float64)
        for name, a, b in zip(("out", "dq", "dk", "dv"), ours, exact):
            error = ((a.double() - b).norm() / b.norm()).item()
            if not error < 1e-2:
                raise SystemExit(
                    f"{preset}, head_dim {head_dim}: {name} is off by {error:.1e}; not timing wrong kernels"
                )
            print(f"checked {preset} D={head_dim} {name}: relative error {error:.1e}", flush=True)


def compile_one(shape: tuple, preset: str, layout: str) -> None:
    """Compile the kernels of one row; Triton's cache on disk hands them to the process that times."""
    length, heads, kv_heads, head_dim = shape
    pattern = geometric_pattern(length, preset)
    tensors = random_tensors(1, min(length, COMPILED_AT), heads, kv_heads, head_dim)
    options = {}
    if layout == "packed":
        options["cu_seqlens"] = torch.tensor([0, tensors[0].shape[2]], device="cuda", dtype=torch.int32)
    if layout == "padded":
        options["attention_mask"] = torch.ones(1, tensors[0].shape[2], device="cuda", dtype=torch.bool)
    leaves = [x.detach().requires_grad_() for x in tensors[:3]]
    torch.autograd.grad(fused(pattern, **options)(*leaves), leaves, tensors[3])
    torch.cuda.synchronize()


def compile_ahead(jobs: list[tuple], processes: int) -> None:
    """Compile the kernels of all rows side by side."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        for done in [pool.submit(compile_one, *job) for job in jobs]:
            done.result()


def medians_ms(calls: Iterable[Callable[[], object]], budget_ms: float) -> list[float]:
    """Time calls by device events, each queued several times as in training, after a warm-up.

    They take turns: what slows down the host, or the card, for a while does so to all. Calls that take longer than the
    budget are timed once.
    """
    timed = []
    for call in calls:
        call()
        (first,) = queued_ms(call, 1)
        repeats = 0 if first > budget_ms else min(10, max(1, int(budget_ms / first / TURNS)))
        timed.append((call, repeats, [] if repeats else [first]))
    for _ in range(TURNS):
        for call, repeats, times in timed:
            times += queued_ms(call, repeats)
    return [statistics.median(times) for _, _, times in timed]


def queued_ms(call: Callable[[], object], repeats: int) -> list[float]:
    """Time calls that are queued one behind the other."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    events[0].record()
    for event in events[1:]:
        call()
        event.record()
    events[-1].synchronize()
    return [a.elapsed_time(b) for a, b in pairwise(events)]


def on_device(call: Callable[[], object]) -> Callable[[], object] | None:
    """Give a call without what the host does for it, CALLS_PER_GRAPH times; None if it cannot be captured."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):  # whatever is compiled or planned at first calls must not fall into the capture
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, stream=side):
            for _ in range(CALLS_PER_GRAPH):
                call()
    except RuntimeError as error:
        print(f"no device_ms, the call cannot be captured: {error}", file=sys.stderr, flush=True)
        return None
    return graph.replay


def extra_mib(call: Callable[[], object], results_mib: float) -> float:
    """Measure the peak of one call beyond what lives already and beyond its own results."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20 - results_mib


def measure(attentions: dict[str, tuple], tensors: list[Tensor], budget_ms: float) -> dict[str, list[dict]]:
    """Time forward, and forward + backward (2.5 times the forward's FLOPs more), with and without the host.

    Args:
        attentions: by name, a function of q, k and v, and its forward's useful FLOPs. They take turns.
        tensors: q, k, v and the gradient of the output.
    """
    *inputs, do = tensors
    mib = [x.numel() * x.element_size() / 2**20 for x in tensors]
    lse = 4 * do[..., 0].numel() / 2**20
    leaves = [x.detach().requires_grad_() for x in inputs]

    def forward(attention):
        with torch.no_grad():
            attention(*inputs)

    def forward_backward(attention):
        torch.autograd.grad(attention(*leaves), leaves, do)

    rows = {name: [] for name in attentions}
    for passes, run, per_forward, results in (
        ("forward", forward, 1.0, mib[3] + lse),
        ("forward+backward", forward_backward, 3.5, sum(mib) + lse),
    ):
        calls = [partial(run, attention) for attention, _ in attentions.values()]
        times = medians_ms(calls, budget_ms)
        alone = [None] * len(calls)
        if do.shape[2] <= CAPTURED_LENGTH:
            replays = [on_device(call) for call in calls]
            medians = iter(medians_ms([replay for replay in replays if replay], budget_ms))
            alone = [next(medians) / CALLS_PER_GRAPH if replay else None for replay in replays]
        for (name, (_, flops)), call, ms, ms_alone in zip(attentions.items(), calls, times, alone):
            rows[name].append(
                {
                    "pass": passes,
                    "ms": ms,
                    "tflops": per_forward * flops / ms / 1e9,
                    "extra_mib": extra_mib(call, results),
                    "device_ms": ms_alone,
                    "extrapolated": 0,
                }
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--head-dims", type=int, nargs="+", default=[128, 64])
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--lengths", type=int, nargs="+", default=[2**n for n in (15, 17, 12, 13, 20, 14, 11, 10)])
    parser.add_argument("--dense-limit", type=int, default=2**17, help="longest input that dense kernels really run")
    parser.add_argument("--flash-limit", type=int, default=2**15, help="longest input that FlashAttention runs")
    parser.add_argument("--budget-ms", type=float, default=100.0, help="device time per median")
    parser.add_argument("--processes", type=int, default=max(1, min(14, os.cpu_count() - 1)), help="that compile")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--plot", type=Path, help="only draw the plot of this CSV")
    arguments = parser.parse_args()
    if arguments.plot:
        plot(arguments.plot)
        return
    if not torch.cuda.is_available():
        raise SystemExit("no CUDA device; this measures kernels that only an NVIDIA GPU runs")

    heads = arguments.heads
    grouped = [(2**15, 32, 8, 128), (2**15, 14, 2, 64)]  # Llama-3 8B, Qwen2.5 0.5B
    plain = [(length, heads, heads, d) for length in arguments.lengths for d in arguments.head_dims]
    documents = (2**13, heads, heads, arguments.head_dims[0])
    jobs = [(shape, preset, "plain") for shape in [*plain, *grouped] for preset in PRESETS]
    jobs += [(documents, preset, layout) for preset in PRESETS for layout in ("padded", "packed")]
    compile_ahead(sorted(jobs, key=lambda job: -job[0][0]), arguments.processes)
    for head_dim in arguments.head_dims:
        check(head_dim)
    card = torch.cuda.get_device_name()
    stamp = datetime.now(UTC).strftime("%Y-%m-%d")
    arguments.output.mkdir(parents=True, exist_ok=True)
    path = arguments.output / f"attention_{card.replace(' ', '-')}_{stamp}.csv"
    with path.open("w", newline="") as file:
        import triton

        file.write(f"# {card}, torch {torch.__version__}, triton {triton.__version__}, bf16, causal, medians\n")
        file.write(f"# python {' '.join(sys.argv)}\n")
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()

        def record(rows, name, length, heads, kv_heads, head_dim, batch=1, layout="plain"):
            for row in rows:
                row |= {
                    "attention": name, "length": length, "batch": batch, "heads": heads, "kv_heads": kv_heads,
                    "head_dim": head_dim, "layout": layout,
                }  # fmt: skip
                for column in ("ms", "device_ms", "tflops", "extra_mib"):
                    row[column] = "" if row[column] is None else f"{row[column]:.4g}"
                writer.writerow(row)
                file.flush()
                print(*(row[column] for column in COLUMNS), sep="\t", flush=True)

        budget = arguments.budget_ms
        longest_dense: dict[tuple, tuple[int, list[dict]]] = {}
        # The first two lengths of the plain rows, what else models ask for, and then the other lengths.
        first = 2 * len(arguments.head_dims)
        for shape in [*plain[:first], *grouped, *plain[first:]]:
            length, heads, kv_heads, head_dim = shape
            tensors = random_tensors(1, length, heads, kv_heads, head_dim)
            dense_flops = 2 * heads * head_dim * length * (length + 1)
            attentions = {}
            for preset in PRESETS:
                pattern = geometric_pattern(length, preset)
                flops = pattern.attention_flops(length, heads, head_dim, num_kv_heads=kv_heads)
                attentions[preset] = fused(pattern), flops
            for kernel, limit in (("cudnn", arguments.dense_limit), ("flash", arguments.flash_limit)):
                if length <= limit:
                    attentions[f"dense {kernel}"] = dense(kernel), dense_flops
            pattern = geometric_pattern(length, "paper")
            if pattern.is_ordinary(length):
                attentions["auto"] = chosen(pattern), dense_flops
            if DilatedAttention is not None and length in (2**15, 2**17) and heads == kv_heads:
                flops = pattern.attention_flops(length, heads, head_dim)
                attentions["official"] = official(pattern, heads), flops
            measured = measure(attentions, tensors, budget)
            longest, dense_rows = longest_dense.get(shape[1:], (0, []))
            if "dense cudnn" in measured:
                if length > longest:
                    longest_dense[shape[1:]] = length, [dict(row) for row in measured["dense cudnn"]]
            elif longest:
                scale = (length / longest) ** 2
                measured["dense cudnn"] = [
                    row | {"ms": row["ms"] * scale, "device_ms": None, "extrapolated": 1} for row in dense_rows
                ]
            for name, rows in measured.items():
                record(rows, name, *shape, layout="ordinary" if name == "auto" else "plain")
            del tensors

        # Padding and packing, without copies: eight rows padded on the left by up to half, the same documents packed.
        (length, heads, _, head_dim), batch = documents, 8
        counts = [length - length // 2 * row // batch for row in range(batch)]
        mask = torch.arange(length, device="cuda") >= length - torch.tensor(counts, device="cuda")[:, None]
        cu_seqlens = torch.tensor([0, *counts], device="cuda").cumsum(0).int()
        for preset in PRESETS:
            pattern = geometric_pattern(length, preset)
            flops = sum(pattern.attention_flops(count, heads, head_dim) for count in counts)
            tensors = random_tensors(batch, length, heads, heads, head_dim)
            rows = measure({preset: (fused(pattern, attention_mask=mask), flops)}, tensors, budget)[preset]
            record(rows, preset, length, heads, heads, head_dim, batch, "padded")
            tensors = random_tensors(1, sum(counts), heads, heads, head_dim)
            rows = measure({preset: (fused(pattern, cu_seqlens=cu_seqlens), flops)}, tensors, budget)[preset]
            record(rows, preset, sum(counts), heads, heads, head_dim, 1, "packed")
    print(f"wrote {path}")
    plot(path)


def plot(path: Path) -> None:
    """Draw milliseconds over length, one panel per head_dim, from the CSV's plain rows."""
    try:
        import matplotlib
    except ImportError:
        print(f"matplotlib is not installed; draw later with --plot {path}")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    with path.open() as file:
        title = next(file).removeprefix("# ").strip()
        next(file)
        rows = [row for row in csv.DictReader(file) if row["layout"] == "plain" and row["pass"] == "forward+backward"]
    heads = max({row["heads"] for row in rows}, key=lambda h: sum(row["heads"] == h for row in rows))
    rows = [row for row in rows if row["heads"] == heads]
    head_dims = sorted({int(row["head_dim"]) for row in rows}, reverse=True)
    figure, panels = pyplot.subplots(1, len(head_dims), figsize=(6 * len(head_dims), 4.5), squeeze=False)
    for panel, head_dim in zip(panels[0], head_dims):
        for name in dict.fromkeys(row["attention"] for row in rows):
            line = [row for row in rows if row["attention"] == name and int(row["head_dim"]) == head_dim]
            line.sort(key=lambda row: int(row["length"]))
            lengths, times = [int(row["length"]) for row in line], [float(row["ms"]) for row in line]
            (drawn,) = panel.loglog(lengths, times, marker="o", label=name, base=2)
            guessed = [i for i, row in enumerate(line) if row["extrapolated"] == "1"]
            panel.plot(
                [lengths[i] for i in guessed], [times[i] for i in guessed], "o", markersize=9, markerfacecolor="white",
                color=drawn.get_color(),
            )  # fmt: skip
        panel.set(title=f"H={heads}, D={head_dim}, forward + backward", xlabel="tokens", ylabel="ms")
        panel.grid(True, which="both", alpha=0.3)
        panel.legend()
    figure.suptitle(f"{title}\nhollow: extrapolated by the square", fontsize=8)
    figure.tight_layout()
    figure.savefig(path.with_suffix(".png"), dpi=120)
    print(f"wrote {path.with_suffix('.png')}")


if __name__ == "__main__":
    main()
