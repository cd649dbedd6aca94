"""A billion tokens of source code through one GPU: how fast, in how much memory, and with which losses by position?

Trains a small LongNet on Python's own sources for a moment, then scores a stream of them, repeated until there are
``--tokens`` bytes, as ONE sequence: the last branch of every layer spans ``--last-segment`` tokens. Between chunks only
the bounded cache is kept, so memory is the same at the first million and at the last. The state is stored every
``--save-every`` seconds, in one step; a run that was killed goes on from there and ends with the same losses.

    PYTHONPATH=. python benchmarks/one_billion_tokens.py
    PYTHONPATH=. python benchmarks/one_billion_tokens.py --small            # a CPU, less than a minute
    PYTHONPATH=. python benchmarks/one_billion_tokens.py --plot benchmarks/results/one_billion_<...>.csv
"""

import argparse
import csv
import json
import math
import os
import resource
import sys
import sysconfig
import time
from datetime import UTC, datetime
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from modeling_longnet import DilationPattern, LongNetConfig, LongNetForCausalLM, TokenStream, sequence_tiles
from modeling_longnet.dilation_pattern import PRESETS


VOCABULARY = 256  # bytes
CHUNKS_PER_LOOK = 16  # how often the bar waits for the device


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=10**9)
    parser.add_argument("--chunk", type=int, default=2**17)
    parser.add_argument("--preset", choices=sorted(PRESETS), default="retrofit")
    parser.add_argument("--first-segment", type=int, default=512)
    parser.add_argument("--last-segment", type=int, default=2**30)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--train-steps", type=int, default=300)
    parser.add_argument("--train-tokens", type=int, default=2**17, help="tokens of a training step")
    parser.add_argument("--train-length", type=int, default=2**14, help="tokens of a training sequence")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save-every", type=float, default=60, metavar="SECONDS")
    parser.add_argument("--state", type=Path, default=Path("one_billion_state"), help="folder of the stored state")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument(
        "--stop-after", type=int, help="stop once so many tokens are scored, as if killed after saving"
    )
    parser.add_argument("--small", action="store_true", help="sizes for a CPU")
    parser.add_argument("--plot", type=Path, metavar="CSV", help="only draw a CSV's plot")
    args = parser.parse_args()
    if args.small:
        small = {
            "tokens": 2**15, "chunk": 2**11, "first_segment": 32, "last_segment": 2**15, "layers": 2, "hidden": 64,
            "heads": 2, "kv_heads": 1, "train_steps": 20, "train_tokens": 2**12, "train_length": 2**10,
        }  # fmt: skip
        for name, value in small.items():
            if getattr(args, name) == parser.get_default(name):
                setattr(args, name, value)
    least = {
        "tokens": 2, "chunk": 2, "first_segment": 1, "last_segment": 1, "layers": 1, "hidden": 1, "heads": 1,
        "kv_heads": 1, "train_steps": 1, "train_tokens": 1, "train_length": 2,
    }  # fmt: skip
    for name, lowest in least.items():
        if (value := getattr(args, name)) < lowest:
            parser.error(f"--{name.replace('_', '-')} must be at least {lowest}, got {value}")
    if args.hidden % args.heads or args.heads % args.kv_heads:
        parser.error(
            f"--hidden {args.hidden} must be a multiple of --heads {args.heads}, and that of --kv-heads {args.kv_heads}"
        )
    try:
        DilationPattern.geometric(args.first_segment, args.last_segment, preset=args.preset)
    except ValueError as error:
        parser.error(f"--first-segment, --last-segment: {error}")
    return args


def source_code(limit: int = 2**26) -> Tensor:
    """Read Python's standard library, file after file in order of their names, as bytes."""
    parts, size = [], 0
    for path in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py")):
        if "site-packages" not in path.parts and size < limit:
            parts.append(path.read_bytes())
            size += len(parts[-1])
    return torch.frombuffer(bytearray(b"\n".join(parts)), dtype=torch.uint8)


def build_model(args: argparse.Namespace, device: str) -> LongNetForCausalLM:
    """Build the model: no rotary embedding, since no training length would reach the positions that are scored."""
    torch.manual_seed(args.seed)
    pattern = DilationPattern.geometric(args.first_segment, args.last_segment, preset=args.preset)
    config = LongNetConfig(
        vocab_size=VOCABULARY, hidden_size=args.hidden, intermediate_size=args.hidden * 8 // 3 // 64 * 64 or 64,
        num_hidden_layers=args.layers, num_attention_heads=args.heads, num_key_value_heads=args.kv_heads,
        segment_lengths=pattern.segment_lengths, dilation_rates=pattern.dilation_rates,
        layers_without_rope=tuple(range(args.layers)), bos_token_id=None, eos_token_id=None, **PRESETS[args.preset],
    )  # fmt: skip
    return LongNetForCausalLM(config).to(device)


