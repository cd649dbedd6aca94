"""A stream scores a sequence chunk by chunk as one forward pass would, in constant memory, from any position."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_models import random_tokens, tiny_model
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from modeling_longnet import LongNetCache, TokenStream, stream
from modeling_longnet.dilation_pattern import PRESETS


CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def losses_of_one_pass(model, tokens):
    with torch.no_grad():
        logits = model(tokens, use_cache=False).logits.float()[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none").view(len(tokens), -1)


@settings(max_examples=12)
@given(preset=st.sampled_from(sorted(PRESETS)), chunks=st.lists(st.integers(1, 50), min_size=2, max_size=6))
def test_losses_by_chunks_are_those_of_one_pass(preset, chunks):
    model, tokens = tiny_model(preset), random_tokens(2, sum(chunks))
    losses = torch.cat(list(stream(model, tokens.split(chunks, dim=1))), dim=1)
    assert losses[:, 0].isnan().all() and losses.dtype == torch.float32
    torch.testing.assert_close(losses[:, 1:], losses_of_one_pass(model, tokens), **CLOSE)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft reads it
def test_a_model_with_an_adapter_streams_with_it():
    tokens = random_tokens(2, 60)
    adapter = LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False)
    tuned = get_peft_model(tiny_model("retrofit"), adapter).eval()
    losses = torch.cat(list(stream(tuned, tokens.split(25, dim=1))), dim=1)
    torch.testing.assert_close(losses[:, 1:], losses_of_one_pass(tuned, tokens), **CLOSE)
    assert not torch.allclose(losses[:, 1:], losses_of_one_pass(tiny_model("retrofit"), tokens))
    with pytest.raises(ValueError, match="training mode"):
        TokenStream(tuned.train())
    prompted = get_peft_model(tiny_model("retrofit"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    with pytest.raises(ValueError, match="a stream takes no PROMPT_TUNING, whose virtual tokens"):
        TokenStream(prompted.eval())


def test_a_config_that_asks_for_tuples_streams():
    model, tokens = tiny_model("retrofit", return_dict=False), random_tokens(1, 60)
    losses = torch.cat(list(stream(model, tokens.split(25, dim=1))), dim=1)
    torch.testing.assert_close(losses[:, 1:], losses_of_one_pass(tiny_model("retrofit"), tokens), **CLOSE)


def test_chunks_come_lazily_and_memory_is_constant_from_the_first_on():
    model = tiny_model("retrofit")
    fed, sizes = [], []

    def chunks():
        for seed in range(12):
            fed.append(seed)
            yield random_tokens(1, 17, seed=seed)

    tokens = TokenStream(model)
    for number, chunk in enumerate(chunks()):
        tokens.score(chunk)
        assert len(fed) == number + 1
        sizes.append(sum(x.numel() for x in tokens.state_dict().values()))
    assert len(set(sizes)) == 1
    assert tokens.position == 12 * 17


@pytest.mark.parametrize("preset", PRESETS)
def test_a_stored_stream_goes_on_bit_for_bit(preset, tmp_path):
    model, tokens = tiny_model(preset), random_tokens(1, 150)
    whole = TokenStream(model)
    expected = [whole.score(chunk) for chunk in tokens.split(30, dim=1)]
    first = TokenStream(model)
    for chunk in tokens[:, :90].split(30, dim=1):
        first.score(chunk)
    save_file({name: x.contiguous() for name, x in first.state_dict().items()}, tmp_path / "state.safetensors")
    second = TokenStream(model)
    second.score(random_tokens(1, 9, seed=1))  # what it held before is forgotten
    second.load_state_dict(load_file(tmp_path / "state.safetensors"))
    assert second.position == 90
    for chunk, losses in zip(tokens[:, 90:].split(30, dim=1), expected[3:]):
        assert torch.equal(second.score(chunk), losses)


def test_a_state_stays_as_it_was_taken_and_can_be_loaded_where_it_was_taken():
    tokens, texts = TokenStream(tiny_model("retrofit")), random_tokens(1, 90).split(30, dim=1)
    before = tokens.state_dict()
    first = tokens.score(texts[0])
    assert tokens.last_hidden_state.untyped_storage().nbytes() == tokens.last_hidden_state.nbytes  # not the chunk's
    state = tokens.state_dict()
    expected = [tokens.score(text) for text in texts[1:]]
    for _ in range(2):
        tokens.load_state_dict(state)
        tokens.load_state_dict(tokens.state_dict())
        for text, losses in zip(texts[1:], expected):
            assert torch.equal(tokens.score(text), losses)
    tokens.load_state_dict(before)
    assert tokens.position == 0
    torch.testing.assert_close(tokens.score(texts[0]), first, rtol=0, atol=0, equal_nan=True)  # nan for the first


def test_what_a_given_cache_holds_is_context():
    model, tokens = tiny_model("retrofit", dense_layers=(1,)), random_tokens(2, 60)
    cache = LongNetCache(model.config)
    with torch.no_grad():
        model(tokens[:, :25], past_key_values=cache)
    scored = TokenStream(model, cache)
    state, losses = scored.state_dict(), scored.score(tokens[:, 25:])
    assert losses[:, 0].isnan().all() and scored.position == 35
    torch.testing.assert_close(losses[:, 1:], losses_of_one_pass(model, tokens)[:, 25:], **CLOSE)
    scored.load_state_dict(state)
    torch.testing.assert_close(scored.score(tokens[:, 25:]), losses, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("used", [False, True], ids=["fresh", "used"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_state_of_another_dtype_is_rounded_to_the_models(dtype, used):
    tokens = random_tokens(1, 60)
    first, second = TokenStream(tiny_model("retrofit")), TokenStream(tiny_model("retrofit").to(dtype))  # from float64
    first.score(tokens[:, :40])
    if used:
        second.score(tokens[:, :40])
    state = first.state_dict()
    second.load_state_dict(state)
    for layer, of_state in zip(second.cache.layers, first.cache.layers):
        assert layer.keys.dtype == layer.values.dtype == layer.dtype == dtype
        assert torch.equal(layer.keys, of_state.keys.to(dtype)) and torch.equal(
            layer.values, of_state.values.to(dtype)
        )
        assert torch.equal(layer.key_positions, of_state.key_positions)
    losses, expected = second.score(tokens[:, 40:]), first.score(tokens[:, 40:])
    torch.testing.assert_close(losses, expected, **(CLOSE if dtype == torch.float32 else {"rtol": 0.1, "atol": 0.1}))
    first.load_state_dict(second.state_dict())  # and up again, exactly
    assert all(layer.keys.dtype == torch.float64 for layer in first.cache.layers)
    torch.testing.assert_close(first.score(tokens[:, :20]), second.score(tokens[:, :20]), rtol=0.1, atol=0.1)
    assert all(torch.equal(x, state[name]) and x.dtype == state[name].dtype for name, x in state.items())


def test_a_state_taken_under_autocast_keeps_its_bits():
    model, tokens = tiny_model("retrofit").float(), random_tokens(1, 60)
    with torch.autocast("cpu", torch.bfloat16):
        first, second = TokenStream(model), TokenStream(model)
        first.score(tokens[:, :40])
        state = first.state_dict()
        assert state["cache.0.values"].dtype == torch.bfloat16  # of a model in float32
        second.load_state_dict(state)
        assert all(
            x.dtype == state[name].dtype and torch.equal(x, state[name]) for name, x in second.state_dict().items()
        )
        assert torch.equal(second.score(tokens[:, 40:]), first.score(tokens[:, 40:]))


def test_a_used_cache_takes_a_state_of_another_dtype_into_its_own():
    tokens, model = random_tokens(2, 40), tiny_model("retrofit", dense_layers=(1,)).float()
    given, taken = LongNetCache(model.config), LongNetCache(model.config)
    with torch.no_grad():
        tiny_model("retrofit", dense_layers=(1,))(tokens[:, :30], past_key_values=given)
        model(tokens[:, :9], past_key_values=taken)
        taken.load_state_dict(given.state_dict())
        logits = model(tokens[:, 30:], past_key_values=taken).logits
        torch.testing.assert_close(logits, model(tokens).logits[:, 30:], rtol=1e-3, atol=1e-3)


@pytest.mark.gpu
def test_a_state_from_the_host_goes_on_on_the_gpu():
    tokens = random_tokens(1, 60)
    first, second = TokenStream(tiny_model("retrofit").float()), TokenStream(tiny_model("retrofit").float().cuda())
    first.score(tokens[:, :40])
    second.load_state_dict(first.state_dict())
    assert {x.device.type for layer in second.cache.layers for x in (layer.keys, layer.seen)} == {"cuda"}
    losses = second.score(tokens[:, 40:].cuda()).cpu()
    torch.testing.assert_close(losses, first.score(tokens[:, 40:]), rtol=1e-3, atol=1e-3)


STATE_FAULTS = {
    "position": (None, "the state lacks position"),
    "last_hidden_state": (None, "the state lacks last_hidden_state"),
    "cache.1.values": (None, "the state lacks values"),
    "cache.1.keys": ((1, 2, 1, 8), r"layer 1: keys in the state must be \[1, 2, \d+, 8\], got \[1, 2, 1, 8\]"),
    "cache.0.key_branches": ((1, 1, 1), r"layer 0: key_branches in the state must be \[1, 2, \d+\], got \[1, 1, 1\]"),
    "cache.1.seen": ((2,), r"layer 1: seen in the state must be \[1\], got \[2\]"),
    "cache.1.slots": ((2,), r"layer 1: slots in the state must be \[\], got \[2\]"),
    "last_hidden_state, wrong": ((1, 2, 32), r"last_hidden_state in the state must be \[1, 1, 32\], got \[1, 2, 32\]"),
}


@pytest.mark.parametrize("fault", STATE_FAULTS)
def test_a_state_that_does_not_fit_is_refused_before_anything_changes(fault):
    tokens, texts = TokenStream(tiny_model("retrofit")), random_tokens(1, 60).split(30, dim=1)
    tokens.score(texts[0])
    state, (shape, message) = tokens.state_dict(), STATE_FAULTS[fault]
    expected = tokens.score(texts[1])
    tokens.load_state_dict(state)
    name = fault.partition(",")[0]
    wrong = {**state, name: None if shape is None else torch.zeros(shape, dtype=state[name].dtype)}
    with pytest.raises(ValueError, match=message):
        tokens.load_state_dict({name: x for name, x in wrong.items() if x is not None})
    with pytest.raises(ValueError, match="the state lacks cache.0.seen"):
        tokens.load_state_dict({name: x for name, x in state.items() if not name.startswith("cache.")})
    assert torch.equal(tokens.score(texts[1]), expected)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_growing_cache_is_stored_and_restored(preset):
    model, tokens = tiny_model(preset, dense_layers=(1,)), random_tokens(2, 60)
    cache, other = LongNetCache(model.config), LongNetCache(model.config)
    with torch.no_grad():
        model(tokens[:, :25], past_key_values=cache)
        other.load_state_dict({name: x.clone() for name, x in cache.state_dict().items()})
        expected = model(tokens[:, 25:], past_key_values=cache).logits
        assert torch.equal(model(tokens[:, 25:], past_key_values=other).logits, expected)


@pytest.mark.parametrize("start", [2**24, 2**31, 2**40], ids=["2^24", "2^31", "2^40"])
@pytest.mark.parametrize("preset", PRESETS)
def test_positions_stay_exact_however_far_the_stream_has_come(preset, start):
    """From a multiple of every segment length the pattern looks as from 0; without RoPE so do the losses."""
    model = tiny_model(preset, layers_without_rope=(0, 1))
    tokens = random_tokens(1, 150)
    near, far = TokenStream(model), TokenStream(model)
    far.score(tokens[:, :1])
    far.cache.reset()  # allocated, nothing held
    far.last_hidden_state = None
    for layer in far.cache.layers:
        layer.seen.fill_(start)
    for chunk in tokens.split([1, 40, 1, 1, 64, 43], dim=1):
        torch.testing.assert_close(far.score(chunk), near.score(chunk), equal_nan=True, **CLOSE)
    held = [
        sorted(stream.cache.layers[0].key_positions[0, 1, :-1].tolist())  # the last slot holds nothing
        for stream in (far, near)
    ]
    assert held[0] == [start + position if position >= 0 else position for position in held[1]]
    assert held[0][-1] == start + 149


def test_what_a_stream_cannot_do_is_refused():
    model = tiny_model()
    with pytest.raises(ValueError, match=r"must be \[batch, at least one token\], got \[1, 0\]"):
        TokenStream(model).score(torch.zeros(1, 0, dtype=torch.long))
    with pytest.raises(ValueError, match=r"dense_layers \[1\] keep every token"):
        TokenStream(tiny_model(dense_layers=(1,)))
    with pytest.raises(ValueError, match=r"must be a tensor \[batch, at least one token\], got list"):
        next(stream(model, [[[5, 6]]]))
    with pytest.raises(ValueError, match="needs a LongNetForCausalLM, got LongNetModel"):
        next(stream(model.model, [random_tokens(1, 5)]))
    with pytest.raises(ValueError, match="needs a LongNetForCausalLM, got LlamaForCausalLM"):
        TokenStream(LlamaForCausalLM(LlamaConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1)).eval())
    with pytest.raises(ValueError, match="needs a LongNetForCausalLM, got Linear"):
        TokenStream(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="needs a LongNetCache, got DynamicCache"):
        TokenStream(model, DynamicCache())
    tokens = TokenStream(model)
    with pytest.raises(ValueError, match="training mode"):
        next(stream(model.train(), [random_tokens(1, 5)]))
    with pytest.raises(ValueError, match="training mode"):
        tokens.score(random_tokens(1, 5))
    model.eval()
    tokens.score(random_tokens(1, 5))
    with pytest.raises(ValueError, match="slots for 32 tokens, .* 16"):
        LongNetCache(model.config, max_length=16).load_state_dict(tokens.cache.state_dict())
    with pytest.raises(ValueError, match="2 tokens wait for crop"):
        cache = LongNetCache(model.config)
        cache.activate_past_recording()
        model(random_tokens(1, 2), past_key_values=cache)
        cache.state_dict()
