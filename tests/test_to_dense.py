"""The way back: the ordinary checkpoint again, bit for bit; and adapters, which fit both sides."""

import json
import sys
from pathlib import Path

import pytest
import torch
from checkpoints import CONTEXT, FAMILIES, ROPE, assert_same_bits, edit_json, make_checkpoint, stored_tensors
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from conversion import convert_adapter, convert_checkpoint, convert_to_dense
from conversion.cli import main


# peft reads the old name of an attribute of transformers' models
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

QUIET = {"progress": False}
LONGER = {"max_position_embeddings": 4 * CONTEXT}

VARIANTS = {
    **{family: {"family": family} for family in FAMILIES},
    "tied": {"tie_word_embeddings": True},
    "sharded": {"max_shard_size": "20KB"},
    "bfloat16": {"dtype": torch.bfloat16},
    "phi3, bfloat16, sharded": {"family": "phi3", "dtype": torch.bfloat16, "max_shard_size": "20KB"},
    "mistral with a window": {"family": "mistral", "sliding_window": 16},
    **{f"RoPE {name}": {"rope": name} for name in ROPE if name != "default"},
    "phi3, partial rotation": {
        "family": "phi3",
        "rope_parameters": {**ROPE["default"], "partial_rotary_factor": 0.5},
    },
    "phi3, longrope": {"family": "phi3", "rope": "longrope, no factor", "original_max_position_embeddings": 16},
}


@pytest.fixture
def source(tmp_path) -> Path:
    make_checkpoint(tmp_path / "source")
    return tmp_path / "source"


@pytest.mark.parametrize("variant", VARIANTS)
def test_there_and_back_is_the_original_in_every_bit_and_field(tmp_path, variant):
    make_checkpoint(tmp_path / "source", **VARIANTS[variant])
    convert_checkpoint(tmp_path / "source", tmp_path / "longnet", **LONGER, **QUIET)
    report = convert_to_dense(tmp_path / "longnet", tmp_path / "dense", **QUIET)
    assert_same_bits(stored_tensors(tmp_path / "dense"), stored_tensors(tmp_path / "source"))
    original, ours = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("source", "dense"))
    assert ours == original
    assert report["verification"]["relative_error"] < 1e-5
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert type(model) is FAMILIES[VARIANTS[variant].get("family", "llama")][0]
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "source")
    tokens = torch.arange(CONTEXT + 10)[None]
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, theirs(tokens).logits)
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json"):
        assert (tmp_path / "dense" / name).read_bytes() == (tmp_path / "source" / name).read_bytes()


def test_a_longnet_model_that_returns_tuples_has_a_way_back(source, tmp_path):
    convert_checkpoint(source, tmp_path / "longnet", **QUIET)
    edit_json(tmp_path / "longnet" / "config.json", return_dict=False)
    report = convert_to_dense(tmp_path / "longnet", tmp_path / "dense", **QUIET)
    assert report["verification"]["relative_error"] < 1e-5


