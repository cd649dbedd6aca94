"""Train on long sequences with LongNetTrainer, each shared by all GPUs of the launch: sequence parallelism and FSDP2.

python examples/train_long_sequence.py                                        one CPU or GPU
accelerate launch --num_processes 8 --use_fsdp --fsdp_version 2 \\
    --fsdp_auto_wrap_policy TRANSFORMER_BASED_WRAP examples/train_long_sequence.py --length 1048576
"""

import argparse
import os
import sysconfig
import tempfile
from pathlib import Path

import torch
from accelerate import ParallelismConfig
from accelerate.utils import set_seed
from transformers import TrainingArguments

from modeling_longnet import LongNetConfig, LongNetForCausalLM, LongNetTrainer


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--length", type=int, default=1024, help="bytes per sequence: %(default)s")
parser.add_argument("--steps", type=int, default=30)
args = parser.parse_args()
if args.length < 2 or args.steps < 1:
    parser.error(f"--length must be at least 2 and --steps at least 1, got {args.length} and {args.steps}")

set_seed(0)
# All of Python's own sources as bytes, in rows as long as asked for.
paths = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
data = b"".join(path.read_bytes() for path in paths)
rows = [torch.tensor(list(data[i : i + args.length])) for i in range(0, 64 * args.length, args.length)]
rows = [row for row in rows if len(row) == args.length]
if not rows:
    raise SystemExit(f"there are {len(data)} bytes of text, fewer than one sequence of {args.length}")

segments = [64, 256, 1024]
config = LongNetConfig(
    vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
    segment_lengths=segments, dilation_rates=[1, 4, 16], max_position_embeddings=args.length, initializer_range=0.1,
)  # fmt: skip
ranks = int(os.environ.get("WORLD_SIZE", 1))
if ranks > 1 and not torch.cuda.is_available():
    raise SystemExit(f"Accelerate spreads a sequence over GPUs only, and {ranks} ranks run on CPUs; launch one")
with tempfile.TemporaryDirectory() as folder:
    arguments = TrainingArguments(
        output_dir=folder, max_steps=args.steps, per_device_train_batch_size=1, learning_rate=1e-2, logging_steps=1,
        save_strategy="no", report_to="none", disable_tqdm=True,
        # The one line that spreads each sequence over the ranks; the data loader gives all of them the same rows.
        parallelism_config=ParallelismConfig(cp_size=ranks) if ranks > 1 else None,
    )  # fmt: skip
    trainer = LongNetTrainer(
        LongNetForCausalLM(config), arguments, train_dataset=[{"input_ids": row, "labels": row} for row in rows]
    )
    trainer.train()

losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
assert sum(losses[-3:]) < 0.8 * sum(losses[:3]), losses
if trainer.is_world_process_zero():
    print(
        f"checked: in {args.steps} steps the loss falls from {losses[0]:.3f} to {losses[-1]:.3f} per byte, "
        f"on sequences of {args.length} bytes over {ranks} rank{'s' if ranks > 1 else ''}"
    )
