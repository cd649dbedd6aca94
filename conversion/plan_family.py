"""Plan the conversion of a dense checkpoint: read and check the source, choose pattern and RoPE; write nothing."""

import copy
import math
from collections import Counter
from pathlib import Path

from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from modeling_longnet import DilationPattern, LongNetConfig, LongNetForCausalLM

from .families import FAMILIES, Family, find_family
from .hub import find_folder
from .plan import LongNetPlan, foreign_cache, pattern_fields
from .source_weights import PICKLED_INDEX_NAME, read_weights
from .steps import DOWNLOADED_FILES, check_no_adapter
from .stored_model import StoredModel, skeleton
from .verify import MOST_TOKENS, check_verify_tokens, dense_length
from .weights import DTYPES, dtype_name, match_weights, read_json, shard_layout, without_copies, written_dtype


# The undilated branch covers the trained context, but no more than this: it sets the cost of every token.
LONGEST_LOCAL_SEGMENT = 4096
DEFAULT_STRETCH = 4

# How deep the one layer lies whose ordinary attention found far tokens (benchmarks/retrofit_quality.py).
LATE = 3 / 4

ROPE_WORDS = ("yarn", "linear", "ntk", "llama3", "none")


def plan_conversion(
    source: str | Path,
    *,
    preset: str = "retrofit",
    segment_lengths: list[int] | tuple[int, ...] | None = None,
    dilation_rates: list[int] | tuple[int, ...] | None = None,
    dense_layers: list[int] | tuple[int, ...] | str = (),
    rope_parameters: dict | str | None = None,
    max_position_embeddings: int | None = None,
    local: int | None = None,
    max_shard_size: int | str = "5GB",
    dtype: str | None = None,
    revision: str | None = None,
    verify_tokens: int = MOST_TOKENS,
) -> LongNetPlan:
    """Read and check a source and decide on everything, without writing (a Hub source is downloaded).

    Args and errors are those of ``convert_checkpoint``.
    """
    dtype = written_dtype(dtype)
    check_verify_tokens(verify_tokens)
    folder, commit = find_folder(source, revision, DOWNLOADED_FILES)
    if commit is not None and not any(folder.glob("*.safetensors")):  # older models on the Hub have no other weights
        folder, commit = find_folder(source, revision, ["pytorch_model*.bin", PICKLED_INDEX_NAME])
    check_no_adapter(folder, source)
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
    source_tensors = without_copies(source_model, source_tensors)
    tensors = family.to_longnet(source_config, source_tensors)
    shard_layout(tensors, max_shard_size, dtype)

    trained, window = _trained_context(source_config), family.sliding_window(source_config)
    local_layers = family.local_layers(source_config)
    pattern, context = _choose_pattern(
        source_config, trained, window, preset, segment_lengths, dilation_rates, local, max_position_embeddings
    )
    if isinstance(rope_parameters, str):
        rope_parameters = _rope_from_word(rope_parameters, source_config, trained, context)
    rope = _rope_parameters(family, source_config, rope_parameters, trained)
    # Dynamic RoPE starts to stretch at max_position_embeddings, so for it that stays the trained context.
    position_embeddings = source_config.max_position_embeddings if rope["rope_type"] == "dynamic" else context
    reference_config = copy.deepcopy(source_config)
    if rope_parameters is not None:
        try:
            kept = {name: fields[name] for name in fields if name not in ("rope_scaling", "partial_rotary_factor")}
            reference_config = family.read_config({**kept, "rope_parameters": rope})
        except ValueError as error:
            raise ValueError(f"rope_parameters do not fit: {' '.join(str(error.__cause__).split())}") from error
        reference_config.max_position_embeddings = position_embeddings
    dtypes: Counter[str] = Counter()
    for tensor in tensors.values():
        dtypes[tensor.dtype] += tensor.num_bytes
    own_dtype = dtype_name(source_config.dtype or DTYPES[dtypes.most_common(1)[0][0]])
    if isinstance(dense_layers, str):
        dense_layers = _dense_layers_from_word(dense_layers, source_config.num_hidden_layers)
    named = dense_layers if isinstance(dense_layers, list | tuple) else ()  # LongNetConfig refuses what is neither
    if repeated := [layer for i, layer in enumerate(named) if layer in named[:i]]:
        raise ValueError(f"dense_layers (--dense-layers) names layer {repeated[0]} more than once; name each once")
    longnet_fields = family.longnet_fields(source_config) | {
        "rope_parameters": rope,
        "max_position_embeddings": position_embeddings,
        "dtype": own_dtype if dtype is None else dtype_name(DTYPES[dtype]),
        "dense_layers": dense_layers,
        "local_layers": [layer for layer in local_layers if layer not in dense_layers],
        "trained_context": trained,
        "source_config": fields,
        **pattern_fields(pattern),
    }
    try:
        config = LongNetConfig(**longnet_fields)
    except Exception as error:  # strict-dataclass errors of several lines
        raise ValueError(
            f"this {family.architecture} makes no LongNetConfig: {' '.join(str(error).split())}"
        ) from error
    config.architectures = [LongNetForCausalLM.__name__]
    match_weights(skeleton(LongNetForCausalLM, config), tensors)
    reference_config.dtype = config.dtype
    rounded_to = dtype if dtypes.keys() != {dtype} else None
    same = dense_length(pattern)
    windowed = set(local_layers or range(config.num_hidden_layers)) - set(config.dense_layers)
    is_cut = window is not None and bool(windowed) and pattern.segment_lengths[0] < min(window, trained)
    return LongNetPlan(
        source=folder,
        name=str(source),
        revision=commit,
        architecture=family.architecture,
        tensors=tensors,
        max_shard_size=max_shard_size,
        dtype=rounded_to,
        reference=StoredModel(family.model_class, reference_config, source_tensors, rounded_to),
        config=config,
        preset=preset,
        trained=_in_words(source_config, trained, window, some_layers=bool(local_layers)),
        compared_tokens=min(limit for limit in (same, trained, window, verify_tokens) if limit),
        same_attention=bool(same),
        generation_fields=fields,
        template="model_card_template.md",
        notes=tuple(
            _notes(
                folder,
                fields,
                config,
                context,
                source_config.max_position_embeddings,
                window if is_cut else None,
                dtypes,
                rope_parameters,
                dtype,
            )
        ),
    )


