"""The models: equal to Llama where they must be, exact under padding and packing, at home in transformers."""

import copy

import pytest
import torch
import torch.nn.functional as F
from tiny_models import VOCABULARY, left_padding, random_tokens, tiny_config, tiny_model
from transformers import (
    AutoModelForCausalLM,
    DataCollatorWithFlattening,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
)
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from modeling_longnet import (
    LongNetCache,
    LongNetForCausalLM,
    LongNetForQuestionAnswering,
    LongNetForSequenceClassification,
    LongNetForTokenClassification,
    LongNetModel,
)
from modeling_longnet.dilation_pattern import PRESETS
from modeling_longnet.modeling_longnet import LongNetDecoderLayer
from modeling_longnet.rotary_longnet import LongNetRotaryEmbedding
from modeling_longnet.token_layout import locate_tokens


ROPE_TYPES = {
    "default": {},
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 64},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "longrope": {
        "short_factor": [1.0, 1.1, 1.2, 1.3],
        "long_factor": [2.0, 3.0, 4.0, 5.0],
        "factor": 4.0,
        "original_max_position_embeddings": 24,
    },
}

# Norms round to float32 whatever the weights are, as in Llama: equal models agree to about this.
CLOSE = {"rtol": 1e-6, "atol": 1e-6}


def llama_twin(model: LongNetForCausalLM) -> LlamaForCausalLM:
    """Make the Llama with the same weights and full attention."""
    fields = {name: getattr(model.config, name) for name in LlamaConfig().to_dict() if hasattr(model.config, name)}
    for name in ("model_type", "architectures", "transformers_version"):
        fields.pop(name, None)
    llama = LlamaForCausalLM(LlamaConfig(**fields)).to(model.dtype).eval()
    llama.load_state_dict(model.state_dict())
    return llama


@pytest.mark.parametrize("rope_type", ROPE_TYPES)
def test_a_retrofit_model_is_llama_up_to_the_first_segment_length(rope_type):
    rope = {"rope_type": rope_type, "rope_theta": 10000.0, **ROPE_TYPES[rope_type]}
    model = tiny_model("retrofit", segment_lengths=(32, 64), dilation_rates=(1, 2), rope_parameters=rope)
    llama = llama_twin(model)
    for length in (1, 7, 32):
        tokens = random_tokens(2, length)
        with torch.no_grad():
            torch.testing.assert_close(model(tokens).logits, llama(tokens).logits, **CLOSE)
    beyond = random_tokens(2, 80)
    with torch.no_grad():
        assert (model(beyond).logits - llama(beyond).logits).abs().max() > 0.1


def test_gradients_are_llamas_up_to_the_first_segment_length():
    model = tiny_model("retrofit", segment_lengths=(32, 64), dilation_rates=(1, 2))
    llama = llama_twin(model)
    tokens = random_tokens(2, 32)
    model(tokens, labels=tokens).loss.backward()
    llama(tokens, labels=tokens).loss.backward()
    for (name, ours), theirs in zip(model.named_parameters(), llama.parameters()):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_dense_layers_keep_ordinary_attention():
    tokens = random_tokens(2, 100)
    with torch.no_grad():
        dense = tiny_model("paper", dense_layers=(0, 1))
        # Beyond the first segment the rotary angles are exact where Llama's are rounded to float32.
        torch.testing.assert_close(dense(tokens).logits, llama_twin(dense)(tokens).logits, rtol=1e-3, atol=1e-4)
        mixed, sparse = tiny_model("paper", dense_layers=(1,)), tiny_model("paper")
        hidden = [model.model(tokens, output_hidden_states=True).hidden_states for model in (dense, mixed, sparse)]
        torch.testing.assert_close(hidden[1][1], hidden[2][1])  # layer 0 follows the pattern
        attended = dense.model.layers[1](hidden[1][1], **layer_inputs(dense, tokens))
        torch.testing.assert_close(mixed.model.norm(attended), hidden[1][2], **CLOSE)


