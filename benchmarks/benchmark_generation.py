"""How fast does a LongNet read a prompt and generate from it, and how many bytes does its cache take?

The same shape and the same random weights twice: transformers' Llama with SDPA and a DynamicCache, and a LongNet with
the ``retrofit`` preset. First checks that generation through the cache is the full forward, and stops if it is not.
Then measures, by prompt length: tokens read per second, milliseconds per generated token at that context (the cache
filled with random keys), KV bytes, and tokens per second at a batch as large as fits. LongNet's fused step over a cache
of fixed size is timed two ways: launched step by step as Llama is, and replayed as a CUDA graph, as ``generate`` does;
with ``--compile`` also the ordinary step as a graph of compiled kernels. Dense prompts beyond ``--dense-prefill-limit``
are extrapolated by a quadratic and say so. With ``--liger`` norms, rotary embedding and MLPs are Liger's kernels in both
models, wherever the ordinary layers run; what ran on them says so.

    PYTHONPATH=. python benchmarks/benchmark_generation.py --compile
    PYTHONPATH=. python benchmarks/benchmark_generation.py --liger
    PYTHONPATH=. python benchmarks/benchmark_generation.py --small          # a CPU, less than a minute
    PYTHONPATH=. python benchmarks/benchmark_generation.py --plot benchmarks/results/generation_<...>.csv
"""

import argparse
import csv
import gc
import statistics
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import torch
import transformers
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from modeling_longnet import DecodingGraph, DilationPattern, LongNetCache, LongNetConfig, LongNetForCausalLM
from modeling_longnet.cache_layer import LongNetCacheLayer
from modeling_longnet.dilation_pattern import PRESETS


COLUMNS = ("model", "measure", "how", "context", "batch", "value", "extrapolated")
# PyTorch prefers cuDNN, which need not be the fastest for single tokens; so its other kernels are timed beside it.
FALLBACKS = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
DENSE_KERNELS = {
    "eager": [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, *FALLBACKS],
    "eager, without cuDNN": [SDPBackend.FLASH_ATTENTION, *FALLBACKS],
}
FILL = 2**18  # random keys per step of filling a cache


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", type=int, nargs="+", default=[2**i for i in (12, 15, 17, 18, 20)])
    parser.add_argument("--far-contexts", type=int, nargs="*", default=[2**22, 2**24], help="decoded by LongNet alone")
    parser.add_argument("--first-segment", type=int, default=2048)
    parser.add_argument("--last-segment", type=int, default=2**20)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--intermediate", type=int, default=8192)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--vocabulary", type=int, default=128256)
    parser.add_argument("--prefill-chunk", type=int, nargs="+", default=[2**15, 2**16], help="one or more lengths")
    parser.add_argument("--dense-prefill-limit", type=int, default=2**17)
    parser.add_argument("--batch-context", type=int, default=2**17, help="context of the largest batches; 0: none")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument(
        "--liger", action="store_true", help="norms, rotary embedding and MLPs by Liger, in both models"
    )
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--small", action="store_true", help="sizes for a CPU")
    parser.add_argument("--plot", type=Path, metavar="CSV", help="only draw a CSV's plot")
    args = parser.parse_args()
    if args.small:
        args.contexts, args.far_contexts = [256, 1024], [4096]
        args.first_segment, args.last_segment, args.layers = 64, 1024, 2
        args.hidden, args.intermediate, args.heads, args.kv_heads, args.vocabulary = 64, 128, 4, 2, 256
        args.prefill_chunk, args.dense_prefill_limit, args.batch_context, args.steps = [256, 512], 512, 0, 3
    if problem := find_problem(args):
        parser.error(problem)
    return args


