"""The tiles that programs of the Hopper kernels draw, through Triton's interpreter: each row once, no program idle."""

import heapq
import sys
from collections.abc import Hashable
from itertools import pairwise
from types import SimpleNamespace

import torch
from triton_interpreter import interpret, needs_interpreter

from modeling_longnet import DilationPattern


try:
    import triton
    import triton.language as tl

    from modeling_longnet.dilated_attention_order_kernels import Work, _locate, _stretch_of
except ImportError:  # needs_interpreter says so
    triton = None


PROGRAMS = 132
# Pattern, length, heads, KV heads, batch, head_dim, documents.
CASES = {
    "retrofit": (DilationPattern.geometric(2048, 32768, preset="retrofit"), 32768, 16, 16, 1, 128, None),
    "retrofit, short": (DilationPattern.geometric(2048, 8192, preset="retrofit"), 8192, 16, 16, 1, 128, None),
    "retrofit, grouped": (DilationPattern.geometric(2048, 16384, preset="retrofit"), 16384, 16, 4, 1, 128, None),
    "retrofit, batch": (DilationPattern.geometric(2048, 8192, preset="retrofit"), 8192, 8, 8, 2, 64, None),
    "paper": (DilationPattern.geometric(2048, 16384, preset="paper"), 16384, 16, 8, 1, 128, None),
    "paper, many rounds": (DilationPattern.geometric(512, 4096, preset="paper"), 8192, 16, 4, 4, 128, None),
    "paper, last stretch cut": (DilationPattern.geometric(2048, 8192, preset="paper"), 9480, 16, 16, 2, 64, None),
    "paper, in no step": (DilationPattern((192, 768), (1, 4)), 9216, 16, 16, 1, 64, None),
    "paper, steps that do not divide": (
        DilationPattern((1536, 3072, 4608), (1, 2, 3)), 9216, 16, 16, 1, 128, None,
    ),
    "packed": (
        DilationPattern.geometric(256, 1024, preset="retrofit"), 4096, 4, 2, 1, 128, [0, 1, 200, 200, 2713, 4096],
    ),
}  # fmt: skip


@needs_interpreter
def test_every_row_has_one_tile_and_no_program_is_idle_for_long():
    interpret(__file__)


if triton is not None:

    @triton.jit
    def reckon(found_ptr, first, work, V: tl.constexpr, SIZE: tl.constexpr):
        index = first + tl.arange(0, SIZE)
        head, _, batch, start, _, _, x_first, _, count = _locate(index, work, V)
        at = found_ptr + tl.arange(0, SIZE)
        tl.store(at, head)
        tl.store(at + SIZE, batch)
        tl.store(at + 2 * SIZE, start + tl.zeros([SIZE], tl.int64))
        tl.store(at + 3 * SIZE, x_first)
        tl.store(at + 4 * SIZE, count)
        if V.counted:
            counter, before = _stretch_of(batch, head, start + x_first, work)
            tl.store(at + 5 * SIZE, counter)
            tl.store(at + 6 * SIZE, before)


SIZE = 512  # of what is reckoned at once


def tiles_of(planned, cu_seqlens) -> list[tuple[int, ...]]:
    """Return of each tile: head, batch row, first row of the document and in it, number of rows, counter, its count before."""
    given = dict(zip(planned.kernel.arg_names, planned.arguments)) | {"cu_seqlens_ptr": cu_seqlens}
    v = SimpleNamespace(**{name: getattr(x, "value", x) for name, x in vars(planned.constants["V"]).items()})
    work = Work(**{name: given.get(name) for name in Work._fields})
    tiles: list[tuple[int, ...]] = []
    for first in range(0, work.tiles, SIZE):
        found = torch.zeros(7, SIZE, dtype=torch.int64)
        reckon[(1,)](found, first, work, v, SIZE)
        tiles += zip(*found.tolist())
    return tiles[: work.tiles]


