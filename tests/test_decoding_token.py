"""The fused decoding step equals the ordinary one: on the GPU, and without one through Triton's interpreter."""

import logging
import random
import sys
from types import MethodType

import pytest
import torch
from test_dilated_attention_triton import random_pattern
from tiny_models import left_padding, random_tokens, tiny_model
from torch import nn
from triton_interpreter import interpret, needs_interpreter

from modeling_longnet import DilationPattern, LongNetCache, decoding_hopper, decoding_token, decoding_triton
from modeling_longnet.cache_slots import plan_slots
from modeling_longnet.decoding_triton import Rotary, plan_token
from modeling_longnet.liger_layers import mlp_forward, norm_forward, rotate
from modeling_longnet.reach_ranges import oldest_reached


PRESETS = ("paper", "torchscale", "retrofit")
# Everything that a Llama-shaped configuration may have, spread over a few models.
SHAPES = [
    {},
    {"num_key_value_heads": 4, "qk_norm": True},
    {"attention_bias": True, "mlp_bias": True, "layers_without_rope": (1,)},
    {"attention_bias": True, "attention_output_bias": False, "dense_layers": (0,), "head_dim": 24},
    {
        "local_layers": (1,),
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
    },
]  # fmt: skip


def decoded(model, tokens, mask, prompt: int, fused: bool, room: int = 0) -> torch.Tensor:
    """Read a prompt, then decode the rest token by token, with ``room`` for more; return the logits of all steps."""
    cache = LongNetCache(model.config, max_length=tokens.shape[1] + room)
    logits = [model(tokens[:, :prompt], attention_mask=mask[:, :prompt], past_key_values=cache).logits]
    served = sys.modules["modeling_longnet.modeling_longnet"]
    if not fused:
        served.decoding_refusal = served.head_refusal = lambda *call: "asked for"
    for t in range(prompt, tokens.shape[1]):
        step = tokens[:, t : t + 1]
        logits.append(model(step, attention_mask=mask[:, : t + 1], past_key_values=cache).logits)
    served.decoding_refusal, served.head_refusal = decoding_token.decoding_refusal, decoding_token.head_refusal
    assert int(cache.get_seq_length()) == tokens.shape[1]
    assert all(torch.equal(layer.seen, mask.sum(-1).to(layer.seen)) for layer in cache.layers)
    return torch.cat(logits, dim=1)


def check_steps(model, batch: int, length: int, prompt: int, tolerance: float, room: int = 0) -> None:
    """Fail unless the fused steps give the ordinary steps' logits, padding within the decoded tokens included."""
    device = model.device
    tokens = random_tokens(batch, length).to(device)
    mask = left_padding(*range(0, 5 * batch, 5), length=length).to(device)
    mask[-1, length - 3] = 0
    with torch.no_grad():
        ours = decoded(model, tokens, mask, prompt, True, room)
        theirs = decoded(model, tokens, mask, prompt, False, room)
    real = mask.bool()
    torch.testing.assert_close(
        ours[real], theirs[real], rtol=tolerance, atol=tolerance * theirs[real].abs().max().item()
    )


def check_plan(pattern: DilationPattern, length: int, start: int, device: str, num_kv_heads: int) -> None:
    """Fail unless the plan of a step says what ``CacheSlots.locate`` and ``oldest_reached`` say."""
    slots = plan_slots(pattern, length)
    inv_freq = 1.0 / 1e4 ** (torch.arange(0, 16, 2) / 16)
    rotary = Rotary(inv_freq.float().to(device), 1.25, 40)
    seen = start + torch.arange(0, 70 if slots.is_endless else length, device=device)
    real = torch.ones(len(seen), 1, dtype=torch.bool, device=device)
    real[::7] = False
    plan = plan_token(slots, seen, num_kv_heads, 20, torch.float32, rotary, real)
    positions = torch.where(real, seen[:, None], -1)
    places = slots.locate(positions[:, None], num_kv_heads)
    numbers, num_rings = plan.numbers, len(slots.rings)
    assert torch.equal(numbers[..., 0], positions.expand(-1, num_kv_heads))
    assert torch.equal(numbers[..., 1], places.slots[..., 0])
    assert torch.equal(numbers[..., 2], places.branches[..., 0])
    assert torch.equal(numbers[..., 3 + num_rings :], oldest_reached(pattern, positions, num_kv_heads)[:, :, 0])
    assert not plan.arrivals.any()
    if start == 0:  # every slot that a token has taken lies below its ring's end
        ends = numbers[..., 3 : 3 + num_rings]
        taken = slots.locate(seen[None, None], num_kv_heads).slots[0]  # [G, tokens]
        for row in real.flatten().nonzero().flatten().tolist():
            for head in range(num_kv_heads):
                held = taken[head, : row + 1]
                live = [held[(held >= ring.base) & (held < ring.base + ring.size)] for ring in slots.rings]
                wanted = [int(x.max()) + 1 if len(x) else ring.base for x, ring in zip(live, slots.rings)]
                planned = ends[row, head].tolist()
                if pattern.is_nested or slots.is_linear:
                    assert planned == wanted
                else:  # a ring's slot may wait for a token that stands in a later ring
                    assert all(p >= w for p, w in zip(planned, wanted))
    angles = (positions.clamp(min=0).double() * rotary.inv_freq.double()).remainder(2 * torch.pi)
    angles = torch.where(positions < 40, positions.clamp(min=0).float() * rotary.inv_freq, angles.float())
    for ours, theirs in ((plan.cos, angles.cos()), (plan.sin, angles.sin())):
        torch.testing.assert_close(ours[:, :8], theirs * 1.25, rtol=0, atol=2e-6)
        torch.testing.assert_close(ours[:, 8:16], theirs * 1.25, rtol=0, atol=2e-6)
    assert plan.cos[:, 16:].eq(1).all() and plan.sin[:, 16:].eq(0).all()


