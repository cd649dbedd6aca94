"""A decoding step as a module that holds its cache: what ``torch.export`` takes."""

import copy

from torch import Tensor, nn

from .cache_longnet import LongNetCache


HELD = ("keys", "values", "key_positions", "key_branches", "seen", "columns")  # of each layer of a cache


class DecodingStep(nn.Module):
    """Decode one token after the other; the cache is the module's own state, in buffers that each step changes.

    ``torch.export.export(DecodingStep(model, cache), (token,))`` gives a program that goes on where the cache was. The
    cache that is passed stays as it is.

    Args:
        model: a ``LongNetForCausalLM``.
        cache: one with ``max_length`` that has read the prompt.

    Raises:
        ValueError: if the cache has no fixed size, or has read nothing.
    """

    def __init__(self, model: nn.Module, cache: LongNetCache):
        super().__init__()
        if not all(layer.is_compileable for layer in cache.layers):
            raise ValueError("a decoding step needs a cache of fixed size; make it with LongNetCache(max_length=...)")
        if cache.is_empty:
            raise ValueError("the cache is empty; let the model read the prompt with it first")
        self.model = model
        self.cache = copy.deepcopy(cache)
        for i, layer in enumerate(self.cache.layers):
            for name in HELD:
                self.register_buffer(f"{name}_{i}", getattr(layer, name))

    def forward(self, input_ids: Tensor) -> Tensor:
        """Take in one token per row, ``[B, 1]``; return the logits of the next, ``[B, 1, vocab_size]``."""
        for i, layer in enumerate(self.cache.layers):
            for name in HELD:  # the buffers may have been moved, loaded or, by a tracer, replaced
                setattr(layer, name, getattr(self, f"{name}_{i}"))
        return self.model(input_ids, past_key_values=self.cache).logits
