"""Fused attention over cached keys: the Triton kernels, and nothing but kernels.

Two of them for a few new tokens, where reading the cache is all the work: each program takes a stretch of the cache
for all query heads of a KV head, and a second kernel merges the stretches. One for long chunks: a flash attention in
which every query meets a range of sorted keys. The softmax runs in base 2; lse is stored in natural log.
"""

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("the fused kernels need triton; install it or use another backend") from error


LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
FAR = tl.constexpr(2**30)  # above all indices of keys


@triton.jit
def _add_block(acc, total, peak, s, v, PRECISION: tl.constexpr):
    """Add a block of scores ``[BLOCK_M, BLOCK_N]``, in base 2 and -inf where not met, to the running softmax."""
    new_peak = tl.maximum(peak, tl.max(s, 1))
    shift = tl.where(new_peak == float("-inf"), 0.0, new_peak)  # -inf - -inf is nan
    p = tl.exp2(s - shift[:, None])
    decay = tl.exp2(peak - shift)
    total = total * decay + tl.sum(p, 1)
    acc = tl.dot(p.to(v.dtype), v, acc * decay[:, None], input_precision=PRECISION)
    return acc, total, new_peak


@triton.jit
def _times_reached(
    u, bits, oldest_ptr, newest_ptr, token, valid, num_branches, COUNT_OVERLAPS: tl.constexpr
):  # fmt: skip
    """Count through how many branches each token reaches each key: ``[tokens, keys]``."""
    times = (token[:, None] + u[None, :]).to(tl.int32) * 0
    for branch in range(num_branches):
        oldest = tl.load(oldest_ptr + token * num_branches + branch, mask=valid, other=2**62)
        kept = ((bits >> branch) & 1).to(tl.int32)
        times += tl.where(u[None, :] >= oldest[:, None], kept[None, :], 0)
    newest = tl.load(newest_ptr + token, mask=valid, other=-1)
    times = tl.where(u[None, :] <= newest[:, None], times, 0)
    return times if COUNT_OVERLAPS else tl.minimum(times, 1)


