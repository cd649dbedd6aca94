"""The paper's backbone: MAGNETO's layers with xPos, at home everywhere that the Llama backbone is.

That it computes what the official code computes is shown in ``test_torchscale.py``.
"""

import copy
import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import checkpointed, left_padding, random_tokens, tiny_config, tiny_model
from torch.testing import assert_close
from transformers import AutoConfig, AutoModelForCausalLM, DataCollatorWithFlattening

from modeling_longnet import DilationPattern, LongNetConfig, LongNetForCausalLM
from modeling_longnet import attention_longnet as attention_module
from modeling_longnet.xpos_decay import XPosDecay


CLOSE = {"rtol": 1e-9, "atol": 1e-9}
# A base of few tokens lets scores decay visibly over the tiny models' lengths.
VARIANTS = {
    "paper": {"backbone": "magneto"},
    "fast decay": {"backbone": "magneto", "xpos_scale_base": 4},
    "no Sub-LN": {"backbone": "magneto", "sub_layernorm": False, "scale_embedding": True},
    "rope": {"backbone": "magneto", "xpos": False},
    "no positions": {"backbone": "magneto", "layers_without_rope": (0, 1)},
    "one dense layer": {"backbone": "magneto", "dense_layers": (1,), "xpos_scale_base": 4},
}
every_variant = pytest.mark.parametrize("variant", VARIANTS)


def magneto(variant: str = "paper", preset: str = "paper", **fields) -> LongNetForCausalLM:
    """Build a tiny model in float64 whose biases and norms are not the neutral ones that they start as."""
    model = tiny_model(preset, **{**VARIANTS[variant], **fields})
    for name, parameter in model.named_parameters():
        if "norm" in name or name.endswith("bias"):
            torch.nn.init.normal_(parameter, mean=float(name.endswith("norm.weight")), std=0.3)
    return model


def test_scores_decay_with_distance_alone_wherever_tokens_stand():
    decay, length = XPosDecay(head_dim=8, scale_base=16), 24
    query, key = torch.randn(2, 1, 1, length, 8, dtype=torch.float64)
    zeta = (torch.arange(0, 8, 2) + 0.4 * 8) / (1.4 * 8)  # float32, as the official code has it
    zeta = zeta.double().repeat(2)
    distance = torch.arange(length)[:, None] - torch.arange(length)
    expected = torch.einsum("bhqd,bhkd,qkd->bhqk", query, key, zeta ** (distance[..., None] / 16)).tril()
    for start in (0, 1000, 10**6, 10**12):
        positions = start + torch.arange(length)[None]
        for span in (length, 2 * length):
            if start // span == (start + length - 1) // span:  # one span holds all
                q, k = decay.scale_aligned(query, key, positions, span)
                assert_close((q @ k.mT).tril(), expected, **CLOSE)
        q, k = decay.scale_cached(query, key, positions, positions[:, None])
        assert_close((q @ k.mT).tril(), expected, **CLOSE)


