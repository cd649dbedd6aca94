"""Turn a LongNet checkpoint back into the ordinary one that it was converted from, with the weights it has now."""

import dataclasses
import hashlib
import json
from pathlib import Path

from transformers import PreTrainedConfig

from modeling_longnet import DilationPattern, LongNetConfig, LongNetForCausalLM

from .atomic_folder import atomic_folder, check_target
from .families import Family, find_family, sliding_window
from .hub import check_repo_id, find_folder, push_folder
from .model_card import fill_dense_card
from .plan import dtype_name, frozen_rope, pattern_fields, written_dtype
from .steps import (
    DOWNLOADED_FILES,
    carry_files,
    check_apart,
    check_space,
    command_line,
    describe_outcome,
    describe_verification,
    hash_files,
    progress_bar,
    short_number,
    verify_logits,
    versions,
)
from .verify import MAX_TOKENS, StoredModel, Verification, dense_length, skeleton, verification_tokens
from .weights import DTYPES, StoredTensor, copy_weights, match_weights, read_json, read_weights, total_bytes


# What tuning may change of a config besides RoPE and context: tokens added, a padding token chosen, heads untied.
TUNED_FIELDS = ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings")


@dataclasses.dataclass(frozen=True)
class DensePlan:
    """Everything the way back will do, known before a byte is written.

    Args:
        source: folder of the LongNet checkpoint.
        name: the source as the user gave it.
        revision: commit of a source from the Hub, else None.
        config: the source's config.
        source_tensors: the stored tensors under LongNet's names.
        family: what the target will be.
        dense_fields: the target's config.json.
        dense_config: the same, read.
        tensors: the stored tensors to write, under the target's names.
        max_shard_size: as given to ``convert_to_dense``.
        dtype: what to round the weights to, as safetensors spells it; None keeps their bits.
    """

    source: Path
    name: str
    revision: str | None
    config: LongNetConfig
    source_tensors: dict[str, StoredTensor]
    family: Family
    dense_fields: dict
    dense_config: PreTrainedConfig
    tensors: dict[str, StoredTensor]
    max_shard_size: int | str
    dtype: str | None

    @property
    def num_bytes(self) -> int:
        """Bytes of weights to write."""
        return total_bytes(self.tensors.values(), self.dtype)

    def describe(self) -> str:
        """Say in a few lines what will be converted to what."""
        rope = self.dense_config.rope_parameters
        return "\n".join(
            [
                f"source     {self.name}",
                f"           LongNet, {short_number(self.num_bytes)}B of weights",
                f"target     {self.family.architecture}, ordinary attention",
                f"RoPE       {rope['rope_type']}, theta {rope['rope_theta']:g}",
                f"context    {self.dense_config.max_position_embeddings:,} tokens",
            ]
        )


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
        max_shard_size, dtype, revision, push_to_hub, verify, overwrite, progress: as for ``convert_checkpoint``.

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
    }
    given = planning | {"push_to_hub": push_to_hub, "no_verify": not verify, "overwrite": overwrite, "to_dense": True}
    command = command_line(source, target, given)
    target = Path(target).resolve()
    check_target(target, overwrite)
    check_repo_id(push_to_hub)
    plan = plan_to_dense(source, **planning)
    check_apart(plan.source, target)
    if progress:
        print(plan.describe(), flush=True)
    with atomic_folder(target, overwrite) as folder:
        check_space(folder, plan.num_bytes)
        with progress_bar("writing weights", plan.num_bytes, progress) as bar:
            weight_files = copy_weights(plan.tensors, folder, plan.max_shard_size, bar.update, plan.dtype)
        config = json.dumps(plan.dense_fields, indent=2, sort_keys=True) + "\n"
        (folder / "config.json").write_text(config)
        carry_files(plan.source, folder)
        verification = _verify(plan, folder, progress) if verify else None
        report = {
            "command": command,
            "source": {"name": plan.name, "revision": plan.revision, "architecture": LongNetForCausalLM.__name__},
            "architecture": plan.family.architecture,
            "weights": {
                "num_tensors": len(plan.tensors),
                "num_bytes": plan.num_bytes,
                "files": hash_files(weight_files, progress),
            },
            "config_sha256": hashlib.sha256(config.encode()).hexdigest(),
            "verification": describe_verification(verification),
            "versions": versions(),
        }
        (folder / "conversion_report.json").write_text(json.dumps(report, indent=2) + "\n")
        (folder / "README.md").write_text(fill_dense_card(plan, report), encoding="utf-8")
    if progress:
        print(f"verified   {describe_outcome(verification)}\nwrote      {target}", flush=True)
    if push_to_hub is not None:
        push_folder(target, push_to_hub, f"Convert {plan.name} to {plan.family.architecture}")
        if progress:
            print(f"uploaded   {push_to_hub}")
    return report


def plan_to_dense(
    source: str | Path,
    *,
    max_position_embeddings: int | None = None,
    max_shard_size: int | str = "5GB",
    dtype: str | None = None,
    revision: str | None = None,
) -> DensePlan:
    """Read and check a LongNet checkpoint and decide on everything, without writing (a Hub source is downloaded).

    Args and errors are those of ``convert_to_dense``.
    """
    dtype = written_dtype(dtype)
    folder, commit = find_folder(source, revision, DOWNLOADED_FILES)
    fields = read_json(folder / "config.json")
    if fields.get("architectures") != [LongNetForCausalLM.__name__]:
        named = ", ".join(map(str, fields.get("architectures") or ["no architecture"]))
        raise ValueError(f"the source is {named}; only {LongNetForCausalLM.__name__} has a way back")
    try:
        config = LongNetConfig.from_dict(fields)
    except Exception as error:  # strict-dataclass errors of several lines
        raise ValueError(f"config.json is not a valid LongNetConfig: {error}") from error
    source_tensors = read_weights(folder)
    match_weights(skeleton(LongNetForCausalLM, config), source_tensors)
    dense_fields = _dense_fields(config, max_position_embeddings, dtype)
    family = find_family(dense_fields)
    dense_config = family.read_config(dense_fields)
    tensors = family.from_longnet(dense_config, source_tensors)
    match_weights(skeleton(family.model_class, dense_config), tensors)
    return DensePlan(
        source=folder,
        name=str(source),
        revision=commit,
        config=config,
        source_tensors=source_tensors,
        family=family,
        dense_fields=dense_fields,
        dense_config=dense_config,
        tensors=tensors,
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


def _verify(plan: DensePlan, folder: Path, progress: bool) -> Verification:
    """Compare the logits of the LongNet model and of what was written.

    Raises:
        ValueError: if they differ.
    """
    config = LongNetConfig.from_dict(plan.config.to_dict())
    config.dtype = plan.dense_config.dtype
    same = dense_length(config.pattern)
    limits = (same, config.trained_context, sliding_window(plan.dense_config), MAX_TOKENS)
    token_ids, text = verification_tokens(plan.source, config.vocab_size, min(limit for limit in limits if limit))
    if not same:
        for name, value in pattern_fields(DilationPattern((token_ids.shape[1],), (1,))).items():
            setattr(config, name, value)
    source = StoredModel(LongNetForCausalLM, config, plan.source_tensors, plan.dtype)
    dense_config = plan.family.read_config(read_json(folder / "config.json"))
    target = StoredModel(plan.family.model_class, dense_config, read_weights(folder))
    return verify_logits(source, target, token_ids, text, bool(same), progress)
