"""The README's code runs as it stands: Python blocks in order in one process, converter commands in a shell."""

import argparse
import csv
import json
import math
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.commands.launch import launch_command_parser
from checkpoints import make_checkpoint
from PIL import Image, ImageChops, ImageStat
from torchscale_decoder import random_weights


ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README, flags=re.DOTALL | re.MULTILINE)

# Every block of code is of one of these kinds: its language, how it begins, the test that runs it.
KINDS = {
    ("python", ""): "test_readme.py::test_the_code_blocks_run_and_print_what_their_comments_say",
    ("bash", "longnet-"): "test_readme.py::test_the_code_blocks_run_and_print_what_their_comments_say",
    ("bash", "pip install "): "test_packaging.py::test_the_readmes_command_installs_from_a_clone",
    ("text", "paper: "): "test_readme.py::test_the_picture_is_what_the_patterns_reach",
    ("text", "accelerate launch "): "test_readme.py::test_the_launch_on_many_gpus_runs_on_one_process",
}


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    """A folder with a checkpoint named llama, one of the official code and our commands on the path."""
    folder = tmp_path_factory.mktemp("readme")
    make_checkpoint(folder / "llama", max_position_embeddings=128)
    weights, arguments = random_weights()
    torch.save({"model": weights, "args": argparse.Namespace(**arguments)}, folder / "checkpoint_best.pt")
    (folder / "bin").mkdir()
    for name, module in (("longnet-convert", "conversion"), ("longnet-inspect", "inspection")):
        command = folder / "bin" / name
        command.write_text(f'#!/bin/sh\nexec {sys.executable} -m {module} "$@"\n')
        command.chmod(0o755)
    return folder


