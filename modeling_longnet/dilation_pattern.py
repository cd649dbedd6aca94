"""The mathematics of LongNet's dilated attention: which keys a query reaches, and what that costs.

This module is the single source of truth for every backend, the cache and the converters. It knows nothing of
tensors and imports no torch. Positions are *logical*: the index of a real token inside its own document.

Paper: "LongNet: Scaling Transformers to 1,000,000,000 Tokens", https://arxiv.org/abs/2307.02486.
"""

import dataclasses
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd
from typing import Any, NamedTuple


HEAD_OFFSETS = ("interleaved", "blocked")
# The longest segment and rate: positions are counted in 64 bits, and sums of two have to fit.
LONGEST = 2**62
WINDOWS = ("segment", "sliding")

PRESETS: dict[str, dict[str, Any]] = {
    "paper": {"head_offsets": "interleaved", "count_overlaps": True, "dilate_queries": True, "window": "segment"},
    "torchscale": {"head_offsets": "blocked", "count_overlaps": True, "dilate_queries": True, "window": "segment"},
    "retrofit": {"head_offsets": "interleaved", "count_overlaps": False, "dilate_queries": False, "window": "sliding"},
}


class Branch(NamedTuple):
    """One (segment length ``w``, dilation rate ``r``) pair of a pattern."""

    segment_length: int
    dilation_rate: int

    def kept_before(self, position: int, offset: int) -> int:
        """Count the positions ``u < position`` with ``(u % w) % r == offset``."""
        segments, rest = divmod(position, self.segment_length)
        return segments * self.kept_per_segment(offset) + _rows(rest - offset, self.dilation_rate)

    def kept_sum_before(self, position: int, offset: int) -> int:
        """Sum the positions ``u < position`` with ``(u % w) % r == offset``."""
        w, r = self
        segments, rest = divmod(position, w)
        kept = self.kept_per_segment(offset)
        total = segments * _progression(offset, r, kept) + w * kept * (segments * (segments - 1) // 2)
        rows = _rows(rest - offset, r)
        return total + rows * segments * w + _progression(offset, r, rows)

    def kept_per_segment(self, offset: int) -> int:
        """Count the positions that one whole segment keeps."""
        return _rows(self.segment_length - offset, self.dilation_rate)


@dataclass(frozen=True)
class DilationPattern:
    """All branches of a dilated attention and the rules that say which keys a query reaches.

    Branch ``i`` of a KV head with offset ``s`` keeps key ``u`` iff ``(u % w_i) % r_i == s``. A query is active in the
    branch iff it is itself kept, or always with ``dilate_queries=False``. An active query reaches the kept keys of its
    own segment (``window="segment"``) or those less than ``w_i`` tokens away (``window="sliding"``), and only keys at
    or before it when the attention is causal. The branches are merged by their softmax denominators (Eq. 9-10 of the
    paper).

    The object is frozen, hashable and validates itself; equal patterns compare equal.

    Args:
        segment_lengths: ``w_i`` in tokens, one per branch.
        dilation_rates: ``r_i``, one per branch.
        head_offsets: ``"interleaved"`` gives KV head ``g`` the offset ``g % r`` (the paper), ``"blocked"`` gives
            ``g // ceil(G / r)`` (the official torchscale code).
        count_overlaps: True: a key reached by m branches counts m times in the softmax (the paper). False: every key
            counts once; needs a nested pattern.
        dilate_queries: True: a branch serves only the queries it keeps (the paper). False: it serves all queries.
        window: ``"segment"``: fixed blocks of ``w`` tokens (the paper). ``"sliding"``: the last ``w`` tokens.

    Raises:
        ValueError: if a field is malformed, or ``count_overlaps=False`` and the pattern is not nested: each segment
            length must divide the next, each rate must divide the next and its own segment length, and the offsets
            must be interleaved.
    """

    segment_lengths: tuple[int, ...]
    dilation_rates: tuple[int, ...]
    head_offsets: str = "interleaved"
    count_overlaps: bool = True
    dilate_queries: bool = True
    window: str = "segment"

    def __post_init__(self) -> None:
        object.__setattr__(self, "segment_lengths", _positive_integers("segment_lengths", self.segment_lengths))
        object.__setattr__(self, "dilation_rates", _positive_integers("dilation_rates", self.dilation_rates))
        if len(self.segment_lengths) != len(self.dilation_rates):
            raise ValueError(
                f"segment_lengths has {len(self.segment_lengths)} entries {list(self.segment_lengths)} but "
                f"dilation_rates has {len(self.dilation_rates)} {list(self.dilation_rates)}; give one rate per segment"
            )
        _choice("head_offsets", self.head_offsets, HEAD_OFFSETS)
        _choice("window", self.window, WINDOWS)
        _boolean("count_overlaps", self.count_overlaps)
        _boolean("dilate_queries", self.dilate_queries)
        if not self.count_overlaps and (problem := self._nesting_problem()):
            raise ValueError(f"count_overlaps=False needs a nested pattern, but {problem}; or use count_overlaps=True")

    @classmethod
    def preset(cls, name: str, segment_lengths: Sequence[int], dilation_rates: Sequence[int]) -> "DilationPattern":
        """Build a pattern with the rules of ``"paper"``, ``"torchscale"`` or ``"retrofit"``.

        Raises:
            ValueError: if the preset is unknown or the branches break its rules.
        """
        _choice("preset", name, tuple(PRESETS))
        segment_lengths = _positive_integers("segment_lengths", segment_lengths)
        return cls(segment_lengths, _positive_integers("dilation_rates", dilation_rates), **PRESETS[name])

    @classmethod
    def geometric(
        cls, first_segment: int, last_segment: int, ratio: int = 2, preset: str = "paper"
    ) -> "DilationPattern":
        """Build the branches ``w_i = first_segment * ratio**i`` up to ``last_segment``, with ``r_i = ratio**i``.

        This is the paper's choice: cost per token then grows with the logarithm of the context (Section 3.1).

        Raises:
            ValueError: if ``ratio < 2`` or ``last_segment`` is not ``first_segment`` times a power of ``ratio``.
        """
        for name, value in (("first_segment", first_segment), ("last_segment", last_segment), ("ratio", ratio)):
            _positive_integer(name, value)
        if ratio < 2:
            raise ValueError(f"ratio must be at least 2, got {ratio}")
        segment_lengths = [first_segment]
        while segment_lengths[-1] < last_segment:
            segment_lengths.append(segment_lengths[-1] * ratio)
        if segment_lengths[-1] != last_segment:
            near = (
                f"{segment_lengths[-2]} or {segment_lengths[-1]}" if len(segment_lengths) > 1 else f"{first_segment}"
            )
            raise ValueError(
                f"last_segment {last_segment} is not first_segment {first_segment} times a power of ratio {ratio}; "
                f"use {near}"
            )
        return cls.preset(preset, segment_lengths, [ratio**i for i in range(len(segment_lengths))])

    @property
    def held_heads(self) -> tuple[int, int] | None:
        """Which KV heads of how many a call holds, if not all of them: see ``of_heads``."""
        return None

    @property
    def branches(self) -> tuple[Branch, ...]:
        """The branches in order, each with ``segment_length`` and ``dilation_rate``."""
        return tuple(Branch(w, r) for w, r in zip(self.segment_lengths, self.dilation_rates))

    @property
    def is_nested(self) -> bool:
        """Whether the branches' reach minus the previous branch's is a band, as ``count_overlaps=False`` needs."""
        return self._nesting_problem() is None

    def is_ordinary(self, length: int) -> bool:
        """Whether on a document of ``length`` tokens this is ordinary attention: every key reached, exactly once."""
        undilated = self.dilation_rates[0] == 1 and self.segment_lengths[0] >= length
        return undilated and (len(self.segment_lengths) == 1 or not self.count_overlaps)

    def offset(self, branch_index: int, kv_head: int, num_kv_heads: int) -> int:
        """Return the offset of one KV head in one branch, ``0 <= offset < dilation_rate``."""
        rate = self.dilation_rates[branch_index]
        if self.head_offsets == "interleaved":
            return kv_head % rate
        return kv_head // -(-num_kv_heads // rate)

    def of_heads(self, first_head: int, all_heads: int) -> "PatternOfHeads":
        """Return this pattern for a call that holds only some of a model's KV heads, from ``first_head`` on."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(DilationPattern)}
        return PatternOfHeads(**fields, first_head=first_head, all_heads=all_heads)

    def offsets(self, num_kv_heads: int) -> list[list[int]]:
        """Return, per branch, the offset of each KV head.

        All query heads of one KV head share its offset.

        Raises:
            ValueError: if ``num_kv_heads`` is not positive.
        """
        _positive_integer("num_kv_heads", num_kv_heads)
        return [[self.offset(i, g, num_kv_heads) for g in range(num_kv_heads)] for i in range(len(self.branches))]

    def reach(self, position: int, kv_head: int, is_causal: bool = True, num_kv_heads: int | None = None) -> list[int]:
        """List the key positions that a query reaches, sorted, with multiplicity: slow, for people and tests.

        A key reached by m branches appears m times if ``count_overlaps`` and once otherwise. Without causality the
        document is taken to go on for ever to the right; cut the list at its length.

        Args:
            position: logical position of the query.
            kv_head: index of the KV head that serves the query's head.
            num_kv_heads: number of KV heads; only ``head_offsets="blocked"`` needs it.

        Raises:
            ValueError: if ``position`` or ``kv_head`` is negative, ``kv_head >= num_kv_heads``, or ``num_kv_heads``
                is missing for blocked offsets.
        """
        if position < 0 or kv_head < 0:
            raise ValueError(f"position and kv_head must not be negative, got {position} and {kv_head}")
        if num_kv_heads is None:
            if self.head_offsets == "blocked":
                raise ValueError('head_offsets="blocked" depends on the number of KV heads; pass num_kv_heads')
            num_kv_heads = kv_head + 1
        if kv_head >= num_kv_heads:
            raise ValueError(f"kv_head {kv_head} does not exist with num_kv_heads={num_kv_heads}")

        times_reached: Counter[int] = Counter()
        for i, (w, r) in enumerate(self.branches):
            offset = self.offset(i, kv_head, num_kv_heads)
            if self.dilate_queries and (position % w) % r != offset:
                continue
            if self.window == "segment":
                first = position - position % w
                last = first + w - 1
            else:
                first, last = max(0, position - w + 1), position + w - 1
            if is_causal:
                last = position
            times_reached.update(u for u in range(first, last + 1) if (u % w) % r == offset)
        return sorted(times_reached.elements() if self.count_overlaps else times_reached)

    def attention_flops(
        self,
        length: int,
        num_heads: int,
        head_dim: int,
        *,
        num_kv_heads: int | None = None,
        is_causal: bool = True,
        backward: bool = False,
    ) -> int:
        """Count the useful floating-point operations of one attention call on one document.

        Exactly ``4 * head_dim`` per reached (query, key) pair forward (two products), and ``10 * head_dim`` backward
        (five products), summed over all heads; the closed form costs O(branches * offsets), whatever the length.

        Args:
            length: tokens in the document.
            num_heads: query heads.
            head_dim: size of a head.
            num_kv_heads: KV heads, ``num_heads`` if None.
            is_causal: whether queries see only the past.
            backward: count the backward pass instead of the forward pass.
        """
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if length < 0 or head_dim < 1 or num_heads < 1 or num_kv_heads < 1 or num_heads % num_kv_heads:
            raise ValueError(
                f"need length >= 0, head_dim >= 1 and num_heads a multiple of num_kv_heads, got length={length}, "
                f"head_dim={head_dim}, num_heads={num_heads}, num_kv_heads={num_kv_heads}"
            )
        pairs = 0
        for i in range(len(self.branches)):
            heads_per_offset = Counter(self.offset(i, g, num_kv_heads) for g in range(num_kv_heads))
            pairs += sum(n * self._pairs(i, offset, length, is_causal) for offset, n in heads_per_offset.items())
        return pairs * (num_heads // num_kv_heads) * (10 if backward else 4) * head_dim

    def cache_entries(self, length: int) -> int:
        """Count the keys that a causal query can still need after ``length`` tokens, per KV head, at most.

        A query needs only the kept keys of the segments or windows that it lies in. In a nested pattern each branch
        adds only what lies outside the previous branch's window, ``(w_i - w_{i-1}) / r_i`` entries; otherwise a
        branch adds all its ``w_i / r_i``. The count stops growing at the longest segment.
        """
        if length < 0:
            raise ValueError(f"length must not be negative, got {length}")
        entries, covered = 0, 0
        for w, r in self.branches:
            window = min(w, length)
            entries += _rows(window - covered, r)
            covered = window if self.is_nested else 0
        return min(entries, length)

    def _pairs(self, branch_index: int, offset: int, length: int, is_causal: bool) -> int:
        """Count the (query, key) pairs that one branch adds for one head with this offset."""
        branch = self.branches[branch_index]
        pairs = self._pairs_within(branch, branch.segment_length, offset, length, is_causal)
        if not self.count_overlaps and branch_index > 0:
            # The previous branch already reaches this branch's keys inside its own, shorter window.
            previous = self.segment_lengths[branch_index - 1]
            pairs -= self._pairs_within(branch, previous, offset, length, is_causal)
        return pairs

    def _pairs_within(self, branch: Branch, window: int, offset: int, length: int, is_causal: bool) -> int:
        """Count the pairs of the branch's active queries and kept keys that share a segment or window of this size."""
        if self.window == "segment":
            return self._pairs_in_segments(branch, window, offset, length, is_causal)

        kept = branch.kept_before(length, offset)
        # Keys further than the window from the end serve a full window of queries to their right.
        full = branch.kept_before(max(0, length - window + 1), offset)
        if self.dilate_queries:
            per_full_key = (
                branch.kept_per_segment(offset)
                if window == branch.segment_length
                else _rows(window, branch.dilation_rate)
            )
            tail = kept - full
            causal = full * per_full_key + tail * (tail + 1) // 2
            return causal if is_causal else 2 * causal - kept

        tail_sum = branch.kept_sum_before(length, offset) - branch.kept_sum_before(max(0, length - window + 1), offset)
        causal = full * window + (kept - full) * length - tail_sum
        if is_causal:
            return causal
        # Queries to the left of key u: min(u, window - 1).
        start = min(window - 1, length)
        near_start = branch.kept_before(start, offset)
        return causal + branch.kept_sum_before(start, offset) + (kept - near_start) * (window - 1)

    def _pairs_in_segments(self, branch: Branch, window: int, offset: int, length: int, is_causal: bool) -> int:
        """Count pairs inside aligned blocks of ``window`` tokens; block ``j`` has the phase of ``j * window``."""
        w, r = branch
        if window == w:
            classes, period = [(0, offset)], 1
        else:  # nested: kept means u % r == offset, so blocks repeat their phase after at most r of them
            period = r // gcd(window, r)
            classes = [(j, (offset - j * window) % r) for j in range(period)]
        num_full, tail = divmod(length, window)
        pairs = 0
        for j, phase in classes:
            count = (num_full - j + period - 1) // period if num_full > j else 0
            pairs += count * self._pairs_in_block(window, r, phase, is_causal)
            if num_full % period == j:
                pairs += self._pairs_in_block(tail, r, phase, is_causal)
        return pairs

    def _pairs_in_block(self, size: int, rate: int, phase: int, is_causal: bool) -> int:
        rows = _rows(size - phase, rate)
        if self.dilate_queries:
            return rows * (rows + 1) // 2 if is_causal else rows * rows
        return rows * size - _progression(phase, rate, rows) if is_causal else rows * size

    def _nesting_problem(self) -> str | None:
        """Say in words which rule of a nested pattern is broken, None if none is."""
        if self.head_offsets != "interleaved":
            return f'head_offsets is "{self.head_offsets}"; use head_offsets="interleaved"'
        for i, (w, r) in enumerate(self.branches):
            if w % r:
                return f"dilation rate {r} does not divide its segment length {w}"
            if i == 0:
                continue
            previous = self.branches[i - 1]
            if w % previous.segment_length:
                return f"segment length {previous.segment_length} does not divide the next one, {w}"
            if r % previous.dilation_rate:
                return f"dilation rate {previous.dilation_rate} does not divide the next one, {r}"
        return None


@dataclass(frozen=True)
class PatternOfHeads(DilationPattern):
    """A pattern where KV head 0 of a call is head ``first_head`` of a model's ``all_heads``, and so on.

    A rank of tensor parallelism holds such a share; numbered from 0, its heads would have other heads' offsets.
    """

    first_head: int = 0
    all_heads: int = 1

    @property
    def held_heads(self) -> tuple[int, int]:
        """``(first_head, all_heads)``."""
        return self.first_head, self.all_heads

    def offset(self, branch_index: int, kv_head: int, num_kv_heads: int) -> int:
        """Return the offset of the call's KV head ``kv_head`` in one branch."""
        return super().offset(branch_index, self.first_head + kv_head, self.all_heads)


def _rows(span: int, rate: int) -> int:
    """Count the multiples ``0, rate, 2 * rate, ...`` below ``span``."""
    return max(0, -(-span // rate))


def _progression(first: int, step: int, count: int) -> int:
    """Sum ``count`` terms ``first, first + step, ...``."""
    return count * first + step * (count * (count - 1) // 2)


def _positive_integers(name: str, values: object) -> tuple[int, ...]:
    if isinstance(values, (str, bytes)) or not isinstance(values, Sequence):
        raise ValueError(f"{name} must be a list or tuple of positive integers, got {values!r}")
    if not values:
        raise ValueError(f"{name} is empty; a pattern needs at least one branch")
    for value in values:
        if not _is_positive_integer(value):
            raise ValueError(f"{name} must hold positive integers, got {value!r} in {list(values)}")
        if value > LONGEST:
            raise ValueError(f"{name} must hold at most 2^62 (positions are counted in 64 bits), got {value}")
    return tuple(values)


def _positive_integer(name: str, value: object) -> None:
    if not _is_positive_integer(value):
        raise ValueError(f"{name} must be a positive integer, got {value!r}")


def _is_positive_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def _boolean(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, got {value!r}")
