"""LongNet for Transformers: dilated attention, the models built on it, and their bounded KV cache.

Importing this package registers the models with transformers' Auto classes; ``registered_names`` enters them into the
tables of other libraries. Nothing in here is shipped with saved checkpoints but the flat modules that the models need.
"""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

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
    AutoConfig.register(LongNetConfig.model_type, LongNetConfig)
    LongNetConfig.register_for_auto_class()
    for auto, model in (
        (AutoModel, LongNetModel),
        (AutoModelForCausalLM, LongNetForCausalLM),
        (AutoModelForSequenceClassification, LongNetForSequenceClassification),
        (AutoModelForTokenClassification, LongNetForTokenClassification),
        (AutoModelForQuestionAnswering, LongNetForQuestionAnswering),
    ):
        auto.register(LongNetConfig, model)
        model.register_for_auto_class(auto.__name__)


_register()

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
