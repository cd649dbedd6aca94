"""The model card of a converted checkpoint, filled from what the conversion did and measured."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING

from huggingface_hub import ModelCard, ModelCardData

from .steps import describe_not_finite
from .weights import DTYPES


if TYPE_CHECKING:
    from .plan import LongNetPlan, Plan
    from .to_dense import DensePlan


LICENSE_FIELDS = ("license", "license_name", "license_link")


def fill_model_card(plan: LongNetPlan, report: dict) -> str:
    """Fill the template with a conversion's plan and report.

    The licence and language are those that the source's own card states.

    Args:
        plan: what was converted.
        report: what was written and measured.

    Returns:
        The card, Markdown with YAML front matter.
    """
    metadata, inherited = _metadata(plan, ["longnet", "dilated-attention", "long-context", "custom_code"])
    pattern, costs, dense_layers = plan.config.pattern, report["costs"], plan.config.dense_layers
    return _template(plan.template).substitute(
        _common(plan, report),
        metadata=metadata,
        architecture=plan.architecture,
        license=_license_sentence(inherited, "The code files in this repository are MIT-licensed."),
        growth="linearly" if not dense_layers else "linearly but for the dense layers",
        other_layers=_layers_sentence(dense_layers, "ordinary attention over the whole context")
        + _layers_sentence(plan.config.local_layers, _local(plan)),
        preset=plan.preset,
        branches="\n".join(f"| {w:,} | {r} |" for w, r in pattern.branches),
        head_offsets=pattern.head_offsets,
        count_overlaps=pattern.count_overlaps,
        dilate_queries=pattern.dilate_queries,
        window=pattern.window,
        trained=plan.trained,
        context=f"{plan.config.max_position_embeddings:,}",
        positions=plan.positions,
        rope=", ".join(f"{name} {value}" for name, value in plan.config.rope_parameters.items()),
        cost_length=f"{costs['length']:,}",
        attention_ratio=f"{costs['dense_attention_flops'] / costs['pattern_attention_flops']:.1f}",
        kv_ratio=f"{costs['dense_kv_bytes'] / costs['pattern_kv_bytes']:.1f}",
        verification=_verified(report, pattern.segment_lengths[0]),
    )


def fill_dense_card(plan: DensePlan, report: dict) -> str:
    """Fill the template of a checkpoint with ordinary attention again.

    Args:
        plan: what was converted back.
        report: what was written and measured.

    Returns:
        The card, Markdown with YAML front matter.
    """
    metadata, inherited = _metadata(plan, [])
    first_segment = plan.config.pattern.segment_lengths[0]
    return _template("dense_card_template.md").substitute(
        _common(plan, report),
        metadata=metadata,
        architecture=plan.becomes,
        license=_license_sentence(inherited),
        verification=_verified(report, first_segment),
    )


def _template(name: str) -> Template:
    return Template(files(__package__).joinpath(name).read_text(encoding="utf-8"))


def _common(plan: Plan, report: dict) -> dict[str, str]:
    """Return what both templates say."""
    on_hub = plan.revision is not None
    return {
        "name": Path(plan.name).name,
        "source": f"[{plan.name}](https://huggingface.co/{plan.name})" if on_hub else f"`{Path(plan.name).name}`",
        "revision": f", revision `{plan.revision}`" if on_hub else "",
        "weights": "bit for bit"
        if plan.dtype is None
        else f"rounded to {str(DTYPES[plan.dtype]).removeprefix('torch.')}",
        "versions": ", ".join(f"{name} {number}" for name, number in report["versions"].items()),
    }


def _metadata(plan: Plan, tags: list[str]) -> tuple[str, dict]:
    """Return the card's front matter, and what of it is the source's."""
    source_data = _card_data(plan.source / "README.md")
    inherited = {name: source_data[name] for name in (*LICENSE_FIELDS, "language") if source_data.get(name)}
    metadata = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        base_model=plan.name if plan.revision is not None else source_data.get("base_model"),
        tags=tags or None,
        **inherited,
    )
    return metadata.to_yaml(), inherited


def _card_data(path: Path) -> dict:
    try:
        return ModelCard.load(path, ignore_metadata_errors=True).data.to_dict()
    except Exception:  # a card is free text by anyone: absent, without front matter or broken, it tells nothing
        return {}


def _layers_sentence(layers: Sequence[int], what: str) -> str:
    if not layers:
        return ""
    listed = ", ".join(map(str, layers))
    return f"\n{f'Layer {listed} keeps' if len(layers) == 1 else f'Layers {listed} keep'} {what}."


def _local(plan: LongNetPlan) -> str:
    first, window = plan.config.segment_lengths[0], getattr(plan.reference.config, "sliding_window", None)
    if window is None:  # of no layer
        return ""
    source = (
        "as in the source" if window == first else f"{first:,} tokens, where the source has a window of {window:,}"
    )
    return f"to the first segment length, {source}"


def _license_sentence(inherited: dict, code: str = "") -> str:
    if "license" not in inherited:
        return "The source's card states no licence; the terms of the source apply to these weights."
    name = inherited.get("license_name", inherited["license"])
    link = f" ({inherited['license_link']})" if "license_link" in inherited else ""
    return f"As the source: {name}{link}. {code}".rstrip()


def _verified(report: dict, first_segment: int) -> str:
    verified = _verification_sentence(report["verification"], first_segment)
    not_finite = report["weights"]["not_finite"]
    return f"{verified} The checkpoint holds {describe_not_finite(not_finite)}." if not_finite else verified


def _verification_sentence(verification: dict | None, first_segment: int) -> str:
    if verification is None:
        return "The conversion was run without verification."
    own = ""
    if rounded := verification["own_dtype"]:
        own = (
            f"; in {rounded['dtype']} the two differ by at most {rounded['max_error']:.2g}, and from the float32 logits "
            f"by {rounded['source_rounding']:.2g} (source) and {rounded['target_rounding']:.2g} (root mean square)"
        )
    compared = (
        f"the logits of source and converted model were compared in float32 on {verification['num_tokens']} tokens "
        f"({verification['text']}): the largest difference is {verification['max_error']:.2g}, where the largest logit "
        f"is {verification['max_logit']:.3g}{own}. Mean loss: source {verification['source_loss']:.4f}, converted "
        f"{verification['target_loss']:.4f} nats per token"
    )
    if verification["num_not_finite"]:
        compared += f"; {verification['num_not_finite']:,} logits are not finite in either"
    if verification["pattern_used"]:
        return f"Before this checkpoint was written, {compared}. Up to {first_segment:,} tokens the two are one model."
    return (
        f"Before this checkpoint was written, {compared}; for this the pattern was replaced by one dense branch, "
        "because it is ordinary attention on no input. This proves the weights, not the quality: fine-tune "
        "before use."
    )
