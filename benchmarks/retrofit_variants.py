"""The ways of attending that ``retrofit_quality.py`` compares, each a change of a LongNet model's configuration.

Those that the package itself does not offer (LongLoRA's shifted segments, attention sinks, offsets that differ from
layer to layer) are attention functions registered here, exact and differentiable, on top of ``dilated_attention``.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.modeling_utils import AttentionInterface

from modeling_longnet import DilationPattern, dilated_attention


UNBOUNDED = 2**62
DENSE = DilationPattern((UNBOUNDED,), (1,))
SINKS = 16


@dataclass(frozen=True)
class Variant:
    """A name, the pattern for a first segment and a length, and what else differs.

    ``train_attention`` and ``eval_attention`` name attention functions; ``dense_layers`` stay dense (the study's model
    has eight layers, counted from 0); ``times_tokens`` tunes for so many times as long.
    """

    name: str
    pattern: Callable[[int, int], DilationPattern]
    train_attention: str = "sdpa"
    eval_attention: str = "sdpa"
    dense_layers: tuple[int, ...] = ()
    times_tokens: int = 1
    note: str = field(default="", compare=False)


def _dense(first_segment: int, length: int) -> DilationPattern:
    return DENSE


def _geometric(preset: str) -> Callable[[int, int], DilationPattern]:
    return lambda first_segment, length: DilationPattern.geometric(first_segment, length, preset=preset)


def _wide(first_segment: int, length: int) -> DilationPattern:
    return DilationPattern.geometric(2 * first_segment, max(2 * first_segment, length), preset="retrofit")


def _window(first_segment: int, length: int) -> DilationPattern:
    return DilationPattern.preset("retrofit", (first_segment,), (1,))


# In the order of what they tell, should the time be up before the last.
VARIANTS = {
    v.name: v
    for v in (
        Variant("dense", _dense, note="RoPE scaled, ordinary attention: the upper bound"),
        Variant("retrofit", _geometric("retrofit")),
        Variant("window", _window, note="the first segment alone, sliding"),
        Variant("paper", _geometric("paper")),
        Variant("retrofit_dense4", _geometric("retrofit"), dense_layers=(2, 6), note="one layer in four dense"),
        Variant("retrofit_dense8", _geometric("retrofit"), dense_layers=(4,), note="one layer in eight dense"),
        Variant("retrofit_dense8_early", _geometric("retrofit"), dense_layers=(2,)),
        Variant("retrofit_dense8_late", _geometric("retrofit"), dense_layers=(6,)),
        Variant(
            "window_dense8_late", _window, dense_layers=(6,), note="does dilation still pay beside a dense layer?"
        ),
        Variant("retrofit_dense4_late", _geometric("retrofit"), dense_layers=(5, 6)),
        Variant("s2", _dense, train_attention="quality_s2", note="LongLoRA: shifted segments to train, dense to read"),
        Variant("retrofit_sinks", _geometric("retrofit"), "quality_sinks", "quality_sinks"),
        Variant("retrofit_staggered", _geometric("retrofit"), "quality_staggered", "quality_staggered"),
        Variant("retrofit_long", _geometric("retrofit"), times_tokens=4, note="four times the tokens to tune on"),
        Variant("dense_long", _dense, times_tokens=4, note="four times the tokens to tune on"),
        Variant("retrofit_dense8_long", _geometric("retrofit"), dense_layers=(4,), times_tokens=4),
        Variant("retrofit_dense8_late_long", _geometric("retrofit"), dense_layers=(6,), times_tokens=4),
        Variant("retrofit_dense4_long", _geometric("retrofit"), dense_layers=(2, 6), times_tokens=4),
        Variant("retrofit_longest", _geometric("retrofit"), times_tokens=12, note="twelve times the tokens"),
        Variant("retrofit_wide", _wide, note="a first segment of twice the trained context"),
    )
}
CORE = ("dense", "retrofit")  # what the rest is compared with


def is_distinct(variant: Variant, config, first_segment: int, length: int) -> bool:
    """Say whether a variant differs from its plain form: staggering needs rates that the KV heads do not cover."""
    rates = variant.pattern(first_segment, length).dilation_rates
    return variant.train_attention != "quality_staggered" or any(config.num_key_value_heads % r for r in rates)


def apply(model: PreTrainedModel, variant: Variant, first_segment: int, length: int, training: bool) -> None:
    """Let a LongNet model attend as the variant does."""
    pattern = variant.pattern(first_segment, length)
    config = model.config
    for name in ("segment_lengths", "dilation_rates", "head_offsets", "count_overlaps", "dilate_queries", "window"):
        setattr(config, name, getattr(pattern, name))
    config.dense_layers = dense_layers(variant, config.num_hidden_layers)
    config.quality_first_segment = first_segment
    # Not by set_attn_implementation, which refuses every name that is not the package's own.
    config._attn_implementation = variant.train_attention if training else variant.eval_attention


def dense_layers(variant: Variant, layers: int) -> tuple[int, ...]:
    """Name the layers that stay dense: the variant's, in a model of fewer the last one for those that it lacks."""
    return tuple(sorted({min(layer, layers - 1) for layer in variant.dense_layers}))


