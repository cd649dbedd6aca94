"""Where each token stands in a cache of fixed size: one slot, fixed by its position, written once and never moved.

A token is kept for its longest window: among the branches that keep it, the one with the largest segment length. The
tokens of one such branch form a ring that is as large as the most of them that one window can hold, so a slot is taken
over exactly when nothing can reach what stood there. Every token is stored once, and in a nested pattern the rings
together hold ``DilationPattern.cache_entries`` tokens per KV head, no more.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .dilation_pattern import DilationPattern


MAX_BRANCHES = 63  # as many have a bit in Places.branches
NEVER = 2**62  # no position and no slot is as high


class Ring(NamedTuple):
    """The slots ``base ... base + size - 1``, of tokens whose longest window is that of one branch."""

    branch: int
    base: int
    size: int


class Places(NamedTuple):
    """Where tokens stand, each field ``[B, G, T]`` int64.

    ``branches``: bit i is set where branch i keeps the token. Padding, and what no branch keeps, stands in the slot
    after the last, with no bit.
    """

    slots: Tensor
    branches: Tensor


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
        return Places(slots, branches)

    def newest(self, seen: Tensor, num_kv_heads: int) -> tuple[Tensor, Tensor]:
        """Say which token is the last that came to each slot, a few operators for any number of tokens.

        Theorem: numbered from 0, token j of a ring takes slot j modulo the ring's size. So the last token of a slot
        follows from how many tokens of the ring there are before ``seen``. One that only a shorter window of a pattern
        that is not nested has there counts as none: its slot's token is out of reach.

        Args:
            seen: ``[B]`` tokens so far, the next position.
            num_kv_heads: G.

        Returns:
            Positions and branches ``[B, G, capacity + 1]``; -1 and no bit where no token came, and in the last slot.
        """
        ends, ranks, of_rings, of_slots = _on_device(_ring_tables, seen, self, num_kv_heads)
        slots = torch.arange(self.capacity + 1, device=seen.device)
        ring = torch.searchsorted(ends, slots, right=True)
        step, first, size, shift, every, rate, offset = of_slots.index_select(1, ring).unbind(-1)  # [G, capacity + 1]
        shifts, rates = of_rings.unbind(-1)  # [G, R + 1, 2]
        in_branch, beyond = ((seen[:, None, None, None] + shifts) // rates).unbind(-1)
        last = (in_branch - beyond).index_select(2, ring)  # [B, G, capacity + 1], the number of the ring's last token
        number = last - (last - (slots * step + first)) % size
        positions = ((number + (number + shift) // every) * rate + offset).clamp(min=-1)
        kept, branches = self._kept(positions)
        if not self.is_linear and not self.pattern.is_nested:
            stands = (kept * ranks).amax(-1) == ring + 1
            positions = torch.where(stands, positions, -1)
            branches = torch.where(stands, branches, 0)
        return positions, branches

    def branches_of(self, positions: Tensor, num_kv_heads: int) -> Tensor:
        """Say which branches keep the tokens at ``positions [B, 1 or G, T]``, as ``Places.branches``."""
        return self._kept(positions.expand(-1, num_kv_heads, -1))[1]

    def _kept(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Say for each branch whether it keeps the tokens at ``positions [B, G, T]``: ``[B, G, T, K]``, and as bits."""
        w, r, offset, bit = branch_table(self.pattern, positions.shape[1], positions)[:, None].unbind(-1)  # [G, 1, K]
        u = positions[..., None]
        kept = (u % w % r == offset) & (u >= 0)
        return kept, (kept * bit).sum(-1)

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


def branch_table(pattern: DilationPattern, num_kv_heads: int, like: Tensor) -> Tensor:
    """Return segment length, dilation rate, offset and bit of each branch: ``[G, K, 4]`` on the device of ``like``."""
    return _on_device(_branch_table, like, pattern, num_kv_heads)


