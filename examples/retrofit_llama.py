"""Give a Llama checkpoint dilated attention and four times its context: convert, tune, measure, merge, generate.

    python examples/retrofit_llama.py                        a small Llama trained here, offline, on Python's own source
    python examples/retrofit_llama.py --model FOLDER_OR_ID   a checkpoint of yours (a GPU helps)

The text is the Python standard library: real, long, and present wherever this script runs. One file in eight is held
out, and every model is measured on the same pieces of those files, each four contexts long.

What the default run shows is the path, and that tuning repairs what longer distances break. It does not show that far
text helps: that Llama is too small and too briefly trained to use any. Perplexity over 1,024 tokens is 24.3 with this
pattern tuned and 24.5 with dense attention tuned alike, but 24.2 with a bare sliding window of 256 tokens, untuned.
"""

import argparse
import json
import math
import shutil
import subprocess
import sys
import sysconfig
import warnings
import zlib
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import PartialState
from matplotlib.figure import Figure
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from tqdm import tqdm
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorWithFlattening,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    set_seed,
)

from modeling_longnet import DilationPattern, LongNetConfig


# peft 0.21 asks transformers 5.23 by an old name; nothing that a user of this script could change.
warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)

STRETCH = 4
MARKER = "retrofit_llama.json"
PRODUCTS = ("source", "converted", "tuned", "perplexity.png", MARKER)
# Not prose of programmers but tables, or not in every Python.
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data"}
MODELS = ("source", "converted, untouched", "converted and tuned")


def main() -> None:
    args = parse_arguments()
    claim_output(args.output)
    training_texts, held_out_texts = read_standard_library(one_in=20 if args.quick else 1)

    if args.model is None:
        # So small a model gains little from threads, and where other work shares the cores they wait for one another:
        # measured on two busy cores, 17 training steps per second with one thread, 1 with two.
        torch.set_num_threads(1)
        source = args.output / "source"
        prepare_small_llama(source, training_texts, args)
    else:
        source = args.model
    config, tokenizer = read_config_and_tokenizer(source)
    context = args.context or config.max_position_embeddings
    held_out = held_out_pieces(tokenize(tokenizer, held_out_texts), STRETCH * context, args.held_out_pieces)

    converted = args.output / "converted"
    convert(source, converted, config, context, args.rope_stretch)

    step(f"Measure on {len(held_out)} held-out pieces of {STRETCH * context:,} tokens")
    losses, kv_bytes = {}, {}
    for name, folder in zip(MODELS, (source, converted)):
        model = load(folder)
        losses[name], kv_bytes[name] = token_losses(model, held_out, name), cache_bytes(model, held_out[:1])

    step(f"Tune with LoRA at {STRETCH * context:,} tokens")
    tuned = tune(load(converted), tokenize(tokenizer, training_texts), context, args)
    reloaded = save_and_reload(tuned, tokenizer, args.output / "tuned", held_out[:1])
    name = MODELS[2]
    losses[name], kv_bytes[name] = token_losses(reloaded, held_out, name), cache_bytes(reloaded, held_out[:1])

    step("Results")
    print_table(losses, kv_bytes, attention_flops(reloaded.config, STRETCH * context), context)
    plot_perplexity(losses, context, args.output / "perplexity.png")
    print_continuation(reloaded, tokenizer, held_out[0], context)
    check_tuning_helped(losses)


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="Llama-style checkpoint: folder or Hub id (default: train a small one here)")
    parser.add_argument("--output", type=Path, default=Path("demo_output"), help="folder for all results: %(default)s")
    parser.add_argument("--context", type=int, help="tokens the source was trained for (default: as its config says)")
    parser.add_argument("--pretrain-steps", type=int, default=2800, help="for the small Llama: %(default)s")
    parser.add_argument("--tune-steps", type=int, default=150, help="LoRA steps: %(default)s")
    parser.add_argument("--batch-size", type=int, default=4, help="pieces packed into one LoRA step: %(default)s")
    parser.add_argument("--learning-rate", type=float, help="of LoRA (default: 2e-4, the small Llama 2e-3)")
    parser.add_argument("--rope-stretch", type=float, default=STRETCH, help="1 keeps the source's RoPE: %(default)s")
    parser.add_argument("--held-out-pieces", type=int, default=48, help="measure on at most so many: %(default)s")
    parser.add_argument("--quick", action="store_true", help="little text and a tiny Llama: tests the path, no more")
    args = parser.parse_args(argv)
    if args.quick:
        parser.set_defaults(pretrain_steps=60, tune_steps=15, held_out_pieces=8)
        args = parser.parse_args(argv)
    for name in ("context", "pretrain_steps", "tune_steps", "batch_size", "held_out_pieces"):
        if (value := getattr(args, name)) is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    if args.rope_stretch < 1:
        parser.error(f"--rope-stretch must be at least 1, got {args.rope_stretch}")
    if args.model is not None and args.output.resolve() in Path(args.model).resolve().parents:
        parser.error(f"--model {args.model} lies in --output {args.output}, which is cleared; choose another --output")
    if args.learning_rate is None:
        args.learning_rate = 2e-3 if args.model is None else 2e-4
    return args