def test_a_quantization_config_that_says_nothing_is_left_out_where_it_would_keep_the_model_from_loading(
    source, tmp_path
):
    edit_json(source / "config.json", quantization_config={})
    convert_checkpoint(source, tmp_path / "longnet", **QUIET)
    convert_to_dense(tmp_path / "longnet", tmp_path / "dense", **QUIET)
    for name in ("longnet", "dense"):
        AutoModelForCausalLM.from_pretrained(tmp_path / name)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_tuned_model_goes_back_with_its_new_weights(tmp_path, family):
    make_checkpoint(tmp_path / "source", family=family)
    convert_checkpoint(tmp_path / "source", tmp_path / "longnet", local=16, **LONGER, **QUIET)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "longnet").eval()
    model.resize_token_embeddings(290, mean_resizing=False)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    model.config.pad_token_id, model.config.use_cache = 5, False
    model.save_pretrained(tmp_path / "tuned")
    AutoTokenizer.from_pretrained(tmp_path / "longnet").save_pretrained(tmp_path / "tuned")
    convert_to_dense(tmp_path / "tuned", tmp_path / "dense", **QUIET)
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense").eval()
    assert type(dense) is FAMILIES[family][0]
    assert (dense.config.vocab_size, dense.config.pad_token_id, dense.config.use_cache) == (290, 5, True)
    tokens = torch.randint(3, 290, (2, 60), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        ours, theirs = dense(tokens).logits, model(tokens).logits
    torch.testing.assert_close(ours[:, :16], theirs[:, :16], rtol=0, atol=1e-5)
    assert (ours[:, 16:] - theirs[:, 16:]).abs().max() > 0.01


def test_new_rope_goes_back_with_its_context(source, tmp_path):
    convert_checkpoint(source, tmp_path / "longnet", rope_parameters="yarn", **LONGER, **QUIET)
    convert_to_dense(tmp_path / "longnet", tmp_path / "dense", **QUIET)
    config = json.loads((tmp_path / "dense" / "config.json").read_text())
    yarn = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": CONTEXT}
    assert config["rope_parameters"] == yarn
    assert config["max_position_embeddings"] == 4 * CONTEXT


def test_new_rope_replaces_the_old_spellings_and_code_that_does_not_travel_is_not_named(source, tmp_path):
    edit_json(
        source / "config.json",
        rope_parameters=None,
        rope_theta=5000.0,
        rope_scaling={"type": "linear", "factor": 2.0},
        auto_map={"AutoModelForCausalLM": "code.Model"},
    )
    convert_checkpoint(source, tmp_path / "longnet", rope_parameters="ntk", **LONGER, **QUIET)
    convert_to_dense(tmp_path / "longnet", tmp_path / "dense", **QUIET)
    config = json.loads((tmp_path / "dense" / "config.json").read_text())
    assert not {"rope_theta", "rope_scaling", "auto_map"} & config.keys()
    assert config["rope_parameters"] == {"rope_type": "default", "rope_theta": 5000.0 * 4.0 ** (8 / 6)}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "dense").config
    assert loaded.rope_parameters == config["rope_parameters"]


def test_new_longrope_of_phi3_goes_back_too(tmp_path):
    make_checkpoint(tmp_path / "source", family="phi3", original_max_position_embeddings=CONTEXT)
    longrope = {"rope_type": "longrope", "factor": 4.0, "short_factor": [1.0] * 4, "long_factor": [2.0, 3.0, 4.0, 5.0]}
    convert_checkpoint(tmp_path / "source", tmp_path / "longnet", rope_parameters=longrope, **LONGER, **QUIET)
    convert_to_dense(tmp_path / "longnet", tmp_path / "dense", **QUIET)
    longnet, dense = (AutoModelForCausalLM.from_pretrained(tmp_path / name).config for name in ("longnet", "dense"))
    assert dense.rope_parameters == longnet.rope_parameters
    assert dense.rope_parameters["original_max_position_embeddings"] == CONTEXT


def test_a_context_may_be_asked_for_and_leaves_implied_rope_factors_as_they_were(tmp_path):
    make_checkpoint(tmp_path / "source", rope="yarn, no factor")
    convert_checkpoint(tmp_path / "source", tmp_path / "longnet", **QUIET)
    convert_to_dense(tmp_path / "longnet", tmp_path / "dense", max_position_embeddings=1024, **QUIET)
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert dense.config.max_position_embeddings == 1024
    tokens = torch.arange(60)[None]
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "source")(tokens).logits
        torch.testing.assert_close(dense(tokens).logits, theirs, rtol=0, atol=1e-5)


def test_a_pattern_that_is_never_ordinary_attention_goes_back_too(source, tmp_path):
    convert_checkpoint(source, tmp_path / "longnet", preset="paper", dtype="bfloat16", **QUIET)
    report = convert_to_dense(tmp_path / "longnet", tmp_path / "dense", dtype="float32", **QUIET)
    assert not report["verification"]["pattern_used"]
    expected = {name: x.bfloat16().float() for name, x in stored_tensors(source).items()}
    assert_same_bits(stored_tensors(tmp_path / "dense"), expected)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "dense").dtype == torch.float32


