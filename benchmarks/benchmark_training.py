"""How fast is a full training step on one long sequence, and how long may the sequence be?

A step is forward, backward and optimizer on one sequence of random tokens in bfloat16. The peer is transformers' Llama
of the same shape with SDPA (its own choice of kernel, and cuDNN's by name; the faster one counts), with the same tricks
where they apply: activation checkpointing per layer, this package's loss without logits and, with ``--liger``, Liger's
kernels in the layers. Checks first that the tricks change no gradient on this device. Checkpoints stay on the device
as far as they fit; those of the first layers wait in pinned host memory, which is taken before the clock starts. Every
configuration has a time box and is left out, with a note, where it would pass ``--limit`` or the host's memory; one
that runs out of the device's says so and is tried once more with all checkpoints on the host.

Model FLOPs count 6 per weight of a matrix and token (4 where the weight is frozen), and three times the forward pass of
the attention with its useful pairs alone; recomputation does not count. MFU is against ``--peak-tflops``. The column
``states`` is the peak beyond weights, gradients and AdamW's states, in hidden states of the whole sequence
(``length * hidden_size`` numbers): one per layer whose checkpoint is on the device, and what the layer at work takes.

    PYTHONPATH=. python benchmarks/benchmark_training.py --liger            all stages, under five minutes on an H200
    PYTHONPATH=. python benchmarks/benchmark_training.py --stages check loss 32k
    PYTHONPATH=. python benchmarks/benchmark_training.py --small            the path, on a CPU
    PYTHONPATH=. python benchmarks/benchmark_training.py --plot benchmarks/results/training_<...>.csv
"""

import argparse
import contextlib
import csv
import gc
import statistics
import sys
import time
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama import modeling_llama

from modeling_longnet import DilationPattern, LongNetConfig, LongNetForCausalLM, apply_liger_kernel_to_longnet
from modeling_longnet.head_loss import head_loss, next_tokens
from training import offload_checkpoints
from training.checkpoint_offload import BLOCK_BYTES


SHAPES = {
    "1b": {
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128256, "tie_word_embeddings": True,
    },
    "8b": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256, "tie_word_embeddings": False,
    },
    "small": {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 512, "tie_word_embeddings": True,
    },
}  # fmt: skip
LAYER_AT_WORK = 10  # hidden states of the whole sequence, beside the checkpoints
COLUMNS = (
    "stage", "shape", "attention", "length", "trained", "offloaded_layers", "kernels", "step_s", "steps", "tokens_per_s",
    "model_tflops", "mfu", "peak_gib", "weights_gib", "states", "loss", "note",
)  # fmt: skip


@dataclass(frozen=True)
class Run:
    """One configuration: ``attention`` is a preset's name, "llama" or "llama cudnn"."""

    stage: str
    shape: str
    attention: str
    length: int
    lora: bool = False
    offloaded_layers: int | None = 0  # None: as few as the device's memory asks for
    liger: bool = False
    max_steps: int = 5
    warm_up_length: int | None = None  # None: the length itself
    seconds: float = 0.0  # all of it, roughly, on an H200


def all_runs(small: bool) -> list[Run]:
    if small:
        return [Run("short", "small", attention, 512, max_steps=2) for attention in ("llama", "paper", "retrofit")] + [
            Run("longest", "small", "paper", 4096, max_steps=1, warm_up_length=512),
            Run("lora", "small", "retrofit", 2048, lora=True, max_steps=1, offloaded_layers=1, warm_up_length=512),
        ]
    return [
        *(Run("32k", "1b", attention, 2**15, seconds=10) for attention in ("llama", "llama cudnn", "retrofit", "paper")),
        *(Run("131k", "1b", attention, 2**17, max_steps=2, seconds=15) for attention in ("retrofit", "paper")),
        Run("131k", "1b", "llama", 2**17, max_steps=1, warm_up_length=2**13, seconds=20),
        Run("1m", "1b", "paper", 2**20, max_steps=1, warm_up_length=2**15, offloaded_layers=None, seconds=30),
        Run("8b", "8b", "retrofit", 400_000, True, None, max_steps=1, warm_up_length=2**14, seconds=75),
        Run("1m-retrofit", "1b", "retrofit", 2**20, max_steps=1, warm_up_length=2**15, offloaded_layers=None, seconds=40),
    ]  # fmt: skip


