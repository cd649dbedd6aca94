"""Where the tokens of a batch stand: logical positions, padding, packed documents."""

from typing import NamedTuple

import torch
from torch import Tensor

from .cache_longnet import LongNetCache
from .logical_positions import positions_from_cu_seqlens, positions_from_mask


class TokenLayout(NamedTuple):
    """Where the tokens of a batch stand: computed once per forward pass, read by every layer.

    Exactly one of three kinds: whole rows (both optional fields None), padded rows (``padding_mask``), or documents
    packed into the rows (``cu_seqlens`` over the real tokens of all rows in order, ``real_tokens`` their flat indices
    or None if there is no padding).
    """

    positions: Tensor  # [B, T] logical positions, -1 for padding; [1, real tokens] if packed
    padding_mask: Tensor | None = None  # [B, T] bool
    cu_seqlens: Tensor | None = None  # [documents + 1] int32
    documents: Tensor | None = None  # [1, real tokens] document indices, if packed
    real_tokens: Tensor | None = None  # [real tokens] int64


def locate_tokens(
    shape: tuple[int, int],
    device: torch.device,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    cu_seqlens: Tensor | None,
    cache: LongNetCache | None,
) -> TokenLayout:
    """Work out the logical positions of the new tokens, and how documents and padding divide them.

    Args:
        shape: ``(B, T)`` of the new tokens.
        attention_mask: ``[B, past + T]``, nonzero = real, or None.
        position_ids: ``[B or 1, T]`` or None. Where the cache is empty, a token whose position does not follow the
            real token before it starts a new document.
        cu_seqlens: ``[documents + 1]`` starts of packed documents (B == 1), or None.
        cache: the cache in use, or None.

    Raises:
        ValueError: if the mask has a wrong shape, or packed documents meet a cache or, given by ``cu_seqlens``, padding.
    """
    batch, length = shape
    begins = cache is None or cache.is_empty
    if attention_mask is not None:
        if attention_mask.ndim != 2 or attention_mask.shape[0] != batch or attention_mask.shape[1] < length:
            raise ValueError(
                f"attention_mask must be [batch, past + new tokens], here {[batch, length]} or wider, "
                f"got {list(attention_mask.shape)}"
            )
        attention_mask = attention_mask[:, attention_mask.shape[1] - length :] != 0
        if not torch.compiler.is_compiling() and bool(attention_mask.all()):
            attention_mask = None
    if cu_seqlens is not None and attention_mask is not None:
        raise ValueError(
            "cu_seq_lens_q and an attention_mask with padding exclude one another: leave padding out of packed documents"
        )
    if cu_seqlens is None and position_ids is not None and begins and length > 1:
        cu_seqlens, real_tokens = _documents_from_position_ids(position_ids, attention_mask, shape)
    else:
        real_tokens = None
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


def _documents_from_position_ids(
    position_ids: Tensor, attention_mask: Tensor | None, shape: tuple[int, int]
) -> tuple[Tensor | None, Tensor | None]:
    """Find packed documents where positions restart; ``(None, None)`` if every row is one document."""
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