def default_config(fields: dict) -> tuple[LongNetConfig, str]:
    """Return what a dense model's config.json becomes with all options left out, and its architecture.

    Raises:
        ValueError: if it is quantized, of a family that is not supported, or malformed.
    """
    fields = _with_architecture(fields)
    family = find_family(fields)
    source_config = family.read_config(fields)
    trained, window = _trained_context(source_config), family.sliding_window(source_config)
    pattern, context = _choose_pattern(source_config, trained, window, "retrofit", None, None, None, None)
    longnet_fields = family.longnet_fields(source_config) | {
        "rope_parameters": frozen_rope(source_config),
        "max_position_embeddings": context,
        "local_layers": family.local_layers(source_config),
        **pattern_fields(pattern),
    }
    return LongNetConfig(**longnet_fields), family.architecture


def _with_architecture(fields: dict) -> dict:
    """Name the architecture in a configuration that was saved without a model."""
    if fields.get("architectures"):
        return fields
    named = [x.architecture for x in FAMILIES if x.config_class.model_type == fields.get("model_type")]
    return {**fields, "architectures": named}


def _in_words(config: PreTrainedConfig, trained: int, window: int | None, some_layers: bool) -> str:
    """Say what the source was trained for."""
    stretched = config.max_position_embeddings
    stretch = f", stretched to {stretched:,} by its RoPE" if stretched > trained else ""
    each = "some layers" if some_layers else "each"
    attending = f", {each} attending to the last {window:,}" if window else ""
    return f"{trained:,} tokens{stretch}{attending}"