def test_padding_and_later_keys_far_out_stay_finite():
    decay = XPosDecay(head_dim=64, scale_base=512)
    positions = torch.tensor([[-1, 10**7, 10**7 + 1, 10**7 + 2]])
    key_positions = torch.tensor([[[-1, 0, 10**7, 10**7 + 10**5]]])
    ones = torch.ones(1, 1, 4, 64)
    query, key = decay.scale_cached(ones, ones, positions, key_positions)
    assert query.isfinite().all() and key.isfinite().all()
    assert (key[0, 0, :2] == 0).all()  # long ago
    torch.testing.assert_close((query @ key.mT)[0, 0, 1, 2], torch.tensor(64.0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_factors_and_their_squares_stay_finite_over_the_longest_span(dtype):
    decay = XPosDecay(head_dim=64, scale_base=512)
    span = decay.longest_span(dtype)
    assert dtype == torch.float16 or span >= 32768  # the paper's longest segment
    ones = torch.ones(1, 1, span, 64, dtype=dtype)
    positions = torch.arange(span)[None]
    for scaled in (
        *decay.scale_aligned(ones, ones, positions, span),
        *decay.scale_cached(ones, ones, positions, positions[:, None]),
    ):
        squares = scaled[0, 0, [0, -1]].square()
        assert squares.isfinite().all() and (squares > 0).all()


def test_which_positions_may_share_a_reference():
    decay, limit = XPosDecay(head_dim=64, scale_base=512), 35694
    aligned = DilationPattern((2048, 32768), (1, 4))
    assert decay.longest_span(torch.float32) == limit
    assert decay.shared_span(aligned, limit, torch.float32) == limit
    assert decay.shared_span(aligned, 10**9, torch.float32) == 32768
    assert decay.shared_span(DilationPattern((2048, 3072), (1, 2)), 10**9, torch.float32) == 6144
    assert decay.shared_span(aligned, 10**9, torch.float16) is None
    assert decay.shared_span(DilationPattern((2048, 65536), (1, 4)), 10**9, torch.float32) is None
    assert decay.shared_span(DilationPattern.preset("retrofit", (64,), (1,)), 10**9, torch.float32) is None


@every_variant
@pytest.mark.parametrize("preset", ["paper", "torchscale", "retrofit"])
def test_decoding_through_the_cache_equals_the_full_forward(variant, preset):
    model, tokens = magneto(variant, preset), random_tokens(2, 70)
    mask = left_padding(0, 9, length=70)
    cache, outs = None, []
    with torch.no_grad():
        full = model(tokens, attention_mask=mask, use_cache=False).logits
        for first, last in ((0, 5), (5, 40), (40, 41), (41, 70)):
            out = model(tokens[:, first:last], attention_mask=mask[:, :last], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            outs.append(out.logits)
    chunks = torch.cat(outs, dim=1)
    assert_close(chunks[0], full[0], **CLOSE)
    assert_close(chunks[1, 9:], full[1, 9:], **CLOSE)
    assert full.isfinite().all()


@pytest.mark.parametrize(("variant", "preset"), [
    ("fast decay", "paper"), ("fast decay", "retrofit"), ("one dense layer", "paper"),
])  # fmt: skip
@pytest.mark.parametrize("longest", [40, 16])  # spans of the 32-token segment; queries in blocks
def test_long_inputs_that_no_reference_serves_give_the_same(monkeypatch, variant, preset, longest):
    model, tokens = magneto(variant, preset), random_tokens(2, 100)
    mask = left_padding(0, 30, length=100)
    short = model(tokens, attention_mask=mask, labels=tokens)
    expected = torch.autograd.grad(short.loss, list(model.parameters()))
    monkeypatch.setattr(XPosDecay, "longest_span", lambda self, dtype: longest)
    monkeypatch.setattr(attention_module, "BLOCK", 16)
    in_blocks = []
    monkeypatch.setattr(
        attention_module.LongNetAttention,
        "_attend_in_blocks",
        lambda *args, method=attention_module.LongNetAttention._attend_in_blocks: in_blocks.append(1) or method(*args),
    )
    long = model(tokens, attention_mask=mask, labels=tokens)
    assert bool(in_blocks) == (longest < 32 or preset == "retrofit" or variant == "one dense layer")
    assert_close(long.logits[mask != 0], short.logits[mask != 0], **CLOSE)
    for ours, theirs in zip(torch.autograd.grad(long.loss, list(model.parameters())), expected):
        assert_close(ours, theirs, **CLOSE)
    with torch.no_grad():  # a chunk longer than a block, over a cache
        cache = model(tokens[:, :20], use_cache=True).past_key_values
        rest = model(tokens[:, 20:], past_key_values=cache).logits
        assert_close(rest, model(tokens).logits[:, 20:], **CLOSE)


@pytest.mark.parametrize(("dtype", "scale_base"), [(torch.float32, 8), (torch.float16, 64)])
def test_blocks_are_no_wider_than_factors_can_be(dtype, scale_base):
    """A block of 4,096 queries has one reference: with fast decay its factors would be infinite and zero."""
    model = magneto(
        segment_lengths=(4096,), dilation_rates=(1,), num_hidden_layers=1, xpos_scale_base=scale_base, use_cache=False
    ).to(dtype)
    decay, tokens = model.model.layers[0].self_attn.decay, random_tokens(1, 1500)
    assert decay.longest_span(dtype) < 1500
    with torch.no_grad():
        found, expected = model(tokens).logits, copy.deepcopy(model).double()(tokens).logits
    assert_close(found.double(), expected, rtol=0.02, atol=0.02)


def test_packed_tokens_that_no_reference_serves_are_refused(monkeypatch):
    monkeypatch.setattr(XPosDecay, "longest_span", lambda self, dtype: 16)
    positions = torch.cat([torch.arange(40), torch.arange(10)])[None]
    with pytest.raises(ValueError, match="50 packed tokens are more than the 16 over which .* in float64; pass one"):
        magneto()(random_tokens(1, 50), position_ids=positions)


@every_variant
def test_padding_and_packing_change_nothing(variant):
    model = magneto(variant)
    documents = [random_tokens(1, n, seed=n)[0] for n in (40, 1, 23)]
    with torch.no_grad():
        alone = [model(document[None]).logits[0] for document in documents]
        batch = DataCollatorWithFlattening(return_flash_attn_kwargs=True)([{"input_ids": d} for d in documents])
        batch.pop("labels")
        assert_close(model(**batch).logits[0], torch.cat(alone), **CLOSE)
        padded = torch.nn.utils.rnn.pad_sequence(documents, batch_first=True)
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(d) for d in documents], batch_first=True)
        assert_close(model(padded, attention_mask=mask).logits[mask != 0], torch.cat(alone), **CLOSE)


@pytest.mark.parametrize("variant", ["paper", "fast decay"])
def test_generation_goes_on_as_the_full_forward_would(variant):
    model, tokens = magneto(variant), random_tokens(2, 30)
    options = {"max_new_tokens": 40, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    mask = left_padding(0, 7, length=30)
    cached = model.generate(tokens, attention_mask=mask, **options)
    assert torch.equal(cached, model.generate(tokens, attention_mask=mask, use_cache=False, **options))
    assert torch.equal(cached, model.generate(tokens, attention_mask=mask, prefill_chunk_size=9, **options))


def test_positions_stay_exact_beyond_2_to_the_31():
    model, tokens = magneto("fast decay"), random_tokens(1, 60)
    start = 2**31 + 2**5  # a multiple of every segment length: the pattern looks the same from here on
    with torch.no_grad():
        full = model(tokens).logits
        first = model(tokens[:, :30], use_cache=True, position_ids=torch.arange(30)[None] + start)
        for layer in first.past_key_values.layers:
            layer.key_positions = torch.where(layer.key_positions >= 0, layer.key_positions + start, -1)
            layer.seen = layer.seen + start
        rest = model(tokens[:, 30:], past_key_values=first.past_key_values).logits
    assert_close(torch.cat([first.logits, rest], dim=1), full, rtol=1e-4, atol=1e-4)  # angles are float32


def test_half_precision_far_out_is_finite_and_near_float32():
    model = magneto(segment_lengths=(64, 8192), dilation_rates=(1, 128), num_hidden_layers=1).float()
    tokens = random_tokens(1, 6000)
    with torch.no_grad():
        exact = model(tokens).logits
        rounded = copy.deepcopy(model).half()(tokens).logits.float()
    assert rounded.isfinite().all()
    assert (rounded - exact).abs().max() < 0.02 * exact.abs().max()


@pytest.mark.gpu
@pytest.mark.parametrize("length", [700, 6000])  # 6000: more than float16 can compute at once
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_fused_kernels_compute_the_same(dtype, length):
    fields = {"hidden_size": 256, "segment_lengths": (128, 2048, 8192), "dilation_rates": (1, 4, 16)}
    model, tokens = magneto(**fields).float(), random_tokens(1, length)
    with torch.no_grad():
        expected = model(tokens).logits
        fused = copy.deepcopy(model).to("cuda", dtype)
        fused.set_attn_implementation("longnet_triton")
        logits = fused(tokens.cuda()).logits.float().cpu()
    tolerance = 1e-3 if dtype == torch.float32 else 0.05
    assert (logits - expected).abs().max() < tolerance * expected.abs().max()


def test_eager_shows_weights_that_decay():
    model, tokens = magneto("fast decay", attn_implementation="eager"), random_tokens(1, 32)
    with torch.no_grad():
        attentions = model(tokens, output_attentions=True, use_cache=False).attentions
        assert attentions[0].shape == (1, 4, 32, 32)
        assert_close(model(tokens).logits, magneto("fast decay")(tokens).logits, **CLOSE)


@every_variant
def test_gradient_checkpointing_changes_no_gradient(variant):
    model, tokens = magneto(variant).train(), random_tokens(2, 50)
    expected = torch.autograd.grad(model(tokens, labels=tokens).loss, list(model.parameters()))
    checkpointed(model)
    for ours, theirs in zip(
        torch.autograd.grad(model(tokens, labels=tokens, use_cache=False).loss, list(model.parameters())), expected
    ):
        assert theirs.abs().max() > 0
        assert_close(ours, theirs, **CLOSE)


@pytest.mark.parametrize("layers", [2, 12])
def test_weights_start_as_magneto_says(layers):
    torch.manual_seed(0)
    fields = {"hidden_size": 256, "intermediate_size": 512, "num_key_value_heads": 4, "num_hidden_layers": layers}
    model = LongNetForCausalLM(tiny_config(backbone="magneto", initializer_range=0.02, **fields))
    gain = math.sqrt(math.log(2 * layers))
    for name, parameter in model.model.layers.named_parameters():
        if name.endswith("bias"):
            assert (parameter == 0).all()
        elif "norm" in name:
            assert (parameter == 1).all()
        else:
            own_gain = 1.0 if "q_proj" in name or "k_proj" in name else gain
            assert parameter.std().item() == pytest.approx(own_gain * math.sqrt(2 / sum(parameter.shape)), rel=0.02)
    assert model.lm_head.weight.std().item() == pytest.approx(0.02, rel=0.02)
    plain = LongNetForCausalLM(tiny_config(backbone="magneto", sub_layernorm=False, **fields))
    weight = plain.model.layers[0].mlp.up_proj.weight
    assert weight.std().item() == pytest.approx(math.sqrt(2 / sum(weight.shape)), rel=0.02)


@every_variant
def test_saving_and_loading_keeps_config_and_logits(variant, tmp_path):
    model, tokens = magneto(variant), random_tokens(1, 50)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).to_diff_dict() == model.config.to_diff_dict()
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, model(tokens).logits)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft reads it
@pytest.mark.parametrize(
    "options",
    [{"target_modules": ["embed_tokens"]}, {"target_modules": ["q_proj"], "trainable_token_indices": [3, 7]}],
    ids=["lora", "trainable tokens"],
)
def test_adapters_of_scaled_embeddings_are_scaled_as_these_are(options):
    model, tokens = magneto("no Sub-LN"), torch.tensor([[3, 7, 5, 3, 11]])
    config = LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **options)
    adapted = get_peft_model(copy.deepcopy(model), config).double()
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    with torch.no_grad():
        for parameter in trained:
            parameter += torch.randn_like(parameter)
        found = adapted(tokens).logits
        merged = adapted.merge_and_unload()(tokens).logits
    assert (found - model(tokens).logits).abs().max() > 0.1
    assert_close(found, merged, **CLOSE)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft reads it
