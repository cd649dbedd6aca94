"""Other people's tools on a converted checkpoint: `make conformance` runs these, with the tools that they need.

lm-evaluation-harness, TRL, `transformers serve` and `transformers chat`, int8 weights of bitsandbytes and torchao.
"""

import json
import os
import random
import re
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import torch
from checkpoints import make_checkpoint
from tiny_models import random_tokens
from transformers import AutoModelForCausalLM, AutoTokenizer

from conversion import convert_checkpoint
from modeling_longnet import LongNetForCausalLM


ROOT = Path(__file__).parents[2]
FIRST_SEGMENT = 128


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A Llama and its conversion: equal on up to 128 tokens."""
    folder = tmp_path_factory.mktemp("tools")
    make_checkpoint(folder / "llama", max_position_embeddings=512)
    convert_checkpoint(
        folder / "llama",
        folder / "longnet",
        segment_lengths=(FIRST_SEGMENT, 256),
        dilation_rates=(1, 2),
        progress=False,
    )
    return folder


def environment(folder: Path, with_package: bool) -> dict[str, str]:
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hf_home"), "OMP_NUM_THREADS": "1"}
    return {**os.environ, **offline, "PYTHONPATH": str(ROOT) if with_package else ""}


def harness_scores(folder: Path, task_folder: Path) -> list:
    """Score a multiple-choice and a generation task with lm-evaluation-harness; one entry for each question."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    tokenizer = AutoTokenizer.from_pretrained(folder, pad_token="</s>")
    model = HFLM(str(folder), tokenizer=tokenizer, device="cpu", batch_size=4, dtype="float32", max_length=512)
    results = simple_evaluate(
        model,
        tasks=["choose_a_line", "write_a_line"],
        task_manager=TaskManager(include_path=str(task_folder), include_defaults=False),
        log_samples=True,
        bootstrap_iters=0,
    )
    return [
        (task, sample["doc_id"], sample["filtered_resps"])
        for task, samples in sorted(results["samples"].items())
        for sample in sorted(samples, key=lambda sample: sample["doc_id"])
    ]


def write_tasks(folder: Path) -> None:
    """Lines of Python's own library: which of four comes next, and writing on from one; lengths differ in each batch."""
    lines = [line for line in Path(os.__file__).read_text().splitlines() if 8 < len(line) < 40]
    draw = random.Random(0)
    questions = []
    for i in range(12):
        start = draw.randrange(len(lines) - 8)
        choices = [lines[start + 2], *draw.sample(lines, 3)]
        questions.append({"text": "\n".join(lines[start : start + 1 + i % 2]), "choices": choices, "answer": 0})
    (folder / "lines.jsonl").write_text("\n".join(map(json.dumps, questions)))
    common = f"""
dataset_path: json
dataset_kwargs:
  data_files:
    test: {folder / "lines.jsonl"}
test_split: test
doc_to_text: "{{{{text}}}}"
"""
    (folder / "choose.yaml").write_text(
        f"task: choose_a_line\noutput_type: multiple_choice\n{common}"
        'doc_to_choice: "{{choices}}"\ndoc_to_target: answer\nmetric_list:\n  - metric: acc\n'
    )
    (folder / "write.yaml").write_text(
        f"task: write_a_line\noutput_type: generate_until\n{common}"
        'doc_to_target: "{{choices[0]}}"\ngeneration_kwargs:\n  until: ["</s>"]\n  max_gen_toks: 16\n  do_sample: false\n'
        "metric_list:\n  - metric: exact_match\n"
    )


def test_lm_evaluation_harness_scores_a_conversion_as_its_source(checkpoints, tmp_path, monkeypatch):
    # Its likelihood batches are right-padded without a mask, its generation batches left-padded with one.
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    write_tasks(tmp_path)
    ours, theirs = (harness_scores(checkpoints / name, tmp_path) for name in ("longnet", "llama"))
    assert len(ours) == 24 and [entry[:2] for entry in ours] == [entry[:2] for entry in theirs]
    for (task, index, our_answers), (_, _, their_answers) in zip(ours, theirs):
        if task == "write_a_line":
            assert our_answers == their_answers, index
            assert len(set(map(str, our_answers))) >= 1
            continue
        likelihoods = [[answer[0] for answer in answers] for answers in (our_answers, their_answers)]
        assert likelihoods[0] == pytest.approx(likelihoods[1], abs=1e-3), index
        assert len(set(likelihoods[0])) > 1


def test_trl_tunes_a_conversion_for_one_step(checkpoints, tmp_path):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    model = LongNetForCausalLM.from_pretrained(checkpoints / "longnet")
    tokenizer = AutoTokenizer.from_pretrained(checkpoints / "longnet", pad_token="</s>")
    texts = Path(os.__file__).read_text().split("\n\n\n")[2:10]
    before = {name: p.clone() for name, p in model.named_parameters()}
    options = SFTConfig(
        output_dir=str(tmp_path), max_steps=1, per_device_train_batch_size=4, learning_rate=1e-2, use_cpu=True,
        report_to="none", save_strategy="no", max_length=512, logging_steps=1, disable_tqdm=True, bf16=False,
    )  # fmt: skip
    trainer = SFTTrainer(
        model, args=options, train_dataset=Dataset.from_dict({"text": texts}), processing_class=tokenizer
    )
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    with torch.no_grad():
        expected = model.eval()(**batch).loss
    trainer.train()
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(logged) == 1 and logged[0] == pytest.approx(expected.item(), rel=0.5)
    changed = [name for name, p in trainer.model.named_parameters() if not torch.equal(p.cpu(), before[name])]
    assert len(changed) == len(before)


