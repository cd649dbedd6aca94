"""LongNetCache: wrong states, models and numbers are refused before anything changes, and ends are clean."""

import copy

import pytest
import torch
import transformers
from tiny_models import VOCABULARY, left_padding, random_tokens, tiny_config, tiny_model

from modeling_longnet import DecodingGraph, DilationPattern, LongNetCache, decoding_token
from modeling_longnet.cache_layer import LongNetCacheLayer
from modeling_longnet.configuration_longnet import LAYER_FIELDS


CLOSE = {"rtol": 1e-6, "atol": 1e-6}


def filled(model, tokens, **options):
    cache = LongNetCache(model.config, **options)
    with torch.no_grad():
        model(tokens, past_key_values=cache)
    return cache


def goes_on(model, cache, tokens, read: int) -> None:
    """Check that the cache holds the first ``read`` of the tokens, and nothing else."""
    with torch.no_grad():
        logits = model(tokens[:, read:], past_key_values=cache).logits
        full = model(tokens, use_cache=False).logits[:, read:]
    torch.testing.assert_close(logits, full, **CLOSE)


@pytest.mark.parametrize("read", [1, 5])
@pytest.mark.parametrize("recorded", [False, True])
def test_what_is_cropped_to_nothing_begins_anew(read, recorded):
    model, tokens = tiny_model("paper"), random_tokens(2, 50)
    cache = LongNetCache(model.config)
    if recorded:
        cache.activate_past_recording()
    with torch.no_grad():
        model(random_tokens(2, read, seed=1), past_key_values=cache)
    cache.crop(-read)
    assert cache.is_empty
    goes_on(model, cache, tokens, 0)


@pytest.mark.parametrize("number", [-1.0, None, "x", 1])
def test_crop_takes_integers_and_changes_nothing_else(number):
    model, tokens = tiny_model("retrofit"), random_tokens(2, 50)
    cache = filled(model, tokens[:, :6])
    with pytest.raises(ValueError, match="negative integer, got"):
        cache.crop(number)
    goes_on(model, cache, tokens, 6)


def test_assisted_decoding_leaves_a_bounded_cache():
    model = tiny_model("retrofit")
    output = model.generate(
        random_tokens(1, 20), max_new_tokens=10, prompt_lookup_num_tokens=3, return_dict_in_generate=True
    )
    cache = output.past_key_values
    model.generate(output.sequences, past_key_values=cache, max_new_tokens=60, eos_token_id=None)
    assert all(layer.pending is None for layer in cache.layers)
    longest = max(model.config.segment_lengths)
    assert cache.layers[0].keys.shape[2] <= cache.layers[0].pattern.cache_entries(longest) + longest


@pytest.mark.parametrize("options", [{}, {"max_length": 64}])
def test_a_state_may_be_the_caches_own(options):
    model, tokens = tiny_model("retrofit", dense_layers=(1,)), random_tokens(2, 50)
    cache = filled(model, tokens[:, :30], **options)
    cache.load_state_dict(cache.state_dict())
    goes_on(model, cache, tokens, 30)


def test_states_that_do_not_belong_are_refused_and_change_nothing():
    model, tokens = tiny_model("retrofit", dense_layers=(1,)), random_tokens(2, 50)
    other_rules = filled(tiny_model("paper", dense_layers=(1,)), tokens).state_dict()
    longer = filled(model, tokens, max_length=100).state_dict()
    whole = filled(model, tokens, max_length=64).state_dict()
    deeper = filled(tiny_model("retrofit", dense_layers=(1,), num_hidden_layers=3), tokens).state_dict()
    first = {name: x for name, x in whole.items() if name.startswith("0.")}
    lacking = {name: x for name, x in whole.items() if name != "1.seen"}
    cache = filled(model, tokens[:, :20], max_length=64)
    for state, reason in (
        (other_rules, "layer 0: the state is one of other branches or rules"),
        (longer, "layer 1: the state has slots for 100 tokens, the cache for 64: make it with max_length=100"),
        (deeper, "the state has '2.keys', the cache layers 0 to 1"),
        (first, "the state has no layer 1, the cache layers 0 to 1"),
        (lacking, "layer 1: the state lacks seen"),
        ({"keys": tokens}, "the state has 'keys'"),
    ):
        with pytest.raises(ValueError, match=reason):
            cache.load_state_dict(state)
    goes_on(model, cache, tokens, 20)


