"""The operator on every backend: equal to the oracle, forward and gradient, and the theorems of its contract."""

import runpy
import sys
from contextlib import contextmanager
from dataclasses import asdict, replace
from itertools import product

import oracle
import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from strategies import Call, calls
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.testing import assert_close

from modeling_longnet import DilationPattern, attention_operator, dilated_attention, dilated_attention_torch
from modeling_longnet.dilated_attention_torch import _CudaCudnnKernel, _CudaEfficientKernel, _rows_are_aligned


# The backends that compute in float64, where equality with the oracle means 1e-12.
every_backend = pytest.mark.parametrize("backend", ["eager", "torch"])
# All (backend, device) pairs, for the tests with tolerances of the lower precisions.
every_device = pytest.mark.parametrize(
    ("backend", "device"),
    [
        ("eager", "cpu"),
        ("torch", "cpu"),
        pytest.param("eager", "cuda", marks=pytest.mark.gpu),
        pytest.param("torch", "cuda", marks=pytest.mark.gpu),
        pytest.param("triton", "cuda", marks=pytest.mark.gpu),
    ],
)
EXACT = {"rtol": 1e-12, "atol": 1e-12}

PAPER = DilationPattern.preset("paper", (8, 16, 32), (1, 2, 4))
PAPER_RATES = DilationPattern.preset("paper", (16, 32, 64, 128, 256), (1, 2, 4, 6, 12))
TORCHSCALE = DilationPattern.preset("torchscale", (8, 16, 32), (1, 2, 4))
RETROFIT = DilationPattern.preset("retrofit", (8, 16, 32), (1, 2, 4))
# Rate 5 exceeds segment length 3: the heads of offset 3 and 4 keep nothing there, and 7 divides neither 24 nor 40.
UNEVEN = DilationPattern((3, 24, 40), (5, 7, 3), window="sliding", dilate_queries=False)
SPARSE = DilationPattern((12,), (5,))
every_pattern = pytest.mark.parametrize(
    "pattern",
    [
        pytest.param(PAPER, id="paper"),
        pytest.param(PAPER_RATES, id="paper-rates"),
        pytest.param(TORCHSCALE, id="torchscale"),
        pytest.param(RETROFIT, id="retrofit"),
        pytest.param(replace(RETROFIT, dilate_queries=True, window="segment"), id="segments-once"),
        pytest.param(UNEVEN, id="uneven"),
        pytest.param(SPARSE, id="sparse"),
        pytest.param(DilationPattern((64,), (1,)), id="ordinary"),
    ],
)
causal_or_not = pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "bidirectional"])


@contextmanager
def poisoned_memory():
    """Fill uninitialised tensors with NaN, so that whoever reads one before writing it shows."""
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def evaluate(function, tensors, cotangent: Tensor, lse_cotangent: Tensor | None = None) -> dict[str, Tensor]:
    """Run a function of (query, key, value) that returns (output, lse) and pull cotangents back through it.

    Args:
        cotangent: ``[B, H, L, D]``, the gradient that arrives at the output.
        lse_cotangent: ``[B, H, L]``, the one that arrives at the lse; None: the lse takes no part.
    """
    out, lse = function(*tensors)
    outputs, cotangents = [out], [cotangent]
    if lse_cotangent is not None:
        outputs, cotangents = [out, lse], [cotangent, lse_cotangent]
    dq, dk, dv = torch.autograd.grad(outputs, tensors, cotangents)
    return {"out": out.detach(), "lse": lse.detach(), "dq": dq, "dk": dk, "dv": dv}


def operator(pattern: DilationPattern, backend: str, **options):
    """Return dilated attention as a function of (query, key, value) that gives (output, lse)."""
    return lambda q, k, v: dilated_attention(q, k, v, pattern, backend=backend, return_lse=True, **options)


def by_definition(pattern: DilationPattern, **options):
    """Return the oracle as a function of (query, key, value) that gives (output, lse)."""
    return lambda q, k, v: oracle.dilated_attention(q, k, v, **asdict(pattern), **options)


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], **tolerance) -> None:
    for name, tensor in expected.items():
        assert_close(actual[name], tensor, msg=lambda text, name=name: f"{name}: {text}", **(tolerance or EXACT))


def random_call(pattern: DilationPattern, length: int, **fields) -> Call:
    fields = {"batch": 2, "num_heads": 8, "num_kv_heads": 4, "head_dim": 8, "seed": 3} | fields
    return Call(pattern, length=length, **fields)


# Equality with the definition


@every_backend
@settings(max_examples=250)
@given(calls())
@example(random_call(PAPER, 0))
@example(random_call(RETROFIT, 1, is_causal=False))
@example(random_call(UNEVEN, 60, num_kv_heads=8, padding=((0,) * 60, (1, 0) * 30)))
@example(random_call(RETROFIT, 70, batch=1, boundaries=(0, 0, 33, 33, 70, 70)))
def test_output_and_gradients_equal_the_definition(backend, call):
    tensors, (cotangent, _) = call.tensors(), call.cotangents()
    expected = evaluate(by_definition(call.pattern, **call.options()), tensors, cotangent)
    with poisoned_memory():
        actual = evaluate(operator(call.pattern, backend, **call.options()), tensors, cotangent)
    assert_same(actual, expected)


@every_backend
@settings(max_examples=250)
@given(calls())
def test_gradients_through_the_lse_equal_the_definition(backend, call):
    tensors, cotangents = call.tensors(), call.cotangents()
    expected = evaluate(by_definition(call.pattern, **call.options()), tensors, *cotangents)
    with poisoned_memory():
        actual = evaluate(operator(call.pattern, backend, **call.options()), tensors, *cotangents)
    assert_same(actual, expected)


@every_backend
@every_pattern
@causal_or_not
def test_longer_inputs_than_the_longest_segment_equal_the_definition(backend, pattern, is_causal):
    call = random_call(pattern, 141, batch=1, num_heads=4, num_kv_heads=4, is_causal=is_causal)
    tensors, (cotangent, _) = call.tensors(), call.cotangents()
    expected = evaluate(by_definition(pattern, is_causal=is_causal), tensors, cotangent)
    assert_same(evaluate(operator(pattern, backend, is_causal=is_causal), tensors, cotangent), expected)


@pytest.mark.parametrize("scores_per_chunk", [1, 50, 400])
@pytest.mark.parametrize("pattern", [PAPER, RETROFIT, UNEVEN, SPARSE], ids=lambda p: f"{p.segment_lengths}")
def test_many_blocks_and_scores_are_computed_a_part_at_a_time(pattern, scores_per_chunk, monkeypatch):
    call = random_call(pattern, 70)
    tensors, cotangents = call.tensors(), call.cotangents()
    expected = evaluate(by_definition(pattern), tensors, *cotangents)
    monkeypatch.setattr(dilated_attention_torch, "BLOCKS_PER_CALL", 3)
    monkeypatch.setattr(dilated_attention_torch, "SCORES_PER_CHUNK", scores_per_chunk)
    # The gradient through lse takes the plain kernel, which makes scores.
    assert_same(evaluate(operator(pattern, "torch"), tensors, *cotangents), expected)
    assert_same(
        evaluate(operator(pattern, "torch"), tensors, cotangents[0]),
        evaluate(by_definition(pattern), tensors, cotangents[0]),
    )


