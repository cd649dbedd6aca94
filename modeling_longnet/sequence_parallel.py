"""Dilated attention on a sequence that a group of processes shares, equal to one process.

Rank i holds the i-th of equal contiguous slices of every row. All else in a LongNet model works token by token; only
attention looks beyond a slice, and it looks at little:

1. *Who needs what* (``document_slices``). A query reaches, through branch i, kept keys of one segment, or of a window
   of ``w_i`` tokens. Of these the slice's queries find some outside: the slice's *halo*, at most ``w_i / r_i`` keys per
   KV head and side. Segments that end where a slice begins cost nothing. The bound ``sum(w_i / r_i)`` entries per KV
   head (twice that without causality) knows neither the length of the sequence nor the number of ranks.
2. *Exchange* (``sequence_exchange``). Each rank sends each other one exactly the kept keys of its halo, in one
   all-to-all whose split sizes all ranks work out alike from a map of the documents (``sequence_shares``), made once
   per forward pass. It runs while the local attention computes.
3. *Local attention.* The slice's queries and keys among themselves are a document of their own wherever every segment
   length (or only its rate, if no segment edge falls into the slice) divides the slice's first position: then the
   fused backends compute them. Otherwise they are the same strided pieces that the ``torch`` backend is made of, cut
   to the slice.
4. *Halo attention*: pieces again, whose keys lie in the received buffer; on CUDA fused kernels that take all heads in
   one launch, and all branches if the queries are dense (``halo_attention_kernels``). Pieces hold every (query, key) pair of the
   pattern exactly as often as it counts, so folding them into the local (out, lse) is one softmax over the whole
   multiset: no approximation, whatever overlaps.
5. *Backward.* The gradient of one softmax is each part's ordinary attention backward, given the *final* out and lse.
   The halo goes first; its gradients travel back by the reverse exchange, and are added to those of the keys that were
   sent, while the local backward computes.

Documents and padding may cross ranks anywhere; nothing on any rank is as long as the sequence. A layer with ordinary
attention (``dense_layers``) is the exception by its nature: its one branch reaches every key before the slice.
"""

import functools
from collections.abc import Iterable, Iterator, Sequence
from itertools import count
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .attention_operator import Call
from .dilated_attention import cast_for_autocast, choose_backend
from .dilated_attention_torch import PieceView, fold_backward, fold_forward, piece_views
from .dilated_attention_torch import _attention as torch_operator
from .dilated_attention_triton import _attention as triton_operator
from .dilated_attention_triton import refusal_of_any_heads
from .dilation_pattern import DilationPattern
from .document_slices import LOCAL, HaloBlock, Span, slice_pieces, starts_like_a_document
from .halo_attention_triton import fold_halo_backward, fold_halo_forward
from .sequence_exchange import (
    ExchangePlan,
    add_gradients,
    plan_exchange,
    send_gradients,
    send_keys,
    unpack_keys,
)
from .sequence_shares import SequenceSlice, Share


OPERATORS = {"torch": torch_operator, "triton": triton_operator}