def test_a_state_of_fewer_rows_replaces_the_rows():
    model, tokens = tiny_model("retrofit"), random_tokens(1, 50)
    cache = filled(model, random_tokens(3, 20), max_length=64)
    cache.load_state_dict(filled(model, tokens[:, :20], max_length=64).state_dict())
    goes_on(model, cache, tokens, 20)


def test_a_fixed_cache_that_was_reset_takes_another_batch():
    model, tokens = tiny_model("retrofit"), random_tokens(1, 50)
    cache = filled(model, random_tokens(2, 20), max_length=64)
    cache.reset()
    goes_on(model, cache, tokens, 0)


@pytest.mark.parametrize("read", [0, 20])
def test_a_cache_serves_the_model_that_it_was_made_for(read):
    model, dense = tiny_model("retrofit"), tiny_model("retrofit", dense_layers=(1,))
    cache = LongNetCache(model.config)
    with torch.no_grad():
        if read:
            model(random_tokens(2, read), past_key_values=cache)
        with pytest.raises(
            ValueError, match="layer 1 of the cache holds the keys of branches .* reaches every key; make"
        ):
            dense(random_tokens(2, 5), past_key_values=cache)
    if read:
        goes_on(model, cache, torch.cat([random_tokens(2, read), random_tokens(2, 9, seed=1)], dim=1), read)


@pytest.mark.parametrize(
    "edit",
    [
        {"dense_layers": (1,)},
        {"dense_layers": [1]},
        {"local_layers": (0,)},
        {"segment_lengths": (8, 16, 64)},
        {"dilation_rates": [1, 2, 2]},
        {"head_offsets": "blocked", "count_overlaps": True},
        {"count_overlaps": True},
        {"dilate_queries": True},
        {"window": "segment"},
        {"num_hidden_layers": 1},
        {"first_kv_head": 0, "num_key_value_heads": 1},
    ],
    ids=str,
)
def test_a_cache_does_not_serve_a_config_that_was_edited(edit):
    assert set().union(edit) <= set(LAYER_FIELDS)
    model, tokens = tiny_model("retrofit"), random_tokens(2, 30)
    cache = filled(model, tokens)
    for name, value in edit.items():
        setattr(model.config, name, value)
    with torch.no_grad(), pytest.raises(ValueError, match=r"layer \d of the cache holds|the cache has 2 layers"):
        model(tokens[:, :1], past_key_values=cache)


def test_a_list_that_is_edited_in_place_is_seen():
    model, tokens = tiny_model("retrofit"), random_tokens(2, 30)
    model.config.local_layers = []
    cache = filled(model, tokens)
    model.config.local_layers.append(1)
    with pytest.raises(ValueError, match="layer 1 of the cache holds"):
        model(tokens[:, :1], past_key_values=cache)


def test_layer_patterns_follow_from_the_fields_that_are_compared():
    model = tiny_model("retrofit", local_layers=(0,), dense_layers=(1,))
    other = tiny_config("paper", hidden_size=64, head_dim=4)
    for name in LAYER_FIELDS:
        setattr(other, name, getattr(model.config, name))
    assert [other.layer_pattern(i) for i in range(2)] == [model.config.layer_pattern(i) for i in range(2)]


@pytest.mark.parametrize("max_length", [0, -3, 1.5, True, "x", float("inf")])
def test_max_length_is_a_number_of_tokens(max_length):
    with pytest.raises(ValueError, match="max_length must be an integer of at least 1 token, got"):
        LongNetCache(tiny_model().config, max_length=max_length)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_offloading_without_a_gpu_says_so():
    with pytest.raises(ValueError, match="there is no CUDA device"):
        LongNetCache(tiny_model().config, offloading=True)


def test_rows_that_are_selected_stay_marked_for_the_compiler():
    model = tiny_model("retrofit")
    cache = filled(model, random_tokens(2, 20), max_length=64)
    marks = [getattr(x, "_dynamo_static_input_type", None) for x in (cache.layers[0].keys, cache.layers[0].seen)]
    cache.batch_select_indices(torch.tensor([0]))
    assert None not in marks
    assert [x._dynamo_static_input_type for x in (cache.layers[0].keys, cache.layers[0].seen)] == marks


