"""LongNet models: a backbone with dilated attention, and its heads. Only what differs from Llama's stands here.

With the backbone of Llama parameter names equal Llama's, so a Llama checkpoint loads as it is.
"""

import logging
import os
from collections.abc import Callable
from typing import Any, NoReturn, Unpack

import torch
from torch import Tensor, nn
from transformers import GenerationConfig
from transformers import initialization as init
from transformers.generation import GenerationMode
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
)
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    SequenceClassifierOutputWithPast,
)
from transformers.models.llama.modeling_llama import LlamaForCausalLM, LlamaModel, LlamaPreTrainedModel
from transformers.utils.generic import TransformersKwargs, can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .attention_longnet import ATTENTION_NAMES, LongNetAttention
from .backbone_llama import LongNetDecoderLayer
from .backbone_magneto import MagnetoDecoderLayer, ScaledEmbedding
from .cache_longnet import LongNetCache
from .configuration_longnet import LongNetConfig
from .decoding_graph import GraphedCall
from .decoding_token import decode_token, decoding_refusal, head_refusal, model_refusal, token_logits
from .head_loss import IGNORED, check_labels, check_tokens, head_loss, logits_loss, mark_ignored, next_tokens
from .registered_names import register_adapter_targets, register_class_names
from .rotary_longnet import LongNetRotaryEmbedding, XPosRotaryEmbedding
from .sequence_group import current_group
from .sequence_tiles import in_tiles
from .token_layout import locate_tokens


