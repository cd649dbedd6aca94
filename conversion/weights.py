"""Stored tensors: byte ranges of files, and how to copy or re-shard them byte by byte into safetensors files.

A stored tensor is a byte range of a file, so nothing here decodes a weight: re-sharding writes new headers and copies
ranges, bit for bit, in a few megabytes of memory whatever the size of the checkpoint.
"""

import json
import math
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel


INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
CHUNK_BYTES = 16 * 2**20
SCAN_BYTES = 2**20  # read at once where nothing is written
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class ByteRange:
    """``num_bytes`` bytes of ``file`` from ``start`` on."""

    file: Path
    start: int
    num_bytes: int


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as it lies on disk: byte ranges that, one after the other, hold its rows."""

    name: str
    dtype: str  # as safetensors spells it: "BF16"
    shape: tuple[int, ...]
    ranges: tuple[ByteRange, ...]

    @property
    def num_bytes(self) -> int:
        return sum(part.num_bytes for part in self.ranges)


def row_slice(tensor: StoredTensor, first: int, last: int, name: str | None = None) -> StoredTensor:
    """Take the rows from ``first`` up to ``last`` of a stored tensor; no byte moves.

    Args:
        tensor: of at least one dimension; each of its ranges holds whole rows.
        first, last: ``0 <= first <= last <= rows``.
        name: of the slice; None: the tensor's.
    """
    row_bytes = tensor.num_bytes // max(tensor.shape[0], 1)
    start, end, passed, ranges = first * row_bytes, last * row_bytes, 0, []
    for place in tensor.ranges:
        low, high = max(start - passed, 0), min(end - passed, place.num_bytes)
        if low < high:
            ranges.append(ByteRange(place.file, place.start + low, high - low))
        passed += place.num_bytes
    return StoredTensor(name or tensor.name, tensor.dtype, (last - first, *tensor.shape[1:]), tuple(ranges))


def split_rows(tensor: StoredTensor, parts: dict[str, int]) -> list[StoredTensor]:
    """Cut a stored tensor along its first dimension; no byte moves.

    Args:
        tensor: what to cut.
        parts: number of rows of each part by its name, in order, together all rows.
    """
    cut, first = [], 0
    for name, num_rows in parts.items():
        cut.append(row_slice(tensor, first, first + num_rows, name))
        first += num_rows
    return cut


def join_rows(name: str, tensors: list[StoredTensor]) -> StoredTensor:
    """Put stored tensors of one dtype and width on top of one another; no byte moves.

    Raises:
        ValueError: if their dtypes or widths differ.
    """
    first = tensors[0]
    for other in tensors[1:]:
        if (other.dtype, other.shape[1:]) != (first.dtype, first.shape[1:]):
            raise ValueError(
                f"{first.name} ({first.dtype} {list(first.shape)}) and {other.name} ({other.dtype} "
                f"{list(other.shape)}) do not fit into one {name}"
            )
    num_rows = sum(tensor.shape[0] for tensor in tensors)
    ranges = tuple(place for tensor in tensors for place in tensor.ranges)
    return StoredTensor(name, first.dtype, (num_rows, *first.shape[1:]), ranges)


def read_header(path: Path) -> dict[str, StoredTensor]:
    """List the tensors of one safetensors file, in the order of their bytes.

    Raises:
        ValueError: if the file is missing or not a whole, valid safetensors file.
    """
    if not path.is_file():
        raise ValueError(f"{path} is missing" if not path.exists() else f"{path} is not a file")
    try:
        with open(path, "rb") as file:  # first: safetensors says of a file that may not be read that there is none
            with safe_open(path, framework="pt"):  # the library's own checks: sizes, ranges without overlap or gap
                pass
            header_bytes = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(header_bytes))
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{path} is not a valid safetensors file, truncated perhaps: {error}") from error
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        start, end = entry["data_offsets"]
        shape = tuple(entry["shape"])
        place = ByteRange(path, 8 + header_bytes + start, end - start)
        tensors[name] = StoredTensor(name, entry["dtype"], shape, (place,))
    return tensors


def match_weights(
    model: PreTrainedModel, tensors: dict[str, StoredTensor], described_by: str = "this config.json"
) -> dict[str, StoredTensor]:
    """Find the stored tensor of every parameter of a model; tied parameters may share one.

    Args:
        model: any instance, on the meta device too.
        tensors: what a checkpoint holds.
        described_by: what says of which sizes the model is, for messages.

    Raises:
        ValueError: if a tensor is missing, unknown to the model, of another shape, or not floating point.
    """
    parameters = model.state_dict()
    ties = {**model.all_tied_weights_keys, **{source: name for name, source in model.all_tied_weights_keys.items()}}
    stored = {name: name if name in tensors else ties.get(name, name) for name in parameters}
    architecture = type(model).__name__
    if missing := [name for name, source in stored.items() if source not in tensors]:
        raise ValueError(f"the weights lack {_first_of(missing)} that {architecture} needs with {described_by}")
    if unknown := [name for name in tensors if name not in parameters]:
        raise ValueError(f"the weights hold {_first_of(unknown)} that {architecture} lacks with {described_by}")
    matched = {name: tensors[source] for name, source in stored.items()}
    for name, tensor in matched.items():
        if tensor.shape != tuple(parameters[name].shape):
            raise ValueError(
                f"tensor {tensor.name} has shape {list(tensor.shape)}, but with {described_by} it has "
                f"{list(parameters[name].shape)}"
            )
        if tensor.dtype not in DTYPES:
            raise ValueError(
                f"tensor {tensor.name} is stored as {tensor.dtype}; only {', '.join(DTYPES)} weights are converted"
            )
    return matched


def without_copies(model: PreTrainedModel, tensors: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Leave out tied tensors that a file lists twice for the same bytes, as PyTorch's own files do."""
    ties = model.all_tied_weights_keys.items()
    same = {name for name, origin in ties if name in tensors and origin in tensors
            and tensors[name].ranges == tensors[origin].ranges}  # fmt: skip
    return {name: tensor for name, tensor in tensors.items() if name not in same}


