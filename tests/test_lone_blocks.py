"""The order in which the Hopper kernel of the keys visits queries, through Triton's interpreter: who may pass over what."""

import sys
from types import SimpleNamespace

import torch
from triton_interpreter import interpret, needs_interpreter

from modeling_longnet import DilationPattern


try:
    import triton
    import triton.language as tl

    from modeling_longnet.dilated_attention_order_kernels import (
        Work,
        _in_pairs,
        _locate,
        _lone_blocks,
        _shared_blocks,
    )
    from modeling_longnet.dilated_attention_tile_kernels import _band, _block_range
except ImportError:  # needs_interpreter says so
    triton = None


DENSE = {"count_overlaps": False, "dilate_queries": False, "window": "sliding"}
# Pattern, length, heads, KV heads, documents.
CASES = {
    "retrofit": (DilationPattern.geometric(256, 2048, preset="retrofit"), 4096, 4, 4, None),
    "retrofit, no whole tiles": (DilationPattern.geometric(256, 2048, preset="retrofit"), 1304, 2, 1, None),
    "bands that do not overlap": (
        DilationPattern((128, 256), (4, 16), **DENSE), 4096, 2, 2, None,
    ),
    "far apart": (DilationPattern((96, 9216), (1, 96), **DENSE), 18432, 1, 1, None),
    "dense queries, segments": (DilationPattern((160, 480), (1, 3), **DENSE | {"window": "segment"}), 1440, 2, 2, None),
    "counted twice": (
        DilationPattern((160, 480), (1, 3), **DENSE | {"window": "segment", "count_overlaps": True}), 1500, 1, 1, None,
    ),
    "paper": (DilationPattern.geometric(256, 1024, preset="paper"), 2048, 4, 2, None),
    "packed": (DilationPattern.geometric(256, 1024, preset="retrofit"), 2048, 2, 2, [0, 1, 200, 200, 1213, 2048]),
}  # fmt: skip
FIELDS = 12
MOST_BLOCKS = 512


@needs_interpreter
def test_a_consumer_passes_over_what_none_of_its_keys_meets():
    interpret(__file__)


if triton is not None:

    @triton.jit
    def reckon(found_ptr, order_ptr, index, work, V: tl.constexpr, FIELDS: tl.constexpr, MOST_BLOCKS: tl.constexpr):
        _, _, _, _, tokens, tile_base, x_first, x_last, count = _locate(index, work, V)
        own_rate = work.rates[0]
        window, previous = work.windows[0], work.previous_windows[0]
        base = tile_base if V.dilate else 0
        rate = own_rate if V.dilate else 1
        start_first, end_first = _band(x_first, window, previous, tokens, True, V.side, V.sliding, V.disjoint)
        start_last, end_last = _band(x_last, window, previous, tokens, True, V.side, V.sliding, V.disjoint)
        first, stop, blocks, head, tail = _block_range(
            start_first, start_last, end_first, end_last, base, rate, V.block_n
        )
        heads, tails = _lone_blocks(
            x_first, count, own_rate, tokens, window, previous, base, rate, first, stop, blocks, V
        )
        shared, inner, outer = _shared_blocks(blocks, head, tail, heads, tails)
        tl.store(found_ptr, x_first)
        tl.store(found_ptr + 1, count)
        tl.store(found_ptr + 2, tokens)
        tl.store(found_ptr + 3, base)
        tl.store(found_ptr + 4, rate)
        tl.store(found_ptr + 5, first)
        tl.store(found_ptr + 6, blocks)
        tl.store(found_ptr + 7, heads)
        tl.store(found_ptr + 8, tails)
        tl.store(found_ptr + 9, shared)
        tl.store(found_ptr + 10, inner)
        tl.store(found_ptr + 11, outer)
        n = tl.arange(0, MOST_BLOCKS)
        tl.store(order_ptr + n, _in_pairs(n, first, blocks, head, tail, heads, tails, V.block_n))


def met_by(x: int, launch, pattern: DilationPattern, tokens: int) -> range:
    """List the positions of the causal queries that a key may be met by, as the definition has it."""
    (window,), (previous,) = launch.windows, launch.previous_windows
    begin, end = x + previous, x + window
    if pattern.window == "segment":
        begin = x - x % previous + previous if previous else x
        end = x - x % window + window
    return range(begin, max(min(end, tokens), begin))


def check(pattern, length, heads, kv_heads, documents) -> None:
    from modeling_longnet import dilated_attention_hopper as hopper
    from modeling_longnet.attention_operator import Call
    from modeling_longnet.dilated_attention_launches import key_launches
    from modeling_longnet.launch_plans import layout_of

    hopper.num_processors = lambda device: 132
    tensors = {"query": heads, "do": heads, "key": kv_heads, "value": kv_heads, "dk": kv_heads, "dv": kv_heads}
    layouts = {
        name: layout_of(torch.empty(1, n, length, 128, dtype=torch.bfloat16, device="meta"))
        for name, n in tensors.items()
    }
    num_documents = 0 if documents is None else len(documents) - 1
    cu_seqlens = None if documents is None else torch.tensor(documents, dtype=torch.int32)
    launches = key_launches(pattern)
    planned, _ = hopper.hopper_dkdv_launches(launches, layouts, num_documents, Call(pattern, True, 1.0))
    passed = 0
    for plan, launch in zip(planned, launches):
        given = dict(zip(plan.kernel.arg_names, plan.arguments)) | {"cu_seqlens_ptr": cu_seqlens}
        v = SimpleNamespace(**{name: getattr(x, "value", x) for name, x in vars(plan.constants["V"]).items()})
        work = Work(**{name: given.get(name) for name in Work._fields})
        for index in range(work.tiles):
            found, order = torch.zeros(FIELDS, dtype=torch.int64), torch.zeros(MOST_BLOCKS, dtype=torch.int64)
            reckon[(1,)](found, order, index, work, v, FIELDS, MOST_BLOCKS)
            x_first, count, tokens, base, rate, first, blocks, alone, alone_later, shared, inner, outer = (
                found.tolist()
            )
            if count <= 0:
                continue
            assert blocks <= MOST_BLOCKS and alone + alone_later + shared == blocks
            order = order[:blocks].tolist()
            assert sorted(order) == list(range(blocks))
            turns, pairs = order[: alone + alone_later], 2 * min(alone, alone_later)
            assert [n < alone for n in turns[:pairs]] == [True, False] * (pairs // 2)
            assert (
                sum(n < alone for n in turns) == alone and sum(n >= blocks - alone_later for n in turns) == alone_later
            )
            middle = [first // v.block_n + block for block in range(alone + inner, alone + outer)]
            begin = next((n for n, block in enumerate(middle) if block % len(middle) == 0), 0)
            turned = [first // v.block_n + block for block in order[blocks - len(middle) :]]
            assert turned == middle[begin:] + middle[:begin], "tiles at work at a time are at the same blocks"
            for i in range(count):
                met = met_by(x_first + launch.rates[0] * i, launch, pattern, tokens)
                for block in range(blocks):
                    terms = range(first + block * v.block_n, first + (block + 1) * v.block_n)
                    reached = sum(base + rate * term in met for term in terms)
                    if block < alone and i >= v.block_m // 2 or block >= blocks - alone_later and i < v.block_m // 2:
                        assert reached == 0, (index, i, block)
                        passed += 1
                    elif alone + inner <= block < alone + outer:
                        assert reached == v.block_n, (index, i, block)
    assert passed > 0


if __name__ == "__main__":  # run by the test, in a process of its own
    for name in sys.argv[1:] or CASES:
        check(*CASES[name])
