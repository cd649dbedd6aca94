"""The backward of dilated attention on Hopper in one kernel: five products, and dq added up in a fixed order.

A program owns a tile of keys and walks through the blocks of queries that meet it, as the keys' kernel does. It also
reckons what its keys give to the gradient of each block's queries; the copy engine adds that to float32 rows in memory,
which all tiles of a head share. Sums in floating point depend on their order, so the tiles that meet a block take turns,
the last one first. A *mark* per block says who was there last. Causal tiles that start together keep nobody waiting:
each starts at its own diagonal, where the next tile has been before it. ``dilated_attention_order_kernels`` has the
arithmetic.

Programs draw tiles in rising order, and a tile waits for lower numbers only: for nobody who is not at work yet. The
launches of a pattern's branches overlap, and a tile waits until all of its lane in the launches before have finished.

Beside consumers and producer, three warps run errands: one brings lse and delta, one watches the marks, one has the copy
engine add, and marks what has arrived in memory. Consumers hand everything to it through one ring: a part of dq per
block, and at the tile's end dv and dk, so that the next tile can begin. They reckon a block's dq one block later than
its dk and dv, so that one may be half a block ahead of the other: it needs the score gradients of both.
"""

from typing import Any, NamedTuple

from .dilated_attention_hopper_errands_kernels import (
    BASE,
    BATCH,
    BLOCKS,
    COUNT,
    FIELDS,
    FIRST,
    GOES_ON,
    HEAD,
    HEAD_EDGE,
    PLACES,
    START,
    STOP,
    TAIL_EDGE,
    TOKENS,
    X_FIRST,
    Shared,
    _add_in_turn,
    _bring_stats,
    _produce,
    _rows_handed_over,
    _watch_marks,
)
from .dilated_attention_hopper_pipeline_kernels import (
    LOG2E,
    ROWS,
    KeyGradients,
    _await_turn,
    _barriers,
    _end_turn,
    _field,
    _lap,
    _look_up,
    _met,
    _place,
    _settle,
    _store_key_rows,
    _terms_met,
)
from .dilated_attention_hopper_progress_kernels import _await_grids_before, _let_next_start
from .dilated_attention_order_kernels import OrderedWork
from .dilated_attention_tile_kernels import RUNTIME, _band, _count_before


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


class Outputs(NamedTuple):
    """Where a consumer writes what it does not hand over, and the branch's bands."""

    gradients: KeyGradients
    window: Any
    previous_window: Any


@gluon.jit
def _here(which):
    """Return a number that the compiler does not know: what is reckoned from it is not kept in registers over a loop."""
    return gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [which], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _scores(s, held_k, shared, done, consumer: gl.constexpr, V: gl.constexpr):
    stage = _place(done, V.stages)
    k = held_k if V.holds_own else shared.k.index(_here(consumer))
    mbarrier.wait(shared.q_full.index(stage), _lap(done, V.stages))
    return warpgroup_mma(k, shared.q.index(stage).permute((1, 0)), s, use_acc=False, is_async=True)


