"""The KV cache of a prompt that the ranks of a sequence-parallel group have read together, on every rank."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from .dilation_pattern import DilationPattern
from .logical_positions import PADDING
from .sequence_group import all_gather, gather_numbers


def reachable_later(pattern: DilationPattern, positions: Tensor, seen: Tensor, num_kv_heads: int) -> Tensor:
    """Say which keys a query at or after each row's next position can reach.

    Args:
        positions: ``[B, T]`` logical positions of the keys, -1 where nothing stands.
        seen: ``[B]`` tokens of each row so far: the next position.

    Returns:
        ``[B, G, T]`` bool.
    """
    u = positions[:, None]
    following = seen[:, None, None]
    reachable = torch.zeros(len(positions), num_kv_heads, positions.shape[1], dtype=torch.bool, device=u.device)
    for (w, r), offsets in zip(pattern.branches, pattern.offsets(num_kv_heads)):
        offset = torch.tensor(offsets, device=u.device)[:, None]
        near = (u // w == following // w) if pattern.window == "segment" else (following - u < w)
        reachable |= ((u % w) % r == offset) & near
    return reachable & (u >= 0)


def hold_reachable_keys(cache, key: Tensor, value: Tensor, positions: Tensor, group: dist.ProcessGroup) -> None:
    """Fill an empty layer of a cache with what a query after the last slice can reach, from all ranks' slices.

    Theorem: it then holds what it would hold had this rank read the whole prompt alone. Each rank sends what it has of
    at most ``pattern.cache_entries`` keys per KV head.

    Args:
        cache: a ``LongNetCacheLayer``.
        key, value: ``[B, G, T, D]``, this rank's slice.
        positions: ``[B, T]`` logical positions, -1 for padding.
        group: the ranks, in order of their slices.
    """
    _, num_kv_heads, num_tokens, head_dim = key.shape
    counts = gather_numbers(group, key.device, (positions >= 0).sum(-1).tolist(), "the counting of tokens")
    seen = torch.tensor([sum(row) for row in zip(*counts)], device=key.device)
    needed = reachable_later(cache.pattern, positions, seen, num_kv_heads)  # [B, G, T]
    mine = int(needed.sum(-1).max()) if needed.numel() else 0
    entries = max(number for (number,) in gather_numbers(group, key.device, [mine], "the counting of keys"))
    # A stable sort keeps the entries in order; heads and ranks that have fewer end in entries at position -1.
    order = torch.argsort(needed.logical_not().byte(), dim=-1, stable=True)[..., :entries]
    missing = (0, entries - order.shape[-1])
    rows = order[..., None].expand(-1, -1, -1, head_dim)
    found = torch.where(needed, positions[:, None], PADDING).gather(2, order)
    found = F.pad(found, missing, value=PADDING)
    keys, values = (F.pad(x.gather(2, rows), (0, 0, *missing)) for x in (key, value))

    what = "the exchange of what the cache holds"
    keys, values, found = (torch.cat(all_gather(group, x, what), dim=2) for x in (keys, values, found))
    cache.adopt(keys, values, found, seen, group.size() * num_tokens)
