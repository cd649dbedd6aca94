"""Slices of a document: their halo is exactly what their queries reach outside, and their pieces are their reach."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st
from strategies import patterns

from modeling_longnet import DilationPattern
from modeling_longnet.dilated_attention_pieces import FULL, LOWER, Piece
from modeling_longnet.document_slices import (
    LEFT,
    LOCAL,
    Span,
    active_queries,
    halo_keys,
    halo_queries,
    slice_pieces,
    starts_like_a_document,
)


NUM_KV_HEADS = 3


@st.composite
def slices(draw) -> tuple[Span, int]:
    """Draw a slice and the length of its document."""
    length = draw(st.integers(1, 90))
    first = draw(st.integers(0, length - 1))
    return Span(first, draw(st.integers(first, length))), length


def branch_reach(pattern: DilationPattern, branch_index: int, head: int, query: int, length: int, is_causal: bool):
    """Count the keys that a query reaches through one branch, read off ``pattern.reach`` of truncated patterns."""

    def through(branches: int) -> Counter:
        if branches == 0:
            return Counter()
        fields = {
            "segment_lengths": pattern.segment_lengths[:branches],
            "dilation_rates": pattern.dilation_rates[:branches],
        }
        fields |= {
            name: getattr(pattern, name) for name in ("head_offsets", "count_overlaps", "dilate_queries", "window")
        }
        return Counter(DilationPattern(**fields).reach(query, head, is_causal, NUM_KV_HEADS))

    reached = through(branch_index + 1) - through(branch_index)
    return Counter({key: times for key, times in reached.items() if key < length})


def pairs_of(piece: Piece) -> list[tuple[int, int]]:
    """List the (query row number, key row number) pairs of a piece by brute force."""
    query, key, shape = piece
    return [
        (
            query.start + block * query.block_stride + residue + i * query.stride,
            key.start + block * key.block_stride + j * key.stride,
        )
        for block in range(query.blocks)
        for residue in range(query.residues)
        for i in range(query.rows)
        for j in range(key.rows)
        if shape == FULL or (j <= i if shape == LOWER else j >= i)
    ]


@given(patterns(), slices(), st.booleans())
def test_the_halo_is_exactly_what_the_queries_reach_outside_and_the_pieces_are_the_reach(pattern, drawn, is_causal):
    span, length = drawn
    for i, offsets in enumerate(pattern.offsets(NUM_KV_HEADS)):
        for head, offset in enumerate(offsets):
            expected = Counter(
                {
                    (query, key): times
                    for query in range(*span)
                    for key, times in branch_reach(pattern, i, head, query, length, is_causal).items()
                }
            )
            halo = halo_keys(pattern, i, offset, span, length, is_causal)
            held = {side: [u for p in keys.progressions() for u in p] for side, keys in halo.items()}
            assert all(len(keys) == len(held[side]) for side, keys in halo.items())
            outside = sorted({key for _, key in expected if not span.first <= key < span.stop})
            assert sorted(u for positions in held.values() for u in positions) == outside

            positions = {LOCAL: range(*span), **held}
            found = Counter(
                (span.first + query, positions[side][key])
                for side, piece in slice_pieces(pattern, i, offset, span, length, is_causal)
                for query, key in pairs_of(piece)
            )
            assert found == expected


@given(patterns(), slices(), st.booleans())
def test_the_queries_of_a_halo_are_the_active_ones_of_a_window_at_the_edge(pattern, drawn, is_causal):
    span, length = drawn
    for i, (w, r) in enumerate(pattern.branches):
        for head, offset in enumerate(pattern.offsets(NUM_KV_HEADS)[i]):
            for side, keys in halo_keys(pattern, i, offset, span, length, is_causal).items():
                if not len(keys):
                    continue
                held = {u for positions in keys.progressions() for u in positions}
                near = halo_queries(pattern, keys, side, span)
                assert near.first == span.first if side == LEFT else near.stop == span.stop
                assert near.tokens <= w
                queries = [
                    x for positions in active_queries(pattern, pattern.branches[i], offset, near) for x in positions
                ]
                assert queries == [x for x in range(*near) if not pattern.dilate_queries or x % w % r == offset]
                for query in range(*span):
                    reached = branch_reach(pattern, i, head, query, length, is_causal)
                    assert query in queries or not held & reached.keys()


@given(patterns(), slices(), st.booleans())
def test_no_side_of_a_halo_exceeds_segment_length_over_dilation_rate(pattern, drawn, is_causal):
    span, length = drawn
    for i, (w, r) in enumerate(pattern.branches):
        for offset in set(pattern.offsets(NUM_KV_HEADS)[i]):
            for keys in halo_keys(pattern, i, offset, span, length, is_causal).values():
                # A window that begins inside a segment may hold one key more where the rate does not divide.
                assert len(keys) <= -(-w // r) + (w % r != 0 and pattern.window == "sliding")


@given(patterns(), slices(), st.booleans())
def test_a_slice_that_starts_like_a_document_is_one(pattern, drawn, is_causal):
    span, length = drawn
    if not starts_like_a_document(pattern, span):
        return
    for head in range(NUM_KV_HEADS):
        for query in range(*span):
            inside = [u - span.first for u in pattern.reach(query, head, is_causal, NUM_KV_HEADS) if u in range(*span)]
            alone = pattern.reach(query - span.first, head, is_causal, NUM_KV_HEADS)
            assert inside == [u for u in alone if u < span.tokens]


def test_aligned_slices_start_like_documents_and_others_do_not():
    paper = DilationPattern.preset("paper", (8, 16, 32), (1, 2, 4))
    retrofit = DilationPattern.preset("retrofit", (8, 16, 32), (1, 2, 4))
    assert starts_like_a_document(paper, Span(64, 200))  # whole segments
    assert starts_like_a_document(paper, Span(16, 32))  # inside one segment of the longest branch
    assert not starts_like_a_document(paper, Span(16, 40))  # its edge at 32 falls inside
    assert starts_like_a_document(retrofit, Span(12, 100))  # sliding windows have no edges
    assert not starts_like_a_document(retrofit, Span(10, 100))  # 4 does not divide 10


def test_a_halo_costs_the_same_wherever_the_slice_begins_and_however_long_the_document():
    pattern = DilationPattern.geometric(2048, 2**20, preset="retrofit")

    def entries(first: int, length: int) -> int:
        span = Span(first, first + 2**20)
        halos = (halo_keys(pattern, i, 0, span, length, False) for i in range(len(pattern.branches)))
        return sum(len(keys) for halo in halos for keys in halo.values())

    bound = 2 * sum(w // r for w, r in pattern.branches)
    assert entries(2**20, 2**22) == entries(2**29, 2**30) == entries(2**39, 2**40)
    assert bound - 2 * len(pattern.branches) <= entries(2**29, 2**30) <= bound


def test_pieces_of_a_slice_are_few_however_long_the_document():
    for preset in ("paper", "torchscale", "retrofit"):
        pattern = DilationPattern.geometric(2048, 2**20, preset=preset)
        for span in (Span(2**39, 2**39 + 2**20), Span(2**39 + 12345, 2**39 + 2**20 + 999)):
            for i in range(len(pattern.branches)):
                assert sum(1 for _ in slice_pieces(pattern, i, 0, span, 2**40, False)) <= 100
