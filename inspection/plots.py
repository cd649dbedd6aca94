"""The pictures: the reach of single heads by branch, coverage by distance, edges of segments, and costs by length."""

import math
from pathlib import Path
from typing import Any

from modeling_longnet import DilationPattern
from modeling_longnet.dilation_pattern import Branch

from .costs import Costs
from .coverage import Coverage, count_reached, reaching_branches


MOST_HEADS = 4
STEPS_PER_DOUBLING = 24  # of distances that are drawn beyond the nearest
PLACES = 64  # of a segment, each a mean over some queries
QUERIES_PER_PLACE = 16


def plot(
    target: Path,
    patterns: dict[str, DilationPattern],
    coverages: dict[str, Coverage],
    costs: dict[str, list[Costs]],
    num_kv_heads: int,
) -> None:
    """Write one PNG with four panels: the reach of some heads, coverage by distance, edge effects, costs by length.

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
    figure = Figure(figsize=(14, 8.5), layout="constrained")
    FigureCanvasAgg(figure)
    (reach, coverage), (edges, cost) = figure.subplots(2, 2)
    _reach(reach, patterns, num_kv_heads)
    _coverage(coverage, patterns, coverages)
    _edges(edges, patterns, num_kv_heads)
    _costs(cost, costs)
    # Beside the target first, so that an earlier picture is never left half overwritten, by a full disk for one.
    partial = target.with_name(f".{target.name}.partial")
    try:
        figure.savefig(partial, format="png", dpi=110)
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def _reach(axes: Any, patterns: dict[str, DilationPattern], num_kv_heads: int) -> None:
    """Draw what the last query of two segments reaches: a band of rows for each head, in it a row for each branch."""
    labels: list[str] = []
    points: dict[Branch, tuple[list[int], list[float]]] = {}
    for name, pattern in patterns.items():
        query = 2 * max(pattern.segment_lengths) - 1
        for head in range(min(num_kv_heads, MOST_HEADS)):
            for distance in drawn_distances(pattern, query, head, num_kv_heads):
                for i in reaching_branches(pattern, query, query - distance, head, num_kv_heads):
                    x, y = points.setdefault(pattern.branches[i], ([], []))
                    x.append(distance + 1)
                    y.append(len(labels) + 0.7 * i / len(pattern.branches))
            labels.append(f"{name}, head {head}")
    branches = next(iter(patterns.values())).branches  # of all of them: presets differ in rules
    for branch, colour in zip(branches, _colours(len(branches))):
        x, y = points.get(branch, ([], []))
        w, r = branch
        axes.scatter(x, y, s=12, marker="|", linewidths=0.8, color=colour, label=f"{w}/{r}")
    axes.set_yticks([0.25 + row for row in range(len(labels))], labels, fontsize="x-small")
    axes.set(xscale="log", xlabel="tokens back, itself = 1", ylim=(-0.3, len(labels)))
    axes.set_title("Keys that one query reaches, by head and branch")
    beside = {"loc": "center left", "bbox_to_anchor": (1.0, 0.5)}
    axes.legend(fontsize="xx-small", title="segment/rate", title_fontsize="x-small", **beside)


def _colours(count: int) -> list[Any]:
    """Colour branches from near, dark, to far, bright; the same in all panels."""
    from matplotlib import colormaps

    return [colormaps["plasma"](0.9 * i / max(count - 1, 1)) for i in range(count)]


def drawn_distances(pattern: DilationPattern, query: int, kv_head: int, num_kv_heads: int) -> list[int]:
    """Choose distances to look at: all near ones, and farther back each branch's kept keys, ever sparser."""
    longest = max(pattern.segment_lengths)
    near = min(longest, 64)
    chosen = set(range(near))
    for step in range(int(STEPS_PER_DOUBLING * math.log2(longest / near)) + 1):
        key = query - min(int(near * 2 ** (step / STEPS_PER_DOUBLING)), longest - 1)
        for i, (w, r) in enumerate(pattern.branches):
            back = (key % w - pattern.offset(i, kv_head, num_kv_heads)) % r
            chosen.add(query - max(key - back, query - longest + 1, 0))
    return sorted(chosen)


def _coverage(axes: Any, patterns: dict[str, DilationPattern], coverages: dict[str, Coverage]) -> None:
    """Draw the share of queries that reach a distance; of a single pattern through each branch, too."""
    for name, measured in coverages.items():
        distances = [d + 1 for d in measured.distances]
        colour = "black" if len(coverages) == 1 else None
        (line,) = axes.plot(distances, measured.any_head, color=colour, label=f"{name}: any head")
        axes.plot(distances, measured.mean_head, color=line.get_color(), linestyle=":", label=f"{name}: one head")
        if len(coverages) == 1:
            colours = _colours(len(measured.per_branch))
            for i, (shares, colour) in enumerate(zip(measured.per_branch, colours)):
                label = "one head through one branch (colours as on the left)" if i == 0 else None
                axes.plot(distances, [share or math.nan for share in shares], ".-", color=colour, label=label)
    axes.set(xscale="log", xlabel="tokens back, itself = 1", ylabel="share of queries that reach it")
    axes.set_title("Coverage of the past")
    axes.legend(fontsize="small")


def _edges(axes: Any, patterns: dict[str, DilationPattern], num_kv_heads: int) -> None:
    """Draw how many keys a query reaches by its place in the longest segment; windows that slide have no edges."""
    for name, pattern in patterns.items():
        longest = max(pattern.segment_lengths)
        places = min(PLACES, longest)
        bounds = [longest * k // places for k in range(places + 1)]
        means = []
        for first, end in zip(bounds, bounds[1:]):
            queries = range(first, end, max(1, (end - first) // QUERIES_PER_PLACE | 1))  # odd: rates are often even
            counts = [
                count_reached(pattern, 2 * longest + query, g, num_kv_heads)
                for query in queries
                for g in range(num_kv_heads)
            ]
            means.append(sum(counts) / len(counts))
        axes.plot([(first + end - 1) / 2 for first, end in zip(bounds, bounds[1:])], means, label=name)
    axes.set(xlabel="place of the query in the longest segment", ylabel="keys that it reaches, mean over heads")
    axes.set_ylim(bottom=0)
    axes.set_title("Edge effects")
    axes.legend(fontsize="small")


def _costs(axes: Any, costs: dict[str, list[Costs]]) -> None:
    for name, by_length in costs.items():
        lengths = [c.length for c in by_length]
        (line,) = axes.plot(lengths, [c.dense_flops / c.flops for c in by_length], label=f"{name}: FLOPs")
        savings = [c.dense_kv_bytes / c.kv_bytes for c in by_length]
        axes.plot(lengths, savings, color=line.get_color(), linestyle=":", label=f"{name}: KV bytes")
    axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel="times less than dense attention")
    axes.set_title("Costs")
    axes.legend(fontsize="small")
