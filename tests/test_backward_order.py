"""Who adds to a block's dq after whom in the backward of one kernel, through Triton's interpreter."""

import sys
from collections import defaultdict
from types import SimpleNamespace

import torch
from triton_interpreter import interpret, needs_interpreter

from modeling_longnet import DilationPattern


try:
    import triton
    import triton.language as tl

    from modeling_longnet.dilated_attention_order_kernels import (
        OrderedWork,
        _blocks_met,
        _met_by_next,
        _placed,
        _rows_of,
    )
except ImportError:  # needs_interpreter says so
    triton = None


CASES = {
    "paper": (DilationPattern.geometric(64, 1024), 1008, 4, 2, 1, True, None),
    "both sides": (DilationPattern.geometric(128, 1024), 1000, 2, 2, 2, False, None),
    "torchscale": (DilationPattern.preset("torchscale", (256, 512), (1, 4)), 1200, 4, 4, 1, True, None),
    "odd segments": (DilationPattern((96, 480, 960), (1, 3, 6)), 1440, 2, 1, 1, True, None),
    "no rate 1": (DilationPattern((256, 512), (2, 4)), 1024, 4, 4, 1, True, None),
    "packed": (DilationPattern.geometric(128, 1024), 1024, 2, 2, 1, True, [0, 1, 200, 713, 1024]),
    "sliding": (
        DilationPattern((256, 512), (1, 4), dilate_queries=True, window="sliding", count_overlaps=False),
        1024, 2, 2, 1, True, None,
    ),
    "unaligned": (
        DilationPattern((160, 480), (1, 3), dilate_queries=True, window="sliding", count_overlaps=False),
        960, 2, 1, 1, True, None,
    ),
    "dense queries": (DilationPattern.geometric(128, 512, preset="retrofit"), 1024, 4, 2, 1, True, None),
    "dense queries, packed": (
        DilationPattern.geometric(128, 512, preset="retrofit"), 1024, 2, 2, 1, True, [0, 1, 200, 713, 1024],
    ),
    "dense queries, segments": (
        DilationPattern((192, 384), (1, 3), dilate_queries=False), 1152, 2, 1, 1, True, None,
    ),
}  # fmt: skip


@needs_interpreter
def test_tiles_add_to_a_block_one_after_the_other():
    interpret(__file__)


if triton is not None:

    @triton.jit
    def reckon(found_ptr, index, tiles, V: tl.constexpr):
        slot, kv_head, batch, lane = _placed(index, tiles)
        start, tokens, base, x_first, x_last, count = _rows_of(slot, batch, kv_head, tiles, V)
        rate = tiles.rate if V.dilate else 1
        loop_base = base if V.dilate else 0
        first, stop, blocks, head, tail = _blocks_met(x_first, x_last, tokens, loop_base, rate, tiles, V)
        met_first, met_stop = _met_by_next(slot, batch, kv_head, base, loop_base, rate, tiles, V)
        tl.store(found_ptr + 0, slot)
        tl.store(found_ptr + 1, lane)
        tl.store(found_ptr + 2, start)
        tl.store(found_ptr + 3, x_first)
        tl.store(found_ptr + 4, count)
        tl.store(found_ptr + 5, loop_base)
        tl.store(found_ptr + 6, first)
        tl.store(found_ptr + 7, stop)
        tl.store(found_ptr + 8, blocks)
        tl.store(found_ptr + 9, met_first)
        tl.store(found_ptr + 10, met_stop)


FOUND = ("slot", "lane", "start", "x_first", "count", "loop_base", "first", "stop", "blocks", "met_first", "met_stop")


def tiles_of(launch, cu_seqlens) -> list[dict[str, int]]:
    """Return what the kernel of a launch reckons for each of its tiles, in the order in which they are drawn."""
    given = dict(zip(launch.kernel.arg_names, launch.arguments))
    v = SimpleNamespace(**{name: getattr(x, "value", x) for name, x in vars(launch.constants["V"]).items()})
    tiles = OrderedWork(
        given["heads"], given["first_lane"], cu_seqlens, given["length"], given["num_documents"], given["search_steps"],
        given["period"], given["tiles_per_period"], given["windows"][0], given["previous_windows"][0],
        given["rates"][0], given["classes"], given["periods"], given["runs"], given["tiles"], given["first_mark"],
        None, None, given["before"],
    )  # fmt: skip
    found = torch.zeros(len(FOUND), dtype=torch.int64)
    rows = []
    for index in range(given["tiles"]):
        reckon[(1,)](found, index, tiles, v)
        rows.append(dict(zip(FOUND, found.tolist())))
    return rows