def claim_output(folder: Path) -> None:
    """Make the folder ready: keep a Llama trained by an earlier run, remove the rest, refuse what is not ours."""
    if folder.exists():
        if not folder.is_dir():
            raise SystemExit(f"error: {folder} is not a folder; choose another --output")
        entries = sorted(folder.iterdir())
        foreign = [entry.name for entry in entries if entry.name not in PRODUCTS or entry.is_symlink()]
        if not foreign and entries and not (folder / MARKER).is_file():
            foreign = [entry.name for entry in entries]
        if foreign:
            shown = ", ".join(foreign[:3]) + (", ..." if len(foreign) > 3 else "")
            raise SystemExit(f"error: {folder} holds {shown}, not made by this script; choose another --output")
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / MARKER).exists():
        write_marker(folder, None)
    for name in ("converted", "tuned"):
        shutil.rmtree(folder / name, ignore_errors=True)
    (folder / "perplexity.png").unlink(missing_ok=True)


def write_marker(folder: Path, settings: dict | None) -> None:
    """Record that the folder is ours, and with which settings the Llama in it was trained (None: there is none)."""
    (folder / MARKER).write_text(json.dumps(settings))


def read_marker(folder: Path) -> dict | None:
    return json.loads((folder / MARKER).read_text())


def step(text: str) -> None:
    print(f"\n{text}", flush=True)


def read_standard_library(one_in: int = 1) -> tuple[list[str], list[str]]:
    """Read Python's own source files; return those to train on and those held out, which share no file.

    Args:
        one_in: take only one file in so many.
    """
    root = Path(sysconfig.get_path("stdlib"))
    training, held_out = [], []
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        lot = zlib.crc32(name.as_posix().encode())  # the same on every machine and in every run
        if SKIPPED_FOLDERS.isdisjoint(name.parts) and lot // 8 % one_in == 0:
            text = path.read_text(encoding="utf-8", errors="ignore")
            (held_out if lot % 8 == 0 else training).append(text)
    if not training or not held_out:
        raise SystemExit(f"error: found no source files of the standard library under {root}")
    return training, held_out


