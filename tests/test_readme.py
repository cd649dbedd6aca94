"""The README's code runs as it stands: Python blocks in order in one process, converter commands in a shell."""

import argparse
import csv
import functools
import json
import math
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from accelerate.commands.launch import launch_command_parser
from checkpoints import make_checkpoint
from PIL import Image, ImageChops, ImageStat
from torchscale_decoder import random_weights

from modeling_longnet import LongNetConfig, dilated_attention_hopper
from modeling_longnet.dilation_pattern import PRESETS


ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README, flags=re.DOTALL | re.MULTILINE)

# Every block of code is of one of these kinds: its language, how it begins, the test that runs it.
KINDS = {
    ("python", ""): "test_readme.py::test_the_code_blocks_run_and_print_what_their_comments_say",
    ("bash", "longnet-"): "test_readme.py::test_the_code_blocks_run_and_print_what_their_comments_say",
    ("bash", "pip install "): "test_packaging.py::test_the_readmes_command_installs_from_a_clone",
    ("text", "paper: "): "test_readme.py::test_the_picture_is_what_the_patterns_reach",
    ("text", "accelerate launch examples/"): "test_readme.py::test_the_fine_tuning_command_ends_with_an_adapter",
    ("text", "accelerate launch --"): "test_readme.py::test_the_launch_on_many_gpus_runs_on_one_process",
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


def test_the_fine_tuning_command_ends_with_an_adapter(tmp_path):
    make_checkpoint(tmp_path / "llama")
    (convert,) = (code for code in blocks("bash", "longnet-") if " llama-16k " in code)
    run([sys.executable, "-m", "conversion", *shlex.split(convert)[1:]], tmp_path)
    (command,) = blocks("text", "accelerate launch examples/")
    _, _, script, *options = shlex.split(command.replace("\\\n", " "))
    launch = ["accelerate.commands.launch", "--cpu", "--num_processes=1", "--num_machines=1", "--mixed_precision=no"]
    shorter = ["--length=128", "--steps=10"]
    printed = run(
        [sys.executable, "-m", *launch, "--dynamo_backend=no", str(ROOT / script), *options, *shorter], tmp_path
    )
    assert "wrote llama-16k-lora" in printed
    assert {"adapter_config.json", "tokenizer.json"} <= {path.name for path in (tmp_path / "llama-16k-lora").iterdir()}
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["step_0000010"]


def test_the_launch_on_many_gpus_runs_on_one_process(tmp_path):
    (command,) = blocks("text", "accelerate launch --")
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


def test_it_says_what_its_commands_need_beyond_its_own_installation():
    install = README.partition("## Install")[2].partition("\n## ")[0]
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = {extra for found in re.findall(r'pip install "\.\[(.*?)\]"', README) for extra in found.split(",")}
    assert named <= set(extras)
    assert "longnet-inspect llama-longnet --compare --plot" in README
    assert any("matplotlib" in requirement for extra in named for requirement in extras[extra])
    locks = "import fcntl" in (ROOT / "conversion/atomic_folder.py").read_text()  # which Windows does not have
    assert locks == ("run on Linux and macOS" in install)


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


def attention_measurements(name: str = "NVIDIA-H200_2026-11-28") -> list[dict[str, str]]:
    return measurements(f"attention_{name}.csv")


def test_the_speed_table_is_what_the_measurements_say():
    rows = attention_measurements()
    wanted = {"pass": "forward+backward", "heads": "16", "kv_heads": "16", "head_dim": "128", "layout": "plain"}
    measured = {
        (row["attention"], int(row["length"])): row
        for row in rows
        if all(row[name] == value for name, value in wanted.items())
    }
    table = re.findall(r"^\| ([\d,]+) \| (.*?) \| (.*?) \| (.*?) \|$", README, flags=re.MULTILINE)
    assert len(table) == 6
    for tokens, *cells in table:
        for attention, cell in zip(("dense cudnn", "paper", "retrofit"), cells):
            row = measured[attention, int(number(tokens))]
            ms, device = re.fullmatch(r"(\S+)(?: \((\S+)\))?", cell).groups()
            assert number(ms) == pytest.approx(float(row["ms"]), rel=0.01)
            assert (device is None) == (row["device_ms"] == "")
            assert device is None or number(device) == pytest.approx(float(row["device_ms"]), rel=0.01)
            assert bool(re.fullmatch(r"\*[^*]+\*", ms)) == (row["extrapolated"] == "1")


def slowest_by_host(passes: str) -> tuple[float, float, float, float, float]:
    """Where ``auto`` loses most to the faster dense kernel: ratio, both times in ms, tokens, head size."""
    plain = {"heads": "16", "kv_heads": "16", "pass": passes}
    rows = [row for row in attention_measurements() if plain.items() <= row.items()]
    found = []
    for row in rows:
        if row["attention"] == "auto":
            at = row["length"], row["head_dim"]
            dense = [x for x in rows if x["attention"].startswith("dense") and (x["length"], x["head_dim"]) == at]
            fastest = min(float(x["ms"]) for x in dense)
            found.append((float(row["ms"]) / fastest, float(row["ms"]), fastest, *map(float, at)))
    return max(found)


def test_what_it_says_of_speed_is_what_the_measurements_say():
    rows = attention_measurements()
    prose = " ".join(README.split())

    def plain(which: str, head_dim: int, passes: str = "forward+backward") -> list[dict[str, str]]:
        alike = {"heads": "16", "kv_heads": "16", "layout": "plain", "head_dim": str(head_dim), "pass": passes}
        return [row for row in rows if row["attention"] == which and alike.items() <= row.items()]

    def milliseconds(
        which: str, length: int, head_dim: int, passes: str = "forward+backward", column: str = "ms"
    ) -> float:
        (row,) = (row for row in plain(which, head_dim, passes) if row["length"] == str(length))
        return float(row[column])

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
        (r"tokens \(at 1,024 in ([\d.]+) ms against ([\d.]+) and ([\d.]+)\)", 1024, 128,
         ("dense cudnn", "paper", "retrofit")),
        (r"and at 4,096 with D=64 than `retrofit` \(([\d.]+) against ([\d.]+); `paper` ([\d.]+)\)", 4096, 64,
         ("dense cudnn", "retrofit", "paper")),
    ):  # fmt: skip
        stated = [float(x) for x in re.search(pattern, prose).groups()]
        taken = [milliseconds(name, length, head_dim, column="device_ms") for name in names]
        assert stated == pytest.approx(taken, abs=0.0006)
    assert "There, dense attention is faster up to 2,048 tokens" in prose
    for length in (1024, 2048, 4096):
        dense, *ours = (
            milliseconds(name, length, 128, column="device_ms") for name in ("dense cudnn", "paper", "retrofit")
        )
        assert dense < min(ours) if length <= 2048 else max(ours) < dense
    # Queries, outputs, keys, values and the gradients of all four, two bytes each.
    shares = {
        (name, head_dim): 100 * float(row["extra_mib"]) * 2**20 / (8 * 16 * 2**20 * head_dim * 2)
        for name in ("retrofit", "paper")
        for head_dim in (128, 64)
        for row in plain(name, head_dim)
        if row["length"] == str(2**20) and row["pass"] == "forward+backward"
    }
    stated = re.search(r"all of `retrofit`'s gradients, it needs ([\d.]+) % \(([\d.]+) % with D=64\)", prose)
    of_retrofit = [float(x) for x in stated.groups()]
    assert of_retrofit == pytest.approx([shares["retrofit", 128], shares["retrofit", 64]], abs=0.05)
    (stated,) = re.findall(r"need (\d+) % more memory than inputs, results and gradients take", prose)
    assert round(shares["paper", 128]) == int(stated)
    near = measurements("attention_NVIDIA-H200_2026-11-28_near.csv")
    for row in near[1:4:2]:
        assert row["pass"] == "forward+backward" and row["head_dim"] == "128"
        assert round(100 * float(row["extra_mib"]) / (8 * 16 * int(row["length"]) * 128 * 2 / 2**20)) == int(stated)
    stated = re.search(
        r"at 131,072 tokens, `paper` took ([\d.]+) ms and `retrofit` ([\d.]+) where cuDNN took (\d+): (\d+) and (\d+) TFLOP/s",
        prose,
    )  # fmt: skip
    taken = [float(near[i][column]) for i, column in ((1, "ms"), (3, "ms"), (5, "ms"), (1, "tflops"), (3, "tflops"))]
    assert [row["attention"] for row in near[1::2]] == ["paper", "retrofit", "dense cudnn"]
    assert [float(x) for x in stated.groups()] == pytest.approx(taken, abs=0.5) and near[1]["length"] == str(2**17)
    # test_backward_order checks the eighth, and one KV head where that is more.
    assert (
        int(re.search(r"up to an eighth of that memory, or (\d+) MiB", prose)[1]) * 2**20
        == dilated_attention_hopper.MOST_SUMS
    )
    padded, packed = (
        float(row["tflops"])
        for layout in ("padded", "packed")
        for row in rows
        if (row["attention"], row["layout"], row["pass"]) == ("paper", layout, "forward+backward")
    )
    stated = re.search(r"`paper` (\d+) TFLOP/s forward and backward padded, (\d+) packed", prose).groups()
    assert [int(x) for x in stated] == [round(padded), round(packed)] and 1.8 < packed / padded < 2.2
    beside = r"([\d.]+) ms against ([\d.]+), at ([\d,]+) with D=(\d+)"
    stated = re.search(
        rf"took up to ([\d.]+) times its time in this run \({beside}[^()]*; forward alone ([\d.]+) times, {beside}\)",
        prose,
    ).groups()
    stated = [float(cell.replace(",", "")) for cell in stated]
    for given, passes in ((stated[:5], "forward+backward"), (stated[5:], "forward")):
        ratio, *times_and_place = slowest_by_host(passes)
        assert given[0] == pytest.approx(ratio, abs=0.005)
        assert given[1:] == pytest.approx(times_and_place, abs=0.0006)
    on_device = [
        float(row["device_ms"])
        / min(
            milliseconds(f"dense {kernel}", int(row["length"]), int(row["head_dim"]), row["pass"], "device_ms")
            for kernel in ("cudnn", "flash")
        )
        for row in rows
        if row["attention"] == "auto"
    ]
    stated = re.search(r"on the device within ([\d.]+) % of the faster of cuDNN and FlashAttention", prose)[1]
    assert 0 <= 1 + float(stated) / 100 - max(on_device) < 0.001
    (of_h100,) = (
        float(row["ms"])
        for row in attention_measurements("NVIDIA-H100-80GB-HBM3_2026-11-28")
        if (row["attention"], row["length"], row["head_dim"], row["pass"])
        == ("paper", "2048", "128", "forward+backward")
    )
    stated = re.search(r"an H100's took ([\d.]+) ms for `paper` at 2,048", prose)[1]
    assert float(stated) == pytest.approx(of_h100, abs=0.0006)


