"""Which program of a Hopper kernel gets which tiles, through Triton's interpreter: each one once, and equal sums of work."""

import sys
from itertools import pairwise
from types import SimpleNamespace

import torch
from triton_interpreter import interpret, needs_interpreter

from modeling_longnet import DilationPattern


try:
    import triton
    import triton.language as tl

    from modeling_longnet.dilated_attention_order_kernels import Work, _locate
except ImportError:  # needs_interpreter says so
    triton = None


PROGRAMS = 132
# Pattern, length, heads, KV heads, batch, head_dim, documents.
CASES = {
    "retrofit": (DilationPattern.geometric(2048, 32768, preset="retrofit"), 32768, 16, 16, 1, 128, None),
    "retrofit, short": (DilationPattern.geometric(2048, 8192, preset="retrofit"), 8192, 16, 16, 1, 128, None),
    "retrofit, grouped": (DilationPattern.geometric(2048, 16384, preset="retrofit"), 16384, 32, 8, 2, 64, None),
    "paper": (DilationPattern.geometric(2048, 16384, preset="paper"), 16384, 16, 8, 1, 128, None),
    "packed": (
        DilationPattern.geometric(256, 1024, preset="retrofit"), 4096, 4, 2, 1, 128, [0, 1, 200, 200, 2713, 4096],
    ),
}  # fmt: skip


@needs_interpreter
def test_programs_get_every_tile_once_and_equal_work():
    interpret(__file__)


if triton is not None:

    @triton.jit
    def reckon(found_ptr, turn, programs, work, V: tl.constexpr, SIZE: tl.constexpr):
        program = tl.arange(0, SIZE)
        head, _, batch, start, _, _, x_first, _, count = _locate(turn, program, programs, work, V)
        tl.store(found_ptr + program, head)
        tl.store(found_ptr + SIZE + program, batch)
        tl.store(found_ptr + 2 * SIZE + program, start + tl.zeros([SIZE], tl.int64))
        tl.store(found_ptr + 3 * SIZE + program, x_first)
        tl.store(found_ptr + 4 * SIZE + program, count)


def tiles_of(launch, cu_seqlens) -> list[list[tuple[int, ...]]]:
    """Return head, batch row, first row of the document, first row in it and number of rows of each program's tiles."""
    given = dict(zip(launch.kernel.arg_names, launch.arguments)) | {"cu_seqlens_ptr": cu_seqlens}
    v = SimpleNamespace(**{name: getattr(x, "value", x) for name, x in vars(launch.constants["V"]).items()})
    work = Work(**{name: given[name] for name in Work._fields})
    programs, size = launch.grid[0], 256
    dealt: list[list[tuple[int, ...]]] = [[] for _ in range(programs)]
    for turn in range(-(-work.tiles // programs)):
        found = torch.zeros(5, size, dtype=torch.int64)
        reckon[(1,)](found, turn, programs, work, v, size)
        for program, tile in enumerate(zip(*found[:, :programs].tolist())):
            if tile[-1] > 0:
                dealt[program].append(tile)
    return dealt


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

    hopper._processors = lambda device: PROGRAMS
    tensors = {"query": heads, "do": heads, "out": heads, "dq": heads}
    tensors |= {"key": kv_heads, "value": kv_heads, "dk": kv_heads, "dv": kv_heads}
    layouts = {
        name: layout_of(torch.empty(batch, n, length, head_dim, dtype=torch.bfloat16, device="meta"))
        for name, n in tensors.items()
    }
    num_documents = 0 if documents is None else len(documents) - 1
    cu_seqlens = None if documents is None else torch.tensor(documents, dtype=torch.int32)
    plans = [(hopper.hopper_fwd_launch, x, heads, False) for x in query_launches(pattern)]
    plans += [(hopper.hopper_dkdv_launch, x, kv_heads, True) for x in key_launches(pattern)]
    for plan, launch, own_heads, by_key in plans:
        planned = plan(launch, layouts, num_documents, Call(pattern, True, 1.0))
        dealt = tiles_of(planned, cu_seqlens)
        rate = launch.rates[0] if pattern.dilate_queries or by_key else 1
        ends = documents or [0, length]
        rows = [(x % launch.period, start + x) for start, end in pairwise(ends) for x in range(end - start)]
        expected = [
            (head, row, x)
            for row in range(batch) for head in range(own_heads) for inside, x in rows
            if inside % rate == head // (own_heads // kv_heads) % rate
        ]  # fmt: skip
        found = [
            (head, row, start + x_first + rate * i)
            for tiles in dealt for head, row, start, x_first, count in tiles for i in range(count)
        ]  # fmt: skip
        assert sorted(found) == sorted(expected)
        if num_documents:  # nobody knows beforehand what they cost
            continue
        work = [
            [pairs_of(range(x, x + rate * count, rate), launch, length, by_key) for *_, x, count in tiles]
            for tiles in dealt
        ]
        most, mean, longest = max(map(sum, work)), sum(map(sum, work)) / PROGRAMS, max(max(x, default=0) for x in work)
        assert most <= max(1.05 * mean, mean + longest / 2), (launch, most / mean, longest / mean)


if __name__ == "__main__":  # run by the test, in a process of its own
    for name in sys.argv[1:] or CASES:
        check(*CASES[name])
