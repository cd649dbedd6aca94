"""Decoding steps as one CUDA graph: captured once, replayed for every token."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutputWithPast

from .cache_layer import HELD
from .cache_longnet import LongNetCache
from .decoding_token import cache_refusal, model_refusal


class DecodingGraph:
    """Decode one token after the other, each by replaying one CUDA graph.

    Called with tokens ``[B, 1]`` it returns the logits ``[B, 1, vocab_size]`` of the next ones. The first call
    launches the kernels one by one, and so compiles them; the second captures them. The cache may be reset, reordered
    and given other tokens in between; where it or the weights have moved, the graph is captured again. Hooks,
    settings and modules are those of the capture: where one was replaced, make another ``DecodingGraph``.

        cache = LongNetCache(model.config, max_length=...)
        logits = model(prompt, past_key_values=cache, logits_to_keep=1).logits
        step = DecodingGraph(model, cache)
        for _ in range(new_tokens):
            logits = step(logits.argmax(-1))

    Args:
        model: a ``LongNetForCausalLM`` on a CUDA device, in evaluation mode.
        cache: one with ``max_length``.

    Raises:
        ValueError: if the fused step does not serve the model or the cache; it says why.
        TypeError: if the model has no language modeling head.
    """

    def __init__(self, model: nn.Module, cache: LongNetCache):
        if not hasattr(model, "lm_head"):
            raise TypeError(f"DecodingGraph takes a LongNetForCausalLM, got {type(model).__name__}")
        with torch.no_grad():
            refusal = model_refusal(model.model, {}) or cache_refusal(cache)
        if refusal is not None:
            raise ValueError(f"the fused decoding step does not serve: {refusal}")
        self.model = model
        self.cache = cache
        self._graph: torch.cuda.CUDAGraph | None = None
        self._addresses: tuple[int, ...] = ()
        # Where the modules keep their weights: looked up again for every token, for they may be replaced.
        self._weights = [
            (held, name)
            for module in model.modules()
            for held in (module._parameters, module._buffers)
            for name, x in held.items()
            if x is not None
        ]
        self._inputs: dict[str, Tensor] = {}
        self._logits: Tensor | None = None
        self._room = 0  # tokens that fit as long as nobody but the graph writes
        self._version = -1

    @torch.no_grad()
    def __call__(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None
    ) -> Tensor:
        """Take in one token per row.

        Args:
            input_ids: ``[B, 1]``.
            attention_mask: ``[B, >= 1]``, its last column zero where the token is padding.
            position_ids: ``[B or 1, 1]`` for the rotary embedding; None: the logical positions.

        Returns:
            ``[B, 1, vocab_size]``, overwritten by the next call.

        Raises:
            ValueError: if there is more than one token per row, or the cache has no room.
        """
        if input_ids.shape[1] != 1:
            raise ValueError(f"a decoding step takes one token per row, got {input_ids.shape[1]}")
        with torch.cuda.device_of(self.model.model.norm.weight):  # a graph captures what happens on the current device
            return self._decode(input_ids, attention_mask, position_ids)

    def _decode(self, input_ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None) -> Tensor:
        inputs = {"input_ids": input_ids, "position_ids": position_ids}
        inputs["attention_mask"] = None if attention_mask is None else attention_mask[:, -1:]
        inputs = {name: x for name, x in inputs.items() if x is not None}
        self._make_room()
        if not self._fits(inputs):
            self._graph = None
            self._inputs = {name: x.clone() for name, x in inputs.items()}
            logits = self._step(self._inputs)  # from the very addresses that the capture will see
            self._addresses = self._held()
            return logits
        for name, x in inputs.items():
            self._inputs[name].copy_(x)
        if self._graph is None:
            graph = torch.cuda.CUDAGraph()
            stream = torch.cuda.Stream()  # the default one is of the device that came first
            with torch.cuda.graph(graph, stream=stream):
                self._logits = self._step(self._inputs)
            self._graph = graph
        self._graph.replay()
        return self._logits

    def _step(self, inputs: dict[str, Tensor]) -> Tensor:
        return self.model(**inputs, past_key_values=self.cache).logits

    def _fits(self, inputs: dict[str, Tensor]) -> bool:
        """Whether what was captured, or is about to be, serves such inputs and reads what it wrote."""
        if self._inputs.keys() != inputs.keys() or self._addresses != self._held():
            return False
        return all(x.shape == self._inputs[name].shape for name, x in inputs.items())

    def _held(self) -> tuple[int, ...]:
        layers = [layer for layer in self.cache.layers if layer.is_initialized]
        tensors = [getattr(layer, name) for layer in layers for name in (*HELD, "columns")]
        tensors += [held.get(name) for held, name in self._weights]
        return tuple(0 if x is None else x.data_ptr() for x in tensors)

    def _make_room(self) -> None:
        """Ask for room for one more token; the device is waited for where others wrote, and where room ends."""
        columns = self.cache.layers[0].columns
        uncounted = isinstance(columns, Tensor) and columns.is_inference()  # nobody counts what is written to it
        version = columns._version if isinstance(columns, Tensor) and not uncounted else -1
        if uncounted or version != self._version or self._room < 1:
            self.cache.reserve(1)
            self._version = version
            limits = [layer.max_length for layer in self.cache.layers if layer.get_max_length() > 0]
            self._room = min(limits) - int(columns) if limits else 2**62
        self._room -= 1


class GraphedCall:
    """The forward of a model as ``generate`` calls it: single tokens by ``DecodingGraph``, all else as ever."""

    def __init__(self, model: nn.Module, otherwise: Callable):
        self.model = model
        self.otherwise = otherwise
        self.graph: DecodingGraph | None = None

    def __call__(
        self, input_ids: Tensor | None = None, past_key_values: LongNetCache | None = None, **kwargs: Any
    ) -> Any:
        known = {"attention_mask", "position_ids", "use_cache", "return_dict", "logits_to_keep"}
        asked = {name for name, x in kwargs.items() if name not in known and x is not None and x is not False}
        single = input_ids is not None and input_ids.shape[1] == 1
        as_ever = not single or asked or not kwargs.get("return_dict", True)
        if as_ever or past_key_values is None or cache_refusal(past_key_values):
            return self.otherwise(input_ids=input_ids, past_key_values=past_key_values, **kwargs)
        if self.graph is None or self.graph.cache is not past_key_values:
            self.graph = DecodingGraph(self.model, past_key_values)
        logits = self.graph(input_ids, kwargs.get("attention_mask"), kwargs.get("position_ids"))
        return CausalLMOutputWithPast(logits=logits, past_key_values=past_key_values)
