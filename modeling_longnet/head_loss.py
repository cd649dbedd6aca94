"""Cross-entropy of a language-modelling head without its logits: one chunk of tokens at a time, both ways.

The loss needs the gradient of its own logits, softmax minus target, and has it at hand right after the logits. So each
chunk turns into its share of the loss and of the gradients at once, and its logits go; the backward pass only scales.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from .cross_entropy_triton import fused_losses, is_fused
from .sequence_tiles import GradientSum, are_partitioned, run_once_per_pass, trainable


# Logits of one chunk: 1 GiB of them in float32, 2048 tokens of a vocabulary of 131,072.
CHUNK_LOGITS = 2**28
# The fused kernel works in place, so a chunk may be larger: each adds a gradient of the size of the head to a sum.
FUSED_CHUNK_BYTES = 2**31

IGNORED = -100  # the label of a token that is not predicted, as everywhere in PyTorch


def next_tokens(labels: Tensor, ignore_index: int = IGNORED) -> Tensor:
    """Shift labels ``[B, L]`` so that each token has its successor's; the last one of a row has none."""
    return F.pad(labels, (0, 1), value=ignore_index)[..., 1:]


def mark_ignored(targets: Tensor, ignore_index: int) -> Tensor:
    """Give ``IGNORED`` to the targets that a caller's own ``ignore_index`` marks; waits for the device if it is another.

    Raises:
        ValueError: if targets are ``IGNORED`` already, which is no token to predict then.
    """
    if ignore_index == IGNORED:
        return targets
    if not torch.compiler.is_compiling() and (count := int((targets == IGNORED).sum())):
        raise ValueError(
            f"{count} labels are {IGNORED}, which ignore_index={ignore_index} leaves to be predicted; give them the "
            f"label {ignore_index}"
        )
    return targets.masked_fill(targets == ignore_index, IGNORED)


def logits_loss(
    logits: Tensor, targets: Tensor, *, num_items: Tensor | int | None = None, label_smoothing: float = 0.0
) -> Tensor:
    """Compute the cross-entropy of logits ``[B, L, vocabulary]``; arguments and result as of ``head_loss``."""
    logits, targets = logits.flatten(0, -2), targets.flatten().to(logits.device)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    total = F.cross_entropy(logits, targets, ignore_index=IGNORED, label_smoothing=label_smoothing, reduction="sum")
    return _mean(total, targets, num_items)


def head_loss(
    hidden: Tensor,
    head: nn.Module,
    targets: Tensor,
    *,
    num_items: Tensor | int | None = None,
    label_smoothing: float = 0.0,
    implementation: str = "auto",
) -> Tensor:
    """Compute the cross-entropy of ``head(hidden)`` against ``targets``, holding the logits of one chunk at a time.

    Equals ``logits_loss(head(hidden), targets)`` with its gradients. Tokens without a target cost nothing. On CUDA with
    Triton, one kernel turns a chunk's logits into losses and gradient, in place.

    Args:
        hidden: ``[B, L, hidden]``, any floating dtype.
        head: maps ``[n, hidden]`` to ``[n, vocabulary]``; any module.
        targets: ``[B, L]`` int64, the token to predict at each place, or ``IGNORED``.
        num_items: what the sum of the losses is divided by; None: the number of targets.
        label_smoothing: weight of the uniform distribution in the target, ``0 <= label_smoothing <= 1``.
        implementation: ``"chunked"`` (this file's: any head, any device), ``"torch"`` (``linear_cross_entropy`` of
            torch 2.13 or newer, which rounds the loss to the inputs' dtype), ``"liger"`` (liger-kernel, CUDA) or
            ``"auto"``, which is ``"chunked"``. One asked for by name runs or raises.

    Returns:
        The loss, a scalar in float32 (float64 for float64 inputs). NaN without any target, as in PyTorch, with the gradient 0.

    Raises:
        ValueError: if the implementation does not exist or cannot run this call, if tokens and targets differ in
            number, a target is no token, or ``label_smoothing`` no weight.
    """
    if implementation not in _IMPLEMENTATIONS:
        raise ValueError(
            f"loss_implementation must be one of {', '.join(map(repr, _IMPLEMENTATIONS))}, got {implementation!r}"
        )
    check_labels(targets, hidden.shape[:-1])
    if targets.is_floating_point():
        raise ValueError(f"labels must be int64, got {targets.dtype}")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing must be between 0 and 1, got {label_smoothing}")
    hidden, targets = hidden.flatten(0, -2), targets.flatten().to(hidden.device)
    total = _IMPLEMENTATIONS[implementation](hidden, head, targets, label_smoothing)
    return _mean(total, targets, num_items)


def check_labels(labels: Tensor, tokens: torch.Size) -> None:
    """Refuse labels that are not one for each of ``tokens``, the shape of the batch.

    Raises:
        ValueError: with both shapes.
    """
    if labels.shape != tokens:
        raise ValueError(f"labels must give each of the {list(tokens)} tokens one, got shape {list(labels.shape)}")