def test_a_graph_sees_weights_and_slots_that_are_replaced(monkeypatch):
    monkeypatch.setattr(decoding_token, "slots_refusal", lambda *call: None)
    monkeypatch.setattr(decoding_token, "device_refusal", lambda *call: None)
    model = tiny_model("retrofit").float()
    cache = filled(model, random_tokens(1, 20), max_length=64)
    graph = DecodingGraph(model, cache)

    def replace_weights():
        model.load_state_dict({name: x.clone() for name, x in model.state_dict().items()}, assign=True)

    def replace_values():
        cache.layers[0].values = cache.layers[0].values.clone()

    for replace in (replace_weights, replace_values):
        held = graph._held()
        assert held == graph._held()
        replace()
        assert held != graph._held()
    with pytest.raises(TypeError, match="DecodingGraph takes a LongNetForCausalLM, got LongNetModel"):
        DecodingGraph(model.model, cache)


def test_labels_of_another_shape_are_named_in_evaluation_too():
    model, tokens = tiny_model(), random_tokens(2, 50)
    for labels in (tokens[:, :40], tokens[:1]):
        with pytest.raises(ValueError, match=r"each of the \[2, 50\] tokens one, got shape"):
            model(tokens, labels=labels)


@pytest.mark.parametrize("token", [VOCABULARY, -1, 155])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("train", [False, True])
def test_labels_outside_the_vocabulary_are_named_in_evaluation_too(token, smoothing, train):
    model, tokens = tiny_model().train(train), random_tokens(2, 50)
    labels = tokens.clone()
    labels[0] = -100
    labels[:, 0] = token  # nothing predicts a row's first token
    assert model(tokens, labels=labels, label_smoothing=smoothing).loss.isfinite()
    labels[1, 7] = token
    message = f"tokens of the vocabulary, 0 to {VOCABULARY - 1}; they reach from .*{token}"
    for given in ({"labels": labels}, {"shift_labels": labels}):
        with pytest.raises(ValueError, match=message):
            model(tokens, label_smoothing=smoothing, **given)


def test_slots_that_enlarge_double_and_stay_marked_for_the_compiler(monkeypatch):
    model, tokens = tiny_model("retrofit", dense_layers=(1,)), random_tokens(1, 220)
    cache = LongNetCache(model.config, max_length=8, enlarges=True)
    moves, move = [], LongNetCacheLayer._move_to
    monkeypatch.setattr(
        LongNetCacheLayer,
        "_move_to",
        lambda self, slots, *rest: moves.append(slots.length) or move(self, slots, *rest),
    )
    with torch.no_grad():
        for token in tokens[:, :200].split(1, dim=1):
            model(token, past_key_values=cache)
    assert [length for length in moves if length > 32] == [
        64,
        128,
        256,
    ]  # of the dense layer: each twice the one before
    for layer in cache.layers:
        assert all(hasattr(x, "_dynamo_static_input_type") for x in (layer.keys, layer.key_positions, layer.columns))
    goes_on(model, cache, tokens, 200)


def test_a_fixed_cache_adopts_what_fits_or_enlarges():
    pattern = DilationPattern((2**62,), (1,))
    entries = torch.arange(30.0)[None, None, :, None].expand(1, 2, -1, 4)
    positions = torch.arange(30).expand(1, 2, -1)
    with pytest.raises(ValueError, match="made for max_length=20 tokens, got 30"):
        LongNetCacheLayer(pattern, 20).adopt(entries, entries, positions, torch.tensor([30]), 30)
    layer = LongNetCacheLayer(pattern, 20, enlarges=True)
    layer.adopt(entries, entries, positions, torch.tensor([30]), 30)
    assert layer.key_positions[0, 0].ge(0).sum() == 30


def test_a_cache_that_is_reset_holds_no_token_that_waits_for_a_crop():
    model, tokens = tiny_model("retrofit"), random_tokens(2, 50)
    for options in ({}, {"max_length": 64}):
        cache = LongNetCache(model.config, **options)
        cache.activate_past_recording()
        with torch.no_grad():
            model(tokens[:, :9], past_key_values=cache)
        cache.reset()
        assert all(layer.croppable == 0 for layer in cache.layers)
        goes_on(model, cache, tokens, 0)


