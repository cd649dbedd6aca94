"""The fused cross-entropy: says which logits it serves, and launches the Triton kernel."""

import torch
from torch import Tensor


try:
    import triton

    from .cross_entropy_kernels import cross_entropy_kernel
except ImportError:  # is_fused says so before anything here is needed
    triton = None


MAX_BLOCK = 8192


def is_fused(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernel serves logits of this kind."""
    return triton is not None and device.type == "cuda" and dtype in (torch.float32, torch.bfloat16, torch.float16)


def fused_losses(logits: Tensor, targets: Tensor, label_smoothing: float, gradient: Tensor | None) -> Tensor:
    """Compute the losses ``[n]`` of logits ``[n, V]`` in float32, reading them twice at most.

    Args:
        logits: rows are contiguous.
        targets: ``[n]``, each a column of the logits.
        gradient: like the logits, filled with the gradient of the losses' sum; the logits themselves may be given. None: not
            wanted.
    """
    targets = targets.contiguous()
    losses = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    into = logits if gradient is None else gradient
    with torch.cuda.device_of(logits):
        cross_entropy_kernel[(len(logits),)](
            logits, targets, losses, into, logits.stride(0), into.stride(0), logits.shape[-1], float(label_smoothing),
            WANT_GRADIENT=gradient is not None, BLOCK=min(MAX_BLOCK, triton.next_power_of_2(logits.shape[-1])),
            num_warps=8,
        )  # fmt: skip
    return losses
