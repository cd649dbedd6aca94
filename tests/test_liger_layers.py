"""Liger's kernels in a LongNet model: on the GPU, and through Triton's interpreter where liger-kernel is installed."""

from contextlib import nullcontext
from importlib.util import find_spec
from unittest.mock import patch

import pytest
import torch
from test_decoding_token import check_steps
from tiny_models import random_tokens, tiny_model
from torch import Tensor
from triton_interpreter import hand_over_floats_as_tensors, interpret, needs_interpreter

from modeling_longnet import LongNetCache, apply_liger_kernel_to_longnet, decoding_token, sequence_tiles


needs_liger = pytest.mark.skipif(find_spec("liger_kernel") is None, reason="liger-kernel is not installed")
MODELS = {
    "llama": {},
    "tiles": {},
    "q/k norms, three quarters rotate": {
        "qk_norm": True, "head_dim": 32,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.75},
    },
    "another activation": {"hidden_act": "gelu"},
}  # fmt: skip


def loss_and_gradients(model: torch.nn.Module, tokens: Tensor) -> list[Tensor]:
    loss = model(tokens, labels=tokens, use_cache=False).loss
    return [loss, *torch.autograd.grad(loss, list(model.parameters()))]


def check(name: str, device: str) -> None:
    """Compare loss and gradients with those of the plain layers, in float32."""
    plain = tiny_model("retrofit", **MODELS[name]).float().to(device).train()
    tokens = random_tokens(2, 40).to(device)
    tiles = patch.object(sequence_tiles, "TILE_TOKENS", 16) if name == "tiles" else nullcontext()
    if name == "tiles":
        enable = "activation_checkpointing_enable"  # what newer transformers call it
        getattr(plain, enable if hasattr(plain, enable) else "gradient_checkpointing_enable")()
    with tiles:
        expected = loss_and_gradients(plain, tokens)
        apply_liger_kernel_to_longnet(plain)
        layer = plain.model.layers[0]
        changed = {key for key, module in layer.named_modules() if "forward" in vars(module)}
        norms = {"input_layernorm", "post_attention_layernorm"}
        norms |= {"self_attn.q_norm", "self_attn.k_norm"} if "q/k" in name else set()
        assert changed == norms | (set() if "activation" in name else {"mlp"})
        found = loss_and_gradients(plain, tokens)
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-6)


def check_decoding(device: str) -> None:
    """Fail unless a model with Liger's layers has the fused decoding step, and its logits."""
    model = tiny_model("retrofit", qk_norm=True, head_dim=16).float().to(device)
    apply_liger_kernel_to_longnet(model)
    with torch.no_grad():
        assert decoding_token.decoding_refusal(model.model, LongNetCache(model.config, max_length=24), 1, {}) is None
    check_steps(model, 1, 24, 20, 1e-4)


@pytest.mark.gpu
@needs_liger
def test_the_fused_decoding_step_serves_a_model_with_ligers_layers():
    check_decoding("cuda")


@pytest.mark.gpu
@needs_liger
@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradients_are_those_of_the_plain_layers(name):
    check(name, "cuda")


def test_what_liger_cannot_serve_is_refused():
    pytest.importorskip("liger_kernel", reason="liger-kernel is not installed")
    with pytest.raises(ValueError, match="Linear has no LongNet layers of the Llama backbone"):
        apply_liger_kernel_to_longnet(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="LongNetForCausalLM has no LongNet layers of the Llama backbone"):
        apply_liger_kernel_to_longnet(tiny_model(backbone="magneto"))


def test_a_missing_package_is_named():
    hidden = patch.dict("sys.modules", {"liger_kernel": None, "liger_kernel.ops": None})
    with hidden, pytest.raises(ImportError, match="pip install liger-kernel"):
        apply_liger_kernel_to_longnet(tiny_model())


@needs_interpreter
@needs_liger
def test_layers_in_the_interpreter():
    interpret(__file__)


if __name__ == "__main__":  # run by test_layers_in_the_interpreter, in a process of its own
    torch.set_num_threads(1)
    hand_over_floats_as_tensors()
    import triton.language as tl
    from liger_kernel.ops import rms_norm

    rms_norm.rsqrt = lambda x: tl.rsqrt(x)  # instead of libdevice, which the interpreter has not
    for model_name in MODELS:
        check(model_name, "cpu")
    decoding_token.slots_refusal = lambda *call: None  # the interpreter takes CPU tensors
    check_decoding("cpu")
    test_what_liger_cannot_serve_is_refused()
