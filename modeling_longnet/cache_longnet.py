"""The bounded KV cache of a model: its layers, and what they share."""

import dataclasses
import operator
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig
from transformers.cache_utils import Cache

from .cache_layer import LongNetCacheLayer
from .configuration_longnet import LAYER_FIELDS, UNBOUNDED
from .dilation_pattern import DilationPattern
from .logical_positions import positions_from_mask
from .once_per_pass import OncePerPass


class LongNetCache(Cache):
    """KV cache of a LongNet model: constant memory once the longest segment is full (but for ``dense_layers``).

    Theorem: decoding through this cache, one token or any chunk at a time, equals the full forward pass. Where a longrope
    changes its frequencies, the model refuses to go on with keys of the others; keys of dynamic NTK stay as their own
    call rotated them, as everywhere in ``transformers``.

    Args:
        config: a ``LongNetConfig``; the patterns of its layers count.
        offloading: keep the layers in CPU memory and fetch them one ahead (CUDA only).
        max_length: allocate once for sequences of up to so many tokens (``dense_layers`` a slot for each), at fixed
            addresses: decoding a token is then one graph at every length, which ``generate`` captures on CUDA. None: grow
            as tokens come.
        enlarges: allocate anew where more than ``max_length`` tokens come, instead of refusing them.

    Raises:
        ValueError: if the config is no ``LongNetConfig``, ``max_length`` is no positive integer, fixed addresses meet
            offloading, or offloading has no CUDA device.
    """

    def __init__(
        self, config: PretrainedConfig, offloading: bool = False, max_length: int | None = None, enlarges: bool = False
    ):
        if not hasattr(config, "layer_pattern"):
            raise ValueError(f"LongNetCache needs a LongNetConfig, got {type(config).__name__}")
        if max_length is not None:
            max_length = _token_count(max_length)
        if max_length is not None and offloading:
            raise ValueError("offloading moves the cache, which max_length keeps in place; leave one of them out")
        if offloading and not torch.cuda.is_available():
            raise ValueError("offloading moves layers between a CUDA device and the host, and there is no CUDA device")
        once = OncePerPass()
        layers = [
            LongNetCacheLayer(config.layer_pattern(i), max_length, once, enlarges)
            for i in range(config.num_hidden_layers)
        ]
        super().__init__(layers=layers, offloading=offloading)
        self._config = config
        self._served: list | None = None  # the fields that check_fits found to fit
        self._rotated_up_to: int | None = None

    @property
    def is_empty(self) -> bool:
        """Whether no token has come yet; known without waiting for the device."""
        return self.layers[0].is_empty

    @property
    def rotated_up_to(self) -> int:
        """The number of tokens that the last call reached: a length-dependent RoPE rotated for it. 0 if none is held.

        A crop leaves it as it is, for the keys that stay were rotated so. Of a loaded state: the tokens that it holds.
        """
        read = 0 if self.is_empty else int(self.layers[0].seen.max())
        return read if self._rotated_up_to is None or not read else self._rotated_up_to

    @rotated_up_to.setter
    def rotated_up_to(self, length: int) -> None:
        self._rotated_up_to = length

    def check_fits(self, config: PretrainedConfig) -> None:
        """Refuse to serve a model whose layers reach other keys than the cache was made to hold.

        Raises:
            ValueError: if the number of layers or a layer's pattern differs.
        """
        # For every token, so without attribute access. Lists are copied: they may be edited in place.
        fields = vars(config)
        fields = [list(x) if isinstance(x, list) else x for x in map(fields.get, LAYER_FIELDS)]
        if self._served == fields:
            return
        if len(self.layers) != config.num_hidden_layers:
            raise ValueError(
                f"the cache has {len(self.layers)} layers, the model {config.num_hidden_layers}; make it of the model's "
                "config"
            )
        for i, layer in enumerate(self.layers):
            needed = config.layer_pattern(i)
            # Field by field: code loaded with a checkpoint may hold the class twice.
            if dataclasses.astuple(layer.pattern) != dataclasses.astuple(needed):
                raise ValueError(
                    f"layer {i} of the cache holds {_kept_by(layer.pattern)}, the model reaches {_kept_by(needed)}; "
                    "make it LongNetCache(model.config)"
                )
        self._served = fields

    def reserve(self, num_tokens: int, positions: Tensor | None = None) -> None:
        """Make sure that so many more tokens fit into all layers; waits for the device unless any number does.

        Args:
            positions: those of the forward pass that needs them, if any: it waits once, and its layers share a move.

        Raises:
            ValueError: if they do not, and the cache does not enlarge; no layer has taken any of them then. A compiled
                graph, which cannot enlarge a cache, checks it as it runs and raises RuntimeError.
        """
        bounded = [layer for layer in self.layers if layer.is_compileable and layer.get_max_length() > 0]
        if torch.compiler.is_compiling():
            _trace_room(bounded, num_tokens)
            return
        if bounded and not (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()):
            columns = self.layers[0].count_columns(positions)
            for layer in bounded:
                layer.reserve(num_tokens, columns, positions)

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last ``-tokens_to_remove`` tokens, in all layers or in none."""
        for layer in sorted(self.layers, key=lambda layer: layer.croppable):  # the one that may refuse comes first
            layer.crop(tokens_to_remove)

    def state_dict(self) -> dict[str, Tensor]:
        """Return what all layers hold, as tensors that ``load_state_dict`` takes: views, not copies."""
        return {f"{i}.{name}": x for i, layer in enumerate(self.layers) for name, x in layer.state_dict().items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Hold what the cache of the same model held when it gave this state.

        Raises:
            ValueError: if the state is one of another model or of other slots; nothing is changed then.
        """
        by_layer: list[dict[str, Tensor]] = [{} for _ in self.layers]
        for name, x in state.items():
            number, _, rest = name.partition(".")
            if not number.isdecimal() or int(number) >= len(self.layers):
                raise ValueError(f"the state has {name!r}, the cache layers 0 to {len(self.layers) - 1}")
            by_layer[int(number)][rest] = x
        if state and not all(by_layer):
            missing = by_layer.index({})
            raise ValueError(f"the state has no layer {missing}, the cache layers 0 to {len(self.layers) - 1}")
        for i, (layer, of_layer) in enumerate(zip(self.layers, by_layer) if state else ()):
            try:
                layer.check_state(of_layer, *self._entry_shape(by_layer[0]))
            except ValueError as error:
                raise ValueError(f"layer {i}: {error}") from None
        for layer, of_layer in zip(self.layers, by_layer):
            layer.load_state_dict(of_layer)
        self._rotated_up_to = None

    def _entry_shape(self, state: dict[str, Tensor]) -> tuple[int, int, int]:
        """Return the rows, KV heads and head_dim that all layers must have, given the state of the first."""
        keys, config = state.get("keys", torch.empty(0, 0)), self._config
        # Under tensor parallelism a rank has some of the KV heads.
        num_kv_heads = config.num_key_value_heads if config.first_kv_head is None else keys.shape[1]
        return keys.shape[0] if keys.ndim else 0, num_kv_heads, config.head_dim

    def admit(self, rows: int) -> None:
        """Make ready for tokens of so many rows: what was reset holds none, and may have been made for others.

        Raises:
            ValueError: if the cache holds another number of rows.
        """
        seen = self.layers[0].seen
        if seen is None or len(seen) == rows:
            return
        if not self.is_empty:
            raise ValueError(f"the cache holds a batch of {len(seen)} rows, got {rows}")
        for layer in self.layers:
            layer.forget()

    def check_mask(self, attention_mask: Tensor | None, num_tokens: int) -> None:
        """Refuse a mask that tells of other tokens than those that were read; waits for the device.

        Args:
            attention_mask: ``[batch, past + num_tokens]``; None if all tokens are real, those of the past too.
            num_tokens: new tokens per row.

        Raises:
            ValueError: if it has another width, or marks another number of tokens of the past as real.
        """
        if self.is_empty:
            return
        columns, seen = int(self.layers[0].columns), self.layers[0].seen
        if attention_mask is not None and attention_mask.shape[1] != columns + num_tokens:
            raise ValueError(
                f"attention_mask has {attention_mask.shape[1]} columns for {columns} tokens in the cache and {num_tokens} "
                f"new ones: give {columns + num_tokens}"
            )
        if attention_mask is not None and len(attention_mask) != len(seen):
            return  # admit() tells of that
        real = torch.full_like(seen, columns)
        if attention_mask is not None:
            real = (attention_mask[:, :columns] != 0).sum(-1).to(seen.device)
        if bool((real != seen).any()):
            row = int((real != seen).nonzero()[0])
            raise ValueError(
                f"the cache has read {int(seen[row])} real tokens in row {row}, and attention_mask shows "
                f"{int(real[row])} among the {columns} of the past: give the mask that they were read with (generate "
                "reads all that it makes, also what fills a row after its end), or read the sequence anew"
            )

    def next_positions(
        self, attention_mask: Tensor | None, batch: int, num_tokens: int, device: torch.device
    ) -> Tensor:
        """Number the next tokens of each row, after those the cache has seen.

        Args:
            attention_mask: ``[batch, >= num_tokens]``, its last columns belong to the new tokens; None if all are real.
            batch, num_tokens: shape of the new tokens.

        Returns:
            ``[batch, num_tokens]`` int64 logical positions, -1 for padding.
        """
        if attention_mask is None:
            new = torch.arange(num_tokens, device=device).expand(batch, -1)
        else:
            new = positions_from_mask(attention_mask[:, attention_mask.shape[1] - num_tokens :])
        seen = self.layers[0].seen
        if seen is None:
            return new
        following = new + seen.to(device)[:, None]
        return following if attention_mask is None else torch.where(new >= 0, following, new)


