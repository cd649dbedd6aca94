"""Decoding through a cache of fixed size is one graph that serves a whole generation."""

import re
import shutil

import pytest
import torch
from tiny_models import left_padding, random_tokens, tiny_model
from torch._inductor.utils import run_and_get_code

from modeling_longnet import DilationPattern, LongNetCache
from modeling_longnet.cache_layer import LongNetCacheLayer


CLOSE = {"rtol": 1e-6, "atol": 1e-6}


def counting_backend(graphs: list):
    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    return backend


@pytest.mark.parametrize(
    ("preset", "padded"), [("paper", True), ("torchscale", False), ("retrofit", True)], ids=lambda x: str(x)
)
def test_a_generation_is_one_graph_whose_logits_are_those_of_the_full_forward(preset, padded):
    torch.compiler.reset()
    graphs = []
    model = tiny_model(preset)
    length = 2 * 32 + 12
    tokens = random_tokens(2, length)
    mask = left_padding(0, 5, length=length) if padded else torch.ones(2, length, dtype=torch.long)
    cache = LongNetCache(model.config, max_length=length)
    step = torch.compile(model, backend=counting_backend(graphs), fullgraph=True)
    with torch.no_grad():
        logits = [model(tokens[:, :9], attention_mask=mask[:, :9], past_key_values=cache).logits]
        address = cache.layers[0].keys.data_ptr()
        for t in range(9, length):
            new_mask = mask[:, t : t + 1] if padded else None
            logits.append(step(tokens[:, t : t + 1], attention_mask=new_mask, past_key_values=cache).logits)
        full = model(tokens, attention_mask=mask, use_cache=False).logits
    torch.testing.assert_close(torch.cat(logits, dim=1)[mask.bool()], full[mask.bool()], **CLOSE)
    assert len(graphs) == 1
    assert cache.layers[0].keys.data_ptr() == address
    assert int(cache.get_seq_length()) == length


def test_the_graph_passes_through_aot_autograd():
    torch.compiler.reset()
    model, tokens = tiny_model("retrofit"), random_tokens(1, 40)
    cache = LongNetCache(model.config, max_length=40)
    step = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        model(tokens[:, :20], past_key_values=cache)
        logits = [step(tokens[:, t : t + 1], past_key_values=cache).logits for t in range(20, 40)]
        full = model(tokens, use_cache=False).logits[:, 20:]
    torch.testing.assert_close(torch.cat(logits, dim=1), full, **CLOSE)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile's own backend needs a C++ compiler")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # of inductor, about itself
def test_a_compiled_step_writes_into_the_cache_and_copies_none_of_it():
    torch.compiler.reset()
    layer = LongNetCacheLayer(DilationPattern.geometric(8, 64, preset="retrofit"), max_length=100)
    key, value = torch.randn(2, 2, 3, 1, 16)
    layer.update(key, value, positions=torch.zeros(2, 1, dtype=torch.long))

    def step(key, value, positions):
        keys, values = layer.update(key, value, positions=positions)
        return keys.sum(2) + values.sum(2)

    key, value = torch.randn(2, 2, 3, 1, 16)
    sums, (code,) = run_and_get_code(
        torch.compile(step, fullgraph=True), key, value, torch.ones(2, 1, dtype=torch.long)
    )
    torch.testing.assert_close(sums, layer.keys.sum(2) + layer.values.sum(2))
    held = layer.key_positions.amax(-1)
    assert held.eq(1).all()
    allocated = re.findall(r"empty_strided\w*\(\(([\d, ]+)\)", code)
    assert allocated
    slots = layer.key_positions.shape[-1]
    assert not any(str(slots) in shape.split(", ") for shape in allocated), allocated


@pytest.mark.parametrize(
    ("preset", "how"),
    [("paper", {"prefill_chunk_size": 7}), ("torchscale", {}), ("retrofit", {"num_beams": 3})],
    ids=str,
)
def test_generate_with_a_cache_of_fixed_size_equals_generate_without_cache(preset, how):
    model = tiny_model(preset)
    rows = how.get("num_beams", 1) * 2
    tokens, mask = random_tokens(2, 30), left_padding(0, 17, length=30)
    kwargs = {"attention_mask": mask, "max_new_tokens": 45, "do_sample": False, "eos_token_id": None}
    cache = LongNetCache(model.config, max_length=75)
    cached = model.generate(tokens, past_key_values=cache, **kwargs, **how)
    how = {name: value for name, value in how.items() if name != "prefill_chunk_size"}
    assert torch.equal(cached, model.generate(tokens, use_cache=False, **kwargs, **how))
    assert cache.layers[0].keys.shape[:3] == (rows, 2, model.config.pattern.cache_entries(75) + 1)


