"""Which tile comes when in the Hopper kernels, and after whom: integer arithmetic, nothing but kernels.

Programs draw their tiles, but for the first. In the backward of one kernel, the tiles that meet a block of queries add
to its gradient one after the other, the last one first. A tile's predecessor is therefore the tile after it in its
progression; where that one does not meet a block, no later one does, and the tile is the block's first.
"""

from typing import Any, NamedTuple

from .dilated_attention_tile_kernels import BEFORE, _band, _block_range, _count_before, _document, _offset, _tile


try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("the fused kernels need triton; install it or use another backend") from error


class Work(NamedTuple):
    """All tiles of a launch, to be drawn.

    A *class* is a place in a period (or a slot of packed documents); ``runs`` of tiles, one per head and period, have
    one tile in each class. ``together`` runs are worked off at a time, longest class first. A launch that has to come
    after another counts what it has finished; ``before`` is what the launches before count. Keys do so for each lane (KV
    head of one row of the batch), queries for each stretch of a head's rows, of which the last may be shorter.
    """

    heads: Any
    cu_seqlens_ptr: Any
    length: Any
    num_documents: Any
    search_steps: Any
    period: Any
    tiles_per_period: Any
    windows: Any
    previous_windows: Any
    rates: Any
    classes: Any
    periods: Any
    runs: Any
    together: Any
    tiles: Any
    drawn_ptr: Any
    finished_ptr: Any = None
    before: Any = 0
    stretch: Any = 1
    stretches: Any = 1
    before_in_last: Any = 0


class OrderedWork(NamedTuple):
    """All tiles of a launch whose sums are added up in a fixed order, to be drawn.

    A *class* is a place in a period (or a slot of packed documents); a *run* of tiles, one per lane and period, has
    one tile in each class; a *lane* is a KV head of one row of the batch. Runs are worked off one after the other, last
    class first. ``before`` counts a lane's tiles in the launches before.
    """

    heads: Any
    first_lane: Any
    cu_seqlens_ptr: Any
    length: Any
    num_documents: Any
    search_steps: Any
    period: Any
    tiles_per_period: Any
    window: Any
    previous_window: Any
    rate: Any
    classes: Any
    periods: Any
    runs: Any
    tiles: Any
    first_mark: Any
    drawn_ptr: Any
    finished_ptr: Any
    before: Any


@triton.jit
def _locate(index, work, V: tl.constexpr):
    """Find the tile of a number: its head, KV head, batch row, document, and its rows. Long tiles come first."""
    at_once = work.together * work.classes
    before = index // at_once * work.together
    rest = index % at_once
    size = tl.maximum(tl.minimum(work.together, work.runs - before), 1)
    run = before + rest % size
    slot = run % work.periods * work.classes + rest // size
    run = run // work.periods
    head, batch = run % work.heads, run // work.heads
    kv_head = head if V.from_key else head // V.group
    rate = work.rates[0] if V.dilate or V.from_key else 1
    start, tokens, tile = _document(
        work.cu_seqlens_ptr, work.cu_seqlens_ptr, slot, batch, work.length, work.num_documents, work.search_steps,
        work.period, work.tiles_per_period, rate * V.block_m, V.packed, False,
    )  # fmt: skip
    offset = _offset(kv_head, rate, V.num_kv_heads, V.blocked) if V.dilate or V.from_key else 0
    base, x_first, x_last, count = _tile(
        tile, offset, rate, tokens, work.period, work.tiles_per_period,
        V.side == BEFORE and not V.from_key, V.block_m,
    )  # fmt: skip
    return head, kv_head, batch, start, tokens, base, x_first, x_last, tl.where(index < work.tiles, count, 0)


@triton.jit
def _stretch_of(batch, head, row, work):
    """Return the place of the counter of the stretch that a tile of queries lies in, and how far it has to be."""
    stretch = row // work.stretch
    last = stretch == work.stretches - 1
    return (batch * work.heads + head) * work.stretches + stretch, tl.where(last, work.before_in_last, work.before)


