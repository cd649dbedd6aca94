"""What all layers of a model compute alike in one forward pass, computed once."""

from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch
from torch import Tensor


Result = TypeVar("Result")


class OncePerPass:
    """Remembers results for as long as the same tensor of positions comes: one forward pass."""

    def __init__(self) -> None:
        self._positions: Tensor | None = None
        self._results: dict[Hashable, Any] = {}

    def __call__(self, positions: Tensor, key: Hashable, compute: Callable[[], Result]) -> Result:
        """Return ``compute()``, or what it returned for this tensor and key.

        Args:
            positions: the forward pass's logical positions; not their values, the very tensor.
            key: tells apart what is computed from them.
        """
        if torch.compiler.is_compiling():  # the compiler sees by itself that layers compute the same
            return compute()
        if positions is not self._positions:
            self._positions, self._results = positions, {}
        if key not in self._results:
            self._results[key] = compute()
        return self._results[key]

    def __deepcopy__(self, memo: dict[int, Any]) -> "OncePerPass":
        return memo.setdefault(id(self), OncePerPass())
