"""The fused backend: launches the Triton kernels, on Hopper those of ``dilated_attention_hopper`` where they serve.

The inputs are read where they lie, whatever their strides, padding or packing; nothing of their size is copied. Beside
the results only lse, one word per query for the backward and, for padded rows, one index per token are allocated; on
Hopper also float32 rows in which dq is added up, see ``hopper_bwd_launches``.

Dense queries take one launch over all branches. Dilated queries take one launch per branch, each going on from the (out,
lse) of the one before. The gradients of keys and values take one launch per branch, added up in a fixed order, the
farthest first: two runs give the same bits, and small sums are not rounded to the last place of large ones. On Hopper
one kernel computes all gradients of a branch, where what its tiles share stays in the cache: of dilated queries all
branches', of dense ones the nearest.

What does not depend on where the tensors lie is planned once per kind of call, see ``launch_plans``.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .attention_operator import Call, attention_operator
from .compiled_kernels import Pointer, Rows
from .cuda_devices import MAX_BATCH, cuda_capability
from .dilated_attention_hopper import (
    Scratch,
    hopper_bwd_launches,
    hopper_dkdv_launches,
    hopper_dq_launches,
    hopper_fwd_launches,
    hopper_refusal,
)
from .dilated_attention_launches import (
    Launch,
    far_queries,
    farthest_first,
    key_launches,
    near_branches,
    query_launches,
    sides_met,
)
from .dilation_pattern import DilationPattern
from .launch_plans import KernelLaunch, Plan, TensorLayout, layout_of


try:
    import triton
    from triton.tools.tensor_descriptor import TensorDescriptor

    from .dilated_attention_kernels import bwd_dkdv_kernel, bwd_dq_kernel, fwd_kernel, stats_kernel
except ImportError:  # triton_refusal says so before anything here is needed
    triton = None


MAX_HEAD_DIM = 256
MAX_DILATION_RATE = 2**20  # keeps rate * tile within 32 bits
MAX_PLANS = 1024  # that are kept, of each direction: as many kinds of calls as lengths, batches and layers differ in


class Tiles(NamedTuple):
    """How a kernel is cut: rows it owns or loads as queries (m) and as keys (n), warps, pipeline depth.

    ``tma``: blocks are fetched by Hopper's copy engine where it can read the tensors, which saves address registers.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    tma: bool = False


class Documents(NamedTuple):
    """Where the documents lie: ``cu_seqlens`` if packed, ``rows`` (of each position) and ``counts`` if padded."""

    cu_seqlens: Tensor | None
    rows: Tensor | None
    counts: Tensor | None

    @property
    def packing(self) -> TensorLayout | None:
        """What plans may know of packed documents; None if they are not packed."""
        return None if self.cu_seqlens is None else layout_of(self.cu_seqlens)


class Kind(NamedTuple):
    """All of a call that its plans depend on, beside the tensors. ``packing``: the layout of cu_seqlens, or None."""

    packing: TensorLayout | None
    padded: bool
    call: Call

    @property
    def num_documents(self) -> int:
        """How many documents are packed; 0 if none are."""
        return 0 if self.packing is None else self.packing.shape[0] - 1


def triton_refusal(query: Tensor, key: Tensor, value: Tensor, pattern: DilationPattern, dropout: float) -> str | None:
    """Say why the fused kernels do not support a call, None if they do. Never waits for the device."""
    if pattern.held_heads is not None:
        return "the fused kernels number KV heads from 0, and a rank of tensor parallelism holds other heads"
    return refusal_of_any_heads(query, pattern, dropout)


