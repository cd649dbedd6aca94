"""The arguments that an official LongNetDecoder was built with: where they are found, and which can be served."""

import argparse
import ast
from pathlib import Path
from typing import Any

from .torchscale_decoder import ACTIVATIONS
from .weights import read_json


ARGUMENT_FILES = ("args.json", "arguments.json", "config.json")
REQUIRED = ("decoder_attention_heads", "segment_length", "dilated_ratio")

# The official defaults (torchscale's DecoderConfig) of the arguments that change what a decoder computes.
DEFAULTS = {
    "decoder_embed_dim": 768,
    "decoder_ffn_embed_dim": 3072,
    "decoder_layers": 12,
    "decoder_normalize_before": True,
    "activation_fn": "gelu",
    "layernorm_eps": 1e-5,
    "attention_dropout": 0.0,
    "no_scale_embedding": True,
    "layernorm_embedding": False,
    "moe_freq": 0,
    "rel_pos_buckets": 0,
    "max_rel_pos": 0,
    "deepnorm": False,
    "subln": True,
    "multiway": False,
    "share_decoder_input_output_embed": False,
    "max_target_positions": 1024,
    "no_output_layer": False,
    "vocab_size": -1,
    "xpos_rel_pos": False,
    "xpos_scale_base": 512,
}

# Arguments that ask for what this package's backbone does not have.
REFUSED = (
    ("moe_freq", lambda a: a["moe_freq"] > 0, "its feed-forward layers are mixtures of experts"),
    ("multiway", lambda a: a["multiway"], "it has separate weights for each modality"),
    ("deepnorm", lambda a: a["deepnorm"], "it scales its residuals (DeepNorm)"),
    ("layernorm_embedding", lambda a: a["layernorm_embedding"], "it normalises its embeddings"),
    ("no_output_layer", lambda a: a["no_output_layer"], "it has no output layer"),
    (
        "rel_pos_buckets",
        lambda a: a["rel_pos_buckets"] > 0 and a["max_rel_pos"] > 0,
        "it adds relative position biases, which dilated attention cannot",
    ),
    (
        "decoder_normalize_before",
        lambda a: not (a["decoder_normalize_before"] or a["subln"]),  # Sub-LN implies it in the official code
        "it normalises after its sublayers, not before",
    ),
)


def choose_arguments(file: Path, held: object, named: str | Path | None) -> dict:
    """Find the arguments of a file of weights.

    Args:
        file: the weights.
        held: what else the file holds.
        named: JSON file that the user gave, or None.

    Raises:
        ValueError: if there are none.
    """
    if named is not None:
        found = _find_arguments(read_json(Path(named)))
        if found is None:
            raise ValueError(f"{named} holds no arguments of a LongNetDecoder (no decoder_attention_heads)")
        return found
    if (found := _find_arguments(held)) is not None:
        return found
    beside = [file.with_suffix(".json"), *(file.parent / name for name in ARGUMENT_FILES)]
    for path in beside:
        if path.is_file() and (found := _find_arguments(read_json(path))) is not None:
            return found
    raise ValueError(
        f"{file} holds no arguments of a LongNetDecoder, and neither does a file beside it "
        f"({', '.join(dict.fromkeys(path.name for path in beside))}); give a JSON file (--arguments)"
    )


def _find_arguments(content: object) -> dict | None:
    """Find the arguments in whatever holds them: themselves, or under the names that training programs use."""
    if isinstance(content, argparse.Namespace):
        content = vars(content)
    if not isinstance(content, dict):
        return None
    if "decoder_attention_heads" in content:
        return content
    inner = (_find_arguments(content.get(name)) for name in ("args", "arguments", "cfg", "config", "model"))
    return next((found for found in inner if found is not None), None)


def check_arguments(given: dict) -> dict:
    """Return the arguments that count, defaults filled in.

    Raises:
        ValueError: if one is missing, malformed, or asks for what the backbone does not have.
    """
    if missing := [name for name in REQUIRED if given.get(name) is None]:
        raise ValueError(f"the arguments lack {missing[0]}, which the weights do not show")
    chosen = DEFAULTS | {name: given[name] for name in (*DEFAULTS, *REQUIRED) if given.get(name) is not None}
    for name in ("segment_length", "dilated_ratio"):
        chosen[name] = _integers(name, chosen[name])
    for name, default in DEFAULTS.items():
        kind = type(default) if type(default) is not float else (int, float)
        if not isinstance(chosen[name], kind) or isinstance(chosen[name], bool) != isinstance(default, bool):
            raise ValueError(f"the argument {name} should be like {default!r}, got {chosen[name]!r}")
    for name, asks, what in REFUSED:
        if asks(chosen):
            raise ValueError(f"this LongNetDecoder cannot be converted because {what} ({name} = {chosen[name]!r})")
    if chosen["activation_fn"] not in ACTIVATIONS:
        raise ValueError(f"activation_fn must be one of {', '.join(ACTIVATIONS)}, got {chosen['activation_fn']!r}")
    heads, width = chosen["decoder_attention_heads"], chosen["decoder_embed_dim"]
    if type(heads) is not int or heads < 1 or type(width) is not int or width % heads:
        raise ValueError(f"decoder_embed_dim {width} is not a multiple of decoder_attention_heads {heads!r}")
    return chosen


def _integers(name: str, value: Any) -> list[int]:
    """Read a list of integers, which the official code also takes as text."""
    try:
        value = ast.literal_eval(value) if isinstance(value, str) else value
        numbers = [value] if isinstance(value, int) else list(value)
        if not all(isinstance(number, int) for number in numbers):
            raise TypeError
    except (TypeError, ValueError, SyntaxError) as error:
        raise ValueError(f"the argument {name} should be a list of integers, got {value!r}") from error
    return numbers
