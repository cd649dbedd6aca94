"""Dilated attention inside a loaded stock model, in place and for a quick look.

What this covers: forward, training and ``generate()`` of Llama, Mistral, Ministral, Qwen2, Qwen3, SmolLM3 and Phi-3
models, padded and packed batches included. What it does not: the KV cache stays full, and each decoding step costs as
much attention as a whole forward; the change is not saved (a saved model loads as ordinary full attention); attention
weights are not returned; static caches are refused. ``convert_checkpoint`` has none of these limits.
"""

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from modeling_longnet import DilationPattern, dilated_attention
from modeling_longnet.token_layout import documents_from_position_ids

from .families import FAMILIES


NAME = "longnet_retrofit"
SUPPORTED_MODEL_TYPES = tuple(family.config_class.model_type for family in FAMILIES)


def retrofit(model: PreTrainedModel, pattern: DilationPattern) -> "Retrofit":
    """Switch a loaded model to dilated attention, in place.

    With a ``retrofit`` pattern the model computes what it did before on every input of at most ``w_0`` tokens. Each
    attention layer holds its pattern, so several models can carry different ones. As a context manager the switch ends
    with the block; as a call it lasts until ``undo()``. Either way the model is then exactly as before::

        with retrofit(model, DilationPattern.geometric(2048, 8192, preset="retrofit")):
            model.generate(...)

    Args:
        model: a Llama, Mistral, Ministral, Qwen2, Qwen3, SmolLM3 or Phi-3 model of transformers, without sliding window.
        pattern: the branches and their rules.

    Returns:
        What takes the switch back, at the end of a ``with`` block or by ``undo()``.

    Raises:
        ValueError: if the model is of another family or already switched, or has a sliding window or softcapped logits.
    """
    return Retrofit(model, pattern)


class Retrofit:
    """A model under dilated attention, until ``undo()`` or the end of the ``with`` block."""

    def __init__(self, model: PreTrainedModel, pattern: DilationPattern):
        if not isinstance(pattern, DilationPattern):
            raise ValueError(f"pattern must be a DilationPattern, got {type(pattern).__name__}")
        _check_model(model)
        self.model = model
        self._layers: list[nn.Module] = [layer.self_attn for layer in model.base_model.layers]
        self._before = model.config._attn_implementation
        if any(hasattr(layer, "dilation_pattern") for layer in self._layers):
            raise ValueError(f"this {type(model).__name__} is already switched; undo() first")
        self._active = True
        for layer in self._layers:
            layer.dilation_pattern = pattern
        model.set_attn_implementation(NAME)

    def undo(self) -> None:
        """Give the model back the attention it had; a second call does nothing."""
        if not self._active:
            return
        self._active = False
        for layer in self._layers:
            del layer.dilation_pattern
        self.model.set_attn_implementation(self._before)

    def __enter__(self) -> PreTrainedModel:
        return self.model

    def __exit__(self, *exception: object) -> None:
        self.undo()


def _check_model(model: PreTrainedModel) -> None:
    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"retrofit needs a transformers model, got {type(model).__name__}; unwrap it first")
    name, config = type(model).__name__, model.config
    if getattr(config, "attn_logit_softcapping", None) is not None:
        raise ValueError(
            f"{name} softcaps its attention logits at {config.attn_logit_softcapping}, which dilated attention does not"
        )
    if config.model_type not in SUPPORTED_MODEL_TYPES:
        raise ValueError(
            f"{name} (model_type {config.model_type!r}) is not supported; supported: {', '.join(SUPPORTED_MODEL_TYPES)}"
        )
    family = next(family for family in FAMILIES if family.config_class.model_type == config.model_type)
    if window := family.sliding_window(config):
        raise ValueError(
            f"{name} attends in a sliding window of {window} tokens; load it with sliding_window=None "
            "if it may see further"
        )


def _retrofit_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    position_ids: Tensor | None = None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """Serve transformers' attention call: ``query [B, H, T, D]`` are the last T of the ``[B, G, past + T, D]`` keys."""
    batch, _, num_new, _ = query.shape
    length = key.shape[2]
    if attention_mask is not None and attention_mask.shape != (batch, length):
        raise ValueError(
            f"under retrofit the attention mask must be [batch, past + new tokens] = {[batch, length]}, got "
            f"{list(attention_mask.shape)}"
        )
    starts = None
    if attention_mask is None and position_ids is not None and num_new == length:
        starts, _ = documents_from_position_ids(position_ids, None, (batch, length))
    if starts is not None:
        query, key, value = (x.transpose(0, 1).flatten(1, 2)[None] for x in (query, key, value))  # [1, H, B * L, D]
    # The operator takes one query per key: queries for the past are made up, and their outputs dropped.
    query = F.pad(query, (0, 0, length - num_new, 0))  # [B, H, L, D]
    out: Tensor = dilated_attention(
        query,
        key,
        value,
        module.dilation_pattern,
        attention_mask=attention_mask,
        cu_seqlens=starts,
        scale=scaling,
        dropout=dropout,
    )
    out = out[:, :, length - num_new :].transpose(1, 2)  # [B, T, H, D]
    return (out if starts is None else out.reshape(batch, length, *out.shape[2:])), None


def _keep_padding_mask(
    *args: object,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    attention_mask: Tensor | None = None,
    **kwargs: object,
) -> Tensor | None:
    """Pass the 2D padding mask through; transformers drops it where an attention has no mask function of its own."""
    if int(q_offset) + q_length != kv_length:
        raise ValueError(
            f"retrofit needs a cache that grows (DynamicCache), got {kv_length} cache columns for "
            f"{int(q_offset) + q_length} tokens; leave cache_implementation out, and set config.sliding_window to None"
        )
    return attention_mask


AttentionInterface.register(NAME, _retrofit_attention)
AttentionMaskInterface.register(NAME, _keep_padding_mask)
