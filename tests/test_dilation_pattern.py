"""The mathematics of the pattern: reach, offsets and cost formulas, each against brute force."""

import pickle
import subprocess
import sys
from dataclasses import FrozenInstanceError, asdict, replace
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from oracle import times_reached
from strategies import patterns

from modeling_longnet import DilationPattern
from modeling_longnet.dilation_pattern import PRESETS, Branch


def reached_pairs(pattern: DilationPattern, length: int, num_kv_heads: int, is_causal: bool) -> list[int]:
    """Count the (query, key) pairs of one document by brute force, with multiplicity, per KV head."""
    positions = range(length)
    rules = asdict(pattern)
    return [
        sum(times_reached(p, u, g, num_kv_heads, is_causal=is_causal, **rules) for p in positions for u in positions)
        for g in range(num_kv_heads)
    ]


def test_interleaved_offsets_are_the_head_modulo_the_rate():
    pattern = DilationPattern([8, 16, 32], [1, 2, 4])
    assert pattern.offsets(5) == [[0, 0, 0, 0, 0], [0, 1, 0, 1, 0], [0, 1, 2, 3, 0]]


def test_blocked_offsets_give_neighbouring_heads_the_same_one():
    pattern = DilationPattern.preset("torchscale", [8, 16, 32, 64], [1, 2, 4, 12])
    # ceil(8 / 12) is 1: with fewer heads than the rate every head has its own.
    assert pattern.offsets(8) == [[0] * 8, [0, 0, 0, 0, 1, 1, 1, 1], [0, 0, 1, 1, 2, 2, 3, 3], list(range(8))]


@given(patterns(), st.integers(1, 9))
def test_offsets_lie_below_the_rate(pattern, num_kv_heads):
    offsets = pattern.offsets(num_kv_heads)
    assert [len(row) for row in offsets] == [num_kv_heads] * len(pattern.branches)
    assert all(0 <= offset < r for row, r in zip(offsets, pattern.dilation_rates) for offset in row)


@pytest.mark.parametrize(
    ("name", "rules"),
    [
        ("paper", ("interleaved", True, True, "segment")),
        ("torchscale", ("blocked", True, True, "segment")),
        ("retrofit", ("interleaved", False, False, "sliding")),
    ],
)
def test_presets_are_the_documented_rules(name, rules):
    expected = DilationPattern((4, 8), (1, 2), *rules)
    assert DilationPattern.preset(name, [4, 8], [1, 2]) == expected
    assert set(PRESETS) == {"paper", "torchscale", "retrofit"}


def test_default_rules_are_the_papers():
    assert DilationPattern((4, 8), (1, 2)) == DilationPattern.preset("paper", (4, 8), (1, 2))


def test_geometric_multiplies_length_and_rate_by_the_ratio():
    pattern = DilationPattern.geometric(2048, 32768)
    assert pattern.segment_lengths == (2048, 4096, 8192, 16384, 32768)
    assert pattern.dilation_rates == (1, 2, 4, 8, 16)
    assert DilationPattern.geometric(3, 75, ratio=5, preset="retrofit") == DilationPattern.preset(
        "retrofit", [3, 15, 75], [1, 5, 25]
    )
    assert DilationPattern.geometric(7, 7).branches == (Branch(7, 1),)


@pytest.mark.parametrize(
    ("arguments", "fragments"),
    [
        ((2048, 10000), ["last_segment 10000", "first_segment 2048", "ratio 2", "use 8192 or 16384"]),
        ((2048, 1000), ["last_segment 1000", "first_segment 2048", "use 2048"]),
        ((3, 28, 3), ["last_segment 28", "ratio 3", "use 27 or 81"]),
        ((4, 8, 1), ["ratio", "at least 2", "got 1"]),
        ((0, 8), ["first_segment", "a positive integer", "got 0"]),
        ((4, -8), ["last_segment", "got -8"]),
        ((4, 8, 2, "longnet"), ["preset", "'paper'", "'torchscale'", "'retrofit'", "'longnet'"]),
    ],
)
def test_geometric_refuses_with_numbers_and_fix(arguments, fragments):
    with pytest.raises(ValueError) as error:
        DilationPattern.geometric(*arguments)
    assert_message(error, fragments)


