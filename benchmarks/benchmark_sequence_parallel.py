"""How well does one sequence scale over several GPUs, and how long may it be?

Checks first, on all ranks, that a model on slices has the logits, the loss and the gradients of one GPU, and stops if
not. Then, over 1, 2, 4, ... ranks of the same launch:

- attention: forward and backward of the operator, weak scaling (the tokens of a rank stay) and strong (those of the
  sequence stay);
- step: a training step (forward, backward, AdamW) of a model whose weights FSDP2 shards over the same ranks, with
  activation checkpointing and the loss without logits;
- longest: the same step on longer and longer sequences until memory runs out. That ends the launch: the rows stand in
  the CSV.

Every row has the bytes that its busiest rank received per attention call, beside the formula's bound, and for the
operator how much of the exchange ran beside computation, from a profile. Efficiency is useful FLOPs per rank and second
against those of one rank: with more ranks windows are fuller, so time per token alone would blame the exchange for
work. Milliseconds are medians of the slowest rank.

    torchrun --nproc-per-node 8 benchmarks/benchmark_sequence_parallel.py
    torchrun --nproc-per-node 8 benchmarks/benchmark_sequence_parallel.py --stages longest --shape 8b \\
        --tokens-per-rank 262144 --offloaded-layers 12
    torchrun --nproc-per-node 2 benchmarks/benchmark_sequence_parallel.py --small          the path, on CPUs (gloo)
    python benchmarks/benchmark_sequence_parallel.py --plot benchmarks/results/sequence_parallel_<...>.csv

Run with PYTHONPATH=. from the root of the repository.
"""

import argparse
import csv
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import torch
import torch.distributed as dist
import transformers
from benchmark_training import SHAPES, default_dtype
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.profiler import ProfilerActivity, profile

from modeling_longnet import (
    DilationPattern,
    LongNetConfig,
    LongNetForCausalLM,
    dilated_attention,
    gather_sequence,
    sequence_parallel,
    shard_sequence,
)
from modeling_longnet.sequence_parallel import sequence_parallel_attention
from modeling_longnet.sequence_shares import whole_rows
from training import offload_checkpoints


STAGES = ("attention", "step", "longest")
PRESETS = ("paper", "retrofit")
COLUMNS = (
    "stage", "scaling", "attention", "shape", "ranks", "tokens", "tokens_per_rank", "ms", "tokens_per_s",
    "tflops_per_rank", "efficiency", "received_bytes", "bound_bytes", "exchange_ms", "overlapped", "peak_gib", "loss",
)  # fmt: skip


class Launch:
    """The processes of this launch, and their first 1, 2, 4, ... as groups of their own."""

    def __init__(self, small: bool):
        self.rank, self.world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.device = torch.device("cpu")
        if torch.cuda.is_available() and not small:
            self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
            torch.cuda.set_device(self.device)
        backend = "nccl" if self.device.type == "cuda" else "gloo"
        if "RANK" in os.environ:
            dist.init_process_group(backend)
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        sizes = sorted({2**i for i in range(self.world_size.bit_length())} | {self.world_size})
        self.groups = {n: dist.new_group(list(range(n))) for n in sizes if n <= self.world_size}

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def largest(self, number: float, group: dist.ProcessGroup) -> float:
        """Return the largest of the ranks' numbers."""
        x = torch.tensor(float(number), dtype=torch.float64, device=self.device)
        dist.all_reduce(x, op=dist.ReduceOp.MAX, group=group)
        return x.item()

    def say(self, *words) -> None:
        if self.rank == 0:
            print(*words, flush=True)


@contextmanager
def counted_bytes() -> Iterator[list[int]]:
    """Collect the bytes that this rank receives in each all-to-all."""
    received, original = [], dist.all_to_all_single

    def counted(output: Tensor, *args, **kwargs):
        received.append(output.numel() * output.element_size())
        return original(output, *args, **kwargs)

    dist.all_to_all_single = counted
    try:
        yield received
    finally:
        dist.all_to_all_single = original


