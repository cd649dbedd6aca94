"""Random patterns and random calls of the operator, small enough for the oracle."""

from dataclasses import asdict, dataclass
from math import lcm

import torch
from hypothesis import strategies as st
from torch import Tensor

from modeling_longnet import DilationPattern


@st.composite
def free_patterns(draw) -> DilationPattern:
    """Draw any branches at all: rates that do not divide or exceed their segment length, branches out of order."""
    branches = draw(st.lists(st.tuples(st.integers(1, 24) | st.just(100), st.integers(1, 9)), min_size=1, max_size=4))
    return DilationPattern(
        [w for w, _ in branches],
        [r for _, r in branches],
        head_offsets=draw(st.sampled_from(["interleaved", "blocked"])),
        count_overlaps=True,
        dilate_queries=draw(st.booleans()),
        window=draw(st.sampled_from(["segment", "sliding"])),
    )


@st.composite
def nested_patterns(draw) -> DilationPattern:
    """Draw branches in which each segment length and each rate divides the next and each rate its segment length."""
    dilation_rates = [draw(st.integers(1, 3))]
    segment_lengths = [dilation_rates[0] * draw(st.integers(1, 6))]
    for _ in range(draw(st.integers(0, 3))):
        dilation_rates.append(dilation_rates[-1] * draw(st.integers(1, 3)))
        segment_lengths.append(lcm(segment_lengths[-1], dilation_rates[-1]) * draw(st.integers(1, 2)))
    return DilationPattern(
        segment_lengths,
        dilation_rates,
        count_overlaps=draw(st.sampled_from([False, False, True])),
        dilate_queries=draw(st.booleans()),
        window=draw(st.sampled_from(["segment", "sliding"])),
    )


def patterns() -> st.SearchStrategy[DilationPattern]:
    """Draw patterns of every kind, nested ones as often as free ones."""
    return nested_patterns() | free_patterns()


@dataclass(frozen=True)
class Call:
    """One call of the operator, described by what prints well when a test fails."""

    pattern: DilationPattern
    batch: int
    num_heads: int
    num_kv_heads: int
    length: int
    head_dim: int
    is_causal: bool = True
    scale: float | None = None
    padding: tuple[tuple[int, ...], ...] | None = None
    boundaries: tuple[int, ...] | None = None
    seed: int = 0

    def tensors(self, dtype=torch.float64, device="cpu") -> tuple[Tensor, Tensor, Tensor]:
        """Return query ``[B, H, L, D]``, key and value ``[B, G, L, D]``, random leaves that require gradients.

        The numbers are drawn in float32 and then rounded, so that every dtype sees the same ones.
        """
        generator = torch.Generator().manual_seed(self.seed)
        return tuple(
            torch.randn(self.batch, heads, self.length, self.head_dim, generator=generator)
            .to(device, dtype)
            .requires_grad_()
            for heads in (self.num_heads, self.num_kv_heads, self.num_kv_heads)
        )

    def cotangents(self, dtype=torch.float64, device="cpu") -> tuple[Tensor, Tensor]:
        """Return random weights for the output ``[B, H, L, D]`` and for the lse ``[B, H, L]``."""
        generator = torch.Generator().manual_seed(self.seed + 1)
        shape = (self.batch, self.num_heads, self.length)
        return (
            torch.randn(*shape, self.head_dim, generator=generator).to(device, dtype),
            torch.randn(*shape, generator=generator).to(device, dtype),
        )

    def options(self, device="cpu") -> dict:
        """Return the keyword arguments that the operator and the oracle share."""
        return {
            "is_causal": self.is_causal,
            "scale": self.scale,
            "attention_mask": None
            if self.padding is None
            else torch.tensor(self.padding, dtype=torch.long, device=device),
            "cu_seqlens": None
            if self.boundaries is None
            else torch.tensor(self.boundaries, dtype=torch.int32, device=device),
        }

    def rules(self) -> dict:
        """Return the pattern's fields as the plain values that the oracle takes."""
        return asdict(self.pattern)


@st.composite
def padding_masks(draw, batch: int, length: int) -> tuple[tuple[int, ...], ...]:
    """Draw a mask whose rows are padded left, right, on both sides, wholly, nowhere, or have holes."""
    rows = []
    for _ in range(batch):
        kind = draw(st.sampled_from(["left", "right", "both", "whole", "none", "holes"]))
        if kind == "holes":
            rows.append(tuple(draw(st.lists(st.integers(0, 1), min_size=length, max_size=length))))
            continue
        left = draw(st.integers(0, length)) if kind in ("left", "both") else 0
        right = draw(st.integers(0, length - left)) if kind in ("right", "both") else 0
        real = 0 if kind == "whole" else length - left - right
        rows.append((0,) * left + (1,) * real + (0,) * (length - left - real))
    return tuple(rows)


@st.composite
def calls(draw, max_length: int = 70) -> Call:
    """Draw a call: one document per row, padded rows, or documents packed into one row, empty ones among them."""
    layout = draw(st.sampled_from(["plain", "padded", "packed"]))
    batch = 1 if layout == "packed" else draw(st.integers(1, 3))
    length = draw(st.integers(0, max_length))
    num_kv_heads = draw(st.integers(1, 5))
    padding = boundaries = None
    if layout == "padded":
        padding = draw(padding_masks(batch, length))
    if layout == "packed":
        cuts = draw(st.lists(st.integers(0, length), max_size=4).map(sorted))
        boundaries = (0, *cuts, length)
    return Call(
        pattern=draw(patterns()),
        batch=batch,
        num_heads=num_kv_heads * draw(st.sampled_from([1, 1, 2, 3])),
        num_kv_heads=num_kv_heads,
        length=length,
        head_dim=draw(st.sampled_from([1, 3, 8, 16])),
        is_causal=draw(st.booleans()),
        scale=draw(st.sampled_from([None, 0.05, 1.5])),
        padding=padding,
        boundaries=boundaries,
        seed=draw(st.integers(0, 2**16)),
    )