def check_plans(device: str, seeds: int) -> None:
    for preset in PRESETS:
        for far in (0, 2**33):
            check_plan(DilationPattern.geometric(8, 64, preset=preset), 64, far, device, 3)
    for seed in range(seeds):
        rng = random.Random(seed)
        pattern = random_pattern(rng, 12, nested=rng.random() < 0.6)
        check_plan(pattern, rng.choice([5, 20, 200]), 0, device, rng.randint(1, 4))


@pytest.mark.gpu
def test_the_plan_on_the_gpu_is_that_of_the_slots():
    check_plans("cuda", 12)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("shape", range(len(SHAPES)))
@pytest.mark.parametrize("preset", PRESETS)
def test_the_fused_step_on_the_gpu_is_the_ordinary_one(preset, shape, batch, dtype):
    model = tiny_model(preset, head_dim=SHAPES[shape].get("head_dim", 16), **{
        "initializer_range": 0.1, **{k: v for k, v in SHAPES[shape].items() if k != "head_dim"}
    }).to("cuda", dtype)  # fmt: skip
    tolerance = 1e-4 if dtype == torch.float32 else 0.06
    check_steps(model, batch, 90, 60, tolerance)
    check_steps(model, batch, 90, 80, tolerance, room=3000)


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("shape", range(3))
@pytest.mark.parametrize("preset", PRESETS)
def test_attending_at_once_errs_no_more_than_stretch_by_stretch(preset, shape, head_dim, monkeypatch):
    """The Hopper kernel, over several programs per head, with rings that fill while it decodes."""
    pattern = DilationPattern.geometric(256, 1024, preset=preset)
    model = tiny_model(
        preset, head_dim=head_dim, initializer_range=0.1, segment_lengths=pattern.segment_lengths,
        dilation_rates=pattern.dilation_rates, **SHAPES[shape],
    ).to("cuda")  # fmt: skip
    tokens, prompt = random_tokens(1, 1300).to("cuda"), 1260
    mask = torch.ones_like(tokens)
    mask[0, :7] = mask[0, -3] = 0
    real = mask.bool()
    taken = []

    def attend(*call, **options):
        taken.append(1)
        return decoding_hopper.attend_at_once(*call, **options)

    monkeypatch.setattr(decoding_token, "attend_at_once", attend)
    with torch.no_grad():
        exact = decoded(model, tokens, mask, prompt, False)[real]
        model = model.to(torch.bfloat16)
        at_once = decoded(model, tokens, mask, prompt, True)[real]
        if torch.cuda.get_device_capability() == (9, 0):
            assert len(taken) == (tokens.shape[1] - prompt) * model.config.num_hidden_layers
        monkeypatch.setattr(decoding_token, "at_once_refusal", lambda *call: "asked for")
        by_stretch = decoded(model, tokens, mask, prompt, True)[real]
    errors = [(x[prompt - 7 :].float() - exact[prompt - 7 :]).norm() for x in (at_once, by_stretch)]
    assert errors[0] < 1.2 * errors[1]


