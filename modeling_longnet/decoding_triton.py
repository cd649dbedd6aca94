"""The launchers of a fused decoding step: one new token per row, a few kernels per layer.

What reads a weight serves one row; for several rows cuBLAS does, and the kernels do the rest.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from .cache_slots import MAX_BRANCHES, CacheSlots, offset_of_heads
from .cuda_devices import cuda_capability, num_processors
from .dilation_pattern import DilationPattern


try:
    import triton

    from .decoding_kernels import (
        attend_kernel,
        gate_rows_kernel,
        gated_kernel,
        linear_kernel,
        norm_rows_kernel,
        plan_kernel,
    )
except ImportError:  # decoding_refusal says so before anything here is needed
    triton = None


# Whether a kernel may start while the one before it still runs (programmatic dependent launch, Hopper and later).
OVERLAPS_LAUNCHES = True
# Of a weight, that one program asks for at once, and two rows at least. Of query, key and value together it is twice that,
# so that the programs of a small model all run at once.
TILE_BYTES = 2**13
COLUMNS_PER_WARP = 512
LONGEST_ROW = 8192  # elements of a weight's row in a tile
ATTENDING_PROGRAMS = 2  # per multiprocessor
MAX_HEAD_DIM = 256
MOST_PARTS = 64
KEYS_PER_BLOCK = 64
MERGED_AT_ONCE = 4096  # elements of parts that the last program holds


class TokenPlan(NamedTuple):
    """What the layers of one pattern share in a step: ``numbers [B, G, 3 + R + K]`` of ``plan_kernel``, and tables."""

    slots: CacheSlots
    numbers: Tensor
    rings: Tensor
    cos: Tensor  # [B, D]
    sin: Tensor
    arrivals: Tensor  # [B, G] int32
    angles: int  # how many pairs of dimensions turn


class Rotary(NamedTuple):
    """A rotary embedding's frequencies ``[angles]``, factor, and the position from which on angles are exact."""

    inv_freq: Tensor
    scaling: float
    as_source_below: int


def device_refusal(dtype: torch.dtype, device: torch.device) -> str | None:
    """Say why the kernels do not serve tensors of a dtype on a device, None if they do."""
    if device.type != "cuda":
        return f"it needs a CUDA device, the model is on {device}"
    if torch.version.hip is not None:
        return "it is written and tested for NVIDIA, this PyTorch is built for AMD (ROCm)"
    if triton is None:
        return "triton is not installed"
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"it has no {str(dtype).removeprefix('torch.')}"
    if cuda_capability(device) < (8, 0):
        return f"it needs compute capability 8.0, {device} is older"
    return None


def slots_refusal(dtype: torch.dtype, device: torch.device, head_dim: int, pattern: DilationPattern) -> str | None:
    """Say why the kernels do not serve such tensors or such a pattern, None if they do."""
    if refusal := device_refusal(dtype, device):
        return refusal
    if head_dim > MAX_HEAD_DIM:
        return f"it supports head_dim up to {MAX_HEAD_DIM}, got {head_dim}"
    if len(pattern.branches) > MAX_BRANCHES:
        return f"it supports up to {MAX_BRANCHES} branches, got {len(pattern.branches)}"
    return None


