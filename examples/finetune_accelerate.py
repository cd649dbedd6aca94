"""Fine-tune in a plain loop with Accelerate: LoRA on a converted checkpoint, or on a small random model.

python examples/finetune_accelerate.py
accelerate launch examples/finetune_accelerate.py --model FOLDER     one process or many, CPU or GPU
"""

import argparse
import sysconfig
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from modeling_longnet import LongNetConfig, LongNetForCausalLM


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", help="LongNet checkpoint with its tokenizer (default: random weights, bytes as tokens)")
parser.add_argument("--length", type=int, default=256, help="tokens per row: %(default)s")
parser.add_argument("--steps", type=int, default=60)
args = parser.parse_args()

set_seed(0)
text = (Path(sysconfig.get_path("stdlib")) / "argparse.py").read_text(encoding="utf-8")
if args.model is None:
    config = LongNetConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        segment_lengths=(64, 128, 256), dilation_rates=(1, 2, 4), initializer_range=0.1,
    )  # fmt: skip
    model, tokens = LongNetForCausalLM(config), list(text.encode())
else:
    model = AutoModelForCausalLM.from_pretrained(args.model)
    tokens = AutoTokenizer.from_pretrained(args.model)(text, verbose=False)["input_ids"]
model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32))

rows = torch.tensor(tokens[: len(tokens) // args.length * args.length]).view(-1, args.length)
accelerator = Accelerator()
optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=5e-3)
loader = DataLoader(rows, batch_size=4, shuffle=True, drop_last=True)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)


def loss_of(rows: torch.Tensor) -> torch.Tensor:
    return model(input_ids=rows, labels=rows, use_cache=False).loss


sample = rows[::8].to(accelerator.device)
with torch.no_grad():
    before = loss_of(sample).item()
batches = iter(())
for _ in tqdm(range(args.steps), disable=not accelerator.is_main_process):
    batch = next(batches, None)
    if batch is None:  # the next epoch
        batches = iter(loader)
        batch = next(batches)
    accelerator.backward(loss_of(batch))
    optimizer.step()
    optimizer.zero_grad()

with torch.no_grad():
    after = loss_of(sample).item()
if after >= before:
    raise SystemExit(f"the loss did not fall: {before:.3f}, then {after:.3f}")
accelerator.print(f"checked: in {args.steps} steps of LoRA the loss falls from {before:.3f} to {after:.3f}")
