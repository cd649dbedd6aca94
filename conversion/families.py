"""The model families that can be converted: one small entry each, and everything else refused by name."""

from dataclasses import dataclass

from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class Family:
    """A dense architecture whose weights a LongNet model takes over under their own names.

    Args:
        model_class: transformers' own class, which says what tensors a checkpoint must hold and what its logits are.
        config_class: reads the checkpoint's config.json.
    """

    model_class: type[PreTrainedModel]
    config_class: type[PreTrainedConfig]

    @property
    def architecture(self) -> str:
        return self.model_class.__name__

    def read_config(self, fields: dict) -> PreTrainedConfig:
        """Build the source's config, defaults filled in, old spellings made new.

        Raises:
            ValueError: if a field has a bad type or value.
        """
        try:
            return self.config_class.from_dict(fields)
        except Exception as error:  # transformers raises KeyError, TypeError and strict-dataclass errors of its own
            raise ValueError(f"config.json is not a valid {self.config_class.__name__}: {error}") from error

    def longnet_fields(self, config: PreTrainedConfig) -> dict:
        """Translate the source's config to ``LongNetConfig`` arguments, without pattern."""
        return {name: value for name, value in config.to_dict().items() if name not in _NOT_CARRIED}


# What identifies the source, its code or the library that wrote it; and layer_types, which would all say the same.
_NOT_CARRIED = {"model_type", "architectures", "auto_map", "transformers_version", "_name_or_path", "layer_types"}

FAMILIES = (Family(LlamaForCausalLM, LlamaConfig),)


def find_family(fields: dict) -> Family:
    """Choose the family of a checkpoint from its raw config.json.

    Raises:
        ValueError: if the checkpoint is quantized or of a family that is not supported.
    """
    model_type = fields.get("model_type")
    architectures = fields.get("architectures") or []
    supported = ", ".join(family.architecture for family in FAMILIES)
    if model_type == "longnet":
        raise ValueError("the source is a LongNet checkpoint already; load it with AutoModelForCausalLM")
    if quantization := fields.get("quantization_config"):
        method = quantization.get("quant_method", "unknown method") if isinstance(quantization, dict) else quantization
        raise ValueError(f"the source's weights are quantized ({method}); convert the unquantized checkpoint")
    for family in FAMILIES:
        if architectures == [family.architecture] and model_type == family.config_class.model_type:
            return family
    named = ", ".join(map(str, architectures)) if architectures else "no architecture"
    raise ValueError(
        f"the source is {named} (model_type {model_type!r}), which is not supported; supported: {supported}"
    )