def test_the_memory_efficient_kernel_gets_rows_of_lse_one_behind_the_other(monkeypatch):
    # It reads them by an aligned stride and takes for granted that the last one is 1, which views do not promise.
    given = []

    def record(grad, q, k, v, bias, out, lse, *state, **options):
        given.append(lse)
        return q, k, v, None

    monkeypatch.setattr(torch.ops.aten, "_scaled_dot_product_efficient_attention_backward", record)
    for rows in (64, 50):
        q, k, v, out, grad = torch.randn(5, 2, 4, rows, 8)
        lse = torch.randn(2, rows, 4).transpose(1, 2)
        _CudaEfficientKernel(1.0).backward(q, k, v, out, lse, grad, True)
        padded = given.pop()
        assert padded.is_contiguous() and padded.shape == (2, 4, 64)
        assert_close(padded[..., :rows], lse, rtol=0, atol=0)
        assert (padded[..., rows:] == torch.inf).all()


@every_backend
def test_huge_scores_neither_overflow_nor_lose_the_smaller_branch(backend):
    # Scores reach 1e5: far beyond what exp takes, and each branch's best key differs by thousands.
    call = random_call(PAPER, 40)
    query, key, value = (x.detach() for x in call.tensors())
    tensors = [x.requires_grad_() for x in (query * 300, key * 100, value)]
    expected = evaluate(by_definition(PAPER), tensors, *call.cotangents())
    # One rounding of a score of 1e5 moves its weight by 1e-11, and gradients carry the factor 300.
    assert_same(evaluate(operator(PAPER, backend), tensors, *call.cotangents()), expected, rtol=1e-8, atol=1e-8)


# Theorem 1


@every_backend
@causal_or_not
@pytest.mark.parametrize("window", ["segment", "sliding"])
@pytest.mark.parametrize("count_overlaps", [True, False])
@pytest.mark.parametrize("dilate_queries", [True, False])
def test_one_undilated_branch_over_the_whole_input_is_ordinary_attention(
    backend, is_causal, window, count_overlaps, dilate_queries
):
    for segment_length in (37, 1000):
        pattern = DilationPattern(
            [segment_length], [1], count_overlaps=count_overlaps, dilate_queries=dilate_queries, window=window
        )
        assert_is_ordinary_attention(pattern, backend, is_causal, length=37)


# Theorem 2


@every_backend
@causal_or_not
@pytest.mark.parametrize("length", [1, 13, 32])
def test_retrofit_within_the_first_window_is_ordinary_attention(backend, is_causal, length):
    pattern = DilationPattern.geometric(32, 256, preset="retrofit")
    assert_is_ordinary_attention(pattern, backend, is_causal, length)


def assert_is_ordinary_attention(pattern: DilationPattern, backend: str, is_causal: bool, length: int) -> None:
    call = random_call(pattern, length)
    tensors, (cotangent, _) = call.tensors(), call.cotangents()

    out = F.scaled_dot_product_attention(*tensors, is_causal=is_causal, enable_gqa=True)
    gradients = torch.autograd.grad(out, tensors, cotangent)
    expected = {"out": out.detach()} | dict(zip(("dq", "dk", "dv"), gradients))
    assert_same(evaluate(operator(pattern, backend, is_causal=is_causal), tensors, cotangent), expected)
    # Without its lse, too: then the torch backend leaves the gradient to PyTorch.
    out = dilated_attention(*tensors, pattern, backend=backend, is_causal=is_causal)
    gradients = torch.autograd.grad(out, tensors, cotangent)
    assert_same({"out": out.detach()} | dict(zip(("dq", "dk", "dv"), gradients)), expected)


@causal_or_not
def test_ordinary_attention_takes_the_node_of_pytorch_itself(is_causal):
    call = random_call(RETROFIT, 8)
    expected = F.scaled_dot_product_attention(*call.tensors(), is_causal=is_causal, enable_gqa=True).grad_fn
    out = dilated_attention(*call.tensors(), RETROFIT, is_causal=is_causal)
    assert type(out.grad_fn) is type(expected)


@pytest.fixture
def lse_asked_for(monkeypatch) -> list[bool]:
    """Play cuDNN's attention on the CPU and record whether each call asks it for lse."""
    asked = []

    def play(q, k, v, bias, compute_log_sumexp, dropout, is_causal, *, scale):
        asked.append(compute_log_sumexp)
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, dropout, is_causal, scale=scale)
        return out, lse[..., None], None, None

    monkeypatch.setattr(torch, "_scaled_dot_product_cudnn_attention", play)
    monkeypatch.setattr(dilated_attention_torch, "_kernel", lambda call, *_: _CudaCudnnKernel(call.scale))
    return asked


@pytest.mark.parametrize("needed", range(3), ids=["query", "key", "value"])
def test_cudnn_is_asked_for_lse_where_a_gradient_or_the_caller_needs_it(needed, lse_asked_for):
    tensors = [x.detach() for x in random_call(RETROFIT, 8).tensors()]
    out = dilated_attention(*tensors, RETROFIT)
    tensors[needed].requires_grad_()
    with_gradient = dilated_attention(*tensors, RETROFIT)
    with torch.no_grad():
        without_gradient = dilated_attention(*tensors, RETROFIT)
        _, lse = dilated_attention(*tensors, RETROFIT, return_lse=True)
    assert lse_asked_for == [False, True, False, True]
    assert with_gradient.requires_grad and not without_gradient.requires_grad
    assert_close(out, with_gradient.detach(), **EXACT)
    assert lse.shape == tensors[0].shape[:3]


def test_rows_are_aligned_where_every_one_starts_at_a_multiple_of_16_bytes():
    memory = torch.zeros(4096)
    assert memory.data_ptr() % 16 == 0
    for dtype, start, *strides in product(
        (torch.float32, torch.float16, torch.float64), (0, 2, 4, 8), *[(0, 2, 4, 8, 24)] * 3
    ):
        x = memory.view(dtype).as_strided((2, 2, 2, 1), (*strides, 1), start)
        starts = [x[b, h, row].data_ptr() for b, h, row in product(range(2), repeat=3)]
        assert _rows_are_aligned(x) == all(address % 16 == 0 for address in starts), (dtype, start, strides)


# Theorem 3


