"""The fused backend of attention over cached keys: chooses stretches and tiles, and launches the Triton kernels.

A few new tokens: one launch reads the cache once, in as many stretches as fill the device, and a second merges them. A
long chunk: its keys and the cached ones are sorted into the ranges of ``reach_ranges`` and attended in one launch, or
one per branch where branches serve different queries; time is linear in the chunk.
"""

import torch
from torch import Tensor

from .attention_operator import NAMESPACE
from .cache_slots import MAX_BRANCHES
from .cuda_devices import MAX_BATCH, cuda_capability, num_processors
from .dilation_pattern import DilationPattern
from .reach_ranges import ReachPass


try:
    import triton

    from .cached_attention_kernels import decode_kernel, merge_kernel, range_kernel
except ImportError:  # fused_refusal says so before anything here is needed
    triton = None


MAX_HEAD_DIM = 256
MAX_DECODE_ROWS = 64  # query heads of a KV head times new tokens
PROGRAMS_PER_PROCESSOR = 4


def fused_refusal(query: Tensor, pattern: DilationPattern, dropout: float) -> str | None:
    """Say why the fused kernels do not support a call, None if they do. Never waits for the device."""
    if triton is None:
        return "triton is not installed"
    if not query.is_cuda:
        return f"the fused kernels need a CUDA device, the inputs are on {query.device}"
    if torch.version.hip is not None:
        return "the fused kernels are written and tested for NVIDIA, this PyTorch is built for AMD (ROCm)"
    if query.dtype == torch.float64:
        return "the fused kernels have no float64"
    if dropout > 0:
        return f"the fused kernels have no dropout, got dropout={dropout}"
    if query.shape[-1] > MAX_HEAD_DIM:
        return f"the fused kernels support head_dim up to {MAX_HEAD_DIM}, got {query.shape[-1]}"
    if len(pattern.branches) > MAX_BRANCHES:
        return f"the fused kernels support up to {MAX_BRANCHES} branches, got {len(pattern.branches)}"
    if query.shape[0] > MAX_BATCH:
        return f"the fused kernels take up to {MAX_BATCH} rows at once, got {query.shape[0]}"
    if cuda_capability(query.device) < (8, 0):
        return f"the fused kernels need compute capability 8.0, {query.device} is older"
    return None


def serves_as_decoding(query: Tensor, key: Tensor) -> bool:
    """Say whether the new tokens are so few that reading the cache is all the work."""
    return query.shape[1] // key.shape[1] * query.shape[2] <= MAX_DECODE_ROWS


def attend_decoding(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_positions: Tensor,
    key_branches: Tensor,
    oldest: Tensor,
    newest: Tensor,
    *,
    count_overlaps: bool,
    scale: float,
) -> Tensor:
    """Attend from a few new tokens to the cache.

    Args:
        query: ``[B, H, T, D]``.
        key, value: ``[B, G, S, D]``.
        key_positions, key_branches: ``[B, G, S]``, as the cache holds them.
        oldest: ``[B, G, T, K]`` of ``oldest_reached``.
        newest: ``[B, T]`` positions of the tokens, -1 for padding.
        count_overlaps: whether a key counts once per branch that reaches it, or once.
        scale: factor on the scores.

    Returns:
        ``[B, H, T, D]``; 0 for a query that reaches nothing.
    """
    inputs = (query, key, value, key_positions, key_branches, oldest, newest, count_overlaps, scale)
    # The registered operator is opaque to the compiler; called plainly, it would cost more than the kernels.
    return _registered_decoding(*inputs) if torch.compiler.is_compiling() else _decoding(*inputs)


