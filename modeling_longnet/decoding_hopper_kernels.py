"""The attention of a decoding step for Hopper, in Gluon: the kernel, and nothing but the kernel.

It computes what ``attend_kernel`` does for one row. Its programs have all slots of the cache that they attend to on
their way into shared memory before they wait for the kernel that computes the query: together they hold the whole
cache of a layer, and nothing is left to wait for when the query comes.
"""

from .decoding_kernels import LOG2E
from .dilated_attention_hopper_progress_kernels import _await_grids_before, _let_next_start


try:
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2
except ImportError as error:
    raise ImportError("the Hopper kernels need Gluon, which comes with triton") from error


ROWS = gl.constexpr(16)  # of queries, that the tensor cores multiply at once


@gluon.jit
def _wait(PDL: gl.constexpr):
    """Wait for the kernel before, then let the next one start."""
    if PDL:
        _await_grids_before()
        _let_next_start()


@gluon.jit
def _fetch_ahead(ptr, program, size):
    """Have the second-level cache fetch the program's share of what is read soon; the first thread asks for all."""
    gl.inline_asm_elementwise(
        "{ .reg .pred any, asks; .reg .b32 thread; mov.u32 thread, %tid.x; setp.ne.s32 any, $2, 0; "
        "setp.eq.and.u32 asks, thread, 0, any; mov.b32 $0, 0; @asks cp.async.bulk.prefetch.L2.global [$1], $2; }",
        "=r,l,r", [ptr + program.to(gl.int64) * (size // (ptr.dtype.element_ty.primitive_bitwidth // 8)), size],
        dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def _product(x, by):
    """Multiply in float32 and round to the type of ``x``."""
    return (x.to(gl.float32) * by.to(gl.float32)).to(x.dtype)


@gluon.jit
def _merge(
    part_ptr, part_lse_ptr, out_ptr, num_parts, GROUP: gl.constexpr, BLOCK_G: gl.constexpr, HEAD_DIM: gl.constexpr,
    MAX_PARTS: gl.constexpr,
):  # fmt: skip
    """Merge ``part [GROUP, num_parts, D]`` by their lse into one softmax ``out [GROUP, D]``."""
    MERGED: gl.constexpr = 4096 // HEAD_DIM  # parts at once
    # A row of D in 16 lanes; each warp has parts of its own.
    lanes: gl.constexpr = gl.BlockedLayout([1, 1, HEAD_DIM // 16], [1, 2, 16], [4, 1, 1], [2, 1, 0])
    rows: gl.constexpr = gl.SliceLayout(2, lanes)
    g = gl.arange(0, BLOCK_G, layout=gl.SliceLayout(0, rows))
    d = gl.arange(0, HEAD_DIM, layout=gl.SliceLayout(0, gl.SliceLayout(0, lanes)))
    peak = gl.full([BLOCK_G], float("-inf"), gl.float32, layout=gl.SliceLayout(0, rows))
    total = gl.full([BLOCK_G], 0.0, gl.float32, layout=gl.SliceLayout(0, rows))
    merged = gl.full([BLOCK_G, HEAD_DIM], 0.0, gl.float32, layout=gl.SliceLayout(0, lanes))
    for first in gl.static_range(0, MAX_PARTS, MERGED):  # .cg: from where the other programs' stores are
        part = first + gl.arange(0, MERGED, layout=gl.SliceLayout(1, rows))
        at_part = g[None, :] * num_parts + part[:, None]
        there = (g[None, :] < GROUP) & (part[:, None] < num_parts)
        lse2 = gl.load(part_lse_ptr + at_part, mask=there, other=float("-inf"), cache_modifier=".cg")
        parts = gl.load(
            part_ptr + gl.expand_dims(at_part, 2) * HEAD_DIM + gl.expand_dims(gl.expand_dims(d, 0), 0),
            mask=gl.expand_dims(there, 2), other=0.0, cache_modifier=".cg",
        )  # fmt: skip
        joined = gl.maximum(peak, gl.max(lse2, 0))
        shift = gl.where(joined == float("-inf"), 0.0, joined)
        weight = gl.exp2(lse2 - shift[None, :])
        decay = gl.exp2(peak - shift)
        total = total * decay + gl.sum(weight, 0)
        decay = gl.convert_layout(decay, gl.SliceLayout(1, gl.SliceLayout(0, lanes)))
        merged = merged * decay[:, None] + gl.sum(parts * gl.expand_dims(weight, 2), 0)
        peak = joined
    total = gl.convert_layout(total, gl.SliceLayout(1, gl.SliceLayout(0, lanes)))
    merged = merged / gl.where(total > 0.0, total, 1.0)[:, None]
    g = gl.arange(0, BLOCK_G, layout=gl.SliceLayout(1, gl.SliceLayout(0, lanes)))
    d = gl.arange(0, HEAD_DIM, layout=gl.SliceLayout(0, gl.SliceLayout(0, lanes)))
    gl.store(
        out_ptr + g[:, None] * HEAD_DIM + d[None, :], merged.to(out_ptr.dtype.element_ty), mask=(g < GROUP)[:, None]
    )


@gluon.jit
def hopper_attend_kernel(
    q_ptr, k_ptr, v_ptr, keys_ptr, values_ptr, positions_ptr, branches_ptr, seen_ptr, columns_ptr,
    plan_ptr, cos_ptr, sin_ptr, q_norm_ptr, k_norm_ptr, part_ptr, part_lse_ptr, arrivals_ptr, out_ptr,
    ahead_ptr, more_ahead_ptr, scale, eps, num_keys, ahead_bytes,
    NUM_BRANCHES: gl.constexpr, NUM_RINGS: gl.constexpr, COUNT_OVERLAPS: gl.constexpr, GROUP: gl.constexpr,
    BLOCK_G: gl.constexpr, HEAD_DIM: gl.constexpr, ANGLES: gl.constexpr, KEYS: gl.constexpr,
    MAX_PARTS: gl.constexpr, LINEAR: gl.constexpr, QK_NORM: gl.constexpr, ROTATES: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """As ``attend_kernel``, for one row; each program attends to KEYS slots, all at once.

    When these have come, nothing is left to read until all parts are merged and the output's weight, which is small, has
    been multiplied: the beginning of the weights after that is fetched into the cache, ``ahead_bytes`` by each program.
    """
    stretch = gl.program_id(0)
    kv_head = gl.program_id(1)
    num_parts = gl.num_programs(0)
    dtype: gl.constexpr = q_ptr.dtype.element_ty
    mma: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [1, 4], [16, 8])
    of_key: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    # What is copied in pieces of 16 bytes: rows of D.
    lanes: gl.constexpr = gl.BlockedLayout([1, 8], [256 // HEAD_DIM, HEAD_DIM // 8], [4, 1], [1, 0])
    swizzled: gl.constexpr = gl.SwizzledSharedLayout(8, 1, 8, [1, 0])

    # What the plan says was written two kernels ago at least.
    plan_ptr += kv_head * (3 + NUM_RINGS + NUM_BRANCHES)
    p = gl.load(plan_ptr, cache_modifier=".cg")
    slot = gl.load(plan_ptr + 1, cache_modifier=".cg").to(gl.int32)
    bits_new = gl.load(plan_ptr + 2, cache_modifier=".cg")
    start = stretch * KEYS
    stop = gl.minimum(start + KEYS, num_keys)
    low, high = start, stop
    if LINEAR:  # which may be nearly empty: the slots of this stretch up to the last filled one
        high = gl.minimum(stop, gl.load(plan_ptr + 3, cache_modifier=".cg").to(gl.int32))
        low = gl.minimum(low, high)
    # Rings soon are full for good. Not to ask first how far they are makes up for reading empty slots until then.

    # Slots hold earlier tokens: the kernel before has no part in them.
    keys_ptr += kv_head.to(gl.int64) * num_keys * HEAD_DIM
    values_ptr += kv_head.to(gl.int64) * num_keys * HEAD_DIM
    positions_ptr += kv_head.to(gl.int64) * num_keys
    branches_ptr += kv_head.to(gl.int64) * num_keys
    index = low + gl.arange(0, KEYS, layout=of_key)
    u = gl.load(positions_ptr + index, mask=index < high, other=-1)
    bits = gl.load(branches_ptr + index, mask=index < high, other=0)
    k_rows = gl.allocate_shared_memory(dtype, [KEYS, HEAD_DIM], swizzled)
    v_rows = gl.allocate_shared_memory(dtype, [KEYS, HEAD_DIM], swizzled)
    row = low + gl.arange(0, KEYS, layout=gl.SliceLayout(1, lanes))
    d = gl.arange(0, HEAD_DIM, layout=gl.SliceLayout(0, lanes))
    at = row.to(gl.int64)[:, None] * HEAD_DIM + d[None, :]
    held = gl.expand_dims(row < high, 1) & (d >= 0)[None, :]
    async_copy.async_copy_global_to_shared(k_rows, keys_ptr + at, mask=held)
    async_copy.commit_group()
    async_copy.async_copy_global_to_shared(v_rows, values_ptr + at, mask=held)
    async_copy.commit_group()
    times = gl.full([KEYS], 0, gl.int32, layout=of_key)
    times_new = p.to(gl.int32) * 0
    for i in gl.static_range(NUM_BRANCHES):
        oldest = gl.load(plan_ptr + 3 + NUM_RINGS + i, cache_modifier=".cg")
        reached = ((u >= oldest) & (((bits >> i) & 1) != 0)).to(gl.int32)
        reached_new = ((p >= oldest) & (((bits_new >> i) & 1) != 0)).to(gl.int32)
        times = times + reached if COUNT_OVERLAPS else times | reached
        times_new = times_new + reached_new if COUNT_OVERLAPS else times_new | reached_new
    times = gl.where(u <= p, times, 0)
    here = (slot >= start) & (slot < stop)
    times_new = gl.where(here, times_new, 0)
    bias = gl.where(times > 0, gl.log2(gl.maximum(times, 1).to(gl.float32)), float("-inf"))
    bias = gl.convert_layout(bias, gl.SliceLayout(0, mma))

    _wait(PDL)
    m = gl.arange(0, ROWS, layout=gl.SliceLayout(1, lanes))
    partner = gl.where(d < 2 * ANGLES, gl.where(d < ANGLES, d + ANGLES, d - ANGLES), d)
    q_ptr += kv_head * GROUP * HEAD_DIM
    mask = (m < GROUP)[:, None] & (d >= 0)[None, :]
    q = gl.load(q_ptr + m[:, None] * HEAD_DIM + d[None, :], mask=mask, other=0.0)
    q_other = gl.load(q_ptr + m[:, None] * HEAD_DIM + partner[None, :], mask=mask, other=0.0)
    k_new = gl.load(k_ptr + kv_head * HEAD_DIM + d)
    k_other = gl.load(k_ptr + kv_head * HEAD_DIM + partner)
    of_value = gl.arange(0, HEAD_DIM, layout=gl.SliceLayout(0, mma))
    v_new = gl.load(v_ptr + kv_head * HEAD_DIM + of_value)
    if QK_NORM:
        norm, norm_other = gl.load(q_norm_ptr + d), gl.load(q_norm_ptr + partner)
        rstd = gl.rsqrt(gl.sum(q.to(gl.float32) * q.to(gl.float32), 1) / HEAD_DIM + eps)[:, None]
        q = _product(_product(q, rstd), norm[None, :])
        q_other = _product(_product(q_other, rstd), norm_other[None, :])
        norm, norm_other = gl.load(k_norm_ptr + d), gl.load(k_norm_ptr + partner)
        rstd = gl.rsqrt(gl.sum(k_new.to(gl.float32) * k_new.to(gl.float32), 0) / HEAD_DIM + eps)
        k_new = _product(_product(k_new, rstd), norm)
        k_other = _product(_product(k_other, rstd), norm_other)
    if ROTATES:
        cos, sin = gl.load(cos_ptr + d), gl.load(sin_ptr + d).to(gl.float32)
        sin = gl.where(d < ANGLES, -sin, sin)
        q = (_product(q, cos[None, :]).to(gl.float32) + _product(q_other, sin[None, :]).to(gl.float32)).to(dtype)
        k_new = (_product(k_new, cos).to(gl.float32) + _product(k_other, sin).to(gl.float32)).to(dtype)

    scale2 = scale * LOG2E
    s_new = gl.sum(q.to(gl.float32) * k_new.to(gl.float32)[None, :], 1) * scale2
    s_new += gl.log2(gl.maximum(times_new, 1).to(gl.float32))
    s_new = gl.where(times_new > 0, s_new, float("-inf"))
    s_new = gl.convert_layout(s_new, gl.SliceLayout(1, mma))
    q = gl.convert_layout(q, gl.DotOperandLayout(0, mma, 2))
    async_copy.wait_group(1)
    gl.thread_barrier()  # all threads' pieces have come
    k = k_rows.permute((1, 0)).load(gl.DotOperandLayout(1, mma, 2))
    s = mma_v2(q, k, gl.full([ROWS, KEYS], 0.0, gl.float32, layout=mma)) * scale2 + bias[None, :]
    peak = gl.maximum(gl.max(s, 1), s_new)
    shift = gl.where(peak == float("-inf"), 0.0, peak)  # -inf - -inf is nan
    weight = gl.exp2(s - shift[:, None])
    weight_new = gl.exp2(s_new - shift)
    total = gl.sum(weight, 1) + weight_new
    weight = gl.convert_layout(weight.to(dtype), gl.DotOperandLayout(0, mma, 2))
    async_copy.wait_group(0)
    gl.thread_barrier()
    _fetch_ahead(ahead_ptr, stretch + num_parts * kv_head, ahead_bytes)
    _fetch_ahead(more_ahead_ptr, stretch + num_parts * kv_head, ahead_bytes)
    v = v_rows.load(gl.DotOperandLayout(1, mma, 2))
    acc = mma_v2(weight, v, weight_new[:, None] * v_new.to(gl.float32)[None, :])

    if here:
        at_slot = slot.to(gl.int64) * HEAD_DIM
        gl.store(keys_ptr + at_slot + d, k_new)
        gl.store(values_ptr + at_slot + of_value, v_new)
        gl.store(positions_ptr + slot, gl.where(slot < num_keys - 1, p, -1))
        gl.store(branches_ptr + slot, bits_new)
    if (stretch == 0) & (kv_head == 0):
        gl.store(seen_ptr, gl.load(seen_ptr) + (p >= 0).to(gl.int64))
        gl.store(columns_ptr, gl.load(columns_ptr) + 1)

    met = total > 0.0
    acc = acc / gl.where(met, total, 1.0)[:, None]
    part_ptr += kv_head * GROUP * num_parts * HEAD_DIM
    part_lse_ptr += kv_head * GROUP * num_parts
    m = gl.arange(0, ROWS, layout=gl.SliceLayout(1, mma))
    at_part = m * num_parts + stretch
    gl.store(
        part_ptr + (at_part * HEAD_DIM)[:, None] + of_value[None, :], acc,
        mask=(m < GROUP)[:, None] & (of_value >= 0)[None, :],
    )  # fmt: skip
    gl.store(part_lse_ptr + at_part, gl.where(met, peak + gl.log2(total), float("-inf")), mask=m < GROUP)
    gl.thread_barrier()  # the parts of all threads are written before this program counts as arrived
    if gl.atomic_add(arrivals_ptr + kv_head, 1, sem="acq_rel") == num_parts - 1:
        gl.store(arrivals_ptr + kv_head, 0)  # for the next layer
        out_ptr += kv_head * GROUP * HEAD_DIM
        _merge(part_ptr, part_lse_ptr, out_ptr, num_parts, GROUP, BLOCK_G, HEAD_DIM, MAX_PARTS)
