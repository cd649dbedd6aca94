"""`longnet-inspect`: what a configuration's pattern reaches and costs, in tables and one picture."""

import argparse
import copy
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from huggingface_hub.errors import StrictDataclassError

from conversion.plan import pattern_fields
from conversion.plan_family import check_window
from conversion.steps import say
from modeling_longnet import DilationPattern, LongNetConfig
from modeling_longnet.dilation_pattern import LONGEST

from .costs import Costs, ModelShape, measure_costs
from .coverage import Coverage, measure_coverage
from .plots import plot
from .source import read_config
from .suggestion import suggest_pattern


PRESETS = ("paper", "torchscale", "retrofit")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; 0, or 2 after one line that says what is wrong."""
    options = _parser().parse_args(arguments)
    try:
        return 0 if say("\n".join(run(options))) else 2
    except KeyboardInterrupt:
        print("longnet-inspect: interrupted", file=sys.stderr)
    except (ValueError, OSError, StrictDataclassError) as error:
        print(f"longnet-inspect: {' '.join(str(error).split())}", file=sys.stderr)
    return 2


def run(options: argparse.Namespace) -> list[str]:
    """Compute and format everything that the options ask for."""
    _check(options)
    config, window, lines = _config(options)
    if not config.num_hidden_layers:
        raise ValueError("the model has no layers (num_hidden_layers 0), so there is no attention to inspect")
    shape = ModelShape.of(config)
    if _suggests(options):
        pattern, described = _suggestion(options, config, window)
        found = {"suggested": pattern}
        lines += described
    elif options.compare:
        found = {name: DilationPattern.preset(name, config.segment_lengths, config.dilation_rates) for name in PRESETS}
    else:
        found = {"pattern": config.pattern}
    coverages = {name: measure_coverage(pattern, shape.num_kv_heads) for name, pattern in found.items()}
    lengths = options.lengths or _lengths(max(max(p.segment_lengths) for p in found.values()), options.context)
    costs = {name: measure_costs(_shape(config, pattern), lengths) for name, pattern in found.items()}
    if dense := sorted(set(config.dense_layers)):
        named = ", ".join(map(str, dense))
        lines += [f"layer {named} is dense" if len(dense) == 1 else f"layers {named} are dense", ""]
    for name, pattern in found.items():
        lines += [*_describe(name, pattern, shape.num_kv_heads), ""]
    lines += [*_coverage_table(coverages), ""]
    if len(found) == 1:
        ((name, pattern),) = found.items()
        lines += [*_branch_table(pattern, coverages[name]), ""]
    lines += _costs_table(costs)
    if options.plot:
        plot(options.plot, found, coverages, costs, shape.num_kv_heads)
        lines += ["", f"written {options.plot}"]
    return lines


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """End with one line and status 2, like every other failure."""
        self.exit(2, f"{self.prog}: {message} (--help explains the options)\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="longnet-inspect", description=__doc__, allow_abbrev=False)
    parser.add_argument(
        "source",
        nargs="?",
        help="config.json, checkpoint folder or model id; one that longnet-convert takes is shown as it would become",
    )
    parser.add_argument("--segment-lengths", type=_numbers, help="other branches than the source's, as 2048,4096")
    parser.add_argument("--dilation-rates", type=_numbers, help="their dilation rates, as 1,2")
    parser.add_argument("--preset", choices=PRESETS, help="rules of these branches, or of the suggested ones")
    parser.add_argument("--lengths", type=_numbers, help="token counts to show costs for")
    parser.add_argument("--context", type=int, help="tokens that the model is meant for")
    parser.add_argument(
        "--compare", action="store_true", help="the three presets side by side, with the same branches"
    )
    parser.add_argument(
        "--suggest", type=float, metavar="BUDGET", help="find branches that cost this share of dense attention"
    )
    parser.add_argument(
        "--kv-bytes", type=_byte_count, metavar="BYTES", help="... whose KV cache takes at most so much, as 512MiB"
    )
    parser.add_argument("--plot", type=Path, metavar="PNG", help="write a picture too")
    return parser


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of integers such as 2048,4096,8192") from None


def _byte_count(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT]i?)?B?", text.strip())
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of bytes; write 536870912, 512MiB or 0.5GiB")
    unit = match[2] or ""
    return int(float(match[1]) * (1024 if unit.endswith("i") else 1000) ** (" KMGT".index(unit[0]) if unit else 0))


def _suggests(options: argparse.Namespace) -> bool:
    return options.suggest is not None or options.kv_bytes is not None


def _check(options: argparse.Namespace) -> None:
    """Refuse options that say nothing together, and numbers that are no counts of tokens."""
    if (options.segment_lengths is None) != (options.dilation_rates is None):
        raise ValueError("--segment-lengths and --dilation-rates go together")
    if _suggests(options) and options.segment_lengths is not None:
        raise ValueError("--suggest and --kv-bytes find the branches; leave --segment-lengths out")
    if options.compare and (options.preset or _suggests(options)):
        raise ValueError(
            "--compare shows all presets of the given branches; leave --preset, --suggest, --kv-bytes out"
        )
    for length in (*(options.lengths or ()), *(() if options.context is None else (options.context,))):
        if length < 1:
            raise ValueError(f"--lengths and --context are numbers of tokens, at least 1, got {length}")
        if length > LONGEST:
            raise ValueError(f"--lengths and --context are numbers of tokens, at most 2^62, got {length}")


def _config(options: argparse.Namespace) -> tuple[LongNetConfig, int | None, list[str]]:
    """Return the configuration to inspect, its source's sliding window, and what to say about where it comes from."""
    window, lines = None, []
    if options.source is None:
        if options.segment_lengths is None and not _suggests(options):
            raise ValueError("name a checkpoint, or give --segment-lengths and --dilation-rates")
        config = LongNetConfig()
        lines = [
            f"no checkpoint named: {config.num_hidden_layers} layers, {config.num_attention_heads} query and "
            f"{config.num_key_value_heads} KV heads of {config.head_dim}, as LongNetConfig() has them",
            "",
        ]
    else:
        config, architecture, window = read_config(options.source)
        if architecture is not None and not _suggests(options):
            branches = "by default" if options.segment_lengths is None else "with these branches"
            lines = [f"{options.source} is a {architecture}; shown is what longnet-convert makes of it {branches}", ""]
    if options.segment_lengths is not None:
        config.segment_lengths, config.dilation_rates = options.segment_lengths, options.dilation_rates
    if options.preset and not _suggests(options):
        preset = DilationPattern.preset(options.preset, config.segment_lengths, config.dilation_rates)
        for field in ("head_offsets", "count_overlaps", "dilate_queries", "window"):
            setattr(config, field, getattr(preset, field))
    check_window(config.pattern, window)  # raises if the fields make no pattern
    return config, window, lines


