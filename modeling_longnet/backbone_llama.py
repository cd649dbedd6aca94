"""Llama's decoder layer with dilated attention; parameter names equal Llama's."""

from torch import nn
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm

from .attention_longnet import LongNetAttention
from .configuration_longnet import LongNetConfig


class LongNetDecoderLayer(LlamaDecoderLayer):
    """Llama's decoder layer with dilated attention."""

    def __init__(self, config: LongNetConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.self_attn = LongNetAttention(config, layer_idx)

    @staticmethod
    def build_norm(config: LongNetConfig) -> nn.Module:
        """Build a norm of the residual stream."""
        return LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
