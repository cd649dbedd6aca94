"""Where does the time of one decoded token go, kernel by kernel, and what do the launch choices cost?

The shape of ``benchmark_generation.py`` with random weights, a cache filled to ``--context``, one captured step.
Prints milliseconds per step and, as a multiple of what the weights alone take at ``--bandwidth``, for each way of
launching; then the kernels of one step by a profiler.

    PYTHONPATH=. python benchmarks/profile_decoding.py
"""

import argparse
import sys
from collections import defaultdict

import torch

from modeling_longnet import (
    DecodingGraph,
    DilationPattern,
    LongNetCache,
    LongNetConfig,
    LongNetForCausalLM,
    decoding_hopper,
    decoding_triton,
)
from modeling_longnet.dilation_pattern import PRESETS


# What may be turned, each from the defaults.
CHOICES = [
    {},
    {"OVERLAPS_LAUNCHES": False},
    {"KEY_BYTES": 2**14},
    {"KEY_BYTES": 2**16},
    {"MOST_PROGRAMS": 0},  # not at once
    {"MOST_PROGRAMS": 48},  # long caches not at once
    {"ATTENDING_PROGRAMS": 3},
    {"ATTENDING_PROGRAMS": 4},
    {"KEYS_PER_BLOCK": 32, "ATTENDING_PROGRAMS": 4},
    {"KEYS_PER_BLOCK": 128, "ATTENDING_PROGRAMS": 2},
    {"MOST_PROGRAMS": 0, "KEYS_PER_BLOCK": 128, "ATTENDING_PROGRAMS": 1},
    {"AHEAD_BYTES": 0},
    {"AHEAD_BYTES": 2**23},
    {"TILE_BYTES": 2**12},
    {"TILE_BYTES": 2**14},
    {"COLUMNS_PER_WARP": 256},
    {"COLUMNS_PER_WARP": 1024},
]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--context", type=int, default=2**20)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--dense-layers", type=int, nargs="*", default=[])
    parser.add_argument("--room", type=int, help="tokens that the cache is made for (default: as many as come)")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--bandwidth", type=float, default=4.2, help="TB/s")
    args = parser.parse_args()
    for layer in args.dense_layers:
        if not 0 <= layer < args.layers:
            parser.error(f"--dense-layers {layer}: the {args.layers} layers are numbered from 0 to {args.layers - 1}")
    return args


def make_model(layers: int, dense_layers: list[int]) -> LongNetForCausalLM:
    pattern = DilationPattern.geometric(2048, 2**20, preset="retrofit")
    config = LongNetConfig(
        vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=layers, num_attention_heads=32,
        num_key_value_heads=8, head_dim=64, max_position_embeddings=2**20, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=None, segment_lengths=pattern.segment_lengths,
        dilation_rates=pattern.dilation_rates, dense_layers=dense_layers, **PRESETS["retrofit"],
    )  # fmt: skip
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = LongNetForCausalLM(config).eval()
        model.model.rotary_emb = type(model.model.rotary_emb)(config)
    torch.set_default_dtype(torch.float32)
    return model


def filled_cache(model: LongNetForCausalLM, batch: int, context: int, room: int) -> LongNetCache:
    cache = LongNetCache(model.config, max_length=room)
    for first in range(0, context, 2**18):
        positions = torch.arange(first, min(first + 2**18, context), device="cuda").expand(batch, -1)
        keys = torch.randn(batch, 8, positions.shape[1], 64, device="cuda", dtype=torch.bfloat16)
        for layer in range(model.config.num_hidden_layers):
            cache.update(keys, keys, layer, positions=positions)
    return cache


def milliseconds(step: DecodingGraph, token: torch.Tensor, steps: int) -> float:
    for _ in range(3):
        step(token)
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(steps):
        step._graph.replay()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) / steps


def kernels(step: DecodingGraph, token: torch.Tensor) -> None:
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        step(token)
        torch.cuda.synchronize()
    times = defaultdict(list)
    for event in profile.events():
        times[event.name].append(event.device_time)
    total = sum(map(sum, times.values()))
    print(f"  the profiler's sum: {total:.0f} us")
    for name, each in sorted(times.items(), key=lambda item: -sum(item[1])):
        each.sort()
        spread = f"{each[0]:7.2f} ... {each[-1]:7.2f}"
        print(f"  {sum(each):8.1f} us {100 * sum(each) / total:5.1f}% x{len(each):4d}  {spread}  {name[:80]}")


@torch.no_grad()
def main() -> None:
    args = arguments()
    if not torch.cuda.is_available():
        raise SystemExit("no CUDA device; this measures kernels that only an NVIDIA GPU runs")
    model = make_model(args.layers, args.dense_layers)
    steps = (args.steps + 10) * len(CHOICES)
    cache = filled_cache(model, args.batch, args.context, args.room or args.context + steps)
    token = torch.zeros(args.batch, 1, dtype=torch.long, device="cuda")
    weight_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    bound = weight_bytes / (args.bandwidth * 1e9)
    print(f"{torch.cuda.get_device_name()}: {weight_bytes / 1e9:.2f} GB of weights, {bound:.3f} ms at the least")
    for choice in CHOICES:
        launchers = {name: decoding_hopper if hasattr(decoding_hopper, name) else decoding_triton for name in choice}
        before = {name: getattr(launchers[name], name) for name in choice}
        for name, value in choice.items():
            setattr(launchers[name], name, value)
        try:
            step = DecodingGraph(model, cache)
            time = milliseconds(step, token, args.steps)
            print(f"{time:.3f} ms/step, {time / bound:.2f} x  {choice or 'defaults'}", flush=True)
            if not choice or choice == {"OVERLAPS_LAUNCHES": False}:
                kernels(step, token)
        except Exception as error:  # another choice may still run
            print(f"failed: {choice}: {error}", file=sys.stderr, flush=True)
        for name, value in before.items():
            setattr(launchers[name], name, value)


if __name__ == "__main__":
    main()
