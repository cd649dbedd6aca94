"""LongNetCache: decoding through it equals the full forward, in bounded memory, for all that generate() does."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import checkpointed, left_padding, random_tokens, tiny_model

from modeling_longnet import DilationPattern, LongNetCache, cached_attention
from modeling_longnet.cache_layer import LongNetCacheLayer
from modeling_longnet.dilation_pattern import PRESETS


CLOSE = {"rtol": 1e-6, "atol": 1e-6}


def decode(model, tokens, mask, chunks):
    """Feed the tokens through a cache in chunks of these lengths; return the logits and the cache."""
    cache, logits, done = None, [], 0
    for chunk in chunks:
        output = model(
            tokens[:, done : done + chunk],
            attention_mask=None if mask is None else mask[:, : done + chunk],
            past_key_values=cache,
            use_cache=True,
        )
        cache, done = output.past_key_values, done + chunk
        logits.append(output.logits)
    return torch.cat(logits, dim=1), cache


@pytest.mark.parametrize("num_key_value_heads", [2, 4])
@pytest.mark.parametrize("preset", PRESETS)
def test_decoding_token_by_token_equals_the_full_forward(preset, num_key_value_heads):
    model = tiny_model(preset, num_key_value_heads=num_key_value_heads)
    length = 3 * 32 + 5
    tokens, mask = random_tokens(3, length), left_padding(0, 5, 17, length=length)
    with torch.no_grad():
        full = model(tokens, attention_mask=mask, use_cache=False).logits
        cached, _ = decode(model, tokens, mask, [1] * length)
    torch.testing.assert_close(cached[mask.bool()], full[mask.bool()], **CLOSE)


@settings(max_examples=25)
@given(
    preset=st.sampled_from(sorted(PRESETS)),
    chunks=st.lists(st.integers(1, 40), min_size=2, max_size=8),
    paddings=st.lists(st.integers(0, 20), min_size=2, max_size=2),
)
def test_decoding_in_any_chunks_equals_the_full_forward(preset, chunks, paddings):
    model = tiny_model(preset)
    length = sum(chunks)
    tokens, mask = random_tokens(2, length), left_padding(*paddings, length=length)
    with torch.no_grad():
        full = model(tokens, attention_mask=mask, use_cache=False).logits
        cached, _ = decode(model, tokens, mask, chunks)
    torch.testing.assert_close(cached[mask.bool()], full[mask.bool()], **CLOSE)


@pytest.mark.parametrize("pairs", [1, 700])
def test_a_long_chunk_over_a_full_cache_is_attended_piece_by_piece(pairs, monkeypatch):
    model, tokens = tiny_model("paper", attn_implementation="eager"), random_tokens(2, 90)
    mask = left_padding(0, 7, length=90)
    with torch.no_grad():
        cache = decode(model, tokens, mask, [40])[1]
        expected = model(tokens[:, 40:], attention_mask=mask, past_key_values=cache, output_attentions=True)
        cache = decode(model, tokens, mask, [40])[1]
        monkeypatch.setattr(cached_attention, "PAIRS_PER_CHUNK", pairs)
        output = model(tokens[:, 40:], attention_mask=mask, past_key_values=cache, output_attentions=True)
    torch.testing.assert_close(output.logits, expected.logits, **CLOSE)
    torch.testing.assert_close(output.attentions, expected.attentions, **CLOSE)


def test_dense_layers_keep_everything_and_decode_exactly():
    model = tiny_model("paper", dense_layers=(1,))
    tokens, mask = random_tokens(2, 120), left_padding(0, 9, length=120)
    with torch.no_grad():
        full = model(tokens, attention_mask=mask, use_cache=False).logits
        cached, cache = decode(model, tokens, mask, [50] + [1] * 70)
    torch.testing.assert_close(cached[mask.bool()], full[mask.bool()], **CLOSE)
    assert (cache.layers[1].key_positions[0] >= 0).sum(-1).tolist() == [120, 120]
    assert 2 * cache.layers[0].keys.shape[2] < 120


def test_right_padding_inside_chunks_takes_no_position():
    model, tokens = tiny_model("retrofit"), random_tokens(2, 60)
    mask = torch.ones(2, 60, dtype=torch.long)
    mask[0, 10:17] = 0
    with torch.no_grad():
        cached, _ = decode(model, tokens, mask, [17, 20, 23])
        alone = model(torch.cat([tokens[:1, :10], tokens[:1, 17:]], dim=1)).logits
    torch.testing.assert_close(cached[:1, 17:], alone[:, 10:], **CLOSE)


@pytest.mark.parametrize("preset", PRESETS)
def test_memory_stays_within_the_formula(preset):
    model = tiny_model(preset, num_key_value_heads=4)
    pattern = model.config.pattern
    with torch.no_grad():
        cache, tokens = None, random_tokens(2, 300)
        for step in range(300):
            cache = model(tokens[:, step : step + 1], past_key_values=cache, use_cache=True).past_key_values
            for layer in cache.layers:
                assert layer.keys.shape[2] <= pattern.cache_entries(step + 1) + pattern.segment_lengths[0]
                assert layer.values.shape == layer.keys.shape
        assert cache.get_seq_length() == 300


@pytest.mark.parametrize("preset", PRESETS)
def test_a_long_prompt_leaves_what_can_be_reached_and_no_more_than_the_formula(preset):
    model = tiny_model(preset)
    pattern = model.config.pattern
    with torch.no_grad():
        cache = model(random_tokens(1, 500), use_cache=True).past_key_values
    layer = cache.layers[0]
    assert layer.keys.shape[2] == pattern.cache_entries(500) + 1  # and one slot for what nobody keeps
    for head, positions in enumerate(layer.key_positions[0]):
        held = positions[positions >= 0].tolist()
        needed = {u for p in range(500, 540) for u in pattern.reach(p, head, True, 2) if u < 500}
        assert len(set(held)) == len(held)
        assert needed <= set(held) <= set(range(500 - 32, 500))


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize(
    "how",
    [
        {},
        {"num_beams": 3},
        {"prefill_chunk_size": 7},
        {"do_sample": True, "top_k": 5},
        {"num_beams": 2, "num_return_sequences": 2},
    ],
    ids=str,
)
def test_generate_is_the_same_with_and_without_the_cache(preset, how):
    model = tiny_model(preset)
    tokens, mask = random_tokens(3, 30), left_padding(0, 5, 17, length=30)
    kwargs = {"attention_mask": mask, "max_new_tokens": 45, "do_sample": False, "eos_token_id": None, **how}
    outputs = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        outputs.append(model.generate(tokens, use_cache=use_cache, **kwargs))
        kwargs.pop("prefill_chunk_size", None)  # needs a cache
    assert torch.equal(*outputs)
    new_tokens = outputs[0][:, 30:]
    assert len(new_tokens.unique()) > 10  # a model that repeats itself would prove little


@pytest.mark.parametrize("preset", PRESETS)
def test_assisted_and_prompt_lookup_decoding_equal_greedy(preset):
    model, helper = tiny_model(preset), tiny_model(preset, seed=1)
    helper.lm_head.weight.data.copy_(model.lm_head.weight)
    tokens = random_tokens(1, 8).repeat(1, 5)
    kwargs = {"max_new_tokens": 45, "do_sample": False, "eos_token_id": None}
    greedy = model.generate(tokens, **kwargs)
    assert torch.equal(model.generate(tokens, prompt_lookup_num_tokens=4, **kwargs), greedy)
    assert torch.equal(model.generate(tokens, assistant_model=helper, **kwargs), greedy)
    assert torch.equal(model.generate(tokens, assistant_model=model, **kwargs), greedy)


@pytest.mark.parametrize("max_length", [None, 120])
@pytest.mark.parametrize("padding", [0, 3])
@pytest.mark.parametrize("preset", PRESETS)
def test_assisted_and_prompt_lookup_decoding_continue_from_a_cache(preset, padding, max_length):
    model, helper = tiny_model(preset, dense_layers=(1,)), tiny_model(preset, seed=1)
    helper.lm_head.weight.data.copy_(model.lm_head.weight)
    tokens = random_tokens(1, 8).repeat(1, 4)
    kwargs = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None}
    mask = left_padding(padding, length=tokens.shape[1])
    first = model.generate(
        tokens, attention_mask=mask, past_key_values=LongNetCache(model.config, max_length=max_length),
        return_dict_in_generate=True, **kwargs,
    )  # fmt: skip
    tokens = torch.cat([first.sequences, random_tokens(1, 8)], dim=1)
    kwargs["attention_mask"] = left_padding(padding, length=tokens.shape[1])
    greedy = model.generate(tokens, **kwargs)
    for assistance in ({"prompt_lookup_num_tokens": 3}, {"assistant_model": helper}, {"assistant_model": model}):
        cache = copy.deepcopy(first.past_key_values)
        assert torch.equal(model.generate(tokens, past_key_values=cache, **assistance, **kwargs), greedy)


@pytest.mark.parametrize("num_given", [8, 40])
@pytest.mark.parametrize("masked", [False, True])
def test_assisted_decoding_from_a_cache_needs_all_tokens(num_given, masked):
    model, tokens = tiny_model("retrofit"), random_tokens(1, 60)
    cache = LongNetCache(model.config)
    with torch.no_grad():
        model(tokens[:, :50], past_key_values=cache)
    mask = {"attention_mask": left_padding(2, length=60)} if masked else {}
    message = (
        f"a cache of 50 tokens needs these and at least one new one in input_ids, got {num_given}: give the whole"
    )
    with pytest.raises(ValueError, match=message):
        model.generate(
            tokens[:, -num_given:], past_key_values=cache, prompt_lookup_num_tokens=3, max_new_tokens=5, **mask
        )


def test_a_prompt_of_embeddings_is_not_read_in_chunks():
    model, tokens = tiny_model(), random_tokens(3, 70)
    embeds = model.get_input_embeddings()(tokens)
    for ids in ({}, {"input_ids": tokens}):
        with pytest.raises(ValueError, match="prefill_chunk_size=13 needs input_ids, .* leave it out with inputs_emb"):
            model.generate(inputs_embeds=embeds, prefill_chunk_size=13, max_new_tokens=2, **ids)
    assert torch.equal(
        model.generate(inputs_embeds=embeds, max_new_tokens=9), model.generate(tokens, max_new_tokens=9)[:, 70:]
    )


def test_generation_continues_from_a_returned_cache():
    model, tokens = tiny_model("retrofit"), random_tokens(2, 30)
    kwargs = {"do_sample": False, "eos_token_id": None, "return_dict_in_generate": True}
    whole = model.generate(tokens, max_new_tokens=60, **kwargs).sequences
    first = model.generate(tokens, max_new_tokens=25, **kwargs)
    rest = model.generate(first.sequences, past_key_values=first.past_key_values, max_new_tokens=35, **kwargs)
    assert torch.equal(rest.sequences, whole)


@pytest.mark.parametrize("implementation", ["static", "quantized"])
def test_caches_that_hold_other_keys_are_refused(implementation):
    with pytest.raises(ValueError, match=f"cache_implementation='{implementation}' holds other keys"):
        tiny_model().generate(random_tokens(1, 5), cache_implementation=implementation, max_new_tokens=2)


def test_decoding_in_bfloat16_and_under_autocast_follows_the_full_forward():
    tokens = random_tokens(2, 40)
    model = tiny_model("retrofit", initializer_range=0.1).float()
    with torch.no_grad():
        exact = model(tokens, use_cache=False).logits
        with torch.autocast("cpu", torch.bfloat16):
            mixed, _ = decode(model, tokens, None, [25] + [1] * 15)
        low, _ = decode(model.bfloat16(), tokens, None, [25] + [1] * 15)
    assert (mixed - exact).abs().max() < 0.05 < exact.std() / 2
    assert (low - exact).abs().max() < 0.05


def test_a_copy_goes_its_own_way():
    model, tokens = tiny_model(), random_tokens(2, 60)
    with torch.no_grad():
        _, cache = decode(model, tokens[:, :50], None, [50])
        branch = copy.deepcopy(cache)
        model(tokens[:, 20:30], past_key_values=branch)
        output = model(tokens[:, 50:], past_key_values=cache).logits
        torch.testing.assert_close(output, model(tokens).logits[:, 50:], **CLOSE)


@pytest.mark.parametrize("max_length", [None, 20])
@pytest.mark.parametrize("preset", PRESETS)
def test_slots_that_grow_while_tokens_may_be_taken_back_lose_nothing(preset, max_length):
    model, tokens, other = tiny_model(preset), random_tokens(2, 120), random_tokens(2, 60, seed=1)
    cache = LongNetCache(model.config, max_length=max_length, enlarges=True)
    with torch.no_grad():
        model(tokens[:, :12], past_key_values=cache)
        cache.activate_past_recording()
        for part in other.split(4, dim=1):
            model(part, past_key_values=cache)
        cache.crop(-60)
        logits = model(tokens[:, 12:], past_key_values=cache).logits
        full = model(tokens, use_cache=False).logits[:, 12:]
    torch.testing.assert_close(logits, full, **CLOSE)


@pytest.mark.parametrize("max_length", [None, 200])
def test_adopted_entries_stand_under_their_own_positions_and_nothing_else_does(max_length):
    pattern = DilationPattern.geometric(8, 32, preset="retrofit")
    layer = LongNetCacheLayer(pattern, max_length)
    positions = torch.tensor([92, 99, 95, -1, 93, 97, 96, 98, 94]).expand(1, 2, -1)  # of the widest window only a part
    entries = positions[..., None].double()
    layer.adopt(entries, -entries, positions, torch.tensor([100]), 100)
    is_held = layer.key_positions >= 0
    assert torch.equal(layer.keys[..., 0][is_held].long(), layer.key_positions[is_held])
    assert torch.equal(layer.values[..., 0][is_held].long(), -layer.key_positions[is_held])
    for head in range(2):
        assert sorted(layer.key_positions[0, head][is_held[0, head]].tolist()) == list(range(92, 100))
    assert layer.key_branches[~is_held].eq(0).all()


@pytest.mark.parametrize("max_length", [None, 50])
def test_reset_forgets_everything(max_length):
    model, tokens = tiny_model(), random_tokens(2, 50)
    cache = LongNetCache(model.config, max_length=max_length)
    with torch.no_grad():
        model(random_tokens(2, 40, seed=1), past_key_values=cache)
        cache.reset()
        assert cache.get_seq_length() == 0
        output = [model(chunk, past_key_values=cache).logits for chunk in tokens.split([10, 25, 1, 14], dim=1)]
        torch.testing.assert_close(torch.cat(output, dim=1), model(tokens, use_cache=False).logits, **CLOSE)


@pytest.mark.parametrize("max_length", [None, 50])
def test_gradients_go_through_what_is_held(max_length):
    model, tokens = tiny_model(), random_tokens(2, 50)
    gradients = []
    for chunks in ([50], [20, 1, 1, 28]):
        cache = LongNetCache(model.config, max_length=max_length)
        embeddings = model.get_input_embeddings()(tokens).detach().requires_grad_()
        parts = embeddings.split(chunks, dim=1)
        logits = torch.cat([model(inputs_embeds=part, past_key_values=cache).logits for part in parts], dim=1)
        gradients += torch.autograd.grad(logits.square().mean(), embeddings)
    torch.testing.assert_close(*gradients, **CLOSE)


@pytest.mark.parametrize("max_length", [None, 50])
def test_gradients_of_queries_alone_go_through_what_is_held(max_length):
    """As many KV heads as heads: what is saved for the queries' gradient are the slots themselves."""
    model, tokens = tiny_model(num_key_value_heads=4), random_tokens(2, 50)
    model.requires_grad_(False)
    weights = [layer.self_attn.q_proj.weight.requires_grad_() for layer in model.model.layers]
    gradients = []
    for chunks in ([50], [20] + [1] * 30):
        cache, parts = LongNetCache(model.config, max_length=max_length), tokens.split(chunks, dim=1)
        logits = torch.cat([model(part, past_key_values=cache).logits for part in parts], dim=1)
        gradients.append(torch.autograd.grad(logits.square().mean(), weights))
    for expected, found in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected, **CLOSE)