def attention_flops(variant: Variant, config, first_segment: int, length: int) -> int:
    """Count the FLOPs of reading ``length`` tokens, all layers' attention, forward."""
    heads = (config.num_attention_heads, config.head_dim)
    kv_heads = config.num_key_value_heads
    pattern = variant.pattern(first_segment, length)
    dense = len(dense_layers(variant, config.num_hidden_layers))
    own = pattern.attention_flops(length, *heads, num_kv_heads=kv_heads)
    if variant.eval_attention == "quality_sinks":
        own += 4 * heads[0] * heads[1] * SINKS * length
    full = DENSE.attention_flops(length, *heads, num_kv_heads=kv_heads)
    return dense * full + (config.num_hidden_layers - dense) * own


def kv_entries(variant: Variant, config, first_segment: int, length: int) -> int:
    """Count the keys per KV head that reading on after ``length`` tokens can still need, all layers together."""
    dense = len(dense_layers(variant, config.num_hidden_layers))
    own = variant.pattern(first_segment, length).cache_entries(length)
    own += SINKS if variant.eval_attention == "quality_sinks" else 0
    return dense * length + (config.num_hidden_layers - dense) * own


def shifted_segments(query: Tensor, key: Tensor, value: Tensor, segment: int, scale: float) -> Tensor:
    """Attend inside segments; in the second half of the KV heads they are shifted by half a segment (LongLoRA's S2).

    The shift of the original wraps around the end and lets the first tokens see the last ones; here they have a half
    segment of their own.

    Args:
        query: ``[1, H, L, D]``, key, value: ``[1, G, L, D]``.

    Returns:
        ``[1, H, L, D]``.
    """
    length, kv_heads, group = query.shape[2], key.shape[1], query.shape[1] // key.shape[1]
    half = max(1, kv_heads // 2)
    outputs = []
    for low, high, shift in ((0, half, 0), (half, kv_heads, segment // 2)):
        if low == high:
            continue
        edges = sorted({0, length, *range(shift, length, segment)})
        borders = torch.tensor(edges, dtype=torch.int32, device=query.device)
        outputs.append(
            dilated_attention(
                query[:, low * group : high * group],
                key[:, low:high],
                value[:, low:high],
                DENSE,
                cu_seqlens=borders,
                scale=scale,
            )  # fmt: skip
        )
    return torch.cat(outputs, dim=1)


def with_sinks(
    query: Tensor, key: Tensor, value: Tensor, pattern: DilationPattern, scale: float, sinks: int = SINKS
) -> Tensor:
    """Attend as the pattern says, and to the first ``sinks`` keys as well, each key once (nested sliding patterns)."""
    out, lse = dilated_attention(query, key, value, pattern, scale=scale, return_lse=True)
    batch, heads, length, _ = query.shape
    kv_heads, sinks = key.shape[1], min(sinks, length)
    p = torch.arange(length, device=query.device)[:, None]
    u = torch.arange(sinks, device=query.device)
    reached = torch.zeros(kv_heads, length, sinks, dtype=torch.bool, device=query.device)
    for (w, r), offsets in zip(pattern.branches, pattern.offsets(kv_heads)):
        offset = torch.tensor(offsets, device=query.device)[:, None, None]
        reached |= ((p - u) < w) & ((u % w) % r == offset)
    missing = ~reached & (u <= p)  # [G, L, S]
    missing = missing.repeat_interleave(heads // kv_heads, dim=0)
    first_keys, first_values = (x[:, :, :sinks].repeat_interleave(heads // kv_heads, dim=1) for x in (key, value))
    scores = (query @ first_keys.transpose(-1, -2)).to(lse.dtype) * scale  # [B, H, L, S]
    scores = scores.masked_fill(~missing, float("-inf"))
    total = torch.logsumexp(torch.cat([lse[..., None], scores], dim=-1), dim=-1, keepdim=True)
    weights = (scores - total).exp().to(value.dtype)
    return out * (lse[..., None] - total).exp().to(out.dtype) + weights @ first_values


def with_offset_shift(
    query: Tensor, key: Tensor, value: Tensor, pattern: DilationPattern, scale: float, shift: int
) -> Tensor:
    """Attend as the pattern says if KV head ``g`` had the offsets of head ``g + shift`` (sliding patterns).

    ``pad`` tokens in front move every position: a key then is kept where ``(u + pad) % r`` is the head's offset. An
    extra feature of queries and keys keeps these tokens from being seen.
    """
    pad = -shift % max(pattern.dilation_rates)
    if all(shift % r == 0 for r in pattern.dilation_rates):
        return dilated_attention(query, key, value, pattern, scale=scale)
    length, head_dim = query.shape[2:]
    # One feature counts. Kernels like whole rounds of every rate, and heads of 64 or 128.
    after, features = -(pad + length) % max(pattern.dilation_rates), 64 - head_dim % 64
    far = (800 / scale) ** 0.5  # a score of -800
    query, key, value = (F.pad(x, (0, features, pad, after)) for x in (query, key, value))
    marks = torch.zeros(features, device=query.device, dtype=query.dtype)
    marks[0] = far
    query = query + F.pad(marks, (head_dim, 0))
    hidden = (torch.arange(key.shape[2], device=key.device) < pad)[:, None].to(key.dtype)
    key = key - hidden * F.pad(marks, (head_dim, 0))
    return dilated_attention(query, key, value, pattern, scale=scale)[:, :, pad : pad + length, :head_dim]


def _register(name: str, attend: Callable[..., Tensor]) -> None:
    def attention_forward(module, query, key, value, attention_mask, scaling, dropout=0.0, *, layout, **kwargs):
        if layout.padding_mask is not None or layout.cu_seqlens is not None:
            raise ValueError(f"{name} is an experiment for whole rows: no padding, no packed documents")
        return attend(module, query, key, value, scaling).transpose(1, 2), None

    AttentionInterface.register(name, attention_forward)


def _pattern(module) -> DilationPattern:
    return module.config.layer_pattern(module.layer_idx)


_register(
    "quality_s2",
    lambda module, q, k, v, scale: torch.cat(
        [shifted_segments(*row, module.config.quality_first_segment, scale) for row in _rows(q, k, v)]
    ),
)
_register("quality_sinks", lambda module, q, k, v, scale: with_sinks(q, k, v, _pattern(module), scale))
_register(
    "quality_staggered",
    lambda module, q, k, v, scale: with_offset_shift(q, k, v, _pattern(module), scale, module.layer_idx * k.shape[1]),
)


def _rows(*tensors: Tensor):
    return zip(*(x.split(1) for x in tensors))
