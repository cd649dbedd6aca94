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


@given(
    pattern=patterns(),
    length=st.integers(1, 130),
    num_kv_heads=st.integers(1, 5),
    far=st.booleans(),
    seen=st.lists(st.integers(0, 200), min_size=1, max_size=3),
)
def test_the_newest_token_of_each_slot_is_the_last_that_locate_puts_there(pattern, length, num_kv_heads, far, seen):
    slots = plan_slots(pattern, length)
    start = 2**33 if far and slots.is_endless else 0
    seen = [start + (n if slots.is_endless else min(n, length)) for n in seen]
    before = length + max(pattern.segment_lengths) * max(
        pattern.dilation_rates
    )  # earlier tokens have no slot any more
    newest, branches = slots.newest(torch.tensor(seen), num_kv_heads)
    for row, stop in enumerate(seen):
        tokens = torch.arange(max(0, stop - before), stop)
        places = slots.locate(tokens[None, None], num_kv_heads)
        for head in range(num_kv_heads):
            held = dict(zip(places.slots[0, head].tolist(), zip(tokens.tolist(), places.branches[0, head].tolist())))
            held.pop(slots.capacity, None)  # takes what nobody keeps
            found = zip(newest[row, head].tolist(), branches[row, head].tolist())
            found = {slot: token for slot, token in enumerate(found) if token[0] >= 0}
            if not pattern.is_nested:  # a slot whose token is out of reach may count as empty
                reach = set(pattern.reach(stop, head, True, num_kv_heads)) if not pattern.dilate_queries else None
                dead = {
                    slot for slot, (position, bits) in held.items()
                    if all(
                        stop - position >= w if pattern.window == "sliding" else stop // w > position // w
                        for i, (w, _) in enumerate(pattern.branches) if bits >> i & 1
                    )
                }  # fmt: skip
                assert reach is None or not reach & {held[slot][0] for slot in dead}
                held = {slot: token for slot, token in held.items() if slot not in dead or slot in found}
            assert found == held


@pytest.mark.parametrize("head_offsets", ["interleaved", "blocked"])
def test_offsets_on_the_device_are_those_of_the_pattern(head_offsets):
    pattern = DilationPattern((8, 20, 64), (1, 3, 16), head_offsets=head_offsets)
    for num_kv_heads in (1, 2, 5, 8, 33):
        heads = torch.arange(num_kv_heads)[:, None]
        for i, expected in enumerate(pattern.offsets(num_kv_heads)):
            assert offset_of_heads(pattern, i, heads).flatten().tolist() == expected