def refusal_of_any_heads(query: Tensor, pattern: DilationPattern, dropout: float) -> str | None:
    """Say why no fused kernel supports a call, whatever heads it holds; None if some do."""
    if triton is None:
        return "triton is not installed"
    if not query.is_cuda:
        return f"the fused kernels need a CUDA device, the inputs are on {query.device}"
    if torch.version.hip is not None:
        return "the fused kernels are written and tested for NVIDIA, this PyTorch is built for AMD (ROCm)"
    if query.dtype == torch.float64:
        return "the fused kernels have no float64; use float32, bfloat16 or float16"
    if dropout > 0:
        return f"the fused kernels have no dropout, got dropout={dropout}"
    if query.shape[-1] > MAX_HEAD_DIM:
        return f"the fused kernels support head_dim up to {MAX_HEAD_DIM}, got {query.shape[-1]}"
    if max(pattern.dilation_rates) > MAX_DILATION_RATE:
        return f"the fused kernels support dilation rates up to {MAX_DILATION_RATE}, got {max(pattern.dilation_rates)}"
    if query.shape[0] > MAX_BATCH:
        return f"the fused kernels take up to {MAX_BATCH} rows at once, got {query.shape[0]}"
    if cuda_capability(query.device) < (8, 0):
        return f"the fused kernels need compute capability 8.0, {query.device} is older"
    return None


