"""Where tokens stand in the cache: one slot each, never taken over while a query can reach what stands there."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import nested_patterns, patterns

from modeling_longnet import DilationPattern
from modeling_longnet.cache_slots import offset_of_heads, plan_slots


@given(pattern=patterns(), length=st.integers(1, 130), num_kv_heads=st.integers(1, 5), far=st.booleans())
def test_what_a_query_reaches_stands_in_slots_of_its_own(pattern, length, num_kv_heads, far):
    slots = plan_slots(pattern, length)
    tokens = length if not slots.is_endless else length + 70
    start = 2**33 if far and slots.is_endless else 0
    places = slots.locate(torch.arange(start, start + tokens)[None, None], num_kv_heads)
    for head in range(num_kv_heads):
        held = {}
        for position, slot, branches in zip(
            range(start, start + tokens), places.slots[0, head].tolist(), places.branches[0, head].tolist()
        ):
            kept = [
                i for i, (w, r) in enumerate(pattern.branches)
                if (position % w) % r == pattern.offset(i, head, num_kv_heads)
            ]  # fmt: skip
            assert branches == sum(2**i for i in kept)
            assert 0 <= slot <= slots.capacity
            if slot < slots.capacity:
                held[slot] = position
            elif kept:
                raise AssertionError(f"token {position} is kept by branches {kept} and has no slot")
            for u in pattern.reach(position, head, True, num_kv_heads):
                assert u < start or u in held.values(), f"query {position} misses {u}"


@pytest.mark.parametrize("window", ["segment", "sliding"])
@pytest.mark.parametrize("second", [None, (7, 3), (16, 4), (11, 2)], ids=str)
def test_nothing_takes_a_slot_while_a_query_can_reach_what_stands_there(window, second):
    for branch in itertools.product(range(1, 13), range(1, 7)):
        pattern = DilationPattern(*zip(*filter(None, (branch, second))), dilate_queries=False, window=window)
        longest = max(pattern.segment_lengths)
        for length in (longest, longest + 3, 2 * longest + 1):
            places = plan_slots(pattern, length).locate(torch.arange(3 * longest + 7)[None, None], 2)
            for head in range(2):
                held = {}
                for position, slot in enumerate(places.slots[0, head].tolist()):
                    before, held[slot] = held.get(slot), position
                    if before is not None:
                        assert before not in pattern.reach(position, head), (pattern, length, slot, before, position)


@given(pattern=patterns(), length=st.integers(1, 200))
def test_the_capacity_is_the_formula_of_the_pattern(pattern, length):
    slots = plan_slots(pattern, length)
    entries = pattern.cache_entries(length)
    # Up to one more where the last ring holds a part of its window, since two fractions are then rounded.
    assert entries <= slots.capacity + (0 if not pattern.is_nested else 1)
    assert slots.capacity <= entries + pattern.is_nested
    if slots.is_endless:
        assert slots.capacity == entries or slots.is_linear


@given(pattern=nested_patterns())
def test_a_nested_pattern_fills_every_slot(pattern):
    longest = max(pattern.segment_lengths)
    slots = plan_slots(pattern, longest)
    tokens = 2 * longest * max(pattern.dilation_rates)
    places = slots.locate(torch.arange(tokens)[None, None], 3)
    for taken in places.slots[0].tolist():
        assert set(range(slots.capacity)) <= set(taken) <= set(range(slots.capacity + 1))


@pytest.mark.parametrize("head_offsets", ["interleaved", "blocked"])
def test_offsets_on_the_device_are_those_of_the_pattern(head_offsets):
    pattern = DilationPattern((8, 20, 64), (1, 3, 16), head_offsets=head_offsets)
    for num_kv_heads in (1, 2, 5, 8, 33):
        heads = torch.arange(num_kv_heads)[:, None]
        for i, expected in enumerate(pattern.offsets(num_kv_heads)):
            assert offset_of_heads(pattern, i, heads).flatten().tolist() == expected