def pairs_of(rows: range, launch, length: int, by_key: bool) -> int:
    """Count the pairs of a tile's causal rows and what they meet, as the definition has it."""
    pairs = 0
    for window, previous, rate in zip(launch.windows, launch.previous_windows, launch.rates):
        step = 1 if by_key and launch.loop_rate == 1 else rate
        for x in rows:
            if launch.period == window:  # segments
                met = (x // window + 1) * window - x if by_key else x % window + 1
            else:
                met = min(window, length - x if by_key else x + 1)
            pairs += max(0, met - previous) // step
    return pairs


def check(pattern, length, heads, kv_heads, batch, head_dim, documents) -> None:
    from modeling_longnet import dilated_attention_hopper as hopper
    from modeling_longnet.attention_operator import Call
    from modeling_longnet.dilated_attention_launches import key_launches, query_launches
    from modeling_longnet.launch_plans import layout_of

    hopper.num_processors = lambda device: PROGRAMS
    tensors = {"query": heads, "do": heads, "out": heads, "dq": heads}
    tensors |= {"key": kv_heads, "value": kv_heads, "dk": kv_heads, "dv": kv_heads}
    layouts = {
        name: layout_of(torch.empty(batch, n, length, head_dim, dtype=torch.bfloat16, device="meta"))
        for name, n in tensors.items()
    }
    num_documents = 0 if documents is None else len(documents) - 1
    cu_seqlens = None if documents is None else torch.tensor(documents, dtype=torch.int32)
    options = (layouts, num_documents, Call(pattern, True, 1.0))
    by_query, by_key = query_launches(pattern), key_launches(pattern)
    planned, scratch = hopper.hopper_fwd_launches(by_query, *options)
    forward = [(*found, False) for found in zip(planned, by_query)]
    planned, counters = hopper.hopper_dkdv_launches(by_key, *options)
    backward = [(*found, True) for found in zip(planned, by_key)]
    planned = hopper.hopper_dq_launches(by_query, *options, counters)
    backward += [(*found, False) for found in zip(planned, by_query)]
    assert counters == len(by_key) + batch * kv_heads

    found_tiles: list[list[tuple[int, ...]]] = []
    costs: list[list[tuple[tuple[int, int], int]]] = []  # of each launch's tiles, beside their KV heads
    finished = dict.fromkeys(((row, head) for row in range(batch) for head in range(kv_heads)), 0)
    tallies = [0] * (scratch.tallies - len(by_query))
    counters_of: dict[tuple[int, int, int], int] = {}  # where the tiles of each row of out count
    for plan, launch, owns_keys in [*forward, *backward]:
        tiles = tiles_of(plan, cu_seqlens)
        group = 1 if owns_keys else heads // kv_heads
        rate = launch.rates[0] if pattern.dilate_queries or owns_keys else 1
        ends = documents or [0, length]
        rows = [(x % launch.period, start + x) for start, end in pairwise(ends) for x in range(end - start)]
        expected = [
            (head, row, x)
            for row in range(batch) for head in range(kv_heads * group) for inside, x in rows
            if inside % rate == head // group % rate
        ]  # fmt: skip
        found = [
            (head, row, start + x_first + rate * i)
            for head, row, start, x_first, count, _, _ in tiles for i in range(count)
        ]  # fmt: skip
        assert sorted(found) == sorted(expected)
        if owns_keys:  # what a tile waits for is what the launches before count, two consumers each
            assert set(finished.values()) == {plan.arguments[-1]}
            for head, row, *_ in tiles:
                finished[row, head] += 2
        elif tallies and plan.kernel is hopper.hopper_fwd_kernel:
            # When a tile has to wait until its counter stands where it stands after all launches before, whoever has
            # written its rows has counted there.
            assert all(tallies[counter] == before for *_, count, counter, before in tiles if count > 0)
            for head, row, start, x, count, counter, _ in tiles:
                tallies[counter] += count > 0
                for i in range(count):
                    assert counters_of.setdefault((row, head, start + x + rate * i), counter) == counter
        found_tiles.append(tiles)
        costs.append([
            ((row, head // group), pairs_of(range(x, x + rate * count, rate), launch, length, owns_keys))
            for head, row, _, x, count, _, _ in tiles
        ])  # fmt: skip
    if num_documents:  # nobody knows beforehand what they cost
        return
    queries = [
        [(counter, cost) for (*_, counter, _), (_, cost) in zip(tiles, work)]
        for tiles, work in zip(found_tiles, costs[: len(forward)])
    ]
    programs = forward[0][0].grid[0]
    for parts in [queries] if tallies else [[work] for work in queries]:  # what does not overlap counts by itself
        mean, longest = sum(cost for work in parts for _, cost in work) / programs, max(cost for _, cost in parts[-1])
        ends = ended([(work, None) for work in parts], programs)
        assert ends <= max(1.05 * mean, mean + longest / 2), (ends / mean, longest / mean)
    if not pattern.dilate_queries:
        *keys, last = costs[len(forward) :]
        mean = sum(cost for work in (*keys, last) for _, cost in work) / PROGRAMS
        ends = ended([*((work, True) for work in keys), (last, False)], PROGRAMS)
        assert ends <= 1.04 * mean, ends / mean


def ended(launches: list[tuple[list[tuple[Hashable, int]], bool | None]], programs: int) -> int:
    """Return when all is done if programs take the tiles in their order.

    Args:
        launches: counter and cost of each tile; and whether it ends (True), or begins (None), only after those of the
            launches before with the same counter.
    """
    free = [0] * programs
    done: dict[Hashable, int] = {}
    for work, waits in launches:
        now = dict(done)
        for counter, cost in work:
            before = done.get(counter, 0) if waits is not False else 0
            begins = heapq.heappop(free)
            end = max(begins + cost, before) if waits else max(begins, before) + cost
            now[counter] = max(now.get(counter, 0), end)
            heapq.heappush(free, end)
        done = now
    return max(free)


if __name__ == "__main__":  # run by the test, in a process of its own
    for name in sys.argv[1:] or CASES:
        check(*CASES[name])
