"""Weights in PyTorch's own files (``pytorch_model.bin``, ``model.pt``): where their bytes lie, read without running code.

Such a file is an uncompressed zip archive: a pickle that describes the tensors, and the bytes of each. The pickle is
read by torch's restricted unpickler (``weights_only=True``), which builds tensors and plain containers and refuses all
else; the bytes are then copied from their places like those of a safetensors file.
"""

import argparse
import os
import pickle
import zipfile
from pathlib import Path

import torch
from torch import Tensor

from .weights import DTYPES, ByteRange, StoredTensor


SUFFIXES = (".bin", ".pt", ".pth")


def read_pickle(path: Path) -> object:
    """Read what ``torch.save`` wrote; tensors come without their numbers, knowing their place in the file.

    Plain argument namespaces (``argparse.Namespace``), as training programs save them, are read too.

    Raises:
        ValueError: if the file is no whole archive of torch's, or would run code.
    """
    if not zipfile.is_zipfile(path):
        raise ValueError(
            f"{path} is not a zip archive of torch's: truncated, or saved before torch 1.6; re-save it as safetensors"
        )
    _records(path)  # before torch, which dies of swapping the bytes of tensors that have none
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="meta", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = next((line.strip() for line in str(error).splitlines() if "GLOBAL" in line), "")
        raise ValueError(
            f"{path} holds more than tensors and would have to run code to be read, which is refused; re-save its "
            f"tensors as safetensors. {reason}".strip()
        ) from error
    except Exception as error:  # whatever a broken archive makes torch stumble over
        raise ValueError(f"{path} is not a whole checkpoint of torch's: {error}") from error


def locate_tensors(path: Path, state_dict: object) -> dict[str, StoredTensor]:
    """Say where the tensors of a state dict lie in the file that ``read_pickle`` read them from.

    Raises:
        ValueError: if it is no state dict, or a tensor's bytes do not lie in the file one after the other.
    """
    if not isinstance(state_dict, dict) or not all(isinstance(tensor, Tensor) for tensor in state_dict.values()):
        raise ValueError(f"{path} holds no state dict: a dictionary from names to tensors")
    records, spelled = _records(path), {dtype: name for name, dtype in DTYPES.items()}
    tensors = {}
    for name, tensor in state_dict.items():
        storage = tensor.untyped_storage()
        start = getattr(storage, "_checkpoint_offset", None)
        if start is None or records.get(start, -1) < storage.nbytes():
            raise ValueError(f"tensor {name} has no place of its own in {path}; re-save the file as safetensors")
        if not tensor.is_contiguous():
            raise ValueError(f"tensor {name} in {path} is not contiguous; re-save the file as safetensors")
        place = ByteRange(path, start + tensor.storage_offset() * tensor.itemsize, tensor.numel() * tensor.itemsize)
        dtype = spelled.get(tensor.dtype, str(tensor.dtype).removeprefix("torch."))
        tensors[name] = StoredTensor(str(name), dtype, tuple(tensor.shape), (place,))
    return tensors


def _records(path: Path) -> dict[int, int]:
    """Return where each record of the archive begins, and its bytes; what torch says is held against it."""
    records = {}
    try:
        with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
            listed = archive.infolist()
            order = b"".join(archive.read(record) for record in listed if record.filename.endswith("/byteorder"))
            for record in listed:
                # A record's bytes follow its own header: 30 bytes, its name, and padding.
                file.seek(record.header_offset + 26)
                lengths = file.read(4)
                header = 30 + int.from_bytes(lengths[:2], "little") + int.from_bytes(lengths[2:], "little")
                records[record.header_offset + header] = record.file_size
    except (zipfile.BadZipFile, NotImplementedError, OSError, EOFError) as error:
        raise ValueError(f"{path} is not a whole checkpoint of torch's: {error}") from error
    if order not in (b"", b"little"):
        raise ValueError(f"{path} was saved on a big-endian machine; re-save it as safetensors")
    if any(record.compress_type != zipfile.ZIP_STORED for record in listed):
        raise ValueError(f"{path} is compressed, which torch's files never are; re-save it as safetensors")
    if any(start + num_bytes > os.path.getsize(path) for start, num_bytes in records.items()):
        raise ValueError(f"{path} is truncated")
    return records
