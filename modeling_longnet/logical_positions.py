"""Logical positions: the index of a real token inside its own document, from a padding mask or packed lengths."""

import weakref

import torch
from torch import Tensor


PADDING = -1  # the "position" of a token that takes part in nothing


def positions_from_mask(attention_mask: Tensor) -> Tensor:
    """Number the real tokens of each row from 0, whatever the padding around (or between) them.

    Args:
        attention_mask: ``[B, L]`` bool or integer, nonzero = real token.

    Returns:
        ``[B, L]`` int64, ``PADDING`` (-1) where the mask is zero.
    """
    real = attention_mask != 0
    return torch.where(real, real.long().cumsum(-1) - 1, PADDING)


def check_cu_seqlens(cu_seqlens: Tensor, length: int) -> None:
    """Refuse what does not divide a row into documents; while compiling, by its shape and dtype alone.

    Args:
        cu_seqlens: ``[n + 1]`` integer, where each document starts, and last the total ``length``.
        length: number of tokens in the row.

    Raises:
        ValueError: if so.
    """
    if not isinstance(cu_seqlens, Tensor):
        raise ValueError(f"cu_seqlens must be a tensor, got {type(cu_seqlens).__name__}")
    if cu_seqlens.dtype not in (torch.int32, torch.int64) or cu_seqlens.ndim != 1 or len(cu_seqlens) < 2:
        raise ValueError(
            "cu_seqlens must be int32 or int64 of shape [documents + 1] with at least one document, "
            f"got {cu_seqlens.dtype} of shape {list(cu_seqlens.shape)}"
        )
    if torch.compiler.is_compiling() or _LastChecked.is_it(cu_seqlens, length):
        return
    edges = cu_seqlens.tolist()
    if edges[0] != 0 or edges[-1] != length:
        raise ValueError(f"cu_seqlens must run from 0 to the length {length}, got {edges[0]} to {edges[-1]}")
    for low, high in zip(edges, edges[1:]):
        if high < low:
            raise ValueError(f"cu_seqlens must not decrease, got {low} followed by {high}")
    _LastChecked.remember(cu_seqlens, length)


class _LastChecked:
    """The last starts of documents that were found right: the next layer need not wait for the device again."""

    found: tuple[weakref.ref[Tensor], int, int] | None = None

    @classmethod
    def is_it(cls, cu_seqlens: Tensor, length: int) -> bool:
        """Whether this very tensor was checked for this length, and not written to since."""
        if cls.found is None or cu_seqlens.is_inference():  # whose writes nobody counts
            return False
        tensor, version, of_length = cls.found
        return tensor() is cu_seqlens and (version, of_length) == (cu_seqlens._version, length)

    @classmethod
    def remember(cls, cu_seqlens: Tensor, length: int) -> None:
        if not cu_seqlens.is_inference():
            cls.found = weakref.ref(cu_seqlens), cu_seqlens._version, length


def positions_from_cu_seqlens(cu_seqlens: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Number the tokens of packed documents, each from 0.

    Args:
        cu_seqlens: ``[n + 1]`` integer, where each document starts, and last the total ``length``.
        length: number of tokens in the row.

    Returns:
        ``(positions, documents)``, each ``[1, length]`` int64: the position inside the document, and its index.
    """
    tokens = torch.arange(length, device=cu_seqlens.device)
    starts = cu_seqlens.long()
    documents = torch.searchsorted(starts[1:].contiguous(), tokens, right=True)
    return (tokens - starts[documents])[None], documents[None]
