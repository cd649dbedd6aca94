"""A pattern's reach as a few rectangles and triangles of strided rows, each an ordinary attention call.

The kept keys of a branch are affine: token = start + block * block_stride + row * stride. So are the queries that
reach them, once dense queries are told apart by their residue modulo the dilation rate. In these coordinates every
branch is made of three shapes only: all keys for all queries (``FULL``), and squares where query row ``a`` sees key
rows ``j <= a`` (``LOWER``) or ``j >= a`` (``UPPER``). No shape needs a mask tensor, and together they hold exactly the
(query, key) pairs of ``DilationPattern.reach``, with multiplicity. This module is arithmetic: it imports no torch.
"""

from collections.abc import Iterator
from typing import NamedTuple

from .dilation_pattern import DilationPattern


FULL, LOWER, UPPER = "full", "lower", "upper"


class Rows(NamedTuple):
    """The tokens ``start + block * block_stride + residue + row * stride``."""

    start: int
    rows: int
    stride: int
    blocks: int = 1
    block_stride: int = 0
    residues: int = 1

    def cut(self, first: int, rows: int) -> "Rows":
        """Keep ``rows`` rows from row ``first`` on."""
        return self._replace(start=self.start + first * self.stride, rows=rows)

    def mirror(self, length: int) -> "Rows":
        """Map every token ``p`` to ``length - 1 - p``; blocks, rows and residues come in reverse order."""
        last = self.start + (self.blocks - 1) * self.block_stride + (self.rows - 1) * self.stride + (self.residues - 1)
        return self._replace(start=length - 1 - last)


class Piece(NamedTuple):
    """One attention call: block ``b`` of the queries, every residue, attends block ``b`` of the keys."""

    query: Rows
    key: Rows
    shape: str


def reach_pieces(
    pattern: DilationPattern, branch_index: int, offset: int, length: int, is_causal: bool
) -> Iterator[Piece]:
    """Yield the pieces that one branch adds for the heads of one offset, on one document.

    Theorem: over all branches, the pieces hold each (query, key) pair as often as ``pattern.reach`` lists it.

    Args:
        pattern: the branches and their rules.
        branch_index: which branch.
        offset: first kept position in a segment, ``0 <= offset < dilation_rate``.
        length: tokens in the document.
        is_causal: whether queries see only the past.
    """
    w, r = pattern.branches[branch_index]
    inner = 0 if pattern.count_overlaps or branch_index == 0 else pattern.segment_lengths[branch_index - 1]
    if inner >= length > 0 or inner == w:
        return  # the previous branch reaches everything already
    dense = not pattern.dilate_queries
    if pattern.window == "segment":
        for segment in _segments(length, w):
            if inner:
                yield from _segment_band(segment, inner, r, offset, dense, is_causal)
            else:
                yield from _within_segment(segment, r, offset, dense, is_causal)
    elif inner:
        yield from _sliding_band(length, w, inner, r, offset, dense)
        if not is_causal:  # the future side is the past side of the mirrored document
            for query, key, shape in _sliding_band(length, w, inner, r, (length - 1 - offset) % r, dense):
                shape = {FULL: FULL, LOWER: UPPER, UPPER: LOWER}[shape]
                yield Piece(query.mirror(length), key.mirror(length), shape)
    else:
        for segment in _segments(length, w):
            yield from _within_segment(segment, r, offset, dense, is_causal)
        yield from _previous_segment(length, w, r, offset, dense)
        if not is_causal:
            yield from _next_segment(length, w, r, offset, dense)


class _Segments(NamedTuple):
    """``blocks`` segments of ``size`` tokens, the first at ``start``, each ``block_stride`` after the one before."""

    start: int
    size: int
    blocks: int
    block_stride: int

    def rows(self, first: int, rows: int, stride: int, residues: int = 1) -> Rows:
        return Rows(self.start + first, rows, stride, self.blocks, self.block_stride, residues)

    def kept(self, rate: int, offset: int) -> Rows:
        return self.rows(offset, _count(self.size - offset, rate), rate)

    def residue_groups(self, rate: int, offset: int, dense: bool, split: int = 0) -> Iterator[tuple[int, Rows]]:
        """Yield the queries at ``offset + residue + row * rate``, grouped so that each group has one row count.

        Without ``dense`` only residue 0 asks. ``split`` also parts the residues below it from the rest.

        Yields:
            ``(first residue of the group, its rows)``.
        """
        if not dense:
            yield 0, self.kept(rate, offset)
            return
        longest = _count(self.size - offset, rate)
        if longest == 0:
            return
        with_longest = self.size - offset - rate * (longest - 1)  # residues below this have one row more
        edges = sorted({0, min(split, rate), min(with_longest, rate), rate})
        for low, high in zip(edges, edges[1:]):
            rows = longest if low < with_longest else longest - 1
            yield low, self.rows(offset + low, rows, rate, high - low)


def _segments(length: int, size: int) -> Iterator[_Segments]:
    """Yield the whole segments of a document as one group and its ragged last one as another."""
    whole, tail = divmod(length, size)
    if whole:
        yield _Segments(0, size, whole, size)
    if tail:
        yield _Segments(whole * size, tail, 1, 0)


