"""Configuration of LongNet models: Llama's fields, the pattern of the dilated attention, and the backbone's parts."""

import dataclasses
import difflib
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers.models.llama.configuration_llama import LlamaConfig

from .dilation_pattern import DilationPattern


PATTERN_FIELDS = (
    "segment_lengths",
    "dilation_rates",
    "head_offsets",
    "count_overlaps",
    "dilate_queries",
    "window",
)

# Fields of other families, close to ours, that generic code sets whatever the family; they are kept and not read.
OF_OTHER_FAMILIES = ("layer_norm_epsilon", "qk_layernorm")
# What the patterns of a model's layers follow from: ``layer_pattern`` reads these fields and no others.
LAYER_FIELDS = (
    *PATTERN_FIELDS,
    "num_hidden_layers",
    "dense_layers",
    "local_layers",
    "first_kv_head",
    "num_key_value_heads",
)

# Longer than any document: one such undilated branch is ordinary attention.
UNBOUNDED = 2**62
# Names of the official code, and what they are here.
TORCHSCALE = {
    "segment_length": "segment_lengths",
    "dilated_ratio": "dilation_rates",
    "subln": "sub_layernorm",
    "xpos_rel_pos": "xpos",
    "no_scale_embedding": "scale_embedding, its opposite,",
}

LOSS_IMPLEMENTATIONS = ("auto", "chunked", "torch", "liger", "logits")

# Which decoder layers there are, and what a field is with them where it is left out.
BACKBONES = {
    "llama": {
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "sub_layernorm": False,
        "xpos": False,
    },
    "magneto": {
        "hidden_act": "gelu",
        "attention_bias": True,
        "mlp_bias": True,
        "sub_layernorm": True,
        "xpos": True,
    },
}


