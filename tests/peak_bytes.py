"""Watch the tensors that a computation makes: how large the largest is, and how many bytes live at once."""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class TensorWatch(TorchDispatchMode):
    """Inside this context, note every tensor that an operation returns. What existed before does not count.

    ``largest`` is the number of elements of the largest one, ``peak_bytes`` the most bytes of their storages that
    lived at the same time. Memory inside an operation does not show.
    """

    def __init__(self):
        super().__init__()
        self.largest = self.live_bytes = self.peak_bytes = 0
        self.known = weakref.WeakSet()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        for x in tree_iter((args, kwargs)):  # older than this context: not ours
            if isinstance(x, torch.Tensor):
                self.known.add(x.untyped_storage())
        result = function(*args, **(kwargs or {}))
        for x in tree_iter(result):
            if isinstance(x, torch.Tensor):
                self._note(x)
        return result

    def _note(self, x: torch.Tensor) -> None:
        self.largest = max(self.largest, x.numel())
        storage = x.untyped_storage()
        if storage in self.known:
            return
        self.known.add(storage)
        size = storage.nbytes()
        self.live_bytes += size
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        weakref.finalize(storage, self._gone, size)

    def _gone(self, size: int) -> None:
        self.live_bytes -= size