def read_tensor(tensor: StoredTensor, buffer: Tensor) -> Tensor:
    """Read a tensor from its file or files.

    Args:
        tensor: what to read.
        buffer: ``[at least tensor.num_bytes]`` uint8 on CPU, overwritten.

    Returns:
        ``[*tensor.shape]`` in the stored dtype, a view of ``buffer``.
    """
    stored = buffer[: tensor.num_bytes]
    for place, part in zip(tensor.ranges, stored.split([place.num_bytes for place in tensor.ranges])):
        with open(place.file, "rb") as file:
            file.seek(place.start)
            if file.readinto(part.numpy()) != place.num_bytes:
                raise OSError(f"{place.file} ends inside tensor {tensor.name}")
    return stored.view(DTYPES[tensor.dtype]).view(tensor.shape)


def count_numbers_not_finite(tensor: StoredTensor) -> int:
    """Count a stored tensor's NaN and infinite numbers, a little at a time."""
    count, buffer = 0, torch.empty(SCAN_BYTES, dtype=torch.uint8)
    for place in tensor.ranges:
        with open(place.file, "rb") as file:
            file.seek(place.start)
            for start in range(0, place.num_bytes, len(buffer)):
                part = buffer[: place.num_bytes - start]
                if file.readinto(part.numpy()) != len(part):
                    raise OSError(f"{place.file} ends inside tensor {tensor.name}")
                count += int(part.view(DTYPES[tensor.dtype]).isfinite().logical_not().sum())
    return count


