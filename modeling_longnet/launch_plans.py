"""Plans: all of a call's kernel launches but the addresses, worked out once for all calls that look alike.

The layers of a model repeat the same calls, and on short inputs a kernel takes less time than Python needs to choose
its tiles and to describe its tensors. A plan is made from ``TensorLayout`` and other hashable values only, so a cached
function of these can make it, and nothing that the cache does not see can enter it.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .compiled_kernels import DirectLaunch, Pointer, Rows, current_stream, launch


class TensorLayout(NamedTuple):
    """All of a tensor that a plan may depend on. ``aligned``: to 16 bytes."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    aligned: bool


def layout_of(x: Tensor) -> TensorLayout:
    """Describe a tensor."""
    return TensorLayout(x.shape, x.stride(), x.dtype, x.device, x.data_ptr() % 16 == 0)


class KernelLaunch:
    """One launch of a kernel, which names its tensors."""

    def __init__(
        self, kernel, grid: tuple[int, int, int], arguments: tuple, constants: dict[str, Any], **options: int
    ):
        """Prepare a launch.

        Args:
            kernel: of ``triton.jit`` or ``gluon.jit``.
            arguments: all that are no constants, in the kernel's order; ``Pointer`` and ``Rows`` stand for tensors.
            constants: the compile-time arguments, by name; hashable.
            options: ``num_warps``, ``num_stages``, ``launch_pdl``, ``maxnreg``.
        """
        self.kernel, self.grid, self.arguments = kernel, grid, arguments
        self.constants, self.options = constants, options
        self._direct: DirectLaunch | None = None

    def run(
        self,
        tensors: Mapping[str, Tensor],
        addresses: Mapping[str, int],
        device: torch.device,
        stream: int,
        watched: bool,
    ) -> None:
        """Launch on the current device. The first time, and while launches are watched, it is done by Triton."""
        if self._direct is not None and not watched:
            self._direct(addresses, stream)
            return
        arguments = tuple(x.filled(tensors) if isinstance(x, (Pointer, Rows)) else x for x in self.arguments)
        compiled = launch(self.kernel, self.grid, arguments, self.constants, device, **self.options)
        if DirectLaunch.serves(compiled):
            self._direct = DirectLaunch(compiled, self.grid, self.arguments, len(self.constants))


class Plan(NamedTuple):
    """Launches of one device, in their order."""

    device: torch.device
    launches: tuple[KernelLaunch, ...]

    def run(self, **tensors: Tensor | None) -> None:
        """Launch with these tensors, which must look as those that the plan was made for."""
        given = {name: x for name, x in tensors.items() if x is not None}
        addresses = {name: x.data_ptr() for name, x in given.items()}
        if self.device.type != "cuda":  # Triton's interpreter
            for launch_ in self.launches:
                launch_.run(given, addresses, self.device, 0, False)
            return
        with torch.cuda.device(self.device.index):
            stream, watched = current_stream(self.device), DirectLaunch.is_watched()
            for launch_ in self.launches:
                launch_.run(given, addresses, self.device, stream, watched)
