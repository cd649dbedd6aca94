"""What every conversion of a checkpoint does with its plan: check, write, verify, publish.

Nothing is written before everything that can be known from headers and config is checked, and nothing is published
(renamed into place) before the written model has given the source's logits.
"""

import hashlib
from collections.abc import Callable
from pathlib import Path

from .atomic_folder import atomic_folder, check_target, existing_folder, partial_folder, write_report
from .carried_tokenizer import keep_encodings
from .hub import check_repo_id, interruptible_upload, push_folder
from .plan import Plan
from .steps import (
    carry_files,
    check_apart,
    check_space,
    command_line,
    count_not_finite,
    describe_not_finite,
    describe_outcome,
    describe_verification,
    hash_files,
    progress_bar,
    say,
    verify_logits,
    versions,
)
from .weights import DTYPES, copy_weights, dtype_name, files_are_kept


def convert(
    make_plan: Callable[..., Plan],
    source: str | Path,
    target: str | Path,
    planning: dict,
    *,
    kind: dict | None = None,
    push_to_hub: str | None,
    verify: bool,
    overwrite: bool,
    progress: bool,
) -> dict:
    """Plan a conversion and carry it out; ``target`` appears complete and verified, or not at all.

    Args:
        make_plan: reads and checks ``source`` and decides on everything, without writing.
        source, target: as the user gave them.
        planning: the options of ``make_plan``.
        kind: the options of the command that name this kind of conversion.
        push_to_hub, verify, overwrite, progress: as for ``convert_checkpoint``.

    Returns:
        The report that is also written to ``conversion_report.json``.

    Raises:
        ValueError: if the source cannot be converted, the target may not be written, an option does not fit, or the
            logits differ.
    """
    given = planning | {"push_to_hub": push_to_hub, "no_verify": not verify, "overwrite": overwrite} | (kind or {})
    command = command_line(source, target, given)
    target = Path(target).resolve()
    plan = _checked_plan(make_plan, source, target, planning, push_to_hub, overwrite)
    if progress:
        say(plan.describe())
    with atomic_folder(target, overwrite) as folder:
        check_space(target.parent, plan.num_bytes)
        with progress_bar("writing weights", plan.num_bytes, progress) as bar:
            weight_files = copy_weights(plan.tensors, folder, plan.max_shard_size, bar.update, plan.dtype)
        plan.write_config(folder)
        carry_files(plan.source, folder)
        tokenizer = keep_encodings(plan.source, folder)
        plan.write_generation_config(folder)
        verification = verify_logits(plan.comparison(folder), progress) if verify else None
        report = {
            "command": command,
            "source": {"name": plan.name, "revision": plan.revision, "architecture": plan.architecture},
            **plan.particulars(),
            "weights": {
                "num_tensors": len(plan.tensors),
                "num_bytes": plan.num_bytes,
                "dtypes": sorted({dtype_name(DTYPES[plan.dtype or tensor.dtype]) for tensor in plan.tensors.values()}),
                "files": hash_files(weight_files, progress),
                "not_finite": count_not_finite(weight_files, progress),
                "files_unchanged": files_are_kept(plan.tensors, plan.max_shard_size, plan.dtype),
            },
            "tokenizer": tokenizer and tokenizer.text,
            "config_sha256": hashlib.sha256((folder / "config.json").read_bytes()).hexdigest(),
            "verification": describe_verification(verification),
            "versions": versions(),
        }
        (folder / "README.md").write_text(plan.card(report), encoding="utf-8")
        write_report(folder, report)
    with interruptible_upload(target, push_to_hub):
        if progress:
            if tokenizer is not None:
                say(f"{'tokenizer' if tokenizer.encodes_alike else 'warning':9}  {tokenizer.text}")
            if not_finite := report["weights"]["not_finite"]:
                say(f"warning    {describe_not_finite(not_finite)}")
            say(f"verified   {describe_outcome(verification)}\nwrote      {target}")
        if push_to_hub is not None:
            push_folder(target, push_to_hub, f"Convert {plan.name} to {plan.becomes}")
            if progress:
                say(f"uploaded   {push_to_hub}")
    return report


def rehearse(
    make_plan: Callable[..., Plan],
    source: str | Path,
    target: str | Path,
    planning: dict,
    *,
    push_to_hub: str | None,
    overwrite: bool,
) -> str:
    """Return a conversion's plan in words, if what ``convert`` checks before it writes lets it begin; nothing is written.

    Args and errors are those of ``convert``.
    """
    target = Path(target).resolve()
    plan = _checked_plan(make_plan, source, target, planning, push_to_hub, overwrite)
    if not partial_folder(target).exists():  # what a killed run left there goes first, and takes room until then
        check_space(existing_folder(target), plan.num_bytes)
    return plan.describe()


def _checked_plan(
    make_plan: Callable[..., Plan],
    source: str | Path,
    target: Path,
    planning: dict,
    push_to_hub: str | None,
    overwrite: bool,
) -> Plan:
    check_target(target, overwrite)
    check_repo_id(push_to_hub)
    plan = make_plan(source, **planning)
    check_apart(plan.source, target)
    return plan