def each_alone(pattern: DilationPattern, backend: str, tensors, cotangents, pieces, **options) -> dict[str, Tensor]:
    """Compute every document as a batch of one and put the results back; padding keeps 0, and -inf as its lse."""
    query, key, value = tensors
    expected = {name: torch.zeros_like(x) for name, x in zip(("out", "dq", "dk", "dv"), (query, query, key, value))}
    expected["lse"] = torch.full(query.shape[:3], -torch.inf, dtype=query.dtype)
    for row, tokens in pieces:
        document = [x.detach()[row, None, :, tokens].clone().requires_grad_() for x in tensors]
        alone = evaluate(
            operator(pattern, backend, **options), document, *(x[row, None, :, tokens] for x in cotangents)
        )
        for name, tensor in alone.items():
            expected[name][row, :, tokens] = tensor[0]
    return expected


@every_backend
@every_pattern
@causal_or_not
@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.int64, torch.uint8])
def test_a_padded_row_equals_the_row_alone(backend, pattern, is_causal, mask_dtype):
    length = 45
    spans = [(0, slice(0, 45)), (1, slice(9, 45)), (2, slice(0, 36)), (3, slice(9, 27)), (4, slice(44, 45))]
    mask = torch.zeros(6, length, dtype=mask_dtype)  # the last row is padding throughout
    for row, real in spans:
        mask[row, real] = True if mask_dtype == torch.bool else 7

    call = random_call(pattern, length, batch=6)
    tensors, cotangents = call.tensors(), call.cotangents()
    expected = each_alone(pattern, backend, tensors, cotangents, spans, is_causal=is_causal)
    padded = operator(pattern, backend, is_causal=is_causal, attention_mask=mask)
    assert_same(evaluate(padded, tensors, *cotangents), expected)


@every_backend
@every_pattern
@causal_or_not
def test_a_packed_document_equals_the_document_alone(backend, pattern, is_causal):
    edges = [0, 0, 7, 40, 41, 41, 77]
    spans = [(0, slice(low, high)) for low, high in zip(edges, edges[1:]) if high > low]
    call = random_call(pattern, edges[-1], batch=1)
    tensors, cotangents = call.tensors(), call.cotangents()
    expected = each_alone(pattern, backend, tensors, cotangents, spans, is_causal=is_causal)
    packed = operator(pattern, backend, is_causal=is_causal, cu_seqlens=torch.tensor(edges, dtype=torch.int32))
    assert_same(evaluate(packed, tensors, *cotangents), expected)


@every_backend
@every_pattern
def test_a_mask_of_ones_and_one_packed_document_change_nothing(backend, pattern):
    call = random_call(pattern, 50, batch=1)
    tensors, cotangents = call.tensors(), call.cotangents()
    plain = evaluate(operator(pattern, backend), tensors, *cotangents)
    ones = torch.ones(1, 50, dtype=torch.long)
    whole = torch.tensor([0, 50], dtype=torch.int32)
    assert_same(evaluate(operator(pattern, backend, attention_mask=ones), tensors, *cotangents), plain)
    assert_same(evaluate(operator(pattern, backend, cu_seqlens=whole), tensors, *cotangents), plain)


@every_backend
@causal_or_not
def test_nan_in_padding_reaches_nothing(backend, is_causal):
    mask = torch.ones(3, 40, dtype=torch.bool)
    mask[0, :11] = mask[1, 33:] = mask[2, 5:9] = False  # left, right, and a hole
    call = random_call(UNEVEN, 40, batch=3)
    tensors, cotangents = call.tensors(), call.cotangents()
    attend = operator(UNEVEN, backend, is_causal=is_causal, attention_mask=mask)
    clean = evaluate(attend, tensors, *cotangents)

    def poison(x: Tensor) -> Tensor:
        padding = ~mask[:, None, :, None] if x.ndim == 4 else ~mask[:, None]
        return x.detach().masked_fill(padding, torch.nan)

    poisoned = [poison(x).requires_grad_() for x in tensors]
    assert_same(evaluate(attend, poisoned, *map(poison, cotangents)), clean, rtol=0, atol=0)
    for name in ("out", "dq", "dk", "dv"):
        padding = clean[name].transpose(1, 2)[~mask]
        assert torch.equal(padding, torch.zeros_like(padding)), name
    assert (clean["lse"].transpose(1, 2)[~mask] == -torch.inf).all()


# What a query that no branch covers gives


@every_backend
@causal_or_not
@pytest.mark.parametrize("window", ["segment", "sliding"])
def test_an_uncovered_query_gives_zero_and_finite_gradients(backend, is_causal, window):
    pattern = replace(SPARSE, window=window)
    call = random_call(pattern, 31, num_heads=7, num_kv_heads=7)
    tensors, cotangents = call.tensors(), call.cotangents()
    with poisoned_memory():
        actual = evaluate(operator(pattern, backend, is_causal=is_causal), tensors, *cotangents)

    positions = torch.arange(31)
    covered = torch.stack([(positions % 12) % 5 == head % 5 for head in range(7)]).expand(2, -1, -1)  # [B, H, L]
    assert torch.equal(actual["lse"] > -torch.inf, covered)
    for name in ("out", "dq", "dk", "dv"):
        # Without GQA a token that its head does not keep is neither query nor key.
        skipped = actual[name][~covered]
        assert torch.equal(skipped, torch.zeros_like(skipped)), name
        assert actual[name].isfinite().all(), name


@every_backend
def test_heads_whose_offset_lies_beyond_the_segment_give_zero(backend):
    pattern = DilationPattern([2], [5], dilate_queries=False)
    call = random_call(pattern, 9, num_heads=5, num_kv_heads=5)
    actual = evaluate(operator(pattern, backend), call.tensors(), *call.cotangents())
    for name in ("out", "dq", "dk", "dv"):
        assert torch.equal(actual[name][:, 2:], torch.zeros(2, 3, 9, 8, dtype=torch.float64)), name
    assert (actual["lse"][:, 2:] == -torch.inf).all()


# Lower precision


@every_device
@every_pattern
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
def test_lower_precision_errs_at_most_twice_as_much_as_the_reference(backend, device, pattern, dtype):
    """Against float64 on the same rounded inputs: ``eager`` against the plain formula in that dtype, others against it.

    The extra term is what rounding alone explains: errors are maxima over few elements. The final result is rounded
    once; in float32, where the sums are no more precise than the result, each of 90 terms may add its own rounding,
    which a random walk takes to about sqrt(90) of them.
    """
    options = random_call(pattern, 90, padding=((1,) * 90, (0,) * 8 + (1,) * 82)).options(device)
    call = random_call(pattern, 90, head_dim=16)
    tensors, (cotangent, _) = call.tensors(dtype, device), call.cotangents(dtype, device)
    exact_tensors = [x.detach().double().requires_grad_() for x in tensors]
    expected = evaluate(by_definition(pattern, **options), exact_tensors, cotangent.double())
    actual = evaluate(operator(pattern, backend, **options), tensors, cotangent)
    if backend == "eager":
        yardstick = evaluate(by_definition(pattern, dtype=dtype, **options), tensors, cotangent)
    else:
        yardstick = evaluate(operator(pattern, "eager", **options), tensors, cotangent)

    for name, tensor in expected.items():
        assert actual[name].dtype == (torch.float32 if name == "lse" else dtype), name
        assert torch.equal(actual[name].isfinite(), tensor.isfinite()), name
        roundings = 90**0.5 if dtype == torch.float32 else 1
        rounding = roundings * torch.finfo(dtype).eps * tensor.nan_to_num(neginf=0).abs().max()
        error, reference_error = (
            (x.double() - tensor).nan_to_num(0).abs().max() for x in (actual[name], yardstick[name])
        )
        assert error <= 2 * reference_error + rounding, f"{name}: {error=:.2e} {reference_error=:.2e} {rounding=:.2e}"


