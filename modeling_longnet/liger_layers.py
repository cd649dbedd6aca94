"""Liger's fused kernels in the layers around the attention: norms, rotary embedding and gated MLP in one pass each."""

from collections.abc import Callable
from types import MethodType
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from .rotary_longnet import rotate_heads


class Operators(NamedTuple):
    """What is taken from Liger."""

    norm: type[torch.autograd.Function]
    gate: type[torch.autograd.Function]
    rotate: Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def operators() -> Operators:
    """Import Liger, which is slow and needs Triton, no earlier than a model asks for it.

    Raises:
        ImportError: if liger-kernel is not installed.
    """
    try:
        from liger_kernel.ops import LigerRMSNormFunction, LigerSiLUMulFunction
        from liger_kernel.transformers.rope import liger_rotary_pos_emb
    except ImportError as error:
        raise ImportError(f"Liger's kernels are not at hand ({error}); pip install liger-kernel") from error
    return Operators(LigerRMSNormFunction, LigerSiLUMulFunction, liger_rotary_pos_emb)


def norm_forward(self: LlamaRMSNorm, hidden_states: Tensor) -> Tensor:
    """Normalise in one kernel."""
    offset, in_place = 0.0, False  # in place, the backward pass would write into the gradient that it is given
    return operators().norm.apply(hidden_states, self.weight, self.variance_epsilon, offset, "llama", in_place, None)


def mlp_forward(self: LlamaMLP, x: Tensor) -> Tensor:
    """Gate in one kernel."""
    return self.down_proj(operators().gate.apply(self.gate_proj(x), self.up_proj(x), 1.0, 1.0))


def rotate(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate whole heads in one kernel, as ``rotate_heads``."""
    whole = cos.shape[-1] == query.shape[-1]
    return (operators().rotate if whole else rotate_heads)(query, key, cos, sin)


FORWARDS: dict[type[nn.Module], Callable] = {LlamaRMSNorm: norm_forward, LlamaMLP: mlp_forward}


def own_replacement(module: nn.Module) -> str | None:
    """Name the method of a module that was replaced, by anything but Liger's kernels; None if there is none."""
    forward = vars(module).get("forward")
    by_liger = MethodType(FORWARDS[type(module)], module) if type(module) in FORWARDS else None
    if forward is not None and forward != by_liger:
        return "forward"
    return None if vars(module).get("rotate_heads", rotate) is rotate else "rotate_heads"


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
    operators()
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