@pytest.mark.parametrize(
    ("fields", "fragments"),
    [
        ({"segment_lengths": []}, ["segment_lengths is empty", "at least one branch"]),
        ({"dilation_rates": ()}, ["dilation_rates is empty"]),
        ({"segment_lengths": [4, 8, 16]}, ["3 entries [4, 8, 16]", "dilation_rates has 2 [1, 2]", "one rate per"]),
        ({"segment_lengths": [4, 0]}, ["segment_lengths", "positive integers", "got 0 in [4, 0]"]),
        ({"segment_lengths": [4.0, 8]}, ["segment_lengths", "got 4.0"]),
        ({"segment_lengths": 4}, ["segment_lengths", "list or tuple", "got 4"]),
        ({"segment_lengths": "48"}, ["segment_lengths", "list or tuple", "got '48'"]),
        ({"dilation_rates": [1, -2]}, ["dilation_rates", "got -2 in [1, -2]"]),
        ({"dilation_rates": [True, 2]}, ["dilation_rates", "got True"]),
        ({"segment_lengths": [4, 2**62 + 1]}, ["segment_lengths", "at most 2^62", "got 4611686018427387905"]),
        ({"head_offsets": "paper"}, ["head_offsets", "'interleaved', 'blocked'", "got 'paper'"]),
        ({"window": "global"}, ["window", "'segment', 'sliding'", "got 'global'"]),
        ({"count_overlaps": 1}, ["count_overlaps", "True or False", "got 1"]),
        ({"dilate_queries": "no"}, ["dilate_queries", "True or False", "got 'no'"]),
    ],
)
def test_malformed_fields_are_refused_with_the_value_and_the_choices(fields, fragments):
    fields = {"segment_lengths": [4, 8], "dilation_rates": [1, 2]} | fields
    with pytest.raises(ValueError) as error:
        DilationPattern(**fields)
    assert_message(error, fragments)
    if len(fields) == 2:  # the branches alone
        with pytest.raises(ValueError) as error:
            DilationPattern.preset("paper", **fields)
        assert_message(error, fragments)


@pytest.mark.parametrize(
    ("segment_lengths", "dilation_rates", "head_offsets", "fragments"),
    [
        ([4, 10], [1, 2], "interleaved", ["segment length 4 does not divide the next one, 10"]),
        ([8, 4], [1, 2], "interleaved", ["segment length 8 does not divide the next one, 4"]),
        ([12, 24], [2, 3], "interleaved", ["dilation rate 2 does not divide the next one, 3"]),
        ([16384, 32768], [6, 12], "interleaved", ["dilation rate 6 does not divide its segment length 16384"]),
        ([4, 8], [1, 2], "blocked", ['head_offsets is "blocked"', 'use head_offsets="interleaved"']),
    ],
)
def test_counting_once_refuses_a_pattern_that_is_not_nested(segment_lengths, dilation_rates, head_offsets, fragments):
    counted = DilationPattern(segment_lengths, dilation_rates, head_offsets)
    assert not counted.is_nested
    with pytest.raises(ValueError) as error:
        replace(counted, count_overlaps=False)
    assert_message(error, ["count_overlaps=False needs a nested pattern", "use count_overlaps=True", *fragments])


@given(patterns())
def test_nested_means_what_the_contract_says(pattern):
    w, r = pattern.segment_lengths, pattern.dilation_rates
    rules = [wi % ri == 0 for wi, ri in zip(w, r)]
    rules += [after % before == 0 for values in (w, r) for before, after in zip(values, values[1:])]
    assert pattern.is_nested == (all(rules) and pattern.head_offsets == "interleaved")


def test_patterns_are_values():
    pattern = DilationPattern([4, 8], [1, 2])
    same = DilationPattern((4, 8), (1, 2))
    assert pattern == same
    assert hash(pattern) == hash(same)
    assert len({pattern, same, replace(pattern, window="sliding")}) == 2
    assert pickle.loads(pickle.dumps(pattern)) == pattern
    assert pattern.branches == ((4, 1), (8, 2))
    with pytest.raises(FrozenInstanceError):
        pattern.window = "sliding"