@pytest.fixture(scope="module")
def server(checkpoints):
    """`transformers serve` on loopback, started through this package."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = (checkpoints / "serve.log").open("w")
    command = [sys.executable, "-m", "modeling_longnet", "serve", str(checkpoints / "longnet")]
    command += ["--port", str(port), "--host", "127.0.0.1", "--device", "cpu"]
    process = subprocess.Popen(
        command,
        env=environment(checkpoints, with_package=True),
        stdout=log,
        stderr=subprocess.STDOUT,
        cwd=checkpoints,
    )
    try:
        url = f"http://127.0.0.1:{port}"
        for _ in range(240):
            assert process.poll() is None, (checkpoints / "serve.log").read_text()[-3000:]
            try:
                urllib.request.urlopen(f"{url}/health", timeout=5).close()
                break
            except OSError:
                time.sleep(0.5)
        yield url
    finally:
        process.terminate()
        process.wait(30)
        log.close()


def test_transformers_serve_answers_as_the_model_does(checkpoints, server):
    messages = [{"role": "user", "content": "Which files are open? " * 20}]
    request = {"model": str(checkpoints / "longnet"), "messages": messages, "max_tokens": 12, "stream": False}
    request["generation_config"] = json.dumps({"do_sample": False, "max_new_tokens": 12})
    call = urllib.request.Request(
        f"{server}/v1/chat/completions", json.dumps(request).encode(), {"Content-Type": "application/json"}
    )
    answer = json.load(urllib.request.urlopen(call, timeout=300))["choices"][0]["message"]["content"]
    tokenizer = AutoTokenizer.from_pretrained(checkpoints / "longnet")
    model = AutoModelForCausalLM.from_pretrained(checkpoints / "longnet")
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    assert prompt["input_ids"].shape[1] > FIRST_SEGMENT
    tokens = model.generate(**prompt, max_new_tokens=12, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert answer == tokenizer.decode(tokens, skip_special_tokens=True)


def test_transformers_chat_talks_to_the_server(checkpoints, server):
    command = [sys.executable, "-m", "transformers.cli.transformers", "chat", str(checkpoints / "longnet"), server]
    # It asks whether to go on when an answer ends at the limit: no.
    process = subprocess.run(
        [*command, "max_new_tokens=40", "do_sample=False"], input="Which files are open?\nn\n!exit\n!exit\n", text=True,
        env=environment(checkpoints, with_package=False) | {"HF_HUB_OFFLINE": "0"},  # it refuses loopback too
        cwd=checkpoints, capture_output=True, timeout=300,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr[-3000:]
    tokenizer = AutoTokenizer.from_pretrained(checkpoints / "longnet")
    model = AutoModelForCausalLM.from_pretrained(checkpoints / "longnet")
    messages = [{"role": "user", "content": "Which files are open?"}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    tokens = model.generate(**prompt, max_new_tokens=40, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    answer = tokenizer.decode(tokens, skip_special_tokens=True)
    shown = process.stdout.partition(f"<{checkpoints / 'longnet'}>:")[2].partition("tokens in")[0]
    # Letters: a terminal breaks lines, markup eats punctuation, a stream ends before half a character.
    shown, expected = (re.findall("[A-Za-z]", text) for text in (shown, answer))
    assert len(expected) > 8 and shown == expected, process.stdout


@pytest.mark.parametrize("tool", ["bitsandbytes", "torchao"])
def test_int8_weights_load_and_stay_close(checkpoints, tool):
    from transformers import BitsAndBytesConfig, TorchAoConfig

    if tool == "bitsandbytes":
        quantization = BitsAndBytesConfig(load_in_8bit=True)
    else:
        from torchao.quantization import Int8WeightOnlyConfig

        quantization = TorchAoConfig(Int8WeightOnlyConfig())
    folder, tokens = checkpoints / "longnet", random_tokens(1, 300)
    model = AutoModelForCausalLM.from_pretrained(folder)
    quantized = AutoModelForCausalLM.from_pretrained(folder, quantization_config=quantization, device_map="cpu")
    weight = quantized.model.layers[0].self_attn.q_proj.weight
    assert weight.dtype == torch.int8 or "int8" in type(weight).__name__.lower() or "int8" in repr(weight).lower()
    source = AutoModelForCausalLM.from_pretrained(
        checkpoints / "llama", quantization_config=quantization, device_map="cpu"
    )
    with torch.no_grad():
        exact, rounded = model(tokens).logits, quantized(tokens).logits.float()
        short = tokens[:, :FIRST_SEGMENT]  # here the quantized conversion is the quantized source
        torch.testing.assert_close(quantized(short).logits, source(short).logits, rtol=1e-2, atol=1e-2)
    error = (rounded - exact).norm() / exact.norm()
    assert 0 < error < 0.1, error
    generated = quantized.generate(tokens, max_new_tokens=5, do_sample=False)
    assert generated.shape == (1, 305)
