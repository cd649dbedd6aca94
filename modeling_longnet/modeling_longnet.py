"""LongNet models: a backbone with dilated attention, and its heads. Only what differs from Llama's stands here.

With the backbone of Llama parameter names equal Llama's, so a Llama checkpoint loads as it is.
"""

from torch import Tensor, nn
from transformers import initialization as init
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
)
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.llama.modeling_llama import LlamaForCausalLM, LlamaModel, LlamaPreTrainedModel
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .attention_longnet import LongNetAttention
from .backbone_llama import LongNetDecoderLayer
from .backbone_magneto import MagnetoDecoderLayer, ScaledEmbedding
from .cache_longnet import LongNetCache
from .configuration_longnet import LongNetConfig
from .rotary_longnet import LongNetRotaryEmbedding, XPosRotaryEmbedding
from .token_layout import locate_tokens


DECODER_LAYERS = {"llama": LongNetDecoderLayer, "magneto": MagnetoDecoderLayer}


class LongNetPreTrainedModel(LlamaPreTrainedModel):
    """What all LongNet models share: which attention implementations exist, and how a checkpoint carries its code."""

    config: LongNetConfig
    _no_split_modules = ["LongNetDecoderLayer", "MagnetoDecoderLayer"]
    _supports_flash_attn = False
    _supports_flex_attn = False
    # Serving engines read this flag to replace the attention by their own full attention: they must not.
    _supports_attention_backend = False
    _can_record_outputs = {"hidden_states": LongNetDecoderLayer, "attentions": LongNetAttention}

    def __init__(self, config, *args, **kwargs):
        config.validate()  # fields edited after construction are checked here
        # Not super(): the Llama class that comes next would build its own layers first.
        LlamaPreTrainedModel.__init__(self, config, *args, **kwargs)

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if (std := getattr(module, "initial_std", None)) is not None:  # a layer with a start of its own
            init.normal_(module.weight, std=std)

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
        embedding = ScaledEmbedding if config.scale_embedding else nn.Embedding
        self.embed_tokens = embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        decoder_layer = DECODER_LAYERS[config.backbone]
        self.layers = nn.ModuleList([decoder_layer(config, i) for i in range(config.num_hidden_layers)])
        self.norm = decoder_layer.build_norm(config)
        self.rotary_emb = (XPosRotaryEmbedding if config.xpos else LongNetRotaryEmbedding)(config)
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