def test_a_pattern_does_not_share_the_callers_list():
    segment_lengths = [4, 8]
    pattern = DilationPattern(segment_lengths, [1, 2])
    segment_lengths[0] = 5
    assert pattern.segment_lengths == (4, 8)


@given(patterns(), st.integers(1, 5), st.integers(0, 60), st.booleans(), st.data())
def test_reach_is_the_definitions(pattern, num_kv_heads, position, is_causal, data):
    kv_head = data.draw(st.integers(0, num_kv_heads - 1))
    horizon = position + max(pattern.segment_lengths)
    rules = asdict(pattern)
    expected = [
        u
        for u in range(horizon)
        for _ in range(times_reached(position, u, kv_head, num_kv_heads, is_causal=is_causal, **rules))
    ]
    assert pattern.reach(position, kv_head, is_causal, num_kv_heads) == expected
    if pattern.head_offsets == "interleaved":
        assert pattern.reach(position, kv_head, is_causal) == expected


def test_reach_lists_a_key_once_per_branch_or_once():
    counted = DilationPattern([4, 8], [1, 2])
    assert counted.reach(6, kv_head=0) == [0, 2, 4, 4, 5, 6, 6]
    assert replace(counted, count_overlaps=False).reach(6, kv_head=0) == [0, 2, 4, 5, 6]
    # Position 6 is even, so the odd head's second branch skips it.
    assert counted.reach(6, kv_head=1) == [4, 5, 6]
    assert replace(counted, dilate_queries=False).reach(6, kv_head=1) == [1, 3, 4, 5, 5, 6]
    assert replace(counted, window="sliding").reach(6, kv_head=0) == [0, 2, 3, 4, 4, 5, 6, 6]


@pytest.mark.parametrize(
    ("arguments", "fragments"),
    [
        ({"position": -1, "kv_head": 0}, ["negative", "-1"]),
        ({"position": 3, "kv_head": 2, "num_kv_heads": 2}, ["kv_head 2", "num_kv_heads=2"]),
        ({"position": 3, "kv_head": 0}, ["blocked", "num_kv_heads"]),
    ],
)
def test_reach_refuses_with_the_numbers(arguments, fragments):
    pattern = DilationPattern([4, 8], [1, 2], "blocked")
    with pytest.raises(ValueError) as error:
        pattern.reach(**arguments)
    assert_message(error, fragments)


def test_offsets_refuse_no_heads():
    with pytest.raises(ValueError, match="num_kv_heads must be a positive integer, got 0"):
        DilationPattern([4], [1]).offsets(0)


@given(patterns(), st.integers(0, 40), st.integers(1, 5), st.integers(1, 3), st.booleans())
@example(DilationPattern([16384, 32768], [6, 12]), 40, 3, 1, True)
@example(DilationPattern([5, 5], [7, 3], "blocked", window="sliding", dilate_queries=False), 23, 4, 2, False)
def test_attention_flops_are_four_head_dims_per_reached_pair(pattern, length, num_kv_heads, repeats, is_causal):
    head_dim = 7
    pairs = repeats * sum(reached_pairs(pattern, length, num_kv_heads, is_causal))
    arguments = {"num_kv_heads": num_kv_heads, "is_causal": is_causal}
    num_heads = repeats * num_kv_heads
    assert pattern.attention_flops(length, num_heads, head_dim, **arguments) == 4 * head_dim * pairs
    assert pattern.attention_flops(length, num_heads, head_dim, **arguments, backward=True) == 10 * head_dim * pairs