def _decoding(
    query: Tensor, key: Tensor, value: Tensor, key_positions: Tensor, key_branches: Tensor, oldest: Tensor,
    newest: Tensor, count_overlaps: bool, scale: float,
) -> Tensor:  # fmt: skip
    batch, num_heads, num_tokens, head_dim = query.shape
    out = query.new_empty(batch, num_heads, num_tokens, head_dim)
    if out.numel() == 0:
        return out
    num_kv_heads, num_keys = key.shape[1:3]
    group = num_heads // num_kv_heads
    query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
    if key_positions.stride() != key_branches.stride() or key_positions.stride(-1) != 1:
        key_positions, key_branches = key_positions.contiguous(), key_branches.contiguous()
    block_n = 64 if head_dim <= 128 else 32
    blocks = triton.cdiv(num_keys, block_n)
    wanted = triton.cdiv(PROGRAMS_PER_PROCESSOR * num_processors(query.device), batch * num_kv_heads)
    keys_per_program = triton.cdiv(blocks, min(wanted, blocks)) * block_n
    stretches = triton.cdiv(num_keys, keys_per_program)
    part = query.new_empty(batch, num_heads, num_tokens, stretches, head_dim, dtype=torch.float32)
    part_lse = query.new_empty(batch, num_heads, num_tokens, stretches, dtype=torch.float32)
    block_d = _block_d(head_dim)
    with torch.cuda.device_of(query):
        decode_kernel[(stretches, num_kv_heads, batch)](
            query, key, value, key_positions, key_branches, oldest.contiguous(), newest.contiguous(), part, part_lse,
            *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *key_positions.stride()[:2],
            scale, num_keys, keys_per_program, num_tokens, oldest.shape[-1],
            COUNT_OVERLAPS=count_overlaps, GROUP=group, SINGLE=num_tokens == 1, HEAD_DIM=head_dim, BLOCK_D=block_d, BLOCK_M=max(16, triton.next_power_of_2(group * num_tokens)),
            BLOCK_N=block_n, PRECISION=_precision(query), num_warps=4, num_stages=2,
        )  # fmt: skip
        merge_kernel[(batch * num_heads * num_tokens,)](
            part, part_lse, out, stretches, HEAD_DIM=head_dim, BLOCK_D=block_d, BLOCK_P=16, num_warps=2
        )
    return out


_registered_decoding = torch.library.custom_op(f"{NAMESPACE}::cached_decoding", _decoding, mutates_args=())


@_registered_decoding.register_fake
def _(query, *_):
    return query.new_empty(query.shape)


def attend_ranges(
    query: Tensor, key: Tensor, value: Tensor, passes: list[ReachPass], *, scale: float
) -> tuple[Tensor, Tensor]:
    """Attend from a chunk of tokens to ranges of sorted keys.

    Args:
        query: ``[B, H, T, D]``.
        key, value: ``[B, G, S, D]``.
        passes: of ``plan_ranges``.
        scale: factor on the scores.

    Returns:
        ``(out [B, H, T, D], lse [B, H, T])``; lse is float32, natural log. A query that reaches nothing gives 0 and
        -inf.
    """
    batch, num_heads, num_tokens, head_dim = query.shape
    group = num_heads // key.shape[1]
    if query.stride(-1) != 1:
        query = query.contiguous()
    # Results of several passes meet in float32.
    dtype = query.dtype if len(passes) == 1 else torch.float32
    out = torch.empty(batch, num_tokens, num_heads, head_dim, dtype=dtype, device=query.device).transpose(1, 2)
    lse = torch.empty(batch, num_heads, num_tokens, dtype=torch.float32, device=query.device)
    if len(passes) != 1 or passes[0].queries is not None:  # else every query is written
        out.zero_()
        lse.fill_(-torch.inf)
    block_m, block_n, num_warps, num_stages = _range_tiles(query)
    with torch.cuda.device_of(query):
        for part in passes:
            sorted_key, sorted_value = (x.reshape(-1, head_dim).index_select(0, part.keys) for x in (key, value))
            num_queries, num_keys = part.first.shape[3], len(part.keys) // (batch * key.shape[1])
            range_kernel[(triton.cdiv(num_queries, block_m), num_heads, batch)](
                query, sorted_key, sorted_value, part.queries, part.first, part.stop, out, lse,
                *query.stride()[:3], *out.stride()[:3], scale, num_queries, num_tokens, num_keys, part.first.shape[2],
                GROUP=group, INDEXED=part.queries is not None, CONTINUES=len(passes) > 1, HEAD_DIM=head_dim,
                BLOCK_D=_block_d(head_dim), BLOCK_M=block_m, BLOCK_N=block_n, PRECISION=_precision(query),
                num_warps=num_warps, num_stages=num_stages,
            )  # fmt: skip
    return out.to(query.dtype), lse


def _range_tiles(query: Tensor) -> tuple[int, int, int, int]:
    """Choose block_m, block_n, warps and pipeline depth."""
    head_dim = query.shape[-1]
    if query.dtype == torch.float32:
        return (16, 16, 4, 1) if head_dim > 128 else (32, 32, 4, 1)
    if head_dim > 128:
        return 64, 32, 4, 2
    if query.is_cuda and cuda_capability(query.device) >= (9, 0):
        return (128, 64, 8, 3) if head_dim > 64 else (128, 64, 4, 3)
    return (64, 32, 4, 2) if head_dim > 64 else (64, 64, 4, 2)


def _block_d(head_dim: int) -> int:
    """Return the width of a tile: a power of two, wide enough for the tensor cores."""
    return max(16, 1 << (head_dim - 1).bit_length())


def _precision(x: Tensor) -> str | None:
    return "ieee" if x.dtype == torch.float32 else None