def test_what_it_says_of_power_is_what_the_measurements_say():
    rows = measurements("attention_power_NVIDIA-H200_2026-11-28.csv")
    prose = " ".join(README.split())
    (limit,) = {int(row["limit_watts"]) for row in rows}
    assert all(float(row["capped"]) == 1 and int(row["watts"]) >= 0.97 * limit for row in rows)
    product, *attention = rows
    assert (product["what"], int(re.search(r"draw its (\d+) W", prose)[1])) == ("matrix product", limit)
    clocks = re.search(r"clock, for attention to between ([\d,]+) and ([\d,]+) MHz\.", prose).groups()
    measured = [int(row["mhz"]) for row in attention]
    assert [number(x) for x in clocks] == [min(measured), max(measured)]

    def falls(row: dict[str, str]) -> list[int]:
        return [round(float(row["rested_tflops"])), round(float(row["tflops"]))]

    def of(what: str, pass_: str, length: int = 2**17) -> dict[str, str]:
        (row,) = (r for r in attention if (r["what"], r["pass"], int(r["length"])) == (what, pass_, length))
        return row

    stated = re.search(
        r"falls from (\d+) TFLOP/s to (\d+), at 131,072 tokens `paper`'s forward from (\d+) to (\d+) "
        r"and its backward from (\d+) to (\d+)", prose,
    ).groups()  # fmt: skip
    taken = falls(product) + falls(of("paper", "forward")) + falls(of("paper", "backward"))
    assert [int(x) for x in stated] == taken

    def shares(pass_: str, ours: bool) -> list[int]:
        found = [
            round(100 * float(row["tensor_cores"]))
            for row in attention
            if row["pass"] == pass_ and (row["what"] != "dense cudnn") == ours
        ]
        return sorted({min(found), max(found)})

    stated = re.search(
        r"useful products are (\d+) to (\d+) % forward \(cuDNN (\d+) to (\d+) %\) "
        r"and (\d+) to (\d+) % backward \(cuDNN (\d+) %\)", prose,
    ).groups()  # fmt: skip
    taken = [share for pass_ in ("forward", "backward") for ours in (True, False) for share in shares(pass_, ours)]
    assert [int(x) for x in stated] == taken


