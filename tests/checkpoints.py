"""Tiny checkpoints made on the spot with transformers' own classes, tokenizer and generation config included."""

import json
import string
from pathlib import Path

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MinistralConfig,
    MinistralForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)


CHAT_TEMPLATE = "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}</s>{% endfor %}"
CONTEXT = 64

FAMILIES = {
    "llama": (LlamaForCausalLM, LlamaConfig, {}),
    "mistral": (MistralForCausalLM, MistralConfig, {"sliding_window": None}),
    "ministral": (MinistralForCausalLM, MinistralConfig, {"head_dim": 12, "layer_types": ["full_attention"] * 2}),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {}),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {"head_dim": 12}),
    "smollm3": (SmolLM3ForCausalLM, SmolLM3Config, {"pad_token_id": 2, "no_rope_layers": [1, 0]}),
    "phi3": (Phi3ForCausalLM, Phi3Config, {"pad_token_id": 2}),
}

ROPE = {
    "default": {"rope_type": "default", "rope_theta": 10000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "yarn": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16},
    "yarn, no factor": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": None,
        "original_max_position_embeddings": 16,
    },
    "longrope, no factor": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0, 1.5, 2.0, 2.5],
        "long_factor": [2.0, 3.0, 4.0, 5.0],
        "original_max_position_embeddings": 16,
    },
}


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Train a small byte-level BPE tokenizer with a chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=280,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([string.__doc__], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", chat_template=CHAT_TEMPLATE
    )


def make_checkpoint(
    folder: Path,
    *,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "5GB",
    rope: str = "default",
    tokenizer: bool = True,
    family: str = "llama",
    **config_fields,
) -> PreTrainedModel:
    """Save a random checkpoint of 64 tokens of context (2 layers, 4 heads, 2 KV heads) and return its model.

    Args:
        folder: where to save.
        dtype: of the weights.
        max_shard_size: ``"20KB"`` makes several shards.
        rope: a key of ``ROPE``.
        tokenizer: whether a tokenizer goes with it.
        family: a key of ``FAMILIES``.
        config_fields: override fields of the config.
    """
    torch.manual_seed(0)
    fields = {
        "vocab_size": 288,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": CONTEXT,
        "initializer_range": 0.3,  # logits far apart: a small change of the attention shows
        "bos_token_id": 0,
        "eos_token_id": 1,
        "rope_parameters": dict(ROPE[rope]),
    }
    model_class, config_class, family_fields = FAMILIES[family]
    model = model_class(config_class(**{**fields, **family_fields, **config_fields})).to(dtype).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name or name.endswith("bias"):  # initialised to 1 and 0, which would hide a mix-up
            torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.3)
    model.generation_config = GenerationConfig(bos_token_id=0, eos_token_id=1, temperature=0.7, do_sample=True)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    if tokenizer:
        make_tokenizer().save_pretrained(folder)
    return model


def stored_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Load all weights of a checkpoint."""
    return {name: x for path in folder.glob("*.safetensors") for name, x in load_file(path).items()}


def assert_same_bits(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    """Compare names, dtypes and bits of two checkpoints' weights."""
    assert ours.keys() == theirs.keys()
    for name, x in ours.items():
        assert x.dtype == theirs[name].dtype
        assert torch.equal(x.view(torch.uint8), theirs[name].view(torch.uint8)), name


def edit_json(path: Path, **fields) -> None:
    """Set fields of a JSON file; a value of None removes the field."""
    content = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({name: value for name, value in content.items() if value is not None}))
