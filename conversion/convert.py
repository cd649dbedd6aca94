"""Turn a pretrained dense checkpoint into a LongNet checkpoint: read and check, plan, write, verify, publish.

Nothing is written before everything that can be known from headers and config is checked, and nothing is published
(renamed into place) before the written model has given the source's logits.
"""

import dataclasses
import hashlib
import json
import platform
import shutil
import sys
from importlib.metadata import version
from pathlib import Path

from tqdm import tqdm
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
from .model_card import fill_model_card
from .plan import CARRIED_FILES, Plan, dtype_name, pattern_fields, plan_conversion, short_number
from .verify import MAX_TOKENS, Verification, compare_logits, dense_length, skeleton, verification_tokens
from .weights import DTYPES, copy_bytes, copy_weights, files_are_kept, read_json, read_weights


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
    rope_parameters: dict | None = None,
    max_position_embeddings: int | None = None,
    max_shard_size: int | str = "5GB",
    verify: bool = True,
    overwrite: bool = False,
    progress: bool = True,
) -> dict:
    """Convert a dense checkpoint to a LongNet checkpoint that loads without this package installed.

    The weights keep their bits, and their names but for fused projections. With preset ``retrofit`` the converted model has the source's logits on
    every input of at most ``w_0`` tokens, and is verified to. ``target`` appears complete or not at all, whenever the
    process is killed. Tokenizer, chat template and generation config are carried along byte for byte.

    Without ``segment_lengths`` the pattern is geometric: ``w_0`` is the trained context of the source (4,096 where it
    was trained for more), doubled, with rates 1, 2, 4, ..., until a segment covers ``max_position_embeddings``.

    Args:
        source: folder, or model id on the Hugging Face Hub. Its own code is never run.
        target: folder to create.
        preset: ``"retrofit"``, ``"paper"`` or ``"torchscale"``.
        segment_lengths: tokens per branch.
        dilation_rates: one per branch; ``w_i / w_0`` if None.
        rope_parameters: new RoPE settings in transformers' form, such as ``{"rope_type": "yarn", "factor": 4.0}``;
            what they leave out (theta, original length) comes from the source. None keeps the source's.
        max_position_embeddings: context of the target; if None the source's, or four times ``w_0`` where that is more.
        max_shard_size: largest weight file, bytes or e.g. ``"5GB"``; one larger tensor gets a file of its own.
        verify: compare logits of source and target in float32 before ``target`` appears.
        overwrite: replace an existing checkpoint at ``target``, in one step at the end.
        progress: print the plan to stdout and progress bars to stderr.

    Returns:
        The report that is also written to ``conversion_report.json``.

    Raises:
        ValueError: if the source cannot be converted, the target may not be written, an option does not fit, or the
            logits differ.
    """
    target = Path(target).resolve()
    check_target(target, overwrite)
    plan = plan_conversion(
        source,
        preset=preset,
        segment_lengths=segment_lengths,
        dilation_rates=dilation_rates,
        rope_parameters=rope_parameters,
        max_position_embeddings=max_position_embeddings,
        max_shard_size=max_shard_size,
    )
    _check_apart(plan.source, target)
    if progress:
        print(plan.describe(), flush=True)
    with atomic_folder(target, overwrite) as folder:
        _check_space(folder, plan.num_bytes)
        weight_files = _write_weights(plan, folder, progress)
        _write_config_and_code(plan, folder)
        _carry_files(plan, folder)
        verification = _verify(plan, folder, progress) if verify else None
        report = _report(plan, folder, weight_files, verification)
        (folder / "conversion_report.json").write_text(json.dumps(report, indent=2) + "\n")
        (folder / "README.md").write_text(fill_model_card(plan, report), encoding="utf-8")
    if progress:
        print(f"verified   {_outcome(verification)}\nwrote      {target}")
    return report


def _check_apart(source: Path, target: Path) -> None:
    source, target = source.resolve(), target.resolve()
    if source == target or source in target.parents or target in source.parents:
        raise ValueError(f"the target {target} and the source {source} must not be or contain one another")


