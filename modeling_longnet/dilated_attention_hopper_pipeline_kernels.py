"""How the Hopper kernels of dilated attention work together, in Gluon: tiles, rings, the producer, what all consumers do.

The mathematics is that of ``dilated_attention_tile_kernels``: tiles are strided rows where they lie, bands replace masks,
launches go on from one another's (out, lse). What differs is who works. A program stays on its processor and draws one
tile after the other. One of its warps, the *producer*, does the integer arithmetic and has the copy engine fetch the
tile's own rows and then, block by block, the rows that they meet. One to three warpgroups, the *consumers*, multiply 64 or
128 rows each: the products of the next block run on the tensor cores beside the softmax of this one.

Everything goes through rings in shared memory, guarded by pairs of barriers: ``full`` when something has arrived,
``empty`` when all consumers are done with it. The n-th use of a ring of size R lies in place ``n % R`` and has the
phase ``n // R % 2``. Names: a program *owns* a tile's rows; what these meet are pairs of tensors, called k and v here
(queries and output gradients in the kernel that owns keys).
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

from .dilated_attention_hopper_progress_kernels import _await_count, _count, _drawn, _fence_global, _start_drawing
from .dilated_attention_order_kernels import _in_order, _in_pairs, _locate, _lone_blocks, _stretch_of
from .dilated_attention_tile_kernels import _band, _block_range, _count_before, _offset, _pick


try:
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
except ImportError as error:
    raise ImportError("the Hopper kernels need Gluon, which comes with triton") from error


BEFORE = gl.constexpr(0)
LOG2E = gl.constexpr(1.4426950408889634)
LN2 = gl.constexpr(0.6931471805599453)
ROWS = gl.constexpr(64)  # of a consumer in the backward: what one warpgroup multiplies at once

# A record: what the producer tells the consumers about one branch of one tile.
HEAD, BATCH, START, X_FIRST, GOES_ON, COUNT, TOKENS, BASE, RATE, FIRST, STOP, BLOCKS, HEAD_EDGE, TAIL_EDGE = (
    gl.constexpr(i) for i in range(14)
)
WINDOW, PREVIOUS_WINDOW = gl.constexpr(14), gl.constexpr(15)
FIELDS = gl.constexpr(16)


@dataclass(frozen=True, eq=False)  # told apart by identity: the launcher makes one of each
class Variant:
    """What a kernel is compiled for.

    ``from_key``: the tiles are keys. ``first``: the launch writes every row and need not look at what was there.
    ``own_tensors``: how many tensors' own rows are copied. ``side``: as in ``dilated_attention_tile_kernels``.
    ``registers``: per thread, of consumers and of the producer. ``turns``: consumers issue their products in turns.
    ``consumers``: that share a tile's rows. ``holds_own``: they multiply own rows from registers. ``stores``: the first
    tile that meets a block writes what others add to. ``counted``: launches overlap, tiles of queries are counted.
    ``starts_together``: all rows of a tile meet the first term of its first block. ``head_dim``: columns in shared memory,
    of which the first ``columns`` are the head's; the others are zero.
    """

    num_branches: int
    group: int
    num_kv_heads: int
    blocked: bool
    disjoint: bool
    dilate: bool
    sliding: bool
    packed: bool
    side: int
    from_key: bool
    first: bool
    own_tensors: int
    head_dim: int
    columns: int
    block_m: int
    block_n: int
    stages: int
    registers: tuple[int, int]
    turns: bool
    consumers: int
    holds_own: bool
    stores: bool = False
    counted: bool = False
    starts_together: bool = False

    def __post_init__(self):
        for name, value in vars(self).items():  # as constants, the kernels may count and allocate with them
            object.__setattr__(self, name, gl.constexpr(value))

    @property
    def rows(self):
        """Rows of a consumer."""
        return gl.constexpr(self.block_m.value // self.consumers.value)

    @property
    def whole_rows(self):
        width = self.head_dim.value // 8
        return gl.constexpr(gl.BlockedLayout([1, 8], [32 // width, width], [4, 1], [1, 0]))


class Rings(NamedTuple):
    """Shared memory of a program: rows, records and their barriers.

    ``own_empty``: the ring of ``k_empty`` or ``v_empty`` that tells, with a tile's last block, that own rows are done with.
    """

    own: Any
    other: Any
    k: Any
    v: Any
    records: Any
    own_full: Any
    own_empty: Any
    k_full: Any
    k_empty: Any
    v_full: Any
    v_empty: Any
    records_full: Any
    records_empty: Any
    turns: Any


class Sources(NamedTuple):
    """Descriptors of what the producer copies: own rows, and per branch what these meet."""

    own: Any
    other: Any
    k: Any
    v: Any


class Results(NamedTuple):
    """Where a consumer of queries writes (out and lse), or writes and reads (dq and stats).

    ``rows``: the descriptor of the rows; ``staged``: shared memory that they leave from. Of dq and of dense queries there
    is neither.
    """

    rows: Any
    staged: Any
    staged_full: Any
    staged_empty: Any
    rows_ptr: Any
    numbers_ptr: Any
    stride_b: Any
    stride_h: Any
    stride_l: Any
    scale: Any
    heads: Any
    length: Any
    own_rate: Any


class KeyGradients(NamedTuple):
    """Where the gradients of keys and values go, and what their own rows are."""

    dk_ptr: Any
    dv_ptr: Any
    stride_dkb: Any
    stride_dkh: Any
    stride_dkl: Any
    stride_dvb: Any
    stride_dvh: Any
    stride_dvl: Any
    scale: Any
    own_rate: Any


@gluon.jit
def _walk(branch, x_first, x_last, tokens, kv_head, tile_base, work, V: gl.constexpr):
    """Return the progression that a tile walks through in a branch, and its blocks."""
    window = _pick(work.windows, branch, V.num_branches)
    previous_window = _pick(work.previous_windows, branch, V.num_branches)
    rate = _pick(work.rates, branch, V.num_branches)
    if V.dilate:
        base = tile_base
    elif V.from_key:
        base = 0
        rate = 1
    else:
        base = _offset(kv_head, rate, V.num_kv_heads, V.blocked)
    start_first, end_first = _band(
        x_first, window, previous_window, tokens, V.from_key, V.side, V.sliding, V.disjoint
    )  # fmt: skip
    start_last, end_last = _band(
        x_last, window, previous_window, tokens, V.from_key, V.side, V.sliding, V.disjoint
    )  # fmt: skip
    first, stop, blocks, head, tail = _block_range(
        start_first, start_last, end_first, end_last, base, rate, V.block_n
    )  # fmt: skip
    return window, previous_window, rate, base, first, stop, blocks, head, tail


@gluon.jit
def _write_record(
    rings, written, head, batch, start, x_first, goes_on, count, tokens,
    base, rate, first, stop, blocks, head_edge, tail_edge, window, previous_window,
):  # fmt: skip
    field = gl.arange(0, FIELDS, layout=gl.BlockedLayout([1], [32], [1], [0]))
    record = gl.where(field == HEAD, head, 0)
    record = gl.where(field == BATCH, batch, record)
    record = gl.where(field == START, start, record)
    record = gl.where(field == X_FIRST, x_first, record)
    record = gl.where(field == GOES_ON, goes_on, record)
    record = gl.where(field == COUNT, count, record)
    record = gl.where(field == TOKENS, tokens, record)
    record = gl.where(field == BASE, base, record)
    record = gl.where(field == RATE, rate, record)
    record = gl.where(field == FIRST, first, record)
    record = gl.where(field == STOP, stop, record)
    record = gl.where(field == BLOCKS, blocks, record)
    record = gl.where(field == HEAD_EDGE, head_edge, record)
    record = gl.where(field == TAIL_EDGE, tail_edge, record)
    record = gl.where(field == WINDOW, window, record)
    record = gl.where(field == PREVIOUS_WINDOW, previous_window, record)
    _hand_out(rings, written, record)


@gluon.jit
def _hand_out(rings, written, record):
    """Give a record to those who read records: ``records`` has two places."""
    place = written % 2
    mbarrier.wait(rings.records_empty.index(place), ((written // 2) & 1) ^ 1)
    rings.records.index(place).store(record)
    mbarrier.arrive(rings.records_full.index(place), count=1)


@gluon.jit
def _look_up(rings, seen, WARPS: gl.constexpr = 4):
    """Read a record and leave it in its place."""
    place = seen % 2
    mbarrier.wait(rings.records_full.index(place), (seen // 2) & 1)
    return rings.records.index(place).load(gl.BlockedLayout([rings.records.shape[1]], [32], [WARPS], [0]))


@gluon.jit
def _read_record(rings, seen, WARPS: gl.constexpr = 4):
    record = _look_up(rings, seen, WARPS)
    mbarrier.arrive(rings.records_empty.index(seen % 2), count=1)
    return record


@gluon.jit
def _field(record, which: gl.constexpr):
    # Every thread holds the whole record: this is a choice of register.
    field = gl.arange(0, record.shape[0], layout=record.type.layout)
    return gl.sum(gl.where(field == which, record, 0), 0)


@gluon.jit
def _branch_of(record):
    return (
        _field(record, BASE), _field(record, RATE), _field(record, FIRST), _field(record, STOP),
        _field(record, BLOCKS), _field(record, HEAD_EDGE), _field(record, TAIL_EDGE),
        _field(record, WINDOW), _field(record, PREVIOUS_WINDOW),
    )  # fmt: skip


@gluon.jit
def _copy(descriptor, batch, head, residue, term, barrier, destination, COUNT_ROWS: gl.constexpr, V: gl.constexpr):
    # The descriptor sees a tensor as [B, heads, residue, term, D], where row = rate * term + residue.
    tma.async_copy_global_to_shared(
        descriptor, [batch, head, residue, term, 0], barrier,
        destination._reinterpret(descriptor.dtype, [1, 1, 1, COUNT_ROWS, V.head_dim], descriptor.layout),
    )  # fmt: skip


@gluon.jit
def _copy_own(sources, rings, before, batch, head, first_row, rate, V: gl.constexpr):
    # ``before``: blocks that have been fetched for the tiles before.
    last = gl.maximum(before - 1, 0)
    mbarrier.wait(rings.own_empty.index(_place(last, V.stages)), gl.where(before > 0, _lap(last, V.stages), 1))
    mbarrier.expect(rings.own_full, V.own_tensors * V.block_m * V.head_dim * 2)
    residue = first_row % rate
    term = first_row // rate
    for consumer in gl.static_range(V.consumers):
        place = term + consumer * V.rows
        _copy(sources.own, batch, head, residue, place, rings.own_full, rings.own.index(consumer), V.rows, V)
        if V.own_tensors == 2:
            _copy(sources.other, batch, head, residue, place, rings.own_full, rings.other.index(consumer), V.rows, V)


@gluon.jit
def _produce(sources, rings, work, V: gl.constexpr):
    """Fetch every tile's own rows and, in the order in which consumers visit them, the blocks that they meet."""
    # Own rows are asked for as soon as their place is free: what comes before has a place already.
    AHEAD: gl.constexpr = V.stages - 3 if V.stages > 3 else 0
    INNER: gl.constexpr = V.group if V.from_key else 1
    fetched = 0
    written = 0
    index = gl.program_id(0)  # the others are drawn
    while index < work.tiles:
        head, kv_head, batch, start, tokens, tile_base, x_first, x_last, count = _locate(index, work, V)
        if V.from_key and not V.first:  # what meets nothing adds nothing
            _, _, _, _, _, _, blocks, _, _ = _walk(0, x_first, x_last, tokens, kv_head, tile_base, work, V)
            count = gl.where(blocks > 0, count, 0)
        if count > 0:
            if V.counted and not V.first:  # own rows are what the launches before have left
                counter, expected = _stretch_of(batch, head, start + x_first, work)
                _await_count(work.finished_ptr + counter, expected)
                _fence_global()
            own_rate = work.rates[0] if V.dilate or V.from_key else 1
            before = fetched
            upcoming = 0
            asked = False
            blocks_of_tile = 0
            for inner in range(INNER):
                head_met = kv_head * V.group + inner if V.from_key else kv_head
                for branch in gl.static_range(V.num_branches):
                    window, previous_window, rate, base, first, stop, blocks, head_edge, tail_edge = _walk(
                        branch, x_first, x_last, tokens, kv_head, tile_base, work, V
                    )
                    if inner == 0:
                        _write_record(
                            rings, written, head, batch, start, x_first, 1, count, tokens,
                            base, rate, first, stop, blocks, head_edge, tail_edge, window, previous_window,
                        )  # fmt: skip
                        written += 1
                    residue = (start + base) % rate
                    term = (start + base) // rate + first
                    heads, tails = 0, 0
                    if V.from_key:
                        heads, tails = _lone_blocks(
                            x_first, count, own_rate, tokens, window, previous_window, base, rate, first, stop,
                            blocks, V,
                        )  # fmt: skip
                    for n in range(blocks):
                        if V.from_key:
                            block = _in_pairs(n, first, blocks, head_edge, tail_edge, heads, tails, V.block_n)
                        else:
                            block = _in_order(n, blocks, head_edge, tail_edge)
                        row = term + block * V.block_n
                        stage = _place(fetched, V.stages)
                        phase = _lap(fetched, V.stages) ^ 1
                        mbarrier.wait(rings.k_empty.index(stage), phase)
                        mbarrier.expect(rings.k_full.index(stage), V.block_n * V.head_dim * 2)
                        _copy(
                            sources.k[branch], batch, head_met, residue, row, rings.k_full.index(stage),
                            rings.k.index(stage), V.block_n, V,
                        )  # fmt: skip
                        if blocks_of_tile == AHEAD:
                            _copy_own(sources, rings, before, batch, head, start + x_first, own_rate, V)
                        blocks_of_tile += 1
                        mbarrier.wait(rings.v_empty.index(stage), phase)
                        mbarrier.expect(rings.v_full.index(stage), V.block_n * V.head_dim * 2)
                        _copy(
                            sources.v[branch], batch, head_met, residue, row, rings.v_full.index(stage),
                            rings.v.index(stage), V.block_n, V,
                        )  # fmt: skip
                        fetched += 1
                        if (branch == V.num_branches - 1) & (inner == INNER - 1) & (n == blocks - 2):
                            upcoming = _start_drawing(work.drawn_ptr)
                            asked = True
                    # Not later than here: having met a block, consumers take no further record without their own rows.
                    if (blocks_of_tile > 0) & (blocks_of_tile <= AHEAD):
                        _copy_own(sources, rings, before, batch, head, start + x_first, own_rate, V)
                        blocks_of_tile = AHEAD + 1
            if not asked:
                upcoming = _start_drawing(work.drawn_ptr)
        elif V.from_key:  # it counts, and may not be taken for one of the launches before
            finished_ptr = work.finished_ptr + batch * work.heads + head
            _await_count(finished_ptr, work.before)
            _count(finished_ptr, V.consumers)
            upcoming = _start_drawing(work.drawn_ptr)
        else:
            upcoming = _start_drawing(work.drawn_ptr)
        index = gl.num_programs(0) + _drawn(upcoming)
    _write_record(rings, written, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 1, 0)


