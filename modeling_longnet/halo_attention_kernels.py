"""Attention of a slice's queries to its halo: the Triton kernels, and nothing but kernels.

What a tile does with a progression of keys or queries is the same as inside a slice, and comes from
``dilated_attention_kernels``; here is which ones it meets. A halo is made of blocks, each an arithmetic progression of
positions, of one branch, KV head and side, whose keys lie behind one another in a buffer. The queries that attend to
blocks are progressions too, of the slice: all of its queries, or those that a dilated branch serves. Every query meets a
band of key numbers ``[low, high)`` of a block, and every key a band of queries; the ends of both never decrease.

Tables describe the blocks, ``(row in the buffer, keys, position of the first key, window, previous window, rate, side)``;
the progressions of queries, ``(position of the first, queries)``; and, for the gradients of the keys, tiles of the
blocks: ``(KV head, rate of its queries, row of their first progression, progressions)`` in front of the same as a block.
"""

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("the fused kernels need triton; install it or use another backend") from error

from .dilated_attention_kernels import (
    LN2,
    LOG2E,
    _bwd_dkdv_progression,
    _bwd_dq_progression,
    _fwd_progression,
    _pack_stats,
)
from .dilated_attention_tile_kernels import _count_before


FIELDS = tl.constexpr(7)
QUERY_FIELDS = tl.constexpr(2)
TILE_FIELDS = tl.constexpr(4)  # and those of a block
LEFT = tl.constexpr(0)
RUNTIME = ("length", "first", "num_blocks", "query_rate")


@triton.jit
def _window_start(x, window, SLIDING: tl.constexpr):
    if SLIDING:
        return x - window + 1
    else:
        return x - x % window


@triton.jit
def _window_stop(x, window, SLIDING: tl.constexpr):
    if SLIDING:
        return x + window
    else:
        return x - x % window + window


@triton.jit
def _band(x, side, window, inner, first, stop, SLIDING: tl.constexpr):
    """Return the positions ``[start, end)`` beyond the slice ``[first, stop)`` that its query x meets on one side.

    ``inner == 0``: no previous branch has met anything yet.
    """
    low = tl.where(side == LEFT, _window_start(x, window, SLIDING), stop)
    high = tl.where(side == LEFT, first, _window_stop(x, window, SLIDING))
    near = tl.maximum(inner, 1)
    if_left = tl.where(side == LEFT, _window_start(x, near, SLIDING), high)
    if_right = tl.where(side == LEFT, low, _window_stop(x, near, SLIDING))
    high = tl.where(inner > 0, tl.minimum(high, if_left), high)
    low = tl.where(inner > 0, tl.maximum(low, if_right), low)
    return low, high


@triton.jit
def _rows_met(u, side, window, inner, first, stop, SLIDING: tl.constexpr):
    """Return the rows ``[start, end)`` of the slice whose queries the key at position u meets: windows are symmetric."""
    low = tl.where(side == LEFT, first, tl.maximum(_window_start(u, window, SLIDING), first))
    high = tl.where(side == LEFT, tl.minimum(_window_stop(u, window, SLIDING), stop), stop)
    near = tl.maximum(inner, 1)
    after = tl.where(side == LEFT, _window_stop(u, near, SLIDING), low)
    before = tl.where(side == LEFT, high, _window_start(u, near, SLIDING))
    low = tl.where(inner > 0, tl.maximum(low, after), low)
    high = tl.where(inner > 0, tl.minimum(high, before), high)
    # Windows may reach further beyond the slice than 32 bits can say.
    return (tl.minimum(low, stop) - first).to(tl.int32), (tl.maximum(high, first) - first).to(tl.int32)


