"""Attention of a slice's queries to its halo: the Triton kernels, and nothing but kernels.

A halo is made of blocks, one per branch, KV head and side, each an arithmetic progression of positions whose keys lie
behind one another in a buffer. Every query of the slice meets a band of key numbers ``[low, high)`` of a block, and
every key a band of queries; the ends of both never decrease. Dense queries only.

Tables describe the blocks: ``(row in the buffer, keys, position of the first key, window, previous window, rate, side)``
and, for the gradients of the keys, the same for tiles of them, with the KV head in front.
"""

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("the fused kernels need triton; install it or use another backend") from error


FIELDS = tl.constexpr(7)
LEFT = tl.constexpr(0)
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
RUNTIME = ("length", "first", "num_blocks")


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
def _band_of_key(u, side, window, inner, first, stop, SLIDING: tl.constexpr):
    """Return the queries ``[start, end)`` of the slice that the key at position u meets: windows are symmetric."""
    low = tl.where(side == LEFT, first, tl.maximum(_window_start(u, window, SLIDING), first))
    high = tl.where(side == LEFT, tl.minimum(_window_stop(u, window, SLIDING), stop), stop)
    near = tl.maximum(inner, 1)
    after = tl.where(side == LEFT, _window_stop(u, near, SLIDING), low)
    before = tl.where(side == LEFT, high, _window_start(u, near, SLIDING))
    low = tl.where(inner > 0, tl.maximum(low, after), low)
    high = tl.where(inner > 0, tl.minimum(high, before), high)
    return low, high


