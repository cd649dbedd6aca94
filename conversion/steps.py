"""What converting to LongNet and back have in common: checks, weights, files beside them, hashes, verification."""

import contextlib
import dataclasses
import hashlib
import json
import logging
import math
import os
import platform
import shlex
import shutil
import sys
from collections.abc import Iterable, Iterator
from importlib.metadata import version
from pathlib import Path

from tqdm import tqdm

from .verify import Comparison, Verification, compare_logits
from .weights import copy_bytes, count_numbers_not_finite, read_header, total_bytes


logger = logging.getLogger(__name__)

TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "*.tiktoken",
    "spiece.model",
    "tekken.json",
)
CARRIED_FILES = (
    *TOKENIZER_FILES,
    "chat_template*",
    "additional_chat_templates/*",
    "generation_config.json",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
)
DOWNLOADED_FILES = [
    "config.json", "adapter_config.json", "model*.safetensors", "model.safetensors.index.json", "README.md", *CARRIED_FILES
]  # fmt: skip


def check_no_adapter(folder: Path, source: str | Path) -> None:
    """Refuse a source that is an adapter, or a model with one beside it: transformers would load the two together.

    Raises:
        ValueError: if it is.
    """
    if not (folder / "adapter_config.json").is_file():
        return
    if not (folder / "config.json").is_file():
        raise ValueError(f"{source} is an adapter; convert its base model, and then the adapter for that (--adapter)")
    raise ValueError(
        f"{source} holds an adapter beside the model (adapter_config.json), with which transformers loads it: merge it "
        "first (merge_and_unload, save_pretrained), or move adapter_config.json and its weights elsewhere"
    )


def check_apart(source: Path, target: Path) -> None:
    """Refuse a target that is, contains or lies in the source.

    Raises:
        ValueError: if so.
    """
    source, target = source.resolve(), target.resolve()
    if source == target or source in target.parents or target in source.parents:
        raise ValueError(f"the target {target} and the source {source} must not be or contain one another")


def check_space(folder: Path, num_bytes: int) -> None:
    """Refuse to write to a folder what does not fit on its disk.

    Raises:
        ValueError: if so.
    """
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise ValueError(f"{folder} has {short_number(free)}B free, but the weights need {short_number(num_bytes)}B")


def carry_files(source: Path, folder: Path) -> None:
    """Copy tokenizer, chat template, generation settings and licence, byte for byte, and no code.

    A source that is a single file has none of its own.
    """
    if not source.is_dir():
        return
    for path in sorted(path for pattern in CARRIED_FILES for path in source.glob(pattern)):
        carried = folder / path.relative_to(source)
        if path.is_file() and path.suffix != ".py" and not carried.exists():
            carried.parent.mkdir(exist_ok=True)
            with open(path, "rb") as original, open(carried, "xb") as copy:
                copy_bytes(original, copy, path.stat().st_size)


def verify_logits(comparison: Comparison, progress: bool) -> Verification:
    """Compare the logits of two stored models, with a bar if ``progress``.

    Raises:
        ValueError: if they differ, or are not finite although all weights are.
    """
    source, target = comparison.source, comparison.target
    num_bytes = total_bytes(source.tensors.values()) + total_bytes(target.tensors.values())
    failures: list[str] = []
    for _ in range(2):  # a process's first float32 products on CPU have been seen wrong by 2e-4, its second never
        with progress_bar("verifying logits", num_bytes * len(source.compute_dtypes), progress) as bar:
            verification = compare_logits(comparison, bar.update)
            bar.total = bar.n  # of an embedding only a few rows are read
        if verification.passed:
            break
        failures.append(_describe_failure(verification))
    else:
        raise ValueError(f"{failures[-1]}; nothing was written")
    if failures:
        logger.warning("the first comparison failed (%s), the second passed", failures[0])
    if verification.num_not_finite and not any(map(count_numbers_not_finite, source.tensors.values())):
        raise ValueError(
            f"{verification.num_not_finite:,} logits of the source and of the converted model are NaN or infinite "
            "although no weight is, so they prove nothing; check the numbers in config.json and RoPE; nothing was written"
        )
    return verification