logger = logging.getLogger(__name__)

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

    def __init__(self, config: LongNetConfig, *args: Any, **kwargs: Any) -> None:
        config.validate()  # fields edited after construction are checked here
        # Not super(): the Llama class that comes next would build its own layers first.
        LlamaPreTrainedModel.__init__(self, config, *args, **kwargs)
        # The layers that are there: Accelerate's FSDP refuses a name that it does not find.
        self._no_split_modules = [DECODER_LAYERS[config.backbone].__name__]

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if (std := getattr(module, "initial_std", None)) is not None:  # a layer with a start of its own
            init.normal_(module.weight, std=std)

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """Save as ``transformers`` does; the checkpoint carries the code, and loads as any of the LongNet classes."""
        self.config.auto_map = dict(AUTO_MAP)
        return super().save_pretrained(save_directory, *args, **kwargs)

    def _check_and_adjust_attn_implementation(self, attn_implementation: str | None, *args: Any, **kwargs: Any) -> str:
        # First: transformers would look for packages, kernels and flags, and advise what does not help here.
        if attn_implementation is not None and attn_implementation not in ATTENTION_NAMES:
            raise ValueError(
                f'Specified `attn_implementation="{attn_implementation}"` is not supported: it is no dilated attention; '
                f"use one of {', '.join(ATTENTION_NAMES)}"
            )
        return super()._check_and_adjust_attn_implementation(attn_implementation, *args, **kwargs)

    @classmethod
    def maybe_distribute_model(cls, model: nn.Module, distributed_config: Any, mesh: Any) -> nn.Module:
        """Distribute as ``transformers`` does; with tensor parallelism each rank knows which KV heads are its own."""
        model = super().maybe_distribute_model(model, distributed_config, mesh)
        if distributed_config is not None and (ranks := distributed_config.tp_size or 1) > 1:
            heads = model.config.num_key_value_heads
            if heads % ranks:
                raise ValueError(f"tp_size={ranks} does not divide the {heads} KV heads; use a divisor of {heads}")
            model.config.first_kv_head = model._device_mesh["tp"].get_local_rank() * (heads // ranks)
        return model

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> NoReturn:
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
        **kwargs: Unpack[TransformersKwargs],  # type: ignore[misc]
    ) -> BaseModelOutputWithPast:
        """Run the decoder.

        Args:
            input_ids: ``[B, T]`` token ids; or give ``inputs_embeds``.
            attention_mask: ``[B, past + T]``, nonzero = real token, padding on either side.
            position_ids: ``[B or 1, T]`` positions for the rotary embedding; logical positions if None. Without a
                cache, restarting positions mark packed documents, which never see each other; a compiled graph cannot
                depend on that, and takes them with a cache or ``cu_seq_lens_q``.
            past_key_values: a ``LongNetCache``.
            inputs_embeds: ``[B, T, hidden_size]``.
            use_cache: whether to return a cache; packed documents return none.
            cu_seq_lens_q: ``[documents + 1]`` starts of packed documents (B == 1), as
                ``DataCollatorWithFlattening`` gives.

        Raises:
            ValueError: if inputs are missing or doubled, the mask has a wrong shape, the cache is not a
                ``LongNetCache``, a cache meets packed documents or activation checkpointing in training, or a longrope's
                keys in the cache have other frequencies than those to come.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        given_embeds = inputs_embeds
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if inputs_embeds.ndim != 3:
            raise ValueError(
                "input_ids must be [batch, tokens] or inputs_embeds [batch, tokens, hidden_size], got "
                f"{list((inputs_embeds if input_ids is None else input_ids).shape)}"
            )
        if past_key_values is not None and not hasattr(past_key_values, "next_positions"):
            raise ValueError(
                f"LongNet needs a LongNetCache, got {type(past_key_values).__name__}: other caches do not know which "
                "keys the pattern reaches; leave past_key_values out to get the right one"
            )
        if past_key_values is not None and self.training and any(x.gradient_checkpointing for x in self.layers):
            raise ValueError(
                "activation checkpointing in training takes the cache from the layers, which would not see the past: "
                "leave past_key_values out (generate: use_cache=False), call eval(), or disable checkpointing"
            )
        if past_key_values is not None:
            past_key_values.check_fits(self.config)
            past_key_values.admit(len(inputs_embeds))
        if cu_seq_lens_q is None and past_key_values is not None and inputs_embeds.shape[1] == 1:
            refusal = decoding_refusal(self, past_key_values, inputs_embeds.shape[1], kwargs)
            if refusal is None:
                hidden_states = inputs_embeds.clone() if given_embeds is not None else inputs_embeds
                real = None if attention_mask is None else attention_mask[:, -1:]
                hidden_states = decode_token(self, hidden_states, past_key_values, real, position_ids)
                return BaseModelOutputWithPast(last_hidden_state=hidden_states, past_key_values=past_key_values)
            if not torch.compiler.is_compiling():
                logger.debug("the fused decoding step does not serve: %s", refusal)
        layout = locate_tokens(
            inputs_embeds.shape[:2],
            inputs_embeds.device,
            attention_mask,
            position_ids,
            cu_seq_lens_q,
            past_key_values,
            self.config,
            inputs_embeds.dtype,
        )
        if past_key_values is not None:
            # Before any layer takes the tokens: one that goes on for ever may come before one that is full.
            ranks = 1 if layout.sequence is None else layout.sequence.group.size()
            past_key_values.reserve(ranks * inputs_embeds.shape[1], layout.positions)
        if use_cache and past_key_values is None and layout.cu_seqlens is None and layout.sequence is None:
            past_key_values = LongNetCache(self.config)
        if position_ids is None:
            position_ids = layout.rotary_positions(*inputs_embeds.shape[:2])
        longrope, reach = self.rotary_emb.rope_type == "longrope", None
        if self.rotary_emb.length_border is not None:
            reach = layout.rotary_reach(position_ids, inputs_embeds.shape[:2], by_document=longrope)
        eagerly = not torch.compiler.is_compiling()
        # A reach of 0: no tokens came, none are rotated.
        if past_key_values is not None and longrope and reach is not None and eagerly and (length := int(reach)):
            self.rotary_emb.refuse_turn(past_key_values.rotated_up_to, length)
            past_key_values.rotated_up_to = length

        hidden_states = inputs_embeds
        position_embeddings = self.rotary_emb(hidden_states, position_ids=position_ids, reach=reach)
        for decoder_layer in self.layers[: self.config.num_hidden_layers]:
            hidden_states = decoder_layer(
                hidden_states,
                position_embeddings=position_embeddings,
                past_key_values=past_key_values,
                use_cache=use_cache,
                layout=layout,
                # Accelerate's context parallelism answers a mask with is_causal=True, which the attention refuses.
                attention_mask=None,
                **kwargs,
            )
        hidden_states = in_tiles(self.norm, hidden_states, [self.norm], self.gradient_checkpointing and self.training)
        return BaseModelOutputWithPast(last_hidden_state=hidden_states, past_key_values=past_key_values)


class LongNetForCausalLM(LongNetPreTrainedModel, LlamaForCausalLM):
    """LongNet with a language-modelling head."""

    def __init__(self, config: LongNetConfig):
        LongNetPreTrainedModel.__init__(self, config)
        self.model = LongNetModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: LongNetCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        *,
        num_items_in_batch: Tensor | int | None = None,
        skip_logits: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],  # type: ignore[misc]
    ) -> CausalLMOutputWithPast:
        """Compute logits, and the loss if there are labels.

        Logits of a long sequence are larger than all else together. In training, where only the loss is wanted, they
        are never made as a whole, and ``logits`` is None in the output.

        Args:
            labels: ``[B, T]``, usually ``input_ids``: each token is predicted from those before it. -100: not
                predicted.
            logits_to_keep: compute only the last so many logits (0: all), or those at these indices.
            num_items_in_batch: what the sum of the tokens' losses is divided by; None: the number of labels.
            skip_logits: return the loss alone. None: in training (``config.loss_implementation="logits"``: never). A
                loss function of the user's own gets its logits always.
            **kwargs: ``shift_labels [B, T]``, instead of ``labels``: the token to predict *at* each place;
                ``label_smoothing``: weight of the uniform distribution in the target; ``ignore_index``: the label of
                what is not predicted, in place of -100. Other arguments are those of ``LongNetModel``.
        """
        # Not in the signature: Trainer takes every name with "label" there for one that all batches have.
        shift_labels, label_smoothing = kwargs.pop("shift_labels", None), kwargs.pop("label_smoothing", 0.0)
        ignore_index = kwargs.get("ignore_index", IGNORED)
        with_loss = labels is not None or shift_labels is not None
        if current_group() is not None and with_loss and (shift_labels is None or num_items_in_batch is None):
            raise ValueError(
                "under sequence_parallel a slice's last token is trained on the next rank's first, and the loss is a "
                "part of the whole batch's mean: give shift_labels and num_items_in_batch, as shard_sequence does"
            )
        outputs = self.model(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids,
            past_key_values=past_key_values, inputs_embeds=inputs_embeds, use_cache=use_cache, **kwargs,
        )  # fmt: skip
        hidden_states = outputs.last_hidden_state
        if not isinstance(logits_to_keep, int):
            hidden_states = hidden_states[:, logits_to_keep]
        elif logits_to_keep > 0:
            hidden_states = hidden_states[:, -logits_to_keep:]

        loss = logits = None
        own_loss = hasattr(self, "_loss_function")  # set by the user
        if skip_logits is None:
            skip_logits = self.training and self.config.loss_implementation != "logits"
        if not (with_loss and skip_logits) or own_loss:
            fused = head_refusal(self.lm_head, hidden_states, self.config._attn_implementation) is None
            logits = token_logits(self.lm_head, hidden_states) if fused else self.lm_head(hidden_states)
        if with_loss and logits is not None and not own_loss:
            given = labels if shift_labels is None else shift_labels
            assert given is not None
            check_labels(given, logits.shape[:-1])
            # A row's first label is shifted out: nothing predicts it.
            targets = given[..., 1:] if shift_labels is None else given
            check_tokens(mark_ignored(targets, ignore_index), logits.shape[-1])
        if with_loss and logits is not None and (own_loss or not label_smoothing):
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.vocab_size, shift_labels=shift_labels,
                num_items_in_batch=num_items_in_batch, **kwargs,
            )  # fmt: skip
        elif with_loss:
            targets = next_tokens(labels, ignore_index) if shift_labels is None else shift_labels
            targets = mark_ignored(targets, ignore_index)
            options = {"num_items": num_items_in_batch, "label_smoothing": label_smoothing}
            if logits is not None:
                loss = logits_loss(logits, targets, **options)
            else:
                name = self.config.loss_implementation
                options["implementation"] = "auto" if name == "logits" else name
                loss = head_loss(hidden_states, self.lm_head, targets, **options)
        return CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states, attentions=outputs.attentions,
        )  # fmt: skip

    @staticmethod
    def create_masks_for_generate(
        inputs_embeds: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> Tensor | None:
        """Keep the padding mask of the new tokens alone: what a compiled step takes then has one shape throughout."""
        return None if attention_mask is None else attention_mask[:, -inputs_embeds.shape[1] :]

    def _decodes_by_graph(self, generation_config: GenerationConfig, generation_mode: GenerationMode) -> bool:
        """Whether ``generate`` makes a cache of fixed size by itself: where its steps are a graph."""
        return (
            generation_config.cache_implementation is None
            and not generation_config.is_assistant
            and not generation_config.disable_compile
            and generation_mode in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)
            and self._fused_refusal() is None
        )

    def _fused_refusal(self) -> str | None:
        with torch.no_grad():
            return model_refusal(self.model, {})

    def get_compiled_call(self, compile_config: Any) -> Callable:
        """Return the forward for decoding: replays of a CUDA graph, or what ``compile_config`` asks ``torch.compile`` for."""
        if compile_config is None and (refusal := self._fused_refusal()) is None:
            return GraphedCall(self, self.__call__)
        if compile_config is None:
            logger.debug("torch.compile, for the fused decoding step does not serve: %s", refusal)
        return super().get_compiled_call(compile_config)

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        past_key_values: LongNetCache | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Prepare one forward pass as ``transformers`` does; a mask no longer than ``input_ids`` says that they are all.

        What a cache has read of them is left out then: assisted decoding begins with all tokens, whatever it holds.
        Where a longrope's frequencies change, the cache is emptied and reads all tokens anew, as with Phi-3.
        """
        if next_sequence_length is None and past_key_values is not None and inputs_embeds is None:
            num_tokens, held = input_ids.shape[1], past_key_values.get_seq_length()
            if attention_mask is not None and attention_mask.shape[1] == num_tokens > held:
                next_sequence_length = num_tokens - held
        if (
            next_sequence_length is not None
            and past_key_values is not None
            and self.model.rotary_emb.rope_type == "longrope"
        ):
            has_all = input_ids.shape[1] == past_key_values.get_seq_length() + next_sequence_length
            positions = kwargs.get("position_ids")
            length = input_ids.shape[1] if positions is None else int(positions.max()) + 1
            if has_all and self.model.rotary_emb.turns_otherwise(past_key_values.rotated_up_to, length):
                past_key_values.reset()
                past_key_values.rotated_up_to = length  # compiled, the forward pass does not note it
                next_sequence_length = None
        return super().prepare_inputs_for_generation(
            input_ids, next_sequence_length=next_sequence_length, past_key_values=past_key_values,
            attention_mask=attention_mask, inputs_embeds=inputs_embeds, **kwargs,
        )  # fmt: skip

    def _prefill(
        self,
        input_ids: Tensor,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        cache, embeds = model_kwargs.get("past_key_values"), model_kwargs.get("inputs_embeds")
        # Another cache is refused by the forward pass.
        if cache is not None and hasattr(cache, "check_mask") and (held := int(cache.get_seq_length())):
            mask = model_kwargs.get("attention_mask")
            given = input_ids.shape[1] if embeds is None else embeds.shape[1]
            # A mask is dropped where all tokens are real; as long as the tokens, it says that they are the whole sequence.
            width = getattr(generation_config, "_mask_length", given) if mask is None else mask.shape[1]
            new = given if embeds is None and width != given else given - held
            if new < 1:
                raise ValueError(
                    f"the cache holds {held} tokens, and {given} were given: give these and at least one new token, or "
                    "new tokens in input_ids with an attention_mask of all"
                )
            if mask is None and width != held + new:
                raise ValueError(
                    f"attention_mask has {width} columns for {held} tokens in the cache and {new} new ones"
                )
            cache.check_mask(mask, new)
        return super()._prefill(input_ids, generation_config, model_kwargs, *args, **kwargs)

    def _refuse_candidates(self, num_tokens: int, num_new: int) -> None:
        """Refuse assisted decoding where longrope would verify tokens with the frequencies of candidates beyond them."""
        rotary = self.model.rotary_emb
        if rotary.rope_type == "longrope" and rotary.turns_otherwise(num_tokens, num_tokens + num_new):
            raise ValueError(
                f"RoPE 'longrope' rotates otherwise beyond {rotary.length_border} tokens, and candidates of assisted decoding "
                f"would decide when between {num_tokens} and {num_tokens + num_new}; leave the assistant out, or let "
                f"max_length be at most {rotary.length_border}"
            )

    def _assisted_decoding(
        self, input_ids: Tensor, *args: Any, generation_config: GenerationConfig, **kwargs: Any
    ) -> Any:
        cache, mask = kwargs.get("past_key_values"), kwargs.get("attention_mask")
        num_real = input_ids.shape[1] if mask is None else int(mask.count_nonzero())
        self._refuse_candidates(num_real, generation_config.max_length - input_ids.shape[1])
        if cache is not None and (held := cache.get_seq_length()):
            num_tokens = input_ids.shape[1]
            if kwargs.get("attention_mask") is None:  # dropped where all tokens are real; its length is needed
                of_all = getattr(generation_config, "_mask_length", num_tokens)
                kwargs["attention_mask"] = input_ids.new_ones(len(input_ids), of_all)
            if kwargs["attention_mask"].shape[1] != num_tokens or num_tokens <= held:
                raise ValueError(
                    f"assisted decoding from a cache of {held} tokens needs these and at least one new one in "
                    f"input_ids, got {num_tokens}: give the whole sequence"
                )
            cache.check_mask(kwargs["attention_mask"], num_tokens - held)
        try:
            return super()._assisted_decoding(input_ids, *args, generation_config=generation_config, **kwargs)
        finally:  # the cache may go on without anybody who crops it
            for layer in [] if cache is None else cache.layers:
                layer.record_past = False

    def _prepare_cache_for_generation(
        self,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        generation_mode: GenerationMode,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        if generation_config.prefill_chunk_size is not None and model_kwargs.get("inputs_embeds") is not None:
            raise ValueError(
                f"prefill_chunk_size={generation_config.prefill_chunk_size} needs input_ids, which transformers splits; "
                "leave it out with inputs_embeds"
            )
        if model_kwargs.get("past_key_values") is None and generation_config.use_cache is not False:
            implementation = generation_config.cache_implementation
            if implementation not in (None, "dynamic", "offloaded"):
                raise ValueError(
                    f"cache_implementation={implementation!r} holds other keys than dilated attention needs; leave it "
                    'out (a bounded LongNetCache) or use "offloaded"'
                )
            if self._decodes_by_graph(generation_config, generation_mode):
                # Dense layers enlarge beyond the context, should so many tokens really come.
                context = max(*self.config.segment_lengths, self.config.max_position_embeddings)
                cache = LongNetCache(self.config, max_length=min(max_cache_length + 1, context), enlarges=True)
            else:
                cache = LongNetCache(self.config, offloading=implementation == "offloaded")
            if generation_config.is_assistant:
                cache.activate_past_recording()
            model_kwargs["past_key_values"] = cache
            return
        super()._prepare_cache_for_generation(
            generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
        )


def _refuse_slices(head: LongNetPreTrainedModel, args: tuple, kwargs: dict) -> None:
    """Before a head's forward: raise if it would take a rank's slice for the whole sequence."""
    reads_whole_rows = not isinstance(head, LongNetForTokenClassification) or kwargs.get("labels") is not None
    if current_group() is not None and reads_whole_rows:
        raise ValueError(
            f"{type(head).__name__} reads whole sequences, and a sequence-parallel rank holds a slice: run its "
            "base model under sequence_parallel, then gather_sequence, and the head outside"
        )


# transformers' own heads build their base model through AutoModel, which fails when the code comes with a checkpoint.
class LongNetForSequenceClassification(GenericForSequenceClassification, LongNetPreTrainedModel):
    """LongNet with a linear head on each row's last real token: the last that neither the mask nor its id makes padding."""

    def __init__(self, config: LongNetConfig):
        LongNetPreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.model = LongNetModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.register_forward_pre_hook(_refuse_slices, with_kwargs=True)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: LongNetCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],  # type: ignore[misc]
    ) -> SequenceClassifierOutputWithPast:
        """Classify each row ``[num_labels]`` by its last real token: padding attends to nothing, and knows nothing of it.

        Raises:
            ValueError: if there are several rows, and neither a mask nor padding ids tell where they end.
        """
        outputs = self.model(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids,
            past_key_values=past_key_values, inputs_embeds=inputs_embeds, use_cache=use_cache, **kwargs,
        )  # fmt: skip
        hidden, padding = outputs.last_hidden_state, self.config.pad_token_id
        batch, length = hidden.shape[:2]
        if padding is None and attention_mask is None and batch != 1:
            raise ValueError(
                f"{batch} rows without attention_mask, and the config has no pad_token_id: give one, so that each row's "
                "last token can be found"
            )
        real = torch.ones(batch, length, dtype=torch.bool, device=hidden.device)
        if attention_mask is not None:
            real &= attention_mask[:, attention_mask.shape[1] - length :].to(hidden.device) != 0
        if input_ids is not None and padding is not None:
            real &= input_ids.to(hidden.device) != padding
        last = (torch.arange(length, device=hidden.device) * real).argmax(-1)
        logits = self.score(hidden[torch.arange(batch, device=hidden.device), last])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, pooled_logits=logits, config=self.config)
        return SequenceClassifierOutputWithPast(
            loss=loss, logits=logits, past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states, attentions=outputs.attentions,
        )  # fmt: skip


