"""The examples run as a user runs them, offline, and print the facts they promise."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from checkpoints import make_checkpoint, make_tokenizer
from peft import AutoPeftModelForCausalLM, PeftModel
from PIL import Image
from safetensors import safe_open
from tiny_models import tiny_config
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from modeling_longnet import LongNetForCausalLM


ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
MAIN_JOB = "retrofit_llama"

# What each short example says last, once its own check has passed.
FACTS = {
    "finetune_accelerate": r"in 60 steps of LoRA held-out perplexity falls from \S+ to \S+",
    "generate": r"a padded row generates what it generates alone; the cache holds \d+ keys for 739 tokens",
    "packed_documents": r"packed loss (\S+) equals that of the documents alone, (\S+)",
    "pattern_reach": r"the cost formulas count what is drawn",
    "quickstart": r"one branch over the whole text equals ordinary attention \(largest difference \S+e-1\d\)",
    "train_from_scratch": r"in 40 steps the loss falls from \S+ to \S+ per byte",
    "train_long_sequence": r"in 30 steps the loss falls from \S+ to \S+ per byte, on sequences of 1024 bytes over 1 rank",
}


def run(command: list, folder: Path) -> subprocess.CompletedProcess:
    """Run a command in ``folder``, with the packages of this checkout and no network."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [str(part) for part in command], cwd=folder, env=environment, stdin=subprocess.DEVNULL, capture_output=True,
        text=True, timeout=300,
    )  # fmt: skip


def run_main_job(folder: Path, *options: str) -> subprocess.CompletedProcess:
    return run([sys.executable, EXAMPLES / f"{MAIN_JOB}.py", *options], folder)


def assert_fact(finished: subprocess.CompletedProcess, fact: str) -> None:
    assert finished.returncode == 0, finished.stderr
    assert re.fullmatch(f"checked: {fact}", finished.stdout.splitlines()[-1]), finished.stdout


def test_every_example_is_held_to_a_fact():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {*FACTS, MAIN_JOB}


@pytest.mark.parametrize("name", FACTS)
def test_short_examples_are_short(name):
    most = 140 if name == "finetune_accelerate" else 80  # a recipe to start from, not a first look
    assert len((EXAMPLES / f"{name}.py").read_text().splitlines()) < most


@pytest.mark.parametrize("name", FACTS)
def test_example_prints_its_fact(name, tmp_path):
    assert_fact(run([sys.executable, EXAMPLES / f"{name}.py"], tmp_path), FACTS[name])
    assert list(tmp_path.iterdir()) == [], "an example leaves files behind"


@pytest.mark.parametrize("name", FACTS)
def test_help_explains_an_example_and_runs_nothing(name, tmp_path):
    finished = run([sys.executable, EXAMPLES / f"{name}.py", "--help"], tmp_path)
    assert finished.returncode == 0 and "checked:" not in finished.stdout
    assert f"usage: {name}.py [-h]" in finished.stdout
    first_words = (EXAMPLES / f"{name}.py").read_text()[3:40]
    assert first_words in " ".join(finished.stdout.split())
    assert list(tmp_path.iterdir()) == []


def test_examples_refuse_what_they_cannot_train(tmp_path):
    LlamaConfig(num_hidden_layers=1).save_pretrained(tmp_path / "llama")
    for name, options, message in (
        ("train_long_sequence", ["--length", "0"], "--length must be at least 2 and --steps at least 1, got 0 and 30"),
        (
            "train_long_sequence",
            ["--steps", "0"],
            "--length must be at least 2 and --steps at least 1, got 1024 and 0",
        ),
        ("finetune_accelerate", ["--model", "llama"], "--model llama is a llama model, no LongNet; convert it first"),
        ("finetune_accelerate", ["--model", "/no/such"], "--model /no/such cannot be read: "),
        ("finetune_accelerate", ["--output", "out"], "--output out takes the adapter of a --model, and must not"),
        (
            "finetune_accelerate",
            ["--model", "llama", "--output", "llama"],
            "--output llama takes the adapter of a --model, and must not exist",
        ),
    ):
        finished = run([sys.executable, EXAMPLES / f"{name}.py", *options], tmp_path)
        assert finished.returncode == 2 and message in finished.stderr.splitlines()[-1]
    assert [path.name for path in tmp_path.iterdir()] == ["llama"]


def test_accelerate_launch_runs_the_loop(tmp_path):
    options = ["--cpu", "--num_processes=1", "--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no"]
    launch = [sys.executable, "-m", "accelerate.commands.launch", *options]
    finished = run([*launch, EXAMPLES / "finetune_accelerate.py", "--steps=20"], tmp_path)
    assert_fact(finished, r"in 20 steps of LoRA held-out perplexity falls from \S+ to \S+")


