"""The attention block around ``dilated_attention``, and the names that select a backend."""

import torch
from torch import Tensor, nn
from transformers.modeling_utils import AttentionInterface
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaRMSNorm,
)

from .cache_layer import LongNetCacheLayer
from .cache_longnet import LongNetCache
from .cached_attention import CachedKeys, cached_attention
from .configuration_longnet import LongNetConfig
from .dilated_attention import dilated_attention
from .dilated_attention_eager import eager_attention
from .rotary_longnet import rotate_heads
from .sequence_cache import hold_reachable_keys
from .sequence_parallel import sequence_parallel_attention
from .token_layout import TokenLayout, pack, unpack, unpack_weights
from .xpos_decay import BLOCK, XPosDecay


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
        if layout.sequence is not None:
            weights = None
            out, _ = sequence_parallel_attention(
                query, key, value, pattern, layout.sequence, is_causal=module.is_causal, scale=scaling,
                dropout=dropout, backend=backend,
            )  # fmt: skip
        elif backend == "eager":  # the only one that has weights to show
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
ATTENTION_NAMES = ("sdpa", "eager", "longnet_torch", "longnet_triton")


class LongNetAttention(LlamaAttention):
    """Llama's attention block around ``dilated_attention``, with optional q/k norms and a bias of ``o_proj``'s own."""

    rotate_heads = staticmethod(rotate_heads)  # Liger's kernel may take its place

    def __init__(self, config: LongNetConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        if config.attention_output_bias is not None and config.attention_output_bias != config.attention_bias:
            self.o_proj = nn.Linear(
                self.o_proj.in_features, self.o_proj.out_features, bias=config.attention_output_bias
            )
        if config.qk_norm:
            self.q_norm = LlamaRMSNorm(self.head_dim, eps=config.rms_norm_eps)
            self.k_norm = LlamaRMSNorm(self.head_dim, eps=config.rms_norm_eps)

    @property
    def rotates(self) -> bool:
        """Whether this layer knows positions."""
        return self.layer_idx not in self.config.layers_without_rope

    @property
    def decay(self) -> XPosDecay | None:
        """The decay of this layer's scores, if any."""
        return XPosDecay(self.head_dim, self.config.xpos_scale_base) if self.config.xpos and self.rotates else None

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        layout: TokenLayout,
        past_key_values: LongNetCache | None = None,
        **kwargs,
    ) -> tuple[Tensor, Tensor | None]:
        if kwargs.get("is_causal") is not None and layout.sequence is None:  # Accelerate's context parallelism sets it
            raise ValueError(
                "the stock Trainer's context parallelism (cp_size > 1) reorders the sequence, which dilated attention "
                "cannot follow; train with LongNetTrainer, or with cp_size=1"
            )
        batch, length, _ = hidden_states.shape
        query = self.q_proj(hidden_states).unflatten(-1, (-1, self.head_dim))
        key = self.k_proj(hidden_states).unflatten(-1, (-1, self.head_dim))
        value = self.v_proj(hidden_states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # [B, G, T, D]
        if self.config.qk_norm:
            query, key = self.q_norm(query), self.k_norm(key)
        query, key = query.transpose(1, 2), key.transpose(1, 2)  # [B, H, T, D], [B, G, T, D]
        if self.rotates:
            query, key = self.rotate_heads(query, key, *position_embeddings)
        dropout = self.attention_dropout if self.training else 0.0

        continues = False
        if past_key_values is not None and layout.sequence is not None:
            positions = layout.positions_by_row(batch, length)
            hold_reachable_keys(past_key_values.layers[self.layer_idx], key, value, positions, layout.sequence.group)
        elif past_key_values is not None:
            cache = past_key_values.layers[self.layer_idx]
            # A single token is always served from the slots: one graph, whatever came before.
            continues = query.shape[2] == 1 or (query.shape[2] > 0 and not cache.is_empty)
            keys, values = past_key_values.update(key, value, self.layer_idx, positions=layout.positions)
            if length == 1 and query.requires_grad:  # its gradient needs what the next token may overwrite
                keys, values = (x if x.requires_grad else x.clone() for x in (keys, values))
        if continues:
            out, weights = self._attend_cached(query, keys, values, cache, layout.positions, dropout)
        else:
            query, key, value = (pack(x, layout) for x in (query, key, value))
            out, weights = self._attend_all(query, key, value, layout, dropout)
            out = unpack(out, layout, batch, length)
            weights = None if weights is None else unpack_weights(weights, layout, batch, length)
        return self.project(out.flatten(2)), weights

    def project(self, heads: Tensor) -> Tensor:
        """Mix the outputs of all heads, ``[B, T, H * D]`` to ``[B, T, hidden_size]``."""
        return self.o_proj(heads)

    def _attend_all(
        self, query: Tensor, key: Tensor, value: Tensor, layout: TokenLayout, dropout: float
    ) -> tuple[Tensor, Tensor | None]:
        """Attend among the tokens of the layout; the result is ``[B, T, H, D]``."""
        if self.decay is not None:
            pattern = self.config.layer_pattern(self.layer_idx)
            span = self.decay.shared_span(pattern, layout.longest_document(), query.dtype)
            if span is None and layout.sequence is not None:
                raise ValueError(
                    f"xPos can be computed over {self.decay.longest_span(query.dtype)} tokens at once in "
                    f"{str(query.dtype).removeprefix('torch.')}, and a sequence-parallel group holds up to "
                    f"{layout.longest_document()}; use segments whose common multiple is not longer, or one rank"
                )
            if span is None:
                return self._attend_in_blocks(query, key, value, layout, dropout)
            query, key = self.decay.scale_aligned(query, key, layout.positions, span)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        return attend(self, query, key, value, None, self.scaling, dropout, layout=layout)

    def _attend_in_blocks(
        self, query: Tensor, key: Tensor, value: Tensor, layout: TokenLayout, dropout: float
    ) -> tuple[Tensor, None]:
        """Attend as decoding does, a block of queries at a time: no reference of xPos serves all of them."""
        if layout.cu_seqlens is not None:
            raise ValueError(
                f"{query.shape[2]} packed tokens are more than the {self.decay.longest_span(query.dtype)} over which "
                f"xPos can be computed at once in {str(query.dtype).removeprefix('torch.')}; pass one document per row"
            )
        cache, outs = LongNetCacheLayer(self.config.layer_pattern(self.layer_idx)), []
        for first in range(0, query.shape[2], BLOCK):
            block = slice(first, first + BLOCK)
            positions = layout.positions[:, block]
            keys, values = cache.update(key[:, :, block], value[:, :, block], positions=positions)
            outs.append(self._attend_cached(query[:, :, block], keys, values, cache, positions, dropout)[0])
        return torch.cat(outs, dim=1), None

    def _attend_cached(
        self, query: Tensor, keys: Tensor, values: Tensor, cache: LongNetCacheLayer, positions: Tensor, dropout: float
    ) -> tuple[Tensor, Tensor | None]:
        """Attend from new tokens at these positions to what the cache holds; the result is ``[B, T, H, D]``."""
        if self.decay is not None:
            block = min(BLOCK, self.decay.longest_span(query.dtype))
            if query.shape[2] > block:
                blocks = zip(query.split(block, dim=2), positions.split(block, dim=1))
                outs, weights = zip(*(self._attend_cached(q, keys, values, cache, p, dropout) for q, p in blocks))
                return torch.cat(outs, dim=1), None if weights[0] is None else torch.cat(weights, dim=2)
            query, keys = self.decay.scale_cached(query, keys, positions, cache.attended_positions)
        cached = CachedKeys(keys, values, cache.attended_positions, cache.attended_branches)
        out, weights = cached_attention(
            query, cached, cache.pattern, query_positions=positions, scale=self.scaling, dropout=dropout,
            return_weights=self.config._attn_implementation == "eager", once=cache.once,
        )  # fmt: skip
        return out.transpose(1, 2), weights
