"""LongNet models: Llama with dilated attention. Only what differs from ``transformers``' Llama stands here.

Parameter names equal Llama's, so a Llama checkpoint loads as it is.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
)
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.modeling_rope_utils import dynamic_rope_update
from transformers.modeling_utils import AttentionInterface
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaForCausalLM,
    LlamaModel,
    LlamaPreTrainedModel,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
)
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .cache_longnet import LongNetCache
from .cached_attention import cached_attention
from .configuration_longnet import LongNetConfig
from .dilated_attention import dilated_attention
from .dilated_attention_eager import eager_attention
from .logical_positions import positions_from_cu_seqlens, positions_from_mask


class TokenLayout(NamedTuple):
    """Where the tokens of a batch stand: computed once per forward pass, read by every layer.

    Exactly one of three kinds: whole rows (both optional fields None), padded rows (``padding_mask``), or documents
    packed into the rows (``cu_seqlens`` over the real tokens of all rows in order, ``real_tokens`` their flat indices
    or None if there is no padding).
    """

    positions: Tensor  # [B, T] logical positions, -1 for padding; [1, real tokens] if packed
    padding_mask: Tensor | None = None  # [B, T] bool
    cu_seqlens: Tensor | None = None  # [documents + 1] int32
    documents: Tensor | None = None  # [1, real tokens] document indices, if packed
    real_tokens: Tensor | None = None  # [real tokens] int64


def locate_tokens(
    shape: tuple[int, int],
    device: torch.device,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    cu_seqlens: Tensor | None,
    cache: LongNetCache | None,
) -> TokenLayout:
    """Work out the logical positions of the new tokens, and how documents and padding divide them.

    Args:
        shape: ``(B, T)`` of the new tokens.
        attention_mask: ``[B, past + T]``, nonzero = real, or None.
        position_ids: ``[B or 1, T]`` or None. Where the cache is empty, a token whose position does not follow the
            real token before it starts a new document.
        cu_seqlens: ``[documents + 1]`` starts of packed documents (B == 1), or None.
        cache: the cache in use, or None.

    Raises:
        ValueError: if the mask has a wrong shape, or packed documents meet a cache or, given by ``cu_seqlens``, padding.
    """
    batch, length = shape
    past = cache.get_seq_length() if cache is not None else 0
    if attention_mask is not None:
        if attention_mask.ndim != 2 or attention_mask.shape[0] != batch or attention_mask.shape[1] < length:
            raise ValueError(
                f"attention_mask must be [batch, past + new tokens] = {[batch, past + length]}, "
                f"got {list(attention_mask.shape)}"
            )
        attention_mask = attention_mask[:, attention_mask.shape[1] - length :] != 0
        if not torch.compiler.is_compiling() and bool(attention_mask.all()):
            attention_mask = None
    if cu_seqlens is not None and attention_mask is not None:
        raise ValueError(
            "cu_seq_lens_q and an attention_mask with padding exclude one another: leave padding out of packed documents"
        )
    if cu_seqlens is None and position_ids is not None and past == 0 and length > 1:
        cu_seqlens, real_tokens = _documents_from_position_ids(position_ids, attention_mask, shape)
    else:
        real_tokens = None
    if cu_seqlens is not None:
        if cache is not None:
            raise ValueError(
                f"{len(cu_seqlens) - 1} packed documents cannot share one KV cache; pass use_cache=False, or one "
                "document per row with an attention_mask"
            )
        tokens = batch * length if real_tokens is None else len(real_tokens)
        positions, documents = positions_from_cu_seqlens(cu_seqlens.to(device), tokens)
        return TokenLayout(positions, None, cu_seqlens, documents, real_tokens)
    if cache is not None:
        return TokenLayout(cache.next_positions(attention_mask, batch, length, device), attention_mask)
    if attention_mask is not None:
        return TokenLayout(positions_from_mask(attention_mask), attention_mask)
    return TokenLayout(torch.arange(length, device=device).expand(batch, -1))


def _documents_from_position_ids(
    position_ids: Tensor, attention_mask: Tensor | None, shape: tuple[int, int]
) -> tuple[Tensor | None, Tensor | None]:
    """Find packed documents where positions restart; ``(None, None)`` if every row is one document."""
    flat = position_ids.expand(shape).flatten()
    rows = torch.arange(shape[0], device=flat.device).repeat_interleave(shape[1])
    real_tokens = None
    if attention_mask is not None:
        real_tokens = attention_mask.flatten().nonzero().flatten()
        flat, rows = flat[real_tokens], rows[real_tokens]
    same_row = rows[1:] == rows[:-1]
    restarts = flat[1:] != flat[:-1] + 1
    if not bool((same_row & restarts).any()):
        return None, None
    starts = (~same_row | restarts).nonzero().flatten() + 1
    ends = torch.tensor([len(flat)], device=flat.device)
    return torch.cat([torch.zeros_like(ends), starts, ends]).to(torch.int32), real_tokens


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
            query, key, value = (_pack(x, layout) for x in (query, key, value))
            out, weights = attend(self, query, key, value, None, self.scaling, dropout, layout=layout)
            out = _unpack(out, layout, batch, length)
        return self.o_proj(out.reshape(batch, length, -1)), weights


def _pack(x: Tensor, layout: TokenLayout) -> Tensor:
    """Lay the real tokens of all rows out in one row, ``[B, heads, T, D]`` to ``[1, heads, tokens, D]``, if packed."""
    if layout.cu_seqlens is None or (x.shape[0] == 1 and layout.real_tokens is None):
        return x
    x = x.transpose(0, 1).flatten(1, 2)[None]
    return x if layout.real_tokens is None else x[:, :, layout.real_tokens]


def _unpack(out: Tensor, layout: TokenLayout, batch: int, length: int) -> Tensor:
    """Undo ``_pack`` on ``[1, tokens, heads, D]``; padding gets 0."""
    if layout.cu_seqlens is None:
        return out
    if layout.real_tokens is not None:
        padded = out.new_zeros(1, batch * length, *out.shape[2:])
        out = padded.index_copy(1, layout.real_tokens, out)
    return out.reshape(batch, length, *out.shape[2:])


class LongNetDecoderLayer(LlamaDecoderLayer):
    """Llama's decoder layer with dilated attention."""

    def __init__(self, config: LongNetConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.self_attn = LongNetAttention(config, layer_idx)


class LongNetPreTrainedModel(LlamaPreTrainedModel):
    """What all LongNet models share: which attention implementations exist, and how a checkpoint carries its code."""

    config: LongNetConfig
    _no_split_modules = ["LongNetDecoderLayer"]
    _supports_flash_attn = False
    _supports_flex_attn = False
    # Serving engines read this flag to replace the attention by their own full attention: they must not.
    _supports_attention_backend = False
    _can_record_outputs = {"hidden_states": LongNetDecoderLayer, "attentions": LongNetAttention}

    def __init__(self, config, *args, **kwargs):
        config.validate()  # fields edited after construction are checked here
        # Not super(): the Llama class that comes next would build its own layers first.
        LlamaPreTrainedModel.__init__(self, config, *args, **kwargs)

    def save_pretrained(self, save_directory, *args, **kwargs):
        """Save as ``transformers`` does; the checkpoint carries the code, and loads as any of the LongNet classes."""
        self.config.auto_map = dict(AUTO_MAP)
        return super().save_pretrained(save_directory, *args, **kwargs)

    def init_continuous_batching(self, *args, **kwargs):
        raise ValueError(
            "continuous batching (generate_batch, serve --continuous-batching) pages a full KV cache, which dilated "
            "attention does not have; use generate()"
        )


class LongNetModel(LongNetPreTrainedModel, LlamaModel):
    """The decoder without a head: embeddings, layers with dilated attention, final norm."""

    def __init__(self, config: LongNetConfig):
        LongNetPreTrainedModel.__init__(self, config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList([LongNetDecoderLayer(config, i) for i in range(config.num_hidden_layers)])
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LongNetRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: LongNetCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        cu_seq_lens_q: Tensor | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """Run the decoder.

        Args:
            input_ids: ``[B, T]`` token ids; or give ``inputs_embeds``.
            attention_mask: ``[B, past + T]``, nonzero = real token, padding on either side.
            position_ids: ``[B or 1, T]`` positions for the rotary embedding; logical positions if None. Without a
                cache, restarting positions mark packed documents, which never see each other.
            past_key_values: a ``LongNetCache``.
            inputs_embeds: ``[B, T, hidden_size]``.
            use_cache: whether to return a cache; packed documents return none.
            cu_seq_lens_q: ``[documents + 1]`` starts of packed documents (B == 1), as
                ``DataCollatorWithFlattening`` gives.

        Raises:
            ValueError: if inputs are missing or doubled, the mask has a wrong shape, the cache is not a
                ``LongNetCache``, or packed documents meet a cache.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if past_key_values is not None and not hasattr(past_key_values, "next_positions"):
            raise ValueError(
                f"LongNet needs a LongNetCache, got {type(past_key_values).__name__}: other caches do not know which "
                "keys the pattern reaches; leave past_key_values out to get the right one"
            )
        layout = locate_tokens(
            inputs_embeds.shape[:2],
            inputs_embeds.device,
            attention_mask,
            position_ids,
            cu_seq_lens_q,
            past_key_values,
        )
        if use_cache and past_key_values is None and layout.cu_seqlens is None:
            past_key_values = LongNetCache(self.config)
        if position_ids is None:
            position_ids = layout.positions.clamp(min=0)

        hidden_states = inputs_embeds
        position_embeddings = self.rotary_emb(hidden_states, position_ids=position_ids)
        for decoder_layer in self.layers[: self.config.num_hidden_layers]:
            hidden_states = decoder_layer(
                hidden_states,
                position_embeddings=position_embeddings,
                past_key_values=past_key_values,
                use_cache=use_cache,
                layout=layout,
                **kwargs,
            )
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values)


class LongNetForCausalLM(LongNetPreTrainedModel, LlamaForCausalLM):
    """LongNet with a language-modelling head."""

    def __init__(self, config: LongNetConfig):
        LongNetPreTrainedModel.__init__(self, config)
        self.model = LongNetModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def _prepare_cache_for_generation(
        self, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
    ):
        if model_kwargs.get("past_key_values") is None and generation_config.use_cache is not False:
            implementation = generation_config.cache_implementation
            if implementation not in (None, "dynamic", "offloaded"):
                raise ValueError(
                    f"cache_implementation={implementation!r} holds other keys than dilated attention needs; leave it "
                    'out (a bounded LongNetCache) or use "offloaded"'
                )
            cache = LongNetCache(self.config, offloading=implementation == "offloaded")
            if generation_config.is_assistant:
                cache.activate_past_recording()
            model_kwargs["past_key_values"] = cache
            return
        super()._prepare_cache_for_generation(
            generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
        )


# transformers' own heads build their base model through AutoModel, which fails when the code comes with a checkpoint.
class LongNetForSequenceClassification(GenericForSequenceClassification, LongNetPreTrainedModel):
    """LongNet with a linear head on each row's last real token."""

    def __init__(self, config: LongNetConfig):
        LongNetPreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.model = LongNetModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()


class LongNetForTokenClassification(GenericForTokenClassification, LongNetPreTrainedModel):
    """LongNet with a linear head on every token."""

    def __init__(self, config: LongNetConfig):
        LongNetPreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.model = LongNetModel(config)
        classifier_dropout = getattr(config, "classifier_dropout", None)
        self.dropout = nn.Dropout(0.1 if classifier_dropout is None else classifier_dropout)
        self.score = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()


class LongNetForQuestionAnswering(GenericForQuestionAnswering, LongNetPreTrainedModel):
    """LongNet with a span head: start and end logits for every token."""

    def __init__(self, config: LongNetConfig):
        LongNetPreTrainedModel.__init__(self, config)
        self.model = LongNetModel(config)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.post_init()


# What a saved checkpoint's config.json names, whichever class saved it.
AUTO_MAP = {
    "AutoConfig": "configuration_longnet.LongNetConfig",
    "AutoModel": "modeling_longnet.LongNetModel",
    "AutoModelForCausalLM": "modeling_longnet.LongNetForCausalLM",
    "AutoModelForSequenceClassification": "modeling_longnet.LongNetForSequenceClassification",
    "AutoModelForTokenClassification": "modeling_longnet.LongNetForTokenClassification",
    "AutoModelForQuestionAnswering": "modeling_longnet.LongNetForQuestionAnswering",
}


__all__ = [
    "LongNetForCausalLM",
    "LongNetForQuestionAnswering",
    "LongNetForSequenceClassification",
    "LongNetForTokenClassification",
    "LongNetModel",
    "LongNetPreTrainedModel",
]
