"""What a conversion will do: the source read and checked, the pattern chosen, the costs counted; nothing written."""

import copy
import dataclasses
import textwrap
from collections import Counter
from pathlib import Path

import torch
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from modeling_longnet import DilationPattern, LongNetConfig, LongNetForCausalLM

from .families import Family, find_family, sliding_window
from .hub import find_folder
from .steps import DOWNLOADED_FILES, short_number
from .verify import dense_length, skeleton
from .weights import (
    DTYPES,
    StoredTensor,
    files_are_kept,
    files_of,
    match_weights,
    read_json,
    read_weights,
    shard_layout,
    total_bytes,
)


# The undilated branch covers the trained context, but no more than this: it sets the cost of every token.
LONGEST_LOCAL_SEGMENT = 4096
DEFAULT_STRETCH = 4

ROPE_WORDS = ("yarn", "linear", "ntk", "llama3", "none")


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything a conversion will do, known before a byte is written.

    Args:
        source: folder of the source checkpoint.
        name: the source as the user gave it.
        revision: commit of a source from the Hub, else None.
        family: what the source is.
        source_config: the source's config.
        source_tensors: the stored tensors under the source's names.
        tensors: the stored tensors to write, under LongNet's names.
        config: the target's config.
        preset: name of the pattern's rules.
        trained_context: tokens the source was trained for, before any RoPE scaling stretched it.
        window: tokens back that every layer of the source attends, None if there is no limit.
        reference_config: the source's config with the target's RoPE, whose logits the target must have.
        max_shard_size: as given to ``convert_checkpoint``.
        dtype: what to round the weights to, as safetensors spells it; None keeps their bits.
        notes: what the user should know.
    """

    source: Path
    name: str
    revision: str | None
    family: Family
    source_config: PreTrainedConfig
    source_tensors: dict[str, StoredTensor]
    tensors: dict[str, StoredTensor]
    config: LongNetConfig
    preset: str
    trained_context: int
    window: int | None
    reference_config: PreTrainedConfig
    max_shard_size: int | str
    dtype: str | None
    notes: tuple[str, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of weights to write."""
        return total_bytes(self.tensors.values(), self.dtype)

    @property
    def context(self) -> int:
        """The length that the pattern and the costs are planned for."""
        return max(self.config.max_position_embeddings, self.config.pattern.segment_lengths[-1])

    @property
    def trained(self) -> str:
        """The trained context in words."""
        stretched = self.source_config.max_position_embeddings
        stretch = f", stretched to {stretched:,} by its RoPE" if stretched > self.trained_context else ""
        window = f", each attending to the last {self.window:,}" if self.window else ""
        return f"{self.trained_context:,} tokens{stretch}{window}"

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
        """Say in a few lines, at most 80 columns each, what will be converted to what, and what it costs."""
        pattern, rope, costs = self.config.pattern, self.config.rope_parameters, self.costs()
        dense_layers = self.config.dense_layers
        files = len(files_of(self.tensors))
        if files_are_kept(self.tensors, self.max_shard_size, self.dtype):
            weights = f"{_count(files, 'file')}, copied unchanged"
        else:
            shards = len(shard_layout(self.tensors, self.max_shard_size, self.dtype))
            bits = "bits unchanged" if self.dtype is None else dtype_name(DTYPES[self.dtype])
            weights = f"{_count(files, 'file')} laid out anew as {shards}, {bits}"
        stretch = f", factor {rope['factor']:g}" if rope.get("factor") else ""
        flops, dense_flops = costs["pattern_attention_flops"], costs["dense_attention_flops"]
        kv, dense_kv = costs["pattern_kv_bytes"], costs["dense_kv_bytes"]
        lines = [
            f"source     {self.name}",
            f"           {self.family.architecture}, {short_number(self.num_bytes)}B of weights in {weights}",
            f"trained    {self.trained}",
            f"preset     {self.preset}",
            f"segments   {', '.join(f'{w:,}' for w in pattern.segment_lengths)}",
            f"rates      {', '.join(map(str, pattern.dilation_rates))}",
            *([_wrapped(f"dense      layers {', '.join(map(str, dense_layers))}")] if dense_layers else []),
            f"RoPE       {rope['rope_type']}, theta {rope['rope_theta']:g}{stretch}",
            f"at {self.context:,} tokens:",
            f"attention  {short_number(flops)}FLOP, dense {short_number(dense_flops)}FLOP ({dense_flops / flops:.1f} times as many)",
            f"KV cache   {short_number(kv)}B, dense {short_number(dense_kv)}B ({dense_kv / kv:.1f} times as many)",
        ]
        return "\n".join([*lines, *(_wrapped(f"note       {note}") for note in self.notes)])