@pytest.mark.parametrize("preset", PRESETS)
def test_local_layers_follow_the_first_branch_alone(preset):
    tokens = random_tokens(2, 100)
    with torch.no_grad():
        mixed, sparse = tiny_model(preset, local_layers=(0,)), tiny_model(preset)
        local = tiny_model(preset, segment_lengths=(8,), dilation_rates=(1,))
        hidden = [model.model(tokens, output_hidden_states=True).hidden_states for model in (mixed, local, sparse)]
        torch.testing.assert_close(hidden[0][1], hidden[1][1])
        assert (hidden[0][1] - hidden[2][1]).abs().max() > 0.1
        attended = sparse.model.layers[1](hidden[0][1], **layer_inputs(sparse, tokens))
        torch.testing.assert_close(sparse.model.norm(attended), hidden[0][2], **CLOSE)
        first = mixed(tokens[:, :70], use_cache=True)
        rest = mixed(tokens[:, 70:], past_key_values=first.past_key_values).logits
        torch.testing.assert_close(rest, mixed(tokens).logits[:, 70:], **CLOSE)


def test_layers_without_rope_do_not_see_positions():
    tokens = random_tokens(1, 20)
    positions = torch.arange(20)[None]
    no_rope, rope = tiny_model("retrofit", layers_without_rope=(0, 1)), tiny_model("retrofit")
    with torch.no_grad():  # stretching all positions changes rotary angles, and nothing else
        stretched = [model(tokens, position_ids=positions * 3, use_cache=False, cu_seq_lens_q=torch.tensor([0, 20]))
                     for model in (no_rope, rope)]  # fmt: skip
        torch.testing.assert_close(stretched[0].logits, no_rope(tokens).logits)
        assert (stretched[1].logits - rope(tokens).logits).abs().max() > 0.1


def layer_inputs(model: LongNetForCausalLM, tokens: torch.Tensor) -> dict:
    """What the model hands to each of its layers for unpadded tokens."""
    layout = locate_tokens(tokens.shape, tokens.device, None, None, None, None, model.config)
    rotary = model.model.rotary_emb(torch.zeros(1, dtype=model.dtype), layout.positions)
    return {"position_embeddings": rotary, "layout": layout}


@pytest.mark.parametrize("preset", PRESETS)
def test_padding_on_either_side_changes_nothing(preset):
    model, tokens = tiny_model(preset), random_tokens(3, 60)
    mask = left_padding(0, 9, 30, length=60)
    mask[2, 50:] = 0
    with torch.no_grad():
        padded = model(tokens, attention_mask=mask).logits
        for row, (low, high) in enumerate([(0, 60), (9, 60), (30, 50)]):
            alone = model(tokens[row : row + 1, low:high]).logits
            torch.testing.assert_close(padded[row : row + 1, low:high], alone, **CLOSE)


@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("preset", PRESETS)
def test_packed_documents_never_see_each_other(preset, attn_implementation):
    model = tiny_model(preset, attn_implementation=attn_implementation)
    documents = [random_tokens(1, n, seed=n)[0].tolist() for n in (40, 1, 23)]
    with torch.no_grad():
        alone = torch.cat([model(torch.tensor([d])).logits for d in documents], dim=1)
        for flash_kwargs in (False, True):
            collate = DataCollatorWithFlattening(return_flash_attn_kwargs=flash_kwargs)
            batch = collate([{"input_ids": d} for d in documents])
            batch.pop("labels")
            torch.testing.assert_close(model(**batch).logits, alone, **CLOSE)  # the default use_cache=True included


def test_documents_packed_into_padded_rows_never_see_each_other():
    model = tiny_model("retrofit")
    tokens = random_tokens(2, 50)
    positions = torch.stack([torch.cat([torch.arange(20), torch.arange(30)]), (torch.arange(50) - 6).clamp(min=0)])
    mask = left_padding(0, 6, length=50)
    with torch.no_grad():
        packed = model(tokens, attention_mask=mask, position_ids=positions).logits
        for row, low, high in ((0, 0, 20), (0, 20, 50), (1, 6, 50)):
            alone = model(tokens[row : row + 1, low:high]).logits
            torch.testing.assert_close(packed[row : row + 1, low:high], alone, **CLOSE)