def copy_weights(
    tensors: dict[str, StoredTensor],
    folder: Path,
    max_shard_size: int | str,
    advance: Callable[[int], object] = lambda num_bytes: None,
    dtype: str | None = None,
) -> list[Path]:
    """Write tensors to a checkpoint folder, as whole copies of their files where those already fit.

    The files are copied as they are if they hold exactly these tensors and none exceeds ``max_shard_size`` (or only
    because of one single tensor); otherwise all tensors are laid out anew, in their order, bit for bit unless rounded.

    Args:
        tensors: what to write, by name.
        folder: an existing folder.
        max_shard_size: bytes, or a string such as ``"5GB"`` (5 * 10^9).
        advance: called with every number of bytes of weights written, for progress bars.
        dtype: what to round all tensors to, as safetensors spells it; None keeps them.

    Returns:
        The weight files written.

    Raises:
        ValueError: if a number is too large for ``dtype``.
    """
    layout = shard_layout(tensors, max_shard_size, dtype)
    if files_are_kept(tensors, max_shard_size, dtype):
        files = sorted(files_of(tensors))
        layout = {file.name: list(read_header(file)) for file in files}
        for file in files:
            with open(file, "rb") as source, open(folder / file.name, "xb") as target:
                header_bytes = min(place.start for name in layout[file.name] for place in tensors[name].ranges)
                copy_bytes(source, target, header_bytes)
                source.seek(header_bytes)
                copy_bytes(source, target, os.fstat(source.fileno()).st_size - header_bytes, advance)
    else:
        for shard, names in layout.items():
            write_file(folder / shard, {name: tensors[name] for name in names}, dtype, advance)
    if list(layout) != [SINGLE_NAME]:
        index = {
            "metadata": {"total_size": total_bytes(tensors.values(), dtype)},
            "weight_map": {name: shard for shard, names in layout.items() for name in names},
        }
        (folder / INDEX_NAME).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    return [folder / shard for shard in layout]


def files_are_kept(tensors: dict[str, StoredTensor], max_shard_size: int | str, dtype: str | None = None) -> bool:
    """Say whether ``copy_weights`` copies the files of these tensors as they are."""
    if any(dtype not in (None, tensor.dtype) for tensor in tensors.values()):
        return False
    held: dict[str, StoredTensor] = {}
    for file in files_of(tensors):
        if file.suffix != ".safetensors":
            return False
        in_file = read_header(file)
        if len(shard_layout(in_file, max_shard_size)) > 1:
            return False
        held |= in_file
    return held == tensors


def files_of(tensors: dict[str, StoredTensor]) -> set[Path]:
    """Return the files that hold these tensors."""
    return {place.file for tensor in tensors.values() for place in tensor.ranges}


def shard_layout(
    tensors: dict[str, StoredTensor], max_shard_size: int | str, dtype: str | None = None
) -> dict[str, list[str]]:
    """Distribute tensors, in their order, over files of at most ``max_shard_size``, named as transformers does.

    Raises:
        ValueError: if ``max_shard_size`` is not a positive size.
    """
    try:
        if isinstance(max_shard_size, int) and max_shard_size < 1:
            raise ValueError("no room for a tensor")
        split = split_state_dict_into_shards_factory(
            tensors,
            get_storage_size=lambda tensor: total_bytes([tensor], dtype),
            filename_pattern="model{suffix}.safetensors",
            max_shard_size=max_shard_size,
        )
    except (TypeError, ValueError) as error:
        raise ValueError(f'max_shard_size must be bytes or a size such as "5GB", got {max_shard_size!r}') from error
    return split.filename_to_tensors


