"""Every family of dense models: a converted checkpoint is its source, and what LongNet cannot be is refused."""

import pytest
import torch
from checkpoints import CONTEXT, FAMILIES, ROPE, edit_json, make_checkpoint, stored_tensors
from transformers import AutoModelForCausalLM, MinistralForCausalLM

from conversion import convert_checkpoint, convert_to_dense
from conversion.plan_family import plan_conversion
from conversion.weights import read_json
from modeling_longnet import LongNetForCausalLM


QUIET = {"progress": False}

VARIANTS = {
    "llama, window that it does not read": {"family": "llama", "sliding_window": 16},
    "llama, layer types that it does not read": {
        "family": "llama",
        "sliding_window": 16,
        "layer_types": ["sliding_attention", "chunked_attention"],
    },
    "mistral, layer types without a window": {
        "family": "mistral",
        "sliding_window": 16,
        "layer_types": ["full_attention", "full_attention"],
    },
    "mistral, shorter window in one of its layer types": {
        "family": "mistral",
        "sliding_window": 16,
        "layer_types": ["full_attention", "sliding_attention"],
    },
    "phi3, shorter window, layer types that it does not read": {
        "family": "phi3",
        "sliding_window": 16,
        "layer_types": ["full_attention", "sliding_attention"],
    },
    "llama, length before a stretch that plain RoPE does not do": {
        "family": "llama",
        "rope_parameters": {**ROPE["default"], "original_max_position_embeddings": 16},
    },
    "llama, rotation in part that it does not read": {"family": "llama", "partial_rotary_factor": 0.5},
    "qwen3, rotation in part that it does not read": {
        "family": "qwen3",
        "rope_parameters": {**ROPE["default"], "partial_rotary_factor": 0.5},
    },
    "mistral": {"family": "mistral"},
    "mistral, wide heads": {"family": "mistral", "head_dim": 12},
    "mistral, window of the trained context": {"family": "mistral", "sliding_window": CONTEXT},
    "mistral, shorter window": {"family": "mistral", "sliding_window": 16},
    "ministral": {"family": "ministral"},
    "ministral, shorter window in one layer": {
        "family": "ministral",
        "sliding_window": 16,
        "layer_types": ["full_attention", "sliding_attention"],
    },
    "qwen2": {"family": "qwen2"},
    "qwen2, tied": {"family": "qwen2", "tie_word_embeddings": True},
    "qwen2, sliding window switched off": {"family": "qwen2", "sliding_window": 16, "max_window_layers": 0},
    "qwen2, sliding window in every layer": {
        "family": "qwen2",
        "sliding_window": 16,
        "max_window_layers": 0,
        "use_sliding_window": True,
    },
    "qwen2, shorter sliding window in one layer": {
        "family": "qwen2",
        "sliding_window": 16,
        "max_window_layers": 1,
        "use_sliding_window": True,
    },
    "smollm3, shorter sliding window in a layer": {
        "family": "smollm3",
        "sliding_window": 16,
        "use_sliding_window": True,
    },
    "qwen2, yarn": {"family": "qwen2", "rope": "yarn"},
    "qwen3": {"family": "qwen3"},
    "qwen3, biases": {"family": "qwen3", "attention_bias": True},
    "qwen3, loose norms": {"family": "qwen3", "rms_norm_eps": 0.5},
    "smollm3": {"family": "smollm3"},
    "smollm3, no rope at an interval": {"family": "smollm3", "no_rope_layers": None, "no_rope_layer_interval": 2},
    "smollm3, biases": {"family": "smollm3", "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False},
    "phi3": {"family": "phi3"},
    "phi3, partial rotation": {"family": "phi3", "rope_parameters": {**ROPE["default"], "partial_rotary_factor": 0.5}},
    "phi3, gelu": {"family": "phi3", "hidden_act": "gelu", "num_key_value_heads": 1},
    "phi3, longrope": {
        "family": "phi3",
        "rope": "longrope, no factor",
        "original_max_position_embeddings": 16,
        "sliding_window": 4 * CONTEXT,
    },
}


def assert_parts_are_rows_of_the_whole(parts: dict[str, torch.Tensor], whole: dict[str, torch.Tensor]) -> None:
    """Compare bits; ``parts`` may hold the rows of a tensor of ``whole`` under several names."""
    fused = {
        "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
    }
    seen = set()
    for name, tensor in whole.items():
        module = next((module for module in fused if module in name), "")
        names = [name.replace(module, part) for part in fused.get(module, ("",))]
        joined = torch.cat([parts[part] for part in names])
        assert joined.dtype == tensor.dtype
        assert torch.equal(joined.view(torch.uint8), tensor.view(torch.uint8)), name
        seen.update(names)
    assert seen == parts.keys()


@pytest.mark.parametrize("variant", VARIANTS)
def test_converted_logits_equal_the_sources_at_every_length_up_to_the_first_segment(tmp_path, variant):
    make_checkpoint(tmp_path / "source", **VARIANTS[variant])
    report = convert_checkpoint(tmp_path / "source", tmp_path / "target", max_position_embeddings=4 * CONTEXT, **QUIET)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "source").eval()
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "target").eval()
    family = MinistralForCausalLM if variant.startswith("mistral, ") and "layer_types" in VARIANTS[variant] else None
    assert type(theirs) is (family or FAMILIES[VARIANTS[variant]["family"]][0])
    assert type(ours) is LongNetForCausalLM
    first_segment = ours.config.segment_lengths[0]
    short = {"yarn", "longrope", "shorter", "every"} & set(variant.replace(",", "").split())
    assert first_segment == (16 if short else CONTEXT)
    tokens = torch.randint(3, 288, (2, first_segment), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for length in range(1, first_segment + 1):
            # without a cache: transformers sizes its own by fields that the architecture does not read
            expected = theirs(tokens[:, :length], use_cache=False).logits
            # float32 rounds logits of 5 to 5e-7: what is single here and fused there adds up in another order
            allowed = 1e-5 * max(1.0, float(expected.abs().max()))
            torch.testing.assert_close(ours(tokens[:, :length]).logits, expected, rtol=0, atol=allowed)
    assert expected.abs().max() > 0.5
    assert report["verification"]["relative_error"] < 1e-5
    assert_parts_are_rows_of_the_whole(stored_tensors(tmp_path / "target"), stored_tensors(tmp_path / "source"))


@pytest.mark.parametrize("max_shard_size", ["5GB", "20KB"])
@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_weights_keep_their_bits(tmp_path, family, max_shard_size):
    make_checkpoint(tmp_path / "source", family=family, dtype=torch.bfloat16, max_shard_size="20KB")
    report = convert_checkpoint(tmp_path / "source", tmp_path / "target", max_shard_size=max_shard_size, **QUIET)
    assert_parts_are_rows_of_the_whole(stored_tensors(tmp_path / "target"), stored_tensors(tmp_path / "source"))
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "target")
    assert ours.dtype == torch.bfloat16
    assert report["source"]["architecture"] == FAMILIES[family][0].__name__