def test_what_fewer_tiles_gained_is_what_was_compared():
    text = (ROOT / "benchmarks/results/compare_checkouts_NVIDIA-H200_2026-11-28_fewest_tiles.txt").read_text()
    prose = " ".join(README.split())
    gained = {}  # of backward, by call
    for call, ratio in re.findall(
        r"^(retrofit\S+)\n(?:  forward .*\n)+  backward .*\n  backward .* ([\d.]+)x ", text, re.MULTILINE
    ):
        gained.setdefault(call, []).append(float(ratio))
    stated = re.search(
        r"its backward is ([\d.]+) times as fast at 32,768 tokens with D=64 and 16 heads, ([\d.]+) times with 32 heads over "
        r"8 KV heads and ([\d.]+) times with 14 over 2; at 4,096 tokens ([\d.]+) times with D=128 and 16 heads", prose,
    ).groups()  # fmt: skip
    calls = ("64,32768,16,16", "64,32768,32,8", "64,32768,14,2", "128,4096,16,16")
    assert [float(x) for x in stated] == [round(gained[f"retrofit,{call}"][0], 2) for call in calls]


def gained_in(text: str, call: str, checkout: str, which: str = "backward") -> float:
    """Read from a comparison how many times as fast as the first a checkout is."""
    (times,) = re.findall(
        rf"^{call}\n(?:  (?:forward|backward) .*\n)*?  {which} .* ([\d.]+)x  {checkout}  ", text, re.MULTILINE
    )
    return round(float(times), 2)