def check_tokens(targets: Tensor, vocabulary: int) -> None:
    """Refuse targets that are no tokens of the vocabulary; waits for the device, so not in compiled code.

    Raises:
        ValueError: with the numbers.
    """
    if targets.numel() and not torch.compiler.is_compiling():
        _refuse_outside(*torch.stack(targets.where(targets != IGNORED, 0).aminmax()).tolist(), vocabulary)


def _refuse_outside(least: int, most: int, vocabulary: int) -> None:
    if least < 0 or most >= vocabulary:
        raise ValueError(
            f"labels must be {IGNORED} or tokens of the vocabulary, 0 to {vocabulary - 1}; they reach from {least} "
            f"to {most}"
        )


@torch.no_grad()
def token_losses(hidden: Tensor, head: nn.Module, targets: Tensor) -> Tensor:
    """Compute each token's own loss, ``[B, L]`` for ``hidden [B, L, hidden]``, 0 where there is no target.

    Like the loss of ``head_loss`` in float32, or float64 for float64 inputs.
    """
    flat = targets.flatten().to(hidden.device)
    found = None
    for chunk, states in _chunks(hidden.flatten(0, -2), head, flat):
        losses, _ = _losses_and_gradient(head(states), flat[chunk], 0.0)
        if found is None:
            found = losses.new_zeros(len(flat))
        found[chunk] = losses
    if found is None:
        return hidden.new_zeros(targets.shape, dtype=torch.promote_types(hidden.dtype, torch.float32))
    return found.view(targets.shape)


def _mean(total: Tensor, targets: Tensor, num_items: Tensor | int | None) -> Tensor:
    """Divide by the number of items. Of none, the mean is NaN and has the gradient 0: no step follows from it."""
    if num_items is None:
        num_items = (targets != IGNORED).sum()
    if not isinstance(num_items, Tensor):
        num_items = torch.full_like(total, num_items, requires_grad=False)
    num_items = num_items.to(targets.device)
    none = num_items == 0
    return (total / num_items.masked_fill(none, 1)).masked_fill(none, torch.nan)


