"""Runs that are killed and started again take the very steps that they would have taken."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
EXAMPLE = [str(ROOT / "examples" / "finetune_accelerate.py"), "--steps=24", "--checkpoints=checkpoints"]
TRAINER = """
import sys
import torch
from pathlib import Path
from transformers import Trainer, TrainingArguments, set_seed
from modeling_longnet import LongNetConfig, LongNetForCausalLM
from training.documents import python_packages
from training.packing import PackedRows

set_seed(0)
documents = ({"input_ids": list(d["text"].encode())} for d in python_packages())
rows = PackedRows([next(documents) for _ in range(3)], 128)
model = LongNetForCausalLM(LongNetConfig(
    vocab_size=256, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    segment_lengths=(64, 128), dilation_rates=(1, 2), attention_dropout=0.1,
))
arguments = TrainingArguments(
    "checkpoints", max_steps=24, save_steps=10, logging_steps=1, learning_rate=5e-3, report_to="none", use_cpu=True,
    dataloader_pin_memory=False, per_device_train_batch_size=2, activation_checkpointing=True, disable_tqdm=True,
)
resume = any(Path("checkpoints").glob("checkpoint-*/trainer_state.json"))
trainer = Trainer(model, arguments, train_dataset=rows)
trainer.train(resume_from_checkpoint=resume)
if resume:
    print("resumed at step")
print("losses:", *(f"{float(entry['loss']):.6f}" for entry in trainer.state.log_history if "loss" in entry))
"""
# The loop over so few rows that epochs end, with dropout: an epoch's start may draw no random numbers, as the resumed
# run has one more.
SHORT_EPOCHS = f"""
import functools, runpy, sys
import modeling_longnet
import training.documents

rows = int(sys.argv.pop(1))
training.documents.python_packages = lambda held_out: (
    {{"name": str(i), "text": chr(65 + i) * 64}} for i in range(rows)
)
modeling_longnet.LongNetConfig = functools.partial(modeling_longnet.LongNetConfig, attention_dropout=0.1)
runpy.run_path({EXAMPLE[0]!r}, run_name="__main__")
"""


def start(command: list[str], folder: Path) -> subprocess.Popen:
    folder.mkdir(exist_ok=True)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with (folder / "output").open("w") as output:
        return subprocess.Popen(
            [sys.executable, *command], cwd=folder, env=environment, stdout=output, stderr=subprocess.STDOUT
        )


def finish(command: list[str], folder: Path) -> str:
    process = start(command, folder)
    process.wait(timeout=300)
    printed = (folder / "output").read_text()
    assert process.returncode == 0, printed[-2000:]
    return printed


def losses(printed: str) -> list[str]:
    return re.search(r"^losses: (.*)$", printed, re.MULTILINE).group(1).split()


@pytest.mark.parametrize(
    ("command", "checkpoint"),
    [(EXAMPLE, "step_0000010"), (["-c", TRAINER], "checkpoint-10/trainer_state.json")],
    ids=["accelerate loop", "Trainer"],
)
def test_a_killed_run_goes_on_with_equal_losses(command, checkpoint, tmp_path):
    whole = losses(finish(command, tmp_path / "whole"))
    assert len(whole) == 24
    assert float(whole[-1]) < float(whole[0])

    killed = start(command, tmp_path / "killed")
    deadline = time.monotonic() + 200
    while not (tmp_path / "killed" / "checkpoints" / checkpoint).exists():
        assert killed.poll() is None, (tmp_path / "killed" / "output").read_text()[-2000:]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert "losses:" not in (tmp_path / "killed" / "output").read_text(), "it was to be killed before its end"

    printed = finish(command, tmp_path / "killed")
    assert "resumed at step" in printed
    assert losses(printed) == whole


@pytest.mark.parametrize("rows", [60, 40, 37, 36], ids=lambda rows: f"epochs of {rows / 4} steps")
def test_ten_steps_and_then_two_equal_twelve_wherever_an_epoch_ends(rows, tmp_path):
    command = ["-c", SHORT_EPOCHS, str(rows), "--length=64", "--checkpoints=checkpoints"]
    whole = losses(finish([*command, "--steps=12"], tmp_path / "whole"))
    assert len(whole) == 12
    assert losses(finish([*command, "--steps=10"], tmp_path / "stopped")) == whole[:10]
    printed = finish([*command, "--steps=12"], tmp_path / "stopped")
    assert "resumed at step 10" in printed
    assert losses(printed) == whole
