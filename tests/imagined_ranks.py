"""A group of ranks in one process: what each rank computes, with the exchanges done by hand."""

from collections.abc import Sequence

import torch

from modeling_longnet import DilationPattern
from modeling_longnet.attention_operator import Call
from modeling_longnet.document_slices import Span
from modeling_longnet.sequence_exchange import add_gradients, pack_gradients, pack_keys, plan_exchange, unpack_keys
from modeling_longnet.sequence_parallel import OPERATORS, SliceAttention
from modeling_longnet.sequence_shares import Document, Holder, SequenceSlice, Share, whole_rows


class Member:
    """A rank of a group that is only imagined: all ranks live in one process."""

    def __init__(self, rank: int, world_size: int):
        self._rank, self._world_size = rank, world_size

    def rank(self) -> int:
        return self._rank

    def size(self) -> int:
        return self._world_size


def packed_row(group: Member, edges: Sequence[int], length: int) -> SequenceSlice:
    """Return the slice of one row of documents between ``edges``, of which all ranks hold ``length`` tokens each."""
    shares, documents = [], []
    for start, stop in zip(edges, edges[1:]):
        parts = [Span(start, stop) & Span(rank * length, (rank + 1) * length) for rank in range(group.size())]
        holders = tuple(Holder(r, Span(x.first - start, x.stop - start)) for r, x in enumerate(parts) if x.tokens)
        document = Document(0, holders) if len(holders) > 1 else None
        if document is not None:
            documents.append(document)
        mine = parts[group.rank()]
        if mine.tokens:
            span = Span(mine.first - start, mine.stop - start)
            shares.append(Share(0, mine.first - group.rank() * length, span, document))
    return SequenceSlice(group, tuple(shares), tuple(documents), group.size() * length, packed=True)


def attend_on_imagined_ranks(
    tensors,
    cotangents,
    pattern: DilationPattern,
    world_size: int,
    backend: str,
    is_causal: bool,
    *,
    fused: bool,
    edges: Sequence[int] | None = None,
):
    """Compute ``[out, lse, dq, dk, dv]`` by what each rank computes, and return each rank's plan beside it.

    Args:
        tensors: query, key and value ``[B, heads, L, D]``, of whose L tokens each rank gets as many.
        cotangents: of out and lse.
        backend: for the slices' own keys.
        fused: whether fused kernels attend to the halos.
        edges: where documents begin and end that are packed in one row; None: every row is one document.
    """
    operator = OPERATORS[backend]
    batch, _, length, head_dim = tensors[0].shape
    size = length // world_size
    call = Call(pattern, is_causal, head_dim**-0.5)
    slices = [[x[:, :, r * size : (r + 1) * size] for x in (*tensors, *cotangents)] for r in range(world_size)]
    plans, members, results, grads = [], [], [], []
    for rank in range(world_size):
        member = Member(rank, world_size)
        sequence = whole_rows(member, batch, size) if edges is None else packed_row(member, edges, size)
        num_kv_heads, device = tensors[1].shape[1], tensors[0].device
        places = (sequence.shares, sequence.documents, device)
        plans.append(plan_exchange(pattern, num_kv_heads, is_causal, rank, world_size, *places))
        members.append(SliceAttention(call, operator, num_kv_heads, sequence.shares, plans[-1].blocks, fused))

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