# Layouts


def laid_out(x: Tensor, layout: str) -> Tensor:
    """Return the same numbers ``[B, H, L, D]`` in other strides, the last dimension contiguous."""
    batch, heads, length, head_dim = x.shape
    if layout == "transposed":  # as projections leave it, [B, L, H, D]
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "heads-last-but-one":  # [L, B, H, D], as fairseq leaves it
        return x.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3)
    if layout == "sliced":  # a part of a wider tensor in every dimension
        wide = x.new_full((batch + 1, 2 * heads, 3 * length + 2, head_dim + 3), torch.nan)
        view = wide[1:, ::2, 1 : 3 * length + 1 : 3, 2 : head_dim + 2]
        return view.copy_(x)
    raise AssertionError(layout)


@every_backend
@every_pattern
@pytest.mark.parametrize("layout", ["transposed", "heads-last-but-one", "sliced"])
def test_any_strides_give_the_same_numbers(backend, pattern, layout):
    call = random_call(pattern, 50)
    tensors, cotangents = call.tensors(), call.cotangents()
    contiguous = evaluate(operator(pattern, backend), tensors, *cotangents)

    views = [laid_out(x.detach(), layout).requires_grad_() for x in tensors]
    assert not any(x.is_contiguous() for x in views)
    cotangent = laid_out(cotangents[0], layout)
    lse_cotangent = laid_out(cotangents[1][..., None], layout).squeeze(-1)
    before = [x.detach().clone() for x in (*views, cotangent, lse_cotangent)]
    actual = evaluate(operator(pattern, backend), views, cotangent, lse_cotangent)
    assert_same(actual, contiguous)
    for after, x in zip((*views, cotangent, lse_cotangent), before):
        assert torch.equal(after, x)
        assert after._version == (1 if layout == "sliced" else 0)  # copy_ filled the wide tensor once


@every_backend
@every_pattern
def test_expanded_inputs_and_gradients_give_the_same_numbers(backend, pattern):
    call = random_call(pattern, 50)
    row = [x.detach()[:1] for x in call.tensors()]
    expanded = [x.expand(2, -1, -1, -1).requires_grad_() for x in row]
    copied = [x.repeat(2, 1, 1, 1).requires_grad_() for x in row]
    # What sum().backward() sends: stride 0 everywhere, the last dimension included.
    ones = torch.ones((), dtype=torch.float64)
    shape = (2, 8, 50)
    actual = evaluate(operator(pattern, backend), expanded, ones.expand(*shape, 8), ones.expand(shape))
    expected = evaluate(operator(pattern, backend), copied, torch.ones(*shape, 8).double(), torch.ones(shape).double())
    assert_same(actual, expected)


@every_backend
def test_one_tensor_may_be_query_key_and_value(backend):
    call = random_call(RETROFIT, 40, num_kv_heads=8)
    x = call.tensors()[0]
    cotangent = call.cotangents()[0]
    (gradient,) = torch.autograd.grad(dilated_attention(x, x, x, RETROFIT, backend=backend), x, cotangent)
    separate = [x.detach().clone().requires_grad_() for _ in range(3)]
    expected = evaluate(operator(RETROFIT, backend), separate, cotangent)
    assert_close(gradient, expected["dq"] + expected["dk"] + expected["dv"], **EXACT)


@every_backend
@pytest.mark.parametrize("needed", range(3), ids=["query", "key", "value"])
def test_one_gradient_alone_equals_that_of_all_three(backend, needed):
    call = random_call(RETROFIT, 40)
    tensors, (cotangent, _) = call.tensors(), call.cotangents()
    expected = evaluate(operator(RETROFIT, backend), tensors, cotangent)
    mixed = [x.detach().requires_grad_(i == needed) for i, x in enumerate(tensors)]
    out = dilated_attention(*mixed, RETROFIT, backend=backend)
    (gradient,) = torch.autograd.grad(out, mixed[needed], cotangent)
    assert_close(gradient, expected[("dq", "dk", "dv")[needed]], **EXACT)


@every_backend
def test_the_lse_alone_has_exact_gradients(backend):
    call = random_call(RETROFIT, 40)
    tensors, (_, lse_cotangent) = call.tensors(), call.cotangents()
    expected = torch.autograd.grad(by_definition(RETROFIT)(*tensors)[1], tensors[:2], lse_cotangent)
    actual = torch.autograd.grad(operator(RETROFIT, backend)(*tensors)[1], tensors[:2], lse_cotangent)
    assert_close(actual, expected, **EXACT)


@every_backend
@every_pattern
def test_an_empty_batch_gives_empty_results(backend, pattern):
    tensors = [torch.randn(0, heads, 10, 8, requires_grad=True) for heads in (4, 2, 2)]
    out, lse = dilated_attention(*tensors, pattern, backend=backend, return_lse=True)
    assert out.shape == (0, 4, 10, 8) and lse.shape == (0, 4, 10)
    assert [g.shape[0] for g in torch.autograd.grad(out.sum() + lse.sum(), tensors)] == [0, 0, 0]


@every_backend
def test_autocast_casts_mixed_inputs_and_gives_each_its_own_gradient_dtype(backend):
    query, key = (torch.randn(1, heads, 40, 8, requires_grad=True) for heads in (4, 2))
    value = torch.randn(1, 2, 40, 8).bfloat16().requires_grad_()  # rotary embedding leaves the others in float32
    with torch.autocast("cpu", torch.bfloat16):
        out = dilated_attention(query, key, value, PAPER, backend=backend)
    gradients = torch.autograd.grad(out.float().square().sum(), (query, key, value))
    expected = dilated_attention(query.bfloat16(), key.bfloat16(), value, PAPER, backend=backend)
    assert out.dtype == torch.bfloat16 and torch.equal(out, expected)
    assert [g.dtype for g in gradients] == [torch.float32, torch.float32, torch.bfloat16]


@pytest.mark.parametrize("backend", ["eager", "torch"])
def test_products_beside_dropout_are_exact_under_autocast(backend):
    """A backward outside of autocast has to meet the scores that the forward computed."""
    tensors = [(3 * x.detach()).bfloat16().requires_grad_() for x in random_call(RETROFIT, 60).tensors()]
    options = {"dropout": 1e-12, "backend": backend}  # no weight is dropped, but the kernels are those of dropout
    with torch.autocast("cpu", torch.bfloat16):
        out = dilated_attention(*tensors, RETROFIT, **options)
    gradients = torch.autograd.grad(out.float().square().sum(), tensors)
    expected = dilated_attention(*tensors, RETROFIT, **options)
    assert torch.equal(out, expected)
    for ours, theirs in zip(gradients, torch.autograd.grad(expected.float().square().sum(), tensors)):
        assert torch.equal(ours, theirs)


