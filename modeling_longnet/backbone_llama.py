"""Llama's decoder layer with dilated attention; parameter names equal Llama's."""

from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm

from .attention_longnet import LongNetAttention
from .configuration_longnet import LongNetConfig
from .sequence_tiles import in_tiles


class LongNetDecoderLayer(LlamaDecoderLayer):
    """Llama's decoder layer with dilated attention; norms and MLP run tile by tile where the sequence is long.

    With activation checkpointing they keep nothing for the backward pass, and cost no more than checkpointing does.
    """

    def __init__(self, config: LongNetConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.self_attn = LongNetAttention(config, layer_idx)

    def forward(self, hidden_states: Tensor, **kwargs) -> Tensor:
        """Map ``[B, T, hidden_size]`` to the same shape; ``kwargs`` are the attention block's."""
        recompute = self.gradient_checkpointing and self.training
        norm = self.input_layernorm
        attended, _ = self.self_attn(in_tiles(norm, hidden_states, [norm], recompute), **kwargs)
        hidden_states = hidden_states + attended
        # Norm and MLP as one, and last: a checkpoint's recomputation then stops before them.
        modules = [self.post_attention_layernorm, self.mlp]
        return hidden_states + in_tiles(self._feed_forward, hidden_states, modules, recompute, self.mlp.down_proj)

    def _feed_forward(self, hidden_states: Tensor) -> Tensor:
        return self.mlp(self.post_attention_layernorm(hidden_states))

    @staticmethod
    def build_norm(config: LongNetConfig) -> nn.Module:
        """Build a norm of the residual stream."""
        return LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
