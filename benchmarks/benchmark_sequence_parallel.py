"""How well does one sequence scale over several GPUs, and how long may it be?

Stages, each on the ranks of one launch:

- check: a model on slices has the logits, the loss and the gradients of one GPU, FSDP2, checkpoints and tiles
  included, and so has the operator; if not, nothing is timed;
- attention: forward and backward of the operator, weak scaling (the tokens of a rank stay) and strong (those of the
  sequence stay) over the first 1, 2, 4, ... ranks;
- step: a training step (forward, backward, AdamW) of a model whose weights FSDP2 shards over the same ranks, with
  activation checkpointing and the loss without logits;
- longest: one such step on longer and longer sequences, or on those of ``--lengths``, until memory runs out. That ends
  the launch: the rows stand in the CSV, which is complete after each of them.

``received_bytes`` is what the busiest rank received in one attention call, beside the formula's bound. ``efficiency``
is useful FLOPs per rank and second against those of one rank, by the slowest rank's median: with more ranks windows are
fuller, so time per token alone would blame the exchange for work. ``balance`` is the ranks' mean work over the most that
one has: the first slices have less past than the others, and at equal speed no exchange comes nearer to 1 than that.
For the operator a profile says how long the collectives ran (with waiting for one another), which part of that had
computation beside it (the worst rank), and how long the halo's kernels ran; the last rank's timeline is a CSV of its own.

    torchrun --nproc-per-node 8 benchmarks/benchmark_sequence_parallel.py
    torchrun --nproc-per-node 8 benchmarks/benchmark_sequence_parallel.py --stages longest --presets retrofit \\
        --shape 8b --lengths 462848 --offloaded-layers 8
    torchrun --nproc-per-node 2 benchmarks/benchmark_sequence_parallel.py --small          the path, on CPUs (gloo)
    python benchmarks/plot_sequence_parallel.py benchmarks/results/sequence_parallel_<...>.csv

Run with PYTHONPATH=. from the root of the repository. A rank that waits for another longer than ``--timeout`` ends the
launch, and so does ``--limit``, both in seconds; the latter prints where every thread stood.
"""

import argparse
import csv
import faulthandler
import gc
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import transformers
from benchmark_training import SHAPES, default_dtype
from exchange_profile import KINDS, Timeline, profile_call
from plot_sequence_parallel import plot, timeline_path
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

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
from training.checkpoint_offload import BLOCK_BYTES


STAGES = ("check", "attention", "step", "longest")
PRESETS = ("retrofit", "paper")
COLUMNS = (
    "stage", "scaling", "attention", "longest_segment", "shape", "ranks", "tokens", "tokens_per_rank", "ms",
    "tokens_per_s", "tflops_per_rank", "efficiency", "balance", "received_bytes", "bound_bytes", "exchange_ms", "overlapped", "halo_ms",
    "offloaded_layers", "peak_gib", "loss",
)  # fmt: skip


class Launch:
    """The processes of this launch, and their first 1, 2, 4, ... as groups of their own."""

    def __init__(self, small: bool, timeout_s: float):
        self.start = time.perf_counter()
        self.rank, self.world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.device = torch.device("cpu")
        if torch.cuda.is_available() and not small:
            self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
            torch.cuda.set_device(self.device)
        backend = "nccl" if self.device.type == "cuda" else "gloo"
        timeout = timedelta(seconds=timeout_s)
        if "RANK" in os.environ:
            dist.init_process_group(backend, timeout=timeout)
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
        # A new group would wait for its own default time, half an hour with gloo, if it were not told.
        sizes = [2**i for i in range(self.world_size.bit_length()) if 2**i < self.world_size]
        self.groups = {n: dist.new_group(list(range(n)), timeout=timeout) for n in sizes}
        self.groups[self.world_size] = self.everyone = dist.group.WORLD

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
            print(f"[{time.perf_counter() - self.start:.0f} s]", *words, flush=True)


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
    times = []
    for _ in range(repeats):
        dist.barrier(group)
        launch.synchronize()
        start = time.perf_counter()
        call()
        launch.synchronize()
        times.append(launch.largest(time.perf_counter() - start, group))
    return statistics.median(times)