@pytest.mark.parametrize("max_length", [None, 50])
def test_what_was_held_in_inference_mode_is_written_outside_of_it(max_length):
    model, tokens = tiny_model(), random_tokens(2, 50)
    full = model(tokens, use_cache=False).logits.detach()

    def filled(length: int, record: bool = False) -> LongNetCache:
        cache = LongNetCache(model.config, max_length=max_length)
        if record:
            cache.activate_past_recording()
        with torch.inference_mode():
            model(tokens[:, :length], past_key_values=cache)
        return cache

    def rest(cache: LongNetCache, first: int, *chunks: int) -> None:
        with torch.no_grad():
            parts = [model(part, past_key_values=cache).logits for part in tokens[:, first:].split(chunks, dim=1)]
        torch.testing.assert_close(torch.cat(parts, dim=1), full[:, first:], **CLOSE)

    rest(filled(40), 40, 1, 9)
    (cropped := filled(7, record=max_length is not None)).crop(-5)
    rest(cropped, 2, 1, 47)
    (emptied := filled(40)).reset()
    rest(emptied, 0, 20, 30)
    (turned := filled(40)).reorder_cache(torch.tensor([1, 0]))
    turned.reorder_cache(torch.tensor([1, 0]))
    rest(turned, 40, 10)
    (loaded := filled(30)).load_state_dict(filled(40).state_dict())
    rest(loaded, 40, 1, 9)