class _OnCuda:
    """A tensor that says it is on a CUDA device."""

    is_cpu, is_cuda, device = False, True, torch.device("cuda", 0)

    def __init__(self, x: Tensor):
        self.x = x

    def __getattr__(self, name):
        return getattr(self.x, name)


@pytest.mark.parametrize("odd", range(3), ids=["query", "key", "value"])
def test_kernels_of_cuda_need_every_tensor_aligned(odd, monkeypatch):
    monkeypatch.setattr(dilated_attention_torch, "cuda_capability", lambda device: (9, 0))
    call = attention_operator.Call(PAPER, True, 1.0)
    chosen = lambda *xs: type(dilated_attention_torch._kernel(call, *map(_OnCuda, xs), None, 0)).__name__  # noqa: E731
    aligned = [torch.zeros(1, 2, 512, 64, dtype=torch.bfloat16) for _ in range(3)]
    assert chosen(*aligned) == "_CudaCudnnKernel"
    assert chosen(*[x[:, :, :100] for x in aligned]) == "_CudaFlashKernel"
    assert chosen(*[x[..., :20] for x in aligned]) == "_PlainKernel"
    assert chosen(*[x.float() for x in aligned]) == "_CudaEfficientKernel"
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert chosen(*aligned) == "_CudaFlashKernel"
    aligned[odd] = torch.zeros(1, 2, 512, 72, dtype=torch.bfloat16)[..., 1:65]
    assert chosen(*aligned) == "_PlainKernel"


def test_cards_before_ampere_and_amds_take_the_kernels_that_they_have(monkeypatch):
    call = attention_operator.Call(PAPER, True, 1.0)

    def chosen(dtype: torch.dtype, capability: tuple[int, int], hip: str | None = None) -> str:
        monkeypatch.setattr(dilated_attention_torch, "cuda_capability", lambda device: capability)
        monkeypatch.setattr(torch.version, "hip", hip)
        tensors = [_OnCuda(torch.zeros(1, 2, 512, 64, dtype=dtype)) for _ in range(3)]
        name = type(dilated_attention_torch._kernel(call, *tensors, None, 0)).__name__
        assert dilated_attention_torch.has_fused_kernel(*tensors) == (name != "_PlainKernel")
        return name

    half, bfloat16, full = torch.float16, torch.bfloat16, torch.float32
    for old in ((7, 0), (7, 5)):
        assert chosen(half, old) == chosen(full, old) == "_CudaEfficientKernel"
        assert chosen(bfloat16, old) == "_PlainKernel"
    for ampere in ((8, 0), (8, 9)):
        assert chosen(half, ampere) == chosen(bfloat16, ampere) == "_CudaFlashKernel"
    assert chosen(bfloat16, (9, 0)) == "_CudaCudnnKernel"
    assert chosen(bfloat16, (9, 4), hip="6.4") == chosen(half, (9, 4), hip="6.4") == "_CudaFlashKernel"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_what_one_piece_gives_beside_dropout_has_the_dtype_of_the_input(dtype):
    tensors = [torch.randn(1, 2, 32, 16, dtype=dtype, requires_grad=True) for _ in range(3)]
    ordinary = DilationPattern((64,), (1,))
    out, lse = dilated_attention(*tensors, ordinary, dropout=0.1, return_lse=True)
    assert (out.dtype, lse.dtype) == (dtype, torch.float32)
    assert dilated_attention(*tensors, ordinary, dropout=0.1).dtype == dtype
    assert all(x.dtype == dtype for x in torch.autograd.grad(out.sum() + lse.sum(), tensors))


def test_blocks_and_residues_beyond_a_grid_are_cut(monkeypatch):
    sparse = DilationPattern((8, 16), (1, 8), dilate_queries=False)
    call = random_call(sparse, 24, num_heads=2, num_kv_heads=2)
    whole = evaluate(operator(sparse, "torch"), call.tensors(), *call.cotangents())
    shapes, kernel = [], dilated_attention_torch._kernel
    monkeypatch.setattr(
        dilated_attention_torch, "_kernel", lambda call, q, *rest: shapes.append(q.shape) or kernel(call, q, *rest)
    )
    evaluate(operator(sparse, "torch"), call.tensors(), *call.cotangents())
    assert max(heads for _, heads, _, _ in shapes) > 3
    shapes.clear()
    monkeypatch.setattr(dilated_attention_torch, "BLOCKS_PER_CALL", 3)
    cut = evaluate(operator(sparse, "torch"), call.tensors(), *call.cotangents())
    assert max(max(blocks, heads) for blocks, heads, _, _ in shapes) == 3
    assert_close(cut, whole, **EXACT)


@pytest.mark.parametrize("length", [8, 24])  # one piece, several
def test_a_second_derivative_is_refused_in_a_line(length):
    pattern = DilationPattern.preset("retrofit", (8, 16), (1, 2))
    query, key, value = random_call(pattern, length).tensors()
    out, _ = dilated_attention(query, key, value, pattern, return_lse=True)
    (gradient,) = torch.autograd.grad(out.sum(), query, create_graph=True)
    assert_close(gradient, torch.autograd.grad(dilated_attention(query, key, value, pattern).sum(), query)[0], **EXACT)
    with pytest.raises(RuntimeError, match='differentiable once; backend="eager" is differentiable twice'):
        gradient.sum().backward()
    (gradient,) = torch.autograd.grad(
        dilated_attention(query, key, value, pattern, backend="eager").sum(), query, create_graph=True
    )
    gradient.sum().backward()


def test_fake_tensors_have_gradients_without_a_look_at_where_they_lie():
    with FakeTensorMode():
        tensors = [torch.randn(1, 2, 32, 16, requires_grad=True) for _ in range(3)]
        out = dilated_attention(*tensors, DilationPattern.preset("retrofit", (4, 8), (1, 2)))
        assert [x.shape for x in torch.autograd.grad(out.sum(), tensors)] == [(1, 2, 32, 16)] * 3


@pytest.mark.parametrize("head_dim", [20, 24])
def test_auto_takes_the_fused_kernels_where_pytorch_has_none(head_dim, monkeypatch):
    module = sys.modules[dilated_attention.__module__]
    monkeypatch.setattr(module, "triton_refusal", lambda *call: None)
    x = torch.zeros(1, 2, 16, head_dim, dtype=torch.bfloat16)
    ordinary = DilationPattern((16,), (1,))
    assert module.choose_backend("auto", x, x, x, ordinary, None, None, 0.0) == ("triton" if head_dim % 8 else "torch")