def test_a_row_that_counts_on_from_the_row_before_is_a_document_of_its_own():
    model, tokens = tiny_model("retrofit"), random_tokens(2, 30)
    positions = torch.stack([torch.cat([torch.arange(10), torch.arange(20)]), torch.arange(20, 50)])
    with torch.no_grad():
        packed = model(tokens, position_ids=positions).logits
        torch.testing.assert_close(packed[1:], model(tokens[1:]).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
def test_a_position_that_leaves_some_out_begins_a_document(attn_implementation):
    model, tokens = tiny_model(attn_implementation=attn_implementation), random_tokens(1, 30)
    positions = torch.cat([torch.arange(10), torch.arange(15, 35)])[None]
    with torch.no_grad():
        packed = model(tokens, position_ids=positions).logits
        for part in (slice(0, 10), slice(10, 30)):
            alone = model(tokens[:, part], position_ids=positions[:, part]).logits
            torch.testing.assert_close(packed[:, part], alone, **CLOSE)


def test_after_tokens_in_a_cache_positions_divide_nothing():
    model, tokens = tiny_model(), random_tokens(1, 30)
    positions = torch.cat([torch.arange(10), torch.arange(15, 25), torch.arange(10)])[None]
    logits = []
    with torch.no_grad():
        for chunks in ([10, 20], [10] + [1] * 20):
            cache, parts = LongNetCache(model.config), zip(tokens.split(chunks, 1), positions.split(chunks, 1))
            logits.append(torch.cat([model(t, position_ids=p, past_key_values=cache).logits for t, p in parts], dim=1))
    torch.testing.assert_close(*logits, **CLOSE)


def test_packed_documents_and_a_cache_are_refused():
    model = tiny_model()
    positions = torch.cat([torch.arange(5), torch.arange(7)])[None]
    assert model(random_tokens(1, 12), position_ids=positions).past_key_values is None
    with pytest.raises(ValueError, match="2 packed documents cannot share one KV cache"):
        model.generate(random_tokens(1, 12), position_ids=positions, max_new_tokens=2)


def test_packed_documents_and_padding_are_refused_together():
    mask = left_padding(3, length=12)
    with pytest.raises(ValueError, match="cu_seq_lens_q and an attention_mask with padding exclude one another"):
        tiny_model()(
            random_tokens(1, 12), attention_mask=mask, cu_seq_lens_q=torch.tensor([0, 5, 12]), use_cache=False
        )


def test_other_caches_are_refused():
    with pytest.raises(ValueError, match="needs a LongNetCache, got DynamicCache"):
        tiny_model()(random_tokens(1, 4), past_key_values=DynamicCache())


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"num_hidden_layers": 1}, "the cache has 1 layers, the model 2; make it of the model's config"),
        (
            {"segment_lengths": (8, 32), "dilation_rates": (1, 4)},
            r"layer 0 of the cache holds .*\(8, 1\), \(32, 4\) .*reaches .*\(8, 1\), \(16, 2\), \(32, 4\) ",
        ),
        ({"dense_layers": [1]}, r"layer 1 of the cache holds every key, the model reaches the keys of branches"),
    ],
)
def test_a_cache_made_for_other_layers_is_refused(fields, reason):
    with pytest.raises(ValueError, match=reason):
        tiny_model()(random_tokens(1, 4), past_key_values=LongNetCache(tiny_config("paper", **fields)))


def test_a_cache_is_made_of_a_longnet_config():
    with pytest.raises(ValueError, match="needs a LongNetConfig, got LlamaConfig"):
        LongNetCache(LlamaConfig(num_hidden_layers=1))