def test_what_the_backward_gained_is_what_was_compared():
    text = (ROOT / "benchmarks/results/compare_checkouts_NVIDIA-H200_2026-11-28_backward.txt").read_text()
    gained = functools.partial(gained_in, text)
    stated = re.search(
        r"`paper` ([\d.]+) times at 131,072 tokens with D=128, ([\d.]+) times at 32,768 with D=64; `retrofit` ([\d.]+) times "
        r"and again ([\d.]+) at 32,768 with D=128\. .*? with 32 heads of 96 `retrofit` is ([\d.]+) times as fast forward and "
        r"([\d.]+) times backward",
        " ".join(README.split()),
    ).groups()
    assert [float(x) for x in stated] == [
        gained("paper,128,131072,16,16", "pass"), gained("paper,64,32768,16,16", "regs"),
        gained("retrofit,128,32768,16,16", "lone"), gained("retrofit,128,32768,16,16", "n2"),
        gained("retrofit,96,32768,32,32", "heads", "forward"), gained("retrofit,96,32768,32,32", "heads"),
    ]  # fmt: skip


def test_what_three_warpgroups_and_tiles_in_step_gained_is_what_was_compared():
    text = (ROOT / "benchmarks/results/compare_checkouts_NVIDIA-H200_2026-11-28_in_step.txt").read_text()
    first, _, last = re.split(r"^# (?:Without|before)", text, flags=re.MULTILINE)
    stated = re.search(
        r"which is ([\d.]+) times as fast forward at 131,072 tokens and ([\d.]+) times at 32,768 \(([\d.]+) at 4,096\), .*? "
        r"([\d.]+) times backward at 131,072 tokens, but ([\d.]+) with 32 heads over 8 KV heads at 32,768 and no gain with D=64",
        " ".join(README.split()),
    ).groups()  # fmt: skip
    assert [float(x) for x in stated] == [
        gained_in(first, "retrofit,128,131072,16,16", "three", "forward"),
        gained_in(first, "retrofit,128,32768,16,16", "three", "forward"),
        gained_in(text, "retrofit,128,4096,16,16", "three", "forward"),
        gained_in(last, "retrofit,128,131072,16,16", "step"), gained_in(last, "retrofit,128,32768,32,8", "step"),
    ]  # fmt: skip
    assert gained_in(last, "retrofit,64,131072,16,16", "step") <= 1


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
        ("weak", r"runs at (\d+) % of one GPU's .*? attention alone at (\d+) %; `retrofit` at (\d+) % and (\d+) %\."),
        ("strong", r"run the `paper` step at (\d+) % and the attention at (\d+) %, `retrofit` at (\d+) and (\d+)\."),
    ):
        stated = [int(percent) for percent in re.search(words, prose).groups()]
        assert stated == [efficiency[scaling, *which] for which in order]
    balances = {
        row["stage"]: round(100 * float(row["balance"]))
        for row in rows
        if row["ranks"] == "2" and (row["scaling"], row["attention"]) == ("weak", "retrofit")
    }
    assert re.search(r"More than (\d+) and (\d+) are not to be had there", prose).groups() == (
        str(balances["step"]), str(balances["attention"])
    )  # fmt: skip
    one, second = (
        next(row for row in rows if (row["ranks"], row["attention"], row["stage"], row["scaling"]) == wanted)
        for wanted in (("1", "retrofit", "attention", "weak"), ("2", "retrofit", "attention", "weak"))
    )
    work = [float(row["tflops_per_rank"]) * float(row["ms"]) for row in (one, second)]
    halo = work[1] / float(second["balance"]) - work[0]  # of the second rank, beyond its own keys
    assert "is a quarter of the second GPU's attention, at two thirds of the speed of the rest" in prose
    assert 0.2 < halo / (halo + work[0]) < 0.3
    assert 0.62 < halo / float(second["halo_ms"]) / float(one["tflops_per_rank"]) < 0.72
    other = {
        (row["attention"], row["scaling"]): round(100 * float(row["efficiency"]))
        for row in measurements("sequence_parallel_2xNVIDIA-H100-80GB-HBM3_2026-11-26_114348.csv")
        if (row["ranks"], row["stage"]) == ("2", "attention")
    }
    stated = re.search(
        r"An earlier run that day had `paper`'s attention at (\d+) and (\d+) %, and `retrofit`'s at (\d+) and (\d+)",
        prose,
    )
    order = [(preset, scaling) for preset in ("paper", "retrofit") for scaling in ("weak", "strong")]
    assert [int(x) for x in stated.groups()] == [other[which] for which in order]
    received = max(float(row["received_bytes"]) / float(row["bound_bytes"]) for row in rows)
    assert re.search(r"receives at most (\d+) % of the keys", prose)[1] == f"{100 * received:.0f}"
    (longest,) = measurements("sequence_parallel_2xNVIDIA-H100-80GB-HBM3_2026-11-26_114714.csv")
    tokens, seconds = re.search(
        r"([\d,]+) tokens in one sequence, [\d,]+ per GPU, go through .*? in (\d+) s", prose
    ).groups()
    assert number(tokens) == float(longest["tokens"]) and seconds == f"{float(longest['ms']) / 1e3:.0f}"