def _within_segment(segment: _Segments, rate: int, offset: int, dense: bool, is_causal: bool) -> Iterator[Piece]:
    key = segment.kept(rate, offset)
    if is_causal:
        for _, query in segment.residue_groups(rate, offset, dense):
            yield from _lower(query, key)
    else:
        yield from _full(segment.rows(0, segment.size, 1) if dense else key, key)


def _segment_band(
    segment: _Segments, inner: int, rate: int, offset: int, dense: bool, is_causal: bool
) -> Iterator[Piece]:
    """Keys of the segment outside the query's own block of ``inner`` tokens."""
    for low in range(0, segment.size, inner):
        high = min(low + inner, segment.size)
        if dense:
            query = segment.rows(low, high - low, 1)
        else:
            first = low + (offset - low) % rate
            query = segment.rows(first, _count(high - first, rate), rate)
        yield from _full(query, segment.rows(offset, _count(low - offset, rate), rate))
        if not is_causal:
            first = high + (offset - high) % rate
            yield from _full(query, segment.rows(first, _count(segment.size - first, rate), rate))


def _previous_segment(length: int, size: int, rate: int, offset: int, dense: bool) -> Iterator[Piece]:
    """Keys of the segment before the query's that are less than ``size`` tokens away: those of later phase."""
    for query_segment in _segments(length, size):
        if query_segment.start == 0:  # the first segment has none before it
            query_segment = query_segment._replace(start=size, blocks=query_segment.blocks - 1)
        if query_segment.blocks == 0 or query_segment.start >= length:
            continue
        key = query_segment._replace(start=query_segment.start - size, size=size).kept(rate, offset)
        if dense:  # queries before the first kept phase see all of them
            yield from _full(query_segment.rows(0, min(offset, query_segment.size), 1), key)
        for _, query in query_segment.residue_groups(rate, offset, dense):
            yield from _strict_upper(query, key)


def _next_segment(length: int, size: int, rate: int, offset: int, dense: bool) -> Iterator[Piece]:
    """Keys of the segment after the query's that are less than ``size`` tokens away: those of earlier phase."""
    for key_segment in _segments(length, size):
        if key_segment.start == 0:
            key_segment = key_segment._replace(start=size, blocks=key_segment.blocks - 1)
        if key_segment.blocks == 0 or key_segment.start >= length:
            continue
        query_segment = key_segment._replace(start=key_segment.start - size, size=size)
        key = key_segment.kept(rate, offset)
        for first_residue, query in query_segment.residue_groups(rate, offset, dense, split=1):
            if first_residue == 0:  # the key one segment on from the query itself is exactly ``size`` away: too far
                query = query.cut(1, query.rows - 1)
            yield from _lower(query, key)


def _sliding_band(length: int, outer: int, inner: int, rate: int, offset: int, dense: bool) -> Iterator[Piece]:
    """Past keys at least ``inner`` and less than ``outer`` tokens away, in a nested pattern (kept: u % rate == offset).

    In rows of one residue the band is ``j in (a - outer/rate, a - shift]``: a sliding window of ``width`` rows that
    lags ``shift`` rows behind its query.
    """
    document = _Segments(0, length, 1, 0)
    key = document.kept(rate, offset)
    for first_residue, query in document.residue_groups(rate, offset, dense, split=inner % rate):
        shift = _count(inner - first_residue, rate)
        width = outer // rate - shift
        if width <= 0 or query.rows <= shift:
            continue
        query = query.cut(shift, query.rows - shift)
        whole, tail = divmod(query.rows, width)
        step = width * rate
        tail_query = query.cut(whole * width, tail)
        if whole:
            blocks = {"rows": width, "blocks": whole, "block_stride": step}
            yield from _lower(query._replace(**blocks), key._replace(**blocks))
            blocks["blocks"] = whole - 1
            later = query.cut(width, width)._replace(**blocks)
            yield from _strict_upper(later, key._replace(**blocks))
            yield from _strict_upper(tail_query, key.cut((whole - 1) * width, width))
        yield from _lower(tail_query, key.cut(whole * width, tail))


def _full(query: Rows, key: Rows) -> Iterator[Piece]:
    if min(query.rows, key.rows, query.blocks) > 0:
        yield Piece(query, key, FULL)


def _lower(query: Rows, key: Rows) -> Iterator[Piece]:
    """Query row ``a`` sees key rows ``j <= a``."""
    side = min(query.rows, key.rows)
    if side > 0 and query.blocks > 0:
        yield Piece(query.cut(0, side), key.cut(0, side), LOWER)
        yield from _full(query.cut(side, query.rows - side), key)


def _strict_upper(query: Rows, key: Rows) -> Iterator[Piece]:
    """Query row ``a`` sees key rows ``j > a``."""
    side = min(query.rows, key.rows - 1)
    if side > 0 and query.blocks > 0:
        yield Piece(query.cut(0, side), key.cut(1, side), UPPER)
        yield from _full(query.cut(0, side), key.cut(side + 1, key.rows - side - 1))


def _count(span: int, rate: int) -> int:
    """Count the multiples ``0, rate, 2 * rate, ...`` below ``span``."""
    return max(0, -(-span // rate))
