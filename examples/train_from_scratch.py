"""Train a small LongNet from scratch with the stock Trainer, on the bytes of Python's own source files."""

import argparse
import sysconfig
import tempfile
from pathlib import Path

import torch
from transformers import Trainer, TrainingArguments, set_seed

from modeling_longnet import DilationPattern, LongNetConfig, LongNetForCausalLM


LENGTH, STEPS = 512, 40

argparse.ArgumentParser(description=__doc__).parse_args()
set_seed(0)
library = Path(sysconfig.get_path("stdlib"))
text = b"".join((library / f"{name}.py").read_bytes() for name in ("argparse", "ast", "inspect", "subprocess"))
rows = torch.tensor(list(text[: len(text) // LENGTH * LENGTH])).view(-1, LENGTH)

# The paper's rules; segments 64, 128, 256, 512 with rates 1, 2, 4, 8.
pattern = DilationPattern.geometric(64, 512, preset="paper")
config = LongNetConfig(
    vocab_size=256, hidden_size=64, intermediate_size=160, num_hidden_layers=2, num_attention_heads=8,
    max_position_embeddings=LENGTH, initializer_range=0.05,
    segment_lengths=pattern.segment_lengths, dilation_rates=pattern.dilation_rates,
)  # fmt: skip
model = LongNetForCausalLM(config)
print(f"{model.num_parameters():,} parameters, {len(rows)} rows of {LENGTH} bytes")

with tempfile.TemporaryDirectory() as folder:
    arguments = TrainingArguments(
        folder, max_steps=STEPS, per_device_train_batch_size=4, learning_rate=5e-3, lr_scheduler_type="cosine",
        warmup_steps=4, logging_steps=10, save_strategy="no", report_to="none",
        dataloader_pin_memory=torch.cuda.is_available(), seed=0,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=[{"input_ids": row, "labels": row} for row in rows])
    trainer.train()

losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
first, last = float(losses[0]), float(losses[-1])
if last > 0.8 * first:
    raise SystemExit(f"the loss fell only from {first:.2f} to {last:.2f}")
print(f"checked: in {STEPS} steps the loss falls from {first:.2f} to {last:.2f} per byte")
