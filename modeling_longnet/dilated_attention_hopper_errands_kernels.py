"""What other warps do beside the consumers in the backward of one kernel on Hopper.

The *producer* draws tiles and fetches; it tells the others about each tile in a *record*. One warp brings lse and delta,
one watches the marks of those who add to a block's dq before, one has the copy engine add what the consumers hand over,
and marks what has arrived in memory. ``dilated_attention_hopper_ordered_kernels`` says what for.
"""

from typing import Any, NamedTuple

from .dilated_attention_hopper_bwd_kernels import _unpack_stats
from .dilated_attention_hopper_pipeline_kernels import (
    ROWS,
    _copy,
    _field,
    _hand_out,
    _lap,
    _look_up,
    _place,
    _read_record,
)
from .dilated_attention_hopper_progress_kernels import (
    _await_count,
    _await_written,
    _count,
    _draw,
    _fence_global,
    _glance,
    _look,
    _tell,
)
from .dilated_attention_order_kernels import _blocks_met, _met_by_next, _placed, _rows_of


try:
    from triton._C.libtriton import ir
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language._core import builtin
    from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
except ImportError as error:
    raise ImportError("the Hopper kernels need Gluon, which comes with triton") from error


# A record: what the producer tells the other warps about one tile.
GOES_ON, HEAD, BATCH, LANE, START, TOKENS, X_FIRST, COUNT, BASE, FIRST, STOP, BLOCKS, HEAD_EDGE, TAIL_EDGE = (
    gl.constexpr(i) for i in range(14)
)
MARK, MET_FIRST, MET_STOP = gl.constexpr(14), gl.constexpr(15), gl.constexpr(16)
FIELDS = gl.constexpr(32)
AHEAD = gl.constexpr(2)  # blocks of the next tile that are fetched before its own rows, whose place is free later
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
    _hand_out(shared, written, record)


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
                    stage = _place(fetched, V.stages)
                    phase = _lap(fetched, V.stages) ^ 1
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
        else:  # it counts, and may not be taken for one of the launches before
            _await_count(tiles.finished_ptr + lane, tiles.before)
            _count(tiles.finished_ptr + lane, 1)
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
    record = _read_record(shared, 0, 1)
    while _field(record, GOES_ON) > 0:
        head, batch, start = _field(record, HEAD), _field(record, BATCH), _field(record, START)
        base, first, stop = _field(record, BASE), _field(record, FIRST), _field(record, STOP)
        blocks = _field(record, BLOCKS)
        for inner in range(V.group):
            row = (batch.to(gl.int64) * (tiles.heads * V.group) + head * V.group + inner) * tiles.length + start + base
            for n in range(blocks):
                term = first + n * V.block_n + gl.arange(0, V.block_n, layout=layout)
                words = gl.load(stats_ptr + row + term.to(gl.int64) * rate, mask=term < stop, other=0)
                lse2, delta = _unpack_stats(words)
                stage = _place(fetched, V.stages)
                mbarrier.wait(shared.block_empty.index(stage), _lap(fetched, V.stages) ^ 1)
                shared.stats.index(2 * stage).store(lse2)
                shared.stats.index(2 * stage + 1).store(-delta)
                mbarrier.arrive(shared.stats_full.index(stage), count=1)
                fetched += 1
        record = _read_record(shared, seen, 1)
        seen += 1


@gluon.jit
def _order_of(record):
    """Return a record's lane, the progression of queries and its blocks, and what these wait for."""
    return (
        _field(record, LANE), _field(record, START), _field(record, BASE), _field(record, FIRST),
        _field(record, BLOCKS), _field(record, MARK), _field(record, MET_FIRST), _field(record, MET_STOP),
    )  # fmt: skip


