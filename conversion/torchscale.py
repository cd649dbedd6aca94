"""Turn a checkpoint of the official LongNet code (torchscale's LongNetDecoder) into one of this package."""

import math
from collections import Counter
from pathlib import Path

import torch

from modeling_longnet import DilationPattern, LongNetConfig, LongNetForCausalLM

from . import pipeline
from .hub import find_folder
from .pickled_weights import SUFFIXES, locate_tensors, read_pickle
from .plan import LongNetPlan, pattern_fields
from .steps import DOWNLOADED_FILES
from .stored_model import StoredModel, skeleton
from .torchscale_arguments import ARGUMENT_FILES, check_arguments, choose_arguments
from .torchscale_decoder import DecoderArguments, TorchscaleDecoder, xpos_scale
from .verify import MOST_TOKENS, check_verify_tokens
from .weights import (
    DTYPES,
    StoredTensor,
    dtype_name,
    join_rows,
    match_weights,
    read_header,
    read_tensor,
    row_slice,
    shard_layout,
    written_dtype,
)


WEIGHT_SUFFIXES = (".safetensors", *SUFFIXES)
PREFERRED_STEMS = ("model", "pytorch_model", "weights", "checkpoint_best", "checkpoint_last")

# Ours for the official names of modules.
MODULES = {
    "embed_tokens": "model.embed_tokens",
    "layer_norm": "model.norm",
    "output_projection": "lm_head",
    "self_attn.q_proj": "self_attn.q_proj",
    "self_attn.k_proj": "self_attn.k_proj",
    "self_attn.v_proj": "self_attn.v_proj",
    "self_attn.out_proj": "self_attn.o_proj",
    "self_attn.inner_attn_ln": "self_attn.inner_norm",
    "self_attn_layer_norm": "input_layernorm",
    "ffn.fc1": "mlp.up_proj",
    "ffn.ffn_layernorm": "mlp.inner_norm",
    "ffn.fc2": "mlp.down_proj",
    "final_layer_norm": "post_attention_layernorm",
}


def convert_torchscale(
    source: str | Path,
    target: str | Path,
    *,
    arguments: str | Path | None = None,
    max_shard_size: int | str = "5GB",
    dtype: str | None = None,
    revision: str | None = None,
    push_to_hub: str | None = None,
    verify: bool = True,
    verify_tokens: int = MOST_TOKENS,
    overwrite: bool = False,
    progress: bool = True,
) -> dict:
    """Convert a state dict of the official LongNetDecoder, with its arguments, to a checkpoint of this package.

    The target has the backbone ``"magneto"`` and the pattern rules ``"torchscale"``, and the official logits at every
    length. Weights keep their bits; under xPos the rows of queries and keys change places, because the official code
    rotates neighbouring dimensions and transformers' rotary embedding the halves of a head.

    Args:
        source: a file of weights (``.safetensors``; ``.pt``, ``.pth`` or ``.bin``, of which only tensors and plain
            arguments are read), a folder that holds one, or a model id on the Hugging Face Hub.
        target: folder to create.
        arguments: JSON file with the arguments that the model was built with; None: those that the checkpoint holds
            (``args``, ``cfg``), or else ``args.json``, ``arguments.json`` or ``config.json`` beside it.
        max_shard_size, dtype, revision, push_to_hub, verify, verify_tokens, overwrite, progress: as for ``convert_checkpoint``.

    Returns:
        The report that is also written to ``conversion_report.json``.

    Raises:
        ValueError: if the source cannot be converted, its arguments are missing or do not fit its weights, the target
            may not be written, an option does not fit, or the logits differ.
    """
    planning = {
        "arguments": None if arguments is None else str(arguments),
        "max_shard_size": max_shard_size,
        "dtype": dtype,
        "revision": revision,
        "verify_tokens": verify_tokens,
    }
    return pipeline.convert(
        plan_torchscale,
        source,
        target,
        planning,
        kind={"from": "torchscale"},
        push_to_hub=push_to_hub,
        verify=verify,
        overwrite=overwrite,
        progress=progress,
    )


