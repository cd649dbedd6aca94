"""What out-of-tree models silently get wrong in transformers, and that these do not: each trap names its test.

``TRAPS`` lists them all; most have their test beside the code that avoids them, the others below.
"""

import ast
import inspect
import json
import sys
from pathlib import Path
from types import ModuleType
from unittest.mock import patch

import pytest
import torch
from tiny_models import left_padding, random_tokens, tiny_config, tiny_model
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM, TrainingArguments
from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING, STATIC_LAYER_TYPE_MAPPING

from modeling_longnet import (
    LongNetCache,
    LongNetConfig,
    LongNetForCausalLM,
    LongNetForQuestionAnswering,
    LongNetForSequenceClassification,
    LongNetForTokenClassification,
    LongNetModel,
    LongNetTrainer,
    apply_liger_kernel_to_longnet,
)


HERE = Path(__file__).parent
EVERY_CLASS = (
    LongNetModel,
    LongNetForCausalLM,
    LongNetForSequenceClassification,
    LongNetForTokenClassification,
    LongNetForQuestionAnswering,
)

# The trap in one line, and the tests that would fail in it.
TRAPS = {
    "an attention name without a mask function drops the padding mask": (
        "test_modeling.py::test_padding_on_either_side_changes_nothing",
        "test_retrofit.py::test_padded_rows_equal_the_rows_alone",
    ),
    "packed documents leak into one another where a cache exists": (
        "test_modeling.py::test_packed_documents_never_see_each_other",
        "test_retrofit.py::test_packed_documents_equal_the_documents_alone",
    ),
    "buffers are uninitialised after from_pretrained": ("test_traps.py::test_loading_leaves_no_tensor_uninitialised",),
    "label smoothing does not shift the labels of an unknown class": (
        "test_trainer.py::test_label_smoothing_shifts_the_labels",
        "test_training.py::test_label_smoothing_is_the_same_in_both_trainers",
        "test_training.py::test_every_head_trains_and_evaluates_on_smoothed_labels_as_with_the_stock_trainer",
        "test_remote_code.py::test_a_model_that_came_with_its_code_trains_on_shifted_labels_and_tells_peft_its_modules",
    ),
    "a configuration read from a Llama stays model_type llama in memory": (
        "test_traps.py::test_a_llamas_configuration_becomes_longnets_in_memory_too",
    ),
    "misspelt fields become attributes, and edits are not validated": (
        "test_configuration.py::test_bad_values_raise_with_the_numbers_and_the_fix",
        "test_configuration.py::test_a_misspelt_field_in_a_saved_config_raises",
        "test_configuration.py::test_a_config_edited_into_nonsense_makes_no_model",
        "test_traps.py::test_fields_changed_on_loading_are_checked_before_there_is_a_model",
    ),
    "layer_types makes caches and context parallelism choose by its names": (
        "test_traps.py::test_the_configuration_declares_no_layer_types",
    ),
    "the stock Trainer's context parallelism trains on permuted shards": (
        "test_modeling.py::test_reordering_context_parallelism_is_refused",
    ),
    "Accelerate's context parallelism wipes the padding mask": (
        "test_modeling.py::test_reordering_context_parallelism_is_refused",
    ),
    "code that loads from a folder does not load from the Hub": (
        "test_remote_code.py::test_a_saved_checkpoint_runs_where_the_package_is_not_installed",
        "test_hub.py::test_a_pushed_checkpoint_loads_by_id_and_revision_where_the_package_is_not_installed",
    ),
    "a re-saved checkpoint names code that it does not carry": (
        "test_remote_code.py::test_a_saved_checkpoint_runs_where_the_package_is_not_installed",
        "test_remote_code.py::test_every_class_saves_an_auto_map_for_all_of_them",
    ),
    "transformers' own heads build their base through AutoModel, which remote code cannot": (
        "test_remote_code.py::test_a_saved_checkpoint_runs_where_the_package_is_not_installed",
    ),
    "a registered renaming of weights renames them back on saving": (
        "test_traps.py::test_saved_weights_have_the_models_own_names",
    ),
    "continuous batching returns wrong and truncated outputs": (
        "test_modeling.py::test_continuous_batching_is_refused",
    ),
    "the attention implementation is not saved, so a retrofit by name is lost": (
        "test_retrofit.py::test_saving_saves_the_ordinary_model",
        "test_traps.py::test_the_pattern_is_saved_whatever_the_attention_implementation",
    ),
    "use_liger_kernel does nothing for an unknown model_type": (
        "test_traps.py::test_the_trainer_tells_liger_of_this_model_type_or_says_that_liger_is_missing",
    ),
    "a cache layer class registered by name is replaced by a checkpoint's copy": (
        "test_traps.py::test_cache_layers_are_registered_under_no_name",
    ),
    "set_attn_implementation only warns where the source lacks a certain line": (
        "test_attention_choice.py::test_setting_an_implementation_takes_effect_at_once",
    ),
    "a right-padded prompt gives its continuation other positions": (
        "test_traps.py::test_a_right_padded_prompt_continues_where_its_text_ends",
        "test_cache.py::test_right_padding_inside_chunks_takes_no_position",
    ),
    "a cache_position argument is still fed, with a deprecation warning": (
        "test_traps.py::test_no_forward_takes_cache_position",
    ),
}


