"""The bounded KV cache: it forgets what no future query can reach."""

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from .dilation_pattern import DilationPattern
from .logical_positions import PADDING, positions_from_mask


class LongNetCacheLayer(CacheLayerMixin):
    """Keys and values of one layer, with the logical position of each entry, per KV head.

    Invariant: every key that a query at or after the next position can reach is held. Entries beyond
    ``pattern.cache_entries`` are dropped once ``w_0`` of them have gathered, so that a KV head never holds more than
    ``cache_entries(tokens) + w_0`` entries between steps and dropping costs O(1) per token. Each KV head keeps entries
    of its own, since its offsets are its own; where heads or rows hold different numbers, the shorter are padded with
    entries at position -1, which no query reaches.
    """

    is_croppable = True
    is_sliding = False

    def __init__(self, pattern: DilationPattern):
        super().__init__()
        self.pattern = pattern
        self.record_past = False
        self._forget()

    def _forget(self) -> None:
        self.keys = self.values = None
        self.key_positions: Tensor | None = None  # [B, G, entries], -1 where nothing stands
        self.attended_positions: Tensor | None = None  # the same for the tensors that update returned last
        self.seen: Tensor | None = None  # [B] real tokens so far: the next logical position
        self.columns = 0  # tokens so far, padding included
        self.unpruned = 0  # how many of the last entries are, in order, the last columns of every head
        self.is_initialized = False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate an empty cache of the dtype, device and batch of ``key_states [B, G, T, D]``."""
        batch, num_kv_heads = key_states.shape[:2]
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        self.key_positions = torch.empty(batch, num_kv_heads, 0, dtype=torch.int64, device=self.device)
        self.seen = torch.zeros(batch, dtype=torch.int64, device=self.device)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Append new entries, and drop those that no later query can reach.

        Args:
            key_states, value_states: ``[B, G, T, D]``.
            positions: ``[B, T]`` logical positions of the new tokens, -1 for padding.

        Returns:
            ``(keys, values)`` that the new tokens attend to, ``[B, G, entries + T, D]``: what was held before this
            call and the new entries. Their positions ``[B, G, entries + T]`` are left in ``attended_positions``, since
            ``Cache.update`` hands on two tensors only.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        num_tokens = key_states.shape[2]
        new_positions = positions[:, None].expand(-1, key_states.shape[1], -1)
        keys = torch.cat([self.keys, key_states], dim=2)
        values = torch.cat([self.values, value_states], dim=2)
        key_positions = torch.cat([self.key_positions, new_positions], dim=2)
        self.keys, self.values, self.key_positions = keys, values, key_positions
        self.seen = self.seen + (positions >= 0).sum(-1)
        self.columns += num_tokens
        self.unpruned += num_tokens
        self._prune()
        self.attended_positions = key_positions
        return keys, values

    def _prune(self) -> None:
        bound = self.pattern.cache_entries(self.columns) + self.pattern.segment_lengths[0]
        if self.record_past or self.keys.shape[2] <= bound:
            return
        needed = self._reachable_later()  # [B, G, entries]
        entries = int(needed.sum(-1).max())
        # A stable sort keeps the entries in order; heads that need fewer end in entries at position -1.
        order = torch.argsort(needed.logical_not().byte(), dim=-1, stable=True)[..., :entries]
        self.key_positions = self.key_positions.masked_fill(~needed, PADDING).gather(2, order)
        rows = order[..., None].expand(-1, -1, -1, self.keys.shape[-1])
        self.keys, self.values = self.keys.gather(2, rows), self.values.gather(2, rows)
        self.unpruned = 0

    def _reachable_later(self) -> Tensor:
        """Say which entries a query at or after each row's next position can reach, ``[B, G, entries]`` bool."""
        u = self.key_positions
        following = self.seen[:, None, None]
        reachable = torch.zeros_like(u, dtype=torch.bool)
        for (w, r), offsets in zip(self.pattern.branches, self.pattern.offsets(u.shape[1])):
            offset = torch.tensor(offsets, device=u.device)[:, None]
            near = (u // w == following // w) if self.pattern.window == "segment" else (following - u < w)
            reachable |= ((u % w) % r == offset) & near
        return reachable & (u >= 0)

    def activate_past_recording(self) -> None:
        """Drop nothing until the next ``crop``, so that candidate tokens can be taken back."""
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last ``-tokens_to_remove`` tokens.

        Raises:
            ValueError: if the number is positive, or entries of those tokens have been dropped already.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes a number of tokens to remove as a negative integer, got {tokens_to_remove}")
        removed = -tokens_to_remove
        if not self.is_initialized:
            return
        if removed > self.unpruned:
            raise ValueError(
                f"cannot take back {removed} tokens: only the last {self.unpruned} are held whole; call "
                "activate_past_recording() before generating them"
            )
        if removed:
            held = self.keys.shape[2] - removed
            self.seen = self.seen - (self.key_positions[:, 0, held:] >= 0).sum(-1)
            self.keys, self.values = self.keys[:, :, :held], self.values[:, :, :held]
            self.key_positions = self.key_positions[..., :held]
            self.columns -= removed
            self.unpruned -= removed
        recording, self.record_past = self.record_past, False
        self._prune()
        self.record_past = recording

    def reset(self) -> None:
        """Forget all tokens."""
        self._forget()

    def get_seq_length(self) -> int:
        """Return the number of tokens so far, padding included, held or not."""
        return self.columns

    def get_max_length(self) -> int:
        """Return -1: the sequence may go on for ever."""
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the columns that a padding mask for the next ``query_length`` tokens has, and its first column."""
        return self.columns + query_length, 0

    def _select_rows(self, index: Tensor) -> None:
        if self.is_initialized:
            for name in ("keys", "values", "key_positions", "seen"):
                x = getattr(self, name)
                setattr(self, name, x.index_select(0, index.to(x.device)))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder the rows of the batch, for beam search."""
        self._select_rows(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows of the batch."""
        self._select_rows(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row of the batch."""
        if self.is_initialized:
            self._select_rows(torch.arange(self.keys.shape[0], device=self.seen.device).repeat_interleave(repeats))


class LongNetCache(Cache):
    """KV cache of a LongNet model: constant memory once the longest segment is full (but for ``dense_layers``).

    Theorem: decoding through this cache, one token or any chunk at a time, equals the full forward pass.

    Args:
        config: a ``LongNetConfig``; the patterns of its layers count.
        offloading: keep the layers in CPU memory and fetch them one ahead (CUDA only).
    """

    def __init__(self, config, offloading: bool = False):
        layers = [LongNetCacheLayer(config.layer_pattern(i)) for i in range(config.num_hidden_layers)]
        super().__init__(layers=layers, offloading=offloading)

    def next_positions(self, attention_mask: Tensor | None, batch: int, num_tokens: int, device) -> Tensor:
        """Number the next tokens of each row, after those the cache has seen.

        Args:
            attention_mask: ``[batch, >= num_tokens]``, its last columns belong to the new tokens; None if all are real.
            batch, num_tokens: shape of the new tokens.

        Returns:
            ``[batch, num_tokens]`` int64 logical positions, -1 for padding.

        Raises:
            ValueError: if the cache holds another number of rows.
        """
        if attention_mask is None:
            new = torch.arange(num_tokens, device=device).expand(batch, -1)
        else:
            new = positions_from_mask(attention_mask[:, attention_mask.shape[1] - num_tokens :])
        seen = self.layers[0].seen
        if seen is not None and len(seen) != batch:
            raise ValueError(f"the cache holds a batch of {len(seen)} rows, got {batch}")
        return new if seen is None else torch.where(new >= 0, new + seen.to(device)[:, None], new)