def test_lora_finds_its_targets_and_merges():
    model, tokens = magneto(), random_tokens(2, 40)
    before = model(tokens).logits.detach()
    adapted = get_peft_model(copy.deepcopy(model), LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False))
    assert {name.split(".")[-4] for name, _ in adapted.named_parameters() if "lora_A" in name} == {
        "q_proj", "k_proj", "v_proj", "o_proj",
    }  # fmt: skip
    with torch.no_grad():
        tuned = adapted(input_ids=tokens).logits
        assert (tuned - before).abs().max() > 0.1
        assert_close(adapted.merge_and_unload()(tokens).logits, tuned, **CLOSE)


def test_a_small_model_learns():
    torch.manual_seed(0)
    model = LongNetForCausalLM(tiny_config(backbone="magneto", initializer_range=0.02))
    tokens = random_tokens(4, 64)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(60):
        loss = model(tokens, labels=tokens).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(math.log(97), rel=0.1)
    assert losses[-1] < 1.0


@pytest.mark.parametrize("xpos_scale_base", [4, 512])
def test_xpos_goes_with_llamas_backbone_too(xpos_scale_base):
    model, tokens = tiny_model("retrofit", xpos=True, xpos_scale_base=xpos_scale_base), random_tokens(1, 60)
    with torch.no_grad():
        full = model(tokens, use_cache=False).logits
        first = model(tokens[:, :33], use_cache=True)
        rest = model(tokens[:, 33:], past_key_values=first.past_key_values).logits
        assert_close(torch.cat([first.logits, rest], dim=1), full, rtol=1e-6, atol=1e-6)  # norms round to float32
        assert (full - tiny_model("retrofit")(tokens).logits).abs().max() > 1e-3