@gluon.jit
def _dq_product(dq, shared, done, consumer: gl.constexpr, V: gl.constexpr):
    """Start a block's product for the queries: with all keys of the tile, for the consumer's half of the columns."""
    place = _place(done, PLACES)
    for other in gl.static_range(V.consumers):
        theirs = shared.ds.index(place * V.consumers + other)
        keys = shared.k.index(_here(other)).slice(
            consumer * (V.head_dim // V.consumers), V.head_dim // V.consumers, dim=1
        )
        dq = warpgroup_mma(theirs.permute((1, 0)), keys, dq, use_acc=other > 0, is_async=True)
    return dq


@gluon.jit
def _hand_over(x, destination, shared, handed):
    """Give to those who add up what belongs at a place of their ring."""
    place = _place(handed, PLACES)
    mbarrier.wait(shared.dq_empty.index(place), _lap(handed, PLACES) ^ 1)
    destination.store(x)
    fence_async_shared()
    gl.thread_barrier()
    mbarrier.arrive(shared.dq_full.index(place), count=1)


@gluon.jit
def _hand_over_dq(dq, shared, handed, consumer: gl.constexpr, V: gl.constexpr):
    """Hand over a block's part of dq.

    A thread's columns change places until it has four neighbours: they go into shared memory at once, and without bank
    conflicts. ``scale_kernel`` changes them back.
    """
    COLUMNS: gl.constexpr = dq.shape[1]
    dq = gl.permute(gl.reshape(dq, [ROWS, COLUMNS // 16, 2, 4, 2]), (0, 1, 3, 2, 4))
    destination = shared.dq.index(_place(handed, PLACES) * V.consumers + consumer)
    _hand_over(gl.reshape(dq, [ROWS, COLUMNS]), destination, shared, handed)


@gluon.jit
def _block(
    dk, dv, dq, s, done, begun, extra, held_k, held_v, shared, term, row_first, row_stop, scale2,
    MASKED: gl.constexpr, LAST: gl.constexpr, consumer: gl.constexpr, V: gl.constexpr,
    s_layout: gl.constexpr, p_layout: gl.constexpr,
):  # fmt: skip
    """Add a block of queries to the gradients of keys and values, and the block before it to that of the queries.

    Scores are transposed: keys are rows. The block's scores are on their way when it begins and, unless it is the
    tile's LAST, the next one's when it ends. Products that are on their way may not share registers with what is read
    meanwhile: ptxas would run them one by one.
    """
    stage = _place(done, V.stages)
    place = _place(done, PLACES)
    columns: gl.constexpr = gl.SliceLayout(0, s_layout)
    q = shared.q.index(stage)
    do = shared.do.index(stage)
    s = warpgroup_mma_wait(0, deps=(s,))
    mbarrier.wait(shared.do_full.index(stage), _lap(done, V.stages))
    mbarrier.wait(shared.stats_full.index(stage), _lap(done, V.stages))
    delta = gl.expand_dims(shared.stats.index(2 * stage + 1).load(columns), 0)
    dp = gl.broadcast(delta, s)[0]
    v = held_v if V.holds_own else shared.v.index(_here(consumer))
    dp = warpgroup_mma(v, do.permute((1, 0)), dp, is_async=True)
    lse2 = shared.stats.index(2 * stage).load(columns)
    p = gl.exp2(s * scale2 - gl.expand_dims(lse2, 0))
    if MASKED:
        p = gl.where(_met(term, row_first, row_stop, V, s_layout), p, 0.0)
    _settle(p)
    dp = warpgroup_mma_wait(0, deps=(dp,))
    ds = (p * dp).to(q.dtype)
    own = shared.ds.index(place * V.consumers + consumer)
    # With the block before, all have also reckoned dq of the one whose score gradients lie there.
    before = done + 2 * V.stages - 1
    mbarrier.wait(shared.block_empty.index(_place(before, V.stages)), _lap(before, V.stages))
    own.store(ds)
    fence_async_shared()
    gl.thread_barrier()
    mbarrier.arrive(shared.ds_full.index(place), count=1)
    _await_turn(shared, done, consumer, V)
    dv = warpgroup_mma(gl.convert_layout(p.to(q.dtype), p_layout), do, dv, is_async=True)
    if V.head_dim == 64:
        dk = warpgroup_mma(gl.convert_layout(ds, p_layout), q, dk, is_async=True)
    else:  # registers are too scarce
        dk = warpgroup_mma(own, q, dk, is_async=True)
    # The other consumer may be half a block behind: what is asked for of it is the block before.
    if V.head_dim == 2 * V.block_n:  # dq has dp's shape, whose registers are free
        dq = dp
    follows = done > begun
    last = done + PLACES - 1
    mbarrier.wait(shared.ds_full.index(_place(last, PLACES)), _lap(last, PLACES) ^ 1, pred=follows)
    dq = _dq_product(dq, shared, last, consumer, V)
    if LAST:
        _end_turn(shared, consumer, V)
        dv, dk, dq = warpgroup_mma_wait(0, deps=(dv, dk, dq))
    else:
        s = _scores(s, held_k, shared, done + 1, consumer, V)
        _end_turn(shared, consumer, V)
        dv, dk, dq = warpgroup_mma_wait(1, deps=(dv, dk, dq))
    mbarrier.arrive(shared.block_empty.index(stage), count=1)
    if follows:
        _hand_over_dq(dq, shared, done - 1 + extra, consumer, V)
    return dk, dv, dq, s, done + 1


@gluon.jit
def _met_by_none(x_first, tokens, base, rate, first, blocks, outputs, consumer: gl.constexpr, V: gl.constexpr):
    """Whether none of a consumer's keys meets a tile's first block, which is not its last: of causal keys, half do."""
    if consumer == 0:
        return False
    x = x_first + outputs.gradients.own_rate * (consumer * ROWS)
    start, _ = _band(
        x, outputs.window, outputs.previous_window, tokens, True, V.side, V.sliding, V.disjoint
    )  # fmt: skip
    return (_count_before(start, base, rate) >= first + V.block_n) & (blocks > 1)


@gluon.jit
def _pass_over(shared, done, dtype: gl.constexpr, consumer: gl.constexpr, V: gl.constexpr, s_layout: gl.constexpr):
    """Give zeros for the score gradients of a tile's first block, which none of the consumer's keys meets."""
    stage = _place(done, V.stages)
    place = _place(done, PLACES)
    before = done + 2 * V.stages - 1
    mbarrier.wait(shared.block_empty.index(_place(before, V.stages)), _lap(before, V.stages))
    shared.ds.index(place * V.consumers + consumer).store(gl.zeros([ROWS, V.block_n], dtype, s_layout))
    fence_async_shared()
    gl.thread_barrier()
    mbarrier.arrive(shared.ds_full.index(place), count=1)
    _await_turn(shared, done, consumer, V)
    _end_turn(shared, consumer, V)
    # Stages are counted by turns: not before all of it has come.
    mbarrier.wait(shared.q_full.index(stage), _lap(done, V.stages))
    mbarrier.wait(shared.do_full.index(stage), _lap(done, V.stages))
    mbarrier.wait(shared.stats_full.index(stage), _lap(done, V.stages))
    mbarrier.arrive(shared.block_empty.index(stage), count=1)
    return done + 1


@gluon.jit
def _consume(outputs, shared, consumer: gl.constexpr, V: gl.constexpr):
    """Compute the gradients of a consumer's keys and values of each tile, and its part of what the tile adds to dq."""
    DQ_COLUMNS: gl.constexpr = V.head_dim // V.consumers
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, V.block_n, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, V.head_dim, 16])
    dq_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DQ_COLUMNS, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    rows_layout: gl.constexpr = gl.SliceLayout(1, s_layout)
    scale2 = outputs.gradients.scale * LOG2E
    rate = outputs.gradients.own_rate if V.dilate else 1
    index = consumer * ROWS + gl.arange(0, ROWS, layout=rows_layout)
    done = 0
    extra = 0  # things handed over that were no blocks
    filled = 0
    record = _look_up(shared, 0)
    while _field(record, GOES_ON) > 0:
        tokens, x_first = _field(record, TOKENS), _field(record, X_FIRST)
        base, first, stop = _field(record, BASE), _field(record, FIRST), _field(record, STOP)
        blocks, head_edge, tail_edge = (
            _field(record, BLOCKS), _field(record, HEAD_EDGE), _field(record, TAIL_EDGE)
        )  # fmt: skip
        x = x_first + outputs.gradients.own_rate * index
        row_first, row_stop = _terms_met(x, outputs.window, outputs.previous_window, tokens, base, rate, stop, V)
        mbarrier.wait(shared.own_full, filled & 1)
        held_k, held_v = None, None
        if V.holds_own:
            held_k = shared.k.index(consumer).load(gl.DotOperandLayout(0, s_layout, 2))
            held_v = shared.v.index(consumer).load(gl.DotOperandLayout(0, s_layout, 2))
        dk = gl.zeros([ROWS, V.head_dim], gl.float32, o_layout)
        dv = gl.zeros([ROWS, V.head_dim], gl.float32, o_layout)
        if blocks > 0:
            dq = gl.zeros([ROWS, DQ_COLUMNS], gl.float32, dq_layout)
            s = gl.zeros([ROWS, V.block_n], gl.float32, s_layout)
            begun = done
            if _met_by_none(x_first, tokens, base, rate, first, blocks, outputs, consumer, V):
                done = _pass_over(shared, done, shared.k.dtype, consumer, V, s_layout)
            passed = done - begun
            s = _scores(s, held_k, shared, done, consumer, V)
            for inner in range(V.group):
                last = blocks - gl.where(inner == V.group - 1, 1, 0)
                for n in range(gl.where(inner == 0, passed, 0), gl.minimum(head_edge, last)):
                    dk, dv, dq, s, done = _block(
                        dk, dv, dq, s, done, begun, extra, held_k, held_v, shared, first + n * V.block_n,
                        row_first, row_stop, scale2, True, False, consumer, V, s_layout, p_layout,
                    )  # fmt: skip
                for n in range(head_edge, gl.minimum(tail_edge, last)):
                    dk, dv, dq, s, done = _block(
                        dk, dv, dq, s, done, begun, extra, held_k, held_v, shared, first + n * V.block_n,
                        row_first, row_stop, scale2, False, False, consumer, V, s_layout, p_layout,
                    )  # fmt: skip
                for n in range(tail_edge, last):
                    dk, dv, dq, s, done = _block(
                        dk, dv, dq, s, done, begun, extra, held_k, held_v, shared, first + n * V.block_n,
                        row_first, row_stop, scale2, True, False, consumer, V, s_layout, p_layout,
                    )  # fmt: skip
            dk, dv, dq, s, done = _block(
                dk, dv, dq, s, done, begun, extra, held_k, held_v, shared, first + (blocks - 1) * V.block_n,
                row_first, row_stop, scale2, True, True, consumer, V, s_layout, p_layout,
            )  # fmt: skip
            mbarrier.wait(shared.ds_full.index(_place(done - 1, PLACES)), _lap(done - 1, PLACES))
            dq = _dq_product(dq, shared, done - 1, consumer, V)
            dq = warpgroup_mma_wait(0, deps=(dq,))
            _hand_over_dq(dq, shared, done - 1 + extra, consumer, V)
        mbarrier.arrive(shared.own_empty, count=1)
        dk *= outputs.gradients.scale
        record = _look_up(shared, filled)  # once more: registers are scarce
        count = _field(record, COUNT)
        if count == V.block_m:
            handed = done + extra
            _hand_over(dv.to(shared.k.dtype), _rows_handed_over(shared, handed, consumer, V), shared, handed)
            handed += 1
            _hand_over(dk.to(shared.k.dtype), _rows_handed_over(shared, handed, consumer, V), shared, handed)
            extra += 2
        else:  # the copy engine would not stop after count rows
            mbarrier.wait(shared.ready.index(_place(filled, PLACES)), _lap(filled, PLACES))
            head, batch = _field(record, HEAD), _field(record, BATCH)
            start, x_first = _field(record, START), _field(record, X_FIRST)
            _store_key_rows(dk, dv, outputs.gradients, head, batch, start, x_first, count, consumer, V, o_layout)
        mbarrier.arrive(shared.records_empty.index(_place(filled, PLACES)), count=1)
        gl.thread_barrier()
        mbarrier.arrive(shared.stored.index(_place(filled, PLACES)), count=1)
        filled += 1
        record = _look_up(shared, filled)


@gluon.jit
def _allocate(dtype: gl.constexpr, V: gl.constexpr):
    own_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, V.head_dim], dtype)
    block_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([V.block_n, V.head_dim], dtype)
    ds_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, V.block_n], dtype)
    DQ_COLUMNS: gl.constexpr = V.head_dim // V.consumers
    dq_layout: gl.constexpr = gl.NVMMASharedLayout(64, 32, 2)  # 16 columns at a time: no bank conflicts
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, order=[0])
    return Shared(
        gl.allocate_shared_memory(dtype, [V.consumers, ROWS, V.head_dim], own_layout),
        gl.allocate_shared_memory(dtype, [V.consumers, ROWS, V.head_dim], own_layout),
        gl.allocate_shared_memory(dtype, [V.stages, V.block_n, V.head_dim], block_layout),
        gl.allocate_shared_memory(dtype, [V.stages, V.block_n, V.head_dim], block_layout),
        gl.allocate_shared_memory(gl.float32, [2 * V.stages, V.block_n], flat),
        gl.allocate_shared_memory(dtype, [PLACES * V.consumers, ROWS, V.block_n], ds_layout),
        gl.allocate_shared_memory(gl.int32, [PLACES, FIELDS], flat),
        _barriers(1, 1).index(0), _barriers(1, V.consumers).index(0),
        _barriers(V.stages, 1), _barriers(V.stages, 1), _barriers(V.stages, 1), _barriers(V.stages, V.consumers),
        _barriers(PLACES, V.consumers), _barriers(V.consumers, 1),
        _barriers(PLACES, 1), _barriers(PLACES, V.consumers + 3),
        _barriers(PLACES, 1), _barriers(PLACES, 1), _barriers(PLACES, 1), _barriers(PLACES, V.consumers),
        gl.allocate_shared_memory(gl.float32, [PLACES * V.consumers, ROWS, DQ_COLUMNS], dq_layout),
        _barriers(PLACES, V.consumers), _barriers(PLACES, 1),
    )  # fmt: skip


