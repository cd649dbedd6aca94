"""The backward of dilated attention on Hopper in two kernels: what consumers do with the blocks that the producer brings.

The gradients of the scores are computed twice, for the queries and for the keys: seven products instead of five. Writing
them down in the keys' kernel leaves one product for the queries, but slows that kernel by most of what it saves. Where
what the tiles at work share stays in the cache, ``dilated_attention_hopper_ordered_kernels`` does with five.
"""

from typing import Any, NamedTuple

from .dilated_attention_hopper_pipeline_kernels import (
    BATCH,
    COUNT,
    GOES_ON,
    HEAD,
    LOG2E,
    ROWS,
    START,
    TOKENS,
    X_FIRST,
    KeyGradients,
    Results,
    Sources,
    _allocate,
    _await_turn,
    _barriers,
    _branch_of,
    _end_turn,
    _field,
    _met,
    _pack,
    _produce,
    _read_record,
    _settle,
    _store_key_rows,
    _store_rows,
    _terms_met,
    _unpack,
)
from .dilated_attention_hopper_progress_kernels import _await_count, _await_grids_before, _count, _let_next_start
from .dilated_attention_order_kernels import Work, _in_order, _in_pairs, _in_step, _lone_blocks, _shared_blocks
from .dilated_attention_tile_kernels import RUNTIME


try:
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language.nvidia.hopper import (
        fence_async_shared,
        mbarrier,
        warpgroup_mma,
        warpgroup_mma_wait,
    )
except ImportError as error:
    raise ImportError("the Hopper kernels need Gluon, which comes with triton") from error


class KeyResults(NamedTuple):
    """Where a consumer of keys writes, and the ring of what it reads of each query.

    ``finished_ptr``: counts what consumers have finished of each lane, of which ``before`` come before.
    """

    stats: Any
    stats_full: Any
    stats_empty: Any
    gradients: KeyGradients
    heads: Any
    finished_ptr: Any
    before: Any


@gluon.jit
def _unpack_stats(stats):
    lse2 = (stats >> 32).to(gl.int32).to(gl.float32, bitcast=True)
    return lse2, stats.to(gl.int32).to(gl.float32, bitcast=True)


@gluon.jit
def _ds_of_queries(
    s, dp, lse2, delta, first, row_first, row_stop, scale2,
    MASKED: gl.constexpr, V: gl.constexpr, s_layout: gl.constexpr,
):  # fmt: skip
    p = gl.exp2(s * scale2 - gl.expand_dims(lse2, 1))
    if MASKED:
        p = gl.where(_met(first, row_first, row_stop, V, s_layout), p, 0.0)
    if V.head_dim == 64:  # with 128 it gains nothing
        _settle(p)
    return p * (dp - gl.expand_dims(delta, 1))


