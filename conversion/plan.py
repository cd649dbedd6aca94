"""What a conversion will do, known before a byte is written; and the plan of every conversion to LongNet."""

import dataclasses
import json
import textwrap
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import GenerationConfig
from transformers.dynamic_module_utils import custom_object_save

from modeling_longnet import (
    DilationPattern,
    LongNetConfig,
    LongNetForCausalLM,
)
from modeling_longnet.modeling_longnet import AUTO_MAP

from .model_card import fill_model_card
from .source_weights import read_weights
from .steps import short_number
from .stored_model import StoredModel, skeleton
from .verify import Comparison, verification_tokens
from .weights import (
    DTYPES,
    StoredTensor,
    dtype_name,
    files_are_kept,
    files_of,
    read_json,
    shard_layout,
    total_bytes,
)


# Generation settings that choose a cache, or mean something only with the one chosen.
CACHE_FIELDS = ("cache_implementation", "cache_config", "max_cache_len")


@dataclasses.dataclass(frozen=True)
class Plan(ABC):
    """Everything a conversion will do, known before a byte is written.

    Args:
        source: folder or file of the source checkpoint.
        name: the source as the user gave it.
        revision: commit of a source from the Hub, else None.
        architecture: what the source is.
        tensors: the stored tensors to write, under the target's names.
        max_shard_size: as given to ``convert_checkpoint``.
        dtype: what to round the weights to, as safetensors spells it; None keeps their bits.
    """

    source: Path
    name: str
    revision: str | None
    architecture: str
    tensors: dict[str, StoredTensor]
    max_shard_size: int | str
    dtype: str | None

    @property
    def num_bytes(self) -> int:
        """Bytes of weights to write."""
        return total_bytes(self.tensors.values(), self.dtype)

    @property
    @abstractmethod
    def becomes(self) -> str:
        """What the target is, in a word."""

    @abstractmethod
    def describe(self) -> str:
        """Say in a few lines, at most 80 columns each, what will be converted to what."""

    @abstractmethod
    def write_config(self, folder: Path) -> None:
        """Write config.json, and the code that goes with it, to the target's folder."""

    @abstractmethod
    def write_generation_config(self, folder: Path) -> None:
        """Write generation_config.json to the target's folder if the source had none to carry."""

    @abstractmethod
    def comparison(self, folder: Path) -> Comparison:
        """Return what must give the same logits: the source, and what was written to ``folder``."""

    @abstractmethod
    def particulars(self) -> dict:
        """Return what only this kind of conversion has to report."""

    @abstractmethod
    def card(self, report: dict) -> str:
        """Fill the target's model card."""