def run(command: list[str], folder: Path) -> str:
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
        "HF_HUB_OFFLINE": "1",
    }
    process = subprocess.run(
        command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr[-3000:]
    return process.stdout


def blocks(language: str, beginning: str) -> list[str]:
    return [code for name, code in BLOCKS if name == language and code.startswith(beginning)]


def test_every_block_is_of_a_kind_that_a_test_runs():
    assert README.count("```") == 2 * len(BLOCKS)  # no block is hidden by its indentation or a missing language
    assert sum(len(blocks(*kind)) for kind in KINDS) == len(BLOCKS), [block for block in BLOCKS if kinds(*block) != 1]
    for kind, place in KINDS.items():
        file, name = place.split("::")
        assert blocks(*kind), kind
        assert f"\ndef {name}(" in (ROOT / "tests" / file).read_text(), place
    assert [code.count("\n") for code in blocks("bash", "pip install ")] == [1]  # what the test of the package takes
    for code in blocks("bash", "longnet-"):
        assert all(line.startswith("longnet-") for line in code.splitlines()), code


def kinds(language: str, code: str) -> int:
    return sum(language == name and code.startswith(beginning) for name, beginning in KINDS)


def test_the_code_blocks_run_and_print_what_their_comments_say(workshop):
    for code in blocks("bash", "longnet-"):
        run(["sh", "-ec", code], workshop)
    script = "\n".join(blocks("python", ""))
    collect = "import json, sys\nprinted = []\nprint = lambda x: printed.append(str(x))\n"
    output = run([sys.executable, "-c", f"{collect}{script}\nsys.stdout.write(json.dumps(printed))"], workshop)
    shape, reach, text, savings, entries, cache_shape, nats = json.loads(output)
    assert shape == "torch.Size([1, 700, 1000])"
    assert json.loads(reach)[-1] == 200 and json.loads(reach).count(200) == 4  # reached by four branches
    assert text.startswith("def main(")
    assert float(savings) > 30
    assert entries == "11264"
    entries_held = int(re.fullmatch(r"torch.Size\(\[1, 2, (\d+), 8\]\)", cache_shape)[1])
    assert entries_held <= 128 + 256 // 4 + 128
    assert 4 < float(re.search(r"[\d.]+", nats)[0]) / 3999 < 10  # random tokens, of a hundred, random weights


def test_the_launch_on_many_gpus_runs_on_one_process(tmp_path):
    (command,) = blocks("text", "accelerate launch ")
    _, _, *words = shlex.split(command.replace("\\\n", " "))
    options = launch_command_parser().parse_args(words)  # Accelerate knows every option of the launch
    assert options.use_fsdp and options.num_processes > 1
    assert options.training_script_args == ["--length", str(2**20)]
    script = [str(ROOT / options.training_script), "--length", "512", "--steps", "20"]
    launch = [
        "--cpu",
        "--num_processes",
        "1",
        "--num_machines",
        "1",
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
    ]
    printed = run([sys.executable, "-m", "accelerate.commands.launch", *launch, *script], tmp_path)
    assert "checked: in 20 steps the loss falls" in printed and "on sequences of 512 bytes over 1 rank" in printed


def test_the_code_in_model_cards_runs(workshop):
    convert = [sys.executable, "-m", "conversion"]
    run([*convert, "llama", "with-card", "--segment-lengths", "16,32", "--dilation-rates", "1,2"], workshop)
    run([*convert, "checkpoint_best.pt", "official-with-card", "--from", "torchscale"], workshop)
    for folder, card in (
        ("with-card", workshop / "with-card" / "README.md"),
        ("official-with-card", workshop / "official-with-card" / "README.md"),
        ("with-card", ROOT / "model_card.md"),
    ):
        text = card.read_text()
        (code,) = re.findall(r"^```python\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)
        assert text.count("```") == 2 + 2 * text.count("```bibtex"), card
        script = f"path = {folder!r}\n{code.replace('path/to/this/checkpoint', folder)}\nprint(type(model).__name__)"
        printed = run([sys.executable, "-c", script], workshop)
        assert printed.endswith("LongNetForCausalLM\n")
        assert "Do you wish to run the custom code?" not in printed
        assert "Call me Ishmael." not in code or "Call me Ishmael." in printed


def test_the_figure_of_the_presets_comes_from_the_command_below_it(workshop):
    (command,) = re.findall(r"`(longnet-inspect [^`]*--plot docs/presets.png)`", README)
    (workshop / "docs").mkdir()
    run(["sh", "-ec", command], workshop)
    with Image.open(ROOT / "docs" / "presets.png") as kept, Image.open(workshop / "docs" / "presets.png") as drawn:
        assert kept.size == drawn.size
        difference = ImageChops.difference(kept.convert("L"), drawn.convert("L"))
    assert ImageStat.Stat(difference).mean[0] < 2  # of 255: matplotlib's versions set text a little differently


def test_the_make_targets_that_it_names_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"`make (\w+)`", README)):
        assert f"\n{target}:" in makefile, target


def test_the_files_that_it_names_exist():
    images = re.findall(r"!\[[^]]*\]\(([^)]*)\)", README)
    assert len(images) >= 2
    for name in images:
        assert (ROOT / name).exists(), name
    for name in set(re.findall(r"`((?:tests|modeling_longnet|conversion|benchmarks)/[\w/.-]*)`", README)):
        assert (ROOT / name).exists(), name


def test_the_picture_is_what_the_patterns_reach():
    from modeling_longnet import DilationPattern

    (picture,) = blocks("text", "paper: ")
    rows = picture.splitlines()[2:]
    for preset, columns in (("paper", slice(0, 44)), ("retrofit", slice(44, None))):
        pattern = DilationPattern.preset(preset, (8, 32), (1, 4))
        for position, row in enumerate(rows):
            reached = pattern.reach(position, kv_head=0)
            drawn = "".join(".ox"[reached.count(u)] for u in range(position + 1))
            assert row[columns].rstrip() == drawn, (preset, position)


def measurements(name: str) -> list[dict[str, str]]:
    lines = (ROOT / "benchmarks" / "results" / name).read_text().splitlines()
    return list(csv.DictReader(line for line in lines if not line.startswith("#")))