def test_rows_can_be_selected_and_repeated():
    model, tokens = tiny_model(), random_tokens(3, 50)
    with torch.no_grad():
        _, cache = decode(model, tokens[:, :40], left_padding(0, 3, 8, length=40), [40])
        cache.batch_select_indices(torch.tensor([2, 0]))
        cache.batch_repeat_interleave(2)
        rows = torch.tensor([2, 2, 0, 0])
        output = model(tokens[rows, 40:], past_key_values=cache).logits
        alone = torch.cat([model(tokens[2:3, 8:]).logits[:, -10:], model(tokens[:1]).logits[:, -10:]])
    torch.testing.assert_close(output, alone.repeat_interleave(2, dim=0), **CLOSE)


@pytest.mark.parametrize("recorded", [False, True], ids=["history", "recorded"])
def test_selected_rows_can_be_cropped(recorded):
    model, tokens, rows = tiny_model(), random_tokens(3, 30), torch.tensor([2, 0])
    mask = left_padding(0, 1, 4, length=30)
    cache = LongNetCache(model.config)
    if recorded:
        cache.activate_past_recording()
    with torch.no_grad():
        model(tokens[:, :7], attention_mask=mask[:, :7], past_key_values=cache)
        cache.batch_select_indices(rows)
        cache.crop(-5)  # of which the first row, once the third, has three real ones
        output = model(tokens[rows, 2:], attention_mask=mask[rows], past_key_values=cache).logits
        full = model(tokens[rows], attention_mask=mask[rows]).logits[:, 2:]
    torch.testing.assert_close(output * mask[rows, 2:, None], full * mask[rows, 2:, None], **CLOSE)


