"""What queries reach among keys that stand anywhere, as ranges of sorted keys.

The keys of one branch that a query reaches lie between its oldest reachable position and itself. Sort them by position
and they are one range, whose two ends never decrease from one query to the next. Where every query is active and every
key counts once, the same holds for the keys whose longest window is that of one branch, and each key is in exactly one
such group.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .cache_slots import NEVER, branch_table
from .dilation_pattern import DilationPattern


GROUP_STRIDE = 2**56  # between the sort keys of two groups, and above all positions


class ReachPass(NamedTuple):
    """Some queries and the keys that they meet together; all passes together hold each pair as often as it counts.

    ``queries [B, G, M]``: indices of the queries in order, None for all of them. ``keys [B * G * N]``: indices of the
    keys of all KV heads, among the ``B * G * S`` there are, in the order that ``first`` and ``stop`` count in.
    ``first, stop [B, G, groups, M]`` int32: the range of keys that each query reaches, per group; empty where
    ``stop <= first``.
    """

    queries: Tensor | None
    keys: Tensor
    first: Tensor
    stop: Tensor


def oldest_reached(pattern: DilationPattern, query_positions: Tensor, num_kv_heads: int) -> Tensor:
    """Find the oldest position that each query reaches in each branch: ``[B, G, T, K]``, NEVER where not active.

    Args:
        query_positions: ``[B, T]`` logical positions, -1 for padding.
        num_kv_heads: G.
    """
    p = query_positions[:, None, :, None]  # [B, 1, T, 1]
    w, r, offset, _ = branch_table(pattern, num_kv_heads, query_positions)[:, None].unbind(-1)  # [G, 1, K]
    first = p - p % w if pattern.window == "segment" else (p - w + 1).clamp(min=0)
    active = p >= 0
    if pattern.dilate_queries:
        active = active & (p % w % r == offset)
    return torch.where(active, first, NEVER)


def plan_ranges(
    pattern: DilationPattern, query_positions: Tensor, key_positions: Tensor, key_branches: Tensor
) -> list[ReachPass]:
    """Plan the passes that a chunk of queries takes over its keys.

    Args:
        pattern: the branches and their rules.
        query_positions: ``[B, T]`` logical positions, ascending but for padding (-1).
        key_positions: ``[B, G, S]``, -1 for entries that hold nothing.
        key_branches: ``[B, G, S]``, bit i set where branch i keeps the key.
    """
    num_kv_heads = key_positions.shape[1]
    oldest = oldest_reached(pattern, query_positions, num_kv_heads)  # [B, G, T, K]
    newest = query_positions[:, None].expand(-1, num_kv_heads, -1)  # [B, G, T]
    if not pattern.dilate_queries and not pattern.count_overlaps:
        return [_pass_by_longest_window(oldest, newest, key_positions, key_branches)]
    return _passes_by_branch(pattern, oldest, newest, key_positions, key_branches)


def _pass_by_longest_window(oldest: Tensor, newest: Tensor, key_positions: Tensor, key_branches: Tensor) -> ReachPass:
    num_branches = oldest.shape[-1]
    branch = torch.arange(num_branches, device=key_positions.device)
    kept = (key_branches[..., None] >> branch) & 1  # [B, G, S, K]
    group = (kept * (branch + 1)).amax(-1)  # 0: what nobody keeps
    order, keys = torch.sort(group * GROUP_STRIDE + key_positions, dim=-1)
    groups = (branch + 1) * GROUP_STRIDE
    edges = torch.cat([groups + oldest.clamp(max=GROUP_STRIDE - 1), groups + (newest + 1)[..., None]], dim=-1)
    found = torch.searchsorted(order, edges.flatten(2)).unflatten(2, edges.shape[2:])  # [B, G, T, 2 K]
    first, stop = found.transpose(2, 3).int().chunk(2, dim=2)
    return ReachPass(None, _of_all_heads(keys, keys.shape[2]), first.contiguous(), stop.contiguous())


def _of_all_heads(keys: Tensor, num_keys: int) -> Tensor:
    """Turn indices ``[B, G, N]`` among the keys of one KV head into such among those of all."""
    firsts = torch.arange(0, keys.shape[0] * keys.shape[1] * num_keys, num_keys, device=keys.device)
    return (keys.flatten(0, 1) + firsts[:, None]).flatten()


def _passes_by_branch(
    pattern: DilationPattern, oldest: Tensor, newest: Tensor, key_positions: Tensor, key_branches: Tensor
) -> list[ReachPass]:
    active = oldest < NEVER  # [B, G, T, K]
    reachable = [
        ((key_branches >> i) & 1 == 1) & (key_positions >= oldest[..., i].amin(-1, keepdim=True))
        for i in range(oldest.shape[-1])
    ]
    # How many queries and keys a pass has at most: the one time that the device is waited for.
    sizes = torch.stack([active.sum(2).amax((0, 1)), torch.stack([x.sum(-1).max() for x in reachable])]).tolist()
    passes = []
    for i, (num_queries, num_keys) in enumerate(zip(*sizes)):
        if not num_queries or not num_keys:
            continue
        order, keys = torch.sort(torch.where(reachable[i], key_positions, NEVER), dim=-1)
        order, keys = order[..., :num_keys], keys[..., :num_keys]
        # Stable: the active queries in their order, then others, which reach nothing.
        queries = (~active[..., i]).to(torch.uint8).argsort(dim=-1, stable=True)[..., :num_queries]
        start = oldest[..., i].gather(2, queries)
        end = newest.gather(2, queries) + 1
        if not pattern.count_overlaps and i:  # the branch before reaches the rest
            end = torch.minimum(end, oldest[..., i - 1].gather(2, queries))
        first, stop = (torch.searchsorted(order.contiguous(), x.contiguous()).int()[:, :, None] for x in (start, end))
        keys = _of_all_heads(keys, key_positions.shape[2])
        passes.append(ReachPass(queries.contiguous(), keys, first.contiguous(), stop.contiguous()))
    return passes