def triton_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: DilationPattern,
    *,
    is_causal: bool,
    attention_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Compute dilated attention in fused kernels.

    Args:
        query: ``[B, H, L, D]``.
        key, value: ``[B, G, L, D]``.
        pattern: the branches and their rules.
        attention_mask: ``[B, L]`` bool, None if all tokens are real.
        cu_seqlens: ``[n + 1]`` integer for packed documents in one row, or None.
        is_causal: whether queries see only the past.
        scale: positive factor on the scores.

    Returns:
        ``(out [B, H, L, D], lse [B, H, L])``, both differentiable once; lse is float32, natural log.
    """
    return _attention(query, key, value, attention_mask, cu_seqlens, Call(pattern, is_causal, scale))


def _locate_documents(attention_mask: Tensor | None, cu_seqlens: Tensor | None, device: torch.device) -> Documents:
    """Describe the documents in tensors without gaps, as the kernels read them."""
    if cu_seqlens is not None:
        return Documents(cu_seqlens.to(device, torch.int32).contiguous(), None, None)
    if attention_mask is not None:
        # Stable: real tokens first, in their order. Padding follows and is never looked at.
        rows = attention_mask.logical_not().to(torch.uint8).contiguous().argsort(dim=-1, stable=True)
        return Documents(None, rows.int(), attention_mask.sum(-1, dtype=torch.int32))
    return Documents(None, None, None)


def kernel_tiles(kernel: str, query: TensorLayout, pattern: DilationPattern) -> Tiles:
    """Choose how to cut ``"fwd"``, ``"dq"`` or ``"dkdv"``; tuned on an H200, the rest fits the shared memory of Ampere and Ada."""
    head_dim, dense = query.shape[-1], not pattern.dilate_queries
    if query.dtype == torch.float32:
        return Tiles(16, 16, 4, 1) if head_dim > 128 else Tiles(32, 32, 4, 1)
    if query.device.type != "cuda" or cuda_capability(query.device) < (9, 0):
        if head_dim > 128:
            return {"fwd": Tiles(64, 32, 4, 1), "dq": Tiles(32, 32, 4, 1), "dkdv": Tiles(32, 32, 4, 1)}[kernel]
        if head_dim > 64:
            return {"fwd": Tiles(64, 32, 4, 2), "dq": Tiles(64, 32, 4, 1), "dkdv": Tiles(32, 64, 4, 1)}[kernel]
        return {"fwd": Tiles(64, 64, 4, 2), "dq": Tiles(64, 32, 4, 2), "dkdv": Tiles(32, 64, 4, 2)}[kernel]
    if head_dim > 128:
        return {"fwd": Tiles(64, 32, 4, 2), "dq": Tiles(64, 32, 8, 1), "dkdv": Tiles(32, 64, 8, 1)}[kernel]
    if head_dim > 64:
        # Dense queries loop long enough to live with one program per processor; the short loops of dilated ones
        # need a second program to hide each other's start and end.
        fwd = Tiles(128, 64, 8, 3) if dense else Tiles(64, 64, 4, 3, tma=True)
        dkdv = Tiles(32, 64, 4, 4 if dense else 3, tma=True)
        return {"fwd": fwd, "dq": Tiles(128, 64, 8, 3), "dkdv": dkdv}[kernel]
    fwd = Tiles(64, 64, 4, 3, tma=not dense)
    dkdv = Tiles(64, 64, 4, 3 if dense else 2, tma=True)
    return {"fwd": fwd, "dq": Tiles(64, 64, 4, 3), "dkdv": dkdv}[kernel]


def described_rows(name: str, x: TensorLayout, rate: int, block: int) -> Rows:
    """Describe ``[B, heads, L, D]`` as ``[B, heads, residue, term, D]``, where row = rate * term + residue."""
    batch, heads, length, head_dim = x.shape
    stride_b, stride_h, stride_l, _ = x.strides
    return Rows(
        name, TensorDescriptor, (batch, heads, rate, length // rate, head_dim),
        (stride_b, stride_h, stride_l, rate * stride_l, 1), (1, 1, 1, block, block_d(head_dim)),
    )  # fmt: skip


def describable(looped: Sequence[TensorLayout], rate: int) -> bool:
    """Say whether descriptors fit: rows in whole rounds of ``rate``, everything aligned to 16 bytes."""
    return rate > 0 and all(
        x.shape[2] % rate == 0 and x.aligned and all(s * x.dtype.itemsize % 16 == 0 for s in x.strides[:3])
        for x in looped
    )


def _plan_launch(
    kernel, tiles: Tiles, tile: int, launch: Launch, heads: int, pointers: Sequence[str], strided: Sequence[str],
    looped: Sequence[str], layouts: dict[str, TensorLayout], kind: Kind, **constants,
) -> KernelLaunch:  # fmt: skip
    """Plan a kernel's launch over the tiles of its progression, the heads and the batch.

    Args:
        tile: rows of one tile.
        heads: query heads or KV heads, whichever own the tiles.
        pointers: the kernel's leading arguments.
        strided: the ``[B, heads, L, D]`` tensors whose strides it takes, in its order.
        looped: those of them that its loops walk through.
        constants: compile-time arguments that only this kernel has.
    """
    pattern, is_causal, scale = kind.call[:3]
    batch, num_heads, length, head_dim = layouts["query"].shape
    num_kv_heads = layouts["key"].shape[1]
    sides = sides_met(pattern, is_causal, from_key=kernel is bwd_dkdv_kernel)
    tiles_per_period = _cdiv(_cdiv(min(launch.period, length), launch.rate), tile)
    periods, rest = divmod(length, launch.period)
    packed = kind.packing is not None
    if packed:
        slots = periods * tiles_per_period + rest // (tile * launch.rate) + 2 * kind.num_documents
    else:
        slots = periods * tiles_per_period + _cdiv(_cdiv(rest, launch.rate), tile)
    # A single row's batch stride means nothing, but past 2^31 its width would compile the kernel anew.
    strides = [
        s for name in strided for s in (layouts[name].strides[0] if batch > 1 else 0, *layouts[name].strides[1:3])
    ]
    widest = max(launch.rates) * max(tiles.block_m, tiles.block_n) * max(layouts[name].strides[2] for name in strided)
    tma = tiles.tma and not kind.padded and describable([layouts[name] for name in looped], launch.loop_rate)
    block = tiles.block_m + tiles.block_n - tile
    arguments = (
        *map(Pointer, pointers), *(described_rows(name, layouts[name], launch.loop_rate, block) if tma else None for name in looped),
        Pointer("cu_seqlens") if packed else None, *([Pointer("rows"), Pointer("counts")] if kind.padded else [None, None]),
        *strides, scale, length, kind.num_documents, kind.num_documents.bit_length(),
        launch.period, tiles_per_period, launch.windows, launch.previous_windows, launch.rates,
    )  # fmt: skip
    constants |= {
        "FIRST": launch.first,
        "GROUP": num_heads // num_kv_heads,
        "NUM_KV_HEADS": num_kv_heads,
        "BLOCKED": pattern.head_offsets == "blocked",
        "DISJOINT": not pattern.count_overlaps,
        "DILATE": pattern.dilate_queries,
        "SLIDING": pattern.window == "sliding",
        "SEGMENTED": launch.segmented,
        "SIDE": sides[0],
        "LAST_SIDE": sides[1],
        "PACKED": packed,
        "INDEXED": kind.padded,
        "WIDE": widest >= 2**31,
        "TMA": tma,
        "HEAD_DIM": head_dim,
        "BLOCK_D": block_d(head_dim),
        "BLOCK_M": tiles.block_m,
        "BLOCK_N": tiles.block_n,
        "PRECISION": "ieee" if layouts["query"].dtype == torch.float32 else None,
    }
    options = {"num_warps": tiles.num_warps, "num_stages": tiles.num_stages}
    return KernelLaunch(kernel, (slots, heads, batch), arguments, constants, **options)


def _plan_stats(layouts: dict[str, TensorLayout], dlse: TensorLayout | None) -> KernelLaunch:
    batch, num_heads, length, head_dim = layouts["query"].shape
    block = 64
    arguments = (
        Pointer("out"), Pointer("do"), Pointer("lse"), None if dlse is None else Pointer("dlse"), Pointer("stats"),
        *layouts["out"].strides[:3], *layouts["do"].strides[:3], length,
    )  # fmt: skip
    constants = {"HAS_DLSE": dlse is not None, "HEAD_DIM": head_dim, "BLOCK_D": block_d(head_dim), "BLOCK_M": block}
    return KernelLaunch(stats_kernel, (_cdiv(length, block), num_heads, batch), arguments, constants, num_warps=4)


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def block_d(head_dim: int) -> int:
    """Return the width of a tile: a power of two, wide enough for the tensor cores."""
    return max(16, 1 << (head_dim - 1).bit_length())


def _strides_like(shape: Sequence[int], strides: Sequence[int]) -> tuple[int, ...]:
    """Return the strides of a tensor without gaps: heads inside tokens if they are so in the given, else outside."""
    _, heads, length, head_dim = shape
    if strides[1] < strides[2]:
        return heads * length * head_dim, head_dim, heads * head_dim, 1
    return heads * length * head_dim, length * head_dim, head_dim, 1


def _empty_like(x: Tensor) -> Tensor:
    return x.new_empty_strided(x.shape, _strides_like(x.shape, x.stride()))


def _like(x: TensorLayout) -> TensorLayout:
    """Describe what ``_empty_like`` allocates; allocators align to 16 bytes and more."""
    return x._replace(strides=_strides_like(x.shape, x.strides), aligned=True)


def _rows_contiguous(x: Tensor) -> Tensor:
    return x if x.shape[-1] == 1 or x.stride(-1) == 1 else x.contiguous()


@functools.lru_cache(maxsize=MAX_PLANS)
def _forward_plan(
    query: TensorLayout, key: TensorLayout, value: TensorLayout, kind: Kind
) -> tuple[Plan, Scratch | None]:
    pattern = kind.call.pattern
    layouts = {"query": query, "key": key, "value": value, "out": _like(query)}
    launches = query_launches(pattern)
    if hopper_refusal("fwd", list(layouts.values()), pattern, kind.padded, kind.call.is_causal) is None:
        planned, scratch = hopper_fwd_launches(launches, layouts, kind.num_documents, kind.call)
        return Plan(query.device, tuple(planned)), scratch
    tiles = kernel_tiles("fwd", query, pattern)
    planned = [
        _plan_launch(
            fwd_kernel, tiles, tiles.block_m, launch, query.shape[1], ("query", "key", "value", "out", "lse"),
            ("query", "key", "value", "out"), ("key", "value"), layouts, kind, NUM_BRANCHES=len(launch.rates),
        )
        for launch in launches
    ]  # fmt: skip
    return Plan(query.device, tuple(planned)), None


def _forward(
    query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, cu_seqlens: Tensor | None, call: Call
) -> tuple[Tensor, Tensor]:
    query, key, value = map(_rows_contiguous, (query, key, value))
    out = _empty_like(query)
    lse = query.new_empty(query.shape[:3], dtype=torch.float32)
    if attention_mask is not None or not query_launches(call.pattern)[0].first:
        out.zero_()
        lse.fill_(-torch.inf)
    if out.numel() == 0:
        return out, lse
    documents = _locate_documents(attention_mask, cu_seqlens, query.device)
    kind = Kind(documents.packing, attention_mask is not None, call)
    plan, scratch = _forward_plan(layout_of(query), layout_of(key), layout_of(value), kind)
    plan.run(
        query=query, key=key, value=value, out=out, lse=lse, **_allocate(scratch, query.device),
        **documents._asdict(),
    )  # fmt: skip
    return out, lse


class Backward(NamedTuple):
    """How gradients are computed: launches, what these need beside the results, and the results that they only add to."""

    plan: Plan
    scratch: Scratch | None
    added_to: tuple[str, ...]


@functools.lru_cache(maxsize=MAX_PLANS)
def _backward_plan(
    do: TensorLayout, query: TensorLayout, key: TensorLayout, value: TensorLayout, out: TensorLayout,
    dlse: TensorLayout | None, kind: Kind,
) -> Backward:  # fmt: skip
    pattern = kind.call.pattern
    layouts = {"query": query, "key": key, "value": value, "do": do, "out": out}
    layouts |= {"dq": _like(query), "dk": _like(key), "dv": _like(value)}
    stats = _plan_stats(layouts, dlse)
    near = _near_branches(layouts, kind)
    if near > 0:
        rest = layouts, kind.num_documents
        by_key = key_launches(pattern)
        if not pattern.dilate_queries:  # the first launch of dilated ones writes the sums of dq, too: much is saved
            by_key = farthest_first(by_key)
        far = len(by_key) - near
        near_call = kind.call._replace(pattern=near_branches(pattern, near))
        launches, scratch = hopper_bwd_launches(by_key[far:], *rest, near_call)
        added_to = () if by_key[0].first else ("dk", "dv")
        if far == 0:
            return Backward(Plan(query.device, (stats, *launches)), scratch, added_to)
        by_query = far_queries(pattern, near)
        for_keys, counters = hopper_dkdv_launches(by_key[:far], *rest, kind.call, scratch.tallies)
        for_queries = hopper_dq_launches(by_query, *rest, kind.call, scratch.tallies + counters)
        scratch = scratch._replace(tallies=scratch.tallies + counters + len(by_query))
        return Backward(Plan(query.device, (stats, *for_keys, *launches, *for_queries)), scratch, added_to)
    by_key, by_query = farthest_first(key_launches(pattern)), farthest_first(query_launches(pattern))
    for_keys, counters = _dkdv_launches(by_key, layouts, kind)
    for_queries, drawn = _dq_launches(by_query, layouts, kind, counters)
    scratch = Scratch(0, 0, counters + drawn, False) if counters + drawn else None
    added_to = () if by_key[0].first else ("dk", "dv")
    added_to += () if by_query[0].first else ("dq",)
    return Backward(Plan(query.device, (stats, *for_keys, *for_queries)), scratch, added_to)


def _near_branches(layouts: dict[str, TensorLayout], kind: Kind) -> int:
    """Return how many branches' gradients one kernel on Hopper computes at once; what is left takes two kernels there."""
    pattern, read = kind.call.pattern, [layouts[name] for name in ("query", "key", "value", "do")]

    def served(kernel: str, pattern: DilationPattern) -> bool:
        return hopper_refusal(kernel, read, pattern, kind.padded, kind.call.is_causal) is None

    if served("bwd", pattern):
        return len(pattern.branches)
    if pattern.dilate_queries or not (served("dq", pattern) and served("dkdv", pattern)):
        return 0
    for count in range(len(pattern.branches) - 1, 0, -1):
        if served("bwd", near_branches(pattern, count)):
            return count
    return 0


