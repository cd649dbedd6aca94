"""Liger's fused kernels in the layers around the attention: norms, rotary embedding and gated MLP in one pass each."""

from types import MethodType

from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from .rotary_longnet import rotate_heads


def apply_liger_kernel_to_longnet(
    model: nn.Module, rope: bool = True, rms_norm: bool = True, swiglu: bool = True
) -> None:
    """Let a LongNet model compute its norms, rotary embedding and MLPs with Liger's kernels, in place.

    Parameters, their names and what a checkpoint holds stay as they are. Results differ by rounding: a fused kernel
    rounds once where a chain of operators rounds after each. Gradients can be taken once per forward pass. The loss
    needs nothing here, ``config.loss_implementation`` chooses it.

    Args:
        model: a LongNet model of the Llama backbone, with PEFT's adapters or without, on a device that Triton serves.
        rope, rms_norm, swiglu: which layers to change. A rotary embedding of only a part of each head, and MLPs with
            another activation than SiLU, stay as they are.

    Raises:
        ImportError: if liger-kernel is not installed.
        ValueError: if the model has no such layers (another model, or the MAGNETO backbone).
    """
    try:
        from liger_kernel.ops import LigerRMSNormFunction, LigerSiLUMulFunction
        from liger_kernel.transformers.rope import liger_rotary_pos_emb
    except ImportError as error:
        raise ImportError(f"Liger's kernels are not at hand ({error}); pip install liger-kernel") from error

    def norm_forward(self: LlamaRMSNorm, hidden_states: Tensor) -> Tensor:
        offset, in_place = 0.0, False  # in place, the backward pass would write into the gradient that it is given
        return LigerRMSNormFunction.apply(
            hidden_states, self.weight, self.variance_epsilon, offset, "llama", in_place, None
        )

    def mlp_forward(self: LlamaMLP, x: Tensor) -> Tensor:
        return self.down_proj(LigerSiLUMulFunction.apply(self.gate_proj(x), self.up_proj(x), 1.0, 1.0))

    def rotate(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        whole = cos.shape[-1] == query.shape[-1]
        return (liger_rotary_pos_emb if whole else rotate_heads)(query, key, cos, sin)

    attentions = [module for module in model.modules() if hasattr(module, "rotate_heads")]
    norms = [module for module in model.modules() if isinstance(module, LlamaRMSNorm)]
    if not attentions or not norms:
        raise ValueError(f"{type(model).__name__} has no LongNet layers of the Llama backbone that Liger could serve")
    for module in attentions if rope else ():
        module.rotate_heads = rotate
    for module in norms if rms_norm else ():
        module.forward = MethodType(norm_forward, module)
        module.keeps_only_input = True  # for in_tiles
    for module in model.modules() if swiglu else ():
        if isinstance(module, LlamaMLP) and module.config.hidden_act in ("silu", "swish"):
            module.forward = MethodType(mlp_forward, module)


def register_with_liger() -> None:
    """Tell Liger of LongNet's model type, so that ``TrainingArguments(use_liger_kernel=True)`` finds it.

    Raises:
        ImportError: if liger-kernel is not installed.
    """
    try:
        from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN
    except ImportError as error:
        raise ImportError(f"use_liger_kernel=True needs liger-kernel ({error}); pip install liger-kernel") from error
    MODEL_TYPE_TO_APPLY_LIGER_FN["longnet"] = apply_liger_kernel_to_longnet
