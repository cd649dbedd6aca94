"""What would a training step on a sequence of a billion tokens take, on 8 to 4,096 GPUs?

Extrapolates, and says from what. Measured: the attention kernels' TFLOP/s on one GPU, from a CSV of
``benchmark_attention.py`` (its longest input). Assumed, each an option: the rate of the matrix products, the bandwidth
into a GPU for keys and values that other ranks send, that for FSDP2's weights, and the memory of GPU and host. Counted
exactly: FLOPs (``DilationPattern.attention_flops``), and what a rank receives (``sum(w / r)`` keys and values per KV
head and layer; three times a step, since activation checkpointing repeats the forward pass).

The exchange runs beside the local attention: what does not fit beside it adds to the step. The last rank counts, whose
windows are fullest; all are taken to be equally fast. Memory counts sharded weights, gradients and AdamW states in bfloat16, each layer's checkpoint (in host
memory where that is offloaded), and the largest layer's working set.

With ``--scaling``, a CSV of ``benchmark_sequence_parallel.py``, it goes on from what several GPUs measured instead: the
same tokens per GPU and the same pattern on more of them. Then the step takes as much longer as the last rank has more
useful FLOPs; assumed is that it computes and exchanges no slower (what it receives is counted, and stays within the
bound), which a slower link between more GPUs would break. Memory is the measured peak, less what AdamW's states and the
weights shrink to (gradients are left as they were: they need not stand at the peak), plus four times what more is received.

    PYTHONPATH=. python benchmarks/plan_sequence_parallel.py
    PYTHONPATH=. python benchmarks/plan_sequence_parallel.py --shape 8b --attention retrofit --offload
    PYTHONPATH=. python benchmarks/plan_sequence_parallel.py --attention retrofit --gpus 8 --scaling \\
        benchmarks/results/sequence_parallel_<...>.csv
"""

import argparse
import csv
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from benchmark_training import SHAPES

from modeling_longnet import DilationPattern


RESULTS = Path(__file__).parent / "results"
# Rows of bfloat16 numbers that live at once while one layer's backward pass runs, in hidden sizes per token: queries,
# keys, values, outputs, their gradients, the residual stream's, and the float32 sums of one of them. The MLP and the
# loss run in tiles and chunks of constant size.
WORKING_SET = 12


@dataclass(frozen=True)
class Assumptions:
    """What is taken for granted, besides the measured rate of the attention."""

    attention_tflops: float
    matmul_tflops: float
    exchange_gb_per_s: float
    weights_gb_per_s: float
    gpu_gib: float
    host_gib: float
    offload: bool


def measured_rate(path: Path, attention: str, head_dim: int) -> tuple[float, str]:
    """Return forward + backward TFLOP/s of the longest input in the CSV, and which that is.

    Rows with this head size come first; without any, those of another serve.
    """
    with path.open() as file:
        rows = list(csv.DictReader(line for line in file if not line.startswith("#")))
    rows = [
        row
        for row in rows
        if (row["attention"], row["pass"], row["layout"]) == (attention, "forward+backward", "plain")
    ]
    if not rows:
        raise SystemExit(f"{path} has no forward+backward rows of {attention!r}")
    chosen = max(rows, key=lambda row: (int(row["head_dim"]) == head_dim, int(row["length"]), int(row["head_dim"])))
    return float(chosen["tflops"]), f"{chosen['length']} tokens, head_dim {chosen['head_dim']}"


def count_weights(shape: dict) -> tuple[int, int, int]:
    """Count the weights of a layer's matrices, of the embeddings, and of the model."""
    hidden, head_dim = shape["hidden_size"], shape["head_dim"]
    heads, kv_heads = shape["num_attention_heads"], shape["num_key_value_heads"]
    per_layer = hidden * head_dim * (2 * heads + 2 * kv_heads) + 3 * hidden * shape["intermediate_size"]
    vocabulary = shape["vocab_size"] * hidden
    weights = shape["num_hidden_layers"] * per_layer + vocabulary * (1 if shape["tie_word_embeddings"] else 2)
    return per_layer, vocabulary, weights


