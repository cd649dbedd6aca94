"""Launches the fused kernels for a slice's halo, for every pattern, however many heads.

Dense queries take one launch forward and two backward. Dilated ones take one per branch that has a halo, each going on
from the (out, lse) of the one before, and as many backward for the queries; the keys still take one.
"""

import functools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .attention_operator import Call
from .compiled_kernels import launch
from .dilated_attention_triton import Tiles, block_d, describable, described_rows, kernel_tiles
from .dilation_pattern import DilationPattern
from .document_slices import LEFT, HaloBlock, Span, active_queries, halo_queries
from .launch_plans import layout_of


try:
    import triton

    from .halo_attention_kernels import halo_dkdv_kernel, halo_dq_kernel, halo_fwd_kernel
except ImportError:  # nobody asks for these kernels without triton
    triton = None


# One branch has few keys and many queries. Where fewer programs than this would run, the queries of a tile of halo keys
# are dealt out to up to MOST_SPLITS of them, each with sums of its own.
ENOUGH_PROGRAMS = 1024
MOST_SPLITS = 8


def _constants(call: Call, query: Tensor, num_kv_heads: int, tiles: Tiles) -> dict:
    head_dim = query.shape[-1]
    return {
        "GROUP": query.shape[0] // num_kv_heads,
        "SLIDING": call.pattern.window == "sliding",
        "HEAD_DIM": head_dim,
        "BLOCK_D": block_d(head_dim),
        "BLOCK_M": tiles.block_m,
        "BLOCK_N": tiles.block_n,
        "PRECISION": "ieee" if query.dtype == torch.float32 else None,
    }


def _is_wide(rate: int, tiles: Tiles, *strided: Tensor) -> bool:
    """Whether the rows of a tile of queries lie further apart than 32 bits can say."""
    return rate * tiles.block_m * max(x.stride(1) for x in strided) >= 2**31


class _QueryLaunch(NamedTuple):
    """What one launch attends to and from. Each KV head has as many rows, filled up with what is empty.

    ``blocks [G, blocks, 7]`` and ``queries [G, progressions, 2]`` int64, as the kernels read them; ``rate`` of the
    queries, and how many the longest progression has.
    """

    blocks: Tensor
    queries: Tensor
    rate: int
    most_queries: int


@functools.lru_cache(maxsize=64)  # shared by all layers and steps
def _query_launches(
    pattern: DilationPattern, num_kv_heads: int, halo: tuple[HaloBlock, ...], span: Span, device: torch.device
) -> list[_QueryLaunch]:
    """Plan the launches over queries of a slice: no query stands twice in any, so none is a race.

    Dense queries take one launch. Dilated ones take one per branch, with programs for those alone that the branch
    serves: of the 131,072 queries of a slice, a branch of rate 512 serves 256, and each meets 2,048 keys.
    """
    branches = range(len(pattern.branches))
    parts = [{i} for i in branches] if pattern.dilate_queries else [set(branches)]
    launches = []
    for part in parts:
        of_heads = [[x for x in halo if x.kv_head == g and x.branch_index in part] for g in range(num_kv_heads)]
        blocks = [[row for x in head for row in _describe(pattern, x)] for head in of_heads]
        if not any(blocks):
            continue
        queries = [_queries(pattern, head, span) for head in of_heads]
        launches.append(
            _QueryLaunch(
                _filled(blocks, [0, 0, 0, 1, 0, 1, 0], device),
                _filled([[[p.start, len(p)] for p in head] for head in queries], [0, 0], device),
                max(_query_rate(pattern, i) for i in part),
                max(len(p) for head in queries for p in head),
            )
        )
    return launches


def _queries(pattern: DilationPattern, blocks: list[HaloBlock], span: Span) -> list[range]:
    """List the queries of a slice that may meet some of the blocks, each once; if dilated, those of one branch."""
    merged: list[Span] = []
    for met in sorted(halo_queries(pattern, x.keys, x.side, span) for x in blocks):
        if merged and met.first <= merged[-1].stop:
            merged[-1] = Span(merged[-1].first, max(merged[-1].stop, met.stop))
        else:
            merged.append(met)
    return [
        progression
        for part in merged
        for progression in active_queries(pattern, blocks[0].keys.branch, blocks[0].keys.offset, part)
    ]


def _query_rate(pattern: DilationPattern, branch_index: int) -> int:
    return pattern.dilation_rates[branch_index] if pattern.dilate_queries else 1


def _filled(rows: list[list[list[int]]], empty: list[int], device: torch.device) -> Tensor:
    longest = max(map(len, rows))
    return torch.tensor([head + [empty] * (longest - len(head)) for head in rows], device=device)


