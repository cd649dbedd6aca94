"""Which rows a tile has and which blocks it meets: the integer arithmetic of all kernels, and nothing but kernels.

One idea carries all of them. The rows of a branch, queries or keys, are an arithmetic progression of positions,
``base + rate * index``, so a tile of a branch is addressed where it lies and never gathered. What a row meets on the
other side of the attention matrix is a *band* of positions ``[start, end)`` whose two ends never decrease from one
row to the next. For a tile of rows the union of the bands is then one range of the other progression, and so is their
intersection: blocks inside the intersection need no mask, the few blocks at its edges compare positions.

Names: a *tile* is the rows that a program owns, a *block* is what its loop loads.
"""

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("the fused kernels need triton; install it or use another backend") from error


# Which part of a band: what lies before the row, after it, or both. Launchers pass a range of these.
BEFORE, AFTER, BOTH = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)

# Numbers that change with the length, the batch or the pattern: one compiled kernel serves all of them.
RUNTIME = (
    "length", "num_documents", "search_steps", "period", "tiles_per_period", "windows", "previous_windows", "rates"
)  # fmt: skip


@triton.jit
def _pick(values, index, COUNT: tl.constexpr):
    value = values[0]
    for i in tl.static_range(1, COUNT):
        value = tl.where(index == i, values[i], value)
    return value


@triton.jit
def _offset(kv_head, rate, NUM_KV_HEADS: tl.constexpr, BLOCKED: tl.constexpr):
    if BLOCKED:
        return kv_head // ((NUM_KV_HEADS - 1) // rate + 1)
    else:
        return kv_head % rate


@triton.jit
def _window_start(x, window, SLIDING: tl.constexpr):
    if SLIDING:
        return x - tl.minimum(x, window - 1)
    else:
        return x - x % window


@triton.jit
def _window_end(x, window, length, SLIDING: tl.constexpr):
    # Written so that nothing exceeds length: windows may be close to 2^31.
    if SLIDING:
        return x + tl.minimum(length - x, window)
    else:
        start = x - x % window
        return start + tl.minimum(length - start, window)


@triton.jit
def _band(
    x, window, previous_window, length,
    FROM_KEY: tl.constexpr, SIDE: tl.constexpr, SLIDING: tl.constexpr, DISJOINT: tl.constexpr,
):  # fmt: skip
    """Return the positions ``[start, end)`` that position x meets on one side of it, or on both.

    Windows are symmetric, so a key asks the same question about its queries. With DISJOINT the previous branch's
    window is cut out; previous_window == 0 marks the first branch, which has nothing to cut.
    """
    start = _window_start(x, window, SLIDING)
    end = _window_end(x, window, length, SLIDING)
    # The pair (x, x) belongs to what a query meets before, and to what a key meets after.
    if SIDE == BEFORE:
        end = x if FROM_KEY else x + 1
        if DISJOINT:
            end = tl.where(previous_window > 0, _window_start(x, tl.maximum(previous_window, 1), SLIDING), end)
    if SIDE == AFTER:
        start = x if FROM_KEY else x + 1
        if DISJOINT:
            inner = _window_end(x, tl.maximum(previous_window, 1), length, SLIDING)
            start = tl.where(previous_window > 0, inner, start)
    return start, end


@triton.jit
def _count_before(position, base, rate):
    """Count the terms base, base + rate, ... below position."""
    return tl.where(position > base, (position - base - 1) // rate + 1, 0)


@triton.jit
def _block_range(
    start_first, start_last, end_first, end_last, base, rate, BLOCK: tl.constexpr, WHOLE: tl.constexpr = False
):
    """Cut what a tile meets in one progression into blocks.

    Args:
        start_first, end_first: band of the tile's first row; start_last, end_last: of its last row.

    Returns:
        ``(first, stop, blocks, head, tail)``: block k holds the terms from ``first + k * BLOCK``, terms at or beyond
        ``stop`` are not met by any row, and blocks ``head <= k < tail`` are met whole by every row. WHOLE: ``first``
        is a multiple of BLOCK, and the first block may begin with terms that no row meets.
    """
    first = _count_before(start_first, base, rate)
    stop = _count_before(end_last, base, rate)
    blocks = tl.where(stop > first, (stop - first + BLOCK - 1) // BLOCK, 0)
    inner_first = tl.maximum(_count_before(start_last, base, rate), first)
    inner_stop = tl.maximum(_count_before(end_first, base, rate), first)
    if WHOLE:
        first -= first % BLOCK
        blocks = tl.where(blocks > 0, (stop - first + BLOCK - 1) // BLOCK, 0)
    head = tl.minimum((inner_first - first + BLOCK - 1) // BLOCK, blocks)
    tail = tl.maximum(tl.minimum((inner_stop - first) // BLOCK, blocks), head)
    return first, stop, blocks, head, tail


@triton.jit
def _tiles_before(row, period, tiles_per_period, span):
    # Packed documents claim tiles by the row they start in: with two spare ones each they never overlap.
    return row // period * tiles_per_period + row % period // span


@triton.jit
def _document(
    cu_seqlens_ptr, counts_ptr, slot, batch, length, num_documents, search_steps, period, tiles_per_period, span,
    PACKED: tl.constexpr, INDEXED: tl.constexpr,
):  # fmt: skip
    """Find the document of a slot of the grid: its first row, its number of tokens, and the tile inside it."""
    start = 0
    tokens = length
    tile = slot
    if PACKED:
        low = 0
        high = num_documents - 1
        for _ in range(search_steps):
            middle = (low + high + 1) // 2
            claimed = _tiles_before(tl.load(cu_seqlens_ptr + middle), period, tiles_per_period, span) + 2 * middle
            low = tl.where(claimed <= slot, middle, low)
            high = tl.where(claimed <= slot, high, middle - 1)
        start = tl.load(cu_seqlens_ptr + low)
        tokens = tl.load(cu_seqlens_ptr + low + 1) - start
        tile = slot - _tiles_before(start, period, tiles_per_period, span) - 2 * low
    if INDEXED:
        tokens = tl.load(counts_ptr + batch)
    return start, tokens, tile


@triton.jit
def _tile(tile, offset, rate, tokens, period, tiles_per_period, LAST_FIRST: tl.constexpr, TILE: tl.constexpr):
    """Place a tile: the base of its progression, its first and last position, and how many rows it has."""
    turn = tile // tiles_per_period
    # Packed documents have spare tiles, for which base would not fit into 32 bits.
    exists = turn <= tl.maximum(tokens - 1, 0) // period
    base = tl.where(exists, turn * period, 0)
    limit = tl.where(exists, base + tl.minimum(tokens - base, period), 0)
    base += offset
    tile %= tiles_per_period
    if LAST_FIRST:  # late causal queries meet the most keys: starting with them leaves the short work for the end
        # The last period may be short: what is turned round are the tiles that it has, not those of a whole one.
        last = (_count_before(limit, base, rate) + TILE - 1) // TILE - 1
        limit = tl.where(tile <= last, limit, 0)
        tile = tl.maximum(last - tile, 0)
    first = base + tile * TILE * rate
    count = tl.minimum(_count_before(limit, first, rate), TILE)
    return base, first, first + (count - 1) * rate, count
