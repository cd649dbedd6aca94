"""Dilated attention inside stock models: the same as a converted model, and undone exactly."""

import copy
import sys

import pytest
import torch
from checkpoints import CONTEXT
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    MinistralConfig,
    MinistralForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)

from conversion import retrofit
from modeling_longnet import DilationPattern, LongNetConfig, LongNetForCausalLM, dilated_attention


PATTERN = DilationPattern.preset("retrofit", (8, 16, 64), (1, 2, 4))
PAPER = DilationPattern.preset("paper", (8, 32), (1, 2))

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": CONTEXT,
    "initializer_range": 0.3,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=None)),
    "ministral": lambda: MinistralForCausalLM(MinistralConfig(**SIZES, layer_types=["full_attention"] * 2)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES)),
    "smollm3": lambda: SmolLM3ForCausalLM(SmolLM3Config(**SIZES, no_rope_layers=[1, 0], tie_word_embeddings=False)),
    "phi3": lambda: Phi3ForCausalLM(Phi3Config(**SIZES)),
}


def make_model(family: str = "llama"):
    torch.manual_seed(0)
    model = MODELS[family]().eval()
    for name, parameter in model.named_parameters():
        if "norm" in name or name.endswith("bias"):
            torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.3)
    return model


def longnet_twin(model, pattern: DilationPattern) -> LongNetForCausalLM:
    """The LongNet model with the same weights and this pattern."""
    fields = {name: getattr(pattern, name) for name in pattern.__dataclass_fields__}
    family = {}
    if model.config.model_type == "qwen2":
        family = {"attention_bias": True, "attention_output_bias": False}
    elif model.config.model_type == "qwen3":
        family = {"qk_norm": True}
    elif model.config.model_type == "smollm3":
        family = {"layers_without_rope": [1]}
    config = LongNetConfig(**SIZES, **fields, **family, rope_parameters=model.config.rope_parameters)
    config.rms_norm_eps = model.config.rms_norm_eps
    twin = LongNetForCausalLM(config).eval()
    twin.load_state_dict(unfused(model.state_dict()))
    return twin


