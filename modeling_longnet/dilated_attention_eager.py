"""The reference backend: dilated attention with dense masks, read straight off the definition.

Needs O(L^2) memory and runs on any device in any floating dtype, float64 included. It also serves the KV cache, where
queries and keys have positions of their own, and anyone who wants the attention weights.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .dilation_pattern import DilationPattern


def count_reaching_branches(
    pattern: DilationPattern,
    num_kv_heads: int,
    query_positions: Tensor,
    key_positions: Tensor,
    *,
    is_causal: bool = True,
    query_documents: Tensor | None = None,
    key_documents: Tensor | None = None,
) -> Tensor:
    """Count through how many branches each query reaches each key: the multiset of the paper's Eq. 9-10.

    Args:
        pattern: the branches and their rules.
        num_kv_heads: G.
        query_positions: ``[B, Lq]`` logical positions, -1 for padding.
        key_positions: ``[B, Lk]``, or ``[B, G, Lk]`` where the KV heads hold different keys; -1 for padding.
        is_causal: whether queries see only keys at or before them.
        query_documents, key_documents: ``[B, Lq]`` and ``[B, Lk]`` document indices; None if each row is one document.

    Returns:
        ``[B, G, Lq, Lk]`` int64; 0 = not reached, and never above 1 unless ``pattern.count_overlaps``.
    """
    p = query_positions[:, None, :, None]  # [B, 1, Lq, 1]
    u = key_positions[:, None] if key_positions.ndim == 2 else key_positions
    u = u[:, :, None, :]  # [B, 1 or G, 1, Lk]

    count = torch.zeros((), dtype=torch.long, device=u.device)
    for (w, r), offsets in zip(pattern.branches, pattern.offsets(num_kv_heads)):
        offset = torch.tensor(offsets, device=u.device)[:, None, None]  # [G, 1, 1]
        reached = (u % w) % r == offset
        if pattern.dilate_queries:
            reached = reached & ((p % w) % r == offset)
        if pattern.window == "segment":
            reached = reached & (u // w == p // w)
        else:
            reached = reached & (p - u < w) & (u - p < w)
        count = count + reached.long()  # [B, G, Lq, Lk]
    if not pattern.count_overlaps:
        count = count.clamp(max=1)

    allowed = (p >= 0) & (u >= 0)
    if is_causal:
        allowed = allowed & (u <= p)
    if query_documents is not None:
        assert key_documents is not None
        allowed = allowed & (query_documents[:, None, :, None] == key_documents[:, None, None, :])
    return count * allowed


def multiset_attention(
    query: Tensor, key: Tensor, value: Tensor, count: Tensor, *, scale: float, dropout: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Attend with one softmax over a multiset of keys: key ``u`` weighs ``count[u] * exp(score[u])``.

    Products run in the input dtype and the softmax in float32 (float64 for float64 inputs), as in transformers.

    Args:
        query: ``[B, H, Lq, D]``.
        key, value: ``[B, G, Lk, D]``, H a multiple of G.
        count: ``[B, G, Lq, Lk]`` integer multiplicities.
        scale: factor on the scores.
        dropout: probability of dropping an attention weight.

    Returns:
        ``(out [B, H, Lq, D], lse [B, H, Lq], weights [B, H, Lq, Lk])``. A query that reaches nothing gives output 0,
        lse -inf and weights 0.
    """
    groups = query.unflatten(1, (key.shape[1], -1))  # [B, G, H/G, Lq, D]
    scores = groups @ key[:, :, None].mT * scale  # [B, G, H/G, Lq, Lk]
    softmax_dtype = torch.promote_types(scores.dtype, torch.float32)
    count = count[:, :, None]
    scores = scores.to(softmax_dtype) + count.clamp(min=1).to(softmax_dtype).log()
    scores = scores.masked_fill(count == 0, float("-inf"))

    # The maximum cancels in the quotient, so it needs no gradient; the clamp keeps -inf - -inf away.
    if scores.shape[-1]:
        maximum = scores.detach().amax(-1, keepdim=True).clamp_min(torch.finfo(softmax_dtype).min)
    else:
        maximum = scores.new_zeros(*scores.shape[:-1], 1)
    weights = torch.exp(scores - maximum)
    total = weights.sum(-1, keepdim=True)
    # A query that reaches a key has total >= 1 (its best key weighs 1): the clamp only turns 0 / 0 into 0.
    lse = torch.where(total > 0, total.clamp_min(1.0).log() + maximum, float("-inf"))
    weights = (weights / total.clamp_min(1.0)).to(query.dtype).flatten(1, 2)  # [B, H, Lq, Lk]

    dropped = F.dropout(weights, dropout).unflatten(1, groups.shape[1:3])
    out = dropped @ value[:, :, None]  # [B, G, H/G, Lq, D]
    return out.flatten(1, 2), lse.squeeze(-1).flatten(1, 2), weights


def eager_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: DilationPattern,
    *,
    positions: Tensor,
    documents: Tensor | None,
    is_causal: bool,
    scale: float,
    dropout: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute dilated attention over dense ``[L, L]`` masks.

    Args:
        query: ``[B, H, L, D]``.
        key, value: ``[B, G, L, D]``.
        pattern: the branches and their rules.
        positions: ``[B, L]`` logical positions, -1 for padding.
        documents: ``[B, L]`` document indices, None if each row is one document.
        is_causal, scale, dropout: as in ``dilated_attention``.

    Returns:
        ``(out, lse, weights)`` as ``multiset_attention``; padded queries give output 0 and lse -inf.
    """
    # What stands in a padded row or its gradient, NaN included, must not touch the others through 0 * NaN.
    padding = (positions < 0)[:, None, :, None]
    query, key, value = (x.masked_fill(padding, 0) for x in (query, key, value))
    count = count_reaching_branches(
        pattern,
        key.shape[1],
        positions,
        positions,
        is_causal=is_causal,
        query_documents=documents,
        key_documents=documents,
    )
    out, lse, weights = multiset_attention(query, key, value, count, scale=scale, dropout=dropout)
    return out.masked_fill(padding, 0), lse, weights
