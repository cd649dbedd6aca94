"""Launches the fused kernels for a slice's halo: one launch forward, two backward, however many branches and heads."""

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from .attention_operator import Call
from .dilation_pattern import DilationPattern
from .document_slices import LEFT, HaloBlock


try:
    import triton

    from .halo_attention_kernels import halo_dkdv_kernel, halo_dq_kernel, halo_fwd_kernel
except ImportError:  # nobody asks for these kernels without triton
    triton = None


# One branch has few keys and many queries. Where fewer programs than this would run, the queries of a tile of halo keys
# are dealt out to up to MOST_SPLITS of them, each with sums of its own.
ENOUGH_PROGRAMS = 1024
MOST_SPLITS = 8


def halo_refusal(pattern: DilationPattern) -> str | None:
    """Say why the fused kernels for halos do not support a pattern, None if they do."""
    if pattern.dilate_queries:
        return "the fused kernels for halos have dense queries only"
    if any(w % r for w, r in pattern.branches):
        return "the fused kernels for halos need rates that divide their segment lengths"
    return None


class _Tiles(NamedTuple):
    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


def _tiles(kernel: str, query: Tensor) -> _Tiles:
    """Choose how to cut a kernel: what fits the registers of a compilation for Hopper without spilling in its loop."""
    if query.dtype == torch.float32:
        return _Tiles(16, 16, 4, 1) if query.shape[-1] > 128 else _Tiles(32, 32, 4, 1)
    if query.shape[-1] > 128:
        return _Tiles(32, 32, 4, 1)
    return {"fwd": _Tiles(64, 64, 4, 2), "dq": _Tiles(64, 64, 4, 1), "dkdv": _Tiles(32, 64, 4, 2)}[kernel]


def _constants(call: Call, query: Tensor, num_kv_heads: int, tiles: _Tiles) -> dict:
    head_dim = query.shape[-1]
    return {
        "GROUP": query.shape[0] // num_kv_heads,
        "SLIDING": call.pattern.window == "sliding",
        "HEAD_DIM": head_dim,
        "BLOCK_D": max(16, 1 << (head_dim - 1).bit_length()),
        "BLOCK_M": tiles.block_m,
        "BLOCK_N": tiles.block_n,
        "PRECISION": "ieee" if query.dtype == torch.float32 else None,
        "num_warps": tiles.num_warps,
        "num_stages": tiles.num_stages,
    }


@functools.lru_cache(maxsize=64)  # shared by all layers and steps
def _block_table(
    pattern: DilationPattern, num_kv_heads: int, halo: tuple[HaloBlock, ...], device: torch.device
) -> Tensor:
    """Describe the blocks of each KV head, filled up with empty ones: ``[G, blocks, 7]`` int64."""
    rows = [[_describe(pattern, x, 0, len(x.keys)) for x in halo if x.kv_head == g] for g in range(num_kv_heads)]
    longest = max(map(len, rows))
    return torch.tensor([row + [[0, 0, 0, 1, 0, 1, 0]] * (longest - len(row)) for row in rows], device=device)


@functools.lru_cache(maxsize=64)
def _tile_table(pattern: DilationPattern, halo: tuple[HaloBlock, ...], tile: int, device: torch.device) -> Tensor:
    """Describe tiles of keys: ``[tiles, 8]`` int64, the KV head in front."""
    return torch.tensor(
        [
            [x.kv_head, *_describe(pattern, x, number, min(tile, len(x.keys) - number))]
            for x in halo
            for number in range(0, len(x.keys), tile)
        ],
        device=device,
    )


def _describe(pattern: DilationPattern, halo: HaloBlock, number: int, count: int) -> list[int]:
    """Describe ``count`` keys of a block from ``number`` on, as the kernels read it."""
    (positions,) = halo.keys.progressions()
    window, rate = halo.keys.branch
    first = halo.branch_index == 0 or pattern.count_overlaps
    inner = 0 if first else pattern.segment_lengths[halo.branch_index - 1]
    return [halo.row + number, count, positions[number], window, inner, rate, int(halo.side != LEFT)]


def _rows(x: Tensor) -> Tensor:
    """Return a tensor whose last dimension is contiguous."""
    return x if x.stride(-1) == 1 else x.contiguous()


def fold_halo_forward(
    call: Call, halo: tuple[HaloBlock, ...], num_kv_heads: int, first: int, query: Tensor, key: Tensor, value: Tensor,
    out: Tensor, lse: Tensor,
) -> None:  # fmt: skip
    """Let the queries of a share attend to its halo too, in place.

    Args:
        halo: its blocks.
        first: position of the share's first token.
        query, out: ``[H, n, D]``; lse ``[H, n]`` float32; both results with a contiguous last dimension.
        key, value: ``[entries, D]``, the buffer of received keys and values.
    """
    table = _block_table(call.pattern, num_kv_heads, halo, query.device)
    tiles = _tiles("fwd", query)
    query = _rows(query)
    heads, length, _ = query.shape
    with torch.cuda.device_of(query):
        halo_fwd_kernel[(-(-length // tiles.block_m), heads)](
            query, key, value, out, lse, table,
            *query.stride()[:2], *out.stride()[:2], lse.stride(0), call.scale, length, first, table.shape[1],
            **_constants(call, query, num_kv_heads, tiles),
        )  # fmt: skip


def fold_halo_backward(
    call: Call, halo: tuple[HaloBlock, ...], num_kv_heads: int, first: int, query: Tensor, key: Tensor, value: Tensor,
    out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None,
    grad_query: Tensor, grad_key: Tensor, grad_value: Tensor,
) -> None:  # fmt: skip
    """Write the gradients through a share's halo, given the final out and lse.

    Args:
        grad_query: ``[H, n, D]`` zeros; grad_key, grad_value: ``[entries, D]`` float32, where this share's are added.
    """
    table = _block_table(call.pattern, num_kv_heads, halo, query.device)
    query, grad_out = _rows(query), _rows(grad_out)
    heads, length, _ = query.shape
    delta = torch.zeros(heads, length, dtype=torch.float32, device=query.device)
    dlse = lse if grad_lse is None else _rows(grad_lse)
    with torch.cuda.device_of(query):
        tiles = _tiles("dq", query)
        halo_dq_kernel[(-(-length // tiles.block_m), heads)](
            query, key, value, out, lse, dlse, grad_out, grad_query, delta, table,
            *query.stride()[:2], *out.stride()[:2], lse.stride(0), dlse.stride(0), *grad_out.stride()[:2],
            *grad_query.stride()[:2], call.scale, length, first, table.shape[1],
            HAS_DLSE=grad_lse is not None, **_constants(call, query, num_kv_heads, tiles),
        )  # fmt: skip
        tiles = _tiles("dkdv", query)
        places = _tile_table(call.pattern, halo, tiles.block_n, query.device)
        splits = MOST_SPLITS
        while splits > 1 and len(places) * splits >= 2 * ENOUGH_PROGRAMS:
            splits //= 2
        # Shares have blocks of their own in the buffer: what is not this share's stays zero.
        parts = torch.zeros(2, splits, *key.shape, dtype=torch.float32, device=query.device)
        halo_dkdv_kernel[(len(places), splits)](
            query, key, value, lse, grad_out, delta, parts[0], parts[1], places,
            *query.stride()[:2], lse.stride(0), *grad_out.stride()[:2], parts.stride(1), call.scale, length, first,
            SPLITS=splits, **_constants(call, query, num_kv_heads, tiles),
        )  # fmt: skip
    grad_key += parts[0].sum(0)
    grad_value += parts[1].sum(0)
