"""What a CUDA device can do, asked once: PyTorch looks it up anew in every call, for longer than a short launch takes."""

import functools

import torch


@functools.cache
def cuda_capability(device: torch.device) -> tuple[int, int]:
    """Return the compute capability of a CUDA device."""
    return torch.cuda.get_device_capability(device)
