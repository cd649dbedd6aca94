"""Fine-tune on long documents in a plain loop with Accelerate: LoRA, packed rows, checkpoints that resume exactly.

    accelerate launch examples/finetune_accelerate.py --model FOLDER --length 32768      one process or many, CPU or GPU
    accelerate launch --config_file examples/accelerate_fsdp2.yaml examples/finetune_accelerate.py --model FOLDER

With ``--checkpoints`` the same command takes a killed run up again, and takes the very steps that it would have taken.
With ``--output`` the adapter and the tokenizer end there, for ``AutoPeftModelForCausalLM.from_pretrained``.
"""

import argparse
from importlib.util import find_spec
from itertools import chain, islice
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from datasets import IterableDataset
from peft import LoraConfig, get_peft_model
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from modeling_longnet import LongNetConfig, LongNetForCausalLM
from modeling_longnet.head_loss import next_tokens, token_losses
from training.documents import python_packages
from training.packing import PackedRows
from training.perplexity import PerplexityByPosition
from training.step_folders import Progress, StepFolders, digest_of_weights, save_adapter


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", help="LongNet checkpoint with its tokenizer (default: random weights, bytes as tokens)")
parser.add_argument("--length", type=int, default=256, help="tokens per row: %(default)s")
parser.add_argument("--steps", type=int, default=60)
parser.add_argument("--learning-rate", type=float, default=5e-3)
parser.add_argument("--qlora", action="store_true", help="hold --model in 4 bits (bitsandbytes)")
parser.add_argument("--tune-embeddings", action="store_true", help="train embeddings and norms too, not LoRA alone")
parser.add_argument("--checkpoints", type=Path, help="folder to save to, and to resume from; the last two are kept")
parser.add_argument("--output", type=Path, help="folder to create for the tuned adapter of --model and its tokenizer")
parser.add_argument("--log-with", choices=["tensorboard", "trackio"], help="follow the loss there")
args = parser.parse_args()
if args.qlora and not args.model:
    parser.error("--qlora holds the weights of --model in 4 bits; give --model")
if args.output and (not args.model or args.output.exists()):
    parser.error(f"--output {args.output} takes the adapter of a --model, and must not exist yet")
try:
    kind = AutoConfig.from_pretrained(args.model).model_type if args.model else "longnet"
except (OSError, ValueError) as error:
    parser.error(f"--model {args.model} cannot be read: {' '.join(str(error).split())}")
if kind != "longnet":
    parser.error(f"--model {args.model} is a {kind} model, no LongNet; convert it first (longnet-convert)")
if args.log_with and not find_spec(args.log_with):  # Accelerate would go on without a log
    parser.error(f"--log-with {args.log_with} needs the package; pip install {args.log_with}")
accelerator = Accelerator(log_with=args.log_with, project_dir=args.checkpoints or "logs")
set_seed(0)
if args.model is None:
    config = LongNetConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        segment_lengths=(64, 128, 256), dilation_rates=(1, 2, 4), initializer_range=0.1,
    )  # fmt: skip
    model, encode = LongNetForCausalLM(config), lambda text: list(text.encode())
else:
    four_bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(args.model, quantization_config=four_bits if args.qlora else None)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    encode = lambda text: tokenizer(text, verbose=False)["input_ids"]  # noqa: E731
settings = {"weights": digest_of_weights(model, accelerator)}  # what the steps follow from
beside_lora = ["embed_tokens", "norm", "input_layernorm", "post_attention_layernorm"]  # as LongLoRA does
model = get_peft_model(model, LoraConfig(
    task_type="CAUSAL_LM", r=16, lora_alpha=32, modules_to_save=beside_lora if args.tune_embeddings else None,
    ensure_weight_tying=args.tune_embeddings and model.config.tie_word_embeddings,
))  # fmt: skip
if args.length > 8192:  # then memory goes to activations
    model.base_model.model.activation_checkpointing_enable()
settings |= {name: getattr(args, name) for name in ("length", "learning_rate", "qlora", "tune_embeddings")}
folders = StepFolders(args.checkpoints, accelerator, settings, args.model)
try:
    resumed = folders.step(args.steps)
except ValueError as error:
    parser.error(f"--checkpoints: {error}")


def packed_rows(held_out: bool, rank: int = 0, world_size: int = 1) -> PackedRows:
    """Stream packages of Python source, whole, and pack them into rows; nothing is read before it is needed."""
    documents = IterableDataset.from_generator(python_packages, gen_kwargs={"held_out": held_out})
    documents = documents.map(lambda document: {"input_ids": encode(document["text"])}, remove_columns=["text"])
    return PackedRows(documents, args.length, buffer=4, rank=rank, world_size=world_size)


@torch.no_grad()
def perplexity_by_position() -> dict[str, float]:
    """Measure on rows of packages that are not trained on, without ever making all logits."""
    metric = PerplexityByPosition([args.length // 4, args.length // 2])
    unwrapped = accelerator.unwrap_model(model).base_model.model.eval()
    for row in islice(packed_rows(held_out=True), 8):
        row = {name: tensor[None].to(accelerator.device) for name, tensor in row.items()}
        hidden = unwrapped.model(row["input_ids"], position_ids=row["position_ids"], use_cache=False).last_hidden_state
        targets = next_tokens(row["labels"])
        losses = token_losses(hidden, unwrapped.lm_head, targets)
        positions = row["position_ids"].masked_fill(targets == -100, -100)
        metric.add_batch(predictions=losses.tolist(), references=positions.tolist())
    unwrapped.train()
    return metric.compute()


rows, progress = packed_rows(False, accelerator.process_index, accelerator.num_processes), Progress()
optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=args.learning_rate)
model, optimizer = accelerator.prepare(model, optimizer)  # not the loader: it would read one batch ahead
accelerator.register_for_checkpointing(rows, progress)
before = perplexity_by_position()
if resumed:
    folders.load()
    accelerator.print(f"resumed at step {len(progress.losses)}")
accelerator.init_trackers("finetune")
loader, batches = torch.utils.data.DataLoader(rows, batch_size=4, generator=torch.Generator()), iter(())
for step in tqdm(range(len(progress.losses), args.steps), disable=not accelerator.is_main_process):
    if (batch := next(batches, None)) is None:  # the start, or the next epoch
        batches = chain(loader, loader)  # nothing may be left of this one; its generator keeps out of dropout's
        batch = next(batches)
    loss = model(**{name: x.to(accelerator.device) for name, x in batch.items()}, use_cache=False).loss
    accelerator.backward(loss)
    optimizer.step()
    optimizer.zero_grad()
    progress.losses.append(loss.item())
    accelerator.log({"loss": loss.item()}, step=step)
    if args.checkpoints and (step + 1) % 10 == 0:
        folders.save(step + 1)
if args.output:
    save_adapter(args.output, accelerator, model, tokenizer)
    accelerator.print(f"wrote {args.output}")
after = perplexity_by_position()
accelerator.end_training()
fall = f"from {before['perplexity']:.2f} to {after['perplexity']:.2f}"
if not after["perplexity"] < before["perplexity"]:
    raise SystemExit(f"held-out perplexity did not fall: it went {fall}")
accelerator.print("held-out perplexity by position:", {name: round(x, 2) for name, x in after.items()})
accelerator.print("losses:", *(f"{loss:.6f}" for loss in progress.losses))
now = f", {args.steps - resumed} of them in this run," if resumed else ""
accelerator.print(f"checked: in {args.steps} steps of LoRA{now} held-out perplexity falls {fall}")
