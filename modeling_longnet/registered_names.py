"""What libraries look up by a model's type or class name, and know for their own models only.

Checkpoints carry this file with them: without these names the stock Trainer smooths unshifted labels, and PEFT asks for
``target_modules``, wherever a model came with its code.
"""

from transformers.models.auto import modeling_auto


try:
    from peft.utils import constants as peft_constants
except ImportError:
    peft_constants = None

LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")

# By Auto class. Trainer's label smoothing and pipelines look class names up in these tables.
CLASS_NAMES = {
    "AutoModel": modeling_auto.MODEL_MAPPING_NAMES,
    "AutoModelForCausalLM": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "AutoModelForSequenceClassification": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    "AutoModelForTokenClassification": modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    "AutoModelForQuestionAnswering": modeling_auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
}


def register_class_names(model_type: str, auto_map: dict[str, str]) -> None:
    """Enter the classes of a model type into transformers' tables.

    Args:
        auto_map: as in a config.json: Auto class to ``"file.ClassName"``.
    """
    for auto, names in CLASS_NAMES.items():
        names[model_type] = auto_map[auto].rpartition(".")[2]


def register_adapter_targets(model_type: str) -> None:
    """Tell PEFT, if it is installed, which modules its methods adapt: Llama's, and with LoRA all of the attention's."""
    if peft_constants is None:
        return
    for name, targets in vars(peft_constants).items():
        if name.startswith("TRANSFORMERS_MODELS_TO_") and name.endswith("_MODULES_MAPPING") and "llama" in targets:
            targets[model_type] = list(targets["llama"])
    peft_constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING[model_type] = list(LORA_TARGETS)