def find_problem(args: argparse.Namespace) -> str | None:
    """Say what is wrong with the options, None if nothing is."""
    if args.plot:
        if not find_spec("matplotlib"):
            return "--plot needs the package; pip install matplotlib"
        return None if args.plot.is_file() else f"--plot {args.plot}: there is no such file"
    least = {
        "contexts": 1, "far_contexts": 1, "first_segment": 1, "last_segment": 1, "layers": 1, "hidden": 1,
        "intermediate": 1, "heads": 1, "kv_heads": 1, "vocabulary": 4, "prefill_chunk": 1, "dense_prefill_limit": 0,
        "batch_context": 0, "steps": 1,
    }  # fmt: skip
    for name, lowest in least.items():
        values = getattr(args, name)
        for value in values if isinstance(values, list) else [values]:
            if value < lowest:
                return f"--{name.replace('_', '-')} must be at least {lowest}, got {value}"
    if args.hidden % (2 * args.heads) or args.heads % args.kv_heads:
        return (
            f"--hidden {args.hidden} must be an even multiple of --heads {args.heads}, and that a multiple of "
            f"--kv-heads {args.kv_heads}"
        )
    try:
        DilationPattern.geometric(args.first_segment, args.last_segment, preset="retrofit")
    except ValueError as error:
        return f"--first-segment, --last-segment: {error}"
    if args.liger and not (find_spec("liger_kernel") and find_spec("peft")):
        return "--liger needs the packages; pip install liger-kernel peft"
    if args.results.exists() and not args.results.is_dir():
        return f"--results {args.results} is no folder"
    return None


