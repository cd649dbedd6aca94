"""The fused backend: launches the Triton kernels, on Hopper those of ``dilated_attention_hopper`` where they serve.

The inputs are read where they lie, whatever their strides, padding or packing; nothing of their size is copied. Beside
the results only lse, one word per query for the backward and, for padded rows, one index per token are allocated.
Dense queries take one launch over all branches. Dilated queries take one launch per branch, each going on from the (out,
lse) of the one before. The gradients of keys and values take one launch per branch, added up in a fixed order: two
runs give the same bits.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .attention_operator import Call, attention_operator
from .compiled_kernels import launch as launch_kernel
from .dilated_attention_hopper import hopper_refusal, launch_hopper_dkdv, launch_hopper_dq, launch_hopper_fwd
from .dilated_attention_launches import Launch, key_launches, query_launches, sides_met
from .dilation_pattern import DilationPattern


try:
    import triton
    from triton.tools.tensor_descriptor import TensorDescriptor

    from .dilated_attention_kernels import bwd_dkdv_kernel, bwd_dq_kernel, fwd_kernel, stats_kernel
except ImportError:  # triton_refusal says so before anything here is needed
    triton = None


MAX_HEAD_DIM = 256
MAX_DILATION_RATE = 2**20  # keeps rate * tile within 32 bits


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


def triton_refusal(query: Tensor, key: Tensor, value: Tensor, pattern: DilationPattern, dropout: float) -> str | None:
    """Say why the fused kernels do not support a call, None if they do. Never waits for the device."""
    if triton is None:
        return "triton is not installed"
    if not query.is_cuda:
        return f"the fused kernels need a CUDA device, the inputs are on {query.device}"
    if query.dtype == torch.float64:
        return "the fused kernels have no float64; use float32, bfloat16 or float16"
    if dropout > 0:
        return f"the fused kernels have no dropout, got dropout={dropout}"
    if query.shape[-1] > MAX_HEAD_DIM:
        return f"the fused kernels support head_dim up to {MAX_HEAD_DIM}, got {query.shape[-1]}"
    if max(pattern.dilation_rates) > MAX_DILATION_RATE:
        return f"the fused kernels support dilation rates up to {MAX_DILATION_RATE}, got {max(pattern.dilation_rates)}"
    if pattern.held_heads is not None:
        return "the fused kernels number KV heads from 0, and a rank of tensor parallelism holds other heads"
    if torch.version.hip is None and torch.cuda.get_device_capability(query.device) < (8, 0):
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
    if cu_seqlens is not None:
        return Documents(cu_seqlens.to(device, torch.int32), None, None)
    if attention_mask is not None:
        # Stable: real tokens first, in their order. Padding follows and is never looked at.
        rows = attention_mask.logical_not().to(torch.uint8).argsort(dim=-1, stable=True)
        return Documents(None, rows.int(), attention_mask.sum(-1, dtype=torch.int32))
    return Documents(None, None, None)


def _tiles(kernel: str, query: Tensor, pattern: DilationPattern) -> Tiles:
    """Choose how to cut a kernel; tuned on an H200, the rest fits the shared memory of Ampere and Ada."""
    head_dim, dense = query.shape[-1], not pattern.dilate_queries
    if query.dtype == torch.float32:
        return Tiles(16, 16, 4, 1) if head_dim > 128 else Tiles(32, 32, 4, 1)
    if not query.is_cuda or torch.cuda.get_device_capability(query.device) < (9, 0):
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


def _descriptor(x: Tensor, rate: int, block: int):
    """Describe ``[B, heads, L, D]`` as ``[B, heads, residue, term, D]``, where row = rate * term + residue."""
    batch, heads, length, head_dim = x.shape
    stride_b, stride_h, stride_l, _ = x.stride()
    return TensorDescriptor(
        x, [batch, heads, rate, length // rate, head_dim], [stride_b, stride_h, stride_l, rate * stride_l, 1],
        [1, 1, 1, block, _block_d(head_dim)],
    )  # fmt: skip


def _describable(looped: Sequence[Tensor], rate: int) -> bool:
    """Say whether descriptors fit: rows in whole rounds of ``rate``, everything aligned to 16 bytes."""
    return rate > 0 and all(
        x.shape[2] % rate == 0
        and x.data_ptr() % 16 == 0
        and all(s * x.element_size() % 16 == 0 for s in x.stride()[:3])
        for x in looped
    )


def _launch(
    kernel, tiles: Tiles, tile: int, launch: Launch, heads: int, tensors: Sequence[Tensor], strided: Sequence[Tensor],
    looped: Sequence[Tensor], documents: Documents, key: Tensor, group: int, pattern: DilationPattern,
    sides: tuple[int, int], scale: float,
    **constants,
) -> None:  # fmt: skip
    """Launch a kernel over the tiles of its progression, the heads and the batch.

    Args:
        tile: rows of one tile.
        heads: query heads or KV heads, whichever own the tiles.
        tensors: the kernel's leading pointers.
        strided: the ``[B, heads, L, D]`` tensors whose strides it takes, in its order.
        looped: those of them that its loops walk through.
        constants: compile-time arguments that only this kernel has.
    """
    batch, num_kv_heads, length, head_dim = key.shape
    tiles_per_period = _cdiv(_cdiv(min(launch.period, length), launch.rate), tile)
    periods, rest = divmod(length, launch.period)
    num_documents = 0
    if documents.cu_seqlens is None:
        slots = periods * tiles_per_period + _cdiv(_cdiv(rest, launch.rate), tile)
    else:
        num_documents = len(documents.cu_seqlens) - 1
        slots = periods * tiles_per_period + rest // (tile * launch.rate) + 2 * num_documents
    # A single row's batch stride means nothing, but past 2^31 its width would compile the kernel anew.
    strides = [stride for x in strided for stride in (x.stride(0) if batch > 1 else 0, x.stride(1), x.stride(2))]
    widest = max(launch.rates) * max(tiles.block_m, tiles.block_n) * max(x.stride(2) for x in strided)
    tma = tiles.tma and documents.rows is None and _describable(looped, launch.loop_rate)
    block = tiles.block_m + tiles.block_n - tile
    descriptors = [_descriptor(x, launch.loop_rate, block) if tma else None for x in looped]
    arguments = (
        *tensors, *descriptors, *documents, *strides, scale, length, num_documents, num_documents.bit_length(),
        launch.period, tiles_per_period, launch.windows, launch.previous_windows, launch.rates,
    )  # fmt: skip
    constants |= {
        "FIRST": launch.first,
        "GROUP": group,
        "NUM_KV_HEADS": num_kv_heads,
        "BLOCKED": pattern.head_offsets == "blocked",
        "DISJOINT": not pattern.count_overlaps,
        "DILATE": pattern.dilate_queries,
        "SLIDING": pattern.window == "sliding",
        "SEGMENTED": launch.segmented,
        "SIDE": sides[0],
        "LAST_SIDE": sides[1],
        "PACKED": documents.cu_seqlens is not None,
        "INDEXED": documents.rows is not None,
        "WIDE": widest >= 2**31,
        "TMA": tma,
        "HEAD_DIM": head_dim,
        "BLOCK_D": _block_d(head_dim),
        "BLOCK_M": tiles.block_m,
        "BLOCK_N": tiles.block_n,
        "PRECISION": "ieee" if key.dtype == torch.float32 else None,
    }
    options = {"num_warps": tiles.num_warps, "num_stages": tiles.num_stages}
    launch_kernel(kernel, (slots, heads, batch), arguments, constants, key.device, **options)


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _block_d(head_dim: int) -> int:
    """Return the width of a tile: a power of two, wide enough for the tensor cores."""
    return max(16, 1 << (head_dim - 1).bit_length())


def _empty_like(x: Tensor) -> Tensor:
    """Allocate a tensor of this shape, heads inside tokens if they are so in ``x``, else tokens inside heads."""
    batch, heads, length, head_dim = x.shape
    if x.stride(1) < x.stride(2):
        return x.new_empty(batch, length, heads, head_dim).transpose(1, 2)
    return x.new_empty(batch, heads, length, head_dim)


def _rows_contiguous(x: Tensor) -> Tensor:
    return x if x.shape[-1] == 1 or x.stride(-1) == 1 else x.contiguous()


def _forward(
    query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, cu_seqlens: Tensor | None, call: Call
) -> tuple[Tensor, Tensor]:
    pattern = call.pattern
    query, key, value = map(_rows_contiguous, (query, key, value))
    batch, num_heads, length, head_dim = query.shape
    out = _empty_like(query)
    lse = query.new_empty(batch, num_heads, length, dtype=torch.float32)
    launches = query_launches(pattern)
    if attention_mask is not None or not launches[0].first:
        out.zero_()
        lse.fill_(-torch.inf)
    if out.numel() == 0:
        return out, lse

    documents = _locate_documents(attention_mask, cu_seqlens, query.device)
    if hopper_refusal((query, key, value, out), pattern, attention_mask, call.is_causal) is None:
        for launch in launches:
            launch_hopper_fwd(launch, query, key, value, out, lse, documents.cu_seqlens, call)
        return out, lse
    tiles = _tiles("fwd", query, pattern)
    for launch in launches:
        _launch(
            fwd_kernel, tiles, tiles.block_m, launch, num_heads, (query, key, value, out, lse),
            (query, key, value, out), (key, value), documents, key, num_heads // key.shape[1], pattern,
            sides_met(pattern, call.is_causal, from_key=False), call.scale,
            NUM_BRANCHES=len(launch.rates),
        )  # fmt: skip
    return out, lse


def _backward(
    do: Tensor, dlse: Tensor | None, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor,
    attention_mask: Tensor | None, cu_seqlens: Tensor | None, call: Call,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    pattern = call.pattern
    do, query, key, value, out = map(_rows_contiguous, (do, query, key, value, out))
    batch, num_heads, length, head_dim = query.shape
    num_kv_heads = key.shape[1]
    group = num_heads // num_kv_heads
    dq, dk, dv = _empty_like(query), _empty_like(key), _empty_like(value)
    for_queries, for_keys = query_launches(pattern), key_launches(pattern)
    if attention_mask is not None or not for_queries[0].first:
        dq.zero_()
    if attention_mask is not None or not for_keys[0].first:
        dk.zero_()
        dv.zero_()
    if query.numel() == 0:
        return dq, dk, dv

    stats = torch.empty_like(lse, dtype=torch.int64)
    block = 64
    with torch.cuda.device_of(query):
        stats_kernel[(_cdiv(length, block), num_heads, batch)](
            out, do, lse, None if dlse is None else dlse.contiguous(), stats,
            *out.stride()[:3], *do.stride()[:3], length,
            HAS_DLSE=dlse is not None, HEAD_DIM=head_dim, BLOCK_D=_block_d(head_dim),
            BLOCK_M=block,
        )  # fmt: skip
    documents = _locate_documents(attention_mask, cu_seqlens, query.device)
    if hopper_refusal((query, key, value, do), pattern, attention_mask, call.is_causal) is None:
        for launch in for_queries:
            launch_hopper_dq(launch, query, key, value, do, stats, dq, documents.cu_seqlens, call)
        for launch in for_keys:
            launch_hopper_dkdv(launch, query, key, value, do, stats, dk, dv, documents.cu_seqlens, call)
        return dq, dk, dv
    tiles = _tiles("dq", query, pattern)
    for launch in for_queries:
        _launch(
            bwd_dq_kernel, tiles, tiles.block_m, launch, num_heads, (query, key, value, do, stats, dq),
            (query, key, value, do, dq), (key, value), documents, key, group, pattern,
            sides_met(pattern, call.is_causal, from_key=False), call.scale, NUM_BRANCHES=len(launch.rates),
        )  # fmt: skip
    tiles = _tiles("dkdv", query, pattern)
    for launch in for_keys:
        _launch(
            bwd_dkdv_kernel, tiles, tiles.block_n, launch, num_kv_heads, (query, key, value, do, stats, dk, dv),
            (query, key, value, do, dk, dv), (query, do), documents, key, group, pattern,
            sides_met(pattern, call.is_causal, from_key=True), call.scale,
        )  # fmt: skip
    return dq, dk, dv


_attention = attention_operator("triton_dilated_attention", _forward, _backward, _empty_like)
