"""One new token per row through all layers of a Llama-shaped model, by the fused kernels."""

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules import module as nn_module
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from .attention_longnet import LongNetAttention
from .backbone_llama import LongNetDecoderLayer
from .cache_layer import LongNetCacheLayer
from .cache_longnet import LongNetCache
from .cuda_devices import MAX_BATCH
from .decoding_hopper import at_once_refusal, attend_at_once
from .decoding_triton import (
    Rotary,
    TokenPlan,
    attend_token,
    device_refusal,
    gate_rows,
    multiply,
    multiply_gated,
    normalise,
    plan_token,
    slots_refusal,
)
from .liger_layers import own_replacement
from .rotary_longnet import LongNetRotaryEmbedding
from .sequence_group import current_group


LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")
FUSED_ATTENTION = ("sdpa", "longnet_triton")  # others are asked for by name, and then serve


def decoding_refusal(model: nn.Module, cache: LongNetCache | None, num_tokens: int, options: dict) -> str | None:
    """Say why the fused step does not serve a call, None if it does. Never waits for the device.

    Args:
        model: a ``LongNetModel``.
        cache: the cache of the call.
        num_tokens: new tokens per row.
        options: other arguments of the model's forward.
    """
    if torch.compiler.is_compiling():
        return "a compiler traces the step"
    if cache is None or num_tokens != 1:
        return "it takes one token per row, and a cache"
    return model_refusal(model, options) or cache_refusal(cache)


def model_refusal(model: nn.Module, options: dict) -> str | None:
    """Say why the fused step does not serve a model in its present state, None if it does."""
    config = model.config
    if torch.is_grad_enabled():
        return "it has no gradients; decode under torch.no_grad()"
    if model.training:
        return "it has no dropout and no training mode; call eval()"
    if current_group() is not None:
        return "it knows no sequence_parallel"
    if config.xpos or type(model.rotary_emb) is not LongNetRotaryEmbedding:
        return "it knows no xPos"
    if model.rotary_emb.rope_type in LENGTH_DEPENDENT_ROPE:
        return f"the frequencies of rope type {model.rotary_emb.rope_type!r} depend on the length"
    if config.hidden_act not in ("silu", "swish"):
        return f"it knows no activation but silu, got {config.hidden_act!r}"
    if config._attn_implementation not in FUSED_ATTENTION:
        return f"attn_implementation={config._attn_implementation!r} was asked for"
    for name in ("output_attentions", "output_hidden_states"):
        if options.get(name, getattr(config, name, False)):
            return f"{name} wants what the layers compute in between"
    dtype, device = model.norm.weight.dtype, model.norm.weight.device
    if device.type != "meta" and torch.is_autocast_enabled(device.type):
        return "it knows no autocast"
    for layer in model.layers[: config.num_hidden_layers]:
        if type(layer) is not LongNetDecoderLayer:
            return f"it knows no {type(layer).__name__}"
        for module in layer.modules():
            if refusal := _module_refusal(module, dtype, device):
                return refusal
    if nn_module._has_any_global_hook() or (refusal := _module_refusal(model.norm, dtype, device)):
        return refusal if not nn_module._has_any_global_hook() else "modules have global hooks"
    return slots_refusal(dtype, device, config.head_dim, config.pattern)


def _module_refusal(module: nn.Module, dtype: torch.dtype, device: torch.device) -> str | None:
    """Say what about a module only its own forward can do, None if nothing."""
    name = type(module).__name__
    known = (LongNetDecoderLayer, LongNetAttention, LlamaMLP, LlamaRMSNorm, nn.Linear, nn.SiLU)
    if type(module) not in known and not (
        next(module.parameters(recurse=False), None) is None and name == "SiLUActivation"
    ):
        return f"it knows no {name}"
    if replaced := own_replacement(module):  # Liger's kernels compute what these do
        return f"the {replaced} of {name} was replaced"
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    # Those of output_hidden_states stay when nobody asks for it any more.
    if any(getattr(hook, "__module__", "") != "transformers.utils.output_capturing" for hook in hooks):
        return f"{name} has hooks"
    for parameter in module._parameters.values():
        if parameter is None:
            continue
        if type(parameter) is not nn.Parameter:
            return f"weights of type {type(parameter).__name__} are not read as they lie"
        if parameter.dtype != dtype or parameter.device != device:
            return f"weights differ: {parameter.dtype} on {parameter.device}, {dtype} on {device}"
        if not parameter.is_contiguous():
            return f"a weight of {name} is not contiguous"
    return None


def cache_refusal(cache: LongNetCache) -> str | None:
    """Say why the fused step does not serve a cache, None if it does."""
    if cache.offloading:
        return "the cache is offloaded"
    seen = cache.layers[0].seen
    if seen is not None and len(seen) > MAX_BATCH:
        return f"it takes up to {MAX_BATCH} rows at once, got {len(seen)}"
    for layer in cache.layers:
        if not layer.is_compileable:
            return "the cache grows; make it with LongNetCache(max_length=...)"
        if layer.record_past or layer.pending is not None:
            return "the cache records tokens that may be taken back"
    return None


