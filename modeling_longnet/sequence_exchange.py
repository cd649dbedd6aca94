"""Who sends which keys and values to whom, and the sending: kept keys only, once, and gradients back the same way."""

import functools
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .dilation_pattern import DilationPattern
from .document_slices import HaloBlock, KeptKeys, Span, halo_keys
from .sequence_group import talk
from .sequence_shares import Document, Share


class ExchangePlan(NamedTuple):
    """What this rank sends and receives for one pattern, in every layer.

    ``sent_rows``, ``sent_heads`` and ``sent_columns`` index the keys to send, in order of the receiving rank; within
    ``chunks`` of them no key stands twice. ``order`` takes the received keys into the order of ``blocks``.
    """

    sent_rows: Tensor
    sent_heads: Tensor
    sent_columns: Tensor
    chunks: tuple[slice, ...]
    send_counts: list[int]
    receive_counts: list[int]
    order: Tensor
    blocks: tuple[HaloBlock, ...]
    anyone_sends: bool

    @property
    def received_entries(self) -> int:
        """Keys that this rank receives, over all KV heads; each comes with its value."""
        return sum(self.receive_counts)


# One entry per shape of batch, shared by all layers with a pattern; so few because dense layers' plans hold an index for
# every key that travels, and packed documents lie otherwise in every batch.
@functools.lru_cache(maxsize=8)
def plan_exchange(
    pattern: DilationPattern,
    num_kv_heads: int,
    is_causal: bool,
    rank: int,
    world_size: int,
    shares: tuple[Share, ...],
    documents: tuple[Document, ...],
    device: torch.device,
) -> ExchangePlan:
    """Work out what one rank of the group sends and receives.

    Args:
        shares: what this rank holds.
        documents: the map of all documents on several ranks.
        device: where the index tensors are wanted.
    """
    offsets = pattern.offsets(num_kv_heads)
    mine = [(index, share) for index, share in enumerate(shares) if share.document is not None]
    spans = {index: dict(share.document.holders) for index, share in mine}

    @functools.cache
    def halo(share_index: int, holder: int, branch_index: int, offset: int) -> dict[str, KeptKeys]:
        length = shares[share_index].document.length
        return halo_keys(pattern, branch_index, offset, spans[share_index][holder], length, is_causal)

    # Where the halo stands once it is in order: one block after the other.
    blocks, starts, end = [], {}, 0
    for index, _ in mine:
        for i in range(len(offsets)):
            for g, offset in enumerate(offsets[i]):
                for side, keys in halo(index, rank, i, offset).items():
                    if len(keys):
                        starts[index, i, g, side] = end
                        blocks.append(HaloBlock(index, g, i, side, keys, end))
                        end += len(keys)

    sent: list[tuple[int, int, Tensor]] = []  # row, KV head, columns
    chunks, send_counts, sent_entries = [], [], 0
    received: list[Tensor] = []  # places in the ordered halo, in order of arrival
    receive_counts = []
    for other in range(world_size):
        before, before_received = sent_entries, sum(len(places) for places in received)
        for i in range(len(offsets)):
            chunk_start = sent_entries
            for index, share in mine:
                if other == rank or other not in spans[index]:
                    continue
                for g, offset in enumerate(offsets[i]):
                    for keys in halo(index, other, i, offset).values():
                        for positions in _inside(keys, share.span):
                            columns = torch.arange(positions.start, positions.stop, positions.step)
                            sent.append((share.row, g, columns + (share.start - share.span.first)))
                            sent_entries += len(positions)
                    for side, keys in halo(index, rank, i, offset).items():
                        for positions in _inside(keys, spans[index][other]):
                            place = starts[index, i, g, side] + keys.index(positions[0])
                            received.append(torch.arange(place, place + len(positions)))
            if sent_entries > chunk_start:
                chunks.append(slice(chunk_start, sent_entries))
        send_counts.append(sent_entries - before)
        receive_counts.append(sum(len(places) for places in received) - before_received)

    empty = torch.zeros(0, dtype=torch.int64)
    arrival = torch.cat([empty, *received])
    return ExchangePlan(
        torch.cat([empty, *(torch.full_like(columns, row) for row, _, columns in sent)]).to(device),
        torch.cat([empty, *(torch.full_like(columns, g) for _, g, columns in sent)]).to(device),
        torch.cat([empty, *(columns for _, _, columns in sent)]).to(device),
        tuple(chunks),
        send_counts,
        receive_counts,
        torch.argsort(arrival).to(device),
        tuple(blocks),
        _anyone_sends(pattern, offsets, is_causal, documents),
    )