def number(cell: str) -> float:
    return float(cell.strip("*").replace(",", ""))


def test_the_speed_table_is_what_the_measurements_say():
    rows = measurements("attention_NVIDIA-H100-80GB-HBM3_2026-11-26.csv")
    wanted = {"pass": "forward+backward", "heads": "16", "kv_heads": "16", "head_dim": "128", "layout": "plain"}
    measured = {
        (row["attention"], int(row["length"])): (float(row["ms"]), row["extrapolated"])
        for row in rows
        if all(row[name] == value for name, value in wanted.items())
    }
    table = re.findall(r"^\| ([\d,]+) \| (.*?) \| (.*?) \| (.*?) \|$", README, flags=re.MULTILINE)
    assert len(table) == 6
    for tokens, *cells in table:
        for attention, cell in zip(("dense cudnn", "paper", "retrofit"), cells):
            ms, extrapolated = measured[attention, int(number(tokens))]
            assert number(cell) == pytest.approx(ms, rel=0.01)
            assert bool(re.fullmatch(r"\*[^*]+\*", cell)) == (extrapolated == "1")


def test_what_it_says_of_speed_is_what_the_measurements_say():
    rows = measurements("attention_NVIDIA-H100-80GB-HBM3_2026-11-26.csv")
    prose = " ".join(README.split())

    def plain(which: str, head_dim: int, passes: str = "forward+backward") -> list[dict[str, str]]:
        alike = {"heads": "16", "kv_heads": "16", "layout": "plain", "head_dim": str(head_dim), "pass": passes}
        return [row for row in rows if row["attention"] == which and alike.items() <= row.items()]

    def milliseconds(which: str, length: int, head_dim: int) -> float:
        (row,) = (row for row in plain(which, head_dim) if row["length"] == str(length))
        return float(row["ms"])

    def rates(head_dim: int, passes: str) -> list[float]:
        long = [
            r for which in ("paper", "retrofit") for r in plain(which, head_dim, passes) if int(r["length"]) >= 2**15
        ]
        found = [float(row["tflops"]) for row in long]
        return [min(found), max(found)]

    for pattern, head_dim in (
        (r"reach (\d+) to (\d+) TFLOP/s forward and backward from 32k tokens on \((\d+) to (\d+) forward\)", 128),
        (r"with D=64 (\d+) to (\d+) \((\d+) to (\d+)\)", 64),
    ):
        stated = [int(x) for x in re.search(pattern, prose).groups()]
        assert stated == pytest.approx([*rates(head_dim, "forward+backward"), *rates(head_dim, "forward")], abs=0.6)
    (cudnn,) = (row for row in plain("dense cudnn", 128) if row["length"] == str(2**15))
    assert re.search(r"cuDNN (\d+) on the same card at 32k", prose)[1] == f"{float(cudnn['tflops']):.0f}"
    for pattern, length, head_dim, names in (
        (r"by a third \(([\d.]+) ms against ([\d.]+) and ([\d.]+); FlashAttention ([\d.]+)\)", 1024, 128,
         ("dense cudnn", "paper", "retrofit", "dense flash")),
        (r"the faster one, too \(([\d.]+) ms against ([\d.]+) and ([\d.]+)\)", 4096, 64,
         ("dense cudnn", "paper", "retrofit")),
    ):  # fmt: skip
        stated = [float(x) for x in re.search(pattern, prose).groups()]
        assert stated == pytest.approx([milliseconds(name, length, head_dim) for name in names], abs=0.006)
    (auto,) = (
        r
        for r in rows
        if (r["attention"], r["length"], r["head_dim"], r["pass"]) == ("auto", "2048", "64", "forward+backward")
    )
    ratio, *stated = re.search(
        r"for up to ([\d.]+) times its time \(([\d.]+) ms against ([\d.]+), at 2,048 with D=64\)", prose
    ).groups()
    both = float(auto["ms"]), milliseconds("dense cudnn", 2048, 64)
    assert [float(x) for x in stated] == pytest.approx(both, abs=0.006)
    assert float(ratio) == pytest.approx(both[0] / both[1], abs=0.06)


