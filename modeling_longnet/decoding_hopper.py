"""The attention of a decoding step on Hopper: launches the Gluon kernel for the calls that it serves.

``decoding_token`` asks ``at_once_refusal`` and takes ``attend_token`` where there is one; both compute the same.
"""

import torch
from torch import Tensor

from .decoding_triton import TokenPlan, overlap
from .dilated_attention_hopper import gluon_refusal


try:
    import triton

    from .decoding_hopper_kernels import hopper_attend_kernel
except ImportError:  # at_once_refusal says so before anything here is needed
    triton = None


AHEAD_BYTES = 2**22  # of the weights that come next: as many as keep the memory busy while parts are merged
KEY_BYTES = 2**15  # of a head's keys, that one program has in shared memory: three programs fit a multiprocessor
REGISTERS = 168  # per thread: likewise
MOST_PROGRAMS = 128  # per KV head
MOST_QUERIES = 16  # per KV head


def at_once_refusal(query: Tensor, keys: Tensor) -> str | None:
    """Say why the kernel does not serve a step, None if it does.

    Args:
        query: ``[B, H * D]``.
        keys: of all slots, ``[B, G, num_keys, D]``.
    """
    batch, num_kv_heads, num_keys, head_dim = keys.shape
    if triton is None:
        return "this triton has no Gluon"
    if refusal := gluon_refusal(query.device):
        return refusal
    if query.dtype not in (torch.bfloat16, torch.float16) or head_dim not in (64, 128):
        return f"not written for {query.dtype} with head_dim {head_dim}"
    if batch > 1:
        return "several rows keep the device busy by themselves"
    if query.shape[1] > MOST_QUERIES * num_kv_heads * head_dim:
        return f"more than {MOST_QUERIES} query heads per KV head"
    if _num_parts(num_keys, head_dim) > MOST_PROGRAMS:
        return f"{num_keys} slots are too many to be held at once"
    return None


def attend_at_once(
    plan: TokenPlan, query: Tensor, key: Tensor, value: Tensor, held: tuple[Tensor, Tensor, Tensor, Tensor],
    counts: tuple[Tensor, Tensor], *, scale: float, norms: tuple[Tensor, Tensor, float] | None, rotates: bool,
    ahead: tuple[Tensor, Tensor],
) -> Tensor:  # fmt: skip
    """Do what ``attend_token`` does, with its arguments, for one row.

    Args:
        ahead: weights of which the cache is to fetch the first rows.
    """
    _, num_kv_heads, num_keys, head_dim = held[0].shape
    group = query.shape[1] // (num_kv_heads * head_dim)
    parts = _num_parts(num_keys, head_dim)
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    part = query.new_empty(num_kv_heads, group, parts, head_dim, dtype=torch.float32)
    part_lse = query.new_empty(num_kv_heads, group, parts, dtype=torch.float32)
    q_norm, k_norm, eps = norms or (query, key, 0.0)
    with torch.cuda.device_of(query):
        hopper_attend_kernel[(parts, num_kv_heads)](
            query, key, value, *held, *counts, plan.numbers, plan.cos, plan.sin, q_norm, k_norm, part,
            part_lse, plan.arrivals, out, *ahead, scale, eps, num_keys, _ahead_bytes(parts * num_kv_heads, ahead),
            NUM_BRANCHES=len(plan.slots.pattern.branches), NUM_RINGS=plan.rings.shape[1],
            COUNT_OVERLAPS=plan.slots.pattern.count_overlaps, GROUP=group, BLOCK_G=triton.next_power_of_2(group),
            HEAD_DIM=head_dim, ANGLES=plan.angles, KEYS=_keys_per_program(head_dim),
            MAX_PARTS=triton.next_power_of_2(parts), LINEAR=plan.slots.is_linear, QK_NORM=norms is not None,
            ROTATES=rotates, num_warps=4, maxnreg=REGISTERS, **overlap(query),
        )  # fmt: skip
    return out


def _ahead_bytes(programs: int, ahead: tuple[Tensor, Tensor]) -> int:
    """Return how much of each of two weights a program has the cache fetch."""
    if any(x.data_ptr() % 16 for x in ahead):  # nothing: the instruction takes no other addresses
        return 0
    least = min(x.numel() * x.element_size() for x in ahead)
    return min(AHEAD_BYTES // 2, least) // programs // 128 * 128


def _keys_per_program(head_dim: int) -> int:
    return KEY_BYTES // (2 * head_dim)


def _num_parts(num_keys: int, head_dim: int) -> int:
    return -(-num_keys // _keys_per_program(head_dim))