def _inside(keys: KeptKeys, span: Span) -> Iterator[range]:
    """Yield the positions of kept keys inside a span."""
    for positions in KeptKeys(keys.branch, keys.offset, keys.span & span).progressions():
        if positions:
            yield positions


def _anyone_sends(
    pattern: DilationPattern, offsets: list[list[int]], is_causal: bool, documents: tuple[Document, ...]
) -> bool:
    """Say, alike on all ranks, whether any rank needs anything: otherwise nobody need take part."""
    return any(
        len(keys)
        for document in documents
        for holder in document.holders
        for i, branch_offsets in enumerate(offsets)
        for offset in set(branch_offsets)
        for keys in halo_keys(pattern, i, offset, holder.span, document.length, is_causal).values()
    )


class Exchange:
    """One exchange under way: keys and values to those who need them, or gradients back."""

    def __init__(self, group: dist.ProcessGroup, received: Tensor, sent: Tensor, counts_in, counts_out, what: str):
        self.group, self.received, self.what = group, received, what
        self._sent = sent  # must outlive the sending
        self._work = talk(
            group, what,
            lambda: dist.all_to_all_single(received, sent, counts_in, counts_out, group=group, async_op=True),
        )  # fmt: skip

    def wait(self) -> Tensor:
        """Return what has been received; on a GPU only the stream waits."""
        talk(self.group, self.what, self._work.wait)
        self._sent = None
        return self.received


def send_keys(plan: ExchangePlan, group: dist.ProcessGroup, key: Tensor, value: Tensor) -> Exchange | None:
    """Start sending the keys and values ``[B, G, L, D]`` that other ranks need; None if nobody needs any."""
    if not plan.anyone_sends:
        return None
    sent = pack_keys(plan, key, value)
    received = sent.new_empty(plan.received_entries, *sent.shape[1:])
    counts = plan.receive_counts, plan.send_counts
    return Exchange(group, received, sent, *counts, "the exchange of keys and values")


def send_gradients(
    plan: ExchangePlan, group: dist.ProcessGroup, grad_key: Tensor, grad_value: Tensor
) -> Exchange | None:
    """Start sending the gradients of the halo ``[entries, D]`` back to where its keys came from."""
    if not plan.anyone_sends:
        return None
    sent = pack_gradients(plan, grad_key, grad_value)
    received = sent.new_empty(sum(plan.send_counts), *sent.shape[1:])
    counts = plan.send_counts, plan.receive_counts
    return Exchange(group, received, sent, *counts, "the exchange of gradients of keys and values")


def pack_keys(plan: ExchangePlan, key: Tensor, value: Tensor) -> Tensor:
    """Lay out what to send of ``[B, G, L, D]`` keys and values: ``[entries, 2, D]`` in order of the receiver."""
    index = plan.sent_rows, plan.sent_heads, plan.sent_columns
    return torch.stack([key[index], value[index]], dim=1)


def unpack_keys(plan: ExchangePlan, received: Tensor) -> tuple[Tensor, Tensor]:
    """Return the halo's keys and values ``[entries, D]`` in the order of ``plan.blocks``."""
    return received[:, 0].index_select(0, plan.order), received[:, 1].index_select(0, plan.order)


def pack_gradients(plan: ExchangePlan, grad_key: Tensor, grad_value: Tensor) -> Tensor:
    """Undo ``unpack_keys`` on gradients."""
    sent = grad_key.new_empty(len(plan.order), 2, grad_key.shape[-1])
    sent[plan.order, 0], sent[plan.order, 1] = grad_key, grad_value
    return sent


def add_gradients(plan: ExchangePlan, received: Tensor, grad_key: Tensor, grad_value: Tensor) -> None:
    """Add the gradients ``[entries, 2, D]`` of keys that were sent in place, always in one order."""
    for chunk in plan.chunks:
        index = plan.sent_rows[chunk], plan.sent_heads[chunk], plan.sent_columns[chunk]
        grad_key[index] += received[chunk, 0].to(grad_key.dtype)
        grad_value[index] += received[chunk, 1].to(grad_value.dtype)