@triton.jit
def _number(position, base, rate, count):
    """Count the keys base, base + rate, ... of a block before a position: narrow, as all numbers inside a block."""
    ahead = tl.maximum(position - base, 0)
    return tl.minimum((ahead + rate - 1) // rate, count).to(tl.int32)


@triton.jit
def _block(table_ptr):
    row = tl.load(table_ptr)
    count = tl.load(table_ptr + 1)
    base = tl.load(table_ptr + 2)
    window = tl.load(table_ptr + 3)
    inner = tl.load(table_ptr + 4)
    rate = tl.load(table_ptr + 5)
    side = tl.load(table_ptr + 6)
    return row, count, base, window, inner, rate, side


@triton.jit
def _keys_met(table_ptr, num_blocks, x_first, x_last, first, stop, SLIDING: tl.constexpr):
    """Count the keys that some row of a query tile may meet."""
    keys = 0
    for block in range(num_blocks):
        row, count, base, window, inner, rate, side = _block(table_ptr + block * FIELDS)
        start, _ = _band(x_first, side, window, inner, first, stop, SLIDING)
        _, end = _band(x_last, side, window, inner, first, stop, SLIDING)
        keys += tl.maximum(_number(end, base, rate, count) - _number(start, base, rate, count), 0)
    return keys


@triton.jit
def _load_rows(ptr, stride, mask, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr):
    """Load BLOCK rows from ``ptr`` on: wide addresses stay in scalars."""
    columns = tl.arange(0, BLOCK_D)
    pointers = ptr + (tl.arange(0, BLOCK) * stride)[:, None] + columns[None, :]
    return tl.load(pointers, mask=mask[:, None] & (columns < HEAD_DIM)[None, :], other=0.0)


@triton.jit
def _row_pointers(ptr, stride, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr):
    return ptr + (tl.arange(0, BLOCK) * stride)[:, None] + tl.arange(0, BLOCK_D)[None, :]


@triton.jit(do_not_specialize=RUNTIME)
def halo_fwd_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, table_ptr,
    stride_qh, stride_ql, stride_oh, stride_ol, stride_lh, scale, length, first, num_blocks,
    GROUP: tl.constexpr, SLIDING: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Go on with the softmax of (out, lse), in place, over the halo."""
    head = tl.program_id(1).to(tl.int64)
    table_ptr += head // GROUP * num_blocks * FIELDS
    tile = tl.program_id(0).to(tl.int64) * BLOCK_M
    offsets = tl.arange(0, BLOCK_M)
    inside = offsets < length - tile
    first = tl.cast(first, tl.int64)
    stop = first + length
    x_first = first + tile
    x = x_first + offsets
    x_last = tl.minimum(x_first + BLOCK_M, stop) - 1
    if _keys_met(table_ptr, num_blocks, x_first, x_last, first, stop, SLIDING) == 0:
        return

    columns = tl.arange(0, BLOCK_D)
    in_tile = inside[:, None] & (columns < HEAD_DIM)[None, :]
    q_ptr += head * stride_qh + tile * stride_ql
    q = _load_rows(q_ptr, stride_ql, inside, HEAD_DIM, BLOCK_D, BLOCK_M)  # [BLOCK_M, D]
    out_ptrs = _row_pointers(out_ptr + head * stride_oh + tile * stride_ol, stride_ol, BLOCK_D, BLOCK_M)
    lse_ptrs = lse_ptr + head * stride_lh + tile + offsets
    acc = tl.load(out_ptrs, mask=in_tile, other=0.0).to(tl.float32)
    peak = tl.load(lse_ptrs, mask=inside, other=0.0) * LOG2E
    total = tl.where(peak == float("-inf"), 0.0, 1.0)
    scale2 = scale * LOG2E
    for block in range(num_blocks):
        row, count, base, window, inner, rate, side = _block(table_ptr + block * FIELDS)
        start, end = _band(x, side, window, inner, first, stop, SLIDING)
        low, high = _number(start, base, rate, count), _number(end, base, rate, count)  # [BLOCK_M]
        start_first, _ = _band(x_first, side, window, inner, first, stop, SLIDING)
        _, end_last = _band(x_last, side, window, inner, first, stop, SLIDING)
        for key in range(_number(start_first, base, rate, count), _number(end_last, base, rate, count), BLOCK_N):
            numbers = key + tl.arange(0, BLOCK_N)
            there = numbers < count
            place = (row + key) * HEAD_DIM
            k = _load_rows(k_ptr + place, HEAD_DIM, there, HEAD_DIM, BLOCK_D, BLOCK_N)  # [BLOCK_N, D]
            s = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
            met = (numbers[None, :] >= low[:, None]) & (numbers[None, :] < high[:, None])
            s = tl.where(met, s * scale2, float("-inf"))
            new_peak = tl.maximum(peak, tl.max(s, 1))
            # A row that has met nothing yet has peak -inf, and -inf - -inf is nan.
            shift = tl.where(new_peak == float("-inf"), 0.0, new_peak)
            p = tl.exp2(s - shift[:, None])
            decay = tl.exp2(peak - shift)
            total = total * decay + tl.sum(p, 1)
            v = _load_rows(v_ptr + place, HEAD_DIM, there, HEAD_DIM, BLOCK_D, BLOCK_N)
            acc = tl.dot(p.to(v.dtype), v, acc * decay[:, None], input_precision=PRECISION)
            peak = new_peak
    skipped = total == 0.0
    total = tl.where(skipped, 1.0, total)
    lse = tl.where(skipped, float("-inf"), (peak + tl.log2(total)) * LN2)
    tl.store(out_ptrs, (acc / total[:, None]).to(out_ptr.dtype.element_ty), mask=in_tile)
    tl.store(lse_ptrs, lse, mask=inside)


@triton.jit(do_not_specialize=RUNTIME)
def halo_dq_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, dlse_ptr, do_ptr, dq_ptr, delta_ptr, table_ptr,
    stride_qh, stride_ql, stride_oh, stride_ol, stride_lh, stride_dlh, stride_doh, stride_dol, stride_dqh, stride_dql,
    scale, length, first, num_blocks,
    HAS_DLSE: tl.constexpr, GROUP: tl.constexpr, SLIDING: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write the gradient of the queries through the halo, and ``delta = rowsum(do * out) - dlse`` beside it."""
    head = tl.program_id(1).to(tl.int64)
    table_ptr += head // GROUP * num_blocks * FIELDS
    tile = tl.program_id(0).to(tl.int64) * BLOCK_M
    offsets = tl.arange(0, BLOCK_M)
    inside = offsets < length - tile
    first = tl.cast(first, tl.int64)
    stop = first + length
    x_first = first + tile
    x = x_first + offsets
    x_last = tl.minimum(x_first + BLOCK_M, stop) - 1
    if _keys_met(table_ptr, num_blocks, x_first, x_last, first, stop, SLIDING) == 0:
        return

    q_ptr += head * stride_qh + tile * stride_ql
    do_ptr += head * stride_doh + tile * stride_dol
    out_ptr += head * stride_oh + tile * stride_ol
    q = _load_rows(q_ptr, stride_ql, inside, HEAD_DIM, BLOCK_D, BLOCK_M)  # [BLOCK_M, D]
    do = _load_rows(do_ptr, stride_dol, inside, HEAD_DIM, BLOCK_D, BLOCK_M)
    out = _load_rows(out_ptr, stride_ol, inside, HEAD_DIM, BLOCK_D, BLOCK_M)
    lse2 = tl.load(lse_ptr + head * stride_lh + tile + offsets, mask=inside, other=0.0) * LOG2E
    delta = tl.sum(out.to(tl.float32) * do.to(tl.float32), 1)
    if HAS_DLSE:
        dlse = tl.load(dlse_ptr + head * stride_dlh + tile + offsets, mask=inside, other=0.0)
        delta -= tl.where(lse2 == float("-inf"), 0.0, dlse)
    tl.store(delta_ptr + head * length + tile + offsets, delta, mask=inside)
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for block in range(num_blocks):
        row, count, base, window, inner, rate, side = _block(table_ptr + block * FIELDS)
        start, end = _band(x, side, window, inner, first, stop, SLIDING)
        low, high = _number(start, base, rate, count), _number(end, base, rate, count)  # [BLOCK_M]
        start_first, _ = _band(x_first, side, window, inner, first, stop, SLIDING)
        _, end_last = _band(x_last, side, window, inner, first, stop, SLIDING)
        for key in range(_number(start_first, base, rate, count), _number(end_last, base, rate, count), BLOCK_N):
            numbers = key + tl.arange(0, BLOCK_N)
            there = numbers < count
            place = (row + key) * HEAD_DIM
            k = _load_rows(k_ptr + place, HEAD_DIM, there, HEAD_DIM, BLOCK_D, BLOCK_N)  # [BLOCK_N, D]
            v = _load_rows(v_ptr + place, HEAD_DIM, there, HEAD_DIM, BLOCK_D, BLOCK_N)
            s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2E)  # [BLOCK_M, BLOCK_N]
            met = (numbers[None, :] >= low[:, None]) & (numbers[None, :] < high[:, None])
            p = tl.where(met, tl.exp2(s - lse2[:, None]), 0.0)
            dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
            ds = p * (dp - delta[:, None])
            dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    columns = tl.arange(0, BLOCK_D)
    dq_ptrs = _row_pointers(dq_ptr + head * stride_dqh + tile * stride_dql, stride_dql, BLOCK_D, BLOCK_M)
    in_tile = inside[:, None] & (columns < HEAD_DIM)[None, :]
    tl.store(dq_ptrs, (dq * scale).to(dq_ptr.dtype.element_ty), mask=in_tile)


