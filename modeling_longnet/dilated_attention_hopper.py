"""The fused backend's own path on Hopper: plans launches of the Gluon kernels for the calls that they serve.

``dilated_attention_triton`` asks ``hopper_refusal`` for each kernel and takes its portable one where there is a
refusal; both compute the same. Everything the copy engine fetches must be describable: rows in whole rounds of every
rate, 16-byte aligned.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch

from .attention_operator import Call
from .compiled_kernels import Pointer, Rows
from .cuda_devices import MAX_BATCH, cuda_capability, num_processors
from .dilated_attention_launches import ENDLESS, Launch, sides_met
from .dilation_pattern import DilationPattern
from .launch_plans import KernelLaunch, TensorLayout


try:
    import triton
    from triton.experimental.gluon.language import NVMMASharedLayout, bfloat16, float16
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    from .dilated_attention_hopper_bwd_kernels import hopper_bwd_dkdv_kernel, hopper_bwd_dq_kernel
    from .dilated_attention_hopper_fwd_kernels import hopper_fwd_kernel
    from .dilated_attention_hopper_ordered_kernels import hopper_bwd_kernel
    from .dilated_attention_hopper_pipeline_kernels import Variant
    from .dilated_attention_kernels import scale_kernel
except ImportError:  # hopper_refusal says so before anything here is needed
    triton = None


# Gluon is experimental: its interface may change with every release. These are the releases that the tests ran with.
TESTED_RELEASES = ((3, 6),)
MAX_BRANCHES = 10  # that one launch takes: the kernels name their descriptors one by one
HEAD_DIMS = (64, 80, 96, 112, 128)
TILE = 128
FEW_ROUNDS = 16  # of tiles to each program: below, the longest at the very end would be waited for
MOST_SUMS = 2**28  # bytes of float32 rows that are never cut
MOST_SHARED = 36 * 2**20  # bytes of L2's 50 MiB: with more, rows of dq leave it between two tiles


class HopperTiles(NamedTuple):
    """Rows that a program owns and rows of a block, depth of the rings, registers of consumers and producer.

    ``turns``: consumers issue their products in turns. ``consumers`` share a program's rows, ``programs`` a processor.
    ``holds_own``: consumers keep their own rows in registers. Against blocks of 64 rows, reading both sides of a product
    takes all that shared memory can give.
    """

    block_m: int
    block_n: int
    stages: int
    registers: tuple[int, int]
    turns: bool = False
    consumers: int = 2
    programs: int = 1
    holds_own: bool = False


class Scratch(NamedTuple):
    """Sizes of what a call needs beside its results, in elements.

    ``sums``: float32, ``[heads, L, D]``; ``cleared``: they must be zero before. ``marks``, ``tallies``: int32, zero.
    """

    sums: int
    marks: int
    tallies: int
    cleared: bool


def _tiles(kernel: str, head_dim: int, dilate: bool) -> HopperTiles:
    """Choose how to cut a kernel: the fastest of ``benchmarks/tune_hopper.py`` on an H200 and an H100.

    The backward in one kernel is not tuned yet. Two programs on a processor were compared on an H100 with what was before
    them, alone; keys and values in registers, and a third consumer with 128 columns, on an H200.
    """
    # Dense queries loop long enough for a third consumer to pay. Of dilated ones, tiles are short.
    if _held(head_dim) == 128:
        dense = HopperTiles(192, 64, 4, (160, 32), consumers=3)
        return {
            "fwd": HopperTiles(128, 128, 2, (240, 24)) if dilate else dense,
            "dq": HopperTiles(128, 64, 3, (224, 56)),
            "dkdv": HopperTiles(128, 64, 3, (240, 24)),
            "bwd": HopperTiles(128, 64, 2, (240, 24)),
        }[kernel]
    dense = HopperTiles(192, 64, 4, (160, 32), turns=True, consumers=3)
    return {
        # Two programs on a processor are not at the end of a tile at the same time.
        "fwd": HopperTiles(128, 64, 4, (232, 24), consumers=1, programs=2) if dilate else dense,
        "dq": HopperTiles(128, 128, 3, (240, 24), turns=True) if dilate else dense,
        "dkdv": HopperTiles(128, 64, 4, (232, 40), turns=True, holds_own=True),
        "bwd": HopperTiles(128, 64, 4, (240, 24), turns=True, holds_own=True),
    }[kernel]


def _fewest_tiles(kernel: str, head_dim: int, dilate: bool) -> float:
    """Choose how many tiles per processor make a kernel faster than the portable one, as measured on an H200."""
    if kernel == "bwd":  # below, two kernels are faster
        if dilate:
            return 3
        return 6 if _held(head_dim) == 64 else 12
    # Below, starting and ending take longer than is saved.
    return 1.5 if _held(head_dim) == 128 and not dilate else 2


def gluon_refusal(device: torch.device) -> str | None:
    """Say why no Gluon kernel for Hopper serves a device, None if they do."""
    if triton is None:
        return "this triton has no Gluon for Hopper"
    if device.type != "cuda" or torch.version.hip is not None or cuda_capability(device) != (9, 0):
        return "the device is no Hopper"
    if tuple(map(int, triton.__version__.split(".")[:2])) not in TESTED_RELEASES:
        return f"not tested with triton {triton.__version__}"
    return None


def hopper_refusal(
    kernel: str, tensors: Sequence[TensorLayout], pattern: DilationPattern, padded: bool, is_causal: bool
) -> str | None:
    """Say why a Hopper kernel does not serve a call, None if it does.

    Args:
        kernel: ``"fwd"``, ``"dq"``, ``"dkdv"``, or ``"bwd"`` for the last two in one.
        tensors: all that the copy engine would read, ``[B, heads, L, D]``; the first has the query heads.
        pattern, is_causal: the call's. padded: whether it has a mask.
    """
    query = tensors[0]
    if refusal := gluon_refusal(query.device):
        return refusal
    if query.dtype not in (torch.bfloat16, torch.float16) or query.shape[-1] not in HEAD_DIMS:
        return f"not written for {query.dtype} with head_dim {query.shape[-1]}"
    if padded:
        return "padded rows are no arithmetic progressions"
    if not is_causal and not pattern.count_overlaps:
        return "bidirectional bands have two sides"
    if not pattern.dilate_queries and len(pattern.segment_lengths) > MAX_BRANCHES:
        return f"{len(pattern.segment_lengths)} branches, at most {MAX_BRANCHES} fit one launch"
    batch, num_heads, length, head_dim = query.shape
    if kernel == "bwd" and (refusal := _one_kernel_refusal(query, tensors[1], pattern)):
        return refusal
    if any(w % r for w, r in pattern.branches):
        return "a rate that does not divide its segment length"
    if any(length % r for r in pattern.dilation_rates):
        return f"length {length} is not a multiple of every rate {pattern.dilation_rates}"
    tiles = batch * num_heads * _cdiv(length, TILE)
    if tiles < _fewest_tiles(kernel, head_dim, pattern.dilate_queries) * num_processors(query.device):
        return f"the portable kernel is as fast on {tiles} tiles"
    if not all(x.aligned and all(s > 0 and s * x.dtype.itemsize % 16 == 0 for s in x.strides[:3]) for x in tensors):
        return "rows that are not aligned to 16 bytes"
    return None


def _one_kernel_refusal(query: TensorLayout, key: TensorLayout, pattern: DilationPattern) -> str | None:
    """Say why the backward takes two kernels where Hopper's serve, None if it takes one."""
    if not pattern.count_overlaps and pattern.window == "segment":
        return "tiles that meet nothing would break the chain of those that wait for each other"
    # What the tiles at work read of queries and add to dq: q, do and the float32 rows.
    group, head_dim = query.shape[1] // key.shape[1], _held(query.shape[-1])
    rate = 1 if pattern.dilate_queries else max(pattern.dilation_rates)
    shared = num_processors(query.device) * TILE * rate * group * head_dim * (2 * query.dtype.itemsize + 4)
    return f"tiles at work share {shared} bytes, more than the cache keeps" if shared > MOST_SHARED else None