@pytest.fixture
def half_read():
    """A model, a cache that holds 20 tokens of two rows, 5 of them padding, and the sequence with 4 more."""
    model, tokens, mask = tiny_model(), random_tokens(2, 24), left_padding(0, 5, length=24)
    cache = LongNetCache(model.config)
    with torch.no_grad():
        model(tokens[:, :20], attention_mask=mask[:, :20], past_key_values=cache)
    return model, cache, tokens, mask


@pytest.mark.parametrize("width", [5, 20, 23, 25, 40])
def test_a_mask_is_of_the_new_tokens_or_of_all(half_read, width):
    model, cache, tokens, mask = half_read
    wrong = torch.ones(2, width, dtype=torch.long)
    with torch.no_grad():
        with pytest.raises(
            ValueError, match=rf"has {width} columns for 20 tokens in the cache and 4 new ones: give 24"
        ):
            model(tokens[:, 20:], attention_mask=wrong, past_key_values=cache)
        full = model(tokens, attention_mask=mask, use_cache=False).logits[:, 20:]
        for right in (mask, mask[:, 20:]):
            logits = model(tokens[:, 20:], attention_mask=right, past_key_values=copy.deepcopy(cache)).logits
            torch.testing.assert_close(logits, full, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("how", [{}, {"prefill_chunk_size": 3}, {"prompt_lookup_num_tokens": 2}], ids=str)
def test_a_mask_that_hides_other_tokens_than_were_read_is_refused(half_read, how):
    model, cache, tokens, mask = half_read
    said = "the cache has read 15 real tokens in row {}, and attention_mask shows {} among the 20 of the past"
    ones, row = torch.ones_like(mask), 1
    if "prompt_lookup_num_tokens" in how:
        cache.batch_select_indices(torch.tensor([1]))
        tokens, mask, ones, row = tokens[1:], mask[1:], ones[1:], 0
    more = mask.clone()
    more[row, 7] = 0
    given = {"past_key_values": cache, "max_new_tokens": 3, "eos_token_id": None, "do_sample": False} | how
    with torch.no_grad():
        for other, shown in ((ones, 20), (more, 14)):
            with pytest.raises(ValueError, match=said.format(row, shown)):
                model.generate(tokens, attention_mask=other, **given)
        with pytest.raises(ValueError, match=said.format(row, 20)):
            model.generate(tokens, **given)
        with pytest.raises(ValueError, match=said.format(row, 20)):
            model(tokens[:, 20:], attention_mask=ones, past_key_values=cache)
        anew = model.generate(tokens, attention_mask=mask, max_new_tokens=3, use_cache=False, eos_token_id=None)
        if "prefill_chunk_size" in how and transformers.__version__.startswith("5.17."):  # reads the past once more
            with pytest.raises(ValueError, match="columns for 23 tokens in the cache and 3 new ones"):
                model.generate(tokens, attention_mask=mask, **given)
        else:
            assert torch.equal(model.generate(tokens, attention_mask=mask, **given), anew)


@pytest.mark.parametrize("num_given", [3, 17, 20])
@pytest.mark.parametrize("embedded", [False, True])
def test_generating_from_a_cache_needs_a_token_that_it_has_not_read(half_read, num_given, embedded):
    model, cache, tokens, mask = half_read
    given = {"input_ids": tokens[:, :num_given]}
    if embedded:
        given = {"inputs_embeds": model.get_input_embeddings()(tokens[:, :num_given])}
    with pytest.raises(
        ValueError, match=f"the cache holds 20 tokens, and {num_given} were given: give these and at least"
    ):
        model.generate(**given, attention_mask=mask[:, :num_given], past_key_values=cache, max_new_tokens=3)
    expected = model.generate(tokens, attention_mask=mask, use_cache=False, max_new_tokens=3, eos_token_id=None)
    alone = model.generate(
        tokens[:, 20:], attention_mask=mask, past_key_values=cache, max_new_tokens=3, eos_token_id=None
    )
    assert torch.equal(alone[:, 4:], expected[:, 24:])
