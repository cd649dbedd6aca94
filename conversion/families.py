"""The model families that can be converted: one small entry each, and everything else refused with the reason."""

from collections.abc import Callable
from dataclasses import dataclass

from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MinistralConfig,
    MinistralForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)

from .weights import DTYPES, StoredTensor, dtype_name, join_rows, split_rows


# What LongNet may take over under the same name: what Llama has. Whatever else a file holds, LongNet's own names among
# it, is translated by a family's entry or read by none.
_CARRIED = {*LlamaConfig.__dataclass_fields__, "tokenizer_class"} - {"architectures", "transformers_version"}

# How a model was run when its config was saved: it does not change what it computes, but can keep it from running here.
_OF_A_RUN = {"return_dict", "output_attentions", "output_hidden_states", "attn_implementation", "_attn_implementation"}

# A Llama's own; other families say what differs.
_LLAMA: dict[str, object] = {"attention_output_bias": None, "qk_norm": False, "layers_without_rope": []}
_NO_BIAS = {"attention_bias": False, "mlp_bias": False}


def _unfused(config: PreTrainedConfig) -> dict[str, dict[str, int]]:
    return {}


def _phi3_projections(config: Phi3Config) -> dict[str, dict[str, int]]:
    head_dim = getattr(config, "head_dim", config.hidden_size // config.num_attention_heads)
    query_rows, key_rows = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
    return {
        "self_attn.qkv_proj": {
            "self_attn.q_proj": query_rows,
            "self_attn.k_proj": key_rows,
            "self_attn.v_proj": key_rows,
        },
        "mlp.gate_up_proj": {"mlp.gate_proj": config.intermediate_size, "mlp.up_proj": config.intermediate_size},
    }


def _no_windows(config: PreTrainedConfig) -> list[int | None]:
    return [None] * config.num_hidden_layers


def _one_window(config: PreTrainedConfig) -> list[int | None]:
    return [config.sliding_window] * config.num_hidden_layers


def _windows_by_type(config: PreTrainedConfig) -> list[int | None]:
    if strange := set(config.layer_types) - {"full_attention", "sliding_attention"}:
        raise ValueError(f"the source has layers of {min(strange)}, which dilated attention cannot express")
    if "sliding_attention" in config.layer_types and config.sliding_window is None:
        raise ValueError(
            f"layer {config.layer_types.index('sliding_attention')} of the source attends in a sliding window "
            "(layer_types) whose length is switched off; set use_sliding_window and sliding_window, or full_attention"
        )
    return [config.sliding_window if kind == "sliding_attention" else None for kind in config.layer_types]


def unfuse(projections: dict[str, dict[str, int]], tensors: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Cut what belongs to fused modules into the parts that belong to LongNet's, by rows; no byte moves.

    The first factor of a LoRA update, ``lora_A``, has no rows of its own: every part gets all of it, so that the parts'
    updates are the rows of the whole's.

    Args:
        projections: the rows of each part by the name of the fused module.
        tensors: of a model, or of an adapter.
    """
    renamed = {}
    for name, tensor in tensors.items():
        fused = next((fused for fused in projections if f".{fused}." in name), None)
        if fused is None:
            renamed[name] = tensor
            continue
        rows = {name.replace(fused, part): num_rows for part, num_rows in projections[fused].items()}
        if ".lora_A." in name:
            renamed |= dict.fromkeys(rows, tensor)
        else:
            renamed |= {part.name: part for part in split_rows(tensor, rows)}
    return renamed


@dataclass(frozen=True)
class Family:
    """A dense architecture whose weights a LongNet model takes over.

    Args:
        model_class: transformers' own class, which says what tensors a checkpoint must hold and what its logits are.
        config_class: reads the checkpoint's config.json.
        translate: gives the ``LongNetConfig`` fields that are not the source's fields of the same name.
        projections: gives the modules that are several of LongNet's in one, and the rows of each, by config.
        windows: gives how many tokens back each layer attends by config, None for all: from the fields that the
            architecture reads, whatever others the file holds.
        rotates_partly: whether it reads ``partial_rotary_factor``; others rotate whole heads.
        rope_types: which kinds of RoPE it has, None: all of transformers'.
    """

    model_class: type[PreTrainedModel]
    config_class: type[PreTrainedConfig]
    translate: Callable[[PreTrainedConfig], dict]
    projections: Callable[[PreTrainedConfig], dict[str, dict[str, int]]] = _unfused
    windows: Callable[[PreTrainedConfig], list[int | None]] = _no_windows
    rotates_partly: bool = False
    rope_types: tuple[str, ...] | None = None

    @property
    def architecture(self) -> str:
        return self.model_class.__name__

    def read_config(self, fields: dict) -> PreTrainedConfig:
        """Build the source's config, defaults filled in, old spellings made new.

        Raises:
            ValueError: if a field has a bad type or value.
        """
        try:
            config = self.config_class.from_dict({name: fields[name] for name in fields if name not in _OF_A_RUN})
        except Exception as error:  # transformers raises KeyError, TypeError and strict-dataclass errors of its own
            raise ValueError(
                f"config.json is not a valid {self.config_class.__name__}: {' '.join(str(error).split())}"
            ) from error
        if config.dtype not in (None, *DTYPES.values()):
            raise ValueError(
                f"config.json says dtype {dtype_name(config.dtype)}, in which no model computes; correct it to one of "
                f"{', '.join(map(dtype_name, DTYPES.values()))}, or remove it"
            )
        if not self.rotates_partly:
            rope = dict(config.rope_parameters)
            part = rope.pop("partial_rotary_factor", None)
            if part not in (None, 1) and rope["rope_type"] != "default":  # which reads it, and gives too few angles
                raise ValueError(
                    f"{self.architecture} rotates whole heads and fails with RoPE {rope['rope_type']} and "
                    f"partial_rotary_factor {part}; remove partial_rotary_factor from config.json"
                )
            config.rope_parameters = rope
        return config

    def longnet_fields(self, config: PreTrainedConfig) -> dict:
        """Translate the source's config to ``LongNetConfig`` arguments, without pattern."""
        carried = {name: value for name, value in config.to_dict().items() if name in _CARRIED}
        return carried | _LLAMA | self.translate(config)

    def sliding_window(self, config: PreTrainedConfig) -> int | None:
        """Return how many tokens back the source attends in layers with a sliding window, None if it has none.

        Raises:
            ValueError: if a layer attends in yet another way.
        """
        return next((window for window in self.windows(config) if window is not None), None)

    def local_layers(self, config: PreTrainedConfig) -> tuple[int, ...]:
        """Return which layers of the source attend in a sliding window, if others attend to everything."""
        windows = self.windows(config)
        return tuple(i for i, window in enumerate(windows) if window is not None) if None in windows else ()

    def to_longnet(self, config: PreTrainedConfig, tensors: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
        """Name the source's tensors as LongNet does, fused ones cut into their parts."""
        return unfuse(self.projections(config), tensors)

    def from_longnet(self, config: PreTrainedConfig, tensors: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
        """Undo ``to_longnet``.

        Raises:
            ValueError: if the parts of a fused tensor do not fit together.
        """
        renamed = dict(tensors)
        for fused, parts in self.projections(config).items():
            first = next(iter(parts))
            for name in [name for name in tensors if f".{first}." in name]:
                pieces = [renamed.pop(name.replace(first, part)) for part in parts]
                whole = name.replace(first, fused)
                renamed[whole] = join_rows(whole, pieces)
        return renamed


FAMILIES = (
    Family(LlamaForCausalLM, LlamaConfig, translate=lambda config: {}),
    Family(MistralForCausalLM, MistralConfig, translate=lambda config: _NO_BIAS, windows=_one_window),
    Family(MinistralForCausalLM, MinistralConfig, translate=lambda config: _NO_BIAS, windows=_windows_by_type),
    Family(
        Qwen2ForCausalLM,
        Qwen2Config,
        translate=lambda config: {"attention_bias": True, "attention_output_bias": False, "mlp_bias": False},
        windows=_windows_by_type,
    ),
    Family(
        Qwen3ForCausalLM,
        Qwen3Config,
        translate=lambda config: {"qk_norm": True, "mlp_bias": False},
        windows=_windows_by_type,
    ),
    Family(
        SmolLM3ForCausalLM,
        SmolLM3Config,
        translate=lambda config: {
            "layers_without_rope": [i for i in range(config.num_hidden_layers) if not config.no_rope_layers[i]]
        },
        windows=_windows_by_type,
    ),
    Family(
        Phi3ForCausalLM,
        Phi3Config,
        translate=lambda config: _NO_BIAS,
        projections=_phi3_projections,
        windows=_one_window,
        rotates_partly=True,
        rope_types=("default", "longrope"),
    ),
)


def find_family(fields: dict) -> Family:
    """Choose the family of a checkpoint from its raw config.json.

    Raises:
        ValueError: if the checkpoint is quantized or of a family that is not supported.
    """
    model_type = fields.get("model_type")
    architectures = fields.get("architectures") or []
    if not isinstance(architectures, list):
        raise ValueError(f'config.json must list its architectures, as in ["LlamaForCausalLM"], got {architectures!r}')
    supported = ", ".join(family.architecture for family in FAMILIES)
    if model_type == "longnet":
        raise ValueError("the source is a LongNet checkpoint already; load it with AutoModelForCausalLM")
    if quantization := fields.get("quantization_config"):
        method = quantization.get("quant_method", "unknown method") if isinstance(quantization, dict) else quantization
        raise ValueError(f"the source's weights are quantized ({method}); convert the unquantized checkpoint")
    if (model_type, architectures) == ("mistral", [MistralForCausalLM.__name__]) and "layer_types" in fields:
        model_type, architectures = "ministral", [MinistralForCausalLM.__name__]  # as transformers' Auto classes do
    for family in FAMILIES:
        if architectures == [family.architecture] and model_type == family.config_class.model_type:
            return family
    named = ", ".join(map(str, architectures)) if architectures else "no architecture"
    raise ValueError(
        f"the source is {named} (model_type {model_type!r}), which is not supported{_obstacle(fields)}; "
        f"supported: {supported}"
    )


def _obstacle(fields: dict) -> str:
    """Say why a family is not supported, where its config shows it."""
    obstacles = {
        "its feed-forward layers are mixtures of experts": ("num_local_experts", "num_experts", "n_routed_experts"),
        "it reads more than text": ("vision_config", "audio_config", "text_config"),
        "it softcaps its attention logits": ("attn_logit_softcapping",),
        "it is an encoder and a decoder": ("is_encoder_decoder",),
    }
    for obstacle, names in obstacles.items():
        if any(fields.get(name) for name in names):
            return f" because {obstacle}"
    return ""