def test_attention_flops_of_one_whole_segment_are_those_of_dense_attention():
    dense = DilationPattern([4096], [1])
    assert dense.attention_flops(1000, 8, 64) == 4 * 64 * 8 * (1000 * 1001 // 2)
    assert dense.attention_flops(1000, 8, 64, is_causal=False) == 4 * 64 * 8 * 1000**2


@pytest.mark.parametrize("is_causal", [True, False])
def test_attention_flops_of_whole_segments_grow_linearly_at_any_length(is_causal):
    pattern = DilationPattern([64, 128, 256], [1, 3, 12])
    one = pattern.attention_flops(256, 12, 128, is_causal=is_causal)
    assert pattern.attention_flops(256 * 10**7, 12, 128, is_causal=is_causal) == 10**7 * one


@pytest.mark.parametrize("preset", ["paper", "retrofit"])
def test_attention_flops_of_sliding_windows_grow_by_the_same_amount_per_token(preset):
    pattern = replace(DilationPattern.geometric(64, 256, preset=preset), window="sliding")
    lengths = [10**9 + 256 * i for i in range(3)]
    first, second, third = (pattern.attention_flops(length, 4, 16) for length in lengths)
    assert third - second == second - first > 0


@pytest.mark.parametrize(
    ("arguments", "fragments"),
    [
        ((-1, 4, 8), ["length=-1"]),
        ((8, 4, 0), ["head_dim=0"]),
        ((8, 0, 8), ["num_heads=0"]),
    ],
)
def test_attention_flops_refuse_with_the_numbers(arguments, fragments):
    with pytest.raises(ValueError) as error:
        DilationPattern([4], [1]).attention_flops(*arguments)
    assert_message(error, fragments)


def test_attention_flops_refuse_heads_that_do_not_share_kv_heads_evenly():
    with pytest.raises(ValueError, match="num_heads=6, num_kv_heads=4"):
        DilationPattern([4], [1]).attention_flops(8, 6, 16, num_kv_heads=4)


@given(patterns(), st.integers(1, 4), st.integers(0, 40))
def test_cache_entries_suffice_for_every_future_query(pattern, num_kv_heads, length):
    rules = asdict(pattern)
    future = range(length, length + max(pattern.segment_lengths) + 1)
    for kv_head in range(num_kv_heads):
        needed = sum(
            any(times_reached(p, u, kv_head, num_kv_heads, is_causal=True, **rules) for p in future)
            for u in range(length)
        )
        assert needed <= pattern.cache_entries(length) <= length


@pytest.mark.parametrize("preset", ["paper", "retrofit"])
def test_cache_entries_of_a_million_tokens_are_eleven_thousand(preset):
    pattern = DilationPattern.geometric(2048, 2**20, preset=preset)
    assert pattern.cache_entries(2048) == 2048
    assert pattern.cache_entries(2**20) == 2048 + 9 * 1024 == 11264


def test_cache_entries_of_a_pattern_that_is_not_nested_add_up_over_the_branches():
    pattern = DilationPattern.preset("torchscale", [2048, 4096], [1, 2])
    assert pattern.cache_entries(2**20) == 2048 + 2048


@given(patterns(), st.integers(0, 10**6))
def test_cache_entries_stop_growing_at_the_longest_segment(pattern, beyond):
    longest = max(pattern.segment_lengths)
    bound = sum(-(-w // r) for w, r in pattern.branches)
    # Past every branch's own sum the length itself no longer limits the count.
    start = max(longest, bound)
    assert pattern.cache_entries(start + beyond) == pattern.cache_entries(start) <= bound


def test_cache_entries_refuse_a_negative_length():
    with pytest.raises(ValueError, match="length must not be negative, got -1"):
        DilationPattern([4], [1]).cache_entries(-1)


def test_the_mathematics_imports_no_torch():
    module = Path(__file__).parents[1] / "modeling_longnet" / "dilation_pattern.py"
    code = (
        "import importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('dilation_pattern', {str(module)!r})\n"
        "sys.modules['dilation_pattern'] = module = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(module)\n"
        "assert module.DilationPattern([4], [1]).cache_entries(9) == 4\n"
        "print(sorted({name.partition('.')[0] for name in sys.modules} & {'torch', 'transformers', 'numpy'}))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def assert_message(error: pytest.ExceptionInfo, fragments: list[str]) -> None:
    """Check that one error names every number and the fix."""
    message = str(error.value)
    missing = [fragment for fragment in fragments if fragment not in message]
    assert not missing, f"{missing} missing in: {message}"