def _suggestion(
    options: argparse.Namespace, config: LongNetConfig, window: int | None
) -> tuple[DilationPattern, list[str]]:
    """Find the branches that the budgets allow, and say how to ask for them and what they take.

    Dense layers take their part of the budgets first; the other layers share the rest.
    """
    context = options.context or max(config.segment_lengths)
    per_entry = ModelShape.of(config).bytes_per_entry
    layers, dense = config.num_hidden_layers, len(set(config.dense_layers))
    others = layers - dense
    if not others:
        raise ValueError(f"all {layers} layers are dense, so there are no branches to suggest; see dense_layers")
    flops, kv_bytes = options.suggest, options.kv_bytes
    if dense and flops is not None and flops <= 1:
        if flops * layers <= dense:
            raise ValueError(
                f"{dense} of {layers} layers are dense and alone cost {dense / layers:.3g} of dense attention, no less "
                f"than the budget of {flops:.3g}; raise it"
            )
        flops = (flops * layers - dense) / others
    if dense and kv_bytes is not None:
        kv_bytes -= dense * context * per_entry
        if kv_bytes < others * per_entry:
            raise ValueError(
                f"{dense} of {layers} layers are dense and alone hold {_bytes(dense * context * per_entry)} at "
                f"{context} tokens, the budget is {_bytes(options.kv_bytes)}; raise it or lower the context"
            )
    preset = options.preset or "retrofit"
    pattern, _ = suggest_pattern(
        context,
        1.0 if flops is None else flops,
        cache_budget=None if kv_bytes is None else kv_bytes // (per_entry * others),
        longest_first=window if preset == "retrofit" else None,
        preset=preset,
        num_kv_heads=config.num_key_value_heads,
    )
    (costs,) = measure_costs(_shape(config, pattern), [context])
    share, cache, clearing = (
        costs.flops / costs.dense_flops,
        costs.kv_bytes,
        pattern.segment_lengths[0] * per_entry * others,
    )
    return pattern, [
        f"segment_lengths {','.join(map(str, pattern.segment_lengths))}",
        f"dilation_rates  {','.join(map(str, pattern.dilation_rates))}",
        f"attention costs {share:.2%} of dense at {context} tokens",
        f"KV cache of {_bytes(cache)} at {context} tokens, up to {_bytes(clearing)} more between two clearings",
        "",
    ]