def test_the_percentages_of_two_gpus_are_what_the_measurements_say():
    rows = measurements("sequence_parallel_2xNVIDIA-H100-80GB-HBM3_2026-11-26_152603.csv")
    efficiency = {
        (row["scaling"], row["attention"], row["stage"]): round(100 * float(row["efficiency"]))
        for row in rows
        if row["ranks"] == "2"
    }
    prose = " ".join(README.split())
    order = [(preset, stage) for preset in ("paper", "retrofit") for stage in ("step", "attention")]
    for scaling, words in (
        ("weak", r"runs at (\d+) % of one GPU's .*? attention alone at (\d+) %; `retrofit` at (\d+) % and (\d+) %,"),
        ("strong", r"run the `paper` step at (\d+) % and the attention at (\d+) %, `retrofit` at (\d+) and (\d+)\."),
    ):
        stated = [int(percent) for percent in re.search(words, prose).groups()]
        assert stated == [efficiency[scaling, *which] for which in order]
    balances = {
        row["stage"]: round(100 * float(row["balance"]))
        for row in rows
        if row["ranks"] == "2" and (row["scaling"], row["attention"]) == ("weak", "retrofit")
    }
    assert re.search(r"contiguous slices allow (\d+) and (\d+)", prose).groups() == (
        str(balances["step"]), str(balances["attention"])
    )  # fmt: skip
    one, second = (
        next(row for row in rows if (row["ranks"], row["attention"], row["stage"], row["scaling"]) == wanted)
        for wanted in (("1", "retrofit", "attention", "weak"), ("2", "retrofit", "attention", "weak"))
    )
    work = [float(row["tflops_per_rank"]) * float(row["ms"]) for row in (one, second)]
    halo = work[1] / float(second["balance"]) - work[0]  # of the second rank, beyond its own keys
    assert "its halo is a quarter of the second GPU's attention, at two thirds of the speed of the rest" in prose
    assert 0.2 < halo / (halo + work[0]) < 0.3
    assert 0.62 < halo / float(second["halo_ms"]) / float(one["tflops_per_rank"]) < 0.72
    other = {
        row["scaling"]: round(100 * float(row["efficiency"]))
        for row in measurements("sequence_parallel_2xNVIDIA-H100-80GB-HBM3_2026-11-26_114348.csv")
        if (row["ranks"], row["attention"], row["stage"]) == ("2", "paper", "attention")
    }
    calls = {
        row["scaling"]: row["ms"]
        for row in rows
        if (row["attention"], row["stage"], row["ranks"]) == ("paper", "attention", "2")
    }
    stated = re.search(
        r"Another run had `paper`'s attention at (\d+) and (\d+) %; the calls take (\d+) and (\d+) ms", prose
    )
    assert [int(x) for x in stated.groups()] == [
        other["weak"], other["strong"], round(float(calls["weak"])), round(float(calls["strong"]))
    ]  # fmt: skip
    received = max(float(row["received_bytes"]) / float(row["bound_bytes"]) for row in rows)
    assert re.search(r"receives at most (\d+) %", prose)[1] == f"{100 * received:.0f}"
    (longest,) = measurements("sequence_parallel_2xNVIDIA-H100-80GB-HBM3_2026-11-26_114714.csv")
    tokens, seconds = re.search(
        r"([\d,]+) tokens in one sequence, [\d,]+ per GPU, go through .*? in (\d+) s", prose
    ).groups()
    assert number(tokens) == float(longest["tokens"]) and seconds == f"{float(longest['ms']) / 1e3:.0f}"