@pytest.mark.parametrize("columns", [9, 16])
def test_a_mask_of_tokens_that_never_were_is_refused(columns):
    model, tokens = tiny_model(), random_tokens(2, 8)
    reason = f"attention_mask has {columns} columns for 8 tokens, and there are none before them"
    for cache in (None, LongNetCache(model.config)):
        with pytest.raises(ValueError, match=reason):
            model(tokens, attention_mask=torch.ones(2, columns), past_key_values=cache)


@pytest.mark.parametrize("shape", [(8,), (1, 7), (3, 8), (2, 9)])
def test_positions_of_the_wrong_shape_are_refused(shape):
    with pytest.raises(ValueError, match=r"position_ids must be \[batch, tokens\] = \[2, 8\] or \[1, 8\], got "):
        tiny_model()(random_tokens(2, 8), position_ids=torch.zeros(shape, dtype=torch.long))


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize(
    ("starts", "reason"),
    [
        ([0, 5], "must run from 0 to the length 8, got 0 to 5"),
        ([0, 5, 12], "must run from 0 to the length 8, got 0 to 12"),
        ([1, 8], "must run from 0 to the length 8, got 1 to 8"),
        ([0, 6, 4, 8], "must not decrease, got 6 followed by 4"),
    ],
)
def test_starts_that_do_not_divide_the_tokens_are_refused(implementation, starts, reason):
    model = tiny_model(attn_implementation=implementation)
    with pytest.raises(ValueError, match=f"cu_seqlens {reason}"):
        model(random_tokens(1, 8), cu_seq_lens_q=torch.tensor(starts), use_cache=False)
    with pytest.raises(ValueError, match="cu_seqlens must be a tensor, got list"):
        model(random_tokens(1, 8), cu_seq_lens_q=starts, use_cache=False)


