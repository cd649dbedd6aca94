"""Which backend computes the attention: what ``attn_implementation`` and ``set_attn_implementation`` promise."""

import re
import sys

import pytest
import torch
from tiny_models import random_tokens, tiny_config, tiny_model
from transformers import AutoModelForCausalLM

from modeling_longnet import LongNetForCausalLM, attention_longnet


@pytest.fixture
def backends_used(monkeypatch) -> list[str]:
    """Record the backend of every call of the operator, "eager" for the block that shows attention weights."""
    used = []
    operator, eager = attention_longnet.dilated_attention, attention_longnet.eager_attention

    def recording_operator(*args, backend, **kwargs):
        used.append(backend)
        return operator(*args, backend=backend, **kwargs)

    def recording_eager(*args, **kwargs):
        used.append("eager")
        return eager(*args, **kwargs)

    monkeypatch.setattr(attention_longnet, "dilated_attention", recording_operator)
    monkeypatch.setattr(attention_longnet, "eager_attention", recording_eager)
    return used


BACKENDS = {None: "auto", "sdpa": "auto", "eager": "eager", "longnet_torch": "torch", "longnet_triton": "triton"}
ON_CPU = [name for name in BACKENDS if name != "longnet_triton"]


@pytest.mark.parametrize("name", ON_CPU)
def test_a_name_given_at_loading_selects_its_backend(name, backends_used, tmp_path):
    tiny_model("retrofit").save_pretrained(tmp_path)
    options = {} if name is None else {"attn_implementation": name}
    model = AutoModelForCausalLM.from_pretrained(tmp_path, **options)
    assert model.config._attn_implementation == (name or "sdpa")
    model(random_tokens(1, 40))
    assert backends_used == [BACKENDS[name]] * 2  # one call in each of the two layers


def test_setting_an_implementation_takes_effect_at_once(backends_used):
    model = tiny_model("retrofit")
    for name in ON_CPU[1:]:
        model.set_attn_implementation(name)
        backends_used.clear()
        model(random_tokens(1, 40))
        assert backends_used == [BACKENDS[name]] * 2, name


def test_only_eager_returns_attentions_and_the_others_say_so():
    model, tokens = tiny_model("retrofit", attn_implementation="eager"), random_tokens(1, 40)
    attentions = model(tokens, output_attentions=True).attentions
    assert [x.shape for x in attentions] == [(1, 4, 40, 40)] * 2
    torch.testing.assert_close(attentions[0].sum(-1), torch.ones(1, 4, 40, dtype=torch.float64))
    model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match="eager"):
        model.config.output_attentions = True
        model(tokens, output_attentions=True)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("preset", "length", "chosen"), [("retrofit", 40, "triton"), ("retrofit", 8, "torch"), ("paper", 8, "triton")]
)
def test_on_a_gpu_the_default_takes_the_fused_kernels_unless_the_pattern_is_ordinary(
    preset, length, chosen, monkeypatch
):
    module, used = sys.modules[attention_longnet.dilated_attention.__module__], []
    attentions = {name: getattr(module, f"{name}_attention") for name in ("eager", "torch", "triton")}
    for name in attentions:

        def recording(*args, name=name, run=attentions[name], **kwargs):
            used.append(name)
            return run(*args, **kwargs)

        monkeypatch.setattr(module, f"{name}_attention", recording)
    model = tiny_model(preset).to("cuda", torch.bfloat16)
    assert model.config._attn_implementation == "sdpa"
    assert model.config.pattern.is_ordinary(length) == (chosen == "torch")
    model(random_tokens(1, length).to("cuda"), use_cache=False)
    assert used == [chosen] * 2  # one call in each of the two layers


@pytest.mark.skipif(torch.cuda.is_available(), reason="shows the refusal on machines without CUDA")
def test_a_backend_that_cannot_run_here_is_refused_with_the_reason():
    model = tiny_model("retrofit", attn_implementation="longnet_triton").float()
    with pytest.raises(ValueError, match="triton"):
        model(random_tokens(1, 40))


@pytest.mark.parametrize(
    "name", ["flash_attention_2", "flash_attention_3", "flex_attention", "paged|eager", "longnet", "torch"]
)
def test_other_names_are_refused_with_those_that_there_are(name, tmp_path):
    refused = pytest.raises(
        ValueError,
        match=f'`attn_implementation="{re.escape(name)}"` is not supported: it is no dilated attention; use one of sdpa',
    )
    model = tiny_model()
    model.save_pretrained(tmp_path)
    with refused:
        AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=name)
    with refused:
        LongNetForCausalLM._from_config(tiny_config(), attn_implementation=name)
    with refused:
        model.set_attn_implementation(name)
    assert model.config._attn_implementation == "sdpa"
