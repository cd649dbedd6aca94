"""A group of ranks in one process: what each rank computes, with the exchanges done by hand."""

import torch

from modeling_longnet import DilationPattern
from modeling_longnet.attention_operator import Call
from modeling_longnet.sequence_exchange import add_gradients, pack_gradients, pack_keys, plan_exchange, unpack_keys
from modeling_longnet.sequence_parallel import OPERATORS, SliceAttention
from modeling_longnet.sequence_shares import whole_rows


class Member:
    """A rank of a group that is only imagined: all ranks live in one process."""

    def __init__(self, rank: int, world_size: int):
        self._rank, self._world_size = rank, world_size

    def rank(self) -> int:
        return self._rank

    def size(self) -> int:
        return self._world_size


def attend_on_imagined_ranks(tensors, cotangents, pattern: DilationPattern, world_size: int, backend, is_causal: bool):
    """Compute ``[out, lse, dq, dk, dv]`` by what each rank computes, and return each rank's plan beside it.

    Args:
        tensors: query, key and value ``[B, heads, L, D]``, of whose L tokens each rank gets as many.
        cotangents: of out and lse.
    """
    operator = OPERATORS[backend]
    batch, _, length, head_dim = tensors[0].shape
    size = length // world_size
    call = Call(pattern, is_causal, head_dim**-0.5)
    slices = [[x[:, :, r * size : (r + 1) * size] for x in (*tensors, *cotangents)] for r in range(world_size)]
    plans, members, results, grads = [], [], [], []
    for rank in range(world_size):
        sequence = whole_rows(Member(rank, world_size), batch, size)
        num_kv_heads, device = tensors[1].shape[1], tensors[0].device
        places = (sequence.shares, sequence.documents, device)
        plans.append(plan_exchange(pattern, num_kv_heads, is_causal, rank, world_size, *places))
        members.append(SliceAttention(call, operator, num_kv_heads, sequence.shares, plans[-1].blocks))

    def exchange(sent: list[torch.Tensor], counts: list[list[int]]) -> list[torch.Tensor]:
        parcels = [list(x.split(n)) for x, n in zip(sent, counts)]
        return [torch.cat([parcels[source][rank] for source in range(world_size)]) for rank in range(world_size)]

    sent = [pack_keys(plan, k, v) for plan, (_, k, v, *_) in zip(plans, slices)]
    halos = exchange(sent, [plan.send_counts for plan in plans])
    halos = [unpack_keys(plan, received) for plan, received in zip(plans, halos)]
    sent = []
    for plan, member, (q, k, v, *grad), halo in zip(plans, members, slices, halos):
        out, lse = member.forward(q, k, v)
        member.fold_halo(q, *halo, out, lse)
        dq, *halo_gradients = member.halo_backward(q, *halo, out, lse, *grad)
        sent.append(pack_gradients(plan, *halo_gradients))
        gradients = member.backward(q, k, v, out, lse, *grad)
        gradients[0].add_(dq)
        results.append((out, lse))
        grads.append(gradients)
    for plan, received, gradients in zip(plans, exchange(sent, [p.receive_counts for p in plans]), grads):
        add_gradients(plan, received, *gradients[1:])
    return [torch.cat(parts, dim=2) for parts in zip(*[[*result, *g] for result, g in zip(results, grads)])], plans