@pytest.mark.parametrize("family", FAMILIES)
def test_the_converted_model_generates_as_its_source_does(tmp_path, family):
    make_checkpoint(tmp_path / "source", family=family)
    convert_checkpoint(tmp_path / "source", tmp_path / "target", **QUIET)
    prompt = torch.arange(3, 30)[None]
    settings = {"max_new_tokens": 20, "do_sample": False, "temperature": None, "eos_token_id": None, "pad_token_id": 1}
    theirs, ours = (
        AutoModelForCausalLM.from_pretrained(tmp_path / name).generate(
            prompt, attention_mask=torch.ones_like(prompt), **settings
        )
        for name in ("source", "target")
    )
    assert torch.equal(ours, theirs)


UNREAD = {
    "the pattern": {"segment_lengths": [8], "dilation_rates": [2], "window": "segment", "count_overlaps": True},
    "a preset": {"preset": "paper"},
    "names of the official code": {"segment_length": [8], "dilated_ratio": [2], "subln": True, "xpos_rel_pos": True},
    "close to names of LongNet": {"windows": 3, "qk_norms": True, "local_layer": 1},
    "another backbone": {"backbone": "magneto", "sub_layernorm": True, "scale_embedding": True, "layer_norm_eps": "x"},
    "xPos": {"xpos": True, "xpos_scale_base": 0},
    "layers": {"dense_layers": [0], "local_layers": [1], "layers_without_rope": [0], "qk_norm": True},
    "training": {"loss_implementation": "fast", "trained_context": 3, "source_config": 3},
    "other families' fields": {"resid_pdrop": 0.1, "logits_scaling": 8.0, "quantization_config": None},
    "how it was run": {"return_dict": False, "output_attentions": True, "output_hidden_states": True},
    "kernels of another machine": {"attn_implementation": "flash_attention_2", "torchscript": True},
}