FINE_TUNE = [sys.executable, EXAMPLES / "finetune_accelerate.py", "--length=128"]
FELL = r"held-out perplexity falls from \S+ to \S+"


def make_longnet(folder: Path, seed: int, **fields) -> None:
    """Save a random LongNet model that a few steps can tune, with its tokenizer."""
    torch.manual_seed(seed)
    fields = {
        "vocab_size": 288,
        "segment_lengths": (64, 128),
        "dilation_rates": (1, 2),
        "initializer_range": 0.1,
    } | fields
    LongNetForCausalLM(tiny_config("retrofit", **fields)).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)


@pytest.fixture(scope="module")
def tuned(tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess]:
    """Tune a model for 30 steps; give the folder it ran in, where another model of the same shape lies, and its outcome."""
    folder = tmp_path_factory.mktemp("tuned")
    make_longnet(folder / "model", seed=0)
    make_longnet(folder / "other", seed=1)
    command = [*FINE_TUNE, "--model=model", "--steps=30", "--checkpoints=checkpoints", "--output=adapter"]
    return folder, run(command, folder)


def tensors_of(path: Path) -> dict[str, torch.Tensor]:
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_fine_tuning_leaves_an_adapter_that_peft_loads(tuned, monkeypatch):
    folder, finished = tuned
    assert_fact(finished, f"in 30 steps of LoRA {FELL}")
    monkeypatch.chdir(folder)
    base = AutoModelForCausalLM.from_pretrained("model")
    tokens = AutoTokenizer.from_pretrained("adapter")("def main(argument): return argument", return_tensors="pt")
    untuned = base(**tokens).logits
    automatic = AutoPeftModelForCausalLM.from_pretrained("adapter")  # knows its base model and its kind
    expected = automatic(**tokens).logits
    torch.testing.assert_close(PeftModel.from_pretrained(base, "adapter")(**tokens).logits, expected)
    assert (expected - untuned).abs().max() > 0.1
    held = tensors_of(folder / "checkpoints" / "step_0000030" / "model.safetensors")
    ours = {name: x for name, x in automatic.named_parameters() if "lora_" in name}
    assert held.keys() == ours.keys() and all(torch.equal(held[name], x) for name, x in ours.items())


def test_checkpoints_hold_what_is_trained_and_the_last_two_stay(tuned):
    checkpoints = tuned[0] / "checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step_0000020", "step_0000030"]
    base = sum(path.stat().st_size for path in (tuned[0] / "model").glob("*.safetensors"))
    names = tensors_of(checkpoints / "step_0000030" / "model.safetensors").keys()
    assert names and all(".lora_" in name for name in names)
    assert (checkpoints / "step_0000030" / "model.safetensors").stat().st_size < base / 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--model=other"],
            r"was saved with weights \w{16} \(of model\), this run has \w{16} \(of other\); repeat",
        ),
        ([], r"was saved with weights \w{16} \(of model\), this run has \w{16} \(of None\)"),
        (["--model=model", "--tune-embeddings"], "was saved with tune_embeddings False .* this run has True"),
        (["--model=model", "--learning-rate=0.1"], "was saved with learning_rate 0.005 .* this run has 0.1"),
        (["--model=model", "--length=64"], "was saved with length 128 .* this run has 64"),
        (["--model=model", "--steps=20"], "has taken 30 steps already; ask for as many or more"),
    ],
    ids=["another model", "no model", "embeddings", "learning rate", "length", "steps"],
)
def test_a_checkpoint_of_another_run_is_refused_in_a_line(tuned, options, message):
    finished = run([*FINE_TUNE, "--steps=30", "--checkpoints=checkpoints", *options], tuned[0])
    assert finished.returncode == 2 and "Traceback" not in finished.stderr and "checked:" not in finished.stdout
    assert re.search(f"error: --checkpoints: checkpoints/step_0000030 {message}", finished.stderr.splitlines()[-1]), (
        finished.stderr
    )


