"""Where the tokens of a batch stand: logical positions, padding, packed documents."""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .cache_longnet import LongNetCache
from .configuration_longnet import LongNetConfig
from .logical_positions import PADDING, check_cu_seqlens, positions_from_cu_seqlens, positions_from_mask
from .sequence_group import current_group, gather_numbers, require_agreement
from .sequence_shares import Part, SequenceSlice, find_shares, whole_rows


class TokenLayout(NamedTuple):
    """Where the tokens of a batch stand: computed once per forward pass, read by every layer.

    Exactly one of three kinds: whole rows (both optional fields None), padded rows (``padding_mask``), or documents
    packed into the rows (``cu_seqlens`` over the real tokens of all rows in order, ``real_tokens`` their flat indices
    or None if there is no padding). Under ``sequence_parallel`` the tokens are this rank's slice of every row, and
    padded ones are packed.
    """

    positions: Tensor  # [B, T] logical positions, -1 for padding; [1, real tokens] if packed
    padding_mask: Tensor | None = None  # [B, T] bool
    cu_seqlens: Tensor | None = None  # [documents + 1] int32
    documents: Tensor | None = None  # [1, real tokens] document indices, if packed
    real_tokens: Tensor | None = None  # [real tokens] int64
    sequence: SequenceSlice | None = None  # which documents the slice holds, under sequence_parallel

    def positions_by_row(self, batch: int, length: int) -> Tensor:
        """Return the logical positions as ``[batch, length]``, -1 for padding, packed or not."""
        return self._by_row(self.positions, batch, length)

    def rotary_positions(self, batch: int, length: int) -> Tensor:
        """Return the logical positions as ``[batch, length]``, 0 for padding."""
        positions = self.positions_by_row(batch, length)
        padded = self.padding_mask is not None or self.real_tokens is not None
        return positions.clamp(min=0) if padded else positions

    def rotary_reach(self, position_ids: Tensor, shape: tuple[int, int], by_document: bool) -> Tensor:
        """Return one more than the last position, from which the frequencies of some rotary embeddings follow.

        All ranks must ask together.

        Args:
            position_ids: ``[B or 1, T]`` of the tokens.
            shape: ``(B, T)``.
            by_document: whether packed documents have a reach of their own.

        Returns:
            ``[]``, the same on all ranks; or ``[B, T]``, of each token's document on whatever ranks that lies.
        """
        sequence = self.sequence
        if by_document and (self.cu_seqlens is not None if sequence is None else sequence.packed):
            if sequence is None:
                lengths = self.cu_seqlens.to(self.documents.device).diff().long()[self.documents]
            else:
                tokens = [share.span.tokens for share in sequence.shares]
                lengths = [share.document.length if share.document else share.span.tokens for share in sequence.shares]
                tokens, lengths = (
                    torch.tensor(x, dtype=torch.long, device=position_ids.device) for x in (tokens, lengths)
                )
                lengths = lengths.repeat_interleave(tokens)[None]
            # What is left of a document runs from its logical to its given positions alike.
            left = self._by_row(lengths - self.positions.reshape(lengths.shape), *shape)
            return position_ids + left
        if sequence is None:
            return position_ids.max() + 1 if position_ids.numel() else position_ids.new_zeros(())
        mine = int(position_ids.max()) + 1 if position_ids.numel() else 0
        everyone = gather_numbers(sequence.group, position_ids.device, [mine], "the search for the last position")
        return torch.tensor(max(number for (number,) in everyone), device=position_ids.device)

    def _by_row(self, numbers: Tensor, batch: int, length: int) -> Tensor:
        """Bring one number per token, packed or not, to ``[batch, length]``, -1 for padding that is not packed."""
        if self.real_tokens is None:
            return numbers.reshape(batch, length)
        padded = numbers.new_full((batch * length,), PADDING)
        return padded.index_copy(0, self.real_tokens, numbers[0]).view(batch, length)

    def longest_document(self) -> int:
        """Return a number of tokens that no document exceeds, the same on all ranks."""
        return self.positions.shape[1] if self.sequence is None else self.sequence.longest