def unfused(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Cut Phi-3's fused projections into LongNet's: 4 query heads and 2 KV heads of 8, 48 of each half of the MLP."""
    parts = {
        "self_attn.qkv_proj": {"self_attn.q_proj": 32, "self_attn.k_proj": 16, "self_attn.v_proj": 16},
        "mlp.gate_up_proj": {"mlp.gate_proj": 48, "mlp.up_proj": 48},
    }
    for fused, rows in parts.items():
        for name in [name for name in weights if fused in name]:
            cut = weights.pop(name).split(list(rows.values()))
            weights |= {name.replace(fused, part): x for part, x in zip(rows, cut)}
    return weights


def tokens(*shape: int) -> torch.Tensor:
    return torch.randint(3, 96, shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("pattern", [PATTERN, PAPER], ids=["retrofit", "paper"])
@pytest.mark.parametrize("family", MODELS)
def test_a_retrofitted_model_is_the_longnet_model_with_its_weights(family, pattern):
    model = make_model(family)
    ids = tokens(2, 61)
    with torch.no_grad():
        dense = model(ids).logits
        with retrofit(model, pattern) as inside:
            logits = inside(ids).logits
        torch.testing.assert_close(logits, longnet_twin(model, pattern)(ids).logits, rtol=1e-5, atol=1e-5)
    assert (logits - dense).abs().max() > 0.1
    if pattern is PATTERN:
        torch.testing.assert_close(logits[:, :8], dense[:, :8], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("model_class", "config_class", "fields"),
    [
        (LlamaForCausalLM, LlamaConfig, {"sliding_window": 16}),
        (Qwen2ForCausalLM, Qwen2Config, {"sliding_window": 16, "use_sliding_window": False}),
        (SmolLM3ForCausalLM, SmolLM3Config, {"sliding_window": 16, "use_sliding_window": False,
                                             "no_rope_layers": [1, 0], "tie_word_embeddings": False}),
    ],
)  # fmt: skip
def test_a_window_that_no_layer_attends_in_is_no_obstacle(model_class, config_class, fields):
    torch.manual_seed(0)
    model = model_class(config_class(**SIZES, **fields)).eval()
    ids = tokens(2, 61)
    with torch.no_grad(), retrofit(model, PATTERN) as inside:
        logits = inside(ids, use_cache=False).logits
        torch.testing.assert_close(logits, longnet_twin(model, PATTERN)(ids).logits, rtol=1e-5, atol=1e-5)


def test_gradients_flow_as_in_the_longnet_model():
    model = make_model().train()
    twin = longnet_twin(model, PATTERN).train()
    ids = tokens(2, 40)
    with retrofit(model, PATTERN):
        model(ids, labels=ids).loss.backward()
    twin(ids, labels=ids).loss.backward()
    for (name, ours), theirs in zip(model.named_parameters(), twin.parameters()):
        torch.testing.assert_close(
            ours.grad, theirs.grad, rtol=1e-5, atol=1e-5, msg=lambda text, name=name: name + text
        )


def test_a_models_own_scaling_of_scores_is_kept():
    model = make_model()
    twin = longnet_twin(model, PATTERN)
    for layer in (*model.model.layers, *twin.model.layers):
        layer.self_attn.scaling = 0.05
    ids = tokens(1, 40)
    with retrofit(model, PATTERN), torch.no_grad():
        torch.testing.assert_close(model(ids).logits, twin(ids).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_equal_the_rows_alone(side):
    model = make_model()
    lengths = (40, 23, 9)
    rows = [tokens(1, length) for length in lengths]
    ids, mask = torch.full((3, 40), 2), torch.zeros(3, 40, dtype=torch.int64)
    for i, (row, length) in enumerate(zip(rows, lengths)):
        place = slice(40 - length, 40) if side == "left" else slice(0, length)
        ids[i, place], mask[i, place] = row[0], 1
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with retrofit(model, PATTERN), torch.no_grad():
        logits = model(ids, attention_mask=mask, position_ids=positions).logits
        for i, row in enumerate(rows):
            torch.testing.assert_close(logits[i, mask[i] > 0], model(row).logits[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("use_cache", [False, True])
def test_packed_documents_equal_the_documents_alone(use_cache):
    model = make_model()
    documents = [[tokens(1, 25), tokens(1, 7)], [tokens(1, 12), tokens(1, 20)]]
    ids = torch.cat([torch.cat(row, dim=1) for row in documents])
    positions = torch.stack([torch.cat([torch.arange(x.shape[1]) for x in row]) for row in documents])
    with retrofit(model, PATTERN), torch.no_grad():
        logits = model(ids, position_ids=positions, use_cache=use_cache).logits
        for row, packed in zip(documents, logits):
            alone = torch.cat([model(document).logits[0] for document in row])
            torch.testing.assert_close(packed, alone, rtol=1e-5, atol=1e-5)


def test_generation_from_a_padded_batch_equals_the_longnet_models():
    model = make_model()
    twin = longnet_twin(model, PATTERN)
    ids, mask = tokens(2, 30), torch.ones(2, 30, dtype=torch.int64)
    ids[1, :11], mask[1, :11] = 2, 0
    settings = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    with retrofit(model, PATTERN):
        ours = model.generate(ids, attention_mask=mask, **settings)
        beams = model.generate(ids, attention_mask=mask, num_beams=2, **settings)
    assert torch.equal(ours, twin.generate(ids, attention_mask=mask, **settings))
    assert torch.equal(beams, twin.generate(ids, attention_mask=mask, num_beams=2, **settings))
    assert not torch.equal(ours, model.generate(ids, attention_mask=mask, **settings))


def test_chunks_over_a_cache_equal_one_forward():
    model = make_model()
    ids = tokens(1, 50)
    with retrofit(model, PATTERN), torch.no_grad():
        whole = model(ids).logits
        cache, parts = None, []
        for chunk in ids.split([17, 1, 20, 12], dim=1):
            output = model(chunk, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            parts.append(output.logits)
        torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_undoing_restores_the_model_exactly(implementation):
    model = make_model()
    model.set_attn_implementation(implementation)
    ids = tokens(1, 40)
    before_config = model.config.to_json_string()
    before_attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    with torch.no_grad():
        before = model(ids).logits
        handle = retrofit(model, PATTERN)
        assert not torch.equal(model(ids).logits, before)
        handle.undo()
        handle.undo()
        assert torch.equal(model(ids).logits, before)
        with pytest.raises(RuntimeError, match="out of the block"), retrofit(model, PATTERN):
            raise RuntimeError("out of the block")
        assert torch.equal(model(ids).logits, before)
    assert model.config._attn_implementation == implementation
    assert model.config.to_json_string() == before_config
    assert {name: set(vars(module)) for name, module in model.named_modules()} == before_attributes


def test_each_model_has_its_own_pattern_and_is_switched_once():
    one = make_model()
    other = copy.deepcopy(one)
    ids = tokens(1, 40)
    with torch.no_grad(), retrofit(one, PATTERN), retrofit(other, PAPER):
        first = one(ids).logits
        torch.testing.assert_close(first, longnet_twin(one, PATTERN)(ids).logits, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(other(ids).logits, longnet_twin(one, PAPER)(ids).logits, rtol=1e-5, atol=1e-5)
        with pytest.raises(ValueError, match=r"this LlamaForCausalLM is already switched; undo\(\) first"):
            retrofit(one, PAPER)
        assert torch.equal(one(ids).logits, first)
    with torch.no_grad(), retrofit(one, PAPER), retrofit(other, PAPER):
        assert torch.equal(one(ids).logits, other(ids).logits)


def test_a_base_model_without_head_is_served_too():
    torch.manual_seed(0)
    model = LlamaModel(LlamaConfig(**SIZES)).eval()
    ids = tokens(1, 40)
    with torch.no_grad():
        dense = model(ids).last_hidden_state
        with retrofit(model, PATTERN):
            dilated = model(ids).last_hidden_state
    torch.testing.assert_close(dilated[:, :8], dense[:, :8], rtol=1e-5, atol=1e-5)
    assert (dilated[:, 8:] - dense[:, 8:]).abs().max() > 0.1


def test_saving_saves_the_ordinary_model(tmp_path):
    model = make_model()
    with retrofit(model, PATTERN):
        model.save_pretrained(tmp_path)
    again = LlamaForCausalLM.from_pretrained(tmp_path).eval()
    ids = tokens(1, 40)
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_dropout_reaches_the_operator(monkeypatch):
    seen = []

    def record(*args, dropout, **kwargs):
        seen.append(dropout)
        return dilated_attention(*args, dropout=dropout, **kwargs)

    monkeypatch.setattr(sys.modules["conversion.retrofit"], "dilated_attention", record)
    model = make_model()
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.25
    with retrofit(model, PATTERN):
        model.train()(tokens(1, 20))
        model.eval()(tokens(1, 20))
    assert seen == [0.25, 0.25, 0.0, 0.0]


def gemma2():
    return Gemma2ForCausalLM(Gemma2Config(**SIZES))


REFUSED = {
    "softcap": (gemma2, PATTERN, "Gemma2ForCausalLM softcaps its attention logits at 50.0"),
    "other family": (
        lambda: GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=8)),
        PATTERN,
        "GPT2LMHeadModel (model_type 'gpt2') is not supported; supported: llama, mistral, ministral, qwen2, qwen3, smollm3, phi3",
    ),
    "sliding window": (
        lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=16)),
        PATTERN,
        "MistralForCausalLM attends in a sliding window of 16 tokens; load it with sliding_window=None",
    ),
    "sliding window in a layer": (
        lambda: SmolLM3ForCausalLM(
            SmolLM3Config(**SIZES, sliding_window=16, use_sliding_window=True, no_rope_layers=[1, 0])
        ),
        PATTERN,
        "SmolLM3ForCausalLM attends in a sliding window of 16 tokens; load it with sliding_window=None",
    ),
    "LongNet": (lambda: longnet_twin(make_model(), PAPER), PATTERN, "(model_type 'longnet') is not supported"),
    "no model": (lambda: torch.nn.Linear(2, 2), PATTERN, "needs a transformers model, got Linear"),
    "no pattern": (make_model, [(8, 1)], "pattern must be a DilationPattern, got list"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_served_is_refused_with_the_reason(case):
    make, pattern, message = REFUSED[case]
    with pytest.raises(ValueError) as refusal:
        retrofit(make(), pattern)
    assert message in str(refusal.value)


def test_masks_and_caches_that_cannot_be_served_are_refused():
    model = make_model()
    with retrofit(model, PATTERN):
        with pytest.raises(
            ValueError, match=r"must be \[batch, past \+ new tokens\] = \[1, 10\], got \[1, 1, 10, 10\]"
        ):
            model(tokens(1, 10), attention_mask=torch.ones(1, 1, 10, 10))
        with pytest.raises(ValueError, match="needs a cache that grows"):
            model.generate(tokens(1, 10), cache_implementation="static", max_new_tokens=3)


def test_a_cache_cut_to_a_window_that_no_layer_attends_in_is_refused_with_the_fix():
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, sliding_window=16)).eval()
    ids, settings = tokens(1, 30), {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    with retrofit(model, PATTERN):
        with pytest.raises(
            ValueError, match=r"got 16 cache columns for 31 tokens; .* set config.sliding_window to None"
        ):
            model.generate(ids, **settings)
        model.config.sliding_window = None
        cached, uncached = (model.generate(ids, use_cache=use_cache, **settings) for use_cache in (True, False))
    assert torch.equal(cached, uncached)