def plan_torchscale(
    source: str | Path,
    *,
    arguments: str | Path | None = None,
    max_shard_size: int | str = "5GB",
    dtype: str | None = None,
    revision: str | None = None,
    verify_tokens: int = MOST_TOKENS,
) -> LongNetPlan:
    """Read and check a source and decide on everything, without writing (a Hub source is downloaded).

    Args and errors are those of ``convert_torchscale``.
    """
    dtype = written_dtype(dtype)
    check_verify_tokens(verify_tokens)
    place, commit = _find_source(source, revision)
    file = _weights_file(place)
    stored, held_arguments = _read_file(file)
    given = choose_arguments(file, held_arguments, arguments)
    chosen = check_arguments(given)
    stored = _without_prefix(stored)
    stored = _without_scales(stored, chosen)
    decoder = _decoder_arguments(chosen, stored)
    match_weights(skeleton(TorchscaleDecoder, decoder), stored, described_by="these arguments")
    tensors = _to_longnet(decoder, stored)
    shard_layout(tensors, max_shard_size, dtype)
    config = _longnet_config(chosen, given, decoder, dtype)
    match_weights(skeleton(LongNetForCausalLM, config), tensors)
    dtypes = {tensor.dtype for tensor in tensors.values()}
    rounded_to = dtype if dtypes != {dtype} else None
    return LongNetPlan(
        source=place,
        name=str(source),
        revision=commit,
        architecture="LongNetDecoder",
        tensors=tensors,
        max_shard_size=max_shard_size,
        dtype=rounded_to,
        reference=StoredModel(TorchscaleDecoder, decoder, stored, rounded_to),
        config=config,
        preset="torchscale",
        trained=f"up to {config.max_position_embeddings:,} tokens",
        compared_tokens=min(verify_tokens, config.max_position_embeddings, _comparable_tokens(decoder)),
        same_attention=True,
        generation_fields=config.to_dict(),
        template="torchscale_card_template.md",
        notes=tuple(_notes(given, decoder)),
    )


def _find_source(source: str | Path, revision: str | None) -> tuple[Path, str | None]:
    path = Path(source)
    if path.suffix in WEIGHT_SUFFIXES and not path.exists():
        raise ValueError(f"{source} is missing")
    if path.is_file():
        if path.suffix not in WEIGHT_SUFFIXES:
            raise ValueError(f"{source} is no file of weights ({', '.join(WEIGHT_SUFFIXES)}) and no folder with one")
        if revision is not None:
            raise ValueError(f"{source} is a file, which has no revision {revision}; leave the revision out")
        return path.absolute(), None
    wanted = [*(f"*{suffix}" for suffix in WEIGHT_SUFFIXES), *ARGUMENT_FILES, *DOWNLOADED_FILES]
    return find_folder(source, revision, wanted)


def _weights_file(place: Path) -> Path:
    """Choose the file of weights in a folder: by its name, or because it alone holds a decoder."""
    if place.is_file():
        return place
    files = sorted(path for path in place.iterdir() if path.suffix in WEIGHT_SUFFIXES)
    for stem in PREFERRED_STEMS:
        if named := [path for path in files if path.stem == stem]:
            return named[0]
    if len(files) > 1:
        files = [path for path in files if any(name.endswith("embed_tokens.weight") for name in _read_file(path)[0])]
    if len(files) != 1:
        found = ", ".join(path.name for path in files) or "none"
        raise ValueError(f"{place} should hold one file of a decoder's weights, found {found}; name the file itself")
    return files[0]


def _read_file(file: Path) -> tuple[dict[str, StoredTensor], object]:
    """Return the tensors of a file, and what else it holds."""
    if file.suffix == ".safetensors":
        return read_header(file), None
    content = read_pickle(file)
    for name in ("model", "state_dict", "model_state_dict", "module"):
        if isinstance(content, dict) and isinstance(content.get(name), dict):
            return locate_tensors(file, content[name]), {key: x for key, x in content.items() if key != name}
    return locate_tensors(file, content), None


