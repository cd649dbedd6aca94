"""The fused kernels over cached keys against the oracle: on the GPU, and without one through Triton's interpreter."""

import random
import sys
from math import inf
from unittest.mock import Mock

import oracle
import pytest
import torch
from strategies import Call
from test_dilated_attention_triton import random_pattern
from tiny_models import left_padding, random_tokens, tiny_model
from triton_interpreter import interpret, needs_interpreter

from modeling_longnet import DilationPattern, LongNetCache
from modeling_longnet import cached_attention as attention
from modeling_longnet.cache_layer import LongNetCacheLayer
from modeling_longnet.cached_attention import CachedKeys, cached_attention
from modeling_longnet.cached_attention_triton import (
    attend_decoding,
    attend_ranges,
    fused_refusal,
    serves_as_decoding,
)
from modeling_longnet.reach_ranges import oldest_reached, plan_ranges


PRESETS = ("paper", "torchscale", "retrofit")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def random_call(seed: int, max_length: int, first_segment: int, head_dims: tuple[int, ...]) -> Call:
    """Draw a causal call with rows padded on the left or not at all."""
    rng = random.Random(seed)
    batch, length, num_kv_heads = rng.randint(1, 2), rng.randint(2, max_length), rng.randint(1, 3)
    paddings = [rng.choice([0, rng.randint(0, length - 1)]) for _ in range(batch)]
    return Call(
        pattern=random_pattern(rng, first_segment, nested=rng.random() < 0.6),
        batch=batch,
        num_heads=num_kv_heads * rng.choice([1, 2, 3]),
        num_kv_heads=num_kv_heads,
        length=length,
        head_dim=rng.choice(head_dims),
        scale=rng.choice([None, 0.3, 1.5]),
        padding=tuple(tuple(map(int, row)) for row in left_padding(*paddings, length=length).tolist()),
        seed=seed,
    )


def check_against_oracle(call: Call, dtype: torch.dtype, device: str) -> set[str]:
    """Fail unless every chunk over the cache gives the rows of the whole; return which kernels served."""
    rng = random.Random(call.seed)
    tensors = [x.detach() for x in call.tensors(dtype, device)]
    exact, exact_lse = oracle.dilated_attention(*tensors, **call.options(device), **call.rules())
    mask = call.options(device)["attention_mask"] != 0
    positions = torch.where(mask, mask.long().cumsum(-1) - 1, -1)
    scale = call.head_dim**-0.5 if call.scale is None else call.scale
    layer = LongNetCacheLayer(call.pattern, max_length=rng.choice([None, call.length]))
    done, served = 0, set()
    while done < call.length:
        chunk = slice(done, min(call.length, done + rng.choice([1, 1, 2, 5, rng.randint(1, call.length)])))
        done = chunk.stop
        query, key, value = (x[:, :, chunk] for x in tensors)
        keys, values = layer.update(key, value, positions=positions[:, chunk])
        cached = CachedKeys(keys, values, layer.attended_positions, layer.attended_branches)
        # What the allocator hands out next holds nan: an element that nobody writes shows.
        del_me = [torch.full_like(query, torch.nan, dtype=x) for x in (dtype, torch.float32) for _ in range(3)]
        del del_me
        results = {}
        if serves_as_decoding(query, keys):
            oldest = oldest_reached(call.pattern, positions[:, chunk], call.num_kv_heads)
            results["decoding"] = attend_decoding(
                query, *cached, oldest, positions[:, chunk], count_overlaps=call.pattern.count_overlaps, scale=scale
            )
        passes = plan_ranges(call.pattern, positions[:, chunk], cached.positions, cached.branches)
        results["ranges"], lse = attend_ranges(query, keys, values, passes, scale=scale)
        plain = cached_attention(
            query, cached, call.pattern, query_positions=positions[:, chunk], scale=scale, return_weights=True
        )[0]
        true = exact[:, :, chunk]
        assert torch.equal(lse == -inf, exact_lse[:, :, chunk] == -inf), f"ranges lse: {call}"
        torch.testing.assert_close(
            lse.nan_to_num(neginf=0).double(), exact_lse[:, :, chunk].nan_to_num(neginf=0), rtol=1e-3, atol=1e-3
        )
        plain_error = (plain.double() - true).abs().max().item()
        for name, out in results.items():
            served.add(name)
            error = (out.double() - true).abs().nan_to_num(nan=inf).max().item()
            allowed = 2 * plain_error + 1e-5 * max(1.0, true.abs().max().item())
            assert error <= allowed, f"{name} is off by {error:.2e}, allowed {allowed:.2e}, at {chunk}: {call}"
    return served


GPU_CASES = [(seed, dtype) for seed in range(24) for dtype in DTYPES]


@pytest.mark.gpu
@pytest.mark.parametrize(("seed", "dtype"), GPU_CASES, ids=lambda x: str(x))
def test_chunks_over_the_cache_equal_the_oracle(seed, dtype):
    call = random_call(seed, 700, 32, (16, 20, 64, 80, 128, 256))
    check_against_oracle(call, DTYPES[dtype], "cuda")