def median_seconds(launch: Launch, group: dist.ProcessGroup, call: Callable[[], object], repeats: int) -> float:
    """Time a call on all ranks of a group at once; the slowest rank counts."""
    call()
    times = []
    for _ in range(repeats):
        dist.barrier(group)
        launch.synchronize()
        start = time.perf_counter()
        call()
        launch.synchronize()
        times.append(launch.largest(time.perf_counter() - start, group))
    return statistics.median(times)


def overlap(call: Callable[[], object]) -> tuple[float, float]:
    """Profile a call; return the milliseconds of its collectives on the GPU, and which part had company."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        call()
        torch.cuda.synchronize()
    talk, work = [], []
    for event in profiled.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            is_talk = "nccl" in event.name.lower()
            (talk if is_talk else work).append((event.time_range.start, event.time_range.end))
    total = sum(end - start for start, end in talk)
    shared = 0.0
    busy = merged(work)
    for start, end in talk:
        shared += sum(max(0.0, min(end, b) - max(start, a)) for a, b in busy)
    return total / 1e3, shared / total if total else 1.0


def merged(intervals: list[tuple[float, float]]) -> list[tuple[float, float]]:
    result: list[tuple[float, float]] = []
    for start, end in sorted(intervals):
        if result and start <= result[-1][1]:
            result[-1] = (result[-1][0], max(end, result[-1][1]))
        else:
            result.append((start, end))
    return result


def bound_bytes(pattern: DilationPattern, num_kv_heads: int, head_dim: int, itemsize: int) -> int:
    """Return what a rank receives at most in one causal call: ``sum(w / r)`` keys and values per KV head."""
    return num_kv_heads * sum(w // r for w, r in pattern.branches) * 2 * head_dim * itemsize


def build(shape: str, pattern: DilationPattern, device: torch.device, dtype: torch.dtype, length: int) -> nn.Module:
    """Build a model with random weights, the same on every rank."""
    rules = ("head_offsets", "count_overlaps", "dilate_queries", "window", "segment_lengths", "dilation_rates")
    fields = SHAPES[shape] | {name: getattr(pattern, name) for name in rules}
    torch.manual_seed(0)
    with device, default_dtype(dtype):
        return LongNetForCausalLM(LongNetConfig(**fields, max_position_embeddings=length, use_cache=False)).train()


def check(launch: Launch, length: int) -> None:
    """Stop unless all ranks together compute what one does: the operator, logits, loss and gradients."""
    group = launch.groups[launch.world_size]
    for preset in PRESETS:
        pattern = DilationPattern.geometric(64, 512, preset=preset)
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(512, (1, length - 5), generator=generator).to(launch.device)  # 5 tokens of padding
        found = {}
        for name in ("one", "all"):
            model = build("small", pattern, launch.device, torch.float32, length)
            model.config.loss_implementation = "logits"
            if name == "one":
                out = model(input_ids=tokens, labels=tokens)
                out.loss.backward()
                found[name] = [out.logits, out.loss, *(p.grad for p in model.parameters())]
                continue
            with sequence_parallel(group):
                out = model(**shard_sequence({"input_ids": tokens, "labels": tokens}, group))
                out.loss.backward()
            sums = [out.loss.detach().clone(), *(p.grad for p in model.parameters())]
            for x in sums:
                dist.all_reduce(x, group=group)
            found[name] = [gather_sequence(out.logits, group, tokens.shape[1]), *sums]
        report(launch, f"{preset}: logits, loss and gradients in float32", found["all"], found["one"], 1e-4)

        if launch.device.type == "cuda":
            n = length // launch.world_size
            whole = [torch.randn(1, h, length, 128, generator=generator).to(launch.device) for h in (4, 2, 2, 4)]
            mine = [x[:, :, launch.rank * n : (launch.rank + 1) * n].bfloat16().requires_grad_() for x in whole[:3]]
            do = whole[3][:, :, launch.rank * n : (launch.rank + 1) * n].bfloat16()
            out, _ = sequence_parallel_attention(*mine, pattern, whole_rows(group, 1, n))
            gradients = torch.autograd.grad(out, mine, do)
            leaves = [x.bfloat16().float().requires_grad_() for x in whole[:3]]
            expected = dilated_attention(*leaves, pattern)
            slices = [expected, *torch.autograd.grad(expected, leaves, whole[3].bfloat16().float())]
            slices = [x[:, :, launch.rank * n : (launch.rank + 1) * n] for x in slices]
            report(launch, f"{preset}: attention and gradients in bfloat16", [out, *gradients], slices, 1.5e-2)


def report(launch: Launch, what: str, found: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    errors = [((a.double() - b.double()).norm() / b.double().norm()).item() for a, b in zip(found, expected)]
    error = launch.largest(max(errors), launch.groups[launch.world_size])
    if not error <= tolerance:
        raise SystemExit(f"{what} on {launch.world_size} ranks are off by {error:.1e}; not timing that")
    launch.say(f"checked {what} on {launch.world_size} ranks: relative error {error:.1e}")


def time_attention(launch: Launch, size: int, preset: str, tokens: int, pattern: DilationPattern, arguments) -> dict:
    """Time the operator on the first ``size`` ranks."""
    group = launch.groups[size]
    heads, head_dim = (16, 128) if not arguments.small else (4, 16)
    n = tokens // size
    dtype = torch.bfloat16 if launch.device.type == "cuda" else torch.float32
    q, k, v, do = (
        torch.randn(1, n, heads, head_dim, device=launch.device, dtype=dtype).transpose(1, 2) for _ in range(4)
    )
    leaves = [x.requires_grad_() for x in (q, k, v)]
    sequence = whole_rows(group, 1, n)

    def call():
        out, _ = sequence_parallel_attention(*leaves, pattern, sequence)
        torch.autograd.grad(out, leaves, do)

    with counted_bytes() as received:
        call()
    seconds = median_seconds(launch, group, call, arguments.repeats)
    exchange_ms, overlapped = overlap(call) if launch.device.type == "cuda" and size > 1 else ("", "")
    flops = pattern.attention_flops(tokens, heads, head_dim)
    flops += pattern.attention_flops(tokens, heads, head_dim, backward=True)
    return {
        "tokens": tokens, "ms": 1e3 * seconds, "tflops_per_rank": flops / size / seconds / 1e12,
        "received_bytes": int(launch.largest(received[0] if received else 0, group)),
        "bound_bytes": bound_bytes(pattern, heads, head_dim, q.element_size()),
        "exchange_ms": exchange_ms, "overlapped": overlapped,
    }  # fmt: skip


class Trained:
    """A model and its optimizer, sharded over a group by FSDP2."""

    def __init__(self, launch: Launch, size: int, pattern: DilationPattern, length: int, arguments):
        self.launch, self.group, self.shape, self.pattern = launch, launch.groups[size], arguments.shape, pattern
        dtype = torch.bfloat16 if launch.device.type == "cuda" else torch.float32
        self.model = build(arguments.shape, pattern, launch.device, dtype, length)
        self.matrix_weights = sum(p.numel() for p in self.model.parameters() if p.ndim == 2)
        if hasattr(self.model, "activation_checkpointing_enable"):
            self.model.activation_checkpointing_enable()
        else:
            self.model.gradient_checkpointing_enable()
        if size > 1:
            mesh = DeviceMesh.from_group(self.group, launch.device.type, mesh_dim_names=("cp",))
            for layer in self.model.model.layers:
                fully_shard(layer, mesh=mesh)
            fully_shard(self.model, mesh=mesh)
        if arguments.offloaded_layers:
            offload_checkpoints(self.model, arguments.offloaded_layers)
        fused = {"fused": True} if launch.device.type == "cuda" else {}
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5, **fused)
        self.loss = float("nan")

    def step(self, slice_length: int) -> None:
        """Train on random tokens, of which every rank draws its own slice: nothing here is as long as the sequence."""
        vocabulary = SHAPES[self.shape]["vocab_size"]
        generator = torch.Generator(self.launch.device).manual_seed(self.group.rank())
        tokens = torch.randint(vocabulary, (1, slice_length), device=self.launch.device, generator=generator)
        targets = torch.randint(vocabulary, (1, slice_length), device=self.launch.device, generator=generator)
        with sequence_parallel(self.group):
            loss = self.model(
                input_ids=tokens, labels=tokens, shift_labels=targets,
                num_items_in_batch=torch.tensor(slice_length, device=self.launch.device),
            ).loss  # fmt: skip
        loss.backward()  # FSDP2 averages over the ranks: each takes its own mean
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.loss = loss.detach()

    def flops(self, tokens: int) -> float:
        """Count what a step must do; recomputation does not count."""
        shape = SHAPES[self.shape]
        attention = self.pattern.attention_flops(
            tokens, shape["num_attention_heads"], shape["head_dim"], num_kv_heads=shape["num_key_value_heads"]
        )
        lookup = 0 if shape["tie_word_embeddings"] else shape["vocab_size"] * shape["hidden_size"]
        return 6 * tokens * (self.matrix_weights - lookup) + 3 * shape["num_hidden_layers"] * attention


def time_step(launch: Launch, trained: Trained, tokens: int, repeats: int) -> dict:
    group, size = trained.group, trained.group.size()
    shape = SHAPES[trained.shape]
    if launch.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    with counted_bytes() as received:
        seconds = median_seconds(launch, group, lambda: trained.step(tokens // size), repeats)
    peak = torch.cuda.max_memory_allocated() / 2**30 if launch.device.type == "cuda" else float("nan")
    itemsize = 2 if launch.device.type == "cuda" else 4
    return {
        "tokens": tokens, "ms": 1e3 * seconds, "tflops_per_rank": trained.flops(tokens) / size / seconds / 1e12,
        "received_bytes": int(launch.largest(max(received, default=0), group)),
        "bound_bytes": bound_bytes(trained.pattern, shape["num_key_value_heads"], shape["head_dim"], itemsize),
        "peak_gib": f"{launch.largest(peak, group):.4g}", "loss": f"{trained.loss.item():.4f}",
    }  # fmt: skip


def stage_rows(launch: Launch, arguments) -> Iterator[dict]:
    """Yield one row per configuration on the ranks that take part, and nothing on the others."""
    first = 64 if arguments.small else 2048
    n, total = arguments.tokens_per_rank, arguments.tokens_per_rank * launch.world_size
    for preset in arguments.presets:
        last = first
        while last < min(total, arguments.longest_segment):
            last *= 2
        pattern = DilationPattern.geometric(first, last, preset=preset)
        for stage in ("attention", "step"):
            if stage not in arguments.stages:
                continue
            for scaling in ("weak", "strong"):
                single = None
                for size in launch.groups:
                    tokens = n * size if scaling == "weak" else n - n % size
                    if launch.rank < size:
                        row = {"stage": stage, "scaling": scaling, "attention": preset, "ranks": size}
                        if stage == "attention":
                            row |= time_attention(launch, size, preset, tokens, pattern, arguments)
                        else:
                            trained = Trained(launch, size, pattern, total, arguments)
                            row |= time_step(launch, trained, tokens, arguments.repeats) | {"shape": arguments.shape}
                            del trained
                        single = row["tflops_per_rank"] if size == 1 else single
                        # Only rank 0 has run alone, and only it writes.
                        row["efficiency"] = "" if single is None else row["tflops_per_rank"] / single
                        yield row
                    dist.barrier()
        if "longest" in arguments.stages:
            trained = Trained(launch, launch.world_size, pattern, 64 * total, arguments)
            length = n
            while length <= arguments.most_tokens_per_rank:
                row = {
                    "stage": "longest", "scaling": "", "attention": preset, "ranks": launch.world_size,
                    "shape": arguments.shape,
                }  # fmt: skip
                try:
                    row |= time_step(launch, trained, length * launch.world_size, 1)
                except torch.OutOfMemoryError:
                    print(f"rank {launch.rank}: {length * launch.world_size} tokens do not fit", flush=True)
                    os._exit(3)  # the others wait in an exchange; the launcher ends them
                yield row
                length = (
                    (length * arguments.growth_percent // 100) // 2048 * 2048 if not arguments.small else 2 * length
                )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=["attention", "step"])
    parser.add_argument("--presets", nargs="+", choices=PRESETS, default=list(PRESETS))
    parser.add_argument("--shape", choices=tuple(SHAPES), default="1b")
    parser.add_argument("--tokens-per-rank", type=int, default=2**17)
    parser.add_argument(
        "--most-tokens-per-rank", type=int, default=2**24, help="where the search for the longest ends"
    )
    parser.add_argument("--growth-percent", type=int, default=150, help="of one length to the next in that search")
    parser.add_argument("--longest-segment", type=int, default=2**20, help="branches double up to here")
    parser.add_argument("--offloaded-layers", type=int, default=0, help="whose checkpoints wait in host memory")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--small", action="store_true", help="tiny shapes on CPUs: tests the path on any machine")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--plot", type=Path, help="only draw the plot of this CSV")
    arguments = parser.parse_args()
    if arguments.plot:
        return plot(arguments.plot)
    if arguments.small:
        arguments.shape, arguments.repeats = "small", 2
        arguments.tokens_per_rank = min(arguments.tokens_per_rank, 512)
        arguments.most_tokens_per_rank = min(arguments.most_tokens_per_rank, 2 * arguments.tokens_per_rank)
    launch = Launch(arguments.small)
    torch.backends.cuda.matmul.allow_tf32 = False
    check(launch, (1200 if arguments.small else 2**14) // launch.world_size * launch.world_size)

    card = torch.cuda.get_device_name().replace(" ", "-") if launch.device.type == "cuda" else "CPU"
    stamp = datetime.now(UTC).strftime("%Y-%m-%d_%H%M")
    path = arguments.output / f"sequence_parallel_{launch.world_size}x{card}_{stamp}.csv"
    file = writer = None
    if launch.rank == 0:
        arguments.output.mkdir(parents=True, exist_ok=True)
        file = path.open("w", newline="")
        file.write(f"# {launch.world_size} x {card}, torch {torch.__version__}, transformers "
                   f"{transformers.__version__}, {dist.get_backend()}, medians of the slowest rank\n")  # fmt: skip
        file.write(f"# torchrun --nproc-per-node {launch.world_size} {' '.join(sys.argv)}\n")
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
    for row in stage_rows(launch, arguments):
        row |= {
            "tokens_per_rank": row["tokens"] // row["ranks"], "tokens_per_s": 1e3 * row["tokens"] / row["ms"],
        }  # fmt: skip
        if row["received_bytes"] > row["bound_bytes"]:
            raise SystemExit(f"{row['received_bytes']} bytes received, more than the bound {row['bound_bytes']}")
        row = {name: f"{x:.4g}" if isinstance(x, float) else x for name, x in row.items()}
        if writer is not None:
            writer.writerow(row)
            file.flush()
            launch.say(*(f"{name}={row[name]}" for name in COLUMNS if row.get(name) not in (None, "")))
    dist.barrier()
    if file is not None:
        file.close()
        print(f"wrote {path}")
        plot(path)
    dist.destroy_process_group()


def plot(path: Path) -> None:
    """Draw efficiency over ranks, one panel for the operator and one for the step."""
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
        rows = [row for row in csv.DictReader(file) if row["efficiency"]]
    stages = sorted({row["stage"] for row in rows})
    if not stages:
        return
    figure, panels = pyplot.subplots(1, len(stages), figsize=(6 * len(stages), 4.5), squeeze=False)
    for panel, stage in zip(panels[0], stages):
        for preset, scaling in dict.fromkeys((row["attention"], row["scaling"]) for row in rows):
            line = [r for r in rows if (r["stage"], r["attention"], r["scaling"]) == (stage, preset, scaling)]
            sizes, efficiency = [int(r["ranks"]) for r in line], [100 * float(r["efficiency"]) for r in line]
            panel.plot(sizes, efficiency, marker="o" if scaling == "weak" else "s", label=f"{preset}, {scaling}")
        panel.set(title=f"{stage}, forward + backward", xlabel="ranks", ylabel="efficiency, %", ylim=(0, 110))
        panel.set_xscale("log", base=2)
        panel.grid(True, alpha=0.3)
        panel.legend()
    figure.suptitle(title, fontsize=8)
    figure.tight_layout()
    figure.savefig(path.with_suffix(".png"), dpi=120)
    print(f"wrote {path.with_suffix('.png')}")


if __name__ == "__main__":
    main()
