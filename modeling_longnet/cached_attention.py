"""Attention of new queries over cached keys, each with a logical position of its own."""

import logging
from typing import NamedTuple

import torch
from torch import Tensor

from .cached_attention_triton import attend_decoding, attend_ranges, fused_refusal, serves_as_decoding
from .dilated_attention_eager import count_reaching_branches, multiset_attention
from .dilation_pattern import DilationPattern
from .once_per_pass import OncePerPass
from .reach_ranges import oldest_reached, plan_ranges


logger = logging.getLogger(__name__)

# Queries are taken in chunks of at most this many (row, KV head, query, key) quadruples, so that a long prompt over a
# full cache needs bounded memory.
PAIRS_PER_CHUNK = 2**24
# Longer chunks meet only those keys that one of so many queries reaches, so that time is linear in the chunk.
QUERIES_PER_CHUNK = 512


class CachedKeys(NamedTuple):
    """Keys and values that stand anywhere: ``[B, G, S, D]``, with positions and branches ``[B, G, S]``.

    Empty entries have position -1. Bit i of ``branches`` is set where branch i keeps the key.
    """

    keys: Tensor
    values: Tensor
    positions: Tensor
    branches: Tensor


def cached_attention(
    query: Tensor,
    cached: CachedKeys,
    pattern: DilationPattern,
    *,
    query_positions: Tensor,
    scale: float,
    dropout: float = 0.0,
    return_weights: bool = False,
    once: OncePerPass | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Attend causally from queries to keys that stand anywhere in memory, by their positions alone.

    Theorem: with every reachable key present, the result is the rows of ``dilated_attention`` for these queries. Fused
    kernels serve CUDA tensors without gradients; everything else is plain PyTorch.

    Args:
        query: ``[B, H, T, D]``.
        cached: the keys, in any order.
        pattern: the branches and their rules.
        query_positions: ``[B, T]`` logical positions, ascending but for padding (-1).
        scale, dropout: as in ``dilated_attention``.
        return_weights: also return the attention weights.
        once: shares what does not depend on the layer, among calls with the same tensor of positions whose keys stand
            at the same positions.

    Returns:
        ``(out [B, H, T, D], weights [B, H, T, S] or None)``; a query that reaches nothing gives 0.
    """
    key = cached.keys
    refusal = fused_refusal(query, pattern, dropout)
    if refusal is None and return_weights:
        refusal = "the fused kernels have no attention weights to show"
    if refusal is None and torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, cached.values)):
        refusal = "the fused kernels over cached keys have no gradients"
    if refusal is not None:
        if not torch.compiler.is_compiling():
            logger.debug("plain PyTorch attends over the cache: %s", refusal)
        return _attend_plainly(query, cached, pattern, query_positions, scale, dropout, return_weights)

    once = OncePerPass() if once is None else once
    num_kv_heads = key.shape[1]
    if serves_as_decoding(query, key):
        oldest = once(
            query_positions, (pattern, num_kv_heads), lambda: oldest_reached(pattern, query_positions, num_kv_heads)
        )
        out = attend_decoding(
            query, *cached, oldest, query_positions, count_overlaps=pattern.count_overlaps, scale=scale
        )
        return out, None
    passes = once(
        query_positions, (pattern, key.shape[:3]),
        lambda: plan_ranges(pattern, query_positions, cached.positions, cached.branches),
    )  # fmt: skip
    return attend_ranges(query, key, cached.values, passes, scale=scale)[0], None


def _attend_plainly(
    query: Tensor, cached: CachedKeys, pattern: DilationPattern, query_positions: Tensor, scale: float,
    dropout: float, return_weights: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    batch, num_kv_heads, num_keys, _ = cached.keys.shape
    chunk = max(1, PAIRS_PER_CHUNK // max(1, batch * num_kv_heads * num_keys))
    leaves_out = not return_weights and query.shape[2] >= 2 * QUERIES_PER_CHUNK
    if leaves_out:
        chunk = QUERIES_PER_CHUNK
    outs, weights = [], []
    for first in range(0, query.shape[2], chunk):
        queries = slice(first, first + chunk)
        positions = query_positions[:, queries]
        keys, values, key_positions, _ = _within_reach(cached, pattern, positions) if leaves_out else cached
        count = count_reaching_branches(pattern, num_kv_heads, positions, key_positions)
        out, _, chunk_weights = multiset_attention(
            query[:, :, queries], keys, values, count, scale=scale, dropout=dropout
        )
        outs.append(out)
        if return_weights:
            weights.append(chunk_weights)
    return torch.cat(outs, dim=2), torch.cat(weights, dim=2) if return_weights else None


def _within_reach(cached: CachedKeys, pattern: DilationPattern, query_positions: Tensor) -> CachedKeys:
    """Leave out the keys that none of these queries reaches."""
    num_kv_heads = cached.keys.shape[1]
    oldest = oldest_reached(pattern, query_positions, num_kv_heads).amin(2, keepdim=True)  # [B, G, 1, K]
    needed = torch.zeros_like(cached.positions, dtype=torch.bool)
    for i in range(oldest.shape[-1]):
        needed |= ((cached.branches >> i) & 1 == 1) & (cached.positions >= oldest[..., i])
    needed &= cached.positions <= query_positions.amax(-1)[:, None, None]
    order = needed.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)[..., : int(needed.sum(-1).max())]
    rows = order[..., None].expand(-1, -1, -1, cached.keys.shape[-1])
    return CachedKeys(
        cached.keys.gather(2, rows), cached.values.gather(2, rows), cached.positions.gather(2, order),
        cached.branches.gather(2, order),
    )  # fmt: skip