@triton.jit(do_not_specialize=RUNTIME)
def halo_dkdv_kernel(
    q_ptr, k_ptr, v_ptr, lse_ptr, do_ptr, delta_ptr, dk_ptr, dv_ptr, tiles_ptr,
    stride_qh, stride_ql, stride_lh, stride_doh, stride_dol, stride_split, scale, length, first,
    GROUP: tl.constexpr, SPLITS: tl.constexpr, SLIDING: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write one of SPLITS parts of the gradients of a tile of halo keys: every SPLITS-th block of their queries."""
    tiles_ptr += tl.program_id(0) * (FIELDS + 1)
    split = tl.program_id(1)
    kv_head = tl.load(tiles_ptr)
    row, count, base, window, inner, rate, side = _block(tiles_ptr + 1)
    numbers = tl.arange(0, BLOCK_N)
    there = numbers < count
    first = tl.cast(first, tl.int64)
    stop = first + length
    place = row * HEAD_DIM
    k = _load_rows(k_ptr + place, HEAD_DIM, there, HEAD_DIM, BLOCK_D, BLOCK_N)  # [BLOCK_N, D]
    v = _load_rows(v_ptr + place, HEAD_DIM, there, HEAD_DIM, BLOCK_D, BLOCK_N)
    low, high = _band_of_key(base + rate * numbers, side, window, inner, first, stop, SLIDING)
    low, high = (low - first).to(tl.int32), (high - first).to(tl.int32)  # [BLOCK_N]
    x_start, _ = _band_of_key(base, side, window, inner, first, stop, SLIDING)
    _, x_stop = _band_of_key(base + rate * (count - 1), side, window, inner, first, stop, SLIDING)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for x_first in range(x_start + split * BLOCK_M, x_stop, SPLITS * BLOCK_M):
        start = x_first - first
        index = start.to(tl.int32) + tl.arange(0, BLOCK_M)
        inside = index < length
        met = (index[None, :] >= low[:, None]) & (index[None, :] < high[:, None]) & there[:, None]
        for member in range(GROUP):
            head = kv_head * GROUP + member
            q_rows, do_rows = (
                q_ptr + head * stride_qh + start * stride_ql,
                do_ptr + head * stride_doh + start * stride_dol,
            )
            q = _load_rows(q_rows, stride_ql, inside, HEAD_DIM, BLOCK_D, BLOCK_M)
            do = _load_rows(do_rows, stride_dol, inside, HEAD_DIM, BLOCK_D, BLOCK_M)
            lse2 = tl.load(lse_ptr + head * stride_lh + index, mask=inside, other=0.0) * LOG2E
            delta = tl.load(delta_ptr + head * length + index, mask=inside, other=0.0)
            s = tl.dot(k, tl.trans(q), input_precision=PRECISION) * (scale * LOG2E)  # [BLOCK_N, BLOCK_M]
            p = tl.where(met, tl.exp2(s - lse2[None, :]), 0.0)
            dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION)
            dp = tl.dot(v, tl.trans(do), input_precision=PRECISION)
            ds = p * (dp - delta[None, :])
            dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    columns = tl.arange(0, BLOCK_D)
    place += tl.cast(split, tl.int64) * stride_split
    mask = there[:, None] & (columns < HEAD_DIM)[None, :]
    tl.store(_row_pointers(dk_ptr + place, HEAD_DIM, BLOCK_D, BLOCK_N), dk * scale, mask=mask)
    tl.store(_row_pointers(dv_ptr + place, HEAD_DIM, BLOCK_D, BLOCK_N), dv, mask=mask)
