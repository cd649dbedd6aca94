"""The training benchmark and the study of quality: their own pieces are right, and their whole path runs small."""

import csv
import itertools
import json
import math
import os
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import random_tokens, tiny_model

from modeling_longnet import DilationPattern


ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import retrofit_quality  # noqa: E402
from job_claims import Job, claim, work_through  # noqa: E402
from long_context_probes import Prober, answered  # noqa: E402
from quality_corpus import Corpus, TrainingRows  # noqa: E402
from quality_report import judge  # noqa: E402
from retrofit_quality import OutOfTime, Settings, Study, affordable_steps  # noqa: E402
from retrofit_variants import (  # noqa: E402
    VARIANTS,
    apply,
    is_distinct,
    shifted_segments,
    with_offset_shift,
    with_sinks,
)


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
        if variant.times_tokens > 1:  # as another attends, for longer
            continue
        model = tiny_model("retrofit", num_hidden_layers=8)
        apply(model, variant, 8, 64, training=True)
        logits[name] = model(tokens, use_cache=False).logits
    for a, b in itertools.combinations(logits, 2):
        assert (logits[a] - logits[b]).abs().max() > 1e-3, f"{a} and {b} are one"
    for name in set(logits) - {"s2", "paper"}:  # ordinary attention inside the first segment
        torch.testing.assert_close(logits[name][:, :8], logits["dense"][:, :8])


def test_staggering_is_left_out_where_it_changes_nothing():
    config = tiny_model("retrofit").config
    config.num_key_value_heads = 4
    staggered = VARIANTS["retrofit_staggered"]
    assert not is_distinct(staggered, config, 8, 32) and is_distinct(staggered, config, 8, 64)
    assert is_distinct(VARIANTS["retrofit"], config, 8, 32)


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


def test_training_rows_answer_what_stands_before_the_question():
    seen = set()
    for seed in range(30):
        tokens, answers = prober(seed).training_row(4000, 5)
        assert len(tokens) == len(answers) == 4000
        assert not answers[tokens >= 200].any()  # never real text
        planted = tokens < 200
        lines = bytes(tokens[planted].tolist()).decode().splitlines()
        marked = iter(bytes(tokens[answers].tolist()).decode())
        values, votes, questions = {}, [], 0
        for line in filter(None, lines):
            asked = line.startswith(("assert ", "most_votes"))
            if asked:  # exactly the answer is marked
                answer = line.split('"')[1]
                assert "".join(next(marked) for _ in answer) == answer
            if line.startswith("most_votes"):
                assert answer == max(votes, key=votes.count)
            else:
                exec(line, {"vote": votes.append}, values)  # an assertion holds
            questions += asked
            seen.add(line.split("_")[0].split("(")[0])
        assert questions == 5 and next(marked, None) is None
    assert seen == {"secret", "assert secret", "vote", "most"}


def test_probes_with_equal_seeds_are_equal():
    torch.manual_seed(0)
    text = torch.randint(200, 250, (5000,))
    rows = [Prober(lambda t: list(t.encode()), text, 5).training_row(2000, 4)[0] for _ in range(2)]
    random.random()
    assert torch.equal(*rows)


def test_probes_asked_together_are_answered_as_if_alone():
    model = tiny_model("retrofit", vocab_size=256)
    maker = prober()
    probes = [maker.needle(300, depth / 5) for depth in range(5)]
    with torch.no_grad():  # one answer is right: what the model says anyhow
        for _ in range(5):
            logits = model(probes[2].tokens[None], use_cache=False).logits[0]
            probes[2].tokens[-5:] = logits[-6:-1].argmax(-1)
    alone = [answered(model, [probe]) for probe in probes]
    assert [right for right, _ in alone] == [0, 0, 1, 0, 0]
    assert answered(model, probes, batch=3) == pytest.approx((0.2, sum(nll for _, nll in alone) / 5), abs=1e-5)


class LetterCorpus(Corpus):
    """A corpus without a tokenizer: characters."""

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def tokens(self, name: str) -> torch.Tensor:
        return (torch.arange(20_000) % 50 + 200).to(torch.uint16)


def test_batches_depend_on_nothing_but_their_number():
    options = {"length": 1024, "batch_tokens": 8192, "probe_share": 0.5, "tokens_per_probe": 512}
    batches = [TrainingRows(LetterCorpus(Path()), "a", **options)[step] for step in (3, 3, 4)]
    assert torch.equal(batches[0][0], batches[1][0]) and not torch.equal(batches[0][0], batches[2][0])
    rows, answers = batches[0]
    assert rows.shape == answers.shape == (8, 1024) and rows.dtype == torch.int64
    assert 0 < answers.any(1).sum() < 8  # rows with questions and rows without


