"""Which segment lengths reach a context within a budget."""

from modeling_longnet import DilationPattern


SMALLEST_SEGMENT = 64


def suggest_pattern(
    context: int,
    flops_budget: float = 1.0,
    *,
    cache_budget: int | None = None,
    longest_first: int | None = None,
    preset: str = "retrofit",
    num_kv_heads: int = 8,
) -> tuple[DilationPattern, float]:
    """Find the geometric pattern with the longest first segment that fits the budgets.

    Segment lengths and dilation rates double from branch to branch and the last segment covers the context: cost per
    token then grows with the logarithm of the context (Section 3.1 of the paper). The first segment is what a query
    sees whole, so the longest one that the budget allows is best.

    Args:
        context: tokens to reach.
        flops_budget: attention FLOPs over those of dense attention on ``context`` tokens, ``0 < budget <= 1``.
        cache_budget: entries per KV head and layer that the cache may hold, None for any number.
        longest_first: what the first segment may have at most, as of a source with a sliding window; None for any.
        preset: rules of the pattern.
        num_kv_heads: offsets, and so the exact FLOPs, depend on it a little.

    Returns:
        The pattern, and its own share of dense FLOPs.

    Raises:
        ValueError: if the numbers make no sense, or even a first segment of 64 tokens costs or holds more.
    """
    if context < SMALLEST_SEGMENT:
        raise ValueError(f"context must be at least {SMALLEST_SEGMENT} tokens, got {context}")
    if not 0 < flops_budget <= 1:
        raise ValueError(f"flops_budget is a share of dense attention, between 0 and 1, got {flops_budget}")
    if cache_budget is not None and cache_budget < 1:
        raise ValueError(f"the cache must hold at least one entry per KV head, got {cache_budget}")
    if longest_first is not None and longest_first < SMALLEST_SEGMENT:
        raise ValueError(
            f"the first segment may have {longest_first} tokens at most, the source's sliding window, and suggested are "
            f"such of at least {SMALLEST_SEGMENT}; choose the branches (--segment-lengths)"
        )
    dense = DilationPattern((context,), (1,)).attention_flops(context, num_kv_heads, 1)
    last = SMALLEST_SEGMENT
    while last < context:
        last *= 2
    first, share, entries = last, 1.0, context
    while first >= SMALLEST_SEGMENT:
        pattern = DilationPattern.geometric(first, last, preset=preset)
        share = pattern.attention_flops(context, num_kv_heads, 1) / dense
        entries = pattern.cache_entries(context)
        fits = longest_first is None or first <= longest_first
        if fits and share <= flops_budget and (cache_budget is None or entries <= cache_budget):
            return pattern, share
        first //= 2
    if share > flops_budget:
        raise ValueError(
            f"no pattern reaches {context} tokens for {flops_budget:.3g} of dense attention: a first segment of "
            f"{SMALLEST_SEGMENT} tokens still costs {share:.3g}; raise the budget or lower the context"
        )
    raise ValueError(
        f"no pattern reaches {context} tokens with {cache_budget} cache entries per KV head: a first segment of "
        f"{SMALLEST_SEGMENT} tokens still holds {entries}; raise the budget or lower the context"
    )