def test_reordered_rows_stay_where_a_graph_reads_them():
    model = tiny_model()
    cache = LongNetCache(model.config, max_length=40)
    with torch.no_grad():
        model(random_tokens(2, 20), past_key_values=cache)
        names = ("keys", "values", "key_positions", "key_branches", "seen")
        before = [{name: getattr(layer, name).data_ptr() for name in names} for layer in cache.layers]
        held = cache.layers[0].keys.clone()
        cache.reorder_cache(torch.tensor([1, 0]))
    assert [{name: getattr(layer, name).data_ptr() for name in names} for layer in cache.layers] == before
    assert torch.equal(cache.layers[0].keys, held.flip(0)) and not torch.equal(held, held.flip(0))


def test_cropping_what_was_dropped_is_refused():
    model = tiny_model()
    with torch.no_grad():
        _, cache = decode(model, random_tokens(1, 200), None, [100] * 2)
    with pytest.raises(ValueError, match="cannot take back 60 tokens: only the last"):
        cache.crop(-60)
    with pytest.raises(ValueError, match="negative integer, got 5"):
        cache.layers[0].crop(5)
    model = tiny_model(dense_layers=[0])
    with torch.no_grad():
        _, cache = decode(model, random_tokens(1, 60), None, [60])
    with pytest.raises(ValueError, match="cannot take back 3 tokens"):
        cache.crop(-3)
    assert [layer.get_seq_length() for layer in cache.layers] == [60, 60]
    loaded = LongNetCache(model.config)
    loaded.load_state_dict(cache.state_dict())
    with pytest.raises(ValueError, match="cannot take back 3 tokens: only the last 0"):
        loaded.layers[0].crop(-3)