def test_parts_left_out_follow_the_backbone():
    paper, llama = LongNetConfig(backbone="magneto"), LongNetConfig()
    parts = ("hidden_act", "attention_bias", "mlp_bias", "sub_layernorm", "xpos")
    assert [getattr(paper, part) for part in parts] == ["gelu", True, True, True, True]
    assert [getattr(llama, part) for part in parts] == ["silu", False, False, False, False]
    chosen = LongNetConfig(backbone="magneto", hidden_act="relu", attention_bias=False, xpos=False)
    assert [getattr(chosen, part) for part in parts] == ["relu", False, True, True, False]
    assert paper.base_model_tp_plan is None and llama.base_model_tp_plan


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"backbone": "bert"}, "backbone must be one of llama, magneto, got 'bert'"),
        ({"sub_layernorm": True}, "sub_layernorm needs backbone 'magneto', got 'llama'"),
        ({"scale_embedding": True}, "scale_embedding needs backbone 'magneto', got 'llama'"),
        ({"xpos": True, "xpos_scale_base": 0}, "xpos_scale_base must be at least 1 token, got 0"),
        (
            {
                "xpos": True,
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
            },
            "xpos needs heads that rotate as a whole, got partial_rotary_factor 0.5",
        ),
        ({"back_bone": "magneto"}, "no field 'back_bone'; did you mean 'backbone'"),
    ],
)
def test_fields_that_do_not_fit_the_backbone_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(**fields)
