"""Models run straight from their files, in the memory of a few of their modules.

A model is built without weights; for the time of its forward, and only then, each module's weights are read from the
files into buffers that all modules share. Of the embedding only the rows of the tokens at hand are read, and logits
come a slice of the vocabulary at a time. So a checkpoint far larger than the machine's memory can be run.
"""

import contextlib
import ctypes
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from .weights import DTYPES, StoredTensor, match_weights, read_tensor, row_slice


Advance = Callable[[int], object]  # called with every number of bytes read, for progress bars


@dataclass(frozen=True)
class StoredModel:
    """A causal language model whose weights lie in files.

    Args:
        model_class: what to build; as in transformers, ``get_decoder`` gives all but the output head.
        config: of the model; its dtype is the model's own.
        tensors: its weights, by name.
        rounded_to: dtype, as safetensors spells it, that weights are rounded to when read; None: as they are stored.
    """

    model_class: type[PreTrainedModel]
    config: PreTrainedConfig
    tensors: dict[str, StoredTensor]
    rounded_to: str | None = None

    @property
    def compute_dtypes(self) -> list[torch.dtype]:
        """float32, and the model's own dtype if that is another."""
        own = self.config.dtype or torch.float32
        own = getattr(torch, own) if isinstance(own, str) else own
        return list(dict.fromkeys((torch.float32, own)))

    def run(self, token_ids: Tensor, dtype: torch.dtype, advance: Advance) -> "Logits":
        """Run everything but the output head.

        Args:
            token_ids: ``[1, L]`` int64.
            dtype: to compute in.
        """
        model = skeleton(self.model_class, self.config).eval()
        for path, module in list(model.named_modules()):
            if list(module.buffers(recurse=False)):  # such as rotary frequencies: computed, not stored
                model.set_submodule(path, type(module)(self.config))
        stored = match_weights(model, self.tensors)
        head = next(name for name, module in model.named_modules() if module is model.get_output_embeddings())
        used, compact_ids = token_ids.unique(return_inverse=True)
        with torch.no_grad(), _borrowed_weights(model, stored, self._dtype, used.tolist(), dtype, advance):
            hidden = model.get_decoder()(compact_ids, use_cache=False).last_hidden_state[0]  # [L, width]
        return Logits(hidden, stored[f"{head}.weight"], self._dtype, advance)

    @property
    def _dtype(self) -> torch.dtype | None:
        return None if self.rounded_to is None else DTYPES[self.rounded_to]


@dataclass(frozen=True)
class Logits:
    """The logits ``[L, vocabulary]`` of a text, computed a slice of the vocabulary at a time."""

    hidden: Tensor  # [L, width]
    head: StoredTensor  # [vocabulary, width]
    rounded_to: torch.dtype | None
    advance: Advance

    def slice(self, first: int, last: int) -> Tensor:
        """Compute the logits of the tokens from ``first`` up to ``last``, ``[L, last - first]``."""
        rows = row_slice(self.head, first, last)
        weight = _rounded(read_tensor(rows, torch.empty(rows.num_bytes, dtype=torch.uint8)), self.rounded_to)
        self.advance(rows.num_bytes)
        return F.linear(self.hidden, weight.to(self.hidden.dtype))


def skeleton(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    """Build a model whose tensors have shapes but no memory."""
    with torch.device("meta"):
        return model_class(config)


@contextlib.contextmanager
def _borrowed_weights(
    model: nn.Module,
    stored: dict[str, StoredTensor],
    rounded_to: torch.dtype | None,
    tokens: list[int],
    dtype: torch.dtype,
    advance: Advance,
) -> Iterator[None]:
    """Let each module's parameters be its stored weights, in ``dtype``, for the time of its forward only.

    Embeddings hold the rows of ``tokens`` only, in this order.
    """
    borrowers = {}
    for path, module in model.named_modules():
        if module is model.get_output_embeddings():
            continue
        own = {name: [stored[f"{path}.{name}"]] for name, _ in module.named_parameters(recurse=False)}
        if isinstance(module, nn.Embedding):
            module.padding_idx = None  # it would have to be one of the rows
            own = {name: [row_slice(tensor, i, i + 1) for i in tokens] for name, (tensor,) in own.items()}
        if own:
            borrowers[module] = own
    longest = max(sum(_size(parts) for parts in own.values()) for own in borrowers.values())
    largest = max(part.num_bytes for own in borrowers.values() for parts in own.values() for part in parts)
    buffers = torch.empty(longest, dtype=dtype), torch.empty(largest, dtype=torch.uint8)
    lender = _Lender(*buffers, rounded_to, advance)
    hooks = []
    for module, own in borrowers.items():
        hooks.append(module.register_forward_pre_hook(partial(lender.lend, own)))
        hooks.append(module.register_forward_hook(lender.take_back))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@dataclass(frozen=True)
class _Lender:
    """Two buffers that hold the weights of one module at a time."""

    weights: Tensor
    stored: Tensor  # bytes as in the file
    rounded_to: torch.dtype | None
    advance: Advance

    def lend(self, own: dict[str, list[StoredTensor]], module: nn.Module, arguments: tuple) -> None:
        lent = 0
        for name, parts in own.items():
            rows, *width = parts[0].shape
            weight = self.weights[lent : lent + _size(parts)].view(rows * len(parts), *width)
            for place, part in zip(weight.split(rows), parts):
                place.copy_(_rounded(read_tensor(part, self.stored), self.rounded_to))
                self.advance(part.num_bytes)
            module.register_parameter(name, nn.Parameter(weight, requires_grad=False))
            lent += weight.numel()

    def take_back(self, module: nn.Module, arguments: tuple, output: object) -> None:
        for name, parameter in list(module.named_parameters(recurse=False)):
            module.register_parameter(name, nn.Parameter(parameter.to("meta"), requires_grad=False))
        # glibc before 2.38 hardly reuses the aligned blocks that torch frees: without this, memory grows by the layer.
        if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
            trim(0)


def _size(parts: list[StoredTensor]) -> int:
    return sum(math.prod(part.shape) for part in parts)


def _rounded(weight: Tensor, dtype: torch.dtype | None) -> Tensor:
    return weight if dtype is None else weight.to(dtype)