def check(pattern, length, heads, kv_heads, batch, is_causal, documents) -> None:
    from modeling_longnet import dilated_attention_hopper as hopper
    from modeling_longnet.attention_operator import Call
    from modeling_longnet.dilated_attention_launches import farthest_first, key_launches
    from modeling_longnet.launch_plans import layout_of

    hopper.num_processors = lambda device: 132
    hopper.MOST_SUMS = 1  # one lane at a time if an eighth of the tensors is not more
    query = torch.empty(batch, heads, length, 64, dtype=torch.bfloat16)
    key = torch.empty(batch, kv_heads, length, 64, dtype=torch.bfloat16)
    layouts = {name: layout_of(query) for name in ("query", "do", "out", "dq")}
    layouts |= {name: layout_of(key) for name in ("key", "value", "dk", "dv")}
    cu_seqlens = None if documents is None else torch.tensor(documents, dtype=torch.int32)
    num_documents = 0 if documents is None else len(documents) - 1
    branches = key_launches(pattern) if pattern.dilate_queries else farthest_first(key_launches(pattern))
    launches, scratch = hopper.hopper_bwd_launches(branches, layouts, num_documents, Call(pattern, is_causal, 1.0))
    # Inputs, results and their gradients are four tensors of each number of heads.
    lane, tensors = 4 * heads // kv_heads * length * 64, 4 * 2 * (heads + kv_heads) * batch * length * 64
    assert 4 * scratch.sums <= max(lane, tensors // 8) and 64 * scratch.marks == scratch.sums
    lanes_seen, marks, finished = defaultdict(int), set(), defaultdict(int)
    for launch in launches:
        given = dict(zip(launch.kernel.arg_names, launch.arguments))
        if "tiles" not in given:
            lanes_seen["scaled"] += launch.grid[1]
            continue
        block = launch.constants["V"].block_n.value
        rate = given["rates"][0] if launch.constants["V"].dilate.value else 1
        visitors, keys, fresh = defaultdict(list), defaultdict(int), defaultdict(int)
        for tile in tiles_of(launch, cu_seqlens):
            lane = given["first_lane"] + tile["lane"]
            finished[lane] += 1
            if tile["count"] <= 0:
                continue
            for i in range(tile["count"]):
                keys[lane, tile["start"] + tile["x_first"] + given["rates"][0] * i] += 1
            for n in range(tile["blocks"]):
                term = tile["first"] + n * block
                assert term % block == 0 and term < tile["stop"]
                row = tile["start"] + tile["loop_base"] + rate * term
                met = tile["met_first"] <= term < tile["met_stop"]
                visitors[lane, row].append((tile["slot"], met))
                if not met:
                    for t in range(term, min(term + block, tile["stop"])):
                        fresh[lane, tile["start"] + tile["loop_base"] + rate * t] += 1
        assert max(keys.values()) == 1  # nobody else writes a key's gradients
        for order in visitors.values():
            assert not order[0][1]  # the first waits for nobody,
            for (before, _), (slot, met) in zip(order, order[1:]):
                assert met and before == slot + 1  # all others for the one that has drawn a lower number just before
        if launch.constants["V"].stores.value:
            rows = {(lane, row) for lane in {lane for lane, _ in keys} for row in range(length)}
            assert rows == set(fresh)  # what is not zeroed before is written
        used = range(given["first_mark"], given["first_mark"] + given["classes"] * given["periods"])
        assert 0 not in used and not marks & set(used)  # no mark of another launch is mistaken
        marks |= set(used)
        for lane in range(given["first_lane"], given["first_lane"] + given["runs"] // given["periods"]):
            assert finished[lane] == given["before"] + given["classes"] * given["periods"]
    assert lanes_seen["scaled"] == heads * batch


def check_scaling(head_dim: int) -> None:
    """The columns that ``_hand_over`` has moved go back where they belong, heads of all rows of the batch too."""
    from modeling_longnet.dilated_attention_kernels import scale_kernel

    batch, heads, length, first = 2, 3, 70, 2
    dq = torch.full((batch, length, heads, head_dim), torch.nan, dtype=torch.bfloat16).transpose(1, 2)
    exact = torch.randint(-99, 99, (4, length, head_dim)).float()  # exact in bfloat16, also halved
    # Of 16 columns, a thread of the accumulator's four holds two neighbours each in the lower and the upper eight.
    moved = exact.clone()
    for column in range(head_dim):
        group, upper, thread, odd = column // 16, column // 8 % 2, column // 2 % 4, column % 2
        moved[..., group * 16 + thread * 4 + upper * 2 + odd] = exact[..., column]
    sums = moved.contiguous()
    grid = (-(-length // 64), 4)
    scale_kernel[grid](
        sums, dq, *dq.stride()[:3], 0.5, length, first, heads, CLEARS=True, HEAD_DIM=head_dim,
        BLOCK_D=1 << (head_dim - 1).bit_length(), BLOCK_M=64,
    )  # fmt: skip
    for i in range(4):
        assert torch.equal(dq[(first + i) // heads, (first + i) % heads], (exact[i] * 0.5).bfloat16())
    assert dq[0, :2].isnan().all() and not sums.any()


if __name__ == "__main__":  # run by test_tiles_add_to_a_block_one_after_the_other, in a process of its own
    for head_dim in (64, 80, 96):
        check_scaling(head_dim)
    for name in sys.argv[1:] or CASES:
        check(*CASES[name])