def test_the_number_of_gpu_tests_is_what_the_run_printed():
    text = (ROOT / "benchmarks/results/gpu_tests_NVIDIA-H100-80GB-HBM3_2026-11-26.txt").read_text()
    assert not re.search(r"FAILED|\d+ failed", text)
    passed, skipped, errors = re.search(r"(\d+) passed, (\d+) skipped,.*? (\d+) errors in", text).groups()
    assert text.count("SKIPPED [1]") == int(skipped) and text.count("ImportError") == int(errors)
    stated, files = re.search(
        r"(\d+) GPU tests passed on an H100 and none failed; (\w+) files of tests that need `datasets` were left out",
        " ".join(README.split()),
    ).groups()
    assert stated == passed and ["no", "one", "two"].index(files) == int(errors)
    later = "".join(re.findall(r"^([.sFEx]+)(?: +\[ *\d+%\])?$", text, flags=re.MULTILINE))
    (attention,) = re.search(
        r"After the last change of a kernel (\d+) of the attention's passed", " ".join(README.split())
    ).groups()
    assert not set(later) - set(".s") and later.count(".") == int(attention)


def test_the_step_of_the_8b_shape_is_what_was_measured():
    (row,) = measurements("training_NVIDIA-H100-80GB-HBM3_2026-11-26_1149.csv")
    seconds, tokens, gib, layers = re.search(
        r"8B shape .*? takes ([\d.]+) s for one sequence of ([\d,]+) tokens \(([\d.]+) GiB .*? checkpoints of (\d+) of 32",
        " ".join(README.split()),
    ).groups()
    assert (float(seconds), number(tokens)) == pytest.approx((float(row["step_s"]), float(row["length"])), rel=0.01)
    assert (float(gib), layers) == (pytest.approx(float(row["peak_gib"]), abs=0.1), row["offloaded_layers"])


def test_the_table_of_quality_is_what_the_study_measured():
    rows = measurements("retrofit_quality_NVIDIA-H100-80GB-HBM3_2026-11-26.csv")
    measured = {row["variant"]: row for row in rows if row["length"] == "16384"}
    section = README.split("### What a retrofit keeps")[1].split("**Dense layers bring it back**")[0]
    table = re.findall(
        r"^\| (.*?) \| ([\d.]+) \|(.*?)\| (\d+) % \| (.*?) \| (.*?) \| (.*?) \|$", section, flags=re.MULTILINE
    )
    names = ("dense", "retrofit_wide", "retrofit", "retrofit_sinks", "retrofit_dense8", "window", "s2", "paper")
    assert len(table) == len(names)
    for name, (_, perplexity, above, needles, *times) in zip(names, table):
        row = measured[name]
        assert float(perplexity) == pytest.approx(float(row["perplexity"]), abs=0.006)
        assert float(above.strip(" %") or 0) == pytest.approx(float(row["above_dense_percent"]), abs=0.06)
        assert int(needles) == pytest.approx(100 * float(row["needle_mean"]), abs=0.6)
        fewer = [float(row[f"times_fewer_{what}"]) for what in ("flops", "flops_131072", "kv")]
        assert [float(x) for x in times] == pytest.approx(fewer, abs=0.06)


