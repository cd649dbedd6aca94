"""How much memory does a conversion take?

Makes a checkpoint of random bfloat16 weights on the spot, 4 GB and a vocabulary of 151,936 tokens unless told
otherwise, converts it in processes of their own, and writes their peak resident memory to a CSV file. Each conversion
must stay below one output shard and 300 MB, all libraries included; the script fails where one does not.

    python benchmarks/benchmark_conversion.py --folder /tmp/conversion
"""

import argparse
import csv
import datetime
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM


ALLOWANCE = 300e6
CHUNK = 2**24  # numbers drawn at a time
MEASURED = """
import resource, sys
from conversion.cli import main
status = main(sys.argv[1:])
print("PEAK", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
sys.exit(status)
"""
# What is done, in which shards, with which options.
CASES = (
    ("files copied", "5GB", ["--no-verify"]),
    ("laid out anew", "500MB", ["--no-verify"]),
    ("rounded to float16", "500MB", ["--no-verify", "--dtype", "float16"]),
    ("laid out anew, logits compared", "500MB", []),
)


def make_checkpoint(folder: Path, layers: int) -> int:
    """Write a random Llama, a few megabytes at a time, in one file; return its bytes."""
    config = LlamaConfig(
        vocab_size=151_936,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=4,
        max_position_embeddings=512,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {name: x.shape for name, x in LlamaForCausalLM(config).state_dict().items()}
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * shape.numel()
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    generator = torch.Generator().manual_seed(0)
    noise = (torch.randn(CHUNK, generator=generator) * 0.02).to(torch.bfloat16)
    with open(folder / "model.safetensors", "wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        for name, shape in shapes.items():
            for start in range(0, shape.numel(), CHUNK):
                numbers = noise[: min(CHUNK, shape.numel() - start)]
                numbers = torch.ones_like(numbers) if "norm" in name else numbers.roll(len(name) + start)
                file.write(numbers.view(torch.uint8).numpy())
    return end


def convert(source: Path, target: Path, shard: str, options: list[str]) -> tuple[int, float]:
    """Convert in a process of its own; return its peak resident memory in bytes, and seconds."""
    start = time.perf_counter()
    command = [sys.executable, "-c", MEASURED, source, target, "--quiet", "--max-shard-size", shard, *options]
    run = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    if run.returncode != 0:
        raise SystemExit(run.stderr)
    return int(run.stdout.split("PEAK")[1]), time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where twice the checkpoint's size is free")
    parser.add_argument("--layers", type=int, default=23, help="of the checkpoint (default: %(default)s, 4 GB)")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    folder = options.folder / "benchmark_conversion"
    try:
        num_bytes = make_checkpoint(folder / "source", options.layers)
        rows = []
        for what, shard, extra in CASES:
            peak, seconds = convert(folder / "source", folder / "target", shard, extra)
            shards = [path.stat().st_size for path in (folder / "target").glob("*.safetensors")]
            bound = max(shards) + ALLOWANCE
            rows.append(
                {
                    "conversion": what,
                    "checkpoint_bytes": num_bytes,
                    "largest_shard_bytes": max(shards),
                    "peak_rss_bytes": peak,
                    "bound_bytes": int(bound),
                    "seconds": round(seconds, 1),
                }
            )
            print(f"{what:32} {peak / 1e6:7.0f} MB of {bound / 1e6:7.0f} MB allowed, {seconds:6.1f} s", flush=True)
            shutil.rmtree(folder / "target")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    machine = {
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "safetensors")},
        "command": " ".join(["python", *sys.argv]),
    }
    path = options.results / f"conversion_{datetime.date.today()}.csv"
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], *machine])
        writer.writeheader()
        writer.writerows(row | machine for row in rows)
    print(f"wrote {path}")
    if any(row["peak_rss_bytes"] > row["bound_bytes"] for row in rows):
        raise SystemExit("more memory than one output shard and 300 MB")


if __name__ == "__main__":
    main()
