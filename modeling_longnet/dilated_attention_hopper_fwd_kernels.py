"""The forward kernel of dilated attention on Hopper: what its consumers do with the blocks that the producer brings."""

from .dilated_attention_hopper_pipeline_kernels import (
    BATCH,
    BLOCKS,
    COUNT,
    GOES_ON,
    HEAD,
    LN2,
    LOG2E,
    START,
    TOKENS,
    X_FIRST,
    Results,
    Sources,
    _allocate,
    _await_turn,
    _barriers,
    _branch_of,
    _end_turn,
    _field,
    _lap,
    _met,
    _pack,
    _place,
    _produce,
    _read_record,
    _store_rows,
    _terms_met,
    _unpack,
)
from .dilated_attention_hopper_progress_kernels import _await_grids_before, _await_written, _count, _let_next_start
from .dilated_attention_order_kernels import Work, _in_order, _stretch_of
from .dilated_attention_tile_kernels import RUNTIME


try:
    from triton import constexpr_function
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language.nvidia.hopper import (
        fence_async_shared,
        mbarrier,
        tma,
        warpgroup_mma,
        warpgroup_mma_wait,
    )
except ImportError as error:
    raise ImportError("the Hopper kernels need Gluon, which comes with triton") from error


SLACK = "0f41000000"  # 8.0, log2 of how far weights may be above one


@constexpr_function
def _peak_assembly(elements):
    """Where any score of a warp's rows is SLACK above their peaks, raise these to the rows' maxima; the others stay.

    A thread has two of the eight columns of each of its rows, three threads beside it have the others: only then do
    they exchange their maxima.
    """
    names = [f"${i}" for i in range(7 * elements)]
    new_peak, new_total, decay, peak, total, highest, scale2 = (
        names[i : i + elements] for i in range(0, 7 * elements, elements)
    )
    rows = range(0, elements, 2)
    lines = ["{ .reg .pred grows, any; .reg .f32 limit, other;", *(f".reg .f32 h{i};" for i in rows)]
    for i in rows:
        lines += [f"max.f32 h{i}, {highest[i]}, {highest[i + 1]};", f"mul.f32 h{i}, h{i}, {scale2[i]};"]
        lines += [f"add.f32 limit, {peak[i]}, {SLACK};"]
        lines += [f"setp.gt.f32 any, h{i}, limit;" if i == 0 else f"setp.gt.or.f32 any, h{i}, limit, any;"]
    for i in range(elements):
        lines += [f"mov.f32 {new_peak[i]}, {peak[i]};", f"mov.f32 {new_total[i]}, {total[i]};"]
        lines += [f"mov.f32 {decay[i]}, 0f3F800000;"]
    lines += ["vote.sync.any.pred any, any, 0xffffffff;", "@!any bra DONE;"]
    for i in rows:
        for lanes in (1, 2):
            lines += [f"shfl.sync.bfly.b32 other, h{i}, {lanes}, 31, 0xffffffff;", f"max.f32 h{i}, h{i}, other;"]
        lines += [f"add.f32 limit, {peak[i]}, {SLACK};", f"setp.gt.f32 grows, h{i}, limit;", f"@!grows bra ROW{i};"]
        lines += [f"sub.f32 other, {peak[i]}, h{i};", "ex2.approx.ftz.f32 other, other;"]
        for j in (i, i + 1):
            lines += [f"mov.f32 {new_peak[j]}, h{i};", f"mov.f32 {decay[j]}, other;"]
            lines += [f"mul.f32 {new_total[j]}, {total[j]}, other;"]
        lines += [f"ROW{i}:"]
    return " ".join([*lines, "DONE: }"])


@constexpr_function
def _peak_constraints(elements):
    return ",".join(["=&f"] * (3 * elements) + ["f"] * (4 * elements))