def test_the_demo_takes_what_was_measured():
    minutes, seconds, cores = re.search(r"took (\d+):(\d\d) minutes on (\w+) CPU cores", README).groups()
    text = (ROOT / "benchmarks/results/demo_2026-11-27.txt").read_text()
    measured = re.search(r"^real\t(\d+)m([\d.]+)s$", text, flags=re.MULTILINE)
    assert (minutes, seconds) == (measured[1], f"{float(measured[2]):02.0f}")
    assert f"{['no', 'one', 'two'].index(cores)} cores" in text


def test_the_number_of_gpu_tests_is_what_the_run_printed():
    text = (ROOT / "benchmarks/results/gpu_tests_NVIDIA-H200_2026-11-28.txt").read_text()
    whole, again = re.split(r"^# Why: ", text, flags=re.MULTILINE)
    failed, passed, skipped = (int(x) for x in re.search(r"(\d+) failed, (\d+) passed, (\d+) skipped", whole).groups())
    assert sum(int(x) for x in re.findall(r"SKIPPED \[(\d+)\]", whole)) == skipped
    assert whole.count("FAILED") == failed
    stated, failures, off = re.search(
        r"(\d+) GPU tests passed on an H200 and (\w+) failed .*? by up to (\S+)\)", " ".join(README.split())
    ).groups()
    assert int(stated) == passed and ["no", "one", "two"].index(failures) == failed
    differences = [float(x) for x in re.findall(r"equal False (\S+)", again)]
    assert float(off) == pytest.approx(max(differences), rel=0.01)
    assert "1 failed, 1 passed" in again


def test_a_replayed_step_takes_what_was_measured():
    of_card = "profile_decoding_NVIDIA-H100-80GB-HBM3_2026-11-27"
    text = (ROOT / f"benchmarks/results/{of_card}_ahead.txt").read_text()
    # What the defaults are compared with there, and takes the same way.
    alike = re.findall(
        r"^([\d.]+) ms/step, [\d.]+ x  (?:defaults|\{'MOST_PROGRAMS': 48\}|\{'ATTENDING_PROGRAMS': \d\})$", text,
        flags=re.MULTILINE,
    )  # fmt: skip
    stated = re.search(
        r"a step takes ([\d.]+) to ([\d.]+) ms at 1,048,576 tokens of context .*?; an H100 took ([\d.]+) at 4,096 as at 1,048,576",
        " ".join(README.split()),
    ).groups()
    assert len(alike) == 4
    assert stated[:2] == (f"{min(map(float, alike)):.2f}", f"{max(map(float, alike)):.2f}")
    least, of_h200 = re.search(
        r", ([\d.]+) ms at the least\n([\d.]+) ms/step, [\d.]+ x  defaults",
        (ROOT / "benchmarks/results/profile_decoding_NVIDIA-H200_2026-11-28.txt").read_text(),
    ).groups()
    stated_of_h200 = re.search(
        r"on an H200 ([\d.]+) \(.*?\), where reading the weights takes ([\d.]+) at 4.2 TB/s", " ".join(README.split())
    )
    assert stated_of_h200.groups() == (of_h200, least)
    before = re.findall(
        r"--context (\d+) .*\n.*\n([\d.]+) ms/step, [\d.]+ x  defaults",
        (ROOT / f"benchmarks/results/{of_card}.txt").read_text(),
    )
    assert [context for context, _ in before] == ["1048576", "131072", "32768", "4096"]
    assert [float(ms) for _, ms in before] == pytest.approx([float(stated[2])] * 4, abs=0.006)