@pytest.mark.parametrize("recorded", [False, True], ids=["history", "recorded"])
@pytest.mark.parametrize("branches", [((8, 16, 32), (1, 2, 4)), ((30, 32), (1, 1))], ids=["nested", "not nested"])
@pytest.mark.parametrize("chunks", [[40], [1] * 7, [5, 1, 1, 9], [70, 1], [60, 1, 3, 1]], ids=str)
def test_what_a_crop_takes_back_leaves_no_trace(branches, chunks, recorded):
    segment_lengths, dilation_rates = branches
    model = tiny_model(segment_lengths=segment_lengths, dilation_rates=dilation_rates, dense_layers=[1])
    paddings = torch.tensor([0, 3])
    length = sum(chunks)
    tokens, others = random_tokens(2, length), random_tokens(2, 45, seed=1)
    mask = (torch.arange(length + 45) >= paddings[:, None]).long()
    cache, at = LongNetCache(model.config), 0
    with torch.no_grad():
        for i, chunk in enumerate(chunks):
            if recorded and i == len(chunks) // 2:
                cache.activate_past_recording()
            model(tokens[:, at : at + chunk], attention_mask=mask[:, : at + chunk], past_key_values=cache)
            at += chunk
        most = min(layer.croppable for layer in cache.layers)
        assert most >= sum(chunks[len(chunks) // 2 :]) if recorded else most in (0, length)
        for removed, first in ((1, 4), (most // 2, 1), (most - 1, 9)) if most else ():
            kept, cropped = length - removed, copy.deepcopy(cache)
            cropped.crop(-removed)
            assert cropped.get_seq_length() == kept
            text = torch.cat([tokens[:, :kept], others], dim=1)
            expected = model(text, attention_mask=mask[:, : kept + 45]).logits[:, kept:]
            for new in (slice(0, first), slice(first, first + 1), slice(first + 1, 44), slice(44, 45)):
                of_mask = mask[:, : kept + new.stop]
                found = model(others[:, new], attention_mask=of_mask, past_key_values=cropped).logits
                torch.testing.assert_close(found, expected[:, new])


def test_another_batch_size_is_refused():
    model = tiny_model()
    cache = model(random_tokens(2, 5), use_cache=True).past_key_values
    with pytest.raises(ValueError, match="holds a batch of 2 rows, got 3"):
        model(random_tokens(3, 1), past_key_values=cache)


def test_positions_stay_exact_beyond_2_to_the_31():
    model, tokens = tiny_model("paper"), random_tokens(1, 60)
    start = 2**31 + 2**5  # a multiple of every segment length: the pattern looks the same from here on
    with torch.no_grad():
        full = model(tokens).logits
        near = torch.arange(30)[None]
        first = model(tokens[:, :30], use_cache=True, position_ids=near + start)
        for layer in first.past_key_values.layers:
            layer.key_positions = torch.where(layer.key_positions >= 0, layer.key_positions + start, -1)
            layer.seen = layer.seen + start
        rest = model(tokens[:, 30:], past_key_values=first.past_key_values).logits
    torch.testing.assert_close(torch.cat([first.logits, rest], dim=1), full, rtol=1e-3, atol=1e-3)


def test_a_fixed_cache_that_is_reset_holds_no_nan_of_the_sequence_before():
    model = tiny_model("retrofit").float()
    cache = LongNetCache(model.config, max_length=20)
    with torch.no_grad():
        model(random_tokens(1, 12), past_key_values=cache)
    for layer in cache.layers:
        layer.keys.fill_(torch.nan)
        layer.values.fill_(torch.nan)
    cache.reset()
    assert not any(x.any() for layer in cache.layers for x in (layer.keys, layer.values))


def test_activation_checkpointing_in_training_does_not_lose_the_past():
    """transformers' checkpointed layers are given no cache: the new tokens would attend among themselves alone."""
    model, tokens = tiny_model(), random_tokens(1, 30)
    cache = LongNetCache(model.config)
    with torch.no_grad():
        model(tokens[:, :20], past_key_values=cache)
    checkpointed(model)
    with pytest.raises(ValueError, match="activation checkpointing in training takes the cache from the layers"):
        model(tokens[:, 20:], past_key_values=cache)
    with torch.no_grad():
        found = model.eval()(tokens[:, 20:], past_key_values=cache).logits
        torch.testing.assert_close(found, model(tokens).logits[:, 20:], **CLOSE)


@pytest.mark.parametrize("dense_layers", [[], [0]])
def test_an_empty_chunk_before_all_others_changes_nothing(dense_layers):
    model = tiny_model(segment_lengths=(64, 128), dilation_rates=(1, 2), dense_layers=dense_layers)
    tokens, cache = random_tokens(1, 12), LongNetCache(model.config)
    with torch.no_grad():
        model(tokens[:, :0], past_key_values=cache)
        found = [model(part, past_key_values=cache).logits for part in tokens.split([5, 1, 6], dim=1)]
        torch.testing.assert_close(torch.cat(found, dim=1), model(tokens).logits, **CLOSE)
