"""Draw which keys each query reaches, and hold the cost formulas to the drawing.

One line per query, one column per key: 1 or 2 is the branch that reaches the key, + both.
"""

import argparse
from dataclasses import replace

from modeling_longnet import DilationPattern


LENGTH, NUM_HEADS, HEAD_DIM = 24, 2, 64


def reached_by(pattern: DilationPattern, query: int, key: int, head: int) -> str:
    """Name the branch by which a head's query reaches a key: "." if by none, "+" if by both."""
    times = pattern.reach(query, head).count(key)
    if times != 1:
        return "+" if times else "."
    first_branch = replace(pattern, segment_lengths=pattern.segment_lengths[:1], dilation_rates=(1,))
    return "1" if key in first_branch.reach(query, head) else "2"


argparse.ArgumentParser(description=__doc__).parse_args()

for preset in ("paper", "retrofit"):
    pattern = DilationPattern.preset(preset, (8, 16), (1, 2))
    print(f"{preset}: segments {pattern.segment_lengths}, rates {pattern.dilation_rates}; heads 0 and 1")
    for query in range(LENGTH):
        rows = ("".join(reached_by(pattern, query, key, head) for key in range(LENGTH)) for head in range(NUM_HEADS))
        print("   ".join(rows))
    print()

    # A query and a key cost 4 * head_dim operations: two products forward, each a multiplication and an addition.
    pairs = sum(len(pattern.reach(query, head)) for query in range(LENGTH) for head in range(NUM_HEADS))
    flops = pattern.attention_flops(LENGTH, NUM_HEADS, HEAD_DIM)
    if flops != 4 * HEAD_DIM * pairs:
        raise SystemExit(f"{preset}: attention_flops says {flops}, the drawing {4 * HEAD_DIM * pairs}")

    # What must be cached after some tokens is what later queries still reach among them.
    entries = pattern.cache_entries(LENGTH)
    for head in range(NUM_HEADS):
        later = range(LENGTH, 2 * LENGTH)
        needed = {key for query in later for key in pattern.reach(query, head) if key < LENGTH}
        if len(needed) > entries:
            raise SystemExit(f"{preset}: later queries reach {len(needed)} keys, cache_entries says {entries}")

long = DilationPattern.geometric(2048, 2**20, preset="retrofit")
saving = DilationPattern((2**20,), (1,)).attention_flops(2**20, 1, 128) / long.attention_flops(2**20, 1, 128)
print(f"At {2**20:,} tokens, segments doubling from 2,048: 1/{saving:.0f} of dense attention's operations")
print(f"and {long.cache_entries(2**20):,} cached keys per KV head.")
print("checked: the cost formulas count what is drawn")