def write_file(
    path: Path,
    tensors: dict[str, StoredTensor],
    dtype: str | None = None,
    advance: Callable[[int], object] = lambda num_bytes: None,
) -> None:
    """Write tensors to one new safetensors file, under the names that they have in the dict.

    Raises:
        ValueError: if a number is too large for ``dtype``.
    """
    # Wide dtypes first, as safetensors does itself: every tensor then starts at a multiple of its item size.
    names = sorted(tensors, key=lambda name: -DTYPES[dtype or tensors[name].dtype].itemsize)
    header: dict[str, dict[str, object]] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        start, end = end, end + total_bytes([tensors[name]], dtype)
        header[name] = {
            "dtype": dtype or tensors[name].dtype,
            "shape": list(tensors[name].shape),
            "data_offsets": [start, end],
        }
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    with open(path, "xb") as target:
        target.write(len(head).to_bytes(8, "little") + head)
        for tensor in (tensors[name] for name in names):
            for place in tensor.ranges:
                with open(place.file, "rb") as source:
                    source.seek(place.start)
                    if dtype in (None, tensor.dtype):
                        copy_bytes(source, target, place.num_bytes, advance)
                    else:
                        _copy_rounded(source, target, place.num_bytes, tensor, dtype, advance)


def _copy_rounded(
    source: BinaryIO,
    target: BinaryIO,
    num_bytes: int,
    tensor: StoredTensor,
    dtype: str,
    advance: Callable[[int], object],
) -> None:
    """Copy the next bytes of a tensor in another dtype, some megabytes at a time."""
    for start in range(0, num_bytes, CHUNK_BYTES):
        chunk = bytearray(source.read(min(CHUNK_BYTES, num_bytes - start)))
        values = torch.frombuffer(chunk, dtype=DTYPES[tensor.dtype])
        rounded = values.to(DTYPES[dtype])
        if not torch.equal(rounded.isfinite(), values.isfinite()):
            largest = values[values.isfinite()].abs().max()
            raise ValueError(
                f"tensor {tensor.name} holds {largest:.3g}, more than {dtype} can; choose another dtype (--dtype)"
            )
        advance(target.write(rounded.view(torch.uint8).numpy()))


def copy_bytes(
    source: BinaryIO, target: BinaryIO, num_bytes: int, advance: Callable[[int], object] = lambda num_bytes: None
) -> None:
    """Copy the next bytes of one open file to another; file systems that can share blocks then share them.

    Sharing blocks on copy, not hard links: a program that later writes into the copy must never reach the original,
    and safetensors before 0.8 saves by truncating the existing file.
    """
    target.flush()
    left, in_kernel = num_bytes, hasattr(os, "copy_file_range")
    position = source.tell()
    while left > 0:
        size = min(left, CHUNK_BYTES)
        if in_kernel:
            try:
                copied = os.copy_file_range(source.fileno(), target.fileno(), size, offset_src=position)
            except OSError:  # not between these two file systems
                in_kernel = False
                continue
        else:
            source.seek(position)
            copied = target.write(source.read(size))
        if copied == 0:
            raise OSError(f"{source.name} became {left} bytes shorter while it was copied")
        position, left = position + copied, left - copied
        advance(copied)


def total_bytes(tensors: Iterable[StoredTensor], dtype: str | None = None) -> int:
    """Sum the sizes of tensors in bytes, as they are stored or as they would be in ``dtype``."""
    if dtype is None:
        return sum(tensor.num_bytes for tensor in tensors)
    return sum(math.prod(tensor.shape) * DTYPES[dtype].itemsize for tensor in tensors)


def _first_of(names: list[str]) -> str:
    return f"the tensor {names[0]}" if len(names) == 1 else f"{len(names)} tensors ({names[0]}, ...)"


def written_dtype(name: str | None) -> str | None:
    """Return safetensors' spelling of a dtype given as ``"bfloat16"``."""
    spelled = {dtype_name(dtype): spelling for spelling, dtype in DTYPES.items()}
    if name is not None and name not in spelled:
        raise ValueError(f"dtype must be one of {', '.join(spelled)}, got {name!r}")
    return None if name is None else spelled[name]


def dtype_name(dtype: torch.dtype | str) -> str:
    """Write a dtype as config.json does: ``"bfloat16"``."""
    return str(dtype).removeprefix("torch.")


def read_json(path: Path) -> dict:
    """Read a JSON object.

    Raises:
        ValueError: if the file is missing or holds no JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"{path} is missing") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(content).__name__}")
    return content