def test_a_step_with_a_dense_layer_takes_what_was_measured():
    text = (ROOT / "benchmarks/results/profile_decoding_NVIDIA-H100-80GB-HBM3_2026-11-26.txt").read_text()
    measured = re.findall(r"--context (\d+) .*--dense-layers 12\n.*\n([\d.]+) ms/step, [\d.]+ x  defaults", text)
    stated = re.search(
        r"Earlier, with one of the 16 layers dense, it took ([\d.]+) ms at ([\d,]+) tokens of context, ([\d.]+) at ([\d,]+) and "
        r"([\d.]+) at ([\d,]+), and ([\d.]+) at ([\d,]+) with room for 1,000,000 ",
        " ".join(README.split()),
    ).groups()
    assert [(number(n), float(ms)) for ms, n in zip(stated[::2], stated[1::2])] == [
        (float(n), pytest.approx(float(ms), abs=0.006)) for n, ms in measured
    ]


def test_the_step_of_the_8b_shape_is_what_was_measured():
    (row,) = measurements("training_NVIDIA-H100-80GB-HBM3_2026-11-26_1149.csv")
    seconds, tokens, gib, layers = re.search(
        r"8B shape .*? takes ([\d.]+) s for one sequence of ([\d,]+) tokens \(([\d.]+) GiB .*? checkpoints of (\d+) of 32",
        " ".join(README.split()),
    ).groups()
    assert (float(seconds), number(tokens)) == pytest.approx((float(row["step_s"]), float(row["length"])), rel=0.01)
    assert (float(gib), layers) == (pytest.approx(float(row["peak_gib"]), abs=0.1), row["offloaded_layers"])


QUALITY = "retrofit_quality_NVIDIA-H100-80GB-HBM3_2026-11-26"
WAYS = {  # rows of the table: variant
    "dense (perplexity)": "dense",
    "`retrofit`, layer 6 of 8 dense": "retrofit_dense8_late",
    "`retrofit`, layers 5 and 6 dense": "retrofit_dense4_late",
    "`retrofit`": "retrofit",
    "`retrofit`, and the first 16 tokens": "retrofit_sinks",
    "`retrofit`, offsets staggered by layer": "retrofit_staggered",
    "the first segment, sliding; layer 6 dense": "window_dense8_late",
    "the first segment alone, sliding": "window",
    "LongLoRA's S2, dense to read": "s2",
    "`paper`": "paper",
}


def quality(study: str = "") -> dict[tuple[str, int], dict[str, str]]:
    return {(row["variant"], int(row["length"])): row for row in measurements(f"{QUALITY}{study}.csv")}


def section_on_quality() -> str:
    return README.split("### What a retrofit keeps")[1].split("## Backends")[0]


