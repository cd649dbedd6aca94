"""Turn a pretrained dense checkpoint into a LongNet checkpoint."""

from pathlib import Path

from . import pipeline
from .plan_family import plan_conversion
from .verify import MOST_TOKENS


def convert_checkpoint(
    source: str | Path,
    target: str | Path,
    *,
    preset: str = "retrofit",
    segment_lengths: list[int] | tuple[int, ...] | None = None,
    dilation_rates: list[int] | tuple[int, ...] | None = None,
    dense_layers: list[int] | tuple[int, ...] | str = (),
    rope_parameters: dict | str | None = None,
    max_position_embeddings: int | None = None,
    local: int | None = None,
    max_shard_size: int | str = "5GB",
    dtype: str | None = None,
    revision: str | None = None,
    push_to_hub: str | None = None,
    verify: bool = True,
    verify_tokens: int = MOST_TOKENS,
    overwrite: bool = False,
    progress: bool = True,
) -> dict:
    """Convert a dense checkpoint to a LongNet checkpoint that loads without this package installed.

    The weights keep their bits, and their names where LongNet has the same modules. With preset ``retrofit`` the
    converted model has the source's logits on every input of at most ``w_0`` tokens, and is verified to. ``target``
    appears complete or not at all, whenever the process is killed. Tokenizer, chat template and generation config are
    carried along byte for byte, but that ``tokenizer_config.json`` names the class of the source's tokenizer where
    transformers would choose another for LongNet (both encode alike), and that ``generation_config.json`` asks for no
    cache but LongNet's.

    Without ``segment_lengths`` the pattern is geometric: ``w_0`` is the trained context of the source (4,096 where it
    was trained for more, and its sliding window where it has a shorter one), doubled, with rates 1, 2, 4, ..., until a
    segment covers ``max_position_embeddings``.

    Args:
        source: folder, or model id on the Hugging Face Hub. Its own code is never run.
        target: folder to create.
        preset: ``"retrofit"``, ``"paper"`` or ``"torchscale"``.
        segment_lengths: tokens per branch.
        dilation_rates: one per branch; ``w_i / w_0`` if None.
        dense_layers: indices of layers that keep ordinary attention, and an unbounded KV cache; ``"late"`` for the one
            at three quarters of the depth, which brings retrieval back.
        rope_parameters: new RoPE settings in transformers' form, such as ``{"rope_type": "yarn", "factor": 4.0}``;
            what they leave out (theta, original length) comes from the source. Or a word: ``"yarn"``, ``"linear"`` or
            ``"llama3"`` with the factor ``max_position_embeddings`` / trained context; ``"ntk"``, plain RoPE with theta
            times that factor to the power of d / (d - 2) for d dimensions that rotate; ``"none"`` or None keeps the source's.
        max_position_embeddings: context of the target; if None the source's, or four times ``w_0`` where that is more.
        local: ``w_0``, in place of ``segment_lengths``.
        max_shard_size: largest weight file, bytes or e.g. ``"5GB"``; one larger tensor gets a file of its own.
        dtype: round the weights to ``"float32"``, ``"float16"`` or ``"bfloat16"``; None keeps their bits.
        revision: branch, tag or commit of a source on the Hub.
        push_to_hub: repository to upload the finished target to; created, private, if it does not exist.
        verify: compare logits of source and target, in float32 and the checkpoint's dtype, before ``target`` appears.
        verify_tokens: how many tokens of text to compare, at most ``w_0`` and the trained context.
        overwrite: replace an earlier conversion at ``target``, in one step at the end; a folder with anything else in it
            is left alone.
        progress: print the plan to stdout and progress bars to stderr.

    Returns:
        The report that is also written to ``conversion_report.json``.

    Raises:
        ValueError: if the source cannot be converted, the target may not be written, an option does not fit, or the
            logits differ.
    """
    planning = {
        "preset": preset,
        "segment_lengths": segment_lengths,
        "dilation_rates": dilation_rates,
        "dense_layers": dense_layers,
        "rope_parameters": rope_parameters,
        "max_position_embeddings": max_position_embeddings,
        "local": local,
        "max_shard_size": max_shard_size,
        "dtype": dtype,
        "revision": revision,
        "verify_tokens": verify_tokens,
    }
    return pipeline.convert(
        plan_conversion,
        source,
        target,
        planning,
        push_to_hub=push_to_hub,
        verify=verify,
        overwrite=overwrite,
        progress=progress,
    )
