"""A decoding step, fused: the Triton kernels of one new token per row, and nothing but kernels.

A step is bound by reading the weights and the cache once. ``plan_kernel`` runs once per pattern; then each layer is
``linear_kernel`` (norm and query, key, value), ``attend_kernel`` (rotary embedding, the token's slot, attention and
the merge of its stretches), ``linear_kernel`` (output and residual), ``gated_kernel`` and ``linear_kernel`` again.
Results are rounded where the modules round theirs.

With PDL (programmatic dependent launch) a kernel starts while the one before it still runs, asks for its own weights,
which nobody changes, and only then waits. It lets the next one start when it has waited itself: so whatever was
written two kernels ago is there from the start.
"""

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("the fused kernels need triton; install it or use another backend") from error


LOG2E = tl.constexpr(1.4426950408889634)
TURN = tl.constexpr(6.283185307179586)
NEVER = tl.constexpr(2**62)  # the oldest reachable position of a query that is not active
FAR = tl.constexpr(2**30)  # above all slots


@triton.jit
def _wait(PDL: tl.constexpr):
    """Wait for the kernel before, then let the next one start."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def plan_kernel(
    seen_ptr, real_ptr, rope_ptr, inv_freq_ptr, branches_ptr, rings_ptr, plan_ptr, cos_ptr, sin_ptr, arrivals_ptr,
    stride_real, stride_rope, capacity, length, as_source_below, attention_scaling,
    NUM_BRANCHES: tl.constexpr, NUM_RINGS: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    LINEAR: tl.constexpr, NESTED: tl.constexpr, SEGMENTS: tl.constexpr, DILATED: tl.constexpr, ANGLES: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Work out what does not depend on the layer, for one row and KV head.

    ``branches [G, K, 3]``: window, rate, offset. ``rings [G, R, 7]``: base, size, then window, rate and offset of the
    ring's branch, then rate and offset of the next ring's branch (rate 0: there is none). ``plan [B, G, 3 + R + K]``:
    position, slot, branch bits; the end of each ring's filled slots; the oldest position reached in each branch.
    ``cos``, ``sin [B, D]``: of the rotary embedding, whose first 2 * ANGLES dimensions turn.
    """
    if PDL:  # the next kernel waits for this one before it lets another start
        tl.extra.cuda.gdc_launch_dependents()
    kv_head = tl.program_id(0)
    row = tl.program_id(1)
    at_head = row * tl.num_programs(0) + kv_head
    p = tl.load(seen_ptr + row)  # int64
    if real_ptr is not None:
        p = tl.where(tl.load(real_ptr + row * stride_real) != 0, p, -1)

    i = tl.arange(0, BLOCK_K)
    is_branch = i < NUM_BRANCHES
    branch_ptrs = branches_ptr + (kv_head * NUM_BRANCHES + i) * 3
    w = tl.load(branch_ptrs, mask=is_branch, other=1)
    r = tl.load(branch_ptrs + 1, mask=is_branch, other=1)
    offset = tl.load(branch_ptrs + 2, mask=is_branch, other=0)
    p0 = tl.maximum(p, 0)
    kept = is_branch & ((p0 % w) % r == offset) & (p >= 0)
    bits = tl.sum(tl.where(kept, tl.full([BLOCK_K], 1, tl.int64) << i.to(tl.int64), 0), 0)
    if SEGMENTS:
        oldest = p0 - p0 % w
    else:
        oldest = tl.maximum(p0 - w + 1, 0)
    active = p >= 0
    if DILATED:
        active = active & kept
    oldest = tl.where(active, oldest, NEVER)

    ring = tl.arange(0, BLOCK_R)
    is_ring = ring < NUM_RINGS
    ring_ptrs = rings_ptr + (kv_head * NUM_RINGS + ring) * 7
    base = tl.load(ring_ptrs, mask=is_ring, other=0)
    size = tl.load(ring_ptrs + 1, mask=is_ring, other=1)
    rw = tl.load(ring_ptrs + 2, mask=is_ring, other=1)
    rr = tl.load(ring_ptrs + 3, mask=is_ring, other=1)
    ro = tl.load(ring_ptrs + 4, mask=is_ring, other=0)
    if LINEAR:
        here = is_ring & (p >= 0)
        slot = p0 % length
        filled = tl.minimum(p + 1, length) + ring * 0
    elif NESTED:
        inner_r = tl.load(ring_ptrs + 5, mask=is_ring, other=0)
        inner_o = tl.load(ring_ptrs + 6, mask=is_ring, other=0)
        here = is_ring & ((p0 % rw) % rr == ro) & (p >= 0)
        has_inner = inner_r > 0
        inner_r = tl.maximum(inner_r, 1)
        before = (p0 - ro + rr - 1) // rr
        slot = (before - tl.where(has_inner, (p0 - inner_o + inner_r - 1) // inner_r, 0)) % size
        after = (p0 + 1 - ro + rr - 1) // rr - tl.where(has_inner, (p0 + 1 - inner_o + inner_r - 1) // inner_r, 0)
        filled = tl.minimum(after, size)
    else:
        here = is_ring & ((p0 % rw) % rr == ro) & (p >= 0)
        slot = (p0 % rw) // rr
        filled = tl.minimum(tl.minimum(p0, rw - 1) // rr + 1, size)
    chosen = tl.max(tl.where(here, ring, -1), 0)  # later rings have longer windows, and win
    slot = tl.sum(tl.where(ring == chosen, base + slot, 0), 0)
    slot = tl.where(chosen >= 0, slot, capacity)

    plan_ptr += at_head * (3 + NUM_RINGS + NUM_BRANCHES)
    tl.store(plan_ptr, p)
    tl.store(plan_ptr + 1, slot)
    tl.store(plan_ptr + 2, bits)
    tl.store(plan_ptr + 3 + ring, tl.where(p >= 0, base + filled, base), mask=is_ring)
    tl.store(plan_ptr + 3 + NUM_RINGS + i, oldest, mask=is_branch)
    tl.store(arrivals_ptr + at_head, 0)

    if kv_head == 0:
        if rope_ptr is not None:
            position = tl.load(rope_ptr + row * stride_rope)
        else:
            position = p0
        d = tl.arange(0, BLOCK_D)
        turns = d < 2 * ANGLES
        inv_freq = tl.load(inv_freq_ptr + d % ANGLES, mask=turns, other=0.0)
        as_source = position.to(tl.float32) * inv_freq
        angle = position.to(tl.float64) * inv_freq.to(tl.float64)
        angle -= tl.floor(angle / TURN) * TURN
        angle = tl.where(position < as_source_below, as_source, angle.to(tl.float32))
        cos = tl.where(turns, tl.cos(angle) * attention_scaling, 1.0)
        sin = tl.where(turns, tl.sin(angle) * attention_scaling, 0.0)
        in_head = d < HEAD_DIM
        tl.store(cos_ptr + row * HEAD_DIM + d, cos.to(cos_ptr.dtype.element_ty), mask=in_head)
        tl.store(sin_ptr + row * HEAD_DIM + d, sin.to(sin_ptr.dtype.element_ty), mask=in_head)


@triton.jit
def _rstd(x_ptr, eps, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """Compute the reciprocal root mean square of ``x [K]``."""
    squares = 0.0
    for start in tl.static_range(0, K, BLOCK_K):
        column = start + tl.arange(0, BLOCK_K)
        x = tl.load(x_ptr + column, mask=column < K, other=0.0, eviction_policy="evict_last").to(tl.float32)
        squares += tl.sum(x * x, 0)
    return tl.rsqrt(squares / K + eps)


@triton.jit
def _load_rows(w_ptr, rows, num_rows, start, K: tl.constexpr, BLOCK_K: tl.constexpr, EVEN: tl.constexpr):
    """Load columns ``start ... start + BLOCK_K - 1`` of some rows of a weight ``[num_rows, K]``."""
    column = start + tl.arange(0, BLOCK_K)
    ptrs = w_ptr + rows.to(tl.int64)[:, None] * K + column[None, :]
    if EVEN:
        return tl.load(ptrs, eviction_policy="evict_first")
    return tl.load(
        ptrs, mask=(rows < num_rows)[:, None] & (column < K)[None, :], other=0.0, eviction_policy="evict_first"
    )


@triton.jit
def _load_stretch(ptr, start, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """Load a stretch of a vector ``[K]`` that all programs read."""
    column = start + tl.arange(0, BLOCK_K)
    return tl.load(ptr + column, mask=column < K, other=0.0, eviction_policy="evict_last")


@triton.jit
def _normalised(x, rstd, norm):
    """Normalise a stretch and round as ``LlamaRMSNorm`` does."""
    return ((x.to(tl.float32) * rstd).to(x.dtype).to(tl.float32) * norm.to(tl.float32)).to(x.dtype)


@triton.jit
def linear_kernel(
    x_ptr, norm_ptr, w0_ptr, w1_ptr, w2_ptr, b0_ptr, b1_ptr, b2_ptr, out_ptr, eps, end0, end1, num_rows,
    K: tl.constexpr, NORM: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr, EVEN: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Multiply one vector ``x [K]`` by the rows of up to three weights that follow one another.

    The first weight gives ``out[:end0]``, the second the elements up to ``end1``, the third the rest; ROWS divides
    both ends. NORM: ``x`` is normalised first. RESIDUAL: the result is added to what ``out`` holds, which was written
    two kernels ago at least.
    """
    first = tl.program_id(0) * ROWS
    out_rows = first + tl.arange(0, ROWS)
    w_ptr, b_ptr, start_row = w0_ptr, b0_ptr, 0
    if end0 < num_rows:
        if first >= end1:
            w_ptr, b_ptr, start_row = w2_ptr, b2_ptr, end1
        elif first >= end0:
            w_ptr, b_ptr, start_row = w1_ptr, b1_ptr, end0
    w_ptr = tl.multiple_of(w_ptr, 16)
    rows = out_rows - start_row
    valid = out_rows < num_rows
    w = _load_rows(w_ptr, rows, num_rows - start_row, 0, K, BLOCK_K, EVEN)
    # Once the next kernel asks for its weights, a load takes as long as all that is asked for: few are left for then.
    if NORM:
        norm = _load_stretch(norm_ptr, 0, K, BLOCK_K)
    if BIAS:
        bias = tl.load(b_ptr + rows, mask=valid, other=0.0).to(tl.float32)
    if RESIDUAL:
        residual = tl.load(out_ptr + out_rows, mask=valid, other=0.0).to(tl.float32)
    _wait(PDL)
    rstd = 1.0
    if NORM:
        rstd = _rstd(x_ptr, eps, K, BLOCK_K)
    total = tl.zeros([ROWS], tl.float32)
    for start in tl.static_range(0, K, BLOCK_K):
        x = _load_stretch(x_ptr, start, K, BLOCK_K)
        if start > 0:
            w = _load_rows(w_ptr, rows, num_rows - start_row, start, K, BLOCK_K, EVEN)
            if NORM:
                norm = _load_stretch(norm_ptr, start, K, BLOCK_K)
        if NORM:
            x = _normalised(x, rstd, norm)
        total += tl.sum(w.to(tl.float32) * x.to(tl.float32)[None, :], 1)
    if BIAS:
        total += bias
    result = total.to(out_ptr.dtype.element_ty)
    if RESIDUAL:
        result = (residual + result.to(tl.float32)).to(result.dtype)
    tl.store(out_ptr + out_rows, result, mask=valid)


@triton.jit
def gated_kernel(
    x_ptr, norm_ptr, gate_ptr, up_ptr, gate_bias_ptr, up_bias_ptr, out_ptr, eps, num_rows,
    K: tl.constexpr, EVEN: tl.constexpr, ROWS: tl.constexpr, BLOCK_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Compute ``silu(gate x) * (up x)`` of the normalised vector ``x [K]``, for some rows of both weights."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    valid = rows < num_rows
    gate_w = _load_rows(gate_ptr, rows, num_rows, 0, K, BLOCK_K, EVEN)
    up_w = _load_rows(up_ptr, rows, num_rows, 0, K, BLOCK_K, EVEN)
    norm = _load_stretch(norm_ptr, 0, K, BLOCK_K)
    if gate_bias_ptr is not None:
        gate_bias = tl.load(gate_bias_ptr + rows, mask=valid, other=0.0).to(tl.float32)
        up_bias = tl.load(up_bias_ptr + rows, mask=valid, other=0.0).to(tl.float32)
    _wait(PDL)
    rstd = _rstd(x_ptr, eps, K, BLOCK_K)
    gate = tl.zeros([ROWS], tl.float32)
    up = tl.zeros([ROWS], tl.float32)
    for start in tl.static_range(0, K, BLOCK_K):
        x = _load_stretch(x_ptr, start, K, BLOCK_K)
        if start > 0:
            gate_w = _load_rows(gate_ptr, rows, num_rows, start, K, BLOCK_K, EVEN)
            up_w = _load_rows(up_ptr, rows, num_rows, start, K, BLOCK_K, EVEN)
            norm = _load_stretch(norm_ptr, start, K, BLOCK_K)
        x = _normalised(x, rstd, norm).to(tl.float32)
        gate += tl.sum(gate_w.to(tl.float32) * x[None, :], 1)
        up += tl.sum(up_w.to(tl.float32) * x[None, :], 1)
    if gate_bias_ptr is not None:
        gate += gate_bias
        up += up_bias
    dtype = out_ptr.dtype.element_ty
    tl.store(out_ptr + rows, _gated(gate.to(dtype), up.to(dtype)), mask=valid)


@triton.jit
def _gated(gate, up):
    """Compute ``silu(gate) * up``, rounded after each of the two."""
    wide = gate.to(tl.float32)
    silu = (wide / (1.0 + tl.exp2(-wide * LOG2E))).to(gate.dtype)
    return (silu.to(tl.float32) * up.to(tl.float32)).to(gate.dtype)


@triton.jit
def gate_rows_kernel(gate_ptr, up_ptr, out_ptr, width, BLOCK: tl.constexpr):
    """Compute ``silu(gate) * up`` of one stretch of ``[B, width]``."""
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = column < width
    at = tl.program_id(1).to(tl.int64) * width + column
    gate = tl.load(gate_ptr + at, mask=valid, other=0.0)
    up = tl.load(up_ptr + at, mask=valid, other=0.0)
    tl.store(out_ptr + at, _gated(gate, up), mask=valid)


@triton.jit
def norm_rows_kernel(x_ptr, norm_ptr, out_ptr, eps, K: tl.constexpr, BLOCK_K: tl.constexpr, PDL: tl.constexpr):
    """Normalise the rows of ``x [B, K]`` as ``LlamaRMSNorm`` does."""
    row = tl.program_id(0).to(tl.int64) * K
    _wait(PDL)
    rstd = _rstd(x_ptr + row, eps, K, BLOCK_K)
    for start in tl.static_range(0, K, BLOCK_K):
        x = _normalised(
            _load_stretch(x_ptr + row, start, K, BLOCK_K), rstd, _load_stretch(norm_ptr, start, K, BLOCK_K)
        )
        column = start + tl.arange(0, BLOCK_K)
        tl.store(out_ptr + row + column, x.to(out_ptr.dtype.element_ty), mask=column < K)


@triton.jit
def _head(
    x_ptr, norm_ptr, cos_ptr, sin_ptr, at, valid, eps, HEAD_DIM: tl.constexpr, ANGLES: tl.constexpr,
    BLOCK_D: tl.constexpr, QK_NORM: tl.constexpr, ROTATES: tl.constexpr,
):  # fmt: skip
    """Load heads ``x[at + d]``, normalise and rotate them, rounding as the modules do: ``[M, BLOCK_D]``."""
    d = tl.arange(0, BLOCK_D)
    mask = valid[:, None] & (d < HEAD_DIM)[None, :]
    x = tl.load(x_ptr + at[:, None] + d[None, :], mask=mask, other=0.0)
    dtype = x.dtype
    rstd = tl.zeros([at.shape[0]], tl.float32)
    if QK_NORM:
        wide = x.to(tl.float32)
        rstd = tl.rsqrt(tl.sum(wide * wide, 1) / HEAD_DIM + eps)
        weight = tl.load(norm_ptr + d, mask=d < HEAD_DIM, other=0.0).to(tl.float32)
        x = ((wide * rstd[:, None]).to(dtype).to(tl.float32) * weight[None, :]).to(dtype)
    if ROTATES:
        turns = d < 2 * ANGLES
        partner = tl.where(turns, tl.where(d < ANGLES, d + ANGLES, d - ANGLES), d)
        other = tl.load(x_ptr + at[:, None] + partner[None, :], mask=mask, other=0.0)
        if QK_NORM:
            weight = tl.load(norm_ptr + partner, mask=d < HEAD_DIM, other=0.0).to(tl.float32)
            other = ((other.to(tl.float32) * rstd[:, None]).to(dtype).to(tl.float32) * weight[None, :]).to(dtype)
        cos = tl.load(cos_ptr + d, mask=d < HEAD_DIM, other=0.0).to(tl.float32)
        sin = tl.load(sin_ptr + d, mask=d < HEAD_DIM, other=0.0).to(tl.float32)
        sin = tl.where(d < ANGLES, -sin, sin)
        straight = (x.to(tl.float32) * cos[None, :]).to(dtype)
        across = (other.to(tl.float32) * sin[None, :]).to(dtype)
        x = (straight.to(tl.float32) + across.to(tl.float32)).to(dtype)
    return x


@triton.jit
def _times(u, bits, p, oldest, BLOCK_K: tl.constexpr, COUNT_OVERLAPS: tl.constexpr):
    """Count through how many branches the query at ``p`` reaches each key: ``[keys]`` int32."""
    i = tl.arange(0, BLOCK_K).to(tl.int64)
    kept = ((bits[:, None] >> i[None, :]) & 1) != 0
    times = tl.sum((kept & (u[:, None] >= oldest[None, :])).to(tl.int32), 1)
    times = tl.where(u <= p, times, 0)
    return times if COUNT_OVERLAPS else tl.minimum(times, 1)


@triton.jit
def _merge(
    part_ptr, part_lse_ptr, out_ptr, num_parts, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_G: tl.constexpr, MAX_PARTS: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Merge ``part [GROUP, num_parts, D]`` by their lse into one softmax ``out [GROUP, D]``."""
    g = tl.arange(0, BLOCK_G)
    d = tl.arange(0, BLOCK_D)
    part = tl.arange(0, MAX_PARTS)
    lse2 = tl.load(  # .cg: from where the other programs' stores are
        part_lse_ptr + g[:, None] * num_parts + part[None, :],
        mask=(g < GROUP)[:, None] & (part < num_parts)[None, :], other=float("-inf"), cache_modifier=".cg",
    )  # fmt: skip
    peak = tl.max(lse2, 1)
    peak = tl.where(peak == float("-inf"), 0.0, peak)
    total = tl.sum(tl.exp2(lse2 - peak[:, None]), 1)
    merged = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
    for first in tl.static_range(0, MAX_PARTS, BLOCK_P):
        at_part = g[:, None] * num_parts + (first + tl.arange(0, BLOCK_P))[None, :]
        there = (g < GROUP)[:, None] & (first + tl.arange(0, BLOCK_P) < num_parts)[None, :]
        weight = tl.load(part_lse_ptr + at_part, mask=there, other=float("-inf"), cache_modifier=".cg")
        weight = tl.exp2(weight - peak[:, None])
        parts = tl.load(
            part_ptr + at_part[:, :, None] * HEAD_DIM + d[None, None, :],
            mask=there[:, :, None] & (d < HEAD_DIM)[None, None, :], other=0.0, cache_modifier=".cg",
        )  # fmt: skip
        merged += tl.sum(parts * weight[:, :, None], 1)
    merged = merged / tl.where(total > 0.0, total, 1.0)[:, None]
    tl.store(
        out_ptr + g[:, None] * HEAD_DIM + d[None, :], merged.to(out_ptr.dtype.element_ty),
        mask=(g < GROUP)[:, None] & (d < HEAD_DIM)[None, :],
    )  # fmt: skip


@triton.jit(do_not_specialize=("num_keys",))
def attend_kernel(
    q_ptr, k_ptr, v_ptr, keys_ptr, values_ptr, positions_ptr, branches_ptr, seen_ptr, columns_ptr,
    plan_ptr, rings_ptr, cos_ptr, sin_ptr, q_norm_ptr, k_norm_ptr, part_ptr, part_lse_ptr, arrivals_ptr, out_ptr,
    stride_q, stride_k, stride_v, scale, eps, num_keys,
    NUM_BRANCHES: tl.constexpr, NUM_RINGS: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    COUNT_OVERLAPS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, ANGLES: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_G: tl.constexpr,
    MAX_PARTS: tl.constexpr, BLOCK_P: tl.constexpr, QK_NORM: tl.constexpr, ROTATES: tl.constexpr,
    PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Take the new token into the cache; attend from it, for all query heads of a KV head, to a stretch of the slots.

    Stretches are of equal length, and end where the filled slots do: a cache with room for much more is no slower.
    ``q [B, H * D]``, ``k`` and ``v [B, G * D]`` as projected, their rows ``stride`` apart. The program whose stretch
    holds the token's slot adds the token's own key, and writes it; what stood there is out of reach. The last program
    of a KV head to arrive merges all stretches' parts, in their order, into ``out [B, H * D]``. ``seen`` and
    ``columns`` go on by one token.
    """
    stretch = tl.program_id(0)
    kv_head = tl.program_id(1)
    num_kv_heads = tl.num_programs(1)
    row = tl.program_id(2).to(tl.int64)
    at_head = row * num_kv_heads + kv_head
    num_parts = tl.num_programs(0)

    # What the plan says was written two kernels ago at least.
    plan_ptr += at_head * (3 + NUM_RINGS + NUM_BRANCHES)
    p = tl.load(plan_ptr, cache_modifier=".cg")
    slot = tl.load(plan_ptr + 1, cache_modifier=".cg").to(tl.int32)
    bits_new = tl.load(plan_ptr + 2, cache_modifier=".cg")
    ring = tl.arange(0, BLOCK_R)
    is_ring = ring < NUM_RINGS
    base = tl.load(rings_ptr + (kv_head * NUM_RINGS + ring) * 7, mask=is_ring, other=0).to(tl.int32)
    end = tl.load(plan_ptr + 3 + ring, mask=is_ring, other=0, cache_modifier=".cg").to(tl.int32)
    i = tl.arange(0, BLOCK_K)
    oldest = tl.load(plan_ptr + 3 + NUM_RINGS + i, mask=i < NUM_BRANCHES, other=NEVER, cache_modifier=".cg")
    used = tl.maximum(tl.max(tl.where(is_ring & (end > base), end, 0), 0), slot + 1)
    length = tl.cdiv(tl.cdiv(used, BLOCK_N), num_parts) * BLOCK_N
    start = stretch * length
    stop = start + length
    # The slots of this stretch between its first and its last filled one.
    some = is_ring & (end > base) & (base < stop) & (end > start)
    low = tl.min(tl.where(some, tl.maximum(base, start), FAR), 0)
    high = tl.max(tl.where(some, tl.minimum(end, stop), 0), 0)

    _wait(PDL)
    d = tl.arange(0, BLOCK_D)
    in_head = d < HEAD_DIM
    m = tl.arange(0, BLOCK_M)
    valid = m < GROUP
    cos_ptr += row * HEAD_DIM
    sin_ptr += row * HEAD_DIM
    at_query = row * stride_q + (kv_head * GROUP + m) * HEAD_DIM
    q = _head(
        q_ptr, q_norm_ptr, cos_ptr, sin_ptr, at_query, valid, eps, HEAD_DIM, ANGLES, BLOCK_D, QK_NORM, ROTATES
    )  # [BLOCK_M, BLOCK_D]
    one = tl.zeros([1], tl.int32)
    k_new = _head(
        k_ptr, k_norm_ptr, cos_ptr, sin_ptr, one + row * stride_k + kv_head * HEAD_DIM, one == 0, eps,
        HEAD_DIM, ANGLES, BLOCK_D, QK_NORM, ROTATES,
    )  # fmt: skip
    v_new = tl.load(v_ptr + row * stride_v + kv_head * HEAD_DIM + d, mask=in_head, other=0.0)

    keys_ptr += at_head * num_keys * HEAD_DIM
    values_ptr += at_head * num_keys * HEAD_DIM
    positions_ptr += at_head * num_keys
    branches_ptr += at_head * num_keys
    scale2 = scale * LOG2E
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    for first in range(low, high, BLOCK_N):
        index = first + tl.arange(0, BLOCK_N)
        held = index < high
        mask = held[:, None] & in_head[None, :]
        offsets = index.to(tl.int64)[:, None] * HEAD_DIM + d[None, :]
        k = tl.load(keys_ptr + offsets, mask=mask, other=0.0)
        v = tl.load(values_ptr + offsets, mask=mask, other=0.0)
        u = tl.load(positions_ptr + index, mask=held, other=-1)
        bits = tl.load(branches_ptr + index, mask=held, other=0)
        times = _times(u, bits, p, oldest, BLOCK_K, COUNT_OVERLAPS)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale2
        if COUNT_OVERLAPS:
            s += tl.log2(tl.maximum(times, 1).to(tl.float32))[None, :]
        s = tl.where((times > 0)[None, :], s, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(s, 1))
        shift = tl.where(new_peak == float("-inf"), 0.0, new_peak)  # -inf - -inf is nan
        weight = tl.exp2(s - shift[:, None])
        decay = tl.exp2(peak - shift)
        total = total * decay + tl.sum(weight, 1)
        acc = tl.dot(weight.to(v.dtype), v, acc * decay[:, None], input_precision=PRECISION)
        peak = new_peak

    if (slot >= start) & (slot < stop):
        times = _times(one + p, one + bits_new, p, oldest, BLOCK_K, COUNT_OVERLAPS)  # [1]
        s = tl.sum(q.to(tl.float32) * k_new.to(tl.float32), 1) * scale2
        s += tl.log2(tl.maximum(times, 1).to(tl.float32))
        s = tl.where(times > 0, s, float("-inf"))
        new_peak = tl.maximum(peak, s)
        shift = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        weight = tl.exp2(s - shift)
        decay = tl.exp2(peak - shift)
        total = total * decay + weight
        acc = acc * decay[:, None] + weight[:, None] * v_new.to(tl.float32)[None, :]
        peak = new_peak
        at_slot = slot.to(tl.int64) * HEAD_DIM + d
        tl.store(keys_ptr + at_slot[None, :], k_new, mask=in_head[None, :])
        tl.store(values_ptr + at_slot, v_new, mask=in_head)
        tl.store(positions_ptr + slot, tl.where(slot < num_keys - 1, p, -1))
        tl.store(branches_ptr + slot, bits_new)
    if (stretch == 0) & (kv_head == 0):
        tl.store(seen_ptr + row, tl.load(seen_ptr + row) + (p >= 0).to(tl.int64))
        if row == 0:
            tl.store(columns_ptr, tl.load(columns_ptr) + 1)

    met = total > 0.0
    acc = acc / tl.where(met, total, 1.0)[:, None]
    out_ptr += (at_head * GROUP) * HEAD_DIM
    if MAX_PARTS == 1:
        tl.store(
            out_ptr + m[:, None] * HEAD_DIM + d[None, :], acc.to(out_ptr.dtype.element_ty),
            mask=valid[:, None] & in_head[None, :],
        )  # fmt: skip
    else:
        part_ptr += at_head * GROUP * num_parts * HEAD_DIM
        part_lse_ptr += at_head * GROUP * num_parts
        at_part = m * num_parts + stretch
        tl.store(part_ptr + (at_part * HEAD_DIM)[:, None] + d[None, :], acc, mask=valid[:, None] & in_head[None, :])
        tl.store(part_lse_ptr + at_part, tl.where(met, peak + tl.log2(total), float("-inf")), mask=valid)
        tl.debug_barrier()  # the parts of all threads are written before this program counts as arrived
        if tl.atomic_add(arrivals_ptr + at_head, 1, sem="acq_rel") == num_parts - 1:
            tl.store(arrivals_ptr + at_head, 0)  # for the next layer
            _merge(part_ptr, part_lse_ptr, out_ptr, num_parts, GROUP, HEAD_DIM, BLOCK_D, BLOCK_G, MAX_PARTS, BLOCK_P)
