"""Draw what benchmark_sequence_parallel.py measured: efficiency over ranks, and when the last rank talked and computed.

python benchmarks/plot_sequence_parallel.py benchmarks/results/sequence_parallel_<...>.csv
"""

import argparse
import csv
from pathlib import Path


COLOURS = {"exchange": "tab:red", "halo": "tab:orange", "local": "tab:blue"}


def timeline_path(path: Path) -> Path:
    """Return where the timelines of a CSV of results stand."""
    return path.with_name(f"{path.stem}_timeline.csv")


def plot(path: Path) -> None:
    """Draw one panel per stage that has efficiencies, and one per timeline, into a PNG beside the CSV."""
    try:
        import matplotlib
    except ImportError:
        print(f"matplotlib is not installed; draw later with plot_sequence_parallel.py {path}")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    with path.open() as file:
        title = next(file).removeprefix("# ").strip()
        next(file)
        rows = [row for row in csv.DictReader(file) if row["efficiency"]]
    calls: dict[str, list[dict]] = {}
    if timeline_path(path).exists():
        with timeline_path(path).open() as file:
            for row in csv.DictReader(file):
                calls.setdefault(row["call"], []).append(row)
    stages = list(dict.fromkeys(row["stage"] for row in rows))
    if not stages:
        return
    count = max(len(stages), len(calls))
    figure, panels = pyplot.subplots(2 if calls else 1, count, figsize=(5 * count, 7 if calls else 4.5), squeeze=False)
    for panel in panels.flat:
        panel.set_visible(False)
    for panel, stage in zip(panels[0], stages):
        draw_efficiency(panel, stage, [row for row in rows if row["stage"] == stage])
    for panel, (call, intervals) in zip(panels[-1], calls.items()):
        draw_timeline(panel, call, intervals)
    figure.suptitle(title, fontsize=8)
    figure.tight_layout()
    figure.savefig(path.with_suffix(".png"), dpi=120)
    print(f"wrote {path.with_suffix('.png')}")


def draw_efficiency(panel, stage: str, rows: list[dict]) -> None:
    """Draw efficiency over ranks, with the balance that bounds it."""
    for preset, scaling in dict.fromkeys((row["attention"], row["scaling"]) for row in rows):
        line = [row for row in rows if (row["attention"], row["scaling"]) == (preset, scaling)]
        sizes = [int(row["ranks"]) for row in line]
        marker = "o" if scaling == "weak" else "s"
        (drawn,) = panel.plot(
            sizes, [100 * float(row["efficiency"]) for row in line], marker=marker, label=f"{preset}, {scaling}"
        )
        bound = [100 * float(row["balance"]) for row in line]
        panel.plot(sizes, bound, linestyle=":", color=drawn.get_color())
    panel.set(title=f"{stage}, forward + backward (dotted: balance of work)", xlabel="ranks", ylabel="efficiency, %")
    panel.set_xscale("log", base=2)
    panel.set_ylim(0, 110)
    panel.grid(True, alpha=0.3)
    panel.legend()
    panel.set_visible(True)


def draw_timeline(panel, call: str, intervals: list[dict]) -> None:
    """Draw when the last rank's kernels of each kind ran in one call of the operator."""
    for y, (kind, colour) in enumerate(COLOURS.items()):
        bars = [
            (float(row["start_ms"]), float(row["end_ms"]) - float(row["start_ms"]))
            for row in intervals
            if row["kind"] == kind
        ]
        panel.broken_barh(bars, (y - 0.4, 0.8), facecolors=colour)
    panel.set_yticks(range(len(COLOURS)), list(COLOURS))
    panel.set(title=f"attention, last rank: {call}", xlabel="ms")
    panel.set_visible(True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("csv", type=Path)
    plot(parser.parse_args().csv)
