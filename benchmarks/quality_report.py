"""Tables, plots and a verdict of what ``retrofit_quality.py`` has measured so far."""

import csv
import io
import json
import math
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from retrofit_variants import VARIANTS


GOAL_PERCENT, GOAL_NEEDLE = 1.0, 0.95  # above tuned dense in perplexity; found at every depth
GOAL_FLOPS = {"attention_flops": (32768, 2.5), "attention_flops_131072": (131072, 8.0)}


def write_report(folder: Path, output: Path, settings, in_words: bool = True) -> None:
    """Write ``retrofit_quality_CARD_DAY.json``, ``.csv`` and ``.png``, each whole at any time; print them if asked to."""
    tuned = [json.loads(path.read_text()) for path in sorted(folder.glob("tuned_*.json"))]
    scratch = [json.loads(path.read_text()) for path in sorted(folder.glob("scratch_*.json"))]
    base = json.loads((folder / "base.json").read_text()) if (folder / "base.json").exists() else None
    known = [result for result in (base, *tuned, *scratch) if result]
    if not known:
        print("no results to report yet", flush=True)
        return
    card, day = known[0]["card"].replace(" ", "-"), known[0]["time"][:10]
    stem = output / f"retrofit_quality_{card}_{day}"
    rows, verdict = list(table(tuned, base, settings)), list(judge(tuned))
    everything = {
        "settings": asdict(settings), "command": " ".join(sys.argv), "verdict": verdict, "base": base, "tuned": tuned,
        "scratch": scratch,
    }  # fmt: skip
    output.mkdir(parents=True, exist_ok=True)
    _replace(stem.with_suffix(".json"), json.dumps(everything, indent=1).encode())
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]) if rows else ["variant"])
    writer.writeheader()
    writer.writerows(rows)
    _replace(stem.with_suffix(".csv"), text.getvalue().encode())
    plot(tuned, scratch, stem.with_suffix(".png"))
    if in_words:
        print_results(rows, scratch, verdict)
        print(f"wrote {stem}.csv, .json and .png", flush=True)


def print_results(rows: list[dict], scratch: list[dict], verdict: list[str]) -> None:
    """Print the table, the models from scratch and the verdict."""
    for row in rows:
        print(*(f"{name}={value}" for name, value in row.items()))
    for result in scratch:
        contexts = ", ".join(f"{n}: {math.exp(nll):.3f}" for n, nll in result["nll_at"].items())
        tokens = result["training"]["tokens"]
        print(f"from scratch, {result['variant']}: {tokens:,} tokens, perplexity with a context of {contexts}")
    print(*verdict, sep="\n")


def gap(result: dict, upper: dict) -> tuple[float, float | None]:
    """Compare two models on the same pieces: percent of perplexity above the other, and its standard error."""
    gaps = torch.tensor(result["nll_by_piece"]) - torch.tensor(upper["nll_by_piece"])
    error = 100 * (gaps.std() / math.sqrt(len(gaps))).item() if len(gaps) > 1 else None
    return 100 * math.expm1(result["nll"] - upper["nll"]), error


def table(tuned: list[dict], base: dict | None, settings) -> Iterator[dict]:
    """Make a row of each tuned variant, beside dense attention tuned on as many tokens where that exists."""
    order = {name: i for i, name in enumerate(VARIANTS)}
    for result in sorted(tuned, key=lambda r: (r["length"], order[r["variant"]])):
        upper, needle, context = _upper(result, tuned), result["needle"], str(settings.context)
        row = {
            "variant": result["variant"], "length": result["length"], "perplexity": f"{math.exp(result['nll']):.4f}",
            "above_dense_percent": "", "paired_standard_error": "",
            "untuned_perplexity": f"{math.exp(result['untuned_nll']):.3f}",
            "perplexity_at": " ".join(f"{n}:{math.exp(nll):.4f}" for n, nll in result["nll_at"].items()),
            "short_perplexity": f"{math.exp(result['nll_at'][context]):.4f}", "short_perplexity_before": "",
            "needle_worst_depth": min(needle.values()), "needle_mean": f"{sum(needle.values()) / len(needle):.3f}",
            "variable_tracking": result["variable_tracking"], "aggregation": result["aggregation"],
            "copy_nll": " ".join(f"{d}:{nll:.2f}" for d, nll in result["copy_nll"].items()),
            "times_fewer_flops": "", "times_fewer_flops_131072": "", "times_fewer_kv": "",
            "tune_tokens": result["training"]["tokens"], "tune_seconds": result["training"]["seconds"],
        }  # fmt: skip
        if base:
            before = base["on_text_of"][str(result["length"])]["nll_at"][context]
            row["short_perplexity_before"] = f"{math.exp(before):.4f}"
        if upper:
            percent, error = gap(result, upper)
            row["above_dense_percent"] = f"{percent:.2f}"
            row["paired_standard_error"] = "" if error is None else f"{error:.2f}"
            for column, field in (
                ("times_fewer_flops", "attention_flops"),
                ("times_fewer_flops_131072", "attention_flops_131072"),
                ("times_fewer_kv", "kv_entries"),
            ):
                row[column] = f"{upper[field] / result[field]:.2f}"
        yield row