@functools.lru_cache(maxsize=64)
def _key_tiles(
    pattern: DilationPattern, halo: tuple[HaloBlock, ...], span: Span, tile: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Describe tiles of keys ``[tiles, 11]`` and the progressions of their queries ``[progressions, 2]``, int64."""
    tiles: list[list[int]] = []
    queries: list[list[int]] = []
    for x in halo:
        met = active_queries(pattern, x.keys.branch, x.keys.offset, halo_queries(pattern, x.keys, x.side, span))
        served = [x.kv_head, _query_rate(pattern, x.branch_index), len(queries), len(met)]
        queries += [[p.start, len(p)] for p in met]
        for row, count, base, window, inner, rate, side in _describe(pattern, x):
            tiles += [
                [*served, row + number, min(tile, count - number), base + rate * number, window, inner, rate, side]
                for number in range(0, count, tile)
            ]
    return torch.tensor(tiles, device=device), torch.tensor(queries, device=device)


def _describe(pattern: DilationPattern, halo: HaloBlock) -> Iterator[list[int]]:
    """Describe the progressions that a block consists of, as the kernels read them."""
    window, rate = halo.keys.branch
    first = halo.branch_index == 0 or pattern.count_overlaps
    inner = 0 if first else pattern.segment_lengths[halo.branch_index - 1]
    row = halo.row
    for positions in halo.keys.progressions():
        if positions:
            yield [row, len(positions), positions.start, window, inner, rate, int(halo.side != LEFT)]
            row += len(positions)


def _rows(x: Tensor) -> Tensor:
    """Return a tensor whose last dimension is contiguous."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _descriptors(tiles: Tiles, block: int, *tensors: Tensor) -> list | None:
    """Describe ``[heads, rows, D]`` for the copy engine, blocks of rows at a time; None where it is not to read them."""
    rows = {str(i): x[None] for i, x in enumerate(tensors)}
    layouts = {name: layout_of(x) for name, x in rows.items()}
    if not tiles.tma or not describable(list(layouts.values()), 1):
        return None
    return [described_rows(name, layout, 1, block).filled(rows) for name, layout in layouts.items()]


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
    assert out.stride(-1) == lse.stride(-1) == 1, (out.stride(), lse.stride())
    tiles = kernel_tiles("fwd", layout_of(query), call.pattern)
    query = _rows(query)
    heads, length, _ = query.shape
    span = Span(first, first + length)
    strides = (*query.stride()[:2], *out.stride()[:2], lse.stride(0))
    described = _descriptors(tiles, tiles.block_n, key[None], value[None])
    constants = {"TMA": described is not None, **_constants(call, query, num_kv_heads, tiles)}
    for part in _query_launches(call.pattern, num_kv_heads, halo, span, query.device):
        launch(
            halo_fwd_kernel,
            (-(-part.most_queries // tiles.block_m), heads, part.queries.shape[1]),
            (
                query, key, value, out, lse, *(described or (None, None)), part.blocks, part.queries,
                *strides, call.scale, length, first, part.blocks.shape[1], part.rate,
            ),
            {"WIDE": _is_wide(part.rate, tiles, query, out), **constants},
            query.device, num_warps=tiles.num_warps, num_stages=tiles.num_stages,
        )  # fmt: skip


def fold_halo_backward(
    call: Call, halo: tuple[HaloBlock, ...], num_kv_heads: int, first: int, query: Tensor, key: Tensor, value: Tensor,
    out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None,
    grad_query: Tensor, grad_key: Tensor, grad_value: Tensor,
) -> None:  # fmt: skip
    """Add the gradients through a share's halo, given the final out and lse.

    Args:
        grad_query: ``[H, n, D]``; grad_key, grad_value: ``[entries, D]`` float32; where the gradients are added.
    """
    query, grad_out = _rows(query), _rows(grad_out)
    heads, length, _ = query.shape
    span = Span(first, first + length)
    stats = torch.zeros(heads, length, dtype=torch.int64, device=query.device)
    dlse = lse if grad_lse is None else _rows(grad_lse)
    tiles = kernel_tiles("dq", layout_of(query), call.pattern)
    strides = (
        *query.stride()[:2], *out.stride()[:2], lse.stride(0), dlse.stride(0), *grad_out.stride()[:2],
        *grad_query.stride()[:2],
    )  # fmt: skip
    described = _descriptors(tiles, tiles.block_n, key[None], value[None])
    constants = {
        "HAS_DLSE": grad_lse is not None, "TMA": described is not None, **_constants(call, query, num_kv_heads, tiles)
    }  # fmt: skip
    for part in _query_launches(call.pattern, num_kv_heads, halo, span, query.device):
        launch(
            halo_dq_kernel,
            (-(-part.most_queries // tiles.block_m), heads, part.queries.shape[1]),
            (
                query, key, value, out, lse, dlse, grad_out, grad_query, stats, *(described or (None, None)),
                part.blocks, part.queries,
                *strides, call.scale, length, first, part.blocks.shape[1], part.rate,
            ),
            {"WIDE": _is_wide(part.rate, tiles, query, out, grad_out, grad_query), **constants},
            query.device, num_warps=tiles.num_warps, num_stages=tiles.num_stages,
        )  # fmt: skip
    tiles = kernel_tiles("dkdv", layout_of(query), call.pattern)
    places, queries = _key_tiles(call.pattern, halo, span, tiles.block_n, query.device)
    splits = MOST_SPLITS
    while splits > 1 and len(places) * splits >= 2 * ENOUGH_PROGRAMS:
        splits //= 2
    # Shares have blocks of their own in the buffer: what is not this share's stays zero.
    parts = torch.zeros(2, splits, *key.shape, dtype=torch.float32, device=query.device)
    widest = max(_query_rate(call.pattern, x.branch_index) for x in halo)
    # Dilated queries are few: not worth a descriptor per rate.
    described = None if call.pattern.dilate_queries else _descriptors(tiles, tiles.block_m, query, grad_out)
    launch(
        halo_dkdv_kernel,
        (len(places), splits, 1),
        (
            query, key, value, grad_out, stats, parts[0], parts[1], *(described or (None, None)), places, queries,
            *query.stride()[:2], *grad_out.stride()[:2], parts.stride(1), call.scale, length, first,
        ),
        {
            "SPLITS": splits, "DILATE": call.pattern.dilate_queries, "WIDE": _is_wide(widest, tiles, query, grad_out),
            "TMA": described is not None, **_constants(call, query, num_kv_heads, tiles),
        },
        query.device, num_warps=tiles.num_warps, num_stages=tiles.num_stages,
    )  # fmt: skip
    grad_key += parts[0].sum(0)
    grad_value += parts[1].sum(0)