def _describe_failure(verification: Verification) -> str:
    """Say with its numbers why a verification did not pass."""
    if math.isinf(verification.max_error):
        return (
            "the converted model's logits are NaN or infinite in other places than the source's, of which "
            f"{verification.num_not_finite:,} are"
        )
    if verification.relative_error > verification.tolerance:
        return (
            f"the converted model's logits differ from the source's by {verification.max_error:.3g} "
            f"({verification.relative_error:.1e} of the largest; {verification.tolerance:g} is allowed)"
        )
    own = verification.own_dtype
    assert own is not None  # float32 agrees
    if math.isinf(own.max_error):
        return f"in {own.dtype} the converted model's logits are NaN or infinite in other places than the source's"
    return (
        f"in {own.dtype} the converted model's logits are {own.target_rounding:.3g} (root mean square) from those in "
        f"float32, the source's {own.source_rounding:.3g}; at most twice that is allowed"
    )


def describe_outcome(verification: Verification | None) -> str:
    """Say in a line what was verified."""
    if verification is None:
        return "no, as asked"
    outcome = f"logits differ by at most {verification.max_error:.2g} on {verification.num_tokens} tokens"
    if own := verification.own_dtype:
        outcome += f" ({own.max_error:.2g} in {own.dtype})"
    if verification.num_not_finite:
        outcome += f"; {verification.num_not_finite:,} are not finite in either model: look for NaN weights"
    return outcome


def hash_files(paths: Iterable[Path], progress: bool) -> dict[str, dict]:
    """Return size and SHA-256 of each file by its name."""
    paths = list(paths)
    described = {}
    with progress_bar("hashing weights", sum(path.stat().st_size for path in paths), progress) as bar:
        for path in paths:
            with open(path, "rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            described[path.name] = {"num_bytes": path.stat().st_size, "sha256": digest}
            bar.update(path.stat().st_size)
    return described


def count_not_finite(paths: Iterable[Path], progress: bool) -> dict[str, int]:
    """Return how many NaN and infinite numbers each tensor of safetensors files holds, where it holds any."""
    paths = list(paths)
    found = {}
    with progress_bar("looking for NaN", sum(path.stat().st_size for path in paths), progress) as bar:
        for path in paths:
            for tensor in read_header(path).values():
                if number := count_numbers_not_finite(tensor):
                    found[tensor.name] = number
            bar.update(path.stat().st_size)
    return found


def describe_not_finite(found: dict[str, int]) -> str:
    """Say in a line which tensors hold numbers that are not finite, at most three by name."""
    named = [f"{name} ({number:,})" for name, number in list(found.items())[:3]]
    more = f" and {len(found) - 3:,} more tensors" if len(found) > 3 else ""
    return f"NaN or infinite weights, kept as they are, in {', '.join(named)}{more}"


def describe_verification(verification: Verification | None) -> dict | None:
    """Return a verification as it stands in a report."""
    if verification is None:
        return None
    return dataclasses.asdict(verification) | {"relative_error": verification.relative_error}


def versions() -> dict[str, str]:
    """Return the versions that a report names."""
    packages = ("torch", "transformers", "safetensors", "huggingface_hub")
    return {"python": platform.python_version()} | {name: version(name) for name in packages}


def command_line(source: str | Path, target: str | Path, options: dict) -> str:
    """Write a conversion as the command that repeats it.

    Args:
        source, target: as given.
        options: names of the options and their values; None, False and () are left out.
    """
    words = ["longnet-convert", str(source), str(target)]
    for name, value in options.items():
        if value is None or value is False or value == ():
            continue
        words.append("--" + name.replace("_", "-"))
        if isinstance(value, dict):
            words.append(json.dumps(value))
        elif isinstance(value, list | tuple):
            words.append(",".join(map(str, value)))
        elif value is not True:
            words.append(str(value))
    return shlex.join(words)


@contextlib.contextmanager
def progress_bar(title: str, num_bytes: int, progress: bool) -> Iterator[tqdm]:
    """Show a bar with bytes and remaining time on stderr, where that is a terminal."""
    # disable=None hides the bar where stderr is not a terminal.
    with tqdm(
        total=num_bytes, desc=title, unit="B", unit_scale=True, file=sys.stderr, disable=None if progress else True
    ) as bar:
        yield bar


def say(text: str) -> bool:
    """Print to stdout at once; work that goes on does not end where nobody reads any more, as after ``| head``.

    Returns:
        False if stdout takes nothing for another reason, such as a full disk, which a line on stderr then names.
    """
    try:
        print(text, flush=True)
    except OSError as error:
        with contextlib.suppress(OSError):  # what the buffer holds would fail again when the process ends
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):
            print(f"stdout takes no more: {error.strerror}", file=sys.stderr)
            return False
    return True


def short_number(number: float) -> str:
    """Write a number with three digits and a unit prefix: 1.23 G."""
    power = 0
    while number >= 999.5 and power < 6:
        number, power = number / 1000, power + 1
    return f"{number:.3g} {' kMGTPE'[power].strip()}"