def test_tokens_without_a_batch_are_refused():
    with pytest.raises(ValueError, match=r"input_ids must be \[batch, tokens\] .* got \[8\]"):
        tiny_model()(random_tokens(1, 8)[0])
    with pytest.raises(ValueError, match=r"inputs_embeds \[batch, tokens, hidden_size\], got \[8, 32\]"):
        tiny_model()(inputs_embeds=torch.zeros(8, 32, dtype=torch.float64))


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize(("batch", "length"), [(0, 5), (2, 0)])
def test_no_rows_or_no_tokens_give_no_logits(implementation, batch, length):
    model = tiny_model(attn_implementation=implementation)
    tokens = random_tokens(batch, length)
    logits = model(tokens).logits
    assert logits.shape == (batch, length, model.config.vocab_size)
    loss = model.train()(tokens, labels=tokens, num_items_in_batch=1).loss
    loss.backward()
    assert loss == 0 and all(p.grad is None or not p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_without_memory_the_shapes_are_known(implementation):
    with torch.device("meta"):
        model = tiny_model("retrofit", attn_implementation=implementation)
    logits = model(random_tokens(2, 50).to("meta")).logits
    assert logits.is_meta and logits.shape == (2, 50, model.config.vocab_size)


@pytest.mark.parametrize("mask_shape", [(2, 5), (3, 8), (2, 1, 8, 8)])
def test_a_mask_of_the_wrong_shape_is_refused(mask_shape):
    with pytest.raises(
        ValueError, match=r"attention_mask must be \[batch, past \+ new tokens\], here \[2, 8\] or wider"
    ):
        tiny_model()(random_tokens(2, 8), attention_mask=torch.ones(mask_shape))


def test_a_mask_that_is_added_to_scores_is_refused_and_not_read_the_other_way_round():
    model, tokens = tiny_model(), random_tokens(2, 20)
    mask = left_padding(0, 6, length=20)
    with torch.no_grad():
        expected = model(tokens[1:, 6:]).logits
        for dtype in (torch.bool, torch.int32, torch.float32, torch.bfloat16):
            found = model(tokens, attention_mask=mask.to(dtype)).logits[1:, 6:]
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
        added = torch.zeros(2, 20).masked_fill(mask == 0, -1e9)
        with pytest.raises(
            ValueError, match="for real tokens and 0 for padding, got -1e\\+09: .* attention_mask == 0"
        ):
            model(tokens, attention_mask=added)
        found = model(tokens, attention_mask=added == 0).logits[1:, 6:]
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
        with pytest.raises(ValueError, match="for real tokens and 0 for padding, got nan"):
            model(tokens, attention_mask=mask.float().masked_fill(mask == 0, float("nan")))


def test_a_mask_for_each_kind_of_layer_is_refused():
    with pytest.raises(ValueError, match=r"attention_mask must be a tensor \[batch, past \+ new tokens\], got a dict"):
        tiny_model()(random_tokens(2, 8), attention_mask={"full_attention": torch.ones(2, 8)})


@pytest.mark.parametrize("preset", PRESETS)
def test_all_attention_implementations_agree(preset):
    model, tokens, mask = tiny_model(preset), random_tokens(2, 50), left_padding(0, 11, length=50)
    logits = {}
    for name in ("sdpa", "eager", "longnet_torch"):
        model.set_attn_implementation(name)
        assert model.config._attn_implementation == name
        with torch.no_grad():
            logits[name] = model(tokens, attention_mask=mask).logits[mask.bool()]
    torch.testing.assert_close(logits["eager"], logits["sdpa"], **CLOSE)
    torch.testing.assert_close(logits["longnet_torch"], logits["sdpa"], **CLOSE)


def test_the_default_implementation_is_the_fastest_backend_and_flash_attention_is_refused():
    config = tiny_config()
    assert LongNetForCausalLM(config).config._attn_implementation == "sdpa"
    with pytest.raises(ValueError, match="[Ff]lash"):
        LongNetForCausalLM._from_config(tiny_config(), attn_implementation="flash_attention_2")


def test_eager_returns_the_attention_weights_of_the_pattern():
    model, tokens = tiny_model("retrofit", attn_implementation="eager"), random_tokens(1, 40)
    with torch.no_grad():
        attentions = model(tokens, output_attentions=True).attentions
    assert len(attentions) == 2
    for weights in attentions:
        torch.testing.assert_close(weights.sum(-1), torch.ones(1, 4, 40, dtype=torch.float64))
        for head in range(4):
            for position in (0, 7, 8, 17, 39):
                reached = weights[0, head, position].nonzero().flatten().tolist()
                assert reached == model.config.pattern.reach(position, head // 2)


@pytest.mark.parametrize("padded", [False, True])
def test_attention_weights_of_packed_rows_stand_where_their_tokens_do(padded):
    model, tokens = tiny_model("retrofit", attn_implementation="eager"), random_tokens(2, 30)
    position_ids = torch.stack([torch.cat([torch.arange(n), torch.arange(30 - n)]) for n in (12, 21)])
    mask = torch.ones(2, 30)
    if padded:
        mask[0, :2] = mask[1, -3:] = 0
    options = {"attention_mask": mask, "use_cache": False, "output_attentions": True}
    with torch.no_grad():
        found = model(tokens, position_ids=position_ids, **options).attentions[0]
        assert found.shape == (2, 4, 30, 30)
        expected = torch.zeros_like(found)
        for row, first, stop in ((0, 2 * padded, 12), (0, 12, 30), (1, 0, 21), (1, 21, 30 - 3 * padded)):
            document = slice(first, stop)
            alone = model(tokens[row : row + 1, document], output_attentions=True).attentions[0]
            expected[row, :, document, document] = alone[0]
    torch.testing.assert_close(found, expected, **CLOSE)


def test_attention_weights_take_part_in_the_graph():
    model = tiny_model("retrofit", attn_implementation="eager")
    output = model(random_tokens(1, 20), output_attentions=True)
    output.attentions[0].retain_grad()
    output.logits[0, -1, 0].backward()
    assert output.attentions[0].grad.abs().max() > 0


def test_no_class_builds_layers_that_it_throws_away(monkeypatch):
    built = []
    monkeypatch.setattr(LongNetDecoderLayer, "__init__", count_calls(LongNetDecoderLayer.__init__, built))
    monkeypatch.setattr(LlamaDecoderLayer, "__init__", count_calls(LlamaDecoderLayer.__init__, built))
    tiny_model()
    assert len(built) == 2 * 2  # two layers, each a LongNetDecoderLayer that calls Llama's constructor


def count_calls(function, calls: list):
    def counted(*args, **kwargs):
        calls.append(function)
        return function(*args, **kwargs)

    return counted


def test_hidden_states_are_returned_for_every_layer():
    model, tokens = tiny_model(), random_tokens(1, 10)
    output = model(tokens, output_hidden_states=True)
    assert len(output.hidden_states) == 3
    torch.testing.assert_close(output.hidden_states[0], model.get_input_embeddings()(tokens))
    torch.testing.assert_close(model.lm_head(output.hidden_states[-1]), output.logits)


def test_logits_to_keep_keeps_the_last_logits():
    model, tokens = tiny_model(), random_tokens(2, 20)
    torch.testing.assert_close(model(tokens, logits_to_keep=3).logits, model(tokens).logits[:, -3:])


def test_gradient_checkpointing_gives_the_same_gradients():
    tokens = random_tokens(2, 40)
    gradients = []
    for checkpointing in (False, True):
        model = tiny_model("retrofit").train()
        if checkpointing:  # transformers 5.23 deprecates the name that 5.17 has
            enable = "activation_checkpointing_enable"
            getattr(model, enable if hasattr(model, enable) else "gradient_checkpointing_enable")()
        model(tokens, labels=tokens, use_cache=False).loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    for plain, checkpointed in zip(*gradients):
        torch.testing.assert_close(checkpointed, plain)


def test_attention_dropout_acts_in_training_only():
    model, tokens = tiny_model("retrofit", attention_dropout=0.5), random_tokens(1, 40)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, tiny_model("retrofit")(tokens).logits)
        model.train()
        torch.manual_seed(1)
        first = model(tokens, use_cache=False).logits
        second = model(tokens, use_cache=False).logits
        assert (first - second).abs().max() > 0.1


def test_tied_embeddings_share_one_tensor_after_reloading(tmp_path):
    model = tiny_model(tie_word_embeddings=True)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.get_input_embeddings().weight
    tokens = random_tokens(1, 30)
    # The weights are equal bit for bit; where they lie in memory may change the order of a sum.
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))
    torch.testing.assert_close(loaded(tokens).logits, model(tokens).logits, rtol=1e-12, atol=1e-12)


