"""Turn a pretrained dense checkpoint into a LongNet checkpoint: read and check, plan, write, verify, publish.

Nothing is written before everything that can be known from headers and config is checked, and nothing is published
(renamed into place) before the written model has given the source's logits.
"""

import hashlib
import json
from pathlib import Path

from transformers import GenerationConfig
from transformers.dynamic_module_utils import custom_object_save

from modeling_longnet import (
    DilationPattern,
    LongNetConfig,
    LongNetForCausalLM,
    LongNetForQuestionAnswering,
    LongNetForSequenceClassification,
    LongNetForTokenClassification,
    LongNetModel,
)

from .atomic_folder import atomic_folder, check_target
from .hub import check_repo_id, push_folder
from .model_card import fill_model_card
from .plan import Plan, dtype_name, pattern_fields, plan_conversion
from .steps import (
    carry_files,
    check_apart,
    check_space,
    command_line,
    describe_outcome,
    describe_verification,
    hash_files,
    progress_bar,
    verify_logits,
    versions,
)
from .verify import MAX_TOKENS, StoredModel, Verification, dense_length, skeleton, verification_tokens
from .weights import DTYPES, copy_weights, files_are_kept, read_json, read_weights


LOADABLE_AS = (
    LongNetModel,
    LongNetForCausalLM,
    LongNetForSequenceClassification,
    LongNetForTokenClassification,
    LongNetForQuestionAnswering,
)


def convert_checkpoint(
    source: str | Path,
    target: str | Path,
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
    push_to_hub: str | None = None,
    verify: bool = True,
    overwrite: bool = False,
    progress: bool = True,
) -> dict:
    """Convert a dense checkpoint to a LongNet checkpoint that loads without this package installed.

    The weights keep their bits, and their names where LongNet has the same modules. With preset ``retrofit`` the
    converted model has the source's logits on every input of at most ``w_0`` tokens, and is verified to. ``target``
    appears complete or not at all, whenever the process is killed. Tokenizer, chat template and generation config are
    carried along byte for byte.

    Without ``segment_lengths`` the pattern is geometric: ``w_0`` is the trained context of the source (4,096 where it
    was trained for more, and its sliding window where it has a shorter one), doubled, with rates 1, 2, 4, ..., until a
    segment covers ``max_position_embeddings``.

    Args:
        source: folder, or model id on the Hugging Face Hub. Its own code is never run.
        target: folder to create.
        preset: ``"retrofit"``, ``"paper"`` or ``"torchscale"``.
        segment_lengths: tokens per branch.
        dilation_rates: one per branch; ``w_i / w_0`` if None.
        dense_layers: indices of layers that keep ordinary attention, and an unbounded KV cache.
        rope_parameters: new RoPE settings in transformers' form, such as ``{"rope_type": "yarn", "factor": 4.0}``;
            what they leave out (theta, original length) comes from the source. Or a word: ``"yarn"``, ``"linear"`` or
            ``"llama3"`` with the factor ``max_position_embeddings`` / trained context; ``"ntk"``, plain RoPE with theta
            times that factor to the power of d / (d - 2) for heads of d; ``"none"`` or None keeps the source's.
        max_position_embeddings: context of the target; if None the source's, or four times ``w_0`` where that is more.
        local: ``w_0``, in place of ``segment_lengths``.
        max_shard_size: largest weight file, bytes or e.g. ``"5GB"``; one larger tensor gets a file of its own.
        dtype: round the weights to ``"float32"``, ``"float16"`` or ``"bfloat16"``; None keeps their bits.
        revision: branch, tag or commit of a source on the Hub.
        push_to_hub: repository to upload the finished target to; created, private, if it does not exist.
        verify: compare logits of source and target, in float32 and the checkpoint's dtype, before ``target`` appears.
        overwrite: replace an existing checkpoint at ``target``, in one step at the end.
        progress: print the plan to stdout and progress bars to stderr.

    Returns:
        The report that is also written to ``conversion_report.json``.

    Raises:
        ValueError: if the source cannot be converted, the target may not be written, an option does not fit, or the
            logits differ.
    """
    planning = {
        "preset": preset,
        "segment_lengths": segment_lengths,
        "dilation_rates": dilation_rates,
        "dense_layers": dense_layers,
        "rope_parameters": rope_parameters,
        "max_position_embeddings": max_position_embeddings,
        "local": local,
        "max_shard_size": max_shard_size,
        "dtype": dtype,
        "revision": revision,
    }
    command = command_line(
        source, target, planning | {"push_to_hub": push_to_hub, "no_verify": not verify, "overwrite": overwrite}
    )
    target = Path(target).resolve()
    check_target(target, overwrite)
    check_repo_id(push_to_hub)
    plan = plan_conversion(source, **planning)
    check_apart(plan.source, target)
    if progress:
        print(plan.describe(), flush=True)
    with atomic_folder(target, overwrite) as folder:
        check_space(folder, plan.num_bytes)
        with progress_bar("writing weights", plan.num_bytes, progress) as bar:
            weight_files = copy_weights(plan.tensors, folder, plan.max_shard_size, bar.update, plan.dtype)
        _write_config_and_code(plan, folder)
        carry_files(plan.source, folder)
        _write_generation_config(plan, folder)
        verification = _verify(plan, folder, progress) if verify else None
        report = {"command": command, **_report(plan, folder, hash_files(weight_files, progress), verification)}
        (folder / "conversion_report.json").write_text(json.dumps(report, indent=2) + "\n")
        (folder / "README.md").write_text(fill_model_card(plan, report), encoding="utf-8")
    if progress:
        print(f"verified   {describe_outcome(verification)}\nwrote      {target}", flush=True)
    if push_to_hub is not None:
        push_folder(target, push_to_hub, f"Convert {plan.name} to LongNet")
        if progress:
            print(f"uploaded   {push_to_hub}")
    return report


