"""Llama's attention block around ``dilated_attention``, its rotary embedding, and the names that select a backend."""

import torch
from torch import Tensor, nn
from transformers.modeling_rope_utils import dynamic_rope_update
from transformers.modeling_utils import AttentionInterface
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
)

from .cache_longnet import LongNetCache
from .cached_attention import cached_attention
from .configuration_longnet import LongNetConfig
from .dilated_attention import dilated_attention
from .dilated_attention_eager import eager_attention
from .token_layout import TokenLayout, pack, unpack


def _backend_forward(backend: str):
    """Make the attention function that ``attn_implementation`` selects."""

    def attention_forward(
        module: "LongNetAttention",
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float,
        dropout: float = 0.0,
        *,
        layout: TokenLayout,
        **kwargs,
    ) -> tuple[Tensor, Tensor | None]:
        pattern = module.config.layer_pattern(module.layer_idx)
        if backend == "eager":  # the only one that has weights to show
            out, _, weights = eager_attention(
                query, key, value, pattern, positions=layout.positions, documents=layout.documents,
                is_causal=module.is_causal, scale=scaling, dropout=dropout,
            )  # fmt: skip
        else:
            weights = None
            out = dilated_attention(
                query, key, value, pattern, is_causal=module.is_causal, attention_mask=layout.padding_mask,
                cu_seqlens=layout.cu_seqlens, scale=scaling, dropout=dropout, backend=backend,
            )  # fmt: skip
        return out.transpose(1, 2), weights

    return attention_forward


eager_attention_forward = _backend_forward("eager")

# "sdpa" is what transformers asks for by default; here, and for these models only, it means the fastest backend.
ALL_ATTENTION_FUNCTIONS = AttentionInterface()
ALL_ATTENTION_FUNCTIONS["sdpa"] = _backend_forward("auto")
AttentionInterface.register("longnet_torch", _backend_forward("torch"))
AttentionInterface.register("longnet_triton", _backend_forward("triton"))


class LongNetRotaryEmbedding(LlamaRotaryEmbedding):
    """Llama's rotary embedding, all rope types, with angles that stay exact at any position.

    Llama multiplies position and frequency in float32: at position 2^24 the angle is off by a radian, and beyond it
    neighbours share one. Here the product is taken and reduced modulo 2 pi in float64. Inside the first segment, where
    a converted model promises its source's logits, the source's float32 product stays, bit for bit.
    """

    @torch.no_grad()
    @dynamic_rope_update
    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        positions = position_ids[..., None]  # [B, T, 1]
        inv_freq = self.inv_freq.to(device=x.device, dtype=torch.float)
        as_source = positions.float() * inv_freq  # [B, T, D/2]
        if x.device.type == "mps":  # has no float64
            exact = (positions.cpu().double() * inv_freq.cpu().double()).remainder(2 * torch.pi).float().to(x.device)
        else:
            exact = (positions.double() * inv_freq.double()).remainder(2 * torch.pi).float()
        angles = torch.where(positions < self.config.segment_lengths[0], as_source, exact)
        angles = torch.cat((angles, angles), dim=-1)
        cos, sin = angles.cos() * self.attention_scaling, angles.sin() * self.attention_scaling
        return cos.to(x.dtype), sin.to(x.dtype)


class LongNetAttention(LlamaAttention):
    """Llama's attention block around ``dilated_attention``, with optional q/k norms and a bias of ``o_proj``'s own."""

    def __init__(self, config: LongNetConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        if config.attention_output_bias is not None and config.attention_output_bias != config.attention_bias:
            self.o_proj = nn.Linear(
                self.o_proj.in_features, self.o_proj.out_features, bias=config.attention_output_bias
            )
        if config.qk_norm:
            self.q_norm = LlamaRMSNorm(self.head_dim, eps=config.rms_norm_eps)
            self.k_norm = LlamaRMSNorm(self.head_dim, eps=config.rms_norm_eps)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        layout: TokenLayout,
        past_key_values: LongNetCache | None = None,
        **kwargs,
    ) -> tuple[Tensor, Tensor | None]:
        if kwargs.get("is_causal") is not None:  # Accelerate's context parallelism sets it, on a permuted sequence
            raise ValueError(
                "this context parallelism reorders the sequence, which dilated attention cannot follow; train with "
                "cp_size=1"
            )
        batch, length, _ = hidden_states.shape
        query = self.q_proj(hidden_states).view(batch, length, -1, self.head_dim)
        key = self.k_proj(hidden_states).view(batch, length, -1, self.head_dim)
        value = self.v_proj(hidden_states).view(batch, length, -1, self.head_dim).transpose(1, 2)  # [B, G, T, D]
        if self.config.qk_norm:
            query, key = self.q_norm(query), self.k_norm(key)
        query, key = query.transpose(1, 2), key.transpose(1, 2)  # [B, H, T, D], [B, G, T, D]
        if self.layer_idx not in self.config.layers_without_rope:
            query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        dropout = self.attention_dropout if self.training else 0.0

        if past_key_values is not None:
            cache = past_key_values.layers[self.layer_idx]
            continues = cache.get_seq_length() > 0
            keys, values = past_key_values.update(key, value, self.layer_idx, positions=layout.positions)
        if past_key_values is not None and continues:
            out, weights = cached_attention(
                query, keys, values, cache.pattern, query_positions=layout.positions,
                key_positions=cache.attended_positions, scale=self.scaling, dropout=dropout,
                return_weights=self.config._attn_implementation == "eager",
            )  # fmt: skip
            out = out.transpose(1, 2)  # [B, T, H, D]
        else:
            attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
            query, key, value = (pack(x, layout) for x in (query, key, value))
            out, weights = attend(self, query, key, value, None, self.scaling, dropout, layout=layout)
            out = unpack(out, layout, batch, length)
        return self.o_proj(out.reshape(batch, length, -1)), weights