@triton.jit
def _number(position, base, rate, count):
    """Count the keys base, base + rate, ... of a block before a position: narrow, as all numbers inside a block."""
    ahead = tl.maximum(position - base, 0)
    return tl.minimum((ahead + rate - 1) // rate, count).to(tl.int32)


@triton.jit
def _numbers_met(x, base, rate, count, side, window, inner, first, stop, SLIDING: tl.constexpr):
    """Return the band ``[low, high)`` of numbers of a block's keys that query x meets."""
    start, end = _band(x, side, window, inner, first, stop, SLIDING)
    return _number(start, base, rate, count), _number(end, base, rate, count)


@triton.jit
def _block(block_ptr):
    row = tl.load(block_ptr).to(tl.int32)
    count = tl.load(block_ptr + 1)
    base = tl.load(block_ptr + 2)
    window = tl.load(block_ptr + 3)
    inner = tl.load(block_ptr + 4)
    rate = tl.load(block_ptr + 5)
    side = tl.load(block_ptr + 6)
    return row, count, base, window, inner, rate, side


@triton.jit
def _keys_met(blocks_ptr, num_blocks, x_first, x_last, first, stop, SLIDING: tl.constexpr):
    """Count the keys that some row of a query tile may meet."""
    keys = 0
    for block in range(num_blocks):
        row, count, base, window, inner, rate, side = _block(blocks_ptr + block * FIELDS)
        low, _ = _numbers_met(x_first, base, rate, count, side, window, inner, first, stop, SLIDING)
        _, high = _numbers_met(x_last, base, rate, count, side, window, inner, first, stop, SLIDING)
        keys += tl.maximum(high - low, 0)
    return keys


@triton.jit
def _load_rows(ptr, stride, mask, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr):
    """Load BLOCK rows from ``ptr`` on: wide addresses stay in scalars."""
    columns = tl.arange(0, BLOCK_D)
    pointers = ptr + (tl.arange(0, BLOCK) * stride)[:, None] + columns[None, :]
    return tl.load(pointers, mask=mask[:, None] & (columns < HEAD_DIM)[None, :], other=0.0)


@triton.jit
def _step(rate, stride, WIDE: tl.constexpr):
    """Return how far apart the rows of a progression lie; WIDE: a tile of them exceeds 32 bits."""
    return tl.cast(rate, tl.int64) * stride if WIDE else tl.cast(rate, tl.int32) * stride


@triton.jit
def _row_pointers(ptr, stride, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr):
    return ptr + (tl.arange(0, BLOCK) * stride)[:, None] + tl.arange(0, BLOCK_D)[None, :]


@triton.jit(do_not_specialize=RUNTIME)
def halo_fwd_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, k_desc, v_desc, blocks_ptr, queries_ptr,
    stride_qh, stride_ql, stride_oh, stride_ol, stride_lh, scale, length, first, num_blocks, query_rate,
    WIDE: tl.constexpr, TMA: tl.constexpr, GROUP: tl.constexpr, SLIDING: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Go on with the softmax of (out, lse), in place, over blocks of the halo."""
    head = tl.program_id(1).to(tl.int64)
    blocks_ptr += head // GROUP * num_blocks * FIELDS
    queries_ptr += (head // GROUP * tl.num_programs(2) + tl.program_id(2)) * QUERY_FIELDS
    tile = tl.program_id(0).to(tl.int64) * BLOCK_M
    count = tl.minimum(tl.load(queries_ptr + 1) - tile, BLOCK_M)
    if count <= 0:
        return

    offsets = tl.arange(0, BLOCK_M)
    inside = offsets < count
    first = tl.cast(first, tl.int64)
    stop = first + length
    x_first = tl.load(queries_ptr) + tile * query_rate
    x = x_first + tl.cast(query_rate, tl.int64) * offsets
    x_last = x_first + (count - 1) * query_rate
    if _keys_met(blocks_ptr, num_blocks, x_first, x_last, first, stop, SLIDING) == 0:
        return

    columns = tl.arange(0, BLOCK_D)
    in_tile = inside[:, None] & (columns < HEAD_DIM)[None, :]
    row = x_first - first
    q_ptr += head * stride_qh + row * stride_ql
    q = _load_rows(q_ptr, _step(query_rate, stride_ql, WIDE), inside, HEAD_DIM, BLOCK_D, BLOCK_M)  # [BLOCK_M, D]
    out_ptr += head * stride_oh + row * stride_ol
    out_ptrs = _row_pointers(out_ptr, _step(query_rate, stride_ol, WIDE), BLOCK_D, BLOCK_M)
    lse_ptrs = lse_ptr + head * stride_lh + row + query_rate * offsets
    acc = tl.load(out_ptrs, mask=in_tile, other=0.0).to(tl.float32)
    peak = tl.load(lse_ptrs, mask=inside, other=0.0) * LOG2E
    total = tl.where(peak == float("-inf"), 0.0, 1.0)
    scale2 = scale * LOG2E
    for block in range(num_blocks):
        place, keys, base, window, inner, rate, side = _block(blocks_ptr + block * FIELDS)
        # Keys of a block are counted: number n lies in row place + n of the buffer.
        low, high = _numbers_met(x, base, rate, keys, side, window, inner, first, stop, SLIDING)  # [BLOCK_M]
        low_first, high_first = _numbers_met(x_first, base, rate, keys, side, window, inner, first, stop, SLIDING)
        low_last, high_last = _numbers_met(x_last, base, rate, keys, side, window, inner, first, stop, SLIDING)
        acc, total, peak = _fwd_progression(
            acc, total, peak, q, (k_ptr, HEAD_DIM, k_desc, 0, 0), (v_ptr, HEAD_DIM, v_desc, 0, 0), None, place, 0, 1,
            low_first, low_last, high_first, high_last, low, high, scale2,
            False, False, TMA, HEAD_DIM, BLOCK_D, BLOCK_N, PRECISION,
        )  # fmt: skip
    skipped = total == 0.0
    total = tl.where(skipped, 1.0, total)
    lse = tl.where(skipped, float("-inf"), (peak + tl.log2(total)) * LN2)
    tl.store(out_ptrs, (acc / total[:, None]).to(out_ptr.dtype.element_ty), mask=in_tile)
    tl.store(lse_ptrs, lse, mask=inside)


@triton.jit(do_not_specialize=RUNTIME)
def halo_dq_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, dlse_ptr, do_ptr, dq_ptr, stats_ptr, k_desc, v_desc, blocks_ptr, queries_ptr,
    stride_qh, stride_ql, stride_oh, stride_ol, stride_lh, stride_dlh, stride_doh, stride_dol, stride_dqh, stride_dql,
    scale, length, first, num_blocks, query_rate,
    HAS_DLSE: tl.constexpr, WIDE: tl.constexpr, TMA: tl.constexpr, GROUP: tl.constexpr, SLIDING: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add the gradient of queries through blocks of the halo, and pack what the gradients of the keys need of each.

    That is lse in base 2 and ``delta = rowsum(do * out) - dlse``, as ``stats_kernel`` packs them.
    """
    head = tl.program_id(1).to(tl.int64)
    blocks_ptr += head // GROUP * num_blocks * FIELDS
    queries_ptr += (head // GROUP * tl.num_programs(2) + tl.program_id(2)) * QUERY_FIELDS
    tile = tl.program_id(0).to(tl.int64) * BLOCK_M
    count = tl.minimum(tl.load(queries_ptr + 1) - tile, BLOCK_M)
    if count <= 0:
        return

    offsets = tl.arange(0, BLOCK_M)
    inside = offsets < count
    first = tl.cast(first, tl.int64)
    stop = first + length
    x_first = tl.load(queries_ptr) + tile * query_rate
    x = x_first + tl.cast(query_rate, tl.int64) * offsets
    x_last = x_first + (count - 1) * query_rate
    if _keys_met(blocks_ptr, num_blocks, x_first, x_last, first, stop, SLIDING) == 0:
        return

    row = x_first - first
    rows = row + query_rate * offsets
    q_ptr += head * stride_qh + row * stride_ql
    do_ptr += head * stride_doh + row * stride_dol
    out_ptr += head * stride_oh + row * stride_ol
    q = _load_rows(q_ptr, _step(query_rate, stride_ql, WIDE), inside, HEAD_DIM, BLOCK_D, BLOCK_M)  # [BLOCK_M, D]
    do = _load_rows(do_ptr, _step(query_rate, stride_dol, WIDE), inside, HEAD_DIM, BLOCK_D, BLOCK_M)
    out = _load_rows(out_ptr, _step(query_rate, stride_ol, WIDE), inside, HEAD_DIM, BLOCK_D, BLOCK_M)
    lse2 = tl.load(lse_ptr + head * stride_lh + rows, mask=inside, other=0.0) * LOG2E
    delta = tl.sum(out.to(tl.float32) * do.to(tl.float32), 1)
    if HAS_DLSE:
        dlse = tl.load(dlse_ptr + head * stride_dlh + rows, mask=inside, other=0.0)
        delta -= tl.where(lse2 == float("-inf"), 0.0, dlse)
    tl.store(stats_ptr + head * length + rows, _pack_stats(lse2, delta), mask=inside)
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    scale2 = scale * LOG2E
    for block in range(num_blocks):
        place, keys, base, window, inner, rate, side = _block(blocks_ptr + block * FIELDS)
        low, high = _numbers_met(x, base, rate, keys, side, window, inner, first, stop, SLIDING)  # [BLOCK_M]
        low_first, high_first = _numbers_met(x_first, base, rate, keys, side, window, inner, first, stop, SLIDING)
        low_last, high_last = _numbers_met(x_last, base, rate, keys, side, window, inner, first, stop, SLIDING)
        dq = _bwd_dq_progression(
            dq, q, do, lse2, delta, (k_ptr, HEAD_DIM, k_desc, 0, 0), (v_ptr, HEAD_DIM, v_desc, 0, 0), None, place, 0, 1,
            low_first, low_last, high_first, high_last, low, high, scale2,
            False, False, TMA, HEAD_DIM, BLOCK_D, BLOCK_N, PRECISION,
        )  # fmt: skip
    columns = tl.arange(0, BLOCK_D)
    dq_ptr += head * stride_dqh + row * stride_dql
    dq_ptrs = _row_pointers(dq_ptr, _step(query_rate, stride_dql, WIDE), BLOCK_D, BLOCK_M)
    in_tile = inside[:, None] & (columns < HEAD_DIM)[None, :]
    dq = dq * scale + tl.load(dq_ptrs, mask=in_tile, other=0.0)
    tl.store(dq_ptrs, dq.to(dq_ptr.dtype.element_ty), mask=in_tile)


@triton.jit(do_not_specialize=RUNTIME)
def halo_dkdv_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, stats_ptr, dk_ptr, dv_ptr, q_desc, do_desc, tiles_ptr, queries_ptr,
    stride_qh, stride_ql, stride_doh, stride_dol, stride_split, scale, length, first,
    SPLITS: tl.constexpr, DILATE: tl.constexpr, WIDE: tl.constexpr, TMA: tl.constexpr, GROUP: tl.constexpr,
    SLIDING: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Write one of SPLITS parts of the gradients of a tile of halo keys, from one of as many stretches of queries."""
    tiles_ptr += tl.program_id(0) * (TILE_FIELDS + FIELDS)
    split = tl.program_id(1)
    kv_head = tl.load(tiles_ptr).to(tl.int32)
    query_rate = tl.load(tiles_ptr + 1).to(tl.int32) if DILATE else 1
    progression = tl.load(tiles_ptr + 2)
    progressions = tl.load(tiles_ptr + 3)
    row, count, base, window, inner, rate, side = _block(tiles_ptr + TILE_FIELDS)
    numbers = tl.arange(0, BLOCK_N)
    there = numbers < count
    first = tl.cast(first, tl.int64)
    stop = first + length
    place = row.to(tl.int64) * HEAD_DIM
    k = _load_rows(k_ptr + place, HEAD_DIM, there, HEAD_DIM, BLOCK_D, BLOCK_N)  # [BLOCK_N, D]
    v = _load_rows(v_ptr + place, HEAD_DIM, there, HEAD_DIM, BLOCK_D, BLOCK_N)
    # All in rows of the slice, which are narrow.
    low, high = _rows_met(base + rate * numbers, side, window, inner, first, stop, SLIDING)
    high = tl.where(there, high, 0)  # [BLOCK_N]
    low_first, high_first = _rows_met(base, side, window, inner, first, stop, SLIDING)
    low_last, high_last = _rows_met(base + rate * (count - 1), side, window, inner, first, stop, SLIDING)
    scale2 = scale * LOG2E
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    queries_ptr += progression * QUERY_FIELDS
    for _ in range(progressions):
        query_base = (tl.load(queries_ptr) - first).to(tl.int32)
        queries = tl.load(queries_ptr + 1).to(tl.int32)
        queries_ptr += QUERY_FIELDS
        met_first = tl.minimum(_count_before(low_first, query_base, query_rate), queries)
        met_stop = tl.minimum(_count_before(high_last, query_base, query_rate), queries)
        share = (tl.maximum(met_stop - met_first, 0) + SPLITS * BLOCK_M - 1) // (SPLITS * BLOCK_M) * BLOCK_M
        mine_first = met_first + split * share
        mine_stop = tl.minimum(mine_first + share, met_stop)
        from_row, to_row = query_base + query_rate * mine_first, query_base + query_rate * mine_stop
        for member in range(GROUP):
            head = kv_head * GROUP + member
            q_source = (q_ptr + tl.cast(head, tl.int64) * stride_qh, stride_ql, q_desc, 0, head)
            do_source = (do_ptr + tl.cast(head, tl.int64) * stride_doh, stride_dol, do_desc, 0, head)
            dk, dv = _bwd_dkdv_progression(
                dk, dv, k, v, q_source, do_source, stats_ptr + tl.cast(head, tl.int64) * length, None, 0, query_base,
                query_rate, from_row, low_last, tl.minimum(high_first, to_row), to_row, low, high, scale2,
                False, WIDE, TMA, HEAD_DIM, BLOCK_D, BLOCK_M, PRECISION,
            )  # fmt: skip
    columns = tl.arange(0, BLOCK_D)
    place += tl.cast(split, tl.int64) * stride_split
    mask = there[:, None] & (columns < HEAD_DIM)[None, :]
    tl.store(_row_pointers(dk_ptr + place, HEAD_DIM, BLOCK_D, BLOCK_N), dk * scale, mask=mask)
    tl.store(_row_pointers(dv_ptr + place, HEAD_DIM, BLOCK_D, BLOCK_N), dv, mask=mask)