def sequence_parallel_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: DilationPattern,
    sequence: SequenceSlice,
    *,
    is_causal: bool = True,
    scale: float | None = None,
    dropout: float = 0.0,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Compute a rank's slice of ``dilated_attention`` over the whole sequence. All ranks of the group must call it.

    Args:
        query: ``[B, H, L, D]``, this rank's slice; ``[1, H, tokens, D]`` where ``sequence`` packs its documents.
        key, value: ``[B, G, L, D]`` likewise.
        pattern: branches and rules.
        sequence: the slice's group, and which documents it holds.
        is_causal, scale, dropout: as in ``dilated_attention``. Each rank draws its own dropout, also if seeded alike.
        backend: for the slice's own keys: ``"auto"``, ``"torch"``, or ``"triton"``. The fused kernels count positions
            from a segment's start: ``"triton"`` by name needs slices that begin there.

    Returns:
        ``(out [B, H, L, D], lse [B, H, L])``, both differentiable once.

    Raises:
        ValueError: if the backend does not support the call.
        RuntimeError: if the group breaks.
    """
    query, key, value = cast_for_autocast(query, key, value)
    if backend == "eager":
        raise ValueError(
            "the eager backend builds masks over whole documents, of which a sequence-parallel rank holds a slice; use "
            'attn_implementation="sdpa" or "longnet_torch"'
        )
    chosen = choose_backend(backend, query, key, value, pattern, None, None, dropout)
    strayed = [share for share in sequence.shares if not starts_like_a_document(pattern, share.span)]
    if backend == "triton" and strayed:
        raise ValueError(
            f'backend="triton" cannot run this call: the slice begins at position {strayed[0].span.first} of its '
            f"document, inside a segment of {list(pattern.segment_lengths)} that ends in the slice or off the dilation "
            f"rates {list(pattern.dilation_rates)}; pad the slices to a multiple of "
            f'{max(pattern.segment_lengths)} tokens or use "auto"'
        )
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    group = sequence.group
    # Trainer seeds all ranks alike: of one number each would drop the same places of its slice.
    seed = int(torch.randint(2**62, (group.size(),))[group.rank()]) if dropout else 0
    call = Call(pattern, is_causal, scale, dropout, seed)
    plan = plan_exchange(
        pattern, key.shape[1], is_causal, group.rank(), group.size(), sequence.shares, sequence.documents, key.device
    )
    fused = chosen == "triton" or (backend == "auto" and _only_other_heads_are_refused(query, pattern, dropout))
    attention = SliceAttention(call, OPERATORS[chosen], key.shape[1], sequence.shares, plan.blocks, fused)
    return _SequenceParallelAttention.apply(query, key, value, attention, plan, group)


def _only_other_heads_are_refused(query: Tensor, pattern: DilationPattern, dropout: float) -> bool:
    """Whether nothing but the heads that it holds keeps a call from fused kernels: a halo brings their offsets."""
    if pattern.held_heads is None or pattern.is_ordinary(query.shape[2]):
        return False
    return refusal_of_any_heads(query, pattern, dropout) is None


class _SequenceParallelAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, attention: "SliceAttention", plan: ExchangePlan, group):
        exchange = send_keys(plan, group, key, value)
        out, lse = attention.forward(query, key, value)
        halo = () if exchange is None else unpack_keys(plan, exchange.wait())
        if halo:
            attention.fold_halo(query, *halo, out, lse)
        ctx.save_for_backward(query, key, value, out, lse, *halo)
        ctx.attention, ctx.plan, ctx.group = attention, plan, group
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out, grad_lse):
        query, key, value, out, lse, *halo = ctx.saved_tensors
        grad_out = torch.zeros_like(out) if grad_out is None else grad_out
        final = (out, lse, grad_out, grad_lse)
        exchange = grad_query = None
        if halo:
            grad_query, *grad_halo = ctx.attention.halo_backward(query, *halo, *final)
            exchange = send_gradients(ctx.plan, ctx.group, *grad_halo)
        gradients = ctx.attention.backward(query, key, value, *final)
        if exchange is not None:
            gradients[0].add_(grad_query)
            add_gradients(ctx.plan, exchange.wait(), *gradients[1:])
        return *gradients, None, None, None


class Run(NamedTuple):
    """Neighbouring shares that one call of a backend serves: documents of their own among themselves."""

    rows: slice
    columns: slice
    edges: tuple[int, ...]  # where the documents begin and end, from the run's first column on


class SliceAttention:
    """A rank's part of the attention, all but the exchange.

    Args:
        call: pattern, causality, scale and dropout.
        operator: the backend for shares that are like documents of their own.
        shares: what the rank holds; together they are all tokens of the tensors to come.
        blocks: where the halo of each share stands in the buffer.
        fused: whether fused kernels attend to it, not pieces.
    """

    def __init__(
        self,
        call: Call,
        operator,
        num_kv_heads: int,
        shares: Sequence[Share],
        blocks: Iterable[HaloBlock],
        fused: bool,
    ):
        self.call, self.operator, self.num_kv_heads, self.shares = call, operator, num_kv_heads, shares
        self.fused = fused
        own = [starts_like_a_document(call.pattern, share.span) for share in shares]
        self.runs = list(_runs([share for share, alone in zip(shares, own) if alone]))
        self.strayed = [index for index, alone in enumerate(own) if not alone]
        self.halos: dict[int, list[HaloBlock]] = {}
        for block in blocks:
            self.halos.setdefault(block.share, []).append(block)
        self.halo_rows = {(b.share, b.kv_head, b.branch_index, b.side): b.rows for b in blocks}

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Attend from the slice's queries to its own keys, ``(out [B, H, L, D], lse [B, H, L])``."""
        if self._one_run(query):
            return self.operator.forward(query, key, value, None, self._cu_seqlens(self.runs[0], query), self.call)
        out = torch.zeros_like(query)
        lse = query.new_full(query.shape[:3], float("-inf"), dtype=torch.promote_types(query.dtype, torch.float32))
        for run in self.runs:
            q, k, v = (x[run.rows, :, run.columns] for x in (query, key, value))
            results = self.operator.forward(q, k, v, None, self._cu_seqlens(run, query), self.call)
            out[run.rows, :, run.columns], lse[run.rows, :, run.columns] = results
        for index in self.strayed:
            self._fold(index, (LOCAL,), query, (key, value), out, lse)
        return out, lse

    def fold_halo(self, query: Tensor, halo_key: Tensor, halo_value: Tensor, out: Tensor, lse: Tensor) -> None:
        """Let the queries attend to the halo too, in place: its keys and values are ``[entries, D]``."""
        for index, blocks in self.halos.items():
            if self.fused:
                share = self.shares[index]
                q, o, part_lse = (x[share.row, :, share.columns] for x in (query, out, lse))
                fold_halo_forward(
                    self.call, tuple(blocks), self.num_kv_heads, share.span.first, q, halo_key, halo_value, o, part_lse
                )
            else:
                self._fold(index, {b.side for b in blocks}, query, (halo_key, halo_value), out, lse)

    def backward(
        self, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse
    ) -> list[Tensor]:
        """Return the gradients of query, key and value through the slice's own keys, given the final out and lse."""
        final = (out, lse, grad_out, grad_lse)
        if self._one_run(query):
            cu_seqlens = self._cu_seqlens(self.runs[0], query)
            return list(
                self.operator.backward(grad_out, grad_lse, query, key, value, out, lse, None, cu_seqlens, self.call)
            )
        # Half sums of many pieces would be rounded one by one.
        dtype = lse.dtype if self.strayed else query.dtype
        gradients = [torch.zeros_like(x, dtype=dtype) for x in (query, key, value)]
        for run in self.runs:
            q, k, v, o, do = (x[run.rows, :, run.columns] for x in (query, key, value, out, grad_out))
            run_lse, dlse = (None if x is None else x[run.rows, :, run.columns].contiguous() for x in (lse, grad_lse))
            cu_seqlens = self._cu_seqlens(run, query)
            results = self.operator.backward(do, dlse, q, k, v, o, run_lse, None, cu_seqlens, self.call)
            for gradient, result in zip(gradients, results):
                gradient[run.rows, :, run.columns] = result
        for index in self.strayed:
            self._fold_backward(index, (LOCAL,), gradients[0], query, (key, value), gradients[1:], *final)
        return [gradient.to(query.dtype) for gradient in gradients]

    def halo_backward(
        self,
        query: Tensor,
        halo_key: Tensor,
        halo_value: Tensor,
        out: Tensor,
        lse: Tensor,
        grad_out: Tensor,
        grad_lse: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients of the query and of the halo's keys and values through the halo."""
        grad_query = torch.zeros_like(query)
        gradients = [torch.zeros_like(x, dtype=lse.dtype) for x in (halo_key, halo_value)]
        final = (out, lse, grad_out, grad_lse)
        for index, blocks in self.halos.items():
            if self.fused:
                share = self.shares[index]
                q, dq, *parts = (
                    None if x is None else x[share.row, :, share.columns] for x in (query, grad_query, *final)
                )
                fold_halo_backward(
                    self.call, tuple(blocks), self.num_kv_heads, share.span.first, q, halo_key, halo_value, *parts, dq,
                    *gradients,
                )  # fmt: skip
            else:
                sides = {b.side for b in blocks}
                self._fold_backward(index, sides, grad_query, query, (halo_key, halo_value), gradients, *final)
        return grad_query, *(gradient.to(query.dtype) for gradient in gradients)

    def _one_run(self, query: Tensor) -> bool:
        """Whether one call of the backend serves all tokens."""
        return len(self.runs) == 1 and not self.strayed and query.numel() > 0

    def _cu_seqlens(self, run: Run, query: Tensor) -> Tensor | None:
        if len(run.edges) == 2:
            return None
        return torch.tensor(run.edges, dtype=torch.int32, device=query.device)

    def _fold(self, index: int, sides, query: Tensor, keys: tuple[Tensor, Tensor], out: Tensor, lse: Tensor) -> None:
        """Fold pieces of one share into (out, lse), one KV head at a time, which bounds what float32 sums cost."""
        for g in range(self.num_kv_heads):
            part = self._queries(index, g, query)
            total = out[part].to(lse.dtype)
            pieces = (
                (view, *(self._keys(index, g, i, side, x) for x in keys))
                for i, side, view in self._views(index, g, sides, query)
            )
            fold_forward(self.call, self._seeds(index, g, sides), pieces, query[part], total, lse[part])
            if total.dtype != out.dtype:
                out[part] = total

    def _fold_backward(
        self, index: int, sides, grad_query: Tensor, query: Tensor, keys, grad_keys, out, lse, grad_out, grad_lse
    ) -> None:
        """Add the gradients of pieces of one share in place."""
        for g in range(self.num_kv_heads):
            part = self._queries(index, g, query)
            final = [None if x is None else x[part] for x in (out, lse, grad_out, grad_lse)]
            dq = torch.zeros_like(final[0], dtype=lse.dtype)
            pieces = (
                (view, *(self._keys(index, g, i, side, x) for x in (*keys, *grad_keys)))
                for i, side, view in self._views(index, g, sides, query)
            )
            fold_backward(self.call, self._seeds(index, g, sides), pieces, dq, query[part], *final)
            grad_query[part] += dq.to(grad_query.dtype)

    def _queries(self, index: int, kv_head: int, query: Tensor) -> tuple[slice, slice, slice]:
        """Say where the queries of one KV head and share stand."""
        share, group = self.shares[index], query.shape[1] // self.num_kv_heads
        return slice(share.row, share.row + 1), slice(kv_head * group, (kv_head + 1) * group), share.columns

    def _keys(self, index: int, kv_head: int, branch_index: int, side: str, x: Tensor) -> Tensor:
        """View the keys that the rows of a piece count in as ``[1, 1, rows, D]``."""
        if side == LOCAL:
            share = self.shares[index]
            return x[share.row : share.row + 1, kv_head : kv_head + 1, share.columns]
        return x[self.halo_rows[index, kv_head, branch_index, side]][None, None]

    def _views(self, index: int, kv_head: int, sides, query: Tensor) -> Iterator[tuple[int, str, PieceView]]:
        """Yield the pieces of one KV head and share, with the branch and the side of their keys."""
        share, pattern = self.shares[index], self.call.pattern
        length = share.span.stop if share.document is None else share.document.length
        for i in range(len(pattern.branches)):
            offset = pattern.offset(i, kv_head, self.num_kv_heads)
            group = query.shape[1] // self.num_kv_heads
            for side, view in _slice_views(pattern, i, offset, share.span, length, self.call.is_causal, group):
                if side in sides:
                    yield i, side, view

    def _seeds(self, index: int, kv_head: int, sides) -> Iterator[int]:
        """Number the pieces of one KV head and share for dropout, apart from the backend's and from all others."""
        block = 2 * (index * self.num_kv_heads + kv_head) + (LOCAL in sides)
        return count(self.call.seed + (1 + block) * 2**32)


@functools.lru_cache(maxsize=4096)  # the heads of one offset, all layers and all steps share them
def _slice_views(
    pattern: DilationPattern, branch_index: int, offset: int, span: Span, length: int, is_causal: bool, group: int
) -> tuple[tuple[str, PieceView], ...]:
    """List the pieces of a slice as views of ``[1, group, L, D]`` queries and of one KV head's keys."""
    return tuple(
        (side, view)
        for side, piece in slice_pieces(pattern, branch_index, offset, span, length, is_causal)
        for view in piece_views(piece, [0], 1, group)
    )


def _runs(shares: Iterable[Share]) -> Iterator[Run]:
    """Join neighbours: documents behind one another in a row, or whole rows that begin and end alike."""
    run: Run | None = None
    for share in shares:
        columns = share.columns
        if run is not None and run.rows == slice(share.row, share.row + 1) and run.columns.stop == columns.start:
            edges = (*run.edges, run.edges[-1] + share.span.tokens)
            run = Run(run.rows, slice(run.columns.start, columns.stop), edges)
        elif run is not None and run.rows.stop == share.row and run.columns == columns and len(run.edges) == 2:
            run = run._replace(rows=slice(run.rows.start, share.row + 1))
        else:
            if run is not None:
                yield run
            run = Run(slice(share.row, share.row + 1), columns, (0, share.span.tokens))
    if run is not None:
        yield run
