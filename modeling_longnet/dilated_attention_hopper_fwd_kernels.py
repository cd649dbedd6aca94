"""The forward kernel of dilated attention on Hopper: what its consumers do with the blocks that the producer brings."""

from .dilated_attention_hopper_pipeline_kernels import (
    BATCH,
    BRANCH,
    COUNT,
    HEAD,
    KIND,
    LN2,
    LOG2E,
    ROWS,
    START,
    TILE,
    TOKENS,
    X_FIRST,
    Results,
    Sources,
    Work,
    _allocate,
    _await_turn,
    _branch_of,
    _end_turn,
    _field,
    _hand_in,
    _in_order,
    _met,
    _of_threads,
    _pack,
    _produce,
    _read_record,
    _unpack,
)
from .dilated_attention_tile_kernels import RUNTIME, _band


try:
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


@gluon.jit
def _softmax(
    s, peak, base, rate, first, stop, band_start, band_end, scale2,
    MASKED: gl.constexpr, V: gl.constexpr, s_layout: gl.constexpr,
):  # fmt: skip
    """Return the weights of a block, the new running maximum, the block's part of the sum and the decay of those before.

    The sum is left to the threads that share a row, ``[ROWS, 4]``.
    """
    if MASKED:
        s = gl.where(_met(base, rate, first, stop, band_start, band_end, V, s_layout), s, float("-inf"))
    new_peak = gl.maximum(peak, gl.max(s, 1) * scale2)
    shift = gl.where(new_peak == float("-inf"), 0.0, new_peak) if MASKED else new_peak
    p = gl.exp2(s * scale2 - gl.expand_dims(shift, 1))
    decay = gl.exp2(peak - shift)
    return p, new_peak, gl.sum(gl.sum(_of_threads(p), 3), 1), decay


@gluon.jit
def _to_each(of_row, x):
    """Return a number of each row in such a way that it can be multiplied with x."""
    return gl.expand_dims(gl.convert_layout(of_row, gl.SliceLayout(1, x.type.layout)), 1)


