"""What a CUDA device can do, asked once: PyTorch looks it up anew in every call, for longer than a short launch takes."""

import functools

import torch


MAX_BATCH = 2**16 - 1  # as large as the dimension of a grid can be that kernels put the batch into


def cuda_capability(device: torch.device) -> tuple[int, int]:
    """Return the compute capability of a CUDA device."""
    if torch.compiler.is_compiling():  # which asks once anyway, and warns of what is kept
        return torch.cuda.get_device_capability(device)
    return _kept_capability(device)


@functools.cache
def _kept_capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


@functools.cache
def num_processors(device: torch.device) -> int:
    """Return how many multiprocessors a device has: 1 if it is no CUDA device, as in Triton's interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