def pattern_for(length: int, preset: str, first_segment: int) -> DilationPattern:
    """Return branches doubling from the first segment up to the length or beyond."""
    last = first_segment
    while last < length:
        last *= 2
    return DilationPattern.geometric(first_segment, last, preset=preset)


def build(run: Run, device: torch.device, first_segment: int) -> nn.Module:
    """Build the model with random bfloat16 weights, activation checkpointing and, if asked for, LoRA."""
    fields = dict(SHAPES[run.shape], max_position_embeddings=run.length, use_cache=False)
    torch.manual_seed(0)
    with device, default_dtype(torch.bfloat16):
        if run.attention.startswith("llama"):
            model = LlamaForCausalLM(LlamaConfig(**fields, attn_implementation="sdpa"))
        else:
            pattern = pattern_for(run.length, run.attention, first_segment)
            rules = ("head_offsets", "count_overlaps", "dilate_queries", "window", "segment_lengths", "dilation_rates")
            fields |= {name: getattr(pattern, name) for name in rules}
            model = LongNetForCausalLM(LongNetConfig(**fields))
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable()
    else:
        model.gradient_checkpointing_enable()
    if run.liger:
        apply_liger(model)
    if run.lora:
        config = LoraConfig(task_type="CAUSAL_LM", r=16)
        model = get_peft_model(model, config, autocast_adapter_dtype=False)  # bfloat16, as all the rest
    return model.train()


def apply_liger(model: nn.Module) -> None:
    """Put Liger's norms, rotary embedding and MLPs into a model; the loss is the same for all already."""
    if isinstance(model, LongNetForCausalLM):
        apply_liger_kernel_to_longnet(model)
    else:
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        classes = modeling_llama.LlamaRMSNorm, modeling_llama.LlamaMLP
        apply_liger_kernel_to_llama(model=model, fused_linear_cross_entropy=False)
        # Liger replaces them for all models to come, too; the next one is built from plain layers again.
        modeling_llama.LlamaRMSNorm, modeling_llama.LlamaMLP = classes


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def loss_of(model: nn.Module, tokens: Tensor) -> Tensor:
    """The next-token loss without logits, for LongNet and for Llama alike."""
    if isinstance(model, LlamaForCausalLM) and not isinstance(model, LongNetForCausalLM):
        hidden = model.model(input_ids=tokens, use_cache=False).last_hidden_state
        return head_loss(hidden, model.lm_head, next_tokens(tokens))
    return model(input_ids=tokens, labels=tokens, use_cache=False).loss


def model_flops(run: Run, model: nn.Module, first_segment: int) -> float:
    """Count the FLOPs that a step must do."""
    weights = {"trained": 0, "frozen": 0}
    for name, p in model.named_parameters():
        is_lookup = "embed_tokens" in name and not SHAPES[run.shape]["tie_word_embeddings"]
        if p.ndim == 2 and not is_lookup:
            weights["trained" if p.requires_grad else "frozen"] += p.numel()
    shape = SHAPES[run.shape]
    pattern = (
        DilationPattern((run.length,), (1,))
        if run.attention.startswith("llama")
        else pattern_for(run.length, run.attention, first_segment)
    )
    attention = shape["num_hidden_layers"] * pattern.attention_flops(
        run.length, shape["num_attention_heads"], shape["head_dim"], num_kv_heads=shape["num_key_value_heads"]
    )
    return run.length * (6 * weights["trained"] + 4 * weights["frozen"]) + 3 * attention


def layers_to_offload(run: Run, device: torch.device, weights: int) -> int:
    """Return how many layers' checkpoints do not fit on the device, with a tenth of it to spare."""
    if device.type != "cuda":
        return 0
    layers = SHAPES[run.shape]["num_hidden_layers"]
    fixed = weights * (1 if run.lora else 4)  # gradients and AdamW's two states are as large as the weights
    room = 0.9 * torch.cuda.get_device_properties(device).total_memory - fixed - LAYER_AT_WORK * state_bytes(run)
    return min(layers, max(0, layers - int(room / state_bytes(run))))


