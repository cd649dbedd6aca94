"""Tensor parallelism: a rank that holds some of the heads computes what those heads compute in the whole model."""

import pytest
import torch
from tiny_models import tiny_config

from modeling_longnet import DilationPattern, LongNetCache, LongNetConfig, LongNetForCausalLM, dilated_attention
from modeling_longnet.attention_operator import Call
from modeling_longnet.dilation_pattern import PRESETS


def tensors(length: int = 75) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(2, heads, length, 8, dtype=torch.float64) for heads in (16, 8, 8)]


@pytest.mark.parametrize("backend", ["eager", "torch"])
@pytest.mark.parametrize("preset", PRESETS)
def test_a_share_of_the_heads_is_a_slice_of_all_heads(preset, backend):
    query, key, value = tensors()
    pattern = DilationPattern.preset(preset, (8, 16, 32), (1, 2, 4))
    whole = dilated_attention(query, key, value, pattern, backend=backend)
    for first, count in ((0, 2), (2, 2), (3, 1), (5, 3)):
        queries, keys = slice(2 * first, 2 * (first + count)), slice(first, first + count)
        share = dilated_attention(
            query[:, queries], key[:, keys], value[:, keys], pattern.of_heads(first, 8), backend=backend
        )
        torch.testing.assert_close(share, whole[:, queries], rtol=1e-12, atol=1e-12)
    numbered_from_0 = dilated_attention(query[:, 4:6], key[:, 2:3], value[:, 2:3], pattern, backend=backend)
    assert (numbered_from_0 - whole[:, 4:6]).abs().max() > 0.1


@pytest.mark.parametrize("preset", PRESETS)
def test_a_call_of_a_share_survives_being_flattened(preset):
    pattern = DilationPattern.preset(preset, (8, 16), (1, 2))
    for call in (Call(pattern, True, 0.5), Call(pattern.of_heads(3, 8), True, 0.5)):
        assert Call.unflatten(*call.flatten()) == call
    assert pattern.of_heads(3, 8) != pattern.of_heads(2, 8) != pattern


@pytest.mark.parametrize("preset", PRESETS)
def test_the_cache_of_a_share_holds_what_its_heads_need(preset):
    config = tiny_config(preset, num_attention_heads=8, num_key_value_heads=8, hidden_size=64)
    share = tiny_config(preset, num_attention_heads=8, num_key_value_heads=8, hidden_size=64)
    share.first_kv_head = 3
    _, key, value = tensors(120)
    positions = torch.arange(120).expand(2, -1)
    whole_cache, share_cache = LongNetCache(config), LongNetCache(share)
    for step in range(0, 120, 8):
        block = slice(step, step + 8)
        whole_cache.update(key[:, :, block], value[:, :, block], 0, positions=positions[:, block])
        share_cache.update(key[:, 3:5, block], value[:, 3:5, block], 0, positions=positions[:, block])
    for head in (0, 1):
        held = [
            set(c.layers[0].key_positions[0, h].tolist()) for c, h in ((whole_cache, 3 + head), (share_cache, head))
        ]
        later = range(120, 160)
        needed = {u for p in later for u in config.pattern.reach(p, 3 + head, num_kv_heads=8) if u < 120}
        assert needed <= held[0] and needed <= held[1]


def test_which_heads_a_process_holds_is_not_saved(tmp_path):
    config = tiny_config()
    config.first_kv_head = 1
    assert config.layer_pattern(0).held_heads == (1, 2)
    config.save_pretrained(tmp_path)
    assert LongNetConfig.from_pretrained(tmp_path).layer_pattern(0) == tiny_config().pattern


def test_ranks_that_do_not_divide_the_kv_heads_are_refused(monkeypatch):
    class Ranks:
        tp_size = 4

    base = LongNetForCausalLM.__mro__[2]
    monkeypatch.setattr(base, "maybe_distribute_model", classmethod(lambda cls, model, *_: model))
    with pytest.raises(ValueError, match="tp_size=4 does not divide the 2 KV heads; use a divisor of 2"):
        LongNetForCausalLM.maybe_distribute_model(LongNetForCausalLM(tiny_config()), Ranks(), None)