def hopper_fwd_launches(
    launches: Sequence[Launch], layouts: dict[str, TensorLayout], num_documents: int, call: Call
) -> tuple[list[KernelLaunch], Scratch]:
    """Plan the launches of the forward, and what they need beside the results.

    Each goes on from what (out, lse) hold unless it is the first. Where a tile's rows are whole tiles of the launches
    before, it waits for these alone, and launches overlap.
    """
    own, met = ("query", "out"), ("key", "value")
    batch, num_heads, length, head_dim = layouts["query"].shape
    rows = _tiles("fwd", head_dim, call.pattern.dilate_queries).block_m
    stretch = 0 if num_documents else _stretch(launches, rows)
    counted = stretch > 0
    stretches = _cdiv(length, stretch) if counted else 1
    last = length - (stretches - 1) * stretch
    planned, before, before_in_last = [], 0, 0
    for number, launch in enumerate(launches):
        planned.append(
            _plan_launch(
                "fwd", launch, ("out", "lse", "tallies"), ("out",), own, met, layouts, num_documents, call,
                (number, len(launches), before, stretch, stretches, before_in_last), before > 0, counted,
            )
        )  # fmt: skip
        if counted:
            before += stretch // (rows * launch.rate)
            before_in_last += _cdiv(last, rows * launch.rate)
    return planned, Scratch(0, 0, len(launches) + counted * batch * num_heads * stretches, False)