def _without_prefix(tensors: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Strip what training programs put before the decoder's names, such as ``decoder.``."""
    embeddings = [name for name in tensors if name == "embed_tokens.weight" or name.endswith(".embed_tokens.weight")]
    if len(embeddings) != 1:
        raise ValueError(
            f"a LongNetDecoder has one embed_tokens.weight, these weights have {len(embeddings)}"
            + (f": {', '.join(embeddings)}" if embeddings else "")
        )
    prefix = embeddings[0].removesuffix("embed_tokens.weight")
    if strangers := [name for name in tensors if not name.startswith(prefix)]:
        raise ValueError(f"the weights hold {strangers[0]}, which is no part of the decoder ({prefix}...)")
    stripped = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    stripped.pop("version", None)  # a marker of fairseq's
    if positions := [name for name in stripped if name.startswith("embed_positions.")]:
        raise ValueError(
            f"this LongNetDecoder cannot be converted because it has embeddings of absolute positions ({positions[0]})"
        )
    return stripped


def _without_scales(tensors: dict[str, StoredTensor], arguments: dict) -> dict[str, StoredTensor]:
    """Leave out the constants that xPos saves with the weights, if they are the ones that it computes.

    Raises:
        ValueError: if they contradict the arguments or are others.
    """
    scales = {name: tensor for name, tensor in tensors.items() if name.endswith("self_attn.xpos.scale")}
    if scales and not arguments["xpos_rel_pos"]:
        raise ValueError(f"the weights hold {next(iter(scales))}, but the arguments say xpos_rel_pos = False")
    expected = xpos_scale(arguments["decoder_embed_dim"] // arguments["decoder_attention_heads"])
    for name, tensor in scales.items():
        if tensor.dtype not in DTYPES or tensor.shape != tuple(expected.shape):
            raise ValueError(f"{name} is {tensor.dtype} {list(tensor.shape)}, xPos has {list(expected.shape)} numbers")
        stored = read_tensor(tensor, torch.empty(tensor.num_bytes, dtype=torch.uint8))
        if not torch.equal(stored, expected.to(stored.dtype)):
            raise ValueError(
                f"{name} is not the scale of xPos: {stored[0]:.4g}, ... where {expected[0]:.4g}, ... belong"
            )
    return {name: tensor for name, tensor in tensors.items() if name not in scales}


def _decoder_arguments(arguments: dict, tensors: dict[str, StoredTensor]) -> DecoderArguments:
    embedding = tensors["embed_tokens.weight"]
    vocabulary = arguments["vocab_size"] if arguments["vocab_size"] > 0 else embedding.shape[0]
    most: Counter[str] = Counter()
    for tensor in tensors.values():
        most[tensor.dtype] += tensor.num_bytes
    stored_as = most.most_common(1)[0][0]
    return DecoderArguments(
        width=arguments["decoder_embed_dim"],
        num_heads=arguments["decoder_attention_heads"],
        inner_width=arguments["decoder_ffn_embed_dim"],
        num_layers=arguments["decoder_layers"],
        vocab_size=vocabulary,
        pattern=DilationPattern.preset("torchscale", arguments["segment_length"], arguments["dilated_ratio"]),
        activation=arguments["activation_fn"],
        norm_eps=float(arguments["layernorm_eps"]),
        sub_norm=arguments["subln"],
        xpos=arguments["xpos_rel_pos"],
        xpos_scale_base=arguments["xpos_scale_base"],
        scale_embedding=not arguments["no_scale_embedding"],
        tied=arguments["share_decoder_input_output_embed"],
        dtype=DTYPES.get(stored_as, torch.float32),
    )


def _to_longnet(decoder: DecoderArguments, tensors: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Name the tensors as LongNet does, and bring the rows that xPos rotates into transformers' order."""
    renamed = {}
    for name, tensor in tensors.items():
        if decoder.tied and name == "output_projection.weight":
            continue
        module, _, kind = name.rpartition(".")
        layer = ""
        if module.startswith("layers."):
            _, number, module = module.split(".", 2)
            layer = f"model.layers.{number}."
        ours = f"{layer}{MODULES[module]}.{kind}"
        if decoder.xpos and module in ("self_attn.q_proj", "self_attn.k_proj"):
            tensor = _halves_of_heads(ours, tensor, decoder.num_heads)
        renamed[ours] = tensor
    return renamed


def _halves_of_heads(name: str, tensor: StoredTensor, num_heads: int) -> StoredTensor:
    """Put the even rows of each head before its odd ones; no byte moves."""
    head_dim = tensor.shape[0] // num_heads
    order = [head * head_dim + i + odd for head in range(num_heads) for odd in (0, 1) for i in range(0, head_dim, 2)]
    return join_rows(name, [row_slice(tensor, row, row + 1) for row in order])


def _longnet_config(chosen: dict, given: dict, decoder: DecoderArguments, dtype: str | None) -> LongNetConfig:
    lengths = (chosen["max_target_positions"], given.get("tokens_per_sample"), *decoder.pattern.segment_lengths)
    context = max(length for length in lengths if isinstance(length, int))
    try:
        config = LongNetConfig(
            backbone="magneto",
            vocab_size=decoder.vocab_size,
            hidden_size=decoder.width,
            intermediate_size=decoder.inner_width,
            num_hidden_layers=decoder.num_layers,
            num_attention_heads=decoder.num_heads,
            hidden_act=decoder.activation,
            layer_norm_eps=decoder.norm_eps,
            sub_layernorm=decoder.sub_norm,
            scale_embedding=decoder.scale_embedding,
            xpos=decoder.xpos,
            xpos_scale_base=decoder.xpos_scale_base,
            layers_without_rope=() if decoder.xpos else tuple(range(decoder.num_layers)),
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
            attention_dropout=chosen["attention_dropout"],
            tie_word_embeddings=decoder.tied,
            max_position_embeddings=context,
            trained_context=context,
            dtype=dtype_name(DTYPES[dtype] if dtype else decoder.dtype),
            **{f"{token}_token_id": given.get(token) for token in ("bos", "eos", "pad")},
            **pattern_fields(decoder.pattern),
        )
    except Exception as error:  # strict-dataclass errors of several lines
        raise ValueError(f"these arguments make no LongNetConfig: {error}") from error
    config.architectures = [LongNetForCausalLM.__name__]
    return config


def _comparable_tokens(decoder: DecoderArguments) -> int:
    """Return up to which length the official way to compute xPos stays inside half precision (3,966 for its 512)."""
    fastest_doubling = decoder.xpos_scale_base / math.log2(1.4 / 0.4)
    return max(1, int(2 * 7 * fastest_doubling)) if decoder.xpos else MOST_TOKENS


def _notes(given: dict, decoder: DecoderArguments) -> list[str]:
    """Say what may surprise, one line each."""
    notes = []
    uneven = [f"{r} of {w:,}" for w, r in decoder.pattern.branches if w % r]
    if uneven:
        notes.append(
            f"rate {', '.join(uneven)} does not divide its segment: beyond one such segment the official code shifts "
            "rows by mistake, and this model computes the definition instead"
        )
    if dropped := [name for name in ("dropout", "activation_dropout", "drop_path_rate") if given.get(name)]:
        notes.append(
            f"{', '.join(f'{name} {given[name]}' for name in dropped)}: not carried over, matters in training only"
        )
    if given.get("eos") is None:
        notes.append("the arguments name no end-of-text token: set eos_token_id before generating")
    notes.append("the dictionary of tokens is not converted: save a tokenizer for these ids beside the model")
    return notes