def _write_config_and_code(plan: Plan, folder: Path) -> None:
    """Save config.json and the package's own files next to it, as transformers does for custom models."""
    plan.config.auto_map = {
        model_class._auto_class: f"{model_class.__module__.split('.')[-1]}.{model_class.__name__}"
        for model_class in LOADABLE_AS
    }
    custom_object_save(skeleton(LongNetForCausalLM, plan.config), folder, config=plan.config)
    plan.config.save_pretrained(folder)


def _write_generation_config(plan: Plan, folder: Path) -> None:
    if not (folder / "generation_config.json").exists():
        # Old checkpoints keep such settings in config.json, where transformers no longer writes them.
        fields = read_json(plan.source / "config.json")
        GenerationConfig.from_model_config(fields).save_pretrained(folder)


def _verify(plan: Plan, folder: Path, progress: bool) -> Verification:
    """Compare the logits of the source and of what was written.

    Raises:
        ValueError: if they differ.
    """
    config = LongNetConfig.from_pretrained(folder)
    same = dense_length(config.pattern)
    limits = (same, plan.trained_context, plan.window, MAX_TOKENS)
    token_ids, text = verification_tokens(plan.source, config.vocab_size, min(limit for limit in limits if limit))
    if not same:
        for name, value in pattern_fields(DilationPattern((token_ids.shape[1],), (1,))).items():
            setattr(config, name, value)
    source = StoredModel(plan.family.model_class, plan.reference_config, plan.source_tensors, plan.dtype)
    target = StoredModel(LongNetForCausalLM, config, read_weights(folder))
    return verify_logits(source, target, token_ids, text, bool(same), progress)


def _report(plan: Plan, folder: Path, weight_files: dict, verification: Verification | None) -> dict:
    config = plan.config
    return {
        "source": {"name": plan.name, "revision": plan.revision, "architecture": plan.family.architecture},
        "pattern": {
            "preset": plan.preset,
            **pattern_fields(config.pattern),
            "dense_layers": list(config.dense_layers),
        },
        "trained_context": plan.trained_context,
        "max_position_embeddings": config.max_position_embeddings,
        "rope_parameters": config.rope_parameters,
        "weights": {
            "num_tensors": len(plan.tensors),
            "num_bytes": plan.num_bytes,
            "dtypes": sorted({dtype_name(DTYPES[plan.dtype or tensor.dtype]) for tensor in plan.tensors.values()}),
            "files": weight_files,
            "files_unchanged": files_are_kept(plan.tensors, plan.max_shard_size, plan.dtype),
        },
        "config_sha256": hashlib.sha256((folder / "config.json").read_bytes()).hexdigest(),
        "costs": plan.costs(),
        "verification": describe_verification(verification),
        "notes": list(plan.notes),
        "versions": versions(),
    }
