"""How the fused kernels cut a pattern into launches: pure arithmetic, the same for every card.

Dense queries take one launch over all branches. Dilated queries are different rows in each branch and take one launch
per branch, each going on from what the one before has left. Keys take one launch per branch.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

from .dilation_pattern import DilationPattern


ENDLESS = 2**31 - 1  # the period of a progression that no segment interrupts
BEFORE, AFTER, BOTH = range(3)  # the kernels' names for the sides of a query or key


class Launch(NamedTuple):
    """Branches that one launch serves, and the progression that places its tiles.

    ``previous_windows`` holds the window that the branch before has covered already, 0 if nothing is. ``period`` is
    the distance after which the tiles' progression starts anew, ``rate`` its step; ``loop_rate`` is the step of the
    one that the loops walk through, 0 if there are several. ``segmented``: the loops' progression starts anew in each
    segment. ``first``: the launch writes every row and need not look at what was there.
    """

    windows: tuple[int, ...]
    previous_windows: tuple[int, ...]
    rates: tuple[int, ...]
    period: int
    rate: int
    loop_rate: int
    segmented: bool
    first: bool


@functools.cache
def query_launches(pattern: DilationPattern) -> tuple[Launch, ...]:
    """Plan the launches whose tiles are queries: the forward and the gradient of the queries.

    Dense queries meet all branches in one launch. Dilated queries are different rows in each branch, so each takes
    one; the smallest rate goes first, because with rate 1 it writes every row.
    """
    rows = _rows_of_branches(pattern)
    if not pattern.dilate_queries:
        windows, previous_windows, rates = zip(*rows)
        loop_rate = rates[0] if len(rates) == 1 else 0
        segmented = any(w % r for w, r in zip(windows, rates))
        return (Launch(windows, previous_windows, rates, ENDLESS, 1, loop_rate, segmented, True),)

    launches: list[Launch] = []
    for window, previous_window, rate in rows:
        # Rows of different segments form one progression only if the rate divides the segment length. Segments are
        # kept apart in any case where they bound the keys, so that a tile never straddles two.
        period = window if pattern.window == "segment" or window % rate else ENDLESS
        segmented = pattern.window == "sliding" and window % rate != 0
        first = rate == 1 and not launches
        launches.append(Launch((window,), (previous_window,), (rate,), period, rate, rate, segmented, first))
    return tuple(launches)


@functools.cache
def key_launches(pattern: DilationPattern) -> tuple[Launch, ...]:
    """Plan the launches whose tiles are keys: the gradients of keys and values, one launch per branch."""
    launches: list[Launch] = []
    for window, previous_window, rate in _rows_of_branches(pattern):
        bounded = pattern.window == "segment" and pattern.dilate_queries
        period = window if bounded or window % rate else ENDLESS
        loop_rate = rate if pattern.dilate_queries else 1
        segmented = pattern.window == "sliding" and pattern.dilate_queries and window % rate != 0
        first = rate == 1 and not launches
        launches.append(Launch((window,), (previous_window,), (rate,), period, rate, loop_rate, segmented, first))
    return tuple(launches)


def farthest_first(launches: Sequence[Launch]) -> tuple[Launch, ...]:
    """Order launches that add to one another's rounded results: small sums first. None of several writes.

    Mostly the nearest branch gives a key most of its gradient. Where it comes first, what the others add is rounded to
    the last place of that sum, one after the other, and all of it may be lost.
    """
    if len(launches) == 1:
        return tuple(launches)
    return tuple(launch._replace(first=False) for launch in reversed(launches))


def near_branches(pattern: DilationPattern, count: int) -> DilationPattern:
    """Return the branches with the smallest rates as a pattern of their own: those whose launches come first."""
    branches = sorted(pattern.branches, key=lambda branch: branch.dilation_rate)[:count]
    segment_lengths, dilation_rates = zip(*branches)
    return dataclasses.replace(pattern, segment_lengths=segment_lengths, dilation_rates=dilation_rates)


def far_queries(pattern: DilationPattern, count: int) -> tuple[Launch, ...]:
    """Plan the launch of dense queries for what ``near_branches`` leaves: it adds to what those have written."""
    (queries,) = query_launches(pattern)
    rates = queries.rates[count:]
    if not rates:
        return ()
    return (
        queries._replace(
            windows=queries.windows[count:], previous_windows=queries.previous_windows[count:], rates=rates,
            loop_rate=rates[0] if len(rates) == 1 else 0, first=False,
        ),
    )  # fmt: skip


def _rows_of_branches(pattern: DilationPattern) -> list[tuple[int, int, int]]:
    """List ``(window, previous_window, rate)`` per branch, smallest rate first."""
    windows = [min(w, ENDLESS) for w in pattern.segment_lengths]
    previous_windows = [0] * len(windows) if pattern.count_overlaps else [0, *windows[:-1]]
    return sorted(zip(windows, previous_windows, pattern.dilation_rates), key=lambda row: row[2])


def sides_met(pattern: DilationPattern, is_causal: bool, from_key: bool) -> tuple[int, int]:
    """Return the range of sides on which a query (a key) meets keys (queries)."""
    if is_causal:
        return (AFTER, AFTER + 1) if from_key else (BEFORE, BEFORE + 1)
    # With the middle cut out, the two sides are two ranges; otherwise they are one.
    return (BOTH, BOTH + 1) if pattern.count_overlaps else (BEFORE, AFTER + 1)