def judge(tuned: list[dict]) -> Iterator[str]:
    """Say of each goal whether the default retrofit meets it, and at each length who is as good at the least cost."""
    for result in (r for r in tuned if r["variant"] == "retrofit"):
        length, upper = result["length"], _upper(result, tuned)
        if upper:
            percent, error = gap(result, upper)
            spread = "" if error is None else f" +- {error:.2f}"
            yield _line(f"perplexity at {length} {percent:+.2f} %{spread} of dense", percent <= GOAL_PERCENT)
            for field, (tokens, times) in GOAL_FLOPS.items():
                if field != "attention_flops" or length == tokens:
                    fewer = upper[field] / result[field]
                    yield _line(f"{fewer:.2f} times fewer attention FLOPs at {tokens}", fewer >= times)
        worst = min(result["needle"].values())
        yield _line(f"needles at {length}, worst depth {100 * worst:.0f} %", worst >= GOAL_NEEDLE)
    for length in sorted({r["length"] for r in tuned}):
        good = [
            r for r in tuned
            if r["length"] == length and (u := _upper(r, tuned)) and r is not u and gap(r, u)[0] <= GOAL_PERCENT
        ]  # fmt: skip
        for field, name in (("attention_flops", "attention FLOPs"), ("kv_entries", "KV entries")):
            if good:
                best = min(good, key=lambda r: r[field])
                fewer = _upper(best, tuned)[field] / best[field]
                yield f"at {length}, within {GOAL_PERCENT:g} % of dense: {best['variant']} has {fewer:.2f} times fewer {name}"


def _line(what: str, met: bool) -> str:
    return f"goal {'met' if met else 'missed'}: {what}"


def _upper(result: dict, tuned: list[dict]) -> dict | None:
    """Find dense attention at the same length, tuned on as many tokens."""
    for other in tuned:
        same = other["length"] == result["length"] and other["training"]["tokens"] == result["training"]["tokens"]
        if same and other["variant"] in ("dense", "dense_long"):
            return other
    return None


def plot(tuned: list[dict], scratch: list[dict], path: Path) -> None:
    """Draw perplexity by position, needles by depth, and perplexity by FLOPs."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("matplotlib is not installed; run the stage report elsewhere for the plots")
        return
    lengths = sorted({result["length"] for result in tuned})
    columns = max(1, len(lengths) + bool(scratch))
    figure = Figure(figsize=(5.5 * columns, 12), layout="constrained")
    panels = figure.subplots(3, columns, squeeze=False)
    for column, length in enumerate(lengths):
        position, needle, frontier = panels[:, column]
        for result in (r for r in tuned if r["length"] == length):
            name = result["variant"]
            places = [(i + 0.5) * length / 32 for i in range(32)]
            position.plot(places, [math.exp(x) for x in result["nll_by_position"]], label=name, linewidth=1)
            needle.plot([float(d) for d in result["needle"]], list(result["needle"].values()), label=name, marker=".")
            frontier.plot(result["attention_flops"], math.exp(result["nll"]), "o")
            frontier.annotate(name, (result["attention_flops"], math.exp(result["nll"])), fontsize=7)
        position.set(title=f"perplexity by position, {length:,} tokens", xlabel="position", ylabel="perplexity")
        needle.set(title="needles found, by depth", xlabel="depth", ylim=(-0.05, 1.05))
        frontier.set(title="perplexity by attention FLOPs", xlabel="FLOPs of reading once", xscale="log")
        position.legend(fontsize=7)
        needle.legend(fontsize=7)
    if scratch:
        position, context, unused = panels[:, -1]
        unused.axis("off")
        for result in scratch:
            places = [(i + 0.5) * result["length"] / 32 for i in range(32)]
            position.plot(places, [math.exp(x) for x in result["nll_by_position"]], label=result["variant"])
            contexts = [int(n) for n in result["nll_at"]]
            context.plot(
                contexts, [math.exp(x) for x in result["nll_at"].values()], label=result["variant"], marker="o"
            )
        position.set(title="from scratch, equal training FLOPs", xlabel="position", ylabel="perplexity")
        context.set(title="the same text by context", xlabel="context", ylabel="perplexity", xscale="log")
        position.legend(fontsize=7)
        context.legend(fontsize=7)
    picture = io.BytesIO()
    figure.savefig(picture, dpi=110, format="png")
    _replace(path, picture.getvalue())


def _replace(path: Path, content: bytes) -> None:
    temporary = path.with_name(f"{path.name}.{os.getpid()}.part")
    temporary.write_bytes(content)
    temporary.replace(path)
