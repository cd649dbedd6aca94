"""Tiny LongNet models whose weights are large enough that every attended key shows in the logits."""

import torch

from modeling_longnet import LongNetConfig, LongNetForCausalLM
from modeling_longnet.dilation_pattern import PRESETS


VOCABULARY = 97


def tiny_config(preset: str = "paper", **fields) -> LongNetConfig:
    """Configure two layers with four query heads on two KV heads and branches of 8, 16 and 32 tokens."""
    return LongNetConfig(
        **{
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
            "initializer_range": 0.4,
            "pad_token_id": 0,
            "segment_lengths": (8, 16, 32),
            "dilation_rates": (1, 2, 4),
            **PRESETS[preset],
            **fields,
        }
    )


def tiny_model(preset: str = "paper", model_class=LongNetForCausalLM, seed: int = 0, **fields):
    """Build a tiny model in float64, in evaluation mode."""
    torch.manual_seed(seed)
    return model_class(tiny_config(preset, **fields)).double().eval()


def checkpointed(model, **options):
    """Switch activation checkpointing on, by whichever name this version of transformers has, for training."""
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(**options)
    else:
        model.gradient_checkpointing_enable(**options)
    return model.train()


def random_tokens(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    """Draw token ids ``[batch, length]`` that are none of the special ones."""
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def left_padding(*paddings: int, length: int) -> torch.Tensor:
    """Make an attention mask ``[len(paddings), length]`` with that many zeros on the left of each row."""
    return (torch.arange(length) >= torch.tensor(paddings)[:, None]).long()
