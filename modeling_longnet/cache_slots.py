"""Where each token stands in a cache of fixed size: one slot, fixed by its position, written once and never moved.

A token is kept for its longest window: among the branches that keep it, the one with the largest segment length. The
tokens of one such branch form a ring that is as large as the most of them that one window can hold, so a slot is taken
over exactly when nothing can reach what stood there. Every token is stored once, and in a nested pattern the rings
together hold ``DilationPattern.cache_entries`` tokens per KV head, no more.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from .dilation_pattern import DilationPattern


MAX_BRANCHES = 63  # as many have a bit in Places.branches


class Ring(NamedTuple):
    """The slots ``base ... base + size - 1``, of tokens whose longest window is that of one branch."""

    branch: int
    base: int
    size: int


class Places(NamedTuple):
    """Where tokens stand, each field ``[B, G, T]`` int64.

    ``branches``: bit i is set where branch i keeps the token. ``lifetimes``: tokens after which its slot is free.
    Padding, and what no branch keeps, stands in the slot after the last, with no bit and no lifetime.
    """

    slots: Tensor
    branches: Tensor
    lifetimes: Tensor


class CacheSlots(NamedTuple):
    """The slots for sequences of up to ``length`` tokens, or of any length if ``endless``."""

    pattern: DilationPattern
    length: int
    rings: tuple[Ring, ...]
    is_linear: bool
    capacity: int

    @property
    def is_endless(self) -> bool:
        """Whether any number of tokens fits, because every window is whole."""
        return self.length >= max(self.pattern.segment_lengths)

    def locate(self, positions: Tensor, num_kv_heads: int) -> Places:
        """Say where tokens stand.

        Args:
            positions: ``[B, 1 or G, T]`` logical positions, -1 for padding.
            num_kv_heads: G.
        """
        u = positions
        shape = (u.shape[0], num_kv_heads, u.shape[2])
        heads = torch.arange(num_kv_heads, device=u.device)[:, None]  # [G, 1]
        kept = [
            ((u % w) % r == offset_of_heads(self.pattern, i, heads)) & (u >= 0)
            for i, (w, r) in enumerate(self.pattern.branches)
        ]
        branches = torch.zeros(shape, dtype=torch.int64, device=u.device)
        for i, of_branch in enumerate(kept[:MAX_BRANCHES]):
            branches = branches + (of_branch.long() << i)
        slots = torch.full(shape, self.capacity, dtype=torch.int64, device=u.device)
        lifetimes = torch.zeros_like(slots)
        for ring, inner in zip(self.rings, (*self.rings[1:], None)):  # later rings have longer windows, and win
            w, r = self.pattern.branches[ring.branch]
            if self.is_linear:
                slot = u % self.length
            elif self.pattern.is_nested:
                slot = self._kept_before(u, ring.branch, heads)
                if inner is not None:  # count only what is not in the later rings
                    slot = slot - self._kept_before(u, inner.branch, heads)
                slot = slot % ring.size
            else:  # every phase of the segment occurs once in a window
                slot = (u % w) // r
            here = u >= 0 if self.is_linear else kept[ring.branch]
            slots = torch.where(here, ring.base + slot, slots)
            lifetimes = torch.where(here, self.length if self.is_linear else w, lifetimes)
        return Places(slots, branches, lifetimes)

    def _kept_before(self, u: Tensor, branch: int, heads: Tensor) -> Tensor:
        """Count the tokens before u that a branch of a nested pattern keeps."""
        rate = self.pattern.dilation_rates[branch]
        return (u - offset_of_heads(self.pattern, branch, heads) + rate - 1) // rate


def offset_of_heads(pattern: DilationPattern, branch: int, heads: Tensor) -> Tensor:
    """Compute ``DilationPattern.offset`` of all KV heads ``[G, 1]`` of a call, without a copy from the host."""
    rate = pattern.dilation_rates[branch]
    first, all_heads = pattern.held_heads or (0, heads.shape[0])
    if pattern.head_offsets == "interleaved":
        return (heads + first) % rate
    return (heads + first) // -(-all_heads // rate)


@lru_cache(maxsize=4096)
def plan_slots(pattern: DilationPattern, length: int) -> CacheSlots:
    """Plan the slots for sequences of up to ``length`` tokens.

    Where the rings would need no less room than the tokens themselves, those are one ring.
    """
    branches = list(enumerate(pattern.branches))
    if pattern.is_nested:
        # A window beyond the length holds everything, and what longer ones keep is a part of it.
        last = next((i for i, (w, _) in branches if w >= length), len(branches) - 1)
        branches = branches[: last + 1]
    branches.sort(key=lambda item: item[1].segment_length)
    rings, base = [], 0
    for k, (i, (w, r)) in enumerate(branches):
        size = -(-min(w, length) // r)
        if pattern.is_nested and k + 1 < len(branches):
            size -= w // branches[k + 1][1].dilation_rate
        if size:
            rings.append(Ring(i, base, size))
        base += size
    if base >= length:
        return CacheSlots(pattern, length, (Ring(branches[-1][0], 0, length),), True, length)
    return CacheSlots(pattern, length, tuple(rings), False, base)