def _stretch(launches: Sequence[Launch], rows: int) -> int:
    """Return a number of rows such that all launches' tiles of ``rows`` lie in whole stretches of it, 0 if none does.

    It is 0, too, if there is but one launch: nothing waits for its tiles.
    """
    spans = [rows * launch.rate for launch in launches]
    longest = max(spans)
    aligned = all(
        longest % span == 0 and (launch.period == ENDLESS or launch.period % span == 0)
        for launch, span in zip(launches, spans)
    )
    return longest if aligned and len(launches) > 1 else 0


def hopper_dq_launches(
    launches: Sequence[Launch], layouts: dict[str, TensorLayout], num_documents: int, call: Call, taken: int = 0,
    overlaps: bool = False,
) -> list[KernelLaunch]:  # fmt: skip
    """Plan the launches of the gradient of the queries; those that are not first add to dq.

    Args:
        taken: counters that launches before them need.
        overlaps: whether the first may begin before the launch before has ended, which then is one of
            ``hopper_dkdv_launches``.
    """
    own, met = ("query", "do"), ("key", "value")
    return [
        _plan_launch(
            "dq", launch, ("dq", "stats", "tallies"), ("dq",), own, met, layouts, num_documents, call,
            (taken + number,), overlaps=overlaps and number == 0,
        )
        for number, launch in enumerate(launches)
    ]  # fmt: skip


def hopper_dkdv_launches(
    launches: Sequence[Launch], layouts: dict[str, TensorLayout], num_documents: int, call: Call, taken: int = 0
) -> tuple[list[KernelLaunch], int]:
    """Plan the launches of the gradients of keys and values; also return how many counters they need.

    They overlap: each adds to what those before have left, KV head by KV head.

    Args:
        taken: counters that launches before them need.
    """
    own, met = ("key", "value"), ("query", "do")
    pointers = ("dk", "dv", "stats", "tallies")
    batch, num_kv_heads, length, head_dim = layouts["key"].shape
    tiles = _tiles("dkdv", head_dim, call.pattern.dilate_queries)
    planned, before = [], 0
    for number, launch in enumerate(launches):
        order = (taken + number, taken + len(launches), before)
        planned.append(
            _plan_launch(
                "dkdv", launch, pointers, ("dk", "dv"), own, met, layouts, num_documents, call, order, number > 0
            )
        )
        _, classes, periods = _cut(launch, tiles, length, num_documents)
        before += classes * periods * tiles.consumers
    return planned, len(launches) + batch * num_kv_heads


