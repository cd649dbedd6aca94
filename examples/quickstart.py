"""Dilated attention in a few lines, on any machine: the operator, then a model with random weights."""

import argparse

import torch
import torch.nn.functional as F

from modeling_longnet import DilationPattern, LongNetConfig, LongNetForCausalLM, dilated_attention


argparse.ArgumentParser(description=__doc__).parse_args()
torch.manual_seed(0)

# The operator takes what scaled_dot_product_attention takes, and a pattern of branches.
pattern = DilationPattern(segment_lengths=(64, 128, 256), dilation_rates=(1, 2, 4))
query = torch.randn(1, 8, 1000, 32, dtype=torch.float64)  # [B, H, L, D]: any length will do
key, value = torch.randn(2, 1, 4, 1000, 32, dtype=torch.float64)  # 4 KV heads serve 8 query heads
print("operator:", list(dilated_attention(query, key, value, pattern).shape))

# One branch that spans the text and skips nothing is ordinary attention.
one_branch = DilationPattern(segment_lengths=(1000,), dilation_rates=(1,))
ours = dilated_attention(query, key, value, one_branch)
ordinary = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
difference = (ours - ordinary).abs().max().item()

# The model takes what Llama takes.
config = LongNetConfig(
    vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
    segment_lengths=(64, 128, 256), dilation_rates=(1, 2, 4),
)  # fmt: skip
model = LongNetForCausalLM(config)
tokens = torch.tensor([list("“The quick brown fox” — in UTF-8 bytes".encode())])
print("model:", list(model(tokens).logits.shape))

if difference > 1e-12:
    raise SystemExit(f"one branch differs from ordinary attention by {difference:.2g}")
print(f"checked: one branch over the whole text equals ordinary attention (largest difference {difference:.1g})")