def test_the_loss_of_answers_is_that_of_their_tokens_alone():
    model = tiny_model("retrofit")
    rows, answers = random_tokens(2, 40), torch.zeros(2, 40, dtype=torch.bool)
    answers[0, 7:9] = answers[1, 39] = True
    text, answer = Study._losses(model, rows, answers)
    losses = -model(rows, use_cache=False).logits[:, :-1].log_softmax(-1).gather(2, rows[:, 1:, None])[..., 0]
    torch.testing.assert_close(text, losses.mean())
    torch.testing.assert_close(answer, torch.stack([losses[0, 6], losses[0, 7], losses[1, 38]]).mean())
    assert Study._losses(model, rows, torch.zeros_like(answers))[1] == 0


def test_held_out_pieces_lie_within_a_package_and_come_from_all(tmp_path):
    torch.manual_seed(0)
    ends = torch.tensor([250, 290, 700])
    corpus = Corpus(tmp_path)
    np.save(tmp_path / "held_out.npy", np.arange(700, dtype=np.uint16))
    np.save(tmp_path / "held_out_ends.npy", ends.numpy())
    pieces = corpus.pieces(100, 3)
    assert pieces[:, 0].tolist() == [0, 290, 100] and torch.equal(pieces[1], torch.arange(290, 390))
    with pytest.raises(SystemExit, match="no held-out package has 500 tokens"):
        corpus.pieces(500, 3)


def test_the_steps_that_a_time_allows():
    assert affordable_steps(20.0, 40.0, 100.0) == 90  # a second each; the first ten took longer
    assert affordable_steps(20.0, 40.0, 35.0) == 30