def _allocate(scratch: Scratch | None, device: torch.device) -> dict[str, Tensor]:
    """Make the tensors that a call needs beside its results."""
    if scratch is None:
        return {}
    words = torch.zeros(scratch.marks + scratch.tallies, dtype=torch.int32, device=device)
    if scratch.sums == 0:
        return {"tallies": words}
    sums = (torch.zeros if scratch.cleared else torch.empty)(scratch.sums, dtype=torch.float32, device=device)
    return {"sums": sums, "marks": words[: scratch.marks], "tallies": words[scratch.marks :]}


def _dq_launches(
    launches: Sequence[Launch], layouts: dict[str, TensorLayout], kind: Kind, taken: int
) -> tuple[list[KernelLaunch], int]:
    """Plan the launches of the gradient of the queries after those of the keys; also return how many counters they need.

    ``taken``: counters that those of the keys need.
    """
    query, pattern = layouts["query"], kind.call.pattern
    read = [layouts[name] for name in ("query", "key", "value", "do")]
    if hopper_refusal("dq", read, pattern, kind.padded, kind.call.is_causal) is None:
        planned = hopper_dq_launches(launches, layouts, kind.num_documents, kind.call, taken, overlaps=taken > 0)
        return planned, len(launches)
    tiles = kernel_tiles("dq", query, pattern)
    return [
        _plan_launch(
            bwd_dq_kernel, tiles, tiles.block_m, launch, query.shape[1],
            ("query", "key", "value", "do", "stats", "dq"), ("query", "key", "value", "do", "dq"), ("key", "value"),
            layouts, kind, NUM_BRANCHES=len(launch.rates),
        )
        for launch in launches
    ], 0  # fmt: skip


