"""The ranges of sorted keys that queries take: together exactly the pairs of the pattern, over any cache."""

from collections import Counter

import torch
from hypothesis import example, given
from hypothesis import strategies as st
from strategies import patterns
from tiny_models import left_padding

from modeling_longnet import DilationPattern
from modeling_longnet.cache_layer import LongNetCacheLayer
from modeling_longnet.reach_ranges import plan_ranges


COARSE = DilationPattern((8, 16, 32), (2, 4, 8), count_overlaps=False, dilate_queries=False, window="sliding")
COUNTED_ONCE = DilationPattern((8, 16, 32), (1, 2, 4), count_overlaps=False)


@given(
    pattern=patterns(),
    chunks=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    padding=st.integers(0, 9),
    num_kv_heads=st.integers(1, 3),
)
@example(COARSE, [20, 1, 30], 3, 2)
@example(COUNTED_ONCE, [20, 1, 30], 3, 2)
def test_the_ranges_hold_each_pair_as_often_as_it_counts(pattern, chunks, padding, num_kv_heads):
    length = sum(chunks)
    mask = left_padding(0, min(padding, length - 1), length=length)
    layer = LongNetCacheLayer(pattern)
    for positions in torch.where(mask > 0, mask.cumsum(-1) - 1, -1).split(chunks, dim=1):
        nothing = torch.zeros(2, num_kv_heads, positions.shape[1], 1)
        layer.update(nothing, nothing, positions=positions)
        reached = [[[Counter() for _ in row] for _ in range(num_kv_heads)] for row in positions.tolist()]
        for queries, keys, first, stop in plan_ranges(
            pattern, positions, layer.attended_positions, layer.attended_branches
        ):
            if queries is None:
                queries = torch.arange(positions.shape[1]).expand(2, num_kv_heads, -1)
            found = layer.attended_positions.flatten()[keys].view(2, num_kv_heads, -1)
            for row, head, group, i in torch.cartesian_prod(*map(torch.arange, first.shape)).tolist():
                of_query = found[row, head, first[row, head, group, i] : stop[row, head, group, i]]
                reached[row][head][queries[row, head, i]].update(of_query.tolist())
        for row, of_row in enumerate(positions.tolist()):
            for head in range(num_kv_heads):
                for p, counts in zip(of_row, reached[row][head]):
                    expected = pattern.reach(p, head, num_kv_heads=num_kv_heads) if p >= 0 else []
                    assert sorted(counts.elements()) == expected, (p, head)