def test_a_job_is_done_by_one_process_and_a_failed_one_stops_no_other(tmp_path, capsys):
    done, reports = [], []

    def job(name, *needs, fails=False):
        def do():
            done.append(name)
            if fails:
                raise ValueError(f"{name} broke")
            (tmp_path / name).touch()

        return Job(tmp_path / name, do, tuple(tmp_path / need for need in needs))

    class Stop(Exception):
        pass

    waits = iter(range(3))

    def check_time(what):
        if what == "taken" and next(waits, None) is None:
            raise Stop

    jobs = [job("late", "first"), job("bad", fails=True), job("never", "bad"), job("first")]
    with pytest.raises(SystemExit, match="not done: bad, never;"):
        work_through(jobs, Stop, lambda: reports.append(1), check_time)
    assert done == ["bad", "first", "late"] and len(reports) == 3
    assert "bad broke" in capsys.readouterr().err
    done.clear()
    holder = subprocess.Popen(
        [sys.executable, "-c", "import sys, fcntl; f = open(sys.argv[1], 'w'); fcntl.flock(f, fcntl.LOCK_EX); "
         "print(flush=True); sys.stdin.read()", str(tmp_path / "taken.lock")],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    holder.stdout.readline()
    jobs = [job("taken"), job("free")]
    with pytest.raises(Stop):
        work_through(jobs, Stop, lambda: None, check_time)
    assert done == ["free"]
    holder.kill()  # who is killed leaves the job to others
    holder.communicate()
    with claim(tmp_path / "taken") as is_mine:
        assert is_mine


def test_the_verdict_compares_with_dense_attention_of_as_many_tokens():
    def result(variant, nll, tokens=100, needle=1.0, flops=10):
        return {
            "variant": variant, "length": 32768, "nll": nll, "nll_by_piece": [nll, nll],
            "training": {"tokens": tokens}, "needle": {"0.0": needle, "0.5": 1.0}, "attention_flops": flops,
            "attention_flops_131072": flops, "kv_entries": flops,
        }  # fmt: skip

    dense, longer = result("dense", 1.0, flops=90), result("dense_long", 0.5, 400, flops=90)
    good = [*judge([longer, dense, result("retrofit", 1.005), result("window", 1.02, flops=1)])]
    assert all(line.startswith("goal met") for line in good[:4])
    assert "perplexity at 32768 +0.50 %" in good[0] and "9.00 times fewer attention FLOPs at 131072" in good[2]
    assert good[4] == "at 32768, within 1 % of dense: retrofit has 9.00 times fewer attention FLOPs"
    bad = [*judge([dense, result("retrofit", 1.02, needle=0.9, flops=40)])]
    assert [line.split(":")[0] for line in bad] == ["goal missed"] * 4
    assert "worst depth 90 %" in bad[3]


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
    names = ["dense", "retrofit", "s2", "retrofit_staggered"]
    options = ["--work", "work", "--lengths", "1024", "--variants", *names]
    stopped = run(tmp_path, "retrofit_quality.py", *options, "--stages", "corpus", "--limit", "0")
    assert "stopped at the limit: next is held_out" in stopped
    finished = run(tmp_path, "retrofit_quality.py", *options, "--stages", "corpus", "pretrain", "tune", "report")
    assert "pretrain: step 4/4" in finished
    assert "pretrain" not in run(tmp_path, "retrofit_quality.py", *options, "--stages", "pretrain", "tune", "report")
    result = json.loads(next((tmp_path / "out").glob("*.json")).read_text())
    assert [tuned["variant"] for tuned in result["tuned"]] == sorted(names)
    for tuned in result["tuned"]:
        assert len(tuned["nll_by_position"]) == 32 and set(tuned["needle"]) >= {"0.0", "0.98"}
        assert set(tuned["nll_at"]) == {"256", "512", "1024"} and tuned["training"]["tokens"] == 2048
    # Inside the first segment every variant but S2 is ordinary attention, and dense is Llama, before tuning and after.
    before = result["base"]["on_text_of"]["1024"]["nll_at"]
    assert set(before) == {"256"} and abs(before["256"] - result["tuned"][0]["nll_at"]["256"]) < 0.1
    table = list(csv.DictReader(next((tmp_path / "out").glob("*.csv")).read_text().splitlines()))
    assert [row["variant"] for row in table] == names
    assert float(table[1]["times_fewer_flops"]) > 1.1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--lengths", "700"], "--lengths 700 does not fit retrofit: last_segment 700 is not first_segment 256 times"),
        (["--lengths", "1024", "512"], "--lengths must ascend from the trained context, 256, or more, got 1024 512"),
        (["--lengths", "128"], "--lengths must ascend from the trained context, 256, or more, got 128"),
        (["--variants", "dense@2048"], "dense at 2048: the lengths are 512, 1024 (--lengths)"),
        (["--tune-steps", "0"], "--tune-steps must be more than 0, got 0"),
        (["--work", "file"], "--work file is no folder"),
    ],
)
def test_settings_are_checked_before_they_are_kept(options, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("")
    monkeypatch.setattr(sys, "argv", ["retrofit_quality.py", "--small", "--work", "work", *options])
    with pytest.raises(SystemExit, match="2"):
        retrofit_quality.main()
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_variant_is_tuned_at_the_lengths_that_it_is_asked_for(tmp_path):
    study = Study(tmp_path, Settings.small(), 1e9, tmp_path)
    names = ["retrofit", "paper@1024", "dense@512", "window_dense8_late"]
    jobs = [job.result.stem for job in study.jobs(["tune"], names)]
    assert jobs == [
        "base", "tuned_dense_512", "tuned_retrofit_512", "tuned_retrofit_1024", "tuned_window_dense8_late_512",
        "tuned_paper_1024", "tuned_window_dense8_late_1024",
    ]  # fmt: skip


def test_training_stopped_and_resumed_is_training_in_one_go(tmp_path, monkeypatch):
    monkeypatch.setattr(Corpus, "tokens", LetterCorpus.tokens)
    monkeypatch.setattr(Corpus, "encode", LetterCorpus.encode)
    settings = replace(Settings.small(), liger=False)
    study = Study(tmp_path, settings, math.inf, tmp_path, workers=0)

    def model():
        torch.manual_seed(0)
        return tiny_model("retrofit", vocab_size=256)

    rows = study.rows("rows", 512, 1024)
    whole = model()
    taken = study.train("whole", whole, rows, 6, 1e-3)
    clock = iter([0.0] * 4 + [1e9] * 9)
    study.deadline = 1.0
    part = model()
    monkeypatch.setattr("retrofit_quality.time.monotonic", lambda: next(clock))
    with pytest.raises(OutOfTime, match="part stands at step 3 of 6"):
        study.train("part", part, rows, 6, 1e-3)
    monkeypatch.undo()
    monkeypatch.setattr(Corpus, "tokens", LetterCorpus.tokens)
    monkeypatch.setattr(Corpus, "encode", LetterCorpus.encode)
    study.deadline, resumed = math.inf, model()
    again = study.train("part", resumed, rows, 6, 1e-3)
    assert again["losses"] == taken["losses"] and again["tokens"] == taken["tokens"] == 6 * 1024
    for a, b in zip(whole.parameters(), resumed.parameters()):
        assert torch.equal(a, b)
    assert not list(tmp_path.glob("*.pt"))