def test_the_table_of_dense_layers_is_what_the_study_measured():
    name = "retrofit_quality_NVIDIA-H100-80GB-HBM3_2026-11-26_muon"
    measured = {row["variant"]: row for row in measurements(f"{name}.csv")}
    table = re.findall(
        r"^\| (.*?) \| ([\d.]+) \|(.*?)\| (\d+) % \| (\d+) % \| (.*?) \| (.*?) \| (.*?) \|$",
        README,
        flags=re.MULTILINE,
    )
    names = ("dense_long", "retrofit_dense4_long", "retrofit_dense8_long", "retrofit_long")
    assert len(table) == len(names)
    for variant, (_, perplexity, above, needles, worst, *times) in zip(names, table):
        row = measured[variant]
        assert float(perplexity) == pytest.approx(float(row["perplexity"]), abs=0.006)
        assert float(above.strip(" %") or 0) == pytest.approx(float(row["above_dense_percent"]), abs=0.06)
        found = [100 * float(row[column]) for column in ("needle_mean", "needle_worst_depth")]
        assert [int(needles), int(worst)] == pytest.approx(found, abs=0.6)
        fewer = [float(row[f"times_fewer_{what}"]) for what in ("flops", "flops_131072", "kv")]
        assert [float(x) for x in times] == pytest.approx(fewer, abs=0.06)
    study = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())
    at_depth = {r["variant"]: r["needle"] for r in study["tuned"]}
    prose = " ".join(README.split())
    stated = re.search(
        r"in (\d+) % of the cases after 6.6M tokens and in all .*? after 79M, (\d+) % of what", prose
    ).groups()
    assert [int(x) for x in stated] == [
        round(100 * at_depth["retrofit"]["0.75"]), int(100 * at_depth["retrofit_longest"]["0.1"])
    ]  # fmt: skip
    assert at_depth["retrofit_long"]["0.75"] == 1.0 and at_depth["retrofit_longest"]["0.5"] < 0.1
    scratch = {r["variant"]: math.exp(r["nll"]) for r in study["scratch"]}
    stated = re.search(r"has perplexity (\d+), ([\d.]+) and ([\d.]+), and (\d+) with a sliding window", prose).groups()
    names = ("dense", "paper", "paper_magneto", "window")
    assert [float(x) for x in stated] == pytest.approx([scratch[name] for name in names], rel=0.005)


def test_the_table_of_places_is_what_the_study_measured():
    rows = measurements("retrofit_quality_NVIDIA-H100-80GB-HBM3_2026-11-26_places.csv")
    measured = {(row["variant"], int(row["length"])): row for row in rows}
    section = README.split("**It is the place that counts")[1].split("## Backends")[0]
    table = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("| ")][1:]
    names = ("dense", "retrofit_dense4", "retrofit_dense8_late", "retrofit_dense8_early", "retrofit")
    assert [cells[0] for cells in table] == ["all", "layers 2 and 6", "layer 6", "layer 2", "none"]
    for name, (_, *cells, fewer, far_fewer) in zip(names, table, strict=True):
        for length, (quality, *found) in zip((16384, 32768), (cells[:3], cells[3:]), strict=True):
            row = measured[name, length]
            stated = float(quality.strip(" %"))
            if name == "dense":
                assert stated == pytest.approx(float(row["perplexity"]), abs=0.006)
            else:
                assert stated == pytest.approx(float(row["above_dense_percent"]), abs=0.06)
            for cell, column in zip(found, ("needle_mean", "needle_worst_depth"), strict=True):
                assert int(cell.removesuffix(" %")) == pytest.approx(100 * float(row[column]), abs=0.6)
        row = measured[name, 32768]
        for cell, column in ((fewer, "times_fewer_flops"), (far_fewer, "times_fewer_flops_131072")):
            assert float(cell) == pytest.approx(float(row[column]), abs=0.06)
    short = " ".join(README.split("### What a retrofit keeps")[1].split("\n\n")[1].split())
    late, none, dense = ([measured[name, n] for n in (16384, 32768)] for name in (names[2], names[4], names[0]))
    stated = re.search(
        r"costs 1 to ([\d.]+) % .*? for ([\d.]+) times .*? costs ([\d.]+) to ([\d.]+) % and finds (\d+) % of the needles at "
        r"16,384 tokens \((\d+) at 32,768\), where dense attention finds (\d+) \((\d+)\), for ([\d.]+) times fewer",
        short,
    ).groups()
    above, far = "above_dense_percent", "times_fewer_flops_131072"
    assert [float(x) for x in stated[:4]] == pytest.approx(
        [float(none[1][above]), float(none[0][far]), float(late[0][above]), float(late[1][above])], abs=0.06
    )
    needles = [100 * float(row["needle_mean"]) for row in (*late, *dense)]
    assert [float(x) for x in stated[4:]] == pytest.approx([*needles, float(late[0][far])], abs=0.6)
    stated = re.search(
        r"followed in (\d+) % of the cases with dense .*? it follows (\d+) %, the two (\d+)\.",
        " ".join(section.split()),
    ).groups()
    chains = [measured[name, 16384]["variable_tracking"] for name in ("dense", names[2], names[1])]
    assert [int(x) for x in stated] == pytest.approx([100 * float(x) for x in chains], abs=0.6)


