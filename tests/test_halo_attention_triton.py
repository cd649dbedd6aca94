"""The fused kernels for halos in Triton's interpreter; on the GPU, test_sequence_parallel.py runs them."""

import sys
from unittest.mock import patch

import torch
from imagined_ranks import Member, attend_on_imagined_ranks
from triton_interpreter import interpret, needs_interpreter

from modeling_longnet import DilationPattern, dilated_attention
from modeling_longnet.document_slices import Span
from modeling_longnet.halo_attention_triton import _query_launches, fold_halo_backward, fold_halo_forward
from modeling_longnet.sequence_exchange import plan_exchange
from modeling_longnet.sequence_shares import whole_rows


def launches_of(pattern: DilationPattern, rank: int, length: int) -> list[tuple[int, int]]:
    """List ``(rate, most queries)`` of the launches over the queries of one of eight ranks."""
    sequence = whole_rows(Member(rank, 8), 1, length)
    device = torch.device("cpu")
    plan = plan_exchange(pattern, 8, True, rank, 8, sequence.shares, sequence.documents, device)
    span = Span(rank * length, (rank + 1) * length)
    return [(x.rate, x.most_queries) for x in _query_launches(pattern, 8, plan.blocks, span, device)]


def test_dilated_queries_take_one_launch_per_branch_with_a_halo_over_the_queries_that_it_serves():
    pattern = DilationPattern.geometric(2048, 2**20)
    length = 2**17
    assert launches_of(pattern, 0, length) == []
    assert launches_of(pattern, 7, length) == [(r, length // r) for r in (128, 256, 512)]
    assert launches_of(pattern, 6, length) == [(r, length // r) for r in (256, 512)]  # a segment of 2**18 begins there


def test_dense_queries_take_one_launch_over_those_that_a_window_takes_beyond_the_slice():
    length = 2**17
    assert launches_of(DilationPattern.geometric(2048, 2**20, preset="retrofit"), 3, length) == [(1, length)]
    ((rate, queries),) = launches_of(DilationPattern.geometric(2048, 2**14, preset="retrofit"), 3, length)
    assert (rate, queries) == (1, 2**14 - 1)


def check_against_one_call(
    pattern: DilationPattern, is_causal: bool, slice_length: int, head_dim: int = 8, local: str = "triton", edges=None
) -> None:
    """Compare four imagined ranks, the halo attention fused, with eager attention in float64.

    Args:
        local: the backend of the slices' own keys.
        edges: of packed documents.
    """
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, heads, 4 * slice_length, head_dim) for heads in (4, 2, 2, 4)]
    *tensors, do = (torch.randn(shape, generator=generator) for shape in shapes)
    dlse = torch.randn(4, 1, generator=generator).expand(1, 4, 4 * slice_length)
    module = sys.modules["modeling_longnet.sequence_parallel"]
    with (
        patch.object(module, "fold_halo_forward", wraps=fold_halo_forward) as forward,
        patch.object(module, "fold_halo_backward", wraps=fold_halo_backward) as backward,
    ):
        found, plans = attend_on_imagined_ranks(
            tensors, (do, dlse), pattern, 4, local, is_causal, fused=True, edges=edges
        )
    shares_with_halo = sum(len({block.share for block in plan.blocks}) for plan in plans)
    assert forward.call_count == backward.call_count == shares_with_halo >= 3
    leaves = [x.double().requires_grad_() for x in tensors]
    cu_seqlens = None if edges is None else torch.tensor(edges, dtype=torch.int32)
    out, lse = dilated_attention(
        *leaves, pattern, is_causal=is_causal, cu_seqlens=cu_seqlens, backend="eager", return_lse=True
    )
    dlse = torch.where(lse.isneginf(), 0.0, dlse)  # nothing depends on the lse of a query that no branch serves
    expected = [out, lse, *torch.autograd.grad((out, lse), leaves, (do.double(), dlse.double()))]
    for a, b in zip(found, expected):
        torch.testing.assert_close(a.double(), b.detach(), rtol=2e-5, atol=2e-5)


@needs_interpreter
def test_kernel_logic_in_the_interpreter():
    interpret(__file__)


if __name__ == "__main__":  # run by test_kernel_logic_in_the_interpreter, in a process of its own
    torch.set_num_threads(1)
    retrofit = DilationPattern.geometric(16, 64, preset="retrofit")
    check_against_one_call(retrofit, True, 48)
    check_against_one_call(retrofit, False, 37, head_dim=16)  # slices begin off every segment and rate
    uneven = DilationPattern((12, 40), (1, 3), dilate_queries=False, window="sliding")  # the rate does not divide 40
    check_against_one_call(uneven, True, 35, head_dim=20)
    segments = DilationPattern((16, 48), (1, 2), dilate_queries=False, head_offsets="blocked")
    check_against_one_call(segments, True, 40)

    paper = DilationPattern.geometric(16, 64)
    check_against_one_call(paper, True, 37)
    uneven_paper = DilationPattern((16, 40, 80), (1, 3, 6))
    check_against_one_call(uneven_paper, False, 44)
    check_against_one_call(uneven_paper, True, 41, edges=(0, 20, 112, 125, 164))
    check_against_one_call(DilationPattern.preset("torchscale", (16, 40), (2, 3)), True, 30)
    check_against_one_call(DilationPattern((8, 16, 64), (1, 2, 4), count_overlaps=False), False, 37)
    nested = DilationPattern((8, 32), (2, 4), count_overlaps=False, window="sliding")
    check_against_one_call(nested, True, 30)
    check_against_one_call(DilationPattern((20, 40), (1, 6), window="sliding"), False, 27)
    # This rank of tensor parallelism holds the heads of other offsets; the kernels for a slice's own keys do not.
    check_against_one_call(paper.of_heads(1, 4), True, 40, local="torch")
    with patch("modeling_longnet.halo_attention_triton.MOST_SPLITS", 1):  # one program walks through all queries
        check_against_one_call(DilationPattern((160,), (2,), window="sliding"), False, 152)
