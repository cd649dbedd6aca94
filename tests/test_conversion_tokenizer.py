"""A converted model reads text as its source did, whatever class of tokenizer transformers chooses by model_type."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from checkpoints import edit_json, make_checkpoint
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer

from conversion import carried_tokenizer, convert_checkpoint, convert_to_dense


QUIET = {"progress": False, "verify": False}
SPECIAL = ["<unk>", "<s>", "</s>", "<|user|>", "<|end|>"]
TRAINED_ON = ["Call me Ishmael. Some years ago never mind how long precisely 1234567 12 34"] * 3
TEXTS = ("Call me", "<|user|>Call me<|end|> years ago", " two  spaces and 1234567", "<|user|>\nhow long")


def sentencepiece_like() -> Tokenizer:
    """Train a tokenizer that marks words by a leading low line, as Llama 2's, Mistral's and Phi-3's do."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.train_from_iterator(
        TRAINED_ON, trainers.BpeTrainer(vocab_size=250, special_tokens=SPECIAL, show_progress=False)
    )
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def byte_level() -> Tokenizer:
    """Train a tokenizer that splits digits by threes, as Llama 3's does and Qwen's does not."""
    tokenizer = Tokenizer(models.BPE())
    digits = pre_tokenizers.Split(Regex(r"\p{N}{1,3}| ?\p{L}+|\s+|[^\s\p{L}\p{N}]+"), "isolated")
    levels = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, levels])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        TRAINED_ON,
        trainers.BpeTrainer(vocab_size=280, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False),
    )
    return tokenizer


LLAMA = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
# Family, tokenizer, tokenizer_config.json; and the class that the target has to name for the source's encodings.
CASES = {
    "Mistral": ("mistral", sentencepiece_like, LLAMA, "TokenizersBackend"),
    "Phi-3": ("phi3", sentencepiece_like, LLAMA, "TokenizersBackend"),
    "Phi-3, byte level": ("phi3", byte_level, {"tokenizer_class": "GPT2Tokenizer"}, "TokenizersBackend"),
    "Qwen2": ("qwen2", byte_level, {"tokenizer_class": "LlamaTokenizerFast"}, "Qwen2Tokenizer"),
    "Qwen3, no class": ("qwen3", byte_level, {"eos_token": "</s>"}, "Qwen2Tokenizer"),
    "Qwen3, no tokenizer_config.json": ("qwen3", byte_level, None, "Qwen2Tokenizer"),
}


def save_source(folder: Path, family: str, tokenizer: Tokenizer, config: dict | None) -> None:
    make_checkpoint(folder, family=family, tokenizer=False)
    edit_json(folder / "config.json", transformers_version="4.40.0")  # of which transformers mends nothing
    tokenizer.save(str(folder / "tokenizer.json"))
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))


def encodings(folder: Path) -> list[list[int]]:
    return AutoTokenizer.from_pretrained(folder)(list(TEXTS))["input_ids"]


@pytest.mark.parametrize("case", CASES)
def test_a_converted_tokenizer_encodes_as_the_sources_there_and_back(tmp_path, capsys, case):
    family, make, config, chosen = CASES[case]
    save_source(tmp_path / "source", family, make(), config)
    report = convert_checkpoint(tmp_path / "source", tmp_path / "longnet", verify=False)
    expected = encodings(tmp_path / "source")
    assert encodings(tmp_path / "longnet") == expected
    named = f"tokenizer_config.json names the class that transformers chooses for the source, {chosen}"
    assert report["tokenizer"] == named
    assert f"tokenizer  {named}" in capsys.readouterr().out.splitlines()
    written = json.loads((tmp_path / "longnet" / "tokenizer_config.json").read_text())
    assert written == (config or {}) | {"tokenizer_class": chosen}
    convert_to_dense(tmp_path / "longnet", tmp_path / "dense", **QUIET)
    assert encodings(tmp_path / "dense") == expected


def test_a_tokenizer_of_the_same_class_is_left_as_it_is(tmp_path):
    save_source(tmp_path / "source", "llama", sentencepiece_like(), LLAMA)
    report = convert_checkpoint(tmp_path / "source", tmp_path / "longnet", **QUIET)
    assert report["tokenizer"] is None
    before, after = ((tmp_path / name / "tokenizer_config.json").read_bytes() for name in ("source", "longnet"))
    assert before == after
    assert encodings(tmp_path / "source") == encodings(tmp_path / "longnet")


def test_an_encoding_that_no_class_gives_back_is_reported(tmp_path, capsys, monkeypatch):
    save_source(tmp_path / "source", "phi3", sentencepiece_like(), LLAMA)
    load = carried_tokenizer._load
    monkeypatch.setattr(carried_tokenizer, "_load", lambda folder: load(folder) if folder.name == "source" else None)
    report = convert_checkpoint(tmp_path / "source", tmp_path / "longnet", verify=False)
    told = "the source's tokenizer is a TokenizersBackend, the target has one that does not load: encode with the source's"
    assert report["tokenizer"] == told
    assert f"warning    {told}" in capsys.readouterr().out.splitlines()
    before, after = ((tmp_path / name / "tokenizer_config.json").read_bytes() for name in ("source", "longnet"))
    assert before == after


@pytest.mark.parametrize("files", [{}, {"tokenizer.json": "{}"}, {"vocab.txt": "a"}], ids=str)
def test_a_source_without_a_usable_tokenizer_is_converted(tmp_path, files):
    make_checkpoint(tmp_path / "source", tokenizer=False)
    for name, text in files.items():
        (tmp_path / "source" / name).write_text(text)
    assert convert_checkpoint(tmp_path / "source", tmp_path / "longnet", **QUIET)["tokenizer"] is None


@pytest.mark.parametrize(("limit", "noted"), [(64, True), (512, False), (int(1e30), False), (None, False)])
def test_a_tokenizer_that_truncates_before_the_context_is_over_is_named(tmp_path, limit, noted):
    source = tmp_path / "source"
    save_source(
        source, "llama", sentencepiece_like(), LLAMA | {} if limit is None else LLAMA | {"model_max_length": limit}
    )
    report = convert_checkpoint(source, tmp_path / "target", max_position_embeddings=512, **QUIET)
    notes = [note for note in report["notes"] if "model_max_length" in note]
    assert bool(notes) == noted and all("truncates to 64 tokens" in note and "to 512" in note for note in notes)


def test_mistrals_own_tokenizer_file_is_carried(tmp_path):
    make_checkpoint(tmp_path / "source", family="mistral", tokenizer=False)
    (tmp_path / "source" / "tekken.json").write_text("{}")
    convert_checkpoint(tmp_path / "source", tmp_path / "target", **QUIET)
    assert (tmp_path / "target" / "tekken.json").read_text() == "{}"


def test_special_tokens_of_any_script_are_written_in_any_locale(tmp_path):
    source = tmp_path / "source"
    config = LLAMA | {"tokenizer_class": "LlamaTokenizerFast", "pad_token": "<｜end▁of▁sentence｜>"}
    save_source(source, "qwen2", byte_level(), config)
    command = [sys.executable, "-m", "conversion", str(source), str(tmp_path / "target"), "--no-verify"]
    root = Path(__file__).parent.parent
    environment = os.environ | {
        "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C", "PYTHONPATH": str(root), "HF_HUB_OFFLINE": "1"
    }  # fmt: skip
    run = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    written = (tmp_path / "target" / "tokenizer_config.json").read_bytes().decode("utf-8")
    assert json.loads(written)["pad_token"] == "<｜end▁of▁sentence｜>"
