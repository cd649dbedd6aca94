"""Count the floating-point operations of matrix products, forward and backward."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry


class MatmulFlops(TorchDispatchMode):
    """Inside this context, add up the operations of every matrix product in ``count``; batched ones are attention's."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        packet = function.overloadpacket
        if packet in (torch.ops.aten.mm, torch.ops.aten.addmm):
            self.count += flop_registry[packet](*args, **(kwargs or {}), out_val=result)
        return result