def _on_device(make: Callable[..., Any], like: Tensor, *args: Any) -> Any:
    """Return ``make(*args, device)``, kept from call to call where it is a value and no step of a recording."""
    recorded = torch.compiler.is_compiling() or type(like) is not Tensor
    if recorded or (like.is_cuda and torch.cuda.is_current_stream_capturing()):
        return make(*args, like.device)
    return _kept_on_device(make, *args, like.device)


@lru_cache(maxsize=1024)
def _kept_on_device(make: Callable[..., Any], *args: Any) -> Any:
    made = make(*args)
    if args[-1].type == "cuda":  # other streams will read it, too
        torch.cuda.current_stream(args[-1]).synchronize()
    return made


def _branch_table(pattern: DilationPattern, num_kv_heads: int, device: torch.device) -> Tensor:
    heads = torch.arange(num_kv_heads, device=device)[:, None]
    columns = []
    for i, (w, r) in enumerate(pattern.branches):
        numbers = [torch.full_like(heads, x) for x in (w, r, 1 << i if i < MAX_BRANCHES else 0)]
        columns.append(torch.cat([*numbers[:2], offset_of_heads(pattern, i, heads), numbers[2]], dim=1))
    return torch.stack(columns, dim=1)


def _ring_tables(slots: CacheSlots, num_kv_heads: int, device: torch.device) -> tuple[Tensor, ...]:
    """Return what ``newest`` knows of rings and, as one more ring, of the last slot, which takes no token.

    Returns:
        Where rings end ``[R]``; which ring each branch has ``[K]``, from 1, 0 for none; two (shift, rate)
        ``[G, R + 1, 2, 2]``, so that ``(n + shift) // rate``, the first less the second, is the number of a ring's last
        token before position n; and ``[G, R + 1, 7]``: step, first, size, so that slot x takes the tokens of numbers
        ``x * step + first`` modulo size, and shift, every, rate, offset, so that number j is at position
        ``(j + (j + shift) // every) * rate + offset``, beyond those in the next ring.
    """
    pattern = slots.pattern
    counts, rules = [], []
    for head in range(num_kv_heads):
        for ring, inner in zip(slots.rings, (*slots.rings[1:], None)):
            w, r = pattern.branches[ring.branch]
            s = pattern.offset(ring.branch, head, num_kv_heads)
            if slots.is_linear:
                counts.append([[0, 1], [NEVER, NEVER]])
                rules.append([1, 0, slots.length, 0, NEVER, 1, 0])
            elif not pattern.is_nested:  # every position has a number, and slots are those of a segment's phases
                counts.append([[0, 1], [NEVER, NEVER]])
                rules.append([r, s - ring.base * r, w, 0, NEVER, 1, 0])
            elif inner is None:
                counts.append([[r - 1 - s, r], [NEVER, NEVER]])
                rules.append([1, -ring.base, ring.size, 0, NEVER, r, s])
            else:
                inner_r = pattern.branches[inner.branch].dilation_rate
                inner_s = pattern.offset(inner.branch, head, num_kv_heads)
                every = inner_r // r - 1
                counts.append([[r - 1 - s, r], [2 * inner_r - 1 - inner_s, inner_r]])
                rules.append([1, -ring.base, ring.size, every - (inner_s - s) // r, every, r, s])
        counts.append([[0, 1], [NEVER, NEVER]])
        rules.append([0, NEVER // 2, NEVER, 0, NEVER, 1, 0])
    ends = [ring.base + ring.size for ring in slots.rings]
    ranks = [0] * len(pattern.branches)
    for rank, ring in enumerate(slots.rings, 1):
        ranks[ring.branch] = rank
    shape = (num_kv_heads, len(slots.rings) + 1)
    tables = (torch.tensor(x, device=device).unflatten(0, shape) for x in (counts, rules))
    return torch.tensor(ends, device=device), torch.tensor(ranks, device=device), *tables


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