def test_query_and_key_norms_and_biases_exist_only_where_asked_for():
    plain = {name for name, _ in tiny_model().named_parameters()}
    qwen2 = {name for name, _ in tiny_model(attention_bias=True, attention_output_bias=False).named_parameters()}
    qwen3 = {name for name, _ in tiny_model(qk_norm=True).named_parameters()}
    layer = "model.layers.1.self_attn."
    assert {n for n in qwen2 - plain if n.startswith(layer)} == {layer + f"{p}_proj.bias" for p in "qkv"}
    assert {n for n in qwen3 - plain if n.startswith(layer)} == {layer + f"{p}_norm.weight" for p in "qk"}


def test_query_and_key_norms_normalise_each_head():
    model, tokens = tiny_model(qk_norm=True, segment_lengths=(64,), dilation_rates=(1,)), random_tokens(1, 12)
    before = model(tokens).logits
    for layer in model.model.layers:  # a norm makes the scale of its input irrelevant
        layer.self_attn.q_proj.weight.data *= 7
        layer.self_attn.k_proj.weight.data *= 1 / 3
    torch.testing.assert_close(model(tokens).logits, before, rtol=1e-4, atol=1e-4)


def test_rotary_angles_stay_exact_beyond_what_float32_can_count():
    rotary = LongNetRotaryEmbedding(tiny_config())
    x = torch.zeros(1, dtype=torch.float64)
    for start in (0, 2**24, 2**31, 2**40):
        positions = torch.arange(start, start + 5)
        cos, sin = rotary(x, positions[None])
        frequency = rotary.inv_freq.double()
        turns = positions[:, None].numpy().astype("float128") * frequency.numpy().astype("float128")
        exact = torch.tensor((turns % (2 * torch.pi)).astype("float64"))
        # float64 carries 53 bits of the product: at 2^40 turns that leaves 1e-4.
        tolerance = 1e-6 + start * 2.0**-52
        torch.testing.assert_close(cos[0, :, :4], exact.cos(), rtol=0, atol=tolerance)
        torch.testing.assert_close(sin[0, :, 4:], exact.sin(), rtol=0, atol=tolerance)