class LongNetForTokenClassification(GenericForTokenClassification, LongNetPreTrainedModel):
    """LongNet with a linear head on every token."""

    def __init__(self, config: LongNetConfig):
        LongNetPreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.model = LongNetModel(config)
        classifier_dropout = getattr(config, "classifier_dropout", None)
        self.dropout = nn.Dropout(0.1 if classifier_dropout is None else classifier_dropout)
        self.score = nn.Linear(config.hidden_size, config.num_labels)
        self.register_forward_pre_hook(_refuse_slices, with_kwargs=True)
        self.post_init()


class LongNetForQuestionAnswering(GenericForQuestionAnswering, LongNetPreTrainedModel):
    """LongNet with a span head: start and end logits for every token."""

    def __init__(self, config: LongNetConfig):
        LongNetPreTrainedModel.__init__(self, config)
        self.model = LongNetModel(config)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.register_forward_pre_hook(_refuse_slices, with_kwargs=True)
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
register_class_names(LongNetConfig.model_type, AUTO_MAP)
register_adapter_targets(LongNetConfig.model_type)


__all__ = [
    "LongNetForCausalLM",
    "LongNetForQuestionAnswering",
    "LongNetForSequenceClassification",
    "LongNetForTokenClassification",
    "LongNetModel",
    "LongNetPreTrainedModel",
]