def train(model: LongNetForCausalLM, corpus: Tensor, args: argparse.Namespace) -> None:
    """Fit the model for a moment, on sequences of ``train_length`` from anywhere in the corpus."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / 20, 0.55 + 0.45 * math.cos(math.pi * step / args.train_steps))
    )
    rows = max(1, args.train_tokens // args.train_length)
    steps = tqdm(range(args.train_steps), desc="training", unit="step")
    model.train()
    for step in steps:
        starts = torch.randint(len(corpus) - args.train_length, (rows, 1), device=corpus.device)
        tokens = corpus[starts + torch.arange(args.train_length, device=corpus.device)].long()
        with torch.autocast(corpus.device.type, torch.bfloat16, enabled=corpus.is_cuda):
            loss = model(tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 20 == 0 or step + 1 == args.train_steps:
            steps.set_postfix_str(f"{loss.item():.3f} nats per byte")
    model.eval()


def store(path: Path, tensors: dict[str, Tensor], about: dict[str, str]) -> None:
    """Write a file in one step: a kill leaves the old one or the new one, never half of either."""
    beside = path.with_suffix(".writing")
    save_file({name: x.detach().contiguous().cpu() for name, x in tensors.items()}, beside, metadata=about)
    with beside.open("rb") as file:
        os.fsync(file.fileno())
    beside.replace(path)


def load(path: Path, about: dict[str, str]) -> dict[str, Tensor]:
    """Read a stored file, if it belongs to a run with the same settings."""
    with safe_open(path, "pt") as file:
        if file.metadata() != about:
            raise SystemExit(
                f"{path} belongs to a run with other settings, {file.metadata()}; remove it or use --state"
            )
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def peak_mib(device: str) -> float:
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10  # of the whole process


def main() -> None:
    args = arguments()
    if args.plot:
        plot(args.plot)
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sequence_tiles.TILE_TOKENS = args.chunk  # layers this narrow need no tiles, which would only be more launches
    corpus = source_code().to(device)
    names = ("tokens", "chunk", "preset", "first_segment", "last_segment", "layers", "hidden", "heads", "kv_heads",
             "train_steps", "train_tokens", "train_length", "seed")  # fmt: skip
    about = {"settings": json.dumps({name: getattr(args, name) for name in names} | {"corpus": len(corpus)})}
    args.state.mkdir(parents=True, exist_ok=True)
    model_file, state_file = args.state / "model.safetensors", args.state / "state.safetensors"

    model = build_model(args, device)
    began = time.monotonic()
    if model_file.exists():
        model.load_state_dict(load(model_file, about))
        model.eval()
    else:
        train(model, corpus, args)
        store(model_file, model.state_dict(), about)
    training_seconds = time.monotonic() - began
    if device == "cuda":
        model.bfloat16()

    num_chunks = -(-args.tokens // args.chunk)
    means = torch.zeros(num_chunks, device=device)  # loss of each chunk
    tokens, seconds, peak_before = TokenStream(model), 0.0, 0.0
    if state_file.exists():
        state = load(state_file, about)
        means, seconds = state.pop("means").to(device), float(state.pop("seconds"))
        peak_before = float(state.pop("peak_mib"))
        tokens.load_state_dict(state)
        print(f"goes on at token {tokens.position:,}")
    resumed_at = tokens.position

    def save() -> None:
        so_far = {
            "means": means, "seconds": torch.tensor(seconds_so_far(), dtype=torch.float64),
            "peak_mib": torch.tensor(max(peak_before, peak_mib(device))),
        }  # fmt: skip
        store(state_file, tokens.state_dict() | so_far, about)

    def seconds_so_far() -> float:
        return seconds + time.monotonic() - started

    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    early_peak = None  # of this process, after a hundredth of the tokens
    started = saved = time.monotonic()
    steps = torch.arange(args.chunk, device=device)
    with tqdm(total=args.tokens, initial=tokens.position, unit="token", unit_scale=True, smoothing=0.05) as bar:
        for number in range(-(-tokens.position // args.chunk), num_chunks):  # the last chunk may be a short one
            start = number * args.chunk
            text = corpus[(start + steps[: args.tokens - start]) % len(corpus)].long()[None]
            means[number] = tokens.score(text)[:, int(start == 0) :].mean()
            if (number + 1) % CHUNKS_PER_LOOK == 0 or number + 1 == num_chunks:
                bar.set_postfix_str(f"{means[number].item():.3f} nats per byte, {peak_mib(device):,.0f} MiB")
            bar.update(text.shape[1])
            if early_peak is None and tokens.position >= min(resumed_at + args.tokens // 100, args.tokens):
                early_peak = peak_mib(device)
            killed = args.stop_after is not None and tokens.position >= args.stop_after
            if killed or time.monotonic() - saved > args.save_every:
                save()
                saved = time.monotonic()
            if killed:
                print(f"stopped at token {tokens.position:,}")
                return
    seconds = seconds_so_far()
    early_peak = peak_mib(device) if early_peak is None else early_peak  # all was scored before

    cached = sum(x.numel() * x.element_size() for x in tokens.cache.state_dict().values())
    card = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    report = {
        "card": card,
        "torch": torch.__version__,
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "command": " ".join(["python", *sys.argv]),
        "parameters": sum(p.numel() for p in model.parameters()),
        "pattern": f"{args.preset}, {args.first_segment} to {args.last_segment:,}, "
        f"{len(model.config.segment_lengths)} branches",
        "tokens": args.tokens,
        "training_seconds": round(training_seconds, 1),
        "seconds": round(seconds, 1),
        "tokens_per_second": round(args.tokens / seconds),
        "peak_mib_after_one_percent": round(early_peak, 1),
        "peak_mib_at_the_end": round(max(peak_before, peak_mib(device)), 1),
        "cache_mib": round(cached / 2**20, 2),
        "keys_per_kv_head": tokens.cache.layers[0].keys.shape[2],
        "resumed": resumed_at > 0,
        "nats_per_byte": round(mean_loss(means, args), 4),
    }
    for name, value in report.items():
        print(f"{name}: {value:,}" if isinstance(value, int) and not isinstance(value, bool) else f"{name}: {value}")
    args.results.mkdir(parents=True, exist_ok=True)
    path = args.results / f"one_billion_tokens_{card.replace(' ', '-')}_{report['date']}.csv"
    with path.open("w", newline="") as file:
        for name, value in report.items():
            file.write(f"# {name}: {value}\n")
        writer = csv.writer(file)
        writer.writerow(("first_token", "last_token", "nats_per_byte"))
        for first, last in stretches(num_chunks):
            mean = mean_loss(means, args, first, last)
            writer.writerow((first * args.chunk, min(last * args.chunk, args.tokens) - 1, f"{mean:.5f}"))
    print(f"wrote {path}")
    plot(path)
    state_file.unlink(missing_ok=True)
    model_file.unlink(missing_ok=True)


def mean_loss(means: Tensor, args: argparse.Namespace, first: int = 0, last: int | None = None) -> float:
    """Average over the tokens scored in some chunks: the first chunk has one less, the last may be short."""
    counts = torch.full((len(means),), args.chunk, dtype=torch.float64, device=means.device)
    counts[-1] = args.tokens - (len(means) - 1) * args.chunk
    counts[0] -= 1
    counts = counts[first:last]
    return ((means[first:last].double() * counts).sum() / counts.sum()).item()


def stretches(num_chunks: int) -> list[tuple[int, int]]:
    """Divide chunks into stretches, the first ones singly, later ones by ever more: about 32 for each doubling."""
    edges = [0]
    while edges[-1] < num_chunks:
        edges.append(min(num_chunks, edges[-1] + max(1, edges[-1] // 32)))
    return list(zip(edges, edges[1:]))


def plot(path: Path) -> None:
    """Draw the loss over the position."""
    try:
        import matplotlib
    except ImportError:
        print(f"matplotlib is not installed; draw later with --plot {path}")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    with path.open() as file:
        lines = file.read().splitlines()
    about = dict(line[2:].split(": ", 1) for line in lines if line.startswith("# "))
    rows = list(csv.DictReader(line for line in lines if not line.startswith("#")))
    figure, panel = pyplot.subplots(figsize=(8, 4.5))
    panel.semilogx([int(row["last_token"]) + 1 for row in rows], [float(row["nats_per_byte"]) for row in rows])
    panel.set(xlabel="position (tokens)", ylabel="nats per byte")
    panel.grid(True, which="both", alpha=0.3)
    panel.set_title(
        f"{int(about['tokens']):,} tokens as one sequence, {about['card']}, {about['date']}: "
        f"{float(about['seconds']):,.0f} s, {float(about['tokens_per_second']) / 1e6:.2f} M tokens/s\n"
        f"{about['pattern']}; peak {float(about['peak_mib_at_the_end']):,.0f} MiB, cache {about['cache_mib']} MiB",
        fontsize=9,
    )
    figure.tight_layout()
    figure.savefig(path.with_suffix(".png"), dpi=120)
    print(f"wrote {path.with_suffix('.png')}")


if __name__ == "__main__":
    main()
