"""A slice of a document: which keys its queries reach outside it, and its attention as pieces.

A rank of a sequence-parallel group holds the positions ``[first, stop)`` of a document. What its queries reach beyond
them is its *halo*: per branch and KV head, the kept keys of the one segment (or window) that the slice's first query
lies in, and, without causality, of the one that its last query lies in. That is at most ``w_i / r_i`` keys per branch
and side, however long the document. A branch whose segments end where the slice begins has no halo at all.

This module is arithmetic: it imports no torch.
"""

from collections.abc import Iterator
from typing import NamedTuple

from .dilated_attention_pieces import FULL, LOWER, UPPER, Piece, Rows, reach_pieces
from .dilation_pattern import Branch, DilationPattern


LEFT, LOCAL, RIGHT = "left", "local", "right"  # where a key stands, seen from the slice


class Span(NamedTuple):
    """The positions ``first, ..., stop - 1`` of a document."""

    first: int
    stop: int

    def __and__(self, other: "Span") -> "Span":
        return Span(max(self.first, other.first), min(self.stop, other.stop))

    @property
    def tokens(self) -> int:
        return max(0, self.stop - self.first)


class KeptKeys(NamedTuple):
    """The keys of ``span`` that a branch keeps for one offset, in order: they are counted from 0."""

    branch: Branch
    offset: int
    span: Span

    def __len__(self) -> int:
        return self.index(self.span.stop) if self.span.tokens else 0

    def index(self, position: int) -> int:
        """Count the kept keys of the span before ``position``."""
        before = self.branch.kept_before(self.span.first, self.offset)
        return self.branch.kept_before(position, self.offset) - before

    def progressions(self) -> Iterator[range]:
        """Yield the kept positions as ranges: a single one if the rate divides the segment length."""
        w, r = self.branch
        if self.span.tokens == 0:
            return
        if w % r == 0:
            yield range(self.span.first + (self.offset - self.span.first) % r, self.span.stop, r)
            return
        for start in range(self.span.first - self.span.first % w, self.span.stop, w):
            inside = Span(start, start + w) & self.span
            first = start + self.offset
            yield range(first + r * max(0, -((first - inside.first) // r)), inside.stop, r)


class HaloBlock(NamedTuple):
    """The halo of one share, KV head, branch and side, and the row of the buffer of received keys where it begins."""

    share: int
    kv_head: int
    branch_index: int
    side: str
    keys: KeptKeys
    row: int

    @property
    def rows(self) -> slice:
        """The rows of the buffer where its keys stand, in order."""
        return slice(self.row, self.row + len(self.keys))


def halo_span(pattern: DilationPattern, branch_index: int, offset: int, span: Span, length: int, side: str) -> Span:
    """Return where the keys stand that a slice's queries reach on one side of it, through one branch.

    Theorem: the kept keys inside are exactly those that some query of the slice reaches through the branch (what the
    previous branch reaches is not counted unless ``pattern.count_overlaps``).

    Args:
        span: the slice.
        length: tokens in the document.
        side: ``LEFT``, or ``RIGHT`` for what a query reaches without causality.

    Returns:
        The span, empty (``first == stop``) if nothing is reached.
    """
    outside = Span(0, span.first) if side == LEFT else Span(span.stop, length)
    nothing = Span(span.first, span.first) if side == LEFT else Span(span.stop, span.stop)
    branch = pattern.branches[branch_index]
    w, r = branch
    queries = _active_queries(pattern, branch, offset, span)
    if queries is None:
        return nothing
    inner = 0 if pattern.count_overlaps or branch_index == 0 else pattern.segment_lengths[branch_index - 1]
    if pattern.window == "segment":
        near = queries[0 if side == LEFT else 1]
        segment = Span(near - near % w, near - near % w + w)
        if not inner:
            reached = segment
        else:  # all but the block of the query that is farthest from the edge
            first, last = _active_queries(pattern, branch, offset, span & segment)
            far = last if side == LEFT else first
            block = far - far % inner
            reached = Span(segment.first, block) if side == LEFT else Span(block + inner, segment.stop)
    elif inner > w - (r if pattern.dilate_queries else 1):
        return nothing  # no distance between a query and a key is left to this branch
    elif side == LEFT:
        reached = Span(queries[0] - w + 1, queries[1] - inner + 1)
    else:
        reached = Span(queries[0] + inner, queries[1] + w)
    reached &= outside
    return reached if reached.tokens else nothing


def active_queries(pattern: DilationPattern, branch: Branch, offset: int, span: Span) -> list[range]:
    """Return the queries of a span that a branch serves for one offset, in order: all, or those that it keeps."""
    positions = KeptKeys(branch, offset, span).progressions() if pattern.dilate_queries else [range(*span)]
    return [progression for progression in positions if progression]


def _active_queries(pattern: DilationPattern, branch: Branch, offset: int, span: Span) -> tuple[int, int] | None:
    """Return the slice's first and last query that the branch serves for one offset, None if it serves none."""
    progressions = active_queries(pattern, branch, offset, span)
    return (progressions[0][0], progressions[-1][-1]) if progressions else None


def halo_queries(pattern: DilationPattern, keys: KeptKeys, side: str, span: Span) -> Span:
    """Return where in a slice the queries stand that reach the halo ``keys`` on one side: no query beyond does."""
    w = keys.branch.segment_length
    if side == LEFT:
        near = keys.span.stop - 1
        return span & Span(span.first, near + w if pattern.window == "sliding" else near - near % w + w)
    near = keys.span.first
    return span & Span(near - w + 1 if pattern.window == "sliding" else near - near % w, span.stop)


def halo_keys(
    pattern: DilationPattern, branch_index: int, offset: int, span: Span, length: int, is_causal: bool
) -> dict[str, KeptKeys]:
    """Return the halo of one branch and offset, per side."""
    sides = (LEFT,) if is_causal else (LEFT, RIGHT)
    branch = pattern.branches[branch_index]
    return {
        side: KeptKeys(branch, offset, halo_span(pattern, branch_index, offset, span, length, side)) for side in sides
    }


def slice_pieces(
    pattern: DilationPattern, branch_index: int, offset: int, span: Span, length: int, is_causal: bool
) -> Iterator[tuple[str, Piece]]:
    """Yield the pieces that one branch adds for the queries of a slice, told apart by where their keys stand.

    Theorem: they hold each (query, key) pair of the document, with a query in the slice, as often as ``pattern.reach``
    lists it.

    Yields:
        ``(side, piece)``. Query rows are counted from the slice's first token, and so are key rows if ``side`` is
        ``LOCAL``; otherwise they count the keys of ``halo_keys``.
    """
    halo = halo_keys(pattern, branch_index, offset, span, length, is_causal)
    for piece in reach_pieces(pattern, branch_index, offset, length, is_causal):
        for local in cut_piece(piece, span, span):
            key = local.key._replace(start=local.key.start - span.first)
            yield LOCAL, local._replace(query=local.query._replace(start=local.query.start - span.first), key=key)
        for side, keys in halo.items():
            for far in cut_piece(piece, span, keys.span):
                for block in range(far.query.blocks):
                    query, key = (_block(rows, block) for rows in (far.query, far.key))
                    key = Rows(keys.index(key.start), key.rows, 1)
                    yield side, Piece(query._replace(start=query.start - span.first), key, far.shape)


def starts_like_a_document(pattern: DilationPattern, span: Span) -> bool:
    """Whether a slice's queries and keys among themselves are those of a document of its own.

    So it is where every segment length divides the slice's first position, or the rate does and no edge of a segment
    falls inside the slice (or edges mean nothing, as in nested sliding windows).
    """
    for w, r in pattern.branches:
        if span.first % w == 0:
            continue
        edges_matter = pattern.window == "segment" or w % r != 0
        if edges_matter and span.first % w + span.tokens > w:
            return False
        if (span.first % w if edges_matter else span.first) % r != 0:
            return False
    return True


def cut_piece(piece: Piece, queries: Span, keys: Span) -> Iterator[Piece]:
    """Yield the parts of a piece whose queries and keys stand inside two spans."""
    query, key, _ = piece
    if queries.tokens == 0 or keys.tokens == 0:
        return
    touched = _touched_blocks(query, queries) & _touched_blocks(key, keys)
    whole = _whole_blocks(query, queries) & _whole_blocks(key, keys) & touched
    if whole.tokens:
        moved = [
            rows._replace(start=rows.start + whole.first * rows.block_stride, blocks=whole.tokens)
            for rows in (query, key)
        ]
        yield Piece(*moved, piece.shape)
    else:
        whole = Span(touched.first, touched.first)
    for block in (*range(touched.first, whole.first), *range(whole.stop, touched.stop)):
        yield from _cut_block(_block(query, block), _block(key, block), piece.shape, queries, keys)


def _block(rows: Rows, block: int) -> Rows:
    return rows._replace(start=rows.start + block * rows.block_stride, blocks=1, block_stride=0)


def _last(rows: Rows) -> int:
    """Return the last token of the first block."""
    return rows.start + (rows.rows - 1) * rows.stride + rows.residues - 1


def _touched_blocks(rows: Rows, span: Span) -> Span:
    """Return the blocks that may have a token in the span."""
    if rows.blocks == 1:
        return Span(0, int(rows.start < span.stop and _last(rows) >= span.first))
    step = rows.block_stride
    return Span(-((_last(rows) - span.first) // step), -((rows.start - span.stop) // step)) & Span(0, rows.blocks)


def _whole_blocks(rows: Rows, span: Span) -> Span:
    """Return the blocks whose tokens are all in the span."""
    if rows.blocks == 1:
        return Span(0, int(rows.start >= span.first and _last(rows) < span.stop))
    step = rows.block_stride
    return Span(-((rows.start - span.first) // step), (span.stop - 1 - _last(rows)) // step + 1) & Span(0, rows.blocks)


def _cut_block(query: Rows, key: Rows, shape: str, queries: Span, keys: Span) -> Iterator[Piece]:
    """Cut a piece of one block; residues on either side of an edge of ``queries`` have different rows."""
    first_key, stop_key = _rows_inside(key, keys)
    edges = {0, query.residues}
    edges |= {edge for edge in ((x - query.start) % query.stride for x in queries) if edge < query.residues}
    for low, high in zip(sorted(edges), sorted(edges)[1:]):
        group = query._replace(start=query.start + low, residues=high - low)
        first, stop = _rows_inside(group._replace(residues=1), queries)
        yield from _cut_rows(group, first, stop, key, first_key, stop_key, shape)


def _rows_inside(rows: Rows, span: Span) -> tuple[int, int]:
    first = max(0, -((rows.start - span.first) // rows.stride))
    return first, min(rows.rows, -((rows.start - span.stop) // rows.stride))


def _cut_rows(
    query: Rows, first: int, stop: int, key: Rows, first_key: int, stop_key: int, shape: str
) -> Iterator[Piece]:
    """Yield what a piece has in query rows ``[first, stop)`` and key rows ``[first_key, stop_key)``."""

    def part(a: int, b: int, j: int, k: int, shape: str = FULL) -> Iterator[Piece]:
        if a < b and j < k:
            yield Piece(query.cut(a, b - a), key.cut(j, k - j), shape)

    # The square on the diagonal, rows and keys [low, high), and the rectangles beside it.
    low, high = max(first, first_key), min(stop, stop_key)
    if shape == FULL:
        yield from part(first, stop, first_key, stop_key)
    elif shape == LOWER:
        yield from part(low, high, first_key, low)
        if low < high:
            yield from part(low, high, low, high, LOWER)
        yield from part(max(first, stop_key), stop, first_key, stop_key)
    else:
        yield from part(first, min(stop, first_key), first_key, stop_key)
        if low < high:
            yield from part(low, high, low, high, UPPER)
        yield from part(low, high, high, stop_key)