@pytest.mark.parametrize("trap", TRAPS)
def test_every_trap_has_a_test_that_exists(trap):
    assert TRAPS[trap]
    for place in TRAPS[trap]:
        file, name = place.split("::")
        functions = [node.name for node in ast.parse((HERE / file).read_text()).body if hasattr(node, "name")]
        assert name in functions, place


@pytest.mark.parametrize("fields", [{}, {"backbone": "magneto"}, {"qk_norm": True}], ids=["llama", "magneto", "qwen3"])
@pytest.mark.parametrize("model_class", EVERY_CLASS)
def test_loading_leaves_no_tensor_uninitialised(model_class, fields, tmp_path):
    model = tiny_model(model_class=model_class, **fields).float()
    model.save_pretrained(tmp_path)
    loaded = model_class.from_pretrained(tmp_path)
    for kind in ("named_buffers", "named_parameters"):
        expected = dict(getattr(model, kind)())
        for name, x in getattr(loaded, kind)():
            torch.testing.assert_close(x, expected.pop(name), rtol=0, atol=0, msg=lambda m, n=name: f"{n}: {m}")
        assert not expected
    for name, module in loaded.named_modules():
        for attribute, value in vars(module).items():  # tensors that are neither stay on the meta device
            assert not isinstance(value, torch.Tensor), f"{name}.{attribute}"


def llama_folder(folder: Path) -> Path:
    fields = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    LlamaForCausalLM(LlamaConfig(**fields, num_attention_heads=4, num_key_value_heads=2)).save_pretrained(folder)
    return folder


def test_a_llamas_configuration_becomes_longnets_in_memory_too(tmp_path):
    folder = llama_folder(tmp_path)
    config = LongNetConfig.from_pretrained(folder)
    model = LongNetForCausalLM.from_pretrained(folder)
    for found in (config, model.config):
        assert found.model_type == "longnet"
        assert found.to_dict()["model_type"] == "longnet"
        assert "LlamaForCausalLM" not in (found.architectures or [])


@pytest.mark.parametrize("load", [LongNetConfig.from_pretrained, AutoConfig.from_pretrained])
def test_fields_changed_on_loading_are_checked_before_there_is_a_model(load, tmp_path):
    tiny_config().save_pretrained(tmp_path)
    with pytest.raises(Exception, match="segment_lengths has 1 entries .* dilation_rates has 3"):
        LongNetForCausalLM(load(tmp_path, segment_lengths=[16]))
    config = load(tmp_path, segment_lengths=[16], dilation_rates=[2])
    assert LongNetForCausalLM(config).config.pattern.branches == ((16, 2),)


def test_the_configuration_declares_no_layer_types():
    assert not hasattr(LongNetConfig(), "layer_types")
    assert "layer_types" not in LongNetConfig().to_dict()