def head_refusal(head: nn.Module, hidden: Tensor, attn_implementation: str) -> str | None:
    """Say why the fused product does not serve the head of a language model, None if it does.

    Args:
        head: what makes logits of ``hidden``.
        hidden: ``[B, T, hidden_size]``.
        attn_implementation: of the model; one that was asked for by name serves without fused kernels.
    """
    if torch.compiler.is_compiling():
        return "a compiler traces the step"
    if hidden.shape[:2] != (1, 1):
        return "it takes one token of one row"
    if torch.is_grad_enabled():
        return "it has no gradients; decode under torch.no_grad()"
    if attn_implementation not in FUSED_ATTENTION:
        return f"attn_implementation={attn_implementation!r} was asked for"
    if type(head) is not nn.Linear:
        return f"it knows no {type(head).__name__}"
    if hidden.device.type != "meta" and torch.is_autocast_enabled(hidden.device.type):
        return "it knows no autocast"
    if nn_module._has_any_global_hook():
        return "modules have global hooks"
    return _module_refusal(head, hidden.dtype, hidden.device) or device_refusal(hidden.dtype, hidden.device)


def token_logits(head: nn.Linear, hidden: Tensor) -> Tensor:
    """Compute the logits ``[1, 1, vocab_size]`` of one token, ``hidden [1, 1, hidden_size]``."""
    logits = hidden.new_empty(1, head.out_features)
    return multiply(hidden[0], (head.weight,), logits, biases=(head.bias,))[None]


def decode_token(
    model: nn.Module, hidden: Tensor, cache: LongNetCache, real: Tensor | None, rope_positions: Tensor | None
) -> Tensor:
    """Run the layers and the final norm on one new token per row.

    Args:
        model: a ``LongNetModel`` that ``decoding_refusal`` accepts.
        hidden: ``[B, 1, hidden_size]``, overwritten.
        cache: takes the tokens in; it must have admitted as many rows.
        real: ``[B, 1]``, zero where the token is padding; None if all are real.
        rope_positions: ``[B or 1, 1]`` for the rotary embedding; None: the logical positions.

    Returns:
        ``[B, 1, hidden_size]``.

    Raises:
        ValueError: if the cache has no room.
    """
    config, rope = model.config, model.rotary_emb
    batch = hidden.shape[0]
    # The kernels overwrite rows without gaps; a hook may have kept what the embedding gave.
    kept = len(model.embed_tokens._forward_hooks) > 0
    hidden = hidden.reshape(batch, -1)
    hidden = hidden.clone(memory_format=torch.contiguous_format) if kept else hidden.contiguous()
    for layer in cache.layers:
        if not layer.is_initialized:
            layer.lazy_initialization(*[hidden.new_empty(batch, config.num_key_value_heads, 1, config.head_dim)] * 2)
    cache.reserve(1)
    rotary = Rotary(rope.inv_freq, rope.attention_scaling, rope.as_source_below)
    seen = cache.layers[0].seen
    plans = {
        slots: plan_token(
            slots, seen, config.num_key_value_heads, config.head_dim, hidden.dtype, rotary, real, rope_positions
        )
        for slots in dict.fromkeys(layer.slots for layer in cache.layers)
    }
    for layer, held in zip(model.layers[: config.num_hidden_layers], cache.layers):
        attended = _attend(layer, hidden, held, plans[held.slots])
        o_proj = layer.self_attn.o_proj
        hidden = _feed_forward(layer, _add_product(attended, o_proj, hidden))
    return normalise(hidden, _norm(model.norm))[:, None]


def _attend(layer: LongNetDecoderLayer, hidden: Tensor, held: LongNetCacheLayer, plan: TokenPlan) -> Tensor:
    attention = layer.self_attn
    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    if len(hidden) == 1:
        widths = [projection.out_features for projection in projections]
        together = multiply(
            hidden, tuple(p.weight for p in projections), hidden.new_empty(1, sum(widths)),
            norm=_norm(layer.input_layernorm), biases=tuple(p.bias for p in projections),
        )  # fmt: skip
        query, key, value = together.split(widths, dim=1)
    else:
        normed = normalise(hidden, _norm(layer.input_layernorm))
        query, key, value = (F.linear(normed, p.weight, p.bias) for p in projections)
    norms = None
    if attention.config.qk_norm:
        norms = (attention.q_norm.weight, attention.k_norm.weight, attention.q_norm.variance_epsilon)
    attend = attend_token
    if at_once_refusal(query, held.keys) is None:
        attend = partial(attend_at_once, ahead=(layer.mlp.gate_proj.weight, layer.mlp.up_proj.weight))
    attended = attend(
        plan, query, key, value, (held.keys, held.values, held.key_positions, held.key_branches),
        (held.seen, held.columns), scale=attention.scaling, norms=norms, rotates=attention.rotates,
    )  # fmt: skip
    held.is_empty = False
    return attended


def _feed_forward(layer: LongNetDecoderLayer, hidden: Tensor) -> Tensor:
    mlp, norm = layer.mlp, _norm(layer.post_attention_layernorm)
    gate, up = mlp.gate_proj, mlp.up_proj
    if len(hidden) == 1:
        inner = multiply_gated(hidden, gate.weight, up.weight, norm=norm, biases=(gate.bias, up.bias))
    else:
        normed = normalise(hidden, norm)
        inner = gate_rows(F.linear(normed, gate.weight, gate.bias), F.linear(normed, up.weight, up.bias))
    return _add_product(inner, mlp.down_proj, hidden)


def _add_product(x: Tensor, linear: nn.Linear, hidden: Tensor) -> Tensor:
    if len(hidden) == 1:
        return multiply(x, (linear.weight,), hidden, biases=(linear.bias,), adds=True)
    return hidden + F.linear(x, linear.weight, linear.bias)


def _norm(norm: LlamaRMSNorm) -> tuple[Tensor, float]:
    return norm.weight, norm.variance_epsilon
