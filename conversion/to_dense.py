"""Turn a LongNet checkpoint back into the ordinary one that it was converted from, with the weights it has now."""

import dataclasses
import json
from pathlib import Path

from transformers import PreTrainedConfig

from modeling_longnet import DilationPattern, LongNetConfig, LongNetForCausalLM

from . import pipeline
from .families import Family, find_family
from .hub import find_folder
from .model_card import fill_dense_card
from .plan import Plan, pattern_fields
from .plan_family import frozen_rope
from .source_weights import read_weights
from .steps import DOWNLOADED_FILES, check_no_adapter, short_number
from .stored_model import StoredModel, skeleton
from .verify import MOST_TOKENS, Comparison, check_verify_tokens, dense_length, verification_tokens
from .weights import DTYPES, StoredTensor, dtype_name, match_weights, read_json, written_dtype


# What tuning may change of a config besides RoPE and context: tokens added, a padding token chosen, heads untied.
TUNED_FIELDS = ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings")


@dataclasses.dataclass(frozen=True)
class DensePlan(Plan):
    """The way back.

    Args:
        config: the source's config.
        source_tensors: the stored tensors under LongNet's names.
        family: what the target will be.
        dense_fields: the target's config.json.
        dense_config: the same, read.
        verify_tokens: how many tokens to compare at most.
    """

    config: LongNetConfig
    source_tensors: dict[str, StoredTensor]
    family: Family
    dense_fields: dict
    dense_config: PreTrainedConfig
    verify_tokens: int

    @property
    def becomes(self) -> str:
        return self.family.architecture

    def describe(self) -> str:
        """Say in a few lines what will be converted to what."""
        rope = self.dense_config.rope_parameters
        return "\n".join(
            [
                f"source     {self.name}",
                f"           LongNet, {short_number(self.num_bytes)}B of weights",
                f"target     {self.family.architecture}, ordinary attention",
                f"positions  RoPE {rope['rope_type']}, theta {rope['rope_theta']:g}",
                f"context    {self.dense_config.max_position_embeddings:,} tokens",
            ]
        )

    def write_config(self, folder: Path) -> None:
        """Write the source's original config.json with what changed since."""
        (folder / "config.json").write_text(json.dumps(self.dense_fields, indent=2, sort_keys=True) + "\n")

    def write_generation_config(self, folder: Path) -> None:
        """Write nothing: a LongNet checkpoint has a file of generation settings, which is carried."""

    def comparison(self, folder: Path) -> Comparison:
        """Return the LongNet model and what was written; up to the first segment the two are one."""
        config = LongNetConfig.from_dict(self.config.to_dict())
        config.dtype, config.return_dict = self.dense_config.dtype, True
        same = dense_length(config.pattern)
        window = self.family.sliding_window(self.dense_config)
        limits = (same, config.trained_context, window, self.verify_tokens)
        token_ids, text = verification_tokens(self.source, config.vocab_size, min(limit for limit in limits if limit))
        if not same:
            for name, value in pattern_fields(DilationPattern((token_ids.shape[1],), (1,))).items():
                setattr(config, name, value)
        dense_config = self.family.read_config(read_json(folder / "config.json"))
        return Comparison(
            StoredModel(LongNetForCausalLM, config, self.source_tensors, self.dtype),
            StoredModel(self.family.model_class, dense_config, read_weights(folder)),
            token_ids,
            text,
            bool(same),
        )

    def particulars(self) -> dict:
        """Return what the target is."""
        return {"architecture": self.family.architecture}

    def card(self, report: dict) -> str:
        """Fill the model card of a checkpoint with ordinary attention again."""
        return fill_dense_card(self, report)


def convert_to_dense(
    source: str | Path,
    target: str | Path,
    *,
    max_position_embeddings: int | None = None,
    max_shard_size: int | str = "5GB",
    dtype: str | None = None,
    revision: str | None = None,
    push_to_hub: str | None = None,
    verify: bool = True,
    verify_tokens: int = MOST_TOKENS,
    overwrite: bool = False,
    progress: bool = True,
) -> dict:
    """Convert a LongNet checkpoint back to the ordinary architecture that it came from.

    The weights keep their bits; the config is the one that the conversion to LongNet started from, but for what
    changed since: RoPE with its context, the vocabulary, special tokens, dtype. The target loads in transformers' own
    class and has the LongNet model's logits on every input of at most ``w_0`` tokens, which is verified.

    Args:
        source: folder, or model id on the Hugging Face Hub, of a converted checkpoint, tuned since or not.
        target: folder to create.
        max_position_embeddings: context in the target's config; if None the original one, or LongNet's where RoPE was
            changed.
        max_shard_size, dtype, revision, push_to_hub, verify, verify_tokens, overwrite, progress: as for ``convert_checkpoint``.

    Returns:
        The report that is also written to ``conversion_report.json``.

    Raises:
        ValueError: if the source is no converted LongNet language model, the target may not be written, an option does
            not fit, or the logits differ.
    """
    planning = {
        "max_position_embeddings": max_position_embeddings,
        "max_shard_size": max_shard_size,
        "dtype": dtype,
        "revision": revision,
        "verify_tokens": verify_tokens,
    }
    return pipeline.convert(
        plan_to_dense,
        source,
        target,
        planning,
        kind={"to_dense": True},
        push_to_hub=push_to_hub,
        verify=verify,
        overwrite=overwrite,
        progress=progress,
    )