def plan_conversion(
    source: str | Path,
    *,
    preset: str = "retrofit",
    segment_lengths: list[int] | tuple[int, ...] | None = None,
    dilation_rates: list[int] | tuple[int, ...] | None = None,
    dense_layers: list[int] | tuple[int, ...] = (),
    rope_parameters: dict | str | None = None,
    max_position_embeddings: int | None = None,
    local: int | None = None,
    max_shard_size: int | str = "5GB",
    dtype: str | None = None,
    revision: str | None = None,
) -> Plan:
    """Read and check a source and decide on everything, without writing (a Hub source is downloaded).

    Args and errors are those of ``convert_checkpoint``.
    """
    dtype = written_dtype(dtype)
    folder, commit = find_folder(source, revision, DOWNLOADED_FILES)
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        raise ValueError(f"{source} is an adapter; convert its base model, and then the adapter for that (--adapter)")
    fields = read_json(folder / "config.json")
    family = find_family(fields)
    source_config = family.read_config(fields)
    # Old Llama checkpoints hold the RoPE frequencies of every layer; models compute them.
    source_tensors = {
        name: tensor for name, tensor in read_weights(folder).items() if not name.endswith("rotary_emb.inv_freq")
    }
    try:
        source_model = skeleton(family.model_class, source_config)
    except Exception as error:  # a KeyError for an unknown activation, and the like
        raise ValueError(
            f"config.json does not describe a {family.architecture} that can be built: {error!r}"
        ) from error
    match_weights(source_model, source_tensors)
    tensors = family.to_longnet(source_config, source_tensors)
    shard_layout(tensors, max_shard_size, dtype)

    trained, window = _trained_context(source_config), sliding_window(source_config)
    pattern, context = _choose_pattern(
        source_config, trained, window, preset, segment_lengths, dilation_rates, local, max_position_embeddings
    )
    if isinstance(rope_parameters, str):
        rope_parameters = _rope_from_word(rope_parameters, source_config, trained, context)
    rope = _rope_parameters(source_config, rope_parameters, trained)
    # Dynamic RoPE starts to stretch at max_position_embeddings, so for it that stays the trained context.
    position_embeddings = source_config.max_position_embeddings if rope["rope_type"] == "dynamic" else context
    reference_config = copy.deepcopy(source_config)
    if rope_parameters is not None:
        try:
            reference_config = family.read_config({**fields, "rope_parameters": rope, "rope_scaling": None})
        except ValueError as error:
            raise ValueError(f"rope_parameters do not fit: {error.__cause__}") from error
        if reference_config.rope_parameters["rope_type"] != rope["rope_type"]:
            raise ValueError(f"{family.architecture} has no RoPE of type {rope['rope_type']}")
        reference_config.max_position_embeddings = position_embeddings
    dtypes = Counter()
    for tensor in tensors.values():
        dtypes[tensor.dtype] += tensor.num_bytes
    own_dtype = dtype_name(source_config.dtype or DTYPES[dtypes.most_common(1)[0][0]])
    longnet_fields = family.longnet_fields(source_config) | {
        "rope_parameters": rope,
        "max_position_embeddings": position_embeddings,
        "dtype": own_dtype if dtype is None else dtype_name(DTYPES[dtype]),
        "dense_layers": dense_layers,
        "trained_context": trained,
        "source_config": fields,
        **pattern_fields(pattern),
    }
    try:
        config = LongNetConfig(**longnet_fields)
    except Exception as error:  # strict-dataclass errors of several lines
        raise ValueError(f"this {family.architecture} makes no LongNetConfig: {error}") from error
    config.architectures = [LongNetForCausalLM.__name__]
    match_weights(skeleton(LongNetForCausalLM, config), tensors)
    reference_config.dtype = config.dtype
    return Plan(
        source=folder,
        name=str(source),
        revision=commit,
        family=family,
        source_config=source_config,
        source_tensors=source_tensors,
        tensors=tensors,
        config=config,
        preset=preset,
        trained_context=trained,
        window=window,
        reference_config=reference_config,
        max_shard_size=max_shard_size,
        dtype=dtype if dtypes.keys() != {dtype} else None,
        notes=tuple(
            _notes(folder, fields, config, source_config.max_position_embeddings, dtypes, rope_parameters, dtype)
        ),
    )