@constexpr_function
def _eighths(rows):
    """Return the layout of ``[rows, 8]`` in which scores' rows lie: two columns of each in a thread, one after the other."""
    own = [[0, 0, 1], [8, 0, 0], [64, 0, 0]] if rows == 128 else [[0, 0, 1], [8, 0, 0]]
    lanes = [[0, 0, 2], [0, 0, 4], [1, 0, 0], [2, 0, 0], [4, 0, 0]]
    return gl.SliceLayout(1, gl.DistributedLinearLayout(own, lanes, [[16, 0, 0], [32, 0, 0]], [], [rows, 1, 8]))


@gluon.jit
def _in_eighths(x, V: gl.constexpr):
    """Give rows' numbers to all of their eight columns."""
    layout: gl.constexpr = _eighths(V.rows)
    x = gl.expand_dims(gl.convert_layout(x, gl.SliceLayout(1, layout)), 1)
    x, _ = gl.broadcast(x, gl.zeros([V.rows, 8], gl.float32, layout))
    return x


@gluon.jit
def _softmax(
    s, peak, total, first, row_first, row_stop, scale2,
    MASKED: gl.constexpr, V: gl.constexpr, s_layout: gl.constexpr,
):  # fmt: skip
    """Return the weights of a block, what they are relative to, the new running sums, and by how much the old ones decay.

    They are relative to an earlier maximum until the scores are SLACK beyond it: until then nothing decays. A row has
    eight sums, of every eighth column each: they are added up when its tile ends.
    """
    if MASKED:
        s = gl.where(_met(first, row_first, row_stop, V, s_layout), s, float("-inf"))
    s = gl.reshape(s, [V.rows, V.block_n // 8, 8])
    highest = gl.convert_layout(gl.max(s, 1), peak.type.layout)
    ELEMENTS: gl.constexpr = V.rows // 16
    peak, total, decay = gl.inline_asm_elementwise(
        _peak_assembly(ELEMENTS), _peak_constraints(ELEMENTS), [peak, total, highest, gl.full_like(peak, scale2)],
        dtype=(gl.float32, gl.float32, gl.float32), is_pure=True, pack=ELEMENTS,
    )  # fmt: skip
    shift = gl.where(peak == float("-inf"), 0.0, peak) if MASKED else peak
    p = gl.exp2(s * scale2 - gl.convert_layout(gl.expand_dims(shift, 1), s.type.layout))
    total += gl.convert_layout(gl.sum(p, 1), total.type.layout)
    return gl.convert_layout(gl.reshape(p, [V.rows, V.block_n]), s_layout), peak, total, decay


@constexpr_function
def _decay_assembly(elements, rows):
    """Multiply a thread's elements of ``[rows, n]`` by their factors, if those of its rows are not all one.

    The third of its elements lies 8 rows below the first; of 128 rows, the second half of them 64.
    """
    names = [f"${i}" for i in range(3 * elements)]
    out, x, factors = names[:elements], names[elements : 2 * elements], names[2 * elements :]
    first, *others = (factors[half + i] for half in range(0, elements, elements * 64 // rows) for i in (0, 2))
    lines = [f"{{ .reg .pred all; setp.eq.f32 all, {first}, 0f3F800000;"]
    lines += [f"setp.eq.and.f32 all, {other}, 0f3F800000, all;" for other in others]
    lines += [f"mov.f32 {o}, {a};" for o, a in zip(out, x)]
    lines += ["@all bra DONE;"]
    lines += [f"mul.f32 {o}, {a}, {factor};" for o, a, factor in zip(out, x, factors)]
    return " ".join([*lines, "DONE: }"])


@constexpr_function
def _decay_constraints(elements):
    return ",".join(["=f"] * elements + ["f"] * (2 * elements))


@gluon.jit
def _decayed(acc, decay, V: gl.constexpr):
    """Multiply what has been summed, ``[rows, D]``, by each row's decay; threads whose rows do not decay pass over it."""
    parts = gl.reshape(acc, [V.rows, V.head_dim // 8, 8])
    _, factors = gl.broadcast(parts, gl.convert_layout(gl.expand_dims(decay, 1), parts.type.layout))
    ELEMENTS: gl.constexpr = V.rows * V.head_dim // 128
    parts = gl.inline_asm_elementwise(
        _decay_assembly(ELEMENTS, V.rows), _decay_constraints(ELEMENTS), [parts, factors], dtype=gl.float32,
        is_pure=True, pack=ELEMENTS,
    )  # fmt: skip
    return gl.convert_layout(gl.reshape(parts, [V.rows, V.head_dim]), acc.type.layout)


@gluon.jit
def _attend_block(
    acc, p, peak, total, done, q, rings, first, row_first, row_stop, scale2,
    MASKED: gl.constexpr, consumer: gl.constexpr, V: gl.constexpr,
    s_layout: gl.constexpr, p_layout: gl.constexpr,
):  # fmt: skip
    """Score a block while the values of the block before are multiplied; the softmax runs beside the latter."""
    stage = _place(done, V.stages)
    last = _place(done - 1, V.stages)
    zero = gl.zeros([V.rows, V.block_n], gl.float32, s_layout)
    _await_turn(rings, done, consumer, V)
    mbarrier.wait(rings.k_full.index(stage), _lap(done, V.stages))
    s = warpgroup_mma(q, rings.k.index(stage).permute((1, 0)), zero, use_acc=False, is_async=True)
    mbarrier.wait(rings.v_full.index(last), _lap(done - 1, V.stages))
    acc = warpgroup_mma(_unpack(p, rings.k.dtype, p_layout), rings.v.index(last), acc, is_async=True)
    _end_turn(rings, consumer, V)
    s = warpgroup_mma_wait(1, deps=(s,))
    mbarrier.arrive(rings.k_empty.index(stage), count=1)
    new_p, peak, total, decay = _softmax(s, peak, total, first, row_first, row_stop, scale2, MASKED, V, s_layout)
    acc = warpgroup_mma_wait(0, deps=(acc,))
    mbarrier.arrive(rings.v_empty.index(last), count=1)
    acc = _decayed(acc, decay, V)
    return acc, _pack(new_p, rings.k.dtype), peak, total, done + 1


@gluon.jit
def _lse_before(record, results, index, V: gl.constexpr):
    """Ask for the lse that the launches before have left of a tile's rows."""
    if V.first:  # there is none, and nobody looks
        return index
    else:
        head, batch = _field(record, HEAD), _field(record, BATCH)
        row = (batch.to(gl.int64) * results.heads + head) * results.length + _field(record, START)
        x = _field(record, X_FIRST) + results.own_rate * index
        return gl.load(results.numbers_ptr + row + x, mask=index < _field(record, COUNT), other=float("-inf"))


@gluon.jit
def _hand_in(x, results, batch, head, start, x_first, count, seen, consumer: gl.constexpr, V: gl.constexpr):
    """Hand a consumer's rows to ``_deliver``; ``seen`` tiles came before.

    The copy engine would not stop after ``count`` rows: what ends sooner is written by the consumer itself.
    """
    x = x.to(results.rows.dtype)
    mbarrier.wait(results.staged_empty, (seen & 1) ^ 1)
    if count >= (consumer + 1) * V.rows:
        results.staged.index(consumer).store(x)
        fence_async_shared()
    else:
        ptr = results.rows_ptr + batch.to(gl.int64) * results.stride_b + head.to(gl.int64) * results.stride_h
        layout: gl.constexpr = x.type.layout
        _store_rows(x, ptr, start, x_first, results.own_rate, count, results.stride_l, consumer, False, V, layout)
    mbarrier.arrive(results.staged_full.index(consumer), count=1)


@gluon.jit
def _rows_written(record, V: gl.constexpr):
    """Return how many rows a tile of dilated queries writes: none where it adds nothing to the launches before."""
    if V.first:
        return _field(record, COUNT)
    else:
        return gl.where(_field(record, BLOCKS) > 0, _field(record, COUNT), 0)


@gluon.jit
def _deliver(results, rings, work, V: gl.constexpr):
    """Have the copy engine write where they lie the rows that consumers hand in; count a tile that has arrived."""
    dtype: gl.constexpr = results.rows.dtype
    rate = results.own_rate
    seen = 0
    record = _read_record(rings, 0, 1)
    while _field(record, GOES_ON) > 0:
        head, batch = _field(record, HEAD), _field(record, BATCH)
        row = _field(record, START) + _field(record, X_FIRST)
        count = _rows_written(record, V)
        for consumer in gl.static_range(V.consumers):
            mbarrier.wait(results.staged_full.index(consumer), seen & 1)
            if count >= (consumer + 1) * V.rows:
                source = results.staged.index(consumer)
                source = source._reinterpret(dtype, [1, 1, 1, V.rows, V.head_dim], results.rows.layout)
                tma.async_copy_shared_to_global(
                    results.rows, [batch, head, row % rate, row // rate + consumer * V.rows, 0], source
                )
        tma.store_wait(0)
        mbarrier.arrive(results.staged_empty, count=1)
        if V.counted:
            _await_written()
            counter, _ = _stretch_of(batch, head, row, work)
            _count(work.finished_ptr + counter, 1)
        seen += 1
        record = _read_record(rings, seen, 1)


@gluon.jit
def _consume_fwd(rings, results, consumer: gl.constexpr, V: gl.constexpr):
    """Attend a consumer's rows of each tile."""
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, V.block_n, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, V.head_dim, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    rows_layout: gl.constexpr = gl.SliceLayout(1, s_layout)
    eighths: gl.constexpr = _eighths(V.rows)
    scale2 = results.scale * LOG2E
    index = consumer * V.rows + gl.arange(0, V.rows, layout=rows_layout)
    done = 0
    filled = 0
    seen = 1
    record = _read_record(rings, 0)
    upcoming = _lse_before(record, results, index, V)
    while _field(record, GOES_ON) > 0:
        head, batch = _field(record, HEAD), _field(record, BATCH)
        start, x_first = _field(record, START), _field(record, X_FIRST)
        count, tokens = _field(record, COUNT), _field(record, TOKENS)
        base, rate, first, stop, blocks, head_edge, tail_edge, window, previous_window = _branch_of(record)
        x = x_first + results.own_rate * index
        at_row = (batch.to(gl.int64) * results.heads + head) * results.length + start
        begun = 0
        if V.num_branches > 1:  # pass over branches in which the tile meets nothing
            while (blocks == 0) & (begun < V.num_branches - 1):
                record = _read_record(rings, seen)
                seen += 1
                begun += 1
                base, rate, first, stop, blocks, head_edge, tail_edge, window, previous_window = _branch_of(record)
        if V.first:
            peak = gl.full([V.rows, 8], float("-inf"), gl.float32, eighths)
            total = gl.zeros([V.rows, 8], gl.float32, eighths)
        else:
            peak = _in_eighths(upcoming * LOG2E, V)
            total = gl.where(peak == float("-inf"), 0.0, 0.125)
        acc = gl.zeros([V.rows, V.head_dim], gl.float32, o_layout)
        if blocks > 0:
            mbarrier.wait(rings.own_full, filled & 1)
            filled += 1
            q = rings.own.index(consumer)
            if not V.first:
                acc = rings.other.index(consumer).load(o_layout).to(gl.float32)
            row_first, row_stop = _terms_met(x, window, previous_window, tokens, base, rate, stop, V)
            stage = _place(done, V.stages)
            zero = gl.zeros([V.rows, V.block_n], gl.float32, s_layout)
            _await_turn(rings, done, consumer, V)
            mbarrier.wait(rings.k_full.index(stage), _lap(done, V.stages))
            s = warpgroup_mma(q, rings.k.index(stage).permute((1, 0)), zero, use_acc=False, is_async=True)
            _end_turn(rings, consumer, V)
            s = warpgroup_mma_wait(0, deps=(s,))
            mbarrier.arrive(rings.k_empty.index(stage), count=1)
            new_p, peak, total, decay = _softmax(
                s, peak, total, first + _in_order(0, blocks, head_edge, tail_edge) * V.block_n,
                row_first, row_stop, scale2, True, V, s_layout,
            )  # fmt: skip
            if not V.first:
                acc = _decayed(acc, decay, V)
            p = _pack(new_p, rings.k.dtype)
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
                    acc, p, peak, total, done = _attend_block(
                        acc, p, peak, total, done, q, rings,
                        first + _in_order(n, blocks, head_edge, tail_edge) * V.block_n, row_first, row_stop,
                        scale2, True, consumer, V, s_layout, p_layout,
                    )  # fmt: skip
                for _ in range(gl.maximum(edges, visited), blocks):
                    acc, p, peak, total, done = _attend_block(
                        acc, p, peak, total, done, q, rings, first, row_first, row_stop,
                        scale2, False, consumer, V, s_layout, p_layout,
                    )  # fmt: skip
            last = _place(done - 1, V.stages)
            mbarrier.wait(rings.v_full.index(last), _lap(done - 1, V.stages))
            acc = warpgroup_mma(_unpack(p, rings.k.dtype, p_layout), rings.v.index(last), acc, is_async=True)
            record = _read_record(rings, seen)
            upcoming = _lse_before(record, results, index, V)
            acc = warpgroup_mma_wait(0, deps=(acc,))
            mbarrier.arrive(rings.v_empty.index(last), count=1)
        else:
            record = _read_record(rings, seen)
            upcoming = _lse_before(record, results, index, V)
            count = count if V.first else 0
        seen += 1

        total = gl.convert_layout(gl.sum(total, 1), rows_layout)
        peak = gl.convert_layout(gl.max(peak, 1), rows_layout)
        skipped = total == 0.0
        total = gl.where(skipped, 1.0, total)
        out = acc * gl.expand_dims(gl.convert_layout(1.0 / total, gl.SliceLayout(1, o_layout)), 1)
        lse = gl.where(skipped, float("-inf"), (peak + gl.log2(total)) * LN2)
        gl.store(results.numbers_ptr + at_row + x, lse, mask=index < count)
        if V.dilate:
            _hand_in(out, results, batch, head, start, x_first, count, seen - 2, consumer, V)
        else:
            out_ptr = results.rows_ptr + batch.to(gl.int64) * results.stride_b + head.to(gl.int64) * results.stride_h
            _store_rows(
                out, out_ptr, start, x_first, results.own_rate, count, results.stride_l, consumer, False, V,
                V.whole_rows,
            )  # fmt: skip


@gluon.jit(do_not_specialize=(
    *RUNTIME, "heads", "classes", "periods", "runs", "together", "tiles", "number", "counters", "before", "stretch",
    "stretches", "before_in_last",
))  # fmt: skip
def hopper_fwd_kernel(
    out_ptr, lse_ptr, tallies_ptr, own_desc, out_desc,
    k_desc_0, k_desc_1, k_desc_2, k_desc_3, k_desc_4, k_desc_5, k_desc_6, k_desc_7, k_desc_8, k_desc_9,
    v_desc_0, v_desc_1, v_desc_2, v_desc_3, v_desc_4, v_desc_5, v_desc_6, v_desc_7, v_desc_8, v_desc_9,
    cu_seqlens_ptr, stride_ob, stride_oh, stride_ol, scale, length, num_documents, search_steps,
    period, tiles_per_period, windows, previous_windows, rates, heads, classes, periods, runs, together, tiles, number,
    counters, before, stretch, stretches, before_in_last,
    V: gl.constexpr,
):  # fmt: skip
    """Attend tiles of queries to the keys of all branches of the launch."""
    gl.static_assert(V.consumers <= 3)
    if V.counted:
        _let_next_start()
    k_descs = (k_desc_0, k_desc_1, k_desc_2, k_desc_3, k_desc_4, k_desc_5, k_desc_6, k_desc_7, k_desc_8, k_desc_9)
    v_descs = (v_desc_0, v_desc_1, v_desc_2, v_desc_3, v_desc_4, v_desc_5, v_desc_6, v_desc_7, v_desc_8, v_desc_9)
    rings = _allocate(own_desc.dtype, False, V.consumers + 1 if V.dilate else V.consumers, V)
    staged, staged_full, staged_empty = None, None, None
    if V.dilate:  # tiles of dense queries take so long that their end makes no difference
        staged = gl.allocate_shared_memory(own_desc.dtype, [V.consumers, V.rows, V.head_dim], rings.own.layout)
        staged_full = _barriers(V.consumers, 1)
        staged_empty = _barriers(1, 1).index(0)
    fence_async_shared()
    work = Work(
        heads, cu_seqlens_ptr, length, num_documents, search_steps, period, tiles_per_period,
        windows, previous_windows, rates, classes, periods, runs, together, tiles, tallies_ptr + number,
        tallies_ptr + counters, before, stretch, stretches, before_in_last,
    )  # fmt: skip
    own_rate = rates[0] if V.dilate else 1
    results = Results(
        out_desc, staged, staged_full, staged_empty, out_ptr, lse_ptr, stride_ob, stride_oh, stride_ol, scale, heads,
        length, own_rate,
    )  # fmt: skip
    sources = Sources(own_desc, out_desc, k_descs, v_descs)
    CONSUMER: gl.constexpr = V.registers[0]
    PRODUCER: gl.constexpr = V.registers[1]
    if V.consumers == 1 and V.dilate:
        gl.warp_specialize(
            [(_consume_fwd, (rings, results, 0, V)), (_produce, (sources, rings, work, V)),
             (_deliver, (results, rings, work, V))],
            [1, 1], [PRODUCER, PRODUCER],
        )  # fmt: skip
    elif V.consumers == 1:
        gl.warp_specialize(
            [(_consume_fwd, (rings, results, 0, V)), (_produce, (sources, rings, work, V))], [1], [PRODUCER]
        )
    elif V.consumers == 2 and V.dilate:
        gl.warp_specialize(
            [(_consume_fwd, (rings, results, 0, V)), (_consume_fwd, (rings, results, 1, V)),
             (_produce, (sources, rings, work, V)), (_deliver, (results, rings, work, V))],
            [4, 1, 1], [CONSUMER, PRODUCER, PRODUCER],
        )  # fmt: skip
    elif V.consumers == 2:
        gl.warp_specialize(
            [(_consume_fwd, (rings, results, 0, V)), (_consume_fwd, (rings, results, 1, V)),
             (_produce, (sources, rings, work, V))],
            [4, 1], [CONSUMER, PRODUCER],
        )  # fmt: skip
    elif V.dilate:
        gl.warp_specialize(
            [(_consume_fwd, (rings, results, 0, V)), (_consume_fwd, (rings, results, 1, V)),
             (_consume_fwd, (rings, results, 2, V)), (_produce, (sources, rings, work, V)),
             (_deliver, (results, rings, work, V))],
            [4, 4, 1, 1], [CONSUMER, CONSUMER, PRODUCER, PRODUCER],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [(_consume_fwd, (rings, results, 0, V)), (_consume_fwd, (rings, results, 1, V)),
             (_consume_fwd, (rings, results, 2, V)), (_produce, (sources, rings, work, V))],
            [4, 4, 1], [CONSUMER, CONSUMER, PRODUCER],
        )  # fmt: skip
    if V.counted:
        _await_grids_before()