def state_bytes(run: Run) -> int:
    """Return the size of a hidden state of the whole sequence, in bfloat16."""
    return run.length * SHAPES[run.shape]["hidden_size"] * 2


def pin_host_memory(run: Run) -> None:
    """Take the host memory that the checkpoints need, and let PyTorch keep it for them: pinning is slow."""
    blocks = run.offloaded_layers * -(-state_bytes(run) // BLOCK_BYTES)
    lines = Path("/proc/meminfo").read_text().splitlines()
    available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    if blocks * BLOCK_BYTES > 0.8 * available:
        raise LeftOut(f"checkpoints need {blocks * BLOCK_BYTES / 2**30:.0f} GiB of the host's {available / 2**30:.0f}")
    held = [torch.empty(BLOCK_BYTES, dtype=torch.uint8, pin_memory=True) for _ in range(blocks)]
    del held  # to PyTorch's cache


class LeftOut(Exception):
    """Why a configuration is not run."""


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def measure(
    run: Run, device: torch.device, box_s: float, first_segment: int, peak_tflops: float, left_s: float
) -> dict:
    """Run warm-up and timed steps of one configuration, if it ends in the seconds left; return its row."""
    row = {
        "stage": run.stage, "shape": run.shape, "attention": run.attention, "length": run.length,
        "trained": "lora" if run.lora else "all", "offloaded_layers": run.offloaded_layers,
        "kernels": "liger" if run.liger else "torch",
    }  # fmt: skip
    try:
        if run.seconds > left_s:
            raise LeftOut(f"takes some {run.seconds:.0f} s, and {left_s:.0f} are left of --limit")
        row |= timed_steps(run, device, box_s, first_segment, peak_tflops)
    except torch.OutOfMemoryError:
        row["note"] = "out of memory"
    except LeftOut as reason:
        row["note"] = f"left out: {reason}"
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return row


def timed_steps(run: Run, device: torch.device, box_s: float, first_segment: int, peak_tflops: float) -> dict:
    model = build(run, device, first_segment)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    if run.offloaded_layers is None:
        run = replace(run, offloaded_layers=layers_to_offload(run, device, weights))
    if run.offloaded_layers:
        offload_checkpoints(model, run.offloaded_layers)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=device.type == "cuda")
    time_step(run, model, optimizer, run.warm_up_length or run.length, device)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        pin_host_memory(run)
        torch.cuda.reset_peak_memory_stats()
    deadline, times = time.perf_counter() + box_s, []
    while len(times) < run.max_steps and (not times or time.perf_counter() + times[-1] < deadline):
        seconds, loss = time_step(run, model, optimizer, run.length, device)
        times.append(seconds)
    seconds = statistics.median(times)
    tflops = model_flops(run, model, first_segment) / seconds / 1e12
    peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else float("nan")
    fixed = weights + 3 * sum(p.numel() * p.element_size() for p in trained)
    states = (peak * 2**30 - fixed) / state_bytes(run)
    return {
        "offloaded_layers": run.offloaded_layers,
        "step_s": f"{seconds:.4g}", "steps": len(times), "tokens_per_s": f"{run.length / seconds:.5g}",
        "model_tflops": f"{tflops:.4g}", "mfu": f"{tflops / peak_tflops:.4f}", "peak_gib": f"{peak:.4g}",
        "weights_gib": f"{weights / 2**30:.4g}", "states": f"{states:.1f}", "loss": f"{loss:.4f}", "note": "",
    }  # fmt: skip


def time_step(
    run: Run, model: nn.Module, optimizer: torch.optim.Optimizer, length: int, device: torch.device
) -> tuple[float, float]:
    """Take one step on random tokens; return its seconds and its loss."""
    tokens = torch.randint(SHAPES[run.shape]["vocab_size"], (1, length), device=device)
    kernel = sdpa_kernel(SDPBackend.CUDNN_ATTENTION) if run.attention == "llama cudnn" else contextlib.nullcontext()
    synchronize(device)
    start = time.perf_counter()
    with kernel:
        loss = loss_of(model, tokens)
        loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    synchronize(device)
    return time.perf_counter() - start, loss.item()