@dataclasses.dataclass(frozen=True)
class LongNetPlan(Plan):
    """A conversion to LongNet.

    Args:
        reference: the model whose logits the target must have, where their attention is the same.
        config: the target's config.
        preset: name of the pattern's rules.
        trained: the source's trained context, in words.
        compared_tokens: how many tokens the two read for that.
        same_attention: whether the pattern is the reference's attention on these; if not, ordinary attention replaces
            it for the comparison.
        generation_fields: fields that generation settings are read from if the source has no file of them.
        template: of the model card.
        notes: what the user should know.
    """

    reference: StoredModel
    config: LongNetConfig
    preset: str
    trained: str
    compared_tokens: int
    same_attention: bool
    generation_fields: dict
    template: str
    notes: tuple[str, ...]

    @property
    def becomes(self) -> str:
        return "LongNet"

    @property
    def context(self) -> int:
        """The length that the pattern and the costs are planned for."""
        return max(self.config.max_position_embeddings, self.config.pattern.segment_lengths[-1])

    @property
    def positions(self) -> str:
        """How the target knows positions, in a few words."""
        rope = self.config.rope_parameters
        if len(self.config.layers_without_rope) == self.config.num_hidden_layers:
            return "none"
        if self.config.xpos:
            return f"xPos, theta {rope['rope_theta']:g}, scale base {self.config.xpos_scale_base}"
        stretch = f", factor {rope['factor']:g}" if rope.get("factor") else ""
        return f"RoPE {rope['rope_type']}, theta {rope['rope_theta']:g}{stretch}"

    def costs(self) -> dict[str, int]:
        """Count attention FLOPs of one forward and KV bytes at the target context, for the pattern and for dense."""
        config, length = self.config, self.context
        heads, num_kv_heads = config.num_attention_heads, config.num_key_value_heads
        entry_bytes = 2 * config.head_dim * num_kv_heads * _dtype(config.dtype).itemsize
        layers = range(config.num_hidden_layers)
        dense = DilationPattern((length,), (1,))
        costs = {"length": length}
        for name, patterns in (
            ("pattern", [config.layer_pattern(i) for i in layers]),
            ("dense", [dense for _ in layers]),
        ):
            costs[f"{name}_attention_flops"] = sum(
                pattern.attention_flops(length, heads, config.head_dim, num_kv_heads=num_kv_heads)
                for pattern in patterns
            )
            costs[f"{name}_kv_bytes"] = sum(pattern.cache_entries(length) for pattern in patterns) * entry_bytes
        return costs

    def describe(self) -> str:
        """Say in a few lines what will be converted to what, and what it costs."""
        pattern, costs = self.config.pattern, self.costs()
        files = len(files_of(self.tensors))
        if files_are_kept(self.tensors, self.max_shard_size, self.dtype):
            weights = f"{_count(files, 'file')}, copied unchanged"
        else:
            shards = len(shard_layout(self.tensors, self.max_shard_size, self.dtype))
            bits = "bits unchanged" if self.dtype is None else dtype_name(DTYPES[self.dtype])
            weights = f"{_count(files, 'file')} laid out anew as {shards}, {bits}"
        flops, dense_flops = costs["pattern_attention_flops"], costs["dense_attention_flops"]
        kv, dense_kv = costs["pattern_kv_bytes"], costs["dense_kv_bytes"]
        lines = [
            f"source     {self.name}",
            _wrapped(f"{' ' * 11}{self.architecture}, {short_number(self.num_bytes)}B of weights in {weights}"),
            f"trained    {self.trained}",
            f"preset     {self.preset}",
            f"segments   {', '.join(f'{w:,}' for w in pattern.segment_lengths)}",
            f"rates      {', '.join(map(str, pattern.dilation_rates))}",
            *_layers("dense", self.config.dense_layers),
            *_layers("local", self.config.local_layers),
            f"positions  {self.positions}",
            f"at {self.context:,} tokens:",
            f"attention  {short_number(flops)}FLOP, dense {short_number(dense_flops)}FLOP ({dense_flops / flops:.1f} times as many)",
            f"KV cache   {short_number(kv)}B, dense {short_number(dense_kv)}B ({dense_kv / kv:.1f} times as many)",
        ]
        return "\n".join([*lines, *(_wrapped(f"note       {note}") for note in self.notes)])

    def write_config(self, folder: Path) -> None:
        """Save config.json and the package's own files next to it, as transformers does for custom models."""
        self.config.auto_map = dict(AUTO_MAP)
        custom_object_save(skeleton(LongNetForCausalLM, self.config), folder, config=self.config)
        self.config.save_pretrained(folder)

    def write_generation_config(self, folder: Path) -> None:
        """Save the generation settings; old checkpoints keep them in config.json, where transformers does no longer.

        Of a file that was carried, only what asks for another cache than LongNet's goes.
        """
        path = folder / "generation_config.json"
        if not path.exists():
            GenerationConfig.from_model_config(_without_cache(self.generation_fields)).save_pretrained(folder)
        elif foreign_cache(fields := read_json(path)) is not None:
            path.write_text(json.dumps(_without_cache(fields), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    def comparison(self, folder: Path) -> Comparison:
        """Return source and target; where the two never have the same attention, both with ordinary attention."""
        config = LongNetConfig.from_pretrained(folder)
        token_ids, text = verification_tokens(self.source, config.vocab_size, self.compared_tokens)
        if not self.same_attention:
            for name, value in pattern_fields(DilationPattern((token_ids.shape[1],), (1,))).items():
                setattr(config, name, value)
        target = StoredModel(LongNetForCausalLM, config, read_weights(folder))
        return Comparison(self.reference, target, token_ids, text, self.same_attention)

    def particulars(self) -> dict:
        """Return pattern, context, positions, costs and notes."""
        return {
            "pattern": {
                "preset": self.preset,
                **pattern_fields(self.config.pattern),
                "dense_layers": list(self.config.dense_layers),
                "local_layers": list(self.config.local_layers),
            },
            "trained_context": self.config.trained_context,
            "max_position_embeddings": self.config.max_position_embeddings,
            "rope_parameters": self.config.rope_parameters,
            "costs": self.costs(),
            "notes": list(self.notes),
        }

    def card(self, report: dict) -> str:
        """Fill the model card of a LongNet checkpoint."""
        return fill_model_card(self, report)


def pattern_fields(pattern: DilationPattern) -> dict:
    """Return a pattern's fields as ``LongNetConfig`` takes and JSON holds them."""
    fields = dataclasses.asdict(pattern)
    return {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}


def foreign_cache(generation_fields: dict) -> str | None:
    """Return the kind of cache that generation settings ask for if it is none that LongNet has."""
    asked: str | None = generation_fields.get("cache_implementation")
    return None if asked in (None, "dynamic", "offloaded") else asked


def _without_cache(generation_fields: dict) -> dict:
    if foreign_cache(generation_fields) is None:
        return generation_fields
    return {name: value for name, value in generation_fields.items() if name not in CACHE_FIELDS}


def _dtype(name: torch.dtype | str) -> torch.dtype:
    return getattr(torch, name) if isinstance(name, str) else name


def _layers(kind: str, layers: Sequence[int]) -> list[str]:
    return [_wrapped(f"{kind}      layers {', '.join(map(str, layers))}")] if layers else []


def _wrapped(line: str) -> str:
    return textwrap.fill(line, width=80, subsequent_indent=" " * 11)


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"