def test_the_table_of_whole_models_is_what_the_measurements_say():
    measured = {}  # (what, tokens, model): value
    for row in measurements("training_NVIDIA-H100-80GB-HBM3_2026-11-26_0309.csv"):
        if not row["tokens_per_s"]:  # left out
            continue
        key = "training step, tokens/s", int(row["length"]), row["attention"].removesuffix(" cudnn")
        measured[key] = max(float(row["tokens_per_s"]), measured.get(key, 0.0))  # of Llama, the faster kernel
    names = {"prefill tokens/s": "reading a prompt, tokens/s", "decode ms/token": "one generated token, ms",
             "KV bytes": "KV cache, MB"}  # fmt: skip
    batches = {}
    name = "NVIDIA-H100-80GB-HBM3_2026-11-26.csv"
    prompts = [row for row in measurements(f"generation-liger_{name}") if row["measure"] == "prefill tokens/s"]
    for row in [*prompts, *(x for x in measurements(f"generation_{name}") if x["measure"] != "prefill tokens/s")]:
        if row["measure"] == "decode tokens/s":
            batches[row["model"], row["how"]] = f"{row['batch']}", f"{float(row['value']):,.0f}"
        elif row["batch"] == "1":
            model = {"longnet": "retrofit"}.get(row["model"], row["model"])
            scale = 1e6 if row["measure"] == "KV bytes" else 1.0
            key = names[row["measure"]], int(row["context"]), model
            value = float(row["value"]) / scale
            # Of the ways to launch, and of the chunk lengths, the fastest.
            best = max if row["measure"] == "prefill tokens/s" else min
            measured[key] = best(value, measured.get(key, value))
    what, checked = "", 0
    for label, tokens, *cells in re.findall(
        r"^\| (.*?)\| ([\d,]+) \| (.*?) ?\| (.*?) ?\| (.*?) \|$", README, flags=re.MULTILINE
    ):
        what = label.strip() or what
        for model, cell in zip(("llama", "paper", "retrofit"), cells):
            if cell.strip():
                assert number(cell) == pytest.approx(measured[what, int(number(tokens)), model], rel=0.01), (
                    what,
                    cell,
                )
                checked += 1
    assert checked == 24
    prose = " ".join(README.split())
    pairs = re.search(
        r"(\d+)\s+rows\s+give\s+([\d,]+)\s+tokens/s\s+where\s+Llama's\s+(\d+)\s+give\s+(\d+)", README
    ).groups()
    assert pairs == (*batches["longnet", "CUDA graph"], *batches["llama", "eager"])
    without = {
        row["model"]: float(row["value"])  # the last is the fastest
        for row in measurements(f"generation_{name}")
        if (row["measure"], row["context"]) == ("prefill tokens/s", "131072")
    }
    assert f"{without['longnet'] / without['llama']:.1f} times as fast as Llama at 131k without Liger" in prose
    (longest,) = measurements("training_NVIDIA-H100-80GB-HBM3_2026-11-26_1558.csv")
    seconds, rate = re.search(
        r"checkpoints of 11 layers in host memory\) in ([\d.]+) s, at ([\d,]+) tokens/s", prose
    ).groups()
    assert float(seconds) == pytest.approx(float(longest["step_s"]), abs=0.05)
    assert number(rate) == pytest.approx(float(longest["tokens_per_s"]), rel=0.01)
    (billion,) = re.findall(r"went through one H200 in (\d+) s", README)
    report = (ROOT / "benchmarks/results/one_billion_tokens_NVIDIA-H200_2026-11-24.csv").read_text()
    assert float(re.search(r"# seconds: ([\d.]+)", report)[1]) == pytest.approx(float(billion), abs=0.5)
