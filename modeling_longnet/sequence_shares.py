"""Which documents a rank holds a share of, and where those documents' other shares are.

Every rank sums its rows up in five numbers; from all ranks' numbers each works out the same map. A document that lies
on one rank alone is that rank's own affair and is on no map.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist

from .document_slices import Span
from .sequence_group import gather_numbers


class Part(NamedTuple):
    """A document, or the piece of one, that a rank's row holds: ``tokens`` from ``start`` on, in the packed order."""

    row: int
    start: int
    tokens: int


class Holder(NamedTuple):
    """A rank, and the positions of a document that it holds."""

    rank: int
    span: Span


class Document(NamedTuple):
    """A document that several ranks hold, in order."""

    row: int
    holders: tuple[Holder, ...]

    @property
    def length(self) -> int:
        return self.holders[-1].span.stop

    def span_of(self, rank: int) -> Span:
        """Return the positions that a rank holds, none if it is no holder."""
        return next((holder.span for holder in self.holders if holder.rank == rank), Span(0, 0))


class Share(NamedTuple):
    """What a rank holds of one document: its tokens stand at ``[row, :, start : start + span.tokens]``.

    ``document`` is None if no other rank holds any of it.
    """

    row: int
    start: int
    span: Span
    document: Document | None = None

    @property
    def columns(self) -> slice:
        return slice(self.start, self.start + self.span.tokens)


class SequenceSlice(NamedTuple):
    """A rank's slice of a batch: its group, its shares in order, and the map of all documents on several ranks."""

    group: dist.ProcessGroup
    shares: tuple[Share, ...]
    documents: tuple[Document, ...]
    longest: int  # tokens that no document exceeds
    packed: bool = False  # whether a row holds several documents, on whatever ranks


def find_shares(
    group: dist.ProcessGroup,
    parts: Sequence[Part],
    num_rows: int,
    length: int,
    packed: bool,
    ends: dict[int, tuple[int, int]] | None,
    device: torch.device,
) -> SequenceSlice:
    """Work out, together with all ranks, which parts at the edges of the slices belong to one document.

    Args:
        parts: this rank's, row by row, none of them empty.
        num_rows: rows of the batch.
        length: tokens of a slice of a row, padding included.
        packed: whether the tensors to come hold all parts in one row; otherwise each row holds its own.
        ends: the given position of the first and of the last token of each row that has any; a slice goes on with the
            document before it if its first position follows the last one there. None: every row is one document.
        device: where the group's tensors live.
    """
    rows = [[part for part in parts if part.row == row] for row in range(num_rows)]
    summaries: list[int] = []
    for row, row_parts in enumerate(rows):
        if row_parts:
            first, last = ends[row] if ends is not None else (0, 0)
            summaries += [len(row_parts), row_parts[0].tokens, row_parts[-1].tokens, first, last]
        else:
            summaries += [0] * 5
    everyone = gather_numbers(group, device, summaries, "the search for documents on several ranks")
    tables = [[numbers[5 * row : 5 * row + 5] for numbers in everyone] for row in range(num_rows)]
    chains = [_row_documents(row, table, ends is not None) for row, table in enumerate(tables)]
    documents = tuple(document for row_chains in chains for document in row_chains if len(document.holders) > 1)
    several = any(len(row_chains) > 1 for row_chains in chains)
    shares = tuple(_shares(group.rank(), parts, rows, packed, documents))
    return SequenceSlice(group, shares, documents, group.size() * length, several)


def whole_rows(group: dist.ProcessGroup, num_rows: int, length: int) -> SequenceSlice:
    """Return the slice where every row is one document, without padding, that all ranks hold ``length`` tokens of."""
    holders = tuple(Holder(rank, Span(rank * length, (rank + 1) * length)) for rank in range(group.size()))
    mine = holders[group.rank()].span
    if group.size() == 1 or length == 0:
        return SequenceSlice(group, tuple(Share(row, 0, mine) for row in range(num_rows)), (), length)
    documents = tuple(Document(row, holders) for row in range(num_rows))
    shares = tuple(Share(row, 0, mine, documents[row]) for row in range(num_rows))
    return SequenceSlice(group, shares, documents, group.size() * length)


def _row_documents(row: int, table: Sequence[Sequence[int]], positions_given: bool) -> list[Document]:
    """Chain the parts at the edges of the slices of one row into documents."""
    documents: list[Document] = []
    chain: list[Holder] = []
    last_position = 0

    def close() -> None:
        if chain:
            documents.append(Document(row, tuple(chain)))
        chain.clear()

    for rank, (num_parts, first_tokens, last_tokens, first, last) in enumerate(table):
        if num_parts == 0:
            continue
        if positions_given and first != last_position + 1:
            close()
        start = chain[-1].span.stop if chain else 0
        chain.append(Holder(rank, Span(start, start + first_tokens)))
        if num_parts > 1:
            close()
            chain.append(Holder(rank, Span(0, last_tokens)))
        last_position = last
    close()
    return documents


def _shares(
    rank: int, parts: Sequence[Part], rows: Sequence[Sequence[Part]], packed: bool, documents: Sequence[Document]
):
    for part in parts:
        document = None
        for candidate in documents:
            span = candidate.span_of(rank)
            if candidate.row != part.row or span.tokens == 0:
                continue
            # What the rank holds of a document is its row's first part, unless the document begins here: then the last.
            if part is rows[part.row][-1 if span.first == 0 else 0]:
                document = candidate
        span = document.span_of(rank) if document is not None else Span(0, part.tokens)
        yield Share(0 if packed else part.row, part.start, span, document)