def last_rank_flops(shape: dict, pattern: DilationPattern, tokens: int, gpus: int) -> int:
    """Count the last rank's useful FLOPs of one layer's attention, forward."""
    heads, head_dim, kv_heads = shape["num_attention_heads"], shape["head_dim"], shape["num_key_value_heads"]
    whole, before = (
        pattern.attention_flops(length, heads, head_dim, num_kv_heads=kv_heads)
        for length in (tokens, tokens - tokens // gpus)
    )
    return whole - before


def received_bytes(shape: dict, pattern: DilationPattern, tokens: int, gpus: int) -> int:
    """Bound what a rank receives in one layer's forward pass."""
    if gpus == 1:
        return 0
    entries = min(sum(w // r for w, r in pattern.branches if w <= tokens), tokens - tokens // gpus)
    return shape["num_key_value_heads"] * entries * 2 * shape["head_dim"] * 2


def plan(shape: dict, pattern: DilationPattern, tokens: int, gpus: int, given: Assumptions) -> dict:
    """Estimate one training step of one sequence over ``gpus``."""
    hidden, layers = shape["hidden_size"], shape["num_hidden_layers"]
    per_layer, vocabulary, weights = count_weights(shape)
    rank_tokens = tokens // gpus

    forward = last_rank_flops(shape, pattern, tokens, gpus)
    # Forward, forward again from the checkpoint, backward with five products for two.
    attention_s = layers * (2 + 2.5) * forward / given.attention_tflops / 1e12
    matmul_s = rank_tokens * (8 * layers * per_layer + 6 * vocabulary) / given.matmul_tflops / 1e12
    received = received_bytes(shape, pattern, tokens, gpus)
    exchange_s = 3 * layers * received / given.exchange_gb_per_s / 1e9
    weights_s = 3 * 2 * weights / given.weights_gb_per_s / 1e9 if gpus > 1 else 0.0
    exposed_s = max(0.0, exchange_s - attention_s) + max(0.0, weights_s - matmul_s)

    states = weights * 2 * 4 / gpus / 2**30
    checkpoints = layers * rank_tokens * hidden * 2 / 2**30
    working = WORKING_SET * hidden * rank_tokens * 2 / 2**30
    halo = 4 * received / 2**30
    on_gpu = states + working + halo + (0 if given.offload else checkpoints)
    fits = on_gpu <= given.gpu_gib and (not given.offload or checkpoints <= given.host_gib)
    step_s = attention_s + matmul_s + exposed_s
    return {
        "gpus": gpus, "tokens_per_gpu": rank_tokens, "step_s": step_s, "attention_s": attention_s,
        "matmul_s": matmul_s, "exchange_s": exchange_s, "exposed_s": exposed_s,
        "received_mib_per_layer": received / 2**20, "gpu_gib": on_gpu, "checkpoints_gib": checkpoints,
        "fits": "yes" if fits else "no", "tokens_per_s": tokens / step_s,
    }  # fmt: skip


def measured_step(path: Path, shape: str, attention: str) -> dict[str, str]:
    """Return the row of the training step on most GPUs, and of those on most tokens."""
    with path.open() as file:
        rows = list(csv.DictReader(line for line in file if not line.startswith("#")))
    rows = [
        row
        for row in rows
        if (row["shape"], row["attention"]) == (shape, attention) and row["stage"] in ("step", "longest")
    ]
    if not rows:
        raise SystemExit(f"{path} has no training steps of {attention!r} with the {shape}-shape")
    return max(rows, key=lambda row: (int(row["ranks"]), int(row["tokens"])))


def extrapolate(shape: dict, row: dict[str, str], gpus: int, gpu_gib: float) -> dict:
    """Go on from a measured step to the same tokens per GPU on other numbers of them."""
    pattern = DilationPattern.geometric(2048, int(row["longest_segment"]), preset=row["attention"])
    per_rank, layers = int(row["tokens_per_rank"]), shape["num_hidden_layers"]
    per_layer, vocabulary, weights = count_weights(shape)
    work, states, halo = [], [], []
    for ranks in (int(row["ranks"]), gpus):
        attention = 3 * layers * last_rank_flops(shape, pattern, per_rank * ranks, ranks)
        work.append(6 * per_rank * (layers * per_layer + vocabulary) + attention)
        states.append(3 * 2 * weights / ranks / 2**30)
        halo.append(4 * received_bytes(shape, pattern, per_rank * ranks, ranks) / 2**30)
    step_s = float(row["ms"]) / 1e3 * work[1] / work[0]
    on_gpu = float(row["peak_gib"]) - states[0] + states[1] + halo[1] - halo[0]
    return {
        "gpus": gpus, "tokens": per_rank * gpus, "tokens_per_gpu": per_rank, "step_s": step_s,
        "tokens_per_s": per_rank * gpus / step_s, "gpu_gib": on_gpu, "fits": "yes" if on_gpu <= gpu_gib else "no",
        "host_gib": int(row["offloaded_layers"]) * per_rank * shape["hidden_size"] * 2 / 2**30,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", type=Path, help="of benchmark_attention.py (default: the newest under results)")
    parser.add_argument("--scaling", type=Path, help="of benchmark_sequence_parallel.py: go on from its longest step")
    parser.add_argument("--shape", choices=tuple(SHAPES), default="1b")
    parser.add_argument("--attention", choices=("paper", "retrofit"), default="paper")
    parser.add_argument("--tokens", type=int, default=2**30)
    parser.add_argument("--longest-segment", type=int, help="branches double from 2048 up to here (default: tokens)")
    parser.add_argument("--gpus", type=int, nargs="+", default=[8, 64, 256, 512, 1024, 2048, 4096])
    parser.add_argument("--matmul-tflops", type=float, default=500.0, help="per GPU, all but attention: %(default)s")
    parser.add_argument("--exchange-gb-per-s", type=float, default=50.0, help="into one GPU, keys and values")
    parser.add_argument("--weights-gb-per-s", type=float, default=50.0, help="into one GPU, weights and gradients")
    parser.add_argument("--gpu-gib", type=float, default=139.0)
    parser.add_argument("--host-gib", type=float, default=64.0, help="host memory per GPU for offloaded checkpoints")
    parser.add_argument("--offload", action="store_true", help="keep checkpoints in host memory")
    parser.add_argument("--output", type=Path, help="also write the table to this CSV")
    arguments = parser.parse_args()

    table = scaled(arguments) if arguments.scaling else planned(arguments)
    print(*table.explanation, sep="\n")
    print(*table.rows[0], sep="\t")
    for row in table.rows:
        print(*(f"{x:.4g}" if isinstance(x, float) else x for x in row.values()), sep="\t")
    if arguments.output:
        with arguments.output.open("w", newline="") as file:
            file.writelines(f"# {line}\n" for line in table.explanation)
            writer = csv.DictWriter(file, table.rows[0])
            writer.writeheader()
            writer.writerows(table.rows)


class Table(NamedTuple):
    """What was measured and assumed, a line each, and what follows."""

    explanation: list[str]
    rows: list[dict]


def planned(arguments: argparse.Namespace) -> Table:
    path = arguments.csv or max(RESULTS.glob("attention_*[0-9].csv"))
    rate, what = measured_rate(path, arguments.attention, SHAPES[arguments.shape]["head_dim"])
    last = 2048
    while last < (arguments.longest_segment or arguments.tokens):
        last *= 2
    pattern = DilationPattern.geometric(2048, last, preset=arguments.attention)
    given = Assumptions(
        rate, arguments.matmul_tflops, arguments.exchange_gb_per_s, arguments.weights_gb_per_s, arguments.gpu_gib,
        arguments.host_gib, arguments.offload,
    )  # fmt: skip
    return Table(
        [
            f"{arguments.tokens} tokens, {arguments.shape}-shape, {arguments.attention} with {len(pattern.branches)} "
            f"branches up to {last}",
            f"measured: attention forward + backward at {rate:.0f} TFLOP/s ({what}, {path.name})",
            f"assumed: {given}",
        ],
        [plan(SHAPES[arguments.shape], pattern, arguments.tokens, gpus, given) for gpus in arguments.gpus],
    )


def scaled(arguments: argparse.Namespace) -> Table:
    row = measured_step(arguments.scaling, arguments.shape, arguments.attention)
    return Table(
        [
            f"measured: {row['tokens_per_rank']} tokens per GPU on {row['ranks']} in {float(row['ms']) / 1e3:.4g} s, "
            f"peak {row['peak_gib']} GiB; {arguments.shape}-shape, {arguments.attention} with branches up to "
            f"{row['longest_segment']}, {row['offloaded_layers']} layers' checkpoints in host memory "
            f"({arguments.scaling.name})",
            "assumed: the last rank computes and exchanges as fast on more GPUs; weights and AdamW's states are shared "
            f"by all of them; {arguments.gpu_gib} GiB are free on each",
        ],
        [extrapolate(SHAPES[arguments.shape], row, gpus, arguments.gpu_gib) for gpus in arguments.gpus],
    )


if __name__ == "__main__":
    main()
