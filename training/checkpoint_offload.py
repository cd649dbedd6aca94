"""Hold activation checkpoints in host memory between the forward and the backward pass.

transformers can do this too (``activation_checkpointing_enable(offload=True)``), on the stream that computes. Here the
copies run beside the computation, the next one is fetched while its predecessor is in use, host memory is taken in
blocks (PyTorch rounds what it pins up to a power of two: 32 checkpoints of 3.3 GB would take 137 GB instead of 105),
and the last layers may keep theirs on the device, where they are needed first.
"""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from transformers.modeling_layers import GradientCheckpointingLayer


BLOCK_BYTES = 2**26
SMALLEST_BYTES = 2**20  # shorter tensors stay where they are


def offload_checkpoints(model: nn.Module, layers: int | None = None) -> None:
    """Let the first ``layers`` layers of a model keep their checkpoints in pinned host memory.

    Call it after activation checkpointing is switched on. Outputs and gradients stay the same, bit for bit. Per step
    and layer, ``tokens * hidden_size`` numbers travel each way.

    Args:
        model: a model of transformers, wrapped or not.
        layers: how many of those that checkpoint; None: all.

    Raises:
        ValueError: if activation checkpointing is off, or there are not so many layers.
    """
    found = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer) and m.gradient_checkpointing]
    if not found:
        raise ValueError("no layer checkpoints its activations; call activation_checkpointing_enable() first")
    if layers is not None and not 0 <= layers <= len(found):
        raise ValueError(f"layers must be from 0 to {len(found)}, the layers that checkpoint, got {layers}")
    host = HostCheckpoints()
    for layer in found[:layers]:
        layer._gradient_checkpointing_func = _Offloading(layer._gradient_checkpointing_func, host)


class _Offloading:
    """A checkpointing function whose kept inputs go to the host."""

    def __init__(self, checkpoint: Callable[..., Any], host: "HostCheckpoints"):
        self.checkpoint = checkpoint
        self.host = host

    def __call__(self, function: Callable[..., Any], *args: Any) -> Any:
        with saved_tensors_hooks(self.host.store, self.host.fetch):
            return self.checkpoint(function, *args)


class _Stored:
    """One tensor on the host, or on its way."""

    def __init__(self, tensor: Tensor, blocks: list[Tensor], before: "weakref.ref[_Stored] | None"):
        self.like = torch.empty_like(tensor, device="meta")
        self.device = tensor.device
        self.before = before  # stored before it, so needed after it
        self.blocks: list[Tensor] | None = blocks
        self.back: Tensor | None = None
        self.arrived: torch.cuda.Event | None = None


class HostCheckpoints:
    """Tensors that leave the device in one order and come back in the reverse one."""

    def __init__(self) -> None:
        self.last: weakref.ref[_Stored] | None = None  # the graph alone keeps what is stored
        self.streams: dict[torch.device, torch.cuda.Stream] = {}

    def store(self, tensor: Tensor) -> Tensor | _Stored:
        """Start copying a CUDA tensor to the host; others are handed back as they are."""
        if tensor.device.type != "cuda" or tensor.nbytes < SMALLEST_BYTES or not tensor.is_contiguous():
            return tensor
        if tensor.device not in self.streams:
            self.streams[tensor.device] = torch.cuda.Stream(tensor.device)
        side = self.streams[tensor.device]
        blocks: list[Tensor] = []
        stored = _Stored(tensor, blocks, self.last)
        flat = tensor.detach().view(-1).view(torch.uint8)
        side.wait_stream(torch.cuda.current_stream(tensor.device))
        with torch.cuda.stream(side):
            for part in flat.split(BLOCK_BYTES):
                block = torch.empty(BLOCK_BYTES, dtype=torch.uint8, pin_memory=True)
                block[: len(part)].copy_(part, non_blocking=True)
                blocks.append(block)
        tensor.record_stream(side)  # its memory is free once it is copied
        self.last = weakref.ref(stored)
        return stored

    def fetch(self, stored: Tensor | _Stored) -> Tensor:
        """Bring a tensor back, and start on the one that is needed next."""
        if isinstance(stored, Tensor):
            return stored
        self._start(stored)
        before = stored.before() if stored.before is not None else None
        if before is not None:
            self._start(before)
        self.last = stored.before
        stream = torch.cuda.current_stream(stored.device)
        stream.wait_event(stored.arrived)
        back = stored.back
        assert back is not None  # started above
        back.record_stream(stream)
        return back.view(stored.like.dtype).view(stored.like.shape)

    def _start(self, stored: _Stored) -> None:
        if stored.blocks is None:
            return
        size = stored.like.nbytes
        side = self.streams[stored.device]
        with torch.cuda.stream(side):
            stored.back = torch.empty(size, dtype=torch.uint8, device=stored.device)
            for part, block in zip(stored.back.split(BLOCK_BYTES), stored.blocks):
                part.copy_(block[: len(part)], non_blocking=True)
            stored.arrived = side.record_event()
        stored.blocks = None  # the allocator gives them away again once the copies are done