@triton.jit(do_not_specialize=("num_keys", "keys_per_program", "num_tokens", "num_branches"))
def decode_kernel(
    q_ptr, k_ptr, v_ptr, positions_ptr, branches_ptr, oldest_ptr, newest_ptr, part_ptr, part_lse_ptr,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kg, stride_kn, stride_vb, stride_vg, stride_vn,
    stride_pb, stride_pg, scale, num_keys, keys_per_program, num_tokens, num_branches,
    COUNT_OVERLAPS: tl.constexpr, GROUP: tl.constexpr, SINGLE: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Attend a few tokens, for all query heads of a KV head, to one stretch of the cache.

    Rows are (query head, token) pairs. ``oldest [B, G, T, K]`` holds the oldest position that a token reaches in each
    branch, ``newest [B, T]`` its own. SINGLE: there is one token. Results go to ``part [B, H, T, stretches, D]`` and, in base 2, ``part_lse``.
    """
    stretch = tl.program_id(0)
    kv_head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    num_kv_heads = tl.num_programs(1)
    row = tl.arange(0, BLOCK_M)
    valid = row < GROUP * num_tokens
    head = kv_head * GROUP + row // num_tokens
    token = row % num_tokens
    columns = tl.arange(0, BLOCK_D)
    in_head = (columns < HEAD_DIM)[None, :]
    q_ptrs = q_ptr + batch * stride_qb + (head * stride_qh + token * stride_qt)[:, None] + columns[None, :]
    q = tl.load(q_ptrs, mask=valid[:, None] & in_head, other=0.0)  # [BLOCK_M, D]
    k_ptr += batch * stride_kb + kv_head * stride_kg
    v_ptr += batch * stride_vb + kv_head * stride_vg
    positions_ptr += batch * stride_pb + kv_head * stride_pg
    branches_ptr += batch * stride_pb + kv_head * stride_pg
    oldest_ptr += (batch * num_kv_heads + kv_head) * num_tokens * num_branches
    newest_ptr += batch * num_tokens

    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    start = stretch * keys_per_program
    stop = tl.minimum(start + keys_per_program, num_keys)
    for first in range(start, stop, BLOCK_N):
        index = first + tl.arange(0, BLOCK_N)
        held = index < stop
        u = tl.load(positions_ptr + index, mask=held, other=-1)
        bits = tl.load(branches_ptr + index, mask=held, other=0)
        if SINGLE:  # the same for all rows
            only = tl.zeros([1], tl.int32)
            times = _times_reached(
                u, bits, oldest_ptr, newest_ptr, only, only == 0, num_branches, COUNT_OVERLAPS
            )  # [1, BLOCK_N]
        else:
            times = _times_reached(
                u, bits, oldest_ptr, newest_ptr, token, valid, num_branches, COUNT_OVERLAPS
            )  # [BLOCK_M, BLOCK_N]
        if tl.max(tl.max(times, 1), 0) > 0:
            rows = index.to(tl.int64)
            mask = held[:, None] & in_head
            k = tl.load(k_ptr + (rows * stride_kn)[:, None] + columns[None, :], mask=mask, other=0.0)
            v = tl.load(v_ptr + (rows * stride_vn)[:, None] + columns[None, :], mask=mask, other=0.0)
            s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2E)  # [BLOCK_M, BLOCK_N]
            s += tl.log2(tl.maximum(times, 1).to(tl.float32))
            s = tl.where(times > 0, s, float("-inf"))
            acc, total, peak = _add_block(acc, total, peak, s, v, PRECISION)

    met = total > 0.0
    total = tl.where(met, total, 1.0)
    num_heads = num_kv_heads * GROUP
    at_row = ((batch * num_heads + head) * num_tokens + token) * tl.num_programs(0) + stretch
    part_ptrs = part_ptr + (at_row * HEAD_DIM)[:, None] + columns[None, :]
    tl.store(part_ptrs, acc / total[:, None], mask=valid[:, None] & in_head)
    tl.store(part_lse_ptr + at_row, tl.where(met, peak + tl.log2(total), float("-inf")), mask=valid)


@triton.jit
def merge_kernel(
    part_ptr, part_lse_ptr, out_ptr, num_parts, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Merge the stretches of one (row of the batch, query head, token) into one softmax."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK_D)
    acc = tl.zeros([BLOCK_D], tl.float32)
    total = 0.0
    peak = float("-inf")
    for first in range(0, num_parts, BLOCK_P):
        part = first + tl.arange(0, BLOCK_P)
        lse2 = tl.load(part_lse_ptr + row * num_parts + part, mask=part < num_parts, other=float("-inf"))
        mask = (part < num_parts)[:, None] & (columns < HEAD_DIM)[None, :]
        parts = tl.load(
            part_ptr + ((row * num_parts + part) * HEAD_DIM)[:, None] + columns[None, :], mask=mask, other=0.0
        )
        new_peak = tl.maximum(peak, tl.max(lse2, 0))
        shift = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        weight = tl.exp2(lse2 - shift)
        decay = tl.exp2(peak - shift)
        total = total * decay + tl.sum(weight, 0)
        acc = acc * decay + tl.sum(parts * weight[:, None], 0)
        peak = new_peak
    total = tl.where(total > 0.0, total, 1.0)
    tl.store(out_ptr + row * HEAD_DIM + columns, (acc / total).to(out_ptr.dtype.element_ty), mask=columns < HEAD_DIM)


@triton.jit
def _range_block(
    acc, total, peak, q, k_ptr, v_ptr, start, first, stop, scale2,
    MASKED: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Add the keys ``start ... start + BLOCK_N - 1``, of which row m meets those in ``[first[m], stop[m])``."""
    index = start + tl.arange(0, BLOCK_N)
    offsets = (index.to(tl.int64) * HEAD_DIM)[:, None] + tl.arange(0, BLOCK_D)[None, :]
    if MASKED:
        mask = (index < tl.max(stop, 0))[:, None] & (tl.arange(0, BLOCK_D) < HEAD_DIM)[None, :]
        k = tl.load(k_ptr + offsets, mask=mask, other=0.0)  # [BLOCK_N, D]
        v = tl.load(v_ptr + offsets, mask=mask, other=0.0)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale2
        met = (index[None, :] >= first[:, None]) & (index[None, :] < stop[:, None])
        s = tl.where(met, s, float("-inf"))
        return _add_block(acc, total, peak, s, v, PRECISION)
    else:
        if HEAD_DIM < BLOCK_D:
            mask = (tl.arange(0, BLOCK_D) < HEAD_DIM)[None, :]
            k = tl.load(k_ptr + offsets, mask=mask, other=0.0)
            v = tl.load(v_ptr + offsets, mask=mask, other=0.0)
        else:
            k = tl.load(k_ptr + offsets)
            v = tl.load(v_ptr + offsets)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        new_peak = tl.maximum(peak, tl.max(s, 1) * scale2)
        p = tl.exp2(s * scale2 - new_peak[:, None])
        decay = tl.exp2(peak - new_peak)
        total = total * decay + tl.sum(p, 1)
        acc = tl.dot(p.to(v.dtype), v, acc * decay[:, None], input_precision=PRECISION)
        return acc, total, new_peak


@triton.jit(do_not_specialize=("num_queries", "num_rows", "num_keys", "num_groups"))
def range_kernel(
    q_ptr, k_ptr, v_ptr, queries_ptr, first_ptr, stop_ptr, out_ptr, lse_ptr,
    stride_qb, stride_qh, stride_qt, stride_ob, stride_oh, stride_ot,
    scale, num_queries, num_rows, num_keys, num_groups,
    GROUP: tl.constexpr, INDEXED: tl.constexpr, CONTINUES: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Attend one tile of queries to their ranges of sorted keys ``[B, G, num_keys, D]``, group by group.

    INDEXED: the queries are those at the indices ``queries [B, G, num_queries]``, else all of them. CONTINUES: the
    softmax goes on where the (out, lse) of earlier passes left it.
    """
    tile = tl.program_id(0)
    query_head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    at_head = batch * (tl.num_programs(1) // GROUP) + query_head // GROUP
    query = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    valid = query < num_queries
    columns = tl.arange(0, BLOCK_D)
    in_tile = valid[:, None] & (columns < HEAD_DIM)[None, :]
    if INDEXED:
        rows = tl.load(queries_ptr + at_head * num_queries + query, mask=valid, other=0).to(tl.int64)
    else:
        rows = query.to(tl.int64)
    q_ptrs = q_ptr + batch * stride_qb + query_head * stride_qh + (rows * stride_qt)[:, None] + columns[None, :]
    q = tl.load(q_ptrs, mask=in_tile, other=0.0)  # [BLOCK_M, D]
    out_ptrs = out_ptr + batch * stride_ob + query_head * stride_oh + (rows * stride_ot)[:, None] + columns[None, :]
    lse_ptrs = lse_ptr + (batch * tl.num_programs(1) + query_head) * num_rows + rows
    k_ptr += at_head * num_keys * HEAD_DIM
    v_ptr += at_head * num_keys * HEAD_DIM
    if CONTINUES:
        acc = tl.load(out_ptrs, mask=in_tile, other=0.0).to(tl.float32)
        peak = tl.load(lse_ptrs, mask=valid, other=0.0) * LOG2E
        total = tl.where(peak == float("-inf"), 0.0, 1.0)
    else:
        acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)

    scale2 = scale * LOG2E
    for group in range(num_groups):
        at_range = (at_head * num_groups + group) * num_queries + query
        first = tl.load(first_ptr + at_range, mask=valid, other=0)
        stop = tl.load(stop_ptr + at_range, mask=valid, other=0)
        some = stop > first
        low = tl.min(tl.where(some, first, FAR), 0)
        high = tl.max(tl.where(some, stop, 0), 0)
        # Between these every row meets every key; a row that meets nothing leaves nothing between.
        inner_low = tl.max(tl.where(valid, first, 0), 0)
        inner_high = tl.min(tl.where(valid, stop, FAR), 0)
        blocks = tl.where(high > low, (high - low + BLOCK_N - 1) // BLOCK_N, 0)
        head = tl.minimum((tl.maximum(inner_low - low, 0) + BLOCK_N - 1) // BLOCK_N, blocks)
        tail = tl.maximum(tl.minimum(tl.maximum(inner_high - low, 0) // BLOCK_N, blocks), head)
        for block in range(head, tail):
            acc, total, peak = _range_block(
                acc, total, peak, q, k_ptr, v_ptr, low + block * BLOCK_N, first, stop, scale2,
                False, HEAD_DIM, BLOCK_D, BLOCK_N, PRECISION,
            )  # fmt: skip
        for edge in range(head + blocks - tail):
            block = tl.where(edge < head, edge, edge - head + tail)
            acc, total, peak = _range_block(
                acc, total, peak, q, k_ptr, v_ptr, low + block * BLOCK_N, first, stop, scale2,
                True, HEAD_DIM, BLOCK_D, BLOCK_N, PRECISION,
            )  # fmt: skip

    met = total > 0.0
    total = tl.where(met, total, 1.0)
    tl.store(out_ptrs, (acc / total[:, None]).to(out_ptr.dtype.element_ty), mask=in_tile)
    tl.store(lse_ptrs, tl.where(met, (peak + tl.log2(total)) * LN2, float("-inf")), mask=valid)