@gluon.jit(do_not_specialize=(
    *RUNTIME, "heads", "first_lane", "classes", "periods", "runs", "tiles",
    "number", "counters", "first_mark", "before",
))  # fmt: skip
def hopper_bwd_kernel(
    dk_ptr, dv_ptr, stats_ptr, marks_ptr, tallies_ptr, k_desc, v_desc, q_desc, do_desc, sums_desc, dk_desc, dv_desc,
    cu_seqlens_ptr, stride_dkb, stride_dkh, stride_dkl, stride_dvb, stride_dvh, stride_dvl, scale, length, num_documents,
    search_steps, period, tiles_per_period, windows, previous_windows, rates, heads, first_lane, classes, periods,
    runs, tiles, number, counters, first_mark, before,
    V: gl.constexpr,
):  # fmt: skip
    """Compute what a branch adds to all gradients of some lanes, each after ``before`` tiles of branches before."""
    gl.static_assert(V.consumers == 2)
    _let_next_start()
    shared = _allocate(k_desc.dtype, V)
    fence_async_shared()
    work = OrderedWork(
        heads, first_lane, cu_seqlens_ptr, length, num_documents, search_steps, period, tiles_per_period,
        windows[0], previous_windows[0], rates[0], classes, periods, runs, tiles, first_mark, tallies_ptr + number,
        tallies_ptr + counters, before,
    )  # fmt: skip
    gradients = KeyGradients(
        dk_ptr, dv_ptr, stride_dkb, stride_dkh, stride_dkl, stride_dvb, stride_dvh, stride_dvl, scale, rates[0]
    )
    outputs = Outputs(gradients, windows[0], previous_windows[0])
    CONSUMER: gl.constexpr = V.registers[0]
    PRODUCER: gl.constexpr = V.registers[1]
    gl.warp_specialize(
        [(_consume, (outputs, shared, 0, V)), (_consume, (outputs, shared, 1, V)),
         (_produce, (k_desc, v_desc, q_desc, do_desc, shared, work, V)),
         (_bring_stats, (stats_ptr, shared, work, V)),
         (_watch_marks, (marks_ptr, shared, work, V)),
         (_add_in_turn, (sums_desc, dk_desc, dv_desc, marks_ptr, shared, work, V))],
        [4, 1, 1, 1, 1], [CONSUMER, PRODUCER, PRODUCER, PRODUCER, PRODUCER],
    )  # fmt: skip
    _await_grids_before()