def test_the_dense_card_names_licence_source_and_proof(source, tmp_path):
    (source / "README.md").write_text("---\nlicense: llama3.2\n---\n# A model\n")
    convert_checkpoint(source, tmp_path / "longnet", **QUIET)
    report = convert_to_dense(tmp_path / "longnet", tmp_path / "dense", **QUIET)
    card = ModelCard.load(tmp_path / "dense" / "README.md")
    assert card.data.license == "llama3.2"
    assert "converted back to `LlamaForCausalLM`" in card.text
    assert f"{report['verification']['max_error']:.2g}" in card.text
    assert "$" not in card.text
    assert not (tmp_path / "dense" / "modeling_longnet.py").exists()


def spoil_one_weight(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"] = tensors["model.layers.0.mlp.up_proj.weight"][:40]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


REFUSED_WAYS_BACK = {
    "dense already": (lambda x: edit_json(x / "config.json", architectures=["LlamaForCausalLM"]), {},
                      "the source is LlamaForCausalLM; only LongNetForCausalLM has a way back"),
    "adapter beside": (lambda x: (x / "adapter_config.json").write_text("{}"), {}, "holds an adapter beside the model"),
    "never converted": (lambda x: edit_json(x / "config.json", source_config=None), {}, "has no source_config"),
    "classifier": (lambda x: edit_json(x / "config.json", architectures=["LongNetForSequenceClassification"]), {},
                   "the source is LongNetForSequenceClassification; only"),
    "architectures in a string": (lambda x: edit_json(x / "config.json", architectures="LongNetForCausalLM"), {},
                                  "the source is 'LongNetForCausalLM'; only"),
    "bad config": (lambda x: edit_json(x / "config.json", window=3), {}, "config.json is not a valid LongNetConfig"),
    "no such RoPE": (lambda x: edit_json(x / "config.json", rope_parameters={"rope_type": "foo", "rope_theta": 1e4}), {},
                     "config.json does not describe a LongNet model that can be built: KeyError('foo')"),
    "dtype of integers": (lambda x: edit_json(x / "config.json", dtype="int8"), {}, "says dtype int8, in which no model"),
    "wrong shape": (spoil_one_weight, {}, "up_proj.weight has shape [40, 32], but with this config.json it has [48, 32]"),
    "dtype": (lambda x: None, {"dtype": "int8"}, "dtype must be one of"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED_WAYS_BACK)
def test_what_has_no_way_back_is_refused_before_anything_is_written(source, tmp_path, case):
    spoil, options, message = REFUSED_WAYS_BACK[case]
    convert_checkpoint(source, tmp_path / "longnet", verify=False, **QUIET)
    spoil(tmp_path / "longnet")
    with pytest.raises(ValueError) as refusal:
        convert_to_dense(tmp_path / "longnet", tmp_path / "dense", **options, **QUIET)
    assert message in str(refusal.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["longnet", "source"]


def test_dynamic_rope_keeps_its_context(tmp_path):
    make_checkpoint(tmp_path / "source", rope="dynamic")
    convert_checkpoint(tmp_path / "source", tmp_path / "longnet", **QUIET)
    with pytest.raises(ValueError, match="dynamic RoPE scales from max_position_embeddings"):
        convert_to_dense(tmp_path / "longnet", tmp_path / "dense", max_position_embeddings=1024, **QUIET)


def test_wrong_logits_refuse_the_dense_target(source, tmp_path, monkeypatch):
    convert_checkpoint(source, tmp_path / "longnet", **QUIET)

    def swap(self, config, tensors):
        first, second = (f"model.layers.0.self_attn.{name}_proj.weight" for name in "kv")
        return tensors | {first: tensors[second], second: tensors[first]}

    monkeypatch.setattr("conversion.families.Family.from_longnet", swap)
    with pytest.raises(ValueError, match="logits differ"):
        convert_to_dense(tmp_path / "longnet", tmp_path / "dense", **QUIET)
    assert not (tmp_path / "dense").exists()


# Adapters


def make_adapter(base: Path, folder: Path, **options) -> None:
    """Save a LoRA adapter of random numbers for the model at ``base``."""
    torch.manual_seed(3)
    settings = {"r": 4, "task_type": "CAUSAL_LM", "target_modules": "all-linear", **options}
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(**settings))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)


def adapted_logits(base: Path, adapter: Path, tokens: torch.Tensor) -> torch.Tensor:
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()
    with torch.no_grad():
        return model(tokens).logits


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"modules_to_save": ["lm_head"]}], ids=str)
@pytest.mark.parametrize("trained_on", ["dense", "longnet"])
def test_an_adapter_means_the_same_on_either_side(source, tmp_path, trained_on, options):
    convert_checkpoint(source, tmp_path / "longnet", **QUIET)
    sides = {"dense": source, "longnet": tmp_path / "longnet"}
    other = sides["longnet" if trained_on == "dense" else "dense"]
    make_adapter(sides[trained_on], tmp_path / "adapter", **options)
    report = convert_adapter(tmp_path / "adapter", tmp_path / "moved", other, **QUIET)
    config = json.loads((tmp_path / "moved" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(other)
    assert report["num_tensors"] == len(load_file(tmp_path / "moved" / "adapter_model.safetensors"))
    tokens = torch.arange(CONTEXT)[None]
    before, after = (
        adapted_logits(sides[trained_on], tmp_path / "adapter", tokens),
        adapted_logits(other, tmp_path / "moved", tokens),
    )
    torch.testing.assert_close(after, before, rtol=0, atol=1e-5)
    with torch.no_grad():
        assert (before - AutoModelForCausalLM.from_pretrained(source)(tokens).logits).abs().max() > 0.1
    card = ModelCard.load(tmp_path / "moved" / "README.md")
    assert card.data.base_model == str(other)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_of_all_layers_means_the_same_in_every_family(tmp_path, family):
    make_checkpoint(tmp_path / "source", family=family)
    convert_checkpoint(tmp_path / "source", tmp_path / "longnet", verify=False, **QUIET)
    make_adapter(tmp_path / "source", tmp_path / "adapter", modules_to_save=["norm"])
    convert_adapter(tmp_path / "adapter", tmp_path / "moved", tmp_path / "longnet", **QUIET)
    tokens = torch.arange(CONTEXT)[None]
    before = adapted_logits(tmp_path / "source", tmp_path / "adapter", tokens)
    after = adapted_logits(tmp_path / "longnet", tmp_path / "moved", tokens)
    torch.testing.assert_close(after, before, rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning")
def test_weights_of_the_base_model_that_an_adapter_brings_are_moved_too(source, tmp_path):
    convert_checkpoint(source, tmp_path / "longnet", verify=False, **QUIET)
    make_adapter(source, tmp_path / "adapter", target_modules=["embed_tokens", "q_proj"])
    convert_adapter(tmp_path / "adapter", tmp_path / "moved", tmp_path / "longnet", **QUIET)
    moved = load_file(tmp_path / "moved" / "adapter_model.safetensors")
    assert "base_model.model.model.embed_tokens.base_layer.weight" in moved


FUSED_LAYERS = [f"model.layers.{i}.{module}" for i in (0, 1) for module in ("self_attn.qkv_proj", "mlp.gate_up_proj")]
FUSED_TARGETS = {
    "last names": {"target_modules": ["qkv_proj", "o_proj", "gate_up_proj"]},
    "DoRA": {"target_modules": ["qkv_proj", "o_proj", "gate_up_proj"], "use_dora": True},
    "trained in full": {"target_modules": ["qkv_proj", "o_proj"], "modules_to_save": ["gate_up_proj"]},
    "whole paths": {"target_modules": [*FUSED_LAYERS, "model.layers.0.self_attn.o_proj"]},
    "ends of paths": {"target_modules": ["self_attn.qkv_proj", "o_proj", "mlp.gate_up_proj"]},
    "ends of paths, trained in full": {"target_modules": ["qkv_proj"], "modules_to_save": ["mlp.gate_up_proj"]},
}


@pytest.mark.parametrize("case", FUSED_TARGETS)
def test_an_adapter_of_fused_projections_becomes_one_of_single_ones(tmp_path, case):
    make_checkpoint(tmp_path / "source", family="phi3")
    convert_checkpoint(tmp_path / "source", tmp_path / "longnet", **QUIET)
    make_adapter(tmp_path / "source", tmp_path / "adapter", **FUSED_TARGETS[case])
    convert_adapter(tmp_path / "adapter", tmp_path / "moved", tmp_path / "longnet", **QUIET)
    tokens = torch.arange(CONTEXT)[None]
    before = adapted_logits(tmp_path / "source", tmp_path / "adapter", tokens)
    after = adapted_logits(tmp_path / "longnet", tmp_path / "moved", tokens)
    torch.testing.assert_close(after, before, rtol=0, atol=1e-5)
    with torch.no_grad():
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "source")(tokens).logits
    assert (before - plain).abs().max() > 0.1
    with pytest.raises(ValueError, match="for which Phi3ForCausalLM has no module"):
        convert_adapter(tmp_path / "moved", tmp_path / "again", tmp_path / "source", **QUIET)


def test_a_fused_adapter_of_another_size_or_named_by_a_pattern_is_refused(tmp_path):
    make_checkpoint(tmp_path / "source", family="phi3")
    make_checkpoint(tmp_path / "other", family="phi3", num_key_value_heads=4)
    convert_checkpoint(tmp_path / "source", tmp_path / "longnet", verify=False, **QUIET)
    make_adapter(tmp_path / "other", tmp_path / "larger", target_modules=["qkv_proj"])
    with pytest.raises(ValueError, match="has 96 rows, but self_attn.qkv_proj of the base model had 64"):
        convert_adapter(tmp_path / "larger", tmp_path / "moved", tmp_path / "longnet", **QUIET)
    make_adapter(tmp_path / "source", tmp_path / "pattern", target_modules=".*qkv_proj")
    with pytest.raises(ValueError, match="names qkv_proj other than in a list of modules"):
        convert_adapter(tmp_path / "pattern", tmp_path / "moved", tmp_path / "longnet", **QUIET)


PATTERNS = {
    "target": {"target_modules": r".*\.(qkv|o)_proj"},
    "rank": {"target_modules": ["qkv_proj"], "rank_pattern": {r".*0.*(qkv)_proj": 2}},
    "alpha": {"target_modules": ["qkv_proj"], "alpha_pattern": {r"self_attn\.(qkv)_proj": 2}},
}


@pytest.mark.parametrize("case", PATTERNS)
def test_a_pattern_that_matches_a_fused_projection_is_refused(tmp_path, case):
    make_checkpoint(tmp_path / "source", family="phi3")
    convert_checkpoint(tmp_path / "source", tmp_path / "longnet", verify=False, **QUIET)
    make_adapter(tmp_path / "source", tmp_path / "adapter", **PATTERNS[case])
    with pytest.raises(ValueError, match="names qkv_proj other than in a list of modules, as a pattern perhaps"):
        convert_adapter(tmp_path / "adapter", tmp_path / "moved", tmp_path / "longnet", **QUIET)


def test_a_pattern_of_single_projections_stays(tmp_path):
    make_checkpoint(tmp_path / "source", family="phi3")
    convert_checkpoint(tmp_path / "source", tmp_path / "longnet", verify=False, **QUIET)
    make_adapter(tmp_path / "source", tmp_path / "adapter", target_modules=r".*\.(o|down)_proj")
    report = convert_adapter(tmp_path / "adapter", tmp_path / "moved", tmp_path / "longnet", **QUIET)
    assert report["num_tensors"] == 2 * 2 * 2


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora", "corda", "loftq", "eva", "lora_ga"])
def test_an_adapter_that_starts_from_fused_weights_is_refused(tmp_path, start):
    make_checkpoint(tmp_path / "source", family="phi3")
    convert_checkpoint(tmp_path / "source", tmp_path / "longnet", verify=False, **QUIET)
    make_adapter(tmp_path / "source", tmp_path / "adapter", target_modules=["qkv_proj"])
    edit_json(tmp_path / "adapter" / "adapter_config.json", init_lora_weights=start)
    with pytest.raises(ValueError, match=rf"starts from fused weights \(init_lora_weights '{start}'\)"):
        convert_adapter(tmp_path / "adapter", tmp_path / "moved", tmp_path / "longnet", **QUIET)
    assert not (tmp_path / "moved").exists()


def test_an_adapter_that_starts_from_weights_both_sides_have_is_moved(tmp_path):
    make_checkpoint(tmp_path / "source", family="phi3")
    convert_checkpoint(tmp_path / "source", tmp_path / "longnet", verify=False, **QUIET)
    make_adapter(tmp_path / "source", tmp_path / "adapter", target_modules=["o_proj"], init_lora_weights="pissa")
    convert_adapter(tmp_path / "adapter", tmp_path / "moved", tmp_path / "longnet", **QUIET)
    tokens = torch.arange(CONTEXT)[None]
    before = adapted_logits(tmp_path / "source", tmp_path / "adapter", tokens)
    after = adapted_logits(tmp_path / "longnet", tmp_path / "moved", tokens)
    torch.testing.assert_close(after, before, rtol=0, atol=1e-5)


def test_a_moved_adapter_names_the_class_of_its_new_base(source, tmp_path):
    convert_checkpoint(source, tmp_path / "longnet", **QUIET)
    make_adapter(source, tmp_path / "adapter", task_type=None)
    convert_adapter(tmp_path / "adapter", tmp_path / "moved", tmp_path / "longnet", **QUIET)
    config = json.loads((tmp_path / "moved" / "adapter_config.json").read_text())
    assert config["auto_mapping"] == {
        "base_model_class": "LongNetForCausalLM",
        "parent_library": "modeling_longnet.modeling_longnet",
    }


def test_an_adapter_is_moved_over_an_old_one_only_when_asked(source, tmp_path):
    convert_checkpoint(source, tmp_path / "longnet", **QUIET)
    make_adapter(source, tmp_path / "adapter")
    command = [str(tmp_path / "adapter"), str(tmp_path / "moved"), "--adapter", str(tmp_path / "longnet"), "--quiet"]
    assert main(command) == 0
    assert main(command) == 1
    assert main([*command, "--overwrite"]) == 0
    (tmp_path / "moved" / "notes.txt").write_text("precious")
    assert main([*command, "--overwrite"]) == 1
    assert (tmp_path / "moved" / "notes.txt").read_text() == "precious"


def interrupted_upload(folder, repo_id, message):
    raise KeyboardInterrupt


def test_an_interrupted_upload_of_a_moved_adapter_says_how_to_go_on(source, tmp_path, capsys, monkeypatch):
    convert_checkpoint(source, tmp_path / "longnet", verify=False, **QUIET)
    make_adapter(source, tmp_path / "adapter")
    capsys.readouterr()
    moved, options = tmp_path / "moved", ["--adapter", str(tmp_path / "longnet"), "--quiet", "--push-to-hub", "me/x"]
    monkeypatch.setattr("conversion.adapters.push_folder", interrupted_upload)
    assert main([str(tmp_path / "adapter"), str(moved), *options]) == 1
    assert capsys.readouterr().err == (
        f"longnet-convert: error: interrupted; {moved} is finished, but its upload to me/x is not; upload it with: "
        f"hf upload --private me/x {moved} .\n"
    )
    assert (moved / "adapter_model.safetensors").exists()


def rename_tensor(folder: Path, old: str, new: str) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file({name.replace(old, new): x for name, x in tensors.items()}, folder / "adapter_model.safetensors")


def retarget(folder: Path, *modules: str) -> None:
    edit_json(folder / "adapter_config.json", target_modules=list(modules))


def drop_first_layer(folder: Path) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    kept = {name: x for name, x in tensors.items() if ".layers.0." not in name}
    save_file(kept, folder / "adapter_model.safetensors")


REFUSED_ADAPTERS = {
    "other module": (lambda x: rename_tensor(x, "self_attn.q_proj", "self_attn.qkv_proj"),
                     "self_attn.qkv_proj.lora_A.weight, for which LongNetForCausalLM has no module"),
    "other layer": (lambda x: rename_tensor(x, "layers.1.", "layers.7."), "layers.7.mlp.down_proj.lora_A.weight"),
    "not peft's names": (lambda x: rename_tensor(x, "base_model.model.", ""), "for which LongNetForCausalLM has no"),
    "other width": (lambda x: rename_tensor(x, "mlp.down_proj", "mlp.up_proj") or None,
                    "mlp.up_proj of LongNetForCausalLM needs"),
    "no weights": (lambda x: (x / "adapter_model.safetensors").rename(x / "adapter_model.bin"),
                   "adapter_model.safetensors is missing"),
    "a tensor that peft would not load": (lambda x: retarget(x, "q_proj"),
                                          "peft would not load base_model.model.model.layers.0.mlp.down_proj.lora_A"),
    "a tensor that peft would look for": (drop_first_layer, "peft would look for base_model.model.model.layers.0."),
    "a module that is not there": (lambda x: retarget(x, "c_attn"), "peft cannot put the moved adapter into LongNetFor"),
    "no adapter": (lambda x: (x / "adapter_config.json").unlink(), "adapter_config.json is missing"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED_ADAPTERS)
def test_an_adapter_that_does_not_fit_is_refused(source, tmp_path, case):
    spoil, message = REFUSED_ADAPTERS[case]
    convert_checkpoint(source, tmp_path / "longnet", verify=False, **QUIET)
    targets = ["down_proj"] if case == "other width" else "all-linear"
    make_adapter(source, tmp_path / "adapter", target_modules=targets)
    spoil(tmp_path / "adapter")
    with pytest.raises(ValueError) as refusal:
        convert_adapter(tmp_path / "adapter", tmp_path / "moved", tmp_path / "longnet", **QUIET)
    assert message in str(refusal.value)
    assert not (tmp_path / "moved").exists()


def test_a_card_that_is_no_unicode_is_copied_byte_for_byte(source, tmp_path):
    convert_checkpoint(source, tmp_path / "longnet", verify=False, **QUIET)
    make_adapter(source, tmp_path / "adapter")
    (tmp_path / "adapter" / "README.md").write_bytes("Für Prosa\r\n".encode("latin-1"))
    convert_adapter(tmp_path / "adapter", tmp_path / "moved", tmp_path / "longnet", **QUIET)
    assert (tmp_path / "moved" / "README.md").read_bytes() == b"F\xfcr Prosa\r\n"


def test_moving_an_adapter_without_peft_says_what_to_install(source, tmp_path, monkeypatch):
    convert_checkpoint(source, tmp_path / "longnet", verify=False, **QUIET)
    make_adapter(source, tmp_path / "adapter")
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ValueError, match="with the help of peft; install it: pip install peft"):
        convert_adapter(tmp_path / "adapter", tmp_path / "moved", tmp_path / "longnet", **QUIET)
    assert not (tmp_path / "moved").exists()


# The command


def test_the_command_goes_back_and_says_so(source, tmp_path, capsys):
    convert_checkpoint(source, tmp_path / "longnet", verify=False, **QUIET)
    arguments = [str(tmp_path / "longnet"), str(tmp_path / "dense"), "--to-dense"]
    assert main([*arguments, "--dry-run"]) == 0
    assert "target     LlamaForCausalLM, ordinary attention" in capsys.readouterr().out.splitlines()
    assert not (tmp_path / "dense").exists()
    assert main(arguments) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[-1] == f"wrote      {tmp_path / 'dense'}"
    assert printed[-2].startswith("verified   logits differ by at most")
    report = json.loads((tmp_path / "dense" / "conversion_report.json").read_text())
    assert (
        report["command"]
        == f"longnet-convert {tmp_path / 'longnet'} {tmp_path / 'dense'} --max-shard-size 5GB --verify-tokens 4096 --to-dense"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--to-dense", "--preset", "paper"], "--preset does not go with this kind of conversion"),
        (["--to-dense", "--adapter", "x"], "--adapter does not go with this kind of conversion"),
        (["--adapter", "x", "--dtype", "float32"], "--dtype does not go with this kind of conversion"),
        (["--adapter", "x", "--dry-run"], "--dry-run does not go with --adapter"),
    ],
)
def test_options_of_another_conversion_are_refused(source, tmp_path, capsys, options, message):
    capsys.readouterr()
    assert main([str(source), str(tmp_path / "target"), *options]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
