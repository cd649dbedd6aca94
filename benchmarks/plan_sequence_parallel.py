"""What would a training step on a sequence of a billion tokens take, on 8 to 4,096 GPUs?

Extrapolates, and says from what. Measured: the attention kernels' TFLOP/s on one GPU, from a CSV of
``benchmark_attention.py`` (its longest input). Assumed, each an option: the rate of the matrix products, the bandwidth
into a GPU for keys and values that other ranks send, that for FSDP2's weights, and the memory of GPU and host. Counted
exactly: FLOPs (``DilationPattern.attention_flops``), and what a rank receives (``sum(w / r)`` keys and values per KV
head and layer; three times a step, since activation checkpointing repeats the forward pass).

The exchange runs beside the local attention: what does not fit beside it adds to the step. All ranks are taken to be
equally fast. Memory counts sharded weights, gradients and AdamW states in bfloat16, each layer's checkpoint (in host
memory where that is offloaded), and the largest layer's working set.

    PYTHONPATH=. python benchmarks/plan_sequence_parallel.py
    PYTHONPATH=. python benchmarks/plan_sequence_parallel.py --shape 8b --attention retrofit --offload
"""

import argparse
import csv
from dataclasses import dataclass
from pathlib import Path

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


def measured_rate(path: Path, attention: str) -> tuple[float, int]:
    """Return forward + backward TFLOP/s of the longest input in the CSV, and its length."""
    with path.open() as file:
        rows = list(csv.DictReader(line for line in file if not line.startswith("#")))
    rows = [
        row
        for row in rows
        if (row["attention"], row["pass"], row["layout"]) == (attention, "forward+backward", "plain")
    ]
    if not rows:
        raise SystemExit(f"{path} has no forward+backward rows of {attention!r}")
    longest = max(rows, key=lambda row: (int(row["length"]), int(row["head_dim"])))
    return float(longest["tflops"]), int(longest["length"])


def plan(shape: dict, pattern: DilationPattern, tokens: int, gpus: int, given: Assumptions) -> dict:
    """Estimate one training step of one sequence over ``gpus``."""
    hidden, layers = shape["hidden_size"], shape["num_hidden_layers"]
    heads, kv_heads, head_dim = shape["num_attention_heads"], shape["num_key_value_heads"], shape["head_dim"]
    per_layer = hidden * head_dim * (2 * heads + 2 * kv_heads) + 3 * hidden * shape["intermediate_size"]
    vocabulary = shape["vocab_size"] * hidden
    weights = layers * per_layer + vocabulary * (1 if shape["tie_word_embeddings"] else 2)
    rank_tokens = tokens // gpus

    forward = pattern.attention_flops(tokens, heads, head_dim, num_kv_heads=kv_heads)
    backward = pattern.attention_flops(tokens, heads, head_dim, num_kv_heads=kv_heads, backward=True)
    # Forward, forward again from the checkpoint, backward.
    attention_s = layers * (2 * forward + backward) / gpus / given.attention_tflops / 1e12
    matmul_s = rank_tokens * (8 * layers * per_layer + 6 * vocabulary) / given.matmul_tflops / 1e12
    bound = kv_heads * sum(w // r for w, r in pattern.branches if w <= tokens) * 2 * head_dim * 2
    received = min(bound, 2 * kv_heads * (tokens - rank_tokens) * head_dim * 2) if gpus > 1 else 0
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", type=Path, help="of benchmark_attention.py (default: the newest under results)")
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

    path = arguments.csv or max(RESULTS.glob("attention_*[0-9].csv"))
    rate, length = measured_rate(path, arguments.attention)
    last = 2048
    while last < (arguments.longest_segment or arguments.tokens):
        last *= 2
    pattern = DilationPattern.geometric(2048, last, preset=arguments.attention)
    given = Assumptions(
        rate, arguments.matmul_tflops, arguments.exchange_gb_per_s, arguments.weights_gb_per_s, arguments.gpu_gib,
        arguments.host_gib, arguments.offload,
    )  # fmt: skip
    rows = [plan(SHAPES[arguments.shape], pattern, arguments.tokens, gpus, given) for gpus in arguments.gpus]

    print(f"{arguments.tokens} tokens, {arguments.shape}-shape, {arguments.attention} with {len(pattern.branches)} "
          f"branches up to {last}")  # fmt: skip
    print(f"measured: attention forward + backward at {rate:.0f} TFLOP/s ({length} tokens, {path.name})")
    print(f"assumed: {given}")
    print(*rows[0], sep="\t")
    for row in rows:
        print(*(f"{x:.4g}" if isinstance(x, float) else x for x in row.values()), sep="\t")
    if arguments.output:
        with arguments.output.open("w", newline="") as file:
            file.write(f"# {given}; attention rate from {path.name}\n")
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