@pytest.mark.gpu
@pytest.mark.filterwarnings("default")  # inductor advises, and raises its advice as an error of the compiled graph
@pytest.mark.parametrize("preset", PRESETS)
def test_generation_on_the_gpu_compiled_or_not_is_that_of_the_full_forward(preset):
    model = tiny_model(preset, num_key_value_heads=2, head_dim=16).float().cuda()
    tokens, mask = random_tokens(2, 20).cuda(), left_padding(0, 7, length=20).cuda()
    with torch.no_grad():
        for cache in (None, LongNetCache(model.config, max_length=130)):
            out = model.generate(
                tokens, attention_mask=mask, past_key_values=cache, max_new_tokens=100, do_sample=False,
                eos_token_id=None, return_dict_in_generate=True, output_logits=True,
            )  # fmt: skip
            sequences = out.sequences
            logits = torch.stack(out.logits, dim=1)
            whole_mask = torch.cat([mask, mask.new_ones(2, 100)], dim=1)
            full = model(sequences, attention_mask=whole_mask, use_cache=False).logits[:, 19:-1]
            torch.testing.assert_close(logits, full, rtol=2e-3, atol=2e-3)


@pytest.mark.gpu
def test_long_chunks_take_memory_linear_in_the_chunk():
    pattern = DilationPattern.geometric(256, 2**20, preset="retrofit")
    peaks = []
    for length in (2**14, 2**15):
        layer = LongNetCacheLayer(pattern)
        for step in range(2):
            query, key, value = torch.randn(3, 1, 2, length, 64, device="cuda", dtype=torch.bfloat16)
            positions = torch.arange(step * length, (step + 1) * length, device="cuda")[None]
            keys, values = layer.update(key, value, positions=positions)
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            cached = CachedKeys(keys, values, layer.attended_positions, layer.attended_branches)
            with torch.no_grad():
                cached_attention(query, cached, pattern, query_positions=positions, scale=0.125)
            torch.cuda.synchronize()
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[1] < 2.5 * peaks[0]


def test_the_fused_kernels_say_what_they_do_not_support():
    query = torch.zeros(1, 2, 1, 16)
    pattern = DilationPattern((8,), (1,))
    refusal = fused_refusal(query, pattern, 0.0)
    assert refusal in ("triton is not installed", "the fused kernels need a CUDA device, the inputs are on cpu")


def test_an_empty_batch_takes_no_kernel():
    query, keys, places = torch.zeros(0, 4, 1, 16), torch.zeros(0, 2, 5, 16), torch.zeros(0, 2, 5, dtype=torch.int64)
    oldest, newest = torch.zeros(0, 2, 1, 1, dtype=torch.int64), torch.zeros(0, 1, dtype=torch.int64)
    out = attend_decoding(query, keys, keys, places, places, oldest, newest, count_overlaps=False, scale=1.0)
    assert out.shape == query.shape


@needs_interpreter
def test_kernel_logic_in_the_interpreter():
    interpret(__file__)


def check_model(preset: str) -> None:
    """Fail unless a model's chunks and compiled steps give the logits of its full forward."""
    model = tiny_model(preset, layers_without_rope=(0, 1)).float()
    tokens, mask = random_tokens(2, 75), left_padding(0, 6, length=75)
    cache = LongNetCache(model.config, max_length=75)
    step = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        logits = [
            model(tokens[:, :36], attention_mask=mask[:, :36], past_key_values=cache).logits,
            model(tokens[:, 36:71], attention_mask=mask[:, :71], past_key_values=cache).logits,
        ]
        logits += [step(tokens[:, t : t + 1], past_key_values=cache).logits for t in range(71, 75)]
        full = model(tokens, attention_mask=mask, use_cache=False).logits
    torch.testing.assert_close(torch.cat(logits, dim=1)[mask.bool()], full[mask.bool()], rtol=1e-3, atol=1e-3)


if __name__ == "__main__":  # run by test_kernel_logic_in_the_interpreter, in a process of its own
    torch.set_num_threads(1)
    kernels = set()
    for preset in PRESETS:
        pattern = DilationPattern.geometric(8, 32, preset=preset)
        padding = tuple(map(tuple, left_padding(0, 9, length=70).tolist()))
        kernels |= check_against_oracle(Call(pattern, 2, 4, 2, 70, 8, padding=padding), torch.float32, "cpu")
    for seed in range(int(sys.argv[1]) if len(sys.argv) > 1 else 8):
        kernels |= check_against_oracle(random_call(seed, 90, 12, (8, 16, 20)), torch.float32, "cpu")
    assert kernels == {"decoding", "ranges"}
    attention.fused_refusal = lambda *call: None  # the interpreter takes CPU tensors
    attention.attend_ranges = counted = Mock(wraps=attend_ranges)
    check_model("paper")
    check_model("retrofit")
    assert counted.call_count == 4  # one chunk too long for decoding, two layers, two models