def train_tokenizer(texts: list[str], vocab_size: int = 1024) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<s>", "</s>", "<pad>"]
    tokenizer.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet)
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def tokenize(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[Tensor]:
    """Turn each text into a document: its token ids, and one that ends it."""
    documents = []
    for text in tqdm(texts, desc="tokenize", unit=" files"):
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        documents.append(torch.tensor([*ids, tokenizer.eos_token_id]))
    return documents


def held_out_pieces(documents: list[Tensor], length: int, most: int) -> Tensor:
    """Cut pieces of ``length`` tokens, each from one document; return at most ``most``, evenly spread, ``[n, length]``."""
    pieces = [piece for document in documents for piece in document.split(length) if len(piece) == length]
    if not pieces:
        longest = max(map(len, documents))
        raise SystemExit(f"error: no held-out file has {length} tokens (longest: {longest}); pass a shorter --context")
    count = min(most, len(pieces))
    return torch.stack([pieces[i * len(pieces) // count] for i in range(count)])


def prepare_small_llama(folder: Path, texts: list[str], args: argparse.Namespace) -> None:
    """Train a small Llama on the texts, unless an earlier run has left the same one in the folder."""
    settings = {
        "context": args.context or (64 if args.quick else 256),
        "width": 64 if args.quick else 128,
        "steps": args.pretrain_steps,
        "text": zlib.crc32("".join(texts).encode()),
    }
    if read_marker(folder.parent) == settings:
        return step(f"Use the Llama that an earlier run left in {folder}")
    step("Train a tokenizer")
    tokenizer = train_tokenizer(texts)
    documents = tokenize(tokenizer, texts)
    step(f"Train a Llama with a context of {settings['context']} tokens")
    write_marker(folder.parent, None)
    shutil.rmtree(folder, ignore_errors=True)
    pretrain_llama(settings["context"], settings["width"], settings["steps"], documents, tokenizer, folder)
    write_marker(folder.parent, settings)


def pretrain_llama(
    context: int, width: int, steps: int, documents: list[Tensor], tokenizer: PreTrainedTokenizerFast, folder: Path
) -> None:
    """Train a small Llama on the documents, joined and cut into rows of its context, and save it."""
    set_seed(0)
    # Two layers, a large initialisation and small batches: of what was tried, the lowest loss after two minutes.
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=5 * width // 2, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=context, tie_word_embeddings=True,
        initializer_range=0.06, bos_token_id=0, eos_token_id=1, pad_token_id=2,
    )  # fmt: skip
    stream = torch.cat(documents)
    rows = stream[: len(stream) // context * context].view(-1, context)
    arguments = training_arguments(
        folder.parent, steps, batch_size=4, learning_rate=5e-3, weight_decay=0.1, adam_beta2=0.95
    )
    model = LlamaForCausalLM(config)
    Trainer(model, arguments, train_dataset=[{"input_ids": row, "labels": row} for row in rows]).train()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def training_arguments(folder: Path, steps: int, batch_size: int, learning_rate: float, **kwargs) -> TrainingArguments:
    return TrainingArguments(
        folder, max_steps=steps, per_device_train_batch_size=batch_size, learning_rate=learning_rate,
        lr_scheduler_type="cosine", warmup_steps=math.ceil(steps / 20), logging_steps=math.ceil(steps / 8),
        save_strategy="no", report_to="none", dataloader_pin_memory=torch.cuda.is_available(), seed=0, **kwargs,
    )  # fmt: skip


def read_config_and_tokenizer(source: Path | str) -> tuple[LlamaConfig, PreTrainedTokenizerFast]:
    try:
        return AutoConfig.from_pretrained(source), AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: {source} is no checkpoint with a tokenizer: {str(error).splitlines()[0]}") from error


def convert(source: Path | str, target: Path, config: LlamaConfig, context: int, rope_stretch: float) -> None:
    """Run ``longnet-convert``: segments of one, two and four contexts, and RoPE stretched to reach the last."""
    segment_lengths = [context * 2**i for i in range(int(math.log2(STRETCH)) + 1)]
    dilation_rates = [length // context for length in segment_lengths]
    arguments = [
        str(source), str(target), "--preset=retrofit",
        f"--segment-lengths={','.join(map(str, segment_lengths))}",
        f"--dilation-rates={','.join(map(str, dilation_rates))}",
        f"--max-position-embeddings={segment_lengths[-1]}",
    ]  # fmt: skip
    if rope_stretch > 1:
        arguments.append(f"--rope-parameters={json.dumps(stretched_rope(config, rope_stretch))}")
    step("longnet-convert " + " ".join(arguments))
    if subprocess.run([sys.executable, "-m", "conversion", *arguments]).returncode:
        raise SystemExit("error: the conversion failed, for the reason above")


def stretched_rope(config: LlamaConfig, factor: float) -> dict:
    """Raise RoPE's base so that its slowest rotation takes ``factor`` times as long ("NTK-aware" scaling).

    Chosen by measurement. Of the default run, the perplexity over 256 tokens untouched, over 1,024 untouched, and over
    1,024 tuned: source's RoPE 25.3, 34.4, 24.46; base times 2: 25.6, 31.6, 24.42; this (times 4.4): 26.1, 28.1, 24.32;
    base times 10: 26.9, 26.4, 24.30; YaRN 27.8, 26.6, 24.29. The last three tie once tuned, and this one changes short
    texts least.
    """
    rope = config.rope_parameters
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads  # as Qwen2 has it
    rotating = int(head_dim * rope.get("partial_rotary_factor", 1))
    return {**rope, "rope_theta": rope["rope_theta"] * factor ** (rotating / (rotating - 2))}


def load(folder: Path | str) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder).to(PartialState().device)


def tune(model: PreTrainedModel, documents: list[Tensor], context: int, args: argparse.Namespace) -> PreTrainedModel:
    """Fine-tune with LoRA on pieces of documents up to four contexts long, several packed into each row; merge."""
    set_seed(0)
    pieces = [piece for document in documents for piece in document.split(STRETCH * context)]
    # Shorter pieces hold no distance that the source does not know.
    rows = [{"input_ids": piece.tolist()} for piece in pieces if len(piece) > context]
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32))
    adapted.print_trainable_parameters()
    arguments = training_arguments(args.output, args.tune_steps, args.batch_size, args.learning_rate)
    Trainer(adapted, arguments, train_dataset=rows, data_collator=DataCollatorWithFlattening()).train()
    return adapted.merge_and_unload()


def save_and_reload(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path, tokens: Tensor
) -> PreTrainedModel:
    """Save, load again as a user would, and check that the logits are the same."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    reloaded = load(folder)
    difference = (logits(reloaded, tokens) - logits(model, tokens)).abs().max().item()
    if difference > 1e-5:
        raise SystemExit(f"error: {folder} does not load as it was saved: logits differ by {difference:.2g}")
    print(f"{folder} holds the merged model; reloaded, its logits differ by {difference:.2g}", flush=True)
    return reloaded


@torch.no_grad()
def logits(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    """Compute logits ``[B, L, vocabulary]`` in float32 for tokens ``[B, L]``."""
    return model.eval()(tokens.to(model.device), use_cache=False).logits.float()


def token_losses(model: PreTrainedModel, pieces: Tensor, name: str) -> Tensor:
    """Compute the loss of each token of each piece but the first, ``[n, L - 1]``."""
    losses = []
    for batch in tqdm(pieces.split(max(1, 4096 // pieces.shape[1])), desc=name, unit=" batches"):
        scores = logits(model, batch)[:, :-1].transpose(1, 2)  # [B, vocabulary, L - 1]
        losses.append(F.cross_entropy(scores, batch[:, 1:].to(scores.device), reduction="none").cpu())
    return torch.cat(losses)


@torch.no_grad()
def cache_bytes(model: PreTrainedModel, tokens: Tensor) -> int:
    """Measure the keys and values that the model holds after reading the tokens."""
    cache = model.eval()(tokens.to(model.device), use_cache=True, logits_to_keep=1).past_key_values
    return sum(tensor.nbytes for layer in cache.layers for tensor in (layer.keys, layer.values))


def attention_flops(config: LongNetConfig, length: int) -> dict[str, int]:
    """Count the FLOPs of attention in one forward pass over ``length`` tokens, for each model."""
    dense, pattern = DilationPattern((length,), (1,)), config.pattern
    return {
        name: config.num_hidden_layers
        * used.attention_flops(
            length, config.num_attention_heads, config.head_dim, num_kv_heads=config.num_key_value_heads
        )
        for name, used in zip(MODELS, (dense, pattern, pattern))
    }


def perplexity(losses: Tensor, length: int | None = None) -> float:
    """Turn losses ``[n, L - 1]`` into the perplexity of the first ``length`` tokens of all pieces (None: all)."""
    return math.exp(losses[:, : None if length is None else length - 1].mean())


def print_table(losses: dict[str, Tensor], kv_bytes: dict[str, int], flops: dict[str, int], context: int) -> None:
    lengths = [context * 2**i for i in range(int(math.log2(STRETCH)) + 1)]
    print(f"{'':22}{'perplexity of the first':^30}   {f'at {lengths[-1]:,} tokens':^27}")
    print(f"{'tokens':22}{''.join(f'{length:>10,}' for length in lengths)}   {'attention':>15}{'KV cache':>12}")
    for name in MODELS:
        row = "".join(f"{perplexity(losses[name], length):10.2f}" for length in lengths)
        print(f"{name:22}{row}   {flops[name] / 1e6:9,.1f} MFLOP{kv_bytes[name] / 1e6:9,.2f} MB")


def plot_perplexity(losses: dict[str, Tensor], context: int, path: Path, num_bins: int = 32) -> None:
    """Draw perplexity against position, each point the mean over one of ``num_bins`` stretches of positions."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for name in MODELS:
        stretches = torch.tensor_split(losses[name].mean(0), num_bins)
        ends = torch.tensor([len(stretch) for stretch in stretches]).cumsum(0)
        axes.plot(ends, [math.exp(stretch.mean()) for stretch in stretches], label=name, marker=".")
    axes.axvline(context, color="grey", linestyle="dotted", label="context of the source")
    axes.set(xlabel="position", ylabel="perplexity", yscale="log", title="Perplexity by position, held-out text")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.legend()
    figure.savefig(path, dpi=150)
    print(f"wrote {path}")


def print_continuation(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, piece: Tensor, context: int
) -> None:
    """Continue a text three times as long as the source's context."""
    set_seed(0)
    prompt = piece[None, : 3 * context].to(model.device)
    output = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=64, do_sample=True, temperature=0.7
    )
    end_of_prompt, continuation = tokenizer.batch_decode([prompt[0, -32:], output[0, prompt.shape[1] :]])
    print(
        f"\nThe tuned model goes on after {prompt.shape[1]:,} tokens that end in\n{end_of_prompt}\nwith\n{continuation}"
    )


def check_tuning_helped(losses: dict[str, Tensor]) -> None:
    untouched, tuned = (perplexity(losses[name]) for name in MODELS[1:])
    if not tuned < untouched:
        raise SystemExit(
            f"error: tuning did not help: perplexity {tuned:.2f} over {STRETCH} contexts, untouched {untouched:.2f}"
        )


if __name__ == "__main__":
    main()