def test_assisted_decoding_works_with_a_cache_of_fixed_size():
    model, helper = tiny_model("retrofit"), tiny_model("retrofit", seed=1)
    helper.lm_head.weight.data.copy_(model.lm_head.weight)
    tokens = random_tokens(1, 8).repeat(1, 5)
    kwargs = {"max_new_tokens": 45, "do_sample": False, "eos_token_id": None}
    cache = LongNetCache(model.config, max_length=100)
    assisted = model.generate(tokens, assistant_model=helper, past_key_values=cache, **kwargs)
    assert torch.equal(assisted, model.generate(tokens, **kwargs))


def test_reset_keeps_the_memory_and_forgets_the_tokens():
    model, tokens = tiny_model(), random_tokens(2, 50)
    cache = LongNetCache(model.config, max_length=50)
    with torch.no_grad():
        model(random_tokens(2, 40, seed=1), past_key_values=cache)
        address = cache.layers[1].values.data_ptr()
        cache.reset()
        assert int(cache.get_seq_length()) == 0
        output = model(tokens, past_key_values=cache).logits
    torch.testing.assert_close(output, model(tokens, use_cache=False).logits, **CLOSE)
    assert cache.layers[1].values.data_ptr() == address


def test_more_tokens_than_fit_are_refused_and_leave_the_cache_as_it_was():
    model = tiny_model()
    cache = LongNetCache(model.config, max_length=20)
    with torch.no_grad():
        model(random_tokens(1, 18), past_key_values=cache)
        with pytest.raises(ValueError, match="made for max_length=20 tokens, got 21"):
            model(random_tokens(1, 3), past_key_values=cache)
    assert int(cache.get_seq_length()) == 18
    assert cache.get_max_length() == 20
    assert LongNetCache(model.config, max_length=32).get_max_length() == -1  # the longest window is whole
    more = LongNetCache(model.config, max_length=10**12)
    assert [layer.max_length for layer in more.layers] == [32, 32]  # and more room would serve nothing


@pytest.mark.parametrize("enlarges", [False, True])
def test_a_graph_refuses_tokens_that_its_cache_would_drop(enlarges):
    torch.compiler.reset()
    model, tokens = tiny_model(), random_tokens(2, 24)
    cache = LongNetCache(model.config, max_length=20, enlarges=enlarges)
    step = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        model(tokens[:, :18], past_key_values=cache)
        logits = [step(tokens[:, t : t + 1], past_key_values=cache).logits for t in (18, 19)]
        torch.testing.assert_close(
            torch.cat(logits, dim=1), model(tokens[:, :20], use_cache=False).logits[:, 18:], **CLOSE
        )
        with pytest.raises(
            RuntimeError, match="the cache has room for 20 tokens, which a compiled graph cannot change"
        ):
            step(tokens[:, 20:21], past_key_values=cache)


@pytest.mark.parametrize("chunk", [1, 3])
@pytest.mark.parametrize("fields", [{"dense_layers": (1,)}, {"local_layers": (0,)}], ids=str)
def test_no_layer_takes_what_a_later_one_has_no_room_for(fields, chunk):
    model, tokens = tiny_model(**fields), random_tokens(2, 50)
    room = 40 if "dense_layers" in fields else 20  # the first layer goes on for ever, the second does not
    cache = LongNetCache(model.config, max_length=room)
    with torch.no_grad():
        with pytest.raises(ValueError, match=f"made for max_length={room} tokens, got 50"):
            model(tokens, past_key_values=cache)
        assert cache.is_empty
        model(tokens[:, : room - chunk + 1], past_key_values=cache)
        with pytest.raises(ValueError, match=f"made for max_length={room} tokens, got {room + 1}"):
            model(tokens[:, room - chunk + 1 : room + 1], past_key_values=cache)
        assert [layer.seen.tolist() for layer in cache.layers] == [[room - chunk + 1] * 2] * 2
        if chunk > 1:  # what still fits follows what the cache held
            logits = model(tokens[:, room - 2 : room - 1], past_key_values=cache).logits
            full = model(tokens[:, : room - 1], use_cache=False).logits[:, -1:]
            torch.testing.assert_close(logits, full, rtol=1e-9, atol=1e-9)


def test_bad_arguments_of_the_cache_are_refused():
    config = tiny_model().config
    with pytest.raises(ValueError, match="max_length must be an integer of at least 1 token, got 0"):
        LongNetCache(config, max_length=0)
    with pytest.raises(ValueError, match="offloading moves the cache"):
        LongNetCache(config, max_length=8, offloading=True)