@pytest.mark.parametrize("case", UNREAD)
@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_fields_that_the_source_does_not_read_change_nothing(tmp_path, family, case):
    make_checkpoint(tmp_path / "source", family=family)
    convert_checkpoint(tmp_path / "source", tmp_path / "clean", **QUIET)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "source")
    before = read_json(tmp_path / "source" / "config.json")
    edit_json(tmp_path / "source" / "config.json", **UNREAD[case])
    convert_checkpoint(tmp_path / "source", tmp_path / "target", **QUIET)  # verified against the source's own class
    clean, ours = (read_json(tmp_path / name / "config.json") for name in ("clean", "target"))
    assert clean.pop("source_config") == before
    assert ours.pop("source_config") == read_json(tmp_path / "source" / "config.json")
    assert ours == clean
    tokens = torch.randint(3, 288, (2, CONTEXT), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(tmp_path / "target")(tokens).logits
        torch.testing.assert_close(logits, theirs(tokens).logits, rtol=0, atol=1e-5 * float(logits.abs().max()))
    convert_to_dense(tmp_path / "target", tmp_path / "dense", **QUIET)
    assert read_json(tmp_path / "dense" / "config.json") == read_json(tmp_path / "source" / "config.json")


def test_a_window_shorter_than_the_trained_context_sets_the_first_segment(tmp_path):
    make_checkpoint(tmp_path / "source", family="mistral", sliding_window=16)
    plan = plan_conversion(tmp_path / "source")
    assert plan.config.segment_lengths == (16, 32, 64)
    assert "trained    64 tokens, each attending to the last 16" in plan.describe().splitlines()
    assert plan_conversion(tmp_path / "source", segment_lengths=[8, 32]).config.segment_lengths == (8, 32)


def test_layers_with_a_window_stay_exactly_that_beside_dense_ones(tmp_path):
    fields = {"sliding_window": 16, "max_window_layers": 1, "use_sliding_window": True}
    make_checkpoint(tmp_path / "source", family="qwen2", **fields)
    plan = plan_conversion(tmp_path / "source").describe().splitlines()
    assert "local      layers 1" in plan
    assert plan_conversion(tmp_path / "source", dense_layers=[1]).config.local_layers == ()
    assert "trained    64 tokens, some layers attending to the last 16" in plan
    convert_checkpoint(tmp_path / "source", tmp_path / "target", dense_layers=[0], **QUIET)
    theirs, ours = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("source", "target"))
    assert (ours.config.dense_layers, ours.config.local_layers) == ((0,), (1,))
    tokens = torch.randint(3, 288, (2, 60), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens).logits, theirs(tokens).logits, rtol=0, atol=1e-4)
    assert (
        "Layer 1 keeps to the first segment length, as in the source." in (tmp_path / "target/README.md").read_text()
    )
    convert_checkpoint(tmp_path / "source", tmp_path / "shorter", local=8, verify=False, progress=False)
    said = "Layer 1 keeps to the first segment length, 8 tokens, where the source has a window of 16."
    assert said in (tmp_path / "shorter/README.md").read_text()
    convert_to_dense(tmp_path / "target", tmp_path / "dense", **QUIET)
    assert read_json(tmp_path / "dense" / "config.json") == read_json(tmp_path / "source" / "config.json")


QWEN2_WINDOW = {"family": "qwen2", "sliding_window": 16, "use_sliding_window": True}
CUT = "window of 16 tokens, cut here to the first segment, 8: one of 16 keeps it (--local)"


@pytest.mark.parametrize(
    ("source", "options", "told"),
    [
        ({"family": "mistral", "sliding_window": 16}, {"local": 8}, CUT),
        ({"family": "mistral", "sliding_window": 16}, {"segment_lengths": [8, 32]}, CUT),
        ({"family": "mistral", "sliding_window": 16}, {}, None),
        ({"family": "mistral", "sliding_window": 16}, {"local": 8, "dense_layers": [0, 1]}, None),
        ({"family": "mistral", "sliding_window": 4 * CONTEXT}, {}, None),
        (
            {"family": "mistral", "sliding_window": 4 * CONTEXT},
            {"local": 32},
            "cut here to the first segment, 32: one of 256",
        ),
        ({**QWEN2_WINDOW, "max_window_layers": 1}, {"local": 8}, CUT),
        ({**QWEN2_WINDOW, "max_window_layers": 1}, {"local": 8, "dense_layers": [1]}, None),
        ({**QWEN2_WINDOW, "max_window_layers": 1}, {}, None),
        ({"family": "llama"}, {"local": 8}, None),
    ],
    ids=str,
)
def test_the_plan_tells_of_a_window_that_is_cut_short(tmp_path, source, options, told):
    make_checkpoint(tmp_path / "source", **source)
    plan = " ".join(plan_conversion(tmp_path / "source", **options).describe().split())
    assert ("cut here" in plan) == (told is not None) and (told or "") in plan


