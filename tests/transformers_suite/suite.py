"""transformers' common tests, run on every LongNet class: `make conformance`.

Not collected with the other tests: the upstream files have to be fetched first (``upstream.py``), and every skip is
held against ``transformers_suite.md`` (``skip_list.py``).
"""

import unittest
from pathlib import Path

import pytest
import torch
from transformers import set_seed
from transformers_tests import test_fsdp_mixin, test_tensor_parallel_mixin
from transformers_tests.generation.test_utils import GenerationTesterMixin
from transformers_tests.test_configuration_common import ConfigTester
from transformers_tests.test_modeling_common import ModelTesterMixin, ids_tensor
from transformers_tests.test_training_mixin import TrainingTesterMixin

from modeling_longnet import (
    LongNetConfig,
    LongNetForCausalLM,
    LongNetForQuestionAnswering,
    LongNetForSequenceClassification,
    LongNetForTokenClassification,
    LongNetModel,
)
from modeling_longnet.dilation_pattern import PRESETS


# Upstream runs its distributed tests on a few families of its own: None means all.
test_fsdp_mixin.FSDP_DISTRIBUTED_TEST_MODEL_TYPES = None
test_tensor_parallel_mixin.TP_DISTRIBUTED_TEST_MODEL_TYPES = None
# Ranks are processes that may share cores: their number does not depend on the machine.
test_fsdp_mixin._get_available_fsdp_workers = lambda: 4


class LongNetModelTester:
    """What the upstream mixins ask about a model: a tiny configuration, and inputs for it."""

    causal_lm_class = LongNetForCausalLM
    base_model_class = LongNetModel
    sequence_classification_class = LongNetForSequenceClassification
    is_training = True
    batch_size, seq_length, num_choices = 13, 9, 4
    vocab_size, hidden_size, intermediate_size = 99, 32, 48
    num_hidden_layers, num_attention_heads, num_key_value_heads = 2, 4, 2

    def __init__(self, fields: dict):
        self.fields = fields

    def get_config(self) -> LongNetConfig:
        """Configure segments that end inside the inputs, so that every branch and the bounded cache act."""
        return LongNetConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            num_key_value_heads=self.num_key_value_heads,
            max_position_embeddings=128,
            segment_lengths=(4, 8, 16),
            dilation_rates=(1, 2, 4),
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            **self.fields,
        )

    def prepare_config_and_inputs_for_common(self):
        input_ids = ids_tensor([self.batch_size, self.seq_length], self.vocab_size)
        return self.get_config(), {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}


class CommonTests(
    ModelTesterMixin,
    GenerationTesterMixin,
    TrainingTesterMixin,
    test_fsdp_mixin.FSDPTesterMixin,
    test_tensor_parallel_mixin.TensorParallelTesterMixin,
):
    """All upstream mixins, with the bounded cache; subclasses name a configuration."""

    fields: dict = {}
    model_tester = None
    all_model_classes = (
        LongNetModel,
        LongNetForCausalLM,
        LongNetForSequenceClassification,
        LongNetForTokenClassification,
        LongNetForQuestionAnswering,
    )

    @pytest.fixture(autouse=True)
    def in_an_empty_folder(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)

    def setUp(self):
        self.model_tester = LongNetModelTester(self.fields)

    def test_config(self):
        ConfigTester(self, config_class=LongNetConfig, hidden_size=32).run_common_tests()

    @test_tensor_parallel_mixin.is_tensor_parallel_test
    def test_tp_generation_quantized(self):
        """Compare errors of logits. Upstream compares the tokens of a random model; Llama itself fails that here."""
        self._skip_if_not_supported()
        from float8_ranks import compare_with_one_process

        set_seed(42)
        LongNetForCausalLM(self.model_tester.get_config()).save_pretrained("model")
        test_tensor_parallel_mixin.run_distributed(world_size=2)(compare_with_one_process)(
            str(Path("model").absolute()), LongNetForCausalLM, 25
        )


class RetrofitTest(CommonTests, unittest.TestCase):
    fields = PRESETS["retrofit"]


class PaperTest(CommonTests, unittest.TestCase):
    fields = {**PRESETS["paper"], "backbone": "magneto"}
