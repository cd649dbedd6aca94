"""LongNetConfig: defaults, round trips, and that bad values cannot pass."""

import dataclasses
import difflib
import json

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from tiny_models import random_tokens, tiny_config, tiny_model
from transformers import AutoConfig, GenerationConfig, LlamaConfig, PreTrainedConfig

from modeling_longnet import DilationPattern, LongNetConfig, LongNetForCausalLM
from modeling_longnet.dilation_pattern import PRESETS


def test_defaults_are_the_papers():
    config = LongNetConfig()
    assert config.pattern == DilationPattern.preset("paper", (2048, 4096, 8192, 16384, 32768), (1, 2, 4, 6, 12))
    assert config.model_type == "longnet"


@pytest.mark.parametrize("preset", PRESETS)
def test_pattern_survives_saving_and_loading(preset, tmp_path):
    config = tiny_config(
        preset, dense_layers=[1], rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 5e5}
    )
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is LongNetConfig
    assert loaded.pattern == config.pattern
    assert {**loaded.to_dict(), "_name_or_path": ""} == config.to_dict()
    assert json.loads((tmp_path / "config.json").read_text())["segment_lengths"] == [8, 16, 32]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"segment_lengths": [8, 16]}, "segment_lengths has 2 entries .* dilation_rates has 3"),
        ({"segment_lengths": [8, 16, 0]}, "positive integers, got 0"),
        ({"window": "slidding"}, "'segment', 'sliding', got 'slidding'"),
        ({"count_overlaps": False, "segment_lengths": [8, 16, 36]}, "16 does not divide the next one, 36"),
        ({"num_key_value_heads": 3}, "num_attention_heads 4 is not a multiple of num_key_value_heads 3"),
        ({"segment_lenghts": [8, 16, 32]}, "'segment_lenghts'; did you mean 'segment_lengths'"),
        ({"dense_layers": [0, 2]}, "dense_layers names layer 2, but the 2 layers are numbered from 0 to 1"),
        ({"local_layers": [2]}, "local_layers names layer 2"),
        ({"local_layers": [0, 1], "dense_layers": [1]}, "layer 1 is named by dense_layers and by local_layers"),
        ({"layers_without_rope": [-1]}, "layers_without_rope names layer -1"),
        ({"dense_layer": [0]}, "'dense_layer'; did you mean 'dense_layers'"),
        ({"segment_lengths": [8, 16, 2**62 + 1]}, "segment_lengths must hold at most 2.62 .* got 4611686018427387905"),
        ({"dilated_ratio": [1, 2, 4]}, "no field 'dilated_ratio'; it is dilation_rates here"),
        ({"subln": True}, "no field 'subln'; it is sub_layernorm here"),
        ({"no_scale_embedding": True}, "no field 'no_scale_embedding'; it is scale_embedding, its opposite, here"),
        ({"dilated_queries": True}, "'dilated_queries'; did you mean 'dilate_queries'"),
        ({"qknorm": True}, "'qknorm'; did you mean 'qk_norm'"),
        ({"scale_embeddings": True}, "'scale_embeddings'; did you mean 'scale_embedding'"),
        ({"trained_contxt": 5}, "'trained_contxt'; did you mean 'trained_context'"),
        ({"layer_norm_epsilom": 1e-3}, "'layer_norm_epsilom'; did you mean 'layer_norm_eps'"),
    ],
)
def test_bad_values_raise_with_the_numbers_and_the_fix(fields, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(**fields)


def test_every_field_of_longnets_own_is_known_when_misspelt():
    fields = {field.name for field in dataclasses.fields(LongNetConfig)}
    own = fields - {field.name for field in dataclasses.fields(LlamaConfig)}
    assert {"segment_lengths", "qk_norm", "xpos", "source_config"} < own and "hidden_act" not in own
    for name in own:
        with pytest.raises(ValueError, match=f"no field '{name}_'; did you mean '{name}'"):
            tiny_config(**{f"{name}_": None})


def test_no_keyword_of_transformers_passes_for_a_misspelt_field():
    fields = {field.name for field in dataclasses.fields(LongNetConfig)}
    words = {*PreTrainedConfig().to_dict(), *LlamaConfig().to_dict(), *GenerationConfig().to_dict()}
    words |= {name for name in dir(LlamaConfig()) if not name.startswith("__")}
    words |= {"rope_theta", "rope_scaling", "torch_dtype", "attn_implementation", "trust_remote_code"}
    given = words - fields  # the fields are no keywords that anything else gets to see
    assert len(given) > 100
    own = fields - {field.name for field in dataclasses.fields(LlamaConfig)}
    assert {name: near for name in given if (near := difflib.get_close_matches(name, own, cutoff=0.8))} == {}


@pytest.mark.parametrize("name", ["layer_norm_epsilon", "qk_layernorm"])
def test_fields_that_generic_code_sets_for_any_family_are_kept(name):
    assert getattr(LongNetConfig(**{name: 1.0}), name) == 1.0


def test_a_preset_is_given_as_its_rules():
    with pytest.raises(
        ValueError, match="no field 'preset'; give .* 'retrofit' as .*dilate_queries=False, window='sl"
    ):
        LongNetConfig(preset="retrofit")
    with pytest.raises(ValueError, match="preset must be one of 'paper', 'torchscale', 'retrofit', got 'dense'"):
        LongNetConfig(preset="dense")


@pytest.mark.parametrize("fields", [{"segment_lengths": "8"}, {"count_overlaps": "yes"}, {"window": 3}])
def test_wrong_types_raise(fields):
    with pytest.raises(StrictDataclassError, match=next(iter(fields))):
        tiny_config(**fields)


def test_a_misspelt_field_in_a_saved_config_raises(tmp_path):
    fields = tiny_config().to_dict()
    fields["dilation_rate"] = fields.pop("dilation_rates")
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match="did you mean 'dilation_rates'"):
        AutoConfig.from_pretrained(tmp_path)


def test_a_config_edited_into_nonsense_makes_no_model():
    config = tiny_config()
    config.segment_lengths = (8, 16)
    with pytest.raises((ValueError, StrictDataclassError), match="segment_lengths has 2 entries"):
        LongNetForCausalLM(config)


def test_editing_the_pattern_of_a_loaded_model_takes_effect():
    model, tokens = tiny_model("paper"), random_tokens(1, 40)
    with torch.no_grad():
        before = model(tokens).logits
        model.config.segment_lengths, model.config.dilation_rates = (64,), (1,)
        after = model(tokens).logits
    fresh = tiny_model("paper", segment_lengths=(64,), dilation_rates=(1,))
    torch.testing.assert_close(after, fresh(tokens).logits)
    assert (after - before).abs().max() > 0.1
