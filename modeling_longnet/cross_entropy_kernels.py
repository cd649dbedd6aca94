"""Cross-entropy and its gradient from logits: the Triton kernel, and nothing but the kernel."""

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("the fused kernels need triton; install it or use another backend") from error


LOWEST = tl.constexpr(-1e38)


@triton.jit
def cross_entropy_kernel(
    logits_ptr, targets_ptr, losses_ptr, gradient_ptr, stride_logits, stride_gradient, vocabulary, label_smoothing,
    WANT_GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute one token's loss, and the gradient of it over the vocabulary, which may take the place of the logits.

    The first pass finds the normaliser; a row is short enough for the second to find it in the cache.
    """
    token = tl.program_id(0).to(tl.int64)
    logits_ptr += token * stride_logits
    target = tl.load(targets_ptr + token)
    at_target = tl.load(logits_ptr + target).to(tl.float32)
    columns = tl.arange(0, BLOCK)

    peak, total, sum_of_logits = LOWEST, 0.0, 0.0
    for first in range(0, vocabulary, BLOCK):
        inside = first + columns < vocabulary
        x = tl.load(logits_ptr + first + columns, mask=inside, other=float("-inf")).to(tl.float32)
        new_peak = tl.maximum(peak, tl.max(x, 0))
        total = total * tl.exp(peak - new_peak) + tl.sum(tl.exp(x - new_peak), 0)
        sum_of_logits += tl.sum(tl.where(inside, x, 0.0), 0)
        peak = new_peak
    log_total = tl.log(total)

    # From the peak, not from lse: where logits are large, a short float keeps differences only.
    loss = log_total + (peak - at_target)
    if label_smoothing > 0:  # 0 * inf would be nan where a token is ruled out
        loss = (1 - label_smoothing) * loss + label_smoothing * (log_total + (peak - sum_of_logits / vocabulary))
    tl.store(losses_ptr + token, loss)
    if WANT_GRADIENT:
        gradient_ptr += token * stride_gradient
        uniform = label_smoothing / vocabulary
        for first in range(0, vocabulary, BLOCK):
            inside = first + columns < vocabulary
            x = tl.load(logits_ptr + first + columns, mask=inside, other=float("-inf")).to(tl.float32)
            gradient = tl.exp(x - peak - log_total) - uniform
            gradient = tl.where(first + columns == target, gradient - (1 - label_smoothing), gradient)
            tl.store(gradient_ptr + first + columns, gradient.to(gradient_ptr.dtype.element_ty), mask=inside)