NARROWED = {
    "bfloat16": lambda model, folder: model.bfloat16(),
    "half": lambda model, folder: model.half(),
    "to": lambda model, folder: model.to(dtype=torch.bfloat16),
    "to a device too": lambda model, folder: model.to("cpu", torch.bfloat16),
    "back and forth": lambda model, folder: model.half().double().bfloat16().float(),
    "copied": lambda model, folder: copy.deepcopy(model.bfloat16()).half(),
    "empty on meta": lambda model, folder: _through_meta(model),
    "loaded": lambda model, folder: _loaded(model, folder).half(),
}


def _through_meta(model):
    frequencies = {name: x.clone() for name, x in model.model.rotary_emb.named_buffers()}
    model.to("meta").bfloat16().to_empty(device="cpu")
    for name, x in model.model.rotary_emb.named_buffers():
        x.copy_(frequencies[name])
    return model


def _loaded(model, folder):
    model.save_pretrained(folder)
    return LongNetForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)


@pytest.mark.parametrize("rope", ["default", "longrope", "dynamic"])
@pytest.mark.parametrize("how", NARROWED)
def test_a_narrow_model_keeps_exact_angles(how, rope, tmp_path):
    rope_parameters = {"rope_type": rope, "rope_theta": 1e4, **ROPE_TYPES[rope]}
    model = LongNetForCausalLM(tiny_config(rope_parameters=rope_parameters))
    exact = copy.deepcopy(model.model.rotary_emb)
    rotary = NARROWED[how](model, tmp_path).model.rotary_emb
    x = torch.zeros(1, dtype=torch.float64)
    for first in (2**20, 30, 2**17, 0):  # beyond the change of frequencies, and back
        positions = torch.arange(first, first + 9)[None]
        for found, expected in zip(rotary(x, positions), exact(x, positions)):
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_shifting_all_positions_by_2_to_the_25_changes_nothing():
    model, tokens = tiny_model("paper"), random_tokens(1, 40)
    near = torch.arange(40)[None]
    with torch.no_grad():
        torch.testing.assert_close(
            model(tokens, position_ids=near + 2**25).logits, model(tokens, position_ids=near).logits,
            rtol=1e-4, atol=1e-4,
        )  # fmt: skip


def test_loss_counts_items_over_the_whole_batch_and_takes_shifted_labels():
    model, tokens = tiny_model(), random_tokens(2, 20)
    logits = model(tokens).logits
    expected = F.cross_entropy(logits[:, :-1].reshape(-1, VOCABULARY).float(), tokens[:, 1:].reshape(-1))
    torch.testing.assert_close(model(tokens, labels=tokens).loss, expected)
    torch.testing.assert_close(model(tokens, labels=tokens, num_items_in_batch=19).loss, expected * 2)
    shifted = F.pad(tokens, (0, 1), value=-100)[:, 1:].contiguous()
    torch.testing.assert_close(model(tokens, labels=tokens, shift_labels=shifted).loss, expected)