@strict
class LongNetConfig(LlamaConfig):
    """Configure a model whose attention is LongNet's dilated attention, in the shape of Llama or of the paper.

    All fields of ``transformers.LlamaConfig`` keep their names and meaning; the six fields of ``DilationPattern`` stand
    beside them under their own names. The pattern's defaults are the paper's (Section 4.2 of arXiv 2307.02486); with
    ``backbone="magneto"`` the other parts are the paper's too.

    Args:
        segment_lengths: segment length of each branch, in tokens.
        dilation_rates: dilation rate of each branch.
        head_offsets: ``"interleaved"`` (the paper) or ``"blocked"`` (the official torchscale code).
        count_overlaps: whether a key reached by m branches counts m times.
        dilate_queries: whether a branch serves only the queries that it keeps.
        window: ``"segment"`` or ``"sliding"``.
        backbone: ``"llama"`` (RMSNorm, gated feed-forward, no biases, RoPE) or ``"magneto"``, the paper's (arXiv
            2210.06423: LayerNorm with Sub-LN, two-layer feed-forward with GELU, biases, xPos). What is left out of
            ``hidden_act``, ``attention_bias``, ``mlp_bias``, ``sub_layernorm`` and ``xpos`` follows it.
        sub_layernorm: a second LayerNorm inside each sublayer (``"magneto"`` only).
        layer_norm_eps: epsilon of the LayerNorms (``"magneto"`` only).
        scale_embedding: multiply token embeddings by the square root of their width (``"magneto"`` only).
        xpos: let scores decay with distance (arXiv 2212.10554), on top of the rotary embedding.
        xpos_scale_base: tokens over which the slowest to the fastest pair decay by 0.98 to 0.29 (for heads of 64).
        dense_layers: indices of layers that keep ordinary attention instead of the pattern (and an unbounded cache).
        local_layers: indices of layers that attend in the first branch only, as layers with a sliding window do.
        layers_without_rope: indices of layers that use no rotary embedding, and no xPos (SmolLM3).
        qk_norm: RMS-normalise each query and key head before the rotary embedding (Qwen3).
        attention_output_bias: whether ``o_proj`` has a bias; None: as ``attention_bias`` (Qwen2 has none there).
        loss_implementation: how a causal LM computes its loss in training: without logits, ``"auto"`` (what is best
            here), ``"chunked"``, ``"torch"`` or ``"liger"``; or ``"logits"``, from all of them, which are then returned.
        trained_context: tokens that a converted model's source was trained for; xPos rounds its angles there as the
            official code does, other models do not read it.
        source_config: a converted model's source's config.json, for the way back; the model does not read it.
        **kwargs: any field of ``transformers.LlamaConfig``.

    Raises:
        ValueError: if the pattern is malformed or given as a preset, a field of LongNet's own is misspelt, a layer
            index does not exist, the head counts do not fit, or a field needs another backbone.
    """

    model_type = "longnet"
    # The first KV head that this process holds, where tensor parallelism gives it a share of them: no field, never saved.
    first_kv_head = None

    segment_lengths: list[int] | tuple[int, ...] = (2048, 4096, 8192, 16384, 32768)
    dilation_rates: list[int] | tuple[int, ...] = (1, 2, 4, 6, 12)
    head_offsets: str = "interleaved"
    count_overlaps: bool = True
    dilate_queries: bool = True
    window: str = "segment"
    backbone: str = "llama"
    hidden_act: str | None = None
    attention_bias: bool | None = None
    mlp_bias: bool | None = None
    sub_layernorm: bool | None = None
    layer_norm_eps: float = 1e-5
    scale_embedding: bool = False
    xpos: bool | None = None
    xpos_scale_base: int = 512
    dense_layers: list[int] | tuple[int, ...] = ()
    local_layers: list[int] | tuple[int, ...] = ()
    layers_without_rope: list[int] | tuple[int, ...] = ()
    qk_norm: bool = False
    attention_output_bias: bool | None = None
    loss_implementation: str = "auto"
    trained_context: int | None = None
    source_config: dict | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        # Read from another family's config.json, this is no configuration of that family any more.
        if kwargs.pop("model_type", self.model_type) != self.model_type:
            self.architectures: list[str] | None = None
        if "preset" in kwargs:
            rules = DilationPattern.preset(kwargs["preset"], (1,), (1,))
            fix = ", ".join(f"{name}={getattr(rules, name)!r}" for name in PATTERN_FIELDS[2:])
            raise ValueError(f"LongNetConfig has no field 'preset'; give the rules of {kwargs['preset']!r} as {fix}")
        own = LongNetConfig.__annotations__.keys() - LlamaConfig.__annotations__.keys()
        for name in kwargs:
            if name in TORCHSCALE:
                raise ValueError(f"LongNetConfig has no field {name!r}; it is {TORCHSCALE[name]} here")
            close = difflib.get_close_matches(name, own, n=1, cutoff=0.8)
            if close and name not in OF_OTHER_FAMILIES:
                raise ValueError(f"LongNetConfig has no field {name!r}; did you mean {close[0]!r}?")
        if self.backbone not in BACKBONES:
            raise ValueError(f"backbone must be one of {', '.join(BACKBONES)}, got {self.backbone!r}")
        if isinstance(self.num_attention_heads, int) and self.num_attention_heads < 1:
            raise ValueError(f"num_attention_heads must be at least 1, got {self.num_attention_heads}")
        for name, default in BACKBONES[self.backbone].items():
            if getattr(self, name) is None:
                setattr(self, name, default)
        self.segment_lengths = tuple(self.segment_lengths)
        self.dilation_rates = tuple(self.dilation_rates)
        self.dense_layers = tuple(self.dense_layers)
        self.local_layers = tuple(self.local_layers)
        self.layers_without_rope = tuple(self.layers_without_rope)
        super().__post_init__(**kwargs)
        if self.sub_layernorm:  # it normalises across what tensor parallelism would split
            self.base_model_tp_plan = None
        self._check()

    @property
    def pattern(self) -> DilationPattern:
        """The ``DilationPattern`` that the six fields describe, validated anew at each reading."""
        fields = {name: getattr(self, name) for name in PATTERN_FIELDS}
        fields["segment_lengths"] = tuple(self.segment_lengths)
        fields["dilation_rates"] = tuple(self.dilation_rates)
        return DilationPattern(**fields)

    def layer_pattern(self, layer_index: int) -> DilationPattern:
        """Return the pattern of one layer: all of it, ordinary attention (``dense_layers``) or its first branch."""
        pattern = self.pattern
        if layer_index in self.dense_layers:
            pattern = DilationPattern((UNBOUNDED,), (1,))
        elif layer_index in self.local_layers:
            first = pattern.branches[0]
            pattern = dataclasses.replace(pattern, segment_lengths=first[:1], dilation_rates=first[1:])
        return (
            pattern if self.first_kv_head is None else pattern.of_heads(self.first_kv_head, self.num_key_value_heads)
        )

    def to_dict(self) -> dict:
        """Return all fields that a saved configuration has."""
        fields = super().to_dict()
        fields.pop("first_kv_head", None)
        return fields

    def validate_architecture(self) -> None:
        """Check the fields against one another; runs at construction, and again on ``validate()`` and on saving."""
        super().validate_architecture()
        self._check()

    def _check(self) -> None:
        _ = self.pattern  # raises if the fields make no pattern
        if both := set(self.dense_layers) & set(self.local_layers):
            raise ValueError(f"layer {min(both)} is named by dense_layers and by local_layers; choose one")
        for name in ("dense_layers", "local_layers", "layers_without_rope"):
            for index in getattr(self, name):
                if not 0 <= index < self.num_hidden_layers:
                    raise ValueError(
                        f"{name} names layer {index}, but the {self.num_hidden_layers} layers are numbered from 0 to "
                        f"{self.num_hidden_layers - 1}"
                    )
        for name in ("sub_layernorm", "scale_embedding"):
            if getattr(self, name) and self.backbone != "magneto":
                raise ValueError(f"{name} needs backbone 'magneto', got {self.backbone!r}")
        if self.loss_implementation not in LOSS_IMPLEMENTATIONS:
            raise ValueError(
                f"loss_implementation must be one of {', '.join(LOSS_IMPLEMENTATIONS)}, got "
                f"{self.loss_implementation!r}"
            )
        rotating = self.rope_parameters.get("partial_rotary_factor", 1.0)
        if self.xpos and rotating != 1:
            raise ValueError(f"xpos needs heads that rotate as a whole, got partial_rotary_factor {rotating}")
        if self.xpos_scale_base < 1:
            raise ValueError(f"xpos_scale_base must be at least 1 token, got {self.xpos_scale_base}")
        if self.num_key_value_heads < 1 or self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of num_key_value_heads "
                f"{self.num_key_value_heads}"
            )


__all__ = ["LongNetConfig"]