def _trained_context(config: PreTrainedConfig) -> int:
    """Return the length the source was trained for before any RoPE scaling stretched it."""
    rope, trained = config.rope_parameters, config.max_position_embeddings
    if rope["rope_type"] != "default":  # which stretches nothing, whatever its settings still hold
        trained = min(trained, rope.get("original_max_position_embeddings") or trained)
    if trained < 1:
        raise ValueError(
            f"config.json must say how many tokens the source was trained for (max_position_embeddings, or before RoPE "
            f"stretched it original_max_position_embeddings), got {trained}"
        )
    return trained


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
    for name, number in (("max_position_embeddings (--context)", context), ("local (--local)", local)):
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
        check_window(pattern, window)
        return pattern, context
    if local is not None:
        raise ValueError(f"local {local} and segment_lengths {list(segment_lengths)} both set the first; give one")
    if dilation_rates is None:
        first = DilationPattern(tuple(segment_lengths), (1,) * len(segment_lengths)).segment_lengths[0]
        if any(w % first for w in segment_lengths):
            raise ValueError(
                f"segment_lengths {list(segment_lengths)} are not multiples of the first, so there are no default "
                "rates w_i / w_0; give dilation_rates"
            )
        dilation_rates = [w // first for w in segment_lengths]
    try:
        pattern = DilationPattern.preset(preset, segment_lengths, dilation_rates)
    except ValueError as error:
        advice = "use count_overlaps=True"  # which a conversion has no option for
        raise ValueError(str(error).replace(advice, 'choose preset="paper" (--preset paper)')) from error
    check_window(pattern, window)
    return pattern, context or max(config.max_position_embeddings, pattern.segment_lengths[-1])


def source_window(fields: dict) -> int | None:
    """Return the sliding window that some layers of a dense model's config.json have, None if none does."""
    family = find_family(_with_architecture(fields))
    return family.sliding_window(family.read_config(fields))


def check_window(pattern: DilationPattern, window: int | None) -> None:
    """Refuse a first segment in which a source with a sliding window is not ordinary attention.

    Raises:
        ValueError: if it is longer than the window.
    """
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
        rotating = _rotating(config, config.rope_parameters)
        theta = config.rope_parameters["rope_theta"] * factor ** (rotating / (rotating - 2))
        return {"rope_type": "default", "rope_theta": theta}
    bands = {"low_freq_factor": 1.0, "high_freq_factor": 4.0} if word == "llama3" else {}
    return {"rope_type": word, "factor": factor, **bands}


def _dense_layers_from_word(word: str, num_layers: int) -> tuple[int, ...]:
    if word != "late":
        raise ValueError(f"dense_layers must be indices of layers or 'late', got {word!r}")
    return (int(LATE * num_layers),)


def frozen_rope(config: PreTrainedConfig) -> dict:
    """Return a source's RoPE settings, with nothing left that follows max_position_embeddings by itself."""
    rope = dict(config.rope_parameters)
    if rope["rope_type"] in ("yarn", "longrope") and rope.get("factor") is None:
        rope["factor"] = config.max_position_embeddings / rope["original_max_position_embeddings"]
    return rope


def _rope_parameters(family: Family, config: PreTrainedConfig, override: dict | None, trained: int) -> dict:
    """Return the target's RoPE settings: the source's, or new ones completed from them."""
    if override is None:
        return _checked_rope(frozen_rope(config), config)
    known = ("default", *(name for name in ROPE_INIT_FUNCTIONS if name != "default"))
    if not isinstance(override, dict) or override.get("rope_type") not in known:
        raise ValueError(f"rope_parameters must be a dict with a rope_type among {', '.join(known)}, got {override!r}")
    if family.rope_types is not None and override["rope_type"] not in family.rope_types:
        raise ValueError(
            f"{family.architecture} has no RoPE of type {override['rope_type']}, only {', '.join(family.rope_types)}; "
            "choose ntk, which stretches the default one (--rope ntk), or keep the source's (--rope none)"
        )
    if not family.rotates_partly and override.get("partial_rotary_factor", 1) != 1:
        raise ValueError(f"{family.architecture} rotates whole heads; leave partial_rotary_factor out")
    kept = ("rope_theta", "partial_rotary_factor")
    rope = {name: value for name, value in config.rope_parameters.items() if name in kept} | override
    if rope["rope_type"] in ("llama3", "yarn", "longrope"):
        rope.setdefault("original_max_position_embeddings", trained)
    return _checked_rope(rope, config)


def _checked_rope(rope: dict, config: PreTrainedConfig) -> dict:
    """Hand RoPE settings back if the angles that they give are numbers, one for each pair that rotates."""
    for name in ("rope_theta",) if rope["rope_type"] == "default" else ("rope_theta", "factor"):
        value = rope.get(name, 1.0)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
            raise ValueError(f"rope_parameters need a positive finite number as {name}, got {value!r}")
    for name in ("short_factor", "long_factor") if rope["rope_type"] == "longrope" else ():
        value, pairs = rope.get(name), _rotating(config, rope) // 2
        if not isinstance(value, list | tuple) or len(value) != pairs:
            found = len(value) if isinstance(value, list | tuple) else repr(value)
            raise ValueError(f"RoPE longrope needs {pairs} numbers as {name}, one per pair that rotates, got {found}")
        if strange := [x for x in value if not isinstance(x, (int, float)) or not 0 < x < math.inf]:
            raise ValueError(f"RoPE longrope needs positive finite numbers as {name}, got {strange[0]!r}")
    return rope


def _rotating(config: PreTrainedConfig, rope: dict) -> int:
    """Return how many dimensions of a head rotate."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(head_dim * rope.get("partial_rotary_factor", 1.0))


def _notes(
    folder: Path,
    fields: dict,
    config: LongNetConfig,
    context: int,
    source_context: int,
    cut_window: int | None,
    dtypes: Counter[str],
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
    if cut_window is not None:
        notes.append(
            f"the source attends in a window of {cut_window:,} tokens, cut here to the first segment, "
            f"{pattern.segment_lengths[0]:,}: one of {cut_window:,} keeps it (--local)"
        )
    longest = max(max(config.layer_pattern(i).segment_lengths) for i in range(config.num_hidden_layers))
    if longest < context:
        notes.append(
            f"no layer reaches the whole context of {context:,} tokens, the longest segment has {longest:,}: give a "
            "longer last segment or --dense-layers late"
        )
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
    settings = folder / "generation_config.json"
    if cache := foreign_cache(read_json(settings) if settings.is_file() else fields):
        notes.append(f"generation settings ask for a {cache} cache: left out, since LongNet brings its own")
    if fields.get("auto_map"):
        notes.append("the source's own code (auto_map) was not used: it is read as transformers' own model")
    path = folder / "tokenizer_config.json"
    tokenizer = read_json(path) if path.is_file() else {}
    if tokenizer.get("auto_map"):
        notes.append("the tokenizer needs code of the source (auto_map), which is not carried along")
    limit = tokenizer.get("model_max_length")
    if isinstance(limit, int | float) and limit < context:
        notes.append(
            f"the tokenizer truncates to {limit:,} tokens where it is asked to truncate: raise model_max_length in "
            f"tokenizer_config.json, which is carried along as it is, to {context:,}"
        )
    return notes
