"""The decay of xPos (Sun et al., "A Length-Extrapolatable Transformer", arXiv 2212.10554, Section 3.2)."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .dilation_pattern import DilationPattern


# Long inputs that no shared reference serves are attended in blocks of at most this many queries.
BLOCK = 4096


class XPosDecay(NamedTuple):
    """How attention scores fade with distance: pair i of a head by ``zeta_i ** (distance / scale_base)``.

    A score is a sum over the pairs that the rotary embedding rotates, so the decay goes into queries and keys: the
    query at p is multiplied by ``zeta ** ((p - c) / scale_base)`` and the key at u by ``zeta ** ((c - u) /
    scale_base)``. Their product is the same for every reference c, but not in floating point: far from c one factor
    overflows. Everything here serves to choose c near enough, so that positions may grow for ever.

    Args:
        head_dim: D; pair i is dimensions i and i + D/2.
        scale_base: tokens over which pair i fades by the factor ``zeta_i = (2 i / D + 0.4) / 1.4``.
    """

    head_dim: int
    scale_base: int

    def longest_span(self, dtype: torch.dtype) -> int:
        """Return how many consecutive positions may share a reference in their middle.

        Each factor then stays within the square root of the dtype's range: 35,694 tokens for float32 and bfloat16 with
        the paper's base of 512 (and so its longest segment of 32,768), 3,966 for float16.
        """
        doublings = -math.log2(torch.finfo(dtype).tiny) / 2
        return int(2 * doublings * self.scale_base / math.log2(1.4 / 0.4))

    def shared_span(self, pattern: DilationPattern, length: int, dtype: torch.dtype) -> int | None:
        """Return a span whose aligned multiples hold every query of the pattern with all keys that it reaches.

        Args:
            pattern: the branches and their rules.
            length: positions are below this.
            dtype: of queries and keys.

        Returns:
            The whole length, or the common multiple of the segment lengths; None if neither is short enough.
        """
        longest = self.longest_span(dtype)
        if length <= longest:
            return length
        if pattern.window == "segment" and (common := math.lcm(*pattern.segment_lengths)) <= longest:
            return common
        return None

    def scale_aligned(self, query: Tensor, key: Tensor, positions: Tensor, span: int) -> tuple[Tensor, Tensor]:
        """Put the decay into queries and keys that stand in the same places, by spans.

        Args:
            query, key: ``[B, H, L, D]`` and ``[B, G, L, D]``.
            positions: ``[B, L]`` logical positions, -1 for padding.
            span: of ``shared_span``.
        """
        distances = positions - (positions.div(span, rounding_mode="floor") * span + span // 2)
        return query * self._factors(distances, query.dtype)[:, None], key * self._factors(-distances, key.dtype)[
            :, None
        ]

    def scale_cached(
        self, query: Tensor, key: Tensor, query_positions: Tensor, key_positions: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Put the decay into a few queries and all keys that they may reach, wherever these stand.

        Keys from long ago fade to zero, as they do in exact arithmetic.

        Args:
            query: ``[B, H, T, D]``, T at most ``longest_span``.
            key: ``[B, G, S, D]``.
            query_positions: ``[B, T]`` consecutive logical positions, -1 for padding.
            key_positions: ``[B, G, S]``, -1 for entries that hold nothing.
        """
        length = query.shape[2]
        reference = query_positions.amax(-1, keepdim=True) - length // 2  # [B, 1]
        # The clamps reach only padding and keys after the last query, whose factors would overflow.
        ours = self._factors((query_positions - reference).clamp(min=-length), query.dtype)
        theirs = self._factors((reference[..., None] - key_positions).clamp(min=-length), key.dtype)
        return query * ours[:, None], key * theirs

    def _factors(self, distances: Tensor, dtype: torch.dtype) -> Tensor:
        """Compute ``zeta ** (distances / scale_base)`` for every dimension of a head, ``[..., D]``."""
        pairs = torch.arange(0, self.head_dim, 2, device=distances.device)
        zeta = (pairs + 0.4 * self.head_dim) / (1.4 * self.head_dim)  # float32, as the official code rounds it
        compute = torch.promote_types(dtype, torch.float32)
        exponents = distances[..., None].to(compute) / self.scale_base  # [..., 1]
        factors = torch.exp2(exponents * zeta.to(compute).log2())  # [..., D/2]
        return torch.cat((factors, factors), dim=-1).to(dtype)
