"""Attention of new queries over cached keys, each with a logical position of its own."""

import torch
from torch import Tensor

from .dilated_attention_eager import count_reaching_branches, multiset_attention
from .dilation_pattern import DilationPattern


# Queries are taken in chunks of at most this many (row, KV head, query, key) quadruples, so that a long prompt over a
# full cache needs bounded memory.
PAIRS_PER_CHUNK = 2**24


def cached_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: DilationPattern,
    *,
    query_positions: Tensor,
    key_positions: Tensor,
    scale: float,
    dropout: float = 0.0,
    return_weights: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Attend causally from queries to keys that stand anywhere in memory, by their positions alone.

    Theorem: with every reachable key present, the result is the rows of ``dilated_attention`` for these queries.

    Args:
        query: ``[B, H, T, D]``.
        key, value: ``[B, G, S, D]``, in any order.
        pattern: the branches and their rules.
        query_positions: ``[B, T]`` logical positions, -1 for padding.
        key_positions: ``[B, G, S]`` logical positions, -1 for entries that hold nothing.
        scale, dropout: as in ``dilated_attention``.
        return_weights: also return the attention weights.

    Returns:
        ``(out [B, H, T, D], weights [B, H, T, S] or None)``; a query that reaches nothing gives 0.
    """
    batch, num_kv_heads, num_keys, _ = key.shape
    chunk = max(1, PAIRS_PER_CHUNK // max(1, batch * num_kv_heads * num_keys))
    outs, weights = [], []
    for first in range(0, query.shape[2], chunk):
        queries = slice(first, first + chunk)
        count = count_reaching_branches(pattern, num_kv_heads, query_positions[:, queries], key_positions)
        out, _, chunk_weights = multiset_attention(
            query[:, :, queries], key, value, count, scale=scale, dropout=dropout
        )
        outs.append(out)
        if return_weights:
            weights.append(chunk_weights)
    return torch.cat(outs, dim=2), torch.cat(weights, dim=2) if return_weights else None