def written_dtype(name: str | None) -> str | None:
    """Return safetensors' spelling of a dtype given as ``"bfloat16"``."""
    spelled = {dtype_name(dtype): spelling for spelling, dtype in DTYPES.items()}
    if name is not None and name not in spelled:
        raise ValueError(f"dtype must be one of {', '.join(spelled)}, got {name!r}")
    return spelled.get(name)


def _trained_context(config: PreTrainedConfig) -> int:
    """Return the length the source was trained for before any RoPE scaling stretched it."""
    original = config.rope_parameters.get("original_max_position_embeddings")
    return min(config.max_position_embeddings, original or config.max_position_embeddings)


def _choose_pattern(
    config: PreTrainedConfig,
    trained: int,
    window: int | None,
    preset: str,
    segment_lengths: list[int] | tuple[int, ...] | None,
    dilation_rates: list[int] | tuple[int, ...] | None,
    local: int | None,
    context: int | None,
) -> tuple[DilationPattern, int]:
    """Return the pattern and the target's context."""
    for name, number in (("max_position_embeddings", context), ("local", local)):
        if number is not None and (isinstance(number, bool) or not isinstance(number, int) or number < 1):
            raise ValueError(f"{name} must be a positive integer, got {number!r}")
    if segment_lengths is None:
        if dilation_rates is not None:
            raise ValueError(f"dilation_rates {list(dilation_rates)} need segment_lengths; give both or neither")
        local = local or min(trained, LONGEST_LOCAL_SEGMENT, window or trained)
        context = context or max(config.max_position_embeddings, DEFAULT_STRETCH * local)
        last = local
        while last < context:
            last *= 2
        pattern = DilationPattern.geometric(local, last, preset=preset)
        _check_window(pattern, window)
        return pattern, context
    if local is not None:
        raise ValueError(f"local {local} and segment_lengths {list(segment_lengths)} both set the first; give one")
    if dilation_rates is None:
        first = DilationPattern(segment_lengths, [1] * len(segment_lengths)).segment_lengths[0]
        if any(w % first for w in segment_lengths):
            raise ValueError(
                f"segment_lengths {list(segment_lengths)} are not multiples of the first, so there are no default "
                "rates w_i / w_0; give dilation_rates"
            )
        dilation_rates = [w // first for w in segment_lengths]
    pattern = DilationPattern.preset(preset, segment_lengths, dilation_rates)
    _check_window(pattern, window)
    return pattern, context or max(config.max_position_embeddings, pattern.segment_lengths[-1])


def _check_window(pattern: DilationPattern, window: int | None) -> None:
    if window and dense_length(pattern) > window:
        raise ValueError(
            f"the source attends in a sliding window of {window} tokens, so it is not this pattern on up to "
            f"{pattern.segment_lengths[0]} tokens; choose a first segment of at most {window}"
        )


def _rope_from_word(word: str, config: PreTrainedConfig, trained: int, context: int) -> dict | None:
    """Write out what a word means for RoPE when the trained context is stretched to ``context``."""
    if word not in ROPE_WORDS:
        raise ValueError(f"rope_parameters must be a dict or one of {', '.join(ROPE_WORDS)}, got {word!r}")
    if word == "none":
        return None
    if context <= trained:
        raise ValueError(
            f"RoPE {word} has nothing to stretch: the context of {context} tokens is not longer than the {trained} that "
            "the source was trained for; give a longer one (--context)"
        )
    factor = context / trained
    if word == "ntk":
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        theta = config.rope_parameters["rope_theta"] * factor ** (head_dim / (head_dim - 2))
        return {"rope_type": "default", "rope_theta": theta}
    bands = {"low_freq_factor": 1.0, "high_freq_factor": 4.0} if word == "llama3" else {}
    return {"rope_type": word, "factor": factor, **bands}


def frozen_rope(config: PreTrainedConfig) -> dict:
    """Return a source's RoPE settings, with nothing left that follows max_position_embeddings by itself."""
    rope = dict(config.rope_parameters)
    if rope["rope_type"] in ("yarn", "longrope") and rope.get("factor") is None:
        rope["factor"] = config.max_position_embeddings / rope["original_max_position_embeddings"]
    return rope


def _rope_parameters(config: PreTrainedConfig, override: dict | None, trained: int) -> dict:
    """Return the target's RoPE settings: the source's, or new ones completed from them."""
    if override is None:
        return frozen_rope(config)
    known = ("default", *(name for name in ROPE_INIT_FUNCTIONS if name != "default"))
    if not isinstance(override, dict) or override.get("rope_type") not in known:
        raise ValueError(f"rope_parameters must be a dict with a rope_type among {', '.join(known)}, got {override!r}")
    rope = {"rope_theta": config.rope_parameters["rope_theta"], **override}
    if rope["rope_type"] in ("llama3", "yarn", "longrope"):
        rope.setdefault("original_max_position_embeddings", trained)
    if rope["rope_type"] != "default" and not isinstance(rope.get("factor", 1.0), (int, float)):
        raise ValueError(f"rope_parameters need a number as factor, got {rope['factor']!r}")
    return rope


def _notes(
    folder: Path,
    fields: dict,
    config: LongNetConfig,
    source_context: int,
    dtypes: Counter,
    rope_parameters: dict | None,
    written: str | None,
) -> list[str]:
    """Say what may surprise, one line each."""
    notes = []
    pattern, num_kv_heads = config.pattern, config.num_key_value_heads
    if dense_length(pattern) == 0:
        notes.append("this pattern is not ordinary attention even on short inputs: fine-tune before use")
    elif config.max_position_embeddings > source_context and rope_parameters is None:
        notes.append(f"positions beyond {source_context:,} are new to the model: tune it there")
    if config.rope_parameters["rope_type"] == "dynamic":
        notes.append("max_position_embeddings stays, because dynamic RoPE scales from there")
    if unread := [r for r in pattern.dilation_rates if r > num_kv_heads]:
        notes.append(
            f"rate {unread[-1]} has more offsets than the model has KV heads ({num_kv_heads}): no head reads the far "
            "tokens at the other offsets"
        )
    stored = ", ".join(dtype_name(DTYPES[dtype]) for dtype in dtypes)
    if written is not None and dtypes.keys() != {written}:
        notes.append(f"weights are stored as {stored} and rounded to {dtype_name(config.dtype)}")
    elif stored != dtype_name(config.dtype):
        notes.append(f"weights are stored as {stored}; config.json says {dtype_name(config.dtype)}")
    if fields.get("auto_map"):
        notes.append("the source's own code (auto_map) was not used: it is read as transformers' own model")
    if (folder / "tokenizer_config.json").is_file() and read_json(folder / "tokenizer_config.json").get("auto_map"):
        notes.append("the tokenizer needs code of the source (auto_map), which is not carried along")
    return notes


def pattern_fields(pattern: DilationPattern) -> dict:
    """Return a pattern's fields as ``LongNetConfig`` takes and JSON holds them."""
    fields = dataclasses.asdict(pattern)
    return {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}


def _dtype(name: torch.dtype | str) -> torch.dtype:
    return getattr(torch, name) if isinstance(name, str) else name


def dtype_name(dtype: torch.dtype | str) -> str:
    """Write a dtype as config.json does: ``"bfloat16"``."""
    return str(dtype).removeprefix("torch.")


def _wrapped(line: str) -> str:
    return textwrap.fill(line, width=80, subsequent_indent=" " * 11)


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"