def config(**fields):
    return lambda source: edit_json(source / "config.json", **fields)


REFUSED = {
    "window shorter than the first segment": (
        "mistral", config(sliding_window=16), {"segment_lengths": [32, 64]},
        "a sliding window of 16 tokens, so it is not this pattern on up to 32 tokens; choose a first segment of at "
        "most 16",
    ),
    "chunked attention": (
        "qwen3", config(layer_types=["full_attention", "chunked_attention"]), {},
        "the source has layers of chunked_attention",
    ),
    "window without a length": (
        "qwen2", config(layer_types=["full_attention", "sliding_attention"]), {},
        "layer 1 of the source attends in a sliding window (layer_types) whose length is switched off",
    ),
    "rotation in part that breaks the source": (
        "llama", config(rope_parameters=ROPE["linear"], partial_rotary_factor=0.5), {},
        "LlamaForCausalLM rotates whole heads and fails with RoPE linear and partial_rotary_factor 0.5; remove",
    ),
    "RoPE that the family lacks": (
        "phi3", lambda source: None, {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}},
        "Phi3ForCausalLM has no RoPE of type yarn, only default, longrope; choose ntk, which stretches the default one "
        "(--rope ntk), or keep the source's (--rope none)",
    ),
    "a word for RoPE that the family lacks": (
        "phi3", lambda source: None, {"rope_parameters": "llama3"}, "Phi3ForCausalLM has no RoPE of type llama3, only",
    ),
    "a part that the family does not rotate": (
        "qwen2", lambda source: None, {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
        "Qwen2ForCausalLM rotates whole heads; leave partial_rotary_factor out",
    ),
    "longrope without factors": (
        "mistral", lambda source: None, {"rope_parameters": {"rope_type": "longrope", "factor": 4.0}},
        "RoPE longrope needs 4 numbers as short_factor, one per pair that rotates, got None",
    ),
    "longrope with a factor of text": (
        "mistral", lambda source: None,
        {"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0, "2", 1, 1], "long_factor": [1.0] * 4}},
        "RoPE longrope needs positive finite numbers as short_factor, got '2'",
    ),
    "longrope with too few factors": (
        "llama", lambda source: None,
        {"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [1.0] * 3}},
        "RoPE longrope needs 4 numbers as long_factor, one per pair that rotates, got 3",
    ),
    "heads that LongNet cannot have": (
        "qwen3", lambda source: make_checkpoint(source, family="qwen3", hidden_size=30), {},
        "this Qwen3ForCausalLM makes no LongNetConfig: ",
    ),
    "other tensors": ("phi3", config(model_type="llama", architectures=["LlamaForCausalLM"]), {},
                      "the weights lack 10 tensors (model.layers.0.self_attn.q_proj.weight, ...)"),
    "mixture of experts": (
        "llama", config(architectures=["MixtralForCausalLM"], model_type="mixtral", num_local_experts=8), {},
        "MixtralForCausalLM (model_type 'mixtral'), which is not supported because its feed-forward layers are mixtures",
    ),
    "multimodal": (
        "llama", config(architectures=["LlavaForConditionalGeneration"], model_type="llava", vision_config={"a": 1}),
        {}, "which is not supported because it reads more than text; supported: LlamaForCausalLM, MistralForCausalLM, ",
    ),
    "softcap": (
        "llama", config(architectures=["Gemma2ForCausalLM"], model_type="gemma2", attn_logit_softcapping=50.0), {},
        "because it softcaps its attention logits",
    ),
    "encoder and decoder": (
        "llama", config(architectures=["T5ForConditionalGeneration"], model_type="t5", is_encoder_decoder=True), {},
        "because it is an encoder and a decoder",
    ),
    "quantized": ("mistral", config(quantization_config={"quant_method": "awq"}), {}, "weights are quantized (awq)"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_expressed_is_refused_with_the_reason(tmp_path, case):
    family, spoil, options, message = REFUSED[case]
    make_checkpoint(tmp_path / "source", family=family)
    spoil(tmp_path / "source")
    with pytest.raises(ValueError) as refusal:
        convert_checkpoint(tmp_path / "source", tmp_path / "target", **options, **QUIET)
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