def test_a_batch_beyond_a_grid_is_cut(monkeypatch):
    call = random_call(PAPER, 12, batch=5)
    whole = evaluate(operator(PAPER, "torch"), call.tensors(), *call.cotangents())
    seen = []
    kernel = dilated_attention_torch._kernel
    monkeypatch.setattr(
        dilated_attention_torch, "_kernel", lambda call, q, *rest: seen.append(len(q)) or kernel(call, q, *rest)
    )
    monkeypatch.setattr(dilated_attention_torch, "BLOCKS_PER_CALL", 2)
    cut = evaluate(operator(PAPER, "torch"), call.tensors(), *call.cotangents())
    assert max(seen) == 2
    assert_close(cut, whole, **EXACT)


@every_backend
def test_without_gradients_the_numbers_are_the_same(backend):
    call = random_call(PAPER, 40)
    tensors = call.tensors()
    with torch.no_grad():
        out = dilated_attention(*tensors, PAPER, backend=backend)
    assert not out.requires_grad
    assert torch.equal(out, dilated_attention(*tensors, PAPER, backend=backend))


@every_backend
def test_the_lse_is_returned_only_on_request(backend):
    tensors = random_call(PAPER, 40).tensors()
    out, lse = dilated_attention(*tensors, PAPER, backend=backend, return_lse=True)
    assert torch.equal(dilated_attention(*tensors, PAPER, backend=backend), out)
    assert lse.shape == out.shape[:3]


def test_auto_equals_the_definition_and_is_the_default():
    call = random_call(RETROFIT, 60)
    tensors, cotangents = call.tensors(), call.cotangents()
    actual = evaluate(operator(RETROFIT, "auto"), tensors, *cotangents)
    assert_same(actual, evaluate(by_definition(RETROFIT), tensors, *cotangents))
    assert torch.equal(dilated_attention(*tensors, RETROFIT), actual["out"])


# Dropout


@every_backend
@pytest.mark.parametrize("pattern", [PAPER, RETROFIT], ids=["paper", "retrofit"])
def test_the_mean_over_dropout_draws_is_the_undropped_output(backend, pattern):
    draws = 600
    call = random_call(pattern, 40, batch=1)
    query, key, value = (x.detach().float().expand(draws, -1, -1, -1) for x in call.tensors())
    torch.manual_seed(0)
    dropped, lse = dilated_attention(query, key, value, pattern, dropout=0.3, backend=backend, return_lse=True)
    out, undropped_lse = dilated_attention(query[:1], key[:1], value[:1], pattern, backend=backend, return_lse=True)
    standard_error = dropped.std(dim=0) / draws**0.5
    # One of 2560 elements strays beyond 5 standard errors once in 700 seeds; this seed is fixed.
    assert ((dropped.mean(dim=0) - out[0]).abs() <= 5 * standard_error + 1e-5).all()
    assert (dropped.std(dim=0)[out[0] != 0] > 0).all()
    assert_close(lse, undropped_lse.expand_as(lse))


@every_backend
def test_dropout_keeps_a_lone_key_scaled_or_drops_it(backend):
    value = torch.ones(4000, 1, 1, 1)
    torch.manual_seed(1)
    out = dilated_attention(value, value, value, DilationPattern([4], [1]), dropout=0.25, backend=backend).flatten()
    assert_close(out.unique(), torch.tensor([0.0, 1 / 0.75]))
    # 4000 draws of probability 0.25: 5 standard deviations are 0.034.
    assert abs((out == 0).float().mean() - 0.25) < 0.034


@every_backend
@pytest.mark.parametrize("layout", ["batch", "padded", "packed", "heads"])
def test_dropout_draws_anew_for_every_row_document_and_head(backend, layout):
    """Equal inputs in two places must not be dropped alike."""
    torch.manual_seed(2)
    one = torch.randn(1, 1, 30, 4)
    first, second, options = (0, 0, slice(0, 30)), (1, 0, slice(0, 30)), {}
    x = one.repeat(2, 1, 1, 1)
    if layout == "padded":
        x = F.pad(x, (0, 0, 0, 2))
        options["attention_mask"] = torch.ones(2, 32).long().index_fill(1, torch.tensor([30, 31]), 0)
    if layout == "packed":
        x, first, second = one.repeat(1, 1, 2, 1), (0, 0, slice(0, 30)), (0, 0, slice(30, 60))
        options["cu_seqlens"] = torch.tensor([0, 30, 60], dtype=torch.int32)
    if layout == "heads":
        x, second = one.repeat(1, 2, 1, 1), (0, 1, slice(0, 30))
    out = dilated_attention(x, x, x, DilationPattern([8], [1]), dropout=0.5, backend=backend, **options)
    alike = (out[first] == out[second]).all(dim=-1)
    # Alike by chance: only queries whose few keys were all kept or dropped the same way.
    assert alike.float().mean() < 0.5


@every_backend
def test_no_dropout_is_no_dropout_and_draws_nothing(backend):
    tensors = random_call(PAPER, 40).tensors()
    state = torch.get_rng_state()
    assert torch.equal(
        dilated_attention(*tensors, PAPER, dropout=0.0, backend=backend),
        dilated_attention(*tensors, PAPER, backend=backend),
    )
    assert torch.equal(torch.get_rng_state(), state)


