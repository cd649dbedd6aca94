"""Rotary embeddings whose angles stay exact at any position."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_rope_utils import dynamic_rope_update
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb


class LongNetRotaryEmbedding(LlamaRotaryEmbedding):
    """Llama's rotary embedding, all rope types, with angles that stay exact at any position.

    Llama multiplies position and frequency in float32: at position 2^24 the angle is off by a radian, and beyond it
    neighbours share one. Here the product is taken and reduced modulo 2 pi in float64. Inside the first segment, where
    a converted model promises its source's logits, the source's float32 product stays, bit for bit. The frequencies stay
    in float32 whatever the model's dtype becomes: those of Llama, rounded to bfloat16, are off by over 100 radians at
    position 2^17.

    Frequencies that follow from the length (longrope, dynamic) do so as in ``transformers``: the longest row of a call
    decides for all of them, whichever rank holds its end. Only packed documents decide for themselves under longrope, so
    that each is rotated as it is alone; with dynamic NTK the longest of them decides.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> "LongNetRotaryEmbedding":
        """Follow ``to()``, ``half()`` and the like to another device, but to no other dtype."""
        before = dict(self._buffers)
        super()._apply(fn, *args, **kwargs)
        for name, moved in self._buffers.items():
            exact = before[name]
            if moved is not None and exact is not None and moved.dtype != exact.dtype:
                self._buffers[name] = (moved if exact.is_meta else exact).to(moved.device, exact.dtype)
        return self

    @staticmethod
    def compute_default_rope_parameters(
        config: Any, device: torch.device | None = None, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, float]:
        """Compute the frequencies of plain RoPE for the share of each head that rotates (Phi-4-mini: three quarters)."""
        rope = config.rope_parameters
        dim = int(config.head_dim * rope.get("partial_rotary_factor", 1.0))
        return 1.0 / (rope["rope_theta"] ** (torch.arange(0, dim, 2, dtype=torch.float, device=device) / dim)), 1.0

    @torch.no_grad()
    def forward(self, x: Tensor, position_ids: Tensor, reach: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Compute cosines and sines, both ``[B, T, R]`` in the dtype of ``x``.

        Args:
            position_ids: ``[B, T]``.
            reach: one more than the last position of what these are part of, ``[]``, or ``[B, T]`` of each token's
                document (longrope); None: they are all.
        """
        if position_ids.numel():  # no tokens have no last position
            self._follow_length(x, position_ids if reach is None else reach - 1)
        inv_freq = self.inv_freq
        if reach is not None and reach.ndim > 0:
            inv_freq = self.original_inv_freq.to(x.device)
            long_inv_freq = getattr(self, "long_inv_freq", None)  # transformers 5.17 makes them for the first long one
            if long_inv_freq is not None:
                is_long = reach[..., None] > self.length_border
                inv_freq = torch.where(is_long, long_inv_freq.to(x.device), inv_freq)  # [B, T, R/2]
        positions = position_ids[..., None]  # [B, T, 1]
        inv_freq = inv_freq.to(device=x.device, dtype=torch.float)
        as_source = positions.float() * inv_freq  # [B, T, D/2]
        if x.device.type == "mps":  # has no float64
            exact = (positions.cpu().double() * inv_freq.cpu().double()).remainder(2 * torch.pi).float().to(x.device)
        else:
            exact = (positions.double() * inv_freq.double()).remainder(2 * torch.pi).float()
        angles = torch.where(positions < self.as_source_below, as_source, exact).to(self.angle_dtype(x))
        angles = torch.cat((angles, angles), dim=-1)
        cos, sin = angles.cos() * self.attention_scaling, angles.sin() * self.attention_scaling
        return cos.to(x.dtype), sin.to(x.dtype)

    @dynamic_rope_update
    def _follow_length(self, x: Tensor, position_ids: Tensor) -> None:
        """Set the frequencies for the largest position, by the rules of ``transformers``."""

    @property
    def length_border(self) -> int | None:
        """The number of tokens beyond which frequencies follow from the length of a call; None: they never do."""
        if self.rope_type == "longrope":
            return self.config.rope_parameters["original_max_position_embeddings"]
        return self.original_max_seq_len if self.rope_type == "dynamic" else None

    def turns_otherwise(self, held: int, length: int) -> bool:
        """Whether keys of a call that reached ``held`` tokens are rotated otherwise than in one that reaches ``length``."""
        border = self.length_border
        if border is None or 0 in (held, length):
            return False
        if self.rope_type == "longrope":
            return (held > border) != (length > border)
        return max(held, length) > border and held != length

    def refuse_turn(self, held: int, length: int) -> None:
        """Raise where ``turns_otherwise``.

        Raises:
            ValueError: with the numbers.
        """
        if self.turns_otherwise(held, length):
            raise ValueError(
                f"RoPE {self.rope_type!r} rotates otherwise beyond {self.length_border} tokens: the cache was filled up to "
                f"{held}, and this call reaches {length}; give all {length} tokens at once (no prefill_chunk_size) with "
                "an empty cache"
            )

    @property
    def as_source_below(self) -> int:
        """The position from which on angles are exact."""
        return self.config.segment_lengths[0]

    @staticmethod
    def angle_dtype(x: Tensor) -> torch.dtype:
        """Return the dtype in which Llama takes sines and cosines, whatever the model's."""
        return torch.float


class XPosRotaryEmbedding(LongNetRotaryEmbedding):
    """The rotation of xPos, as the official code rounds it where a converted model promises that code's logits.

    That code, too, multiplies in float32, over the whole context that the weights were trained for, but takes sines
    and cosines in the model's dtype. The decay that makes it xPos is ``XPosDecay``.
    """

    @property
    def as_source_below(self) -> int:
        """The position from which on angles are exact."""
        return max(self.config.segment_lengths[0], self.config.trained_context or 0)

    @staticmethod
    def angle_dtype(x: Tensor) -> torch.dtype:
        """Return float64 for a float64 model, else float32."""
        return torch.promote_types(x.dtype, torch.float)


def rotate_heads(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate the first dimensions of each head by position, and let the others pass.

    Args:
        query, key: ``[B, H, T, D]`` and ``[B, G, T, D]``.
        cos, sin: ``[B, T, R]``, of a rotary embedding; R of the D dimensions rotate.
    """
    rotating = cos.shape[-1]
    if rotating == query.shape[-1]:
        return apply_rotary_pos_emb(query, key, cos, sin)
    turned = apply_rotary_pos_emb(query[..., :rotating], key[..., :rotating], cos, sin)
    return tuple(torch.cat((part, x[..., rotating:]), dim=-1) for part, x in zip(turned, (query, key)))
