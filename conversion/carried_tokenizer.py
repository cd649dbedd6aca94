"""A converted model's tokenizer gives the source's encodings, though transformers chooses classes by model_type."""

import json
from dataclasses import dataclass
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from .steps import TOKENIZER_FILES
from .weights import read_json


CONFIG_NAME = "tokenizer_config.json"
SAMPLES = ("Call me Ishmael.", " two  spaces and 1234567", "\nlines\n\nand\ttabs ", "“naïve” — 漢字, λ = 0.5")


@dataclass(frozen=True)
class TokenizerWord:
    """What there is to say of a carried tokenizer, and whether it encodes as the source's."""

    text: str
    encodes_alike: bool


def keep_encodings(source: Path, folder: Path) -> TokenizerWord | None:
    """Name the tokenizer's class in the target where transformers would choose another than for the source.

    Args:
        source: folder of the source checkpoint, or a single file, which has no tokenizer.
        folder: of the target, the source's tokenizer files carried.

    Returns:
        What was changed, or that the encodings could not be kept; None if there is nothing to say.
    """
    if not source.is_dir() or not any(path for pattern in TOKENIZER_FILES for path in source.glob(pattern)):
        return None
    theirs, ours = _load(source), _load(folder)
    expected = _encode(theirs, theirs)
    if theirs is None or expected is None:
        return None
    chosen, config = type(theirs).__name__, folder / CONFIG_NAME
    if type(ours) is not type(theirs):
        before = config.read_bytes() if config.exists() else None
        fields = read_json(config) if config.exists() else {}
        text = json.dumps(fields | {"tokenizer_class": chosen}, indent=2, ensure_ascii=False) + "\n"
        config.write_text(text, encoding="utf-8")
        if _encode(_load(folder), theirs) == expected:
            named = f"{CONFIG_NAME} names the class that transformers chooses for the source, {chosen}"
            return TokenizerWord(named, encodes_alike=True)
        config.unlink() if before is None else config.write_bytes(before)
    if _encode(ours, theirs) == expected:
        return None
    found = f"of class {type(ours).__name__}" if ours else "that does not load"
    differs = f"the source's tokenizer is a {chosen}, the target has one {found}: encode with the source's"
    return TokenizerWord(differs, encodes_alike=False)


def _load(folder: Path) -> PreTrainedTokenizerBase | None:
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception:  # tokenizer files are anybody's
        return None


def _encode(
    tokenizer: PreTrainedTokenizerBase | None, source: PreTrainedTokenizerBase | None
) -> list[list[int]] | None:
    """Encode the samples, some with the source's special tokens between words; None where that fails."""
    if tokenizer is None or source is None:
        return None
    special = [*source.all_special_tokens, *source.get_added_vocab()]
    samples = [*SAMPLES, *(f"{token}Call me{token} 12  years{token}\nago" for token in dict.fromkeys(special))]
    try:
        return tokenizer(samples)["input_ids"]
    except Exception:
        return None
