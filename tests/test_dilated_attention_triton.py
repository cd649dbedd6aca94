"""The fused kernels against the oracle: on the GPU, and without one through Triton's interpreter."""

import random
import sys
from importlib.metadata import version
from itertools import combinations, product
from math import inf, lcm
from types import SimpleNamespace

import oracle
import pytest
import torch
from strategies import Call
from torch.nn.functional import scaled_dot_product_attention
from triton_interpreter import interpret, needs_interpreter

from modeling_longnet import (
    DilationPattern,
    attention_operator,
    cached_attention_triton,
    compiled_kernels,
    decoding_triton,
    dilated_attention,
    dilated_attention_hopper,
)
from modeling_longnet import dilated_attention_triton as fused_backend
from modeling_longnet.compiled_kernels import DirectLaunch, Pointer, Rows, specialization
from modeling_longnet.dilated_attention_hopper import hopper_refusal
from modeling_longnet.dilated_attention_launches import key_launches, query_launches
from modeling_longnet.dilated_attention_triton import triton_attention, triton_refusal
from modeling_longnet.launch_plans import TensorLayout, layout_of


PRESETS = ("paper", "torchscale", "retrofit")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def random_pattern(rng: random.Random, first_segment: int, nested: bool) -> DilationPattern:
    """Draw nested branches whose tiles are whole, or any branches at all."""
    rules = {"dilate_queries": rng.random() < 0.5, "window": rng.choice(["segment", "sliding"])}
    if nested:
        dilation_rates, segment_lengths = [rng.choice([1, 1, 1, 2])], [2 * first_segment]
        for _ in range(rng.randint(0, 3)):
            dilation_rates.append(dilation_rates[-1] * rng.choice([1, 2, 2, 3]))
            segment_lengths.append(lcm(segment_lengths[-1], dilation_rates[-1]) * rng.randint(1, 2))
        return DilationPattern(segment_lengths, dilation_rates, count_overlaps=rng.random() < 0.4, **rules)
    branches = rng.randint(1, 4)
    return DilationPattern(
        [rng.randint(1, 6 * first_segment) for _ in range(branches)],
        [rng.randint(1, 9) for _ in range(branches)],
        head_offsets=rng.choice(["interleaved", "blocked"]),
        **rules,
    )


def random_call(seed: int, max_length: int, first_segment: int, head_dims: tuple[int, ...]) -> Call:
    """Draw a call of any layout: plain, padded (holes too) or packed."""
    rng = random.Random(seed)
    layout = rng.choice(["plain", "plain", "padded", "packed"])
    batch = 1 if layout == "packed" else rng.randint(1, 2)
    length, num_kv_heads = rng.randint(1, max_length), rng.randint(1, 3)
    padding = boundaries = None
    if layout == "padded":
        share = rng.random() * 1.5  # from almost all padding to none
        padding = tuple(tuple(int(rng.random() < share) for _ in range(length)) for _ in range(batch))
    if layout == "packed":
        boundaries = (0, *sorted(rng.randint(0, length) for _ in range(rng.randint(0, 5))), length)
    return Call(
        pattern=random_pattern(rng, first_segment, nested=rng.random() < 0.6),
        batch=batch,
        num_heads=num_kv_heads * rng.choice([1, 1, 2, 3]),
        num_kv_heads=num_kv_heads,
        length=length,
        head_dim=rng.choice(head_dims),
        is_causal=rng.random() < 0.6,
        scale=rng.choice([None, 0.3, 1.5]),
        padding=padding,
        boundaries=boundaries,
        seed=seed,
    )


def results(attention, call: Call, dtype: torch.dtype, device: str) -> dict[str, torch.Tensor]:
    """Return output, lse and the gradients of a loss that weighs both, all in the dtype they come in."""
    query, key, value = call.tensors(dtype, device)
    # What the allocator hands out next holds nan: an element that nobody writes shows.
    del_me = [torch.full_like(x, torch.nan) for x in (query, query, key, value)]
    del del_me
    out, lse = attention(query, key, value)
    do, dlse = call.cotangents(dtype, device)
    loss = (out * do.to(out.dtype)).sum() + (lse.where(lse > -inf, 0) * dlse.to(lse.dtype)).sum()
    dq, dk, dv = torch.autograd.grad(loss, (query, key, value))
    return {"out": out, "lse": lse, "dq": dq, "dk": dk, "dv": dv}


def fused(call: Call, device: str):
    options = call.options(device)
    scale = call.head_dim**-0.5 if options["scale"] is None else options["scale"]
    mask = options["attention_mask"]
    return lambda query, key, value: triton_attention(
        query, key, value, call.pattern, is_causal=call.is_causal, attention_mask=None if mask is None else mask != 0,
        cu_seqlens=options["cu_seqlens"], scale=scale,
    )  # fmt: skip


def check_against_oracle(call: Call, dtype: torch.dtype, device: str) -> None:
    """Fail unless the kernels are within twice the error of the eager formula in the same dtype, bit for bit twice."""
    options = call.options(device)
    ours = results(fused(call, device), call, dtype, device)
    again = results(fused(call, device), call, dtype, device)
    # The oracle sees the rounded numbers.
    rounded = [x.detach().double().requires_grad_() for x in call.tensors(dtype, device)]
    out, lse = oracle.dilated_attention(*rounded, **options, **call.rules())
    do, dlse = (x.double() for x in call.cotangents(dtype, device))
    loss = (out * do).sum() + (lse.where(lse > -inf, 0) * dlse).sum()
    exact = {"out": out, "lse": lse, **dict(zip(("dq", "dk", "dv"), torch.autograd.grad(loss, rounded)))}
    eager = results(
        lambda q, k, v: dilated_attention(q, k, v, call.pattern, backend="eager", return_lse=True, **options),
        call, dtype, device,
    )  # fmt: skip
    assert torch.equal(ours["lse"] == -inf, exact["lse"] == -inf)
    for name, true in exact.items():
        assert not ours[name].isnan().any(), f"{name} holds nan, maybe rows that nobody wrote: {call}"
        assert torch.equal(ours[name], again[name]), f"{name} differs between two runs: {call}"
        true = true.detach().nan_to_num(neginf=0)
        error, eager_error = (
            (x[name].detach().double().nan_to_num(nan=inf, neginf=0) - true).abs().max().item() if true.numel() else 0
            for x in (ours, eager)
        )
        allowed = 2 * eager_error + 1e-5 * max(1.0, true.abs().max().item() if true.numel() else 0)
        assert error <= allowed, f"{name} is off by {error}, allowed {allowed}: {call}"


