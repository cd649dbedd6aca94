"""The training benchmark and the study of quality: their own pieces are right, and their whole path runs small."""

import csv
import itertools
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import random_tokens, tiny_model

from modeling_longnet import DilationPattern


ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

from long_context_probes import Prober  # noqa: E402
from retrofit_variants import VARIANTS, apply, shifted_segments, with_offset_shift, with_sinks  # noqa: E402


PATTERN = DilationPattern.preset("retrofit", (8, 16, 32, 64), (1, 2, 4, 8))
LENGTH, KV_HEADS, GROUP = 70, 2, 2


def attend(query, key, value, reaches) -> torch.Tensor:
    """Attend by hand to the keys that ``reaches(position, kv_head)`` names."""
    out = torch.zeros_like(query)
    for h in range(KV_HEADS * GROUP):
        for p in range(LENGTH):
            keys = sorted(reaches(p, h // GROUP))
            weights = (key[0, h // GROUP, keys] @ query[0, h, p] * 0.3).softmax(0)
            out[0, h, p] = weights @ value[0, h // GROUP, keys]
    return out


@pytest.fixture
def tensors():
    torch.manual_seed(0)
    return [torch.randn(1, heads, LENGTH, 8, dtype=torch.float64) for heads in (KV_HEADS * GROUP, KV_HEADS, KV_HEADS)]


def test_sinks_add_the_first_keys_once(tensors):
    expected = attend(*tensors, lambda p, g: {*PATTERN.reach(p, g, num_kv_heads=KV_HEADS), *range(min(p + 1, 4))})
    torch.testing.assert_close(with_sinks(*tensors, PATTERN, 0.3, sinks=4), expected)


@pytest.mark.parametrize("shift", [0, 2, 5])
def test_shifted_offsets_are_those_of_the_head_so_many_further(tensors, shift):
    def reaches(p, g):
        return {u for u in range(p + 1) if any(p - u < w and u % r == (g + shift) % r for w, r in PATTERN.branches)}

    torch.testing.assert_close(with_offset_shift(*tensors, PATTERN, 0.3, shift), attend(*tensors, reaches))


def test_segments_are_shifted_by_half_for_the_second_half_of_the_heads(tensors):
    expected = attend(*tensors, lambda p, g: {u for u in range(p + 1) if (u + 8 * g) // 16 == (p + 8 * g) // 16})
    torch.testing.assert_close(shifted_segments(*tensors, 16, 0.3), expected)


def test_each_variant_attends_in_its_own_way():
    tokens = random_tokens(1, 60)
    logits = {}
    for name, variant in VARIANTS.items():
        model = tiny_model("retrofit", num_hidden_layers=3)
        apply(model, variant, 8, 64, training=True)
        logits[name] = model(tokens, use_cache=False).logits
    for a, b in itertools.combinations(logits, 2):
        assert (logits[a] - logits[b]).abs().max() > 1e-3, f"{a} and {b} are one"
    for name in set(logits) - {"s2", "paper"}:  # ordinary attention inside the first segment
        torch.testing.assert_close(logits[name][:, :8], logits["dense"][:, :8])


def prober(seed=0) -> Prober:
    return Prober(lambda text: list(text.encode()), torch.randint(200, 250, (5000,)), seed)


def test_a_needle_stands_where_asked_for_and_is_the_answer():
    for depth in (0.0, 0.5, 1.0):
        probe = prober().needle(1000, depth)
        text = bytes(probe.tokens[probe.tokens < 200].tolist()).decode()
        lines = [line for line in text.splitlines() if line]
        name, value = lines[0].split(" = ")
        assert lines[1] == f"assert {name} == {value[:-1]}"
        assert bytes(probe.tokens[probe.answer_start :].tolist()).decode() == value[1:-1]
        assert len(probe.tokens) == 1000
        place = (probe.tokens == ord("=")).nonzero()[0].item() / 1000
        assert place == pytest.approx(depth, abs=0.06)


def test_a_chain_leads_to_its_answer_and_the_winner_has_most_votes():
    probe = prober().variable_tracking(1000)
    values = {}
    text = bytes(probe.tokens[probe.tokens < 200].tolist()).decode()
    *lines, question = [line for line in text.splitlines() if line]
    exec("\n".join(lines), values)
    exec(question + '"', values)  # an assertion
    probe = prober().aggregation(1000)
    text = bytes(probe.tokens[probe.tokens < 200].tolist()).decode()
    votes = []
    *lines, question = [line for line in text.splitlines() if line]
    exec("\n".join(lines), {"vote": votes.append})
    assert question == f'most_votes = "{max(votes, key=votes.count)}'


def test_a_copy_repeats_what_stood_at_its_distance():
    probe = prober().copy(1000, distance=300)
    assert torch.equal(probe.tokens[-64:], probe.tokens[-364:-300])
    assert probe.answer_start == 1000 - 48


def test_probes_with_equal_seeds_are_equal():
    torch.manual_seed(0)
    text = torch.randint(200, 250, (5000,))
    rows = [Prober(lambda t: list(t.encode()), text, 5).training_row(2000, 4) for _ in range(2)]
    random.random()
    assert torch.equal(*rows)


def run(folder: Path, script: str, *options: str) -> str:
    environment = {
        **os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'benchmarks'}", "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    finished = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / script), "--small", "--output", str(folder / "out"), *options],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


def test_the_training_benchmark_runs_small(tmp_path):
    printed = run(tmp_path, "benchmark_training.py", "--stages", "check", "short", "lora")
    assert "checked: retrofit with all tricks equals the plain step" in printed
    (path,) = (tmp_path / "out").glob("training_CPU_*.csv")
    rows = list(csv.DictReader(path.read_text().splitlines()[2:]))
    assert {row["attention"] for row in rows} == {"llama", "paper", "retrofit"}
    assert all(float(row["tokens_per_s"]) > 0 and not row["note"] for row in rows)
    assert path.with_suffix(".png").stat().st_size > 10_000


def test_the_study_of_quality_runs_small_and_goes_on_where_it_stopped(tmp_path):
    options = ["--work", "work", "--lengths", "512", "--variants", "dense", "retrofit", "s2", "retrofit_staggered"]
    stopped = run(tmp_path, "retrofit_quality.py", *options, "--stages", "corpus", "pretrain", "--limit", "0")
    assert "stopped at the limit: pretrain stands at step 0 of 4" in stopped
    finished = run(tmp_path, "retrofit_quality.py", *options, "--stages", "pretrain", "tune", "report")
    assert "pretrain: step 4/4" in finished
    assert "pretrain" not in run(tmp_path, "retrofit_quality.py", *options, "--stages", "pretrain", "tune", "report")
    result = json.loads(next((tmp_path / "out").glob("*.json")).read_text())
    assert [tuned["variant"] for tuned in result["tuned"]] == ["dense", "retrofit", "retrofit_staggered", "s2"]
    for tuned in result["tuned"]:
        assert len(tuned["nll_by_position"]) == 32 and set(tuned["needle"]) >= {"0.0", "0.98"}
        assert tuned["training"]["tokens"] == 2048
    # Inside the first segment every variant but S2 is ordinary attention, before tuning.
    table = list(csv.DictReader(next((tmp_path / "out").glob("*.csv")).read_text().splitlines()))
    assert [row["variant"] for row in table] == ["dense", "retrofit", "s2", "retrofit_staggered"]
    assert float(table[1]["times_fewer_flops"]) > 1.1