class Bench:
    """The two models, and the file that takes the numbers: ``partial`` until ``finish`` names it ``path``."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.dtype = torch.bfloat16 if self.device == "cuda" else torch.float32
        shape = {
            "vocab_size": args.vocabulary, "hidden_size": args.hidden, "intermediate_size": args.intermediate,
            "num_hidden_layers": args.layers, "num_attention_heads": args.heads, "tie_word_embeddings": True,
            "num_key_value_heads": args.kv_heads, "head_dim": args.hidden // args.heads,
            "max_position_embeddings": args.last_segment, "bos_token_id": None, "eos_token_id": None,
        }  # fmt: skip
        pattern = DilationPattern.geometric(args.first_segment, args.last_segment, preset="retrofit")
        ours = LongNetConfig(
            **shape, segment_lengths=pattern.segment_lengths, dilation_rates=pattern.dilation_rates,
            **PRESETS["retrofit"],
        )  # fmt: skip
        self.pattern = pattern
        self.head_dim = shape["head_dim"]
        torch.manual_seed(0)
        torch.set_default_dtype(self.dtype)
        with torch.device(self.device):
            self.llama = LlamaForCausalLM(LlamaConfig(**shape)).eval()
        with torch.device("meta"):
            self.longnet = LongNetForCausalLM(ours).eval()
        self.longnet.load_state_dict(self.llama.state_dict(), assign=True)  # the same weights, not a copy
        self.longnet.tie_weights()
        with torch.device(self.device):
            self.longnet.model.rotary_emb = type(self.longnet.model.rotary_emb)(ours)
        torch.set_default_dtype(torch.float32)
        if args.liger:
            from benchmark_training import apply_liger  # which needs PEFT

            apply_liger(self.llama)
            apply_liger(self.longnet)
        self.weight_bytes = sum(p.numel() * p.element_size() for p in self.llama.parameters())
        self.card = torch.cuda.get_device_name() if self.device == "cuda" else "CPU"
        args.results.mkdir(parents=True, exist_ok=True)
        name = "generation-liger" if args.liger else "generation"
        self.path = args.results / f"{name}_{self.card.replace(' ', '-')}_{datetime.now(UTC):%Y-%m-%d}.csv"
        versions = f"torch {torch.__version__}, transformers {transformers.__version__}, {self.dtype}"
        if args.liger:
            versions += f", liger-kernel {version('liger-kernel')} in both models"
        self.partial = self.path.with_suffix(".csv.partial")
        self.partial.write_text(
            f"# {self.card}, {versions}\n# python {' '.join(sys.argv)}\n# weights {self.weight_bytes} bytes, {pattern}\n"
            f"{','.join(COLUMNS)}\n"
        )

    def record(self, model: str, measure: str, how: str, context: int, batch: int, value: float, guess: bool = False):
        row = dict(zip(COLUMNS, (model, measure, how, context, batch, f"{value:.6g}", int(guess))))
        with self.partial.open("a", newline="") as file:
            csv.DictWriter(file, COLUMNS).writerow(row)
        print(*row.values(), sep="\t", flush=True)

    def finish(self) -> None:
        """Put the numbers where earlier ones of the day may be."""
        self.partial.replace(self.path)

    def ordinary(self, how: str) -> str:
        """Name a way in which the ordinary layers run."""
        return f"{how}, Liger" if self.args.liger else how

    def wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def free(self) -> None:
        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()

    def tokens(self, batch: int, length: int) -> Tensor:
        return torch.randint(3, self.args.vocabulary, (batch, length), device=self.device)

    def random_keys(self, batch: int, length: int) -> Tensor:
        shape = (batch, self.args.kv_heads, length, self.head_dim)
        return torch.randn(shape, device=self.device, dtype=self.dtype)

    def fill_longnet(self, cache: LongNetCache, batch: int, context: int) -> None:
        """Let the cache hold what it would after ``context`` tokens, with random keys and values."""
        cache.reset()
        model = LongNetCacheLayer(self.pattern, cache.layers[0].max_length)  # where tokens stand is alike everywhere
        for first in range(0, context, FILL):
            positions = torch.arange(first, min(first + FILL, context), device=self.device)[None]
            keys = torch.zeros(1, self.args.kv_heads, positions.shape[1], 1, device=self.device, dtype=self.dtype)
            model.update(keys, keys, positions=positions)
        for layer in cache.layers:
            if not layer.is_initialized:
                layer.lazy_initialization(*[self.random_keys(batch, 1)] * 2)
            for x in (layer.keys, layer.values):
                x.normal_()
            layer.key_positions.copy_(model.key_positions.expand_as(layer.key_positions))
            layer.key_branches.copy_(model.key_branches.expand_as(layer.key_branches))
            layer.seen.fill_(context)
            layer.columns.fill_(context)
            layer.is_empty = False

    def fill_dense(self, batch: int, context: int) -> DynamicCache:
        cache = DynamicCache(config=self.llama.config)
        for i in range(self.args.layers):
            cache.update(self.random_keys(batch, context), self.random_keys(batch, context), i)
        return cache


def check(bench: Bench) -> None:
    """Stop unless prefill by chunks and decoding are as near to the full forward in float32 as one in bfloat16 is.

    A bfloat16 forward of random weights is off by 3 % itself, more or less so with the layers that serve. What the cache
    adds to that counts alone: a tenth more is an error of its own of less than half of it.
    """
    length = 2 * bench.args.first_segment + 100
    tokens = bench.tokens(1, length)
    model = bench.longnet
    with torch.device(bench.device):
        reference = LongNetForCausalLM(model.config).float().eval()
    reference.load_state_dict(model.state_dict())
    exact = reference(tokens, use_cache=False, logits_to_keep=4).logits[0]
    del reference
    bench.free()

    def error(logits: Tensor) -> float:
        return ((logits.float() - exact).norm() / exact.norm()).item()

    full = error(model(tokens, use_cache=False, logits_to_keep=4).logits[0])
    is_narrow = bench.dtype == torch.bfloat16
    if not full < (5e-2 if is_narrow else 1e-4):
        raise SystemExit(f"a full forward is off by {full:.2e} from one in float32; not timing it")
    most = 1.1 * full if is_narrow else 1e-4
    for max_length in (None, bench.args.last_segment):
        cache = LongNetCache(model.config, max_length=max_length)
        parts = [bench.args.first_segment, length - bench.args.first_segment - 3, 1, 1, 1]
        logits = [model(part, past_key_values=cache, logits_to_keep=1).logits for part in tokens.split(parts, dim=1)]
        cached = error(torch.cat(logits[1:], dim=1)[0])
        print(
            f"checked against float32: logits through the cache (max_length={max_length}) are off by {cached:.2e}, "
            f"those of a full forward by {full:.2e}",
            flush=True,
        )
        if not cached < most:
            raise SystemExit("generation through the cache is wrong; not timing it")


def prefill(bench: Bench) -> None:
    args = bench.args
    dense: list[tuple[int, float]] = []
    one_pass = bench.ordinary("one pass")
    for context in args.contexts:
        tokens = bench.tokens(1, context)

        def ours(chunk: int, tokens=tokens, context=context):
            cache = LongNetCache(bench.longnet.config, max_length=max(args.last_segment, context))
            for part in tokens.split(chunk, dim=1):
                bench.longnet(part, past_key_values=cache, logits_to_keep=1)

        def theirs(tokens=tokens):
            bench.llama(tokens, past_key_values=DynamicCache(config=bench.llama.config), logits_to_keep=1)

        repeats = 3 if context <= 2**16 else 1
        for i, chunk in enumerate(args.prefill_chunk):
            if i and context <= args.prefill_chunk[i - 1] <= chunk:
                continue  # one pass again
            seconds = median_seconds(bench, partial(ours, chunk), repeats, warm=context <= 2**17)
            how = bench.ordinary(f"chunks of {chunk}")
            bench.record("longnet", "prefill tokens/s", how, context, 1, context / seconds)
        if context <= args.dense_prefill_limit:
            seconds = median_seconds(bench, theirs, repeats, warm=context <= 2**15)
            dense.append((context, seconds))
            bench.record("llama", "prefill tokens/s", one_pass, context, 1, context / seconds)
        elif len(dense) >= 2:  # seconds = a N + b N^2 through the two longest
            (n, s), (m, t) = dense[-2:]
            b = (t / m - s / n) / (m - n)
            seconds = context * (s / n - b * n) + b * context**2
            bench.record("llama", "prefill tokens/s", one_pass, context, 1, context / seconds, guess=True)
        bench.free()


def median_seconds(bench: Bench, call: Callable[[], object], repeats: int, warm: bool = True) -> float:
    if warm:
        call()
    times = []
    for _ in range(repeats):
        bench.wait()
        began = time.perf_counter()
        call()
        bench.wait()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def decode(bench: Bench, contexts: list[int], batch: int, dense: bool, ways: dict[str, bool]) -> None:
    """Time one generated token at each context; ``dense``: by Llama, else by LongNet in these ways."""
    args, measure = bench.args, "decode ms/token" if batch == 1 else "decode tokens/s"
    value = (lambda s: 1e3 * s) if batch == 1 else (lambda s: batch / s)
    token = bench.tokens(batch, 1)
    bench.free()
    if dense:
        for context in contexts:
            cache = bench.fill_dense(batch, context)
            kv_bytes = sum(x.numel() * x.element_size() for layer in cache.layers for x in (layer.keys, layer.values))
            for how, kernels in DENSE_KERNELS.items() if batch == 1 else [*DENSE_KERNELS.items()][:1]:
                with sdpa_kernel(kernels):
                    seconds = median_seconds(
                        bench, lambda cache=cache: bench.llama(token, past_key_values=cache), min(args.steps, 10)
                    )
                bench.record("llama", measure, bench.ordinary(how), context, batch, value(seconds))
            bench.record("llama", "KV bytes", "", context, batch, kv_bytes)
            del cache
            bench.free()
        return

    longest = args.last_segment if batch == 1 else max(contexts) + 100
    cache = LongNetCache(bench.longnet.config, max_length=min(args.last_segment, longest))
    bench.fill_longnet(cache, batch, args.first_segment)  # allocated once, at addresses that stay
    steps = {"step by step": lambda: bench.longnet(token, past_key_values=cache)}
    if bench.device == "cuda":
        graph = DecodingGraph(bench.longnet, cache)
        steps["CUDA graph"] = lambda: graph(token)
        if ways["compile"]:
            torch._inductor.config.triton.cudagraphs = False  # the capture below is the graph
            compiled = torch.compile(bench.longnet, fullgraph=True)
            call = lambda: compiled(token, past_key_values=cache)  # noqa: E731
            began = time.perf_counter()
            call()
            print(f"compiled in {time.perf_counter() - began:.0f} s", flush=True)
            steps[bench.ordinary("compiled, CUDA graph")] = captured(call).replay
    for context in contexts:
        bench.fill_longnet(cache, batch, context)
        for how, step in steps.items():
            step()
            step()
            seconds = median_seconds(bench, step, args.steps)
            bench.record("longnet", measure, how, context, batch, value(seconds))
        kv_bytes = sum(x.numel() * x.element_size() for layer in cache.layers for x in (layer.keys, layer.values))
        bench.record("longnet", "KV bytes", "", context, batch, kv_bytes)


def captured(step: Callable[[], object]) -> "torch.cuda.CUDAGraph":
    """Capture a step as a CUDA graph, after a warm-up on a stream of its own."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph


def largest_batch(bench: Bench, bytes_per_row: int) -> int:
    """Count the rows whose caches fit beside the weights, with a margin for what a step needs; a multiple of 4."""
    free = torch.cuda.mem_get_info()[0]
    return max(4, int(free * 0.85) // bytes_per_row // 4 * 4)


@torch.no_grad()
def main() -> None:
    args = arguments()
    if args.plot:
        plot(args.plot)
        return
    bench = Bench(args)
    check(bench)
    prefill(bench)
    decode(bench, args.contexts, 1, True, {})
    decode(bench, args.contexts + args.far_contexts, 1, False, {"compile": args.compile})
    if bench.device == "cuda" and args.batch_context:
        token_bytes = 2 * 2 * args.layers * args.kv_heads * bench.head_dim
        dense_batch = largest_batch(bench, token_bytes * (args.batch_context + 2 * args.batch_context // args.layers))
        decode(bench, [args.batch_context], dense_batch, True, {})
        entries = bench.pattern.cache_entries(args.batch_context + 100)
        per_row = (token_bytes + 16 * args.layers * args.kv_heads) * entries
        decode(bench, [args.batch_context], largest_batch(bench, per_row * 11 // 10), False, {"compile": False})

    bench.finish()
    print(f"wrote {bench.path}")
    plot(bench.path)


def plot(path: Path) -> None:
    """Draw prefill rate, decoding time and KV bytes over the context."""
    try:
        import matplotlib
    except ImportError:
        print(f"matplotlib is not installed; draw later with --plot {path}")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    with path.open() as file:
        title = next(file).removeprefix("# ").strip()
        rows = list(csv.DictReader(line for line in file if not line.startswith("#")))
    figure, panels = pyplot.subplots(1, 3, figsize=(16, 4.5))
    for panel, measure in zip(panels, ("prefill tokens/s", "decode ms/token", "KV bytes")):
        of_measure = [row for row in rows if row["measure"] == measure and row["batch"] == "1"]
        for model, how in dict.fromkeys((row["model"], row["how"]) for row in of_measure):
            line = [row for row in of_measure if (row["model"], row["how"]) == (model, how)]
            contexts, values = [int(row["context"]) for row in line], [float(row["value"]) for row in line]
            (drawn,) = panel.loglog(contexts, values, marker="o", base=2, label=f"{model} {how}")
            guessed = [i for i, row in enumerate(line) if row["extrapolated"] == "1"]
            panel.plot(
                [contexts[i] for i in guessed], [values[i] for i in guessed], "o", markersize=9,
                markerfacecolor="white", color=drawn.get_color(),
            )  # fmt: skip
        panel.set(title=f"{measure}, batch 1", xlabel="context (tokens)")
        panel.set_yscale("log", base=10)
        panel.grid(True, which="both", alpha=0.3)
        panel.legend(fontsize=8)
    figure.suptitle(f"{title}; hollow: extrapolated", fontsize=9)
    figure.tight_layout()
    figure.savefig(path.with_suffix(".png"), dpi=120)
    print(f"wrote {path.with_suffix('.png')}")


if __name__ == "__main__":
    main()
