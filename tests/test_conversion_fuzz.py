"""Sources damaged at random: whatever is wrong, a conversion refuses in one line or succeeds, and leaves nothing half."""

import argparse
import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from checkpoints import make_checkpoint
from torchscale_decoder import random_weights

from conversion import convert_checkpoint, convert_torchscale


DAMAGES_PER_SOURCE = 25
HEADER = (
    3000  # bytes of a safetensors file that hold names and places; beyond it lie weights, where any bit is as good
)


def save_pickled(folder: Path) -> None:
    weights = make_checkpoint(folder, tokenizer=False).state_dict()
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")


def save_torchscale(folder: Path) -> None:
    weights, arguments = random_weights()
    folder.mkdir()
    torch.save({"model": weights, "args": argparse.Namespace(**arguments)}, folder / "model.pt")


SOURCES = {
    "one file": (lambda folder: make_checkpoint(folder, tokenizer=False), convert_checkpoint),
    "shards": (lambda folder: make_checkpoint(folder, tokenizer=False, max_shard_size="20KB"), convert_checkpoint),
    "pickled": (save_pickled, convert_checkpoint),
    "torchscale": (save_torchscale, convert_torchscale),
}


def damage(path: Path, dice: random.Random) -> str:
    """Flip a bit, cut the file, insert bytes or zero some; or put a strange value into JSON. Say what was done."""
    content = bytearray(path.read_bytes())
    if path.suffix == ".json" and dice.random() < 0.5:
        fields = json.loads(content)
        name = dice.choice(sorted(fields))
        fields[name] = dice.choice([None, -1, 0, 10**9, "x", [], {}, True, 3.5, float("nan")])
        path.write_text(json.dumps(fields))
        return f"{path.name}: {name} = {fields[name]!r}"
    end = min(len(content), HEADER) if path.suffix == ".safetensors" else len(content)
    place, way = dice.randrange(end), dice.choice(["flip", "cut", "insert", "zero"])
    if way == "flip":
        content[place] ^= 1 << dice.randrange(8)
    elif way == "cut":
        del content[place:]
    elif way == "insert":
        content[place:place] = bytes(dice.randrange(256) for _ in range(dice.choice([1, 200])))
    else:
        content[place : place + 8] = bytes(8)
    path.write_bytes(content)
    return f"{path.name}: {way} at {place}"


@pytest.mark.parametrize("kind", SOURCES)
def test_a_damaged_source_is_refused_or_converted_but_never_half(tmp_path, kind):
    save, convert = SOURCES[kind]
    save(tmp_path / "whole")
    dice, outcomes = random.Random(kind), []
    for _ in range(DAMAGES_PER_SOURCE):
        source, target = tmp_path / "source", tmp_path / "target"
        shutil.copytree(tmp_path / "whole", source)
        damaged = damage(dice.choice(sorted(source.iterdir())), dice)
        try:
            convert(source, target, verify=False, progress=False)
            outcomes.append("converted")
            assert {"config.json", "conversion_report.json", "README.md"} <= {path.name for path in target.iterdir()}
            shutil.rmtree(target)
        except ValueError as refusal:
            outcomes.append("refused")
            assert str(refusal), damaged
        shutil.rmtree(source)
        assert [path.name for path in tmp_path.iterdir()] == ["whole"], damaged
    assert "refused" in outcomes
