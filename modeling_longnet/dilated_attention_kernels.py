"""Fused dilated attention: the Triton kernels, and nothing but kernels.

Which rows a tile has and which blocks it meets is the arithmetic of ``dilated_attention_tile_kernels``; here is what it
does with them. The softmax runs in base 2 inside a kernel; lse is stored in natural log.
"""

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("the fused kernels need triton; install it or use another backend") from error

from .dilated_attention_tile_kernels import (
    BEFORE,
    RUNTIME,
    _band,
    _block_range,
    _document,
    _offset,
    _pick,
    _tile,
)


LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _rows(rows_ptr, start, base, rate, first, stop, INDEXED: tl.constexpr, BLOCK: tl.constexpr):
    """Return where the terms ``first + 0 ... BLOCK - 1`` of a progression lie in the tensors: ``[BLOCK]`` int64."""
    index = first + tl.arange(0, BLOCK)
    if INDEXED:
        return tl.load(rows_ptr + base + rate * index, mask=index < stop, other=0).to(tl.int64)
    else:
        return start + base + rate * index.to(tl.int64)


@triton.jit
def _tile_mask(count, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, TILE: tl.constexpr):
    return (tl.arange(0, TILE) < count)[:, None] & (tl.arange(0, BLOCK_D) < HEAD_DIM)[None, :]