@pytest.mark.parametrize(
    ("rows", "width", "programs"), [(8192, 2048, 360), (4864, 896, 360), (48, 32, 8), (48, 32, 96)]
)
def test_what_is_fetched_ahead_lies_inside_the_weights(rows, width, programs):
    gate, up = torch.empty(rows, width, dtype=torch.bfloat16), torch.empty(rows, width, dtype=torch.bfloat16)
    each = decoding_hopper._ahead_bytes(programs, (gate, up))
    assert each % 16 == 0 and programs * each <= min(2 * gate.numel(), decoding_hopper.AHEAD_BYTES // 2)
    assert (each == 0) == (programs == 96)  # less than a line of the cache to each
    shifted = torch.empty(rows * width + 1, dtype=torch.bfloat16)[1:].view(rows, width)
    assert decoding_hopper._ahead_bytes(programs, (gate, shifted)) == 0


@needs_interpreter
def test_kernel_logic_in_the_interpreter():
    interpret(__file__)


@pytest.fixture
def served(monkeypatch):
    monkeypatch.setattr(decoding_token, "slots_refusal", lambda *call: None)


def refusal(model, cache=None, **options) -> str | None:
    cache = LongNetCache(model.config, max_length=20) if cache is None else cache
    with torch.no_grad():
        return decoding_token.decoding_refusal(model.model, cache, 1, options)


def test_what_the_fused_step_does_not_serve_is_said_by_name(served):
    model = tiny_model("retrofit").float()
    assert refusal(model) is None
    assert "output_attentions" in refusal(model, output_attentions=True)
    assert "the cache grows" in refusal(model, LongNetCache(model.config))
    recording = LongNetCache(model.config, max_length=20)
    recording.activate_past_recording()
    assert "taken back" in refusal(model, recording)
    many = LongNetCache(model.config, max_length=20)
    many.layers[0].seen = torch.zeros(2**16, dtype=torch.int64)
    assert refusal(model, many) == "it takes up to 65535 rows at once, got 65536"
    assert "xPos" in refusal(tiny_model(backbone="magneto").float())
    assert "'gelu'" in refusal(tiny_model(hidden_act="gelu").float())
    assert "'longnet_torch'" in refusal(tiny_model(attn_implementation="longnet_torch").float())
    dynamic = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    assert "'dynamic' depend on the length" in refusal(tiny_model(rope_parameters=dynamic).float())
    assert "eval()" in refusal(tiny_model("retrofit").float().train())
    with torch.enable_grad():
        assert "no gradients" in decoding_token.decoding_refusal(model.model, LongNetCache(model.config), 1, {})
    assert "autocast" in autocast_refusal(model)
    assert "one token per row" in decoding_token.decoding_refusal(model.model, None, 1, {})


def test_what_the_fused_head_does_not_serve_is_said_by_name(monkeypatch):
    def said(head=None, hidden=None, implementation: str = "sdpa") -> str | None:
        head = nn.Linear(8, 11, bias=False) if head is None else head
        with torch.no_grad():
            return decoding_token.head_refusal(
                head, torch.zeros(1, 1, 8) if hidden is None else hidden, implementation
            )

    assert said() == "it needs a CUDA device, the model is on cpu"
    monkeypatch.setattr(decoding_token, "device_refusal", lambda *call: None)
    assert said() is None
    assert said(hidden=torch.zeros(1, 2, 8)) == said(hidden=torch.zeros(2, 1, 8)) == "it takes one token of one row"
    assert said(implementation="eager") == "attn_implementation='eager' was asked for"
    assert said(nn.Sequential()) == "it knows no Sequential"
    assert said(nn.Linear(8, 11).double()).startswith("weights differ: torch.float64")
    hooked = nn.Linear(8, 11)
    hooked.register_forward_hook(print)
    assert said(hooked) == "Linear has hooks"
    assert "no gradients" in decoding_token.head_refusal(nn.Linear(8, 11), torch.zeros(1, 1, 8), "sdpa")


def autocast_refusal(model) -> str:
    with torch.autocast("cpu", torch.bfloat16):
        return refusal(model)


def test_layers_that_were_changed_keep_their_own_forward(served):
    def changed(change) -> str | None:
        model = tiny_model("retrofit").float()
        change(model.model.layers[1])
        return refusal(model)

    class Adapter(nn.Linear):
        pass

    def adapt(layer):
        layer.mlp.up_proj = Adapter(32, 48, bias=False)

    assert changed(lambda layer: None) is None
    assert changed(adapt) == "it knows no Adapter"
    assert changed(lambda layer: layer.mlp.register_forward_hook(print)) == "LlamaMLP has hooks"
    assert changed(lambda layer: layer.double()).startswith("weights differ: torch.float64")
    assert changed(lambda layer: setattr(layer.mlp, "forward", print)) == "the forward of LlamaMLP was replaced"
    rotation = changed(lambda layer: setattr(layer.self_attn, "rotate_heads", print))
    assert rotation == "the rotate_heads of LongNetAttention was replaced"


def test_ligers_forwards_are_served_and_only_on_their_own_modules(served):
    model = tiny_model("retrofit").float()
    layer, norm = model.model.layers[1], model.model.norm
    for module, forward in ((norm, norm_forward), (layer.input_layernorm, norm_forward), (layer.mlp, mlp_forward)):
        module.forward = MethodType(forward, module)
    layer.self_attn.rotate_heads = rotate
    assert refusal(model) is None
    norm.forward = layer.input_layernorm.forward  # reads the other norm's weight
    assert refusal(model) == "the forward of LlamaRMSNorm was replaced"
    norm.forward = MethodType(norm_forward, norm)
    layer.mlp.forward = MethodType(norm_forward, layer.mlp)
    assert refusal(model) == "the forward of LlamaMLP was replaced"

    def norm_by_name(self, x):
        return x

    norm_by_name.__name__ = norm_by_name.__qualname__ = norm_forward.__name__
    norm_by_name.__module__ = norm_forward.__module__
    layer.mlp.forward = MethodType(mlp_forward, layer.mlp)
    norm.forward = MethodType(norm_by_name, norm)
    assert refusal(model) == "the forward of LlamaRMSNorm was replaced"


def test_a_model_that_gave_hidden_states_once_is_served_again(served):
    model = tiny_model("retrofit").float()
    model(random_tokens(1, 5), output_hidden_states=True)
    assert refusal(model) is None
    assert "output_hidden_states" in refusal(model, output_hidden_states=True)


def test_the_ordinary_step_says_why_it_served(caplog):
    model = tiny_model("retrofit").float()
    cache = LongNetCache(model.config, max_length=20)
    with torch.no_grad(), caplog.at_level(logging.DEBUG):
        model(random_tokens(1, 1), past_key_values=cache)
    assert "the fused decoding step does not serve: " in caplog.text


def check_what_is_overwritten(device: str) -> None:
    """Fail unless a hook's tensor stays as it was, and embeddings that lie apart are read as what they are."""
    model = tiny_model("retrofit").float().to(device)
    tokens, kept = random_tokens(3, 9).to(device), []

    def step(rows: int, **inputs) -> torch.Tensor:
        cache = LongNetCache(model.config, max_length=9)
        model(tokens[:rows, :8], past_key_values=cache)
        return model(**inputs, past_key_values=cache).logits

    with torch.no_grad():
        embeds = model.model.embed_tokens(tokens[:, 8:])
        expected = step(3, inputs_embeds=embeds)
        apart = embeds[:, 0].t().contiguous().t()[:, None]
        torch.testing.assert_close(step(3, inputs_embeds=apart), expected, rtol=1e-6, atol=1e-6)
        handle = model.model.embed_tokens.register_forward_hook(lambda module, inputs, output: kept.append(output))
        step(1, input_ids=tokens[:1, 8:])
        handle.remove()
    assert torch.equal(kept[-1], embeds[:1])


@pytest.mark.gpu
def test_what_others_hold_is_not_overwritten():
    check_what_is_overwritten("cuda")


if __name__ == "__main__":  # run by test_kernel_logic_in_the_interpreter, in a process of its own
    torch.set_num_threads(1)
    check_plans("cpu", int(sys.argv[1]) if len(sys.argv) > 1 else 6)
    # The interpreter takes CPU tensors.
    decoding_token.slots_refusal = decoding_token.device_refusal = lambda *call: None
    check_what_is_overwritten("cpu")
    # Several blocks, and parts to merge in several goes.
    decoding_triton.KEYS_PER_BLOCK, decoding_triton.ATTENDING_PROGRAMS, decoding_triton.MERGED_AT_ONCE = 8, 12, 64
    for k, shape in enumerate(SHAPES):
        for preset in PRESETS if k == 0 else PRESETS[k % 3 :][:1]:
            model = tiny_model(preset, **shape).float()
            check_steps(model, 1, 54, 50, 1e-5)
            if k < 2:
                check_steps(model, 2, 54, 51, 1e-5)
            if model.config.dense_layers:
                check_steps(model, 2, 30, 27, 1e-5, room=300)
    check_steps(tiny_model("retrofit", hidden_size=2048 + 32, num_hidden_layers=1).float(), 1, 20, 17, 1e-4)