@gluon.jit
def _place(n, size: gl.constexpr):
    """Return where in a ring the n-th thing lies. Signed remainders take some instructions more."""
    return (gl.to_tensor(n).to(gl.uint32) % size).to(gl.int32)


@gluon.jit
def _lap(n, size: gl.constexpr):
    """Return the parity of a ring's laps that are over before the n-th thing."""
    return ((gl.to_tensor(n).to(gl.uint32) // size) & 1).to(gl.int32)


@gluon.jit
def _await_turn(rings, done, consumer: gl.constexpr, V: gl.constexpr):
    """Wait until the consumer before has issued its products of this block; the first: those of the block before.

    Out of step, one consumer's softmax runs beside another's products; in step, the tensor cores wait for all of them.
    """
    if V.turns:
        mbarrier.wait(rings.turns.index(consumer), (done & 1) ^ (consumer == 0))


@gluon.jit
def _end_turn(rings, consumer: gl.constexpr, V: gl.constexpr):
    if V.turns:
        mbarrier.arrive(rings.turns.index((consumer + 1) % V.consumers), count=1)


@gluon.jit
def _either(a, b):
    return a | b


@gluon.jit
def _settle(x):
    """Have ptxas reckon all of ``[ROWS, n]``, none of it negative, before what comes next.

    Otherwise it waits for products that are on their way as early as it can, and has the rest to do when they are done.
    It moves nothing past a place where a thread might end: here with minus nan of all ones, which no arithmetic yields.
    """
    # Of each row, the third index tells four threads apart.
    words = gl.reshape(x.to(gl.int32, bitcast=True), [x.shape[0], x.shape[1] // 8, 4, 2])
    gl.inline_asm_elementwise(
        "{ .reg .pred ends; setp.eq.b32 ends, $1, 0xffffffff; @ends exit; mov.b32 $0, 0; }", "=r,r",
        [gl.reduce(gl.reduce(words, 3, _either), 1, _either)], dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def _pack(x, dtype: gl.constexpr):
    """Round ``[rows, 2 n]`` to words of two neighbours. Halves that a loop carries cost two instructions more a pair."""
    low, high = gl.split(gl.reshape(x, [x.shape[0], x.shape[1] // 2, 2]))
    if dtype == gl.bfloat16:
        assembly: gl.constexpr = "cvt.rn.bf16x2.f32 $0, $2, $1;"
    else:
        assembly: gl.constexpr = "cvt.rn.f16x2.f32 $0, $2, $1;"
    return gl.inline_asm_elementwise(assembly, "=r,r,r", [low, high], dtype=gl.int32, is_pure=True, pack=1)


@gluon.jit
def _unpack(words, dtype: gl.constexpr, layout: gl.constexpr):
    """Undo ``_pack``, as the left side of a product."""
    halves = gl.join(words.to(gl.int16), (words >> 16).to(gl.int16))
    return gl.convert_layout(gl.reshape(halves, [words.shape[0], 2 * words.shape[1]]).to(dtype, bitcast=True), layout)


@gluon.jit
def _terms_met(x, window, previous_window, tokens, base, rate, stop, V: gl.constexpr):
    """Return the terms ``[first, stop)`` that each row meets, of those below ``stop``."""
    start, end = _band(x, window, previous_window, tokens, V.from_key, V.side, V.sliding, V.disjoint)
    return _count_before(start, base, rate), gl.minimum(_count_before(end, base, rate), stop)


@gluon.jit
def _met(first, row_first, row_stop, V: gl.constexpr, s_layout: gl.constexpr):
    """Say which terms of the block that begins with ``first`` each row meets: ``[rows, block_n]``."""
    column = gl.expand_dims(gl.arange(0, V.block_n, layout=gl.SliceLayout(0, s_layout)), 0)
    if V.starts_together:
        return column < gl.expand_dims(row_stop - first, 1)
    return (column >= gl.expand_dims(row_first - first, 1)) & (column < gl.expand_dims(row_stop - first, 1))


@gluon.jit
def _store_rows(x, ptr, start, x_first, rate, count, stride, consumer: gl.constexpr, ADD: gl.constexpr,
                V: gl.constexpr, layout: gl.constexpr):  # fmt: skip
    """Write a consumer's ``[ROWS, D]`` rows where they lie; ADD: float32 ones, to what stands there.

    ``layout``: of the threads that write; ``V.whole_rows``, or that of x to save the exchange between them.
    """
    index = consumer * V.rows + gl.arange(0, V.rows, layout=gl.SliceLayout(1, layout))
    rows = start + x_first + rate * index.to(gl.int64)
    columns = gl.arange(0, V.head_dim, layout=gl.SliceLayout(0, layout))
    pointers = ptr + (gl.expand_dims(rows * stride, 1) + gl.expand_dims(columns, 0))
    mask = gl.expand_dims(index < count, 1) & gl.expand_dims(columns < V.columns, 0)
    if ADD:
        x = gl.convert_layout(x, layout) + gl.load(pointers, mask=mask, other=0.0).to(gl.float32)
        x = x.to(ptr.dtype.element_ty)
    else:
        x = gl.convert_layout(x.to(ptr.dtype.element_ty), layout)
    gl.store(pointers, x, mask=mask)


@gluon.jit
def _store_key_rows(dk, dv, gradients, head, batch, start, x_first, count, consumer: gl.constexpr, V: gl.constexpr,
                    layout: gl.constexpr):  # fmt: skip
    """Write a consumer's rows of dk and dv where they lie; unless the launch is the first, add them."""
    batch, head, rate = batch.to(gl.int64), head.to(gl.int64), gradients.own_rate
    dk_ptr = gradients.dk_ptr + batch * gradients.stride_dkb + head * gradients.stride_dkh
    dv_ptr = gradients.dv_ptr + batch * gradients.stride_dvb + head * gradients.stride_dvh
    _store_rows(dk, dk_ptr, start, x_first, rate, count, gradients.stride_dkl, consumer, not V.first, V, layout)
    _store_rows(dv, dv_ptr, start, x_first, rate, count, gradients.stride_dvl, consumer, not V.first, V, layout)


@gluon.jit
def _barriers(SIZE: gl.constexpr, ARRIVALS: gl.constexpr):
    barriers = gl.allocate_shared_memory(gl.int64, [SIZE, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(SIZE):
        mbarrier.init(barriers.index(i), count=ARRIVALS)
    return barriers


@gluon.jit
def _allocate(dtype: gl.constexpr, KEEPS_K: gl.constexpr, READERS: gl.constexpr, V: gl.constexpr):
    """Make the rings. KEEPS_K: of a block, consumers need k after their own rows; else v. READERS: of records."""
    own_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([V.rows, V.head_dim], dtype)
    block_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([V.block_n, V.head_dim], dtype)
    own = gl.allocate_shared_memory(dtype, [V.consumers, V.rows, V.head_dim], own_layout)
    other = own
    if V.own_tensors == 2:
        other = gl.allocate_shared_memory(dtype, [V.consumers, V.rows, V.head_dim], own_layout)
    k = gl.allocate_shared_memory(dtype, [V.stages, V.block_n, V.head_dim], block_layout)
    v = gl.allocate_shared_memory(dtype, [V.stages, V.block_n, V.head_dim], block_layout)
    records = gl.allocate_shared_memory(gl.int32, [2, FIELDS], gl.SwizzledSharedLayout(1, 1, 1, order=[0]))
    turns = records
    if V.turns:
        turns = _barriers(V.consumers, 1)
    k_empty = _barriers(V.stages, V.consumers)
    v_empty = _barriers(V.stages, V.consumers)
    return Rings(
        own, other, k, v, records, _barriers(1, 1).index(0), v_empty if KEEPS_K else k_empty,
        _barriers(V.stages, 1), k_empty, _barriers(V.stages, 1), v_empty,
        _barriers(2, 1), _barriers(2, READERS), turns,
    )  # fmt: skip
