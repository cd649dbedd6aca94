"""What the heads of one layer see of the past: by distance, and at the edges of segments."""

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from modeling_longnet import DilationPattern


# Query positions that an average is taken over; a pattern that repeats after no more of them is averaged exactly.
MAX_POSITIONS = 2048
GOLDEN_RATIO = (math.sqrt(5) - 1) / 2


@dataclass(frozen=True)
class Coverage:
    """Averages over query positions far from the start of a document, all KV heads of a layer.

    Args:
        distances: how many tokens back, each once.
        per_head: per KV head, the share of queries that reach the key at each distance.
        per_branch: per branch, the share of queries and heads that reach the key through it.
        any_head: the share of queries for which at least one head reaches it.
        blind: the share of queries that reach nothing, in the mean over heads.
        nearest_missed: the share of queries for which no head reaches the token right before.
        exact: whether all positions of a period were averaged, not a sample.
    """

    distances: tuple[int, ...]
    per_head: tuple[tuple[float, ...], ...]
    per_branch: tuple[tuple[float, ...], ...]
    any_head: tuple[float, ...]
    blind: float
    nearest_missed: float
    exact: bool

    @property
    def mean_head(self) -> tuple[float, ...]:
        """The share of queries and heads that reach the key at each distance."""
        return tuple(sum(column) / len(column) for column in zip(*self.per_head))


def reaching_branches(
    pattern: DilationPattern, query: int, key: int, kv_head: int, num_kv_heads: int
) -> Iterator[int]:
    """Yield the branches through which a causal query reaches a key; only the first where each key counts once."""
    if key > query or key < 0:
        return
    for i, (w, r) in enumerate(pattern.branches):
        offset = pattern.offset(i, kv_head, num_kv_heads)
        if (key % w) % r != offset or (pattern.dilate_queries and (query % w) % r != offset):
            continue
        if query - key < w if pattern.window == "sliding" else query // w == key // w:
            yield i
            if not pattern.count_overlaps:
                return


def reaches(pattern: DilationPattern, query: int, key: int, kv_head: int, num_kv_heads: int) -> bool:
    """Whether a causal query reaches a key, in any branch."""
    return any(True for _ in reaching_branches(pattern, query, key, kv_head, num_kv_heads))


def count_reached(pattern: DilationPattern, query: int, kv_head: int, num_kv_heads: int) -> int:
    """Count the keys that a causal query reaches, ``len(pattern.reach(...))``, in the time of a few divisions."""
    reached, nearer = 0, query + 1
    for i, branch in enumerate(pattern.branches):
        w, r = branch
        offset = pattern.offset(i, kv_head, num_kv_heads)
        if pattern.dilate_queries and (query % w) % r != offset:
            continue
        first = query - query % w if pattern.window == "segment" else max(0, query - w + 1)
        reached += branch.kept_before(nearer, offset) - branch.kept_before(first, offset)
        if not pattern.count_overlaps:  # a nested pattern: what the branch before reaches is counted
            nearer = first
    return reached


def measure_coverage(pattern: DilationPattern, num_kv_heads: int, distances: list[int] | None = None) -> Coverage:
    """Average over queries what a pattern lets them reach.

    Args:
        pattern: branches and rules.
        num_kv_heads: KV heads of a layer; offsets depend on it.
        distances: how many tokens back; None: 0, 1, 2, 3, 4, 6, 8, 12, ... up to the longest segment.

    Returns:
        The averages: over a whole period of the pattern where it is short, else over a sample of it.

    Raises:
        ValueError: if ``num_kv_heads`` is not positive or a distance is negative.
    """
    columns = list(zip(*pattern.offsets(num_kv_heads)))
    longest = max(pattern.segment_lengths)
    if distances is None:
        distances = default_distances(longest)
    if min(distances, default=0) < 0:
        raise ValueError(f"distances must not be negative, got {min(distances)}")
    period = math.lcm(*pattern.segment_lengths)
    exact = period <= MAX_POSITIONS
    steps = period if exact else MAX_POSITIONS
    # Far enough from the start for every distance; a sample must not fall in step with the powers of two.
    start = period * -(-max([longest, *distances]) // period)
    places = range(steps) if exact else [int(k * GOLDEN_RATIO % 1 * period) for k in range(steps)]
    alike = Counter(columns)  # heads with the same offsets reach the same
    heads = {columns.index(offsets): number for offsets, number in alike.items()}
    counts = {g: [0] * len(distances) for g in heads}
    branch_counts = [[0] * len(distances) for _ in pattern.branches]
    any_counts = [0] * len(distances)
    blind = missed = 0
    for place in places:
        query = start + place
        for column, distance in enumerate(distances):
            seen = {g: list(reaching_branches(pattern, query, query - distance, g, num_kv_heads)) for g in heads}
            any_counts[column] += any(seen.values())
            for g, number in heads.items():
                counts[g][column] += bool(seen[g])
                for i in seen[g]:
                    branch_counts[i][column] += number
        blind += sum(number * (not count_reached(pattern, query, g, num_kv_heads)) for g, number in heads.items())
        missed += not any(reaches(pattern, query, query - 1, g, num_kv_heads) for g in heads)
    return Coverage(
        distances=tuple(distances),
        per_head=tuple(tuple(count / steps for count in counts[columns.index(offsets)]) for offsets in columns),
        per_branch=tuple(tuple(count / steps / num_kv_heads for count in row) for row in branch_counts),
        any_head=tuple(count / steps for count in any_counts),
        blind=blind / steps / num_kv_heads,
        nearest_missed=missed / steps,
        exact=exact,
    )


def default_distances(longest: int) -> list[int]:
    """List 0, 1, 2, 3, 4, 6, 8, 12, 16, ... below ``longest``, and the last distance inside it."""
    found, step = {0, 1}, 2
    while step < longest:
        found |= {step, step * 3 // 2}
        step *= 2
    return sorted(d for d in found | {longest - 1} if 0 <= d < longest)