@gluon.jit
def _bwd_dq_block(
    dq, ds, done, q, do, lse2, delta, rings, first, row_first, row_stop, scale2,
    MASKED: gl.constexpr, consumer: gl.constexpr, V: gl.constexpr,
    s_layout: gl.constexpr, p_layout: gl.constexpr,
):  # fmt: skip
    """Take the gradient of a block's scores while that of the block before goes into dq."""
    stage = done % V.stages
    last = (done - 1) % V.stages
    phase = (done // V.stages) & 1
    zero = gl.zeros([ROWS, V.block_n], gl.float32, s_layout)
    _await_turn(rings, done, consumer, V)
    mbarrier.wait(rings.k_full.index(stage), phase)
    s = warpgroup_mma(q, rings.k.index(stage).permute((1, 0)), zero, use_acc=False, is_async=True)
    mbarrier.wait(rings.v_full.index(stage), phase)
    dp = warpgroup_mma(do, rings.v.index(stage).permute((1, 0)), zero, use_acc=False, is_async=True)
    dq = warpgroup_mma(_unpack(ds, rings.k.dtype, p_layout), rings.k.index(last), dq, is_async=True)
    _end_turn(rings, consumer, V)
    s, dp = warpgroup_mma_wait(1, deps=(s, dp))
    mbarrier.arrive(rings.v_empty.index(stage), count=1)
    new_ds = _ds_of_queries(s, dp, lse2, delta, first, row_first, row_stop, scale2, MASKED, V, s_layout)
    dq = warpgroup_mma_wait(0, deps=(dq,))
    mbarrier.arrive(rings.k_empty.index(last), count=1)
    return dq, _pack(new_ds, rings.k.dtype), done + 1


@gluon.jit
def _consume_dq(rings, results, consumer: gl.constexpr, V: gl.constexpr):
    """Compute the gradient of a consumer's queries of each tile; unless the launch is the first, add it to dq."""
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, V.block_n, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, V.head_dim, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    rows_layout: gl.constexpr = gl.SliceLayout(1, s_layout)
    scale2 = results.scale * LOG2E
    index = consumer * ROWS + gl.arange(0, ROWS, layout=rows_layout)
    q = rings.own.index(consumer)
    do = rings.other.index(consumer)
    done = 0
    filled = 0
    seen = 1
    record = _read_record(rings, 0)
    while _field(record, GOES_ON) > 0:
        head, batch = _field(record, HEAD), _field(record, BATCH)
        start, x_first = _field(record, START), _field(record, X_FIRST)
        count, tokens = _field(record, COUNT), _field(record, TOKENS)
        base, rate, first, stop, blocks, head_edge, tail_edge, window, previous_window = _branch_of(record)
        x = x_first + results.own_rate * index
        begun = 0
        if V.num_branches > 1:
            while (blocks == 0) & (begun < V.num_branches - 1):
                record = _read_record(rings, seen)
                seen += 1
                begun += 1
                base, rate, first, stop, blocks, head_edge, tail_edge, window, previous_window = _branch_of(record)
        at_row = (batch.to(gl.int64) * results.heads + head) * results.length + start
        lse2, delta = _unpack_stats(gl.load(results.numbers_ptr + at_row + x, mask=index < count, other=0))
        dq = gl.zeros([ROWS, V.head_dim], gl.float32, o_layout)
        if blocks > 0:
            mbarrier.wait(rings.own_full, filled & 1)
            filled += 1
            row_first, row_stop = _terms_met(x, window, previous_window, tokens, base, rate, stop, V)
            stage = done % V.stages
            phase = (done // V.stages) & 1
            zero = gl.zeros([ROWS, V.block_n], gl.float32, s_layout)
            _await_turn(rings, done, consumer, V)
            mbarrier.wait(rings.k_full.index(stage), phase)
            s = warpgroup_mma(q, rings.k.index(stage).permute((1, 0)), zero, use_acc=False, is_async=True)
            mbarrier.wait(rings.v_full.index(stage), phase)
            dp = warpgroup_mma(do, rings.v.index(stage).permute((1, 0)), zero, use_acc=False, is_async=True)
            _end_turn(rings, consumer, V)
            s, dp = warpgroup_mma_wait(0, deps=(s, dp))
            mbarrier.arrive(rings.v_empty.index(stage), count=1)
            new_ds = _ds_of_queries(
                s, dp, lse2, delta, first + _in_order(0, blocks, head_edge, tail_edge) * V.block_n,
                row_first, row_stop, scale2, True, V, s_layout,
            )  # fmt: skip
            ds = _pack(new_ds, rings.k.dtype)
            done += 1
            for branch in range(begun, V.num_branches):
                if branch > begun:
                    record = _read_record(rings, seen)
                    seen += 1
                    base, rate, first, stop, blocks, head_edge, tail_edge, window, previous_window = _branch_of(record)
                row_first, row_stop = _terms_met(x, window, previous_window, tokens, base, rate, stop, V)
                visited = gl.where(branch == begun, 1, 0)
                edges = head_edge + blocks - tail_edge
                for n in range(visited, edges):
                    dq, ds, done = _bwd_dq_block(
                        dq, ds, done, q, do, lse2, delta, rings,
                        first + _in_order(n, blocks, head_edge, tail_edge) * V.block_n, row_first, row_stop,
                        scale2, True, consumer, V, s_layout, p_layout,
                    )  # fmt: skip
                for _ in range(gl.maximum(edges, visited), blocks):
                    dq, ds, done = _bwd_dq_block(
                        dq, ds, done, q, do, lse2, delta, rings, first, row_first, row_stop,
                        scale2, False, consumer, V, s_layout, p_layout,
                    )  # fmt: skip
            last = (done - 1) % V.stages
            dq = warpgroup_mma(_unpack(ds, rings.k.dtype, p_layout), rings.k.index(last), dq, is_async=True)
            dq = warpgroup_mma_wait(0, deps=(dq,))
            mbarrier.arrive(rings.k_empty.index(last), count=1)
        dq_ptr = results.rows_ptr + batch.to(gl.int64) * results.stride_b + head.to(gl.int64) * results.stride_h
        dq *= results.scale
        _store_rows(
            dq,
            dq_ptr,
            start,
            x_first,
            results.own_rate,
            count,
            results.stride_l,
            consumer,
            not V.first,
            V,
            V.whole_rows,
        )
        record = _read_record(rings, seen)
        seen += 1


@gluon.jit
def _bring_stats(stats_ptr, rings, results, work, V: gl.constexpr):
    """Fetch lse and delta of each block of queries, in the producer's order; strided words are no copy engine's work."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    fetched = 0
    seen = 1
    record = _read_record(rings, 0, 1)
    while _field(record, GOES_ON) > 0:
        head, batch, start = _field(record, HEAD), _field(record, BATCH), _field(record, START)
        x_first, count, tokens = _field(record, X_FIRST), _field(record, COUNT), _field(record, TOKENS)
        base, rate, first, stop, blocks, head_edge, tail_edge, window, previous_window = _branch_of(record)
        heads, tails = _lone_blocks(
            x_first, count, results.gradients.own_rate, tokens, window, previous_window, base, rate, first, stop,
            blocks, V,
        )  # fmt: skip
        for inner in range(V.group):
            query_head = head * V.group + inner
            at_row = (batch.to(gl.int64) * (work.heads * V.group) + query_head) * work.length + start + base
            for n in range(blocks):
                block = _in_pairs(n, first, blocks, head_edge, tail_edge, heads, tails, V.block_n)
                term = first + block * V.block_n + gl.arange(0, V.block_n, layout=layout)
                words = gl.load(stats_ptr + at_row + term.to(gl.int64) * rate, mask=term < stop, other=0)
                lse2, delta = _unpack_stats(words)
                stage = fetched % V.stages
                mbarrier.wait(results.stats_empty.index(stage), ((fetched // V.stages) & 1) ^ 1)
                results.stats.index(2 * stage).store(lse2)
                results.stats.index(2 * stage + 1).store(delta)
                mbarrier.arrive(results.stats_full.index(stage), count=1)
                fetched += 1
        record = _read_record(rings, seen, 1)
        seen += 1


@gluon.jit
def _bwd_dkdv_block(
    dk, dv, s, dp, done, k, v, rings, results, first, row_first, row_stop, scale2,
    FIRST: gl.constexpr, MASKED: gl.constexpr, consumer: gl.constexpr, V: gl.constexpr,
    s_layout: gl.constexpr, p_layout: gl.constexpr,
):  # fmt: skip
    """Add a block of queries to the gradients of a consumer's keys; scores are transposed: keys are rows.

    Unless it is the FIRST of several, the products of the block before still run at the start, and its own at the end. ``s``
    and ``dp`` are what the block before has left in the registers that the first two products fill: setting them to
    zero while products run would make ptxas run every product by itself.
    """
    stage = done % V.stages
    last = (done - 1) % V.stages
    phase = (done // V.stages) & 1
    columns: gl.constexpr = gl.SliceLayout(0, s_layout)
    q = rings.k.index(stage)
    do = rings.v.index(stage)
    _await_turn(rings, done, consumer, V)
    mbarrier.wait(rings.k_full.index(stage), phase)
    s = warpgroup_mma(k, q.permute((1, 0)), s, use_acc=False, is_async=True)
    if not FIRST:
        dv, dk = warpgroup_mma_wait(1, deps=(dv, dk))
        mbarrier.arrive(rings.k_empty.index(last), count=1)
        mbarrier.arrive(rings.v_empty.index(last), count=1)
    mbarrier.wait(rings.v_full.index(stage), phase)
    dp = warpgroup_mma(v, do.permute((1, 0)), dp, use_acc=False, is_async=True)
    _end_turn(rings, consumer, V)
    mbarrier.wait(results.stats_full.index(stage), phase)
    lse2 = results.stats.index(2 * stage).load(columns)
    s = warpgroup_mma_wait(1, deps=(s,))
    p = gl.exp2(s * scale2 - gl.expand_dims(lse2, 0))
    if MASKED:
        p = gl.where(_met(first, row_first, row_stop, V, s_layout), p, 0.0)
    dp = warpgroup_mma_wait(0, deps=(dp,))
    dv = warpgroup_mma(gl.convert_layout(p.to(q.dtype), p_layout), do, dv, is_async=True)
    delta = results.stats.index(2 * stage + 1).load(columns)
    ds = p * (dp - gl.expand_dims(delta, 0))
    dk = warpgroup_mma(gl.convert_layout(ds.to(q.dtype), p_layout), q, dk, is_async=True)
    mbarrier.arrive(results.stats_empty.index(stage), count=1)
    return dk, dv, s, dp, done + 1


@gluon.jit
def _lone_block(
    dk, dv, s, dp, done, k, v, rings, results, first, row_first, row_stop, scale2,
    consumer: gl.constexpr, V: gl.constexpr, s_layout: gl.constexpr, p_layout: gl.constexpr,
):  # fmt: skip
    """Add a block that the other consumer passes over: that one has another meanwhile, so that products may end here."""
    dk, dv, s, dp, done = _bwd_dkdv_block(
        dk, dv, s, dp, done, k, v, rings, results, first, row_first, row_stop, scale2, True, True, consumer, V,
        s_layout, p_layout,
    )  # fmt: skip
    dv, dk = warpgroup_mma_wait(0, deps=(dv, dk))
    _release(done - 1, rings, V)
    return dk, dv, s, dp, done


@gluon.jit
def _release(block, rings, V: gl.constexpr):
    """Say that a consumer's products need a block no more."""
    stage = block % V.stages
    mbarrier.arrive(rings.k_empty.index(stage), count=1)
    mbarrier.arrive(rings.v_empty.index(stage), count=1)


@gluon.jit
def _pass_over(done, rings, results, consumer: gl.constexpr, V: gl.constexpr):
    """Let a block of queries go that the consumer's keys do not meet: when it has come, for stages are counted by turns."""
    stage = done % V.stages
    phase = (done // V.stages) & 1
    _await_turn(rings, done, consumer, V)
    _end_turn(rings, consumer, V)
    mbarrier.wait(rings.k_full.index(stage), phase)
    mbarrier.wait(rings.v_full.index(stage), phase)
    mbarrier.wait(results.stats_full.index(stage), phase)
    _release(done, rings, V)
    mbarrier.arrive(results.stats_empty.index(stage), count=1)
    return done + 1


@gluon.jit
def _consume_dkdv(rings, results, consumer: gl.constexpr, V: gl.constexpr):
    """Compute the gradients of a consumer's keys and values of each tile; unless the launch is first, add them."""
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, V.block_n, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, V.head_dim, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    rows_layout: gl.constexpr = gl.SliceLayout(1, s_layout)
    scale2 = results.gradients.scale * LOG2E
    index = consumer * ROWS + gl.arange(0, ROWS, layout=rows_layout)
    done = 0
    filled = 0
    seen = 1
    record = _read_record(rings, 0)
    while _field(record, GOES_ON) > 0:
        head, batch = _field(record, HEAD), _field(record, BATCH)
        start, x_first = _field(record, START), _field(record, X_FIRST)
        count, tokens = _field(record, COUNT), _field(record, TOKENS)
        base, rate, first, stop, blocks, head_edge, tail_edge, window, previous_window = _branch_of(record)
        x = x_first + results.gradients.own_rate * index
        row_first, row_stop = _terms_met(x, window, previous_window, tokens, base, rate, stop, V)
        heads, tails = _lone_blocks(
            x_first, count, results.gradients.own_rate, tokens, window, previous_window, base, rate, first, stop,
            blocks, V,
        )  # fmt: skip
        alone, passed = (heads, tails) if consumer == 0 else (tails, heads)
        shared, inner_first, inner_stop = _shared_blocks(blocks, head_edge, tail_edge, heads, tails)
        edges = inner_first + shared - inner_stop
        dk = gl.zeros([ROWS, V.head_dim], gl.float32, o_layout)
        dv = gl.zeros([ROWS, V.head_dim], gl.float32, o_layout)
        if blocks > 0:
            mbarrier.wait(rings.own_full, filled & 1)
            filled += 1
            k = rings.own.index(consumer)
            v = rings.other.index(consumer)
            if V.holds_own:
                k = k.load(gl.DotOperandLayout(0, s_layout, 2))
                v = v.load(gl.DotOperandLayout(0, s_layout, 2))
            s = gl.zeros([ROWS, V.block_n], gl.float32, s_layout)
            dp = gl.zeros([ROWS, V.block_n], gl.float32, s_layout)
            for _ in range(V.group):
                for n in range(alone):
                    if (consumer == 1) & (n < passed):
                        done = _pass_over(done, rings, results, consumer, V)
                    block = n if consumer == 0 else blocks - 1 - n
                    dk, dv, s, dp, done = _lone_block(
                        dk, dv, s, dp, done, k, v, rings, results, first + block * V.block_n, row_first, row_stop,
                        scale2, consumer, V, s_layout, p_layout,
                    )  # fmt: skip
                    if (consumer == 0) & (n < passed):
                        done = _pass_over(done, rings, results, consumer, V)
                for _ in range(alone, passed):
                    done = _pass_over(done, rings, results, consumer, V)
                if shared > 0:
                    term = first + heads * V.block_n
                    begin = _in_step(0, term, shared, inner_first, inner_stop, V.block_n)
                    dk, dv, s, dp, done = _bwd_dkdv_block(
                        dk, dv, s, dp, done, k, v, rings, results, term + begin * V.block_n,
                        row_first, row_stop, scale2, True, True, consumer, V, s_layout, p_layout,
                    )  # fmt: skip
                    for n in range(1, edges):
                        dk, dv, s, dp, done = _bwd_dkdv_block(
                            dk, dv, s, dp, done, k, v, rings, results,
                            term + _in_order(n, shared, inner_first, inner_stop) * V.block_n,
                            row_first, row_stop, scale2, False, True, consumer, V, s_layout, p_layout,
                        )  # fmt: skip
                    for _ in range(gl.maximum(edges, 1), shared):
                        dk, dv, s, dp, done = _bwd_dkdv_block(
                            dk, dv, s, dp, done, k, v, rings, results, first, row_first, row_stop, scale2,
                            False, False, consumer, V, s_layout, p_layout,
                        )  # fmt: skip
                    dv, dk = warpgroup_mma_wait(0, deps=(dv, dk))
                    _release(done - 1, rings, V)
        dk *= results.gradients.scale
        finished_ptr = results.finished_ptr + batch * results.heads + head
        _await_count(finished_ptr, results.before)
        _store_key_rows(dk, dv, results.gradients, head, batch, start, x_first, count, consumer, V, V.whole_rows)
        gl.thread_barrier()
        _count(finished_ptr, 1)
        record = _read_record(rings, seen)
        seen += 1


@gluon.jit(do_not_specialize=(*RUNTIME, "heads", "classes", "periods", "runs", "together", "tiles", "number"))
def hopper_bwd_dq_kernel(
    dq_ptr, stats_ptr, tallies_ptr, own_desc, other_desc,
    k_desc_0, k_desc_1, k_desc_2, k_desc_3, k_desc_4, k_desc_5, k_desc_6, k_desc_7, k_desc_8, k_desc_9,
    v_desc_0, v_desc_1, v_desc_2, v_desc_3, v_desc_4, v_desc_5, v_desc_6, v_desc_7, v_desc_8, v_desc_9,
    cu_seqlens_ptr, stride_dqb, stride_dqh, stride_dql, scale, length, num_documents, search_steps,
    period, tiles_per_period, windows, previous_windows, rates, heads, classes, periods, runs, together, tiles, number,
    V: gl.constexpr,
):  # fmt: skip
    """Compute the gradients of tiles of queries through all branches of the launch."""
    gl.static_assert(V.consumers == 2 or V.consumers == 3)
    k_descs = (k_desc_0, k_desc_1, k_desc_2, k_desc_3, k_desc_4, k_desc_5, k_desc_6, k_desc_7, k_desc_8, k_desc_9)
    v_descs = (v_desc_0, v_desc_1, v_desc_2, v_desc_3, v_desc_4, v_desc_5, v_desc_6, v_desc_7, v_desc_8, v_desc_9)
    rings = _allocate(own_desc.dtype, True, V.consumers, V)
    fence_async_shared()
    work = Work(
        heads, cu_seqlens_ptr, length, num_documents, search_steps, period, tiles_per_period,
        windows, previous_windows, rates, classes, periods, runs, together, tiles,
        tallies_ptr + number,
    )  # fmt: skip
    own_rate = rates[0] if V.dilate else 1
    results = Results(
        None, None, None, None, dq_ptr, stats_ptr, stride_dqb, stride_dqh, stride_dql, scale, heads, length, own_rate
    )
    sources = Sources(own_desc, other_desc, k_descs, v_descs)
    CONSUMER: gl.constexpr = V.registers[0]
    PRODUCER: gl.constexpr = V.registers[1]
    if V.consumers == 3:
        gl.warp_specialize(
            [(_consume_dq, (rings, results, 0, V)), (_consume_dq, (rings, results, 1, V)),
             (_consume_dq, (rings, results, 2, V)), (_produce, (sources, rings, work, V))],
            [4, 4, 1], [CONSUMER, CONSUMER, PRODUCER],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [(_consume_dq, (rings, results, 0, V)), (_consume_dq, (rings, results, 1, V)),
             (_produce, (sources, rings, work, V))],
            [4, 1], [CONSUMER, PRODUCER],
        )  # fmt: skip
    _await_grids_before()


@gluon.jit(do_not_specialize=(
    *RUNTIME, "heads", "classes", "periods", "runs", "together", "tiles", "number", "counters", "before"
))  # fmt: skip
def hopper_bwd_dkdv_kernel(
    dk_ptr, dv_ptr, stats_ptr, tallies_ptr, own_desc, other_desc, q_desc, do_desc,
    cu_seqlens_ptr, stride_dkb, stride_dkh, stride_dkl, stride_dvb, stride_dvh, stride_dvl,
    scale, length, num_documents, search_steps,
    period, tiles_per_period, windows, previous_windows, rates, heads, classes, periods, runs, together, tiles, number,
    counters, before, V: gl.constexpr,
):  # fmt: skip
    """Compute the gradients of tiles of a branch's keys and values, query head after query head: no sums by atomics.

    Launches of the branches overlap; what a tile adds comes after all of its lane in the launches ``before``.
    """
    gl.static_assert(V.consumers == 2)
    _let_next_start()
    rings = _allocate(own_desc.dtype, True, V.consumers + 1, V)
    stats = gl.allocate_shared_memory(
        gl.float32, [2 * V.stages, V.block_n], gl.SwizzledSharedLayout(1, 1, 1, order=[0])
    )
    stats_full = _barriers(V.stages, 1)
    stats_empty = _barriers(V.stages, V.consumers)
    fence_async_shared()
    work = Work(
        heads, cu_seqlens_ptr, length, num_documents, search_steps, period, tiles_per_period,
        windows, previous_windows, rates, classes, periods, runs, together, tiles, tallies_ptr + number,
        tallies_ptr + counters, before,
    )  # fmt: skip
    gradients = KeyGradients(
        dk_ptr, dv_ptr, stride_dkb, stride_dkh, stride_dkl, stride_dvb, stride_dvh, stride_dvl, scale, rates[0]
    )
    results = KeyResults(stats, stats_full, stats_empty, gradients, heads, tallies_ptr + counters, before)
    sources = Sources(own_desc, other_desc, (q_desc,), (do_desc,))
    CONSUMER: gl.constexpr = V.registers[0]
    PRODUCER: gl.constexpr = V.registers[1]
    gl.warp_specialize(
        [(_consume_dkdv, (rings, results, 0, V)), (_consume_dkdv, (rings, results, 1, V)),
         (_produce, (sources, rings, work, V)),
         (_bring_stats, (stats_ptr, rings, results, work, V))],
        [4, 1, 1], [CONSUMER, PRODUCER, PRODUCER],
    )  # fmt: skip
    _await_grids_before()