def test_the_table_of_quality_is_what_the_study_measured():
    measured, seen, suffix = quality("_late"), set(), ""
    lines = [line for line in section_on_quality().splitlines() if line.startswith("|")][2:]
    for name, *cells in ([cell.strip() for cell in line.strip("|").split("|")] for line in lines):
        if name.startswith("*with 26M tokens:* "):
            name, suffix = name.removeprefix("*with 26M tokens:* "), "_long"
        variant = WAYS[name] + suffix
        for length, (to_dense, *found) in ((16384, cells[:3]), (32768, cells[3:6])):
            if (variant, length) not in measured:
                assert not any((to_dense, *found))
                continue
            row = measured[variant, length]
            seen.add((variant, length))
            column = "perplexity" if name.startswith("dense") else "above_dense_percent"
            assert float(to_dense.strip("+ %")) == pytest.approx(float(row[column]), abs=0.051)
            for cell, column in zip(found, ("needle_mean", "needle_worst_depth"), strict=True):
                assert int(cell.removesuffix(" %")) == pytest.approx(100 * float(row[column]), abs=0.6)
        at_131k, far = cells[7], measured.get((variant, 32768))
        assert float(at_131k) == pytest.approx(float(row["times_fewer_flops_131072"]), abs=0.06)
        for cell, column in ((cells[6], "times_fewer_flops"), (cells[8], "times_fewer_kv")):
            assert (cell == "") if far is None else float(cell) == pytest.approx(float(far[column]), abs=0.06)
    assert seen == measured.keys()
    assert stated(r"was trained on (\d+)M tokens") == [pretraining_in_millions("_late")]
    wide = ("window", "s2", "paper")
    errors: dict[bool, list[float]] = {True: [], False: []}
    for (variant, _), row in measured.items():
        if not variant.startswith("dense"):
            errors[variant in wide].append(float(row["paired_standard_error"]))
    bounds = stated(r"are ([\d.]+) to ([\d.]+), of the window alone, S2 and `paper` ([\d.]+) to ([\d.]+):")
    assert bounds == [round(bound(errors[kind]), 1) for kind in (False, True) for bound in (min, max)]


def stated(pattern: str) -> list[float]:
    return [float(x) for x in re.search(pattern, " ".join(section_on_quality().split())).groups()]


def pretraining_in_millions(study: str) -> int:
    text = (ROOT / "benchmarks" / "results" / f"{QUALITY}{study}.json").read_text()
    return round(json.loads(text)["base"]["training"]["tokens"] / 1e6)


def percent(row: dict[str, str], column: str) -> int:
    return int(100 * float(row[column]) + 0.5)