def _dkdv_launches(
    launches: Sequence[Launch], layouts: dict[str, TensorLayout], kind: Kind
) -> tuple[list[KernelLaunch], int]:
    """Plan the launches of the gradients of keys and values; also return how many counters they need."""
    query, pattern = layouts["query"], kind.call.pattern
    read = [layouts[name] for name in ("query", "key", "value", "do")]
    if hopper_refusal("dkdv", read, pattern, kind.padded, kind.call.is_causal) is None:
        return hopper_dkdv_launches(launches, layouts, kind.num_documents, kind.call)
    tiles = kernel_tiles("dkdv", query, pattern)
    return [
        _plan_launch(
            bwd_dkdv_kernel, tiles, tiles.block_n, launch, layouts["key"].shape[1],
            ("query", "key", "value", "do", "stats", "dk", "dv"), ("query", "key", "value", "do", "dk", "dv"),
            ("query", "do"), layouts, kind,
        )
        for launch in launches
    ], 0  # fmt: skip


def _backward(
    do: Tensor, dlse: Tensor | None, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor,
    attention_mask: Tensor | None, cu_seqlens: Tensor | None, call: Call,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    do, query, key, value, out = map(_rows_contiguous, (do, query, key, value, out))
    gradients = {"dq": _empty_like(query), "dk": _empty_like(key), "dv": _empty_like(value)}
    if query.numel() == 0:
        return gradients["dq"], gradients["dk"], gradients["dv"]
    documents = _locate_documents(attention_mask, cu_seqlens, query.device)
    kind = Kind(documents.packing, attention_mask is not None, call)
    lse, dlse = lse.contiguous(), None if dlse is None else dlse.contiguous()
    plan, scratch, added_to = _backward_plan(
        *map(layout_of, (do, query, key, value, out)), None if dlse is None else layout_of(dlse), kind
    )
    for name in gradients if attention_mask is not None else added_to:
        gradients[name].zero_()
    plan.run(
        query=query, key=key, value=value, do=do, out=out, lse=lse,
        dlse=dlse, stats=torch.empty_like(lse, dtype=torch.int64),
        **gradients, **_allocate(scratch, query.device), **documents._asdict(),
    )  # fmt: skip
    return gradients["dq"], gradients["dk"], gradients["dv"]


_attention = attention_operator("triton_dilated_attention", _forward, _backward, _empty_like)