def bound_bytes(pattern: DilationPattern, num_kv_heads: int, head_dim: int, itemsize: int) -> int:
    """Return what a rank receives at most in one causal call: ``sum(w / r)`` keys and values per KV head."""
    return num_kv_heads * sum(w // r for w, r in pattern.branches) * 2 * head_dim * itemsize


def balance(work: Callable[[int], float], tokens: int, size: int) -> float:
    """Return the ranks' mean work over the most that one has; ``work`` counts that of the first so many tokens."""
    edges = [work(tokens // size * rank) for rank in range(size + 1)]
    return edges[-1] / size / max(stop - start for start, stop in zip(edges, edges[1:]))


def build(shape: str, pattern: DilationPattern, device: torch.device, dtype: torch.dtype, length: int) -> nn.Module:
    """Build a model with random weights, the same on every rank."""
    rules = ("head_offsets", "count_overlaps", "dilate_queries", "window", "segment_lengths", "dilation_rates")
    fields = SHAPES[shape] | {name: getattr(pattern, name) for name in rules}
    torch.manual_seed(0)
    with device, default_dtype(dtype):
        return LongNetForCausalLM(LongNetConfig(**fields, max_position_embeddings=length, use_cache=False)).train()


def check(launch: Launch, length: int, preset: str) -> None:
    """Stop unless all ranks together compute what one does: the operator, logits, loss and gradients."""
    group, size = launch.everyone, launch.world_size
    pattern = DilationPattern.geometric(64, 512, preset=preset)
    generator = torch.Generator().manual_seed(0)
    # With one token missing slices begin where the rates say; with more they need not, and take another way.
    for missing in (1, 2 * size + 1):
        tokens = torch.randint(512, (1, length - missing), generator=generator).to(launch.device)
        batch = {"input_ids": tokens, "labels": tokens}
        model = build("small", pattern, launch.device, torch.float32, length)
        model.config.loss_implementation = "logits"
        out = model(**batch)
        out.loss.backward()
        one = [out.loss.detach(), *(p.grad for p in model.parameters())]

        sliced = build("small", pattern, launch.device, torch.float32, length)
        sliced.config.loss_implementation = "logits"
        with sequence_parallel(group):
            part = sliced(**shard_sequence(batch, group))
            part.loss.backward()
        found = [part.loss.detach().clone(), *(p.grad for p in sliced.parameters())]
        for x in found:
            dist.all_reduce(x, group=group)
        found.append(gather_sequence(part.logits, group, tokens.shape[1]))
        what = f"{preset}, {size} ranks, {tokens.shape[1]} tokens"
        report(launch, f"{what}: logits, loss, gradients in float32", found, [*one, out.logits], 1e-4)

        trained = Trained(launch, size, pattern, length, "small", torch.float32, offloaded_layers=1)
        loss = trained.gradients(shard_sequence(batch, group))
        gradients = [p.grad * size for p in trained.model.parameters()]  # FSDP2 averages parts that add up
        dist.all_reduce(loss, group=group)
        found = [loss, *(x.full_tensor() if hasattr(x, "full_tensor") else x for x in gradients)]
        report(launch, f"{what}: loss and gradients of the training step", found, one, 1e-4)

    if launch.device.type == "cuda":
        n = length // size
        mine = slice(launch.rank * n, (launch.rank + 1) * n)
        *inputs, do = (torch.randn(1, h, length, 128, generator=generator).bfloat16() for h in (4, 2, 2, 4))
        leaves = [x[:, :, mine].to(launch.device).requires_grad_() for x in inputs]
        out, _ = sequence_parallel_attention(*leaves, pattern, whole_rows(group, 1, n))
        gradients = torch.autograd.grad(out, leaves, do[:, :, mine].to(launch.device))
        leaves = [x.to(launch.device, torch.float32).requires_grad_() for x in inputs]
        expected = dilated_attention(*leaves, pattern, backend="torch")
        expected = [expected, *torch.autograd.grad(expected, leaves, do.to(launch.device, torch.float32))]
        what = f"{preset}, {size} ranks: attention and its gradients in bfloat16"
        report(launch, what, [out, *gradients], [x[:, :, mine] for x in expected], 1.5e-2)


def report(launch: Launch, what: str, found: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    errors = [((a.double() - b.double()).norm() / b.double().norm()).item() for a, b in zip(found, expected)]
    error = launch.largest(max(errors), launch.everyone)
    if not error <= tolerance:
        raise SystemExit(f"{what} are off by {error:.1e}; not timing that")
    launch.say(f"checked {what}: relative error {error:.1e}")


def time_attention(
    launch: Launch, size: int, tokens: int, pattern: DilationPattern, repeats: int, small: bool
) -> tuple[dict, Timeline | None]:
    """Time the operator on the first ``size`` ranks; on GPUs, profile it too."""
    group = launch.groups[size]
    heads, head_dim = (16, 128) if not small else (4, 16)
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
    median_seconds(launch, group, call, 1)
    seconds = median_seconds(launch, group, call, repeats)
    profiled: dict = {}
    found = None
    if launch.device.type == "cuda":
        dist.barrier(group)
        found = profile_call(call)
        profiled["halo_ms"] = launch.largest(found.milliseconds("halo"), group)
        profiled["exchange_ms"] = launch.largest(found.milliseconds("exchange"), group)
        profiled["overlapped"] = -launch.largest(-found.overlapped(), group)

    def work(length: int) -> float:
        return sum(pattern.attention_flops(length, heads, head_dim, backward=backward) for backward in (False, True))

    return profiled | {
        "tokens": tokens, "ms": 1e3 * seconds, "tflops_per_rank": work(tokens) / size / seconds / 1e12,
        "received_bytes": int(launch.largest(received[0] if received else 0, group)),
        "bound_bytes": bound_bytes(pattern, heads, head_dim, q.element_size()),
        "balance": balance(work, tokens, size),
    }, found  # fmt: skip


class Trained:
    """A model and its optimizer, sharded over the first ``size`` ranks by FSDP2."""

    def __init__(
        self, launch: Launch, size: int, pattern: DilationPattern, length: int, shape: str, dtype: torch.dtype,
        offloaded_layers: int = 0,
    ):  # fmt: skip
        self.launch, self.group, self.pattern = launch, launch.groups[size], pattern
        self.shape, self.dtype, self.offloaded_layers = shape, dtype, offloaded_layers
        self.model = build(shape, pattern, launch.device, dtype, length)
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
        if offloaded_layers:
            offload_checkpoints(self.model, offloaded_layers)
        fused = {"fused": True} if launch.device.type == "cuda" else {}
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5, **fused)
        self.loss = float("nan")

    def gradients(self, batch: Mapping) -> Tensor:
        """Run forward and backward on this rank's slice; return its part of the loss."""
        with sequence_parallel(self.group):
            loss = self.model(**batch).loss
        loss.backward()
        return loss.detach()

    def step(self, slice_length: int) -> None:
        """Train on random tokens, of which every rank draws its own slice: nothing here is as long as the sequence."""
        vocabulary, device = SHAPES[self.shape]["vocab_size"], self.launch.device
        generator = torch.Generator(device).manual_seed(self.group.rank())
        tokens, targets = (
            torch.randint(vocabulary, (1, slice_length), device=device, generator=generator) for _ in range(2)
        )
        # FSDP2 averages over the ranks: each takes its own mean.
        number = torch.tensor(slice_length, device=device)
        self.loss = self.gradients(
            {"input_ids": tokens, "labels": tokens, "shift_labels": targets, "num_items_in_batch": number}
        )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def flops(self, tokens: int) -> float:
        """Count what a step on the first so many tokens must do; recomputation does not count."""
        shape = SHAPES[self.shape]
        attention = self.pattern.attention_flops(
            tokens, shape["num_attention_heads"], shape["head_dim"], num_kv_heads=shape["num_key_value_heads"]
        )
        lookup = 0 if shape["tie_word_embeddings"] else shape["vocab_size"] * shape["hidden_size"]
        return 6 * tokens * (self.matrix_weights - lookup) + 3 * shape["num_hidden_layers"] * attention

    def reserve_host_memory(self, slice_length: int) -> None:
        """Pin the memory for offloaded checkpoints, which PyTorch keeps: the first step would wait for it."""
        if self.launch.device.type == "cuda":
            per_layer = slice_length * SHAPES[self.shape]["hidden_size"] * self.dtype.itemsize
            blocks = self.offloaded_layers * -(-per_layer // BLOCK_BYTES)
            blocks = [torch.empty(BLOCK_BYTES, dtype=torch.uint8, pin_memory=True) for _ in range(blocks)]
            self.launch.say(f"pinned {len(blocks) * BLOCK_BYTES / 2**30:.0f} GiB of host memory per rank")


def time_step(launch: Launch, trained: Trained, tokens: int, repeats: int, warm_up_tokens: int) -> dict:
    """Time steps on ``tokens``, after one on ``warm_up_tokens``."""
    group, size = trained.group, trained.group.size()
    shape = SHAPES[trained.shape]
    trained.step(warm_up_tokens // size)
    if launch.device.type == "cuda":
        if warm_up_tokens != tokens:
            torch.cuda.empty_cache()  # no room for pieces of other sizes
        torch.cuda.reset_peak_memory_stats()
    with counted_bytes() as received:
        seconds = median_seconds(launch, group, lambda: trained.step(tokens // size), repeats)
    peak = torch.cuda.max_memory_allocated() / 2**30 if launch.device.type == "cuda" else float("nan")
    return {
        "tokens": tokens, "ms": 1e3 * seconds, "tflops_per_rank": trained.flops(tokens) / size / seconds / 1e12,
        "received_bytes": int(launch.largest(max(received, default=0), group)),
        "bound_bytes": bound_bytes(
            trained.pattern, shape["num_key_value_heads"], shape["head_dim"], trained.dtype.itemsize
        ),
        "balance": balance(trained.flops, tokens, size), "offloaded_layers": trained.offloaded_layers,
        "peak_gib": f"{launch.largest(peak, group):.4g}", "loss": f"{trained.loss.item():.4f}",
    }  # fmt: skip


def pattern_for(tokens: int, preset: str, arguments) -> DilationPattern:
    """Return branches that double up to the sequence, or to the longest segment."""
    first = last = 64 if arguments.small else 2048
    while last < min(tokens, arguments.longest_segment):
        last *= 2
    return DilationPattern.geometric(first, last, preset=preset)


def forget(launch: Launch) -> None:
    """Free what a model leaves in reference cycles."""
    gc.collect()
    if launch.device.type == "cuda":
        torch.cuda.empty_cache()


def scaling_rows(launch: Launch, stage: str, preset: str, arguments, folder: Path) -> Iterator[dict]:
    """Yield one row per number of ranks, weak scaling first, on the ranks that take part; nothing on the others."""
    n, total = arguments.tokens_per_rank, arguments.tokens_per_rank * launch.world_size
    pattern = pattern_for(total, preset, arguments)
    single: dict | None = None
    for scaling in ("weak", "strong"):
        for size in launch.groups:
            tokens = n * size if scaling == "weak" else n - n % size
            row = {
                "stage": stage, "attention": preset, "longest_segment": pattern.segment_lengths[-1], "ranks": size
            }  # fmt: skip
            if launch.rank >= size:
                pass
            elif size == 1 and single is not None:  # weak and strong scaling begin alike
                row = single
            elif stage == "attention":
                found, timeline = time_attention(launch, size, tokens, pattern, arguments.repeats, arguments.small)
                row |= found
                if timeline is not None and size == launch.world_size and launch.rank == size - 1:
                    write_timeline(folder, f"{preset}, {scaling}", timeline)
            else:
                dtype = torch.bfloat16 if launch.device.type == "cuda" else torch.float32
                trained = Trained(launch, size, pattern, total, arguments.shape, dtype, arguments.offloaded_layers)
                row |= time_step(launch, trained, tokens, arguments.step_repeats, tokens)
                row |= {"shape": arguments.shape}
                del trained
                forget(launch)
            if launch.rank < size:
                single = row if size == 1 else single
                # Only rank 0 has run alone, and only it writes.
                rate = None if single is None else row["tflops_per_rank"] / single["tflops_per_rank"]
                yield row | {"scaling": scaling, "efficiency": "" if rate is None else rate}
            dist.barrier()


def longest_rows(launch: Launch, preset: str, arguments) -> Iterator[dict]:
    """Yield a row per length that fits; where memory ends, end the launch."""
    lengths = arguments.lengths or growing(arguments)
    dtype = torch.bfloat16 if launch.device.type == "cuda" else torch.float32
    size, trained = launch.world_size, None
    for n in lengths:
        pattern = pattern_for(n * size, preset, arguments)
        launch.say(f"longest: trying {n} tokens per rank")
        try:
            if trained is None or trained.pattern != pattern:
                trained = None
                forget(launch)
                trained = Trained(launch, size, pattern, n * size, arguments.shape, dtype, arguments.offloaded_layers)
            trained.reserve_host_memory(n)
            row = time_step(launch, trained, n * size, 1, min(n, arguments.warm_up_tokens) * size)
        except torch.OutOfMemoryError:
            print(f"rank {launch.rank}: {n} tokens per rank do not fit", flush=True)
            os._exit(3)  # the others wait in an exchange; the launcher ends them
        yield row | {
            "stage": "longest", "attention": preset, "longest_segment": pattern.segment_lengths[-1],
            "shape": arguments.shape, "ranks": size,
        }  # fmt: skip


def growing(arguments) -> Iterator[int]:
    """Yield lengths of slices that every rate divides, each longer than the one before."""
    n, multiple = arguments.tokens_per_rank, 64 if arguments.small else 2048
    while n <= arguments.most_tokens_per_rank:
        yield n
        n = max(n + multiple, n * arguments.growth_percent // 100 // multiple * multiple)


def write_timeline(folder: Path, name: str, timeline: Timeline) -> None:
    """Add the last rank's timeline of one call to its file."""
    path = timeline_path(folder)
    is_new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.writer(file)
        if is_new:
            writer.writerow(["call", "kind", "start_ms", "end_ms"])
        for kind in KINDS:
            writer.writerows([name, kind, f"{a:.4f}", f"{b:.4f}"] for a, b in getattr(timeline, kind))


def stage_rows(launch: Launch, arguments, path: Path) -> Iterator[dict]:
    for stage in ("attention", "step"):
        for preset in arguments.presets if stage in arguments.stages else ():
            yield from scaling_rows(launch, stage, preset, arguments, path)
    for preset in arguments.presets if "longest" in arguments.stages else ():
        yield from longest_rows(launch, preset, arguments)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=["check", "attention", "step"])
    parser.add_argument("--presets", nargs="+", choices=PRESETS, default=list(PRESETS))
    parser.add_argument("--shape", choices=tuple(SHAPES), default="1b")
    parser.add_argument("--tokens-per-rank", type=int, default=2**17)
    parser.add_argument(
        "--lengths", type=int, nargs="+", help="of the slices in the stage longest, instead of a search"
    )
    parser.add_argument(
        "--most-tokens-per-rank", type=int, default=2**24, help="where the search for the longest ends"
    )
    parser.add_argument("--growth-percent", type=int, default=150, help="of one length to the next in that search")
    parser.add_argument("--warm-up-tokens", type=int, default=2**15, help="per rank, before the longest")
    parser.add_argument("--longest-segment", type=int, default=2**20, help="branches double up to here")
    parser.add_argument("--offloaded-layers", type=int, default=0, help="whose checkpoints wait in host memory")
    parser.add_argument("--repeats", type=int, default=5, help="of the operator")
    parser.add_argument("--step-repeats", type=int, default=2)
    parser.add_argument("--timeout", type=float, default=120.0, help="seconds that a rank waits for another")
    parser.add_argument("--limit", type=float, default=540.0, help="seconds for the whole launch")
    parser.add_argument("--small", action="store_true", help="tiny shapes on CPUs: tests the path on any machine")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    if arguments.small:
        arguments.shape, arguments.repeats, arguments.step_repeats = "small", 2, 1
        arguments.tokens_per_rank = min(arguments.tokens_per_rank, 512)
        arguments.most_tokens_per_rank = min(arguments.most_tokens_per_rank, 2 * arguments.tokens_per_rank)
    return arguments


def main() -> None:
    arguments = parse()
    faulthandler.dump_traceback_later(arguments.limit, exit=True)
    launch = Launch(arguments.small, arguments.timeout)
    torch.backends.cuda.matmul.allow_tf32 = False
    now = launch.largest(time.time(), launch.everyone)  # the first collective; one name for the files of all ranks
    launch.say(f"{launch.world_size} ranks, {dist.get_backend()}")
    if "check" in arguments.stages:
        length = (1200 if arguments.small else 2**14) // launch.world_size * launch.world_size
        for preset in arguments.presets:
            check(launch, length, preset)
            forget(launch)

    card = torch.cuda.get_device_name().replace(" ", "-") if launch.device.type == "cuda" else "CPU"
    stamp = datetime.fromtimestamp(now, UTC).strftime("%Y-%m-%d_%H%M%S")
    path = arguments.output / f"sequence_parallel_{launch.world_size}x{card}_{stamp}.csv"
    arguments.output.mkdir(parents=True, exist_ok=True)
    file = writer = None
    if launch.rank == 0:
        file = path.open("w", newline="")
        checked = "" if "check" in arguments.stages else ", not checked in this launch"
        file.write(f"# {launch.world_size} x {card}, torch {torch.__version__}, transformers "
                   f"{transformers.__version__}, {dist.get_backend()}, medians of the slowest rank{checked}\n")  # fmt: skip
        file.write(f"# torchrun --nproc-per-node {launch.world_size} {' '.join(sys.argv)}\n")
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        file.flush()
    for row in stage_rows(launch, arguments, path):
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
        launch.say(f"wrote {path}")
        plot(path)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
