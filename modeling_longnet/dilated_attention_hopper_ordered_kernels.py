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

from .dilated_attention_hopper_bwd_kernels import _unpack_stats
from .dilated_attention_hopper_pipeline_kernels import (
    AHEAD,
    LOG2E,
    ROWS,
    KeyGradients,
    _await_turn,
    _barriers,
    _copy,
    _end_turn,
    _met,
    _settle,
    _store_key_rows,
)
from .dilated_attention_order_kernels import Tiles, _blocks_met, _met_by_next, _placed, _rows_of
from .dilated_attention_tile_kernels import RUNTIME, _band


try:
    from triton._C.libtriton import ir
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language._core import builtin
    from triton.experimental.gluon.language.nvidia.hopper import (
        fence_async_shared,
        mbarrier,
        tma,
        warpgroup_mma,
        warpgroup_mma_wait,
    )
except ImportError as error:
    raise ImportError("the Hopper kernels need Gluon, which comes with triton") from error


# A record: what the producer tells the other warps about one tile.
GOES_ON, HEAD, BATCH, LANE, START, TOKENS, X_FIRST, COUNT, BASE, FIRST, STOP, BLOCKS, HEAD_EDGE, TAIL_EDGE = (
    gl.constexpr(i) for i in range(14)
)
MARK, MET_FIRST, MET_STOP = gl.constexpr(14), gl.constexpr(15), gl.constexpr(16)
FIELDS = gl.constexpr(32)
PLACES = gl.constexpr(2)  # of the rings of records, score gradients and turns


class Shared(NamedTuple):
    """Shared memory of a program: rows, records, score gradients and their barriers."""

    k: Any
    v: Any
    q: Any
    do: Any
    stats: Any
    ds: Any
    records: Any
    own_full: Any
    own_empty: Any
    q_full: Any
    do_full: Any
    stats_full: Any
    block_empty: Any
    ds_full: Any
    turns: Any
    records_full: Any
    records_empty: Any
    turn: Any
    turn_over: Any
    ready: Any
    stored: Any
    dq: Any
    dq_full: Any
    dq_empty: Any


class Outputs(NamedTuple):
    """Where a consumer writes what it does not hand over, and the branch's bands."""

    gradients: KeyGradients
    window: Any
    previous_window: Any


@gluon.jit
def _draw(ptr):
    """Take the next number of a counter."""
    return gl.atomic_add(ptr, 1, sem="relaxed", scope="gpu")


@gluon.jit
def _count(ptr):
    """Count one more, after all that was written before; a whole warp calls."""
    gl.atomic_add(ptr, 1, sem="release", scope="gpu")