def locate_tokens(
    shape: tuple[int, int],
    device: torch.device,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    cu_seqlens: Tensor | None,
    cache: LongNetCache | None,
    config: LongNetConfig,
    dtype: torch.dtype | None = None,
) -> TokenLayout:
    """Work out the logical positions of the new tokens, and how documents and padding divide them.

    Under ``sequence_parallel`` the ranks do so together, and make sure that they run the same model on slices of one
    shape.

    Args:
        shape: ``(B, T)`` of the new tokens.
        attention_mask: ``[B, past + T]`` or, after a past, ``[B, T]``; nonzero = real, or None.
        position_ids: ``[B or 1, T]`` or None. Where the cache is empty, a token whose position does not follow the
            real token before it starts a new document. While compiling they need ``cu_seqlens`` beside them, or a cache.
        cu_seqlens: ``[documents + 1]`` starts of packed documents in the rows laid end to end, or None.
        cache: the cache in use, or None.
        config: the model's.
        dtype: of the tokens' embeddings, which the ranks of a group must share.

    Raises:
        ValueError: if an input has a wrong shape, or packed documents meet a cache or, given by ``cu_seqlens``, padding;
            if the ranks of a group disagree, or go on with a cache; if a compiled graph would depend on position_ids.
    """
    batch, length = shape
    begins = cache is None or cache.is_empty
    if position_ids is not None and tuple(position_ids.shape) not in ((batch, length), (1, length)):
        raise ValueError(
            f"position_ids must be [batch, tokens] = {[batch, length]} or {[1, length]}, got {list(position_ids.shape)}"
        )
    if attention_mask is not None:
        if not isinstance(attention_mask, Tensor):
            raise ValueError(
                f"attention_mask must be a tensor [batch, past + new tokens], got a {type(attention_mask).__name__}; "
                "all layers take the same one"
            )
        if attention_mask.ndim != 2 or attention_mask.shape[0] != batch or attention_mask.shape[1] < length:
            raise ValueError(
                f"attention_mask must be [batch, past + new tokens], here {[batch, length]} or wider, "
                f"got {list(attention_mask.shape)}"
            )
        if begins and attention_mask.shape[1] != length:
            raise ValueError(
                f"attention_mask has {attention_mask.shape[1]} columns for {length} tokens, and there are none before "
                "them; give one column per token"
            )
        if attention_mask.is_floating_point() and not torch.compiler.is_compiling():
            _refuse_added_mask(attention_mask)
        if not begins and attention_mask.shape[1] != length and not torch.compiler.is_compiling():
            cache.check_mask(attention_mask, length)
        attention_mask = attention_mask[:, attention_mask.shape[1] - length :] != 0
        if not torch.compiler.is_compiling() and bool(attention_mask.all()):
            attention_mask = None
    if (group := current_group()) is not None:
        if cu_seqlens is not None:
            raise ValueError(
                "cu_seq_lens_q counts the tokens of a whole batch, a rank holds a slice; shard_sequence turns it into "
                "position_ids"
            )
        return _locate_slice(group, shape, device, attention_mask, position_ids, cache, config, dtype)
    if cu_seqlens is not None and attention_mask is not None:
        raise ValueError(
            "cu_seq_lens_q and an attention_mask with padding exclude one another: leave padding out of packed documents"
        )
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, batch * length)
    real_tokens = None
    if cu_seqlens is None and position_ids is not None and begins and length > 1:
        if torch.compiler.is_compiling():
            _trace_position_ids(position_ids, attention_mask, shape, cache)
        else:
            cu_seqlens, real_tokens = documents_from_position_ids(position_ids, attention_mask, shape)
    if cu_seqlens is not None:
        if cache is not None:
            raise ValueError(
                f"{len(cu_seqlens) - 1} packed documents cannot share one KV cache; pass use_cache=False, or one "
                "document per row with an attention_mask"
            )
        tokens = batch * length if real_tokens is None else len(real_tokens)
        positions, documents = positions_from_cu_seqlens(cu_seqlens.to(device), tokens)
        return TokenLayout(positions, None, cu_seqlens, documents, real_tokens)
    if cache is not None:
        return TokenLayout(cache.next_positions(attention_mask, batch, length, device), attention_mask)
    if attention_mask is not None:
        return TokenLayout(positions_from_mask(attention_mask), attention_mask)
    return TokenLayout(torch.arange(length, device=device).expand(batch, -1))


def _refuse_added_mask(attention_mask: Tensor) -> None:
    """Refuse what other code adds to scores, 0 for real tokens: read as a mask it would hide these."""
    if not bool((attention_mask >= 0).all()):  # nan neither
        raise ValueError(
            f"attention_mask must be nonzero for real tokens and 0 for padding, got {float(attention_mask.min()):g}: if "
            "that is to be added to scores, pass attention_mask == 0"
        )


