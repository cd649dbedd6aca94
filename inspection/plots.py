"""The pictures: coverage by distance, costs by length, and the reach of single heads."""

from pathlib import Path
from typing import Any

from modeling_longnet import DilationPattern

from .costs import Costs
from .coverage import Coverage


def plot(
    target: Path,
    patterns: dict[str, DilationPattern],
    coverages: dict[str, Coverage],
    costs: dict[str, list[Costs]],
    num_kv_heads: int,
) -> None:
    """Write one PNG with three panels, a curve for each named pattern.

    Raises:
        ValueError: if matplotlib is missing or the target is no ``.png``.
    """
    if target.suffix != ".png":
        raise ValueError(f"the plot is a PNG, {target} ends otherwise")
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError(f"plots need matplotlib: pip install matplotlib ({error})") from error
    figure = Figure(figsize=(15, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    reach, coverage, cost = figure.subplots(1, 3)
    _reach(reach, patterns, num_kv_heads)
    for name, measured in coverages.items():
        distances = [d + 1 for d in measured.distances]
        (line,) = coverage.plot(distances, measured.any_head, label=f"{name}: any head")
        coverage.plot(distances, measured.mean_head, color=line.get_color(), linestyle=":", label=f"{name}: one head")
    coverage.set(xscale="log", xlabel="tokens back, itself = 1", ylabel="share of queries that reach it")
    coverage.set_title("Coverage of the past")
    coverage.legend(fontsize="small")
    for name, by_length in costs.items():
        lengths = [c.length for c in by_length]
        (line,) = cost.plot(lengths, [c.dense_flops / c.flops for c in by_length], label=f"{name}: FLOPs")
        savings = [c.dense_kv_bytes / c.kv_bytes for c in by_length]
        cost.plot(lengths, savings, color=line.get_color(), linestyle=":", label=f"{name}: KV bytes")
    cost.set(xscale="log", yscale="log", xlabel="tokens", ylabel="times less than dense attention")
    cost.set_title("Costs")
    cost.legend(fontsize="small")
    figure.savefig(target, dpi=110)


def _reach(axes: Any, patterns: dict[str, DilationPattern], num_kv_heads: int) -> None:
    """Draw what the last query of two segments sees, a row for each head; darker: counted more often."""
    row, labels = 0, []
    for name, pattern in patterns.items():
        shown = min(max(pattern.segment_lengths), 512)
        query = 2 * max(pattern.segment_lengths) - 1
        for head in range(min(num_kv_heads, 4)):
            reached = pattern.reach(query, head, num_kv_heads=num_kv_heads)
            near = [query - u for u in reached if query - u < shown]
            axes.scatter(near, [row] * len(near), s=2, marker="|", color="black", alpha=0.5)
            labels.append(f"{name} {head}")
            row += 1
    axes.set_yticks(range(row), labels, fontsize="x-small")
    axes.invert_xaxis()
    axes.set(xlabel="tokens back", title="Keys that one query reaches, by head")
