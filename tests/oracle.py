"""Dilated attention by brute force in float64, straight from its definition.

Shares no code with the package: patterns come as plain numbers, strings and booleans, reach is decided one
(query, key) pair at a time in Python, and the softmax is one dense formula. Exact gradients come from autograd through
that formula. Everything here is slow on purpose.

Positions are logical: the index of a real token inside its own document. Padding has none.
"""

import math
from itertools import pairwise

import torch
from torch import Tensor


def times_reached(
    query: int,
    key: int,
    kv_head: int,
    num_kv_heads: int,
    *,
    segment_lengths,
    dilation_rates,
    head_offsets: str,
    count_overlaps: bool,
    dilate_queries: bool,
    window: str,
    is_causal: bool,
) -> int:
    """Count how often the query at one position reaches the key at another: its weight in the softmax.

    Args:
        query: logical position of the query.
        key: logical position of the key in the same document.
        kv_head: KV head that serves the query's head.
        num_kv_heads: number of KV heads.
    """
    times = 0
    for w, r in zip(segment_lengths, dilation_rates):
        offset = {"interleaved": kv_head % r, "blocked": kv_head // math.ceil(num_kv_heads / r)}[head_offsets]
        kept = (key % w) % r == offset
        active = (query % w) % r == offset or not dilate_queries
        near = {"segment": query // w == key // w, "sliding": abs(query - key) < w}[window]
        visible = key <= query or not is_causal
        times += kept and active and near and visible
    return times if count_overlaps else min(times, 1)


def documents(batch: int, length: int, attention_mask=None, cu_seqlens=None) -> list[list[list[int]]]:
    """List, per batch row, its documents, each as the row indices of its tokens in order of position.

    Args:
        attention_mask: ``[B, L]``, nonzero marks a real token; the real tokens of a row are one document.
        cu_seqlens: ``[n + 1]``, the boundaries of n documents packed into the only row.
    """
    if cu_seqlens is not None:
        return [[list(range(start, stop)) for start, stop in pairwise(cu_seqlens.tolist())]]
    if attention_mask is None:
        return [[list(range(length))] for _ in range(batch)]
    return [[[index for index in range(length) if row[index]]] for row in attention_mask.tolist()]


def multiplicities(documents_per_row, length: int, num_heads: int, num_kv_heads: int, **rules) -> Tensor:
    """Tabulate ``times_reached`` for every pair of row indices, 0 across documents and for padding.

    Returns:
        float64 ``[B, H, L, L]``, queries before keys.
    """
    table = torch.zeros(len(documents_per_row), num_kv_heads, length, length, dtype=torch.float64)
    for row, row_documents in enumerate(documents_per_row):
        for document in row_documents:
            if not document:
                continue
            index = torch.tensor(document)
            positions = range(len(document))
            for kv_head in range(num_kv_heads):
                times = [[times_reached(p, u, kv_head, num_kv_heads, **rules) for u in positions] for p in positions]
                table[row, kv_head][index[:, None], index[None, :]] = torch.tensor(times, dtype=torch.float64)
    return table.repeat_interleave(num_heads // num_kv_heads, dim=1)


def dilated_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    segment_lengths,
    dilation_rates,
    head_offsets: str,
    count_overlaps: bool,
    dilate_queries: bool,
    window: str,
    is_causal: bool = True,
    attention_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    scale: float | None = None,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """Compute the output and the lse of dilated attention, differentiable.

    A query that reaches nothing gives output 0 and lse -inf. Padded rows are replaced by zeros before anything else,
    so whatever lies there has no influence and gradient 0.

    Args:
        query: ``[B, H, L, D]``.
        key: ``[B, G, L, D]``.
        value: ``[B, G, L, D]``.
        dtype: dtype of every step; float64 is the definition, a lower one shows the rounding error of the formula.

    Returns:
        Output ``[B, H, L, D]`` and lse ``[B, H, L]``, natural log, both in ``dtype``.
    """
    batch, num_heads, length, head_dim = query.shape
    num_kv_heads = key.shape[1]
    documents_per_row = documents(batch, length, attention_mask, cu_seqlens)
    times = multiplicities(
        documents_per_row,
        length,
        num_heads,
        num_kv_heads,
        segment_lengths=segment_lengths,
        dilation_rates=dilation_rates,
        head_offsets=head_offsets,
        count_overlaps=count_overlaps,
        dilate_queries=dilate_queries,
        window=window,
        is_causal=is_causal,
    ).to(query.device, dtype)  # [B, H, L, L]

    padded = torch.ones(batch, 1, length, 1, dtype=torch.bool)
    for row, row_documents in enumerate(documents_per_row):
        padded[row, 0, [index for document in row_documents for index in document]] = False
    query, key, value = (x.to(dtype).masked_fill(padded.to(x.device), 0) for x in (query, key, value))
    key = key.repeat_interleave(num_heads // num_kv_heads, dim=1)  # [B, H, L, D]
    value = value.repeat_interleave(num_heads // num_kv_heads, dim=1)

    scale = head_dim**-0.5 if scale is None else scale
    scores = (query @ key.mT * scale).masked_fill(times == 0, -torch.inf)  # [B, H, L, L]
    covered = (times > 0).any(dim=-1, keepdim=True)
    # The shift cancels; any finite one does for a query that reaches nothing.
    largest = scores.detach().max(dim=-1, keepdim=True).values if length else scores.new_zeros(*scores.shape[:3], 1)
    largest = largest.where(covered, 0)
    weights = times * torch.exp(scores - largest)
    total = weights.sum(dim=-1, keepdim=True).where(covered, 1)  # [B, H, L, 1]
    output = weights / total @ value  # [B, H, L, D]
    lse = (largest + total.log()).where(covered, -torch.inf).squeeze(-1)  # [B, H, L]
    return output, lse
