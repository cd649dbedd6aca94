"""On CUDA a generation is one captured graph, replayed: the same tokens as without a cache."""

import pytest
import torch
from tiny_models import left_padding, random_tokens, tiny_model
from transformers.generation.configuration_utils import GenerationMode

from modeling_longnet import DecodingGraph, LongNetCache, decoding_graph, decoding_token
from modeling_longnet.decoding_graph import GraphedCall


GENERATE = {"do_sample": False, "eos_token_id": None}


def gpu_model(preset: str = "retrofit", **fields):
    return tiny_model(preset, head_dim=16, max_position_embeddings=128, **fields).float().cuda()


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("dense_layers", [(), (1,)])
@pytest.mark.parametrize("preset", ["paper", "retrofit"])
def test_replayed_steps_have_the_logits_of_the_full_forward(preset, dense_layers, rows):
    model, tokens = gpu_model(preset, dense_layers=dense_layers), random_tokens(rows, 100).cuda()
    cache = LongNetCache(model.config, max_length=100)
    with torch.no_grad():
        logits = [model(tokens[:, :40], past_key_values=cache).logits]
        step = DecodingGraph(model, cache)
        logits += [step(tokens[:, t : t + 1]).clone() for t in range(40, 70)]
        logits.append(model(tokens[:, 70:80], past_key_values=cache).logits)  # another reader in between
        logits += [step(tokens[:, t : t + 1]).clone() for t in range(80, 100)]
        full = model(tokens, use_cache=False).logits
    torch.testing.assert_close(torch.cat(logits, dim=1), full, rtol=2e-3, atol=2e-3)
    assert int(cache.get_seq_length()) == 100