def _trace_room(bounded: list[LongNetCacheLayer], num_tokens: int) -> None:
    """Let the graph that is traced check that so many tokens fit: beyond its slots a layer would drop them."""
    begun = [
        (layer.max_length, layer.columns) for layer in bounded if layer.is_initialized and layer.max_length is not None
    ]
    if begun:
        room = min(max_length for max_length, _ in begun)
        torch._assert_async(
            begun[0][1] <= room - num_tokens,
            f"the cache has room for {room} tokens, which a compiled graph cannot change: make it with a larger max_length",
        )


def _token_count(value: Any) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        number = 0
    if number < 1 or isinstance(value, bool):
        raise ValueError(f"max_length must be an integer of at least 1 token, got {value!r}")
    return number


def _kept_by(pattern: DilationPattern) -> str:
    """Say in words what a layer's pattern reaches."""
    if len(pattern.branches) == 1 and pattern.dilation_rates == (1,) and pattern.segment_lengths[0] >= UNBOUNDED:
        return "every key"
    rules = f"head_offsets={pattern.head_offsets!r}, count_overlaps={pattern.count_overlaps}, "
    rules += f"dilate_queries={pattern.dilate_queries}, window={pattern.window!r}"
    return (
        f"the keys of branches (segment length, rate) {', '.join(str(tuple(x)) for x in pattern.branches)} ({rules})"
    )