@pytest.mark.gpu
@pytest.mark.parametrize(
    "seed, head_dim, dtype",
    [(seed, head_dim, "bf16") for seed, head_dim in enumerate((16, 32, 64, 64, 80, 96, 128, 128, 256))]
    + [(20, 64, "fp16"), (21, 128, "fp16"), (22, 64, "fp32"), (23, 128, "fp32"), (24, 40, "bf16")],
)
def test_kernels_err_no_more_than_twice_as_much_as_eager(seed, head_dim, dtype):
    check_against_oracle(random_call(seed, 400, 64, (head_dim,)), DTYPES[dtype], "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("preset", PRESETS)
def test_presets_with_whole_tiles(preset, is_causal, head_dim):
    pattern = DilationPattern.geometric(128, 512, preset=preset)
    call = Call(pattern, 1, 4, 2, 512, head_dim, is_causal=is_causal)
    check_against_oracle(call, torch.bfloat16, "cuda")


# Tiles in which the last segment, or a document, is shorter than the others: several tiles each, and some to spare.
SHORT_LAST_SEGMENTS = [
    Call(DilationPattern((160, 320), (1, 2)), 1, 2, 2, 200, 16),
    Call(DilationPattern((300,), (1,)), 2, 2, 1, 1000, 16),
    Call(DilationPattern((300, 600), (2, 4)), 1, 4, 4, 1000, 16),
    Call(DilationPattern((160, 320), (1, 2)), 1, 2, 2, 400, 16, boundaries=(0, 50, 51, 290, 400)),
    Call(DilationPattern((64, 192, 576), (1, 3, 9), count_overlaps=False, window="sliding"), 1, 3, 3, 238, 16,
         is_causal=False, boundaries=(0, 40, 41, 150, 238)),
]  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("call", SHORT_LAST_SEGMENTS, ids=lambda call: f"L{call.length}-K{len(call.pattern.branches)}")
def test_a_short_last_segment_is_written_whole(call, dtype):
    check_against_oracle(call, DTYPES[dtype], "cuda")


def check_documents_that_lie_apart(device: str) -> None:
    """Fail unless a transposed mask and a column of a table of edges are read as if they were contiguous."""
    torch.manual_seed(0)
    mask, edges = (
        torch.rand(3, 24, device=device) < 0.7,
        torch.tensor([0, 7, 16, 24], dtype=torch.int32, device=device),
    )
    table = torch.stack([edges, torch.full_like(edges, 5)], dim=1)
    pattern = DilationPattern.preset("retrofit", [4, 8], [1, 2])
    for batch, plain, apart in (
        (3, {"attention_mask": mask}, {"attention_mask": mask.t().contiguous().t()}),
        (1, {"cu_seqlens": edges}, {"cu_seqlens": table[:, 0]}),
    ):
        tensors = [torch.randn(batch, 2, 24, 16, device=device, requires_grad=True) for _ in range(3)]
        found = []
        for documents in (plain, apart):
            options = {"is_causal": True, "attention_mask": None, "cu_seqlens": None, "scale": 0.25} | documents
            out, lse = triton_attention(*tensors, pattern, **options)
            found.append([out, lse, *torch.autograd.grad(out.square().sum(), tensors)])
        for ours, expected in zip(*found):
            assert torch.equal(ours, expected), apart


@pytest.mark.gpu
def test_documents_may_lie_apart():
    check_documents_that_lie_apart("cuda")


# The nearest branch gives some key far more gradient than all others: where sums are rounded after each branch, and what they
# add is rounded to its last place, the error is 2.7 and 2.4 times eager's in float16.
ROUNDED_TO_NOTHING = [
    Call(DilationPattern.geometric(24, 96, preset="retrofit"), 1, 2, 2, 150, 16, seed=0),
    Call(DilationPattern.geometric(16, 128, preset="retrofit"), 1, 2, 2, 200, 16, seed=10),
]


@pytest.mark.gpu
@pytest.mark.parametrize("call", ROUNDED_TO_NOTHING, ids=range(2))
def test_small_sums_of_far_branches_are_not_lost(call):
    check_against_oracle(call, torch.float16, "cuda")


RETROFIT = {"count_overlaps": False, "dilate_queries": False, "window": "sliding"}
# What the Hopper kernels serve: both ways to walk, all orders of tiles, GQA, packing, tiles that meet nothing, short ones.
HOPPER_CALLS = [
    Call(DilationPattern.geometric(256, 1024, preset="paper"), 2, 4, 2, 2048, 128),
    Call(DilationPattern.geometric(256, 1024, preset="torchscale"), 1, 6, 6, 1536, 64),
    Call(DilationPattern.geometric(256, 1024, preset="retrofit"), 2, 4, 2, 2048, 128),
    Call(DilationPattern.geometric(256, 1024, preset="retrofit"), 1, 4, 1, 1032, 64),
    Call(DilationPattern.geometric(256, 1024, preset="paper"), 1, 3, 3, 1032, 128, is_causal=False),
    Call(DilationPattern((300,), (1,)), 1, 2, 2, 1000, 64),
    Call(DilationPattern((300, 600), (2, 4), head_offsets="blocked"), 1, 8, 4, 1000, 128),
    Call(DilationPattern((128, 512), (4, 8), **RETROFIT), 1, 4, 4, 1024, 128),
    Call(DilationPattern.geometric(128, 1024, preset="paper"), 1, 4, 2, 1536, 64, boundaries=(0, 5, 700, 701, 1536)),
    Call(
        DilationPattern.geometric(128, 1024, preset="retrofit"), 1, 4, 2, 1536, 128, boundaries=(0, 5, 700, 701, 1536)
    ),
    Call(DilationPattern.geometric(256, 1024, preset="paper"), 2, 3, 3, 2048, 128),
    Call(DilationPattern.geometric(256, 1024, preset="paper"), 1, 4, 2, 2056, 64, is_causal=False),
    Call(DilationPattern.geometric(128, 1024, preset="paper"), 1, 2, 2, 1536, 128, boundaries=(0, 5, 700, 701, 1536)),
    Call(DilationPattern((96, 480, 960), (1, 3, 6)), 1, 2, 2, 1440, 128),
    Call(DilationPattern((256, 512), (2, 4)), 1, 4, 4, 1024, 64),
    Call(DilationPattern((160, 480), (1, 3), **RETROFIT | {"dilate_queries": True}), 2, 4, 2, 960, 64),
    # Dense queries: the nearest branches' gradients by one kernel, and what is left by two; all of them by one.
    Call(DilationPattern.geometric(128, 1024, preset="retrofit"), 1, 3, 3, 1800, 64),
    Call(
        DilationPattern.geometric(128, 1024, preset="retrofit"), 1, 2, 2, 1536, 64, boundaries=(0, 5, 700, 701, 1536)
    ),
    Call(DilationPattern.geometric(256, 1024, preset="retrofit"), 2, 2, 2, 1288, 64),
    Call(DilationPattern((300,), (1,), **RETROFIT), 1, 4, 2, 1000, 128),
    # Heads that do not fill a row of shared memory.
    Call(DilationPattern.geometric(256, 1024, preset="paper"), 2, 4, 2, 2048, 96),
    Call(DilationPattern.geometric(256, 1024, preset="paper"), 1, 3, 3, 1032, 80, is_causal=False),
    Call(DilationPattern.geometric(256, 1024, preset="retrofit"), 2, 4, 2, 2048, 80),
    Call(
        DilationPattern.geometric(128, 1024, preset="retrofit"), 1, 4, 2, 1536, 96, boundaries=(0, 5, 700, 701, 1536)
    ),
    Call(DilationPattern.geometric(128, 1024, preset="paper"), 1, 2, 2, 1536, 112, boundaries=(0, 5, 700, 701, 1536)),
]


def forget_plans():
    """Let the next call be planned anew, with the constants that hold then."""
    fused_backend._forward_plan.cache_clear()
    fused_backend._backward_plan.cache_clear()


@pytest.fixture
def any_number_of_tiles(monkeypatch):
    """Hopper kernels for calls that are as small as tests need."""
    monkeypatch.setattr(dilated_attention_hopper, "_fewest_tiles", lambda *call: 0)
    forget_plans()
    yield
    forget_plans()


def hopper_refuses(tensors, call: Call) -> str | None:
    return hopper_refusal("fwd", [layout_of(x) for x in tensors], call.pattern, False, call.is_causal)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("call", HOPPER_CALLS, ids=range(len(HOPPER_CALLS)))
def test_hopper_kernels_err_no_more_than_twice_as_much_as_eager(call, dtype, any_number_of_tiles):
    if refusal := hopper_refuses(call.tensors(DTYPES[dtype], "cuda"), call):
        pytest.skip(f"the portable kernels take this: {refusal}")
    check_against_oracle(call, DTYPES[dtype], "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("preset", ["paper", "retrofit"])
def test_hopper_kernels_read_heads_inside_tokens(preset, any_number_of_tiles, monkeypatch):
    """In a model's own layout, with gradients that arrive in another, the portable kernels agree."""
    pattern = DilationPattern.geometric(256, 1024, preset=preset)
    call = Call(pattern, 2, 8, 4, 1024, 64)
    query, key, value, do = (
        torch.randn(2, 1024, heads, 64, device="cuda", dtype=torch.bfloat16).transpose(1, 2) for heads in (8, 4, 4, 8)
    )
    do = do.contiguous()

    def run():
        leaves = [x.detach().requires_grad_() for x in (query, key, value)]
        out, lse = triton_attention(
            *leaves, pattern, is_causal=True, attention_mask=None, cu_seqlens=None, scale=64**-0.5
        )
        return [out, lse, *torch.autograd.grad(out, leaves, do)]

    if refusal := hopper_refuses((query, key, value, do), call):
        pytest.skip(f"the portable kernels take this: {refusal}")
    hopper = run()
    others = (("bwd",), ("bwd", "dkdv"), ("bwd", "dq"), ("fwd", "bwd", "dq", "dkdv"))
    for portable in others:  # each kernel is chosen by itself
        fewest = dict.fromkeys(portable, inf)
        monkeypatch.setattr(
            dilated_attention_hopper, "_fewest_tiles", lambda kernel, *_, fewest=fewest: fewest.get(kernel, 0)
        )
        forget_plans()
        for ours, theirs in zip(hopper, run()):
            assert ours.stride() == theirs.stride()
            torch.testing.assert_close(ours, theirs, atol=0.02, rtol=0.02)


@pytest.mark.gpu
@pytest.mark.parametrize("length, documents, head_dim", [(8192, 61, 64), (8192, 1, 64), (9480, 1, 128)])
def test_launches_that_overlap_give_the_same_bits_in_every_run(length, documents, head_dim, any_number_of_tiles):
    """Nobody may take rows that another launch has still to write; short documents leave tiles without rows besides."""
    cuts = sorted(random.Random(0).sample(range(1, length), documents - 1))
    boundaries = (0, *cuts, length) if cuts else None
    call = Call(DilationPattern.geometric(512, 4096, preset="paper"), 1, 8, 8, length, head_dim, boundaries=boundaries)
    first = results(fused(call, "cuda"), call, torch.bfloat16, "cuda")
    for _ in range(30):
        again = results(fused(call, "cuda"), call, torch.bfloat16, "cuda")
        assert all(torch.equal(x, again[name]) for name, x in first.items())


def test_hopper_kernels_leave_the_cpu_alone():
    call = Call(DilationPattern((64,), (1,)), 1, 2, 2, 128, 64)
    assert hopper_refuses(call.tensors(torch.bfloat16), call) in (
        "the device is no Hopper", "this triton has no Gluon for Hopper"
    )  # fmt: skip


@pytest.mark.parametrize(
    "preset, heads, kv_heads, head_dim, refusal",
    [
        ("paper", 16, 16, 128, None),
        ("paper", 16, 8, 64, None),
        ("paper", 16, 8, 128, None),
        ("paper", 32, 8, 128, "share 69206016 bytes"),
        ("retrofit", 16, 16, 128, None),
        ("retrofit", 16, 8, 128, "share 69206016 bytes"),
    ],
)
def test_the_backward_takes_one_kernel_where_what_tiles_share_stays_in_the_cache(
    preset, heads, kv_heads, head_dim, refusal, monkeypatch
):
    monkeypatch.setattr(dilated_attention_hopper, "num_processors", lambda device: 132)
    query, key = (
        layout_of(torch.empty(1, n, 4096, head_dim, dtype=torch.bfloat16, device="meta")) for n in (heads, kv_heads)
    )
    found = dilated_attention_hopper._one_kernel_refusal(
        query, key, DilationPattern.geometric(2048, 4096, preset=preset)
    )
    assert found is None if refusal is None else refusal in found


def planned_backward(monkeypatch, preset: str, heads: int, kv_heads: int, head_dim: int, length: int):
    """Return how many branches one kernel takes in a call on Hopper, the plan of its backward, and what that needs."""
    pytest.importorskip("triton", reason="triton is not installed")
    if dilated_attention_hopper.triton is None:
        pytest.skip(f"triton {version('triton')} has no Gluon for Hopper")
    monkeypatch.setattr(dilated_attention_hopper, "num_processors", lambda device: 132)
    monkeypatch.setattr(dilated_attention_hopper, "gluon_refusal", lambda device: None)
    query, key = (
        TensorLayout(
            (1, n, length, head_dim), (n * length * head_dim, head_dim, n * head_dim, 1), torch.bfloat16,
            torch.device("cuda", 0), True,
        )
        for n in (heads, kv_heads)
    )  # fmt: skip
    call = attention_operator.Call(DilationPattern.geometric(2048, length, preset=preset), True, 0.1)
    kind = fused_backend.Kind(None, False, call)
    layouts = {"query": query, "do": query, "key": key, "value": key}
    forget_plans()
    planned = fused_backend._backward_plan(query, query, key, key, query, None, kind)
    forget_plans()
    return fused_backend._near_branches(layouts, kind), *planned


@pytest.mark.parametrize(
    "preset, heads, kv_heads, head_dim, length, near",
    [
        ("paper", 16, 16, 128, 32768, 5),
        ("retrofit", 16, 16, 128, 32768, 2),
        ("retrofit", 16, 16, 64, 32768, 3),
        ("retrofit", 32, 8, 64, 131072, 1),
        ("retrofit", 32, 8, 128, 32768, 0),  # what tiles share of four query heads is more than the cache keeps
        ("retrofit", 16, 16, 128, 8192, 0),  # too few tiles
        ("retrofit", 16, 16, 64, 8192, 3),
    ],
)
def test_one_kernel_takes_the_nearest_branches_and_two_the_others(
    preset, heads, kv_heads, head_dim, length, near, monkeypatch
):
    found, plan, scratch, added_to = planned_backward(monkeypatch, preset, heads, kv_heads, head_dim, length)
    assert found == near
    pattern = DilationPattern.geometric(2048, length, preset=preset)
    covered = {"hopper_bwd_kernel": [], "hopper_bwd_dkdv_kernel": [], "hopper_bwd_dq_kernel": []}
    counters: dict[int, str] = {}  # of tiles that are drawn, and of those that are finished: nobody else's
    scaled, writing = 0, []
    for launch in plan.launches:
        name, given = launch.kernel.__name__, dict(zip(launch.kernel.arg_names, launch.arguments))
        if name == "scale_kernel":
            scaled += launch.grid[1]
            assert not covered["hopper_bwd_dq_kernel"], "dq is written before it is added to"
        if name not in covered:
            continue
        covered[name] += zip(given["windows"], given["previous_windows"])
        assert given["number"] not in counters and given["number"] < scratch.tallies
        counters[given["number"]] = name
        if "counters" in given:
            first = given["counters"]
            lanes = given["runs"] // given["periods"]
            for counter in range(first, first + lanes):
                assert counters.setdefault(counter, f"{name}, finished") == f"{name}, finished"
                assert counter < scratch.tallies
        if launch.constants["V"].first.value:
            writing.append((name, given["windows"][0]))
        if name == "hopper_bwd_kernel" and preset == "retrofit":
            assert len(covered["hopper_bwd_dkdv_kernel"]) == len(pattern.branches) - near, "the farthest come first"
        if name == "hopper_bwd_dq_kernel":  # it does not wait for keys' gradients, but for what it adds to
            assert scaled == (heads if near else 0) and ("launch_pdl" in launch.options) == (near == 0)
    previous = (0, *pattern.segment_lengths[:-1]) if preset == "retrofit" else (0,) * len(pattern.segment_lengths)
    branches = list(zip(pattern.segment_lengths, previous))
    nearest = list(dict.fromkeys(covered["hopper_bwd_kernel"]))  # some heads at a time
    assert nearest == (branches if preset == "paper" else branches[:near][::-1])
    assert covered["hopper_bwd_dkdv_kernel"] == branches[near:][::-1]
    assert covered["hopper_bwd_dq_kernel"] == branches[near:]
    assert scaled == (heads if near else 0)
    # Dilated queries' gradients are written by the first launch, dense ones' by their only one or from float32 rows.
    assert {name for name, _ in writing} == (
        {"hopper_bwd_kernel"} if preset == "paper" else {"hopper_bwd_dq_kernel"} if near == 0 else set()
    )
    assert added_to == (() if preset == "paper" else ("dk", "dv"))


@pytest.mark.skipif(dilated_attention_hopper.triton is None, reason="triton is not installed")
def test_the_backward_in_one_kernel_keeps_within_a_grid_whatever_the_batch(monkeypatch):
    monkeypatch.setattr(dilated_attention_hopper, "num_processors", lambda device: 132)
    x = layout_of(torch.empty(8192, 16, 256, 64, dtype=torch.bfloat16, device="meta"))
    layouts = dict.fromkeys(("query", "key", "value", "do", "out", "dq", "dk", "dv"), x)
    grouped = layouts | dict.fromkeys(("key", "value", "dk", "dv"), x._replace(shape=(8192, 1, 256, 64)))
    call = attention_operator.Call(DilationPattern.preset("paper", (64, 128), (1, 2)), True, 0.125)
    for each in (layouts, grouped):
        launches, _ = dilated_attention_hopper.hopper_bwd_launches(key_launches(call.pattern), each, 0, call)
        assert max(launch.grid[1] for launch in launches) <= 65535
        scaled = [launch.grid[1] for launch in launches if launch.grid[1] > 1]
        assert sum(scaled) == 8192 * 16, "every head of every row is scaled once"


def test_amds_cards_are_refused_by_name(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.4")
    query = SimpleNamespace(
        is_cuda=True, device=torch.device("cuda", 0), dtype=torch.bfloat16, shape=torch.Size((1, 2, 8, 16))
    )
    pattern = DilationPattern((4,), (1,))
    for backend in (fused_backend, cached_attention_triton, decoding_triton):
        monkeypatch.setattr(backend, "triton", object())
        monkeypatch.setattr(backend, "cuda_capability", lambda device: (9, 4))
    said = "written and tested for NVIDIA, this PyTorch is built for AMD (ROCm)"
    assert said in triton_refusal(query, query, query, pattern, 0.0)
    assert said in cached_attention_triton.fused_refusal(query, pattern, 0.0)
    assert said in decoding_triton.device_refusal(query.dtype, query.device)


@pytest.mark.gpu
@pytest.mark.parametrize("preset", ["paper", "retrofit"])
def test_operators_pass_opcheck(preset):
    pattern = DilationPattern.geometric(64, 256, preset=preset)
    inputs = Call(pattern, 1, 4, 2, 256, 64).tensors(torch.bfloat16, "cuda")
    call = attention_operator.Call(pattern, is_causal=True, scale=0.125)
    torch.library.opcheck(fused_backend._attention.registered, (*inputs, None, None, *call.flatten()))


@pytest.mark.gpu
@pytest.mark.parametrize("preset", ["paper", "retrofit"])
def test_compiles_once_for_all_lengths(preset):
    pattern = DilationPattern.geometric(64, 256, preset=preset)

    def attend(query, key, value):
        out, _ = triton_attention(
            query, key, value, pattern, is_causal=True, attention_mask=None, cu_seqlens=None, scale=0.125
        )
        return out * 2

    def step(function, length):
        tensors = Call(pattern, 1, 4, 2, length, 64).tensors(torch.bfloat16, "cuda")
        out = function(*tensors)
        return out, *torch.autograd.grad(out.float().square().sum(), tensors)

    def variants():
        kernels = (fused_backend.fwd_kernel, fused_backend.bwd_dq_kernel, fused_backend.bwd_dkdv_kernel)
        return [len(kernel.device_caches[torch.cuda.current_device()][0]) for kernel in kernels]

    torch.compiler.reset()
    compiled = torch.compile(attend, fullgraph=True, dynamic=True)
    step(compiled, 512)
    before = variants()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for length in (256, 768, 1024):
            for ours, plain in zip(step(compiled, length), step(attend, length)):
                assert torch.equal(ours, plain)
    assert variants() == before


def test_launches_are_told_apart_wherever_triton_compiles_them_differently():
    """Compiled kernels are reused by a key of ours, and Triton specializes on more than it is told, as inside tuples."""
    pytest.importorskip("triton", reason="triton is not installed")
    try:
        from triton._C.libtriton import native_specialize_impl
        from triton.backends.nvidia.compiler import CUDABackend
    except ImportError:
        pytest.skip(f"triton {version('triton')} has another specializer than 3.6")
    numbers = (0, 1, 3, 16, 48, 2**31 - 1, 2**31, 2**31 + 16)
    arguments = [*numbers, None, *product(numbers), *product(numbers, repeat=2)]
    for specialize in (True, False):
        for a, b in combinations(arguments, 2):
            compiled = [native_specialize_impl(CUDABackend, x, False, specialize, specialize) for x in (a, b)]
            if compiled[0] != compiled[1]:
                assert specialization(a) != specialization(b), (a, b, compiled)


@pytest.mark.parametrize("preset", ["paper", "retrofit"])
def test_a_row_of_millions_of_tokens_compiles_no_hopper_kernel_anew(preset, monkeypatch):
    """Its batch stride is wider than 32 bits, and Triton would compile for that."""
    pytest.importorskip("triton", reason="triton is not installed")
    if dilated_attention_hopper.triton is None:
        pytest.skip(f"triton {version('triton')} has no Gluon for Hopper")
    monkeypatch.setattr(dilated_attention_hopper, "num_processors", lambda device: 132)
    pattern = DilationPattern.geometric(2048, 2**18, preset=preset)
    call = attention_operator.Call(pattern, True, 0.1)

    def compiled_for(length: int) -> list[list]:
        strides = (32 * length * 64, 64, 32 * 64, 1)
        layout = TensorLayout((1, 32, length, 64), strides, torch.bfloat16, torch.device("cuda", 0), True)
        layouts = dict.fromkeys(("query", "key", "value", "out", "do", "dq", "dk", "dv"), layout)
        hopper = dilated_attention_hopper
        launches = (
            *hopper.hopper_fwd_launches(query_launches(pattern)[:2], layouts, 0, call)[0],
            *hopper.hopper_dq_launches(query_launches(pattern)[:2], layouts, 0, call),
            *hopper.hopper_dkdv_launches(key_launches(pattern)[:2], layouts, 0, call)[0],
            *(
                hopper.hopper_bwd_launches(key_launches(pattern), layouts, 0, call)[0][:2]
                if pattern.dilate_queries
                else ()
            ),
        )
        return [
            [
                # Of the others, Triton asks only whether 32 bits hold them.
                x >= 2**31 if isinstance(x, int) and parameter.do_not_specialize else specialization(x)
                for x, parameter in zip(launch.arguments, launch.kernel.params)
                if not isinstance(x, (Pointer, Rows))
            ]
            for launch in launches
        ]

    assert compiled_for(2**18) == compiled_for(2**22)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        (DilationPattern.geometric(2048, 2**14, preset="paper"), True),
        (DilationPattern.geometric(200, 1600, preset="paper"), False),
        (DilationPattern((2048, 3072), (1, 2), window="segment", dilate_queries=True), True),
        (DilationPattern((2048, 2176), (1, 2), window="segment", dilate_queries=True), False),
        (DilationPattern.geometric(2048, 2**14, preset="retrofit"), False),
    ],
)
def test_tiles_that_start_together_have_one_segment(pattern, expected, head_dim, monkeypatch):
    """Their kernel does not look where the segment of a row begins."""
    pytest.importorskip("triton", reason="triton is not installed")
    hopper = dilated_attention_hopper
    if hopper.triton is None:
        pytest.skip(f"triton {version('triton')} has no Gluon for Hopper")
    monkeypatch.setattr(hopper, "num_processors", lambda device: 132)
    length, heads = 2**14, 4
    strides = (heads * length * head_dim, head_dim, heads * head_dim, 1)
    layout = TensorLayout((1, heads, length, head_dim), strides, torch.bfloat16, torch.device("cuda", 0), True)
    layouts = dict.fromkeys(("query", "key", "value", "out", "do", "dq", "dk", "dv"), layout)
    call = attention_operator.Call(pattern, True, 0.1)
    launches = query_launches(pattern)
    planned, _ = hopper.hopper_fwd_launches(launches, layouts, 0, call)
    found = []
    for launch, plan in zip(launches, planned):
        variant = plan.constants["V"]
        rows = torch.arange(0, min(launch.period, length), launch.rate).split(variant.block_m.value)
        one_segment = all(len({x // w for x in tile.tolist()}) == 1 for tile in rows for w in launch.windows)
        assert one_segment or not variant.starts_together.value
        found.append(variant.starts_together.value)
    assert all(found) == expected
    others = hopper.hopper_fwd_launches(launches, layouts, 2, call)[0]  # documents begin anywhere
    others += hopper.hopper_dkdv_launches(key_launches(pattern), layouts, 0, call)[0]  # keys ask who meets them
    assert not any(plan.constants["V"].starts_together.value for plan in others)


class RecordedRelease:
    """A compiled kernel whose generated function writes down what it is given, and an encoder that does so too."""

    def __init__(self, monkeypatch, descriptors: bool, scratch: int = 0):
        triton = pytest.importorskip("triton", reason="triton is not installed")
        if not triton.__version__.startswith(compiled_kernels.READ_RELEASES):
            pytest.skip(f"triton {triton.__version__} is no release whose launcher was read")
        from triton.backends.nvidia import driver as nvidia

        def encode(*arguments):
            return ("encoded", *(tuple(x) if isinstance(x, list) else x for x in arguments))

        active = SimpleNamespace(
            utils=SimpleNamespace(fill_tma_descriptor=encode), get_current_device=lambda: 0,
            get_current_stream=lambda device: 7,
        )  # fmt: skip
        monkeypatch.setattr(triton.runtime, "driver", SimpleNamespace(active=active))
        monkeypatch.setattr(triton.compiler.compiler, "driver", SimpleNamespace(active=active))
        monkeypatch.setattr(compiled_kernels, "driver", SimpleNamespace(active=active))
        compiled_kernels._encoder.cache_clear()
        self.given: list[tuple] = []
        meta = {"swizzle": 3, "elem_size": 2, "elem_type": 10, "block_size": [1, 16, 32], "fp4_padded": False}
        signature = {"a": "*bf16", "n": "i32", "rates": ("i32",), "D": "constexpr", "missing": "constexpr"}
        if descriptors:
            signature = {"x": "tensordesc<bf16[1, 16, 32]>", **signature, "y": "tensordesc<bf16[1, 16, 32]>"}
        launcher = object.__new__(nvidia.CudaLauncher)
        metadata = [meta, meta | {"swizzle": 2}] if descriptors else []
        launcher.launch = nvidia.wrap_handle_tensordesc(self.record, signature, metadata)
        launcher.num_ctas, launcher.launch_cooperative_grid, launcher.launch_pdl = 1, False, False
        launcher.global_scratch_size, launcher.profile_scratch_size = scratch, 0
        launcher.global_scratch_align = launcher.profile_scratch_align = 1
        self.compiled = object.__new__(triton.compiler.CompiledKernel)
        self.compiled.module, self.compiled.function, self.compiled.packed_metadata = "module", 99, (4, 1, 1024)
        self.compiled._run = launcher
        self.compiled.name = "kernel"
        self.compiled.metadata = SimpleNamespace(tensordesc_meta=metadata)
        self.compiled.src = SimpleNamespace(signature=signature)

    def record(self, *arguments):
        hooks = slice(10, 13)  # what Triton hands to hooks, and the hooks
        head = [x for i, x in enumerate(arguments) if not hooks.start <= i < hooks.stop]
        self.given.append(tuple(x.data_ptr() if isinstance(x, torch.Tensor) else x for x in head))


@pytest.mark.parametrize("descriptors", [True, False])
def test_a_direct_launch_hands_over_what_triton_does(descriptors, monkeypatch):
    release = RecordedRelease(monkeypatch, descriptors)
    assert DirectLaunch.serves(release.compiled)
    if descriptors:
        from triton.tools.tensor_descriptor import TensorDescriptor
    shape, strides, block = (2, 64, 32), (2048, 32, 1), (1, 16, 32)
    arguments = (Pointer("a"), 5, (3,), None)
    if descriptors:
        x, y = (Rows(name, TensorDescriptor, shape, strides, block) for name in "xy")
        arguments = (x, *arguments, None, y)
    direct = DirectLaunch(release.compiled, (8, 2, 1), arguments, 0 if descriptors else 1)
    for _ in range(2):  # other tensors, other addresses
        tensors = {name: torch.zeros(shape, dtype=torch.bfloat16) for name in "axy"}
        filled = [x.filled(tensors) if isinstance(x, (Pointer, Rows)) else x for x in arguments]
        release.compiled[(8, 2, 1)](*filled, *([] if descriptors else [None]))
        direct({name: x.data_ptr() for name, x in tensors.items()}, 7)
        of_triton, ours = release.given[-2:]
        assert ours == of_triton
    assert len(release.given) == 4 and release.given[0] != release.given[2]


def test_only_launches_without_scratch_memory_or_observers_are_direct(monkeypatch):
    assert not DirectLaunch.serves(None)  # the interpreter's
    assert not DirectLaunch.serves(RecordedRelease(monkeypatch, True, scratch=64).compiled)
    release = RecordedRelease(monkeypatch, True)
    assert DirectLaunch.serves(release.compiled) and not DirectLaunch.is_watched()
    from triton import knobs

    hook = print
    knobs.runtime.launch_enter_hook.add(hook)
    try:
        assert DirectLaunch.is_watched()
    finally:
        knobs.runtime.launch_enter_hook.remove(hook)
    monkeypatch.setattr(compiled_kernels, "READ_RELEASES", ("0.0.",))
    assert not DirectLaunch.serves(release.compiled)


def test_plans_know_all_of_a_tensor_that_kernels_depend_on():
    x = torch.zeros(2, 3, 40, 16, dtype=torch.bfloat16)
    layout = layout_of(x)
    assert layout == layout_of(torch.zeros_like(x)) and hash(layout) == hash(layout_of(torch.zeros_like(x)))
    others = (
        x[:1], x.half(), x.transpose(1, 2).contiguous().transpose(1, 2), torch.zeros(2, 3, 40, 17, dtype=x.dtype)[..., 1:],
        x.to("meta"),
    )  # fmt: skip
    assert len({layout, *map(layout_of, others)}) == 1 + len(others)


@pytest.mark.gpu
@pytest.mark.parametrize("preset", ["paper", "retrofit"])
def test_repeated_calls_are_launched_directly_and_observers_see_them(preset):
    from triton import knobs

    call = Call(DilationPattern.geometric(256, 512, preset=preset), 1, 4, 2, 512, 64)
    forget_plans()
    results(fused(call, "cuda"), call, torch.bfloat16, "cuda")
    plans = [fused_backend._forward_plan.cache_info(), fused_backend._backward_plan.cache_info()]
    assert [plan.currsize for plan in plans] == [1, 1]
    seen = []
    knobs.runtime.launch_enter_hook.add(lambda metadata: seen.append(metadata.get()["name"]))
    try:
        watched = results(fused(call, "cuda"), call, torch.bfloat16, "cuda")
    finally:
        knobs.runtime.launch_enter_hook.calls.clear()
    assert {"fwd_kernel", "stats_kernel", "bwd_dq_kernel", "bwd_dkdv_kernel"} <= {
        x.removeprefix("hopper_") for x in seen
    }
    launched = []
    plain_call = DirectLaunch.__call__

    def counted(self, addresses, stream):
        launched.append(self)
        plain_call(self, addresses, stream)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DirectLaunch, "__call__", counted)
        direct = results(fused(call, "cuda"), call, torch.bfloat16, "cuda")
    assert len(launched) == len(seen)
    assert all(torch.equal(direct[name], watched[name]) for name in direct)


@pytest.mark.gpu
@pytest.mark.parametrize(("heads", "gigabytes"), [(9, 50), (16, 90)])
def test_offsets_past_32_bits(heads, gigabytes):
    """The last segment of more than 2^31, or of 2^32 elements equals the same segment alone, forward and backward."""
    if torch.cuda.mem_get_info()[0] < gigabytes * 1e9:
        pytest.skip(f"needs {gigabytes} GB of free GPU memory")
    length, head_dim, tail = 2**21, 128, 8192
    pattern = DilationPattern((1024, 4096), (1, 4))
    tensors = [torch.randn(1, length, heads, head_dim, device="cuda", dtype=torch.bfloat16) for _ in range(4)]

    def run(tensors):
        query, key, value, do = (x.transpose(1, 2) for x in tensors)
        leaves = [x.requires_grad_() for x in (query, key, value)]
        out, _ = triton_attention(
            *leaves, pattern, is_causal=True, attention_mask=None, cu_seqlens=None, scale=head_dim**-0.5
        )
        return [x[:, :, -tail:] for x in (out, *torch.autograd.grad(out, leaves, do))]

    for whole, alone in zip(run(tensors), run([x[:, -tail:] for x in tensors])):
        assert torch.equal(whole, alone)


@pytest.mark.gpu
def test_rates_whose_tiles_span_more_than_32_bits():
    length, rate, heads, head_dim = 2**20, 2**15, 16, 128
    pattern = DilationPattern((length,), (rate,))
    query, key, value = (
        torch.randn(1, length, heads, head_dim, device="cuda", dtype=torch.bfloat16).transpose(1, 2) for _ in range(3)
    )
    # An odd length keeps the copy engine out, whose descriptors need no wide offsets.
    query, key, value = (x[:, :, :-1] for x in (query, key, value))
    out, lse = triton_attention(
        query, key, value, pattern, is_causal=True, attention_mask=None, cu_seqlens=None, scale=head_dim**-0.5
    )
    for head in range(heads):
        q, k, v = (x[:, head : head + 1, head::rate].float() for x in (query, key, value))
        expected = scaled_dot_product_attention(q, k, v, is_causal=True)
        torch.testing.assert_close(out[:, head : head + 1, head::rate].float(), expected, atol=2e-2, rtol=2e-2)
        assert (lse[:, head] > -inf).sum() == q.shape[2]


@pytest.mark.gpu
def test_refusals_name_the_reason():
    query = torch.zeros(1, 2, 8, 16, device="cuda", dtype=torch.bfloat16)
    pattern = DilationPattern((4,), (1,))

    def refusal(query=query, pattern=pattern, dropout=0.0):
        return triton_refusal(query, query, query, pattern, dropout)

    assert refusal() is None
    assert "float64" in refusal(query.double())
    assert "dropout=0.1" in refusal(dropout=0.1)
    assert "up to 256, got 264" in refusal(query.new_zeros(1, 1, 8, 264))
    assert "up to 65535 rows at once, got 65536" in refusal(query.expand(2**16, -1, -1, -1))
    assert "got 2097152" in refusal(pattern=DilationPattern((2**22,), (2**21,)))


def test_cpu_tensors_are_refused():
    query = torch.zeros(1, 2, 8, 16)
    reason = triton_refusal(query, query, query, DilationPattern((4,), (1,)), 0.0)
    assert reason in ("triton is not installed", "the fused kernels need a CUDA device, the inputs are on cpu")


def test_dense_queries_meet_all_branches_in_one_launch():
    (launch,) = query_launches(DilationPattern.geometric(4, 16, preset="retrofit"))
    assert (launch.windows, launch.previous_windows, launch.rates) == ((4, 8, 16), (0, 4, 8), (1, 2, 4))
    assert launch.first and launch.rate == 1


@pytest.mark.parametrize("plan", [query_launches, key_launches])
def test_only_a_branch_that_keeps_every_row_may_write_first(plan):
    launches = plan(DilationPattern((16, 8, 4), (4, 2, 1)))
    assert [(launch.windows, launch.rates, launch.first) for launch in launches] == [
        ((4,), (1,), True), ((8,), (2,), False), ((16,), (4,), False)
    ]  # fmt: skip
    assert not any(launch.first for launch in plan(DilationPattern((4, 8), (2, 4))))


@pytest.mark.parametrize("plan", [query_launches, key_launches])
def test_progressions_start_anew_where_the_rate_does_not_divide_the_segment(plan):
    (launch,) = plan(DilationPattern((16,), (6,), window="sliding"))
    assert launch.period == 16 and launch.segmented
    (launch,) = plan(DilationPattern((18,), (6,), window="sliding"))
    assert launch.period > 2**30 and not launch.segmented


@needs_interpreter
@pytest.mark.parametrize("part", range(2))
def test_kernel_logic_in_the_interpreter(part):
    interpret(__file__, str(part))


if __name__ == "__main__":  # run by test_kernel_logic_in_the_interpreter, in a process of its own
    torch.set_num_threads(1)
    part = int(sys.argv[1])
    check_documents_that_lie_apart("cpu")
    for preset in PRESETS:
        pattern = DilationPattern.geometric(24, 96, preset=preset)
        check_against_oracle(Call(pattern, 1, 6, 3, 100, 8, is_causal=part == 0), torch.float32, "cpu")
    for seed in range(100 + 6 * part, 106 + 6 * part):
        check_against_oracle(random_call(seed, 120, 12, (8, 16, 20)), torch.float32, "cpu")
    for call in SHORT_LAST_SEGMENTS[part::2]:
        check_against_oracle(call, torch.float32, "cpu")
    check_against_oracle(ROUNDED_TO_NOTHING[part], torch.float16, "cpu")