def _shape(config: LongNetConfig, pattern: DilationPattern) -> ModelShape:
    """Return the shape of the model with another pattern; its dense and its local layers stay such."""
    config = copy.copy(config)
    for name, value in pattern_fields(pattern).items():
        setattr(config, name, value)
    return ModelShape.of(config)


def _lengths(longest: int, context: int | None) -> list[int]:
    top = min(max(longest * 4, context or 0), LONGEST)
    return [top >> k for k in range(7, -1, -1) if top >> k >= min(16, top)]


def _describe(name: str, pattern: DilationPattern, num_kv_heads: int) -> list[str]:
    rules = f"{pattern.head_offsets} offsets, {'all' if not pattern.dilate_queries else 'only kept'} queries, "
    rules += f"{pattern.window} windows, overlaps counted {'m times' if pattern.count_overlaps else 'once'}"
    lines = [f"{name}: {rules}", "  segment   rate   keys in a window   offsets of the KV heads"]
    for (w, r), offsets in zip(pattern.branches, pattern.offsets(num_kv_heads)):
        kept = [len(range(offset, w, r)) for offset in offsets]
        keys = f"{min(kept)}" if min(kept) == max(kept) else f"{min(kept)}-{max(kept)}"
        shown = " ".join(map(str, offsets[:12])) + (" ..." if len(offsets) > 12 else "")
        lines.append(f"{w:>9} {r:>6} {keys:>18}   {shown}")
    return lines


def _coverage_table(coverages: dict[str, Coverage]) -> list[str]:
    names = list(coverages)
    some = coverages[names[0]]
    lines = ["share of queries that reach a token, any head (mean over heads)"]
    lines.append("  tokens back" + "".join(f"{name:>22}" for name in names))
    for column, distance in enumerate(some.distances):
        row = "".join(f"{f'{c.any_head[column]:.3f} ({c.mean_head[column]:.3f})':>22}" for c in coverages.values())
        lines.append(f"{distance:>13}{row}")
    lines.append("at edges" if len(names) == 1 else "at edges, " + ", ".join(names))
    for text, values in (
        ("no head sees the token before", [c.nearest_missed for c in coverages.values()]),
        ("a head sees nothing at all", [c.blind for c in coverages.values()]),
    ):
        lines.append(f"  {text:<32}" + "  ".join(f"{value:.2%}" for value in values))
    if not some.exact:
        lines.append("(averages over a sample of positions)")
    return lines


def _branch_table(pattern: DilationPattern, coverage: Coverage) -> list[str]:
    lines = ["share of queries and heads that reach a token through each branch (segment/rate)"]
    lines.append("  tokens back" + "".join(f"{f'{w}/{r}':>14}" for w, r in pattern.branches))
    for distance, *shares in zip(coverage.distances, *coverage.per_branch):
        lines.append(f"{distance:>13}" + "".join(f"{f'{share:.3f}' if share else '-':>14}" for share in shares))
    return lines


def _costs_table(costs: dict[str, list[Costs]]) -> list[str]:
    lines = ["attention of all layers, one document, and times less than dense"]
    lines.append("       tokens" + "".join(f"{name + ' FLOPs':>26}{'KV bytes':>22}" for name in costs))
    for row in zip(*costs.values()):
        cells = "".join(
            f"{f'{c.flops:.3g} ({c.dense_flops / c.flops:.1f}x)':>26}"
            f"{f'{_bytes(c.kv_bytes)} ({c.dense_kv_bytes / c.kv_bytes:.1f}x)':>22}"
            for c in row
        )
        lines.append(f"{row[0].length:>13,}{cells}")
    return lines


def _bytes(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.4g} {unit}"
        count /= 1024
    return f"{count:.4g} TiB"