@gluon.jit
def _attend_block(
    acc, p, peak, total, done, q, rings, base, rate, first, stop, band_start, band_end, scale2,
    MASKED: gl.constexpr, consumer: gl.constexpr, V: gl.constexpr,
    s_layout: gl.constexpr, o_layout: gl.constexpr, p_layout: gl.constexpr,
):  # fmt: skip
    """Score a block while the values of the block before are multiplied; the softmax runs beside the latter."""
    stage = done % V.stages
    last = (done - 1) % V.stages
    zero = gl.zeros([ROWS, V.block_n], gl.float32, s_layout)
    _await_turn(rings, done, consumer, V)
    mbarrier.wait(rings.k_full.index(stage), (done // V.stages) & 1)
    s = warpgroup_mma(q, rings.k.index(stage).permute((1, 0)), zero, use_acc=False, is_async=True)
    mbarrier.wait(rings.v_full.index(last), ((done - 1) // V.stages) & 1)
    acc = warpgroup_mma(_unpack(p, rings.k.dtype, p_layout), rings.v.index(last), acc, is_async=True)
    _end_turn(rings, consumer, V)
    s = warpgroup_mma_wait(1, deps=(s,))
    mbarrier.arrive(rings.k_empty.index(stage), count=1)
    new_p, peak, added, decay = _softmax(
        s, peak, base, rate, first, stop, band_start, band_end, scale2, MASKED, V, s_layout
    )
    total = total * _to_each(decay, total) + added
    acc = warpgroup_mma_wait(0, deps=(acc,))
    mbarrier.arrive(rings.v_empty.index(last), count=1)
    return acc * _to_each(decay, acc), _pack(new_p, rings.k.dtype), peak, total, done + 1


@gluon.jit
def _attend_branch(
    acc, p, peak, total, done, visited, record, x, q, rings, scale2,
    consumer: gl.constexpr, V: gl.constexpr, s_layout: gl.constexpr, o_layout: gl.constexpr, p_layout: gl.constexpr,
):  # fmt: skip
    """Attend a tile to the blocks of a branch, those that have been visited aside."""
    base, rate, first, stop, blocks, head_edge, tail_edge, window, previous_window = _branch_of(record)
    band_start, band_end = _band(
        x, window, previous_window, _field(record, TOKENS), False, V.side, V.sliding, V.disjoint
    )
    edges = head_edge + blocks - tail_edge
    for n in range(visited, edges):
        acc, p, peak, total, done = _attend_block(
            acc, p, peak, total, done, q, rings, base, rate,
            first + _in_order(n, blocks, head_edge, tail_edge) * V.block_n, stop, band_start, band_end,
            scale2, True, consumer, V, s_layout, o_layout, p_layout,
        )  # fmt: skip
    for _ in range(gl.maximum(edges, visited), blocks):
        acc, p, peak, total, done = _attend_block(
            acc, p, peak, total, done, q, rings, base, rate, first, stop, band_start, band_end,
            scale2, False, consumer, V, s_layout, o_layout, p_layout,
        )  # fmt: skip
    return acc, p, peak, total, done


@gluon.jit
def _start_scores(s, record, done, filled, rings, consumer: gl.constexpr, V: gl.constexpr):
    """Score the first block of a tile; after the last tile, whatever is there."""
    stage = done % V.stages
    place = filled % V.own_places
    exists = _field(record, KIND) == TILE
    mbarrier.wait(rings.own_full.index(place), (filled // V.own_places) & 1, pred=exists)
    mbarrier.wait(rings.k_full.index(stage), (done // V.stages) & 1, pred=exists)
    q = rings.own.index(place * V.consumers + consumer)
    return warpgroup_mma(q, rings.k.index(stage).permute((1, 0)), s, use_acc=False, is_async=True)


@gluon.jit
def _start_weights(s, record, results, index, scale2, V: gl.constexpr, s_layout: gl.constexpr):
    """Return the weights of a tile's first block, their maximum and sum."""
    base, rate, first, stop, blocks, head_edge, tail_edge, window, previous_window = _branch_of(record)
    x = _field(record, X_FIRST) + results.own_rate * index
    band_start, band_end = _band(
        x, window, previous_window, _field(record, TOKENS), False, V.side, V.sliding, V.disjoint
    )
    peak = gl.full([ROWS], float("-inf"), gl.float32, gl.SliceLayout(1, s_layout))
    p, peak, total, _ = _softmax(
        s, peak, base, rate, first + _in_order(0, blocks, head_edge, tail_edge) * V.block_n, stop,
        band_start, band_end, scale2, True, V, s_layout,
    )  # fmt: skip
    return p, peak, total


@gluon.jit
def _consume_fwd(rings, results, consumer: gl.constexpr, V: gl.constexpr):
    """Attend a consumer's rows of each tile.

    The last values of a tile are multiplied while the first block of the next one is scored and weighed: where a tile
    ends, the tensor cores go on as between two blocks.
    """
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, V.block_n, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, V.head_dim, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    rows_layout: gl.constexpr = gl.SliceLayout(1, s_layout)
    scale2 = results.scale * LOG2E
    index = consumer * ROWS + gl.arange(0, ROWS, layout=rows_layout)
    done = 0
    filled = 0
    seen = 1
    record = _read_record(rings, 0)
    zero = gl.zeros([ROWS, V.block_n], gl.float32, s_layout)
    _await_turn(rings, done, consumer, V)
    s = _start_scores(zero, record, done, filled, rings, consumer, V)
    _end_turn(rings, consumer, V)
    s = warpgroup_mma_wait(0, deps=(s,))
    mbarrier.arrive(rings.k_empty.index(0), count=1)
    first_p, peak, total = _start_weights(s, record, results, index, scale2, V, s_layout)
    p = _pack(first_p, rings.k.dtype)
    while _field(record, KIND) == TILE:
        head, batch = _field(record, HEAD), _field(record, BATCH)
        start, x_first, count = _field(record, START), _field(record, X_FIRST), _field(record, COUNT)
        x = x_first + results.own_rate * index
        numbers_ptr = results.numbers_ptr + ((batch.to(gl.int64) * results.heads + head) * results.length + start)
        if not V.first:
            earlier_peak = gl.load(numbers_ptr + x, mask=index < count, other=float("-inf")) * LOG2E
            tma.store_wait(0)  # the rows of the tile before have left: this tile's may come
            gl.thread_barrier()
            mbarrier.arrive(rings.staged_empty, count=1)
        place = filled % V.own_places
        q = rings.own.index(place * V.consumers + consumer)
        acc = gl.zeros([ROWS, V.head_dim], gl.float32, o_layout)
        done += 1
        visited = 1
        following = 1
        while following > 0:  # branches of this tile
            acc, p, peak, total, done = _attend_branch(
                acc, p, peak, total, done, visited, record, x, q, rings, scale2, consumer, V, s_layout, o_layout,
                p_layout,
            )  # fmt: skip
            visited = 0
            record = _read_record(rings, seen)
            seen += 1
            following = gl.where(_field(record, KIND) == BRANCH, 1, 0)
        mbarrier.arrive(rings.own_empty.index(place), count=1)
        filled += 1

        last = (done - 1) % V.stages
        zero = gl.zeros([ROWS, V.block_n], gl.float32, s_layout)
        _await_turn(rings, done, consumer, V)
        s = _start_scores(zero, record, done, filled, rings, consumer, V)
        mbarrier.wait(rings.v_full.index(last), ((done - 1) // V.stages) & 1)
        acc = warpgroup_mma(_unpack(p, rings.k.dtype, p_layout), rings.v.index(last), acc, is_async=True)
        _end_turn(rings, consumer, V)
        s = warpgroup_mma_wait(1, deps=(s,))
        mbarrier.arrive(rings.k_empty.index(done % V.stages), count=1)
        next_p, next_peak, next_total = _start_weights(s, record, results, index, scale2, V, s_layout)
        acc = warpgroup_mma_wait(0, deps=(acc,))
        p = _pack(next_p, rings.k.dtype)
        mbarrier.arrive(rings.v_empty.index(last), count=1)

        sums = gl.convert_layout(gl.sum(total, 1), rows_layout)
        if V.first:
            tma.store_wait(0)  # the rows of the tile before have left
        else:
            new_peak = gl.maximum(peak, earlier_peak)
            shift = gl.where(new_peak == float("-inf"), 0.0, new_peak)
            decay = gl.exp2(peak - shift)
            share = gl.exp2(earlier_peak - shift)
            peak = new_peak
            sums = sums * decay + share
            mbarrier.wait(rings.staged_full, (filled - 1) & 1)
            earlier = rings.staged.index(consumer).load(o_layout).to(gl.float32)
            acc = acc * _to_each(decay, acc) + earlier * _to_each(share, acc)
        skipped = sums == 0.0
        sums = gl.where(skipped, 1.0, sums)
        lse = gl.where(skipped, float("-inf"), (peak + gl.log2(sums)) * LN2)
        _hand_in(acc * _to_each(1.0 / sums, acc), rings, results, batch, head, start, x_first, count, consumer, V)
        gl.store(numbers_ptr + x, lse, mask=index < count)
        peak, total = next_peak, next_total
    tma.store_wait(0)


@gluon.jit(do_not_specialize=(*RUNTIME, "heads", "classes", "periods", "runs", "together", "tiles"))
def hopper_fwd_kernel(
    out_ptr, lse_ptr, own_desc, out_desc,
    k_desc_0, k_desc_1, k_desc_2, k_desc_3, k_desc_4, k_desc_5, k_desc_6, k_desc_7, k_desc_8, k_desc_9,
    v_desc_0, v_desc_1, v_desc_2, v_desc_3, v_desc_4, v_desc_5, v_desc_6, v_desc_7, v_desc_8, v_desc_9,
    cu_seqlens_ptr, stride_ob, stride_oh, stride_ol, scale, length, num_documents, search_steps,
    period, tiles_per_period, windows, previous_windows, rates, heads, classes, periods, runs, together, tiles,
    V: gl.constexpr,
):  # fmt: skip
    """Attend tiles of queries to the keys of all branches of the launch."""
    k_descs = (k_desc_0, k_desc_1, k_desc_2, k_desc_3, k_desc_4, k_desc_5, k_desc_6, k_desc_7, k_desc_8, k_desc_9)
    v_descs = (v_desc_0, v_desc_1, v_desc_2, v_desc_3, v_desc_4, v_desc_5, v_desc_6, v_desc_7, v_desc_8, v_desc_9)
    rings = _allocate(own_desc.dtype, True, V)
    fence_async_shared()
    work = Work(
        heads, cu_seqlens_ptr, length, num_documents, search_steps, period, tiles_per_period,
        windows, previous_windows, rates, classes, periods, runs, together, tiles,
    )  # fmt: skip
    own_rate = rates[0] if V.dilate else 1
    results = Results(out_desc, out_ptr, lse_ptr, stride_ob, stride_oh, stride_ol, scale, heads, length, own_rate)
    sources = Sources(own_desc, out_desc, k_descs, v_descs)
    CONSUMER: gl.constexpr = V.registers[0]
    PRODUCER: gl.constexpr = V.registers[1]
    if V.consumers == 3:
        gl.warp_specialize(
            [(_consume_fwd, (rings, results, 0, V)), (_consume_fwd, (rings, results, 1, V)),
             (_consume_fwd, (rings, results, 2, V)), (_produce, (sources, rings, work, not V.first, V))],
            [4, 4, 1], [CONSUMER, CONSUMER, PRODUCER],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [(_consume_fwd, (rings, results, 0, V)), (_consume_fwd, (rings, results, 1, V)),
             (_produce, (sources, rings, work, not V.first, V))],
            [4, 1], [CONSUMER, PRODUCER],
        )  # fmt: skip
