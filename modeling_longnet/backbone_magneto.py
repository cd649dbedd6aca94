"""The backbone of the LongNet paper: MAGNETO (Wang et al., "Foundation Transformers", arXiv 2210.06423).

It differs from Llama's in its norms (LayerNorm, and with Sub-LN a second one inside each sublayer), in biases, in a
feed-forward of two layers without gate, and in how it starts. Modules that do what Llama's do bear their names.
"""

import math

from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer

from .attention_longnet import LongNetAttention
from .backbone_llama import LongNetDecoderLayer
from .configuration_longnet import LongNetConfig


class MagnetoAttention(LongNetAttention):
    """The attention block, with Sub-LN between the heads' outputs and their projection."""

    def __init__(self, config: LongNetConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.inner_norm = _inner_norm(config, self.o_proj.in_features)
        for linear in (self.q_proj, self.k_proj):
            _start(linear, 1.0)
        for linear in (self.v_proj, self.o_proj):
            _start(linear, _gain(config))

    def project(self, heads: Tensor) -> Tensor:
        """Normalise the outputs of all heads together and mix them, ``[B, T, H * D]`` to ``[B, T, hidden_size]``."""
        return super().project(self.inner_norm(heads))


class MagnetoFeedForward(nn.Module):
    """Two linear layers around an activation, with Sub-LN before the second."""

    def __init__(self, config: LongNetConfig):
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.act_fn = ACT2FN[config.hidden_act]
        self.inner_norm = _inner_norm(config, config.intermediate_size)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)
        for linear in (self.up_proj, self.down_proj):
            _start(linear, _gain(config))

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Map ``[B, T, hidden_size]`` to the same shape."""
        return self.down_proj(self.inner_norm(self.act_fn(self.up_proj(hidden_states))))


class MagnetoDecoderLayer(LongNetDecoderLayer):
    """The decoder layer: Llama's order of norms, sublayers and residuals, with MAGNETO's modules."""

    def __init__(self, config: LongNetConfig, layer_idx: int):
        GradientCheckpointingLayer.__init__(self)  # not super(): it would build Llama's modules first
        self.hidden_size = config.hidden_size
        self.self_attn = MagnetoAttention(config, layer_idx)
        self.mlp = MagnetoFeedForward(config)
        self.input_layernorm = self.build_norm(config)
        self.post_attention_layernorm = self.build_norm(config)

    @staticmethod
    def build_norm(config: LongNetConfig) -> nn.Module:
        """Build a norm of the residual stream."""
        return nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)


class ScaledEmbedding(nn.Embedding):
    """Token embeddings times the square root of their width."""

    @property
    def embed_scale(self) -> float:
        """The factor; PEFT looks for it under this name."""
        return math.sqrt(self.embedding_dim)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Look up ``[B, T]`` ids: ``[B, T, hidden_size]``."""
        return super().forward(input_ids) * self.embed_scale


def _inner_norm(config: LongNetConfig, width: int) -> nn.Module:
    return nn.LayerNorm(width, eps=config.layer_norm_eps) if config.sub_layernorm else nn.Identity()


def _gain(config: LongNetConfig) -> float:
    """Return how much larger values, outputs and feed-forward start where Sub-LN bears it (MAGNETO's Figure 2)."""
    return math.sqrt(math.log(2 * config.num_hidden_layers)) if config.sub_layernorm else 1.0


def _start(linear: nn.Linear, gain: float) -> None:
    """Let a layer's weight start with Xavier's normal distribution; ``_init_weights`` reads the attribute."""
    linear.initial_std = gain * math.sqrt(2 / (linear.in_features + linear.out_features))