@lru_cache(maxsize=256)
def slot_tables(slots: CacheSlots, num_kv_heads: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return ``branches [G, K, 3]`` and ``rings [G, R, 7]`` of ``plan_kernel``."""
    pattern = slots.pattern
    heads = torch.arange(num_kv_heads)[:, None]
    offsets = [offset_of_heads(pattern, i, heads).flatten() for i in range(len(pattern.branches))]

    def row(*numbers: int | Tensor) -> Tensor:
        return torch.stack([torch.as_tensor(x).expand(num_kv_heads) for x in numbers], dim=-1)

    branches = [row(w, r, offsets[i]) for i, (w, r) in enumerate(pattern.branches)]
    rings = []
    for ring, inner in zip(slots.rings, (*slots.rings[1:], None)):
        w, r = pattern.branches[ring.branch]
        following = (0, 0) if inner is None else (pattern.branches[inner.branch].dilation_rate, offsets[inner.branch])
        rings.append(row(ring.base, ring.size, w, r, offsets[ring.branch], *following))
    return tuple(torch.stack(x, dim=1).contiguous().to(device) for x in (branches, rings))


def plan_token(
    slots: CacheSlots, seen: Tensor, num_kv_heads: int, head_dim: int, dtype: torch.dtype, rotary: Rotary,
    real: Tensor | None = None, rope_positions: Tensor | None = None,
) -> TokenPlan:  # fmt: skip
    """Work out where the next token of each row stands and what it reaches.

    Args:
        slots: of the layers that the plan is for.
        seen: ``[B]`` real tokens so far.
        dtype: of the model.
        real: ``[B, 1]``, zero where the token is padding; None if all are real.
        rope_positions: ``[B or 1, 1]`` for the rotary embedding; None: the logical positions.
    """
    batch, device = len(seen), seen.device
    branches, rings = slot_tables(slots, num_kv_heads, device)
    num_branches, num_rings = branches.shape[1], rings.shape[1]
    numbers = torch.empty(batch, num_kv_heads, 3 + num_rings + num_branches, dtype=torch.int64, device=device)
    cos, sin = torch.empty(2, batch, head_dim, dtype=dtype, device=device)
    arrivals = torch.empty(batch, num_kv_heads, dtype=torch.int32, device=device)
    angles = len(rotary.inv_freq)
    with torch.cuda.device_of(seen):
        plan_kernel[(num_kv_heads, batch)](
            seen, real, rope_positions, rotary.inv_freq, branches, rings, numbers, cos, sin, arrivals,
            0 if real is None else real.stride(0),
            0 if rope_positions is None or len(rope_positions) == 1 else rope_positions.stride(0),
            slots.capacity, slots.length, rotary.as_source_below, rotary.scaling,
            NUM_BRANCHES=num_branches, NUM_RINGS=num_rings, BLOCK_K=triton.next_power_of_2(num_branches),
            BLOCK_R=triton.next_power_of_2(num_rings), LINEAR=slots.is_linear, NESTED=slots.pattern.is_nested,
            SEGMENTS=slots.pattern.window == "segment", DILATED=slots.pattern.dilate_queries, ANGLES=angles,
            HEAD_DIM=head_dim, BLOCK_D=triton.next_power_of_2(head_dim), PDL=overlap(seen)["PDL"], num_warps=1,
        )  # fmt: skip
    return TokenPlan(slots, numbers, rings, cos, sin, arrivals, angles)


def multiply(
    x: Tensor, weights: tuple[Tensor, ...], out: Tensor, *, norm: tuple[Tensor, float] | None = None,
    biases: tuple[Tensor | None, ...] = (None,), adds: bool = False,
) -> Tensor:  # fmt: skip
    """Multiply one vector by the rows of one to three weights.

    Args:
        x: ``[1, K]``.
        weights: ``[n, K]`` each.
        out: ``[1, all n]``, written and returned.
        norm: weight and epsilon of an RMSNorm that ``x`` goes through first.
        biases: one per weight, or None throughout.
        adds: add to what ``out`` holds, instead of replacing it.
    """
    first, second, third = (*weights, weights[0], weights[0])[:3]
    ends = [len(first), len(first) + len(second)] if len(weights) > 1 else [out.shape[1]] * 2
    rows, block_k = _tile(x, TILE_BYTES * (2 if len(weights) == 3 else 1), out.shape[1], *ends)
    has_bias = biases[0] is not None
    b = (*biases, biases[0], biases[0])[:3] if has_bias else (x, x, x)
    norm_weight, eps = norm or (x, 0.0)
    with torch.cuda.device_of(x):
        linear_kernel[(triton.cdiv(out.shape[1], rows),)](
            x, norm_weight, first, second, third, *b, out, eps, *ends, out.shape[1],
            K=x.shape[1], NORM=norm is not None, BIAS=has_bias, RESIDUAL=adds,
            EVEN=x.shape[1] % block_k == 0 and out.shape[1] % rows == 0, ROWS=rows, BLOCK_K=block_k,
            num_warps=_num_warps(block_k), **overlap(x),
        )  # fmt: skip
    return out


def multiply_gated(
    x: Tensor, gate: Tensor, up: Tensor, *, norm: tuple[Tensor, float], biases: tuple[Tensor | None, Tensor | None]
) -> Tensor:
    """Compute ``silu(gate x) * (up x)`` of one normalised vector ``[1, K]``: ``[1, n]``."""
    out = x.new_empty(1, len(gate))
    rows, block_k = _tile(x, TILE_BYTES, 2 * len(gate), len(gate))
    rows = max(1, rows // 2)
    with torch.cuda.device_of(x):
        gated_kernel[(triton.cdiv(len(gate), rows),)](
            x, norm[0], gate, up, *biases, out, norm[1], len(gate),
            K=x.shape[1], EVEN=x.shape[1] % block_k == 0 and len(gate) % rows == 0, ROWS=rows, BLOCK_K=block_k,
            num_warps=_num_warps(block_k), **overlap(x),
        )  # fmt: skip
    return out


def normalise(x: Tensor, norm: tuple[Tensor, float]) -> Tensor:
    """Normalise the rows of ``[B, K]`` as ``LlamaRMSNorm`` does."""
    out = torch.empty_like(x)
    block_k = _block_k(x.shape[1])
    with torch.cuda.device_of(x):
        norm_rows_kernel[(len(x),)](
            x, norm[0], out, norm[1], K=x.shape[1], BLOCK_K=block_k, num_warps=_num_warps(block_k), **overlap(x)
        )
    return out


def gate_rows(gate: Tensor, up: Tensor) -> Tensor:
    """Compute ``silu(gate) * up`` of ``[B, n]``."""
    out = torch.empty_like(gate)
    block = 1024
    with torch.cuda.device_of(gate):
        gate_rows_kernel[(triton.cdiv(gate.shape[1], block), len(gate))](
            gate, up, out, gate.shape[1], BLOCK=block, num_warps=4
        )
    return out


def attend_token(
    plan: TokenPlan, query: Tensor, key: Tensor, value: Tensor, held: tuple[Tensor, Tensor, Tensor, Tensor],
    counts: tuple[Tensor, Tensor], *, scale: float, norms: tuple[Tensor, Tensor, float] | None, rotates: bool,
) -> Tensor:  # fmt: skip
    """Take one new token per row into the cache, and attend from it.

    Args:
        plan: of the layer's slots.
        query, key, value: ``[B, H * D]`` and twice ``[B, G * D]``, as projected.
        held: keys, values, positions and branches of all slots, changed in place.
        counts: the layer's ``seen [B]`` and ``columns``, changed in place.
        scale: factor on the scores.
        norms: weights of the norms of query and key heads, and their epsilon.
        rotates: whether the layer has a rotary embedding.

    Returns:
        ``[B, H * D]``.
    """
    batch, num_kv_heads, num_keys, head_dim = held[0].shape
    group = query.shape[1] // (num_kv_heads * head_dim)
    num_branches = len(plan.slots.pattern.branches)
    num_rings = plan.rings.shape[1]
    blocks = triton.cdiv(num_keys, KEYS_PER_BLOCK)
    wanted = triton.cdiv(ATTENDING_PROGRAMS * num_processors(query.device), batch * num_kv_heads)
    parts = min(wanted, blocks, MOST_PARTS)
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    part = query.new_empty(batch, num_kv_heads, group, parts, head_dim, dtype=torch.float32)
    part_lse = query.new_empty(batch, num_kv_heads, group, parts, dtype=torch.float32)
    block_d = max(16, triton.next_power_of_2(head_dim))
    block_g, max_parts = triton.next_power_of_2(group), triton.next_power_of_2(parts)
    q_norm, k_norm, eps = norms or (query, key, 0.0)
    with torch.cuda.device_of(query):
        attend_kernel[(parts, num_kv_heads, batch)](
            query, key, value, *held, *counts, plan.numbers, plan.rings, plan.cos, plan.sin, q_norm, k_norm, part,
            part_lse, plan.arrivals, out, query.stride(0), key.stride(0), value.stride(0), scale, eps, num_keys,
            NUM_BRANCHES=num_branches, NUM_RINGS=num_rings, BLOCK_K=triton.next_power_of_2(num_branches),
            BLOCK_R=triton.next_power_of_2(num_rings), COUNT_OVERLAPS=plan.slots.pattern.count_overlaps, GROUP=group,
            HEAD_DIM=head_dim, ANGLES=plan.angles, BLOCK_D=block_d, BLOCK_M=max(16, block_g), BLOCK_N=KEYS_PER_BLOCK,
            BLOCK_G=block_g, MAX_PARTS=max_parts, BLOCK_P=max(1, min(max_parts, MERGED_AT_ONCE // (block_g * block_d))),
            QK_NORM=norms is not None, ROTATES=rotates, PRECISION="ieee" if query.dtype == torch.float32 else None,
            num_warps=4, num_stages=3, **overlap(query),
        )  # fmt: skip
    return out


def _tile(x: Tensor, tile_bytes: int, num_rows: int, *ends: int) -> tuple[int, int]:
    """Choose how many rows of a weight a program takes, which divide ``ends``, and how much of a row at once."""
    block_k = _block_k(x.shape[1])
    rows = max(2, tile_bytes // (block_k * x.element_size()))
    # Enough programs for every multiprocessor; a tile has no more elements than threads can hold.
    while rows > 1 and (any(end % rows for end in ends) or num_rows < 2 * rows * num_processors(x.device)):
        rows //= 2
    return rows, block_k


def _num_warps(block_k: int) -> int:
    return min(max(4, block_k // COLUMNS_PER_WARP), 16)


def _block_k(k: int) -> int:
    divisor = k & -k  # the largest power of two that divides k
    if divisor >= 1024:
        return min(divisor, LONGEST_ROW)
    return min(triton.next_power_of_2(k), LONGEST_ROW)


def overlap(x: Tensor) -> dict[str, bool]:
    """Say whether a kernel on this device is launched before the one that it follows has ended."""
    overlaps = OVERLAPS_LAUNCHES and x.is_cuda and torch.version.hip is None
    overlaps = overlaps and cuda_capability(x.device) >= (9, 0)
    return {"PDL": True, "launch_pdl": True} if overlaps else {"PDL": False}
