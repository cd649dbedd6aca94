"""How many operators a prompt costs beside the attention itself: on a GPU each is a kernel to launch before it starts."""

from collections import Counter

import pytest
import torch
from tiny_models import random_tokens, tiny_config
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from modeling_longnet import DilationPattern, LongNetCache, LongNetForCausalLM, attention_longnet
from modeling_longnet.dilation_pattern import PRESETS
from modeling_longnet.reach_ranges import plan_ranges


PATTERN = DilationPattern.geometric(32, 2**12, preset="retrofit")  # 8 branches
CHUNK = 100


class Operators(TorchDispatchMode):
    """Count what is computed or copied inside; views cost nothing."""

    def __init__(self):
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if not function.is_view:
            self.counts[function.name()] += 1
        return function(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def attention_is_one_operator(monkeypatch):
    """Count an attention as one operator, as transformers' Llama does, and what layers share before it as it is."""

    def attend_cached(query, cached, pattern, *, query_positions, once, **_):
        if query.shape[2] > 1:
            once(
                query_positions, (pattern, cached.keys.shape[:3]),
                lambda: plan_ranges(pattern, query_positions, cached.positions, cached.branches),
            )  # fmt: skip
        return torch.empty_like(query), None

    monkeypatch.setattr(attention_longnet, "dilated_attention", lambda query, *_, **__: torch.empty_like(query))
    monkeypatch.setattr(attention_longnet, "cached_attention", attend_cached)


def config(layers: int):
    branches = {"segment_lengths": PATTERN.segment_lengths, "dilation_rates": PATTERN.dilation_rates}
    return tiny_config("retrofit", num_hidden_layers=layers, **{**PRESETS["retrofit"], **branches})


@torch.no_grad()
def operators_by_chunk(layers: int, max_length: int | None) -> list[Counter[str]]:
    """Count what a LongNet takes to read each of two chunks."""
    model = LongNetForCausalLM(config(layers)).bfloat16().eval()
    for _ in range(2):  # the first time makes tables that stay
        cache, counts = LongNetCache(model.config, max_length=max_length), []
        for tokens in random_tokens(1, 2 * CHUNK).split(CHUNK, dim=1):
            with Operators() as operators:
                model(tokens, past_key_values=cache, logits_to_keep=1)
            counts.append(operators.counts)
    return counts


@torch.no_grad()
def operators_of_llama(layers: int) -> list[Counter[str]]:
    fields = config(layers).to_dict()
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    llama = LlamaConfig(**{name: fields[name] for name in (*names, "num_key_value_heads", "max_position_embeddings")})
    model, counts = LlamaForCausalLM(llama).bfloat16().eval(), []
    cache = DynamicCache(config=llama)
    for tokens in random_tokens(1, 2 * CHUNK).split(CHUNK, dim=1):
        with Operators() as operators:
            model(tokens, past_key_values=cache, logits_to_keep=1)
        counts.append(operators.counts)
    return counts


def per_layer_and_once(count, *args) -> list[tuple[Counter[str], Counter[str]]]:
    """Split the operators of each chunk into those of one layer and those of a pass."""
    parts = []
    for two, three in zip(count(2, *args), count(3, *args)):
        of_layer = Counter({name: three[name] - two[name] for name in three if three[name] != two[name]})
        parts.append((of_layer, Counter({name: two[name] - 2 * of_layer[name] for name in two})))
    return parts


@pytest.mark.parametrize("max_length", [2**12, None], ids=["fixed", "growing"])
def test_a_prompt_takes_few_operators_more_than_llamas(max_length):
    first, second = per_layer_and_once(operators_by_chunk, max_length)
    llama_first, llama_second = per_layer_and_once(operators_of_llama)
    # Of the cache: two gathers, and positions, branches and (fixed) counts, instead of two cat.
    assert first[0].total() <= llama_first[0].total() + (4 if max_length else 2), first[0]
    assert first[1].total() <= 59, first[1]
    # Llama's attention makes a mask and repeats keys here; growing slots are moved to new ones first.
    assert second[0].total() <= llama_second[0].total() + (-1 if max_length else 1), second[0]
    assert second[1].total() <= (106 if max_length else 141), second[1]


def test_nothing_is_filled_that_is_overwritten():
    first, second = per_layer_and_once(operators_by_chunk, 2**12)
    fills = {"aten::zeros", "aten::new_zeros", "aten::zeros_like", "aten::zero_", "aten::fill_.Scalar"}
    assert not fills & {name for part in (*first, *second) for name, count in part.items() if count}
    assert first[0]["aten::gather"] == second[0]["aten::gather.out"] == 2  # keys and values into the slots, once each


def test_the_number_of_branches_does_not_matter(monkeypatch):
    totals = []
    for first_segment in (2**5, 2**10):
        monkeypatch.setitem(globals(), "PATTERN", DilationPattern.geometric(first_segment, 2**12, preset="retrofit"))
        totals.append([x.total() for part in per_layer_and_once(operators_by_chunk, 2**12) for x in part])
    assert totals[0] == totals[1]