@gluon.jit
def _watch_marks(marks_ptr, shared, tiles, V: gl.constexpr):
    """Say that a block's dq may be added to when the tile after this one, if it meets the block, has done so."""
    rate = tiles.rate if V.dilate else 1
    done = 0
    seen = 1
    record = _read_record(shared, 0, 1)
    while _field(record, GOES_ON) > 0:
        lane, start, base, first, blocks, mark, met_first, met_stop = _order_of(record)
        _await_count(tiles.finished_ptr + lane, tiles.before)
        mbarrier.arrive(shared.ready.index(_place(seen - 1, PLACES)), count=1)
        for inner in range(V.group):
            row = (lane.to(gl.int64) * V.group + inner) * tiles.length + start + base
            for n in range(blocks):
                term = first + n * V.block_n
                if (term >= met_first) & (term < met_stop):
                    ptr = marks_ptr + (row + term.to(gl.int64) * rate)
                    found = _glance(ptr)
                    while found != mark + 1:
                        found = _glance(ptr)
                    _look(ptr)
                mbarrier.wait(shared.turn_over.index(_place(done, PLACES)), _lap(done, PLACES) ^ 1)
                mbarrier.arrive(shared.turn.index(_place(done, PLACES)), count=1)
                done += 1
        record = _read_record(shared, seen, 1)
        seen += 1


@builtin
def _start_adding(descriptor, coordinates, source, _semantic=None):
    """Have the copy engine add a block of shared memory to global memory."""
    coordinates = _semantic._convert_to_ir_values(coordinates, require_i64=False)
    kind = ir.DESCRIPTOR_REDUCE_KIND.ADD
    _semantic.builder.create_async_tma_reduce(kind, descriptor.handle, coordinates, source.handle)


@gluon.jit
def _rows_handed_over(shared, handed, consumer: gl.constexpr, V: gl.constexpr):
    """Return a place of the ring of dq as rows of dk or dv: half as wide, twice as many columns."""
    dtype: gl.constexpr = shared.k.dtype
    layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, V.head_dim], dtype)
    return shared.dq.index(_place(handed, PLACES) * V.consumers + consumer)._reinterpret(
        dtype, [ROWS, V.head_dim], layout
    )


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
    while _field(record, GOES_ON) > 0:
        lane, start, base, first, blocks, mark, met_first, met_stop = _order_of(record)
        residue = (start + base) % rate
        term_before = (start + base) // rate
        for inner in range(V.group):
            head = lane * V.group + inner
            row = head.to(gl.int64) * tiles.length + start + base
            for n in range(blocks):
                term = first + n * V.block_n
                place = _place(handed, PLACES)
                mbarrier.wait(shared.turn.index(_place(done, PLACES)), _lap(done, PLACES))
                mbarrier.wait(shared.dq_full.index(place), _lap(handed, PLACES))
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
                mbarrier.arrive(shared.turn_over.index(_place(done, PLACES)), count=1)
                _await_written()
                _tell(marks_ptr + (row + term.to(gl.int64) * rate), mark)
                done += 1
                handed += 1
        mbarrier.wait(shared.ready.index(_place(seen, PLACES)), _lap(seen, PLACES))
        if _field(record, COUNT) == V.block_m:
            head, batch = _field(record, HEAD), _field(record, BATCH)
            row = start + _field(record, X_FIRST)
            _start_rows(dv_desc, shared, handed, batch, head, row, tiles.rate, V)
            _start_rows(dk_desc, shared, handed + 1, batch, head, row, tiles.rate, V)
            _await_written()
            handed += 2
        mbarrier.wait(shared.stored.index(_place(seen, PLACES)), _lap(seen, PLACES))
        mbarrier.arrive(shared.records_empty.index(_place(seen, PLACES)), count=1)
        _count(tiles.finished_ptr + lane, 1)
        seen += 1
        record = _look_up(shared, seen, 1)


@gluon.jit
def _start_rows(descriptor, shared, handed, batch, head, row, rate, V: gl.constexpr):
    """Have the copy engine write a tile's rows of dk or dv, or add them to what launches before have written."""
    place = _place(handed, PLACES)
    mbarrier.wait(shared.dq_full.index(place), _lap(handed, PLACES))
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
