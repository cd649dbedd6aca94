"""Pack documents of any length into one row without padding: each is computed as if it were alone."""

import argparse
import bisect
import json
import textwrap
from pathlib import Path

import torch
from transformers import DataCollatorWithFlattening

from modeling_longnet import LongNetConfig, LongNetForCausalLM


argparse.ArgumentParser(description=__doc__).parse_args()
torch.manual_seed(0)
config = LongNetConfig(
    vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
    segment_lengths=(32, 64, 128), dilation_rates=(1, 2, 4),
)  # fmt: skip
model = LongNetForCausalLM(config).eval()
documents = [
    list(Path(module.__file__).read_bytes()[:length])
    for module, length in ((json, 700), (textwrap, 45), (bisect, 333))
]

# The collator joins the documents, restarts position_ids at each, and gives no label to first tokens.
collator = DataCollatorWithFlattening()
packed = collator([{"input_ids": document} for document in documents])
print("packed:", list(packed["input_ids"].shape), "from documents of", [len(document) for document in documents])

with torch.no_grad():
    packed_loss = model(**packed, use_cache=False).loss.item()
    # The loss is a mean over predicted tokens, of which a document has one less than tokens.
    total = sum(
        model(input_ids=tokens, labels=tokens).loss.item() * (tokens.numel() - 1)
        for tokens in (torch.tensor([document]) for document in documents)
    )
    # The control: without position_ids the row is one document, and attention runs across its parts.
    leaking_loss = model(input_ids=packed["input_ids"], labels=packed["labels"]).loss.item()
alone_loss = total / sum(len(document) - 1 for document in documents)

if abs(packed_loss - alone_loss) > 1e-5 or abs(leaking_loss - alone_loss) < 1e-5:
    raise SystemExit(f"packed {packed_loss:.7f}, alone {alone_loss:.7f}, not kept apart {leaking_loss:.7f}")
print(f"checked: packed loss {packed_loss:.5f} equals that of the documents alone, {alone_loss:.5f}")