def test_saved_weights_have_the_models_own_names(tmp_path):
    from safetensors import safe_open

    model = tiny_model()
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert set(file.keys()) == set(model.state_dict())
    assert [path.name for path in tmp_path.glob("*") if path.suffix in (".bin", ".pt", ".pth", ".pkl")] == []


@pytest.mark.parametrize("implementation", ["sdpa", "eager", "longnet_torch"])
def test_the_pattern_is_saved_whatever_the_attention_implementation(implementation, tmp_path):
    model, tokens = tiny_model("retrofit", attn_implementation=implementation), random_tokens(1, 60)
    model.save_pretrained(tmp_path)
    assert "attn_implementation" not in (tmp_path / "config.json").read_text()
    loaded = LongNetForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert loaded.config.pattern == model.config.pattern
    with torch.no_grad():
        torch.testing.assert_close(loaded(tokens).logits, model(tokens).logits, rtol=1e-6, atol=1e-6)


def test_the_trainer_tells_liger_of_this_model_type_or_says_that_liger_is_missing(tmp_path):
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    arguments.use_liger_kernel = True  # transformers itself asks for the package first
    functions = {}
    stand_in = ModuleType("liger_kernel.transformers.monkey_patch")
    stand_in.MODEL_TYPE_TO_APPLY_LIGER_FN = functions
    hidden = patch.dict(sys.modules, {"liger_kernel": None, stand_in.__name__: None})
    with hidden, pytest.raises(ImportError, match="use_liger_kernel=True needs liger-kernel"):
        LongNetTrainer(tiny_model(), arguments)
    parents = {name: ModuleType(name) for name in ("liger_kernel", "liger_kernel.transformers")}
    with patch.dict(sys.modules, parents | {stand_in.__name__: stand_in}):
        LongNetTrainer(tiny_model(), arguments)
    assert functions == {"longnet": apply_liger_kernel_to_longnet}


def test_cache_layers_are_registered_under_no_name():
    registered = {*DYNAMIC_LAYER_TYPE_MAPPING.values(), *STATIC_LAYER_TYPE_MAPPING.values()}
    layers = LongNetCache(tiny_config()).layers
    assert layers and not {type(layer) for layer in layers} & registered
    assert not any("longnet" in name.lower() for name in [*DYNAMIC_LAYER_TYPE_MAPPING, *STATIC_LAYER_TYPE_MAPPING])


def test_a_right_padded_prompt_continues_where_its_text_ends():
    model, tokens = tiny_model("retrofit"), random_tokens(2, 30)
    mask = torch.ones(2, 30, dtype=torch.long)
    mask[1, 12:20] = 0  # the second prompt has 12 tokens, then 8 columns of padding, then what was generated
    with torch.no_grad():
        alone = model(torch.cat([tokens[1:, :12], tokens[1:, 20:]], dim=1)).logits[:, 12:]
        cache = model(tokens[:, :20], attention_mask=mask[:, :20], use_cache=True).past_key_values
        for column in range(20, 30):
            step = model(
                tokens[:, column : column + 1], attention_mask=mask[:, : column + 1], past_key_values=cache
            ).logits
            torch.testing.assert_close(step[1], alone[0, column - 20 : column - 19], rtol=1e-6, atol=1e-6)


def test_generation_from_a_left_padded_prompt_asks_for_no_position():
    model, tokens = tiny_model("paper"), random_tokens(2, 20)
    mask = left_padding(0, 7, length=20)
    batch = model.generate(tokens, attention_mask=mask, max_new_tokens=8, do_sample=False, eos_token_id=None)
    alone = model.generate(tokens[1:, 7:], max_new_tokens=8, do_sample=False, eos_token_id=None)
    assert batch[1, 20:].tolist() == alone[0, 13:].tolist()


@pytest.mark.parametrize("model_class", EVERY_CLASS)
def test_no_forward_takes_cache_position(model_class):
    assert "cache_position" not in inspect.signature(model_class.forward).parameters


def test_a_saved_configuration_names_no_place_of_this_machine(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    assert str(tmp_path) not in json.dumps(json.loads((tmp_path / "config.json").read_text()))