@triton.jit
def _lone_blocks(
    x_first, count, own_rate, tokens, window, previous_window, base, rate, first, stop, blocks, V: tl.constexpr
):
    """Count the blocks that only one half of a tile of keys may meet: at the beginning the first half, at the end the second.

    A tile's keys may lie far apart: of a branch of rate r, whose keys are met by 1,024 r queries each, a tile of 128 walks
    through 1,152 r.
    """
    half = V.block_m // 2
    middle = x_first + own_rate * half
    start, _ = _band(middle, window, previous_window, tokens, True, V.side, V.sliding, V.disjoint)
    _, end = _band(middle - own_rate, window, previous_window, tokens, True, V.side, V.sliding, V.disjoint)
    begins = _count_before(start, base, rate) - first
    ends = tl.minimum(_count_before(end, base, rate), stop) - first
    heads = tl.minimum(tl.maximum(begins, 0) // V.block_n, blocks)
    tails = tl.minimum(blocks - (tl.maximum(ends, 0) + V.block_n - 1) // V.block_n, blocks - heads)
    both = count > half
    return tl.where(both, heads, 0), tl.where(both, tails, 0)


@triton.jit
def _in_order(n, blocks, head, tail):
    """Return the n-th block to visit: the masked ones at the edges first, then those that every row meets whole."""
    edges = head + blocks - tail
    return tl.where(n < head, n, tl.where(n < edges, n - head + tail, n - edges + head))


@triton.jit
def _shared_blocks(blocks, head, tail, heads, tails):
    """Return how many blocks both halves of a tile of keys may meet, and where those begin and end that all rows meet whole."""
    shared = blocks - heads - tails
    inner = tl.minimum(tl.maximum(head - heads, 0), shared)
    return shared, inner, tl.minimum(tl.maximum(tail - heads, inner), shared)


@triton.jit
def _in_step(n, first, blocks, head, tail, BLOCK: tl.constexpr):
    """Return the n-th block of queries to visit: as ``_in_order``, but those in the middle in step with other tiles.

    Tiles of keys that are at work at a time lie side by side, and most of the queries that they meet are the same. Each
    tile goes round its middle once, from the block whose number is a multiple of their count: all tiles are at the same
    blocks at the same time, which come from memory once. ``first``: the term that block 0 begins with.
    """
    edges = head + blocks - tail
    middle = tl.maximum(tail - head, 1)
    turned = n - edges + middle - (first // BLOCK + head) % middle
    turned = tl.where(turned < middle, turned, turned - middle)
    return tl.where(n < head, n, tl.where(n < edges, n - head + tail, head + turned))


@triton.jit
def _in_pairs(n, first, blocks, head, tail, heads, tails, BLOCK: tl.constexpr):
    """Return the n-th block to visit where the halves of a tile of keys pass over ``tails`` and ``heads`` blocks.

    These come first, one of each in turn, so that both halves have work at any time; then the others, in step.
    """
    pairs = tl.minimum(heads, tails)
    lone = heads + tails
    in_pair = tl.where(n % 2 == 0, n // 2, blocks - 1 - n // 2)
    left_over = tl.where(heads > tails, n - pairs, blocks - 1 - (n - pairs))
    shared, inner, outer = _shared_blocks(blocks, head, tail, heads, tails)
    both = heads + _in_step(n - lone, first + heads * BLOCK, shared, inner, outer, BLOCK)
    return tl.where(n < 2 * pairs, in_pair, tl.where(n < lone, left_over, both))


@triton.jit
def _placed(index, tiles):
    """Return the slot, KV head, batch row and lane (counted from the launch's first) of the tile of a number."""
    run = index // tiles.classes
    slot = run % tiles.periods * tiles.classes + (tiles.classes - 1 - index % tiles.classes)
    lane = run // tiles.periods
    at = lane + tiles.first_lane
    return slot, at % tiles.heads, at // tiles.heads, lane


@triton.jit
def _rows_of(slot, batch, kv_head, tiles, V: tl.constexpr):
    """Return a tile's document, its tokens, the base of its progression, its first and last row, and their number."""
    start, tokens, tile = _document(
        tiles.cu_seqlens_ptr, tiles.cu_seqlens_ptr, slot, batch, tiles.length, tiles.num_documents,
        tiles.search_steps, tiles.period, tiles.tiles_per_period, tiles.rate * V.block_m, V.packed, False,
    )  # fmt: skip
    offset = _offset(kv_head, tiles.rate, V.num_kv_heads, V.blocked)
    base, x_first, x_last, count = _tile(
        tile, offset, tiles.rate, tokens, tiles.period, tiles.tiles_per_period, False, V.block_m
    )
    return start, tokens, base, x_first, x_last, count


@triton.jit
def _blocks_met(x_first, x_last, tokens, base, rate, tiles, V: tl.constexpr):
    """Return what a tile of keys meets, in whole blocks of the queries' progression, as ``_block_range`` does."""
    start_first, end_first = _band(
        x_first, tiles.window, tiles.previous_window, tokens, True, V.side, V.sliding, V.disjoint
    )
    start_last, end_last = _band(
        x_last, tiles.window, tiles.previous_window, tokens, True, V.side, V.sliding, V.disjoint
    )
    return _block_range(start_first, start_last, end_first, end_last, base, rate, V.block_n, True)


@triton.jit
def _met_by_next(slot, batch, kv_head, own_base, base, rate, tiles, V: tl.constexpr):
    """Return the terms ``[first, stop)`` of the blocks that the next tile of the same progression meets, if there is one.

    Between documents there are tiles without rows.
    """
    _, tokens, next_base, x_first, x_last, count = _rows_of(slot + 1, batch, kv_head, tiles, V)
    first, _, blocks, _, _ = _blocks_met(x_first, x_last, tokens, base, rate, tiles, V)
    return first, first + tl.where((count > 0) & (next_base == own_base), blocks, 0) * V.block_n