def test_a_folder_of_somebody_else_is_no_checkpoint(tmp_path):
    (tmp_path / "checkpoints" / "step_1").mkdir(parents=True)
    finished = run([*FINE_TUNE, "--checkpoints=checkpoints"], tmp_path)
    assert finished.returncode == 2
    assert "checkpoints/step_1 holds no saved step" in finished.stderr.splitlines()[-1]
    assert (tmp_path / "checkpoints" / "step_1").is_dir()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_a_resumed_run_ends_with_the_adapter_of_one_that_was_not_stopped(tied, tmp_path, monkeypatch):
    make_longnet(tmp_path / "model", seed=0, tie_word_embeddings=tied)
    command = [*FINE_TUNE, "--model=model", "--tune-embeddings"]
    first = run([*command, "--steps=20", "--checkpoints=checkpoints", "--output=halfway"], tmp_path)
    assert_fact(first, f"in 20 steps of LoRA {FELL}")
    resumed = run([*command, "--steps=30", "--checkpoints=checkpoints", "--output=resumed"], tmp_path)
    assert_fact(resumed, f"in 30 steps of LoRA, 10 of them in this run, {FELL}")
    whole = run([*command, "--steps=30", "--output=whole"], tmp_path)
    assert_fact(whole, f"in 30 steps of LoRA {FELL}")
    halfway, ours, theirs = (
        tensors_of(tmp_path / name / "adapter_model.safetensors") for name in ("halfway", "resumed", "whole")
    )
    assert any("embed_tokens" in name for name in theirs) and ours.keys() == theirs.keys()
    assert all(torch.equal(x, theirs[name]) for name, x in ours.items())
    assert not all(torch.equal(x, halfway[name]) for name, x in ours.items())
    monkeypatch.chdir(tmp_path)
    assert AutoPeftModelForCausalLM.from_pretrained("resumed").config.tie_word_embeddings == tied


@pytest.fixture(scope="module")
def finished_main_job(tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess]:
    """Run the main job on little text; give the folder it ran in and what it printed."""
    folder = tmp_path_factory.mktemp("main_job")
    return folder, run_main_job(folder, "--quick")


def table(finished: subprocess.CompletedProcess) -> dict[str, list[float]]:
    """Read the printed table: per model the perplexities at 1, 2 and 4 contexts, MFLOP and MB."""
    assert finished.returncode == 0, finished.stderr
    rows = re.findall(r"^(source|converted, untouched|converted and tuned) +(\d.*)$", finished.stdout, re.MULTILINE)
    return {name: [float(x.replace(",", "")) for x in re.findall(r"[\d.,]+", row)] for name, row in rows}


def test_main_job_measures_what_tuning_and_dilation_change(finished_main_job):
    source, untouched, tuned = table(finished_main_job[1]).values()
    assert tuned[2] < untouched[2]
    assert tuned[3:] == untouched[3:]
    # 2 layers, 256 tokens, keys and values of width 64 in float32; attention 4 * 64 operations per pair of tokens.
    assert source[4] == round(2 * 256 * 2 * 64 * 4 / 1e6, 2)
    assert source[3] == round(2 * 256 * 257 / 2 * 4 * 64 / 1e6, 1)
    # Segments 64, 128, 256 with rates 1, 2, 4 hold 64 + 64 / 2 + 128 / 4 of 256 entries: half.
    assert untouched[4] == round(source[4] / 2, 2)
    assert untouched[3] < 0.7 * source[3]


def test_main_job_leaves_a_model_that_loads_without_the_package(finished_main_job):
    folder = finished_main_job[0] / "demo_output"
    load = (
        "import os, sys; sys.modules['modeling_longnet'] = None; os.environ['HF_MODULES_CACHE'] = '../modules';"
        "from transformers import AutoModelForCausalLM, AutoTokenizer;"
        "model = AutoModelForCausalLM.from_pretrained('tuned', trust_remote_code=True);"
        "tokens = AutoTokenizer.from_pretrained('tuned', trust_remote_code=True)('import os', return_tensors='pt');"
        "print(model.config.segment_lengths, model.generate(**tokens, max_new_tokens=2).shape[0])"
    )
    finished = run([sys.executable, "-c", load], folder)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.splitlines()[-1] == "(64, 128, 256) 1"


def test_main_job_takes_a_checkpoint_whose_config_leaves_the_width_of_heads_out(tmp_path):
    make_checkpoint(tmp_path / "qwen2", family="qwen2")
    assert "head_dim" not in json.loads((tmp_path / "qwen2" / "config.json").read_text())
    source, untouched, tuned = table(
        run_main_job(tmp_path, "--quick", "--model=qwen2", "--learning-rate=0.01")
    ).values()
    assert tuned[2] < untouched[2]
    assert source[3] == round(2 * 256 * 257 / 2 * 4 * 32 / 1e6, 1)  # 4 heads of width 8
    converted = json.loads((tmp_path / "demo_output" / "converted" / "config.json").read_text())
    assert converted["rope_parameters"]["rope_theta"] == pytest.approx(10000.0 * 4 ** (8 / 6))


def test_main_job_draws_all_three_models(finished_main_job):
    with Image.open(finished_main_job[0] / "demo_output" / "perplexity.png") as image:
        colours = {colour for _, colour in image.convert("RGB").getcolors(maxcolors=2**24)}
    assert {(31, 119, 180), (255, 127, 14), (44, 160, 44)} <= colours


def test_second_run_reuses_the_llama_and_keeps_its_rope(finished_main_job):
    folder, first = finished_main_job
    second = run_main_job(folder, "--quick", "--rope-stretch=1", "--tune-steps=8")
    assert "Train a tokenizer" in first.stdout
    assert "Train a tokenizer" not in second.stdout
    rows = table(second)
    assert rows["source"] == table(first)["source"]
    # Inside its first segment a converted model with its source's RoPE is its source.
    assert rows["converted, untouched"][0] == rows["source"][0]


