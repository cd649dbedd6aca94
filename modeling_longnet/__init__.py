"""LongNet for Transformers: dilated attention, the models built on it, and their bounded KV cache.

Importing this package registers the models with transformers' Auto classes and, where peft is installed, the default
LoRA targets. Nothing in here is shipped with saved checkpoints but the flat modules that the models need.
"""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)
from transformers.models.auto import modeling_auto

from .cache_longnet import LongNetCache
from .configuration_longnet import LongNetConfig
from .decoding_graph import DecodingGraph
from .decoding_step import DecodingStep
from .dilated_attention import dilated_attention
from .dilation_pattern import DilationPattern
from .liger_layers import apply_liger_kernel_to_longnet
from .modeling_longnet import (
    LongNetForCausalLM,
    LongNetForQuestionAnswering,
    LongNetForSequenceClassification,
    LongNetForTokenClassification,
    LongNetModel,
)
from .sequence_group import sequence_parallel
from .sequence_prefill import prefill_sequence
from .sequence_shards import gather_sequence, shard_sequence
from .token_stream import TokenStream, stream
from .trainer_longnet import LongNetTrainer


def _register() -> None:
    model_type = LongNetConfig.model_type
    AutoConfig.register(model_type, LongNetConfig)
    LongNetConfig.register_for_auto_class()
    # The name tables are what Trainer's label smoothing and pipelines look classes up in.
    for auto, model, names in (
        (AutoModel, LongNetModel, modeling_auto.MODEL_MAPPING_NAMES),
        (AutoModelForCausalLM, LongNetForCausalLM, modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
        (
            AutoModelForSequenceClassification,
            LongNetForSequenceClassification,
            modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
        ),
        (
            AutoModelForTokenClassification,
            LongNetForTokenClassification,
            modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
        ),
        (
            AutoModelForQuestionAnswering,
            LongNetForQuestionAnswering,
            modeling_auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
        ),
    ):
        auto.register(LongNetConfig, model)
        model.register_for_auto_class(auto.__name__)
        names[model_type] = model.__name__


def _register_lora_targets() -> None:
    try:
        from peft.utils import constants
    except ImportError:
        return
    constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING[LongNetConfig.model_type] = [
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
    ]


_register()
_register_lora_targets()

__all__ = [
    "DecodingGraph",
    "DecodingStep",
    "DilationPattern",
    "LongNetCache",
    "LongNetConfig",
    "LongNetForCausalLM",
    "LongNetForQuestionAnswering",
    "LongNetForSequenceClassification",
    "LongNetForTokenClassification",
    "LongNetModel",
    "LongNetTrainer",
    "TokenStream",
    "apply_liger_kernel_to_longnet",
    "dilated_attention",
    "gather_sequence",
    "prefill_sequence",
    "sequence_parallel",
    "shard_sequence",
    "stream",
]