@triton.jit
def _load_rows(
    ptr, stride, rows_ptr, start, base, rate, first, stop,
    MASKED: tl.constexpr, INDEXED: tl.constexpr, WIDE: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Load the terms ``first + 0 ... BLOCK - 1`` of a progression; MASKED: zeros from term ``stop`` on."""
    index = tl.arange(0, BLOCK)
    columns = tl.arange(0, BLOCK_D)
    if INDEXED:
        rows = _rows(rows_ptr, start, base, rate, first, stop, True, BLOCK)
        pointers = ptr + (rows * stride)[:, None] + columns[None, :]
    else:
        # One 64-bit base per block; the offsets inside it are narrow and stay in registers across the loop.
        ptr += (start + base + tl.cast(first, tl.int64) * rate) * stride
        step = tl.cast(rate, tl.int64) * stride if WIDE else rate * stride
        pointers = ptr + ((index * step)[:, None] + columns[None, :])
    if MASKED:
        mask = (first + index < stop)[:, None]
        if HEAD_DIM < BLOCK_D:
            mask = mask & (columns < HEAD_DIM)[None, :]
        return tl.load(pointers, mask=mask, other=0.0)
    elif HEAD_DIM < BLOCK_D:
        return tl.load(pointers, mask=(columns < HEAD_DIM)[None, :], other=0.0)
    else:
        return tl.load(pointers)


@triton.jit
def _load_block(
    source, rows_ptr, start, base, rate, first, stop,
    MASKED: tl.constexpr, INDEXED: tl.constexpr, WIDE: tl.constexpr, TMA: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Load the terms ``first + 0 ... BLOCK - 1`` of a progression: ``[BLOCK, D]``.

    Args:
        source: pointer to the head's first row, stride of the rows, descriptor, batch index and head. The descriptor
            sees a tensor as ``[B, heads, residue, term, D]``, where row = rate * term + residue.
    """
    ptr, stride, descriptor, batch, head = source
    if TMA:
        origin = start + base
        block = descriptor.load([batch, head, origin % rate, origin // rate + first, 0])
        return block.reshape(BLOCK, BLOCK_D)
    else:
        return _load_rows(
            ptr, stride, rows_ptr, start, base, rate, first, stop, MASKED, INDEXED, WIDE, HEAD_DIM, BLOCK_D, BLOCK
        )


@triton.jit
def _met(base, rate, first, stop, band_start, band_end, BLOCK: tl.constexpr):
    """Say which terms of a block each row of a tile meets: ``[TILE, BLOCK]``."""
    index = first + tl.arange(0, BLOCK)
    position = base + rate * index
    inside = (position[None, :] >= band_start[:, None]) & (position[None, :] < band_end[:, None])
    return inside & (index < stop)[None, :]


@triton.jit
def _fwd_block(
    acc, total, peak, q, k_source, v_source, rows_ptr, start, base, rate, first, stop,
    band_start, band_end, scale2,
    MASKED: tl.constexpr, INDEXED: tl.constexpr, WIDE: tl.constexpr, TMA: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add one block of keys to the running softmax of a query tile."""
    k = _load_block(
        k_source, rows_ptr, start, base, rate, first, stop, MASKED, INDEXED, WIDE, TMA, HEAD_DIM, BLOCK_D, BLOCK_N
    )  # [BLOCK_N, D]
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
    if MASKED:
        s = tl.where(_met(base, rate, first, stop, band_start, band_end, BLOCK_N), s, float("-inf"))
    new_peak = tl.maximum(peak, tl.max(s, 1) * scale2)  # the scale is positive: it folds into the exponent
    # A row that has met nothing yet has peak -inf, and -inf - -inf is nan.
    shift = tl.where(new_peak == float("-inf"), 0.0, new_peak) if MASKED else new_peak
    p = tl.exp2(s * scale2 - shift[:, None])
    decay = tl.exp2(peak - shift)
    total = total * decay + tl.sum(p, 1)
    acc = acc * decay[:, None]
    v = _load_block(
        v_source, rows_ptr, start, base, rate, first, stop, MASKED, INDEXED, WIDE, TMA, HEAD_DIM, BLOCK_D, BLOCK_N
    )  # [BLOCK_N, D]
    acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
    return acc, total, new_peak


@triton.jit
def _fwd_progression(
    acc, total, peak, q, k_source, v_source, rows_ptr, start, base, rate,
    start_first, start_last, end_first, end_last, band_start, band_end, scale2,
    INDEXED: tl.constexpr, WIDE: tl.constexpr, TMA: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add everything that a query tile meets in one progression of keys."""
    first, stop, blocks, head, tail = _block_range(
        start_first, start_last, end_first, end_last, base, rate, BLOCK_N
    )  # fmt: skip
    for block in range(head, tail):
        acc, total, peak = _fwd_block(
            acc, total, peak, q, k_source, v_source, rows_ptr, start, base, rate,
            first + block * BLOCK_N, stop, band_start, band_end, scale2,
            False, INDEXED, WIDE, TMA, HEAD_DIM, BLOCK_D, BLOCK_N, PRECISION,
        )  # fmt: skip
    for edge in range(head + blocks - tail):
        block = tl.where(edge < head, edge, edge - head + tail)
        acc, total, peak = _fwd_block(
            acc, total, peak, q, k_source, v_source, rows_ptr, start, base, rate,
            first + block * BLOCK_N, stop, band_start, band_end, scale2,
            True, INDEXED, WIDE, TMA, HEAD_DIM, BLOCK_D, BLOCK_N, PRECISION,
        )  # fmt: skip
    return acc, total, peak


@triton.jit(do_not_specialize=RUNTIME)
def fwd_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, k_desc, v_desc, cu_seqlens_ptr, rows_ptr, counts_ptr,
    stride_qb, stride_qh, stride_ql, stride_kb, stride_kg, stride_kl, stride_vb, stride_vg, stride_vl,
    stride_ob, stride_oh, stride_ol,
    scale, length, num_documents, search_steps, period, tiles_per_period, windows, previous_windows, rates,
    NUM_BRANCHES: tl.constexpr, FIRST: tl.constexpr, GROUP: tl.constexpr, NUM_KV_HEADS: tl.constexpr,
    BLOCKED: tl.constexpr, DISJOINT: tl.constexpr, DILATE: tl.constexpr, SLIDING: tl.constexpr,
    SEGMENTED: tl.constexpr, SIDE: tl.constexpr, LAST_SIDE: tl.constexpr, PACKED: tl.constexpr, INDEXED: tl.constexpr,
    WIDE: tl.constexpr, TMA: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Attend one tile of queries to the keys of NUM_BRANCHES branches.

    Unless FIRST, the softmax goes on where the earlier launches' (out, lse) left it, so the merge of branches costs
    nothing: (out, lse) stands for everything met so far as one value with the weight exp(lse).
    """
    slot = tl.program_id(0)
    query_head = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    kv_head = query_head // GROUP
    query_rate = rates[0] if DILATE else 1
    start, tokens, tile = _document(
        cu_seqlens_ptr, counts_ptr, slot, batch, length, num_documents, search_steps, period, tiles_per_period,
        query_rate * BLOCK_M, PACKED, INDEXED,
    )  # fmt: skip
    query_offset = _offset(kv_head, query_rate, NUM_KV_HEADS, BLOCKED) if DILATE else 0
    query_base, x_first, x_last, count = _tile(
        tile, query_offset, query_rate, tokens, period, tiles_per_period, DILATE and SIDE == BEFORE, BLOCK_M
    )  # fmt: skip
    if count <= 0:
        return

    if INDEXED:
        rows_ptr += batch * length
    x = x_first + query_rate * tl.arange(0, BLOCK_M)
    rows = _rows(rows_ptr, start, x_first, query_rate, 0, count, INDEXED, BLOCK_M)
    in_tile = _tile_mask(count, HEAD_DIM, BLOCK_D, BLOCK_M)
    columns = tl.arange(0, BLOCK_D)
    q_ptr += batch * stride_qb + query_head.to(tl.int64) * stride_qh
    out_ptr += batch * stride_ob + query_head.to(tl.int64) * stride_oh
    k_ptr += batch * stride_kb + kv_head.to(tl.int64) * stride_kg
    v_ptr += batch * stride_vb + kv_head.to(tl.int64) * stride_vg
    k_source = (k_ptr, stride_kl, k_desc, tl.program_id(2), kv_head)
    v_source = (v_ptr, stride_vl, v_desc, tl.program_id(2), kv_head)
    lse_ptr += (batch * tl.num_programs(1) + query_head) * length
    q = tl.load(q_ptr + (rows * stride_ql)[:, None] + columns[None, :], mask=in_tile, other=0.0)  # [BLOCK_M, D]
    out_ptrs = out_ptr + (rows * stride_ol)[:, None] + columns[None, :]

    if FIRST:
        acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
    else:
        acc = tl.load(out_ptrs, mask=in_tile, other=0.0).to(tl.float32)
        peak = tl.load(lse_ptr + rows, mask=tl.arange(0, BLOCK_M) < count, other=0.0) * LOG2E
        total = tl.where(peak == float("-inf"), 0.0, 1.0)

    scale2 = scale * LOG2E
    for branch in range(NUM_BRANCHES):
        window = _pick(windows, branch, NUM_BRANCHES)
        previous_window = _pick(previous_windows, branch, NUM_BRANCHES)
        rate = _pick(rates, branch, NUM_BRANCHES)
        offset = _offset(kv_head, rate, NUM_KV_HEADS, BLOCKED)
        for side in tl.static_range(SIDE, LAST_SIDE):
            band_start, band_end = _band(x, window, previous_window, tokens, False, side, SLIDING, DISJOINT)
            start_first, end_first = _band(x_first, window, previous_window, tokens, False, side, SLIDING, DISJOINT)
            start_last, end_last = _band(x_last, window, previous_window, tokens, False, side, SLIDING, DISJOINT)
            if SEGMENTED:
                for segment in range(start_first // window, (end_last - 1) // window + 1):
                    low = segment * window
                    high = low + tl.minimum(window, tokens - low)
                    acc, total, peak = _fwd_progression(
                        acc, total, peak, q, k_source, v_source, rows_ptr, start, low + offset, rate,
                        tl.maximum(start_first, low), tl.maximum(start_last, low), tl.minimum(end_first, high),
                        tl.minimum(end_last, high), band_start, band_end, scale2,
                        INDEXED, WIDE, TMA, HEAD_DIM, BLOCK_D, BLOCK_N, PRECISION,
                    )  # fmt: skip
            else:
                acc, total, peak = _fwd_progression(
                    acc, total, peak, q, k_source, v_source, rows_ptr, start,
                    query_base if DILATE else offset, rate, start_first, start_last, end_first, end_last,
                    band_start, band_end, scale2,
                    INDEXED, WIDE, TMA, HEAD_DIM, BLOCK_D, BLOCK_N, PRECISION,
                )  # fmt: skip

    skipped = total == 0.0
    total = tl.where(skipped, 1.0, total)
    out = acc / total[:, None]
    lse = tl.where(skipped, float("-inf"), (peak + tl.log2(total)) * LN2)
    tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=in_tile)
    tl.store(lse_ptr + rows, lse, mask=tl.arange(0, BLOCK_M) < count)


@triton.jit(do_not_specialize=RUNTIME)
def stats_kernel(
    out_ptr, do_ptr, lse_ptr, dlse_ptr, stats_ptr,
    stride_ob, stride_oh, stride_ol, stride_dob, stride_doh, stride_dol, length,
    HAS_DLSE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Pack what the backward of a softmax needs of each row: lse in base 2, and ``delta = rowsum(do * out) - dlse``.

    One 64-bit word per row halves the narrow loads in the loops that walk over rows.
    """
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M).to(tl.int64)
    query_head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    columns = tl.arange(0, BLOCK_D)
    mask = (rows < length)[:, None] & (columns < HEAD_DIM)[None, :]
    out_ptr += batch * stride_ob + query_head * stride_oh
    do_ptr += batch * stride_dob + query_head * stride_doh
    out = tl.load(out_ptr + (rows * stride_ol)[:, None] + columns[None, :], mask=mask, other=0.0).to(tl.float32)
    do = tl.load(do_ptr + (rows * stride_dol)[:, None] + columns[None, :], mask=mask, other=0.0).to(tl.float32)
    delta = tl.sum(out * do, 1)
    at_row = (batch * tl.num_programs(1) + query_head) * length + rows
    lse = tl.load(lse_ptr + at_row, mask=rows < length, other=0.0)
    if HAS_DLSE:
        # The lse of a skipped query is a constant: whatever gradient arrives there must not become nan * 0.
        dlse = tl.load(dlse_ptr + at_row, mask=rows < length, other=0.0)
        delta -= tl.where(lse == float("-inf"), 0.0, dlse)
    tl.store(stats_ptr + at_row, _pack_stats(lse * LOG2E, delta), mask=rows < length)


@triton.jit(do_not_specialize=["length", "first_head"])
def scale_kernel(
    sums_ptr, dq_ptr, stride_dqb, stride_dqh, stride_dql, scale, length, first_head, num_heads,
    CLEARS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Round what has been added up in float32 rows, ``[heads, L, D]`` from the first head on, times scale, into dq.

    Of 16 columns each the sums have (t, n, e) where dq has (n, t, e): see ``_hand_over`` of the Hopper kernel.
    """
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M).to(tl.int64)
    index = tl.program_id(1)
    head = (first_head + index) % num_heads
    batch = ((first_head + index) // num_heads).to(tl.int64)
    columns = tl.arange(0, BLOCK_D)
    mask = (rows < length)[:, None] & (columns < HEAD_DIM)[None, :]
    sums_ptr += ((index.to(tl.int64) * length + rows) * HEAD_DIM)[:, None] + columns[None, :]
    sums = tl.load(sums_ptr, mask=mask, other=0.0)
    dq_ptr += batch * stride_dqb + head.to(tl.int64) * stride_dqh + (rows * stride_dql)[:, None] + columns[None, :]
    dq = tl.permute(tl.reshape(sums * scale, [BLOCK_M, BLOCK_D // 16, 4, 2, 2]), (0, 1, 3, 2, 4))
    tl.store(dq_ptr, tl.reshape(dq, [BLOCK_M, BLOCK_D]).to(dq_ptr.dtype.element_ty), mask=mask)
    if CLEARS:  # for the heads that come next
        tl.store(sums_ptr, tl.zeros_like(sums), mask=mask)


@triton.jit
def _pack_stats(lse2, delta):
    high = lse2.to(tl.int32, bitcast=True).to(tl.int64)
    low = delta.to(tl.int32, bitcast=True).to(tl.int64)
    return (high << 32) | (low & 0xFFFFFFFF)


@triton.jit
def _unpack_stats(stats):
    lse2 = (stats >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    return lse2, stats.to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def _bwd_dq_block(
    dq, q, do, lse2, delta, k_source, v_source, rows_ptr, start, base, rate, first, stop,
    band_start, band_end, scale2,
    MASKED: tl.constexpr, INDEXED: tl.constexpr, WIDE: tl.constexpr, TMA: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add one block of keys to the gradient of a query tile."""
    k = _load_block(
        k_source, rows_ptr, start, base, rate, first, stop, MASKED, INDEXED, WIDE, TMA, HEAD_DIM, BLOCK_D, BLOCK_N
    )  # [BLOCK_N, D]
    v = _load_block(
        v_source, rows_ptr, start, base, rate, first, stop, MASKED, INDEXED, WIDE, TMA, HEAD_DIM, BLOCK_D, BLOCK_N
    )  # [BLOCK_N, D]
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
    dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
    p = tl.exp2(s * scale2 - lse2[:, None])
    if MASKED:
        p = tl.where(_met(base, rate, first, stop, band_start, band_end, BLOCK_N), p, 0.0)
    ds = p * (dp - delta[:, None])
    return tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)


@triton.jit
def _bwd_dq_progression(
    dq, q, do, lse2, delta, k_source, v_source, rows_ptr, start, base, rate,
    start_first, start_last, end_first, end_last, band_start, band_end, scale2,
    INDEXED: tl.constexpr, WIDE: tl.constexpr, TMA: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add everything that a query tile meets in one progression of keys to the tile's gradient."""
    first, stop, blocks, head, tail = _block_range(
        start_first, start_last, end_first, end_last, base, rate, BLOCK_N
    )  # fmt: skip
    for block in range(head, tail):
        dq = _bwd_dq_block(
            dq, q, do, lse2, delta, k_source, v_source, rows_ptr, start, base, rate,
            first + block * BLOCK_N, stop, band_start, band_end, scale2,
            False, INDEXED, WIDE, TMA, HEAD_DIM, BLOCK_D, BLOCK_N, PRECISION,
        )  # fmt: skip
    for edge in range(head + blocks - tail):
        block = tl.where(edge < head, edge, edge - head + tail)
        dq = _bwd_dq_block(
            dq, q, do, lse2, delta, k_source, v_source, rows_ptr, start, base, rate,
            first + block * BLOCK_N, stop, band_start, band_end, scale2,
            True, INDEXED, WIDE, TMA, HEAD_DIM, BLOCK_D, BLOCK_N, PRECISION,
        )  # fmt: skip
    return dq


@triton.jit(do_not_specialize=RUNTIME)
def bwd_dq_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, stats_ptr, dq_ptr, k_desc, v_desc, cu_seqlens_ptr, rows_ptr, counts_ptr,
    stride_qb, stride_qh, stride_ql, stride_kb, stride_kg, stride_kl, stride_vb, stride_vg, stride_vl,
    stride_dob, stride_doh, stride_dol, stride_dqb, stride_dqh, stride_dql,
    scale, length, num_documents, search_steps, period, tiles_per_period, windows, previous_windows, rates,
    NUM_BRANCHES: tl.constexpr, FIRST: tl.constexpr, GROUP: tl.constexpr, NUM_KV_HEADS: tl.constexpr,
    BLOCKED: tl.constexpr, DISJOINT: tl.constexpr, DILATE: tl.constexpr, SLIDING: tl.constexpr,
    SEGMENTED: tl.constexpr, SIDE: tl.constexpr, LAST_SIDE: tl.constexpr, PACKED: tl.constexpr, INDEXED: tl.constexpr,
    WIDE: tl.constexpr, TMA: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute the gradient of one tile of queries through NUM_BRANCHES branches; unless FIRST, add it to dq.

    lse and delta are those of the merged softmax, so each branch is an ordinary attention backward.
    """
    slot = tl.program_id(0)
    query_head = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    kv_head = query_head // GROUP
    query_rate = rates[0] if DILATE else 1
    start, tokens, tile = _document(
        cu_seqlens_ptr, counts_ptr, slot, batch, length, num_documents, search_steps, period, tiles_per_period,
        query_rate * BLOCK_M, PACKED, INDEXED,
    )  # fmt: skip
    query_offset = _offset(kv_head, query_rate, NUM_KV_HEADS, BLOCKED) if DILATE else 0
    query_base, x_first, x_last, count = _tile(
        tile, query_offset, query_rate, tokens, period, tiles_per_period, DILATE and SIDE == BEFORE, BLOCK_M
    )  # fmt: skip
    if count <= 0:
        return

    if INDEXED:
        rows_ptr += batch * length
    x = x_first + query_rate * tl.arange(0, BLOCK_M)
    rows = _rows(rows_ptr, start, x_first, query_rate, 0, count, INDEXED, BLOCK_M)
    valid = tl.arange(0, BLOCK_M) < count
    in_tile = _tile_mask(count, HEAD_DIM, BLOCK_D, BLOCK_M)
    columns = tl.arange(0, BLOCK_D)
    q_ptr += batch * stride_qb + query_head.to(tl.int64) * stride_qh
    do_ptr += batch * stride_dob + query_head.to(tl.int64) * stride_doh
    dq_ptr += batch * stride_dqb + query_head.to(tl.int64) * stride_dqh
    k_ptr += batch * stride_kb + kv_head.to(tl.int64) * stride_kg
    v_ptr += batch * stride_vb + kv_head.to(tl.int64) * stride_vg
    k_source = (k_ptr, stride_kl, k_desc, tl.program_id(2), kv_head)
    v_source = (v_ptr, stride_vl, v_desc, tl.program_id(2), kv_head)
    at_row = (batch * tl.num_programs(1) + query_head) * length + rows
    q = tl.load(q_ptr + (rows * stride_ql)[:, None] + columns[None, :], mask=in_tile, other=0.0)  # [BLOCK_M, D]
    do = tl.load(do_ptr + (rows * stride_dol)[:, None] + columns[None, :], mask=in_tile, other=0.0)  # [BLOCK_M, D]
    lse2, delta = _unpack_stats(tl.load(stats_ptr + at_row, mask=valid, other=0))

    scale2 = scale * LOG2E
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for branch in range(NUM_BRANCHES):
        window = _pick(windows, branch, NUM_BRANCHES)
        previous_window = _pick(previous_windows, branch, NUM_BRANCHES)
        rate = _pick(rates, branch, NUM_BRANCHES)
        offset = _offset(kv_head, rate, NUM_KV_HEADS, BLOCKED)
        for side in tl.static_range(SIDE, LAST_SIDE):
            band_start, band_end = _band(x, window, previous_window, tokens, False, side, SLIDING, DISJOINT)
            start_first, end_first = _band(x_first, window, previous_window, tokens, False, side, SLIDING, DISJOINT)
            start_last, end_last = _band(x_last, window, previous_window, tokens, False, side, SLIDING, DISJOINT)
            if SEGMENTED:
                for segment in range(start_first // window, (end_last - 1) // window + 1):
                    low = segment * window
                    high = low + tl.minimum(window, tokens - low)
                    dq = _bwd_dq_progression(
                        dq, q, do, lse2, delta, k_source, v_source, rows_ptr, start, low + offset,
                        rate, tl.maximum(start_first, low), tl.maximum(start_last, low), tl.minimum(end_first, high),
                        tl.minimum(end_last, high), band_start, band_end, scale2,
                        INDEXED, WIDE, TMA, HEAD_DIM, BLOCK_D, BLOCK_N, PRECISION,
                    )  # fmt: skip
            else:
                dq = _bwd_dq_progression(
                    dq, q, do, lse2, delta, k_source, v_source, rows_ptr, start,
                    query_base if DILATE else offset, rate, start_first, start_last, end_first, end_last,
                    band_start, band_end, scale2, INDEXED, WIDE, TMA, HEAD_DIM, BLOCK_D, BLOCK_N, PRECISION,
                )  # fmt: skip

    dq *= scale
    dq_ptrs = dq_ptr + (rows * stride_dql)[:, None] + columns[None, :]
    if not FIRST:
        dq += tl.load(dq_ptrs, mask=in_tile, other=0.0).to(tl.float32)
    tl.store(dq_ptrs, dq.to(dq_ptr.dtype.element_ty), mask=in_tile)


@triton.jit
def _bwd_dkdv_block(
    dk, dv, k, v, q_source, do_source, stats_ptr, rows_ptr, start, base, rate, first, stop,
    band_start, band_end, scale2,
    MASKED: tl.constexpr, INDEXED: tl.constexpr, WIDE: tl.constexpr, TMA: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add one block of queries to the gradients of a key tile; scores are transposed: keys are rows."""
    q = _load_block(
        q_source, rows_ptr, start, base, rate, first, stop, MASKED, INDEXED, WIDE, TMA, HEAD_DIM, BLOCK_D, BLOCK_M
    )  # [BLOCK_M, D]
    do = _load_block(
        do_source, rows_ptr, start, base, rate, first, stop, MASKED, INDEXED, WIDE, TMA, HEAD_DIM, BLOCK_D, BLOCK_M
    )  # [BLOCK_M, D]
    index = tl.arange(0, BLOCK_M)
    if INDEXED:
        stats_ptrs = stats_ptr + _rows(rows_ptr, start, base, rate, first, stop, True, BLOCK_M)
    else:
        stats_ptrs = stats_ptr + (start + base + tl.cast(first, tl.int64) * rate) + index * rate
    stats = tl.load(stats_ptrs, mask=first + index < stop, other=0) if MASKED else tl.load(stats_ptrs)  # [BLOCK_M]
    lse2, delta = _unpack_stats(stats)
    # Both products that need no softmax first: the tensor cores then have work while the softmax runs.
    s = tl.dot(k, tl.trans(q), input_precision=PRECISION)  # [BLOCK_N, BLOCK_M]
    dp = tl.dot(v, tl.trans(do), input_precision=PRECISION)
    p = tl.exp2(s * scale2 - lse2[None, :])
    if MASKED:
        p = tl.where(_met(base, rate, first, stop, band_start, band_end, BLOCK_M), p, 0.0)
    ds = p * (dp - delta[None, :])
    dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION)
    dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit
def _bwd_dkdv_progression(
    dk, dv, k, v, q_source, do_source, stats_ptr, rows_ptr, start, base, rate,
    start_first, start_last, end_first, end_last, band_start, band_end, scale2,
    INDEXED: tl.constexpr, WIDE: tl.constexpr, TMA: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add everything that a key tile meets in one progression of queries to the tile's gradients."""
    first, stop, blocks, head, tail = _block_range(
        start_first, start_last, end_first, end_last, base, rate, BLOCK_M
    )  # fmt: skip
    for block in range(head, tail):
        dk, dv = _bwd_dkdv_block(
            dk, dv, k, v, q_source, do_source, stats_ptr, rows_ptr, start, base, rate,
            first + block * BLOCK_M, stop, band_start, band_end, scale2,
            False, INDEXED, WIDE, TMA, HEAD_DIM, BLOCK_D, BLOCK_M, PRECISION,
        )  # fmt: skip
    for edge in range(head + blocks - tail):
        block = tl.where(edge < head, edge, edge - head + tail)
        dk, dv = _bwd_dkdv_block(
            dk, dv, k, v, q_source, do_source, stats_ptr, rows_ptr, start, base, rate,
            first + block * BLOCK_M, stop, band_start, band_end, scale2,
            True, INDEXED, WIDE, TMA, HEAD_DIM, BLOCK_D, BLOCK_M, PRECISION,
        )  # fmt: skip
    return dk, dv


@triton.jit(do_not_specialize=RUNTIME)
def bwd_dkdv_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, stats_ptr, dk_ptr, dv_ptr, q_desc, do_desc, cu_seqlens_ptr, rows_ptr, counts_ptr,
    stride_qb, stride_qh, stride_ql, stride_kb, stride_kg, stride_kl, stride_vb, stride_vg, stride_vl,
    stride_dob, stride_doh, stride_dol, stride_dkb, stride_dkg, stride_dkl, stride_dvb, stride_dvg, stride_dvl,
    scale, length, num_documents, search_steps, period, tiles_per_period, windows, previous_windows, rates,
    FIRST: tl.constexpr, GROUP: tl.constexpr, NUM_KV_HEADS: tl.constexpr, BLOCKED: tl.constexpr,
    DISJOINT: tl.constexpr, DILATE: tl.constexpr, SLIDING: tl.constexpr, SEGMENTED: tl.constexpr,
    SIDE: tl.constexpr, LAST_SIDE: tl.constexpr, PACKED: tl.constexpr, INDEXED: tl.constexpr, WIDE: tl.constexpr,
    TMA: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of one tile of a branch's keys and values; unless FIRST, add them to dk and dv.

    The query heads of a KV head are visited one after the other by the same program: no atomics, and every run adds
    in the same order.
    """
    slot = tl.program_id(0)
    kv_head = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    window, previous_window, rate = windows[0], previous_windows[0], rates[0]
    start, tokens, tile = _document(
        cu_seqlens_ptr, counts_ptr, slot, batch, length, num_documents, search_steps, period, tiles_per_period,
        rate * BLOCK_N, PACKED, INDEXED,
    )  # fmt: skip
    offset = _offset(kv_head, rate, NUM_KV_HEADS, BLOCKED)
    key_base, x_first, x_last, count = _tile(tile, offset, rate, tokens, period, tiles_per_period, False, BLOCK_N)
    if count <= 0:
        return

    if INDEXED:
        rows_ptr += batch * length
    x = x_first + rate * tl.arange(0, BLOCK_N)
    rows = _rows(rows_ptr, start, x_first, rate, 0, count, INDEXED, BLOCK_N)
    in_tile = _tile_mask(count, HEAD_DIM, BLOCK_D, BLOCK_N)
    columns = tl.arange(0, BLOCK_D)
    k_ptr += batch * stride_kb + kv_head.to(tl.int64) * stride_kg
    v_ptr += batch * stride_vb + kv_head.to(tl.int64) * stride_vg
    dk_ptr += batch * stride_dkb + kv_head.to(tl.int64) * stride_dkg
    dv_ptr += batch * stride_dvb + kv_head.to(tl.int64) * stride_dvg
    k = tl.load(k_ptr + (rows * stride_kl)[:, None] + columns[None, :], mask=in_tile, other=0.0)  # [BLOCK_N, D]
    v = tl.load(v_ptr + (rows * stride_vl)[:, None] + columns[None, :], mask=in_tile, other=0.0)  # [BLOCK_N, D]

    scale2 = scale * LOG2E
    query_rate = rate if DILATE else 1
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for side in tl.static_range(SIDE, LAST_SIDE):
        band_start, band_end = _band(x, window, previous_window, tokens, True, side, SLIDING, DISJOINT)
        start_first, end_first = _band(x_first, window, previous_window, tokens, True, side, SLIDING, DISJOINT)
        start_last, end_last = _band(x_last, window, previous_window, tokens, True, side, SLIDING, DISJOINT)
        for query_head in range(kv_head * GROUP, kv_head * GROUP + GROUP):
            q_head_ptr = q_ptr + batch * stride_qb + tl.cast(query_head, tl.int64) * stride_qh
            do_head_ptr = do_ptr + batch * stride_dob + tl.cast(query_head, tl.int64) * stride_doh
            q_source = (q_head_ptr, stride_ql, q_desc, tl.program_id(2), query_head)
            do_source = (do_head_ptr, stride_dol, do_desc, tl.program_id(2), query_head)
            at_head = (batch * tl.num_programs(1) * GROUP + query_head) * length
            if SEGMENTED:
                for segment in range(start_first // window, (end_last - 1) // window + 1):
                    low = segment * window
                    high = low + tl.minimum(window, tokens - low)
                    dk, dv = _bwd_dkdv_progression(
                        dk, dv, k, v, q_source, do_source, stats_ptr + at_head, rows_ptr, start, low + offset,
                        query_rate,
                        tl.maximum(start_first, low), tl.maximum(start_last, low), tl.minimum(end_first, high),
                        tl.minimum(end_last, high), band_start, band_end, scale2,
                        INDEXED, WIDE, TMA, HEAD_DIM, BLOCK_D, BLOCK_M, PRECISION,
                    )  # fmt: skip
            else:
                dk, dv = _bwd_dkdv_progression(
                    dk, dv, k, v, q_source, do_source, stats_ptr + at_head, rows_ptr, start,
                    key_base if DILATE else 0, query_rate,
                    start_first, start_last, end_first, end_last, band_start, band_end, scale2,
                    INDEXED, WIDE, TMA, HEAD_DIM, BLOCK_D, BLOCK_M, PRECISION,
                )  # fmt: skip

    dk *= scale
    dk_ptrs = dk_ptr + (rows * stride_dkl)[:, None] + columns[None, :]
    dv_ptrs = dv_ptr + (rows * stride_dvl)[:, None] + columns[None, :]
    if not FIRST:
        dk += tl.load(dk_ptrs, mask=in_tile, other=0.0).to(tl.float32)
        dv += tl.load(dv_ptrs, mask=in_tile, other=0.0).to(tl.float32)
    tl.store(dk_ptrs, dk.to(dk_ptr.dtype.element_ty), mask=in_tile)
    tl.store(dv_ptrs, dv.to(dv_ptr.dtype.element_ty), mask=in_tile)