@gluon.jit
def _write(shared, written, head, batch, lane, start, goes_on, tokens, x_first, count, base, first, stop, blocks,
           head_edge, tail_edge, mark, met_first, met_stop):  # fmt: skip
    field = gl.arange(0, FIELDS, layout=gl.BlockedLayout([1], [32], [1], [0]))
    record = gl.where(field == HEAD, head, 0)
    record = gl.where(field == BATCH, batch, record)
    record = gl.where(field == LANE, lane, record)
    record = gl.where(field == START, start, record)
    record = gl.where(field == GOES_ON, goes_on, record)
    record = gl.where(field == TOKENS, tokens, record)
    record = gl.where(field == X_FIRST, x_first, record)
    record = gl.where(field == COUNT, count, record)
    record = gl.where(field == BASE, base, record)
    record = gl.where(field == FIRST, first, record)
    record = gl.where(field == STOP, stop, record)
    record = gl.where(field == BLOCKS, blocks, record)
    record = gl.where(field == HEAD_EDGE, head_edge, record)
    record = gl.where(field == TAIL_EDGE, tail_edge, record)
    record = gl.where(field == MARK, mark, record)
    record = gl.where(field == MET_FIRST, met_first, record)
    record = gl.where(field == MET_STOP, met_stop, record)
    place = written % PLACES
    mbarrier.wait(shared.records_empty.index(place), ((written // PLACES) & 1) ^ 1)
    shared.records.index(place).store(record)
    mbarrier.arrive(shared.records_full.index(place), count=1)


@gluon.jit
def _look_up(shared, seen, WARPS: gl.constexpr):
    place = seen % PLACES
    mbarrier.wait(shared.records_full.index(place), (seen // PLACES) & 1)
    return shared.records.index(place).load(gl.BlockedLayout([FIELDS], [32], [WARPS], [0]))


@gluon.jit
def _read(shared, seen, WARPS: gl.constexpr):
    record = _look_up(shared, seen, WARPS)
    mbarrier.arrive(shared.records_empty.index(seen % PLACES), count=1)
    return record


@gluon.jit
def _field(record, which: gl.constexpr, WARPS: gl.constexpr):
    # Every thread holds the whole record: this is a choice of register.
    field = gl.arange(0, FIELDS, layout=gl.BlockedLayout([FIELDS], [32], [WARPS], [0]))
    return gl.sum(gl.where(field == which, record, 0), 0)


@gluon.jit
def _produce(k_desc, v_desc, q_desc, do_desc, shared, tiles, V: gl.constexpr):
    """Draw tiles; fetch each one's keys and values and, in rising order, the blocks of queries that it meets."""
    loop_rate = tiles.rate if V.dilate else 1
    fetched = 0
    filled = 0
    index = _draw(tiles.drawn_ptr)
    while index < tiles.tiles:
        slot, kv_head, batch, lane = _placed(index, tiles)
        start, tokens, base, x_first, x_last, count = _rows_of(slot, batch, kv_head, tiles, V)
        if count > 0:
            loop_base = base if V.dilate else 0
            first, stop, blocks, head_edge, tail_edge = _blocks_met(
                x_first, x_last, tokens, loop_base, loop_rate, tiles, V
            )
            met_first, met_stop = _met_by_next(slot, batch, kv_head, base, loop_base, loop_rate, tiles, V)
            _write(
                shared, filled, kv_head, batch, lane, start, 1, tokens, x_first, count, loop_base, first, stop, blocks,
                head_edge, tail_edge, tiles.first_mark + slot, met_first, met_stop,
            )  # fmt: skip
            residue = (start + loop_base) % loop_rate
            term = (start + loop_base) // loop_rate + first
            own_residue = (start + x_first) % tiles.rate
            own_term = (start + x_first) // tiles.rate
            fetched_of_tile = 0
            for inner in range(V.group):
                head = kv_head * V.group + inner
                for n in range(blocks):
                    if fetched_of_tile == AHEAD:
                        _copy_own(k_desc, v_desc, shared, filled, batch, kv_head, own_residue, own_term, V)
                    fetched_of_tile += 1
                    row = term + n * V.block_n
                    stage = fetched % V.stages
                    phase = ((fetched // V.stages) & 1) ^ 1
                    mbarrier.wait(shared.block_empty.index(stage), phase)
                    mbarrier.expect(shared.q_full.index(stage), V.block_n * V.head_dim * 2)
                    q, full = shared.q.index(stage), shared.q_full.index(stage)
                    _copy(q_desc, batch, head, residue, row, full, q, V.block_n, V)
                    mbarrier.expect(shared.do_full.index(stage), V.block_n * V.head_dim * 2)
                    do, full = shared.do.index(stage), shared.do_full.index(stage)
                    _copy(do_desc, batch, head, residue, row, full, do, V.block_n, V)
                    fetched += 1
            if fetched_of_tile <= AHEAD:
                _copy_own(k_desc, v_desc, shared, filled, batch, kv_head, own_residue, own_term, V)
            filled += 1
        else:
            _count(tiles.finished_ptr + lane)
        index = _draw(tiles.drawn_ptr)
    _write(shared, filled, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0)


@gluon.jit
def _copy_own(k_desc, v_desc, shared, filled, batch, head, residue, term, V: gl.constexpr):
    mbarrier.wait(shared.own_empty, (filled & 1) ^ 1)
    mbarrier.expect(shared.own_full, 2 * V.block_m * V.head_dim * 2)
    for consumer in gl.static_range(V.consumers):
        place = term + consumer * ROWS
        _copy(k_desc, batch, head, residue, place, shared.own_full, shared.k.index(consumer), ROWS, V)
        _copy(v_desc, batch, head, residue, place, shared.own_full, shared.v.index(consumer), ROWS, V)


@gluon.jit
def _bring_stats(stats_ptr, shared, tiles, V: gl.constexpr):
    """Fetch lse and delta of each block of queries, in the producer's order; strided words are no copy engine's work."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    rate = tiles.rate if V.dilate else 1
    fetched = 0
    seen = 1
    record = _read(shared, 0, 1)
    while _field(record, GOES_ON, 1) > 0:
        head, batch, start = _field(record, HEAD, 1), _field(record, BATCH, 1), _field(record, START, 1)
        base, first, stop = _field(record, BASE, 1), _field(record, FIRST, 1), _field(record, STOP, 1)
        blocks = _field(record, BLOCKS, 1)
        for inner in range(V.group):
            row = (batch.to(gl.int64) * (tiles.heads * V.group) + head * V.group + inner) * tiles.length + start + base
            for n in range(blocks):
                term = first + n * V.block_n + gl.arange(0, V.block_n, layout=layout)
                words = gl.load(stats_ptr + row + term.to(gl.int64) * rate, mask=term < stop, other=0)
                lse2, delta = _unpack_stats(words)
                stage = fetched % V.stages
                mbarrier.wait(shared.block_empty.index(stage), ((fetched // V.stages) & 1) ^ 1)
                shared.stats.index(2 * stage).store(lse2)
                shared.stats.index(2 * stage + 1).store(-delta)
                mbarrier.arrive(shared.stats_full.index(stage), count=1)
                fetched += 1
        record = _read(shared, seen, 1)
        seen += 1


@gluon.jit
def _order_of(record):
    """Return a record's lane, the progression of queries and its blocks, and what these wait for."""
    return (
        _field(record, LANE, 1), _field(record, START, 1), _field(record, BASE, 1), _field(record, FIRST, 1),
        _field(record, BLOCKS, 1), _field(record, MARK, 1), _field(record, MET_FIRST, 1), _field(record, MET_STOP, 1),
    )  # fmt: skip


@gluon.jit
def _look(ptr):
    """Read a word that another program may write; what it has written before is seen, too."""
    return gl.inline_asm_elementwise(
        "ld.acquire.gpu.global.b32 $0, [$1];", "=r,l", [ptr], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def _glance(ptr):
    """Read a word that another program may write; the copy engine, which comes later, sees what was written before."""
    return gl.inline_asm_elementwise(
        "ld.relaxed.gpu.global.b32 $0, [$1];", "=r,l", [ptr], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def _tell(ptr, value):
    """Write a word that another program may wait for, after all that was written before."""
    gl.inline_asm_elementwise(
        "st.release.gpu.global.b32 [$1], $2; mov.b32 $0, $2;", "=r,l,r", [ptr, value], dtype=gl.int32, is_pure=False,
        pack=1,
    )  # fmt: skip


@gluon.jit
def _watch_marks(marks_ptr, shared, tiles, V: gl.constexpr):
    """Say that a block's dq may be added to when the tile after this one, if it meets the block, has done so."""
    rate = tiles.rate if V.dilate else 1
    done = 0
    seen = 1
    record = _read(shared, 0, 1)
    while _field(record, GOES_ON, 1) > 0:
        lane, start, base, first, blocks, mark, met_first, met_stop = _order_of(record)
        if tiles.before > 0:
            ptr = tiles.finished_ptr + lane
            while _look(ptr) < tiles.before:
                pass
        mbarrier.arrive(shared.ready.index((seen - 1) % PLACES), count=1)
        for inner in range(V.group):
            row = (lane.to(gl.int64) * V.group + inner) * tiles.length + start + base
            for n in range(blocks):
                term = first + n * V.block_n
                if (term >= met_first) & (term < met_stop):
                    ptr = marks_ptr + (row + term.to(gl.int64) * rate)
                    found = _glance(ptr)
                    while found != mark + 1:
                        found = _glance(ptr)
                mbarrier.wait(shared.turn_over.index(done % PLACES), ((done // PLACES) & 1) ^ 1)
                mbarrier.arrive(shared.turn.index(done % PLACES), count=1)
                done += 1
        record = _read(shared, seen, 1)
        seen += 1


@builtin
def _start_adding(descriptor, coordinates, source, _semantic=None):
    """Have the copy engine add a block of shared memory to global memory."""
    coordinates = _semantic._convert_to_ir_values(coordinates, require_i64=False)
    kind = ir.DESCRIPTOR_REDUCE_KIND.ADD
    _semantic.builder.create_async_tma_reduce(kind, descriptor.handle, coordinates, source.handle)


@gluon.jit
def _fence_global():
    """Let the copy engine come after what this thread has seen."""
    gl.inline_asm_elementwise(
        "fence.proxy.async.global; mov.b32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False, pack=1
    )  # fmt: skip


@gluon.jit
def _await_added():
    """Wait until all additions are in global memory, not just read: every lane."""
    gl.inline_asm_elementwise(
        "cp.async.bulk.wait_group 0; bar.warp.sync -1; mov.b32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False, pack=1
    )  # fmt: skip


@gluon.jit
def _rows_handed_over(shared, handed, consumer: gl.constexpr, V: gl.constexpr):
    """Return a place of the ring of dq as rows of dk or dv: half as wide, twice as many columns."""
    dtype: gl.constexpr = shared.k.dtype
    layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, V.head_dim], dtype)
    return shared.dq.index(handed % PLACES * V.consumers + consumer)._reinterpret(dtype, [ROWS, V.head_dim], layout)


@gluon.jit
def _add_in_turn(sums_desc, dk_desc, dv_desc, marks_ptr, shared, tiles, V: gl.constexpr):
    """Add each block's dq from shared to global memory when it is its turn, and mark it; count finished tiles.

    What a whole tile adds to dv and dk comes after its last block.
    """
    COLUMNS: gl.constexpr = V.head_dim // V.consumers
    rate = tiles.rate if V.dilate else 1
    done = 0
    handed = 0
    seen = 0
    record = _look_up(shared, 0, 1)
    while _field(record, GOES_ON, 1) > 0:
        lane, start, base, first, blocks, mark, met_first, met_stop = _order_of(record)
        residue = (start + base) % rate
        term_before = (start + base) // rate
        for inner in range(V.group):
            head = lane * V.group + inner
            row = head.to(gl.int64) * tiles.length + start + base
            for n in range(blocks):
                term = first + n * V.block_n
                place = handed % PLACES
                mbarrier.wait(shared.turn.index(done % PLACES), (done // PLACES) & 1)
                mbarrier.wait(shared.dq_full.index(place), (handed // PLACES) & 1)
                _fence_global()
                fresh = (term < met_first) | (term >= met_stop) if V.stores else term < -1
                for consumer in gl.static_range(V.consumers):
                    source = shared.dq.index(place * V.consumers + consumer)
                    source = source._reinterpret(sums_desc.dtype, [1, 1, 1, ROWS, COLUMNS], sums_desc.layout)
                    if fresh:
                        tma.async_copy_shared_to_global(
                            sums_desc, [0, head, residue, term_before + term, consumer * COLUMNS], source
                        )
                    else:
                        _start_adding(sums_desc, [0, head, residue, term_before + term, consumer * COLUMNS], source)
                tma.store_wait(0)
                mbarrier.arrive(shared.dq_empty.index(place), count=1)
                mbarrier.arrive(shared.turn_over.index(done % PLACES), count=1)
                _await_added()
                _tell(marks_ptr + (row + term.to(gl.int64) * rate), mark)
                done += 1
                handed += 1
        mbarrier.wait(shared.ready.index(seen % PLACES), (seen // PLACES) & 1)
        if _field(record, COUNT, 1) == V.block_m:
            head, batch = _field(record, HEAD, 1), _field(record, BATCH, 1)
            row = start + _field(record, X_FIRST, 1)
            _start_rows(dv_desc, shared, handed, batch, head, row, tiles.rate, V)
            _start_rows(dk_desc, shared, handed + 1, batch, head, row, tiles.rate, V)
            _await_added()
            handed += 2
        mbarrier.wait(shared.stored.index(seen % PLACES), (seen // PLACES) & 1)
        mbarrier.arrive(shared.records_empty.index(seen % PLACES), count=1)
        _count(tiles.finished_ptr + lane)
        seen += 1
        record = _look_up(shared, seen, 1)


@gluon.jit
def _start_rows(descriptor, shared, handed, batch, head, row, rate, V: gl.constexpr):
    """Have the copy engine write a tile's rows of dk or dv, or add them to what launches before have written."""
    place = handed % PLACES
    mbarrier.wait(shared.dq_full.index(place), (handed // PLACES) & 1)
    for consumer in gl.static_range(V.consumers):
        source = _rows_handed_over(shared, handed, consumer, V)
        source = source._reinterpret(descriptor.dtype, [1, 1, 1, ROWS, V.head_dim], descriptor.layout)
        term = row // rate + consumer * ROWS
        if V.first:
            tma.async_copy_shared_to_global(descriptor, [batch, head, row % rate, term, 0], source)
        else:
            _start_adding(descriptor, [batch, head, row % rate, term, 0], source)
    tma.store_wait(0)
    mbarrier.arrive(shared.dq_empty.index(place), count=1)


@gluon.jit
def _here(which):
    """Return a number that the compiler does not know: what is reckoned from it is not kept in registers over a loop."""
    return gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [which], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _scores(s, shared, done, consumer: gl.constexpr, V: gl.constexpr):
    stage = done % V.stages
    k = shared.k.index(_here(consumer))
    mbarrier.wait(shared.q_full.index(stage), (done // V.stages) & 1)
    return warpgroup_mma(k, shared.q.index(stage).permute((1, 0)), s, use_acc=False, is_async=True)


@gluon.jit
def _dq_product(dq, shared, done, consumer: gl.constexpr, V: gl.constexpr):
    """Start a block's product for the queries: with all keys of the tile, for the consumer's half of the columns."""
    place = done % PLACES
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
    place = handed % PLACES
    mbarrier.wait(shared.dq_empty.index(place), ((handed // PLACES) & 1) ^ 1)
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
    destination = shared.dq.index(handed % PLACES * V.consumers + consumer)
    _hand_over(gl.reshape(dq, [ROWS, COLUMNS]), destination, shared, handed)


@gluon.jit
def _block(
    dk, dv, dq, s, done, begun, extra, shared, base, rate, term, stop, band_start, band_end, scale2,
    MASKED: gl.constexpr, LAST: gl.constexpr, consumer: gl.constexpr, V: gl.constexpr,
    s_layout: gl.constexpr, p_layout: gl.constexpr,
):  # fmt: skip
    """Add a block of queries to the gradients of keys and values, and the block before it to that of the queries.

    Scores are transposed: keys are rows. The block's scores are on their way when it begins and, unless it is the
    tile's LAST, the next one's when it ends. Products that are on their way may not share registers with what is read
    meanwhile: ptxas would run them one by one.
    """
    stage = done % V.stages
    place = done % PLACES
    columns: gl.constexpr = gl.SliceLayout(0, s_layout)
    q = shared.q.index(stage)
    do = shared.do.index(stage)
    s = warpgroup_mma_wait(0, deps=(s,))
    mbarrier.wait(shared.do_full.index(stage), (done // V.stages) & 1)
    mbarrier.wait(shared.stats_full.index(stage), (done // V.stages) & 1)
    delta = gl.expand_dims(shared.stats.index(2 * stage + 1).load(columns), 0)
    dp = gl.broadcast(delta, s)[0]
    dp = warpgroup_mma(shared.v.index(_here(consumer)), do.permute((1, 0)), dp, is_async=True)
    lse2 = shared.stats.index(2 * stage).load(columns)
    p = gl.exp2(s * scale2 - gl.expand_dims(lse2, 0))
    if MASKED:
        p = gl.where(_met(base, rate, term, stop, band_start, band_end, V, s_layout), p, 0.0)
    _settle(p)
    dp = warpgroup_mma_wait(0, deps=(dp,))
    ds = (p * dp).to(q.dtype)
    own = shared.ds.index(place * V.consumers + consumer)
    # With the block before, all have also reckoned dq of the one whose score gradients lie there.
    before = done + 2 * V.stages - 1
    mbarrier.wait(shared.block_empty.index(before % V.stages), (before // V.stages) & 1)
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
    mbarrier.wait(shared.ds_full.index(last % PLACES), ((last // PLACES) & 1) ^ 1, pred=follows)
    dq = _dq_product(dq, shared, last, consumer, V)
    if LAST:
        _end_turn(shared, consumer, V)
        dv, dk, dq = warpgroup_mma_wait(0, deps=(dv, dk, dq))
    else:
        s = _scores(s, shared, done + 1, consumer, V)
        _end_turn(shared, consumer, V)
        dv, dk, dq = warpgroup_mma_wait(1, deps=(dv, dk, dq))
    mbarrier.arrive(shared.block_empty.index(stage), count=1)
    if follows:
        _hand_over_dq(dq, shared, done - 1 + extra, consumer, V)
    return dk, dv, dq, s, done + 1


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
    record = _look_up(shared, 0, 4)
    while _field(record, GOES_ON, 4) > 0:
        tokens, x_first = _field(record, TOKENS, 4), _field(record, X_FIRST, 4)
        base, first, stop = _field(record, BASE, 4), _field(record, FIRST, 4), _field(record, STOP, 4)
        blocks, head_edge, tail_edge = (
            _field(record, BLOCKS, 4), _field(record, HEAD_EDGE, 4), _field(record, TAIL_EDGE, 4)
        )  # fmt: skip
        band_start, band_end = _band(
            x_first + outputs.gradients.own_rate * index, outputs.window, outputs.previous_window, tokens, True, V.side, V.sliding,
            V.disjoint,
        )  # fmt: skip
        mbarrier.wait(shared.own_full, filled & 1)
        dk = gl.zeros([ROWS, V.head_dim], gl.float32, o_layout)
        dv = gl.zeros([ROWS, V.head_dim], gl.float32, o_layout)
        if blocks > 0:
            dq = gl.zeros([ROWS, DQ_COLUMNS], gl.float32, dq_layout)
            s = gl.zeros([ROWS, V.block_n], gl.float32, s_layout)
            s = _scores(s, shared, done, consumer, V)
            begun = done
            for inner in range(V.group):
                last = blocks - gl.where(inner == V.group - 1, 1, 0)
                for n in range(0, gl.minimum(head_edge, last)):
                    dk, dv, dq, s, done = _block(
                        dk, dv, dq, s, done, begun, extra, shared, base, rate, first + n * V.block_n, stop,
                        band_start, band_end, scale2, True, False, consumer, V, s_layout, p_layout,
                    )  # fmt: skip
                for n in range(head_edge, gl.minimum(tail_edge, last)):
                    dk, dv, dq, s, done = _block(
                        dk, dv, dq, s, done, begun, extra, shared, base, rate, first + n * V.block_n, stop,
                        band_start, band_end, scale2, False, False, consumer, V, s_layout, p_layout,
                    )  # fmt: skip
                for n in range(tail_edge, last):
                    dk, dv, dq, s, done = _block(
                        dk, dv, dq, s, done, begun, extra, shared, base, rate, first + n * V.block_n, stop,
                        band_start, band_end, scale2, True, False, consumer, V, s_layout, p_layout,
                    )  # fmt: skip
            dk, dv, dq, s, done = _block(
                dk, dv, dq, s, done, begun, extra, shared, base, rate, first + (blocks - 1) * V.block_n, stop,
                band_start, band_end, scale2, True, True, consumer, V, s_layout, p_layout,
            )  # fmt: skip
            mbarrier.wait(shared.ds_full.index((done - 1) % PLACES), ((done - 1) // PLACES) & 1)
            dq = _dq_product(dq, shared, done - 1, consumer, V)
            dq = warpgroup_mma_wait(0, deps=(dq,))
            _hand_over_dq(dq, shared, done - 1 + extra, consumer, V)
        mbarrier.arrive(shared.own_empty, count=1)
        dk *= outputs.gradients.scale
        record = _look_up(shared, filled, 4)  # once more: registers are scarce
        count = _field(record, COUNT, 4)
        if count == V.block_m:
            handed = done + extra
            _hand_over(dv.to(shared.k.dtype), _rows_handed_over(shared, handed, consumer, V), shared, handed)
            handed += 1
            _hand_over(dk.to(shared.k.dtype), _rows_handed_over(shared, handed, consumer, V), shared, handed)
            extra += 2
        else:  # the copy engine would not stop after count rows
            mbarrier.wait(shared.ready.index(filled % PLACES), (filled // PLACES) & 1)
            head, batch = _field(record, HEAD, 4), _field(record, BATCH, 4)
            start, x_first = _field(record, START, 4), _field(record, X_FIRST, 4)
            _store_key_rows(dk, dv, outputs.gradients, head, batch, start, x_first, count, consumer, V, o_layout)
        mbarrier.arrive(shared.records_empty.index(filled % PLACES), count=1)
        gl.thread_barrier()
        mbarrier.arrive(shared.stored.index(filled % PLACES), count=1)
        filled += 1
        record = _look_up(shared, filled, 4)


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
    # Programs of the next launch may start where this one's have ended: they wait lane by lane.
    gl.inline_asm_elementwise(
        "griddepcontrol.launch_dependents; mov.b32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False, pack=1
    )  # fmt: skip
    shared = _allocate(k_desc.dtype, V)
    fence_async_shared()
    work = Tiles(
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