@pytest.mark.gpu
@pytest.mark.parametrize("dense_layers", [(), (0,)])
def test_a_graph_follows_a_cache_that_is_reset_or_enlarged_and_refuses_one_that_is_full(dense_layers):
    model, tokens = gpu_model(dense_layers=dense_layers), random_tokens(1, 31).cuda()
    full = LongNetCache(model.config, max_length=20)
    step = DecodingGraph(model, full)
    first = [step(tokens[:, t : t + 1]).clone() for t in range(20)]
    with pytest.raises(ValueError, match="made for max_length=20 tokens, got 21"):
        step(tokens[:, :1])
    full.reset()
    torch.testing.assert_close(torch.cat([step(tokens[:, t : t + 1]).clone() for t in range(20)]), torch.cat(first))
    enlarging = LongNetCache(model.config, max_length=20, enlarges=True)
    step = DecodingGraph(model, enlarging)
    logits = torch.cat([step(tokens[:, t : t + 1]).clone() for t in range(31)], dim=1)
    with torch.no_grad():
        torch.testing.assert_close(logits, model(tokens, use_cache=False).logits, rtol=2e-3, atol=2e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("dense_layers", [(), (1,)])
@pytest.mark.parametrize("how", [{}, {"num_beams": 3}, {"prefill_chunk_size": 7}, {"do_sample": True}], ids=str)
def test_generate_replays_a_graph_by_itself(how, dense_layers, monkeypatch):
    captured = []
    capture = torch.cuda.graph
    monkeypatch.setattr(
        torch.cuda, "graph", lambda graph, **kwargs: captured.append(graph) or capture(graph, **kwargs)
    )
    model = gpu_model(dense_layers=dense_layers)
    tokens, mask = random_tokens(2, 30).cuda(), left_padding(0, 17, length=30).cuda()
    kwargs = {"attention_mask": mask, "max_new_tokens": 45, **GENERATE, **how}
    outputs = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        outputs.append(model.generate(tokens, use_cache=use_cache, **kwargs))
        kwargs.pop("prefill_chunk_size", None)  # needs a cache
    assert torch.equal(*outputs)
    assert len(captured) == ("num_beams" not in how)


@pytest.mark.gpu
@pytest.mark.parametrize("context", [torch.inference_mode, torch.no_grad])
@pytest.mark.parametrize("device", [0, 1])
def test_generate_replays_on_the_device_of_the_model(device, context):
    """Whatever the current device is: it is the other one here, where there are two."""
    if torch.cuda.device_count() <= device:
        pytest.skip(f"needs {device + 1} CUDA devices, found {torch.cuda.device_count()}")
    torch.cuda.set_device(0)
    model, tokens = gpu_model().to(f"cuda:{device}"), random_tokens(2, 30).to(f"cuda:{device}")
    with context():
        replayed, stepwise = (
            model.generate(tokens, max_new_tokens=45, use_cache=use_cache, **GENERATE) for use_cache in (True, False)
        )
    assert torch.equal(replayed, stepwise)


@pytest.mark.gpu
@pytest.mark.parametrize("dense_layers", [(), (1,)])
def test_generation_continues_from_the_cache_that_generate_made(dense_layers):
    model, tokens = gpu_model(dense_layers=dense_layers), random_tokens(2, 30).cuda()
    kwargs = {**GENERATE, "return_dict_in_generate": True}
    whole = model.generate(tokens, max_new_tokens=60, **kwargs).sequences
    first = model.generate(tokens, max_new_tokens=10, **kwargs)
    rest = model.generate(first.sequences, past_key_values=first.past_key_values, max_new_tokens=50, **kwargs)
    assert torch.equal(rest.sequences, whole)


def test_generate_makes_room_in_dense_layers_for_all_that_may_come(monkeypatch):
    monkeypatch.setattr(decoding_token, "slots_refusal", lambda *call: None)
    model = tiny_model("retrofit", dense_layers=(1,), max_position_embeddings=300).float()
    longest = max(model.config.segment_lengths)
    for asked, made in ((199, 200), (10**9, 300)):
        kwargs: dict = {}
        model._prepare_cache_for_generation(model.generation_config, kwargs, GenerationMode.GREEDY_SEARCH, 1, asked)
        cache = kwargs["past_key_values"]
        assert [layer.max_length for layer in cache.layers] == [longest, made]
        assert [layer.get_max_length() for layer in cache.layers] == [-1, made]
        assert cache.layers[1].enlarges


def test_a_graph_without_a_gpu_says_so():
    model = tiny_model("retrofit").float()
    with pytest.raises(ValueError, match="does not serve: it needs a CUDA device, the model is on cpu"):
        DecodingGraph(model, LongNetCache(model.config, max_length=8))


def test_room_is_known_in_inference_mode_where_no_writes_are_counted(monkeypatch):
    monkeypatch.setattr(decoding_token, "slots_refusal", lambda *call: None)
    model = tiny_model("retrofit", dense_layers=(1,)).float()
    with torch.inference_mode():
        cache = LongNetCache(model.config, max_length=6)
        model(random_tokens(1, 3), past_key_values=cache)
        step = DecodingGraph(model, cache)
        for _ in range(3):  # graphs write what Python does not see
            step._make_room()
            for layer in cache.layers:
                layer.columns += 1
        with pytest.raises(ValueError, match="max_length=6 tokens, got 7"):
            step._make_room()


def test_what_is_no_single_token_goes_the_ordinary_way(monkeypatch):
    monkeypatch.setattr(decoding_token, "slots_refusal", lambda *call: None)
    calls = []
    monkeypatch.setattr(
        decoding_graph.DecodingGraph,
        "__call__",
        lambda self, ids, mask, positions: calls.append(ids) or ids[..., None],
    )
    model = tiny_model("retrofit").float()
    fixed, growing = LongNetCache(model.config, max_length=8), LongNetCache(model.config)
    call = model.get_compiled_call(None)
    assert isinstance(call, GraphedCall)
    with torch.no_grad():
        for tokens, options in (
            (random_tokens(1, 3), {"past_key_values": fixed}),
            (random_tokens(1, 1), {"past_key_values": growing}),
            (random_tokens(1, 1), {"past_key_values": fixed, "output_attentions": True}),
        ):
            call.otherwise = lambda **inputs: "the ordinary way"
            assert call(input_ids=tokens, return_dict=True, **options) == "the ordinary way"
        assert call(input_ids=random_tokens(1, 1), past_key_values=fixed, use_cache=True).past_key_values is fixed
    assert len(calls) == 1
    assert not isinstance(tiny_model(hidden_act="gelu").float().get_compiled_call(None), GraphedCall)


@pytest.mark.parametrize("dense_layers", [(), (1,)])
def test_a_cache_that_enlarges_keeps_what_it_held(dense_layers):
    model, tokens = tiny_model("retrofit", dense_layers=dense_layers), random_tokens(2, 60)
    cache = LongNetCache(model.config, max_length=10, enlarges=True)
    with torch.no_grad():
        parts = [9, 1, 1, 20, 1, 1, 27]
        logits = [model(part, past_key_values=cache).logits for part in tokens.split(parts, dim=1)]
        full = model(tokens, use_cache=False).logits
    torch.testing.assert_close(torch.cat(logits, dim=1), full, rtol=1e-6, atol=1e-6)
    # Layers with windows go on for ever once the longest is whole; a dense one holds what came, and grows on.
    assert [layer.get_max_length() == -1 for layer in cache.layers] == [i not in dense_layers for i in range(2)]
    assert all(layer.max_length >= 60 for i, layer in enumerate(cache.layers) if i in dense_layers)
    state = LongNetCache(model.config, max_length=12, enlarges=True)
    state.load_state_dict(cache.state_dict())
    assert int(state.get_seq_length()) == 60
