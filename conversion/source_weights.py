"""The weights of a checkpoint folder, in safetensors or in PyTorch's own files, whole or in shards."""

from collections.abc import Callable
from pathlib import Path

from .pickled_weights import SUFFIXES, locate_tensors, read_pickle
from .weights import INDEX_NAME, SINGLE_NAME, StoredTensor, read_header, read_json


PICKLED_NAME = "pytorch_model.bin"
PICKLED_INDEX_NAME = "pytorch_model.bin.index.json"


def read_weights(folder: Path) -> dict[str, StoredTensor]:
    """List the tensors of a checkpoint folder from the headers of its files.

    As in transformers, safetensors win over PyTorch's own files, and a single file over an index. An index and its
    files must tell the same story.

    Raises:
        ValueError: if there are no weights, a file is missing, truncated or outside the folder, holds code, or the
            index and the files disagree.
    """
    for single, index, read in (
        (SINGLE_NAME, INDEX_NAME, read_header),
        (PICKLED_NAME, PICKLED_INDEX_NAME, _read_pickled),
    ):
        if (folder / single).exists():
            return read(folder / single)
        if (folder / index).exists():
            return _read_shards(folder, index, read)
    others = sorted(p.name for p in folder.iterdir() if p.suffix in (*SUFFIXES, ".safetensors", ".gguf", ".h5"))
    found = f"; found {others[0]}" if others else ""
    raise ValueError(f"{folder} has neither {SINGLE_NAME} nor {INDEX_NAME}, nor {PICKLED_NAME}{found}")


def _read_pickled(path: Path) -> dict[str, StoredTensor]:
    if not path.is_file():
        raise ValueError(f"{path} is missing" if not path.exists() else f"{path} is not a file")
    return locate_tensors(path, read_pickle(path))


def _read_shards(folder: Path, index: str, read: Callable[[Path], dict[str, StoredTensor]]) -> dict[str, StoredTensor]:
    shard_of = read_json(folder / index).get("weight_map")
    if not isinstance(shard_of, dict) or not all(isinstance(shard, str) for shard in shard_of.values()):
        raise ValueError(f"{folder / index} has no weight_map from tensor names to file names")
    tensors: dict[str, StoredTensor] = {}
    for shard in sorted(set(shard_of.values())):
        if Path(shard).name != shard or shard in ("", ".", ".."):
            raise ValueError(f"{folder / index} names the shard {shard!r}, which is not a file of that folder")
        for name, tensor in read(folder / shard).items():
            if shard_of.get(name) != shard:
                listed = f"in {shard_of[name]}" if name in shard_of else "nowhere"
                raise ValueError(f"tensor {name} lies in {shard}, but {index} lists it {listed}")
            tensors[name] = tensor
    if missing := sorted(shard_of.keys() - tensors.keys()):
        raise ValueError(f"{index} lists {missing[0]} in {shard_of[missing[0]]}, which does not hold it")
    return tensors
