"""Generate from texts of different length in one batch, with a cache smaller than the text.

The weights are random, so what is generated means nothing; that padding and forgetting change nothing is the point.
"""

import argparse
import ast

import torch

from modeling_longnet import LongNetConfig, LongNetForCausalLM


NEW_TOKENS = 40

argparse.ArgumentParser(description=__doc__).parse_args()
torch.manual_seed(0)
config = LongNetConfig(
    vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
    segment_lengths=(32, 64, 128), dilation_rates=(1, 2, 4), window="sliding", dilate_queries=False,
    count_overlaps=False, bos_token_id=None, eos_token_id=None, pad_token_id=0, initializer_range=0.2,
)  # fmt: skip
# Double precision: with random weights two tokens can be nearly as likely, and rounding must not decide.
model = LongNetForCausalLM(config).double().eval()

texts = [argparse.__doc__.encode()[:700], ast.__doc__.encode()[:300]]
longest = max(map(len, texts))
tokens = torch.zeros(len(texts), longest, dtype=torch.int64)
for row, text in enumerate(texts):
    tokens[row, longest - len(text) :] = torch.tensor(list(text))  # padded on the left
mask = (tokens != 0).long()

together = model.generate(
    tokens, attention_mask=mask, max_new_tokens=NEW_TOKENS, do_sample=False, return_dict_in_generate=True
)
for row, text in enumerate(texts):
    alone = model.generate(torch.tensor([list(text)]), max_new_tokens=NEW_TOKENS, do_sample=False)
    if not torch.equal(alone[0, -NEW_TOKENS:], together.sequences[row, -NEW_TOKENS:]):
        raise SystemExit(f"text {row} goes on differently in a batch")
    everything = torch.tensor([[*text, *together.sequences[row, -NEW_TOKENS:]]])
    uncached = model(everything, use_cache=False).logits.argmax(-1)
    if not torch.equal(uncached[0, -NEW_TOKENS - 1 : -1], everything[0, -NEW_TOKENS:]):
        raise SystemExit(f"text {row} goes on differently without a cache")

held, seen = together.past_key_values.layers[0].keys.shape[2], longest + NEW_TOKENS - 1
if held >= seen:
    raise SystemExit(f"the cache holds {held} keys for {seen} tokens")
print(f"checked: a padded row generates what it generates alone; the cache holds {held} keys for {seen} tokens")