@every_backend
def test_dropout_repeats_under_the_same_seed_and_not_under_another(backend):
    tensors = random_call(PAPER, 40).tensors()

    def draw(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return dilated_attention(*tensors, PAPER, dropout=0.4, backend=backend)

    assert torch.equal(draw(5), draw(5))
    assert not torch.equal(draw(5), draw(6))
    torch.manual_seed(5)
    assert not torch.equal(
        dilated_attention(*tensors, PAPER, dropout=0.4, backend=backend),
        dilated_attention(*tensors, PAPER, dropout=0.4, backend=backend),
    )


@every_backend
@pytest.mark.parametrize("pattern", [PAPER, RETROFIT], ids=["paper", "retrofit"])
def test_gradients_under_dropout_are_those_of_the_dropped_function(backend, pattern):
    call = random_call(pattern, 19, batch=1, num_heads=2, num_kv_heads=1, head_dim=2)

    def dropped(*tensors):
        torch.manual_seed(4)
        return dilated_attention(*tensors, pattern, dropout=0.3, backend=backend, return_lse=True)

    assert torch.autograd.gradcheck(dropped, call.tensors())


# Refusals


def tensors(query=(2, 4, 6, 8), key=(2, 2, 6, 8), value=(2, 2, 6, 8), **options) -> dict:
    """Return arguments of the operator, shapes replaced by tensors."""
    given = {"query": query, "key": key, "value": value}
    return {name: torch.zeros(x) if isinstance(x, tuple) else x for name, x in given.items()} | options


PACKED = {"query": (1, 4, 6, 8), "key": (1, 2, 6, 8), "value": (1, 2, 6, 8)}


@pytest.mark.parametrize(
    ("arguments", "fragments"),
    [
        pytest.param(tensors(query=(4, 6, 8)), ["query", "(4, 6, 8)"], id="query-rank"),
        pytest.param(tensors(key=(1, 2, 2, 6, 8)), ["key", "(1, 2, 2, 6, 8)"], id="key-rank"),
        pytest.param(tensors(value=(6, 8)), ["value", "(6, 8)"], id="value-rank"),
        pytest.param(tensors(value=[[1.0]]), ["value", "list"], id="not-a-tensor"),
        pytest.param(tensors(query=(2, 5, 6, 8)), ["5", "2", "multiple"], id="heads-not-a-multiple"),
        pytest.param(tensors(query=(2, 1, 6, 8)), ["1", "2", "multiple"], id="fewer-heads-than-kv-heads"),
        pytest.param(tensors(key=(2, 0, 6, 8), value=(2, 0, 6, 8)), ["4", "0"], id="no-kv-heads"),
        pytest.param(tensors(query=(2, 0, 6, 8)), ["0", "2", "positive"], id="no-query-heads"),
        pytest.param(tensors(value=(2, 4, 6, 8)), ["(2, 2, 6, 8)", "(2, 4, 6, 8)"], id="key-and-value-heads"),
        pytest.param(tensors(key=(2, 2, 7, 8), value=(2, 2, 7, 8)), ["(2, 4, 6, 8)", "(2, 2, 7, 8)"], id="length"),
        pytest.param(tensors(key=(3, 2, 6, 8), value=(3, 2, 6, 8)), ["(2, 4, 6, 8)", "(3, 2, 6, 8)"], id="batch"),
        pytest.param(tensors(key=(2, 2, 6, 4), value=(2, 2, 6, 4)), ["(2, 4, 6, 8)", "(2, 2, 6, 4)"], id="head-dim"),
        pytest.param(
            tensors(query=(2, 4, 6, 0), key=(2, 2, 6, 0), value=(2, 2, 6, 0)), ["(2, 4, 6, 0)"], id="head-dim-0"
        ),
        pytest.param(
            tensors(key=torch.zeros(2, 2, 6, 8, dtype=torch.float64)),
            ["torch.float32", "torch.float64", "key"],
            id="mixed-dtypes",
        ),
        pytest.param(tensors(query=torch.zeros(2, 4, 6, 8).long()), ["query", "torch.int64"], id="integers"),
        pytest.param(tensors(query=torch.zeros(2, 4, 6, 8).cfloat()), ["query", "torch.complex64"], id="complex"),
        pytest.param(
            tensors(value=torch.zeros(2, 2, 8, 6).mT),
            ["value", "contiguous", "(96, 48, 1, 6)"],
            id="last-dimension-not-contiguous",
        ),
        pytest.param(
            tensors(key=torch.zeros(2, 2, 6, 8, device="meta")), ["key", "cpu", "meta"], id="key-on-another-device"
        ),
        pytest.param(
            tensors(attention_mask=torch.ones(2, 6, dtype=torch.bool, device="meta")),
            ["attention_mask", "cpu", "meta"],
            id="mask-on-another-device",
        ),
        pytest.param(tensors(attention_mask=torch.ones(2, 7).bool()), ["[2, 6]", "[2, 7]"], id="mask-length"),
        pytest.param(
            tensors(attention_mask=torch.ones(2, 1, 6, 6).bool()), ["[2, 6]", "[2, 1, 6, 6]"], id="mask-rank"
        ),
        pytest.param(tensors(attention_mask=torch.zeros(2, 6)), ["attention_mask", "torch.float32"], id="float-mask"),
        pytest.param(
            tensors(**PACKED, cu_seqlens=torch.tensor([1, 6], dtype=torch.int32)),
            ["cu_seqlens", "from 0", "got 1 to 6"],
            id="cu-seqlens-start",
        ),
        pytest.param(
            tensors(**PACKED, cu_seqlens=torch.tensor([0, 5], dtype=torch.int32)),
            ["cu_seqlens", "length 6", "got 0 to 5"],
            id="cu-seqlens-end",
        ),
        pytest.param(
            tensors(**PACKED, cu_seqlens=torch.tensor([0, 4, 3, 6], dtype=torch.int32)),
            ["cu_seqlens", "decrease", "4", "3"],
            id="cu-seqlens-decreasing",
        ),
        pytest.param(
            tensors(cu_seqlens=torch.tensor([0, 6], dtype=torch.int32)),
            ["cu_seqlens", "batch size 1", "got 2"],
            id="cu-seqlens-batch",
        ),
        pytest.param(
            tensors(**PACKED, cu_seqlens=torch.tensor([0.0, 6.0])),
            ["cu_seqlens", "torch.float32"],
            id="cu-seqlens-dtype",
        ),
        pytest.param(
            tensors(**PACKED, cu_seqlens=torch.tensor([[0, 6]], dtype=torch.int32)),
            ["cu_seqlens", "[1, 2]"],
            id="cu-seqlens-rank",
        ),
        pytest.param(
            tensors(**PACKED, cu_seqlens=torch.tensor([], dtype=torch.int32)),
            ["cu_seqlens", "[0]"],
            id="cu-seqlens-empty",
        ),
        pytest.param(tensors(**PACKED, cu_seqlens=[0, 6]), ["cu_seqlens", "tensor", "list"], id="cu-seqlens-type"),
        pytest.param(tensors(attention_mask=[[1] * 6] * 2), ["attention_mask", "tensor", "list"], id="mask-type"),
        pytest.param(
            tensors(
                **PACKED, cu_seqlens=torch.tensor([0, 6], dtype=torch.int32), attention_mask=torch.ones(1, 6).bool()
            ),
            ["attention_mask", "cu_seqlens", "not both"],
            id="mask-and-cu-seqlens",
        ),
        pytest.param(tensors(backend="flash"), ["'flash'", "'eager'", "'torch'", "'triton'", "'auto'"], id="backend"),
        pytest.param(tensors(pattern=[(4, 1)]), ["DilationPattern", "list"], id="not-a-pattern"),
        pytest.param(tensors(dropout=-0.1), ["dropout", "-0.1"], id="dropout-negative"),
        pytest.param(tensors(dropout=1.5), ["dropout", "1.5"], id="dropout-too-large"),
        pytest.param(tensors(dropout=float("nan")), ["dropout", "nan"], id="dropout-nan"),
        # Fused kernels scale the -inf of masked scores: 0 and below give NaN there.
        pytest.param(tensors(scale=0.0), ["scale", "positive", "0.0"], id="scale-zero"),
        pytest.param(tensors(scale=-0.5), ["scale", "positive", "-0.5"], id="scale-negative"),
        pytest.param(tensors(scale=float("nan")), ["scale", "positive", "nan"], id="scale-nan"),
        pytest.param(tensors(scale=float("inf")), ["scale", "finite", "inf"], id="scale-infinite"),
    ],
)
def test_bad_arguments_are_refused_with_the_numbers(arguments, fragments):
    with pytest.raises(ValueError) as error:
        dilated_attention(**{"pattern": PAPER} | arguments)
    message = str(error.value)
    missing = [fragment for fragment in fragments if fragment not in message]
    assert not missing, f"{missing} missing in: {message}"


# What is wrong with one tensor of an otherwise good call in bfloat16, and what the message says.
DEFECTS = {
    "half": (lambda x: x.half(), "share dtype and device: query has torch.b?float16 on cpu, .* has torch.b?float16"),
    "integers": (lambda x: x.long(), "must be float64, float32, bfloat16 or float16, got torch.int64"),
    "device": (lambda x: x.to("meta"), "share dtype and device: query has .* on (cpu|meta), .* on (cpu|meta)"),
    "no-tensor": (lambda x: x.tolist(), r"must be a tensor \[batch, heads, length, head_dim\], got list"),
    "rank-3": (lambda x: x[0], r"must be a tensor \[batch, heads, length, head_dim\], got shape \(\d, 6, 8\)"),
    "rank-5": (
        lambda x: x[None],
        r"must be a tensor \[batch, heads, length, head_dim\], got shape \(1, 2, \d, 6, 8\)",
    ),
    "batch": (lambda x: x[:1], "must agree in batch, length and head_dim|key and value must have one shape"),
    "heads": (lambda x: x[:, 1:], "the 3 query heads must be a positive multiple|key and value must have one shape"),
    "length": (lambda x: x[:, :, 1:], "must agree in batch, length and head_dim|key and value must have one shape"),
    "head-dim": (lambda x: x[..., :4], "must agree in batch, length and head_dim|key and value must have one shape"),
    "strides": (lambda x: x.mT.contiguous().mT, "needs a contiguous last dimension, got strides"),
}


@pytest.mark.parametrize("name", ["query", "key", "value"])
@pytest.mark.parametrize("defect", DEFECTS)
def test_one_bad_tensor_is_refused_after_good_calls_of_its_kind(name, defect):
    good = {name: x.bfloat16() for name, x in tensors().items()}
    dilated_attention(**good, pattern=RETROFIT)
    spoil, message = DEFECTS[defect]
    with pytest.raises(ValueError, match=message):
        dilated_attention(**good | {name: spoil(good[name])}, pattern=RETROFIT)
    with pytest.raises(ValueError, match="pattern must be a DilationPattern, got dict"):
        dilated_attention(**good, pattern=asdict(RETROFIT))
    dilated_attention(**good, pattern=RETROFIT)


def test_whatever_plainly_fits_passes_every_check():
    module = sys.modules[dilated_attention.__module__]
    shapes = [
        (2, 4, 6, 8),
        (2, 2, 6, 8),
        (2, 3, 6, 8),
        (2, 0, 6, 8),
        (1, 4, 6, 8),
        (2, 4, 5, 8),
        (2, 4, 6, 0),
        (4, 6, 8),
    ]
    good, fewer_heads, *others = [torch.zeros(shape) for shape in shapes]
    assert module._plainly_fit(good, fewer_heads, fewer_heads, PAPER)
    others += [spoil(good) for spoil, _ in DEFECTS.values()]
    for call in product([good, fewer_heads, *others], repeat=3):
        if module._plainly_fit(*call, PAPER):
            module._check_tensors(*call, PAPER)


def test_exceptions_that_the_quick_check_does_not_know_are_served():
    x = torch.randn(2, 4, 6, 8, dtype=torch.float64)
    expected = dilated_attention(x, x, x, RETROFIT)
    parameter = torch.nn.Parameter(x)
    assert_close(dilated_attention(parameter, x, x, RETROFIT).detach(), expected, **EXACT)
    # Code loaded with a checkpoint may hold the class twice.
    twin = runpy.run_path(sys.modules[DilationPattern.__module__].__file__)["DilationPattern"]
    assert twin is not DilationPattern
    pattern = twin.preset("retrofit", RETROFIT.segment_lengths, RETROFIT.dilation_rates)
    assert_close(dilated_attention(x, x, x, pattern), expected, **EXACT)
    narrow = x[..., 1:2]  # of one number per row, whose stride means nothing
    assert narrow.stride(-1) == 1
    assert_close(
        dilated_attention(*[narrow.as_strided(narrow.shape, (192, 48, 8, 8), 1)] * 3, RETROFIT),
        dilated_attention(*[narrow.contiguous()] * 3, RETROFIT),
        **EXACT,
    )


@pytest.mark.parametrize("backend", ["torch", "eager", "auto"])
def test_without_memory_it_gives_shapes_at_any_length(backend):
    length = 50 if backend == "eager" else 2**24
    query = torch.empty(1, 4, length, 8, device="meta", dtype=torch.bfloat16, requires_grad=True)
    key = torch.empty(1, 2, length, 8, device="meta", dtype=torch.bfloat16, requires_grad=True)
    out, lse = dilated_attention(query, key, key, PAPER, backend=backend, return_lse=True)
    out.sum().backward()
    assert out.is_meta and out.shape == query.shape and out.dtype == torch.bfloat16
    assert lse.shape == query.shape[:3] and lse.dtype == torch.float32
    assert query.grad.shape == query.shape and key.grad.shape == key.shape


def test_options_are_keywords_only():
    query, key, value = tensors().values()
    with pytest.raises(TypeError, match="positional"):
        dilated_attention(query, key, value, PAPER, True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA: the triton backend may run")
def test_triton_without_cuda_raises_with_the_reason():
    with pytest.raises((ValueError, RuntimeError), match='backend="triton"'):
        dilated_attention(*tensors().values(), PAPER, backend="triton")


def test_starts_of_documents_are_read_once_until_they_change(monkeypatch):
    reads = []
    to_list = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda x: reads.append(x) or to_list(x))
    q = torch.randn(1, 2, 8, 4)
    pattern = DilationPattern((4,), (1,))
    attend = lambda x, starts: dilated_attention(x, x, x, pattern, cu_seqlens=starts, backend="eager")  # noqa: E731
    starts = torch.tensor([0, 3, 8], dtype=torch.int32)
    for _ in range(3):
        attend(q, starts)
    assert len(reads) == 1
    with pytest.raises(ValueError, match="from 0 to the length 6"):
        attend(q[:, :, :6], starts)
    starts[1] = 9
    with pytest.raises(ValueError, match="must not decrease, got 9 followed by 8"):
        attend(q, starts)
    with torch.inference_mode():
        starts = torch.tensor([0, 3, 8])
        attend(q, starts)
        starts[1] = 9
        with pytest.raises(ValueError, match="must not decrease"):
            attend(q, starts)


def test_the_widest_rate_is_admitted_by_every_backend():
    """Its single row's step does not fit 64 bits."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 1, 10, 8, dtype=torch.float64)
    pattern = DilationPattern((4, 2**62), (1, 2**61))
    expected = dilated_attention(q, k, v, pattern, backend="eager")
    torch.testing.assert_close(dilated_attention(q, k, v, pattern, backend="torch"), expected)