@pytest.fixture(scope="module")
def main_job() -> ModuleType:
    """Import the main job as a module, to call its parts."""
    specification = importlib.util.spec_from_file_location(MAIN_JOB, EXAMPLES / f"{MAIN_JOB}.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_output_folder_with_foreign_files_is_refused_and_left_alone(main_job, tmp_path):
    (tmp_path / "tuned").mkdir()
    (tmp_path / "tuned" / "weights").write_text("somebody's")
    with pytest.raises(SystemExit, match="holds tuned, not made by this script"):
        main_job.claim_output(tmp_path)
    main_job.write_marker(tmp_path, None)
    (tmp_path / "notes.txt").write_text("somebody's")
    with pytest.raises(SystemExit, match=r"holds notes\.txt, not made by this script"):
        main_job.claim_output(tmp_path)
    assert (tmp_path / "tuned" / "weights").read_text() == "somebody's"


def test_own_output_folder_is_cleared_but_for_the_llama(main_job, tmp_path):
    folder = tmp_path / "output"
    main_job.claim_output(folder)
    main_job.write_marker(folder, {"steps": 3})
    for name in ("source", "converted", "tuned"):
        (folder / name).mkdir()
        (folder / name / "weights").write_text("")
    (folder / "perplexity.png").write_text("")
    main_job.claim_output(folder)
    assert sorted(path.name for path in folder.iterdir()) == sorted([main_job.MARKER, "source"])
    assert main_job.read_marker(folder) == {"steps": 3}


def test_source_inside_the_output_is_refused(main_job, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main_job.parse_arguments([f"--output={tmp_path}", f"--model={tmp_path / 'tuned'}"])
    assert "which is cleared; choose another --output" in capsys.readouterr().err


def test_held_out_files_are_not_trained_on(main_job):
    training, held_out = main_job.read_standard_library()
    assert 0.05 < len(held_out) / len(training) < 0.25
    shared = {text for text in training if len(text) > 100} & set(held_out)
    assert not shared
    assert main_job.read_standard_library() == (training, held_out)


def test_held_out_pieces_are_whole_and_of_one_document(main_job):
    documents = [torch.arange(25), 100 + torch.arange(9), 200 + torch.arange(30)]
    pieces = main_job.held_out_pieces(documents, length=10, most=4)
    assert pieces[:, 0].tolist() == [0, 10, 200, 210]
    assert (pieces.diff() == 1).all()
    assert main_job.held_out_pieces(documents, length=10, most=2)[:, 0].tolist() == [0, 200]
    with pytest.raises(SystemExit, match=r"no held-out file has 31 tokens \(longest: 30\)"):
        main_job.held_out_pieces(documents, length=31, most=4)


def test_losses_are_the_models_own(main_job):
    torch.manual_seed(0)
    model = LongNetForCausalLM(tiny_config()).eval()
    pieces = torch.randint(model.config.vocab_size, (3, 50))
    losses = main_job.token_losses(model, pieces, "tiny")
    assert losses.shape == (3, 49)
    assert losses.mean().item() == pytest.approx(model(pieces, labels=pieces).loss.item(), rel=1e-4)


def test_perplexity_of_a_context_ends_with_its_last_token(main_job):
    losses = torch.tensor([[0.0, 2.0, 9.0], [2.0, 0.0, 9.0]])
    assert main_job.perplexity(losses, 3) == pytest.approx(2.718281828)
    assert main_job.perplexity(losses) == pytest.approx(torch.tensor(22 / 6).exp().item())


def test_tuning_that_does_not_help_fails_the_run(main_job):
    losses = {name: torch.full((1, 3), loss) for name, loss in zip(main_job.MODELS, (9.0, 1.0, 1.0))}
    with pytest.raises(SystemExit, match=r"tuning did not help: perplexity 2\.72 over 4 contexts, untouched 2\.72"):
        main_job.check_tuning_helped(losses)
    losses["converted and tuned"] -= 0.1
    main_job.check_tuning_helped(losses)


def test_changed_logits_after_reloading_fail_the_run(main_job, tmp_path, monkeypatch):
    torch.manual_seed(0)
    model = LongNetForCausalLM(tiny_config())
    tokens = torch.randint(model.config.vocab_size, (1, 20))
    monkeypatch.setattr(main_job, "load", lambda folder: LongNetForCausalLM(tiny_config()))
    tokenizer = main_job.train_tokenizer(["some text"], vocab_size=300)
    with pytest.raises(SystemExit, match="does not load as it was saved: logits differ by"):
        main_job.save_and_reload(model, tokenizer, tmp_path / "tuned", tokens)