@pytest.mark.parametrize("positional", [False, True])
def test_sequence_classification_takes_padding_from_the_mask_whatever_its_ids(positional):
    model = tiny_model(model_class=LongNetForSequenceClassification, num_labels=3)
    tokens = random_tokens(2, 20)
    for mask in (left_padding(0, 6, length=20), left_padding(0, 6, length=20).flip(1)):
        with torch.no_grad():
            found = model(tokens, mask) if positional else model(input_ids=tokens, attention_mask=mask)
            expected = torch.cat([model(row[real == 1][None]).logits for row, real in zip(tokens, mask)])
        torch.testing.assert_close(found.logits, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("padding_id", [0, None])
@pytest.mark.parametrize("embedded", [False, True])
@pytest.mark.parametrize("side", ["left", "right"])
def test_sequence_classification_needs_no_ids_to_find_padding(side, embedded, padding_id):
    """As under PEFT's prompts, which give embeddings and a mask."""
    model = tiny_model(model_class=LongNetForSequenceClassification, num_labels=3)
    model.config.pad_token_id = padding_id
    tokens = random_tokens(2, 20)
    mask = left_padding(0, 6, length=20)
    mask = mask if side == "left" else mask.flip(1)
    given = {"inputs_embeds": model.model.embed_tokens(tokens)} if embedded else {"input_ids": tokens}
    with torch.no_grad():
        found = model(**given, attention_mask=mask).logits
        expected = torch.cat([model(row[real == 1][None]).logits for row, real in zip(tokens, mask)])
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_sequence_classification_cannot_tell_where_rows_end_without_a_mask_and_padding():
    model = tiny_model(model_class=LongNetForSequenceClassification, num_labels=3)
    model.config.pad_token_id = None
    with pytest.raises(ValueError, match="2 rows without attention_mask, and the config has no pad_token_id"):
        model(random_tokens(2, 20))


def test_sequence_classification_reads_the_last_real_token():
    model = tiny_model(model_class=LongNetForSequenceClassification, num_labels=3)
    tokens = random_tokens(2, 20)
    tokens[1, :6] = 0
    mask = left_padding(0, 6, length=20)
    logits = model(tokens, attention_mask=mask, labels=torch.tensor([0, 2]))
    assert logits.loss > 0
    alone = model(tokens[1:, 6:]).logits
    torch.testing.assert_close(logits.logits[1:], alone, **CLOSE)


def test_token_classification_and_question_answering_label_every_token():
    tokens = random_tokens(2, 20)
    tagger = tiny_model(model_class=LongNetForTokenClassification, num_labels=5)
    hidden = tagger.model(tokens).last_hidden_state
    output = tagger(tokens, labels=tokens % 5)
    torch.testing.assert_close(output.logits, tagger.score(hidden))
    torch.testing.assert_close(
        output.loss, F.cross_entropy(output.logits.flatten(0, 1).float(), (tokens % 5).flatten())
    )
    reader = tiny_model(model_class=LongNetForQuestionAnswering)
    output = reader(tokens, start_positions=torch.tensor([1, 2]), end_positions=torch.tensor([3, 4]))
    spans = reader.qa_outputs(reader.model(tokens).last_hidden_state)
    torch.testing.assert_close(torch.stack([output.start_logits, output.end_logits], -1), spans)
    assert output.loss > 0


def test_exactly_one_input_is_required():
    model = tiny_model(model_class=LongNetModel)
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model()
    tokens = random_tokens(1, 9)
    with pytest.raises(ValueError, match="exactly one"):
        model(tokens, inputs_embeds=model.embed_tokens(tokens))
    torch.testing.assert_close(
        model(inputs_embeds=model.embed_tokens(tokens)).last_hidden_state, model(tokens).last_hidden_state
    )


def test_reordering_context_parallelism_is_refused():
    # Accelerate's context parallelism calls the attention block with is_causal=True, on a permuted sequence.
    model = tiny_model()
    layer = model.model.layers[0].self_attn
    layer.register_forward_pre_hook(lambda m, a, k: (a, {**k, "is_causal": True}), with_kwargs=True)
    with pytest.raises(ValueError, match="reorders the sequence"):
        model(random_tokens(1, 8))


def test_continuous_batching_is_refused():
    with pytest.raises(ValueError, match="continuous batching"):
        tiny_model().generate_batch([[1, 2, 3]])