def check(device: torch.device, first_segment: int, length: int) -> None:
    """Stop unless checkpoints, tiles, offloading and the chunked loss leave loss and gradients as they are."""
    tokens = torch.randint(512, (1, length), device=device, generator=torch.Generator(device).manual_seed(0))
    for attention in ("retrofit", "paper"):
        found = {}
        for name, offloaded in (("plain", 0), ("tricks", 2)):
            model = build(Run("", "small", attention, length), device, first_segment)
            if offloaded:
                offload_checkpoints(model, offloaded)
            else:
                model.config.loss_implementation = "logits"
                for module in model.modules():
                    if hasattr(module, "gradient_checkpointing"):
                        module.gradient_checkpointing = False
            loss = loss_of(model, tokens)
            loss.backward()
            found[name] = [loss.detach(), *(p.grad for p in model.parameters())]
        for ours, plain in zip(found["tricks"], found["plain"]):
            error = ((ours.double() - plain.double()).norm() / plain.double().norm()).item()
            if not error < 2e-2:
                raise SystemExit(f"{attention}: a gradient {list(ours.shape)} is off by {error:.1e}; not timing that")
        print(f"checked: {attention} with all tricks equals the plain step at {length} tokens", flush=True)


def compare_losses(device: torch.device, length: int, shape: str) -> None:
    """Time the implementations of the loss alone, forward and backward."""
    hidden_size, vocabulary = SHAPES[shape]["hidden_size"], SHAPES[shape]["vocab_size"]
    head = nn.Linear(hidden_size, vocabulary, bias=False, device=device, dtype=torch.bfloat16)
    hidden = torch.randn(1, length, hidden_size, device=device, dtype=torch.bfloat16, requires_grad=True)
    targets = next_tokens(torch.randint(vocabulary, (1, length), device=device))
    for implementation in ("chunked", "torch", "liger"):

        def step(implementation=implementation):
            head_loss(hidden, head, targets, implementation=implementation).backward()
            hidden.grad = head.weight.grad = None

        try:
            step()
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            synchronize(device)
            start, before = time.perf_counter(), torch.cuda.memory_allocated() if device.type == "cuda" else 0
            for _ in range(3):
                step()
            synchronize(device)
        except (ValueError, RuntimeError) as error:
            print(f"loss {implementation}: {str(error).splitlines()[0]}", flush=True)
            continue
        ms = (time.perf_counter() - start) / 3 * 1e3
        extra = (torch.cuda.max_memory_allocated() - before) / 2**30 if device.type == "cuda" else float("nan")
        rate = 6 * length * hidden_size * vocabulary / ms / 1e9
        print(
            f"loss {implementation}: {ms:.1f} ms for {length} tokens of {hidden_size} and a vocabulary of "
            f"{vocabulary}, {rate:.0f} TFLOP/s, {extra:.2f} GiB beyond its inputs",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", nargs="+", help="check, loss and those of the table (default: all)")
    parser.add_argument("--small", action="store_true", help="tiny shapes: tests the path on any machine")
    parser.add_argument(
        "--liger", action="store_true", help="norms, rotary embedding and MLPs by Liger, in all models"
    )
    parser.add_argument(
        "--box", type=float, default=12.0, help="seconds of timed steps per configuration: %(default)s"
    )
    parser.add_argument(
        "--limit", type=float, default=290.0, help="start nothing that would end later, in seconds: %(default)s"
    )
    parser.add_argument(
        "--peak-tflops", type=float, default=989.0, help="of the device, dense bf16: %(default)s (H100)"
    )
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--plot", type=Path, help="only draw the plot of this CSV")
    arguments, started = parser.parse_args(), time.perf_counter()
    if arguments.plot:
        return plot(arguments.plot)
    device = torch.device("cuda" if torch.cuda.is_available() and not arguments.small else "cpu")
    first_segment = 64 if arguments.small else 2048
    runs = [replace(run, liger=arguments.liger) for run in all_runs(arguments.small)]
    stages = arguments.stages or ["check", "loss", *dict.fromkeys(run.stage for run in runs)]
    if unknown := set(stages) - {"check", "loss"} - {run.stage for run in runs}:
        parser.error(f"no stage {', '.join(sorted(unknown))}; there are check, loss, "
                     f"{', '.join(dict.fromkeys(run.stage for run in runs))}")  # fmt: skip

    if "check" in stages:
        check(device, first_segment, length=600 if arguments.small else 20_000)
    if "loss" in stages:
        shape, length = ("small", 4096) if arguments.small else ("1b", 2**15)
        compare_losses(device, length, shape)
    card = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    stamp = datetime.now(UTC).strftime("%Y-%m-%d_%H%M")
    arguments.output.mkdir(parents=True, exist_ok=True)
    path = arguments.output / f"training_{card.replace(' ', '-')}_{stamp}.csv"
    rows = []
    with path.open("w", newline="") as file:
        file.write(f"# {card}, torch {torch.__version__}, transformers {transformers.__version__}, bf16 weights and "
                   "AdamW states, one sequence per step\n")  # fmt: skip
        file.write(f"# python {' '.join(sys.argv)}\n")
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        for run in runs:
            if run.stage not in stages:
                continue
            all_layers = SHAPES[run.shape]["num_hidden_layers"]
            for attempt in (run, replace(run, offloaded_layers=all_layers)):
                left = arguments.limit - (time.perf_counter() - started)
                row = measure(attempt, device, arguments.box, first_segment, arguments.peak_tflops, left)
                rows.append(row)
                writer.writerow(row)
                file.flush()
                print(*(f"{name}={row[name]}" for name in COLUMNS if row.get(name) not in (None, "")), flush=True)
                if row["note"] != "out of memory" or row["offloaded_layers"] == all_layers:
                    break
                if run.attention.startswith("llama"):
                    break
    report(rows)
    print(f"wrote {path}")
    plot(path)


def report(rows: list[dict]) -> None:
    """Print how many times the tokens per second of the faster Llama each pattern reaches."""
    for length in dict.fromkeys(row["length"] for row in rows):
        here = {row["attention"]: row for row in rows if row["length"] == length and row.get("tokens_per_s")}
        dense = [float(row["tokens_per_s"]) for name, row in here.items() if name.startswith("llama")]
        for name, row in here.items():
            if dense and not name.startswith("llama"):
                print(f"{length:>9,} tokens: {name} {float(row['tokens_per_s']) / max(dense):.2f} x dense Llama")


def plot(path: Path) -> None:
    """Draw tokens per second and peak memory over length."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print(f"matplotlib is not installed; draw later with --plot {path}")
        return
    with path.open() as file:
        title = next(file).removeprefix("# ").strip()
        next(file)
        rows = [row for row in csv.DictReader(file) if row["tokens_per_s"]]
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    speed, memory = figure.subplots(1, 2)
    for shape, trained, name in dict.fromkeys((row["shape"], row["trained"], row["attention"]) for row in rows):
        line = [row for row in rows if (row["shape"], row["trained"], row["attention"]) == (shape, trained, name)]
        lengths = [int(row["length"]) for row in line]
        label = f"{name}, {shape}" + (" LoRA" if trained == "lora" else "")
        speed.plot(lengths, [float(row["tokens_per_s"]) for row in line], marker="o", label=label)
        if line[0]["peak_gib"] != "nan":  # a CPU
            memory.plot(lengths, [float(row["peak_gib"]) for row in line], marker="o", label=label)
    for axes, name in ((speed, "tokens per second"), (memory, "peak memory, GiB")):
        axes.set(xscale="log", xlabel="tokens in the sequence", ylabel=name)
        axes.grid(True, which="both", alpha=0.3)
    if rows:
        speed.legend()
    figure.suptitle(title, fontsize=8)
    figure.savefig(path.with_suffix(".png"), dpi=120)
    print(f"wrote {path.with_suffix('.png')}")


if __name__ == "__main__":
    main()