def _chunks(hidden: Tensor, head: nn.Module, targets: Tensor) -> Iterator[tuple[Tensor | slice, Tensor]]:
    """Yield the indices of the tokens that have a target, a chunk at a time, and their rows of ``hidden``."""
    fused = is_fused(hidden.device, hidden.dtype)
    vocabulary = _vocabulary(head, hidden)
    size = _chunk_tokens(vocabulary, FUSED_CHUNK_BYTES // hidden.itemsize if fused else CHUNK_LOGITS)
    found = targets != IGNORED
    if not len(found):  # of which there is no least label
        return
    extremes = targets.where(found, 0).aminmax()
    *counts, least, most = torch.stack([*(part.sum() for part in found.split(size)), *extremes]).tolist()
    _refuse_outside(least, most, vocabulary)
    for i, count in enumerate(counts):
        chunk = slice(i * size, min((i + 1) * size, len(targets)))
        if 0 < count < chunk.stop - chunk.start:
            chunk = chunk.start + (targets[chunk] != IGNORED).nonzero().flatten()
        if count:
            yield chunk, hidden[chunk]


def _chunk_tokens(vocabulary: int, logits: int) -> int:
    tokens = logits // vocabulary
    return tokens - tokens % 256 if tokens > 256 else max(1, tokens)  # what matrix units multiply at a time


def _vocabulary(head: nn.Module, hidden: Tensor) -> int:
    """Return the number of a head's logits; a head that is no linear layer is asked for those of one token."""
    if not hasattr(head, "out_features"):
        with torch.no_grad():
            return head(hidden[:1]).shape[-1]
    # The weight comes first: PEFT's copy of a tied head has in_features and out_features exchanged.
    weight = getattr(head, "weight", None)
    # Packed as bitsandbytes does, or elsewhere, as ZeRO-3 has weights outside of a module's own forward.
    unknown = weight is None or not weight.is_floating_point() or weight.numel() == 0
    return head.out_features if unknown else weight.shape[0]


def _losses_and_gradient(
    logits: Tensor, targets: Tensor, label_smoothing: float, want_gradient: bool = False, in_place: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Compute the losses ``[n]`` of logits ``[n, V]``, in at least float32, and the gradient of their sum.

    The gradient is rounded to the logits' dtype, but at the target, where it is the difference of two numbers that are
    often close, only after the subtraction. ``in_place``: it may take the place of the logits.
    """
    if is_fused(logits.device, logits.dtype):
        logits = logits.detach().contiguous()
        gradient = None if not want_gradient else logits if in_place else torch.empty_like(logits)
        return fused_losses(logits, targets, label_smoothing, gradient), gradient
    targets = targets[:, None]
    log_p = logits.detach().log_softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
    at_target = log_p.gather(1, targets)
    losses = (label_smoothing - 1) * at_target
    if label_smoothing:
        losses -= label_smoothing * log_p.mean(-1, keepdim=True)
    if not want_gradient:
        return losses[:, 0], None
    uniform = label_smoothing / logits.shape[-1]
    gradient_at_target = at_target.exp() - (1 - label_smoothing) - uniform
    gradient = log_p.exp_()
    if label_smoothing:
        gradient -= uniform
    gradient = gradient.to(logits.dtype)
    return losses[:, 0], gradient.scatter_(1, targets, gradient_at_target.to(logits.dtype))


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(ctx, head, targets, label_smoothing, hidden, *parameters):
        want_hidden, *want_parameters = ctx.needs_input_grad[3:]
        want = want_hidden or any(want_parameters)
        sums = GradientSum(parameters, want_parameters)
        grad_hidden = torch.zeros_like(hidden) if want_hidden else None
        total = torch.zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32), device=hidden.device)
        in_place = type(head) is nn.Linear and not head._forward_hooks  # nobody reads its output again
        for chunk, states in _chunks(hidden, head, targets):
            states = states.detach().requires_grad_(want_hidden)
            with torch.set_grad_enabled(want):
                logits = head(states)
            losses, grad_logits = _losses_and_gradient(logits, targets[chunk], label_smoothing, want, in_place)
            total += losses.sum()
            if want:
                inputs = [*([states] if want_hidden else []), *sums.tensors]
                gradients = torch.autograd.grad(logits, inputs, grad_logits, allow_unused=True)
                if want_hidden:
                    grad_hidden[chunk] = gradients[0]
                sums.add(gradients[want_hidden:])
            del logits, grad_logits  # before the next chunk's come
        ctx.save_for_backward(grad_hidden, *sums.results())
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_total):
        return None, None, None, *(None if x is None else _scaled(x, grad_total) for x in ctx.saved_tensors)


def _scaled(x: Tensor, factor: Tensor) -> Tensor:
    """Multiply by a scalar tensor without rounding it to the dtype of ``x``: 1 / tokens is 0 in float16."""
    result = torch.empty_like(x)
    for part, target in zip(x.split(8192), result.split(8192)):
        target.copy_(part.to(factor.dtype) * factor)
    return result


def _chunked(hidden: Tensor, head: nn.Module, targets: Tensor, label_smoothing: float) -> Tensor:
    def loss(states: Tensor, targets: Tensor) -> Tensor:
        logits = head(states)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return F.cross_entropy(logits, targets, ignore_index=IGNORED, label_smoothing=label_smoothing, reduction="sum")

    if run_once_per_pass([head]):
        return loss(hidden, targets)
    if not torch.compiler.is_compiling() and not are_partitioned([head]):
        return _Chunked.apply(head, targets, label_smoothing, hidden, *trainable([head]))
    size = _chunk_tokens(_vocabulary(head, hidden), CHUNK_LOGITS)  # with logits once more in the backward pass
    chunks = zip(hidden.split(size), targets.split(size))
    return torch.stack([checkpoint(loss, *chunk, use_reentrant=False) for chunk in chunks]).sum()


def _torch_cross_entropy(hidden: Tensor, head: nn.Module, targets: Tensor, label_smoothing: float) -> Tensor:
    if not hasattr(F, "linear_cross_entropy"):
        raise ValueError(f'loss_implementation="torch" needs torch 2.13 or newer, this is {torch.__version__}')
    if label_smoothing:
        raise ValueError(f'loss_implementation="torch" has no label_smoothing, got {label_smoothing}; use "chunked"')
    hidden, weight = _operands(hidden, head, "torch")
    options = nn.LinearCrossEntropyOptions(allow_retain_graph=True)
    return F.linear_cross_entropy(hidden, weight, targets, reduction="sum", ignore_index=IGNORED, options=options)


def _liger_cross_entropy(hidden: Tensor, head: nn.Module, targets: Tensor, label_smoothing: float) -> Tensor:
    try:
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy
    except ImportError as error:
        raise ValueError(f'loss_implementation="liger" cannot import liger-kernel: {error}') from error
    if hidden.device.type != "cuda":
        raise ValueError(f'loss_implementation="liger" runs on CUDA, the model is on {hidden.device}; use "chunked"')
    hidden, weight = _operands(hidden, head, "liger")
    return liger_fused_linear_cross_entropy(
        hidden, weight, targets, ignore_index=IGNORED, label_smoothing=label_smoothing, reduction="sum",
        accum_dtype=torch.float32,
    )  # fmt: skip


def _operands(hidden: Tensor, head: nn.Module, implementation: str) -> tuple[Tensor, Tensor]:
    """Take a plain linear head apart, in the dtype that autocast gives its product."""
    if type(head) is not nn.Linear or head.bias is not None:
        raise ValueError(
            f'loss_implementation="{implementation}" needs an nn.Linear head without bias, got {type(head).__name__}; '
            'use "chunked"'
        )
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        return hidden.to(dtype), head.weight.to(dtype)
    return hidden, head.weight


_IMPLEMENTATIONS = {
    "auto": _chunked,
    "chunked": _chunked,
    "torch": _torch_cross_entropy,
    "liger": _liger_cross_entropy,
}