def hopper_bwd_launches(
    branches: Sequence[Launch], layouts: dict[str, TensorLayout], num_documents: int, call: Call
) -> tuple[list[KernelLaunch], Scratch]:
    """Plan the launches of some branches' gradients, and what they need beside the results; dq is written in any case.

    The float32 rows in which dq is added up are kept within an eighth of the call's tensors: as many KV heads at a
    time as fit, and no more query heads than a dimension of the grid that scales them.
    """
    batch, num_heads, length, head_dim = layouts["query"].shape
    num_kv_heads = layouts["key"].shape[1]
    group = num_heads // num_kv_heads
    lanes = batch * num_kv_heads
    tensors = 4 * (num_heads + num_kv_heads) * batch * length * head_dim * layouts["query"].dtype.itemsize
    at_once = max(1, min(lanes, max(MOST_SUMS, tensors // 8) // (4 * group * length * head_dim), MAX_BATCH // group))
    at_once = _cdiv(lanes, _cdiv(lanes, at_once))
    # The first branch's first tile of each block writes; what no whole block covers has to be zero before.
    stores = branches[0].first and num_documents == 0 and branches[0].windows[0] % TILE == 0
    chunks = [range(first, min(first + at_once, lanes)) for first in range(0, lanes, at_once)]
    counters = len(chunks) * len(branches)
    launches: list[KernelLaunch] = []
    number, mark = 0, 1
    for chunk in chunks:
        before = 0
        for launch in branches:
            planned, classes = _plan_bwd_launch(
                launch, layouts, num_documents, call, chunk, stores and launch.first, number,
                counters + chunk.start, mark, before,
            )  # fmt: skip
            launches.append(planned)
            number, mark, before = number + 1, mark + classes, before + classes
        dq = layouts["dq"]
        arguments = (
            Pointer("sums"), Pointer("dq"), *dq.strides[:3], call.scale, length, chunk.start * group, num_heads
        )  # fmt: skip
        constants = {
            "CLEARS": not stores and chunk is not chunks[-1], "HEAD_DIM": head_dim, "BLOCK_D": _held(head_dim),
            "BLOCK_M": 64,
        }  # fmt: skip
        grid = (_cdiv(length, 64), len(chunk) * group, 1)
        launches.append(KernelLaunch(scale_kernel, grid, arguments, constants, num_warps=4))
    rows = at_once * group * length
    return launches, Scratch(rows * head_dim, rows, counters + lanes, not stores)


def _plan_bwd_launch(
    launch: Launch, layouts: dict[str, TensorLayout], num_documents: int, call: Call, lanes: range, stores: bool,
    number: int, counter: int, first_mark: int, before: int,
) -> tuple[KernelLaunch, int]:  # fmt: skip
    """Plan what one branch adds to the gradients of some lanes; also return how many tiles each lane has.

    Args:
        stores: whether the first tile of each block writes dq instead of adding to it.
        number: of launches before this one.
        counter: the place of the first lane's counter.
        first_mark: the mark of a lane's first tile.
        before: tiles that a lane has in the branches before.
    """
    pattern = call.pattern
    _, num_heads, length, head_dim = layouts["query"].shape
    num_kv_heads = layouts["key"].shape[1]
    group = num_heads // num_kv_heads
    tiles = _tiles("bwd", head_dim, pattern.dilate_queries)
    tiles_per_period, classes, periods = _cut(launch, tiles, length, num_documents)
    runs = periods * len(lanes)
    variant = _variant_of(launch, tiles, layouts, num_documents, call, from_key=True, own_tensors=2, stores=stores)
    arguments = (
        *map(Pointer, ("dk", "dv", "stats", "marks", "tallies")),
        *(_rows(name, layouts[name], launch.rate, 64) for name in ("key", "value")),
        *(_rows(name, layouts[name], launch.loop_rate, tiles.block_n) for name in ("query", "do")),
        _sums(len(lanes) * group, length, head_dim, launch.loop_rate),
        *(_rows(name, layouts[name], launch.rate, 64) for name in ("dk", "dv")),
        Pointer("cu_seqlens") if num_documents else None, *_strides(("dk", "dv"), layouts), call.scale, length,
        num_documents, num_documents.bit_length(), launch.period, tiles_per_period, launch.windows,
        launch.previous_windows, launch.rates, num_kv_heads, lanes.start, classes, periods, runs, runs * classes,
        number, counter, first_mark, before,
    )  # fmt: skip
    grid = (min(num_processors(layouts["query"].device), runs * classes), 1, 1)
    # Launches of the same lanes overlap: each waits for the one before lane by lane.
    options = {"launch_pdl": True} if before > 0 else {}
    planned = KernelLaunch(hopper_bwd_kernel, grid, arguments, {"V": variant}, num_warps=4, **options)
    return planned, classes * periods


def _plan_launch(
    kernel: str, launch: Launch, pointers: Sequence[str], strided: Sequence[str], own: Sequence[str],
    met: Sequence[str], layouts: dict[str, TensorLayout], num_documents: int, call: Call, order: Sequence[int],
    overlaps: bool, counted: bool = False,
) -> KernelLaunch:  # fmt: skip
    """Plan a kernel's launch over all tiles of a progression: as many programs as processors can hold at once.

    Args:
        pointers: the kernel's leading arguments.
        strided: the ``[B, heads, L, D]`` tensors whose strides it takes, in its order.
        own: tensors of which a tile owns rows.
        met: the pair of tensors whose rows it meets.
        num_documents: that are packed; 0 if none are.
        order: the kernel's last arguments, of its place among others.
        overlaps: whether it may begin before the launch before has ended.
        counted: whether its tiles of queries are counted.
    """
    pattern = call.pattern
    from_key = kernel == "dkdv"
    batch, num_heads, length, head_dim = layouts["query"].shape
    num_kv_heads = layouts["key"].shape[1]
    heads = num_kv_heads if from_key else num_heads
    tiles = _tiles(kernel, head_dim, pattern.dilate_queries)
    tiles_per_period, classes, periods = _cut(launch, tiles, length, num_documents)
    programs = tiles.programs * num_processors(layouts["query"].device)
    runs = periods * heads * batch
    together = _together(runs, classes, programs)
    own_tensors = 1 if kernel == "fwd" and launch.first else 2
    variant = _variant_of(launch, tiles, layouts, num_documents, call, from_key, own_tensors, counted=counted)
    rates = launch.rates if pattern.dilate_queries or not from_key else (1,)
    padding = [None] * (0 if from_key else MAX_BRANCHES - len(rates))
    own_rows = [_rows(name, layouts[name], launch.rate, tiles.block_m // tiles.consumers) for name in own]
    met_rows = [
        x for name in met for x in [*(_rows(name, layouts[name], rate, tiles.block_n) for rate in rates), *padding]
    ]
    arguments = (
        *map(Pointer, pointers), *own_rows, *met_rows, Pointer("cu_seqlens") if num_documents else None,
        *_strides(strided, layouts), call.scale, length, num_documents,
        num_documents.bit_length(), launch.period, tiles_per_period, launch.windows, launch.previous_windows,
        launch.rates, heads, classes, periods, runs, together, runs * classes, *order,
    )  # fmt: skip
    kernels = {"fwd": hopper_fwd_kernel, "dq": hopper_bwd_dq_kernel, "dkdv": hopper_bwd_dkdv_kernel}
    grid = (min(programs, runs * classes), 1, 1)
    options = {"launch_pdl": True} if overlaps else {}
    if tiles.programs > 1:  # Gluon takes all registers for one otherwise
        options["maxnreg"] = 65536 // tiles.programs // 256
    return KernelLaunch(kernels[kernel], grid, arguments, {"V": variant}, num_warps=4, **options)


def _together(runs: int, classes: int, programs: int) -> int:
    """Choose how many runs of tiles are worked off at a time, longest tiles first, before the next.

    As few as occupy all programs, for what these read at a time fits the cache; four times as many where there are not
    many rounds. Measured on an H100: benchmarks/results/compare_checkouts_..._2026-11-27_fewer_heads.txt.
    """
    rounds = 1 if runs * classes >= FEW_ROUNDS * programs else 4
    return _cdiv(runs, max(1, runs * classes // (rounds * programs)))


def _cut(launch: Launch, tiles: HopperTiles, length: int, num_documents: int) -> tuple[int, int, int]:
    """Return the tiles of a period, the classes of a launch's tiles and its periods; packed documents are one period."""
    tiles_per_period = _cdiv(_cdiv(min(launch.period, length), launch.rate), tiles.block_m)
    if num_documents == 0:
        return tiles_per_period, tiles_per_period, _cdiv(length, launch.period)
    whole, rest = divmod(length, launch.period)
    return tiles_per_period, whole * tiles_per_period + rest // (tiles.block_m * launch.rate) + 2 * num_documents, 1


def _strides(names: Sequence[str], layouts: dict[str, TensorLayout]) -> list[int]:
    """List the strides of batch, heads and rows of some tensors."""
    # A single row's batch stride means nothing, but past 2^31 its width would compile the kernel anew.
    return [
        s
        for shape, (stride_b, *others, _) in ((layouts[name].shape, layouts[name].strides) for name in names)
        for s in (stride_b if shape[0] > 1 else 0, *others)
    ]


def _variant_of(
    launch: Launch, tiles: HopperTiles, layouts: dict[str, TensorLayout], num_documents: int, call: Call,
    from_key: bool, own_tensors: int, stores: bool = False, counted: bool = False,
) -> "Variant":  # fmt: skip
    """Choose what a launch's kernel is compiled for."""
    pattern, num_kv_heads = call.pattern, layouts["key"].shape[1]
    return _variant(
        num_branches=len(launch.rates),
        group=layouts["query"].shape[1] // num_kv_heads,
        num_kv_heads=num_kv_heads,
        blocked=pattern.head_offsets == "blocked",
        disjoint=not pattern.count_overlaps,
        dilate=pattern.dilate_queries,
        sliding=pattern.window == "sliding",
        packed=num_documents > 0,
        side=sides_met(pattern, call.is_causal, from_key)[0],
        from_key=from_key,
        first=launch.first,
        own_tensors=own_tensors,
        head_dim=_held(layouts["query"].shape[-1]),
        columns=layouts["query"].shape[-1],
        stores=stores,
        counted=counted,
        starts_together=_starts_together(launch, tiles, pattern) and not from_key and num_documents == 0,
        **{name: x for name, x in tiles._asdict().items() if name != "programs"},
    )


def _starts_together(launch: Launch, tiles: HopperTiles, pattern: DilationPattern) -> bool:
    """Say whether the queries of each tile share one segment, all of which before them they meet."""
    aligned = all(window % (tiles.block_m * launch.rate) == 0 for window in launch.windows)
    return pattern.window == "segment" and pattern.count_overlaps and aligned


@functools.cache
def _variant(**fields) -> "Variant":
    """Return the one variant of these fields: kernels are compiled for it and tell variants apart by identity."""
    return Variant(**fields)


def _held(head_dim: int) -> int:
    """Return the columns of a row in shared memory: what a head lacks, the copy engine fills with zeros."""
    return 64 if head_dim <= 64 else 128


def _layout(rows: int, head_dim: int, dtype: torch.dtype):
    element = bfloat16 if dtype == torch.bfloat16 else float16
    return NVMMASharedLayout.get_default_for([1, 1, 1, rows, head_dim], element)


def _sums(heads: int, length: int, head_dim: int, rate: int) -> Rows:
    """Describe float32 ``[heads, L, D]`` likewise; in parts as each of two consumers adds them."""
    part = (1, 1, 1, 64, _held(head_dim) // 2)
    return Rows(
        "sums", TensorDescriptor, (1, heads, rate, length // rate, head_dim),
        (heads * length * head_dim, length * head_dim, head_dim, rate * head_dim, 1), part,
        (NVMMASharedLayout(64, 32, 5),),
    )  # fmt: skip


def _rows(name: str, x: TensorLayout, rate: int, block: int) -> Rows:
    """Describe ``[B, heads, L, D]`` as ``[B, heads, residue, term, D]``, where row = rate * term + residue."""
    batch, heads, length, head_dim = x.shape
    stride_b, stride_h, stride_l, _ = x.strides
    return Rows(
        name, TensorDescriptor, (batch, heads, rate, length // rate, head_dim),
        (stride_b, stride_h, stride_l, rate * stride_l, 1), (1, 1, 1, block, _held(head_dim)),
        (_layout(block, _held(head_dim), x.dtype),),
    )  # fmt: skip


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)