def _check_space(folder: Path, num_bytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise ValueError(
            f"{folder.parent} has {short_number(free)}B free, but the weights need {short_number(num_bytes)}B"
        )


def _write_weights(plan: Plan, folder: Path, progress: bool) -> list[Path]:
    with _progress_bar("writing weights", plan.num_bytes, progress) as bar:
        return copy_weights(plan.tensors, folder, plan.max_shard_size, bar.update)


def _write_config_and_code(plan: Plan, folder: Path) -> None:
    """Save config.json and the package's own files next to it, as transformers does for custom models."""
    plan.config.auto_map = {
        model_class._auto_class: f"{model_class.__module__.split('.')[-1]}.{model_class.__name__}"
        for model_class in LOADABLE_AS
    }
    custom_object_save(skeleton(LongNetForCausalLM, plan.config), folder, config=plan.config)
    plan.config.save_pretrained(folder)


def _carry_files(plan: Plan, folder: Path) -> None:
    for path in sorted(path for pattern in CARRIED_FILES for path in plan.source.glob(pattern)):
        carried = folder / path.relative_to(plan.source)
        if path.is_file() and path.suffix != ".py" and not carried.exists():
            carried.parent.mkdir(exist_ok=True)
            with open(path, "rb") as source, open(carried, "xb") as target:
                copy_bytes(source, target, path.stat().st_size)
    if not (folder / "generation_config.json").exists():
        # Old checkpoints keep such settings in config.json, where transformers no longer writes them.
        fields = read_json(plan.source / "config.json")
        GenerationConfig.from_model_config(fields).save_pretrained(folder)


def _verify(plan: Plan, folder: Path, progress: bool) -> Verification:
    """Compare the logits of the source and of what was written.

    Raises:
        ValueError: if they differ.
    """
    written = read_weights(folder)
    config = LongNetConfig.from_pretrained(folder)
    same = dense_length(config.pattern)
    token_ids, text = verification_tokens(plan.source, config.vocab_size, _verifiable_length(plan, same))
    if not same:
        dense = DilationPattern((token_ids.shape[1],), (1,))
        for name, value in pattern_fields(dense).items():
            setattr(config, name, value)
    source = (plan.family.model_class, plan.reference_config, plan.source_tensors)
    target = (LongNetForCausalLM, config, written)
    for _ in range(2):  # a process's first float32 products on CPU have been seen wrong by 2e-4, its second never
        with _progress_bar("verifying logits", 2 * plan.num_bytes, progress) as bar:
            errors = compare_logits(source, target, token_ids, bar.update)
        verification = Verification(token_ids.shape[1], text, pattern_used=bool(same), **errors)
        if verification.passed:
            return verification
    raise ValueError(
        f"the converted model's logits differ from the source's by {verification.max_error:.3g} "
        f"({verification.relative_error:.1e} of the largest; {verification.tolerance:g} is allowed); nothing was written"
    )


def _verifiable_length(plan: Plan, dense_length: int) -> int:
    """Return the most tokens on which source and target are to be compared."""
    limits = (dense_length, plan.trained_context, plan.window, MAX_TOKENS)
    return min(limit for limit in limits if limit)


def _outcome(verification: Verification | None) -> str:
    if verification is None:
        return "no, as asked"
    outcome = f"logits differ by at most {verification.max_error:.2g} on {verification.num_tokens} tokens"
    if verification.num_not_finite:
        outcome += f"; {verification.num_not_finite:,} are not finite in either model: look for NaN weights"
    return outcome


def _report(plan: Plan, folder: Path, weight_files: list[Path], verification: Verification | None) -> dict:
    config = (folder / "config.json").read_bytes()
    report = {
        "source": {"name": plan.name, "revision": plan.revision, "architecture": plan.family.architecture},
        "pattern": {"preset": plan.preset, **pattern_fields(plan.config.pattern)},
        "trained_context": plan.trained_context,
        "max_position_embeddings": plan.config.max_position_embeddings,
        "rope_parameters": plan.config.rope_parameters,
        "weights": {
            "num_tensors": len(plan.tensors),
            "num_bytes": plan.num_bytes,
            "dtypes": sorted({dtype_name(DTYPES[tensor.dtype]) for tensor in plan.tensors.values()}),
            "files": {path.name: path.stat().st_size for path in weight_files},
            "files_unchanged": files_are_kept(plan.tensors, plan.max_shard_size),
        },
        "config_sha256": hashlib.sha256(config).hexdigest(),
        "costs": plan.costs(),
        "verification": None,
        "notes": list(plan.notes),
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("torch", "transformers", "safetensors", "huggingface_hub")},
    }
    if verification is not None:
        report["verification"] = dataclasses.asdict(verification) | {"relative_error": verification.relative_error}
    return report


def _progress_bar(title: str, num_bytes: int, progress: bool) -> tqdm:
    # disable=None hides the bar where stderr is not a terminal.
    return tqdm(
        total=num_bytes, desc=title, unit="B", unit_scale=True, file=sys.stderr, disable=None if progress else True
    )