def test_the_short_summary_of_quality_was_measured_or_counted():
    studies = [quality(study) for study in ("", "_muon", "_places", "_late")]
    costs: dict[str, list[float]] = {}
    for study in studies:
        for (variant, _), row in study.items():
            if row["above_dense_percent"]:
                costs.setdefault(variant.removesuffix("_long"), []).append(float(row["above_dense_percent"]))
    late, none = (studies[-1][name, 32768] for name in ("retrofit_dense8_late", "retrofit"))
    for pattern, variant in (
        (r"within ([\d.]+) to ([\d.]+) % of dense", "retrofit_dense8_late"),
        (r"small cache, costs ([\d.]+) to ([\d.]+) %", "retrofit"),
    ):
        assert stated(pattern) == pytest.approx([min(costs[variant]), max(costs[variant])], abs=0.05)
    assert "found every needle at 16,384" in " ".join(section_on_quality().split())
    assert studies[-1]["retrofit_dense8_late_long", 16384]["needle_worst_depth"] == "1.0"
    assert stated(r"takes ([\d.]+) times fewer attention FLOPs at 32k and ([\d.]+) times at 131k") == pytest.approx(
        [float(late[f"times_fewer_flops{at}"]) for at in ("", "_131072")], abs=0.05
    )
    assert stated(r"in all layers takes ([\d.]+) times") == [
        pytest.approx(float(none["times_fewer_flops_131072"]), abs=0.05)
    ]
    counted = []
    for layers in (16, 32):
        config = LongNetConfig(
            num_hidden_layers=layers, dense_layers=[3 * layers // 4], segment_lengths=[2**i for i in range(11, 18)],
            dilation_rates=[2**i for i in range(7)], **PRESETS["retrofit"],
        )  # fmt: skip
        flops = [config.layer_pattern(i).attention_flops(2**17, 32, 64, num_kv_heads=8) for i in range(layers)]
        counted.append(layers * max(flops) / sum(flops))
    assert stated(r"([\d.]+) times at 131k with 16 layers, ([\d.]+) with 32") == pytest.approx(counted, abs=0.05)


def test_what_the_section_on_quality_adds_in_words_was_measured():
    first, muon, places, late = studies = [quality(study) for study in ("", "_muon", "_places", "_late")]
    window = [
        float(late["window_dense8_late", n]["perplexity"]) / float(late["retrofit_dense8_late", n]["perplexity"])
        for n in (16384, 32768)
    ]
    more = stated(r"costs ([\d.]+) % more perplexity at 16,384, ([\d.]+) at 32,768")
    assert more == pytest.approx([100 * (ratio - 1) for ratio in window], abs=0.051)
    pretrained = [pretraining_in_millions(study) for study in ("", "_muon", "_places")]
    assert stated(r"\((\d+)M to (\d+)M tokens of pretraining\)") == [min(pretrained), max(pretrained)]
    elsewhere = ("retrofit_dense8", "retrofit_dense8_long", "retrofit_dense8_early")
    found = [percent(row, "needle_mean") for study in studies for (name, _), row in study.items() if name in elsewhere]
    alone = (
        first["retrofit", 16384], muon["retrofit_long", 16384], places["retrofit", 16384], places["retrofit", 32768]
    )  # fmt: skip
    without = [percent(row, "needle_mean") for row in alone]
    shares = stated(
        r"2 or 4 of 8 found (\d+), (\d+), (\d+) and (\d+) % where none found (\d+), (\d+), (\d+) and (\d+) "
    )
    assert shares == [*found, *without]
    several = stated(r"layers 2 and 6 together found (\d+) and (\d+) %, layer 6 alone (\d+) and (\d+)\.")
    pairs = ("retrofit_dense4", "retrofit_dense8_late")
    assert several == [percent(places[name, n], "needle_mean") for name in pairs for n in (16384, 32768)]
    assert stated(r"its perplexity, ([\d.]+) % higher") == [
        pytest.approx(float(late["paper", 32768]["above_dense_percent"]), abs=0.05)
    ]
    long = [late[name, 16384] for name in ("retrofit_dense8_late_long", "dense_long")]
    chains = stated(r"followed in (\d+) % of the cases .*?, in (\d+) with dense attention")
    assert chains == [percent(row, "variable_tracking") for row in long]
    assert stated(r"counted right in (\d+) and (\d+) %") == [percent(row, "aggregation") for row in long]
    wide = first["retrofit_wide", 16384]
    assert stated(r"twice the trained context costs ([\d.]+) %, at ([\d.]+) times .*? found (\d+) %") == pytest.approx(
        [float(wide["above_dense_percent"]), float(wide["times_fewer_flops_131072"]), percent(wide, "needle_mean")],
        abs=0.06,
    )
    study = json.loads((ROOT / "benchmarks" / "results" / f"{QUALITY}_muon.json").read_text())
    at_depth = {r["variant"]: r["needle"] for r in study["tuned"]}
    assert stated(r"found in (\d+) % of the cases after 6.6M tokens and in all .*? after 79M, (\d+) % of what") == [
        round(100 * at_depth["retrofit"]["0.75"]), int(100 * at_depth["retrofit_longest"]["0.1"])
    ]  # fmt: skip
    assert at_depth["retrofit_long"]["0.75"] == 1.0 and at_depth["retrofit_longest"]["0.5"] < 0.1


def test_what_it_says_of_training_from_scratch_is_what_was_measured():
    study = json.loads(
        (ROOT / "benchmarks/results/retrofit_quality_NVIDIA-H100-80GB-HBM3_2026-11-27_scratch.json").read_text()
    )
    models = {r["variant"]: r for r in study["scratch"]}
    prose = " ".join(README.split())
    flops, *tokens = re.search(
        r"equal training FLOPs \(([\de.]+): (\d+)M tokens of 32,768 for dense attention, (\d+)M for `paper`, (\d+)M for it "
        r".*?, and [\d.]+ with a sliding window of (\d+)M tokens",
        prose,
    ).groups()
    stated = re.search(
        r"has perplexity (\d+), ([\d.]+) and ([\d.]+), and ([\d.]+) with a sliding window", prose
    ).groups()
    for name, million, perplexity in zip(("dense", "paper", "paper_magneto", "window"), tokens, stated):
        training = models[name]["training"]
        assert float(million) == pytest.approx(training["tokens"] / 1e6, abs=0.5)
        assert float(perplexity) == pytest.approx(math.exp(models[name]["nll"]), rel=0.005)
        assert float(flops) == pytest.approx(models[name]["training_flops"], rel=0.01)
    assert models["dense"]["attention_share"] == pytest.approx(4 / 5, abs=0.01)
    (behind,) = re.search(r"`paper` is (\d+) % behind a window", prose).groups()
    assert float(behind) == pytest.approx(100 * math.expm1(models["paper"]["nll"] - models["window"]["nll"]), abs=0.5)
    near = [float(x) for x in re.search(r"than at 8,192 \(([\d.]+) and ([\d.]+)\)", prose).groups()]
    assert near == pytest.approx([math.exp(models["paper"]["nll_at"][n]) for n in ("32768", "8192")], abs=0.06)
    millions = [float(x) for x in re.search(r"(\d+)M to (\d+)M parameters \(", prose).groups()]
    parameters = [r["parameters"] / 1e6 for r in models.values()]
    assert millions == pytest.approx([min(parameters), max(parameters)], abs=0.5)


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