def plan_to_dense(
    source: str | Path,
    *,
    max_position_embeddings: int | None = None,
    max_shard_size: int | str = "5GB",
    dtype: str | None = None,
    revision: str | None = None,
    verify_tokens: int = MOST_TOKENS,
) -> DensePlan:
    """Read and check a LongNet checkpoint and decide on everything, without writing (a Hub source is downloaded).

    Args and errors are those of ``convert_to_dense``.
    """
    dtype = written_dtype(dtype)
    check_verify_tokens(verify_tokens)
    folder, commit = find_folder(source, revision, DOWNLOADED_FILES)
    check_no_adapter(folder, source)
    fields = read_json(folder / "config.json")
    if fields.get("architectures") != [LongNetForCausalLM.__name__]:
        names = fields.get("architectures") or ["no architecture"]
        named = ", ".join(map(str, names)) if isinstance(names, list) else repr(names)
        raise ValueError(f"the source is {named}; only {LongNetForCausalLM.__name__} has a way back")
    try:
        config = LongNetConfig.from_dict(fields)
    except Exception as error:  # strict-dataclass errors of several lines
        raise ValueError(f"config.json is not a valid LongNetConfig: {error}") from error
    source_tensors = read_weights(folder)
    try:
        source_model = skeleton(LongNetForCausalLM, config)
    except Exception as error:  # a KeyError for an unknown kind of RoPE, and the like
        raise ValueError(f"config.json does not describe a LongNet model that can be built: {error!r}") from error
    match_weights(source_model, source_tensors)
    dense_fields = _dense_fields(config, max_position_embeddings, dtype)
    family = find_family(dense_fields)
    dense_config = family.read_config(dense_fields)
    tensors = family.from_longnet(dense_config, source_tensors)
    match_weights(skeleton(family.model_class, dense_config), tensors)
    return DensePlan(
        source=folder,
        name=str(source),
        revision=commit,
        architecture=LongNetForCausalLM.__name__,
        config=config,
        source_tensors=source_tensors,
        family=family,
        dense_fields=dense_fields,
        dense_config=dense_config,
        tensors=tensors,
        verify_tokens=verify_tokens,
        max_shard_size=max_shard_size,
        dtype=dtype if any(tensor.dtype != dtype for tensor in tensors.values()) else None,
    )


def _dense_fields(config: LongNetConfig, context: int | None, dtype: str | None) -> dict:
    """Return the original config.json with what changed since."""
    if config.source_config is None:
        raise ValueError(
            "config.json has no source_config, so this LongNet model was not converted from a dense one and has no way "
            "back"
        )
    fields = {name: value for name, value in config.source_config.items() if name != "auto_map"}
    if fields.get("quantization_config") == {}:  # says nothing, but transformers loads no model that has it
        del fields["quantization_config"]
    family = find_family(fields)
    original = family.read_config(fields)
    as_converted = family.longnet_fields(original)
    for name in TUNED_FIELDS:
        if getattr(config, name) != as_converted.get(name):
            fields[name] = getattr(config, name)
    own_dtype = dtype_name(DTYPES[dtype] if dtype else config.dtype or original.dtype)
    if original.dtype is None or own_dtype != dtype_name(original.dtype):
        fields.pop("torch_dtype", None)
        fields["dtype"] = own_dtype

    rope = dict(config.rope_parameters)
    if rope == frozen_rope(original) and context in (None, original.max_position_embeddings):
        return fields
    if context is not None and rope["rope_type"] == "dynamic":
        raise ValueError("dynamic RoPE scales from max_position_embeddings, so that stays; leave the context out")
    for name in ("rope_scaling", "rope_theta", "partial_rotary_factor"):
        fields.pop(name, None)
    fields["rope_parameters"] = rope
    fields["max_position_embeddings"] = context or config.max_position_embeddings
    return fields