def _locate_slice(
    group: dist.ProcessGroup,
    shape: tuple[int, int],
    device: torch.device,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    cache: LongNetCache | None,
    config: LongNetConfig,
    dtype: torch.dtype | None,
) -> TokenLayout:
    """Locate the tokens of a rank's slice, together with all ranks of the group."""
    if cache is not None and cache.get_seq_length() > 0:
        raise ValueError(
            f"the cache holds {cache.get_seq_length()} tokens already: sequence_parallel shares one long prompt, and "
            "every rank decodes for itself, outside of it"
        )
    batch, length = shape
    autocast = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
    terms = {
        "rows and tokens of a slice": [batch, length],
        "the dilation pattern": config.pattern,
        "layers, dense layers, heads, KV heads, head_dim": [
            config.num_hidden_layers, list(config.dense_layers), config.num_attention_heads,
            config.num_key_value_heads, config.head_dim,
        ],
        "the rotary embedding": [config.max_position_embeddings, *sorted(config.rope_parameters.items())],
        "the dtype, and that of autocast": [dtype, autocast],
        "whether position_ids are given": position_ids is not None,
        "whether a cache is filled": cache is not None,
    }  # fmt: skip
    masked = attention_mask is not None
    (any_masked,) = require_agreement(group, device, terms, maxima=[masked])
    if not any_masked and position_ids is None:
        sequence = whole_rows(group, batch, length)
        positions = torch.arange(length, device=device).expand(batch, -1) + group.rank() * length
        return TokenLayout(positions, sequence=sequence)

    real_tokens = attention_mask.flatten().nonzero().flatten() if masked else None
    starts, ends = _row_parts(position_ids, real_tokens, shape, device)
    num_tokens = batch * length if real_tokens is None else len(real_tokens)
    edges = [*starts, num_tokens]
    tokens = torch.arange(num_tokens, device=device) if real_tokens is None else real_tokens
    rows = (tokens[torch.tensor(starts, dtype=torch.long, device=device)] // length).tolist() if starts else []
    packed = real_tokens is not None or len(starts) > batch
    parts = [Part(row, start if packed else 0, stop - start) for row, start, stop in zip(rows, edges, edges[1:])]
    sequence = find_shares(group, parts, batch, length, packed, ends, device)
    if cache is not None and sequence.packed:
        raise ValueError(
            "packed documents cannot share one KV cache; pass one document per row with an attention_mask"
        )
    cu_seqlens = torch.tensor(edges, dtype=torch.int32, device=device)
    shifts = torch.tensor([share.span.first - start for share, start in zip(sequence.shares, starts)], device=device)
    documents = torch.arange(len(parts), device=device).repeat_interleave(cu_seqlens.diff(), output_size=num_tokens)
    positions = torch.arange(num_tokens, device=device) + shifts[documents] if parts else documents
    if not packed:
        return TokenLayout(positions.view(shape), sequence=sequence)
    return TokenLayout(positions[None], None, cu_seqlens, documents[None], real_tokens, sequence)


def _row_parts(
    position_ids: Tensor | None, real_tokens: Tensor | None, shape: tuple[int, int], device: torch.device
) -> tuple[list[int], dict[int, tuple[int, int]] | None]:
    """Find where documents, or the rows' parts of them, start among the real tokens of all rows in order.

    Returns:
        The starts, and per row with real tokens the given position of its first and last one; None without
        ``position_ids``, where every row is one document.
    """
    batch, length = shape
    rows = torch.arange(batch, device=device).repeat_interleave(length)
    rows = rows if real_tokens is None else rows[real_tokens]
    if len(rows) == 0:
        return [], None if position_ids is None else {}
    new_row = rows[1:] != rows[:-1]
    if position_ids is None:
        return [0, *(new_row.nonzero().flatten() + 1).tolist()], None
    flat = position_ids.expand(shape).flatten()
    flat = flat if real_tokens is None else flat[real_tokens]
    restarts = flat[1:] != flat[:-1] + 1
    starts = [0, *((new_row | restarts).nonzero().flatten() + 1).tolist()]
    firsts = torch.cat([torch.zeros_like(rows[:1]), new_row.nonzero().flatten() + 1])
    lasts = torch.cat([firsts[1:], torch.full_like(firsts[:1], len(rows))]) - 1
    ends = zip(rows[firsts].tolist(), flat[firsts].tolist(), flat[lasts].tolist())
    return starts, {row: (first, last) for row, first, last in ends}


def _trace_position_ids(
    position_ids: Tensor, attention_mask: Tensor | None, shape: tuple[int, int], cache: LongNetCache | None
) -> None:
    """Admit position_ids to a traced prefill with a cache, where every row must be one document: the graph checks it.

    Raises:
        ValueError: without a cache, where their values would decide what the graph computes. With one, a graph that runs
            on packed documents raises RuntimeError.
    """
    if cache is None:
        raise ValueError(
            f"a compiled graph cannot depend on where the position_ids of {shape[0]} rows of {shape[1]} tokens restart; "
            "leave them out (the attention_mask is enough), pass packed documents by cu_seq_lens_q too, or give "
            "past_key_values=LongNetCache(model.config) to read one document per row"
        )
    real = torch.ones_like(position_ids, dtype=torch.bool) if attention_mask is None else attention_mask != 0
    # One document: given and logical positions of its real tokens differ by one number.
    ahead = position_ids - positions_from_mask(real)
    last = torch.iinfo(ahead.dtype).max
    highest, lowest = ahead.masked_fill(~real, -last).amax(-1), ahead.masked_fill(~real, last).amin(-1)
    torch._assert_async(
        (highest <= lowest).all(),
        f"packed documents among {shape[0]} rows of {shape[1]} tokens cannot share one KV cache; leave past_key_values "
        "out and pass cu_seq_lens_q, or pass one document per row with an attention_mask",
    )


def documents_from_position_ids(
    position_ids: Tensor, attention_mask: Tensor | None, shape: tuple[int, int]
) -> tuple[Tensor | None, Tensor | None]:
    """Find packed documents where positions restart, in the rows of ``shape`` (B, L) laid end to end.

    Args:
        position_ids: ``[B or 1, L]``.
        attention_mask: ``[B, L]``, nonzero = real, or None.

    Returns:
        ``[documents + 1]`` int32, where each starts among the real tokens, and the flat indices of these, None without a
        mask; ``(None, None)`` if every row is one document.
    """
    if attention_mask is None and not bool((position_ids[:, 1:] != position_ids[:, :-1] + 1).any()):
        return None, None
    flat = position_ids.expand(shape).flatten()
    rows = torch.arange(shape[0], device=flat.device).repeat_interleave(shape[1])
    real_tokens = None
    if attention_mask is not None:
        real_tokens = attention_mask.flatten().nonzero().flatten()
        flat, rows = flat[real_tokens], rows[real_tokens]
    same_row = rows[1:] == rows[:-1]
    restarts = flat[1:] != flat[:-1] + 1
    if not bool((same_row & restarts).any()):
        return None, None
    starts = (~same_row | restarts).nonzero().flatten() + 1
    ends = torch.tensor([len(flat)], device=flat.device)
    return torch.cat([torch.zeros_like(ends), starts, ends]).to(torch.int32), real_tokens


def pack(x: Tensor, layout: TokenLayout) -> Tensor:
    """Lay the real tokens of all rows out in one row, ``[B, heads, T, D]`` to ``[1, heads, tokens, D]``, if packed."""
    if layout.cu_seqlens is None or (x.shape[0] == 1 and layout.real_tokens is None):
        return x
    x = x.transpose(0, 1).flatten(1, 2)[None]
    return x if layout.real_tokens is None else x[:, :, layout.real_tokens]


def unpack(out: Tensor, layout: TokenLayout, batch: int, length: int) -> Tensor:
    """Undo ``pack`` on ``[1, tokens, heads, D]``; padding gets 0."""
    if layout.cu_seqlens is None:
        return out
    if layout.real_tokens is not None:
        padded = out.new_zeros(1, batch * length, *out.shape[2:])
        out = padded.index_copy(1, layout.real_tokens, out)
    return out.reshape(batch, length, *out.shape[2:])


def unpack_weights(weights: Tensor, layout: TokenLayout, batch: int, length: int) -> Tensor:
    """Undo ``pack`` on attention weights ``[1, heads, tokens, tokens]``: ``[batch, heads, length, length]``."""
    if layout.cu_seqlens is None:
        return weights
    heads, weights = weights.shape[1], weights[0]
    if layout.real_tokens is not None:
        padded = weights.new_zeros(heads, batch * length, batch * length)
        padded[:, layout.real_tokens[:, None], layout.real_tokens] = weights
        weights = padded
    return weights.view(heads, batch, length, batch, length).diagonal(dim1=1, dim2=3).permute(3, 0, 1, 2)
